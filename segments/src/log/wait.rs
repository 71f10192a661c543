//! How blocking callers wait: all that join the queue between two commits share one cell, so that one
//! system call wakes them together, and one of them may be asked to write the next batch.

use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex::{self, Flags, Timespec};

use super::{AppendError, Appended};

const WAITING: u32 = 0;
const SETTLED: u32 = 1;
/// Nobody writes: one of the callers that may lead should look at the queue.
const LEADER_WANTED: u32 = 2;

const MAY_LEAD: NonZeroU32 = NonZeroU32::MIN;
const FOLLOWS: NonZeroU32 = MAY_LEAD.saturating_add(1);

type Fate = Result<Appended, AppendError>;

/// The callers of one batch and what became of their records.
#[derive(Debug, Default)]
pub(super) struct Group {
    word: AtomicU32,
    fates: OnceLock<Vec<Option<Fate>>>,
}

/// Why a wait ended.
pub(super) enum Woken {
    Settled(Fate),
    /// The caller is asked to lead, if nobody else does by now.
    Lead,
    TimedOut,
}

impl Group {
    /// Tells every caller of the group its fate, by slot. `alone` says that the only one is the
    /// caller itself, who need not be woken.
    pub(super) fn settle(&self, fates: Vec<Option<Fate>>, alone: bool) {
        // Once a group: it is taken from the queue before.
        let _ = self.fates.set(fates);
        self.word.store(SETTLED, Ordering::Release);
        if !alone {
            let _ = futex::wake(&self.word, Flags::PRIVATE, u32::MAX >> 1);
        }
    }

    /// What became of a slot's record, once the group is settled.
    pub(super) fn fate(&self, slot: usize) -> Option<Fate> {
        if self.word.load(Ordering::Acquire) != SETTLED {
            return None;
        }
        let lost = || AppendError::Unavailable("the log dropped the record".to_owned());
        Some(
            self.fates
                .get()
                .and_then(|fates| fates.get(slot).cloned().flatten())
                .unwrap_or_else(|| Err(lost())),
        )
    }

    /// Asks one of the callers that may lead to do so.
    pub(super) fn want_leader(&self) {
        let asked =
            self.word
                .compare_exchange(WAITING, LEADER_WANTED, Ordering::AcqRel, Ordering::Acquire);
        if asked.is_ok() {
            let _ = futex::wake_bitset(&self.word, Flags::PRIVATE, 1, MAY_LEAD);
        }
    }

    /// Waits for the fate of a slot's record without bound, or until asked to lead.
    pub(super) fn wait(&self, slot: usize) -> Woken {
        self.wait_as(slot, true, None)
    }

    /// Waits for the fate of a slot's record, at most this long.
    pub(super) fn wait_timeout(&self, slot: usize, timeout: Duration) -> Woken {
        self.wait_as(slot, false, Instant::now().checked_add(timeout))
    }

    fn wait_as(&self, slot: usize, may_lead: bool, deadline: Option<Instant>) -> Woken {
        loop {
            let seen = self.word.load(Ordering::Acquire);
            if let Some(fate) = self.fate(slot) {
                return Woken::Settled(fate);
            }
            if may_lead && seen == LEADER_WANTED {
                let taken = self.word.compare_exchange(
                    LEADER_WANTED,
                    WAITING,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                if taken.is_ok() {
                    return Woken::Lead;
                }
                continue;
            }
            let Some(deadline) = deadline else {
                let bit = if may_lead { MAY_LEAD } else { FOLLOWS };
                let _ = futex::wait_bitset(&self.word, Flags::PRIVATE, seen, None, bit);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Woken::TimedOut;
            }
            let until = monotonic_after(left);
            let _ = futex::wait_bitset(&self.word, Flags::PRIVATE, seen, Some(&until), FOLLOWS);
        }
    }
}

/// The time on the monotonic clock after this long: a bitset wait takes an absolute one.
fn monotonic_after(left: Duration) -> Timespec {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let nanos = i64::from(left.subsec_nanos()).saturating_add(now.tv_nsec);
    let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    Timespec {
        tv_sec: now
            .tv_sec
            .saturating_add(seconds)
            .saturating_add(nanos / 1_000_000_000),
        tv_nsec: nanos % 1_000_000_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Sha256Hash;

    fn done(index: u64) -> Fate {
        Ok(Appended {
            incarnation: 1,
            index,
            leaf: Sha256Hash::of(&[]),
        })
    }

    #[test]
    fn all_of_a_group_are_woken_with_their_own_fate() {
        let group = Group::default();
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|slot| {
                    let group = &group;
                    scope.spawn(move || group.wait_timeout(slot, Duration::from_secs(30)))
                })
                .collect();
            group.settle((0..4).map(|i| Some(done(i))).collect(), false);
            for (i, thread) in waiting.into_iter().enumerate() {
                match thread.join().unwrap() {
                    Woken::Settled(fate) => assert_eq!(fate, done(i as u64)),
                    Woken::Lead | Woken::TimedOut => panic!("not settled"),
                }
            }
        });
    }

    #[test]
    fn one_that_may_lead_is_asked_and_one_with_a_timeout_is_not() {
        let group = Group::default();
        std::thread::scope(|scope| {
            let bounded = scope.spawn(|| group.wait_timeout(0, Duration::from_millis(200)));
            let leader = scope.spawn(|| group.wait(1));
            group.want_leader();
            assert!(matches!(leader.join().unwrap(), Woken::Lead));
            assert!(matches!(bounded.join().unwrap(), Woken::TimedOut));
        });
    }
}
