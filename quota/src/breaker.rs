//! A breaker for upstreams that fail repeatedly.
//!
//! Closed: calls pass, failures inside the window are counted. Open: nothing passes until the
//! open time is over. Half-open: exactly one probe passes; its success closes the breaker, its
//! failure opens it again. A probe that never reports back (its caller died) blocks the next one
//! for one open time only.
//!
//! Each permitted call carries a [`Call`] that is handed back with its result, so the late success
//! of a call that began before the breaker opened cannot close it.

use std::{collections::VecDeque, time::Duration};

use crate::limits::MAX_BREAKER_FAILURES;

/// When a breaker opens and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures inside the window that open it.
    pub failures: u32,
    /// The window.
    pub window: Duration,
    /// Time it stays open before a probe may pass.
    pub open_for: Duration,
}

impl Default for BreakerConfig {
    /// Five failures in 60 s open it for 30 s.
    fn default() -> Self {
        Self {
            failures: 5,
            window: Duration::from_secs(60),
            open_for: Duration::from_secs(30),
        }
    }
}

/// Why a breaker configuration was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BreakerConfigError {
    /// No failure, or so many that nothing would ever open it.
    #[error("{failures} failures are not between 1 and {MAX_BREAKER_FAILURES}")]
    Failures {
        /// What was asked for.
        failures: u32,
    },
    /// A window or an open time of zero.
    #[error("window and open time must be longer than 0")]
    ZeroTime,
}

/// The call is not let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("breaker is open, retry after {} ms", retry_after.as_millis())]
pub struct BreakerOpen {
    /// Time after which a probe may pass.
    pub retry_after: Duration,
}

/// What the breaker does with the next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls pass.
    Closed,
    /// Nothing passes.
    Open,
    /// One probe may pass, or is under way.
    HalfOpen,
}

/// A call that was let through; give it back with its result.
#[derive(Debug)]
#[must_use = "report the result with on_success or on_failure"]
pub struct Call {
    /// The breaker's generation when the call began.
    generation: u64,
}

#[derive(Debug)]
enum State {
    Closed { failed_at: VecDeque<Duration> },
    Open { until: Duration },
    Probing { lost_at: Duration },
}

/// Guards one upstream.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    state: State,
    /// Changes with every change of state, so that results of older calls are told apart.
    generation: u64,
}

