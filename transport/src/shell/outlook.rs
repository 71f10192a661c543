//! What the mesh can say of its peers from outside of the sessions: how far they are apart, what was
//! lost on the way, and why one segment is not there yet. Figures for an operator; nothing is decided
//! by them.

use std::{sync::mpsc as std_mpsc, time::Duration};

use quinn::Connection;
use tidelock_segments::{NodeId, SegmentId, SegmentRef};

use super::{MeshHandle, Shared, lock, quotas::QuotaDebt};
use crate::{
    limits::MAX_PEERS,
    session::{Lag, SessionMachine, Standing},
};

/// Packets to one peer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Packets {
    pub(super) sent: u64,
    pub(super) lost: u64,
    pub(super) lost_bytes: u64,
}

impl Packets {
    pub(super) fn of(connection: &Connection) -> Self {
        let path = connection.stats().path;
        Self {
            sent: path.sent_packets,
            lost: path.lost_packets,
            lost_bytes: path.lost_bytes,
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.sent = self.sent.saturating_add(other.sent);
        self.lost = self.lost.saturating_add(other.lost);
        self.lost_bytes = self.lost_bytes.saturating_add(other.lost_bytes);
    }
}

/// How far a peer and this node were apart when they were last looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Apart {
    /// None until it was met.
    lag: Option<Lag>,
    /// What this node had stored by then.
    stored: (u64, u64),
    /// When the peer was last known to lack nothing.
    pub(super) level_there: Duration,
    /// When this node was last known to lack nothing of it.
    pub(super) level_here: Duration,
}

impl Apart {
    /// The lag now: what was stored since is lacking there until the peer says otherwise.
    pub(super) fn now(&self, stored: (u64, u64)) -> Option<Lag> {
        let lag = self.lag?;
        let since = |now: u64, then: u64| now.saturating_sub(then);
        Some(Lag {
            to_peer_segments: lag
                .to_peer_segments
                .saturating_add(since(stored.0, self.stored.0)),
            to_peer_bytes: lag
                .to_peer_bytes
                .saturating_add(since(stored.1, self.stored.1)),
            ..lag
        })
    }

    fn sampled(&mut self, lag: Lag, stored: (u64, u64)) {
        self.lag = Some(lag);
        self.stored = stored;
    }

    fn tick(&mut self, now: Duration, stored: (u64, u64)) {
        if let Some(lag) = self.now(stored) {
            if lag.to_peer_segments == 0 {
                self.level_there = now;
            }
            if lag.from_peer_segments == 0 {
                self.level_here = now;
            }
        }
    }
}

/// Where one segment stands with one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentStanding {
    /// Where.
    pub standing: Standing,
    /// Milliseconds until its class is asked for again, if a quota of this node holds it back.
    pub held_ms: Option<u64>,
    /// The reference, of a segment that only the peer holds and has listed.
    pub listed: Option<SegmentRef>,
    /// What the peer owes to its quotas.
    pub quota: Vec<QuotaDebt>,
}

/// What a session answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// There is no established session with the peer.
    NoSession,
    /// The session had no time to answer.
    Busy,
    /// Where the segment stands.
    Standing(SegmentStanding),
}

/// A question to a session.
pub(super) struct Question {
    id: SegmentId,
    held: Option<SegmentRef>,
    reply: std_mpsc::SyncSender<SegmentStanding>,
}

impl Question {
    pub(super) fn answer(self, machine: &SessionMachine, now: Duration) {
        let standing = match &self.held {
            Some(held) => machine.standing_there(held),
            None => machine.standing_here(&self.id),
        };
        let held_ms = match standing {
            Standing::Queued {
                held_until: Some(until),
            } if until > now => Some(super::millis(until - now)),
            _ => None,
        };
        // Whoever asked may have given up.
        let _ = self.reply.try_send(SegmentStanding {
            standing,
            held_ms,
            listed: machine.listed(&self.id).cloned(),
            quota: Vec::new(),
        });
    }
}

impl Shared {
    /// Peers of the configuration are shown from the start, met or not.
    pub(super) fn watch_configured(&self) {
        let peers: Vec<NodeId> = lock(&self.dialer)
            .peers()
            .take(MAX_PEERS)
            .cloned()
            .collect();
        for peer in peers {
            self.watch(&peer);
        }
    }

    fn watch(&self, peer: &NodeId) {
        let now = self.now();
        self.counted(peer, |stats| {
            stats.apart.level_there = now;
            stats.apart.level_here = now;
        });
    }

    pub(super) fn stored_one(&self, size_bytes: u64) {
        let mut stored = lock(&self.stored);
        stored.0 = stored.0.saturating_add(1);
        stored.1 = stored.1.saturating_add(size_bytes);
    }

    pub(super) fn lag_sampled(&self, peer: &NodeId, lag: Lag) {
        let stored = *lock(&self.stored);
        let now = self.now();
        self.counted(peer, |stats| {
            stats.apart.sampled(lag, stored);
            stats.apart.tick(now, stored);
        });
    }

    /// Once a recheck interval: lets the sessions look how far apart they are.
    pub(super) fn sample_lags(&self) {
        for (_, entry) in lock(&self.registry)
            .iter()
            .filter(|(_, entry)| entry.established)
        {
            entry.handle.mailbox.sample();
        }
        let (stored, now) = (*lock(&self.stored), self.now());
        for stats in lock(&self.stats).values_mut() {
            stats.apart.tick(now, stored);
        }
    }
}

impl MeshHandle {
    /// Where a segment stands with a peer: `held` is the reference of one that this node holds.
    /// Blocks until the session has answered, at most so long.
    #[must_use]
    pub fn standing(
        &self,
        peer: &NodeId,
        id: &SegmentId,
        held: Option<&SegmentRef>,
        patience: Duration,
    ) -> Answer {
        let (reply, answered) = std_mpsc::sync_channel(1);
        {
            let registry = lock(&self.shared.registry);
            let Some(entry) = registry
                .established(peer)
                .and_then(|session| registry.get(session))
            else {
                return Answer::NoSession;
            };
            entry.handle.mailbox.ask(Question {
                id: *id,
                held: held.cloned(),
                reply,
            });
        }
        match answered.recv_timeout(patience) {
            Ok(standing) => Answer::Standing(SegmentStanding {
                quota: self.shared.quotas.debts(peer),
                ..standing
            }),
            Err(_) => Answer::Busy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_grows_by_what_is_stored_while_a_peer_is_away() {
        let second = Duration::from_secs(1);
        let mut apart = Apart::default();
        assert_eq!(apart.now((7, 700)), None, "never met: nothing is known");
        apart.tick(second, (7, 700));
        assert_eq!(apart.level_there, Duration::ZERO);
        apart.sampled(Lag::default(), (7, 700));
        apart.tick(second, (7, 700));
        assert_eq!((apart.level_there, apart.level_here), (second, second));
        // Away, and two more are stored here.
        apart.tick(second * 9, (9, 950));
        let lag = apart.now((9, 950)).unwrap();
        assert_eq!((lag.to_peer_segments, lag.to_peer_bytes), (2, 250));
        assert_eq!(apart.level_there, second, "since then it lacks something");
        assert_eq!(apart.level_here, second * 9);
    }
}
