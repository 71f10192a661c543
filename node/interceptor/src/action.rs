//! The one parsed value of a request (INV-15).

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use tidelock_policy::PolicyRequest;
use tidelock_segments::Sha256Hash;

use crate::{
    caller::{Caller, Principal},
    json,
    limits::{
        MAX_ACTION_NAME_BYTES, MAX_MESSAGE_BYTES, MAX_PRINCIPAL_ID_BYTES, MAX_REQUEST_ID_BYTES,
        MAX_TYPE_BYTES,
    },
    normalise::{self, ResourceError},
    redact,
};

/// Which rule a request broke. The texts are stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidCode {
    /// More bytes than are read.
    TooLarge,
    /// Bytes that are no text.
    NotUtf8,
    /// Text that is no JSON.
    Syntax,
    /// Something follows the value.
    TrailingBytes,
    /// A key twice in one object.
    DuplicateKey,
    /// Two keys that differ in case or Unicode form only, or a known key in another case.
    AmbiguousKey,
    /// A key that requests do not have.
    UnknownField,
    /// A key that every request has.
    MissingField,
    /// A value of another type than its key asks for.
    WrongType,
    /// Values nested too deep.
    TooDeep,
    /// A number that not every reader keeps.
    NumberRange,
    /// A control character.
    ControlCharacter,
    /// A principal that the caller may not speak for.
    PrincipalMismatch,
    /// A name, type or id that is empty, too long or made of other characters.
    Name,
    /// A resource that has no one spelling.
    Resource,
}

impl InvalidCode {
    /// Every code, in the order of the documentation.
    pub const ALL: [Self; 15] = [
        Self::TooLarge,
        Self::NotUtf8,
        Self::Syntax,
        Self::TrailingBytes,
        Self::DuplicateKey,
        Self::AmbiguousKey,
        Self::UnknownField,
        Self::MissingField,
        Self::WrongType,
        Self::TooDeep,
        Self::NumberRange,
        Self::ControlCharacter,
        Self::PrincipalMismatch,
        Self::Name,
        Self::Resource,
    ];

    /// The stable text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::NotUtf8 => "not_utf8",
            Self::Syntax => "syntax",
            Self::TrailingBytes => "trailing_bytes",
            Self::DuplicateKey => "duplicate_key",
            Self::AmbiguousKey => "ambiguous_key",
            Self::UnknownField => "unknown_field",
            Self::MissingField => "missing_field",
            Self::WrongType => "wrong_type",
            Self::TooDeep => "too_deep",
            Self::NumberRange => "number_range",
            Self::ControlCharacter => "control_character",
            Self::PrincipalMismatch => "principal_mismatch",
            Self::Name => "name",
            Self::Resource => "resource",
        }
    }
}

impl fmt::Display for InvalidCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for InvalidCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A request that was not understood in exactly one way. Its message quotes input only after
/// redaction and within a limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct InvalidRequest {
    code: InvalidCode,
    message: String,
}

impl InvalidRequest {
    pub(crate) fn new(code: InvalidCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            code,
            message: redact::message(&message, MAX_MESSAGE_BYTES),
        }
    }

    /// The broken rule.
    #[must_use]
    pub fn code(&self) -> InvalidCode {
        self.code
    }

    /// What to change.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<ResourceError> for InvalidRequest {
    fn from(error: ResourceError) -> Self {
        Self::new(InvalidCode::Resource, error.to_string())
    }
}

/// One governed action: parsed once, strictly, normalised and hashed. Whoever judges, records or
/// executes uses this value and never the caller's bytes.
///
/// Its only constructor is [`Action::parse`], its fields are private, and it cannot be changed:
///
/// ```compile_fail,E0451
/// # use tidelock_interceptor::Action;
/// fn forge(action: Action) -> Action {
///     Action { name: "fs.read".to_owned(), ..action }
/// }
/// ```
///
/// The same function without the forged field compiles:
///
/// ```
/// # use tidelock_interceptor::Action;
/// fn keep(action: Action) -> Action {
///     action
/// }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    principal: Principal,
    name: String,
    resource_type: String,
    resource_id: String,
    resource_attributes: Map<String, Value>,
    params: Value,
    context: Value,
    request_id: Option<String>,
    canonical: Vec<u8>,
    hash: Sha256Hash,
    params_hash: Sha256Hash,
}

