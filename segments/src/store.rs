//! The content-addressed store of segments: `segments/<kind>/<hex>.seg`.
//!
//! A segment enters only as a [`VerifiedSegment`] and by one protocol: reserve, write to a temporary
//! name, sync, rename, sync the directory. It leaves only by [`Store::get`], which verifies every
//! byte again; a damaged file goes to the quarantine and is never served. Custody receipts lie beside
//! them in `receipts/`.
//!
//! Kinds of which there are few are indexed in memory from their directories. Of audit, of which
//! there may be a million, the file's name is the index by id, and `index/` holds the rest: a page of
//! fixed entries for every 112 places of a log, a catalog of what is held, and a journal in which
//! every change is announced before it is made. So a start does no work for what is stored, only for
//! the journal's tail. The whole of `index/` is built again from the files when it is missing or
//! damaged; losing it costs nothing but that time.
//!
//! The store is synchronous and may be called from any thread; content is written by many at once,
//! and named by one at a time. After a failed sync it latches: it goes on serving what it holds and
//! refuses writes until [`Store::reopen`].
//!
//! Where to start: [`Store::put`], then `index.rs` for what is kept and `load` for how it comes back.

pub(crate) mod catalog;
pub(crate) mod chain;
mod group;
mod index;
pub(crate) mod journal;
pub(crate) mod receipts;
mod scrub;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::bao::BaoError;
use crate::body::{self, AuditSpan};
use crate::disk::{DiskError, DiskFault, DiskFile, DiskOp, OpenMode};
use crate::format::{
    self, FormatError, Head, SegmentHeader, SegmentRef, VerifiedSegment, verify_segment,
};
use crate::id::{DomainId, Kind, NodeId, Origin, SegmentId};
use crate::ledger::{CeilingReached, Charge, Reservation};
use crate::limits::{
    MAX_AUDIT_LOGS, MAX_CHAIN_RANGES, MAX_CUSTODY_LOOKS, MAX_HEAD_RANGES, MAX_HEADER_BYTES,
    MAX_PINS, MAX_RECEIPTS_PER_SEGMENT, MAX_REFS, MAX_SEGMENT_BYTES, NAMES_AT_ONCE,
};
use crate::partial::Transfers;
use crate::receipt::{CustodyReceipt, ReceiptError};
use crate::root::{Root, RootError, Staged};
use catalog::CATALOG_PATH;
use chain::ChainEntry;
use group::UnderWay;
use index::{COUNTED_CUSTODIANS, Index, Small};
use journal::{Change, JOURNAL_BLOCKS, JOURNAL_BYTES};

pub(crate) use index::{Loaded, Unusable, load as load_index};
pub use scrub::{ForeignReport, ScrubPace, ScrubReport};

/// Where receipts lie.
pub(crate) const RECEIPTS_DIR: &str = "receipts";
/// Where the pages of the index lie.
pub(crate) const CHAIN_DIR: &str = "index/chain";
const JOURNAL_PATH: &str = "index/journal";
/// As much of a file as an index needs: header, and the head of an audit body with its checkpoint.
const PEEK_BYTES: usize = 16 * 1024;
/// Announcements after which the catalog is written again.
const CHECKPOINT_AFTER: u64 = JOURNAL_BLOCKS / 4 * 3;
/// Changes between attempts to write an index that found no room.
const RETRY_AFTER: u64 = 32;

/// Why the store refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No such segment is held.
    #[error("no segment {0} is held")]
    NotHeld(SegmentId),
    /// The file was damaged; it is in the quarantine now and no longer held.
    #[error("segment {id} was damaged on disk and is in quarantine: {reason}")]
    Damaged {
        /// Which segment.
        id: SegmentId,
        /// What was wrong.
        reason: String,
    },
    /// Two different audit segments claim the same place in one log.
    #[error(
        "fork in {origin} at sequence {sequence}: {held} is held and {offered} contradicts it; \
         an operator has to look at both"
    )]
    Fork {
        /// The log.
        origin: Origin,
        /// The place.
        sequence: u64,
        /// What is held.
        held: SegmentId,
        /// What was offered.
        offered: SegmentId,
    },
    /// A segment of another domain.
    #[error("segment of domain {0} refused; this store belongs to another domain")]
    Domain(DomainId),
    /// The ceiling does not allow it.
    #[error(transparent)]
    Ceiling(#[from] CeilingReached),
    /// The file system is full below our own ceiling: somebody else fills it.
    #[error("the file system is full below the ceiling; free space on it")]
    FileSystemFull,
    /// A write or sync failed earlier; nothing is written until the store is reopened.
    #[error("the store is latched after {0}; reopen it when the disk is sound")]
    Latched(String),
    /// The index is damaged again after it was just built from the files.
    #[error("the store's index cannot be relied on: {0}; look at the disk")]
    Index(String),
    /// The receipt was refused.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// The receipt is for another domain, log, range or root than the segment's.
    #[error("the receipt does not fit segment {0}")]
    ReceiptMismatch(SegmentId),
    /// Enough receipts are held for this segment.
    #[error("segment {0} has {MAX_RECEIPTS_PER_SEGMENT} receipts already")]
    TooManyReceipts(SegmentId),
    /// The segment is pinned: somebody relies on it.
    #[error("segment {0} is pinned; it is removed when nobody relies on it any more")]
    Pinned(SegmentId),
    /// Too many segments are pinned.
    #[error("{MAX_PINS} segments are pinned already")]
    TooManyPins,
    /// Audit of too many logs, or with too many gaps, is held.
    #[error(
        "audit of {MAX_AUDIT_LOGS} logs or with {MAX_CHAIN_RANGES} gaps is held already; {0} is \
         refused"
    )]
    TooScattered(Origin),
    /// The range asked for is none of the segment's.
    #[error(transparent)]
    Range(#[from] BaoError),
    /// The root or the disk refused.
    #[error(transparent)]
    Root(RootError),
}

impl From<RootError> for StoreError {
    fn from(error: RootError) -> Self {
        match error {
            RootError::Ceiling(ceiling) => Self::Ceiling(ceiling),
            full if full.is_file_system_full() => Self::FileSystemFull,
            other => Self::Root(other),
        }
    }
}

impl StoreError {
    /// Whether there is only no room.
    fn is_room(&self) -> bool {
        matches!(self, Self::Ceiling(_) | Self::FileSystemFull)
    }
}

/// What [`Store::put`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is stored now, durably.
    Stored,
    /// It was held before; nothing was written (INV-08).
    AlreadyHeld,
}

/// What opening the store, or taking it into use again, found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct StoreRecovery {
    /// Why the index was built again from the files, if it was. A first start builds none.
    pub rebuilt: Option<String>,
    /// Announced changes that were looked at again; at most 128.
    pub replayed: u64,
    /// Audit segments that were read for a rebuild.
    pub read_again: u64,
    /// Files of receipts that belonged to no segment and were removed.
    pub orphans: u64,
    /// Damaged files that went to the quarantine: their paths there.
    pub quarantined: Vec<String>,
}

/// How far a rebuild of the index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RebuildProgress {
    /// Segments read so far.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
}

type Hook = Arc<dyn Fn(&SegmentRef) + Send + Sync>;

/// The right to change what audit is held: one change at a time.
struct Writer {
    /// The journal. `None` while the index on disk is none to start from: then nothing is announced,
    /// for the next start reads all files.
    journal: Option<Box<dyn DiskFile>>,
    /// The number of the last announcement.
    number: u64,
    /// Announcements since the catalog was written.
    since: u64,
    /// Changes without a journal.
    unannounced: u64,
    /// Room for one more page of the node's own log, so that a seal never waits for it.
    spare: Option<Reservation>,
    /// Bytes that the ledger counts for files whose fate a failed call left open, and their ids.
    doubtful_bytes: u64,
    doubtful: BTreeSet<SegmentId>,
}

