//! The schema as data.

use std::collections::{BTreeMap, BTreeSet};

use cedar_policy::{Entity, EntityUid, Schema, schema_str_to_json_with_resolved_types};
use serde_json::{Map, Value, json};
use tidelock_policy::{Contents, SCHEMA, limits::VALUE_DEPTH_MAX};

use crate::questions::{Refusal, unsupported};

/// The schema as data: which attributes entities have, and which of them always.
pub(crate) struct Shapes {
    pub(crate) resolved: Value,
    /// Attributes of each entity type, and whether it is required.
    pub(crate) attributes: BTreeMap<String, BTreeMap<String, bool>>,
}

impl Shapes {
    pub(crate) fn read(contents: &Contents) -> Result<Self, Refusal> {
        let source = contents.file(SCHEMA).map(String::from_utf8_lossy);
        let source = source.unwrap_or_default();
        let (resolved, _) =
            schema_str_to_json_with_resolved_types(&source).map_err(|error| unsupported(&error))?;
        let mut shapes = Self {
            resolved,
            attributes: BTreeMap::new(),
        };
        for (name, declared) in shapes.part("entityTypes") {
            let listed = shapes.record(declared.get("shape"))?;
            let listed = listed.get("attributes").and_then(Value::as_object);
            let required =
                |attribute: &Value| attribute.get("required") != Some(&Value::Bool(false));
            let of_type = listed
                .into_iter()
                .flatten()
                .map(|(name, attribute)| (name.clone(), required(attribute)))
                .collect();
            shapes.attributes.insert(name.clone(), of_type);
        }
        Ok(shapes)
    }

    fn part(&self, key: &str) -> Map<String, Value> {
        let part = self.resolved.get("").and_then(|all| all.get(key));
        part.and_then(Value::as_object).cloned().unwrap_or_default()
    }

    /// A record type, whatever common types stand before it.
    fn record(&self, declared: Option<&Value>) -> Result<Value, Refusal> {
        let Some(declared) = declared else {
            return Ok(json!({"type": "Record", "attributes": {}}));
        };
        let mut declared = declared.clone();
        let common = self.part("commonTypes");
        for _ in 0..=common.len() {
            let word = |key: &str| declared.get(key).and_then(Value::as_str);
            match word("type") {
                Some("Record") => return Ok(declared),
                Some("EntityOrCommon") => match word("name").and_then(|name| common.get(name)) {
                    Some(found) => declared = found.clone(),
                    None => break,
                },
                Some(name) => match common.get(name) {
                    Some(found) => declared = found.clone(),
                    None => break,
                },
                None => break,
            }
        }
        Err(unsupported(&"attributes that are no record"))
    }

    /// The schema in which every attribute of every entity may be absent.
    pub(crate) fn relaxed(&self) -> Result<Value, Refusal> {
        let mut relaxed = self.resolved.clone();
        let types = relaxed
            .get_mut("")
            .and_then(|all| all.get_mut("entityTypes"))
            .and_then(Value::as_object_mut);
        for (_, declared) in types.into_iter().flatten() {
            // One that lists its ids has no attributes.
            let Some(declared) = declared
                .as_object_mut()
                .filter(|map| !map.contains_key("enum"))
            else {
                continue;
            };
            let mut shape = self.record(declared.get("shape"))?;
            let attributes = shape.get_mut("attributes").and_then(Value::as_object_mut);
            for (_, attribute) in attributes.into_iter().flatten() {
                if let Some(attribute) = attribute.as_object_mut() {
                    attribute.insert("required".to_owned(), Value::Bool(false));
                }
            }
            declared.insert("shape".to_owned(), shape);
        }
        Ok(relaxed)
    }

    pub(crate) fn schema(&self, value: Value) -> Result<Schema, Refusal> {
        Schema::from_json_value(value).map_err(|error| unsupported(&error))
    }

    /// Whether what both declare, they declare alike.
    pub(crate) fn same_types(&self, other: &Self) -> bool {
        ["entityTypes", "commonTypes"].into_iter().all(|key| {
            let others = other.part(key);
            self.part(key)
                .iter()
                .all(|(name, declared)| others.get(name).is_none_or(|same| same == declared))
        })
    }

