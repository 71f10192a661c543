//! What the Cedar engine answers, above all where plain Cedar would answer more freely.
#![cfg(test)]

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_policy::limits::{LEVEL_MAX, REACHED_ENTITIES_MAX, REACHED_FROM_ONE_MAX};
use tidelock_policy::testing::{Authority, template_builder};
use tidelock_policy::{
    BundleBuilder, BundleError, Engine, Evaluation, PolicyRequest, Verdict, VerifiedBundle,
};

const SCHEMA: &str = r#"
type Params = { limit?: Long, mode: String };
type Context = Named;
type Named = { session?: String, params: Params, owner?: Agent };
entity Team { quota: Long };
entity Agent in [Team] { level: Long, manager?: Agent } tags String;
entity Note;
entity File in [Folder] { path: String, ext?: String, size?: Long };
entity Folder in [Folder] { open: Bool };
action "fs";
action "fs.read" in ["fs"] appliesTo { principal: [Agent], resource: [File, Note] };
action "fs.write" in ["fs"] appliesTo { principal: [Agent], resource: [File], context: Context };
action "other" appliesTo { principal: [Agent], resource: [Note], context: { params?: { a: Long } } };
"#;

const ENTITIES: &str = r#"[
  {"uid": {"type": "Team", "id": "core"}, "attrs": {"quota": 7}, "parents": []},
  {"uid": {"type": "Agent", "id": "boss"}, "attrs": {"level": 9}, "parents": []},
  {"uid": {"type": "Agent", "id": "mid"}, "attrs": {"level": 5, "manager": {"type": "Agent", "id": "boss"}},
   "parents": []},
  {"uid": {"type": "Agent", "id": "ann"}, "attrs": {"level": 1, "manager": {"type": "Agent", "id": "mid"}},
   "parents": [{"type": "Team", "id": "core"}], "tags": {"shift": "night"}},
  {"uid": {"type": "Folder", "id": "root"}, "attrs": {"open": true}, "parents": []},
  {"uid": {"type": "Folder", "id": "docs"}, "attrs": {"open": false}, "parents": [{"type": "Folder", "id": "root"}]},
  {"uid": {"type": "File", "id": "/docs/a"}, "attrs": {"path": "/docs/a", "size": 3},
   "parents": [{"type": "Folder", "id": "docs"}]}
]"#;

fn builder(policies: &str) -> BundleBuilder {
    template_builder("engine", "site-1", 0)
        .unwrap()
        .file("schema.cedarschema", SCHEMA.into())
        .file("entities.json", ENTITIES.into())
        .file("policies/base.cedar", policies.into())
        .file("tests/base.json", b"[]".to_vec())
}

fn load(policies: &str) -> Result<VerifiedBundle, BundleError> {
    Authority::new("site-1", 1).unwrap().load(builder(policies))
}

fn bundle(policies: &str) -> VerifiedBundle {
    load(policies).unwrap()
}

fn request(principal: &str, action: &str, resource: (&str, &str)) -> PolicyRequest {
    let attributes = if resource.0 == "File" {
        json!({"path": resource.1})
    } else {
        json!({})
    };
    PolicyRequest {
        principal_type: "Agent".into(),
        principal_id: principal.into(),
        action: action.into(),
        resource_type: resource.0.into(),
        resource_id: resource.1.into(),
        resource_attributes: attributes.as_object().unwrap().clone(),
        params: Value::Null,
        context: Value::Null,
    }
}

fn read(principal: &str, file: &str) -> PolicyRequest {
    request(principal, "fs.read", ("File", file))
}

fn write(params: Value) -> PolicyRequest {
    PolicyRequest {
        params,
        ..request("ann", "fs.write", ("File", "/x"))
    }
}

fn judged(verdict: Verdict, policies: &[&str]) -> Evaluation {
    let policies = policies.iter().map(|id| (*id).to_owned()).collect();
    Evaluation {
        verdict,
        policies,
        errors: Vec::new(),
    }
}

fn error_of(evaluation: &Evaluation) -> &str {
    assert_eq!(evaluation.verdict, Verdict::Error, "{evaluation:?}");
    &evaluation.errors[0]
}

