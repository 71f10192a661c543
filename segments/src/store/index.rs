//! The index in memory: what is held, without what a file can tell.
//!
//! Of every audit log it holds the sequences, its pages and sums; the entries themselves lie in the
//! pages on disk, of which a few are cached. The other kinds are few and held whole. [`load`] reads
//! the index that a run before left; it needs no more than the catalog, the journal and a look at the
//! files that the journal names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::catalog::{CATALOG_PATH, Catalog, LogRecord};
use super::chain::{self, ChainEntry, LogName, PAGE_BYTES, PageId, place};
use super::journal::{self, Change, JOURNAL_BYTES};
use super::{CHAIN_DIR, JOURNAL_PATH, StoreError, receipts, receipts_path, segment_path};
use crate::disk::{self, Disk, DiskError, DiskFault, DiskFile, OpenMode};
use crate::format::SegmentRef;
use crate::id::{DomainId, Kind, NodeId, Origin, SegmentId};
use crate::ledger::{Charge, Reservation};
use crate::limits::{MAX_CACHED_PAGES, MAX_CATALOG_BYTES, MAX_PLACES_REMEMBERED, MAX_PUT_GROUP};
use crate::root::{Root, RootError};

/// Counts of custodians are kept apart up to here; a config asks for at most 16.
pub(super) const COUNTED_CUSTODIANS: usize = 17;

/// Ascending ranges of sequences, inclusive and apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// The ranges, if they are ascending and apart.
    fn checked(ranges: Vec<(u64, u64)>) -> Option<Self> {
        let apart = |pair: &[(u64, u64)]| match pair {
            [(_, a), (b, _)] => a.checked_add(1).is_some_and(|next| next < *b),
            _ => true,
        };
        let good = ranges.iter().all(|(from, to)| from <= to) && ranges.windows(2).all(apart);
        good.then_some(Self(ranges))
    }

    pub(super) fn as_slice(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// The number of the first range that ends at this sequence or after.
    fn position(&self, sequence: u64) -> usize {
        self.0.partition_point(|(_, to)| *to < sequence)
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        let range = self.0.get(self.position(sequence));
        range.is_some_and(|(from, _)| *from <= sequence)
    }

    pub(super) fn insert(&mut self, sequence: u64) {
        if self.contains(sequence) {
            return;
        }
        let at = self.position(sequence);
        let joins_next = self
            .0
            .get(at)
            .is_some_and(|(from, _)| sequence.checked_add(1) == Some(*from));
        let before = at.checked_sub(1);
        let joins_before = before
            .and_then(|before| self.0.get(before))
            .is_some_and(|(_, to)| to.checked_add(1) == Some(sequence));
        match (joins_before.then_some(before).flatten(), joins_next) {
            (Some(before), true) => {
                let (_, to) = self.0.remove(at);
                if let Some(range) = self.0.get_mut(before) {
                    range.1 = to;
                }
            }
            (Some(before), false) => {
                if let Some(range) = self.0.get_mut(before) {
                    range.1 = sequence;
                }
            }
            (None, true) => {
                if let Some(range) = self.0.get_mut(at) {
                    range.0 = sequence;
                }
            }
            (None, false) => self.0.insert(at, (sequence, sequence)),
        }
    }

    pub(super) fn remove(&mut self, sequence: u64) {
        if !self.contains(sequence) {
            return;
        }
        let at = self.position(sequence);
        let (from, to) = self.0.remove(at);
        if sequence < to {
            self.0.insert(at, (sequence + 1, to));
        }
        if from < sequence {
            self.0.insert(at, (from, sequence - 1));
        }
    }

    /// The first sequence held from this one on.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        let (start, _) = self.0.get(self.position(from))?;
        Some(from.max(*start))
    }

    pub(super) fn last(&self) -> Option<u64> {
        self.0.last().map(|(_, to)| *to)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sequences held from this one on.
    pub(super) fn from(&self, from: u64) -> impl Iterator<Item = u64> {
        let at = self.position(from);
        let rest = self.0.get(at..).unwrap_or_default();
        rest.iter()
            .flat_map(move |(start, end)| from.max(*start)..=*end)
    }

    /// How many sequences are held.
    pub(super) fn count(&self) -> u64 {
        self.0
            .iter()
            .map(|(from, to)| (to - from).saturating_add(1))
            .fold(0, u64::saturating_add)
    }
}

