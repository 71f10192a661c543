//! What a session can say of one segment, and of how far its two sides are apart. Read-only: asking
//! changes nothing.

use std::time::Duration;

use tidelock_segments::{Head, Kind, Origin, SegmentId, SegmentRef};

use super::{Ranges, SessionMachine, Stage, View};
use crate::limits::MAX_LAG_LOOKS;

/// How far the two sides of a session are apart, by what each has said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Lag {
    /// Segments held here that the peer has not said to hold and would be offered.
    pub to_peer_segments: u64,
    /// Bytes of them. Past [`MAX_LAG_LOOKS`] segments the mean of those stands for the rest.
    pub to_peer_bytes: u64,
    /// Segments held there that are lacking here, as far as they are wanted or not listed yet.
    pub from_peer_segments: u64,
    /// Bytes of those that are listed.
    pub from_peer_bytes: u64,
}

/// Where one segment stands in a session, seen from this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The Hello round trip is not complete.
    NotEstablished,
    /// The peer does not keep this kind.
    KindNotKept,
    /// Bigger than the peer takes.
    TooLarge,
    /// The peer's head covers it.
    HeldThere,
    /// The peer holds a newer one of an origin of which only the newest counts.
    Superseded,
    /// It is the peer's own log, of which it takes back only what it has lost.
    OwnLog,
    /// The peer has asked for it, and it is being sent or waits for its quota.
    Serving,
    /// The peer holds later segments of this log and not this one: evicted there, or not taken.
    Hole,
    /// The peer was told and has not asked for it.
    Offered,
    /// The peer is told of it with the next heads.
    NotOffered,
    /// This node has asked the peer for it; no byte yet.
    Requested,
    /// It arrives.
    Receiving,
    /// All bytes are here, the node looks at them.
    Admitting,
    /// It waits for its turn here, or until this time for a quota of this class.
    Queued {
        /// When the class is asked for again, on the clock that the machine is driven with.
        held_until: Option<Duration>,
    },
    /// Another session of this node fetches it.
    Deferred,
    /// It was not taken from this peer, in this session.
    SetAside,
    /// The peer has not listed it in this session, or this node did not want it.
    NotListed,
}

fn newest_only(kind: Kind) -> bool {
    matches!(kind, Kind::Revocation | Kind::Policy)
}

fn count(ranges: &Ranges) -> u64 {
    ranges.as_slice().iter().fold(0, |sum, (from, to)| {
        sum.saturating_add(to.saturating_sub(*from).saturating_add(1))
    })
}

impl SessionMachine {
    /// What the peer lacks of one head of this node.
    fn lacking_there(&self, head: &Head) -> Ranges {
        let kind = head.origin.kind();
        let (Some(top), true) = (
            head.ranges.last().map(|(_, to)| *to),
            self.peer_limits.kinds.contains(kind)
                && head.origin.audit_node() != Some(self.peer.as_str()),
        ) else {
            return Ranges::default();
        };
        let theirs = self.origins.get(&head.origin).map(|origin| &origin.ranges);
        if newest_only(kind) {
            return if theirs
                .and_then(Ranges::last)
                .is_some_and(|held| held >= top)
            {
                Ranges::default()
            } else {
                Ranges::from_sorted(&[(top, top)])
            };
        }
        let mut lacking = Ranges::from_sorted(&head.ranges);
        for (from, to) in theirs.map(Ranges::as_slice).unwrap_or_default() {
            lacking.remove(*from, *to);
        }
        lacking
    }

