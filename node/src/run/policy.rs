//! Where policy lives on disk, and how a bundle comes to decide.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::json;
use tidelock_policy::{BundleError, Manifest, Package, SlotFault, SlotStorage};
use tidelock_segments::{
    Charge, DomainId, FormatError, Kind, Origin, Root, SegmentHeader, SegmentId, seal_unsigned,
};

use super::{admit::Denied, node::Node};
use crate::worker::{For, is_failure};

/// How soon the slots are read again after a worker failed to judge what lies in them.
const SLOTS_AGAIN_FIRST: Duration = Duration::from_secs(1);
/// Each wait is twice the one before, up to this: a worker every five minutes in the worst case.
const SLOTS_AGAIN_MOST: Duration = Duration::from_secs(300);

/// The policy slots inside the root, charged to the reserve: a full disk never keeps policy out.
#[derive(Debug)]
pub(super) struct RootSlots(pub(super) Arc<Root>);

fn path(slot: &str) -> String {
    format!("policy/{slot}")
}

impl SlotStorage for RootSlots {
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>> {
        self.0.read(&path(slot)).map_err(io::Error::other)
    }

    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()> {
        self.0
            .write_atomic(&path(slot), bytes, Charge::Reserve)
            .map_err(io::Error::other)
    }
}

/// The policy segment of a bundle: the same bytes on every node (ruling 5).
pub(super) fn policy_segment(
    domain: &DomainId,
    package: &Package,
    manifest: &Manifest,
) -> Result<Vec<u8>, PolicySegmentError> {
    let header = SegmentHeader {
        kind: Kind::Policy,
        domain: domain.clone(),
        origin: Origin::policy(&manifest.name)?,
        sequence: manifest.epoch,
        prev: None,
        created_unix_ms: 0,
    };
    Ok(seal_unsigned(&header, &package.encode()?)?)
}

