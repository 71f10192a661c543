//! The log and the store on a real kernel: real processes that are killed, stopped and traced, and
//! small real file systems that are full, frozen, read-only and cut off.
//!
//! A test starts this program again as its child ([`child`]); the child says on a pipe what was
//! acknowledged ([`protocol`]), and the test compares the files, and then the opened root, with all
//! that was ever said ([`parent::Promises`]). Tests that mount need root and say `not run` elsewhere.
//!
//! `TIDELOCK_KERNEL_ROUNDS` and `TIDELOCK_KERNEL_SEED` set rounds and seed of the ignored, long ones;
//! `TIDELOCK_KERNEL_FAULT`, such as `fsync EIO 17`, repeats one injection that they print as failed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

#[path = "../common/mod.rs"]
mod common;

mod child;
mod faults;
mod mounts;
mod parent;
mod protocol;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{LONG, MIB, not_run};
use faults::{Injection, Start};
use mounts::{KINDS, Kind, Mounted, may_mount, missing, try_sh};
use parent::{
    Polled, Poller, Promises, Running, leave_foreign, orders, put_one, quick_dir, reopen,
};
use protocol::{Report, Work};
use rustix::process::Signal;
use tidelock_segments::{AppendError, RecordClass, StoreError};

/// A sequence of pseudo-random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// A process that outlives its test would hold mounts and files.
fn die_with_parent() {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
}

fn number_from(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
#[ignore = "the other tests run it as their child process"]
fn child_process() {
    child::run();
}

fn load(seed: u64) -> Work {
    Work::Load {
        seed,
        writers: 6,
        largest_record_bytes: 30_000,
        for_ms: 20_000,
        licence: true,
        mend: false,
    }
}

// ---- killed -------------------------------------------------------------------------------------

/// Kills and restarts a child as often as asked for, on one root; every 16th time on a new one.
fn storm(rounds: u64, seed: u64) {
    let mut random = Random::new(seed);
    let began = Instant::now();
    let mut polled = Polled::default();
    let mut total = BTreeMap::new();
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 80, 60_000);
    // Small enough that every second life meets it.
    let ceiling = 6 * MIB;
    let mut round = 0;
    while round < rounds {
        let dir = tempfile::tempdir().unwrap();
        let mut promises = Promises::default();
        let lives = 16.min(rounds - round);
        for life in 0..lives {
            let work = match load(random.next()) {
                Work::Load {
                    seed,
                    writers,
                    largest_record_bytes,
                    for_ms,
                    mend,
                    ..
                } => Work::Load {
                    // Without custodians it stays full for a while.
                    licence: random.below(4) > 0,
                    seed,
                    writers,
                    largest_record_bytes,
                    for_ms,
                    mend,
                },
                other => other,
            };
            let mut orders = orders(dir.path(), ceiling, work);
            orders.foreign = foreign.path().to_owned();
            let child = Running::start(&orders, &[]);
            let poller = Poller::start(&orders.root, child.pid(), ceiling);
            // A quarter of them while they start and recover.
            if random.below(4) == 0 {
                std::thread::sleep(Duration::from_micros(random.below(30_000)));
            } else {
                assert!(child.opened(), "round {round}: {:?}", child.heard());
                std::thread::sleep(Duration::from_micros(random.below(250_000)));
            }
            let reports = child.kill();
            polled = polled.and(poller.stop());
            promises.hear(&reports);
            promises.check_files(&orders);
            // Otherwise the next child recovers: killed, recovered, killed, recovered again.
            if random.below(3) == 0 || life + 1 == lives {
                promises.check_open(&orders);
            }
            round += 1;
        }
        add(&mut total, &promises);
        if round % 160 == 0 {
            eprintln!(
                "{round} rounds, {:.0?}: {total:?} {polled:?}",
                began.elapsed()
            );
        }
    }
    eprintln!(
        "kill storm: seed {seed}, {rounds} rounds in {:.0?}: {total:?}, {polled:?}",
        began.elapsed()
    );
    assert_eq!(polled.over_bytes, 0, "{polled:?}");
    assert!(total["acked"] > rounds, "{total:?}");
}

