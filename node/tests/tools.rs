//! The tools that read and repair a root from outside: on a running and on a stopped node.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{Site, chmod};
use serde_json::{Value, json};

/// The codes of the findings of a check that ended with `code`.
#[track_caller]
fn fsck(site: &Site, code: i32) -> Vec<String> {
    findings(
        &site
            .tidelock(&["segment", "fsck", "--json"])
            .ended(code)
            .json(),
    )
    .iter()
    .filter(|f| f["severity"] != "note")
    .map(|f| f["code"].as_str().unwrap().to_owned())
    .collect()
}

fn findings(report: &Value) -> Vec<Value> {
    report["findings"].as_array().unwrap().clone()
}

/// Every file below the root with its length: what a command may not change.
fn tree(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(tree(&path));
        } else if path.is_file() {
            all.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

/// Seals what was recorded; the path of the segment.
fn seal(site: &Site) -> PathBuf {
    let id = site.json(&["audit", "seal", "--apply"])["sealed"]
        .as_str()
        .unwrap()
        .to_owned();
    let name = format!("{}.seg", id.strip_prefix("blake3:").unwrap());
    site.path("root/segments/audit").join(name)
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, &bytes).unwrap();
}

fn id_of(path: &Path) -> String {
    format!("blake3:{}", path.file_stem().unwrap().to_str().unwrap())
}

