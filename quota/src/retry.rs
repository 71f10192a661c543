//! Bounded retry within a session, and a budget across sessions.
//!
//! INV-12: within a session attempts only count up and the last one ends it; no timer and no
//! success resets the count. Across sessions a budget bounds the rate of dials; it is refilled only
//! by an authenticated Hello from that peer or by an operator. A spent budget parks nothing: the
//! node dials once per cap interval, for ever.

use std::time::Duration;

use crate::limits::{MAX_ATTEMPTS, MAX_BACKOFF};

/// How often and how patiently one session retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryConfig {
    /// Width of the first delay's window; it doubles with each attempt.
    pub base: Duration,
    /// Width that the window never exceeds.
    pub cap: Duration,
    /// Delays that are handed out before the session ends.
    pub attempts_max: u32,
}

/// Why a retry configuration was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RetryConfigError {
    /// A base of zero would retry in a tight loop.
    #[error("base delay is 0: give at least 1 ms")]
    ZeroBase,
    /// The cap lies below the base.
    #[error("cap {cap:?} is below base {base:?}")]
    CapBelowBase {
        /// The cap.
        cap: Duration,
        /// The base.
        base: Duration,
    },
    /// The cap lies above the limit.
    #[error("cap {cap:?} is above the longest back-off, {MAX_BACKOFF:?}")]
    CapTooLong {
        /// The cap.
        cap: Duration,
    },
    /// No attempt, or so many that there is no bound.
    #[error("{attempts} attempts are not between 1 and {MAX_ATTEMPTS}")]
    Attempts {
        /// What was asked for.
        attempts: u32,
    },
    /// The shortest time between two immediate dials is zero.
    #[error("link-up interval is 0: a flapping link would dial in a tight loop")]
    ZeroLinkUpInterval,
}

/// The retries of one session: a count that only goes up.
///
/// It is neither `Clone` nor resettable on purpose; a new session makes a new one, and the
/// [`RetryBudget`] decides whether there is a new session.
#[derive(Debug)]
pub struct BoundedRetry {
    config: RetryConfig,
    attempts: u32,
}

impl BoundedRetry {
    /// A session that has not retried yet.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(config: RetryConfig) -> Result<Self, RetryConfigError> {
        if config.base.is_zero() {
            return Err(RetryConfigError::ZeroBase);
        }
        if config.cap < config.base {
            return Err(RetryConfigError::CapBelowBase {
                cap: config.cap,
                base: config.base,
            });
        }
        if config.cap > MAX_BACKOFF {
            return Err(RetryConfigError::CapTooLong { cap: config.cap });
        }
        if config.attempts_max == 0 || config.attempts_max > MAX_ATTEMPTS {
            return Err(RetryConfigError::Attempts {
                attempts: config.attempts_max,
            });
        }
        Ok(Self {
            config,
            attempts: 0,
        })
    }

    /// The delay before the next attempt, or `None` when the session is over, for good.
    ///
    /// Full jitter: `jitter` is a uniform 64-bit number from the caller's seeded source, and the
    /// delay is that fraction of the window.
    #[must_use = "a delay that is not waited for is a retry without back-off"]
    pub fn next_delay(&mut self, jitter: u64) -> Option<Duration> {
        if self.is_exhausted() {
            return None;
        }
        let window = self.window();
        // INV-12: the count only goes up.
        self.attempts += 1;
        let scaled = (window.as_nanos() * u128::from(jitter)) >> 64;
        // The window is at most MAX_BACKOFF, which limits.rs proves to fit.
        Some(Duration::from_nanos(
            u64::try_from(scaled).unwrap_or(u64::MAX),
        ))
    }

    /// The window that the next delay is drawn from.
    fn window(&self) -> Duration {
        let factor = 1u32.checked_shl(self.attempts).unwrap_or(u32::MAX);
        self.config.base.saturating_mul(factor).min(self.config.cap)
    }

    /// Delays handed out so far.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Whether the last attempt was used.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.attempts >= self.config.attempts_max
    }
}

/// How many dials to one peer may happen at the session's pace before the slow pace begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudgetConfig {
    /// Dials in a full budget.
    pub dials: u32,
    /// Time between two dials once the budget is spent.
    pub cap: Duration,
    /// Shortest time between two immediate dials that link-up events grant.
    pub link_up_interval: Duration,
}

