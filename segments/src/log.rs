//! The audit log: durable appends, sealed segments, licensed eviction.
//!
//! Records queue up; a *leader* takes everything that waits, writes it with one write and one sync into
//! a file that was made ready before, and tells everybody. A caller of [`AuditLog::append`] leads itself
//! when nobody does, so a lone one pays for no hand-off and many share one sync; for callers that must
//! not wait for the disk ([`AuditLog::submit`], [`AuditLog::append_wait`]) a thread leads. Heads are
//! signed beside the next commit. When the file is full or old the next one takes its place at once, and
//! a thread seals it into a signed segment, linked by hash to the one before, and puts it into the
//! [`Store`]. Own segments are evicted only when enough distinct custodians have signed receipts.
//!
//! What is acknowledged is durable and stays so. After any failed write or sync the log is latched:
//! every append answers [`AppendError::Unavailable`] until [`AuditLog::reopen`], which writes what
//! was acknowledged to another file and never trusts the failed one again.
//!
//! `log/core.rs` has the steps without threads, `log/seal.rs` what runs beside the commits,
//! `log/recover.rs` what opening finds; this file has the queue, the threads and the doors.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::futex::{self, Flags};
use serde::Serialize;

use crate::body::{BodyError, SealOptions};
use crate::checkpoint::Checkpoint;
use crate::format::{FormatError, SegmentRef, VerifiedSegment};
use crate::id::{DomainId, NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::{Endorsement, KeyError, LogPublicKey};
use crate::ledger::Charge;
use crate::limits::{MAX_QUEUE_BYTES, MAX_QUEUE_RECORDS, MAX_RECORD_BYTES};
use crate::merkle::leaf_hash;
use crate::receipt::{CustodyReceipt, ReceiptError};
use crate::root::{Root, RootError};
use crate::store::{Store, StoreError};

mod core;
mod event;
mod file;
mod recover;
mod refusals;
mod seal;
mod state;
mod wait;

use self::core::{Core, Next, OwnPlace, Signed, View};
pub use self::event::{NamedHead, named_heads};
use self::recover::Aside;
pub(crate) use self::recover::parse_name;
use self::seal::{Recycled, StateFile};
use self::state::Contradicted;
pub(crate) use self::state::{LogState, STATE_PATH};
use self::wait::{Group, Woken};

/// What the endorsing closure returns on failure; its message is kept.
pub type EndorseError = Box<dyn std::error::Error + Send + Sync>;

/// Called once with the fate of a record, on the log's thread: it must not block.
type Done = Box<dyn FnOnce(Result<Appended, AppendError>) + Send>;

type SealCallback = Box<dyn Fn(SegmentRef) + Send + Sync>;

/// How a log is kept.
#[derive(Clone)]
pub struct LogConfig {
    /// The domain that the records belong to.
    pub domain: DomainId,
    /// The node whose log this is.
    pub node_id: NodeId,
    /// Size of the active file, and so about that of a sealed segment: 128 KiB to 16 MiB.
    pub segment_bytes: u64,
    /// A file with records older than this is sealed at the next tick.
    pub segment_max_age_ms: u64,
    /// How many distinct custodians license an eviction. With 0 no number of them does.
    pub custody_required: usize,
    /// Nodes that are archives: a receipt of one of them licenses an eviction alone.
    pub archives: BTreeSet<NodeId>,
    /// The owner's loud setting: when an append finds no room and nothing is licensed, the oldest sealed
    /// segment goes all the same, once it is old enough, and a gap record says exactly what is gone.
    pub overwrite_oldest: bool,
    /// No segment younger than this is evicted.
    pub min_retention_ms: u64,
    /// Wall time in unix milliseconds, for the records and headers that carry it. Nothing is ordered
    /// or judged by it except age and retention.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// How segments are sealed: compressed, encrypted, to whom.
    pub seal: SealOptions,
}

impl fmt::Debug for LogConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogConfig")
            .field("domain", &self.domain)
            .field("node_id", &self.node_id)
            .field("segment_bytes", &self.segment_bytes)
            .field("segment_max_age_ms", &self.segment_max_age_ms)
            .field("custody_required", &self.custody_required)
            .field("archives", &self.archives)
            .field("overwrite_oldest", &self.overwrite_oldest)
            .field("min_retention_ms", &self.min_retention_ms)
            .field("seal", &self.seal)
            .finish_non_exhaustive()
    }
}

