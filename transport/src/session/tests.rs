//! Several machines in one process, in virtual time, joined by in-memory pipes.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use tidelock_link::Random;

use super::*;
use crate::{
    frame::{Channel, FrameDecoder},
    registry::{Busy, Claims, Entry, Registry, SessionId},
};

mod outlook;
mod schedules;

const MS: Duration = Duration::from_millis(1);
const LATENCY: Duration = Duration::from_millis(5);
/// Time that one byte of a segment takes on a link.
const BYTE: Duration = Duration::from_micros(1);
const KEY: [u8; 32] = [42; 32];

fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn audit_origin(node: &str) -> Origin {
    Origin::parse(&format!("audit/{node}/0123456789abcdef/0")).unwrap()
}

fn policy_origin() -> Origin {
    Origin::policy("base").unwrap()
}

fn crl_origin() -> Origin {
    Origin::crl(&[9; 32])
}

type Content = Vec<u8>;

#[derive(Default)]
struct Store {
    name: String,
    by_id: BTreeMap<SegmentId, (SegmentRef, Content)>,
    /// How often each segment was written; INV-08 says once.
    puts: BTreeMap<SegmentId, u32>,
    /// Arrivals that were held already.
    duplicates: u32,
    receipts: BTreeMap<SegmentId, BTreeSet<String>>,
    no_room_above: Option<u64>,
    /// What has arrived of segments in ranges, by group; outlives sessions and restarts.
    partials: BTreeMap<SegmentId, (Content, Vec<bool>)>,
    /// Takes its own log back, from this number on.
    own_from: Option<u64>,
    /// Takes another segment of this number.
    open_number: Option<u64>,
    /// Takes nothing that needs room.
    is_full: bool,
}

impl Store {
    fn put(&mut self, reference: &SegmentRef, content: &[u8]) -> bool {
        if self.by_id.contains_key(&reference.id) {
            self.duplicates += 1;
            return false;
        }
        *self.puts.entry(reference.id).or_default() += 1;
        self.by_id
            .insert(reference.id, (reference.clone(), content.to_vec()));
        true
    }

    fn make(&mut self, origin: &Origin, sequence: u64, salt: &str, size: usize) -> SegmentRef {
        let mut content = format!("{origin} {sequence} {salt}").into_bytes();
        content.resize(size.max(content.len()), b'.');
        let reference = SegmentRef {
            id: SegmentId::of(&content),
            kind: origin.kind(),
            origin: origin.clone(),
            sequence,
            size_bytes: content.len() as u64,
            prev: None,
        };
        self.put(&reference, &content);
        reference
    }

    fn missing(&mut self, reference: &SegmentRef) -> Vec<Range<u64>> {
        let size = reference.size_bytes;
        let groups = usize::try_from(size.div_ceil(bao::GROUP_BYTES)).unwrap();
        let length = usize::try_from(size).unwrap();
        let (_, have) = self
            .partials
            .entry(reference.id)
            .or_insert_with(|| (vec![0; length], vec![false; groups]));
        let mut missing: Vec<Range<u64>> = Vec::new();
        for at in (0..groups).filter(|at| !have[*at]) {
            let start = at as u64 * bao::GROUP_BYTES;
            let end = (start + bao::GROUP_BYTES).min(size);
            match missing.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => missing.push(start..end),
            }
        }
        missing
    }

    /// Verifies and keeps a slice. Gives the whole content once it is all here.
    fn accept(
        &mut self,
        reference: &SegmentRef,
        range: &Range<u64>,
        slice: &[u8],
    ) -> Result<Option<Content>, bao::BaoError> {
        self.missing(reference);
        let (content, have) = self.partials.get_mut(&reference.id).unwrap();
        bao::decode_range(&reference.id, reference.size_bytes, range, slice, |item| {
            if let bao::Item::Group { offset, bytes } = item {
                let at = usize::try_from(offset).unwrap();
                content[at..at + bytes.len()].copy_from_slice(bytes);
                have[usize::try_from(offset / bao::GROUP_BYTES).unwrap()] = true;
            }
            Ok::<(), bao::BaoError>(())
        })?;
        let whole = !have.contains(&false);
        Ok(whole.then(|| self.partials.remove(&reference.id).unwrap().0))
    }

    fn ids(&self) -> BTreeSet<SegmentId> {
        self.by_id.keys().copied().collect()
    }
}

struct StoreView<'a> {
    store: &'a RefCell<Store>,
    peer: &'a NodeId,
}

impl View for StoreView<'_> {
    fn heads(&self) -> Vec<Head> {
        let mut by_origin: BTreeMap<(Kind, Origin), Vec<(u64, SegmentId)>> = BTreeMap::new();
        for (reference, _) in self.store.borrow().by_id.values() {
            by_origin
                .entry((reference.kind, reference.origin.clone()))
                .or_default()
                .push((reference.sequence, reference.id));
        }
        by_origin
            .into_iter()
            .map(|((_, origin), mut held)| {
                held.sort();
                let last = held.last().unwrap().1;
                Head::from_sequences(origin, held.into_iter().map(|(sequence, _)| sequence), last)
            })
            .collect()
    }

    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        let mut refs: BTreeMap<(u64, SegmentId), SegmentRef> = BTreeMap::new();
        for (reference, _) in self.store.borrow().by_id.values() {
            if reference.origin == *origin && (from..=to).contains(&reference.sequence) {
                refs.insert((reference.sequence, reference.id), reference.clone());
            }
        }
        refs.into_values().take(max).collect()
    }

    fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        self.store
            .borrow()
            .by_id
            .get(id)
            .map(|(reference, _)| reference.clone())
    }

    fn wants_origin(&self, origin: &Origin) -> bool {
        let store = self.store.borrow();
        store.own_from.is_some() || origin.audit_node() != Some(store.name.as_str())
    }

    fn settled_below(&self, _: &Origin) -> u64 {
        self.store.borrow().own_from.unwrap_or(0)
    }

    fn open_numbers(&self, _: &Origin) -> Vec<u64> {
        self.store.borrow().open_number.into_iter().collect()
    }

    fn wants(&self, reference: &SegmentRef) -> bool {
        self.store
            .borrow()
            .no_room_above
            .is_none_or(|max| reference.size_bytes <= max)
    }

    fn receipt_wants(&self) -> Vec<SegmentId> {
        let store = self.store.borrow();
        store
            .by_id
            .values()
            .filter(|(reference, _)| reference.origin.audit_node() == Some(store.name.as_str()))
            .map(|(reference, _)| reference.id)
            .filter(|id| {
                !store
                    .receipts
                    .get(id)
                    .is_some_and(|from| from.contains(self.peer.as_str()))
            })
            .collect()
    }

    fn receipt_for(&self, id: &SegmentId) -> Option<Vec<u8>> {
        self.reference(id).map(|_| id.as_bytes().to_vec())
    }

    fn take_receipt(&self, receipt: &[u8]) -> Result<(), Refusal> {
        let Ok(bytes) = <[u8; 32]>::try_from(receipt) else {
            return Err(Refusal {
                code: "receipt",
                message: "not a receipt".into(),
                fault: Fault::Peer,
            });
        };
        self.store
            .borrow_mut()
            .receipts
            .entry(SegmentId::from_bytes(bytes))
            .or_default()
            .insert(self.peer.as_str().to_owned());
        Ok(())
    }
}

fn no_room() -> Refusal {
    Refusal {
        code: "room",
        message: "no room".into(),
        fault: Fault::Local,
    }
}

fn local(name: &str) -> LocalHello {
    LocalHello {
        domain: DomainId::new("site").unwrap(),
        node_id: node_id(name),
        limits: PeerLimits {
            kinds: KindSet::ALL,
            max_segment_bytes: 4_000_000,
            custody_free_bytes: 0,
            max_in_flight: 8,
        },
        quota: AnnouncedQuota {
            in_bytes_per_second: 7,
            ..AnnouncedQuota::default()
        },
        posture: PeerPosture::Normal,
        endorsement: None,
    }
}

/// One side of a link.
struct Side {
    node: usize,
    session: SessionId,
    machine: SessionMachine,
    decoder: FrameDecoder,
    /// When each data stream has written what it was given.
    busy_until: BTreeMap<Kind, Duration>,
    /// When the last message of each stream arrives that this side has sent; none: the control stream.
    arrives: BTreeMap<Option<Kind>, Duration>,
}

#[derive(Clone)]
enum Message {
    Control(Vec<u8>),
    Segment(SegmentRef, Content),
    Slice(SegmentRef, Range<u64>, Content),
}

struct Link {
    sides: [Side; 2],
    /// In flight towards side 0 and side 1: by arrival and order of sending.
    wires: [BTreeMap<(Duration, u64), Message>; 2],
    /// What a message needs beside the latency of every link.
    delay: Duration,
    /// Something was lost, spoilt or refused: what did not arrive may wait for the next contact.
    is_impaired: bool,
}

impl Link {
    /// Puts a message of the side `from` on the wire. Streams keep their order, each by itself.
    fn send(&mut self, from: usize, at: Duration, number: u64, message: Message) {
        let stream = match &message {
            Message::Control(_) => None,
            Message::Segment(reference, _) | Message::Slice(reference, ..) => Some(reference.kind),
        };
        let last = self.sides[from].arrives.entry(stream).or_default();
        *last = (*last).max(at + LATENCY + self.delay);
        self.wires[1 - from].insert((*last, number), message);
    }
}

struct Node {
    id: NodeId,
    /// How far its clock is ahead of the world's, in milliseconds.
    clock_ahead_ms: i64,
    store: RefCell<Store>,
    claims: RefCell<Claims>,
    registry: Registry<(), ()>,
}

/// The world.
struct World {
    now: Duration,
    config: SessionConfig,
    nodes: Vec<Node>,
    links: BTreeMap<(usize, usize), Link>,
    sent: u64,
    /// What happened, to compare runs and orders.
    trace: Vec<String>,
    /// Fetches: link, asking node, segment.
    fetches: Vec<(usize, SegmentRef)>,
    /// Slices that were sent: by whom, and how many bytes of the segment.
    slices: Vec<(usize, Range<u64>)>,
    /// Never answers a fetch.
    mute: Option<usize>,
    /// Spoils the content of every segment that this node sends.
    liar: Option<usize>,
    events: Vec<(usize, SessionEvent)>,
    /// Whether frames are told in `trace`.
    is_traced: bool,
    /// How often a session of a node asked for a whole segment, and how often it compared everything.
    asked: BTreeMap<(usize, SessionId, SegmentId), u32>,
    refreshed: BTreeMap<(usize, SessionId), u32>,
    /// Whom a list revokes.
    revokes: BTreeMap<SegmentId, BTreeSet<usize>>,
    /// How sides of sessions ended that their machine ended.
    ended: BTreeMap<&'static str, u32>,
}

impl World {
    fn new(names: &[&str]) -> Self {
        let nodes = names
            .iter()
            .map(|name| Node {
                id: node_id(name),
                clock_ahead_ms: 0,
                store: RefCell::new(Store {
                    name: (*name).to_owned(),
                    ..Store::default()
                }),
                claims: RefCell::default(),
                registry: Registry::default(),
            })
            .collect();
        Self {
            now: Duration::ZERO,
            config: SessionConfig::default(),
            nodes,
            links: BTreeMap::new(),
            sent: 0,
            trace: Vec::new(),
            fetches: Vec::new(),
            slices: Vec::new(),
            mute: None,
            liar: None,
            events: Vec::new(),
            is_traced: true,
            asked: BTreeMap::new(),
            refreshed: BTreeMap::new(),
            revokes: BTreeMap::new(),
            ended: BTreeMap::new(),
        }
    }

    /// What a node takes for the time.
    fn clock(&self, node: usize) -> Duration {
        let ahead = self.nodes[node].clock_ahead_ms;
        let by = MS * u32::try_from(ahead.unsigned_abs()).unwrap();
        if ahead < 0 {
            self.now.saturating_sub(by)
        } else {
            self.now + by
        }
    }

    /// Whether a node holds a list that revokes one of the two.
    fn refuses(&self, node: usize, peer: usize) -> bool {
        let store = self.nodes[node].store.borrow();
        self.revokes.iter().any(|(list, revoked)| {
            store.by_id.contains_key(list) && (revoked.contains(&node) || revoked.contains(&peer))
        })
    }

    fn close_revoked(&mut self, node: usize) {
        for (a, b) in self.links.keys().copied().collect::<Vec<_>>() {
            if (a == node && self.refuses(a, b)) || (b == node && self.refuses(b, a)) {
                self.cut(a, b);
            }
        }
    }

