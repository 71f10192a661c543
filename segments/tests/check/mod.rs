//! The crash checker: workloads of a few operations, run once on a simulated disk, then cut off
//! before every disk call with every subset of what was not synced that the bound allows. Whatever
//! comes up again is compared with a simple model of what was acknowledged.
//!
//! It uses the public API of the crate only, and the log without threads, so that a case is a
//! function of its numbers. `crash_exhaustive.rs` runs a slice of it, `examples/soak.rs` all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tidelock_segments::testing::{Bound, Fault, Place, SimDisk, Snapshot, Survival, Survivors};
use tidelock_segments::{
    Charge, DiskFault, LogError, RecordClass, SegmentId, VerifiedSegment, merkle, verify_log,
};

use crate::common::{MIB, Node, ROOT, Settings, domain, foreign_segments, receipt};

mod model;

use self::model::{Fact, Model, View, head_of};

/// What a workload is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Op {
    /// One record.
    Append,
    /// Two records in one batch.
    Batch,
    /// Seal the active file.
    Seal,
    /// Put a foreign segment.
    Put,
    /// Put up to three of them together.
    Group,
    /// A receipt for the oldest own segment that has none, which licenses its eviction.
    License,
    /// A ceiling so low that what is licensed is evicted, then the old ceiling again.
    Evict,
    /// Records until the active file is full and another is begun.
    Rotate,
    /// Close and open again.
    Reopen,
}

pub(crate) const OPS: [Op; 9] = [
    Op::Append,
    Op::Batch,
    Op::Seal,
    Op::Put,
    Op::Group,
    Op::License,
    Op::Evict,
    Op::Rotate,
    Op::Reopen,
];

/// What lies on the disk before the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Start {
    /// A root with a key and nothing else: the very first start.
    Empty,
    /// A log with one record.
    Fresh,
    /// Three sealed segments, the oldest licensed, two foreign ones, two records in the active file.
    Grown,
}

/// The ceiling of every run.
pub(crate) const CEILING: u64 = 8 * MIB;
const CUSTODIAN: &str = "n2";
/// Every so manieth image is also judged by `verify_log`.
const VERIFY_EVERY: u64 = 8;
/// A record so large that three of them do not fit into one file.
const LARGE_BYTES: usize = 60_000;
/// A workload as text, `Grown:Append,Seal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) start: Start,
    pub(crate) ops: Vec<Op>,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ops: Vec<String> = self.ops.iter().map(|op| format!("{op:?}")).collect();
        write!(f, "{:?}:{}", self.start, ops.join(","))
    }
}

impl Workload {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (start, ops) = text.split_once(':')?;
        let start = [Start::Empty, Start::Fresh, Start::Grown]
            .into_iter()
            .find(|one| format!("{one:?}") == start)?;
        let one = |name: &str| OPS.into_iter().find(|op| format!("{op:?}") == name);
        let names = ops.split(',').filter(|name| !name.is_empty());
        let ops = names.map(one).collect::<Option<Vec<Op>>>()?;
        Some(Self { start, ops })
    }

    /// All of them with up to so many operations, the short ones first.
    pub(crate) fn all(start: Start, most: usize) -> Vec<Self> {
        let mut out = vec![Vec::new()];
        let mut from = 0;
        for _ in 0..most {
            let until = out.len();
            for i in from..until {
                for op in OPS {
                    let mut longer: Vec<Op> = out[i].clone();
                    longer.push(op);
                    out.push(longer);
                }
            }
            from = until;
        }
        out.into_iter().map(|ops| Self { start, ops }).collect()
    }
}

/// What was seen, so that a run that tests nothing shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Marks(BTreeMap<&'static str, u64>);

impl Marks {
    fn hit(&mut self, name: &'static str) {
        *self.0.entry(name).or_default() += 1;
    }

    fn hit_if(&mut self, name: &'static str, hit: bool) {
        if hit {
            self.hit(name);
        }
    }

    fn count(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Those of the names that were never hit.
    pub(crate) fn missing(&self, names: &[&'static str]) -> Vec<&'static str> {
        let never = |name: &&'static str| self.count(name) == 0;
        names.iter().copied().filter(never).collect()
    }
}

impl fmt::Display for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in &self.0 {
            writeln!(f, "  {count:>9}  {name}")?;
        }
        Ok(())
    }
}

/// What every run of workloads must have met.
pub(crate) const MARKS_OF_CRASHES: [&str; 16] = [
    "a torn tail was cut",
    "a temporary file was left over",
    "a sealed log file was left over",
    "an evicted segment was left over",
    "an eviction record was owed",
    "an eviction was complete",
    "an unacknowledged record survived",
    "an unacknowledged record was lost",
    "one record of a batch of two survived",
    "a segment survived unacknowledged",
    "a segment was lost unacknowledged",
    "a name survived without its data",
    "only the process died",
    "the state file was rewritten",
    "the tree was computed from the first leaf",
    "a recovery was cut off",
];

/// A broken promise, with what is needed to see it again.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) case: String,
    pub(crate) what: String,
}