/// Why the log was not opened, or an operation on it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The configuration contradicts itself or a limit.
    #[error("bad log configuration: {0}")]
    Config(&'static str),
    /// The log key file may be read by others.
    #[error("keys/log.pk8 has mode {0:04o}; run chmod 600 on it")]
    KeyMode(u32),
    /// The log key cannot be read or made.
    #[error("log key: {0}")]
    Key(#[from] KeyError),
    /// The endorsing closure failed.
    #[error("cannot endorse the log key: {0}")]
    Endorse(String),
    /// The endorsement is not for this node, key and incarnation.
    #[error("the endorsement is not for this node, log key and incarnation")]
    Endorsement,
    /// A value changed in memory between two computations: the machine is not sound.
    #[error("a record changed in memory before it was written; check the machine's memory")]
    Memory,
    /// A peer holds a later part of this log, so nothing more is sealed in this incarnation.
    #[error("a peer holds a later head of this log; the next incarnation begins in a moment")]
    Superseded,
    /// What was brought as a segment of this node's own is not signed with its log key.
    #[error("segment {0} is not signed with this node's log key")]
    NotOwn(SegmentId),
    /// An own segment was evicted and is not taken back.
    #[error("segment {0} was evicted")]
    Evicted(SegmentId),
    /// Two contents of one place in this node's log are signed, and others hold the one that is here.
    #[error("two contents of sequence {sequence} of {origin} are signed with this node's log key")]
    OwnFork {
        /// The log.
        origin: Origin,
        /// The place.
        sequence: u64,
    },
    /// The log is latched.
    #[error("the log is latched after: {0}; reopen it when the disk is sound")]
    Latched(String),
    /// The log's thread cannot be started.
    #[error("cannot start the log's thread: {0}")]
    Thread(String),
    /// The body of a segment could not be made, or one of the log's own could not be read.
    #[error("segment body: {0}")]
    Body(#[from] BodyError),
    /// A sealed segment broke a rule of the format; a fault of this program.
    #[error("cannot seal: {0}")]
    Format(#[from] FormatError),
    /// A receipt was not made or refused.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// The root or the disk refused.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a record is for, which decides whether it may use the reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordClass {
    /// A decision that may become a permit.
    Decision,
    /// A denial.
    Denial,
    /// A change of state, a receipt, an operator's command: may dip into the reserve.
    State,
}

/// Where a durable record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Appended {
    /// Which incarnation of the log it stands in; each begins at index 0.
    pub incarnation: u64,
    /// Its index in the log.
    pub index: u64,
    /// Its RFC 6962 leaf hash.
    pub leaf: Sha256Hash,
}

/// Why a record was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// The ceiling is reached and nothing may be evicted.
    #[error("the disk ceiling is reached and no audit may be evicted")]
    Capacity,
    /// The record could not be made durable.
    #[error("the audit log is unavailable: {0}")]
    Unavailable(String),
    /// Empty, or longer than a record may be.
    #[error("a record must have 1 to 65535 bytes")]
    TooLarge,
    /// Too many records wait already (INV-07).
    #[error("too many records wait to be written")]
    QueueFull,
}

/// What opening the log found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Recovery {
    /// Records in this incarnation, those written at opening included.
    pub records: u64,
    /// Bytes of a torn tail that were cut off; never acknowledged.
    pub truncated_bytes: u64,
    /// About how many records they held, at most.
    pub truncated_records_estimate: u64,
    /// Files that were damaged or cannot be continued, by their new path below the root; at most
    /// [`crate::limits::MAX_QUARANTINED_NAMED`].
    pub quarantined: Vec<String>,
    /// How many more there were.
    pub quarantined_more: u64,
    /// Why a new incarnation was opened, if one was on a root that had one before.
    pub new_incarnation: Option<String>,
}

/// What became of a segment of this node's own log that a peer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnSegment {
    /// It was held.
    AlreadyHeld,
    /// It was lost to damage and is held again.
    Restored,
    /// This root had forgotten it: the incarnation is superseded, see [`AuditLog::succeed`].
    Later,
}

/// Facts about the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogStat {
    /// The log.
    pub origin: Origin,
    /// Its incarnation.
    pub incarnation: u64,
    /// Durable records.
    pub records: u64,
    /// Root of the tree over them.
    pub root: Sha256Hash,
    /// Records that are in sealed segments.
    pub sealed_records: u64,
    /// The sequence that the next sealed segment gets.
    pub next_sequence: u64,
    /// Records below this index were evicted.
    pub min_index: u64,
    /// Bytes used in the active file.
    pub active_bytes: u64,
    /// Files whose records are not sealed yet, the active one included; at most
    /// [`crate::limits::MAX_UNSEALED_FILES`].
    pub unsealed_files: usize,
    /// The size of the newest signed head.
    pub signed_size: u64,
    /// Batches written since the start, each with one sync.
    pub batches: u64,
    /// Whether decisions are refused for want of room.
    pub at_capacity: bool,
    /// Records refused for want of room since the start.
    pub refused_at_capacity: u64,
    /// Why the log is latched, if it is.
    pub latched: Option<String>,
    /// Whether a peer was seen to hold a later part of it, so that its incarnation is about to end.
    pub superseded: bool,
}

/// A record on its way.
struct Pending {
    class: RecordClass,
    bytes: Vec<u8>,
    leaf: Sha256Hash,
    to: To,
}

/// Who is told.
enum To {
    Call(Done),
    /// A caller that waits in the group, by its number.
    Slot(usize),
}

/// A record whose fate is known; the leader tells after giving the lock back.
struct Settled {
    to: To,
    result: Result<Appended, AppendError>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Pending>,
    bytes: usize,
    closed: bool,
    /// Somebody takes from the queue and commits.
    led: bool,
    /// Those that wait for what stands in the queue.
    group: Arc<Group>,
    slots: usize,
    /// How many of them may be asked to lead.
    callers: usize,
}

/// What a leader takes at once.
struct Taken {
    batch: VecDeque<Pending>,
    group: Arc<Group>,
    slots: usize,
}

struct Inner {
    core: Mutex<Core>,
    view: Mutex<View>,
    signed: Arc<Mutex<Signed>>,
    state_file: Arc<StateFile>,
    queue: Mutex<Queue>,
    /// Blocking callers in the queue, as a hint that needs no lock.
    queued: AtomicUsize,
    /// Blocking callers that were about when the last batch ended.
    about: AtomicUsize,
    arrived: Condvar,
    /// Held while files are sealed, made ready or evicted. Never taken with the core's lock held.
    sealing: Mutex<()>,
    /// Counts what was done under `sealing`, for those that wait for it.
    rounds: Mutex<u64>,
    round_ended: Condvar,
    background: Mutex<Background>,
    background_asked: Condvar,
    /// Counts heads; the signing thread waits on it.
    heads: AtomicU32,
    signer_sleeps: AtomicBool,
    closing: AtomicBool,
    on_seal: Mutex<Option<Arc<SealCallback>>>,
    store: Arc<Store>,
    root: Arc<Root>,
    config: LogConfig,
    key: Arc<crate::keys::LogKey>,
    /// No threads: every step runs on the caller's, so that a run can be replayed.
    inline: bool,
}

