//! The session machine: everything that two nodes say to each other, without a socket, a thread or
//! a clock.
//!
//! One [`SessionMachine`] is one side of one session. Whoever drives it hands in frames, the time
//! and a [`View`] of the node, and takes out frames to write, segments to fetch, segments to send
//! and events. The quinn shell drives it with sockets; the tests of this module drive several of
//! them in virtual time. Same inputs, same outputs, in the same order.
//!
//! The course of a session: both sides send Hello; each answers the other's with HelloAck; a side
//! that has received both is *established*. Then heads, if the digests in the Hellos differ; lists
//! of what a head offers and this node lacks; fetches in the order of INV-11; receipts. Whatever is
//! stored later, from anywhere, is offered at once as an incremental head.
//!
//! What it is not: it never sees a segment's bytes. Where to start: [`SessionMachine::handle_frame`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use tidelock_segments::{DomainId, Head, Kind, NodeId, Origin, SegmentId, SegmentRef, bao};

use crate::{
    frame::{
        Bye, ByteRange, CloseCode, Fetch, FetchRefusal, FetchRefused, Frame, FullHead, GetHead,
        HeadBody, HeadEntry, HeadTag, Heads, Hello, HelloAck, ListAsked, ListRefs, OriginRef,
        Receipt, ReceiptWant, RefEntry, RefList, Refs, WireLimits, bounded_reason,
    },
    limits::{
        HEADS_DELAY, HELLO_TIMEOUT, MAX_BULK_BYTES_IN_FLIGHT, MAX_BULK_SEGMENT_BYTES,
        MAX_EVENTS_QUEUED, MAX_FAULTS, MAX_FRAMES_QUEUED, MAX_HEADS_FRAMES_QUEUED,
        MAX_HEADS_OUTSTANDING, MAX_HEADS_PER_FRAME, MAX_IN_FLIGHT, MAX_LISTED_AHEAD,
        MAX_LISTS_OUTSTANDING, MAX_NEWEST_REFS, MAX_ORIGINS, MAX_RECEIPTS_PER_FRAME,
        MAX_REFS_OF_ONE_NUMBER, MAX_REFS_OUTSTANDING, MAX_REFS_PER_FRAME, MAX_SET_ASIDE,
        MAX_URGENT_SEGMENT_BYTES, MAX_WHOLE_BYTES, PROTOCOL_VERSION, RANGE_BYTES, RANGE_SLACK,
        RANGES_AT_FIRST, RANGES_AT_LEAST, REVOCATION_IN_FLIGHT, STALL_TIMEOUT, URGENT_IN_FLIGHT,
    },
};

mod outlook;
mod ranges;
#[cfg(test)]
mod tests;

pub use outlook::{Lag, Standing};
use ranges::Ranges;

/// What the machine may know of the node. Every answer comes from memory or one small read; the
/// shell calls the machine where blocking is allowed.
pub trait View {
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
    /// Whether anything of this origin is taken from a peer. Of the node's own logs: those whose
    /// segments it can tell to be its own, so that it gets back what it has lost.
    fn wants_origin(&self, origin: &Origin) -> bool;
    /// Numbers of an own log below this one were given up on purpose, and are not taken back.
    fn settled_below(&self, _origin: &Origin) -> u64 {
        0
    }
    /// Numbers of this origin of which another segment may be taken although one is held. Few.
    fn open_numbers(&self, _origin: &Origin) -> Vec<u64> {
        Vec::new()
    }
    /// Whether this segment is taken now: size, room, custody share.
    fn wants(&self, reference: &SegmentRef) -> bool;
    /// Own segments for which a receipt of this peer is still of use.
    fn receipt_wants(&self) -> Vec<SegmentId>;
    /// A receipt for a segment that is held in custody.
    fn receipt_for(&self, id: &SegmentId) -> Option<Vec<u8>>;
    /// Takes a receipt that this peer gave.
    ///
    /// # Errors
    /// The receipt does not verify, or could not be kept.
    fn take_receipt(&self, receipt: &[u8]) -> Result<(), Refusal>;
}

/// Whose fault it is that something was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer sent what it must not send: counts towards the end of the session.
    Peer,
    /// This node could not take it: offered again at the next contact.
    Local,
}

/// Why a segment or receipt was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// Stable word.
    pub code: &'static str,
    /// For a human.
    pub message: String,
    /// Whose fault.
    pub fault: Fault,
}

/// A set of segment kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KindSet(u8);

impl KindSet {
    /// Every kind.
    pub const ALL: Self = Self(0b1_1110);

    /// The set of these kinds.
    #[must_use]
    pub fn of(kinds: &[Kind]) -> Self {
        Self(kinds.iter().fold(0, |bits, kind| bits | Self::bit(*kind)))
    }

    /// Whether the set holds the kind.
    #[must_use]
    pub fn contains(self, kind: Kind) -> bool {
        self.0 & Self::bit(kind) != 0
    }

    fn bit(kind: Kind) -> u8 {
        1 << kind.number()
    }
}

/// What a node takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Kinds that it keeps.
    pub kinds: KindSet,
    /// Biggest segment.
    pub max_segment_bytes: u64,
    /// Bytes of other nodes' audit that it still takes.
    pub custody_free_bytes: u64,
    /// Fetches that it answers at once.
    pub max_in_flight: u16,
}

/// What a node grants the peer that it speaks to, as of the beginning of the session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct AnnouncedQuota {
    /// Control frames that it reads from the peer in a second.
    pub frames_per_second: u32,
    /// Bytes of witness and audit that it takes from the peer in a second.
    pub in_bytes_per_second: u64,
    /// Bytes of witness and audit that it still takes from the peer in the running day.
    pub in_bytes_left_today: u64,
    /// Bytes that it sends to the peer in a second.
    pub out_bytes_per_second: u64,
}

/// A node's posture as it tells its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PeerPosture {
    /// Everything is in order.
    Normal = 0,
    /// The policy is getting old.
    Stale = 1,
    /// Some classes of action are denied.
    Restricted = 2,
    /// All are.
    Closed = 3,
}

impl PeerPosture {
    /// The posture with this number.
    #[must_use]
    pub fn from_wire(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Normal),
            1 => Some(Self::Stale),
            2 => Some(Self::Restricted),
            3 => Some(Self::Closed),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Stale => "stale",
            Self::Restricted => "restricted",
            Self::Closed => "closed",
        }
    }
}

/// What this node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalHello {
    /// Its domain.
    pub domain: DomainId,
    /// Its id.
    pub node_id: NodeId,
    /// What it takes.
    pub limits: PeerLimits,
    /// What it grants this peer.
    pub quota: AnnouncedQuota,
    /// Its posture.
    pub posture: PeerPosture,
    /// Encoded endorsement of its log key.
    pub endorsement: Option<Vec<u8>>,
}

/// What the peer said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerHello {
    /// Its id; the one of its certificate.
    pub node_id: NodeId,
    /// What it takes.
    pub limits: PeerLimits,
    /// What it grants this node.
    pub quota: AnnouncedQuota,
    /// Its posture.
    pub posture: PeerPosture,
    /// Encoded endorsement of its log key. Not judged here.
    pub endorsement: Option<Vec<u8>>,
}

/// Bounds of one session; the defaults are the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionConfig {
    /// Fetches in flight.
    pub max_in_flight: u16,
    /// Bytes of bulk segments in flight.
    pub bulk_bytes_in_flight: u64,
    /// Bad transfers that end the session.
    pub faults_max: u32,
    /// Time for the Hello round trip.
    pub hello_timeout: Duration,
    /// Time that a peer may owe an answer in silence.
    pub stall_timeout: Duration,
    /// Time that news of bulk kinds waits for more.
    pub heads_delay: Duration,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            max_in_flight: MAX_IN_FLIGHT,
            bulk_bytes_in_flight: MAX_BULK_BYTES_IN_FLIGHT,
            faults_max: MAX_FAULTS,
            hello_timeout: HELLO_TIMEOUT,
            stall_timeout: STALL_TIMEOUT,
            heads_delay: HEADS_DELAY,
        }
    }
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("session closed, {}: {reason}", code.as_str())]
pub struct SessionClose {
    /// Why.
    pub code: CloseCode,
    /// For a human.
    pub reason: String,
    /// Whether the peer said it.
    pub by_peer: bool,
}

/// What a session has to tell the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// The peer's Hello was accepted.
    Hello(PeerHello),
    /// The Hello round trip is complete on this side: the peer counts as authenticated.
    Established,
    /// The peer's log of this origin differs from ours at the same place. Full heads, so evidence.
    ForkSuspected {
        /// The log.
        origin: Origin,
        /// Highest sequence number of both.
        sequence: u64,
        /// The segment held here.
        ours: SegmentId,
        /// The segment held there.
        theirs: SegmentId,
    },
    /// A segment was not taken.
    TransferFailed {
        /// The segment.
        reference: SegmentRef,
        /// Why.
        refusal: Refusal,
    },
    /// The peer does not send a segment that it listed.
    FetchRefused {
        /// The segment.
        reference: SegmentRef,
        /// Why.
        code: FetchRefusal,
    },
    /// A receipt was taken.
    ReceiptTaken {
        /// The segment.
        id: SegmentId,
    },
    /// A receipt was not taken.
    ReceiptRefused {
        /// The segment.
        id: SegmentId,
        /// Why.
        refusal: Refusal,
    },
}

/// A segment, or a range of one, that the peer asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serve {
    /// The segment.
    pub reference: SegmentRef,
    /// Which of its bytes; none for all of them in one piece.
    pub range: Option<Range<u64>>,
}

