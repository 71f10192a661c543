//! Bundles that must not decide, and plans that must not act.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::fs;

use common::{Site, free_udp, openssl, until};
use rustix::process::Signal;
use serde_json::{Value, json};

#[test]
fn a_bundle_that_fails_a_check_is_named_by_its_code_and_the_active_one_stays() {
    let site = Site::new();
    let key = "policy.key";
    let epoch = |n: u64| move |m: &mut Value| m["epoch"] = json!(n);
    site.bundle("active.tar", key, epoch(3));
    site.bundle("older.tar", key, epoch(2));
    site.bundle("conflict.tar", key, |m| {
        m["epoch"] = json!(3);
        m["version"] = json!("9.9.9");
    });
    site.bundle("lagoon.tar", key, |m| {
        m["epoch"] = json!(4);
        m["domain"] = json!("lagoon");
    });
    site.bundle("newer-node.tar", key, |m| {
        m["epoch"] = json!(4);
        m["min_node_version"] = json!("99.0.0");
    });
    site.signing_key("stranger.key");
    site.bundle("stranger.tar", "stranger.key", epoch(4));
    site.bundle("unsigned.tar", key, epoch(4));
    fs::remove_file(site.path("unsigned.tar.sig")).unwrap();
    site.bundle("changed.tar", key, epoch(4));
    let mut bytes = fs::read(site.path("changed.tar")).unwrap();
    bytes[600] ^= 1;
    fs::write(site.path("changed.tar"), bytes).unwrap();
    site.write("text.tar", "no archive at all");
    site.ok(&["bundle", "sign", "text.tar", "--key", key]);
    let policy = site.read("policy/policies/base.cedar");
    site.write(
        "policy/policies/base.cedar",
        "permit (principal, action, resource) when {",
    );
    site.bundle("syntax.tar", key, epoch(4));
    site.write(
        "policy/policies/base.cedar",
        "permit (principal, action, resource) when { resource.colour == 1 };",
    );
    site.bundle("schema.tar", key, epoch(4));
    site.write(
        "policy/policies/base.cedar",
        "permit (principal, action, resource);",
    );
    site.bundle("tests.tar", key, epoch(4));
    site.write("policy/policies/base.cedar", &policy);
    site.bundle("next.tar", key, epoch(4));

    let _node = site.start();
    site.ok(&["bundle", "install", "active.tar", "--apply"]);
    let active = site.status()["bundle"].clone();
    assert_eq!(active["epoch"], 3);
    for (archive, code) in [
        ("older.tar", "BUNDLE_EPOCH"),
        ("conflict.tar", "BUNDLE_CONFLICT"),
        ("lagoon.tar", "BUNDLE_DOMAIN"),
        ("newer-node.tar", "BUNDLE_NODE_VERSION"),
        ("stranger.tar", "BUNDLE_SIGNATURE"),
        ("unsigned.tar", "BUNDLE_SIGNATURE"),
        ("changed.tar", "BUNDLE_SIGNATURE"),
        ("text.tar", "BUNDLE_FORMAT"),
        ("syntax.tar", "BUNDLE_COMPILE"),
        ("schema.tar", "BUNDLE_SCHEMA"),
        ("tests.tar", "BUNDLE_TESTS"),
    ] {
        // The plan says it already; the act says it and records it.
        site.tidelock(&["bundle", "install", archive])
            .ended(1)
            .says(&[code]);
        let rejected = site.events("bundle_rejected").len();
        site.tidelock(&["bundle", "install", archive, "--apply"])
            .ended(1)
            .says(&[code]);
        let failed = site.tidelock(&["bundle", "install", archive, "--apply", "--json"]);
        assert!(
            failed.ended(1).json()["error"]
                .as_str()
                .unwrap()
                .contains(code)
        );
        let events = site.events("bundle_rejected");
        assert_eq!(events.len(), rejected + 2, "{archive}");
        assert_eq!(events[rejected]["code"], code, "{archive}");
        assert_eq!(site.status()["bundle"], active, "{archive}");
        site.decides();
    }
    site.tidelock(&["bundle", "install", "nowhere.tar", "--apply"])
        .ended(2)
        .says(&["nowhere.tar"]);

    // The controls: the same content again (ruling 13), and a newer epoch.
    site.ok(&["bundle", "install", "active.tar", "--apply"]);
    assert_eq!(site.status()["bundle"], active);
    site.ok(&["bundle", "install", "next.tar", "--apply"]);
    assert_eq!(site.status()["bundle"]["epoch"], 4);
    site.decides();
}

#[test]
fn a_plan_shows_what_a_bundle_changes_and_is_acted_on_only_while_it_holds() {
    let site = Site::new();
    let _node = site.start_deciding();
    site.decides();
    // Epoch 2 forbids what was allowed, and allows what was not.
    let policy = site.read("policy/policies/base.cedar");
    let other = policy.replace("\"/srv/*\"", "\"/etc/*\"");
    assert_ne!(other, policy);
    let tests = site.read("policy/tests/base.json");
    site.write("policy/tests/base.json", "[]");
    site.write("policy/policies/base.cedar", &other);
    let epoch = |epoch: u64| move |manifest: &mut Value| manifest["epoch"] = json!(epoch);
    site.bundle("site-2.tar", "policy.key", epoch(2));
    site.bundle("site-3.tar", "policy.key", epoch(3));

    let plan = site.json(&["policy", "plan", "site-2.tar"]);
    assert_eq!(plan["activate"]["epoch"], 2);
    assert_eq!(plan["replaces"]["epoch"], 1);
    assert_eq!(plan["changes"]["manifest"]["epoch"], json!([1, 2]));
    assert_eq!(plan["changes"]["policies"]["changed"], json!(["read-srv"]));
    assert_eq!(
        plan["changes"]["files"]["changed"],
        json!(["tests/base.json"])
    );
    let replay = &plan["replay"];
    assert_eq!(
        (&replay["deny_to_allow"], &replay["allow_to_deny"]),
        (&json!(1), &json!(1))
    );
    let left_out = replay["not_asked"]["no_decision"].as_u64().unwrap();
    assert!(left_out > 0, "{replay}");
    assert_eq!(
        (&replay["asked"], &replay["callers"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(replay["records_read"], left_out + 2);
    assert_eq!(replay["older_unread"], false);
    let flips = replay["flips"].as_array().unwrap();
    assert_eq!(
        flips[0]["resource"]["id"], "/etc/shadow",
        "the newest first"
    );
    assert_eq!(flips[0]["before"]["verdict"], "no_match");
    assert_eq!(flips[0]["after"]["verdict"], "permit");
    let printed = site.ok(&["policy", "plan", "site-2.tar"]);
    printed.says(&[
        "read-srv",
        "/etc/shadow",
        plan["plan"].as_str().unwrap(),
        "--apply",
    ]);
    let replayed = site
        .tidelock(&["policy", "replay", "site-2.tar", "--json"])
        .ended(1);
    assert_eq!(replayed.json(), *replay);
    let none = site.json(&["policy", "replay", "site-2.tar", "--replay", "0"]);
    assert_eq!(
        (&none["asked"], &none["records_read"]),
        (&json!(0), &json!(0))
    );
    // One action is one, however many events were recorded since.
    let one = site
        .tidelock(&["policy", "replay", "site-2.tar", "--replay", "1", "--json"])
        .ended(1)
        .json();
    assert_eq!(one["asked"], 1);

    // Nothing was done yet. The controls: what decides now comes out the same, and differs in nothing.
    site.decides();
    let same = site.json(&["policy", "plan", "site-1.tar"]);
    assert_eq!(same["replay"]["flips"], json!([]));
    assert_eq!(same["changes"]["policies"]["changed"], json!([]));
    site.ok(&["policy", "diff", "site-1.tar", "site-1.tar"])
        .says(&["nothing differs"]);
    site.tidelock(&["policy", "diff", "site-1.tar", "site-2.tar"])
        .ended(1)
        .says(&["read-srv", "-", "+"]);

    let digest = plan["plan"].as_str().unwrap();
    let activate = |archive: &str, plan: &str| {
        site.tidelock(&["policy", "activate", archive, "--plan", plan, "--apply"])
    };
    site.tidelock(&["policy", "activate", "site-2.tar", "--apply"])
        .ended(2);
    for (archive, plan) in [("site-2.tar", "0123456789abcdef"), ("site-3.tar", digest)] {
        activate(archive, plan).ended(1).says(&["PLAN_STALE"]);
        let rejected = site.events("bundle_rejected");
        assert_eq!(rejected.last().unwrap()["code"], "PLAN_STALE");
        site.decides();
    }
    activate("site-2.tar", digest).ended(0);
    assert_eq!(site.may_read("/etc/shadow").0, "allow");
    assert_eq!(site.may_read("/srv/a.txt").0, "deny");
    site.ok(&["policy", "status"])
        .says(&["epoch", "2", "active"]);
    // The plan was made for another bundle in its place: it does not hold any more.
    site.write("policy/policies/base.cedar", &policy);
    site.write("policy/tests/base.json", &tests);
    activate("site-2.tar", digest)
        .ended(1)
        .says(&["PLAN_STALE"]);
    let three = site.json(&["policy", "activate", "site-3.tar"]);
    site.bundle("site-4.tar", "policy.key", epoch(4));
    site.ok(&["bundle", "install", "site-4.tar", "--apply"]);
    let late = three["plan"].as_str().unwrap();
    activate("site-3.tar", late)
        .ended(1)
        .says(&["BUNDLE_EPOCH"]);
    site.decides();
}

const REGO: &str = r#"package tidelock

decision := {"allow": allow, "deny": deny, "policies": {"srv"}}

default allow := false

allow if {
	startswith(input.resource.attributes.path, "/srv/")
	input.context.tidelock.posture == "normal"
}

deny contains "secrets" if contains(input.resource.id, "secret")
"#;

const REGO_INPUT: &str = r#"{"format": 1, "actions": {"fs.read": {
  "principal": ["Agent"], "resource": ["File"],
  "attributes": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
  "context": {"type": "object", "properties": {"tidelock": {"type": "object", "properties": {
    "posture": {"type": "string"}, "policy_age_s": {"type": "integer"}}}}}
}}}"#;

