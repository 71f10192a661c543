//! Every bound of a proof, with what it costs in the worst case.

/// Kinds of request (type of principal, action, type of resource) of a bundle that is proved not to permit more.
/// Each costs one compilation of all policies at worst: a hundred policies take about 10 ms.
pub const PROOF_REQUEST_KINDS_MAX: usize = 256;

/// Bytes of the parts that are asked first, of all questions about two bundles. Those beyond it go without.
pub const PROOF_FIRST_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of all questions to the solver about two bundles, but for those parts. Held by the worker, then by the node: 14 MiB.
pub const PROOF_QUESTION_BYTES_MAX: usize = 6 * 1024 * 1024;

/// Kinds of request of which it is open what is permitted newly, and a model is asked for.
pub const PROOF_OPEN_MAX: usize = 8;

/// Models of the parts that are asked first: each costs a solver and a worker, and may show nothing.
pub const PROOF_FIRST_MODELS_MAX: usize = 2;

/// Policies in the parts that are asked first about one kind of request, roughly; where there would be more, it is one
/// part.
pub const PROOF_FIRST_POLICIES_MAX: usize = 1_024;

/// Models of one kind of request that a solver is asked for.
pub const PROOF_MODELS_MAX: usize = 4;

/// Bytes of one model.
pub const PROOF_MODEL_BYTES_MAX: usize = 1024 * 1024;

/// Characters of an answer of the solver that is none, as they are told.
pub const ANSWER_SHOWN_CHARS_MAX: usize = 128;

/// What a proof leaves out as impossible, and entities that a counterexample supposes.
pub const PROOF_SUPPOSED_MAX: usize = 256;

/// Stack of the thread that makes the questions, in a worker only. Terms nest deeper than policies.
pub const PROVER_STACK_BYTES: usize = 64 * 1024 * 1024;

/// Seconds that a bundle may be made ahead of the clock and still count as not wider: clocks differ.
pub const CREATED_AHEAD_S_MAX: u64 = 24 * 3600;
