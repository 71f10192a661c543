//! What authors of policy do, with the commands that they have.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    process::{Command, Stdio},
};

use common::{Ran, tidelock_in, until};
use serde_json::{Value, json};
use tempfile::TempDir;

fn new(dir: &TempDir, starter: &str) {
    run(
        dir,
        &[
            "bundle",
            "new",
            starter,
            "--starter",
            starter,
            "--name",
            "site",
            "--domain",
            "harbour",
        ],
    )
    .ended(0);
}

fn run(dir: &TempDir, args: &[&str]) -> Ran {
    tidelock_in(dir.path(), args, b"")
}

/// Changes the tests of a bundle directory.
fn change_tests(dir: &TempDir, bundle: &str, change: impl FnOnce(&mut Vec<Value>)) {
    let path = dir.path().join(bundle).join("tests/base.json");
    let mut cases: Vec<Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut cases);
    fs::write(&path, json!(cases).to_string()).unwrap();
}

#[test]
fn each_starter_builds_passes_and_covers_its_policies() {
    let dir = tempfile::tempdir().unwrap();
    for starter in ["coding-agent", "operations-agent", "service-mesh"] {
        new(&dir, starter);
        run(&dir, &["bundle", "test", starter, "--require-coverage"])
            .ended(0)
            .says(&[" passed, 0 failed"]);
        run(&dir, &["bundle", "build", starter, "--out", "site.tar"]).ended(0);
        let report = run(&dir, &["bundle", "test", "site.tar", "--json"])
            .ended(0)
            .json();
        assert_eq!(report["uncovered"], json!([]), "{starter}");
        // What lies there is never written over.
        run(
            &dir,
            &[
                "bundle", "new", starter, "--name", "site", "--domain", "harbour",
            ],
        )
        .ended(2)
        .says(&["exists already", "nothing was written"]);
    }
    run(
        &dir,
        &[
            "bundle",
            "new",
            "x",
            "--starter",
            "toaster",
            "--name",
            "x",
            "--domain",
            "y",
        ],
    )
    .ended(2)
    .says(&["toaster"]);
}

#[test]
fn a_policy_without_a_test_is_named_and_a_failure_shows_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    new(&dir, "operations-agent");
    change_tests(&dir, "operations-agent", |cases| {
        cases.retain(|case| case["policies"] != json!(["no-lost-logs"]));
    });
    let test = ["bundle", "test", "operations-agent"];
    // To know is no failure, unless it is asked for.
    run(&dir, &test)
        .ended(0)
        .says(&["covered by no test: no-lost-logs"]);
    let strict = [test.as_slice(), &["--require-coverage"]].concat();
    run(&dir, &strict).ended(1).says(&["no-lost-logs"]);

    change_tests(&dir, "operations-agent", |cases| {
        cases[0]["expect"] = json!("deny");
        cases[0]["policies"] = json!([]);
    });
    run(&dir, &test).ended(1).says(&[
        "FAILED tests/base.json: everybody may look",
        "because   looking costs nothing",
        "- expected  deny by []",
        "+ got       allow by [status-for-all]",
        "1 failed",
    ]);
    let report = run(&dir, &[test.as_slice(), &["--json"]].concat())
        .ended(1)
        .json();
    let failure = &report["failures"][0];
    assert_eq!(
        failure["expected"],
        json!({"answer": "deny", "policies": []})
    );
    assert_eq!(
        failure["got"],
        json!({"answer": "allow", "policies": ["status-for-all"]})
    );
    // A test that failed covers nothing.
    assert_eq!(
        report["uncovered"],
        json!(["no-lost-logs", "status-for-all"])
    );
}

/// What a bundle is compiled of beside its policies, in the Rego lane.
const INPUT: &str =
    r#"{"format": 1, "actions": {"fs.read": {"principal": ["Agent"], "resource": ["File"]}}}"#;

