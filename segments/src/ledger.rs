//! The one ledger of disk space (INV-04): bytes are reserved here before anybody writes.
//!
//! Counted are allocated bytes (512 x `st_blocks`) of everything under the root, directories
//! included. A reservation is an upper bound, rounded up to blocks, taken before the first byte is
//! written and settled to the measured size after. Three accounts share the ceiling: the node's own
//! data, a reserve that only urgent and state writes may dip into, and the share for audit that is
//! held for others (ruling 3), which never counts towards the node's own ladder.
//!
//! The ledger does no I/O. [`crate::Root`] feeds it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// Who may use the last bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charge {
    /// Decisions, bulk data: never from the reserve.
    Normal,
    /// CRLs, policy, state records: may dip into the reserve.
    Reserve,
    /// Audit held for other nodes: from its own share only.
    Custody,
}

/// A refused reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "disk ceiling reached: {wanted_bytes} bytes wanted, {available_bytes} available below the \
     ceiling of {ceiling_bytes}; raise the ceiling or let peers take over audit segments"
)]
pub struct CeilingReached {
    /// How much was asked for.
    pub wanted_bytes: u64,
    /// How much this charge could still have had.
    pub available_bytes: u64,
    /// The ceiling.
    pub ceiling_bytes: u64,
}

/// The figures of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Never more than this.
    pub ceiling_bytes: u64,
    /// Allocated by the file system, custody and foreign files included.
    pub allocated_bytes: u64,
    /// Promised to writes that are under way.
    pub reserved_bytes: u64,
    /// Kept back for urgent and state writes.
    pub reserve_bytes: u64,
    /// Allocated to audit of other nodes.
    pub custody_bytes: u64,
    /// The share for audit of other nodes.
    pub custody_max_bytes: u64,
    /// Allocated to files under the root that are not the node's; they shrink the rest (ruling 23).
    pub foreign_bytes: u64,
    /// Bytes by which a write has exceeded its reservation since start; anything but 0 is a fault.
    pub overrun_bytes: u64,
}

/// How full the node's own part is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ladder {
    /// Below 70 %.
    Normal,
    /// From 70 %: say so.
    Warn,
    /// From 85 %: evict what is licensed.
    Reclaim,
    /// From 95 %: actions are restricted as the bundle says.
    Restricted,
    /// Only the reserve is left.
    Sealed,
}

/// The default share for audit of other nodes: 40 % of the ceiling (ruling 3).
const CUSTODY_PERMILLE: u64 = 400;

#[derive(Debug)]
struct State {
    ceiling: u64,
    reserve: u64,
    custody_max: Option<u64>,
    own_allocated: u64,
    custody_allocated: u64,
    own_reserved: u64,
    custody_reserved: u64,
    foreign: u64,
    overrun: u64,
}

impl State {
    fn total(&self) -> u64 {
        self.own()
            .saturating_add(self.custody())
            .saturating_add(self.foreign)
    }

    /// What is left of the ceiling beside foreign files.
    fn ours(&self) -> u64 {
        self.ceiling.saturating_sub(self.foreign)
    }

    fn own(&self) -> u64 {
        self.own_allocated.saturating_add(self.own_reserved)
    }

    fn custody(&self) -> u64 {
        self.custody_allocated.saturating_add(self.custody_reserved)
    }

    fn custody_max(&self) -> u64 {
        let share = self
            .custody_max
            .unwrap_or_else(|| self.ceiling / 1000 * CUSTODY_PERMILLE);
        share.min(self.ours().saturating_sub(self.reserve))
    }

    /// The most that the node's own data may use without the reserve.
    fn own_limit(&self) -> u64 {
        self.ours()
            .saturating_sub(self.reserve)
            .saturating_sub(self.custody_max())
    }

    fn room(&self, charge: Charge) -> u64 {
        let below_ceiling = self.ceiling.saturating_sub(self.total());
        let below_reserve = below_ceiling.saturating_sub(self.reserve);
        match charge {
            Charge::Reserve => below_ceiling,
            Charge::Normal => below_reserve.min(self.own_limit().saturating_sub(self.own())),
            Charge::Custody => below_reserve.min(self.custody_max().saturating_sub(self.custody())),
        }
    }

