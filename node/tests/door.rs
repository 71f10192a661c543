//! The doors as callers see them: malformed input, exit codes, tokens over TCP, and secrets that
//! must not stay behind.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{fs, path::Path};

use common::{Site, chmod, free_tcp, over_tcp, over_unix, read_action, request, until};
use serde_json::{Value, json};

#[test]
fn malformed_input_of_every_kind_is_a_recorded_deny() {
    let site = Site::new();
    let _node = site.start_deciding();
    let good = read_action("/srv/a.txt").to_string();
    let change = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replace(from, to).into_bytes()
    };
    let with = |field: &str| format!("{},{field}}}", &good[..good.len() - 1]).into_bytes();
    let nested = |n: usize| with(&format!("\"params\":{}1{}", "[".repeat(n), "]".repeat(n)));
    let mut not_utf8 = change("ops-1", "ops-#");
    let at = not_utf8.iter().position(|b| *b == b'#').unwrap();
    not_utf8[at] = 0xff;
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("a blank", b" \n".to_vec()),
        ("an array", b"[]".to_vec()),
        ("null", b"null".to_vec()),
        ("a text", b"\"fs.read\"".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("cut off", good.as_bytes()[..good.len() - 2].to_vec()),
        ("something behind it", format!("{good} {{}}").into_bytes()),
        ("a comma too many", with("")),
        ("single quotes", good.replace('"', "'").into_bytes()),
        ("a comment", format!("/* */{good}").into_bytes()),
        ("a byte order mark", format!("\u{feff}{good}").into_bytes()),
        ("UTF-16", utf16),
        ("bytes that are no UTF-8", not_utf8),
        ("a lone surrogate", change("ops-1", "\\ud800")),
        ("a control character", change("ops-1", "ops\u{1}1")),
        ("an escaped NUL", change("ops-1", "ops\\u00001")),
        ("a key twice", with("\"action\":\"fs.read\"")),
        ("a key twice, below", with("\"params\":{\"a\":1,\"a\":2}")),
        ("a key in another case", with("\"Action\":\"fs.read\"")),
        (
            "keys that differ by case",
            with("\"params\":{\"a\":1,\"A\":2}"),
        ),
        ("an unknown key", with("\"colour\":\"red\"")),
        ("no action", change("\"action\":\"fs.read\",", "")),
        ("a number for a name", change("\"fs.read\"", "7")),
        ("an empty name", change("\"fs.read\"", "\"\"")),
        ("NaN", with("\"params\":{\"a\":NaN}")),
        ("a number beyond all", with("\"params\":{\"a\":1e999}")),
        (
            "an integer that loses digits",
            with("\"params\":{\"a\":9007199254740993}"),
        ),
        ("nesting", nested(40)),
        ("much nesting", nested(20_000)),
        (
            "too long",
            with(&format!("\"params\":{{\"a\":\"{}\"}}", "x".repeat(70_000))),
        ),
        (
            "a path above the root",
            change("/srv/a.txt", "/../etc/shadow"),
        ),
        (
            "a path that is not absolute",
            change("/srv/a.txt", "srv/a.txt"),
        ),
        (
            "a doubly encoded path",
            change("/srv/a.txt", "/srv/%252e%252e/x"),
        ),
        ("a backslash", change("/srv/a.txt", "/srv\\\\..\\\\x")),
    ];
    let mut positions = Vec::new();
    for (what, body) in &cases {
        let ran = site.decide(body).ended(3);
        let answer = ran.json();
        assert_eq!(answer["decision"], "deny", "{what}: {answer}");
        assert_eq!(answer["reason"], "INVALID_REQUEST", "{what}: {answer}");
        assert_eq!(
            answer["policies"],
            json!([]),
            "{what}: nothing was evaluated"
        );
        assert!(!answer["message"].as_str().unwrap().is_empty(), "{what}");
        positions.push((*what, answer["record"].clone()));
    }
    let records = site.records();
    for (what, position) in positions {
        let record = records.iter().find(|r| r["index"] == position["index"]);
        let record = record.unwrap_or_else(|| panic!("{what} is not recorded"));
        assert_eq!(record["leaf"], position["leaf"], "{what}");
        assert_eq!(record["record"]["reason"], "INVALID_REQUEST", "{what}");
        assert_eq!(record["record"]["decision"], "deny", "{what}");
    }
    site.ok(&["audit", "tail", "-n", "3"])
        .says(&["INVALID_REQUEST"]);

    // The controls: the same action whole, with blanks around it, and with harmless additions.
    site.decide(good.as_bytes()).ended(0);
    site.decide(format!(" \n{good}\n ").as_bytes()).ended(0);
    site.decide(&with(
        "\"params\":{\"a\":[1,{\"b\":null}],\"c\":9007199254740991}",
    ))
    .ended(0);
    site.decides();
}