impl Action {
    /// Parses one request of this caller.
    ///
    /// # Errors
    /// The request could be understood in more than one way, or not at all.
    pub fn parse(bytes: &[u8], caller: &Caller) -> Result<Self, InvalidRequest> {
        Self::from_parts(Parts::parse(bytes)?, caller)
    }

    /// Checks and normalises what a door read out of one request of this caller.
    pub(crate) fn from_parts(parts: Parts, caller: &Caller) -> Result<Self, InvalidRequest> {
        let Parts {
            principal,
            name,
            resource_type,
            resource_id,
            params,
            context,
            request_id,
        } = parts;
        let own = caller.principal()?;
        let principal = match principal {
            Some((kind, id)) => speaks_for(Principal::new(&kind, &id)?, &own, caller)?,
            None => own,
        };
        check_action_name(&name)?;
        check_type("resource type", &resource_type)?;
        if let Some(id) = &request_id {
            check_text("id", id, MAX_REQUEST_ID_BYTES)?;
        }
        let resource = normalise::normalise(&resource_type, &resource_id)?;

        let canonical = canonical_action(
            &principal,
            &name,
            &resource_type,
            &resource.id,
            &params,
            &context,
        )?;
        let params_hash = Sha256Hash::of(&canonical_bytes(&params)?);
        Ok(Self {
            hash: Sha256Hash::of(&canonical),
            principal,
            name,
            resource_type,
            resource_id: resource.id,
            resource_attributes: resource.attributes,
            params,
            context,
            request_id,
            canonical,
            params_hash,
        })
    }

    /// On whose behalf the action is asked for.
    #[must_use]
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The action, for instance `fs.read`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The resource's type, for instance `File`.
    #[must_use]
    pub fn resource_type(&self) -> &str {
        &self.resource_type
    }

    /// The resource in its one spelling.
    #[must_use]
    pub fn resource_id(&self) -> &str {
        &self.resource_id
    }

    /// What normalising found out about the resource.
    #[must_use]
    pub fn resource_attributes(&self) -> &Map<String, Value> {
        &self.resource_attributes
    }

    /// The parameters, always an object.
    #[must_use]
    pub fn params(&self) -> &Value {
        &self.params
    }

    /// The circumstances, always an object.
    #[must_use]
    pub fn context(&self) -> &Value {
        &self.context
    }

    /// The caller's own id of the request.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    /// RFC 8785 bytes of `{principal, action, resource, params, context}`.
    #[must_use]
    pub fn canonical(&self) -> &[u8] {
        &self.canonical
    }

    /// SHA-256 of [`Action::canonical`]. It covers secrets in the clear, so it stays in memory:
    /// records and answers carry the hash of the redacted form.
    #[must_use]
    pub fn hash(&self) -> Sha256Hash {
        self.hash
    }

    /// SHA-256 of the canonical parameters, in the clear like [`Action::hash`].
    #[must_use]
    pub fn params_hash(&self) -> Sha256Hash {
        self.params_hash
    }
}

/// Canonical bytes of an action's parts.
pub(crate) fn canonical_action(
    principal: &Principal,
    name: &str,
    resource_type: &str,
    resource_id: &str,
    params: &Value,
    context: &Value,
) -> Result<Vec<u8>, InvalidRequest> {
    #[derive(Serialize)]
    struct Canonical<'a> {
        principal: &'a Principal,
        action: &'a str,
        resource: Resource<'a>,
        params: &'a Value,
        context: &'a Value,
    }
    #[derive(Serialize)]
    struct Resource<'a> {
        #[serde(rename = "type")]
        resource_type: &'a str,
        id: &'a str,
    }
    canonical_bytes(&Canonical {
        principal,
        action: name,
        resource: Resource {
            resource_type,
            id: resource_id,
        },
        params,
        context,
    })
}

