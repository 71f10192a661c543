//! From a CRL's arrival at a node to the end of the last session that it revokes: a thousand live
//! sessions, ten revoked at a time, by lists that come over the wire as all segments do.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock_segments::{NodeId, verify_segment};
use tidelock_transport::{
    dial::PeerConfig,
    frame::CloseCode,
    revocation::{VerifiedCrl, crl_segment},
    shell::{MeshConfig, MeshEvent, MeshHandle, MeshHooks as _},
    tls::MeshTls,
};
use tokio::runtime::Runtime;

use super::{
    site::{self, ANY, Hooks, Said, Site, lock, p99, store},
    swarm::{self, EACH, Hubs},
};
use crate::{
    Row, median,
    peers::{domain, text},
};

const HUBS: usize = 4;
const PEERS: usize = HUBS * EACH;
const REVOKED: usize = 10;
const ROUNDS: usize = 20;
const ID: &str = "revocation-close-p99";
const AIM: &str = "<= 50 ms, no bystander";

pub fn rows(runtime: &Runtime, dir: &Path) -> Vec<Row> {
    let row = runtime.block_on(measure(dir));
    vec![row.unwrap_or_else(|why| Row::not_run(ID, "", AIM, why))]
}

struct Peer {
    serial: u64,
    id: NodeId,
    mesh: MeshHandle,
}

/// What the rounds found, in milliseconds.
#[derive(Default)]
struct Found {
    /// For each revoked session, since the list was at its node.
    closed: Vec<f64>,
    /// The same since the list was at the node that passes it on.
    passed_on: Vec<f64>,
    /// For each round and node, the last one.
    last: Vec<f64>,
    bystanders: Vec<String>,
}

async fn measure(dir: &Path) -> Result<Row, String> {
    let site = Site::new()?;
    let hub_papers: Vec<_> = swarm::papers(&site, "hub", HUBS)?
        .into_iter()
        .map(|(_, tls)| tls)
        .collect();
    let hubs = Hubs::start(&hub_papers, |number, tls| {
        let store = store(&dir.join(format!("hub-{number}")), tls.node_id())?;
        Ok(Hooks::disk(&store, tls))
    })?;
    for hub in &hubs.hubs {
        *lock(&hub.hooks.mesh) = Some(hub.mesh.clone());
    }
    // Where the lists come from.
    let (_, courier_tls) = site.tls("courier")?;
    let courier_hooks = Arc::new(Hooks::memory(&courier_tls, None));
    let to = |hub: &swarm::Hub| PeerConfig {
        node_id: hub.id.clone(),
        addresses: vec![hub.address],
    };
    let config = MeshConfig::new(ANY, hubs.hubs.iter().map(to).collect());
    let courier = site::start(config, &courier_tls, courier_hooks.clone())?;
    let up = |_, said: &Said| matches!(said, Said::Event(MeshEvent::SessionUp { .. }));
    hubs.expect(HUBS, Duration::from_secs(10), up).await?;
    let papers = swarm::papers(&site, "peer", PEERS)?;
    let meshes = hubs.gather(papers.iter().map(|(_, tls)| tls.clone()).enumerate());
    let mut peers: Vec<Peer> = papers
        .iter()
        .zip(meshes.await?)
        .map(|((serial, tls), mesh)| Peer {
            serial: *serial,
            id: tls.node_id().clone(),
            mesh,
        })
        .collect();
    let mut found = Found::default();
    let mut revoked = Vec::new();
    for round in 0..ROUNDS {
        if hubs.sessions() != PEERS + HUBS {
            return Err(format!("{} sessions before round {round}", hubs.sessions()));
        }
        // Other ones each time, at every hub.
        let chosen: Vec<usize> = (0..REVOKED)
            .map(|n| n * (PEERS / REVOKED) + round)
            .collect();
        revoked.extend(chosen.iter().map(|n| peers[*n].serial));
        let ids: BTreeMap<NodeId, usize> = chosen
            .iter()
            .map(|n| (peers[*n].id.clone(), *n / EACH))
            .collect();
        let number = round as u64 + 1;
        let crl = site.crl(number, revoked.iter().copied())?;
        let begun = publish(&courier, &courier_tls, &courier_hooks, &crl)?;
        closed(&hubs, begun, ids, &mut found).await?;
        // The revoked make room for others, so that there are a thousand again.
        let mut fresh = Vec::new();
        for n in &chosen {
            let (serial, tls) = site.tls(&format!("peer-{n:04}-{round}"))?;
            fresh.push((*n, serial, tls));
        }
        let again = fresh.iter().map(|(n, _, tls)| (*n, tls.clone()));
        let mut gone = Vec::new();
        for ((n, serial, tls), mesh) in fresh.iter().zip(hubs.gather(again).await?) {
            let peer = Peer {
                serial: *serial,
                id: tls.node_id().clone(),
                mesh,
            };
            gone.push(std::mem::replace(&mut peers[*n], peer).mesh);
        }
        swarm::end(gone).await;
        // The others pass the list on among themselves.
        tokio::time::sleep(Duration::from_millis(700)).await;
        for (_, _, said) in hubs.take_notes() {
            if let Said::Event(MeshEvent::SessionDown { peer, reason, .. }) = said {
                found.bystanders.push(format!("{peer}: {reason}"));
            }
        }
    }
    swarm::end(peers.into_iter().map(|peer| peer.mesh).collect()).await;
    for hub in &hubs.hubs {
        lock(&hub.hooks.mesh).take();
    }
    let (worst, met) = (p99(found.closed.clone()), found.bystanders.is_empty());
    let detail = json!({
        "sessions": PEERS, "hubs": HUBS, "rounds": ROUNDS, "revoked_a_round": REVOKED,
        "median_ms": median(found.closed.clone()),
        "worst_ms": found.closed.iter().copied().fold(0.0, f64::max),
        "last_of_a_hub_p99_ms": p99(found.last),
        "since_the_list_was_at_the_neighbour_p99_ms": p99(found.passed_on),
        "bystanders": swarm::tally(found.bystanders.iter().cloned()),
        "what": "until the hub's session is over; a node holds 256 sessions at most, so a thousand are those of four; \
                 the lists come over the wire, are stored durably, and the other peers take them from the hub meanwhile",
    });
    let met = met && worst <= 50.0;
    let mut row = Row::absolute(ID, "ms", worst, None, AIM, met);
    row.why = (!met).then(|| format!("{worst:.1} ms, {} bystanders", found.bystanders.len()));
    Ok(row.with(detail))
}

