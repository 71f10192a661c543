//! What the commands print: text that a person can use, and with `--json` one document.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::fs;

use common::{Site, free_udp};
use serde_json::{Value, json};

#[test]
fn status_peers_doctor_and_segments_speak_to_people_and_machines() {
    let site = Site::new();
    let peer = free_udp();
    let config = site.read("tidelock.toml");
    let peers = format!(
        "{config}\n[[mesh.peers]]\nid = \"b\"\naddress = \"{peer}\"\ncongestion = \"edge\"\n"
    );
    site.write("tidelock.toml", &peers);

    // Before there is a node, the doctor looks at files and the address.
    site.ok(&["doctor"])
        .says(&["no node answers", "can be bound", "0 of"])
        .says(&["congestion control cubic (edge to b); no cap"]);
    let node = site.start();
    site.tidelock(&["doctor"])
        .ended(1)
        .says(&["bundle install"]);
    site.ok(&["status"]).says(&["NO_POLICY"]);
    site.ok(&["bundle", "install", "site-1.tar", "--apply"]);
    site.decides();
    site.operate("audit.seal");

    site.ok(&["status"])
        .says(&["a of domain harbour", "normal", "site epoch 1", "open", "b"]);
    let status = site.json(&["status"]);
    assert_eq!(status["node"], "a");
    assert_eq!(status["posture"], "normal");
    assert_eq!(status["bundle"]["name"], "site");
    assert_eq!(status["mesh"]["peers"][0]["id"], "b");
    let socket = common::over_unix(
        &site.path("s"),
        &common::request("GET", "/v1/status", &[], b""),
    );
    let socket: Value = serde_json::from_str(&socket.unwrap().1).unwrap();
    assert_eq!(
        socket["bundle"], status["bundle"],
        "one document, whoever asks"
    );

    site.ok(&["peers"])
        .says(&["b", "not connected", &peer.to_string()]);
    let listed = site.json(&["peers"]);
    assert_eq!(listed[0]["address"], peer.to_string());
    assert_eq!(listed[0]["state"], "not connected");

    let doctor = site.json(&["doctor"]);
    assert_eq!(doctor["ok"], true, "{doctor}");
    for what in [
        "config",
        "identity",
        "revocation",
        "policy",
        "mesh",
        "node",
        "disk",
        "audit",
    ] {
        let found = doctor["findings"].as_array().unwrap();
        assert!(found.iter().any(|f| f["what"] == what), "{what}: {doctor}");
    }
    site.ok(&["doctor"])
        .says(&["days left", "mesh is finite", "the transport is open"]);

    let list = site.json(&["segment", "ls"])["segments"].clone();
    let kinds: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["revocation", "policy", "audit"], "urgent first");
    site.ok(&["segment", "ls"])
        .says(&["policy/site", "crl/", "audit/a/"]);
    let only = site.json(&["segment", "ls", "--kind", "audit"]);
    assert_eq!(only["segments"].as_array().unwrap().len(), 1);
    site.tidelock(&["segment", "ls", "--kind", "gossip"])
        .ended(2)
        .says(&["gossip"]);
    let id = only["segments"][0]["id"].as_str().unwrap();
    let shown = site.json(&["segment", "show", id, "--records"]);
    assert_eq!(shown["id"], id);
    assert_eq!(shown["signed"], true);
    let records = shown["records"].as_array().unwrap();
    assert!(
        records
            .iter()
            .any(|r| r["record"]["reason"] == "POLICY_ALLOW"),
        "{shown}"
    );
    site.ok(&["segment", "show", id, "--records"])
        .says(&["POLICY_ALLOW"]);
    let other = format!("blake3:{}", "0".repeat(64));
    site.tidelock(&["segment", "show", &other])
        .ended(1)
        .says(&["not held"]);
    site.tidelock(&["segment", "show", "0000"]).ended(2);
    site.ok(&["segment", "verify"])
        .says(&["3 segments, 0 damaged"]);
    let verified = site.json(&["segment", "verify"]);
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["segments"], 3);
    assert_eq!(verified["damaged"], json!([]));

    // The log in words: what was asked, and what came of it.
    site.decides();
    let tail = site.ok(&["audit", "tail", "-n", "2"]);
    assert_eq!(tail.out.lines().count(), 2, "{tail:?}");
    tail.says(&[
        "fs.read",
        "/srv/a.txt",
        "/etc/shadow",
        "allow",
        "deny",
        "NO_MATCH",
    ]);
    assert_eq!(
        site.json(&["audit", "tail", "-n", "2"])["records"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    let verified = site.json(&["audit", "verify"]);
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["endorsements"]["good"], 1);

    // What reads files works on a stopped node too.
    assert!(node.stop().success());
    site.ok(&["segment", "ls"]);
    site.ok(&["segment", "verify"]);
    site.ok(&["audit", "verify"]);
    site.ok(&["doctor"]);
}

