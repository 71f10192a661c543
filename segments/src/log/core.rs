//! The log without its threads: commit, rotate, evict, fail-stop. Every method is one step under the
//! caller's lock. A commit does its own I/O; sealing, making files ready and evicting are planned here
//! and done by `seal.rs` beside it.

use std::collections::{BTreeSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use super::event::{Event, INCARNATION};
use super::file::{AlignedBuffer, LiveFile, read_device};
use super::recover::{self, Aside, Lineage, Recover, Recovered};
use super::refusals::{Refusals, Refused};
use super::seal::{Eviction, Full, Recycled, SealJob, Snapshot, Spare, SparePlan, StateFile};
use super::state::{Contradicted, Cursor, LogState, Marker, STATE_PATH, SealedEnd, given_up_below};
use super::{
    AppendError, Appended, EndorseError, LogConfig, LogError, Pending, RecordClass, Recovery,
    Settled,
};
use crate::body::{self, BodyError, seal_overhead_bytes};
use crate::checkpoint::{self, Checkpoint};
use crate::disk::{DiskError, DiskFault};
use crate::format::SegmentRef;
use crate::frame::{
    BATCH_ALIGN, BatchWriter, Frame, LogHeader, MARK_BYTES, Mark, batch_bytes, derive_salt,
    frame_bytes, read_frame, scan,
};
use crate::id::{NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::{Endorsement, LogKey, LogPublicKey};
use crate::ledger::{Charge, Ladder, Reservation};
use crate::limits::{
    LOG_HEADER_BYTES, MAX_BATCH_BYTES, MAX_LOG_FILE_BYTES, MAX_RECEIPT_BYTES, MAX_RECORD_BYTES,
    MAX_UNSEALED_FILES, MAX_UNSIGNED_BATCHES, MIN_LOG_FILE_BYTES,
};
use crate::merkle::{Frontier, leaf_hash};
use crate::root::{Root, RootError};
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
/// Why an incarnation ended that a peer knows more of (ruling 8).
const SUPERSEDED: &str = "a peer holds a later head of this log";

/// The file that records go to.
struct Active {
    path: String,
    header: LogHeader,
    /// `None` once a write or sync failed.
    file: Option<LiveFile>,
    /// The header block, until the first batch takes it along.
    block: Option<Vec<u8>>,
    /// Offset of the next batch; everything below is durable.
    end: u64,
    /// `length | bytes` of every record below `end`.
    records: Vec<u8>,
    count: u32,
    /// Whether decisions may use it, or only state records that dip into the reserve.
    normal: bool,
    seal_room: Option<Reservation>,
}

impl Active {
    /// Bytes of mark and frames that one more batch may have.
    fn room(&self) -> usize {
        let left = self.header.file_bytes.saturating_sub(self.end);
        let left = usize::try_from(left).unwrap_or(0);
        // A batch ends with its sector.
        (left - left % BATCH_ALIGN).min(MAX_BATCH_BYTES)
    }

    fn fits(&self, length: usize) -> bool {
        batch_bytes(std::iter::once(length)) <= self.room()
    }
}

/// A full file that waits for its seal.
struct Waiting {
    full: Arc<Full>,
    room: Option<Reservation>,
}

/// A file whose segment is stored; it goes once the state says so too.
pub(super) struct Served {
    pub(super) path: String,
    pub(super) file_bytes: u64,
    pub(super) sound: bool,
}

/// The newest head that was signed.
#[derive(Debug, Clone)]
pub(super) struct Signed {
    /// Of which incarnation.
    pub(super) incarnation: u64,
    pub(super) size: u64,
    pub(super) signature: [u8; 64],
    /// After which batch.
    pub(super) batch: u64,
}

/// What other threads may read without waiting for I/O.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) origin: Origin,
    pub(super) incarnation: u64,
    pub(super) endorsement: Arc<Endorsement>,
    pub(super) head: Checkpoint,
    pub(super) sealed_records: u64,
    pub(super) next_sequence: u64,
    pub(super) min_index: u64,
    pub(super) active_bytes: u64,
    pub(super) unsealed_files: usize,
    pub(super) batches: u64,
    pub(super) starved: bool,
    pub(super) refused_at_capacity: u64,
    pub(super) latched: Option<String>,
    pub(super) superseded: bool,
    /// Where the eviction of each log stands.
    pub(super) cursors: Arc<Vec<Cursor>>,
    state_version: u64,
}

/// Where a sealed segment of this node's own logs belongs that a peer holds and the store does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OwnPlace {
    /// It was evicted.
    Evicted,
    /// It is part of what this node knows that it has signed: damage took it.
    Known,
    /// It is of what this root has forgotten.
    Later {
        /// Of the log that is being written, and not an older one.
        running: bool,
    },
}

/// What the caller of a commit has to do before it calls again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: the front of the queue was dealt with.
    Go,
    /// Wait until a file is sealed or the next one is ready.
    AwaitSeal,
    /// Evict, without the core's lock.
    MakeRoom,
}

/// Why a record has no place now.
enum Block {
    Refuse(AppendError),
    AwaitSeal,
    MakeRoom,
}

/// Why no file was begun.
enum NoFile {
    NotReady,
    Log(LogError),
}

pub(super) struct Core {
    root: Arc<Root>,
    store: Arc<Store>,
    config: LogConfig,
    key: Arc<LogKey>,
    state: LogState,
    /// Counts the changes of `state`.
    state_version: u64,
    state_file: Arc<StateFile>,
    endorsement: Arc<Endorsement>,
    /// The tree over everything that is durable.
    tree: Frontier,
    /// The head of that tree.
    head: Checkpoint,
    signed: Arc<Mutex<Signed>>,
    active: Option<Active>,
    full: VecDeque<Waiting>,
    spare: Option<Spare>,
    /// A spare is being made, under the name of the file after the active one.
    spare_pending: bool,
    pool: Option<Recycled>,
    served: Vec<Served>,
    latched: Option<String>,
    /// Sealing found no room; it is tried again at the next tick.
    stuck: Option<AppendError>,
    owed: VecDeque<Vec<u8>>,
    refused: Refused,
    refused_total: u64,
    refusals: Refusals,
    /// Decisions found room since something was refused.
    summary_due: bool,
    /// Room was refused, and nothing has changed since that would give any.
    /// A cursor says evicted, and the removal was not finished.
    unfinished: bool,
    starved: bool,
    batches: u64,
    sealed_events: Vec<SegmentRef>,
    /// Segments of this incarnation that were set aside for those that a peer holds in their places.
    aside: Aside,
    /// The change to the next incarnation broke off half done; only a restart completes it.
    half_over: bool,
    /// Files of no use that could not be removed.
    leftover: Vec<String>,
    buffer: AlignedBuffer,
    /// Memory of a file that was sealed, for the next.
    spare_records: Vec<u8>,
}