/// The segments below one root.
pub struct Store {
    root: Arc<Root>,
    domain: DomainId,
    index: Mutex<Index>,
    /// Taken before `index` where both are.
    writer: Mutex<Writer>,
    put_ended: Condvar,
    /// The turn of the group whose files are open. Taken before `writer` and `index` where it is.
    syncing: Mutex<()>,
    recovery: Mutex<StoreRecovery>,
    on_damage: Mutex<Option<Hook>>,
    survey: Mutex<scrub::Survey>,
    pub(crate) transfers: Transfers,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("root", &self.root.path())
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

pub(crate) fn segment_path(kind: Kind, id: &SegmentId) -> String {
    format!("{}/{}.seg", kind_dir(kind), id.hex())
}

fn kind_dir(kind: Kind) -> String {
    format!("segments/{kind}")
}

fn receipts_path(id: &SegmentId) -> String {
    format!("{RECEIPTS_DIR}/{}.rcpts", id.hex())
}

fn id_of(name: &str, ending: &str) -> Option<SegmentId> {
    name.strip_suffix(ending)
        .and_then(|hex| SegmentId::from_hex(hex).ok())
}

fn is_gone(error: &RootError) -> bool {
    matches!(
        error,
        RootError::Disk(DiskError {
            fault: DiskFault::NotFound,
            ..
        })
    )
}

/// The front of a segment's file.
struct Peeked {
    header: SegmentHeader,
    span: Option<AuditSpan>,
    len: u64,
    allocated: u64,
}

/// A segment that is held.
struct Held {
    reference: SegmentRef,
    /// What the index knows of an audit segment.
    entry: Option<ChainEntry>,
}

impl Store {
    /// Opens the store. With a usable index the work is bounded by the journal; without one every
    /// file's front is read. A file that cannot be a segment goes to the quarantine.
    ///
    /// # Errors
    /// [`StoreError::Root`] if the disk refuses. A damaged index is no error; see
    /// [`Store::recovery`].
    pub fn open(root: Arc<Root>, domain: DomainId) -> Result<Arc<Self>, StoreError> {
        Self::open_with(root, domain, &mut |_| {})
    }

    /// Like [`Store::open`]; a rebuild of the index tells how far it is.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(
        root: Arc<Root>,
        domain: DomainId,
        progress: &mut dyn FnMut(&RebuildProgress),
    ) -> Result<Arc<Self>, StoreError> {
        for kind in Kind::ALL {
            root.ensure_dir(&kind_dir(kind))?;
            // What is found here is told to others as held, so it must be durable.
            if kind != Kind::Audit && !root.list_after(&kind_dir(kind), None, 1)?.is_empty() {
                root.sync_dir(&kind_dir(kind))?;
            }
        }
        root.ensure_dir(RECEIPTS_DIR)?;
        root.ensure_dir(CHAIN_DIR)?;
        let loaded = match root.take_index() {
            Some(index) => index,
            None => load_index(&**root.disk(), root.path()),
        };
        let store = Self {
            root,
            domain,
            index: Mutex::default(),
            writer: Mutex::new(Writer {
                journal: None,
                number: 0,
                since: 0,
                unannounced: 0,
                spare: None,
                doubtful_bytes: 0,
                doubtful: BTreeSet::new(),
            }),
            put_ended: Condvar::new(),
            syncing: Mutex::default(),
            recovery: Mutex::default(),
            on_damage: Mutex::new(None),
            survey: Mutex::default(),
            transfers: Transfers::default(),
        };
        store.find_small(false)?;
        let mut writer = store.writer();
        let why = match loaded {
            Ok(loaded) if loaded.domain == store.domain => store.resume(&mut writer, loaded)?,
            Ok(_) => Some("it belongs to another domain".to_owned()),
            Err(Unusable::Missing) => Some("it is missing".to_owned()),
            Err(Unusable::Damaged(why)) => Some(why),
        };
        if let Some(why) = why {
            store.rebuild(&mut writer, &why, None, progress)?;
        }
        drop(writer);
        store.find_partials()?;
        Ok(Arc::new(store))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Changes of the index are completed under the lock or leave only sums behind, which the next
        // rebuild sets right.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) -> MutexGuard<'_, StoreRecovery> {
        self.recovery.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// The root that it lies in.
    #[must_use]
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// What opening found; after [`Store::reopen`] or a rebuild at run time, what that found.
    #[must_use]
    pub fn recovery(&self) -> StoreRecovery {
        self.note().clone()
    }

    /// Asks to be told of every segment that is found damaged or gone, so that it can be fetched
    /// again. The hook is called without locks, on the thread that found it.
    pub fn set_on_damage(&self, hook: impl Fn(&SegmentRef) + Send + Sync + 'static) {
        *self
            .on_damage
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(hook));
    }

    fn damaged(&self, reference: &SegmentRef) {
        let hook = self
            .on_damage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(hook) = hook {
            hook(reference);
        }
    }

    // ---- start --------------------------------------------------------------------------------

