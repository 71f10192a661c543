//! Records: canonical JSON (RFC 8785) of what was decided, without secrets.
//!
//! What is hashed is what is stored: redaction comes first, and the action's hash in the record is
//! that of the redacted action. Where nothing was redacted it equals [`Action::hash`]. The layout
//! is in `docs/src/records.md`.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tidelock_policy::{ActivePolicy, Posture, Source};
use tidelock_segments::Sha256Hash;

use crate::{
    action::{Action, InvalidCode, InvalidRequest, canonical_action, canonical_bytes},
    answer::{BundleInfo, Mode, RecordPosition},
    caller::{Caller, Principal},
    consult::ConsultNote,
    limits::{
        MAX_EVENT_BYTES, MAX_INLINE_BYTES, MAX_LISTED, MAX_MESSAGE_BYTES, MAX_POLICY_ID_BYTES,
        MAX_PRINCIPAL_ID_BYTES, MAX_RECORD_BYTES, MAX_REQUEST_ID_BYTES, MAX_RESOURCE_ID_BYTES,
        MAX_TYPE_BYTES,
    },
    reason::Reason,
    redact,
    summary::Counted,
};

/// Version of the record layout.
pub(crate) const VERSION: u64 = 1;

/// What one request came to, before it is recorded.
pub(crate) struct Judgement {
    pub(crate) findings: Findings,
    pub(crate) bundle: Option<(BundleInfo, Source)>,
    pub(crate) policy: Option<Arc<ActivePolicy>>,
    pub(crate) request: Request,
}

/// The decision and its grounds.
#[derive(Debug)]
pub(crate) struct Findings {
    pub(crate) reason: Reason,
    pub(crate) posture: Posture,
    pub(crate) policies: Vec<String>,
    pub(crate) errors: Vec<String>,
    pub(crate) retry_after_ms: Option<u64>,
    pub(crate) form: Form,
    /// What a decision point had to do with it.
    pub(crate) consult: Option<Box<ConsultNote>>,
}

/// How much of a decision its record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// All of it.
    Full,
    /// Hashes in place of what a caller can make long, at most [`MAX_SHORT_RECORD_BYTES`]: for a
    /// class that the bundle lets go on in posture `restricted` (ruling 19).
    Short,
}

impl Findings {
    /// A decision that no policy had a part in.
    pub(crate) fn new(reason: Reason, posture: Posture) -> Self {
        Self {
            reason,
            posture,
            policies: Vec::new(),
            errors: Vec::new(),
            retry_after_ms: None,
            form: Form::Full,
            consult: None,
        }
    }
}

/// A request as far as it was understood.
#[derive(Debug)]
pub(crate) enum Request {
    Action(Box<Action>),
    Invalid {
        error: InvalidRequest,
        body_bytes: usize,
    },
}

/// A record, and what the answer shares with it.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) bytes: Vec<u8>,
    pub(crate) policies: Vec<String>,
    pub(crate) errors: Vec<String>,
    pub(crate) action_hash: Option<Sha256Hash>,
    pub(crate) request_id: Option<String>,
    pub(crate) redactions: u64,
}

/// The fields that every record has.
fn head(kind: &str, node: &str, unix_ms: u64) -> Map<String, Value> {
    let mut record = Map::new();
    record.insert("v".to_owned(), VERSION.into());
    record.insert("type".to_owned(), kind.into());
    record.insert("at".to_owned(), unix_ms.into());
    record.insert("node".to_owned(), node.into());
    record
}

fn principal(principal_type: &str, id: &str) -> Value {
    json!({
        "type": redact::message(principal_type, MAX_TYPE_BYTES),
        "id": redact::message(id, MAX_PRINCIPAL_ID_BYTES),
    })
}

