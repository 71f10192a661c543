//! The log without its thread: commit, seal, rotate, evict, recover. Every method is one step under
//! the caller's lock and does its own I/O; nothing here waits for another thread.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::event::Event;
use super::state::{LogState, Marker, STATE_PATH, SealedEnd};
use super::{
    AppendError, Appended, Done, EndorseError, LogConfig, LogError, RecordClass, Recovery,
};
use crate::body::BodyError;
use crate::checkpoint::{self, Checkpoint};
use crate::disk::{DiskError, DiskFault, DiskFile, OpenMode};
use crate::format::{self, SegmentHeader, SegmentRef, verify_segment};
use crate::id::{Kind, NodeId, Origin, SegmentId};
use crate::keys::{Endorsement, LogKey, LogPublicKey};
use crate::ledger::{Charge, Ladder, Reservation};
use crate::limits::{
    LOG_HEADER_BYTES, MAX_BATCH_BYTES, MAX_LOG_FILE_BYTES, MAX_RECORD_BYTES, MIN_LOG_FILE_BYTES,
};
use crate::merkle::{Frontier, leaf_hash};
use crate::record::{
    self, Frame, FrameWriter, LogHeader, MARK_BYTES, Mark, Scan, frame_bytes, read_frame,
};
use crate::root::{Root, RootError, Staged};
use crate::store::{Store, StoreError};

const KEY_PATH: &str = "keys/log.pk8";
/// Most segments named in one eviction record.
const MAX_EVICTED_AT_ONCE: usize = 64;
/// Most custodians named for each of them. 64 segments with 8 names of 63 bytes stay below 64 KiB.
const MAX_CUSTODIANS_NAMED: usize = 8;
/// Most eviction records that wait in the state file before eviction pauses.
const MAX_EVICTIONS_OWED: usize = 8;
/// Most lifecycle records that wait for room.
const MAX_OWED: usize = 64;

/// A record on its way.
pub(super) struct Pending {
    pub(super) class: RecordClass,
    pub(super) bytes: Vec<u8>,
    pub(super) done: Done,
}

/// A record whose fate is known; the caller tells after giving the lock back.
pub(super) struct Settled {
    done: Done,
    result: Result<Appended, AppendError>,
}

impl Settled {
    pub(super) fn tell(self) {
        (self.done)(self.result);
    }
}

/// A zero-filled, synced file, waiting to become the active one, and the room to seal it.
#[derive(Debug)]
pub(super) struct Prepared {
    staged: Staged,
    seal_room: Reservation,
    file_bytes: u64,
}

/// The file that records go to.
struct Active {
    file: Box<dyn DiskFile>,
    path: String,
    header: LogHeader,
    salt: u32,
    /// Offset of the next frame; everything below is durable.
    end: u64,
    /// `length | bytes` of every record below `end`.
    records: Vec<u8>,
    count: u32,
    /// Whether decisions may use it, or only state records that dip into the reserve.
    normal: bool,
    seal_room: Option<Reservation>,
}

impl Active {
    fn fits(&self, length: usize) -> bool {
        let need = (MARK_BYTES + frame_bytes(length)) as u64;
        self.end.saturating_add(need) <= self.header.file_bytes
    }
}

/// Counts of what was refused at capacity, for one summary when there is room again.
#[derive(Debug, Clone, Copy, Default)]
struct Refused {
    decisions: u64,
    denials: u64,
    first_unix_ms: u64,
    last_unix_ms: u64,
}

/// What other threads may read without waiting for I/O.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) origin: Origin,
    pub(super) incarnation: u64,
    pub(super) endorsement: Arc<Endorsement>,
    pub(super) head: Checkpoint,
    /// `None` until the commit thread has signed it.
    pub(super) head_signature: Option<[u8; 64]>,
    pub(super) sealed_records: u64,
    pub(super) next_sequence: u64,
    pub(super) min_index: u64,
    pub(super) active_bytes: u64,
    pub(super) batches: u64,
    pub(super) starved: bool,
    pub(super) refused_at_capacity: u64,
    pub(super) latched: Option<String>,
}

pub(super) struct Core {
    root: Arc<Root>,
    store: Arc<Store>,
    config: LogConfig,
    key: Arc<LogKey>,
    state: LogState,
    endorsement: Arc<Endorsement>,
    /// The tree over everything that is durable.
    tree: Frontier,
    /// The head of that tree.
    head: Checkpoint,
    head_signature: Option<[u8; 64]>,
    active: Option<Active>,
    prepared: Option<Prepared>,
    latched: Option<String>,
    owed: VecDeque<Vec<u8>>,
    refused: Refused,
    refused_total: u64,
    /// Room was refused, and nothing has changed since that would give any.
    starved: bool,
    batches: u64,
    sealed_events: Vec<SegmentRef>,
    /// Files whose segment is stored and that could not be removed.
    leftover: Vec<String>,
    buffer: Vec<u8>,
}

fn active_path(incarnation: u64, sequence: u64) -> String {
    format!("log/{incarnation}-{sequence}.log")
}

fn parse_active_name(name: &str) -> Option<(u64, u64)> {
    let (incarnation, sequence) = name.strip_suffix(".log")?.split_once('-')?;
    Some((incarnation.parse().ok()?, sequence.parse().ok()?))
}

fn load_key(root: &Arc<Root>) -> Result<LogKey, LogError> {
    if let Some(der) = root.read(KEY_PATH)? {
        let mode = root.stat(KEY_PATH)?.mode;
        if mode & 0o077 != 0 {
            return Err(LogError::KeyMode(mode));
        }
        return Ok(LogKey::from_pkcs8(&zeroize::Zeroizing::new(der))?);
    }
    let key = LogKey::generate()?;
    root.write_atomic(KEY_PATH, &key.to_pkcs8()?, Charge::Reserve)?;
    Ok(key)
}