#[test]
fn coverage_of_rego_rules_is_never_claimed() {
    let dir = tempfile::tempdir().unwrap();
    new(&dir, "coding-agent");
    let write = |path: &str, text: &str| {
        fs::write(dir.path().join("coding-agent").join(path), text).unwrap();
    };
    let manifest = |engine: &str| {
        let path = dir.path().join("coding-agent/manifest.json");
        let mut manifest: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        manifest["engine"] = json!(engine);
        write("manifest.json", &manifest.to_string());
    };
    let test = ["bundle", "test", "coding-agent"];
    let strict = [test.as_slice(), &["--require-coverage"]].concat();
    let json_of = |args: &[&'static str]| [args, &["--json"]].concat();
    // The control: all of it is Cedar.
    let report = run(&dir, &json_of(&strict)).ended(0).json();
    assert_eq!(report["coverage"], "measured");

    // Its decision names the file, which was once taken for coverage.
    write(
        "policies/base.rego",
        "package tidelock\n\ndecision := {\"allow\": true, \"policies\": [\"base.rego\"]}\n",
    );
    write("input-schema.json", INPUT);
    write(
        "tests/base.json",
        &json!([{"name": "reads", "request": {"principal": {"type": "Agent", "id": "a"}, "action": "fs.read",
            "resource": {"type": "File", "id": "/a"}}, "expect": "allow"}])
        .to_string(),
    );
    write(
        "schema.cedarschema",
        "entity Agent; entity File;\naction \"fs.read\" appliesTo { principal: [Agent], resource: [File] };",
    );
    write(
        "policies/base.cedar",
        "@id(\"all\") permit (principal, action, resource);",
    );
    manifest("cedar+rego");
    run(&dir, &test)
        .ended(0)
        .says(&["Rego rules: not measured"]);
    let report = run(&dir, &json_of(&strict)).ended(1).json();
    assert_eq!(
        (&report["coverage"], &report["uncovered"]),
        (&json!("cedar only"), &json!([]))
    );

    fs::remove_file(dir.path().join("coding-agent/policies/base.cedar")).unwrap();
    fs::remove_file(dir.path().join("coding-agent/schema.cedarschema")).unwrap();
    manifest("rego");
    run(&dir, &test)
        .ended(0)
        .says(&["1 passed", "Rego rules: not measured"]);
    run(&dir, &strict).ended(1).says(&[
        "coverage is of Cedar policies",
        "Write a test for each Rego rule",
    ]);
    let report = run(&dir, &json_of(&test)).ended(0).json();
    assert_eq!(
        (&report["coverage"], &report["uncovered"]),
        (&json!("not measured"), &Value::Null)
    );
}

#[test]
fn a_watched_directory_is_tested_again_after_each_change() {
    let dir = tempfile::tempdir().unwrap();
    new(&dir, "service-mesh");
    let said = dir.path().join("said");
    let mut watching = Command::new(env!("CARGO_BIN_EXE_tidelock"))
        .current_dir(dir.path())
        .args(["bundle", "test", "service-mesh", "--watch"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&said).unwrap())
        .stderr(fs::File::create(dir.path().join("wrong")).unwrap())
        .spawn()
        .unwrap();
    let says = |word: &str| {
        until(word, || {
            let wrong = fs::read_to_string(dir.path().join("wrong")).unwrap();
            let all = fs::read_to_string(&said).unwrap() + &wrong;
            all.contains(word).then_some(())
        });
    };
    says("9 passed, 0 failed");
    change_tests(&dir, "service-mesh", |cases| {
        cases.pop();
    });
    says("8 passed, 0 failed");
    // A policy half written is no end.
    let policy = dir.path().join("service-mesh/policies/base.cedar");
    let text = fs::read_to_string(&policy).unwrap();
    fs::write(&policy, "permit (principal").unwrap();
    says("base.cedar");
    fs::write(
        &policy,
        format!("{text}\n@id(\"more\") forbid (principal, action, resource) when {{ false }};\n"),
    )
    .unwrap();
    says("covered by no test: more");
    watching.kill().unwrap();
    watching.wait().unwrap();
}