/// Renders the record of one decision.
pub(crate) fn decision(
    judgement: &Judgement,
    caller: &Caller,
    mode: Mode,
    node: &str,
    unix_ms: u64,
) -> Result<Rendered, InvalidRequest> {
    let findings = &judgement.findings;
    let kind = match mode {
        Mode::Decide => "decision",
        Mode::Explain => "explain",
    };
    let mut record = head(kind, node, unix_ms);
    record.insert("caller".to_owned(), caller_of(caller));

    let listed = |texts: &[String], max: usize| -> Vec<String> {
        texts
            .iter()
            .take(MAX_LISTED)
            .map(|text| redact::message(text, max))
            .collect()
    };
    let policies = listed(&findings.policies, MAX_POLICY_ID_BYTES);
    let errors = listed(&findings.errors, MAX_MESSAGE_BYTES);
    record.insert(
        "decision".to_owned(),
        findings.reason.decision().as_str().into(),
    );
    record.insert("reason".to_owned(), findings.reason.as_str().into());
    record.insert("posture".to_owned(), findings.posture.as_str().into());
    record.insert("policies".to_owned(), policies.clone().into());
    if findings.policies.len() > MAX_LISTED {
        record.insert("policies_total".to_owned(), findings.policies.len().into());
    }
    if !errors.is_empty() {
        record.insert("errors".to_owned(), errors.clone().into());
    }
    if let Some((bundle, source)) = &judgement.bundle {
        record.insert("bundle".to_owned(), bundle_of(bundle, *source));
    }
    if let Some(note) = &findings.consult {
        record.insert("consult".to_owned(), note_of(note, findings.form)?);
    }
    let mut rendered = Rendered {
        bytes: Vec::new(),
        policies,
        errors,
        action_hash: None,
        request_id: None,
        redactions: 0,
    };
    match &judgement.request {
        Request::Action(action) => describe_action(&mut record, action, &mut rendered)?,
        Request::Invalid { error, body_bytes } => {
            record.insert(
                "invalid".to_owned(),
                json!({"code": error.code(), "message": error.message(), "body_bytes": body_bytes}),
            );
        }
    }
    rendered.bytes = match findings.form {
        Form::Full => fit(record)?,
        Form::Short => shorten(&record)?,
    };
    Ok(rendered)
}

/// What a decision point had to do with a decision, as its record has it.
fn note_of(note: &ConsultNote, form: Form) -> Result<Value, InvalidRequest> {
    match form {
        Form::Short => Ok(note.short()),
        Form::Full => serde_json::to_value(note)
            .map_err(|error| InvalidRequest::new(InvalidCode::Syntax, error.to_string())),
    }
}

/// The short form of a full record. Everything that stands in it has a bounded length; who asked for
/// what can be proved with the full action, by its hash, and not be read off.
fn shorten(full: &Map<String, Value>) -> Result<Vec<u8>, InvalidRequest> {
    let mut short = Map::new();
    for key in [
        "v",
        "type",
        "at",
        "node",
        "action",
        "action_hash",
        "decision",
        "reason",
        "posture",
        "consult",
    ] {
        if let Some(value) = full.get(key) {
            short.insert(key.to_owned(), value.clone());
        }
    }
    short.insert("form".to_owned(), "short".into());
    if let Some(epoch) = full.get("bundle").and_then(|bundle| bundle.get("epoch")) {
        short.insert("epoch".to_owned(), epoch.clone());
    }
    if let Some(caller) = full.get("caller") {
        let hash = Sha256Hash::of(&canonical_bytes(caller)?);
        short.insert("caller_hash".to_owned(), hash.to_string().into());
    }
    canonical_bytes(&Value::Object(short))
}

fn describe_action(
    record: &mut Map<String, Value>,
    action: &Action,
    rendered: &mut Rendered,
) -> Result<(), InvalidRequest> {
    let (params, in_params) = redact(action.params());
    let (context, in_context) = redact(action.context());
    let (resource_id, in_resource) = redact::redact_text(action.resource_id());
    let (principal_id, in_principal) = redact::redact_text(action.principal().id());
    let redactions = in_params + in_context + in_resource + in_principal;
    let (action_hash, params_hash) = if redactions == 0 {
        (action.hash(), action.params_hash())
    } else {
        let shown = Principal::redacted(action.principal().kind(), &principal_id);
        let canonical = canonical_action(
            &shown,
            action.name(),
            action.resource_type(),
            &resource_id,
            &params,
            &context,
        )?;
        (
            Sha256Hash::of(&canonical),
            Sha256Hash::of(&canonical_bytes(&params)?),
        )
    };
    let mut put = |key: &str, value: Value| record.insert(key.to_owned(), value);
    put(
        "principal",
        json!({"type": action.principal().kind(), "id": principal_id}),
    );
    put("action", action.name().into());
    put(
        "resource",
        json!({"type": action.resource_type(), "id": resource_id}),
    );
    put("action_hash", action_hash.to_string().into());
    put("params_hash", params_hash.to_string().into());
    let mut omitted = Vec::new();
    for (key, value) in [("params", params), ("context", context)] {
        if value.as_object().is_some_and(Map::is_empty) {
            continue;
        }
        if canonical_bytes(&value)?.len() > MAX_INLINE_BYTES {
            omitted.push(Value::from(key));
        } else if value.is_object() {
            put(key, value);
        }
    }
    if !omitted.is_empty() {
        put("omitted", omitted.into());
    }
    if redactions > 0 {
        put("redacted", redactions.into());
    }
    if let Some(id) = action.request_id() {
        let id = redact::message(id, MAX_REQUEST_ID_BYTES);
        put("request_id", id.clone().into());
        rendered.request_id = Some(id);
    }
    rendered.action_hash = Some(action_hash);
    rendered.redactions = redactions;
    Ok(())
}

