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
    site.signing_key("second.key");
    for key in ["policy", "second"] {
        let public = openssl(
            &site.path(""),
            &["pkey", "-in", &format!("{key}.key"), "-pubout"],
        );
        site.write(&format!("{key}.pub"), &public);
    }
    fs::remove_file(site.path("trust.toml")).unwrap();
    site.ok(&[
        "trust",
        "init",
        "--domain",
        "harbour",
        "--key",
        "first=policy.pub:policy",
        "--key",
        "second=second.pub:policy",
        "--threshold",
        "policy=1",
        "--out",
        "trust.toml",
    ]);
    let trust = site.read("trust.toml");
    let (head, keys) = trust.split_once("[[keys]]").unwrap();
    site.write(
        "trust.toml",
        &format!("{head}[activation]\nwidening_signatures = 2\n\n[[keys]]{keys}"),
    );
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
