//! Trust on a running node: keys that are replaced, statements of freshness, emergencies, releases, and
//! a clock that lies.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Site, not_run, openssl, over_unix, request, until};
use serde_json::{Value, json};
use tidelock_segments::volume::{EntryMark, VolumeEntry, VolumeReader, VolumeWriter};

/// A site whose trust file gives the policy key the role of replacing it, and two more keys.
fn site() -> Site {
    let site = Site::new();
    for name in ["policy", "next", "glass"] {
        if name != "policy" {
            site.signing_key(&format!("{name}.key"));
        }
        let public = openssl(
            site.path("").as_path(),
            &["pkey", "-in", &format!("{name}.key"), "-pubout"],
        );
        site.write(&format!("{name}.pub"), &public);
    }
    fs::remove_file(site.path("trust.toml")).unwrap();
    init(&site, "trust.toml", "policy");
    site
}

/// Writes a trust file in which `name` holds the roles.
fn init(site: &Site, out: &str, name: &str) {
    let key = format!("{name}={name}.pub:policy,trust,release");
    site.ok(&[
        "trust",
        "init",
        "--domain",
        "harbour",
        "--key",
        &key,
        "--key",
        "glass=glass.pub:break-glass",
        "--out",
        out,
    ]);
}

/// Asks until the answer is not that of a disk or an engine that is busy with something else.
fn may_read(site: &Site, path: &str) -> (String, String) {
    let busy = ["AUDIT_UNAVAILABLE", "DEADLINE"];
    until("an answer of the policy", || {
        let answer = site.may_read(path);
        (!busy.contains(&answer.1.as_str())).then_some(answer)
    })
}

fn decides(site: &Site) {
    let word = |d: &str, r: &str| (d.to_owned(), r.to_owned());
    assert_eq!(may_read(site, "/srv/a.txt"), word("allow", "POLICY_ALLOW"));
    assert_eq!(may_read(site, "/etc/shadow"), word("deny", "NO_MATCH"));
}

/// Signs with openssl alone.
fn openssl_sign(site: &Site, key: &str, file: &str, out: &str) {
    openssl(
        site.path("").as_path(),
        &["dgst", "-sha256", "-sign", key, "-out", out, file],
    );
}

