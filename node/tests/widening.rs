//! The widening gate of a real node, with a real solver and with ones that hang, die, or say nonsense.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{fs, path::Path};

use common::{Ran, Site, chmod, not_run, openssl};
use serde_json::{Value, json};

/// A site whose bundle `site-2.tar` permits less than the first one, and `site-3.tar` more, each signed by one
/// key, `*.second.sig` by another.
fn site() -> Site {
    let site = Site::new();
    let policy = site.read("policy/policies/base.cedar");
    site.write("policy/tests/base.json", "[]");
    let epoch = |epoch: u64| move |manifest: &mut Value| manifest["epoch"] = json!(epoch);
    let narrower = policy.replace("\"/srv/*\"", "\"/srv/pub/*\"");
    assert_ne!(narrower, policy);
    site.write("policy/policies/base.cedar", &narrower);
    site.bundle("site-2.tar", "policy.key", epoch(2));
    site.write(
        "policy/policies/base.cedar",
        &policy.replace("\"/srv/*\"", "\"/*\""),
    );
    site.bundle("site-3.tar", "policy.key", epoch(3));
    site
}

/// Debian's libfaketime, which tells a process another wall clock; its monotonic clocks stay.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

fn prove(site: &Site, after: &str, more: &[&str]) -> Ran {
    let all = [&["policy", "prove", "site-1.tar", after, "--json"], more].concat();
    site.tidelock(&all)
}

fn has_solver(test: &str) -> bool {
    let is_there = Path::new("/usr/bin/cvc5").exists();
    if !is_there {
        not_run(test, "cvc5 is not installed");
    }
    is_there
}

#[test]
fn a_solver_that_hangs_dies_or_says_nonsense_proves_nothing() {
    let site = site();
    chmod(site.path("").as_path(), 0o755);
    for (script, reason) in [
        ("while :; do :; done", "solver_timeout"),
        ("exit 3", "solver_failed"),
        ("echo sat; echo; echo '('; kill -SEGV $$", "solver_failed"),
        ("echo perhaps", "solver_failed"),
        ("while :; do echo unsat; done", "solver_failed"),
        ("echo unknown", "solver_unknown"),
        // Its files, sockets and children are its parent's business, so it has none.
        ("echo unsat > \"$0.out\" && echo unsat", "solver_failed"),
        ("(echo unsat)", "solver_failed"),
    ] {
        site.write("solver", &format!("#!/bin/sh\n{script}\n"));
        chmod(&site.path("solver"), 0o755);
        let path = site.path("solver").display().to_string();
        // A loaded machine must not take the one for the other; what hangs is ended after a short time.
        let deadline = match reason {
            "solver_timeout" => "4000",
            _ => "30000",
        };
        let said = prove(
            &site,
            "site-2.tar",
            &["--solver", &path, "--deadline-ms", deadline],
        );
        let said = said.ended(1).json();
        assert_eq!(said["verdict"], "unproven", "{script}");
        assert_eq!(said["reason"], reason, "{script}: {said}");
    }
    // The control: what says `unsat` is believed, whatever it is.
    site.write("solver", "#!/bin/sh\necho unsat\n");
    let path = site.path("solver").display().to_string();
    let said = prove(&site, "site-2.tar", &["--solver", &path]).ended(0);
    assert_eq!(said.json()["verdict"], "not_wider");
    // Unless others may have put it there.
    chmod(&site.path("solver"), 0o777);
    let said = prove(&site, "site-2.tar", &["--solver", &path]).ended(1);
    assert_eq!(said.json()["reason"], "no_solver");
}