    fn store(&self, node: usize) -> std::cell::RefMut<'_, Store> {
        self.nodes[node].store.borrow_mut()
    }

    fn side(&mut self, node: usize, peer: usize) -> Side {
        let entry = Entry {
            peer: self.nodes[peer].id.clone(),
            outbound: node < peer,
            papers: (),
            established: false,
            handle: (),
        };
        let session = self.nodes[node].registry.insert(entry).unwrap();
        let view = StoreView {
            store: &self.nodes[node].store,
            peer: &self.nodes[peer].id,
        };
        let machine = SessionMachine::new(
            self.config,
            local(self.nodes[node].id.as_str()),
            self.nodes[peer].id.clone(),
            KEY,
            self.clock(node),
            &view,
        );
        Side {
            node,
            session,
            machine,
            decoder: FrameDecoder::new(Channel::Control),
            busy_until: BTreeMap::new(),
            arrives: BTreeMap::new(),
        }
    }

    fn connect(&mut self, a: usize, b: usize) {
        if !self.links.contains_key(&(a, b)) {
            let sides = [self.side(a, b), self.side(b, a)];
            self.links.insert(
                (a, b),
                Link {
                    sides,
                    wires: Default::default(),
                    delay: Duration::ZERO,
                    is_impaired: false,
                },
            );
        }
    }

    /// The link goes down: whatever was on its way is lost, both machines die.
    fn cut(&mut self, a: usize, b: usize) {
        if let Some(link) = self.links.remove(&(a, b)) {
            for side in link.sides {
                if let Some(close) = side.machine.closed() {
                    *self.ended.entry(close.code.as_str()).or_default() += 1;
                }
                self.forget(&side);
            }
        }
    }

    fn forget(&mut self, side: &Side) {
        let node = &mut self.nodes[side.node];
        node.registry.remove(side.session);
        let released = node.claims.borrow_mut().release_session(side.session);
        self.released(side.node, &released);
    }

    fn released(&mut self, node: usize, ids: &[SegmentId]) {
        let now = self.clock(node);
        for link in self.links.values_mut() {
            for at in 0..2 {
                if link.sides[at].node == node {
                    let peer = self.nodes[link.sides[1 - at].node].id.clone();
                    let view = StoreView {
                        store: &self.nodes[node].store,
                        peer: &peer,
                    };
                    for id in ids {
                        link.sides[at].machine.handle_released(id, now, &view);
                    }
                }
            }
        }
    }

    fn restart(&mut self, node: usize) {
        let links: Vec<_> = self.links.keys().copied().collect();
        for (a, b) in links {
            if a == node || b == node {
                self.cut(a, b);
            }
        }
        assert!(
            self.nodes[node].claims.borrow().is_empty(),
            "claims die with their sessions"
        );
    }

    /// The node stores something by itself, and its sessions hear of it.
    fn seal(&mut self, node: usize, origin: &Origin, sequence: u64, size: usize) -> SegmentRef {
        let reference = self.store(node).make(origin, sequence, "", size);
        self.stored(node, &reference);
        reference
    }

    /// What this node may take has changed: its sessions compare everything.
    fn refresh(&mut self, node: usize) {
        let now = self.clock(node);
        for link in self.links.values_mut() {
            for at in 0..2 {
                if link.sides[at].node == node {
                    let peer = self.nodes[link.sides[1 - at].node].id.clone();
                    let view = StoreView {
                        store: &self.nodes[node].store,
                        peer: &peer,
                    };
                    let side = &mut link.sides[at];
                    side.machine.refresh(now, &view);
                    *self.refreshed.entry((node, side.session)).or_default() += 1;
                }
            }
        }
    }

    fn stored(&mut self, node: usize, reference: &SegmentRef) {
        let now = self.clock(node);
        for link in self.links.values_mut() {
            for at in 0..2 {
                if link.sides[at].node == node {
                    let peer = self.nodes[link.sides[1 - at].node].id.clone();
                    let view = StoreView {
                        store: &self.nodes[node].store,
                        peer: &peer,
                    };
                    let side = &mut link.sides[at];
                    side.machine.handle_stored(reference, now, &view);
                    if !side.machine.is_wanted(&reference.id) {
                        let claims = &self.nodes[node].claims;
                        claims.borrow_mut().release(side.session, &reference.id);
                    }
                }
            }
        }
        if reference.kind == Kind::Revocation {
            self.close_revoked(node);
        }
    }

    /// Moves everything that can move at this moment. Gives whether anything did.
    fn step(&mut self) -> bool {
        let mut moved = false;
        let keys: Vec<_> = self.links.keys().copied().collect();
        for key in keys {
            for at in 0..2 {
                moved |= self.step_side(key, at);
            }
            let closed = self.links.get(&key).is_some_and(|link| {
                link.sides
                    .iter()
                    .all(|side| side.machine.closed().is_some())
            });
            if closed {
                self.cut(key.0, key.1);
                moved = true;
            }
        }
        moved
    }

    fn step_side(&mut self, key: (usize, usize), at: usize) -> bool {
        let mut moved = false;
        let mut stored = Vec::new();
        let mut released = Vec::new();
        let Some(link) = self.links.get(&key) else {
            return false;
        };
        let node = link.sides[at].node;
        let peer_node = link.sides[1 - at].node;
        let is_refused = self.refuses(node, peer_node);
        let (world_now, now) = (self.now, self.clock(node));
        let Some(link) = self.links.get_mut(&key) else {
            return false;
        };
        let peer = self.nodes[peer_node].id.clone();
        let node_store = &self.nodes[node].store;
        let view = StoreView {
            store: node_store,
            peer: &peer,
        };

        // Arrivals.
        while let Some(entry) = link.wires[at].first_entry()
            && entry.key().0 <= world_now
        {
            moved = true;
            let side = &mut link.sides[at];
            match entry.remove() {
                Message::Control(bytes) => {
                    side.decoder.push(&bytes);
                    while let Some(frame) = side.decoder.next_frame().unwrap() {
                        if self.is_traced {
                            self.trace
                                .push(format!("{now:?} {} <- {:?}", self.nodes[node].id, frame));
                        }
                        side.machine.handle_frame(frame, now, &view);
                    }
                }
                Message::Segment(reference, content) => {
                    let id = reference.id;
                    let taken =
                        side.machine
                            .handle_segment(reference.kind, &id, content.len() as u64, now);
                    if taken.is_err() {
                        continue;
                    }
                    side.machine.handle_received(&id);
                    if SegmentId::of(&content) != id {
                        let refusal = Refusal {
                            code: "wrong_id",
                            message: "hash differs".into(),
                            fault: Fault::Peer,
                        };
                        side.machine.handle_failed(&id, refusal, now);
                    } else if node_store.borrow().is_full && !is_urgent(reference.kind) {
                        side.machine.handle_failed(&id, no_room(), now);
                    } else {
                        assert!(!is_refused, "INV-09");
                        node_store.borrow_mut().put(&reference, &content);
                        side.machine.handle_admitted(&id, now);
                        let claims = &self.nodes[node].claims;
                        claims.borrow_mut().release(side.session, &id);
                        let is_list = reference.kind == Kind::Revocation;
                        stored.push(reference);
                        if is_list {
                            // Who is revoked by it is closed before anything else arrives.
                            break;
                        }
                    }
                }
                Message::Slice(reference, range, slice) => {
                    let (id, kind) = (reference.id, reference.kind);
                    let length = slice.len() as u64;
                    let claims = &self.nodes[node].claims;
                    let take = side.machine.handle_slice(kind, &id, &range, length, now);
                    side.machine.handle_slice_received(&id, range.start);
                    let taken = match take {
                        Ok(TakeSlice::Write) => {
                            node_store.borrow_mut().accept(&reference, &range, &slice)
                        }
                        Ok(TakeSlice::Discard) | Err(_) => continue,
                    };
                    assert!(!is_refused, "INV-09");
                    claims
                        .borrow_mut()
                        .release_range(side.session, &id, range.start);
                    side.machine.handle_slice_over(&id, range.start, now);
                    match taken {
                        Ok(None) => {}
                        Ok(Some(content)) => {
                            node_store.borrow_mut().put(&reference, &content);
                            side.machine.handle_admitted(&id, now);
                            claims.borrow_mut().release(side.session, &id);
                            stored.push(reference);
                        }
                        Err(error) => {
                            let refusal = Refusal {
                                code: "slice",
                                message: error.to_string(),
                                fault: Fault::Peer,
                            };
                            side.machine.handle_failed(&id, refusal, now);
                        }
                    }
                }
            }
        }

        let side = &mut link.sides[at];
        if side.machine.poll_timeout().is_some_and(|due| due <= now) {
            side.machine.handle_timeout(now, &view);
            moved = true;
        }
        // Wants.
        while let Some(reference) = side.machine.poll_want(now).cloned() {
            moved = true;
            let mut claims = self.nodes[node].claims.borrow_mut();
            if is_ranged(&reference, &self.nodes[node].id) {
                if node_store.borrow().is_full {
                    drop(claims);
                    side.machine.handle_failed(&reference.id, no_room(), now);
                    continue;
                }
                let missing = node_store.borrow_mut().missing(&reference);
                match claims.lease(side.session, &reference, &missing, now) {
                    Ok(range) => {
                        let asked = side.machine.fetch_range(&reference.id, &range, now);
                        if asked == Asked::NotNow {
                            claims.release_range(side.session, &reference.id, range.start);
                            side.machine.hold_until(reference.kind, now + MS);
                        }
                    }
                    Err(Busy::Elsewhere) => side.machine.defer(&reference.id),
                    Err(Busy::NoRoom) => side.machine.hold_until(reference.kind, now + MS),
                }
                continue;
            }
            match claims.claim(side.session, &reference, now) {
                Ok(()) => {
                    side.machine.fetch(&reference.id, now);
                    let asked = (node, side.session, reference.id);
                    *self.asked.entry(asked).or_default() += 1;
                    self.fetches.push((node, reference));
                }
                Err(Busy::Elsewhere) => side.machine.defer(&reference.id),
                Err(Busy::NoRoom) => side.machine.hold_until(reference.kind, now + MS),
            }
        }
        // What the other side asked for.
        while let Some(serve) = link.sides[at].machine.poll_serve() {
            moved = true;
            let side = &mut link.sides[at];
            assert!(side.machine.is_established(), "INV-09");
            if self.mute == Some(node) {
                continue;
            }
            let id = serve.reference.id;
            let key = serve.key();
            let mut content = node_store.borrow().by_id[&id].1.clone();
            if let Some(range) = &serve.range {
                let outboard = bao::Outboard::of(&content).unwrap();
                let read = |offset, buffer: &mut [u8]| bao::copy_from(&content, offset, buffer);
                content = bao::encode_range::<bao::BaoError>(&outboard, range, read).unwrap();
                self.slices.push((node, range.clone()));
            }
            if self.liar == Some(node) {
                content[0] ^= 1;
            }
            let busy = side.busy_until.entry(serve.reference.kind).or_default();
            let size = u32::try_from(content.len()).unwrap();
            *busy = (*busy).max(world_now) + BYTE * size;
            let written = *busy;
            side.machine.handle_served(&key);
            self.sent += 1;
            let message = match serve.range {
                None => Message::Segment(serve.reference, content),
                Some(range) => Message::Slice(serve.reference, range, content),
            };
            link.send(at, written, self.sent, message);
        }
        while let Some(frame) = link.sides[at].machine.poll_frame() {
            moved = true;
            self.sent += 1;
            let bytes = frame.encode().unwrap();
            link.send(at, world_now, self.sent, Message::Control(bytes));
        }
        let side = &mut link.sides[at];
        while let Some(event) = side.machine.poll_event() {
            if let SessionEvent::TransferFailed { reference, .. }
            | SessionEvent::FetchRefused { reference, .. } = &event
            {
                let mut claims = self.nodes[node].claims.borrow_mut();
                claims.release(side.session, &reference.id);
                released.push(reference.id);
            }
            link.is_impaired |= match &event {
                SessionEvent::FetchRefused { .. } => true,
                SessionEvent::TransferFailed { refusal, .. } => refusal.fault == Fault::Peer,
                _ => false,
            };
            self.events.push((node, event));
        }
        for reference in stored {
            self.stored(node, &reference);
        }
        self.released(node, &released);
        moved
    }

    fn next_time(&self) -> Option<Duration> {
        self.links
            .values()
            .flat_map(|link| {
                let wires = link
                    .wires
                    .iter()
                    .filter_map(|wire| wire.keys().next().map(|key| key.0));
                let timers = link.sides.iter().filter_map(|side| {
                    // How long it is until then is the same on every clock.
                    let due = side.machine.poll_timeout()?;
                    Some(self.now + due.saturating_sub(self.clock(side.node)))
                });
                wires.chain(timers).collect::<Vec<_>>()
            })
            .min()
    }

    fn run_until(&mut self, end: Duration) {
        let mut rounds = 0;
        loop {
            while self.step() {
                rounds += 1;
                assert!(rounds < 1_000_000, "the world does not come to rest");
            }
            match self.next_time() {
                Some(next) if next <= end => self.now = self.now.max(next),
                _ => break,
            }
        }
        self.now = end;
    }

    fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    fn machine(&self, a: usize, b: usize, node: usize) -> &SessionMachine {
        let link = &self.links[&(a, b)];
        &link
            .sides
            .iter()
            .find(|side| side.node == node)
            .unwrap()
            .machine
    }
}

fn assert_converged(world: &World) {
    // Everybody holds what anybody holds; of a CA only the newest list counts. Who is revoked is out.
    let out: BTreeSet<usize> = world.revokes.values().flatten().copied().collect();
    let nodes: Vec<&Node> = world
        .nodes
        .iter()
        .enumerate()
        .filter_map(|(at, node)| (!out.contains(&at)).then_some(node))
        .collect();
    let newest: BTreeSet<SegmentId> = nodes
        .iter()
        .flat_map(|node| {
            node.store
                .borrow()
                .by_id
                .values()
                .cloned()
                .collect::<Vec<_>>()
        })
        .filter(|(reference, _)| reference.kind != Kind::Revocation)
        .map(|(reference, _)| reference.id)
        .collect();
    let top_crl = |node: &Node| {
        node.store
            .borrow()
            .by_id
            .values()
            .filter(|(reference, _)| reference.kind == Kind::Revocation)
            .map(|(reference, _)| reference.sequence)
            .max()
    };
    let top = nodes.iter().copied().map(top_crl).max().flatten();
    // Ruling 5: and of that number all lists that anybody has.
    let lists = |node: &Node| -> BTreeSet<SegmentId> {
        let store = node.store.borrow();
        let held = store.by_id.values().map(|(reference, _)| reference);
        held.filter(|held| held.kind == Kind::Revocation && Some(held.sequence) == top)
            .map(|held| held.id)
            .collect()
    };
    let all: BTreeSet<SegmentId> = nodes.iter().copied().flat_map(lists).collect();
    for node in nodes {
        let held = node.store.borrow();
        let missing = newest.difference(&held.ids()).count();
        assert_eq!(missing, 0, "{} lacks {missing} segments", node.id);
        drop(held);
        assert_eq!(top_crl(node), top, "{} has an old list", node.id);
        assert_eq!(lists(node), all, "{} lacks a conflicting list", node.id);
    }
}

