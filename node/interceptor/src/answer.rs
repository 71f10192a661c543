//! What a caller is told.

use std::fmt;

use serde::Serialize;
use tidelock_policy::{PolicyNote, Posture, Source};
use tidelock_segments::{Appended, Sha256Hash};

use crate::{
    consult::Consulted,
    permit::Permit,
    reason::{Decision, Reason},
};

/// Whether a permit is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Decide; an allow carries a permit.
    Decide,
    /// Tell what would be decided; never a permit, recorded as `explain`.
    Explain,
}

/// Which bundle decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BundleInfo {
    /// Its name.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its content id, `sha256:` and 64 hex digits.
    pub hash: String,
}

/// Where a record stands in this node's audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RecordPosition {
    /// Its index.
    pub index: u64,
    /// Its leaf hash.
    pub leaf: Sha256Hash,
}

impl From<Appended> for RecordPosition {
    fn from(appended: Appended) -> Self {
        Self {
            index: appended.index,
            leaf: appended.leaf,
        }
    }
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// What was decided.
    pub decision: Decision,
    /// The stable reason code.
    pub reason: Reason,
    /// One sentence for a human.
    pub message: String,
    /// Ids of the policies that determined the decision.
    pub policies: Vec<String>,
    /// What went wrong in the policies; only in answers to `explain`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
    /// The bundle that decided; none when there is none.
    pub bundle: Option<BundleInfo>,
    /// The posture for this action.
    pub posture: Posture,
    /// Where the decision is recorded; none when it is summarised or could not be recorded.
    pub record: Option<RecordPosition>,
    /// The summary window that a summarised denial is counted in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<String>,
    /// SHA-256 of the recorded action; none when the request was not understood.
    pub action_hash: Option<Sha256Hash>,
    /// The caller's own id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// When to try again, where that helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// What the decision point said that the action's class is referred to, or what stood in for its word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consult: Option<Box<Consulted>>,
    /// Why it is so and what would change it; only in answers to `explain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Box<Explanation>>,
}

/// Why an answer is what it is. Made for `explain` only, and of no weight: the answer was found
/// without it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The permits that came nearest, and what of them does not hold, where no policy permits.
    pub nearest: Vec<PolicyNote>,
    /// What would have to change for the action to be allowed.
    pub to_allow: Vec<String>,
    /// Where the policy comes from.
    pub provenance: Option<Provenance>,
}

/// Where a policy comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// Version for people.
    pub version: String,
    /// When the authority made it, RFC 3339.
    pub created_at: String,
    /// Ids of the trusted keys that signed it.
    pub signers: Vec<String>,
    /// Whether it is the active bundle or the last known good one.
    pub source: Source,
}

impl Answer {
    /// Turns the answer into a deny for want of a record. There is no way back.
    pub(crate) fn unrecorded(mut self, reason: Reason) -> Self {
        self.decision = Decision::Deny;
        self.reason = reason;
        self.message = reason.message().to_owned();
        self.record = None;
        self
    }
}

/// An answer, and the permit of an allow whose record is durable.
#[derive(Debug)]
pub struct Outcome {
    /// What the caller is told.
    pub answer: Answer,
    /// What an executor demands; only an allow in [`Mode::Decide`] has one.
    pub permit: Option<Permit>,
}

/// Takes the outcome of one request, once, on whatever thread it became final.
pub type Done = Box<dyn FnOnce(Outcome) + Send>;

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Decide => "decide",
            Self::Explain => "explain",
        })
    }
}
