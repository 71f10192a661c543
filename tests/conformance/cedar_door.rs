//! A sample of Cedar's own corpus through the door of a real node: each test becomes a signed bundle, each
//! of its requests is decided over HTTP as Cedar's authors expect, and recorded.
//!
//! Most of the corpus has names that no door takes (empty ids, types in namespaces, invisible characters);
//! `cedar.rs` has all of it without a door. What is taken here are the first [`TESTS`] of those that a door
//! can ask, the most telling first. Those with extension types, or whose literals are looked
//! into (level validation), are no bundles here and are refused.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

#[path = "../../node/tests/common/mod.rs"]
mod common;

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use common::{Site, chmod, free_tcp, not_run, over_tcp, request, until};
use serde_json::{Value, json};
use tidelock_gateway::tokens::TokenDigest;

const TOKEN: &str = "token-of-an-enforcement-point";
/// Bundles that are installed one after the other.
const TESTS: usize = 32;

/// One test of the corpus, as far as a door can ask it.
struct Test {
    name: String,
    requests: Vec<Value>,
    outcomes: BTreeSet<&'static str>,
}

/// What the door must say: Cedar's verdict, where an error denies and a forbid comes before an error.
fn outcome(case: &Value) -> &'static str {
    let is_empty = |key: &str| case[key].as_array().unwrap().is_empty();
    match case["decision"].as_str().unwrap() {
        "allow" if is_empty("errors") => "POLICY_ALLOW",
        "deny" if !is_empty("reason") => "POLICY_DENY",
        "deny" if is_empty("errors") => "NO_MATCH",
        _ => "EVALUATION_ERROR",
    }
}

/// Whether a door takes these names.
fn can_be_asked(case: &Value) -> bool {
    let text = |at: &str| case.pointer(at).and_then(Value::as_str).unwrap();
    let is_word = |text: &str, more: &[u8]| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    let is_id = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    text("/action/type") == "Action"
        && is_word(text("/action/id"), b"._:/-")
        && is_word(text("/principal/type"), b"_")
        && is_word(text("/resource/type"), b"_")
        && is_id(text("/principal/id"))
        && is_id(text("/resource/id"))
}

/// The tests of the corpus that can be asked, the most telling first.
fn sample(dir: &Path) -> Vec<Test> {
    let mut tests = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let Some(name) = file.strip_suffix(".cedar") else {
            continue;
        };
        let text = fs::read_to_string(dir.join(format!("{name}.json"))).unwrap();
        let test: Value = serde_json::from_str(&text).unwrap();
        let cases = test["requests"].as_array().unwrap();
        let requests: Vec<Value> = cases.iter().filter(|c| can_be_asked(c)).cloned().collect();
        if test["shouldValidate"] != true || requests.is_empty() {
            continue;
        }
        tests.push(Test {
            name: name.to_owned(),
            outcomes: requests.iter().map(outcome).collect(),
            requests,
        });
    }
    let rare = |test: &Test| {
        let has = |what: &str| test.outcomes.contains(what);
        (
            has("EVALUATION_ERROR"),
            has("POLICY_DENY"),
            test.outcomes.len(),
        )
    };
    tests.sort_by(|a, b| rare(b).cmp(&rare(a)).then_with(|| a.name.cmp(&b.name)));
    tests
}

fn ask(tcp: SocketAddr, path: &str, body: &Value) -> Value {
    let bearer = format!("authorization: Bearer {TOKEN}");
    until("an answer of the policy", || {
        let body = body.to_string();
        let (_, text) = over_tcp(tcp, &request("POST", path, &[&bearer], body.as_bytes()));
        let busy = [
            "AUDIT_UNAVAILABLE",
            "DEADLINE",
            "unanswered",
            "ENGINE_EXHAUSTED",
        ];
        let is_busy = busy.iter().any(|word| text.contains(word));
        (!is_busy).then(|| serde_json::from_str(&text).unwrap())
    })
}

fn native(case: &Value) -> Value {
    json!({
        "principal": case["principal"], "action": case["action"]["id"],
        "resource": case["resource"], "context": case["context"],
    })
}