    fn reserved(&mut self, charge: Charge) -> &mut u64 {
        match charge {
            Charge::Custody => &mut self.custody_reserved,
            Charge::Normal | Charge::Reserve => &mut self.own_reserved,
        }
    }

    fn allocated(&mut self, charge: Charge) -> &mut u64 {
        match charge {
            Charge::Custody => &mut self.custody_allocated,
            Charge::Normal | Charge::Reserve => &mut self.own_allocated,
        }
    }
}

/// The ledger. Cheap to ask; every method takes one short lock.
#[derive(Debug)]
pub struct Ledger {
    state: Mutex<State>,
}

impl Ledger {
    /// A ledger over a root that holds `allocated_bytes` now.
    #[must_use]
    pub(crate) fn new(ceiling_bytes: u64, reserve_bytes: u64, allocated_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                ceiling: ceiling_bytes,
                reserve: reserve_bytes,
                custody_max: None,
                own_allocated: allocated_bytes,
                custody_allocated: 0,
                own_reserved: 0,
                custody_reserved: 0,
                foreign: 0,
                overrun: 0,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is a few additions, so a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves bytes before a write. INV-04: nothing is written without.
    ///
    /// # Errors
    /// [`CeilingReached`] if the bytes are not there for this charge; nothing is then reserved.
    pub fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        charge: Charge,
    ) -> Result<Reservation, CeilingReached> {
        let mut state = self.state();
        let available = state.room(charge);
        if bytes > available {
            return Err(CeilingReached {
                wanted_bytes: bytes,
                available_bytes: available,
                ceiling_bytes: state.ceiling,
            });
        }
        let reserved = state.reserved(charge);
        *reserved = reserved.saturating_add(bytes);
        drop(state);
        Ok(Reservation {
            ledger: Arc::clone(self),
            bytes,
            charge,
        })
    }

    /// What this charge could reserve now.
    #[must_use]
    pub fn room(&self, charge: Charge) -> u64 {
        self.state().room(charge)
    }

    /// The figures.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let state = self.state();
        Usage {
            ceiling_bytes: state.ceiling,
            allocated_bytes: state
                .own_allocated
                .saturating_add(state.custody_allocated)
                .saturating_add(state.foreign),
            reserved_bytes: state.own_reserved.saturating_add(state.custody_reserved),
            reserve_bytes: state.reserve,
            custody_bytes: state.custody_allocated,
            custody_max_bytes: state.custody_max(),
            foreign_bytes: state.foreign,
            overrun_bytes: state.overrun,
        }
    }

    /// How full the node's own part is, reservations included.
    #[must_use]
    pub fn ladder(&self) -> Ladder {
        let state = self.state();
        let limit = u128::from(state.own_limit());
        let used = u128::from(state.own());
        if used >= limit || state.total() >= state.ceiling.saturating_sub(state.reserve) {
            return Ladder::Sealed;
        }
        match used * 100 / limit.max(1) {
            0..70 => Ladder::Normal,
            70..85 => Ladder::Warn,
            85..95 => Ladder::Reclaim,
            _ => Ladder::Restricted,
        }
    }

    /// Changes the ceiling. Below what is used already, nothing more is written until enough is freed.
    pub fn set_ceiling(&self, bytes: u64) {
        self.state().ceiling = bytes;
    }

    /// Sets the share for audit of other nodes; without a call it is 40 % of the ceiling.
    pub fn set_custody_max(&self, bytes: u64) {
        self.state().custody_max = Some(bytes);
    }

    /// Notes what foreign files take now.
    pub(crate) fn set_foreign(&self, bytes: u64) {
        self.state().foreign = bytes;
    }

    /// Counts bytes that were freed.
    pub(crate) fn freed(&self, bytes: u64, charge: Charge) {
        let mut state = self.state();
        let allocated = state.allocated(charge);
        *allocated = allocated.saturating_sub(bytes);
    }

    /// Counts bytes that are there without a reservation: found at start, or grown directories.
    pub(crate) fn found(&self, bytes: u64, charge: Charge) {
        let mut state = self.state();
        let allocated = state.allocated(charge);
        *allocated = allocated.saturating_add(bytes);
    }
}

