//! The shell: sockets, tasks and time around the pure parts. The only place with I/O in it.
//!
//! [`Mesh::start`] binds one UDP socket, accepts and dials peers, and drives one
//! [`SessionMachine`](crate::session::SessionMachine) for each session. What it needs of the node it
//! asks through [`MeshHooks`]; what the node wants of it goes through [`MeshHandle`].
//!
//! Order of checks for whoever knocks, each before anything that costs more: transport open, address
//! validated by a Retry, quota of the address, a place for a handshake, TLS 1.3 with certificates on
//! both sides (chain, revocation, domain), own id, cool-down, room for a session, Hello round trip.
//! Only then does a segment byte move (INV-09).
//!
//! Where to start: [`MeshHooks`] for what the node gives, `door.rs` for whoever knocks, `driver.rs` for the life of a session,
//! `data.rs` for segments on their streams, `parts.rs` for big ones in ranges, `quic.rs` for how quinn is configured.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc as std_mpsc,
    },
    time::Duration,
};

use quinn::{AsyncUdpSocket, Endpoint, Incoming, ServerConfig, VarInt};
use tidelock_quota::{MonotonicClock, RateError};
use tidelock_segments::{
    DomainId, Head, NodeId, Origin, Partial, PartialError, SegmentId, SegmentRef, VerifiedSegment,
};
use tokio::sync::{Notify, Semaphore, watch};

use crate::{
    beacon::BeaconConfigError,
    congestion::{Congestion, PathMemory},
    dial::{Dial, DialConfig, DialConfigError, Dialer, PeerConfig},
    frame::CloseCode,
    limits::{MAX_BULK_BYTES_NODE, MAX_GREAT_SENDS_KIB, MAX_HANDSHAKES, MAX_PEERS, MAX_SESSIONS},
    registry::{Claims, Registry, SessionId},
    revocation::RevocationError,
    session::{AnnouncedQuota, Lag, PeerHello, PeerLimits, PeerPosture, Refusal, SessionConfig},
    tls::{MeshTls, SERVER_NAME, TlsError},
    verifier::{self, VerifiedPeer},
};

mod data;
mod discovery;
mod door;
mod driver;
mod outlook;
mod parts;
mod quic;
mod quotas;
mod silence;
mod throttle;

pub use discovery::{BeaconConfig, BeaconStatus};
use driver::{Ended, SessionHandle};
use outlook::Apart;
pub use outlook::{Answer, SegmentStanding};
use parts::Assemblies;
pub use quic::QuicConfig;
use quotas::Quotas;
pub use quotas::{PeerDebt, PeerQuota, QuotaConfig, QuotaDebt};

/// Events that wait for the node. Past it they are counted, and the count is told.
const EVENTS: usize = 1_024;

/// Time that a closing socket stays open for the last packets.
const LINGER: Duration = Duration::from_millis(250);

/// Between two flushes of the counters of refusals before authentication.
const REFUSAL_WINDOW: Duration = Duration::from_secs(60);

/// What became of a segment that the node took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// It is stored now.
    Stored,
    /// It was stored before (INV-08).
    AlreadyHeld,
}

/// What the node says of itself in a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloFacts {
    /// What it takes.
    pub limits: PeerLimits,
    /// Its posture.
    pub posture: PeerPosture,
    /// Encoded endorsement of its log key.
    pub endorsement: Option<Vec<u8>>,
}

/// What the mesh needs of the node. Every call may block for a short while: none is made from a
/// network thread, except that [`event`](Self::event) has a thread of its own.
pub trait MeshHooks: Send + Sync + 'static {
    /// All heads.
    fn heads(&self) -> Vec<Head>;
    /// The head of one origin.
    fn head(&self, origin: &Origin) -> Option<Head> {
        self.heads().into_iter().find(|head| head.origin == *origin)
    }
    /// References of one origin, ascending by number and then by id, at most `max`.
    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef>;
    /// The reference of a segment that is held.
    fn reference(&self, id: &SegmentId) -> Option<SegmentRef>;
    /// The bytes of a segment that is held. They are sent as they are; the receiver verifies.
    fn read(&self, id: &SegmentId) -> Option<Vec<u8>>;
    /// The slice for a range of a segment that is held ([`tidelock_segments::bao`]).
    fn read_range(&self, id: &SegmentId, range: &Range<u64>) -> Option<Vec<u8>>;
    /// Whether anything of this origin is taken from a peer. Of the node's own logs those that it can
    /// tell to be its own. False for an origin that was found forked.
    fn wants_origin(&self, origin: &Origin) -> bool;
    /// Numbers of an own log below this one were given up on purpose, and are not taken back.
    fn settled_below(&self, _origin: &Origin) -> u64 {
        0
    }
    /// Numbers of this origin of which another segment may be taken although one is held. Few.
    fn open_numbers(&self, _origin: &Origin) -> Vec<u64> {
        Vec::new()
    }
    /// Whether this segment is taken now. True for revocation and policy whatever the room
    /// (ruling 10); custody share and ceiling decide on the rest.
    fn wants(&self, reference: &SegmentRef) -> bool;
    /// Stores a segment whose bytes verified. What is judged here: the endorsement's chain, the link
    /// to the segment before, the CRL's signature, the policy's form. On success the mesh tells
    /// every peer by itself; after a revocation it closes whoever is revoked.
    ///
    /// # Errors
    /// Why it was not taken, and whose fault that is.
    fn admit(&self, peer: &NodeId, segment: VerifiedSegment) -> Result<Admitted, Refusal>;
    /// Stores segments of one peer, each judged as by [`admit`](Self::admit) and as if those before it
    /// were stored already; at most [`crate::limits::MAX_ADMITTED_TOGETHER`]. The answers are in their
    /// order, and one that says that a segment is stored means that it is durable. Segments that are
    /// stored together may share what storing costs. `alive` is asked before each that is stored alone
    /// and each group that is stored together; from when it refuses, its refusal is the answer (INV-09).
    fn admit_all(
        &self,
        peer: &NodeId,
        segments: Vec<VerifiedSegment>,
        alive: &dyn Fn() -> Result<(), Refusal>,
    ) -> Vec<Result<Admitted, Refusal>> {
        segments
            .into_iter()
            .map(|segment| alive().and_then(|()| self.admit(peer, segment)))
            .collect()
    }
    /// Begins to receive a segment in ranges, or goes on where an earlier contact ended. What is
    /// claimed of it was told by a peer and proves itself later.
    ///
    /// # Errors
    /// As [`tidelock_segments::Store::partial`].
    fn partial(&self, reference: &SegmentRef) -> Result<Partial, PartialError>;
    /// Stores a segment of which every range has arrived, judged as by [`admit`](Self::admit), with
    /// [`Partial::finish_with`].
    ///
    /// # Errors
    /// Why it was not taken, and whose fault that is.
    fn admit_partial(
        &self,
        peer: &NodeId,
        partial: &Partial,
    ) -> Result<(SegmentRef, Admitted), Refusal>;
    /// A custody receipt for a segment that is held for its origin.
    fn receipt_for(&self, id: &SegmentId) -> Option<Vec<u8>>;
    /// Own segments for which a receipt of this peer is still of use.
    fn receipt_wants(&self, peer: &NodeId) -> Vec<SegmentId>;
    /// Takes a receipt that this peer gave.
    ///
    /// # Errors
    /// Why it was not taken, and whose fault that is.
    fn take_receipt(&self, peer: &NodeId, receipt: &[u8]) -> Result<(), Refusal>;
    /// What the node says of itself.
    fn hello_local(&self) -> HelloFacts;
    /// A peer is authenticated, and this is what it said of itself. Called before anything of it is
    /// admitted, and from a network thread: it must be quick.
    fn authenticated(&self, _hello: &PeerHello) {}
    /// Something happened that the node may want to record or show.
    fn event(&self, event: MeshEvent);
}