/// A bundle's name or size has no place in a segment.
#[derive(Debug, thiserror::Error)]
pub(super) enum PolicySegmentError {
    #[error("the bundle's name cannot be an origin: {0}")]
    Name(#[from] tidelock_segments::IdError),
    #[error(transparent)]
    Package(#[from] BundleError),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// When the slots are read again. What a worker said of a bundle stands; where it failed, it said nothing.
#[derive(Debug, Default)]
pub(super) struct SlotsAgain {
    due: Option<Duration>,
    wait: Duration,
    tries: u64,
}

impl SlotsAgain {
    /// The slots were read; whether the next look at them is planned.
    fn read(&mut self, faults: &[SlotFault], now: Duration) -> bool {
        let failed = faults.iter().any(|fault| is_failure(fault.code));
        if failed {
            self.wait = (self.wait * 2).clamp(SLOTS_AGAIN_FIRST, SLOTS_AGAIN_MOST);
            self.due = Some(now.saturating_add(self.wait));
            self.tries = self.tries.saturating_add(1);
        } else {
            *self = Self::default();
        }
        failed
    }

    fn is_due(&self, now: Duration) -> bool {
        self.due.is_some_and(|due| now >= due)
    }
}

/// Refused segments of which it is told once that they do not restore the newest bundle (INV-07).
const RESTORES_TOLD_MAX: usize = 64;

/// When the bundle that ought to decide is looked for in the store again: a disk that failed over it once may
/// take it by now.
#[derive(Debug, Default)]
pub(super) struct RestoreAgain {
    due: Option<Duration>,
    wait: Duration,
    told: BTreeSet<(SegmentId, &'static str)>,
}

impl RestoreAgain {
    fn is_due(&mut self, is_wanted: bool, now: Duration) -> bool {
        if !is_wanted {
            *self = Self::default();
            return false;
        }
        let is_due = self.due.is_some_and(|due| now >= due);
        if is_due || self.due.is_none() {
            self.wait = (self.wait * 2).clamp(SLOTS_AGAIN_FIRST, SLOTS_AGAIN_MOST);
            self.due = Some(now.saturating_add(self.wait));
        }
        is_due
    }

    pub(super) fn is_news(&mut self, segment: SegmentId, code: &'static str) -> bool {
        self.told.len() < RESTORES_TOLD_MAX && self.told.insert((segment, code))
    }

    pub(super) fn tell_anew(&mut self) {
        self.told.clear();
    }
}

impl Node {
    /// Looks again for the bundle that ought to decide and does not, ever more seldom.
    pub(super) fn restore_again(&self) {
        let is_wanted = self.slots.wanted().is_some();
        let now = self.clock.monotonic();
        if self.restoring().is_due(is_wanted, now) {
            self.restore_from_store();
        }
    }

    pub(super) fn restoring(&self) -> MutexGuard<'_, RestoreAgain> {
        self.restore_again
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Records what is wrong with the slots, and plans to read them again where it was a worker.
    pub(super) fn slot_faults(&self, faults: &[SlotFault]) {
        for fault in faults {
            self.event(
                "policy_slot_fault",
                json!({"slot": fault.slot, "code": fault.code, "message": fault.message}),
            );
        }
        let now = self.clock.monotonic();
        self.slots_again
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(faults, now);
    }

    /// Puts back what stood behind the active bundle, where an activation was stopped between two writes. The
    /// store holds it: nothing is dropped there before an activation is over.
    pub(super) fn restore_standby(&self) {
        let Some(content_id) = self.slots.lost_standby() else {
            return;
        };
        let found = self
            .store
            .list(Some(Kind::Policy))
            .into_iter()
            .find_map(|held| {
                let segment = self.store.get(&held.id).ok()?;
                let package = Package::decode(segment.body()).ok()?;
                (package.content_id() == content_id).then_some(package)
            });
        let restored = self.bundle_trust().and_then(|trust| {
            let package = found.ok_or_else(|| {
                Denied::local("POLICY_NO_FALLBACK", "the segment store does not hold it")
            })?;
            self.load_package(package, &trust, For::Slots)
                .map_err(|error| Denied::local(error.code(), error))
                .and_then(|bundle| {
                    let restored = self.slots.restore_standby(&bundle);
                    restored.map_err(|error| Denied::local(error.code(), error))
                })
        });
        match restored {
            Ok(standby) => self.event("policy_standby_restored", json!(standby)),
            Err(denied) => self.event(
                "policy_standby_lost",
                json!({"hash": content_id, "code": denied.code, "message": denied.message}),
            ),
        }
    }

    /// Reads the slots again if a worker failed over them. Told when it comes to an end, and not each time.
    pub(super) fn read_slots_again(&self) {
        let again = || {
            self.slots_again
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let now = self.clock.monotonic();
        if !again().is_due(now) {
            return;
        }
        let turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(trust) = self.policy_trust.load_full() else {
            return;
        };
        let faults = self.slots.reload_by(&trust, &|package| {
            self.load_package(package, &trust, For::Slots)
        });
        drop(turn);
        let tries = again().tries;
        if again().read(&faults, self.clock.monotonic()) {
            tracing::warn!(tries, "a worker failed over the policy slots again");
            return;
        }
        let epoch = self.slots.current().map(|policy| policy.bundle().epoch());
        self.event("policy_slots_read", json!({"tries": tries, "epoch": epoch}));
        self.slot_faults(&faults);
        self.restore_policy();
        self.keep_passes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(code: &'static str) -> SlotFault {
        SlotFault {
            slot: "active",
            code,
            message: String::new(),
        }
    }

    #[test]
    fn slots_are_read_again_after_a_failed_worker_ever_more_seldom_and_after_nothing_else() {
        let mut again = SlotsAgain::default();
        let day = Duration::from_secs(86_400);
        for code in ["BUNDLE_SIGNATURE", "BUNDLE_COMPILE", "SLOT_UNREADABLE"] {
            assert!(!again.read(&[fault(code)], Duration::ZERO), "{code}");
            assert!(!again.is_due(day), "{code}: it was judged");
        }
        let failed = [fault("SLOT_MISSING"), fault("BUNDLE_WORKER_UNAVAILABLE")];
        let mut now = Duration::ZERO;
        for wait_s in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            assert!(again.read(&failed, now));
            let wait = Duration::from_secs(wait_s);
            assert!(!again.is_due(now + wait - Duration::from_millis(1)));
            assert!(again.is_due(now + wait));
            now += wait;
        }
        assert!(!again.read(&[], now));
        assert!(!again.is_due(now + day));
        assert!(again.read(&failed, now) && again.is_due(now + SLOTS_AGAIN_FIRST));
    }

    /// A disk that was full for a moment kept the newest bundle out until the next start.
    #[test]
    fn the_bundle_that_ought_to_decide_is_looked_for_ever_more_seldom_until_it_does() {
        let mut again = RestoreAgain::default();
        let mut now = Duration::ZERO;
        assert!(
            !again.is_due(true, now),
            "the look that failed was just now"
        );
        for wait_s in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            let wait = Duration::from_secs(wait_s);
            assert!(!again.is_due(true, now + wait - Duration::from_millis(1)));
            now += wait;
            assert!(again.is_due(true, now));
        }
        let one = SegmentId::from_bytes([1; 32]);
        assert!(again.is_news(one, "STORE") && !again.is_news(one, "STORE"));
        assert!(again.is_news(one, "BUNDLE_SIGNATURE"));
        for number in 2..=255 {
            again.is_news(SegmentId::from_bytes([number; 32]), "STORE");
        }
        assert_eq!(again.told.len(), RESTORES_TOLD_MAX);
        // It decides; and another that does not begins anew.
        assert!(!again.is_due(false, now));
        assert!(!again.is_due(true, now) && again.is_due(true, now + SLOTS_AGAIN_FIRST));
        assert!(again.is_news(one, "STORE"));
    }
}
