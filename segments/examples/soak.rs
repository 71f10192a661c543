//! The whole crash check of log and store on a simulated disk, then seeded random runs:
//!
//! ```text
//! just soak-disk 10                           all of it, for ten minutes at least
//! just soak-disk-replay 7                     one random run again, bit for bit
//! cargo run --release -p tidelock-segments --example soak -- --workload Grown:Append,Seal
//! ```
//!
//! What a crash may leave and how much of it is tried is written at `Bound`. Ends with status 1 and
//! the cases if a promise was broken, or if a situation that the check is for never came about.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::float_arithmetic,
    reason = "a tool for developers, and it shares the helpers of the tests"
)]

#[path = "../tests/check/mod.rs"]
mod check;
#[path = "../tests/common/mod.rs"]
mod common;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use check::{Checker, Effort, MARKS_OF_CRASHES, MARKS_OF_FAULTS, Start, Workload, World};
use tidelock_segments::DiskFault;
use tidelock_segments::testing::{Bound, Fault};

const ALL: Effort = Effort {
    bound: Bound::LARGE,
    images_per_call: 64,
    again_every: 300,
    again_every_kill: 40,
    bound_again: Bound::SMALL,
    images_per_call_again: 3,
};

const STARTS: [Start; 3] = [Start::Empty, Start::Fresh, Start::Grown];

fn cpu_s() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
    .as_secs_f64()
}

/// Runs one part and says what it did.
fn part(checker: &mut Checker<'_>, name: &str, run: impl FnOnce(&mut Checker<'_>)) {
    let (images, points, begun) = (checker.images, checker.points, cpu_s());
    run(checker);
    let used = cpu_s() - begun;
    let images = checker.images - images;
    println!(
        "{name}: {} crash points, {images} images checked in {used:.1} CPU s, {:.0} images/s",
        checker.points - points,
        u32::try_from(images).map_or(f64::NAN, f64::from) / used.max(1e-9),
    );
}

fn usage() -> ExitCode {
    eprintln!("soak [--minutes N] [--operations 1..3] | --seed SEED | --workload START:OP,OP,…");
    ExitCode::from(2)
}

fn faults(checker: &mut Checker<'_>, workload: &Workload) {
    for fault in [DiskFault::Os(5), DiskFault::NoSpace] {
        for standing in [false, true] {
            checker.errors(workload, &Fault::Fail(fault), standing);
        }
    }
    checker.errors(workload, &Fault::FailDone(DiskFault::Os(5)), false);
    checker.reading_errors(workload);
    checker.lies(workload);
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut minutes, mut operations, mut seed, mut workload) = (1u64, 3usize, None, None);
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { return usage() };
        let number = value.parse::<u64>();
        match (name.as_str(), number) {
            ("--minutes", Ok(number)) => minutes = number,
            ("--operations", Ok(number @ 1..=3)) => operations = usize::try_from(number).unwrap(),
            ("--seed", Ok(number)) => seed = Some(number),
            ("--workload", Err(_)) => match Workload::parse(value) {
                Some(parsed) => workload = Some(parsed),
                None => return usage(),
            },
            _ => return usage(),
        }
    }
    let world = World::new();
    let mut checker = Checker::new(&world, ALL);
    let mut wanted: Vec<&'static str> = Vec::new();
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    if let Some(seed) = seed {
        let digest = checker.random(seed);
        println!("seed {seed}: {}", blake3::Hash::from_bytes(digest));
    } else if let Some(workload) = workload {
        checker.workload(&workload);
        faults(&mut checker, &workload);
        checker.flips(&workload, 1);
    } else {
        wanted.extend(MARKS_OF_CRASHES);
        wanted.extend(MARKS_OF_FAULTS);
        for count in 0..=operations {
            part(
                &mut checker,
                &format!("crashes in workloads of {count}"),
                |checker| {
                    for start in STARTS {
                        let all = Workload::all(start, count);
                        for workload in all.iter().filter(|w| w.ops.len() == count) {
                            checker.workload(workload);
                        }
                    }
                },
            );
        }
        part(
            &mut checker,
            "errors and lies in workloads of up to 2",
            |checker| {
                for start in STARTS {
                    for workload in Workload::all(start, operations.min(2)) {
                        faults(checker, &workload);
                    }
                }
            },
        );
        part(&mut checker, "flipped bits", |checker| {
            for workload in Workload::all(Start::Grown, 1) {
                checker.flips(&workload, 3);
            }
        });
        let first = 1_000_000 * u64::from(std::process::id());
        let mut next = first;
        part(&mut checker, "random runs", |checker| {
            while !checker.is_full() && (Instant::now() < until || next < first + 1000) {
                checker.random(next);
                next += 1;
            }
        });
        println!("seeds {first}..{next}");
    }
    println!("{} workloads\n{}", checker.workloads, checker.marks);
    for failure in &checker.failures {
        println!("FAILED {failure}");
        println!("    again: {}", failure.command());
    }
    let missing = checker.marks.missing(&wanted);
    for mark in &missing {
        println!("NEVER SEEN: {mark}");
    }
    ExitCode::from(u8::from(
        !checker.failures.is_empty() || !missing.is_empty(),
    ))
}
