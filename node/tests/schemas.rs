//! The published JSON Schemas, held against what the program itself takes and refuses.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use common::{Site, read_action};
use serde_json::{Map, Value, json};
use toml_edit::{DocumentMut, Item};

/// Whether a text has the form that a pattern of ours asks for: a name of these characters, or a text
/// without those.
fn has_form(pattern: &str, text: &str) -> bool {
    let of = |more: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    if pattern.starts_with("^[A-Za-z][A-Za-z0-9_]") {
        return of("_");
    }
    if pattern.starts_with("^[A-Za-z][A-Za-z0-9._:/-]") {
        return of("._:/-");
    }
    if pattern.starts_with("^sha256:") {
        let hex = |b: u8| b"0123456789abcdef".contains(&b);
        let digits = text.strip_prefix("sha256:");
        return digits.is_some_and(|digits| digits.len() == 64 && digits.bytes().all(hex));
    }
    assert!(pattern.starts_with("^[^\\u0000-"), "{pattern}");
    !text
        .chars()
        .any(|c| c.is_control() && !"\n\r\t".contains(c))
}

/// What a schema says against a value: a small reader of JSON Schema, which knows the keywords that
/// ours use and takes no others.
fn mistakes(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    let number = |of: &Value| of.as_i64().unwrap();
    for (keyword, says) in schema.as_object().unwrap() {
        let good = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "examples" | "format" => {
                true
            }
            "$ref" => {
                let to = root
                    .pointer(says.as_str().unwrap().trim_start_matches('#'))
                    .unwrap();
                found.extend(mistakes(root, to, value, at));
                true
            }
            "oneOf" | "anyOf" => {
                let fit = |one: &&Value| mistakes(root, one, value, at).is_empty();
                let fits = says.as_array().unwrap().iter().filter(fit).count();
                if keyword == "oneOf" {
                    fits == 1
                } else {
                    fits > 0
                }
            }
            "type" => match says {
                Value::Array(any) => any.iter().any(|kind| is(value, kind)),
                one => is(value, one),
            },
            "const" => value == says,
            "enum" => says.as_array().unwrap().contains(value),
            "minimum" => value.as_i64().is_none_or(|v| v >= number(says)),
            "maximum" => value.as_i64().is_none_or(|v| v <= number(says)),
            "pattern" => value
                .as_str()
                .is_none_or(|text| has_form(says.as_str().unwrap(), text)),
            "propertyNames" => value.as_object().is_none_or(|v| {
                v.keys()
                    .all(|key| mistakes(root, says, &json!(key), at).is_empty())
            }),
            "minLength" => value
                .as_str()
                .is_none_or(|v| v.chars().count() as i64 >= number(says)),
            "maxLength" => value
                .as_str()
                .is_none_or(|v| v.chars().count() as i64 <= number(says)),
            "minProperties" => value
                .as_object()
                .is_none_or(|v| v.len() as i64 >= number(says)),
            "maxProperties" => value
                .as_object()
                .is_none_or(|v| v.len() as i64 <= number(says)),
            "required" => value.as_object().is_none_or(|v| {
                says.as_array()
                    .unwrap()
                    .iter()
                    .all(|key| v.contains_key(key.as_str().unwrap()))
            }),
            "properties" => {
                for (key, schema) in says.as_object().unwrap() {
                    if let Some(inner) = value.get(key) {
                        found.extend(mistakes(root, schema, inner, &format!("{at}/{key}")));
                    }
                }
                true
            }
            "additionalProperties" => {
                let named = schema.get("properties").and_then(Value::as_object);
                let more = value.as_object().into_iter().flatten();
                let more = more.filter(|(key, _)| !named.is_some_and(|n| n.contains_key(*key)));
                for (key, inner) in more {
                    if *says == json!(false) {
                        found.push(format!("{at}: `{key}` is unknown"));
                    } else if says.is_object() {
                        found.extend(mistakes(root, says, inner, &format!("{at}/{key}")));
                    }
                }
                true
            }
            "items" => {
                for inner in value.as_array().into_iter().flatten() {
                    found.extend(mistakes(root, says, inner, &format!("{at}[]")));
                }
                true
            }
            other => panic!("this test does not know `{other}`"),
        };
        if !good {
            found.push(format!("{at}: {keyword} {says}, not {value}"));
        }
    }
    found
}

fn is(value: &Value, kind: &Value) -> bool {
    match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("this test does not know the type `{other}`"),
    }
}

fn schema(site: &Site, what: &str) -> Value {
    let schema = site.ok(&["schema", what]).json();
    assert_eq!(
        schema["$schema"],
        "https://json-schema.org/draft/2020-12/schema"
    );
    schema
}

fn fits(schema: &Value, value: &Value) -> bool {
    mistakes(schema, schema, value, "").is_empty()
}

#[track_caller]
fn must_fit(schema: &Value, value: &Value) {
    let found = mistakes(schema, schema, value, "");
    assert!(found.is_empty(), "{found:?}\n{value}");
}

