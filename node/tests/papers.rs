//! Certificates and CRLs of every doubtful kind: the transport stays closed with a reason that
//! status, doctor and log show, and decisions go on (ruling 12).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{fs, path::Path};

use common::{Site, chmod, openssl, over_unix, request, until};

#[test]
fn an_expired_certificate_closes_the_transport_and_not_the_door() {
    let site = Site::new();
    site.expired_certificate();
    let node = site.start_deciding();
    let why = site.transport_closed();
    assert!(
        why.contains("CERT_EXPIRED") || why.contains("expired"),
        "{why}"
    );
    site.decides();
    assert!(
        !site.events("transport_closed").is_empty(),
        "it is recorded"
    );

    // The control: a good certificate opens it, without a restart.
    site.ok(&["ca", "renew", "--dir", "ca", "--node", "a"]);
    node.reload("reloaded");
    site.transport_open();
    site.decides();
    assert!(!site.events("transport_opened").is_empty());
}

#[test]
fn changed_papers_are_taken_without_a_signal_and_whole_or_not_at_all() {
    let site = Site::new();
    site.expired_certificate();
    let _node = site.start_deciding();
    site.transport_closed();
    site.ok(&["ca", "renew", "--dir", "ca", "--node", "a"]);
    site.transport_open();
    assert_eq!(site.events("papers_taken").len(), 1);
    assert!(site.status()["papers"]["refused"].is_null());

    // Half of another pair: the old pair stays in use, and everybody says so.
    let key = fs::read(site.path("a.key")).unwrap();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "z"]);
    fs::copy(site.path("z.key"), site.path("a.key")).unwrap();
    let refused = until("the faulty set to be refused", || {
        site.status()["papers"]["refused"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(refused.contains("KEY_MISMATCH"), "{refused}");
    site.ok(&["status"]).says(&["warning", "KEY_MISMATCH"]);
    site.transport_open();

    // A revocation does not wait for the key to be mended.
    site.ok(&["ca", "revoke", "--dir", "ca", "z", "--apply"]);
    site.ok(&["ca", "crl", "--dir", "ca"]);
    fs::copy(site.path("ca/crl.pem"), site.path("site.crl")).unwrap();
    until("the new CRL to be in force", || {
        (site.status()["crls"][0]["number"] == 2).then_some(())
    });
    assert_eq!(site.status()["crls"][0]["revoked"], 1);

    fs::write(site.path("a.key"), key).unwrap();
    until("the mended set to be taken", || {
        site.status()["papers"]["refused"].is_null().then_some(())
    });
    site.transport_open();
    site.decides();
    assert_eq!(site.events("papers_refused").len(), 1, "told once");
}

#[test]
fn the_end_of_a_paper_is_told_in_time() {
    let site = Site::new();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "a", "--days", "10"]);
    let _node = site.start_deciding();
    let ends = until("the word of the end", || {
        let ends = site.events("paper_ends");
        (!ends.is_empty()).then_some(ends)
    });
    assert_eq!(ends.len(), 1, "CA and CRL last longer: {ends:?}");
    assert_eq!(ends[0]["paper"], "certificate");
    assert_eq!(ends[0]["days_left"], 9);
    site.ok(&["status"])
        .says(&["the certificate of a ends in 9 days"]);
    let endings = site.status()["papers"]["endings"].clone();
    let warned = |paper: &str| {
        let of = |ending: &&serde_json::Value| ending["paper"] == paper;
        endings.as_array().unwrap().iter().find(of).unwrap()["warn"].clone()
    };
    assert_eq!(
        ["certificate", "ca", "crl"].map(warned),
        [true, false, false].map(serde_json::Value::from)
    );
    let (status, metrics) =
        over_unix(&site.path("s"), &request("GET", "/metrics", &[], b"")).unwrap();
    assert_eq!(status, 200);
    for paper in ["certificate", "ca", "crl"] {
        let line = format!("tidelock_paper_ends_timestamp_seconds{{paper=\"{paper}\"");
        assert!(metrics.contains(&line), "{metrics}");
    }

    // The control: a certificate that lasts is not worth a word.
    site.ok(&["ca", "renew", "--dir", "ca", "--node", "a"]);
    until("the new certificate", || {
        (!site.events("papers_taken").is_empty()).then_some(())
    });
    let text = site.ok(&["status"]).out;
    assert!(!text.contains("warning"), "{text}");
}

#[test]
fn a_revoked_own_certificate_closes_the_transport_and_not_the_door() {
    let site = Site::new();
    let node = site.start_deciding();
    site.transport_open();
    site.ok(&["ca", "revoke", "--dir", "ca", "a", "--apply"]);
    site.ok(&["ca", "crl", "--dir", "ca"]);
    site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    let why = site.transport_closed();
    assert!(why.to_lowercase().contains("revoked"), "{why}");
    site.decides();
    site.ok(&["ca", "issue", "--dir", "ca", "--node", "a"]);
    node.reload("reloaded");
    site.transport_open();
}