/// Both lanes in a real node, compiled by its confined worker.
#[test]
fn rego_decides_alone_and_beside_cedar_and_a_forbid_of_either_wins() {
    let site = Site::new();
    let _node = site.start_deciding();
    let manifest = site.read("policy/manifest.json");
    fs::remove_dir_all(site.path("policy")).unwrap();
    fs::create_dir_all(site.path("policy/policies")).unwrap();
    fs::create_dir_all(site.path("policy/tests")).unwrap();
    site.write("policy/manifest.json", &manifest);
    site.write("policy/tests/base.json", "[]");
    site.write("policy/input-schema.json", REGO_INPUT);
    site.write("policy/policies/base.rego", REGO);
    let install = |archive: &str, epoch: u64, engine: &str| {
        site.bundle(archive, "policy.key", |manifest| {
            manifest["epoch"] = json!(epoch);
            manifest["engine"] = json!(engine);
        });
        site.ok(&["bundle", "install", archive, "--apply"]);
        assert_eq!(site.status()["bundle"]["epoch"], epoch);
    };
    let says = |path: &str, decision: &str, reason: &str| {
        assert_eq!(
            site.may_read(path),
            (decision.to_owned(), reason.to_owned()),
            "{path}"
        );
    };
    install("rego-2.tar", 2, "rego");
    site.decides();
    says("/srv/secret", "deny", "POLICY_DENY");
    site.write("ask.json", &common::read_action("/etc/shadow").to_string());
    site.tidelock(&["decide", "--explain", "ask.json"])
        .ended(3)
        .says(&["NO_MATCH"]);
    let explained = |path: &str| {
        site.write("ask.json", &common::read_action(path).to_string());
        let ran = site.tidelock(&["decide", "--explain", "ask.json", "--json"]);
        ran.ended(3).json()["explanation"].clone()
    };
    let silent = explained("/etc/shadow");
    assert_eq!(silent["nearest"], json!([]));
    let way = silent["to_allow"][0].as_str().unwrap();
    assert!(
        way.contains("`allow` of data.tidelock.decision") && way.contains("cannot be told"),
        "{way}"
    );
    assert_eq!(
        explained("/srv/secret")["to_allow"],
        json!(["`deny` of data.tidelock.decision must not hold `secrets`"])
    );
    site.tidelock(&["policy", "plan", "site-1.tar", "--replay", "0"])
        .ended(1)
        .says(&["BUNDLE_EPOCH"]);

    let schema = "entity Agent; entity File { path: String };\n\
         action \"fs.read\" appliesTo { principal: [Agent], resource: [File] };";
    site.write("policy/schema.cedarschema", schema);
    site.write(
        "policy/policies/base.cedar",
        "@id(\"all\") permit(principal, action, resource);\n\
         @id(\"no-keys\") forbid(principal, action, resource) when { resource.path like \"*.key\" };",
    );
    // Both lanes are told what the node says of itself, or neither.
    site.bundle("odd-3.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(3);
        manifest["engine"] = json!("cedar+rego");
    });
    site.tidelock(&["bundle", "install", "odd-3.tar", "--apply"])
        .ended(1)
        .says(&["BUNDLE_SCHEMA", "tidelock"]);
    let context = "context: { tidelock: { posture: String, policy_age_s: Long } } };";
    site.write(
        "policy/schema.cedarschema",
        &schema.replace(
            "resource: [File] };",
            &format!("resource: [File], {context}"),
        ),
    );
    install("both-3.tar", 3, "cedar+rego");
    says("/srv/a.txt", "allow", "POLICY_ALLOW");
    says("/srv/a.key", "deny", "POLICY_DENY");
    says("/srv/secret", "deny", "POLICY_DENY");
    // A permit of one lane is enough where the other is silent.
    says("/etc/shadow", "allow", "POLICY_ALLOW");

    // What errs in one lane denies, whatever the other permits.
    let errs = REGO.replace(
        "contains(input.resource.id, \"secret\")",
        "to_number(input.resource.id) > 1",
    );
    site.write("policy/policies/base.rego", &errs);
    install("both-4.tar", 4, "cedar+rego");
    says("/srv/a.txt", "deny", "EVALUATION_ERROR");
    says("/srv/a.key", "deny", "POLICY_DENY");
}

