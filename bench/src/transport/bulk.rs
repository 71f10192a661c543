//! Bulk transfer over loopback: sealed audit, verified and stored durably, beside a bare quinn
//! stream under the same TLS that verifies and stores nothing, and beside iroh-blobs with its store
//! on the same disk.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock::clock::wall_unix_ms;
use tidelock_quota::Rate;
use tidelock_segments::{
    AuditLog, Compression, LogConfig, NodeId, RealDisk, RecordClass, Root, RootOptions,
    SealOptions, SegmentId, Store,
};
use tidelock_transport::{
    dial::PeerConfig,
    endorse::endorse,
    shell::{MeshConfig, QuotaConfig},
    tls::{Credentials, MeshTls, SERVER_NAME},
};
use tokio::runtime::Runtime;

use super::{
    iroh,
    site::{self, ANY, Hooks, Site},
};
use crate::{
    Row, cpu, median,
    peers::{domain, text},
};

/// 1 GiB and a little.
const RECORDS: usize = 17_900;
const RECORD_BYTES: usize = 60_000;
const SLICES: usize = 3;
const BARE: &str = "bare quinn stream, nothing stored";
const IROH: &str = "iroh-blobs 0.104 (fs store)";

pub fn rows(runtime: &Runtime, dir: &Path) -> Vec<Row> {
    runtime
        .block_on(bulk(dir))
        .unwrap_or_else(|why| vec![Row::not_run("bulk-loopback", BARE, ">= 0.7", why)])
}

fn root(dir: &Path) -> Result<Arc<Root>, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let options = RootOptions {
        ceiling_bytes: 4 << 30,
        reserve_bytes: 1 << 20,
    };
    Root::open(Arc::new(RealDisk), dir, options).map_err(text)
}

/// Fills a log with records and seals it; answers its bytes.
fn fill(
    root: Arc<Root>,
    store: &Arc<Store>,
    (node, credentials): (&NodeId, &Credentials),
    records: usize,
) -> Result<u64, String> {
    let config = LogConfig {
        domain: domain(),
        node_id: node.clone(),
        segment_bytes: 8 << 20,
        segment_max_age_ms: 3_600_000,
        custody_required: 1,
        archives: std::collections::BTreeSet::new(),
        overwrite_oldest: false,
        min_retention_ms: 0,
        clock: Arc::new(wall_unix_ms),
        // Stored as appended, so that what travels has the size that the table states.
        seal: SealOptions {
            compression: Compression::Off,
            ..SealOptions::default()
        },
    };
    let (log, _) = AuditLog::open(root, store.clone(), config, &|key, incarnation| {
        Ok(endorse(credentials, node, key, incarnation)?)
    })
    .map_err(text)?;
    for n in 0..records {
        let mut record = n.to_string().into_bytes();
        record.resize(RECORD_BYTES, b'x');
        log.append_wait(RecordClass::Decision, record, Duration::from_secs(10))
            .map_err(text)?;
    }
    log.seal_now().map_err(text)?;
    log.close();
    Ok(store.list(None).iter().map(|s| s.size_bytes).sum())
}

/// A store below `dir/giver` with the sealed log of a node: the ids of its segments. It is closed
/// again, for another process to open.
pub fn giver(dir: &Path, site: &Site, records: usize) -> Result<Vec<SegmentId>, String> {
    let node = NodeId::new("giver").map_err(text)?;
    let credentials = site.credentials(&site.paper(&node, None)?)?;
    let root = root(&dir.join("giver"))?;
    let store = Store::open(root.clone(), domain()).map_err(text)?;
    fill(root, &store, (&node, &credentials), records)?;
    Ok(store
        .list(None)
        .into_iter()
        .map(|segment| segment.id)
        .collect())
}

fn mesh_config(listen: SocketAddr, peers: Vec<PeerConfig>) -> MeshConfig {
    let wide = Rate {
        per_second: 8 << 20,
        burst: 8 << 20,
    };
    MeshConfig {
        quotas: QuotaConfig {
            bulk_in_kib: wide,
            out_kib: wide,
            ..QuotaConfig::default()
        },
        ..MeshConfig::new(listen, peers)
    }
}