fn add(total: &mut BTreeMap<String, u64>, promises: &Promises) {
    let figures = &promises.figures;
    for (name, value) in [
        ("acked", figures.acked),
        ("sealed", figures.sealed),
        ("put", figures.put),
        ("removed", figures.removed),
        ("evicted_records", figures.evicted_records),
        ("heads_checked", figures.heads_checked),
        ("torn_tails", figures.torn),
        ("unacknowledged_there", figures.unknown_there),
        ("known", promises.known()),
    ] {
        *total.entry(name.to_owned()).or_default() += value;
    }
    for (name, value) in figures.refused.iter() {
        *total.entry(format!("refused {name}")).or_default() += value;
    }
    for (name, value) in figures.failed.iter() {
        *total.entry(format!("failed {name}")).or_default() += value;
    }
    for (name, value) in [
        ("slowest_ack_us", figures.slowest_ack_us),
        ("slowest_open_us", figures.slowest_open_us),
    ] {
        let slot = total.entry(name.to_owned()).or_default();
        *slot = value.max(*slot);
    }
}

#[test]
fn killed_at_any_moment_it_loses_nothing_acknowledged_and_raises_no_alarm() {
    storm(25, number_from("TIDELOCK_KERNEL_SEED", 3));
}

#[test]
#[ignore = "long: `just soak-kill ROUNDS`"]
fn soak_kill() {
    storm(
        number_from("TIDELOCK_KERNEL_ROUNDS", 1000),
        number_from("TIDELOCK_KERNEL_SEED", 1),
    );
}

// ---- failing system calls -----------------------------------------------------------------------

fn every_call_fails(test: &str, starts: &[Start], inlines: &[bool], most_per_call: usize) {
    if let Some(why) = missing(&["strace"]) {
        return not_run(test, &why);
    }
    let began = Instant::now();
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 1, 100);
    let only = std::env::var(faults::ONLY).ok();
    let (mut runs, mut injected, mut told) = (0u64, 0u64, 0u64);
    let mut failures = Vec::new();
    for &start in starts {
        for &inline in inlines {
            let numbers = faults::count(foreign.path(), start, inline);
            for (call, numbers) in numbers {
                let numbers: Vec<_> = numbers.into_iter().collect();
                let step = numbers.len().div_ceil(most_per_call).max(1);
                let mut quiet = Vec::new();
                for error in ["EIO", "ENOSPC"] {
                    let single = numbers.iter().step_by(step).map(u64::to_string);
                    // From there on for good, as a disk that has gone read-only.
                    let lasting = numbers.iter().step_by(step * 4).map(|n| format!("{n}+"));
                    for when in single.chain(lasting) {
                        let error = if when.ends_with('+') && error == "EIO" {
                            "EROFS"
                        } else {
                            error
                        };
                        let injection = Injection { call, error, when };
                        if only
                            .as_ref()
                            .is_some_and(|only| *only != injection.to_string())
                        {
                            continue;
                        }
                        let outcome = std::panic::catch_unwind(|| {
                            faults::run(foreign.path(), start, inline, &injection)
                        });
                        runs += 1;
                        let Ok(outcome) = outcome else {
                            let failed = format!("{start:?} inline {inline} {injection}");
                            eprintln!("failed: {failed}");
                            failures.push(failed);
                            continue;
                        };
                        // With threads the counts vary a little from run to run.
                        if inline && outcome.injected == 0 {
                            failures.push(format!("{injection} was not injected"));
                        }
                        injected += u64::from(outcome.injected > 0);
                        told += u64::from(outcome.told > 0);
                        if outcome.injected > 0 && outcome.told == 0 {
                            quiet.push(format!("{} {}", injection.error, injection.when));
                        }
                    }
                }
                eprintln!(
                    "{start:?} inline {inline} {call}: {} calls, every {step}th; without a report: {quiet:?}",
                    numbers.len()
                );
            }
        }
    }
    eprintln!(
        "{runs} runs, {injected} injected, {told} told, {:.0?}",
        began.elapsed()
    );
    assert!(
        failures.is_empty(),
        "{} failed: {failures:#?}",
        failures.len()
    );
    assert!(injected > runs / 2, "{injected} of {runs} injected");
}

