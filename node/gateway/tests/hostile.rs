//! Clients that are slow, greedy, gone, too many or without credentials: what they get, and that
//! the others do not notice.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{FULL, OTHER, body, decide, header, quick, read_answer, soon, start, status, until};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tidelock_gateway::GatewayLimits;
use tidelock_gateway::limits::{BODY_BYTES_MAX, HEAD_BYTES_MAX};
use tidelock_gateway::refusals::{RefusalCounts, Source};
use tidelock_quota::{AddressBlock, Rate};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How long a decision is waited for at the door of proxies.
const PROXY_PATIENCE: Duration = Duration::from_millis(750);

fn short(limits: GatewayLimits) -> GatewayLimits {
    GatewayLimits {
        head_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..limits
    }
}

/// For decisions that are to wait until the test lets them go.
fn patient() -> GatewayLimits {
    GatewayLimits {
        decision_timeout: Duration::from_secs(60),
        ..quick()
    }
}

/// Whether the gateway hangs up.
async fn hung_up(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest))
        .await
        .is_ok_and(|_| rest.is_empty())
}

fn closed(node: &common::Running, cause: &str) -> u64 {
    let stats = node.handle.stats();
    stats
        .closed
        .iter()
        .find(|(name, _)| *name == cause)
        .unwrap()
        .1
}

#[tokio::test]
async fn a_stranger_is_answered_before_its_body_is_read() {
    let node = start(quick()).await;
    // No body byte is ever sent; an authenticated request would wait for it.
    let head = "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\ncontent-length: 65536\r\n\r\n";
    let answer = node.raw(head).await;
    assert_eq!(status(&answer), 401);
    // Not even an invitation to send it.
    let head = "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n\
                content-length: 65536\r\n\r\n";
    let answer = node.raw(head).await;
    assert_eq!(status(&answer), 401, "{answer}");
    // Positive control: the known caller is invited.
    let head = format!(
        "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
         expect: 100-continue\r\ncontent-length: 14\r\n\r\n"
    );
    let mut stream = node.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut invitation = [0; 25];
    soon(stream.read_exact(&mut invitation)).await.unwrap();
    assert_eq!(&invitation, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"\"POLICY_ALLOW\"").await.unwrap();
    assert_eq!(status(&read_answer(&mut stream).await), 200);
}

#[tokio::test]
async fn inv_07_a_flood_of_strangers_takes_no_slot_and_is_counted_exactly() {
    const CONNECTIONS: usize = 20;
    const EACH: usize = 50;
    let limits = GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        strangers: 30,
        ..patient()
    };
    let node = start(limits).await;
    // The one slot is taken, so a stranger that needed one would get 429, not 401.
    let waiting = node.client(Some(OTHER));
    let waiting = tokio::spawn(async move { waiting.post_json("/v1/decide", "\"wait\"").await });
    until(|| node.script.waiting() == 1).await;

    let mut flood = JoinSet::new();
    for connection in 0..CONNECTIONS {
        // Half bring nothing, half bring a wrong token.
        let client = node.client((connection % 2 == 0).then_some("wrong"));
        flood.spawn(async move {
            for _ in 0..EACH {
                let (status, _) = client.post_json("/v1/decide", "{}").await.unwrap();
                assert_eq!(status, 401);
            }
        });
    }
    while let Some(done) = flood.join_next().await {
        done.unwrap();
    }
    assert_eq!(node.handle.stats().in_flight, 1);
    // Positive control: the waiting caller has its slot still, and after it the next one.
    node.script.release();
    assert_eq!(soon(waiting).await.unwrap().unwrap().0, 200);
    let served = node
        .client(Some(FULL))
        .post_json("/v1/decide", "\"POLICY_ALLOW\"")
        .await;
    assert_eq!(served.unwrap().0, 200);

    let (_, windows) = node.stop().await;
    assert_eq!(windows.len(), 1);
    let half = u64::try_from(CONNECTIONS * EACH / 2).unwrap();
    assert_eq!(windows[0].total, 2 * half);
    assert_eq!(windows[0].sources.len(), 1);
    assert_eq!(
        windows[0].sources[0].source,
        Source::Tcp(AddressBlock::of("127.0.0.1".parse().unwrap()))
    );
    let expected = RefusalCounts {
        no_credentials: half,
        bad_credentials: half,
        ..RefusalCounts::default()
    };
    assert_eq!(windows[0].sources[0].counts, expected);
}

