//! A release on disk or media: an OCI image layout, verified in four steps without a registry.
//!
//! Signatures, then digests and sizes, then the behavioural fingerprint of the lock file, then the
//! version. Each step has its own reason code; the first that fails ends it. Nothing is unpacked, and
//! nothing outside the layout's directory is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use semver::Version;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::json;
use crate::limits::{
    RELEASE_BLOBS_MAX, RELEASE_BYTES_MAX, RELEASE_DEPTH_MAX, RELEASE_JSON_BYTES_MAX, SIGNATURES_MAX,
};
use crate::manifest::unix_ms;
use crate::package::{decode_signature, sha256};
use crate::trust::{Role, TrustFile};

const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// The payload that `cosign sign` signs, as a layer of a signature's own manifest.
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const SIGNATURE_KIND: &str = "dev.cosignproject.cosign/sigs";
const SIMPLE_SIGNING_WORD: &str = "cosign container image signature";
/// Where detached signatures over the release's manifest may lie, beside the blobs.
const DETACHED: &str = "signatures";
/// The lock file's layer, by its media type or by its title.
const LOCK_TYPE: &str = "application/vnd.tidelock.lock.v1+json";
const LOCK_TITLE: &str = "tidelock.lock.json";
const TITLE: &str = "org.opencontainers.image.title";
const VERSION: &str = "org.opencontainers.image.version";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// One of the four steps, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseStep {
    /// Enough distinct release keys signed it.
    Signatures,
    /// Every blob has the SHA-256 and the size that its descriptor states.
    Digests,
    /// The lock file has the BLAKE3 fingerprint that it states.
    Fingerprint,
    /// It is not older than what runs.
    Version,
}

impl ReleaseStep {
    /// The word of answers and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Signatures => "signatures",
            Self::Digests => "digests",
            Self::Fingerprint => "fingerprint",
            Self::Version => "version",
        }
    }
}

impl fmt::Display for ReleaseStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a release was rejected. [`code`](Self::code) is stable.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// The directory is no image layout, or passes a limit; found within a step.
    #[error("{message}")]
    Layout {
        /// The step that found it.
        step: ReleaseStep,
        /// What is wrong.
        message: String,
    },
    /// Too few distinct release keys signed the release.
    #[error(
        "{valid} of the {needed} needed signatures are by distinct keys of role `release` ({unknown} \
         count for nothing): sign {digest} with more of them"
    )]
    Signature {
        /// Distinct keys that count.
        valid: usize,
        /// Threshold of the role.
        needed: usize,
        /// Signatures that no key verifies, or that are over something else.
        unknown: usize,
        /// What has to be signed.
        digest: String,
    },
    /// The trust file lets no key sign releases.
    #[error("the trust file has no role `release`: give it to the keys that may sign releases")]
    NoRole,
    /// Enough keys signed, but not all in their time.
    #[error("{valid} of the {needed} needed keys may sign what was made at {created_at}")]
    KeyTime {
        /// Distinct keys whose time it is.
        valid: usize,
        /// Threshold of the role.
        needed: usize,
        /// When the release was made, as its lock file says.
        created_at: String,
    },
    /// A blob's bytes are not what its descriptor states.
    #[error("blob {digest}: {message}")]
    Digest {
        /// The digest that is stated.
        digest: String,
        /// What is wrong.
        message: String,
    },
    /// The lock file is missing, ill-formed, or its fingerprint is another.
    #[error("{0}")]
    Fingerprint(String),
    /// The version is too old, or stated differently in two places.
    #[error("{0}")]
    Version(String),
    /// It is the release of something else than was asked for.
    #[error("the signed lock file is of `{found}`, not of `{expected}`: this is another release")]
    Name {
        /// What was asked for.
        expected: String,
        /// What the lock file states.
        found: String,
    },
}