pub(super) fn active_path(incarnation: u64, sequence: u64) -> String {
    format!("log/{incarnation}-{sequence}.log")
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
        let highest = recover::highest_incarnation(&root, &store, &config, known.as_ref())?;
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
            Some(state) if state.superseded => Some(SUPERSEDED),
            Some(state) if !state.marker.same_place(&here) => {
                Some("the root was moved, copied or restored")
            }
            Some(_) => None,
        };
        let mut found = None;
        let mut damage = None;
        if let (None, Some(state)) = (reason, &known) {
            match recover::recover(&root, &store, &config, &key, state) {
                Ok(recovered) => found = Some(recovered),
                Err(Recover::Damaged(why)) => damage = Some(why),
                Err(Recover::Log(error)) => return Err(error),
            }
        }
        let reason = damage.or_else(|| reason.map(str::to_owned));
        let state_damaged = stored.is_some() && known.is_none();
        let mut lineage = None;
        let mut aside = Aside::default();
        if let Some(contradicted) = known.as_ref().and_then(|state| state.contradicted) {
            finish_contradicted(&store, &contradicted, &mut aside)?;
        }
        let mut state = match (reason.as_ref(), known) {
            (None, Some(mut state)) => {
                state.marker = here;
                state
            }
            (_, known) => {
                let found = recover::lineage(&root, &store, &config, known.as_ref())?;
                let state = next_state(&config, &key, here, &found, known.as_ref());
                lineage = Some(found);
                state
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
            recover::set_aside(&root, &store, &mut aside)?;
            if state_damaged {
                aside.push(root.move_to_quarantine(STATE_PATH, Charge::Normal)?);
            }
        }
        if let (Some(reason), Some(lineage)) = (&reason, &lineage) {
            // Before all else that is owed: it is the first record, also after a crash.
            let now = (config.clock)();
            let first = first_record(lineage, &aside, reason, now);
            state.owed.insert(0, first);
        }
        recovery.quarantined = aside.paths;
        recovery.quarantined_more = aside.more;
        let (refusals, refused) = Refusals::open(&root)?;
        let head = Checkpoint {
            origin_line,
            size: 0,
            root: Frontier::new().root(),
        };
        let mut core = Self {
            tree: Frontier::new(),
            signed: Arc::new(Mutex::new(Signed {
                incarnation: state.incarnation,
                size: 0,
                signature: key.sign(head.text().as_bytes()),
                batch: 0,
            })),
            active: None,
            full: VecDeque::new(),
            spare: None,
            spare_pending: false,
            pool: None,
            served: Vec::new(),
            latched: None,
            stuck: None,
            owed: VecDeque::new(),
            refused,
            refused_total: 0,
            refusals,
            summary_due: false,
            unfinished: false,
            starved: false,
            batches: 0,
            sealed_events: Vec::new(),
            aside: Aside::default(),
            half_over: false,
            leftover: Vec::new(),
            buffer: AlignedBuffer::new(),
            spare_records: Vec::new(),
            head,
            state_file: Arc::new(StateFile::new(Arc::clone(&root))),
            state_version: 1,
            root,
            store,
            config,
            key,
            state,
            endorsement: Arc::new(endorsement),
        };
        let mut unsealed = Vec::new();
        if let Some(found) = found {
            unsealed = core.resume(found, &mut recovery)?;
        }
        core.state_version = core.state_version.saturating_add(1);
        match core.state_file.write(&core.snapshot()) {
            // Starting above the ceiling is allowed (ruling 23); the marker is then updated later.
            Err(LogError::Root(RootError::Ceiling(_))) if reason.is_none() => {}
            other => {
                other?;
                core.drop_served();
            }
        }
        core.note_head();
        core.sign_head();
        recovery.new_incarnation = reason.filter(|reason| reason != "first start");
        core.drop_evicted()?;
        // First: the first record of the incarnation may be among them.
        core.owe_again(&unsealed);
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
        core.pay_owed();
        if let Some(reason) = core.latched.clone() {
            return Err(LogError::Latched(reason));
        }
        recovery.records = core.tree.size();
        Ok((core, recovery))
    }

    /// Takes over what recovery found. Gives the records of every file that the stored state does not
    /// know as sealed.
    fn resume(
        &mut self,
        found: Recovered,
        recovery: &mut Recovery,
    ) -> Result<Vec<Vec<u8>>, LogError> {
        self.tree = found
            .sealed
            .tree()
            .map_err(|_| LogError::Config("the state file is wrong"))?;
        self.state.sealed = found.sealed;
        recovery.truncated_bytes = found.torn_bytes;
        recovery.truncated_records_estimate = found.torn_records;
        let mut unsealed = found.stored_records;
        // Stored already; they go when the state that says so is durable.
        self.served.extend(found.stored);
        for path in found.prepared {
            self.root.remove(&path)?;
        }
        let last = found.open.len();
        for (number, open) in found.open.into_iter().enumerate() {
            recover::rewrite(&self.root, &open)?;
            unsealed.push(open.scan.records.clone());
            self.tree = open.scan.tree;
            let seal_bound = self.seal_bound(open.header.file_bytes);
            let ledger = self.root.ledger();
            let (seal_room, normal) = match ledger.reserve(seal_bound, Charge::Normal) {
                Ok(room) => (Some(room), true),
                Err(_) => (ledger.reserve(seal_bound, Charge::Reserve).ok(), false),
            };
            self.active = Some(Active {
                file: Some(LiveFile::open(&self.root, &open.path)?),
                path: open.path,
                block: None,
                end: open.scan.end as u64,
                records: open.scan.records,
                count: open.scan.count,
                normal,
                seal_room,
                header: open.header,
            });
            self.note_head();
            let version_1 = self
                .active
                .as_ref()
                .is_some_and(|active| active.header.version_1);
            // One of the version before is sealed and not continued.
            if number + 1 < last || version_1 {
                self.rotate(true);
            }
        }
        Ok(unsealed)
    }

    /// Removes what the cursor says is evicted: a crash may have come between the two.
    fn drop_evicted(&mut self) -> Result<(), LogError> {
        for origin in self.store.own_logs(&self.config.node_id) {
            let (_, min_sequence) = self.state.cursor(&origin);
            while let Some(first) = self.store.first(&origin)
                && first.sequence < min_sequence
            {
                self.store.remove(&first.id)?;
            }
        }
        self.unfinished = false;
        Ok(())
    }

    /// Finishes the removal that an error cut off. Tells whether there was one.
    pub(super) fn finish_evictions(&mut self) -> Result<bool, LogError> {
        if !self.unfinished || self.latched.is_some() {
            return Ok(false);
        }
        match self.drop_evicted() {
            Ok(()) => Ok(true),
            Err(error) => {
                self.fault(error.clone());
                Err(error)
            }
        }
    }

    /// Eviction records of before the crash that did not reach the log, and counts that no summary has
    /// told of yet. What was paid stands in a file that the stored state does not know as sealed, for
    /// the state is stored, without what is paid, before such a file goes.
    fn owe_again(&mut self, unsealed: &[Vec<u8>]) {
        let held = |wanted: &dyn Fn(&[u8]) -> bool| {
            unsealed
                .iter()
                .any(|records| body::iter_records(records).any(wanted))
        };
        for record in std::mem::take(&mut self.state.owed) {
            if !held(&|other| other == record) {
                self.state.owed.push(record.clone());
                self.owe(record);
            }
        }
        let window = self.refused.window;
        if !self.refused.is_empty() && held(&|record| is_summary(record, window)) {
            self.refused = self.refused.next_window();
        }
        self.refused_total = self.refused.decisions.saturating_add(self.refused.denials);
        // Else it is due once decisions find room.
        let room = self.active.as_ref().is_some_and(|active| active.normal);
        self.summary_due = room && !self.refused.is_empty();
    }

    fn now(&self) -> u64 {
        (self.config.clock)()
    }

    pub(super) fn state_file(&self) -> &Arc<StateFile> {
        &self.state_file
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            version: self.state_version,
            state: self.state.clone(),
        }
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
    }

    /// The signature of the head: never before its batch is durable, and after its callers were told,
    /// so that none of them waits for it.
    pub(super) fn sign_head(&mut self) -> [u8; 64] {
        // Whole at any time.
        let mut signed = self.signed.lock().unwrap_or_else(PoisonError::into_inner);
        if signed.size != self.head.size {
            signed.signature = self.key.sign(self.head.text().as_bytes());
            signed.size = self.head.size;
        }
        signed.batch = self.batches;
        signed.signature
    }

    fn newest_signed(&self) -> Signed {
        self.signed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn signed(&self) -> &Arc<Mutex<Signed>> {
        &self.signed
    }

    pub(super) fn view(&self) -> View {
        let mut view = View {
            origin: self.state.origin.clone(),
            incarnation: self.state.incarnation,
            endorsement: Arc::clone(&self.endorsement),
            head: self.head.clone(),
            sealed_records: 0,
            next_sequence: 0,
            min_index: 0,
            active_bytes: 0,
            unsealed_files: 0,
            batches: 0,
            starved: false,
            refused_at_capacity: 0,
            latched: None,
            superseded: false,
            cursors: Arc::default(),
            state_version: 0,
        };
        self.refresh(&mut view);
        view
    }

    /// Brings a view up to date; called once a batch, so it copies no text that cannot have changed.
    pub(super) fn refresh(&self, view: &mut View) {
        if !Arc::ptr_eq(&view.endorsement, &self.endorsement) {
            view.endorsement = Arc::clone(&self.endorsement);
        }
        if view.incarnation != self.state.incarnation {
            view.incarnation = self.state.incarnation;
            view.origin.clone_from(&self.state.origin);
            view.head.origin_line.clone_from(&self.head.origin_line);
        }
        if view.state_version != self.state_version {
            view.state_version = self.state_version;
            view.superseded = self.state.superseded;
            view.cursors = Arc::new(self.state.cursors.clone());
        }
        view.head.size = self.head.size;
        view.head.root = self.head.root;
        view.sealed_records = self.state.sealed.size;
        view.next_sequence = self.state.sealed.next_sequence;
        view.min_index = self.state.cursor(&self.state.origin).0;
        view.active_bytes = self.active.as_ref().map_or(0, |active| active.end);
        view.unsealed_files = self.full.len() + usize::from(self.active.is_some());
        view.batches = self.batches;
        view.starved = self.starved;
        view.refused_at_capacity = self.refused_total;
        if view.latched != self.latched {
            view.latched.clone_from(&self.latched);
        }
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
            .stage_bound(file_bytes.saturating_add(seal_overhead_bytes(file_bytes)))
    }

    fn file_need(&self, file_bytes: u64) -> u64 {
        self.root
            .stage_bound(file_bytes)
            .saturating_add(self.seal_bound(file_bytes))
    }

    fn has_room_for_a_file(&self) -> bool {
        self.root.ledger().room(Charge::Normal) >= self.file_need(MIN_LOG_FILE_BYTES)
    }

    /// Makes sure that the front record has a place: an active file that fits it and that its class
    /// may use.
    fn ensure_active(&mut self, class: RecordClass, length: usize) -> Result<(), Block> {
        if let Some(reason) = &self.latched {
            return Err(Block::Refuse(AppendError::Unavailable(reason.clone())));
        }
        if self
            .active
            .as_ref()
            .is_some_and(|active| !active.fits(length))
        {
            self.rotate(true);
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
            return Err(self.starve());
        }
        if self.full.len() + 1 >= MAX_UNSEALED_FILES {
            return Err(match &self.stuck {
                Some(error) => Block::Refuse(error.clone()),
                None => Block::AwaitSeal,
            });
        }
        match self.begin(Charge::Normal) {
            Ok(()) => {
                self.found_room();
                return Ok(());
            }
            Err(NoFile::NotReady) => return Err(Block::AwaitSeal),
            Err(NoFile::Log(LogError::Root(RootError::Ceiling(_)))) => {}
            Err(NoFile::Log(error)) => return Err(Block::Refuse(self.fault(error))),
        }
        if !self.full.is_empty() && self.stuck.is_none() {
            // What is being sealed gives its room back.
            return Err(Block::AwaitSeal);
        }
        if state {
            // The last of the reserve is for what frees room: a receipt, and the state of the log. Used
            // up by records, no licence could be taken, and nothing would ever be evicted.
            let mending = self
                .root
                .stage_bound(MAX_RECEIPT_BYTES as u64)
                .saturating_mul(2);
            let need = self.file_need(MIN_LOG_FILE_BYTES).saturating_add(mending);
            if self.root.ledger().room(Charge::Reserve) < need {
                return Err(Block::Refuse(AppendError::Capacity));
            }
            return match self.begin(Charge::Reserve) {
                Ok(()) => Ok(()),
                Err(NoFile::NotReady) => Err(Block::AwaitSeal),
                Err(NoFile::Log(LogError::Root(RootError::Ceiling(_)))) => {
                    Err(Block::Refuse(AppendError::Capacity))
                }
                Err(NoFile::Log(error)) => Err(Block::Refuse(self.fault(error))),
            };
        }
        Err(self.starve())
    }

    /// Decisions have room again: what was refused meanwhile is summarised.
    fn found_room(&mut self) {
        self.starved = false;
        self.summary_due = !self.refused.is_empty();
    }

    /// No room: what is licensed is evicted, once until something changes.
    fn starve(&mut self) -> Block {
        if self.starved && !self.has_room_for_a_file() {
            return Block::Refuse(AppendError::Capacity);
        }
        self.starved = true;
        self.pool = None;
        self.drop_spare();
        Block::MakeRoom
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

    fn next_file_sequence(&self) -> u64 {
        match (&self.active, self.full.back()) {
            (Some(active), _) => active.header.sequence.saturating_add(1),
            (None, Some(waiting)) => waiting.full.header.sequence.saturating_add(1),
            (None, None) => self.state.sealed.next_sequence,
        }
    }

    /// The active file takes no more records: it waits for its seal, and the next one is begun when a
    /// record needs it.
    fn rotate(&mut self, sound: bool) {
        let Some(active) = self.active.take() else {
            return;
        };
        if active.count == 0 {
            self.leftover.push(active.path);
            return;
        }
        self.full.push_back(Waiting {
            full: Arc::new(Full {
                sound: sound && active.file.is_some(),
                path: active.path,
                header: active.header,
                records: active.records,
                count: active.count,
                tree: self.tree.clone(),
                head: self.head.clone(),
            }),
            room: active.seal_room,
        });
    }

    /// Takes the next file into use: the spare, or one that is made now, as large as the room allows.
    /// Nothing is written for that; the header goes with the first batch.
    fn begin(&mut self, charge: Charge) -> Result<(), NoFile> {
        if self.spare_pending {
            return Err(NoFile::NotReady);
        }
        let sequence = self.next_file_sequence();
        let ready = match self.spare.take() {
            Some(spare) if spare.sequence == sequence => Some(spare),
            Some(other) => {
                self.leftover.push(other.path);
                None
            }
            None => None,
        };
        let spare = match ready {
            Some(spare) => spare,
            None => self.make_spare(sequence, charge).map_err(NoFile::Log)?,
        };
        let header = LogHeader {
            domain: self.config.domain.clone(),
            origin: self.state.origin.clone(),
            log_key: self.key.public(),
            sequence,
            first_index: self.tree.size(),
            frontier: self
                .tree
                .hashes()
                .iter()
                .map(|hash| *hash.as_bytes())
                .collect(),
            file_bytes: spare.file_bytes,
            created_unix_ms: self.now(),
            salt: derive_salt(&self.key, &self.state.origin, sequence),
            stale: spare.stale,
            version_1: false,
        };
        let block = header
            .encode()
            .map_err(|_| NoFile::Log(LogError::Config("the file header is too large")))?;
        let mut records = std::mem::take(&mut self.spare_records);
        records.clear();
        records.reserve_exact(usize::try_from(spare.file_bytes).unwrap_or(0));
        self.active = Some(Active {
            path: spare.path,
            header,
            file: Some(spare.file),
            block: Some(block),
            end: LOG_HEADER_BYTES,
            records,
            count: 0,
            normal: charge == Charge::Normal,
            seal_room: Some(spare.seal_room),
        });
        Ok(())
    }

    /// The name of a file that is made now; what had it before is replaced.
    fn take_name(&mut self, sequence: u64) -> String {
        let path = active_path(self.state.incarnation, sequence);
        self.leftover.retain(|other| *other != path);
        path
    }

    fn make_spare(&mut self, sequence: u64, charge: Charge) -> Result<Spare, LogError> {
        let path = self.take_name(sequence);
        let plan = |from: Option<Recycled>, file_bytes| SparePlan {
            sequence,
            path: path.clone(),
            from,
            file_bytes,
            charge,
        };
        if let Some(recycled) = self.pool.take() {
            let bytes = recycled.file_bytes;
            match plan(Some(recycled), bytes).run(&self.root) {
                Err(LogError::Root(RootError::Ceiling(_))) => {}
                other => return other,
            }
        }
        let mut bytes = match charge {
            Charge::Reserve => MIN_LOG_FILE_BYTES,
            Charge::Normal | Charge::Custody => self.config.segment_bytes,
        };
        let room = self.root.ledger().room(charge);
        while bytes > MIN_LOG_FILE_BYTES && self.file_need(bytes) > room {
            bytes = (bytes / 2).max(MIN_LOG_FILE_BYTES).next_multiple_of(4096);
        }
        plan(None, bytes).run(&self.root)
    }

    /// Whether there is something to do beside the commits.
    pub(super) fn has_work(&self) -> bool {
        self.latched.is_none()
            && ((!self.full.is_empty() && self.stuck.is_none() && !self.state.superseded)
                || self.wants_spare())
    }

    fn wants_spare(&self) -> bool {
        let none =
            self.latched.is_none() && self.spare.is_none() && !self.spare_pending && !self.starved;
        let soon = self
            .active
            .as_ref()
            .is_some_and(|active| active.end > active.header.file_bytes / 2);
        none && (self.pool.is_some() || (soon && self.has_plenty()))
    }

    /// Whether a file may be held ready.
    fn has_plenty(&self) -> bool {
        let room = self.root.ledger().room(Charge::Normal);
        room / 3 >= self.file_need(self.config.segment_bytes)
    }

    /// Plans to make the next file ready, under the name that it will have.
    pub(super) fn plan_spare(&mut self) -> Option<SparePlan> {
        if !self.wants_spare() {
            return None;
        }
        self.spare_pending = true;
        let sequence = self.next_file_sequence();
        let from = self.pool.take();
        Some(SparePlan {
            sequence,
            path: self.take_name(sequence),
            file_bytes: from
                .as_ref()
                .map_or(self.config.segment_bytes, |recycled| recycled.file_bytes),
            from,
            charge: Charge::Normal,
        })
    }

    pub(super) fn keep_spare(&mut self, made: Result<Spare, LogError>) {
        self.spare_pending = false;
        match made {
            Ok(spare) => {
                self.spare = Some(spare);
                if self.starved || self.latched.is_some() {
                    self.drop_spare();
                }
            }
            // Then the next file is made when it is needed.
            Err(error) => tracing::debug!(%error, "cannot make the next log file ready"),
        }
    }

    fn drop_spare(&mut self) {
        if let Some(Spare { path, file, .. }) = self.spare.take() {
            drop(file);
            self.leftover.push(path);
            self.remove_leftover();
        }
    }

    /// Whether a file that has served should be kept for the next use.
    pub(super) fn wants_recycled(&self, served: &Served) -> bool {
        // What is to be encrypted does not stay behind in the clear in a file that serves again.
        served.sound
            && self.config.seal.encryption.is_none()
            && self.pool.is_none()
            && !self.starved
            && self.latched.is_none()
            && served.file_bytes == self.config.segment_bytes
            && self.root.ledger().ladder() < Ladder::Reclaim
            && self.has_plenty()
    }

    pub(super) fn keep_recycled(&mut self, recycled: Recycled) {
        self.pool = Some(recycled);
    }

    // ---- commit -------------------------------------------------------------------------------

    /// Commits a front part of the queue with one write and one sync, and gives the fate of each of
    /// its records. What is left goes with the next call.
    pub(super) fn commit(&mut self, queue: &mut VecDeque<Pending>) -> (Vec<Settled>, Next) {
        let mut settled = Vec::new();
        if self.latched.is_none() && (!self.owed.is_empty() || self.summary_due) {
            self.pay_owed();
        }
        let mut next = Next::Go;
        let mut counted = false;
        while let Some(front) = queue.front() {
            let (class, length) = (front.class, front.bytes.len());
            match self.ensure_active(class, length) {
                Ok(()) => break,
                Err(Block::AwaitSeal) => {
                    next = Next::AwaitSeal;
                    break;
                }
                Err(Block::MakeRoom) => {
                    next = Next::MakeRoom;
                    break;
                }
                Err(Block::Refuse(error)) => {
                    if error == AppendError::Capacity {
                        counted |= self.count_refused(class);
                    }
                    if let Some(Pending { to, .. }) = queue.pop_front() {
                        settled.push(Settled {
                            to,
                            result: Err(error),
                        });
                    }
                }
            }
        }
        if counted {
            // Ruling 20: counts are exact, so they are durable before anybody is told.
            self.refusals.keep(&self.refused);
        }
        if next != Next::Go {
            return (settled, next);
        }
        let mut batch = Vec::with_capacity(queue.len());
        let mut room = self
            .active
            .as_ref()
            .map_or(0, Active::room)
            .saturating_sub(MARK_BYTES);
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
            return (settled, next);
        }
        let records: Vec<(&[u8], Sha256Hash)> = batch
            .iter()
            .map(|pending| (pending.bytes.as_slice(), pending.leaf))
            .collect();
        match self.write_batch(&records) {
            Ok(first) => {
                let incarnation = self.state.incarnation;
                for (index, Pending { to, leaf, .. }) in (first..).zip(batch) {
                    let result = Ok(Appended {
                        incarnation,
                        index,
                        leaf,
                    });
                    settled.push(Settled { to, result });
                }
            }
            Err(error) => {
                let reason = error.to_string();
                self.latch(reason.clone());
                for Pending { to, .. } in batch {
                    let result = Err(AppendError::Unavailable(reason.clone()));
                    settled.push(Settled { to, result });
                }
            }
        }
        (settled, next)
    }

    fn count_refused(&mut self, class: RecordClass) -> bool {
        if class == RecordClass::State {
            return false;
        }
        let now = self.now();
        self.refused_total = self.refused_total.saturating_add(1);
        let refused = &mut self.refused;
        if refused.is_empty() {
            refused.first_unix_ms = now;
        }
        refused.last_unix_ms = now;
        let count = match class {
            RecordClass::Decision => &mut refused.decisions,
            RecordClass::Denial | RecordClass::State => &mut refused.denials,
        };
        *count = count.saturating_add(1);
        true
    }

    /// One write, one sync. Nothing in `self` changes unless both succeed, except that a failed file is
    /// gone. Gives the index of the first record.
    fn write_batch(&mut self, records: &[(&[u8], Sha256Hash)]) -> Result<u64, LogError> {
        let mut signed = self.newest_signed();
        if self.batches.saturating_sub(signed.batch) > MAX_UNSIGNED_BATCHES {
            self.sign_head();
            signed = self.newest_signed();
        }
        let Some(active) = &mut self.active else {
            return Err(LogError::Config("no active file"));
        };
        let mut tree = self.tree.clone();
        for (_, leaf) in records {
            tree.append(*leaf);
        }
        self.buffer.clear();
        let (out, content) = self.buffer.parts();
        if let Some(block) = &active.block {
            out.extend_from_slice(block);
        }
        let start = out.len();
        let mut writer = BatchWriter {
            salt: active.header.salt,
            base: active.end,
            start,
            out,
        };
        // The mark first: it attests what is durable below it, and carries the newest signed head.
        writer.mark(&Mark {
            size: self.head.size,
            signed_size: signed.size,
            signature: signed.signature,
            count: u32::try_from(records.len()).unwrap_or(u32::MAX),
            bytes: u32::try_from(batch_bytes(records.iter().map(|(record, _)| record.len())))
                .unwrap_or(u32::MAX),
            root_after: tree.root(),
        });
        for (record, _) in records {
            writer.record(record);
        }
        writer.end();
        let batch = start - content;
        let bytes = self.buffer.content();
        check_twice(
            bytes.get(batch..).unwrap_or_default(),
            active.header.salt,
            active.end,
            records,
        )?;
        let Some(file) = active.file.take() else {
            return Err(LogError::Config("the active file failed"));
        };
        let offset = active.end.saturating_sub(batch as u64);
        active.file = Some(file.commit(offset, bytes).map_err(RootError::Disk)?);
        // Durable from here on.
        active.block = None;
        active.end = offset.saturating_add(bytes.len() as u64);
        for (record, _) in records {
            body::push_record(&mut active.records, record);
        }
        active.count = active
            .count
            .saturating_add(u32::try_from(records.len()).unwrap_or(0));
        let first = self.tree.size();
        self.tree = tree;
        self.batches = self.batches.saturating_add(1);
        self.note_head();
        Ok(first)
    }

    /// Writes the lifecycle records that wait, as far as there is room, and the summary of what was
    /// refused once decisions find room again.
    fn pay_owed(&mut self) {
        // What a superseded log records goes into the quarantine with it, so all this stays owed.
        if self.state.superseded {
            return;
        }
        while let Some(record) = self.owed.front().cloned() {
            if record.len() > MAX_RECORD_BYTES {
                // Limits keep every one of them far below. Without the first of an incarnation no peer
                // takes it, and an eviction is never silent.
                self.latch("a lifecycle record is longer than a record may be".to_owned());
                return;
            }
            if !self.write_own(&record) {
                return;
            }
            let before = self.state.owed.len();
            self.state.owed.retain(|owed| *owed != record);
            if self.state.owed.len() != before {
                self.state_version = self.state_version.saturating_add(1);
            }
            self.owed.pop_front();
        }
        if self.summary_due && !self.refused.is_empty() {
            let Refused {
                window,
                decisions,
                denials,
                first_unix_ms,
                last_unix_ms,
            } = self.refused;
            let event = Event::Refused {
                decisions,
                denials,
                first_unix_ms,
                last_unix_ms,
                r#type: SUMMARY,
                unix_ms: self.now(),
                window,
            };
            if self.write_own(&event.bytes()) {
                // In this order: a crash between the two finds the summary in the unsealed file.
                self.refused = self.refused.next_window();
                self.refusals.keep(&self.refused);
                self.summary_due = false;
            }
        }
    }

    fn write_own(&mut self, record: &[u8]) -> bool {
        if self
            .ensure_active(RecordClass::State, record.len())
            .is_err()
        {
            return false;
        }
        match self.write_batch(&[(record, leaf_hash(record))]) {
            Ok(_) => true,
            Err(error) => {
                self.latch(error.to_string());
                false
            }
        }
    }

    // ---- seal ---------------------------------------------------------------------------------

    /// Makes the active file one that waits for its seal, if it holds records.
    pub(super) fn rotate_now(&mut self) -> Result<(), LogError> {
        if let Some(reason) = &self.latched {
            return Err(LogError::Latched(reason.clone()));
        }
        if self.state.superseded {
            return Err(LogError::Superseded);
        }
        if self.active.as_ref().is_some_and(|active| active.count > 0) {
            self.rotate(true);
        }
        self.stuck = None;
        Ok(())
    }

    /// The oldest file that waits for its seal. While the log is latched only what was acknowledged
    /// before is sealed, on the way out of the latch.
    pub(super) fn next_job(&mut self, latched_too: bool) -> Option<SealJob> {
        // INV-17: what a peer may hold otherwise in this place is never signed here.
        if self.state.superseded || (self.latched.is_some() && !latched_too) {
            return None;
        }
        let waiting = self.full.front_mut()?;
        Some(SealJob {
            full: Arc::clone(&waiting.full),
            room: waiting.room.take(),
            prev: self.state.sealed.prev,
            endorsement: Arc::clone(&self.endorsement),
            key: Arc::clone(&self.key),
            root: Arc::clone(&self.root),
            store: Arc::clone(&self.store),
            config: self.config.clone(),
        })
    }

    /// The oldest file's segment is durable, so the file has served.
    pub(super) fn sealed(&mut self, reference: &SegmentRef) {
        let Some(Waiting { full, .. }) = self.full.pop_front() else {
            return;
        };
        self.stuck = None;
        self.state.sealed = SealedEnd::of(
            reference.sequence.saturating_add(1),
            Some(reference.id),
            &full.tree,
        );
        self.state_version = self.state_version.saturating_add(1);
        self.sealed_events.push(reference.clone());
        self.served.push(Served {
            path: full.path.clone(),
            file_bytes: full.header.file_bytes,
            sound: full.sound,
        });
        if let Ok(full) = Arc::try_unwrap(full)
            && full.header.file_bytes == self.config.segment_bytes
        {
            self.spare_records = full.records;
        }
    }

    pub(super) fn seal_failed(&mut self, error: LogError) {
        let answer = self.fault(error);
        self.stuck = Some(answer);
    }

    /// The state as it is, and the files that may go once it is durable.
    pub(super) fn take_served(&mut self) -> (Snapshot, Vec<Served>) {
        (self.snapshot(), std::mem::take(&mut self.served))
    }

    pub(super) fn keep_served(&mut self, served: Vec<Served>) {
        self.served.extend(served);
    }

    pub(super) fn has_served(&self) -> bool {
        !self.served.is_empty()
    }

    pub(super) fn state_failed(&mut self, error: LogError) {
        self.fault(error);
    }

    /// The state that knows them as sealed is durable.
    fn drop_served(&mut self) {
        let paths = self.served.drain(..).map(|served| served.path);
        self.leftover.extend(paths);
        self.remove_leftover();
    }

    pub(super) fn leave(&mut self, path: String) {
        self.leftover.push(path);
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
                tracing::warn!(%error, "cannot remove a log file");
                true
            }
        });
    }

    /// What time asks for. Tells whether the active file is to be sealed for its age.
    pub(super) fn tick(&mut self, now_unix_ms: u64) -> bool {
        if self.latched.is_some() {
            return false;
        }
        if !self.state.superseded {
            self.stuck = None;
        }
        self.remove_leftover();
        let Some(active) = &self.active else {
            return false;
        };
        if active.file.as_ref().is_none_or(LiveFile::is_gone) {
            self.latch("the active log file was removed from outside".to_owned());
            return false;
        }
        let age = now_unix_ms.saturating_sub(active.header.created_unix_ms);
        active.count > 0 && !self.state.superseded && age >= self.config.segment_max_age_ms
    }

    // ---- the next incarnation -----------------------------------------------------------------

    /// Where a sealed segment of an own log belongs that the store does not hold. `size` is the size of
    /// the tree at its end.
    pub(super) fn place_of(&self, reference: &SegmentRef, size: u64) -> OwnPlace {
        let SegmentRef {
            id,
            origin,
            sequence,
            ..
        } = reference;
        if *sequence < given_up_below(&self.state.cursors, origin) {
            return OwnPlace::Evicted;
        }
        let running = *origin == self.state.origin;
        let known = if running {
            let sealed = &self.state.sealed;
            let newest = sequence.checked_add(1) == Some(sealed.next_sequence);
            *sequence < sealed.next_sequence && (!newest || sealed.prev == Some(*id))
        } else {
            let named = self.state.named.iter().find(|head| head.origin == *origin);
            let held = || self.store.audit_span(&self.store.last(origin)?.id);
            let known_size = named
                .map(|head| head.size)
                .or_else(|| Some(held()?.last.saturating_add(1)));
            known_size.is_some_and(|known| size <= known)
        };
        if known {
            OwnPlace::Known
        } else {
            OwnPlace::Later { running }
        }
    }

    /// Whether a part of this incarnation is sealed, so that others may know of it.
    pub(super) fn has_sealed(&self) -> bool {
        self.state.sealed.next_sequence > 0
    }

    /// From here on nothing is sealed in this incarnation. Gives the state that has to be durable before
    /// anything else is done, each time: it may not have become so before. `contradicted` is the oldest
    /// own segment that contradicts what a peer holds.
    ///
    /// # Errors
    /// [`LogError::Latched`]: what the device holds of the state is unknown.
    pub(super) fn supersede(
        &mut self,
        contradicted: Option<Contradicted>,
    ) -> Result<Snapshot, LogError> {
        if let Some(reason) = &self.latched {
            return Err(LogError::Latched(reason.clone()));
        }
        if !self.state.superseded {
            tracing::error!(
                origin = %self.state.origin,
                "{SUPERSEDED}; its root was put back to an older copy, and a new incarnation follows"
            );
            self.state.superseded = true;
            self.state_version = self.state_version.saturating_add(1);
            // Files that are full wait for the next incarnation; records past the last are refused.
            self.stuck = Some(AppendError::Unavailable(SUPERSEDED.to_owned()));
        }
        if let Some(found) = contradicted {
            // What was found before and could not be finished stands first, unless this is older.
            let before = self.state.contradicted.filter(|before| {
                before.sequence <= found.sequence && self.store.contains(&before.id)
            });
            if before.is_none() {
                self.state.contradicted = Some(found);
                self.state_version = self.state_version.saturating_add(1);
            }
        }
        Ok(self.snapshot())
    }

    /// Whether what is held in this place was sealed by this root. Else peers brought it.
    pub(super) fn has_sealed_at(&self, sequence: u64) -> bool {
        let brought = self
            .state
            .contradicted
            .is_some_and(|first| first.sequence <= sequence && !self.store.contains(&first.id));
        sequence < self.state.sealed.next_sequence && !brought
    }

    /// The oldest own segment that is to be put aside.
    pub(super) fn contradicted(&self) -> Option<Contradicted> {
        self.state.contradicted
    }

    /// Notes where superseded segments were put.
    pub(super) fn put_aside(&mut self, aside: Aside) {
        self.aside.append(aside);
    }

    /// Ends a superseded incarnation and begins the next. What it had acknowledged and not sealed goes
    /// into the quarantine. If the change breaks off half done the log stays latched until the next
    /// start, which completes it.
    pub(super) fn succeed(
        &mut self,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<Recovery, LogError> {
        if let Some(reason) = &self.latched {
            return Err(LogError::Latched(reason.clone()));
        }
        if !self.state.superseded {
            return Ok(Recovery::default());
        }
        // After a failed write nobody knows what is held, and so which head is the highest.
        if let Some(reason) = self.store.latched() {
            return Err(StoreError::Latched(reason).into());
        }
        // Before anything of it is moved, or named, or given up.
        if let Err(error) = self.state_file.write(&self.snapshot()) {
            self.fault(error.clone());
            return Err(error);
        }
        if let Some(contradicted) = self.state.contradicted {
            finish_contradicted(&self.store, &contradicted, &mut self.aside)?;
        }
        let lineage = recover::lineage(&self.root, &self.store, &self.config, Some(&self.state))?;
        let marker = self.state.marker.clone();
        let state = next_state(&self.config, &self.key, marker, &lineage, Some(&self.state));
        let endorsement = endorse(&self.key.public(), state.incarnation)
            .map_err(|e| LogError::Endorse(e.to_string()))?;
        check_endorsement(&endorsement, &state, &self.key.public())?;
        let changed = self.change_over(&lineage, state, endorsement);
        if let Err(error) = &changed {
            self.half_over = true;
            self.latch(format!("the next incarnation could not begin: {error}"));
        }
        changed
    }

    fn change_over(
        &mut self,
        lineage: &Lineage,
        mut state: LogState,
        endorsement: Endorsement,
    ) -> Result<Recovery, LogError> {
        let origin_line = checkpoint::origin_line(&self.config.domain, &state.origin)
            .ok_or(LogError::Config("the log's origin is no audit origin"))?;
        // Nothing is written to the old files any more, and the room that was kept to seal them is free.
        self.pool = None;
        self.drop_spare();
        self.active = None;
        self.full.clear();
        self.served.clear();
        let mut quarantined = std::mem::take(&mut self.aside);
        recover::set_aside(&self.root, &self.store, &mut quarantined)?;
        let first = first_record(lineage, &quarantined, SUPERSEDED, self.now());
        state.owed.insert(0, first.clone());
        self.state = state;
        self.state_version = self.state_version.saturating_add(1);
        self.state_file.write(&self.snapshot())?;
        self.endorsement = Arc::new(endorsement);
        self.tree = Frontier::new();
        self.head.origin_line = origin_line;
        self.note_head();
        {
            // Whole at any time.
            let mut signed = self.signed.lock().unwrap_or_else(PoisonError::into_inner);
            *signed = Signed {
                incarnation: self.state.incarnation,
                size: 0,
                signature: self.key.sign(self.head.text().as_bytes()),
                batch: self.batches,
            };
        }
        self.stuck = None;
        self.owed.push_front(first);
        self.pay_owed();
        match &self.latched {
            Some(reason) => Err(LogError::Latched(reason.clone())),
            None => Ok(Recovery {
                records: self.tree.size(),
                quarantined: quarantined.paths,
                quarantined_more: quarantined.more,
                new_incarnation: Some(SUPERSEDED.to_owned()),
                ..Recovery::default()
            }),
        }
    }

    // ---- eviction -----------------------------------------------------------------------------

    /// After an eviction or another change: opens the log for decisions again if there is room, and
    /// writes what is owed.
    pub(super) fn resume_service(&mut self) {
        if self.latched.is_some() {
            return;
        }
        if self.starved {
            self.starved = false;
            // If there is room, the records that are owed go into a file that decisions may use.
            let _ = self.ensure_active(RecordClass::Decision, 1);
        }
        self.pay_owed();
    }

    /// What an eviction for want of room has come to.
    pub(super) fn made_room(&mut self, freed: bool) {
        if freed {
            self.starved = false;
        }
    }

    /// The next eviction while the ladder or an append asks for room: the oldest licensed own segments,
    /// or with the owner's loud setting, when there are none and an append finds no room, the oldest one.
    pub(super) fn plan_eviction(&mut self) -> Option<Eviction> {
        let ladder = self.root.ledger().ladder();
        let short = self.starved && !self.has_room_for_a_file();
        let paused = self.state.owed.len() >= MAX_EVICTIONS_OWED;
        // A superseded log could not tell of it in a record that stays.
        let closed = self.latched.is_some() || self.state.superseded;
        if closed || paused || (ladder < Ladder::Reclaim && !short) {
            return None;
        }
        let (segments, record) = match self.licensed_prefix() {
            Some(batch) => self.evicted_event(batch)?,
            None if short && self.config.overwrite_oldest => self.gap_event()?,
            None => return None,
        };
        let newest = segments.last()?;
        let span = self.store.audit_span(&newest.id)?;
        let cursors_before = self.state.cursors.clone();
        self.state.advance(
            &newest.origin,
            span.last.saturating_add(1),
            newest.sequence.saturating_add(1),
            span.root,
        );
        // The record of it is persisted too, until it stands in the log: a deletion is never silent.
        self.state.owed.push(record.clone());
        self.state_version = self.state_version.saturating_add(1);
        Some(Eviction {
            segments,
            record,
            cursors_before,
            snapshot: self.snapshot(),
        })
    }

    /// Notes what became of an eviction.
    pub(super) fn evicted(
        &mut self,
        eviction: Eviction,
        (persisted, result): (bool, Result<(), LogError>),
    ) -> Result<(), LogError> {
        if persisted {
            tracing::info!(segments = eviction.segments.len(), "evicted audit segments");
            self.owe(eviction.record);
            // The cursor is durable, so what is left of it must go: later, or when the log reopens.
            self.unfinished |= result.is_err();
        } else {
            self.state.cursors = eviction.cursors_before;
            self.state.owed.retain(|owed| *owed != eviction.record);
            self.state_version = self.state_version.saturating_add(1);
        }
        if let Err(error) = &result {
            tracing::warn!(%error, "cannot evict");
            self.fault(error.clone());
        }
        result
    }

    /// The oldest own segment and how many of its log are held.
    fn oldest(&self) -> Option<(SegmentRef, u64)> {
        self.store
            .own_logs(&self.config.node_id)
            .into_iter()
            .find_map(|origin| {
                let first = self.store.first(&origin)?;
                let last = self.store.last(&origin)?;
                let count = last.sequence.saturating_sub(first.sequence);
                Some((first, count.saturating_add(1)))
            })
    }

    /// The oldest own segments of one incarnation, in order, as long as each is licensed: at most a
    /// quarter of what is there, so that eviction stops soon after there is room.
    fn licensed_prefix(&self) -> Option<Vec<(SegmentRef, Vec<NodeId>)>> {
        let (first, count) = self.oldest()?;
        let most = usize::try_from(count / 4)
            .unwrap_or(usize::MAX)
            .clamp(1, MAX_EVICTED_AT_ONCE);
        let now = self.now();
        let batch: Vec<_> = self
            .store
            .refs(&first.origin, first.sequence, u64::MAX, most)
            .into_iter()
            .map_while(|reference| {
                let custodians = license(&self.store, &self.config, &reference.id, now)?;
                Some((reference, custodians))
            })
            .collect();
        (!batch.is_empty()).then_some(batch)
    }

    fn evicted_event(
        &self,
        batch: Vec<(SegmentRef, Vec<NodeId>)>,
    ) -> Option<(Vec<SegmentRef>, Vec<u8>)> {
        let first = self.store.audit_span(&batch.first()?.0.id)?.first;
        let last = self.store.audit_span(&batch.last()?.0.id)?.last;
        let (segments, custodians): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        let event = Event::Evicted {
            custodians: custodians
                .into_iter()
                .map(|all| all.into_iter().take(MAX_CUSTODIANS_NAMED).collect())
                .collect(),
            first,
            last,
            origin: &segments.first()?.origin,
            segments: segments.iter().map(|reference| reference.id).collect(),
            r#type: "evicted",
            unix_ms: self.now(),
        };
        let record = event.bytes();
        Some((segments, record))
    }

    /// The oldest segment goes without a licence; the record says exactly what is gone.
    fn gap_event(&self) -> Option<(Vec<SegmentRef>, Vec<u8>)> {
        let (oldest, _) = self.oldest()?;
        let now = self.now();
        if !retention_passed(&self.store, &self.config, &oldest.id, now)? {
            return None;
        }
        let span = self.store.audit_span(&oldest.id)?;
        let root_before = if span.first == 0 {
            Some(Frontier::new().root())
        } else {
            self.state.cursor_root(&oldest.origin)
        };
        let event = Event::Gap {
            count: span.last.saturating_sub(span.first).saturating_add(1),
            first: span.first,
            last: span.last,
            origin: &oldest.origin,
            root_after: span.root,
            root_before,
            segments: vec![oldest.id],
            r#type: "gap",
            unix_ms: now,
        };
        tracing::warn!(
            first = span.first,
            last = span.last,
            "unlicensed audit is overwritten, as audit.overwrite_oldest asks for"
        );
        let record = event.bytes();
        Some((vec![oldest], record))
    }

    // ---- fail-stop ----------------------------------------------------------------------------

    /// The first step out of a latch: what was acknowledged is compared with the device, and waits to
    /// be sealed from memory into a segment elsewhere, in room that was reserved for it. The failed file
    /// is never written or synced again. Gives the reason and how the device compares.
    pub(super) fn begin_reopen(&mut self) -> Option<(String, &'static str)> {
        let reason = self.latched.clone()?;
        self.pool = None;
        self.drop_spare();
        let device = match &self.active {
            Some(active) => self.compare_with_device(active),
            None => "matches",
        };
        if device != "matches" {
            tracing::error!(
                device,
                "the device does not hold what was acknowledged; it is sealed from memory"
            );
        }
        self.rotate(false);
        self.remove_leftover();
        self.stuck = None;
        Some((reason, device))
    }

    fn compare_with_device(&self, active: &Active) -> &'static str {
        let header = &active.header;
        let len = usize::try_from(header.file_bytes).unwrap_or(0);
        let Ok(bytes) = read_device(&self.root, &active.path, len) else {
            return "unreadable";
        };
        let same = bytes.len() == len
            && LogHeader::decode(&bytes).is_ok_and(|read| read == *header)
            && scan(&bytes, header, &self.head.origin_line)
                .is_ok_and(|scan| scan.records.starts_with(&active.records));
        if same || active.count == 0 {
            "matches"
        } else {
            "differs"
        }
    }

    /// The last step out of a latch.
    pub(super) fn finish_reopen(
        &mut self,
        reason: &str,
        device: &'static str,
    ) -> Result<(), LogError> {
        self.remove_leftover();
        // What a superseded log holds in memory alone may not be sealed: the files are kept as they
        // are, and the next start goes on from them.
        if !self.leftover.is_empty() || self.half_over || self.state.superseded {
            return Err(LogError::Latched(reason.to_owned()));
        }
        self.refusals.reopen(&self.refused)?;
        // An eviction that an error cut off: the cursor is persisted, so it must be finished.
        self.drop_evicted()?;
        self.latched = None;
        self.starved = false;
        let event = Event::Reopened {
            device,
            reason,
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
        self.pool = None;
        self.drop_spare();
        if self.latched.is_some() {
            return;
        }
        self.pay_owed();
        self.sign_head();
        let fits = self
            .active
            .as_ref()
            .is_some_and(|active| active.count > 0 && active.room() >= MARK_BYTES);
        if fits && let Err(error) = self.write_batch(&[]) {
            self.latch(error.to_string());
        }
    }

    /// The last `count` records that are not sealed, oldest first.
    pub(super) fn recent(&self, count: usize) -> Recent {
        let mut out: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        let mut prepend = |first: u64, held: u32, records: &[u8]| {
            let held = usize::try_from(held).unwrap_or(usize::MAX);
            let skip = held.saturating_sub(count - out.len());
            let indexed = (first..).zip(body::iter_records(records)).skip(skip);
            let mut part: VecDeque<_> = indexed.map(|(index, r)| (index, r.to_vec())).collect();
            part.append(&mut out);
            out = part;
        };
        if let Some(active) = &self.active {
            prepend(active.header.first_index, active.count, &active.records);
        }
        for Waiting { full, .. } in self.full.iter().rev() {
            prepend(full.header.first_index, full.count, &full.records);
        }
        Recent {
            records: out,
            origin: self.state.origin.clone(),
            next_sequence: self.state.sealed.next_sequence,
        }
    }
}

