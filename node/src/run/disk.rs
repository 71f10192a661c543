//! How full the node's own part of the disk is getting: a word at every change of the ladder's state, and the
//! time that is left at the present rate. Pure: time and figures are passed in.

use std::collections::VecDeque;

use tidelock_segments::{Ladder, Usage};

/// A sample is kept at most once in this many seconds.
const SAMPLE_EVERY_S: u64 = 60;
/// Samples kept: the rate is that of the last hour. 16 bytes each (INV-07).
const MAX_SAMPLES: usize = 61;
/// Eviction may move the state to and fro; it is told at most once in this many seconds.
const TELL_EVERY_S: u64 = 10;

/// The bytes that the node's own data uses, and may use.
pub(super) fn own_share(usage: &Usage) -> (u64, u64) {
    let used = usage.allocated_bytes.saturating_sub(usage.custody_bytes);
    let limit = usage
        .ceiling_bytes
        .saturating_sub(usage.reserve_bytes)
        .saturating_sub(usage.custody_max_bytes);
    (used, limit)
}

/// A change of the ladder's state that is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) from: Ladder,
    pub(super) to: Ladder,
}

/// Watches one ledger.
#[derive(Debug)]
pub(super) struct DiskWatch {
    told: Ladder,
    told_at_s: Option<u64>,
    samples: VecDeque<(u64, u64)>,
}

impl Default for DiskWatch {
    fn default() -> Self {
        Self {
            told: Ladder::Normal,
            told_at_s: None,
            samples: VecDeque::new(),
        }
    }
}

impl DiskWatch {
    /// Takes notice of the figures at `now_s`, in seconds of a clock that never steps back.
    pub(super) fn observe(
        &mut self,
        now_s: u64,
        ladder: Ladder,
        used_bytes: u64,
    ) -> Option<Change> {
        let due = self
            .samples
            .back()
            .is_none_or(|(at, _)| now_s.saturating_sub(*at) >= SAMPLE_EVERY_S);
        if due {
            if self.samples.len() >= MAX_SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back((now_s, used_bytes));
        }
        let quiet = self
            .told_at_s
            .is_some_and(|at| now_s.saturating_sub(at) < TELL_EVERY_S);
        if ladder == self.told || quiet {
            return None;
        }
        let from = std::mem::replace(&mut self.told, ladder);
        self.told_at_s = Some(now_s);
        Some(Change { from, to: ladder })
    }

    /// Seconds until `limit_bytes` are used at the rate of the last hour; `None` while nothing grows or
    /// less than a minute was watched.
    pub(super) fn seconds_to_full(&self, limit_bytes: u64) -> Option<u64> {
        let (from_s, from_bytes) = *self.samples.front()?;
        let (to_s, to_bytes) = *self.samples.back()?;
        let grown = to_bytes
            .checked_sub(from_bytes)
            .filter(|grown| *grown > 0)?;
        let took_s = to_s.checked_sub(from_s).filter(|took| *took > 0)?;
        let left = u128::from(limit_bytes.saturating_sub(to_bytes));
        u64::try_from(left * u128::from(took_s) / u128::from(grown)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_told_once_and_a_flapping_one_at_most_every_ten_seconds() {
        let mut watch = DiskWatch::default();
        assert_eq!(watch.observe(0, Ladder::Normal, 0), None);
        let warned = watch.observe(1, Ladder::Warn, 0);
        let change = |from, to| Some(Change { from, to });
        assert_eq!(warned, change(Ladder::Normal, Ladder::Warn));
        assert_eq!(watch.observe(2, Ladder::Reclaim, 0), None);
        assert_eq!(watch.observe(3, Ladder::Warn, 0), None);
        assert_eq!(
            watch.observe(11, Ladder::Sealed, 0),
            change(Ladder::Warn, Ladder::Sealed)
        );
        assert_eq!(watch.observe(100, Ladder::Sealed, 0), None);
        assert_eq!(
            watch.observe(101, Ladder::Normal, 0),
            change(Ladder::Sealed, Ladder::Normal)
        );
    }

    #[test]
    fn the_time_left_follows_the_rate_of_the_last_hour() {
        let mut watch = DiskWatch::default();
        assert_eq!(watch.seconds_to_full(1000), None);
        watch.observe(0, Ladder::Normal, 100);
        assert_eq!(watch.seconds_to_full(1000), None, "one sample is no rate");
        watch.observe(30, Ladder::Normal, 500);
        assert_eq!(watch.seconds_to_full(1000), None, "not yet a minute");
        watch.observe(60, Ladder::Normal, 220);
        // 2 bytes a second, 780 left.
        assert_eq!(watch.seconds_to_full(1000), Some(390));
        assert_eq!(watch.seconds_to_full(100), Some(0));
        watch.observe(120, Ladder::Normal, 50);
        assert_eq!(watch.seconds_to_full(1000), None, "it shrinks");
        for minute in 3..200 {
            watch.observe(minute * 60, Ladder::Normal, minute * 60);
        }
        assert_eq!(watch.samples.len(), MAX_SAMPLES);
        assert_eq!(watch.seconds_to_full(199 * 60 + 7), Some(7));
    }
}
