//! Segments that are still arriving: `partial/<hex>.part`, `.map` and `.note`.
//!
//! A [`Partial`] takes slices of a segment (see [`crate::bao`]) in any order and from several
//! callers, and checks every group of 16 KiB against the segment's id before it writes it. The room
//! for the whole segment is reserved and allocated first. Every [`MAP_INTERVAL_BYTES`] the content is
//! synced, and then the map, which tells what is there and carries the hashes to prove it, is
//! replaced. Every [`NOTE_INTERVAL_BYTES`] in between the same is noted without a sync: what the kernel
//! was told outlives the process, and most kills are of the process only. The next holder goes on from
//! whichever claims more, and every group that it claims is checked against the id again; one that
//! does not fit is dropped and fetched anew.
//! [`Partial::finish`] verifies the whole segment and gives the file its place in the store by a
//! rename: the bytes are on the disk once at any time.
//!
//! Nothing here is ever listed, served or counted as held.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::bao::{self, BaoError, Item, Pair};
use crate::disk::{DiskError, DiskFault, DiskFile, DiskOp, OpenMode};
use crate::format::{FormatError, SegmentRef, VerifiedSegment, verify_segment};
use crate::id::SegmentId;
use crate::ledger::{CeilingReached, Charge, Reservation};
use crate::limits::{MAP_INTERVAL_BYTES, MAX_PARTIAL_BYTES, MAX_PARTIALS, NOTE_INTERVAL_BYTES};
use crate::root::{Root, RootError};
use crate::store::{PutOutcome, Store, StoreError};

mod map;
mod serve;

pub(crate) use self::map::reencode_map;
use self::map::{Map, Progress, Recheck, any, note, received_bytes};
use self::serve::Outboards;

const DIR: &str = "partial";
/// Why a partial refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PartialError {
    /// The segment is in the store.
    #[error("segment {0} is held already")]
    AlreadyHeld(SegmentId),
    /// Somebody else holds this partial.
    #[error("segment {0} is being received already")]
    Busy(SegmentId),
    /// The reference that was claimed is none that this segment can have.
    #[error("what was claimed of segment {id} is wrong: {why}")]
    Claim {
        /// Which segment.
        id: SegmentId,
        /// What does not fit.
        why: &'static str,
    },
    /// As many partials as there may be, and all of them in use.
    #[error("{MAX_PARTIALS} partials or {MAX_PARTIAL_BYTES} bytes of them are in use; try later")]
    TooMany,
    /// The slice is malformed or not of this segment. The groups before the bad one were taken.
    #[error(transparent)]
    Slice(#[from] BaoError),
    /// Not everything has arrived.
    #[error("{missing_bytes} bytes are still missing")]
    Incomplete {
        /// How many.
        missing_bytes: u64,
    },
    /// Content changed on the disk after it was checked. Those groups are missing again.
    #[error("{bytes} bytes of segment {id} were damaged on disk and have to be fetched again")]
    Damaged {
        /// Which segment.
        id: SegmentId,
        /// How many.
        bytes: u64,
    },
    /// The bytes have the id asked for and are no good segment. The partial is gone.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Writing or syncing failed. Open it again: what the last map claims is still there.
    #[error("the partial was given back after {0}; open it again")]
    Broken(String),
    /// It was finished or abandoned, perhaps by another thread.
    #[error("the partial has ended")]
    Ended,
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<RootError> for PartialError {
    fn from(error: RootError) -> Self {
        Self::Store(error.into())
    }
}

impl From<DiskError> for PartialError {
    fn from(error: DiskError) -> Self {
        RootError::Disk(error).into()
    }
}

impl From<CeilingReached> for PartialError {
    fn from(error: CeilingReached) -> Self {
        Self::Store(error.into())
    }
}

/// What [`Partial::accept`] took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Accepted {
    /// Bytes that were not there before.
    pub new_bytes: u64,
    /// Whether the segment is complete now and may be finished.
    pub complete: bool,
}

/// A partial, for lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartialInfo {
    /// What was claimed of the segment; only its id is certain.
    pub reference: SegmentRef,
    /// Bytes that have arrived. Until the partial is opened, as its map claims.
    pub received_bytes: u64,
    /// Whether somebody holds it.
    pub in_use: bool,
}

fn rel(id: &SegmentId, ending: &str) -> String {
    format!("{DIR}/{}.{ending}", id.hex())
}

const PART: &str = "part";
const MAP: &str = "map";
/// A map before it replaces the one before it.
const NEW_MAP: &str = "new";
/// Two places for a map, written in turn and never synced.
const NOTE: &str = "note";
/// In the order in which they are removed: what claims before what is claimed.
const ENDINGS: [&str; 4] = [MAP, NEW_MAP, NOTE, PART];

