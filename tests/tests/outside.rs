//! A mesh as it is seen from outside: what its nodes say of each other in `/metrics` and `peers why`,
//! and what leaves their network cards.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::time::{Duration, Instant};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{
    network::{Loopback, Network},
    site::{NODES, Site},
};
use tidelock_tests::{
    namespaces, not_run, program,
    site::{
        LIMIT, ask, await_epoch, await_sessions, directory, events, good, install, running, seal,
    },
};

/// Makes a record and seals it; the id of the segment.
async fn sealed(site: &Site<'_>, id: &str) -> String {
    ask(site, id, "/srv/app/src/main.rs").await;
    seal(site, id).await.unwrap()
}

/// Asks by the command line, as an operator does, until the answer has this code.
async fn why(site: &Site<'_>, at: &str, segment: &str, peer: &str, code: &str) -> Value {
    let begun = Instant::now();
    loop {
        let asked = site.tidelock(at, &["peers", "why", segment, peer]).await;
        let (_, answer) = good(asked);
        if answer.get("code") == Some(&json!(code)) {
            return answer;
        }
        assert!(begun.elapsed() < LIMIT, "no `{code}`: {answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn metrics(site: &Site<'_>, at: &str) -> String {
    let client = site.node(at).unwrap().client();
    let (status, body) = client.get("/metrics").await.unwrap();
    assert_eq!(status, 200);
    String::from_utf8(body.to_vec()).unwrap()
}

/// The value of the line that begins with `name`, once it is above or equal to `least` and at most `most`.
async fn metric(site: &Site<'_>, at: &str, name: &str, least: f64, most: f64) -> f64 {
    let begun = Instant::now();
    loop {
        let text = metrics(site, at).await;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        match value {
            Some(value) if (least..=most).contains(&value) => return value,
            _ if begun.elapsed() < LIMIT => tokio::time::sleep(Duration::from_millis(50)).await,
            _ => panic!("{name} is {value:?}, not within {least}..={most}:\n{text}"),
        }
    }
}

/// The names of the records of a qlog of this peer, one second long, the header's as "".
async fn qlog(site: &Site<'_>, at: &str, peer: &str) -> Vec<String> {
    let output = tokio::process::Command::new(program().unwrap())
        .args(["peers", "qlog", peer, "--seconds", "1", "-c"])
        .arg(site.node(at).unwrap().config_path())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    // RFC 7464: each record begins with RS.
    let (nothing, records) = text.split_once('\u{1e}').unwrap();
    assert!(nothing.is_empty());
    records
        .split('\u{1e}')
        .map(|record| {
            let record: Value = serde_json::from_str(record).unwrap();
            let name = record.get("name").and_then(Value::as_str);
            name.unwrap_or_default().to_owned()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_goes_and_comes_is_seen_in_metrics_and_each_segment_has_its_reason() {
    let dir = directory();
    let network = Loopback::new(&["a", "b"]).await.unwrap();
    let mut site = running(dir.path(), &network, &["a", "b"]).await;
    install(&site, "a", 1).await;
    await_sessions(&site, "a", 1).await;
    let first = sealed(&site, "a").await;
    let held = why(&site, "a", &first, "b", "held").await;
    assert_eq!(held.get("direction"), Some(&json!("to_peer")), "{held}");
    // The other way round: b holds it, and says of a that a needs nothing of its own log.
    let own = why(&site, "b", &first, "a", "held").await;
    assert_eq!(own.get("by"), Some(&json!("head")), "{own}");
    let to_peer = "tidelock_peer_lag_segments{peer=\"b\",direction=\"to_peer\"}";
    let since = "tidelock_peer_lag_seconds{peer=\"b\",direction=\"to_peer\"}";
    metric(&site, "a", "tidelock_peer_connected{peer=\"b\"}", 1.0, 1.0).await;
    metric(&site, "a", to_peer, 0.0, 0.0).await;
    metric(
        &site,
        "a",
        "tidelock_peer_sent_packets_total{peer=\"b\"}",
        1.0,
        f64::MAX,
    )
    .await;
    let course = qlog(&site, "a", "b").await;
    let begins = [
        "",
        "tidelock:session_started",
        "recovery:metrics_updated",
        "tidelock:packets",
    ];
    assert!(course.starts_with(&begins.map(str::to_owned)), "{course:?}");
    let text = metrics(&site, "a").await;
    for name in [
        "tidelock_crl_age_seconds{issuer=",
        "tidelock_crl_fresh_seconds{issuer=",
        "tidelock_peer_lost_packets_total{peer=\"b\"}",
        "tidelock_connections_refused_total{reason=\"address_quota\"} 0",
    ] {
        assert!(text.contains(name), "{name}:\n{text}");
    }

    // Away: what is sealed meanwhile is a lag, with a reason and the time of the next dial.
    site.kill("b").unwrap();
    let second = sealed(&site, "a").await;
    let down = why(&site, "a", &second, "b", "session_down").await;
    assert!(down.get("last_close").is_some(), "{down}");
    metric(&site, "a", "tidelock_peer_connected{peer=\"b\"}", 0.0, 0.0).await;
    metric(&site, "a", to_peer, 1.0, f64::MAX).await;
    metric(&site, "a", since, 1.0, f64::MAX).await;
    // Either it is being dialled just now, or it is known when it will be.
    let begun = Instant::now();
    loop {
        let asked = why(&site, "a", &second, "b", "session_down").await;
        if asked.get("last_dial_error").is_some() && asked.get("next_dial_ms").is_some() {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "no dial that failed: {asked}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    good(site.start("b").await);
    why(&site, "a", &second, "b", "held").await;
    metric(&site, "a", to_peer, 0.0, 0.0).await;
    let nobody = format!("blake3:{}", "0".repeat(64));
    let none = why(&site, "a", &nobody, "b", "not_listed").await;
    assert_eq!(none.get("direction"), Some(&json!("from_peer")), "{none}");
    let stranger = json!({"segment": second, "peer": "nobody"});
    let refused = site
        .node("a")
        .unwrap()
        .operate("peers.why", &stranger)
        .await;
    assert!(refused.unwrap_err().0.contains("UNKNOWN_PEER"));

    // Revoked: its session is closed, and that is the reason from then on.
    let (_, crl) = good(site.revoke("b"));
    let body = json!({"crl": BASE64_STANDARD.encode(crl)});
    site.node("a")
        .unwrap()
        .operate("crl.import", &body)
        .await
        .unwrap();
    let third = sealed(&site, "a").await;
    why(&site, "a", &third, "b", "revoked").await;
    metric(
        &site,
        "a",
        "tidelock_peers_refused_total{reason=\"cert_revoked\"}",
        1.0,
        f64::MAX,
    )
    .await;
}

async fn quota(site: &Site<'_>, at: &str, arguments: &[&str]) -> Value {
    let command: Vec<&str> = ["peers", "quota"]
        .iter()
        .chain(arguments)
        .copied()
        .collect();
    good(site.tidelock(at, &command).await).1
}

/// Ends a node as its operator does, so that it writes what it keeps.
async fn stop(site: &mut Site<'_>, id: &str) {
    let node = site.node(id).unwrap();
    let stat = format!("/proc/{}/stat", node.process_id().unwrap());
    node.signal(rustix::process::Signal::TERM).unwrap();
    let begun = Instant::now();
    // Ended, and not waited for yet: a zombie.
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(begun.elapsed() < LIMIT, "{id} does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    site.kill(id).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_13_a_peers_quota_is_changed_live_recorded_and_outlives_restarts() {
    let dir = directory();
    let network = Loopback::new(&["a", "b"]).await.unwrap();
    let mut site = running(dir.path(), &network, &["a", "b"]).await;
    install(&site, "a", 1).await;
    await_sessions(&site, "a", 1).await;
    let day = 1_u64 << 30;
    let shown = quota(&site, "a", &["b"]).await;
    assert_eq!(shown.get("own"), Some(&json!(false)), "{shown}");
    assert_eq!(
        shown.pointer("/after/bytes_per_day"),
        Some(&Value::Null),
        "{shown}"
    );

    // The plan changes nothing, the act does, and it is in the log.
    let plan = ["b", "--bytes-per-day", "1GiB", "--bytes-per-second", "1MiB"];
    for arguments in [&plan[..], &["b"]] {
        quota(&site, "a", arguments).await;
        let status = site.node("a").unwrap().status().await.unwrap();
        assert_eq!(status.pointer("/mesh/own_quotas"), Some(&json!([])));
    }
    let act: Vec<&str> = plan.iter().copied().chain(["--apply"]).collect();
    let done = quota(&site, "a", &act).await;
    assert_eq!(done.pointer("/after/bytes_per_day"), Some(&json!(day)));
    let status = site.node("a").unwrap().status().await.unwrap();
    assert_eq!(status.pointer("/mesh/own_quotas"), Some(&json!(["b"])));
    let tail = json!({"lines": 5});
    let records = site.node("a").unwrap().operate("audit.tail", &tail).await;
    assert!(records.unwrap().to_string().contains("peer_quota_set"));

    // What b sends counts, and the next session tells b its limits.
    let segment = sealed(&site, "b").await;
    why(&site, "b", &segment, "a", "held").await;
    let used = quota(&site, "a", &["b"]).await;
    let used = used.get("used_today_bytes").and_then(Value::as_u64);
    assert!(used.is_some_and(|bytes| bytes > 0), "{used:?}");
    stop(&mut site, "a").await;
    good(site.start("a").await);
    await_sessions(&site, "b", 1).await;
    let after = quota(&site, "a", &["b"]).await;
    assert_eq!(after.get("own"), Some(&json!(true)), "{after}");
    assert_eq!(
        after.pointer("/after/bytes_per_second"),
        Some(&json!(1 << 20))
    );
    assert_eq!(after.get("used_today_bytes").and_then(Value::as_u64), used);
    let seen = site.node("b").unwrap().status().await.unwrap();
    let announced = seen
        .pointer("/mesh/peers/0/detail/announced")
        .unwrap_or(&Value::Null);
    assert_eq!(announced.get("in_bytes_per_second"), Some(&json!(1 << 20)));
    let left = announced.get("in_bytes_left_today").and_then(Value::as_u64);
    assert_eq!(left, used.map(|used| day - used), "{announced}");

    // A damaged file grants nothing: told, and what was set has to be set again.
    stop(&mut site, "a").await;
    let file = site.node("a").unwrap().root().join("state/quotas");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen("1048576", "9048576", 1)).unwrap();
    good(site.start("a").await);
    let damaged = events(&site, "a", "state_damaged").await;
    let files: Vec<_> = damaged.iter().map(|event| event.get("file")).collect();
    assert_eq!(files, [Some(&json!("state/quotas"))], "{damaged:?}");
    let lost = quota(&site, "a", &["b"]).await;
    assert_eq!(lost.get("own"), Some(&json!(false)), "{lost}");
    assert_eq!(lost.get("after"), shown.get("after"), "as in the config");
    let status = site.node("a").unwrap().status().await.unwrap();
    assert_eq!(status.pointer("/mesh/own_quotas"), Some(&json!([])));
    await_sessions(&site, "a", 1).await;
    let next = sealed(&site, "b").await;
    why(&site, "b", &next, "a", "held").await;
    // Set again, and taken back.
    let again = quota(&site, "a", &act).await;
    assert_eq!(again.pointer("/after/bytes_per_day"), Some(&json!(day)));
    let common = quota(&site, "a", &["b", "--common", "--apply"]).await;
    assert_eq!(common.get("own"), Some(&json!(false)), "{common}");
    assert_eq!(common.get("after"), shown.get("after"), "{common}");
    let stranger = json!({"peer": "nobody"});
    let refused = site.node("a").unwrap().operate("peers.quota", &stranger);
    assert!(refused.await.unwrap_err().0.contains("UNKNOWN_PEER"));
}

#[test]
fn a_syncing_node_sends_no_packet_to_anybody_but_its_peers() {
    let name = "a_syncing_node_sends_no_packet_to_anybody_but_its_peers";
    if let Some(why) = namespaces::why_not().or_else(namespaces::why_no_nft) {
        not_run(name, &why).unwrap();
        return;
    }
    let dir = directory();
    let network = namespaces::Namespaces::new(&NODES).unwrap();
    for node in NODES {
        let others = NODES.into_iter().filter(|other| *other != node);
        let allowed: Vec<String> = others.map(|o| network.listen(o).ip().to_string()).collect();
        network.watch(node, &allowed, None).unwrap();
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut site = running(dir.path(), &network, &NODES).await;
        for id in NODES {
            await_sessions(&site, id, 2).await;
        }
        // Policy and audit move, a link goes down and comes back, a node dies and is dialled.
        install(&site, "a", 1).await;
        for id in NODES {
            await_epoch(&site, id, 1).await;
        }
        let segment = sealed(&site, "b").await;
        why(&site, "b", &segment, "a", "held").await;
        network.cut("c").unwrap();
        await_sessions(&site, "a", 1).await;
        let meanwhile = sealed(&site, "a").await;
        network.heal("c").unwrap();
        why(&site, "a", &meanwhile, "c", "held").await;
        site.kill("b").unwrap();
        await_sessions(&site, "a", 1).await;
        good(site.start("b").await);
        await_sessions(&site, "a", 2).await;
    });
    for node in NODES {
        let count = |counter| network.packets(node, counter).unwrap();
        let (inside, foreign) = (count("inside"), count("foreign"));
        assert!(inside > 20, "{node}: {inside} packets to peers");
        assert_eq!(foreign, 0, "{node}: packets to others");
        // The control: one packet to anybody else is counted.
        network.send_to(node, "10.77.0.200", 9).unwrap();
        assert_eq!(count("foreign"), 1, "{node}");
    }
}