/// Refusals before authentication: counts only, so that a flood costs no more than a number
/// (ruling 20).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct RefusalCounts {
    /// While the transport was closed.
    pub closed: u64,
    /// Past the quota of the address.
    pub address_quota: u64,
    /// No place for a handshake came free in time, or too many waited for one.
    pub busy: u64,
    /// TLS did not complete: no certificate, a refused one, wrong protocol, silence.
    pub handshake: u64,
}

impl RefusalCounts {
    fn total(&self) -> u64 {
        self.closed + self.address_quota + self.busy + self.handshake
    }
}

/// What happens in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshEvent {
    /// A peer is authenticated on both sides, as far as this node can see.
    SessionUp {
        /// The peer.
        peer: NodeId,
        /// Its address.
        address: SocketAddr,
        /// Whether this node dialled.
        outbound: bool,
        /// What it said of itself.
        hello: PeerHello,
    },
    /// A session ended.
    SessionDown {
        /// The peer.
        peer: NodeId,
        /// Its address.
        address: SocketAddr,
        /// The code, if either side gave one.
        code: Option<CloseCode>,
        /// For a human.
        reason: String,
        /// Whether the peer ended it.
        by_peer: bool,
        /// Whether it had been established.
        established: bool,
    },
    /// A dial led to no session.
    DialFailed {
        /// The peer.
        peer: NodeId,
        /// Where.
        address: SocketAddr,
        /// For a human.
        reason: String,
    },
    /// A connection was refused after its handshake.
    PeerRefused {
        /// The peer, if its certificate told.
        peer: Option<NodeId>,
        /// Its address.
        address: SocketAddr,
        /// Stable word.
        code: &'static str,
        /// For a human.
        reason: String,
    },
    /// Connections were refused before authentication, in the last window.
    Refusals(RefusalCounts),
    /// A segment was asked of a peer. The order of these is the order of INV-11.
    Requested {
        /// The peer.
        peer: NodeId,
        /// The segment.
        reference: SegmentRef,
    },
    /// A segment of a peer was stored.
    Stored {
        /// The peer.
        peer: NodeId,
        /// The segment.
        reference: SegmentRef,
    },
    /// A segment of a peer was not stored.
    TransferFailed {
        /// The peer.
        peer: NodeId,
        /// The segment.
        reference: SegmentRef,
        /// Why.
        refusal: Refusal,
    },
    /// Two nodes hold different segments at the same place of a linked log.
    ForkSuspected {
        /// The peer with the other history.
        peer: NodeId,
        /// The log.
        origin: Origin,
        /// The place.
        sequence: u64,
        /// The segment held here.
        ours: SegmentId,
        /// The segment held there.
        theirs: SegmentId,
    },
    /// A custody receipt was taken.
    ReceiptTaken {
        /// The custodian.
        peer: NodeId,
        /// The segment.
        id: SegmentId,
    },
    /// A custody receipt was not taken.
    ReceiptRefused {
        /// The peer.
        peer: NodeId,
        /// The segment.
        id: SegmentId,
        /// Why.
        refusal: Refusal,
    },
    /// The transport closed itself or was closed (ruling 12).
    TransportClosed {
        /// For a human, beginning with a stable word.
        reason: String,
    },
    /// The transport is open again.
    TransportOpened,
    /// Discovery began to work, or ceased to; it is tried again every interval.
    Discovery {
        /// What the system said; none when it works.
        fault: Option<String>,
    },
    /// Events were lost because the node did not take them in time.
    EventsLost {
        /// How many.
        count: u64,
    },
}

