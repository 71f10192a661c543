//! The audit log: durable appends, sealed segments, licensed eviction.
//!
//! [`AuditLog::submit`] queues a record; one thread takes everything that waits, writes it with one
//! write and one sync into a file that was allocated and zero-filled before, and then calls back.
//! So many callers share one sync, and a lone one pays for no more than its own. When the file is
//! full or old it is sealed into a signed segment, linked by hash to the one before, and put into the
//! [`Store`]. Own segments are evicted only when enough distinct custodians have signed receipts.
//!
//! What is acknowledged is durable and stays so. After any failed write or sync the log is latched:
//! every append answers [`AppendError::Unavailable`] until [`AuditLog::reopen`], which writes what
//! was acknowledged to another file and never trusts the failed one again.
//!
//! `log/core.rs` has the steps without threads; this file has the queue, the thread and the doors.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::body::{BodyError, SealOptions};
use crate::format::{FormatError, SegmentRef};
use crate::id::{DomainId, NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::{Endorsement, KeyError, LogPublicKey};
use crate::limits::{MAX_QUEUE_BYTES, MAX_QUEUE_RECORDS, MAX_RECORD_BYTES};
use crate::receipt::{CustodyReceipt, ReceiptError};
use crate::root::{Root, RootError};
use crate::store::{Store, StoreError};

mod core;
mod event;
mod state;

use self::core::{Core, Pending, Prepared, View};
pub(crate) use self::state::{LogState, STATE_PATH};

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
    /// How many distinct custodians license an eviction. With 0 nothing is ever evicted.
    pub custody_required: usize,
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
    /// Files that were damaged or cannot be continued, by their new path below the root.
    pub quarantined: Vec<String>,
    /// Why a new incarnation was opened, if one was on a root that had one before.
    pub new_incarnation: Option<String>,
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
    /// Batches written since the start, each with one sync.
    pub batches: u64,
    /// Whether decisions are refused for want of room.
    pub at_capacity: bool,
    /// Records refused for want of room since the start.
    pub refused_at_capacity: u64,
    /// Why the log is latched, if it is.
    pub latched: Option<String>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Pending>,
    bytes: usize,
    closed: bool,
}

struct Inner {
    core: Mutex<Core>,
    view: Mutex<View>,
    queue: Mutex<Queue>,
    arrived: Condvar,
    on_seal: Mutex<Option<Arc<SealCallback>>>,
    root: Arc<Root>,
    store: Arc<Store>,
    config: LogConfig,
    key: Arc<crate::keys::LogKey>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic inside the core would leave it between two states, but nothing in it panics; the other
    // mutexes guard values that are whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Runs one step on the core, then publishes what it changed, outside its lock.
    fn with_core<T>(&self, step: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = lock(&self.core);
        let out = step(&mut core);
        core.refresh(&mut lock(&self.view));
        let sealed = core.take_sealed_events();
        drop(core);
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

    /// Commits all that waits, on the caller's thread.
    fn drain(&self) {
        let mut batch = std::mem::take(&mut lock(&self.queue).waiting);
        lock(&self.queue).bytes = 0;
        while !batch.is_empty() {
            for one in self.with_core(|core| core.commit(&mut batch)) {
                guard("append", || one.tell());
            }
            self.with_core(Core::sign_head);
        }
    }

    /// The body of the commit thread.
    fn run(&self, prepare: &mpsc::SyncSender<u64>) {
        let mut batch = VecDeque::new();
        loop {
            {
                let mut queue = lock(&self.queue);
                while queue.waiting.is_empty() && !queue.closed {
                    queue = self
                        .arrived
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if queue.waiting.is_empty() {
                    break;
                }
                std::mem::swap(&mut queue.waiting, &mut batch);
                queue.bytes = 0;
            }
            while !batch.is_empty() {
                let (settled, plan) = self.with_core(|core| {
                    let settled = core.commit(&mut batch);
                    (settled, core.plan_preparation())
                });
                for one in settled {
                    guard("append", || one.tell());
                }
                self.with_core(|core| {
                    core.sign_head();
                });
                if let Some(bytes) = plan {
                    // If the helper is busy, it is asked again after the next batch.
                    let _ = prepare.try_send(bytes);
                }
            }
        }
        self.with_core(Core::close);
    }
}

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
    /// No threads: every step runs on the caller's, so that a run can be replayed.
    inline: bool,
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AuditLog").field(&self.origin()).finish()
    }
}