#[tokio::test]
async fn refusals_are_reported_once_a_window() {
    let limits = GatewayLimits {
        refusal_window: Duration::from_millis(30),
        idle_timeout: Duration::from_secs(20),
        head_timeout: Duration::from_millis(20),
        ..quick()
    };
    let node = start(limits).await;
    let stranger = node.client(None);
    for expected in 1..=3 {
        assert_eq!(stranger.get("/v1/status").await.unwrap().0, 401);
        let windows = &node.windows;
        until(|| windows.lock().unwrap().len() == expected).await;
        assert_eq!(windows.lock().unwrap()[expected - 1].total, 1);
    }
    let (_, windows) = node.stop().await;
    assert_eq!(
        windows.len(),
        3,
        "a window without refusals is not reported"
    );
}

#[tokio::test]
async fn inv_07_idle_strangers_make_room_and_callers_stay() {
    let limits = GatewayLimits {
        strangers: 8,
        connections: 4,
        ..quick()
    };
    let node = start(limits).await;
    let caller = node.client(Some(FULL));
    let ask = || caller.post_json("/v1/decide", "\"POLICY_ALLOW\"");
    assert_eq!(ask().await.unwrap().0, 200);

    let mut strangers = Vec::new();
    for _ in 0..40 {
        strangers.push(node.connect().await);
    }
    let (accepted, handle) = (41, &node.handle);
    until(|| handle.stats().accepted == accepted).await;
    let stats = node.handle.stats();
    assert_eq!(
        (stats.connections_known, stats.connections_strangers),
        (1, 8)
    );
    assert_eq!(closed(&node, "evicted"), 32);
    assert!(hung_up(&mut strangers[0]).await, "the oldest went first");

    // The caller's connection is untouched, and a new caller gets in.
    assert_eq!(ask().await.unwrap().0, 200);
    let late = node
        .client(Some(OTHER))
        .post_json("/v1/decide", "\"POLICY_ALLOW\"")
        .await;
    assert_eq!(late.unwrap().0, 200);
    assert_eq!(
        node.handle.stats().accepted,
        42,
        "the first one did not have to reconnect"
    );
}