#[test]
fn a_pair_converges_and_then_falls_silent() {
    let mut world = World::new(&["a", "b"]);
    for sequence in 0..40 {
        world.store(0).make(&audit_origin("a"), sequence, "", 500);
        world.store(1).make(&audit_origin("b"), sequence, "", 500);
    }
    world.store(0).make(&policy_origin(), 3, "", 2_000);
    world.store(1).make(&crl_origin(), 7, "", 900);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert_converged(&world);
    let fetched = world.fetches.len();
    assert_eq!(fetched, 82, "each segment once");
    let frames = world.sent;
    world.run_for(Duration::from_secs(3600));
    assert_eq!(world.sent, frames, "an idle session says nothing");
    assert!(world.machine(0, 1, 0).is_established());
    // Contact again: equal states compare by one digest, nothing is listed.
    world.cut(0, 1);
    world.trace.clear();
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    let heads = world
        .trace
        .iter()
        .filter(|line| line.contains("Heads"))
        .count();
    assert_eq!((heads, world.fetches.len()), (0, fetched));
}

#[test]
fn news_spread_at_once_over_live_sessions() {
    let names = ["a", "b", "c", "d"];
    let mut world = World::new(&names);
    for at in 0..3 {
        world.connect(at, at + 1);
    }
    world.run_for(Duration::from_secs(1));
    let before = world.now;
    let crl = world.seal(0, &crl_origin(), 1, 800);
    // A line of four: each hop is heads, list, refs, fetch, segment, with latency and no waiting.
    world.run_for((LATENCY * 5 + BYTE * 800) * 3 + MS);
    for node in &world.nodes {
        assert!(
            node.store.borrow().by_id.contains_key(&crl.id),
            "{} since {before:?}",
            node.id
        );
    }
}

#[test]
fn inv_11_urgent_kinds_overtake_a_bulk_transfer_in_flight() {
    let mut world = World::new(&["a", "b"]);
    for sequence in 0..200 {
        world
            .store(0)
            .make(&audit_origin("a"), sequence, "", 50_000);
    }
    world.connect(0, 1);
    // 200 x 50 ms of transfer; in the middle of it a CRL and a bundle appear.
    world.run_for(Duration::from_secs(3));
    let before = world.store(1).by_id.len();
    assert!(
        before > 20 && before < 150,
        "the control: the transfer is in flight, {before} done"
    );
    let bundle = world.seal(0, &policy_origin(), 1, 3_000);
    let crl = world.seal(0, &crl_origin(), 1, 3_000);
    world.run_for(LATENCY * 6 + BYTE * 3_000);
    assert!(world.store(1).by_id.contains_key(&crl.id));
    assert!(world.store(1).by_id.contains_key(&bundle.id));
    assert!(
        world.store(1).by_id.len() < 150,
        "the bulk is still on its way"
    );
    world.run_for(Duration::from_secs(20));
    assert_converged(&world);
}

#[test]
fn inv_11_fetches_are_made_in_the_order_of_urgency_then_age() {
    // Many origins with very different lengths: lists arrive in pages, the order must not show it.
    let mut world = World::new(&["a", "z"]);
    let mut seeded = Random::new(11);
    for origin in 0..8 {
        // One of them is longer than a page.
        let length = if origin == 3 {
            800
        } else {
            1 + seeded.below(120) as u64
        };
        for sequence in 0..length {
            world
                .store(0)
                .make(&audit_origin(&format!("n{origin}")), sequence, "", 60);
        }
    }
    for sequence in 1..30 {
        world.store(0).make(&policy_origin(), sequence, "", 60);
    }
    world.store(0).make(&crl_origin(), 4, "", 60);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(300));
    assert_converged(&world);
    let order: Vec<WantKey> = world
        .fetches
        .iter()
        .map(|(_, reference)| SessionMachine::key_of(reference))
        .collect();
    assert_eq!(order.len(), world.store(0).by_id.len());
    let mut sorted = order.clone();
    sorted.sort();
    assert!(order == sorted, "fetches are out of order");
    assert_eq!(order[0].0, Kind::Revocation);
}

#[test]
fn what_is_lost_while_a_session_opens_comes_back_over_it() {
    let mut world = World::new(&["a", "b"]);
    world.store(0).make(&audit_origin("x"), 0, "", 60);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert_converged(&world);
    world.cut(0, 1);
    // Both greet as equals, and then one of them no longer holds what it greeted with.
    world.connect(0, 1);
    let lost = *world.store(1).ids().first().unwrap();
    world.store(1).by_id.remove(&lost);
    world.store(1).puts.remove(&lost);
    world.refresh(1);
    world.run_for(Duration::from_secs(5));
    assert_converged(&world);
    assert!(world.store(1).by_id.contains_key(&lost));
}

#[test]
fn inv_11_nothing_overtakes_what_is_not_listed_yet() {
    let (first, second) = (audit_origin("x"), audit_origin("y"));
    let page = |origin, id: u8| {
        let entry = RefEntry {
            id: [id; 32],
            sequence: 0,
            size_bytes: 50,
            prev: None,
        };
        Frame::Refs(Refs {
            lists: vec![RefList {
                origin,
                refs: vec![entry],
                done: true,
            }],
        })
    };
    let want = |bench: &Bench| bench.machine.poll_want(MS).map(|want| want.origin.clone());
    // The list of the second origin comes first: its segment waits for the first one's.
    let mut bench = Bench::established();
    bench.give(heads(vec![new_head(0, &second, &[(0, 0)])]));
    bench.give(heads(vec![new_head(1, &first, &[(0, 0)])]));
    bench.give(page(0, 1));
    assert_eq!(want(&bench), None);
    bench.give(page(1, 2));
    assert_eq!(want(&bench), Some(first.clone()));
    // A round of heads that is not complete yet may still name something more urgent.
    let mut bench = Bench::established();
    let entries = vec![new_head(0, &second, &[(0, 0)])];
    bench.give(Frame::Heads(Heads {
        entries,
        more: true,
    }));
    bench.give(page(0, 1));
    assert_eq!(want(&bench), None);
    bench.give(Frame::Heads(Heads {
        entries: vec![],
        more: false,
    }));
    assert_eq!(want(&bench), Some(second));
}

#[test]
fn inv_11_same_inputs_same_course() {
    let run = || {
        let mut world = random_world(5, 77);
        world.run_for(Duration::from_secs(60));
        (world.trace, world.fetches)
    };
    let (first, second) = (run(), run());
    assert!(first.0.len() > 100, "the control: something happened");
    assert!(first == second);
}

