//! Every bound of this crate in one place.
//!
//! Worst case of one request in flight: its body (64 KiB), the parsed value (at most 33 nodes a
//! byte pair, bounded by the body), its canonical form and its record: about 1 MiB for a hostile
//! body, a few KiB for a usual one. How many are in flight is the gateway's limit.

use std::time::Duration;

use tidelock_quota::{BreakerConfig, Rate};

/// Bytes of one request body.
pub const MAX_BODY_BYTES: usize = 64 * 1024;

/// Nesting depth of a request; the outermost object counts as one.
pub const MAX_DEPTH: usize = 32;

/// Integers beyond this are refused: not every JSON reader keeps them exactly (RFC 7493).
pub const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// Bytes of an action name such as `fs.read`.
pub const MAX_ACTION_NAME_BYTES: usize = 128;

/// Bytes of a principal or resource type.
pub const MAX_TYPE_BYTES: usize = 64;

/// Bytes of a principal id.
pub const MAX_PRINCIPAL_ID_BYTES: usize = 256;

/// Bytes of a resource id, before and after normalisation.
pub const MAX_RESOURCE_ID_BYTES: usize = 4096;

/// Bytes of one segment of a file path.
pub const MAX_PATH_SEGMENT_BYTES: usize = 255;

/// Bytes of a host name.
pub const MAX_HOST_BYTES: usize = 253;

/// Bytes of the caller's own request id.
pub const MAX_REQUEST_ID_BYTES: usize = 128;

/// Bytes of the method of a proxied request.
pub const MAX_METHOD_BYTES: usize = 32;

/// Headers of a proxied request that one proxy's terms put into the context; with
/// [`MAX_HEADER_BYTES`] each, 16 KiB a request.
pub const MAX_CONTEXT_HEADERS: usize = 16;

/// Bytes of the value of a header of a proxied request that is read at all.
pub const MAX_HEADER_BYTES: usize = 1024;

/// Bytes of one message that quotes input (a key, an engine's error).
pub const MAX_MESSAGE_BYTES: usize = 256;

/// Matched policy ids and engine errors that one record or answer lists; the rest is counted.
pub const MAX_LISTED: usize = 32;

/// Bytes of one policy id in a record or answer.
pub const MAX_POLICY_ID_BYTES: usize = 128;

/// Bytes of one canonical record (ruling 22).
pub const MAX_RECORD_BYTES: usize = 65_535;

/// Bytes of a record of the short form: two hashes of 71 bytes, an action's name, a node id and
/// fixed fields; where a decision point was asked, a third hash and two words.
pub const MAX_SHORT_RECORD_BYTES: usize = 800;

/// Canonical bytes of params, and of context, that a record carries in full; beyond it the record
/// carries their hash only.
pub const MAX_INLINE_BYTES: usize = 8 * 1024;

/// Bytes of an event's detail; a bigger one is replaced by a note of its size.
pub const MAX_EVENT_BYTES: usize = 48 * 1024;

/// Buckets of each kind of quota, and principals whose denials are budgeted: at most 500 bytes each,
/// seven kinds, 28 MiB in all.
pub const MAX_PRINCIPALS: usize = 8_192;

/// Decisions whose record is not durable yet; beyond it a request is answered `AUDIT_UNAVAILABLE`.
/// Each holds its action: a few KiB usually, about 200 KiB for a hostile one.
pub const MAX_PENDING: usize = 16_384;

/// Principals that one summary window tells apart; what comes beyond is counted under `other`.
/// A summary line is at most about 1,100 bytes, so a window's record stays below the record limit.
pub const MAX_SUMMARY_PRINCIPALS: usize = 32;

/// Decision points, with what they said and what stood in for it, that one summary window tells apart; what
/// comes beyond is counted without the name, at most once for each outcome and stand-in. A line is at most
/// 512 bytes, one without a name 128.
pub const MAX_SUMMARY_CONSULTS: usize = 16;

/// Allows whose outcome can be reported; about 300 bytes each, 5 MiB in all. The oldest of whoever has
/// the most goes.
pub const MAX_OPEN_REPORTS: usize = 16_384;

/// Decisions that were no allow and are known as such to who reports an outcome of them.
pub const MAX_DENIED_KNOWN: usize = 4_096;

/// Records of earlier runs that are read back for reports, once a run.
pub const MAX_READ_BACK: usize = 4_096;

/// How often reading them is tried where the disk refuses, and how long it rests between two tries: eight
/// minutes, and 32 readings of up to so many records in the worst case.
pub const READ_BACK_TRIES: u32 = 32;

