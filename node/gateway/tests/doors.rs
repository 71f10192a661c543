//! Who gets in, and what each request is answered.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{ACT_AS, BARE, Echo, FULL, Running, Script, body, header, quick, soon, start, status};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::{Request, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tidelock_gateway::client::Door;
use tidelock_gateway::wire::{
    DecideRequest, DecisionAnswer, DecisionWord, EntityRef, Problem, Readiness,
};
use tidelock_gateway::{
    AuthConfig, Client, ClientError, Gateway, GatewayConfig, GatewayError, GatewayLimits,
    GatewayParts, Grant, ListenError, Scopes, UnixDoor,
};
use tidelock_interceptor::{Action, Caller, Decision, Mode, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixListener, UnixStream};

fn value(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn problem(bytes: &[u8]) -> String {
    serde_json::from_slice::<Problem>(bytes).unwrap().error
}

#[tokio::test]
async fn every_reason_is_answered_with_its_status_and_its_whole_answer() {
    let node = start(quick()).await;
    let client = node.client(Some(FULL));
    for path in ["/v1/decide", "/v1/explain"] {
        for reason in Reason::ALL {
            let expected = match reason {
                Reason::PolicyAllow => 200,
                Reason::InvalidRequest => 400,
                Reason::RateLimitExceeded => 429,
                Reason::AuditUnavailable
                | Reason::AuditCapacity
                | Reason::EngineExhausted
                | Reason::PostureClosed
                | Reason::ConsultUnreachable
                | Reason::ConsultTimeout
                | Reason::ConsultInvalid
                | Reason::ConsultBusy => 503,
                Reason::ConsultNeeded | Reason::ConsultHeld => 202,
                _ => 403,
            };
            let asked = format!("\"{reason}\"");
            let (status, bytes) = client.post_json(path, asked).await.unwrap();
            assert_eq!(status, expected, "{path} {reason}");
            // The schema in the document is the answer that is really given.
            let answer: DecisionAnswer = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(answer.reason, reason.as_str());
            assert_eq!(answer.decision == DecisionWord::Allow, status == 200);
        }
        let (status, bytes) = client.post_json(path, "\"hold\"").await.unwrap();
        assert_eq!((status, &value(&bytes)["decision"]), (202, &json!("hold")));
    }
    let modes: Vec<_> = node
        .script
        .asked()
        .into_iter()
        .map(|asked| asked.mode)
        .collect();
    let half = Reason::ALL.len() + 1;
    assert!(modes[..half].iter().all(|mode| *mode == Mode::Decide));
    assert!(modes[half..].iter().all(|mode| *mode == Mode::Explain) && modes.len() == 2 * half);

    let answer = node
        .raw(&common::decide(FULL, "\"RATE_LIMIT_EXCEEDED\""))
        .await;
    assert_eq!(
        (status(&answer), header(&answer, "retry-after")),
        (429, Some("3"))
    );
    assert_eq!(header(&answer, "content-type"), Some("application/json"));
    assert_eq!(header(&answer, "cache-control"), Some("no-store"));
}

#[tokio::test]
async fn a_search_past_the_quota_is_told_when_to_come_back() {
    let node = start(quick()).await;
    let (agent, file) = (
        json!({"type": "Agent", "id": "full"}),
        json!({"type": "File", "id": "/srv/x"}),
    );
    let read = json!({"name": "fs.read"});
    let good = [
        (
            "subject",
            json!({"subject": {"type": "Agent"}, "action": read, "resource": file}),
        ),
        (
            "resource",
            json!({"subject": agent, "action": read, "resource": {"type": "File"}}),
        ),
        ("action", json!({"subject": agent, "resource": file})),
    ];
    for (what, body) in good {
        let search = |body: &str| {
            let line =
                format!("/access/v1/search/{what} HTTP/1.1\r\ncontent-type: application/json");
            common::decide(FULL, body).replacen("/v1/decide HTTP/1.1", &line, 1)
        };
        let refused = node.raw(&search(&body.to_string())).await;
        assert_eq!(
            (status(&refused), header(&refused, "retry-after")),
            (429, Some("3")),
            "{refused}"
        );
        let words = common::body(&refused);
        assert!(
            words
                .as_str()
                .is_some_and(|words| words.starts_with("RATE_LIMIT_EXCEEDED: ")),
            "{refused}"
        );
        // The control: what is not understood is no matter of quota.
        let invalid = node.raw(&search("{}")).await;
        assert_eq!(
            (status(&invalid), header(&invalid, "retry-after")),
            (400, None),
            "{invalid}"
        );
    }
}

#[test]
fn the_answer_is_the_document_s_answer() {
    let mut answer = common::answer(Decision::Deny, Reason::NoMatch);
    answer.errors = vec!["e".to_owned()];
    answer.window = Some("w".to_owned());
    answer.request_id = Some("r".to_owned());
    let text = serde_json::to_string(&answer).unwrap();
    let read: DecisionAnswer = serde_json::from_str(&text).unwrap();
    assert_eq!((read.errors, read.window), (answer.errors, answer.window));
}

#[test]
fn the_document_s_request_is_one_that_the_interceptor_takes() {
    let entity = |kind: &str, id: &str| EntityRef {
        kind: kind.to_owned(),
        id: id.to_owned(),
    };
    let caller = Caller {
        principal_type: "Agent".to_owned(),
        principal_id: "a".to_owned(),
        may_act_as: true,
        door: "tcp",
        stated_by: None,
    };
    let mut request = DecideRequest {
        id: Some("job-17/step-3".to_owned()),
        principal: Some(entity("Agent", "b")),
        action: "fs.read".to_owned(),
        resource: entity("File", "/srv/data/report.csv"),
        params: Some(json!({"max_bytes": 4096})),
        context: Some(json!({})),
    };
    let parse = |request: &DecideRequest| {
        Action::parse(&serde_json::to_vec(request).unwrap(), &caller).map(|_| ())
    };
    assert_eq!(parse(&request), Ok(()), "with everything in it");
    request.id = None;
    request.principal = None;
    request.params = None;
    request.context = None;
    assert_eq!(parse(&request), Ok(()), "with only what must be there");
    request.action = String::new();
    assert!(parse(&request).is_err());

    // The book's example is one as well.
    let book = include_str!("../../../docs/src/api.md");
    let example = book
        .split("/v1/decide -d '")
        .nth(1)
        .unwrap()
        .split("'\n")
        .next()
        .unwrap();
    assert_eq!(
        Action::parse(example.as_bytes(), &caller).map(|_| ()),
        Ok(())
    );
    let answer = book
        .split("```json\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let answer: DecisionAnswer = serde_json::from_str(answer).unwrap();
    assert_eq!(answer.decision, DecisionWord::Allow);
}

#[tokio::test]
async fn a_right_token_gets_in_and_a_wrong_one_does_not() {
    let node = start(quick()).await;
    let ask = "\"POLICY_ALLOW\"";
    let (status, _) = node
        .client(Some(FULL))
        .post_json("/v1/decide", ask)
        .await
        .unwrap();
    assert_eq!(status, 200);
    for wrong in [None, Some("token-ful"), Some("token-fulL"), Some("x")] {
        for path in ["/v1/decide", "/v1/explain", "/v1/admin/echo"] {
            let (status, bytes) = node.client(wrong).post_json(path, ask).await.unwrap();
            assert_eq!(
                (status, problem(&bytes).as_str()),
                (401, "unauthenticated"),
                "{path}"
            );
        }
        for path in ["/v1/status", "/metrics"] {
            assert_eq!(node.client(wrong).get(path).await.unwrap().0, 401, "{path}");
        }
    }
    assert_eq!(node.script.asked().len(), 1, "only the one was judged");

    let answer = node
        .raw("GET /v1/status HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await;
    assert_eq!(common::status(&answer), 401);
    assert_eq!(
        header(&answer, "www-authenticate"),
        Some("Bearer realm=\"tidelock\"")
    );
}

#[tokio::test]
async fn a_caller_can_do_what_its_scopes_say() {
    let node = start(quick()).await;
    let ask = "\"POLICY_ALLOW\"";
    for (token, path, expected) in [
        (FULL, "/v1/decide", 200),
        (FULL, "/v1/explain", 200),
        (ACT_AS, "/v1/decide", 200),
        (ACT_AS, "/v1/explain", 403),
        (BARE, "/v1/decide", 403),
        (BARE, "/v1/explain", 403),
    ] {
        let (status, bytes) = node.client(Some(token)).post_json(path, ask).await.unwrap();
        assert_eq!(status, expected, "{token} {path}");
        if expected == 403 {
            assert_eq!(problem(&bytes), "missing_scope");
        }
    }
    assert_eq!(
        node.client(Some(BARE)).get("/v1/status").await.unwrap().0,
        200
    );
    let asked = node.script.asked();
    let callers: Vec<_> = asked
        .iter()
        .map(|asked| (asked.caller.principal_id.as_str(), asked.caller.may_act_as))
        .collect();
    assert_eq!(callers, [("full", false), ("full", false), ("proxy", true)]);
    assert!(asked.iter().all(|asked| asked.caller.door == "tcp"));
}

#[tokio::test]
async fn anonymous_callers_get_in_only_where_that_was_asked_for() {
    let grant = Grant::new(
        "Agent",
        "anyone",
        Scopes {
            decide: true,
            ..Scopes::default()
        },
    )
    .unwrap();
    let auth = AuthConfig::default().allow_anonymous_loopback(grant);
    let node = common::start_with(quick(), auth, |door| door).await;
    let anyone = node.client(None);
    let ask = "\"POLICY_ALLOW\"";
    assert_eq!(anyone.post_json("/v1/decide", ask).await.unwrap().0, 200);
    assert_eq!(anyone.post_json("/v1/explain", ask).await.unwrap().0, 403);
    assert_eq!(
        node.client(Some("wrong"))
            .post_json("/v1/decide", ask)
            .await
            .unwrap()
            .0,
        401
    );
    assert_eq!(node.script.asked()[0].caller.principal_id, "anyone");

    // Without it, a TCP door for which nobody has credentials is not opened at all.
    let refused = bind(Some("127.0.0.1:0"), None, AuthConfig::default(), quick()).await;
    assert_eq!(
        refused.map(|_| ()),
        Err(GatewayError::TcpWithoutAuthentication)
    );
}

async fn bind(
    tcp: Option<&str>,
    unix: Option<UnixDoor>,
    auth: AuthConfig,
    limits: GatewayLimits,
) -> Result<Gateway, GatewayError> {
    let config = GatewayConfig {
        public_url: None,
        proxies: Default::default(),
        tcp: tcp.map(|a| a.parse().unwrap()),
        unix,
        auth,
        limits,
    };
    let parts = GatewayParts {
        decider: Arc::new(Script::default()),
        operator: Some(Arc::new(Echo)),
        on_refused: Arc::new(|_| {}),
    };
    Gateway::bind(config, parts).await
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_at_the_start() {
    let auth = || AuthConfig::default().tokens(common::tokens());
    let refused = bind(None, None, auth(), quick()).await;
    assert_eq!(refused.map(|_| ()), Err(GatewayError::NoDoor));

    let far = "192.0.2.7:8080";
    let refused = bind(Some(far), None, auth(), quick())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        refused,
        ListenError::NotLoopback(far.parse().unwrap()).into()
    );
    assert!(
        refused.to_string().contains("is not a loopback address"),
        "{refused}"
    );

    let first = bind(Some("127.0.0.1:0"), None, auth(), quick())
        .await
        .unwrap();
    let taken = first.tcp_addr().unwrap();
    let refused = bind(Some(&taken.to_string()), None, auth(), quick()).await;
    assert_eq!(
        refused.map(|_| ()),
        Err(ListenError::TcpInUse(taken).into())
    );

    let zero = GatewayLimits {
        slots: 0,
        ..quick()
    };
    let refused = bind(Some("127.0.0.1:0"), None, auth(), zero).await;
    assert!(matches!(
        refused.map(|_| ()),
        Err(GatewayError::Count { name: "slots", .. })
    ));
    let share = GatewayLimits {
        slots: 4,
        slots_per_principal: 5,
        ..quick()
    };
    let refused = bind(Some("127.0.0.1:0"), None, auth(), share).await;
    assert!(matches!(
        refused.map(|_| ()),
        Err(GatewayError::Count {
            name: "slots_per_principal",
            max: 4,
            ..
        })
    ));
    let never = GatewayLimits {
        head_timeout: Duration::MAX,
        ..quick()
    };
    let refused = bind(Some("127.0.0.1:0"), None, auth(), never).await;
    assert!(matches!(
        refused.map(|_| ()),
        Err(GatewayError::Time {
            name: "head_timeout",
            ..
        })
    ));
}

#[tokio::test]
async fn on_the_unix_socket_the_node_s_own_user_is_the_operator() {
    let node = start(quick()).await;
    let local = node.local(None);
    let (status, _) = local
        .post_json("/v1/decide", "\"POLICY_ALLOW\"")
        .await
        .unwrap();
    assert_eq!(status, 200);
    let caller = &node.script.asked()[0].caller;
    assert_eq!(
        (caller.principal_type.as_str(), caller.door),
        ("Operator", "unix")
    );

    let (status, bytes) = local
        .post_json("/v1/admin/echo", "{\"a\":1}")
        .await
        .unwrap();
    assert_eq!(
        (status, value(&bytes)),
        (200, json!({"body": {"a": 1}, "apply": false}))
    );
    for (query, apply) in [
        ("apply=true", true),
        ("apply=false", false),
        ("apply=TRUE", false),
    ] {
        let path = format!("/v1/admin/echo?{query}");
        let (status, bytes) = local.post_json(&path, "").await.unwrap();
        assert_eq!(
            (status, value(&bytes)),
            (200, json!({"body": {}, "apply": apply}))
        );
    }
    for (path, body, expected, code) in [
        ("/v1/admin/echo", "{", 400, "invalid_request"),
        ("/v1/admin/nothing", "", 404, "not_found"),
        ("/v1/admin/", "", 404, "not_found"),
        ("/v1/admin/../decide", "", 404, "not_found"),
        ("/v1/admin/fail", "", 409, "held"),
        ("/v1/admin/odd", "", 500, "odd"),
    ] {
        let (status, bytes) = local.post_json(path, body).await.unwrap();
        assert_eq!(
            (status, problem(&bytes).as_str()),
            (expected, code),
            "{path}"
        );
    }
    // A wrong token is wrong even here.
    assert_eq!(
        node.local(Some("x"))
            .post_json("/v1/admin/echo", "")
            .await
            .unwrap()
            .0,
        401
    );
    assert_eq!(local.get("/v1/admin/echo").await.unwrap().0, 405);
}

#[tokio::test]
async fn an_operation_through_the_tcp_door_is_refused_whatever_the_token() {
    let node = start(quick()).await;
    for token in [FULL, ACT_AS] {
        let client = node.client(Some(token));
        let (status, bytes) = client
            .post_json("/v1/admin/echo?apply=true", "{}")
            .await
            .unwrap();
        assert_eq!((status, problem(&bytes).as_str()), (403, "operator_only"));
    }
    assert_eq!(
        node.local(None)
            .post_json("/v1/admin/echo", "{}")
            .await
            .unwrap()
            .0,
        200
    );
}

/// The child half of the next test: speaks to the socket as whoever it was started as.
#[test]
fn as_another_user() {
    use std::io::{Read as _, Write as _};
    let Ok(socket) = std::env::var("TIDELOCK_TEST_SOCKET") else {
        return;
    };
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let path = std::env::var("TIDELOCK_TEST_PATH").unwrap();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 14\r\n\r\n\
         \"POLICY_ALLOW\""
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    println!("STATUS {}", status(&answer));
}

/// Asks as this user, from a process of its own; the status it got.
async fn ask_as(node: &Running, uid: u32, path: &str) -> u16 {
    let program = node.dir().join("child");
    if !program.exists() {
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(&program);
    command
        .args(["--exact", "as_another_user", "--nocapture"])
        .env("TIDELOCK_TEST_SOCKET", &node.unix)
        .env("TIDELOCK_TEST_PATH", path)
        .current_dir("/")
        .stderr(Stdio::inherit())
        .uid(uid)
        .gid(0);
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.split_once("STATUS "))
        .expect(&text);
    line.1.trim().parse().unwrap()
}

#[tokio::test]
async fn another_user_of_the_socket_is_who_the_kernel_says_and_never_the_operator() {
    const MAPPED: u32 = 60_001;
    const UNKNOWN: u32 = 60_002;
    if !rustix::process::geteuid().is_root() {
        println!("not run: becoming another user needs root");
        return;
    }
    let grant = Grant::new(
        "Agent",
        "ci",
        Scopes {
            decide: true,
            ..Scopes::default()
        },
    )
    .unwrap();
    let auth = AuthConfig::default()
        .tokens(common::tokens())
        .unix_peer(MAPPED, grant)
        .unwrap();
    let node = common::start_with(quick(), auth, |door| door.mode(0o660)).await;
    std::fs::set_permissions(node.dir(), PermissionsExt::from_mode(0o755)).unwrap();

    assert_eq!(ask_as(&node, MAPPED, "/v1/decide").await, 200);
    assert_eq!(node.script.asked()[0].caller.principal_id, "ci");
    assert_eq!(ask_as(&node, MAPPED, "/v1/explain").await, 403);
    assert_eq!(ask_as(&node, MAPPED, "/v1/admin/echo").await, 403);
    assert_eq!(ask_as(&node, UNKNOWN, "/v1/decide").await, 401);
    assert_eq!(ask_as(&node, UNKNOWN, "/v1/admin/echo").await, 401);
    // Positive control: the same child as root is the operator.
    assert_eq!(ask_as(&node, 0, "/v1/admin/echo").await, 200);

    let (_, windows) = node.stop().await;
    let sources = serde_json::to_value(&windows[0].sources).unwrap();
    assert_eq!(sources[0]["source"], "uid:60001");
    assert_eq!(
        (&sources[0]["not_operator"], &sources[0]["missing_scope"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(
        (&sources[1]["source"], &sources[1]["no_credentials"]),
        (&json!("uid:60002"), &json!(2))
    );
}

#[tokio::test]
async fn the_node_says_how_it_is() {
    let node = start(quick()).await;
    let (stranger, caller) = (node.client(None), node.client(Some(BARE)));
    assert_eq!(stranger.get("/healthz").await.unwrap().0, 200);
    let (status, bytes) = stranger.get("/readyz").await.unwrap();
    let ready: Readiness = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(
        (status, ready),
        (
            200,
            Readiness {
                ready: true,
                reason: None
            }
        )
    );

    *node.script.not_ready.lock().unwrap() = Some("no bundle".to_owned());
    let (status, bytes) = stranger.get("/readyz").await.unwrap();
    let ready: Readiness = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(status, 503);
    assert_eq!(
        ready,
        Readiness {
            ready: false,
            reason: Some("no bundle".to_owned())
        }
    );
    assert_eq!(
        stranger.get("/healthz").await.unwrap().0,
        200,
        "alive all the same"
    );

    let (status, bytes) = caller.get("/v1/status").await.unwrap();
    assert_eq!((status, value(&bytes)), (200, json!({"node": "a"})));

    let (status, bytes) = caller.get("/metrics").await.unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert_eq!(status, 200);
    for line in [
        "tidelock_test 1",
        "tidelock_gateway_connections{kind=\"known\"} 1",
        "tidelock_gateway_connections{kind=\"stranger\"} 1",
        "tidelock_gateway_in_flight 0",
        "tidelock_gateway_refused_total{kind=\"no_credentials\"} 0",
        "# TYPE tidelock_gateway_accepted_total counter",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is missing in\n{text}"
        );
    }

    for (path, expected) in [
        ("/", 404),
        ("/v1", 404),
        ("/v1/decide", 405),
        ("/v1/explain", 405),
        ("//healthz", 404),
    ] {
        assert_eq!(stranger.get(path).await.unwrap().0, expected, "{path}");
    }
    for path in [
        "/healthz",
        "/readyz",
        "/metrics",
        "/v1/status",
        "/openapi.json",
    ] {
        assert_eq!(stranger.post_json(path, "").await.unwrap().0, 405, "{path}");
    }
}

#[tokio::test]
async fn the_committed_document_is_the_one_that_is_served() {
    let node = start(quick()).await;
    let (status, bytes) = node.client(None).get("/openapi.json").await.unwrap();
    assert_eq!(status, 200);
    let committed = include_str!("../../../docs/openapi.json");
    assert!(
        bytes == committed.as_bytes(),
        "docs/openapi.json is out of date: \
         cargo run -p tidelock-gateway --example openapi > docs/openapi.json"
    );
    let document = value(&bytes);
    assert_eq!(document["openapi"], "3.1.0");
    let paths: Vec<_> = document["paths"].as_object().unwrap().keys().collect();
    assert_eq!(paths.len(), 15, "{paths:?}");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for scheme in methods.as_object().unwrap().values().flat_map(|m| {
            m["security"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|s| s.as_object().unwrap().keys())
        }) {
            assert_eq!(scheme, "bearer", "{path}");
        }
    }
    // Every reference leads somewhere.
    for reference in committed.split("\"$ref\": \"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
}

#[tokio::test]
async fn a_browser_that_was_led_astray_is_turned_away() {
    let node = start(quick()).await;
    let ask = |host: &str, origin: &str| {
        let body = "\"POLICY_ALLOW\"";
        format!(
            "POST /v1/decide HTTP/1.1\r\n{host}{origin}authorization: Bearer {FULL}\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let here = format!("host: {}\r\n", node.tcp);
    let own = format!("origin: http://{}\r\n", node.tcp);
    for (host, origin, expected) in [
        (here.as_str(), "", 200),
        (here.as_str(), own.as_str(), 200),
        ("host: LocalHost:1\r\n", "", 200),
        ("host: evil.example\r\n", "", 421),
        ("host: 127.0.0.1.evil.example\r\n", "", 421),
        (here.as_str(), "origin: http://evil.example\r\n", 421),
        (here.as_str(), "origin: null\r\n", 421),
        (here.as_str(), "origin: http://localhost:3000\r\n", 421),
    ] {
        let answer = node.raw(&ask(host, origin)).await;
        assert_eq!(status(&answer), expected, "{host}{origin}{answer}");
    }
    assert_eq!(node.script.asked().len(), 3);
}

async fn over_http2<S>(stream: S, token: &'static str, count: usize)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let io = TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..count {
        let mut sender = sender.clone();
        streams.spawn(async move {
            let request = Request::post("http://localhost/v1/decide")
                .version(Version::HTTP_2)
                .header("authorization", format!("Bearer {token}"))
                .body(Full::new(Bytes::from_static(b"\"POLICY_ALLOW\"")))
                .unwrap();
            let response = soon(sender.send_request(request)).await.unwrap();
            let status = response.status().as_u16();
            (
                status,
                response.into_body().collect().await.unwrap().to_bytes(),
            )
        });
    }
    while let Some(answered) = streams.join_next().await {
        let (status, bytes) = answered.unwrap();
        if token == FULL {
            assert_eq!((status, &value(&bytes)["decision"]), (200, &json!("allow")));
        } else {
            assert_eq!((status, problem(&bytes).as_str()), (401, "unauthenticated"));
        }
    }
    drop(sender);
    let _ = soon(connection).await;
}

#[tokio::test]
async fn http2_with_prior_knowledge_works_at_both_doors() {
    let node = start(quick()).await;
    over_http2(node.connect().await, FULL, 200).await;
    over_http2(node.connect().await, "wrong", 20).await;
    over_http2(UnixStream::connect(&node.unix).await.unwrap(), FULL, 10).await;
    over_http2(UnixStream::connect(&node.unix).await.unwrap(), "wrong", 10).await;
    assert_eq!(node.script.asked().len(), 210);
}

#[tokio::test]
async fn one_connection_carries_many_requests_and_pipelined_ones() {
    let node = start(quick()).await;
    let client = node.client(Some(FULL));
    for _ in 0..20 {
        assert_eq!(
            client
                .post_json("/v1/decide", "\"NO_MATCH\"")
                .await
                .unwrap()
                .0,
            403
        );
    }
    assert_eq!(
        node.handle.stats().accepted,
        1,
        "the connection is kept alive"
    );

    let mut stream = node.connect().await;
    let two = common::decide(FULL, "\"POLICY_ALLOW\"") + &common::decide(FULL, "\"NO_MATCH\"");
    stream.write_all(two.as_bytes()).await.unwrap();
    let mut text = Vec::new();
    while String::from_utf8_lossy(&text).matches("HTTP/1.1 ").count() < 2 {
        soon(stream.read_buf(&mut text)).await.unwrap();
    }
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.contains("HTTP/1.1 200 ") && text.contains("HTTP/1.1 403 "),
        "{text}"
    );
}

#[tokio::test]
async fn new_credentials_count_from_the_next_request_on() {
    let node = start(quick()).await;
    let client = node.client(Some(FULL));
    let ask = || client.post_json("/v1/decide", "\"POLICY_ALLOW\"");
    assert_eq!(ask().await.unwrap().0, 200);
    node.handle.set_auth(AuthConfig::default());
    assert_eq!(ask().await.unwrap().0, 401, "on the open connection too");
    node.handle
        .set_auth(AuthConfig::default().tokens(common::tokens()));
    assert_eq!(ask().await.unwrap().0, 200);
    assert_eq!(node.handle.stats().accepted, 1);
}

#[tokio::test]
async fn the_socket_is_replaced_when_stale_and_gone_after_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run").join("gateway.sock");
    let door = || Some(UnixDoor::new(&path).private_dir());
    let auth = AuthConfig::default;

    let first = bind(None, door(), auth(), quick()).await.unwrap();
    let refused = bind(None, door(), auth(), quick()).await.map(|_| ());
    assert_eq!(refused, Err(ListenError::SocketInUse(path.clone()).into()));
    drop(first);
    assert!(!path.exists());

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left behind by a server that was killed");
    let second = bind(None, door(), auth(), quick()).await.unwrap();
    let served = tokio::spawn(second.serve(async {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }));
    let client = Client::new(Door::Unix(path.clone()), None).unwrap();
    assert_eq!(client.get("/healthz").await.unwrap().0, 200);
    soon(served).await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn the_client_says_what_went_wrong_and_never_asks_twice() {
    let nobody = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let client = Client::new(Door::Tcp(nobody), None).unwrap();
    assert!(matches!(
        client.get("/healthz").await,
        Err(ClientError::Connect { .. })
    ));
    let client = Client::new(Door::Unix("/nonexistent/socket".into()), None).unwrap();
    assert!(matches!(
        client.get("/healthz").await,
        Err(ClientError::Connect { .. })
    ));
    assert!(matches!(
        Client::new(Door::Tcp(nobody), Some("a\nb")).map(|_| ()),
        Err(ClientError::Token)
    ));

    let node = start(GatewayLimits {
        decision_timeout: Duration::from_secs(60),
        ..quick()
    })
    .await;
    let client = node.client(Some(FULL)).patience(Duration::from_millis(200));
    assert!(matches!(
        client.get("no path").await,
        Err(ClientError::Path(_))
    ));
    let waited = client.post_json("/v1/decide", "\"wait\"").await;
    assert!(matches!(waited, Err(ClientError::Timeout { .. })));
    assert_eq!(node.script.asked().len(), 1);

    // A server that hangs up on every second request: the answer is not known, and the client
    // says so instead of asking again.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::new(Door::Tcp(listener.local_addr().unwrap()), None).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            .await
            .unwrap();
        read_head(&mut stream).await;
        drop(stream);
        let (mut stream, _) = listener.accept().await.unwrap();
        read_head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            .await
            .unwrap();
        drop(stream);
    });
    assert_eq!(client.get("/a").await.unwrap().0, 200);
    assert!(matches!(
        client.get("/b").await,
        Err(ClientError::Broken { .. })
    ));
    assert_eq!(client.get("/c").await.unwrap().0, 200);
    soon(server).await.unwrap();
}

async fn read_head(stream: &mut TcpStream) {
    let mut text = Vec::new();
    while !text.windows(4).any(|end| end == b"\r\n\r\n") {
        assert_ne!(soon(stream.read_buf(&mut text)).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_raw_answer_is_json_to_the_last_byte() {
    let node = start(quick()).await;
    let answer = node.raw(&common::decide(FULL, "\"NO_POLICY\"")).await;
    assert_eq!(status(&answer), 403);
    assert_eq!(body(&answer)["reason"], "NO_POLICY");
    assert_eq!(body(&answer)["posture"], "normal");
}