impl Failure {
    /// The command that shows it again.
    pub(crate) fn command(&self) -> String {
        let mut words = self.case.split(' ');
        match (words.next(), words.next()) {
            (Some("seed"), Some(seed)) => format!("just soak-disk-replay {seed}"),
            (Some(workload), _) => format!(
                "cargo run --release --locked -p tidelock-segments --example soak -- --workload {}",
                workload.trim_end_matches(':')
            ),
            _ => String::new(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n    at {}", self.what, self.case)
    }
}

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// The bound of what survives at each call.
    pub(crate) bound: Bound,
    /// At most so many images per call, evenly taken from those.
    pub(crate) images_per_call: usize,
    /// Every so manieth image is recovered, worked on, and crashed again at every call; 0 is none.
    pub(crate) again_every: u64,
    /// The same for images where only the process died.
    pub(crate) again_every_kill: u64,
    /// The same bound for those.
    pub(crate) bound_again: Bound,
    pub(crate) images_per_call_again: usize,
}

/// The fixed things that all runs share.
pub(crate) struct World {
    foreign: Vec<VerifiedSegment>,
    starts: BTreeMap<Start, (SimDisk, View)>,
}

fn settings() -> Settings {
    Settings {
        ceiling: CEILING,
        reserve: 2 * MIB,
        custody: 1,
        ..Settings::default()
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self {
            foreign: foreign_segments("n9", 6),
            starts: BTreeMap::new(),
        };
        let grown = [
            Op::Append,
            Op::Seal,
            Op::Put,
            Op::Append,
            Op::Batch,
            Op::Seal,
            Op::License,
            Op::Put,
            Op::Append,
            Op::Seal,
            Op::Append,
            Op::Append,
        ];
        for (start, ops) in [
            (Start::Empty, [].as_slice()),
            (Start::Fresh, [Op::Append].as_slice()),
            (Start::Grown, grown.as_slice()),
        ] {
            let disk = SimDisk::new();
            settings().plant_key(&disk);
            let mut model = Model::default();
            if start != Start::Empty {
                let mut run = Run::new(&world, &disk, Model::default());
                run.open().unwrap();
                for op in ops {
                    run.step(*op).unwrap();
                }
                model = run.end();
                // What the workloads begin with is what a power cut leaves of it.
                disk.crash(Survival::None);
            }
            world.starts.insert(start, (disk, model.end()));
        }
        world
    }

    fn start(&self, start: Start) -> (SimDisk, View) {
        let (disk, view) = &self.starts[&start];
        (disk.fork(), view.clone())
    }
}

/// One life of a node on a disk.
struct Run<'a> {
    world: &'a World,
    disk: SimDisk,
    model: Arc<Mutex<Model>>,
    node: Option<Node>,
    appended: u64,
    /// The first error that an operation met.
    refused: Option<String>,
}

impl<'a> Run<'a> {
    fn new(world: &'a World, disk: &SimDisk, model: Model) -> Self {
        Self {
            world,
            disk: disk.clone(),
            appended: model.start.texts,
            model: Arc::new(Mutex::new(model)),
            node: None,
            refused: None,
        }
    }

    fn note(&self, fact: Fact) {
        let at = self.disk.calls();
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.facts.push((at, fact));
    }

    fn end(self) -> Model {
        drop(self.node);
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.clone()
    }

    /// Opens the node. What it presents then, it has to keep.
    fn open(&mut self) -> Result<(), LogError> {
        let node = settings().open_inline(self.disk.disk())?;
        self.node = Some(node);
        self.present();
        self.note(Fact::Settled);
        Ok(())
    }

    /// Notes the head that is shown now, and the records below it that nobody acknowledged by name:
    /// the log's own, and those of before a crash.
    fn present(&self) {
        let Some(node) = &self.node else { return };
        if let Some(head) = head_of(&node.log.checkpoint()) {
            self.note(head);
        }
        let origin = node.log.origin();
        for reference in node.store.refs(&origin, 0, u64::MAX, usize::MAX) {
            if let Some(span) = node.store.audit_span(&reference.id) {
                self.note(Fact::Sealed(reference.id, span));
            }
        }
        if let Ok(records) = node.log.tail(usize::MAX) {
            for (index, record) in records {
                self.note(Fact::Acked(index, record.into()));
            }
        }
    }

    /// Takes a node that met an error into use again, without a restart where that is possible.
    fn heal(&mut self) -> Result<(), String> {
        let Some(node) = &self.node else {
            return self
                .open()
                .map_err(|error| format!("it does not come up: {error}"));
        };
        if node.log.latched().is_some() {
            node.log
                .reopen()
                .map_err(|error| format!("the log does not reopen: {error}"))?;
        }
        if node.store.latched().is_some() {
            node.store
                .reopen()
                .map_err(|error| format!("the store does not reopen: {error}"))?;
        }
        node.log.reclaim();
        self.present();
        self.refused = None;
        self.step(Op::Append).map_err(|error| error.to_string())?;
        self.step(Op::Put).map_err(|error| error.to_string())?;
        match self.refused.take() {
            Some(refused) => Err(format!("refused after the disk was sound again: {refused}")),
            None => Ok(()),
        }
    }

    fn refuse(&mut self, what: impl fmt::Display) {
        self.refused.get_or_insert(what.to_string());
    }