#[test]
fn an_expired_crl_is_mended_by_an_import_without_a_restart() {
    let site = Site::new();
    site.expired_crl(1);
    let _node = site.start_deciding();
    let why = site.transport_closed();
    assert!(why.contains("CRL"), "{why}");
    assert_eq!(site.status()["crls"][0]["freshness"], "expired");
    site.decides();

    // Ruling 11: such a node can meet nobody, so its own door takes the cure.
    site.ok(&["ca", "crl", "--dir", "ca", "--days", "90"]);
    site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    site.transport_open();
    assert_eq!(site.status()["crls"][0]["number"], 2);
    site.decides();

    // INV-16: the older one does not come back.
    site.tidelock(&["crl", "import", "site.crl", "--apply"])
        .ended(1)
        .says(&["CRL_OLDER"]);
    assert_eq!(site.status()["crls"][0]["number"], 2);
    site.transport_open();
}

#[test]
fn an_imported_crl_outlives_a_restart() {
    let site = Site::new();
    site.expired_crl(1);
    let node = site.start();
    site.transport_closed();
    site.ok(&["ca", "crl", "--dir", "ca", "--days", "90"]);
    site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    assert!(node.stop().success());
    let _node = site.start();
    site.transport_open();
    assert_eq!(site.status()["crls"][0]["number"], 2);
    assert!(
        site.events("crl_not_loaded").is_empty(),
        "the older file is no fault"
    );
}

#[test]
fn without_a_crl_the_transport_stays_closed() {
    let site = Site::new();
    fs::rename(site.path("site.crl"), site.path("aside.crl")).unwrap();
    let node = site.start_deciding();
    let why = site.transport_closed();
    assert!(why.contains("CRL"), "{why}");
    site.decides();
    let faults = site.events("crl_not_loaded");
    assert!(
        faults[0]["file"].as_str().unwrap().ends_with("site.crl"),
        "{faults:?}"
    );

    // Either way out: the file comes back and the node reloads, or it is imported.
    fs::rename(site.path("aside.crl"), site.path("site.crl")).unwrap();
    node.reload("reloaded");
    site.transport_open();
}

#[test]
fn a_crl_by_another_ca_is_not_applied() {
    let site = Site::new();
    site.ok(&["ca", "init", "--dir", "other", "--domain", "harbour"]);
    site.configure("\"site.crl\"", "\"other/crl.pem\"");
    let _node = site.start_deciding();
    site.transport_closed();
    let faults = site.events("crl_not_loaded");
    let why = faults[0]["why"].as_str().unwrap();
    assert!(why.contains("CRL_"), "{faults:?}");
    site.decides();

    let before = site.status()["crls"].clone();
    let refused = site
        .tidelock(&["crl", "import", "other/crl.pem", "--apply"])
        .ended(1);
    let code = why.split(':').next().unwrap();
    refused.says(&[code]);
    assert_eq!(site.status()["crls"], before);

    for (name, bytes) in [
        ("empty", b"".as_slice()),
        ("text", b"no CRL at all"),
        (
            "pem",
            b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
        ),
    ] {
        fs::write(site.path(name), bytes).unwrap();
        site.tidelock(&["crl", "import", name, "--apply"])
            .ended(1)
            .says(&["CRL_"]);
    }
    site.tidelock(&["crl", "import", "nowhere", "--apply"])
        .ended(2)
        .says(&["nowhere"]);
    // A flipped bit in a good one.
    let mut der = fs::read(der_of(&site, "site.crl")).unwrap();
    let last = der.len() - 1;
    der[last] ^= 1;
    fs::write(site.path("flipped.der"), &der).unwrap();
    site.tidelock(&["crl", "import", "flipped.der", "--apply"])
        .ended(1)
        .says(&["CRL_"]);
    assert_eq!(site.status()["crls"], before);

    // The control: the site's own, in DER this time.
    site.ok(&["crl", "import", "site.der", "--apply"]);
    site.transport_open();
}

fn der_of(site: &Site, name: &str) -> std::path::PathBuf {
    let out = "site.der";
    openssl(
        &site.path(""),
        &["crl", "-in", name, "-outform", "DER", "-out", out],
    );
    site.path(out)
}