#[test]
fn keys_are_replaced_on_a_running_node_and_stay_so() {
    let site = site();
    let node = site.start_deciding();
    assert_eq!(site.status()["trust"]["version"], 1);
    init(&site, "next.toml", "next");
    site.ok(&[
        "trust",
        "rotate",
        "--from",
        "trust.toml",
        "--to",
        "next.toml",
        "--out",
        "trust-2.json",
    ]);
    openssl_sign(&site, "policy.key", "trust-2.json", "old.sig");
    site.ok(&[
        "trust",
        "sign",
        "trust-2.json",
        "--key",
        "next.key",
        "--out",
        "new.sig",
    ]);
    // One of the two is not enough, at the desk or at the node; a refusal by the node is recorded.
    let one = ["trust-2.json", "--sig", "old.sig"];
    let both = [
        "trust-2.json",
        "--sig",
        "policy=old.sig",
        "--sig",
        "new.sig",
    ];
    let with = |head: &[&str], signed: &[&str], tail: &[&str]| -> Vec<String> {
        let words = head.iter().chain(signed).chain(tail);
        words.map(|word| (*word).to_owned()).collect()
    };
    let run = |words: Vec<String>| {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        site.tidelock(&words)
    };
    let trust = ["--trust", "trust.toml"];
    run(with(&["trust", "verify"], &one, &trust))
        .ended(1)
        .says(&["STATEMENT_SIGNATURE"]);
    run(with(&["trust", "verify"], &both, &trust)).ended(0);
    run(with(&["trust", "install"], &one, &["--apply"]))
        .ended(1)
        .says(&["STATEMENT_SIGNATURE"]);
    assert_eq!(
        site.events("statement_rejected")[0]["code"],
        "STATEMENT_SIGNATURE"
    );
    // The plan says that the bundle would be left without its signer, and changes nothing.
    run(with(&["trust", "install"], &both, &[]))
        .ended(0)
        .says(&["deciding_bundle_stays_trusted", "false"]);
    assert_eq!(site.status()["trust"]["version"], 1);
    decides(&site);
    // So the same content is signed by the new key first.
    site.ok(&[
        "bundle",
        "sign",
        "site-1.tar",
        "--key",
        "next.key",
        "--out",
        "site-1.next.sig",
    ]);
    run(with(&["trust", "install"], &both, &["--apply"])).ended(0);
    assert_eq!(site.events("trust_rotated").len(), 1);
    assert_eq!(site.status()["trust"]["version"], 2);
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    site.ok(&[
        "bundle",
        "install",
        "site-1.tar",
        "--sig",
        "site-1.next.sig",
        "--apply",
    ]);
    decides(&site);
    // The replaced key signs nothing any more.
    site.bundle("old.tar", "policy.key", |m| m["epoch"] = json!(2));
    site.tidelock(&["bundle", "install", "old.tar", "--apply"])
        .ended(1)
        .says(&["BUNDLE_SIGNATURE"]);
    // A restart keeps it, with the file that the chain began with still in its place.
    node.stop();
    let node = site.start();
    assert_eq!(site.status()["trust"]["version"], 2);
    decides(&site);
    let shown = site.json(&["trust", "show", "--toml"]);
    // A file that is in no way part of the chain is refused at a reload and at a start.
    let kept = site.read("trust.toml");
    fs::remove_file(site.path("trust.toml")).unwrap();
    site.signing_key("other.key");
    let other = openssl(
        site.path("").as_path(),
        &["pkey", "-in", "other.key", "-pubout"],
    );
    site.write("other.pub", &other);
    init(&site, "trust.toml", "other");
    let why = node.reload("reload_refused");
    assert!(
        why["why"].as_str().unwrap().contains("not in the chain"),
        "{why}"
    );
    decides(&site);
    node.stop();
    let node = site.start();
    let faults = site.events("policy_trust_unusable");
    assert!(
        faults[0]["why"]
            .as_str()
            .unwrap()
            .contains("not in the chain")
    );
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    // The ways out: the old file, or the current document as a file.
    for text in [kept, shown["toml"].as_str().unwrap().to_owned()] {
        site.write("trust.toml", &text);
        node.reload("reloaded");
        assert_eq!(site.status()["trust"]["version"], 2);
        decides(&site);
    }
    node.stop();
}

#[test]
fn a_statement_of_the_authority_makes_the_policy_younger_and_nothing_else_does() {
    let site = site();
    // Made long ago, by its own word.
    site.bundle("old.tar", "policy.key", |m| {
        m["created_at"] = json!("2026-01-01T00:00:00Z");
        for class in m["classes"].as_object_mut().unwrap().values_mut() {
            class["stale_after_s"] = json!(3_600);
            class["restrict_after_s"] = json!(7_200);
            class["close_after_s"] = json!(3_000_000_000_u64);
            class["when_restricted"] = json!("continue");
        }
    });
    let node = site.start();
    site.ok(&["bundle", "install", "old.tar", "--apply"]);
    assert_eq!(site.status()["posture"], "restricted");
    let old_s = site.status()["policy_age_s"].as_u64().unwrap();
    assert!(old_s > 7_200);
    let fresh = ["bundle", "freshness"];
    site.ok(&[&fresh[..], &["make", "old.tar", "--out", "fresh.json"]].concat());
    openssl_sign(&site, "glass.key", "fresh.json", "wrong.sig");
    openssl_sign(&site, "policy.key", "fresh.json", "right.sig");
    let install = |sig: &str, tail: &[&str]| {
        let words = [&fresh[..], &["install", "fresh.json", "--sig", sig], tail];
        site.tidelock(&words.concat())
    };
    install("wrong.sig", &["--apply"])
        .ended(1)
        .says(&["STATEMENT_SIGNATURE"]);
    install("right.sig", &[]).ended(0);
    assert_eq!(
        site.status()["posture"],
        "restricted",
        "a plan changes nothing"
    );
    install("right.sig", &["--apply"]).ended(0);
    assert_eq!(site.status()["posture"], "normal");
    assert!(site.status()["policy_age_s"].as_u64().unwrap() < 3_600);
    assert_eq!(site.events("policy_confirmed").len(), 1);
    // The same bundle again and a restart neither reset it nor lose it.
    let confirmed = site.status()["bundle"]["confirmed_unix_ms"].clone();
    site.ok(&["bundle", "install", "old.tar", "--apply"]);
    assert_eq!(site.status()["bundle"]["confirmed_unix_ms"], confirmed);
    node.stop();
    let node = site.start();
    assert_eq!(site.status()["bundle"]["confirmed_unix_ms"], confirmed);
    assert_eq!(site.status()["posture"], "normal");
    node.stop();
}

