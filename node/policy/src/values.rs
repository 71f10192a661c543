//! Values of a request, read by the types that the schema declares.
//!
//! Cedar reads JSON by a schema too, but looks the types up and builds them anew for each value.
//! Here they are prepared once. The rules are Cedar's: every required attribute, no undeclared one,
//! exactly the declared types; an entity as `{"type", "id"}` or `{"__entity": {"type", "id"}}`. What
//! is read here is equal to what Cedar reads, and what is refused here Cedar refuses (tested).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::str::FromStr as _;
use std::sync::Arc;

use cedar_policy::{EntityId, EntityTypeName, EntityUid, RestrictedExpression};
use serde_json::{Map, Value};

use crate::limits::VALUE_DEPTH_MAX;

/// A type of the schema.
#[derive(Debug)]
enum Kind {
    Bool,
    Long,
    String,
    Set(Arc<Kind>),
    Record(Arc<RecordType>),
    Entity {
        name: String,
        kind: EntityTypeName,
        /// The only ids that there are, for an enumerated type.
        ids: Option<BTreeSet<String>>,
    },
    /// A type that no request can have a value of: extension types are not compiled in.
    Foreign(String),
}

/// A record type, or the attributes of an entity type.
#[derive(Debug, Default)]
pub(crate) struct RecordType {
    attributes: HashMap<String, Arc<Kind>>,
    required: Vec<String>,
}

/// Reads the types out of a schema in its resolved JSON form.
pub(crate) struct Types<'s> {
    common: &'s Map<String, Value>,
    entities: &'s Map<String, Value>,
    actions: &'s Map<String, Value>,
    /// Common types that were read already: named many times, they are still one.
    known: HashMap<&'s str, Arc<Kind>>,
    /// Common types that are being read, against a cycle.
    open: HashSet<&'s str>,
}

impl<'s> Types<'s> {
    pub(crate) fn new(
        common: &'s Map<String, Value>,
        entities: &'s Map<String, Value>,
        actions: &'s Map<String, Value>,
    ) -> Self {
        Self {
            common,
            entities,
            actions,
            known: HashMap::new(),
            open: HashSet::new(),
        }
    }

    /// The record that a shape or a context is declared as; without one, a record of nothing.
    pub(crate) fn record(
        &mut self,
        declared: Option<&'s Value>,
    ) -> Result<Arc<RecordType>, String> {
        match declared.map(|declared| self.kind(declared)).transpose()? {
            None => Ok(Arc::default()),
            Some(kind) => match kind.as_ref() {
                Kind::Record(record) => Ok(Arc::clone(record)),
                other => Err(format!("{other:?} where a record is expected")),
            },
        }
    }

    fn kind(&mut self, declared: &'s Value) -> Result<Arc<Kind>, String> {
        let word = |key: &str| declared.get(key).and_then(Value::as_str);
        let name = word("type").ok_or_else(|| format!("a type without a name: {declared}"))?;
        Ok(Arc::new(match name {
            "Boolean" | "Bool" => Kind::Bool,
            "Long" => Kind::Long,
            "String" => Kind::String,
            "Set" => {
                let element = declared.get("element").ok_or("a set without elements")?;
                Kind::Set(self.kind(element)?)
            }
            "Record" => {
                let mut record = RecordType::default();
                let listed = declared.get("attributes").and_then(Value::as_object);
                for (name, attribute) in listed.into_iter().flatten() {
                    let kind = self.kind(attribute)?;
                    record.attributes.insert(name.clone(), kind);
                    if attribute.get("required").and_then(Value::as_bool) != Some(false) {
                        record.required.push(name.clone());
                    }
                }
                Kind::Record(Arc::new(record))
            }
            "Entity" => self.entity(word("name").ok_or("an entity type without a name")?)?,
            "Extension" => Kind::Foreign(word("name").unwrap_or_default().to_owned()),
            "EntityOrCommon" => {
                let name = word("name").ok_or("a type without a name")?;
                return self.named(name);
            }
            name => return self.named(name),
        }))
    }

    /// A name is a common type, else an entity type, else a primitive one written as `__cedar::…`.
    fn named(&mut self, name: &'s str) -> Result<Arc<Kind>, String> {
        if let Some(kind) = self.known.get(name) {
            return Ok(Arc::clone(kind));
        }
        let kind = if let Some(declared) = self.common.get(name) {
            if !self.open.insert(name) {
                return Err(format!("type `{name}` contains itself"));
            }
            let kind = self.kind(declared)?;
            self.open.remove(name);
            kind
        } else if self.entities.contains_key(name) {
            Arc::new(self.entity(name)?)
        } else {
            Arc::new(match name.strip_prefix("__cedar::").unwrap_or(name) {
                "Bool" | "Boolean" => Kind::Bool,
                "Long" => Kind::Long,
                "String" => Kind::String,
                other => Kind::Foreign(other.to_owned()),
            })
        };
        self.known.insert(name, Arc::clone(&kind));
        Ok(kind)
    }

