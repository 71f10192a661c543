//! Everybody dials at once: two thousand peers whose transport opens in the same moment, beside as
//! many quinn connections under the same TLS with quinn's own settings and buffers.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock_transport::{
    shell::MeshEvent,
    tls::{MeshTls, SERVER_NAME},
};
use tokio::runtime::Runtime;

use super::{
    site::{ANY, Hooks, Said, Site, address_of, lock},
    swarm::{self, EACH, Hubs},
};
use crate::{Row, cpu, median, peers::text};

const HUBS: usize = 8;
const PEERS: usize = HUBS * EACH;
const SLICES: usize = 3;
const LIMIT: Duration = Duration::from_secs(45);
/// As ours has it.
const HANDSHAKE: Duration = Duration::from_secs(5);
const ID: &str = "storm-connections";
const PEER: &str = "quinn 0.11, default buffers";
const AIM: &str = ">= 1200/s, no time-out";

pub fn rows(runtime: &Runtime, _: &Path) -> Vec<Row> {
    let row = runtime.block_on(measure());
    vec![row.unwrap_or_else(|why| Row::not_run(ID, PEER, AIM, why))]
}

/// One storm.
struct Storm {
    connected: usize,
    seconds: f64,
    cpu_ms_each: f64,
    /// When nine of ten were connected.
    most_seconds: f64,
    failed: Vec<String>,
}

impl Storm {
    fn of(begun: Instant, cpu_begun: Duration, mut at: Vec<Instant>, failed: Vec<String>) -> Self {
        at.sort_unstable();
        let since = |at: Option<&Instant>| at.map_or(f64::NAN, |at| (*at - begun).as_secs_f64());
        Self {
            connected: at.len(),
            seconds: since(at.last()),
            most_seconds: since(at.get((at.len() * 9 / 10).saturating_sub(1))),
            cpu_ms_each: (cpu() - cpu_begun).as_secs_f64() * 1e3 / at.len().max(1) as f64,
            failed,
        }
    }

    fn rate(&self) -> f64 {
        self.connected as f64 / self.seconds
    }

    fn timed_out(&self) -> usize {
        let failed = self.failed.iter();
        let late = |reason: &&String| reason.contains("in time") || reason.contains("timed out");
        failed.filter(late).count()
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "connected": self.connected, "seconds": self.seconds, "nine_of_ten_seconds": self.most_seconds,
            "cpu_ms_each": self.cpu_ms_each, "failed_dials": swarm::tally(self.failed.iter().cloned()),
        })
    }
}

type Papers = [Vec<(u64, Arc<MeshTls>)>];

