//! Decisions: in process beside plain Cedar, over HTTP beside raw syncs, and what an idle node holds.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{
    network::Loopback,
    site::{NODES, Site},
};

use crate::{
    Row, median,
    policy::{Ours, Plain, requests, rules},
};

const POLICIES: usize = 100;
const SLICES: usize = 5;
const SLICE: Duration = Duration::from_millis(600);

pub async fn rows() -> Vec<Row> {
    let mut rows = vec![in_process()];
    rows.extend(over_http().await);
    rows.push(idle().await);
    rows
}

fn in_process() -> Row {
    let (ours, plain) = (Ours::new(&rules(POLICIES)), Plain::new(&rules(POLICIES)));
    let requests = requests(POLICIES);
    for (bytes, allowed) in &requests {
        assert_eq!(
            ours.decide(bytes),
            *allowed,
            "answers are checked before they are timed"
        );
        assert_eq!(plain.decide(bytes), *allowed);
    }
    let time = |decide: &dyn Fn(&[u8]) -> bool| {
        let begun = Instant::now();
        let mut count = 0_u32;
        while begun.elapsed() < SLICE {
            for (bytes, _) in &requests {
                std::hint::black_box(decide(bytes));
                count += 1;
            }
        }
        begun.elapsed().as_secs_f64() * 1e6 / f64::from(count)
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..SLICES {
        a.push(time(&|bytes| ours.decide(bytes)));
        b.push(time(&|bytes| plain.decide(bytes)));
    }
    Row::measured(
        "in-process-100",
        "us",
        (median(a), "plain cedar-policy 4.14", median(b)),
        "<= 1.0",
        |ratio| ratio <= 1.0,
    )
}

fn program() -> Result<PathBuf, String> {
    let path = Path::new("target/release/tidelock");
    path.canonicalize()
        .map_err(|_| "target/release/tidelock is not built; cargo build --release first".to_owned())
}

/// One raw zero-filled pwrite and fdatasync after another, per second.
fn raw_syncs(dir: &Path) -> f64 {
    let path = dir.join("raw");
    let file = fs::File::create(&path).expect("a file");
    file.write_all_at(&vec![0; 1 << 20], 0).expect("zeros");
    file.sync_all().expect("a sync");
    let block = [7_u8; 512];
    let begun = Instant::now();
    let mut count = 0_u64;
    while begun.elapsed() < SLICE {
        file.write_all_at(&block, (count % 2_000) * 512)
            .expect("a write");
        file.sync_data().expect("a sync");
        count += 1;
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

async fn site<'n>(
    dir: &Path,
    network: &'n Loopback,
    ids: &[&'static str],
) -> Result<Site<'n>, String> {
    let mut site = Site::prepare(dir, &program()?, network, ids).map_err(|f| f.message)?;
    for id in ids {
        site.start(id).await.map_err(|f| f.message)?;
    }
    let package = site
        .bundle(1)
        .and_then(|p| Ok(p.encode()?))
        .map_err(|f| f.message)?;
    let body = json!({"package": BASE64_STANDARD.encode(package)});
    site.node("a")
        .map_err(|e| e.to_string())?
        .operate("bundle.install", &body)
        .await
        .map_err(|e| e.to_string())?;
    Ok(site)
}

/// Decisions a second with `connections` callers.
async fn throughput(site: &Site<'_>, connections: usize, slice: Duration) -> Result<f64, String> {
    let client = site.node("a").map_err(|e| e.to_string())?.client();
    let (stop, count) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..connections {
        let (client, stop, count) = (client.clone(), stop.clone(), count.clone());
        let body = json!({
            "principal": {"type": "Agent", "id": "coder-1"}, "action": "fs.read",
            "resource": {"type": "File", "id": format!("/srv/app/src/bench_{n}.rs")},
        })
        .to_string();
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let (status, answer) = client
                    .post_json("/v1/decide", body.clone())
                    .await
                    .map_err(|e| e.to_string())?;
                if status != 200 {
                    return Err(format!(
                        "status {status}: {}",
                        String::from_utf8_lossy(&answer)
                    ));
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
    }
    let begun = Instant::now();
    tokio::time::sleep(slice).await;
    stop.store(true, Ordering::Relaxed);
    let done = count.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    while let Some(result) = tasks.join_next().await {
        result.map_err(|e| e.to_string())??;
    }
    Ok(done)
}

async fn over_http() -> Vec<Row> {
    const IDS: [(&str, &str); 2] = [("http-durable-64", ">= 8"), ("http-durable-1", ">= 0.33")];
    let run = async {
        let dir = tempfile::Builder::new()
            .prefix("tlb")
            .tempdir_in("target")
            .map_err(|e| e.to_string())?;
        let dir = dir.path().canonicalize().map_err(|e| e.to_string())?;
        let network = Loopback::new(&["a"]).await.map_err(|e| e.to_string())?;
        let site = site(&dir, &network, &["a"]).await?;
        let (mut many, mut one, mut raw) = (Vec::new(), Vec::new(), Vec::new());
        throughput(&site, 64, SLICE).await?;
        for _ in 0..SLICES {
            many.push(throughput(&site, 64, SLICE).await?);
            one.push(throughput(&site, 1, SLICE).await?);
            raw.push(raw_syncs(&dir));
        }
        Ok::<_, String>((median(many), median(one), median(raw)))
    };
    match run.await {
        Ok((many, one, raw)) => vec![
            Row::measured(
                IDS[0].0,
                "per s",
                (many, "raw pwrite + fdatasync", raw),
                IDS[0].1,
                |r| r >= 8.0,
            ),
            Row::measured(
                IDS[1].0,
                "per s",
                (one, "raw pwrite + fdatasync", raw),
                IDS[1].1,
                |r| r >= 0.33,
            ),
        ],
        Err(why) => IDS
            .iter()
            .map(|(id, aim)| Row::not_run(id, "raw pwrite + fdatasync", aim, why.clone()))
            .collect(),
    }
}

fn resident_mib(process: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1_024.0)
}

/// Resident memory of a node with three connected peers and nothing to do.
async fn idle() -> Row {
    const AIM_MIB: f64 = 40.0;
    let run = async {
        let dir = tempfile::Builder::new()
            .prefix("tlb")
            .tempdir_in("target")
            .map_err(|e| e.to_string())?;
        let dir = dir.path().canonicalize().map_err(|e| e.to_string())?;
        let ids = [NODES[0], NODES[1], NODES[2], "d"];
        let network = Loopback::new(&ids).await.map_err(|e| e.to_string())?;
        let site = site(&dir, &network, &ids).await?;
        let node = site.node("a").map_err(|e| e.to_string())?;
        node.await_status("three sessions", Duration::from_secs(20), |s| {
            s.pointer("/mesh/peers")
                .and_then(Value::as_array)
                .is_some_and(|p| p.iter().filter(|p| p["state"] == "connected").count() == 3)
        })
        .await
        .map_err(|e| e.to_string())?;
        tokio::time::sleep(Duration::from_secs(5)).await;
        node.process_id()
            .and_then(resident_mib)
            .ok_or("no VmRSS".to_owned())
    };
    match run.await {
        Ok(mib) => Row::measured(
            "idle-rss-3-peers",
            "MiB",
            (mib, "the limit", AIM_MIB),
            "<= 1.0",
            |r| r <= 1.0,
        ),
        Err(why) => Row::not_run("idle-rss-3-peers", "the limit", "<= 1.0", why),
    }
}
