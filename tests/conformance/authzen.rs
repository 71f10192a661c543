//! The AuthZEN door of a real node: the payloads of the public interop scenarios, the certification
//! scenario's levels, and what the door refuses.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

#[path = "../../node/tests/common/mod.rs"]
mod common;

use std::{fs, net::SocketAddr, path::Path};

use common::{Node, Site, chmod, free_tcp, not_run, over_tcp, request, until};
use serde_json::{Value, json};
use tidelock_gateway::tokens::TokenDigest;

/// May decide, explain and name other subjects: an enforcement point.
const PEP: &str = "token-of-an-enforcement-point";
/// May decide and explain for itself: the user alice.
const ALICE: &str = "token-of-alice";

const SCHEMA: &str = r#"
type OfSubject = { department?: String, role?: String };
type OfResource = { status?: String, owner?: String, ownerID?: String };
type Params = { soft?: Bool, method?: String };
type Circumstances = {
  params?: Params, subject_properties?: OfSubject, resource_properties?: OfResource,
  time?: String, ip?: String, source?: String
};
entity role_group;
entity user in [role_group] = { email?: String, role?: String };
entity identity in [role_group];
entity record = { status?: String };
entity todo;
entity route;
action "read", "write", "delete" appliesTo { principal: [user], resource: [record], context: Circumstances };
action "can_read_user" appliesTo { principal: [user], resource: [user], context: Circumstances };
action "can_read_todos", "can_create_todo", "can_update_todo", "can_delete_todo"
  appliesTo { principal: [user], resource: [todo], context: Circumstances };
action "GET", "POST", "PUT", "DELETE" appliesTo { principal: [identity], resource: [route], context: Circumstances };
"#;

const POLICIES: &str = r#"
@id("fixture-read")
permit (principal, action == Action::"read", resource)
when { principal == user::"alice" || principal == user::"bob" };
@id("fixture-write")
permit (principal == user::"alice", action == Action::"write", resource)
unless { resource has status && resource.status == "archived" }
unless { context has resource_properties && context.resource_properties has status
         && context.resource_properties.status == "archived" };
@id("fixture-write-of-admins")
permit (principal, action == Action::"write", resource)
when { (principal has role && principal.role == "admin")
       || (context has subject_properties && context.subject_properties has role
           && context.subject_properties.role == "admin") }
when { (resource has status && resource.status == "archived")
       || (context has resource_properties && context.resource_properties has status
           && context.resource_properties.status == "archived") };
@id("fixture-delete")
permit (principal == user::"alice", action == Action::"delete", resource)
when { context has params && context.params has soft && context.params.soft };

@id("todo-read")
permit (principal, action in [Action::"can_read_user", Action::"can_read_todos"], resource);
@id("todo-create")
permit (principal, action == Action::"can_create_todo", resource)
when { principal in role_group::"editor" || principal in role_group::"admin"
       || principal in role_group::"evil_genius" };
@id("todo-update-any")
permit (principal in role_group::"evil_genius", action == Action::"can_update_todo", resource);
@id("todo-delete-any")
permit (principal in role_group::"admin", action == Action::"can_delete_todo", resource);
@id("todo-change-own")
permit (principal, action in [Action::"can_update_todo", Action::"can_delete_todo"], resource)
when { principal in role_group::"editor" || principal in role_group::"admin"
       || principal in role_group::"evil_genius" }
when { principal has email && context has resource_properties
       && context.resource_properties has ownerID
       && context.resource_properties.ownerID == principal.email };

@id("route-read")
permit (principal, action == Action::"GET", resource)
when { resource == route::"/users/{userId}" || resource == route::"/todos" };
@id("route-change")
permit (principal in role_group::"editor", action in [Action::"POST", Action::"PUT", Action::"DELETE"], resource)
when { resource == route::"/todos" || resource == route::"/todos/{todoId}" };
"#;

fn data() -> Option<std::path::PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/authzen");
    dir.exists().then_some(dir)
}

/// The people of the scenarios, whose ids differ in one place.
fn entities(subjects: &[String]) -> Value {
    let role =
        |name: &str| json!({"uid": {"type": "role_group", "id": name}, "attrs": {}, "parents": []});
    let mut all: Vec<Value> = ["admin", "evil_genius", "editor", "viewer"]
        .map(role)
        .to_vec();
    for (mark, email, groups) in [
        (
            "CiRmZDA2",
            "rick@the-citadel.com",
            vec!["admin", "evil_genius", "editor"],
        ),
        ("CiRmZDE2", "morty@the-citadel.com", vec!["editor"]),
        ("CiRmZDI2", "summer@the-smiths.com", vec!["editor"]),
        ("CiRmZDM2", "beth@the-smiths.com", vec!["viewer"]),
        ("CiRmZDQ2", "jerry@the-smiths.com", vec!["viewer"]),
    ] {
        let Some(id) = subjects.iter().find(|id| id.starts_with(mark)) else {
            continue;
        };
        let parents: Vec<Value> = groups
            .iter()
            .map(|group| json!({"type": "role_group", "id": group}))
            .collect();
        all.push(json!({"uid": {"type": "user", "id": id}, "attrs": {"email": email}, "parents": parents}));
        all.push(json!({"uid": {"type": "identity", "id": id}, "attrs": {}, "parents": parents}));
    }
    all.push(json!({"uid": {"type": "user", "id": "alice"}, "attrs": {}, "parents": []}));
    all.push(
        json!({"uid": {"type": "user", "id": "bob"}, "attrs": {"role": "admin"}, "parents": []}),
    );
    for (id, status) in [("record-1", "active"), ("record-2", "archived")] {
        let attrs = json!({"status": status});
        all.push(json!({"uid": {"type": "record", "id": id}, "attrs": attrs, "parents": []}));
    }
    Value::Array(all)
}

