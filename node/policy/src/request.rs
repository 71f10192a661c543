//! What an engine is asked, and what it answers.

use std::cmp::Ordering;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::clip;

/// Member of the context that only the node states.
pub const NODE_MEMBER: &str = "tidelock";

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
///
/// In the order in which they win where several lanes judge one request: a forbid in any lane wins,
/// then an error, then a permit. All but [`Verdict::Permit`] deny.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// No policy matched and none errored.
    NoMatch,
    /// At least one policy permits, none forbids, none errored.
    Permit,
    /// The request could not be judged: a policy errored (a `forbid` that errors must not count as
    /// absent), or the request does not fit the schema. Always a deny.
    Error,
    /// A policy forbids, and none of its lane errored.
    Forbid,
}

/// What kept an engine from judging. Every one of them denies; the code is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Failure {
    /// The bundle has no such action.
    UnknownAction,
    /// Principal, resource or context is not what the bundle's schema declares.
    Request,
    /// A policy errored.
    Policy,
    /// The Rego lane's decision is not in the fixed form.
    Decision,
    /// The evaluation reached a bound on what it may use.
    Budget,
}

impl Failure {
    /// Every failure, in the order of the documentation.
    pub const ALL: [Self; 5] = [
        Self::UnknownAction,
        Self::Request,
        Self::Policy,
        Self::Decision,
        Self::Budget,
    ];

    /// The stable code. Every text in [`Evaluation::errors`] begins with one.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::UnknownAction => "UNKNOWN_ACTION",
            Self::Request => "REQUEST_MISMATCH",
            Self::Policy => "POLICY_ERROR",
            Self::Decision => "DECISION_MALFORMED",
            Self::Budget => "POLICY_BUDGET",
        }
    }
}

/// A verdict with its grounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evaluation {
    /// What the policies say.
    pub verdict: Verdict,
    /// Ids of the policies that determined the verdict, sorted.
    pub policies: Vec<String>,
    /// What went wrong, each text with the code of its [`Failure`] before it, sorted. Empty beside
    /// [`Verdict::Permit`] and [`Verdict::NoMatch`].
    pub errors: Vec<String>,
}

impl Evaluation {
    /// An evaluation that failed before any policy was consulted.
    #[must_use]
    pub fn failed(failure: Failure, message: &str) -> Self {
        Self {
            verdict: Verdict::Error,
            policies: Vec::new(),
            errors: vec![error_text(failure, message)],
        }
    }

    /// What two lanes say together: the stronger verdict with its policies, and the errors of both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.errors.extend(other.errors);
        self.errors.sort_unstable();
        self.errors.dedup();
        match self.verdict.cmp(&other.verdict) {
            Ordering::Less => {
                self.verdict = other.verdict;
                self.policies = other.policies;
            }
            Ordering::Equal => {
                self.policies.extend(other.policies);
                self.policies.sort_unstable();
                self.policies.dedup();
            }
            Ordering::Greater => {}
        }
        self
    }
}

/// The text of an error, bounded, with its code.
pub(crate) fn error_text(failure: Failure, message: &str) -> String {
    clip(&format!("{}: {message}", failure.code()))
}

/// Decides requests. Pure: no I/O, no clock, no memory of earlier requests. So the same bundle and
/// the same request give the same evaluation on every node.
///
/// An action that the engine does not know is [`Failure::UnknownAction`], never silence: in a bundle
/// of several lanes each must know an action before any may permit it.
///
/// Implementations: [`CedarEngine`](crate::CedarEngine), [`RegoEngine`](crate::RegoEngine), [`Lanes`] over
/// several engines, and
/// [`ScriptedEngine`](crate::testing::ScriptedEngine) for tests of what stands around an engine.
pub trait Engine: Send + Sync {
    /// Judges one request. Must not panic and must end on any input; callers guard against both
    /// all the same, from outside.
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation;
}

/// The engines of one bundle as one. All are asked, in their order, whatever the first ones say, so
/// that an answer names every policy that stands behind it.
pub struct Lanes {
    first: Arc<dyn Engine>,
    others: Vec<Arc<dyn Engine>>,
}

