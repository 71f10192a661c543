//! The transport guard: how many requests one caller may send, whatever they ask for.
//!
//! It stands after authentication and before a slot or the body. What it refuses was not judged, so
//! it is `rate_limited` and counted with the other refusals, not recorded one by one.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tidelock_quota::{Ladder, MonotonicClock, Rate, RateError};

use crate::limits::GUARD_CALLERS_MAX;

/// A principal as it is authenticated.
type Who = (String, String);

#[derive(Debug)]
pub(crate) struct Guard {
    clock: MonotonicClock,
    buckets: Mutex<Ladder<Who, 1>>,
}

impl Guard {
    pub(crate) fn new(rate: Rate) -> Result<Self, RateError> {
        Ok(Self {
            clock: MonotonicClock::new(),
            buckets: Mutex::new(Ladder::new([Some(rate)], GUARD_CALLERS_MAX)?),
        })
    }

    pub(crate) fn set(&self, rate: Rate) {
        let now = self.clock.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // Refused only for a rate of nothing; then the old one stays.
        if let Err(error) = buckets.set_rates([Some(rate)], now) {
            tracing::error!(%error, "the rate of requests stays as it was");
        }
    }

    /// Charges one request, or says when to come back.
    pub(crate) fn check(&self, kind: &str, id: &str) -> Result<(), Duration> {
        let who = (kind.to_owned(), id.to_owned());
        let now = self.clock.elapsed();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets
            .check(&[who], now)
            .map_err(|refused| refused.retry_after)
    }
}