/// A ring with chords and everybody's segments.
fn random_world(size: usize, seed: u64) -> World {
    let names: Vec<String> = (0..size).map(|at| format!("n{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = World::new(&names);
    let mut seeded = Random::new(seed);
    for (at, name) in names.iter().enumerate() {
        for sequence in 0..seeded.below(60) as u64 {
            let size = 100 + seeded.below(3_000);
            world
                .store(at)
                .make(&audit_origin(name), sequence, "", size);
        }
        if at % 2 == 0 {
            world.store(at).make(&policy_origin(), at as u64, "", 700);
            world.store(at).make(&crl_origin(), at as u64, "", 700);
        }
    }
    for at in 0..size {
        let next = (at + 1) % size;
        world.connect(at.min(next), at.max(next));
    }
    world
}

#[test]
fn inv_08_many_peers_cuts_and_restarts_and_still_everything_is_stored_once() {
    for seed in 0..12 {
        let size = 6;
        let mut world = random_world(size, seed);
        let mut seeded = Random::new(seed ^ 0xfeed);
        let mut next_sequence = vec![1_000u64; size];
        for _ in 0..200 {
            world.run_for(MS * u32::try_from(seeded.below(40)).unwrap());
            let a = seeded.below(size);
            let b = seeded.below(size);
            let (low, high) = (a.min(b), a.max(b));
            match seeded.below(8) {
                0 | 1 if low != high => world.cut(low, high),
                2..=4 if low != high => world.connect(low, high),
                5 => world.restart(a),
                6 => {
                    next_sequence[a] += 1 + seeded.below(2) as u64;
                    let name = format!("n{a}");
                    world.seal(a, &audit_origin(&name), next_sequence[a], 300);
                }
                _ => {
                    // The same segment comes in by another door: import from media.
                    let copy = world.store(b).by_id.values().next().cloned();
                    if let Some((reference, content)) = copy
                        && world.store(a).put(&reference, &content)
                    {
                        world.stored(a, &reference);
                    }
                }
            }
        }
        for at in 0..size {
            let next = (at + 1) % size;
            world.connect(at.min(next), at.max(next));
        }
        world.run_for(Duration::from_secs(120));
        assert_converged(&world);
        for node in &world.nodes {
            let store = node.store.borrow();
            assert!(
                store.puts.values().all(|puts| *puts == 1),
                "seed {seed}: written twice"
            );
            assert!(
                node.claims.borrow().is_empty(),
                "seed {seed}: a claim was left behind"
            );
        }
        for link in world.links.values() {
            for side in &link.sides {
                assert_eq!(side.machine.backlog(), 0);
                assert_eq!((side.machine.in_flight, side.machine.bulk_bytes), (0, 0));
                assert_eq!((side.machine.owed, side.machine.faults), (0, 0));
            }
        }
    }
}

#[test]
fn inv_08_without_cuts_nothing_crosses_a_wire_twice() {
    // Everybody is linked to everybody and one node has everything.
    let names = ["a", "b", "c", "d", "e"];
    let mut world = World::new(&names);
    for sequence in 0..300 {
        world.store(0).make(&audit_origin("a"), sequence, "", 400);
    }
    for a in 0..names.len() {
        for b in a + 1..names.len() {
            world.connect(a, b);
        }
    }
    world.run_for(Duration::from_secs(60));
    assert_converged(&world);
    let asked: BTreeSet<(usize, SegmentId)> = world
        .fetches
        .iter()
        .map(|(node, reference)| (*node, reference.id))
        .collect();
    assert_eq!(asked.len(), 4 * 300);
    assert_eq!(
        world.fetches.len(),
        asked.len(),
        "a segment was asked for twice by one node"
    );
    assert!(
        world
            .nodes
            .iter()
            .all(|node| node.store.borrow().duplicates == 0)
    );
    // And the work was shared: the others fetched from each other as well.
    let from_a = world.fetches.len() - world.links.keys().filter(|(a, _)| *a != 0).count();
    assert!(from_a > 0);
}

#[test]
fn inv_12_the_third_bad_segment_ends_the_session_and_none_is_asked_for_again() {
    let mut world = World::new(&["a", "b"]);
    for sequence in 0..10 {
        world.store(0).make(&audit_origin("a"), sequence, "", 400);
    }
    world.liar = Some(0);
    world.config.max_in_flight = 1;
    world.connect(0, 1);
    world.run_for(Duration::from_secs(60));
    assert_eq!(world.store(1).by_id.len(), 0, "nothing of it is stored");
    assert_eq!(world.fetches.len(), 3);
    let ids: BTreeSet<_> = world
        .fetches
        .iter()
        .map(|(_, reference)| reference.id)
        .collect();
    assert_eq!(ids.len(), 3, "each was asked for once");
    assert!(world.links.is_empty(), "the session is over");
    // The control: an honest node at the next contact delivers the same segments.
    world.liar = None;
    world.connect(0, 1);
    world.run_for(Duration::from_secs(60));
    assert_converged(&world);
}

#[test]
fn a_peer_without_room_is_offered_again_when_it_has_room() {
    let mut world = World::new(&["a", "b"]);
    world.store(0).make(&audit_origin("a"), 0, "", 400);
    world.store(0).make(&audit_origin("a"), 1, "", 90_000);
    world.store(1).no_room_above = Some(1_000);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert_eq!(
        world.store(1).by_id.len(),
        1,
        "the control: what fits is taken"
    );
    world.store(1).no_room_above = None;
    world.run_for(Duration::from_secs(5));
    assert_eq!(world.store(1).by_id.len(), 1, "no timer asks again");
    let now = world.now;
    let peer = node_id("a");
    let World { links, nodes, .. } = &mut world;
    let view = StoreView {
        store: &nodes[1].store,
        peer: &peer,
    };
    links.get_mut(&(0, 1)).unwrap().sides[1]
        .machine
        .refresh(now, &view);
    world.run_for(Duration::from_secs(5));
    assert_converged(&world);
}

#[test]
fn what_was_lost_on_disk_comes_back_on_the_live_session() {
    let mut world = World::new(&["a", "b"]);
    for sequence in 0..5 {
        world.store(0).make(&audit_origin("x"), sequence, "", 400);
    }
    // Both hold the same, so the session begins with equal digests and no heads.
    let copies: Vec<_> = world.store(0).by_id.values().cloned().collect();
    for (reference, content) in &copies {
        world.store(1).put(reference, content);
    }
    world.connect(0, 1);
    world.run_for(Duration::from_secs(1));
    assert!(world.fetches.is_empty(), "the control");
    let lost = copies[2].0.id;
    world.store(1).by_id.remove(&lost);
    let now = world.now;
    let peer = node_id("a");
    let World { links, nodes, .. } = &mut world;
    let view = StoreView {
        store: &nodes[1].store,
        peer: &peer,
    };
    links.get_mut(&(0, 1)).unwrap().sides[1]
        .machine
        .refresh(now, &view);
    world.run_for(Duration::from_secs(1));
    assert!(world.store(1).by_id.contains_key(&lost));
}

#[test]
fn receipts_are_asked_for_and_given_for_own_audit_only() {
    let mut world = World::new(&["a", "b", "c"]);
    for sequence in 0..70 {
        world.store(0).make(&audit_origin("a"), sequence, "", 200);
    }
    world.connect(0, 1);
    world.connect(0, 2);
    world.connect(1, 2);
    world.run_for(Duration::from_secs(20));
    let store = world.store(0);
    assert_eq!(store.receipts.len(), 70);
    for custodians in store.receipts.values() {
        assert_eq!(
            custodians.iter().map(String::as_str).collect::<Vec<_>>(),
            ["b", "c"]
        );
    }
    drop(store);
    assert!(world.store(1).receipts.is_empty() && world.store(2).receipts.is_empty());
    // A later seal on the live session brings its receipts by itself.
    let sealed = world.seal(0, &audit_origin("a"), 70, 200);
    world.run_for(Duration::from_secs(1));
    assert_eq!(world.store(0).receipts[&sealed.id].len(), 2);
}

#[test]
fn of_a_ca_only_the_newest_list_is_fetched_and_conflicting_ones_are_both_held() {
    let mut world = World::new(&["a", "b"]);
    for number in [3, 9, 40] {
        world.store(0).make(&crl_origin(), number, "", 300);
    }
    world.connect(0, 1);
    world.run_for(Duration::from_secs(1));
    let got: Vec<u64> = world
        .fetches
        .iter()
        .map(|(_, reference)| reference.sequence)
        .collect();
    assert_eq!(got, [40]);
    world.cut(0, 1);
    // Ruling 5: two lists of one number; the union of both must hold on both sides.
    let mut world = World::new(&["a", "b"]);
    let one = world.store(0).make(&crl_origin(), 5, "one", 300);
    let two = world.store(1).make(&crl_origin(), 5, "two", 300);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(1));
    assert!(world.store(0).by_id.contains_key(&two.id));
    assert!(world.store(1).by_id.contains_key(&one.id));
}

/// Node 0 holds so many lists of number 5 and node 1 the last of them by id; `older` says which side
/// holds an older list too.
fn conflicting_lists(count: usize, older: Option<usize>) -> World {
    let world = World::new(&["a", "b"]);
    let lists: Vec<SegmentRef> = (0..count)
        .map(|at| {
            let salt = at.to_string();
            world.store(0).make(&crl_origin(), 5, &salt, 300)
        })
        .collect();
    let last = lists.into_iter().max_by_key(|list| list.id).unwrap();
    let (reference, content) = world.store(0).by_id[&last.id].clone();
    world.store(1).put(&reference, &content);
    if let Some(node) = older {
        world.store(node).make(&crl_origin(), 3, "", 300);
    }
    world
}

#[test]
fn a_conflicting_list_is_fetched_by_a_node_that_holds_the_last_one() {
    // The digest named the last list only, so two nodes of which one held a conflicting list more took
    // each other for equal; and a list that a head named was dropped for its number.
    for count in 2..=4 {
        for older in [None, Some(0), Some(1)] {
            let mut world = conflicting_lists(count, older);
            world.connect(0, 1);
            world.run_for(Duration::from_secs(1));
            let held = world.store(1).by_id.len();
            let own = usize::from(older == Some(1));
            assert_eq!(
                held,
                count + own,
                "{count} lists, {older:?} has an older one"
            );
            assert_converged(&world);
            let sent = world.sent;
            world.run_for(Duration::from_secs(60));
            assert_eq!(world.sent, sent, "and then it is quiet");
        }
    }
    let mut control = conflicting_lists(1, None);
    control.connect(0, 1);
    control.run_for(Duration::from_secs(1));
    assert!(control.fetches.is_empty(), "the control");
}

#[test]
fn every_further_list_of_one_number_arrives_in_the_same_session() {
    // The third was more than a head carries, and its number had been listed in the session already.
    let mut world = World::new(&["a", "b"]);
    world.connect(0, 1);
    for at in 0..5 {
        let salt = at.to_string();
        let list = world.store(0).make(&crl_origin(), 5, &salt, 300);
        world.stored(0, &list);
        world.run_for(Duration::from_secs(1));
        assert_eq!(world.store(1).by_id.len(), at + 1);
    }
    assert_eq!(world.fetches.len(), 5, "each once");
}

#[test]
fn segments_of_one_number_are_never_split_by_a_page() {
    // Policies with one to three sets of signatures, listed in the smallest pages.
    let mut bench = Bench::new();
    bench.store.borrow_mut().by_id.clear();
    let mut made = 0;
    for sequence in 0..30 {
        for salt in 0..1 + sequence % 3 {
            bench
                .store
                .borrow_mut()
                .make(&policy_origin(), sequence, &salt.to_string(), 60);
            made += 1;
        }
    }
    bench.give(hello(|_| {})).give(ack());
    bench.frames();
    for max in [1, 2, 5, 504] {
        let (mut from, mut seen) = (0, BTreeSet::new());
        loop {
            bench.give(Frame::ListRefs(ListRefs {
                lists: vec![ListAsked {
                    origin: 0,
                    from,
                    to: u64::MAX,
                    max,
                }],
            }));
            let Some(Frame::Refs(mut answer)) = bench.frames().pop() else {
                panic!("no answer")
            };
            let page = answer.lists.pop().unwrap();
            seen.extend(page.refs.iter().map(|entry| entry.id));
            if page.done {
                break;
            }
            from = page.refs.last().unwrap().sequence + 1;
        }
        assert_eq!(seen.len(), made, "in pages of {max}");
    }
}

#[test]
fn a_fork_of_an_audit_log_is_seen_and_a_second_signature_on_a_policy_is_none() {
    let mut world = World::new(&["a", "b"]);
    world
        .store(0)
        .make(&policy_origin(), 5, "one signature", 300);
    world
        .store(1)
        .make(&policy_origin(), 5, "two signatures", 300);
    let ours = world.store(0).make(&audit_origin("x"), 0, "one", 300);
    let theirs = world.store(1).make(&audit_origin("x"), 0, "other", 300);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(1));
    let forks: Vec<_> = world
        .events
        .iter()
        .filter(|(_, event)| matches!(event, SessionEvent::ForkSuspected { .. }))
        .cloned()
        .collect();
    let expected = |ours: &SegmentRef, theirs: &SegmentRef| SessionEvent::ForkSuspected {
        origin: audit_origin("x"),
        sequence: 0,
        ours: ours.id,
        theirs: theirs.id,
    };
    assert_eq!(forks.len(), 2);
    assert!(forks.contains(&(0, expected(&ours, &theirs))));
    assert!(forks.contains(&(1, expected(&theirs, &ours))));
    assert!(world.fetches.is_empty());
}

/// An emergency of an epoch of which another bundle waited for its time was never even listed.
#[test]
fn another_segment_of_a_number_that_is_open_is_fetched() {
    let mut world = World::new(&["a", "b"]);
    let emergency = world.store(0).make(&policy_origin(), 5, "emergency", 300);
    for node in [0, 1] {
        world.store(node).make(&policy_origin(), 7, "last", 300);
    }
    world.store(1).make(&policy_origin(), 5, "waits", 300);
    world.store(1).make(&policy_origin(), 6, "of its own", 300);
    world.store(1).open_number = Some(5);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(1));
    assert!(world.store(1).by_id.contains_key(&emergency.id));
    assert_eq!(world.store(0).by_id.len(), 3, "and 6, but no other 5");
    // What comes later in the same session too.
    let another = world.store(0).make(&policy_origin(), 5, "another", 300);
    world.stored(0, &another);
    world.run_for(Duration::from_secs(1));
    assert!(world.store(1).by_id.contains_key(&another.id));
}

/// Node a's root was put back: it holds the begin of its log, and b holds more of it.
fn put_back(own: u64, theirs: u64) -> World {
    let world = World::new(&["a", "b"]);
    for sequence in 0..own {
        world.store(0).make(&audit_origin("a"), sequence, "", 500);
    }
    for sequence in 0..theirs {
        world.store(1).make(&audit_origin("a"), sequence, "", 500);
    }
    world.store(0).own_from = Some(0);
    world
}

fn next_log() -> Origin {
    Origin::parse("audit/a/0123456789abcdef/1").unwrap()
}

/// What b asked for.
fn asked_by_b(world: &World) -> Vec<&SegmentRef> {
    let by_b = world.fetches.iter().filter(|(node, _)| *node == 1);
    by_b.map(|(_, reference)| reference).collect()
}

/// The story: a root was put back to an older copy in its very place. The node would have sent what
/// it sealed since, and its peers would have had proof of a fork.
#[test]
fn inv_17_a_later_head_of_the_own_log_is_fetched_before_own_audit_leaves() {
    let mut world = put_back(3, 6);
    // Sealed by the old copy, in a place that b knows otherwise, and in a log that b does not know.
    world.store(0).make(&audit_origin("a"), 3, "stale", 500);
    world.store(0).make(&next_log(), 0, "", 500);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    for sequence in 3..6 {
        let id = world
            .store(1)
            .make(&audit_origin("a"), sequence, "", 500)
            .id;
        assert!(world.store(0).by_id.contains_key(&id), "{sequence}");
    }
    let stale = world.store(0).make(&audit_origin("a"), 3, "stale", 500);
    let asked = asked_by_b(&world);
    assert!(!asked.contains(&&stale), "{asked:?}");
    // The node sets its own aside, and begins its next log.
    world.store(0).by_id.remove(&stale.id);
    let next = world.seal(0, &next_log(), 1, 500);
    world.run_for(Duration::from_secs(5));
    assert!(world.store(1).by_id.contains_key(&next.id));
    assert!(
        asked_by_b(&world)
            .iter()
            .all(|asked| asked.origin == next_log())
    );
}

#[test]
fn own_audit_leaves_at_once_where_the_peer_knows_less_or_nothing() {
    for theirs in [0, 2] {
        let mut world = put_back(4, theirs);
        world.connect(0, 1);
        world.run_for(Duration::from_secs(5));
        assert_converged(&world);
        assert!(world.fetches.iter().all(|(node, _)| *node == 1));
    }
}

#[test]
fn own_audit_is_not_offered_before_the_heads_of_the_peer() {
    let mut world = put_back(2, 0);
    world.store(1).make(&policy_origin(), 1, "", 500);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert_converged(&world);
    let at = |wanted: &dyn Fn(&String) -> bool| world.trace.iter().position(wanted).unwrap();
    let theirs = at(&|line| line.contains(" a <- Heads"));
    let ours = at(&|line| line.contains(" b <- Heads") && line.contains("audit/a"));
    assert!(theirs < ours, "{:#?}", world.trace);
}

#[test]
fn a_hole_in_the_own_log_is_filled_and_holds_nothing_back() {
    let mut world = put_back(5, 5);
    let lost = world.store(0).make(&audit_origin("a"), 2, "", 500);
    world.store(0).by_id.remove(&lost.id);
    let next = world.store(0).make(&audit_origin("a"), 5, "", 500);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert!(world.store(0).by_id.contains_key(&lost.id));
    assert!(world.store(1).by_id.contains_key(&next.id));
    let by_a = world.fetches.iter().filter(|(node, _)| *node == 0);
    assert_eq!(by_a.count(), 1);
}

#[test]
fn what_was_evicted_of_the_own_log_is_not_even_listed() {
    let mut world = put_back(6, 6);
    let evicted: Vec<SegmentId> = (0..4)
        .map(|sequence| {
            world
                .store(0)
                .make(&audit_origin("a"), sequence, "", 500)
                .id
        })
        .collect();
    for id in evicted {
        world.store(0).by_id.remove(&id);
    }
    world.store(0).own_from = Some(4);
    let next = world.store(0).make(&audit_origin("a"), 6, "", 500);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(5));
    assert!(world.store(1).by_id.contains_key(&next.id));
    assert!(world.fetches.iter().all(|(node, _)| *node == 1));
    assert!(
        !world
            .trace
            .iter()
            .any(|line| line.contains(" b <- ListRefs"))
    );
}

/// A peer that claims a later head and cannot give it is not told of own audit, and is not asked for
/// ever; the others are told all the same.
#[test]
fn inv_12_a_claimed_head_that_is_no_head_costs_three_transfers() {
    let mut world = World::new(&["a", "b", "c"]);
    for sequence in 0..3 {
        world.store(0).make(&audit_origin("a"), sequence, "", 500);
    }
    for sequence in 0..9 {
        world
            .store(1)
            .make(&audit_origin("a"), sequence, "forged", 500);
    }
    world.store(0).own_from = Some(0);
    world.liar = Some(1);
    world.connect(0, 1);
    world.connect(0, 2);
    world.run_for(Duration::from_secs(5));
    let by_a = world.fetches.iter().filter(|(node, _)| *node == 0);
    assert!(by_a.count() <= 9);
    assert!(
        !world.links.contains_key(&(0, 1)),
        "three faults end the session"
    );
    assert!(asked_by_b(&world).is_empty());
    assert_eq!(world.store(2).by_id.len(), 3);
    assert_eq!(world.store(0).by_id.len(), 3);
}

