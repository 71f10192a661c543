//! Two hosts in network namespaces whose link goes down and comes up: how long until what was sealed
//! meanwhile is at the other. Needs root and `ip`; says `not run` elsewhere. `just link-up` has longer
//! outages and prints what it measures.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{fs, path::Path, time::Duration};

use serde_json::{Value, json};
use tidelock::{
    clock::wall_unix_ms,
    demo::{network::Network as _, site::Site},
};
use tidelock_tests::{
    namespaces::{self, Namespaces},
    not_run, program,
};

const IDS: [&str; 2] = ["a", "b"];

/// Far above anything that a healthy run needs.
const LIMIT: Duration = Duration::from_secs(120);

/// What a link-up must be well below of, milliseconds: no delay between dials is shorter.
const REDIAL_MS: u64 = 60_000;

/// How sessions end and are made again, in milliseconds.
struct Pace {
    name: &'static str,
    keep_alive: u64,
    idle_timeout: u64,
    redial_base: u64,
    redial_cap: u64,
}

/// As the config has it where nothing is said.
const COMMON: Pace = Pace {
    name: "the config's defaults",
    keep_alive: 5_000,
    idle_timeout: 30_000,
    redial_base: 500,
    redial_cap: 30_000,
};

/// Any outage ends the session, and whoever waits for the next dial waits long.
const SLEEPY: Pace = Pace {
    name: "no session left, long waits between dials",
    keep_alive: 500,
    idle_timeout: 1_500,
    redial_base: REDIAL_MS,
    redial_cap: REDIAL_MS,
};

fn site<'n>(dir: &Path, network: &'n Namespaces, pace: &Pace) -> Site<'n> {
    let site = Site::prepare(dir, &program().unwrap(), network, &IDS)
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    for id in IDS {
        let path = site.node(id).unwrap().config_path();
        let text = fs::read_to_string(&path).unwrap();
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.contains("redial_") && !line.contains("_timeout_ms"))
            .filter(|line| !line.starts_with("keep_alive_ms"))
            .collect();
        let mesh = format!(
            "[mesh]\nredial_base_ms = {}\nredial_cap_ms = {}\nkeep_alive_ms = {}\nidle_timeout_ms = {}",
            pace.redial_base, pace.redial_cap, pace.keep_alive, pace.idle_timeout
        );
        let text = kept.join("\n").replace("[mesh]", &mesh);
        fs::write(&path, text).unwrap();
    }
    site
}

fn connected(status: &Value) -> bool {
    status.pointer("/mesh/peers/0/state") == Some(&json!("connected"))
}

/// Makes a record and seals it; the id of the segment.
async fn sealed(site: &Site<'_>, at: &str) -> Value {
    let node = site.node(at).unwrap();
    let action = json!({
        "principal": {"type": "Agent", "id": "coder-1"},
        "action": "fs.read",
        "resource": {"type": "File", "id": "/srv/app/src/main.rs"},
    });
    let client = node.client();
    client
        .post_json("/v1/decide", action.to_string())
        .await
        .unwrap();
    let answer = node.operate("audit.seal", &json!({})).await.unwrap();
    answer.get("sealed").unwrap().clone()
}

/// When a node stored a segment. A machine that is too busy to answer is asked again.
async fn stored(site: &Site<'_>, at: &str, segment: &Value) -> u64 {
    let begun = std::time::Instant::now();
    loop {
        let node = site.node(at).unwrap();
        let answer = node
            .operate("journal", &json!({}))
            .await
            .unwrap_or_default();
        let entries = answer.get("entries").and_then(Value::as_array);
        let found = entries.into_iter().flatten().find(|entry| {
            entry.get("event") == Some(&json!("segment_stored"))
                && entry.get("segment") == Some(segment)
        });
        if let Some(at) = found.and_then(|entry| entry.get("unix_ms")?.as_u64()) {
            return at;
        }
        assert!(begun.elapsed() < LIMIT, "{segment} is not stored at {at}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The link of `a` is down for so long, and both seal; milliseconds from link-up to a's segment at b and
/// b's at a. `b` sees nothing of its own link change.
async fn outage(site: &Site<'_>, network: &Namespaces, outage: Duration) -> (u64, u64) {
    for id in IDS {
        let node = site.node(id).unwrap();
        node.await_status("a session", LIMIT, connected)
            .await
            .unwrap();
    }
    network.cut("a").unwrap();
    let ended = tokio::time::Instant::now() + outage;
    // What is told of it is lost with the link, and is told again ever more seldom.
    let of_a = sealed(site, "a").await;
    let of_b = sealed(site, "b").await;
    tokio::time::sleep_until(ended).await;
    let up = wall_unix_ms();
    network.heal("a").unwrap();
    let at_b = stored(site, "b", &of_a).await.saturating_sub(up);
    let at_a = stored(site, "a", &of_b).await.saturating_sub(up);
    (at_b, at_a)
}

async fn measured(pace: &Pace, outages_s: &[u64]) -> Vec<(u64, u64)> {
    let dir = tempfile::Builder::new().prefix("tl").tempdir().unwrap();
    let network = Namespaces::new(&IDS).unwrap();
    let mut site = site(dir.path(), &network, pace);
    for id in IDS {
        site.start(id)
            .await
            .unwrap_or_else(|failure| panic!("{}", failure.message));
    }
    let mut all = Vec::new();
    for outage_s in outages_s {
        let (at_b, at_a) = outage(&site, &network, Duration::from_secs(*outage_s)).await;
        println!(
            "{}: {outage_s} s down, then {at_b} ms to b and {at_a} ms to a",
            pace.name
        );
        all.push((at_b, at_a));
    }
    others_links(&site, &network).await;
    all
}

fn sessions(status: &Value) -> u64 {
    let counted = status.pointer("/mesh/peers/0/detail/sessions");
    counted.and_then(Value::as_u64).unwrap()
}

/// Links that have nothing to do with the peer come up all the time where there are containers.
async fn others_links(site: &Site<'_>, network: &Namespaces) {
    let node = site.node("a").unwrap();
    let before = node.await_status("a session", LIMIT, connected).await;
    for pair in 0..3 {
        let (one, two) = (format!("x{pair}"), format!("y{pair}"));
        let add = [
            "link", "add", &one, "up", "type", "veth", "peer", "name", &two,
        ];
        network.exec("a", "ip", &add, "").unwrap();
        let up = ["link", "set", &two, "up"];
        network.exec("a", "ip", &up, "").unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    let after = node.status().await.unwrap();
    assert!(connected(&after), "{after}");
    assert_eq!(sessions(&after), sessions(&before.unwrap()));
}

fn outages_s() -> Vec<u64> {
    match std::env::var("TIDELOCK_OUTAGES_S") {
        Ok(text) => text
            .split_whitespace()
            .map(|s| s.parse().unwrap())
            .collect(),
        Err(_) => vec![5],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_12_a_link_that_comes_up_is_used_at_once() {
    if let Some(why) = namespaces::why_not() {
        return not_run("inv_12_a_link_that_comes_up_is_used_at_once", &why).unwrap();
    }
    let outages_s = outages_s();
    let (common, sleepy) = tokio::join!(measured(&COMMON, &outages_s), measured(&SLEEPY, &[5]));
    for (at_b, at_a) in common.into_iter().chain(sleepy) {
        assert!(
            at_b.max(at_a) < REDIAL_MS / 4,
            "{at_b} ms and {at_a} ms after link-up"
        );
    }
}
