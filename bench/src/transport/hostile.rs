//! Peers with good papers that open everything, ask for all they may ask for and never read: growth
//! of the node's process, beside the sum of the bounds that the transport states.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::{Connection, SendStream, VarInt};
use serde_json::json;
use tidelock_segments::{SegmentId, Store};
use tidelock_transport::{
    frame::{Fetch, Frame, Hello, HelloAck, ListAsked, ListRefs, ReceiptWant, WireLimits},
    limits::{
        MAX_FRAME_BODY_BYTES, MAX_FRAMES_QUEUED, MAX_GREAT_SENDS_KIB, MAX_IN_FLIGHT,
        MAX_LISTS_OUTSTANDING, MAX_RECEIPTS_PER_FRAME, MAX_SMALL_SENDS_KIB, PROTOCOL_VERSION,
    },
    shell::{MeshConfig, QuicConfig},
    tls::{MeshTls, SERVER_NAME},
};
use tokio::runtime::Runtime;

use super::{
    bulk,
    idle::{read_papers, write_papers},
    site::{self, ANY, Hooks, Site, address_of, named, resident_kib, store},
    swarm,
};
use crate::{
    Row,
    peers::{domain, text},
    segments::{Running, say},
};

const HOSTILE: usize = 64;
/// 8 MiB segments, so that every answer is as big as it can be.
const RECORDS: usize = 4_500;
/// Below the time after which a peer that reads nothing is let go.
const SIEGE: Duration = Duration::from_secs(20);
const ID: &str = "hostile-64-growth";
const PEER: &str = "sum of the stated bounds";
const AIM: &str = "<= 1";

pub fn rows(runtime: &Runtime, dir: &Path) -> Vec<Row> {
    let row = runtime.block_on(measure(dir));
    vec![row.unwrap_or_else(|why| Row::not_run(ID, PEER, AIM, why))]
}

/// MiB that 64 sessions may cost by what `limits.rs` and the settings of QUIC say.
fn allowed_mib() -> f64 {
    let quic = QuicConfig::default();
    let windows = u64::from(quic.send_window_bytes) + u64::from(quic.receive_window_bytes);
    let frames = (MAX_FRAMES_QUEUED * MAX_FRAME_BODY_BYTES) as u64;
    let small = MAX_SMALL_SENDS_KIB as u64 * 1_024;
    let great = MAX_GREAT_SENDS_KIB as u64 * 1_024;
    let bytes = HOSTILE as u64 * (windows + frames + small) + great;
    bytes as f64 / f64::from(1 << 20)
}

/// The node under siege: says its port and its size, then the greatest size of each second.
pub fn besieged(dir: &Path) -> Result<(), String> {
    let runtime = Runtime::new().map_err(text)?;
    runtime.block_on(async {
        let tls = read_papers(dir, "hub")?;
        let store = store(&dir.join("giver"), tls.node_id())?;
        // As it is when it has served somebody: a segment was read once.
        if let Some(reference) = store.list(None).first() {
            store.get(&reference.id).map_err(text)?;
        }
        let hooks = Arc::new(Hooks::disk(&store, &tls));
        let mesh = site::start(MeshConfig::new(ANY, Vec::new()), &tls, hooks)?;
        let port = mesh.local_addr().map_err(text)?.port();
        say(&json!({"port": port, "kib": resident_kib()?}));
        loop {
            let mut peak = 0.0_f64;
            for _ in 0..20 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                peak = peak.max(resident_kib()?);
            }
            let sessions = mesh.peers().iter().filter(|peer| peer.connected).count();
            let lost: Vec<_> = mesh
                .peers()
                .into_iter()
                .filter_map(|peer| peer.last_close)
                .map(|close| close.reason)
                .collect();
            say(&json!({"kib": peak, "sessions": sessions, "closed": swarm::tally(lost)}));
        }
    })
}

/// Keeps what must not be dropped: a stream that is dropped is at an end.
struct Siege {
    _connection: Connection,
    _streams: Vec<SendStream>,
}