/// A site with the scenarios' bundle, two tokens and a TCP door.
fn site(subjects: &[String], public_url: Option<&str>) -> (Site, SocketAddr) {
    let site = Site::new();
    for file in fs::read_dir(site.path("policy/policies")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    site.write("policy/schema.cedarschema", SCHEMA);
    site.write("policy/policies/authzen.cedar", POLICIES);
    site.write("policy/entities.json", &entities(subjects).to_string());
    for file in fs::read_dir(site.path("policy/tests")).unwrap() {
        let case = json!([{
            "name": "alice reads",
            "request": {
                "principal": {"type": "user", "id": "alice"}, "action": "read",
                "resource": {"type": "record", "id": "record-1"},
            },
            "expect": "allow", "policies": ["fixture-read"],
        }]);
        fs::write(file.unwrap().path(), case.to_string()).unwrap();
    }
    site.bundle("authzen.tar", "policy.key", |manifest| {
        manifest["classes"] = json!({"all": {
            "actions": [], "stale_after_s": 1_000_000, "restrict_after_s": 2_000_000,
            "close_after_s": 3_000_000, "when_restricted": "deny",
        }});
        manifest["default_class"] = json!("all");
    });
    let token = |token: &str, principal: &str, scopes: &str| {
        format!(
            "[[tokens]]\nsha256 = \"{}\"\nprincipal = \"{principal}\"\nprincipal_type = \"user\"\n\
             scopes = [\"decide\", \"explain\"{scopes}]\n",
            TokenDigest::of(token.as_bytes()),
        )
    };
    let tokens = format!(
        "format = 1\n{}{}",
        token(PEP, "pep", ", \"act_as\""),
        token(ALICE, "alice", "")
    );
    site.write("tokens.toml", &tokens);
    chmod(&site.path("tokens.toml"), 0o600);
    let tcp = free_tcp();
    let url = public_url.map_or_else(String::new, |url| format!("public_url = \"{url}\"\n"));
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"tokens.toml\"\n{url}"),
    );
    (site, tcp)
}

fn started(site: &Site) -> Node<'_> {
    let node = site.start();
    site.ok(&["bundle", "install", "authzen.tar", "--apply"]);
    node
}

fn ask_as(tcp: SocketAddr, token: &str, path: &str, body: &[u8]) -> (u16, Value) {
    let bearer = format!("authorization: Bearer {token}");
    let (status, text) = over_tcp(tcp, &request("POST", path, &[&bearer], body));
    (status, serde_json::from_str(&text).unwrap())
}

/// Asks as the enforcement point, again where the machine was too busy for a record or an engine.
#[track_caller]
fn ask(tcp: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    until("an answer of the policy", || {
        let (status, answer) = ask_as(tcp, PEP, path, body.to_string().as_bytes());
        let text = answer.to_string();
        let busy = [
            "AUDIT_UNAVAILABLE",
            "DEADLINE",
            "unanswered",
            "\"status\":503",
        ];
        (!busy.iter().any(|word| text.contains(word))).then_some((status, answer))
    })
}

/// What of a JSON Schema the scenarios' two schemas use: `type`, `required`, `properties`.
fn fits(schema: &Value, value: &Value) -> Result<(), String> {
    let kind = schema["type"].as_str().unwrap_or_default();
    let is_kind = match kind {
        "object" => value.is_object(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        other => return Err(format!("the check does not know type {other:?}")),
    };
    if !is_kind {
        return Err(format!("{value} is no {kind}"));
    }
    for key in schema["required"].as_array().into_iter().flatten() {
        let key = key.as_str().unwrap();
        if value.get(key).is_none() {
            return Err(format!("{value} has no {key}"));
        }
    }
    for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(value) = value.get(key) {
            fits(schema, value)?;
        }
    }
    Ok(())
}

