//! Memory of a live session in which nothing happens: growth of a process that holds the server's
//! ends, beside quinn with the same TLS and its own settings.

use std::{
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tidelock_transport::{
    shell::MeshEvent,
    tls::{Credentials, MeshTls, SERVER_NAME},
};
use tokio::runtime::Runtime;

use super::{
    site::{self, ANY, Hooks, Said, Site, address_of, mesh_tls, named, resident_kib},
    swarm::{self, EACH, Hubs},
};
use crate::{
    Row, median,
    peers::text,
    segments::{Running, say},
};

const HUBS: usize = 4;
/// Growth counts from the first of these, so that what a process needs once is not in it.
const FIRST: usize = 100;
const PEERS: usize = HUBS * EACH;
const SLICES: usize = 3;
/// Time for what the handshakes leave behind.
const REST: Duration = Duration::from_secs(4);
const ID: &str = "idle-peer";
const PEER: &str = "quinn 0.11, an end";
const AIM: &str = "<= 56 KiB";

pub fn rows(runtime: &Runtime, dir: &Path) -> Vec<Row> {
    let row = runtime.block_on(measure(dir));
    vec![row.unwrap_or_else(|why| Row::not_run(ID, PEER, AIM, why))]
}

/// Papers on the disk, for the process that is weighed.
pub fn write_papers(site: &Site, dir: &Path, names: &[String]) -> Result<(), String> {
    let write = |name: String, bytes: &str| {
        use std::io::Write as _;
        let mut options = std::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(dir.join(name)).map_err(text);
        file.and_then(|mut file| file.write_all(bytes.as_bytes()).map_err(text))
    };
    write("ca.crt".to_owned(), &site.ca)?;
    for name in names {
        let paper = site.paper(&named(name)?, None)?;
        write(format!("{name}.crt"), &paper.certificate)?;
        write(format!("{name}.key"), &paper.key.serialize_pem())?;
    }
    Ok(())
}

pub fn read_papers(dir: &Path, name: &str) -> Result<Arc<MeshTls>, String> {
    let file = |kind: &str| dir.join(format!("{name}.{kind}"));
    let credentials = Credentials::load(&file("crt"), &file("key"), &dir.join("ca.crt"));
    Ok(mesh_tls(named(name)?, credentials.map_err(text)?))
}

fn hub_names() -> Vec<String> {
    (0..HUBS).map(|number| format!("hub-{number}")).collect()
}

/// The process that is weighed: says its ports, then its size with few sessions, then with all.
pub fn hold(dir: &Path, system: &str) -> Result<(), String> {
    let runtime = Runtime::new().map_err(text)?;
    runtime.block_on(async {
        let papers = hub_names()
            .iter()
            .map(|name| read_papers(dir, name))
            .collect::<Result<Vec<_>, _>>()?;
        match system {
            "ours" => hold_ours(&papers).await,
            _ => hold_theirs(&papers).await,
        }
    })
}

async fn hold_ours(papers: &[Arc<MeshTls>]) -> Result<(), String> {
    let hubs = Hubs::start(papers, |_, tls| Ok(Hooks::memory(tls, None)))?;
    let ports: Vec<u16> = hubs.hubs.iter().map(|hub| hub.address.port()).collect();
    say(&json!({"ports": ports}));
    let up = |_, said: &Said| matches!(said, Said::Event(MeshEvent::SessionUp { .. }));
    let minute = Duration::from_secs(60);
    hubs.expect(FIRST, minute, up).await?;
    tokio::time::sleep(REST).await;
    say(&json!({"kib": resident_kib()?, "sessions": hubs.sessions()}));
    hubs.expect(PEERS - FIRST, minute, up).await?;
    tokio::time::sleep(REST).await;
    say(&json!({"kib": resident_kib()?, "sessions": hubs.sessions()}));
    std::future::pending().await
}

async fn hold_theirs(papers: &[Arc<MeshTls>]) -> Result<(), String> {
    let held = Arc::new(AtomicUsize::new(0));
    let mut ports = Vec::new();
    for tls in papers {
        let config = quinn::ServerConfig::with_crypto(tls.quic_server_config().map_err(text)?);
        let server = quinn::Endpoint::server(config, ANY).map_err(text)?;
        ports.push(server.local_addr().map_err(text)?.port());
        let held = held.clone();
        tokio::spawn(async move {
            while let Some(incoming) = server.accept().await {
                let held = held.clone();
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        held.fetch_add(1, Ordering::Relaxed);
                        connection.closed().await;
                        held.fetch_sub(1, Ordering::Relaxed);
                    }
                });
            }
        });
    }
    say(&json!({"ports": ports}));
    for wanted in [FIRST, PEERS] {
        let minute = Duration::from_secs(60);
        site::until(minute, "connections", || {
            held.load(Ordering::Relaxed) >= wanted
        })
        .await?;
        tokio::time::sleep(REST).await;
        say(&json!({"kib": resident_kib()?, "sessions": held.load(Ordering::Relaxed)}));
    }
    std::future::pending().await
}

