//! What all sessions of a node share: who is connected with which certificates, and which segment
//! is being fetched by whom. Two plain tables without locks, sockets or clocks; the shell keeps
//! each behind a mutex.
//!
//! [`Registry`] names exactly the sessions whose papers no longer pass, and settles which of two
//! sessions with one peer stays. [`Claims`] is why no byte is fetched from two peers at once: a
//! segment, or a range of a big one, belongs to one session, until it is overdue: then others may ask
//! their peers for it too. While the node looks at a whole segment nobody else asks for it, even if
//! the session that brought it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    time::Duration,
};

use tidelock_segments::{NodeId, SegmentId, SegmentRef};

use crate::{
    limits::{
        LEASE_PACE_BYTES_PER_S, LEASE_TIMEOUT, MAX_BULK_BYTES_NODE, MAX_LEASES_PER_SEGMENT,
        MAX_SESSIONS, RANGE_BYTES,
    },
    session::is_urgent,
};

/// Number of a session, never used twice in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(u64);

/// A session in the registry.
#[derive(Debug)]
pub struct Entry<P, H> {
    /// The node that the certificate names.
    pub peer: NodeId,
    /// Whether this node dialled.
    pub outbound: bool,
    /// What the peer's standing is judged by: in the shell its verified chain, of which a revocation
    /// names issuer and serial, or the key.
    pub papers: P,
    /// Whether the Hello round trip is complete.
    pub established: bool,
    /// Whatever closes it.
    pub handle: H,
}

/// What happens to a session that has just been established.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays; these others with the same peer go.
    Keep {
        /// Sessions to close as duplicates.
        close: Vec<SessionId>,
    },
    /// It goes; another one stays.
    Close {
        /// The session that stays.
        kept: SessionId,
    },
}

/// Sessions by number.
#[derive(Debug)]
pub struct Registry<P, H> {
    next: u64,
    entries: BTreeMap<SessionId, Entry<P, H>>,
}

impl<P, H> Default for Registry<P, H> {
    fn default() -> Self {
        Self {
            next: 0,
            entries: BTreeMap::new(),
        }
    }
}

impl<P, H> Registry<P, H> {
    /// Takes a session in, before its Hello round trip.
    ///
    /// # Errors
    /// The entry back, when there is no room.
    pub fn insert(&mut self, entry: Entry<P, H>) -> Result<SessionId, Entry<P, H>> {
        // INV-07: handshakes that are through count as sessions.
        if self.entries.len() >= MAX_SESSIONS {
            return Err(entry);
        }
        let id = SessionId(self.next);
        self.next += 1;
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// Takes a session out.
    pub fn remove(&mut self, id: SessionId) -> Option<Entry<P, H>> {
        self.entries.remove(&id)
    }

    /// A session.
    #[must_use]
    pub fn get(&self, id: SessionId) -> Option<&Entry<P, H>> {
        self.entries.get(&id)
    }

    /// All sessions, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Entry<P, H>)> {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    /// Number of sessions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The established session with this peer.
    #[must_use]
    pub fn established(&self, peer: &NodeId) -> Option<SessionId> {
        self.iter()
            .find(|(_, entry)| entry.established && entry.peer == *peer)
            .map(|(id, _)| id)
    }

    /// A session's Hello round trip is complete: settles which session with this peer stays.
    ///
    /// Both sides judge alike without a word: the connection that the node with the smaller id
    /// dialled stays; of two in the same direction the newer, because its dialler made it in the
    /// knowledge that the older one is gone.
    pub fn establish(&mut self, id: SessionId, local: &NodeId) -> Verdict {
        let Some(entry) = self.entries.get_mut(&id) else {
            return Verdict::Keep { close: Vec::new() };
        };
        entry.established = true;
        let (peer, outbound) = (entry.peer.clone(), entry.outbound);
        let preferred = |outbound: bool| outbound == (*local < peer);
        let others: Vec<(SessionId, bool)> = self
            .iter()
            .filter(|(other, entry)| *other != id && entry.established && entry.peer == peer)
            .map(|(other, entry)| (other, entry.outbound))
            .collect();
        let better = others
            .iter()
            .find(|(_, other)| preferred(*other) && !preferred(outbound));
        if let Some((kept, _)) = better {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.established = false;
            }
            return Verdict::Close { kept: *kept };
        }
        for (other, _) in &others {
            if let Some(entry) = self.entries.get_mut(other) {
                entry.established = false;
            }
        }
        Verdict::Keep {
            close: others.into_iter().map(|(other, _)| other).collect(),
        }
    }