#[test]
fn without_a_trust_file_the_node_runs_and_denies_everything() {
    let site = Site::new();
    fs::rename(site.path("trust.toml"), site.path("aside.toml")).unwrap();
    let node = site.start();
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(site.may_read("/srv/a.txt"), denied);
    let faults = site.events("policy_trust_unusable");
    assert!(
        faults[0]["why"].as_str().unwrap().contains("trust.toml"),
        "{faults:?}"
    );
    site.tidelock(&["bundle", "install", "site-1.tar", "--apply"])
        .ended(1)
        .says(&["NO_TRUST", "policy.trust"]);
    assert_eq!(site.status()["bundle"], Value::Null);
    site.tidelock(&["doctor"]).ended(1).says(&["trust.toml"]);

    fs::rename(site.path("aside.toml"), site.path("trust.toml")).unwrap();
    node.reload("reloaded");
    assert_eq!(
        site.may_read("/srv/a.txt"),
        denied,
        "trust alone allows nothing"
    );
    site.ok(&["bundle", "install", "site-1.tar", "--apply"]);
    site.decides();

    // What was installed does not decide without the keys that vouched for it.
    assert!(node.stop().success());
    fs::rename(site.path("trust.toml"), site.path("aside.toml")).unwrap();
    let node = site.start();
    assert_eq!(site.may_read("/srv/a.txt"), denied);
    fs::rename(site.path("aside.toml"), site.path("trust.toml")).unwrap();
    node.reload("reloaded");
    site.decides();

    // A trust file of another domain is none.
    assert!(node.stop().success());
    let trust = site.read("trust.toml");
    site.write("trust.toml", &trust.replace("harbour\"", "lagoon\""));
    let node = site.start();
    assert_eq!(site.may_read("/srv/a.txt"), denied);
    site.write("trust.toml", &trust);
    node.reload("reloaded");
    site.decides();
}

/// Everything that a plan must leave as it is.
fn state(site: &Site) -> Value {
    let status = site.status();
    json!({
        "bundle": status["bundle"],
        "crls": status["crls"],
        "records": status["audit"]["records"],
        "suspect": status["clock"]["suspect"],
        "segments": site.json(&["segment", "ls"]),
        "ca": site.json(&["ca", "list"]),
        "index": site.read("ca/index.json"),
        "crl": site.read("ca/crl.pem"),
    })
}

#[test]
fn a_plan_changes_nothing_and_the_act_does() {
    let site = Site::new();
    let _node = site.start();
    site.ok(&["ca", "revoke", "--dir", "ca", "a"])
        .says(&["--apply"]);
    // A CRL that the node does not have yet, and revokes nobody: the node stays in the mesh.
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b", "--out", "b"]);
    site.ok(&["ca", "crl", "--dir", "ca"]);
    for (plan, shown) in [
        (
            ["bundle", "install", "site-1.tar"].as_slice(),
            "site epoch 1",
        ),
        (&["crl", "import", "ca/crl.pem"], "\"number\":2"),
        (&["ca", "revoke", "--dir", "ca", "b"], "b"),
        (&["clock", "accept"], "trusted_unix_ms"),
    ] {
        let before = state(&site);
        site.ok(plan).says(&["--apply", shown]);
        let planned = site.json(plan);
        assert!(planned.is_object());
        assert_eq!(state(&site), before, "{plan:?} only planned");

        let act = [plan, &["--apply"]].concat();
        let done = site.ok(&act);
        assert!(!done.out.contains("act with --apply"), "{done:?}");
        assert_ne!(state(&site), before, "{plan:?} acted");
    }
    assert_eq!(site.status()["bundle"]["epoch"], 1);
    assert_eq!(site.status()["crls"][0]["number"], 2);
    assert_eq!(site.events("clock_accepted").len(), 1);
    let listed = site.json(&["ca", "list"]);
    let revoked = listed["issued"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|i| i["revoked_unix_s"].is_u64());
    assert_eq!(revoked.count(), 1);
    // Nothing to revoke is an error of its own, planned or not.
    site.tidelock(&["ca", "revoke", "--dir", "ca", "nobody"])
        .ended(2)
        .says(&["nobody"]);
    site.tidelock(&["ca", "revoke", "--dir", "ca", "nobody", "--apply"])
        .ended(2);
    // A CRL that is born expired closes meshes: it is not made.
    let born_dead = site.tidelock(&["ca", "crl", "--dir", "ca", "--days", "0"]);
    born_dead.ended(2).says(&["--days"]);
}

/// Bundles of this site that allow `/etc` instead of `/srv`, by epoch: `site-2.tar`, ….
fn turned(site: &Site, epochs: &[u64]) {
    let policy = site.read("policy/policies/base.cedar");
    let tests = site.read("policy/tests/base.json");
    site.write("policy/tests/base.json", "[]");
    site.write(
        "policy/policies/base.cedar",
        &policy.replace("\"/srv/*\"", "\"/etc/*\""),
    );
    for epoch in epochs {
        site.bundle(&format!("site-{epoch}.tar"), "policy.key", |manifest| {
            manifest["epoch"] = json!(epoch);
        });
    }
    site.write("policy/policies/base.cedar", &policy);
    site.write("policy/tests/base.json", &tests);
}

fn source(site: &Site) -> (Value, Value) {
    let bundle = site.status()["bundle"].clone();
    (bundle["epoch"].clone(), bundle["source"].clone())
}

