//! The sockets of the beacons: one hears the group, one speaks to it. What a packet means and what it
//! may cause is decided in [`crate::beacon`].

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket as StdSocket},
    sync::Arc,
    time::Duration,
};

use quinn::VarInt;
use tidelock_quota::MonotonicClock;
use tokio::{net::UdpSocket, sync::Semaphore};

use super::{MeshError, MeshEvent, MeshHandle, Shared, driver, driver::Ended, lock, stopped};
use crate::{
    beacon::{BEACON_BYTES, BeaconConfigError, BeaconKey, BeaconNonce, BeaconPace, Beacons},
    frame::CloseCode,
    limits::{MAX_BEACON_DIALS, MAX_BEACON_INTERVAL},
    tls::SERVER_NAME,
    verifier::PeerRole,
};

/// Between two looks at candidates whom nobody wanted dialled at the last one.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Rest after as many packets as may be read, so that a flood does not wake this task for each.
const READ_PAUSE: Duration = Duration::from_millis(20);

/// Room for one packet, and one byte more: what is longer than a beacon must not look like one.
const PACKET_ROOM: usize = BEACON_BYTES + 1;

/// Packets of the group that wait in the kernel, bytes. A flood fills this and no more.
const SOCKET_BYTES: usize = 256 * 1024;

/// Discovery on the local network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeaconConfig {
    /// The multicast group and its port.
    pub group: SocketAddrV4,
    /// Mean time between two beacons, and the shortest between two dials to one candidate.
    pub interval: Duration,
    /// The key of the domain's beacons.
    pub key: Arc<BeaconKey>,
}

impl BeaconConfig {
    pub(super) fn check(&self, listen: SocketAddr) -> Result<(), MeshError> {
        let refuse = |detail| Err(MeshError::Config { detail });
        if !self.group.ip().is_multicast() || self.group.port() == 0 {
            return refuse("the beacon's group is no IPv4 multicast address with a port");
        }
        if listen.is_ipv6() {
            return refuse("beacons need an IPv4 address to listen on");
        }
        Ok(())
    }

    pub(super) fn beacons(
        &self,
        shared: &Shared,
    ) -> Result<Beacons<MonotonicClock>, BeaconConfigError> {
        let pace = BeaconPace {
            interval: self.interval,
            cap: self
                .interval
                .max(shared.config.dial.cap)
                .min(MAX_BEACON_INTERVAL),
        };
        let (key, clock) = (Arc::clone(&self.key), shared.clock.clone());
        Beacons::new(key, pace, clock, shared.now())
    }
}

/// What was sent, heard and made of it since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct BeaconStatus {
    /// What keeps discovery from working just now.
    pub fault: Option<String>,
    /// Beacons sent.
    pub sent: u64,
    /// Beacons of others that were good.
    pub heard: u64,
    /// Packets that were not followed, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// Addresses that are followed just now.
    pub candidates: u64,
    /// Dials that beacons caused.
    pub dials: u64,
    /// Of those, the ones that a missing peer answered.
    pub met: u64,
    /// Of those, the ones that somebody of the domain answered who was not missing.
    pub not_missing: u64,
    /// Of those, the ones that led nowhere: nobody answered, or nobody of the domain.
    pub failed: u64,
    /// What the last one of these came to.
    pub last_failure: Option<String>,
}

impl MeshHandle {
    /// What the beacons have done; none where they are off.
    #[must_use]
    pub fn beacon(&self) -> Option<BeaconStatus> {
        let on = self.shared.config.beacon.is_some();
        on.then(|| lock(&self.shared.beacon).clone())
    }
}

struct Sockets {
    hears: UdpSocket,
    speaks: UdpSocket,
    interface: Ipv4Addr,
    group: SocketAddrV4,
    /// The port that is announced.
    port: u16,
}

