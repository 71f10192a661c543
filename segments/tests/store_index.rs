//! The store's index: starts that do not depend on what is stored, rebuilds that lose nothing, and
//! what the store knows without reading segments.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use common::{KIB, MIB, ROOT, Settings, domain, foreign_segments, ids, node, receipt};
use proptest::prelude::*;
use tidelock_segments::testing::{SimDisk, Survival, unsigned_segment};
use tidelock_segments::{
    Charge, Disk, DiskError, DiskFault, DiskFile, FileStat, Kind, Ladder, OpenMode, Origin,
    PutOutcome, Root, SegmentId, SegmentRef, Store, StoreError, VerifiedSegment, Volume,
    verify_segment,
};

fn open(disk: &Arc<dyn Disk>) -> (Arc<Root>, Arc<Store>) {
    let root = Settings::default().open_root(Arc::clone(disk)).unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    (root, store)
}

fn open_sim(disk: &SimDisk) -> (Arc<Root>, Arc<Store>) {
    open(&disk.disk())
}

fn segment_file(id: &SegmentId) -> PathBuf {
    Path::new(ROOT).join(format!("segments/audit/{}.seg", id.hex()))
}

fn below(disk: &SimDisk, dir: &str) -> Vec<PathBuf> {
    let dir = Path::new(ROOT).join(dir);
    disk.files()
        .into_iter()
        .filter(|path| path.starts_with(&dir))
        .collect()
}

fn delete(disk: &SimDisk, paths: &[PathBuf]) {
    for path in paths {
        disk.remove(path).unwrap();
        disk.sync_dir(path.parent().unwrap()).unwrap();
    }
}

fn assert_ledger(root: &Root) {
    let usage = root.ledger().usage();
    assert_eq!(usage.allocated_bytes, root.measure().unwrap(), "{usage:?}");
    assert_eq!(usage.overrun_bytes, 0);
}

/// Passes every call on and counts it.
#[derive(Debug)]
struct Counting {
    disk: Arc<dyn Disk>,
    calls: Arc<AtomicU64>,
}

#[derive(Debug)]
struct CountingFile {
    file: Box<dyn DiskFile>,
    calls: Arc<AtomicU64>,
}

macro_rules! counted {
    ($of:ident, $self:ident . $inner:ident, $call:ident ( $($arg:expr),* )) => {{
        $self.calls.fetch_add(1, Ordering::SeqCst);
        $self.$inner.$call($($arg),*)
    }};
}

impl Counting {
    fn wrap(&self, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        Box::new(CountingFile {
            file,
            calls: Arc::clone(&self.calls),
        })
    }
}

impl Disk for Counting {
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError> {
        counted!(Disk, self.disk, canonical(path))
    }
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError> {
        counted!(Disk, self.disk, open(path, mode)).map(|file| self.wrap(file))
    }
    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        counted!(Disk, self.disk, lock(path))
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        counted!(Disk, self.disk, rename(from, to))
    }
    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        counted!(Disk, self.disk, remove(path))
    }
    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        counted!(Disk, self.disk, create_dir(path))
    }
    fn sync_dir(&self, path: &Path) -> Result<(), DiskError> {
        counted!(Disk, self.disk, sync_dir(path))
    }
    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError> {
        counted!(Disk, self.disk, read_dir(path))
    }
    fn stat(&self, path: &Path) -> Result<FileStat, DiskError> {
        counted!(Disk, self.disk, stat(path))
    }
    fn volume(&self, path: &Path) -> Result<Volume, DiskError> {
        counted!(Disk, self.disk, volume(path))
    }
    fn boot_id(&self) -> Result<String, DiskError> {
        counted!(Disk, self.disk, boot_id())
    }
    fn own_uid(&self) -> u32 {
        self.disk.own_uid()
    }
}

impl DiskFile for CountingFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        counted!(DiskFile, self.file, read_at(offset, buffer))
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        counted!(DiskFile, self.file, write_at(offset, bytes))
    }
    fn sync_data(&self) -> Result<(), DiskError> {
        counted!(DiskFile, self.file, sync_data())
    }
    fn allocate(&self, len: u64) -> Result<(), DiskError> {
        counted!(DiskFile, self.file, allocate(len))
    }
    fn zero_fill(&self, len: u64) -> Result<(), DiskError> {
        counted!(DiskFile, self.file, zero_fill(len))
    }
    fn stat(&self) -> Result<FileStat, DiskError> {
        counted!(DiskFile, self.file, stat())
    }
}

