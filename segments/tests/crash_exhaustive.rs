//! A slice of the exhaustive crash check of log and store; `just soak-disk` runs all of it.
//!
//! Covered here: every workload of up to two operations, cut off before every disk call, with all
//! subsets of up to four unsynced pieces and a spread of larger ones (see `Bound::SMALL`), at most
//! eight images a call; every tenth death of the process alone and every hundredth loss of power is
//! recovered, worked on, and cut off again at every call. Errors at every call, and lies, of
//! workloads of one operation; a bit in every 97 bytes of every file; and forty seeded random runs.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod check;
mod common;

use check::{Checker, Effort, MARKS_OF_CRASHES, MARKS_OF_FAULTS, Op, Start, Workload, World};
use tidelock_segments::DiskFault;
use tidelock_segments::testing::{Bound, Fault};

const SLICE: Effort = Effort {
    bound: Bound::SMALL,
    images_per_call: 8,
    again_every: 100,
    again_every_kill: 10,
    bound_again: Bound::SMALL,
    images_per_call_again: 3,
};

fn judge(checker: &Checker<'_>, wanted: &[&'static str]) {
    println!(
        "{} workloads, {} points, {} images\n{}",
        checker.workloads, checker.points, checker.images, checker.marks
    );
    let failures: Vec<String> = checker
        .failures
        .iter()
        .map(|failure| format!("{failure}\n    again: {}", failure.command()))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(checker.marks.missing(wanted), [""; 0], "never seen");
}

#[test]
fn what_is_acknowledged_survives_a_crash_at_every_call() {
    let world = World::new();
    let mut checker = Checker::new(&world, SLICE);
    for workload in Workload::all(Start::Empty, 1) {
        assert_eq!(
            Workload::parse(&workload.to_string()).as_ref(),
            Some(&workload)
        );
        checker.workload(&workload);
    }
    for workload in Workload::all(Start::Grown, 2) {
        // A file of large records costs fifty times as much as any other.
        if workload.ops.len() < 2 || !workload.ops.contains(&Op::Rotate) {
            checker.workload(&workload);
        }
    }
    judge(&checker, &MARKS_OF_CRASHES);
}

#[test]
fn errors_lose_nothing_and_lies_are_never_served() {
    let world = World::new();
    let mut checker = Checker::new(&world, SLICE);
    for workload in Workload::all(Start::Grown, 1) {
        checker.errors(&workload, &Fault::Fail(DiskFault::Os(5)), false);
        checker.errors(&workload, &Fault::Fail(DiskFault::NoSpace), true);
        checker.lies(&workload);
    }
    let seal = Workload {
        start: Start::Grown,
        ops: vec![Op::Append, Op::Seal],
    };
    checker.errors(&seal, &Fault::FailDone(DiskFault::Os(5)), false);
    checker.reading_errors(&seal);
    checker.flips(&seal, 97);
    judge(&checker, &MARKS_OF_FAULTS);
}

#[test]
fn random_runs_keep_every_promise_and_replay_bit_for_bit() {
    let world = World::new();
    let mut checker = Checker::new(&world, SLICE);
    let first: Vec<[u8; 32]> = (0..40).map(|seed| checker.random(seed)).collect();
    judge(&checker, &[]);
    let again = World::new();
    let mut checker = Checker::new(&again, SLICE);
    for (seed, digest) in (0..10).zip(first) {
        assert_eq!(checker.random(seed), digest, "seed {seed}");
    }
}