    /// Whether an action has the same context.
    pub(crate) fn same_context(&self, other: &Self, action: &str) -> bool {
        let context = |actions: Map<String, Value>| {
            let applies = actions.get(action)?.get("appliesTo")?;
            applies.get("context").cloned()
        };
        context(self.part("actions")) == context(other.part("actions"))
    }

    /// The first action that is another one in the other schema: in other groups, or, where requests can name
    /// actions in their attributes, unknown. Policies may ask for the groups of any action, not only of the one
    /// that is requested.
    pub(crate) fn other_action(&self, other: &Self) -> Option<String> {
        let (ours, theirs) = (self.part("actions"), other.part("actions"));
        let can_be_named = names_actions(&self.resolved) || names_actions(&other.resolved);
        let is_of_both = |name: &String| ours.contains_key(name) && theirs.contains_key(name);
        let differs = |name: &&String| {
            groups(&ours, name) != groups(&theirs, name) || can_be_named && !is_of_both(name)
        };
        ours.keys().chain(theirs.keys()).find(differs).cloned()
    }

    pub(crate) fn declares(&self, uid: &EntityUid) -> bool {
        self.attributes.contains_key(&uid.type_name().to_string())
    }

    /// An entity of a model as a bundle could describe it. A model says nothing of what no policy looks at.
    pub(crate) fn whole(&self, entity: &Entity) -> Option<Value> {
        let mut described = entity.to_json_value().ok()?;
        let name = entity.uid().type_name().to_string();
        if let Some(attributes) = described.get_mut("attrs") {
            let known = attributes.as_object().cloned().unwrap_or_default();
            *attributes = self.filled(&name, &known)?;
        }
        Some(described)
    }

    /// The attributes of an entity of this type, with some value for each that is required and not there.
    pub(crate) fn filled(&self, name: &str, known: &Map<String, Value>) -> Option<Value> {
        let types = self.part("entityTypes");
        let shape = self.record(types.get(name)?.get("shape")).ok()?;
        let mut filled = self.some_value(&shape, 0)?;
        if let Some(filled) = filled.as_object_mut() {
            filled.extend(known.clone());
        }
        Some(filled)
    }

    fn some_value(&self, declared: &Value, depth: usize) -> Option<Value> {
        let word = |key: &str| declared.get(key).and_then(Value::as_str);
        if depth > VALUE_DEPTH_MAX {
            return None;
        }
        let name = match word("type")? {
            "Record" => {
                let mut filled = Map::new();
                let listed = declared.get("attributes").and_then(Value::as_object);
                for (name, attribute) in listed.into_iter().flatten() {
                    if attribute.get("required") != Some(&Value::Bool(false)) {
                        filled.insert(name.clone(), self.some_value(attribute, depth + 1)?);
                    }
                }
                return Some(Value::Object(filled));
            }
            "Set" => return Some(json!([])),
            "Entity" | "EntityOrCommon" => word("name")?,
            name => name,
        };
        if let Some(common) = self.part("commonTypes").get(name) {
            return self.some_value(common, depth + 1);
        }
        if let Some(entity) = self.part("entityTypes").get(name) {
            let listed = entity.get("enum").and_then(Value::as_array);
            let id = listed
                .and_then(|ids| ids.first()?.as_str())
                .unwrap_or_default();
            return Some(json!({"__entity": {"type": name, "id": id}}));
        }
        match name.strip_prefix("__cedar::").unwrap_or(name) {
            "Bool" | "Boolean" => Some(json!(false)),
            "Long" => Some(json!(0)),
            "String" => Some(json!("")),
            _ => None,
        }
    }
}

/// Whether a type in here is that of actions. An attribute that is only called `name` has no text for a type.
fn names_actions(declared: &Value) -> bool {
    match declared {
        Value::Object(members) => {
            let is_it = members.get("name").and_then(Value::as_str) == Some("Action");
            is_it || members.values().any(names_actions)
        }
        Value::Array(items) => items.iter().any(names_actions),
        _ => false,
    }
}

/// Every group that an action is in, over any number of steps.
fn groups(actions: &Map<String, Value>, action: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![action.to_owned()];
    while let Some(name) = next.pop() {
        let listed = actions
            .get(&name)
            .and_then(|action| action.get("memberOf"))
            .and_then(Value::as_array);
        for group in listed.into_iter().flatten() {
            if let Some(id) = group.get("id").and_then(Value::as_str)
                && found.insert(id.to_owned())
            {
                next.push(id.to_owned());
            }
        }
    }
    found
}
