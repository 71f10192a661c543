//! `input-schema.json`: which actions the Rego lane knows, and what a request for each must look like.
//!
//! Rego has no types: a field that is missing or of another type makes an expression undefined, and a
//! rule that depends on it silent. So a request is checked before any rule sees it. The language is a
//! subset of JSON Schema with one difference: an object has no other fields than those it declares, unless it says
//! `"additionalProperties": true`. What is not in the subset is refused at load.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::archive::{Files, INPUT_SCHEMA};
use crate::error::BundleError;
use crate::json;
use crate::limits::{INPUT_SCHEMA_DEPTH_MAX, SCHEMA_NAMES_MAX, VALUE_DEPTH_MAX};
use crate::request::PolicyRequest;

/// The declared actions by name.
pub(crate) struct InputSchema(BTreeMap<String, Action>);

struct Action {
    principal: BTreeSet<String>,
    resource: BTreeSet<String>,
    attributes: Fields,
    params: Option<Kind>,
    context: Option<Kind>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    format: u64,
    actions: BTreeMap<String, RawAction>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAction {
    principal: BTreeSet<String>,
    resource: BTreeSet<String>,
    #[serde(default)]
    attributes: Option<RawKind>,
    #[serde(default)]
    params: Option<RawKind>,
    #[serde(default)]
    context: Option<RawKind>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKind {
    r#type: String,
    #[serde(default)]
    properties: Option<BTreeMap<String, RawKind>>,
    #[serde(default)]
    required: Option<BTreeSet<String>>,
    #[serde(default, rename = "additionalProperties")]
    additional: Option<bool>,
    #[serde(default)]
    items: Option<Box<RawKind>>,
    #[serde(default, rename = "enum")]
    one_of: Option<Vec<Value>>,
    #[serde(default)]
    minimum: Option<i64>,
    #[serde(default)]
    maximum: Option<i64>,
    #[serde(default, rename = "maxLength")]
    max_length: Option<usize>,
    #[serde(default, rename = "maxItems")]
    max_items: Option<usize>,
}

enum Kind {
    Null,
    Boolean,
    Number,
    Integer {
        minimum: i64,
        maximum: i64,
    },
    String {
        one_of: Option<BTreeSet<String>>,
        max_length: usize,
    },
    Array {
        items: Box<Kind>,
        max_items: usize,
    },
    Object(Fields),
}

#[derive(Default)]
struct Fields {
    known: BTreeMap<String, Kind>,
    required: BTreeSet<String>,
    open: bool,
}

impl InputSchema {
    /// Reads the schema of a bundle.
    pub(crate) fn read(files: &Files) -> Result<Self, BundleError> {
        let refuse = |message: String| BundleError::schema(INPUT_SCHEMA, message);
        let bytes = files
            .get(INPUT_SCHEMA)
            .ok_or_else(|| refuse("the bundle has no input schema".to_owned()))?;
        let raw: RawFile = json::parse_as(bytes).map_err(|error| refuse(error.to_string()))?;
        if raw.format != 1 {
            return Err(refuse(format!(
                "format {} is not known, this node reads 1",
                raw.format
            )));
        }
        if raw.actions.is_empty() || raw.actions.len() > SCHEMA_NAMES_MAX {
            return Err(refuse(format!(
                "actions must hold 1 to {SCHEMA_NAMES_MAX} actions"
            )));
        }
        let mut actions = BTreeMap::new();
        for (name, raw) in raw.actions {
            let action = Action::read(raw)
                .map_err(|message| refuse(format!("action `{name}`: {message}")))?;
            actions.insert(name, action);
        }
        Ok(Self(actions))
    }

    pub(crate) fn actions(&self) -> BTreeSet<String> {
        self.0.keys().cloned().collect()
    }

    /// Whether requests for an action may have this member in their context, and whether it is named.
    pub(crate) fn takes_context(&self, action: &str, member: &str) -> (bool, bool) {
        let context = self
            .0
            .get(action)
            .and_then(|action| action.context.as_ref());
        match context {
            Some(Kind::Object(fields)) => {
                let named = fields.known.contains_key(member);
                (named || fields.open, named)
            }
            _ => (false, false),
        }
    }

    /// The input document of a request; `None` for an action that is not declared.
    pub(crate) fn input(&self, request: &PolicyRequest) -> Option<Result<regorus::Value, String>> {
        let action = self.0.get(&request.action)?;
        Some(action.input(request))
    }
}

impl Action {
    fn read(raw: RawAction) -> Result<Self, String> {
        if raw.principal.is_empty() || raw.resource.is_empty() {
            return Err("principal and resource must each name a type".to_owned());
        }
        let kind = |raw: Option<RawKind>| raw.map(|raw| Kind::read(raw, 0)).transpose();
        let attributes = match kind(raw.attributes)? {
            None => Fields::default(),
            Some(Kind::Object(fields)) => fields,
            Some(_) => return Err("attributes must be an object".to_owned()),
        };
        let params = kind(raw.params)?;
        let context = kind(raw.context)?;
        if !matches!(context, None | Some(Kind::Object(_))) {
            return Err("context must be an object".to_owned());
        }
        Ok(Self {
            principal: raw.principal,
            resource: raw.resource,
            attributes,
            params,
            context,
        })
    }

    fn input(&self, request: &PolicyRequest) -> Result<regorus::Value, String> {
        for (role, name, known) in [
            ("principal", &request.principal_type, &self.principal),
            ("resource", &request.resource_type, &self.resource),
        ] {
            if !known.contains(name) {
                return Err(format!(
                    "{role}: the action does not apply to type `{name}`"
                ));
            }
        }
        // As in the other lane: what is not declared of a resource no policy sees.
        let attributes = self
            .attributes
            .value(&request.resource_attributes, true, 0)
            .map_err(|error| format!("resource: {error}"))?;
        let nothing = Value::Object(Map::new());
        let some = |value: &Value| {
            if value.is_null() {
                nothing.clone()
            } else {
                value.clone()
            }
        };
        let none = || regorus::Value::new_object();
        let params = match &self.params {
            None => none(),
            Some(kind) => kind
                .value(&some(&request.params), 0)
                .map_err(|error| format!("params: {error}"))?,
        };
        let context = match (&self.context, &request.context) {
            (Some(kind), context) => kind
                .value(&some(context), 0)
                .map_err(|error| format!("context: {error}"))?,
            (None, Value::Null) => none(),
            (None, Value::Object(fields)) if fields.is_empty() => none(),
            (None, _) => return Err("context: the action declares none".to_owned()),
        };
        let text = |text: &str| regorus::Value::from(text);
        Ok(object([
            (
                "principal",
                object([
                    ("type", text(&request.principal_type)),
                    ("id", text(&request.principal_id)),
                ]),
            ),
            ("action", text(&request.action)),
            (
                "resource",
                object([
                    ("type", text(&request.resource_type)),
                    ("id", text(&request.resource_id)),
                    ("attributes", attributes),
                ]),
            ),
            ("params", params),
            ("context", context),
        ]))
    }
}

impl Kind {
    fn read(raw: RawKind, depth: usize) -> Result<Self, String> {
        if depth > INPUT_SCHEMA_DEPTH_MAX {
            return Err(format!("nested deeper than {INPUT_SCHEMA_DEPTH_MAX}"));
        }
        let RawKind {
            r#type,
            properties,
            required,
            additional,
            items,
            one_of,
            minimum,
            maximum,
            max_length,
            max_items,
        } = raw;
        // A key that its type does not know would be a check that nobody makes.
        let belongs = [
            ("properties", properties.is_some(), "object"),
            ("required", required.is_some(), "object"),
            ("additionalProperties", additional.is_some(), "object"),
            ("items", items.is_some(), "array"),
            ("maxItems", max_items.is_some(), "array"),
            ("enum", one_of.is_some(), "string"),
            ("maxLength", max_length.is_some(), "string"),
            ("minimum", minimum.is_some(), "integer"),
            ("maximum", maximum.is_some(), "integer"),
        ];
        for (key, given, kind) in belongs {
            if given && kind != r#type {
                return Err(format!("`{key}` is for type {kind}, not for {}", r#type));
            }
        }
        Ok(match r#type.as_str() {
            "null" => Self::Null,
            "boolean" => Self::Boolean,
            "number" => Self::Number,
            "integer" => Self::Integer {
                minimum: minimum.unwrap_or(i64::MIN),
                maximum: maximum.unwrap_or(i64::MAX),
            },
            "string" => Self::String {
                one_of: one_of
                    .map(|values| {
                        let each = |value: Value| match value {
                            Value::String(text) => Ok(text),
                            _ => Err("enum must hold strings".to_owned()),
                        };
                        values.into_iter().map(each).collect()
                    })
                    .transpose()?,
                max_length: max_length.unwrap_or(usize::MAX),
            },
            "array" => Self::Array {
                items: Box::new(Self::read(
                    *items.ok_or("an array needs items")?,
                    depth + 1,
                )?),
                max_items: max_items.unwrap_or(usize::MAX),
            },
            "object" => {
                let mut known = BTreeMap::new();
                for (name, raw) in properties.unwrap_or_default() {
                    let kind = Self::read(raw, depth + 1)
                        .map_err(|message| format!("`{name}`: {message}"))?;
                    known.insert(name, kind);
                }
                let required = required.unwrap_or_default();
                if let Some(name) = required.iter().find(|name| !known.contains_key(*name)) {
                    return Err(format!("`{name}` is required and not declared"));
                }
                Self::Object(Fields {
                    known,
                    required,
                    open: additional.unwrap_or_default(),
                })
            }
            other => {
                return Err(format!(
                    "type `{other}` is not one of null, boolean, integer, number, string, array, object"
                ));
            }
        })
    }

    /// The value as the engine has it, if it is what is declared.
    fn value(&self, value: &Value, depth: usize) -> Result<regorus::Value, String> {
        match (self, value) {
            (Self::Null, Value::Null)
            | (Self::Boolean, Value::Bool(_))
            | (Self::Number, Value::Number(_)) => Ok(convert(value)),
            (Self::Integer { minimum, maximum }, Value::Number(number)) => match number.as_i64() {
                Some(integer) if (*minimum..=*maximum).contains(&integer) => Ok(convert(value)),
                Some(integer) => Err(format!("{integer} is not within {minimum} and {maximum}")),
                None => Err(format!("{number} is not a 64-bit integer")),
            },
            (Self::String { one_of, max_length }, Value::String(text)) => {
                if text.len() > *max_length {
                    return Err(format!("longer than {max_length} bytes"));
                }
                if one_of.as_ref().is_some_and(|known| !known.contains(text)) {
                    return Err("not one of the values that the schema lists".to_owned());
                }
                Ok(convert(value))
            }
            (Self::Array { items, max_items }, Value::Array(values)) => {
                if values.len() > *max_items {
                    return Err(format!("more than {max_items} items"));
                }
                let values: Result<Vec<regorus::Value>, String> = values
                    .iter()
                    .map(|item| items.value(item, depth + 1))
                    .collect();
                Ok(regorus::Value::from(values?))
            }
            (Self::Object(fields), Value::Object(map)) => fields.value(map, false, depth),
            _ => Err(format!("expected {}", self.name())),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Boolean => "a boolean",
            Self::Number => "a number",
            Self::Integer { .. } => "an integer",
            Self::String { .. } => "a string",
            Self::Array { .. } => "an array",
            Self::Object(_) => "an object",
        }
    }
}

impl Fields {
    fn value(
        &self,
        map: &Map<String, Value>,
        drop_unknown: bool,
        depth: usize,
    ) -> Result<regorus::Value, String> {
        if let Some(missing) = self.required.iter().find(|name| !map.contains_key(*name)) {
            return Err(format!("`{missing}` is missing"));
        }
        let mut fields = BTreeMap::new();
        for (name, value) in map {
            let value = match self.known.get(name) {
                Some(kind) => kind
                    .value(value, depth + 1)
                    .map_err(|error| format!("`{name}`: {error}"))?,
                None if self.open => bounded(value, depth + 1)?,
                None if drop_unknown => continue,
                None => return Err(format!("`{name}` is not declared")),
            };
            fields.insert(regorus::Value::from(name.as_str()), value);
        }
        Ok(regorus::Value::from(fields))
    }
}

/// A value that nothing is declared of.
fn bounded(value: &Value, depth: usize) -> Result<regorus::Value, String> {
    fn deep(value: &Value, left: usize) -> bool {
        match value {
            Value::Array(items) => left == 0 || items.iter().any(|item| deep(item, left - 1)),
            Value::Object(map) => left == 0 || map.values().any(|item| deep(item, left - 1)),
            _ => false,
        }
    }
    if deep(value, VALUE_DEPTH_MAX.saturating_sub(depth)) {
        return Err(format!("nested deeper than {VALUE_DEPTH_MAX}"));
    }
    Ok(convert(value))
}

/// A JSON value as the engine has it, number for number.
pub(crate) fn convert(value: &Value) -> regorus::Value {
    match value {
        Value::Null => regorus::Value::Null,
        Value::Bool(held) => regorus::Value::Bool(*held),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(integer), _, _) => regorus::Value::from(integer),
            (_, Some(integer), _) => regorus::Value::from(integer),
            (_, _, Some(float)) => regorus::Value::from(float),
            _ => regorus::Value::Undefined,
        },
        Value::String(text) => regorus::Value::from(text.as_str()),
        Value::Array(items) => regorus::Value::from(items.iter().map(convert).collect::<Vec<_>>()),
        Value::Object(map) => {
            let fields = map
                .iter()
                .map(|(name, field)| (regorus::Value::from(name.as_str()), convert(field)));
            regorus::Value::from(fields.collect::<BTreeMap<_, _>>())
        }
    }
}

fn object<const N: usize>(fields: [(&str, regorus::Value); N]) -> regorus::Value {
    let fields = fields.map(|(name, value)| (regorus::Value::from(name), value));
    regorus::Value::from(BTreeMap::from(fields))
}