#[test]
fn a_want_waits_for_the_other_session_and_is_taken_over_when_that_one_dies() {
    let mut world = World::new(&["a", "b", "c"]);
    let big = world.store(0).make(&audit_origin("x"), 0, "", 200_000);
    let (reference, content) = world.store(0).by_id[&big.id].clone();
    world.store(1).put(&reference, &content);
    world.connect(0, 2);
    world.connect(1, 2);
    world.run_for(MS * 200);
    assert_eq!(world.fetches.len(), 1, "two peers offer it, one is asked");
    world.cut(0, 2);
    world.run_for(Duration::from_secs(5));
    assert_eq!(world.fetches.len(), 2);
    assert!(world.store(2).by_id.contains_key(&big.id));
}

// ---- One machine by hand ----

struct Bench {
    store: RefCell<Store>,
    peer: NodeId,
    machine: SessionMachine,
}

impl Bench {
    fn new() -> Self {
        let store = RefCell::new(Store {
            name: "a".into(),
            ..Store::default()
        });
        store.borrow_mut().make(&policy_origin(), 1, "", 100);
        let peer = node_id("b");
        let machine = SessionMachine::new(
            SessionConfig::default(),
            local("a"),
            peer.clone(),
            KEY,
            Duration::ZERO,
            &StoreView {
                store: &store,
                peer: &peer,
            },
        );
        Self {
            store,
            peer,
            machine,
        }
    }

    fn give(&mut self, frame: Frame) -> &mut Self {
        let view = StoreView {
            store: &self.store,
            peer: &self.peer,
        };
        self.machine.handle_frame(frame, MS, &view);
        self
    }

    fn timeout(&mut self, now: Duration) {
        let view = StoreView {
            store: &self.store,
            peer: &self.peer,
        };
        self.machine.handle_timeout(now, &view);
    }

    /// The other side has listed one big segment of `b`'s audit.
    fn listed_big() -> Self {
        let mut bench = Self::established();
        bench.give(heads(vec![new_head(0, &audit_origin("b"), &[(1, 1)])]));
        let mut entry = reference_entry(1);
        entry.size_bytes = BIG as u64;
        bench.give(Frame::Refs(Refs {
            lists: vec![RefList {
                origin: 0,
                refs: vec![entry],
                done: true,
            }],
        }));
        bench
    }

    fn established() -> Self {
        let mut bench = Self::new();
        bench.give(hello(|_| {})).give(ack());
        assert!(bench.machine.is_established());
        bench
    }

    fn code(&self) -> Option<CloseCode> {
        self.machine.closed().map(|close| close.code)
    }

    fn frames(&mut self) -> Vec<Frame> {
        std::iter::from_fn(|| self.machine.poll_frame()).collect()
    }
}

fn hello(change: impl FnOnce(&mut Hello)) -> Frame {
    let mut hello = Hello {
        version: PROTOCOL_VERSION,
        domain: "site".into(),
        node_id: "b".into(),
        limits: WireLimits {
            kinds: 0b1_1110,
            max_segment_bytes: 4_000_000,
            custody_free_bytes: 0,
            max_in_flight: 8,
        },
        posture: 0,
        endorsement: None,
        state_digest: [0; 32],
    };
    change(&mut hello);
    Frame::Hello(Box::new(hello))
}

fn ack() -> Frame {
    Frame::HelloAck(HelloAck {
        frames_per_second: 1,
        in_bytes_per_second: 2,
        in_bytes_left_today: 3,
        out_bytes_per_second: 4,
    })
}

fn new_head(index: u32, origin: &Origin, ranges: &[(u64, u64)]) -> HeadEntry {
    HeadEntry {
        origin: OriginRef::New(index, origin.as_str().to_owned()),
        ranges: ranges.to_vec(),
        tag: [0; 12],
        newest: Vec::new(),
    }
}

fn heads(entries: Vec<HeadEntry>) -> Frame {
    Frame::Heads(Heads {
        entries,
        more: false,
    })
}

fn reference_entry(sequence: u64) -> RefEntry {
    RefEntry {
        id: [u8::try_from(sequence).unwrap(); 32],
        sequence,
        size_bytes: 50,
        prev: None,
    }
}

/// The head of a CA's lists with the references of its newest.
fn told_head(ids: &[u8]) -> HeadEntry {
    HeadEntry {
        newest: ids
            .iter()
            .map(|id| RefEntry {
                id: [*id; 32],
                ..reference_entry(7)
            })
            .collect(),
        ..new_head(0, &crl_origin(), &[(3, 3), (7, 7)])
    }
}

#[test]
fn inv_11_news_of_a_revocation_needs_no_list() {
    let asks_for_a_list = |bench: &mut Bench| {
        let frames = bench.frames();
        frames
            .iter()
            .any(|frame| matches!(frame, Frame::ListRefs(_)))
    };
    let mut bench = Bench::established();
    bench.frames();
    bench.give(heads(vec![told_head(&[1, 2])]));
    let wanted = bench.machine.poll_want(Duration::ZERO).cloned().unwrap();
    assert_eq!((wanted.id.as_bytes(), wanted.sequence), (&[1; 32], 7));
    bench.machine.fetch(&wanted.id, Duration::ZERO);
    let second = bench.machine.poll_want(Duration::ZERO).cloned().unwrap();
    assert_eq!(second.id.as_bytes(), &[2; 32]);
    assert!(!asks_for_a_list(&mut bench));
    // A further list of the same number is news as well.
    bench.machine.fetch(&second.id, Duration::ZERO);
    assert!(bench.machine.poll_want(Duration::ZERO).is_none());
    let again = |tag: u8, ids: &[u8]| {
        heads(vec![HeadEntry {
            origin: OriginRef::Known(0),
            tag: [tag; 12],
            ..told_head(ids)
        }])
    };
    bench.give(again(1, &[1, 3]));
    let third = bench.machine.poll_want(Duration::ZERO).cloned().unwrap();
    assert_eq!((third.id.as_bytes(), third.sequence), (&[3; 32], 7));
    bench.machine.fetch(&third.id, Duration::ZERO);
    assert!(bench.machine.poll_want(Duration::ZERO).is_none());
    assert!(!asks_for_a_list(&mut bench));
    // More than a head carries have to be listed, once for each news of them.
    bench.give(again(2, &[]));
    assert!(asks_for_a_list(&mut bench));
    bench.give(again(2, &[]));
    assert!(!asks_for_a_list(&mut bench));

    let mut control = Bench::established();
    control.frames();
    control.give(heads(vec![told_head(&[])]));
    assert!(control.machine.poll_want(Duration::ZERO).is_none());
    assert!(asks_for_a_list(&mut control), "the control");
}

#[test]
fn references_that_do_not_belong_to_their_head_end_the_session() {
    let of_another_number = HeadEntry {
        newest: vec![reference_entry(3)],
        ..told_head(&[])
    };
    let of_audit = HeadEntry {
        newest: vec![reference_entry(7)],
        ..new_head(0, &audit_origin("b"), &[(7, 7)])
    };
    for wrong in [
        told_head(&[2, 1]),
        told_head(&[1, 1]),
        of_another_number,
        of_audit,
    ] {
        let mut bench = Bench::established();
        bench.give(heads(vec![wrong.clone()]));
        assert_eq!(bench.code(), Some(CloseCode::Protocol), "{wrong:?}");
    }
    let mut control = Bench::established();
    control.give(heads(vec![told_head(&[1, 2])]));
    assert_eq!(control.code(), None, "the control");
}

#[test]
fn inv_09_nothing_but_the_hello_round_trip_is_spoken_before_it_is_complete() {
    let id = Bench::new()
        .store
        .borrow()
        .by_id
        .keys()
        .next()
        .copied()
        .unwrap();
    let early: Vec<Frame> = vec![
        heads(vec![new_head(0, &crl_origin(), &[(1, 1)])]),
        Frame::Fetch(Fetch {
            id: *id.as_bytes(),
            range: None,
        }),
        Frame::ListRefs(ListRefs {
            lists: vec![ListAsked {
                origin: 0,
                from: 0,
                to: 9,
                max: 9,
            }],
        }),
        Frame::ReceiptWant(ReceiptWant {
            ids: vec![*id.as_bytes()],
        }),
        Frame::AskHeads,
        Frame::GetHead(GetHead { origin: 0 }),
    ];
    for frame in early {
        for hello_first in [false, true] {
            let mut bench = Bench::new();
            if hello_first {
                bench.give(hello(|_| {}));
            }
            bench.give(frame.clone());
            assert_eq!(bench.code(), Some(CloseCode::Protocol), "{frame:?}");
            assert_eq!(bench.machine.poll_serve(), None, "no byte is offered");
            let said: Vec<_> = bench.frames().iter().map(Frame::frame_type).collect();
            assert_eq!(said, [crate::frame::FrameType::Bye], "{frame:?}");
        }
    }
    // Bytes of a segment before the round trip: refused, whatever they are.
    let mut bench = Bench::new();
    assert!(
        bench
            .machine
            .handle_segment(Kind::Policy, &id, 100, MS)
            .is_err()
    );
    assert_eq!(bench.machine.poll_want(MS), None);
    // The control: after it the same fetch is served.
    let mut bench = Bench::established();
    bench.give(Frame::Fetch(Fetch {
        id: *id.as_bytes(),
        range: None,
    }));
    assert_eq!(
        bench.machine.poll_serve().map(|serve| serve.reference.id),
        Some(id)
    );
    assert_eq!(bench.code(), None);
}

#[test]
fn each_wrong_hello_has_its_code() {
    let cases: Vec<(Frame, CloseCode)> = vec![
        (hello(|hello| hello.version = 4), CloseCode::Version),
        (
            hello(|hello| hello.domain = "other".into()),
            CloseCode::Domain,
        ),
        (hello(|hello| hello.node_id = "c".into()), CloseCode::NodeId),
        (hello(|hello| hello.node_id = "a".into()), CloseCode::NodeId),
        (ack(), CloseCode::Protocol),
    ];
    for (frame, code) in cases {
        let mut bench = Bench::new();
        bench.give(frame).give(ack());
        assert_eq!(bench.code(), Some(code));
        assert!(!bench.machine.is_established());
    }
    let mut twice = Bench::new();
    twice.give(hello(|_| {})).give(hello(|_| {}));
    assert_eq!(twice.code(), Some(CloseCode::Protocol));
    let mut after = Bench::established();
    after.give(hello(|_| {}));
    assert_eq!(after.code(), Some(CloseCode::Protocol));
    let said = Bench::established().frames().remove(0);
    assert!(matches!(said, Frame::Hello(_)), "the control");
}

#[test]
fn the_first_reason_stays_and_nothing_follows_it() {
    let mut bench = Bench::established();
    bench
        .machine
        .close(CloseCode::Disabled, "the certificate expired");
    bench.give(hello(|_| {})).give(Frame::AskHeads);
    assert_eq!(bench.code(), Some(CloseCode::Disabled));
    let frames = bench.frames();
    assert_eq!(
        frames,
        [Frame::Bye(Bye {
            code: CloseCode::Disabled as u32,
            reason: "the certificate expired".into()
        })]
    );
    let mut other = Bench::established();
    other.give(frames[0].clone());
    let close = other.machine.closed().unwrap();
    assert!(close.by_peer && close.code == CloseCode::Disabled);
}

#[test]
fn each_answer_that_was_not_asked_for_ends_the_session() {
    let wrong: Vec<Frame> = vec![
        Frame::Refs(Refs {
            lists: vec![RefList {
                origin: 0,
                refs: vec![],
                done: true,
            }],
        }),
        Frame::FullHead(FullHead {
            origin: 0,
            head: None,
        }),
        Frame::FetchRefused(FetchRefused {
            id: [1; 32],
            from: None,
            code: 1,
        }),
        Frame::FetchRefused(FetchRefused {
            id: [1; 32],
            from: Some(0),
            code: 1,
        }),
        Frame::Receipt(Receipt {
            id: [1; 32],
            receipt: None,
        }),
        Frame::ListRefs(ListRefs {
            lists: vec![ListAsked {
                origin: 9,
                from: 0,
                to: 1,
                max: 1,
            }],
        }),
        Frame::GetHead(GetHead { origin: 9 }),
        heads(vec![HeadEntry {
            origin: OriginRef::Known(0),
            ranges: vec![(0, 0)],
            tag: [0; 12],
            newest: Vec::new(),
        }]),
        heads(vec![new_head(1, &crl_origin(), &[(1, 1)])]),
        heads(vec![
            new_head(0, &crl_origin(), &[(1, 1)]),
            new_head(1, &crl_origin(), &[(1, 1)]),
        ]),
        Frame::Heads(Heads {
            entries: vec![],
            more: true,
        }),
        Frame::DataStream(crate::frame::DataStream { kind: 1 }),
    ];
    for frame in wrong {
        let mut bench = Bench::established();
        bench.give(frame.clone());
        assert_eq!(bench.code(), Some(CloseCode::Protocol), "{frame:?}");
    }
    let mut malformed = Bench::established();
    let mut head = new_head(0, &crl_origin(), &[(1, 1)]);
    head.origin = OriginRef::New(0, "crl/../x".into());
    malformed.give(heads(vec![head]));
    assert_eq!(malformed.code(), Some(CloseCode::Protocol));
}

