//! The two clocks of the buckets: the real monotonic one and one that a test moves by hand.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use governor::clock::Clock;

/// Monotonic time since this clock was made, as the node's `now`.
#[derive(Debug, Clone)]
pub struct MonotonicClock {
    start: Instant,
    simulated: Option<ManualClock>,
}

impl MonotonicClock {
    /// A clock that reads zero now. A process makes one and clones it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            simulated: None,
        }
    }

    /// A clock that shows a simulation's time: what runs on it is none the wiser.
    #[must_use]
    pub fn simulated(clock: ManualClock) -> Self {
        Self {
            simulated: Some(clock),
            ..Self::new()
        }
    }

    /// Time since the clock was made.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        match &self.simulated {
            Some(clock) => clock.elapsed(),
            None => self.start.elapsed(),
        }
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for MonotonicClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.elapsed()
    }
}

/// A clock for tests and simulations; clones share one time, which only moves forward.
#[derive(Debug, Clone, Default)]
pub struct ManualClock {
    nanos: Arc<AtomicU64>,
}

impl ManualClock {
    /// A clock at zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves the clock and all its clones forward. Saturates after 584 years.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        // The closure never refuses, so the previous value is of no interest.
        let _ = self
            .nanos
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |nanos| {
                Some(nanos.saturating_add(by))
            });
    }

    /// The clock's time.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Acquire))
    }
}

impl Clock for ManualClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_clock_shows_the_time_of_the_simulation() {
        let manual = ManualClock::new();
        let clock = MonotonicClock::simulated(manual.clone());
        assert_eq!(clock.elapsed(), Duration::ZERO);
        manual.advance(Duration::from_secs(86_400));
        assert_eq!(clock.clone().elapsed(), Duration::from_secs(86_400));
    }

    #[test]
    fn clones_of_a_manual_clock_share_their_time() {
        let clock = ManualClock::new();
        let clone = clock.clone();
        clock.advance(Duration::from_millis(5));
        assert_eq!(clone.now(), Duration::from_millis(5));
        clock.advance(Duration::MAX);
        clock.advance(Duration::from_secs(1));
        assert_eq!(clone.elapsed(), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn the_monotonic_clock_does_not_step_back() {
        let clock = MonotonicClock::new();
        let first = clock.now();
        assert!(clock.clone().now() >= first);
    }
}