impl Sockets {
    /// Both go through the interface of the address that the mesh listens on; where it listens on all,
    /// through the one that the kernel routes the group to.
    fn open(config: &BeaconConfig, listen: SocketAddr) -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
        let interface = match listen.ip() {
            IpAddr::V4(ip) => ip,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        // Several nodes of one host may hear the same group.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Bound to the group itself: what is sent to the host's own address is not heard.
        rustix::net::bind(&socket, &SocketAddr::V4(config.group))?;
        let hears = StdSocket::from(socket);
        hears.join_multicast_v4(config.group.ip(), &interface)?;
        if let Err(error) = sockopt::set_socket_recv_buffer_size(&hears, SOCKET_BYTES) {
            tracing::debug!(%error, "socket buffer of the beacons not changed");
        }
        let speaks = StdSocket::bind((interface, 0))?;
        speaks.set_nonblocking(true)?;
        // Never past the first router.
        speaks.set_multicast_ttl_v4(1)?;
        Ok(Self {
            hears: UdpSocket::from_std(hears)?,
            speaks: UdpSocket::from_std(speaks)?,
            interface,
            group: config.group,
            port: listen.port(),
        })
    }

    /// Where this node's beacons come from and its port is: the tag covers both. Asked for each beacon,
    /// because addresses change.
    fn source(&self) -> io::Result<SocketAddrV4> {
        let mut ip = self.interface;
        if ip.is_unspecified() {
            let asked = StdSocket::bind((ip, 0))?;
            asked.connect(self.group)?;
            if let IpAddr::V4(chosen) = asked.local_addr()?.ip() {
                ip = chosen;
            }
        }
        Ok(SocketAddrV4::new(ip, self.port))
    }
}