impl Serve {
    /// What tells it from others of the same segment.
    #[must_use]
    pub fn key(&self) -> ServeKey {
        let from = self.range.as_ref().map(|range| range.start);
        (self.reference.id, from)
    }
}

/// A segment and where the range of it begins that was asked for, if it was a range.
pub type ServeKey = (SegmentId, Option<u64>);

/// What became of asking for a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// It was asked for and is the only one of its segment in flight here.
    First,
    /// It was asked for, beside others.
    More,
    /// It cannot be asked for yet.
    NotNow,
}

/// What to do with a slice that a peer announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeSlice {
    /// Verify and write it.
    Write,
    /// Read over it: the segment was given up after the range had been asked for.
    Discard,
}

impl From<&SegmentRef> for RefEntry {
    fn from(held: &SegmentRef) -> Self {
        Self {
            id: *held.id.as_bytes(),
            sequence: held.sequence,
            size_bytes: held.size_bytes,
            prev: held.prev.map(|prev| *prev.as_bytes()),
        }
    }
}

/// Whether a kind never waits for room or for bulk: revocation and policy (ruling 10).
pub(crate) fn is_urgent(kind: Kind) -> bool {
    kind <= Kind::Policy
}

/// What a head of an urgent kind says of its highest number: a round trip less for a CRL (ruling 10).
fn newest_refs(head: &Head, view: &dyn View) -> Vec<RefEntry> {
    let Some((_, top)) = head.ranges.last().filter(|_| is_urgent(head.origin.kind())) else {
        return Vec::new();
    };
    let held = view.refs(&head.origin, *top, *top, MAX_NEWEST_REFS + 1);
    if held.len() > MAX_NEWEST_REFS {
        return Vec::new();
    }
    held.iter().map(RefEntry::from).collect()
}

/// One page of what is held.
fn list_of(name: &Origin, asked: &ListAsked, view: &dyn View) -> RefList {
    let max = usize::from(asked.max);
    // A page is never cut between two segments of one number (conflicting lists of a CA, a
    // policy with one more signature), because the next page begins at the next number.
    let most = ListRefs::answer_refs(asked.max);
    let mut held = view.refs(name, asked.from, asked.to, most);
    let all = held.len() < most;
    let same = |at: usize| match (held.get(at.wrapping_sub(1)), held.get(at)) {
        (Some(before), Some(next)) => before.sequence == next.sequence,
        _ => false,
    };
    let cut = (max..most)
        .find(|at| !same(*at))
        .unwrap_or(most)
        .min(held.len());
    let done = (all && cut == held.len())
        || held
            .get(cut.wrapping_sub(1))
            .is_some_and(|last| last.sequence >= asked.to);
    held.truncate(cut);
    RefList {
        origin: asked.origin,
        refs: held.iter().map(RefEntry::from).collect(),
        done,
    }
}

/// Whether a segment is fetched in ranges: a bulk one above [`MAX_WHOLE_BYTES`]. Revocation and policy
/// go in one piece, because they never wait for room (ruling 10), and what comes back of this node's
/// own log (ruling 8), because it is the log that takes it and not the store.
#[must_use]
pub fn is_ranged(reference: &SegmentRef, local: &NodeId) -> bool {
    !is_urgent(reference.kind)
        && reference.size_bytes > MAX_WHOLE_BYTES
        && reference.origin.audit_node() != Some(local.as_str())
}

/// INV-11: urgency, then age, then the name of the log.
type WantKey = (Kind, u64, Origin, SegmentId);

/// Where a list stands in the same order.
type ListKey = (Kind, u64, Origin);

/// In the order of a segment's way here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Waits for its turn.
    Queued,
    /// Another session of this node fetches it.
    Deferred,
    /// Asked for; no byte yet.
    Requested,
    /// Bytes arrive.
    Receiving,
    /// All bytes are here, the node looks at them.
    Admitting,
}

impl Stage {
    fn is_in_flight(self) -> bool {
        matches!(self, Self::Requested | Self::Receiving | Self::Admitting)
    }

    fn is_owed(self) -> bool {
        matches!(self, Self::Requested | Self::Receiving)
    }
}

/// A segment that comes in ranges is `Queued` while there is a range to ask for and `Deferred` while
/// there is none; its ranges in flight are [`Part`]s.
#[derive(Debug)]
struct Known {
    reference: SegmentRef,
    stage: Stage,
}

/// A range in flight.
#[derive(Debug)]
struct Part {
    to: u64,
    kind: Kind,
    slice_bytes: u64,
    stage: Stage,
    asked: Duration,
    /// The segment was given up meanwhile: what arrives is read over.
    is_abandoned: bool,
}

/// How many ranges are worth asking for before the first has come. What is on its way is what a kill
/// or a cut costs, and what waits behind others at the peer comes no sooner for it: so many that a
/// range begins to arrive within three times the shortest time that one took, plus [`RANGE_SLACK`].
/// Two keep a link busy on which a range takes longer than a round trip.
#[derive(Debug)]
struct Window {
    ranges: usize,
    shortest: Duration,
}

impl Window {
    fn new() -> Self {
        Self {
            ranges: RANGES_AT_FIRST,
            shortest: Duration::MAX,
        }
    }

    /// A range begins to arrive, so long after it was asked for.
    fn arrived(&mut self, waited: Duration) {
        self.shortest = self.shortest.min(waited);
        let bound = self.shortest.saturating_mul(3).saturating_add(RANGE_SLACK);
        self.ranges = if waited <= bound {
            (self.ranges + 1).min(usize::from(MAX_IN_FLIGHT - URGENT_IN_FLIGHT))
        } else {
            self.ranges.saturating_sub(1).max(RANGES_AT_LEAST)
        };
    }
}

/// What the peer said of one origin.
#[derive(Debug, Default)]
struct PeerOrigin {
    /// The peer's number, unless the origin is known from an equal digest only.
    index: Option<u32>,
    /// The digest of its last head.
    tag: Option<HeadTag>,
    /// What it holds.
    ranges: Ranges,
    /// Of that, what was listed in this session.
    listed: Ranges,
    /// What is still to be listed.
    missing: Ranges,
    /// A list of it was asked for and has not come.
    is_asked: bool,
    /// Wants of this origin that wait for their turn.
    queued: usize,
}

#[derive(Debug)]
enum Phase {
    /// Hello sent. Holds its digest and the heads that it was made from.
    Greeting {
        heads: Vec<Head>,
        digest: [u8; 32],
        hello: Option<Box<PeerHello>>,
        their_digest: [u8; 32],
        /// Something of it was lost since, or may be taken only now.
        is_outdated: bool,
    },
    Established,
    Closed(SessionClose),
}

/// One side of one session.
#[derive(Debug)]
pub struct SessionMachine {
    config: SessionConfig,
    local: LocalHello,
    peer: NodeId,
    key: [u8; 32],
    started: Duration,
    phase: Phase,
    peer_limits: PeerLimits,
    out: VecDeque<Frame>,
    events: VecDeque<SessionEvent>,

    // What we offer.
    my_origins: BTreeMap<Origin, u32>,
    my_names: Vec<Origin>,
    dirty: BTreeSet<(Kind, Origin)>,
    heads_due: Option<Duration>,
    /// Own logs that are not offered before the peer's heads of them were compared (ruling 8).
    held_back: BTreeSet<(Kind, Origin)>,
    /// All heads of the peer were seen once.
    heads_complete: bool,
    /// Own logs of which the peer holds a later part, or another one.
    own_behind: BTreeSet<Origin>,
    own_open: bool,
    /// Whether the last frame of heads promised another.
    heads_promised: bool,

    // What they offer.
    origins: BTreeMap<Origin, PeerOrigin>,
    their_names: Vec<Origin>,
    more_heads: Option<Kind>,
    open_lists: BTreeSet<ListKey>,
    /// The frames that are out, oldest first, each with its lists in their order.
    lists_asked: VecDeque<Vec<(Origin, ListAsked)>>,
    /// References that they ask for.
    refs_asked: usize,
    heads_asked: BTreeSet<Origin>,

    // What we want.
    known: BTreeMap<SegmentId, Known>,
    /// By segment and first byte.
    parts: BTreeMap<(SegmentId, u64), Part>,
    window: Window,
    queue: BTreeSet<WantKey>,
    in_flight: u16,
    owed: usize,
    bulk_bytes: u64,
    hold_urgent: Option<Duration>,
    hold_bulk: Option<Duration>,
    set_aside: BTreeMap<SegmentId, Fault>,
    faults: u32,
    last_progress: Duration,

    // What they want.
    serving: BTreeSet<ServeKey>,
    to_serve: VecDeque<Serve>,

    // Receipts.
    receipts_asked: BTreeSet<SegmentId>,
    receipts_answered: BTreeSet<SegmentId>,
}