/// A value with a change at a place; `Null` removes what is there.
fn changed(value: &Value, place: &str, new: &Value) -> Value {
    let mut value = value.clone();
    let (parent, key) = place.rsplit_once('/').unwrap();
    let parent = value.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if new.is_null() {
        parent.remove(key).unwrap();
    } else {
        parent.insert(key.to_owned(), new.clone());
    }
    value
}

/// The same day of an RFC 3339 time, a little later.
fn later(made: &str) -> String {
    let (day, _) = made.split_once('T').unwrap();
    format!("{day}T23:59:59.999Z")
}

#[test]
fn the_schemas_of_a_bundle_and_the_program_agree() {
    let site = Site::new();
    let manifest = schema(&site, "manifest");
    let good: Value = serde_json::from_str(&site.read("policy/manifest.json")).unwrap();
    must_fit(&manifest, &good);
    // What a manifest may say beside that is taken by both.
    let window = |role: &str, when: &str| {
        let made = good["created_at"].as_str().unwrap();
        let mut said = changed(&good, "/role", &json!(role));
        said = changed(&said, "/not_before", &json!(made));
        said = changed(&said, "/expires_at", &json!(later(made)));
        changed(&said, "/when_expired", &json!(when))
    };
    for said in [window("policy", "restrict"), window("break-glass", "close")] {
        must_fit(&manifest, &said);
        site.write("policy/manifest.json", &said.to_string());
        site.ok(&["bundle", "build", "policy", "--out", "window.tar"]);
    }
    for (place, new) in [
        ("/domain", Value::Null),
        ("/role", json!("release")),
        ("/role", json!("glass")),
        ("/not_before", json!(7)),
        ("/not_before", json!("tomorrow")),
        ("/expires_at", json!("2026-12-31")),
        ("/when_expired", json!("wait")),
        ("/colour", json!("red")),
        ("/epoch", json!(0)),
        ("/epoch", json!("1")),
        ("/epoch", json!(1_i64 << 53)),
        ("/format", json!(2)),
        ("/name", json!("")),
        ("/name", json!("n".repeat(64))),
        ("/classes", json!({})),
        ("/classes/observe/actions", json!("fs.read")),
        ("/classes/observe/stale_after_s", json!(0)),
        ("/classes/observe/when_restricted", json!("wait")),
        ("/classes/observe/colour", json!(1)),
        ("/classes/observe/close_after_s", Value::Null),
        ("/classes/observe/consult", json!({"upstream": "a"})),
        (
            "/classes/observe/consult",
            json!({"upstream": "a", "deadline_ms": 5_001}),
        ),
        (
            "/classes/observe/consult",
            json!({"upstream": "a", "deadline_ms": 500, "when_unreachable": "allow"}),
        ),
        (
            "/classes/observe/consult",
            json!({"upstream": "a", "deadline_ms": 500, "url": "https://a"}),
        ),
    ] {
        let bad = changed(&good, place, &new);
        assert!(!fits(&manifest, &bad), "{place}: {new}");
        site.write("policy/manifest.json", &bad.to_string());
        let ran = site.tidelock(&["bundle", "build", "policy", "--out", "bad.tar"]);
        assert_ne!(ran.code, 0, "{place}: {new}: {ran:?}");
    }
    site.write("policy/manifest.json", &good.to_string());
    site.ok(&["bundle", "build", "policy", "--out", "good.tar"]);

    let tests = schema(&site, "tests");
    for starter in ["coding-agent", "operations-agent", "service-mesh"] {
        site.ok(&[
            "bundle",
            "new",
            starter,
            "--starter",
            starter,
            "--name",
            "x",
            "--domain",
            "harbour",
        ]);
        for (file, schema) in [("tests/base.json", &tests), ("manifest.json", &manifest)] {
            must_fit(
                schema,
                &serde_json::from_str(&site.read(&format!("{starter}/{file}"))).unwrap(),
            );
        }
    }
    let good: Value = serde_json::from_str(&site.read("policy/tests/base.json")).unwrap();
    for (place, new) in [
        ("/0/expect", json!("maybe")),
        ("/0/expect", Value::Null),
        ("/0/colour", json!("red")),
        ("/0/because", json!(["it", "is"])),
        ("/0/policies", json!("read-srv")),
        ("/0/given/resource", Value::Null),
        ("/0/given/principal/name", json!("x")),
        ("/0/given/resource/attributes", json!([])),
        ("/0/given", Value::Null),
        // The older word beside the newer one.
        ("/0/request", good[0]["given"].clone()),
    ] {
        let bad = changed(&good, place, &new);
        assert!(!fits(&tests, &bad), "{place}: {new}");
        site.write("policy/tests/base.json", &bad.to_string());
        site.tidelock(&["bundle", "test", "policy"]).ended(2);
    }
    // The older word alone is taken by both, as in bundles that stand.
    let older = changed(&good, "/0/request", &good[0]["given"]);
    let older = changed(&older, "/0/given", &Value::Null);
    for said in [older, good] {
        must_fit(&tests, &said);
        site.write("policy/tests/base.json", &said.to_string());
        site.ok(&["bundle", "test", "policy"]);
    }
}

