//! The parent's side: the running child, its allocated bytes, and what it has promised.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tidelock_segments::testing::SimDisk;
use tidelock_segments::{
    AuditReport, Charge, Checkpoint, LogError, RealDisk, SegmentId, Sha256Hash, merkle,
    origin_line, read_records, verify_log, verify_segment,
};

use crate::child::{SLOT, settings, slot_number};
use crate::common::{KIB, LONG, MIB, Node, Settings, domain};
use crate::protocol::{ORDERS, Orders, Report, Work};

/// How often the allocated bytes are read.
const POLL: Duration = Duration::from_millis(10);

/// A directory with a root and the segments of another node, and orders for it.
pub(crate) fn orders(dir: &Path, ceiling_bytes: u64, work: Work) -> Orders {
    Orders {
        root: dir.join("root"),
        ceiling_bytes,
        reserve_bytes: MIB,
        segment_bytes: 128 * KIB,
        foreign: dir.join("foreign"),
        work,
    }
}

/// A directory for files whose syncs need not be slow: in memory, where there is such a place.
pub(crate) fn quick_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Leaves segments of another node in a directory, together larger than a quarter of 16 MiB.
pub(crate) fn leave_foreign(dir: &Path, count: usize, record_bytes: usize) {
    std::fs::create_dir_all(dir).unwrap();
    let other = Settings {
        node: "n9",
        ceiling: 256 * MIB,
        ..Settings::default()
    }
    .sim(&SimDisk::new());
    for number in 0..count {
        let mut record = format!("foreign {number} ").into_bytes();
        record.resize(record.len() + record_bytes, b'z');
        // Not compressible, so that it is as large sealed as it is here.
        let mut random = crate::Random::new(number as u64);
        record.iter_mut().skip(20).for_each(|byte| {
            *byte = u8::try_from(random.below(256)).unwrap();
        });
        other.append(&record).unwrap();
        let sealed = other.log.seal_now().unwrap().unwrap();
        let segment = other.store.get(&sealed.id).unwrap();
        std::fs::write(dir.join(format!("{number:04}")), segment.bytes()).unwrap();
    }
}

// ---- the child ----------------------------------------------------------------------------------

#[derive(Default)]
struct Heard {
    reports: Vec<Report>,
    ended: bool,
}

type Shared = Arc<(Mutex<Heard>, Condvar)>;

/// A running child. Dropped, it is killed.
pub(crate) struct Running {
    child: Child,
    heard: Shared,
    reader: Option<JoinHandle<()>>,
    complaint: Option<JoinHandle<String>>,
}

/// The command that makes this program a child. `before` is what runs it, such as a tracer.
pub(crate) fn command(orders: &Orders, before: &[String]) -> Command {
    let own = std::env::current_exe().unwrap();
    let mut command = match before {
        [] => Command::new(&own),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(&own);
            command
        }
    };
    command
        .args(["--exact", "child_process", "--include-ignored"])
        .args(["--nocapture", "--test-threads=1"])
        // Cargo names its directories there, and the loader tries each of them: calls that are not ours.
        .env_remove("LD_LIBRARY_PATH")
        .env(ORDERS, serde_json::to_string(orders).unwrap());
    command
}

