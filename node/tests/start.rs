//! What keeps a node from starting, and what does not: bad configs, loose files, roots and doors
//! that are taken. Each refusal stands beside the start that succeeds.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::unix::net::UnixListener,
};

use common::{Site, chmod, free_tcp, free_udp, over_unix, request, until};
use serde_json::json;

#[test]
fn a_config_with_many_mistakes_shows_all_of_them_with_key_and_line() {
    let site = Site::new();
    let good = site.config();
    site.ok(&["config", "check"]);
    assert_eq!(
        site.json(&["config", "check"]),
        json!({"ok": true, "mistakes": [], "loosened": []})
    );

    let bad = good
        .replace("id = \"a\"", "id = \"-a\"")
        .replace("ceiling_bytes = \"32MiB\"", "ceiling_byte = \"32MiB\"")
        .replace("key = \"a.key\"", "key = 7")
        .replace("unix = \"s\"", "tcp = \"0.0.0.0:80\"")
        .replace("[policy]\ntrust = \"trust.toml\"\n", "[polcy]\n");
    site.write("tidelock.toml", &bad);
    let line = |text: &str| bad.lines().position(|l| l.starts_with(text)).unwrap() + 1;
    let expected = [
        (line("id = "), "node.id"),
        (line("ceiling_byte "), "node.ceiling_byte"),
        (line("key = 7"), "identity.key"),
        (line("tcp = "), "gateway.tcp"),
    ];
    // The section of the config that is not there at all has no line of its own.
    let keys = [
        "node.id",
        "node.ceiling_byte",
        "identity.key",
        "gateway.tcp",
        "polcy",
        "policy",
    ];
    let text = site.tidelock(&["config", "check"]).ended(2).says(&keys);
    for (line, key) in expected {
        assert!(
            text.err.contains(&format!("line {line}: {key}: ")),
            "{text:?}"
        );
    }
    assert!(
        text.err.contains("`ceiling_bytes`"),
        "the nearest key: {text:?}"
    );

    let listed = site
        .tidelock(&["config", "check", "--json"])
        .ended(2)
        .json();
    assert_eq!(listed["ok"], false);
    let mistakes = listed["mistakes"].as_array().unwrap();
    for (line, key) in expected {
        let found = mistakes
            .iter()
            .any(|m| m["line"] == line && m["key"] == key);
        assert!(found, "{key} at {line}: {listed}");
    }
    assert!(
        mistakes
            .iter()
            .all(|m| m["message"].as_str().is_some_and(|m| !m.is_empty()))
    );

    // A node says the same, and leaves nothing behind.
    site.refused_start().says(&keys);
    assert!(!site.path("root").exists());

    site.write("tidelock.toml", "[node]\nid = \n");
    site.refused_start().says(&["line 2"]);
    site.write("tidelock.toml", "");
    site.refused_start()
        .says(&["node.id", "identity.certificate", "mesh.listen"]);
    fs::write(site.path("tidelock.toml"), b"[node]\nid = \"\xff\"\n").unwrap();
    site.refused_start().says(&["tidelock.toml"]);

    site.write("tidelock.toml", &good);
    site.start();
}

#[test]
fn a_missing_file_is_named() {
    let site = Site::new();
    site.tidelock(&["run", "-c", "nowhere.toml"])
        .ended(2)
        .says(&["nowhere.toml", "-c FILE"]);
    site.tidelock(&["config", "check", "-c", "nowhere.toml", "--json"])
        .ended(2)
        .says(&["nowhere.toml"]);

    // Its first start is the one that a node cannot make without its papers: nothing would vouch
    // for its log.
    for name in ["a.crt", "a.key", "ca/ca.crt"] {
        fs::rename(site.path(name), site.path("aside")).unwrap();
        site.refused_start().says(&[name, "certificate"]);
        site.tidelock(&["doctor"]).ended(1).says(&[name]);
        fs::rename(site.path("aside"), site.path(name)).unwrap();
    }
    site.start_deciding();

    // Later it starts without them, decides, and says why nobody meets it (ruling 12).
    for name in ["a.crt", "a.key", "ca/ca.crt"] {
        fs::rename(site.path(name), site.path("aside")).unwrap();
        let node = site.start();
        site.decides();
        let why = site.transport_closed();
        assert!(why.contains(name), "{name}: {why}");
        // The file comes back, and the node needs no restart.
        fs::rename(site.path("aside"), site.path(name)).unwrap();
        node.reload("reloaded");
        site.transport_open();
        site.decides();
    }
}

