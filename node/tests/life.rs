//! A node's life: reload, drain, restart, and what a verifier sees of it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use common::{
    FailingSyncs, Site, chmod, free_udp, not_run, over_unix, read_action, request, until,
};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::Signal,
};
use serde_json::Value;

fn ceiling(site: &Site) -> Value {
    site.status()["disk"]["ceiling_bytes"].clone()
}

#[test]
fn a_reload_takes_all_of_the_new_or_none_of_it() {
    let site = Site::new();
    let node = site.start_deciding();
    let good = site.read("tidelock.toml");
    assert_eq!(ceiling(&site), 32 << 20);

    // Each is a config with a new ceiling and one fault; nothing of it may be taken.
    let bigger = good.replace("32MiB", "48MiB");
    let cases = [
        ("misspelt", bigger.replace("listen", "lisen"), "lisen"),
        ("no syntax", format!("{bigger}\n[node\n"), "syntax"),
        (
            "another root",
            bigger.replace("\"root\"", "\"root2\""),
            "node.root",
        ),
        (
            "another id",
            bigger.replace("id = \"a\"", "id = \"b\""),
            "node.id",
        ),
        (
            "another age of segments",
            bigger.replace("custody = 0", "custody = 0\nsegment_max_age_s = 7"),
            "audit.segment_max_age_s",
        ),
        (
            "no key",
            bigger.replace("a.key", "nowhere.key"),
            "nowhere.key",
        ),
        (
            "no CA",
            bigger.replace("ca/ca.crt", "nowhere.crt"),
            "nowhere.crt",
        ),
        (
            "no trust",
            bigger.replace("trust.toml", "nowhere.toml"),
            "nowhere.toml",
        ),
    ];
    for (what, text, word) in cases {
        site.write("tidelock.toml", &text);
        let why = node.reload("reload_refused");
        assert!(why["why"].as_str().unwrap().contains(word), "{what}: {why}");
        // The command line reads the file too, so the file is mended before the node is asked.
        site.write("tidelock.toml", &good);
        assert_eq!(ceiling(&site), 32 << 20, "{what}");
        site.decides();
        site.transport_open();
    }
    fs::remove_file(site.path("tidelock.toml")).unwrap();
    node.signal(Signal::HUP);
    until("the refusal in the node's log", || {
        let log = site.read("node.log");
        log.contains("reload_refused").then_some(())?;
        log.contains("cannot read").then_some(())
    });

    site.write("tidelock.toml", &bigger);
    node.reload("reloaded");
    assert_eq!(ceiling(&site), 48 << 20);
    site.decides();
    // Sizes that follow from the ceiling do not hinder it, up or down.
    for mebibytes in [512, 24] {
        site.write(
            "tidelock.toml",
            &good.replace("32MiB", &format!("{mebibytes}MiB")),
        );
        node.reload("reloaded");
        assert_eq!(ceiling(&site), mebibytes << 20);
        site.decides();
    }
    assert!(node.stop().success());
}