#[test]
fn a_list_that_differs_from_the_question_ends_the_session() {
    let origin = audit_origin("x");
    let answers: Vec<(Vec<RefEntry>, bool)> = vec![
        (vec![reference_entry(2), reference_entry(1)], true),
        (vec![reference_entry(1), reference_entry(1)], true),
        (vec![reference_entry(200)], true),
        (vec![], false),
    ];
    for (refs, done) in answers {
        let mut bench = Bench::established();
        bench.give(heads(vec![new_head(0, &origin, &[(0, 99)])]));
        bench.give(Frame::Refs(Refs {
            lists: vec![RefList {
                origin: 0,
                refs: refs.clone(),
                done,
            }],
        }));
        assert_eq!(bench.code(), Some(CloseCode::Protocol), "{refs:?}");
    }
    // The control, and then an answer too many.
    let mut bench = Bench::established();
    bench.give(heads(vec![new_head(0, &origin, &[(0, 99)])]));
    let refs = Refs {
        lists: vec![RefList {
            origin: 0,
            refs: vec![reference_entry(1), reference_entry(2)],
            done: true,
        }],
    };
    bench.give(Frame::Refs(refs.clone()));
    assert_eq!((bench.code(), bench.machine.backlog()), (None, 2));
    bench.give(Frame::Refs(refs));
    assert_eq!(bench.code(), Some(CloseCode::Protocol));
}

/// The answer to a frame that asks for lists.
fn answered(asked: &ListRefs, mut list: impl FnMut(&ListAsked) -> (Vec<RefEntry>, bool)) -> Frame {
    let lists = asked.lists.iter().map(|asked| {
        let (refs, done) = list(asked);
        RefList {
            origin: asked.origin,
            refs,
            done,
        }
    });
    Frame::Refs(Refs {
        lists: lists.collect(),
    })
}

/// First and last number of each list that a frame asks for.
fn asked_ranges(frame: &Frame) -> Vec<(u64, u64)> {
    match frame {
        Frame::ListRefs(asked) => asked
            .lists
            .iter()
            .map(|list| (list.from, list.to))
            .collect(),
        _ => Vec::new(),
    }
}

/// Bytes of a segment that comes in four ranges, fewer than one session may have in flight.
const BIG: usize = 900_000;

/// Bytes of a segment that comes in thirteen.
const HUGE: usize = 3_200_000;

fn bytes_of(world: &World, node: usize) -> u64 {
    let sent = world.slices.iter().filter(|(by, _)| *by == node);
    sent.map(|(_, range)| range.end - range.start).sum()
}

#[test]
fn a_big_segment_comes_in_ranges_last_one_first_and_a_small_one_whole() {
    let mut world = World::new(&["a", "b"]);
    let whole = usize::try_from(MAX_WHOLE_BYTES).unwrap();
    world.store(0).make(&audit_origin("a"), 0, "", whole);
    world.store(0).make(&audit_origin("a"), 1, "", BIG);
    // Urgent kinds go whole, however big: they never wait for room.
    world.store(0).make(&policy_origin(), 1, "", BIG);
    world.connect(0, 1);
    world.run_for(Duration::from_secs(20));
    assert_converged(&world);
    assert_eq!(world.fetches.len(), 2);
    let ranges: Vec<_> = world
        .slices
        .iter()
        .map(|(_, range)| range.clone())
        .collect();
    let at = |at: u64| at * RANGE_BYTES..((at + 1) * RANGE_BYTES).min(BIG as u64);
    assert_eq!(ranges, [at(3), at(0), at(1), at(2)]);
    let machine = world.machine(0, 1, 1);
    assert_eq!(
        (machine.in_flight, machine.owed, machine.bulk_bytes),
        (0, 0, 0)
    );
    assert!(world.nodes[1].claims.borrow().is_empty());
}

#[test]
fn inv_12_a_cut_transfer_goes_on_where_it_broke_off() {
    let mut world = World::new(&["a", "b"]);
    world.store(0).make(&audit_origin("a"), 0, "", BIG);
    world.connect(0, 1);
    // A byte takes a microsecond: two ranges and a half have arrived.
    world.run_for(Duration::from_micros(620_000));
    world.restart(1);
    assert!(
        world.store(1).by_id.is_empty(),
        "nothing unfinished is visible"
    );
    let before = bytes_of(&world, 0);
    let missing: u64 = {
        let reference = world.store(0).by_id.values().next().unwrap().0.clone();
        let missing = world.store(1).missing(&reference);
        missing.iter().map(|range| range.end - range.start).sum()
    };
    assert!(
        missing > 0 && missing < BIG as u64,
        "{missing} bytes are missing"
    );
    world.connect(0, 1);
    world.run_for(Duration::from_secs(20));
    assert_converged(&world);
    assert_eq!(
        bytes_of(&world, 0) - before,
        missing,
        "only the rest was sent"
    );
}

#[test]
fn two_that_hold_a_segment_share_its_ranges_and_none_is_sent_twice() {
    let mut world = World::new(&["a", "b", "c"]);
    world.store(0).make(&audit_origin("x"), 0, "", HUGE);
    world.store(1).make(&audit_origin("x"), 0, "", HUGE);
    world.connect(0, 2);
    world.connect(1, 2);
    world.run_for(Duration::from_secs(20));
    assert_converged(&world);
    let (a, b) = (bytes_of(&world, 0), bytes_of(&world, 1));
    assert!(a > 0 && b > 0, "both send: {a} and {b}");
    assert_eq!(a + b, HUGE as u64);
    assert_eq!(world.store(2).puts.values().sum::<u32>(), 1);
    assert!(world.nodes[2].claims.borrow().is_empty());
}

#[test]
fn inv_12_a_liar_spoils_only_its_own_ranges_and_is_struck_once_for_the_segment() {
    let mut world = World::new(&["a", "b", "c"]);
    let reference = world.store(0).make(&audit_origin("x"), 0, "", HUGE);
    world.store(1).make(&audit_origin("x"), 0, "", HUGE);
    world.liar = Some(1);
    world.connect(0, 2);
    world.connect(1, 2);
    world.run_for(Duration::from_secs(20));
    assert!(
        world.store(2).by_id.contains_key(&reference.id),
        "it arrives"
    );
    let lies = bytes_of(&world, 1);
    assert!(lies > 0, "the liar was asked");
    assert_eq!(
        bytes_of(&world, 0),
        HUGE as u64,
        "the honest one sent all of it"
    );
    // Its other ranges on the way are read over: one segment is one strike.
    assert_eq!(world.machine(1, 2, 2).faults(), 1);
    assert_eq!(world.machine(0, 2, 2).faults(), 0);
    let failed = world
        .events
        .iter()
        .filter(|(node, event)| *node == 2 && matches!(event, SessionEvent::TransferFailed { .. }));
    assert_eq!(failed.count(), 1);
    let machine = world.machine(1, 2, 2);
    assert_eq!(
        (machine.in_flight, machine.owed, machine.bulk_bytes),
        (0, 0, 0)
    );
}

#[test]
fn ranges_of_a_session_that_dies_go_to_the_other() {
    let mut world = World::new(&["a", "b", "c"]);
    let reference = world.store(0).make(&audit_origin("x"), 0, "", BIG);
    world.store(1).make(&audit_origin("x"), 0, "", BIG);
    world.mute = Some(0);
    world.connect(0, 2);
    world.run_for(Duration::from_secs(1));
    world.connect(1, 2);
    world.run_for(Duration::from_secs(10));
    assert!(
        !world.store(2).by_id.contains_key(&reference.id),
        "a sits on all of it"
    );
    world.cut(0, 2);
    world.run_for(Duration::from_secs(10));
    assert!(world.store(2).by_id.contains_key(&reference.id));
    assert_eq!(bytes_of(&world, 1), BIG as u64);
}

#[test]
fn a_refused_range_gives_the_segment_up_and_costs_no_strike() {
    let mut bench = Bench::listed_big();
    let want = bench.machine.poll_want(MS).cloned().unwrap();
    let (one, two) = (0..RANGE_BYTES, RANGE_BYTES..2 * RANGE_BYTES);
    assert_eq!(bench.machine.fetch_range(&want.id, &one, MS), Asked::First);
    assert_eq!(bench.machine.fetch_range(&want.id, &two, MS), Asked::More);
    assert_eq!(bench.machine.fetch_range(&want.id, &two, MS), Asked::NotNow);
    bench.give(Frame::FetchRefused(FetchRefused {
        id: *want.id.as_bytes(),
        from: Some(0),
        code: FetchRefusal::Unreadable as u16,
    }));
    assert!(!bench.machine.is_wanted(&want.id));
    assert_eq!((bench.machine.in_flight, bench.machine.faults()), (1, 0));
    // The other one was on its way: it is read over, and only then over.
    let length = bao::slice_len(want.size_bytes, &two).unwrap();
    let take = bench
        .machine
        .handle_slice(Kind::Audit, &want.id, &two, length, MS);
    assert_eq!(take, Ok(TakeSlice::Discard));
    bench.machine.handle_slice_received(&want.id, two.start);
    assert_eq!((bench.machine.in_flight, bench.machine.owed), (0, 0));
    assert_eq!(bench.code(), None);
    // One that was never asked for is a strike.
    let unasked = bench
        .machine
        .handle_slice(Kind::Audit, &want.id, &two, length, MS);
    assert_eq!(unasked.unwrap_err().fault, Fault::Peer);
    assert_eq!(bench.machine.faults(), 1);
}

#[test]
fn a_range_outside_of_a_segment_ends_the_session() {
    let range = |from, to| Some(ByteRange { from, to });
    let big = |bench: &Bench| {
        bench
            .store
            .borrow_mut()
            .make(&audit_origin("a"), 0, "", BIG)
    };
    for (asked, code) in [
        (range(0, RANGE_BYTES), None),
        (range(3 * RANGE_BYTES, BIG as u64), None),
        (
            range(3 * RANGE_BYTES, BIG as u64 + 1),
            Some(CloseCode::Protocol),
        ),
        (
            range(4 * RANGE_BYTES, 5 * RANGE_BYTES),
            Some(CloseCode::Protocol),
        ),
        (range(0, RANGE_BYTES + 1), Some(CloseCode::Protocol)),
    ] {
        let mut bench = Bench::established();
        let held = big(&bench);
        bench.give(Frame::Fetch(Fetch {
            id: *held.id.as_bytes(),
            range: asked,
        }));
        assert_eq!(bench.code(), code, "{asked:?}");
        assert_eq!(bench.machine.poll_serve().is_some(), code.is_none());
    }
}

#[test]
fn a_node_of_an_earlier_version_is_told_so() {
    let mut bench = Bench::new();
    bench.give(hello(|hello| hello.version = 2));
    assert_eq!(bench.code(), Some(CloseCode::Version));
    let Some(Frame::Bye(bye)) = bench.frames().pop() else {
        panic!("no Bye");
    };
    assert_eq!(bye.reason, "peer speaks version 2, this node 3");
    // And the other way round: its word is taken, and is no misconduct.
    let mut bench = Bench::new();
    bench.give(Frame::Bye(Bye {
        code: CloseCode::Version as u32,
        reason: "peer speaks version 3, this node 2".into(),
    }));
    let close = bench.machine.closed().cloned().unwrap();
    assert_eq!((close.code, close.by_peer), (CloseCode::Version, true));
    assert_eq!(bench.machine.faults(), 0);
}

#[test]
fn unexpected_segments_count_and_the_third_ends_the_session() {
    let origin = audit_origin("x");
    let mut bench = Bench::established();
    bench.give(heads(vec![new_head(0, &origin, &[(0, 99)])]));
    let refs = (1..6).map(reference_entry).collect();
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs,
            done: true,
        }],
    }));
    let id = |sequence| SegmentId::from_bytes(reference_entry(sequence).id);
    let first = bench.machine.poll_want(MS).unwrap().id;
    assert_eq!(first, id(1));
    bench.machine.fetch(&first, MS);
    bench.machine.fetch(&id(2), MS);
    bench.machine.fetch(&id(3), MS);
    // The control: what was asked for, with its size, on its stream.
    assert!(
        bench
            .machine
            .handle_segment(Kind::Audit, &id(1), 50, MS)
            .is_ok()
    );
    // Announced twice, of another size, on another stream.
    assert!(
        bench
            .machine
            .handle_segment(Kind::Audit, &id(1), 50, MS)
            .is_err()
    );
    assert!(
        bench
            .machine
            .handle_segment(Kind::Audit, &id(2), 51, MS)
            .is_err()
    );
    assert_eq!((bench.machine.faults(), bench.code()), (2, None));
    assert!(
        bench
            .machine
            .handle_segment(Kind::Policy, &id(3), 50, MS)
            .is_err()
    );
    assert_eq!(bench.code(), Some(CloseCode::Faults));
}

#[test]
fn fetches_beyond_what_was_announced_end_the_session() {
    let mut bench = Bench::established();
    for sequence in 2..60 {
        bench
            .store
            .borrow_mut()
            .make(&policy_origin(), sequence, "", 100);
    }
    let ids: Vec<SegmentId> = bench.store.borrow().by_id.keys().copied().collect();
    let allowed = 2 * usize::from(local("a").limits.max_in_flight);
    for id in &ids[..allowed] {
        bench.give(Frame::Fetch(Fetch {
            id: *id.as_bytes(),
            range: None,
        }));
    }
    assert_eq!(bench.code(), None, "the control");
    bench.give(Frame::Fetch(Fetch {
        id: *ids[allowed].as_bytes(),
        range: None,
    }));
    assert_eq!(bench.code(), Some(CloseCode::Limit));
    let mut twice = Bench::established();
    let id = twice.store.borrow().by_id.keys().next().copied().unwrap();
    twice.give(Frame::Fetch(Fetch {
        id: *id.as_bytes(),
        range: None,
    }));
    twice.give(Frame::Fetch(Fetch {
        id: *id.as_bytes(),
        range: None,
    }));
    assert_eq!(twice.code(), Some(CloseCode::Protocol));
}

