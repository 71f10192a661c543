//! Several buckets for one request: all of them let it pass, or none is charged.
//!
//! A limiter that charges the wide bucket before the narrow one lets one noisy principal starve all,
//! and one that charges before it refuses goes into debt. Here a request is first held against every
//! bucket that it meets, narrowest first, and is charged to all of them together.
//!
//! A bucket is one number, its theoretical arrival time: integers, so that the same history gives
//! the same answers everywhere. A bucket that nothing was charged to for long enough is the same as
//! one that was never there.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Duration;

use crate::bucket::{Rate, RateError};
use crate::limits::{MAX_KEYS, MAX_LADDER_PER_SECOND};

const SECOND_NS: u64 = 1_000_000_000;

/// What one rung of a ladder lets pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    rate: Rate,
    /// Nanoseconds a token, rounded up: never more than the rate.
    token_ns: u64,
    /// How far the arrival time may lie ahead before the next token is refused.
    tolerance_ns: u64,
}

impl Pace {
    fn new(rate: Rate) -> Result<Self, RateError> {
        if rate.per_second == 0 {
            return Err(RateError::ZeroRate);
        }
        if rate.burst == 0 {
            return Err(RateError::ZeroBurst);
        }
        let per_second = u64::from(rate.per_second.min(MAX_LADDER_PER_SECOND));
        let token_ns = SECOND_NS.div_ceil(per_second);
        Ok(Self {
            rate,
            token_ns,
            tolerance_ns: token_ns.saturating_mul(u64::from(rate.burst) - 1),
        })
    }
}

/// The buckets of one rung.
#[derive(Debug)]
struct Rung<K> {
    pace: Option<Pace>,
    arrival: HashMap<K, u64>,
    /// The same in order of arrival time: the fullest bucket first.
    order: BTreeSet<(u64, K)>,
    passed: u64,
    refused: u64,
}

/// What one rung has done and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RungStats {
    /// Its rate; none where it lets everything pass.
    pub rate: Option<Rate>,
    /// Requests that it was charged for.
    pub passed: u64,
    /// Requests that it was the first to refuse.
    pub refused: u64,
    /// Buckets held.
    pub keys: usize,
}

/// Which rung refused, and when the same request passes if nothing else is charged meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RungRefused {
    /// Index of the first rung that refused.
    pub rung: usize,
    /// Until every rung would let it pass.
    pub retry_after: Duration,
}

/// Rungs of buckets, the narrowest first. The caller serialises access.
#[derive(Debug)]
pub struct Ladder<K, const N: usize> {
    rungs: [Rung<K>; N],
    max_keys: usize,
}

impl<K: Clone + Eq + Hash + Ord, const N: usize> Ladder<K, N> {
    /// Rungs with these rates, all buckets full, at most `max_keys` on each rung.
    ///
    /// # Errors
    /// A rate of nothing, or too many keys.
    pub fn new(rates: [Option<Rate>; N], max_keys: usize) -> Result<Self, RateError> {
        if !(1..=MAX_KEYS).contains(&max_keys) {
            return Err(RateError::Keys { max_keys });
        }
        let paces = Self::paces(rates)?;
        Ok(Self {
            rungs: paces.map(|pace| Rung {
                pace,
                arrival: HashMap::new(),
                order: BTreeSet::new(),
                passed: 0,
                refused: 0,
            }),
            max_keys,
        })
    }

    fn paces(rates: [Option<Rate>; N]) -> Result<[Option<Pace>; N], RateError> {
        let mut paces = [None; N];
        for (pace, rate) in paces.iter_mut().zip(rates) {
            *pace = rate.map(Pace::new).transpose()?;
        }
        Ok(paces)
    }

    /// Other rates from now on. What a bucket owes stays owed, at most a whole burst of the new rate.
    ///
    /// # Errors
    /// A rate of nothing; then nothing has changed.
    pub fn set_rates(&mut self, rates: [Option<Rate>; N], now: Duration) -> Result<(), RateError> {
        let paces = Self::paces(rates)?;
        let now_ns = nanos(now);
        for (rung, pace) in self.rungs.iter_mut().zip(paces) {
            rung.pace = pace;
            let most = match pace {
                Some(pace) => now_ns.saturating_add(pace.tolerance_ns + pace.token_ns),
                None => 0,
            };
            let owing: Vec<K> = rung.arrival.keys().cloned().collect();
            for key in owing {
                if rung.arrival.get(&key).is_some_and(|held| *held > most) {
                    rung.put(key, most);
                }
            }
        }
        Ok(())
    }

