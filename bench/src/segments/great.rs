//! Great stores: opening one after SIGKILL, and the memory that a million segments take.

use std::{ops::Range, path::Path, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tidelock_segments::{
    Charge, Checkpoint, Kind, LogKey, NodeId, Origin, RealDisk, Root, RootOptions, SegmentHeader,
    SegmentId, Store, VerifiedSegment, merkle, origin_line, seal_signed, verify_segment,
};

use super::{
    GIB,
    children::{Running, say},
    disk::{Watched, allocated, forget_pages, settle},
    space,
};
use crate::{
    Row, median,
    peers::{CEILING_BYTES, decision, domain, endorsement, text},
};

/// Length of a record that only has to fill the disk.
pub const BIG_BYTES: usize = 60_000;

/// Bytes that no compressor makes smaller.
pub fn noise(n: u64) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(BIG_BYTES);
    while out.len() < BIG_BYTES {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out
}

pub fn open(dir: &Path, long: bool) -> Vec<Row> {
    const ONE: &str = "open-1gib";
    const TEN: &str = "open-10gib";
    const AIM_TEN: &str = "<= 200 ms, ratio <= 1.2";
    let small = dir.join("one");
    let large = dir.join("ten");
    let mut rows = Vec::new();
    let sizes: &[(&Path, u64)] = if long {
        &[(&small, GIB), (&large, 10 * GIB)]
    } else {
        &[(&small, GIB)]
    };
    match killed_and_opened(sizes) {
        Ok(times) => {
            let one = times[0].warm;
            rows.push(
                Row::absolute(ONE, "ms", one, None, "<= 200 ms", one <= 200.0)
                    .with(times[0].detail.clone()),
            );
            rows.push(match times.get(1) {
                Some(ten) => {
                    let met = ten.warm <= 200.0 && ten.warm <= one * 1.2;
                    let mut row = Row::absolute(
                        TEN,
                        "ms",
                        ten.warm,
                        Some(("the same with 1 GiB", one)),
                        AIM_TEN,
                        met,
                    );
                    row.why = (!met).then(|| {
                        format!("it is {:.0} ms, the ratio {:.2}", ten.warm, ten.warm / one)
                    });
                    row.with(ten.detail.clone())
                }
                None => Row::not_run(
                    TEN,
                    "the same with 1 GiB",
                    AIM_TEN,
                    "it fills 10 GiB: --long".to_owned(),
                ),
            });
        }
        Err(why) => {
            rows.push(Row::not_run(ONE, "", "<= 200 ms", why.clone()));
            rows.push(Row::not_run(TEN, "", AIM_TEN, why));
        }
    }
    let _ = std::fs::remove_dir_all(&large);
    rows.push(space::under_export(&small).unwrap_or_else(|why| {
        Row::not_run("append-p99-under-export", "the same log idle", "<= 2", why)
    }));
    rows
}

struct Opened {
    warm: f64,
    detail: Value,
}

/// Fills each root, kills its process while eight writers append, and opens it again: twelve times
/// in turn, every second time without its pages in the cache.
fn killed_and_opened(sizes: &[(&Path, u64)]) -> Result<Vec<Opened>, String> {
    const ROUNDS: usize = 5;
    let run = |dir: &Path, bytes: u64| {
        let mut child = Running::start(&["hold", &bytes.to_string()], dir)?;
        let opened = child.next()?;
        let sealed = child.next()?;
        std::thread::sleep(Duration::from_millis(400));
        Ok::<_, String>((opened, sealed))
    };
    let mut all: Vec<_> = sizes
        .iter()
        .map(|_| (Vec::new(), Vec::new(), Vec::new(), Value::Null))
        .collect();
    for (dir, bytes) in sizes {
        run(dir, *bytes)?;
        settle(dir);
    }
    for round in 0..2 * ROUNDS {
        for ((dir, bytes), (warm, cold, first, sealed)) in sizes.iter().zip(&mut all) {
            let forget = round % 2 == 1;
            if forget {
                settle(dir);
                forget_pages(dir);
            }
            let (opened, held) = run(dir, *bytes)?;
            if opened["new_incarnation"] != Value::Null {
                return Err(format!("the log did not go on after SIGKILL: {opened}"));
            }
            let open_ms = opened["open_ms"].as_f64().unwrap_or(f64::NAN);
            if forget {
                cold.push(open_ms)
            } else {
                warm.push(open_ms)
            }
            first.push(opened["first_append_ms"].as_f64().unwrap_or(f64::NAN));
            *sealed = held;
        }
    }
    Ok(all
        .into_iter()
        .map(|(warm, cold, first, sealed)| Opened {
            warm: median(warm.clone()),
            detail: json!({
                "pages_dropped_ms": median(cold),
                "to_first_append_ms": median(first),
                "rounds": ROUNDS,
                "all_ms": warm,
                "sealed": sealed,
            }),
        })
        .collect())
}

// ---- a million segments ---------------------------------------------------------------------------

/// Origins that the segments are spread over, each a chain of its own.
const ORIGINS: u64 = 100;
const AIM_MEMORY: &str = "<= 64 MiB";

fn store(dir: &Path, without_sync: bool) -> Result<Arc<Store>, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let options = RootOptions {
        ceiling_bytes: CEILING_BYTES,
        reserve_bytes: 1 << 20,
    };
    let disk: Arc<dyn tidelock_segments::Disk> = if without_sync {
        Arc::new(Watched {
            without_sync,
            ..Watched::default()
        })
    } else {
        Arc::new(RealDisk)
    };
    let root = Root::open(disk, dir, options).map_err(text)?;
    root.ledger().set_custody_max(CEILING_BYTES);
    let store = Store::open(root, domain()).map_err(text)?;
    store.set_own_node(&NodeId::new("n1").map_err(text)?);
    Ok(store)
}