#[test]
fn a_peer_that_asks_and_does_not_read_is_let_go() {
    let mut bench = Bench::established();
    let mut asked = 0;
    while bench.code().is_none() {
        bench.give(Frame::ReceiptWant(ReceiptWant {
            ids: vec![[1; 32]; 8],
        }));
        asked += 1;
        assert!(asked < 1_000);
    }
    assert_eq!(bench.code(), Some(CloseCode::Limit));
    assert!(bench.frames().len() <= MAX_FRAMES_QUEUED);
    // The control: the same questions with the answers read.
    let mut bench = Bench::established();
    for _ in 0..asked {
        bench.give(Frame::ReceiptWant(ReceiptWant {
            ids: vec![[1; 32]; 8],
        }));
        bench.frames();
    }
    assert_eq!(bench.code(), None);
}

#[test]
fn the_number_of_origins_is_bounded() {
    let mut bench = Bench::established();
    let mut index = 0u32;
    let mut name = || {
        let head = new_head(
            index,
            &Origin::policy(&format!("p{index}")).unwrap(),
            &[(1, 1)],
        );
        index += 1;
        head
    };
    for _ in 0..MAX_ORIGINS / MAX_HEADS_PER_FRAME {
        bench.give(heads((0..MAX_HEADS_PER_FRAME).map(|_| name()).collect()));
        bench.frames();
    }
    assert_eq!(bench.code(), None, "the control");
    bench.give(heads(vec![name()]));
    assert_eq!(bench.code(), Some(CloseCode::Limit));
}

#[test]
fn listing_ahead_is_bounded_over_all_origins() {
    // A thousand origins with a million segments each: the peer answers every list in full.
    let mut bench = Bench::established();
    let origins = 1_000u32;
    for chunk in 0..origins / 50 {
        let entries = (0..50)
            .map(|at| {
                let index = chunk * 50 + at;
                let origin = audit_origin(&format!("n{index:04}"));
                new_head(index, &origin, &[(0, 999_999)])
            })
            .collect();
        bench.give(heads(entries));
    }
    let mut seeded = Random::new(5);
    let mut served = VecDeque::new();
    for _ in 0..20_000 {
        served.extend(bench.frames());
        let Some(frame) = served.pop_front() else {
            break;
        };
        if let Frame::ListRefs(asked) = frame {
            bench.give(answered(&asked, |list| {
                let refs = (list.from..=list.to)
                    .take(usize::from(list.max))
                    .map(|sequence| {
                        let mut id = [0; 32];
                        id.iter_mut()
                            .for_each(|byte| *byte = seeded.any().to_le_bytes()[0]);
                        RefEntry {
                            id,
                            sequence,
                            size_bytes: 10,
                            prev: None,
                        }
                    })
                    .collect();
                (refs, false)
            }));
        }
        assert!(bench.machine.backlog() <= 2 * MAX_LISTED_AHEAD);
    }
    assert!(
        bench.machine.backlog() >= 1_000,
        "the control: it lists ahead"
    );
    assert!(bench.machine.poll_want(MS).is_some());
}

fn fresh_entry(sequence: u64, name: &str) -> RefEntry {
    RefEntry {
        id: *SegmentId::of(name.as_bytes()).as_bytes(),
        sequence,
        size_bytes: 10,
        prev: None,
    }
}

#[test]
fn inv_07_heads_that_name_new_ids_each_time_fill_nothing() {
    // What a head names of its newest was taken without a bound.
    let told_anew = |bench: &mut Bench, at: u16| {
        let mut newest = vec![
            fresh_entry(7, &format!("{at} one")),
            fresh_entry(7, &format!("{at} two")),
        ];
        newest.sort_by_key(|entry| entry.id);
        let [low, high] = at.to_le_bytes();
        let mut entry = HeadEntry {
            newest,
            tag: [low, high, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ..new_head(0, &crl_origin(), &[(7, 7)])
        };
        if at > 0 {
            entry.origin = OriginRef::Known(0);
        }
        bench.give(heads(vec![entry]));
        bench.frames()
    };
    let mut bench = Bench::established();
    let asked: usize = (0..2_000)
        .map(|at| told_anew(&mut bench, at))
        .map(|frames| {
            let lists = |frame: &&Frame| matches!(frame, Frame::ListRefs(_));
            frames.iter().filter(lists).count()
        })
        .sum();
    assert_eq!(bench.code(), None);
    assert_eq!(asked, 1, "what is beyond it is listed");
    assert!((2..=2 * MAX_NEWEST_REFS).contains(&bench.machine.backlog()));
    // And where every list brings as many new ones as it may.
    let mut bench = Bench::established();
    let mut named = 0;
    for at in 0..60 {
        for frame in told_anew(&mut bench, at) {
            let Frame::ListRefs(asked) = frame else {
                continue;
            };
            bench.give(answered(&asked, |list| {
                let mut refs: Vec<RefEntry> = (0..list.max)
                    .map(|of| fresh_entry(7, &format!("list {at} {of}")))
                    .collect();
                refs.sort_by_key(|entry| entry.id);
                named += refs.len();
                (refs, true)
            }));
        }
        assert!(bench.machine.backlog() <= MAX_LISTED_AHEAD);
    }
    assert_eq!(bench.code(), None);
    assert!(named > MAX_LISTED_AHEAD, "the control");
}

#[test]
fn inv_07_origins_listed_one_after_the_other_fill_no_more_than_all_at_once() {
    // Each list was short and complete, so that the next origin had a whole page again.
    let (origins, each) = (60, 500);
    let name = |at: u32| audit_origin(&format!("n{at:04}"));
    let entry = |at: u32, sequence: u64| fresh_entry(sequence, &format!("{at} {sequence}"));
    let mut bench = Bench::established();
    let answer = |bench: &mut Bench| {
        let mut lists = 0;
        for frame in bench.frames() {
            if let Frame::ListRefs(asked) = frame {
                bench.give(answered(&asked, |list| {
                    lists += 1;
                    let refs: Vec<RefEntry> = (list.from..=list.to)
                        .take(usize::from(list.max))
                        .map(|sequence| entry(list.origin, sequence))
                        .collect();
                    let done = refs.last().is_none_or(|last| last.sequence == list.to);
                    (refs, done)
                }));
            }
        }
        lists
    };
    let mut lists = 0;
    for at in 0..origins {
        bench.give(heads(vec![new_head(at, &name(at), &[(0, each - 1)])]));
        loop {
            let answered = answer(&mut bench);
            lists += answered;
            if answered == 0 {
                break;
            }
        }
        assert!(bench.machine.backlog() <= MAX_LISTED_AHEAD);
    }
    let all = u64::from(origins) * each;
    assert!(all > MAX_LISTED_AHEAD as u64, "the control");
    assert!(lists < 40 * origins, "{lists}");
    // What was forgotten is listed again when there is room, and nothing loses its place (INV-11).
    let mut order = Vec::new();
    while let Some(want) = bench.machine.poll_want(MS).cloned() {
        bench.machine.fetch(&want.id, MS);
        let announced = bench
            .machine
            .handle_segment(want.kind, &want.id, want.size_bytes, MS);
        assert_eq!(announced.as_ref(), Ok(&want));
        order.push(SessionMachine::key_of(&want));
        let held = (want.clone(), Vec::new());
        bench.store.borrow_mut().by_id.insert(want.id, held);
        bench.machine.handle_received(&want.id);
        bench.machine.handle_admitted(&want.id, MS);
        while answer(&mut bench) > 0 {
            assert!(bench.machine.backlog() <= MAX_LISTED_AHEAD);
        }
    }
    assert_eq!(order.len() as u64, all);
    assert!(order.is_sorted());
}

#[test]
fn a_list_that_the_queue_waits_for_is_asked_for_however_much_is_queued() {
    // More than half a page of one log was queued when its peer got older segments of it: their list was
    // not asked for before the queue was shorter, and the queue waited for the list.
    let mut bench = Bench::established();
    let log = audit_origin("x");
    bench.give(heads(vec![new_head(0, &log, &[(100, 399)])]));
    let refs = (100..400)
        .map(|sequence| fresh_entry(sequence, &sequence.to_string()))
        .collect();
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs,
            done: true,
        }],
    }));
    assert_eq!(bench.machine.poll_want(MS).unwrap().sequence, 100);
    bench.frames();
    bench.give(heads(vec![HeadEntry {
        origin: OriginRef::Known(0),
        ..new_head(0, &log, &[(0, 3), (100, 399)])
    }]));
    assert!(bench.machine.poll_want(MS).is_none(), "the control");
    let asked = bench.frames();
    assert!(
        asked
            .iter()
            .flat_map(asked_ranges)
            .any(|range| range == (0, 3)),
        "{asked:?}"
    );
}

/// A thousand logs of one segment each, in the frames of heads that a peer sends.
fn wide_heads(bench: &mut Bench) -> usize {
    let logs: Vec<u32> = (0..1_000).collect();
    for some in logs.chunks(MAX_HEADS_PER_FRAME) {
        let entries = some.iter().map(|index| {
            let origin = audit_origin(&format!("n{index:04}"));
            new_head(*index, &origin, &[(5, 5)])
        });
        bench.give(heads(entries.collect()));
    }
    logs.len()
}

#[test]
fn a_thousand_logs_that_differ_are_listed_in_one_round_trip() {
    let mut bench = Bench::established();
    let logs = wide_heads(&mut bench);
    // Nothing is answered before all of it is asked for.
    let mut frames = bench.frames();
    frames.retain(|frame| matches!(frame, Frame::ListRefs(_)));
    let asked: usize = frames.iter().map(|frame| asked_ranges(frame).len()).sum();
    assert_eq!(asked, logs);
    assert!(frames.len() <= MAX_LISTS_OUTSTANDING, "{}", frames.len());
    for frame in frames {
        let Frame::ListRefs(asked) = frame else {
            panic!("{frame:?}");
        };
        bench.give(answered(&asked, |list| {
            (vec![fresh_entry(5, &list.origin.to_string())], true)
        }));
    }
    assert_eq!((bench.code(), bench.machine.backlog()), (None, logs));
}

#[test]
fn inv_11_lists_leave_room_on_the_control_stream_for_a_crl() {
    let mut bench = Bench::established();
    let entries = (0..40).map(|index| {
        let origin = audit_origin(&format!("n{index:04}"));
        new_head(index, &origin, &[(0, 999)])
    });
    bench.give(heads(entries.collect()));
    let asked: usize = bench
        .frames()
        .iter()
        .filter_map(|frame| match frame {
            Frame::ListRefs(asked) => Some(&asked.lists),
            _ => None,
        })
        .flatten()
        .map(|list| usize::from(list.max))
        .sum();
    // The control: 40,000 are lacking, and nearly as many as may be are asked for.
    let page = MAX_LISTED_AHEAD / 40;
    assert!(
        (MAX_REFS_OUTSTANDING - page..=MAX_REFS_OUTSTANDING).contains(&asked),
        "{asked}"
    );
}

#[test]
fn an_answer_with_other_lists_than_were_asked_for_ends_the_session() {
    let spoil: [fn(&mut Vec<RefList>); 5] = [
        |_| {},
        |lists| lists.swap(0, 1),
        |lists| drop(lists.pop()),
        |lists| lists.push(lists[0].clone()),
        |lists| lists[1].origin = 999,
    ];
    for (at, spoil) in spoil.into_iter().enumerate() {
        let mut bench = Bench::established();
        wide_heads(&mut bench);
        let asked = bench.frames().into_iter().find_map(|frame| match frame {
            Frame::ListRefs(asked) => Some(asked),
            _ => None,
        });
        let right = answered(&asked.unwrap(), |list| {
            (vec![fresh_entry(5, &list.origin.to_string())], true)
        });
        let Frame::Refs(mut refs) = right else {
            panic!("{right:?}");
        };
        spoil(&mut refs.lists);
        bench.give(Frame::Refs(refs));
        let expected = (at > 0).then_some(CloseCode::Protocol);
        assert_eq!(bench.code(), expected, "{at}; the first is the control");
    }
}

#[test]
fn what_was_not_there_when_it_was_listed_is_listed_when_it_is_there() {
    // A peer had lost a segment when it answered for a range, and got it back before its next head: the
    // range counted as listed, so nobody ever asked for the segment in this session.
    let mut bench = Bench::established();
    let log = audit_origin("x");
    let head = |origin| {
        heads(vec![HeadEntry {
            origin,
            ..new_head(0, &log, &[(0, 2)])
        }])
    };
    let lists = |bench: &mut Bench| -> Vec<(u64, u64)> {
        bench.frames().iter().flat_map(asked_ranges).collect()
    };
    bench.give(head(OriginRef::New(0, log.as_str().to_owned())));
    assert_eq!(lists(&mut bench), [(0, 2)]);
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs: vec![fresh_entry(0, "0"), fresh_entry(2, "2")],
            done: true,
        }],
    }));
    assert_eq!(lists(&mut bench), [], "nothing asks without news");
    bench.give(head(OriginRef::Known(0)));
    assert_eq!(lists(&mut bench), [(1, 1)]);
}

