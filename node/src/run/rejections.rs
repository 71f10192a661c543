//! How many rejected bundles and documents of peers get a record of their own.
//!
//! A peer may offer what does not verify at every contact, and each rejection would be a record: whoever is
//! let in could fill the log with them. The first of each window stand alone, with all that is known of
//! them; the others are counted by peer and reason, exactly, in the window's one record of refused peers.

use std::sync::atomic::{AtomicU32, Ordering};

/// Rejections a window that are recorded one by one: about 16 KiB a minute.
const RECORDED_MAX: u32 = 32;

/// What is left of the open window.
#[derive(Debug, Default)]
pub(super) struct Rejections(AtomicU32);

impl Rejections {
    /// Whether this one gets a record of its own.
    pub(super) fn may_record(&self) -> bool {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |recorded| {
                (recorded < RECORDED_MAX).then_some(recorded + 1)
            })
            .is_ok()
    }

    /// The counts of the window before are recorded.
    pub(super) fn begin_window(&self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_07_a_peer_that_offers_what_does_not_verify_writes_a_bounded_number_of_records() {
        let rejections = Rejections::default();
        let recorded = (0..10_000).filter(|_| rejections.may_record()).count();
        assert_eq!(recorded, RECORDED_MAX as usize);
        // The control: the next window has its own.
        rejections.begin_window();
        assert!(rejections.may_record());
    }
}