    /// The sessions whose papers do not pass any more, each with the reason. Nothing else is
    /// touched: no bystander.
    pub fn failing<E>(&self, check: impl Fn(&P) -> Result<(), E>) -> Vec<(SessionId, E)> {
        self.iter()
            .filter_map(|(id, entry)| check(&entry.papers).err().map(|error| (id, error)))
            .collect()
    }
}

/// Why a segment cannot be claimed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// Another session is fetching it.
    Elsewhere,
    /// The receive buffers of this node, or this session's share of them, are spoken for.
    NoRoom,
}

/// A range of a segment that one session has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lease {
    session: SessionId,
    to: u64,
    /// When it may be asked of another session as well.
    due: Duration,
}

/// A segment that one session has asked for in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Whole {
    bulk: u64,
    /// As of a lease.
    due: Duration,
    /// The node is looking at it: the claim outlives the session until it has.
    admitting: bool,
    /// Its session is over.
    orphan: bool,
}

/// Segments in flight over all sessions of a node, and ranges of those that come in parts.
#[derive(Debug)]
pub struct Claims {
    /// What is overdue may be claimed or leased by others too: a peer that sends a byte now and then
    /// never stalls, and would keep the segment from whoever holds it as well.
    by_id: BTreeMap<(SegmentId, SessionId), Whole>,
    /// By segment and first byte. A session may hold several ranges of one segment.
    leases: BTreeMap<(SegmentId, u64, SessionId), Lease>,
    by_session: BTreeMap<SessionId, u64>,
    bulk_bytes: u64,
    bulk_bytes_max: u64,
    lease_timeout: Duration,
}

impl Default for Claims {
    fn default() -> Self {
        Self::new(MAX_BULK_BYTES_NODE, LEASE_TIMEOUT)
    }
}

impl Claims {
    /// No claims yet; bulk segments in flight never exceed this many bytes, or one segment. After
    /// `lease_timeout` a range is overdue, a whole segment after what [`LEASE_PACE_BYTES_PER_S`] adds.
    #[must_use]
    pub fn new(bulk_bytes_max: u64, lease_timeout: Duration) -> Self {
        Self {
            by_id: BTreeMap::new(),
            leases: BTreeMap::new(),
            by_session: BTreeMap::new(),
            bulk_bytes: 0,
            bulk_bytes_max,
            lease_timeout,
        }
    }

    /// Takes receive memory. INV-07 and INV-13: the node's buffers are bounded, and no session takes
    /// more than a quarter of them, unless it is a single segment.
    fn take_room(&mut self, session: SessionId, bulk: u64) -> Result<(), Busy> {
        if bulk > 0 {
            let held = self.by_session.get(&session).copied().unwrap_or(0);
            let share = self.bulk_bytes_max / 4;
            let alone = held == 0 && (self.bulk_bytes == 0 || bulk <= share);
            let fits = held.saturating_add(bulk) <= share || alone;
            let room = self.bulk_bytes.saturating_add(bulk) <= self.bulk_bytes_max;
            if !fits || !(room || self.bulk_bytes == 0) {
                return Err(Busy::NoRoom);
            }
            self.bulk_bytes = self.bulk_bytes.saturating_add(bulk);
            *self.by_session.entry(session).or_default() += bulk;
        }
        Ok(())
    }