    /// How far the two sides are apart. Looks at every head once, and at [`MAX_LAG_LOOKS`]
    /// references at most.
    #[must_use]
    pub fn lag(&self, view: &dyn View) -> Lag {
        let mut lag = Lag::default();
        let mut looks = MAX_LAG_LOOKS;
        let mut looked_at = 0_u64;
        for head in view.heads() {
            let lacking = self.lacking_there(&head);
            lag.to_peer_segments = lag.to_peer_segments.saturating_add(count(&lacking));
            for (from, to) in lacking.as_slice() {
                if looks == 0 {
                    break;
                }
                let refs = view.refs(&head.origin, *from, *to, looks);
                looks = looks.saturating_sub(refs.len());
                looked_at = looked_at.saturating_add(refs.len() as u64);
                for held in &refs {
                    lag.to_peer_bytes = lag.to_peer_bytes.saturating_add(held.size_bytes);
                }
            }
        }
        if looks == 0 && looked_at > 0 {
            let all = u128::from(lag.to_peer_bytes) * u128::from(lag.to_peer_segments);
            lag.to_peer_bytes = u64::try_from(all / u128::from(looked_at)).unwrap_or(u64::MAX);
        }
        let unlisted = self.origins.values().fold(0, |sum: u64, origin| {
            sum.saturating_add(count(&origin.missing))
        });
        lag.from_peer_segments = unlisted.saturating_add(self.known.len() as u64);
        lag.from_peer_bytes = self.known.values().fold(0, |sum: u64, known| {
            sum.saturating_add(known.reference.size_bytes)
        });
        lag
    }

    /// Where a segment stands that this node holds and the peer might not.
    #[must_use]
    pub fn standing_there(&self, held: &SegmentRef) -> Standing {
        if !self.is_established() {
            return Standing::NotEstablished;
        }
        let theirs = self.origins.get(&held.origin).map(|origin| &origin.ranges);
        if theirs.is_some_and(|theirs| theirs.contains(held.sequence)) {
            Standing::HeldThere
        } else if held.origin.audit_node() == Some(self.peer.as_str()) {
            Standing::OwnLog
        } else if !self.peer_limits.kinds.contains(held.kind) {
            Standing::KindNotKept
        } else if held.size_bytes > self.peer_limits.max_segment_bytes {
            Standing::TooLarge
        } else if self
            .serving
            .range((held.id, None)..=(held.id, Some(u64::MAX)))
            .next()
            .is_some()
        {
            Standing::Serving
        } else if theirs
            .and_then(Ranges::last)
            .is_some_and(|top| top > held.sequence)
        {
            if newest_only(held.kind) {
                Standing::Superseded
            } else {
                Standing::Hole
            }
        } else if self.is_unoffered(held.kind, &held.origin) {
            Standing::NotOffered
        } else {
            Standing::Offered
        }
    }

    fn is_unoffered(&self, kind: Kind, origin: &Origin) -> bool {
        self.dirty.contains(&(kind, origin.clone()))
            || !(self.my_origins.contains_key(origin) || self.origins.contains_key(origin))
    }

    /// Where a segment stands that this node lacks and the peer might hold.
    #[must_use]
    pub fn standing_here(&self, id: &SegmentId) -> Standing {
        if !self.is_established() {
            return Standing::NotEstablished;
        }
        if self.set_aside.contains_key(id) {
            return Standing::SetAside;
        }
        let Some(known) = self.known.get(id) else {
            return Standing::NotListed;
        };
        // Of a segment in ranges the range that has come furthest tells.
        let parts = self.parts.range((*id, 0)..=(*id, u64::MAX));
        let flying = parts.filter(|(_, part)| !part.is_abandoned);
        let stage = flying
            .map(|(_, part)| part.stage)
            .fold(known.stage, Stage::max);
        match stage {
            Stage::Queued => Standing::Queued {
                held_until: self.hold(known.reference.kind),
            },
            Stage::Deferred => Standing::Deferred,
            Stage::Requested => Standing::Requested,
            Stage::Receiving => Standing::Receiving,
            Stage::Admitting => Standing::Admitting,
        }
    }

    /// The reference of a segment that the peer has listed and this node lacks.
    #[must_use]
    pub fn listed(&self, id: &SegmentId) -> Option<&SegmentRef> {
        self.known.get(id).map(|known| &known.reference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_counted_by_ranges() {
        assert_eq!(count(&Ranges::default()), 0);
        assert_eq!(count(&Ranges::from_sorted(&[(0, 0), (5, 9)])), 6);
        assert_eq!(count(&Ranges::from_sorted(&[(0, u64::MAX)])), u64::MAX);
    }
}