impl Core {
    pub(super) fn open(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Self, Recovery), LogError> {
        if !(MIN_LOG_FILE_BYTES..=MAX_LOG_FILE_BYTES).contains(&config.segment_bytes) {
            return Err(LogError::Config(
                "segment_bytes must lie between 128 KiB and 16 MiB",
            ));
        }
        if config.domain != *store.domain() {
            return Err(LogError::Config(
                "log and store must belong to the same domain",
            ));
        }
        root.ensure_dir("keys")?;
        root.ensure_dir("log")?;
        store.set_own_node(&config.node_id);
        let key = Arc::new(load_key(&root)?);
        let here = Marker::new(
            root.disk().boot_id().map_err(RootError::Disk)?,
            &root.marker(),
        );
        let mut recovery = Recovery::default();

        // Which incarnation. Ruling 8: decided before the first signature.
        let stored = root.read(STATE_PATH)?;
        let known = stored.as_deref().and_then(LogState::decode);
        let highest = store
            .own_audit(&config.node_id)
            .iter()
            .filter_map(|reference| reference.origin.audit_parts().map(|parts| parts.2))
            .chain(
                active_files(&root)?
                    .iter()
                    .map(|(incarnation, _, _)| *incarnation),
            )
            .chain(known.iter().map(|state| state.incarnation))
            .max()
            .unwrap_or(0);
        let reason = match &known {
            None if stored.is_some() => Some("the state file was damaged"),
            None if highest > 0 => Some("the state file was missing"),
            None => Some("first start"),
            Some(state) if state.node_id != config.node_id => Some("another node id"),
            Some(state)
                if Origin::audit(&config.node_id, &key.public(), state.incarnation)
                    != state.origin =>
            {
                Some("another log key")
            }
            Some(state) if !state.marker.same_place(&here) => {
                Some("the root was moved, copied or restored")
            }
            Some(_) => None,
        };
        let previous = known.as_ref().map(|state| state.origin.clone());
        let mut scanned = None;
        let mut damage = None;
        if let (None, Some(state)) = (reason, &known) {
            match recover_active(&root, &store, &config, state) {
                Ok(found) => scanned = Some(found),
                Err(Recover::Damaged(why)) => damage = Some(why),
                Err(Recover::Log(error)) => return Err(error),
            }
        }
        let reason = damage.clone().or_else(|| reason.map(str::to_owned));
        let state = match (reason.as_ref(), known) {
            (None, Some(mut state)) => {
                state.marker = here;
                state
            }
            (_, known) => {
                let incarnation = highest.saturating_add(1);
                LogState {
                    node_id: config.node_id.clone(),
                    origin: Origin::audit(&config.node_id, &key.public(), incarnation),
                    incarnation,
                    marker: here,
                    sealed: SealedEnd::start(),
                    owed: known
                        .as_ref()
                        .map(|state| state.owed.clone())
                        .unwrap_or_default(),
                    cursors: known.map(|state| state.cursors).unwrap_or_default(),
                }
            }
        };
        let endorsement = endorse(&key.public(), state.incarnation)
            .map_err(|e| LogError::Endorse(e.to_string()))?;
        check_endorsement(&endorsement, &state, &key.public())?;
        let origin_line = checkpoint::origin_line(&config.domain, &state.origin)
            .ok_or(LogError::Config("the log's origin is no audit origin"))?;

        if reason.is_some() {
            // Acknowledged records of the old incarnation that were never sealed cannot be signed any
            // more. They are kept, not deleted.
            for (incarnation, sequence, rel) in active_files(&root)? {
                let sealed = store.own_audit(&config.node_id).iter().any(|r| {
                    r.sequence == sequence
                        && r.origin.audit_parts().is_some_and(|p| p.2 == incarnation)
                });
                if sealed {
                    root.remove(&rel)?;
                } else {
                    recovery
                        .quarantined
                        .push(root.move_to_quarantine(&rel, Charge::Normal)?);
                }
            }
            if stored.is_some() && previous.is_none() {
                recovery
                    .quarantined
                    .push(root.move_to_quarantine(STATE_PATH, Charge::Normal)?);
            }
        }
        let mut core = Self {
            tree: Frontier::new(),
            head_signature: None,
            active: None,
            prepared: None,
            latched: None,
            owed: VecDeque::new(),
            refused: Refused::default(),
            refused_total: 0,
            starved: false,
            batches: 0,
            sealed_events: Vec::new(),
            leftover: Vec::new(),
            buffer: Vec::new(),
            head: Checkpoint {
                origin_line,
                size: 0,
                root: Frontier::new().root(),
            },
            root,
            store,
            config,
            key,
            state,
            endorsement: Arc::new(endorsement),
        };
        match core.write_state() {
            // Starting above the ceiling is allowed (ruling 23); the marker is then updated later.
            Err(LogError::Root(RootError::Ceiling(_))) if reason.is_none() => {}
            other => other?,
        }
        if let Some(found) = scanned {
            core.resume(found, &mut recovery)?;
        }
        core.note_head();
        if let Some(reason) = reason {
            if reason != "first start" {
                recovery.new_incarnation = Some(reason.clone());
            }
            let event = Event::Incarnation {
                incarnation: core.state.incarnation,
                previous_origin: previous.as_ref(),
                quarantined: &recovery.quarantined,
                reason: &reason,
                r#type: "incarnation",
                unix_ms: core.now(),
            };
            core.owe(event.bytes());
        }
        if recovery.truncated_bytes > 0 {
            let event = Event::Recovered {
                records: core.tree.size(),
                truncated_at_index: core.tree.size(),
                truncated_bytes: recovery.truncated_bytes,
                truncated_records_estimate: recovery.truncated_records_estimate,
                r#type: "recovered",
                unix_ms: core.now(),
            };
            core.owe(event.bytes());
        }
        core.drop_evicted()?;
        core.owe_again()?;
        core.pay_owed();
        if let Some(reason) = core.latched.clone() {
            return Err(LogError::Latched(reason));
        }
        recovery.records = core.tree.size();
        Ok((core, recovery))
    }