/// Bytes promised to one write. Dropping it gives them back; booking turns a part of it into allocated bytes.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    bytes: u64,
    charge: Charge,
}

impl Reservation {
    /// How many bytes are still promised.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn charge(&self) -> Charge {
        self.charge
    }

    /// Books `actual` bytes as allocated; the rest of the reservation stays.
    pub(crate) fn book(&mut self, actual: u64) {
        let mut state = self.ledger.state();
        let from_reservation = actual.min(self.bytes);
        self.bytes -= from_reservation;
        let reserved = state.reserved(self.charge);
        *reserved = reserved.saturating_sub(from_reservation);
        let allocated = state.allocated(self.charge);
        *allocated = allocated.saturating_add(actual);
        let over = actual - from_reservation;
        state.overrun = state.overrun.saturating_add(over);
        drop(state);
        if over > 0 {
            tracing::warn!(
                bytes = over,
                "a write took more disk space than was reserved for it"
            );
        }
    }
}

impl Reservation {
    /// Takes allocated bytes back into the reservation, when what they were booked for is gone and
    /// as much will be written again.
    pub(crate) fn reclaim(&mut self, bytes: u64) {
        let mut state = self.ledger.state();
        let allocated = state.allocated(self.charge);
        let bytes = bytes.min(*allocated);
        *allocated -= bytes;
        let reserved = state.reserved(self.charge);
        *reserved = reserved.saturating_add(bytes);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.ledger.state();
        let reserved = state.reserved(self.charge);
        *reserved = reserved.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ledger() -> Arc<Ledger> {
        let ledger = Ledger::new(1000, 100, 0);
        ledger.set_custody_max(300);
        ledger
    }

    #[test]
    fn inv_04_no_sum_of_reservations_exceeds_the_ceiling() {
        let ledger = ledger();
        let own = ledger.reserve(600, Charge::Normal).unwrap();
        assert_eq!(
            ledger.reserve(1, Charge::Normal).map(|_| ()),
            Err(CeilingReached {
                wanted_bytes: 1,
                available_bytes: 0,
                ceiling_bytes: 1000
            })
        );
        let custody = ledger.reserve(300, Charge::Custody).unwrap();
        assert!(ledger.reserve(1, Charge::Custody).is_err());
        let reserve = ledger.reserve(100, Charge::Reserve).unwrap();
        assert!(ledger.reserve(1, Charge::Reserve).is_err());
        assert_eq!(ledger.usage().reserved_bytes, 1000);
        drop((own, custody, reserve));
        assert_eq!(ledger.usage().reserved_bytes, 0);
        assert!(ledger.reserve(600, Charge::Normal).is_ok());
    }

    #[test]
    fn settling_books_what_was_used_and_frees_the_rest() {
        let ledger = ledger();
        ledger.reserve(500, Charge::Normal).unwrap().book(200);
        let usage = ledger.usage();
        assert_eq!(
            (
                usage.allocated_bytes,
                usage.reserved_bytes,
                usage.overrun_bytes
            ),
            (200, 0, 0)
        );
        ledger.reserve(10, Charge::Normal).unwrap().book(30);
        assert_eq!(ledger.usage().overrun_bytes, 20);
        ledger.freed(230, Charge::Normal);
        assert_eq!(ledger.usage().allocated_bytes, 0);
    }

    #[test]
    fn the_ladder_counts_own_data_only() {
        let ledger = ledger();
        for (bytes, expected) in [
            (0, Ladder::Normal),
            (419, Ladder::Normal),
            (420, Ladder::Warn),
            (510, Ladder::Reclaim),
            (570, Ladder::Restricted),
            (600, Ladder::Sealed),
        ] {
            let _held = ledger.reserve(bytes, Charge::Normal).unwrap();
            assert_eq!(ledger.ladder(), expected, "{bytes}");
        }
        let _custody = ledger.reserve(300, Charge::Custody).unwrap();
        assert_eq!(ledger.ladder(), Ladder::Normal);
    }

    #[test]
    fn a_ceiling_below_what_is_used_seals_until_enough_is_freed() {
        let ledger = ledger();
        ledger.reserve(500, Charge::Normal).unwrap().book(500);
        ledger.set_ceiling(400);
        assert_eq!(ledger.ladder(), Ladder::Sealed);
        assert!(ledger.reserve(1, Charge::Reserve).is_err());
        ledger.freed(200, Charge::Normal);
        assert!(ledger.reserve(50, Charge::Reserve).is_ok());
        ledger.set_ceiling(1000);
        assert_eq!(ledger.ladder(), Ladder::Normal);
    }

    #[test]
    fn foreign_bytes_shrink_the_rest_and_may_seal() {
        let ledger = ledger();
        let own = ledger.reserve(300, Charge::Normal).unwrap();
        ledger.set_foreign(200);
        assert_eq!(ledger.usage().foreign_bytes, 200);
        assert_eq!(ledger.usage().allocated_bytes, 200);
        // 1000 - 200 foreign - 100 reserve - 300 custody.
        assert_eq!(ledger.room(Charge::Normal), 100);
        assert_eq!(ledger.room(Charge::Custody), 300);
        ledger.set_foreign(350);
        assert_eq!(ledger.ladder(), Ladder::Sealed);
        assert_eq!(ledger.room(Charge::Normal), 0);
        assert_eq!(ledger.room(Charge::Reserve), 350);
        ledger.set_foreign(2000);
        assert_eq!(ledger.room(Charge::Reserve), 0);
        assert_eq!(ledger.ladder(), Ladder::Sealed);
        ledger.set_foreign(0);
        assert_eq!(ledger.room(Charge::Normal), 300);
        drop(own);
        assert_eq!(ledger.ladder(), Ladder::Normal);
    }

    proptest! {
        /// Whatever is reserved, booked and freed in whatever order: the sum stays below the ceiling,
        /// nobody gets more than his share, and a refused request costs nothing.
        #[test]
        fn inv_04_random_reservations_never_exceed_the_ceiling(
            ceiling in 1u64..100_000,
            reserve in 0u64..50_000,
            custody in 0u64..120_000,
            steps in proptest::collection::vec((0u8..6, 0u64..40_000, any::<prop::sample::Index>()), 0..120),
        ) {
            let ledger = Ledger::new(ceiling, reserve, 0);
            ledger.set_custody_max(custody);
            let mut held: Vec<Reservation> = Vec::new();
            let mut booked: Vec<(u64, Charge)> = Vec::new();
            for (what, bytes, which) in steps {
                match what {
                    0..3 => {
                        let charge = match what {
                            0 => Charge::Normal,
                            1 => Charge::Reserve,
                            _ => Charge::Custody,
                        };
                        let (before, room) = (ledger.usage(), ledger.room(charge));
                        match ledger.reserve(bytes, charge) {
                            Ok(reservation) => {
                                prop_assert!(bytes <= room);
                                held.push(reservation);
                            }
                            Err(refused) => {
                                prop_assert!(bytes > room);
                                prop_assert_eq!(refused.available_bytes, room);
                                prop_assert_eq!(ledger.usage(), before);
                            }
                        }
                    }
                    3 if !held.is_empty() => {
                        let at = which.index(held.len());
                        let reservation = &mut held[at];
                        let part = bytes.min(reservation.bytes());
                        reservation.book(part);
                        booked.push((part, reservation.charge()));
                    }
                    4 if !held.is_empty() => drop(held.swap_remove(which.index(held.len()))),
                    5 if !booked.is_empty() => {
                        let (bytes, charge) = booked.swap_remove(which.index(booked.len()));
                        ledger.freed(bytes, charge);
                    }
                    _ => {}
                }
                let usage = ledger.usage();
                prop_assert!(usage.allocated_bytes + usage.reserved_bytes <= ceiling);
                prop_assert!(usage.custody_bytes <= usage.custody_max_bytes);
                prop_assert_eq!(usage.overrun_bytes, 0);
                let reserved: u64 = held.iter().map(Reservation::bytes).sum();
                let allocated: u64 = booked.iter().map(|(bytes, _)| bytes).sum();
                prop_assert_eq!((usage.reserved_bytes, usage.allocated_bytes), (reserved, allocated));
            }
        }
    }
}