/// See [`READ_BACK_TRIES`].
pub const READ_BACK_PAUSE: Duration = Duration::from_secs(15);

/// Age of a decision beyond which no outcome of it is taken.
pub const REPORT_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Evaluations of one AuthZEN request. Each has a durable record of its own, so a request writes at
/// most this many; their bodies share one of [`MAX_BODY_BYTES`].
pub const MAX_EVALUATIONS: usize = 64;

/// Bytes of JSON that the evaluations of one batch inherit, each in its own copy. As values they take up to
/// a hundred times as much: 12 MiB at the worst, twice what a single request of full length can cost.
pub const MAX_INHERITED_BYTES: usize = 128 * 1024;

/// Candidates that one page of a search judges.
pub const MAX_SEARCH_CANDIDATES: usize = 256;

/// Results that one page of a search carries: at most 100 ids of 4 KiB, 400 KiB.
pub const MAX_SEARCH_RESULTS: usize = 100;

/// Bytes of a page token.
pub const MAX_PAGE_TOKEN_BYTES: usize = 64;

/// Time after which a page of a search judges no further candidate. One more may be under way, so a
/// page takes at most this and [`ENGINE_WAIT`].
pub const SEARCH_BUDGET: Duration = Duration::from_millis(100);

/// CPU time that the policy engine may take for one decision.
pub const ENGINE_BUDGET: Duration = Duration::from_millis(5);

/// Threads that evaluate. Each may be at an evaluation that was abandoned; then they are all the
/// work that engines without an end can cause, and every action is denied until one ends. Enough
/// for a hundred thousand decisions a second of 20 us each.
pub const ENGINE_WORKERS: usize = 4;

/// Workers that evaluate for one caller at a time: half of them, so that whoever asks for what does
/// not end leaves the others theirs.
pub const ENGINE_WORKERS_PER_CALLER: usize = ENGINE_WORKERS / 2;

/// Time that a caller waits for a worker, and then again for an evaluation that does not get to its CPU time: a blocked engine,
/// or a machine so busy that the thread is not scheduled.
pub const ENGINE_WAIT: Duration = Duration::from_millis(200);

/// How often the same fault of an engine is written to the log of the process.
pub const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Stack of an evaluating thread: twice what the deepest policy of the policy crate's limits needs
/// in an unoptimised build. 8 MiB of address space in all, of which little is ever touched.
pub const ENGINE_STACK_BYTES: usize = 2 * 1024 * 1024;

/// Time that a caller waits for its record to become durable.
pub const APPEND_TIMEOUT: Duration = Duration::from_millis(250);

/// Longest time that one decision waits for decision points, whatever the bundle says and however often
/// the policy changes meanwhile. Its caller holds its slot at the door for as long.
pub const CONSULT_WAIT: Duration =
    Duration::from_millis(tidelock_policy::limits::CONSULT_DEADLINE_MS_MAX);

/// Time after its deadline at which a question counts as lost by whoever carries it.
pub const CONSULT_GRACE: Duration = Duration::from_millis(250);

/// Questions on their way to one upstream. Each holds a body of at most [`MAX_BODY_BYTES`], an answer and
/// the buffers of a connection, about 200 KiB at the worst: 25 MiB.
pub const MAX_CONSULTS_PER_UPSTREAM: usize = 128;

/// Decisions of one caller that wait for an answer, of all upstreams and those that join a question
/// included: a whole batch, and half of the places of one upstream.
pub const MAX_CONSULTS_PER_CALLER: usize = MAX_EVALUATIONS;

/// Decisions that wait for an answer, those that share a question included. Each holds its action: a few
/// KiB usually, about 200 KiB for a hostile one.
pub const MAX_CONSULT_WAITING: usize = 1_024;

/// Nodes that one question comes through, each asking the next one; each holds a place and waits.
pub const MAX_CONSULT_HOPS: usize = 4;

/// Bytes of an upstream's answer.
pub const MAX_CONSULT_ANSWER_BYTES: usize = 16 * 1024;

/// Bytes of the signed part of an answer, which goes into the record.
pub const MAX_CONSULT_SIGNED_BYTES: usize = 2 * 1024;

/// Obligations of one answer.
pub const MAX_CONSULT_OBLIGATIONS: usize = 8;

/// Answers of decision points that are kept for when they are away.
pub const MAX_CONSULT_CACHED: usize = 1_024;

/// What they take, in memory and in their file, which may dip into the smallest reserve of a root.
pub const MAX_CONSULT_CACHE_BYTES: usize = 256 * 1024;