#[test]
fn deny_wins_and_silence_denies() {
    let bundle = bundle(
        "@id(\"b\") permit(principal, action == Action::\"fs.read\", resource);\n\
         permit(principal, action == Action::\"fs.read\", resource);\n\
         @id(\"no\") forbid(principal, action, resource is File) when { resource.path == \"/no\" };",
    );
    assert_eq!(
        bundle.evaluate(&read("ann", "/a")),
        judged(Verdict::Permit, &["b", "base.cedar#2"])
    );
    assert_eq!(
        bundle.evaluate(&read("ann", "/no")),
        judged(Verdict::Forbid, &["no"])
    );
    assert_eq!(
        bundle.evaluate(&write(json!({"mode": "w"}))),
        judged(Verdict::NoMatch, &[])
    );
    assert_eq!(bundle.policy_ids(), ["b", "base.cedar#2", "no"]);
}

/// Cedar skips a policy that errors. If that policy is a `forbid`, skipping it allows what it was
/// written to prevent.
#[test]
fn a_forbid_that_errors_denies() {
    let bundle = bundle(
        "@id(\"all\") permit(principal, action, resource);\n\
         @id(\"senior\") forbid(principal, action, resource) when { principal.level > 8 };",
    );
    assert_eq!(
        bundle.evaluate(&read("ann", "/a")),
        judged(Verdict::Permit, &["all"])
    );
    assert_eq!(
        bundle.evaluate(&read("boss", "/a")),
        judged(Verdict::Forbid, &["senior"])
    );
    // Nothing is known of this principal, so the forbid cannot be evaluated.
    let evaluation = bundle.evaluate(&read("stranger", "/a"));
    assert!(error_of(&evaluation).contains("stranger"), "{evaluation:?}");
    assert!(error_of(&evaluation).starts_with("POLICY_ERROR: "));
    assert_eq!(evaluation.policies, ["senior"]);
}

#[test]
fn a_permit_that_errors_denies_too() {
    let bundle = bundle(
        "@id(\"all\") permit(principal, action, resource is Note);\n\
         @id(\"big\") permit(principal, action, resource is Note)\n\
         when { principal.level * 9223372036854775807 > 0 };",
    );
    let note = |who| request(who, "fs.read", ("Note", "n"));
    assert_eq!(
        bundle.evaluate(&note("ann")),
        judged(Verdict::Permit, &["all", "big"])
    );
    let evaluation = bundle.evaluate(&note("mid"));
    assert!(error_of(&evaluation).contains("overflow"), "{evaluation:?}");
    assert_eq!(evaluation.policies, ["big"]);
}

#[test]
fn requests_that_do_not_fit_the_schema_are_errors() {
    let bundle = bundle("permit(principal, action, resource);");
    assert_eq!(bundle.evaluate(&read("ann", "/a")).verdict, Verdict::Permit);
    type Change = dyn Fn(&mut PolicyRequest);
    let cases: [(&str, &Change); 11] = [
        ("UNKNOWN_ACTION: unknown action `fs.raed`", &|r| {
            r.action = "fs.raed".into()
        }),
        ("unknown action `fs`", &|r| r.action = "fs".into()),
        (
            "REQUEST_MISMATCH: principal: the schema has no entity type `Robot`",
            &|r| r.principal_type = "Robot".into(),
        ),
        ("no entity type `Url`", &|r| r.resource_type = "Url".into()),
        ("no entity type `Agent::X`", &|r| {
            r.principal_type = "Agent::X".into()
        }),
        ("no entity type `Action`", &|r| {
            r.resource_type = "Action".into()
        }),
        ("principal", &|r| r.principal_type = "Team".into()),
        ("path", &|r| r.resource_attributes.clear()),
        ("path", &|r| {
            _ = r.resource_attributes.insert("path".into(), json!(1))
        }),
        ("context", &|r| r.context = json!({"colour": "red"})),
        ("context: must be an object", &|r| r.context = json!([])),
    ];
    for (word, change) in cases {
        let mut request = read("ann", "/a");
        change(&mut request);
        let evaluation = bundle.evaluate(&request);
        assert!(
            error_of(&evaluation).contains(word),
            "{word}: {evaluation:?}"
        );
    }
}