/// Canonical bytes within the limit. `limits.rs` shows that a record fits without what is cut out
/// here; redaction marks that are longer than what they replace are why it is checked again.
fn fit(mut record: Map<String, Value>) -> Result<Vec<u8>, InvalidRequest> {
    let bytes = canonical_bytes(&record)?;
    if bytes.len() <= MAX_RECORD_BYTES {
        return Ok(bytes);
    }
    for key in ["params", "context", "errors"] {
        record.remove(key);
    }
    if let Some(Value::Object(resource)) = record.get_mut("resource")
        && let Some(Value::String(id)) = resource.get_mut("id")
    {
        *id = redact::message(id, MAX_RESOURCE_ID_BYTES);
    }
    record.insert("omitted".to_owned(), json!(["params", "context", "errors"]));
    canonical_bytes(&record)
}

/// A record became durable after its caller had been told that it did not (ruling 21).
pub(crate) fn not_released(
    node: &str,
    unix_ms: u64,
    decision: RecordPosition,
) -> Map<String, Value> {
    let mut record = head("outcome", node, unix_ms);
    record.insert("outcome".to_owned(), "not_released".into());
    record.insert("decision_index".to_owned(), decision.index.into());
    record.insert("decision_leaf".to_owned(), decision.leaf.to_string().into());
    record.insert(
        "reason".to_owned(),
        Reason::AuditUnavailable.as_str().into(),
    );
    record
}

/// What became of an allowed action, as its caller says.
pub(crate) fn reported(
    head_of: (&str, u64),
    caller: &Caller,
    decision: RecordPosition,
    outcome: &str,
    detail: &Value,
) -> Map<String, Value> {
    let mut record = head("outcome", head_of.0, head_of.1);
    record.insert("outcome".to_owned(), outcome.into());
    record.insert("decision_index".to_owned(), decision.index.into());
    record.insert("decision_leaf".to_owned(), decision.leaf.to_string().into());
    record.insert("caller".to_owned(), caller_of(caller));
    let (detail, redactions) = redact(detail);
    if detail.as_object().is_some_and(|fields| !fields.is_empty()) {
        record.insert("detail".to_owned(), detail);
    }
    if redactions > 0 {
        record.insert("redacted".to_owned(), redactions.into());
    }
    record
}

/// What a search is recorded as: bounded by leaving out what is long, as a decision's record is.
pub(crate) fn search(
    head_of: (&str, u64),
    caller: &Caller,
    described: &Value,
    request_id: Option<&str>,
    bundle: Option<&(BundleInfo, Source)>,
    posture: Posture,
) -> Result<Vec<u8>, InvalidRequest> {
    let mut record = head("search", head_of.0, head_of.1);
    record.insert("caller".to_owned(), caller_of(caller));
    record.insert("posture".to_owned(), posture.as_str().into());
    if let Some(id) = request_id {
        let id = redact::message(id, MAX_REQUEST_ID_BYTES);
        record.insert("request_id".to_owned(), id.into());
    }
    if let Some((bundle, source)) = bundle {
        record.insert("bundle".to_owned(), bundle_of(bundle, *source));
    }
    let (described, redactions) = redact(described);
    let mut omitted = Vec::new();
    for (key, value) in described.as_object().into_iter().flatten() {
        let is_empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
        if is_empty {
            continue;
        }
        if canonical_bytes(value)?.len() > MAX_INLINE_BYTES {
            omitted.push(Value::from(key.as_str()));
        } else {
            record.insert(key.clone(), value.clone());
        }
    }
    if !omitted.is_empty() {
        record.insert("omitted".to_owned(), omitted.into());
    }
    if redactions > 0 {
        record.insert("redacted".to_owned(), redactions.into());
    }
    canonical_bytes(&record)
}