#[test]
fn a_silent_peer_is_let_go_only_when_it_owes_something() {
    let mut bench = Bench::new();
    assert_eq!(bench.machine.poll_timeout(), Some(HELLO_TIMEOUT));
    bench.timeout(HELLO_TIMEOUT - MS);
    assert_eq!(bench.code(), None, "the control");
    bench.timeout(HELLO_TIMEOUT);
    assert_eq!(bench.code(), Some(CloseCode::HelloTimeout));

    let mut bench = Bench::established();
    bench.frames();
    bench.timeout(Duration::from_secs(100_000));
    assert_eq!(bench.code(), None, "a silent peer that owes nothing stays");
    let started = Duration::from_secs(100_000);
    let view = StoreView {
        store: &bench.store,
        peer: &bench.peer,
    };
    let asked = heads(vec![new_head(0, &audit_origin("x"), &[(0, 9)])]);
    bench.machine.handle_frame(asked, started, &view);
    assert_eq!(bench.machine.poll_timeout(), Some(started + STALL_TIMEOUT));
    bench.timeout(started + STALL_TIMEOUT - MS);
    assert_eq!(bench.code(), None);
    bench.timeout(started + STALL_TIMEOUT);
    assert_eq!(bench.code(), Some(CloseCode::Stalled));
}

#[test]
fn inv_13_a_spent_quota_holds_its_class_back_and_the_session_stays() {
    let mut bench = Bench::established();
    bench.give(heads(vec![new_head(0, &audit_origin("x"), &[(0, 9)])]));
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs: vec![reference_entry(1)],
            done: true,
        }],
    }));
    assert!(bench.machine.poll_want(MS).is_some(), "the control");
    let later = Duration::from_secs(7);
    bench.machine.hold_until(Kind::Audit, later);
    assert_eq!(bench.machine.poll_want(MS), None);
    assert_eq!(bench.machine.poll_timeout(), Some(later));
    // A CRL does not wait for the bulk quota.
    bench.give(heads(vec![new_head(1, &crl_origin(), &[(4, 4)])]));
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 1,
            refs: vec![reference_entry(4)],
            done: true,
        }],
    }));
    let urgent = bench.machine.poll_want(MS).unwrap().clone();
    assert_eq!(urgent.kind, Kind::Revocation);
    bench.machine.fetch(&urgent.id, MS);
    bench.timeout(later);
    assert_eq!(
        bench.machine.poll_want(later).map(|want| want.kind),
        Some(Kind::Audit)
    );
    assert_eq!(bench.code(), None);
}

#[test]
fn ruling_10_a_full_pipe_of_audit_leaves_room_for_a_crl() {
    let mut bench = Bench::established();
    bench.give(heads(vec![new_head(0, &audit_origin("x"), &[(0, 99)])]));
    let refs = (1..90).map(reference_entry).collect();
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs,
            done: true,
        }],
    }));
    let mut flying = 0;
    while let Some(want) = bench.machine.poll_want(MS).cloned() {
        bench.machine.fetch(&want.id, MS);
        flying += 1;
    }
    assert_eq!(flying, local("a").limits.max_in_flight - URGENT_IN_FLIGHT);
    bench.give(heads(vec![new_head(1, &crl_origin(), &[(95, 95)])]));
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 1,
            refs: vec![reference_entry(95)],
            done: true,
        }],
    }));
    assert_eq!(
        bench.machine.poll_want(MS).map(|want| want.kind),
        Some(Kind::Revocation)
    );
}

#[test]
fn ruling_10_a_full_pipe_of_bundles_leaves_room_for_a_crl() {
    let mut bench = Bench::established();
    let other = Origin::policy("other").unwrap();
    bench.give(heads(vec![new_head(0, &other, &[(1, 99)])]));
    let refs = (1..90).map(reference_entry).collect();
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 0,
            refs,
            done: true,
        }],
    }));
    let mut flying = 0;
    while let Some(want) = bench.machine.poll_want(MS).cloned() {
        assert_eq!(want.kind, Kind::Policy);
        bench.machine.fetch(&want.id, MS);
        flying += 1;
    }
    assert_eq!(
        flying,
        local("a").limits.max_in_flight - REVOCATION_IN_FLIGHT
    );
    bench.give(heads(vec![new_head(1, &crl_origin(), &[(95, 95)])]));
    bench.give(Frame::Refs(Refs {
        lists: vec![RefList {
            origin: 1,
            refs: vec![reference_entry(95)],
            done: true,
        }],
    }));
    assert_eq!(
        bench.machine.poll_want(MS).map(|want| want.kind),
        Some(Kind::Revocation)
    );
}

#[test]
fn only_kinds_that_the_peer_keeps_are_offered() {
    let mut bench = Bench::new();
    bench
        .store
        .borrow_mut()
        .make(&audit_origin("a"), 0, "", 100);
    bench.give(hello(|hello| {
        hello.limits.kinds = KindSet::of(&[Kind::Policy]).0
    }));
    bench.give(ack());
    let offered: Vec<String> = bench
        .frames()
        .into_iter()
        .filter_map(|frame| match frame {
            Frame::Heads(heads) => Some(heads.entries),
            _ => None,
        })
        .flatten()
        .map(|entry| format!("{:?}", entry.origin))
        .collect();
    assert_eq!(offered, ["New(0, \"policy/base\")"]);
}

#[test]
fn tags_and_digests_depend_on_the_session_and_on_every_part_of_a_head() {
    let head = Head {
        origin: policy_origin(),
        ranges: vec![(1, 4)],
        last_id: SegmentId::of(b"x"),
    };
    let peer = node_id("b");
    let store = RefCell::default();
    let view = StoreView {
        store: &store,
        peer: &peer,
    };
    let head_tag = |key: &[u8; 32], head: &Head| head_tag(key, head, &view);
    let state_digest = |heads: &[Head]| state_digest(&KEY, heads, &view);
    let same = head_tag(&KEY, &head);
    assert_eq!(same, head_tag(&KEY, &head.clone()), "the control");
    assert_ne!(same, head_tag(&[1; 32], &head));
    assert_ne!(
        same,
        head_tag(
            &KEY,
            &Head {
                ranges: vec![(1, 5)],
                ..head.clone()
            }
        )
    );
    assert_ne!(
        same,
        head_tag(
            &KEY,
            &Head {
                last_id: SegmentId::of(b"y"),
                ..head.clone()
            }
        )
    );
    assert_ne!(
        same,
        head_tag(
            &KEY,
            &Head {
                origin: crl_origin(),
                ..head.clone()
            }
        )
    );
    let other = Head {
        origin: crl_origin(),
        ..head.clone()
    };
    assert_eq!(
        state_digest(&[head.clone(), other.clone()]),
        state_digest(&[other, head.clone()]),
        "the order does not matter"
    );
    assert_ne!(state_digest(&[head]), state_digest(&[]));
    // Ruling 5: of a CA's lists every one of the highest number counts, not the last alone.
    let list = store.borrow_mut().make(&crl_origin(), 7, "one", 60);
    let head = Head {
        origin: crl_origin(),
        ranges: vec![(7, 7)],
        last_id: list.id,
    };
    let alone = head_tag(&KEY, &head);
    assert_eq!(alone, head_tag(&KEY, &head), "the control");
    store.borrow_mut().make(&crl_origin(), 7, "two", 60);
    assert_ne!(alone, head_tag(&KEY, &head));
}

mod random {
    use proptest::prelude::*;

    use super::*;

    /// Mostly small; one in three comes in ranges.
    fn any_size() -> impl Strategy<Value = u64> {
        prop_oneof![Just(9u64), Just(9), Just(700_000)]
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let id = prop_oneof![Just([1u8; 32]), Just([2u8; 32]), any::<[u8; 32]>()];
        let small = 0u32..4;
        let sequence = prop_oneof![0u64..8, any::<u64>()];
        prop_oneof![
            Just(hello(|_| {})),
            Just(ack()),
            Just(Frame::AskHeads),
            (
                small.clone(),
                any::<bool>(),
                any::<bool>(),
                sequence.clone()
            )
                .prop_map(|(index, new, more, to)| {
                    let origin = match index % 3 {
                        0 => crl_origin(),
                        1 => policy_origin(),
                        _ => audit_origin("x"),
                    };
                    let mut entry = new_head(index, &origin, &[(0, to)]);
                    if !new {
                        entry.origin = OriginRef::Known(index);
                    }
                    Frame::Heads(Heads {
                        entries: vec![entry],
                        more,
                    })
                }),
            small
                .clone()
                .prop_map(|origin| Frame::GetHead(GetHead { origin })),
            (small.clone(), id.clone()).prop_map(|(origin, last_id)| Frame::FullHead(FullHead {
                origin,
                head: Some(HeadBody {
                    ranges: vec![(0, 3)],
                    last_id
                }),
            })),
            (small.clone(), sequence.clone(), 1u16..9).prop_map(|(origin, from, max)| {
                Frame::ListRefs(ListRefs {
                    lists: vec![ListAsked {
                        origin,
                        from,
                        to: u64::MAX,
                        max,
                    }],
                })
            }),
            (
                small,
                proptest::collection::vec((id.clone(), sequence, any_size()), 0..4),
                any::<bool>()
            )
                .prop_map(|(origin, refs, done)| Frame::Refs(Refs {
                    lists: vec![RefList {
                        origin,
                        refs: refs
                            .into_iter()
                            .map(|(id, sequence, size_bytes)| RefEntry {
                                id,
                                sequence,
                                size_bytes,
                                prev: None
                            })
                            .collect(),
                        done,
                    }]
                })),
            (id.clone(), any::<bool>()).prop_map(|(id, part)| Frame::Fetch(Fetch {
                id,
                range: part.then_some(ByteRange {
                    from: 0,
                    to: bao::GROUP_BYTES
                }),
            })),
            (id.clone(), 0u64..3).prop_map(|(id, at)| Frame::FetchRefused(FetchRefused {
                id,
                from: Some(at * RANGE_BYTES),
                code: 2
            })),
            id.clone().prop_map(|id| Frame::FetchRefused(FetchRefused {
                id,
                from: None,
                code: 1
            })),
            id.clone()
                .prop_map(|id| Frame::ReceiptWant(ReceiptWant { ids: vec![id] })),
            id.prop_map(|id| Frame::Receipt(Receipt {
                id,
                receipt: Some(vec![0; 32])
            })),
        ]
    }

    proptest! {
        /// Whatever a peer says, in whatever order: no panic, counts that fit, bounded queues.
        #[test]
        fn any_course_of_frames_is_survived(
            frames in proptest::collection::vec(any_frame(), 0..60),
            fetch in any::<bool>(),
        ) {
            let mut bench = Bench::established();
            for (at, frame) in frames.into_iter().enumerate() {
                bench.give(frame);
                let now = MS * u32::try_from(at).unwrap();
                if fetch
                    && let Some(want) = bench.machine.poll_want(now).cloned()
                    && is_ranged(&want, &node_id("a"))
                {
                    let part = u64::try_from(at % 3).unwrap() * RANGE_BYTES;
                    let range = part..(part + RANGE_BYTES).min(want.size_bytes);
                    bench.machine.fetch_range(&want.id, &range, now);
                    let length = bao::slice_len(want.size_bytes, &range).unwrap();
                    if at % 2 == 0 {
                        let _ = bench.machine.handle_slice(want.kind, &want.id, &range, length, now);
                        bench.machine.handle_slice_received(&want.id, part);
                    }
                    if at % 4 == 0 {
                        bench.machine.handle_slice_over(&want.id, part, now);
                    }
                    if at % 7 == 0 {
                        bench.machine.handle_admitted(&want.id, now);
                    }
                } else if fetch && let Some(want) = bench.machine.poll_want(now).cloned() {
                    bench.machine.fetch(&want.id, now);
                    if at % 2 == 0 {
                        let _ = bench.machine.handle_segment(want.kind, &want.id, 9, now);
                        bench.machine.handle_admitted(&want.id, now);
                    }
                }
                let machine = &bench.machine;
                let flying = machine.known.values().filter(|known| known.stage.is_in_flight());
                prop_assert_eq!(flying.count() + machine.parts.len(), usize::from(machine.in_flight) * usize::from(machine.closed().is_none()));
                prop_assert!(machine.out.len() <= MAX_FRAMES_QUEUED);
                prop_assert!(machine.events.len() <= MAX_EVENTS_QUEUED);
                let queued: usize = machine.origins.values().map(|origin| origin.queued).sum();
                if machine.closed().is_none() {
                    prop_assert_eq!(queued, machine.queue.len());
                }
                for frame in &machine.out {
                    prop_assert!(frame.encode().is_ok());
                }
            }
        }
    }
}

#[test]
fn ranges_are_asked_for_as_many_as_come_without_a_queue() {
    // All 28 were asked for at once, on every link: what waits at the peer is what a kill costs.
    let many = usize::from(MAX_IN_FLIGHT - URGENT_IN_FLIGHT);
    // A long way on which a range takes little time: the way is filled.
    let mut long = Window::new();
    long.arrived(600 * MS);
    for _ in 0..200 {
        let queue = u32::try_from(long.ranges - 1).unwrap();
        long.arrived(600 * MS + 84 * MS * queue);
    }
    assert!((10..=18).contains(&long.ranges), "{long:?}");
    // A short way on which a range takes long: one that comes and one that follows it.
    let mut slow = Window::new();
    slow.arrived(MS);
    for _ in 0..200 {
        let queue = u32::try_from(slow.ranges - 1).unwrap();
        slow.arrived(MS + 84 * MS * queue);
    }
    assert_eq!(slow.ranges, RANGES_AT_LEAST);
    // It never leaves its bounds.
    for _ in 0..200 {
        long.arrived(Duration::ZERO);
        slow.arrived(Duration::MAX);
    }
    assert_eq!((long.ranges, slow.ranges), (many, RANGES_AT_LEAST));
}
