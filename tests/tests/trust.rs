//! Trust documents and freshness statements find their way from node to node, like bundles.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of test functions"
)]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{network::Loopback, site::NODES};
use tidelock_policy::{Freshness, HintedSignature, Package, SignedDocument, TrustFile, sign};
use tidelock_tests::site::{LIMIT, await_epoch, directory, install, prepared};

/// Signs a document and gives it to a node.
async fn state(site: &tidelock::demo::site::Site<'_>, at: &str, document: Vec<u8>, key_pem: &str) {
    let signed = SignedDocument {
        signatures: vec![HintedSignature {
            der: sign(&document, key_pem).unwrap(),
            key_hint: None,
        }],
        document,
    };
    let body = json!({"statement": BASE64_STANDARD.encode(signed.encode().unwrap())});
    let node = site.node(at).unwrap();
    node.operate("statement.install", &body).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_travel_as_policy_segments_and_a_late_node_walks_the_chain() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = prepared(dir.path(), &network, &NODES);
    let key = std::fs::read_to_string(dir.path().join("policy.key")).unwrap();
    let path = dir.path().join("trust.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text
        .replace("format = 1", "format = 2")
        .replace("threshold = 1\n", "[thresholds]\npolicy = 1\ntrust = 1\n")
        .replace(
            "public_key_pem",
            "roles = [\"policy\", \"trust\"]\npublic_key_pem",
        );
    std::fs::write(&path, &text).unwrap();
    let [first, second, late] = NODES;
    for id in [first, second] {
        site.start(id).await.unwrap();
    }
    install(&site, first, 1).await;
    await_epoch(&site, second, 1).await;

    // Freshness: what the first is told, the second knows.
    let status = site.node(first).unwrap().status().await.unwrap();
    let bundle = status.get("bundle").unwrap();
    let word = |key: &str| bundle.get(key).and_then(Value::as_str).unwrap().to_owned();
    let issued_unix_ms = tidelock::clock::wall_unix_ms();
    let freshness = Freshness {
        domain: status
            .get("domain")
            .and_then(Value::as_str)
            .unwrap()
            .to_owned(),
        bundle: word("name"),
        epoch: 1,
        content_id: word("hash").try_into().unwrap(),
        issued_unix_ms,
    };
    state(&site, first, freshness.document().unwrap(), &key).await;
    let confirmed =
        |s: &Value| s.pointer("/bundle/confirmed_unix_ms") == Some(&json!(issued_unix_ms));
    let node = site.node(second).unwrap();
    node.await_status("the freshness statement", LIMIT, confirmed)
        .await
        .unwrap();

    // Two rotations while the third is dark; it begins with the file that all began with.
    let mut current = TrustFile::parse(&text).unwrap();
    for version in [2_u64, 3] {
        let id = current.id().unwrap();
        let at = tidelock::clock::wall_unix_ms();
        let next = TrustFile::parse(&text).unwrap().following(&current, id, at);
        state(&site, second, next.document().unwrap(), &key).await;
        let has = |s: &Value| s.pointer("/trust/version") == Some(&json!(version));
        let node = site.node(first).unwrap();
        node.await_status("the rotation", LIMIT, has).await.unwrap();
        current = next;
    }
    site.start(late).await.unwrap();
    let caught_up = |s: &Value| {
        s.pointer("/trust/version") == Some(&json!(3))
            && s.pointer("/bundle/epoch") == Some(&json!(1))
            && confirmed(s)
    };
    let node = site.node(late).unwrap();
    node.await_status("the chain, the bundle and its freshness", LIMIT, caught_up)
        .await
        .unwrap();
    // The next bundle takes nothing of it away, and every node still passes the chain on.
    let package: Package = site.bundle(2).unwrap();
    assert!(package.encode().is_ok());
    install(&site, late, 2).await;
    for id in NODES {
        await_epoch(&site, id, 2).await;
        let status = site.node(id).unwrap().status().await.unwrap();
        assert_eq!(status.pointer("/trust/version"), Some(&json!(3)));
    }
}