#[test]
fn a_failing_system_call_ends_in_a_typed_error_and_loses_nothing() {
    every_call_fails(
        "a_failing_system_call_ends_in_a_typed_error_and_loses_nothing",
        &[Start::Used],
        &[true],
        8,
    );
}

#[test]
#[ignore = "long: `just soak-kill ROUNDS`"]
fn soak_faults() {
    every_call_fails(
        "soak_faults",
        &[Start::Used, Start::Fresh],
        &[true, false],
        usize::MAX,
    );
}

// ---- small file systems -------------------------------------------------------------------------

#[test]
fn inv_04_no_byte_over_the_ceiling_on_small_ext4_and_xfs() {
    let test = "inv_04_no_byte_over_the_ceiling_on_small_ext4_and_xfs";
    if !may_mount(test, &Kind::PROGRAMS) {
        return;
    }
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 300, 60_000);
    for kind in KINDS {
        for ceiling in [16 * MIB, 64 * MIB] {
            if ceiling > 16 * MIB && kind == (Kind::Ext4 { block_bytes: 1024 }) {
                // What small blocks cost shows in the small one.
                continue;
            }
            let fs = Mounted::new(kind);
            let mut promises = Promises::default();
            // First every account until it refuses, then everything at once at full speed.
            let mut polled = Polled::default();
            for work in [Work::Fill, load(ceiling)] {
                let filling = matches!(work, Work::Fill);
                let mut orders = orders(&fs.point, ceiling, work);
                orders.foreign = foreign.path().to_owned();
                let child = Running::start(&orders, &[]);
                let poller = Poller::start(&orders.root, child.pid(), ceiling);
                let reports = if filling {
                    assert!(
                        child.wait_for(0, LONG, |r| *r == Report::Full),
                        "{:?}",
                        child.heard().last()
                    );
                    let full = parent::allocated(&orders.root, Some(child.pid()), ceiling);
                    let permille = full * 1000 / ceiling;
                    eprintln!("{kind:?}, ceiling {ceiling}: {permille} per mille usable");
                    let from = child.count();
                    // Full, and then taken over: decisions go on within a second.
                    assert!(child.wait_for(from, LONG, |r| *r == Report::Mended));
                    let began = Instant::now();
                    let heard = child.heard();
                    let from = heard.iter().position(|r| *r == Report::Mended).unwrap();
                    let acked = |r: &Report| matches!(r, Report::Acked { .. });
                    if !child.wait_for(from, Duration::from_secs(1), acked) {
                        // What the child makes of it comes at its end.
                        let reports = child.end(LONG);
                        let told = |r: &&Report| matches!(r, Report::Failed { .. });
                        let failed: Vec<_> = reports.iter().filter(told).collect();
                        panic!("{kind:?} {ceiling}: still refused: {failed:?}");
                    }
                    eprintln!(
                        "first acknowledged {:?} after the licences",
                        began.elapsed()
                    );
                    child.end(LONG)
                } else {
                    assert!(child.opened());
                    std::thread::sleep(Duration::from_millis(1500));
                    child.kill()
                };
                polled = polled.and(poller.stop());
                promises.hear(&reports);
                promises.check_files(&orders);
                promises.check_open(&orders);
            }
            eprintln!(
                "{kind:?}, ceiling {ceiling}: {polled:?} {:?}",
                promises.figures
            );
            assert_eq!(polled.over_bytes, 0, "{kind:?} {ceiling}");
            assert!(polled.peak_bytes > ceiling / 10 * 8, "{polled:?}");
        }
    }
}