#[test]
fn every_reading_command_answers_on_a_running_and_on_a_stopped_node() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    site.tidelock(&["audit", "seal"]).ended(0).says(&["plan"]);
    let path = seal(&site);
    let id = id_of(&path);
    site.decides();
    let read_all = |running: bool| {
        let list = site.json(&["segment", "ls"]);
        let list = list["segments"].as_array().unwrap().clone();
        assert!(list.len() >= 3, "{list:?}");
        let sealed = list.iter().find(|s| s["id"] == id.as_str()).unwrap();
        assert_eq!(
            (&sealed["compressed"], &sealed["encrypted"]),
            (&json!(true), &json!(false))
        );
        assert!(sealed["raw_bytes"].as_u64().unwrap() > 1_000);
        assert_eq!(sealed["bytes"], fs::metadata(&path).unwrap().len());
        assert!(sealed["record_count"].as_u64().unwrap() > 2);
        assert_eq!(sealed["custodians"], json!([]));
        let origin = sealed["origin"].as_str().unwrap();
        let of = |args: &[&str]| {
            let args = [&["segment", "ls"], args].concat();
            site.json(&args)["segments"].as_array().unwrap().len()
        };
        let audit = of(&["--kind", "audit"]);
        assert_eq!(of(&["--origin", origin]), audit);
        assert_eq!(of(&["--origin", origin, "--to", "0"]), 1);
        assert_eq!(of(&["--origin", origin, "--from", "99"]), 0);
        assert_eq!(of(&["--limit", "2"]), 2);
        site.ok(&["segment", "ls"]).says(&["origin", &id, "crl/"]);

        let shown = site.json(&["segment", "show", &id]);
        assert_eq!(shown["endorsement"]["node"], "a");
        assert_eq!(shown["endorsement"]["incarnation"], 1);
        assert!(
            shown["checkpoint"]
                .as_str()
                .unwrap()
                .starts_with("tidelock/harbour/a/"),
            "{shown}"
        );
        assert!(shown["records"].is_null(), "only when asked for");
        let records = site.json(&["segment", "show", &id, "--records"])["records"].clone();
        assert_eq!(
            records.as_array().unwrap().len() as u64,
            sealed["record_count"]
        );
        site.ok(&["segment", "show", &id, "--records"])
            .says(&["POLICY_ALLOW", "subject"]);

        let verified = site.json(&["segment", "verify"]);
        assert_eq!(verified["segments"].as_u64().unwrap(), list.len() as u64);
        let one = site.json(&["segment", "verify", &id]);
        assert_eq!((&one["segments"], &one["ok"]), (&json!(1), &json!(true)));
        assert_eq!(one["records"], sealed["record_count"]);
        site.ok(&["segment", "verify"]).says(&["0 damaged", "/s"]);

        let report = site.json(&["segment", "fsck"]);
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(report["in_use"], running);
        assert_eq!(report["usage"]["ceiling_bytes"], 32 << 20);
        assert!(report["areas"]["log"]["allocated_bytes"].as_u64().unwrap() > 0);
        assert_eq!(fsck(&site, 0), [""; 0], "{report}");
        site.ok(&["segment", "fsck"])
            .says(&["allocated bytes", "0 damaged", "ladder"]);

        site.ok(&["audit", "verify"]).says(&["good", "records"]);
        let own = site.json(&["audit", "verify", "--origin", origin]);
        assert_eq!(own["origins"].as_array().unwrap().len(), 1);
        let strange = "audit/b/0123456789abcdef/1";
        site.tidelock(&["audit", "verify", "--origin", strange])
            .ended(1)
            .says(&["nothing is held"]);

        let all = site.json(&["audit", "tail", "--all"])["records"].clone();
        let all = all.as_array().unwrap().clone();
        for (n, record) in all.iter().enumerate() {
            assert_eq!(record["index"], n);
        }
        assert_eq!(own["records"].as_u64().unwrap(), all.len() as u64);
        let three = site.json(&["audit", "tail", "-n", "3"])["records"].clone();
        assert_eq!(three.as_array().unwrap()[..], all[all.len() - 3..]);
        assert_eq!(
            site.ok(&["audit", "tail", "-n", "3"]).out.lines().count(),
            3
        );

        let stat = site.json(&["audit", "stat"]);
        let log = &stat["logs"][origin];
        assert_eq!(log["current"], true, "{stat}");
        assert_eq!(
            log["sealed_records"].as_u64().unwrap() + log["unsealed_records"].as_u64().unwrap(),
            all.len() as u64
        );
        assert_eq!(
            log["unreplicated_records"].as_u64().unwrap(),
            all.len() as u64
        );
        assert!(log["oldest_unreplicated_age_s"].is_u64());
        assert_eq!(stat["disk"]["ladder"], "normal");
        site.ok(&["audit", "stat"]).says(&["(own)", "ladder"]);
        all
    };
    let running = read_all(true);
    let journal = site.json(&["journal"])["entries"].clone();
    assert!(
        journal
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["event"] == "started")
    );
    let last = journal.as_array().unwrap().last().unwrap()["line"].to_string();
    assert_eq!(
        site.json(&["journal", "--since", &last])["entries"],
        json!([])
    );
    site.ok(&["journal"]).says(&["started"]);
    assert!(node.stop().success());

    let before = tree(&site.path("root"));
    let stopped = read_all(false);
    assert_eq!(before, tree(&site.path("root")), "reading changes nothing");
    assert_eq!(running[..], stopped[..running.len()]);
    assert_eq!(stopped.last().unwrap()["record"]["type"], "stopped");
    site.tidelock(&["journal"]).ended(2);
    site.tidelock(&["audit", "seal"]).ended(2);
}

