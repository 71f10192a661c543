//! The requests of the OpenID AuthZEN Authorization API 1.0, read into the parts of actions.
//!
//! The form is AuthZEN's, everything else is ours: the one strict reader of `json.rs`, the checks
//! and the normalising of [`Action`](crate::Action). Keys that the protocol does not know are
//! ignored here and only here, as it demands; a known key in another case is refused all the same.
//!
//! | AuthZEN | action |
//! | --- | --- |
//! | `subject.type`, `subject.id` | principal |
//! | `action.name` | action |
//! | `resource.type`, `resource.id` | resource |
//! | `action.properties` | params |
//! | `context` | context |
//! | `subject.properties`, `resource.properties` | context, as `subject_properties`, `resource_properties` |
//!
//! What a caller says of a subject or a resource never becomes an attribute of an entity: those are
//! what the bundle signs and what normalising derives (decision 0029).

use serde_json::{Map, Value};

use crate::{
    action::{Action, Fields, InvalidCode, InvalidRequest, Parts},
    caller::Caller,
    json,
    limits::{
        MAX_CONSULT_HOPS, MAX_EVALUATIONS, MAX_INHERITED_BYTES, MAX_PAGE_TOKEN_BYTES,
        MAX_SEARCH_RESULTS, MAX_TYPE_BYTES,
    },
};

/// Where policies find what the caller says of the subject.
const SUBJECT_PROPERTIES: &str = "subject_properties";
/// Where policies find what the caller says of the resource.
const RESOURCE_PROPERTIES: &str = "resource_properties";

/// One evaluation that was asked for, or why it was not understood.
#[derive(Debug, Clone)]
pub struct Evaluation {
    pub(crate) parts: Result<Parts, InvalidRequest>,
    pub(crate) body_bytes: usize,
    /// The nodes that it has come through, where it is the question of a node.
    pub(crate) via: Vec<String>,
}

/// The nodes that a question has come through, the one that asks last. It can only deny, so what is not in
/// the form that nodes give it is ignored like any key that the protocol does not know. As they were given,
/// for they are compared with a node's own; what is cut is longer than any of those.
fn came_through(request: &mut Fields) -> Vec<String> {
    let Some(Value::Object(said)) = request.take("tidelock") else {
        return Vec::new();
    };
    let via = said.get("via").and_then(Value::as_array);
    let nodes = via.into_iter().flatten().chain(said.get("node"));
    let names = nodes.filter_map(Value::as_str).take(MAX_CONSULT_HOPS);
    names
        .map(|name| name.chars().take(MAX_TYPE_BYTES).collect())
        .collect()
}

impl Evaluation {
    /// Reads an access evaluation request. What is wrong with it is kept, for it is recorded as any
    /// other request is.
    #[must_use]
    pub fn read(bytes: &[u8], request_id: Option<&str>) -> Self {
        let mut via = Vec::new();
        let parts = json::parse(bytes).and_then(|value| {
            let mut request = Fields::new("request", value)?;
            via = came_through(&mut request);
            let parts = Tuple::take(&mut request)?.parts(request_id);
            request.finish_ignoring(&["subject", "action", "resource", "context"])?;
            parts
        });
        Self {
            parts,
            body_bytes: bytes.len(),
            via,
        }
    }

    /// Why this caller cannot ask it: it was not understood, or is no action, or is somebody else's.
    #[must_use]
    pub fn refusal(&self, caller: &Caller) -> Option<InvalidRequest> {
        match &self.parts {
            Err(error) => Some(error.clone()),
            Ok(parts) => Action::from_parts(parts.clone(), caller).err(),
        }
    }

    /// The name of the action, where it was understood.
    #[must_use]
    pub fn action_name(&self) -> Option<&str> {
        self.parts.as_ref().ok().map(|parts| parts.name.as_str())
    }
}

/// Which evaluations of a batch are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Semantic {
    /// All of them.
    ExecuteAll,
    /// Up to the first one that is not permitted.
    DenyOnFirstDeny,
    /// Up to the first one that is permitted.
    PermitOnFirstPermit,
}

/// What an access evaluations request asks for.
#[derive(Debug, Clone)]
pub enum Evaluations {
    /// Without `evaluations`, or with none in it, one evaluation.
    One(Box<Evaluation>),
    /// A batch, in its order.
    Batch(Semantic, Vec<Evaluation>),
}

