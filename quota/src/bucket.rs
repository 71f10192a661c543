//! Keyed token buckets over `governor`, with a bound on the number of keys.
//!
//! INV-13: each key has its own bucket, so one key's flood costs the others nothing, and a refused
//! request costs its own key nothing either (no debt).
//!
//! INV-07: `governor`'s own keyed stores grow with every key that is ever seen until somebody calls
//! `retain_recent`. The store here holds at most `max_keys` and makes room by itself, always giving
//! up the bucket that is nearest to full, in logarithmic time. A bucket that is full again loses
//! nothing by it.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::Hash,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, Reference},
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{StateStore, keyed::ShrinkableKeyedStateStore},
};

use crate::limits::{MAX_KEYS, MAX_UNITS_PER_SECOND};

/// A sustained rate and the burst that a rested key may spend at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Tokens that flow back each second.
    pub per_second: u32,
    /// Tokens that a full bucket holds.
    pub burst: u32,
}

/// Why a [`TokenBuckets`] could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// A rate of nothing would refuse everything for ever.
    #[error("rate per second is 0: give at least 1, or remove the quota's user")]
    ZeroRate,
    /// A bucket that holds nothing would refuse everything for ever.
    #[error("burst is 0: give at least 1")]
    ZeroBurst,
    /// The number of keys is zero or above the limit.
    #[error("{max_keys} keys are not between 1 and {MAX_KEYS}")]
    Keys {
        /// What was asked for.
        max_keys: usize,
    },
}

/// Why a request was not let through. Its key was charged nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The bucket does not hold enough just now.
    #[error("quota is spent, retry after {} ms", retry_after.as_millis())]
    Empty {
        /// Time after which the same cost passes if nothing else is charged meanwhile.
        retry_after: Duration,
    },
    /// The bucket can never hold that much.
    #[error("cost {cost} is above the burst of {burst}: it can never pass, split it")]
    CostAboveBurst {
        /// What was asked for.
        cost: u32,
        /// What the bucket holds when full.
        burst: u32,
    },
}

impl Refused {
    /// Time to wait, if waiting helps at all.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Empty { retry_after } => Some(*retry_after),
            Self::CostAboveBurst { .. } => None,
        }
    }
}

/// One token bucket a key, all with the same rate.
pub struct TokenBuckets<K, C>
where
    K: Clone + Eq + Hash + Ord,
    C: Clock,
{
    limiter: RateLimiter<K, Shared<K>, C, NoOpMiddleware<C::Instant>>,
    states: Arc<BoundedStore<K>>,
    /// Arrival times count from here.
    start: C::Instant,
    rate: Rate,
    /// Tokens that one cell of the limiter stands for; 1 unless the rate is very high.
    unit: u32,
}

impl<K, C> fmt::Debug for TokenBuckets<K, C>
where
    K: Clone + Eq + Hash + Ord,
    C: Clock,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenBuckets")
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