    /// Charges one request to the bucket of its key on every rung, or to none of them.
    ///
    /// # Errors
    /// The first rung whose bucket is spent. Nothing was charged.
    pub fn check(&mut self, keys: &[K; N], now: Duration) -> Result<(), RungRefused> {
        let now_ns = nanos(now);
        let mut refused: Option<RungRefused> = None;
        let mut next = [0; N];
        let held = self.rungs.iter().zip(keys).zip(&mut next).enumerate();
        for (at, ((rung, key), next)) in held {
            let Some(pace) = rung.pace else { continue };
            let arrival = rung.arrival.get(key).copied().unwrap_or(0).max(now_ns);
            let early_ns = (arrival - now_ns).saturating_sub(pace.tolerance_ns);
            if early_ns > 0 {
                let wait = Duration::from_nanos(early_ns);
                let first = refused.map_or(at, |refused| refused.rung);
                let longest = refused.map_or(wait, |refused| refused.retry_after.max(wait));
                refused = Some(RungRefused {
                    rung: first,
                    retry_after: longest,
                });
            }
            *next = arrival.saturating_add(pace.token_ns);
        }
        if let Some(refused) = refused {
            if let Some(rung) = self.rungs.get_mut(refused.rung) {
                rung.refused += 1;
            }
            return Err(refused);
        }
        for ((rung, key), next) in self.rungs.iter_mut().zip(keys).zip(next) {
            if rung.pace.is_some() {
                rung.make_room(key, self.max_keys);
                rung.put(key.clone(), next);
                rung.passed += 1;
            }
        }
        Ok(())
    }

    /// Drops the buckets that have been full for this long. Only memory depends on it, never an
    /// answer.
    pub fn evict_idle(&mut self, now: Duration, idle: Duration) {
        let before = nanos(now).saturating_sub(nanos(idle));
        for rung in &mut self.rungs {
            while rung.order.first().is_some_and(|(at, _)| *at < before) {
                if let Some((_, key)) = rung.order.pop_first() {
                    rung.arrival.remove(&key);
                }
            }
        }
    }

    /// What each rung has done and holds.
    #[must_use]
    pub fn stats(&self) -> [RungStats; N] {
        let mut all = [RungStats::default(); N];
        for (stats, rung) in all.iter_mut().zip(&self.rungs) {
            *stats = RungStats {
                rate: rung.pace.map(|pace| pace.rate),
                passed: rung.passed,
                refused: rung.refused,
                keys: rung.arrival.len(),
            };
        }
        all
    }
}

impl<K: Clone + Eq + Hash + Ord> Rung<K> {
    fn put(&mut self, key: K, arrival: u64) {
        if let Some(held) = self.arrival.insert(key.clone(), arrival) {
            self.order.remove(&(held, key.clone()));
        }
        self.order.insert((arrival, key));
    }