/// The segment and the kind of file, of a name that a partial can have.
fn parse_name(name: &str) -> Option<(SegmentId, &'static str)> {
    let (hex, ending) = name.split_once('.')?;
    let ending = ENDINGS.into_iter().find(|known| *known == ending)?;
    Some((SegmentId::from_hex(hex).ok()?, ending))
}

#[derive(Debug)]
struct Known {
    reference: SegmentRef,
    /// Higher means used later.
    serial: u64,
    account: Charge,
    in_use: bool,
    received: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Registry {
    known: BTreeMap<SegmentId, Known>,
    last_serial: u64,
}

impl Registry {
    fn exceeds(&self, more: usize, more_bytes: u64) -> bool {
        let sizes = self.known.values().map(|known| known.reference.size_bytes);
        let bytes = sizes.fold(more_bytes, u64::saturating_add);
        self.known.len() + more > MAX_PARTIALS || bytes > MAX_PARTIAL_BYTES
    }
}

/// What a store keeps of transfers in both directions.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    registry: Mutex<Registry>,
    outboards: Outboards,
}

impl Transfers {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Changes under the lock are whole before anything can panic.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove_file(root: &Root, rel: &str, account: Charge) -> Result<u64, RootError> {
    match root.remove_charged(rel, account) {
        Err(RootError::Disk(DiskError {
            op: DiskOp::Stat,
            fault: DiskFault::NotFound,
            ..
        })) => Ok(0),
        other => other,
    }
}

fn remove_files(root: &Root, id: &SegmentId, account: Charge) -> Result<u64, RootError> {
    ENDINGS.into_iter().try_fold(0u64, |sum, ending| {
        let bytes = if ending == NOTE {
            remove_note(root, id, account)?
        } else {
            remove_file(root, &rel(id, ending), account)?
        };
        Ok(sum.saturating_add(bytes))
    })
}

/// A note that comes back after a loss of power claims what is not there, which is found out; so
/// nothing waits for a sync.
fn remove_note(root: &Root, id: &SegmentId, account: Charge) -> Result<u64, RootError> {
    let name = rel(id, NOTE);
    if !root.exists(&name)? {
        return Ok(0);
    }
    let bytes = allocated_by(root, id, NOTE)?;
    root.unlink(&name, bytes, account)?;
    Ok(bytes)
}

fn allocated_by(root: &Root, id: &SegmentId, ending: &str) -> Result<u64, RootError> {
    match root.stat(&rel(id, ending)) {
        Ok(stat) => Ok(stat.allocated_bytes),
        Err(RootError::Disk(DiskError {
            fault: DiskFault::NotFound,
            ..
        })) => Ok(0),
        Err(error) => Err(error),
    }
}

/// What of a partial is claimed to be there. Whether it is so nobody has looked at yet.
struct Claimed {
    map: Map,
    have: Vec<bool>,
    /// Whether a note claims it and the map does not.
    is_noted: bool,
}

impl Claimed {
    /// By the map, or by a note if that claims more.
    fn read(root: &Root, id: &SegmentId) -> Result<Option<Self>, RootError> {
        let map = root.read(&rel(id, MAP))?;
        let notes = root.read(&rel(id, NOTE))?;
        let notes = notes.as_deref().map(note::places).unwrap_or_default();
        let claim = |bytes: &[u8], is_noted| {
            let (map, have) = Map::decode(bytes)?;
            (map.reference.id == *id).then_some(Self {
                map,
                have,
                is_noted,
            })
        };
        let map = map.as_deref().and_then(|bytes| claim(bytes, false));
        let notes = notes.into_iter().filter_map(|bytes| claim(bytes, true));
        Ok(map.into_iter().chain(notes).reduce(|best, next| {
            if next.bytes() > best.bytes() {
                next
            } else {
                best
            }
        }))
    }

    fn bytes(&self) -> u64 {
        received_bytes(self.map.reference.size_bytes, &self.have)
    }
}

/// What there is to go on with.
struct Resumed {
    progress: Progress,
    is_noted: bool,
}

/// Reserve and normal charges come out of one account.
fn same_account(a: Charge, b: Charge) -> bool {
    (a == Charge::Custody) == (b == Charge::Custody)
}

/// Gives a partial back to the registry when opening it does not end well.
struct Hold<'a> {
    store: &'a Store,
    id: SegmentId,
    serial: u64,
    keep: bool,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if !self.keep {
            release(self.store, &self.id, self.serial);
        }
    }
}

