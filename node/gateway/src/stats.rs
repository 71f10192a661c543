//! What the doors count, and how it is shown to Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::connection::CloseCause;
use crate::refusals::RefusalKind;

/// A number that only goes up.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn up(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of the gateway.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) accepted: Count,
    pub(crate) decisions: Count,
    pub(crate) unanswered: Count,
    pub(crate) headers_ignored: Count,
    closed: [Count; 5],
    refused: [Count; 8],
    // By code. Codes are texts of this program, so they are few (INV-07).
    credentials: Mutex<BTreeMap<&'static str, u64>>,
}

impl Stats {
    pub(crate) fn closed(&self, cause: CloseCause) -> &Count {
        let [head, stranger, idle, write, evicted] = &self.closed;
        match cause {
            CloseCause::SlowHead => head,
            CloseCause::Stranger => stranger,
            CloseCause::Idle => idle,
            CloseCause::SlowReader => write,
            CloseCause::Evicted => evicted,
        }
    }

    pub(crate) fn credentials_refused(&self, code: &'static str) {
        let mut counts = self
            .credentials
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(code).or_default();
        *count = count.saturating_add(1);
    }

    fn credentials(&self) -> Vec<(&'static str, u64)> {
        let counts = self
            .credentials
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(code, count)| (*code, *count)).collect()
    }

    pub(crate) fn refused(&self, kind: RefusalKind) -> &Count {
        let [none, bad, scope, operator, host, busy, incomplete, rate] = &self.refused;
        match kind {
            RefusalKind::NoCredentials => none,
            RefusalKind::BadCredentials => bad,
            RefusalKind::MissingScope => scope,
            RefusalKind::NotOperator => operator,
            RefusalKind::WrongHost => host,
            RefusalKind::Busy => busy,
            RefusalKind::Incomplete => incomplete,
            RefusalKind::RateLimited => rate,
        }
    }
}

/// What the gateway is doing and has done, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayStats {
    /// Connections open now that have presented valid credentials.
    pub connections_known: usize,
    /// Connections open now that have not.
    pub connections_strangers: usize,
    /// Decisions in flight now.
    pub in_flight: usize,
    /// Connections accepted.
    pub accepted: u64,
    /// Decisions answered.
    pub decisions: u64,
    /// Decisions that did not come back in time.
    pub unanswered: u64,
    /// Identity headers that came from somebody who is not believed in them.
    pub headers_ignored: u64,
    /// Connections closed by the gateway, by cause.
    pub closed: Vec<(&'static str, u64)>,
    /// Requests refused before they were judged, by kind.
    pub refused: Vec<(&'static str, u64)>,
    /// Credentials refused, by code; those that did not occur are left out.
    pub credentials: Vec<(&'static str, u64)>,
}

impl GatewayStats {
    pub(crate) fn new(stats: &Stats, in_flight: usize, (known, strangers): (usize, usize)) -> Self {
        let closed = [
            ("slow_head", CloseCause::SlowHead),
            ("stranger", CloseCause::Stranger),
            ("idle", CloseCause::Idle),
            ("slow_reader", CloseCause::SlowReader),
            ("evicted", CloseCause::Evicted),
        ];
        let refused = [
            ("no_credentials", RefusalKind::NoCredentials),
            ("bad_credentials", RefusalKind::BadCredentials),
            ("missing_scope", RefusalKind::MissingScope),
            ("not_operator", RefusalKind::NotOperator),
            ("wrong_host", RefusalKind::WrongHost),
            ("busy", RefusalKind::Busy),
            ("incomplete", RefusalKind::Incomplete),
            ("rate_limited", RefusalKind::RateLimited),
        ];
        Self {
            connections_known: known,
            connections_strangers: strangers,
            in_flight,
            accepted: stats.accepted.get(),
            decisions: stats.decisions.get(),
            unanswered: stats.unanswered.get(),
            headers_ignored: stats.headers_ignored.get(),
            closed: closed
                .map(|(name, cause)| (name, stats.closed(cause).get()))
                .to_vec(),
            refused: refused
                .map(|(name, kind)| (name, stats.refused(kind).get()))
                .to_vec(),
            credentials: stats.credentials(),
        }
    }

    /// Adds these numbers to a Prometheus text.
    pub(crate) fn render(&self, text: &mut String) {
        let mut family = |name: &str, kind: &str, help: &str, rows: &[(String, u64)]| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let plain = |value: u64| [(String::new(), value)];
        let now = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        let by = |label: &str, rows: &[(&'static str, u64)]| -> Vec<(String, u64)> {
            rows.iter()
                .map(|(name, value)| (format!("{{{label}=\"{name}\"}}"), *value))
                .collect()
        };
        family(
            "tidelock_gateway_connections",
            "gauge",
            "Open connections.",
            &[
                ("{kind=\"known\"}".to_owned(), now(self.connections_known)),
                (
                    "{kind=\"stranger\"}".to_owned(),
                    now(self.connections_strangers),
                ),
            ],
        );
        family(
            "tidelock_gateway_in_flight",
            "gauge",
            "Decisions in flight.",
            &plain(now(self.in_flight)),
        );
        family(
            "tidelock_gateway_accepted_total",
            "counter",
            "Connections accepted.",
            &plain(self.accepted),
        );
        family(
            "tidelock_gateway_decisions_total",
            "counter",
            "Decisions answered.",
            &plain(self.decisions),
        );
        family(
            "tidelock_gateway_unanswered_total",
            "counter",
            "Decisions that did not come back in time and were answered 503.",
            &plain(self.unanswered),
        );
        family(
            "tidelock_gateway_identity_headers_ignored_total",
            "counter",
            "Identity headers from callers that are not believed in them.",
            &plain(self.headers_ignored),
        );
        family(
            "tidelock_gateway_closed_total",
            "counter",
            "Connections that the gateway closed.",
            &by("cause", &self.closed),
        );
        family(
            "tidelock_gateway_refused_total",
            "counter",
            "Requests refused before they were judged.",
            &by("kind", &self.refused),
        );
        family(
            "tidelock_gateway_credentials_refused_total",
            "counter",
            "Credentials that were not taken.",
            &by("code", &self.credentials),
        );
    }
}