/// A reload was made in the loop of ticks: while it waited no wait of a caller was ended and nothing was sealed.
#[test]
fn ticks_go_on_while_a_reload_waits() {
    let site = Site::new();
    site.configure("custody = 0", "custody = 0\nsegment_max_age_s = 1");
    let node = site.start_deciding();
    let journal = |word: &str| {
        let entries = site.operate("journal")["entries"].clone();
        let entries = entries.as_array().unwrap().iter();
        entries.filter(|entry| entry["event"] == word).count()
    };
    let sealed = || {
        let segments = fs::read_dir(site.path("root/segments/audit")).unwrap();
        segments.count()
    };
    // Whoever reads the config waits for what is written into the pipe.
    let good = site.read("tidelock.toml");
    let config = site.path("tidelock.toml");
    fs::remove_file(&config).unwrap();
    mknodat(CWD, &config, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    node.signal(Signal::HUP);
    let opening = std::thread::spawn({
        let config = config.clone();
        move || fs::File::options().write(true).open(config).unwrap()
    });
    until("the reload to read its config", || {
        opening.is_finished().then_some(())
    });
    let mut pipe = opening.join().unwrap();
    // Twice: a tick may have been under way when it began.
    for file in ["a", "b"] {
        let before = sealed();
        let action = read_action(&format!("/srv/{file}")).to_string();
        let ask = request("POST", "/v1/decide", &[], action.as_bytes());
        until("a decision", || {
            let (status, _) = over_unix(&site.path("s"), &ask)?;
            (status == 200).then_some(())
        });
        until("a segment that is sealed for its age", || {
            (sealed() > before).then_some(())
        });
    }
    assert_eq!(journal("reloaded"), 0, "it waits all along");
    // A hang-up that comes meanwhile is answered by a reload of its own, from the file that lies there then.
    fs::remove_file(&config).unwrap();
    site.write("tidelock.toml", &good);
    node.signal(Signal::HUP);
    // The control: the first ends with what it was waiting for.
    pipe.write_all(good.as_bytes()).unwrap();
    drop(pipe);
    until("both reloads", || (journal("reloaded") == 2).then_some(()));
    assert_eq!(journal("reload_refused"), 0);
    assert!(node.stop().success());
}

#[test]
fn sigterm_under_load_loses_no_acknowledged_decision() {
    for signal in [Signal::TERM, Signal::INT] {
        let site = Site::new();
        let node = site.start_deciding();
        let body = read_action("/srv/a.txt").to_string();
        let ask = request("POST", "/v1/decide", &[], body.as_bytes());
        let (socket, stop, count) = (site.path("s"), AtomicBool::new(false), AtomicUsize::new(0));
        let (acknowledged, status) = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut mine = Vec::new();
                        while !stop.load(Ordering::Relaxed) {
                            // Refused or cut off: not acknowledged.
                            let Some((200, answer)) = over_unix(&socket, &ask) else {
                                continue;
                            };
                            mine.push(serde_json::from_str::<Value>(&answer).unwrap());
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                        mine
                    })
                })
                .collect();
            until("load", || {
                (count.load(Ordering::Relaxed) > 200).then_some(())
            });
            let status = node.end(signal);
            stop.store(true, Ordering::Relaxed);
            let all: Vec<Value> = callers
                .into_iter()
                .flat_map(|c| c.join().unwrap())
                .collect();
            (all, status)
        });
        assert!(status.success(), "{status}");
        assert!(!socket.exists(), "the door is closed behind it");
        site.ok(&["audit", "verify"]);

        let _node = site.start();
        let held: BTreeMap<u64, Value> = site
            .records()
            .into_iter()
            .map(|r| (r["index"].as_u64().unwrap(), r))
            .collect();
        assert!(acknowledged.len() > 200);
        for answer in &acknowledged {
            let record = &held[&answer["record"]["index"].as_u64().unwrap()];
            assert_eq!(record["leaf"], answer["record"]["leaf"]);
            assert_eq!(record["record"]["action_hash"], answer["action_hash"]);
        }
        assert!(
            site.events("recovered").is_empty(),
            "an orderly end leaves no torn tail"
        );
        assert_eq!(site.events("stopped").len(), 1);
        site.decides();
    }
}

