//! Segments that are stored together: what comes of it is what one after the other gives, whatever
//! fails in the middle, and wherever it is cut off.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use common::{KIB, MIB, Settings, domain, history, node};
use proptest::prelude::*;
use tidelock_segments::testing::{Bound, SimDisk, Survival, unsigned_segment};
use tidelock_segments::{
    Charge, Disk, DiskFault, DomainId, Origin, PutOutcome, RealDisk, Root, RootOptions, SegmentId,
    Store, StoreError, VerifiedSegment, limits, verify_segment,
};

type Outcome = Result<PutOutcome, StoreError>;

fn settings(ceiling: u64) -> Settings {
    Settings {
        ceiling,
        reserve: 256 * KIB,
        ..Settings::default()
    }
}

fn open(disk: &Arc<dyn Disk>, ceiling: u64) -> (Arc<Root>, Arc<Store>) {
    let root = settings(ceiling).open_root(Arc::clone(disk)).unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    store.set_own_node(&node("n1"));
    (root, store)
}

fn open_sim(disk: &SimDisk) -> (Arc<Root>, Arc<Store>) {
    open(&disk.disk(), 64 * MIB)
}

fn assert_ledger(root: &Root, what: &str) {
    let usage = root.ledger().usage();
    let measured = root.measure().unwrap();
    assert_eq!(usage.allocated_bytes, measured, "{what}: {usage:?}");
    assert_eq!((usage.overrun_bytes, usage.reserved_bytes), {
        // Room for one more page is kept.
        (0, usage.reserved_bytes.min(64 * KIB))
    });
}

/// The first `each` of so many logs, one of every log in turn.
fn interleaved(logs: &[&str], each: usize) -> Vec<VerifiedSegment> {
    let records: Vec<String> = (0..each).map(|at| format!("record {at}")).collect();
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let logs: Vec<_> = logs.iter().map(|log| history(log, &records)).collect();
    (0..each)
        .flat_map(|at| logs.iter().map(move |log| log[at].clone()))
        .collect()
}

/// Histories of three logs, two of which part after their second segment, and what is no audit or of
/// another domain.
fn pool() -> &'static [VerifiedSegment] {
    static POOL: OnceLock<Vec<VerifiedSegment>> = OnceLock::new();
    POOL.get_or_init(|| {
        let mut all = Vec::new();
        for log in ["n1", "n7", "n8"] {
            all.extend(history(log, &["a", "b", "c", "d", "e"]));
        }
        for log in ["n7", "n8"] {
            all.extend(history(log, &["a", "b", "x", "y"]).split_off(2));
        }
        for (of, name) in [(domain(), "p"), (DomainId::new("elsewhere").unwrap(), "q")] {
            let origin = Origin::policy(name).unwrap();
            let bytes = unsigned_segment(&of, origin, 1, b"body").unwrap();
            all.push(verify_segment(bytes, None, &of).unwrap());
        }
        all
    })
}

fn one_by_one(store: &Store, group: &[VerifiedSegment], charge: Charge) -> Vec<Outcome> {
    group
        .iter()
        .map(|segment| store.put(segment, charge))
        .collect()
}

fn put_group(store: &Store, group: &[VerifiedSegment], charge: Charge) -> Vec<Outcome> {
    store.put_group(&group.iter().collect::<Vec<_>>(), charge)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// In any order, again, forked, of another domain, with little room: every answer, what is held and
    /// what it costs is the same, and all that was told to be stored is there after a loss of power.
    #[test]
    fn inv_08_a_group_is_stored_as_one_after_the_other(
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 0..40),
        held in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
        ceiling in prop_oneof![Just(64 * MIB), 1024 * KIB..1500 * KIB],
    ) {
        let group: Vec<_> = picks.iter().map(|at| at.get(pool()).clone()).collect();
        let (one, other) = (SimDisk::new(), SimDisk::new());
        let (alone, together) = (open(&one.disk(), ceiling), open(&other.disk(), ceiling));
        for at in &held {
            prop_assert_eq!(
                alone.1.put(at.get(pool()), Charge::Normal),
                together.1.put(at.get(pool()), Charge::Normal)
            );
        }
        let expected = one_by_one(&alone.1, &group, Charge::Normal);
        prop_assert_eq!(&put_group(&together.1, &group, Charge::Normal), &expected);
        prop_assert_eq!(together.1.list(None), alone.1.list(None));
        prop_assert_eq!(together.0.ledger().usage(), alone.0.ledger().usage());
        assert_ledger(&together.0, "together");
        drop(together);
        other.crash(Survival::None);
        let (root, store) = open(&other.disk(), ceiling);
        prop_assert_eq!(&store.recovery().rebuilt, &None);
        for (segment, outcome) in group.iter().zip(&expected) {
            if outcome.is_ok() {
                prop_assert!(store.get(&segment.id()).is_ok());
            }
        }
        prop_assert_eq!(store.list(None), alone.1.list(None));
        assert_ledger(&root, "after the crash");
    }
}

