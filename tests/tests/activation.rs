//! Bundles that a site's own rules keep out, on live sessions between real nodes.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of test functions"
)]

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{
    network::Loopback,
    site::{DOMAIN, NODES, Site},
};
use tidelock_policy::{
    BundleBuilder, Package, sign,
    testing::{Authority, template_builder},
};
use tidelock_tests::site::{
    LIMIT, ask, await_epoch, await_sessions, directory, events, install, prepared,
};

/// Gives a node a trust file of its own: that of the site, in its second format and with these rules.
fn rules(site: &Site<'_>, dir: &std::path::Path, id: &str, rules: &str) {
    let text = std::fs::read_to_string(dir.join("trust.toml")).unwrap();
    let activation = format!("[thresholds]\npolicy = 1\n\n[activation]\n{rules}\n");
    let text = text
        .replace("format = 1", "format = 2")
        .replace("threshold = 1\n", &activation)
        .replace("public_key_pem", "roles = [\"policy\"]\npublic_key_pem");
    std::fs::write(dir.join("strict.toml"), text).unwrap();
    let path = site.node(id).unwrap().config_path();
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replace("../trust.toml", "../strict.toml");
    assert!(config.contains("../strict.toml"));
    std::fs::write(&path, config).unwrap();
}

async fn give(site: &Site<'_>, at: &str, package: &Package) {
    let body = json!({"package": BASE64_STANDARD.encode(package.encode().unwrap())});
    let node = site.node(at).unwrap();
    node.operate("bundle.install", &body).await.unwrap();
}

fn waiting(status: &Value) -> &[Value] {
    let waiting = status.pointer("/activation/waiting");
    waiting.and_then(Value::as_array).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_that_is_blocked_waits_on_a_live_session_and_comes_when_the_rules_let_it() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = prepared(dir.path(), &network, &NODES);
    let [first, strict, _] = NODES;
    rules(&site, dir.path(), strict, "block_on = \"any_flip\"");
    // In this order the one whose connections are kept finds the other one there.
    for id in [strict, first] {
        site.start(id).await.unwrap();
    }
    install(&site, first, 1).await;
    await_epoch(&site, strict, 1).await;
    assert_eq!(ask(&site, strict, "/srv/app/src/plan.txt").await, 200);
    // The control: a bundle that flips nothing passes on the same session.
    install(&site, first, 2).await;
    await_epoch(&site, strict, 2).await;

    let key = std::fs::read_to_string(dir.path().join("policy.key")).unwrap();
    let forbid = "forbid (principal, action, resource is File) when { resource.path like \"/srv/app/src/plan*\" };";
    let archive = template_builder("other", "harbour", tidelock::clock::wall_unix_ms())
        .unwrap()
        .file("policies/plan.cedar", forbid.as_bytes().to_vec())
        .epoch(3)
        .build()
        .unwrap();
    let signatures = vec![sign(&archive, &key).unwrap()];
    let package = Package {
        archive,
        signatures,
    };
    give(&site, first, &package).await;
    let node = site.node(strict).unwrap();
    let waits = |s: &Value| !waiting(s).is_empty();
    let told = node.await_status("a bundle that waits", LIMIT, waits).await;
    let told = told.unwrap();
    let one = &waiting(&told)[0];
    assert_eq!(one.get("code"), Some(&json!("POLICY_FLIPS")));
    assert_eq!(one.get("epoch"), Some(&json!(3)));
    assert_eq!(one.get("hash"), Some(&json!(package.content_id())));
    assert_eq!(told.pointer("/bundle/epoch"), Some(&json!(2)));
    assert_eq!(ask(&site, strict, "/srv/app/src/plan.txt").await, 200);
    // The peer is not to blame: the session is the same, on which it then comes.
    let sessions = events(&site, strict, "session_established").await.len();
    rules(&site, dir.path(), strict, "block_on = \"deny_to_allow\"");
    node.signal(rustix::process::Signal::HUP).unwrap();
    await_epoch(&site, strict, 3).await;
    let none_waits = |s: &Value| waiting(s).is_empty();
    let settled = node
        .await_status("none that waits", LIMIT, none_waits)
        .await;
    settled.unwrap();
    let sessions_now = events(&site, strict, "session_established").await.len();
    assert_eq!(sessions_now, sessions);
    assert_eq!(events(&site, strict, "bundle_rejected").await.len(), 1);
    assert_ne!(ask(&site, strict, "/srv/app/src/plan.txt").await, 200);
}

