//! Stable reason codes of decisions.

use std::fmt;

use serde::{Serialize, Serializer};

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// The action may be executed.
    Allow,
    /// The action must not be executed.
    Deny,
    /// The action waits for a human.
    Hold,
}

impl Decision {
    /// The stable text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Hold => "hold",
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why it was decided so. The codes are stable; new ones may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// A policy permits the action, none forbids it and none errored.
    PolicyAllow,
    /// A policy forbids the action.
    PolicyDeny,
    /// No policy permits the action.
    NoMatch,
    /// There is no bundle, or none that verifies.
    NoPolicy,
    /// A policy errored, the request does not fit the schema, or the engine panicked.
    EvaluationError,
    /// The engine took longer than its budget.
    Deadline,
    /// Every engine thread is at an evaluation that was given up.
    EngineExhausted,
    /// The request is malformed, oversized, ambiguous or not canonical.
    InvalidRequest,
    /// The principal's quota is spent.
    RateLimitExceeded,
    /// The decision's record could not be made durable in time.
    AuditUnavailable,
    /// The disk ceiling leaves no room for the decision's record.
    AuditCapacity,
    /// The posture is `restricted`, and the bundle denies this class of action in it.
    PostureRestricted,
    /// The posture is `closed`.
    PostureClosed,
    /// The breaker of an upstream is open.
    UpstreamUnavailable,
    /// The policies permit, and a decision point has to agree that was not asked: explanations and
    /// searches ask none.
    ConsultNeeded,
    /// The policies permit, and the decision point says no.
    ConsultDenied,
    /// The policies permit; the decision point says that it waits, or is away and the bundle says so.
    ConsultHeld,
    /// The policies permit, and the decision point cannot be reached.
    ConsultUnreachable,
    /// The policies permit, and the decision point did not answer in time.
    ConsultTimeout,
    /// The policies permit, and what the decision point answered is no answer.
    ConsultInvalid,
    /// The policies permit, and as many questions are on their way as there may be.
    ConsultBusy,
}

impl Reason {
    /// Every reason, in the order of the documentation.
    pub const ALL: [Self; 21] = [
        Self::PolicyAllow,
        Self::PolicyDeny,
        Self::NoMatch,
        Self::NoPolicy,
        Self::EvaluationError,
        Self::Deadline,
        Self::EngineExhausted,
        Self::InvalidRequest,
        Self::RateLimitExceeded,
        Self::AuditUnavailable,
        Self::AuditCapacity,
        Self::PostureRestricted,
        Self::PostureClosed,
        Self::UpstreamUnavailable,
        Self::ConsultNeeded,
        Self::ConsultDenied,
        Self::ConsultHeld,
        Self::ConsultUnreachable,
        Self::ConsultTimeout,
        Self::ConsultInvalid,
        Self::ConsultBusy,
    ];

    /// The stable code.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PolicyAllow => "POLICY_ALLOW",
            Self::PolicyDeny => "POLICY_DENY",
            Self::NoMatch => "NO_MATCH",
            Self::NoPolicy => "NO_POLICY",
            Self::EvaluationError => "EVALUATION_ERROR",
            Self::Deadline => "DEADLINE",
            Self::EngineExhausted => "ENGINE_EXHAUSTED",
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::RateLimitExceeded => "RATE_LIMIT_EXCEEDED",
            Self::AuditUnavailable => "AUDIT_UNAVAILABLE",
            Self::AuditCapacity => "AUDIT_CAPACITY",
            Self::PostureRestricted => "POSTURE_RESTRICTED",
            Self::PostureClosed => "POSTURE_CLOSED",
            Self::UpstreamUnavailable => "UPSTREAM_UNAVAILABLE",
            Self::ConsultNeeded => "CONSULT_NEEDED",
            Self::ConsultDenied => "CONSULT_DENIED",
            Self::ConsultHeld => "CONSULT_HELD",
            Self::ConsultUnreachable => "CONSULT_UNREACHABLE",
            Self::ConsultTimeout => "CONSULT_TIMEOUT",
            Self::ConsultInvalid => "CONSULT_INVALID",
            Self::ConsultBusy => "CONSULT_BUSY",
        }
    }

    /// The decision that this reason stands for. Exactly one reason allows.
    #[must_use]
    pub fn decision(self) -> Decision {
        match self {
            Self::PolicyAllow => Decision::Allow,
            Self::ConsultNeeded | Self::ConsultHeld => Decision::Hold,
            _ => Decision::Deny,
        }
    }

    /// Whether it says something of the action. What does not says that this node could not judge it now, for
    /// want of time, disk or a decision point: whoever asks a lot can bring that about.
    #[must_use]
    pub fn is_judged(self) -> bool {
        !matches!(
            self,
            Self::Deadline
                | Self::EngineExhausted
                | Self::RateLimitExceeded
                | Self::AuditUnavailable
                | Self::AuditCapacity
                | Self::UpstreamUnavailable
                | Self::ConsultUnreachable
                | Self::ConsultTimeout
                | Self::ConsultInvalid
                | Self::ConsultBusy
        )
    }

    /// One sentence for a human.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::PolicyAllow => "a policy permits this action",
            Self::PolicyDeny => "a policy forbids this action",
            Self::NoMatch => "no policy permits this action",
            Self::NoPolicy => "no verified policy bundle is active, give the node one",
            Self::EvaluationError => "the policies could not judge this action",
            Self::Deadline => "the policies took longer than their budget",
            Self::EngineExhausted => {
                "no engine came free in time: those that this caller may have are at evaluations that do not end"
            }
            Self::InvalidRequest => "the request is not valid",
            Self::RateLimitExceeded => "the quota is spent, retry later",
            Self::AuditUnavailable => "the decision could not be recorded",
            Self::AuditCapacity => {
                "the audit log is at its ceiling, let peers take its segments or raise the ceiling"
            }
            Self::PostureRestricted => "this class of action is denied in posture restricted",
            Self::PostureClosed => "the node is closed, its policy is too old or its clock suspect",
            Self::UpstreamUnavailable => "the upstream fails repeatedly, retry later",
            Self::ConsultNeeded => {
                "the policies permit this action, and a decision point has to agree when it is decided"
            }
            Self::ConsultDenied => "the decision point that this class is referred to says no",
            Self::ConsultHeld => {
                "the action waits for the decision point that its class is referred to"
            }
            Self::ConsultUnreachable => {
                "the decision point that this class is referred to cannot be reached, retry later"
            }
            Self::ConsultTimeout => {
                "the decision point that this class is referred to did not answer in time, retry later"
            }
            Self::ConsultInvalid => {
                "what the decision point that this class is referred to answered is not valid"
            }
            Self::ConsultBusy => {
                "the decision point that this class is referred to has too much to do, retry later"
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_distinct_and_only_one_allows() {
        let codes: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
        let allows: Vec<_> = Reason::ALL
            .into_iter()
            .filter(|r| r.decision() == Decision::Allow)
            .collect();
        assert_eq!(allows, [Reason::PolicyAllow]);
        assert_eq!(
            serde_json::to_string(&Reason::NoMatch).unwrap(),
            "\"NO_MATCH\""
        );
    }

    #[test]
    fn every_code_is_documented() {
        let book = include_str!("../../../docs/src/records.md");
        for reason in Reason::ALL {
            assert!(
                book.contains(&format!("`{reason}`")),
                "{reason} is missing in records.md"
            );
        }
    }
}