/// Gives the list to the courier, as an operator would, and says when.
fn publish(
    courier: &MeshHandle,
    tls: &MeshTls,
    hooks: &Hooks,
    crl: &[u8],
) -> Result<Instant, String> {
    let credentials = tls.credentials();
    let crl = VerifiedCrl::verify(crl, credentials.trust()).map_err(text)?;
    let bytes = crl_segment(&domain(), &crl).map_err(text)?;
    let segment = verify_segment(bytes, None, &domain()).map_err(text)?;
    let reference = segment.reference();
    hooks
        .admit(tls.node_id(), segment)
        .map_err(|refusal| refusal.message)?;
    let begun = Instant::now();
    courier.notify_stored(&reference);
    Ok(begun)
}

/// Waits until the revoked, each with its hub, are closed, and notes whoever else is.
async fn closed(
    hubs: &Hubs,
    begun: Instant,
    mut revoked: BTreeMap<NodeId, usize>,
    found: &mut Found,
) -> Result<(), String> {
    let millis =
        |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
    let mut here: [Option<Instant>; HUBS] = [None; HUBS];
    let mut last: [Option<f64>; HUBS] = [None; HUBS];
    while !revoked.is_empty() {
        if begun.elapsed() > Duration::from_secs(20) {
            return Err(format!("{} sessions live on after 20 s", revoked.len()));
        }
        for (hub, at, said) in hubs.take_notes() {
            match said {
                Said::CrlHere => here[hub] = here[hub].or(Some(at)),
                Said::Event(MeshEvent::SessionDown {
                    peer, code, reason, ..
                }) => {
                    let is_revoked = code == Some(CloseCode::Revoked);
                    if !is_revoked || revoked.remove(&peer).is_none() {
                        found.bystanders.push(format!("{peer}: {reason}"));
                        continue;
                    }
                    let arrived = here[hub].ok_or("closed before the list was there")?;
                    let taken = millis(arrived, at);
                    found.closed.push(taken);
                    found.passed_on.push(millis(begun, at));
                    last[hub] = Some(last[hub].map_or(taken, |before| before.max(taken)));
                }
                Said::Event(_) => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    found.last.extend(last.into_iter().flatten());
    Ok(())
}