#[test]
fn a_key_file_that_others_may_read_is_refused() {
    let site = Site::new();
    for mode in [0o640, 0o604, 0o660] {
        chmod(&site.path("a.key"), mode);
        let said = site.refused_start().says(&["a.key", "chmod"]);
        assert!(said.err.contains(&format!("{mode:04o}")), "{said:?}");
        assert!(!site.path("root").exists(), "nothing was made");
    }
    chmod(&site.path("a.key"), 0o400);
    site.start();

    // The CA and the token file are held to the same.
    chmod(&site.path("ca/ca.key"), 0o640);
    let issue = ["ca", "issue", "--dir", "ca", "--node", "b"];
    site.tidelock(&issue).ended(2).says(&["ca.key", "chmod"]);
    chmod(&site.path("ca/ca.key"), 0o600);
    site.ok(&issue);

    let tokens = format!(
        "unix = \"s\"\ntokens = \"tokens.toml\"\ntcp = \"{}\"",
        free_tcp()
    );
    site.configure("unix = \"s\"", &tokens);
    let entry = site.json(&["token", "new", "--principal", "Agent::ops-1"])["entry"].clone();
    site.write(
        "tokens.toml",
        &format!("format = 1\n\n{}", entry.as_str().unwrap()),
    );
    chmod(&site.path("tokens.toml"), 0o644);
    site.refused_start().says(&["tokens.toml"]);
    chmod(&site.path("tokens.toml"), 0o600);
    site.start();
}

#[test]
fn the_beacons_key_is_private_and_is_in_no_log_and_no_answer() {
    let site = Site::new();
    let key = [0xb5; 32];
    fs::write(site.path("site.beacon"), key).unwrap();
    // A group of its own: tests that run beside this one have theirs.
    let port = free_udp().port();
    let sections = format!(
        "[[mesh.peers]]\nid = \"b\"\n[beacon]\nenabled = true\nkey_file = \"site.beacon\"\n\
         port = {port}\ninterval_s = 1\n[log]\nlevel = \"trace\"\n"
    );
    site.write(
        "tidelock.toml",
        &format!("{}{sections}", site.read("tidelock.toml")),
    );
    for mode in [0o640, 0o604, 0o660] {
        chmod(&site.path("site.beacon"), mode);
        let said = site
            .refused_start()
            .says(&["beacon.key_file", "site.beacon", "chmod"]);
        assert!(said.err.contains(&format!("{mode:04o}")), "{said:?}");
        site.tidelock(&["config", "check", "-c", "tidelock.toml"])
            .ended(2)
            .says(&["beacon.key_file"]);
        site.tidelock(&["doctor"])
            .ended(1)
            .says(&["beacon", "chmod"]);
    }
    chmod(&site.path("site.beacon"), 0o600);
    fs::write(site.path("site.beacon"), &key[1..]).unwrap();
    site.refused_start().says(&["holds 31 bytes"]);
    fs::write(site.path("site.beacon"), key).unwrap();

    // The control: with the key in order it starts, and beacons go out or it is told why not.
    let node = site.start_deciding();
    let status = until("a beacon", || {
        let status = site.json(&["status"]);
        let beacon = &status["mesh"]["beacon"];
        (beacon["sent"].as_u64() > Some(1) || beacon["fault"].is_string()).then_some(status)
    });
    let metrics = over_unix(&site.path("s"), &request("GET", "/metrics", &[], b""));
    let (_, metrics) = metrics.unwrap();
    assert!(metrics.contains("tidelock_beacons_total{outcome=\"sent\"}"));
    assert!(metrics.contains("tidelock_beacon_dials_total{outcome=\"dialled\"} 0"));
    site.ok(&["status"]).says(&["beacon", "dials"]);
    let doctor = site.tidelock(&["doctor"]).says(&["beacon"]);
    drop(node);
    let told = [
        site.read("node.log"),
        status.to_string(),
        metrics,
        doctor.out,
        doctor.err,
    ]
    .join("\n");
    assert!(told.contains("beacon"), "the control");
    for form in ["b5b5b5b5", "B5B5B5B5", "181, 181", "tbW1tbW1"] {
        assert!(!told.contains(form), "{form} of the key is told");
    }
}