#[test]
fn ca_bundle_and_token_speak_to_people_and_machines() {
    let site = Site::new();
    site.ok(&["ca", "list", "--dir", "ca"])
        .says(&["a", "valid"]);
    assert_eq!(
        site.json(&["ca", "list", "--dir", "ca"])["domain"],
        "harbour"
    );
    let again = ["ca", "init", "--dir", "ca", "--domain", "harbour"];
    let before = site.read("ca/ca.key");
    site.tidelock(&again).ended(2).says(&["already"]);
    assert_eq!(site.read("ca/ca.key"), before);
    site.tidelock(&["ca", "issue", "--dir", "ca", "--node", "../x"])
        .ended(2);
    site.tidelock(&["ca", "renew", "--dir", "ca", "--node", "nobody"])
        .ended(2)
        .says(&["ca issue"]);
    for command in ["issue", "renew"] {
        let none = ["ca", command, "--dir", "ca", "--node", "a", "--days", "0"];
        site.tidelock(&none).ended(2).says(&["--days"]);
    }

    site.ok(&["bundle", "test", "site-1.tar"])
        .says(&["passed, 0 failed"]);
    assert_eq!(
        site.json(&["bundle", "test", "site-1.tar"])["failures"],
        json!([])
    );
    site.ok(&["bundle", "inspect", "site-1.tar"])
        .says(&["site epoch 1", "policies/base.cedar"]);
    assert_eq!(
        site.json(&["bundle", "inspect", "site-1.tar"])["manifest"]["epoch"],
        1
    );
    let verify = ["bundle", "verify", "site-1.tar", "--trust", "trust.toml"];
    site.ok(&verify).says(&["harbour-master"]);
    assert_eq!(site.json(&verify)["ok"], true);
    // What the other tools sign, the node believes; what a stranger signs, it does not.
    common::openssl(
        &site.path(""),
        &[
            "dgst",
            "-sha256",
            "-sign",
            "policy.key",
            "-out",
            "site-1.tar.sig",
            "site-1.tar",
        ],
    );
    site.ok(&verify);
    site.signing_key("stranger.key");
    site.ok(&["bundle", "sign", "site-1.tar", "--key", "stranger.key"]);
    site.tidelock(&verify).ended(1).says(&["BUNDLE_SIGNATURE"]);
    let init = [
        "bundle", "new", "policy", "--name", "x", "--domain", "harbour",
    ];
    site.tidelock(&init)
        .ended(2)
        .says(&["exists already", "nothing was written"]);

    site.ok(&["token", "new", "--principal", "Agent::ops-1"])
        .says(&["tidelock_", "sha256:", "shown once"]);
    let (one, two) = (
        site.json(&["token", "new", "--principal", "Agent::ops-1", "--act-as"]),
        site.json(&["token", "new", "--principal", "Agent::ops-1"]),
    );
    assert_ne!(one["token"], two["token"]);
    assert!(one["entry"].as_str().unwrap().contains("act_as"));
    assert!(!two["entry"].as_str().unwrap().contains("act_as"));
    // It ends, unless that is not wanted.
    let end = format!("expires_at = {}", one["expires_at"]);
    assert!(one["entry"].as_str().unwrap().contains(&end), "{one}");
    let endless = site.json(&["token", "new", "--principal", "Agent::a", "--no-expiry"]);
    assert_eq!(endless["expires_at"], Value::Null);
    assert!(!endless["entry"].as_str().unwrap().contains("expires_at"));
    site.tidelock(&["token", "new", "--principal", "Agent::a", "--days", "0"])
        .ended(2)
        .says(&["--days"]);
    for bad in ["ops-1", "::x", "Agent::", "9 x::y", "Agent::a\nb"] {
        site.tidelock(&["token", "new", "--principal", bad])
            .ended(2)
            .says(&["--principal"]);
    }
}

/// An OPA bundle of one file, `opa.tar.gz`.
fn pack(site: &Site, rules: &str) {
    fs::create_dir_all(site.path("opa")).unwrap();
    site.write("opa/authz.rego", rules);
    let packed = std::process::Command::new("tar")
        .args(["-C", "opa", "-czf", "opa.tar.gz", "authz.rego"])
        .current_dir(site.path(""))
        .status();
    assert!(packed.unwrap().success());
}