#[test]
fn undeclared_resource_attributes_are_dropped() {
    let bundle = bundle("permit(principal, action, resource is File) when { resource has ext };");
    let mut request = read("ann", "/a.rs");
    assert_eq!(bundle.evaluate(&request).verdict, Verdict::NoMatch);
    request
        .resource_attributes
        .insert("name".into(), json!("a.rs"));
    request
        .resource_attributes
        .insert("nested".into(), json!({"x": 1.5}));
    assert_eq!(bundle.evaluate(&request).verdict, Verdict::NoMatch);
    request
        .resource_attributes
        .insert("ext".into(), json!("rs"));
    assert_eq!(bundle.evaluate(&request).verdict, Verdict::Permit);
}

#[test]
fn params_are_exactly_typed_and_only_where_declared() {
    let bundle = bundle(
        "permit(principal, action == Action::\"fs.write\", resource)\n\
         when { context.params.mode == \"w\" };\n\
         permit(principal, action in [Action::\"fs.read\", Action::\"other\"], resource);",
    );
    assert_eq!(
        bundle.evaluate(&write(json!({"mode": "w"}))).verdict,
        Verdict::Permit
    );
    assert_eq!(
        bundle
            .evaluate(&write(json!({"mode": "w", "limit": 1})))
            .verdict,
        Verdict::Permit
    );
    assert_eq!(
        bundle.evaluate(&write(json!({"mode": "r"}))).verdict,
        Verdict::NoMatch
    );
    for wrong in [
        Value::Null,
        json!({}),
        json!({"mode": 1}),
        json!({"mode": null}),
        json!({"mode": "w", "limit": "1"}),
        json!({"mode": "w", "limit": 1.0}),
        json!({"mode": "w", "limit": 9_223_372_036_854_775_808_u64}),
        json!({"mode": "w", "more": 1}),
        json!({"mode": {"__extn": {"fn": "ip", "arg": "::1"}}}),
        json!({"mode": {"__entity": {"type": "Agent", "id": "boss"}}}),
        json!("w"),
    ] {
        let evaluation = bundle.evaluate(&write(wrong.clone()));
        assert!(
            error_of(&evaluation).contains("context"),
            "{wrong}: {evaluation:?}"
        );
    }
    // Where the schema declares no params they are not looked at, whatever they are.
    let mut free = read("ann", "/a");
    free.params = json!({"anything": [1.5, null]});
    assert_eq!(bundle.evaluate(&free).verdict, Verdict::Permit);
    // The caller's context must not stand in for them.
    for action in ["fs.read", "fs.write"] {
        let mut forged = request("ann", action, ("File", "/x"));
        forged.params = json!({"mode": "r"});
        forged.context = json!({"params": {"mode": "w"}});
        assert!(error_of(&bundle.evaluate(&forged)).contains("must not contain `params`"));
    }
}

#[test]
fn depth_of_values_is_bounded() {
    let bundle = bundle("permit(principal, action, resource);");
    let mut deep = json!(1);
    for _ in 0..100_000 {
        deep = Value::Array(vec![deep]);
    }
    // Reading follows the schema, whose types have an end.
    let mut request = write(json!({"mode": "w"}));
    request.context = Value::Object([("session".to_owned(), deep)].into_iter().collect());
    assert!(error_of(&bundle.evaluate(&request)).contains("expected a string"));
    // Dropping such a value recurses as well; whoever parsed it has to bound it.
    std::mem::forget(request);
}

