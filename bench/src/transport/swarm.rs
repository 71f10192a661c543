//! Many peers around a few hubs. A node holds [`MAX_SESSIONS`] sessions at most, so a thousand peers
//! need four hubs; hubs and peers are whole meshes with sockets of their own.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tidelock_segments::NodeId;
use tidelock_transport::{
    dial::PeerConfig,
    limits::MAX_SESSIONS,
    shell::{MeshConfig, MeshEvent, MeshHandle},
    tls::MeshTls,
};

use super::site::{self, ANY, Hooks, Note, Said, Site, address_of};
use crate::peers::text;

/// Peers of one hub; a few sessions are left for others.
pub const EACH: usize = 250;
const _: () = assert!(EACH < MAX_SESSIONS);

/// Peers that begin to dial at once where the pace does not matter: a hub takes 64 handshakes at a
/// time, and the rest would wait.
const BATCH: usize = 50;

pub struct Hub {
    pub mesh: MeshHandle,
    pub hooks: Arc<Hooks>,
    pub id: NodeId,
    pub address: SocketAddr,
}

pub struct Hubs {
    pub hubs: Vec<Hub>,
    notes: mpsc::Receiver<Note>,
}

impl Hubs {
    /// As many hubs as there are papers. `hooks` makes the node's side of each.
    pub fn start(
        papers: &[Arc<MeshTls>],
        hooks: impl Fn(usize, &Arc<MeshTls>) -> Result<Hooks, String>,
    ) -> Result<Self, String> {
        let (sender, notes) = mpsc::channel();
        let hubs = papers.iter().enumerate().map(|(number, tls)| {
            let mut hooks = hooks(number, tls)?;
            hooks.notes = Some((number, sender.clone()));
            let hooks = Arc::new(hooks);
            let mesh = site::start(MeshConfig::new(ANY, Vec::new()), tls, hooks.clone())?;
            Ok::<_, String>(Hub {
                id: tls.node_id().clone(),
                address: mesh.local_addr().map_err(text)?,
                mesh,
                hooks,
            })
        });
        Ok(Self {
            hubs: hubs.collect::<Result<_, _>>()?,
            notes,
        })
    }

    /// A mesh that dials the hub of this peer.
    pub fn peer(
        &self,
        number: usize,
        tls: &Arc<MeshTls>,
        notes: Option<mpsc::Sender<Note>>,
    ) -> Result<MeshHandle, String> {
        let hub = &self.hubs[number / EACH];
        let hooks = Hooks::memory(tls, notes.map(|notes| (number, notes)));
        site::start(calling(number, &hub.id, hub.address), tls, Arc::new(hooks))
    }

    /// Starts the peers with these numbers, a batch at a time, and waits for each batch.
    pub async fn gather(
        &self,
        peers: impl IntoIterator<Item = (usize, Arc<MeshTls>)>,
    ) -> Result<Vec<MeshHandle>, String> {
        let peers: Vec<_> = peers.into_iter().collect();
        let mut meshes = Vec::new();
        for batch in peers.chunks(BATCH) {
            for (number, tls) in batch {
                meshes.push(self.peer(*number, tls, None)?);
            }
            self.expect(batch.len(), Duration::from_secs(60), |_, said| {
                matches!(said, Said::Event(MeshEvent::SessionUp { .. }))
            })
            .await?;
        }
        Ok(meshes)
    }

    /// Waits for so many notes of this kind, and gives the moment of the last.
    pub async fn expect(
        &self,
        count: usize,
        within: Duration,
        mut is_one: impl FnMut(usize, &Said) -> bool,
    ) -> Result<Instant, String> {
        let begun = Instant::now();
        let (mut seen, mut last) = (0, begun);
        while seen < count {
            match self.notes.try_recv() {
                Ok((who, at, said)) => {
                    if is_one(who, &said) {
                        (seen, last) = (seen + 1, at);
                    }
                }
                Err(_) if begun.elapsed() > within => {
                    let within = within.as_secs();
                    return Err(format!("{seen} of {count} after {within} s"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        Ok(last)
    }

    pub fn take_notes(&self) -> Vec<Note> {
        self.notes.try_iter().collect()
    }

    pub fn sessions(&self) -> usize {
        let connected = |hub: &Hub| hub.mesh.peers().iter().filter(|p| p.connected).count();
        self.hubs.iter().map(connected).sum()
    }
}

/// The settings of a peer that dials one hub. It looks at its papers once a minute only: a thousand of
/// them share two cores here.
pub fn calling(number: usize, hub: &NodeId, address: SocketAddr) -> MeshConfig {
    let hub = PeerConfig {
        node_id: hub.clone(),
        addresses: vec![address],
    };
    MeshConfig {
        recheck_interval: Duration::from_secs(60),
        ..MeshConfig::new(address_of(number), vec![hub])
    }
}

/// Papers of `count` nodes whose names begin alike, with their serial numbers.
pub fn papers(site: &Site, name: &str, count: usize) -> Result<Vec<(u64, Arc<MeshTls>)>, String> {
    (0..count)
        .map(|number| site.tls(&format!("{name}-{number:04}")))
        .collect()
}

/// Ends many meshes at once.
pub async fn end(meshes: Vec<MeshHandle>) {
    let ends: Vec<_> = meshes
        .into_iter()
        .map(|mesh| tokio::spawn(async move { mesh.shutdown(Duration::from_secs(5)).await }))
        .collect();
    for end in ends {
        let _ = end.await;
    }
}

/// Reasons and how often each was given.
pub fn tally(reasons: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for reason in reasons {
        *tally.entry(reason).or_default() += 1;
    }
    tally
}