    fn give_room(&mut self, session: SessionId, bulk: u64) {
        self.bulk_bytes = self.bulk_bytes.saturating_sub(bulk);
        if let Some(held) = self.by_session.get_mut(&session) {
            *held = held.saturating_sub(bulk);
            if *held == 0 {
                self.by_session.remove(&session);
            }
        }
    }

    /// Claims a segment for a session.
    ///
    /// # Errors
    /// It has to wait. Urgent kinds never wait for room (ruling 10).
    pub fn claim(
        &mut self,
        session: SessionId,
        reference: &SegmentRef,
        now: Duration,
    ) -> Result<(), Busy> {
        let id = &reference.id;
        let leased = self
            .leases_of(id)
            .any(|(_, lease)| lease.session == session || now < lease.due);
        if leased || self.is_claimed(session, id, now) {
            return Err(Busy::Elsewhere);
        }
        let bulk = if is_urgent(reference.kind) {
            0
        } else {
            reference.size_bytes
        };
        self.take_room(session, bulk)?;
        let pace = Duration::from_secs(reference.size_bytes / LEASE_PACE_BYTES_PER_S);
        let due = now + self.lease_timeout + pace;
        self.by_id.insert(
            (*id, session),
            Whole {
                bulk,
                due,
                admitting: false,
                orphan: false,
            },
        );
        Ok(())
    }

    /// Whether the whole segment is on its way here, elsewhere and not overdue, or being looked at:
    /// what takes long then is this node, not a peer.
    fn is_claimed(&self, session: SessionId, id: &SegmentId, now: Duration) -> bool {
        self.by_id
            .range((*id, SessionId(0))..=(*id, SessionId(u64::MAX)))
            .any(|((_, owner), whole)| *owner == session || now < whole.due || whole.admitting)
    }

    /// Gives a claim up, stored or not, with all ranges of the segment that the session holds.
    pub fn release(&mut self, session: SessionId, id: &SegmentId) {
        if let Some(whole) = self.by_id.remove(&(*id, session)) {
            self.give_room(session, whole.bulk);
        }
        let held: Vec<u64> = self
            .leases_of(id)
            .filter(|(_, lease)| lease.session == session)
            .map(|(from, _)| from)
            .collect();
        for from in held {
            self.release_range(session, id, from);
        }
    }

    /// All bytes of a claimed segment are here and the node looks at it. INV-08: until
    /// [`end_admission`](Self::end_admission) no end of the session lets another one ask for it too.
    pub fn begin_admission(&mut self, session: SessionId, id: &SegmentId) {
        if let Some(whole) = self.by_id.get_mut(&(*id, session)) {
            whole.admitting = true;
        }
    }

    /// It is stored or refused. True: the session is over and the claim with it, tell the others.
    pub fn end_admission(&mut self, session: SessionId, id: &SegmentId) -> bool {
        let Some(whole) = self.by_id.get_mut(&(*id, session)) else {
            return false;
        };
        whole.admitting = false;
        let orphan = whole.orphan;
        if orphan {
            self.release(session, id);
        }
        orphan
    }

    fn leases_of(&self, id: &SegmentId) -> impl Iterator<Item = (u64, Lease)> {
        self.leases
            .range((*id, 0, SessionId(0))..=(*id, u64::MAX, SessionId(u64::MAX)))
            .map(|((_, from, _), lease)| (*from, *lease))
    }