/// Settings of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshConfig {
    /// Where to listen, and from where to dial.
    pub listen: SocketAddr,
    /// Peers to dial. Others of the domain may dial this node.
    pub peers: Vec<PeerConfig>,
    /// Pace of the dials.
    pub dial: DialConfig,
    /// Bounds of a session.
    pub session: SessionConfig,
    /// QUIC.
    pub quic: QuicConfig,
    /// Congestion control of sessions with single peers, where it is not that of [`QuicConfig`].
    pub congestion_of_peers: BTreeMap<NodeId, Congestion>,
    /// Quotas of each peer.
    pub quotas: QuotaConfig,
    /// Peers with a quota of their own.
    pub own_quotas: BTreeMap<NodeId, PeerQuota>,
    /// What peers owed when the node stopped, less what they have paid by the time since.
    pub owed: BTreeMap<NodeId, PeerDebt>,
    /// Discovery by beacons; off without it.
    pub beacon: Option<BeaconConfig>,
    /// Bytes of bulk segments being received, over all sessions.
    pub receive_memory_bytes: u64,
    /// Between two looks at notAfter and nextUpdate of live sessions and of the own papers.
    pub recheck_interval: Duration,
    /// Seed of the redial jitter; none takes one from the system. The same seed gives the same
    /// delays.
    pub jitter_seed: Option<u64>,
}

impl MeshConfig {
    /// Defaults for everything that has one.
    #[must_use]
    pub fn new(listen: SocketAddr, peers: Vec<PeerConfig>) -> Self {
        Self {
            listen,
            peers,
            dial: DialConfig::default(),
            session: SessionConfig::default(),
            quic: QuicConfig::default(),
            congestion_of_peers: BTreeMap::new(),
            quotas: QuotaConfig::default(),
            own_quotas: BTreeMap::new(),
            owed: BTreeMap::new(),
            beacon: None,
            receive_memory_bytes: MAX_BULK_BYTES_NODE,
            recheck_interval: Duration::from_secs(1),
            jitter_seed: None,
        }
    }

    fn check(&self) -> Result<(), MeshError> {
        self.quic.check()?;
        if let Some(beacon) = &self.beacon {
            beacon.check(self.listen)?;
        }
        let session = &self.session;
        if session.max_in_flight == 0
            || session.faults_max == 0
            || session.hello_timeout.is_zero()
            || session.stall_timeout.is_zero()
        {
            return Err(MeshError::Config {
                detail: "a bound of the sessions is 0",
            });
        }
        let longest = Duration::from_secs(60);
        if self.recheck_interval.is_zero() || self.recheck_interval > longest {
            return Err(MeshError::Config {
                detail: "recheck interval must be above 0 and at most 60 s",
            });
        }
        Ok(())
    }
}

/// Why the mesh did not start. The fault is the local configuration's or the system's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// A setting makes no sense.
    #[error("mesh settings: {detail}")]
    Config {
        /// What is wrong.
        detail: &'static str,
    },
    /// The peers or the pace of the dials make no sense.
    #[error(transparent)]
    Dial(#[from] DialConfigError),
    /// A quota makes no sense.
    #[error("mesh quotas: {0}")]
    Quota(#[from] RateError),
    /// The beacons cannot be set up.
    #[error(transparent)]
    Beacon(#[from] BeaconConfigError),
    /// The socket cannot be had.
    #[error(
        "cannot listen on {address}: {kind}; is the port in use, is the address this machine's?"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        kind: io::ErrorKind,
    },
    /// TLS cannot be configured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A thread cannot be had, or there is no tokio runtime here.
    #[error("cannot start the mesh: {kind}")]
    Start {
        /// What the system said.
        kind: io::ErrorKind,
    },
}

/// How a session ended, for status.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CloseStatus {
    /// The code's word, if either side gave one.
    pub code: Option<&'static str>,
    /// For a human.
    pub reason: String,
    /// Whether the peer ended it.
    pub by_peer: bool,
    /// Milliseconds ago.
    pub ago_ms: u64,
}

/// Where things stand with one peer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PeerStatus {
    /// Its id.
    pub node_id: NodeId,
    /// Whether it stands in the configuration.
    pub configured: bool,
    /// Whether a session is established.
    pub connected: bool,
    /// Its address, while connected.
    pub address: Option<SocketAddr>,
    /// Whether this node dialled, while connected.
    pub outbound: Option<bool>,
    /// Milliseconds since the handshake, while connected.
    pub connected_ms: Option<u64>,
    /// Congestion control of what is sent to it, while connected.
    pub congestion: Option<&'static str>,
    /// Smoothed round trip, microseconds, while connected.
    pub round_trip_us: Option<u64>,
    /// Bytes that may be in flight to it, while connected.
    pub window_bytes: Option<u64>,
    /// Its posture in its last Hello.
    pub posture: Option<&'static str>,
    /// Bytes of custody that it offered in its last Hello.
    pub custody_free_bytes: Option<u64>,
    /// What it granted this node in its last Hello.
    pub announced: Option<AnnouncedQuota>,
    /// Sessions established since the start.
    pub sessions: u64,
    /// Segments taken from it.
    pub segments_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// Segments sent to it.
    pub segments_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Segments of it that were not taken.
    pub refused_in: u64,
    /// Of those, the ones that were its fault.
    pub faults: u64,
    /// Dials since the start.
    pub dials: u64,
    /// Milliseconds until the next dial.
    pub next_dial_ms: Option<u64>,
    /// Dials left at the fast pace.
    pub budget_left: Option<u32>,
    /// Milliseconds for which it is left alone.
    pub cooling_ms: Option<u64>,
    /// How the last session ended.
    pub last_close: Option<CloseStatus>,
    /// How far it and this node are apart; none until it was met since the start. While it is away
    /// what was stored here since is added to what it lacked then: at most so much.
    pub lag: Option<Lag>,
    /// Milliseconds since it was last known to lack nothing of this node; since the start, if never.
    pub lag_to_peer_ms: u64,
    /// Milliseconds since this node was last known to lack nothing of it; since the start, if never.
    pub lag_from_peer_ms: u64,
    /// QUIC packets sent to it since the start.
    pub sent_packets: u64,
    /// Of those, the ones declared lost; what they carried was sent again.
    pub lost_packets: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// What it owes to its quotas.
    pub quota: Vec<QuotaDebt>,
}