pub(crate) fn caller_of(caller: &Caller) -> Value {
    let at_door = |kind: &str, id: &str, door: &'static str| {
        let mut from = principal(kind, id);
        if let Value::Object(fields) = &mut from {
            fields.insert("door".to_owned(), door.into());
        }
        from
    };
    let mut from = at_door(&caller.principal_type, &caller.principal_id, caller.door);
    if let (Some(by), Value::Object(fields)) = (&caller.stated_by, &mut from) {
        let by = at_door(&by.principal_type, &by.principal_id, by.door);
        fields.insert("stated_by".to_owned(), by);
    }
    from
}

/// A caller as summaries count it: by whom it is and whose word that is, whatever the door.
pub(crate) fn counted(caller: &Caller) -> Counted {
    let shown = |kind: &str, id: &str| {
        (
            redact::message(kind, MAX_TYPE_BYTES),
            redact::message(id, MAX_PRINCIPAL_ID_BYTES),
        )
    };
    let stated_by = caller.stated_by.as_ref();
    Counted {
        who: shown(&caller.principal_type, &caller.principal_id),
        stated_by: stated_by.map(|by| shown(&by.principal_type, &by.principal_id)),
    }
}

fn bundle_of(bundle: &BundleInfo, source: Source) -> Value {
    let source = match source {
        Source::Active => "active",
        Source::LastKnownGood => "last_known_good",
    };
    json!({
        "name": bundle.name, "epoch": bundle.epoch, "hash": bundle.hash, "source": source,
    })
}

/// Words for what was refused.
pub(crate) const SEARCH: &str = "search";
/// See [`SEARCH`].
pub(crate) const REPORT: &str = "report";

/// A search or a report that was not taken.
pub(crate) struct Refused<'a> {
    pub(crate) request: &'static str,
    pub(crate) code: &'static str,
    pub(crate) message: &'a str,
    /// The index that a report named, be it of a decision or not.
    pub(crate) named_index: Option<u64>,
    pub(crate) request_id: Option<&'a str>,
}

/// Why something that an authenticated caller asked for was refused before anything was judged.
pub(crate) fn refused(
    head_of: (&str, u64),
    caller: &Caller,
    refused: &Refused<'_>,
) -> Result<Vec<u8>, InvalidRequest> {
    let mut record = head("refused", head_of.0, head_of.1);
    record.insert("request".to_owned(), refused.request.into());
    record.insert("reason".to_owned(), refused.code.into());
    let message = redact::message(refused.message, MAX_MESSAGE_BYTES);
    record.insert("message".to_owned(), message.into());
    record.insert("caller".to_owned(), caller_of(caller));
    if let Some(index) = refused.named_index {
        record.insert("named_index".to_owned(), index.into());
    }
    if let Some(id) = refused.request_id {
        let id = redact::message(id, MAX_REQUEST_ID_BYTES);
        record.insert("request_id".to_owned(), id.into());
    }
    canonical_bytes(&record)
}

/// A window of summarised denials.
pub(crate) fn summary(node: &str, unix_ms: u64, fields: Map<String, Value>) -> Map<String, Value> {
    let mut record = head("denials", node, unix_ms);
    record.extend(fields);
    record
}

/// Something that happened to the node.
pub(crate) fn event(node: &str, unix_ms: u64, kind: &str, detail: &Value) -> Map<String, Value> {
    let mut record = head(kind, node, unix_ms);
    let (detail, _) = redact(detail);
    let bytes = serde_json_canonicalizer::to_vec(&detail).map_or(usize::MAX, |bytes| bytes.len());
    let detail = if bytes <= MAX_EVENT_BYTES {
        detail
    } else {
        json!({"omitted_bytes": bytes})
    };
    record.insert("detail".to_owned(), detail);
    record
}
