//! The public compliance suite of OPA against the Rego lane.
//!
//! Of the cases that call nothing but allowed built-ins, those that load must give what the suite expects,
//! value or error, all but a few; the others are refused at load, with a line, for a construct that the
//! register machine does not run. `docs/src/rego.md` names both with their reasons.
#![cfg(test)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use serde_json::{Map, Value};
use tidelock_policy::testing::RegoRules;

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    note: String,
    query: String,
    #[serde(default)]
    modules: Vec<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    input: Option<Value>,
    #[serde(default)]
    input_term: Option<String>,
    #[serde(default)]
    want_result: Option<Vec<Map<String, Value>>>,
    #[serde(default)]
    want_error_code: Option<String>,
    #[serde(default)]
    want_error: Option<String>,
    #[serde(default)]
    strict_error: bool,
    #[serde(default)]
    sort_bindings: bool,
}

enum Outcome {
    Agrees,
    /// Uses what this node does not run on purpose, or asks what is no decision.
    Outside(String),
    /// Uses a construct that is refused at load.
    Refused(String),
    Differs(String),
}

fn judge(case: &Case) -> Outcome {
    let Some((entry, name)) = case.query.split_once(" = ") else {
        return Outcome::Outside("the query is no rule".into());
    };
    let rule = entry.split('.').count() > 2 && !entry.contains('[');
    if !rule || name.contains(|c: char| !c.is_ascii_alphabetic()) {
        return Outcome::Outside("the query is no rule".into());
    }
    let names: Vec<String> = (0..case.modules.len())
        .map(|n| format!("m{n}.rego"))
        .collect();
    let modules: Vec<(&str, &str)> = names
        .iter()
        .map(String::as_str)
        .zip(case.modules.iter().map(String::as_str))
        .collect();
    let none = Value::Object(Map::new());
    let data = if case.data.is_null() {
        &none
    } else {
        &case.data
    };
    let wants_error =
        case.want_error.is_some() || case.want_error_code.is_some() || case.strict_error;
    let rules = RegoRules::compile(&modules, data, entry);
    let loaded = rules.is_ok();
    let said = rules.and_then(|rules| match &case.input_term {
        Some(term) => rules.run_term(term),
        None => rules.run(case.input.as_ref()),
    });
    match said {
        Err(error) if error.contains("is not allowed") && !is_construct(&error) => {
            Outcome::Outside(error)
        }
        // A text with expressions in it is a call of `internal.template_string`.
        Err(_) if case.note.starts_with("string-interpolation/") => {
            Outcome::Outside("`internal.template_string`".into())
        }
        Err(error) => {
            // Every error that the suite wants is one of an evaluation.
            match (loaded, wants_error) {
                (true, true) => Outcome::Agrees,
                (true, false) => Outcome::Differs(error),
                (false, _) => Outcome::Refused(error),
            }
        }
        Ok(value) => {
            let expected = case
                .want_result
                .as_ref()
                .map(|results| results.first().and_then(|result| result.get(name).cloned()));
            match expected {
                Some(expected) if same(&value, &expected, case.sort_bindings) => Outcome::Agrees,
                _ => Outcome::Differs(format!("gives {value:?}, expected {expected:?}")),
            }
        }
    }
}

/// Refused at load for how it is written, not for what it calls.
fn is_construct(error: &str) -> bool {
    [
        "`with`",
        "`default`",
        "`_ :=`",
        "`_ under not`",
        "`= under not`",
        "`a key twice in",
        "as a pattern`",
        "comprehension under not`",
        "as names`",
    ]
    .iter()
    .any(|word| error.contains(word))
}

fn same(a: &Option<Value>, b: &Option<Value>, unordered: bool) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => equal(a, b, unordered),
        _ => false,
    }
}

/// Equal as Rego has it: 1 is 1.0. Sets come as arrays, whose order the suite does not always keep.
fn equal(a: &Value, b: &Value, unordered: bool) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| a == b)
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            if unordered {
                return a.iter().all(|a| b.iter().any(|b| equal(a, b, unordered)));
            }
            a.iter().zip(b).all(|(a, b)| equal(a, b, unordered))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter()
                    .all(|(key, a)| b.get(key).is_some_and(|b| equal(a, b, unordered)))
        }
        (a, b) => a == b,
    }
}

#[test]
fn the_compliance_suite_of_opa() {
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/opa-compliance.tar.gz");
    if !data.exists() {
        assert!(std::env::var_os("CI").is_none(), "{}", data.display());
        println!("not run: {} is not here", data.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unpacked = Command::new("tar")
        .arg("-xzf")
        .arg(&data)
        .arg("-C")
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(unpacked.success());
    let mut files: Vec<_> = std::fs::read_dir(dir.path().join("opa-compliance"))
        .unwrap()
        .flat_map(|group| std::fs::read_dir(group.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();

    let mut agree = 0;
    let mut outside: BTreeMap<String, usize> = BTreeMap::new();
    let mut refused = Vec::new();
    let mut differ = Vec::new();
    for path in files {
        let file: File = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for case in file.cases {
            match judge(&case) {
                Outcome::Agrees => agree += 1,
                Outcome::Outside(why) => {
                    let why = why.split("line ").nth(1).unwrap_or(&why);
                    *outside.entry(why.to_owned()).or_default() += 1;
                }
                Outcome::Refused(why) => refused.push(format!("{}: {why}", case.note)),
                Outcome::Differs(why) => differ.push(format!("{}: {why}", case.note)),
            }
        }
    }
    let loaded = agree + differ.len();
    let judged = loaded + refused.len();
    println!(
        "{agree} of {loaded} cases that load agree; {} more are refused at load; {} use what is not run here",
        refused.len(),
        outside.values().sum::<usize>()
    );
    for line in &differ {
        println!("differs: {line}");
    }
    for line in &refused {
        println!("refused: {line}");
    }
    for (why, count) in &outside {
        println!("outside: {count} {why}");
    }
    assert!(judged >= 730, "only {judged} cases were judged");
    assert!(
        agree * 1000 >= loaded * 997,
        "only {agree} of {loaded} cases that load agree"
    );
    // A regression would hide among what is refused.
    assert!(
        agree * 1000 >= judged * 968,
        "only {agree} of {judged} cases agree"
    );
}
