//! Durable appends from one, eight and sixty-four writers, every system in turn.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::disk::{Watched, device_bytes, settle};
use crate::{
    Row, cpu, median,
    peers::{self, CEILING_BYTES, Log, Node, OURS, Ours, Raw, SEGMENT_BYTES, SYSTEMS, decision},
};

pub const RECORD_BYTES: usize = 512;
const SLICES: usize = 5;
const SLICE: Duration = Duration::from_millis(600);
/// Where files are prepared ahead: long enough that the last of them weighs little.
const LONG_SLICE: Duration = Duration::from_millis(2_500);
const WARM: Duration = Duration::from_millis(150);
/// Distinct records of each writer; a compressor's block holds fewer.
const POOL: u64 = 256;

/// What one slice came to.
pub struct Drive {
    /// Records, those of warming up included.
    pub total: u64,
    pub per_second: f64,
    pub cpu_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// Writers in a closed loop: each appends, waits until it is durable, and appends again.
pub fn drive(log: &dyn Log, writers: usize, slice: Duration) -> Result<Drive, String> {
    const MEASURE: u8 = 1;
    const END: u8 = 2;
    let phase = AtomicU8::new(0);
    let work = |writer: usize| {
        let pool: Vec<_> = (0..POOL)
            .map(|n| decision(writer as u64 * POOL + n, RECORD_BYTES))
            .collect();
        let (mut times, mut total) = (Vec::<u32>::with_capacity(1 << 16), 0_u64);
        for record in pool.iter().cycle() {
            let now = phase.load(Ordering::Relaxed);
            if now == END {
                break;
            }
            let begun = Instant::now();
            log.append(writer, record)?;
            total += 1;
            if now == MEASURE {
                times.push(begun.elapsed().as_nanos().min(u32::MAX.into()) as u32);
            }
        }
        Ok::<_, String>((times, total))
    };
    let (all, seconds, cpu_s) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers).map(|w| scope.spawn(move || work(w))).collect();
        std::thread::sleep(WARM);
        let (begun, cpu_begun) = (Instant::now(), cpu());
        phase.store(MEASURE, Ordering::Relaxed);
        std::thread::sleep(slice);
        phase.store(END, Ordering::Relaxed);
        let (seconds, cpu_s) = (begun.elapsed(), cpu() - cpu_begun);
        let all: Vec<_> = threads
            .into_iter()
            .map(|t| t.join().expect("a writer"))
            .collect();
        (all, seconds.as_secs_f64(), cpu_s.as_secs_f64())
    });
    let (mut times, mut total) = (Vec::new(), 0);
    for one in all {
        let (some, count) = one?;
        times.extend(some);
        total += count;
    }
    times.sort_unstable();
    let at = |share: f64| {
        let last = times.len().saturating_sub(1);
        times
            .get((last as f64 * share) as usize)
            .map_or(f64::NAN, |ns| f64::from(*ns) / 1e3)
    };
    Ok(Drive {
        total,
        per_second: times.len() as f64 / seconds,
        cpu_us: cpu_s * 1e6 / (times.len() as f64).max(1.0),
        p50_us: at(0.5),
        p99_us: at(0.99),
    })
}

/// The medians of one system at one load.
#[derive(Default)]
struct Series {
    per_second: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    cpu_us: Vec<f64>,
    device: Vec<f64>,
}

impl Series {
    fn json(&self) -> Value {
        json!({
            "per_second": median(self.per_second.clone()).round(),
            "p50_us": median(self.p50_us.clone()).round(),
            "p99_us": median(self.p99_us.clone()).round(),
            "cpu_us": (median(self.cpu_us.clone()) * 100.0).round() / 100.0,
            "device_bytes": self.device.iter().copied().reduce(f64::min).map(f64::round),
        })
    }
}

type Table = BTreeMap<&'static str, Series>;

fn add(
    table: &mut Table,
    name: &'static str,
    dir: &Path,
    writers: usize,
    log: Box<dyn Log>,
) -> Result<(), String> {
    settle(dir);
    let before = device_bytes(dir);
    let drive = drive(&*log, writers, SLICE)?;
    drop(log);
    settle(dir);
    let series = table.entry(name).or_default();
    series.per_second.push(drive.per_second);
    series.p50_us.push(drive.p50_us);
    series.p99_us.push(drive.p99_us);
    series.cpu_us.push(drive.cpu_us);
    if let (Ok(before), Ok(after)) = (before, device_bytes(dir)) {
        series
            .device
            .push((after - before) as f64 / drive.total.max(1) as f64);
    }
    Ok(())
}