impl ReleaseError {
    /// The step that failed.
    #[must_use]
    pub fn step(&self) -> ReleaseStep {
        match self {
            Self::Layout { step, .. } => *step,
            Self::Signature { .. } | Self::NoRole | Self::KeyTime { .. } => ReleaseStep::Signatures,
            Self::Digest { .. } => ReleaseStep::Digests,
            Self::Fingerprint(_) => ReleaseStep::Fingerprint,
            Self::Version(_) | Self::Name { .. } => ReleaseStep::Version,
        }
    }

    /// The stable reason code, as recorded and shown.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Layout { .. } => "RELEASE_LAYOUT",
            Self::Signature { .. } | Self::NoRole | Self::KeyTime { .. } => "RELEASE_SIGNATURE",
            Self::Digest { .. } => "RELEASE_DIGEST",
            Self::Fingerprint(_) => "RELEASE_FINGERPRINT",
            Self::Version(_) => "RELEASE_VERSION",
            Self::Name { .. } => "RELEASE_NAME",
        }
    }
}

/// A release that passed all four steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VerifiedRelease {
    /// SHA-256 of its manifest.
    pub digest: String,
    /// Ids of the distinct keys that signed, sorted.
    pub signers: Vec<String>,
    /// Blobs that were hashed.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
    /// BLAKE3 fingerprint of the lock file.
    pub fingerprint: String,
    /// The name in the lock file.
    pub name: String,
    /// The version in the lock file.
    pub version: String,
    /// Blobs that nothing refers to: not verified, not part of the release.
    pub surplus: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// An index or a manifest; of both only what is needed here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Descriptor {
    fn is(&self, types: &[&str]) -> bool {
        types.contains(&self.media_type.as_str())
    }

    fn is_signature(&self) -> bool {
        let annotation = |name| self.annotations.get(name).map(String::as_str);
        annotation("kind") == Some(SIGNATURE_KIND)
            || annotation(REF_NAME)
                .is_some_and(|name| name.starts_with("sha256-") && name.ends_with(".sig"))
    }

    fn is_lock(&self) -> bool {
        self.media_type == LOCK_TYPE
            || self.annotations.get(TITLE).map(String::as_str) == Some(LOCK_TITLE)
    }
}

struct Layout<'d> {
    dir: &'d Path,
    step: ReleaseStep,
}

