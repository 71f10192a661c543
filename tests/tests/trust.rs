//! Trust documents and freshness statements find their way from node to node, like bundles.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of test functions"
)]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{network::Loopback, site::NODES};
use tidelock_policy::{
    Freshness, HintedSignature, Package, SignedDocument, TrustFile, sign, testing::template_builder,
};
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

/// A bundle that a node cannot compile in its time was compiled again for each peer that brought it, at each
/// contact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_of_a_peer_that_was_refused_is_remembered_over_contacts() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = prepared(dir.path(), &network, &NODES);
    let [first, second, _] = NODES;
    for (id, deadline_ms) in [(first, 60_000), (second, 500)] {
        let path = site.node(id).unwrap().config_path();
        let text = std::fs::read_to_string(&path).unwrap();
        let policy = "trust = \"../trust.toml\"\n";
        assert!(text.contains(policy));
        let more = format!("{policy}worker_deadline_ms = {deadline_ms}\n");
        std::fs::write(&path, text.replace(policy, &more)).unwrap();
        site.start(id).await.unwrap();
    }
    install(&site, first, 1).await;
    await_epoch(&site, second, 1).await;

    // Far more than can be compiled in half a second, and little for a minute.
    let key = std::fs::read_to_string(dir.path().join("policy.key")).unwrap();
    let many: String = (0..9_900)
        .map(|n| format!("forbid (principal == Agent::\"a{n}\", action, resource is File) when {{ resource.path like \"/x{n}/*\" }};\n"))
        .collect();
    let status = site.node(first).unwrap().status().await.unwrap();
    let domain = status.get("domain").and_then(Value::as_str).unwrap();
    let archive = template_builder("long", domain, tidelock::clock::wall_unix_ms())
        .unwrap()
        .file("policies/many.cedar", many.into_bytes())
        .epoch(2)
        .build()
        .unwrap();
    let package = Package {
        signatures: vec![sign(&archive, &key).unwrap()],
        archive,
    };
    let body = json!({"package": BASE64_STANDARD.encode(package.encode().unwrap())});
    let node = site.node(first).unwrap();
    node.operate("bundle.install", &body).await.unwrap();
    await_epoch(&site, first, 2).await;

    let count = |status: &Value, what: &str| {
        let path = format!("/policy_worker/counts/{what}");
        status.pointer(&path).and_then(Value::as_u64).unwrap()
    };
    let refused = |s: &Value| count(s, "failed") > 0;
    let node = site.node(second).unwrap();
    let told = node.await_status("a refusal", LIMIT, refused).await;
    let mut told = told.unwrap();
    // A new contact, by a new process: soon enough it comes while the refusal is remembered, which lasts twice
    // as long each time.
    for _ in 0..6 {
        if count(&told, "remembered") > 0 {
            break;
        }
        let seen = |s: &Value| count(s, "failed") + count(s, "remembered");
        let before = seen(&told);
        site.kill(first).unwrap();
        site.start(first).await.unwrap();
        let node = site.node(second).unwrap();
        let again = |s: &Value| seen(s) > before;
        told = node.await_status("it again", LIMIT, again).await.unwrap();
    }
    assert!(count(&told, "remembered") > 0, "{told}");
    assert_eq!(told.pointer("/bundle/epoch"), Some(&json!(1)));
    // The control: another content is judged on its own.
    install(&site, first, 3).await;
    await_epoch(&site, second, 3).await;
}