impl Evaluations {
    /// Reads an access evaluations request. A fault of one evaluation is that evaluation's; one of
    /// the whole request is [`Evaluations::One`] that was not understood.
    #[must_use]
    pub fn read(bytes: &[u8], request_id: Option<&str>) -> Self {
        let body_bytes = bytes.len();
        Self::read_batch(bytes, request_id).unwrap_or_else(|error| {
            Self::One(Box::new(Evaluation {
                parts: Err(error),
                body_bytes,
                via: Vec::new(),
            }))
        })
    }

    fn read_batch(bytes: &[u8], request_id: Option<&str>) -> Result<Self, InvalidRequest> {
        let body_bytes = bytes.len();
        let mut request = Fields::new("request", json::parse(bytes)?)?;
        let items = match request.take("evaluations") {
            None => Vec::new(),
            Some(Value::Array(items)) => items,
            Some(_) => return Err(wrong_type("evaluations", "an array")),
        };
        let semantic = semantic(request.take("options"))?;
        let via = came_through(&mut request);
        let defaults = Tuple::take(&mut request)?;
        request.finish_ignoring(&[
            "subject",
            "action",
            "resource",
            "context",
            "evaluations",
            "options",
        ])?;
        if items.is_empty() {
            return Ok(Self::One(Box::new(Evaluation {
                parts: defaults.parts(request_id),
                body_bytes,
                via,
            })));
        }
        if items.len() > MAX_EVALUATIONS {
            return Err(InvalidRequest::new(
                InvalidCode::TooLarge,
                format!(
                    "{} evaluations, at most {MAX_EVALUATIONS} are made in one request",
                    items.len()
                ),
            ));
        }
        // Each evaluation has its own copy of what it inherits.
        let inherited = defaults.bytes().saturating_mul(items.len());
        if inherited > MAX_INHERITED_BYTES {
            return Err(InvalidRequest::new(
                InvalidCode::TooLarge,
                format!(
                    "{} evaluations would inherit {inherited} bytes, at most {MAX_INHERITED_BYTES}: make \
                     smaller batches",
                    items.len()
                ),
            ));
        }
        let evaluations = items
            .into_iter()
            .map(|item| Evaluation {
                parts: Fields::new("evaluation", item).and_then(|mut item| {
                    let tuple = Tuple::take(&mut item)?.over(&defaults);
                    item.finish_ignoring(&["subject", "action", "resource", "context"])?;
                    tuple.parts(request_id)
                }),
                body_bytes,
                via: via.clone(),
            })
            .collect();
        Ok(Self::Batch(semantic, evaluations))
    }
}

fn semantic(options: Option<Value>) -> Result<Semantic, InvalidRequest> {
    let Some(options) = options else {
        return Ok(Semantic::ExecuteAll);
    };
    let mut options = Fields::new("options", options)?;
    let named = options.optional_text("evaluations_semantic")?;
    options.finish_ignoring(&["evaluations_semantic"])?;
    match named.as_deref() {
        None | Some("execute_all") => Ok(Semantic::ExecuteAll),
        Some("deny_on_first_deny") => Ok(Semantic::DenyOnFirstDeny),
        Some("permit_on_first_permit") => Ok(Semantic::PermitOnFirstPermit),
        // Another semantic is not guessed: the caller would take the answer for what it is not.
        Some(_) => Err(InvalidRequest::new(
            InvalidCode::Name,
            "evaluations_semantic must be execute_all, deny_on_first_deny or \
             permit_on_first_permit",
        )),
    }
}

fn wrong_type(key: &str, expected: &str) -> InvalidRequest {
    InvalidRequest::new(
        InvalidCode::WrongType,
        format!("{key:?} of request must be {expected}"),
    )
}

fn missing(what: &str, key: &str) -> InvalidRequest {
    InvalidRequest::new(InvalidCode::MissingField, format!("{what} has no {key:?}"))
}

/// Subject, action, resource and context, as far as they are there.
#[derive(Debug, Clone, Default)]
struct Tuple {
    subject: Option<Named>,
    action: Option<Named>,
    resource: Option<Named>,
    context: Option<Map<String, Value>>,
}

/// A subject, an action or a resource, as far as it is there.
#[derive(Debug, Clone)]
struct Named {
    /// Type of a subject or resource.
    kind: Option<String>,
    /// Id of a subject or resource, name of an action.
    id: Option<String>,
    properties: Map<String, Value>,
}