/// A trust file that demands two signatures of bundles that are not proved, and knows a key for emergencies.
fn demand_two_signatures(site: &Site) {
    let mut named = Vec::new();
    for (key, role) in [
        ("policy", "policy"),
        ("second", "policy"),
        ("glass", "break-glass"),
    ] {
        if key != "policy" {
            site.signing_key(&format!("{key}.key"));
        }
        let file = format!("{key}.key");
        let public = openssl(&site.path(""), &["pkey", "-in", &file, "-pubout"]);
        site.write(&format!("{key}.pub"), &public);
        named.extend(["--key".to_owned(), format!("{key}-key={key}.pub:{role}")]);
    }
    fs::remove_file(site.path("trust.toml")).unwrap();
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    let init = [
        "trust",
        "init",
        "--domain",
        "harbour",
        "--threshold",
        "policy=1",
    ];
    site.ok(&[&init, &named[..], &["--out", "trust.toml"]].concat());
    let trust = site.read("trust.toml");
    let (head, keys) = trust.split_once("[[keys]]").unwrap();
    site.write(
        "trust.toml",
        &format!("{head}[activation]\nwidening_signatures = 2\n\n[[keys]]{keys}"),
    );
}

#[test]
fn a_bundle_is_proved_or_needs_the_second_signature() {
    if !has_solver("a_bundle_is_proved_or_needs_the_second_signature") {
        return;
    }
    let site = site();
    assert_eq!(
        prove(&site, "site-2.tar", &[]).ended(0).json()["verdict"],
        "not_wider"
    );
    let wider = prove(&site, "site-3.tar", &[]).ended(1).json();
    assert_eq!(wider["verdict"], "wider");
    assert!(wider["counterexample"]["principal"].is_array(), "{wider}");

    // Nothing is demanded: told in the plan, and by doctor.
    let node = site.start_deciding();
    let plan = site.json(&["policy", "plan", "site-3.tar"]);
    assert_eq!(plan["widening"]["verdict"], "wider");
    assert_eq!(plan["widening"]["signatures_needed"], Value::Null);
    site.tidelock(&["doctor"])
        .says(&["no more for a bundle that permits more", "cvc5"]);

    // Two signatures are demanded.
    demand_two_signatures(&site);
    node.reload("reloaded");
    let install = |archive: &str, more: &[&str]| {
        let all = [&["bundle", "install", archive, "--apply"], more].concat();
        site.tidelock(&all)
    };
    install("site-3.tar", &[])
        .ended(1)
        .says(&["WIDER_UNSIGNED", "path"]);
    let rejected = site.events("bundle_rejected");
    assert_eq!(rejected.last().unwrap()["code"], "WIDER_UNSIGNED");
    assert_eq!(site.status()["bundle"]["epoch"], 1);
    let plan = site.json(&["policy", "plan", "site-3.tar"]);
    assert_eq!(plan["widening"]["signatures_needed"], 2);

    // Proved: one signature is enough. The other way: two.
    install("site-2.tar", &[]).ended(0);
    assert_eq!(
        site.events("bundle_activated").last().unwrap()["widening"],
        "not_wider"
    );
    site.ok(&[
        "bundle",
        "sign",
        "site-3.tar",
        "--key",
        "second.key",
        "--out",
        "site-3.second.sig",
    ]);
    install(
        "site-3.tar",
        &["--sig", "site-3.tar.sig", "--sig", "site-3.second.sig"],
    )
    .ended(0);
    let event = site.events("bundle_activated").last().unwrap().clone();
    assert!(
        event["widening"] == "unproven(not_asked)" || event["widening"] == "wider",
        "{event}"
    );
    assert_eq!(site.status()["bundle"]["epoch"], 3);

    // Without a solver nothing is proved, so nothing passes that would have to be.
    let policy = site.read("policy/policies/base.cedar");
    let narrower = policy.replace("\"/*\"", "\"/srv/*\"");
    assert_ne!(narrower, policy);
    site.write("policy/policies/base.cedar", &narrower);
    site.bundle("site-4.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(4)
    });
    site.configure(
        "trust = \"trust.toml\"",
        "trust = \"trust.toml\"\nsolver = \"nothing\"",
    );
    node.reload("reloaded");
    install("site-4.tar", &[])
        .ended(1)
        .says(&["WIDENING_UNPROVEN", "no_solver"]);
    site.configure("\nsolver = \"nothing\"", "");
    node.reload("reloaded");
    install("site-4.tar", &[]).ended(0);
}

