//! Every bound of the worker, with what it costs in the worst case.

use std::time::Duration;

use tidelock_prover::limits::{
    PROOF_FIRST_BYTES_MAX, PROOF_MODEL_BYTES_MAX, PROOF_QUESTION_BYTES_MAX,
};

/// Milliseconds from the start of a worker to its end by force, where the config says nothing else. With what
/// stands around it a refusal stays under two seconds. A thousand policies take a tenth of it on one
/// small core; who has many thousand on a slow machine raises `policy.worker_deadline_ms`.
pub(crate) const DEADLINE_MS: u64 = 1_500;

/// What `policy.worker_deadline_ms` may be.
pub(crate) const DEADLINE_MS_RANGE: std::ops::RangeInclusive<u64> = 500..=60_000;

/// The shortest deadline at start and reload: nobody waits for an answer, the machine is busy with
/// starting, and what is judged has decided here before. Two slots: 20 seconds in the worst case, after an
/// upgrade only, because what has passed under the same binary is not examined again.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);

/// CPU seconds beyond the deadline after which the kernel ends a worker, should its node be stopped
/// or gone and nobody count the time.
pub(super) const CPU_SPARE_S: u64 = 1;

/// Address space of a worker: the largest bundle that the limits of `tidelock-policy` admit takes half of
/// it. Far below what would make a node's machine swap for long, and the kernel ends a worker before
/// anything else when memory is short.
pub(crate) const MEMORY_BYTES: u64 = 512 << 20;

/// Bytes of the part of a request that is not the package.
pub(super) const ASK_BYTES_MAX: usize = 4 * 1024;

/// Bytes of an answer: the policies and files of the largest bundle, for `bundle inspect`. Held once by
/// the node while it reads, one worker at a time: 8 MiB.
pub(super) const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Who may wait for the one worker; whoever comes after is told `BUNDLE_WORKER_BUSY`. Each holds its
/// package meanwhile: 16 MiB.
pub(super) const WAITING_MAX: usize = 4;

/// Refused contents that are remembered, so that the same bytes from the next peer cost no worker
/// (INV-07): about 1 KiB each.
pub(super) const REFUSED_MAX: usize = 64;

/// How long a refused content is remembered against peers.
pub(super) const REFUSED_FOR: Duration = Duration::from_secs(600);

/// The same where a worker failed and said nothing of the bundle, the first time; doubled with each
/// further one, up to [`REFUSED_FOR`]. A good bundle that met a busy minute is compiled soon after it; one
/// that ends its workers costs seven of them in the first half hour, and six an hour then.
pub(super) const FAILED_FOR: Duration = Duration::from_secs(15);

/// Contents that passed, and are not examined again by this binary: the active one, the last known
/// good one, and plans before they are acted upon.
pub(super) const PASSED_MAX: usize = 8;

/// Milliseconds that proving one bundle not wider may take in all, compiler and solver together, where the
/// config says nothing else. Nothing waits for it but the bundle itself, and bundles behind it.
pub(crate) const PROOF_DEADLINE_MS: u64 = 10_000;

/// What `policy.proof_deadline_ms` may be.
pub(crate) const PROOF_DEADLINE_MS_RANGE: std::ops::RangeInclusive<u64> = 500..=60_000;

/// Address space of a solver, one at a time.
pub(crate) const SOLVER_MEMORY_BYTES: u64 = 1 << 30;

/// Files that a solver may have open: its own libraries while it starts.
pub(super) const SOLVER_FILES_MAX: u64 = 16;

/// Bytes of what a solver says: an answer for each kind of request, or one model.
pub(super) const SOLVER_OUTPUT_BYTES_MAX: usize = PROOF_MODEL_BYTES_MAX;

/// Verdicts about pairs of bundles that are remembered (INV-07), each with at most one counterexample of
/// a few KiB.
pub(super) const PROOFS_KEPT_MAX: usize = 16;

const _: () = assert!(*PROOF_DEADLINE_MS_RANGE.start() <= PROOF_DEADLINE_MS);
const _: () = assert!(PROOF_DEADLINE_MS <= *PROOF_DEADLINE_MS_RANGE.end());
const _: () = assert!(PROOF_QUESTION_BYTES_MAX + PROOF_FIRST_BYTES_MAX < ANSWER_BYTES_MAX);
const _: () = assert!(*DEADLINE_MS_RANGE.start() <= DEADLINE_MS);
const _: () = assert!(DEADLINE_MS <= *DEADLINE_MS_RANGE.end());
const _: () = assert!(FAILED_FOR.as_secs() <= REFUSED_FOR.as_secs());
const _: () = assert!(tidelock_policy::limits::PACKAGE_BYTES_MAX < ANSWER_BYTES_MAX);