#[test]
fn a_follower_sees_each_record_once_across_a_seal() {
    use std::io::{BufRead as _, BufReader};
    let site = Site::new();
    let _node = site.start_deciding();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_tidelock"))
        .current_dir(site.path(""))
        .args(["audit", "tail", "-f", "-n", "1", "--json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let mut index = next()["index"].as_u64().unwrap();
    for round in 0..3 {
        site.decides();
        if round == 1 {
            seal(&site);
        }
        site.decides();
        for _ in 0..4 {
            let record = next();
            index += 1;
            assert_eq!(record["index"], index, "{record}");
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_flipped_byte_is_named_and_repair_does_what_it_printed_and_no_more() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    let path = seal(&site);
    site.decides();
    let rel = format!(
        "segments/audit/{}",
        path.file_name().unwrap().to_str().unwrap()
    );

    // The control: nothing to repair.
    let nothing = site.json(&["segment", "repair"]);
    assert_eq!(nothing["steps"], json!([]));
    assert_eq!(nothing["applied"], false);
    // A running node scrubs and moves damage away itself, so the rest is shown on a stopped one.
    site.tidelock(&["segment", "repair", "--apply"])
        .ended(1)
        .says(&["in use by a running node", "Nothing was changed"]);
    assert!(node.stop().success());
    let good = fs::read(&path).unwrap();
    flip(&path, good.len() / 2);
    site.tidelock(&["segment", "verify", &id_of(&path)])
        .ended(1)
        .says(&[&rel]);
    site.tidelock(&["segment", "show", &id_of(&path)])
        .ended(1)
        .says(&["damaged", "fsck"]);
    site.tidelock(&["segment", "fsck"]).ended(1).says(&[
        "DAMAGE",
        "segment_damaged",
        &rel,
        "quarantine",
    ]);
    let plan = site.json(&["segment", "repair"]);
    assert_eq!(plan["steps"][0]["path"], rel, "{plan}");
    assert_eq!(plan["steps"][0]["number"], 1);
    site.ok(&["segment", "repair", "--dry-run"]).says(&[
        &rel,
        "nothing was changed",
        plan["digest"].as_str().unwrap(),
    ]);
    assert!(path.exists());

    fs::write(site.path("root/tmp/7"), "half a file").unwrap();
    chmod(&site.path("root/tmp/7"), 0o600);
    let before = tree(&site.path("root"));
    let plan = site.json(&["segment", "repair"]);
    assert_eq!(before, tree(&site.path("root")), "a plan changes nothing");
    let digest = plan["digest"].as_str().unwrap();
    let steps = plan["steps"].as_array().unwrap();
    let steps: Vec<&str> = steps.iter().map(|s| s["code"].as_str().unwrap()).collect();
    assert_eq!(
        steps,
        ["segment_damaged", "temporary_file", "index_outdated"]
    );
    // Another state is another plan.
    fs::write(site.path("root/tmp/8"), "more").unwrap();
    site.tidelock(&["segment", "repair", "--apply", "--plan", digest])
        .ended(1)
        .says(&["look at it again"]);
    assert!(path.exists() && site.path("root/tmp/7").exists());
    fs::remove_file(site.path("root/tmp/8")).unwrap();
    let done = site.json(&["segment", "repair", "--apply", "--plan", digest]);
    assert_eq!(done["applied"], true);
    assert_eq!(done["steps"], plan["steps"]);
    assert!(!path.exists() && !site.path("root/tmp/7").exists());
    let kept = site
        .path("root")
        .join(plan["steps"][0]["to"].as_str().unwrap());
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 0x40;
    assert_eq!(fs::read(&kept).unwrap(), bad, "evidence is kept as it was");
    // Nothing is left to do, and what is gone stays reported.
    assert_eq!(site.json(&["segment", "repair"])["steps"], json!([]));
    assert_eq!(fsck(&site, 1), ["log_missing"]);
    let noted = findings(&site.tidelock(&["segment", "fsck", "--json"]).json());
    assert!(noted.iter().any(|f| f["code"] == "quarantined"));
    assert!(noted.iter().any(|f| f["code"] == "repair_unrecorded"));

    let node = site.start();
    site.decides();
    let told = repaired(&site);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["plan"], digest);
    assert_eq!(told[0]["complete"], true);
    assert_eq!(told[0]["steps"][0]["path"], rel);
    assert_eq!(told[0]["steps_total"], 3);
    assert!(!site.path("root/state/repairs").exists());
    assert!(node.stop().success());
    let _node = site.start();
    assert_eq!(repaired(&site).len(), 1, "told once");
}

/// The records of repairs in a log of which records are missing.
fn repaired(site: &Site) -> Vec<Value> {
    let tail = site
        .tidelock(&["audit", "tail", "--all", "--json"])
        .ended(1)
        .json();
    let gap = tail["gaps"][0].clone();
    assert_eq!(gap[0], 0);
    let first = gap[1].as_u64().unwrap() + 1;
    assert_eq!(tail["records"][0]["index"], first);
    site.tidelock(&["audit", "tail", "--all"])
        .ended(1)
        .says(&["MISSING records 0 to"]);
    let records = tail["records"].as_array().unwrap().iter();
    records
        .filter(|r| r["record"]["type"] == "repaired")
        .map(|r| r["record"]["detail"].clone())
        .collect()
}

#[test]
fn what_nobody_of_ours_made_is_listed_and_left_alone() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    let seg = seal(&site);
    site.decides();
    assert!(node.stop().success());
    fs::write(site.path("root/notes.txt"), vec![b'x'; 10_000]).unwrap();
    fs::create_dir(site.path("root/segments/other")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", site.path("root/log/link")).unwrap();
    fs::hard_link(&seg, site.path("second")).unwrap();
    chmod(&site.path("root/keys/log.pk8"), 0o644);
    let mut found = fsck(&site, 0);
    found.sort();
    let expected = [
        "foreign_file",
        "foreign_file",
        "foreign_file",
        "mode_loose",
        "second_name",
    ];
    assert_eq!(found, expected);
    let report = site.json(&["segment", "fsck"]);
    let notes = findings(&report);
    let notes = notes.iter().find(|f| f["path"] == "notes.txt").unwrap();
    assert_eq!(notes["allocated_bytes"], 12_288);
    assert_eq!(notes["severity"], "foreign");
    assert!(
        report["areas"]["foreign"]["allocated_bytes"]
            .as_u64()
            .unwrap()
            >= 12_288
    );
    site.ok(&["segment", "fsck"])
        .says(&["foreign_file", "notes.txt", "log/link", "mode 0644"]);
    assert_eq!(site.json(&["segment", "repair"])["steps"], json!([]));
    site.ok(&["segment", "repair", "--apply"])
        .says(&["nothing to repair"]);
    assert!(site.path("root/notes.txt").exists());
}

#[test]
fn damaged_state_receipts_and_logs_are_found_and_the_log_is_left_to_the_node() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    seal(&site);
    site.decides();
    assert!(node.stop().success());
    fs::create_dir_all(site.path("root/state")).unwrap();
    chmod(&site.path("root/state"), 0o700);
    fs::write(
        site.path("root/state/accepted-logs"),
        format!("{{\"check\":\"sha256:{}\",\"value\":[]}}", "0".repeat(64)),
    )
    .unwrap();
    chmod(&site.path("root/state/accepted-logs"), 0o600);
    let clock = site.path("root/clock");
    assert!(clock.exists(), "its check is seen to be good");
    let log = fs::read_dir(site.path("root/log"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "log"))
        .unwrap();
    let bytes = fs::read(&log).unwrap();
    let at = bytes
        .windows(12)
        .position(|w| w == b"POLICY_ALLOW")
        .unwrap();
    flip(&log, at);
    let mut found = fsck(&site, 1);
    found.sort();
    assert_eq!(found, ["log_file_damaged", "state_file_damaged"]);
    assert_eq!(site.json(&["segment", "repair"])["steps"], json!([]));
    site.tidelock(&["audit", "tail", "--all"])
        .ended(1)
        .says(&["cannot be read"]);
    let cut = site
        .tidelock(&["audit", "tail", "--all", "--json"])
        .ended(1)
        .json();
    assert!(
        cut["error"].is_string() && cut["records"][0]["index"] == 0,
        "{cut}"
    );
    flip(&log, at);
    assert_eq!(fsck(&site, 1), ["state_file_damaged"]);
    flip(&site.path("root/log/state"), 20);
    let mut found = fsck(&site, 1);
    found.sort();
    assert!(found.contains(&"log_state_damaged".to_owned()), "{found:?}");
    flip(&site.path("root/log/state"), 20);
    fs::write(site.path("root/owner"), "b of domain harbour\n").unwrap();
    assert!(fsck(&site, 1).contains(&"owner_other".to_owned()));
}

#[test]
fn a_log_that_was_rolled_back_contradicts_a_checkpoint_seen_before() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    seal(&site);
    assert!(node.stop().success());
    common::run(
        std::process::Command::new("cp")
            .current_dir(site.path(""))
            .args(["-a", "root", "older"]),
        b"",
    )
    .ended(0);
    let node = site.start();
    site.decides();
    let newer = id_of(&seal(&site));
    assert!(node.stop().success());
    let shown = site.json(&["segment", "show", &newer]);
    site.write("seen", shown["checkpoint"].as_str().unwrap());
    site.ok(&["audit", "verify", "--seen", "seen"]);
    fs::rename(site.path("root"), site.path("newer")).unwrap();
    fs::rename(site.path("older"), site.path("root")).unwrap();
    site.ok(&["audit", "verify"]);
    site.tidelock(&["audit", "verify", "--seen", "seen"])
        .ended(1)
        .says(&["FAULT", "was seen"]);
    site.write("seen", "no note");
    site.tidelock(&["audit", "verify", "--seen", "seen"])
        .ended(2)
        .says(&["seen"]);
}

/// Every text and number in a document, by its path.
fn leaves(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(key, value)| leaves(value, &format!("{at}/{key}"), found)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(n, value)| leaves(value, &format!("{at}/{n}"), found)),
        Value::Null => {}
        _ => found.push(at.to_owned()),
    }
}