    fn entity(&self, name: &str) -> Result<Kind, String> {
        let declared = self.entities.get(name);
        let listed = declared
            .and_then(|entity| entity.get("enum"))
            .and_then(Value::as_array);
        let ids = match listed {
            Some(ids) => {
                let ids = ids.iter().filter_map(Value::as_str);
                Some(ids.map(str::to_owned).collect())
            }
            // Of actions there are those that the schema declares.
            None if declared.is_none() => Some(self.actions.keys().cloned().collect()),
            None => None,
        };
        Ok(Kind::Entity {
            name: name.to_owned(),
            kind: EntityTypeName::from_str(name).map_err(|error| error.to_string())?,
            ids,
        })
    }
}

impl RecordType {
    pub(crate) fn declares(&self, attribute: &str) -> bool {
        self.attributes.contains_key(attribute)
    }

    /// Reads the attributes of an object, which must be exactly the declared ones. Entities that
    /// are referred to are added to `mentioned`.
    pub(crate) fn read<'v>(
        &self,
        attributes: impl Iterator<Item = (&'v String, &'v Value)>,
        mentioned: &mut Vec<EntityUid>,
    ) -> Result<Vec<(String, RestrictedExpression)>, String> {
        self.read_all(attributes, 0, mentioned)
    }

    /// Reads attributes, of which more may be required.
    pub(crate) fn read_some<'v>(
        &self,
        attributes: impl Iterator<Item = (&'v String, &'v Value)>,
        depth: usize,
        mentioned: &mut Vec<EntityUid>,
    ) -> Result<Vec<(String, RestrictedExpression)>, String> {
        attributes
            .map(|(name, value)| {
                let kind = self
                    .attributes
                    .get(name)
                    .ok_or_else(|| format!("the schema has no attribute `{name}`"))?;
                let value = kind
                    .read(value, depth + 1, mentioned)
                    .map_err(|error| format!("attribute `{name}`: {error}"))?;
                Ok((name.clone(), value))
            })
            .collect()
    }

    fn read_all<'v>(
        &self,
        attributes: impl Iterator<Item = (&'v String, &'v Value)>,
        depth: usize,
        mentioned: &mut Vec<EntityUid>,
    ) -> Result<Vec<(String, RestrictedExpression)>, String> {
        let read = self.read_some(attributes, depth, mentioned)?;
        let given: HashSet<&str> = read.iter().map(|(name, _)| name.as_str()).collect();
        let mut missing: Vec<&str> = self
            .required
            .iter()
            .map(String::as_str)
            .filter(|name| !given.contains(name))
            .collect();
        if missing.is_empty() {
            return Ok(read);
        }
        missing.sort_unstable();
        Err(format!("attribute `{}` is missing", missing.join("`, `")))
    }
}

impl Kind {
    fn read(
        &self,
        value: &Value,
        depth: usize,
        mentioned: &mut Vec<EntityUid>,
    ) -> Result<RestrictedExpression, String> {
        if depth > VALUE_DEPTH_MAX {
            return Err(format!("nested deeper than {VALUE_DEPTH_MAX}"));
        }
        match (self, value) {
            (Self::Bool, Value::Bool(value)) => Ok(RestrictedExpression::new_bool(*value)),
            (Self::Long, Value::Number(number)) => number
                .as_i64()
                .map(RestrictedExpression::new_long)
                .ok_or_else(|| format!("the number {number} is not a 64-bit integer")),
            (Self::String, Value::String(text)) => {
                Ok(RestrictedExpression::new_string(text.clone()))
            }
            (Self::Set(element), Value::Array(items)) => {
                let items = items
                    .iter()
                    .map(|item| element.read(item, depth + 1, mentioned))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(RestrictedExpression::new_set(items))
            }
            (Self::Record(record), Value::Object(map)) => {
                let fields = record.read_all(map.iter(), depth, mentioned)?;
                RestrictedExpression::new_record(fields).map_err(|error| error.to_string())
            }
            (Self::Entity { name, kind, ids }, Value::Object(map)) => {
                let id =
                    reference(map, name).ok_or_else(|| format!("expected an entity `{name}`"))?;
                if ids.as_ref().is_some_and(|ids| !ids.contains(id)) {
                    return Err(format!("there is no `{name}` of this id"));
                }
                let uid = EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(id));
                mentioned.push(uid.clone());
                Ok(RestrictedExpression::new_entity_uid(uid))
            }
            _ => Err(format!("expected {}", self.describe())),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Bool => "a boolean".to_owned(),
            Self::Long => "a 64-bit integer".to_owned(),
            Self::String => "a string".to_owned(),
            Self::Set(_) => "an array".to_owned(),
            Self::Record(_) => "an object".to_owned(),
            Self::Entity { name, .. } => format!("an entity `{name}`"),
            Self::Foreign(name) => format!("`{name}`, of which no request can have a value"),
        }
    }
}

