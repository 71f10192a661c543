//! What an engine is asked, and what it answers.

use serde::{Deserialize, Serialize};

/// One governed action as an engine sees it: normalised, parsed once, never the caller's bytes.
///
/// The interceptor makes it from its `Action`; nothing in it is parsed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRequest {
    /// Entity type of the principal, for instance `Agent`.
    pub principal_type: String,
    /// Identity of the principal within its type.
    pub principal_id: String,
    /// The action, for instance `fs.read`.
    pub action: String,
    /// Entity type of the resource, for instance `File`.
    pub resource_type: String,
    /// Identity of the resource within its type, normalised.
    pub resource_id: String,
    /// What normalising the resource produced (`path`, `host`, …). Attributes that the bundle's
    /// schema does not declare for the type are dropped before evaluation.
    pub resource_attributes: serde_json::Map<String, serde_json::Value>,
    /// Parameters of the action. They reach a policy as `context.params`, and only where the
    /// schema declares them for the action.
    pub params: serde_json::Value,
    /// The remaining circumstances of the request: an object, or null for none.
    pub context: serde_json::Value,
}

/// What the policies say, before posture and audit have had their word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// At least one policy permits, none forbids, none errored.
    Permit,
    /// At least one policy forbids, none errored.
    Forbid,
    /// No policy matched and none errored.
    NoMatch,
    /// The request could not be judged: a policy errored (a `forbid` that errors must not count as
    /// absent), or the request does not fit the schema. Always a deny.
    Error,
}

/// A verdict with its grounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evaluation {
    /// What the policies say.
    pub verdict: Verdict,
    /// Ids of the policies that determined the verdict, sorted.
    pub policies: Vec<String>,
    /// What went wrong, sorted; empty unless the verdict is [`Verdict::Error`].
    pub errors: Vec<String>,
}

impl Evaluation {
    /// An evaluation that failed before any policy was consulted.
    #[must_use]
    pub fn error(message: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Error,
            policies: Vec::new(),
            errors: vec![message.into()],
        }
    }
}

/// Decides requests. Pure: no I/O, no clock, no memory of earlier requests.
///
/// Two implementations: [`CedarEngine`](crate::CedarEngine), and
/// [`ScriptedEngine`](crate::testing::ScriptedEngine) for tests of what stands around an engine.
pub trait Engine: Send + Sync {
    /// Judges one request. Must not panic on any input; callers guard against it all the same.
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation;
}