    /// Hands one record in, and what follows it while the log tells its fate.
    fn submit(&mut self, records: Vec<Vec<u8>>) {
        let Some(node) = &self.node else { return };
        let log = Arc::clone(&node.log);
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut rest = records.into_iter();
        let Some(first) = rest.next() else { return };
        let rest: Vec<Vec<u8>> = rest.collect();
        let watch = |record: &[u8]| {
            self.note(Fact::Submitted(record.into()));
            let (disk, model, told) = (
                self.disk.clone(),
                Arc::clone(&self.model),
                Arc::clone(&told),
            );
            let record: Arc<[u8]> = record.into();
            move |result: Result<tidelock_segments::Appended, tidelock_segments::AppendError>| {
                match result {
                    Ok(appended) => {
                        let at = disk.calls();
                        let mut model = model.lock().unwrap_or_else(PoisonError::into_inner);
                        model.facts.push((at, Fact::Acked(appended.index, record)));
                    }
                    Err(error) => told
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(error.to_string()),
                }
            }
        };
        let first_told = watch(&first);
        let mut followers = Vec::new();
        for record in rest {
            let told = watch(&record);
            followers.push((record, told));
        }
        let again = Arc::clone(&log);
        log.submit(
            RecordClass::Decision,
            first,
            Box::new(move |result| {
                first_told(result);
                // Handed in while the log tells of the one before: they are its next batch.
                for (record, told) in followers {
                    again.submit(RecordClass::Decision, record, Box::new(told));
                }
            }),
        );
        let refusals = std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner));
        for refusal in refusals {
            self.refuse(refusal);
        }
        self.present();
    }

    fn text(&mut self) -> Vec<u8> {
        self.appended += 1;
        format!("record {}", self.appended).into_bytes()
    }

    fn large(&mut self) -> Vec<u8> {
        let mut text = self.text();
        let mut word = self.appended;
        while text.len() < LARGE_BYTES {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.extend_from_slice(&word.to_le_bytes());
        }
        text
    }

    fn step(&mut self, op: Op) -> Result<(), LogError> {
        match op {
            Op::Append => {
                let text = self.text();
                self.submit(vec![text]);
            }
            Op::Batch => {
                let texts = (0..3).map(|_| self.text()).collect();
                self.submit(texts);
            }
            Op::Rotate => {
                for _ in 0..3 {
                    let large = self.large();
                    self.submit(vec![large]);
                }
            }
            Op::Seal => {
                let Some(node) = &self.node else {
                    return Ok(());
                };
                if let Err(error) = node.log.seal_now() {
                    self.refuse(error);
                }
                self.present();
            }
            Op::Put => {
                let Some(node) = &self.node else {
                    return Ok(());
                };
                let next =
                    (self.world.foreign.iter()).find(|segment| !node.store.contains(&segment.id()));
                let Some(segment) = next else { return Ok(()) };
                self.note(Fact::Offered(segment.id()));
                match node.store.put(segment, Charge::Normal) {
                    Ok(_) => self.note(Fact::Stored(segment.id())),
                    Err(error) => self.refuse(error),
                }
            }
            Op::Group => {
                let Some(node) = &self.node else {
                    return Ok(());
                };
                let lacking = |segment: &&VerifiedSegment| !node.store.contains(&segment.id());
                let foreign = self.world.foreign.iter().filter(lacking).take(3);
                let group: Vec<&VerifiedSegment> = foreign.collect();
                for segment in &group {
                    self.note(Fact::Offered(segment.id()));
                }
                let outcomes = node.store.put_group(&group, Charge::Normal);
                for (segment, outcome) in group.iter().zip(outcomes) {
                    match outcome {
                        Ok(_) => self.note(Fact::Stored(segment.id())),
                        Err(error) => self.refuse(error),
                    }
                }
            }
            Op::License => {
                let Some(node) = &self.node else {
                    return Ok(());
                };
                let own = own_segments(node);
                let next = own
                    .into_iter()
                    .find(|id| node.store.receipts(id).is_empty());
                let Some(id) = next else { return Ok(()) };
                match node.store.get(&id) {
                    Ok(segment) => {
                        self.note(Fact::Receipt(id));
                        match node.log.take_receipt(&receipt(&segment, CUSTODIAN)) {
                            Ok(()) => self.note(Fact::Licensed(id)),
                            Err(error) => self.refuse(error),
                        }
                    }
                    Err(error) => self.refuse(error),
                }
            }
            Op::Evict => {
                self.note(Fact::Evicting);
                let Some(node) = &self.node else {
                    return Ok(());
                };
                node.root.ledger().set_ceiling(MIB);
                node.log.reclaim();
                node.root.ledger().set_ceiling(CEILING);
                node.log.reclaim();
                self.present();
            }
            Op::Reopen => {
                self.node = None;
                self.open()?;
            }
        }
        Ok(())
    }

    /// All operations; stops where the node does not come up.
    fn work(&mut self, ops: &[Op]) {
        for op in ops {
            if let Err(error) = self.step(*op) {
                self.refuse(error);
                return;
            }
        }
    }
}

/// Own segments that are held, oldest first.
fn own_segments(n: &Node) -> Vec<SegmentId> {
    let origin = n.log.origin();
    let refs = n.store.refs(&origin, 0, u64::MAX, usize::MAX);
    refs.into_iter().map(|reference| reference.id).collect()
}

fn below(disk: &SimDisk, dir: &str) -> BTreeSet<String> {
    let dir = Path::new(ROOT).join(dir);
    let files = disk.files();
    let names = files.iter().filter_map(|path| path.strip_prefix(&dir).ok());
    names.map(|name| name.display().to_string()).collect()
}

/// Whether every segment that must be there is there, in its place or in the quarantine, and at
/// least one is in the quarantine.
fn kept_aside(disk: &SimDisk, view: &View) -> bool {
    let ids: BTreeSet<SegmentId> = disk
        .files()
        .iter()
        .filter_map(|path| disk.content(path))
        .map(|bytes| SegmentId::of(&bytes))
        .collect();
    let mut wanted = view.stored.iter().chain(view.sealed.keys());
    let kept = wanted.all(|id| ids.contains(id) || view.receipts.contains(id));
    kept && !below(disk, "quarantine").is_empty()
}

/// Whether these bytes are a record that the log writes about itself.
fn is_lifecycle(record: &[u8]) -> bool {
    record.starts_with(b"{") && record.windows(7).any(|part| part == b"\"type\":")
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|part| part == needle)
}

