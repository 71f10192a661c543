//! What lies between the nodes of the story: a link that can be cut and healed.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{net::UdpSocket, task::JoinSet};

/// The largest UDP payload.
const DATAGRAM_MAX_BYTES: usize = 65_535;

/// The ground that the story is played on.
///
/// Two exist: [`Loopback`], a relay of this process on 127.0.0.0/8, and the network namespaces of
/// the `tests/` package, where the cut is a real link going down.
pub trait Network: Send + Sync {
    /// In one word, for the report.
    fn name(&self) -> &'static str;
    /// The address that a node listens on.
    fn listen(&self, node: &str) -> SocketAddr;
    /// The address under which `from` meets `to`.
    fn route(&self, from: &str, to: &str) -> SocketAddr;
    /// A command that runs `program` on the host of `node`.
    fn command(&self, node: &str, program: &Path) -> Command;
    /// Cuts a node off from all others.
    ///
    /// # Errors
    /// What the system said.
    fn cut(&self, node: &str) -> io::Result<()>;
    /// Undoes [`Network::cut`].
    ///
    /// # Errors
    /// What the system said.
    fn heal(&self, node: &str) -> io::Result<()>;
    /// Datagrams that a cut swallowed so far, where the ground can count them.
    fn swallowed(&self) -> Option<u64>;
}

/// A UDP relay on loopback addresses: every link goes through it, and a cut drops its datagrams.
#[derive(Debug)]
pub struct Loopback {
    _reserved: std::net::UdpSocket,
    listen: BTreeMap<String, SocketAddr>,
    routes: BTreeMap<(String, String), SocketAddr>,
    cut: BTreeMap<String, Arc<AtomicBool>>,
    swallowed: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Loopback {
    /// Takes one address of 127.0.0.0/8 for each node and one relay socket for each direction of
    /// each link.
    ///
    /// # Errors
    /// What the system said when no socket could be had.
    pub async fn new(nodes: &[&str]) -> io::Result<Self> {
        let mut listen = BTreeMap::new();
        let mut cut = BTreeMap::new();
        // A part of 127.0.0.0/8 that nobody else uses, by the number of a port that nobody else has:
        // what the system gives away on 127.0.0.1 meanwhile stands in no node's way.
        let reserved = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let [high, low] = reserved.local_addr()?.port().to_be_bytes();
        let mut held = Vec::new();
        for (node, last) in nodes.iter().zip(1_u8..) {
            let ip = IpAddr::V4(Ipv4Addr::new(127, high, low, last));
            // Held until the relay has its ports; the node binds it in a moment.
            let socket = std::net::UdpSocket::bind((ip, 0))?;
            listen.insert((*node).to_owned(), socket.local_addr()?);
            held.push(socket);
            cut.insert((*node).to_owned(), Arc::new(AtomicBool::new(false)));
        }
        let mut tasks = JoinSet::new();
        let mut routes = BTreeMap::new();
        let swallowed = Arc::new(AtomicU64::new(0));
        for (from, from_address) in &listen {
            for (to, to_address) in listen.iter().filter(|(to, _)| *to != from) {
                let near = Arc::new(UdpSocket::bind((from_address.ip(), 0)).await?);
                let far = Arc::new(UdpSocket::bind((from_address.ip(), 0)).await?);
                routes.insert((from.clone(), to.clone()), near.local_addr()?);
                let cuts: Vec<Arc<AtomicBool>> = [from, to]
                    .into_iter()
                    .filter_map(|n| cut.get(n).cloned())
                    .collect();
                let lane =
                    |receive: &Arc<UdpSocket>, send: &Arc<UdpSocket>, target: SocketAddr| Lane {
                        receive: receive.clone(),
                        send: send.clone(),
                        target,
                        cuts: cuts.clone(),
                        swallowed: swallowed.clone(),
                    };
                tasks.spawn(lane(&near, &far, *to_address).relay());
                tasks.spawn(lane(&far, &near, *from_address).relay());
            }
        }
        drop(held);
        Ok(Self {
            _reserved: reserved,
            listen,
            routes,
            cut,
            swallowed,
            _tasks: tasks,
        })
    }

    fn set(&self, node: &str, cut: bool) -> io::Result<()> {
        let flag = self.cut.get(node).ok_or(io::ErrorKind::NotFound)?;
        flag.store(cut, Ordering::SeqCst);
        Ok(())
    }
}

/// One direction of one link.
struct Lane {
    receive: Arc<UdpSocket>,
    send: Arc<UdpSocket>,
    target: SocketAddr,
    cuts: Vec<Arc<AtomicBool>>,
    swallowed: Arc<AtomicU64>,
}

impl Lane {
    async fn relay(self) {
        let mut buffer = vec![0; DATAGRAM_MAX_BYTES];
        loop {
            // Errors here are ICMP echoes of a node that is down: the link itself goes on.
            let Ok((length, _)) = self.receive.recv_from(&mut buffer).await else {
                continue;
            };
            if self.cuts.iter().any(|cut| cut.load(Ordering::SeqCst)) {
                self.swallowed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            if let Some(datagram) = buffer.get(..length) {
                let _ = self.send.send_to(datagram, self.target).await;
            }
        }
    }
}

impl Network for Loopback {
    fn name(&self) -> &'static str {
        "loopback"
    }

    fn listen(&self, node: &str) -> SocketAddr {
        self.listen.get(node).copied().unwrap_or(UNKNOWN)
    }

    fn route(&self, from: &str, to: &str) -> SocketAddr {
        self.routes
            .get(&(from.to_owned(), to.to_owned()))
            .copied()
            .unwrap_or(UNKNOWN)
    }

    fn command(&self, _node: &str, program: &Path) -> Command {
        Command::new(PathBuf::from(program))
    }

    fn cut(&self, node: &str) -> io::Result<()> {
        self.set(node, true)
    }

    fn heal(&self, node: &str) -> io::Result<()> {
        self.set(node, false)
    }

    fn swallowed(&self) -> Option<u64> {
        Some(self.swallowed.load(Ordering::Relaxed))
    }
}

/// An address where nobody is; a wrong name shows up as a node that meets nobody.
const UNKNOWN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9);

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn arrives(net: &Loopback, b: &UdpSocket) -> bool {
        let a = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        a.send_to(b"x", net.route("a", "b")).await.unwrap();
        let mut buffer = [0; 4];
        tokio::time::timeout(Duration::from_millis(300), b.recv_from(&mut buffer))
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn a_cut_swallows_and_a_heal_lets_through() {
        let net = Loopback::new(&["a", "b"]).await.unwrap();
        let b = UdpSocket::bind(net.listen("b")).await.unwrap();
        assert!(arrives(&net, &b).await, "positive control");
        net.cut("b").unwrap();
        assert!(!arrives(&net, &b).await);
        assert_eq!(net.swallowed(), Some(1));
        net.heal("b").unwrap();
        assert!(arrives(&net, &b).await);
    }
}
