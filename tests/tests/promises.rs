//! Promises that only whole nodes can show: nobody leads, nobody's stall is another's, and what a
//! node says of itself is what it found.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{io::Write as _, os::unix::net::UnixStream, path::Path, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{
    network::{Loopback, Network as _},
    site::{NODES, Site, allocated_bytes},
};
use tidelock_tests::program;

const LIMIT: Duration = Duration::from_secs(40);

async fn site<'n>(dir: &Path, network: &'n Loopback) -> Site<'n> {
    let mut site = Site::prepare(dir, &program().unwrap(), network, &NODES)
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    for id in NODES {
        site.start(id)
            .await
            .unwrap_or_else(|failure| panic!("{}", failure.message));
    }
    site
}

async fn install(site: &Site<'_>, at: &str, epoch: u64) {
    let package = site
        .bundle(epoch)
        .and_then(|p| Ok(p.encode()?))
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    let body = json!({"package": BASE64_STANDARD.encode(package)});
    site.node(at)
        .unwrap()
        .operate("bundle.install", &body)
        .await
        .unwrap();
}

async fn has_epoch(site: &Site<'_>, id: &str, epoch: u64) {
    site.node(id)
        .unwrap()
        .await_status("the epoch", LIMIT, |s| {
            s.pointer("/bundle/epoch").and_then(Value::as_u64) == Some(epoch)
        })
        .await
        .unwrap();
}

async fn allowed(site: &Site<'_>, id: &str) -> bool {
    let request = json!({
        "principal": {"type": "Agent", "id": "coder-1"},
        "action": "fs.read",
        "resource": {"type": "File", "id": "/srv/app/src/main.rs"},
    });
    let client = site.node(id).unwrap().client();
    client
        .post_json("/v1/decide", request.to_string())
        .await
        .unwrap()
        .0
        == 200
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tl").tempdir().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_03_policy_may_enter_at_any_node() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let site = site(dir.path(), &network).await;
    for (entry, epoch) in NODES.into_iter().zip(1..) {
        install(&site, entry, epoch).await;
        for id in NODES {
            has_epoch(&site, id, epoch).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_10_neither_a_dead_relay_nor_a_stalled_workload_stops_the_other() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let site = site(dir.path(), &network).await;
    install(&site, "a", 1).await;
    has_epoch(&site, "b", 1).await;

    // Callers that begin a request and go silent, more than the door has room for.
    let socket = dir.path().join("b").join("s");
    let mut stalled = Vec::new();
    for _ in 0..300 {
        if let Ok(mut stream) = UnixStream::connect(&socket)
            && stream
                .write_all(b"POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-")
                .is_ok()
        {
            stalled.push(stream);
        }
    }
    assert!(stalled.len() > 64, "the stall is real: {}", stalled.len());
    install(&site, "a", 2).await;
    has_epoch(&site, "b", 2).await;
    drop(stalled);

    // Every datagram of b's relay is swallowed; its door answers as before.
    network.cut("b").unwrap();
    for _ in 0..50 {
        assert!(allowed(&site, "b").await);
    }
    network.heal("b").unwrap();
    install(&site, "a", 3).await;
    has_epoch(&site, "b", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_05_what_a_node_says_of_its_disk_and_links_is_what_it_found() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = site(dir.path(), &network).await;
    let figure = |status: &Value| {
        status
            .pointer("/disk/allocated_bytes")
            .and_then(Value::as_u64)
    };
    let before = figure(&site.node("c").unwrap().status().await.unwrap()).unwrap();
    site.kill("c")
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    // A file that no config speaks of.
    let root = site.node("c").unwrap().root();
    std::fs::write(root.join("foreign"), vec![7; 1 << 20]).unwrap();
    site.start("c")
        .await
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    let status = site.node("c").unwrap().status().await.unwrap();
    let found = figure(&status).unwrap();
    assert!(found >= before + (1 << 20), "{found} after {before}");
    assert!(found >= allocated_bytes(&root), "never less than du");

    // Two peers are configured; how many are connected is what the sessions say.
    let connected = |status: &Value| {
        status
            .pointer("/mesh/peers")
            .and_then(Value::as_array)
            .map_or(0, |peers| {
                peers
                    .iter()
                    .filter(|p| p.get("state") == Some(&json!("connected")))
                    .count()
            })
    };
    let node = site.node("c").unwrap();
    node.await_status("both sessions", LIMIT, |s| connected(s) == 2)
        .await
        .unwrap();
    network.cut("c").unwrap();
    node.await_status("no session", LIMIT, |s| connected(s) == 0)
        .await
        .unwrap();
}