/// Counters of one peer.
#[derive(Debug, Default)]
struct PeerStats {
    hello: Option<PeerHello>,
    sessions: u64,
    segments_in: u64,
    bytes_in: u64,
    segments_out: u64,
    bytes_out: u64,
    refused_in: u64,
    faults: u64,
    last_end: Option<(Ended, Duration)>,
    apart: Apart,
    /// Sent and lost packets and lost bytes of the sessions that are over.
    packets: outlook::Packets,
}

/// Why the transport is closed, if it is (ruling 12).
#[derive(Debug, Default)]
struct Gate {
    by_operator: Option<String>,
    own_papers: Option<String>,
}

impl Gate {
    fn reason(&self) -> Option<&String> {
        self.by_operator.as_ref().or(self.own_papers.as_ref())
    }
}

/// Everything that the tasks share. No lock of it is held across an await or a call into the node.
struct Shared {
    config: MeshConfig,
    tls: Arc<MeshTls>,
    hooks: Arc<dyn MeshHooks>,
    clock: MonotonicClock,
    local: NodeId,
    domain: DomainId,
    endpoint: Endpoint,
    // The endpoint's, where it is this machine's.
    socket: Option<Arc<dyn AsyncUdpSocket>>,
    quotas: Quotas,
    registry: Mutex<Registry<VerifiedPeer, SessionHandle>>,
    claims: Mutex<Claims>,
    assemblies: Assemblies,
    dialer: Mutex<Dialer>,
    // What was learnt of the path to each configured peer, for the next session.
    paths: BTreeMap<NodeId, PathMemory>,
    // Whom the configuration has at an address: MAX_PEERS x MAX_ADDRESSES at most.
    peers_at: BTreeMap<SocketAddr, NodeId>,
    dial_wake: Notify,
    jitter: Mutex<u64>,
    silences: silence::Silences,
    gate: Mutex<Gate>,
    stats: Mutex<BTreeMap<NodeId, PeerStats>>,
    refusals: Mutex<(RefusalCounts, RefusalCounts)>,
    events: std_mpsc::SyncSender<MeshEvent>,
    events_lost: AtomicU64,
    /// Segments stored here since the start, and their bytes.
    stored: Mutex<(u64, u64)>,
    beacon: Mutex<BeaconStatus>,
    /// Memory for what is too big for a session's own, in KiB.
    great_sends: Arc<Semaphore>,
    stopping: watch::Sender<bool>,
    sessions_over: Notify,
}

/// A lock whose holder cannot have left it half-written: every critical section here is a few
/// assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The code that a refusal of a chain closes a live session with.
fn close_code(refusal: &verifier::Refusal) -> CloseCode {
    use verifier::Refusal as R;
    match refusal {
        R::Revocation(error) => revocation_code(error),
        R::Expired { .. } | R::NotYetValid { .. } => CloseCode::Expired,
        R::Identity(_) => CloseCode::Domain,
        R::OtherNode { .. } => CloseCode::NodeId,
        _ => CloseCode::Untrusted,
    }
}