    /// Takes over what recovery found and puts the active file into a state that is safe to go on from.
    fn resume(&mut self, found: Recovered, recovery: &mut Recovery) -> Result<(), LogError> {
        self.tree = found
            .sealed
            .tree()
            .map_err(|_| LogError::Config("the state file is wrong"))?;
        self.state.sealed = found.sealed;
        let Some((path, header, scan, file)) = found.active else {
            return Ok(());
        };
        recovery.truncated_bytes = scan.torn_bytes;
        recovery.truncated_records_estimate = scan.torn_records;
        // The whole file is written again and synced before anything in it counts. Whoever ran before
        // may have had a failed sync: then the cache shows bytes that the device never got.
        let mut bytes = file;
        let end = bytes.len().min(scan.end);
        if let Some(tail) = bytes.get_mut(end..) {
            tail.fill(0);
        }
        let torn = usize::try_from(scan.torn_bytes).unwrap_or(0);
        let handle = self.root.open_file(&path, OpenMode::ReadWrite)?;
        let write = bytes
            .get(..(end + torn).min(bytes.len()))
            .unwrap_or_default();
        handle.write_at(0, write).map_err(RootError::Disk)?;
        handle.sync_data().map_err(RootError::Disk)?;
        let bound = self.seal_bound(header.file_bytes);
        let ledger = self.root.ledger();
        let (seal_room, normal) = match ledger.reserve(bound, Charge::Normal) {
            Ok(room) => (Some(room), true),
            Err(_) => (ledger.reserve(bound, Charge::Reserve).ok(), false),
        };
        self.tree = scan.tree;
        self.active = Some(Active {
            salt: header.salt(),
            file: handle,
            path,
            header,
            end: scan.end as u64,
            records: scan.records,
            count: scan.count,
            normal,
            seal_room,
        });
        Ok(())
    }

    /// Removes what the cursor says is evicted: a crash may have come between the two.
    fn drop_evicted(&mut self) -> Result<(), LogError> {
        for reference in self.store.own_audit(&self.config.node_id) {
            let (_, min_sequence) = self.state.cursor(&reference.origin);
            if reference.sequence < min_sequence {
                self.store.remove(&reference.id)?;
            }
        }
        Ok(())
    }