    /// Leases the next range of a segment to a session. The last one goes first: a last group that
    /// fits proves the size that was claimed of the segment. `missing` are the ranges that have not
    /// arrived, ascending.
    ///
    /// # Errors
    /// [`Busy::Elsewhere`]: everything that is missing is on its way, or this session has its share of
    /// it. [`Busy::NoRoom`] as for whole segments.
    pub fn lease(
        &mut self,
        session: SessionId,
        reference: &SegmentRef,
        missing: &[Range<u64>],
        now: Duration,
    ) -> Result<Range<u64>, Busy> {
        let id = &reference.id;
        let held: Vec<(u64, Lease)> = self.leases_of(id).collect();
        let own = held.iter().filter(|(_, lease)| lease.session == session);
        if self.is_claimed(session, id, now) || own.count() >= MAX_LEASES_PER_SEGMENT {
            return Err(Busy::Elsewhere);
        }
        // A range that this session holds is never free to it, one that is overdue is to another.
        let taken = |from: u64| {
            let mut of_range = held
                .iter()
                .filter(|(at, _)| at / RANGE_BYTES * RANGE_BYTES == from);
            of_range.any(|(_, lease)| lease.session == session || now < lease.due)
        };
        let last = reference.size_bytes.saturating_sub(1) / RANGE_BYTES * RANGE_BYTES;
        let ends_missing = missing
            .last()
            .is_some_and(|m| m.end == reference.size_bytes);
        let all = missing.iter().flat_map(|m| {
            let first = m.start / RANGE_BYTES;
            (first..m.end.div_ceil(RANGE_BYTES)).map(|at| at * RANGE_BYTES)
        });
        let range = std::iter::once(last)
            .filter(|_| ends_missing)
            .chain(all)
            .find(|from| !taken(*from))
            .and_then(|from| {
                // Of what is cut by an earlier end, the part that is missing.
                let part = from..(from + RANGE_BYTES).min(reference.size_bytes);
                let start = missing.iter().find(|m| m.end > part.start)?;
                let end = missing.iter().rev().find(|m| m.start < part.end)?;
                Some(start.start.max(part.start)..end.end.min(part.end))
            })
            .ok_or(Busy::Elsewhere)?;
        self.take_room(session, range.end.saturating_sub(range.start))?;
        let lease = Lease {
            session,
            to: range.end,
            due: now + self.lease_timeout,
        };
        self.leases.insert((*id, range.start, session), lease);
        Ok(range)
    }

    /// Gives one range back, taken or not.
    pub fn release_range(&mut self, session: SessionId, id: &SegmentId, from: u64) {
        if let Some(lease) = self.leases.remove(&(*id, from, session)) {
            self.give_room(session, lease.to.saturating_sub(from));
        }
    }

    /// Segments of which a session has a range.
    #[must_use]
    pub fn leased_by(&self, session: SessionId) -> BTreeSet<SegmentId> {
        let owned = self.leases.keys().filter(|(.., owner)| *owner == session);
        owned.map(|(id, ..)| *id).collect()
    }