impl Layout<'_> {
    fn broken(&self, message: impl Into<String>) -> ReleaseError {
        ReleaseError::Layout {
            step: self.step,
            message: message.into(),
        }
    }

    /// The path of a file below the layout. No part of the way is a link: what is verified is what
    /// lies here.
    fn file(&self, parts: &[&str]) -> Result<(PathBuf, u64), ReleaseError> {
        let mut path = self.dir.to_owned();
        let mut length = 0;
        for (number, part) in parts.iter().enumerate() {
            path.push(part);
            let meta = path
                .symlink_metadata()
                .map_err(|error| self.broken(format!("{}: {error}", path.display())))?;
            let is_last = number + 1 == parts.len();
            if (is_last && !meta.is_file()) || (!is_last && !meta.is_dir()) {
                return Err(self.broken(format!(
                    "{} is no {}: an image layout holds no links",
                    path.display(),
                    if is_last { "regular file" } else { "directory" }
                )));
            }
            length = meta.len();
        }
        Ok((path, length))
    }

    /// Reads a small file whole.
    fn read(&self, parts: &[&str]) -> Result<Vec<u8>, ReleaseError> {
        let (path, length) = self.file(parts)?;
        let too_long = || {
            self.broken(format!(
                "{} is larger than {RELEASE_JSON_BYTES_MAX} bytes",
                path.display()
            ))
        };
        if length > RELEASE_JSON_BYTES_MAX {
            return Err(too_long());
        }
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| {
                file.take(RELEASE_JSON_BYTES_MAX + 1)
                    .read_to_end(&mut bytes)
            })
            .map_err(|error| self.broken(format!("{}: {error}", path.display())))?;
        if bytes.len() as u64 > RELEASE_JSON_BYTES_MAX {
            return Err(too_long());
        }
        Ok(bytes)
    }

    fn hex<'a>(&self, digest: &'a str) -> Result<&'a str, ReleaseError> {
        digest
            .strip_prefix("sha256:")
            .filter(|hex| {
                hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            })
            .ok_or_else(|| {
                let shown = crate::error::clip(digest);
                self.broken(format!("`{shown}` is not `sha256:` and 64 hex digits"))
            })
    }

    fn blob(&self, digest: &str) -> Result<Vec<u8>, ReleaseError> {
        self.read(&["blobs", "sha256", self.hex(digest)?])
    }

    fn node(&self, digest: &str) -> Result<Node, ReleaseError> {
        let bytes = self.blob(digest)?;
        self.parse(digest, &bytes)
    }

    fn parse(&self, what: &str, bytes: &[u8]) -> Result<Node, ReleaseError> {
        json::parse_as(bytes).map_err(|error| self.broken(format!("{what}: {error}")))
    }

    /// The release and the signatures of the layout's index.
    fn open(&self) -> Result<(Descriptor, Vec<Descriptor>), ReleaseError> {
        let marker = self.read(&["oci-layout"])?;
        let marker =
            json::parse(&marker).map_err(|error| self.broken(format!("oci-layout: {error}")))?;
        if marker.get("imageLayoutVersion").and_then(Value::as_str) != Some("1.0.0") {
            return Err(self.broken("oci-layout: imageLayoutVersion must be 1.0.0"));
        }
        let index = self.parse("index.json", &self.read(&["index.json"])?)?;
        let (signatures, releases): (Vec<Descriptor>, Vec<Descriptor>) = index
            .manifests
            .into_iter()
            .partition(Descriptor::is_signature);
        if signatures.len() > SIGNATURES_MAX {
            return Err(self.broken(format!(
                "index.json names more than {SIGNATURES_MAX} signature manifests"
            )));
        }
        match <[Descriptor; 1]>::try_from(releases) {
            Ok([release]) => Ok((release, signatures)),
            Err(several) => Err(self.broken(format!(
                "index.json must name one image or image index besides signatures, not {}",
                several.len()
            ))),
        }
    }

    /// Signed bytes with their signatures: cosign's payloads, and the manifest itself.
    fn claims(
        &self,
        release: &Descriptor,
        signatures: &[Descriptor],
        given: &[Vec<u8>],
    ) -> Result<Claims, ReleaseError> {
        let mut claims: Vec<Claim> = Vec::new();
        let mut void = 0;
        for descriptor in signatures {
            for layer in self.node(&descriptor.digest)?.layers {
                let signature = layer
                    .annotations
                    .get(SIGNATURE_ANNOTATION)
                    .filter(|_| layer.media_type == SIMPLE_SIGNING)
                    .and_then(|text| STANDARD.decode(text).ok());
                let payload = self.blob(&layer.digest)?;
                match signature.filter(|_| is_claim_of(&payload, &release.digest)) {
                    Some(signature) => claims.push(Claim {
                        over: payload,
                        signature,
                    }),
                    // A signature of something else proves nothing about this release.
                    None => void += 1,
                }
            }
        }
        let mut detached = given.to_vec();
        detached.extend(self.detached()?);
        if !detached.is_empty() {
            let manifest = self.blob(&release.digest)?;
            let is_whole = sha256(&manifest) == release.digest;
            for signature in detached {
                match is_whole {
                    true => claims.push(Claim {
                        over: manifest.clone(),
                        signature,
                    }),
                    false => void += 1,
                }
            }
        }
        if claims.len() + void > SIGNATURES_MAX {
            return Err(self.broken(format!("more than {SIGNATURES_MAX} signatures")));
        }
        Ok(Claims { claims, void })
    }

    /// The files of the directory of detached signatures, if there is one.
    fn detached(&self) -> Result<Vec<Vec<u8>>, ReleaseError> {
        let dir = self.dir.join(DETACHED);
        if dir.symlink_metadata().is_err() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for name in self.names(&[DETACHED])? {
            let bytes = self.read(&[DETACHED, &name])?;
            found.push(
                decode_signature(&bytes)
                    .map_err(|error| self.broken(format!("{DETACHED}/{name}: {error}")))?,
            );
        }
        Ok(found)
    }

    /// The names in a directory, sorted.
    fn names(&self, parts: &[&str]) -> Result<BTreeSet<String>, ReleaseError> {
        let mut path = self.dir.to_owned();
        for part in parts {
            path.push(part);
            let is_dir = path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
            if !is_dir {
                return Err(self.broken(format!("{} is no directory", path.display())));
            }
        }
        let failed = |error: &dyn fmt::Display| self.broken(format!("{}: {error}", path.display()));
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&path).map_err(|error| failed(&error))? {
            let name = entry.map_err(|error| failed(&error))?.file_name();
            let name = name
                .to_str()
                .ok_or_else(|| failed(&"a name is not UTF-8"))?;
            // INV-07: a directory of any length is not listed to its end.
            if names.len() >= RELEASE_BLOBS_MAX * 2 {
                return Err(failed(&"it holds too many files"));
            }
            names.insert(name.to_owned());
        }
        Ok(names)
    }

    /// Hashes one blob against its descriptor.
    fn check_blob(&self, descriptor: &Descriptor) -> Result<(), ReleaseError> {
        let wrong = |message: String| ReleaseError::Digest {
            digest: crate::error::clip(&descriptor.digest),
            message,
        };
        let hex = self.hex(&descriptor.digest)?;
        let (path, length) = self
            .file(&["blobs", "sha256", hex])
            .map_err(|error| wrong(error.to_string()))?;
        if length != descriptor.size {
            return Err(wrong(format!(
                "{length} bytes, its descriptor states {}",
                descriptor.size
            )));
        }
        let mut file = File::open(&path).map_err(|error| wrong(error.to_string()))?;
        let mut hash = Context::new(&SHA256);
        let mut piece = vec![0; 64 * 1024];
        let mut left = length;
        loop {
            let read = file
                .read(&mut piece)
                .map_err(|error| wrong(error.to_string()))?;
            let Some(bytes) = piece.get(..read).filter(|bytes| !bytes.is_empty()) else {
                break;
            };
            left = left
                .checked_sub(read as u64)
                .ok_or_else(|| wrong("it grew while it was read".to_owned()))?;
            hash.update(bytes);
        }
        let mut found = String::with_capacity(64);
        for byte in hash.finish().as_ref() {
            use fmt::Write as _;
            // Writing to a string cannot fail.
            let _ = write!(found, "{byte:02x}");
        }
        if left != 0 || found != hex {
            return Err(wrong(format!("its bytes hash to sha256:{found}")));
        }
        Ok(())
    }

    /// Hashes every blob that is reachable from here, each before it is read for more.
    fn walk(&self, root: &Descriptor, walked: &mut Walked) -> Result<Found, ReleaseError> {
        let mut found = Found::default();
        let mut next = vec![(root.clone(), 0)];
        while let Some((descriptor, depth)) = next.pop() {
            match walked.sizes.get(&descriptor.digest) {
                Some(size) if *size == descriptor.size => {}
                Some(_) => {
                    return Err(ReleaseError::Digest {
                        digest: descriptor.digest,
                        message: "two descriptors state two sizes".to_owned(),
                    });
                }
                None => {
                    walked.bytes = walked.bytes.saturating_add(descriptor.size);
                    if walked.sizes.len() >= RELEASE_BLOBS_MAX || walked.bytes > RELEASE_BYTES_MAX {
                        return Err(self.broken(format!(
                            "more than {RELEASE_BLOBS_MAX} blobs or {RELEASE_BYTES_MAX} bytes"
                        )));
                    }
                    self.check_blob(&descriptor)?;
                    walked
                        .sizes
                        .insert(descriptor.digest.clone(), descriptor.size);
                }
            }
            if descriptor.is_lock() {
                found.locks.insert(descriptor.digest.clone());
            }
            if !descriptor.is(&INDEX_TYPES) && !descriptor.is(&MANIFEST_TYPES) {
                continue;
            }
            if depth >= RELEASE_DEPTH_MAX {
                return Err(self.broken(format!("indexes nest deeper than {RELEASE_DEPTH_MAX}")));
            }
            let node = self.node(&descriptor.digest)?;
            found
                .versions
                .extend(node.annotations.get(VERSION).cloned());
            let children = node
                .manifests
                .into_iter()
                .chain(node.layers)
                .chain(node.config);
            next.extend(children.map(|child| (child, depth + 1)));
            if next.len() > RELEASE_BLOBS_MAX * RELEASE_DEPTH_MAX {
                return Err(self.broken(format!("more than {RELEASE_BLOBS_MAX} blobs")));
            }
        }
        Ok(found)
    }

    /// Blobs that nothing referred to.
    fn surplus(&self, walked: &Walked) -> Result<Vec<String>, ReleaseError> {
        let names = self.names(&["blobs", "sha256"])?.into_iter();
        Ok(names
            .filter(|name| !walked.sizes.contains_key(&format!("sha256:{name}")))
            .map(|name| crate::error::clip(&name))
            .collect())
    }
}