/// A caller that hung up in the middle of a batch gave its slot back while the node went on with the batch:
/// with many such callers more was under way than there are slots.
#[tokio::test]
async fn inv_07_a_batch_holds_its_slot_until_it_ends_though_its_caller_is_gone() {
    let node = start(GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        ..patient()
    })
    .await;
    let entity = |kind: &str| json!({"type": kind, "id": "x"});
    let batch = json!({
        "subject": entity("Agent"), "resource": entity("File"),
        "evaluations": [{"action": {"name": "stuck"}}, {"action": {"name": "stuck"}}],
    })
    .to_string();
    let mut stream = node.connect().await;
    let head = format!(
        "POST /access/v1/evaluations HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{batch}",
        batch.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    until(|| node.script.waiting() == 2).await;
    drop(stream);
    let client = node.client(Some(OTHER));
    let ask = async || {
        let body = "\"POLICY_ALLOW\"";
        client.post_json("/v1/decide", body).await.unwrap().0
    };
    // However soon the end of the connection is noticed.
    for _ in 0..30 {
        assert_eq!(ask().await, 429, "the batch is under way");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The control: what it waited for ends, and it with it.
    let mut left = 1_000;
    while ask().await == 429 {
        node.script.release();
        left -= 1;
        assert!(left > 0, "the slot never came back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(ask().await, 200);
}

#[tokio::test]
async fn inv_13_known_connections_have_a_limit_and_no_caller_has_more_than_half() {
    let node = start(GatewayLimits {
        connections: 3,
        ..quick()
    })
    .await;
    let ask = |token: &'static str| {
        let client = node.client(Some(token));
        async move {
            let asked = client.post_json("/v1/decide", "\"POLICY_ALLOW\"").await;
            (client, asked.unwrap())
        }
    };
    let (first, answer) = ask(FULL).await;
    assert_eq!(answer.0, 200);
    let (_second, answer) = ask(FULL).await;
    assert_eq!(answer.0, 200);
    let (_third, answer) = ask(FULL).await;
    assert_eq!(answer.0, 429);
    let told = String::from_utf8_lossy(&answer.1).into_owned();
    assert!(told.contains("one caller may"), "{told}");
    // The control: the place that is left is another's.
    let (_others, answer) = ask(OTHER).await;
    assert_eq!(answer.0, 200);
    let (_more, answer) = ask(OTHER).await;
    assert_eq!(answer.0, 429);
    drop(first);
    let handle = &node.handle;
    until(|| handle.stats().connections_known == 2).await;
    let (_third, answer) = ask(FULL).await;
    assert_eq!(answer.0, 200);
}

/// Envoy lets things pass on an error where it is told to, and its own limit is a second: it must hear the
/// deny before that, whatever other callers wait.
#[tokio::test]
async fn a_proxy_is_answered_before_its_own_patience_ends_and_other_callers_wait_longer() {
    let node = start(patient()).await;
    let check = |token: &str| {
        format!(
            "GET /envoy/v3/check/a HTTP/1.1\r\nhost: app.example\r\nauthorization: Bearer {token}\r\n\r\n"
        )
    };
    // The controls: an answer in time is told, and a caller of another door has its own patience.
    assert_eq!(status(&node.raw(&check(FULL)).await), 200);
    assert_eq!(status(&node.raw(&check(OTHER)).await), 403, "no proxy");
    node.script.checks_wait.store(true, Ordering::SeqCst);
    let caller = node.client(Some(OTHER));
    let waiting = tokio::spawn(async move { caller.post_json("/v1/decide", "\"wait\"").await });
    until(|| node.script.waiting() == 1).await;
    let began = Instant::now();
    let answer = node.raw(&check(FULL)).await;
    let took = began.elapsed();
    // What giving up brings is told, as a deny and never as an error.
    assert_eq!(status(&answer), 403, "{answer}");
    assert!(answer.contains("AUDIT_UNAVAILABLE"), "{answer}");
    assert!(took >= PROXY_PATIENCE, "{took:?}");
    assert!(took < Duration::from_secs(1), "Envoy's own limit: {took:?}");
    assert_eq!(node.script.given_up(), 1);
    assert!(!waiting.is_finished(), "the other still waits");
    node.script.release();
    assert_eq!(soon(waiting).await.unwrap().unwrap().0, 200);
}

#[tokio::test]
async fn a_slow_head_is_cut_off_and_an_idle_caller_is_not() {
    let node = start(short(quick())).await;
    // Control: an idle caller, quiet for several times the patience for heads.
    let caller = node.client(Some(FULL));
    assert_eq!(
        caller
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap()
            .0,
        200
    );

    let mut silent = node.connect().await;
    let mut dribbling = node.connect().await;
    let dribble = async {
        for byte in decide(FULL, "\"POLICY_ALLOW\"").bytes() {
            if dribbling.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        hung_up(&mut dribbling).await || dribbling.write_all(b"x").await.is_err()
    };
    let (silent, dribbling) = tokio::join!(hung_up(&mut silent), dribble);
    assert!(silent && dribbling);
    assert_eq!(closed(&node, "slow_head"), 2);

    // The second head of a connection is watched as the first one is.
    let mut stream = node.connect().await;
    stream
        .write_all(decide(FULL, "\"POLICY_ALLOW\"").as_bytes())
        .await
        .unwrap();
    assert_eq!(status(&read_answer(&mut stream).await), 200);
    stream.write_all(b"POST /v1/dec").await.unwrap();
    assert!(hung_up(&mut stream).await);

    assert_eq!(
        caller
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap()
            .0,
        200
    );
    assert_eq!(
        node.handle.stats().accepted,
        4,
        "the idle caller kept its connection"
    );
    assert_eq!(node.script.asked().len(), 3);
}

#[tokio::test]
async fn a_slow_http2_preface_is_cut_off() {
    let node = start(short(quick())).await;
    let mut stream = node.connect().await;
    stream.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    assert!(hung_up(&mut stream).await);
    let mut stream = node.connect().await;
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let _ = soon(stream.read_to_end(&mut rest)).await;
    assert_eq!(closed(&node, "slow_head"), 2);
}

#[tokio::test]
async fn a_stranger_may_not_stay_and_neither_may_an_idle_caller() {
    let limits = GatewayLimits {
        stranger_timeout: Duration::from_millis(150),
        idle_timeout: Duration::from_millis(1500),
        ..quick()
    };
    let node = start(limits).await;
    let mut stranger = node.connect().await;
    let mut caller = node.connect().await;
    caller
        .write_all(decide(FULL, "\"POLICY_ALLOW\"").as_bytes())
        .await
        .unwrap();
    assert_eq!(status(&read_answer(&mut caller).await), 200);
    // The stranger keeps asking what a stranger may ask; that does not make it known.
    let health = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut answers = 0;
    while stranger.write_all(health.as_bytes()).await.is_ok() {
        if status(&read_answer(&mut stranger).await) != 200 {
            break;
        }
        answers += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(answers > 0);
    assert_eq!((closed(&node, "stranger"), closed(&node, "idle")), (1, 0));
    assert!(hung_up(&mut caller).await);
    assert_eq!((closed(&node, "stranger"), closed(&node, "idle")), (1, 1));
}

#[tokio::test]
async fn a_slow_body_gets_408_and_its_slot_comes_back() {
    let limits = GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        ..short(quick())
    };
    let node = start(limits).await;
    let mut stream = node.connect().await;
    let head = format!(
        "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
         content-length: 14\r\n\r\n\"POL"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = read_answer(&mut stream).await;
    assert_eq!(status(&answer), 408);
    assert_eq!(body(&answer)["error"], "incomplete");
    assert_eq!(header(&answer, "connection"), Some("close"));
    assert!(hung_up(&mut stream).await);
    assert_eq!(node.handle.stats().in_flight, 0);

    // A client that breaks off in the middle gives its slot back as well.
    let mut stream = node.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    drop(stream);
    let handle = &node.handle;
    until(|| handle.stats().in_flight == 0).await;
    let client = node.client(Some(FULL));
    until(|| handle.stats().connections_known == 0).await;
    assert_eq!(
        client
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap()
            .0,
        200
    );
    assert_eq!(node.script.asked().len(), 1, "half a request is no request");
}

#[tokio::test]
async fn an_oversized_body_is_refused_by_the_interceptor_and_never_read_whole() {
    let node = start(quick()).await;
    let client = node.client(Some(FULL));
    let fits = format!("\"POLICY_ALLOW\"{}", " ".repeat(BODY_BYTES_MAX - 14));
    assert_eq!(
        client
            .post_json("/v1/decide", fits.clone())
            .await
            .unwrap()
            .0,
        200
    );

    // One byte more, which this decider does not notice: its allow of the beginning is not passed
    // on as an allow of the whole.
    let answer = node.raw(&decide(FULL, &(fits + " "))).await;
    assert_eq!(
        (status(&answer), header(&answer, "connection")),
        (400, Some("close"))
    );
    assert_eq!(body(&answer)["error"], "invalid_request");
    // A decider that does notice is heard. The length is declared, or in chunks of unknown sum.
    let answer = node
        .raw(&decide(FULL, &" ".repeat(BODY_BYTES_MAX + 1)))
        .await;
    assert_eq!(
        (status(&answer), header(&answer, "connection")),
        (400, Some("close"))
    );
    assert_eq!(body(&answer)["reason"], "INVALID_REQUEST");
    let chunked = format!(
        "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
         transfer-encoding: chunked\r\n\r\n"
    );
    let mut stream = node.connect().await;
    stream.write_all(chunked.as_bytes()).await.unwrap();
    let chunk = format!("2000\r\n{}\r\n", " ".repeat(0x2000));
    for _ in 0..9 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    assert_eq!(status(&read_answer(&mut stream).await), 400);

    let asked = node.script.asked();
    assert_eq!(asked[0].bytes, BODY_BYTES_MAX);
    for asked in &asked[1..] {
        assert!(
            asked.bytes > BODY_BYTES_MAX,
            "it is told that there was more"
        );
        assert!(
            asked.bytes < 2 * BODY_BYTES_MAX,
            "but not all of it was read"
        );
    }
}

#[tokio::test]
async fn an_oversized_head_gets_431() {
    let node = start(quick()).await;
    let request = |padding: usize| {
        let body = "\"POLICY_ALLOW\"";
        format!(
            "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
             x-padding: {}\r\ncontent-length: 14\r\n\r\n{body}",
            "x".repeat(padding)
        )
    };
    assert_eq!(
        status(&node.raw(&request(HEAD_BYTES_MAX - 1024)).await),
        200
    );
    assert_eq!(status(&node.raw(&request(4 * HEAD_BYTES_MAX)).await), 431);
    let many = "a: b\r\n".repeat(200);
    let answer = node
        .raw(&format!("GET /healthz HTTP/1.1\r\n{many}\r\n"))
        .await;
    assert_eq!(status(&answer), 431);
}

#[tokio::test]
async fn an_oversized_http2_head_is_refused_and_its_connection_lives() {
    let node = start(quick()).await;
    let io = TokioIo::new(node.connect().await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut send = |padding: usize| {
        let mut request = Request::get("http://localhost/healthz")
            .body(Full::<Bytes>::default())
            .unwrap();
        for n in 0..padding {
            let name = hyper::header::HeaderName::from_bytes(format!("x-{n}").as_bytes()).unwrap();
            let value = hyper::header::HeaderValue::from_str(&"x".repeat(1000)).unwrap();
            request.headers_mut().insert(name, value);
        }
        soon(sender.send_request(request))
    };
    assert_eq!(send(1).await.unwrap().status(), 200);
    let refused = send(40).await;
    assert!(refused.is_err() || refused.unwrap().status() == 431);
    assert_eq!(node.client(None).get("/healthz").await.unwrap().0, 200);
}

#[tokio::test]
async fn malformed_requests_get_400_or_nothing_and_hurt_nobody() {
    let node = start(quick()).await;
    for bad in [
        "\r\n\r\n\r\nnonsense\r\n\r\n",
        "GET /healthz\r\n\r\n",
        "GET /healthz HTTP/9.9\r\n\r\n",
        "POST /v1/decide HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        "POST /v1/decide HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        "GET /healthz HTTP/1.1\r\nbad header: x\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nx: \0\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03",
    ] {
        let mut stream = node.connect().await;
        stream.write_all(bad.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = read_answer(&mut stream).await;
        assert!(
            answer.is_empty() || status(&answer) == 400,
            "{bad:?}: {answer}"
        );
    }
    let bad_chunk = format!(
        "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {FULL}\r\n\
         transfer-encoding: chunked\r\n\r\nzz\r\n"
    );
    let answer = node.raw(&bad_chunk).await;
    assert!(matches!(status(&answer), 408 | 400), "{answer}");
    assert_eq!(node.script.asked(), []);
    assert_eq!(node.client(None).get("/healthz").await.unwrap().0, 200);
}

#[tokio::test]
async fn over_the_concurrency_limit_there_is_429_and_a_time_to_come_back() {
    let limits = GatewayLimits {
        slots: 3,
        slots_per_principal: 2,
        ..patient()
    };
    let node = start(limits).await;
    let mut waiting = JoinSet::new();
    let wait = |waiting: &mut JoinSet<u16>, token, path: &'static str| {
        let client = node.client(Some(token));
        waiting.spawn(async move { client.post_json(path, "\"wait\"").await.unwrap().0 });
    };
    // An explanation holds a slot like a decision.
    wait(&mut waiting, FULL, "/v1/decide");
    wait(&mut waiting, FULL, "/v1/explain");
    until(|| node.script.waiting() == 2).await;

    // This principal has its share; another one still gets in.
    let decision = decide(FULL, "\"POLICY_ALLOW\"");
    let explanation = decision.replacen("/v1/decide", "/v1/explain", 1);
    for request in [&decision, &explanation] {
        let answer = node.raw(request).await;
        assert_eq!(
            (status(&answer), header(&answer, "retry-after")),
            (429, Some("1"))
        );
        assert_eq!(body(&answer)["error"], "rate_limited");
        assert_eq!(body(&answer)["retry_after_ms"], 1000);
    }
    wait(&mut waiting, OTHER, "/v1/explain");
    until(|| node.script.waiting() == 3).await;
    assert_eq!(
        status(&node.raw(&decide(OTHER, "\"POLICY_ALLOW\"")).await),
        429
    );
    // What needs no slot is answered all the same.
    assert_eq!(
        node.client(Some(FULL)).get("/v1/status").await.unwrap().0,
        200
    );

    node.script.release();
    while let Some(status) = waiting.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    assert_eq!(node.handle.stats().in_flight, 0);
    for request in [&decision, &explanation] {
        assert_eq!(status(&node.raw(request).await), 200);
    }
    let (_, windows) = node.stop().await;
    assert_eq!(windows[0].sources[0].counts.busy, 3);
}

#[tokio::test]
async fn inv_14_the_wait_of_a_client_that_hangs_up_is_given_up() {
    let limits = GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        ..patient()
    };
    let node = start(limits).await;
    let mut stream = node.connect().await;
    stream
        .write_all(decide(FULL, "\"wait\"").as_bytes())
        .await
        .unwrap();
    until(|| node.script.waiting() == 1).await;
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        429
    );
    drop(stream);
    until(|| node.script.given_up() == 1).await;
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        200
    );
    assert_eq!(
        node.script.given_up(),
        1,
        "an answered request is not given up"
    );
}

#[tokio::test]
async fn a_slot_comes_back_when_the_decision_does_not_when_the_client_goes() {
    let limits = GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        ..patient()
    };
    let node = start(limits).await;
    let mut stream = node.connect().await;
    stream
        .write_all(decide(FULL, "\"stuck\"").as_bytes())
        .await
        .unwrap();
    until(|| node.script.waiting() == 1).await;
    drop(stream);
    until(|| node.script.given_up() == 1).await;
    assert_eq!(node.handle.stats().in_flight, 1);
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        429
    );
    node.script.release();
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        200
    );
}