/// All systems in turn, as often as there are slices. A system that fails is left out, with its word.
fn measure(dir: &Path, writers: usize, good: &[usize]) -> (Table, Vec<String>) {
    let (mut table, mut failed) = (Table::new(), Vec::new());
    for slice in 0..SLICES {
        if writers == 1 {
            let dir = dir.join(format!("raw-{slice}"));
            let raw =
                Raw::open(&dir).and_then(|raw| add(&mut table, "raw", &dir, 1, Box::new(raw)));
            failed.extend(raw.err());
        }
        for system in good {
            let system = &SYSTEMS[*system];
            let dir = dir.join(format!(
                "{system}-{writers}-{slice}",
                system = system.name.split(' ').next().unwrap_or("")
            ));
            let done = (system.open)(&dir, writers)
                .and_then(|log| add(&mut table, system.name, &dir, writers, log));
            failed.extend(done.err().map(|why| format!("{}: {why}", system.name)));
            let _ = std::fs::remove_dir_all(&dir);
        }
    }
    (table, failed)
}

fn detail(table: &Table, failed: &[String]) -> Value {
    let mut all: serde_json::Map<String, Value> = table
        .iter()
        .map(|(name, series)| ((*name).to_owned(), series.json()))
        .collect();
    if !failed.is_empty() {
        all.insert("failed".to_owned(), failed.into());
    }
    Value::Object(all)
}

pub fn rows(dir: &Path, _: bool) -> Vec<Row> {
    let mut good = Vec::new();
    let mut wrong = Vec::new();
    for (n, system) in SYSTEMS.iter().enumerate() {
        match peers::check(system, &dir.join(format!("check-{n}"))) {
            Ok(()) => good.push(n),
            Err(why) => wrong.push(why),
        }
    }
    let value = |table: &Table, name: &str, of: fn(&Series) -> &Vec<f64>| {
        table.get(name).map(|series| median(of(series).clone()))
    };
    let run = |writers| {
        let (table, mut failed) = measure(dir, writers, &good);
        failed.extend(wrong.iter().cloned());
        let all = detail(&table, &failed);
        (table, all, failed.join("; "))
    };
    let mut rows = Vec::new();

    let (table, all, why) = run(1);
    rows.push(
        match (
            value(&table, OURS, |s| &s.p50_us),
            value(&table, "raw", |s| &s.p50_us),
        ) {
            (Some(ours), Some(raw)) => Row::measured(
                "one-writer-p50",
                "us",
                (ours, "raw pwrite + fdatasync", raw),
                "<= 1.25",
                |r| r <= 1.25,
            )
            .with(all),
            _ => Row::not_run("one-writer-p50", "raw pwrite + fdatasync", "<= 1.25", why),
        },
    );

    let (table, all, why) = run(8);
    let okaywal = SYSTEMS[1].name;
    rows.push(
        match (
            value(&table, OURS, |s| &s.per_second),
            value(&table, okaywal, |s| &s.per_second),
        ) {
            (Some(ours), Some(theirs)) => Row::measured(
                "eight-writers",
                "records/s",
                (ours, okaywal, theirs),
                ">= 1.2",
                |r| r >= 1.2,
            )
            .with(all),
            _ => Row::not_run("eight-writers", okaywal, ">= 1.2", why),
        },
    );

    let (table, all, why) = run(64);
    let best = table
        .iter()
        .filter(|(name, _)| **name != OURS)
        .map(|(name, series)| (*name, median(series.per_second.clone())))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    match (value(&table, OURS, |s| &s.per_second), best) {
        (Some(ours), Some((name, theirs))) => {
            rows.push(
                Row::measured(
                    "sixty-four-writers",
                    "records/s",
                    (ours, name, theirs),
                    ">= 2",
                    |r| r >= 2.0,
                )
                .with(all),
            );
            let p99 = |name| value(&table, name, |s| &s.p99_us).unwrap_or(f64::NAN) / 1e3;
            let ours = p99(OURS);
            rows.push(Row::absolute(
                "sixty-four-writers-p99",
                "ms",
                ours,
                Some((name, p99(name))),
                "<= 1.5 ms",
                ours <= 1.5,
            ));
        }
        _ => {
            rows.push(Row::not_run(
                "sixty-four-writers",
                "best peer",
                ">= 2",
                why.clone(),
            ));
            rows.push(Row::not_run(
                "sixty-four-writers-p99",
                "best peer",
                "<= 1.5 ms",
                why,
            ));
        }
    }
    rows
}