/// A CA as a site that has one would make it, with nothing of ours.
fn openssl_ca(dir: &Path) {
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("index.txt"), "").unwrap();
    fs::write(dir.join("crlnumber"), "07\n").unwrap();
    fs::write(
        dir.join("openssl.cnf"),
        "[ca]\ndefault_ca = site\n[site]\ndatabase = index.txt\nnew_certs_dir = .\n\
         crlnumber = crlnumber\ncertificate = ca.crt\nprivate_key = ca.key\ndefault_md = sha256\n\
         policy = names\nrand_serial = yes\nunique_subject = no\ncrl_extensions = crl\n[names]\ncommonName = supplied\n\
         [crl]\nauthorityKeyIdentifier = keyid\n\
         [root]\nbasicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign,cRLSign\n\
         subjectKeyIdentifier = hash\n\
         [node]\nbasicConstraints = critical,CA:FALSE\nextendedKeyUsage = serverAuth,clientAuth\n\
         subjectAltName = URI:spiffe://harbour/domains/harbour/peers/a\nauthorityKeyIdentifier = keyid\n\
         [stranger]\nbasicConstraints = critical,CA:FALSE\nextendedKeyUsage = serverAuth,clientAuth\n\
         subjectAltName = URI:spiffe://lagoon/domains/lagoon/peers/a\nauthorityKeyIdentifier = keyid\n\
         [req]\ndistinguished_name = dn\n[dn]\n",
    )
    .unwrap();
    let curve = "ec_paramgen_curve:P-256";
    for key in ["ca.key", "a.key"] {
        openssl(
            dir,
            &[
                "genpkey",
                "-algorithm",
                "EC",
                "-pkeyopt",
                curve,
                "-out",
                key,
            ],
        );
        chmod(&dir.join(key), 0o600);
    }
    let root = [
        "req",
        "-x509",
        "-new",
        "-config",
        "openssl.cnf",
        "-key",
        "ca.key",
        "-subj",
    ];
    let rest = [
        "/CN=Harbour root",
        "-days",
        "3650",
        "-extensions",
        "root",
        "-out",
        "ca.crt",
    ];
    openssl(dir, &[root.as_slice(), &rest].concat());
    let ask = [
        "req",
        "-new",
        "-config",
        "openssl.cnf",
        "-key",
        "a.key",
        "-subj",
        "/CN=a",
    ];
    openssl(dir, &[ask.as_slice(), &["-out", "a.csr"]].concat());
}

fn openssl_issue(dir: &Path, extensions: &str, dates: &[&str]) {
    let issue = [
        "ca",
        "-batch",
        "-notext",
        "-config",
        "openssl.cnf",
        "-in",
        "a.csr",
        "-out",
    ];
    let rest = ["a.crt", "-extensions", extensions];
    openssl(dir, &[issue.as_slice(), &rest, dates].concat());
}

#[test]
fn a_site_with_its_own_ca_needs_nothing_of_ours() {
    let site = Site::new();
    let dir = site.path("x");
    openssl_ca(&dir);
    openssl_issue(&dir, "node", &["-days", "365"]);
    openssl(
        &dir,
        &[
            "ca",
            "-gencrl",
            "-config",
            "openssl.cnf",
            "-crldays",
            "30",
            "-out",
            "crl.pem",
        ],
    );
    site.configure("\"a.crt\"", "\"x/a.crt\"");
    site.configure("\"a.key\"", "\"x/a.key\"");
    site.configure("\"ca/ca.crt\"", "\"x/ca.crt\"");
    site.configure("\"site.crl\"", "\"x/crl.pem\"");
    let node = site.start_deciding();
    site.transport_open();
    assert_eq!(site.status()["crls"][0]["number"], 7);
    site.ok(&["doctor"]);

    // The same CA, and papers that are no good: each closes, each is left again.
    for (extensions, dates, word) in [
        (
            "node",
            ["-startdate", "200101000000Z", "-enddate", "210101000000Z"],
            "expired",
        ),
        (
            "node",
            ["-startdate", "490101000000Z", "-enddate", "491231000000Z"],
            "valid",
        ),
        (
            "stranger",
            ["-startdate", "200101000000Z", "-enddate", "491231000000Z"],
            "domain",
        ),
    ] {
        openssl_issue(&dir, extensions, &dates);
        node.reload("reloaded");
        let why = site.transport_closed().to_lowercase();
        assert!(why.contains(word), "{word}: {why}");
        site.decides();
        openssl_issue(&dir, "node", &["-days", "365"]);
        node.reload("reloaded");
        site.transport_open();
    }

    // A certificate that does not belong to the key is no reload at all: the old pair stays.
    fs::copy(site.path("a.crt"), dir.join("a.crt")).unwrap();
    let why = node.reload("reload_refused");
    assert!(
        why["why"].as_str().unwrap().contains("certificate"),
        "{why}"
    );
    site.transport_open();
}