fn key_of(origin: u64) -> Result<LogKey, String> {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&origin.to_le_bytes());
    LogKey::from_seed(&seed).map_err(text)
}

fn origin_of(origin: u64) -> Result<(NodeId, LogKey, Origin), String> {
    let (node, key) = (
        NodeId::new(&format!("peer-{origin:03}")).map_err(text)?,
        key_of(origin)?,
    );
    let name = Origin::audit(&node, &key.public(), 1);
    Ok((node, key, name))
}

/// Puts the segments `from..to` of every origin: one short record each, signed, linked, verified, and
/// stored by `Store::put` on a disk whose syncs do nothing, or it would take hours.
pub fn make(dir: &Path, from: u64, to: u64) -> Result<(), String> {
    let store = store(dir, true)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let store = &store;
                scope.spawn(move || {
                    (worker..ORIGINS)
                        .step_by(threads as usize)
                        .try_for_each(|origin| make_origin(store, origin, from, to))
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().map_err(|_| "a maker panicked".to_owned())?)
    })?;
    say(&json!({"made": (to - from) * ORIGINS}));
    Ok(())
}

fn make_origin(store: &Store, origin: u64, from: u64, to: u64) -> Result<(), String> {
    let (_, _, name) = origin_of(origin)?;
    let before = from
        .checked_sub(1)
        .and_then(|last| store.find(&name, last))
        .map(|reference| reference.id);
    let record = |sequence: u64| decision(origin << 32 | sequence, 300);
    chain(origin, (from..to, before), record, |segment| {
        store.put(&segment, Charge::Normal).map(drop).map_err(text)
    })
}

/// The audit segments with these numbers of one origin, of one record each, signed and linked to the
/// one before.
pub fn chain(
    origin: u64,
    (sequences, mut prev): (Range<u64>, Option<SegmentId>),
    record: impl Fn(u64) -> Vec<u8>,
    mut take: impl FnMut(VerifiedSegment) -> Result<(), String>,
) -> Result<(), String> {
    let (node, key, name) = origin_of(origin)?;
    let line = origin_line(&domain(), &name).ok_or("no audit origin")?;
    let endorsed = endorsement(&node, &key.public(), 1);
    let mut tree = merkle::Frontier::new();
    for sequence in 0..sequences.start {
        tree.append(merkle::leaf_hash(&record(sequence)));
    }
    for sequence in sequences {
        // The body by docs/src/format.md, version 1.
        let record = record(sequence);
        let mut body = 1_u16.to_le_bytes().to_vec();
        body.extend(sequence.to_le_bytes());
        body.extend(1_u32.to_le_bytes());
        tree.hashes()
            .iter()
            .for_each(|hash| body.extend(hash.as_bytes()));
        tree.append(merkle::leaf_hash(&record));
        let note = Checkpoint {
            origin_line: line.clone(),
            size: tree.size(),
            root: tree.root(),
        }
        .sign(&key);
        body.extend((note.len() as u32).to_le_bytes());
        body.extend(note.as_bytes());
        body.extend((record.len() as u32).to_le_bytes());
        body.extend(&record);
        let header = SegmentHeader {
            kind: Kind::Audit,
            domain: domain(),
            origin: name.clone(),
            sequence,
            prev,
            created_unix_ms: 1_790_000_000_000 + sequence,
        };
        let bytes = seal_signed(&header, &body, &key, &endorsed).map_err(text)?;
        let segment = verify_segment(bytes, None, &domain()).map_err(text)?;
        prev = Some(segment.id());
        take(segment)?;
    }
    Ok(())
}