#[test]
fn inv_16_going_back_holds_over_a_kill_a_reload_and_the_same_bundle_again() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    let alone = site.tidelock(&["policy", "rollback"]).ended(1);
    alone.says(&["POLICY_NO_FALLBACK", "new epoch"]);
    turned(&site, &[2, 3]);
    let plan = site.json(&["policy", "plan", "site-2.tar"]);
    assert_eq!(plan["blocked"], Value::Null, "flips are reported only");
    let plan = plan["plan"].as_str().unwrap().to_owned();
    let activated = site.ok(&[
        "policy",
        "activate",
        "site-2.tar",
        "--plan",
        &plan,
        "--apply",
    ]);
    let undo = activated
        .out
        .lines()
        .find_map(|line| line.strip_prefix("to undo it: "))
        .unwrap()
        .to_owned();
    let activations = site.events("bundle_activated");
    assert_eq!(activations[0]["undo"], Value::Null);
    assert_eq!(activations[1]["undo"], undo.as_str());
    assert_eq!(site.may_read("/etc/shadow").0, "allow");

    // Looking changes nothing, and another plan does nothing.
    let look = site.json(&["policy", "rollback"]);
    assert_eq!(
        (&look["sets_aside"]["epoch"], &look["serves"]["epoch"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(look["posture"], "restricted");
    assert!(undo.contains(look["plan"].as_str().unwrap()), "{undo}");
    site.ok(&["policy", "rollback"])
        .says(&["--plan", "read-srv"]);
    site.tidelock(&["policy", "rollback", "--plan", &plan, "--apply"])
        .ended(1)
        .says(&["PLAN_STALE"]);
    assert_eq!(source(&site), (json!(2), json!("active")));

    // The printed command, as it stands.
    let mut words: Vec<&str> = undo.split(' ').skip(1).collect();
    words.extend(["--reason", "orders fail"]);
    site.ok(&words).says(&["restricted"]);
    let rolled_back = |what: &str| {
        assert_eq!(
            source(&site),
            (json!(1), json!("last_known_good")),
            "{what}"
        );
        let status = site.status();
        assert_eq!(status["posture"], "restricted", "{what}");
        let aside = &status["activation"]["set_aside"];
        assert_eq!(
            (&aside["epoch"], &aside["cause"], &aside["reason"]),
            (&json!(2), &json!("operator"), &json!("orders fail")),
            "{what}"
        );
        site.decides();
    };
    rolled_back("by plan");
    let recorded = site.events("policy_rolled_back");
    assert_eq!(recorded[0]["reason"], "orders fail");
    site.ok(&["policy", "status"])
        .says(&["set aside", "orders fail"]);
    site.tidelock(&["doctor"])
        .says(&["was set aside by operator"]);
    site.tidelock(&["policy", "rollback"])
        .ended(1)
        .says(&["POLICY_NOT_ACTIVE"]);
    // A restart that nobody prepared, a reload, and the same bundle again.
    node.end(Signal::KILL);
    let node = site.start();
    rolled_back("after a kill");
    node.reload("reloaded");
    rolled_back("after a reload");
    site.tidelock(&["bundle", "install", "site-2.tar", "--apply"])
        .ended(1)
        .says(&["POLICY_SET_ASIDE"]);
    site.tidelock(&[
        "policy",
        "activate",
        "site-2.tar",
        "--plan",
        &plan,
        "--apply",
    ])
    .ended(1)
    .says(&["PLAN_STALE"]);
    rolled_back("after it was offered again");

    // The controls: an operator's plan brings it back, and after another rollback a higher epoch ends it.
    let again = site.json(&["policy", "plan", "site-2.tar"]);
    let again = again["plan"].as_str().unwrap();
    site.ok(&[
        "policy",
        "activate",
        "site-2.tar",
        "--plan",
        again,
        "--apply",
    ]);
    assert_eq!(source(&site), (json!(2), json!("active")));
    let back = site.json(&["policy", "rollback"]);
    let back = back["plan"].as_str().unwrap();
    site.ok(&["policy", "rollback", "--plan", back, "--apply"]);
    site.ok(&["bundle", "install", "site-3.tar", "--apply"]);
    assert_eq!(source(&site), (json!(3), json!("active")));
    assert_eq!(site.status()["activation"]["set_aside"], Value::Null);
    // What was set aside never stands behind what came after it.
    assert_eq!(site.status()["activation"]["standby"]["epoch"], 1);
}

/// A policy that is right and takes far longer than a caller has for what is below `/srv`: some hundred times it
/// searches a long text.
const SLOW: &str = r#"package tidelock

decision := {"allow": allow, "deny": set(), "policies": {"slow"}}

default allow := false

allow if {
	startswith(input.resource.attributes.path, "/srv/")
	found := [i | some i in numbers.range(1, 400); not contains(data.text, sprintf("aaaaaaa%d", [i]))]
	count(found) == 400
}
"#;

/// Makes `slow.tar`, of epoch 2, out of such a policy, and leaves its parts for others.
fn slow(site: &Site) {
    let manifest = site.read("policy/manifest.json");
    fs::remove_dir_all(site.path("policy")).unwrap();
    for dir in ["policy/policies", "policy/tests"] {
        fs::create_dir_all(site.path(dir)).unwrap();
    }
    site.write("policy/manifest.json", &manifest);
    site.write("policy/input-schema.json", REGO_INPUT);
    site.write("policy/policies/base.rego", SLOW);
    let text = "a".repeat(400_000);
    site.write("policy/data.json", &json!({"text": text}).to_string());
    let case = json!([{
        "name": "it allows, in its own time",
        "request": {
            "principal": {"type": "Agent", "id": "ops-1"}, "action": "fs.read",
            "resource": {"type": "File", "id": "/srv/a", "attributes": {"path": "/srv/a"}},
        },
        "expect": "allow",
    }]);
    site.write("policy/tests/base.json", &case.to_string());
    rego(site, "slow.tar", 2);
}

fn rego(site: &Site, archive: &str, epoch: u64) {
    site.bundle(archive, "policy.key", |manifest| {
        manifest["epoch"] = json!(epoch);
        manifest["engine"] = json!("rego");
    });
}

#[test]
fn a_node_that_is_killed_during_a_self_check_makes_it_at_its_next_start() {
    let site = Site::new();
    let node = site.start_deciding();
    slow(&site);
    std::thread::scope(|scope| {
        // The node is killed under it: what it says does not matter.
        scope.spawn(|| site.tidelock(&["bundle", "install", "slow.tar", "--apply"]));
        until("the switch", || {
            let journal = site.operate("journal")["entries"].to_string();
            (journal.matches("bundle_activated").count() > 1).then_some(())
        });
        node.end(Signal::KILL);
    });
    let _node = site.start();
    assert_eq!(source(&site), (json!(1), json!("last_known_good")));
    let aside = site.status()["activation"]["set_aside"].clone();
    assert_eq!(
        (&aside["epoch"], &aside["cause"]),
        (&json!(2), &json!("self_check"))
    );
    assert_eq!(site.status()["activation"]["on_trial"], false);
    site.decides();
}

#[test]
fn a_bundle_that_fails_its_self_check_is_set_aside_by_itself() {
    let site = Site::new();
    let node = site.start_deciding();
    slow(&site);
    site.tidelock(&["bundle", "install", "slow.tar", "--apply"])
        .ended(1)
        .says(&["POLICY_SELF_CHECK", "epoch 1 serves"]);
    let reverted = site.events("policy_activation_reverted");
    assert_eq!(reverted.len(), 1);
    assert_eq!(reverted[0]["serves"]["epoch"], 1);
    let set_aside = || {
        assert_eq!(source(&site), (json!(1), json!("last_known_good")));
        let aside = site.status()["activation"]["set_aside"].clone();
        assert_eq!(
            (&aside["epoch"], &aside["cause"]),
            (&json!(2), &json!("self_check"))
        );
    };
    set_aside();
    until("an engine that is free again", || {
        (site.may_read("/srv/a.txt").0 == "allow").then_some(())
    });
    node.end(Signal::KILL);
    let node = site.start();
    set_aside();
    site.decides();

    // The control: the same bundle with less to search answers in time.
    site.write("policy/data.json", &json!({"text": "a"}).to_string());
    rego(&site, "quick.tar", 3);
    site.ok(&["bundle", "install", "quick.tar", "--apply"]);
    assert_eq!(source(&site), (json!(3), json!("active")));
    assert_eq!(site.events("policy_activation_reverted").len(), 1);
    drop(node);

    // Where nothing stands behind it, nothing decides.
    fs::remove_dir_all(site.path("root")).unwrap();
    let _node = site.start();
    site.tidelock(&["bundle", "install", "slow.tar", "--apply"])
        .ended(1)
        .says(&["POLICY_SELF_CHECK", "every action is denied"]);
    assert_eq!(site.status()["bundle"], Value::Null);
    assert_eq!(site.may_read("/srv/a.txt").1, "NO_POLICY");
}

/// The trust file of this site in its second format, with these rules of activation.
fn rules(site: &Site, rules: &str) {
    let text = site.trust("policy.key");
    let text = text
        .replace("format = 1", "format = 2")
        .replace(
            "threshold = 1\n",
            &format!("[thresholds]\npolicy = 1\n\n[activation]\n{rules}\n"),
        )
        .replace("public_key_pem", "roles = [\"policy\"]\npublic_key_pem");
    site.write("trust.toml", &text);
}

/// The same for two keys, `second.key` beside the first.
fn rules_of_two(site: &Site, activation: &str) {
    rules(site, activation);
    let second = site.trust("second.key").replace("harbour-master", "pilot");
    let (_, second) = second.split_once("[[keys]]").unwrap();
    let second = second.replace("public_key_pem", "roles = [\"policy\"]\npublic_key_pem");
    site.write(
        "trust.toml",
        &format!("{}\n[[keys]]{second}", site.read("trust.toml")),
    );
}

/// The trust file of this site, whose key may sign for emergencies too.
fn rules_of_emergencies(site: &Site, activation: &str) {
    rules(site, activation);
    let trust = site.read("trust.toml");
    let trust = trust
        .replace("policy = 1\n", "policy = 1\nbreak-glass = 1\n")
        .replace("[\"policy\"]", "[\"policy\", \"break-glass\"]");
    site.write("trust.toml", &trust);
}

/// Makes `glass.tar`, for an emergency that lasts two hours yet.
fn glass(site: &Site, epoch: u64) {
    let ahead = |hours: i64| {
        let at = jiff::Timestamp::now().checked_add(jiff::SignedDuration::from_hours(hours));
        json!(at.unwrap().to_string())
    };
    site.bundle("glass.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(epoch);
        manifest["role"] = json!("break-glass");
        manifest["created_at"] = ahead(-2);
        manifest["expires_at"] = ahead(2);
    });
}

#[test]
fn flips_block_where_the_trust_file_says_so_until_an_operator_accepts_them() {
    let site = Site::new();
    rules(&site, "block_on = \"deny_to_allow\"");
    let _node = site.start_deciding();
    turned(&site, &[3]);
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
    });
    // The control: what comes out the same is not blocked. Nor was the first, before which nothing was allowed.
    site.decides();
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    for args in [
        ["bundle", "install", "site-3.tar"].as_slice(),
        &["bundle", "install", "site-3.tar", "--apply"],
    ] {
        site.tidelock(args)
            .ended(1)
            .says(&["POLICY_FLIPS", "--accept-flips"]);
    }
    let plan = site.json(&["policy", "plan", "site-3.tar"]);
    assert_eq!(plan["blocked"]["code"], "POLICY_FLIPS");
    assert_eq!(plan["replay"]["deny_to_allow"], 1);
    site.ok(&["policy", "plan", "site-3.tar"])
        .says(&["blocked", "POLICY_FLIPS"]);
    let activate = |plan: &Value, more: &[&str]| {
        let plan = plan["plan"].as_str().unwrap();
        let args = [
            "policy",
            "activate",
            "site-3.tar",
            "--plan",
            plan,
            "--apply",
        ];
        site.tidelock(&[&args[..], more].concat())
    };
    activate(&plan, &[]).ended(1).says(&["POLICY_FLIPS"]);
    // That flips are accepted is part of what was looked at.
    activate(&plan, &["--accept-flips"])
        .ended(1)
        .says(&["PLAN_STALE"]);
    assert_eq!(source(&site), (json!(2), json!("active")));
    let plan = site.json(&["policy", "plan", "site-3.tar", "--accept-flips"]);
    assert_eq!(plan["blocked"], Value::Null);
    assert_eq!(plan["replay"]["deny_to_allow"], 1);
    // Nor are others accepted than those that it showed.
    assert_eq!(site.may_read("/etc/hosts").0, "deny");
    activate(&plan, &["--accept-flips"])
        .ended(1)
        .says(&["PLAN_FLIPS", "/etc/hosts"]);
    let named = plan["plan"].as_str().unwrap();
    let forged = named.replace(named.rsplit('-').next().unwrap(), "0123456789abcdef");
    activate(&json!({"plan": forged}), &["--accept-flips"])
        .ended(1)
        .says(&["PLAN_FLIPS"]);
    assert_eq!(source(&site), (json!(2), json!("active")));
    let plan = site.json(&["policy", "plan", "site-3.tar", "--accept-flips"]);
    assert_eq!(plan["replay"]["deny_to_allow"], 2);
    // The controls: what was shown is shown, however often it is asked, and what blocks nothing stops nothing.
    assert_eq!(site.may_read("/etc/hosts").0, "deny");
    assert_eq!(site.may_read("/srv/b.txt").0, "allow");
    activate(&plan, &["--accept-flips"]).ended(0);
    assert_eq!(source(&site), (json!(3), json!("active")));
    let activated = site.events("bundle_activated");
    let last = activated.last().unwrap();
    assert_eq!(
        last["accepted_flips"],
        json!({"asked": 5, "deny_to_allow": 3, "allow_to_deny": 2, "ended_early": false})
    );
    assert_eq!(activated[0]["accepted_flips"], Value::Null);
}