pub(crate) fn canonical_bytes(value: &impl Serialize) -> Result<Vec<u8>, InvalidRequest> {
    serde_json_canonicalizer::to_vec(value)
        .map_err(|_| InvalidRequest::new(InvalidCode::Syntax, "request has no canonical form"))
}

/// What a request asks for, as its door's form says it: read strictly, judged by nothing yet.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    /// Type and id; none is the caller's own.
    pub(crate) principal: Option<(String, String)>,
    pub(crate) name: String,
    pub(crate) resource_type: String,
    pub(crate) resource_id: String,
    pub(crate) params: Value,
    pub(crate) context: Value,
    pub(crate) request_id: Option<String>,
}

impl Parts {
    /// Reads the native form.
    fn parse(bytes: &[u8]) -> Result<Self, InvalidRequest> {
        let mut request = Fields::new("request", json::parse(bytes)?)?;
        let principal = request
            .take("principal")
            .map(|value| {
                let mut fields = Fields::new("principal", value)?;
                let named = (fields.text("type")?, fields.text("id")?);
                fields.finish(&["type", "id"])?;
                Ok::<_, InvalidRequest>(named)
            })
            .transpose()?;
        let name = request.text("action")?;
        let mut resource = Fields::new("resource", request.required("resource")?)?;
        let params = request.object("params")?;
        let context = request.object("context")?;
        let request_id = request.optional_text("id")?;
        request.finish(&["principal", "action", "resource", "params", "context", "id"])?;
        let resource_type = resource.text("type")?;
        let resource_id = resource.text("id")?;
        resource.finish(&["type", "id"])?;
        Ok(Self {
            principal,
            name,
            resource_type,
            resource_id,
            params,
            context,
            request_id,
        })
    }
}

/// The principal, if the caller may speak for it.
pub(crate) fn speaks_for(
    principal: Principal,
    own: &Principal,
    caller: &Caller,
) -> Result<Principal, InvalidRequest> {
    if principal == *own || caller.may_act_as {
        return Ok(principal);
    }
    Err(InvalidRequest::new(
        InvalidCode::PrincipalMismatch,
        "principal is not the caller's own, and the caller has no act_as scope",
    ))
}

pub(crate) fn check_type(what: &str, text: &str) -> Result<(), InvalidRequest> {
    let good = text.len() <= MAX_TYPE_BYTES
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if good {
        return Ok(());
    }
    Err(InvalidRequest::new(
        InvalidCode::Name,
        format!("{what} must be a letter, then letters, digits and _, at most {MAX_TYPE_BYTES}"),
    ))
}

pub(crate) fn check_action_name(text: &str) -> Result<(), InvalidRequest> {
    let good = text.len() <= MAX_ACTION_NAME_BYTES
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._:/-".contains(&b));
    if good {
        return Ok(());
    }
    Err(InvalidRequest::new(
        InvalidCode::Name,
        format!(
            "action must be a letter, then letters, digits and . _ : / -, at most \
             {MAX_ACTION_NAME_BYTES}"
        ),
    ))
}

pub(crate) fn check_principal_id(text: &str) -> Result<(), InvalidRequest> {
    check_text("principal id", text, MAX_PRINCIPAL_ID_BYTES)
}

fn check_text(what: &str, text: &str, max: usize) -> Result<(), InvalidRequest> {
    if text.is_empty() || text.len() > max {
        return Err(InvalidRequest::new(
            InvalidCode::Name,
            format!("{what} is {} bytes, 1 to {max} are allowed", text.len()),
        ));
    }
    normalise::plain_text(text).map_err(|_| {
        InvalidRequest::new(
            InvalidCode::Name,
            format!("{what} must be Unicode form NFC without control or invisible characters"),
        )
    })
}