/// Seconds and CPU-seconds until everything that `from` holds is stored at a fresh node, or the time is
/// over, and how many segments are.
pub async fn ours(
    dir: &Path,
    site: &Site,
    (from, from_tls): (&Arc<Store>, &Arc<MeshTls>),
    within: Duration,
) -> Result<(f64, f64, usize), String> {
    let (_, tls) = site.tls("taker")?;
    let to = site::store(dir, tls.node_id())?;
    let server = site::start(
        mesh_config(ANY, Vec::new()),
        from_tls,
        Arc::new(Hooks::disk(from, from_tls)),
    )?;
    let peer = PeerConfig {
        node_id: from_tls.node_id().clone(),
        addresses: vec![server.local_addr().map_err(text)?],
    };
    let wanted = from.list(None).len();
    let cpu_begun = cpu();
    let client = site::start(
        mesh_config(ANY, vec![peer]),
        &tls,
        Arc::new(Hooks::disk(&to, &tls)),
    )?;
    // The pace of dials is not the pace of transfers: the clock starts with the session, as it does
    // for the peer with its connection.
    while !client.peers().iter().any(|p| p.connected) {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    let begun = Instant::now();
    // The mesh's counter: listing thousands of segments again and again would cost more than they do.
    let taken = || client.peers().iter().map(|p| p.segments_in).sum::<u64>();
    while taken() < wanted as u64 && begun.elapsed() < within {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (count, seconds) = (taken() as usize, begun.elapsed().as_secs_f64());
    let cpu_seconds = (cpu() - cpu_begun).as_secs_f64();
    let held = to.list(None).len();
    if held < count {
        return Err(format!("{held} of {count} segments are held"));
    }
    client.shutdown(Duration::from_secs(2)).await;
    server.shutdown(Duration::from_secs(2)).await;
    Ok((seconds, cpu_seconds, count))
}

/// Seconds and CPU-seconds for as many bytes over one stream of quinn as it comes.
async fn bare(bytes: u64, a: &Arc<MeshTls>, b: &Arc<MeshTls>) -> Result<(f64, f64), String> {
    let config = quinn::ServerConfig::with_crypto(a.quic_server_config().map_err(text)?);
    let server = quinn::Endpoint::server(config, ANY).map_err(text)?;
    let client = quinn::Endpoint::client(ANY).map_err(text)?;
    let config = quinn::ClientConfig::new(b.quic_client_config(Some(a.node_id())).map_err(text)?);
    let address = server.local_addr().map_err(text)?;
    let cpu_begun = cpu();
    let sending = tokio::spawn(async move {
        let connection = server
            .accept()
            .await
            .ok_or("no connection")?
            .await
            .map_err(text)?;
        let mut stream = connection.open_uni().await.map_err(text)?;
        let chunk = vec![7_u8; 64 * 1024];
        let mut left = bytes;
        while left > 0 {
            let now = left.min(chunk.len() as u64) as usize;
            stream.write_all(&chunk[..now]).await.map_err(text)?;
            left -= now as u64;
        }
        stream.finish().map_err(text)?;
        stream.stopped().await.map_err(text)?;
        Ok::<_, String>(())
    });
    let connection = client
        .connect_with(config, address, SERVER_NAME)
        .map_err(text)?
        .await
        .map_err(text)?;
    let begun = Instant::now();
    let mut stream = connection.accept_uni().await.map_err(text)?;
    let mut got = 0_u64;
    while let Some(chunk) = stream.read_chunk(64 * 1024, true).await.map_err(text)? {
        got += chunk.bytes.len() as u64;
    }
    if got != bytes {
        return Err(format!("{got} of {bytes} bytes came"));
    }
    let result = (
        begun.elapsed().as_secs_f64(),
        (cpu() - cpu_begun).as_secs_f64(),
    );
    sending.await.map_err(text)??;
    Ok(result)
}

async fn bulk(dir: &Path) -> Result<Vec<Row>, String> {
    let site = Site::new()?;
    let giver = NodeId::new("giver").map_err(text)?;
    let credentials = site.credentials(&site.paper(&giver, None)?)?;
    let giver_tls = site::mesh_tls(giver.clone(), credentials.clone());
    let (_, other_tls) = site.tls("other")?;
    let root = root(&dir.join("giver"))?;
    let from = Store::open(root.clone(), domain()).map_err(text)?;
    let bytes = fill(root, &from, (&giver, &credentials), RECORDS)?;
    let mut peer = iroh::Giver::new(&dir.join("iroh-giver"), bytes).await;
    let mut taken = [(); 3].map(|()| (Vec::new(), Vec::new()));
    let mut note = |system: usize, (seconds, cpu): (f64, f64)| {
        taken[system].0.push(bytes as f64 / seconds / 1e6);
        taken[system]
            .1
            .push(cpu / bytes as f64 * f64::from(1 << 30));
    };
    for _ in 0..SLICES {
        let taker = dir.join("taker");
        let minutes = Duration::from_secs(120);
        let (seconds, cpu, count) = ours(&taker, &site, (&from, &giver_tls), minutes).await?;
        if count < from.list(None).len() {
            return Err(format!("{count} segments after 120 s"));
        }
        note(0, (seconds, cpu));
        std::fs::remove_dir_all(&taker).map_err(text)?;
        note(1, bare(bytes, &giver_tls, &other_tls).await?);
        if let Ok(giver) = &peer {
            match giver.fetch(&taker).await {
                Ok(result) => note(2, result),
                Err(why) => peer = Err(why),
            }
            let _ = std::fs::remove_dir_all(&taker);
        }
    }
    if let Ok(giver) = &peer {
        giver.close().await;
    }
    let [ours, bare, iroh] = taken;
    let detail = json!({"bytes": bytes, "MB/s": ours.0, "CPU-s/GiB": ours.1, "bare": {"MB/s": bare.0, "CPU-s/GiB": bare.1}});
    let (rate, cpu) = (median(ours.0), median(ours.1));
    let mut rows = vec![
        Row::measured(
            "bulk-loopback",
            "MB/s",
            (rate, BARE, median(bare.0)),
            ">= 0.7",
            |r| r >= 0.7,
        ),
        Row::measured(
            "bulk-cpu",
            "CPU-s/GiB",
            (cpu, BARE, median(bare.1)),
            "<= 1.4",
            |r| r <= 1.4,
        )
        .with(detail),
    ];
    rows.push(match peer {
        Ok(_) => {
            let detail = json!({
                "MB/s": iroh.0, "CPU-s/GiB": iroh.1,
                "how": "iroh 1.4 without relays and look-ups, loopback only; its data base is synced at the end, its files by itself",
            });
            Row::measured("bulk-cpu-iroh", "CPU-s/GiB", (cpu, IROH, median(iroh.1)), "<= 0.4", |r| r <= 0.4)
                .with(detail)
        }
        Err(why) => Row::not_run("bulk-cpu-iroh", IROH, "<= 0.4", why),
    });
    Ok(rows)
}