/// Opens the sockets for as long as the mesh runs, again and again where they fail: an interface that
/// is down comes back.
pub(super) async fn run(
    shared: Arc<Shared>,
    config: BeaconConfig,
    mut beacons: Beacons<MonotonicClock>,
) {
    let dials = Arc::new(Semaphore::new(MAX_BEACON_DIALS));
    let mut told = Told::default();
    loop {
        let opened = shared
            .endpoint
            .local_addr()
            .and_then(|listen| Sockets::open(&config, listen));
        let error = match opened {
            Ok(sockets) => {
                match serve(&shared, &config, &mut beacons, &sockets, &dials, &mut told).await {
                    Ok(()) => break,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        told.tell(&shared, Some(error.to_string()));
        tokio::select! {
            () = tokio::time::sleep(config.interval) => {}
            () = stopped(&shared) => break,
        }
    }
}

/// What was told last of how discovery fares, if anything was.
#[derive(Default)]
struct Told(Option<Option<String>>);

impl Told {
    /// Tells what is news.
    fn tell(&mut self, shared: &Shared, fault: Option<String>) {
        if self.0.as_ref() == Some(&fault) {
            return;
        }
        self.0 = Some(fault.clone());
        lock(&shared.beacon).fault.clone_from(&fault);
        shared.event(MeshEvent::Discovery { fault });
    }
}

/// Sends and hears until the mesh stops. An error: a socket is of no more use.
async fn serve(
    shared: &Arc<Shared>,
    config: &BeaconConfig,
    beacons: &mut Beacons<MonotonicClock>,
    sockets: &Sockets,
    dials: &Arc<Semaphore>,
    told: &mut Told,
) -> io::Result<()> {
    let mut packet = [0; PACKET_ROOM];
    let mut may_read = false;
    loop {
        let now = shared.now();
        if beacons.next_beacon(now) <= now {
            // A node whose own papers are no good does not call for calls.
            let silent = shared.closed_because().is_some();
            let mut nonce = BeaconNonce::default();
            aws_lc_rs::rand::fill(&mut nonce).map_err(|_| io::ErrorKind::Other)?;
            let (source, unix_ms) = (sockets.source()?, shared.tls.now_unix_ms());
            let beacon = beacons.send(source, nonce, shared.jitter(), now, unix_ms);
            if !silent {
                sockets.speaks.send_to(&beacon, config.group).await?;
                lock(&shared.beacon).sent += 1;
                // Sockets that open say nothing of the way to the group: only a beacon that went out does.
                told.tell(shared, None);
            }
        }
        while let Ok(permit) = Arc::clone(dials).try_acquire_owned() {
            let found = beacons.poll_dial(now, |address| may_dial(shared, address.into(), now));
            let Some(address) = found else {
                break;
            };
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                dial_found(shared, address.into()).await;
                drop(permit);
            });
        }
        let look = beacons
            .poll_timeout()
            .map_or(now + config.interval, |due| due.max(now + LOOK_INTERVAL));
        let mut wake = look.min(beacons.next_beacon(now));
        if !may_read {
            match beacons.try_read() {
                Ok(()) => may_read = true,
                Err(wait) => wake = wake.min(now + wait.max(READ_PAUSE)),
            }
        }
        tokio::select! {
            heard = sockets.hears.recv_from(&mut packet), if may_read => {
                may_read = false;
                let (length, SocketAddr::V4(from)) = heard? else {
                    continue;
                };
                let packet = packet.get(..length).unwrap_or_default();
                let unix_ms = shared.tls.now_unix_ms();
                let heard = beacons.hear(packet, *from.ip(), shared.now(), unix_ms);
                let mut status = lock(&shared.beacon);
                match heard {
                    Ok(_) => status.heard += 1,
                    Err(refusal) => *status.refused.entry(refusal.code()).or_default() += 1,
                }
                status.candidates = beacons.candidates() as u64;
            }
            () = tokio::time::sleep_until(shared.instant(wake)) => {
                lock(&shared.beacon).candidates = beacons.candidates() as u64;
            }
            () = stopped(shared) => return Ok(()),
        }
    }
}

/// Whether a dial there could bring anything, and the budgets allow it; else when to ask again.
fn may_dial(shared: &Shared, address: SocketAddr, now: Duration) -> Result<(), Duration> {
    let is_own = shared.endpoint.local_addr().is_ok_and(|own| own == address);
    let is_met = || {
        let registry = lock(&shared.registry);
        registry.iter().any(|(_, e)| e.handle.address == address)
    };
    if is_own || is_met() || shared.closed_because().is_some() {
        return Err(LOOK_INTERVAL);
    }
    lock(&shared.dialer).try_hinted(address, now)
}

/// One dial to an address of which a beacon told. Whoever answers must be of the domain, and of the
/// configuration, and missing; the handshake, the checks and the session are those of every dial.
async fn dial_found(shared: Arc<Shared>, address: SocketAddr) {
    lock(&shared.beacon).dials += 1;
    let failed = |reason: String| {
        tracing::debug!(%address, reason, "nobody met where a beacon came from");
        let mut status = lock(&shared.beacon);
        status.failed += 1;
        status.last_failure = Some(format!("{address}: {reason}"));
    };
    let connecting = shared
        .config
        .quic
        .client_to_anybody(&shared.tls)
        .map_err(|error| error.to_string())
        .and_then(|config| {
            shared
                .endpoint
                .connect_with(config, address, SERVER_NAME)
                .map_err(|error| error.to_string())
        });
    let connecting = match connecting {
        Ok(connecting) => connecting,
        Err(reason) => return failed(reason),
    };
    let timeout = shared.config.quic.handshake_timeout;
    let connection = match tokio::time::timeout(timeout, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return failed(Ended::from_connection(&error).reason),
        Err(_) => return failed("no answer in time".to_owned()),
    };
    let papers = shared
        .tls
        .verified_peer(connection.peer_identity(), PeerRole::Server);
    match papers {
        Ok(papers) if lock(&shared.dialer).is_missing(papers.node_id()) => {
            lock(&shared.beacon).met += 1;
            // The session outlives the dial.
            tokio::spawn(driver::run(shared, connection, true));
        }
        Ok(_) => {
            lock(&shared.beacon).not_missing += 1;
            let code = VarInt::from_u32(CloseCode::Normal as u32);
            connection.close(code, b"no peer that this node misses");
        }
        Err(refusal) => {
            failed(format!("{}: {refusal}", refusal.code()));
            // It is told and recorded like whoever else is refused.
            tokio::spawn(driver::run(Arc::clone(&shared), connection, true));
        }
    }
}
