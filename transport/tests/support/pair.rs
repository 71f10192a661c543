//! Two ends of QUIC over two links in virtual time: no socket, no sleep, minutes in a second.
//!
//! It is quinn's own sans-io core with the TLS and the settings of the product. Several flows may
//! share the links. The same seed gives the same run.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, Event, ServerConfig,
    StreamId, Transmit, WriteError,
};
use rcgen::PKCS_ED25519;
use tidelock_link::{Fate, Link, LinkConfig};
use tidelock_transport::{
    shell::QuicConfig,
    tls::{MeshTls, SERVER_NAME},
};

use crate::ca::Ca;

/// Datagrams that quinn makes at once, as in its own shell.
const SEGMENTS_MAX: usize = 10;

/// What is written at once.
static DATA: [u8; 64 * 1024] = [7; 64 * 1024];

/// Papers of two nodes, `a` and `b`, made once. Ed25519, so that a handshake always has as many bytes.
pub(crate) fn papers() -> &'static [MeshTls; 2] {
    static PAPERS: OnceLock<[MeshTls; 2]> = OnceLock::new();
    PAPERS.get_or_init(|| {
        let ca = Ca::with(&PKCS_ED25519);
        ["a", "b"].map(|node| ca.papers(node).tls(node))
    })
}

/// The product's settings for the end that is called.
pub(crate) fn server(quic: &QuicConfig) -> ServerConfig {
    quic.server(&papers()[1], None, None).unwrap()
}

/// One sender and its receiver.
pub(crate) struct Flow {
    /// The sender's settings.
    pub(crate) client: ClientConfig,
    /// When it dials.
    pub(crate) start: Duration,
    /// Bytes that it sends; none: as many as go.
    pub(crate) bytes: Option<u64>,
}

/// What became of a flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Bytes that the receiver read, in order.
    pub(crate) received: u64,
    /// Bytes of datagrams that the sender gave to the link.
    pub(crate) sent: u64,
    /// When the last byte had been read, if the flow had an end.
    pub(crate) finished: Option<Duration>,
    /// Bytes read when the second half of the run began.
    pub(crate) received_at_half: u64,
}

struct Host {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    stream: Option<StreamId>,
}

struct Running {
    // The sender and the receiver.
    hosts: [Host; 2],
    client: ClientConfig,
    start: Duration,
    to_write: Option<u64>,
    outcome: Outcome,
}

const ADDRESSES: [([u8; 4], u16); 2] = [([192, 0, 2, 1], 1_000), ([192, 0, 2, 2], 2_000)];

/// A datagram under way: when it arrives, its number, flow, receiving host.
type Arrival = Reverse<(Duration, u64, usize, usize)>;

/// The flows over their links.
pub(crate) struct Run {
    epoch: Instant,
    now: Duration,
    // Towards the receivers and back.
    links: [Link; 2],
    flows: Vec<Running>,
    arrivals: BinaryHeap<Arrival>,
    datagrams: BTreeMap<u64, BytesMut>,
    offered: u64,
}

impl Run {
    /// Nothing has happened yet.
    pub(crate) fn new(
        there: &LinkConfig,
        back: &LinkConfig,
        quic: &QuicConfig,
        flows: Vec<Flow>,
        seed: u64,
    ) -> Self {
        let endpoint = Arc::new(quic.endpoint().unwrap());
        let server = Arc::new(server(quic));
        let flows = flows.into_iter().zip(1_u8..).map(|(flow, number)| {
            let host = |side: u8, server| {
                let mut random = [side; 32];
                random[0] = number;
                random[1..9].copy_from_slice(&seed.to_le_bytes());
                Host {
                    endpoint: Endpoint::new(endpoint.clone(), server, true, Some(random)),
                    connection: None,
                    stream: None,
                }
            };
            Running {
                hosts: [host(0, None), host(1, Some(server.clone()))],
                client: flow.client,
                start: flow.start,
                to_write: flow.bytes,
                outcome: Outcome::default(),
            }
        });
        Self {
            epoch: Instant::now(),
            now: Duration::ZERO,
            links: [
                Link::new(there.clone(), seed).unwrap(),
                Link::new(back.clone(), seed ^ 0xbac0).unwrap(),
            ],
            flows: flows.collect(),
            arrivals: BinaryHeap::new(),
            datagrams: BTreeMap::new(),
            offered: 0,
        }
    }

    /// Bytes of the longest packet that the sender of a flow has found its path to carry.
    pub(crate) fn packet_bytes(&self, flow: usize) -> u16 {
        let sender = self.flows[flow].hosts[0].connection.as_ref();
        sender.unwrap().1.stats().path.current_mtu
    }

    /// Lets so much time pass, or less where every flow is finished; answers for each flow.
    pub(crate) fn run(&mut self, duration: Duration) -> Vec<Outcome> {
        let mut half = Some(duration / 2);
        while let Some(next) = self.next_time() {
            if half.is_some_and(|half| next >= half) {
                half = None;
                for flow in &mut self.flows {
                    flow.outcome.received_at_half = flow.outcome.received;
                }
            }
            if next > duration || self.flows.iter().all(|f| f.outcome.finished.is_some()) {
                break;
            }
            self.now = self.now.max(next);
            self.step();
        }
        self.flows.iter().map(|flow| flow.outcome).collect()
    }