/// Another value of the same type.
fn other(value: &Value) -> Value {
    match value {
        Value::Number(n) => json!(n.as_u64().unwrap() + 1),
        Value::String(text) => {
            // Somewhere in the middle, and another letter or digit.
            let mut bytes = text.clone().into_bytes();
            let mid = bytes.len() / 2;
            let at = (mid..bytes.len())
                .chain(0..mid)
                .find(|at| bytes[*at].is_ascii_alphanumeric())
                .unwrap();
            bytes[at] = if bytes[at] == b'1' { b'2' } else { b'1' };
            json!(String::from_utf8(bytes).unwrap())
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_proof_stands_alone_and_every_changed_field_of_it_fails() {
    let site = Site::new();
    let node = site.start_deciding();
    let answer = site
        .decide(common::read_action("/srv/a.txt").to_string().as_bytes())
        .json();
    let (index, leaf) = (
        answer["record"]["index"].to_string(),
        answer["record"]["leaf"].as_str().unwrap().to_owned(),
    );
    site.decides();
    // Not sealed yet: the head over it stands in the log file.
    site.ok(&["audit", "prove", &index, "--out", "open.proof"]);
    seal(&site);
    site.decides();
    seal(&site);
    site.decides();
    site.decides();
    site.ok(&["audit", "prove", &index, "--out", "own.proof"]);
    let latest = site.json(&["audit", "prove", "--leaf", &leaf, "--latest"]);
    site.write("latest.proof", &latest.to_string());
    site.tidelock(&["audit", "prove", &index, "--out", "own.proof"])
        .ended(2)
        .says(&["own.proof"]);
    site.tidelock(&["audit", "prove", "999999"])
        .ended(1)
        .says(&["not held"]);
    let none = format!("sha256:{}", "0".repeat(64));
    site.tidelock(&["audit", "prove", "--leaf", &none]).ended(1);
    assert!(node.stop().success());
    let again = site.json(&["audit", "prove", &index]);
    let own: Value = serde_json::from_str(&site.read("own.proof")).unwrap();
    assert_eq!(again, own, "the same on a stopped node");

    // Nothing but the CA's certificate is needed: no root, no config.
    let away = tempfile::tempdir().unwrap();
    for name in ["open.proof", "own.proof", "latest.proof", "ca/ca.crt"] {
        let to = away.path().join(Path::new(name).file_name().unwrap());
        fs::copy(site.path(name), to).unwrap();
    }
    let verify = |file: &str, key_of: &str, code: i32| {
        let args = [
            "audit", "verify", "--proof", file, "--key-of", key_of, "--json",
        ];
        common::tidelock_in(away.path(), &args, b"")
            .ended(code)
            .json()
    };
    let mut sizes = Vec::new();
    for file in ["open.proof", "own.proof", "latest.proof"] {
        let good = verify(file, "ca.crt", 0);
        assert_eq!(good["leaf"], leaf, "{file}: {good}");
        assert_eq!(good["index"].to_string(), index);
        assert_eq!(good["node"], "a");
        assert_eq!(good["record"]["reason"], "POLICY_ALLOW");
        sizes.push(good["checkpoint_size"].as_u64().unwrap());
    }
    assert!(sizes[0] <= sizes[1] && sizes[1] < sizes[2], "{sizes:?}");
    let text = [
        "audit",
        "verify",
        "--proof",
        "own.proof",
        "--key-of",
        "ca.crt",
    ];
    common::tidelock_in(away.path(), &text, b"")
        .ended(0)
        .says(&["good: record", "node a of domain harbour"]);

    let mut paths = Vec::new();
    leaves(&latest, "", &mut paths);
    assert!(paths.len() > 12, "{paths:?}");
    for path in &paths {
        let mut bad = latest.clone();
        let place = bad.pointer_mut(path).unwrap();
        *place = other(place);
        fs::write(away.path().join("bad.proof"), bad.to_string()).unwrap();
        let judged = verify("bad.proof", "ca.crt", 1);
        assert_eq!(judged["ok"], false, "{path}: {judged}");
    }
    for list in ["/proof/path", "/consistency/path"] {
        let mut bad = latest.clone();
        bad.pointer_mut(list).unwrap().as_array_mut().unwrap().pop();
        fs::write(away.path().join("bad.proof"), bad.to_string()).unwrap();
        verify("bad.proof", "ca.crt", 1);
    }
    // Another CA, another key, no proof at all.
    site.ok(&["ca", "init", "--dir", "other", "--domain", "harbour"]);
    fs::copy(site.path("other/ca.crt"), away.path().join("other.crt")).unwrap();
    verify("own.proof", "other.crt", 1);
    let zeros = "0".repeat(64);
    let judged = verify("own.proof", &zeros, 1);
    assert!(judged["why"].as_str().unwrap().contains("key"), "{judged}");
    fs::write(away.path().join("bad.proof"), "{}").unwrap();
    verify("bad.proof", "ca.crt", 1);
    for args in [
        &["audit", "verify", "--proof", "own.proof"][..],
        &["audit", "verify", "--key-of", "ca.crt"],
        &[
            "audit",
            "verify",
            "--proof",
            "own.proof",
            "--key-of",
            "nowhere",
        ],
        &[
            "audit", "verify", "--proof", "nowhere", "--key-of", "ca.crt",
        ],
        &["audit", "prove"],
        &["audit", "prove", "1", "--leaf", &none],
    ] {
        common::tidelock_in(away.path(), args, b"").ended(2);
    }
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_is_wrong() {
    let site = Site::new();
    for (args, word) in [
        (&["segment", "ls", "--kind", "gossip"][..], "gossip"),
        (&["segment", "ls", "--origin", "nobody"], "origin"),
        (&["segment", "verify", "blake3:12"], "64"),
        (&["segment", "repair", "--plan", "x"], "--plan"),
        (&["segment", "repair", "--apply", "--dry-run"], "--dry-run"),
        (&["audit", "tail", "-n", "3", "--all"], "--all"),
        (&["audit", "tail", "-n", "some"], "some"),
        (&["audit", "verify", "--origin", "policy"], "origin"),
        (&["segment", "mend"], "mend"),
        (&["segment", "fsck", "-c", "nowhere.toml"], "nowhere.toml"),
        // There is no root yet.
        (&["segment", "fsck"], "root"),
        (&["audit", "tail"], "root"),
        (&["audit", "stat"], "root"),
    ] {
        let ran = site.tidelock(args).ended(2).says(&[word]);
        assert!(!ran.err.contains("panicked"), "{ran:?}");
    }
    for args in [
        &["segment", "fsck", "--help"][..],
        &["segment", "repair", "--help"],
    ] {
        site.ok(args).says(&["Example"]);
    }
}