/// Only the entities that a request can reach are given to Cedar. Each of these looks through a
/// different way of reaching one.
#[test]
fn entities_are_reached_on_every_way() {
    for (policy, ann, stranger) in [
        // The principal's attributes, tags and ancestors.
        ("principal.level == 1", true, None),
        (
            "principal.hasTag(\"shift\") && principal.getTag(\"shift\") == \"night\"",
            true,
            Some(false),
        ),
        ("principal in Team::\"core\"", true, Some(false)),
        // From attribute to attribute, two steps away.
        (
            "principal has manager && principal.manager has manager && \
             principal.manager.manager.level == 9",
            true,
            Some(false),
        ),
        // The resource, known to the bundle: its parents, and attributes that the request left out.
        ("resource in Folder::\"root\"", true, Some(true)),
        ("resource has size && resource.size == 3", true, Some(true)),
        // The action's group.
        ("action in Action::\"fs\"", true, Some(true)),
    ] {
        let text = format!(
            "permit(principal is Agent, action == Action::\"fs.read\", resource is File) when {{ {policy} }};"
        );
        let bundle = bundle(&text);
        let verdict = |who: &str| bundle.evaluate(&read(who, "/docs/a"));
        let expected = if ann {
            Verdict::Permit
        } else {
            Verdict::NoMatch
        };
        assert_eq!(
            verdict("ann").verdict,
            expected,
            "{policy}: {:?}",
            verdict("ann")
        );
        let expected = match stranger {
            Some(true) => Verdict::Permit,
            Some(false) => Verdict::NoMatch,
            None => Verdict::Error,
        };
        assert_eq!(
            verdict("stranger").verdict,
            expected,
            "{policy}: {:?}",
            verdict("stranger")
        );
    }
    // An entity that the context mentions.
    let bundle = bundle(
        "permit(principal, action == Action::\"fs.write\", resource)\n\
         when { context has owner && context.owner.level == 9 };",
    );
    let mut request = write(json!({"mode": "w"}));
    for (owner, expected) in [
        (json!({"type": "Agent", "id": "boss"}), Verdict::Permit),
        (
            json!({"__entity": {"type": "Agent", "id": "boss"}}),
            Verdict::Permit,
        ),
        (json!({"type": "Agent", "id": "ann"}), Verdict::NoMatch),
        (json!({"type": "Agent", "id": "nobody"}), Verdict::Error),
        (json!({"type": "Team", "id": "core"}), Verdict::Error),
    ] {
        request.context = json!({"owner": owner});
        let evaluation = bundle.evaluate(&request);
        assert_eq!(evaluation.verdict, expected, "{owner}: {evaluation:?}");
    }
}

/// A policy may look from the request's own entities as far as the limit says, and at no entity that
/// only it names: what it looks at is what is copied for a request.
#[test]
fn how_far_a_policy_looks_is_bounded_at_load() {
    // `manager` is optional, so each step is guarded: the last guard looks from the last step but one.
    let looking = |steps: usize| {
        let path = |steps: usize| format!("principal{}", ".manager".repeat(steps));
        let guards: Vec<String> = (0..steps)
            .map(|step| format!("{} has manager", path(step)))
            .collect();
        format!(
            "permit(principal is Agent, action == Action::\"fs.read\", resource is File) when {{ {} }};",
            guards.join(" && ")
        )
    };
    let most = usize::try_from(LEVEL_MAX).unwrap();
    assert_eq!(
        bundle(&looking(2)).evaluate(&read("ann", "/a")).verdict,
        Verdict::Permit
    );
    let deepest = bundle(&looking(most));
    // `boss` has no manager.
    assert_eq!(
        deepest.evaluate(&read("ann", "/a")).verdict,
        Verdict::NoMatch
    );
    let refused = |policy: &str| {
        let error = load(policy).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_SCHEMA", "{policy}: {error}");
        error.to_string()
    };
    assert!(refused(&looking(most + 1)).contains("level"));
    for literal in [
        "Team::\"core\".quota == 7",
        "Folder::\"docs\" in Folder::\"root\"",
        "Agent::\"ann\".hasTag(\"shift\")",
        "(if principal.level == 1 then principal else Agent::\"boss\").level == 1",
    ] {
        let policy = |condition: &str| {
            format!("permit(principal is Agent, action, resource is File) when {{ {condition} }};")
        };
        refused(&policy(literal));
        let own = literal
            .replace("Team::\"core\".quota", "principal.level")
            .replace("Folder::\"docs\" in", "resource in")
            .replace("Agent::\"ann\"", "principal")
            .replace("Agent::\"boss\"", "principal");
        bundle(&policy(&own));
    }
}