/// What those of questions for one principal take: who asks much displaces its own.
pub const MAX_CONSULT_CACHE_BYTES_PER_PRINCIPAL: usize = MAX_CONSULT_CACHE_BYTES / 4;

/// An upstream that did not answer this often in the window is not asked for a while, and then by one
/// question at a time.
pub const CONSULT_BREAKER: BreakerConfig = BreakerConfig {
    failures: 3,
    window: Duration::from_secs(60),
    open_for: Duration::from_secs(10),
};

/// Shortest deadline whose passing counts for the breaker: a class that waits for 10 ms must not keep those
/// from asking that wait for seconds.
pub const CONSULT_BREAKER_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// Time between two looks at what the kept answers are still worth.
pub const CONSULT_SWEEP: Duration = Duration::from_secs(1);

/// Length of a window of summarised denials.
pub const SUMMARY_WINDOW: Duration = Duration::from_secs(10);

/// Actions a second for one principal, unless the configuration says otherwise.
pub const DEFAULT_ACTIONS: Rate = Rate {
    per_second: 2_000,
    burst: 4_000,
};

/// Actions a second of one caller for all principals together, unless the configuration says otherwise.
pub const DEFAULT_CALLER_ACTIONS: Rate = Rate {
    per_second: 2 * DEFAULT_ACTIONS.per_second,
    burst: 2 * DEFAULT_ACTIONS.burst,
};

/// How long the bucket of a quota that is full again is kept, unless the configuration says otherwise.
pub const QUOTA_IDLE: Duration = Duration::from_secs(300);

/// Record bytes a second that one principal's denials may write one by one (ruling 20).
pub const DEFAULT_DENIAL_BYTES: Rate = Rate {
    per_second: 4 * 1024,
    burst: 512 * 1024,
};

// A record must hold what is carried in full, the resource and the lists (JSON may double a text by
// escaping it), and room for the fixed part.
const _: () = assert!(
    2 * MAX_INLINE_BYTES
        + 2 * MAX_RESOURCE_ID_BYTES
        + 2 * MAX_LISTED * (MAX_POLICY_ID_BYTES + MAX_MESSAGE_BYTES)
        + 2 * (MAX_CONSULT_SIGNED_BYTES
            + (MAX_CONSULT_OBLIGATIONS + MAX_CONSULT_HOPS) * MAX_TYPE_BYTES)
        + 4096
        < MAX_RECORD_BYTES
);
const _: () = assert!(3 * 71 + MAX_ACTION_NAME_BYTES + 63 + 352 < MAX_SHORT_RECORD_BYTES);
const _: () = assert!(MAX_EVENT_BYTES + 4096 < MAX_RECORD_BYTES);
const _: () = assert!(
    MAX_SUMMARY_PRINCIPALS * 1536 + MAX_SUMMARY_CONSULTS * (512 + 128) + 4096 < MAX_RECORD_BYTES
);
const _: () = assert!(MAX_INLINE_BYTES <= MAX_BODY_BYTES);
// A single denial must be able to pass a full budget.
const _: () = assert!(DEFAULT_DENIAL_BYTES.burst as usize > MAX_RECORD_BYTES);
// Waiting for an engine and for the record stay below what callers of the door wait.
const _: () = assert!(ENGINE_WAIT.as_millis() < APPEND_TIMEOUT.as_millis());
const _: () = assert!(ENGINE_BUDGET.as_millis() < ENGINE_WAIT.as_millis());
const _: () = assert!(ENGINE_WORKERS_PER_CALLER >= 1);
const _: () = assert!(2 * MAX_CONSULTS_PER_CALLER <= MAX_CONSULTS_PER_UPSTREAM);
const _: () = assert!(MAX_CONSULT_ANSWER_BYTES <= MAX_BODY_BYTES);
const _: () = assert!(MAX_CONSULT_SIGNED_BYTES < MAX_CONSULT_ANSWER_BYTES);
// The largest answer that can be kept has a place.
const _: () =
    assert!(8 * (MAX_CONSULT_SIGNED_BYTES + 1024) < MAX_CONSULT_CACHE_BYTES_PER_PRINCIPAL);
const _: () = assert!(MAX_SEARCH_RESULTS <= MAX_SEARCH_CANDIDATES);
const _: () = assert!(SEARCH_BUDGET.as_millis() < APPEND_TIMEOUT.as_millis());
const _: () = assert!(MAX_PRINCIPALS <= tidelock_quota::limits::MAX_KEYS);