    /// Eviction records of before the crash that did not reach the log.
    fn owe_again(&mut self) -> Result<(), LogError> {
        if self.state.owed.is_empty() {
            return Ok(());
        }
        // They were written right after the eviction, so they stand near the end or nowhere.
        let mut recent = self
            .active
            .as_ref()
            .map(|a| a.records.clone())
            .unwrap_or_default();
        if let Some(last) = self.state.sealed.next_sequence.checked_sub(1)
            && let Some(reference) = self.store.find(&self.state.origin, last)
        {
            let segment = self.store.get(&reference.id)?;
            // What cannot be read cannot be searched: then the record stands in the log twice.
            let keys = self.config.seal.decryption.as_deref();
            for (_, record) in record::read_records_with(&segment, keys).unwrap_or_default() {
                record::push_record(&mut recent, &record);
            }
        }
        for record in std::mem::take(&mut self.state.owed) {
            if !record::iter_records(&recent).any(|held| held == record) {
                self.state.owed.push(record.clone());
                self.owe(record);
            }
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        (self.config.clock)()
    }

    fn write_state(&self) -> Result<(), LogError> {
        let bytes = self
            .state
            .encode()
            .map_err(|_| LogError::Config("the state is too large"))?;
        Ok(self
            .root
            .write_atomic(STATE_PATH, &bytes, Charge::Reserve)?)
    }

    fn owe(&mut self, record: Vec<u8>) {
        if self.owed.len() >= MAX_OWED {
            // The refusals since are in the counts of the summary; the oldest facts matter most.
            tracing::warn!("a lifecycle record had to be dropped while the log was full");
            return;
        }
        self.owed.push_back(record);
    }

    /// Something more is durable: there is a new head, and no signature for it yet.
    fn note_head(&mut self) {
        self.head.size = self.tree.size();
        self.head.root = self.tree.root();
        self.head_signature = None;
    }

    /// The signature of the head: once a batch, never before the batch is durable, and after its
    /// callers were told, so that none of them waits for it.
    pub(super) fn sign_head(&mut self) -> [u8; 64] {
        match self.head_signature {
            Some(signature) => signature,
            None => {
                let signature = self.key.sign(self.head.text().as_bytes());
                self.head_signature = Some(signature);
                signature
            }
        }
    }

    pub(super) fn view(&self) -> View {
        let mut view = View {
            origin: self.state.origin.clone(),
            incarnation: self.state.incarnation,
            endorsement: Arc::clone(&self.endorsement),
            head: self.head.clone(),
            head_signature: self.head_signature,
            sealed_records: 0,
            next_sequence: 0,
            min_index: 0,
            active_bytes: 0,
            batches: 0,
            starved: false,
            refused_at_capacity: 0,
            latched: None,
        };
        self.refresh(&mut view);
        view
    }

    /// Brings a view up to date; called once a batch, so it copies no text that cannot have changed.
    pub(super) fn refresh(&self, view: &mut View) {
        if !Arc::ptr_eq(&view.endorsement, &self.endorsement) {
            view.endorsement = Arc::clone(&self.endorsement);
        }
        view.head.size = self.head.size;
        view.head.root = self.head.root;
        view.head_signature = self.head_signature;
        view.sealed_records = self.state.sealed.size;
        view.next_sequence = self.state.sealed.next_sequence;
        view.min_index = self.state.cursor(&self.state.origin).0;
        view.active_bytes = self.active.as_ref().map_or(0, |active| active.end);
        view.batches = self.batches;
        view.starved = self.starved;
        view.refused_at_capacity = self.refused_total;
        if view.latched != self.latched {
            view.latched.clone_from(&self.latched);
        }
    }

    pub(super) fn head(&self) -> &Checkpoint {
        &self.head
    }

    pub(super) fn key(&self) -> &Arc<LogKey> {
        &self.key
    }

    pub(super) fn take_sealed_events(&mut self) -> Vec<SegmentRef> {
        std::mem::take(&mut self.sealed_events)
    }

    pub(super) fn set_endorsement(&mut self, endorsement: Endorsement) -> Result<(), LogError> {
        check_endorsement(&endorsement, &self.state, &self.key.public())?;
        self.endorsement = Arc::new(endorsement);
        Ok(())
    }

    // ---- room ---------------------------------------------------------------------------------

    fn seal_bound(&self, file_bytes: u64) -> u64 {
        self.root
            .stage_bound(file_bytes.saturating_add(record::seal_overhead_bytes(file_bytes)))
    }

    fn file_need(&self, file_bytes: u64) -> u64 {
        self.root
            .stage_bound(file_bytes)
            .saturating_add(self.seal_bound(file_bytes))
    }

    /// Makes sure that the front record has a place: an active file that fits it and that its class
    /// may use.
    fn ensure_active(&mut self, class: RecordClass, length: usize) -> Result<(), AppendError> {
        if let Some(reason) = &self.latched {
            return Err(AppendError::Unavailable(reason.clone()));
        }
        if self
            .active
            .as_ref()
            .is_some_and(|active| !active.fits(length))
        {
            self.seal_inner().map_err(|error| self.fault(error))?;
        }
        let state = class == RecordClass::State;
        if let Some(active) = &mut self.active {
            if active.normal || state {
                return Ok(());
            }
            // It was made from the reserve; once there is room again, decisions may use it too.
            if self.root.ledger().room(Charge::Normal) > 0 {
                active.normal = true;
                self.found_room();
                return Ok(());
            }
            self.starve()?;
            return self.ensure_active(class, length);
        }
        match self.new_active(Charge::Normal) {
            Ok(()) => {
                self.found_room();
                return Ok(());
            }
            Err(LogError::Root(RootError::Ceiling(_))) => {}
            Err(error) => return Err(self.fault(error)),
        }
        if state {
            return match self.new_active(Charge::Reserve) {
                Ok(()) => Ok(()),
                Err(LogError::Root(RootError::Ceiling(_))) => Err(AppendError::Capacity),
                Err(error) => Err(self.fault(error)),
            };
        }
        self.starve()?;
        self.ensure_active(class, length)
    }

    /// Decisions have room again: what was refused meanwhile is summarised.
    fn found_room(&mut self) {
        self.starved = false;
        self.summarise_refused();
    }

    /// No room: evicts what is licensed, once until something changes. `Ok` means that something was
    /// freed.
    fn starve(&mut self) -> Result<(), AppendError> {
        if self.starved {
            return Err(AppendError::Capacity);
        }
        self.starved = true;
        self.prepared = None;
        match self.evict() {
            Ok(true) => {
                self.starved = false;
                Ok(())
            }
            Ok(false) => Err(AppendError::Capacity),
            Err(error) => Err(self.fault(error)),
        }
    }

    /// Turns a failure into the caller's answer, and latches if what is on the device is unknown.
    fn fault(&mut self, error: LogError) -> AppendError {
        let full = match &error {
            LogError::Root(RootError::Ceiling(_)) | LogError::Store(StoreError::Ceiling(_)) => {
                return AppendError::Capacity;
            }
            LogError::Store(StoreError::FileSystemFull) => true,
            LogError::Root(error) => error.is_file_system_full(),
            _ => false,
        };
        if full {
            return AppendError::Unavailable(
                "the file system is full below the ceiling".to_owned(),
            );
        }
        let reason = error.to_string();
        self.latch(reason.clone());
        AppendError::Unavailable(reason)
    }

    fn latch(&mut self, reason: String) {
        tracing::error!(
            reason,
            "the audit log is latched; nothing is recorded until it is reopened"
        );
        self.latched.get_or_insert(reason);
    }

    /// Zero-fills and syncs a file for the time when the active one is full. Runs beside the commit
    /// thread; `None` if there is not plenty of room.
    pub(super) fn plan_preparation(&self) -> Option<u64> {
        let wanted = self.latched.is_none()
            && self.prepared.is_none()
            && !self.starved
            && self
                .active
                .as_ref()
                .is_some_and(|active| active.end > active.header.file_bytes / 2);
        let bytes = self.config.segment_bytes;
        let room = self.root.ledger().room(Charge::Normal);
        (wanted && room / 3 >= self.file_need(bytes)).then_some(bytes)
    }

    pub(super) fn prepare(root: &Arc<Root>, file_bytes: u64) -> Result<Prepared, LogError> {
        let bound =
            root.stage_bound(file_bytes.saturating_add(record::seal_overhead_bytes(file_bytes)));
        let seal_room = root
            .ledger()
            .reserve(bound, Charge::Normal)
            .map_err(RootError::from)?;
        // The name is given when it is used.
        let mut staged = root.stage("log/next.log", file_bytes, Charge::Normal)?;
        staged.fill_zeros()?;
        Ok(Prepared {
            staged,
            seal_room,
            file_bytes,
        })
    }

    pub(super) fn keep_prepared(&mut self, prepared: Prepared) {
        if !self.starved && self.latched.is_none() {
            self.prepared = Some(prepared);
        }
    }

    /// Makes the next active file: the prepared one, or a new one as large as the room allows.
    fn new_active(&mut self, charge: Charge) -> Result<(), LogError> {
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => {
                let mut bytes = match charge {
                    Charge::Reserve => MIN_LOG_FILE_BYTES,
                    Charge::Normal | Charge::Custody => self.config.segment_bytes,
                };
                // Room first, then I/O: at capacity this is asked for every append.
                let room = self.root.ledger().room(charge);
                while bytes > MIN_LOG_FILE_BYTES && self.file_need(bytes) > room {
                    bytes = (bytes / 2).max(MIN_LOG_FILE_BYTES).next_multiple_of(4096);
                }
                let ledger = self.root.ledger();
                let seal_room = ledger
                    .reserve(self.seal_bound(bytes), charge)
                    .map_err(RootError::from)?;
                let mut staged = self.root.stage("log/next.log", bytes, charge)?;
                staged.fill_zeros()?;
                Prepared {
                    staged,
                    seal_room,
                    file_bytes: bytes,
                }
            }
        };
        let Prepared {
            mut staged,
            seal_room,
            file_bytes,
        } = prepared;
        let sealed = &self.state.sealed;
        let header = LogHeader {
            domain: self.config.domain.clone(),
            origin: self.state.origin.clone(),
            log_key: self.key.public(),
            sequence: sealed.next_sequence,
            prev: sealed.prev,
            first_index: self.tree.size(),
            frontier: self
                .tree
                .hashes()
                .iter()
                .map(|hash| *hash.as_bytes())
                .collect(),
            file_bytes,
            created_unix_ms: self.now(),
        };
        let block = header
            .encode()
            .map_err(|_| LogError::Config("the file header is too large"))?;
        staged.overwrite(0, &block)?;
        let path = active_path(self.state.incarnation, header.sequence);
        staged.rename(path.clone());
        let published = staged.publish()?;
        self.active = Some(Active {
            salt: header.salt(),
            file: published.file,
            path,
            header,
            end: LOG_HEADER_BYTES,
            records: Vec::new(),
            count: 0,
            normal: charge == Charge::Normal,
            seal_room: Some(seal_room),
        });
        Ok(())
    }

