//! Releases: one good image layout, and a way to tamper with each of the four steps.
#![cfg(test)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use semver::Version;
use serde_json::{Value, json};
use tidelock_policy::testing::Authority;
use tidelock_policy::{
    ContentId, ReleaseError, ReleaseStep, Role, TrustFile, VerifiedRelease, limits,
    lock_fingerprint, verify_release,
};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LOCK: &str = "application/vnd.tidelock.lock.v1+json";

fn authority() -> Authority {
    Authority::new("site-1", 3).unwrap()
}

fn trust(authority: &Authority, threshold: usize) -> TrustFile {
    let text = authority.roles_toml(
        &[(Role::Policy, 1), (Role::Release, threshold)],
        &[&[Role::Release], &[Role::Release], &[Role::Policy]],
    );
    TrustFile::parse(&text).unwrap()
}

struct Release {
    dir: tempfile::TempDir,
    lock: Value,
    manifest: Value,
}

impl Release {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(
            dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Self {
            dir,
            lock: json!({
                "format": 1, "name": "tidelock", "version": "1.4.0",
                "created_at": "2026-01-31T12:00:00Z", "crates": {"quinn": "0.11.12"},
            }),
            manifest: json!({
                "schemaVersion": 2, "mediaType": MANIFEST,
                "annotations": {"org.opencontainers.image.version": "1.4.0"},
            }),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.path()
            .join("blobs/sha256")
            .join(digest.strip_prefix("sha256:").unwrap())
    }

    /// Writes a blob and answers its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = ContentId::of(bytes).to_string();
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    fn index(&self, manifests: &[&Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// Writes the image and answers the descriptor of its manifest.
    fn image(&self) -> Value {
        let mut lock = self.lock.clone();
        if lock.get("fingerprint").is_none() {
            lock["fingerprint"] = json!(lock_fingerprint(lock.to_string().as_bytes()).unwrap());
        }
        self.image_with(lock.to_string().as_bytes())
    }

    fn image_with(&self, lock: &[u8]) -> Value {
        let mut manifest = self.manifest.clone();
        manifest["config"] = self.blob("application/vnd.oci.empty.v1+json", b"{}");
        let program = self.blob(
            "application/vnd.oci.image.layer.v1.tar",
            b"the program itself",
        );
        manifest["layers"] = json!([program, self.blob(LOCK, lock)]);
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    /// The payload that `cosign sign` signs for a manifest.
    fn payload(image: &Value) -> Vec<u8> {
        json!({
            "critical": {
                "identity": {"docker-reference": "registry.example/tidelock"},
                "image": {"docker-manifest-digest": image["digest"]},
                "type": "cosign container image signature",
            },
            "optional": null,
        })
        .to_string()
        .into_bytes()
    }

    /// A signature manifest as `cosign save` lays it down: one layer for each signature.
    fn signatures(&self, payload: &[u8], signatures: &[Vec<u8>]) -> Value {
        let layers: Vec<Value> = signatures
            .iter()
            .map(|der| {
                let mut layer =
                    self.blob("application/vnd.dev.cosign.simplesigning.v1+json", payload);
                layer["annotations"] =
                    json!({"dev.cosignproject.cosign/signature": STANDARD.encode(der)});
                layer
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": self.blob("application/vnd.oci.image.config.v1+json", b"{\"os\":\"\"}"),
            "layers": layers,
        });
        let mut descriptor = self.blob(MANIFEST, manifest.to_string().as_bytes());
        descriptor["annotations"] = json!({"kind": "dev.cosignproject.cosign/sigs"});
        descriptor
    }

    /// A complete release, signed in cosign's way by these keys.
    fn signed(&self, authority: &Authority, keys: &[usize]) -> Value {
        let image = self.image();
        let payload = Self::payload(&image);
        let by = authority.signatures(&payload, keys).unwrap();
        let signatures = self.signatures(&payload, &by);
        self.index(&[&image, &signatures]);
        image
    }

    fn verify(&self, trust: &TrustFile) -> Result<VerifiedRelease, ReleaseError> {
        verify_release(self.path(), trust, &[], &Version::new(1, 4, 0))
    }
}

/// The step, the code and the message of a rejection.
#[track_caller]
fn rejected(
    result: Result<VerifiedRelease, ReleaseError>,
    step: ReleaseStep,
    code: &str,
    word: &str,
) {
    let error = result.unwrap_err();
    assert_eq!((error.step(), error.code()), (step, code), "{error}");
    assert!(error.to_string().contains(word), "{error}");
}

#[test]
fn a_good_release_passes_all_four_steps() {
    let (authority, release) = (authority(), Release::new());
    let image = release.signed(&authority, &[0, 1]);
    let verified = release.verify(&trust(&authority, 2)).unwrap();
    assert_eq!(verified.signers, ["key-0", "key-1"]);
    assert_eq!(verified.digest, image["digest"]);
    assert_eq!(
        (verified.name.as_str(), verified.version.as_str()),
        ("tidelock", "1.4.0")
    );
    // Image: manifest, config, program, lock. Signatures: manifest, config, payload.
    assert_eq!(verified.blobs, 7);
    assert!(verified.fingerprint.starts_with("blake3:"));
    assert_eq!(verified.surplus, Vec::<String>::new());
    // A blob that nobody refers to is named, and no part of the release.
    let extra = release.blob("x", b"surplus");
    let name = extra["digest"].as_str().unwrap().replace("sha256:", "");
    assert_eq!(
        release.verify(&trust(&authority, 2)).unwrap().surplus,
        [name]
    );
}

#[test]
fn step_1_tampered_signatures_are_rejected() {
    let (authority, release) = (authority(), Release::new());
    let step = |result, word: &str| {
        rejected(result, ReleaseStep::Signatures, "RELEASE_SIGNATURE", word);
    };
    release.signed(&authority, &[0, 1]);
    assert!(release.verify(&trust(&authority, 2)).is_ok(), "the control");
    // One of two; the same key twice; a key that may not sign releases.
    for keys in [&[0][..], &[0, 0], &[0, 2]] {
        release.signed(&authority, keys);
        step(release.verify(&trust(&authority, 2)), "1 of the 2 needed");
        assert!(release.verify(&trust(&authority, 1)).is_ok());
    }
    // No signature; none of another's.
    let image = release.image();
    release.index(&[&image]);
    step(release.verify(&trust(&authority, 1)), "0 of the 1 needed");
    release.signed(&Authority::new("site-1", 2).unwrap(), &[0, 1]);
    step(release.verify(&trust(&authority, 1)), "2 count for nothing");
    // A payload that was changed after it was signed.
    let payload = Release::payload(&image);
    let by = authority.signatures(&payload, &[0]).unwrap();
    let changed = [&payload[..], b" "].concat();
    release.index(&[&image, &release.signatures(&changed, &by)]);
    step(release.verify(&trust(&authority, 1)), "0 of the 1 needed");
    // Signatures of another image, laid beside this one.
    let other = json!({"digest": ContentId::of(b"another").to_string()});
    let payload = Release::payload(&other);
    let by = authority.signatures(&payload, &[0]).unwrap();
    release.index(&[&image, &release.signatures(&payload, &by)]);
    step(release.verify(&trust(&authority, 1)), "0 of the 1 needed");
    // A trust file that lets nobody sign releases.
    release.signed(&authority, &[0, 1]);
    let first = TrustFile::parse(&authority.trust_toml(1)).unwrap();
    step(release.verify(&first), "no role `release`");
}

#[test]
fn step_1_release_keys_sign_in_their_time() {
    let (authority, release) = (authority(), Release::new());
    release.signed(&authority, &[0]);
    let text = authority.roles_toml(
        &[(Role::Policy, 1), (Role::Release, 1)],
        &[&[Role::Release], &[], &[Role::Policy]],
    );
    let until = |end: &str| {
        let times = format!("roles = [\"release\"]\nnot_after = \"{end}\"");
        TrustFile::parse(&text.replace("roles = [\"release\"]", &times)).unwrap()
    };
    assert!(release.verify(&until("2026-01-31T12:00:00Z")).is_ok());
    rejected(
        release.verify(&until("2026-01-31T11:59:59Z")),
        ReleaseStep::Signatures,
        "RELEASE_SIGNATURE",
        "made at 2026-01-31T12:00:00Z",
    );
}

#[test]
fn step_2_tampered_blobs_are_rejected() {
    let (authority, release) = (authority(), Release::new());
    let trust = trust(&authority, 1);
    let image = release.signed(&authority, &[0]);
    assert!(release.verify(&trust).is_ok(), "the control");
    let step = |word: &str| {
        rejected(
            release.verify(&trust),
            ReleaseStep::Digests,
            "RELEASE_DIGEST",
            word,
        );
    };
    let program = release.blob_path(ContentId::of(b"the program itself").as_str());
    // The same size with other bytes, another size, no bytes at all.
    fs::write(&program, b"the program itselF").unwrap();
    step("its bytes hash to");
    fs::write(&program, b"the program itself, longer").unwrap();
    step("26 bytes, its descriptor states 18");
    fs::remove_file(&program).unwrap();
    step("No such file");
    // A link, even to the right bytes.
    let beside = release.path().join("beside");
    fs::write(&beside, b"the program itself").unwrap();
    symlink(&beside, &program).unwrap();
    step("no links");
    fs::remove_file(&program).unwrap();
    fs::write(&program, b"the program itself").unwrap();
    assert!(release.verify(&trust).is_ok(), "the control");
    // The manifest itself: cosign signs its digest, so this is found here.
    let manifest = release.blob_path(image["digest"].as_str().unwrap());
    let mut bytes = fs::read(&manifest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] = b' ';
    fs::write(&manifest, &bytes).unwrap();
    step("its bytes hash to");
}

#[test]
fn step_3_a_tampered_lock_file_is_rejected() {
    let (authority, mut release) = (authority(), Release::new());
    let trust = trust(&authority, 1);
    release.signed(&authority, &[0]);
    let good = release.verify(&trust).unwrap();
    let step = |release: &Release, word: &str| {
        release.signed(&authority, &[0]);
        rejected(
            release.verify(&trust),
            ReleaseStep::Fingerprint,
            "RELEASE_FINGERPRINT",
            word,
        );
    };
    // One member changed, and the fingerprint left as it was.
    let honest = release.lock.clone();
    release.lock["fingerprint"] = json!(good.fingerprint);
    release.signed(&authority, &[0]);
    assert!(release.verify(&trust).is_ok(), "the control");
    release.lock["crates"]["quinn"] = json!("0.11.13");
    step(&release, "it states blake3:");
    release.lock = honest.clone();
    release.lock["fingerprint"] = json!("sha256:00");
    step(&release, "it states sha256:00");
    release.lock = honest.clone();
    release.lock["format"] = json!(2);
    step(&release, "`format` must be 1");
    release.lock = honest.clone();
    release.lock["created_at"] = json!("yesterday");
    step(&release, "`created_at` must be");
    // Without a time the windows of the keys that signed it could not be asked.
    release.lock.as_object_mut().unwrap().remove("created_at");
    step(&release, "`created_at` is missing");
    release.lock = honest;
    // A key that stands twice, no lock file, and two of them.
    let sign = |release: &Release, image: &Value| {
        let payload = Release::payload(image);
        let by = authority.signatures(&payload, &[0]).unwrap();
        release.index(&[image, &release.signatures(&payload, &by)]);
    };
    let twice = release.image_with(br#"{"format":1,"format":1}"#);
    sign(&release, &twice);
    rejected(
        release.verify(&trust),
        ReleaseStep::Fingerprint,
        "RELEASE_FINGERPRINT",
        "stands twice",
    );
    let program = release.blob("application/vnd.oci.image.layer.v1.tar", b"program");
    let mut two = Vec::new();
    for text in ["{}", "{\"a\":1}"] {
        let mut lock = release.blob("application/json", text.as_bytes());
        lock["annotations"] = json!({"org.opencontainers.image.title": "tidelock.lock.json"});
        two.push(lock);
    }
    for (layers, word) in [(json!([program]), "not 0"), (json!(two), "not 2")] {
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": layers});
        let image = release.blob(MANIFEST, manifest.to_string().as_bytes());
        sign(&release, &image);
        rejected(
            release.verify(&trust),
            ReleaseStep::Fingerprint,
            "RELEASE_FINGERPRINT",
            word,
        );
    }
    // A lock file that hangs on a signature's manifest is no part of the release.
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [program]});
    let image = release.blob(MANIFEST, manifest.to_string().as_bytes());
    let payload = Release::payload(&image);
    let by = authority.signatures(&payload, &[0]).unwrap();
    let mut foreign = release.image();
    foreign["annotations"] = json!({"kind": "dev.cosignproject.cosign/sigs"});
    release.index(&[&image, &release.signatures(&payload, &by), &foreign]);
    rejected(
        release.verify(&trust),
        ReleaseStep::Fingerprint,
        "RELEASE_FINGERPRINT",
        "not 0",
    );
}

/// One team's keys may sign more than one product: whoever chooses what lies on the medium could have had
/// another one of theirs installed.
#[test]
fn step_4_a_release_of_another_name_is_rejected() {
    let (authority, release) = (authority(), Release::new());
    let trust = trust(&authority, 1);
    release.signed(&authority, &[0]);
    let verified = release.verify(&trust).unwrap();
    let name = verified.name.clone();
    assert_eq!(verified.clone().of(Some(&name)), Ok(verified.clone()));
    assert_eq!(verified.clone().of(None), Ok(verified.clone()));
    rejected(
        verified.of(Some("another")),
        ReleaseStep::Version,
        "RELEASE_NAME",
        "not of `another`",
    );
}

#[test]
fn step_4_an_older_version_is_rejected() {
    let (authority, mut release) = (authority(), Release::new());
    let trust = trust(&authority, 1);
    release.signed(&authority, &[0]);
    let at_least = |release: &Release, version: &str| {
        verify_release(
            release.path(),
            &trust,
            &[],
            &Version::parse(version).unwrap(),
        )
    };
    let step = |result, word: &str| {
        rejected(result, ReleaseStep::Version, "RELEASE_VERSION", word);
    };
    assert!(at_least(&release, "1.4.0").is_ok(), "the control");
    assert!(at_least(&release, "1.4.0-rc.1").is_ok());
    step(at_least(&release, "1.4.1"), "below 1.4.1");
    step(at_least(&release, "2.0.0-rc.1"), "below 2.0.0-rc.1");
    release.manifest["annotations"] = json!({"org.opencontainers.image.version": "1.5.0"});
    release.signed(&authority, &[0]);
    step(
        at_least(&release, "1.4.0"),
        "an annotation of the image 1.5.0",
    );
    release.manifest["annotations"] = json!({});
    release.signed(&authority, &[0]);
    assert!(at_least(&release, "1.4.0").is_ok(), "none need be stated");
}

#[test]
fn what_is_no_image_layout_is_rejected() {
    let (authority, release) = (authority(), Release::new());
    let trust = trust(&authority, 1);
    let image = release.signed(&authority, &[0]);
    assert!(release.verify(&trust).is_ok(), "the control");
    let layout = |word: &str| {
        rejected(
            release.verify(&trust),
            ReleaseStep::Signatures,
            "RELEASE_LAYOUT",
            word,
        );
    };
    let index = release.path().join("index.json");
    let kept = fs::read(&index).unwrap();
    fs::write(&index, r#"{"manifests":[],"manifests":[]}"#).unwrap();
    layout("stands twice");
    release.index(&[&image, &image]);
    layout("not 2");
    release.index(&[]);
    layout("not 0");
    for digest in [
        "sha256:../../../etc/passwd".to_owned(),
        format!("sha512:{}", "0".repeat(64)),
        format!("sha256:{}", "A".repeat(64)),
    ] {
        release.index(&[&json!({"mediaType": MANIFEST, "digest": digest, "size": 1})]);
        layout("64 hex digits");
    }
    let longest = usize::try_from(limits::RELEASE_JSON_BYTES_MAX).unwrap();
    fs::write(&index, vec![b' '; longest + 1]).unwrap();
    layout("larger than");
    // A link out of the layout, to the right content.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("index.json"), &kept).unwrap();
    fs::remove_file(&index).unwrap();
    symlink(outside.path().join("index.json"), &index).unwrap();
    layout("no links");
    fs::remove_file(&index).unwrap();
    fs::write(&index, &kept).unwrap();
    let blobs = release.path().join("blobs/sha256");
    fs::rename(&blobs, outside.path().join("moved")).unwrap();
    symlink(outside.path().join("moved"), &blobs).unwrap();
    layout("no links");
    fs::remove_file(&blobs).unwrap();
    fs::rename(outside.path().join("moved"), &blobs).unwrap();
    assert!(release.verify(&trust).is_ok(), "the control");
    fs::write(release.path().join("oci-layout"), "{}").unwrap();
    layout("imageLayoutVersion");
}

/// The flow of the book: a release made with openssl and nothing else.
#[test]
fn a_release_signed_with_openssl_alone_verifies() {
    let release = Release::new();
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl")
            .args(arguments)
            .current_dir(release.path())
            .output()
            .expect("this test needs the openssl command line");
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    let outside = tempfile::tempdir().unwrap();
    let key = outside.path().join("release.key");
    let key = key.to_str().unwrap();
    let curve = "ec_paramgen_curve:P-256";
    openssl(&[
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        curve,
        "-out",
        key,
    ]);
    let public = String::from_utf8(openssl(&["pkey", "-in", key, "-pubout"])).unwrap();
    let trust = TrustFile::parse(&format!(
        "format = 2\ndomain = \"site-1\"\n[thresholds]\npolicy = 1\nrelease = 1\n[[keys]]\n\
         id = \"builder\"\nroles = [\"policy\", \"release\"]\npublic_key_pem = \"\"\"\n{public}\"\"\"\n"
    ))
    .unwrap();

    let image = release.image();
    release.index(&[&image]);
    let manifest = release.blob_path(image["digest"].as_str().unwrap());
    let manifest = manifest.to_str().unwrap();
    fs::create_dir(release.path().join("signatures")).unwrap();
    let sig = "signatures/release.sig";
    openssl(&["dgst", "-sha256", "-sign", key, "-out", sig, manifest]);
    assert_eq!(release.verify(&trust).unwrap().signers, ["builder"]);
    // The same signature given beside the layout, and as `cosign sign-blob` writes it: base64.
    let base64 = openssl(&["base64", "-A", "-in", sig]);
    fs::remove_dir_all(release.path().join("signatures")).unwrap();
    let given = tidelock_policy::decode_signature(&base64).unwrap();
    let at_least = Version::new(1, 4, 0);
    let with = |given: &[Vec<u8>]| verify_release(release.path(), &trust, given, &at_least);
    assert_eq!(with(&[given]).unwrap().signers, ["builder"]);
    rejected(
        with(&[]),
        ReleaseStep::Signatures,
        "RELEASE_SIGNATURE",
        "0 of the 1 needed",
    );
    // cosign's payload, signed by openssl: the same bytes that `cosign sign` signs.
    let payload = Release::payload(&image);
    let payload_path = outside.path().join("payload.json");
    fs::write(&payload_path, &payload).unwrap();
    let der = openssl(&[
        "dgst",
        "-sha256",
        "-sign",
        key,
        payload_path.to_str().unwrap(),
    ]);
    release.index(&[&image, &release.signatures(&payload, &[der])]);
    assert_eq!(release.verify(&trust).unwrap().signers, ["builder"]);
}