/// What was for an emergency, or is past its end, is no measure of what may go on: a bundle that permits no more than it
/// does is no less new.
#[test]
fn what_was_for_an_emergency_or_has_ended_is_never_the_base() {
    const TEST: &str = "what_was_for_an_emergency_or_has_ended_is_never_the_base";
    if !has_solver(TEST) {
        return;
    }
    if !Path::new(FAKETIME).exists() {
        not_run(TEST, "libfaketime is not installed");
        return;
    }
    let site = Site::new();
    site.write("policy/tests/base.json", "[]");
    let policy = site.read("policy/policies/base.cedar");
    let permits = |path: &str| {
        let changed = policy.replace("\"/srv/*\"", path);
        site.write("policy/policies/base.cedar", &changed);
    };
    let at = |seconds: i64| {
        let then = jiff::Timestamp::now().checked_add(jiff::SignedDuration::from_secs(seconds));
        json!(then.unwrap().to_string())
    };
    let (made, ends) = (at(-7_200), at(7_200));
    let bundle = |name: &str, epoch: u64, key: &str, end: Option<&Value>| {
        site.bundle(name, key, |manifest| {
            manifest["epoch"] = json!(epoch);
            manifest["created_at"] = made.clone();
            if key == "glass.key" {
                manifest["role"] = json!("break-glass");
            }
            if let Some(end) = end {
                manifest["expires_at"] = end.clone();
            }
        });
    };
    demand_two_signatures(&site);
    permits("\"/srv/*\"");
    bundle("regular.tar", 1, "policy.key", None);
    permits("\"/*\"");
    bundle("glass.tar", 2, "glass.key", Some(&ends));
    permits("\"/etc/*\"");
    bundle("after.tar", 3, "policy.key", None);
    permits("\"/srv/pub/*\"");
    bundle("narrow.tar", 3, "policy.key", None);

    let node = site.start();
    let install = |archive: &str, more: &[&str]| {
        site.tidelock(&[&["bundle", "install", archive, "--apply"], more].concat())
    };
    let verdict = |archive: &str| {
        let widening = site.json(&["policy", "plan", archive])["widening"].clone();
        let reason = widening["reason"].as_str().map(str::to_owned);
        reason.unwrap_or_else(|| widening["verdict"].as_str().unwrap().to_owned())
    };
    let twice = |archive: &str| {
        let second = format!("{archive}.second.sig");
        site.ok(&[
            "bundle",
            "sign",
            archive,
            "--key",
            "second.key",
            "--out",
            &second,
        ]);
        let first = format!("{archive}.sig");
        install(archive, &["--sig", &first, "--sig", &second]).ended(0);
    };
    // The control: what is an ordinary bundle measures the next one.
    twice("regular.tar");
    assert_eq!(verdict("narrow.tar"), "not_wider");
    assert_eq!(verdict("after.tar"), "wider");
    // An emergency needs neither proof nor signatures, and lends what it permits to nobody.
    install("glass.tar", &[]).ended(0);
    for archive in ["after.tar", "narrow.tar"] {
        assert_eq!(verdict(archive), "base_ended", "{archive}");
        install(archive, &[]).ended(1).says(&["WIDENING_UNPROVEN"]);
    }
    assert_eq!(site.status()["bundle"]["epoch"], 2);

    // Until its end a bundle measures what ends no later than it.
    permits("\"/srv/*\"");
    bundle("ending.tar", 3, "policy.key", Some(&ends));
    twice("ending.tar");
    permits("\"/srv/pub/*\"");
    bundle("sooner.tar", 4, "policy.key", Some(&ends));
    bundle("endless.tar", 4, "policy.key", None);
    assert_eq!(verdict("sooner.tar"), "not_wider");
    assert_eq!(verdict("endless.tar"), "wider");
    node.stop();
    let later = [
        ("LD_PRELOAD", FAKETIME),
        ("FAKETIME", "+3h"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    let node = site.start_with(&later);
    assert_eq!(site.status()["bundle"]["epoch"], 3);
    assert_eq!(verdict("endless.tar"), "base_ended");
    install("endless.tar", &[])
        .ended(1)
        .says(&["WIDENING_UNPROVEN"]);
    node.stop();
}