/// What is held of one audit log.
#[derive(Debug, Clone)]
pub(super) struct LogIndex {
    pub(super) name: LogName,
    pub(super) ranges: Ranges,
    /// Allocated bytes of the pages that have a file.
    pub(super) pages: BTreeMap<u64, u64>,
    pub(super) allocated: u64,
    pub(super) receipts: u64,
    pub(super) by_custodians: [u64; COUNTED_CUSTODIANS],
    /// The segment with the highest sequence, if it was read already.
    pub(super) last_id: Option<SegmentId>,
    /// What its bytes are charged to; receipts are always the node's own.
    pub(super) account: Charge,
    /// Every segment below this sequence has at least so many custodians: `(sequence, custodians)`.
    pub(super) satisfied: (u64, usize),
}

impl LogIndex {
    pub(super) fn new(origin: &Origin, account: Charge) -> Self {
        Self {
            name: LogName::of(origin),
            ranges: Ranges::default(),
            pages: BTreeMap::new(),
            allocated: 0,
            receipts: 0,
            by_custodians: [0; COUNTED_CUSTODIANS],
            last_id: None,
            account,
            satisfied: (0, 0),
        }
    }

    fn counter(&mut self, custodians: u16) -> Option<&mut u64> {
        let at = usize::from(custodians).min(COUNTED_CUSTODIANS - 1);
        self.by_custodians.get_mut(at)
    }

    /// Notes that this entry is held.
    fn add(&mut self, sequence: u64, entry: &ChainEntry) {
        if self.ranges.last().is_none_or(|last| last <= sequence) {
            self.last_id = Some(entry.id);
        }
        self.ranges.insert(sequence);
        self.allocated = self.allocated.saturating_add(entry.allocated);
        self.receipts = self.receipts.saturating_add(entry.receipts);
        if let Some(count) = self.counter(entry.custodians) {
            *count = count.saturating_add(1);
        }
        self.satisfied.0 = self.satisfied.0.min(sequence);
    }

    /// Notes that this entry is held no longer.
    fn take(&mut self, sequence: u64, entry: &ChainEntry) {
        if self.ranges.last() == Some(sequence) {
            self.last_id = None;
        }
        self.ranges.remove(sequence);
        self.allocated = self.allocated.saturating_sub(entry.allocated);
        self.receipts = self.receipts.saturating_sub(entry.receipts);
        if let Some(count) = self.counter(entry.custodians) {
            *count = count.saturating_sub(1);
        }
    }

    /// Bytes of its segments and pages.
    pub(super) fn charged(&self) -> u64 {
        self.pages
            .values()
            .fold(self.allocated, |sum, page| sum.saturating_add(*page))
    }

    fn record(&self, origin: &Origin) -> LogRecord {
        LogRecord {
            origin: origin.clone(),
            ranges: self.ranges.0.clone(),
            pages: self.pages.iter().map(|(n, bytes)| (*n, *bytes)).collect(),
            allocated: self.allocated,
            receipts: self.receipts,
            by_custodians: self.by_custodians.to_vec(),
            last_id: self.last_id,
        }
    }

    fn from_record(record: LogRecord) -> Option<(Origin, Self)> {
        let mut log = Self::new(&record.origin, Charge::Normal);
        log.ranges = Ranges::checked(record.ranges)?;
        log.pages = record.pages.into_iter().collect();
        log.allocated = record.allocated;
        log.receipts = record.receipts;
        if record.by_custodians.len() != COUNTED_CUSTODIANS {
            return None;
        }
        for (slot, count) in log.by_custodians.iter_mut().zip(record.by_custodians) {
            *slot = count;
        }
        log.last_id = record.last_id;
        Some((record.origin, log))
    }
}

/// A page in memory.
#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    /// `None`: there was no room for its file, and it lives in memory until there is.
    file: Option<Box<dyn DiskFile>>,
    used: u64,
}

/// A segment of a kind of which there are few.
#[derive(Debug)]
pub(super) struct Small {
    pub(super) reference: SegmentRef,
    pub(super) allocated: u64,
}

/// The index.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) logs: BTreeMap<Origin, LogIndex>,
    pub(super) small: BTreeMap<SegmentId, Small>,
    pub(super) small_origins: BTreeMap<(Kind, Origin), BTreeSet<(u64, SegmentId)>>,
    pub(super) under_way: BTreeSet<SegmentId>,
    pub(super) pins: BTreeMap<SegmentId, u32>,
    pub(super) own_node: Option<NodeId>,
    pub(super) latched: Option<String>,
    pub(super) scrubbed_small: Option<SegmentId>,
    pub(super) scrubbed: Option<(Origin, u64)>,
    /// Segments scrubbed since that place was written.
    pub(super) scrubbed_since: u64,
    /// Ranges of all logs together.
    pub(super) range_count: usize,
    /// Why the pages cannot be relied upon, if so; a rebuild heals it.
    pub(super) suspect: Option<String>,
    pages: BTreeMap<PageId, Page>,
    uses: u64,
    /// Pages written since the catalog was.
    dirty: BTreeSet<PageId>,
    dir_dirty: bool,
    /// Where segments were found lately. Two generations: the older one goes when the newer is full.
    places: [BTreeMap<SegmentId, (Origin, u64)>; 2],
}