#[test]
fn an_opa_bundle_is_taken_over_with_a_report() {
    let site = Site::new();
    let import = [
        "bundle",
        "import-opa",
        "opa.tar.gz",
        "--dir",
        "taken",
        "--name",
        "authz",
        "--domain",
        "harbour",
        "--action",
        "fs.read",
        "--allow-rule",
        "data.authz.allow",
    ];
    let unsigned = [&import[..], &["--allow-unsigned"]].concat();
    pack(&site, "package authz\n\nallow if time.now_ns() > 1\n");
    site.tidelock(&import).ended(2).says(&["--allow-unsigned"]);
    site.tidelock(&unsigned)
        .ended(1)
        .says(&["time.now_ns", "authz.rego", "nothing was written"]);
    assert!(!site.path("taken").exists());

    pack(
        &site,
        "package authz\n\nallow if input.action == \"fs.read\"\n",
    );
    let said = site.json(&unsigned);
    assert_eq!(said["ready"], true);
    assert_eq!(said["report"]["signed_by"], Value::Null);
    site.tidelock(&unsigned).ended(2).says(&["exists already"]);
    site.ok(&["bundle", "build", "taken", "--out", "authz-1.tar"]);
    site.ok(&["bundle", "test", "authz-1.tar"]);
    site.ok(&["bundle", "inspect", "authz-1.tar"])
        .says(&["policies/p-authz.rego", "input-schema.json"]);
}

/// OPA takes an old bundle for ever, since nothing that is signed says which of two is newer. Taken over it
/// has an epoch, and the old one does not come back.
#[test]
fn an_old_opa_bundle_does_not_come_back() {
    let site = Site::new();
    let _node = site.start();
    let offer = |rules: &str, epoch: u64| {
        if site.path("taken").exists() {
            fs::remove_dir_all(site.path("taken")).unwrap();
        }
        pack(&site, rules);
        site.ok(&[
            "bundle",
            "import-opa",
            "opa.tar.gz",
            "--allow-unsigned",
            "--dir",
            "taken",
            "--name",
            "site",
            "--domain",
            "harbour",
            "--action",
            "fs.read",
            "--allow-rule",
            "data.authz.allow",
        ]);
        let mut manifest: Value = serde_json::from_str(&site.read("taken/manifest.json")).unwrap();
        manifest["epoch"] = json!(epoch);
        site.write("taken/manifest.json", &manifest.to_string());
        site.ok(&["bundle", "build", "taken", "--out", "taken.tar"]);
        site.ok(&["bundle", "sign", "taken.tar", "--key", "policy.key"]);
        site.tidelock(&["bundle", "install", "taken.tar", "--apply"])
    };
    let old = "package authz\n\ndefault allow := false\n\nallow if input.action == \"fs.read\"\n";
    let new =
        "package authz\n\ndefault allow := false\n\nallow if input.resource.id == \"/srv/a.txt\"\n";
    offer(old, 1).ended(0).says(&["nothing stands behind it"]);
    assert_eq!(site.may_read("/etc/shadow").0, "allow");
    offer(new, 2)
        .ended(0)
        .says(&["to undo it: tidelock policy rollback --plan"]);
    let recorded = site.events("bundle_activated").pop().unwrap();
    let undo = recorded["undo"].as_str().unwrap();
    assert!(
        undo.starts_with("tidelock policy rollback --plan"),
        "{undo}"
    );
    site.decides();
    offer(old, 1).ended(1).says(&["BUNDLE_EPOCH"]);
    site.decides();
    // The control: its rules come back under a newer epoch, and only so.
    offer(old, 3).ended(0);
    assert_eq!(site.may_read("/etc/shadow").0, "allow");
}

#[test]
fn completions_and_manual_pages_are_made() {
    let site = Site::new();
    for shell in ["bash", "zsh", "fish"] {
        site.ok(&["completions", shell])
            .says(&["tidelock", "decide", "doctor"]);
    }
    site.tidelock(&["completions", "cmd.exe"]).ended(2);

    assert_eq!(site.json(&["man", "--dir", "man"])["dir"], "man");
    site.ok(&["man", "--dir", "man"]).says(&["man"]);
    let page = fs::read_to_string(site.path("man/tidelock.1")).unwrap();
    assert!(page.contains(".TH tidelock 1"), "{page}");
    for command in [
        "run",
        "decide",
        "doctor",
        "ca-revoke",
        "bundle-install",
        "audit-verify",
        "audit-stat",
        "segment-fsck",
        "segment-repair",
        "journal",
    ] {
        assert!(
            site.path(&format!("man/tidelock-{command}.1")).exists(),
            "{command}"
        );
    }
    site.write("file", "");
    site.tidelock(&["man", "--dir", "file"])
        .ended(2)
        .says(&["file"]);

    // Usage mistakes name what is wrong, and nothing is done.
    site.tidelock(&[]).ended(2).says(&["Usage"]);
    site.tidelock(&["decdie"]).ended(2).says(&["decide"]);
    site.ok(&["--help"]).says(&["Exit codes"]);
    site.ok(&["--version"]).says(&["tidelock 0."]);
}
