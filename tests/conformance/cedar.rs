//! The scope index against the plain authorizer: on Cedar's own corpus, and on generated policies.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::str::FromStr as _;

use cedar_policy::{
    Authorizer, Context, Decision, Entities, EntityUid, PolicyId, PolicySet, Request, Schema,
    SlotId,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_policy::limits::INDEX_ENTRIES_MAX;
use tidelock_policy::{Joined, ScopeIndex};

/// What the plain authorizer says, in the same form.
fn plain(policies: &PolicySet, request: &Request, entities: &Entities) -> Joined {
    let response = Authorizer::new().is_authorized(request, policies, entities);
    let mut reasons: Vec<PolicyId> = response.diagnostics().reason().cloned().collect();
    reasons.sort_unstable();
    let mut errors: Vec<(PolicyId, String)> = response
        .diagnostics()
        .errors()
        .map(|error| {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(inner) = error;
            (inner.policy_id().clone(), error.to_string())
        })
        .collect();
    errors.sort_unstable();
    Joined {
        decision: response.decision(),
        reasons,
        errors,
    }
}

/// Both agree: decision, reasons, and which policies errored with which words.
fn assert_same(plain: &Joined, indexed: &Joined, what: &dyn std::fmt::Display) {
    assert_eq!(plain.decision, indexed.decision, "{what}");
    assert_eq!(plain.reasons, indexed.reasons, "{what}");
    assert_eq!(plain.errors.len(), indexed.errors.len(), "{what}");
    for (one, other) in plain.errors.iter().zip(&indexed.errors) {
        assert_eq!(one.0, other.0, "{what}");
        // The index adds the causes to the message.
        let message = one.1.replace('\n', " ");
        assert!(other.1.starts_with(&message), "{what}: {one:?} {other:?}");
    }
}

fn uid(value: &Value) -> EntityUid {
    EntityUid::from_json(value.clone()).unwrap()
}

fn ids(values: &Value) -> BTreeSet<String> {
    values
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect()
}

/// One test of the corpus: how many requests were compared, or why it cannot be read.
fn corpus_test(dir: &Path, name: &str) -> Result<usize, String> {
    let read = |ending: &str| std::fs::read_to_string(dir.join(format!("{name}{ending}"))).unwrap();
    let test: Value = serde_json::from_str(&read(".json")).unwrap();
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let policies = PolicySet::from_str(&read(".cedar")).map_err(|error| text(&error))?;
    let (schema, _) =
        Schema::from_cedarschema_str(&read(".cedarschema")).map_err(|error| text(&error))?;
    let entities = Entities::from_json_str(&read(".entities.json"), Some(&schema))
        .map_err(|error| text(&error))?;
    let index = ScopeIndex::new(policies.clone(), &schema.action_entities().unwrap()).unwrap();
    let requests = test["requests"].as_array().unwrap();
    for case in requests {
        let context = Context::from_json_value(case["context"].clone(), None);
        let request = Request::new(
            uid(&case["principal"]),
            uid(&case["action"]),
            uid(&case["resource"]),
            context.map_err(|error| text(&error))?,
            None,
        )
        .map_err(|error| text(&error))?;
        let what = format!("{name}, {}", case["description"]);
        let plain = plain(&policies, &request, &entities);
        let indexed = index.is_authorized(&Authorizer::new(), &request, &entities);
        assert_same(&plain, &indexed, &what);
        for said in [&plain, &indexed] {
            let decision = match said.decision {
                Decision::Allow => "allow",
                Decision::Deny => "deny",
            };
            assert_eq!(case["decision"], decision, "{what}");
            let names = |ids: &mut dyn Iterator<Item = &PolicyId>| -> BTreeSet<String> {
                ids.map(ToString::to_string).collect()
            };
            assert_eq!(
                ids(&case["reason"]),
                names(&mut said.reasons.iter()),
                "{what}"
            );
            let errored = names(&mut said.errors.iter().map(|(id, _)| id));
            assert_eq!(ids(&case["errors"]), errored, "{what}");
        }
    }
    Ok(requests.len())
}

/// Every request of the corpus is decided as Cedar's authors expect, with and without the index.
#[test]
fn the_corpus_is_decided_as_expected_plain_and_indexed() {
    let archive =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/cedar-corpus.tar.gz");
    if !archive.exists() {
        assert!(std::env::var_os("CI").is_none(), "{}", archive.display());
        println!("not run: {} is not there", archive.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unpacked = Command::new("tar")
        .arg("-xzf")
        .arg(&archive)
        .arg("-C")
        .arg(dir.path())
        .status();
    assert!(unpacked.unwrap().success());
    let dir = dir.path().join("cedar-corpus");
    let mut names: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".cedar").map(str::to_owned)
        })
        .collect();
    names.sort_unstable();
    let requests: usize = names
        .iter()
        .map(|name| corpus_test(&dir, name).unwrap_or_else(|why| panic!("{name}: {why}")))
        .sum();
    // All of it.
    assert_eq!((names.len(), requests), (3_820, 30_560));
}