#[test]
fn decide_ends_with_0_for_allow_3_for_deny_and_2_where_no_node_answers() {
    let site = Site::new();
    let allow = read_action("/srv/a.txt").to_string();
    let deny = read_action("/etc/shadow").to_string();
    site.write("allow.json", &allow);
    site.write("deny.json", &deny);
    for command in [["decide", "allow.json"].as_slice(), &["status"], &["peers"]] {
        site.tidelock(command).ended(2).says(&["no node answers"]);
        let failed = site.tidelock(&[command, &["--json"]].concat()).ended(2);
        assert!(
            failed.json()["error"]
                .as_str()
                .unwrap()
                .contains("no node answers")
        );
    }
    let node = site.start_deciding();
    site.ok(&["decide", "allow.json"])
        .says(&["allow POLICY_ALLOW", "read-srv"]);
    site.tidelock(&["decide", "deny.json"])
        .ended(3)
        .says(&["deny NO_MATCH"]);
    site.tidelock(&["decide", "nowhere.json"])
        .ended(2)
        .says(&["nowhere.json"]);
    site.tidelock(&["decide", "-c", "nowhere.toml"])
        .ended(2)
        .says(&["nowhere.toml"]);
    let answer = site.decide(allow.as_bytes()).ended(0).json();
    for field in [
        "decision",
        "reason",
        "policies",
        "bundle",
        "posture",
        "record",
        "action_hash",
    ] {
        assert!(!answer[field].is_null(), "{field}: {answer}");
    }
    assert_eq!(answer["bundle"]["epoch"], 1);

    // An explanation is recorded as one and has the same exit codes.
    site.ok(&["decide", "--explain", "allow.json"]);
    site.tidelock(&["decide", "--explain", "deny.json"])
        .ended(3);
    let records = site.records();
    let last = &records[records.len() - 1]["record"];
    assert_ne!(last["type"], "decision", "{last}");

    assert!(node.stop().success());
    site.tidelock(&["decide", "allow.json"])
        .ended(2)
        .says(&["no node answers"]);
}

/// A site whose node serves TCP, with one token: its address and the token.
fn with_tcp(site: &Site) -> (std::net::SocketAddr, String) {
    let address = free_tcp();
    let doors = format!("unix = \"s\"\ntcp = \"{address}\"\ntokens = \"tokens.toml\"");
    site.configure("unix = \"s\"", &doors);
    let made = site.json(&["token", "new", "--principal", "Agent::ops-1"]);
    let entry = made["entry"].as_str().unwrap();
    let token = made["token"].as_str().unwrap().to_owned();
    assert!(!entry.contains(&token), "the file holds the hash only");
    site.write("tokens.toml", &format!("format = 1\n\n{entry}"));
    chmod(&site.path("tokens.toml"), 0o600);
    (address, token)
}

