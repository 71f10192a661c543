//! Promises that only whole nodes can show: nobody leads, nobody's stall is another's, and what a
//! node says of itself is what it found.

use std::{io::Write as _, os::unix::net::UnixStream};

use serde_json::Value;
use tidelock::demo::{
    network::{Loopback, Network as _},
    site::{NODES, allocated_bytes},
};
use tidelock_tests::site::{ask, await_epoch, await_sessions, directory, good, install, running};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_03_policy_may_enter_at_any_node() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let site = running(dir.path(), &network, &NODES).await;
    for (entry, epoch) in NODES.into_iter().zip(1..) {
        install(&site, entry, epoch).await;
        for id in NODES {
            await_epoch(&site, id, epoch).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_10_neither_a_dead_relay_nor_a_stalled_workload_stops_the_other() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let site = running(dir.path(), &network, &NODES).await;
    install(&site, "a", 1).await;
    await_epoch(&site, "b", 1).await;

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
    await_epoch(&site, "b", 2).await;
    drop(stalled);

    // Every datagram of b's relay is swallowed; its door answers as before.
    network.cut("b").unwrap();
    for _ in 0..50 {
        assert_eq!(ask(&site, "b", "/srv/app/src/main.rs").await, 200);
    }
    network.heal("b").unwrap();
    install(&site, "a", 3).await;
    await_epoch(&site, "b", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_05_what_a_node_says_of_its_disk_and_links_is_what_it_found() {
    let dir = directory();
    let network = Loopback::new(&NODES).await.unwrap();
    let mut site = running(dir.path(), &network, &NODES).await;
    let figure = |status: &Value| {
        status
            .pointer("/disk/allocated_bytes")
            .and_then(Value::as_u64)
    };
    let before = figure(&site.node("c").unwrap().status().await.unwrap()).unwrap();
    good(site.kill("c"));
    // A file that no config speaks of.
    let root = site.node("c").unwrap().root();
    std::fs::write(root.join("foreign"), vec![7; 1 << 20]).unwrap();
    good(site.start("c").await);
    let status = site.node("c").unwrap().status().await.unwrap();
    let found = figure(&status).unwrap();
    assert!(found >= before + (1 << 20), "{found} after {before}");
    assert!(found >= allocated_bytes(&root), "never less than du");

    // Two peers are configured; how many are connected is what the sessions say.
    await_sessions(&site, "c", 2).await;
    network.cut("c").unwrap();
    await_sessions(&site, "c", 0).await;
}