/// Makes the bundle of one test. Says why that cannot be: a bundle has limits that Cedar has not.
fn bundle(site: &Site, dir: &Path, test: &Test, epoch: usize) -> Result<(), String> {
    let read =
        |ending: &str| fs::read_to_string(dir.join(format!("{}{ending}", test.name))).unwrap();
    site.write("policy/policies/corpus.cedar", &read(".cedar"));
    site.write("policy/schema.cedarschema", &read(".cedarschema"));
    site.write("policy/entities.json", &read(".entities.json"));
    let case = &test.requests[0];
    let expect = match outcome(case) {
        "POLICY_ALLOW" => "allow",
        "EVALUATION_ERROR" => "error",
        _ => "deny",
    };
    let own = json!([{
        "name": "the first of the corpus", "request": native(case),
        "expect": expect,
    }]);
    site.write("policy/tests/corpus.json", &own.to_string());
    let original = site.read("policy/manifest.json");
    let mut manifest: Value = serde_json::from_str(&original).unwrap();
    manifest["epoch"] = json!(epoch);
    manifest["classes"] = json!({"all": {
        "actions": [], "stale_after_s": 1_000_000, "restrict_after_s": 2_000_000,
        "close_after_s": 3_000_000, "when_restricted": "deny",
    }});
    manifest["default_class"] = json!("all");
    site.write("policy/manifest.json", &manifest.to_string());
    for step in [
        ["bundle", "test", "policy"].as_slice(),
        &["bundle", "build", "policy", "--out", "corpus.tar"],
        &["bundle", "sign", "corpus.tar", "--key", "policy.key"],
        &["bundle", "install", "corpus.tar", "--apply"],
    ] {
        let ran = site.tidelock(step);
        if ran.code != 0 {
            return Err(format!("{}{}", ran.out, ran.err));
        }
    }
    Ok(())
}

fn unpacked(archive: &Path) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(archive).arg("-C").arg(dir.path());
    assert!(tar.status().unwrap().success());
    let inside = dir.path().join("cedar-corpus");
    (dir, inside)
}

#[test]
fn a_sample_of_the_corpus_is_decided_as_expected_through_the_door() {
    let archive =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/cedar-corpus.tar.gz");
    if !archive.exists() {
        not_run(
            "Cedar's corpus through the door",
            "../shared/data is not there",
        );
        return;
    }
    let (_kept, dir) = unpacked(&archive);
    let site = Site::new();
    for file in fs::read_dir(site.path("policy/policies")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    for file in fs::read_dir(site.path("policy/tests")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    let tokens = format!(
        "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"pep\"\n\
         scopes = [\"decide\", \"act_as\"]\n",
        TokenDigest::of(TOKEN.as_bytes()),
    );
    site.write("tokens.toml", &tokens);
    chmod(&site.path("tokens.toml"), 0o600);
    let tcp = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"tokens.toml\"\n"),
    );
    let node = site.start();

    let (mut installed, mut compared, mut seen) = (0, 0, BTreeSet::new());
    for test in sample(&dir) {
        if installed == TESTS {
            break;
        }
        if let Err(why) = bundle(&site, &dir, &test, installed + 1) {
            let is_stricter = ["extension types", "cannot be dereferenced"];
            assert!(
                is_stricter.iter().any(|word| why.contains(word)),
                "{}: {why}",
                test.name
            );
            continue;
        }
        installed += 1;
        for case in &test.requests {
            let what = format!("{}, {}", test.name, case["description"]);
            let expected = outcome(case);
            let answer = ask(tcp, "/v1/decide", &native(case));
            assert_eq!(answer["reason"], expected, "{what}: {answer}");
            let is_allow = expected == "POLICY_ALLOW";
            assert_eq!(
                answer["decision"],
                if is_allow { "allow" } else { "deny" },
                "{what}"
            );
            assert!(answer["record"]["index"].is_u64(), "{what}: {answer}");
            // `policyN` is the Nth statement of the file.
            let of_corpus = |id: &Value| -> String {
                let number = id.as_str().unwrap().strip_prefix("policy").unwrap();
                format!("corpus.cedar#{}", number.parse::<usize>().unwrap() + 1)
            };
            let policies = |ids: &Value| ids.as_array().unwrap().clone();
            // Named are the policies that decided, or else those that erred.
            let grounds = match expected {
                "EVALUATION_ERROR" => "errors",
                _ => "reason",
            };
            let theirs: BTreeSet<String> = policies(&case[grounds]).iter().map(of_corpus).collect();
            let ours: BTreeSet<String> = policies(&answer["policies"])
                .iter()
                .map(|id| id.as_str().unwrap().to_owned())
                .collect();
            assert_eq!(ours, theirs, "{what}");
            let evaluation = json!({
                "subject": case["principal"], "action": {"name": case["action"]["id"]},
                "resource": case["resource"], "context": case["context"],
            });
            let answer = ask(tcp, "/access/v1/evaluation", &evaluation);
            assert_eq!(answer["decision"], is_allow, "{what}: {answer}");
            compared += 1;
            seen.insert(expected);
        }
    }
    println!("{compared} requests of {installed} bundles: {seen:?}");
    assert_eq!(installed, TESTS);
    assert!(compared > 100, "{compared}");
    let all = [
        "EVALUATION_ERROR",
        "NO_MATCH",
        "POLICY_ALLOW",
        "POLICY_DENY",
    ];
    assert_eq!(seen, BTreeSet::from(all));
    node.stop();
}
