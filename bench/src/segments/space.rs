//! What a store costs in bytes, in reading, and while it is being read.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock_segments::{
    AppendError, CustodyReceipt, LogKey, NodeId, RealDisk, RecordClass, read_records, verify_log,
};

use super::{
    GIB, MIB,
    append::RECORD_BYTES,
    disk::{allocated, forget_pages, settle},
    great,
};
use crate::{
    Row, cpu, median,
    peers::{Node, decision, domain, endorsement, full_decision, text},
};

const RECORDS: u64 = 300_000;
const DECISION_BYTES: usize = 352;

fn or_not_run(id: &'static str, aim: &'static str, row: Result<Row, String>) -> Vec<Row> {
    vec![row.unwrap_or_else(|why| Row::not_run(id, "", aim, why))]
}

pub fn verify_rows(dir: &Path, _: bool) -> Vec<Row> {
    or_not_run("verify-records", ">= 1.5 M/s a core", verify(dir))
}

pub fn decision_rows(dir: &Path, _: bool) -> Vec<Row> {
    or_not_run(
        "disk-bytes-per-decision",
        "<= 75 B",
        bytes_per_decision(dir),
    )
}

pub fn freed_rows(dir: &Path, _: bool) -> Vec<Row> {
    or_not_run("space-freed-to-append", "<= 1 s", space_freed(dir))
}

