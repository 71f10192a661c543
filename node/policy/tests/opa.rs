//! OPA bundles made with `tar` and signed with `openssl`, as foreign tools do it, taken over or refused.
#![cfg(test)]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tidelock_policy::{
    BundleBuilder, OpaError, OpaFiles, OpaImport, OpaKey, OpaReport, import_opa, limits, run_tests,
};

const POLICY: &str = "package authz\n\ndefault allow := false\n\nallow if input.principal.id in data.authz.readers\n";

fn run(dir: &Path, program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    output.stdout
}

/// Made once: RSA keys take their time.
static KEYS: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let rsa = ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];
    let ec = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let mut keys = Vec::new();
    for (name, options) in [("rsa", rsa), ("other", rsa), ("ec", ec)] {
        let private = format!("{name}.key");
        let made = run(
            dir.path(),
            "openssl",
            &[&["genpkey", "-quiet"], options.as_slice()].concat(),
            b"",
        );
        let public = run(dir.path(), "openssl", &["pkey", "-pubout"], &made);
        keys.push((private, made));
        keys.push((format!("{name}.pub"), public));
    }
    keys
});

struct Site {
    dir: tempfile::TempDir,
    files: Vec<(String, Vec<u8>)>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in KEYS.iter() {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let files = [
            (
                ".manifest",
                "{\"revision\": \"r1\", \"roots\": [\"authz\"]}",
            ),
            (
                "authz/data.json",
                "{ \"readers\": [\"a\", \"b\"], \"limit\": 1.0 }",
            ),
            ("authz/policy.rego", POLICY),
        ];
        let files = files.map(|(path, text)| (path.to_owned(), text.as_bytes().to_vec()));
        Self {
            dir,
            files: files.into(),
        }
    }

    fn with(mut self, path: &str, bytes: &[u8]) -> Self {
        self.files.retain(|(known, _)| known != path);
        self.files.push((path.to_owned(), bytes.to_vec()));
        self
    }

    fn sha256(&self, bytes: &[u8]) -> String {
        let said = run(
            self.dir.path(),
            "openssl",
            &["dgst", "-sha256", "-r"],
            bytes,
        );
        String::from_utf8(said).unwrap()[..64].to_owned()
    }

    /// The digests as OPA makes them; those of structured files are written out by hand.
    fn claims(&self) -> Value {
        let files: Vec<Value> = self
            .files
            .iter()
            .map(|(path, bytes)| {
                let bytes: &[u8] = match path.as_str() {
                    ".manifest" => br#"{"revision":"r1","roots":["authz"]}"#,
                    "authz/data.json" => br#"{"limit":1.0,"readers":["a","b"]}"#,
                    _ => bytes,
                };
                json!({"name": path, "hash": self.sha256(bytes), "algorithm": "SHA-256"})
            })
            .collect();
        json!({"files": files, "keyid": "site", "scope": "read"})
    }

    fn token(&self, header: &Value, claims: &Value, key: &str) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let key = format!("{key}.key");
        let mut arguments = vec!["dgst", "-sha256", "-sign", &key];
        let algorithm = header["alg"].as_str().unwrap();
        if algorithm.starts_with("PS") {
            arguments.extend([
                "-sigopt",
                "rsa_padding_mode:pss",
                "-sigopt",
                "rsa_pss_saltlen:32",
            ]);
        }
        let mut signature = run(self.dir.path(), "openssl", &arguments, message.as_bytes());
        if key == "ec.key" {
            signature = fixed(&signature);
        }
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn signed(self, header: &Value, claims: &Value, key: &str) -> Self {
        let token = self.token(header, claims, key);
        let signatures = json!({"signatures": [token]}).to_string();
        self.with(".signatures.json", signatures.as_bytes())
    }

    fn rs256(self) -> Self {
        let claims = self.claims();
        self.signed(&json!({"alg": "RS256", "typ": "JWT"}), &claims, "rsa")
    }