    /// INV-07: room is made before a key is added. The fullest bucket goes: it forgets least.
    fn make_room(&mut self, key: &K, max_keys: usize) {
        if self.arrival.contains_key(key) {
            return;
        }
        while self.arrival.len() >= max_keys {
            match self.order.pop_first() {
                Some((_, fullest)) => self.arrival.remove(&fullest),
                None => break,
            };
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn rate(per_second: u32, burst: u32) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    #[test]
    fn nonsense_is_refused_and_changes_nothing() {
        assert_eq!(
            Ladder::<u8, 1>::new([rate(0, 1)], 8).err(),
            Some(RateError::ZeroRate)
        );
        assert_eq!(
            Ladder::<u8, 1>::new([rate(1, 0)], 8).err(),
            Some(RateError::ZeroBurst)
        );
        assert!(Ladder::<u8, 1>::new([None], 0).is_err());
        let mut ladder = Ladder::<u8, 2>::new([rate(1, 1), rate(1, 2)], 8).unwrap();
        assert!(
            ladder
                .set_rates([rate(9, 9), rate(0, 1)], Duration::ZERO)
                .is_err()
        );
        assert_eq!(ladder.stats()[0].rate, rate(1, 1), "all or nothing");
    }

    #[test]
    fn inv_13_a_refused_request_costs_nothing_on_any_rung() {
        let mut ladder = Ladder::<u8, 3>::new([rate(10, 2), rate(10, 5), rate(10, 8)], 8).unwrap();
        let now = Duration::from_secs(5);
        for _ in 0..2 {
            ladder.check(&[1, 1, 0], now).unwrap();
        }
        for _ in 0..1_000 {
            let refused = ladder.check(&[1, 1, 0], now).unwrap_err();
            assert_eq!((refused.rung, refused.retry_after), (0, MS * 100));
        }
        // The control: what the refused ones did not take is there for others.
        for key in 2..5 {
            ladder.check(&[key, 1, 0], now).unwrap();
        }
        assert_eq!(ladder.check(&[5, 1, 0], now).unwrap_err().rung, 1);
        for key in 6..9 {
            ladder.check(&[key, key, 0], now).unwrap();
        }
        assert_eq!(ladder.check(&[9, 9, 0], now).unwrap_err().rung, 2);
        let stats = ladder.stats();
        assert_eq!(stats.map(|s| s.passed), [8, 8, 8]);
        assert_eq!(stats.map(|s| s.refused), [1_000, 1, 1]);
        // Several are spent: the narrowest is named, and the wait is for all of them.
        let refused = ladder.check(&[1, 1, 0], now).unwrap_err();
        assert_eq!((refused.rung, refused.retry_after), (0, MS * 100));
        assert_eq!(ladder.check(&[1, 1, 0], now + refused.retry_after), Ok(()));
    }

    #[test]
    fn inv_07_keys_are_bounded_and_the_spent_one_is_forgotten_last() {
        let mut ladder = Ladder::<u16, 1>::new([rate(1, 4)], 8).unwrap();
        let now = Duration::from_secs(9);
        for _ in 0..4 {
            ladder.check(&[0], now).unwrap();
        }
        for key in 1..500 {
            ladder.check(&[key], now).unwrap();
            assert!(ladder.stats()[0].keys <= 8);
        }
        assert!(
            ladder.check(&[0], now).is_err(),
            "a crowd buys no new burst"
        );
        ladder.evict_idle(now + Duration::from_secs(60), Duration::from_secs(120));
        assert_eq!(ladder.stats()[0].keys, 8, "not idle for long enough");
        ladder.evict_idle(now + Duration::from_secs(60), Duration::from_secs(30));
        assert_eq!(ladder.stats()[0].keys, 0);
    }

    #[test]
    fn new_rates_hold_at_once_and_debts_stay() {
        let mut ladder = Ladder::<u8, 1>::new([rate(1, 10)], 8).unwrap();
        let now = Duration::from_secs(1);
        for _ in 0..10 {
            ladder.check(&[1], now).unwrap();
        }
        ladder.set_rates([rate(10, 2)], now).unwrap();
        assert!(ladder.check(&[1], now).is_err(), "still owed");
        assert_eq!(
            ladder.check(&[1], now + MS * 100),
            Ok(()),
            "at the new pace"
        );
        assert!(ladder.check(&[1], now + MS * 100).is_err());
        ladder.set_rates([None], now).unwrap();
        for _ in 0..100 {
            ladder.check(&[1], now).unwrap();
        }
    }

    proptest! {
        /// Over any history no bucket passes more than burst + rate x time; a request passes exactly
        /// when every bucket of it holds a token in a plain reference count, and the refusing rung is
        /// the narrowest that does not.
        #[test]
        fn inv_13_no_rung_passes_more_than_its_rate(
            steps in proptest::collection::vec((0u64..300, 0u8..3, 0u8..2), 1..200),
        ) {
            let rates = [rate(20, 3), rate(50, 5), rate(100, 8)];
            let mut ladder = Ladder::<(u8, u8), 3>::new(rates, 16).unwrap();
            // The reference counts nanoseconds of tokens: 50, 20 and 10 ms each.
            let token_ns = [50_000_000u64, 20_000_000, 10_000_000];
            let burst = [3u64, 5, 8];
            let mut held: HashMap<(usize, (u8, u8)), (u64, u64)> = HashMap::new();
            let mut passed: HashMap<(usize, (u8, u8)), u64> = HashMap::new();
            let mut now_ms = 0u64;
            for (wait_ms, narrow, middle) in steps {
                now_ms += wait_ms / 4;
                let now_ns = now_ms * 1_000_000;
                let keys = [(narrow, middle), (9, middle), (9, 9)];
                let mut lacks = None;
                for (rung, key) in keys.iter().enumerate() {
                    let full = burst[rung] * token_ns[rung];
                    let (at, had) = held.get(&(rung, *key)).copied().unwrap_or((now_ns, full));
                    let has = (had + (now_ns - at)).min(full);
                    held.insert((rung, *key), (now_ns, has));
                    if has < token_ns[rung] && lacks.is_none() {
                        lacks = Some(rung);
                    }
                }
                let got = ladder.check(&keys, Duration::from_millis(now_ms));
                prop_assert_eq!(got.err().map(|refused| refused.rung), lacks);
                if lacks.is_none() {
                    for (rung, key) in keys.iter().enumerate() {
                        let entry = held.get_mut(&(rung, *key)).unwrap();
                        entry.1 -= token_ns[rung];
                        let count = passed.entry((rung, *key)).or_default();
                        *count += 1;
                        prop_assert!(*count <= burst[rung] + now_ns / token_ns[rung]);
                    }
                }
            }
        }
    }
}