/// Marks a partial as unused; one that left no file behind is forgotten. The serial tells a holder
/// from the one that came after it.
fn release(store: &Store, id: &SegmentId, serial: u64) {
    let left = store.root().exists(&rel(id, PART)).unwrap_or(true);
    let mut registry = store.transfers.registry();
    match registry.known.get_mut(id) {
        Some(known) if known.serial != serial => {}
        Some(known) if left => known.in_use = false,
        _ => {
            registry.known.remove(id);
        }
    }
}

impl Store {
    /// Finds what earlier runs left in `partial/`. A partial without a good map, or of a segment that
    /// is held by now, is of no use and removed; files of other names are left alone.
    pub(crate) fn find_partials(&self) -> Result<(), StoreError> {
        let root = self.root();
        let mut found: BTreeMap<SegmentId, bool> = BTreeMap::new();
        for name in root.list(DIR)? {
            match parse_name(&name) {
                Some((id, ending)) => *found.entry(id).or_default() |= ending == PART,
                None => tracing::warn!(
                    file = format!("{DIR}/{name}"),
                    "foreign file among the partials; it counts to the ceiling"
                ),
            }
        }
        for (id, part) in found {
            remove_file(root, &rel(&id, NEW_MAP), Charge::Normal)?;
            let usable = Claimed::read(root, &id)?.filter(|_| part && !self.contains(&id));
            let Some(claimed) = usable else {
                remove_files(root, &id, Charge::Normal)?;
                tracing::debug!(%id, "removed a partial that cannot be resumed");
                continue;
            };
            let received = AtomicU64::new(claimed.bytes());
            let map = claimed.map;
            let mut registry = self.transfers.registry();
            registry.last_serial = registry.last_serial.max(map.serial);
            registry.known.insert(
                id,
                Known {
                    reference: map.reference,
                    serial: map.serial,
                    account: Charge::Normal,
                    in_use: false,
                    received: Arc::new(received),
                },
            );
        }
        let exceeds = || self.transfers.registry().exceeds(0, 0);
        while exceeds() && self.give_up_oldest(None)?.is_some() {}
        Ok(())
    }

    /// Charges each unused partial to the account that its segment will be charged to.
    pub(crate) fn charge_partials(&self) {
        let mut registry = self.transfers.registry();
        for (id, known) in registry.known.iter_mut().filter(|(_, known)| !known.in_use) {
            let account = self.account(&known.reference, known.account);
            self.recharge(id, known, account);
        }
    }

    fn recharge(&self, id: &SegmentId, known: &mut Known, account: Charge) {
        if !same_account(known.account, account) {
            let bytes = ENDINGS
                .into_iter()
                .filter_map(|ending| allocated_by(self.root(), id, ending).ok())
                .fold(0, u64::saturating_add);
            self.root().ledger().freed(bytes, known.account);
            self.root().ledger().found(bytes, account);
        }
        known.account = account;
    }

    /// Gives up the partial that has been unused for longest, of one account or of any, and tells how
    /// many bytes that freed.
    pub(crate) fn give_up_oldest(&self, account: Option<Charge>) -> Result<Option<u64>, RootError> {
        let oldest = {
            let mut registry = self.transfers.registry();
            let oldest = registry
                .known
                .iter_mut()
                .filter(|(_, known)| !known.in_use)
                .filter(|(_, known)| account.is_none_or(|of| same_account(of, known.account)))
                .min_by_key(|(id, known)| (known.serial, **id));
            oldest.map(|(id, known)| {
                known.in_use = true;
                (*id, known.account, known.serial)
            })
        };
        let Some((id, account, serial)) = oldest else {
            return Ok(None);
        };
        let removed = remove_files(self.root(), &id, account);
        release(self, &id, serial);
        tracing::info!(%id, "gave up a partial to make room");
        removed.map(Some)
    }

    /// Gives up partials that nobody holds, oldest first, until so many bytes of the account are
    /// freed, and tells how many were. Nothing that was acknowledged is lost by it.
    ///
    /// # Errors
    /// [`RootError`] if the disk refuses.
    pub fn give_up_partials(&self, charge: Charge, wanted_bytes: u64) -> Result<u64, RootError> {
        let mut freed = 0u64;
        while freed < wanted_bytes
            && let Some(bytes) = self.give_up_oldest(Some(charge))?
        {
            freed = freed.saturating_add(bytes);
        }
        Ok(freed)
    }

    /// Gives up partials that nobody holds for what the ceiling has refused to an account, unless all of
    /// them would not be enough. Tells whether it is to be tried again.
    pub(crate) fn make_way(
        &self,
        account: Charge,
        refused: &CeilingReached,
    ) -> Result<bool, RootError> {
        let missing = refused.wanted_bytes.saturating_sub(refused.available_bytes);
        let unused: Vec<SegmentId> = {
            let registry = self.transfers.registry();
            let unused = registry
                .known
                .iter()
                .filter(|(_, known)| !known.in_use && same_account(known.account, account));
            unused.map(|(id, _)| *id).collect()
        };
        let mut enough = 0u64;
        for id in &unused {
            for ending in ENDINGS {
                enough = enough.saturating_add(allocated_by(self.root(), id, ending)?);
            }
        }
        Ok(enough >= missing && self.give_up_partials(account, missing.max(1))? > 0)
    }

