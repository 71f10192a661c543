//! Requests that were turned away before anything judged them, counted exactly.
//!
//! A stranger must not be able to write one audit record a request, so refusals are fixed-size
//! counters, told apart by source, and leave the gateway as one [`RefusalWindow`] a window
//! (ruling 20). The node turns each window into one audit record. Nothing in here knows a clock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Serialize, Serializer};
use tidelock_quota::AddressBlock;

use crate::limits::REFUSAL_SOURCES_MAX;

/// Where a request came from, as far as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A TCP client, by address, IPv6 by its /64: the port changes with every connection and says nothing.
    Tcp(AddressBlock),
    /// A client of the TLS door, in the same way.
    Tls(AddressBlock),
    /// A client of the Unix socket, by the user id that the kernel vouches for.
    Unix(u32),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "ip:{address}"),
            Self::Tls(address) => write!(f, "tls:{address}"),
            Self::Unix(uid) => write!(f, "uid:{uid}"),
        }
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a request was turned away before it was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// No credentials at all.
    NoCredentials,
    /// Credentials that nobody was given.
    BadCredentials,
    /// Known caller, but without the scope that the request needs.
    MissingScope,
    /// An operator's request through the wrong door or by the wrong user.
    NotOperator,
    /// A `Host` or `Origin` that is not this machine: a browser led astray.
    WrongHost,
    /// The concurrency limit was reached.
    Busy,
    /// A request whose body never arrived whole.
    Incomplete,
    /// More requests than one caller may send.
    RateLimited,
}

/// Exact numbers of refusals, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RefusalCounts {
    /// No credentials at all.
    pub no_credentials: u64,
    /// Credentials that nobody was given.
    pub bad_credentials: u64,
    /// Known caller without the scope.
    pub missing_scope: u64,
    /// An operator's request that did not come from the operator.
    pub not_operator: u64,
    /// A `Host` or `Origin` that is not this machine.
    pub wrong_host: u64,
    /// Over the concurrency limit.
    pub busy: u64,
    /// A body that never arrived whole.
    pub incomplete: u64,
    /// Over the rate of one caller.
    pub rate_limited: u64,
}

impl RefusalCounts {
    fn add(&mut self, kind: RefusalKind) {
        let counter = match kind {
            RefusalKind::NoCredentials => &mut self.no_credentials,
            RefusalKind::BadCredentials => &mut self.bad_credentials,
            RefusalKind::MissingScope => &mut self.missing_scope,
            RefusalKind::NotOperator => &mut self.not_operator,
            RefusalKind::WrongHost => &mut self.wrong_host,
            RefusalKind::Busy => &mut self.busy,
            RefusalKind::Incomplete => &mut self.incomplete,
            RefusalKind::RateLimited => &mut self.rate_limited,
        };
        *counter = counter.saturating_add(1);
    }

    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> u64 {
        [
            self.no_credentials,
            self.bad_credentials,
            self.missing_scope,
            self.not_operator,
            self.wrong_host,
            self.busy,
            self.incomplete,
            self.rate_limited,
        ]
        .iter()
        .fold(0, |sum, n| sum.saturating_add(*n))
    }
}

/// What one source was refused within one window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceRefusals {
    /// Who.
    pub source: Source,
    /// How often, by kind.
    #[serde(flatten)]
    pub counts: RefusalCounts,
}

/// One window's refusals: bounded in size, exact in its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusalWindow {
    /// How long the window was, in milliseconds.
    pub window_ms: u64,
    /// All refusals of all sources.
    pub total: u64,
    /// By source, in ascending order, at most [`REFUSAL_SOURCES_MAX`] of them.
    pub sources: Vec<SourceRefusals>,
    /// What further sources were refused, together.
    pub others: RefusalCounts,
    /// How often credentials were refused with each code; those that did not occur are left out.
    pub codes: BTreeMap<&'static str, u64>,
}

/// The counters of the window that is open now.
#[derive(Debug, Default)]
pub(crate) struct RefusalLedger {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    sources: BTreeMap<Source, RefusalCounts>,
    others: RefusalCounts,
    codes: BTreeMap<&'static str, u64>,
}

impl RefusalLedger {
    /// Counts why credentials were refused. Codes are texts of this program, so they are few.
    pub(crate) fn count_code(&self, code: &'static str) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.codes.entry(code).or_default();
        *count = count.saturating_add(1);
    }

    // INV-07: the map stops growing at its limit; the numbers stay exact.
    pub(crate) fn count(&self, source: Source, kind: RefusalKind) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counts) = open.sources.get_mut(&source) {
            counts.add(kind);
        } else if open.sources.len() < REFUSAL_SOURCES_MAX {
            open.sources.entry(source).or_default().add(kind);
        } else {
            open.others.add(kind);
        }
    }

    /// Closes the window. `None` when nothing was refused in it.
    pub(crate) fn close_window(&self, length: Duration) -> Option<RefusalWindow> {
        let closed = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *open)
        };
        let sources: Vec<_> = closed
            .sources
            .into_iter()
            .map(|(source, counts)| SourceRefusals { source, counts })
            .collect();
        let total = sources.iter().fold(closed.others.total(), |sum, s| {
            sum.saturating_add(s.counts.total())
        });
        (total > 0).then(|| RefusalWindow {
            window_ms: u64::try_from(length.as_millis()).unwrap_or(u64::MAX),
            total,
            sources,
            others: closed.others,
            codes: closed.codes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::REFUSAL_SOURCE_JSON_BYTES_MAX;

    #[test]
    fn inv_07_a_window_is_bounded_and_exact() {
        let ledger = RefusalLedger::default();
        let sources = u32::try_from(REFUSAL_SOURCES_MAX).unwrap();
        for uid in 0..sources + 50 {
            for _ in 0..3 {
                ledger.count(Source::Unix(uid), RefusalKind::NoCredentials);
            }
        }
        ledger.count(Source::Unix(7), RefusalKind::BadCredentials);

        let window = ledger.close_window(Duration::from_secs(60)).unwrap();
        assert_eq!(window.sources.len(), REFUSAL_SOURCES_MAX);
        assert_eq!(window.total, u64::from(sources + 50) * 3 + 1);
        assert_eq!(window.others.no_credentials, 150);
        assert_eq!(window.sources[7].counts.no_credentials, 3);
        assert_eq!(window.sources[7].counts.bad_credentials, 1);

        // The next window starts empty, and an empty window is no record.
        assert_eq!(ledger.close_window(Duration::from_secs(60)), None);
    }

    #[test]
    fn the_widest_window_fits_one_audit_record() {
        let widest = SourceRefusals {
            source: Source::Tls(AddressBlock::of(
                "1111:2222:3333:4444:5555:6666:7777:8888".parse().unwrap(),
            )),
            counts: RefusalCounts {
                no_credentials: u64::MAX,
                bad_credentials: u64::MAX,
                missing_scope: u64::MAX,
                not_operator: u64::MAX,
                wrong_host: u64::MAX,
                busy: u64::MAX,
                incomplete: u64::MAX,
                rate_limited: u64::MAX,
            },
        };
        let json = serde_json::to_vec(&widest).unwrap();
        assert!(
            json.len() <= REFUSAL_SOURCE_JSON_BYTES_MAX,
            "{}",
            json.len()
        );
    }
}