#[test]
fn a_log_shut_by_a_disk_fault_serves_again_after_audit_reopen_and_no_restart() {
    let site = Site::new();
    let node = site.start_deciding();
    let allowed = || -> Value {
        let action = read_action("/srv/a.txt").to_string();
        let answer = site.decide(action.as_bytes()).json();
        assert_eq!(answer["decision"], "allow", "{answer}");
        answer["record"].clone()
    };
    let unavailable = || {
        let (decision, reason) = site.may_read("/srv/a.txt");
        assert_eq!((&*decision, &*reason), ("deny", "AUDIT_UNAVAILABLE"));
    };
    let ready = || over_unix(&site.path("s"), &request("GET", "/readyz", &[], b"")).unwrap();
    let mut acknowledged: Vec<Value> = (0..5).map(|_| allowed()).collect();
    assert_eq!(ready().0, 200);

    let failing = match FailingSyncs::of(&node) {
        Ok(failing) => failing,
        Err(why) => {
            let test = "a_log_shut_by_a_disk_fault_serves_again_after_audit_reopen_and_no_restart";
            return not_run(test, why.trim());
        }
    };
    unavailable();
    let state = site.status()["audit"]["state"].clone();
    assert!(state.as_str().unwrap().starts_with("latched"), "{state}");
    let (status, why) = ready();
    assert_eq!(status, 503);
    assert!(why.contains("tidelock audit reopen"), "{why}");
    // While the disk refuses, it stays shut, whoever asks.
    site.tidelock(&["audit", "reopen", "--apply"])
        .ended(1)
        .says(&["AUDIT_UNAVAILABLE"]);
    unavailable();
    failing.end();
    // That the disk is sound again is for the operator to say, and a plan says nothing yet.
    unavailable();
    site.ok(&["audit", "reopen"]).says(&["plan", "was_shut"]);
    unavailable();

    let pid = node.pid();
    site.ok(&["audit", "reopen", "--apply"]).says(&["done"]);
    acknowledged.extend((0..5).map(|_| allowed()));
    site.decides();
    assert_eq!(ready().0, 200);
    assert_eq!(site.status()["audit"]["state"], "open");
    assert_eq!(node.pid(), pid, "the same process");
    assert!(!site.events("reopened").is_empty(), "it is recorded");
    let all_there = || {
        let held: BTreeMap<u64, Value> = (site.records().into_iter())
            .map(|r| (r["index"].as_u64().unwrap(), r["leaf"].clone()))
            .collect();
        for record in &acknowledged {
            assert_eq!(held[&record["index"].as_u64().unwrap()], record["leaf"]);
        }
        site.ok(&["audit", "verify"]).says(&["good"]);
    };
    all_there();
    assert!(node.stop().success());
    let _node = site.start();
    all_there();
    site.decides();
}

#[test]
fn a_node_at_rest_ends_without_waiting_for_its_deadline() {
    let site = Site::new();
    let node = site.start();
    assert!(node.stop().success());
    let log = site.read("node.log");
    assert!(log.contains("draining") && log.contains("stopped"), "{log}");
    assert!(!log.contains("cut off at the deadline"), "{log}");
}

fn sealed_segment(site: &Site) -> PathBuf {
    let id = site.operate("audit.seal")["sealed"]
        .as_str()
        .unwrap()
        .to_owned();
    let name = format!("{}.seg", id.strip_prefix("blake3:").unwrap());
    site.path("root/segments/audit").join(name)
}

