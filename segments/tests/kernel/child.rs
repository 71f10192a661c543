//! The child: a node's root under load, which says on its standard output what was acknowledged.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tidelock_segments::testing::unchecked_endorsement;
use tidelock_segments::{
    AppendError, AuditLog, Charge, Checkpoint, Kind, Ladder, LogError, PutOutcome, RealDisk,
    RecordClass, Recovery, Root, SegmentRef, Store, StoreError, VerifiedSegment, merkle,
    origin_line, read_records, verify_segment,
};

use crate::Random;
use crate::common::{KIB, Settings, domain, node, receipt};
use crate::protocol::{ORDERS, Orders, Report, Work};

/// What an append may take (evidence.md): after it the answer is a refusal.
pub(crate) const APPEND_LIMIT: Duration = Duration::from_millis(250);
/// The slot that is written again and again.
pub(crate) const SLOT: &str = "state/slot";

/// Unbuffered lines on a copy of standard output. A line is shorter than a pipe's atomic write.
struct Out(File);

impl Out {
    fn new() -> Self {
        let copy = std::io::stdout().as_fd().try_clone_to_owned().unwrap();
        let mut out = File::from(copy);
        // Ends what the test runner has begun to print.
        out.write_all(b"\n").unwrap();
        Self(out)
    }

    fn say(&self, report: &Report) {
        let mut line = serde_json::to_vec(report).unwrap();
        line.push(b'\n');
        assert!(line.len() <= 4096, "{report:?}");
        (&self.0).write_all(&line).unwrap();
    }
}

struct Node {
    root: Arc<Root>,
    store: Arc<Store>,
    log: Arc<AuditLog>,
    settings: Settings,
    out: Out,
    orders: Orders,
    /// Sealed segments of another node.
    foreign: Vec<VerifiedSegment>,
}

/// Where the child begins. `false`: this process is no child.
pub(crate) fn run() -> bool {
    let Some(orders) = std::env::var_os(ORDERS) else {
        return false;
    };
    crate::die_with_parent();
    let orders: Orders = serde_json::from_str(orders.to_str().unwrap()).unwrap();
    let out = Out::new();
    let settings = settings(&orders);
    let foreign = foreign(&orders.foreign);
    let inline = matches!(orders.work, Work::Script { inline: true });
    // Calls that a trace can be cut at: what comes after them is the root's. So many that the numbers
    // of the root's calls are larger than those of any call with which a process starts.
    for _ in 0..crate::faults::MARKS {
        let _ = File::open(crate::faults::MARK);
    }
    let began = Instant::now();
    let (root, store, log, recovery) = match open(&settings, inline) {
        Ok(opened) => opened,
        Err(error) => {
            out.say(&Report::Failed {
                op: "open".to_owned(),
                why: error.to_string(),
            });
            return true;
        }
    };
    out.say(&Report::Opened {
        records: recovery.records,
        truncated_bytes: recovery.truncated_bytes,
        quarantined: recovery.quarantined,
        new_incarnation: recovery.new_incarnation,
        us: us(began),
    });
    let node = Node {
        root,
        store,
        log,
        settings,
        out,
        orders,
        foreign,
    };
    match node.orders.work.clone() {
        Work::Load { .. } => node.load(),
        Work::Script { .. } => node.script(),
        Work::Fill => node.fill(),
    }
    node.log.close();
    node.out.say(&Report::Ended {
        latched: node.log.latched().or_else(|| node.store.latched()),
    });
    true
}

/// The settings that parent and child share.
pub(crate) fn settings(orders: &Orders) -> Settings {
    // Leaked once a process: the settings take a plain path.
    let path: &'static str = Box::leak(orders.root.to_str().unwrap().to_owned().into());
    Settings {
        path,
        ceiling: orders.ceiling_bytes,
        reserve: orders.reserve_bytes,
        segment_bytes: orders.segment_bytes,
        ..Settings::default()
    }
}

type Opened = (Arc<Root>, Arc<Store>, Arc<AuditLog>, Recovery);

