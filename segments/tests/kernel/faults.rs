//! System calls that fail: the child under `strace -e inject=…`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use crate::common::{LONG, MIB};
use crate::parent::{Promises, Running, orders, quick_dir, reopen};
use crate::protocol::{Orders, Report, Work};

/// A path that the child tries to open when it begins with the root.
pub(crate) const MARK: &str = "/tidelock-kernel-test-mark";
/// How often it does.
pub(crate) const MARKS: u64 = 16;

/// The calls that change a disk, and those that find a file. A name that this machine does not know
/// or the program does not use is counted with 0.
const CALLS: [&str; 13] = [
    "open",
    "openat",
    "pwrite64",
    "pwritev2",
    "fdatasync",
    "fsync",
    "sync_file_range",
    "rename",
    "renameat",
    "renameat2",
    "unlinkat",
    "fallocate",
    "mkdirat",
];

/// Names one injection, to be repeated alone and shown in full.
pub(crate) const ONLY: &str = "TIDELOCK_KERNEL_FAULT";

/// One injection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Injection {
    pub(crate) call: &'static str,
    pub(crate) error: &'static str,
    /// As strace's `when` has it: one number, or a number and `+` for that call and all after it.
    pub(crate) when: String,
}

impl std::fmt::Display for Injection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.call, self.error, self.when)
    }
}

/// Where each run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// No root yet.
    Fresh,
    /// A root with sealed segments and an active file.
    Used,
}

/// What became of one injection.
#[derive(Debug, Default, Clone)]
pub(crate) struct Outcome {
    pub(crate) injected: u64,
    /// Failures that the child reported.
    pub(crate) told: u64,
}

fn strace(trace: &Path, calls: &str, more: &[String]) -> Vec<String> {
    let mut args: Vec<String> = [
        "strace",
        "-f",
        "-qq",
        "-y",
        "--seccomp-bpf",
        "-s",
        "24",
        "-o",
    ]
    .iter()
    .map(|&arg| arg.to_owned())
    .collect();
    args.push(trace.to_str().unwrap().to_owned());
    args.extend(["-e".to_owned(), format!("trace={calls}")]);
    args.extend_from_slice(more);
    args.push("--".to_owned());
    args
}

/// A root's beginning and the promises made so far.
fn prepare(dir: &Path, start: Start, inline: bool) -> (Orders, Promises) {
    let orders = orders(dir, 64 * MIB, Work::Script { inline });
    let mut promises = Promises::default();
    if start == Start::Used {
        let n = reopen(&crate::child::settings(&orders)).unwrap();
        for i in 0..5 {
            n.append(format!("before {i}").as_bytes()).unwrap();
            if i % 2 == 0 {
                n.log.seal_now().unwrap();
            }
        }
        promises.compare(&n);
        n.log.close();
    }
    (orders, promises)
}

/// Which numbers of each call concern the root in a run without any fault, by call.
pub(crate) fn count(
    foreign: &Path,
    start: Start,
    inline: bool,
) -> BTreeMap<&'static str, BTreeSet<u64>> {
    let dir = quick_dir();
    let (mut orders, mut promises) = prepare(dir.path(), start, inline);
    orders.foreign = foreign.to_owned();
    let trace = dir.path().join("trace");
    // `?`: a call that this architecture does not have is none.
    let calls = CALLS.map(|call| format!("?{call}")).join(",");
    let child = Running::start(&orders, &strace(&trace, &calls, &[]));
    let reports = child.end(LONG);
    // The positive control: without a fault nothing fails.
    assert!(
        !reports.iter().any(|r| matches!(
            r,
            Report::Failed { .. } | Report::Refused { .. } | Report::Reopened { .. }
        )),
        "{reports:?}"
    );
    let acked = reports.iter().filter(|r| matches!(r, Report::Acked { .. }));
    assert_eq!(acked.count(), 7);
    assert!(
        reports
            .iter()
            .any(|r| matches!(r, Report::Licensing { .. }))
    );
    assert_eq!(reports.last(), Some(&Report::Ended { latched: None }));
    promises.hear(&reports);
    promises.check_files(&orders);
    promises.check_open(&orders);
    assert!(promises.figures.evicted_records > 0, "nothing was evicted");
    own_numbers(&std::fs::read_to_string(&trace).unwrap())
}