/// A replay of five seconds was made under the lock for which rollbacks waited, and a reload in the loop of ticks.
#[test]
fn a_long_replay_blocks_its_bundle_and_holds_up_no_rollback_no_reload_and_no_emergency() {
    let site = Site::new();
    rules_of_emergencies(&site, "block_on = \"any_flip\"");
    let node = site.start_deciding();
    let epoch = |epoch: u64| move |manifest: &mut Value| manifest["epoch"] = json!(epoch);
    site.bundle("site-2.tar", "policy.key", epoch(2));
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    glass(&site, 3);
    slow(&site);
    rego(&site, "slow.tar", 9);
    for file in 0..600 {
        site.may_read(&format!("/srv/{file}.txt"));
    }
    let passed = || site.status()["policy_worker"]["counts"]["passed"].as_u64();
    let before = passed();
    std::thread::scope(|scope| {
        let install = || site.tidelock(&["bundle", "install", "slow.tar", "--apply"]);
        let installing = scope.spawn(install);
        until("the compilation", || (passed() > before).then_some(()));
        let plan = site.json(&["policy", "rollback"]);
        let plan = plan["plan"].as_str().unwrap();
        site.ok(&["policy", "rollback", "--plan", plan, "--apply"]);
        assert_eq!(source(&site), (json!(1), json!("last_known_good")));
        node.reload("reloaded");
        site.ok(&["bundle", "install", "glass.tar", "--apply"]);
        assert_eq!(source(&site), (json!(3), json!("active")));
        assert!(!installing.is_finished(), "all of it happened meanwhile");
        let ran = installing.join().unwrap();
        ran.ended(1).says(&["POLICY_REPLAY", "too long"]);
    });
    let rejected = site.events("bundle_rejected");
    assert_eq!(rejected.last().unwrap()["code"], "POLICY_REPLAY");
    // The control: the same policy with less to search is asked all of it in time, and blocks nothing.
    site.write("policy/data.json", &json!({"text": "a"}).to_string());
    rego(&site, "quick.tar", 10);
    site.ok(&["bundle", "install", "quick.tar", "--apply"]);
    assert_eq!(source(&site), (json!(10), json!("active")));
}