/// Keyed digest of a full head (ruling 6). Domain-separated from the digest of all heads. Of a CA's
/// lists all of the highest number count, because the union of conflicting ones holds (ruling 5): the
/// id of one would hide that another is lacking.
fn head_hash(key: &[u8; 32], head: &Head, view: &dyn View) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(b"head\0");
    let name = head.origin.as_str().as_bytes();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name);
    hasher.update(&(head.ranges.len() as u64).to_le_bytes());
    for (from, to) in &head.ranges {
        hasher.update(&from.to_le_bytes());
        hasher.update(&to.to_le_bytes());
    }
    match head.ranges.last() {
        Some((_, top)) if head.origin.kind() == Kind::Revocation => {
            for held in view.refs(&head.origin, *top, *top, MAX_REFS_PER_FRAME) {
                hasher.update(held.id.as_bytes());
            }
        }
        _ => {
            hasher.update(head.last_id.as_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

fn head_tag(key: &[u8; 32], head: &Head, view: &dyn View) -> HeadTag {
    let mut tag = HeadTag::default();
    for (to, from) in tag.iter_mut().zip(head_hash(key, head, view)) {
        *to = from;
    }
    tag
}

fn state_digest(key: &[u8; 32], heads: &[Head], view: &dyn View) -> [u8; 32] {
    let sorted: BTreeMap<&Origin, &Head> = heads.iter().map(|head| (&head.origin, head)).collect();
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(b"state\0");
    for head in sorted.values() {
        hasher.update(&head_hash(key, head, view));
    }
    *hasher.finalize().as_bytes()
}

impl SessionMachine {
    /// A session with the node that the certificate names. `key` comes from the TLS exporter, so
    /// both sides have the same and nobody else has it.
    #[must_use]
    pub fn new(
        config: SessionConfig,
        local: LocalHello,
        peer: NodeId,
        key: [u8; 32],
        now: Duration,
        view: &dyn View,
    ) -> Self {
        let heads = view.heads();
        let digest = state_digest(&key, &heads, view);
        let hello = Frame::Hello(Box::new(Hello {
            version: PROTOCOL_VERSION,
            domain: local.domain.as_str().to_owned(),
            node_id: local.node_id.as_str().to_owned(),
            limits: WireLimits {
                kinds: local.limits.kinds.0,
                max_segment_bytes: local.limits.max_segment_bytes,
                custody_free_bytes: local.limits.custody_free_bytes,
                max_in_flight: local.limits.max_in_flight,
            },
            posture: local.posture as u8,
            endorsement: local.endorsement.clone(),
            state_digest: digest,
        }));
        let nothing = PeerLimits {
            kinds: KindSet(0),
            max_segment_bytes: 0,
            custody_free_bytes: 0,
            max_in_flight: 0,
        };
        Self {
            config,
            local,
            peer,
            key,
            started: now,
            phase: Phase::Greeting {
                heads,
                digest,
                hello: None,
                their_digest: [0; 32],
                is_outdated: false,
            },
            peer_limits: nothing,
            out: VecDeque::from([hello]),
            events: VecDeque::new(),
            my_origins: BTreeMap::new(),
            my_names: Vec::new(),
            dirty: BTreeSet::new(),
            heads_due: None,
            held_back: BTreeSet::new(),
            heads_complete: false,
            own_behind: BTreeSet::new(),
            own_open: false,
            heads_promised: false,
            origins: BTreeMap::new(),
            their_names: Vec::new(),
            more_heads: None,
            open_lists: BTreeSet::new(),
            lists_asked: VecDeque::new(),
            refs_asked: 0,
            heads_asked: BTreeSet::new(),
            known: BTreeMap::new(),
            parts: BTreeMap::new(),
            window: Window::new(),
            queue: BTreeSet::new(),
            in_flight: 0,
            owed: 0,
            bulk_bytes: 0,
            hold_urgent: None,
            hold_bulk: None,
            set_aside: BTreeMap::new(),
            faults: 0,
            last_progress: now,
            serving: BTreeSet::new(),
            to_serve: VecDeque::new(),
            receipts_asked: BTreeSet::new(),
            receipts_answered: BTreeSet::new(),
        }
    }

    /// Whether the Hello round trip is complete on this side.
    #[must_use]
    pub fn is_established(&self) -> bool {
        matches!(self.phase, Phase::Established)
    }

    /// How the session ended, if it did.
    #[must_use]
    pub fn closed(&self) -> Option<&SessionClose> {
        match &self.phase {
            Phase::Closed(close) => Some(close),
            _ => None,
        }
    }

    /// Bad transfers so far.
    #[must_use]
    pub fn faults(&self) -> u32 {
        self.faults
    }

    /// Segments that are known to be lacking here and held there.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.known.len()
    }

    /// Whether a segment is lacking here and held there.
    #[must_use]
    pub fn is_wanted(&self, id: &SegmentId) -> bool {
        self.known.contains_key(id)
    }

    /// Takes one frame of the control stream.
    pub fn handle_frame(&mut self, frame: Frame, now: Duration, view: &dyn View) {
        if self.closed().is_some() {
            return;
        }
        self.last_progress = now;
        match (frame, self.is_established()) {
            (Frame::Bye(bye), _) => self.on_bye(&bye),
            (Frame::Hello(hello), false) => self.on_hello(&hello),
            (Frame::HelloAck(granted), false) => self.on_hello_ack(granted, now, view),
            (Frame::Heads(heads), true) => self.on_heads(heads, view),
            (Frame::AskHeads, true) => self.offer_all(now, view),
            (Frame::GetHead(get), true) => self.on_get_head(get, view),
            (Frame::FullHead(head), true) => self.on_full_head(&head, view),
            (Frame::ListRefs(asked), true) => self.on_list_refs(&asked, view),
            (Frame::Refs(refs), true) => self.on_refs(&refs, view),
            (Frame::Fetch(fetch), true) => self.on_fetch(fetch, view),
            (Frame::FetchRefused(refused), true) => self.on_fetch_refused(refused),
            (Frame::ReceiptWant(want), true) => self.on_receipt_want(&want, view),
            (Frame::Receipt(receipt), true) => self.on_receipt(&receipt, view),
            (frame, established) => {
                let when = if established { "after" } else { "before" };
                let frame = frame.frame_type();
                self.close(
                    CloseCode::Protocol,
                    &format!("{frame:?} frame {when} the hello round trip"),
                );
            }
        }
        self.pump(now, view);
    }

    /// Something was stored on this node, from whatever side.
    pub fn handle_stored(&mut self, reference: &SegmentRef, now: Duration, view: &dyn View) {
        if self.closed().is_some() {
            return;
        }
        let waiting = self
            .known
            .get(&reference.id)
            .is_some_and(|known| !known.stage.is_in_flight());
        if waiting {
            self.forget(&reference.id);
            self.abandon_parts(&reference.id);
        }
        self.mark_dirty(reference.kind, reference.origin.clone(), now);
        if self.own_behind.contains(&reference.origin) {
            let ours = view.head(&reference.origin);
            self.compare(&reference.origin, ours.as_ref(), false, &[], view);
        }
        self.pump(now, view);
    }

    /// Another session of this node gave up a segment that this one deferred.
    pub fn handle_released(&mut self, id: &SegmentId, now: Duration, view: &dyn View) {
        let deferred = self
            .known
            .get(id)
            .is_some_and(|known| known.stage == Stage::Deferred);
        if !deferred {
            return;
        }
        if view.reference(id).is_some() {
            self.forget(id);
            self.abandon_parts(id);
        } else {
            self.set_stage(id, Stage::Queued);
        }
        self.pump(now, view);
    }

    /// What this node lacks or may take has changed in a way that single segments do not tell:
    /// room came free, segments were lost, or the shell could not keep up. Compares everything.
    pub fn refresh(&mut self, now: Duration, view: &dyn View) {
        if self.closed().is_some() {
            return;
        }
        self.offer_all(now, view);
        if let Phase::Greeting { is_outdated, .. } = &mut self.phase {
            *is_outdated = true;
            return;
        }
        self.start_waiting(now);
        let held: Vec<SegmentId> = self
            .known
            .iter()
            .filter(|(id, known)| !known.stage.is_in_flight() && view.reference(id).is_some())
            .map(|(id, _)| *id)
            .collect();
        for id in held {
            self.forget(&id);
            self.abandon_parts(&id);
        }
        // A quota may have changed; what is still spent holds again.
        (self.hold_urgent, self.hold_bulk) = (None, None);
        // INV-12: a segment that the peer spoilt stays aside; one without room is asked again.
        self.set_aside.retain(|_, fault| *fault == Fault::Peer);
        let mine: BTreeMap<Origin, Head> = view
            .heads()
            .into_iter()
            .map(|head| (head.origin.clone(), head))
            .collect();
        let names: Vec<Origin> = self.origins.keys().cloned().collect();
        let mut unnamed = false;
        for name in names {
            if let Some(origin) = self.origins.get_mut(&name) {
                origin.listed = Ranges::default();
                unnamed |= origin.index.is_none()
                    && mine.get(&name).map(|head| head.ranges.as_slice())
                        != Some(origin.ranges.as_slice());
            }
            self.compare(&name, mine.get(&name), false, &[], view);
        }
        if unnamed {
            self.push(Frame::AskHeads);
        }
        self.receipts_answered.clear();
        self.ask_receipts(view);
        self.pump(now, view);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Duration, view: &dyn View) {
        match &self.phase {
            Phase::Closed(_) => return,
            Phase::Greeting { .. } if now >= self.started + self.config.hello_timeout => {
                self.close(CloseCode::HelloTimeout, "no hello round trip in time");
            }
            Phase::Established if self.owes() && now >= self.stall_deadline() => {
                self.close(CloseCode::Stalled, "peer owes an answer and sends nothing");
            }
            _ => {}
        }
        self.pump(now, view);
    }

    /// When [`handle_timeout`](Self::handle_timeout) or [`poll_want`](Self::poll_want) have
    /// something to do at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        let mut next: Option<Duration> = None;
        let mut at = |deadline: Duration| {
            next = Some(next.map_or(deadline, |earlier| earlier.min(deadline)));
        };
        match &self.phase {
            Phase::Closed(_) => {}
            Phase::Greeting { .. } => at(self.started + self.config.hello_timeout),
            Phase::Established => {
                if self.owes() {
                    at(self.stall_deadline());
                }
                if let Some(due) = self.heads_due
                    && self.out.len() < MAX_HEADS_FRAMES_QUEUED
                {
                    at(due);
                }
                if let Some(until) = self.queue.first().and_then(|(kind, ..)| self.hold(*kind)) {
                    at(until);
                }
            }
        }
        next
    }

    /// The next frame to write.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        self.out.pop_front()
    }

    /// Whether a frame waits.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        !self.out.is_empty()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    /// The next segment to send.
    pub fn poll_serve(&mut self) -> Option<Serve> {
        self.to_serve.pop_front()
    }

    /// A segment or range was sent, or its sending was given up together with its stream.
    pub fn handle_served(&mut self, key: &ServeKey) {
        self.serving.remove(key);
    }

    /// A segment or range cannot be sent.
    pub fn handle_unservable(&mut self, key: &ServeKey, code: FetchRefusal) {
        if self.serving.remove(key) {
            let (id, from) = key;
            self.push(Frame::FetchRefused(FetchRefused {
                id: *id.as_bytes(),
                from: *from,
                code: code as u16,
            }));
        }
    }

    /// The segment whose turn it is (INV-11), if one may be asked for now. The caller answers with
    /// [`fetch`](Self::fetch), for one that [`is_ranged`] with [`fetch_range`](Self::fetch_range), with
    /// [`defer`](Self::defer), [`hold_until`](Self::hold_until) or
    /// [`handle_failed`](Self::handle_failed), and asks again.
    #[must_use]
    pub fn poll_want(&self, now: Duration) -> Option<&SegmentRef> {
        if !self.is_established() {
            return None;
        }
        let (kind, sequence, origin, id) = self.queue.first()?;
        // INV-11: nothing overtakes what is not listed yet, so the order depends on what the peer
        // holds and not on how fast its lists arrive.
        if let Some((list_kind, cursor, list_origin)) = self.open_lists.first()
            && (kind, sequence, origin) >= (list_kind, cursor, list_origin)
        {
            return None;
        }
        if self
            .more_heads
            .is_some_and(|complete_below| *kind >= complete_below)
        {
            return None;
        }
        if self.hold(*kind).is_some_and(|until| now < until) {
            return None;
        }
        let reference = &self.known.get(id)?.reference;
        let ranged = is_ranged(reference, &self.local.node_id);
        let next_bytes = if ranged {
            RANGE_BYTES
        } else {
            reference.size_bytes
        };
        let limit = self
            .config
            .max_in_flight
            .min(self.peer_limits.max_in_flight)
            .max(1);
        // Ruling 10: neither a pipe full of audit nor bundles that are compiled stand before a CRL.
        let kept_free = match kind {
            Kind::Revocation => 0,
            Kind::Policy => REVOCATION_IN_FLIGHT,
            Kind::Witness | Kind::Audit => URGENT_IN_FLIGHT,
        };
        let free = self.in_flight < limit.saturating_sub(kept_free).max(1)
            && (is_urgent(*kind)
                || self.bulk_bytes == 0
                || self.bulk_bytes.saturating_add(next_bytes) <= self.config.bulk_bytes_in_flight);
        let free = free && (!ranged || self.parts.len() < self.window.ranges);
        free.then_some(reference)
    }

    /// Asks the peer for a wanted segment.
    pub fn fetch(&mut self, id: &SegmentId, now: Duration) {
        let queued = self
            .known
            .get(id)
            .is_some_and(|known| known.stage == Stage::Queued);
        if queued {
            self.start_waiting(now);
            self.set_stage(id, Stage::Requested);
            self.push(Frame::Fetch(Fetch {
                id: *id.as_bytes(),
                range: None,
            }));
            self.ask_lists(now);
        }
    }

    /// Whether a range may be asked for now. One that was given up while it was on its way has to come
    /// and be read over before that.
    #[must_use]
    pub fn may_fetch_range(&self, id: &SegmentId, range: &Range<u64>) -> bool {
        self.known.get(id).is_some_and(|known| {
            known.stage == Stage::Queued
                && bao::aligned(known.reference.size_bytes, range).as_ref() == Ok(range)
        }) && !self.parts.contains_key(&(*id, range.start))
    }

    /// Asks the peer for a range of a wanted segment, which stays wanted.
    pub fn fetch_range(&mut self, id: &SegmentId, range: &Range<u64>, now: Duration) -> Asked {
        let Some(known) = self.known.get(id) else {
            return Asked::NotNow;
        };
        let (kind, size_bytes) = (known.reference.kind, known.reference.size_bytes);
        let key = (*id, range.start);
        let Ok(slice_bytes) = bao::slice_len(size_bytes, range) else {
            return Asked::NotNow;
        };
        if !self.may_fetch_range(id, range) {
            return Asked::NotNow;
        }
        let asked = if self.parts_of(id).next().is_some() {
            Asked::More
        } else {
            Asked::First
        };
        self.start_waiting(now);
        self.in_flight += 1;
        self.owed += 1;
        self.bulk_bytes = self.bulk_bytes.saturating_add(range.end - range.start);
        self.parts.insert(
            key,
            Part {
                to: range.end,
                kind,
                slice_bytes,
                stage: Stage::Requested,
                asked: now,
                is_abandoned: false,
            },
        );
        self.push(Frame::Fetch(Fetch {
            id: *id.as_bytes(),
            range: Some(ByteRange {
                from: range.start,
                to: range.end,
            }),
        }));
        asked
    }

    fn parts_of(&self, id: &SegmentId) -> impl Iterator<Item = u64> {
        self.parts
            .range((*id, 0)..=(*id, u64::MAX))
            .map(|((_, from), _)| *from)
    }

    /// Takes a range out of the counts.
    fn end_part(&mut self, id: &SegmentId, from: u64) -> Option<Part> {
        let part = self.parts.remove(&(*id, from))?;
        self.in_flight = self.in_flight.saturating_sub(1);
        self.bulk_bytes = self.bulk_bytes.saturating_sub(part.to.saturating_sub(from));
        if part.stage.is_owed() {
            self.owed = self.owed.saturating_sub(1);
        }
        Some(part)
    }

    /// The ranges of a segment that nobody wants any more: what is here ends now, what is still to come
    /// is read over.
    fn abandon_parts(&mut self, id: &SegmentId) {
        let parts: Vec<u64> = self.parts_of(id).collect();
        for from in parts {
            match self.parts.get_mut(&(*id, from)) {
                Some(part) if part.stage.is_owed() => part.is_abandoned = true,
                _ => {
                    self.end_part(id, from);
                }
            }
        }
    }

    /// Leaves a wanted segment to another session of this node.
    pub fn defer(&mut self, id: &SegmentId) {
        let queued = self
            .known
            .get(id)
            .is_some_and(|known| known.stage == Stage::Queued);
        if queued {
            self.set_stage(id, Stage::Deferred);
        }
    }

    fn hold(&self, kind: Kind) -> Option<Duration> {
        if is_urgent(kind) {
            self.hold_urgent
        } else {
            self.hold_bulk
        }
    }

    /// A quota is spent: asks for nothing of this class until then (INV-13).
    pub fn hold_until(&mut self, kind: Kind, until: Duration) {
        if is_urgent(kind) {
            self.hold_urgent = Some(until);
        } else {
            self.hold_bulk = Some(until);
        }
    }

    /// The peer announces the bytes of a segment on the stream of this kind.
    ///
    /// # Errors
    /// It was not asked for, or is announced with another size. Its stream ends; the fault counts.
    pub fn handle_segment(
        &mut self,
        kind: Kind,
        id: &SegmentId,
        size_bytes: u64,
        now: Duration,
    ) -> Result<SegmentRef, Refusal> {
        self.last_progress = now;
        let refusal = |message: String| Refusal {
            code: "unexpected_segment",
            message,
            fault: Fault::Peer,
        };
        let refused = match self.known.get(id) {
            // INV-09: bytes are taken only for a fetch, and a fetch exists only after the Hello
            // round trip.
            Some(known) if known.stage == Stage::Requested => {
                if known.reference.size_bytes == size_bytes && known.reference.kind == kind {
                    let reference = known.reference.clone();
                    self.set_stage(id, Stage::Receiving);
                    return Ok(reference);
                }
                let announced = known.reference.size_bytes;
                refusal(format!(
                    "segment {id} of {size_bytes} bytes on the {kind} stream was listed with {announced}"
                ))
            }
            _ => {
                let refusal = refusal(format!("segment {id} was not asked for"));
                self.strike(&refusal);
                return Err(refusal);
            }
        };
        self.handle_failed(id, refused.clone(), now);
        Err(refused)
    }

    /// The peer announces the slice for a range on the stream of this kind.
    ///
    /// # Errors
    /// The range was not asked for, or is announced with another length. The stream ends; the fault
    /// counts.
    pub fn handle_slice(
        &mut self,
        kind: Kind,
        id: &SegmentId,
        range: &Range<u64>,
        slice_bytes: u64,
        now: Duration,
    ) -> Result<TakeSlice, Refusal> {
        self.last_progress = now;
        let refusal = |message: String| Refusal {
            code: "unexpected_slice",
            message,
            fault: Fault::Peer,
        };
        let Range { start, end } = *range;
        match self.parts.get_mut(&(*id, start)) {
            // INV-09, as for whole segments: bytes are taken only for a fetch.
            Some(part) if part.stage == Stage::Requested => {
                if (part.to, part.kind, part.slice_bytes) == (end, kind, slice_bytes) {
                    part.stage = Stage::Receiving;
                    self.window.arrived(now.saturating_sub(part.asked));
                    return Ok(if part.is_abandoned {
                        TakeSlice::Discard
                    } else {
                        TakeSlice::Write
                    });
                }
                let refused = refusal(format!(
                    "bytes {start} to {end} of segment {id} came in {slice_bytes} bytes on the {kind} stream, \
                     asked for were {} in {}",
                    part.to, part.slice_bytes
                ));
                self.end_part(id, start);
                self.handle_failed(id, refused.clone(), now);
                Err(refused)
            }
            _ => {
                let refused = refusal(format!(
                    "bytes {start} to {end} of segment {id} were not asked for"
                ));
                self.strike(&refused);
                Err(refused)
            }
        }
    }

    /// All bytes of a slice are here. One that is read over ends with this.
    pub fn handle_slice_received(&mut self, id: &SegmentId, from: u64) {
        let Some(part) = self.parts.get_mut(&(*id, from)) else {
            return;
        };
        if part.is_abandoned {
            self.end_part(id, from);
        } else if part.stage == Stage::Receiving {
            part.stage = Stage::Admitting;
            self.owed = self.owed.saturating_sub(1);
        }
    }

    /// A range is not in flight any more: kept, refused, or its stream ended within it. In the last two
    /// cases [`handle_failed`](Self::handle_failed) says what becomes of the segment. If there is more
    /// to ask for, the segment has its turn again.
    pub fn handle_slice_over(&mut self, id: &SegmentId, from: u64, now: Duration) {
        self.end_part(id, from);
        let deferred = self
            .known
            .get(id)
            .is_some_and(|known| known.stage == Stage::Deferred);
        if deferred {
            self.set_stage(id, Stage::Queued);
        }
        self.ask_lists(now);
    }

    /// Bytes of some segment arrived.
    pub fn handle_progress(&mut self, now: Duration) {
        self.last_progress = now;
    }

    /// All bytes of a segment are here; what follows is this node's time, not the peer's.
    pub fn handle_received(&mut self, id: &SegmentId) {
        let receiving = self
            .known
            .get(id)
            .is_some_and(|known| known.stage == Stage::Receiving);
        if receiving {
            self.set_stage(id, Stage::Admitting);
        }
    }

    /// The node stored the segment, or held it already (INV-08). News of it come by
    /// [`handle_stored`](Self::handle_stored) like all others.
    pub fn handle_admitted(&mut self, id: &SegmentId, now: Duration) {
        self.forget(id);
        self.abandon_parts(id);
        self.ask_lists(now);
    }

    /// A wanted segment was not taken. It is not asked for again in this session (INV-12), except
    /// after [`refresh`](Self::refresh) when the fault was local.
    pub fn handle_failed(&mut self, id: &SegmentId, refusal: Refusal, now: Duration) {
        let Some(known) = self.forget(id) else { return };
        self.abandon_parts(id);
        self.set_aside(*id, refusal.fault);
        self.strike(&refusal);
        self.event(SessionEvent::TransferFailed {
            reference: known.reference,
            refusal,
        });
        self.ask_lists(now);
    }

    /// Ends the session from this side. The first reason stays.
    pub fn close(&mut self, code: CloseCode, reason: &str) {
        if self.closed().is_none() {
            let reason = bounded_reason(reason);
            self.out.clear();
            self.out.push_back(Frame::Bye(Bye {
                code: code as u32,
                reason: reason.clone(),
            }));
            self.end(SessionClose {
                code,
                reason,
                by_peer: false,
            });
        }
    }

    fn end(&mut self, close: SessionClose) {
        self.phase = Phase::Closed(close);
        self.known.clear();
        self.parts.clear();
        self.queue.clear();
        self.to_serve.clear();
        self.serving.clear();
    }

    // ---- Hello ----

    fn on_bye(&mut self, bye: &Bye) {
        let code = CloseCode::from_wire(bye.code.into()).unwrap_or(CloseCode::Protocol);
        self.out.clear();
        self.end(SessionClose {
            code,
            reason: bye.reason.clone(),
            by_peer: true,
        });
    }

    fn on_hello(&mut self, hello: &Hello) {
        let Phase::Greeting { hello: seen, .. } = &self.phase else {
            return;
        };
        if seen.is_some() {
            return self.close(CloseCode::Protocol, "second hello");
        }
        if hello.version != PROTOCOL_VERSION {
            let version = hello.version;
            return self.close(
                CloseCode::Version,
                &format!("peer speaks version {version}, this node {PROTOCOL_VERSION}"),
            );
        }
        if hello.domain != self.local.domain.as_str() {
            return self.close(CloseCode::Domain, "peer belongs to another domain");
        }
        if hello.node_id != self.peer.as_str() {
            return self.close(
                CloseCode::NodeId,
                "hello names another node than the certificate",
            );
        }
        if hello.node_id == self.local.node_id.as_str() {
            return self.close(CloseCode::OwnNode, "peer has this node's id");
        }
        let Some(posture) = PeerPosture::from_wire(hello.posture) else {
            return self.close(CloseCode::Protocol, "unknown posture");
        };
        self.peer_limits = PeerLimits {
            kinds: KindSet(hello.limits.kinds),
            max_segment_bytes: hello.limits.max_segment_bytes,
            custody_free_bytes: hello.limits.custody_free_bytes,
            max_in_flight: hello.limits.max_in_flight,
        };
        let said = PeerHello {
            node_id: self.peer.clone(),
            limits: self.peer_limits,
            quota: AnnouncedQuota::default(),
            posture,
            endorsement: hello.endorsement.clone(),
        };
        if let Phase::Greeting {
            hello: seen,
            their_digest,
            ..
        } = &mut self.phase
        {
            *seen = Some(Box::new(said));
            *their_digest = hello.state_digest;
        }
        let quota = self.local.quota;
        self.push(Frame::HelloAck(HelloAck {
            frames_per_second: quota.frames_per_second,
            in_bytes_per_second: quota.in_bytes_per_second,
            in_bytes_left_today: quota.in_bytes_left_today,
            out_bytes_per_second: quota.out_bytes_per_second,
        }));
    }

    fn on_hello_ack(&mut self, granted: HelloAck, now: Duration, view: &dyn View) {
        let Phase::Greeting {
            heads,
            digest,
            hello,
            their_digest,
            is_outdated,
        } = &mut self.phase
        else {
            return;
        };
        // Their Hello comes first on an ordered stream, so an acknowledgement without one is wrong.
        let Some(mut said) = hello.take() else {
            return self.close(CloseCode::Protocol, "hello acknowledged before it was sent");
        };
        said.quota = AnnouncedQuota {
            frames_per_second: granted.frames_per_second,
            in_bytes_per_second: granted.in_bytes_per_second,
            in_bytes_left_today: granted.in_bytes_left_today,
            out_bytes_per_second: granted.out_bytes_per_second,
        };
        let heads = std::mem::take(heads);
        let (equal, is_outdated) = (digest == their_digest, *is_outdated);
        // INV-09: only from here on is anything but Hello, HelloAck and Bye accepted or sent.
        self.phase = Phase::Established;
        self.event(SessionEvent::Hello(*said));
        self.event(SessionEvent::Established);
        if equal {
            // They hold what we held when we greeted; what came since is dirty already.
            for head in heads.into_iter().take(MAX_ORIGINS) {
                let ranges = Ranges::from_sorted(&head.ranges);
                self.origins.insert(
                    head.origin,
                    PeerOrigin {
                        ranges,
                        ..PeerOrigin::default()
                    },
                );
            }
            self.heads_complete = true;
            if is_outdated {
                // Equal to what we greeted with, which is not what we hold: they name no heads unasked.
                self.refresh(now, view);
            }
        } else {
            self.offer_all(now, view);
            // The peer waits for the first heads, be they none.
            self.heads_promised = true;
            self.heads_due = Some(now);
        }
    }

    // ---- Heads ----

    fn mark_dirty(&mut self, kind: Kind, origin: Origin, now: Duration) {
        self.dirty.insert((kind, origin));
        let due = if is_urgent(kind) {
            now
        } else {
            now + self.config.heads_delay
        };
        self.heads_due = Some(self.heads_due.map_or(due, |earlier| earlier.min(due)));
    }

    fn offer_all(&mut self, now: Duration, view: &dyn View) {
        for head in view.heads() {
            self.dirty.insert((head.origin.kind(), head.origin));
        }
        if !self.dirty.is_empty() {
            self.heads_due = Some(now);
        }
    }

    /// Writes heads that are due, most urgent first, a few frames at a time.
    fn offer(&mut self, now: Duration, view: &dyn View) {
        if self.heads_due.is_none_or(|due| due > now) {
            return;
        }
        let kinds = self.peer_limits.kinds;
        self.dirty.retain(|(kind, _)| kinds.contains(*kind));
        if !self.own_open {
            let own = |(_, name): &(Kind, Origin)| self.is_own(name);
            let held: Vec<_> = self
                .dirty
                .iter()
                .filter(|entry| own(entry))
                .cloned()
                .collect();
            for entry in held {
                self.dirty.remove(&entry);
                self.held_back.insert(entry);
            }
        }
        if self.dirty.is_empty() && self.heads_promised && self.out.len() < MAX_HEADS_FRAMES_QUEUED
        {
            self.heads_promised = false;
            self.push(Frame::Heads(Heads {
                entries: Vec::new(),
                more: false,
            }));
        }
        // One call for many heads, single calls for a few.
        let mut all: Option<BTreeMap<Origin, Head>> = (self.dirty.len() > 8).then(|| {
            view.heads()
                .into_iter()
                .map(|head| (head.origin.clone(), head))
                .collect()
        });
        while !self.dirty.is_empty() && self.out.len() < MAX_HEADS_FRAMES_QUEUED {
            let mut entries = Vec::new();
            while entries.len() < MAX_HEADS_PER_FRAME {
                let Some((_, name)) = self.dirty.pop_first() else {
                    break;
                };
                let head = match &mut all {
                    Some(all) => all.remove(&name),
                    None => view.head(&name),
                };
                if let Some(head) = head
                    && let Some(origin) = self.my_index(&name)
                {
                    let tag = head_tag(&self.key, &head, view);
                    entries.push(HeadEntry {
                        origin,
                        newest: newest_refs(&head, view),
                        ranges: head.ranges,
                        tag,
                    });
                }
            }
            let more = !self.dirty.is_empty();
            // Heads that vanished meanwhile leave nothing to say, but a promise is kept.
            if !entries.is_empty() || (self.heads_promised && !more) {
                self.heads_promised = more;
                self.push(Frame::Heads(Heads { entries, more }));
            }
        }
        if self.dirty.is_empty() && !self.heads_promised {
            self.heads_due = None;
        }
    }

    fn is_own(&self, name: &Origin) -> bool {
        name.audit_node() == Some(self.local.node_id.as_str())
    }

    /// Ruling 8: own audit leaves once the peer's heads were seen, and while none of them tells of a
    /// part of an own log that this node does not know.
    fn open_own(&mut self, now: Duration, view: &dyn View) {
        let open = self.heads_complete && self.own_behind.is_empty();
        if open && !self.own_open {
            if !self.held_back.is_empty() {
                self.dirty.append(&mut self.held_back);
                self.heads_due = Some(now);
            }
            self.own_open = true;
            self.ask_receipts(view);
        }
        self.own_open = open;
    }

    /// Whether the peer's head of an own log is ahead of what is held here, or tells of another content.
    fn is_behind(&self, name: &Origin, ours: Option<&Head>, view: &dyn View) -> bool {
        let Some(theirs) = self.origins.get(name) else {
            return false;
        };
        let Some(top) = theirs.ranges.last() else {
            return false;
        };
        if top < view.settled_below(name) {
            return false;
        }
        let held = ours.and_then(|head| head.ranges.last());
        if held.is_none_or(|(_, newest)| *newest < top) {
            return true;
        }
        let at = |sequence: u64| view.refs(name, sequence, sequence, 1).pop();
        // What was there is told by the next one too.
        let ours = at(top)
            .map(|held| held.id)
            .or_else(|| at(top.checked_add(1)?)?.prev);
        match (theirs.tag, ours) {
            (Some(tag), Some(last_id)) => {
                let head = Head {
                    origin: name.clone(),
                    ranges: theirs.ranges.as_slice().to_vec(),
                    last_id,
                };
                head_tag(&self.key, &head, view) != tag
            }
            _ => false,
        }
    }

    /// Whether the peer's lists of this number, its highest, are others than those held here, whatever
    /// older ones either side holds.
    fn lists_differ(&self, theirs: &PeerOrigin, ours: &Head, view: &dyn View) -> bool {
        let head = Head {
            ranges: theirs.ranges.as_slice().to_vec(),
            ..ours.clone()
        };
        theirs
            .tag
            .is_some_and(|tag| head_tag(&self.key, &head, view) != tag)
    }

    fn my_index(&mut self, name: &Origin) -> Option<OriginRef> {
        if let Some(index) = self.my_origins.get(name) {
            return Some(OriginRef::Known(*index));
        }
        // The peer would hang up; the most urgent kinds were named first.
        if self.my_names.len() >= MAX_ORIGINS {
            return None;
        }
        let index = u32::try_from(self.my_names.len()).ok()?;
        self.my_names.push(name.clone());
        self.my_origins.insert(name.clone(), index);
        Some(OriginRef::New(index, name.as_str().to_owned()))
    }

    fn their_name(&mut self, origin: &OriginRef) -> Result<Origin, &'static str> {
        match origin {
            OriginRef::Known(index) => usize::try_from(*index)
                .ok()
                .and_then(|at| self.their_names.get(at))
                .cloned()
                .ok_or("head of an origin without a name"),
            OriginRef::New(index, name) => {
                let next = self.their_names.len();
                if usize::try_from(*index) != Ok(next) {
                    return Err("origin numbers are not in order");
                }
                let name = Origin::parse(name).map_err(|_| "origin is malformed")?;
                let entry = self.origins.entry(name.clone()).or_default();
                if entry.index.replace(*index).is_some() {
                    return Err("origin was named twice");
                }
                self.their_names.push(name.clone());
                Ok(name)
            }
        }
    }

    fn on_heads(&mut self, heads: Heads, view: &dyn View) {
        let mine: Option<BTreeMap<Origin, Head>> = (heads.entries.len() > 4).then(|| {
            view.heads()
                .into_iter()
                .map(|head| (head.origin.clone(), head))
                .collect()
        });
        let mut last_kind = None;
        for entry in heads.entries {
            let is_new = matches!(entry.origin, OriginRef::New(..));
            if is_new && self.their_names.len() >= MAX_ORIGINS {
                return self.close(CloseCode::Limit, "peer names too many origins");
            }
            let name = match self.their_name(&entry.origin) {
                Ok(name) => name,
                Err(detail) => return self.close(CloseCode::Protocol, detail),
            };
            last_kind = Some(name.kind());
            let top = entry.ranges.last().map(|(_, to)| *to);
            let newest_fits = entry.newest.is_empty()
                || (is_urgent(name.kind())
                    && entry
                        .newest
                        .iter()
                        .all(|newest| Some(newest.sequence) == top)
                    && entry
                        .newest
                        .is_sorted_by(|before, after| before.id < after.id));
            if !newest_fits {
                return self.close(
                    CloseCode::Protocol,
                    "references do not belong to their head",
                );
            }
            if let Some(origin) = self.origins.get_mut(&name) {
                origin.ranges = Ranges::from_sorted(&entry.ranges);
                let before = origin.tag.replace(entry.tag);
                // Ruling 5: another list of a number that was listed in this session already.
                if name.kind() == Kind::Revocation
                    && before != origin.tag
                    && let Some(top) = top
                {
                    origin.listed.remove(top, top);
                }
                for number in view.open_numbers(&name) {
                    origin.listed.remove(number, number);
                }
            }
            let ours = match &mine {
                Some(mine) => mine.get(&name).cloned(),
                None => view.head(&name),
            };
            let differs = ours.as_ref().is_some_and(|ours| {
                ours.ranges == entry.ranges && head_tag(&self.key, ours, view) != entry.tag
            });
            self.compare(&name, ours.as_ref(), differs, &entry.newest, view);
            if name.audit_node() == Some(self.local.node_id.as_str()) {
                self.receipts_answered.clear();
            }
        }
        self.more_heads = heads.more.then_some(last_kind).flatten();
        if heads.more && last_kind.is_none() {
            return self.close(CloseCode::Protocol, "empty heads with more to come");
        }
        self.heads_complete |= self.more_heads.is_none();
        self.ask_receipts(view);
    }

    /// Works out what the peer holds of an origin and this node lacks.
    fn compare(
        &mut self,
        name: &Origin,
        ours: Option<&Head>,
        differs: bool,
        newest: &[RefEntry],
        view: &dyn View,
    ) {
        let kind = name.kind();
        let wanted = self.local.limits.kinds.contains(kind) && view.wants_origin(name);
        // Ruling 5 and 6: linked logs that differ at the same place are evidence once both heads
        // are seen in full; a policy with one more signature is the same policy.
        if differs
            && matches!(kind, Kind::Audit | Kind::Witness)
            && self.heads_asked.len() < MAX_HEADS_OUTSTANDING
            && let Some(index) = self.origins.get(name).and_then(|origin| origin.index)
            && self.heads_asked.insert(name.clone())
        {
            self.push(Frame::GetHead(GetHead { origin: index }));
        }
        let own = self.is_own(name);
        let behind = own && wanted && self.is_behind(name, ours, view);
        if behind {
            self.own_behind.insert(name.clone());
        } else {
            self.own_behind.remove(name);
        }
        let Some(origin) = self.origins.get(name) else {
            return;
        };
        let mut missing = match origin.ranges.last() {
            _ if !wanted || origin.index.is_none() => Ranges::default(),
            Some(_) if own => {
                let mut missing = origin.ranges.clone();
                if let Some(settled) = view.settled_below(name).checked_sub(1) {
                    missing.remove(0, settled);
                }
                // Where the two part is told by the ids, so then all of them are listed.
                if !behind {
                    for (from, to) in ours.map(|head| head.ranges.as_slice()).unwrap_or_default() {
                        missing.remove(*from, *to);
                    }
                }
                missing
            }
            None => Ranges::default(),
            // Of a CA's lists only the newest counts; gaps are normal (ruling 5). Two lists of one
            // number are both wanted: the union of their serials holds.
            Some(top) if kind == Kind::Revocation => {
                let held = ours.and_then(|ours| Some((ours, ours.ranges.last()?.1)));
                let is_wanted = held.is_none_or(|(ours, held)| {
                    held < top || (held == top && self.lists_differ(origin, ours, view))
                });
                if is_wanted {
                    Ranges::from_sorted(&[(top, top)])
                } else {
                    Ranges::default()
                }
            }
            Some(_) => {
                let mut missing = origin.ranges.clone();
                for (from, to) in ours.map(|head| head.ranges.as_slice()).unwrap_or_default() {
                    missing.remove(*from, *to);
                }
                for number in view.open_numbers(name) {
                    if origin.ranges.contains(number) {
                        missing.insert(number, number);
                    }
                }
                missing
            }
        };
        // INV-07: a peer that names new ids in every head is asked for a list, which waits.
        let told = origin.ranges.last().filter(|top| {
            !newest.is_empty() && missing.contains(*top) && origin.queued <= MAX_NEWEST_REFS
        });
        for (from, to) in origin.listed.as_slice() {
            missing.remove(*from, *to);
        }
        if let Some(top) = told {
            for entry in newest {
                self.consider(name, entry, view);
            }
            missing.remove(top, top);
            if let Some(origin) = self.origins.get_mut(name) {
                origin.listed.insert(top, top);
            }
        }
        self.set_missing(name, missing);
    }

    fn set_missing(&mut self, name: &Origin, missing: Ranges) {
        let Some(origin) = self.origins.get_mut(name) else {
            return;
        };
        if let Some(cursor) = origin.missing.first() {
            self.open_lists.remove(&(name.kind(), cursor, name.clone()));
        }
        if let Some(cursor) = missing.first() {
            self.open_lists.insert((name.kind(), cursor, name.clone()));
        }
        origin.missing = missing;
    }

    fn on_get_head(&mut self, get: GetHead, view: &dyn View) {
        let name = usize::try_from(get.origin)
            .ok()
            .and_then(|at| self.my_names.get(at))
            .cloned();
        let Some(name) = name else {
            return self.close(
                CloseCode::Protocol,
                "head of an unknown origin was asked for",
            );
        };
        let head = view.head(&name).map(|head| HeadBody {
            ranges: head.ranges,
            last_id: *head.last_id.as_bytes(),
        });
        self.push(Frame::FullHead(FullHead {
            origin: get.origin,
            head,
        }));
    }

    fn on_full_head(&mut self, head: &FullHead, view: &dyn View) {
        let name = usize::try_from(head.origin)
            .ok()
            .and_then(|at| self.their_names.get(at));
        let Some(name) = name.cloned() else {
            return self.close(CloseCode::Protocol, "full head of an unknown origin");
        };
        if !self.heads_asked.remove(&name) {
            return self.close(CloseCode::Protocol, "full head was not asked for");
        }
        let (Some(head), Some(ours)) = (&head.head, view.head(&name)) else {
            return;
        };
        let theirs = SegmentId::from_bytes(head.last_id);
        if ours.ranges == head.ranges
            && ours.last_id != theirs
            && let Some((_, sequence)) = ours.ranges.last().copied()
        {
            self.event(SessionEvent::ForkSuspected {
                origin: name,
                sequence,
                ours: ours.last_id,
                theirs,
            });
        }
    }

    // ---- Lists ----

    /// Asks for lists, in the order of INV-11, so far ahead that fetches do not wait.
    fn ask_lists(&mut self, now: Duration) {
        if !self.is_established() {
            return;
        }
        self.start_waiting(now);
        while self.lists_asked.len() < MAX_LISTS_OUTSTANDING {
            let ask = self.next_lists();
            if ask.is_empty() {
                return;
            }
            for (name, list) in &ask {
                if let Some(origin) = self.origins.get_mut(name) {
                    origin.is_asked = true;
                }
                self.refs_asked += usize::from(list.max);
            }
            let lists = ask.iter().map(|(_, list)| *list).collect();
            self.lists_asked.push_back(ask);
            self.push(Frame::ListRefs(ListRefs { lists }));
        }
    }

    /// What the next frame may ask for.
    fn next_lists(&self) -> Vec<(Origin, ListAsked)> {
        let open = self.open_lists.len().max(1);
        let page = (MAX_LISTED_AHEAD / open).clamp(1, MAX_REFS_PER_FRAME - MAX_REFS_OF_ONE_NUMBER);
        let mut ask: Vec<(Origin, ListAsked)> = Vec::new();
        let (mut answer, mut refs) = (0, 0);
        let first = self
            .queue
            .first()
            .map(|(kind, at, name, _)| (kind, at, name));
        let last = self
            .queue
            .last()
            .map(|(kind, at, name, _)| (kind, at, name));
        for (kind, cursor, name) in &self.open_lists {
            let Some(origin) = self.origins.get(name).filter(|origin| !origin.is_asked) else {
                continue;
            };
            let (Some((from, to)), Some(index)) = (origin.missing.first_range(), origin.index)
            else {
                continue;
            };
            // No more than the range has numbers; of revocation and policy many may bear one.
            let numbers = usize::try_from((to - from).saturating_add(1)).unwrap_or(usize::MAX);
            let most = if is_urgent(*kind) {
                page
            } else {
                page.min(numbers)
            };
            let max = u16::try_from(most).unwrap_or(1);
            let its_answer = ListRefs::answer_refs(max);
            let asked = self.refs_asked + refs + usize::from(max);
            if answer + its_answer > MAX_REFS_PER_FRAME || asked > MAX_REFS_OUTSTANDING {
                break;
            }
            let key = (kind, cursor, name);
            // What the queue waits for is always listed, else neither would ever go on.
            let holds_up = first.is_some_and(|first| key <= first);
            // INV-07: of what is not more urgent than all that is listed, only what there is room for.
            let fits =
                self.queue.len() + asked <= MAX_LISTED_AHEAD || last.is_some_and(|last| key < last);
            if !holds_up && !fits {
                // Nor does any after it.
                break;
            }
            if holds_up || origin.queued * 2 <= page {
                answer += its_answer;
                refs += usize::from(max);
                ask.push((
                    name.clone(),
                    ListAsked {
                        origin: index,
                        from,
                        to,
                        max,
                    },
                ));
            }
        }
        ask
    }

    /// INV-07: what was listed beyond the bound is forgotten, last in turn first, as if it had not been
    /// listed. What has a range on its way stays.
    fn unlist_surplus(&mut self) {
        while self.queue.len() > MAX_LISTED_AHEAD {
            let last = self.queue.iter().rev();
            let last = last.map(|(_, sequence, name, id)| (*sequence, name.clone(), *id));
            let mut idle = last.filter(|(.., id)| self.parts_of(id).next().is_none());
            let Some((sequence, name, id)) = idle.next() else {
                return;
            };
            self.forget(&id);
            if let Some(origin) = self.origins.get_mut(&name) {
                let mut missing = origin.missing.clone();
                // Up to the next one that is missing, so that the ranges stay few.
                let next = missing.as_slice().iter().find(|(from, _)| *from > sequence);
                let to = next.map_or(sequence, |(from, _)| from - 1);
                missing.insert(sequence, to);
                origin.listed.remove(sequence, to);
                self.set_missing(&name, missing);
            }
        }
    }

    fn on_list_refs(&mut self, asked: &ListRefs, view: &dyn View) {
        let mut lists = Vec::with_capacity(asked.lists.len());
        for list in &asked.lists {
            let name = usize::try_from(list.origin)
                .ok()
                .and_then(|at| self.my_names.get(at));
            let Some(name) = name else {
                return self.close(
                    CloseCode::Protocol,
                    "list of an unknown origin was asked for",
                );
            };
            lists.push(list_of(name, list, view));
        }
        self.push(Frame::Refs(Refs { lists }));
    }

    fn on_refs(&mut self, refs: &Refs, view: &dyn View) {
        let Some(asked) = self.lists_asked.pop_front() else {
            return self.close(CloseCode::Protocol, "list was not asked for");
        };
        for (name, list) in &asked {
            if let Some(origin) = self.origins.get_mut(name) {
                origin.is_asked = false;
            }
            self.refs_asked = self.refs_asked.saturating_sub(usize::from(list.max));
        }
        if refs.lists.len() != asked.len() {
            return self.close(CloseCode::Protocol, "lists are others than were asked for");
        }
        for ((name, asked), list) in asked.iter().zip(&refs.lists) {
            if let Err(detail) = self.take_list(name, asked, list, view) {
                return self.close(CloseCode::Protocol, detail);
            }
        }
    }

    fn take_list(
        &mut self,
        name: &Origin,
        asked: &ListAsked,
        list: &RefList,
        view: &dyn View,
    ) -> Result<(), &'static str> {
        let ascending = list.refs.windows(2).all(|pair| match pair {
            [before, after] => (before.sequence, before.id) < (after.sequence, after.id),
            _ => false,
        });
        let inside = list
            .refs
            .iter()
            .all(|entry| (asked.from..=asked.to).contains(&entry.sequence));
        let last = list.refs.last().map(|last| last.sequence);
        if list.origin != asked.origin
            || !ascending
            || !inside
            || list.refs.len() > ListRefs::answer_refs(asked.max)
        {
            return Err("list differs from what was asked for");
        }
        let listed_to = match (list.done, last) {
            (true, _) => asked.to,
            (false, Some(last)) => last,
            (false, None) => return Err("empty list with more to come"),
        };
        for entry in &list.refs {
            self.consider(name, entry, view);
        }
        let Some(origin) = self.origins.get_mut(name) else {
            return Ok(());
        };
        // What the peer holds no more, or not yet, is listed when it says that it has it (again).
        for entry in &list.refs {
            origin.listed.insert(entry.sequence, entry.sequence);
        }
        let mut missing = origin.missing.clone();
        missing.remove(asked.from, listed_to);
        self.set_missing(name, missing);
        Ok(())
    }

    fn consider(&mut self, name: &Origin, entry: &RefEntry, view: &dyn View) {
        let reference = SegmentRef {
            id: SegmentId::from_bytes(entry.id),
            kind: name.kind(),
            origin: name.clone(),
            sequence: entry.sequence,
            size_bytes: entry.size_bytes,
            prev: entry.prev.map(SegmentId::from_bytes),
        };
        let id = reference.id;
        let most = if is_urgent(reference.kind) {
            MAX_URGENT_SEGMENT_BYTES
        } else {
            MAX_BULK_SEGMENT_BYTES
        };
        if reference.size_bytes == 0
            || reference.size_bytes > self.local.limits.max_segment_bytes.min(most)
            || self.known.contains_key(&id)
            || self.set_aside.contains_key(&id)
            || view.reference(&id).is_some()
            || !view.wants(&reference)
        {
            return;
        }
        self.known.insert(
            id,
            Known {
                reference,
                stage: Stage::Deferred,
            },
        );
        self.set_stage(&id, Stage::Queued);
    }

    // ---- Fetches ----

    fn key_of(reference: &SegmentRef) -> WantKey {
        (
            reference.kind,
            reference.sequence,
            reference.origin.clone(),
            reference.id,
        )
    }

    /// The one place where a segment changes its stage, so that the counts cannot drift.
    fn set_stage(&mut self, id: &SegmentId, stage: Stage) {
        let Some(known) = self.known.get_mut(id) else {
            return;
        };
        let before = std::mem::replace(&mut known.stage, stage);
        let reference = known.reference.clone();
        self.account(&reference, before, Some(stage));
    }

    fn forget(&mut self, id: &SegmentId) -> Option<Known> {
        let known = self.known.remove(id)?;
        self.account(&known.reference, known.stage, None);
        Some(known)
    }

    fn account(&mut self, reference: &SegmentRef, before: Stage, after: Option<Stage>) {
        let after_flies = after.is_some_and(Stage::is_in_flight);
        let queued = |stage| stage == Stage::Queued;
        if queued(before) != after.is_some_and(queued) {
            if let Some(origin) = self.origins.get_mut(&reference.origin) {
                origin.queued = if queued(before) {
                    origin.queued.saturating_sub(1)
                } else {
                    origin.queued + 1
                };
            }
            if queued(before) {
                self.queue.remove(&Self::key_of(reference));
            } else {
                self.queue.insert(Self::key_of(reference));
            }
        }
        let bulk = if is_urgent(reference.kind) {
            0
        } else {
            reference.size_bytes
        };
        match (before.is_in_flight(), after_flies) {
            (false, true) => {
                self.in_flight += 1;
                self.bulk_bytes = self.bulk_bytes.saturating_add(bulk);
            }
            (true, false) => {
                self.in_flight = self.in_flight.saturating_sub(1);
                self.bulk_bytes = self.bulk_bytes.saturating_sub(bulk);
            }
            _ => {}
        }
        match (before.is_owed(), after.is_some_and(Stage::is_owed)) {
            (false, true) => self.owed += 1,
            (true, false) => self.owed = self.owed.saturating_sub(1),
            _ => {}
        }
    }

    fn set_aside(&mut self, id: SegmentId, fault: Fault) {
        self.set_aside.insert(id, fault);
        if self.set_aside.len() > MAX_SET_ASIDE {
            self.close(CloseCode::Limit, "too many segments were not taken");
        }
    }

    fn strike(&mut self, refusal: &Refusal) {
        if refusal.fault == Fault::Peer {
            // INV-12: the count only goes up, and the last one ends the session.
            self.faults += 1;
            if self.faults >= self.config.faults_max {
                self.close(CloseCode::Faults, &refusal.to_string());
            }
        }
    }

    fn on_fetch(&mut self, fetch: Fetch, view: &dyn View) {
        let id = SegmentId::from_bytes(fetch.id);
        // Twice, because the peer may see the end of a segment before this side has counted it.
        if self.serving.len() >= 2 * usize::from(self.local.limits.max_in_flight.max(1)) {
            return self.close(CloseCode::Limit, "more fetches at once than were announced");
        }
        let range = fetch.range.map(|ByteRange { from, to }| from..to);
        let refused = match view.reference(&id) {
            None => FetchRefusal::NotHeld,
            Some(held) if held.size_bytes > self.peer_limits.max_segment_bytes => {
                FetchRefusal::TooLarge
            }
            Some(reference) => {
                let aligned = range.as_ref().is_none_or(|range| {
                    bao::aligned(reference.size_bytes, range).as_ref() == Ok(range)
                });
                if !aligned {
                    return self.close(CloseCode::Protocol, "range of a segment that it has not");
                }
                let serve = Serve { reference, range };
                if !self.serving.insert(serve.key()) {
                    return self.close(CloseCode::Protocol, "segment was asked for twice");
                }
                self.to_serve.push_back(serve);
                return;
            }
        };
        self.push(Frame::FetchRefused(FetchRefused {
            id: fetch.id,
            from: fetch.range.map(|range| range.from),
            code: refused as u16,
        }));
    }

    fn on_fetch_refused(&mut self, refused: FetchRefused) {
        let id = SegmentId::from_bytes(refused.id);
        let stage = match refused.from {
            None => self.known.get(&id).map(|known| known.stage),
            Some(from) => self.parts.get(&(id, from)).map(|part| part.stage),
        };
        let asked = stage == Some(Stage::Requested);
        let code = FetchRefusal::from_wire(refused.code);
        let (true, Some(code)) = (asked, code) else {
            return self.close(CloseCode::Protocol, "refusal of a fetch that was not made");
        };
        if let Some(from) = refused.from {
            self.end_part(&id, from);
        }
        if let Some(known) = self.forget(&id) {
            self.abandon_parts(&id);
            self.set_aside(id, Fault::Local);
            self.event(SessionEvent::FetchRefused {
                reference: known.reference,
                code,
            });
        }
    }

    // ---- Receipts ----

    fn ask_receipts(&mut self, view: &dyn View) {
        if !self.is_established() || !self.own_open || !self.receipts_asked.is_empty() {
            return;
        }
        let mut ids = Vec::new();
        for id in view.receipt_wants() {
            if ids.len() >= MAX_RECEIPTS_PER_FRAME {
                break;
            }
            let held_there = view.reference(&id).is_some_and(|held| {
                self.origins
                    .get(&held.origin)
                    .is_some_and(|origin| origin.ranges.contains(held.sequence))
            });
            if held_there && !self.receipts_answered.contains(&id) && self.receipts_asked.insert(id)
            {
                ids.push(*id.as_bytes());
            }
        }
        if !ids.is_empty() {
            self.push(Frame::ReceiptWant(ReceiptWant { ids }));
        }
    }

    fn on_receipt_want(&mut self, want: &ReceiptWant, view: &dyn View) {
        for id in &want.ids {
            let receipt = view.receipt_for(&SegmentId::from_bytes(*id));
            self.push(Frame::Receipt(Receipt { id: *id, receipt }));
        }
    }

    fn on_receipt(&mut self, receipt: &Receipt, view: &dyn View) {
        let id = SegmentId::from_bytes(receipt.id);
        if !self.receipts_asked.remove(&id) {
            return self.close(CloseCode::Protocol, "receipt was not asked for");
        }
        // Bounded by what is forgotten when the peer's head of this node's log changes.
        if self.receipts_answered.len() >= MAX_SET_ASIDE {
            self.receipts_answered.pop_first();
        }
        self.receipts_answered.insert(id);
        if let Some(bytes) = &receipt.receipt {
            match view.take_receipt(bytes) {
                Ok(()) => self.event(SessionEvent::ReceiptTaken { id }),
                Err(refusal) => {
                    self.strike(&refusal);
                    self.event(SessionEvent::ReceiptRefused { id, refusal });
                }
            }
        }
        self.ask_receipts(view);
    }

    // ---- Housekeeping ----

    fn pump(&mut self, now: Duration, view: &dyn View) {
        for hold in [&mut self.hold_urgent, &mut self.hold_bulk] {
            if hold.is_some_and(|until| until <= now) {
                *hold = None;
            }
        }
        if self.is_established() {
            self.unlist_surplus();
            self.ask_lists(now);
            self.open_own(now, view);
            self.offer(now, view);
        }
    }

    /// A peer that owed nothing begins to owe from now on.
    fn start_waiting(&mut self, now: Duration) {
        if !self.owes() {
            self.last_progress = now;
        }
    }

    /// Whether the peer owes this side anything.
    fn owes(&self) -> bool {
        self.owed > 0
            || !self.lists_asked.is_empty()
            || self.more_heads.is_some()
            || !self.heads_asked.is_empty()
            || !self.receipts_asked.is_empty()
    }

    fn stall_deadline(&self) -> Duration {
        self.last_progress + self.config.stall_timeout
    }

    fn push(&mut self, frame: Frame) {
        if self.closed().is_some() {
            return;
        }
        // INV-07: only a peer that asks for more than it may can cause this.
        if self.out.len() >= MAX_FRAMES_QUEUED {
            return self.close(CloseCode::Limit, "peer asks for more than it reads");
        }
        self.out.push_back(frame);
    }

    fn event(&mut self, event: SessionEvent) {
        if self.events.len() >= MAX_EVENTS_QUEUED {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}