/// Resident bytes of this process now.
fn resident() -> Result<f64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(text)?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0).ok_or("no VmRSS".to_owned())
}

/// Opens a store with `known` segments for each origin, lists it page by page, looks up and reads
/// segments at random places, and says what is resident after each.
pub fn weigh(dir: &Path, known: u64) -> Result<(), String> {
    let empty = resident()?;
    let begun = std::time::Instant::now();
    let store = store(dir, false)?;
    let open_ms = begun.elapsed().as_secs_f64() * 1e3;
    let opened = resident()?;
    let mut listed = 0;
    for origin in 0..ORIGINS {
        let (_, _, name) = origin_of(origin)?;
        let mut from = 0;
        loop {
            let page = store.refs(&name, from, u64::MAX, 1_000);
            let Some(last) = page.last() else { break };
            from = last.sequence + 1;
            listed += page.len() as u64;
        }
    }
    if listed != known * ORIGINS {
        return Err(format!(
            "{listed} of {} segments are listed",
            known * ORIGINS
        ));
    }
    let after_listing = resident()?;
    let mut state = 1_u64;
    let begun = std::time::Instant::now();
    for n in 0..2_000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let (_, _, name) = origin_of((state >> 33) % ORIGINS)?;
        let reference = store
            .find(&name, (state >> 20) % known)
            .ok_or("a segment is not found")?;
        if !store.contains(&reference.id) {
            return Err("a listed segment is not held".to_owned());
        }
        if n % 10 == 0 {
            store.get(&reference.id).map_err(text)?;
        }
    }
    let lookup_us = begun.elapsed().as_secs_f64() * 1e6 / 2_000.0;
    let heads = store.heads().len();
    say(&json!({
        "empty_mib": empty, "opened_mib": opened, "listed_mib": after_listing, "looked_up_mib": resident()?,
        "open_ms": open_ms, "lookup_us": lookup_us, "heads": heads, "segments": listed,
    }));
    Ok(())
}

pub fn memory(dir: &Path, long: bool) -> Vec<Row> {
    const ID: &str = "resident-memory-1m";
    const MILLION: u64 = 1_000_000;
    let mut weights: Vec<Value> = Vec::new();
    let mut grow = |from: u64, to: u64| {
        let parts = [(from / ORIGINS).to_string(), (to / ORIGINS).to_string()];
        Running::start(&["make", &parts[0], &parts[1]], dir)?.next()?;
        settle(dir);
        let weight = Running::start(&["weigh", &parts[1]], dir)?.next()?;
        weights.push(weight.clone());
        Ok::<_, String>(
            ["opened_mib", "listed_mib", "looked_up_mib"]
                .iter()
                .filter_map(|key| weight[*key].as_f64())
                .fold(0.0, f64::max),
        )
    };
    let sizes: &[u64] = if long {
        &[200_000, 400_000, MILLION]
    } else {
        &[50_000, 100_000]
    };
    let mut most = Vec::new();
    let mut from = 0;
    for size in sizes {
        match grow(from, *size) {
            Ok(mib) => most.push((*size as f64, mib)),
            Err(why) => {
                return vec![
                    Row::not_run(ID, "", AIM_MEMORY, why).with(json!({"weights": weights})),
                ];
            }
        }
        from = *size;
    }
    let detail = json!({
        "weights": weights,
        "allocated": allocated(dir),
        "made": "signed audit segments of 100 origins, one record of 300 bytes each, through Store::put on a disk \
                 whose syncs do nothing; opened, listed and read on the real one",
    });
    let (size, mib) = most[most.len() - 1];
    if long {
        return vec![Row::absolute(ID, "MiB", mib, None, AIM_MEMORY, mib <= 64.0).with(detail)];
    }
    let slope = (mib - most[0].1) / (size - most[0].0);
    let why = format!(
        "--long makes the million; {mib:.0} MiB with {size}, {:.0} B a segment more, so {:.0} MiB are to be expected",
        slope * 1_048_576.0,
        mib + slope * (1e6 - size)
    );
    vec![Row::not_run(ID, "", AIM_MEMORY, why).with(detail)]
}