/// INV-07: entities are copied for each request, so what one brings with it is bounded: at load for
/// those of the bundle, at the request for those that it names.
#[test]
fn inv_07_a_request_reaches_a_bounded_number_of_entities() {
    let schema = "entity Agent { level: Long, peers?: Set<Agent> };
                  entity File;
                  type Context = { params?: { about: Set<Agent> } };
                  action \"fs.read\" appliesTo { principal: [Agent], resource: [File], context: Context };";
    let one_step = "permit(principal, action, resource) when { principal.level == 1 };";
    let two_steps = "permit(principal, action, resource) when {
        principal.level == 1 && principal has peers
        && (principal.peers.isEmpty() || context has params && context.params.about.isEmpty()
            || principal.level == 1)
    };
    forbid(principal, action, resource) when {
        principal has chief && principal.chief.level == 9
    };";
    let loaded = |policies: &str, peers: usize| {
        let agent = |id: usize| json!({"type": "Agent", "id": id.to_string()});
        let mut entities: Vec<Value> = (1..=peers.max(600))
            .map(|id| json!({"uid": agent(id), "attrs": {"level": 1}, "parents": []}))
            .collect();
        let peers: Vec<Value> = (1..=peers).map(agent).collect();
        entities.push(json!({
            "uid": {"type": "Agent", "id": "ann"},
            "attrs": {"level": 1, "peers": peers},
            "parents": [],
        }));
        let bundle = template_builder("engine", "site-1", 0)
            .unwrap()
            .file(
                "schema.cedarschema",
                schema.replace("peers?:", "chief?: Agent, peers?:").into(),
            )
            .file("entities.json", json!(entities).to_string().into())
            .file("policies/base.cedar", policies.into())
            .file("tests/base.json", b"[]".to_vec());
        Authority::new("site-1", 1).unwrap().load(bundle)
    };
    let asked = |about: usize| {
        let about: Vec<Value> = (1..=about)
            .map(|id| json!({"__entity": {"type": "Agent", "id": id.to_string()}}))
            .collect();
        PolicyRequest {
            params: json!({"about": about}),
            ..request("ann", "fs.read", ("File", "/a"))
        }
    };
    let others = REACHED_FROM_ONE_MAX - 1;
    let whole = loaded(two_steps, others).unwrap();
    assert_eq!(whole.evaluate(&asked(0)).verdict, Verdict::Permit);
    let refused = loaded(two_steps, others + 1).unwrap_err();
    assert_eq!(refused.code(), "BUNDLE_FORMAT");
    assert!(refused.to_string().contains("Agent::\"ann\""), "{refused}");
    // Policies that do not look at peers do not reach them.
    let near = loaded(one_step, others + 1).unwrap();
    assert_eq!(near.evaluate(&asked(0)).verdict, Verdict::Permit);

    // The action and the resource count, and ann herself.
    let most = REACHED_ENTITIES_MAX - 3;
    assert_eq!(near.evaluate(&asked(most)).verdict, Verdict::Permit);
    let said = near.evaluate(&asked(most + 1));
    assert_eq!(said.verdict, Verdict::Error);
    assert!(said.errors[0].starts_with("REQUEST_MISMATCH"), "{said:?}");
}

const TEMPLATES: &str = r#"
@id("reader") permit(principal in ?principal, action == Action::"fs.read", resource == ?resource);
@id("locked") forbid(principal == ?principal, action, resource) when { principal.level < 5 };
@id("unused") permit(principal == ?principal, action, resource);
"#;