impl Breaker {
    /// A closed breaker.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(config: BreakerConfig) -> Result<Self, BreakerConfigError> {
        if config.failures == 0 || config.failures > MAX_BREAKER_FAILURES {
            return Err(BreakerConfigError::Failures {
                failures: config.failures,
            });
        }
        if config.window.is_zero() || config.open_for.is_zero() {
            return Err(BreakerConfigError::ZeroTime);
        }
        Ok(Self {
            config,
            state: State::Closed {
                failed_at: VecDeque::new(),
            },
            generation: 0,
        })
    }

    /// Asks to make one call.
    ///
    /// # Errors
    /// The breaker is open, or its one probe is under way.
    pub fn admit(&mut self, now: Duration) -> Result<Call, BreakerOpen> {
        let blocked_until = match self.state {
            State::Closed { .. } => None,
            State::Open { until } => Some(until),
            State::Probing { lost_at } => Some(lost_at),
        };
        if let Some(until) = blocked_until {
            if now < until {
                return Err(BreakerOpen {
                    retry_after: until - now,
                });
            }
            self.enter(State::Probing {
                lost_at: now.saturating_add(self.config.open_for),
            });
        }
        Ok(Call {
            generation: self.generation,
        })
    }

    /// The call came back well.
    pub fn on_success(&mut self, call: Call) {
        if call.generation != self.generation {
            return;
        }
        // A success does not forgive failures of a closed breaker: the window does.
        if matches!(self.state, State::Probing { .. }) {
            self.enter(State::Closed {
                failed_at: VecDeque::new(),
            });
        }
    }

    /// The call failed.
    pub fn on_failure(&mut self, call: Call, now: Duration) {
        if call.generation != self.generation {
            return;
        }
        let BreakerConfig {
            failures,
            window,
            open_for,
        } = self.config;
        let open = match &mut self.state {
            State::Closed { failed_at } => {
                failed_at.retain(|at| now.saturating_sub(*at) < window);
                failed_at.push_back(now);
                // INV-07: the list is at most `failures` long, then it is dropped.
                failed_at.len() >= failures as usize
            }
            State::Probing { .. } => true,
            State::Open { .. } => false,
        };
        if open {
            self.enter(State::Open {
                until: now.saturating_add(open_for),
            });
        }
    }

    /// What happens to a call now.
    #[must_use]
    pub fn state(&self, now: Duration) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { until } if now < until => BreakerState::Open,
            State::Open { .. } | State::Probing { .. } => BreakerState::HalfOpen,
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.generation = self.generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn breaker() -> Breaker {
        Breaker::new(BreakerConfig::default()).unwrap()
    }

    fn fail(breaker: &mut Breaker, now: Duration) {
        let call = breaker.admit(now).unwrap();
        breaker.on_failure(call, now);
    }

    fn opened(now: Duration) -> Breaker {
        let mut breaker = breaker();
        for _ in 0..5 {
            fail(&mut breaker, now);
        }
        breaker
    }

    #[test]
    fn nonsense_is_refused_by_the_constructor() {
        let make = |config| Breaker::new(config).map(|_| ());
        let good = BreakerConfig::default();
        assert_eq!(make(good), Ok(()));
        for failures in [0, MAX_BREAKER_FAILURES + 1] {
            assert_eq!(
                make(BreakerConfig { failures, ..good }),
                Err(BreakerConfigError::Failures { failures })
            );
        }
        for config in [
            BreakerConfig {
                window: Duration::ZERO,
                ..good
            },
            BreakerConfig {
                open_for: Duration::ZERO,
                ..good
            },
        ] {
            assert_eq!(make(config), Err(BreakerConfigError::ZeroTime));
        }
    }

    #[test]
    fn five_failures_in_the_window_open_it() {
        let mut breaker = breaker();
        for second in 0..4 {
            fail(&mut breaker, s(second));
            assert_eq!(breaker.state(s(second)), BreakerState::Closed);
        }
        fail(&mut breaker, s(4));
        assert_eq!(breaker.state(s(4)), BreakerState::Open);
        assert_eq!(
            breaker.admit(s(10)).unwrap_err(),
            BreakerOpen { retry_after: s(24) }
        );
    }

    #[test]
    fn failures_spread_wider_than_the_window_do_not() {
        let mut breaker = breaker();
        for n in 0..100 {
            fail(&mut breaker, s(n * 16));
            assert_eq!(breaker.state(s(n * 16)), BreakerState::Closed);
        }
    }

    #[test]
    fn exactly_one_probe_passes_and_its_success_closes() {
        let mut breaker = opened(s(0));
        assert_eq!(breaker.state(s(30)), BreakerState::HalfOpen);
        let probe = breaker.admit(s(30)).unwrap();
        assert!(breaker.admit(s(31)).is_err(), "one probe only");
        breaker.on_success(probe);
        assert_eq!(breaker.state(s(31)), BreakerState::Closed);
        for _ in 0..4 {
            fail(&mut breaker, s(31));
        }
        assert_eq!(
            breaker.state(s(31)),
            BreakerState::Closed,
            "old failures are forgotten"
        );
    }

    #[test]
    fn a_failed_probe_opens_it_again() {
        let mut breaker = opened(s(0));
        fail(&mut breaker, s(30));
        assert_eq!(
            breaker.admit(s(59)).unwrap_err(),
            BreakerOpen { retry_after: s(1) }
        );
        assert!(breaker.admit(s(60)).is_ok());
    }

    #[test]
    fn a_lost_probe_blocks_for_one_open_time_only() {
        let mut breaker = opened(s(0));
        drop(breaker.admit(s(30)).unwrap());
        assert!(breaker.admit(s(59)).is_err());
        let second = breaker.admit(s(60)).unwrap();
        breaker.on_success(second);
        assert_eq!(breaker.state(s(60)), BreakerState::Closed);
    }

    #[test]
    fn late_results_of_older_calls_change_nothing() {
        let mut breaker = breaker();
        let early_success = breaker.admit(s(0)).unwrap();
        let early_failure = breaker.admit(s(0)).unwrap();
        for _ in 0..5 {
            fail(&mut breaker, s(1));
        }
        breaker.on_success(early_success);
        assert_eq!(breaker.state(s(1)), BreakerState::Open);
        let probe = breaker.admit(s(31)).unwrap();
        breaker.on_failure(early_failure, s(31));
        assert_eq!(breaker.state(s(31)), BreakerState::HalfOpen);
        breaker.on_success(probe);
        assert_eq!(breaker.state(s(31)), BreakerState::Closed);
    }
}
