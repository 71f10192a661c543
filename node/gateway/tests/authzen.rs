//! What the AuthZEN door answers around decisions: the ids of requests, and batches whose time is over.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::time::Duration;

use common::{BARE, FULL, OTHER, Running, body, header, quick, start, status, until};
use serde_json::{Value, json};
use tidelock_gateway::GatewayLimits;
use tidelock_gateway::limits::{BATCH_TIMEOUT, BATCH_TOGETHER};

const ID: &str = "bfe9eb29-ab87-4ca3-be83-a1d5d8305716";
const EVALUATIONS: &str = "/access/v1/evaluations";
const POSTED: [&str; 5] = [
    "/access/v1/evaluation",
    EVALUATIONS,
    "/access/v1/search/subject",
    "/access/v1/search/resource",
    "/access/v1/search/action",
];

/// A request whose action is the decider's cue.
fn asking(action: &str) -> Value {
    let entity = |kind: &str| json!({"type": kind, "id": "x"});
    json!({"subject": entity("Agent"), "action": {"name": action}, "resource": entity("File")})
}

/// A batch of as many of these actions.
fn batch(action: &str, count: usize, semantic: &str) -> Value {
    let mut batch = asking(action);
    batch["evaluations"] = vec![json!({}); count].into();
    batch["options"] = json!({"evaluations_semantic": semantic});
    batch
}

/// One exchange: `more` are further headers, the host among them.
async fn post(node: &Running, path: &str, more: &str, token: &str, body: &str) -> String {
    node.raw(&format!(
        "POST {path} HTTP/1.1\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n\
         {more}content-length: {}\r\n\r\n{body}",
        body.len()
    ))
    .await
}

#[tokio::test]
async fn the_id_of_a_request_is_given_back_whatever_the_answer() {
    let limits = GatewayLimits {
        slots_per_principal: 1,
        decision_timeout: Duration::from_secs(60),
        ..quick()
    };
    let node = start(limits).await;
    let here = format!("host: localhost\r\nx-request-id: {ID}\r\n");
    let astray = format!("host: evil.example\r\nx-request-id: {ID}\r\n");
    let good = asking("POLICY_ALLOW").to_string();
    let given_back = |answer: &str, expected: u16, path: &str| {
        assert_eq!(status(answer), expected, "{path} {answer}");
        assert_eq!(header(answer, "x-request-id"), Some(ID), "{path} {answer}");
    };
    for path in POSTED {
        // The decider of these tests has a quota for searches only, and it is spent.
        let answered = match path.contains("search") {
            true => 429,
            false => 200,
        };
        for (headers, token, body, expected) in [
            (&here, FULL, good.as_str(), answered),
            (&here, FULL, "{", 400),
            (&here, "nobody-s", good.as_str(), 401),
            (&here, BARE, good.as_str(), 403),
            (&astray, FULL, good.as_str(), 421),
        ] {
            let answer = post(&node, path, headers, token, body).await;
            given_back(&answer, expected, path);
        }
        let get = format!("GET {path} HTTP/1.1\r\n{here}\r\n");
        given_back(&node.raw(&get).await, 405, path);
    }
    let metadata = "/.well-known/authzen-configuration";
    for (headers, expected) in [(&here, 200), (&astray, 421)] {
        let get = format!("GET {metadata} HTTP/1.1\r\n{headers}\r\n");
        given_back(&node.raw(&get).await, expected, metadata);
    }

    // While the caller's one slot is taken.
    let held = asking("stuck").to_string();
    let busy = async {
        until(|| node.script.waiting() == 1).await;
        for path in POSTED {
            let answer = post(&node, path, &here, FULL, &good).await;
            given_back(&answer, 429, path);
        }
        node.script.release();
    };
    let (first, ()) = tokio::join!(post(&node, POSTED[0], &here, FULL, &held), busy);
    given_back(&first, 200, "the control");

    // What cannot be given back is not, and no other door gives back anything.
    for path in [POSTED[0], "/v1/decide"] {
        let ids = match path {
            "/v1/decide" => format!("x-request-id: {ID}\r\n"),
            _ => format!("x-request-id: {ID}\r\nx-request-id: {ID}\r\n"),
        };
        let headers = format!("host: evil.example\r\n{ids}");
        let answer = post(&node, path, &headers, FULL, &good).await;
        assert_eq!(status(&answer), 421, "{answer}");
        assert_eq!(header(&answer, "x-request-id"), None, "{path} {answer}");
    }
}

#[tokio::test]
async fn after_its_time_no_further_evaluation_of_a_batch_is_begun() {
    const COUNT: usize = 2 * BATCH_TOGETHER;
    let limits = GatewayLimits {
        decision_timeout: Duration::from_secs(60),
        ..quick()
    };
    let node = start(limits).await;
    let host = "host: localhost\r\n";
    let all = batch("stuck", COUNT, "execute_all").to_string();
    let ordered = batch("stuck", 3, "deny_on_first_deny").to_string();
    let slow = async {
        until(|| node.script.waiting() == BATCH_TOGETHER + 1).await;
        tokio::time::sleep(BATCH_TIMEOUT).await;
        node.script.release();
    };
    let (all, ordered, ()) = tokio::join!(
        post(&node, EVALUATIONS, host, FULL, &all),
        post(&node, EVALUATIONS, host, OTHER, &ordered),
        slow
    );
    let begun_and_left = |answer: &str, begun: usize, left: usize| {
        assert_eq!(status(answer), 200, "{answer}");
        let answer = body(answer);
        let made = answer["evaluations"].as_array().unwrap();
        assert_eq!(made.len(), begun + left, "{answer}");
        for (index, one) in made.iter().enumerate() {
            let is_begun = index < begun;
            assert_eq!(one["decision"], is_begun, "{index} {answer}");
            let status = &one["context"]["error"]["status"];
            let expected = match is_begun {
                true => Value::Null,
                false => json!(503),
            };
            assert_eq!(*status, expected, "{index} {answer}");
        }
    };
    begun_and_left(&all, BATCH_TOGETHER, COUNT - BATCH_TOGETHER);
    // The first one that is left is a deny, with which this semantic ends.
    begun_and_left(&ordered, 1, 1);
    assert_eq!(node.script.asked().len(), BATCH_TOGETHER + 1);

    // The control: in time all are made.
    let quickly = batch("POLICY_ALLOW", COUNT, "execute_all").to_string();
    let answer = post(&node, EVALUATIONS, host, FULL, &quickly).await;
    begun_and_left(&answer, COUNT, 0);
}