#[test]
fn audit_verify_sees_one_flipped_byte_of_a_sealed_segment() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    let path = sealed_segment(&site);
    site.decides();
    site.ok(&["audit", "verify"]).says(&["good"]);
    assert!(node.stop().success());
    let report = site.json(&["audit", "verify"]);
    assert_eq!(report["ok"], true, "{report}");
    assert_eq!(
        site.json(&["segment", "verify"])["damaged"],
        serde_json::json!([])
    );

    let good = fs::read(&path).unwrap();
    for at in [0, 20, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        fs::write(&path, &bad).unwrap();
        let text = site
            .tidelock(&["audit", "verify"])
            .ended(1)
            .says(&["FAULT"]);
        assert!(!text.err.contains("panicked"), "{text:?}");
        let report = site
            .tidelock(&["audit", "verify", "--json"])
            .ended(1)
            .json();
        assert_eq!(report["ok"], false, "byte {at}");
        let damaged = site
            .tidelock(&["segment", "verify", "--json"])
            .ended(1)
            .json();
        let file = damaged["damaged"][0]["file"].as_str().unwrap();
        assert_eq!(file, path.display().to_string());
        site.tidelock(&["segment", "verify"])
            .ended(1)
            .says(&["DAMAGED", file]);
    }
    fs::remove_file(&path).unwrap();
    site.tidelock(&["audit", "verify"]).ended(1);

    fs::write(&path, &good).unwrap();
    site.ok(&["audit", "verify"]);
    // A byte of the active file, in a record that is durable.
    let active: Vec<PathBuf> = fs::read_dir(site.path("root/log"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| fs::read(p).is_ok_and(|b| b.windows(12).any(|w| w == b"POLICY_ALLOW")))
        .collect();
    let mut bytes = fs::read(&active[0]).unwrap();
    let at = bytes
        .windows(12)
        .position(|w| w == b"POLICY_ALLOW")
        .unwrap();
    bytes[at] ^= 1;
    fs::write(&active[0], &bytes).unwrap();
    site.tidelock(&["audit", "verify"])
        .ended(1)
        .says(&["FAULT"]);
    bytes[at] ^= 1;
    fs::write(&active[0], &bytes).unwrap();
    site.ok(&["audit", "verify"]);
    let _node = site.start();
    site.decides();
}

#[test]
fn a_killed_node_starts_again_and_loses_nothing() {
    let site = Site::new();
    let node = site.start_deciding();
    let answer = site
        .decide(read_action("/srv/a.txt").to_string().as_bytes())
        .json();
    drop(node); // SIGKILL
    let _node = site.start();
    let held = site.records();
    let record = held
        .iter()
        .find(|r| r["index"] == answer["record"]["index"])
        .unwrap();
    assert_eq!(record["leaf"], answer["record"]["leaf"]);
    assert!(site.events("stopped").is_empty());
    site.decides();
    site.ok(&["audit", "verify"]);
}

#[test]
fn a_quota_that_cannot_be_kept_is_told_and_the_old_one_holds() {
    let site = Site::new();
    let peer = format!(
        "\n[[mesh.peers]]\nid = \"b\"\naddress = \"{}\"\n",
        free_udp()
    );
    site.write("tidelock.toml", &format!("{}{peer}", site.config()));
    let _node = site.start();
    let own = || site.status()["mesh"]["own_quotas"].clone();
    let change = [
        "peers",
        "quota",
        "b",
        "--requests-per-second",
        "77",
        "--apply",
    ];

    // Where its file lies there is a directory: nothing replaces that.
    let in_the_way = site.path("root/state/quotas");
    fs::create_dir_all(&in_the_way).unwrap();
    chmod(&in_the_way, 0o700);
    site.tidelock(&change).ended(1).says(&["STATE_NOT_WRITTEN"]);
    assert_eq!(own(), serde_json::json!([]));
    assert_eq!(site.events("peer_quota_set").len(), 1);
    let not_set = site.events("peer_quota_not_set");
    assert_eq!(not_set.len(), 1, "{not_set:?}");
    assert_eq!(not_set[0]["code"], "STATE_NOT_WRITTEN");
    assert_eq!(not_set[0]["peer"], "b");

    // The control.
    fs::remove_dir(&in_the_way).unwrap();
    site.ok(&change);
    assert_eq!(own(), serde_json::json!(["b"]));
    assert_eq!(site.events("peer_quota_set").len(), 2);
    assert_eq!(site.events("peer_quota_not_set").len(), 1);
    assert!(in_the_way.is_file());
}