impl Index {
    /// Audit held for another node is charged to its own share (ruling 3).
    pub(super) fn account(&self, kind: Kind, origin: &Origin, asked: Charge) -> Charge {
        match &self.own_node {
            Some(own) if kind == Kind::Audit => {
                if origin.audit_node() == Some(own.as_str()) {
                    asked
                } else {
                    Charge::Custody
                }
            }
            _ => asked,
        }
    }

    // ---- kinds of which there are few ---------------------------------------------------------

    pub(super) fn insert_small(&mut self, small: Small) {
        let reference = &small.reference;
        self.small_origins
            .entry((reference.kind, reference.origin.clone()))
            .or_default()
            .insert((reference.sequence, reference.id));
        self.small.insert(reference.id, small);
    }

    pub(super) fn remove_small(&mut self, id: &SegmentId) -> Option<Small> {
        let small = self.small.remove(id)?;
        let key = (small.reference.kind, small.reference.origin.clone());
        if let Some(sequences) = self.small_origins.get_mut(&key) {
            sequences.remove(&(small.reference.sequence, *id));
            if sequences.is_empty() {
                self.small_origins.remove(&key);
            }
        }
        Some(small)
    }

    pub(super) fn small_at(
        &self,
        origin: &Origin,
        from: u64,
        to: u64,
    ) -> impl Iterator<Item = &SegmentRef> {
        let first = (from, SegmentId::from_bytes([0; 32]));
        let last = (to, SegmentId::from_bytes([0xff; 32]));
        let range = (from <= to).then_some(first..=last);
        self.small_origins
            .get(&(origin.kind(), origin.clone()))
            .into_iter()
            .zip(range)
            .flat_map(|(sequences, range)| sequences.range(range))
            .filter_map(|(_, id)| self.small.get(id).map(|small| &small.reference))
    }

    // ---- audit --------------------------------------------------------------------------------

    /// The log with this origin, made if there is none.
    pub(super) fn log(&mut self, origin: &Origin) -> &mut LogIndex {
        let account = self.account(Kind::Audit, origin, Charge::Normal);
        self.logs
            .entry(origin.clone())
            .or_insert_with(|| LogIndex::new(origin, account))
    }

    /// The entry at this place, if one is held there.
    pub(super) fn entry(
        &mut self,
        root: &Root,
        origin: &Origin,
        sequence: u64,
    ) -> Option<ChainEntry> {
        let log = self.logs.get(origin)?;
        if !log.ranges.contains(sequence) {
            return None;
        }
        let name = log.name;
        let found = match self.page(root, (name, place(sequence).0)) {
            Ok(page) => ChainEntry::from_page(&page.bytes, &name, sequence),
            Err(error) => {
                self.doubt(format!("a page of the index cannot be read: {error}"));
                return None;
            }
        };
        if found.is_none() {
            self.doubt(format!(
                "the entry of {origin} at sequence {sequence} is damaged"
            ));
        }
        found
    }

    fn doubt(&mut self, why: String) {
        if self.suspect.is_none() {
            tracing::error!(why, "the index is damaged; it will be built again");
            self.suspect = Some(why);
        }
    }

    /// Notes where a segment was found.
    pub(super) fn remember(&mut self, id: SegmentId, origin: Origin, sequence: u64) {
        let [newer, older] = &mut self.places;
        if newer.len() >= MAX_PLACES_REMEMBERED {
            *older = std::mem::take(newer);
        }
        newer.insert(id, (origin, sequence));
    }

    /// Where a segment was found lately.
    pub(super) fn remembered(&self, id: &SegmentId) -> Option<(Origin, u64)> {
        self.places.iter().find_map(|of| of.get(id)).cloned()
    }

    /// Notes that an entry is held; its page was written already.
    pub(super) fn add(&mut self, origin: &Origin, sequence: u64, entry: &ChainEntry) {
        let log = self.log(origin);
        let before = log.ranges.0.len();
        log.add(sequence, entry);
        let after = log.ranges.0.len();
        self.range_count = self
            .range_count
            .saturating_add(after)
            .saturating_sub(before);
        self.remember(entry.id, origin.clone(), sequence);
    }