    // ---- commit -------------------------------------------------------------------------------

    /// Commits a front part of the queue with one write and one sync, and tells the fate of each of
    /// its records. What is left goes with the next call.
    pub(super) fn commit(&mut self, queue: &mut VecDeque<Pending>) -> Vec<Settled> {
        let mut settled = Vec::new();
        if self.latched.is_none() && !self.owed.is_empty() {
            self.pay_owed();
        }
        while let Some(front) = queue.front() {
            let (class, length) = (front.class, front.bytes.len());
            match self.ensure_active(class, length) {
                Ok(()) => break,
                Err(error) => {
                    if error == AppendError::Capacity {
                        self.count_refused(class);
                    }
                    if let Some(Pending { done, .. }) = queue.pop_front() {
                        settled.push(Settled {
                            done,
                            result: Err(error),
                        });
                    }
                }
            }
        }
        let mut batch = Vec::new();
        let mut room = self.batch_room();
        while let Some(front) = queue.front() {
            let bytes = frame_bytes(front.bytes.len());
            let admitted = self
                .active
                .as_ref()
                .is_some_and(|active| active.normal || front.class == RecordClass::State);
            if !admitted || bytes > room {
                break;
            }
            room -= bytes;
            batch.extend(queue.pop_front());
        }
        if batch.is_empty() {
            return settled;
        }
        let records: Vec<&[u8]> = batch
            .iter()
            .map(|pending| pending.bytes.as_slice())
            .collect();
        match self.write_batch(&records) {
            Ok(appended) => {
                for (pending, appended) in batch.into_iter().zip(appended) {
                    settled.push(Settled {
                        done: pending.done,
                        result: Ok(appended),
                    });
                }
            }
            Err(error) => {
                let reason = error.to_string();
                self.latch(reason.clone());
                for Pending { done, .. } in batch {
                    let result = Err(AppendError::Unavailable(reason.clone()));
                    settled.push(Settled { done, result });
                }
            }
        }
        settled
    }

    /// Bytes of record frames that one more batch may hold.
    fn batch_room(&self) -> usize {
        let Some(active) = &self.active else { return 0 };
        let left = active.header.file_bytes.saturating_sub(active.end);
        usize::try_from(left)
            .unwrap_or(0)
            .min(MAX_BATCH_BYTES)
            .saturating_sub(MARK_BYTES)
    }

    fn count_refused(&mut self, class: RecordClass) {
        if class == RecordClass::State {
            return;
        }
        let now = self.now();
        self.refused_total = self.refused_total.saturating_add(1);
        let refused = &mut self.refused;
        if refused.decisions == 0 && refused.denials == 0 {
            refused.first_unix_ms = now;
        }
        refused.last_unix_ms = now;
        let count = match class {
            RecordClass::Decision => &mut refused.decisions,
            RecordClass::Denial | RecordClass::State => &mut refused.denials,
        };
        *count = count.saturating_add(1);
    }

    /// One write, one sync. Nothing in `self` changes unless both succeed.
    fn write_batch(&mut self, records: &[&[u8]]) -> Result<Vec<Appended>, LogError> {
        let signature = self.sign_head();
        let Some(active) = &mut self.active else {
            return Err(LogError::Config("no active file"));
        };
        self.buffer.clear();
        let mut writer = FrameWriter {
            salt: active.salt,
            base: active.end,
            out: &mut self.buffer,
        };
        // The mark first: it attests what is durable below it, and carries its signed head.
        writer.mark(&Mark {
            size: self.head.size,
            root: self.head.root,
            signature,
        });
        let mut tree = self.tree.clone();
        let mut appended = Vec::with_capacity(records.len());
        for record in records {
            let leaf = leaf_hash(record);
            appended.push(Appended {
                index: tree.size(),
                leaf,
            });
            tree.append(leaf);
            writer.record(record);
        }
        check_twice(&self.buffer, active.salt, active.end, &appended)?;
        active
            .file
            .write_at(active.end, &self.buffer)
            .map_err(RootError::Disk)?;
        active.file.sync_data().map_err(RootError::Disk)?;
        // Durable from here on.
        active.end = active.end.saturating_add(self.buffer.len() as u64);
        for record in records {
            record::push_record(&mut active.records, record);
        }
        active.count = active
            .count
            .saturating_add(u32::try_from(records.len()).unwrap_or(0));
        self.tree = tree;
        self.batches = self.batches.saturating_add(1);
        self.note_head();
        Ok(appended)
    }

    /// Writes the lifecycle records that wait, as far as there is room, and the summary of what was
    /// refused once decisions find room again.
    fn pay_owed(&mut self) {
        while let Some(record) = self.owed.front().cloned() {
            if record.len() > MAX_RECORD_BYTES {
                self.owed.pop_front();
                continue;
            }
            if self
                .ensure_active(RecordClass::State, record.len())
                .is_err()
            {
                return;
            }
            if let Err(error) = self.write_batch(&[&record]) {
                self.latch(error.to_string());
                return;
            }
            self.owed.pop_front();
            self.state.owed.retain(|owed| *owed != record);
        }
    }

    fn summarise_refused(&mut self) {
        let Refused {
            decisions,
            denials,
            first_unix_ms,
            last_unix_ms,
        } = self.refused;
        if decisions == 0 && denials == 0 {
            return;
        }
        let event = Event::Refused {
            decisions,
            denials,
            first_unix_ms,
            last_unix_ms,
            r#type: "refused_at_capacity",
            unix_ms: self.now(),
        };
        if self.owed.len() < MAX_OWED {
            self.owe(event.bytes());
            self.refused = Refused::default();
        }
    }

    // ---- seal ---------------------------------------------------------------------------------

