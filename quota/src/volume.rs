//! Bytes a day.
//!
//! The day is a window of 24 hours of monotonic time that begins with the first charge after the
//! last window ended, so a wall clock that is set forward buys no second allowance. A limit of
//! [`u64::MAX`] is no bound; what is used is counted still, for a bound that is set within the day.

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
    /// May be above the limit, where that was lowered meanwhile.
    used: u64,
    window_start: Duration,
    /// How long the window had run when it started here: it may have begun before this clock did.
    ran: Duration,
}

impl DailyVolume {
    /// A counter with its whole allowance. A limit of zero refuses every cost but zero, one of
    /// [`u64::MAX`] none.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            used: 0,
            window_start: Duration::ZERO,
            ran: Duration::ZERO,
        }
    }

    fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.window_start)
            .saturating_add(self.ran)
    }

    /// Charges `cost`, all or nothing.
    ///
    /// # Errors
    /// The day's allowance does not reach; then nothing is charged.
    pub fn take(&mut self, cost: u64, now: Duration) -> Result<(), VolumeSpent> {
        if self.used == 0 || self.age(now) >= DAY {
            self.used = 0;
            self.window_start = now;
            self.ran = Duration::ZERO;
        }
        let left = self.unused();
        if cost > left {
            let resets_in = DAY.saturating_sub(self.age(now));
            return Err(VolumeSpent {
                limit: self.limit,
                left,
                resets_in,
            });
        }
        self.used = self.used.saturating_add(cost);
        Ok(())
    }

    fn unused(&self) -> u64 {
        match self.limit {
            u64::MAX => u64::MAX,
            limit => limit.saturating_sub(self.used),
        }
    }

    /// What was used of the running day, and how long that day has run: what has to be kept over a
    /// restart. `None` if nothing counts any more.
    #[must_use]
    pub fn used(&self, now: Duration) -> Option<(u64, Duration)> {
        let age = self.age(now);
        (self.used > 0 && age < DAY).then_some((self.used, age))
    }

    /// A counter that has used so much of a day that has run so long at `now`. What was used above a
    /// limit that is lower by now stays used, so that raising it again gives nothing back.
    #[must_use]
    pub fn resumed(limit: u64, used: u64, age: Duration, now: Duration) -> Self {
        Self {
            limit,
            used: if age < DAY { used } else { 0 },
            window_start: now,
            ran: age,
        }
    }

    /// What is left of the allowance.
    #[must_use]
    pub fn left(&self, now: Duration) -> u64 {
        if self.age(now) >= DAY {
            self.limit
        } else {
            self.unused()
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
    fn inv_13_a_day_goes_on_over_a_restart() {
        let mut before = DailyVolume::new(100);
        assert_eq!(before.used(Duration::ZERO), None);
        assert_eq!(before.take(70, DAY), Ok(()));
        let (used, age) = before.used(DAY + DAY / 4).unwrap();
        assert_eq!((used, age), (70, DAY / 4));
        assert_eq!(before.used(DAY * 2), None, "the day is over");

        let now = DAY * 5;
        let mut after = DailyVolume::resumed(100, used, age, now);
        assert!(after.take(31, now).is_err());
        assert_eq!(after.take(30, now), Ok(()));
        assert_eq!(after.left(now + DAY / 2), 0);
        assert_eq!(after.left(now + DAY * 3 / 4), 100, "the same day's end");

        // A clock that began a moment ago, as after every restart: the day ends when it ends.
        let young = DailyVolume::resumed(100, used, age, Duration::ZERO);
        assert_eq!(young.left(DAY * 3 / 4 - Duration::from_secs(1)), 30);
        assert_eq!(young.left(DAY * 3 / 4), 100);
        let again = young.used(DAY / 2).unwrap();
        assert_eq!(again, (70, DAY * 3 / 4), "over a second restart as well");
        // A lower limit in between gives nothing back.
        let (used, age) = DailyVolume::resumed(50, used, age, now).used(now).unwrap();
        assert_eq!(DailyVolume::resumed(100, used, age, now).left(now), 30);
        assert_eq!(
            DailyVolume::resumed(50, used, age, now).left(now),
            0,
            "a lower limit"
        );
        assert_eq!(DailyVolume::resumed(100, used, DAY, now).left(now), 100);
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
        for _ in 0..2 {
            assert_eq!(volume.take(u64::MAX, Duration::ZERO), Ok(()), "no bound");
        }
        assert_eq!(volume.left(Duration::ZERO), u64::MAX);
        let used = volume.used(Duration::ZERO);
        assert_eq!(
            used,
            Some((u64::MAX, Duration::ZERO)),
            "counted all the same"
        );
        assert!(volume.take(u64::MAX, Duration::MAX - DAY).is_ok());
        let mut most = DailyVolume::new(u64::MAX - 1);
        assert_eq!(most.take(u64::MAX - 1, Duration::ZERO), Ok(()));
        assert!(most.take(1, Duration::ZERO).is_err());
        let mut none = DailyVolume::new(0);
        assert_eq!(none.take(0, Duration::ZERO), Ok(()));
        assert!(none.take(1, Duration::ZERO).is_err());
    }
}