const KINDS: [&str; 3] = ["A", "B", "C"];
const IDS: usize = 4;

/// An entity: kind and id. The last id of each kind is unknown to the entities.
type Name = (usize, usize);

fn shown(name: Name) -> String {
    format!("{}::\"{}\"", KINDS[name.0], name.1)
}

fn json_of(name: Name) -> Value {
    json!({"type": KINDS[name.0], "id": name.1.to_string()})
}

fn name() -> impl Strategy<Value = Name> {
    (0..KINDS.len(), 0..IDS)
}

/// A constraint on principal or resource; a template's slot where the entity is left out.
#[derive(Debug, Clone)]
enum Place {
    Any,
    Is(usize),
    Eq(Name),
    In(Name),
    IsIn(usize, Name),
    EqSlot(Name),
    InSlot(Name),
    IsInSlot(usize, Name),
}

impl Place {
    fn text(&self, var: &str) -> String {
        match self {
            Self::Any => var.to_owned(),
            Self::Is(kind) => format!("{var} is {}", KINDS[*kind]),
            Self::Eq(name) => format!("{var} == {}", shown(*name)),
            Self::In(name) => format!("{var} in {}", shown(*name)),
            Self::IsIn(kind, name) => format!("{var} is {} in {}", KINDS[*kind], shown(*name)),
            Self::EqSlot(_) => format!("{var} == ?{var}"),
            Self::InSlot(_) => format!("{var} in ?{var}"),
            Self::IsInSlot(kind, _) => format!("{var} is {} in ?{var}", KINDS[*kind]),
        }
    }

    fn slot(&self) -> Option<Name> {
        match self {
            Self::EqSlot(name) | Self::InSlot(name) | Self::IsInSlot(_, name) => Some(*name),
            _ => None,
        }
    }
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => Just(Place::Any),
        2 => (0..KINDS.len()).prop_map(Place::Is),
        3 => name().prop_map(Place::Eq),
        3 => name().prop_map(Place::In),
        2 => (0..KINDS.len(), name()).prop_map(|(kind, name)| Place::IsIn(kind, name)),
        1 => name().prop_map(Place::EqSlot),
        1 => name().prop_map(Place::InSlot),
        1 => (0..KINDS.len(), name()).prop_map(|(kind, name)| Place::IsInSlot(kind, name)),
    ]
}

const ACTIONS: [&str; 6] = [
    "action",
    "action == Action::\"read\"",
    "action == Action::\"all\"",
    "action in Action::\"some\"",
    "action in Action::\"all\"",
    "action in [Action::\"write\", Action::\"some\", Action::\"nothing\"]",
];

/// True, false, erring, and depending on the request.
const CONDITIONS: [&str; 10] = [
    "",
    "",
    "when { false }",
    "when { principal.missing }",
    "when { context.n + 9223372036854775807 > 0 }",
    "when { context.n > 1 }",
    "unless { context.n > 1 }",
    "when { principal in resource }",
    "when { resource has level && resource.level > 1 }",
    "unless { resource.level > 1 }",
];

#[derive(Debug, Clone)]
struct Rule {
    permit: bool,
    principal: Place,
    action: usize,
    resource: Place,
    condition: usize,
}

fn rule() -> impl Strategy<Value = Rule> {
    (
        prop::bool::weighted(0.7),
        place(),
        0..ACTIONS.len(),
        place(),
        0..CONDITIONS.len(),
    )
        .prop_map(|(permit, principal, action, resource, condition)| Rule {
            permit,
            principal,
            action,
            resource,
            condition,
        })
}

fn policy_set(rules: &[Rule]) -> PolicySet {
    let mut text = String::new();
    for rule in rules {
        writeln!(
            text,
            "{}({}, {}, {}) {};",
            if rule.permit { "permit" } else { "forbid" },
            rule.principal.text("principal"),
            ACTIONS[rule.action],
            rule.resource.text("resource"),
            CONDITIONS[rule.condition],
        )
        .unwrap();
    }
    let mut set = PolicySet::from_str(&text).unwrap();
    for (number, rule) in rules.iter().enumerate() {
        let values: std::collections::HashMap<SlotId, EntityUid> = [
            (SlotId::principal(), rule.principal.slot()),
            (SlotId::resource(), rule.resource.slot()),
        ]
        .into_iter()
        .filter_map(|(slot, name)| Some((slot, uid(&json_of(name?)))))
        .collect();
        if !values.is_empty() {
            let template = PolicyId::new(format!("policy{number}"));
            set.link(template, PolicyId::new(format!("link{number}")), values)
                .unwrap();
        }
    }
    set
}