/// Sessions with the Hello round trip made, dials of the shell's own dialler.
async fn ours(hub_papers: &[Arc<MeshTls>], papers: &Papers) -> Result<Storm, String> {
    let hubs = Hubs::start(hub_papers, |_, tls| Ok(Hooks::memory(tls, None)))?;
    let (sender, notes) = mpsc::channel();
    let mut meshes = Vec::new();
    for (number, (_, tls)) in papers.iter().flatten().enumerate() {
        let mesh = hubs.peer(number, tls, Some(sender.clone()))?;
        mesh.set_enabled(false, "before the storm");
        meshes.push(mesh);
    }
    // What was under way before the transport was closed.
    tokio::time::sleep(HANDSHAKE + Duration::from_secs(1)).await;
    if hubs.sessions() > 0 {
        return Err(format!("{} sessions before the storm", hubs.sessions()));
    }
    drop((hubs.take_notes(), notes.try_iter().count()));
    let (begun, cpu_begun) = (Instant::now(), cpu());
    for mesh in &meshes {
        mesh.set_enabled(true, "");
        mesh.dial_now();
    }
    let mut at = Vec::new();
    while at.len() < PEERS && begun.elapsed() < LIMIT {
        for (_, when, said) in hubs.take_notes() {
            if matches!(said, Said::Event(MeshEvent::SessionUp { .. })) {
                at.push(when);
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let failed = notes.try_iter().filter_map(|(_, _, said)| match said {
        Said::Event(MeshEvent::DialFailed { reason, .. }) => Some(reason),
        _ => None,
    });
    let mut storm = Storm::of(begun, cpu_begun, at, failed.collect());
    let live = hubs.sessions();
    if live < storm.connected {
        storm.failed.push(format!("sessions at the end: {live}"));
    }
    swarm::end(meshes).await;
    Ok(storm)
}

async fn theirs(hub_papers: &[Arc<MeshTls>], papers: &Papers) -> Result<Storm, String> {
    let mut servers = Vec::new();
    for tls in hub_papers {
        let config = quinn::ServerConfig::with_crypto(tls.quic_server_config().map_err(text)?);
        let server = quinn::Endpoint::server(config, ANY).map_err(text)?;
        servers.push((server.clone(), tls.node_id().clone()));
        tokio::spawn(async move {
            while let Some(incoming) = server.accept().await {
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        connection.closed().await;
                    }
                });
            }
        });
    }
    let mut clients = Vec::new();
    for (number, (_, tls)) in papers.iter().flatten().enumerate() {
        let (server, id) = &servers[number / EACH];
        let config = tls.quic_client_config(Some(id)).map_err(text)?;
        let endpoint = quinn::Endpoint::client(address_of(number)).map_err(text)?;
        let address = server.local_addr().map_err(text)?;
        clients.push((endpoint, quinn::ClientConfig::new(config), address));
    }
    let (begun, cpu_begun) = (Instant::now(), cpu());
    let done = Arc::new((Mutex::new((Vec::new(), Vec::new())), AtomicUsize::new(0)));
    let (end, over) = tokio::sync::watch::channel(false);
    for (endpoint, config, address) in clients {
        let (done, mut over) = (done.clone(), over.clone());
        tokio::spawn(async move {
            let connected = async {
                let connecting = endpoint
                    .connect_with(config, address, SERVER_NAME)
                    .map_err(text)?;
                match tokio::time::timeout(HANDSHAKE, connecting).await {
                    Ok(connected) => connected.map_err(text),
                    Err(_) => Err("no answer in time".to_owned()),
                }
            };
            let connected = connected.await;
            match &connected {
                Ok(_) => lock(&done.0).0.push(Instant::now()),
                Err(why) => lock(&done.0).1.push(why.clone()),
            }
            done.1.fetch_add(1, Ordering::Release);
            let _ = over.wait_for(|over| *over).await;
            endpoint.close(0_u32.into(), b"");
        });
    }
    while done.1.load(Ordering::Acquire) < PEERS && begun.elapsed() < LIMIT {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (at, failed) = std::mem::take(&mut *lock(&done.0));
    let storm = Storm::of(begun, cpu_begun, at, failed);
    let _ = end.send(true);
    for (server, _) in servers {
        server.close(0_u32.into(), b"");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(storm)
}

async fn measure() -> Result<Row, String> {
    let site = Site::new()?;
    let hub_papers: Vec<_> = swarm::papers(&site, "hub", HUBS)?
        .into_iter()
        .map(|(_, tls)| tls)
        .collect();
    let papers = [swarm::papers(&site, "peer", PEERS)?];
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..SLICES {
        a.push(ours(&hub_papers, &papers).await?);
        b.push(theirs(&hub_papers, &papers).await?);
    }
    let rates = [&a, &b].map(|storms| median(storms.iter().map(Storm::rate).collect()));
    let late: usize = a.iter().map(Storm::timed_out).sum();
    let all = a.iter().all(|storm| storm.connected == PEERS);
    let met = rates[0] >= 1_200.0 && late == 0 && all;
    let mut row = Row::absolute(
        ID,
        "connections/s",
        rates[0],
        Some((PEER, rates[1])),
        AIM,
        met,
    );
    row.why = (!met).then(|| {
        let missing: usize = a.iter().map(|storm| PEERS - storm.connected).sum();
        format!(
            "{:.0}/s, {late} dials timed out, {missing} peers missing",
            rates[0]
        )
    });
    Ok(row.with(json!({
        "peers": PEERS, "hubs": HUBS,
        "ours": a.iter().map(Storm::json).collect::<Vec<_>>(),
        "theirs": b.iter().map(Storm::json).collect::<Vec<_>>(),
        "what": "both ends on the same cores; ours until the Hello round trip is made, with a Retry for every address \
                 and failed dials tried again, theirs until the handshake is over, tried once",
    })))
}