    /// Notes that an entry is held no longer, and drops its page if nothing on it is held.
    pub(super) fn take(&mut self, root: &Root, origin: &Origin, sequence: u64, entry: &ChainEntry) {
        let Some(log) = self.logs.get_mut(origin) else {
            return;
        };
        let before = log.ranges.0.len();
        log.take(sequence, entry);
        let after = log.ranges.0.len();
        self.range_count = self
            .range_count
            .saturating_add(after)
            .saturating_sub(before);
        for of in &mut self.places {
            of.remove(&entry.id);
        }
        self.drop_page_if_empty(root, origin, place(sequence).0);
    }

    /// An evicted part of a log keeps no space here.
    pub(super) fn drop_page_if_empty(&mut self, root: &Root, origin: &Origin, page: u64) {
        let Some(log) = self.logs.get(origin) else {
            return;
        };
        let start = page.saturating_mul(chain::PAGE_ENTRIES);
        let next = log.ranges.next(start);
        if next.is_none_or(|next| place(next).0 != page) {
            self.drop_page(root, origin, page);
        }
    }

    pub(super) fn drop_page(&mut self, root: &Root, origin: &Origin, page: u64) {
        let Some(log) = self.logs.get_mut(origin) else {
            return;
        };
        let id = (log.name, page);
        // The handle is closed first: an open file keeps its blocks (ruling 23).
        self.pages.remove(&id);
        self.dirty.remove(&id);
        if let Some(bytes) = log.pages.get(&page) {
            match root.unlink(&page_path(&id), *bytes, log.account) {
                Ok(()) => {
                    log.pages.remove(&page);
                    self.dir_dirty = true;
                }
                Err(error) => tracing::warn!(%error, "an empty page of the index stays"),
            }
        }
        if log.ranges.is_empty() && log.pages.is_empty() {
            self.logs.remove(origin);
        }
    }

    /// Replaces the numbers of an entry that stays held.
    pub(super) fn replace(
        &mut self,
        origin: &Origin,
        sequence: u64,
        before: &ChainEntry,
        after: &ChainEntry,
    ) {
        let log = self.log(origin);
        let last = log.last_id;
        log.take(sequence, before);
        log.add(sequence, after);
        if last.is_some() {
            log.last_id = last;
        }
    }

    // ---- pages --------------------------------------------------------------------------------

    /// The page, from memory or disk.
    fn page(&mut self, root: &Root, id: PageId) -> Result<&mut Page, RootError> {
        self.uses = self.uses.saturating_add(1);
        let uses = self.uses;
        if !self.pages.contains_key(&id) {
            let file = root.open_file(&page_path(&id), OpenMode::ReadWrite)?;
            let mut bytes = vec![0; PAGE_BYTES];
            file.read_at(0, &mut bytes)?;
            self.keep(id, bytes, Some(file));
        }
        let missing = || RootError::Path(page_path(&id));
        let page = self.pages.get_mut(&id).ok_or_else(missing)?;
        page.used = uses;
        Ok(page)
    }

    fn keep(&mut self, id: PageId, bytes: Vec<u8>, file: Option<Box<dyn DiskFile>>) {
        while self.pages.len() >= MAX_CACHED_PAGES {
            let oldest = self
                .pages
                .iter()
                .filter(|(_, page)| page.file.is_some())
                .min_by_key(|(_, page)| page.used)
                .map(|(id, _)| *id);
            match oldest {
                Some(oldest) => self.pages.remove(&oldest),
                // All of them live in memory only.
                None => break,
            };
        }
        let used = self.uses;
        self.pages.insert(id, Page { bytes, file, used });
    }