#[test]
fn a_full_file_system_is_told_apart_from_the_ceiling_and_mends_itself() {
    let test = "a_full_file_system_is_told_apart_from_the_ceiling_and_mends_itself";
    if !may_mount(test, &Kind::PROGRAMS) {
        return;
    }
    for kind in KINDS {
        let fs = Mounted::new(kind);
        let foreign = quick_dir();
        leave_foreign(foreign.path(), 6, 60_000);
        // The ceiling is far above what the file system has.
        let mut orders = orders(&fs.point, 1024 * MIB, Work::Fill);
        orders.foreign = foreign.path().to_owned();
        let settings = child::settings(&orders);
        let n = reopen(&settings).unwrap();
        let mut acked = Vec::new();
        for times in 0..3 {
            acked.push(n.append(b"while there is room").unwrap());
            let tenant = fs.fill();
            let mut refused = 0;
            for _ in 0..200 {
                match n.append(&vec![b'x'; 20_000]) {
                    Ok(appended) => acked.push(appended),
                    Err(AppendError::Unavailable(_)) => refused += 1,
                    Err(other) => panic!("{kind:?}: {other}"),
                }
            }
            assert!(refused > 100, "{kind:?}: {refused} of 200 refused");
            let put = put_one(&n, foreign.path(), times);
            let latched = n.log.latched().or_else(|| n.store.latched());
            assert!(
                put == Err(StoreError::FileSystemFull)
                    || matches!(&put, Err(StoreError::Latched(_))),
                "{kind:?}: {put:?}"
            );
            assert!(!n.log.stat().at_capacity, "{kind:?}: not our own ceiling");
            std::fs::remove_file(tenant).unwrap();
            let began = Instant::now();
            if latched.is_some() {
                n.log.reopen().unwrap();
            }
            let appended = loop {
                match n.append(b"after the tenant has gone") {
                    Ok(appended) => break appended,
                    Err(error) => assert!(began.elapsed() < LONG, "{kind:?}: {error}"),
                }
                std::thread::sleep(Duration::from_millis(10));
                n.log.tick(1_700_000_000_000);
            };
            // How fast is the bench's business; here it comes back at all.
            let took = began.elapsed();
            eprintln!("{kind:?}: latched {latched:?}, {refused} refused, back after {took:?}");
            acked.push(appended);
            put_one(&n, foreign.path(), times).unwrap();
        }
        let records = n.records();
        for appended in acked {
            let (_, record) = records.iter().find(|(i, _)| *i == appended.index).unwrap();
            assert_eq!(tidelock_segments::merkle::leaf_hash(record), appended.leaf);
        }
        n.log.close();
        n.assert_ledger();
        drop(n);
        let mut promises = Promises::default();
        promises.check_open(&orders);
        promises.check_files(&orders).unwrap();
    }
}

#[test]
fn after_a_power_cut_everything_acknowledged_is_there() {
    let test = "after_a_power_cut_everything_acknowledged_is_there";
    if !may_mount(test, &Kind::PROGRAMS) {
        return;
    }
    power_cuts(4, number_from("TIDELOCK_KERNEL_SEED", 5));
}

#[test]
#[ignore = "long: `just soak-kill ROUNDS`"]
fn soak_power_cut() {
    if !may_mount("soak_power_cut", &Kind::PROGRAMS) {
        return;
    }
    let rounds = number_from("TIDELOCK_KERNEL_ROUNDS", 1000) / 10;
    power_cuts(rounds, number_from("TIDELOCK_KERNEL_SEED", 5));
}

fn power_cuts(rounds: u64, seed: u64) {
    let mut random = Random::new(seed);
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 80, 60_000);
    for kind in KINDS {
        let fs = Mounted::new(kind);
        let mut promises = Promises::default();
        for _ in 0..rounds {
            let mut orders = orders(&fs.point, 16 * MIB, load(random.next()));
            orders.foreign = foreign.path().to_owned();
            let child = Running::start(&orders, &[]);
            assert!(child.opened());
            std::thread::sleep(Duration::from_micros(random.below(250_000)));
            // A power cut ends the process too. This one does not, and xfs answers a sync of a directory
            // after it as if it were well: only what was said before it is a promise.
            let said = child.count();
            fs.cut();
            std::thread::sleep(Duration::from_millis(20));
            let reports = child.kill();
            promises.hear(&reports[..said]);
            promises.hear_doubtful(&reports[said..]);
            fs.unmount();
            fs.mount();
            promises.check_files(&orders);
            promises.check_open(&orders);
        }
        eprintln!(
            "{kind:?}: {rounds} power cuts, seed {seed}: {:?}",
            promises.figures
        );
    }
}