impl Named {
    fn read(what: &'static str, keys: &[&str], value: Value) -> Result<Self, InvalidRequest> {
        let mut fields = Fields::new(what, value)?;
        let mut text = |key: &str| match keys.contains(&key) {
            true => fields.optional_text(key),
            false => Ok(None),
        };
        let kind = text("type")?;
        let id = match text("id")? {
            None => text("name")?,
            id => id,
        };
        let properties = match fields.object("properties")? {
            Value::Object(properties) => properties,
            _ => Map::new(),
        };
        let known: Vec<&str> = keys.iter().copied().chain(["properties"]).collect();
        fields.finish_ignoring(&known)?;
        Ok(Self {
            kind,
            id,
            properties,
        })
    }

    /// This in place of the default, which lends only what must not be absent.
    fn over(mut self, default: Option<&Self>) -> Self {
        if let Some(default) = default {
            self.kind = self.kind.or_else(|| default.kind.clone());
            self.id = self.id.or_else(|| default.id.clone());
        }
        self
    }

    /// Type and id, both there.
    fn entity(&self, what: &str) -> Result<(String, String), InvalidRequest> {
        let kind = self.kind.clone().ok_or_else(|| missing(what, "type"))?;
        let id = self.id.clone().ok_or_else(|| missing(what, "id"))?;
        Ok((kind, id))
    }
}

impl Tuple {
    fn take(from: &mut Fields) -> Result<Self, InvalidRequest> {
        let entity = ["type", "id"];
        let mut named = |what: &'static str, keys: &[&str]| {
            from.take(what)
                .map(|value| Named::read(what, keys, value))
                .transpose()
        };
        let subject = named("subject", &entity)?;
        let action = named("action", &["name"])?;
        let resource = named("resource", &entity)?;
        let context = match from.take("context") {
            None => None,
            Some(Value::Object(context)) => Some(context),
            Some(_) => return Err(wrong_type("context", "an object")),
        };
        Ok(Self {
            subject,
            action,
            resource,
            context,
        })
    }

    /// Length of what evaluations inherit, as JSON.
    fn bytes(&self) -> usize {
        let length = |map: &Map<String, Value>| {
            // Values that came out of JSON go into it.
            serde_json::to_string(map).map_or(usize::MAX, |text| text.len())
        };
        [&self.subject, &self.action, &self.resource]
            .into_iter()
            .flatten()
            .map(|named| &named.properties)
            .chain(&self.context)
            .fold(0, |sum, map| sum.saturating_add(length(map)))
    }

    fn over(self, defaults: &Self) -> Self {
        let joined = |own: Option<Named>, default: &Option<Named>| match own {
            Some(own) => Some(own.over(default.as_ref())),
            None => default.clone(),
        };
        Self {
            subject: joined(self.subject, &defaults.subject),
            action: joined(self.action, &defaults.action),
            resource: joined(self.resource, &defaults.resource),
            context: self.context.or_else(|| defaults.context.clone()),
        }
    }

    fn parts(self, request_id: Option<&str>) -> Result<Parts, InvalidRequest> {
        let subject = self.subject.ok_or_else(|| missing("request", "subject"))?;
        let action = self.action.ok_or_else(|| missing("request", "action"))?;
        let resource = self
            .resource
            .ok_or_else(|| missing("request", "resource"))?;
        let principal = subject.entity("subject")?;
        let (resource_type, resource_id) = resource.entity("resource")?;
        let name = action.id.ok_or_else(|| missing("action", "name"))?;
        Ok(Parts {
            principal: Some(principal),
            name,
            resource_type,
            resource_id,
            params: Value::Object(action.properties),
            context: joined_context(self.context, subject.properties, resource.properties)?,
            request_id: request_id.map(str::to_owned),
        })
    }
}

fn joined_context(
    context: Option<Map<String, Value>>,
    subject: Map<String, Value>,
    resource: Map<String, Value>,
) -> Result<Value, InvalidRequest> {
    let mut context = context.unwrap_or_default();
    for (key, properties) in [
        (SUBJECT_PROPERTIES, subject),
        (RESOURCE_PROPERTIES, resource),
    ] {
        // INV-15: whose word it is must not depend on which of the two came first.
        if context.keys().any(|held| json::fold(held) == key) {
            return Err(InvalidRequest::new(
                InvalidCode::AmbiguousKey,
                format!("context must not have {key:?}, give the properties themselves"),
            ));
        }
        if !properties.is_empty() {
            context.insert(key.to_owned(), Value::Object(properties));
        }
    }
    Ok(Value::Object(context))
}

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SearchFor {
    /// Subjects of one type that may do the action to the resource.
    Subject,
    /// Resources of one type that the subject may do the action to.
    Resource,
    /// Actions that the subject may do to the resource.
    Action,
}

