//! The transport guards: how many requests one caller may send, whatever they ask for, and how many
//! handshakes one address may begin.
//!
//! The one stands after authentication and before a slot or the body, the other before a byte of TLS is
//! read. What they refuse was not judged, so it is `rate_limited` and counted with the other refusals,
//! not recorded one by one.

use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tidelock_quota::{Ladder, MonotonicClock, Rate, RateError};

/// One rate for each of whom it counts.
#[derive(Debug)]
pub(crate) struct Guard<K> {
    clock: MonotonicClock,
    buckets: Mutex<Ladder<K, 1>>,
}

impl<K: Clone + Eq + Hash + Ord> Guard<K> {
    /// At most `max_keys` are told apart; beyond that the fullest bucket is forgotten.
    pub(crate) fn new(rate: Rate, max_keys: usize) -> Result<Self, RateError> {
        Ok(Self {
            clock: MonotonicClock::new(),
            buckets: Mutex::new(Ladder::new([Some(rate)], max_keys)?),
        })
    }

    pub(crate) fn set(&self, rate: Rate) {
        let now = self.clock.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // Refused only for a rate of nothing; then the old one stays.
        if let Err(error) = buckets.set_rates([Some(rate)], now) {
            tracing::error!(%error, "the rate stays as it was");
        }
    }

    /// Charges one, or says when to come back.
    pub(crate) fn check(&self, who: K) -> Result<(), Duration> {
        let now = self.clock.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets
            .check(&[who], now)
            .map_err(|refused| refused.retry_after)
    }
}