impl<K, C> TokenBuckets<K, C>
where
    K: Clone + Eq + Hash + Ord,
    C: Clock,
{
    /// Buckets for at most `max_keys` keys, all full.
    ///
    /// # Errors
    /// A rate, burst or number of keys that makes no sense.
    pub fn new(rate: Rate, max_keys: usize, clock: C) -> Result<Self, RateError> {
        if max_keys == 0 || max_keys > MAX_KEYS {
            return Err(RateError::Keys { max_keys });
        }
        if rate.burst == 0 {
            return Err(RateError::ZeroBurst);
        }
        let unit = rate.per_second.div_ceil(MAX_UNITS_PER_SECOND).max(1);
        let cells_per_second =
            NonZeroU32::new(rate.per_second / unit).ok_or(RateError::ZeroRate)?;
        // Rounded up, so that a cost equal to the burst still passes.
        let cells_burst = NonZeroU32::new(rate.burst.div_ceil(unit)).ok_or(RateError::ZeroBurst)?;
        let quota = Quota::per_second(cells_per_second).allow_burst(cells_burst);
        let states = Arc::new(BoundedStore::new(max_keys));
        // The limiter reads its own start a moment later: debts are off by some microseconds.
        let start = clock.now();
        Ok(Self {
            limiter: RateLimiter::new(quota, Shared(Arc::clone(&states)), clock),
            states,
            start,
            rate,
            unit,
        })
    }

    /// Charges `cost` tokens to the key, all or nothing.
    ///
    /// # Errors
    /// The bucket does not hold them; then nothing is charged.
    pub fn check(&self, key: &K, cost: u32) -> Result<(), Refused> {
        if cost > self.rate.burst {
            return Err(Refused::CostAboveBurst {
                cost,
                burst: self.rate.burst,
            });
        }
        let Some(cells) = NonZeroU32::new(cost.div_ceil(self.unit)) else {
            return Ok(());
        };
        match self.limiter.check_key_n(key, cells) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => {
                let retry_after = not_until.wait_time_from(self.limiter.clock().now());
                Err(Refused::Empty { retry_after })
            }
            Err(_) => Err(Refused::CostAboveBurst {
                cost,
                burst: self.rate.burst,
            }),
        }
    }

    /// Every key that is not at rest, with the time until its bucket is full again: what has to be
    /// kept over a restart, and given to [`TokenBuckets::restore`] less the time that has passed.
    #[must_use]
    pub fn debts(&self) -> Vec<(K, Duration)> {
        let now = self.now();
        self.states.with(|inner| {
            let owing = inner.order.iter().rev();
            owing
                .map_while(|(arrival, key)| Some((key.clone(), arrival.checked_sub(now)?)))
                .filter(|(_, debt)| *debt > 0)
                .map(|(key, debt)| (key, Duration::from_nanos(debt)))
                .collect()
        })
    }

    /// Time until the key's bucket is full.
    #[must_use]
    pub fn debt(&self, key: &K) -> Duration {
        let now = self.now();
        let arrival = self.states.with(|inner| inner.arrival.get(key).copied());
        Duration::from_nanos(arrival.unwrap_or_default().saturating_sub(now))
    }

    /// Makes a key's bucket full only after this time, at most the time that an empty one needs. A
    /// greater debt that it has already stays.
    pub fn restore(&self, key: &K, debt: Duration) {
        let cells = u64::from(self.rate.burst.div_ceil(self.unit));
        let cells_per_second = u64::from((self.rate.per_second / self.unit).max(1));
        let most = cells.saturating_mul(1_000_000_000) / cells_per_second;
        let debt = u64::try_from(debt.as_nanos()).unwrap_or(u64::MAX).min(most);
        let arrival = self.now().saturating_add(debt);
        // Never an error: the closure gives none.
        let _ = self.states.measure_and_replace(key, |held| {
            let held = held.map_or(0, |held| held.as_u64());
            Ok::<_, std::convert::Infallible>(((), Nanos::from(held.max(arrival))))
        });
    }

    fn now(&self) -> u64 {
        self.limiter
            .clock()
            .now()
            .duration_since(self.start)
            .as_u64()
    }

    /// The rate that every key has.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Drops the buckets that are full again. Only memory depends on it, never an answer.
    pub fn retain_recent(&self) {
        self.limiter.retain_recent();
    }

    /// Number of keys held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.limiter.len()
    }

    /// Whether no key is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.limiter.is_empty()
    }
}

/// The store, as the limiter wants to own it.
struct Shared<K>(Arc<BoundedStore<K>>);

/// The state of every key, and the keys in order of their theoretical arrival time: the smaller
/// it is, the fuller the bucket.
struct BoundedStore<K> {
    inner: Mutex<Inner<K>>,
    max_keys: usize,
}

struct Inner<K> {
    arrival: HashMap<K, u64>,
    order: BTreeSet<(u64, K)>,
}

