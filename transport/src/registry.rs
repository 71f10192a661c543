//! What all sessions of a node share: who is connected with which certificates, and which segment
//! is being fetched by whom. Two plain tables without locks, sockets or clocks; the shell keeps
//! each behind a mutex.
//!
//! [`Registry`] names exactly the sessions whose papers no longer pass, and settles which of two
//! sessions with one peer stays. [`Claims`] is why no segment is fetched from two peers at once.

use std::collections::{BTreeMap, BTreeSet};

use tidelock_segments::{Kind, NodeId, SegmentId, SegmentRef};

use crate::limits::{MAX_BULK_BYTES_NODE, MAX_SESSIONS};

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

/// Segments in flight over all sessions of a node.
#[derive(Debug)]
pub struct Claims {
    by_id: BTreeMap<SegmentId, (SessionId, u64)>,
    by_session: BTreeMap<SessionId, u64>,
    bulk_bytes: u64,
    bulk_bytes_max: u64,
}

impl Default for Claims {
    fn default() -> Self {
        Self::new(MAX_BULK_BYTES_NODE)
    }
}

impl Claims {
    /// No claims yet; bulk segments in flight never exceed this many bytes, or one segment.
    #[must_use]
    pub fn new(bulk_bytes_max: u64) -> Self {
        Self {
            by_id: BTreeMap::new(),
            by_session: BTreeMap::new(),
            bulk_bytes: 0,
            bulk_bytes_max,
        }
    }

    /// Claims a segment for a session.
    ///
    /// # Errors
    /// It has to wait. Urgent kinds never wait for room (ruling 10).
    pub fn claim(&mut self, session: SessionId, reference: &SegmentRef) -> Result<(), Busy> {
        if self.by_id.contains_key(&reference.id) {
            return Err(Busy::Elsewhere);
        }
        let bulk = if reference.kind <= Kind::Policy {
            0
        } else {
            reference.size_bytes
        };
        if bulk > 0 {
            // INV-07 and INV-13: the node's buffers are bounded, and no session takes more than a
            // quarter of them, unless it is a single segment.
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
        self.by_id.insert(reference.id, (session, bulk));
        Ok(())
    }

    /// Gives a claim up, stored or not.
    pub fn release(&mut self, session: SessionId, id: &SegmentId) {
        if self
            .by_id
            .get(id)
            .is_some_and(|(owner, _)| *owner == session)
            && let Some((_, bulk)) = self.by_id.remove(id)
        {
            self.bulk_bytes = self.bulk_bytes.saturating_sub(bulk);
            if let Some(held) = self.by_session.get_mut(&session) {
                *held = held.saturating_sub(bulk);
                if *held == 0 {
                    self.by_session.remove(&session);
                }
            }
        }
    }

    /// Gives up all claims of a session that ended.
    pub fn release_session(&mut self, session: SessionId) -> Vec<SegmentId> {
        let ids: BTreeSet<SegmentId> = self
            .by_id
            .iter()
            .filter(|(_, (owner, _))| *owner == session)
            .map(|(id, _)| *id)
            .collect();
        for id in &ids {
            self.release(session, id);
        }
        ids.into_iter().collect()
    }

    /// Segments in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether nothing is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tidelock_segments::Origin;

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
        assert_eq!(claims.claim(one, &wanted), Ok(()));
        assert_eq!(claims.claim(two, &wanted), Err(Busy::Elsewhere));
        assert_eq!(claims.claim(one, &wanted), Err(Busy::Elsewhere));
        claims.release(two, &wanted.id);
        assert_eq!(claims.len(), 1, "only the owner releases");
        claims.release(one, &wanted.id);
        assert_eq!(claims.claim(two, &wanted), Ok(()));
        assert_eq!(claims.release_session(two), [wanted.id]);
        assert!(claims.is_empty() && claims.bulk_bytes == 0 && claims.by_session.is_empty());
    }

    #[test]
    fn inv_13_one_session_takes_a_quarter_and_urgent_kinds_need_no_room() {
        let mut claims = Claims::new(400);
        let (one, two) = (SessionId(1), SessionId(2));
        assert_eq!(claims.claim(one, &segment(1, Kind::Audit, 60)), Ok(()));
        assert_eq!(
            claims.claim(one, &segment(2, Kind::Audit, 60)),
            Err(Busy::NoRoom)
        );
        assert_eq!(
            claims.claim(two, &segment(2, Kind::Audit, 100)),
            Ok(()),
            "the other has room"
        );
        for session in 3..6 {
            let name = u8::try_from(session).unwrap();
            assert_eq!(
                claims.claim(SessionId(session), &segment(name, Kind::Audit, 80)),
                Ok(())
            );
        }
        assert_eq!(
            claims.claim(SessionId(9), &segment(9, Kind::Audit, 80)),
            Err(Busy::NoRoom)
        );
        assert_eq!(
            claims.claim(one, &segment(10, Kind::Revocation, 9_999)),
            Ok(())
        );
        assert_eq!(claims.claim(one, &segment(11, Kind::Policy, 9_999)), Ok(()));
        assert!(claims.bulk_bytes <= 400);
        // A segment bigger than everything goes alone.
        let mut claims = Claims::new(400);
        assert_eq!(claims.claim(one, &segment(1, Kind::Audit, 5_000)), Ok(()));
        assert_eq!(
            claims.claim(two, &segment(2, Kind::Audit, 1)),
            Err(Busy::NoRoom)
        );
    }
}
