//! Token buckets, daily volumes, bounded retry and breakers.
//!
//! What this crate is: the arithmetic of "how much" and "how often", in integers, with time and
//! randomness handed in, so that a simulation of ten thousand nodes and a unit test see the same
//! behaviour as a node at sea.
//!
//! What it is not: it starts no timer, owns no thread, knows no peer, principal or socket. Whoever
//! asks gets an answer at once; waiting is the caller's business.
//!
//! Where to start: [`TokenBuckets`] for quotas (INV-13), [`Ladder`] for several at once, [`BoundedRetry`] and [`RetryBudget`] for
//! redials (INV-12), [`Breaker`] for upstreams that fail, [`DailyVolume`] for bytes a day.
//!
//! Two units of time are used throughout: `now: Duration` is monotonic time since process start,
//! and a `governor` [`Clock`] gives the same to the buckets. Wall time is never used here, so a
//! clock that is set back or forward neither grants nor takes quota.

mod address;
mod breaker;
mod bucket;
mod clock;
mod ladder;
pub mod limits;
mod retry;
mod volume;

pub use address::AddressBlock;
pub use breaker::{Breaker, BreakerConfig, BreakerConfigError, BreakerOpen, BreakerState, Call};
pub use bucket::{Rate, RateError, Refused, TokenBuckets};
pub use clock::{ManualClock, MonotonicClock};
pub use governor::clock::Clock;
pub use ladder::{Ladder, RungRefused, RungStats};
pub use retry::{
    BoundedRetry, BudgetSpent, RetryBudget, RetryBudgetConfig, RetryConfig, RetryConfigError,
};
pub use volume::{DailyVolume, VolumeSpent};