/// The id in a reference to an entity of this type.
fn reference<'v>(map: &'v Map<String, Value>, name: &str) -> Option<&'v str> {
    let map = match map.get("__entity") {
        Some(escaped) if map.len() == 1 => escaped.as_object()?,
        Some(_) => return None,
        None => map,
    };
    let text = |key: &str| map.get(key).and_then(Value::as_str);
    (map.len() == 2 && text("type") == Some(name)).then_some(text("id")?)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr as _;

    use cedar_policy::{
        Context, Entity, EntityUid, Request, Schema, schema_str_to_json_with_resolved_types,
    };
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const SCHEMA: &str = r#"
type Pair = { left: Long, right?: Deep };
type Deep = { pairs?: Set<{ a: Bool }>, who?: Agent };
type Word = String;
entity Agent;
entity Colour enum ["red", "green"];
entity Note = { n: Long, word?: Word, set?: Set<Long>, pair?: Pair, who?: Agent, colour?: Colour,
                flag?: Bool, "odd key"?: Set<Agent> };
action "do" appliesTo { principal: [Agent], resource: [Note], context: {
    n: Long, word?: Word, set?: Set<Long>, pair?: Pair, who?: Agent, colour?: Colour, flag?: Bool,
    "odd key"?: Set<Agent> } };
