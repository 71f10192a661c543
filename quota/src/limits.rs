//! Every bound of this crate in one place.

use std::time::Duration;

/// Keys that one set of buckets may hold at most. Worst case about 200 bytes a key beside the key
/// itself (map entry, order entry), so 13 MiB for a full set with keys of a few bytes.
pub const MAX_KEYS: usize = 65_536;

/// Tokens a second beyond which a bucket counts in units of several tokens, because `governor`
/// keeps whole nanoseconds a token: at this rate rounding costs at most 1 %.
pub const MAX_UNITS_PER_SECOND: u32 = 10_000_000;

/// Requests a second beyond which a rung of a ladder counts this many: a microsecond a token.
pub const MAX_LADDER_PER_SECOND: u32 = 1_000_000;

/// Attempts that one session may be configured to make. No memory depends on it; a bigger number
/// is a retry without a bound in all but name.
pub const MAX_ATTEMPTS: u32 = 1_000;

/// Longest back-off that may be configured.
pub const MAX_BACKOFF: Duration = Duration::from_secs(24 * 60 * 60);

/// Failures that a breaker remembers at most: 16 bytes each.
pub const MAX_BREAKER_FAILURES: u32 = 1_000;

/// Length of the window of a daily volume, in monotonic time.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const _: () = assert!(MAX_KEYS > 0);
const _: () = assert!(MAX_UNITS_PER_SECOND as u64 <= 1_000_000_000 / 100);
const _: () = assert!(MAX_BACKOFF.as_secs() <= DAY.as_secs());
// Full jitter multiplies nanoseconds by a 64-bit random number in 128 bits.
const _: () = assert!(MAX_BACKOFF.as_nanos() < (u64::MAX as u128));