    /// Makes sure that the page of this place has a file, or at least a place in memory.
    ///
    /// With `or_memory`, a page that finds no room lives in memory; otherwise that is an error.
    pub(super) fn ready_page(
        &mut self,
        root: &Arc<Root>,
        origin: &Origin,
        sequence: u64,
        spare: &mut Option<Reservation>,
        or_memory: bool,
    ) -> Result<(), StoreError> {
        let page = place(sequence).0;
        let log = self.log(origin);
        let id = (log.name, page);
        let account = log.account;
        if log.pages.contains_key(&page) || self.pages.contains_key(&id) {
            return Ok(());
        }
        match make_page(root, &id, account, spare) {
            Ok((file, allocated)) => {
                self.log(origin).pages.insert(page, allocated);
                self.dir_dirty = true;
                self.keep(id, vec![0; PAGE_BYTES], Some(file));
                Ok(())
            }
            Err(StoreError::Ceiling(_) | StoreError::FileSystemFull) if or_memory => {
                self.keep(id, vec![0; PAGE_BYTES], None);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Writes an entry into its page, which was made ready. Nothing is synced. Where the file refuses,
    /// the page stays in memory until the next catalog, which is not written without it.
    pub(super) fn write(
        &mut self,
        root: &Root,
        origin: &Origin,
        sequence: u64,
        entry: &ChainEntry,
    ) {
        let (number, at) = place(sequence);
        let id = (self.log(origin).name, number);
        let head = chain::page_head(&id);
        let slot = entry.slot(&id.0, sequence);
        let page = match self.page(root, id) {
            Ok(page) => page,
            Err(error) => {
                self.doubt(format!("a page of the index cannot be read: {error}"));
                return;
            }
        };
        let blank_head = page.bytes.get(..head.len()) != Some(head.as_slice());
        for (offset, piece) in [(0, &head), (at, &slot)] {
            if offset == 0 && !blank_head {
                continue;
            }
            if let Some(place) = page.bytes.get_mut(offset..offset + piece.len()) {
                place.copy_from_slice(piece);
            }
            let written = match &page.file {
                Some(file) => file.write_at(offset as u64, piece),
                None => Ok(()),
            };
            if let Err(error) = written {
                tracing::warn!(%error, "a page of the index stays in memory for now");
                page.file = None;
            }
        }
        if page.file.is_some() {
            self.dirty.insert(id);
        }
    }

    /// Gives a file to every page that lives in memory only.
    pub(super) fn settle(
        &mut self,
        root: &Arc<Root>,
        spare: &mut Option<Reservation>,
    ) -> Result<(), StoreError> {
        let homeless: Vec<PageId> = self
            .pages
            .iter()
            .filter(|(_, page)| page.file.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in homeless {
            let Some(log) = self.logs.values_mut().find(|log| log.name == id.0) else {
                self.pages.remove(&id);
                continue;
            };
            let file = if log.pages.contains_key(&id.1) {
                root.open_file(&page_path(&id), OpenMode::ReadWrite)?
            } else {
                let (file, allocated) = make_page(root, &id, log.account, spare)?;
                log.pages.insert(id.1, allocated);
                self.dir_dirty = true;
                file
            };
            if let Some(page) = self.pages.get_mut(&id) {
                file.write_at(0, &page.bytes).map_err(RootError::Disk)?;
                page.file = Some(file);
                self.dirty.insert(id);
            }
        }
        Ok(())
    }

    /// Makes everything durable that was written to pages.
    pub(super) fn sync(&mut self, root: &Root) -> Result<(), RootError> {
        let dirty: Vec<PageId> = std::mem::take(&mut self.dirty).into_iter().collect();
        for some in dirty.chunks(MAX_PUT_GROUP) {
            if let Err(error) = self.sync_pages(root, some) {
                self.doubt(format!("a page of the index was not synced: {error}"));
                return Err(error);
            }
        }
        if self.dir_dirty {
            root.sync_dir(CHAIN_DIR)?;
            self.dir_dirty = false;
        }
        Ok(())
    }

    /// Syncs these pages at once.
    fn sync_pages(&self, root: &Root, pages: &[PageId]) -> Result<(), RootError> {
        let in_memory = |id: &PageId| self.pages.get(id).and_then(|page| page.file.as_deref());
        let mut opened: Vec<Box<dyn DiskFile>> = Vec::new();
        for id in pages.iter().filter(|id| in_memory(id).is_none()) {
            opened.push(root.open_file(&page_path(id), OpenMode::ReadWrite)?);
        }
        let files: Vec<&dyn DiskFile> = pages
            .iter()
            .filter_map(in_memory)
            .chain(opened.iter().map(|file| &**file))
            .collect();
        let synced: Result<(), DiskError> = root.disk().sync_files(&files).into_iter().collect();
        Ok(synced?)
    }

    /// Notes that there may be pages whose names are not durable.
    pub(super) fn names_unsynced(&mut self) {
        self.dir_dirty = true;
    }

    /// The catalog as of this number.
    pub(super) fn catalog(&self, domain: &DomainId, number: u64) -> Catalog {
        Catalog {
            domain: domain.clone(),
            number,
            scrubbed: self.scrubbed.clone(),
            logs: self
                .logs
                .iter()
                .map(|(origin, log)| log.record(origin))
                .collect(),
        }
    }

    /// Forgets all audit, for a rebuild.
    pub(super) fn clear_audit(&mut self) {
        self.logs.clear();
        self.pages.clear();
        self.dirty.clear();
        self.dir_dirty = true;
        self.places = Default::default();
        self.range_count = 0;
        self.suspect = None;
    }

    /// Whether this is the name of a page that is in use.
    pub(super) fn knows_page(&self, name: &str) -> bool {
        let page = name
            .strip_suffix(".idx")
            .and_then(|stem| stem.rsplit_once('-'))
            .and_then(|(_, page)| page.parse().ok());
        page.is_some_and(|page| {
            self.logs
                .values()
                .filter(|log| log.pages.contains_key(&page))
                .any(|log| log.name.page_file(page) == name)
        })
    }
}

pub(super) fn page_path(id: &PageId) -> String {
    format!("{CHAIN_DIR}/{}", id.0.page_file(id.1))
}

/// The room that a new page needs beside that for the directory.
pub(super) fn page_bound(root: &Root) -> u64 {
    root.allocation_bound(PAGE_BYTES as u64)
}

/// Makes the file of a page. Room for the node's own pages may come from what is kept spare, so that
/// no seal ever waits for it.
fn make_page(
    root: &Arc<Root>,
    id: &PageId,
    account: Charge,
    spare: &mut Option<Reservation>,
) -> Result<(Box<dyn DiskFile>, u64), StoreError> {
    let ledger = root.ledger();
    let own = account != Charge::Custody;
    let asked = if own { Charge::Reserve } else { account };
    let fresh = ledger.reserve(page_bound(root), asked).and_then(|room| {
        let slack = ledger.reserve(root.slack(), Charge::Reserve)?;
        Ok((room, Some(slack)))
    });
    let (room, _slack) = match fresh {
        Ok(both) => both,
        Err(ceiling) => match spare.take().filter(|_| own) {
            Some(kept) => (kept, None),
            None => return Err(ceiling.into()),
        },
    };
    Ok(root.make_in_place(&page_path(id), PAGE_BYTES as u64, room)?)
}

// ---- loading ----------------------------------------------------------------------------------

/// Why there is no index to start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// There is none.
    Missing,
    /// It is damaged, of another version, or contradicts itself.
    Damaged(String),
}

/// What the index of a run before says, corrected by what its journal names.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(super) domain: DomainId,
    pub(super) logs: BTreeMap<Origin, LogIndex>,
    pub(super) scrubbed: Option<(Origin, u64)>,
    /// The last announcement in the journal, by how much it is beyond the catalog's, and how many of
    /// those are there.
    pub(super) number: u64,
    pub(super) since: u64,
    pub(super) replayed: u64,
    /// Entries that the journal names and that are held: their pages may have missed them.
    pub(super) fixups: Vec<(Origin, u64, ChainEntry)>,
    /// Pages that the journal touched.
    pub(super) touched: Vec<(Origin, u64)>,
    /// Those of them whose making was cut off: nothing older than the journal lies in them.
    pub(super) unmade: Vec<(Origin, u64)>,
    /// Files of receipts whose segment is not held, with their allocated bytes.
    pub(super) stray_receipts: Vec<(SegmentId, u64)>,
    /// Bytes of all segments, receipts and pages.
    pub(crate) bulk_bytes: u64,
}

/// Reads the index. The work is bounded by the catalog and the journal, not by the store.
pub(crate) fn load(disk: &dyn Disk, root: &Path) -> Result<Loaded, Unusable> {
    let damaged = |why: String| Unusable::Damaged(why);
    let bytes = match disk::read_all(
        disk,
        &root.join(CATALOG_PATH),
        MAX_CATALOG_BYTES as u64 + 12,
    ) {
        Ok(bytes) => bytes,
        Err(DiskError {
            fault: DiskFault::NotFound,
            ..
        }) => return Err(Unusable::Missing),
        Err(error) => return Err(damaged(error.to_string())),
    };
    let catalog = Catalog::decode(&bytes).map_err(|why| damaged(why.to_owned()))?;
    let ring = disk::read_all(disk, &root.join(JOURNAL_PATH), JOURNAL_BYTES)
        .map_err(|error| damaged(error.to_string()))?;
    if ring.len() as u64 != JOURNAL_BYTES {
        return Err(damaged("the journal is truncated".to_owned()));
    }
    let tail = journal::after(&ring, catalog.number).map_err(|why| damaged(why.to_owned()))?;
    let mut loaded = Loaded {
        domain: catalog.domain,
        logs: BTreeMap::new(),
        scrubbed: catalog.scrubbed,
        number: tail.number,
        since: tail.number.saturating_sub(catalog.number),
        replayed: tail.changes.len() as u64,
        fixups: Vec::new(),
        touched: Vec::new(),
        unmade: Vec::new(),
        stray_receipts: Vec::new(),
        bulk_bytes: 0,
    };
    for record in catalog.logs {
        let (origin, log) = LogIndex::from_record(record)
            .ok_or_else(|| damaged("a log in the catalog is malformed".to_owned()))?;
        loaded.logs.insert(origin, log);
    }
    let mut places: BTreeMap<(Origin, u64), Vec<Change>> = BTreeMap::new();
    for change in tail.changes {
        let place = (change.origin.clone(), change.sequence);
        places.entry(place).or_default().push(change);
    }
    for ((origin, sequence), changes) in places {
        loaded
            .replay(disk, root, origin, sequence, &changes)
            .map_err(damaged)?;
    }
    loaded.weigh_pages(disk, root).map_err(damaged)?;
    loaded.bulk_bytes = loaded.logs.values().fold(0u64, |sum, log| {
        sum.saturating_add(log.charged())
            .saturating_add(log.receipts)
    });
    for (_, bytes) in &loaded.stray_receipts {
        loaded.bulk_bytes = loaded.bulk_bytes.saturating_add(*bytes);
    }
    Ok(loaded)
}

impl Loaded {
    /// Whose index it is.
    pub(crate) fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// How many segments it lists.
    pub(crate) fn count(&self) -> u64 {
        self.logs
            .values()
            .map(|log| log.ranges.count())
            .fold(0, u64::saturating_add)
    }

    /// Bytes of the segments and pages of logs of other nodes.
    pub(crate) fn custody_bytes(&self, own_node: &NodeId) -> u64 {
        self.logs
            .iter()
            .filter(|(origin, _)| origin.audit_node() != Some(own_node.as_str()))
            .map(|(_, log)| log.charged())
            .fold(0, u64::saturating_add)
    }

    /// Gives the entry of every segment listed, log by log, in order. Those that a page does not give
    /// are left out. One page is in memory at a time.
    pub(crate) fn entries(
        &self,
        disk: &dyn Disk,
        root: &Path,
        each: &mut dyn FnMut(&Origin, u64, &ChainEntry),
    ) {
        let fixed: BTreeMap<(&Origin, u64), &ChainEntry> = self
            .fixups
            .iter()
            .map(|(origin, sequence, entry)| ((origin, *sequence), entry))
            .collect();
        let mut bytes = vec![0; PAGE_BYTES];
        for (origin, log) in &self.logs {
            let mut in_memory = None;
            for sequence in log.ranges.from(0) {
                if let Some(entry) = fixed.get(&(origin, sequence)) {
                    each(origin, sequence, entry);
                    continue;
                }
                let page = place(sequence).0;
                if in_memory != Some(page) {
                    in_memory = Some(page);
                    let path = root.join(page_path(&(log.name, page)));
                    let read = disk
                        .open(&path, OpenMode::Read)
                        .and_then(|file| file.read_at(0, &mut bytes));
                    if read.is_err() {
                        bytes.fill(0);
                    }
                }
                if let Some(entry) = ChainEntry::from_page(&bytes, &log.name, sequence) {
                    each(origin, sequence, &entry);
                }
            }
        }
    }

    /// The sequences held of every log: inclusive ranges, ascending.
    pub(crate) fn held(&self) -> BTreeMap<Origin, Vec<(u64, u64)>> {
        self.logs
            .iter()
            .filter(|(_, log)| !log.ranges.is_empty())
            .map(|(origin, log)| (origin.clone(), log.ranges.as_slice().to_vec()))
            .collect()
    }
}

/// Length and allocated bytes of a file; `None` if there is none.
fn weigh(disk: &dyn Disk, path: &Path) -> Result<Option<(u64, u64)>, String> {
    match disk.stat(path) {
        Ok(stat) => Ok(Some((stat.len, stat.allocated_bytes))),
        Err(DiskError {
            fault: DiskFault::NotFound,
            ..
        }) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

impl Loaded {
    /// Finds out what is held at a place that the journal names.
    fn replay(
        &mut self,
        disk: &dyn Disk,
        root: &Path,
        origin: Origin,
        sequence: u64,
        changes: &[Change],
    ) -> Result<(), String> {
        let log = self
            .logs
            .entry(origin.clone())
            .or_insert_with(|| LogIndex::new(&origin, Charge::Normal));
        // The first announcement tells what the catalog counts there.
        let counted = changes.first().and_then(|change| change.before);
        if counted.is_some() != log.ranges.contains(sequence) {
            return Err(format!(
                "journal and catalog contradict each other about {origin} at sequence {sequence}"
            ));
        }
        let mut candidates: Vec<ChainEntry> = Vec::new();
        for entry in changes
            .iter()
            .rev()
            .flat_map(|change| [change.after, change.before])
            .flatten()
        {
            if !candidates.iter().any(|held| held.id == entry.id) {
                candidates.push(entry);
            }
        }
        let mut held = None;
        for mut entry in candidates {
            let file = weigh(disk, &root.join(segment_path(Kind::Audit, &entry.id)))?;
            let path = root.join(receipts_path(&entry.id));
            let receipts = weigh(disk, &path)?;
            match (file, receipts) {
                (Some((_, allocated)), receipts) if held.is_none() => {
                    entry.allocated = allocated;
                    entry.receipts = receipts.map_or(0, |(_, bytes)| bytes);
                    entry.custodians = match receipts {
                        Some(_) => count_receipts(disk, &path),
                        None => 0,
                    };
                    held = Some(entry);
                }
                (Some(_), _) => {
                    return Err(format!(
                        "two segments lie at sequence {sequence} of {origin}"
                    ));
                }
                (None, Some((_, bytes))) => self.stray_receipts.push((entry.id, bytes)),
                (None, None) => {}
            }
        }
        if let Some(entry) = counted {
            log.take(sequence, &entry);
        }
        if let Some(entry) = held {
            log.add(sequence, &entry);
            self.fixups.push((origin.clone(), sequence, entry));
        }
        let page = place(sequence).0;
        if !self.touched.contains(&(origin.clone(), page)) {
            self.touched.push((origin, page));
        }
        Ok(())
    }

    /// What the file system allocates to the pages that the journal touched.
    fn weigh_pages(&mut self, disk: &dyn Disk, root: &Path) -> Result<(), String> {
        for (origin, page) in &self.touched {
            let Some(log) = self.logs.get_mut(origin) else {
                continue;
            };
            let path = root.join(page_path(&(log.name, *page)));
            match weigh(disk, &path)? {
                Some((len, allocated)) => {
                    log.pages.insert(*page, allocated);
                    if len < PAGE_BYTES as u64 {
                        self.unmade.push((origin.clone(), *page));
                    }
                }
                None => {
                    log.pages.remove(page);
                }
            }
        }
        Ok(())
    }
}

fn count_receipts(disk: &dyn Disk, path: &Path) -> u16 {
    let found = disk::read_all(disk, path, receipts::MAX_RECEIPTS_FILE_BYTES)
        .map_or(0, |bytes| receipts::decode(&bytes).len());
    u16::try_from(found).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_a_set(steps in proptest::collection::vec((any::<bool>(), 0u64..40), 0..200)) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (add, sequence) in steps {
                if add {
                    ranges.insert(sequence);
                    model.insert(sequence);
                } else {
                    ranges.remove(sequence);
                    model.remove(&sequence);
                }
                prop_assert!(Ranges::checked(ranges.0.clone()).is_some());
                prop_assert_eq!(ranges.from(0).collect::<BTreeSet<_>>(), model.clone());
                prop_assert_eq!(ranges.count(), model.len() as u64);
                prop_assert_eq!(ranges.last(), model.last().copied());
                for at in 0..41 {
                    prop_assert_eq!(ranges.contains(at), model.contains(&at));
                    prop_assert_eq!(ranges.next(at), model.range(at..).next().copied());
                }
            }
        }
    }

    #[test]
    fn ranges_hold_the_ends_of_the_numbers() {
        let mut ranges = Ranges::default();
        for sequence in [u64::MAX, 0, u64::MAX - 1] {
            ranges.insert(sequence);
        }
        assert_eq!(ranges.as_slice(), [(0, 0), (u64::MAX - 1, u64::MAX)]);
        ranges.remove(u64::MAX);
        ranges.remove(0);
        assert_eq!(ranges.as_slice(), [(u64::MAX - 1, u64::MAX - 1)]);
        assert!(Ranges::checked(vec![(0, 1), (2, 3)]).is_none());
        assert!(Ranges::checked(vec![(3, 2)]).is_none());
    }
}