#[test]
fn templates_decide_through_their_links() {
    let links = json!([
        {"id": "core-reads-a", "template": "reader", "principal": {"type": "Team", "id": "core"},
         "resource": {"type": "File", "id": "/a"}},
        {"id": "mid-reads-a", "template": "reader", "principal": {"type": "Agent", "id": "mid"},
         "resource": {"type": "File", "id": "/a"}},
        {"id": "core-reads-no", "template": "reader", "principal": {"type": "Team", "id": "core"},
         "resource": {"type": "File", "id": "/no"}},
        {"id": "not-mid", "template": "locked", "principal": {"type": "Agent", "id": "mid"}},
        {"id": "not-ann", "template": "locked", "principal": {"type": "Agent", "id": "ann"}},
    ]);
    let linked = |links: &Value| {
        Authority::new("site-1", 1)
            .unwrap()
            .load(builder(TEMPLATES).file("links.json", links.to_string().into_bytes()))
    };
    let bundle = linked(&links).unwrap();
    assert_eq!(
        bundle.policy_ids(),
        [
            "core-reads-a",
            "core-reads-no",
            "mid-reads-a",
            "not-ann",
            "not-mid"
        ]
    );
    assert!(bundle.warnings().iter().any(|w| w.contains("`unused`")));
    assert_eq!(
        bundle.evaluate(&read("mid", "/a")),
        judged(Verdict::Permit, &["mid-reads-a"])
    );
    assert_eq!(
        bundle.evaluate(&read("mid", "/no")),
        judged(Verdict::NoMatch, &[])
    );
    assert_eq!(
        bundle.evaluate(&read("ann", "/a")),
        judged(Verdict::Forbid, &["not-ann"])
    );
    // A link that is wrong in any way is no bundle.
    for (pointer, wrong, code) in [
        ("/0/template", json!("nobody"), "BUNDLE_FORMAT"),
        ("/0/template", json!("core-reads-no"), "BUNDLE_FORMAT"),
        ("/0/id", json!("core-reads-no"), "BUNDLE_FORMAT"),
        ("/0/id", json!("reader"), "BUNDLE_FORMAT"),
        ("/0/id", json!(""), "BUNDLE_FORMAT"),
        ("/0/resource", Value::Null, "BUNDLE_FORMAT"),
        (
            "/3",
            json!({"id": "not-mid", "template": "locked", "principal": {"type": "Agent", "id": "mid"},
                   "resource": {"type": "File", "id": "/a"}}),
            "BUNDLE_FORMAT",
        ),
        ("/0/principal/type", json!("Robot"), "BUNDLE_SCHEMA"),
        ("/0/principal/type", json!("no type"), "BUNDLE_FORMAT"),
        ("/0/principal/id", json!(7), "BUNDLE_FORMAT"),
        (
            "/0",
            json!({"id": "x", "template": "reader", "values": {}}),
            "BUNDLE_FORMAT",
        ),
    ] {
        let mut links = links.clone();
        *links
            .pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer}")) = wrong.clone();
        let error = linked(&links).map(|_| ()).unwrap_err();
        assert_eq!(error.code(), code, "{pointer} {wrong}: {error}");
    }
    // Templates alone decide nothing.
    let error = linked(&json!([])).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("no policy"), "{error}");
}

#[test]
fn a_resource_cannot_contradict_the_bundle() {
    let bundle = bundle("permit(principal, action, resource);");
    let mut request = read("ann", "/docs/a");
    assert_eq!(bundle.evaluate(&request).verdict, Verdict::Permit);
    request.resource_attributes.insert("size".into(), json!(3));
    assert_eq!(bundle.evaluate(&request).verdict, Verdict::Permit);
    request.resource_attributes.insert("size".into(), json!(4));
    assert!(error_of(&bundle.evaluate(&request)).contains("`size` is one value"));
}

/// The policies of an action are chosen at load. The choice must change no answer: compare with an
/// action scope written as a condition, which the choice cannot see.
#[test]
fn choosing_policies_by_action_changes_nothing() {
    let scopes = [
        ("action", "true"),
        (
            "action == Action::\"fs.read\"",
            "action == Action::\"fs.read\"",
        ),
        ("action == Action::\"fs\"", "action == Action::\"fs\""),
        ("action in Action::\"fs\"", "action in Action::\"fs\""),
        (
            "action in [Action::\"fs.write\", Action::\"other\"]",
            "action in [Action::\"fs.write\", Action::\"other\"]",
        ),
        (
            "action in [Action::\"other\"]",
            "action in [Action::\"other\"]",
        ),
    ];
    let mut scoped = String::new();
    let mut conditional = String::new();
    for (number, (scope, condition)) in scopes.iter().enumerate() {
        scoped.push_str(&format!(
            "@id(\"p{number}\") permit(principal, {scope}, resource);\n"
        ));
        conditional.push_str(&format!(
            "@id(\"p{number}\") permit(principal, action, resource) when {{ {condition} }};\n"
        ));
    }
    let (scoped, conditional) = (bundle(&scoped), bundle(&conditional));
    let requests = [
        read("ann", "/a"),
        write(json!({"mode": "w"})),
        PolicyRequest {
            params: json!({"a": 1}),
            ..request("ann", "other", ("Note", "n"))
        },
    ];
    let mut seen = BTreeSet::new();
    for request in &requests {
        let evaluation = scoped.evaluate(request);
        assert_eq!(evaluation, conditional.evaluate(request));
        assert_eq!(evaluation.verdict, Verdict::Permit);
        seen.insert(evaluation.policies);
    }
    assert_eq!(seen.len(), 3);
}

