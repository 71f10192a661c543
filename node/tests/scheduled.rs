//! Bundles that are put in place ahead of their time: they wait on the node, over restarts and without any
//! contact, and begin to decide by its trusted clock.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use common::{Node, Site, not_run, until};
use jiff::{SignedDuration, Timestamp};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A time so many seconds from now, as manifests write it.
fn ahead(seconds: i64) -> Timestamp {
    let at = Timestamp::now().checked_add(SignedDuration::from_secs(seconds));
    let at = at.unwrap().as_second();
    Timestamp::from_second(at).unwrap()
}

/// A bundle `site-EPOCH.tar` that allows `/etc` instead of `/srv`, from this time on.
fn turned(site: &Site, epoch: u64, not_before: Timestamp) {
    let policy = site.read("policy/policies/base.cedar");
    let tests = site.read("policy/tests/base.json");
    site.write("policy/tests/base.json", "[]");
    site.write(
        "policy/policies/base.cedar",
        &policy.replace("\"/srv/*\"", "\"/etc/*\""),
    );
    plain(site, &format!("site-{epoch}.tar"), epoch, not_before);
    site.write("policy/policies/base.cedar", &policy);
    site.write("policy/tests/base.json", &tests);
}

/// The same bundle as ever, from this time on.
fn plain(site: &Site, archive: &str, epoch: u64, not_before: Timestamp) {
    site.bundle(archive, "policy.key", |manifest| {
        manifest["epoch"] = json!(epoch);
        manifest["not_before"] = json!(not_before.to_string());
    });
}

fn install(site: &Site, archive: &str) {
    site.ok(&["bundle", "install", archive, "--apply"]);
}

fn epoch(site: &Site) -> Value {
    site.status()["bundle"]["epoch"].clone()
}

fn scheduled(site: &Site) -> Vec<Value> {
    let scheduled = site.status()["activation"]["scheduled"].clone();
    scheduled.as_array().unwrap().clone()
}

/// The epochs that wait.
fn waits(site: &Site) -> Vec<u64> {
    let waits = scheduled(site);
    waits
        .iter()
        .map(|one| one["epoch"].as_u64().unwrap())
        .collect()
}

/// How many policy segments the running node holds of bundles.
fn segments(site: &Site) -> usize {
    let listed = site.json(&["segment", "ls", "--origin", "policy/site"]);
    listed["segments"].as_array().unwrap().len()
}

fn allows(site: &Site, path: &str) -> bool {
    site.may_read(path).0 == "allow"
}

