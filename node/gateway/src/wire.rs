//! The shapes that cross the wire, for the OpenAPI document and for the gateway's own answers.
//!
//! A decide request is *not* read into these types: the interceptor parses its bytes itself, once
//! and strictly (INV-15), and its answer is serialised as it is. [`DecideRequest`] and
//! [`DecisionAnswer`] describe both to the document's readers; tests hold them to the real ones.

use hyper::header::HeaderName;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// A request's id, which comes back with its answer.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// One governed action, as a caller asks for it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecideRequest {
    /// The caller's own name for this request, echoed as `request_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 128)]
    pub id: Option<String>,
    /// Who acts. Without it the authenticated caller; another one needs the scope `act_as`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<EntityRef>,
    /// What is to be done.
    #[schema(example = "ticket.read")]
    pub action: String,
    /// To what.
    pub resource: EntityRef,
    /// The action's parameters; any JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub params: Option<Value>,
    /// What the policies may want to know of the circumstances; any JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub context: Option<Value>,
}

/// A principal or a resource by type and id.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntityRef {
    /// The type.
    #[serde(rename = "type")]
    #[schema(example = "Ticket")]
    pub kind: String,
    /// The id.
    #[schema(example = "4711")]
    pub id: String,
}

/// What was decided.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecisionWord {
    /// The action may take effect: its record is durable.
    Allow,
    /// It must not.
    Deny,
    /// It waits for a human.
    Hold,
}

/// A decision and where to find its record.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecisionAnswer {
    /// What was decided.
    pub decision: DecisionWord,
    /// Why: a stable code, `POLICY_ALLOW` or `NO_MATCH` say.
    #[schema(example = "POLICY_ALLOW")]
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// The ids of the policies that matched.
    pub policies: Vec<String>,
    /// What went wrong in the policies; only in answers to explain.
    #[serde(default)]
    pub errors: Vec<String>,
    /// The bundle that decided; null when none is active or it was not asked.
    pub bundle: Option<BundleRef>,
    /// The node's posture for this class of action.
    #[schema(example = "normal")]
    pub posture: String,
    /// Where the record of this decision stands; null when it has none of its own.
    pub record: Option<RecordRef>,
    /// The summary window that a summarised denial is counted in, instead of a record of its own.
    #[serde(default)]
    pub window: Option<String>,
    /// `sha256:` of the canonical action; null when the request was not one.
    pub action_hash: Option<String>,
    /// The caller's own id of the request, if it gave one.
    #[serde(default)]
    pub request_id: Option<String>,
    /// How long to wait before trying again, where that helps.
    #[serde(default)]
    pub retry_after_ms: Option<u64>,
    /// What the decision point said that the action's class is referred to: `upstream`, `outcome`,
    /// `fallback` (what stood in for its word) and `why`; absent where none was asked.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub consult: Option<Value>,
    /// Only in answers to explain: `nearest` permits with what of them is `unmet`, `to_allow`, and
    /// the bundle's `provenance`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub explanation: Option<Value>,
}

/// The bundle that decided.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BundleRef {
    /// Its name.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
    /// `sha256:` of its content.
    pub hash: String,
}

/// A position in the node's audit log.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordRef {
    /// Index of the record, from 0.
    pub index: u64,
    /// `sha256:` of its Merkle leaf.
    pub leaf: String,
}

/// Why a request was not judged at all. Like everything but an `allow`, it permits nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A stable code.
    #[schema(example = "unauthenticated")]
    pub error: String,
    /// What went wrong, and the way out.
    pub message: String,
    /// How long to wait before trying again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

/// Either a decision or a refusal to make one; only the former has a `decision`.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum AnswerOrProblem {
    /// A decision.
    Answer(Box<DecisionAnswer>),
    /// A refusal to make one.
    Problem(Problem),
}

/// Whether the node would decide now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Readiness {
    /// Whether it would.
    pub ready: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// An access evaluation request of AuthZEN. Keys that are not listed are ignored.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuthzenRequest {
    /// Who acts: the caller itself, or anybody for callers with the scope `act_as`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<AuthzenEntity>,
    /// What is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<AuthzenAction>,
    /// To what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource: Option<AuthzenEntity>,
    /// The circumstances; any JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub context: Option<Value>,
}

/// A subject or resource of AuthZEN.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuthzenEntity {
    /// The type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    #[schema(example = "user")]
    pub kind: Option<String>,
    /// The id; not of what a search looks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "alice@example.com")]
    pub id: Option<String>,
    /// What the caller says of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub properties: Option<Value>,
}

/// An action of AuthZEN.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuthzenAction {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "can_read")]
    pub name: Option<String>,
    /// Its parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub properties: Option<Value>,
}

/// A decision of AuthZEN.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuthzenEvaluation {
    /// Whether the action may take effect. Only an allow whose record is durable is `true`.
    pub decision: bool,
    /// `reason`, `message`, `policies`, `bundle`, `posture`, `record` and `obligations`.
    #[schema(value_type = Object)]
    pub context: Value,
}

/// Decisions of AuthZEN.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuthzenEvaluations {
    /// In the order of the request.
    pub evaluations: Vec<AuthzenEvaluation>,
}

/// One page of a search of AuthZEN.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub struct AuthzenSearch {
    /// `{type, id}` of subjects and resources, `{name}` of actions.
    #[schema(value_type = Vec<Object>)]
    pub results: Vec<Value>,
    /// `next_token`, empty after the last page, and `count`.
    #[schema(value_type = Object)]
    pub page: Value,
    /// `posture`, `bundle`, `record`, `judged`.
    #[schema(value_type = Object)]
    pub context: Value,
}

/// Where the endpoints of AuthZEN are.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuthzenConfiguration {
    /// The base URL of this decision point.
    pub policy_decision_point: String,
    /// Of one evaluation.
    pub access_evaluation_endpoint: String,
    /// Of several.
    pub access_evaluations_endpoint: String,
    /// Of subject searches.
    pub search_subject_endpoint: String,
    /// Of resource searches.
    pub search_resource_endpoint: String,
    /// Of action searches.
    pub search_action_endpoint: String,
}

impl AuthzenConfiguration {
    /// The endpoints below this URL, which has no slash at its end.
    #[must_use]
    pub fn of(base: &str) -> Self {
        let below = |path: &str| format!("{base}/access/v1/{path}");
        Self {
            policy_decision_point: base.to_owned(),
            access_evaluation_endpoint: below("evaluation"),
            access_evaluations_endpoint: below("evaluations"),
            search_subject_endpoint: below("search/subject"),
            search_resource_endpoint: below("search/resource"),
            search_action_endpoint: below("search/action"),
        }
    }
}

/// What became of an allowed action.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportRequest {
    /// The decision, as its answer named it.
    pub record: RecordRef,
    /// What happened.
    pub outcome: OutcomeWord,
    /// What else is to be recorded of it; any JSON object up to 8 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub detail: Option<Value>,
}

/// What happened.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeWord {
    /// The action took effect.
    Executed,
    /// It was tried and failed; it may have taken effect in part.
    Failed,
    /// It was not tried.
    NotExecuted,
}

/// A report that was recorded.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportAnswer {
    /// What was reported.
    pub outcome: OutcomeWord,
    /// The decision.
    pub decision: RecordRef,
    /// Where the outcome is recorded.
    pub record: RecordRef,
}