fn revocation_code(error: &RevocationError) -> CloseCode {
    match error {
        RevocationError::Revoked { .. } | RevocationError::KeyRevoked { .. } => CloseCode::Revoked,
        _ => CloseCode::RevocationUnknown,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Shared {
    fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// The runtime's name for a moment of the node's clock.
    fn instant(&self, at: Duration) -> tokio::time::Instant {
        tokio::time::Instant::now() + at.saturating_sub(self.now())
    }

    fn jitter(&self) -> u64 {
        // splitmix64: uniform, seeded, and nobody's secret.
        let mut state = lock(&self.jitter);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn event(&self, event: MeshEvent) {
        tracing::debug!(?event, "mesh");
        // INV-10: a node that does not keep up loses events, never frames.
        if self.events.try_send(event).is_err() {
            self.events_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counted(&self, peer: &NodeId, change: impl FnOnce(&mut PeerStats)) {
        let mut stats = lock(&self.stats);
        // INV-07: of peers outside the configuration the first by name goes; only counters do.
        if !stats.contains_key(peer) && stats.len() >= MAX_PEERS + MAX_SESSIONS {
            stats.pop_first();
        }
        change(stats.entry(peer.clone()).or_default());
    }

    fn refused(&self, count: impl FnOnce(&mut RefusalCounts)) {
        count(&mut lock(&self.refusals).0);
    }

    /// Tells every session that a segment is stored.
    fn announce(&self, reference: &SegmentRef) {
        self.stored_one(reference.size_bytes);
        for (_, entry) in lock(&self.registry).iter() {
            entry.handle.mailbox.stored(reference);
        }
    }

    /// Gives a claim up; sessions that left the segment to this one may take it over.
    fn release(&self, session: SessionId, id: &SegmentId) {
        lock(&self.claims).release(session, id);
        self.released(Some(session), &[*id]);
    }

    /// Tells the sessions, but for the one that knows already, that segments may be asked for again.
    fn released(&self, by: Option<SessionId>, ids: &[SegmentId]) {
        if ids.is_empty() {
            return;
        }
        for (session, entry) in lock(&self.registry).iter() {
            if by != Some(session) {
                entry.handle.mailbox.released(ids);
            }
        }
    }

    fn close(&self, session: SessionId, code: CloseCode, reason: &str) {
        if let Some(entry) = lock(&self.registry).get(session) {
            entry.handle.close(code, reason);
        }
    }

    /// Whether a peer's papers still hold: two lookups and a comparison, no signature.
    fn judge(&self, papers: &VerifiedPeer) -> Result<(), (CloseCode, &'static str, String)> {
        let now_unix_ms = self.tls.now_unix_ms();
        if now_unix_ms > papers.chain().not_after_unix_ms() {
            let refusal = verifier::Refusal::Expired {
                not_after_unix_ms: papers.chain().not_after_unix_ms(),
            };
            return Err((CloseCode::Expired, refusal.code(), refusal.to_string()));
        }
        self.tls
            .revocation()
            .check(papers.keys(), now_unix_ms)
            .map(|_| ())
            .map_err(|error| (revocation_code(&error), error.code(), error.to_string()))
    }

    /// Closes exactly the sessions whose papers do not hold any more. Gives how many.
    fn close_failing(
        &self,
        judge: impl Fn(&VerifiedPeer) -> Result<(), (CloseCode, &'static str, String)>,
    ) -> usize {
        let registry = lock(&self.registry);
        let failing = registry.failing(judge);
        for (session, (code, word, reason)) in &failing {
            if let Some(entry) = registry.get(*session) {
                entry.handle.close(*code, &format!("{word}: {reason}"));
            }
        }
        failing.len()
    }

    fn close_revoked(&self) -> usize {
        self.close_failing(|papers| self.judge(papers))
    }

    fn closed_because(&self) -> Option<String> {
        lock(&self.gate).reason().cloned()
    }

    /// Changes the gate and does what follows from it.
    fn set_gate(&self, change: impl FnOnce(&mut Gate)) {
        let mut gate = lock(&self.gate);
        let before = gate.reason().cloned();
        change(&mut gate);
        let after = gate.reason().cloned();
        drop(gate);
        match (before, after) {
            (None, Some(reason)) => {
                lock(&self.dialer).set_enabled(false, self.now());
                for (_, entry) in lock(&self.registry).iter() {
                    entry.handle.close(CloseCode::Disabled, &reason);
                }
                self.event(MeshEvent::TransportClosed { reason });
            }
            (Some(_), None) => {
                lock(&self.dialer).set_enabled(true, self.now());
                self.dial_wake.notify_one();
                self.event(MeshEvent::TransportOpened);
            }
            _ => {}
        }
    }

    /// Judges the node's own papers as a peer would (ruling 12).
    fn check_own_papers(&self) {
        let fault = self
            .tls
            .own_status()
            .err()
            .map(|refusal| format!("{}: {refusal}", refusal.code()));
        self.set_gate(|gate| gate.own_papers = fault);
    }

    /// Settings for a call that comes from where the configuration has a peer: nodes call from the
    /// port that they listen on. An address only picks a congestion control and its start; who it is
    /// the certificate says. None: the node's own settings.
    fn server_config(&self, incoming: &Incoming) -> Option<Arc<ServerConfig>> {
        let peer = self.peers_at.get(&canonical(incoming.remote_address()))?;
        let congestion = self.config.congestion_of_peers.get(peer).copied();
        let config = self
            .config
            .quic
            .server(&self.tls, congestion, self.paths.get(peer));
        config.ok().map(Arc::new)
    }

    /// The end of a session, in the registry, the claims and the dialler.
    fn session_over(
        self: &Arc<Self>,
        session: SessionId,
        peer: &NodeId,
        address: SocketAddr,
        outbound: bool,
        ended: &Ended,
    ) {
        let mut registry = lock(&self.registry);
        let packets = registry
            .remove(session)
            .map(|entry| outlook::Packets::of(&entry.handle.connection))
            .unwrap_or_default();
        let connected = registry.established(peer).is_some();
        drop(registry);
        let released = lock(&self.claims).release_session(session);
        for id in self.assemblies.of(session) {
            self.leave_assembly(session, &id);
        }
        self.released(Some(session), &released);
        let now = self.now();
        let jitter = self.jitter();
        let mut dialer = lock(&self.dialer);
        let misbehaved = matches!(
            ended.code,
            Some(CloseCode::Protocol | CloseCode::Faults | CloseCode::Limit)
        );
        if misbehaved && !ended.by_peer {
            dialer.cool_down(peer, now);
        }
        if !connected {
            if ended.established {
                dialer.on_closed(peer, now, jitter);
            } else if outbound {
                dialer.on_failed(peer, now, jitter);
            }
        }
        drop(dialer);
        self.dial_wake.notify_one();
        self.counted(peer, |stats| {
            stats.last_end = Some((ended.clone(), now));
            stats.packets.add(packets);
        });
        self.event(MeshEvent::SessionDown {
            peer: peer.clone(),
            address,
            code: ended.code,
            reason: ended.reason.clone(),
            by_peer: ended.by_peer,
            established: ended.established,
        });
        self.sessions_over.notify_waiters();
    }
}

/// The mesh; see the module.
#[derive(Debug)]
pub struct Mesh;

/// An endpoint, and its socket where that is this machine's.
type Opened = (Endpoint, Option<Arc<dyn AsyncUdpSocket>>);

impl Mesh {
    /// Binds the socket and starts accepting and dialling. Must be called within a tokio runtime
    /// with time and I/O.
    ///
    /// Papers that are no good (expired, revoked, without CRL) are no error: the transport stays
    /// closed with that reason until they are mended (ruling 12).
    ///
    /// # Errors
    /// A setting that makes no sense, or an address that cannot be had.
    pub fn start(
        config: MeshConfig,
        tls: Arc<MeshTls>,
        hooks: Arc<dyn MeshHooks>,
        clock: MonotonicClock,
    ) -> Result<MeshHandle, MeshError> {
        Self::start_with(config, tls, hooks, clock, |config, tls, clock| {
            let server = config.quic.server(tls, None, None)?;
            let socket = config.quic.socket(config.listen, clock)?;
            let endpoint = config.quic.quinn_on(Arc::clone(&socket), Some(server))?;
            Ok((endpoint, Some(socket)))
        })
    }

    /// [`Mesh::start`] on an endpoint that was opened before, with [`QuicConfig::open_on`]: for
    /// sockets that are not this machine's, as a simulation has them.
    ///
    /// # Errors
    /// As there.
    pub fn start_on(
        endpoint: Endpoint,
        config: MeshConfig,
        tls: Arc<MeshTls>,
        hooks: Arc<dyn MeshHooks>,
        clock: MonotonicClock,
    ) -> Result<MeshHandle, MeshError> {
        Self::start_with(config, tls, hooks, clock, |_, _, _| Ok((endpoint, None)))
    }

    /// Opens the endpoint when nothing else can be wrong any more: a closed one keeps its port for a
    /// moment.
    fn start_with(
        config: MeshConfig,
        tls: Arc<MeshTls>,
        hooks: Arc<dyn MeshHooks>,
        clock: MonotonicClock,
        open: impl FnOnce(&MeshConfig, &MeshTls, &MonotonicClock) -> Result<Opened, MeshError>,
    ) -> Result<MeshHandle, MeshError> {
        config.check()?;
        tokio::runtime::Handle::try_current().map_err(|_| MeshError::Start {
            kind: io::ErrorKind::Unsupported,
        })?;
        let local = tls.node_id().clone();
        let domain = tls.rules().domain.clone();
        let pace = DialConfig {
            discovery: config.beacon.is_some(),
            ..config.dial
        };
        let dialer = Dialer::new(&local, pace, config.peers.clone(), clock.elapsed())?;
        let quotas = Quotas::new(&config.quotas, &clock)?;
        for (peer, quota) in &config.own_quotas {
            quotas.set(peer, Some(*quota))?;
        }
        for (peer, debt) in &config.owed {
            quotas.owes(peer, debt);
        }
        let seed = match config.jitter_seed {
            Some(seed) => seed,
            None => random_seed()?,
        };
        let (endpoint, socket) = open(&config, &tls, &clock)?;
        let (events, taken) = std_mpsc::sync_channel(EVENTS);
        let paths = config
            .peers
            .iter()
            .map(|peer| (peer.node_id.clone(), PathMemory::default()))
            .collect();
        let peers_at = config
            .peers
            .iter()
            .flat_map(|peer| {
                let id = &peer.node_id;
                peer.addresses.iter().map(|at| (canonical(*at), id.clone()))
            })
            .collect();
        let shared = Arc::new(Shared {
            paths,
            peers_at,
            claims: Mutex::new(Claims::new(
                config.receive_memory_bytes,
                config.session.stall_timeout,
            )),
            assemblies: Assemblies::new(config.session.stall_timeout),
            config,
            tls,
            hooks: Arc::clone(&hooks),
            clock,
            local,
            domain,
            endpoint,
            socket,
            quotas,
            registry: Mutex::default(),
            dialer: Mutex::new(dialer),
            dial_wake: Notify::new(),
            jitter: Mutex::new(seed),
            silences: Mutex::default(),
            gate: Mutex::default(),
            stats: Mutex::default(),
            refusals: Mutex::default(),
            events,
            events_lost: AtomicU64::new(0),
            stored: Mutex::default(),
            beacon: Mutex::default(),
            great_sends: Arc::new(Semaphore::new(MAX_GREAT_SENDS_KIB)),
            stopping: watch::Sender::new(false),
            sessions_over: Notify::new(),
        });
        // Ends when the last sender is gone, that is with `Shared`.
        std::thread::Builder::new()
            .name("mesh-events".to_owned())
            .spawn(move || taken.iter().for_each(|event| hooks.event(event)))
            .map_err(|error| MeshError::Start { kind: error.kind() })?;
        shared.watch_configured();
        shared.check_own_papers();
        tokio::spawn(door::accept_all(Arc::clone(&shared)));
        tokio::spawn(dial_all(Arc::clone(&shared)));
        tokio::spawn(keep_house(Arc::clone(&shared)));
        if let Some(beacon) = shared.config.beacon.clone() {
            let beacons = beacon.beacons(&shared)?;
            tokio::spawn(discovery::run(Arc::clone(&shared), beacon, beacons));
        }
        Ok(MeshHandle { shared })
    }
}

fn random_seed() -> Result<u64, MeshError> {
    let mut seed = [0; 8];
    aws_lc_rs::rand::fill(&mut seed).map_err(|_| MeshError::Start {
        kind: io::ErrorKind::Other,
    })?;
    Ok(u64::from_le_bytes(seed))
}

async fn stopped(shared: &Shared) {
    let mut stopping = shared.stopping.subscribe();
    // An error means that `Shared` is gone, which is the same.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// An address in its one form: IPv4 as such, without what only IPv6 routing wants.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

// ---- Whom to call ----

async fn dial_all(shared: Arc<Shared>) {
    // Dials at once, so that a thousand dark peers do not cost a thousand handshakes of memory.
    let dials = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(permit) = Arc::clone(&dials).acquire_owned().await else {
            break;
        };
        let (dial, next) = {
            let mut dialer = lock(&shared.dialer);
            (dialer.poll_dial(shared.now()), dialer.poll_timeout())
        };
        if let Some(dial) = dial {
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                dial_one(shared, dial).await;
                drop(permit);
            });
            continue;
        }
        drop(permit);
        let wake = async {
            match next {
                Some(at) => tokio::time::sleep_until(shared.instant(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = wake => {}
            () = shared.dial_wake.notified() => {}
            () = stopped(&shared) => break,
        }
    }
}

async fn dial_one(shared: Arc<Shared>, dial: Dial) {
    let Dial { peer, address } = dial;
    let timeout = shared.config.quic.handshake_timeout;
    let config = shared.config.quic.client(
        &shared.tls,
        &peer,
        shared.config.congestion_of_peers.get(&peer).copied(),
        shared.paths.get(&peer),
    );
    let connected = match config {
        Err(error) => Err(error.to_string()),
        Ok(config) => match shared.endpoint.connect_with(config, address, SERVER_NAME) {
            Err(error) => Err(error.to_string()),
            Ok(connecting) => match tokio::time::timeout(timeout, connecting).await {
                Ok(connected) => connected.map_err(|error| Ended::from_connection(&error).reason),
                Err(_) => Err("no answer in time".to_owned()),
            },
        },
    };
    match connected {
        Ok(connection) => {
            // The session outlives the dial, and the dial's permit must not wait for it.
            tokio::spawn(async move {
                let ended = driver::run(Arc::clone(&shared), connection, true).await;
                // What ended before the registry knew of it has not told the dialler yet.
                if !ended.registered {
                    let jitter = shared.jitter();
                    lock(&shared.dialer).on_failed(&peer, shared.now(), jitter);
                    shared.dial_wake.notify_one();
                    let reason = ended.reason;
                    shared.event(MeshEvent::DialFailed {
                        peer,
                        address,
                        reason,
                    });
                }
            });
        }
        Err(reason) => {
            let jitter = shared.jitter();
            lock(&shared.dialer).on_failed(&peer, shared.now(), jitter);
            shared.dial_wake.notify_one();
            shared.event(MeshEvent::DialFailed {
                peer,
                address,
                reason,
            });
        }
    }
}

// ---- What time brings ----

async fn keep_house(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(shared.config.recheck_interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut flushed = shared.now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopped(&shared) => break,
        }
        // notAfter and nextUpdate pass by themselves.
        shared.close_revoked();
        // Ranges that a peer sits on are asked of others that hold the segment.
        let mut overdue = lock(&shared.claims).overdue(shared.now());
        overdue.extend(shared.assemblies.contested(shared.now()));
        shared.released(None, &overdue.into_iter().collect::<Vec<_>>());
        let papers = Arc::clone(&shared);
        // A path is verified here, with signatures: not on a network thread.
        let _ = tokio::task::spawn_blocking(move || papers.check_own_papers()).await;
        shared.sample_lags();
        shared.sample_silences();
        let now = shared.now();
        if now.saturating_sub(flushed) >= REFUSAL_WINDOW {
            flushed = now;
            shared.quotas.retain_recent();
            let counts = {
                let mut refusals = lock(&shared.refusals);
                let (window, total) = &mut *refusals;
                total.closed += window.closed;
                total.address_quota += window.address_quota;
                total.busy += window.busy;
                total.handshake += window.handshake;
                std::mem::take(window)
            };
            if counts.total() > 0 {
                shared.event(MeshEvent::Refusals(counts));
            }
        }
        let lost = shared.events_lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            shared.event(MeshEvent::EventsLost { count: lost });
        }
    }
}

/// The node's hand on the mesh. Clones share it.
#[derive(Clone)]
pub struct MeshHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for MeshHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeshHandle")
            .field("node", &self.shared.local)
            .finish_non_exhaustive()
    }
}

impl MeshHandle {
    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.endpoint.local_addr()
    }

    /// The node stored something by itself: sealed, imported or restored. Segments of peers are
    /// announced by the mesh.
    pub fn notify_stored(&self, reference: &SegmentRef) {
        self.shared.announce(reference);
    }

    /// What a peer may cost.
    #[must_use]
    pub fn quota(&self, peer: &NodeId) -> PeerQuota {
        self.shared.quotas.quota(peer)
    }

    /// Gives a peer a quota of its own from now on, or the common one again. What it owes goes along;
    /// what waits for its quota asks again. The peer is told with the next session's Hello.
    ///
    /// # Errors
    /// A quota that makes no sense, or more than [`MAX_PEERS`] of them. Then nothing changes.
    pub fn set_quota(&self, peer: &NodeId, quota: Option<PeerQuota>) -> Result<(), MeshError> {
        self.shared.quotas.set(peer, quota)?;
        self.refresh();
        Ok(())
    }

    /// What every peer owes that owes anything, to be kept over a restart.
    #[must_use]
    pub fn owed(&self) -> BTreeMap<NodeId, PeerDebt> {
        self.shared.quotas.owed()
    }

    /// What the node lacks or takes has changed: room came free, segments were quarantined, a limit
    /// was changed. Every session compares again.
    pub fn refresh(&self) {
        for (_, entry) in lock(&self.shared.registry).iter() {
            entry.handle.mailbox.refresh();
        }
    }

    /// The CRLs changed: closes exactly the sessions that are revoked by it, before it returns.
    /// Gives how many.
    pub fn revocation_changed(&self) -> usize {
        let closed = self.shared.close_revoked();
        self.shared.check_own_papers();
        closed
    }

    /// Certificate, key or trust changed: judges every live session by the new trust, and dials
    /// whoever is not connected. Sessions that pass stay. Gives how many were closed.
    pub fn credentials_changed(&self) -> usize {
        let shared = &self.shared;
        shared.check_own_papers();
        let closed = shared.close_failing(|papers| {
            shared
                .tls
                .recheck(papers)
                .map_err(|refusal| (close_code(&refusal), refusal.code(), refusal.to_string()))
        });
        self.dial_now();
        closed
    }

    /// An operator wants everybody tried again at once: fills the budgets, ends cool-downs.
    pub fn dial_now(&self) {
        lock(&self.shared.dialer).on_operator(self.shared.now());
        self.shared.dial_wake.notify_one();
    }

    /// A link of this machine came up, or may carry by now: one immediate dial to whoever is not
    /// connected, rate-limited; a packet to whoever is being dialled or connected; and the end of
    /// sessions that have sent into the outage, for which it is called again a moment later.
    pub fn link_up(&self) {
        let shared = &self.shared;
        shared.close_unanswered();
        lock(&shared.dialer).on_link_up(shared.now());
        shared.dial_wake.notify_one();
        if let Some(socket) = &shared.socket {
            // The same socket: to quinn it is as if the own address had changed. Each connection pings,
            // and asks for a new connection id, so that the other side has something to send as well.
            // With the first acknowledgement either side knows what was lost.
            if let Err(error) = shared.endpoint.rebind_abstract(Arc::clone(socket)) {
                tracing::warn!(%error, "the sessions are not told that a link came up");
            }
        }
    }

    /// Opens or closes the transport. Closing ends every session with this reason; opening holds
    /// only if the node's own papers are good.
    pub fn set_enabled(&self, enabled: bool, reason: &str) {
        let reason = (!enabled).then(|| reason.to_owned());
        self.shared.set_gate(|gate| gate.by_operator = reason);
    }

    /// Why the transport is closed, if it is.
    #[must_use]
    pub fn closed_because(&self) -> Option<String> {
        self.shared.closed_because()
    }

    /// Refusals before authentication since the start.
    #[must_use]
    pub fn refusals(&self) -> RefusalCounts {
        let (window, total) = *lock(&self.shared.refusals);
        RefusalCounts {
            closed: window.closed + total.closed,
            address_quota: window.address_quota + total.address_quota,
            busy: window.busy + total.busy,
            handshake: window.handshake + total.handshake,
        }
    }

    /// Where things stand with every peer that is configured or was met, in order of their ids.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        let shared = &self.shared;
        let now = shared.now();
        let mut dials = BTreeMap::new();
        {
            let dialer = lock(&shared.dialer);
            for peer in dialer.peers() {
                dials.insert(peer.clone(), dialer.status(peer, now));
            }
        }
        let mut live = BTreeMap::new();
        for (_, entry) in lock(&shared.registry)
            .iter()
            .filter(|(_, entry)| entry.established && entry.handle.is_alive())
        {
            let handle = &entry.handle;
            let facts = (
                handle.address,
                entry.outbound,
                handle.since,
                handle.connection.clone(),
            );
            live.insert(entry.peer.clone(), facts);
        }
        let stored = *lock(&shared.stored);
        let stats = lock(&shared.stats);
        let names: std::collections::BTreeSet<&NodeId> = dials
            .keys()
            .chain(live.keys())
            .chain(stats.keys())
            .collect();
        let nothing = PeerStats::default();
        names
            .into_iter()
            .map(|peer| {
                let stats = stats.get(peer).unwrap_or(&nothing);
                let dial = dials.get(peer).copied().flatten();
                let live = live.get(peer);
                let until = |at: Duration| millis(at.saturating_sub(now));
                let mut packets = stats.packets;
                packets.add(
                    live.map(|(.., it)| outlook::Packets::of(it))
                        .unwrap_or_default(),
                );
                PeerStatus {
                    node_id: peer.clone(),
                    configured: dials.contains_key(peer),
                    connected: live.is_some(),
                    address: live.map(|(address, ..)| *address),
                    outbound: live.map(|(_, outbound, ..)| *outbound),
                    connected_ms: live.map(|(_, _, since, _)| millis(now.saturating_sub(*since))),
                    congestion: live
                        .and_then(|(.., it)| Congestion::of(it.congestion_state()))
                        .map(Congestion::name),
                    round_trip_us: live
                        .map(|(.., it)| u64::try_from(it.rtt().as_micros()).unwrap_or(u64::MAX)),
                    window_bytes: live.map(|(.., it)| it.congestion_state().window()),
                    posture: stats.hello.as_ref().map(|hello| hello.posture.as_str()),
                    custody_free_bytes: stats
                        .hello
                        .as_ref()
                        .map(|hello| hello.limits.custody_free_bytes),
                    announced: stats.hello.as_ref().map(|hello| hello.quota),
                    sessions: stats.sessions,
                    segments_in: stats.segments_in,
                    bytes_in: stats.bytes_in,
                    segments_out: stats.segments_out,
                    bytes_out: stats.bytes_out,
                    refused_in: stats.refused_in,
                    faults: stats.faults,
                    dials: dial.map_or(0, |dial| dial.dials),
                    next_dial_ms: dial.and_then(|dial| dial.next_dial).map(until),
                    budget_left: dial.map(|dial| dial.budget_left),
                    cooling_ms: dial.and_then(|dial| dial.cooling_until).map(until),
                    last_close: stats.last_end.as_ref().map(|(ended, at)| CloseStatus {
                        code: ended.code.map(CloseCode::as_str),
                        reason: ended.reason.clone(),
                        by_peer: ended.by_peer,
                        ago_ms: millis(now.saturating_sub(*at)),
                    }),
                    lag: stats.apart.now(stored),
                    lag_to_peer_ms: millis(now.saturating_sub(stats.apart.level_there)),
                    lag_from_peer_ms: millis(now.saturating_sub(stats.apart.level_here)),
                    sent_packets: packets.sent,
                    lost_packets: packets.lost,
                    lost_bytes: packets.lost_bytes,
                    quota: shared.quotas.debts(peer),
                }
            })
            .collect()
    }

    /// Says Bye to every peer and closes the socket, within the deadline. Gives whether all
    /// sessions were gone by then.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        let shared = &self.shared;
        shared.stopping.send_replace(true);
        let drained = tokio::time::timeout(deadline, async {
            loop {
                let over = shared.sessions_over.notified();
                if lock(&shared.registry).is_empty() {
                    break;
                }
                over.await;
            }
        })
        .await
        .is_ok();
        shared.endpoint.close(
            VarInt::from_u32(CloseCode::Normal as u32),
            b"the node stops",
        );
        // Until the closing packets have left. Waiting out the whole draining period of QUIC would
        // only answer late packets more politely.
        let _ = tokio::time::timeout(deadline.min(LINGER), shared.endpoint.wait_idle()).await;
        drained
    }
}