    /// The archive as the command line makes it, a slash before each path as `opa build` has it.
    fn pack(&self) -> Vec<u8> {
        let root = self.dir.path().join("bundle");
        let _ = std::fs::remove_dir_all(&root);
        for (path, bytes) in &self.files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        run(
            self.dir.path(),
            "tar",
            &[
                "-C",
                "bundle",
                "--transform",
                "s,^\\./,/,",
                "-P",
                "-czf",
                "-",
                ".",
            ],
            b"",
        )
    }

    fn wanted(&self) -> OpaImport {
        let key = |id: &str, name: &str| {
            let pem = std::fs::read_to_string(self.dir.path().join(format!("{name}.pub"))).unwrap();
            OpaKey::from_pem(id, &pem).unwrap()
        };
        let one = |text: &str| BTreeSet::from([text.to_owned()]);
        OpaImport {
            name: "authz".into(),
            domain: "harbour".into(),
            created_unix_ms: 1_769_860_800_000,
            actions: one("fs.read"),
            principals: one("Agent"),
            resources: one("File"),
            allow: Some("data.authz.allow".into()),
            keys: vec![key("site", "rsa"), key("edge", "ec")],
            scope: Some("read".into()),
            allow_unsigned: false,
        }
    }

    fn import(&self) -> Result<(OpaFiles, OpaReport), OpaError> {
        import_opa(&self.pack(), &self.wanted())
    }

    fn refused(&self) -> String {
        self.import().unwrap_err().to_string()
    }
}

/// The two integers of an ECDSA signature in DER, side by side.
fn fixed(der: &[u8]) -> Vec<u8> {
    let mut at = 2;
    let mut out = Vec::new();
    for _ in 0..2 {
        let length = usize::from(der[at + 1]);
        let integer = &der[at + 2..at + 2 + length];
        let integer = &integer[integer.len().saturating_sub(32)..];
        out.extend(std::iter::repeat_n(0, 32 - integer.len()));
        out.extend_from_slice(integer);
        at += 2 + length;
    }
    out
}

#[test]
fn a_signed_bundle_becomes_one_that_builds_and_decides() {
    for (algorithm, key, id) in [
        ("RS256", "rsa", "site"),
        ("PS256", "rsa", "site"),
        ("ES256", "ec", "edge"),
    ] {
        let site = Site::new();
        let mut claims = site.claims();
        claims["keyid"] = json!(id);
        let site = site.signed(&json!({"alg": algorithm, "kid": id}), &claims, key);
        let (files, report) = site.import().unwrap();
        assert_eq!(report.signed_by.as_deref(), Some(id), "{algorithm}");
        assert_eq!(report.problems, [], "{algorithm}");
        assert_eq!(
            (report.revision.as_str(), report.roots),
            ("r1", vec!["authz".to_owned()])
        );
        let case = |id: &str, expect: &str| {
            json!({"name": id, "request": {"principal": {"type": "Agent", "id": id},
            "action": "fs.read", "resource": {"type": "File", "id": "/x"}}, "expect": expect})
        };
        let tests = json!([case("a", "allow"), case("z", "deny")]).to_string();
        let builder = files
            .into_iter()
            .fold(BundleBuilder::new(), |builder, (path, bytes)| {
                builder.file(&path, bytes)
            })
            .file("tests/base.json", tests.into_bytes());
        let report = run_tests(&builder.build().unwrap()).unwrap();
        assert_eq!(
            (report.passed, report.failed),
            (2, 0),
            "{:?}",
            report.failures
        );
    }
}

