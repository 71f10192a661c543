//! The proof that a bundle permits no more, as a node has it: `policy prove` of the program that was built, with its
//! confined workers and the solver, from the start of the process to the verdict.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use serde_json::Value;
use tidelock_policy::{BundleBuilder, PolicyRequest};

use crate::{
    Row, median,
    policy::{FEW, Ours, SCHEMA, manifest, rules},
};

const PROOFS: usize = 15;
const AIM: &str = "the aim, 1 s";
const AIM_MS: f64 = 1000.0;

/// The rule that one bundle has otherwise than the other.
const CHANGED: usize = FEW / 2;

/// A hundred rules in which one permits the files below `dir`.
fn changed(dir: &str) -> String {
    let (all, old) = (rules(FEW), format!("\"/srv/team-{CHANGED}/*\""));
    let new = all.replace(&old, &format!("\"{dir}/*\""));
    assert_ne!(new, all, "the rule is there");
    new
}

fn write(dir: &Path, name: &str, rules: &str) -> PathBuf {
    let archive = BundleBuilder::new()
        .file("manifest.json", manifest("cedar"))
        .file("schema.cedarschema", SCHEMA.into())
        .file("policies/all.cedar", rules.into())
        .build()
        .expect("an archive");
    let path = dir.join(name);
    fs::write(&path, archive).expect("a file");
    path
}

fn prove(program: &Path, before: &Path, after: &Path) -> Result<Value, String> {
    let said = Command::new(program)
        .args(["policy", "prove", "--json"])
        .args([before, after])
        .output()
        .map_err(|error| error.to_string())?;
    let said: Value = serde_json::from_slice(&said.stdout)
        .map_err(|_| String::from_utf8_lossy(&said.stderr).into_owned())?;
    match said["reason"].as_str() {
        None => Ok(said),
        Some(reason) => Err(format!("unproven ({reason}): {}", said["detail"])),
    }
}

/// That the request of the counterexample is permitted by the newer rules and not by the older ones.
fn check_counterexample(said: &Value, before: &str, after: &str) {
    let found = &said["counterexample"];
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let request = PolicyRequest {
        principal_type: text(&found["principal"][0]),
        principal_id: text(&found["principal"][1]),
        action: text(&found["action"]),
        resource_type: text(&found["resource"][0]),
        resource_id: text(&found["resource"][1]),
        resource_attributes: found["attributes"].as_object().expect("a map").clone(),
        params: found["params"].clone(),
        context: found["context"].clone(),
    };
    let said_by = |rules: &str| Ours::new(rules).permits(&request);
    assert_eq!((said_by(before), said_by(after)), (false, true), "{found}");
}

pub fn rows(dir: &Path) -> Vec<Row> {
    let program = Path::new("target/release/tidelock");
    let base = rules(FEW);
    let before = write(dir, "before.tar", &base);
    // What each bundle is beside the first one, and what has to be said of it.
    let cases = [
        (
            "prove-100-narrower",
            "not_wider",
            changed(&format!("/srv/team-{CHANGED}/src")),
        ),
        ("prove-100-wider", "wider", changed("/srv")),
        (
            "prove-100-all-changed",
            "not_wider",
            base.replace("/*\"", "/src/*\""),
        ),
    ];
    let mut rows = Vec::new();
    for (id, verdict, rules) in cases {
        let after = write(dir, &format!("{id}.tar"), &rules);
        let prove = || prove(program, &before, &after);
        let measured = prove().map(|said| {
            assert_eq!(
                said["verdict"], verdict,
                "answers are checked before they are timed"
            );
            if verdict == "wider" {
                check_counterexample(&said, &base, &rules);
            }
            let times = (0..PROOFS).map(|_| {
                let begun = Instant::now();
                let again = prove();
                let took = begun.elapsed().as_secs_f64() * 1e3;
                assert_eq!(
                    again.map(|said| said["verdict"].clone()),
                    Ok(verdict.into())
                );
                took
            });
            median(times.collect())
        });
        rows.push(match measured {
            Ok(ms) => Row::measured(id, "ms p50", (ms, AIM, AIM_MS), "<= 1.0", |r| r <= 1.0),
            Err(why) => Row::not_run(id, AIM, "<= 1.0", why),
        });
    }
    rows
}
