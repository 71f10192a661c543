//! The quotas of actions: six buckets that a request must pass together, the narrowest first.
//!
//! They stand after normalising and before policy, so that one spelling of a resource is one bucket
//! and a flood costs no evaluation. All that match are charged, or none is ([`Ladder`]). They count
//! from the start of the process and survive nothing; status and metrics show them.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tidelock_quota::{Ladder, Rate, RateError, RungRefused, RungStats};
use tidelock_segments::Sha256Hash;

use crate::{
    action::Action,
    caller::Caller,
    limits::{DEFAULT_ACTIONS, DEFAULT_CALLER_ACTIONS, MAX_PRINCIPALS, QUOTA_IDLE},
};

/// A kind of bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bucket {
    /// One principal's actions of one type.
    PrincipalAction,
    /// One principal's actions on one resource.
    PrincipalResource,
    /// One principal's actions.
    Principal,
    /// One caller's actions, for whatever principals.
    Caller,
    /// Actions of one type.
    Action,
    /// All actions.
    Total,
}

impl Bucket {
    /// Every kind, in the order in which they are asked.
    pub const ALL: [Self; 6] = [
        Self::PrincipalAction,
        Self::PrincipalResource,
        Self::Principal,
        Self::Caller,
        Self::Action,
        Self::Total,
    ];

    /// The stable name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PrincipalAction => "principal_action",
            Self::PrincipalResource => "principal_resource",
            Self::Principal => "principal",
            Self::Caller => "caller",
            Self::Action => "action",
            Self::Total => "total",
        }
    }
}

/// What the buckets let pass. None is no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaRates {
    /// One principal's actions of one type.
    pub principal_action: Option<Rate>,
    /// One principal's actions on one resource.
    pub principal_resource: Option<Rate>,
    /// One principal's actions.
    pub principal: Rate,
    /// One caller's actions, for whatever principals: who may act for others gets no more by naming
    /// many of them.
    pub caller: Option<Rate>,
    /// Actions of one type.
    pub action: Option<Rate>,
    /// All actions.
    pub total: Option<Rate>,
    /// How long a bucket that is full again is kept, for the numbers to be seen.
    pub evict_after: Duration,
}

impl Default for QuotaRates {
    fn default() -> Self {
        Self {
            principal_action: None,
            principal_resource: None,
            principal: DEFAULT_ACTIONS,
            caller: Some(DEFAULT_CALLER_ACTIONS),
            action: None,
            total: None,
            evict_after: QUOTA_IDLE,
        }
    }
}

impl QuotaRates {
    fn rungs(&self) -> [Option<Rate>; 6] {
        [
            self.principal_action,
            self.principal_resource,
            Some(self.principal),
            self.caller,
            self.action,
            self.total,
        ]
    }
}

/// What one kind of bucket has done and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketStats {
    /// Which kind.
    pub bucket: Bucket,
    /// Its rate and counts.
    pub stats: RungStats,
}

struct State {
    ladder: Ladder<Sha256Hash, 6>,
    evict_after: Duration,
}

/// The buckets.
pub(crate) struct Quotas(Mutex<State>);

impl Quotas {
    pub(crate) fn new(rates: &QuotaRates) -> Result<Self, RateError> {
        Ok(Self(Mutex::new(State {
            ladder: Ladder::new(rates.rungs(), MAX_PRINCIPALS)?,
            evict_after: rates.evict_after,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, rates: &QuotaRates, now: Duration) -> Result<(), RateError> {
        let mut state = self.state();
        state.ladder.set_rates(rates.rungs(), now)?;
        state.evict_after = rates.evict_after;
        Ok(())
    }

    /// Charges one action to all of its buckets, or to none.
    pub(crate) fn check(
        &self,
        action: &Action,
        caller: &Caller,
        now: Duration,
    ) -> Result<(), (Bucket, Duration)> {
        // Hashes, so that a bucket costs the same whatever the caller's names are. Names hold no
        // control characters, so nothing else reads the same.
        let name = |parts: &[&str]| {
            let parts: Vec<&[u8]> = parts
                .iter()
                .flat_map(|part| [part.as_bytes(), b"\0".as_slice()])
                .collect();
            Sha256Hash::of_parts(&parts)
        };
        let principal = [
            &caller.principal_type,
            &caller.principal_id,
            action.principal().kind(),
            action.principal().id(),
        ];
        let with = |more: &[&str]| name(&[&principal, more].concat());
        let keys = [
            with(&["action", action.name()]),
            with(&["resource", action.resource_type(), action.resource_id()]),
            with(&[]),
            name(&[&caller.principal_type, &caller.principal_id, "caller"]),
            name(&[action.name()]),
            name(&[]),
        ];
        let refused = self.state().ladder.check(&keys, now);
        refused.map_err(|RungRefused { rung, retry_after }| {
            let bucket = Bucket::ALL.get(rung).copied().unwrap_or(Bucket::Total);
            (bucket, retry_after)
        })
    }

    pub(crate) fn evict_idle(&self, now: Duration) {
        let mut state = self.state();
        let evict_after = state.evict_after;
        state.ladder.evict_idle(now, evict_after);
    }

    pub(crate) fn stats(&self) -> [BucketStats; 6] {
        let stats = self.state().ladder.stats();
        let mut all = Bucket::ALL.map(|bucket| BucketStats {
            bucket,
            stats: RungStats::default(),
        });
        for (named, stats) in all.iter_mut().zip(stats) {
            named.stats = stats;
        }
        all
    }
}