#[test]
fn a_signature_that_does_not_hold_is_refused() {
    assert!(Site::new().rs256().import().is_ok());
    assert_eq!(Site::new().import().unwrap_err(), OpaError::Unsigned);
    let mut waived = Site::new().wanted();
    waived.allow_unsigned = true;
    let (_, report) = import_opa(&Site::new().pack(), &waived).unwrap();
    assert_eq!(report.signed_by, None);

    let other_policy = POLICY.replace("readers", "everybody");
    let site = Site::new()
        .rs256()
        .with("authz/policy.rego", other_policy.as_bytes());
    assert!(site.refused().contains("does not have the digest"));
    let site = Site::new()
        .rs256()
        .with("authz/more.rego", b"package authz\n");
    assert!(site.refused().contains("is not signed"));
    let mut site = Site::new().rs256();
    site.files.retain(|(path, _)| path != "authz/data.json");
    assert!(site.refused().contains("not in the bundle"));
    // How a document is written makes no difference, what it says does.
    let site = Site::new().rs256().with(
        "authz/data.json",
        b"{\"limit\":1.0,\"readers\":[\"a\",\"b\"]}",
    );
    assert!(site.import().is_ok());
    let site = Site::new().rs256().with(
        "authz/data.json",
        b"{\"limit\":1,\"readers\":[\"a\",\"b\"]}",
    );
    assert!(site.refused().contains("does not have the digest"));

    let header = json!({"alg": "RS256"});
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 6] = [
        (|c| c["scope"] = json!("write"), "scope"),
        (|c| c["scope"] = Value::Null, "scope"),
        (|c| c["keyid"] = json!("stranger"), "not pinned"),
        (
            |c| c["files"][2]["algorithm"] = json!("SHA-1"),
            "SHA-256 or stronger",
        ),
        (
            |c| c["files"][2]["algorithm"] = json!("MD5"),
            "SHA-256 or stronger",
        ),
        (
            |c| {
                let file = c["files"][0].clone();
                c["files"].as_array_mut().unwrap().push(file);
            },
            "signed twice",
        ),
    ];
    for (change, word) in changes {
        let site = Site::new();
        let mut claims = site.claims();
        change(&mut claims);
        let message = site.signed(&header, &claims, "rsa").refused();
        assert!(message.contains(word), "{word}: {message}");
    }
    for (header, key, word) in [
        (json!({"alg": "RS256"}), "other", "not made with key"),
        (
            json!({"alg": "ES256", "kid": "site"}),
            "rsa",
            "not one for algorithm",
        ),
        (
            json!({"alg": "RS256", "kid": "edge"}),
            "rsa",
            "different keys",
        ),
        (json!({"alg": "HS256"}), "rsa", "is not one of"),
        (json!({"alg": "none"}), "rsa", "is not one of"),
        (json!({"alg": "RS256", "crit": ["b64"]}), "rsa", "crit"),
        (
            json!({"alg": "PS256", "typ": "x"}),
            "other",
            "not made with key",
        ),
    ] {
        let site = Site::new();
        let claims = site.claims();
        let message = site.signed(&header, &claims, key).refused();
        assert!(message.contains(word), "{header}: {message}");
    }
    let two = Site::new();
    let token = two.token(&header, &two.claims(), "rsa");
    let both = json!({"signatures": [token, token]}).to_string();
    assert!(
        two.with(".signatures.json", both.as_bytes())
            .refused()
            .contains("exactly one")
    );
}

