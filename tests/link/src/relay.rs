//! Two links between two UDP sockets: the shell with the time and the sockets in it.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    net::UdpSocket,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{Counters, Fate, Link};

/// The largest UDP payload.
const DATAGRAM_MAX_BYTES: usize = 65_535;

/// Bytes on their way in one direction of a relay. Past it datagrams are dropped, as by a full
/// queue: a link without a rate has no queue that bounds it.
const MAX_WAITING_BYTES: usize = 64 * 1024 * 1024;

/// The two directions of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// From whoever sends to [`Relay::address`] to the target.
    Out,
    /// From the target back.
    Back,
}

/// A UDP relay: what is sent to its address reaches the target over one link, what the target
/// answers comes back over the other one. It serves the one who sent last, as a line has two ends.
/// Dropped, it stops.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    out: Arc<Mutex<Link>>,
    back: Arc<Mutex<Link>>,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// Binds two sockets on `ip` and begins to relay to `target`. Time of both links begins now.
    ///
    /// # Errors
    /// What the system said when no socket could be had.
    pub async fn start(ip: IpAddr, target: SocketAddr, out: Link, back: Link) -> io::Result<Self> {
        let near = Arc::new(UdpSocket::bind((ip, 0)).await?);
        let far = Arc::new(UdpSocket::bind((ip, 0)).await?);
        let address = near.local_addr()?;
        let [out, back] = [out, back].map(|link| Arc::new(Mutex::new(link)));
        let caller = Arc::new(Mutex::new(None));
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for (receive, send, link, end) in [
            (&near, &far, &out, End::Target(target, Arc::clone(&caller))),
            (&far, &near, &back, End::Caller(caller)),
        ] {
            let lane = Lane {
                receive: Arc::clone(receive),
                send: Arc::clone(send),
                link: Arc::clone(link),
                end,
                begun,
                waiting: BTreeMap::new(),
                waiting_bytes: 0,
                taken: 0,
            };
            tasks.spawn(lane.run());
        }
        Ok(Self {
            address,
            out,
            back,
            _tasks: tasks,
        })
    }

    /// Where to send what is meant for the target.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What passed so far in one direction.
    #[must_use]
    pub fn counters(&self, side: Side) -> Counters {
        lock(match side {
            Side::Out => &self.out,
            Side::Back => &self.back,
        })
        .counters()
    }
}

/// A panic elsewhere leaves nothing half done in what these locks hold.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the datagrams of a lane go to.
enum End {
    /// To the target; who sent one is the caller from now on.
    Target(SocketAddr, Arc<Mutex<Option<SocketAddr>>>),
    /// To the caller, once there is one.
    Caller(Arc<Mutex<Option<SocketAddr>>>),
}

/// One direction.
struct Lane {
    receive: Arc<UdpSocket>,
    send: Arc<UdpSocket>,
    link: Arc<Mutex<Link>>,
    end: End,
    begun: Instant,
    // By arrival, then in the order in which they were taken.
    waiting: BTreeMap<(Instant, u64), Vec<u8>>,
    waiting_bytes: usize,
    taken: u64,
}

impl Lane {
    async fn run(mut self) {
        let mut buffer = vec![0; DATAGRAM_MAX_BYTES];
        loop {
            let due = self.waiting.keys().next().map(|(at, _)| *at);
            let wake = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = wake => self.deliver().await,
                received = self.receive.recv_from(&mut buffer) => {
                    // Errors here are ICMP echoes of a node that is down: the link itself goes on.
                    if let Ok((length, from)) = received
                        && let Some(datagram) = buffer.get(..length)
                    {
                        self.take(datagram, from);
                    }
                }
            }
        }
    }

    fn take(&mut self, datagram: &[u8], from: SocketAddr) {
        if let End::Target(_, caller) = &self.end {
            *lock(caller) = Some(from);
        }
        if self.waiting_bytes + datagram.len() > MAX_WAITING_BYTES {
            return;
        }
        let fate = lock(&self.link).offer(self.begun.elapsed(), datagram.len());
        if let Fate::Arrives(at) = fate {
            self.taken += 1;
            self.waiting_bytes += datagram.len();
            self.waiting
                .insert((self.begun + at, self.taken), datagram.to_vec());
        }
    }

    async fn deliver(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.waiting.first_entry() {
            if first.key().0 > now {
                break;
            }
            let datagram = first.remove();
            self.waiting_bytes = self.waiting_bytes.saturating_sub(datagram.len());
            let target = match &self.end {
                End::Target(target, _) => Some(*target),
                End::Caller(caller) => *lock(caller),
            };
            if let Some(target) = target {
                // An error is a datagram lost at its end: that is what links do.
                let _ = self.send.send_to(&datagram, target).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::LinkConfig;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    async fn hear(socket: &UdpSocket, patience: Duration) -> Option<(Vec<u8>, SocketAddr)> {
        let mut buffer = [0; 64];
        let heard = tokio::time::timeout(patience, socket.recv_from(&mut buffer)).await;
        let (length, from) = heard.ok()?.ok()?;
        Some((buffer[..length].to_vec(), from))
    }

    #[tokio::test]
    async fn a_relay_carries_both_ways_and_delays() {
        let delay = Duration::from_millis(40);
        let link = |seed| {
            let config = LinkConfig {
                delay,
                ..LinkConfig::default()
            };
            Link::new(config, seed).unwrap()
        };
        let target = UdpSocket::bind((LOCAL, 0)).await.unwrap();
        let caller = UdpSocket::bind((LOCAL, 0)).await.unwrap();
        let relay = Relay::start(LOCAL, target.local_addr().unwrap(), link(1), link(2))
            .await
            .unwrap();
        let long = Duration::from_secs(30);
        let begun = Instant::now();
        caller.send_to(b"ahoy", relay.address()).await.unwrap();
        let (heard, from) = hear(&target, long).await.unwrap();
        assert_eq!(heard, b"ahoy");
        target.send_to(b"aye", from).await.unwrap();
        let (heard, from) = hear(&caller, long).await.unwrap();
        assert_eq!(
            (heard.as_slice(), from),
            (b"aye".as_slice(), relay.address())
        );
        assert!(begun.elapsed() >= delay * 2);

        let (out, back) = (relay.counters(Side::Out), relay.counters(Side::Back));
        assert_eq!((out.packets_in, out.packets_out), (1, 1));
        assert_eq!((back.packets_in, back.packets_out), (1, 1));
    }
}