    /// Bytes of an account that [`Store::put`] and [`Store::partial`] take from partials that nobody
    /// holds, when they need them.
    #[must_use]
    pub fn unused_partial_bytes(&self, charge: Charge) -> u64 {
        let registry = self.transfers.registry();
        let unused = registry
            .known
            .values()
            .filter(|known| !known.in_use && same_account(known.account, charge));
        unused.fold(0, |sum, known| {
            sum.saturating_add(known.reference.size_bytes)
        })
    }

    /// The partials, by id.
    #[must_use]
    pub fn partials(&self) -> Vec<PartialInfo> {
        let registry = self.transfers.registry();
        let info = |known: &Known| PartialInfo {
            reference: known.reference.clone(),
            received_bytes: known.received.load(Ordering::Relaxed),
            in_use: known.in_use,
        };
        registry.known.values().map(info).collect()
    }

    /// Begins to receive a segment, or goes on where an earlier holder or run ended. The room for all
    /// of it is reserved and allocated before this returns; other partials that nobody holds are
    /// given up for it, oldest first.
    ///
    /// What is claimed of the segment besides its id is believed until [`Partial::finish`]. Another
    /// claim of the same size takes over what has arrived. One of another size begins anew, unless
    /// the last group has arrived, which proves the size: so fetch the last group first.
    ///
    /// # Errors
    /// [`PartialError`]: held already, in use, a claim that cannot be, no room, or the disk.
    pub fn partial(
        self: &Arc<Self>,
        reference: &SegmentRef,
        charge: Charge,
    ) -> Result<Partial, PartialError> {
        let id = reference.id;
        let groups = bao::groups(reference.size_bytes)?;
        if reference.size_bytes == 0 || reference.origin.kind() != reference.kind {
            let why = "its size or kind cannot be";
            return Err(PartialError::Claim { id, why });
        }
        if let Some(reason) = self.latched() {
            return Err(StoreError::Latched(reason).into());
        }
        let account = self.account(reference, charge);
        let (serial, received) = self.hold(reference, account)?;
        let mut hold = Hold {
            store: self,
            id,
            serial,
            keep: false,
        };
        if self.contains(&id) {
            remove_files(self.root(), &id, account)?;
            return Err(PartialError::AlreadyHeld(id));
        }
        let resumed = match self.resumable(reference)? {
            Some(map) => Some(map),
            None => {
                remove_files(self.root(), &id, account)?;
                None
            }
        };
        let is_noted = resumed.as_ref().is_some_and(|resumed| resumed.is_noted);
        let progress = resumed.map(|resumed| resumed.progress);
        let body = self.open_body(reference, groups, account, progress)?;
        received.store(
            received_bytes(reference.size_bytes, &body.have),
            Ordering::Relaxed,
        );
        if let Some(known) = self.transfers.registry().known.get_mut(&id) {
            known.reference = reference.clone();
        }
        hold.keep = true;
        let partial = Partial {
            store: Arc::clone(self),
            reference: reference.clone(),
            charge,
            account,
            serial,
            received,
            body: Mutex::new(Ok(body)),
        };
        if is_noted {
            // The places of the notes are free again for what comes.
            partial.with_body(|body| partial.write_map(body))?;
        }
        Ok(partial)
    }

    /// Marks the partial as in use, INV-07: within the limits, for which others are given up.
    fn hold(
        &self,
        reference: &SegmentRef,
        account: Charge,
    ) -> Result<(u64, Arc<AtomicU64>), PartialError> {
        let id = reference.id;
        loop {
            let mut registry = self.transfers.registry();
            let serial = registry.last_serial.saturating_add(1);
            let before = registry.known.get(&id);
            if before.is_some_and(|known| known.in_use) {
                return Err(PartialError::Busy(id));
            }
            // Another claim may have been of less.
            let claimed = before.map_or(0, |known| known.reference.size_bytes);
            let more = usize::from(before.is_none());
            let more_bytes = reference.size_bytes.saturating_sub(claimed);
            if more_bytes > 0 && registry.exceeds(more, more_bytes) {
                drop(registry);
                if self.give_up_oldest(None)?.is_none() {
                    return Err(PartialError::TooMany);
                }
                continue;
            }
            if let Some(known) = registry.known.get_mut(&id) {
                self.recharge(&id, known, account);
                known.in_use = true;
                known.serial = serial;
                let received = Arc::clone(&known.received);
                registry.last_serial = serial;
                return Ok((serial, received));
            }
            let received = Arc::new(AtomicU64::new(0));
            registry.known.insert(
                id,
                Known {
                    reference: reference.clone(),
                    serial,
                    account,
                    in_use: true,
                    received: Arc::clone(&received),
                },
            );
            registry.last_serial = serial;
            return Ok((serial, received));
        }
    }