#[test]
fn a_group_shares_what_one_alone_pays_for() {
    let names = ["m0", "m1", "m2", "m3", "m4", "m5", "m6"];
    let all = interleaved(&names, 8);
    let disk = SimDisk::new();
    let (_root, store) = open_sim(&disk);
    // The control, with the pages that it makes.
    one_by_one(&store, &all[..7], Charge::Normal);
    let from = disk.calls();
    one_by_one(&store, &all[7..14], Charge::Normal);
    // Create, allocate, write, sync; announce, sync; rename, directory sync; the entry in its page.
    assert_eq!(disk.calls() - from, 7 * 9);
    let (from, group) = (disk.calls(), &all[14..42]);
    let outcomes = put_group(&store, group, Charge::Normal);
    assert!(outcomes.iter().all(|one| *one == Ok(PutOutcome::Stored)));
    assert_eq!(disk.calls() - from, 28 * 7 + 2);
}

#[test]
fn inv_07_a_group_of_any_length_goes_in_pieces() {
    let names: Vec<String> = (0..5).map(|at| format!("m{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let all = interleaved(&names, 60);
    assert!(
        all.len() > 9 * limits::MAX_PUT_GROUP,
        "the catalog is written meanwhile"
    );
    let disk = SimDisk::new();
    let (root, store) = open_sim(&disk);
    let outcomes = put_group(&store, &all, Charge::Normal);
    assert!(outcomes.iter().all(|one| *one == Ok(PutOutcome::Stored)));
    assert_ledger(&root, "all");
    drop((root, store));
    disk.crash(Survival::None);
    let (root, store) = open_sim(&disk);
    assert_eq!(store.recovery().rebuilt, None);
    assert_eq!(store.list(None).len(), all.len());
    assert_ledger(&root, "after the crash");
}

#[test]
fn inv_17_a_fork_in_a_group_is_refused_alone() {
    let left = history("n7", &["a", "b", "c", "d"]);
    let right = history("n7", &["a", "b", "x"]);
    let other = history("n8", &["a", "b"]);
    let group = [
        left[0].clone(),
        other[0].clone(),
        left[1].clone(),
        left[2].clone(),
        right[2].clone(),
        other[1].clone(),
        left[3].clone(),
    ];
    let disk = SimDisk::new();
    let (_root, store) = open_sim(&disk);
    let outcomes = put_group(&store, &group, Charge::Normal);
    for (at, outcome) in outcomes.iter().enumerate() {
        let fork = StoreError::Fork {
            origin: right[2].header().origin.clone(),
            sequence: 2,
            held: left[2].id(),
            offered: right[2].id(),
        };
        let expected = if at == 4 {
            Err(fork)
        } else {
            Ok(PutOutcome::Stored)
        };
        assert_eq!(*outcome, expected, "{at}");
    }
}

#[test]
fn inv_04_where_the_room_ends_within_a_group_those_before_are_stored() {
    let all = interleaved(&["n7", "n8"], 14);
    let disk = SimDisk::new();
    let (root, store) = open_sim(&disk);
    root.ledger().set_custody_max(12 * 8 * KIB + 2 * 24 * KIB);
    let outcomes = put_group(&store, &all, Charge::Custody);
    let stored = outcomes.iter().filter(|one| one.is_ok()).count();
    assert!((2..all.len() - 2).contains(&stored), "{outcomes:?}");
    for (at, outcome) in outcomes.iter().enumerate() {
        let full = matches!(outcome, Err(StoreError::Ceiling(_)));
        assert_eq!(full, at >= stored, "{at}: {outcome:?}");
    }
    assert_eq!(store.latched(), None);
    assert_ledger(&root, "full");
    // The control: with room the others follow.
    root.ledger().set_custody_max(16 * MIB);
    let outcomes = put_group(&store, &all[stored..], Charge::Custody);
    assert!(outcomes.iter().all(|one| *one == Ok(PutOutcome::Stored)));
}

/// Two groups at once, each in another order: neither waits for the other for ever, and every segment is
/// stored once.
#[test]
fn inv_08_the_same_group_from_two_threads_is_stored_once() {
    let all = interleaved(&["n7", "n8", "n9"], 8);
    let back: Vec<_> = all.iter().rev().cloned().collect();
    for _ in 0..8 {
        let disk = SimDisk::new();
        let (root, store) = open_sim(&disk);
        let stored: usize = std::thread::scope(|scope| {
            let threads = [&all, &back].map(|group| {
                let store = &store;
                scope.spawn(move || put_group(store, group, Charge::Normal))
            });
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .filter(|outcome| *outcome.as_ref().unwrap() == PutOutcome::Stored)
                .count()
        });
        assert_eq!(stored, all.len());
        assert_ledger(&root, "both");
    }
}

/// What the crashes and errors are tried on: two logs, a fork in the middle, one that is held.
fn workload() -> (Vec<VerifiedSegment>, Vec<VerifiedSegment>) {
    let left = history("n7", &["a", "b", "c", "d"]);
    let right = history("n7", &["a", "b", "x"]);
    let other = history("n8", &["a", "b"]);
    let before = vec![left[0].clone(), other[0].clone()];
    let group = vec![
        left[1].clone(),
        other[0].clone(),
        other[1].clone(),
        left[2].clone(),
        right[2].clone(),
        left[3].clone(),
    ];
    (before, group)
}

#[test]
fn inv_08_a_group_cut_off_anywhere_leaves_each_whole_or_not_at_all() {
    let (before, group) = workload();
    let good: Vec<&VerifiedSegment> = group.iter().filter(|s| s.id() != group[4].id()).collect();
    let disk = SimDisk::new();
    let (root, store) = open_sim(&disk);
    one_by_one(&store, &before, Charge::Normal);
    disk.record();
    let outcomes = put_group(&store, &group, Charge::Normal);
    let done = disk.calls();
    assert_eq!(outcomes.iter().filter(|one| one.is_ok()).count(), 5);
    drop((root, store));
    let mut images = 0;
    let (mut torn, mut some, mut seen) = (0, 0, BTreeSet::new());
    for snapshot in disk.recorded() {
        for survivors in snapshot.survivors(&Bound::SMALL) {
            images += 1;
            let what = format!("call {} {survivors:?}", snapshot.call());
            let image = snapshot.image(&survivors);
            let (root, store) = open_sim(&image);
            // A group that was cut off is no damage, so the start does no work for what is stored.
            let recovery = store.recovery();
            assert_eq!(
                (recovery.rebuilt, recovery.quarantined.len()),
                (None, 0),
                "{what}"
            );
            let held: BTreeSet<SegmentId> = store.list(None).iter().map(|held| held.id).collect();
            for id in &held {
                assert!(store.get(id).is_ok(), "{what}");
            }
            let acknowledged = if snapshot.call() > done {
                &good[..]
            } else {
                &[]
            };
            for segment in before.iter().chain(acknowledged.iter().copied()) {
                assert!(held.contains(&segment.id()), "{what}");
            }
            assert_ledger(&root, &what);
            let announced = usize::try_from(recovery.replayed).unwrap();
            torn += usize::from((3..5).contains(&announced));
            some += usize::from(held.len() > 2 && held.len() < 6);
            seen.insert(held.len());
            // It goes on from there, and again after a loss of power.
            for (segment, outcome) in group.iter().zip(put_group(&store, &group, Charge::Normal)) {
                let is_fork = segment.id() == group[4].id();
                assert_eq!(outcome.is_err(), is_fork, "{what}: {outcome:?}");
            }
            drop((root, store));
            image.crash(Survival::None);
            let (root, store) = open_sim(&image);
            assert_eq!(store.recovery().rebuilt, None, "{what}");
            assert_eq!(store.list(None).len(), 6, "{what}");
            assert_ledger(&root, &what);
        }
    }
    assert!(
        images > 300 && torn > 10 && some > 10,
        "{images} {torn} {some} {seen:?}"
    );
}

#[test]
fn inv_08_an_error_at_any_call_of_a_group_acknowledges_nothing_that_is_not_durable() {
    let (before, group) = workload();
    let prepare = || {
        let disk = SimDisk::new();
        let (root, store) = open_sim(&disk);
        one_by_one(&store, &before, Charge::Normal);
        (disk, root, store)
    };
    let (disk, _root, store) = prepare();
    let from = disk.calls();
    let expected = put_group(&store, &group, Charge::Normal);
    let calls = disk.calls() - from;
    // Up to the fork three are stored together, and the one after it alone.
    let first_group = 3 * 7 + 2;
    assert_eq!(calls, first_group + 9, "the control");
    // A page of the index stays in memory where its file refuses.
    let of_pages = |at: u64| (first_group - 2..=first_group).contains(&at) || at == calls;
    let mut latches = 0;
    for at in 1..=calls {
        for fault in [DiskFault::Os(5), DiskFault::NoSpace] {
            let what = format!("{fault:?} at call {at} of {calls}");
            let (disk, root, store) = prepare();
            disk.fail_call(disk.calls() + at, fault);
            let outcomes = put_group(&store, &group, Charge::Normal);
            let latched = store.latched();
            if fault == DiskFault::Os(5) {
                assert_eq!(latched.is_some(), !of_pages(at), "{what}");
            }
            if latched.is_some() {
                latches += 1;
                if at <= first_group {
                    // None of those that were stored together.
                    let stored = outcomes
                        .iter()
                        .filter(|one| **one == Ok(PutOutcome::Stored));
                    assert_eq!(stored.count(), 0, "{what}: {outcomes:?}");
                }
                store.reopen().unwrap();
            } else {
                // There was no room for a moment, for one of them at most.
                let refused = outcomes
                    .iter()
                    .zip(&expected)
                    .filter(|(one, other)| one != other);
                assert!(refused.count() <= 1, "{what}: {outcomes:?}");
            }
            let durable = disk.fork();
            durable.crash(Survival::None);
            let (_root, after) = open_sim(&durable);
            for (segment, outcome) in group.iter().zip(&outcomes) {
                if outcome.is_ok() {
                    assert!(after.get(&segment.id()).is_ok(), "{what}");
                    assert!(store.get(&segment.id()).is_ok(), "{what}");
                }
            }
            assert_ledger(&root, &what);
            let again = put_group(&store, &group, Charge::Normal);
            for (outcome, expected) in again.iter().zip(&expected) {
                assert_eq!(outcome.is_ok(), expected.is_ok(), "{what}: {outcome:?}");
            }
            assert_ledger(&root, &what);
        }
    }
    assert!(latches > usize::try_from(calls).unwrap());
}

#[test]
fn a_group_on_a_real_disk_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap().join("root");
    let open = |path: &Path| {
        let options = RootOptions {
            ceiling_bytes: 64 * MIB,
            reserve_bytes: MIB,
        };
        let root = Root::open(Arc::new(RealDisk), path, options).unwrap();
        (Arc::clone(&root), Store::open(root, domain()).unwrap())
    };
    let all = interleaved(&["n5", "n6", "n7", "n8", "n9"], 14);
    let (root, store) = open(&path);
    let outcomes = put_group(&store, &all, Charge::Normal);
    assert!(outcomes.iter().all(|one| *one == Ok(PutOutcome::Stored)));
    assert_ledger(&root, "all");
    drop((root, store));
    let (_root, store) = open(&path);
    assert_eq!(store.recovery().rebuilt, None);
    for segment in &all {
        assert_eq!(store.get(&segment.id()).as_ref(), Ok(segment));
    }
}