#[test]
fn params_that_are_optional_as_a_whole_are_still_passed() {
    let bundle = bundle(
        "permit(principal, action == Action::\"other\", resource)\n\
         when { context has params && context.params.a == 1 };",
    );
    let other = |params: Value| PolicyRequest {
        params,
        ..request("ann", "other", ("Note", "n"))
    };
    assert_eq!(
        bundle.evaluate(&other(json!({"a": 1}))).verdict,
        Verdict::Permit
    );
    assert_eq!(
        bundle.evaluate(&other(json!({"a": 2}))).verdict,
        Verdict::NoMatch
    );
    assert_eq!(bundle.evaluate(&other(json!({}))).verdict, Verdict::Error);
}

/// Policies of every kind of scope and outcome, forbids and errors too.
const RULES: [&str; 12] = [
    "permit(principal, action, resource);",
    "permit(principal == Agent::\"ann\", action, resource);",
    "permit(principal in Team::\"core\", action == Action::\"fs.read\", resource);",
    "permit(principal is Agent, action in Action::\"fs\", resource is File);",
    "permit(principal, action, resource in Folder::\"root\");",
    "permit(principal, action, resource is File) when { resource has size && resource.size > 2 };",
    "permit(principal, action, resource is Note) when { principal.level * 9223372036854775807 > 0 };",
    "forbid(principal, action, resource is File) when { resource.path == \"/no\" };",
    "forbid(principal, action, resource) when { principal.level > 8 };",
    "forbid(principal == Agent::\"mid\", action == Action::\"fs.write\", resource);",
    "forbid(principal, action, resource == File::\"/docs/a\") unless { principal in Team::\"core\" };",
    "permit(principal, action == Action::\"fs.write\", resource) when { context.params.mode == \"w\" };",
];

/// A bundle of the chosen rules, spread over files as told.
fn spread(chosen: &[bool], files: &[usize]) -> VerifiedBundle {
    let mut texts = vec![String::new(); 3];
    for (number, rule) in RULES.iter().enumerate() {
        if number == 0 || chosen[number] {
            texts[files[number]].push_str(&format!("@id(\"r{number}\") {rule}\n"));
        }
    }
    let files = texts.into_iter().enumerate();
    let builder = files.fold(builder(""), |builder, (number, text)| {
        builder.file(&format!("policies/{number}.cedar"), text.into_bytes())
    });
    Authority::new("site-1", 1).unwrap().load(builder).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same policies, loaded by two nodes, and again from other files: the same answers with
    /// the same reasons and errors, whatever was asked before.
    #[test]
    fn the_same_bundle_and_request_give_the_same_evaluation(
        chosen in prop::collection::vec(any::<bool>(), RULES.len()),
        files in prop::collection::vec(0_usize..3, RULES.len()),
        turn in 0_usize..64,
    ) {
        let bundles = [
            spread(&chosen, &[0; RULES.len()]),
            spread(&chosen, &[0; RULES.len()]),
            spread(&chosen, &files),
        ];
        let mut requests = Vec::new();
        for who in ["ann", "mid", "boss", "stranger"] {
            for file in ["/docs/a", "/no", "/x"] {
                requests.push(read(who, file));
                let mut write = request(who, "fs.write", ("File", file));
                write.params = json!({"mode": "w"});
                requests.push(write);
            }
            requests.push(request(who, "fs.read", ("Note", "n")));
            requests.push(request(who, "fs.write", ("Note", "n")));
            requests.push(request(who, "fs.unknown", ("Note", "n")));
        }
        let first: Vec<Evaluation> = requests.iter().map(|r| bundles[0].evaluate(r)).collect();
        // Another order of questions.
        for number in (0..requests.len()).map(|n| (n * 7 + turn) % requests.len()) {
            for bundle in &bundles {
                prop_assert_eq!(&bundle.evaluate(&requests[number]), &first[number]);
            }
        }
    }
}