#[test]
fn damage_that_a_start_finds_is_recorded() {
    let site = Site::new();
    assert!(site.start_deciding().stop().success());
    assert!(site.start().stop().success());
    let policy = fs::read_dir(site.path("root/segments/policy")).unwrap();
    let stored = policy.map(|e| e.unwrap().path()).next().unwrap();
    let mut bytes = fs::read(&stored).unwrap();
    bytes[0] ^= 1;
    fs::write(&stored, bytes).unwrap();
    let _node = site.start();
    // One, of the start that found it: the two before it found nothing.
    let found = site.events("files_quarantined");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["count"], 1);
    let file = found[0]["files"][0].as_str().unwrap();
    assert!(site.path("root").join(file).is_file(), "{file}");
    let (_, metrics) = over_unix(&site.path("s"), &request("GET", "/metrics", &[], b"")).unwrap();
    assert!(
        metrics.contains("\ntidelock_segments_damaged 1\n"),
        "{metrics}"
    );
    site.decides();
}

/// A file system of its own below the site; gone with the test.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: PathBuf, mib: u32) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let mounted = std::process::Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={mib}m,mode=700"),
                "tmpfs",
            ])
            .arg(&path)
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a node that a failed test leaves behind still has it open.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

/// INV-01, INV-14: where the disk is full and not only the ceiling, callers that ask all at once get allows
/// with a record and denials, and nothing else; and the node goes on when there is room again.
#[test]
fn on_a_full_disk_every_allow_has_its_record_and_the_rest_are_denials() {
    const CALLERS: usize = 4;
    let site = Site::new();
    let Some(disk) = Mounted::new(site.path("disk"), 40) else {
        not_run(
            "on_a_full_disk_every_allow_has_its_record_and_the_rest_are_denials",
            "mounting a file system needs root",
        );
        return;
    };
    site.configure("root = \"root\"", "root = \"disk/root\"");
    let node = site.start_deciding();
    site.decides();
    // Others have filled the disk.
    let filler = disk.0.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    for length in [1 << 20, 4_096] {
        let block = vec![7; length];
        while file.write_all(&block).is_ok() {}
    }
    let mut action = read_action("/srv/a.txt");
    action["params"] = serde_json::json!({"note": "n".repeat(6_000)});
    let body = action.to_string();
    let ask = || -> Value {
        let request = request("POST", "/v1/decide", &[], body.as_bytes());
        let (_, text) = over_unix(&site.path("s"), &request).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                scope.spawn(|| {
                    let mut answers = Vec::new();
                    let mut denied = 0;
                    while denied < 25 && answers.len() < 20_000 {
                        let answer = ask();
                        denied += usize::from(answer["decision"] == "deny");
                        answers.push(answer);
                    }
                    answers
                })
            })
            .collect();
        let each = callers.into_iter().map(|caller| caller.join().unwrap());
        each.flatten().collect()
    });
    let reason = |answer: &Value| answer["reason"].as_str().unwrap().to_owned();
    let (allowed, denied): (Vec<_>, Vec<_>) =
        answers.iter().partition(|a| a["decision"] == "allow");
    assert!(denied.len() >= 25 * CALLERS, "{}", denied.len());
    for answer in &denied {
        let reason = reason(answer);
        assert!(
            ["AUDIT_UNAVAILABLE", "AUDIT_CAPACITY"].contains(&reason.as_str()),
            "{answer}"
        );
    }
    // There is room again.
    drop(file);
    fs::remove_file(&filler).unwrap();
    until("the node to serve again", || {
        site.tidelock(&["audit", "reopen", "--apply"]);
        (ask()["decision"] == "allow").then_some(())
    });
    let leaves: std::collections::BTreeSet<String> = site
        .records()
        .iter()
        .map(|record| record["leaf"].as_str().unwrap().to_owned())
        .collect();
    for answer in &allowed {
        let leaf = answer["record"]["leaf"].as_str().unwrap();
        assert!(leaves.contains(leaf), "{answer}");
    }
    assert!(
        !allowed.is_empty(),
        "some fitted into what was made ready before"
    );
    assert!(node.stop().success());
    site.ok(&["audit", "verify"]);
}
