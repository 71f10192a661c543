//! Crash images: a workload is cut off at every writing call of the disk, what was not synced survives
//! in several subsets, and whatever comes up again must hold what was acknowledged, within the ceiling.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{MIB, Node, ROOT, Settings, domain, foreign_segments, node, receipt};
use tidelock_segments::testing::{Bound, SimDisk, Survival};
use tidelock_segments::{
    Charge, DiskFault, LogError, SegmentId, VerifiedSegment, merkle, verify_log,
};

/// What the caller was told is durable.
#[derive(Default, Clone)]
struct Model {
    records: BTreeMap<(String, u64), Vec<u8>>,
    heads: Vec<(String, u64, tidelock_segments::Sha256Hash)>,
    stored: Vec<SegmentId>,
    evicted_below: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Append,
    Large,
    Seal,
    Put,
    /// Receipts for all own segments, and a ceiling that forces eviction.
    Evict,
    Reopen,
}

fn settings() -> Settings {
    Settings {
        ceiling: 6 * MIB,
        reserve: 2 * MIB,
        custody: 1,
        ..Settings::default()
    }
}

const CEILING: u64 = 6 * MIB;

/// Does the steps and notes what is acknowledged; stops at the first loss of power.
fn work(disk: &SimDisk, n: Node, steps: &[Step], foreign: &[VerifiedSegment], model: &mut Model) {
    let mut n = n;
    let mut put = 0;
    let note = |n: &Node, model: &mut Model| {
        let stat = n.log.stat();
        model
            .heads
            .push((stat.origin.to_string(), stat.records, stat.root));
    };
    for (i, step) in steps.iter().enumerate() {
        let mut append = |n: &Node, bytes: Vec<u8>| {
            if let Ok(appended) = n.append(&bytes) {
                model
                    .records
                    .insert((n.log.origin().to_string(), appended.index), bytes);
                note(n, model);
            }
        };
        match step {
            Step::Append => append(&n, format!("record {i}").into_bytes()),
            Step::Large => append(&n, vec![b'a' + u8::try_from(i % 26).unwrap(); 5000]),
            Step::Seal => {
                if let Ok(Some(reference)) = n.log.seal_now() {
                    model.stored.push(reference.id);
                }
            }
            Step::Put => {
                let segment = &foreign[put % foreign.len()];
                put += 1;
                if n.store.put(segment, Charge::Normal).is_ok() {
                    model.stored.push(segment.id());
                }
            }
            Step::Evict => {
                let own = n.store.own_audit(&node("n1"));
                for reference in &own {
                    let Ok(segment) = n.store.get(&reference.id) else {
                        continue;
                    };
                    let _ = n.store.put_receipt(&receipt(&segment, "n2"));
                }
                n.root.ledger().set_ceiling(MIB);
                n.log.reclaim();
                n.root.ledger().set_ceiling(CEILING);
                n.log.reclaim();
                // What was licensed may be gone from here on, acknowledged or not.
                for reference in &own {
                    if let Some(span) = n.store.audit_span(&reference.id) {
                        model.evicted_below = model.evicted_below.max(span.last + 1);
                    } else {
                        model.evicted_below = u64::MAX;
                    }
                    model.stored.retain(|id| *id != reference.id);
                }
            }
            Step::Reopen => {
                drop(n);
                match settings().open(disk.disk()) {
                    Ok(again) => n = again,
                    Err(_) => return,
                }
            }
        }
        if disk.is_off() {
            return;
        }
    }
}

/// Everything that must be true of a node that came up again.
fn check(disk: &SimDisk, n: &Node, model: &Model, what: &str) {
    assert_eq!(n.log.latched(), None, "{what}");
    assert_eq!(n.recovery.new_incarnation, None, "{what}: {:?}", n.recovery);
    assert!(
        n.recovery.quarantined.is_empty(),
        "{what}: {:?}",
        n.recovery
    );
    let origin = n.log.origin().to_string();
    let records = n.records();
    let first = records.first().map_or(n.log.size(), |(index, _)| *index);
    assert!(first <= model.evicted_below, "{what}: from {first}");
    let held: BTreeMap<u64, &[u8]> = records.iter().map(|(i, r)| (*i, r.as_slice())).collect();
    for ((of, index), bytes) in &model.records {
        assert_eq!(*of, origin, "{what}");
        if *index >= first {
            assert_eq!(
                held.get(index),
                Some(&bytes.as_slice()),
                "{what}: record {index} is lost"
            );
        }
    }
    // INV-16 and INV-17: every head that was shown is a prefix of the log now.
    if first == 0 {
        let leaves: Vec<_> = records.iter().map(|(_, r)| merkle::leaf_hash(r)).collect();
        for (of, size, root) in &model.heads {
            assert_eq!(*of, origin, "{what}");
            let size = usize::try_from(*size).unwrap();
            assert!(
                size <= leaves.len(),
                "{what}: head {size} of {}",
                leaves.len()
            );
            assert_eq!(merkle::root(&leaves[..size]), *root, "{what}: head {size}");
        }
    }
    for id in &model.stored {
        assert!(n.store.get(id).is_ok(), "{what}: segment {id} is lost");
    }
    for reference in n.store.list(None) {
        assert!(
            n.store.get(&reference.id).is_ok(),
            "{what}: {} is listed",
            reference.id
        );
    }
    n.assert_ledger();
    assert!(
        disk.peak_allocated() <= CEILING,
        "{what}: {}",
        disk.peak_allocated()
    );
    let report = verify_log(disk, Path::new(ROOT), &domain()).unwrap();
    assert!(report.ok, "{what}: {report:?}");
    n.append(b"it goes on")
        .unwrap_or_else(|e| panic!("{what}: {e}"));
}