#[test]
fn the_tcp_door_answers_200_403_401_and_400() {
    let site = Site::new();
    let (address, token) = with_tcp(&site);
    let _node = site.start_deciding();
    let bearer = format!("authorization: Bearer {token}");
    let allow = read_action("/srv/a.txt").to_string();
    let deny = read_action("/etc/shadow").to_string();
    let decide = |headers: &[&str], body: &str| {
        let (status, body) = over_tcp(
            address,
            &request("POST", "/v1/decide", headers, body.as_bytes()),
        );
        (
            status,
            serde_json::from_str::<Value>(&body).unwrap_or_default(),
        )
    };
    let (status, answer) = decide(&[&bearer], &allow);
    assert_eq!(
        (status, &answer["decision"]),
        (200, &json!("allow")),
        "{answer}"
    );
    let (status, answer) = decide(&[&bearer], &deny);
    assert_eq!(
        (status, &answer["reason"]),
        (403, &json!("NO_MATCH")),
        "{answer}"
    );
    let (status, answer) = decide(&[&bearer], "{");
    assert_eq!(
        (status, &answer["reason"]),
        (400, &json!("INVALID_REQUEST")),
        "{answer}"
    );

    // Without the token, with another, with two, in another scheme: no decision and no record.
    let before = site.records().len();
    let wrong = format!("authorization: Bearer {}x", &token[..token.len() - 1]);
    let basic = format!("authorization: Basic {token}");
    for headers in [
        [].as_slice(),
        &[wrong.as_str()],
        &[basic.as_str()],
        &[bearer.as_str(), bearer.as_str()],
        &["authorization: Bearer"],
    ] {
        let (status, answer) = decide(headers, &allow);
        assert_eq!(status, 401, "{headers:?}: {answer}");
        assert!(answer["decision"].is_null(), "{headers:?}: {answer}");
    }
    assert_eq!(
        site.records().len(),
        before,
        "strangers are counted, not recorded one by one"
    );

    // A token speaks for its own principal only.
    let other = allow.replace("ops-1", "ops-2");
    let (status, answer) = decide(&[&bearer], &other);
    assert_ne!(status, 200, "{answer}");
    assert_eq!(answer["decision"], "deny", "{answer}");

    // The operator's door is the Unix socket alone.
    let seal =
        |headers: &[&str]| request("POST", "/v1/admin/audit.seal?apply=true", headers, b"{}");
    let (status, body) = over_tcp(address, &seal(&[&bearer]));
    assert!([401, 403, 404].contains(&status), "{status} {body}");
    let (status, _) = over_unix(&site.path("s"), &seal(&[])).unwrap();
    assert_eq!(status, 200);

    let get = |path: &str| over_tcp(address, &request("GET", path, &[&bearer], b""));
    assert_eq!(get("/healthz").0, 200);
    assert_eq!(get("/readyz").0, 200);
    assert_eq!(get("/nowhere").0, 404);
    let (status, metrics) = get("/metrics");
    assert_eq!(status, 200);
    assert!(
        metrics.contains("tidelock_answers_total{reason=\"NO_MATCH\"} 1"),
        "{metrics}"
    );
}

#[test]
fn a_token_for_a_principal_with_quotes_in_its_id_is_written_so_that_it_is_read_back() {
    let site = Site::new();
    let (address, _) = with_tcp(&site);
    let made = site.json(&["token", "new", "--principal", "Agent::the \"best\" \\o/"]);
    let entry = made["entry"].as_str().unwrap();
    site.write("tokens.toml", &format!("format = 1\n\n{entry}"));
    let _node = site.start_deciding();
    let bearer = format!("authorization: Bearer {}", made["token"].as_str().unwrap());
    let mut action = read_action("/srv/a.txt");
    let ask = |action: &Value| {
        let body = action.to_string();
        over_tcp(
            address,
            &request("POST", "/v1/decide", &[&bearer], body.as_bytes()),
        )
        .0
    };
    assert_ne!(ask(&action), 200, "it is not ops-1");
    action["principal"]["id"] = json!("the \"best\" \\o/");
    assert_eq!(ask(&action), 200);
}