    /// Reads the directories of the kinds that are few; with `verify_new`, files that the index did
    /// not know are read whole.
    fn find_small(&self, verify_new: bool) -> Result<(), StoreError> {
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Audit) {
            for name in self.root.list(&kind_dir(kind))? {
                let rel = format!("{}/{name}", kind_dir(kind));
                let Some(id) = id_of(&name, ".seg") else {
                    tracing::warn!(
                        file = rel,
                        "foreign file in the store; it counts to the ceiling"
                    );
                    continue;
                };
                if self.index().small.contains_key(&id) {
                    continue;
                }
                let peeked = match self.peek(&rel, kind, id) {
                    Ok(peeked) if verify_new => self.read(&rel, id).map(|_| peeked),
                    other => other,
                };
                match peeked {
                    Ok(peeked) => {
                        let small = Small {
                            allocated: peeked.allocated,
                            reference: peeked.reference(id),
                        };
                        self.index().insert_small(small);
                    }
                    Err(StoreError::Damaged { reason, .. }) => {
                        self.put_aside(&rel, &id, &reason)?;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn put_aside(&self, rel: &str, id: &SegmentId, reason: &str) -> Result<(), StoreError> {
        let to = self.root.move_to_quarantine(rel, Charge::Normal)?;
        tracing::error!(%id, reason, to, "damaged segment moved to quarantine");
        self.note().quarantined.push(to);
        Ok(())
    }

    /// Goes on from the index of the run before. Gives the reason if it cannot be used after all.
    fn resume(&self, writer: &mut Writer, loaded: Loaded) -> Result<Option<String>, StoreError> {
        if loaded.replayed > 0 {
            // What the journal's files show may not be durable yet: the process may have been killed
            // between a rename and the sync of its directory.
            self.root.sync_dir(&kind_dir(Kind::Audit))?;
            self.root.sync_dir(RECEIPTS_DIR)?;
        }
        let journal = match self.root.open_file(JOURNAL_PATH, OpenMode::ReadWrite) {
            Ok(journal) => journal,
            Err(error) => return Ok(Some(error.to_string())),
        };
        writer.journal = Some(journal);
        writer.number = loaded.number;
        writer.since = loaded.since;
        let mut index = self.index();
        index.logs = loaded.logs;
        index.scrubbed = loaded.scrubbed;
        // Pages that the run before made may have names that are not durable.
        index.names_unsynced();
        index.range_count = index
            .logs
            .values()
            .map(|log| log.ranges.as_slice().len())
            .sum();
        for (origin, page) in &loaded.unmade {
            index.drop_page(&self.root, origin, *page);
        }
        for (origin, sequence, entry) in &loaded.fixups {
            index.ready_page(&self.root, origin, *sequence, &mut writer.spare, true)?;
            index.write(&self.root, origin, *sequence, entry);
        }
        for (origin, page) in &loaded.touched {
            index.drop_page_if_empty(&self.root, origin, *page);
        }
        drop(index);
        for (id, bytes) in &loaded.stray_receipts {
            self.root
                .unlink(&receipts_path(id), *bytes, Charge::Normal)?;
        }
        if !loaded.stray_receipts.is_empty() {
            self.root.sync_dir(RECEIPTS_DIR)?;
        }
        let mut note = self.note();
        note.replayed = loaded.replayed;
        note.orphans = loaded.stray_receipts.len() as u64;
        drop(note);
        if writer.since > 0 {
            match self.checkpoint(writer) {
                Ok(()) => {}
                Err(error) if error.is_room() => {}
                Err(error) => return Err(error),
            }
        }
        self.arm(writer);
        Ok(None)
    }

    /// Builds the index of audit again from the files, and writes it if there is room. `counted` is
    /// what the ledger holds for segments and receipts; `None` if it counted all files just now.
    fn rebuild(
        &self,
        writer: &mut Writer,
        why: &str,
        counted: Option<u64>,
        progress: &mut dyn FnMut(&RebuildProgress),
    ) -> Result<(), StoreError> {
        let mut aside_bytes = 0;
        let done = self.rebuild_from_files(writer, why, counted, &mut aside_bytes, progress);
        if done.is_err() {
            // Nothing is served from half an index; the next attempt begins with what was counted.
            let mut index = self.index();
            index.clear_audit();
            index.suspect = Some(why.to_owned());
            writer.doubtful_bytes = counted.unwrap_or(0).saturating_sub(aside_bytes);
        }
        done
    }

    fn rebuild_from_files(
        &self,
        writer: &mut Writer,
        why: &str,
        counted: Option<u64>,
        aside_bytes: &mut u64,
        progress: &mut dyn FnMut(&RebuildProgress),
    ) -> Result<(), StoreError> {
        writer.journal = None;
        if self.root.exists(CATALOG_PATH)? {
            self.root.remove(CATALOG_PATH)?;
        }
        let mut index = self.index();
        // All is charged to the node itself until it is known what is whose.
        let own_node = index.own_node.take();
        let known = std::mem::take(&mut index.logs);
        index.clear_audit();
        drop(index);
        self.root.forget_dir(CHAIN_DIR);
        self.root.forget_dir("index");
        self.root.ensure_dir(CHAIN_DIR)?;
        for name in self.names(CHAIN_DIR)? {
            let rel = format!("{CHAIN_DIR}/{}", name?);
            let bytes = self.root.stat(&rel)?.allocated_bytes;
            self.root.unlink(&rel, bytes, Charge::Normal)?;
        }
        let mut done = RebuildProgress::default();
        let mut found_bytes = 0u64;
        for name in self.names(&kind_dir(Kind::Audit))? {
            let name = name?;
            let Some(id) = id_of(&name, ".seg") else {
                tracing::warn!(name, "foreign file among the audit segments");
                continue;
            };
            let rel = segment_path(Kind::Audit, &id);
            let peeked = self.peek(&rel, Kind::Audit, id).and_then(|peeked| {
                let header = &peeked.header;
                let trusted = counted.is_none()
                    || known
                        .get(&header.origin)
                        .is_some_and(|log| log.ranges.contains(header.sequence))
                        && !writer.doubtful.contains(&id);
                if trusted {
                    return Ok(peeked);
                }
                self.read(&rel, id).map(|_| peeked)
            });
            let peeked = match peeked {
                Ok(peeked) => peeked,
                Err(StoreError::Damaged { reason, .. }) => {
                    let bytes = self.root.stat(&rel)?.allocated_bytes;
                    found_bytes = found_bytes.saturating_add(bytes);
                    self.put_aside(&rel, &id, &reason)?;
                    *aside_bytes = aside_bytes.saturating_add(bytes);
                    continue;
                }
                Err(error) => return Err(error),
            };
            found_bytes = found_bytes.saturating_add(peeked.allocated);
            done.segments = done.segments.saturating_add(1);
            done.bytes = done.bytes.saturating_add(peeked.len);
            let (origin, sequence) = (peeked.header.origin.clone(), peeked.header.sequence);
            let mut index = self.index();
            let taken = index.entry(&self.root, &origin, sequence).is_some();
            match peeked.entry(id) {
                Some(entry) if !taken => {
                    index.ready_page(&self.root, &origin, sequence, &mut writer.spare, true)?;
                    index.write(&self.root, &origin, sequence, &entry);
                    index.add(&origin, sequence, &entry);
                }
                _ => {
                    drop(index);
                    self.put_aside(&rel, &id, "another segment lies at its place in the log")?;
                    *aside_bytes = aside_bytes.saturating_add(peeked.allocated);
                }
            }
            progress(&done);
        }
        let mut orphans = 0u64;
        for name in self.names(RECEIPTS_DIR)? {
            let name = name?;
            let Some(id) = id_of(&name, ".rcpts") else {
                continue;
            };
            let rel = receipts_path(&id);
            let bytes = self.root.stat(&rel)?.allocated_bytes;
            if self.note_receipts(&id, bytes) {
                found_bytes = found_bytes.saturating_add(bytes);
            } else {
                // Counted once, and given back by the removal.
                found_bytes = found_bytes.saturating_add(bytes);
                self.root.remove(&rel)?;
                orphans = orphans.saturating_add(1);
            }
        }
        if let Some(counted) = counted {
            let ledger = self.root.ledger();
            ledger.found(found_bytes, Charge::Normal);
            ledger.freed(counted, Charge::Normal);
        }
        writer.doubtful.clear();
        writer.doubtful_bytes = 0;
        if done.segments > 0 || why != "it is missing" {
            tracing::warn!(
                why,
                segments = done.segments,
                "the index of the store was built again"
            );
            let mut note = self.note();
            note.rebuilt = Some(why.to_owned());
            note.read_again = done.segments;
            note.orphans = orphans;
        }
        if let Some(own) = own_node {
            self.set_own_node(&own);
        }
        self.write_anew(writer)
    }

    /// The names in a directory, a bounded number at a time in memory.
    fn names<'a>(
        &'a self,
        dir: &'a str,
    ) -> Result<impl Iterator<Item = Result<String, StoreError>> + use<'a>, StoreError> {
        let mut some = self.root.list_after(dir, None, NAMES_AT_ONCE)?;
        let mut more = some.len() == NAMES_AT_ONCE;
        some.reverse();
        Ok(std::iter::from_fn(move || {
            let name = some.pop()?;
            if some.is_empty() && more {
                match self.root.list_after(dir, Some(&name), NAMES_AT_ONCE) {
                    Ok(next) => {
                        more = next.len() == NAMES_AT_ONCE;
                        some = next;
                        some.reverse();
                    }
                    Err(error) => {
                        more = false;
                        return Some(Err(error.into()));
                    }
                }
            }
            Some(Ok(name))
        }))
    }

    /// Takes a file of receipts into the index; `false` if its segment is not held.
    fn note_receipts(&self, id: &SegmentId, bytes: u64) -> bool {
        let Some(Held {
            reference,
            entry: Some(before),
        }) = self.locate(id)
        else {
            return false;
        };
        let count = self.readable_receipts(id).len();
        let after = ChainEntry {
            receipts: bytes,
            custodians: u16::try_from(count).unwrap_or(u16::MAX),
            ..before
        };
        let mut index = self.index();
        index.write(&self.root, &reference.origin, reference.sequence, &after);
        index.replace(&reference.origin, reference.sequence, &before, &after);
        true
    }

    /// Reads the front of a file.
    fn peek(&self, rel: &str, kind: Kind, id: SegmentId) -> Result<Peeked, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { id, reason };
        let file = self.root.open_file(rel, OpenMode::Read)?;
        let stat = file.stat().map_err(RootError::Disk)?;
        let mut front = vec![
            0;
            usize::try_from(stat.len)
                .unwrap_or(PEEK_BYTES)
                .min(PEEK_BYTES)
        ];
        file.read_at(0, &mut front)
            .map_err(|error| damaged(error.to_string()))?;
        let mut rest = front.as_slice();
        let (header, body_len) =
            format::peek_header(&mut rest).map_err(|e| damaged(e.to_string()))?;
        if header.domain != self.domain || header.kind != kind || header.origin.kind() != kind {
            return Err(damaged("it belongs to another domain or kind".to_owned()));
        }
        let head_len = (front.len() - rest.len()) as u64;
        if stat.len < head_len.saturating_add(body_len).saturating_add(4) {
            return Err(damaged("it is truncated".to_owned()));
        }
        let span = match kind {
            Kind::Audit => Some(
                body::peek_span(rest, &header.domain, &header.origin)
                    .map_err(|e| damaged(e.to_string()))?,
            ),
            _ => None,
        };
        Ok(Peeked {
            header,
            span,
            len: stat.len,
            allocated: stat.allocated_bytes,
        })
    }

    fn read(&self, rel: &str, id: SegmentId) -> Result<VerifiedSegment, StoreError> {
        let bytes = match self.root.read(rel) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(StoreError::Damaged {
                    id,
                    reason: "its file is gone".to_owned(),
                });
            }
            Err(RootError::Disk(DiskError {
                op: DiskOp::Read,
                fault,
                ..
            })) => {
                return Err(StoreError::Damaged {
                    id,
                    reason: format!("cannot read it: {fault}"),
                });
            }
            Err(error) => return Err(error.into()),
        };
        verify_segment(bytes, Some(id), &self.domain).map_err(|e: FormatError| {
            StoreError::Damaged {
                id,
                reason: e.to_string(),
            }
        })
    }

    /// Tells the store whose audit is the node's own: all other audit is charged to the custody share.
    pub fn set_own_node(&self, node: &NodeId) {
        let mut index = self.index();
        index.own_node = Some(node.clone());
        let ledger = self.root.ledger();
        for (origin, log) in &mut index.logs {
            let account = if origin.audit_node() == Some(node.as_str()) {
                Charge::Normal
            } else {
                Charge::Custody
            };
            if log.account != account {
                ledger.found(log.charged(), account);
                ledger.freed(log.charged(), log.account);
                log.account = account;
            }
        }
        drop(index);
        self.charge_partials();
    }

    /// The account that a segment is charged to, whoever asks.
    pub(crate) fn account(&self, reference: &SegmentRef, asked: Charge) -> Charge {
        self.index()
            .account(reference.kind, &reference.origin, asked)
    }

    // ---- the index on disk --------------------------------------------------------------------

    /// Keeps room for one more page.
    fn arm(&self, writer: &mut Writer) {
        if writer.spare.is_none() {
            let bytes = index::page_bound(&self.root);
            writer.spare = self.root.ledger().reserve(bytes, Charge::Reserve).ok();
        }
    }

    /// Writes a journal and a catalog where there are none; for want of room it is tried again later.
    fn write_anew(&self, writer: &mut Writer) -> Result<(), StoreError> {
        writer.journal = None;
        let made = self
            .root
            .stage(JOURNAL_PATH, JOURNAL_BYTES, Charge::Reserve)
            .and_then(|mut staged| {
                staged.fill_zeros()?;
                staged.publish()
            })
            .map_err(StoreError::from)
            .and_then(|published| {
                writer.number = 0;
                self.checkpoint(writer)?;
                writer.journal = Some(published.file);
                Ok(())
            });
        self.arm(writer);
        match made {
            Err(error) if error.is_room() => {
                tracing::warn!(%error, "no room for the index of the store; it stays in memory");
                Ok(())
            }
            other => other,
        }
    }

    /// Makes the pages durable and writes the catalog, so that the journal begins anew.
    fn checkpoint(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let mut index = self.index();
        index.settle(&self.root, &mut writer.spare)?;
        index
            .sync(&self.root)
            // A failed sync leaves unknown what is on the device, also where it says that it is full.
            .map_err(StoreError::Root)?;
        let catalog = index.catalog(&self.domain, writer.number);
        drop(index);
        let bytes = catalog
            .encode()
            .map_err(|error| StoreError::Receipt(ReceiptError::Codec(error)))?;
        self.root
            .write_atomic(CATALOG_PATH, &bytes, Charge::Reserve)?;
        writer.since = 0;
        self.arm(writer);
        Ok(())
    }

    /// Announces changes durably before they are made, all with one sync: at most [`MAX_PUT_GROUP`],
    /// each of another place.
    fn announce(&self, writer: &mut Writer, changes: &[Change]) -> Result<(), StoreError> {
        let more = changes.len() as u64;
        if writer.journal.is_none() {
            writer.unannounced = writer.unannounced.saturating_add(more);
            if writer.unannounced >= RETRY_AFTER {
                writer.unannounced = 0;
                self.write_anew(writer)?;
            }
        }
        if writer.journal.is_some() && writer.since >= CHECKPOINT_AFTER {
            match self.checkpoint(writer) {
                Ok(()) => {}
                Err(error) if error.is_room() => {
                    if writer.since.saturating_add(more) > JOURNAL_BLOCKS {
                        // No more may be announced. Without a catalog the next start reads all files.
                        tracing::warn!(%error, "no room for the catalog; it is given up for now");
                        self.root.remove(CATALOG_PATH)?;
                        writer.journal = None;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let Some(journal) = &writer.journal else {
            return Ok(());
        };
        let mut number = writer.number;
        for (change, of_group) in changes.iter().zip(0u8..) {
            number = number.saturating_add(1);
            let Some(block) = change.encode(number, of_group) else {
                return Err(StoreError::TooScattered(change.origin.clone()));
            };
            journal
                .write_at(journal::offset(number), &block)
                .map_err(RootError::Disk)?;
        }
        journal
            .sync_data()
            .map_err(|error| StoreError::Root(RootError::Disk(error)))?;
        writer.number = number;
        writer.since = writer.since.saturating_add(more);
        Ok(())
    }

    /// Builds the index again if it was found damaged.
    fn heal(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let Some(why) = self.index().suspect.clone() else {
            return Ok(());
        };
        self.rebuild_counted(writer, &why)
    }

    fn rebuild_counted(&self, writer: &mut Writer, why: &str) -> Result<(), StoreError> {
        let mut index = self.index();
        let ledger = self.root.ledger();
        let mut counted = writer.doubtful_bytes;
        for log in index.logs.values_mut() {
            counted = counted
                .saturating_add(log.allocated)
                .saturating_add(log.receipts);
            if log.account != Charge::Normal {
                ledger.found(log.charged(), Charge::Normal);
                ledger.freed(log.charged(), log.account);
                log.account = Charge::Normal;
            }
        }
        drop(index);
        self.rebuild(writer, why, Some(counted), &mut |_| {})
    }

    /// Latches on errors that leave unknown what is on the device.
    fn latch_on(&self, error: &StoreError) {
        if let StoreError::Root(RootError::Disk(disk)) = error {
            let mut index = self.index();
            if index.latched.is_none() {
                // Never synced again as if it were safe.
                index.latched = Some(disk.to_string());
            }
        }
    }

    fn check_latch(&self) -> Result<(), StoreError> {
        match &self.index().latched {
            Some(reason) => Err(StoreError::Latched(reason.clone())),
            None => Ok(()),
        }
    }

    // ---- put ----------------------------------------------------------------------------------

    /// Stores a segment durably. INV-08: the same segment again, also from two threads at once, is
    /// stored once. Partials that nobody holds give way to it, oldest first, if enough comes of that.
    ///
    /// # Errors
    /// [`StoreError`]: the ceiling, a fork, a latched store, or the disk. Nothing is then held that
    /// was not before.
    pub fn put(&self, segment: &VerifiedSegment, charge: Charge) -> Result<PutOutcome, StoreError> {
        let account = self.account(&segment.reference(), charge);
        loop {
            let stored = self.put_with(
                segment,
                charge,
                |rel, account| {
                    let bytes = segment.bytes();
                    let staged = self.root.stage(rel, bytes.len() as u64, account)?;
                    fill(staged, bytes)
                },
                |staged| Ok(staged.publish()?.allocated),
            );
            let Err(StoreError::Ceiling(refused)) = &stored else {
                return stored;
            };
            // What a peer began to send, or only claimed, stands before nothing that is whole.
            if !self.make_way(account, refused)? {
                return stored;
            }
        }
    }

    /// Whether a segment fits what is held of its log, as [`Store::put`] judges it.
    ///
    /// # Errors
    /// [`StoreError::Fork`] if it does not.
    pub fn check_place(&self, new: &SegmentRef) -> Result<(), StoreError> {
        // Reads the place once, so that a damaged index is built again before it is asked.
        let _held = self.some(&new.origin, new.sequence, new.sequence, 1);
        self.check_fork(&mut self.index(), new)
    }

    /// Like [`Store::put`], from bytes reserved earlier.
    pub(crate) fn put_reserved(
        &self,
        segment: &VerifiedSegment,
        reservation: Reservation,
    ) -> Result<PutOutcome, StoreError> {
        self.put_with(
            segment,
            Charge::Normal,
            |rel, _| {
                let bytes = segment.bytes();
                let staged = self.root.stage_with(rel, bytes.len() as u64, reservation)?;
                fill(staged, bytes)
            },
            |staged| Ok(staged.publish()?.allocated),
        )
    }

    /// The one way in. `stage` brings the content to the device and gives its allocated bytes, charged
    /// to the account that it is told; many may do that at once. `publish` gives it the name, durably,
    /// and gives the allocated bytes again; one at a time.
    pub(crate) fn put_with<P>(
        &self,
        segment: &VerifiedSegment,
        charge: Charge,
        stage: impl FnOnce(&str, Charge) -> Result<(P, u64), StoreError>,
        publish: impl FnOnce(P) -> Result<u64, StoreError>,
    ) -> Result<PutOutcome, StoreError> {
        let reference = segment.reference();
        let id = reference.id;
        if segment.header().domain != self.domain {
            return Err(StoreError::Domain(segment.header().domain.clone()));
        }
        // Reads the place once, so that a damaged index is built again before it is asked.
        let _held = self.some(&reference.origin, reference.sequence, reference.sequence, 1);
        let account = {
            let mut index = self.index();
            while index.under_way.contains(&id) {
                index = self
                    .put_ended
                    .wait(index)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            // Before the question whether it is held: after a failed removal nobody knows.
            if let Some(reason) = &index.latched {
                return Err(StoreError::Latched(reason.clone()));
            }
            if self.holds(&mut index, &reference) {
                return Ok(PutOutcome::AlreadyHeld);
            }
            self.check_fork(&mut index, &reference)?;
            index.under_way.insert(id);
            index.account(reference.kind, &reference.origin, charge)
        };
        let under_way = UnderWay {
            store: self,
            ids: vec![id],
        };
        let rel = segment_path(reference.kind, &id);
        let outcome = stage(&rel, account).and_then(|(staged, allocated)| {
            match ChainEntry::of(segment, allocated) {
                Some(entry) => self.publish_audit(&reference, entry, account, || publish(staged)),
                None => {
                    let allocated = publish(staged)?;
                    self.index().insert_small(Small {
                        reference: reference.clone(),
                        allocated,
                    });
                    Ok(())
                }
            }
        });
        if let Err(error) = &outcome {
            self.latch_on(error);
        }
        drop(under_way);
        outcome.map(|()| PutOutcome::Stored)
    }

    fn publish_audit(
        &self,
        reference: &SegmentRef,
        mut entry: ChainEntry,
        account: Charge,
        publish: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<(), StoreError> {
        let (origin, sequence) = (&reference.origin, reference.sequence);
        let mut writer = self.writer();
        self.heal(&mut writer)?;
        self.check_latch()?;
        {
            // Another of the same place may have been under way; the second to come here is refused.
            let mut index = self.index();
            self.check_fork(&mut index, reference)?;
            let more_logs = !index.logs.contains_key(origin);
            let scattered = (more_logs && index.logs.len() >= MAX_AUDIT_LOGS)
                || index.range_count >= MAX_CHAIN_RANGES;
            // INV-07, against peers: the node's own log is in one piece and always goes on.
            if scattered && account == Charge::Custody {
                return Err(StoreError::TooScattered(origin.clone()));
            }
        }
        self.announce(
            &mut writer,
            &[Change {
                origin: origin.clone(),
                sequence,
                before: None,
                after: Some(entry),
            }],
        )?;
        self.index()
            .ready_page(&self.root, origin, sequence, &mut writer.spare, false)?;
        // A file that nobody counted may lie there: its announcement was lost to damage. Naming this
        // one replaces it and gives its bytes back.
        if let Ok(stat) = self.root.stat(&segment_path(Kind::Audit, &entry.id)) {
            let ledger = self.root.ledger();
            ledger.found(stat.allocated_bytes, Charge::Normal);
        }
        match publish() {
            Ok(allocated) => entry.allocated = allocated,
            Err(error) => {
                self.index()
                    .drop_page_if_empty(&self.root, origin, chain::place(sequence).0);
                if was_named(&error) {
                    self.may_be_named(&mut writer, account, entry.allocated);
                }
                writer.doubtful.insert(entry.id);
                return Err(error);
            }
        }
        let mut index = self.index();
        index.write(&self.root, origin, sequence, &entry);
        index.add(origin, sequence, &entry);
        drop(index);
        self.arm(&mut writer);
        Ok(())
    }

    /// A file may have its name although nobody holds it, and the ledger counts it; reopening finds out.
    fn may_be_named(&self, writer: &mut Writer, account: Charge, allocated: u64) {
        if account == Charge::Custody {
            let ledger = self.root.ledger();
            ledger.found(allocated, Charge::Normal);
            ledger.freed(allocated, account);
        }
        writer.doubtful_bytes = writer.doubtful_bytes.saturating_add(allocated);
    }

    /// Whether exactly this segment is held.
    fn holds(&self, index: &mut Index, reference: &SegmentRef) -> bool {
        match reference.kind {
            Kind::Audit => index
                .entry(&self.root, &reference.origin, reference.sequence)
                .is_some_and(|entry| entry.id == reference.id),
            _ => index.small.contains_key(&reference.id),
        }
    }

    /// INV-17: a place in an audit log is taken once, and neighbours are linked by hash.
    fn check_fork(&self, index: &mut Index, new: &SegmentRef) -> Result<(), StoreError> {
        if new.kind != Kind::Audit {
            return Ok(());
        }
        let fork = |held| StoreError::Fork {
            origin: new.origin.clone(),
            sequence: new.sequence,
            held,
            offered: new.id,
        };
        let mut at = |sequence: Option<u64>| index.entry(&self.root, &new.origin, sequence?);
        if let Some(held) = at(Some(new.sequence)) {
            return Err(fork(held.id));
        }
        if let Some(held) = at(new.sequence.checked_sub(1))
            && new.prev != Some(held.id)
        {
            return Err(fork(held.id));
        }
        if let Some(held) = at(new.sequence.checked_add(1))
            && held.prev != Some(new.id)
        {
            return Err(fork(held.id));
        }
        Ok(())
    }

    /// Why the store refuses writes, if it does.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        self.index().latched.clone()
    }

    /// Takes a latched store into use again: syncs the directories, builds the index anew, reads
    /// every file whole that it did not know, and then accepts writes.
    ///
    /// # Errors
    /// [`StoreError`] if the disk still refuses; the store stays latched.
    pub fn reopen(&self) -> Result<(), StoreError> {
        let mut writer = self.writer();
        for kind in Kind::ALL {
            self.root.sync_dir(&kind_dir(kind))?;
        }
        self.root.sync_dir(RECEIPTS_DIR)?;
        self.find_small(true)?;
        let latched = self.index().latched.clone();
        if latched.is_some() || self.index().suspect.is_some() {
            self.rebuild_counted(&mut writer, "the store was reopened after a disk fault")?;
        }
        self.index().latched = None;
        Ok(())
    }

    // ---- read ---------------------------------------------------------------------------------

    /// Finds a segment by id: in memory, or by the header in the file of that name.
    fn locate(&self, id: &SegmentId) -> Option<Held> {
        if let Some(small) = self.index().small.get(id) {
            return Some(Held {
                reference: small.reference.clone(),
                entry: None,
            });
        }
        self.locate_audit(id)
    }

    fn locate_audit(&self, id: &SegmentId) -> Option<Held> {
        let found = self.locate_once(id);
        if found.is_none() && self.mend() {
            self.locate_once(id)
        } else {
            found
        }
    }

    fn locate_once(&self, id: &SegmentId) -> Option<Held> {
        let mut index = self.index();
        let place = match index.remembered(id) {
            Some(place) => place,
            None => {
                drop(index);
                let header = self.front(id)?;
                index = self.index();
                match header {
                    Some(header) => (header.origin, header.sequence),
                    // A file of that name that cannot say where it belongs: then every place is
                    // looked at. Damage is rare.
                    None => self.search(&mut index, id)?,
                }
            }
        };
        let entry = index.entry(&self.root, &place.0, place.1)?;
        if entry.id != *id {
            return None;
        }
        let reference = entry.reference(&place.0, place.1);
        index.remember(*id, place.0, place.1);
        Some(Held {
            reference,
            entry: Some(entry),
        })
    }

    /// The header in an audit segment's file: `None` if there is no file, `Some(None)` if the header
    /// cannot be read.
    fn front(&self, id: &SegmentId) -> Option<Option<SegmentHeader>> {
        let rel = segment_path(Kind::Audit, id);
        let file = match self.root.open_file(&rel, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return None,
            Err(_) => return Some(None),
        };
        let len = file.stat().map_or(0, |stat| stat.len);
        let most = MAX_HEADER_BYTES + 32;
        let mut front = vec![0; usize::try_from(len).unwrap_or(most).min(most)];
        if file.read_at(0, &mut front).is_err() {
            return Some(None);
        }
        let header = format::peek_header(&mut front.as_slice()).ok();
        Some(header.map(|(header, _)| header))
    }

    fn search(&self, index: &mut Index, id: &SegmentId) -> Option<(Origin, u64)> {
        let logs: Vec<_> = index
            .logs
            .iter()
            .map(|(origin, log)| (origin.clone(), log.ranges.clone()))
            .collect();
        logs.iter().find_map(|(origin, ranges)| {
            let sequence = ranges.from(0).find(|sequence| {
                index
                    .entry(&self.root, origin, *sequence)
                    .is_some_and(|entry| entry.id == *id)
            })?;
            Some((origin.clone(), sequence))
        })
    }

    /// Reads and verifies a segment. A damaged one is moved to the quarantine and dropped.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], [`StoreError::Damaged`] or the disk's refusal.
    pub fn get(&self, id: &SegmentId) -> Result<VerifiedSegment, StoreError> {
        let reference = self.reference(id).ok_or(StoreError::NotHeld(*id))?;
        match self.read(&segment_path(reference.kind, id), *id) {
            Err(StoreError::Damaged { id, reason }) => {
                if !self.contains(&id) {
                    // Evicted while it was being read.
                    return Err(StoreError::NotHeld(id));
                }
                self.quarantine(&id, &reason)?;
                Err(StoreError::Damaged { id, reason })
            }
            other => other,
        }
    }

    /// Bytes of a segment's file as they lie there, not verified: at most `len` from `offset` on, less
    /// where the file ends. For transfers whose receiver verifies.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] or the disk's refusal.
    pub fn read_range(&self, id: &SegmentId, offset: u64, len: u64) -> Result<Vec<u8>, StoreError> {
        let reference = self.reference(id).ok_or(StoreError::NotHeld(*id))?;
        let rel = segment_path(reference.kind, id);
        let file = match self.root.open_file(&rel, OpenMode::Read) {
            Err(error) if is_gone(&error) => {
                self.quarantine(id, "its file is gone")?;
                return Err(StoreError::NotHeld(*id));
            }
            other => other?,
        };
        let size = reference.size_bytes.min(MAX_SEGMENT_BYTES);
        let len = len.min(size.saturating_sub(offset));
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(offset, &mut bytes).map_err(RootError::Disk)?;
        Ok(bytes)
    }

    /// Whether it is held. An audit segment whose file lies in its place without being in the index
    /// (its announcement was the last of a journal and was lost to damage) is verified and taken in.
    #[must_use]
    pub fn contains(&self, id: &SegmentId) -> bool {
        self.reference(id).is_some()
    }

    /// Whether anything is held of an audit log.
    #[must_use]
    pub fn holds_log(&self, log: &Origin) -> bool {
        let index = self.index();
        let held = index.logs.get(log);
        held.is_some_and(|log| !log.ranges.is_empty())
    }

    /// Its reference, if it is held; see [`Store::contains`].
    #[must_use]
    pub fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        if let Some(held) = self.locate(id) {
            return Some(held.reference);
        }
        let rel = segment_path(Kind::Audit, id);
        let stat = self.root.stat(&rel).ok()?;
        if let Err(error) = self.adopt(id, &rel, stat.allocated_bytes) {
            tracing::warn!(%id, %error, "a segment that no index knows cannot be taken in");
        }
        self.locate(id).map(|held| held.reference)
    }

    /// The span of records of an audit segment that is held.
    #[must_use]
    pub fn audit_span(&self, id: &SegmentId) -> Option<AuditSpan> {
        Some(self.locate(id)?.entry?.span)
    }

    /// When a held audit segment was sealed, by its header.
    pub(crate) fn created_unix_ms(&self, id: &SegmentId) -> Option<u64> {
        Some(self.locate(id)?.entry?.created_unix_ms)
    }

    /// The logs of this node, all incarnations, oldest first.
    #[must_use]
    pub fn own_logs(&self, node: &NodeId) -> Vec<Origin> {
        let index = self.index();
        let mut own: Vec<(u64, Origin)> = index
            .logs
            .keys()
            .filter_map(|origin| {
                let (of, _, incarnation) = origin.audit_parts()?;
                (of == *node).then(|| (incarnation, origin.clone()))
            })
            .collect();
        own.sort();
        own.into_iter().map(|(_, origin)| origin).collect()
    }

    /// The audit segments of this node's own log, all incarnations, oldest first. All of them are held
    /// in memory at once: for tests and tools; see [`Store::own_logs`].
    #[must_use]
    pub fn own_audit(&self, node: &NodeId) -> Vec<SegmentRef> {
        self.own_logs(node)
            .iter()
            .flat_map(|origin| self.some(origin, 0, u64::MAX, usize::MAX))
            .collect()
    }

    /// The segment with the lowest sequence that is held of an origin.
    #[must_use]
    pub fn first(&self, origin: &Origin) -> Option<SegmentRef> {
        self.some(origin, 0, u64::MAX, 1).pop()
    }

    /// The segment with the highest sequence that is held of an origin.
    #[must_use]
    pub fn last(&self, origin: &Origin) -> Option<SegmentRef> {
        let index = self.index();
        let last = match origin.kind() {
            Kind::Audit => index.logs.get(origin)?.ranges.last()?,
            kind => {
                let sequences = index.small_origins.get(&(kind, origin.clone()))?;
                sequences.last()?.0
            }
        };
        drop(index);
        self.find(origin, last)
    }

    /// What is held of an origin with sequences `from..=to`, ascending, at most `max` and never more
    /// than [`MAX_REFS`].
    #[must_use]
    pub fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        self.some(origin, from, to, max.min(MAX_REFS))
    }

    /// Builds the index again at once if a reader has found it damaged, so that nothing that is held is
    /// passed over in silence; `true` if it is worth reading again.
    fn mend(&self) -> bool {
        let index = self.index();
        if index.suspect.is_none() || index.latched.is_some() {
            return false;
        }
        drop(index);
        // Whoever is changing something now heals it first.
        let Ok(mut writer) = self.writer.try_lock() else {
            return false;
        };
        match self.heal(&mut writer) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "the index cannot be built again");
                false
            }
        }
    }

    fn some(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        let found = self.some_once(origin, from, to, max);
        if self.mend() {
            self.some_once(origin, from, to, max)
        } else {
            found
        }
    }

    fn some_once(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        let mut index = self.index();
        if origin.kind() != Kind::Audit {
            return index
                .small_at(origin, from, to)
                .take(max)
                .cloned()
                .collect();
        }
        let mut out = Vec::new();
        let mut next = Some(from);
        while out.len() < max
            && let Some(start) = next
            && let Some(log) = index.logs.get(origin)
            && let Some(sequence) = log.ranges.next(start)
            && sequence <= to
        {
            next = sequence.checked_add(1);
            if let Some(entry) = index.entry(&self.root, origin, sequence) {
                index.remember(entry.id, origin.clone(), sequence);
                out.push(entry.reference(origin, sequence));
            }
        }
        out
    }

    /// The segment at this place of an origin's log; the one with the lowest id where there are
    /// several (policy with further signatures, conflicting CRLs of one number).
    #[must_use]
    pub fn find(&self, origin: &Origin, sequence: u64) -> Option<SegmentRef> {
        self.refs(origin, sequence, sequence, 1).pop()
    }

    /// What is held, by origin: most urgent kind first, then by name (INV-11).
    #[must_use]
    pub fn heads(&self) -> Vec<Head> {
        let heads = self.heads_once();
        if self.mend() {
            self.heads_once()
        } else {
            heads
        }
    }

    fn heads_once(&self) -> Vec<Head> {
        let mut index = self.index();
        let small = index
            .small_origins
            .iter()
            .filter_map(|((_, origin), sequences)| {
                let (_, last_id) = sequences.last()?;
                let numbers = sequences.iter().map(|(sequence, _)| *sequence);
                Some(Head::from_sequences(origin.clone(), numbers, *last_id))
            });
        let mut heads: Vec<Head> = small.collect();
        let audit: Vec<_> = index
            .logs
            .iter()
            .filter_map(|(origin, log)| {
                let ranges = log.ranges.as_slice();
                let surplus = ranges.len().saturating_sub(MAX_HEAD_RANGES);
                let ranges = ranges.get(surplus..).unwrap_or_default().to_vec();
                Some((origin.clone(), ranges, log.ranges.last()?, log.last_id))
            })
            .collect();
        for (origin, ranges, last, last_id) in audit {
            let last_id = match last_id {
                Some(id) => id,
                None => {
                    let Some(entry) = index.entry(&self.root, &origin, last) else {
                        continue;
                    };
                    index.log(&origin).last_id = Some(entry.id);
                    entry.id
                }
            };
            heads.push(Head {
                origin,
                ranges,
                last_id,
            });
        }
        heads
    }

    /// Everything that is held, of one kind or of all, in the order of INV-11. All references are held
    /// in memory at once: for tests, tools and the kinds that are few; see [`Store::list_after`].
    #[must_use]
    pub fn list(&self, kind: Option<Kind>) -> Vec<SegmentRef> {
        let mut out = Vec::new();
        for of in Kind::ALL
            .into_iter()
            .filter(|of| kind.is_none_or(|kind| kind == *of))
        {
            let mut after: Option<(Origin, u64)> = None;
            loop {
                let some = self.list_after(of, after.as_ref(), MAX_REFS);
                let Some(last) = some.last() else { break };
                after = Some((last.origin.clone(), last.sequence));
                out.extend(some);
            }
        }
        out
    }

    /// What is held of a kind after a place, by origin and sequence, at most `max` and never more than
    /// [`MAX_REFS`]; where several have one sequence, all of them. Begin with `None` and go on from the
    /// last that was given, until there is none.
    #[must_use]
    pub fn list_after(
        &self,
        kind: Kind,
        after: Option<&(Origin, u64)>,
        max: usize,
    ) -> Vec<SegmentRef> {
        use std::ops::Bound::{Excluded, Unbounded};
        let max = max.min(MAX_REFS);
        let mut out: Vec<SegmentRef> = Vec::new();
        let mut at = after.map(|(origin, sequence)| (origin.clone(), sequence.checked_add(1)));
        loop {
            if let Some((origin, Some(from))) = &at {
                let room = max - out.len();
                out.extend(self.some(origin, *from, u64::MAX, room));
                if let Some(last) = out.last()
                    && out.len() >= max
                    && kind != Kind::Audit
                {
                    let (origin, sequence) = (last.origin.clone(), last.sequence);
                    out.retain(|held| (&held.origin, held.sequence) != (&origin, sequence));
                    out.extend(self.some(&origin, sequence, sequence, usize::MAX));
                }
            }
            if out.len() >= max {
                return out;
            }
            let index = self.index();
            let next = match (kind, &at) {
                (Kind::Audit, None) => index.logs.keys().next().cloned(),
                (Kind::Audit, Some((origin, _))) => index
                    .logs
                    .range((Excluded(origin.clone()), Unbounded))
                    .next()
                    .map(|(origin, _)| origin.clone()),
                (kind, at) => index
                    .small_origins
                    .keys()
                    .filter(|(of, _)| *of == kind)
                    .map(|(_, origin)| origin)
                    .find(|origin| at.as_ref().is_none_or(|(last, _)| *origin > last))
                    .cloned(),
            };
            match next {
                Some(origin) => at = Some((origin, Some(0))),
                None => return out,
            }
        }
    }

    // ---- remove -------------------------------------------------------------------------------

    /// Keeps a segment from being removed, also by eviction, until as many calls of [`Store::unpin`].
    /// Damage still takes it out of use.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] or [`StoreError::TooManyPins`].
    pub fn pin(&self, id: &SegmentId) -> Result<(), StoreError> {
        if !self.contains(id) {
            return Err(StoreError::NotHeld(*id));
        }
        let mut index = self.index();
        if index.pins.len() >= MAX_PINS && !index.pins.contains_key(id) {
            return Err(StoreError::TooManyPins);
        }
        let count = index.pins.entry(*id).or_default();
        *count = count.saturating_add(1);
        Ok(())
    }

    /// Takes one pin back.
    pub fn unpin(&self, id: &SegmentId) {
        let mut index = self.index();
        if let Some(count) = index.pins.get_mut(id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                index.pins.remove(id);
            }
        }
    }

    /// Whether somebody relies on it.
    #[must_use]
    pub fn is_pinned(&self, id: &SegmentId) -> bool {
        self.index().pins.contains_key(id)
    }

    /// Removes a segment and its receipts. Whether it may be removed is the caller's question.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], [`StoreError::Pinned`], [`StoreError::Latched`] or the disk's refusal.
    pub fn remove(&self, id: &SegmentId) -> Result<(), StoreError> {
        let held = self.locate(id).ok_or(StoreError::NotHeld(*id))?;
        if self.is_pinned(id) {
            return Err(StoreError::Pinned(*id));
        }
        if held.entry.is_some() {
            return self.take_out(&held.reference, |rel, account| {
                self.root.remove_charged(rel, account).map(|_| ())
            });
        }
        let small = self
            .index()
            .remove_small(id)
            .ok_or(StoreError::NotHeld(*id))?;
        let path = segment_path(small.reference.kind, id);
        if let Err(error) = self.root.remove_charged(&path, Charge::Normal) {
            if self.root.exists(&path).unwrap_or(true) {
                self.index().insert_small(small);
            }
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes an audit segment out of the index, and its files away by `away`.
    fn take_out(
        &self,
        reference: &SegmentRef,
        away: impl Fn(&str, Charge) -> Result<(), RootError>,
    ) -> Result<(), StoreError> {
        let (origin, sequence, id) = (&reference.origin, reference.sequence, &reference.id);
        let mut writer = self.writer();
        self.heal(&mut writer)?;
        self.check_latch()?;
        let (entry, account) = {
            let mut index = self.index();
            let entry = index
                .entry(&self.root, origin, sequence)
                .filter(|entry| entry.id == *id)
                .ok_or(StoreError::NotHeld(*id))?;
            (entry, index.log(origin).account)
        };
        let change = Change {
            origin: origin.clone(),
            sequence,
            before: Some(entry),
            after: None,
        };
        let done = self.announce(&mut writer, &[change]).and_then(|()| {
            let rel = segment_path(Kind::Audit, id);
            match away(&rel, account) {
                Ok(()) => {}
                Err(error) if is_gone(&error) => {
                    self.root.ledger().freed(entry.allocated, account);
                }
                Err(error) => {
                    if !self.root.exists(&rel).unwrap_or(true) {
                        // Gone, but perhaps not durably.
                        self.index().take(&self.root, origin, sequence, &entry);
                    }
                    // Not as a full file system: what is on the device is unknown.
                    return Err(StoreError::Root(error));
                }
            }
            self.index().take(&self.root, origin, sequence, &entry);
            if entry.receipts > 0
                && let Err(error) = away(&receipts_path(id), Charge::Normal)
            {
                if !is_gone(&error) {
                    return Err(StoreError::Root(error));
                }
                self.root.ledger().freed(entry.receipts, Charge::Normal);
            }
            Ok(())
        });
        if let Err(error) = &done {
            self.latch_on(error);
        }
        done
    }

    /// Takes a segment out of use and keeps its file in the quarantine, receipts beside it. Gives the
    /// file's new path below the root; `None` if the file was gone already.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] or the disk's refusal; it is out of use all the same.
    pub fn quarantine(&self, id: &SegmentId, reason: &str) -> Result<Option<String>, StoreError> {
        let held = self.locate(id).ok_or(StoreError::NotHeld(*id))?;
        let done = self.set_aside(id, reason);
        self.damaged(&held.reference);
        done
    }

    /// As [`Store::quarantine`], for a segment that is sound: nobody is asked for it again.
    pub(crate) fn set_aside(
        &self,
        id: &SegmentId,
        reason: &str,
    ) -> Result<Option<String>, StoreError> {
        let held = self.locate(id).ok_or(StoreError::NotHeld(*id))?;
        let to = Mutex::new(None);
        let away = |rel: &str, account: Charge| {
            let name = self.root.move_to_quarantine(rel, account)?;
            let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
            to.get_or_insert(name);
            Ok(())
        };
        let done = if held.entry.is_some() {
            self.take_out(&held.reference, away)
        } else {
            let small = self
                .index()
                .remove_small(id)
                .ok_or(StoreError::NotHeld(*id))?;
            match away(&segment_path(small.reference.kind, id), Charge::Normal) {
                Err(error) if is_gone(&error) => {
                    self.root.ledger().freed(small.allocated, Charge::Normal);
                    Ok(())
                }
                // Out of use all the same: what is suspect is not served.
                other => other.map_err(StoreError::from),
            }
        };
        let to = to.into_inner().unwrap_or_else(PoisonError::into_inner);
        match &to {
            Some(to) => tracing::error!(%id, reason, to, "segment moved to quarantine"),
            None => tracing::error!(%id, reason, "the file of a segment is gone or stays"),
        }
        done.map(|()| to)
    }

    // ---- receipts -----------------------------------------------------------------------------

    /// Keeps a receipt for an own or foreign audit segment that is held. The receipt must fit the
    /// segment in domain, log, range and root, and its signature must verify; its endorsement's
    /// certificate chain must have been judged by the caller. Again the same custodian's: replaced.
    ///
    /// # Errors
    /// [`StoreError`] telling what does not fit.
    pub fn put_receipt(&self, receipt: &CustodyReceipt) -> Result<(), StoreError> {
        let id = receipt.segment_id;
        receipt.verify_signature()?;
        let held = self.locate(&id).ok_or(StoreError::NotHeld(id))?;
        let fits = receipt.domain == self.domain
            && receipt.origin == held.reference.origin
            && held.entry.is_some_and(|entry| {
                (entry.span.first, entry.span.last, entry.span.root)
                    == (receipt.first, receipt.last, receipt.root_at_last)
            });
        if !fits {
            return Err(StoreError::ReceiptMismatch(id));
        }
        self.change_receipts(&held.reference, |all| {
            let again = all.iter().any(|r| r.custodian == receipt.custodian);
            if all.len() >= MAX_RECEIPTS_PER_SEGMENT && !again {
                return Err(StoreError::TooManyReceipts(id));
            }
            receipts::insert(all, receipt.clone());
            Ok(())
        })
    }

    /// Writes the file of a segment's receipts anew.
    fn change_receipts(
        &self,
        reference: &SegmentRef,
        change: impl FnOnce(&mut Vec<CustodyReceipt>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let (origin, sequence, id) = (&reference.origin, reference.sequence, &reference.id);
        let mut writer = self.writer();
        self.heal(&mut writer)?;
        self.check_latch()?;
        let before = self
            .index()
            .entry(&self.root, origin, sequence)
            .filter(|entry| entry.id == *id)
            .ok_or(StoreError::NotHeld(*id))?;
        // What cannot be read now is not written over.
        let mut all = self.read_receipts(id)?;
        change(&mut all)?;
        let rel = receipts_path(id);
        let done = (|| {
            let mut after = ChainEntry {
                custodians: u16::try_from(all.len()).unwrap_or(u16::MAX),
                receipts: 0,
                ..before
            };
            let announced = Change {
                origin: origin.clone(),
                sequence,
                before: Some(before),
                after: Some(after),
            };
            if all.is_empty() {
                self.announce(&mut writer, std::slice::from_ref(&announced))?;
                if before.receipts > 0 {
                    self.root.remove(&rel).map_err(StoreError::Root)?;
                }
            } else {
                let bytes = receipts::encode(&all)?;
                let staged = self.root.stage(&rel, bytes.len() as u64, Charge::Reserve)?;
                let (staged, allocated) = fill(staged, &bytes)?;
                self.announce(&mut writer, std::slice::from_ref(&announced))?;
                after.receipts = allocated;
                if let Err(error) = staged.publish() {
                    let error = StoreError::from(error);
                    if was_named(&error) {
                        self.index().replace(origin, sequence, &before, &after);
                    }
                    return Err(error);
                }
            }
            let mut index = self.index();
            index.write(&self.root, origin, sequence, &after);
            index.replace(origin, sequence, &before, &after);
            Ok(())
        })();
        if let Err(error) = &done {
            self.latch_on(error);
        }
        done
    }

    /// What lies in the file of a segment's receipts, unverified. One that is damaged is left out.
    fn read_receipts(&self, id: &SegmentId) -> Result<Vec<CustodyReceipt>, StoreError> {
        let bytes = self.root.read(&receipts_path(id))?;
        Ok(bytes.map_or_else(Vec::new, |bytes| receipts::decode(&bytes)))
    }

    /// As [`Self::read_receipts`], where those that cannot be read just do not count.
    fn readable_receipts(&self, id: &SegmentId) -> Vec<CustodyReceipt> {
        self.read_receipts(id).unwrap_or_else(|error| {
            tracing::error!(%error, "receipts cannot be read; they do not count");
            Vec::new()
        })
    }

    /// The receipts held for a segment, by custodian. One that is damaged does not count.
    #[must_use]
    pub fn receipts(&self, id: &SegmentId) -> Vec<CustodyReceipt> {
        let Some(Held {
            entry: Some(entry), ..
        }) = self.locate(id)
        else {
            return Vec::new();
        };
        if entry.receipts == 0 {
            return Vec::new();
        }
        let span = entry.span;
        let mut all = self.readable_receipts(id);
        all.retain(|receipt| {
            receipt.segment_id == *id
                && (receipt.first, receipt.last, receipt.root_at_last)
                    == (span.first, span.last, span.root)
                && receipt.verify_signature().is_ok()
        });
        all
    }

    /// The custodians that a receipt is held of; the receipts are not verified. Reads one file.
    #[must_use]
    pub fn custodians(&self, id: &SegmentId) -> BTreeSet<NodeId> {
        match self.locate(id) {
            Some(Held {
                entry: Some(entry), ..
            }) if entry.receipts > 0 => self
                .readable_receipts(id)
                .into_iter()
                .map(|receipt| receipt.custodian)
                .collect(),
            _ => BTreeSet::new(),
        }
    }

    /// How many custodians a receipt is held of. Reads no receipt.
    #[must_use]
    pub fn custodian_count(&self, id: &SegmentId) -> usize {
        self.locate(id)
            .and_then(|held| held.entry)
            .map_or(0, |entry| usize::from(entry.custodians))
    }

    /// This node's own segments that have fewer than `required` custodians, the oldest first and at
    /// most `max`. With `without`, only those of which that peer has given no receipt. One call looks
    /// at a bounded number of entries, and at those first that were without custody at the last call.
    #[must_use]
    pub fn lacking_custody(
        &self,
        node: &NodeId,
        required: usize,
        without: Option<&NodeId>,
        max: usize,
    ) -> Vec<SegmentRef> {
        let max = max.min(MAX_REFS);
        let mut out = Vec::new();
        let mut looks = 0;
        for origin in self.own_logs(node) {
            let (mut from, mut contiguous) = {
                let mut index = self.index();
                let log = index.log(&origin);
                if log.satisfied.1 < required {
                    log.satisfied = (0, required);
                }
                (Some(log.satisfied.0), true)
            };
            while out.len() < max && looks < MAX_CUSTODY_LOOKS {
                looks += 1;
                let mut index = self.index();
                let next = from.and_then(|from| index.logs.get(&origin)?.ranges.next(from));
                let Some(sequence) = next else { break };
                from = sequence.checked_add(1);
                let Some(entry) = index.entry(&self.root, &origin, sequence) else {
                    continue;
                };
                if usize::from(entry.custodians) >= required {
                    if contiguous && let Some(from) = from {
                        let log = index.log(&origin);
                        if log.satisfied.1 == required {
                            log.satisfied.0 = log.satisfied.0.max(from);
                        }
                    }
                    continue;
                }
                contiguous = false;
                index.remember(entry.id, origin.clone(), sequence);
                drop(index);
                let given = without.is_some_and(|peer| {
                    entry.custodians > 0
                        && self
                            .readable_receipts(&entry.id)
                            .iter()
                            .any(|receipt| receipt.custodian == *peer)
                });
                if !given {
                    out.push(entry.reference(&origin, sequence));
                }
            }
        }
        out
    }

    /// How many of this node's own segments have fewer than `required` custodians; exact up to 16.
    #[must_use]
    pub fn lacking_custody_count(&self, node: &NodeId, required: usize) -> u64 {
        let index = self.index();
        index
            .logs
            .iter()
            .filter(|(origin, _)| origin.audit_node() == Some(node.as_str()))
            .flat_map(|(_, log)| {
                log.by_custodians
                    .iter()
                    .take(required.min(COUNTED_CUSTODIANS))
            })
            .fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Removes every receipt that the caller names, such as those of a revoked custodian (ruling 4),
    /// and tells how many. The receipts that it is asked about are not verified.
    ///
    /// # Errors
    /// [`StoreError`] if a file or the index cannot be read or written; all others are gone.
    pub fn remove_receipts_by(
        &self,
        condemned: &dyn Fn(&CustodyReceipt) -> bool,
    ) -> Result<usize, StoreError> {
        let mut removed = self.remove_listed_receipts_by(condemned);
        if self.index().suspect.is_some() {
            // What a damaged index did not list may be counted all the same: the files say what is held.
            let mut writer = self.writer();
            self.heal(&mut writer)?;
            drop(writer);
            let more = self.remove_listed_receipts_by(condemned);
            removed = (removed.0 + more.0, more.1);
            if let Some(why) = &self.index().suspect {
                return Err(StoreError::Index(why.clone()));
            }
        }
        match removed {
            (_, Some(error)) => Err(error),
            (count, None) => Ok(count),
        }
    }

    /// How many were removed, and the first error. Fail closed: one file that cannot be read or written
    /// keeps the receipts of no other segment.
    fn remove_listed_receipts_by(
        &self,
        condemned: &dyn Fn(&CustodyReceipt) -> bool,
    ) -> (usize, Option<StoreError>) {
        let mut removed = 0;
        let mut failed = None;
        let mut after: Option<(Origin, u64)> = None;
        loop {
            let some = self.list_after(Kind::Audit, after.as_ref(), MAX_REFS);
            let Some(last) = some.last() else {
                return (removed, failed);
            };
            after = Some((last.origin.clone(), last.sequence));
            for reference in &some {
                let held = {
                    let mut index = self.index();
                    index.entry(&self.root, &reference.origin, reference.sequence)
                };
                if held.is_none_or(|entry| entry.receipts == 0) {
                    continue;
                }
                match self.remove_receipts_of(reference, condemned) {
                    Ok(count) => removed += count,
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
        }
    }

    fn remove_receipts_of(
        &self,
        reference: &SegmentRef,
        condemned: &dyn Fn(&CustodyReceipt) -> bool,
    ) -> Result<usize, StoreError> {
        let mut doomed = self.read_receipts(&reference.id)?;
        doomed.retain(|receipt| condemned(receipt));
        if !doomed.is_empty() {
            self.change_receipts(reference, |all| {
                for receipt in &doomed {
                    receipts::remove(all, &receipt.custodian);
                }
                Ok(())
            })?;
        }
        Ok(doomed.len())
    }

    /// Allocated bytes of the audit that is held for other nodes, with its part of the index.
    #[must_use]
    pub fn foreign_audit_bytes(&self) -> u64 {
        let index = self.index();
        index
            .logs
            .values()
            .filter(|log| log.account == Charge::Custody)
            .fold(0, |sum, log| sum.saturating_add(log.charged()))
    }

    /// How many audit segments are held, and their allocated bytes.
    #[must_use]
    pub fn audit_totals(&self) -> (u64, u64) {
        let index = self.index();
        index.logs.values().fold((0, 0), |(count, bytes), log| {
            (
                log.ranges.count().saturating_add(count),
                log.allocated.saturating_add(bytes),
            )
        })
    }
}

impl Peeked {
    fn reference(&self, id: SegmentId) -> SegmentRef {
        SegmentRef {
            id,
            kind: self.header.kind,
            origin: self.header.origin.clone(),
            sequence: self.header.sequence,
            size_bytes: self.len,
            prev: self.header.prev,
        }
    }

    fn entry(&self, id: SegmentId) -> Option<ChainEntry> {
        Some(ChainEntry {
            id,
            prev: self.header.prev,
            span: self.span?,
            created_unix_ms: self.header.created_unix_ms,
            size_bytes: self.len,
            allocated: self.allocated,
            receipts: 0,
            custodians: 0,
        })
    }
}

/// Whether a file whose naming failed has its name all the same, and its bytes are counted.
fn was_named(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Root(RootError::Disk(DiskError {
            op: DiskOp::SyncDir,
            ..
        }))
    )
}

fn fill(mut staged: Staged, bytes: &[u8]) -> Result<(Staged, u64), StoreError> {
    staged.fill(bytes)?;
    let allocated = staged.booked();
    Ok((staged, allocated))
}
