//! A site of real processes, as tests of whole nodes play it: that of `tidelock demo`, and what they
//! say to it and ask of it. A step that fails panics: that is how a test fails.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails"
)]

use std::{path::Path, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidelock::{
    cli::Failure,
    demo::{network::Network, site::Site},
};

use crate::program;

/// Far above anything that a healthy run needs.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What a step gave.
pub fn good<T>(result: Result<T, Failure>) -> T {
    result.unwrap_or_else(|failure| panic!("{}", failure.message))
}

/// A directory with a name that is short enough for the sockets in it.
#[must_use]
pub fn directory() -> TempDir {
    tempfile::Builder::new().prefix("tl").tempdir().unwrap()
}

/// A site whose files are made, and of which nothing runs yet.
#[must_use]
pub fn prepared<'n>(dir: &Path, network: &'n dyn Network, ids: &[&'static str]) -> Site<'n> {
    good(Site::prepare(dir, &program().unwrap(), network, ids))
}

/// A site of which every node runs.
pub async fn running<'n>(dir: &Path, network: &'n dyn Network, ids: &[&'static str]) -> Site<'n> {
    let mut site = prepared(dir, network, ids);
    for id in ids {
        good(site.start(id).await);
    }
    site
}

/// Installs the story's bundle of this epoch at a node.
pub async fn install(site: &Site<'_>, at: &str, epoch: u64) {
    let package = good(site.bundle(epoch).and_then(|p| Ok(p.encode()?)));
    let body = json!({"package": BASE64_STANDARD.encode(package)});
    let node = site.node(at).unwrap();
    node.operate("bundle.install", &body).await.unwrap();
}

/// Waits until a node decides by the bundle of this epoch.
pub async fn await_epoch(site: &Site<'_>, id: &str, epoch: u64) {
    let decides = |s: &Value| s.pointer("/bundle/epoch") == Some(&json!(epoch));
    let node = site.node(id).unwrap();
    node.await_status("the epoch", LIMIT, decides)
        .await
        .unwrap();
}

/// How many sessions a status shows.
#[must_use]
pub fn sessions(status: &Value) -> usize {
    let peers = status.pointer("/mesh/peers").and_then(Value::as_array);
    peers.map_or(0, |peers| {
        let up = |p: &&Value| p.get("state") == Some(&json!("connected"));
        peers.iter().filter(up).count()
    })
}

/// Waits until a node has so many sessions; its status then.
pub async fn await_sessions(site: &Site<'_>, id: &str, count: usize) -> Value {
    let node = site.node(id).unwrap();
    node.await_status("its sessions", LIMIT, |s| sessions(s) == count)
        .await
        .unwrap()
}

/// Asks a node whether a file may be read, which the story's bundle allows below `/srv/app/src`; the
/// status of its answer.
pub async fn ask(site: &Site<'_>, id: &str, path: &str) -> u16 {
    let request = json!({
        "principal": {"type": "Agent", "id": "coder-1"},
        "action": "fs.read",
        "resource": {"type": "File", "id": path},
    });
    let client = site.node(id).unwrap().client();
    // A busy machine may be late for a deadline of the node, which denies then.
    for _ in 0..20 {
        let answer = client.post_json("/v1/decide", request.to_string()).await;
        let (status, body) = answer.unwrap();
        let body = String::from_utf8_lossy(&body);
        let late = ["\"DEADLINE\"", "\"AUDIT_UNAVAILABLE\""];
        if !late.iter().any(|reason| body.contains(reason)) {
            return status;
        }
    }
    panic!("twenty decisions in a row were late");
}

/// Seals a node's log; the id of the segment, if there was anything to seal.
pub async fn seal(site: &Site<'_>, id: &str) -> Option<String> {
    let node = site.node(id).unwrap();
    let answer = node.operate("audit.seal", &json!({})).await.unwrap();
    Some(answer.get("sealed")?.as_str()?.to_owned())
}

/// Events of one kind in the journal of a running node: facts since its start.
pub async fn events(site: &Site<'_>, id: &str, kind: &str) -> Vec<Value> {
    let node = site.node(id).unwrap();
    let journal = node.operate("journal", &json!({})).await.unwrap();
    let entries = journal.pointer("/entries").and_then(Value::as_array);
    entries
        .unwrap()
        .iter()
        .filter(|entry| entry.get("event").and_then(Value::as_str) == Some(kind))
        .cloned()
        .collect()
}