#[test]
fn a_reload_takes_the_tokens_and_a_bad_token_file_changes_nothing() {
    let site = Site::new();
    let (address, old) = with_tcp(&site);
    let node = site.start_deciding();
    let body = read_action("/srv/a.txt").to_string();
    let ask = |token: &str| {
        let bearer = format!("authorization: Bearer {token}");
        over_tcp(
            address,
            &request("POST", "/v1/decide", &[&bearer], body.as_bytes()),
        )
        .0
    };
    let made = site.json(&["token", "new", "--principal", "Agent::ops-1"]);
    let new = made["token"].as_str().unwrap();
    let file = format!("format = 1\n\n{}", made["entry"].as_str().unwrap());
    site.write("tokens.toml", &file);
    assert_eq!((ask(&old), ask(new)), (200, 401), "until it is told");
    node.reload("reloaded");
    assert_eq!(
        (ask(&old), ask(new)),
        (401, 200),
        "the old one is out at once"
    );

    chmod(&site.path("tokens.toml"), 0o644);
    let why = node.reload("reload_refused");
    assert!(
        why["why"].as_str().unwrap().contains("tokens.toml"),
        "{why}"
    );
    chmod(&site.path("tokens.toml"), 0o600);
    site.write("tokens.toml", &file.replace("sha256:", "sha512:"));
    node.reload("reload_refused");
    assert_eq!((ask(&old), ask(new)), (401, 200));
}

/// The files below `dir` that hold `needle`.
fn holding(dir: &Path, needle: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            holding(&path, needle, found);
            continue;
        }
        // The socket is no file to read.
        let Ok(bytes) = fs::read(&path) else { continue };
        if bytes.windows(needle.len()).any(|w| w == needle.as_bytes()) {
            found.push(path.display().to_string());
        }
    }
}

#[test]
fn secrets_stay_out_of_the_log_the_records_the_metrics_and_the_status() {
    let site = Site::new();
    let (address, token) = with_tcp(&site);
    site.write(
        "tidelock.toml",
        &format!("{}\n[log]\nlevel = \"trace\"\n", site.read("tidelock.toml")),
    );
    let node = site.start_deciding();
    let bearer = format!("authorization: Bearer {token}");
    let pem = site.read("a.key");
    let secret_line = pem.lines().nth(1).unwrap().to_owned();
    let marker = "a-plain-word-that-stays";
    let mut action = read_action("/srv/a.txt");
    action["params"] = json!({
        "note": marker,
        "headers": {"Authorization": format!("Bearer {token}")},
        "argv": ["curl", "-H", format!("Authorization: Bearer {token}"), "--token", token],
        "file": pem,
        "password": secret_line,
    });
    let decide = |body: &str| {
        over_tcp(
            address,
            &request("POST", "/v1/decide", &[&bearer], body.as_bytes()),
        )
    };
    let (status, answer) = decide(&action.to_string());
    assert_eq!(status, 200, "{answer}");
    let mut said = answer;
    // Refusals that quote what they refuse, and a stranger who shows a wrong token.
    let quoted = json!({format!("Bearer {token}"): 1}).to_string();
    said.push_str(&decide(&quoted).1);
    let stranger = format!("authorization: Bearer {token}0");
    let strange = request(
        "POST",
        "/v1/decide",
        &[&stranger],
        action.to_string().as_bytes(),
    );
    said.push_str(&over_tcp(address, &strange).1);
    for path in ["/metrics", "/v1/status"] {
        let (status, body) = over_unix(&site.path("s"), &request("GET", path, &[], b"")).unwrap();
        assert_eq!(status, 200, "{path}");
        said.push_str(&body);
    }
    for command in [
        ["status"].as_slice(),
        &["peers"],
        &["doctor"],
        &["audit", "tail", "--all"],
    ] {
        for form in [[].as_slice(), &["--json"]] {
            let ran = site.ok(&[command, form].concat());
            said.push_str(&ran.out);
            said.push_str(&ran.err);
        }
    }
    site.operate("audit.seal");
    said.push_str(&site.operate("journal").to_string());
    node.reload("reloaded");
    assert!(node.stop().success());
    assert!(
        said.contains(marker),
        "the control: what is no secret is shown"
    );

    let mut marked = Vec::new();
    holding(&site.path("root"), marker, &mut marked);
    assert!(
        !marked.is_empty(),
        "the control: what is no secret is recorded"
    );
    for (what, secret) in [
        ("the token", token.as_str()),
        ("the private key", &secret_line),
    ] {
        assert!(!said.contains(secret), "{what} was said: {said}");
        let mut leaks = Vec::new();
        holding(&site.path("root"), secret, &mut leaks);
        assert_eq!(leaks, [""; 0], "{what}");
        assert!(
            !site.read("node.log").contains(secret),
            "{what} is in node.log"
        );
    }
    assert!(
        site.read("node.log").contains("started"),
        "the control: the log is there"
    );
}