    /// Segments that are overdue, or a range of which is. Those that the node looks at are not.
    #[must_use]
    pub fn overdue(&self, now: Duration) -> BTreeSet<SegmentId> {
        let whole = self.by_id.iter().filter(|(_, whole)| !whole.admitting);
        let whole = whole.map(|((id, _), whole)| (id, whole.due));
        let parts = self.leases.iter().map(|((id, ..), lease)| (id, lease.due));
        whole
            .chain(parts)
            .filter(|(_, due)| *due <= now)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Gives up all claims of a session that ended; what the node is looking at goes when it has.
    pub fn release_session(&mut self, session: SessionId) -> Vec<SegmentId> {
        for ((_, owner), whole) in &mut self.by_id {
            whole.orphan |= whole.admitting && *owner == session;
        }
        let whole = self.by_id.iter().filter(|(_, whole)| !whole.orphan);
        let whole = whole.map(|(key, _)| *key);
        let parts = self.leases.keys().map(|(id, _, owner)| (*id, *owner));
        let ids: BTreeSet<SegmentId> = whole
            .chain(parts)
            .filter(|(_, owner)| *owner == session)
            .map(|(id, _)| id)
            .collect();
        for id in &ids {
            self.release(session, id);
        }
        ids.into_iter().collect()
    }

    /// Segments and ranges in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len() + self.leases.len()
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty() && self.leases.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tidelock_segments::{Kind, Origin};

    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    type Papers = Vec<&'static str>;

    fn entry(peer: &str, outbound: bool, papers: &[&'static str]) -> Entry<Papers, ()> {
        Entry {
            peer: node(peer),
            outbound,
            papers: papers.to_vec(),
            established: false,
            handle: (),
        }
    }

    fn segment(name: u8, kind: Kind, size_bytes: u64) -> SegmentRef {
        let origin = match kind {
            Kind::Revocation => Origin::crl(&[name; 32]),
            Kind::Policy => Origin::policy("base").unwrap(),
            _ => Origin::parse(&format!("audit/n/{}/0", "0123456789abcdef")).unwrap(),
        };
        SegmentRef {
            id: SegmentId::of(&[name]),
            kind,
            origin,
            sequence: name.into(),
            size_bytes,
            prev: None,
        }
    }

    #[test]
    fn both_sides_keep_the_same_connection_in_every_order() {
        // Two connections between a and b: one dialled by a (the smaller id), one by b.
        for a_sees_own_first in [true, false] {
            for b_sees_own_first in [true, false] {
                let judge = |local: &str, peer: &str, own_first: bool| {
                    let mut registry = Registry::default();
                    let first = registry.insert(entry(peer, own_first, &[])).unwrap();
                    let second = registry.insert(entry(peer, !own_first, &[])).unwrap();
                    assert_eq!(
                        registry.establish(first, &node(local)),
                        Verdict::Keep { close: vec![] }
                    );
                    let kept = match registry.establish(second, &node(local)) {
                        Verdict::Keep { close } => {
                            assert_eq!(close, [first]);
                            second
                        }
                        Verdict::Close { kept } => {
                            assert_eq!(kept, first);
                            first
                        }
                    };
                    assert_eq!(registry.established(&node(peer)), Some(kept));
                    registry.get(kept).unwrap().outbound
                };
                assert!(
                    judge("a", "b", a_sees_own_first),
                    "a keeps the one that it dialled"
                );
                assert!(
                    !judge("b", "a", b_sees_own_first),
                    "b keeps the one that a dialled"
                );
            }
        }
    }

    #[test]
    fn a_newer_connection_of_the_same_direction_replaces_the_older() {
        for outbound in [true, false] {
            let mut registry = Registry::default();
            let old = registry.insert(entry("b", outbound, &[])).unwrap();
            let other = registry.insert(entry("c", outbound, &[])).unwrap();
            let new = registry.insert(entry("b", outbound, &[])).unwrap();
            for id in [old, other] {
                assert_eq!(
                    registry.establish(id, &node("a")),
                    Verdict::Keep { close: vec![] }
                );
            }
            assert_eq!(
                registry.establish(new, &node("a")),
                Verdict::Keep { close: vec![old] }
            );
            assert_eq!(registry.established(&node("c")), Some(other), "a bystander");
        }
    }

    #[test]
    fn exactly_the_failing_sessions_are_named() {
        let mut registry = Registry::default();
        let revoked = registry
            .insert(entry("b", true, &["bad leaf", "ca"]))
            .unwrap();
        let by_issuer = registry
            .insert(entry("c", true, &["leaf", "bad ca"]))
            .unwrap();
        let fine = registry.insert(entry("d", false, &["leaf", "ca"])).unwrap();
        let check = |papers: &Papers| match papers.iter().find(|paper| paper.starts_with("bad")) {
            Some(bad) => Err(*bad),
            None => Ok(()),
        };
        assert_eq!(
            registry.failing(check),
            [(revoked, "bad leaf"), (by_issuer, "bad ca")]
        );
        assert!(registry.remove(revoked).is_some() && registry.remove(by_issuer).is_some());
        assert_eq!(registry.failing(check), []);
        assert_eq!(
            registry.iter().map(|(id, _)| id).collect::<Vec<_>>(),
            [fine]
        );
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let mut registry = Registry::default();
        let ids: Vec<_> = (0..MAX_SESSIONS)
            .map(|_| registry.insert(entry("b", false, &[])).unwrap())
            .collect();
        assert!(registry.insert(entry("b", false, &[])).is_err());
        registry.remove(ids[0]);
        let id = registry.insert(entry("b", false, &[])).unwrap();
        assert!(!ids.contains(&id), "numbers are not used twice");
    }

    #[test]
    fn inv_08_a_segment_is_claimed_by_one_session_at_a_time() {
        let mut claims = Claims::default();
        let (one, two) = (SessionId(1), SessionId(2));
        let wanted = segment(1, Kind::Audit, 100);
        assert_eq!(claims.claim(one, &wanted, NOW), Ok(()));
        assert_eq!(claims.claim(two, &wanted, NOW), Err(Busy::Elsewhere));
        assert_eq!(claims.claim(one, &wanted, NOW), Err(Busy::Elsewhere));
        claims.release(two, &wanted.id);
        assert_eq!(claims.len(), 1, "only the owner releases");
        claims.release(one, &wanted.id);
        assert_eq!(claims.claim(two, &wanted, NOW), Ok(()));
        assert_eq!(claims.release_session(two), [wanted.id]);
        assert!(claims.is_empty() && claims.bulk_bytes == 0 && claims.by_session.is_empty());
    }

    #[test]
    fn inv_08_what_the_node_looks_at_is_asked_of_nobody_else_when_its_session_ends() {
        let mut claims = Claims::default();
        let (one, two, three) = (SessionId(1), SessionId(2), SessionId(3));
        let (looked_at, on_its_way) = (segment(1, Kind::Policy, 100), segment(2, Kind::Audit, 100));
        for wanted in [&looked_at, &on_its_way] {
            assert_eq!(claims.claim(one, wanted, NOW), Ok(()));
        }
        claims.begin_admission(one, &looked_at.id);
        assert_eq!(claims.release_session(one), [on_its_way.id], "the control");
        assert_eq!(claims.claim(two, &on_its_way, NOW), Ok(()));
        assert_eq!(claims.claim(two, &looked_at, NOW), Err(Busy::Elsewhere));
        // A disk that takes long makes nothing overdue: all bytes are here.
        let late = NOW + 2 * LEASE_TIMEOUT;
        assert_eq!(claims.overdue(late), BTreeSet::from([on_its_way.id]));
        assert_eq!(claims.claim(three, &looked_at, late), Err(Busy::Elsewhere));
        assert_eq!(
            claims.claim(three, &on_its_way, late),
            Ok(()),
            "the control"
        );
        assert_eq!(claims.release_session(three), [on_its_way.id]);
        assert!(claims.end_admission(one, &looked_at.id));
        assert_eq!(claims.claim(two, &looked_at, NOW), Ok(()));
        // While the session goes on it is the session that releases.
        claims.begin_admission(two, &looked_at.id);
        assert!(!claims.end_admission(two, &looked_at.id));
        assert_eq!(claims.claim(one, &looked_at, NOW), Err(Busy::Elsewhere));
        assert_eq!(claims.release_session(two).len(), 2);
        assert!(claims.is_empty() && claims.bulk_bytes == 0);
    }

    #[test]
    fn inv_13_a_claim_that_is_sat_on_keeps_the_segment_from_nobody() {
        // A peer that sends a byte now and then never stalls; it kept a segment for itself.
        let (one, two, three) = (SessionId(1), SessionId(2), SessionId(3));
        let mut claims = Claims::default();
        let small = segment(1, Kind::Audit, 100);
        let large = segment(1, Kind::Audit, 4 * RANGE_BYTES);
        assert_eq!(claims.claim(one, &small, NOW), Ok(()));
        let due = NOW + LEASE_TIMEOUT;
        let before = due - Duration::from_millis(1);
        let all = one_range(0..large.size_bytes);
        assert_eq!(claims.claim(two, &small, before), Err(Busy::Elsewhere));
        assert_eq!(
            claims.lease(two, &large, &all, before),
            Err(Busy::Elsewhere)
        );
        assert!(claims.overdue(before).is_empty(), "the control");
        assert_eq!(claims.overdue(due), BTreeSet::from([small.id]));
        assert_eq!(claims.claim(one, &small, due), Err(Busy::Elsewhere), "own");
        assert_eq!(claims.claim(two, &small, due), Ok(()));
        assert_eq!(claims.claim(three, &small, due), Err(Busy::Elsewhere));
        let last = due + LEASE_TIMEOUT;
        assert!(claims.lease(three, &large, &all, last).is_ok());
        assert_eq!(
            claims.claim(SessionId(4), &small, last),
            Err(Busy::Elsewhere)
        );
        for session in [one, two, three] {
            assert_eq!(claims.release_session(session), [small.id]);
        }
        assert!(claims.is_empty() && claims.bulk_bytes == 0 && claims.by_session.is_empty());
        // A big one has time for its bytes.
        let urgent = segment(2, Kind::Policy, 60 * LEASE_PACE_BYTES_PER_S);
        assert_eq!(claims.claim(one, &urgent, NOW), Ok(()));
        assert_eq!(claims.claim(two, &urgent, due), Err(Busy::Elsewhere));
        let due = due + Duration::from_secs(60);
        assert_eq!(claims.claim(two, &urgent, due), Ok(()));
    }

    #[test]
    fn inv_13_one_session_takes_a_quarter_and_urgent_kinds_need_no_room() {
        let mut claims = Claims::new(400, LEASE_TIMEOUT);
        let (one, two) = (SessionId(1), SessionId(2));
        assert_eq!(claims.claim(one, &segment(1, Kind::Audit, 60), NOW), Ok(()));
        assert_eq!(
            claims.claim(one, &segment(2, Kind::Audit, 60), NOW),
            Err(Busy::NoRoom)
        );
        assert_eq!(
            claims.claim(two, &segment(2, Kind::Audit, 100), NOW),
            Ok(()),
            "the other has room"
        );
        for session in 3..6 {
            let name = u8::try_from(session).unwrap();
            assert_eq!(
                claims.claim(SessionId(session), &segment(name, Kind::Audit, 80), NOW),
                Ok(())
            );
        }
        assert_eq!(
            claims.claim(SessionId(9), &segment(9, Kind::Audit, 80), NOW),
            Err(Busy::NoRoom)
        );
        assert_eq!(
            claims.claim(one, &segment(10, Kind::Revocation, 9_999), NOW),
            Ok(())
        );
        assert_eq!(
            claims.claim(one, &segment(11, Kind::Policy, 9_999), NOW),
            Ok(())
        );
        assert!(claims.bulk_bytes <= 400);
        // A segment bigger than everything goes alone.
        let mut claims = Claims::new(400, LEASE_TIMEOUT);
        assert_eq!(
            claims.claim(one, &segment(1, Kind::Audit, 5_000), NOW),
            Ok(())
        );
        assert_eq!(
            claims.claim(two, &segment(2, Kind::Audit, 1), NOW),
            Err(Busy::NoRoom)
        );
    }

    const NOW: Duration = Duration::from_secs(1);

    fn one_range(range: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(range).collect()
    }

    #[test]
    fn inv_08_a_range_is_leased_to_one_session_until_it_is_overdue() {
        let (one, two, three) = (SessionId(1), SessionId(2), SessionId(3));
        let mut claims = Claims::default();
        let size = 4 * RANGE_BYTES - 5;
        let wanted = segment(1, Kind::Audit, size);
        let all = one_range(0..size);
        let at = |at: u64| at * RANGE_BYTES..((at + 1) * RANGE_BYTES).min(size);
        let now = NOW;
        // The last one proves the size, so it goes first; then from the start.
        assert_eq!(claims.lease(one, &wanted, &all, now), Ok(at(3)));
        assert_eq!(claims.lease(two, &wanted, &all, now), Ok(at(0)));
        assert_eq!(claims.lease(one, &wanted, &all, now), Ok(at(1)));
        assert_eq!(claims.lease(two, &wanted, &all, now), Ok(at(2)));
        assert_eq!(claims.lease(one, &wanted, &all, now), Err(Busy::Elsewhere));
        assert_eq!(claims.claim(three, &wanted, NOW), Err(Busy::Elsewhere));
        // What one gives back, another gets; what has arrived, nobody.
        claims.release_range(one, &wanted.id, at(1).start);
        claims.release_range(two, &wanted.id, at(2).start);
        let rest = vec![0..2 * RANGE_BYTES, 3 * RANGE_BYTES..size];
        assert_eq!(claims.lease(two, &wanted, &rest, now), Ok(at(1)));
        assert_eq!(claims.lease(one, &wanted, &rest, now), Err(Busy::Elsewhere));
        // An overdue one goes to another session as well, and never twice to its own.
        let later = now + LEASE_TIMEOUT;
        assert_eq!(claims.overdue(later), BTreeSet::from([wanted.id]));
        assert!(claims.overdue(now).is_empty(), "the control");
        let last = one_range(3 * RANGE_BYTES..size);
        assert_eq!(
            claims.lease(one, &wanted, &last, later),
            Err(Busy::Elsewhere)
        );
        assert_eq!(claims.lease(two, &wanted, &last, later), Ok(at(3)));
        assert_eq!(
            claims.lease(three, &wanted, &last, later),
            Err(Busy::Elsewhere)
        );
        // Two that sit on it keep it from nobody for longer than their time.
        let latest = later + LEASE_TIMEOUT;
        assert_eq!(claims.lease(three, &wanted, &last, latest), Ok(at(3)));
        assert_eq!(claims.release_session(three), [wanted.id]);
        assert_eq!(claims.leased_by(one), BTreeSet::from([wanted.id]));
        assert_eq!(claims.release_session(two), [wanted.id]);
        assert_eq!(claims.release_session(one), [wanted.id]);
        assert!(claims.is_empty() && claims.bulk_bytes == 0 && claims.by_session.is_empty());
    }

    #[test]
    fn inv_13_one_session_has_its_share_of_a_segment_and_of_the_memory() {
        let mut claims = Claims::default();
        let size = 32 * RANGE_BYTES;
        let wanted = segment(1, Kind::Audit, size);
        let all = one_range(0..size);
        let lease = |claims: &mut Claims, session| {
            claims.lease(SessionId(session), &wanted, &all, Duration::ZERO)
        };
        for _ in 0..MAX_LEASES_PER_SEGMENT {
            assert!(lease(&mut claims, 1).is_ok());
        }
        assert_eq!(lease(&mut claims, 1), Err(Busy::Elsewhere));
        assert!(lease(&mut claims, 2).is_ok(), "the control");
        let mut claims = Claims::new(8 * RANGE_BYTES, LEASE_TIMEOUT);
        assert!(lease(&mut claims, 1).is_ok() && lease(&mut claims, 1).is_ok());
        assert_eq!(lease(&mut claims, 1), Err(Busy::NoRoom), "a quarter is two");
        assert!(lease(&mut claims, 2).is_ok(), "the control");
        // A hole that an earlier contact left is asked for as it is.
        let group = tidelock_segments::bao::GROUP_BYTES;
        let mut claims = Claims::default();
        let hole = one_range(RANGE_BYTES + group..RANGE_BYTES + 3 * group);
        let leased = claims.lease(SessionId(1), &wanted, &hole, Duration::ZERO);
        assert_eq!(leased.as_ref(), Ok(&hole[0]));
        let again = claims.lease(SessionId(2), &wanted, &hole, Duration::ZERO);
        assert_eq!(again, Err(Busy::Elsewhere));
    }
}