impl<K: Clone + Eq + Hash + Ord> BoundedStore<K> {
    fn new(max_keys: usize) -> Self {
        let inner = Inner {
            arrival: HashMap::new(),
            order: BTreeSet::new(),
        };
        Self {
            inner: Mutex::new(inner),
            max_keys,
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner<K>) -> T) -> T {
        // A panic while the lock is held can only come from the key's own `Ord` or `Hash`; the two
        // maps are then repaired by later calls, and refusing for ever would help nobody.
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<K: Clone + Eq + Hash + Ord> StateStore for Shared<K> {
    type Key = K;

    fn measure_and_replace<T, F, E>(&self, key: &K, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        self.0.measure_and_replace(key, f)
    }
}

impl<K: Clone + Eq + Hash + Ord> BoundedStore<K> {
    fn measure_and_replace<T, E>(
        &self,
        key: &K,
        f: impl Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    ) -> Result<T, E> {
        self.with(|inner| {
            let held = inner.arrival.get(key).copied();
            let (outcome, next) = f(held.map(Nanos::from))?;
            let next = next.as_u64();
            match held {
                Some(previous) => {
                    inner.order.remove(&(previous, key.clone()));
                }
                None => {
                    // INV-07: room is made before a key is added.
                    while inner.arrival.len() >= self.max_keys {
                        match inner.order.pop_first() {
                            Some((_, fullest)) => inner.arrival.remove(&fullest),
                            None => break,
                        };
                    }
                }
            }
            inner.arrival.insert(key.clone(), next);
            inner.order.insert((next, key.clone()));
            Ok(outcome)
        })
    }
}

impl<K: Clone + Eq + Hash + Ord> ShrinkableKeyedStateStore<K> for Shared<K> {
    fn retain_recent(&self, drop_below: Nanos) {
        let drop_below = drop_below.as_u64();
        self.0.with(|inner| {
            while inner
                .order
                .first()
                .is_some_and(|(arrival, _)| *arrival < drop_below)
            {
                if let Some((_, key)) = inner.order.pop_first() {
                    inner.arrival.remove(&key);
                }
            }
        });
    }

    fn len(&self) -> usize {
        self.0.with(|inner| inner.arrival.len())
    }

    fn is_empty(&self) -> bool {
        self.0.with(|inner| inner.arrival.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ManualClock;

    fn buckets(
        per_second: u32,
        burst: u32,
        max_keys: usize,
    ) -> (TokenBuckets<u32, ManualClock>, ManualClock) {
        let clock = ManualClock::new();
        let rate = Rate { per_second, burst };
        (
            TokenBuckets::new(rate, max_keys, clock.clone()).unwrap(),
            clock,
        )
    }

    #[test]
    fn nonsense_is_refused_by_the_constructor() {
        let make = |per_second, burst, max_keys| {
            TokenBuckets::<u32, _>::new(Rate { per_second, burst }, max_keys, ManualClock::new())
                .map(|_| ())
        };
        assert_eq!(make(0, 1, 1), Err(RateError::ZeroRate));
        assert_eq!(make(1, 0, 1), Err(RateError::ZeroBurst));
        assert_eq!(make(1, 1, 0), Err(RateError::Keys { max_keys: 0 }));
        assert_eq!(
            make(1, 1, MAX_KEYS + 1),
            Err(RateError::Keys {
                max_keys: MAX_KEYS + 1
            })
        );
        assert_eq!(make(1, 1, 1), Ok(()));
        assert_eq!(make(u32::MAX, u32::MAX, MAX_KEYS), Ok(()));
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let (buckets, clock) = buckets(10, 3, 8);
        for _ in 0..3 {
            assert_eq!(buckets.check(&1, 1), Ok(()));
        }
        let refused = buckets.check(&1, 1).unwrap_err();
        assert_eq!(
            refused,
            Refused::Empty {
                retry_after: Duration::from_millis(100)
            }
        );
        clock.advance(refused.retry_after().unwrap());
        assert_eq!(buckets.check(&1, 1), Ok(()));
        assert!(buckets.check(&1, 1).is_err());
    }

    #[test]
    fn inv_13_a_flood_by_one_key_costs_the_others_nothing() {
        let (buckets, _clock) = buckets(5, 5, 8);
        for _ in 0..10_000 {
            let _ = buckets.check(&1, 1);
        }
        assert!(
            buckets.check(&1, 1).is_err(),
            "the control: the flooding key is spent"
        );
        for _ in 0..5 {
            assert_eq!(
                buckets.check(&2, 1),
                Ok(()),
                "the other key has its whole burst"
            );
        }
    }

    #[test]
    fn inv_13_a_refused_request_costs_nothing() {
        let (buckets, clock) = buckets(10, 10, 8);
        assert_eq!(buckets.check(&1, 8), Ok(()));
        for _ in 0..1_000 {
            assert!(buckets.check(&1, 5).is_err());
        }
        assert_eq!(buckets.check(&1, 2), Ok(()), "what was left is still there");
        clock.advance(Duration::from_secs(1));
        assert_eq!(buckets.check(&1, 10), Ok(()), "no debt was carried over");
    }

    #[test]
    fn a_cost_above_the_burst_never_passes_and_says_so() {
        let (buckets, _clock) = buckets(10, 10, 8);
        let refused = buckets.check(&1, 11).unwrap_err();
        assert_eq!(
            refused,
            Refused::CostAboveBurst {
                cost: 11,
                burst: 10
            }
        );
        assert_eq!(refused.retry_after(), None);
        assert_eq!(buckets.check(&1, 10), Ok(()));
        assert_eq!(
            buckets.check(&1, 0),
            Ok(()),
            "nothing costs nothing, even when spent"
        );
    }

    #[test]
    fn very_high_rates_count_in_bigger_units() {
        let per_second = 2_000_000_000;
        let (buckets, clock) = buckets(per_second, per_second, 8);
        assert_eq!(buckets.check(&1, per_second), Ok(()));
        assert!(buckets.check(&1, 1_000_000).is_err());
        clock.advance(Duration::from_millis(500));
        assert_eq!(buckets.check(&1, 900_000_000), Ok(()));
        assert!(buckets.check(&1, 200_000_000).is_err());
    }

    #[test]
    fn the_number_of_keys_is_bounded_and_the_fullest_bucket_goes_first() {
        let (buckets, _clock) = buckets(1, 10, 4);
        for key in 0..4 {
            assert_eq!(buckets.check(&key, 2 + key), Ok(()));
        }
        for key in 100..1_100 {
            assert_eq!(buckets.check(&key, 1), Ok(()));
            assert!(buckets.len() <= 4);
        }
        // Key 3 spent most, so its state outlived a thousand strangers.
        assert!(buckets.check(&3, 6).is_err());
        assert_eq!(buckets.check(&3, 5), Ok(()));
    }

    #[test]
    fn inv_13_a_debt_outlives_a_restart_and_is_paid_by_the_time_that_passes() {
        let (before, clock) = buckets(10, 20, 8);
        assert_eq!(before.check(&1, 20), Ok(()));
        assert_eq!(before.check(&2, 5), Ok(()));
        assert_eq!(before.check(&3, 5), Ok(()));
        clock.advance(Duration::from_millis(500));
        let debts: HashMap<u32, Duration> = before.debts().into_iter().collect();
        assert_eq!(debts.len(), 1, "2 and 3 are full again: {debts:?}");
        assert_eq!(debts[&1], Duration::from_millis(1_500));
        assert_eq!(before.debt(&1), debts[&1]);
        assert_eq!(before.debt(&2), Duration::ZERO);

        let (after, clock) = buckets(10, 20, 8);
        assert_eq!(
            after.check(&9, 20),
            Ok(()),
            "the control: without a debt all of it passes"
        );
        let downtime = Duration::from_millis(500);
        after.restore(&1, debts[&1] - downtime);
        assert_eq!(after.check(&1, 10), Ok(()));
        assert!(after.check(&1, 1).is_err());
        after.restore(&1, Duration::ZERO);
        assert!(
            after.check(&1, 1).is_err(),
            "a smaller debt forgives nothing"
        );
        clock.advance(Duration::from_secs(2));
        assert_eq!(after.check(&1, 20), Ok(()));

        // However great a debt is said to be, an empty bucket is the worst.
        after.restore(&4, Duration::MAX);
        assert!(after.check(&4, 1).is_err());
        clock.advance(Duration::from_secs(2));
        assert_eq!(after.check(&4, 20), Ok(()));
    }

    #[test]
    fn rested_keys_can_be_dropped() {
        let (buckets, clock) = buckets(10, 10, 64);
        for key in 0..50 {
            assert_eq!(buckets.check(&key, 5), Ok(()));
        }
        clock.advance(Duration::from_secs(60));
        assert_eq!(buckets.check(&99, 10), Ok(()));
        buckets.retain_recent();
        assert_eq!(buckets.len(), 1);
        assert!(!buckets.is_empty());
        assert!(
            buckets.check(&99, 10).is_err(),
            "the state that matters was kept"
        );
    }

    proptest! {
        /// Over any history, a key passes no more than burst + rate x time, and never less than a
        /// plain integer bucket would let through at the same moments.
        #[test]
        fn inv_13_never_more_than_the_rate(
            steps in proptest::collection::vec((0u64..400, 1u32..30), 1..200),
        ) {
            let (buckets, clock) = buckets(50, 20, 4);
            // The reference bucket counts nanoseconds of one token (20 ms) as whole numbers.
            let token_ns = 20_000_000u64;
            let mut held_ns = 20 * token_ns;
            for (wait_ms, cost) in steps {
                clock.advance(Duration::from_millis(wait_ms));
                held_ns = (held_ns + wait_ms * 1_000_000).min(20 * token_ns);
                let want_ns = u64::from(cost) * token_ns;
                let passes = held_ns >= want_ns;
                if passes {
                    held_ns -= want_ns;
                }
                prop_assert_eq!(buckets.check(&7, cost).is_ok(), passes);
            }
        }
    }
}