/// With nothing to stand in, everything that the next bundle allowed was a flip: none came in but by an operator.
#[test]
fn where_no_bundle_decides_flips_are_counted_against_what_the_last_one_said() {
    let site = Site::new();
    rules(&site, "block_on = \"any_flip\"");
    turned(&site, &[3]);
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
    });
    let node = site.start_deciding();
    site.decides();
    assert!(node.stop().success());
    fs::remove_file(site.path("root/policy/active")).unwrap();
    for segment in fs::read_dir(site.path("root/segments/policy")).unwrap() {
        fs::remove_file(segment.unwrap().path()).unwrap();
    }
    let _node = site.start();
    assert_eq!(site.status()["bundle"], Value::Null);
    // What is denied for want of a bundle is no measure of the next one.
    for path in ["/srv/a.txt", "/srv/b.txt", "/etc/hosts"] {
        assert_eq!(site.may_read(path).1, "NO_POLICY");
    }
    let plan = site.json(&["policy", "plan", "site-3.tar"]);
    assert_eq!(plan["blocked"]["code"], "POLICY_FLIPS");
    let replay = &plan["replay"];
    assert_eq!(
        (&replay["asked"], &replay["deny_to_allow"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(replay["not_asked"]["no_verdict"], 3);
    let install = |archive: &str| site.tidelock(&["bundle", "install", archive, "--apply"]);
    install("site-3.tar").ended(1).says(&["POLICY_FLIPS"]);
    assert_eq!(site.status()["bundle"], Value::Null);
    // The control: what says the same as the last one comes in by itself.
    install("site-2.tar").ended(0);
    assert_eq!(source(&site), (json!(2), json!("active")));
    site.decides();
}

/// The configs of two nodes that know each other; and a medium `m` between them.
fn two_nodes(site: &Site) -> (String, String) {
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    fs::create_dir(site.path("m")).unwrap();
    let a = site.config();
    let peer = |id: &str| {
        let address = free_udp();
        format!("\n[[mesh.peers]]\nid = \"{id}\"\naddress = \"{address}\"\n")
    };
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    (a + &peer("b"), b + &peer("a"))
}

#[test]
fn a_bundle_of_a_peer_that_is_blocked_waits_and_is_told() {
    let site = Site::new();
    let (a, b) = two_nodes(&site);
    turned(&site, &[2]);
    site.write("tidelock.toml", &a);
    let node = site.start_deciding();
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    assert!(node.stop().success());
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);

    // `b` asks for more than `a` does.
    rules(&site, "block_on = \"any_flip\"\nreplay_records = 200");
    site.write("tidelock.toml", &b);
    let node = site.start_deciding();
    site.decides();
    let import = || {
        site.tidelock(&["segment", "import", "m", "--apply", "--json"])
            .json()
    };
    for _ in 0..2 {
        let codes = import()["entries"].to_string();
        assert!(codes.contains("POLICY_FLIPS"), "{codes}");
        assert_eq!(source(&site), (json!(1), json!("active")));
        let status = site.status();
        let waiting = &status["activation"]["waiting"];
        assert_eq!(waiting.as_array().unwrap().len(), 1, "{waiting}");
        assert_eq!(
            (&waiting[0]["epoch"], &waiting[0]["code"]),
            (&json!(2), &json!("POLICY_FLIPS"))
        );
    }
    let rejected = site.events("bundle_rejected");
    assert_eq!(rejected.len(), 1, "told once: {rejected:?}");
    site.ok(&["policy", "status"])
        .says(&["waits", "POLICY_FLIPS"]);
    // The control: where flips do not block, the same medium brings it in.
    rules(&site, "block_on = \"none\"");
    node.reload("reloaded");
    import();
    assert_eq!(source(&site), (json!(2), json!("active")));
    assert_eq!(site.status()["activation"]["waiting"], json!([]));
    // What an operator then goes back from, the medium does not bring back, held or not.
    let plan = site.json(&["policy", "rollback"]);
    let plan = plan["plan"].as_str().unwrap();
    site.ok(&["policy", "rollback", "--plan", plan, "--apply"]);
    for _ in 0..2 {
        import();
        assert_eq!(source(&site), (json!(1), json!("last_known_good")));
        let held = site.path("root-b/segments/policy");
        for segment in fs::read_dir(held).unwrap() {
            fs::remove_file(segment.unwrap().path()).unwrap();
        }
    }
}

fn digest(site: &Site, text: &str) -> String {
    site.write("text", text);
    let told = openssl(&site.path(""), &["dgst", "-sha256", "-r", "text"]);
    format!("sha256:{}", told.split(' ').next().unwrap())
}

/// Marks that a bundle was being activated, and what stood behind the active one before.
fn marked(site: &Site, behind: &Value) {
    let tried = digest(site, "what was being activated");
    let marks = json!({"aside": null, "behind": behind, "trial": tried});
    let check = digest(site, &format!("{marks:#}\n"));
    let slot = json!({"check": check, "format": 1, "marks": marks});
    site.write("root/policy/aside", &slot.to_string());
}

/// Epoch and name of each policy segment that is held.
fn held(site: &Site) -> Vec<(u64, String)> {
    let listed = site.json(&["segment", "ls", "--origin", "policy/site"]);
    let listed = listed["segments"].as_array().unwrap().iter();
    let named = listed.map(|segment| {
        let id = segment["id"].as_str().unwrap().to_owned();
        (segment["sequence"].as_u64().unwrap(), id)
    });
    let mut named: Vec<(u64, String)> = named.collect();
    named.sort();
    named
}

/// A failed self-check ended the activation before what follows from every switch.
#[test]
fn what_follows_from_a_switch_does_so_after_a_failed_self_check_too() {
    let site = Site::new();
    let (a, b) = two_nodes(&site);
    turned(&site, &[3, 9]);
    site.write("tidelock.toml", &a);
    let node = site.start_deciding();
    for archive in ["site-3.tar", "site-9.tar"] {
        site.ok(&["bundle", "install", archive, "--apply"]);
    }
    assert!(node.stop().success());
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);

    rules(&site, "block_on = \"any_flip\"\nreplay_records = 4");
    site.write("tidelock.toml", &b);
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
    });
    let _node = site.start_deciding();
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    site.decides();
    let import = || {
        site.tidelock(&["segment", "import", "m", "--apply", "--json"])
            .json()["entries"]
            .to_string()
    };
    let waits = || -> Vec<u64> {
        let waiting = site.status()["activation"]["waiting"].clone();
        let epochs = waiting.as_array().unwrap().iter();
        epochs.map(|one| one["epoch"].as_u64().unwrap()).collect()
    };
    let stored = || -> Vec<u64> {
        let listed = site.json(&["segment", "ls", "--origin", "policy/site"]);
        let epochs = listed["segments"].as_array().unwrap().iter();
        epochs
            .map(|one| one["sequence"].as_u64().unwrap())
            .collect()
    };
    import();
    assert_eq!(waits(), [3, 9]);
    // From now on no flip is among what is looked at. What waits is not looked at again for that alone.
    for file in 0..8 {
        assert_eq!(site.may_read(&format!("/var/{file}")).0, "deny");
    }
    assert!(import().contains("POLICY_FLIPS"));
    assert_eq!((waits(), stored()), (vec![3, 9], vec![1, 2]));

    slow(&site);
    rego(&site, "slow.tar", 4);
    site.tidelock(&["bundle", "install", "slow.tar", "--apply"])
        .ended(1)
        .says(&["POLICY_SELF_CHECK", "epoch 2 serves"]);
    assert_eq!(source(&site), (json!(2), json!("last_known_good")));
    let aside = site.status()["activation"]["set_aside"].clone();
    assert_eq!(
        (&aside["epoch"], &aside["cause"]),
        (&json!(4), &json!("self_check"))
    );
    assert_eq!(site.events("policy_activation_reverted").len(), 1);
    // Its epoch is taken all the same: what waited below it is dropped, and what nothing falls back to any more.
    assert_eq!((waits(), stored()), (vec![9], vec![2, 4]));
    // What waited above it is looked at again as soon as it is offered, and ends what was set aside.
    import();
    assert_eq!(source(&site), (json!(9), json!("active")));
    assert_eq!(waits(), [0_u64; 0]);
    let activation = site.status()["activation"].clone();
    assert_eq!(activation["set_aside"], Value::Null);
    assert_eq!(activation["standby"]["epoch"], 2, "4 was no good");
    assert_eq!(site.events("policy_activation_reverted").len(), 1);
}

/// A refusal by rules that a reload replaces under the look would be told although nothing demands it any more.
#[test]
fn what_is_refused_by_rules_that_are_replaced_meanwhile_is_looked_at_again() {
    let site = Site::new();
    rules(&site, "block_on = \"any_flip\"");
    let node = site.start_deciding();
    for file in 0..900 {
        let action = common::read_action(&format!("/srv/{file}.txt")).to_string();
        let ask = common::request("POST", "/v1/decide", &[], action.as_bytes());
        // One that is late on a busy machine is one less: there are enough.
        common::over_unix(&site.path("s"), &ask).unwrap();
    }
    slow(&site);
    // What the self-check asks is answered at once.
    let case = site.read("policy/tests/base.json");
    let case = case
        .replace("/srv/a", "/var/a")
        .replace("allow\"", "deny\"");
    site.write("policy/tests/base.json", &case);
    let passed = || site.status()["policy_worker"]["counts"]["passed"].as_u64();
    let installed = |epoch: u64, meanwhile: &dyn Fn()| {
        rego(&site, "slow.tar", epoch);
        let before = passed();
        std::thread::scope(|scope| {
            let install = || site.tidelock(&["bundle", "install", "slow.tar", "--apply"]);
            let installing = scope.spawn(install);
            until("the compilation", || (passed() > before).then_some(()));
            meanwhile();
            assert!(!installing.is_finished(), "it is replayed for five seconds");
            installing.join().unwrap()
        })
    };
    // The control: the same look, refused by rules that stay.
    installed(2, &|| {})
        .ended(1)
        .says(&["POLICY_REPLAY", "too long"]);
    assert_eq!(source(&site), (json!(1), json!("active")));
    let refused = site.events("bundle_rejected").len();
    installed(3, &|| {
        rules(&site, "block_on = \"none\"");
        node.reload("reloaded");
    })
    .ended(0);
    assert_eq!(source(&site), (json!(3), json!("active")));
    assert_eq!(site.events("bundle_rejected").len(), refused);
}