/// The blobs that were hashed, with their sizes.
#[derive(Default)]
struct Walked {
    sizes: BTreeMap<String, u64>,
    bytes: u64,
}

/// What a walk met.
#[derive(Default)]
struct Found {
    locks: BTreeSet<String>,
    versions: BTreeSet<String>,
}

/// A signature and the bytes that it is over.
struct Claim {
    over: Vec<u8>,
    signature: Vec<u8>,
}

/// What signatures there are: those over this release, and how many are over something else.
struct Claims {
    claims: Vec<Claim>,
    void: usize,
}

/// Whether cosign's payload speaks of this manifest.
fn is_claim_of(payload: &[u8], digest: &str) -> bool {
    json::parse(payload).is_ok_and(|claim| {
        let text = |pointer| claim.pointer(pointer).and_then(Value::as_str);
        text("/critical/type") == Some(SIMPLE_SIGNING_WORD)
            && text("/critical/image/docker-manifest-digest") == Some(digest)
    })
}

/// The BLAKE3 fingerprint of a lock file: of its RFC 8785 form without the member `fingerprint`.
///
/// # Errors
/// A sentence, if it is no JSON object, repeats a key, or cannot be written canonically.
pub fn lock_fingerprint(lock: &[u8]) -> Result<String, String> {
    let value = json::parse(lock).map_err(|error| error.to_string())?;
    let Value::Object(mut members) = value else {
        return Err("the lock file must be a JSON object".to_owned());
    };
    members.remove("fingerprint");
    let canonical =
        serde_json_canonicalizer::to_vec(&members).map_err(|error| error.to_string())?;
    Ok(format!("blake3:{}", blake3::hash(&canonical).to_hex()))
}