/// The fields of one object, taken out one by one; what remains was not known.
pub(crate) struct Fields {
    what: &'static str,
    fields: Map<String, Value>,
}

impl Fields {
    pub(crate) fn new(what: &'static str, value: Value) -> Result<Self, InvalidRequest> {
        match value {
            Value::Object(fields) => Ok(Self { what, fields }),
            _ => Err(InvalidRequest::new(
                InvalidCode::WrongType,
                format!("{what} must be a JSON object"),
            )),
        }
    }

    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.fields.remove(key)
    }

    pub(crate) fn required(&mut self, key: &str) -> Result<Value, InvalidRequest> {
        if let Some(value) = self.take(key) {
            return Ok(value);
        }
        // `Action` for `action` is told apart from nothing at all.
        self.refuse_case_variant(key)?;
        Err(InvalidRequest::new(
            InvalidCode::MissingField,
            format!("{} has no {key:?}", self.what),
        ))
    }

    pub(crate) fn optional_text(&mut self, key: &str) -> Result<Option<String>, InvalidRequest> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(key, "a string")),
        }
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<String, InvalidRequest> {
        match self.required(key)? {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_type(key, "a string")),
        }
    }

    /// An object, empty when it is absent.
    pub(crate) fn object(&mut self, key: &str) -> Result<Value, InvalidRequest> {
        match self.take(key) {
            None => Ok(Value::Object(Map::new())),
            Some(value @ Value::Object(_)) => Ok(value),
            Some(_) => Err(self.wrong_type(key, "an object")),
        }
    }

    fn wrong_type(&self, key: &str, expected: &str) -> InvalidRequest {
        InvalidRequest::new(
            InvalidCode::WrongType,
            format!("{key:?} of {} must be {expected}", self.what),
        )
    }

    fn refuse_case_variant(&self, known: &str) -> Result<(), InvalidRequest> {
        match self.fields.keys().find(|key| json::fold(key) == known) {
            Some(key) => Err(InvalidRequest::new(
                InvalidCode::AmbiguousKey,
                format!("key {key:?} of {} must be written {known:?}", self.what),
            )),
            None => Ok(()),
        }
    }

    /// Nothing may be left; a known key in another case is told apart from an unknown one.
    pub(crate) fn finish(self, known: &[&str]) -> Result<(), InvalidRequest> {
        let fields = self.finish_ignoring(known)?;
        match fields.fields.keys().next() {
            Some(key) => Err(InvalidRequest::new(
                InvalidCode::UnknownField,
                format!("{} has the unknown key {key:?}, remove it", fields.what),
            )),
            None => Ok(()),
        }
    }

    /// What is left is ignored, but for a known key in another case: another reader may take it for
    /// the known one.
    pub(crate) fn finish_ignoring(self, known: &[&str]) -> Result<Self, InvalidRequest> {
        for key in known {
            self.refuse_case_variant(key)?;
        }
        Ok(self)
    }
}