impl Lanes {
    /// At least one lane: no engine at all would be silent about everything.
    #[must_use]
    pub fn new(first: Arc<dyn Engine>, others: Vec<Arc<dyn Engine>>) -> Self {
        Self { first, others }
    }
}

impl Engine for Lanes {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        self.others
            .iter()
            .fold(self.first.evaluate(request), |said, lane| {
                said.and(lane.evaluate(request))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ScriptedEngine;

    const VERDICTS: [Verdict; 4] = [
        Verdict::NoMatch,
        Verdict::Permit,
        Verdict::Error,
        Verdict::Forbid,
    ];

    fn request() -> PolicyRequest {
        PolicyRequest {
            principal_type: "Agent".into(),
            principal_id: "a".into(),
            action: "fs.read".into(),
            resource_type: "File".into(),
            resource_id: "/a".into(),
            resource_attributes: serde_json::Map::new(),
            params: serde_json::Value::Null,
            context: serde_json::Value::Null,
        }
    }

    fn lane(name: &'static str, verdict: Verdict) -> Arc<dyn Engine> {
        Arc::new(ScriptedEngine::new(move |_| match verdict {
            Verdict::NoMatch => Evaluation {
                verdict,
                policies: Vec::new(),
                errors: Vec::new(),
            },
            Verdict::Error => Evaluation::failed(Failure::Policy, name),
            _ => Evaluation {
                verdict,
                policies: vec![format!("{name}-{verdict:?}")],
                errors: Vec::new(),
            },
        }))
    }

    /// Every combination of three lanes against the rule as it is written down.
    #[test]
    fn a_forbid_in_any_lane_wins_then_an_error_then_a_permit() {
        for a in VERDICTS {
            for b in VERDICTS {
                for c in VERDICTS {
                    let said = [a, b, c];
                    let expected = if said.contains(&Verdict::Forbid) {
                        Verdict::Forbid
                    } else if said.contains(&Verdict::Error) {
                        Verdict::Error
                    } else if said.contains(&Verdict::Permit) {
                        Verdict::Permit
                    } else {
                        Verdict::NoMatch
                    };
                    let lanes = Lanes::new(lane("a", a), vec![lane("b", b), lane("c", c)]);
                    let evaluation = lanes.evaluate(&request());
                    assert_eq!(evaluation.verdict, expected, "{said:?}");
                    let policies: Vec<String> = ["a", "b", "c"]
                        .into_iter()
                        .zip(said)
                        .filter(|(_, verdict)| *verdict == expected)
                        .filter(|_| matches!(expected, Verdict::Permit | Verdict::Forbid))
                        .map(|(name, verdict)| format!("{name}-{verdict:?}"))
                        .collect();
                    assert_eq!(evaluation.policies, policies, "{said:?}");
                    let errors = said.iter().filter(|v| **v == Verdict::Error).count();
                    assert_eq!(evaluation.errors.len(), errors, "{said:?}");
                    assert!(
                        evaluation.errors.is_empty()
                            || !matches!(evaluation.verdict, Verdict::Permit | Verdict::NoMatch)
                    );
                    // The order of the lanes changes nothing.
                    let turned = Lanes::new(lane("c", c), vec![lane("a", a), lane("b", b)]);
                    assert_eq!(turned.evaluate(&request()), evaluation, "{said:?}");
                }
            }
        }
    }

    #[test]
    fn one_lane_alone_says_what_it_says() {
        for verdict in VERDICTS {
            let engine = lane("a", verdict);
            let alone = Lanes::new(Arc::clone(&engine), Vec::new());
            assert_eq!(alone.evaluate(&request()), engine.evaluate(&request()));
        }
    }

    #[test]
    fn every_code_is_distinct_and_documented() {
        let book = include_str!("../../../docs/src/policy.md");
        for failure in Failure::ALL {
            let code = failure.code();
            assert!(book.contains(&format!("`{code}`")), "{code}");
            let same = Failure::ALL.iter().filter(|f| f.code() == code).count();
            assert_eq!(same, 1, "{code}");
        }
    }
}