/// Appends many records, as many under way at once as the log's queue takes, and waits for the last.
pub fn fill(node: &Node, records: impl Iterator<Item = Vec<u8>>) -> Result<u64, String> {
    const WINDOW_BYTES: u64 = 8 * MIB;
    let (done, refused) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
    let (mut sent, mut sent_bytes) = (0, 0);
    let wait = |until: u64| {
        let begun = Instant::now();
        while done.load(Ordering::Acquire) < until {
            if begun.elapsed() > Duration::from_secs(60) {
                return Err("records were not durable within a minute".to_owned());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    };
    for record in records {
        let bytes = record.len() as u64;
        wait((sent_bytes + bytes).saturating_sub(WINDOW_BYTES))?;
        let (done, refused) = (done.clone(), refused.clone());
        node.log.submit(
            RecordClass::Decision,
            record,
            Box::new(move |result| {
                if let Err(error) = result {
                    *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
                done.fetch_add(bytes, Ordering::Release);
            }),
        );
        sent += 1;
        sent_bytes += bytes;
    }
    wait(sent_bytes)?;
    let refused = refused
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    refused.map_or(Ok(sent), |error| {
        Err(format!("a record was refused: {error}"))
    })
}

fn verify(dir: &Path) -> Result<Row, String> {
    let node = Node::open(dir)?;
    fill(&node, (0..RECORDS).map(|n| decision(n, RECORD_BYTES)))?;
    node.log.seal_now().map_err(text)?;
    let sealed = node.log.stat().sealed_records;
    node.log.close();
    drop(node);
    let (mut rates, mut walls) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (begun, cpu_begun) = (Instant::now(), cpu());
        let report = verify_log(&RealDisk, dir, &domain()).map_err(text)?;
        let (wall, spent) = (
            begun.elapsed().as_secs_f64(),
            (cpu() - cpu_begun).as_secs_f64(),
        );
        let records: u64 = report.origins.iter().map(|origin| origin.records).sum();
        if !report.ok || records < sealed {
            return Err(format!(
                "the report is wrong: {records} of {sealed} records, ok {}",
                report.ok
            ));
        }
        rates.push(records as f64 / spent);
        walls.push(records as f64 / wall);
    }
    let rate = median(rates) / 1e6;
    Ok(Row::absolute("verify-records", "M/s per core", rate, None, ">= 1.5 M/s a core", rate >= 1.5)
        .with(json!({"records": sealed, "record_bytes": RECORD_BYTES, "per_second_wall": median(walls).round()})))
}

/// Decisions sealed, and all that lies below the root for them except the log's active files: those
/// are of fixed size, and no sealed record is in them.
fn sealed(
    dir: &Path,
    count: u64,
    record: impl Fn(u64) -> Vec<u8>,
) -> Result<(f64, usize, BTreeMap<String, u64>), String> {
    let node = Node::open(dir)?;
    let sent = fill(&node, (0..count).map(record))?;
    node.log.seal_now().map_err(text)?;
    let segments = node.store.list(None);
    let mut held = 0;
    for segment in &segments {
        let segment = node.store.get(&segment.id).map_err(text)?;
        held += read_records(&segment).map_err(text)?.len() as u64;
    }
    if held < sent {
        return Err(format!("{held} of {sent} decisions are in the segments"));
    }
    node.log.close();
    drop(node);
    settle(dir);
    let all = allocated(dir);
    let bytes: u64 = all
        .iter()
        .filter(|(name, _)| *name != "log")
        .map(|(_, bytes)| bytes)
        .sum();
    Ok((bytes as f64 / sent as f64, segments.len(), all))
}

fn bytes_per_decision(dir: &Path) -> Result<Row, String> {
    const ID: &str = "disk-bytes-per-decision";
    let (each, segments, all) = sealed(&dir.join("352"), RECORDS, |n| decision(n, DECISION_BYTES))?;
    let full = |own_params: bool| {
        let dir = dir.join(format!("full-{own_params}"));
        let bytes = full_decision(100_000, own_params).len();
        sealed(&dir, RECORDS / 3, |n| full_decision(n, own_params))
            .map(|(each, ..)| json!({"record_bytes": bytes, "disk_bytes": each}))
    };
    Ok(
        Row::absolute(ID, "B/record", each, None, "<= 75 B", each <= 75.0).with(json!({
            "decisions": RECORDS,
            "decision_bytes": DECISION_BYTES,
            "unique": "each has a hash of 32 random bytes in hexadecimal and its own resource name",
            "segments": segments,
            "allocated": all,
            "all_fields": full(false)?,
            "all_fields_own_params_and_request_id": full(true)?,
        })),
    )
}

/// A full log gets receipts for its oldest segments: how long until it takes a record again?
fn space_freed(dir: &Path) -> Result<Row, String> {
    let node = Node::open_with(Arc::new(RealDisk), dir, 48 * MIB, MIB)?;
    let custodian = NodeId::new("n2").map_err(text)?;
    let key = LogKey::generate().map_err(text)?;
    let endorsed = endorsement(&custodian, &key.public(), 1);
    let append = |n: u64| {
        node.log.append_wait(
            RecordClass::Decision,
            great::noise(n),
            Duration::from_secs(10),
        )
    };
    let (mut times, mut raised) = (Vec::new(), Vec::new());
    let mut n = 0;
    let mut fill_up = || {
        // Bytes that sealing cannot make smaller; a bound, in case that nothing is ever refused.
        while n < 20_000 {
            n += 1;
            match append(n) {
                Ok(_) => {}
                Err(AppendError::Capacity) => return Ok(n),
                Err(error) => return Err(text(error)),
            }
        }
        Err("the log was never full".to_owned())
    };
    let acknowledged = |begun: Instant, n: u64| {
        loop {
            match append(n) {
                Ok(_) => return Ok(begun.elapsed().as_secs_f64() * 1e3),
                Err(AppendError::Capacity) if begun.elapsed() < Duration::from_secs(30) => {
                    std::thread::sleep(Duration::from_micros(500));
                }
                Err(error) => return Err(text(error)),
            }
        }
    };
    for slice in 0..3 {
        let full = fill_up()?;
        let own = node.store.own_audit(&NodeId::new("n1").map_err(text)?);
        let mut receipts = Vec::new();
        for reference in own.iter().take(4) {
            let segment = node.store.get(&reference.id).map_err(text)?;
            receipts.push(
                CustodyReceipt::issue(&segment, &custodian, 1, &key, &endorsed).map_err(text)?,
            );
        }
        let begun = Instant::now();
        for receipt in &receipts {
            node.log.take_receipt(receipt).map_err(text)?;
        }
        times.push(acknowledged(begun, full)?);
        fill_up()?;
        let begun = Instant::now();
        node.root.ledger().set_ceiling((48 + 8 * (slice + 1)) * MIB);
        node.log.reclaim();
        raised.push(acknowledged(begun, full)?);
    }
    let worst = median(times.clone()).max(median(raised.clone()));
    node.log.close();
    Ok(Row::absolute("space-freed-to-append", "ms", worst, None, "<= 1 s", worst <= 1_000.0)
        .with(json!({"receipts_ms": median(times), "ceiling_raised_ms": median(raised), "restart": false})))
}

/// What appends wait for beside an export and a scrub of everything that is stored.
pub fn under_export(dir: &Path) -> Result<Row, String> {
    let node = Node::open(dir)?;
    let (mut idle, mut busy, mut read) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        settle(dir);
        idle.push(paced(&node, false)?.0);
        forget_pages(dir);
        let (times, bytes) = paced(&node, true)?;
        busy.push(times);
        read.push(bytes);
    }
    node.log.close();
    let p50 = |all: &[Times]| median(all.iter().map(|one| one.0).collect());
    let p99 = |all: &[Times]| median(all.iter().map(|one| one.1).collect());
    let both = (p99(&busy), "the same log idle", p99(&idle));
    Ok(Row::measured("append-p99-under-export", "us", both, "<= 2", |r| r <= 2.0).with(json!({
        "p50_us": p50(&busy),
        "p50_idle_us": p50(&idle),
        "exported_and_scrubbed_bytes": read,
        "load": "four writers, 200 appends/s each, timed from when each was due; pages of the store dropped \
                 before; one thread exports at full speed, at least 1 GiB, one scrubs at 64 MiB/s",
    })))
}

/// p50 and p99 in microseconds.
type Times = (f64, f64);

/// Four writers at a fixed pace for three seconds, and until the export beside them has read its
/// GiB; the bytes are those exported and scrubbed.
fn paced(node: &Node, beside: bool) -> Result<(Times, (u64, u64)), String> {
    const PACE: Duration = Duration::from_millis(5);
    const AT_LEAST: Duration = Duration::from_secs(3);
    const AT_MOST: Duration = Duration::from_secs(12);
    let ended = &AtomicBool::new(false);
    let begun = Instant::now();
    let write = |writer: u64| {
        let mut times = Vec::new();
        let mut next = Instant::now() + PACE / 4 * writer as u32;
        for n in writer << 32.. {
            if ended.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            // From when it was due: what waits behind a late one counts as late too.
            node.append(&decision(n, RECORD_BYTES))?;
            times.push(next.elapsed().as_secs_f64() * 1e6);
            next += PACE;
        }
        Ok::<_, String>(times)
    };
    let scrub = || {
        let mut bytes = 0;
        while beside && !ended.load(Ordering::Relaxed) {
            bytes += node.store.scrub(8 * MIB).map_err(text)?.bytes;
            std::thread::sleep(Duration::from_millis(125));
        }
        Ok::<_, String>(bytes)
    };
    let export = || {
        let mut bytes = 0;
        while beside && begun.elapsed() < AT_MOST && (bytes < GIB || begun.elapsed() < AT_LEAST) {
            for segment in node.store.list(None) {
                bytes += node.store.get(&segment.id).map_err(text)?.bytes().len() as u64;
                if begun.elapsed() > AT_MOST {
                    break;
                }
            }
        }
        std::thread::sleep(AT_LEAST.saturating_sub(begun.elapsed()));
        Ok::<_, String>(bytes)
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| scope.spawn(move || write(writer)))
            .collect();
        let scrub = scope.spawn(scrub);
        let exported = export();
        ended.store(true, Ordering::Relaxed);
        let scrubbed = scrub.join().map_err(|_| "the scrub panicked".to_owned())?;
        let mut all = Vec::new();
        for writer in writers {
            all.extend(
                writer
                    .join()
                    .map_err(|_| "a writer panicked".to_owned())??,
            );
        }
        all.sort_by(f64::total_cmp);
        let at = |share: f64| {
            all.get((all.len() as f64 * share) as usize)
                .copied()
                .unwrap_or(f64::NAN)
        };
        Ok(((at(0.5), at(0.99)), (exported?, scrubbed?)))
    })
}