    /// Seals the active file if it holds records.
    pub(super) fn seal(&mut self) -> Result<Option<SegmentRef>, LogError> {
        if let Some(reason) = &self.latched {
            return Err(LogError::Latched(reason.clone()));
        }
        match self.seal_inner() {
            Ok(sealed) => Ok(sealed),
            Err(error) => {
                let copy = error.clone();
                self.fault(error);
                Err(copy)
            }
        }
    }

    fn seal_inner(&mut self) -> Result<Option<SegmentRef>, LogError> {
        let signature = self.sign_head();
        let Some(active) = &mut self.active else {
            return Ok(None);
        };
        if active.count == 0 {
            return Ok(None);
        }
        let room = match active.seal_room.take() {
            Some(room) => room,
            None => {
                // Sealing ends with less on the disk than it began with, so it may use the reserve.
                let raw = active.records.len() as u64;
                let bound = self
                    .root
                    .stage_bound(raw.saturating_add(record::seal_overhead_bytes(raw)));
                self.root
                    .ledger()
                    .reserve(bound, Charge::Reserve)
                    .map_err(RootError::from)?
            }
        };
        let before = active.header.tree().map_err(|_| LogError::Memory)?;
        // Computed again from the bytes that go into the segment: a flipped bit in memory must never
        // be signed.
        let mut again = before.clone();
        for record in record::iter_records(&active.records) {
            again.append(leaf_hash(record));
        }
        if again != self.tree {
            return Err(LogError::Memory);
        }
        let note = self.head.with_signature(&self.key.public(), &signature);
        let body = record::build_body(
            &before,
            &again,
            active.count,
            &note,
            &active.records,
            &self.config.seal,
        )?;
        let header = SegmentHeader {
            kind: Kind::Audit,
            domain: self.config.domain.clone(),
            origin: self.state.origin.clone(),
            sequence: active.header.sequence,
            prev: active.header.prev,
            created_unix_ms: (self.config.clock)(),
        };
        let bytes = format::seal_signed(&header, &body, &self.key, &self.endorsement)?;
        drop(body);
        let segment = verify_segment(bytes, None, &self.config.domain)?;
        let reference = segment.reference();
        self.store.put_reserved(&segment, room)?;
        self.sealed_as(&reference);
        Ok(Some(reference))
    }

    /// The active file's segment is durable, so the file has served. It is closed before it is
    /// removed, that its bytes are free at once.
    fn sealed_as(&mut self, reference: &SegmentRef) {
        self.state.sealed = SealedEnd {
            next_sequence: reference.sequence.saturating_add(1),
            prev: Some(reference.id),
            size: self.tree.size(),
            frontier: self
                .tree
                .hashes()
                .iter()
                .map(|hash| *hash.as_bytes())
                .collect(),
        };
        self.sealed_events.push(reference.clone());
        if let Some(Active { file, path, .. }) = self.active.take() {
            drop(file);
            self.leftover.push(path);
        }
        self.remove_leftover();
    }

    /// A file that cannot be removed now is tried again at the next tick; a restart removes it too.
    fn remove_leftover(&mut self) {
        let root = &self.root;
        self.leftover.retain(|path| match root.remove(path) {
            Ok(())
            | Err(RootError::Disk(DiskError {
                fault: DiskFault::NotFound,
                ..
            })) => false,
            Err(error) => {
                tracing::warn!(%error, "cannot remove a sealed log file");
                true
            }
        });
    }

    /// What time and room ask for: seal by age, evict, write what is owed.
    pub(super) fn tick(&mut self, now_unix_ms: u64) {
        if self.latched.is_some() {
            return;
        }
        if let Some(active) = &self.active {
            let gone = match active.file.stat() {
                Ok(stat) => stat.nlink == 0,
                Err(_) => true,
            };
            if gone {
                self.latch("the active log file was removed from outside".to_owned());
                return;
            }
            let age = now_unix_ms.saturating_sub(active.header.created_unix_ms);
            if active.count > 0
                && age >= self.config.segment_max_age_ms
                && let Err(error) = self.seal()
            {
                tracing::warn!(%error, "cannot seal by age");
            }
        }
        self.remove_leftover();
        self.reclaim();
    }

    // ---- eviction -----------------------------------------------------------------------------

    /// Something may have changed: licences, the ceiling. Evicts what the ladder asks for and licences
    /// allow, opens the log for decisions again if there is room, and writes what is owed.
    pub(super) fn reclaim(&mut self) {
        if self.latched.is_some() {
            return;
        }
        if let Err(error) = self.evict() {
            tracing::warn!(%error, "cannot evict");
            self.fault(error);
            return;
        }
        if self.starved {
            self.starved = false;
            // If there is room, the records that are owed go into a file that decisions may use.
            let _ = self.ensure_active(RecordClass::Decision, 1);
        }
        self.pay_owed();
    }

    /// Evicts the oldest licensed own segments while the ladder or an append asks for room. Tells
    /// whether anything was freed.
    fn evict(&mut self) -> Result<bool, LogError> {
        let mut freed = false;
        loop {
            let ladder = self.root.ledger().ladder();
            let need = self.file_need(MIN_LOG_FILE_BYTES);
            let short = self.starved && self.root.ledger().room(Charge::Normal) < need;
            let paused = self.state.owed.len() >= MAX_EVICTIONS_OWED;
            if paused || (ladder < Ladder::Reclaim && !short) {
                return Ok(freed);
            }
            let batch = self.licensed_prefix();
            let Some((first, _)) = batch.first() else {
                return Ok(freed);
            };
            let origin = first.origin.clone();
            self.evict_batch(&origin, batch)?;
            freed = true;
        }
    }

    /// The oldest own segments of one incarnation, in order, as long as each is licensed: at most a
    /// quarter of what is there, so that eviction stops soon after there is room.
    fn licensed_prefix(&self) -> Vec<(SegmentRef, Vec<NodeId>)> {
        let own = self.store.own_audit(&self.config.node_id);
        let Some(origin) = own.first().map(|reference| reference.origin.clone()) else {
            return Vec::new();
        };
        let most = (own.len() / 4).clamp(1, MAX_EVICTED_AT_ONCE);
        let now = self.now();
        own.into_iter()
            .take_while(|reference| reference.origin == origin)
            .take(most)
            .map_while(|reference| {
                let custodians = self.license(&reference.id, now)?;
                Some((reference, custodians))
            })
            .collect()
    }