/// TOML as JSON would have it.
fn as_json(item: &Item) -> Value {
    if let Some(table) = item.as_table_like() {
        let entries = table
            .iter()
            .map(|(key, item)| (key.to_owned(), as_json(item)));
        return Value::Object(entries.collect::<Map<_, _>>());
    }
    if let Some(tables) = item.as_array_of_tables() {
        return tables
            .iter()
            .map(|table| as_json(&Item::Table(table.clone())))
            .collect();
    }
    if let Some(array) = item.as_array() {
        return array
            .iter()
            .map(|value| as_json(&Item::Value(value.clone())))
            .collect();
    }
    match (item.as_str(), item.as_integer(), item.as_bool()) {
        (Some(text), _, _) => json!(text),
        (_, Some(number), _) => json!(number),
        (_, _, Some(is)) => json!(is),
        _ => panic!("no JSON: {item:?}"),
    }
}

#[test]
fn the_schema_of_the_config_and_the_program_agree() {
    let site = Site::new();
    let config = schema(&site, "config");
    let check = |text: &str| {
        site.write("try.toml", text);
        let parsed: DocumentMut = text.parse().unwrap();
        let ran = site.tidelock(&["config", "check", "-c", "try.toml"]);
        (fits(&config, &as_json(parsed.as_item())), ran)
    };
    let good = site.read("tidelock.toml")
        + "\n[[mesh.peers]]\nid = \"b\"\naddress = \"127.0.0.1:7411\"\ncongestion = \"edge\"\n\
           \n[[gateway.users]]\nuid = 1\nprincipal = \"Agent::x\"\nact_as = true\n\
           \n[[consult.upstreams]]\nname = \"authority\"\nurl = \"https://a.example/access/v1/evaluation\"\n\
           address = \"127.0.0.1:8443\"\nca = \"up.crt\"\ncertificate = \"up-a.crt\"\nkey = \"up-a.key\"\n";
    let (said, ran) = check(&good);
    assert!(said, "{good}\n{config}");
    ran.ended(0);
    for (from, to) in [
        ("id = \"a\"", "id = 7"),
        ("id = \"a\"\n", ""),
        ("ceiling_bytes = \"32MiB\"", "ceiling_bytes = true"),
        ("ceiling_bytes = \"32MiB\"", "ceiling_bytes = 1"),
        (
            "trust = \"trust.toml\"",
            "trust = \"trust.toml\"\nworker_deadline_ms = 1",
        ),
        (
            "trust = \"trust.toml\"",
            "trust = \"trust.toml\"\ncolour = 1",
        ),
        ("trust = \"trust.toml\"", "trust = \"\""),
        ("custody = 0", "custody = 99"),
        ("congestion = \"edge\"", "congestion = \"wave\""),
        ("uid = 1\n", ""),
        ("act_as = true", "act_as = \"yes\""),
        ("ca = \"up.crt\"\n", ""),
        ("ca = \"up.crt\"\n", "ca = \"up.crt\"\nproxy = \"x\"\n"),
        ("[identity]", "[colour]\nred = 1\n\n[identity]"),
    ] {
        assert!(good.contains(from), "{from}");
        let bad = good.replacen(from, to, 1);
        let (said, ran) = check(&bad);
        assert!(!said, "the schema takes {to}");
        ran.ended(2);
    }
}

#[test]
fn the_schemas_of_action_and_decision_and_the_node_agree() {
    let site = Site::new();
    let _node = site.start_deciding();
    let (action, decision) = (schema(&site, "action"), schema(&site, "decision"));
    let good = read_action("/srv/a.txt");
    must_fit(&action, &good);
    let ask = |value: &Value| {
        let answer = site.decide(value.to_string().as_bytes()).json();
        must_fit(&decision, &answer);
        answer["reason"].as_str().unwrap().to_owned()
    };
    assert_ne!(ask(&good), "INVALID_REQUEST");
    for (place, new) in [
        ("/action", Value::Null),
        ("/action", json!(1)),
        ("/colour", json!("red")),
        ("/resource/name", json!("x")),
        ("/resource/id", Value::Null),
        ("/params", json!([])),
        ("/id", json!("i".repeat(129))),
    ] {
        let bad = changed(&good, place, &new);
        assert!(!fits(&action, &bad), "{place}: {new}");
        assert_eq!(ask(&bad), "INVALID_REQUEST", "{place}: {new}");
    }
    // The reader of schemas above finds what is wrong with an answer as well.
    assert!(!fits(&decision, &json!({"decision": "perhaps"})));
}