/// What the policies are asked.
impl From<&Action> for PolicyRequest {
    fn from(action: &Action) -> Self {
        Self {
            principal_type: action.principal().kind().to_owned(),
            principal_id: action.principal().id().to_owned(),
            action: action.name().to_owned(),
            resource_type: action.resource_type().to_owned(),
            resource_id: action.resource_id().to_owned(),
            resource_attributes: action.resource_attributes().clone(),
            params: action.params().clone(),
            context: action.context().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn caller() -> Caller {
        Caller {
            principal_type: "Agent".to_owned(),
            principal_id: "coder".to_owned(),
            may_act_as: false,
            door: "test",
            stated_by: None,
        }
    }

    fn parse(value: &Value) -> Result<Action, InvalidRequest> {
        Action::parse(value.to_string().as_bytes(), &caller())
    }

    fn code(value: &Value) -> InvalidCode {
        match parse(value) {
            Ok(action) => panic!("{value} was accepted as {action:?}"),
            Err(error) => error.code(),
        }
    }

    fn good() -> Value {
        json!({
            "principal": {"type": "Agent", "id": "coder"},
            "action": "fs.read",
            "resource": {"type": "File", "id": "/srv/./x"},
            "params": {"b": 1.0, "a": [true, null]},
            "context": {"session": "s1"},
            "id": "r-1",
        })
    }

    fn with(path: &str, value: Value) -> Value {
        let mut request = good();
        match path.split_once('.') {
            Some((outer, inner)) => request[outer][inner] = value,
            None => request[path] = value,
        }
        request
    }

    fn without(path: &str) -> Value {
        let mut request = good();
        match path.split_once('.') {
            Some((outer, inner)) => request[outer].as_object_mut().unwrap().remove(inner),
            None => request.as_object_mut().unwrap().remove(path),
        };
        request
    }

    #[test]
    fn inv_15_an_action_holds_the_normalised_and_canonical_request() {
        let action = parse(&good()).unwrap();
        assert_eq!(action.name(), "fs.read");
        assert_eq!(action.principal().id(), "coder");
        assert_eq!(
            (action.resource_type(), action.resource_id()),
            ("File", "/srv/x")
        );
        assert_eq!(action.resource_attributes()["dir"], "/srv");
        assert_eq!(action.request_id(), Some("r-1"));
        let canonical = r#"{"action":"fs.read","context":{"session":"s1"},"params":{"a":[true,null],"b":1},"principal":{"id":"coder","type":"Agent"},"resource":{"id":"/srv/x","type":"File"}}"#;
        assert_eq!(std::str::from_utf8(action.canonical()).unwrap(), canonical);
        assert_eq!(action.hash(), Sha256Hash::of(canonical.as_bytes()));
        assert_eq!(
            action.params_hash(),
            Sha256Hash::of(br#"{"a":[true,null],"b":1}"#)
        );
    }

    #[test]
    fn inv_15_spelling_does_not_change_the_hash_and_meaning_does() {
        let hash = parse(&good()).unwrap().hash();
        let respelt =
            br#"{"id":"other","context":{"session":"s1"},"params":{"a":[true,null],"b":1e0},
            "resource":{"id":"/srv/a/../x/","type":"File"},"action":"fs.\u0072ead"}"#;
        assert_eq!(Action::parse(respelt, &caller()).unwrap().hash(), hash);
        for (path, value) in [
            ("action", json!("fs.write")),
            ("resource.id", json!("/srv/y")),
            ("params.b", json!(2)),
            ("params.b", json!("1")),
            ("context.session", json!("s2")),
        ] {
            assert_ne!(parse(&with(path, value)).unwrap().hash(), hash, "{path}");
        }
    }

    #[test]
    fn optional_parts_may_be_left_out() {
        let action =
            parse(&json!({"action": "x", "resource": {"type": "Thing", "id": "t"}})).unwrap();
        assert_eq!(action.params(), &json!({}));
        assert_eq!(action.context(), &json!({}));
        assert_eq!(action.request_id(), None);
        assert_eq!(*action.principal(), caller().principal().unwrap());
    }

    #[test]
    fn inv_15_malformed_requests_are_refused_with_their_rule() {
        use InvalidCode::{
            AmbiguousKey, MissingField, Name, PrincipalMismatch, Resource, UnknownField, WrongType,
        };
        let cases = [
            (json!([]), WrongType),
            (json!("x"), WrongType),
            (json!(null), WrongType),
            (without("action"), MissingField),
            (without("resource"), MissingField),
            (without("resource.type"), MissingField),
            (without("resource.id"), MissingField),
            (without("principal.id"), MissingField),
            (with("extra", json!(1)), UnknownField),
            (with("resource.path", json!("/x")), UnknownField),
            (with("principal.roles", json!([])), UnknownField),
            (with("Params", json!({})), AmbiguousKey),
            (with("Extra", json!(1)), UnknownField),
            (with("resource.Id", json!("/etc/shadow")), AmbiguousKey),
            (with("action", json!(1)), WrongType),
            (with("action", json!(null)), WrongType),
            (with("resource", json!("/x")), WrongType),
            (with("resource.id", json!(["/x"])), WrongType),
            (with("params", json!([])), WrongType),
            (with("params", json!(null)), WrongType),
            (with("context", json!("x")), WrongType),
            (with("id", json!(7)), WrongType),
            (with("action", json!("")), Name),
            (with("action", json!("fs read")), Name),
            (
                with("action", json!("a".repeat(MAX_ACTION_NAME_BYTES + 1))),
                Name,
            ),
            (with("resource.type", json!("")), Name),
            (with("resource.type", json!("A::B")), Name),
            (with("resource.type", json!("F\u{456}le")), Name),
            (with("id", json!("")), Name),
            (
                with("id", json!("x".repeat(MAX_REQUEST_ID_BYTES + 1))),
                Name,
            ),
            (with("id", json!("a\u{200b}")), Name),
            (with("principal.id", json!("")), Name),
            (with("principal.id", json!("root")), PrincipalMismatch),
            (with("principal.type", json!("User")), PrincipalMismatch),
            (with("resource.id", json!("srv/x")), Resource),
            (with("resource.type", json!("FILE")), Resource),
        ];
        for (request, expected) in cases {
            assert_eq!(code(&request), expected, "{request}");
        }
        // A known key in another case alone is named as such, not as missing.
        let text = r#"{"Action":"x","resource":{"type":"Thing","id":"t"}}"#;
        let error = Action::parse(text.as_bytes(), &caller()).unwrap_err();
        assert_eq!(error.code(), AmbiguousKey);
        assert!(error.message().contains("\"action\""), "{error}");
        assert!(parse(&good()).is_ok(), "the control");
    }

    #[test]
    fn only_a_caller_with_the_scope_acts_for_others() {
        let request = with("principal", json!({"type": "User", "id": "ada"})).to_string();
        let proxy = Caller {
            may_act_as: true,
            ..caller()
        };
        let action = Action::parse(request.as_bytes(), &proxy).unwrap();
        assert_eq!(
            (action.principal().kind(), action.principal().id()),
            ("User", "ada")
        );
        let error = Action::parse(request.as_bytes(), &caller()).unwrap_err();
        assert_eq!(error.code(), InvalidCode::PrincipalMismatch);
    }

    #[test]
    fn every_code_is_documented() {
        let book = include_str!("../../../docs/src/records.md");
        for code in InvalidCode::ALL {
            assert!(
                book.contains(&format!("`{code}`")),
                "{code} is missing in records.md"
            );
        }
    }

    #[test]
    fn messages_quote_no_secret_and_stay_short() {
        let key = format!("ghp_{}", "a1B2".repeat(9));
        let error = parse(&with(&key, json!(1))).unwrap_err();
        assert_eq!(error.code(), InvalidCode::UnknownField);
        assert!(!error.message().contains(&key), "{error}");
        let error = parse(&with(&"k".repeat(10_000), json!(1))).unwrap_err();
        assert!(
            error.message().len() <= MAX_MESSAGE_BYTES,
            "{}",
            error.message().len()
        );
    }

    proptest! {
        #[test]
        fn inv_15_parsing_the_canonical_form_again_yields_the_same_action(
            params in proptest::collection::btree_map("[a-z]{1,5}", any::<i32>(), 0..5),
            text in "\\PC{0,20}",
        ) {
            let request = json!({
                "action": "fs.write",
                "resource": {"type": "File", "id": "/srv/x"},
                "params": params,
                "context": {"note": text},
            });
            if let Ok(action) = parse(&request) {
                let again = Action::parse(action.canonical(), &caller()).unwrap();
                prop_assert_eq!(again, action);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Action::parse(&bytes, &caller());
        }
    }
}
