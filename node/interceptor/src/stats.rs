//! Counters for status and metrics. They never influence a decision.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use serde::Serialize;

use crate::{limits::TOLD_EVERY, reason::Reason};

/// A reading of the counters since the interceptor was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Answers by reason code, in the order of [`Reason::ALL`], both modes.
    pub answers: Vec<(Reason, u64)>,
    /// Permits made.
    pub permits: u64,
    /// Answers in mode explain.
    pub explains: u64,
    /// Pages of searches.
    pub searches: u64,
    /// Denials that were counted in a summary window instead of recorded one by one.
    pub summarised: u64,
    /// Outcomes that callers reported.
    pub reports: u64,
    /// Secrets cut out of records.
    pub redactions: u64,
    /// Records that became durable after their caller had been given up.
    pub not_released: u64,
    /// Lifecycle, outcome and summary records that could not be written.
    pub records_lost: u64,
    /// Engine panics caught: denied with a record.
    pub panics: u64,
    /// Panics in what followed an evaluation: their callers had no answer, and nothing was permitted.
    pub lost: u64,
    /// Requests whose record is not durable yet.
    pub pending: u64,
    /// Evaluations that somebody waits for, those that wait for an engine too.
    pub evaluating: u64,
    /// CPU microseconds spent in policy engines.
    pub engine_us: u64,
    /// Evaluations that took them.
    pub evaluations: u64,
    /// Evaluations that were given up before they ended.
    pub abandoned: u64,
    /// Those of them that have not ended yet.
    pub abandoned_now: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    answers: [AtomicU64; Reason::ALL.len()],
    pub(crate) permits: AtomicU64,
    pub(crate) explains: AtomicU64,
    pub(crate) searches: AtomicU64,
    pub(crate) reports: AtomicU64,
    pub(crate) summarised: AtomicU64,
    pub(crate) redactions: AtomicU64,
    pub(crate) not_released: AtomicU64,
    pub(crate) records_lost: AtomicU64,
    pub(crate) panics: AtomicU64,
    pub(crate) engine_us: AtomicU64,
    pub(crate) evaluations: AtomicU64,
    pub(crate) abandoned: AtomicU64,
}

impl Counters {
    pub(crate) fn answered(&self, reason: Reason) {
        for (counter, known) in self.answers.iter().zip(Reason::ALL) {
            if known == reason {
                add(counter, 1);
            }
        }
    }

    pub(crate) fn read(
        &self,
        pending: u64,
        (evaluating, abandoned_now, lost): (u64, u64, u64),
    ) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            answers: Reason::ALL
                .into_iter()
                .zip(self.answers.iter().map(get))
                .collect(),
            permits: get(&self.permits),
            explains: get(&self.explains),
            searches: get(&self.searches),
            reports: get(&self.reports),
            summarised: get(&self.summarised),
            redactions: get(&self.redactions),
            not_released: get(&self.not_released),
            records_lost: get(&self.records_lost),
            panics: get(&self.panics),
            lost,
            pending,
            evaluating,
            engine_us: get(&self.engine_us),
            evaluations: get(&self.evaluations),
            abandoned: get(&self.abandoned),
            abandoned_now,
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Something that is told at most once in [`TOLD_EVERY`](crate::limits::TOLD_EVERY), and then with
/// how often it was kept back meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    next_ms: AtomicU64,
    kept_back: AtomicU64,
}

impl Seldom {
    /// How often it was kept back, if it is to be told now.
    pub(crate) fn tell(&self, now: Duration) -> Option<u64> {
        // One more, so that zero stands for never.
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let every_ms = u64::try_from(TOLD_EVERY.as_millis()).unwrap_or(u64::MAX);
        let next = self.next_ms.load(Ordering::Relaxed);
        let due = now_ms >= next
            && self
                .next_ms
                .compare_exchange(
                    next,
                    now_ms.saturating_add(every_ms),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok();
        if !due {
            add(&self.kept_back, 1);
            return None;
        }
        Some(self.kept_back.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_told_seldom_and_counted() {
        let seldom = Seldom::default();
        let at = |s: u64| seldom.tell(Duration::from_secs(s));
        assert_eq!(at(0), Some(0));
        assert_eq!((at(0), at(9)), (None, None));
        assert_eq!(at(10), Some(2));
        assert_eq!(at(11), None);
        assert_eq!(at(1_000), Some(1));
    }
}