/// The kinds of buckets, the narrowest first.
const BUCKETS: [&str; 6] = [
    "principal_action",
    "principal_resource",
    "principal",
    "caller",
    "action",
    "total",
];

/// The config `base` with one bucket that lets `burst` pass at once and one a second, and others that refuse nothing.
fn with_small(base: &str, small: &str, burst: u32) -> String {
    let mut text =
        format!("{base}\n[quota]\nrequests_per_second = 1000000\nrequests_burst = 1000000\n");
    for bucket in BUCKETS {
        let (name, unbound) = match bucket {
            // That of principals has no way to be left out.
            "principal" => ("actions", 1_000_000),
            bucket => (bucket, 0),
        };
        let (rate, burst) = match bucket == small {
            true => (1, burst),
            false => (unbound, 1_000_000),
        };
        text.push_str(&format!(
            "{name}_per_second = {rate}\n{name}_burst = {burst}\n"
        ));
    }
    text
}

/// What the metrics show of each bucket: passed, refused, and the keys that it holds.
fn quotas_shown(site: &Site) -> [[u64; 3]; 6] {
    let metrics = request("GET", "/metrics", &[], b"");
    let (status, text) = over_unix(&site.path("s"), &metrics).unwrap();
    assert_eq!(status, 200);
    let number = |series: String| -> u64 {
        let mut lines = text.lines();
        let number = lines.find_map(|line| line.strip_prefix(&series)?.strip_prefix(' '));
        number.unwrap().parse().unwrap()
    };
    BUCKETS.map(|bucket| {
        [
            number(format!(
                "tidelock_quota_total{{bucket=\"{bucket}\",outcome=\"passed\"}}"
            )),
            number(format!(
                "tidelock_quota_total{{bucket=\"{bucket}\",outcome=\"refused\"}}"
            )),
            number(format!("tidelock_quota_keys{{bucket=\"{bucket}\"}}")),
        ]
    })
}

/// What a quota said to one action.
#[derive(Debug, PartialEq)]
enum Charged {
    Passed,
    Refused,
    /// The metrics say that it was refused, and the answer that its record came too late.
    RefusedUnrecorded,
}

/// Asks once where only `small` refuses, and demands that the metrics moved by that action and by nothing else.
#[track_caller]
fn charged(site: &Site, small: &str, headers: &[&str], action: &Value) -> Charged {
    let before = quotas_shown(site);
    let body = action.to_string();
    let decide = request("POST", "/v1/decide", headers, body.as_bytes());
    let (status, text) = over_unix(&site.path("s"), &decide).unwrap();
    let after = quotas_shown(site);
    let moved: Vec<[u64; 2]> = before
        .iter()
        .zip(after)
        .map(|(before, after)| [after[0] - before[0], after[1] - before[1]])
        .collect();
    let answer: Value = serde_json::from_str(&text).unwrap();
    let is_passed = moved[BUCKETS.iter().position(|b| *b == small).unwrap()][0] > 0;
    let expected = BUCKETS.map(|bucket| match is_passed {
        // A bucket without a bound counts nothing.
        true => [u64::from(bucket == small || bucket == "principal"), 0],
        false => [0, u64::from(bucket == small)],
    });
    assert_eq!(moved, expected, "{small}: {answer}");
    let reason = answer["reason"].as_str().unwrap();
    match (is_passed, reason) {
        (true, reason) => {
            assert_ne!(reason, "RATE_LIMIT_EXCEEDED", "{answer}");
            Charged::Passed
        }
        (false, "AUDIT_UNAVAILABLE") => Charged::RefusedUnrecorded,
        (false, reason) => {
            assert_eq!((status, reason), (429, "RATE_LIMIT_EXCEEDED"), "{answer}");
            assert_eq!(answer["message"], format!("quota {small} is spent"));
            let wait_ms = answer["retry_after_ms"].as_u64().unwrap();
            assert!((1..=1_000).contains(&wait_ms), "{answer}");
            Charged::Refused
        }
    }
}