#[test]
fn a_file_system_that_turns_read_only_permits_nothing() {
    let test = "a_file_system_that_turns_read_only_permits_nothing";
    if !may_mount(test, &Kind::PROGRAMS) {
        return;
    }
    let fs = Mounted::new(Kind::Ext4 { block_bytes: 4096 });
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 20, 60_000);
    let work = Work::Load {
        seed: 9,
        writers: 4,
        largest_record_bytes: 30_000,
        for_ms: 20_000,
        licence: true,
        mend: true,
    };
    let mut orders = orders(&fs.point, 16 * MIB, work);
    orders.foreign = foreign.path().to_owned();
    let mut promises = Promises::default();
    let child = Running::start(&orders, &[]);
    assert!(child.opened());
    assert!(child.wait_for(0, LONG, |r| matches!(r, Report::Acked { .. })));
    // While files are open for writing, an operator cannot do it.
    let point = fs.point.to_str().unwrap();
    let refused = try_sh("mount", &["-o", "remount,ro", point]);
    assert!(!refused.status.success());
    // An error of the file system does.
    let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", fs.device_name());
    std::fs::write(trigger, "1").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let from = child.count();
    let refused = |r: &Report| matches!(r, Report::Refused { error, .. } if error == "Unavailable");
    assert!(
        child.wait_for(from, LONG, refused),
        "{:?}",
        child.heard().last()
    );
    // Reopening is refused too, and typed, for as long as it is read-only.
    let unmended = |r: &Report| matches!(r, Report::Reopened { why } if !why.is_empty());
    assert!(
        child.wait_for(from, LONG, unmended),
        "{:?}",
        child.heard().last()
    );
    std::thread::sleep(Duration::from_millis(200));
    let all = child.kill();
    let late: Vec<_> = all[from..]
        .iter()
        .filter(|r| {
            matches!(
                r,
                Report::Acked { .. } | Report::Put { stored: true, .. } | Report::Slot { .. }
            )
        })
        .collect();
    assert!(late.is_empty(), "acknowledged while read-only: {late:?}");
    promises.hear(&all);
    fs.unmount();
    fs.mount();
    promises.check_files(&orders);
    promises.check_open(&orders);
    eprintln!("read-only: {:?}", promises.figures);
}

// ---- stalled ------------------------------------------------------------------------------------

/// The load while something stands still for two seconds.
fn stalls(orders: &protocol::Orders, stall: &dyn Fn(&Running)) -> Promises {
    let mut promises = Promises::default();
    let child = Running::start(orders, &[]);
    assert!(child.opened());
    assert!(child.wait_for(0, LONG, |r| matches!(r, Report::Acked { .. })));
    std::thread::sleep(Duration::from_millis(200));
    let from = child.count();
    stall(&child);
    let after = child.count();
    let began = Instant::now();
    let acked = |r: &Report| matches!(r, Report::Acked { .. });
    assert!(
        child.wait_for(after, LONG, acked),
        "{:?}",
        child.heard().last()
    );
    let back = began.elapsed();
    std::thread::sleep(Duration::from_millis(200));
    let all = child.kill();
    let during: Vec<_> = all[from..after].to_vec();
    let count = |what: fn(&Report) -> bool| during.iter().filter(|r| what(r)).count();
    eprintln!(
        "stalled: {} acknowledged, {} refused meanwhile, back after {back:?}",
        count(|r| matches!(r, Report::Acked { .. })),
        count(|r| matches!(r, Report::Refused { .. })),
    );
    for report in &all {
        if let Report::Reopened { .. } = report {
            panic!("nothing failed, so nothing needs mending: {report:?}");
        }
    }
    promises.hear(&all);
    promises.check_files(orders);
    promises.check_open(orders);
    eprintln!("stalled: {:?}", promises.figures);
    promises
}

/// An append's limit is 250 ms; a loaded machine wakes a thread late.
const SLACK: Duration = Duration::from_millis(500);

