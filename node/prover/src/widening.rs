//! The verdict: whether a bundle permits anything that another one does not, and what shows it.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tidelock_policy::Verdict;

/// Whether a bundle permits anything that the one before does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Widening {
    /// Proved: under equal circumstances it permits no request that the other one does not.
    NotWider,
    /// It permits more.
    Wider {
        /// What of its manifest is looser, in words. Empty where the policies are.
        looser: Vec<String>,
        /// A request that it permits and the other one does not, asked of both.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        counterexample: Option<Box<Counterexample>>,
    },
    /// Neither could be shown.
    Unproven {
        /// Why, by a stable word.
        reason: WhyUnproven,
        /// The same for people, with what would help.
        detail: String,
    },
}

/// Why nothing was proved. The words are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WhyUnproven {
    /// No bundle has decided here: there is nothing to compare with.
    First,
    /// The bundle to compare with is damaged, and another one stands in for it.
    BaseDamaged,
    /// The bundle to compare with was for an emergency, or is past its end.
    BaseEnded,
    /// Nobody demands the proof, or enough keys signed: no time was spent on it.
    NotAsked,
    /// One of the two has another engine than Cedar.
    OtherEngine,
    /// Their entities differ.
    Entities,
    /// Their schemas differ in what requests or entities are.
    Schema,
    /// The policies may look at posture or age of the policy, and limits differ.
    PostureRead,
    /// The older bundle may refuse requests that reach too many of its entities.
    Reach,
    /// The symbolic compiler cannot express the policies.
    Unsupported,
    /// Too many kinds of request, or too long a question.
    TooLarge,
    /// The process that compiles the question failed.
    Prover,
    /// No solver that may be used.
    NoSolver,
    /// It took too long.
    SolverTimeout,
    /// The solver failed, or said what cannot be understood.
    SolverFailed,
    /// The solver does not know.
    SolverUnknown,
    /// The solver's counterexample is none when both bundles are asked.
    Unconfirmed,
}

impl WhyUnproven {
    /// Every reason, in the order of the documentation.
    pub const ALL: [Self; 17] = [
        Self::First,
        Self::BaseDamaged,
        Self::BaseEnded,
        Self::NotAsked,
        Self::OtherEngine,
        Self::Entities,
        Self::Schema,
        Self::PostureRead,
        Self::Reach,
        Self::Unsupported,
        Self::TooLarge,
        Self::Prover,
        Self::NoSolver,
        Self::SolverTimeout,
        Self::SolverFailed,
        Self::SolverUnknown,
        Self::Unconfirmed,
    ];

    /// The word in records and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::BaseDamaged => "base_damaged",
            Self::BaseEnded => "base_ended",
            Self::NotAsked => "not_asked",
            Self::OtherEngine => "other_engine",
            Self::Entities => "entities",
            Self::Schema => "schema",
            Self::PostureRead => "posture_read",
            Self::Reach => "reach",
            Self::Unsupported => "unsupported",
            Self::TooLarge => "too_large",
            Self::Prover => "prover",
            Self::NoSolver => "no_solver",
            Self::SolverTimeout => "solver_timeout",
            Self::SolverFailed => "solver_failed",
            Self::SolverUnknown => "solver_unknown",
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// A request that one bundle permits and the other does not, as both answered it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counterexample {
    /// Type and id of the principal.
    pub principal: (String, String),
    /// The action.
    pub action: String,
    /// Type and id of the resource.
    pub resource: (String, String),
    /// Attributes of the resource, which the node derives from its id.
    pub attributes: Value,
    /// Parameters of the action.
    pub params: Value,
    /// The remaining context.
    pub context: Value,
    /// What the entities are supposed to be; `None`: what the bundles say of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entities: Option<Value>,
    /// What the older bundle says.
    pub before: Verdict,
    /// The policies of the newer one that permit it.
    pub permitted_by: Vec<String>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}::{:?} may do {} on {}::{:?}",
            self.principal.0, self.principal.1, self.action, self.resource.0, self.resource.1
        )?;
        let is_said = |value: &Value| value.as_object().is_some_and(|map| !map.is_empty());
        for (what, value) in [
            ("which has", &self.attributes),
            ("params", &self.params),
            ("context", &self.context),
        ] {
            if is_said(value) {
                write!(f, ", {what} {value}")?;
            }
        }
        if let Some(entities) = &self.entities {
            write!(f, ", supposing entities {entities}")?;
        }
        write!(f, ", by {}", self.permitted_by.join(", "))
    }
}

impl Widening {
    /// Nothing was proved.
    #[must_use]
    pub fn unproven(reason: WhyUnproven, detail: impl Into<String>) -> Self {
        Self::Unproven {
            reason,
            detail: detail.into(),
        }
    }

    /// The verdict in one word: `not_wider`, `wider`, or `unproven(…)` with the reason.
    #[must_use]
    pub fn word(&self) -> String {
        match self {
            Self::NotWider => "not_wider".to_owned(),
            Self::Wider { .. } => "wider".to_owned(),
            Self::Unproven { reason, .. } => format!("unproven({})", reason.as_str()),
        }
    }
}

impl fmt::Display for Widening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWider => f.write_str("proved: it permits nothing that is not permitted now"),
            Self::Wider {
                looser,
                counterexample,
            } => {
                f.write_str("it permits more")?;
                if !looser.is_empty() {
                    write!(f, ": {}", looser.join("; "))?;
                }
                match counterexample {
                    Some(found) => write!(f, ": {found}"),
                    None => Ok(()),
                }
            }
            Self::Unproven { reason, detail } => {
                write!(f, "not proved ({}): {detail}", reason.as_str())
            }
        }
    }
}