    /// The distinct custodians whose receipts license the eviction of a segment, if they are enough
    /// and the retention has passed.
    pub(super) fn license(&self, id: &SegmentId, now_unix_ms: u64) -> Option<Vec<NodeId>> {
        license(&self.store, &self.config, id, now_unix_ms)
    }

    fn evict_batch(
        &mut self,
        origin: &Origin,
        batch: Vec<(SegmentRef, Vec<NodeId>)>,
    ) -> Result<(), LogError> {
        let spans: Vec<_> = batch
            .iter()
            .filter_map(|(r, _)| self.store.audit_span(&r.id))
            .collect();
        let (Some(first), Some(last), Some((newest, _))) =
            (spans.first(), spans.last(), batch.last())
        else {
            return Ok(());
        };
        let event = Event::Evicted {
            custodians: batch
                .iter()
                .map(|(_, all)| all.iter().take(MAX_CUSTODIANS_NAMED).cloned().collect())
                .collect(),
            first: first.first,
            last: last.last,
            origin,
            segments: batch.iter().map(|(reference, _)| reference.id).collect(),
            r#type: "evicted",
            unix_ms: self.now(),
        };
        let record = event.bytes();
        // Cursor first, then unlink: a crash between the two is finished at the next start.
        self.state.advance(
            origin,
            last.last.saturating_add(1),
            newest.sequence.saturating_add(1),
        );
        // The record of it is persisted too, until it stands in the log: a deletion is never silent.
        self.state.owed.push(record.clone());
        self.write_state()?;
        for (reference, _) in &batch {
            self.store.remove(&reference.id)?;
        }
        tracing::info!(%origin, first = first.first, last = last.last, "evicted audit segments");
        self.owe(record);
        Ok(())
    }

    // ---- fail-stop ----------------------------------------------------------------------------

    /// Takes a latched log into use again. The old file is never synced again as if it were safe: what
    /// was acknowledged is sealed from memory into a segment elsewhere, in room that was reserved for
    /// it, and a new file is opened.
    pub(super) fn reopen(&mut self) -> Result<(), LogError> {
        if self.store.latched().is_some() {
            self.store.reopen()?;
        }
        let Some(reason) = self.latched.clone() else {
            return Ok(());
        };
        if let Some(active) = &self.active {
            let stored = self
                .store
                .find(&active.header.origin, active.header.sequence);
            match stored {
                // Only the naming of the segment had failed, and it turned out to be there.
                Some(reference) => {
                    let span = self.store.audit_span(&reference.id);
                    let same = span.is_some_and(|span| {
                        span.root == self.head.root
                            && span.last.checked_add(1) == Some(self.head.size)
                    });
                    if !same {
                        return Err(LogError::Memory);
                    }
                    self.sealed_as(&reference);
                }
                None if active.count > 0 => {
                    self.seal_inner()?;
                }
                None => {
                    if let Some(Active { path, file, .. }) = self.active.take() {
                        drop(file);
                        self.leftover.push(path);
                    }
                    self.remove_leftover();
                    if !self.leftover.is_empty() {
                        return Err(LogError::Latched(reason));
                    }
                }
            }
        }
        self.latched = None;
        self.starved = false;
        let event = Event::Reopened {
            reason: &reason,
            r#type: "reopened",
            unix_ms: self.now(),
        };
        let record = event.bytes();
        self.owe(record);
        self.pay_owed();
        match &self.latched {
            Some(reason) => Err(LogError::Latched(reason.clone())),
            None => Ok(()),
        }
    }

    /// A last mark, so that the records of the last batch are attested on disk too. Not needed for
    /// anything acknowledged: a torn tail after a clean end would then show as damage.
    pub(super) fn close(&mut self) {
        self.prepared = None;
        if self.latched.is_some() {
            return;
        }
        self.pay_owed();
        let fits = self
            .active
            .as_ref()
            .is_some_and(|a| a.count > 0 && a.end + MARK_BYTES as u64 <= a.header.file_bytes);
        if fits && let Err(error) = self.write_batch(&[]) {
            self.latch(error.to_string());
        }
    }

    /// The last `count` records, oldest first: from memory, then from sealed segments.
    pub(super) fn tail(&self, count: usize) -> Result<Vec<(u64, Vec<u8>)>, LogError> {
        let mut out: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        if let Some(active) = &self.active {
            let all = usize::try_from(active.count).unwrap_or(usize::MAX);
            let indexed = (active.header.first_index..).zip(record::iter_records(&active.records));
            out.extend(
                indexed
                    .skip(all.saturating_sub(count))
                    .map(|(index, r)| (index, r.to_vec())),
            );
        }
        let mut sequence = self.state.sealed.next_sequence;
        while out.len() < count && sequence > 0 {
            sequence -= 1;
            let Some(reference) = self.store.find(&self.state.origin, sequence) else {
                break;
            };
            let segment = self.store.get(&reference.id)?;
            let keys = self.config.seal.decryption.as_deref();
            let records = match record::read_records_with(&segment, keys) {
                // Sealed for others to read: what is in memory is all there is to show.
                Err(BodyError::Encrypted | BodyError::Crypt(_)) => break,
                records => records?,
            };
            for record in records.into_iter().rev().take(count - out.len()) {
                out.push_front(record);
            }
        }
        Ok(out.into())
    }
}

/// The distinct custodians whose receipts license the eviction of an own segment.
pub(super) fn license(
    store: &Store,
    config: &LogConfig,
    id: &SegmentId,
    now_unix_ms: u64,
) -> Option<Vec<NodeId>> {
    // Nothing is evicted without a licence, so "none required" licenses nothing.
    let required = config.custody_required.max(1);
    let reference = store.reference(id)?;
    if config.custody_required == 0
        || reference.origin.audit_node() != Some(config.node_id.as_str())
        || store.custodians(id).len() < required
        || store
            .created_unix_ms(id)?
            .saturating_add(config.min_retention_ms)
            > now_unix_ms
    {
        return None;
    }
    // Read from disk and verified again: what licenses a deletion is evidence, not an index.
    let custodians: BTreeSet<NodeId> = store
        .receipts(id)
        .into_iter()
        .map(|receipt| receipt.custodian)
        .filter(|custodian| *custodian != config.node_id)
        .collect();
    (custodians.len() >= required).then(|| custodians.into_iter().collect())
}

