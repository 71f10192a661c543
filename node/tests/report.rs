//! What callers report of allowed actions: once, by whom it was allowed to, over a restart too.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::net::SocketAddr;

use common::{Ran, Site, chmod, free_tcp, over_tcp, read_action, request, until};
use rustix::process::Signal;
use serde_json::{Value, json};
use tidelock_gateway::tokens::TokenDigest;

/// Asks until the answer is the policy's: the position of its record.
#[track_caller]
fn decided(site: &Site, path: &str, decision: &str) -> (u64, String) {
    until(decision, || {
        let answer = site.decide(read_action(path).to_string().as_bytes()).json();
        let record = &answer["record"];
        (answer["decision"] == decision && !record.is_null()).then(|| {
            let leaf = record["leaf"].as_str().unwrap().to_owned();
            (record["index"].as_u64().unwrap(), leaf)
        })
    })
}

/// Reports, again where the disk was too slow for the record.
#[track_caller]
fn report(site: &Site, (index, leaf): &(u64, String), more: &[&str]) -> Ran {
    let index = index.to_string();
    let args = [&["report", "--json", &index, leaf], more].concat();
    until("an outcome that is recorded or refused", || {
        let ran = site.tidelock(&args);
        let busy = ["AUDIT_UNAVAILABLE", "unanswered"];
        let text = format!("{}{}", ran.out, ran.err);
        (!busy.iter().any(|word| text.contains(word))).then_some(ran)
    })
}

fn as_guest(tcp: SocketAddr, body: &Value) -> (u16, Value) {
    let bearer = "authorization: Bearer token-of-a-guest";
    let bytes = request("POST", "/v1/report", &[bearer], body.to_string().as_bytes());
    let (status, text) = over_tcp(tcp, &bytes);
    (status, serde_json::from_str(&text).unwrap())
}

#[test]
fn an_outcome_is_taken_once_from_the_caller_it_was_allowed_to_over_restarts_too() {
    let site = Site::new();
    let tcp = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"t.toml\"\n"),
    );
    site.write(
        "t.toml",
        &format!(
            "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"guest\"\nscopes = [\"decide\"]\n",
            TokenDigest::of(b"token-of-a-guest")
        ),
    );
    chmod(&site.path("t.toml"), 0o600);
    let node = site.start_deciding();
    let allowed = decided(&site, "/srv/a.txt", "allow");
    let open = decided(&site, "/srv/b.txt", "allow");
    let denied = decided(&site, "/etc/shadow", "deny");

    let body = |(index, leaf): &(u64, String)| json!({"record": {"index": index, "leaf": leaf}, "outcome": "executed"});
    let (status, answer) = as_guest(tcp, &body(&allowed));
    assert_eq!(
        (status, &answer["error"]),
        (403, &json!("NOT_YOURS")),
        "{answer}"
    );
    let secret = json!({"bytes": 512, "password": "hunter2-hunter2"}).to_string();
    let taken = report(&site, &allowed, &["executed", "--detail", &secret])
        .ended(0)
        .json();
    assert_eq!(taken["outcome"], "executed");
    assert_eq!(taken["decision"]["index"], allowed.0);
    let again = |at: &(u64, String), code: &str| {
        report(&site, at, &["failed"]).ended(1).says(&[code]);
    };
    again(&allowed, "ALREADY_REPORTED");
    again(&denied, "NOT_ALLOWED");
    again(&(allowed.0, denied.1.clone()), "UNKNOWN_RECORD");
    again(&(1_000_000, allowed.1.clone()), "UNKNOWN_RECORD");
    for bad in [
        json!({"record": {"index": 1}, "outcome": "executed"}),
        json!({"record": {"index": 1, "leaf": "x"}, "outcome": "done"}),
        json!({"record": {"index": -1, "leaf": "x"}, "outcome": "failed"}),
        json!({"record": {"index": 1, "leaf": "x"}, "outcome": "failed", "colour": 1}),
        json!({"record": {"index": 1, "leaf": "x"}, "outcome": "failed", "detail": {"a": "x".repeat(9_000)}}),
    ] {
        assert_eq!(as_guest(tcp, &bad).0, 400, "{bad}");
    }

    let outcomes = || -> Vec<Value> {
        let records = site.records();
        let outcomes = records.iter().filter(|r| r["record"]["type"] == "outcome");
        outcomes.map(|r| r["record"].clone()).collect()
    };
    let recorded = outcomes();
    assert_eq!(recorded.len(), 1, "{recorded:?}");
    assert_eq!(recorded[0]["outcome"], "executed");
    assert_eq!(recorded[0]["decision_leaf"], allowed.1);
    assert_eq!(recorded[0]["detail"]["bytes"], 512);
    assert!(!recorded[0].to_string().contains("hunter2"), "{recorded:?}");

    // Killed: what memory knew is gone, the log is not.
    node.end(Signal::KILL);
    let _node = site.start();
    again(&allowed, "ALREADY_REPORTED");
    again(&denied, "NOT_ALLOWED");
    let (status, answer) = as_guest(tcp, &body(&open));
    assert_eq!(
        (status, &answer["error"]),
        (403, &json!("NOT_YOURS")),
        "{answer}"
    );
    report(&site, &open, &["not_executed"]).ended(0);
    again(&open, "ALREADY_REPORTED");
    assert_eq!(outcomes().len(), 2);
}