#[test]
fn inv_16_what_was_set_aside_does_not_come_back_by_a_floor_that_was_lost_and_healed() {
    let (gone, damaged): (Option<&str>, _) = (None, Some("{}"));
    for (goes_back, lost) in [
        (true, [("floor", gone)].as_slice()),
        (true, &[("floor", damaged)]),
        (true, &[("floor", gone), ("active", damaged)]),
        // The control: the same loss where nobody went back.
        (false, &[("floor", damaged)]),
        // There it is not known that nobody did.
        (false, &[("floor", gone), ("active", damaged)]),
    ] {
        let what = format!("went back: {goes_back}, lost: {lost:?}");
        let site = Site::new();
        let node = site.start_deciding();
        // Its time has come, so that a schedule that is made of the store could bring it back.
        let begun = jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_hours(1));
        site.bundle("site-2.tar", "policy.key", |manifest| {
            manifest["epoch"] = json!(2);
            manifest["not_before"] = json!(begun.unwrap().to_string());
        });
        site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
        if goes_back {
            let plan = site.json(&["policy", "rollback"]);
            let plan = plan["plan"].as_str().unwrap();
            site.ok(&["policy", "rollback", "--plan", plan, "--apply"]);
        }
        node.end(Signal::KILL);
        for (slot, damaged) in lost {
            let slot = format!("root/policy/{slot}");
            match damaged {
                None => fs::remove_file(site.path(&slot)).unwrap(),
                Some(text) => site.write(&slot, text),
            }
        }
        let node = site.start();
        let faults = site.events("policy_slot_fault");
        let mut faults = faults.iter().map(|fault| &fault["slot"]);
        assert!(faults.any(|slot| slot == "floor"), "{what}");
        // What the lost one said of older ones is lost with it, so nothing stands in and nothing older comes back.
        let active_is_lost = lost.len() > 1;
        if !goes_back && !active_is_lost {
            until("the newest bundle", || {
                (source(&site) == (json!(2), json!("active"))).then_some(())
            });
            continue;
        }
        let install = || site.tidelock(&["bundle", "install", "site-2.tar", "--apply"]);
        let is_kept_out = |serves: Value, when: &str| {
            assert_eq!(source(&site).0, serves, "{what}, {when}");
            let waits = &site.status()["activation"]["scheduled"];
            assert_eq!(*waits, json!([]), "{what}, {when}");
            if goes_back {
                install().ended(1).says(&["POLICY_SET_ASIDE"]);
            }
        };
        is_kept_out(Value::Null, "at the start");
        assert_eq!(site.may_read("/srv/a.txt").1, "NO_POLICY", "{what}");
        if active_is_lost {
            let unscheduled = site.events("bundle_unscheduled");
            assert_eq!(unscheduled[0]["code"], "FLOOR_DAMAGED", "{what}");
        }
        let healed = match active_is_lost {
            true => Value::Null,
            false => json!(1),
        };
        node.reload("reloaded");
        is_kept_out(healed.clone(), "after a reload");
        node.end(Signal::KILL);
        let _node = site.start();
        is_kept_out(healed, "after a kill");
        // The control: the one way back is an operator's word, and to what was set aside a plan.
        if goes_back {
            let plan = site.json(&["policy", "plan", "site-2.tar"]);
            let plan = plan["plan"].as_str().unwrap();
            let act = ["site-2.tar", "--plan", plan, "--apply"];
            site.ok(&[&["policy", "activate"], &act[..]].concat());
        } else {
            install().ended(0);
        }
        assert_eq!(source(&site), (json!(2), json!("active")), "{what}");
        site.decides();
    }
}

/// Of the three, the last known good bundle told how high the floor was at least; the schedule took that for the
/// floor, and what had been set aside for what was due.
#[test]
fn inv_16_what_may_have_been_set_aside_is_not_due_where_floor_and_marks_are_lost() {
    let site = Site::new();
    let node = site.start_deciding();
    let begun = jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_hours(1));
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
        manifest["not_before"] = json!(begun.unwrap().to_string());
    });
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    let plan = site.json(&["policy", "rollback"]);
    let plan = plan["plan"].as_str().unwrap();
    site.ok(&["policy", "rollback", "--plan", plan, "--apply"]);
    node.end(Signal::KILL);
    for slot in ["floor", "active", "aside"] {
        site.write(&format!("root/policy/{slot}"), "{}");
    }
    let decides_nothing = |when: &str| {
        assert_eq!(source(&site).0, Value::Null, "{when}");
        let waits = &site.status()["activation"]["scheduled"];
        assert_eq!(*waits, json!([]), "{when}");
        assert_eq!(site.may_read("/srv/a.txt").1, "NO_POLICY", "{when}");
    };
    let node = site.start();
    decides_nothing("at the start");
    let unscheduled = site.events("bundle_unscheduled");
    assert_eq!(
        (&unscheduled[0]["epoch"], &unscheduled[0]["code"]),
        (&json!(2), &json!("FLOOR_DAMAGED"))
    );
    node.reload("reloaded");
    decides_nothing("after a reload");
    node.end(Signal::KILL);
    let _node = site.start();
    decides_nothing("after a kill");
    // The control: what it waits for is an operator's word.
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    assert_eq!(source(&site), (json!(2), json!("active")));
    site.decides();
}

/// What a process leaves that stops between the writing of the target and of the bundle: the same one in both.
#[test]
fn what_stood_behind_the_active_bundle_comes_back_after_a_stop_between_two_writes() {
    let site = Site::new();
    let node = site.start_deciding();
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
    });
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    let standby = site.status()["activation"]["standby"].clone();
    assert_eq!(standby["epoch"], 1);
    assert!(node.stop().success());
    fs::copy(
        site.path("root/policy/active"),
        site.path("root/policy/lkg"),
    )
    .unwrap();
    let tried = digest(&site, "what was being activated");
    // The control: a content that nobody has is not made up for.
    marked(&site, &json!(tried));
    let node = site.start();
    assert_eq!(site.events("policy_standby_lost").len(), 1);
    assert_eq!(site.status()["activation"]["standby"], Value::Null);
    site.tidelock(&["policy", "rollback"])
        .ended(1)
        .says(&["POLICY_NO_FALLBACK"]);
    assert!(node.stop().success());
    marked(&site, &standby["content_id"]);
    let _node = site.start();
    assert_eq!(site.events("policy_standby_restored").len(), 1);
    assert_eq!(site.status()["activation"]["standby"], standby);
    assert_eq!(source(&site), (json!(2), json!("active")));
    let plan = site.json(&["policy", "rollback"]);
    let plan = plan["plan"].as_str().unwrap();
    site.ok(&["policy", "rollback", "--plan", plan, "--apply"]);
    assert_eq!(source(&site), (json!(1), json!("last_known_good")));
    site.decides();
}