    fn next_time(&mut self) -> Option<Duration> {
        let mut next = self.arrivals.peek().map(|Reverse((at, ..))| *at);
        for flow in &mut self.flows {
            let mut earliest = |at: Duration| next = Some(next.map_or(at, |n| n.min(at)));
            if flow.hosts[0].connection.is_none() {
                earliest(flow.start);
            }
            for host in &mut flow.hosts {
                if let Some((_, connection)) = &mut host.connection
                    && let Some(at) = connection.poll_timeout()
                {
                    earliest(at.saturating_duration_since(self.epoch));
                }
            }
        }
        next
    }

    fn step(&mut self) {
        let now = self.epoch + self.now;
        let mut touched = vec![[false; 2]; self.flows.len()];
        for (flow, touched) in self.flows.iter_mut().zip(&mut touched) {
            if flow.hosts[0].connection.is_none() && flow.start <= self.now {
                let dialled = flow.hosts[0].endpoint.connect(
                    now,
                    flow.client.clone(),
                    SocketAddr::from(ADDRESSES[1]),
                    SERVER_NAME,
                );
                flow.hosts[0].connection = Some(dialled.unwrap());
                touched[0] = true;
            }
            for (host, touched) in flow.hosts.iter_mut().zip(touched) {
                if let Some((_, connection)) = &mut host.connection
                    && connection.poll_timeout().is_some_and(|at| at <= now)
                {
                    connection.handle_timeout(now);
                    *touched = true;
                }
            }
        }
        while let Some(Reverse((at, number, flow, side))) = self.arrivals.peek().copied() {
            if at > self.now {
                break;
            }
            self.arrivals.pop();
            let datagram = self.datagrams.remove(&number).unwrap();
            self.arrive(flow, side, datagram);
            touched[flow][side] = true;
        }
        for (flow, sides) in touched.into_iter().enumerate() {
            for (side, touched) in sides.into_iter().enumerate() {
                if touched {
                    self.pump(flow, side);
                }
            }
        }
    }

    fn arrive(&mut self, flow: usize, side: usize, datagram: BytesMut) {
        let now = self.epoch + self.now;
        let from = SocketAddr::from(ADDRESSES[1 - side]);
        let host = &mut self.flows[flow].hosts[side];
        let mut answer = Vec::new();
        match host
            .endpoint
            .handle(now, from, None, None, datagram, &mut answer)
        {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, connection)) = &mut host.connection {
                    connection.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                match host.endpoint.accept(incoming, now, &mut answer, None) {
                    Ok(accepted) => host.connection = Some(accepted),
                    Err(error) => panic!("not accepted: {}", error.cause),
                }
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    /// Lets one end do what it can do now.
    fn pump(&mut self, flow: usize, side: usize) {
        let now = self.epoch + self.now;
        let running = &mut self.flows[flow];
        let host = &mut running.hosts[side];
        let Some((handle, connection)) = &mut host.connection else {
            return;
        };
        while let Some(event) = connection.poll() {
            match event {
                Event::Connected if side == 0 => {
                    host.stream = connection.streams().open(Dir::Uni);
                }
                Event::ConnectionLost { reason } => panic!("lost at {:?}: {reason}", self.now),
                _ => {}
            }
        }
        if side == 0 {
            if let Some(stream) = host.stream {
                write(connection, stream, &mut running.to_write);
            }
        } else {
            if host.stream.is_none() {
                host.stream = connection.streams().accept(Dir::Uni);
            }
            if let Some(stream) = host.stream
                && read(connection, stream, &mut running.outcome.received)
            {
                running.outcome.finished.get_or_insert(self.now);
            }
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = host.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        let mut buffer = Vec::with_capacity(16 * 1024);
        while let Some(transmit) = connection.poll_transmit(now, SEGMENTS_MAX, &mut buffer) {
            let Transmit {
                size, segment_size, ..
            } = transmit;
            for datagram in buffer[..size].chunks(segment_size.unwrap_or(size)) {
                if side == 0 {
                    running.outcome.sent += datagram.len() as u64;
                }
                self.offered += 1;
                if let Fate::Arrives(at) = self.links[side].offer(self.now, datagram.len()) {
                    self.arrivals
                        .push(Reverse((at, self.offered, flow, 1 - side)));
                    self.datagrams
                        .insert(self.offered, BytesMut::from(datagram));
                }
            }
            buffer.clear();
        }
    }
}

fn write(connection: &mut Connection, stream: StreamId, left: &mut Option<u64>) {
    loop {
        let most = left.map_or(DATA.len(), |left| left.min(DATA.len() as u64) as usize);
        if most == 0 {
            // Finished before, or nothing left.
            let _ = connection.send_stream(stream).finish();
            return;
        }
        let mut chunk = [Bytes::from_static(&DATA[..most])];
        match connection.send_stream(stream).write_chunks(&mut chunk) {
            Ok(written) => {
                if let Some(left) = left {
                    *left -= written.bytes as u64;
                }
            }
            Err(WriteError::Blocked) => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Reads what there is; whether the stream is at its end.
fn read(connection: &mut Connection, stream: StreamId, received: &mut u64) -> bool {
    let mut receiver = connection.recv_stream(stream);
    let Ok(mut chunks) = receiver.read(true) else {
        return false;
    };
    let ended = loop {
        match chunks.next(usize::MAX) {
            Ok(Some(chunk)) => *received += chunk.bytes.len() as u64,
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let _ = chunks.finalize();
    ended
}