#[test]
fn a_bundle_ahead_of_its_time_outlives_a_kill_and_begins_to_decide_by_itself() {
    let site = Site::new();
    let node = site.start_deciding();
    let start = ahead(20);
    turned(&site, 2, start);
    let plan = site.ok(&["bundle", "install", "site-2.tar"]);
    plan.says(&["schedule", "site epoch 2", "--apply"]);
    assert_eq!(waits(&site), [0_u64; 0], "only planned");
    site.ok(&["bundle", "install", "site-2.tar", "--apply"])
        .says(&["in place", &start.to_string()]);
    assert_eq!(waits(&site), [2]);
    assert_eq!(site.events("bundle_scheduled")[0]["epoch"], 2);
    // Again, the same; and by a plan it is not to be had before its time.
    install(&site, "site-2.tar");
    assert_eq!((waits(&site), segments(&site)), (vec![2], 2));
    site.tidelock(&["policy", "plan", "site-2.tar"])
        .ended(1)
        .says(&["BUNDLE_NOT_YET"]);
    site.ok(&["policy", "status"])
        .says(&["scheduled", "site epoch 2", &start.to_string()]);
    node.end(Signal::KILL);

    let node = site.start();
    assert_eq!(waits(&site), [2]);
    assert!(
        Timestamp::now() < start,
        "this machine is too slow for the test"
    );
    site.decides();
    let begun = Instant::now();
    while epoch(&site) == 1 {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited in vain");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(epoch(&site), 2);
    assert!(allows(&site, "/etc/shadow") && !allows(&site, "/srv/a.txt"));
    let activated = site.records().into_iter().map(|r| r["record"].clone());
    let mut activated = activated.filter(|r| r["type"] == "bundle_activated");
    let activated = activated.next_back().unwrap();
    assert_eq!(activated["detail"]["epoch"], 2);
    let at = activated["at"].as_i64().unwrap();
    assert!(at >= start.as_millisecond(), "not a moment before its time");
    until("an empty schedule", || {
        waits(&site).is_empty().then_some(())
    });
    assert_eq!(
        segments(&site),
        2,
        "the one that decides, and the one behind it"
    );
    assert!(node.stop().success());
    let node = site.start();
    assert_eq!((epoch(&site), waits(&site)), (json!(2), vec![]));
    assert!(node.stop().success());
}

#[test]
fn what_waits_gives_way_to_newer_epochs_and_goes_with_the_trust_in_its_signer() {
    let site = Site::new();
    let node = site.start_deciding();
    for (epoch, hours) in [(3, 1), (5, 2), (6, 3)] {
        plain(
            &site,
            &format!("site-{epoch}.tar"),
            epoch,
            ahead(hours * 3_600),
        );
        install(&site, &format!("site-{epoch}.tar"));
    }
    assert_eq!((waits(&site), segments(&site)), (vec![3, 5, 6], 4));
    let refused = |epoch: u64, hours: i64, code: &str| {
        plain(&site, "bad.tar", epoch, ahead(hours * 3_600));
        for apply in [&["--apply"][..], &[]] {
            let install = [&["bundle", "install", "bad.tar"][..], apply].concat();
            site.tidelock(&install).ended(1).says(&[code]);
        }
    };
    refused(5, 4, "BUNDLE_CONFLICT");
    refused(4, 4, "BUNDLE_EPOCH");
    plain(&site, "site-8.tar", 8, ahead(4 * 3_600));
    install(&site, "site-8.tar");
    refused(9, 5, "BUNDLE_NOT_YET");
    // A newer epoch that comes into force before some of them takes their place.
    plain(&site, "site-7.tar", 7, ahead(2 * 3_600 - 60));
    install(&site, "site-7.tar");
    assert_eq!((waits(&site), segments(&site)), (vec![3, 7, 8], 4));
    // One that decides at once takes those below it away, within a second.
    site.bundle("site-4.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(4)
    });
    install(&site, "site-4.tar");
    until("epoch 3 to go", || (waits(&site) == [7, 8]).then_some(()));
    assert_eq!((epoch(&site), segments(&site)), (json!(4), 4));
    let gone = || -> Vec<u64> {
        let events = site.events("bundle_unscheduled");
        let epochs = events.iter().map(|e| e["epoch"].as_u64().unwrap());
        epochs.collect()
    };
    assert_eq!(gone(), [5, 6, 3]);

    // Another key is trusted by mistake: what the first one signed waits no more, until that one is back.
    site.signing_key("second.key");
    let first = site.read("trust.toml");
    site.write("trust.toml", &site.trust("second.key"));
    node.reload("reloaded");
    until("the schedule to go", || {
        waits(&site).is_empty().then_some(())
    });
    assert_eq!(gone(), [5, 6, 3, 7, 8]);
    assert_eq!(
        site.events("bundle_unscheduled")[3]["code"],
        "BUNDLE_SIGNATURE"
    );
    site.write("trust.toml", &first);
    node.reload("reloaded");
    site.decides();
    until("the schedule to be back", || {
        (waits(&site) == [7, 8]).then_some(())
    });
    assert!(node.stop().success());
    let node = site.start();
    assert_eq!(waits(&site), [7, 8]);
    assert_eq!(gone(), [5, 6, 3, 7, 8], "told once");
    assert!(node.stop().success());
}

#[test]
fn a_bundle_whose_time_has_come_passes_the_gates_of_that_moment() {
    let site = Site::new();
    let node = site.start_deciding();
    site.decides();
    let text = site.trust("policy.key").replace("format = 1", "format = 2");
    let text = text.replace(
        "threshold = 1\n",
        "[thresholds]\npolicy = 1\n\n[activation]\nblock_on = \"any_flip\"\nreplay_records = 200\n",
    );
    let text = text.replace("public_key_pem", "roles = [\"policy\"]\npublic_key_pem");
    site.write("trust.toml", &text);
    node.reload("reloaded");
    turned(&site, 2, ahead(10));
    install(&site, "site-2.tar");
    assert_eq!(scheduled(&site)[0]["refused"], Value::Null);
    let refused = until("its time to come", || {
        let one = scheduled(&site).pop()?;
        one["refused"]["code"].as_str().map(str::to_owned)
    });
    assert_eq!((refused.as_str(), epoch(&site)), ("POLICY_FLIPS", json!(1)));
    site.decides();
    assert_eq!(site.events("bundle_rejected").len(), 1);
    site.ok(&["policy", "status"])
        .says(&["refused since then", "POLICY_FLIPS"]);
    site.tidelock(&["doctor"])
        .ended(1)
        .says(&["the time of epoch 2 has come"]);
    // The operator's word, by a plan.
    let plan = site.json(&["policy", "plan", "site-2.tar", "--accept-flips"]);
    let plan = plan["plan"].as_str().unwrap();
    let act = ["--accept-flips", "--plan", plan, "--apply"];
    site.ok(&[&["policy", "activate", "site-2.tar"], &act[..]].concat());
    until("an empty schedule", || {
        waits(&site).is_empty().then_some(())
    });
    assert_eq!(epoch(&site), 2);
    assert_eq!(site.events("bundle_unscheduled").len(), 0);
    assert!(node.stop().success());
}