macro_rules! demand {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

/// Checks and counts.
pub(crate) struct Checker<'a> {
    world: &'a World,
    effort: Effort,
    pub(crate) marks: Marks,
    verified: BTreeSet<SegmentId>,
    crashes: u64,
    kills: u64,
    /// Images made, reopened, recovered and checked.
    pub(crate) images: u64,
    /// Calls before which the power was cut.
    pub(crate) points: u64,
    pub(crate) workloads: u64,
    pub(crate) failures: Vec<Failure>,
    /// Where to stop collecting failures.
    pub(crate) most_failures: usize,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(world: &'a World, effort: Effort) -> Self {
        Self {
            world,
            effort,
            marks: Marks::default(),
            verified: BTreeSet::new(),
            crashes: 0,
            kills: 0,
            images: 0,
            points: 0,
            workloads: 0,
            failures: Vec::new(),
            most_failures: 10,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.failures.len() >= self.most_failures
    }

    fn fail(&mut self, case: String, what: String) {
        if !self.is_full() {
            self.failures.push(Failure { case, what });
        }
    }

    // ---- one image ----------------------------------------------------------------------------

    /// Opens what a crash has left and checks it against what was acknowledged.
    fn check(&mut self, image: &SimDisk, view: &View) -> Result<Node, String> {
        self.images += 1;
        demand!(
            image.allocated() <= CEILING,
            "{} bytes are allocated after the crash, above the ceiling of {CEILING}",
            image.allocated()
        );
        let tmp = below(image, "tmp");
        let log_files = below(image, "log");
        let audit = below(image, "segments/audit");
        let state = image.content(&Path::new(ROOT).join("log/state"));
        let empty_temp = tmp.iter().any(|name| {
            image
                .content(&Path::new(ROOT).join("tmp").join(name))
                .is_some_and(|content| content.is_empty())
        });
        let n = settings()
            .open_inline(image.disk())
            .map_err(|error| format!("it does not come up: {error}"))?;
        self.marks
            .hit_if("a temporary file was left over", !tmp.is_empty());
        self.marks
            .hit_if("a name survived without its data", empty_temp);
        let gone = |before: &BTreeSet<String>, dir: &str| {
            before.difference(&below(image, dir)).next().is_some()
        };
        self.marks
            .hit_if("a sealed log file was left over", gone(&log_files, "log"));
        self.marks.hit_if(
            "an evicted segment was left over",
            gone(&audit, "segments/audit"),
        );
        self.marks
            .hit_if("a torn tail was cut", n.recovery.truncated_bytes > 0);
        let state_now = image.content(&Path::new(ROOT).join("log/state"));
        self.marks
            .hit_if("the state file was rewritten", state != state_now);
        self.check_node(image, &n, view, false)?;
        Ok(n)
    }

    fn check_node(
        &mut self,
        image: &SimDisk,
        n: &Node,
        view: &View,
        after_errors: bool,
    ) -> Result<(), String> {
        let recovery = &n.recovery;
        demand!(
            recovery.new_incarnation.is_none() && n.log.incarnation() == 1,
            "a new incarnation: {recovery:?}"
        );
        demand!(
            recovery.quarantined.is_empty(),
            "called damage: {recovery:?}"
        );
        let quarantine = below(image, "quarantine");
        demand!(quarantine.is_empty(), "in quarantine: {quarantine:?}");
        if let Some(why) = n.log.latched() {
            return Err(format!("the log is latched: {why}"));
        }
        if let Some(why) = n.store.latched() {
            return Err(format!("the store is latched: {why}"));
        }
        let held = self.check_records(n, view)?;
        self.check_heads(n, view, &held)?;
        self.check_segments(image, n, view, &held)?;
        self.check_space(image, n, after_errors)?;
        // A third opinion that shares no code with the recovery, and costs as much as all the rest.
        if !self.images.is_multiple_of(VERIFY_EVERY) {
            return Ok(());
        }
        let report = verify_log(image, Path::new(ROOT), &domain())
            .map_err(|error| format!("verify_log: {error}"))?;
        demand!(report.ok, "verify_log finds {report:?}");
        Ok(())
    }

    fn check_records(&mut self, n: &Node, view: &View) -> Result<BTreeMap<u64, Arc<[u8]>>, String> {
        let tail = n
            .log
            .tail(usize::MAX)
            .map_err(|error| format!("tail: {error}"))?;
        let size = n.log.size();
        let first = tail.first().map_or(size, |(index, _)| *index);
        let next = tail.last().map_or(first, |(index, _)| *index + 1);
        demand!(
            next == size && tail.len() as u64 == size - first,
            "{} records from {first} where the size is {size}",
            tail.len()
        );
        let held: BTreeMap<u64, Arc<[u8]>> = tail
            .into_iter()
            .map(|(index, record)| (index, record.into()))
            .collect();
        demand!(
            first == 0 || view.evicting,
            "records below {first} are gone, and nothing was evicted"
        );
        for (index, record) in view.acked.range(first..) {
            demand!(
                held.get(index) == Some(record),
                "record {index} was acknowledged as {:?} and is {:?}",
                show(record),
                held.get(index).map(|record| show(record))
            );
        }
        let open = view.open();
        let mut survived = 0usize;
        let mut seen = BTreeSet::new();
        for (index, record) in &held {
            demand!(
                view.acked.get(index) == Some(record)
                    || open.contains(record)
                    || is_lifecycle(record),
                "record {index} is {:?}, which nobody handed in there",
                show(record)
            );
            let once = seen.insert(record) || is_lifecycle(record);
            demand!(once, "record {index} is there twice: {:?}", show(record));
            survived += usize::from(open.contains(record));
        }
        self.marks
            .hit_if("an unacknowledged record survived", survived > 0);
        self.marks
            .hit_if("an unacknowledged record was lost", survived < open.len());
        self.marks.hit_if(
            "one record of a batch of two survived",
            open.len() == 2 && survived == 1,
        );
        Ok(held)
    }

    /// INV-16, INV-17: every head that was ever shown is a prefix of the log now.
    fn check_heads(
        &mut self,
        n: &Node,
        view: &View,
        held: &BTreeMap<u64, Arc<[u8]>>,
    ) -> Result<(), String> {
        demand!(
            view.forked.is_none(),
            "two heads of size {:?} were shown",
            view.forked
        );
        let size = n.log.size();
        let largest = view.heads.keys().next_back().copied().unwrap_or(0);
        demand!(
            largest <= size,
            "a head of size {largest} was shown, and the size is {size}"
        );
        let now = head_of(&n.log.checkpoint()).ok_or("the checkpoint cannot be read")?;
        let first = held.keys().next().copied().unwrap_or(size);
        let record = |index| held.get(&index).or_else(|| view.acked.get(&index));
        let leaves: Option<Vec<_>> = (0..size)
            .map(|index| record(index).map(|record| merkle::leaf_hash(record)))
            .collect();
        let Some(leaves) = leaves else {
            return Err(format!("the records below {first} were never seen"));
        };
        self.marks.hit("the tree was computed from the first leaf");
        let mut heads = view.heads.clone();
        if let Fact::Head(size, root) = now {
            let old = heads.insert(size, root);
            demand!(
                old.is_none_or(|old| old == root),
                "the head of size {size} has another root now"
            );
        }
        for (size, root) in heads {
            let prefix = usize::try_from(size)
                .ok()
                .and_then(|size| leaves.get(..size));
            demand!(
                prefix.is_some_and(|prefix| merkle::root(prefix) == root),
                "the head of size {size} is no prefix of the log"
            );
        }
        Ok(())
    }

    fn check_segments(
        &mut self,
        image: &SimDisk,
        n: &Node,
        view: &View,
        held: &BTreeMap<u64, Arc<[u8]>>,
    ) -> Result<(), String> {
        for id in &view.stored {
            demand!(n.store.contains(id), "segment {id} was stored and is gone");
        }
        let min_index = n.log.stat().min_index;
        for (id, span) in &view.sealed {
            if n.store.contains(id) {
                demand!(
                    span.last >= min_index,
                    "segment {id} is held, though the cursor at {min_index} says it was evicted"
                );
                continue;
            }
            demand!(
                view.evicting && view.receipts.contains(id),
                "own segment {id} is gone without a licence"
            );
            demand!(
                span.last < min_index,
                "segment {id} ({}..={}) is gone, and the cursor stands at {min_index}",
                span.first,
                span.last
            );
            let hex = id.to_string();
            let told =
                |record: &Arc<[u8]>| is_lifecycle(record) && contains(record, hex.as_bytes());
            // The record of it may have been evicted in its turn.
            let first = held.keys().next().copied().unwrap_or(0);
            let mut before = view.acked.range(..first);
            demand!(
                before.any(|(_, record)| told(record)) || held.values().any(told),
                "segment {id} is gone, and no record tells of it"
            );
            self.marks.hit("an eviction was complete");
            let before = view.acked.values().any(told);
            self.marks.hit_if("an eviction record was owed", !before);
        }
        for reference in n.store.list(None) {
            let id = reference.id;
            // What was verified once needs no second look while its bytes have the same hash.
            let hex = id.to_string().replace("blake3:", "");
            let file = format!("{ROOT}/segments/{}/{hex}.seg", reference.kind);
            let bytes = image.content(Path::new(&file)).unwrap_or_default();
            if SegmentId::of(&bytes) != id || self.verified.insert(id) {
                n.store
                    .get(&id)
                    .map_err(|error| format!("{id} is listed, and: {error}"))?;
            }
            let own = reference.origin == n.log.origin();
            demand!(
                own || view.offered.contains(&id),
                "nobody stored segment {id}"
            );
        }
        let open = view.offered.difference(&view.stored);
        for id in open {
            let survived = n.store.contains(id);
            self.marks
                .hit_if("a segment survived unacknowledged", survived);
            self.marks
                .hit_if("a segment was lost unacknowledged", !survived);
        }
        for id in &view.licensed {
            if n.store.contains(id) {
                demand!(
                    !n.store.receipts(id).is_empty(),
                    "the receipt for {id} is lost"
                );
            }
        }
        Ok(())
    }

    /// INV-04: never above the ceiling, and the ledger knows of every byte.
    fn check_space(&self, image: &SimDisk, n: &Node, after_errors: bool) -> Result<(), String> {
        let usage = n.root.ledger().usage();
        let walked = n
            .root
            .measure()
            .map_err(|error| format!("measure: {error}"))?;
        // After an error that was done all the same, bytes may stay charged until the next start;
        // never may bytes be there that are not.
        let exact = usage.allocated_bytes == walked;
        demand!(
            exact || (after_errors && usage.allocated_bytes > walked),
            "the ledger says {} and a walk {walked}",
            usage.allocated_bytes
        );
        demand!(
            usage.overrun_bytes == 0,
            "a write took {} bytes too many",
            usage.overrun_bytes
        );
        demand!(
            image.peak_allocated() <= CEILING,
            "{} bytes were allocated, above the ceiling of {CEILING}",
            image.peak_allocated()
        );
        Ok(())
    }

    /// A node that came up must go on.
    fn goes_on(&self, n: &Node) -> Result<(), String> {
        let size = n.log.size();
        let appended = n
            .append(b"it goes on")
            .map_err(|error| format!("an append: {error}"))?;
        demand!(
            appended.index >= size,
            "the next index is {} of {size}",
            appended.index
        );
        Ok(())
    }

    // ---- crashes ------------------------------------------------------------------------------

    /// Cuts a history off before every call that was recorded.
    fn cut(&mut self, snapshots: &[Snapshot], model: &Model, depth: usize, case: &str) {
        let (bound, most) = match depth {
            0 => (self.effort.bound, self.effort.images_per_call),
            _ => (self.effort.bound_again, self.effort.images_per_call_again),
        };
        let mut seen = BTreeSet::new();
        for snapshot in snapshots {
            if self.is_full() {
                return;
            }
            let (facts, view) = model.before(snapshot.call());
            let choices = snapshot.survivors(&bound);
            let step = choices.len().div_ceil(most.max(1)).max(1);
            let mut fresh = false;
            for (number, survivors) in choices.iter().enumerate() {
                // None and all are always tried.
                if number > 1 && number % step != 0 && number + 1 != choices.len() {
                    continue;
                }
                if !seen.insert((facts, snapshot.key(survivors))) {
                    continue;
                }
                fresh = true;
                let (op, path) = snapshot.next();
                let case = format!(
                    "{case} call {} ({op} {}) image {number}",
                    snapshot.call(),
                    path.display()
                );
                self.image(snapshot, survivors, &view, depth, &case);
            }
            self.points += u64::from(fresh);
        }
    }

    fn image(
        &mut self,
        snapshot: &Snapshot,
        survivors: &Survivors,
        view: &View,
        depth: usize,
        case: &str,
    ) {
        let image = snapshot.image(survivors);
        self.marks
            .hit_if("only the process died", survivors.is_kill());
        // After the death of a process alone, what it had not synced looks as if it were: worth more.
        let (count, every) = match survivors.is_kill() {
            true => (&mut self.kills, self.effort.again_every_kill),
            false => (&mut self.crashes, self.effort.again_every),
        };
        *count += u64::from(depth == 0);
        let again = depth == 0 && every > 0 && count.is_multiple_of(every);
        let checked = match self.check(&image, view) {
            Ok(n) => self.goes_on(&n),
            Err(what) => Err(what),
        };
        if let Err(what) = checked {
            return self.fail(case.to_owned(), what);
        }
        if again {
            let disk = snapshot.image(survivors);
            let op = OPS[usize::try_from(self.crashes + self.kills).unwrap_or(0) % OPS.len()];
            self.again(&disk, view, op, case);
        }
    }

    /// Recovers, does one thing more, and crashes again: at every call of the recovery and of it.
    fn again(&mut self, disk: &SimDisk, view: &View, op: Op, case: &str) {
        disk.record();
        let mut run = Run::new(self.world, disk, Model::from(view.clone()));
        let case = format!("{case} then {op:?}");
        if let Err(error) = run.open() {
            return self.fail(case, format!("it does not come up: {error}"));
        }
        let recovered_at = disk.calls();
        run.work(&[op]);
        if let Some(refused) = run.refused.take() {
            return self.fail(case, format!("refused: {refused}"));
        }
        let snapshots = disk.recorded();
        let model = run.end();
        self.marks.hit_if(
            "a recovery was cut off",
            snapshots.iter().any(|s| s.call() <= recovered_at),
        );
        self.cut(&snapshots, &model, 1, &case);
    }

    /// One workload, cut off everywhere.
    pub(crate) fn workload(&mut self, workload: &Workload) {
        self.workloads += 1;
        let (disk, view) = self.world.start(workload.start);
        let mut run = Run::new(self.world, &disk, Model::from(view));
        // Opening alone is the empty workload; it is not cut off again with every other one.
        if workload.ops.is_empty() {
            disk.record();
        }
        if let Err(error) = run.open() {
            return self.fail(workload.to_string(), format!("it does not open: {error}"));
        }
        if !workload.ops.is_empty() {
            disk.record();
        }
        run.work(&workload.ops);
        if let Some(refused) = run.refused.take() {
            return self.fail(workload.to_string(), format!("without a crash: {refused}"));
        }
        let snapshots = disk.recorded();
        let model = run.end();
        self.cut(&snapshots, &model, 0, &workload.to_string());
    }
}

/// What must be seen under a disk that fails or lies.
pub(crate) const MARKS_OF_FAULTS: [&str; 8] = [
    "an error was answered and nothing was lost",
    "an error latched the log",
    "an error latched the store",
    "the start was refused by a reading error",
    "a lie was found at the start",
    "a lie was found when reading",
    "a lie was found by verify_log",
    "a lie that only a peer can tell",
];

// ---- errors and lies --------------------------------------------------------------------------

impl Checker<'_> {
    /// How many writing and reading calls a workload makes, and at which numbers they begin.
    fn calls_of(&self, workload: &Workload) -> Option<(u64, u64)> {
        let (disk, view) = self.world.start(workload.start);
        let mut run = Run::new(self.world, &disk, Model::from(view));
        run.open().ok()?;
        let from = disk.calls();
        run.work(&workload.ops);
        Some((from, disk.calls()))
    }

    /// One call after the other of a workload goes wrong; then the disk is sound again. Whatever was
    /// acknowledged is there: after a crash at once, after reopening without a restart, and after a
    /// crash then.
    pub(crate) fn errors(&mut self, workload: &Workload, fault: &Fault, standing: bool) {
        let Some((from, to)) = self.calls_of(workload) else {
            return;
        };
        for at in from + 1..=to {
            if self.is_full() {
                return;
            }
            let case = format!(
                "{workload} with {fault:?} {} call {at}",
                if standing { "from" } else { "in" }
            );
            if let Err(what) = self.error(workload, fault, standing, at) {
                self.fail(case, what);
            }
        }
    }

    fn error(
        &mut self,
        workload: &Workload,
        fault: &Fault,
        standing: bool,
        at: u64,
    ) -> Result<(), String> {
        let (disk, view) = self.world.start(workload.start);
        let mut run = Run::new(self.world, &disk, Model::from(view));
        run.open().map_err(|error| error.to_string())?;
        if standing {
            disk.inject_from(at, fault.clone());
        } else {
            disk.inject(at, fault.clone());
        }
        run.work(&workload.ops);
        disk.repair();
        if let Some(node) = &run.node {
            self.marks
                .hit_if("an error latched the log", node.log.latched().is_some());
            self.marks
                .hit_if("an error latched the store", node.store.latched().is_some());
        }
        let now = |run: &Run<'_>| {
            run.model
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .end()
        };
        let before = (disk.snapshot(), now(&run));
        for survival in [Survival::None, Survival::All, Survival::Seed(at)] {
            let n = self
                .check(&before.0.crash(survival), &before.1)
                .map_err(|what| format!("after a crash at once, {survival:?}: {what}"))?;
            self.goes_on(&n)?;
        }
        run.heal()?;
        let view = now(&run);
        if let Some(node) = &run.node {
            self.check_node(&disk, node, &view, true)
                .map_err(|what| format!("reopened: {what}"))?;
        }
        for survival in [Survival::None, Survival::Seed(at)] {
            self.check(&disk.snapshot().crash(survival), &view)
                .map_err(|what| format!("after reopening and a crash, {survival:?}: {what}"))?;
        }
        self.marks.hit("an error was answered and nothing was lost");
        Ok(())
    }

    /// One reading call after the other fails while the node starts and works; it may refuse, and
    /// the next start, on a sound disk, has everything.
    pub(crate) fn reading_errors(&mut self, workload: &Workload) {
        let mut at = 0;
        loop {
            at += 1;
            let (disk, view) = self.world.start(workload.start);
            let mut run = Run::new(self.world, &disk, Model::from(view));
            disk.fail_reading(disk.readings() + at, DiskFault::Os(5));
            let case = format!("{workload} with reading call {at} failing");
            let until = disk.readings() + at;
            match run.open() {
                Ok(()) => run.work(&workload.ops),
                Err(_) => self.marks.hit("the start was refused by a reading error"),
            }
            if disk.readings() < until || self.is_full() {
                return;
            }
            disk.repair();
            let view = run.end().end();
            match self.check(&disk.fork(), &view) {
                Ok(_) => self.marks.hit("a reading error changed nothing"),
                // What could not be read may have been put aside, never away.
                Err(_) if kept_aside(&disk, &view) => {
                    self.marks.hit("a reading error put a segment aside");
                }
                Err(what) => self.fail(case, what),
            }
        }
    }

    /// From one call after the other the device lies.
    pub(crate) fn lies(&mut self, workload: &Workload) {
        let Some((from, to)) = self.calls_of(workload) else {
            return;
        };
        let elsewhere = |path: &str, offset| Place {
            path: Some(Path::new(ROOT).join(path)),
            offset,
        };
        let same = |offset| Place { path: None, offset };
        let faults = [
            (Fault::LostSync, true),
            (Fault::LostSync, false),
            (Fault::LostWrite, false),
            (Fault::Misdirected(same(8192)), false),
            (Fault::Misdirected(elsewhere("log/1-0.log", 4096)), false),
            (Fault::Duplicated(elsewhere("log/state", 0)), false),
            (Fault::Duplicated(same(4096)), false),
            (Fault::Flipped { byte: 40, bits: 4 }, false),
        ];
        for at in from + 1..=to {
            for (fault, standing) in &faults {
                if self.is_full() {
                    return;
                }
                let case = format!("{workload} with {fault:?} at call {at}");
                let (disk, view) = self.world.start(workload.start);
                let mut run = Run::new(self.world, &disk, Model::from(view));
                if run.open().is_err() {
                    continue;
                }
                if *standing {
                    disk.inject_from(at, fault.clone());
                } else {
                    disk.inject(at, fault.clone());
                }
                run.work(&workload.ops);
                let snapshot = disk.snapshot();
                let view = run.end().end();
                for survival in [Survival::None, Survival::Seed(at), Survival::All] {
                    if let Err(what) = self.check_true(&snapshot.crash(survival), &view) {
                        self.fail(format!("{case}, {survival:?}"), what);
                    }
                }
            }
        }
    }

    /// One bit after the other of every file changes while the node is down.
    pub(crate) fn flips(&mut self, workload: &Workload, every: usize) {
        let (disk, view) = self.world.start(workload.start);
        let mut run = Run::new(self.world, &disk, Model::from(view));
        if run.open().is_err() {
            return;
        }
        run.work(&workload.ops);
        let snapshot = disk.snapshot();
        let view = run.end().end();
        let image = snapshot.crash(Survival::None);
        for path in image.files() {
            let content = image.content(&path).unwrap_or_default();
            // The tail of a prepared file is all zeros: a few of those tell as much as all.
            let used = content
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |last| last + 1);
            let offsets = (0..used)
                .step_by(every)
                .chain((used..content.len()).step_by(16 * 1024));
            for offset in offsets {
                if self.is_full() {
                    return;
                }
                let image = image.fork();
                image.flip(&path, offset, 1 << (offset % 8));
                if let Err(what) = self.check_true(&image, &view) {
                    let case = format!(
                        "{workload} with a bit of {} byte {offset} changed",
                        path.display()
                    );
                    self.fail(case, what);
                }
            }
        }
    }

    /// Ruling 24: under a device that lies, what is served is true, and what is missing is found:
    /// here, or, where the end of the log is gone as if it had never been, by the first peer.
    fn check_true(&mut self, image: &SimDisk, view: &View) -> Result<(), String> {
        self.images += 1;
        let n = match settings().open_inline(image.disk()) {
            Ok(n) => n,
            Err(_) => {
                self.marks.hit("a lie was found at the start");
                return Ok(());
            }
        };
        // What the background does on every node: a file that the index does not tell of is taken in.
        while !n.store.survey(64).map_err(|error| error.to_string())? {}
        let recovery = &n.recovery;
        let mut found = recovery.new_incarnation.is_some()
            || !recovery.quarantined.is_empty()
            || recovery.truncated_bytes > 0
            || !below(image, "quarantine").is_empty();
        self.marks.hit_if("a lie was found at the start", found);
        let same = n.log.incarnation() == 1;
        let records = match n.log.tail(usize::MAX) {
            Ok(records) => records,
            Err(_) => {
                self.marks.hit("a lie was found when reading");
                found = true;
                Vec::new()
            }
        };
        let mut served = BTreeMap::new();
        for (index, record) in records {
            let record: Arc<[u8]> = record.into();
            let known =
                same && (view.acked.get(&index) == Some(&record) || view.open().contains(&record));
            demand!(
                known || is_lifecycle(&record),
                "record {index} is served as {:?}, which nobody handed in there",
                show(&record)
            );
            served.insert(index, record);
        }
        for reference in n.store.list(None) {
            let own = reference.origin.audit_node() == Some("n1");
            match n.store.get(&reference.id) {
                Ok(segment) => {
                    demand!(
                        segment.id() == reference.id,
                        "{} is served as another",
                        reference.id
                    );
                    demand!(
                        own || view.offered.contains(&reference.id),
                        "nobody stored segment {}",
                        reference.id
                    );
                }
                Err(_) => {
                    self.marks.hit("a lie was found when reading");
                    found = true;
                }
            }
        }
        // What only the log itself wrote may be written again.
        let lost = |(index, record): &(&u64, &Arc<[u8]>)| served.get(index) != Some(record);
        let evicted_below = match view.evicting {
            true => n.log.stat().min_index,
            false => 0,
        };
        let acked = view.acked.range(evicted_below..);
        let missing: BTreeSet<u64> = acked.filter(lost).map(|(index, _)| *index).collect();
        if missing.is_empty() || found {
            return Ok(());
        }
        let report = verify_log(image, Path::new(ROOT), &domain());
        if report.is_ok_and(|report| report.ok) {
            let first = missing.first().copied().unwrap_or(0);
            let after = view
                .acked
                .range(first..)
                .find(|(index, _)| !missing.contains(index));
            demand!(
                after.is_none(),
                "records {missing:?} are missing in the middle, and nothing tells"
            );
            self.marks.hit("a lie that only a peer can tell");
        } else {
            self.marks.hit("a lie was found by verify_log");
        }
        Ok(())
    }

    // ---- random runs --------------------------------------------------------------------------

    /// A longer run that the seed gives: lives of a node, each ended by a loss of power or a kill.
    /// Gives the digest of the disk at the end.
    pub(crate) fn random(&mut self, seed: u64) -> [u8; 32] {
        let mut random = Dice(seed);
        let starts = [Start::Empty, Start::Fresh, Start::Grown];
        let (mut disk, mut view) = self.world.start(starts[random.below(3)]);
        let lives = 2 + random.below(6);
        for life in 0..lives {
            let ops: Vec<Op> = (0..1 + random.below(12))
                .map(|_| OPS[random.below(OPS.len())])
                .collect();
            let case = format!("seed {seed} life {life} {ops:?}");
            disk.record();
            let mut run = Run::new(self.world, &disk, Model::from(view.clone()));
            if let Err(error) = run.open() {
                self.fail(case, format!("it does not come up: {error}"));
                return disk.digest();
            }
            let faulty = random.below(4) == 0;
            if faulty {
                let fault = match random.below(2) {
                    0 => DiskFault::Os(5),
                    _ => DiskFault::NoSpace,
                };
                disk.inject(disk.calls() + 1 + random.next() % 60, Fault::Fail(fault));
            }
            run.work(&ops);
            disk.repair();
            if faulty {
                if let Err(what) = run.heal() {
                    self.fail(case, what);
                    return disk.digest();
                }
            } else if let Some(refused) = run.refused.take() {
                self.fail(case, format!("refused: {refused}"));
                return disk.digest();
            }
            let snapshots = disk.recorded();
            let model = run.end();
            let snapshot = &snapshots[random.below(snapshots.len())];
            view = model.before(snapshot.call()).1;
            let choices = snapshot.survivors(&Bound::LARGE.with_seed(random.next()));
            let survivors = &choices[random.below(choices.len())];
            self.points += 1;
            let checked = match self.check(&snapshot.image(survivors), &view) {
                Ok(n) => self.goes_on(&n),
                Err(what) => Err(what),
            };
            disk = snapshot.image(survivors);
            if let Err(what) = checked {
                self.fail(format!("{case} call {}", snapshot.call()), what);
                return disk.digest();
            }
        }
        disk.digest()
    }
}

/// A sequence of pseudo-random numbers (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: usize) -> usize {
        usize::try_from(self.next() % count as u64).unwrap_or(0)
    }
}

fn show(record: &[u8]) -> String {
    let text = String::from_utf8_lossy(record);
    text.chars().take(80).collect()
}
