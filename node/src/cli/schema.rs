//! `tidelock schema …`

use serde_json::{Map, Value, json};
use tidelock_gateway::openapi_document;
use tidelock_policy::schemas;

use super::{Exit, Failure, Output};
use crate::config::Config;

/// What there are schemas of.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum What {
    /// `manifest.json` of a bundle.
    Manifest,
    /// The files below `tests/` of a bundle.
    Tests,
    /// What a caller asks: the body of `POST /v1/decide`.
    Action,
    /// What it is answered.
    Decision,
    /// The node's config file, as JSON would have it.
    Config,
}

pub(super) fn run(what: What, output: &Output) -> Result<Exit, Failure> {
    let schema = match what {
        What::Manifest => serde_json::from_str(schemas::MANIFEST)?,
        What::Tests => serde_json::from_str(schemas::TESTS)?,
        What::Action => of_the_api("DecideRequest")?,
        What::Decision => of_the_api("DecisionAnswer")?,
        What::Config => Config::schema(),
    };
    let text = serde_json::to_string_pretty(&schema)?;
    output.say(&schema, || text);
    Ok(Exit::Done)
}

/// A type of the OpenAPI document with all that it refers to.
fn of_the_api(name: &str) -> Result<Value, Failure> {
    let document: Value = serde_json::from_str(&openapi_document())?;
    let types = document
        .pointer("/components/schemas")
        .and_then(Value::as_object)
        .ok_or_else(|| Failure::failed("the API document has no types"))?;
    let schema = types
        .get(name)
        .cloned()
        .map(standing_alone)
        .ok_or_else(|| Failure::failed(format!("the API document has no `{name}`")))?;
    let mut definitions = Map::new();
    let mut wanted = references(&schema);
    while let Some(next) = wanted.pop() {
        if let Some(found) = types
            .get(&next)
            .filter(|_| !definitions.contains_key(&next))
        {
            let found = standing_alone(found.clone());
            wanted.extend(references(&found));
            definitions.insert(next, found);
        }
    }
    let head = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "$defs": definitions,
    });
    let parts = [head, schema].into_iter();
    Ok(parts
        .filter_map(|part| part.as_object().cloned())
        .flatten()
        .collect())
}

/// A schema whose references lead to its own definitions, and whose examples are JSON Schema's.
fn standing_alone(schema: Value) -> Value {
    match schema {
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| match (key.as_str(), &value) {
                ("$ref", Value::String(to)) => {
                    (key, json!(to.replace("#/components/schemas/", "#/$defs/")))
                }
                ("example", _) => ("examples".to_owned(), json!([value])),
                _ => (key, standing_alone(value)),
            })
            .collect(),
        Value::Array(list) => list.into_iter().map(standing_alone).collect(),
        other => other,
    }
}

/// The definitions that a schema refers to.
fn references(schema: &Value) -> Vec<String> {
    match schema {
        Value::Object(map) => map
            .iter()
            .flat_map(|(key, value)| match (key.as_str(), value) {
                ("$ref", Value::String(to)) => to
                    .strip_prefix("#/$defs/")
                    .map(str::to_owned)
                    .into_iter()
                    .collect(),
                _ => references(value),
            })
            .collect(),
        Value::Array(list) => list.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}
