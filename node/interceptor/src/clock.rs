//! Time, as the shell gives it.

use std::{sync::Arc, time::Duration};

/// Where the interceptor reads time.
pub trait Clock: Send + Sync {
    /// Monotonic time since process start.
    fn now(&self) -> Duration;

    /// Trusted wall time in unix milliseconds: what policy age is judged by and records show.
    fn unix_ms(&self) -> u64;

    /// CPU time of the calling thread, which the engine's budget is measured in: a decision that
    /// was merely not scheduled is late, not expensive. A clock without it measures in `now`.
    fn thread_cpu(&self) -> Duration {
        self.now()
    }

    /// Reads the CPU time of the calling thread from any other one, in the measure of
    /// [`Clock::thread_cpu`]: how a budget is enforced on an engine that does not come back. A
    /// clock without it leaves that to the end of the caller's wait.
    fn thread_cpu_from_outside(&self) -> Option<ThreadCpu> {
        None
    }
}

/// Tells the CPU time of one thread; nothing where it cannot be read.
pub type ThreadCpu = Box<dyn Fn() -> Option<Duration> + Send>;

/// The same clock for token buckets.
#[derive(Clone)]
pub(crate) struct BucketClock(pub(crate) Arc<dyn Clock>);

impl tidelock_quota::Clock for BucketClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.now()
    }
}