impl SearchFor {
    /// The word for it in paths and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Resource => "resource",
            Self::Action => "action",
        }
    }
}

/// A search request.
#[derive(Debug, Clone)]
pub struct Search {
    pub(crate) wanted: SearchFor,
    /// Type, and id unless subjects are looked for.
    pub(crate) subject: (String, Option<String>),
    /// Unless actions are looked for.
    pub(crate) action: Option<String>,
    /// Type, and id unless resources are looked for.
    pub(crate) resource: (String, Option<String>),
    pub(crate) params: Value,
    pub(crate) context: Value,
    pub(crate) limit: usize,
    pub(crate) token: Option<String>,
    pub(crate) request_id: Option<String>,
}

impl Search {
    /// Reads a search request.
    ///
    /// # Errors
    /// It could be understood in more than one way, or not at all.
    pub fn read(
        wanted: SearchFor,
        bytes: &[u8],
        request_id: Option<&str>,
    ) -> Result<Self, InvalidRequest> {
        let mut request = Fields::new("request", json::parse(bytes)?)?;
        let (limit, token) = page(request.take("page"))?;
        let tuple = Tuple::take(&mut request)?;
        request.finish_ignoring(&["subject", "action", "resource", "context", "page"])?;
        let subject = tuple.subject.ok_or_else(|| missing("request", "subject"))?;
        let resource = tuple
            .resource
            .ok_or_else(|| missing("request", "resource"))?;
        let action = match wanted {
            SearchFor::Action => None,
            _ => Some(tuple.action.ok_or_else(|| missing("request", "action"))?),
        };
        let (name, params) = match action {
            Some(action) => (
                Some(action.id.ok_or_else(|| missing("action", "name"))?),
                action.properties,
            ),
            None => (None, Map::new()),
        };
        let entity = |named: &Named, what: &str, is_wanted: bool| match is_wanted {
            // An id of what is looked for is ignored, as the protocol says.
            true => {
                let kind = named.kind.clone().ok_or_else(|| missing(what, "type"))?;
                Ok::<_, InvalidRequest>((kind, None))
            }
            false => named.entity(what).map(|(kind, id)| (kind, Some(id))),
        };
        Ok(Self {
            wanted,
            subject: entity(&subject, "subject", wanted == SearchFor::Subject)?,
            action: name,
            resource: entity(&resource, "resource", wanted == SearchFor::Resource)?,
            params: Value::Object(params),
            context: joined_context(tuple.context, subject.properties, resource.properties)?,
            limit,
            token,
            request_id: request_id.map(str::to_owned),
        })
    }

    /// The parts of the action that one candidate makes of it.
    pub(crate) fn with(&self, candidate: &str) -> Parts {
        let or = |id: &Option<String>| id.clone().unwrap_or_else(|| candidate.to_owned());
        Parts {
            principal: Some((self.subject.0.clone(), or(&self.subject.1))),
            name: or(&self.action),
            resource_type: self.resource.0.clone(),
            resource_id: or(&self.resource.1),
            params: self.params.clone(),
            context: self.context.clone(),
            request_id: None,
        }
    }
}

/// How many results are wanted, and from where on.
fn page(value: Option<Value>) -> Result<(usize, Option<String>), InvalidRequest> {
    let Some(value) = value else {
        return Ok((MAX_SEARCH_RESULTS, None));
    };
    let mut page = Fields::new("page", value)?;
    let token = page.optional_text("token")?;
    let limit = match page.take("limit") {
        None => MAX_SEARCH_RESULTS,
        Some(limit) => limit
            .as_u64()
            .filter(|limit| *limit > 0)
            .and_then(|limit| usize::try_from(limit).ok())
            .ok_or_else(|| {
                InvalidRequest::new(
                    InvalidCode::WrongType,
                    "\"limit\" of page must be an integer above 0",
                )
            })?,
    };
    page.finish_ignoring(&["token", "limit"])?;
    // An empty token is what the last page carries: it asks for the first one.
    let token = token.filter(|token| !token.is_empty());
    if token
        .as_ref()
        .is_some_and(|token| token.len() > MAX_PAGE_TOKEN_BYTES)
    {
        return Err(bad_token());
    }
    Ok((limit.min(MAX_SEARCH_RESULTS), token))
}

/// A page token that this node did not give for this search under this bundle.
pub(crate) fn bad_token() -> InvalidRequest {
    InvalidRequest::new(
        InvalidCode::Name,
        "\"token\" of page is none of this search under the policy in force, begin again",
    )
}