fn open(settings: &Settings, inline: bool) -> Result<Opened, LogError> {
    let root = settings.open_root(Arc::new(RealDisk::new()))?;
    let store = Store::open(Arc::clone(&root), domain())?;
    let name = node(settings.node);
    let how = if inline {
        AuditLog::open_inline
    } else {
        AuditLog::open
    };
    let (log, recovery) = how(
        Arc::clone(&root),
        Arc::clone(&store),
        settings.config(),
        &|key, incarnation| Ok(unchecked_endorsement(&name, key, incarnation)),
    )?;
    Ok((root, store, log, recovery))
}

fn us(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap()
}

/// The segments of another node, as they were left in a directory.
fn foreign(dir: &Path) -> Vec<VerifiedSegment> {
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path| verify_segment(std::fs::read(path).unwrap(), None, &domain()).unwrap();
    paths.into_iter().map(read).collect()
}

impl Node {
    fn failed(&self, op: &str, why: &dyn std::fmt::Display) {
        let why = why.to_string().chars().take(1000).collect();
        self.out.say(&Report::Failed {
            op: op.to_owned(),
            why,
        });
    }

    fn append(&self, class: RecordClass, bytes: Vec<u8>) -> Result<(), AppendError> {
        let expected = merkle::leaf_hash(&bytes);
        let began = Instant::now();
        let answer = self.log.append_wait(class, bytes, APPEND_LIMIT);
        let us = us(began);
        match answer {
            Ok(appended) => {
                assert_eq!(appended.leaf, expected);
                self.out.say(&Report::Acked {
                    index: appended.index,
                    leaf: appended.leaf,
                    us,
                });
                Ok(())
            }
            Err(error) => {
                let (name, why) = match &error {
                    AppendError::Capacity => ("Capacity", String::new()),
                    AppendError::Unavailable(why) => ("Unavailable", why.clone()),
                    AppendError::QueueFull => ("QueueFull", String::new()),
                    other => ("Other", other.to_string()),
                };
                self.out.say(&Report::Refused {
                    error: name.to_owned(),
                    why,
                    us,
                });
                Err(error)
            }
        }
    }

    fn head(&self) {
        let note = self.log.checkpoint();
        let line = origin_line(&domain(), &self.log.origin()).unwrap();
        Checkpoint::verify(&note, &line, &self.log.public_key()).unwrap();
        self.out.say(&Report::Head { note });
    }

    fn slot(&self, number: u64, bytes: usize) {
        let mut content = format!("{number}\n").into_bytes();
        content.resize(content.len() + bytes, b'.');
        self.out.say(&Report::Slotting { number });
        match self.root.write_atomic(SLOT, &content, Charge::Reserve) {
            Ok(()) => self.out.say(&Report::Slot { number }),
            Err(error) => self.failed("slot", &error),
        }
    }

    fn put(&self, segment: &VerifiedSegment) -> Result<(), StoreError> {
        let id = segment.id();
        self.out.say(&Report::Putting { id });
        match self.store.put(segment, Charge::Normal) {
            Ok(outcome) => {
                let stored = outcome == PutOutcome::Stored;
                self.out.say(&Report::Put { id, stored });
                Ok(())
            }
            Err(error) => {
                self.failed("put", &error);
                Err(error)
            }
        }
    }

    fn remove_oldest_foreign(&self) {
        let own = self.settings.node;
        let oldest = self
            .store
            .list(Some(Kind::Audit))
            .into_iter()
            .find(|reference| reference.origin.audit_node() != Some(own));
        let Some(SegmentRef { id, .. }) = oldest else {
            return;
        };
        self.out.say(&Report::Removing { id });
        match self.store.remove(&id) {
            Ok(()) => self.out.say(&Report::Removed { id }),
            Err(error) => self.failed("remove", &error),
        }
    }

    fn seal(&self) {
        match self.log.seal_now() {
            Ok(Some(reference)) => self.out.say(&Report::Sealed { id: reference.id }),
            Ok(None) => {}
            Err(error) => self.failed("seal", &error),
        }
    }