    /// The groups and pairs that are on the disk and fit the id, if there is anything to go on with.
    fn resumable(&self, reference: &SegmentRef) -> Result<Option<Resumed>, PartialError> {
        let (root, id) = (self.root(), reference.id);
        let Some(claimed) = Claimed::read(root, &id)? else {
            return Ok(None);
        };
        let (map, have) = (claimed.map, claimed.have);
        let size_bytes = map.reference.size_bytes;
        let file = match root.open_file(&rel(&id, PART), OpenMode::Read) {
            Ok(file) if file.stat()?.len <= size_bytes => file,
            Ok(_) => return Ok(None),
            Err(RootError::Disk(DiskError {
                fault: DiskFault::NotFound,
                ..
            })) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut pairs = vec![None; have.len().saturating_sub(1)];
        let places = bao::pairs_above(have.len(), &|span| any(&have, span));
        for (place, pair) in places.into_iter().zip(&map.pairs) {
            if let Some(slot) = pairs.get_mut(place) {
                *slot = Some(*pair);
            }
        }
        let checked = Recheck::run(&id, size_bytes, &have, &pairs, &*file);
        let proven = checked.0.last() == Some(&true);
        if size_bytes == reference.size_bytes {
            return Ok(Some(Resumed {
                progress: checked,
                is_noted: claimed.is_noted,
            }));
        }
        if proven {
            let why = "the end of the segment has arrived and proves another size";
            return Err(PartialError::Claim { id, why });
        }
        Ok(None)
    }

    /// Reserves, and opens or creates the file.
    fn open_body(
        &self,
        reference: &SegmentRef,
        groups: usize,
        account: Charge,
        resumed: Option<Progress>,
    ) -> Result<Body, PartialError> {
        let (root, id) = (self.root(), reference.id);
        let part_allocated = allocated_by(root, &id, PART)?;
        let map_allocated = allocated_by(root, &id, MAP)?;
        // One of another length is not of this claim.
        let note_bytes = note::file_bytes(groups);
        let note = match root.stat(&rel(&id, NOTE)) {
            Ok(stat) if stat.len == note_bytes => stat.allocated_bytes,
            _ => {
                remove_note(root, &id, account)?;
                0
            }
        };
        // INV-04: the whole file, two maps (one replaces the other), the notes, and room for the
        // directories of the partials and of the segments to grow.
        let wanted = root
            .allocation_bound(reference.size_bytes)
            .saturating_sub(part_allocated)
            .saturating_add(root.allocation_bound(Map::bound(groups)).saturating_mul(2))
            .saturating_sub(map_allocated)
            .saturating_add(root.allocation_bound(note_bytes).saturating_sub(note))
            .saturating_add(root.slack().saturating_mul(2));
        let room = loop {
            match root.ledger().reserve(wanted, account) {
                Ok(room) => break room,
                Err(ceiling) => {
                    if !self.make_way(account, &ceiling)? {
                        return Err(ceiling.into());
                    }
                }
            }
        };
        remove_file(root, &rel(&id, NEW_MAP), account)?;
        let part = rel(&id, PART);
        let file = if resumed.is_some() {
            root.open_file(&part, OpenMode::ReadWrite)?
        } else {
            root.create_file(&part)?
        };
        let (have, pairs) =
            resumed.unwrap_or_else(|| (vec![false; groups], vec![None; groups.saturating_sub(1)]));
        let mut body = Body {
            file,
            have,
            pairs,
            unsynced_bytes: 0,
            unnoted_bytes: 0,
            notes: None,
            notes_written: 0,
            note_allocated: note,
            room,
            part_allocated,
            map_allocated,
        };
        let filled = body.file.allocate(reference.size_bytes);
        body.settle()?;
        if let Err(error) = filled {
            drop(body);
            remove_files(root, &id, account)?;
            return Err(error.into());
        }
        root.book_dir(DIR)?;
        Ok(body)
    }
}

#[derive(Debug)]
struct Body {
    file: Box<dyn DiskFile>,
    have: Vec<bool>,
    /// In pre-order; those that were checked.
    pairs: Vec<Option<Pair>>,
    /// Content written since the last sync.
    unsynced_bytes: u64,
    /// Content written since the last map or note.
    unnoted_bytes: u64,
    /// The file of the notes, once there is something to note.
    notes: Option<Box<dyn DiskFile>>,
    notes_written: u64,
    /// Booked for it: what is written later may take blocks that were not allocated at first.
    note_allocated: u64,
    room: Reservation,
    /// Booked for the part and for the map.
    part_allocated: u64,
    map_allocated: u64,
}

impl Body {
    /// Books what the file system has allocated to the content since.
    fn settle(&mut self) -> Result<(), DiskError> {
        let now = self.file.stat()?.allocated_bytes;
        if now > self.part_allocated {
            self.room.book(now - self.part_allocated);
            self.part_allocated = now;
        }
        if let Some(notes) = &self.notes {
            let now = notes.stat()?.allocated_bytes;
            if now > self.note_allocated {
                self.room.book(now - self.note_allocated);
                self.note_allocated = now;
            }
        }
        Ok(())
    }
}

/// A segment that is being received, held by one caller at a time and shared by its threads. Call
/// [`Partial::sync`] before letting go of it: what arrived since the last map is fetched again.
#[derive(Debug)]
pub struct Partial {
    store: Arc<Store>,
    reference: SegmentRef,
    charge: Charge,
    account: Charge,
    serial: u64,
    received: Arc<AtomicU64>,
    body: Mutex<Result<Body, PartialError>>,
}

impl Partial {
    /// What was claimed of the segment.
    #[must_use]
    pub fn reference(&self) -> &SegmentRef {
        &self.reference
    }