struct Lock {
    name: String,
    version: Version,
    fingerprint: String,
    created_at: String,
    created_unix_ms: u64,
}

impl Lock {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let value = json::parse(bytes).map_err(|error| error.to_string())?;
        let text = |key: &str| {
            value
                .get(key)
                .and_then(Value::as_str)
                .map(str::to_owned)
                .ok_or_else(|| format!("`{key}` is missing or no text"))
        };
        let stated = text("fingerprint")?;
        let found = lock_fingerprint(bytes)?;
        if stated != found {
            return Err(format!("it states {stated} and has {found}"));
        }
        if value.get("format").and_then(Value::as_u64) != Some(1) {
            return Err("`format` must be 1".to_owned());
        }
        let version = text("version")?;
        // Without a time of its own no key's window could be asked.
        let created_at = text("created_at")?;
        let created_unix_ms =
            unix_ms(&created_at).ok_or("`created_at` must be an RFC 3339 time")?;
        Ok(Self {
            name: text("name")?,
            version: Version::parse(&version).map_err(|error| format!("`version`: {error}"))?,
            fingerprint: found,
            created_at,
            created_unix_ms,
        })
    }
}

impl VerifiedRelease {
    /// This, if it is the release of what was asked for: signatures say who made a release, not that it is
    /// the one that is to be installed here.
    ///
    /// # Errors
    /// [`ReleaseError::Name`].
    pub fn of(self, name: Option<&str>) -> Result<Self, ReleaseError> {
        match name.filter(|name| *name != self.name) {
            None => Ok(self),
            Some(expected) => Err(ReleaseError::Name {
                expected: crate::error::clip(expected),
                found: crate::error::clip(&self.name),
            }),
        }
    }
}