#[test]
fn each_quota_of_the_config_refuses_the_metrics_show_it_and_a_restart_forgets_it() {
    let site = Site::new();
    let (_, token) = with_tcp(&site);
    let bearer = format!("authorization: Bearer {token}");
    let base = site.read("tidelock.toml");
    let small = |bucket, burst| site.write("tidelock.toml", &with_small(&base, bucket, burst));
    small(BUCKETS[0], 2);
    let node = site.start_deciding();
    assert_eq!(quotas_shown(&site), [[0; 3]; 6]);

    // Of the socket's operator, who asks for others, where no token is shown.
    let act = |who: &str, action: &str, path: &str| {
        let mut asked = read_action(path);
        asked["principal"]["id"] = json!(who);
        asked["action"] = json!(action);
        asked
    };
    let usual = act("ops-2", "fs.read", "/srv/a.txt");
    // Passes until the bucket is spent: how often, and no less often than the burst.
    let spend = |bucket: &str, burst: u32| {
        let mut passed = 0;
        until("a spent quota", || {
            match charged(&site, bucket, &[], &usual) {
                Charged::Passed => passed += 1,
                Charged::Refused => return Some(()),
                Charged::RefusedUnrecorded => {}
            }
            None
        });
        assert!(passed >= burst, "{bucket}: {passed} of {burst}");
    };
    for bucket in BUCKETS {
        small(bucket, 2);
        node.reload("reloaded");
        spend(bucket, 2);
        // The control: what meets another bucket passes at once, and time gives the one of all back.
        let (headers, other) = match bucket {
            "principal_action" | "action" => (vec![], act("ops-2", "fs.stat", "/srv/a.txt")),
            "principal_resource" => (vec![], act("ops-2", "fs.read", "/srv/b.txt")),
            "principal" => (vec![], act("ops-3", "fs.read", "/srv/a.txt")),
            "caller" => (vec![bearer.as_str()], read_action("/srv/a.txt")),
            _ => {
                until("a token that came back", || {
                    (charged(&site, bucket, &[], &usual) == Charged::Passed).then_some(())
                });
                continue;
            }
        };
        let passed = charged(&site, bucket, &headers, &other);
        assert_eq!(passed, Charged::Passed, "{bucket}");
    }
    // Each of them held the bucket that was spent and the one of the control.
    let keys = || quotas_shown(&site).map(|[_, _, keys]| keys);
    assert_eq!(keys(), [2, 2, 3, 2, 2, 1]);
    let text = format!("{}evict_after_s = 1\n", with_small(&base, "total", 2));
    site.write("tidelock.toml", &text);
    node.reload("reloaded");
    until("full buckets to be forgotten", || {
        (keys() == [0; 6]).then_some(())
    });

    // More is owed than the time of a restart pays.
    let burst = 20;
    small("total", burst);
    node.reload("reloaded");
    spend("total", burst);
    assert!(node.stop().success());
    let _node = site.start();
    assert_eq!(quotas_shown(&site), [[0; 3]; 6]);
    for _ in 0..burst {
        let passed = charged(&site, "total", &[], &usual);
        assert_eq!(passed, Charged::Passed, "a bucket began full");
    }
    spend("total", 0);
}