#[derive(Default)]
struct Background {
    asked: bool,
    closed: bool,
}

/// How long a leader waits for the callers of the last batch to come back with their next record, at
/// most: a batch of all of them costs one sync where two halves cost two. A lone caller never waits.
const GATHER: Duration = Duration::from_micros(60);

/// How long a leader waits for the sealing of a file before it looks again.
const ROUND_PATIENCE: Duration = Duration::from_millis(50);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic inside the core would leave it between two states, but nothing in it panics; the other
    // mutexes guard values that are whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Runs one step on the core, then publishes what it changed.
    fn with_core<T>(&self, step: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = lock(&self.core);
        let out = step(&mut core);
        core.refresh(&mut lock(&self.view));
        out
    }

    // ---- commit -------------------------------------------------------------------------------

    fn admit(
        &self,
        queue: &mut Queue,
        class: RecordClass,
        bytes: Vec<u8>,
        leaf: Sha256Hash,
        to: To,
    ) -> Result<(), (AppendError, To)> {
        if queue.closed {
            return Err((AppendError::Unavailable("the log is closed".to_owned()), to));
        }
        // INV-07: bounded in records and in bytes.
        let bytes_after = queue.bytes.saturating_add(bytes.len());
        if queue.waiting.len() >= MAX_QUEUE_RECORDS || bytes_after > MAX_QUEUE_BYTES {
            return Err((AppendError::QueueFull, to));
        }
        queue.bytes = bytes_after;
        queue.waiting.push_back(Pending {
            class,
            bytes,
            leaf,
            to,
        });
        Ok(())
    }

    /// Joins the group of those that wait, with a record. `leads`: nobody led, now the caller does.
    fn join(
        &self,
        class: RecordClass,
        bytes: Vec<u8>,
        may_lead: bool,
    ) -> Result<(Arc<Group>, usize, bool), AppendError> {
        if bytes.is_empty() || bytes.len() > MAX_RECORD_BYTES {
            return Err(AppendError::TooLarge);
        }
        let leaf = leaf_hash(&bytes);
        let mut queue = lock(&self.queue);
        let slot = queue.slots;
        self.admit(&mut queue, class, bytes, leaf, To::Slot(slot))
            .map_err(|(error, _)| error)?;
        queue.slots += 1;
        queue.callers += usize::from(may_lead);
        let group = Arc::clone(&queue.group);
        self.queued.store(queue.slots, Ordering::Relaxed);
        let leads = may_lead && !queue.led;
        if leads {
            queue.led = true;
        } else if !queue.led {
            self.arrived.notify_one();
        }
        Ok((group, slot, leads))
    }

    /// Takes all that waits; with callers that come back at once, a moment later.
    fn take(&self) -> Taken {
        let about = self.about.load(Ordering::Relaxed);
        if about > 1 && !self.inline {
            let start = Instant::now();
            while self.queued.load(Ordering::Relaxed) < about && start.elapsed() < GATHER {
                std::thread::yield_now();
            }
        }
        let mut queue = lock(&self.queue);
        queue.bytes = 0;
        queue.callers = 0;
        self.queued.store(0, Ordering::Relaxed);
        Taken {
            batch: std::mem::take(&mut queue.waiting),
            group: std::mem::take(&mut queue.group),
            slots: std::mem::take(&mut queue.slots),
        }
    }

    /// Commits what was taken and tells everybody. `own` says that the leader waits in the group.
    fn settle(&self, taken: Taken, own: bool) {
        let Taken {
            mut batch,
            group,
            slots,
        } = taken;
        let mut fates = Vec::new();
        fates.resize(slots, None);
        let mut work = false;
        while !batch.is_empty() {
            let round = *lock(&self.rounds);
            let (settled, next, has_work) = self.with_core(|core| {
                let (settled, next) = core.commit(&mut batch);
                (settled, next, core.has_work())
            });
            work |= has_work;
            for Settled { to, result } in settled {
                match to {
                    To::Call(done) => guard("append", || done(result)),
                    To::Slot(slot) => {
                        if let Some(fate) = fates.get_mut(slot) {
                            *fate = Some(result);
                        }
                    }
                }
            }
            match next {
                Next::Go => {}
                Next::AwaitSeal => self.await_round(round),
                Next::MakeRoom => self.make_room(),
            }
        }
        if slots > 0 {
            let still = self.queued.load(Ordering::Relaxed);
            self.about.store(slots + still, Ordering::Relaxed);
            group.settle(fates, own && slots == 1);
        }
        if self.inline {
            self.with_core(|core| core.sign_head());
            if work {
                self.background_round();
            }
            return;
        }
        self.wake_signer();
        if work {
            self.ask_background();
        }
    }

    /// Leads until the own record is settled, then passes the lead on.
    fn lead_own(&self) {
        let taken = self.take();
        self.settle(taken, true);
        self.step_down();
    }

    /// Gives the lead up; if records wait, somebody else is asked to take it.
    fn step_down(&self) {
        let mut queue = lock(&self.queue);
        queue.led = false;
        if queue.waiting.is_empty() {
            if queue.closed {
                // The committing thread may end now.
                self.arrived.notify_one();
            }
        } else if queue.callers > 0 {
            let group = Arc::clone(&queue.group);
            drop(queue);
            group.want_leader();
        } else {
            self.arrived.notify_one();
        }
    }

    /// Takes the lead for a group whose records still wait in the queue, unless somebody has it.
    fn try_lead(&self, group: &Arc<Group>) -> bool {
        let mut queue = lock(&self.queue);
        let free = !queue.led && Arc::ptr_eq(&queue.group, group);
        queue.led |= free;
        free
    }

    /// Commits all that waits, on the caller's thread.
    fn drain(&self) {
        loop {
            let taken = self.take();
            if taken.batch.is_empty() {
                return;
            }
            self.settle(taken, false);
        }
    }

    /// The body of the committing thread: it leads for those that must not wait for the disk.
    fn run(&self) {
        loop {
            {
                let mut queue = lock(&self.queue);
                while queue.led || (queue.waiting.is_empty() && !queue.closed) {
                    queue = self
                        .arrived
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if queue.waiting.is_empty() {
                    break;
                }
                queue.led = true;
            }
            let taken = self.take();
            self.settle(taken, false);
            self.step_down();
        }
    }

    // ---- beside the commits ---------------------------------------------------------------------

    /// Runs one step that seals, makes ready or evicts; then tells about what was sealed.
    fn beside<T>(&self, step: impl FnOnce() -> T) -> T {
        let held = lock(&self.sealing);
        let out = step();
        drop(held);
        self.end_round();
        let sealed = lock(&self.core).take_sealed_events();
        if !sealed.is_empty() {
            let callback = lock(&self.on_seal).clone();
            if let Some(callback) = callback {
                for reference in sealed {
                    guard("seal", || callback(reference));
                }
            }
        }
        out
    }

    fn end_round(&self) {
        let mut rounds = lock(&self.rounds);
        *rounds = rounds.wrapping_add(1);
        self.round_ended.notify_all();
    }

    /// Waits until a file was sealed or made ready since `seen`.
    fn await_round(&self, seen: u64) {
        // The sealing thread ends before the last records are written.
        if self.inline || lock(&self.background).closed {
            self.background_round();
            return;
        }
        self.ask_background();
        let rounds = lock(&self.rounds);
        // Whether it ended or time passed, the commit is tried again.
        drop(
            self.round_ended
                .wait_timeout_while(rounds, ROUND_PATIENCE, |now| *now == seen),
        );
    }

    /// Evicts for an append that finds no room.
    fn make_room(&self) {
        self.beside(|| {
            let freed = self.evict().unwrap_or(false);
            self.with_core(|core| core.made_room(freed));
        });
    }

    fn background_round(&self) {
        self.beside(|| {
            // A failure is noted in the core, which answers for it.
            let _ = self.seal_waiting(false);
            self.provide_spare();
        });
    }

    fn ask_background(&self) {
        let mut background = lock(&self.background);
        if !background.asked {
            background.asked = true;
            self.background_asked.notify_one();
        }
    }

    /// The body of the sealing thread.
    fn run_background(&self) {
        // On Linux the priority is the thread's own: commits go first where cores are few.
        if let Err(error) = rustix::process::setpriority_process(None, SEAL_NICE) {
            tracing::debug!(%error, "sealing runs with the priority of commits");
        }
        loop {
            {
                let mut background = lock(&self.background);
                while !background.asked && !background.closed {
                    background = self
                        .background_asked
                        .wait(background)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if background.closed {
                    return;
                }
                background.asked = false;
            }
            // Ready first: a commit that finds no next file waits for it.
            self.beside(|| self.provide_spare());
            self.background_round();
        }
    }

    /// Seals what waits, oldest first. Gives the last segment.
    fn seal_waiting(&self, latched_too: bool) -> Result<Option<SegmentRef>, LogError> {
        let mut last = None;
        while let Some(job) = self.with_core(|core| core.next_job(latched_too)) {
            match job.run() {
                Ok(reference) => {
                    self.with_core(|core| core.sealed(&reference));
                    last = Some(reference);
                    self.dismiss_served();
                }
                Err(error) => {
                    let copy = error.clone();
                    self.with_core(|core| core.seal_failed(error));
                    return Err(copy);
                }
            }
            self.end_round();
        }
        Ok(last)
    }

    /// Makes the state durable, then uses again or removes the files that have served.
    fn dismiss_served(&self) {
        let (snapshot, served) = self.with_core(Core::take_served);
        if let Err(error) = self.state_file.write(&snapshot) {
            tracing::warn!(%error, "cannot store the state of the log");
            self.with_core(|core| {
                core.keep_served(served);
                core.state_failed(error);
            });
            return;
        }
        for file in served {
            let recycled = self
                .with_core(|core| core.wants_recycled(&file))
                .then(|| self.root.restage(&file.path));
            match recycled {
                Some(Ok(staged)) => self.with_core(|core| {
                    core.keep_recycled(Recycled {
                        staged,
                        file_bytes: file.file_bytes,
                    });
                }),
                Some(Err(_)) | None => {
                    if self.root.remove(&file.path).is_err() {
                        self.with_core(|core| core.leave(file.path));
                    }
                }
            }
        }
    }

    /// Makes the next file ready under its name.
    fn provide_spare(&self) {
        if let Some(plan) = self.with_core(Core::plan_spare) {
            let made = plan.run(&self.root);
            self.with_core(|core| core.keep_spare(made));
            self.end_round();
        }
    }

    /// Evicts while there is something to evict and room is asked for. Tells whether anything went.
    fn evict(&self) -> Result<bool, LogError> {
        let mut freed = self.with_core(Core::finish_evictions)?;
        while let Some(eviction) = self.with_core(Core::plan_eviction) {
            let outcome = eviction.run(&self.store, &self.state_file);
            self.with_core(|core| core.evicted(eviction, outcome))?;
            freed = true;
        }
        Ok(freed)
    }

    /// Takes a segment of an own log from a peer, with the sealing lock held.
    fn take_own(&self, segment: &VerifiedSegment) -> Result<OwnSegment, LogError> {
        let reference = segment.reference();
        if self.store.contains(&reference.id) {
            return Ok(OwnSegment::AlreadyHeld);
        }
        if let Some(reason) = lock(&self.view).latched.clone() {
            return Err(LogError::Latched(reason));
        }
        let size = segment
            .audit_span()
            .map_or(0, |span| span.last.saturating_add(1));
        let running = match self.with_core(|core| core.place_of(&reference, size)) {
            OwnPlace::Evicted => return Err(LogError::Evicted(reference.id)),
            OwnPlace::Later { running } => running,
            OwnPlace::Known => match self.store.put(segment, Charge::Normal) {
                Ok(_) => return Ok(OwnSegment::Restored),
                // Its neighbours are others than those that it was linked with.
                Err(StoreError::Fork { .. }) if self.is_running(&reference.origin) => true,
                Err(error) => return Err(error.into()),
            },
        };
        if !running && self.with_core(|core| core.has_sealed()) {
            // Others may know this incarnation: what it has recorded is signed while it may be.
            let sealed = self
                .with_core(Core::rotate_now)
                .and_then(|()| self.seal_waiting(false));
            if let Err(error) = sealed {
                tracing::warn!(%error, "cannot seal the rest of a superseded log");
            }
        }
        let contradicted = if running {
            self.contradicted_by(&reference)
        } else {
            Ok(None)
        };
        // Durable first: whatever stops this node now, it seals nothing more in these places, and what
        // contradicts the peer is put aside before a head is named.
        let found = contradicted.as_ref().ok().copied().flatten();
        let snapshot = self.with_core(|core| core.supersede(found))?;
        if let Err(error) = self.state_file.write(&snapshot) {
            self.with_core(|core| core.state_failed(error.clone()));
            return Err(error);
        }
        if contradicted?.is_some() {
            self.set_contradicted_aside()?;
        }
        self.store.put(segment, Charge::Normal)?;
        Ok(OwnSegment::Later)
    }

    fn is_running(&self, origin: &Origin) -> bool {
        lock(&self.view).origin == *origin
    }

    /// The oldest own segment that contradicts one which a peer holds, if there is one. It and those that
    /// are linked to it are nobody else's, or else both contents stay where they are.
    fn contradicted_by(&self, theirs: &SegmentRef) -> Result<Option<Contradicted>, LogError> {
        match self.store.check_place(theirs) {
            Err(StoreError::Fork { .. }) => {}
            other => return Ok(other.map(|()| None)?),
        }
        let (origin, sequence) = (&theirs.origin, theirs.sequence);
        let before = sequence
            .checked_sub(1)
            .and_then(|before| self.store.find(origin, before));
        let first = match before {
            Some(before) if theirs.prev != Some(before.id) => Some(before),
            _ => self.store.find(origin, sequence).or_else(|| {
                let after = sequence.checked_add(1)?;
                self.store.find(origin, after)
            }),
        };
        let Some(first) = first else {
            return Ok(None);
        };
        if !self.with_core(|core| core.has_sealed_at(first.sequence)) {
            return Err(LogError::OwnFork {
                origin: first.origin,
                sequence: first.sequence,
            });
        }
        recover::last_linked(&self.store, &first)?;
        Ok(Some(Contradicted {
            sequence: first.sequence,
            id: first.id,
        }))
    }

    /// Puts the own segments into the quarantine that contradict what a peer holds.
    fn set_contradicted_aside(&self) -> Result<(), LogError> {
        let Some(contradicted) = self.with_core(|core| core.contradicted()) else {
            return Ok(());
        };
        let mut aside = Aside::default();
        let done = recover::set_contradicted_aside(&self.store, &contradicted, &mut aside);
        self.with_core(|core| core.put_aside(aside));
        done
    }

    fn reclaim(&self) {
        self.beside(|| {
            // A failure is noted in the core, which answers for it.
            let _ = self.evict();
            self.with_core(Core::resume_service);
        });
    }

    // ---- signatures -----------------------------------------------------------------------------

    fn wake_signer(&self) {
        self.heads.fetch_add(1, Ordering::SeqCst);
        if self.signer_sleeps.load(Ordering::SeqCst) {
            let _ = futex::wake(&self.heads, Flags::PRIVATE, 1);
        }
    }

    /// The body of the signing thread: signs the newest head, beside the next commit.
    fn run_signer(&self) {
        loop {
            let seen = self.heads.load(Ordering::Acquire);
            self.sign_newest();
            if self.closing.load(Ordering::SeqCst) {
                return;
            }
            self.signer_sleeps.store(true, Ordering::SeqCst);
            let _ = futex::wait(&self.heads, Flags::PRIVATE, seen, None);
            self.signer_sleeps.store(false, Ordering::SeqCst);
        }
    }

    /// Signs the newest head unless that was done. Gives it with its signature.
    fn sign_newest(&self) -> (Checkpoint, [u8; 64]) {
        let (head, batch, incarnation) = {
            let view = lock(&self.view);
            (view.head.clone(), view.batches, view.incarnation)
        };
        {
            let signed = lock(&self.signed);
            if signed.size == head.size && signed.incarnation == incarnation {
                return (head, signed.signature);
            }
        }
        let signature = self.key.sign(head.text().as_bytes());
        let mut signed = lock(&self.signed);
        if head.size > signed.size && signed.incarnation == incarnation {
            *signed = Signed {
                incarnation,
                size: head.size,
                signature,
                batch,
            };
        }
        (head, signature)
    }
}

/// What the priority of sealing is lowered to.
const SEAL_NICE: i32 = 5;

/// A caller's callback must not take the log's thread with it.
fn guard(what: &str, callback: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(callback)).is_err() {
        tracing::error!(what, "a callback of the audit log panicked");
    }
}

