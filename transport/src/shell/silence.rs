//! Sessions that have sent into an outage. Such a session has collapsed its window and waits, ever longer,
//! for its next probe; when a link comes up, a new one is there in a few round trips, and goes on where the
//! old one was.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use super::{Shared, lock};
use crate::{frame::CloseCode, registry::SessionId};

/// Datagrams without an answer, from which on it is not chance.
const UNANSWERED: u64 = 4;

/// Silence from which on it is not the path's length.
const SILENCE: Duration = Duration::from_secs(1);

/// The same in round trips.
const SILENCE_ROUND_TRIPS: u32 = 4;

/// A session at the first look after its last datagram came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heard {
    received: u64,
    sent: u64,
    at: Duration,
}

/// A session now.
#[derive(Debug, Clone, Copy)]
struct Look {
    received: u64,
    sent: u64,
    at: Duration,
    round_trip: Duration,
}

impl Heard {
    fn now(before: Option<&Self>, look: &Look) -> Self {
        match before {
            Some(before) if before.received == look.received => *before,
            _ => Self {
                received: look.received,
                sent: look.sent,
                at: look.at,
            },
        }
    }

    fn is_unanswered(&self, look: &Look) -> bool {
        look.received == self.received
            && look.sent.saturating_sub(self.sent) >= UNANSWERED
            && look.at.saturating_sub(self.at)
                >= SILENCE.max(look.round_trip.saturating_mul(SILENCE_ROUND_TRIPS))
    }
}

/// What is remembered of each session: three numbers, as many as the registry has sessions (INV-07).
pub(super) type Silences = Mutex<BTreeMap<SessionId, Heard>>;

impl Shared {
    fn looks(&self) -> Vec<(SessionId, Look)> {
        let at = self.now();
        lock(&self.registry)
            .iter()
            .map(|(session, entry)| {
                let connection = &entry.handle.connection;
                let stats = connection.stats();
                let look = Look {
                    received: stats.udp_rx.datagrams,
                    sent: stats.udp_tx.datagrams,
                    at,
                    round_trip: stats.path.rtt,
                };
                (session, look)
            })
            .collect()
    }

    /// Once a recheck interval.
    pub(super) fn sample_silences(&self) {
        let looks = self.looks();
        let mut silences = lock(&self.silences);
        let heard = looks
            .iter()
            .map(|(session, look)| (*session, Heard::now(silences.get(session), look)))
            .collect();
        *silences = heard;
    }

    /// Ends the sessions that have sent and got no answer. Gives how many.
    pub(super) fn close_unanswered(&self) -> usize {
        let looks = self.looks();
        let unanswered: Vec<SessionId> = {
            let silences = lock(&self.silences);
            looks
                .iter()
                .filter(|(session, look)| {
                    silences
                        .get(session)
                        .is_some_and(|heard| heard.is_unanswered(look))
                })
                .map(|(session, _)| *session)
                .collect()
        };
        let registry = lock(&self.registry);
        for session in &unanswered {
            if let Some(entry) = registry.get(*session).filter(|e| e.handle.is_alive()) {
                let reason = "a link came up, and what was sent before had no answer";
                entry.handle.close(CloseCode::Normal, reason);
            }
        }
        unanswered.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(received: u64, sent: u64, at_ms: u64, round_trip_ms: u64) -> Look {
        Look {
            received,
            sent,
            at: Duration::from_millis(at_ms),
            round_trip: Duration::from_millis(round_trip_ms),
        }
    }

    #[test]
    fn a_session_is_unanswered_after_packets_and_time_without_any() {
        let heard = Heard::now(None, &look(10, 20, 5_000, 1));
        assert!(heard.is_unanswered(&look(10, 24, 6_000, 1)), "the control");
        assert!(
            !heard.is_unanswered(&look(11, 24, 6_000, 1)),
            "something came"
        );
        assert!(
            !heard.is_unanswered(&look(10, 23, 6_000, 1)),
            "few were sent"
        );
        assert!(
            !heard.is_unanswered(&look(10, 24, 5_999, 1)),
            "a moment ago"
        );
        assert!(
            !heard.is_unanswered(&look(10, 90, 7_399, 600)),
            "a long path"
        );
        assert!(heard.is_unanswered(&look(10, 90, 7_400, 600)));
    }

    #[test]
    fn silence_begins_with_the_last_datagram_that_came() {
        let first = Heard::now(None, &look(10, 20, 1_000, 1));
        let quiet = Heard::now(Some(&first), &look(10, 30, 2_000, 1));
        assert_eq!(quiet, first, "what was sent since counts");
        let again = Heard::now(Some(&quiet), &look(11, 31, 3_000, 1));
        assert!(!again.is_unanswered(&look(11, 34, 9_000, 1)));
        assert!(again.is_unanswered(&look(11, 35, 9_000, 1)));
    }
}