/// Opens root and store and tells how many calls that took.
fn calls_of_a_start(disk: &SimDisk) -> (u64, u64) {
    let calls = Arc::new(AtomicU64::new(0));
    let counting: Arc<dyn Disk> = Arc::new(Counting {
        disk: disk.disk(),
        calls: Arc::clone(&calls),
    });
    let (root, store) = open(&counting);
    let made = calls.load(Ordering::SeqCst);
    assert_eq!(store.recovery().rebuilt, None);
    assert_ledger(&root);
    (made, store.recovery().replayed)
}

const NAMES: [&str; 20] = [
    "a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "b0", "b1", "b2", "b3", "b4", "b5",
    "b6", "b7", "b8", "b9",
];

#[test]
fn a_start_takes_as_many_calls_with_two_thousand_segments_as_with_ten() {
    let mut starts = Vec::new();
    for count in [10usize, 2000] {
        let disk = SimDisk::new();
        let (root, store) = open_sim(&disk);
        // Many short logs: a simulated disk gets slow with what lies on it.
        for name in NAMES.iter().take(count.div_ceil(100)) {
            for segment in foreign_segments(name, count.min(100)) {
                store.put(&segment, Charge::Normal).unwrap();
            }
        }
        drop((root, store));
        disk.kill();
        let (after_work, replayed) = calls_of_a_start(&disk);
        assert!(replayed > 0 && replayed <= 128, "{replayed}");
        let (calls, replayed) = calls_of_a_start(&disk);
        assert_eq!(replayed, 0);
        // Looking at a file and at its receipts, and writing its entry: a few calls each.
        assert!(after_work <= calls + 128 * 6, "{after_work}");
        starts.push(calls);
        let (_root, store) = open_sim(&disk);
        assert_eq!(store.audit_totals().0, count as u64);
    }
    assert_eq!(starts[0], starts[1]);
    assert!(starts[0] < 100, "{starts:?}");
}

/// Sealed segments of three logs, made once.
fn material() -> &'static [VerifiedSegment] {
    static MADE: OnceLock<Vec<VerifiedSegment>> = OnceLock::new();
    MADE.get_or_init(|| {
        ["n7", "n8", "n9"]
            .into_iter()
            .flat_map(|name| foreign_segments(name, 8))
            .collect()
    })
}