/// Bytes that reach the device for each record of sixty-four writers.
fn device_bytes_row(dir: &Path) -> Result<Row, String> {
    let raft = &SYSTEMS[2];
    let (mut ours, mut theirs, mut counted) = (Vec::new(), Vec::new(), Value::Null);
    for slice in 0..3 {
        let here = dir.join(format!("ours-{slice}"));
        let watched = Watched::default();
        let counts = watched.counts.clone();
        let log = Ours(Node::open_with(
            Arc::new(watched),
            &here,
            CEILING_BYTES,
            SEGMENT_BYTES,
        )?);
        let measure = |log: Box<dyn Log>, here: &Path| {
            settle(here);
            let before = device_bytes(here)?;
            let drive = drive(&*log, 64, LONG_SLICE)?;
            drop(log);
            settle(here);
            Ok::<_, String>((
                (device_bytes(here)? - before) as f64 / drive.total as f64,
                drive.total,
            ))
        };
        counts.take();
        let (bytes, total) = measure(Box::new(log), &here)?;
        if ours.iter().all(|least| bytes < *least) {
            counted = counts
                .take()
                .into_iter()
                .map(|(what, n)| {
                    (
                        what.to_owned(),
                        json!((n as f64 / total as f64 * 1e3).round() / 1e3),
                    )
                })
                .collect::<serde_json::Map<_, _>>()
                .into();
        }
        ours.push(bytes);
        let here = dir.join(format!("raft-{slice}"));
        theirs.push(measure((raft.open)(&here, 64)?, &here)?.0);
    }
    let least = |values: Vec<f64>| values.into_iter().fold(f64::INFINITY, f64::min);
    let ours = least(ours);
    Ok(Row::absolute("device-bytes-64", "B/record", ours, Some((raft.name, least(theirs))), "<= 620 B", ours <= 620.0)
        .with(json!({
            "least_of_slices": 3,
            "our_calls_per_record": counted,
            "note": "the device's counters hold everything: preparing files, commits, seals, and whatever others write; \
                     our_calls_per_record are the bytes and syncs that the log asked for",
        })))
}

pub fn device_bytes_rows(dir: &Path, _: bool) -> Vec<Row> {
    vec![
        device_bytes_row(dir).unwrap_or_else(|why| {
            Row::not_run("device-bytes-64", SYSTEMS[2].name, "<= 620 B", why)
        }),
    ]
}

/// The same log once more, without leaf hashes, tree and signatures (`bench/bare`).
pub fn tree_tax(dir: &Path, _: bool) -> Vec<Row> {
    const ID: &str = "tree-tax-64";
    let bare = &peers::BARE;
    let run = || {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        // The difference is small, so more and shorter turns than elsewhere.
        for slice in 0..5 {
            for (rates, system) in [(&mut with, &SYSTEMS[0]), (&mut without, bare)] {
                let dir = dir.join(format!("{slice}-{}", rates.len()));
                let log = (system.open)(&dir, 64)?;
                settle(&dir);
                let drive = drive(&*log, 64, SLICE)?;
                rates.push((drive.per_second, drive.cpu_us));
                drop(log);
                let _ = std::fs::remove_dir_all(&dir);
            }
        }
        Ok::<_, String>((with, without))
    };
    let (with, without) = match peers::bare_is_bare(&dir.join("check")).and_then(|()| run()) {
        Ok(both) => both,
        Err(why) => return vec![Row::not_run(ID, bare.name, "<= 15 %", why)],
    };
    let rate = |all: &[(f64, f64)]| median(all.iter().map(|one| one.0).collect());
    let cpu = |all: &[(f64, f64)]| median(all.iter().map(|one| one.1).collect());
    let tax = (1.0 - rate(&with) / rate(&without)) * 100.0;
    vec![
        Row::absolute(ID, "%", tax, None, "<= 15 %", tax <= 15.0).with(json!({
            "with_per_second": rate(&with).round(),
            "without_per_second": rate(&without).round(),
            "with_cpu_us": cpu(&with),
            "without_cpu_us": cpu(&without),
            "without": "the crate's own source, with leaf_hash, node_hash, sign and verify answering constants",
        })),
    ]
}