/// Every leaf hash is computed a second time, from the bytes that go to the disk: a flipped bit in
/// memory must not become a signed head.
fn check_twice(buffer: &[u8], salt: u32, base: u64, expected: &[Appended]) -> Result<(), LogError> {
    let mut expected = expected.iter();
    let mut at = 0;
    while at < buffer.len() {
        let (frame, next) = read_frame(buffer, salt, base, at).ok_or(LogError::Memory)?;
        if let Frame::Record(record) = frame
            && expected
                .next()
                .is_none_or(|appended| appended.leaf != leaf_hash(record))
        {
            return Err(LogError::Memory);
        }
        at = next;
    }
    if expected.next().is_some() {
        Err(LogError::Memory)
    } else {
        Ok(())
    }
}

fn check_endorsement(
    endorsement: &Endorsement,
    state: &LogState,
    key: &LogPublicKey,
) -> Result<(), LogError> {
    let fits = endorsement.node_id == state.node_id
        && endorsement.log_key == *key
        && endorsement.incarnation == state.incarnation
        && endorsement.encode().is_ok();
    if fits {
        Ok(())
    } else {
        Err(LogError::Endorsement)
    }
}

/// The active files that lie in the root, by incarnation and sequence.
fn active_files(root: &Root) -> Result<Vec<(u64, u64, String)>, LogError> {
    let mut files: Vec<(u64, u64, String)> = root
        .list("log")?
        .into_iter()
        .filter_map(|name| {
            let (incarnation, sequence) = parse_active_name(&name)?;
            Some((incarnation, sequence, active_path(incarnation, sequence)))
        })
        .collect();
    files.sort();
    Ok(files)
}

/// What recovery found of the current incarnation.
struct Recovered {
    sealed: SealedEnd,
    active: Option<(String, LogHeader, Scan, Vec<u8>)>,
}

enum Recover {
    /// Acknowledged data is damaged: a new incarnation follows.
    Damaged(String),
    /// The disk or the root refused.
    Log(LogError),
}

impl<E: Into<LogError>> From<E> for Recover {
    fn from(error: E) -> Self {
        Self::Log(error.into())
    }
}

/// Reads the active file and finds out where the log stands. Removes files whose segment is stored.
fn recover_active(
    root: &Arc<Root>,
    store: &Store,
    config: &LogConfig,
    state: &LogState,
) -> Result<Recovered, Recover> {
    let damaged = |why: String| Recover::Damaged(why);
    let newest = store
        .own_audit(&config.node_id)
        .into_iter()
        .rfind(|reference| reference.origin == state.origin);
    let stored_next = newest.as_ref().map_or(0, |r| r.sequence.saturating_add(1));
    let mut open = Vec::new();
    for (incarnation, sequence, rel) in active_files(root)? {
        if incarnation != state.incarnation {
            continue;
        }
        if sequence < stored_next.max(state.sealed.next_sequence) {
            // Sealed; the crash came before its removal.
            root.remove(&rel)?;
        } else {
            open.push((sequence, rel));
        }
    }
    let Some((sequence, rel)) = open.pop() else {
        return Ok(Recovered {
            sealed: sealed_end(store, state, newest)?,
            active: None,
        });
    };
    if !open.is_empty() {
        return Err(damaged("more than one log file is open".to_owned()));
    }
    let bytes = root.read(&rel)?.unwrap_or_default();
    let header = LogHeader::decode(&bytes).map_err(|e| damaged(format!("{rel}: {e}")))?;
    let follows = match &newest {
        Some(newest) if stored_next == sequence => {
            let span = store.audit_span(&newest.id);
            header.prev == Some(newest.id)
                && span.is_some_and(|span| span.last.checked_add(1) == Some(header.first_index))
        }
        // Evicted or lost; the marks inside still tie the file to its own past.
        _ => (sequence == 0) == (header.prev.is_none() && header.first_index == 0),
    };
    let belongs = header.domain == config.domain
        && header.origin == state.origin
        && header.sequence == sequence;
    if !follows || !belongs {
        return Err(damaged(format!(
            "{rel} does not continue the last sealed segment"
        )));
    }
    let line = checkpoint::origin_line(&config.domain, &state.origin).unwrap_or_default();
    let scan = record::scan(&bytes, &header, &line).map_err(|e| damaged(format!("{rel}: {e}")))?;
    let sealed = SealedEnd {
        next_sequence: header.sequence,
        prev: header.prev,
        size: header.first_index,
        frontier: header.frontier.clone(),
    };
    Ok(Recovered {
        sealed,
        active: Some((rel, header, scan, bytes)),
    })
}

/// Where the sealed part ends, when there is no active file to tell it.
fn sealed_end(
    store: &Store,
    state: &LogState,
    newest: Option<SegmentRef>,
) -> Result<SealedEnd, Recover> {
    let Some(newest) = newest.filter(|r| r.sequence >= state.sealed.next_sequence) else {
        return Ok(state.sealed.clone());
    };
    let segment = match store.get(&newest.id) {
        Err(StoreError::Damaged { reason, .. }) => {
            return Err(Recover::Damaged(format!(
                "the newest sealed segment is damaged: {reason}"
            )));
        }
        other => other?,
    };
    let header = segment.header();
    let key = segment.endorsement().map(|endorsement| endorsement.log_key);
    let tree = record::parse_body(segment.body(), &header.domain, &header.origin)
        .and_then(|body| match body.frontier_after() {
            // Signed with the segment, and it leads to the root in the checkpoint.
            Some(after) => Ok(after.clone()),
            None => body.check_tree(&key.unwrap_or(LogPublicKey::from_bytes([0; 32])), None),
        })
        .map_err(|e| Recover::Damaged(format!("the newest sealed segment is wrong: {e}")))?;
    Ok(SealedEnd {
        next_sequence: newest.sequence.saturating_add(1),
        prev: Some(newest.id),
        size: tree.size(),
        frontier: tree.hashes().iter().map(|hash| *hash.as_bytes()).collect(),
    })
}