const SURVIVALS: [Survival; 5] = [
    Survival::None,
    Survival::All,
    Survival::Seed(1),
    Survival::Seed(2),
    Survival::Seed(3),
];

/// Cuts the steps off at every writing call, and the first recovery at some as well.
fn crash_everywhere(steps: &[Step]) {
    let foreign = foreign_segments("n9", 2);
    // A run without a crash tells how many calls there are, and is the positive control.
    let disk = SimDisk::new();
    let n = settings().sim(&disk);
    let start = disk.calls();
    let mut model = Model::default();
    work(&disk, n, steps, &foreign, &mut model);
    let calls = disk.calls() - start;
    check(
        &disk,
        &settings().sim(&disk),
        &model,
        &format!("{steps:?} without a crash"),
    );
    for at in 1..=calls {
        for survival in SURVIVALS {
            let what = format!("{steps:?} at call {at} of {calls}, {survival:?}");
            let disk = SimDisk::new();
            let n = settings().sim(&disk);
            let mut model = Model::default();
            disk.crash_at_call(disk.calls() + at);
            work(&disk, n, steps, &foreign, &mut model);
            disk.crash(survival);
            // The recovery is cut off as well, at a call that differs from run to run.
            disk.crash_at_call(disk.calls() + 1 + at % 7);
            if let Ok(n) = settings().open(disk.disk()) {
                drop(n);
            }
            disk.crash(survival);
            let n = settings().sim(&disk);
            check(&disk, &n, &model, &what);
        }
    }
}

#[test]
fn crash_at_every_call_of_append_and_seal() {
    use Step::{Append, Large, Seal};
    crash_everywhere(&[Append, Large, Seal, Append]);
    crash_everywhere(&[Large, Append, Seal, Seal, Large, Seal]);
}

#[test]
fn crash_at_every_call_of_put() {
    use Step::{Append, Put};
    crash_everywhere(&[Put, Append, Put, Put]);
}

#[test]
fn crash_at_every_call_of_evict() {
    use Step::{Append, Evict, Seal};
    crash_everywhere(&[Append, Seal, Append, Seal, Evict, Append]);
}

#[test]
fn crash_at_every_call_of_reopen() {
    use Step::{Append, Large, Reopen, Seal};
    crash_everywhere(&[Append, Reopen, Large, Seal, Reopen, Append]);
}

#[test]
fn crash_at_every_call_of_the_first_start() {
    let disk = SimDisk::new();
    drop(settings().sim(&disk));
    let calls = disk.calls();
    for at in 1..=calls {
        for survival in SURVIVALS {
            let disk = SimDisk::new();
            disk.crash_at_call(at);
            assert!(settings().open(disk.disk()).is_err() || disk.is_off());
            disk.crash(survival);
            let n = settings().sim(&disk);
            n.append(b"first").unwrap();
            n.assert_ledger();
            assert!(disk.peak_allocated() <= CEILING);
        }
    }
}

/// A process was killed between giving a name and syncing the directory. The next start saw the
/// name, took it as durable, and removed what it replaced; then the power went, and the name with
/// it, and so acknowledged records were gone. Found by the exhaustive check at the first start, where
/// a whole directory went.
#[test]
fn names_of_a_killed_process_are_made_durable_before_they_are_relied_upon() {
    let disk = SimDisk::new();
    disk.record();
    let n = settings().open_inline(disk.disk()).unwrap();
    let mut acked = vec![(0, disk.calls())];
    for i in 0..3u64 {
        n.append(format!("record {i}").as_bytes()).unwrap();
        acked.push((n.log.size(), disk.calls()));
        n.log.seal_now().unwrap();
    }
    let mut lives = 0;
    for snapshot in disk.recorded() {
        let size = acked.iter().filter(|(_, calls)| *calls < snapshot.call());
        let size = size.map(|(size, _)| *size).max().unwrap_or(0);
        for survivors in snapshot.survivors(&Bound::SMALL) {
            if !survivors.is_kill() {
                continue;
            }
            lives += 1;
            let image = snapshot.image(&survivors);
            let n = settings().open_inline(image.disk()).unwrap();
            let shown = n.log.size();
            assert!(shown >= size);
            let before = image.snapshot();
            drop(n);
            for survivors in before.survivors(&Bound::SMALL) {
                let image = before.image(&survivors);
                let n = settings().open_inline(image.disk()).unwrap();
                assert!(n.log.size() >= shown, "{} of {shown}", n.log.size());
                assert_eq!(n.log.incarnation(), 1);
            }
        }
    }
    assert!(lives > 30, "{lives}");
}