#[test]
fn a_root_that_others_may_write_is_refused() {
    let site = Site::new();
    drop(site.start());
    for mode in [0o770, 0o702] {
        chmod(&site.path("root"), mode);
        site.refused_start().says(&["root", "chmod"]);
    }
    chmod(&site.path("root"), 0o700);
    site.start();
}

#[test]
fn a_root_has_one_process_and_the_first_goes_on() {
    let site = Site::new();
    let node = site.start_deciding();
    // The second comes by another door and another port: only the root is the same.
    let other = site.config().replace("unix = \"s\"", "unix = \"s2\"");
    site.write("second.toml", &other);
    site.tidelock(&["run", "-c", "second.toml"])
        .ended(2)
        .says(&["root", "in use"]);
    assert!(!site.path("s2").exists(), "no door of the second is left");
    site.decides();
    site.ok(&["audit", "verify"]);
    assert!(node.stop().success());
    // The control: with the first gone, the second may.
    site.write("tidelock.toml", &site.config());
    site.start();
}

#[test]
fn a_root_serves_no_other_node_and_no_other_domain() {
    let site = Site::new();
    let node = site.start_deciding();
    let records = site.records().len();
    assert!(node.stop().success());
    let good = site.read("tidelock.toml");
    let before = site.json(&["segment", "ls"]);
    // A slip in the config must not cost the history: under another domain every segment looks
    // damaged, under another name the log begins anew.
    for (from, to) in [
        ("domain = \"harbour\"", "domain = \"harbor\""),
        ("id = \"a\"", "id = \"b\""),
    ] {
        site.configure(from, to);
        site.refused_start()
            .says(&["root", "a of domain harbour", "nothing was touched"]);
        site.write("tidelock.toml", &good);
        assert_eq!(site.json(&["segment", "ls"]), before);
    }
    let _node = site.start();
    assert!(site.records().len() > records);
    assert!(site.events("incarnation").len() <= 1);
    site.decides();
    site.ok(&["audit", "verify"]);
}

#[test]
fn a_mesh_port_that_is_taken_is_named_and_nothing_is_left_open() {
    let site = Site::new();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = taken.local_addr().unwrap();
    let config = site.read("tidelock.toml");
    let listen = config.lines().find(|l| l.starts_with("listen")).unwrap();
    site.configure(listen, &format!("listen = \"{address}\""));
    site.refused_start().says(&[&address.to_string()]);
    assert!(
        over_unix(&site.path("s"), &request("GET", "/healthz", &[], b"")).is_none(),
        "no door answers"
    );
    site.tidelock(&["doctor"])
        .ended(1)
        .says(&[&address.to_string()]);
    drop(taken);
    let _node = site.start();
    site.ok(&["audit", "verify"]);
}

#[test]
fn a_door_that_is_taken_is_named() {
    let site = Site::new();
    let taken = UnixListener::bind(site.path("s")).unwrap();
    site.refused_start()
        .says(&[&site.path("s").display().to_string()]);
    // A socket that nobody listens on any more is what a killed node leaves.
    drop(taken);
    assert!(site.path("s").exists());
    drop(site.start());

    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let door = format!("unix = \"s\"\ntcp = \"{address}\"\nallow_anonymous_loopback = true");
    site.configure("unix = \"s\"", &door);
    site.refused_start().says(&[&address.to_string()]);
    drop(tcp);
    let _node = site.start();
    until("the loosened setting to show", || {
        (site.status()["loosened"] == json!(["gateway.allow_anonymous_loopback"])).then_some(())
    });
}