    fn body(&self) -> MutexGuard<'_, Result<Body, PartialError>> {
        // Whatever panicked, what the body claims was checked and written before.
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has not arrived: ascending ranges of whole groups, none of them empty. Nothing after the
    /// partial has ended.
    #[must_use]
    pub fn missing(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let body = self.body();
        let have = body.as_ref().map_or([].as_slice(), |body| &body.have);
        for (group, _) in have.iter().enumerate().filter(|(_, held)| !**held) {
            let bytes = bao::bytes_of(self.reference.size_bytes, &(group..group + 1));
            match ranges.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => ranges.push(bytes),
            }
        }
        ranges
    }

    /// Takes the slice for a range (widened to whole groups), in any order and from any thread. Each
    /// group is checked against the id before it is written; one that is there already is not written
    /// again. Whenever [`MAP_INTERVAL_BYTES`] have arrived they are made durable here, and noted every
    /// [`NOTE_INTERVAL_BYTES`].
    ///
    /// # Errors
    /// [`PartialError::Slice`] at the first group that does not fit: those before it were taken.
    /// [`PartialError::Store`] if the disk refused; the partial is broken then.
    pub fn accept(&self, range: &Range<u64>, slice: &[u8]) -> Result<Accepted, PartialError> {
        let mut accepted = Accepted::default();
        let size_bytes = self.reference.size_bytes;
        bao::decode_range(&self.reference.id, size_bytes, range, slice, |item| {
            self.with_body(|body| match item {
                Item::Pair { place, pair } => {
                    if let Some(slot) = body.pairs.get_mut(place) {
                        *slot = Some(*pair);
                    }
                    Ok(())
                }
                Item::Group { offset, bytes } => {
                    let new_bytes = self.write(body, offset, bytes)?;
                    accepted.new_bytes = accepted.new_bytes.saturating_add(new_bytes);
                    Ok(())
                }
            })
        })?;
        accepted.complete = self.with_body(|body| Ok(!body.have.contains(&false)))?;
        Ok(accepted)
    }

    /// Works on the body; after a refusal of the disk there is none any more.
    fn with_body<T>(
        &self,
        work: impl FnOnce(&mut Body) -> Result<T, PartialError>,
    ) -> Result<T, PartialError> {
        let mut guard = self.body();
        let body = guard.as_mut().map_err(|ended| ended.clone())?;
        let done = work(body);
        if let Err(error @ PartialError::Store(_)) = &done {
            let settled = body.settle();
            if let Err(error) = settled {
                tracing::warn!(%error, "cannot measure a partial");
            }
            *guard = Err(PartialError::Broken(error.to_string()));
        }
        done
    }

    fn write(&self, body: &mut Body, offset: u64, bytes: &[u8]) -> Result<u64, PartialError> {
        let group = usize::try_from(offset / bao::GROUP_BYTES).unwrap_or(usize::MAX);
        if body.have.get(group) != Some(&false) {
            return Ok(0);
        }
        let count = bytes.len() as u64;
        body.file.write_at(offset, bytes)?;
        if let Some(slot) = body.have.get_mut(group) {
            *slot = true;
        }
        self.received.fetch_add(count, Ordering::Relaxed);
        body.unsynced_bytes = body.unsynced_bytes.saturating_add(count);
        body.unnoted_bytes = body.unnoted_bytes.saturating_add(count);
        if body.unsynced_bytes >= MAP_INTERVAL_BYTES {
            self.write_map(body)?;
        } else if body.unnoted_bytes >= NOTE_INTERVAL_BYTES {
            self.write_note(body)?;
        }
        Ok(count)
    }

