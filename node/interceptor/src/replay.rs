//! Recorded actions, asked once more: what would another policy say to what was asked already?

use serde_json::{Map, Value, json};
use tidelock_policy::PolicyRequest;

use crate::{action::Action, caller::Caller};

/// Why a record cannot be asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NotReplayable {
    /// It is no decision, but an explanation, a summary or an event.
    NoDecision,
    /// The request was not understood when it came.
    Invalid,
    /// A secret was cut out of it, so that what was judged is not known.
    Redacted,
    /// It is of the short form, or a part was too long for the record.
    Incomplete,
    /// What stands in it does not have the hash that stands in it.
    Changed,
}

impl NotReplayable {
    /// The stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoDecision => "no_decision",
            Self::Invalid => "invalid",
            Self::Redacted => "redacted",
            Self::Incomplete => "incomplete",
            Self::Changed => "changed",
        }
    }
}

/// The request of a recorded decision as an engine is asked it. What it makes of the record must have
/// the hash that was recorded.
///
/// # Errors
/// [`NotReplayable`].
pub fn recorded_request(record: &Value) -> Result<PolicyRequest, NotReplayable> {
    let text = |key: &str| record.get(key).and_then(Value::as_str);
    if text("type") != Some("decision") {
        return Err(NotReplayable::NoDecision);
    }
    if record.get("invalid").is_some() {
        return Err(NotReplayable::Invalid);
    }
    if record.get("redacted").is_some() {
        return Err(NotReplayable::Redacted);
    }
    if record.get("form").is_some() || record.get("omitted").is_some() {
        return Err(NotReplayable::Incomplete);
    }
    let mut request = Map::new();
    for key in ["principal", "action", "resource", "params", "context"] {
        if let Some(value) = record.get(key) {
            request.insert(key.to_owned(), value.clone());
        }
    }
    let caller = Caller {
        principal_type: "Replay".to_owned(),
        principal_id: "replay".to_owned(),
        may_act_as: true,
        door: "replay",
        stated_by: None,
    };
    let bytes = json!(request).to_string();
    let action = Action::parse(bytes.as_bytes(), &caller).map_err(|_| NotReplayable::Changed)?;
    if text("action_hash") != Some(&action.hash().to_string()) {
        return Err(NotReplayable::Changed);
    }
    Ok(PolicyRequest::from(&action))
}