#[test]
fn an_emergency_is_ended_by_no_bundle_that_waited_for_its_time() {
    let site = Site::new();
    let text = site.trust("policy.key").replace("format = 1", "format = 2");
    let text = text.replace(
        "threshold = 1\n",
        "[thresholds]\npolicy = 1\nbreak-glass = 1\n",
    );
    let roles = "roles = [\"policy\", \"break-glass\"]\npublic_key_pem";
    site.write("trust.toml", &text.replace("public_key_pem", roles));
    let node = site.start_deciding();
    turned(&site, 5, ahead(10));
    install(&site, "site-5.tar");
    plain(&site, "site-6.tar", 6, ahead(3_600));
    install(&site, "site-6.tar");
    let glass = |epoch: u64, end: Timestamp| {
        site.bundle("glass.tar", "policy.key", |manifest| {
            manifest["epoch"] = json!(epoch);
            manifest["role"] = json!("break-glass");
            manifest["created_at"] = json!(ahead(-60).to_string());
            manifest["expires_at"] = json!(end.to_string());
        });
        install(&site, "glass.tar");
    };
    glass(4, ahead(25));
    assert_eq!((epoch(&site), waits(&site)), (json!(4), vec![5, 6]));
    let refused = until("its time to come", || {
        let one = scheduled(&site).first()?.clone();
        one["refused"]["code"].as_str().map(str::to_owned)
    });
    assert_eq!(refused, "BREAK_GLASS_DECIDES");
    assert_eq!(epoch(&site), 4);
    // The control: when it is over.
    let begun = Instant::now();
    while epoch(&site) == 4 {
        assert!(begun.elapsed() < Duration::from_secs(90), "waited in vain");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(allows(&site, "/etc/shadow"));
    // What an emergency takes the place of is told.
    glass(6, ahead(3_600));
    until("an empty schedule", || {
        waits(&site).is_empty().then_some(())
    });
    let gone = site.events("bundle_unscheduled");
    assert_eq!(
        (&gone[gone.len() - 1]["epoch"], epoch(&site)),
        (&json!(6), json!(6))
    );
    assert!(node.stop().success());
}

#[test]
fn signatures_of_copies_add_up_while_a_bundle_waits() {
    let site = Site::new();
    site.signing_key("second.key");
    let first = site.trust("policy.key");
    let second = site.trust("second.key").replace("harbour-master", "pilot");
    let (_, second) = second.split_once("[[keys]]").unwrap();
    site.write("trust.toml", &format!("{first}\n[[keys]]{second}"));
    let node = site.start_deciding();
    let (made, start) = (ahead(-60).to_string(), ahead(3_600).to_string());
    let installed = |archive: &str, key: &str| {
        site.bundle(archive, key, |manifest| {
            manifest["epoch"] = json!(2);
            manifest["created_at"] = json!(made);
            manifest["not_before"] = json!(start);
        });
        install(&site, archive);
        let waits = scheduled(&site).pop().unwrap();
        (waits["hash"].clone(), waits["segment"].clone())
    };
    let (content, one) = installed("one.tar", "policy.key");
    let (same, both) = installed("two.tar", "second.key");
    assert_eq!(content, same);
    assert_ne!(one, both, "a segment with both signatures");
    // The control: a copy that brings no further signer changes nothing.
    assert_eq!(installed("three.tar", "policy.key"), (content, both));
    assert_eq!((waits(&site), segments(&site)), (vec![2], 2));
    assert!(node.stop().success());
}

/// Debian's libfaketime, which tells a process another wall clock; its monotonic clocks stay.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn start_at<'s>(site: &'s Site, at: &str) -> Node<'s> {
    let fake = [
        ("LD_PRELOAD", FAKETIME),
        ("FAKETIME", at),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    site.start_with(&fake)
}

/// The configs of two nodes, and a medium `m` between them.
fn two_nodes(site: &Site) -> (String, String) {
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    fs::create_dir(site.path("m")).unwrap();
    let a = site.read("tidelock.toml");
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    (a, b)
}

#[test]
fn inv_18_a_bundle_of_a_peer_is_not_due_by_a_clock_in_doubt() {
    let site = Site::new();
    let (a, b) = two_nodes(&site);
    site.write("tidelock.toml", &a);
    let node = site.start_deciding();
    // One that is due, and one that is not.
    turned(&site, 2, ahead(-3_600));
    turned(&site, 3, ahead(3_600));
    for archive in ["site-2.tar", "site-3.tar"] {
        install(&site, archive);
    }
    assert_eq!((epoch(&site), waits(&site)), (json!(2), vec![3]));
    assert!(node.stop().success());
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);

    // What the last run kept of the time is lost, so the clock is in doubt; it says what any clock says.
    site.write("tidelock.toml", &b);
    assert!(site.start().stop().success());
    site.write("root-b/clock", "{}");
    let import = || {
        let ran = site.tidelock(&["segment", "import", "m", "--apply", "--json"]);
        ran.json()["entries"].to_string()
    };
    let node = site.start();
    for _ in 0..2 {
        assert_eq!(site.status()["clock"]["suspect"], true);
        let told = import();
        assert!(told.contains("CLOCK_SUSPECT"), "{told}");
        // What has no time of its own decides, what has one waits for it, and what is due is not kept.
        assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![3]));
        assert_eq!(segments(&site), 2);
    }
    let rejected = site.events("bundle_rejected");
    assert_eq!(rejected[0]["code"], "CLOCK_SUSPECT");
    // Nor does a restart let it in: the doubt lasts, and nothing of it lies here.
    assert!(node.stop().success());
    let node = site.start();
    assert_eq!(site.status()["clock"]["suspect"], true);
    assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![3]));
    assert!(import().contains("CLOCK_SUSPECT"));
    // The control: the same clock and the same medium, when an operator has accepted it.
    site.ok(&["clock", "accept", "--apply"]);
    assert!(!import().contains("CLOCK_SUSPECT"));
    assert_eq!((epoch(&site), waits(&site)), (json!(2), vec![3]));
    assert!(allows(&site, "/etc/shadow"));
    assert!(node.stop().success());
}

