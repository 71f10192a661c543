//! Bytes a day.
//!
//! The day is a window of 24 hours of monotonic time that begins with the first charge after the
//! last window ended, so a wall clock that is set forward buys no second allowance.

use std::time::Duration;

use crate::limits::DAY;

/// The day's volume does not reach for this cost. Nothing was charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("daily volume of {limit} is spent ({left} left), resets in {} s", resets_in.as_secs())]
pub struct VolumeSpent {
    /// The allowance of a day.
    pub limit: u64,
    /// What is left of it.
    pub left: u64,
    /// Time until the next window.
    pub resets_in: Duration,
}

/// A counter of one day's volume.
#[derive(Debug, Clone)]
pub struct DailyVolume {
    limit: u64,
    used: u64,
    window_start: Duration,
}

impl DailyVolume {
    /// A counter with its whole allowance. A limit of zero refuses every cost but zero.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            used: 0,
            window_start: Duration::ZERO,
        }
    }

    /// Charges `cost`, all or nothing.
    ///
    /// # Errors
    /// The day's allowance does not reach; then nothing is charged.
    pub fn take(&mut self, cost: u64, now: Duration) -> Result<(), VolumeSpent> {
        if self.used == 0 || now.saturating_sub(self.window_start) >= DAY {
            self.used = 0;
            self.window_start = now;
        }
        let left = self.limit - self.used;
        if cost > left {
            let resets_in = DAY.saturating_sub(now.saturating_sub(self.window_start));
            return Err(VolumeSpent {
                limit: self.limit,
                left,
                resets_in,
            });
        }
        self.used += cost;
        Ok(())
    }

    /// What is left of the allowance.
    #[must_use]
    pub fn left(&self, now: Duration) -> u64 {
        if now.saturating_sub(self.window_start) >= DAY {
            self.limit
        } else {
            self.limit - self.used
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_spent_and_comes_back() {
        let start = Duration::from_secs(1_000);
        let mut volume = DailyVolume::new(100);
        assert_eq!(volume.take(60, start), Ok(()));
        let half = start + DAY / 2;
        assert_eq!(
            volume.take(41, half),
            Err(VolumeSpent {
                limit: 100,
                left: 40,
                resets_in: DAY / 2
            })
        );
        assert_eq!(
            volume.take(40, half),
            Ok(()),
            "the refused request cost nothing"
        );
        assert_eq!(volume.left(half), 0);
        assert!(
            volume
                .take(1, start + DAY - Duration::from_nanos(1))
                .is_err()
        );
        assert_eq!(volume.left(start + DAY), 100);
        assert_eq!(volume.take(100, start + DAY), Ok(()));
    }

    #[test]
    fn a_clock_that_steps_back_grants_nothing() {
        let mut volume = DailyVolume::new(10);
        let now = DAY * 3;
        assert_eq!(volume.take(10, now), Ok(()));
        assert!(volume.take(1, Duration::ZERO).is_err());
        assert!(volume.take(1, now).is_err());
    }

    #[test]
    fn extreme_costs_do_not_overflow() {
        let mut volume = DailyVolume::new(u64::MAX);
        assert_eq!(volume.take(u64::MAX, Duration::ZERO), Ok(()));
        assert_eq!(volume.left(Duration::ZERO), 0);
        assert!(volume.take(u64::MAX, Duration::MAX - DAY).is_ok());
        let mut none = DailyVolume::new(0);
        assert_eq!(none.take(0, Duration::ZERO), Ok(()));
        assert!(none.take(1, Duration::ZERO).is_err());
    }
}