/// An error in the middle of an eviction left the cursor ahead in memory, the segment where it was or
/// gone, and the record of it unwritten until the next start: reopening the log did not finish what
/// had begun. Found by the exhaustive check.
#[test]
fn an_eviction_that_an_error_cut_off_is_finished_or_undone_when_the_log_reopens() {
    let prepare = |disk: &SimDisk| {
        let n = settings().open_inline(disk.disk()).unwrap();
        for i in 0..2 {
            n.append(format!("record {i}").as_bytes()).unwrap();
            let sealed = n.log.seal_now().unwrap().unwrap();
            n.store
                .put_receipt(&receipt(&n.store.get(&sealed.id).unwrap(), "n2"))
                .unwrap();
        }
        n.append(b"record").unwrap();
        n
    };
    let evict = |n: &Node| {
        n.root.ledger().set_ceiling(MIB);
        n.log.reclaim();
        n.root.ledger().set_ceiling(CEILING);
    };
    let disk = SimDisk::new();
    let n = prepare(&disk);
    let from = disk.calls();
    evict(&n);
    let calls = disk.calls() - from;
    assert_eq!(
        n.log.stat().min_index,
        3,
        "without an error both are evicted"
    );
    // A full file system does not latch the log; some cannot even remove a file then.
    let cases = (1..=calls).flat_map(|at| [(at, DiskFault::Os(5)), (at, DiskFault::NoSpace)]);
    for (at, fault) in cases {
        let disk = SimDisk::new();
        let n = prepare(&disk);
        let own = n.store.own_audit(&node("n1"));
        disk.fail_call(disk.calls() + at, fault);
        evict(&n);
        n.log.reopen().unwrap();
        n.log.reclaim();
        let min_index = n.log.stat().min_index;
        for reference in &own {
            let last = match n.store.audit_span(&reference.id) {
                Some(span) => {
                    assert!(span.last >= min_index, "call {at}: held below the cursor");
                    continue;
                }
                None => reference.id.to_string(),
            };
            let told = |(_, record): &(u64, Vec<u8>)| {
                let text = String::from_utf8_lossy(record);
                text.contains("evicted") && text.contains(&last)
            };
            assert!(n.records().iter().any(told), "call {at}: not recorded");
        }
    }
}

#[test]
fn seeded_random_runs() {
    let foreign = foreign_segments("n9", 3);
    for seed in 0..150u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let all = [
            Step::Append,
            Step::Large,
            Step::Seal,
            Step::Put,
            Step::Reopen,
        ];
        let disk = SimDisk::new();
        let mut model = Model::default();
        for round in 0..4 {
            let steps: Vec<Step> = (0..6).map(|_| all[(next() % 5) as usize % 5]).collect();
            disk.crash_at_call(disk.calls() + 1 + next() % 60);
            if let Ok(n) = settings().open(disk.disk()) {
                work(&disk, n, &steps, &foreign, &mut model);
            }
            disk.crash(Survival::Seed(next()));
            let n = settings().sim(&disk);
            check(
                &disk,
                &n,
                &model,
                &format!("seed {seed} round {round} {steps:?}"),
            );
        }
    }
}

#[test]
fn inv_04_an_error_at_any_call_neither_lies_nor_overruns() {
    use Step::{Append, Large, Put, Seal};
    let steps = [Append, Put, Large, Seal, Append, Put, Seal];
    let foreign = foreign_segments("n9", 2);
    let disk = SimDisk::new();
    let n = settings().sim(&disk);
    let start = disk.calls();
    // Closing the log is no part of the steps.
    let log = n.log.clone();
    work(&disk, n, &steps, &foreign, &mut Model::default());
    let calls = disk.calls() - start;
    drop(log);
    for at in 1..=calls {
        for fault in [DiskFault::Os(5), DiskFault::NoSpace] {
            let what = format!("{fault:?} at call {at} of {calls}");
            let disk = SimDisk::new();
            let n = settings().sim(&disk);
            let mut model = Model::default();
            disk.fail_call(disk.calls() + at, fault);
            let (root, store, log) = (n.root.clone(), n.store.clone(), n.log.clone());
            work(&disk, n, &steps, &foreign, &mut model);
            // Whatever was refused can be had after reopening, without a restart.
            match log.reopen() {
                Ok(()) => {}
                Err(LogError::Store(_) | LogError::Root(_)) => panic!("{what}: cannot reopen"),
                Err(other) => panic!("{what}: {other}"),
            }
            if store.latched().is_some() {
                store.reopen().unwrap();
            }
            log.append_wait(
                tidelock_segments::RecordClass::Decision,
                b"x".to_vec(),
                common::LONG,
            )
            .unwrap_or_else(|e| panic!("{what}: {e}"));
            drop((log, store, root));
            disk.crash(Survival::None);
            let n = settings().sim(&disk);
            check(&disk, &n, &model, &what);
        }
    }
}