impl AuditLog {
    /// Opens the log of a root: reads or makes the log key, recovers the active file, opens a new
    /// incarnation where it must (ruling 8), has the key endorsed, and starts the commit thread.
    ///
    /// # Errors
    /// [`LogError`]: configuration, key, endorsement, root, store, or a disk that fails.
    pub fn open(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Arc<Self>, Recovery), LogError> {
        let (inner, recovery) = Self::open_core(root, store, config, endorse)?;
        let (asks, asked) = mpsc::sync_channel::<u64>(1);
        let start = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(|e| LogError::Thread(e.to_string()))
        };
        let helper = Arc::clone(&inner);
        let prepare = start(
            "tidelock-prepare",
            Box::new(move || {
                for bytes in asked {
                    let made: Result<Prepared, _> = Core::prepare(&helper.root, bytes);
                    match made {
                        Ok(prepared) => helper.with_core(|core| core.keep_prepared(prepared)),
                        // Then the next file is made when it is needed.
                        Err(error) => tracing::debug!(%error, "cannot prepare the next log file"),
                    }
                }
            }),
        )?;
        let worker = Arc::clone(&inner);
        let commit = start("tidelock-log", Box::new(move || worker.run(&asks)))?;
        Ok((
            Arc::new(Self {
                inner,
                threads: Mutex::new(vec![commit, prepare]),
                inline: false,
            }),
            recovery,
        ))
    }

    /// Like [`AuditLog::open`], without any thread: `submit` commits before it returns and nothing is
    /// prepared ahead. With a simulated disk a run is then a function of its inputs alone.
    ///
    /// # Errors
    /// As [`AuditLog::open`].
    pub fn open_inline(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Arc<Self>, Recovery), LogError> {
        let (inner, recovery) = Self::open_core(root, store, config, endorse)?;
        let log = Self {
            inner,
            threads: Mutex::default(),
            inline: true,
        };
        Ok((Arc::new(log), recovery))
    }

    fn open_core(
        root: Arc<Root>,
        store: Arc<Store>,
        config: LogConfig,
        endorse: &dyn Fn(&LogPublicKey, u64) -> Result<Endorsement, EndorseError>,
    ) -> Result<(Arc<Inner>, Recovery), LogError> {
        let (core, recovery) = Core::open(
            Arc::clone(&root),
            Arc::clone(&store),
            config.clone(),
            endorse,
        )?;
        let inner = Arc::new(Inner {
            view: Mutex::new(core.view()),
            key: Arc::clone(core.key()),
            core: Mutex::new(core),
            queue: Mutex::default(),
            arrived: Condvar::new(),
            on_seal: Mutex::default(),
            root,
            store,
            config,
        });
        Ok((inner, recovery))
    }

    /// Queues a record. `done` is called once, on the log's thread, when it is durable or refused; it
    /// must not block. It may be called before this returns when the record is refused at once.
    pub fn submit(
        &self,
        class: RecordClass,
        bytes: Vec<u8>,
        done: Box<dyn FnOnce(Result<Appended, AppendError>) + Send>,
    ) {
        if bytes.is_empty() || bytes.len() > MAX_RECORD_BYTES {
            return done(Err(AppendError::TooLarge));
        }
        let mut queue = lock(&self.inner.queue);
        if queue.closed {
            drop(queue);
            return done(Err(AppendError::Unavailable(
                "the log is closed".to_owned(),
            )));
        }
        // INV-07: bounded in records and in bytes.
        let bytes_after = queue.bytes.saturating_add(bytes.len());
        if queue.waiting.len() >= MAX_QUEUE_RECORDS || bytes_after > MAX_QUEUE_BYTES {
            drop(queue);
            return done(Err(AppendError::QueueFull));
        }
        let idle = queue.waiting.is_empty();
        queue.bytes = bytes_after;
        queue.waiting.push_back(Pending { class, bytes, done });
        drop(queue);
        if self.inline {
            self.inner.drain();
        } else if idle {
            self.inner.arrived.notify_one();
        }
    }

    /// Appends a record and waits for it.
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
        let (sender, receiver) = mpsc::sync_channel(1);
        let done = move |result| {
            // The receiver may have given up.
            let _ = sender.try_send(result);
        };
        self.submit(class, bytes, Box::new(done));
        receiver.recv_timeout(timeout).unwrap_or_else(|_| {
            Err(AppendError::Unavailable(
                "the record was not durable in time".to_owned(),
            ))
        })
    }

    /// Seals the active file into a segment; `None` if it holds no record.
    ///
    /// # Errors
    /// [`LogError`]; a disk fault latches the log.
    pub fn seal_now(&self) -> Result<Option<SegmentRef>, LogError> {
        self.inner.with_core(Core::seal)
    }

    /// Does what time asks for: seals by age, evicts, opens the log again after a want of room, and
    /// notices a log file that somebody removed. To be called about once a second.
    pub fn tick(&self, now_unix_ms: u64) {
        self.inner.with_core(|core| core.tick(now_unix_ms));
    }

    /// Evicts what the ladder asks for and receipts license, and accepts decisions again if there is
    /// room. To be called when a licence arrives or the ceiling changes.
    pub fn reclaim(&self) {
        self.inner.with_core(Core::reclaim);
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

    /// The last `count` records with their indexes, oldest first.
    ///
    /// # Errors
    /// [`LogError`] if a sealed segment cannot be read.
    pub fn tail(&self, count: usize) -> Result<Vec<(u64, Vec<u8>)>, LogError> {
        lock(&self.inner.core).tail(count)
    }

    /// Takes a latched log into use again.
    ///
    /// # Errors
    /// [`LogError`] if the disk still refuses; the log stays latched.
    pub fn reopen(&self) -> Result<(), LogError> {
        self.inner.with_core(Core::reopen)
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
        let key = self.inner.key.public();
        {
            let view = lock(&self.inner.view);
            if let Some(signature) = &view.head_signature {
                return view.head.with_signature(&key, signature);
            }
        }
        // A batch has just become durable.
        self.inner.with_core(|core| {
            let signature = core.sign_head();
            core.head().with_signature(&key, &signature)
        })
    }

    /// Sets what is called after each seal, on the thread that sealed.
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
            batches: view.batches,
            at_capacity: view.starved,
            refused_at_capacity: view.refused_at_capacity,
            latched: view.latched.clone(),
        }
    }

    /// Writes what waits and ends the log's threads. Appends after it are refused. Dropping the log
    /// does the same.
    pub fn close(&self) {
        let was_closed = std::mem::replace(&mut lock(&self.inner.queue).closed, true);
        if self.inline && !was_closed {
            self.inner.with_core(Core::close);
        }
        self.inner.arrived.notify_all();
        let threads = std::mem::take(&mut *lock(&self.threads));
        let own = std::thread::current().id();
        for thread in threads {
            // A callback may hold the last reference, and a thread cannot wait for itself.
            if thread.thread().id() != own && thread.join().is_err() {
                tracing::error!("a thread of the audit log panicked");
            }
        }
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        self.close();
    }
}