#[derive(Debug, Clone)]
enum Step {
    Put(usize),
    Remove(usize),
    Receipt(usize, usize),
    Quarantine(usize),
    Condemn(usize),
    Reopen,
    Crash(u64),
    LoseIndex,
    /// The power goes at this call of the next step.
    CutOff(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = 0..24usize;
    let step = prop_oneof![
        8 => which.clone().prop_map(Step::Put),
        4 => which.clone().prop_map(Step::Remove),
        3 => (which.clone(), 0..3usize).prop_map(|(w, c)| Step::Receipt(w, c)),
        1 => which.prop_map(Step::Quarantine),
        1 => (0..3usize).prop_map(Step::Condemn),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(Step::Crash),
        1 => Just(Step::LoseIndex),
        3 => (1..16u64, any::<u64>()).prop_map(|(at, seed)| Step::CutOff(at, seed)),
    ];
    proptest::collection::vec(step, 1..60)
}

const CUSTODIANS: [&str; 3] = ["n2", "n3", "n4"];

/// What should be held: the segment's number, and the custodians of it.
type Model = BTreeMap<usize, BTreeSet<&'static str>>;

fn held(store: &Store) -> Model {
    let number = |id: &SegmentId| material().iter().position(|s| s.id() == *id).unwrap();
    let listed = store.list(Some(Kind::Audit));
    assert!(listed.is_sorted_by_key(|r| (r.origin.clone(), r.sequence)));
    listed
        .iter()
        .map(|reference| {
            let segment = &material()[number(&reference.id)];
            assert_eq!(*reference, segment.reference());
            assert_eq!(store.audit_span(&reference.id), segment.audit_span());
            let custodians: BTreeSet<_> = store
                .receipts(&reference.id)
                .iter()
                .map(|r| *CUSTODIANS.iter().find(|c| r.custodian == node(c)).unwrap())
                .collect();
            assert_eq!(store.custodian_count(&reference.id), custodians.len());
            assert_eq!(store.custodians(&reference.id).len(), custodians.len());
            (number(&reference.id), custodians)
        })
        .collect()
}

/// Everything that the index tells, derived from the list.
fn assert_consistent(store: &Store) {
    let listed = store.list(Some(Kind::Audit));
    assert_eq!(store.audit_totals().0, listed.len() as u64);
    let heads = store.heads();
    let origins: BTreeSet<Origin> = listed.iter().map(|r| r.origin.clone()).collect();
    assert_eq!(
        heads.iter().map(|h| h.origin.clone()).collect::<Vec<_>>(),
        origins.iter().cloned().collect::<Vec<_>>()
    );
    for head in heads {
        let of: Vec<&SegmentRef> = listed.iter().filter(|r| r.origin == head.origin).collect();
        let expected = tidelock_segments::Head::from_sequences(
            head.origin.clone(),
            of.iter().map(|r| r.sequence),
            of.last().unwrap().id,
        );
        assert_eq!(head, expected);
        assert_eq!(store.first(&head.origin).as_ref(), Some(of[0]));
        assert_eq!(store.last(&head.origin).as_ref(), of.last().copied());
        let of_node = node(head.origin.audit_node().unwrap());
        for required in 0..4 {
            let lacking: Vec<_> = of
                .iter()
                .filter(|r| store.custodian_count(&r.id) < required)
                .map(|r| r.id)
                .collect();
            let told = store.lacking_custody(&of_node, required, None, 1000);
            assert_eq!(ids(&told), lacking);
            assert_eq!(
                store.lacking_custody_count(&of_node, required),
                lacking.len() as u64
            );
            let without = node("n3");
            let told = store.lacking_custody(&of_node, required, Some(&without), 1000);
            let lacking: Vec<_> = lacking
                .into_iter()
                .filter(|id| !store.custodians(id).contains(&without))
                .collect();
            assert_eq!(ids(&told), lacking);
        }
    }
}

fn run(steps: &[Step]) {
    let disk = SimDisk::new();
    let (mut root, mut store) = open_sim(&disk);
    store.set_own_node(&node("n9"));
    let mut model = Model::new();
    let mut cut: Option<u64> = None;
    for step in steps {
        let before = model.clone();
        let segment = |which: &usize| &material()[*which];
        let again = |root: &mut Arc<Root>, store: &mut Arc<Store>| {
            let (r, s) = open_sim(&disk);
            (*root, *store) = (r, s);
            store.set_own_node(&node("n9"));
        };
        let mut outcome: Result<(), StoreError> = Ok(());
        match step {
            Step::CutOff(at, seed) => {
                disk.crash_at_call(disk.calls() + at);
                cut = Some(*seed);
                continue;
            }
            Step::Put(which) => match store.put(segment(which), Charge::Normal) {
                Ok(PutOutcome::Stored) => {
                    assert!(model.insert(*which, BTreeSet::new()).is_none());
                }
                Ok(PutOutcome::AlreadyHeld) => assert!(model.contains_key(which)),
                Err(error) => outcome = Err(error),
            },
            Step::Remove(which) => match store.remove(&segment(which).id()) {
                Ok(()) => assert!(model.remove(which).is_some()),
                Err(StoreError::NotHeld(_)) => assert!(!model.contains_key(which)),
                Err(error) => outcome = Err(error),
            },
            Step::Quarantine(which) => match store.quarantine(&segment(which).id(), "test") {
                Ok(_) => assert!(model.remove(which).is_some()),
                Err(StoreError::NotHeld(_)) => assert!(!model.contains_key(which)),
                Err(error) => outcome = Err(error),
            },
            Step::Receipt(which, custodian) => {
                let custodian = CUSTODIANS[*custodian];
                match store.put_receipt(&receipt(segment(which), custodian)) {
                    Ok(()) => {
                        model.get_mut(which).unwrap().insert(custodian);
                    }
                    Err(StoreError::NotHeld(_)) => assert!(!model.contains_key(which)),
                    Err(error) => outcome = Err(error),
                }
            }
            Step::Condemn(custodian) => {
                let name = CUSTODIANS[*custodian];
                match store.remove_receipts_by(&|r| r.custodian == node(name)) {
                    Ok(count) => {
                        let had = model.values_mut().filter_map(|of| of.take(name)).count();
                        assert_eq!(count, had);
                    }
                    Err(error) => outcome = Err(error),
                }
            }
            Step::Reopen | Step::Crash(_) | Step::LoseIndex => {
                drop((
                    std::mem::replace(&mut store, open_sim(&SimDisk::new()).1),
                    std::mem::replace(&mut root, open_sim(&SimDisk::new()).0),
                ));
                match step {
                    Step::Crash(seed) => {
                        disk.crash(Survival::Seed(*seed));
                        cut = None;
                    }
                    Step::LoseIndex if !disk.is_off() => {
                        disk.kill();
                        cut = None;
                        delete(&disk, &below(&disk, "index"));
                    }
                    _ => {}
                }
                match Settings::default()
                    .open_root(disk.disk())
                    .map_err(|e| e.to_string())
                    .and_then(|r| {
                        let s = Store::open(Arc::clone(&r), domain()).map_err(|e| e.to_string())?;
                        Ok((r, s))
                    }) {
                    Ok((r, s)) => {
                        (root, store) = (r, s);
                        store.set_own_node(&node("n9"));
                        if matches!(step, Step::LoseIndex) {
                            assert_eq!(store.recovery().rebuilt.is_some(), !model.is_empty());
                        } else {
                            assert_eq!(store.recovery().rebuilt, None, "{step:?}");
                        }
                    }
                    Err(error) => assert!(disk.is_off(), "{error}"),
                }
            }
        }
        if disk.is_off() {
            let seed = cut.take().unwrap();
            drop((
                std::mem::replace(&mut store, open_sim(&SimDisk::new()).1),
                std::mem::replace(&mut root, open_sim(&SimDisk::new()).0),
            ));
            disk.crash(Survival::Seed(seed));
            again(&mut root, &mut store);
            // What was not acknowledged may be there or not, but nothing else may differ.
            let now = held(&store);
            if outcome.is_ok() {
                assert_eq!(now, model, "{step:?}");
            } else {
                let at = match step {
                    Step::Put(w) | Step::Remove(w) | Step::Receipt(w, _) | Step::Quarantine(w) => {
                        Some(*w)
                    }
                    _ => None,
                };
                for number in 0..material().len() {
                    if at == Some(number) || matches!(step, Step::Condemn(_)) {
                        continue;
                    }
                    assert_eq!(now.get(&number), before.get(&number), "{step:?}");
                }
            }
            model = now;
        } else {
            assert_eq!(outcome, Ok(()), "{step:?}");
            assert_eq!(held(&store), model, "{step:?}");
        }
        if cut.is_none() {
            assert_consistent(&store);
            assert_ledger(&root);
            let foreign = store.foreign_audit_bytes();
            assert_eq!(foreign, root.ledger().usage().custody_bytes);
        }
    }
    // The index as it was, and as it is built from the files.
    if cut.is_none() {
        let before = (store.list(None), store.heads(), held(&store));
        let totals = store.audit_totals();
        drop((store, root));
        delete(&disk, &below(&disk, "index"));
        let (root, store) = open_sim(&disk);
        assert_eq!(before, (store.list(None), store.heads(), held(&store)));
        assert_eq!(totals, store.audit_totals());
        assert_consistent(&store);
        assert_ledger(&root);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_index_is_what_the_files_are_over_any_course(steps in steps()) {
        run(&steps);
    }
}

/// A store with as many segments of one log, at most 300, and receipts of some.
fn filled(disk: &SimDisk, count: usize) -> Vec<VerifiedSegment> {
    static MADE: OnceLock<Vec<VerifiedSegment>> = OnceLock::new();
    let mut all = MADE.get_or_init(|| foreign_segments("n9", 300)).clone();
    all.truncate(count);
    let (_root, store) = open_sim(disk);
    for segment in &all {
        store.put(segment, Charge::Normal).unwrap();
    }
    for segment in all.iter().step_by(7) {
        store.put_receipt(&receipt(segment, "n2")).unwrap();
    }
    all
}

/// A file, and what is there instead; `None`: nothing.
type Changed = (PathBuf, Option<Vec<u8>>);

#[test]
fn whatever_becomes_of_the_index_nothing_is_lost() {
    let base = SimDisk::new();
    let all = filled(&base, 130);
    let files = below(&base, "index");
    assert_eq!(files.len(), 2 + 2, "{files:?}");
    let content = |path: &PathBuf| base.content(path).unwrap();
    let mut cases: Vec<(String, Vec<Changed>)> = Vec::new();
    for path in &files {
        let bytes = content(path);
        let mut case = |what: &str, with: Option<Vec<u8>>| {
            cases.push((
                format!("{} {what}", path.display()),
                vec![(path.clone(), with)],
            ));
        };
        case("missing", None);
        case("empty", Some(vec![]));
        case("half", Some(bytes[..bytes.len() / 2].to_vec()));
        case("zeros", Some(vec![0; bytes.len()]));
        case("noise", Some(bytes.iter().map(|b| b ^ 0x5a).collect()));
        for at in [0, 7, 9, 20, 30, 200, 300, 500, bytes.len() / 2] {
            let mut flipped = bytes.clone();
            if let Some(byte) = flipped.get_mut(at) {
                *byte ^= 4;
            }
            case(&format!("flipped at {at}"), Some(flipped));
        }
        let mut future = bytes.clone();
        future[7] = b'9';
        case("of a later version", Some(future));
    }
    cases.push((
        "all missing".to_owned(),
        files.iter().map(|path| (path.clone(), None)).collect(),
    ));
    let mut rebuilt = 0;
    for (what, changes) in cases {
        let disk = SimDisk::new();
        disk.create_dir(Path::new(ROOT)).unwrap();
        disk.copy_from(&base, ROOT);
        for (path, with) in changes {
            match with {
                Some(bytes) => disk.plant(&path, &bytes),
                None => delete(&disk, &[path]),
            }
        }
        let (root, store) = open_sim(&disk);
        // A damaged page is noticed when it is used, and nothing is passed over.
        let others = usize::from(what.contains("journal"));
        assert!(store.list(None).len() + others >= all.len(), "{what}");
        let report = store.scrub(u64::MAX).unwrap();
        assert!(report.damaged.is_empty(), "{what}");
        store.scrub(u64::MAX).unwrap();
        // The last announcement may be lost without a trace; the survey finds its file.
        while !store.survey(1000).unwrap() {}
        for (number, segment) in all.iter().enumerate() {
            assert_eq!(store.get(&segment.id()).as_ref(), Ok(segment), "{what}");
            let custodians = usize::from(number % 7 == 0);
            assert_eq!(store.custodian_count(&segment.id()), custodians, "{what}");
        }
        assert_eq!(store.list(None).len(), all.len(), "{what}");
        assert_ledger(&root);
        rebuilt += u32::from(store.recovery().rebuilt.is_some());
        drop((root, store));
        let (_root, store) = open_sim(&disk);
        assert_eq!(store.recovery().rebuilt, None, "{what}");
        assert_eq!(store.list(None).len(), all.len(), "{what}");
    }
    assert!(rebuilt >= 25, "{rebuilt}");
}

/// Copies what lies below the root of another simulated disk.
trait CopyFrom {
    fn copy_from(&self, from: &SimDisk, root: &str);
}

impl CopyFrom for SimDisk {
    fn copy_from(&self, from: &SimDisk, root: &str) {
        for path in from.files() {
            let dirs: Vec<_> = path.ancestors().skip(1).collect();
            for dir in dirs.into_iter().rev().filter(|d| d.starts_with(root)) {
                let _ = self.create_dir(dir);
                self.sync_dir(dir.parent().unwrap()).unwrap();
            }
            self.plant(&path, &from.content(&path).unwrap());
        }
    }
}

#[test]
fn an_evicted_part_of_a_log_keeps_no_space_in_the_index() {
    let disk = SimDisk::new();
    let all = filled(&disk, 300);
    let (root, store) = open_sim(&disk);
    assert_eq!(below(&disk, "index/chain").len(), 3);
    for segment in &all[..224] {
        store.remove(&segment.id()).unwrap();
    }
    assert_eq!(below(&disk, "index/chain").len(), 1);
    assert_eq!(below(&disk, "receipts").len(), 300_usize.div_ceil(7) - 32);
    assert_eq!(store.heads()[0].ranges, [(224, 299)]);
    assert_ledger(&root);
    for segment in &all[224..] {
        store.remove(&segment.id()).unwrap();
    }
    assert!(below(&disk, "index/chain").is_empty());
    assert!(store.heads().is_empty());
    assert_ledger(&root);
    drop((root, store));
    disk.crash(Survival::None);
    let (root, store) = open_sim(&disk);
    assert!(store.list(None).is_empty());
    assert_ledger(&root);
}

#[test]
fn a_list_comes_in_pieces_in_the_same_order() {
    let disk = SimDisk::new();
    let (_root, store) = open_sim(&disk);
    for segment in material() {
        store.put(segment, Charge::Normal).unwrap();
    }
    let policy = |name: &str, epoch: u64, body: &[u8]| {
        let origin = Origin::policy(name).unwrap();
        let bytes = unsigned_segment(&domain(), origin, epoch, body).unwrap();
        verify_segment(bytes, None, &domain()).unwrap()
    };
    // Three of one epoch, and others around them.
    for (name, epoch, body) in [
        ("a", 1, b"one"),
        ("a", 2, b"two"),
        ("a", 2, b"too"),
        ("a", 2, b"to2"),
        ("b", 1, b"one"),
    ] {
        store
            .put(&policy(name, epoch, body), Charge::Reserve)
            .unwrap();
    }
    for kind in [Kind::Policy, Kind::Audit, Kind::Revocation] {
        let whole = store.list(Some(kind));
        for max in 1..9 {
            let (mut pieces, mut after) = (Vec::new(), None);
            loop {
                let some = store.list_after(kind, after.as_ref(), max);
                let Some(last) = some.last() else { break };
                assert!(some.len() <= max + 2);
                after = Some((last.origin.clone(), last.sequence));
                pieces.extend(some);
            }
            assert_eq!(pieces, whole, "{kind} {max}");
        }
    }
    assert_eq!(store.list(None).len(), 24 + 5);
}

#[test]
fn a_pinned_segment_stays_until_nobody_relies_on_it() {
    let disk = SimDisk::new();
    let (_root, store) = open_sim(&disk);
    let (one, two) = (&material()[0], &material()[1]);
    store.put(one, Charge::Normal).unwrap();
    store.put(two, Charge::Normal).unwrap();
    store.pin(&one.id()).unwrap();
    store.pin(&one.id()).unwrap();
    assert_eq!(store.remove(&one.id()), Err(StoreError::Pinned(one.id())));
    store.unpin(&one.id());
    assert_eq!(store.remove(&one.id()), Err(StoreError::Pinned(one.id())));
    store.unpin(&one.id());
    assert_eq!(store.remove(&one.id()), Ok(()));
    assert_eq!(store.pin(&one.id()), Err(StoreError::NotHeld(one.id())));
    // What is damaged goes, pinned or not.
    store.pin(&two.id()).unwrap();
    disk.flip(&segment_file(&two.id()), 600, 1);
    assert!(matches!(
        store.get(&two.id()),
        Err(StoreError::Damaged { .. })
    ));
    assert!(!store.contains(&two.id()));
}

#[test]
fn damage_is_told_so_that_it_can_be_fetched_again() {
    for damage in ["body", "header", "gone"] {
        let disk = SimDisk::new();
        let (root, store) = open_sim(&disk);
        for segment in material() {
            store.put(segment, Charge::Normal).unwrap();
        }
        drop((root, store));
        // Nothing is remembered of where it lies.
        let (root, store) = open_sim(&disk);
        let told = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&told);
        store.set_on_damage(move |reference| notes.lock().unwrap().push(reference.clone()));
        let one = &material()[3];
        match damage {
            "body" => disk.flip(&segment_file(&one.id()), one.bytes().len() / 2, 1),
            "header" => disk.flip(&segment_file(&one.id()), 13, 0x80),
            _ => delete(&disk, &[segment_file(&one.id())]),
        }
        let report = store.scrub(u64::MAX).unwrap();
        assert_eq!(report.damaged, [one.id()], "{damage}");
        assert_eq!(*told.lock().unwrap(), [one.reference()]);
        assert!(!store.contains(&one.id()));
        assert_eq!(
            store.list(Some(Kind::Audit)).len(),
            material().len() - 1,
            "{damage}"
        );
        assert_ledger(&root);
        // Control: it comes again and is whole, and nothing more is told.
        assert_eq!(store.put(one, Charge::Normal), Ok(PutOutcome::Stored));
        assert!(store.scrub(u64::MAX).unwrap().damaged.is_empty());
        assert_eq!(told.lock().unwrap().len(), 1);
    }
}

#[test]
fn ranges_of_a_file_are_read_within_its_bounds() {
    let disk = SimDisk::new();
    let (_root, store) = open_sim(&disk);
    let one = &material()[0];
    store.put(one, Charge::Normal).unwrap();
    let size = one.bytes().len() as u64;
    let read = |offset, len| store.read_range(&one.id(), offset, len).unwrap();
    assert_eq!(read(0, u64::MAX), one.bytes());
    assert_eq!(read(10, 20), &one.bytes()[10..30]);
    assert_eq!(read(size - 5, 100), &one.bytes()[one.bytes().len() - 5..]);
    assert!(read(size, 1).is_empty());
    assert!(read(u64::MAX, u64::MAX).is_empty());
    assert_eq!(
        store.read_range(&material()[1].id(), 0, 1),
        Err(StoreError::NotHeld(material()[1].id()))
    );
}

#[test]
fn a_scrub_goes_on_where_the_last_run_stopped_and_never_starves_a_part() {
    let disk = SimDisk::new();
    let all = foreign_segments("n9", 1_200);
    {
        let (_root, store) = open_sim(&disk);
        for segment in &all {
            store.put(segment, Charge::Normal).unwrap();
        }
    }
    let mut checked = 0;
    let mut wrapped = 0;
    for _ in 0..4 {
        // The place is kept every 256 segments.
        let (_root, store) = open_sim(&disk);
        for _ in 0..400 {
            let report = store.scrub(1).unwrap();
            checked += report.checked;
            wrapped += u64::from(report.wrapped);
        }
    }
    assert!(checked >= 1_599, "{checked}");
    // Of which each restart read at most those again that came after the last place that was kept.
    assert_eq!(wrapped, 0);
    let (_root, store) = open_sim(&disk);
    let rest = store.scrub(u64::MAX).unwrap();
    assert!(rest.wrapped && rest.checked <= 1_200 - 4 * 256, "{rest:?}");
}

#[test]
fn foreign_files_shrink_the_rest_until_they_are_gone() {
    let disk = SimDisk::new();
    let settings = Settings {
        ceiling: 8 * MIB,
        ..Settings::default()
    };
    let root = settings.open_root(disk.disk()).unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    for segment in material() {
        store.put(segment, Charge::Normal).unwrap();
    }
    let round = |store: &Store| {
        while !store.survey(3).unwrap() {}
        store.foreign()
    };
    assert_eq!(round(&store).bytes, 0);
    assert_eq!(round(&store).paths, Vec::<String>::new());
    let room = root.ledger().room(Charge::Normal);
    let stray = |name: &str, len: usize| {
        disk.plant(&Path::new(ROOT).join(name), &vec![7; len]);
    };
    for name in [
        "core.1234",
        "segments/audit/README",
        "segments/audit/0123.seg",
        "receipts/x.rcpt",
        "index/chain/old.idx",
        "segments/notes.txt",
    ] {
        stray(name, 10_000);
    }
    let found = round(&store);
    assert_eq!((found.paths.len(), found.bytes), (6, 6 * 12 * KIB));
    assert_eq!(root.ledger().usage().foreign_bytes, 6 * 12 * KIB);
    assert!(root.ledger().room(Charge::Normal) < room);
    assert_ledger(&root);
    assert_ne!(root.ledger().ladder(), Ladder::Sealed);
    // A large one seals the store; nothing of it is touched.
    stray("dump", 6 << 20);
    round(&store);
    assert_eq!(root.ledger().ladder(), Ladder::Sealed);
    assert!(matches!(
        store.put(&foreign_segments("n4", 1)[0], Charge::Normal),
        Err(StoreError::Ceiling(_))
    ));
    // After a restart they are counted at once, but for those among the segments.
    drop((root, store));
    let root = settings.open_root(disk.disk()).unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    assert_eq!(root.ledger().ladder(), Ladder::Sealed);
    round(&store);
    assert_ledger(&root);
    // Gone: the room is there again.
    let foreign: Vec<PathBuf> = [
        "core.1234",
        "segments/audit/README",
        "segments/audit/0123.seg",
        "receipts/x.rcpt",
        "index/chain/old.idx",
        "segments/notes.txt",
        "dump",
    ]
    .iter()
    .map(|name| Path::new(ROOT).join(name))
    .collect();
    delete(&disk, &foreign);
    round(&store);
    assert_eq!(store.foreign().bytes, 0);
    assert_eq!(root.ledger().room(Charge::Normal), room);
    assert_eq!(
        store.put(&foreign_segments("n4", 1)[0], Charge::Normal),
        Ok(PutOutcome::Stored)
    );
    assert_ledger(&root);
}

#[test]
fn a_segment_that_no_index_knows_is_taken_in_by_the_survey() {
    let disk = SimDisk::new();
    let (root, store) = open_sim(&disk);
    store.put(&material()[0], Charge::Normal).unwrap();
    let lost = &material()[1];
    disk.plant(&segment_file(&lost.id()), lost.bytes());
    let bad = &material()[2];
    disk.plant(
        &segment_file(&bad.id()),
        &bad.bytes()[..bad.bytes().len() - 1],
    );
    let asked = &material()[3];
    disk.plant(&segment_file(&asked.id()), asked.bytes());
    let put = &material()[4];
    disk.plant(&segment_file(&put.id()), put.bytes());
    assert_eq!(
        store.list(Some(Kind::Audit)),
        [material()[0].reference()],
        "only the survey, a question for it, or its coming again takes one in"
    );
    assert_eq!(store.reference(&asked.id()), Some(asked.reference()));
    assert_eq!(store.put(put, Charge::Normal), Ok(PutOutcome::Stored));
    while !store.survey(100).unwrap() {}
    assert_eq!(store.get(&lost.id()).as_ref(), Ok(lost));
    assert!(!store.contains(&bad.id()));
    assert_eq!(root.list("quarantine").unwrap().len(), 1);
    assert_eq!(store.recovery().orphans, 2);
    assert_eq!(store.list(None).len(), 4);
    assert_ledger(&root);
}

#[test]
fn above_the_ceiling_the_index_is_built_in_memory_and_written_later() {
    let disk = SimDisk::new();
    let all = filled(&disk, 300);
    delete(&disk, &below(&disk, "index"));
    let settings = Settings {
        ceiling: MIB,
        reserve: 256 * KIB,
        ..Settings::default()
    };
    let root = settings.open_root(disk.disk()).unwrap();
    let used = disk.allocated();
    assert!(used > MIB);
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    assert!(store.recovery().rebuilt.is_some());
    assert_eq!(root.ledger().ladder(), Ladder::Sealed);
    // It grew by nothing, and serves everything.
    assert!(disk.allocated() <= used + 8 * KIB, "directories only");
    assert!(below(&disk, "index").is_empty());
    assert_eq!(store.list(None).len(), all.len());
    assert_eq!(store.get(&all[299].id()).as_ref(), Ok(&all[299]));
    assert_consistent(&store);
    // Removing needs no room, and once there is some the index is written.
    for segment in &all[..250] {
        store.remove(&segment.id()).unwrap();
    }
    root.ledger().set_ceiling(64 * MIB);
    while !store.survey(100).unwrap() {}
    assert_eq!(below(&disk, "index").len(), 3);
    assert_ledger(&root);
    drop((root, store));
    let (root, store) = open_sim(&disk);
    assert_eq!(store.recovery().rebuilt, None);
    assert_eq!(store.list(None).len(), 50);
    assert_ledger(&root);
}

#[test]
fn on_copy_on_write_file_systems_a_ballast_gives_the_reserve_its_room() {
    let disk = SimDisk::new();
    disk.set_copy_on_write(Some("btrfs"));
    let ballast = Path::new(ROOT).join("ballast");
    let (root, _store) = open_sim(&disk);
    let size = disk.content(&ballast).unwrap().len() as u64;
    assert!(size >= 128 * KIB, "{size}");
    root.write_atomic("state/first", b"the directory", Charge::Reserve)
        .unwrap();
    assert_ledger(&root);
    // Another tenant fills the file system to the last block.
    disk.set_capacity(disk.allocated());
    let write = |name: &str, charge| root.write_atomic(name, &[1; 20_000], charge);
    let full = |refused: Result<(), tidelock_segments::RootError>| {
        matches!(
            refused,
            Err(tidelock_segments::RootError::Disk(DiskError {
                fault: DiskFault::NoSpace,
                ..
            }))
        )
    };
    assert!(full(write("state/normal", Charge::Normal)));
    assert!(disk.content(&ballast).is_some());
    assert_eq!(write("state/urgent", Charge::Reserve), Ok(()));
    assert_eq!(disk.content(&ballast), None);
    assert_ledger(&root);
    assert_eq!(write("state/urgent2", Charge::Reserve), Ok(()));
    // What the ballast held is used up in the end.
    let last = (0..20).map(|i| write(&format!("state/more{i}"), Charge::Reserve));
    assert!(last.into_iter().any(full));
    // With room it comes back.
    disk.set_capacity(u64::MAX / 2);
    while !_store.survey(100).unwrap() {}
    assert!(disk.content(&ballast).is_some());
    assert_ledger(&root);
    drop((root, _store));
    let (root, store) = open_sim(&disk);
    assert_eq!(disk.content(&ballast).unwrap().len() as u64, size);
    assert_ledger(&root);
    drop((root, store));
    // Control: elsewhere none is kept.
    disk.set_copy_on_write(None);
    let (root, _store) = open_sim(&disk);
    assert_eq!(disk.content(&ballast), None);
    assert_ledger(&root);
}

#[test]
fn a_full_file_system_is_told_apart_from_the_ceiling() {
    let disk = SimDisk::new();
    let (root, store) = open_sim(&disk);
    store.put(&material()[0], Charge::Normal).unwrap();
    let room = disk.allocated();
    disk.set_capacity(room);
    assert_eq!(
        store.put(&material()[1], Charge::Normal),
        Err(StoreError::FileSystemFull)
    );
    assert_eq!(store.latched(), None);
    disk.set_capacity(u64::MAX / 2);
    root.ledger().set_ceiling(room);
    assert!(matches!(
        store.put(&material()[1], Charge::Normal),
        Err(StoreError::Ceiling(_))
    ));
    root.ledger().set_ceiling(64 * MIB);
    assert_eq!(
        store.put(&material()[1], Charge::Normal),
        Ok(PutOutcome::Stored)
    );
    assert_ledger(&root);
}