/// Every second peer leaves the node hardly any room to write to it, the others 16 MiB.
async fn besiege(
    number: usize,
    tls: &MeshTls,
    address: std::net::SocketAddr,
    ids: &[SegmentId],
) -> Result<Siege, String> {
    let config = tls.quic_client_config(Some(&named("hub")?)).map_err(text)?;
    let mut config = quinn::ClientConfig::new(config);
    let mut transport = quinn::TransportConfig::default();
    let window = if number.is_multiple_of(2) {
        4_096
    } else {
        16 << 20
    };
    transport
        .stream_receive_window(VarInt::from_u32(window))
        .receive_window(VarInt::from_u32(window))
        .keep_alive_interval(Some(Duration::from_secs(5)));
    config.transport_config(Arc::new(transport));
    let endpoint = quinn::Endpoint::client(address_of(number)).map_err(text)?;
    let connecting = endpoint
        .connect_with(config, address, SERVER_NAME)
        .map_err(text)?;
    let connection = connecting.await.map_err(text)?;
    let (mut control, unread) = connection.open_bi().await.map_err(text)?;
    // Forgotten, not dropped: dropping it would tell the node that nobody reads.
    std::mem::forget(unread);
    let hello = Frame::Hello(Box::new(Hello {
        version: PROTOCOL_VERSION,
        domain: domain().as_str().to_owned(),
        node_id: tls.node_id().as_str().to_owned(),
        limits: WireLimits {
            kinds: 0b1_1110,
            max_segment_bytes: tidelock_segments::limits::MAX_SEGMENT_BYTES,
            custody_free_bytes: u64::MAX,
            max_in_flight: MAX_IN_FLIGHT,
        },
        posture: 0,
        endorsement: None,
        state_digest: [1; 32],
    }));
    let granted = Frame::HelloAck(HelloAck {
        frames_per_second: u32::MAX,
        in_bytes_per_second: u64::MAX,
        in_bytes_left_today: u64::MAX,
        out_bytes_per_second: u64::MAX,
    });
    let mut frames = vec![hello, granted, Frame::AskHeads];
    frames.extend((0..MAX_LISTS_OUTSTANDING).map(|_| {
        Frame::ListRefs(ListRefs {
            lists: vec![ListAsked {
                origin: 0,
                from: 0,
                to: u64::MAX,
                max: 504,
            }],
        })
    }));
    frames.extend(ids.iter().take(usize::from(MAX_IN_FLIGHT)).map(|id| {
        Frame::Fetch(Fetch {
            id: *id.as_bytes(),
            range: None,
        })
    }));
    frames.push(Frame::ReceiptWant(ReceiptWant {
        ids: ids
            .iter()
            .take(MAX_RECEIPTS_PER_FRAME)
            .map(|id| *id.as_bytes())
            .collect(),
    }));
    for frame in frames {
        control
            .write_all(&frame.encode().map_err(text)?)
            .await
            .map_err(text)?;
        if matches!(frame, Frame::AskHeads) {
            // The heads give the numbers of the lists: they are to be on their way first.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    let mut streams = vec![control];
    // The beginning of a frame, and nothing more, on as many streams as there may be.
    let wait = Duration::from_millis(100);
    while let Ok(Ok(mut stream)) = tokio::time::timeout(wait, connection.open_uni()).await {
        stream.write_all(&[1, 0]).await.map_err(text)?;
        streams.push(stream);
    }
    Ok(Siege {
        _connection: connection,
        _streams: streams,
    })
}

/// Seconds until a peer that keeps to the rules has all that the node holds.
async fn honest(
    site: &Site,
    dir: &Path,
    address: std::net::SocketAddr,
    wanted: usize,
) -> Result<f64, String> {
    let (_, tls) = site.tls("honest")?;
    let to: Arc<Store> = store(dir, tls.node_id())?;
    let hooks = Arc::new(Hooks::disk(&to, &tls));
    let mesh = site::start(
        swarm::calling(HOSTILE + 1, &named("hub")?, address),
        &tls,
        hooks,
    )?;
    let begun = Instant::now();
    let held = site::until(
        Duration::from_secs(60),
        "the honest peer's segments",
        || to.list(None).len() >= wanted,
    );
    let held = held
        .await
        .map_err(|why| format!("{why} ({} of {wanted})", to.list(None).len()));
    let taken = begun.elapsed().as_secs_f64();
    mesh.shutdown(Duration::from_secs(2)).await;
    drop(to);
    let _ = std::fs::remove_dir_all(dir);
    held.map(|()| taken)
}

async fn measure(dir: &Path) -> Result<Row, String> {
    let site = Site::new()?;
    write_papers(&site, dir, &["hub".to_owned()])?;
    let ids = bulk::giver(dir, &site, RECORDS)?;
    let mut child = Running::start(&["transport-besieged"], dir)?;
    let said = child.next()?;
    let mut address = ANY;
    address.set_port(
        said["port"]
            .as_u64()
            .and_then(|p| u16::try_from(p).ok())
            .ok_or("no port")?,
    );
    let free = honest(&site, &dir.join("honest"), address, ids.len()).await?;
    // What serving one peer takes is no growth by the others.
    let mut before = said["kib"].as_f64().ok_or("no size")?;
    let (sizes, heard) = std::sync::mpsc::channel();
    let hearing = std::thread::spawn(move || {
        while let Ok(said) = child.next() {
            if sizes.send(said).is_err() {
                break;
            }
        }
    });
    for said in heard.try_iter() {
        before = before.max(said["kib"].as_f64().unwrap_or(0.0));
    }
    let mut sieges = Vec::new();
    for (number, (_, tls)) in swarm::papers(&site, "hostile", HOSTILE)?.iter().enumerate() {
        sieges.push(besiege(number, tls, address, &ids).await?);
    }
    let begun = Instant::now();
    let during = honest(&site, &dir.join("honest"), address, ids.len()).await;
    tokio::time::sleep(SIEGE.saturating_sub(begun.elapsed())).await;
    let (mut peak, mut sessions, mut last) = (0.0_f64, 0, json!(null));
    for said in heard.try_iter() {
        peak = peak.max(said["kib"].as_f64().unwrap_or(0.0));
        sessions = sessions.max(said["sessions"].as_u64().unwrap_or(0));
        last = said;
    }
    drop((sieges, heard));
    // It ends with its next line, and the weighed process with it.
    tokio::task::spawn_blocking(|| hearing.join())
        .await
        .map_err(text)?
        .map_err(|_| "a panic")?;
    if sessions < HOSTILE as u64 {
        return Err(format!("{sessions} sessions of {HOSTILE}: {last}"));
    }
    let growth = (peak - before) / 1_024.0;
    let row = Row::measured(ID, "MiB", (growth, PEER, allowed_mib()), AIM, |ratio| {
        ratio <= 1.0
    });
    Ok(row.with(json!({
        "before_mib": before / 1_024.0, "peak_mib": peak / 1_024.0, "sessions_at_most": sessions, "at_the_end": last,
        "honest_peer_seconds": {"alone": free, "during": during.as_ref().ok(), "why": during.err()},
        "what": "each fetches 32 segments of 8 MiB, asks for heads, lists and receipts, opens every stream and reads \
                 nothing; half leave hardly any room to write, half 16 MiB; the honest peer fetches all of it meanwhile",
    })))
}