"#;

    struct Site {
        schema: Schema,
        note: Arc<RecordType>,
        context: Arc<RecordType>,
    }

    fn site() -> Site {
        let (resolved, _) = schema_str_to_json_with_resolved_types(SCHEMA).unwrap();
        let part = |key: &str| resolved[""][key].as_object().unwrap();
        let mut types = Types::new(part("commonTypes"), part("entityTypes"), part("actions"));
        Site {
            note: types
                .record(resolved[""]["entityTypes"]["Note"].get("shape"))
                .unwrap(),
            context: types
                .record(resolved[""]["actions"]["do"]["appliesTo"].get("context"))
                .unwrap(),
            schema: Schema::from_cedarschema_str(SCHEMA).unwrap().0,
        }
    }

    fn uid(text: &str) -> EntityUid {
        EntityUid::from_str(text).unwrap()
    }

    /// Whether something stands beside `__entity`, which Cedar passes over and INV-15 refuses.
    fn says_more(value: &Value) -> bool {
        match value {
            Value::Object(map) => {
                map.contains_key("__entity") && map.len() > 1 || map.values().any(says_more)
            }
            Value::Array(items) => items.iter().any(says_more),
            _ => false,
        }
    }

    /// Ours and Cedar's reading of the same attributes, as a context and as a resource.
    fn compare(site: &Site, value: &Value) -> bool {
        let Value::Object(map) = value else {
            panic!("{value}")
        };
        let request = |context: Context| {
            let (principal, action, resource) = (
                uid("Agent::\"a\""),
                uid("Action::\"do\""),
                uid("Note::\"n\""),
            );
            Request::new(principal, action, resource, context, Some(&site.schema))
                .map_err(|error| error.to_string())
        };
        let cedar =
            Context::from_json_value(value.clone(), Some((&site.schema, &uid("Action::\"do\""))))
                .map_err(|error| error.to_string())
                .and_then(&request);
        let mut mentioned = Vec::new();
        let ours = site
            .context
            .read(map.iter(), &mut mentioned)
            .map(|values| Context::from_pairs(values).unwrap());
        match (&ours, &cedar) {
            (Ok(ours), Ok(cedar)) => {
                assert_eq!(
                    ours.to_json_value().unwrap(),
                    cedar.context().unwrap().to_json_value().unwrap(),
                    "{value}"
                );
                // What is read is what Cedar itself would have let through.
                assert!(request(ours.clone()).is_ok(), "{value}");
            }
            (Err(_), Err(_)) => {}
            (Err(_), Ok(_)) if says_more(value) => {}
            _ => panic!("{value}: ours {ours:?}, Cedar's {cedar:?}"),
        }
        let described = json!({"uid": {"type": "Note", "id": "n"}, "attrs": value, "parents": []});
        let cedar = Entity::from_json_value(described, Some(&site.schema));
        let read = site
            .note
            .read(map.iter(), &mut mentioned)
            .map(|values| Entity::new_with_tags(uid("Note::\"n\""), values, [], []).unwrap());
        match (&read, &cedar) {
            (Ok(ours), Ok(cedar)) => assert_eq!(
                ours.to_json_value().unwrap(),
                cedar.to_json_value().unwrap(),
                "{value}"
            ),
            (Err(_), Err(_)) => {}
            (Err(_), Ok(_)) if says_more(value) => {}
            _ => panic!("{value}: ours {read:?}, Cedar's {cedar:?}"),
        }
        assert_eq!(ours.is_ok(), read.is_ok());
        ours.is_ok()
    }

    #[test]
    fn each_type_is_read_as_cedar_reads_it() {
        let site = site();
        let agent = json!({"type": "Agent", "id": "x"});
        for (key, good, bad) in [
            (
                "n",
                vec![json!(0), json!(i64::MIN)],
                vec![json!(1.5), json!("1"), json!(null), json!(1_u64 << 63)],
            ),
            (
                "word",
                vec![json!(""), json!("a")],
                vec![json!(1), json!({"__extn": {"fn": "ip", "arg": "::1"}})],
            ),
            (
                "set",
                vec![json!([]), json!([1, 1, 2])],
                vec![json!([1, "2"]), json!({}), json!(1)],
            ),
            (
                "pair",
                vec![
                    json!({"left": 1}),
                    json!({"left": 1, "right": {"pairs": [{"a": true}], "who": agent}}),
                ],
                vec![
                    json!({}),
                    json!({"left": 1, "more": 1}),
                    json!({"left": 1, "right": {"pairs": [{}]}}),
                ],
            ),
            (
                "who",
                vec![agent.clone(), json!({"__entity": agent})],
                vec![
                    json!({"type": "Note", "id": "x"}),
                    json!({"type": "Agent"}),
                    json!("Agent::\"x\""),
                ],
            ),
            (
                "colour",
                vec![json!({"type": "Colour", "id": "red"})],
                vec![
                    json!({"type": "Colour", "id": "blue"}),
                    json!({"__entity": {"type": "Colour", "id": "blue"}}),
                ],
            ),
            ("flag", vec![json!(true)], vec![json!("true"), json!(0)]),
            ("odd key", vec![json!([agent])], vec![json!(agent)]),
            ("undeclared", vec![], vec![json!(1)]),
        ] {
            for (value, expected) in good
                .into_iter()
                .map(|value| (value, true))
                .chain(bad.into_iter().map(|value| (value, false)))
            {
                let mut all = json!({"n": 1});
                all[key] = value.clone();
                assert_eq!(compare(&site, &all), expected, "{key}: {value}");
            }
        }
        assert!(!compare(&site, &json!({})), "a required attribute");
    }

    #[test]
    fn entities_that_are_named_are_mentioned() {
        let site = site();
        let value = json!({"n": 1, "who": {"type": "Agent", "id": "a"},
            "odd key": [{"__entity": {"type": "Agent", "id": "b"}}],
            "pair": {"left": 1, "right": {"who": {"type": "Agent", "id": "c"}}},
            "word": "Agent::\"d\""});
        let mut mentioned = Vec::new();
        site.context
            .read(value.as_object().unwrap().iter(), &mut mentioned)
            .unwrap();
        mentioned.sort_unstable();
        assert_eq!(
            mentioned,
            [
                uid("Agent::\"a\""),
                uid("Agent::\"b\""),
                uid("Agent::\"c\"")
            ]
        );
    }

    #[test]
    fn inv_15_what_stands_beside_an_entity_is_refused() {
        let who = json!({"__entity": {"type": "Agent", "id": "a"}});
        let mut more = who.clone();
        more["id"] = json!("b");
        let read = |who: &Value| {
            let given = json!({"n": 1, "who": who});
            let mut mentioned = Vec::new();
            let read = site()
                .context
                .read(given.as_object().unwrap().iter(), &mut mentioned);
            read.map(drop)
        };
        assert_eq!(read(&who), Ok(()), "the control");
        assert!(read(&more).is_err());
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            Just(json!(1.5)),
            "[a-z]{0,2}".prop_map(Value::from),
            ("Agent|Note|Colour|Robot", "red|a")
                .prop_map(|(kind, id)| json!({"type": kind, "id": id})),
            ("Agent|Colour", "red|a")
                .prop_map(|(kind, id)| json!({"__entity": {"type": kind, "id": id}})),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("left|right|pairs|who|a|type|id|__entity", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_is_sent_is_read_or_refused_as_cedar_does(
            fields in prop::collection::btree_map(
                "n|word|set|pair|who|colour|flag|odd key|more", value(), 0..4,
            ),
        ) {
            let mut all: Map<String, Value> = fields.into_iter().collect();
            all.entry("n".to_owned()).or_insert(json!(1));
            compare(&site(), &Value::Object(all));
        }
    }
}
