//! Questions of the node's own to the engine that serves.

use std::sync::Arc;

use tidelock_policy::{ActivePolicy, Evaluation, PolicyRequest};

use crate::engines::{Engines, Evaluated};

/// Who asks, where engines are shared among callers.
const HOLDER: &str = "self-check";

/// Why the engine that serves gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeFault {
    /// It used up the budget of callers without an answer.
    Late,
    /// It did not get to its budget in the time that a caller waits: the machine had none for it.
    Starved,
    /// No engine came free in the time that a caller would wait.
    Busy,
    /// It panicked.
    Panicked,
}

impl ProbeFault {
    /// Whether a machine that is busy elsewhere may be all there is to it.
    #[must_use]
    pub fn may_pass(self) -> bool {
        self != Self::Panicked
    }

    /// The word for people and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Late => "no answer in the time that a caller has",
            Self::Starved => "no time of the processor while a caller waits",
            Self::Busy => "no engine came free in the time that a caller waits",
            Self::Panicked => "the engine panicked",
        }
    }
}

pub(crate) fn ask(
    engines: &Engines,
    policy: &ActivePolicy,
    request: PolicyRequest,
) -> Result<Evaluation, ProbeFault> {
    let (evaluated, took) = engines.evaluate(policy.shared_engine(), request, &Arc::from(HOLDER));
    match evaluated {
        Evaluated::Done(evaluation) => Ok(evaluation),
        Evaluated::Panicked => Err(ProbeFault::Panicked),
        Evaluated::Late { .. } if engines.is_over_budget(took) => Err(ProbeFault::Late),
        Evaluated::Late { .. } => Err(ProbeFault::Starved),
        Evaluated::Exhausted => Err(ProbeFault::Busy),
    }
}