    /// A custodian's receipt for an own segment. Its leaves are told first, for after the receipt it
    /// may be gone.
    fn license(&self, reference: &SegmentRef) -> bool {
        let segment = match self.store.get(&reference.id) {
            Ok(segment) => segment,
            Err(error) => {
                self.failed("get", &error);
                return false;
            }
        };
        let records = read_records(&segment).unwrap();
        for some in records.chunks(40) {
            let leaves = some.iter().map(|(_, r)| merkle::leaf_hash(r)).collect();
            let first = some[0].0;
            self.out.say(&Report::Leaves { first, leaves });
        }
        let (first, last) = (records[0].0, records[records.len() - 1].0);
        self.out.say(&Report::Licensing { first, last });
        match self.log.take_receipt(&receipt(&segment, "n2")) {
            Ok(()) => true,
            Err(error) => {
                self.failed("receipt", &error);
                false
            }
        }
    }

    fn own(&self) -> Vec<SegmentRef> {
        self.store.own_audit(&node(self.settings.node))
    }

    fn mend(&self) {
        let mended = if self.log.latched().is_some() {
            self.log.reopen().map_err(|e| e.to_string())
        } else if self.store.latched().is_some() {
            self.store.reopen().map_err(|e| e.to_string())
        } else {
            return;
        };
        let why = mended.err().unwrap_or_default();
        self.out.say(&Report::Reopened { why });
    }

    // ---- load ---------------------------------------------------------------------------------

    fn load(&self) {
        let Work::Load {
            seed,
            writers,
            largest_record_bytes,
            for_ms,
            licence,
            mend,
        } = self.orders.work
        else {
            return;
        };
        let over = AtomicBool::new(false);
        let goes_on = || !over.load(Ordering::SeqCst);
        let pause = |ms| std::thread::sleep(Duration::from_millis(ms));
        std::thread::scope(|scope| {
            for thread in 0..writers {
                scope.spawn(move || self.write(seed, thread, largest_record_bytes, &goes_on));
            }
            scope.spawn(move || {
                let began = Instant::now();
                let start = self.settings.clock.load(Ordering::SeqCst);
                while goes_on() {
                    pause(10);
                    let now = start + us(began) / 1000;
                    self.settings.clock.store(now, Ordering::SeqCst);
                    self.log.tick(now);
                    if mend {
                        self.mend();
                    }
                }
            });
            scope.spawn(move || {
                let mut random = Random::new(seed ^ 0x5ea1);
                while goes_on() {
                    pause(random.below(60));
                    self.seal();
                    self.head();
                }
            });
            if licence {
                scope.spawn(move || {
                    let mut licensed = BTreeSet::new();
                    while goes_on() {
                        pause(5);
                        for reference in self.own() {
                            let wanted = self.root.ledger().ladder() >= Ladder::Warn;
                            let id = reference.id;
                            if wanted
                                && goes_on()
                                && !licensed.contains(&id)
                                && self.license(&reference)
                            {
                                licensed.insert(id);
                            }
                        }
                    }
                });
            }
            scope.spawn(move || {
                let mut random = Random::new(seed ^ 0xf0);
                while goes_on() {
                    let at = random.below(self.foreign.len() as u64);
                    if let Err(StoreError::Ceiling(_)) =
                        self.put(&self.foreign[usize::try_from(at).unwrap()])
                    {
                        self.remove_oldest_foreign();
                    }
                    pause(random.below(10));
                }
            });
            scope.spawn(move || {
                let mut random = Random::new(seed ^ 0x510);
                let held = self.root.read(SLOT).unwrap_or_default().unwrap_or_default();
                let mut number = slot_number(&held).unwrap_or(0);
                while goes_on() {
                    number += 1;
                    self.slot(number, usize::try_from(random.below(60 * KIB)).unwrap());
                    let _ = self.store.scrub(256 * KIB);
                    pause(random.below(20));
                }
            });
            pause(for_ms);
            over.store(true, Ordering::SeqCst);
        });
    }

