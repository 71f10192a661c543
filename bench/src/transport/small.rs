//! Ten thousand small segments: verified, synced to the disk, each a file of its own, beside
//! Syncthing with the same files.

use std::{
    fs,
    io::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock_segments::{Charge, Store};
use tidelock_transport::tls::MeshTls;
use tokio::runtime::Runtime;

use super::{
    bulk,
    site::{Site, store},
    syncthing,
};
use crate::{Row, median, peers::text, segments};

const ORIGINS: u64 = 10;
const EACH: u64 = 1_000;
const BYTES: u64 = 4_096;
const SLICES: usize = 3;
/// What is there by then gives the rate.
const LIMIT: Duration = Duration::from_secs(40);
const ID: &str = "small-segments";
const AIM: &str = ">= 10000/s";
const ID_PEER: &str = "small-segments-peer";
const AIM_PEER: &str = ">= 20";

pub fn rows(runtime: &Runtime, dir: &Path) -> Vec<Row> {
    match runtime.block_on(measure(dir)) {
        Ok(rows) => rows,
        Err(why) => vec![
            Row::not_run(ID, "", AIM, why.clone()),
            Row::not_run(ID_PEER, syncthing::NAME, AIM_PEER, why),
        ],
    }
}

/// Fills a store, and a directory with the same files.
fn make(store: &Store, files: &Path) -> Result<(), String> {
    fs::create_dir_all(files).map_err(text)?;
    let noise = |origin: u64, sequence: u64, bytes: u64| {
        let mut record = segments::noise(origin << 32 | sequence);
        record.truncate(usize::try_from(bytes).unwrap_or(usize::MAX));
        record
    };
    // As long a record as makes a segment of 4 KiB: the second one names the one before it, and each
    // has as many hashes of 32 bytes as its number has ones.
    let mut over = 0;
    let probe = |sequence| noise(0, sequence, 1_000);
    segments::chain(0, (0..2, None), probe, |segment| {
        over = segment.reference().size_bytes - 1_000 - 32;
        Ok(())
    })?;
    let record = |origin, sequence: u64| {
        let bytes = BYTES - over - 32 * u64::from(sequence.count_ones());
        noise(origin, sequence, bytes)
    };
    // Writers at once, so that they share syncs.
    std::thread::scope(|scope| {
        let makers: Vec<_> = (0..ORIGINS)
            .map(|origin| {
                scope.spawn(move || {
                    let record = |sequence| record(origin, sequence);
                    segments::chain(origin, (0..EACH, None), record, |segment| {
                        store.put(&segment, Charge::Normal).map_err(text)?;
                        let name = files.join(segment.id().hex());
                        fs::write(name, segment.into_bytes()).map_err(text)
                    })
                })
            })
            .collect();
        makers
            .into_iter()
            .try_for_each(|maker| maker.join().map_err(|_| "a maker panicked".to_owned())?)
    })
}

/// What the disk gives to one thread: files of as many bytes, each written and synced, a second.
fn raw(dir: &Path) -> Result<f64, String> {
    const FILES: u32 = 1_000;
    fs::create_dir_all(dir).map_err(text)?;
    let content = vec![7_u8; usize::try_from(BYTES).map_err(text)?];
    let begun = Instant::now();
    for number in 0..FILES {
        let mut file = fs::File::create(dir.join(number.to_string())).map_err(text)?;
        file.write_all(&content).map_err(text)?;
        file.sync_all().map_err(text)?;
    }
    let taken = begun.elapsed().as_secs_f64();
    fs::remove_dir_all(dir).map_err(text)?;
    Ok(f64::from(FILES) / taken)
}

async fn measure(dir: &Path) -> Result<Vec<Row>, String> {
    let site = Site::new()?;
    let (_, tls): (_, Arc<MeshTls>) = site.tls("giver")?;
    let from = store(&dir.join("giver"), tls.node_id())?;
    let files = dir.join("files");
    make(&from, &files)?;
    let count = from.list(None).len();
    let odd = from
        .list(None)
        .iter()
        .filter(|s| s.size_bytes.abs_diff(BYTES) > 64)
        .count();
    if odd > 0 || count as u64 != ORIGINS * EACH {
        return Err(format!("{odd} of {count} segments are not of 4 KiB"));
    }
    let mut peer = syncthing::Pair::new(&dir.join("syncthing"), &files);
    let (mut rates, mut cpus, mut theirs, mut floor) = (vec![], vec![], vec![], vec![]);
    let mut counts = Vec::new();
    let begun = Instant::now();
    for slice in 0..SLICES {
        // On a slow disk one slice has to do.
        if slice > 0 && begun.elapsed() > Duration::from_secs(50) {
            break;
        }
        floor.push(raw(&dir.join("raw"))?);
        let taker = dir.join("taker");
        let (seconds, cpu, taken) = bulk::ours(&taker, &site, (&from, &tls), LIMIT).await?;
        rates.push(taken as f64 / seconds);
        cpus.push(cpu * 1e6 / taken.max(1) as f64);
        counts.push(taken);
        fs::remove_dir_all(&taker).map_err(text)?;
        if let Ok(pair) = &peer {
            let pair = pair.clone();
            let run = move || pair.run(slice, count, Duration::from_secs(90));
            match tokio::task::spawn_blocking(run).await.map_err(text)? {
                Ok(seconds) => theirs.push(count as f64 / seconds),
                Err(why) => peer = Err(why),
            }
        }
    }
    let rate = median(rates.clone());
    let detail = json!({
        "segments": count, "bytes_each": BYTES, "rates": rates, "taken": counts, "cpu_us_each": cpus, "theirs": theirs.clone(),
        "write_and_fsync_files_per_s": floor,
        "what": "from the session to the last segment counted by the taker; each is verified, and durable when it is counted",
    });
    let mut rows =
        vec![Row::absolute(ID, "segments/s", rate, None, AIM, rate >= 10_000.0).with(detail)];
    rows.push(match peer {
        Ok(_) => Row::measured(
            ID_PEER,
            "segments/s",
            (rate, syncthing::NAME, median(theirs)),
            AIM_PEER,
            |ratio| ratio >= 20.0,
        ),
        Err(why) => Row::not_run(ID_PEER, syncthing::NAME, AIM_PEER, why),
    });
    Ok(rows)
}