#[test]
fn what_is_not_run_is_reported_by_file_and_line_and_nothing_is_written() {
    let text = "package authz.more\n\nx := http.send({\"method\": \"get\"})\n\ny if input.z with count as 1\n\nz := time.now_ns()\n";
    let mut wanted = Site::new().wanted();
    wanted.allow_unsigned = true;
    let site = Site::new()
        .with("authz/more.rego", text.as_bytes())
        .with("authz/broken.rego", b"package authz.broken\n\nx := [1,\n")
        .with(
            "authz/deep.rego",
            format!("package authz.deep\n\nx := {}\n", "[".repeat(60)).as_bytes(),
        )
        .with("elsewhere/a.rego", b"package elsewhere\n\na := 1\n")
        .with("authz/some_test.rego", b"package authz_test\n")
        .with("policy.wasm", b"\0asm")
        .with("README.md", b"x");
    let (files, report) = import_opa(&site.pack(), &wanted).unwrap();
    assert!(files.is_empty());
    let found: Vec<(String, usize)> = report
        .problems
        .iter()
        .map(|problem| (problem.path.clone(), problem.line))
        .collect();
    for (path, line) in [
        ("authz/more.rego", 3),
        ("authz/more.rego", 5),
        ("authz/more.rego", 7),
        ("authz/broken.rego", 3),
        ("authz/deep.rego", 3),
        ("elsewhere/a.rego", 1),
    ] {
        let near = found
            .iter()
            .any(|(p, l)| p == path && (line..=line + 1).contains(l));
        assert!(near, "{path} {line}: {:?}", report.problems);
    }
    for (path, word) in [
        ("policy.wasm", "left out"),
        ("authz/some_test.rego", "left out"),
        ("README.md", "left out"),
    ] {
        let file = report.files.iter().find(|file| file.path == path).unwrap();
        assert!(file.becomes.contains(word), "{file:?}");
    }
    // Without a rule to ask there is no decision.
    let mut undecided = wanted.clone();
    undecided.allow = None;
    let (_, report) = import_opa(&Site::new().pack(), &undecided).unwrap();
    assert!(!report.problems.is_empty());
    let delta = Site::new().with("patch.json", b"{}");
    assert_eq!(
        import_opa(&delta.pack(), &wanted).unwrap_err(),
        OpaError::Delta
    );
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), "gzip", &["-c"], bytes)
}

fn entry(path: &str, kind: tar::EntryType, bytes: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_entry_type(kind);
    header.set_cksum();
    let mut block = header.as_bytes().to_vec();
    block.extend_from_slice(bytes);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

#[test]
fn hostile_archives_are_refused() {
    let mut wanted = Site::new().wanted();
    wanted.allow_unsigned = true;
    let end = vec![0; 1024];
    let regular = tar::EntryType::Regular;
    let policy = entry("p.rego", regular, POLICY.as_bytes());
    let good = gzip(&[policy.clone(), end.clone()].concat());
    assert!(import_opa(&good, &wanted).is_ok());
    for (blocks, word) in [
        (entry("../p.rego", regular, b"x"), "leads out"),
        (entry("a/../../p.rego", regular, b"x"), "leads out"),
        (entry("p.rego", tar::EntryType::Symlink, b""), "only files"),
        (entry("p.rego", tar::EntryType::Link, b""), "only files"),
        (entry("p.rego", tar::EntryType::Fifo, b""), "only files"),
        (entry("p.rego", tar::EntryType::XHeader, b""), "only files"),
        ([policy.clone(), policy.clone()].concat(), "stands twice"),
        (
            [policy.clone(), entry("/p.rego", regular, b"x")].concat(),
            "stands twice",
        ),
        (
            entry(
                "data.json",
                regular,
                &vec![b' '; limits::FILE_BYTES_MAX + 1],
            ),
            "larger than",
        ),
        (
            (0..=limits::FILES_MAX)
                .flat_map(|n| entry(&format!("{n}.rego"), regular, b""))
                .collect(),
            "files",
        ),
    ] {
        let message = import_opa(&gzip(&[blocks, end.clone()].concat()), &wanted)
            .unwrap_err()
            .to_string();
        assert!(message.contains(word), "{word}: {message}");
    }
    // A few kilobytes that unpack to far more than is ever read.
    let bomb = gzip(&[policy.clone(), vec![0; 4 * limits::OPA_UNPACKED_BYTES_MAX]].concat());
    assert!(bomb.len() < 100_000);
    let message = import_opa(&bomb, &wanted).unwrap_err().to_string();
    assert!(message.contains("larger than"), "{message}");
    let two = [good.clone(), good.clone()].concat();
    assert!(import_opa(&two, &wanted).is_err());
    assert!(import_opa(&good[..good.len() - 9], &wanted).is_err());
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    assert!(import_opa(&flipped, &wanted).is_err());
    assert!(import_opa(b"", &wanted).is_err());
}