/// strace counts the calls of one name for each thread from its start. Gives the numbers that the
/// threads of the root made, without those that would hit the start of the process too.
fn own_numbers(trace: &str) -> BTreeMap<&'static str, BTreeSet<u64>> {
    let mut made: BTreeMap<(&str, &'static str), u64> = BTreeMap::new();
    let mut numbers: BTreeMap<&'static str, BTreeSet<u64>> = BTreeMap::new();
    let mut first = None;
    let mut marked = None;
    for line in trace.lines() {
        let Some((thread, text)) = line.split_once(' ') else {
            continue;
        };
        let first = *first.get_or_insert(thread);
        let text = text.trim_start();
        let name = text.split('(').next().unwrap_or_default();
        let Some(call) = CALLS.into_iter().find(|call| *call == name) else {
            continue;
        };
        let number = made.entry((thread, call)).or_default();
        *number += 1;
        if text.contains(MARK) {
            assert_ne!(first, thread, "a test has a thread of its own");
            marked = Some(thread);
        } else if marked.is_some() && thread != first {
            numbers.entry(call).or_default().insert(*number);
        }
    }
    assert!(marked.is_some(), "the mark was not seen");
    for (call, numbers) in &mut numbers {
        let starting = made
            .get(&(first.unwrap_or_default(), *call))
            .copied()
            .unwrap_or(0);
        assert!(starting < MARKS, "{call}: {starting} at the start");
        numbers.retain(|number| *number > starting);
    }
    numbers
}

/// One run with one injection: it ends in order, with typed failures, and nothing that was
/// acknowledged before, during or after is missing.
pub(crate) fn run(foreign: &Path, start: Start, inline: bool, injection: &Injection) -> Outcome {
    let dir = quick_dir();
    let (mut orders, mut promises) = prepare(dir.path(), start, inline);
    orders.foreign = foreign.to_owned();
    let trace = dir.path().join("trace");
    let Injection { call, error, when } = injection;
    let inject = format!("inject={call}:error={error}:when={when}");
    let child = Running::start(
        &orders,
        &strace(&trace, &format!("{call},write"), &["-e".to_owned(), inject]),
    );
    // A hang would be a fault of its own.
    let reports = child.end(Duration::from_secs(20));
    let text = std::fs::read_to_string(&trace).unwrap();
    if std::env::var_os(ONLY).is_some() {
        eprintln!("{text}{reports:#?}");
    }
    let outcome = Outcome {
        injected: text.lines().filter(|l| l.contains("(INJECTED)")).count() as u64,
        told: reports
            .iter()
            .filter(|r| match r {
                Report::Failed { .. } | Report::Refused { .. } => true,
                Report::Ended { latched } => latched.is_some(),
                _ => false,
            })
            .count() as u64,
    };
    if inline {
        no_acknowledgement_after_a_failed_commit(&text);
    }
    let opened = reports.iter().any(|r| matches!(r, Report::Opened { .. }));
    if opened && !when.ends_with('+') {
        let works = reports
            .windows(2)
            .any(|two| two[0] == Report::Mended && matches!(two[1], Report::Acked { .. }));
        assert!(works, "one fault and it never works again: {reports:?}");
    }
    promises.hear(&reports);
    promises.check_files(&orders);
    promises.check_open(&orders);
    // And once more, for the first opening may have left something to the second.
    promises.check_files(&orders);
    promises.check_open(&orders);
    outcome
}

/// With one thread the trace is the order of things: after a write or sync of the active file failed,
/// the next that the child says must not be that a record is durable.
fn no_acknowledgement_after_a_failed_commit(trace: &str) {
    let mut failed = None;
    for line in trace.lines() {
        let commits = line.contains("fdatasync(") || line.contains("pwrite64(");
        if line.contains("(INJECTED)") && commits && line.contains("/log/") {
            failed = Some(line);
        } else if line.contains(" write(")
            && line.contains(r#""{\""#)
            && let Some(failed) = failed.take()
        {
            assert!(!line.contains("Acked"), "acknowledged after {failed}");
        }
    }
}

#[test]
fn the_reader_of_traces_sees_a_false_acknowledgement() {
    let trace = |said: &str| {
        format!(
            "7 fdatasync(5</r/log/1-0.log>) = -1 EIO (Input/output error) (INJECTED)\n\
             7 write(4<pipe:[1]>, \"{{\\\"{said}\\\":{{\\\"in\"..., 90) = 90\n"
        )
    };
    no_acknowledgement_after_a_failed_commit(&trace("Refused"));
    let seen = std::panic::catch_unwind(|| {
        no_acknowledgement_after_a_failed_commit(&trace("Acked"));
    });
    assert!(seen.is_err());
}