#[test]
fn a_bundle_that_is_not_proved_narrow_needs_the_signatures_that_the_trust_file_names() {
    let site = Site::new();
    site.signing_key("second.key");
    rules_of_two(&site, "widening_signatures = 2");
    let _node = site.start();
    for args in [
        ["bundle", "install", "site-1.tar"].as_slice(),
        &["bundle", "install", "site-1.tar", "--apply"],
    ] {
        site.tidelock(args)
            .ended(1)
            .says(&["WIDENING_UNPROVEN", "asks for 2 signatures"]);
    }
    assert_eq!(site.status()["bundle"], Value::Null);
    // The control: the signature that was missing.
    let second = ["--key", "second.key", "--out", "second.sig"];
    site.ok(&[&["bundle", "sign", "site-1.tar"], &second[..]].concat());
    let both = ["--sig", "site-1.tar.sig", "--sig", "second.sig", "--apply"];
    site.ok(&[&["bundle", "install", "site-1.tar"], &both[..]].concat());
    site.decides();
    site.ok(&["policy", "status"])
        .says(&["widening_signatures"]);
}

/// What goes on to others had for ever the signatures of the copy that came first: a site that asks for two never
/// took it.
#[test]
fn a_held_copy_of_too_few_signers_gives_way_and_takes_no_place_back() {
    let site = Site::new();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    site.signing_key("second.key");
    let second = ["--key", "second.key", "--out", "second.sig"];
    site.ok(&[&["bundle", "sign", "site-1.tar"], &second[..]].concat());
    let a = site.read("tidelock.toml");
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    for medium in ["fewer", "more"] {
        fs::create_dir(site.path(medium)).unwrap();
    }
    let by = |signatures: &[&str]| {
        let mut install = vec!["bundle", "install", "site-1.tar", "--apply"];
        for signature in signatures {
            install.extend(["--sig", signature]);
        }
        site.ok(&install);
    };
    let (first, second) = ("site-1.tar.sig", "second.sig");
    let export = |medium: &str| site.ok(&["segment", "export", "--to", medium, "--for", "b"]);

    rules_of_two(&site, "block_on = \"none\"");
    let node = site.start_deciding();
    let fewer = held(&site);
    assert_eq!(fewer.len(), 1);
    // The control: where one signature is enough, another one makes no segment.
    by(&[first, second]);
    assert_eq!(held(&site), fewer);
    export("fewer");
    rules_of_two(&site, "widening_signatures = 2");
    node.reload("reloaded");
    for one in [first, second] {
        by(&[one]);
        assert_eq!(
            held(&site),
            fewer,
            "{one}: no more signers than the held one"
        );
    }
    by(&[first, second]);
    let more = held(&site);
    assert_eq!(more.len(), 1, "in the place of the other");
    assert_ne!(more, fewer);
    for one in [first, second] {
        by(&[one]);
        assert_eq!(held(&site), more, "{one}");
    }
    export("more");
    assert_eq!(
        site.events("bundle_activated").len(),
        1,
        "one bundle all along"
    );
    assert!(node.stop().success());

    // At a site of the same rules one of them waits, and the other does not.
    site.write("tidelock.toml", &b);
    let _node = site.start();
    let import = |medium: &str| {
        let import = ["segment", "import", medium, "--apply", "--json"];
        site.tidelock(&import).json()["entries"].to_string()
    };
    let waiting = || site.status()["activation"]["waiting"].clone();
    for _ in 0..2 {
        let told = import("fewer");
        assert!(told.contains("WIDENING_UNPROVEN"), "{told}");
        let waits = waiting();
        assert_eq!(waits.as_array().unwrap().len(), 1, "{waits}");
        assert_eq!(waits[0]["signers"], json!(["harbour-master"]));
        assert_eq!(
            (site.status()["bundle"].clone(), held(&site)),
            (Value::Null, vec![])
        );
    }
    import("more");
    for _ in 0..2 {
        assert_eq!(source(&site), (json!(1), json!("active")));
        assert_eq!((waiting(), held(&site)), (json!([]), more.clone()));
        import("fewer");
    }
    site.decides();
}

/// Behind what follows an emergency stands what was before both. Its segment was dropped as older than what the
/// activation took the place of, and after a stop between two writes nothing stood behind any more.
#[test]
fn the_segment_of_what_would_stand_in_is_kept_as_long_as_it_would_and_for_nothing_else() {
    let site = Site::new();
    rules_of_emergencies(&site, "block_on = \"none\"");
    glass(&site, 2);
    for epoch in [3, 4, 5] {
        let archive = format!("site-{epoch}.tar");
        site.bundle(&archive, "policy.key", |manifest| {
            manifest["epoch"] = json!(epoch);
        });
    }
    let install = |archive: &str| site.tidelock(&["bundle", "install", archive, "--apply"]);
    let epochs = || -> Vec<u64> { held(&site).into_iter().map(|(epoch, _)| epoch).collect() };
    let standby = || site.status()["activation"]["standby"].clone();
    let node = site.start_deciding();
    let hash = site.status()["bundle"]["hash"].clone();
    let behind = json!({"name": "site", "epoch": 1, "content_id": hash});
    install("glass.tar").ended(0);
    install("site-3.tar").ended(0);
    assert_eq!(standby(), behind);
    assert_eq!(epochs(), [1, 2, 3]);

    // Stopped between two writes: what stood behind comes back, to stand there and no more.
    assert!(node.stop().success());
    let slot = |name: &str| site.path("root/policy").join(name);
    fs::copy(slot("active"), slot("lkg")).unwrap();
    marked(&site, &behind["content_id"]);
    let node = site.start();
    assert_eq!(site.events("policy_standby_restored").len(), 1);
    assert_eq!(
        (standby(), source(&site)),
        (behind.clone(), (json!(3), json!("active")))
    );
    install("site-1.tar").ended(1).says(&["BUNDLE_EPOCH"]);
    let (_, newest) = held(&site).pop().unwrap();
    let newest = newest.strip_prefix("blake3:").unwrap();
    assert!(node.stop().success());

    // Where the active bundle is lost, its own segment goes before.
    fs::remove_file(slot("active")).unwrap();
    let node = site.start();
    assert_eq!(source(&site), (json!(3), json!("active")));
    assert_eq!(site.events("bundle_restored").len(), 1);
    assert!(node.stop().success());
    // Without that the one behind stands in, as an older one may.
    fs::remove_file(slot("active")).unwrap();
    let stored = fs::read_dir(site.path("root/segments/policy")).unwrap();
    let stored = stored.map(|entry| entry.unwrap().path());
    let of_newest = stored.filter(|path| path.to_string_lossy().contains(newest));
    let of_newest: Vec<_> = of_newest.collect();
    assert_eq!(of_newest.len(), 1);
    fs::remove_file(&of_newest[0]).unwrap();
    let _node = site.start();
    assert_eq!(source(&site), (json!(1), json!("last_known_good")));
    assert_eq!(site.status()["posture"], "restricted");
    for archive in ["site-1.tar", "glass.tar"] {
        install(archive).ended(1).says(&["BUNDLE_EPOCH"]);
    }

    // The control: what stands behind nothing any more goes, and what does stays.
    install("site-4.tar").ended(0);
    assert_eq!((epochs(), standby()), (vec![1, 2, 4], behind));
    install("site-5.tar").ended(0);
    assert_eq!(
        (epochs(), standby()["epoch"].clone()),
        (vec![4, 5], json!(4))
    );
}
