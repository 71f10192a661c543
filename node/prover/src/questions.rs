//! The part of the widening gate that asks a solver: what must be unsatisfiable if the newer policies
//! permit nothing new, and what a solution means.
//!
//! For each kind of request that the newer schema knows (type of principal, action, type of resource) there is
//! one question: is there a request that the newer bundle permits and the older one does not? Cedar's
//! symbolic compiler makes the terms. Three things differ between its world and this engine, and each is
//! settled so that an error can only cost a proof:
//!
//! - Cedar skips a policy that errs, here any error denies. So "does not permit" is "Cedar denies, or a policy
//!   errs", and "permits" is "Cedar allows, and none errs".
//! - In the compiler's world every entity exists. Here a principal that nobody described has no attributes,
//!   and reading one errs. So the terms are made for a schema in which every attribute of an entity may be
//!   absent (`shapes.rs`); the policies are still checked against the real one.
//! - That world is larger than the real one, where an entity has all its required attributes or nothing at
//!   all. What cannot be (`worlds.rs`) is forbidden in the newer bundle: only requests are
//!   left out that no node can meet.
//!
//! Entities of both bundles are the same (compared before), so whatever holds for all entities holds for
//! them. The node runs the solver; nothing here does. Everything here runs in a worker: the compiler
//! panics on what it does not know.

use cedar_policy::RequestEnv;
use serde::{Deserialize, Serialize};
use tidelock_policy::BundleError;

use crate::limits::{PROOF_FIRST_BYTES_MAX, PROOF_QUESTION_BYTES_MAX, PROVER_STACK_BYTES};
use crate::pair::{Pair, Side};
use crate::widening::WhyUnproven;

/// What a solver has to be asked about two bundles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Questions {
    /// One for each kind of request that is not settled without. None at all: nothing is wider.
    Asked(Vec<Question>),
    /// There is no question that would decide it.
    None {
        /// Why.
        reason: WhyUnproven,
        /// The same for people.
        detail: String,
    },
}

/// What a solver has to be asked about one kind of request. Scripts are SMT-LIB 2, each whole in itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The kind of request, for people.
    pub about: String,
    /// What is asked first, because it is shorter: where all parts are `unsat`, so is the script. There may be none.
    pub first: Vec<Part>,
    /// Ends with `(check-sat)`: `unsat` proves that nothing new is permitted. Empty where it is known that
    /// the answer is `sat`.
    pub script: String,
    /// Scripts that end with `(get-model)`: what may show a request that is permitted newly.
    pub models: Vec<String>,
    /// What it means if no model does.
    pub otherwise: WhyUnproven,
}

/// A part of what is asked first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Which one it is.
    pub number: usize,
    /// Ends with `(check-sat)`. Empty where it is known that the answer is `sat`.
    pub script: String,
    /// Ends with `(get-model)`: what may show a request that is permitted newly.
    pub model: Option<String>,
}

impl Part {
    fn bytes(&self) -> usize {
        self.script.len() + self.model.as_ref().map_or(0, String::len)
    }
}

/// Whose solution a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelOf {
    /// That of the part of this number.
    First(usize),
    /// That of the model script in this place.
    Whole(usize),
}

/// What has to be asked so that `after` is proved to permit nothing that `before` does not.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn questions(before: &[u8], after: &[u8]) -> Result<Questions, BundleError> {
    on_stack(|| {
        let pair = match Pair::of(Side::read(before)?, Side::read(after)?) {
            Ok(pair) => pair,
            Err((reason, detail)) => return Ok(Questions::None { reason, detail }),
        };
        let mut asked = Vec::new();
        let (mut bytes, mut first_bytes) = (0, 0);
        for kind in &pair.kinds {
            let mut question = match pair.question(kind) {
                Ok(Some(question)) => question,
                Ok(None) => continue,
                Err((reason, detail)) => {
                    let detail = format!("{}: {detail}", describe(kind));
                    return Ok(Questions::None { reason, detail });
                }
            };
            let parts: usize = question.first.iter().map(Part::bytes).sum();
            first_bytes += parts;
            if first_bytes > PROOF_FIRST_BYTES_MAX {
                // The whole one does without them.
                question.first.clear();
                first_bytes -= parts;
            }
            bytes += question.script.len();
            bytes += question.models.iter().map(String::len).sum::<usize>();
            if bytes > PROOF_QUESTION_BYTES_MAX {
                return Ok(Questions::None {
                    reason: WhyUnproven::TooLarge,
                    detail: format!("the question is longer than {PROOF_QUESTION_BYTES_MAX} bytes"),
                });
            }
            asked.push(question);
        }
        Ok(Questions::Asked(asked))
    })
}

pub(crate) type Refusal = (WhyUnproven, String);

pub(crate) fn unsupported(error: &dyn std::fmt::Display) -> Refusal {
    (WhyUnproven::Unsupported, error.to_string())
}

/// For instance `Agent, fs.read, File`.
pub(crate) fn describe(kind: &RequestEnv) -> String {
    format!(
        "{}, {}, {}",
        kind.principal(),
        kind.action().id().unescaped(),
        kind.resource()
    )
}

/// Does something on a thread whose stack is the same on every machine.
pub(crate) fn on_stack<T: Send>(
    work: impl FnOnce() -> Result<T, BundleError> + Send,
) -> Result<T, BundleError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("prover".to_owned())
            .stack_size(PROVER_STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| BundleError::Compiler(format!("no thread: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(BundleError::Compiler("it panicked".to_owned())))
    })
}