#[tokio::test]
async fn inv_14_a_decision_that_does_not_come_back_permits_nothing() {
    let limits = GatewayLimits {
        decision_timeout: Duration::from_millis(50),
        ..quick()
    };
    let node = start(limits).await;
    // Given up in time, the decider says why.
    let answer = node.raw(&decide(FULL, "\"wait\"")).await;
    assert_eq!((status(&answer), node.script.given_up()), (503, 1));
    assert_eq!(body(&answer)["reason"], "AUDIT_UNAVAILABLE");
    // One that says nothing at all is no yes either.
    for lost in ["\"stuck\"", "\"lose\""] {
        let answer = node.raw(&decide(FULL, lost)).await;
        assert_eq!(status(&answer), 503);
        assert_eq!(body(&answer)["error"], "unanswered");
        assert_eq!(body(&answer).get("decision"), None);
    }
    // Released too late, an allow reaches nobody.
    node.script.release();
    assert_eq!(
        (node.script.given_up(), node.handle.stats().unanswered),
        (3, 3)
    );
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        200
    );
}

#[tokio::test]
async fn a_request_that_panics_takes_nothing_with_it() {
    let limits = GatewayLimits {
        slots: 1,
        slots_per_principal: 1,
        connections: 1,
        ..quick()
    };
    let node = start(limits).await;
    for _ in 0..3 {
        let answer = node.raw(&decide(FULL, "\"panic\"")).await;
        assert_eq!(answer, "", "the connection ends");
        let handle = &node.handle;
        until(|| handle.stats().connections_known == 0).await;
        assert_eq!(node.handle.stats().in_flight, 0);
    }
    assert_eq!(
        status(&node.raw(&decide(FULL, "\"POLICY_ALLOW\"")).await),
        200
    );
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let limits = GatewayLimits {
        write_timeout: Duration::from_millis(100),
        ..quick()
    };
    let node = start(limits).await;
    let mut stream = node.connect().await;
    let document = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(50);
    // Far more than the sockets' buffers hold, and not one byte is read.
    while tokio::time::timeout(
        Duration::from_secs(5),
        stream.write_all(document.as_bytes()),
    )
    .await
    .is_ok_and(|written| written.is_ok())
    {
        if closed(&node, "slow_reader") > 0 {
            break;
        }
    }
    until(|| closed(&node, "slow_reader") == 1).await;
    assert_eq!(node.client(None).get("/healthz").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_drain_lets_open_requests_end_and_lets_nothing_in() {
    let node = start(GatewayLimits {
        drain_timeout: Duration::from_secs(20),
        ..patient()
    })
    .await;
    let idle = node.client(Some(FULL));
    assert_eq!(idle.get("/healthz").await.unwrap().0, 200);
    let mut open = node.connect().await;
    open.write_all(decide(FULL, "\"wait\"").as_bytes())
        .await
        .unwrap();
    until(|| node.script.waiting() == 1).await;

    let (script, address) = (std::sync::Arc::clone(&node.script), node.tcp);
    let unix = node.unix.clone();
    let stopping = tokio::spawn(node.stop());
    // The doors close while the request is still open.
    soon(async {
        while TcpStream::connect(address).await.is_ok() || unix.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    assert!(!stopping.is_finished());
    script.release();
    let answer = read_answer(&mut open).await;
    assert_eq!(
        (status(&answer), header(&answer, "connection")),
        (200, Some("close"))
    );
    let (drained, _) = soon(stopping).await.unwrap();
    assert_eq!(drained.cut, 0);
    assert!(idle.get("/healthz").await.is_err());
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let node = start(GatewayLimits {
        drain_timeout: Duration::from_millis(100),
        ..patient()
    })
    .await;
    let mut open = node.connect().await;
    open.write_all(decide(FULL, "\"wait\"").as_bytes())
        .await
        .unwrap();
    until(|| node.script.waiting() == 1).await;
    let (drained, _) = soon(node.stop()).await;
    assert_eq!(drained.cut, 1);
    let mut rest = Vec::new();
    let _ = soon(open.read_to_end(&mut rest)).await;
    assert!(rest.is_empty(), "no answer was made up");
}

#[tokio::test]
async fn inv_13_a_caller_that_asks_too_often_is_told_to_wait_and_costs_nobody_else() {
    let limits = GatewayLimits {
        requests: Rate {
            per_second: 1,
            burst: 3,
        },
        ..quick()
    };
    let node = start(limits).await;
    let (noisy, quiet) = (node.client(Some(FULL)), node.client(Some(OTHER)));
    let begun = Instant::now();
    let mut passed = 0;
    let body = loop {
        let (status, body) = noisy
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap();
        if status == 429 {
            break body;
        }
        passed += 1;
    };
    assert!(passed <= 3 + begun.elapsed().as_secs() + 1, "{passed}");
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"], "rate_limited");
    assert!(body["retry_after_ms"].as_u64().unwrap() <= 1_000, "{body}");
    // Nothing of it was judged, no slot is held, and the other has its whole burst.
    assert_eq!(node.script.asked().len() as u64, passed);
    assert_eq!(node.handle.stats().in_flight, 0);
    for _ in 0..3 {
        let (status, _) = quiet
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap();
        assert_eq!(status, 200);
    }
    node.handle.set_requests(Rate {
        per_second: 1_000,
        burst: 1_000,
    });
    // What it owes it goes on owing, and pays at the new rate.
    loop {
        let (status, _) = noisy
            .post_json("/v1/decide", "\"POLICY_ALLOW\"")
            .await
            .unwrap();
        if status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (_, windows) = node.stop().await;
    let counted: u64 = windows
        .iter()
        .flat_map(|window| &window.sources)
        .map(|source| source.counts.rate_limited)
        .sum();
    assert!(counted >= 1);
}