    /// Makes everything durable that has arrived.
    ///
    /// # Errors
    /// [`PartialError`] if the disk refused; the partial is broken then.
    pub fn sync(&self) -> Result<(), PartialError> {
        self.with_body(|body| {
            if body.unsynced_bytes == 0 {
                return Ok(());
            }
            self.write_map(body)
        })
    }

    fn map_of(&self, body: &Body) -> Result<Vec<u8>, PartialError> {
        let map = Map::new(&self.reference, self.serial, &body.have, &body.pairs);
        map.encode()
            .map_err(|fault| PartialError::Format(FormatError::Codec { part: "map", fault }))
    }

    /// Tells the kernel what is there, in the place that does not hold the note before this one: a kill
    /// in the middle of a write leaves that one.
    fn write_note(&self, body: &mut Body) -> Result<(), PartialError> {
        let (root, groups) = (self.store.root(), body.have.len());
        let bytes = note::encode(&self.map_of(body)?);
        let notes = match body.notes.take() {
            Some(notes) => notes,
            None => self.open_notes(root, body, groups)?,
        };
        let second = !body.notes_written.is_multiple_of(2);
        let offset = u64::from(second) * note::place_bytes(groups);
        let written = notes.write_at(offset, &bytes);
        body.notes = Some(notes);
        body.settle()?;
        written?;
        body.notes_written += 1;
        body.unnoted_bytes = 0;
        Ok(())
    }

    fn open_notes(
        &self,
        root: &Root,
        body: &mut Body,
        groups: usize,
    ) -> Result<Box<dyn DiskFile>, PartialError> {
        let name = rel(&self.reference.id, NOTE);
        if root.exists(&name)? {
            return Ok(root.open_file(&name, OpenMode::ReadWrite)?);
        }
        let notes = root.create_file(&name)?;
        let allocated = notes.allocate(note::file_bytes(groups));
        let now = notes.stat()?.allocated_bytes;
        body.room.book(now);
        body.note_allocated = now;
        root.book_dir(DIR)?;
        allocated?;
        Ok(notes)
    }

    /// Syncs the content, and only then replaces the map that claims it.
    fn write_map(&self, body: &mut Body) -> Result<(), PartialError> {
        let (root, id) = (self.store.root(), &self.reference.id);
        body.file.sync_data()?;
        body.settle()?;
        let bytes = self.map_of(body)?;
        let new = rel(id, NEW_MAP);
        let file = root.create_file(&new)?;
        let written = file
            .allocate(bytes.len() as u64)
            .and_then(|()| file.write_at(0, &bytes))
            .and_then(|()| file.sync_data());
        let allocated = file.stat()?.allocated_bytes;
        drop(file);
        body.room.book(allocated);
        if let Err(error) = written {
            remove_file(root, &new, self.account)?;
            return Err(error.into());
        }
        let renamed = root.rename_file(&new, &rel(id, MAP));
        // The rename may have happened although it failed; the map before it is gone then.
        let left = allocated_by(root, id, NEW_MAP)?.saturating_add(allocated_by(root, id, MAP)?);
        let booked = body.map_allocated.saturating_add(allocated);
        body.room.reclaim(booked.saturating_sub(left));
        renamed?;
        body.map_allocated = allocated;
        body.unsynced_bytes = 0;
        body.unnoted_bytes = 0;
        Ok(())
    }

    /// Verifies the whole segment and puts it into the store, durably, without writing it again.
    ///
    /// # Errors
    /// [`PartialError::Incomplete`] and [`PartialError::Damaged`] leave the partial usable. With
    /// [`PartialError::Format`], a fork, another domain or a claim that turns out wrong it is gone:
    /// no bytes of this id can ever be taken. The store's refusal otherwise leaves it for another
    /// holder.
    pub fn finish(&self) -> Result<(VerifiedSegment, PutOutcome), PartialError> {
        self.finish_with(|_| Ok(()))
    }