/// A peer that put junk beside the signature of a bundle that waits made another bundle of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_of_a_bundle_that_waits_are_one_and_their_signers_add_up() {
    let dir = directory();
    let ids = ["a", "b", "c", "d"];
    let network = Loopback::new(&ids).await.unwrap();
    let mut site = prepared(dir.path(), &network, &ids);
    let [plain, junk, second, strict] = ids;
    // Another key that the site trusts, and one that nobody does.
    let pilot = Authority::new("harbour", 1).unwrap();
    let stranger = Authority::new("harbour", 2).unwrap();
    let text = std::fs::read_to_string(dir.path().join("trust.toml")).unwrap();
    let pilots = pilot.trust_toml(1);
    let (_, key) = pilots.split_once("[[keys]]").unwrap();
    std::fs::write(
        dir.path().join("trust.toml"),
        format!("{text}\n[[keys]]{key}"),
    )
    .unwrap();
    rules(&site, dir.path(), strict, "widening_signatures = 2");

    let Package {
        archive,
        signatures,
    } = site.bundle(1).unwrap();
    let junk_signatures = stranger.signatures(&archive, &[0, 1]).unwrap();
    let pilots_signature = pilot.signatures(&archive, &[0]).unwrap();
    let copies = [
        (plain, signatures.clone()),
        (junk, [signatures, junk_signatures].concat()),
        (second, pilots_signature),
    ];
    // Each copy at a node that meets nobody yet.
    for (id, signatures) in copies {
        site.start(id).await.unwrap();
        let archive = archive.clone();
        let package = Package {
            archive,
            signatures,
        };
        give(&site, id, &package).await;
        site.kill(id).unwrap();
    }
    for id in [strict, plain, junk] {
        site.start(id).await.unwrap();
    }
    // Both copies have been looked at.
    let mut refused = Vec::new();
    while refused.len() < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        refused = events(&site, strict, "transfer_failed").await;
    }
    assert_ne!(refused[0].get("segment"), refused[1].get("segment"));
    for refusal in &refused {
        assert_eq!(refusal.get("code"), Some(&json!("WIDENING_UNPROVEN")));
    }
    let node = site.node(strict).unwrap();
    let status = node.status().await.unwrap();
    assert_eq!(waiting(&status).len(), 1);
    let signers = waiting(&status)[0].get("signers").and_then(Value::as_array);
    assert_eq!(signers.unwrap().len(), 1);
    assert_eq!(status.pointer("/bundle/epoch"), None);
    let told = events(&site, strict, "bundle_rejected").await;
    assert_eq!(told.len(), 1, "{told:?}");
    // The copy of the other signer alone would wait too: with what is known of the first it does not.
    site.start(second).await.unwrap();
    await_epoch(&site, strict, 1).await;
    let none_waits = |s: &Value| waiting(s).is_empty();
    let node = site.node(strict).unwrap();
    let settled = node
        .await_status("none that waits", LIMIT, none_waits)
        .await;
    settled.unwrap();
}

/// INV-18 on a live session: no contact comes after the one on which the bundle was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_that_is_due_by_a_clock_in_doubt_comes_when_that_is_accepted() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = prepared(dir.path(), &network, &NODES);
    let [first, doubting, _] = NODES;
    // What an earlier run kept of the time is damaged; the clock says what any clock says.
    site.start(doubting).await.unwrap();
    site.kill(doubting).unwrap();
    let kept = site.node(doubting).unwrap().root().join("clock");
    std::fs::write(kept, "{}").unwrap();
    for id in [doubting, first] {
        site.start(id).await.unwrap();
    }
    await_sessions(&site, doubting, 1).await;
    // The control: what has no time of its own is taken.
    for epoch in [1, 2] {
        install(&site, first, epoch).await;
        await_epoch(&site, doubting, epoch).await;
    }

    let key = std::fs::read_to_string(dir.path().join("policy.key")).unwrap();
    let files = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/bundle");
    let manifest = std::fs::read(files.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let from = |epoch: u64, not_before: &str| {
        let mut manifest = manifest.clone();
        manifest["not_before"] = json!(not_before);
        let archive = BundleBuilder::from_dir(&files)
            .unwrap()
            .file("manifest.json", manifest.to_string().into_bytes())
            .domain(DOMAIN)
            .epoch(epoch)
            .created_unix_ms(tidelock::clock::wall_unix_ms())
            .build()
            .unwrap();
        Package {
            signatures: vec![sign(&archive, &key).unwrap()],
            archive,
        }
    };
    let scheduled = |status: &Value| -> Vec<Value> {
        let scheduled = status.pointer("/activation/scheduled");
        let epochs = scheduled.and_then(Value::as_array).unwrap().iter();
        epochs
            .map(|one| one.get("epoch").unwrap().clone())
            .collect()
    };
    // What is ahead of its time by this clock too waits for it.
    give(&site, first, &from(9, "2100-01-01T00:00:00Z")).await;
    let node = site.node(doubting).unwrap();
    let waits = |s: &Value| scheduled(s) == [json!(9)];
    node.await_status("a bundle ahead of its time", LIMIT, waits)
        .await
        .unwrap();
    give(&site, first, &from(3, "2020-01-01T00:00:00Z")).await;
    await_epoch(&site, first, 3).await;
    let mut refused = Vec::new();
    let begun = std::time::Instant::now();
    while refused.is_empty() && begun.elapsed() < LIMIT {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        refused = events(&site, doubting, "bundle_rejected").await;
    }
    let code = refused.first().and_then(|refused| refused.get("code"));
    assert_eq!(code, Some(&json!("CLOCK_SUSPECT")));
    let status = node.status().await.unwrap();
    assert_eq!(status.pointer("/clock/suspect"), Some(&json!(true)));
    assert_eq!(status.pointer("/bundle/epoch"), Some(&json!(2)));
    assert!(waits(&status), "what is due is not among it");
    let sessions = events(&site, doubting, "session_established").await.len();
    node.operate("clock.accept", &json!({})).await.unwrap();
    await_epoch(&site, doubting, 3).await;
    assert!(waits(&node.status().await.unwrap()));
    let sessions_now = events(&site, doubting, "session_established").await.len();
    assert_eq!(sessions_now, sessions);
}