/// Verifies the release in a directory, in four steps. `signatures` are detached signatures over its
/// manifest that lie elsewhere; `at_least` is the oldest version that may follow what runs.
///
/// # Errors
/// The first step that fails, as [`ReleaseError`].
pub fn verify_release(
    dir: &Path,
    trust: &TrustFile,
    signatures: &[Vec<u8>],
    at_least: &Version,
) -> Result<VerifiedRelease, ReleaseError> {
    let at = |step| Layout { dir, step };

    // Step 1: signatures. Nothing is believed of what the index says but where signatures lie.
    let layout = at(ReleaseStep::Signatures);
    let needed = trust
        .threshold_of(Role::Release)
        .ok_or(ReleaseError::NoRole)?;
    let (release, described) = layout.open()?;
    layout.hex(&release.digest)?;
    let Claims { claims, void } = layout.claims(&release, &described, signatures)?;
    let signed_by = |at: Option<u64>| {
        let mut ids = BTreeSet::new();
        let mut unknown = void;
        for claim in &claims {
            let signature = std::slice::from_ref(&claim.signature);
            let quorum = trust.quorum(Role::Release, &claim.over, signature, at);
            unknown += quorum.unknown;
            ids.extend(quorum.ids);
        }
        (ids.into_iter().collect::<Vec<String>>(), unknown)
    };
    let (ids, unknown) = signed_by(None);
    if ids.len() < needed {
        return Err(ReleaseError::Signature {
            valid: ids.len(),
            needed,
            unknown,
            digest: release.digest,
        });
    }

    // Step 2: SHA-256 digests and sizes, from the signed digest down.
    let layout = at(ReleaseStep::Digests);
    let mut walked = Walked::default();
    // What is reachable from a signature's manifest only is hashed, and no part of the release.
    let found = layout.walk(&release, &mut walked)?;
    for signature in &described {
        layout.walk(signature, &mut walked)?;
    }
    let surplus = layout.surplus(&walked)?;

    // Step 3: the behavioural fingerprint.
    let layout = at(ReleaseStep::Fingerprint);
    let locks: Vec<&String> = found.locks.iter().collect();
    let [digest] = locks.as_slice() else {
        return Err(ReleaseError::Fingerprint(format!(
            "the release must hold one lock file (media type {LOCK_TYPE} or title {LOCK_TITLE}), not {}",
            locks.len()
        )));
    };
    let lock = Lock::read(&layout.blob(digest)?)
        .map_err(|why| ReleaseError::Fingerprint(format!("lock file: {why}")))?;
    let (signers, _) = signed_by(Some(lock.created_unix_ms));
    if signers.len() < needed {
        return Err(ReleaseError::KeyTime {
            valid: signers.len(),
            needed,
            created_at: lock.created_at.clone(),
        });
    }

    // Step 4: the version.
    let version = lock.version.to_string();
    if let Some(other) = found.versions.iter().find(|stated| **stated != version) {
        return Err(ReleaseError::Version(format!(
            "the lock file states version {version}, an annotation of the image {}",
            crate::error::clip(other)
        )));
    }
    if lock.version < *at_least {
        return Err(ReleaseError::Version(format!(
            "version {version} is below {at_least}, which must not be gone back from"
        )));
    }
    Ok(VerifiedRelease {
        digest: release.digest,
        signers,
        blobs: walked.sizes.len(),
        bytes: walked.bytes,
        fingerprint: lock.fingerprint,
        name: lock.name,
        version,
        surplus,
    })
}