    /// As [`Partial::finish`], with a judgement of the verified segment before it is stored.
    ///
    /// # Errors
    /// As [`Partial::finish`], and what `judge` answers: nothing is stored then, and the partial stays
    /// as it is.
    pub fn finish_with<E: From<PartialError>>(
        &self,
        judge: impl FnOnce(&VerifiedSegment) -> Result<(), E>,
    ) -> Result<(VerifiedSegment, PutOutcome), E> {
        let mut guard = self.body();
        let body = guard
            .as_mut()
            .map_err(|ended| ended.clone())
            .map_err(E::from)?;
        let mut refused = None;
        let result = self.verify_body(body).and_then(|segment| {
            if let Err(refusal) = judge(&segment) {
                refused = Some(refusal);
                return Ok(None);
            }
            let outcome = self.store_body(body, &segment)?;
            Ok(Some((segment, outcome)))
        });
        if let Some(refusal) = refused {
            return Err(refusal);
        }
        let gone = match &result {
            Ok(_) | Err(PartialError::Format(_) | PartialError::Claim { .. }) => true,
            Err(PartialError::Store(error)) => {
                matches!(error, StoreError::Fork { .. } | StoreError::Domain(_))
            }
            Err(_) => false,
        };
        if gone {
            *guard = Err(PartialError::Ended);
            drop(guard);
            if let Err(error) = self.remove() {
                tracing::warn!(%error, "cannot remove what is left of a partial");
            }
        } else if let Err(error @ PartialError::Store(_)) = &result {
            *guard = Err(PartialError::Broken(error.to_string()));
        }
        // None stands for the refusal above only.
        result?.ok_or_else(|| PartialError::Ended.into())
    }

    fn verify_body(&self, body: &mut Body) -> Result<VerifiedSegment, PartialError> {
        let (id, size_bytes) = (self.reference.id, self.reference.size_bytes);
        let missing_bytes = size_bytes.saturating_sub(received_bytes(size_bytes, &body.have));
        if missing_bytes > 0 {
            return Err(PartialError::Incomplete { missing_bytes });
        }
        body.file.sync_data()?;
        body.settle()?;
        let mut bytes = vec![0; usize::try_from(size_bytes).unwrap_or(0)];
        let verified = match body.file.read_at(0, &mut bytes) {
            Ok(()) => verify_segment(bytes, Some(id), self.store.domain()),
            Err(error) if error.fault == DiskFault::Short || error.op == DiskOp::Read => {
                return self.drop_damaged(body);
            }
            Err(error) => return Err(error.into()),
        };
        let segment = match verified {
            Err(FormatError::WrongId { .. }) => return self.drop_damaged(body),
            other => other?,
        };
        if segment.reference() != self.reference {
            let why = "its header says something else";
            return Err(PartialError::Claim { id, why });
        }
        Ok(segment)
    }

    fn store_body(
        &self,
        body: &Body,
        segment: &VerifiedSegment,
    ) -> Result<PutOutcome, PartialError> {
        let id = self.reference.id;
        let (root, own, bytes) = (self.store.root(), self.account, body.part_allocated);
        let outcome = self.store.put_with(
            segment,
            self.charge,
            |path, account| Ok(((path.to_owned(), account), bytes)),
            |(path, account)| {
                root.rename_file(&rel(&id, PART), &path)?;
                if !same_account(own, account) {
                    root.ledger().freed(bytes, own);
                    root.ledger().found(bytes, account);
                }
                Ok(bytes)
            },
        )?;
        Ok(outcome)
    }

    fn drop_damaged<T>(&self, body: &mut Body) -> Result<T, PartialError> {
        let (id, size_bytes) = (self.reference.id, self.reference.size_bytes);
        let before = received_bytes(size_bytes, &body.have);
        let (good, good_pairs) =
            Recheck::run(&id, size_bytes, &body.have, &body.pairs, &*body.file);
        body.have = good;
        body.pairs = good_pairs;
        let after = received_bytes(size_bytes, &body.have);
        self.received.store(after, Ordering::Relaxed);
        self.write_map(body)?;
        let bytes = before.saturating_sub(after);
        Err(PartialError::Damaged { id, bytes })
    }

    /// Gives the partial up and removes its files.
    ///
    /// # Errors
    /// [`PartialError`] if the disk refuses; what is left is removed at the next start.
    pub fn abandon(&self) -> Result<(), PartialError> {
        let mut guard = self.body();
        if let Ok(body) = guard.as_mut() {
            body.settle()?;
        }
        *guard = Err(PartialError::Ended);
        drop(guard);
        self.remove()
    }

    fn remove(&self) -> Result<(), PartialError> {
        let id = &self.reference.id;
        remove_files(self.store.root(), id, self.account)?;
        release(&self.store, id, self.serial);
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let body = std::mem::replace(
            self.body.get_mut().unwrap_or_else(PoisonError::into_inner),
            Err(PartialError::Ended),
        );
        if let Ok(mut body) = body
            && let Err(error) = body.settle()
        {
            tracing::warn!(%error, "cannot measure a partial");
        }
        release(&self.store, &self.reference.id, self.serial);
    }
}
