//! The concurrency limit: a fixed number of decisions in flight, and a share for each principal.
//!
//! A [`Slot`] is taken after authentication and before the first byte of a body is read, and is
//! given back when the decision has really come back, not when the client has gone away: a caller
//! that hangs up at once cannot pile up work behind the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many of something are in use.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicUsize);

impl Counter {
    fn take(&self, limit: usize) -> bool {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
                (n < limit).then_some(n + 1)
            })
            .is_ok()
    }

    fn give_back(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

/// All slots of one kind.
#[derive(Debug)]
pub(crate) struct Slots {
    in_use: Counter,
    total: usize,
    share: usize,
}

/// One slot, given back when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    principal: Arc<Counter>,
}

impl Slots {
    pub(crate) fn new(total: usize, share: usize) -> Arc<Self> {
        Arc::new(Self {
            in_use: Counter::default(),
            total,
            share,
        })
    }

    /// A slot for this principal, or `None` when its share or the whole is used up.
    ///
    /// The share is charged first: a principal over its share must not touch the common count,
    /// or one noisy caller could starve all.
    pub(crate) fn take(self: &Arc<Self>, principal: &Arc<Counter>) -> Option<Slot> {
        if !principal.take(self.share) {
            return None;
        }
        if !self.in_use.take(self.total) {
            principal.give_back();
            return None;
        }
        Some(Slot {
            slots: Arc::clone(self),
            principal: Arc::clone(principal),
        })
    }

    pub(crate) fn in_use(&self) -> usize {
        self.in_use.get()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.in_use.give_back();
        self.principal.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_07_slots_are_bounded_and_come_back() {
        let slots = Slots::new(3, 2);
        let (noisy, quiet) = (Arc::new(Counter::default()), Arc::new(Counter::default()));

        let first = slots.take(&noisy).unwrap();
        let _second = slots.take(&noisy).unwrap();
        assert!(slots.take(&noisy).is_none(), "over its share");
        assert_eq!(slots.in_use(), 2, "a refused request costs nothing");

        let _third = slots.take(&quiet).unwrap();
        assert!(slots.take(&quiet).is_none(), "all are taken");
        assert_eq!((slots.in_use(), quiet.get()), (3, 1));

        drop(first);
        assert!(slots.take(&quiet).is_some(), "one came back");
        assert_eq!((slots.in_use(), noisy.get(), quiet.get()), (2, 1, 1));
    }
}