#[test]
fn an_emergency_bundle_is_short_loud_and_recorded() {
    let site = site();
    let node = site.start_deciding();
    let seconds = |ahead: i64| {
        let at = jiff_now().checked_add(jiff::SignedDuration::from_secs(ahead));
        json!(at.unwrap().to_string())
    };
    let glass = |name: &str, epoch: u64, ends: i64| {
        site.bundle(name, "glass.key", |m| {
            m["epoch"] = json!(epoch);
            m["role"] = json!("break-glass");
            m["created_at"] = seconds(-7_200);
            m["expires_at"] = seconds(ends);
        });
    };
    glass("over.tar", 2, -60);
    site.tidelock(&["bundle", "install", "over.tar", "--apply"])
        .ended(1)
        .says(&["BUNDLE_EXPIRED"]);
    // It is signed for now: it does not wait for its time, as a regular one does.
    site.bundle("later.tar", "glass.key", |m| {
        m["epoch"] = json!(2);
        m["role"] = json!("break-glass");
        m["created_at"] = seconds(-60);
        m["not_before"] = seconds(3_600);
        m["expires_at"] = seconds(7_200);
    });
    site.tidelock(&["bundle", "install", "later.tar", "--apply"])
        .ended(1)
        .says(&["BUNDLE_NOT_YET"]);
    assert_eq!(site.status()["activation"]["scheduled"], json!([]));
    glass("glass.tar", 2, 7_200);
    site.ok(&["bundle", "install", "glass.tar", "--apply"]);
    let status = site.status();
    assert_eq!(status["bundle"]["role"], "break-glass");
    assert_eq!(status["posture"], "stale");
    assert_eq!(site.events("break_glass_activated")[0]["epoch"], 2);
    site.tidelock(&["doctor"]).says(&["break-glass"]);
    // It never goes back below the floor, and a regular bundle ends it.
    glass("back.tar", 1, 7_200);
    site.tidelock(&["bundle", "install", "back.tar", "--apply"])
        .ended(1)
        .says(&["BUNDLE_EPOCH"]);
    site.bundle("after.tar", "policy.key", |m| m["epoch"] = json!(3));
    site.ok(&["bundle", "install", "after.tar", "--apply"]);
    assert_eq!(site.status()["posture"], "normal");
    node.stop();
}

fn jiff_now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// Writes a blob of an image layout and answers its descriptor.
fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let hex: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    fs::write(layout.join("blobs/sha256").join(&hex), bytes).unwrap();
    json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len()})
}