#[test]
fn a_frozen_file_system_refuses_in_time_and_goes_on_when_thawed() {
    let test = "a_frozen_file_system_refuses_in_time_and_goes_on_when_thawed";
    if !may_mount(test, &["mkfs.ext4", "mkfs.xfs", "fsfreeze"]) {
        return;
    }
    let foreign = quick_dir();
    leave_foreign(foreign.path(), 20, 60_000);
    for kind in [Kind::Ext4 { block_bytes: 4096 }, Kind::Xfs] {
        let fs = Mounted::new(kind);
        let mut orders = orders(&fs.point, 16 * MIB, load(11));
        orders.foreign = foreign.path().to_owned();
        let promises = stalls(&orders, &|_| {
            assert!(fs.freeze_for("2").wait().unwrap().success());
        });
        let figures = &promises.figures;
        // Six writers, eight answers each: nobody waits longer than an append may take.
        assert!(
            figures.refused["Unavailable"] >= 20,
            "{kind:?}: {figures:?}"
        );
        let slowest = Duration::from_micros(figures.slowest_refusal_us.max(figures.slowest_ack_us));
        assert!(
            slowest < child::APPEND_LIMIT + SLACK,
            "{kind:?}: {slowest:?}"
        );
    }
}

#[test]
fn a_stopped_process_answers_in_time_when_it_goes_on_and_loses_nothing() {
    let dir = quick_dir();
    leave_foreign(&dir.path().join("foreign"), 20, 60_000);
    let orders = orders(dir.path(), 16 * MIB, load(12));
    let stopped = Duration::from_secs(2);
    let promises = stalls(&orders, &|child| {
        child.signal(Signal::STOP);
        std::thread::sleep(stopped);
        child.signal(Signal::CONT);
    });
    let figures = &promises.figures;
    let slowest = Duration::from_micros(figures.slowest_refusal_us.max(figures.slowest_ack_us));
    assert!(
        slowest < stopped + child::APPEND_LIMIT + SLACK,
        "{slowest:?}"
    );
}

// ---- from outside -------------------------------------------------------------------------------

/// The active log files below a root.
fn active_files(root: &Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(root.join("log")).unwrap();
    let mut files: Vec<_> = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .collect();
    files.sort();
    files
}

#[test]
fn a_log_file_unlinked_or_replaced_from_outside_is_noticed_and_nothing_is_lost() {
    for replaced in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let orders = orders(dir.path(), 64 * MIB, Work::Fill);
        let settings = child::settings(&orders);
        let n = reopen(&settings).unwrap();
        let mut acked = Vec::new();
        for i in 0..20 {
            acked.push(n.append(format!("before {i}").as_bytes()).unwrap());
        }
        let file = active_files(&orders.root).pop().unwrap();
        let inode = std::fs::metadata(&file).unwrap().ino();
        if replaced {
            // The same content under the same name, and yet not the file that is written.
            let copy = dir.path().join("copy");
            std::fs::copy(&file, &copy).unwrap();
            std::fs::rename(&copy, &file).unwrap();
            assert_ne!(std::fs::metadata(&file).unwrap().ino(), inode);
        } else {
            std::fs::remove_file(&file).unwrap();
        }
        n.log.tick(1_700_000_000_000);
        assert!(
            n.log.latched().is_some(),
            "replaced {replaced}: not noticed"
        );
        let refused = n
            .log
            .append_wait(RecordClass::Decision, b"no".to_vec(), LONG);
        assert!(matches!(refused, Err(AppendError::Unavailable(_))));
        n.log.reopen().unwrap();
        acked.push(n.append(b"after").unwrap());
        let compare = |n: &common::Node| {
            let records = n.records();
            for appended in &acked {
                let (_, record) = records.iter().find(|(i, _)| *i == appended.index).unwrap();
                assert_eq!(tidelock_segments::merkle::leaf_hash(record), appended.leaf);
            }
        };
        compare(&n);
        n.log.close();
        drop(n);
        let report = tidelock_segments::verify_log(
            &tidelock_segments::RealDisk::new(),
            &orders.root,
            &common::domain(),
        )
        .unwrap();
        assert!(report.ok, "replaced {replaced}: {report:#?}");
        let n = reopen(&settings).unwrap();
        assert_eq!(n.recovery.new_incarnation, None, "replaced {replaced}");
        compare(&n);
    }
}