/// One node's audit log.
pub struct AuditLog {
    inner: Arc<Inner>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AuditLog").field(&self.origin()).finish()
    }
}

impl AuditLog {
    /// Opens the log of a root: reads or makes the log key, recovers the log files, opens a new
    /// incarnation where it must (ruling 8), has the key endorsed, and starts the threads: one that
    /// commits for those that must not wait for the disk, one that signs heads, one that seals.
    ///
    /// # Errors
    /// [`LogError`]: configuration, key, endorsement, root, store, or a disk that fails.
    pub fn open(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Arc<Self>, Recovery), LogError> {
        let (inner, recovery) = Self::open_core(root, store, config, endorse, false)?;
        let start = |name: &str, body: fn(&Inner)| {
            let inner = Arc::clone(&inner);
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || body(&inner))
                .map_err(|e| LogError::Thread(e.to_string()))
        };
        let log = Arc::new(Self {
            threads: Mutex::default(),
            inner: Arc::clone(&inner),
        });
        for (name, body) in [
            ("tidelock-log", Inner::run as fn(&Inner)),
            ("tidelock-sign", Inner::run_signer),
            ("tidelock-seal", Inner::run_background),
        ] {
            let thread = start(name, body)?;
            lock(&log.threads).push(thread);
        }
        if inner.with_core(|core| core.has_work()) {
            inner.ask_background();
        }
        Ok((log, recovery))
    }

    /// Like [`AuditLog::open`], without any thread: `submit` commits before it returns, and sealing and
    /// making the next file ready happen on the spot. With a simulated disk a run is then a function of
    /// its inputs alone.
    ///
    /// # Errors
    /// As [`AuditLog::open`].
    pub fn open_inline(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Arc<Self>, Recovery), LogError> {
        let (inner, recovery) = Self::open_core(root, store, config, endorse, true)?;
        if inner.with_core(|core| core.has_work()) {
            inner.background_round();
        }
        let log = Self {
            inner,
            threads: Mutex::default(),
        };
        Ok((Arc::new(log), recovery))
    }

    fn open_core(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
        inline: bool,
    ) -> Result<(Arc<Inner>, Recovery), LogError> {
        let (core, recovery) = Core::open(
            Arc::clone(&root),
            Arc::clone(&store),
            config.clone(),
            endorse,
        )?;
        let inner = Arc::new(Inner {
            view: Mutex::new(core.view()),
            signed: Arc::clone(core.signed()),
            state_file: Arc::clone(core.state_file()),
            key: Arc::clone(core.key()),
            core: Mutex::new(core),
            queue: Mutex::default(),
            queued: AtomicUsize::new(0),
            about: AtomicUsize::new(0),
            arrived: Condvar::new(),
            sealing: Mutex::new(()),
            rounds: Mutex::new(0),
            round_ended: Condvar::new(),
            background: Mutex::default(),
            background_asked: Condvar::new(),
            heads: AtomicU32::new(0),
            signer_sleeps: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            on_seal: Mutex::default(),
            store,
            root,
            config,
            inline,
        });
        Ok((inner, recovery))
    }

    /// Queues a record. `done` is called once, on the thread that commits it, when it is durable or
    /// refused; it must not block. It may be called before this returns when the record is refused at
    /// once.
    pub fn submit(
        &self,
        class: RecordClass,
        bytes: Vec<u8>,
        done: Box<dyn FnOnce(Result<Appended, AppendError>) + Send>,
    ) {
        if bytes.is_empty() || bytes.len() > MAX_RECORD_BYTES {
            return done(Err(AppendError::TooLarge));
        }
        let inner = &self.inner;
        let leaf = leaf_hash(&bytes);
        let mut queue = lock(&inner.queue);
        let led = queue.led;
        let first = queue.waiting.is_empty();
        let admitted = inner.admit(&mut queue, class, bytes, leaf, To::Call(done));
        drop(queue);
        match admitted {
            Err((error, To::Call(done))) => done(Err(error)),
            Err((_, To::Slot(_))) => {}
            Ok(()) if inner.inline => inner.drain(),
            Ok(()) => {
                if first && !led {
                    inner.arrived.notify_one();
                }
            }
        }
    }

    /// Appends a record and waits for it as long as the disk takes. If nobody is committing, the caller
    /// does it on its own thread, for all that wait; else it shares the next batch.
    ///
    /// # Errors
    /// [`AppendError`].
    pub fn append(&self, class: RecordClass, bytes: Vec<u8>) -> Result<Appended, AppendError> {
        let inner = &self.inner;
        let (group, slot, mut leads) = inner.join(class, bytes, true)?;
        loop {
            if leads {
                inner.lead_own();
                if let Some(fate) = group.fate(slot) {
                    return fate;
                }
            }
            match group.wait(slot) {
                Woken::Settled(fate) => return fate,
                Woken::Lead => leads = inner.try_lead(&group),
                Woken::TimedOut => leads = false,
            }
        }
    }

    /// Appends a record and waits for it, at most this long whatever the disk does.
    ///
    /// # Errors
    /// [`AppendError`]; after the timeout it is [`AppendError::Unavailable`], and whether the record
    /// becomes durable later is unknown.
    pub fn append_wait(
        &self,
        class: RecordClass,
        bytes: Vec<u8>,
        timeout: Duration,
    ) -> Result<Appended, AppendError> {
        if self.inner.inline {
            return self.append(class, bytes);
        }
        let (group, slot, _) = self.inner.join(class, bytes, false)?;
        match group.wait_timeout(slot, timeout) {
            Woken::Settled(fate) => fate,
            Woken::Lead | Woken::TimedOut => Err(AppendError::Unavailable(
                "the record was not durable in time".to_owned(),
            )),
        }
    }

    /// Seals the active file into a segment; `None` if it holds no record.
    ///
    /// # Errors
    /// [`LogError`]; a disk fault latches the log.
    pub fn seal_now(&self) -> Result<Option<SegmentRef>, LogError> {
        let inner = &self.inner;
        inner.beside(|| {
            inner.with_core(Core::rotate_now)?;
            let sealed = inner.seal_waiting(false)?;
            inner.provide_spare();
            Ok(sealed)
        })
    }

    /// Does what time asks for: seals by age, evicts, opens the log again after a want of room, and
    /// notices a log file that somebody removed. To be called about once a second.
    pub fn tick(&self, now_unix_ms: u64) {
        let inner = &self.inner;
        if inner.with_core(|core| core.tick(now_unix_ms))
            && let Err(error) = self.seal_now()
        {
            tracing::warn!(%error, "cannot seal by age");
        }
        let (waits, served) = inner.with_core(|core| (core.has_work(), core.has_served()));
        if served {
            inner.beside(|| inner.dismiss_served());
        }
        if waits {
            inner.background_round();
        }
        inner.reclaim();
    }

    /// Evicts what the ladder asks for and receipts license, and accepts decisions again if there is
    /// room. To be called when a licence arrives or the ceiling changes.
    pub fn reclaim(&self) {
        self.inner.reclaim();
    }

    /// Keeps a receipt (see [`Store::put_receipt`]) and evicts what it licenses, if room is wanted.
    ///
    /// # Errors
    /// [`LogError::Store`] if the receipt does not fit.
    pub fn take_receipt(&self, receipt: &CustodyReceipt) -> Result<(), LogError> {
        self.inner.store.put_receipt(receipt)?;
        self.reclaim();
        Ok(())
    }

    /// Takes a segment of one of this node's own logs from a peer. What damage took is simply held
    /// again. A segment that this root has forgotten, or that stands where it holds another content,
    /// proves that the root was put back to an older copy (ruling 8): from then on nothing is sealed in
    /// the running incarnation, the segment is stored, and own segments that contradict it and that
    /// nobody else holds go into the quarantine. The caller has judged the endorsement's certificate.
    ///
    /// # Errors
    /// [`LogError::NotOwn`] if it is not signed with this node's log key: the bringer's fault.
    /// [`LogError::Latched`]; [`LogError::Evicted`]; [`LogError::OwnFork`] or [`StoreError::Fork`] where
    /// others hold another content of the same place; the root's or store's refusal.
    pub fn take_own(&self, segment: &VerifiedSegment) -> Result<OwnSegment, LogError> {
        let inner = &self.inner;
        let header = segment.header();
        let own = segment.endorsement().is_some_and(|endorsement| {
            endorsement.log_key == inner.key.public()
                && endorsement.node_id == inner.config.node_id
                && header.origin
                    == Origin::audit(
                        &endorsement.node_id,
                        &endorsement.log_key,
                        endorsement.incarnation,
                    )
        });
        if !own {
            return Err(LogError::NotOwn(segment.id()));
        }
        inner.beside(|| inner.take_own(segment))
    }

    /// Whether a peer was seen to hold a later part of this log, so that [`AuditLog::succeed`] is due.
    #[must_use]
    pub fn is_superseded(&self) -> bool {
        lock(&self.inner.view).superseded
    }

    /// Ends a superseded incarnation and begins the next without a restart, naming the highest heads
    /// that are held now. Records that were acknowledged and not sealed go into the quarantine with
    /// their file, and the first record names it. Does nothing if the log is not superseded.
    ///
    /// # Errors
    /// [`LogError::Endorse`], or any other that leaves the log unlatched: the incarnation is the same, and
    /// it may be tried again. If the log is latched the next start completes the change.
    pub fn succeed(
        &self,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<Recovery, LogError> {
        let inner = &self.inner;
        inner.beside(|| inner.with_core(|core| core.succeed(endorse)))
    }

    /// Segments of this log below this sequence were evicted.
    #[must_use]
    pub fn evicted_below(&self, origin: &Origin) -> u64 {
        let cursors = Arc::clone(&lock(&self.inner.view).cursors);
        state::given_up_below(&cursors, origin)
    }

    /// Makes a receipt for an audit segment of another node that the store holds.
    ///
    /// # Errors
    /// [`LogError`] if it is not held, damaged, own, or not consistent.
    pub fn issue_receipt(&self, id: &SegmentId) -> Result<CustodyReceipt, LogError> {
        let segment = self.inner.store.get(id)?;
        let endorsement = Arc::clone(&lock(&self.inner.view).endorsement);
        let now = (self.inner.config.clock)();
        let own = &self.inner.config.node_id;
        Ok(CustodyReceipt::issue(
            &segment,
            own,
            now,
            &self.inner.key,
            &endorsement,
        )?)
    }

    /// Whether receipts of enough distinct custodians are held for this own segment, and its retention
    /// has passed.
    #[must_use]
    pub fn is_licensed(&self, id: &SegmentId, now_unix_ms: u64) -> bool {
        core::license(&self.inner.store, &self.inner.config, id, now_unix_ms).is_some()
    }

    /// The last `count` records with their indexes, oldest first. What is sealed is read beside the log,
    /// and no append waits for the disk meanwhile.
    ///
    /// # Errors
    /// [`LogError`] if a sealed segment cannot be read.
    pub fn tail(&self, count: usize) -> Result<Vec<(u64, Vec<u8>)>, LogError> {
        let mut records = VecDeque::new();
        self.newest_first(count, &mut |index, record| {
            records.push_front((index, record));
            ControlFlow::Continue(())
        })?;
        Ok(records.into())
    }

    /// Shows the newest `count` records with their indexes, from the newest to the oldest, until `visit` has
    /// enough. Of what is sealed one segment is in memory at a time; no append waits meanwhile.
    ///
    /// # Errors
    /// [`LogError`] if a sealed segment cannot be read.
    pub fn newest_first(
        &self,
        count: usize,
        visit: &mut dyn FnMut(u64, Vec<u8>) -> ControlFlow<()>,
    ) -> Result<(), LogError> {
        let recent = lock(&self.inner.core).recent(count);
        recent.newest_first(&self.inner.store, &self.inner.config, count, visit)
    }

    /// Takes a latched log into use again.
    ///
    /// # Errors
    /// [`LogError`] if the disk still refuses; the log stays latched.
    pub fn reopen(&self) -> Result<(), LogError> {
        let inner = &self.inner;
        inner.beside(|| {
            if inner.store.latched().is_some() {
                inner.store.reopen()?;
            }
            let Some((reason, device)) = inner.with_core(Core::begin_reopen) else {
                return Ok(());
            };
            inner.seal_waiting(true)?;
            inner.with_core(|core| core.finish_reopen(&reason, device))
        })
    }

    /// Why the log is latched, if it is.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        lock(&self.inner.view).latched.clone()
    }

    /// Replaces the endorsement, after the certificate was renewed.
    ///
    /// # Errors
    /// [`LogError::Endorsement`] if it is not for this node, key and incarnation.
    pub fn set_endorsement(&self, endorsement: Endorsement) -> Result<(), LogError> {
        self.inner
            .with_core(|core| core.set_endorsement(endorsement))
    }

    /// The endorsement in use.
    #[must_use]
    pub fn endorsement(&self) -> Endorsement {
        Endorsement::clone(&lock(&self.inner.view).endorsement)
    }

    /// The public half of the log key.
    #[must_use]
    pub fn public_key(&self) -> LogPublicKey {
        self.inner.key.public()
    }

    /// The log's origin.
    #[must_use]
    pub fn origin(&self) -> Origin {
        lock(&self.inner.view).origin.clone()
    }

    /// The log's incarnation.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        lock(&self.inner.view).incarnation
    }

    /// How many records are durable.
    #[must_use]
    pub fn size(&self) -> u64 {
        lock(&self.inner.view).head.size
    }

    /// The signed checkpoint over all durable records.
    #[must_use]
    pub fn checkpoint(&self) -> String {
        let (head, signature) = self.inner.sign_newest();
        head.with_signature(&self.inner.key.public(), &signature)
    }

    /// Sets what is called after each seal, on the thread that sealed: it must not append and wait.
    pub fn on_seal(&self, callback: Box<dyn Fn(SegmentRef) + Send + Sync>) {
        *lock(&self.inner.on_seal) = Some(Arc::new(callback));
    }

    /// Facts about the log, without waiting for the disk.
    #[must_use]
    pub fn stat(&self) -> LogStat {
        let view = lock(&self.inner.view);
        LogStat {
            origin: view.origin.clone(),
            incarnation: view.incarnation,
            records: view.head.size,
            root: view.head.root,
            sealed_records: view.sealed_records,
            next_sequence: view.next_sequence,
            min_index: view.min_index,
            active_bytes: view.active_bytes,
            unsealed_files: view.unsealed_files,
            signed_size: lock(&self.inner.signed).size,
            batches: view.batches,
            at_capacity: view.starved,
            refused_at_capacity: view.refused_at_capacity,
            latched: view.latched.clone(),
            superseded: view.superseded,
        }
    }

    /// Writes what waits and ends the log's threads. Appends after it are refused. Dropping the log
    /// does the same.
    pub fn close(&self) {
        let inner = &self.inner;
        let was_closed = std::mem::replace(&mut lock(&inner.queue).closed, true);
        if was_closed {
            return;
        }
        inner.closing.store(true, Ordering::SeqCst);
        inner.arrived.notify_all();
        lock(&inner.background).closed = true;
        inner.background_asked.notify_all();
        inner.heads.fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(&inner.heads, Flags::PRIVATE, 1);
        let threads = std::mem::take(&mut *lock(&self.threads));
        let own = std::thread::current().id();
        for thread in threads {
            // A callback may hold the last reference, and a thread cannot wait for itself.
            if thread.thread().id() != own && thread.join().is_err() {
                tracing::error!("a thread of the audit log panicked");
            }
        }
        inner.with_core(Core::close);
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        self.close();
    }
}