/// Entities with a level each, and parents that only point onwards, so that there is no cycle; and
/// the actions.
fn entities(parents: &[BTreeSet<usize>]) -> Entities {
    let known = KINDS.len() * (IDS - 1);
    let at = |number: usize| (number % KINDS.len(), number / KINDS.len());
    let mut all: Vec<Value> = (0..known)
        .map(|number| {
            let parents: Vec<Value> = parents[number]
                .iter()
                .filter(|parent| **parent > number)
                .map(|parent| json_of(at(*parent)))
                .collect();
            json!({"uid": json_of(at(number)), "attrs": {"level": number % 4}, "parents": parents})
        })
        .collect();
    let action = |id: &str, parents: &[&str]| {
        let parents: Vec<Value> = parents
            .iter()
            .map(|id| json!({"type": "Action", "id": id}))
            .collect();
        json!({"uid": {"type": "Action", "id": id}, "attrs": {}, "parents": parents})
    };
    all.extend([
        action("read", &["some"]),
        action("write", &["all"]),
        action("some", &["all"]),
        action("all", &[]),
    ]);
    Entities::from_json_value(Value::Array(all), None).unwrap()
}

fn actions() -> Entities {
    let (schema, _) = Schema::from_cedarschema_str(
        "entity E; action all; action some in [all]; \
         action read in [some] appliesTo { principal: E, resource: E }; \
         action write in [all] appliesTo { principal: E, resource: E };",
    )
    .unwrap();
    schema.action_entities().unwrap()
}

fn request(principal: Name, action: &str, resource: Name, n: i64) -> Request {
    Request::new(
        uid(&json_of(principal)),
        uid(&json!({"type": "Action", "id": action})),
        uid(&json_of(resource)),
        Context::from_json_value(json!({"n": n}), None).unwrap(),
        None,
    )
    .unwrap()
}

fn compare_all(rules: &[Rule], parents: &[BTreeSet<usize>]) {
    let policies = policy_set(rules);
    let entities = entities(parents);
    let index = ScopeIndex::new(policies.clone(), &actions()).unwrap();
    assert_eq!(
        index.policy_set().num_of_policies(),
        policies.num_of_policies()
    );
    for kind in 0..KINDS.len() {
        for id in 0..IDS {
            // Every principal with every resource, the actions and contexts in turn.
            for number in 0..KINDS.len() * IDS {
                let resource = (number % KINDS.len(), number / KINDS.len());
                let turn = id + number;
                let action = ["read", "write", "some", "unknown"][turn % 4];
                let n = [0, 2][turn % 2];
                let request = request((kind, id), action, resource, n);
                let what = format!("{} {action} {}", shown((kind, id)), shown(resource));
                let plain = plain(&policies, &request, &entities);
                let indexed = index.is_authorized(&Authorizer::new(), &request, &entities);
                assert_same(&plain, &indexed, &what);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Hierarchies, `is`, `is … in`, action groups, templates, unspecified places, forbids, policies
    /// that err: whatever the index leaves out would have been false and silent.
    #[test]
    fn the_index_changes_no_answer(
        rules in prop::collection::vec(rule(), 0..60),
        parents in prop::collection::vec(
            prop::collection::btree_set(0..KINDS.len() * (IDS - 1), 0..3),
            KINDS.len() * (IDS - 1),
        ),
    ) {
        compare_all(&rules, &parents);
    }
}

/// So many pairs of action and scope that all actions share one index.
#[test]
fn an_index_that_would_be_too_large_is_shared_and_changes_no_answer() {
    let actions = 400;
    let common = INDEX_ENTRIES_MAX / actions + 8;
    let mut schema = String::from("entity A, B, C;");
    let mut text = String::new();
    for number in 0..actions {
        write!(
            schema,
            "action a{number} appliesTo {{ principal: [A], resource: [B] }};"
        )
        .unwrap();
        writeln!(
            text,
            "permit(principal, action == Action::\"a{number}\", resource) when {{ context.n > 1 }};"
        )
        .unwrap();
    }
    for number in 0..common {
        writeln!(
            text,
            "forbid(principal == A::\"{number}\", action, resource);"
        )
        .unwrap();
    }
    let (schema, _) = Schema::from_cedarschema_str(&schema).unwrap();
    let policies = PolicySet::from_str(&text).unwrap();
    let index = ScopeIndex::new(policies.clone(), &schema.action_entities().unwrap()).unwrap();
    let entities = Entities::empty();
    let mut seen = BTreeSet::new();
    for (action, principal, n) in [("a0", 0, 2), ("a399", common + 1, 2), ("a7", common + 1, 0)] {
        let request = Request::new(
            uid(&json!({"type": "A", "id": principal.to_string()})),
            uid(&json!({"type": "Action", "id": action})),
            uid(&json_of((1, 0))),
            Context::from_json_value(json!({"n": n}), None).unwrap(),
            None,
        )
        .unwrap();
        let plain = plain(&policies, &request, &entities);
        let indexed = index.is_authorized(&Authorizer::new(), &request, &entities);
        assert_same(&plain, &indexed, &action);
        seen.insert((plain.decision == Decision::Allow, plain.reasons.len()));
    }
    assert_eq!(seen.len(), 3, "a forbid, a permit and silence");
}
