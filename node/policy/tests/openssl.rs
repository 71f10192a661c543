//! Signatures made by the `openssl` command line, and trust files out of its keys.
#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::Command;

use tidelock_policy::testing::{NODE_VERSION, template_builder};
use tidelock_policy::{
    BundleError, KeyError, LoadContext, Package, TrustFile, VerifiedBundle, decode_signature, sign,
};

const DOMAIN: &str = "site-1";

struct Keys(tempfile::TempDir);

impl Keys {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, arguments: &[&str]) -> Vec<u8> {
        let output = Command::new("openssl")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("these tests need the openssl command line");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    /// Makes `NAME.pem` (PKCS#8) and `NAME.pub`.
    fn key(&self, name: &str, algorithm: &[&str]) -> (String, String) {
        let (private, public) = (format!("{name}.pem"), format!("{name}.pub"));
        self.openssl(&[&["genpkey", "-out", &private], algorithm].concat());
        self.openssl(&["pkey", "-in", &private, "-pubout", "-out", &public]);
        (read(&self.path(&private)), read(&self.path(&public)))
    }

    fn p256(&self, name: &str) -> (String, String) {
        self.key(
            name,
            &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
        )
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn trust(threshold: usize, keys: &[(&str, &str)]) -> String {
    let mut text = format!("format = 1\ndomain = \"{DOMAIN}\"\nthreshold = {threshold}\n");
    for (id, pem) in keys {
        text.push_str(&format!(
            "[[keys]]\nid = \"{id}\"\npublic_key_pem = \"\"\"\n{pem}\"\"\"\n"
        ));
    }
    text
}

fn load(package: Package, trust: &str) -> Result<VerifiedBundle, BundleError> {
    let trust = TrustFile::parse(trust).unwrap();
    VerifiedBundle::load(
        package,
        &trust,
        &LoadContext::new(DOMAIN, NODE_VERSION).unwrap(),
    )
}

#[test]
fn signatures_by_the_openssl_command_line_verify() {
    let keys = Keys::new();
    let (_, alice) = keys.p256("alice");
    let (bob_private, bob) = keys.p256("bob");
    let archive = template_builder("base", DOMAIN, 0)
        .unwrap()
        .build()
        .unwrap();
    std::fs::write(keys.path("bundle.tar"), &archive).unwrap();
    let sign_with = |key: &str| keys.openssl(&["dgst", "-sha256", "-sign", key, "bundle.tar"]);
    let by_alice = decode_signature(&sign_with("alice.pem")).unwrap();
    // The form of `cosign sign-blob`: base64 of the same, on one line.
    std::fs::write(keys.path("bob.sig"), sign_with("bob.pem")).unwrap();
    let base64 = keys.openssl(&["base64", "-A", "-in", "bob.sig"]);
    let by_bob = decode_signature(&base64).unwrap();
    // And its bundle: the form of today, and the one before it.
    let base64 = String::from_utf8(base64).unwrap();
    for bundle in [
        format!(
            r#"{{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial":{{"publicKey":{{"hint":"bob"}}}},
                "messageSignature":{{"messageDigest":{{"algorithm":"SHA2_256","digest":""}},
                                     "signature":"{base64}"}}}}"#
        ),
        format!(r#"{{"base64Signature":"{base64}","cert":""}}"#),
    ] {
        assert_eq!(decode_signature(bundle.as_bytes()).as_ref(), Ok(&by_bob));
    }
    let text = trust(2, &[("alice", &alice), ("bob", &bob)]);

    let package = Package {
        archive: archive.clone(),
        signatures: vec![by_alice.clone(), by_bob],
    };
    assert_eq!(load(package, &text).unwrap().signers(), ["alice", "bob"]);
    let one = Package {
        archive: archive.clone(),
        signatures: vec![by_alice.clone()],
    };
    assert_eq!(
        load(one.clone(), &text).unwrap_err().code(),
        "BUNDLE_SIGNATURE"
    );
    let twice = Package {
        archive: archive.clone(),
        signatures: vec![by_alice, decode_signature(&sign_with("alice.pem")).unwrap()],
    };
    assert_eq!(
        load(twice, &text).unwrap_err(),
        BundleError::Signature {
            valid: 1,
            needed: 2,
            unknown: 0
        }
    );
    // One bit of the archive, or the other digest.
    let mut changed = one;
    changed.archive[600] ^= 1;
    assert_eq!(
        load(changed, &trust(1, &[("alice", &alice)]))
            .unwrap_err()
            .code(),
        "BUNDLE_SIGNATURE"
    );
    let sha512 = keys.openssl(&["dgst", "-sha512", "-sign", "alice.pem", "bundle.tar"]);
    let other = Package {
        archive: archive.clone(),
        signatures: vec![sha512],
    };
    assert_eq!(
        load(other, &trust(1, &[("alice", &alice)]))
            .unwrap_err()
            .code(),
        "BUNDLE_SIGNATURE"
    );

    // And the other way round: openssl verifies what `tidelock bundle sign` makes.
    std::fs::write(keys.path("ours.sig"), sign(&archive, &bob_private).unwrap()).unwrap();
    let verify = [
        "dgst",
        "-sha256",
        "-verify",
        "bob.pub",
        "-signature",
        "ours.sig",
        "bundle.tar",
    ];
    assert_eq!(keys.openssl(&verify), b"Verified OK\n");
}

#[test]
fn private_keys_are_read_in_the_forms_that_openssl_writes() {
    let keys = Keys::new();
    let (pkcs8, _) = keys.p256("a");
    assert!(sign(b"x", &pkcs8).is_ok());
    // Old style: a block of parameters, then the SEC 1 key.
    keys.openssl(&[
        "ecparam",
        "-name",
        "prime256v1",
        "-genkey",
        "-out",
        "sec1.pem",
    ]);
    let sec1 = read(&keys.path("sec1.pem"));
    assert!(sec1.contains("EC PARAMETERS"), "{sec1}");
    assert!(sign(b"x", &sec1).is_ok());
    keys.openssl(&[
        "pkcs8",
        "-topk8",
        "-in",
        "a.pem",
        "-passout",
        "pass:x",
        "-out",
        "locked.pem",
    ]);
    assert_eq!(
        sign(b"x", &read(&keys.path("locked.pem"))),
        Err(KeyError::Encrypted)
    );
    let (p384, p384_public) = keys.key(
        "b",
        &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    );
    assert_eq!(sign(b"x", &p384), Err(KeyError::NotP256));
    assert_eq!(sign(b"x", &p384_public), Err(KeyError::NoPrivateKey));
    assert_eq!(sign(b"x", ""), Err(KeyError::NoPrivateKey));
}

#[test]
fn only_p256_public_keys_are_trusted() {
    let keys = Keys::new();
    let (private, public) = keys.p256("a");
    assert!(TrustFile::parse(&trust(1, &[("a", &public)])).is_ok());
    let (_, p384) = keys.key(
        "b",
        &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    );
    let (_, rsa) = keys.key("c", &["-algorithm", "RSA"]);
    let (_, ed25519) = keys.key("d", &["-algorithm", "ED25519"]);
    keys.openssl(&[
        "ec",
        "-in",
        "a.pem",
        "-pubout",
        "-conv_form",
        "compressed",
        "-out",
        "compressed.pub",
    ]);
    let compressed = read(&keys.path("compressed.pub"));
    let two = format!("{public}{public}");
    for (pem, word) in [
        (p384.as_str(), "not an ECDSA P-256 key"),
        (&rsa, "not an ECDSA P-256 key"),
        (&ed25519, "not an ECDSA P-256 key"),
        (&compressed, "uncompressed"),
        (&private, "this is a private key"),
        (&two, "more than one PEM block"),
        ("hello", "not a PEM block"),
        ("", "not a PEM block"),
    ] {
        let error = TrustFile::parse(&trust(1, &[("a", pem)])).unwrap_err();
        assert!(error.problems[0].contains(word), "{word}: {error}");
    }
}

#[test]
fn every_mistake_in_a_trust_file_is_reported_with_its_line() {
    let keys = Keys::new();
    let (_, public) = keys.p256("a");
    let (_, second) = keys.p256("b");
    let good = trust(2, &[("a", &public), ("b", &second)]);
    let parsed = TrustFile::parse(&good).unwrap();
    assert_eq!((parsed.domain(), parsed.threshold()), (DOMAIN, 2));
    assert_eq!(parsed.key_ids().collect::<Vec<_>>(), ["a", "b"]);

    let problems = |text: &str| TrustFile::parse(text).unwrap_err().problems;
    for (from, to, expected) in [
        ("format = 1", "format = 3", "line 1: format 3 is not known"),
        (
            "format = 1",
            "format = \"1\"",
            "line 1: `format` must be an integer",
        ),
        (
            "domain = \"site-1\"",
            "domain = \"a b\"",
            "line 2: domain must be",
        ),
        ("domain = \"site-1\"", "", "`domain` is missing"),
        (
            "threshold = 2",
            "threshold = 3",
            "line 3: threshold must be 1 to",
        ),
        (
            "threshold = 2",
            "threshold = 0",
            "line 3: threshold must be 1 to",
        ),
        (
            "threshold = 2",
            "threshold = -1",
            "line 3: threshold must be 1 to",
        ),
        (
            "threshold = 2",
            "treshold = 2",
            "line 3: unknown key `treshold`",
        ),
        ("id = \"b\"", "id = \"a\"", "key id `a` stands twice"),
        ("id = \"b\"", "id = \"b c\"", "key id `b c` must be"),
        ("id = \"b\"", "id = \"b\"\nnote = 1", "unknown key `note`"),
    ] {
        assert!(good.contains(from), "{from}");
        let found = problems(&good.replacen(from, to, 1));
        assert!(
            found.iter().any(|problem| problem.contains(expected)),
            "{to}: {found:?}"
        );
    }
    // One key under two names would let one signer count twice.
    let same = trust(2, &[("a", &public), ("b", &public)]);
    assert!(
        problems(&same)[0].contains("`b` and `a` are the same key"),
        "{:?}",
        problems(&same)
    );
    assert!(problems(&trust(1, &[]))[0].contains("no [[keys]]"));
    let broken = "format = 3\ndomain = \"\u{e9}\"\nthreshold = 1\ncolour = 1\n";
    assert_eq!(problems(broken).len(), 4, "{:?}", problems(broken));
    assert!(problems("format = ").len() == 1);
}