    fn write(&self, seed: u64, thread: u64, largest: u64, goes_on: &dyn Fn() -> bool) {
        let mut random = Random::new(seed ^ (thread << 32));
        let mut number = 0u64;
        while goes_on() {
            number += 1;
            let mut bytes = format!("seed {seed} thread {thread} record {number} ").into_bytes();
            // Mostly small, now and then large.
            let most = if random.below(8) == 0 { largest } else { 600 };
            let more = usize::try_from(random.below(most)).unwrap();
            bytes.resize(bytes.len() + more, b'x');
            let class = match random.below(20) {
                0 => RecordClass::State,
                1 | 2 => RecordClass::Denial,
                _ => RecordClass::Decision,
            };
            if self.append(class, bytes).is_err() {
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    }

    // ---- script -------------------------------------------------------------------------------

    /// Every operation once or twice. It ends however many of them fail.
    fn script(&self) {
        let append = |text: &str| {
            let _ = self.append(RecordClass::Decision, text.as_bytes().to_vec());
        };
        append("script one");
        append("script two");
        self.seal();
        append("script three");
        let _ = self.put(&self.foreign[0]);
        self.slot(1_000, 5_000);
        self.seal();
        append("script four");
        // The oldest is evicted: room is short for as long as the receipt is taken.
        let ledger = self.root.ledger();
        if let Some(oldest) = self.own().first() {
            let usage = ledger.usage();
            let used = usage.allocated_bytes + usage.reserved_bytes;
            ledger.set_ceiling(used + self.orders.reserve_bytes);
            self.license(oldest);
            ledger.set_ceiling(self.orders.ceiling_bytes);
            self.log.reclaim();
        }
        append("script five");
        self.slot(1_001, 100);
        self.remove_oldest_foreign();
        self.log.tick(1_700_000_000_500);
        if let Err(error) = self.store.scrub(u64::MAX) {
            self.failed("scrub", &error);
        }
        self.head();
        // What is latched is reopened; after one fault everything works again, at the latest when this
        // was done twice.
        for last in ["script six", "script seven"] {
            self.mend();
            self.mend();
            self.out.say(&Report::Mended);
            append(last);
            let _ = self.put(&self.foreign[0]);
            self.seal();
        }
        if let Err(error) = self.log.tail(usize::MAX) {
            self.failed("tail", &error);
        }
    }

    // ---- fill ---------------------------------------------------------------------------------

    fn fill(&self) {
        let record = |class, size: u64| {
            let mut bytes = format!("fill {} ", self.log.size()).into_bytes();
            bytes.resize(usize::try_from(size).unwrap(), b'f');
            self.append(class, bytes)
        };
        while record(RecordClass::Decision, 16 * KIB).is_ok() {}
        for segment in &self.foreign {
            if self.put(segment).is_err() {
                break;
            }
        }
        while record(RecordClass::State, 16 * KIB).is_ok() {}
        let mut number = 0;
        for bytes in [256 * KIB, 64 * KIB, 4 * KIB] {
            let content = vec![b's'; usize::try_from(bytes).unwrap()];
            while self
                .root
                .write_atomic(&format!("state/fill-{number}"), &content, Charge::Reserve)
                .is_ok()
            {
                number += 1;
            }
        }
        self.out.say(&Report::Full);
        std::thread::sleep(Duration::from_millis(100));
        for number in 0..number {
            self.root.remove(&format!("state/fill-{number}")).unwrap();
        }
        for reference in self.own() {
            // Some may be gone already, by the receipts before.
            self.license(&reference);
        }
        self.out.say(&Report::Mended);
        let began = Instant::now();
        let mut acked = 0;
        while acked < 20 && began.elapsed() < Duration::from_secs(5) {
            match record(RecordClass::Decision, 16 * KIB) {
                Ok(()) => acked += 1,
                Err(_) => {
                    // As a node does, though more often.
                    std::thread::sleep(Duration::from_millis(50));
                    self.log.tick(self.settings.clock.load(Ordering::SeqCst));
                }
            }
        }
        if acked == 0 {
            let usage = self.root.ledger().usage();
            let ladder = self.root.ledger().ladder();
            let own = self.own().len();
            self.failed(
                "recovery",
                &format!(
                    "{own} own segments, {ladder:?}, {usage:?}, {:?}",
                    self.log.stat()
                ),
            );
        }
    }
}

/// The number in a slot's content.
pub(crate) fn slot_number(content: &[u8]) -> Option<u64> {
    let line = content.split(|byte| *byte == b'\n').next()?;
    std::str::from_utf8(line).ok()?.parse().ok()
}