#[test]
fn the_payloads_of_the_interop_scenarios_are_decided_as_expected() {
    let Some(dir) = data() else {
        not_run(
            "the AuthZEN interop scenarios",
            "../shared/data/authzen is not there",
        );
        return;
    };
    let read = |name: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(dir.join(name)).unwrap()).unwrap()
    };
    let scenarios = ["todo-decisions.json", "gateway-decisions.json"].map(read);
    let (of_request, of_response) = (
        read("evaluation-request.schema.json"),
        read("evaluation-response.schema.json"),
    );
    assert!(
        fits(&of_response, &json!({"decision": "yes"})).is_err(),
        "the check checks"
    );
    let mut subjects: Vec<String> = scenarios
        .iter()
        .flat_map(|scenario| scenario["evaluation"].as_array().unwrap())
        .map(|case| {
            case["request"]["subject"]["id"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    subjects.sort();
    subjects.dedup();
    assert_eq!(subjects.len(), 5);
    let (site, tcp) = site(&subjects, None);
    let _node = started(&site);
    let (mut one, mut several) = (0, 0);
    for case in scenarios
        .iter()
        .flat_map(|s| s["evaluation"].as_array().unwrap())
    {
        assert_eq!(fits(&of_request, &case["request"]), Ok(()));
        let (status, answer) = ask(tcp, "/access/v1/evaluation", &case["request"]);
        assert_eq!(
            (status, &answer["decision"]),
            (200, &case["expected"]),
            "{case} {answer}"
        );
        assert_eq!(fits(&of_response, &answer), Ok(()));
        one += 1;
    }
    let batches = scenarios
        .iter()
        .flat_map(|s| s["evaluations"].as_array().into_iter().flatten());
    for case in batches {
        let (status, answer) = ask(tcp, "/access/v1/evaluations", &case["request"]);
        assert_eq!(status, 200);
        let made = answer["evaluations"].as_array().unwrap();
        let expected = case["expected"].as_array().unwrap();
        assert_eq!(made.len(), expected.len(), "{case} {answer}");
        for (made, expected) in made.iter().zip(expected) {
            assert_eq!(fits(&of_response, made), Ok(()));
            assert_eq!(made["decision"], expected["decision"], "{case} {answer}");
        }
        several += 1;
    }
    assert_eq!((one, several), (65, 3));
}

fn user(id: &str) -> Value {
    json!({"type": "user", "id": id})
}

fn record(id: &str) -> Value {
    json!({"type": "record", "id": id})
}

fn tuple(subject: &Value, action: &Value, resource: &Value) -> Value {
    json!({"subject": subject, "action": action, "resource": resource})
}

fn basic(tcp: SocketAddr) {
    let (alice, bob) = (user("alice"), user("bob"));
    let name = |name: &str| json!({"name": name});
    let soft = |soft: bool| json!({"name": "delete", "properties": {"soft": soft}});
    let archived =
        json!({"type": "record", "id": "record-2", "properties": {"status": "archived"}});
    let admin = json!({"type": "user", "id": "bob", "properties": {"role": "admin"}});
    let mut in_context = tuple(&alice, &name("read"), &record("record-1"));
    in_context["context"] = json!({"time": "2025-06-27T18:03-07:00", "ip": "192.168.1.1"});
    let additional = json!({
        "subject": {"type": "user", "id": "alice", "properties": {"department": "Sales", "role": "manager"}},
        "action": {"name": "read", "properties": {"method": "GET"}},
        "resource": {"type": "record", "id": "record-1", "properties": {"status": "active", "owner": "bob"}},
    });
    let mut unknown = tuple(&alice, &name("read"), &record("record-1"));
    unknown["foo"] = json!("bar");
    unknown["subject"]["colour"] = json!(1);
    unknown["action"]["colour"] = json!(1);
    unknown["resource"]["colour"] = json!(1);
    unknown["futureField"] = json!({"nested": true});
    for (request, expected) in [
        (tuple(&alice, &name("read"), &record("record-1")), true),
        (tuple(&alice, &name("write"), &record("record-1")), true),
        (tuple(&bob, &name("read"), &record("record-1")), true),
        (tuple(&bob, &name("write"), &record("record-1")), false),
        (tuple(&alice, &name("write"), &archived), false),
        (tuple(&admin, &name("write"), &archived), true),
        (tuple(&alice, &soft(true), &record("record-1")), true),
        (tuple(&alice, &soft(false), &record("record-1")), false),
        (in_context, true),
        (additional, true),
        (unknown, true),
    ] {
        for path in ["/access/v1/evaluation", "/access/v1/evaluations"] {
            let (status, answer) = ask(tcp, path, &request);
            assert_eq!(
                (status, &answer["decision"]),
                (200, &json!(expected)),
                "{request} {answer}"
            );
            let context = &answer["context"];
            assert!(
                context["record"]["index"].is_u64(),
                "each has its record: {answer}"
            );
            let obligations = match expected {
                true => json!([{"id": "report_outcome", "record": context["record"]}]),
                false => json!([]),
            };
            assert_eq!(context["posture"], "normal");
            assert_eq!(context["obligations"], obligations, "{answer}");
        }
    }
}

/// What an allow obliges to is taken at the native door: from who asked, once.
fn outcome_is_reported(tcp: SocketAddr) {
    let reads = json!({"name": "read"});
    let request = tuple(&user("alice"), &reads, &record("record-1"));
    let (_, answer) = ask(tcp, "/access/v1/evaluation", &request);
    let obligation = &answer["context"]["obligations"][0];
    assert_eq!(obligation["id"], "report_outcome", "{answer}");
    let report = json!({"record": obligation["record"], "outcome": "executed"});
    let (status, answer) = ask_as(tcp, ALICE, "/v1/report", report.to_string().as_bytes());
    assert_eq!(
        (status, &answer["error"]),
        (403, &json!("NOT_YOURS")),
        "{answer}"
    );
    let (status, answer) = ask(tcp, "/v1/report", &report);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["decision"], obligation["record"], "{answer}");
    let (status, answer) = ask(tcp, "/v1/report", &report);
    assert_eq!(
        (status, &answer["error"]),
        (409, &json!("ALREADY_REPORTED")),
        "{answer}"
    );
}

/// Keys that the protocol does not know are ignored wherever they stand, and at the native door nowhere.
fn unknown_keys(tcp: SocketAddr) {
    let reads = json!({"name": "read"});
    let known = tuple(&user("alice"), &reads, &record("record-1"));
    let places = ["", "/subject", "/action", "/resource"];
    let with_unknown = |request: &Value, place: &str| {
        let mut request = request.clone();
        request.pointer_mut(place).unwrap()["colour"] = json!({"nested": 1});
        request
    };
    for place in places {
        let mut batch = known.clone();
        batch["evaluations"] = json!([with_unknown(&known, place)]);
        let (status, answer) = ask(tcp, "/access/v1/evaluations", &batch);
        assert_eq!(status, 200, "{place} {answer}");
        assert_eq!(
            answer["evaluations"][0]["decision"], true,
            "{place} {answer}"
        );
        for what in ["subject", "resource", "action"] {
            // A search for actions has none in it.
            if (what, place) == ("action", "/action") {
                continue;
            }
            let mut request = with_unknown(&known, place);
            if what == "action" {
                request.as_object_mut().unwrap().remove("action");
            }
            assert!(!found(tcp, what, &request).is_empty(), "{what} {place}");
        }
    }
    let mut paged = known.clone();
    paged["page"] = json!({"limit": 1, "colour": 1});
    assert!(!found(tcp, "subject", &paged).is_empty());

    let native =
        json!({"principal": user("alice"), "action": "read", "resource": record("record-1")});
    assert_eq!(
        ask(tcp, "/v1/decide", &native).0,
        200,
        "the control of what follows"
    );
    for place in ["", "/principal", "/resource"] {
        let body = with_unknown(&native, place).to_string();
        let (status, answer) = ask_as(tcp, PEP, "/v1/decide", body.as_bytes());
        assert_eq!(status, 400, "{place} {answer}");
    }
}

fn basic_refusals(tcp: SocketAddr) {
    let good = json!({
        "subject": {"type": "user", "id": "alice"}, "action": {"name": "read"},
        "resource": {"type": "record", "id": "record-1"},
    });
    let without = |pointer: &str, key: &str| {
        let mut request = good.clone();
        request
            .pointer_mut(pointer)
            .unwrap()
            .as_object_mut()
            .unwrap()
            .remove(key);
        request.to_string()
    };
    let with = |key: &str, value: Value| {
        let mut request = good.clone();
        request[key] = value;
        request.to_string()
    };
    let mut bad = vec![
        without("", "subject"),
        without("", "action"),
        without("", "resource"),
        without("/subject", "type"),
        without("/subject", "id"),
        without("/action", "name"),
        without("/resource", "type"),
        without("/resource", "id"),
        with("subject", json!("alice")),
        with("action", json!({"name": 123})),
        with("context", json!([])),
        with("Context", json!({})),
        with(
            "subject",
            json!({"type": "user", "id": "alice", "properties": 1}),
        ),
        with("context", json!({"subject_properties": {"role": "admin"}})),
        with("context", json!({"Resource_Properties": {}})),
        String::new(),
        "{".to_owned(),
        format!("{good}{good}"),
        good.to_string()
            .replacen('{', "{\"action\":{\"name\":\"write\"},", 1),
        with("resource", json!({"type": "Record name", "id": "record-1"})),
    ];
    bad.push(format!("{}1{}", "[".repeat(40), "]".repeat(40)));
    for body in &bad {
        let (status, answer) = ask_as(tcp, PEP, "/access/v1/evaluation", body.as_bytes());
        assert_eq!(status, 400, "{body} {answer}");
        assert!(answer.is_string(), "an error is one string: {answer}");
    }
    // The control: the request that they were made from.
    assert_eq!(ask(tcp, "/access/v1/evaluation", &good).1["decision"], true);

    // What the schema does not declare is a deny, and named: who sends it can be found by it.
    for (undeclared, named) in [
        (
            with("context", json!({"colour": "red"})),
            "no attribute `colour`",
        ),
        (
            with(
                "subject",
                json!({"type": "user", "id": "alice", "properties": {"shoe_size": 43}}),
            ),
            "no attribute `shoe_size`",
        ),
    ] {
        let (status, answer) = ask_as(tcp, PEP, "/access/v1/evaluation", undeclared.as_bytes());
        assert_eq!(
            (status, &answer["decision"]),
            (200, &json!(false)),
            "{answer}"
        );
        assert_eq!(answer["context"]["reason"], "EVALUATION_ERROR", "{answer}");
        let message = answer["context"]["message"].as_str().unwrap();
        assert!(message.contains(named), "{message}");
    }

    let bearer = format!("authorization: Bearer {PEP}");
    let body = good.to_string();
    let raw = |kind: &str| {
        let head = format!(
            "POST /access/v1/evaluation HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{bearer}\r\n\
             {kind}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        over_tcp(tcp, head.as_bytes()).0
    };
    assert_eq!(raw("content-type: text/plain\r\n"), 400);
    assert_eq!(raw(""), 400);
    assert_eq!(
        raw("content-type: Application/JSON; charset=utf-8\r\n"),
        200
    );

    let (status, text) = over_tcp(
        tcp,
        &request("POST", "/access/v1/evaluation", &[], body.as_bytes()),
    );
    assert_eq!(status, 401, "{text}");
    // Who has no act_as scope asks for itself only.
    let (status, answer) = ask_as(tcp, ALICE, "/access/v1/evaluation", body.as_bytes());
    assert_eq!(status, 200, "{answer}");
    let other = body.replace("alice", "bob");
    let (status, answer) = ask_as(tcp, ALICE, "/access/v1/evaluation", other.as_bytes());
    assert_eq!(status, 403, "{answer}");
    assert!(
        answer.as_str().unwrap().contains("principal_mismatch"),
        "{answer}"
    );
    let get = over_tcp(
        tcp,
        &request("GET", "/access/v1/evaluation", &[&bearer], b""),
    )
    .0;
    assert_eq!(get, 405);
}

fn request_ids(tcp: SocketAddr) {
    let body = tuple(
        &user("alice"),
        &json!({"name": "read"}),
        &record("record-1"),
    )
    .to_string();
    let ask = |ids: &[&str]| -> String {
        use std::io::{Read as _, Write as _};
        let bearer = format!("authorization: Bearer {PEP}");
        let headers: Vec<&str> = ids.iter().copied().chain([bearer.as_str()]).collect();
        let mut stream = std::net::TcpStream::connect(tcp).unwrap();
        let bytes = request("POST", "/access/v1/evaluation", &headers, body.as_bytes());
        stream.write_all(&bytes).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let id = "x-request-id: bfe9eb29-ab87-4ca3-be83-a1d5d8305716";
    assert!(ask(&[id]).contains(id));
    assert!(!ask(&[]).contains("x-request-id"));
    let long = format!("x-request-id: {}", "x".repeat(129));
    for bad in [
        &[long.as_str()] as &[&str],
        &[id, id],
        &["x-request-id: a b"],
        &["x-request-id:"],
    ] {
        let answer = ask(bad);
        assert!(answer.starts_with("HTTP/1.1 400"), "{bad:?} {answer}");
    }
}

/// Each decision of a request has its id, and so has each search.
fn ids_of_requests_are_recorded(site: &Site, tcp: SocketAddr) {
    let reads = json!({"name": "read"});
    let one = tuple(&user("alice"), &reads, &record("record-1"));
    let mut two = one.clone();
    two["evaluations"] = json!([{}, {}]);
    let of = |request: &Value, path: &str, id: &str| {
        let headers = [
            format!("authorization: Bearer {PEP}"),
            format!("x-request-id: {id}"),
        ];
        let headers = headers.each_ref().map(String::as_str);
        let bytes = request_of(path, &headers, request);
        assert_eq!(over_tcp(tcp, &bytes).0, 200, "{path}");
    };
    for (path, request, kind, count) in [
        ("evaluation", &one, "decision", 1),
        ("evaluations", &two, "decision", 2),
        ("search/subject", &one, "search", 1),
    ] {
        let id = format!("id-of-{path}");
        // Again where the disk was too slow for a record.
        until("records with the request's id", || {
            of(request, &format!("/access/v1/{path}"), &id);
            let records = site.records();
            let with_id = records.iter().map(|r| &r["record"]);
            let with_id = with_id.filter(|r| r["type"] == kind && r["request_id"] == *id);
            (with_id.count() >= count).then_some(())
        });
    }
}

fn request_of(path: &str, headers: &[&str], body: &Value) -> Vec<u8> {
    request("POST", path, headers, body.to_string().as_bytes())
}

fn batch(tcp: SocketAddr) {
    let path = "/access/v1/evaluations";
    let decisions = |request: &Value| -> Vec<bool> {
        let (status, answer) = ask(tcp, path, request);
        assert_eq!(status, 200, "{request} {answer}");
        assert!(answer.get("decision").is_none());
        let made = answer["evaluations"].as_array().unwrap();
        made.iter()
            .map(|one| one["decision"].as_bool().unwrap())
            .collect()
    };
    let reads = json!({
        "subject": user("bob"), "resource": record("record-1"),
        "evaluations": [{"action": {"name": "read"}}, {"action": {"name": "write"}},
                        {"action": {"name": "read"}}],
    });
    assert_eq!(decisions(&reads), [true, false, true]);
    for (semantic, expected) in [
        ("execute_all", vec![true, false, true]),
        ("deny_on_first_deny", vec![true, false]),
        ("permit_on_first_permit", vec![true]),
    ] {
        let mut request = reads.clone();
        request["options"] = json!({"evaluations_semantic": semantic, "another_option": 1});
        assert_eq!(decisions(&request), expected, "{semantic}");
    }
    // Whole objects replace defaults, which lend only what must not be absent.
    let merged = json!({
        "subject": user("alice"), "action": {"name": "write"},
        "resource": {"type": "record", "properties": {"status": "archived"}},
        "evaluations": [
            {"resource": {"id": "record-1", "properties": {"status": "active"}}},
            {"resource": {"id": "record-1"}},
            {"resource": {"type": "record", "id": "record-2", "properties": {"status": "archived"}}},
        ],
    });
    assert_eq!(decisions(&merged), [true, true, false]);
    let subjects = json!({
        "action": {"name": "write"},
        "resource": {"type": "record", "id": "record-2", "properties": {"status": "archived"}},
        "evaluations": [
            {"subject": user("alice")},
            {"subject": {"type": "user", "id": "bob", "properties": {"role": "admin"}}},
        ],
    });
    assert_eq!(decisions(&subjects), [false, true]);
    let contexts = json!({
        "subject": user("alice"), "action": {"name": "read"},
        "context": {"time": "2025-06-27T18:03-07:00"},
        "evaluations": [
            {"resource": record("record-1")},
            {"resource": record("record-2"), "context": {"time": "t", "source": "batch-override"}},
        ],
    });
    assert_eq!(decisions(&contexts), [true, true]);
    // A fault of one evaluation is that one's.
    let faulty = json!({
        "subject": user("alice"), "action": {"name": "read"},
        "evaluations": [{"resource": record("record-1")}, {}, 7, {"resource": {"id": "x"}}],
    });
    assert_eq!(decisions(&faulty), [true, false, false, false]);
    let (_, answer) = ask(tcp, path, &faulty);
    assert_eq!(
        answer["evaluations"][1]["context"]["error"]["status"], 400,
        "{answer}"
    );
    let single = json!({
        "subject": user("alice"), "action": {"name": "read"}, "resource": record("record-1"),
        "evaluations": [],
    });
    assert_eq!(ask(tcp, path, &single).1["decision"], true);

    let many = |count: usize| {
        let mut request = reads.clone();
        request["evaluations"] = vec![json!({"action": {"name": "read"}}); count].into();
        request
    };
    assert_eq!(ask(tcp, path, &many(64)).0, 200);
    assert_eq!(ask(tcp, path, &many(65)).0, 400);
    let mut other = reads.clone();
    other["options"] = json!({"evaluations_semantic": "first_come"});
    assert_eq!(ask(tcp, path, &other).0, 400);
    other["options"] = json!(7);
    assert_eq!(ask(tcp, path, &other).0, 400);
    other["evaluations"] = json!({});
    assert_eq!(ask(tcp, path, &other).0, 400);
}

/// Every result of a search, page by page.
fn found(tcp: SocketAddr, what: &str, request: &Value) -> Vec<Value> {
    let mut request = request.clone();
    let mut all = Vec::new();
    loop {
        let (status, answer) = ask(tcp, &format!("/access/v1/search/{what}"), &request);
        assert_eq!(status, 200, "{request} {answer}");
        assert!(answer["context"]["record"]["index"].is_u64(), "{answer}");
        let results = answer["results"].as_array().unwrap();
        assert_eq!(answer["page"]["count"], results.len());
        all.extend(results.iter().cloned());
        let token = answer["page"]["next_token"].as_str().unwrap();
        if token.is_empty() {
            return all;
        }
        request["page"]["token"] = json!(token);
    }
}

fn search(tcp: SocketAddr) {
    let action = |name: &str| json!({"name": name});
    let users = json!({"type": "user"});
    let records = json!({"type": "record"});
    let archived =
        json!({"type": "record", "id": "record-2", "properties": {"status": "archived"}});
    let admin = json!({"type": "user", "id": "bob", "properties": {"role": "admin"}});

    let readers = tuple(&users, &action("read"), &record("record-1"));
    assert_eq!(
        found(tcp, "subject", &readers),
        [user("alice"), user("bob")]
    );
    let mut paged = readers.clone();
    paged["page"] = json!({"limit": 1});
    assert_eq!(found(tcp, "subject", &paged), [user("alice"), user("bob")]);
    let (_, first) = ask(tcp, "/access/v1/search/subject", &paged);
    assert_eq!(first["results"], json!([user("alice")]));
    let mut id_ignored = readers.clone();
    id_ignored["subject"]["id"] = json!("nobody");
    id_ignored["context"] = json!({"time": "t"});
    assert_eq!(
        found(tcp, "subject", &id_ignored),
        [user("alice"), user("bob")]
    );
    let writers = tuple(&users, &action("write"), &archived);
    assert_eq!(found(tcp, "subject", &writers), [user("bob")]);

    let readable = tuple(&user("alice"), &action("read"), &records);
    let both = [record("record-1"), record("record-2")];
    assert_eq!(found(tcp, "resource", &readable), both);
    let writable = tuple(&admin, &action("write"), &records);
    assert_eq!(found(tcp, "resource", &writable), [record("record-2")]);

    let mine =
        json!({"subject": user("alice"), "resource": record("record-1"), "context": {"time": "t"}});
    assert_eq!(
        found(tcp, "action", &mine),
        [action("read"), action("write")]
    );
    let admins = json!({"subject": admin, "resource": archived});
    assert_eq!(
        found(tcp, "action", &admins),
        [action("read"), action("write")]
    );

    // Whom and what nobody knows is found nowhere.
    let nobody = json!({"subject": user("nonexistent-user"), "resource": record("record-1")});
    assert!(found(tcp, "action", &nobody).is_empty());
    let ships = tuple(
        &json!({"type": "spaceship"}),
        &action("read"),
        &record("record-1"),
    );
    assert!(found(tcp, "subject", &ships).is_empty());

    let refused = |what: &str, request: &Value, token: &str| {
        let path = format!("/access/v1/search/{what}");
        ask_as(tcp, token, &path, request.to_string().as_bytes()).0
    };
    for (what, request) in [
        (
            "subject",
            json!({"subject": users, "resource": record("record-1")}),
        ),
        (
            "resource",
            json!({"action": action("read"), "resource": records}),
        ),
        ("action", json!({"subject": user("alice")})),
        ("subject", tuple(&users, &action("read"), &records)),
        ("resource", tuple(&users, &action("read"), &records)),
        (
            "action",
            json!({"subject": users, "resource": record("record-1")}),
        ),
    ] {
        assert_eq!(refused(what, &request, PEP), 400, "{what} {request}");
    }
    for page in [
        json!({"limit": 0}),
        json!({"limit": "1"}),
        json!([]),
        json!({"token": "0.5"}),
    ] {
        let mut request = readers.clone();
        request["page"] = page;
        assert_eq!(refused("subject", &request, PEP), 400, "{request}");
    }
    // A token is of one question.
    let mut other = writers.clone();
    other["page"] = json!({"token": first["page"]["next_token"]});
    assert_eq!(refused("subject", &other, PEP), 400);
    // Without the scope act_as: of itself, and of nobody else.
    assert_eq!(refused("action", &mine, ALICE), 200);
    assert_eq!(refused("resource", &readable, ALICE), 200);
    assert_eq!(refused("subject", &readers, ALICE), 403);
    assert_eq!(refused("action", &admins, ALICE), 403);
    assert_eq!(refused("planet", &mine, PEP), 404);
}

/// The native door says why, and what would have to change.
fn explained(tcp: SocketAddr) {
    let explain = |action: &str, id: &str, params: Value| {
        let request = json!({
            "principal": user("alice"), "action": action, "resource": record(id), "params": params,
        });
        until("an explanation", || {
            let (_, answer) = ask_as(tcp, PEP, "/v1/explain", request.to_string().as_bytes());
            let reason = answer["reason"].as_str().unwrap_or_default().to_owned();
            let busy = ["AUDIT_UNAVAILABLE", "DEADLINE", "ENGINE_EXHAUSTED", ""];
            (!busy.contains(&reason.as_str())).then_some((reason, answer))
        })
    };
    let (reason, answer) = explain("read", "record-1", json!({}));
    assert_eq!(reason, "POLICY_ALLOW");
    let said = &answer["explanation"];
    assert_eq!(
        (&said["nearest"], &said["to_allow"]),
        (&json!([]), &json!([]))
    );
    assert_eq!(said["provenance"]["signers"], json!(["harbour-master"]));
    assert_eq!(said["provenance"]["source"], "active");

    let unmet = |action: &str, id: &str, params: Value, policy: &str| -> Vec<(String, String)> {
        until("the nearest policies", || {
            let (reason, answer) = explain(action, id, params.clone());
            assert_eq!(reason, "NO_MATCH", "{answer}");
            assert!(answer["bundle"]["hash"].is_string());
            let notes = answer["explanation"]["nearest"].as_array().unwrap();
            assert!(notes.len() <= 8);
            let nearest = notes.iter().position(|note| note["policy"] == policy)?;
            let unmet = notes[nearest]["unmet"].as_array().unwrap().iter();
            let word = |u: &Value, key: &str| u[key].as_str().unwrap().to_owned();
            // What would have to change is each policy's unmet conditions, in words.
            let to_allow = answer["explanation"]["to_allow"].as_array().unwrap();
            assert_eq!(to_allow.len(), notes.len());
            let needs: Vec<String> = unmet.clone().map(|u| word(u, "needs")).collect();
            assert_eq!(
                to_allow[nearest],
                format!("for {policy} to permit: {}", needs.join("; "))
            );
            Some(unmet.map(|u| (word(u, "part"), word(u, "needs"))).collect())
        })
    };
    // Of two conditions the one that fails is named.
    let of_write = unmet("write", "record-2", json!({}), "fixture-write");
    assert_eq!(of_write.len(), 1, "{of_write:?}");
    assert_eq!(of_write[0].0, "unless");
    assert!(of_write[0].1.contains("archived"), "{of_write:?}");
    let of_delete = unmet(
        "delete",
        "record-1",
        json!({"soft": false}),
        "fixture-delete",
    );
    assert_eq!(of_delete[0].0, "when");
    let of_scope = unmet(
        "delete",
        "record-1",
        json!({"soft": false}),
        "fixture-write",
    );
    assert_eq!(
        of_scope,
        [(
            "action".to_owned(),
            "action == Action::\"write\"".to_owned()
        )]
    );
}

#[test]
fn the_certification_scenario_s_levels_hold() {
    let (site, tcp) = site(&[], Some("https://pdp.example.com"));
    let node = started(&site);
    basic(tcp);
    outcome_is_reported(tcp);
    unknown_keys(tcp);
    basic_refusals(tcp);
    request_ids(tcp);
    ids_of_requests_are_recorded(&site, tcp);
    batch(tcp);
    search(tcp);

    // Discovery.
    let metadata = || {
        let bytes = request("GET", "/.well-known/authzen-configuration", &[], b"");
        let (status, text) = over_tcp(tcp, &bytes);
        (status, serde_json::from_str::<Value>(&text).unwrap())
    };
    let (status, answer) = metadata();
    assert_eq!(status, 200);
    assert_eq!(answer["policy_decision_point"], "https://pdp.example.com");
    for (key, path) in [
        ("access_evaluation_endpoint", "evaluation"),
        ("access_evaluations_endpoint", "evaluations"),
        ("search_subject_endpoint", "search/subject"),
        ("search_resource_endpoint", "search/resource"),
        ("search_action_endpoint", "search/action"),
    ] {
        assert_eq!(
            answer[key],
            format!("https://pdp.example.com/access/v1/{path}")
        );
    }

    explained(tcp);

    // Quotas change while the node runs, and status, metrics and the command show them.
    site.write(
        "tidelock.toml",
        &format!(
            "{}\n[quota]\nactions_per_second = 1\nactions_burst = 2\n",
            site.read("tidelock.toml")
        ),
    );
    node.reload("reloaded");
    let request = tuple(
        &user("alice"),
        &json!({"name": "read"}),
        &record("record-1"),
    );
    let spent = until("a spent quota", || {
        let (status, answer) = ask(tcp, "/access/v1/evaluation", &request);
        assert_eq!(status, 200);
        (answer["context"]["reason"] == "RATE_LIMIT_EXCEEDED").then_some(answer)
    });
    assert_eq!(spent["decision"], false);
    assert_eq!(
        spent["context"]["message"],
        "quota principal_action is spent"
    );
    assert!(
        spent["context"]["retry_after_ms"].as_u64().unwrap() <= 1_000,
        "{spent}"
    );
    site.write(
        "tidelock.toml",
        &site
            .read("tidelock.toml")
            .replace("_second = 1\n", "_second = 5000\n"),
    );
    node.reload("reloaded");
    until("the new quota", || {
        (ask(tcp, "/access/v1/evaluation", &request).1["decision"] == true).then_some(())
    });
    let quotas = site.json(&["quota"])["quotas"].clone();
    assert_eq!(quotas[0]["bucket"], "principal_action");
    assert!(quotas[0]["refused"].as_u64() >= Some(1), "{quotas}");
    assert_eq!(quotas[3]["bucket"], "caller");
    assert_eq!(quotas[3]["per_second"], 10_000);
    assert_eq!(quotas[5]["per_second"], 20_000);
    site.ok(&["quota"]).says(&["principal_resource", "total"]);

    // Each search is in the log, and so is what was not understood.
    let records = site.records();
    let of = |kind: &str| {
        records
            .iter()
            .filter(|r| r["record"]["type"] == kind)
            .count()
    };
    assert!(
        of("search") > 10 && of("decision") > 20 && of("refused") > 10,
        "{} {} {}",
        of("search"),
        of("decision"),
        of("refused")
    );
    let searched = records
        .iter()
        .find(|r| r["record"]["type"] == "search")
        .unwrap();
    assert_eq!(
        searched["record"]["principal"],
        json!({"type": "user"}),
        "{searched}"
    );
    let invalid = records
        .iter()
        .any(|r| r["record"]["invalid"]["code"] == "principal_mismatch");
    assert!(invalid);
}

#[test]
fn a_posture_that_is_not_normal_is_an_obligation_and_the_metadata_name_the_host() {
    let (site, tcp) = site(&[], None);
    site.bundle("old.tar", "policy.key", |manifest| {
        manifest["classes"] = json!({"all": {
            "actions": [], "stale_after_s": 1, "restrict_after_s": 2_000_000,
            "close_after_s": 3_000_000, "when_restricted": "deny",
        }});
        manifest["default_class"] = json!("all");
    });
    let _node = site.start();
    site.ok(&["bundle", "install", "old.tar", "--apply"]);
    let of = |action: &str| {
        let action = json!({"name": action});
        let request = tuple(&user("bob"), &action, &record("record-1"));
        ask(tcp, "/access/v1/evaluation", &request).1
    };
    let allowed = until("a stale policy", || {
        let answer = of("read");
        assert_eq!(answer["decision"], true, "{answer}");
        (answer["context"]["posture"] == "stale").then_some(answer)
    });
    let posture = json!({"id": "posture", "posture": "stale"});
    let report = json!({"id": "report_outcome", "record": allowed["context"]["record"]});
    assert_eq!(
        allowed["context"]["obligations"],
        json!([report, posture]),
        "{allowed}"
    );
    let denied = of("write");
    assert_eq!(denied["decision"], false);
    assert_eq!(
        denied["context"]["obligations"],
        json!([posture]),
        "{denied}"
    );

    for host in ["localhost", "localhost:8080", "127.0.0.1"] {
        let head = format!(
            "GET /.well-known/authzen-configuration HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        );
        let (status, text) = over_tcp(tcp, head.as_bytes());
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["policy_decision_point"], format!("http://{host}"));
        assert_eq!(
            answer["access_evaluation_endpoint"],
            format!("http://{host}/access/v1/evaluation")
        );
    }
}