/// A release in the layout `release`, signed by the policy key: the path of its program. What is done to the
/// lock file comes after its fingerprint and before everything that is made over it.
fn released(site: &Site, tamper: impl FnOnce(&mut Value)) -> PathBuf {
    let layout: PathBuf = site.path("release");
    if layout.exists() {
        fs::remove_dir_all(&layout).unwrap();
    }
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::create_dir_all(layout.join("signatures")).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let mut lock = json!({"format": 1, "name": "tidelock", "version": "99.0.0",
        "created_at": "2026-01-31T12:00:00Z"});
    site.write("lock.json", &lock.to_string());
    lock["fingerprint"] =
        site.json(&["release", "fingerprint", "lock.json"])["fingerprint"].clone();
    tamper(&mut lock);
    let lock = blob(
        &layout,
        "application/vnd.tidelock.lock.v1+json",
        lock.to_string().as_bytes(),
    );
    let program = blob(
        &layout,
        "application/vnd.oci.image.layer.v1.tar",
        b"program",
    );
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "layers": [lock, program],
    });
    let image = blob(
        &layout,
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    let index = json!({"schemaVersion": 2, "manifests": [image]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let path_of = |descriptor: &Value| {
        let hex = descriptor["digest"]
            .as_str()
            .unwrap()
            .replace("sha256:", "");
        layout.join("blobs/sha256").join(hex)
    };
    openssl_sign(
        site,
        "policy.key",
        path_of(&image).to_str().unwrap(),
        "release/signatures/policy.sig",
    );
    path_of(&program)
}

#[test]
fn a_release_that_a_node_rejects_is_recorded_with_its_step() {
    let site = site();
    let layout = site.path("release");
    let program_path = released(&site, |_| {});
    let verify = ["release", "verify", "--layout", "release"];
    let offline = [&verify[..], &["--trust", "trust.toml"]].concat();
    site.tidelock(&offline).ended(0).says(&["99.0.0 verifies"]);

    let node = site.start_deciding();
    let verified = site.json(&verify);
    assert_eq!(verified["signers"], json!(["policy"]));
    assert_eq!(site.events("release_verified").len(), 1);
    let rejected = |step: &str, code: &str, more: &[&str]| {
        let before = site.events("release_rejected").len();
        site.tidelock(&[&verify[..], more].concat())
            .ended(1)
            .says(&[code]);
        let events = site.events("release_rejected");
        assert_eq!(events.len(), before + 1);
        assert_eq!(
            (&events[before]["step"], &events[before]["code"]),
            (&json!(step), &json!(code))
        );
        // Offline the same, and it says that nobody recorded it.
        site.tidelock(&[&offline[..], more].concat())
            .ended(1)
            .says(&[code, "nothing was recorded"]);
    };
    rejected("version", "RELEASE_VERSION", &["--at-least", "99.0.1"]);
    rejected("version", "RELEASE_NAME", &["--name", "other"]);
    fs::write(&program_path, b"progrAm").unwrap();
    rejected("digests", "RELEASE_DIGEST", &[]);
    fs::write(&program_path, b"program").unwrap();
    fs::rename(layout.join("signatures"), site.path("aside")).unwrap();
    rejected("signatures", "RELEASE_SIGNATURE", &[]);
    symlink(site.path("aside"), layout.join("signatures")).unwrap();
    rejected("signatures", "RELEASE_LAYOUT", &[]);
    // Signed as it is, and all digests are right: only the fingerprint says that it was changed.
    released(&site, |lock| {
        lock["created_at"] = json!("2026-02-28T12:00:00Z");
    });
    rejected("fingerprint", "RELEASE_FINGERPRINT", &[]);
    // The control.
    released(&site, |_| {});
    site.ok(&verify);
    decides(&site);
    node.stop();
}

/// Debian's libfaketime, which tells a process another wall clock; its monotonic clocks stay.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

#[test]
fn inv_18_a_process_restarted_in_1970_goes_on_and_one_in_2100_closes() {
    if !Path::new(FAKETIME).exists() {
        not_run(
            "inv_18_a_process_restarted_in_1970_goes_on_and_one_in_2100_closes",
            "libfaketime is not installed",
        );
        return;
    }
    let site = site();
    let node = site.start_deciding();
    let before = site.status()["clock"]["trusted_unix_ms"].as_u64().unwrap();
    node.stop();
    let clock_at = |year: &str| {
        let at = format!("@{year}-01-02 00:00:00");
        let fake = [
            ("LD_PRELOAD", FAKETIME),
            ("FAKETIME", at.as_str()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        let node = site.start_with(&fake);
        (node, site.status())
    };
    // Behind: trusted time goes on from where it was, nothing is revived, the policy decides.
    let (node, status) = clock_at("1970");
    assert!(status["clock"]["trusted_unix_ms"].as_u64().unwrap() >= before);
    assert_eq!(status["clock"]["suspect"], false);
    assert_eq!(status["posture"], "normal");
    decides(&site);
    node.stop();
    // Far ahead: closed, and time is not moved by it.
    let (node, status) = clock_at("2100");
    let trusted = status["clock"]["trusted_unix_ms"].as_u64().unwrap();
    assert!(
        (before..before + 24 * 3_600_000).contains(&trusted),
        "{trusted}"
    );
    assert_eq!(status["clock"]["suspect"], true);
    let denied = ("deny".to_owned(), "POSTURE_CLOSED".to_owned());
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    node.stop();
    // A right clock alone does not resolve it; an operator does, on record.
    let node = site.start();
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    site.ok(&["clock", "accept", "--apply"]);
    until("the posture to follow", || {
        (site.status()["posture"] == "normal").then_some(())
    });
    decides(&site);
    node.stop();
}

#[test]
fn documents_and_statements_travel_on_media_to_a_node_that_was_dark() {
    let site = site();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    fs::create_dir(site.path("m")).unwrap();
    let a = site.read("tidelock.toml");
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    let node = site.start_deciding();
    for (from, to) in [("trust.toml", "t2.json"), ("t2.json", "t3.json")] {
        let keys = ["--to", "trust.toml"];
        site.ok(&[
            &["trust", "rotate", "--from", from][..],
            &keys,
            &["--out", to],
        ]
        .concat());
        openssl_sign(&site, "policy.key", to, "t.sig");
        site.ok(&["trust", "install", to, "--sig", "t.sig", "--apply"]);
    }
    site.ok(&[
        "bundle",
        "freshness",
        "make",
        "site-1.tar",
        "--out",
        "f.json",
    ]);
    openssl_sign(&site, "policy.key", "f.json", "f.sig");
    site.ok(&[
        "bundle",
        "freshness",
        "install",
        "f.json",
        "--sig",
        "f.sig",
        "--apply",
    ]);
    let confirmed = site.status()["bundle"]["confirmed_unix_ms"].clone();
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);
    node.stop();

    site.write("tidelock.toml", &b);
    let node = site.start();
    assert_eq!(site.status()["trust"]["version"], 1);
    site.ok(&["segment", "import", "m", "--apply"]);
    let status = site.status();
    assert_eq!(status["trust"]["version"], 3);
    assert_eq!(status["bundle"]["epoch"], 1);
    assert_eq!(status["bundle"]["confirmed_unix_ms"], confirmed);
    decides(&site);
    // Again, and after a restart, the same.
    site.ok(&["segment", "import", "m", "--apply"]);
    node.stop();
    let node = site.start();
    assert_eq!(site.status()["trust"]["version"], 3);
    assert_eq!(site.status()["bundle"]["confirmed_unix_ms"], confirmed);
    node.stop();
}

/// The policy segments of bundles that the running node holds.
fn bundle_segments(site: &Site) -> Vec<String> {
    let listed = site.json(&["segment", "ls", "--origin", "policy/site"]);
    let segments = listed["segments"].as_array().unwrap();
    let mut ids: Vec<String> = segments
        .iter()
        .map(|s| s["id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    ids
}

/// After a key was replaced, a bundle that the new key had signed stayed where it was installed: nodes held a
/// segment of this content already, with signatures that no longer counted, and took no other. While the
/// signatures of a segment are enough, others make no segment of it, be they junk of a peer that fills disks.
#[test]
fn a_bundle_that_was_signed_again_takes_the_place_of_one_that_lost_its_signers_and_junk_does_not() {
    let site = site();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
    fs::create_dir(site.path("m")).unwrap();
    fs::create_dir(site.path("m2")).unwrap();
    let a = site.read("tidelock.toml");
    let b = a
        .replace("id = \"a\"", "id = \"b\"")
        .replace("\"root\"", "\"root-b\"")
        .replace("\"a.crt", "\"b.crt")
        .replace("\"a.key", "\"b.key");
    // b has the bundle under the first key.
    site.write("tidelock.toml", &b);
    let node = site.start_deciding();
    assert!(node.stop().success());

    site.write("tidelock.toml", &a);
    let node = site.start_deciding();
    let first = bundle_segments(&site);
    assert_eq!(first.len(), 1, "{first:?}");
    // Junk beside the one signature that counts: activated again, and no segment of its own.
    site.signing_key("nobody.key");
    let sign = |key: &str, out: &str| {
        site.ok(&["bundle", "sign", "site-1.tar", "--key", key, "--out", out]);
    };
    for junk in ["j1.sig", "j2.sig", "j3.sig"] {
        sign("nobody.key", junk);
        let archive = fs::read(site.path("site-1.tar")).unwrap();
        let signatures = ["site-1.tar.sig", junk]
            .map(|sig| fs::read(site.path(sig)).unwrap())
            .map(|sig| tidelock_policy::decode_signature(&sig).unwrap());
        give(&site, archive, signatures.to_vec());
        assert_eq!(bundle_segments(&site), first, "{junk} made a segment");
    }

    init(&site, "next.toml", "next");
    let next = ["--to", "next.toml", "--out", "trust-2.json"];
    site.ok(&[&["trust", "rotate", "--from", "trust.toml"][..], &next].concat());
    openssl_sign(&site, "policy.key", "trust-2.json", "old.sig");
    openssl_sign(&site, "next.key", "trust-2.json", "new.sig");
    let both = ["--sig", "old.sig", "--sig", "new.sig", "--apply"];
    site.ok(&[&["trust", "install", "trust-2.json"][..], &both].concat());
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    sign("next.key", "again.sig");
    let again = ["--sig", "again.sig", "--apply"];
    site.ok(&[&["bundle", "install", "site-1.tar"][..], &again].concat());
    decides(&site);
    let second = bundle_segments(&site);
    assert_eq!(second.len(), 1, "{second:?}");
    assert_ne!(second, first);
    // Once more, with what signed it before beside it: what is held is enough.
    let archive = fs::read(site.path("site-1.tar")).unwrap();
    let signatures = ["site-1.tar.sig", "again.sig", "j1.sig"]
        .map(|sig| fs::read(site.path(sig)).unwrap())
        .map(|sig| tidelock_policy::decode_signature(&sig).unwrap());
    give(&site, archive, signatures.to_vec());
    assert_eq!(bundle_segments(&site), second);
    site.ok(&["segment", "export", "--to", "m", "--for", "b"]);
    assert!(node.stop().success());

    // The other node follows: first it loses its signers, then it takes the package that has them.
    site.write("tidelock.toml", &b);
    let node = site.start();
    decides(&site);
    assert_eq!(bundle_segments(&site), first);
    backwards(&site, "m");
    site.ok(&["segment", "import", "m", "--apply"]);
    assert_eq!(site.status()["trust"]["version"], 2);
    assert_eq!(bundle_segments(&site), second);
    decides(&site);
    assert!(node.stop().success());
    let node = site.start();
    decides(&site);
    assert!(node.stop().success());
}

/// Turns the one volume on a medium round, so that the bundle lies before the document that its signer is
/// named in: what lies on a medium is in no order that an import may rely on.
fn backwards(site: &Site, medium: &str) {
    let volumes = fs::read_dir(site.path(medium)).unwrap();
    let mut volumes = volumes.map(|entry| entry.unwrap().path());
    let path = volumes
        .find(|path| path.extension().is_some_and(|e| e == "tvol"))
        .unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut reader = VolumeReader::open(bytes.as_slice()).unwrap();
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        entries.push(entry);
    }
    entries.reverse();
    let place = |name: &str| {
        let is_it = |entry: &VolumeEntry| match &entry.mark {
            EntryMark::Segment(segment) => segment.origin.policy_name() == Some(name),
            EntryMark::Receipt(_) => false,
        };
        entries.iter().position(is_it).unwrap()
    };
    assert!(place("site") < place(tidelock_policy::TRUST_ORIGIN));
    let mut writer = VolumeWriter::new(Vec::new(), reader.header()).unwrap();
    for entry in &entries {
        writer.push(entry).unwrap();
    }
    let is_last = reader.is_last().unwrap();
    fs::write(&path, writer.finish(is_last).unwrap()).unwrap();
}

/// Installs a package as a peer could have made it: with these signatures, whatever they are worth.
fn give(site: &Site, archive: Vec<u8>, signatures: Vec<Vec<u8>>) {
    let package = tidelock_policy::Package {
        archive,
        signatures,
    };
    let body = json!({"package": BASE64_STANDARD.encode(package.encode().unwrap())}).to_string();
    let ask = request(
        "POST",
        "/v1/admin/bundle.install?apply=true",
        &[],
        body.as_bytes(),
    );
    let (status, answer) = over_unix(&site.path("s"), &ask).unwrap();
    assert_eq!(status, 200, "{answer}");
}

/// The chain of trust documents was damaged, and the store had lost the newest of them: the node was made
/// again from the others, and trusted keys that had been replaced.
#[test]
fn inv_16_a_node_that_lost_its_newest_trust_document_denies_until_it_has_it_again() {
    let site = site();
    let node = site.start_deciding();
    let mut installs = Vec::new();
    for (from, to) in [("trust.toml", "t2.json"), ("t2.json", "t3.json")] {
        let next = ["--to", "trust.toml", "--out", to];
        site.ok(&[&["trust", "rotate", "--from", from][..], &next].concat());
        let signature = format!("{to}.sig");
        openssl_sign(&site, "policy.key", to, &signature);
        installs.push([to.to_owned(), signature]);
        let [to, signature] = installs.last().unwrap();
        site.ok(&["trust", "install", to, "--sig", signature, "--apply"]);
    }
    let listed = site.json(&["segment", "ls", "--origin", "policy/0.tidelock.trust"]);
    let newest = listed["segments"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .clone();
    assert_eq!(newest["sequence"], 3, "{listed}");
    assert!(node.stop().success());

    let hex = newest["id"].as_str().unwrap().trim_start_matches("blake3:");
    let file = find(&site.path("root"), hex).unwrap();
    fs::remove_file(file).unwrap();
    let chain = site.path("root/policy/trust");
    let whole = fs::read(&chain).unwrap();
    fs::write(&chain, whole.get(..whole.len() / 2).unwrap()).unwrap();

    let node = site.start();
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    let faults = site.events("policy_trust_unusable");
    let why = faults.last().unwrap()["why"].as_str().unwrap();
    assert!(
        why.contains("is lost, what is left ends at version 2"),
        "{why}"
    );
    // Nor does reading everything again help, or a restart.
    node.reload("reload_refused");
    assert_eq!(may_read(&site, "/srv/a.txt"), denied);
    // The very document does.
    let [to, signature] = installs.last().unwrap();
    site.ok(&["trust", "install", to, "--sig", signature, "--apply"]);
    assert_eq!(site.status()["trust"]["version"], 3);
    decides(&site);
    assert!(node.stop().success());
    let node = site.start();
    decides(&site);
    assert!(node.stop().success());
}

/// The file below a directory whose name holds this text.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    let mut all = fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    all.find_map(|path| match path.is_dir() {
        true => find(&path, name),
        false => path
            .to_str()
            .is_some_and(|path| path.contains(name))
            .then_some(path),
    })
}