#[test]
fn inv_18_a_clock_in_doubt_activates_nothing_before_its_time() {
    let name = "inv_18_a_clock_in_doubt_activates_nothing_before_its_time";
    if !Path::new(FAKETIME).exists() {
        not_run(name, "libfaketime is not installed");
        return;
    }
    let site = Site::new();
    let (a, b) = two_nodes(&site);
    turned(&site, 2, ahead(3_600));
    let node = site.start_deciding();
    install(&site, "site-2.tar");
    // It goes on to others before its time, and waits there too.
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);
    assert!(node.stop().success());
    site.write("tidelock.toml", &b);
    let node = site.start();
    let plan = site.json(&["segment", "import", "m"]);
    assert_eq!(plan["fates"]["new"]["policy"], 2, "{plan}");
    let taken = site.json(&["segment", "import", "m", "--apply"]);
    assert_eq!(taken["fates"]["new"]["policy"], 2, "{taken}");
    assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![2]));
    assert!(node.stop().success());

    // Far ahead: closed, and nothing of it comes into force. It stays so with a clock that is right again.
    for at in ["@2100-01-02 00:00:00", "+2h"] {
        let node = start_at(&site, at);
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(site.status()["clock"]["suspect"], true, "{at}");
        assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![2]), "{at}");
        assert!(node.stop().success());
    }
    // The control: the same clock, when an operator has accepted it.
    let node = start_at(&site, "+2h");
    site.ok(&["clock", "accept", "--apply"]);
    until("its time to count", || (epoch(&site) == 2).then_some(()));
    assert!(allows(&site, "/etc/shadow"));
    assert!(node.stop().success());
    // And at the other node, without a doubt: what came due while it was off.
    site.write("tidelock.toml", &a);
    let node = start_at(&site, "+2h");
    until("what came due meanwhile", || {
        (epoch(&site) == 2).then_some(())
    });
    assert!(node.stop().success());
}