/// A dial that has to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("dial budget is spent, next dial in {} ms", retry_after.as_millis())]
pub struct BudgetSpent {
    /// Time after which a dial is granted.
    pub retry_after: Duration,
}

/// The budget of dials to one peer, across sessions.
#[derive(Debug)]
pub struct RetryBudget {
    config: RetryBudgetConfig,
    left: u32,
    last_dial: Option<Duration>,
    last_grant: Option<Duration>,
    immediate: bool,
}

/// Whether an interval has passed since then.
fn rested(since: Option<Duration>, interval: Duration, now: Duration) -> Result<(), BudgetSpent> {
    let elapsed = since.map_or(interval, |since| now.saturating_sub(since));
    match interval.checked_sub(elapsed) {
        None | Some(Duration::ZERO) => Ok(()),
        Some(retry_after) => Err(BudgetSpent { retry_after }),
    }
}

impl RetryBudget {
    /// A full budget.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(config: RetryBudgetConfig) -> Result<Self, RetryConfigError> {
        if config.dials == 0 || config.dials > MAX_ATTEMPTS {
            return Err(RetryConfigError::Attempts {
                attempts: config.dials,
            });
        }
        if config.cap.is_zero() {
            return Err(RetryConfigError::ZeroBase);
        }
        if config.cap > MAX_BACKOFF {
            return Err(RetryConfigError::CapTooLong { cap: config.cap });
        }
        if config.link_up_interval.is_zero() {
            return Err(RetryConfigError::ZeroLinkUpInterval);
        }
        Ok(Self {
            config,
            left: config.dials,
            last_dial: None,
            last_grant: None,
            immediate: false,
        })
    }

    /// Takes note of the time: a clock that stepped back costs one interval from here on, and not the
    /// time that it went back.
    pub fn observe(&mut self, now: Duration) {
        self.last_dial = self.last_dial.map(|last| last.min(now));
        self.last_grant = self.last_grant.map(|last| last.min(now));
    }

    /// Asks for one dial now, and charges it when it is granted.
    ///
    /// # Errors
    /// The budget is spent and the cap interval since the last dial has not passed.
    pub fn try_dial(&mut self, now: Duration) -> Result<(), BudgetSpent> {
        self.observe(now);
        if self.immediate {
            self.immediate = false;
        } else if self.left > 0 {
            self.left -= 1;
        } else {
            // INV-12: time grants single dials at the slow pace; it never refills the budget.
            rested(self.last_dial, self.config.cap, now)?;
        }
        self.last_dial = Some(now);
        Ok(())
    }

    /// An authenticated Hello came from this peer: the budget is full again.
    pub fn on_authenticated_hello(&mut self) {
        self.left = self.config.dials;
    }

    /// An operator asked for this peer: the budget is full again.
    pub fn on_operator(&mut self) {
        self.left = self.config.dials;
    }

    /// A link came up, or the peer came in by itself: one immediate dial, at most one per
    /// link-up interval. The budget is not refilled. Returns whether the dial was granted.
    pub fn on_link_up(&mut self, now: Duration) -> bool {
        self.observe(now);
        let granted = rested(self.last_grant, self.config.link_up_interval, now).is_ok();
        if granted {
            self.last_grant = Some(now);
            self.immediate = true;
        }
        granted
    }

    /// Asks for one dial because of a hint that anybody may have given, and charges it when it is granted:
    /// to what is left at the session's pace, and after that as an immediate dial, of which there is one
    /// per link-up interval. The slow pace of the peer's own dials is never pushed back by it.
    ///
    /// # Errors
    /// The budget is spent and the link-up interval since the last immediate dial has not passed.
    pub fn try_hinted(&mut self, now: Duration) -> Result<(), BudgetSpent> {
        self.observe(now);
        if self.left > 0 {
            self.left -= 1;
            return Ok(());
        }
        // INV-12: time grants single dials; it never refills the budget.
        rested(self.last_grant, self.config.link_up_interval, now)?;
        self.last_grant = Some(now);
        Ok(())
    }

    /// Dials left at the session's pace.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.left
    }

    /// Whether only the slow pace is left.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const CONFIG: RetryConfig = RetryConfig {
        base: Duration::from_millis(100),
        cap: Duration::from_secs(2),
        attempts_max: 6,
    };
    const BUDGET: RetryBudgetConfig = RetryBudgetConfig {
        dials: 3,
        cap: Duration::from_secs(60),
        link_up_interval: Duration::from_secs(5),
    };

    #[test]
    fn nonsense_is_refused_by_the_constructor() {
        let make = |config| BoundedRetry::new(config).map(|_| ());
        assert_eq!(make(CONFIG), Ok(()));
        assert_eq!(
            make(RetryConfig {
                base: Duration::ZERO,
                ..CONFIG
            }),
            Err(RetryConfigError::ZeroBase)
        );
        assert_eq!(
            make(RetryConfig { cap: MS, ..CONFIG }),
            Err(RetryConfigError::CapBelowBase {
                cap: MS,
                base: CONFIG.base
            })
        );
        assert_eq!(
            make(RetryConfig {
                cap: Duration::MAX,
                ..CONFIG
            }),
            Err(RetryConfigError::CapTooLong { cap: Duration::MAX })
        );
        for attempts in [0, MAX_ATTEMPTS + 1] {
            assert_eq!(
                make(RetryConfig {
                    attempts_max: attempts,
                    ..CONFIG
                }),
                Err(RetryConfigError::Attempts { attempts })
            );
        }

        let make = |config| RetryBudget::new(config).map(|_| ());
        assert_eq!(make(BUDGET), Ok(()));
        assert_eq!(
            make(RetryBudgetConfig { dials: 0, ..BUDGET }),
            Err(RetryConfigError::Attempts { attempts: 0 })
        );
        assert_eq!(
            make(RetryBudgetConfig {
                cap: Duration::ZERO,
                ..BUDGET
            }),
            Err(RetryConfigError::ZeroBase)
        );
        assert_eq!(
            make(RetryBudgetConfig {
                cap: Duration::MAX,
                ..BUDGET
            }),
            Err(RetryConfigError::CapTooLong { cap: Duration::MAX })
        );
        assert_eq!(
            make(RetryBudgetConfig {
                link_up_interval: Duration::ZERO,
                ..BUDGET
            }),
            Err(RetryConfigError::ZeroLinkUpInterval)
        );
    }

    #[test]
    fn windows_double_up_to_the_cap() {
        let mut retry = BoundedRetry::new(CONFIG).unwrap();
        let widest: Vec<_> = std::iter::from_fn(|| retry.next_delay(u64::MAX))
            .map(|delay| delay.as_millis() + 1)
            .collect();
        assert_eq!(widest, [100, 200, 400, 800, 1600, 2000]);
    }

    #[test]
    fn inv_12_attempts_only_count_up_and_the_last_one_ends_the_session() {
        let mut retry = BoundedRetry::new(CONFIG).unwrap();
        for attempt in 1..=CONFIG.attempts_max {
            assert!(!retry.is_exhausted());
            assert!(retry.next_delay(0).is_some());
            assert_eq!(retry.attempts(), attempt);
        }
        for _ in 0..1_000 {
            assert_eq!(retry.next_delay(u64::MAX), None);
            assert!(retry.is_exhausted());
            assert_eq!(retry.attempts(), CONFIG.attempts_max);
        }
    }

    #[test]
    fn inv_12_a_spent_budget_dials_once_per_cap_interval_for_ever() {
        let mut budget = RetryBudget::new(BUDGET).unwrap();
        for _ in 0..BUDGET.dials {
            assert_eq!(budget.try_dial(Duration::ZERO), Ok(()));
        }
        assert_eq!(
            budget.try_dial(Duration::from_secs(20)),
            Err(BudgetSpent {
                retry_after: Duration::from_secs(40)
            })
        );
        // A year of asking every second: exactly one dial a minute, and never a parked peer.
        let year_s = 365 * 24 * 60 * 60;
        let dials = (1..=year_s).filter(|s| budget.try_dial(Duration::from_secs(*s)).is_ok());
        assert_eq!(dials.count() as u64, year_s / 60);
        assert!(budget.is_spent(), "no timer refilled it");
    }

    #[test]
    fn inv_12_hints_share_the_budget_and_never_push_the_slow_pace_back() {
        let mut budget = RetryBudget::new(BUDGET).unwrap();
        budget.try_dial(Duration::ZERO).unwrap();
        // A hint every second for an hour: what was left, then one per link-up interval.
        let mut own = 0;
        let mut hinted = 0;
        for s in 0..3_600 {
            let now = Duration::from_secs(s);
            hinted += u64::from(budget.try_hinted(now).is_ok());
            own += u64::from(budget.try_dial(now).is_ok());
        }
        assert_eq!(budget.left(), 0);
        assert!(
            hinted <= u64::from(BUDGET.dials) + 3_600 / 5 + 1,
            "{hinted}"
        );
        assert!(
            (60..=62).contains(&own),
            "{own} dials of its own in an hour"
        );
        assert_eq!(
            budget.try_hinted(Duration::from_secs(3_596)),
            Err(BudgetSpent {
                retry_after: BUDGET.link_up_interval
            }),
            "a clock that stepped back costs one interval"
        );
        budget.on_authenticated_hello();
        assert_eq!(budget.try_hinted(Duration::from_secs(3_600)), Ok(()));
    }

    #[test]
    fn inv_12_only_a_hello_or_an_operator_refills() {
        for refill in [
            RetryBudget::on_authenticated_hello,
            RetryBudget::on_operator,
        ] {
            let mut budget = RetryBudget::new(BUDGET).unwrap();
            while !budget.is_spent() {
                budget.try_dial(Duration::ZERO).unwrap();
            }
            assert!(budget.try_dial(MS).is_err());
            budget.on_link_up(MS);
            assert_eq!(budget.left(), 0, "a link event grants a dial, not a budget");
            refill(&mut budget);
            assert_eq!(budget.left(), BUDGET.dials);
            budget.try_dial(MS).unwrap();
        }
    }

    #[test]
    fn a_link_up_event_grants_one_dial_at_a_limited_rate() {
        let mut budget = RetryBudget::new(BUDGET).unwrap();
        while !budget.is_spent() {
            budget.try_dial(Duration::ZERO).unwrap();
        }
        let at = Duration::from_secs(1);
        assert!(budget.on_link_up(at));
        assert!(
            !budget.on_link_up(at),
            "a flapping link grants nothing more"
        );
        assert_eq!(budget.try_dial(at), Ok(()));
        assert!(budget.try_dial(at).is_err());
        assert!(!budget.on_link_up(at + BUDGET.link_up_interval - MS));
        assert!(budget.on_link_up(at + BUDGET.link_up_interval));
        assert_eq!(budget.try_dial(at + BUDGET.link_up_interval), Ok(()));
    }

    #[test]
    fn a_clock_that_steps_back_costs_one_interval() {
        let mut budget = RetryBudget::new(BUDGET).unwrap();
        let late = Duration::from_secs(1_000_000);
        for _ in 0..BUDGET.dials {
            budget.try_dial(late).unwrap();
        }
        assert!(budget.on_link_up(late));
        budget.try_dial(late).unwrap();
        let early = Duration::from_secs(10);
        assert_eq!(
            budget.try_dial(early),
            Err(BudgetSpent {
                retry_after: BUDGET.cap
            })
        );
        assert_eq!(budget.try_dial(early + BUDGET.cap), Ok(()));
        assert!(budget.on_link_up(early + BUDGET.link_up_interval));
    }

    proptest! {
        #[test]
        fn delays_stay_inside_their_window(
            base_ms in 1u64..5_000,
            factor in 1u32..100,
            attempts_max in 1u32..=MAX_ATTEMPTS,
            jitter in any::<u64>(),
        ) {
            let base = Duration::from_millis(base_ms);
            let cap = base * factor;
            let mut retry = BoundedRetry::new(RetryConfig { base, cap, attempts_max }).unwrap();
            let mut handed_out = 0;
            while let Some(delay) = retry.next_delay(jitter) {
                prop_assert!(delay <= cap);
                handed_out += 1;
            }
            prop_assert_eq!(handed_out, attempts_max);
        }
    }
}