/// The newest records, those that are not sealed, and where what is before them lies.
pub(super) struct Recent {
    records: VecDeque<(u64, Vec<u8>)>,
    origin: Origin,
    next_sequence: u64,
}

impl Recent {
    /// Shows these, and what was sealed before them, up to `count` in all, the newest first, until `visit` has
    /// enough. One sealed segment is in memory at a time.
    pub(super) fn newest_first(
        self,
        store: &Store,
        config: &LogConfig,
        count: usize,
        visit: &mut dyn FnMut(u64, Vec<u8>) -> ControlFlow<()>,
    ) -> Result<(), LogError> {
        let Self {
            records,
            origin,
            next_sequence: mut sequence,
        } = self;
        let mut left = count;
        let mut show = |records: &mut dyn Iterator<Item = (u64, Vec<u8>)>| {
            let mut records = records.take(left);
            records.try_for_each(|(index, record)| {
                left -= 1;
                visit(index, record)
            })?;
            match left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let mut more = show(&mut records.into_iter().rev());
        while more.is_continue() && sequence > 0 {
            sequence -= 1;
            let Some(reference) = store.find(&origin, sequence) else {
                break;
            };
            let segment = store.get(&reference.id)?;
            let keys = config.seal.decryption.as_deref();
            let sealed = match body::read_records_with(&segment, keys) {
                Ok(sealed) => sealed,
                // Sealed to others: what is before it is not this node's to read.
                Err(BodyError::Encrypted | BodyError::Crypt(_)) => break,
                Err(error) => return Err(error.into()),
            };
            more = show(&mut sealed.into_iter().rev());
        }
        Ok(())
    }
}

const SUMMARY: &str = "refused_at_capacity";

/// Whether a record is the summary of this number.
fn is_summary(record: &[u8], window: u64) -> bool {
    #[derive(serde::Deserialize)]
    struct Summary {
        r#type: String,
        window: u64,
    }
    serde_json::from_slice::<Summary>(record)
        .is_ok_and(|summary| summary.r#type == SUMMARY && summary.window == window)
}

fn retention_passed(
    store: &Store,
    config: &LogConfig,
    id: &SegmentId,
    now_unix_ms: u64,
) -> Option<bool> {
    let created = store.created_unix_ms(id)?;
    Some(created.saturating_add(config.min_retention_ms) <= now_unix_ms)
}

/// The distinct custodians whose receipts license the eviction of an own segment: enough of them, or
/// one that is an archive.
pub(super) fn license(
    store: &Store,
    config: &LogConfig,
    id: &SegmentId,
    now_unix_ms: u64,
) -> Option<Vec<NodeId>> {
    let enough = |custodians: &BTreeSet<NodeId>| {
        // Nothing is evicted without a licence, so "none required" licenses nothing.
        let by_number = config.custody_required > 0 && custodians.len() >= config.custody_required;
        by_number || !config.archives.is_disjoint(custodians)
    };
    let reference = store.reference(id)?;
    if reference.origin.audit_node() != Some(config.node_id.as_str())
        || !enough(&store.custodians(id))
        || !retention_passed(store, config, id, now_unix_ms)?
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
    enough(&custodians).then(|| custodians.into_iter().collect())
}

/// Every leaf hash is computed a second time, from the bytes that go to the disk: a flipped bit in
/// memory must not become a signed head.
fn check_twice(
    batch: &[u8],
    salt: u32,
    base: u64,
    expected: &[(&[u8], Sha256Hash)],
) -> Result<(), LogError> {
    let mut at = MARK_BYTES;
    match read_frame(batch, salt, base, 0) {
        Some((Frame::Mark(_), _)) => {}
        _ => return Err(LogError::Memory),
    }
    for (_, leaf) in expected {
        match read_frame(batch, salt, base, at) {
            Some((Frame::Record(record), next)) if leaf_hash(record) == *leaf => at = next,
            _ => return Err(LogError::Memory),
        }
    }
    if at.next_multiple_of(BATCH_ALIGN) == batch.len() {
        Ok(())
    } else {
        Err(LogError::Memory)
    }
}

/// Puts aside what contradicts a peer, before a head is named. What somebody gave a receipt for since
/// then stays: two contents are out, and this node keeps its own.
fn finish_contradicted(
    store: &Store,
    contradicted: &Contradicted,
    aside: &mut Aside,
) -> Result<(), LogError> {
    match recover::set_contradicted_aside(store, contradicted, aside) {
        Err(error @ LogError::OwnFork { .. }) => {
            tracing::error!(%error, "own segments stay that contradict what a peer holds");
            Ok(())
        }
        other => other,
    }
}

/// The state that a new incarnation begins with.
fn next_state(
    config: &LogConfig,
    key: &LogKey,
    marker: Marker,
    lineage: &Lineage,
    known: Option<&LogState>,
) -> LogState {
    LogState {
        node_id: config.node_id.clone(),
        origin: Origin::audit(&config.node_id, &key.public(), lineage.incarnation),
        incarnation: lineage.incarnation,
        marker,
        sealed: SealedEnd::start(),
        owed: known.map(|state| state.owed.clone()).unwrap_or_default(),
        cursors: known.map(|state| state.cursors.clone()).unwrap_or_default(),
        superseded: false,
        named: lineage.named(),
        contradicted: None,
    }
}

/// The record that every incarnation begins with.
fn first_record(lineage: &Lineage, aside: &Aside, reason: &str, unix_ms: u64) -> Vec<u8> {
    Event::Incarnation {
        incarnation: lineage.incarnation,
        other_heads: &lineage.others,
        // Named so that a peer which holds a head of the old log can compare (ruling 7).
        previous_head: lineage.head.as_ref(),
        previous_origin: lineage.previous.as_ref(),
        quarantined: &aside.paths,
        quarantined_more: aside.more,
        reason,
        r#type: INCARNATION,
        unix_ms,
    }
    .bytes()
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