impl Running {
    pub(crate) fn start(orders: &Orders, before: &[String]) -> Self {
        let mut child = command(orders, before)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let heard = Shared::default();
        let (lines, hears) = (
            BufReader::new(child.stdout.take().unwrap()),
            Arc::clone(&heard),
        );
        let reader = std::thread::spawn(move || {
            for line in lines.lines() {
                // What the test runner prints is no report.
                let report = line.ok().and_then(|l| serde_json::from_str(&l).ok());
                if let Some(report) = report {
                    hears.0.lock().unwrap().reports.push(report);
                    hears.1.notify_all();
                }
            }
            hears.0.lock().unwrap().ended = true;
            hears.1.notify_all();
        });
        let mut errors = child.stderr.take().unwrap();
        let complaint = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = std::io::Read::read_to_end(&mut errors, &mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self {
            child,
            heard,
            reader: Some(reader),
            complaint: Some(complaint),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn heard(&self) -> Vec<Report> {
        self.heard.0.lock().unwrap().reports.clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.heard.0.lock().unwrap().reports.len()
    }

    /// Waits until one of the reports from this number on is as wanted. `false`: the child ended, or
    /// it took too long.
    pub(crate) fn wait_for(
        &self,
        from: usize,
        limit: Duration,
        wanted: impl Fn(&Report) -> bool,
    ) -> bool {
        let until = Instant::now() + limit;
        let mut heard = self.heard.0.lock().unwrap();
        loop {
            if heard.reports.iter().skip(from).any(&wanted) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if heard.ended || left.is_zero() {
                return false;
            }
            heard = self.heard.1.wait_timeout(heard, left).unwrap().0;
        }
    }

    pub(crate) fn opened(&self) -> bool {
        self.wait_for(0, LONG, |r| matches!(r, Report::Opened { .. }))
    }

    fn finish(&mut self) -> (ExitStatus, Vec<Report>, String) {
        let status = self.child.wait().unwrap();
        let complaint = self.complaint.take().unwrap().join().unwrap();
        self.reader.take().unwrap().join().unwrap();
        let reports = std::mem::take(&mut self.heard.0.lock().unwrap().reports);
        (status, reports, complaint)
    }

    /// SIGKILL, and then everything that it still said.
    pub(crate) fn kill(mut self) -> Vec<Report> {
        self.child.kill().unwrap();
        let (_, reports, complaint) = self.finish();
        assert!(!complaint.contains("panicked"), "{complaint}");
        reports
    }

    /// Waits for its own end, which must be an orderly one.
    pub(crate) fn end(mut self, limit: Duration) -> Vec<Report> {
        let until = Instant::now() + limit;
        while self.child.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < until,
                "the child hangs; it said last: {:?}",
                self.heard().last()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let (status, reports, complaint) = self.finish();
        assert!(status.success(), "{status}: {complaint} {reports:?}");
        reports
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.reader.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

// ---- allocated bytes ----------------------------------------------------------------------------

/// One look at a root: its allocated bytes, and the names and inodes that were counted.
fn look(root: &Path, pid: Option<u32>) -> (u64, BTreeSet<(PathBuf, u64)>) {
    let mut bytes = 0;
    let mut seen = BTreeSet::new();
    let mut counted = BTreeSet::new();
    let mut count = |meta: &Metadata| {
        // A file that is renamed meanwhile is met twice.
        if counted.insert((meta.dev(), meta.ino())) {
            bytes += meta.blocks() * 512;
        }
    };
    let Ok(top) = std::fs::symlink_metadata(root) else {
        return (0, seen);
    };
    let mut todo = vec![root.to_owned()];
    count(&top);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.path().symlink_metadata() else {
                continue;
            };
            count(&meta);
            seen.insert((entry.path(), meta.ino()));
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    // Ruling 23: unlinked files count for as long as they are open.
    if let Some(pid) = pid {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
        for entry in fds.into_iter().flatten().flatten() {
            if let Ok(meta) = std::fs::metadata(entry.path())
                && meta.dev() == top.dev()
                && meta.nlink() == 0
                && meta.is_file()
            {
                count(&meta);
                seen.insert((entry.path(), meta.ino()));
            }
        }
    }
    (bytes, seen)
}

/// The allocated bytes of a root. While it is being written a look is not one moment: one above the
/// limit counts only if the same files were there before and after.
pub(crate) fn allocated(root: &Path, pid: Option<u32>, limit: u64) -> u64 {
    let mut first = look(root, pid);
    for _ in 0..20 {
        if first.0 <= limit {
            break;
        }
        let second = look(root, pid);
        if first.1 == second.1 {
            return first.0.min(second.0);
        }
        first = second;
    }
    first.0
}

/// What the polls saw.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Polled {
    pub(crate) polls: u64,
    pub(crate) peak_bytes: u64,
    /// The most bytes above the ceiling; must be 0.
    pub(crate) over_bytes: u64,
}

impl Polled {
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            polls: self.polls + other.polls,
            peak_bytes: self.peak_bytes.max(other.peak_bytes),
            over_bytes: self.over_bytes.max(other.over_bytes),
        }
    }
}

/// Reads the allocated bytes every 10 ms until stopped.
pub(crate) struct Poller {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Polled>,
}

impl Poller {
    pub(crate) fn start(root: &Path, pid: u32, ceiling_bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stops, root) = (Arc::clone(&stop), root.to_owned());
        let thread = std::thread::spawn(move || {
            let mut polled = Polled::default();
            while !stops.load(Ordering::SeqCst) {
                let bytes = allocated(&root, Some(pid), ceiling_bytes);
                polled = polled.and(Polled {
                    polls: 1,
                    peak_bytes: bytes,
                    over_bytes: bytes.saturating_sub(ceiling_bytes),
                });
                std::thread::sleep(POLL);
            }
            polled
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) -> Polled {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

// ---- promises -----------------------------------------------------------------------------------

/// Everything that a root's children have promised so far.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    /// The leaf of every record that is known to be durable, by index.
    leaves: Vec<Option<Sha256Hash>>,
    /// Leaves that were told when the disk may have been cut off already.
    doubtful: BTreeMap<u64, Sha256Hash>,
    /// The tree over the leaves from 0 without a hole, and heads that were signed and are to be checked.
    tree: merkle::Frontier,
    heads: BTreeMap<u64, Sha256Hash>,
    /// Records below this may have been evicted.
    licensed_below: u64,
    /// Whether a segment of another node must be held, must not be, or may be.
    foreign: BTreeMap<SegmentId, Option<bool>>,
    slot_acked: u64,
    slot_begun: u64,
    opened: bool,
    pub(crate) figures: Figures,
}

/// Counts over all rounds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    pub(crate) acked: u64,
    pub(crate) refused: BTreeMap<String, u64>,
    pub(crate) slowest_ack_us: u64,
    pub(crate) slowest_refusal_us: u64,
    pub(crate) slowest_open_us: u64,
    pub(crate) sealed: u64,
    pub(crate) put: u64,
    pub(crate) removed: u64,
    pub(crate) evicted_records: u64,
    pub(crate) heads_checked: u64,
    pub(crate) torn: u64,
    /// Records that were not acknowledged and are there nevertheless, the log's own included.
    pub(crate) unknown_there: u64,
    pub(crate) failed: BTreeMap<String, u64>,
}

impl Promises {
    /// Takes note of what a child said.
    pub(crate) fn hear(&mut self, reports: &[Report]) {
        for report in reports {
            self.hear_one(report);
        }
    }

    /// Takes note of what was said when the disk may have been cut off already: it may be so, or not.
    pub(crate) fn hear_doubtful(&mut self, reports: &[Report]) {
        for report in reports {
            match report {
                Report::Acked { index, leaf, .. } => {
                    self.doubtful.insert(*index, *leaf);
                }
                Report::Leaves { first, leaves } => {
                    self.doubtful.extend((*first..).zip(leaves.iter().copied()));
                }
                Report::Put { id, .. } | Report::Removed { id } => {
                    self.foreign.insert(*id, None);
                }
                Report::Opened { .. }
                | Report::Licensing { .. }
                | Report::Putting { .. }
                | Report::Removing { .. }
                | Report::Slotting { .. }
                | Report::Refused { .. }
                | Report::Failed { .. } => self.hear_one(report),
                Report::Head { .. }
                | Report::Sealed { .. }
                | Report::Slot { .. }
                | Report::Reopened { .. }
                | Report::Mended
                | Report::Full
                | Report::Ended { .. } => {}
            }
        }
    }

    fn learn(&mut self, index: u64, leaf: Sha256Hash, what: &str) {
        let at = usize::try_from(index).unwrap();
        if self.leaves.len() <= at {
            self.leaves.resize(at + 1, None);
        }
        match self.leaves[at].replace(leaf) {
            Some(known) => assert_eq!(known, leaf, "{what}: record {index} changed"),
            None if what == "acked" => {}
            None => self.figures.unknown_there += 1,
        }
    }

    fn hear_one(&mut self, report: &Report) {
        let figures = &mut self.figures;
        match report {
            Report::Opened {
                quarantined,
                new_incarnation,
                truncated_bytes,
                us,
                ..
            } => {
                assert!(quarantined.is_empty(), "false damage: {quarantined:?}");
                assert_eq!(*new_incarnation, None, "a new incarnation");
                figures.torn += u64::from(*truncated_bytes > 0);
                figures.slowest_open_us = figures.slowest_open_us.max(*us);
                self.opened = true;
            }
            Report::Acked { index, leaf, us } => {
                figures.acked += 1;
                figures.slowest_ack_us = figures.slowest_ack_us.max(*us);
                self.learn(*index, *leaf, "acked");
            }
            Report::Refused { error, us, .. } => {
                *figures.refused.entry(error.clone()).or_default() += 1;
                figures.slowest_refusal_us = figures.slowest_refusal_us.max(*us);
            }
            Report::Head { note } => {
                let head = Checkpoint::parse(note).unwrap();
                let before = self.heads.insert(head.size, head.root);
                assert!(before.is_none_or(|root| root == head.root), "a forked head");
            }
            Report::Leaves { first, leaves } => {
                for (index, leaf) in (*first..).zip(leaves) {
                    self.learn(index, *leaf, "sealed");
                }
            }
            Report::Licensing { last, .. } => {
                self.licensed_below = self.licensed_below.max(last + 1);
            }
            Report::Sealed { .. } => figures.sealed += 1,
            Report::Putting { id } => {
                let held = self.foreign.entry(*id).or_default();
                *held = held.filter(|held| *held);
            }
            Report::Put { id, stored } => {
                figures.put += u64::from(*stored);
                self.foreign.insert(*id, Some(true));
            }
            Report::Removing { id } => {
                self.foreign.insert(*id, None);
            }
            Report::Removed { id } => {
                figures.removed += 1;
                self.foreign.insert(*id, Some(false));
            }
            Report::Slotting { number } => self.slot_begun = self.slot_begun.max(*number),
            Report::Slot { number } => self.slot_acked = self.slot_acked.max(*number),
            Report::Failed { op, why } => {
                // Without paths and figures, so that they can be counted.
                let why: Vec<_> = why
                    .split(' ')
                    .filter(|word| !word.contains(|c: char| c == '/' || c.is_ascii_digit()))
                    .take(8)
                    .collect();
                let what = format!("{op}: {}", why.join(" "));
                *figures.failed.entry(what).or_default() += 1;
            }
            Report::Reopened { .. } | Report::Mended | Report::Full | Report::Ended { .. } => {}
        }
    }

    /// The files alone, without the lock: the audit log verifies, nothing was set aside as damaged,
    /// and everything acknowledged is in it.
    pub(crate) fn check_files(&mut self, orders: &Orders) -> Option<AuditReport> {
        if !self.opened {
            return None;
        }
        let report = verify_log(&RealDisk::new(), &orders.root, &domain()).unwrap();
        assert!(report.ok, "{report:#?}");
        assert!(report.quarantined.is_empty(), "{report:#?}");
        let own = report.origins.iter().find(|o| o.own).unwrap();
        assert!(
            own.size >= self.leaves.len() as u64,
            "{} records of {} known ones",
            own.size,
            self.leaves.len()
        );
        assert!(own.evicted_below <= self.licensed_below);
        let mut found = 0;
        let dir = orders.root.join("segments/audit");
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|e| e != "seg") {
                continue;
            }
            let segment = verify_segment(std::fs::read(path).unwrap(), None, &domain()).unwrap();
            if segment.header().origin != own.origin {
                continue;
            }
            for (index, record) in read_records(&segment).unwrap() {
                self.learn(index, merkle::leaf_hash(&record), "offline");
                found += 1;
            }
        }
        assert_eq!(found, own.records - own.active_records);
        Some(report)
    }

    /// Opens the root in this process, compares everything with what was promised, and closes it.
    pub(crate) fn check_open(&mut self, orders: &Orders) {
        let settings = settings(orders);
        let n = reopen(&settings).unwrap();
        assert_eq!(n.recovery.new_incarnation, None);
        assert!(n.recovery.quarantined.is_empty(), "{:?}", n.recovery);
        self.opened = true;
        self.figures.torn += u64::from(n.recovery.truncated_bytes > 0);
        self.compare(&n);
        n.log.close();
        assert_eq!(n.log.latched(), None);
        n.assert_ledger();
    }

    /// Compares a running node with what was promised.
    pub(crate) fn compare(&mut self, n: &Node) {
        let records = n.records();
        let size = n.log.size();
        let first = records.first().map_or(size, |(index, _)| *index);
        assert!(first <= self.licensed_below, "evicted without a licence");
        assert_eq!(first, n.log.stat().min_index);
        assert_eq!(size - first, records.len() as u64);
        assert!(size >= self.leaves.len() as u64, "acknowledged and gone");
        self.figures.evicted_records = first;
        for ((index, record), expected) in records.iter().zip(first..) {
            assert_eq!(*index, expected);
            self.learn(*index, merkle::leaf_hash(record), "read");
        }
        self.check_heads(n);
        for (id, held) in &self.foreign {
            if let Some(held) = held {
                assert_eq!(n.store.contains(id), *held, "{id}");
            }
            if n.store.contains(id) {
                n.store.get(id).unwrap();
            }
        }
        let slot = n.root.read(SLOT).unwrap();
        let slot = slot.map_or(Some(0), |content| slot_number(&content));
        let slot = slot.expect("a whole slot");
        assert!(
            (self.slot_acked..=self.slot_begun).contains(&slot),
            "slot {slot} of {}..={}",
            self.slot_acked,
            self.slot_begun
        );
    }

    /// The log is consistent with every head that was ever signed and told.
    fn check_heads(&mut self, n: &Node) {
        let line = origin_line(&domain(), &n.log.origin()).unwrap();
        let now = Checkpoint::verify(&n.log.checkpoint(), &line, &n.log.public_key()).unwrap();
        self.heads.insert(now.size, now.root);
        for (size, root) in std::mem::take(&mut self.heads) {
            assert!(size >= self.tree.size(), "a head of the past");
            while self.tree.size() < size {
                let at = usize::try_from(self.tree.size()).unwrap();
                let known = self.leaves.get(at).copied().flatten();
                let leaf = known.or_else(|| self.doubtful.get(&self.tree.size()).copied());
                self.tree
                    .append(leaf.expect("a record that nobody ever saw"));
            }
            assert_eq!(self.tree.root(), root, "a head over {size} records");
            self.figures.heads_checked += 1;
        }
        assert_eq!(self.tree.size(), now.size);
    }

    pub(crate) fn known(&self) -> u64 {
        self.leaves.len() as u64
    }
}

/// Opens a root in this process. A child that was just killed may hold its lock for a moment longer.
pub(crate) fn reopen(settings: &Settings) -> Result<Node, LogError> {
    settings.open(Arc::new(RealDisk::new()))
}

/// Puts one foreign segment in this process.
pub(crate) fn put_one(
    n: &Node,
    dir: &Path,
    number: usize,
) -> Result<(), tidelock_segments::StoreError> {
    let bytes = std::fs::read(dir.join(format!("{number:04}"))).unwrap();
    let segment = verify_segment(bytes, None, &domain()).unwrap();
    n.store.put(&segment, Charge::Normal).map(|_| ())
}