/// KiB a session, and what the process said.
async fn weigh(
    dir: &Path,
    system: &'static str,
    papers: &[Arc<MeshTls>],
) -> Result<(f64, Value), String> {
    let mut child = Running::start(&["transport-hold", system], dir)?;
    let ports = child.next()?["ports"].clone();
    let port = |number: usize| -> Result<std::net::SocketAddr, String> {
        let port = ports[number / EACH]
            .as_u64()
            .and_then(|port| u16::try_from(port).ok());
        let mut address = ANY;
        address.set_port(port.ok_or("no port")?);
        Ok(address)
    };
    let mut meshes = Vec::new();
    let mut connections = Vec::new();
    let mut sizes = Vec::new();
    // The first ones spread over the hubs as all of them are.
    let order = (0..FIRST).map(|n| n * (PEERS / FIRST));
    let rest = (0..PEERS).filter(|n| n % (PEERS / FIRST) != 0);
    let order: Vec<usize> = order.chain(rest).collect();
    for part in [&order[..FIRST], &order[FIRST..]] {
        for batch in part.chunks(50) {
            let before = meshes.len();
            for number in batch {
                let (tls, hub) = (&papers[*number], named(&format!("hub-{}", number / EACH))?);
                if system == "ours" {
                    let config = swarm::calling(*number, &hub, port(*number)?);
                    meshes.push(site::start(
                        config,
                        tls,
                        Arc::new(Hooks::memory(tls, None)),
                    )?);
                } else {
                    let config = tls.quic_client_config(Some(&hub)).map_err(text)?;
                    let mut config = quinn::ClientConfig::new(config);
                    let mut transport = quinn::TransportConfig::default();
                    // As ours has it; without, the connections would end by themselves.
                    transport.keep_alive_interval(Some(Duration::from_secs(5)));
                    config.transport_config(Arc::new(transport));
                    let endpoint = quinn::Endpoint::client(address_of(*number)).map_err(text)?;
                    let connecting = endpoint.connect_with(config, port(*number)?, SERVER_NAME);
                    connections.push(connecting.map_err(text)?.await.map_err(text)?);
                }
            }
            let batch = &meshes[before..];
            site::until(Duration::from_secs(60), "sessions", || {
                batch
                    .iter()
                    .all(|mesh| mesh.peers().iter().any(|peer| peer.connected))
            })
            .await?;
        }
        let begun = Instant::now();
        let (returned, said) = tokio::task::spawn_blocking(move || {
            let said = child.next();
            (child, said)
        })
        .await
        .map_err(text)?;
        child = returned;
        let said =
            said.map_err(|why| format!("{why} after {:.0} s", begun.elapsed().as_secs_f64()))?;
        let size = (said["kib"].as_f64(), said["sessions"].as_f64());
        let (Some(kib), Some(sessions)) = size else {
            return Err(format!("the weighed process said {said}"));
        };
        sizes.push((kib, sessions));
    }
    drop(child);
    swarm::end(meshes).await;
    for connection in connections {
        connection.close(0_u32.into(), b"");
    }
    let [(small, few), (large, many)] = sizes[..] else {
        return Err("no two sizes".to_owned());
    };
    if many != PEERS as f64 {
        return Err(format!("{many} sessions of {PEERS}"));
    }
    Ok(((large - small) / (many - few), json!(sizes)))
}

async fn measure(dir: &Path) -> Result<Row, String> {
    let site = Site::new()?;
    write_papers(&site, dir, &hub_names())?;
    let papers: Vec<_> = swarm::papers(&site, "peer", PEERS)?
        .into_iter()
        .map(|(_, tls)| tls)
        .collect();
    let (mut ours, mut theirs, mut details) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SLICES {
        let (each, detail) = weigh(dir, "ours", &papers).await?;
        ours.push(each);
        let (bare, bare_detail) = weigh(dir, "theirs", &papers).await?;
        theirs.push(bare);
        details.push(json!({"ours": detail, "theirs": bare_detail}));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    Ok(Row::absolute(ID, "KiB", ours, Some((PEER, theirs)), AIM, ours <= 56.0).with(json!({
        "kib_and_sessions": details,
        "what": "resident memory of the process with the server's ends, four hubs, from 100 to 1,000 live sessions",
    })))
}