/// Such a bundle was refused at its time and no copy that came then counted with it: each had too few signers.
#[test]
fn what_is_not_proved_at_its_time_waits_for_the_signature_that_it_lacks() {
    let name = "what_is_not_proved_at_its_time_waits_for_the_signature_that_it_lacks";
    if !Path::new(FAKETIME).exists() {
        not_run(name, "libfaketime is not installed");
        return;
    }
    let site = Site::new();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    fs::create_dir(site.path("m")).unwrap();
    site.signing_key("second.key");
    let first = site.trust("policy.key");
    let second = site.trust("second.key").replace("harbour-master", "pilot");
    let (_, second) = second.split_once("[[keys]]").unwrap();
    let activation = "[thresholds]\npolicy = 1\n\n[activation]\nwidening_signatures = 2\n";
    let trust = format!("{first}\n[[keys]]{second}")
        .replace("format = 1", "format = 2")
        .replace("threshold = 1\n", activation)
        .replace("public_key_pem", "roles = [\"policy\"]\npublic_key_pem");
    site.write("trust.toml", &trust);
    // Nothing is proved here, so whatever comes after the first bundle needs both signatures.
    site.configure(
        "trust = \"trust.toml\"",
        "trust = \"trust.toml\"\nsolver = \"nothing\"",
    );
    let a = site.read("tidelock.toml");
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    turned(&site, 2, ahead(3_600));
    for archive in ["site-1.tar", "site-2.tar"] {
        let out = format!("{archive}.second");
        let sign = ["bundle", "sign", archive, "--key", "second.key"];
        site.ok(&[&sign[..], &["--out", &out]].concat());
    }
    let by = |archive: &str, signatures: &[&str]| {
        let mut install = vec!["bundle", "install", archive, "--apply"];
        for signature in signatures {
            install.extend(["--sig", signature]);
        }
        site.ok(&install);
    };
    let both = ["site-1.tar.sig", "site-1.tar.second"];
    let waiting = || site.status()["activation"]["waiting"].clone();
    let held = || -> Vec<Value> {
        let listed = site.json(&["segment", "ls", "--origin", "policy/site"]);
        let listed = listed["segments"].as_array().unwrap().clone();
        let second = listed.iter().filter(|segment| segment["sequence"] == 2);
        second.map(|segment| segment["id"].clone()).collect()
    };

    // At `b` the second key's comes first, which goes on the medium, and the first key's before its time.
    site.write("tidelock.toml", &b);
    let node = site.start();
    by("site-1.tar", &both);
    by("site-2.tar", &["site-2.tar.second"]);
    site.ok(&["segment", "export", "--to", "m", "--for", "a"]);
    let by_second = held();
    by("site-2.tar", &["site-2.tar.sig"]);
    let by_both = held();
    assert_eq!((by_second.len(), by_both.len()), (1, 1));
    assert_ne!(by_second, by_both);
    assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![2]));
    assert!(node.stop().success());

    // `a` has the first key's alone when its time comes.
    site.write("tidelock.toml", &a);
    let node = site.start();
    by("site-1.tar", &both);
    by("site-2.tar", &["site-2.tar.sig"]);
    assert_eq!((epoch(&site), waits(&site)), (json!(1), vec![2]));
    assert_eq!(waiting(), json!([]), "nobody has judged it yet");
    assert!(node.stop().success());
    let node = start_at(&site, "+2h");
    let told = until("its time to come", || {
        let mut told = waiting().as_array().unwrap().clone();
        assert!(told.len() < 2, "{told:?}");
        told.pop()
    });
    assert_eq!(
        (&told["epoch"], &told["code"], &told["signers"]),
        (
            &json!(2),
            &json!("WIDENING_UNPROVEN"),
            &json!(["harbour-master"])
        )
    );
    let refused = scheduled(&site)[0]["refused"]["code"].clone();
    assert_eq!(
        (epoch(&site), refused),
        (json!(1), json!("WIDENING_UNPROVEN"))
    );
    site.decides();
    let rejected = site.events("bundle_rejected");
    assert_eq!(
        (rejected.len(), &rejected[0]["by"]),
        (1, &json!("schedule"))
    );
    // The copy of the second key would wait too: with what is known of the first it does not.
    site.json(&["segment", "import", "m", "--apply"]);
    assert_eq!((epoch(&site), waiting()), (json!(2), json!([])));
    assert!(allows(&site, "/etc/shadow") && !allows(&site, "/srv/a.txt"));
    until("an empty schedule", || {
        waits(&site).is_empty().then_some(())
    });
    let dropped = site.events("bundle_unscheduled");
    assert_eq!(dropped, [] as [Value; 0], "it decides");
    assert_eq!(held(), by_both, "what goes on to others has both");
    assert!(node.stop().success());

    // The control: where both were there before its time, it begins by itself.
    site.write("tidelock.toml", &b);
    let node = start_at(&site, "+2h");
    until("its time to come", || (epoch(&site) == 2).then_some(()));
    assert!(allows(&site, "/etc/shadow"));
    assert_eq!(site.events("bundle_rejected").len(), 0);
    assert_eq!(held(), by_both);
    assert!(node.stop().success());
}
