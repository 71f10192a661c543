//! Import of OPA bundles: a `.tar.gz` with `.manifest` and `.signatures.json` becomes the files of a bundle
//! of ours, with a report of what in it this node does not run.
//!
//! The signature is checked before anything else of the contents is looked at, with a key that the
//! operator pinned: an OPA signature has no epoch and no expiry, so it says where a bundle came from, not that
//! it is the newest. That is why an import ends in a directory that the policy authority builds and signs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use aws_lc_rs::digest::{self, SHA256, SHA384, SHA512, SHA512_256};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flate2::bufread::GzDecoder;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tar::{Archive, EntryType};
use thiserror::Error;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::archive::{DATA, INPUT_SCHEMA, MANIFEST, POLICIES_DIR, REGO};
use crate::bundle::{BundleBuilder, run_tests};
use crate::error::{BundleError, clip};
use crate::json as strict;
use crate::limits::{
    FILE_BYTES_MAX, FILES_MAX, OPA_BYTES_MAX, OPA_ENTRIES_MAX, OPA_PATH_BYTES_MAX,
    OPA_UNPACKED_BYTES_MAX, TRUST_KEYS_MAX,
};
use crate::rego_program::{Module, parse};
use crate::rego_text::author_words;
use crate::template::template;

const OPA_MANIFEST: &str = ".manifest";
const SIGNATURES: &str = ".signatures.json";

/// A key that may have signed an OPA bundle.
#[derive(Debug, Clone)]
pub struct OpaKey {
    id: String,
    rsa: bool,
    key: Vec<u8>,
}

/// What the imported bundle is to be.
#[derive(Debug, Clone)]
pub struct OpaImport {
    /// Name of the bundle.
    pub name: String,
    /// Domain that it is for.
    pub domain: String,
    /// When it is made, unix milliseconds.
    pub created_unix_ms: u64,
    /// Actions that it is to decide; each gets an open schema for its author to close.
    pub actions: BTreeSet<String>,
    /// Types of principals.
    pub principals: BTreeSet<String>,
    /// Types of resources.
    pub resources: BTreeSet<String>,
    /// The rule whose value is `allow`, such as `data.authz.allow`, unless the bundle has
    /// `data.tidelock.decision`.
    pub allow: Option<String>,
    /// Keys that may have signed it.
    pub keys: Vec<OpaKey>,
    /// Scope that the signature must name.
    pub scope: Option<String>,
    /// Take a bundle without a signature.
    pub allow_unsigned: bool,
}

/// Why an OPA bundle is not looked at any further.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OpaError {
    /// The archive is not one that OPA makes, or is too large.
    #[error("{0}")]
    Archive(String),
    /// There is no signature, and none was waived.
    #[error(
        "the bundle has no {SIGNATURES}: have it signed with `opa sign`, or say --allow-unsigned"
    )]
    Unsigned,
    /// The signature, or what it says of a file, does not hold.
    #[error("signature: {0}")]
    Signature(String),
    /// A delta bundle: a change to a bundle that is not here.
    #[error("this is a delta bundle (patch.json): export the whole bundle")]
    Delta,
    /// A key is of no use.
    #[error("key `{id}`: {message}")]
    Key {
        /// The key's id.
        id: String,
        /// What is wrong.
        message: String,
    },
    /// What the import was asked for cannot be.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

impl OpaError {
    fn archive(message: impl Into<String>) -> Self {
        Self::Archive(message.into())
    }

    fn signature(message: impl Into<String>) -> Self {
        Self::Signature(message.into())
    }
}

/// What an OPA bundle holds, and what of it this node does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpaReport {
    /// Revision that its manifest names.
    pub revision: String,
    /// Roots that its manifest names.
    pub roots: Vec<String>,
    /// Id of the key that signed it; none if nobody did.
    pub signed_by: Option<String>,
    /// Each file with what became of it.
    pub files: Vec<OpaFile>,
    /// What keeps the result from being built.
    pub problems: Vec<OpaProblem>,
}

/// A file of an OPA bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpaFile {
    /// Path in the OPA bundle.
    pub path: String,
    /// Where it went, or why it was left out.
    pub becomes: String,
}

/// Something that this node does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpaProblem {
    /// Path in the OPA bundle; empty for the whole.
    pub path: String,
    /// Line, from 1; 0 for a whole file.
    pub line: usize,
    /// What is wrong, and the way out.
    pub message: String,
}

#[derive(Default, Deserialize)]
struct OpaManifest {
    #[serde(default)]
    revision: String,
    #[serde(default)]
    roots: Option<Vec<String>>,
    #[serde(default)]
    rego_version: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Signatures {
    signatures: Vec<String>,
    #[serde(default)]
    plugin: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct Claims {
    files: Vec<Claim>,
    #[serde(default)]
    keyid: Option<String>,
    #[serde(default)]
    scope: Option<String>,
}

#[derive(Deserialize)]
struct Claim {
    name: String,
    hash: String,
    algorithm: String,
}

/// Files of a bundle of ours: path and bytes.
pub type OpaFiles = Vec<(String, Vec<u8>)>;

type Contents = BTreeMap<String, Vec<u8>>;

impl OpaKey {
    /// A public key in PEM, RSA of at least 2,048 bits or ECDSA on P-256, P-384 or P-521, under its id.
    ///
    /// # Errors
    /// [`OpaError::Key`] for anything else.
    pub fn from_pem(id: &str, pem: &str) -> Result<Self, OpaError> {
        let failed = |message: &str| OpaError::Key {
            id: id.to_owned(),
            message: message.to_owned(),
        };
        let mut blocks = Pem::iter_from_buffer(pem.as_bytes());
        let (Some(Ok(block)), None) = (blocks.next(), blocks.next()) else {
            return Err(failed("not one PEM block"));
        };
        if block.label != "PUBLIC KEY" {
            return Err(failed(
                "expected BEGIN PUBLIC KEY (make it with `openssl pkey -pubout`)",
            ));
        }
        let (rest, spki) = SubjectPublicKeyInfo::from_der(&block.contents)
            .map_err(|_| failed("not a public key"))?;
        let rsa = match spki.algorithm.algorithm.to_id_string().as_str() {
            "1.2.840.113549.1.1.1" => true,
            "1.2.840.10045.2.1" => false,
            _ => return Err(failed("neither an RSA nor an ECDSA key")),
        };
        if !rest.is_empty() {
            return Err(failed("something stands behind the key"));
        }
        Ok(Self {
            id: id.to_owned(),
            rsa,
            key: spki.subject_public_key.data.to_vec(),
        })
    }
}

/// Reads an OPA bundle: the files of a bundle of ours, and the report. There are no files where the
/// report has problems.
///
/// # Errors
/// [`OpaError`] where nothing of the contents can be believed.
pub fn import_opa(bytes: &[u8], wanted: &OpaImport) -> Result<(OpaFiles, OpaReport), OpaError> {
    let mut contents = unpack(bytes)?;
    let signed_by = verify(&mut contents, wanted)?;
    if contents.keys().any(|path| name_of(path) == "patch.json") {
        return Err(OpaError::Delta);
    }
    let manifest: OpaManifest = match contents.get(OPA_MANIFEST) {
        None => OpaManifest::default(),
        Some(bytes) => strict::parse_as(bytes)
            .map_err(|error| OpaError::archive(format!("{OPA_MANIFEST}: {error}")))?,
    };
    let mut import = Import {
        report: OpaReport {
            revision: clip(&manifest.revision),
            roots: manifest
                .roots
                .clone()
                .unwrap_or_else(|| vec![String::new()]),
            signed_by,
            files: Vec::new(),
            problems: Vec::new(),
        },
        data: Map::new(),
        policies: BTreeMap::new(),
    };
    if manifest.rego_version == Some(0) {
        import.problem(
            OPA_MANIFEST,
            0,
            "the rules are Rego of version 0: rewrite them with `opa fmt --rego-v1`",
        );
    }
    for (path, bytes) in &contents {
        import.file(path, bytes);
    }
    import.packages();
    let files = import.assemble(wanted)?;
    Ok((files, import.report))
}

/// The files of the archive, by path without a leading slash. Read in a stream: what is too much ends it.
fn unpack(bytes: &[u8]) -> Result<Contents, OpaError> {
    let failed = |error: std::io::Error| OpaError::archive(format!("archive: {error}"));
    if bytes.len() > OPA_BYTES_MAX {
        return Err(OpaError::archive(format!(
            "larger than {OPA_BYTES_MAX} bytes"
        )));
    }
    let most = OPA_UNPACKED_BYTES_MAX as u64;
    let mut archive = Archive::new(GzDecoder::new(bytes).take(most + 1));
    let mut contents = Contents::new();
    let mut entries = 0_usize;
    for entry in archive.entries().map_err(failed)?.raw(true) {
        let mut entry = entry.map_err(failed)?;
        entries += 1;
        if entries > OPA_ENTRIES_MAX {
            return Err(OpaError::archive(format!(
                "more than {OPA_ENTRIES_MAX} entries"
            )));
        }
        let path = path(&entry.path_bytes())?;
        match entry.header().entry_type() {
            EntryType::Directory => continue,
            EntryType::Regular => {}
            kind => {
                return Err(OpaError::archive(format!(
                    "`{}` is a {kind:?}: only files and directories are allowed",
                    path.escape_debug()
                )));
            }
        }
        if entry.size() > FILE_BYTES_MAX as u64 {
            return Err(OpaError::archive(format!(
                "`{path}` is larger than {FILE_BYTES_MAX} bytes"
            )));
        }
        if contents.len() == FILES_MAX {
            return Err(OpaError::archive(format!("more than {FILES_MAX} files")));
        }
        let mut file = Vec::new();
        entry.read_to_end(&mut file).map_err(failed)?;
        if contents.insert(path.clone(), file).is_some() {
            return Err(OpaError::archive(format!("`{path}` stands twice")));
        }
    }
    // To the end: the checksum stands there, and nothing may stand behind it.
    let mut rest = archive.into_inner();
    std::io::copy(&mut rest, &mut std::io::sink()).map_err(failed)?;
    if rest.limit() == 0 {
        return Err(OpaError::archive(format!(
            "larger than {OPA_UNPACKED_BYTES_MAX} bytes unpacked"
        )));
    }
    if !rest.into_inner().into_inner().is_empty() {
        return Err(OpaError::archive("something stands behind the archive"));
    }
    Ok(contents)
}

/// A path as OPA writes it, with or without a slash before it; never one that leads elsewhere.
fn path(bytes: &[u8]) -> Result<String, OpaError> {
    let text = std::str::from_utf8(bytes).map_err(|_| OpaError::archive("a path is not UTF-8"))?;
    let clean = text
        .strip_prefix("./")
        .or_else(|| text.strip_prefix('/'))
        .unwrap_or(text);
    let clean = clean.strip_suffix('/').unwrap_or(clean);
    let whole = clean.is_empty() && matches!(text, "/" | "./");
    let good = clean.len() <= OPA_PATH_BYTES_MAX
        && !clean.contains(['\\', '\0'])
        && clean
            .split('/')
            .all(|part| !matches!(part, "" | "." | ".."));
    if !good && !whole {
        return Err(OpaError::archive(format!(
            "path `{}` leads out of the bundle or is too long",
            clip(text).escape_debug()
        )));
    }
    Ok(clean.to_owned())
}

/// The id of the key that signed, once every file has the digest that was signed.
fn verify(contents: &mut Contents, wanted: &OpaImport) -> Result<Option<String>, OpaError> {
    let Some(bytes) = contents.remove(SIGNATURES) else {
        return if wanted.allow_unsigned {
            Ok(None)
        } else {
            Err(OpaError::Unsigned)
        };
    };
    let signatures: Signatures = strict::parse_as(&bytes)
        .map_err(|error| OpaError::signature(format!("{SIGNATURES}: {error}")))?;
    if signatures.plugin.is_some() {
        return Err(OpaError::signature("made by a plugin, which is not here"));
    }
    let [token] = signatures.signatures.as_slice() else {
        return Err(OpaError::signature("there must be exactly one"));
    };
    if wanted.keys.len() > TRUST_KEYS_MAX {
        return Err(OpaError::signature(format!(
            "more than {TRUST_KEYS_MAX} keys"
        )));
    }
    let (id, claims) = open(token, &wanted.keys)?;
    if claims.scope.clone().filter(|scope| !scope.is_empty()) != wanted.scope {
        return Err(OpaError::signature(format!(
            "made for scope `{}`, expected `{}`",
            clip(claims.scope.as_deref().unwrap_or_default()),
            wanted.scope.as_deref().unwrap_or_default()
        )));
    }
    let mut signed = BTreeSet::new();
    for claim in &claims.files {
        let name = path(claim.name.as_bytes())?;
        let file = contents.get(&name).ok_or_else(|| {
            OpaError::signature(format!("`{name}` is signed and not in the bundle"))
        })?;
        if !digest_of(&name, file, &claim.algorithm)?.eq_ignore_ascii_case(&claim.hash) {
            return Err(OpaError::signature(format!(
                "`{name}` does not have the digest that was signed"
            )));
        }
        if !signed.insert(name.clone()) {
            return Err(OpaError::signature(format!("`{name}` is signed twice")));
        }
    }
    if let Some(name) = contents.keys().find(|name| !signed.contains(*name)) {
        return Err(OpaError::signature(format!("`{name}` is not signed")));
    }
    Ok(Some(id))
}

/// What a token says, if one of the keys made it.
fn open(token: &str, keys: &[OpaKey]) -> Result<(String, Claims), OpaError> {
    let mut parts = token.split('.');
    let (Some(header), Some(payload), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(OpaError::signature("not a signed token"));
    };
    let decode = |part: &str| {
        URL_SAFE_NO_PAD
            .decode(part)
            .map_err(|_| OpaError::signature("not a signed token"))
    };
    let read = |error: serde_json::Error| OpaError::signature(error.to_string());
    let head: Header = strict::parse_as(&decode(header)?).map_err(read)?;
    if head.crit.is_some() {
        return Err(OpaError::signature("`crit` in the header is not known"));
    }
    let (rsa, algorithm): (bool, &'static dyn VerificationAlgorithm) = match head.alg.as_str() {
        "RS256" => (true, &RSA_PKCS1_2048_8192_SHA256),
        "RS384" => (true, &RSA_PKCS1_2048_8192_SHA384),
        "RS512" => (true, &RSA_PKCS1_2048_8192_SHA512),
        "PS256" => (true, &RSA_PSS_2048_8192_SHA256),
        "PS384" => (true, &RSA_PSS_2048_8192_SHA384),
        "PS512" => (true, &RSA_PSS_2048_8192_SHA512),
        "ES256" => (false, &ECDSA_P256_SHA256_FIXED),
        "ES384" => (false, &ECDSA_P384_SHA384_FIXED),
        "ES512" => (false, &ECDSA_P521_SHA512_FIXED),
        other => {
            return Err(OpaError::signature(format!(
                "algorithm `{}` is not one of RS, PS and ES with 256, 384 or 512",
                clip(other)
            )));
        }
    };
    let payload_bytes = decode(payload)?;
    let named: Value = strict::parse(&payload_bytes).map_err(read)?;
    let claims: Claims = serde_json::from_value(named).map_err(read)?;
    let id = match (&head.kid, &claims.keyid) {
        (Some(a), Some(b)) if a != b => {
            return Err(OpaError::signature("header and claims name different keys"));
        }
        (Some(id), _) | (None, Some(id)) => Some(id.as_str()),
        (None, None) => None,
    };
    let key = match (id, keys) {
        (Some(id), keys) => keys.iter().find(|key| key.id == id),
        (None, [only]) => Some(only),
        (None, _) => None,
    };
    let Some(key) = key else {
        return Err(OpaError::signature(format!(
            "made with key `{}`, which is not pinned",
            clip(id.unwrap_or_default())
        )));
    };
    if key.rsa != rsa {
        return Err(OpaError::signature(format!(
            "key `{}` is not one for algorithm {}",
            key.id, head.alg
        )));
    }
    let message = format!("{header}.{payload}");
    UnparsedPublicKey::new(algorithm, &key.key)
        .verify(message.as_bytes(), &decode(signature)?)
        .map_err(|_| OpaError::signature(format!("not made with key `{}`", key.id)))?;
    Ok((key.id.clone(), claims))
}

/// The digest of a file in hex. Of structured files OPA digests what they say, not how it is written.
fn digest_of(name: &str, bytes: &[u8], algorithm: &str) -> Result<String, OpaError> {
    let algorithm = match algorithm {
        "SHA-256" => &SHA256,
        "SHA-384" => &SHA384,
        "SHA-512" => &SHA512,
        "SHA-512-256" => &SHA512_256,
        other => {
            return Err(OpaError::signature(format!(
                "`{name}` has a digest by `{}`: SHA-256 or stronger is needed",
                clip(other)
            )));
        }
    };
    let hashed = match name_of(name) {
        "data.json" | OPA_MANIFEST => {
            canonical(bytes).map_err(|error| OpaError::signature(format!("`{name}`: {error}")))?
        }
        _ => bytes.to_vec(),
    };
    let digest = digest::digest(algorithm, &hashed);
    Ok(digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A JSON document with sorted keys and without blanks, its numbers as they are written.
fn canonical(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())?;
    strict::parse(bytes).map_err(|error| error.to_string())?;
    let marked = mark_numbers(text)?;
    let value = strict::parse(marked.as_bytes()).map_err(|error| error.to_string())?;
    let mut written = String::new();
    write(&value, &mut written);
    Ok(written.into_bytes())
}

/// Stands before a number that is kept as text. A document that has it itself is refused.
const MARK: &str = "\\u0000n";

/// Puts each number of a document that is known to be JSON into a text.
fn mark_numbers(text: &str) -> Result<String, String> {
    let mut marked = String::with_capacity(text.len());
    let mut in_text = false;
    let mut escaped = false;
    let mut in_number = false;
    for character in text.chars() {
        if in_text {
            marked.push(character);
            in_text = escaped || character != '"';
            escaped = character == '\\' && !escaped;
            continue;
        }
        // `true`, `false` and `null` have no digits, so a number begins with one or with a sign.
        let part = character.is_ascii_digit()
            || character == '-'
            || (in_number && matches!(character, '.' | 'e' | 'E' | '+'));
        if part != in_number {
            marked.push('"');
            if part {
                marked.push_str(MARK);
            }
            in_number = part;
        }
        in_text = character == '"';
        marked.push(character);
    }
    if in_number {
        marked.push('"');
    }
    if text.contains("\\u0000") {
        return Err("a text holds the character U+0000".to_owned());
    }
    Ok(marked)
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            out.push('{');
            for (number, (key, field)) in sorted.into_iter().enumerate() {
                if number > 0 {
                    out.push(',');
                }
                write_text(key, out);
                out.push(':');
                write(field, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (number, item) in items.iter().enumerate() {
                if number > 0 {
                    out.push(',');
                }
                write(item, out);
            }
            out.push(']');
        }
        Value::String(text) => match text.strip_prefix("\0n") {
            Some(number) => out.push_str(number),
            None => write_text(text, out),
        },
        other => out.push_str(&other.to_string()),
    }
}

/// As Go writes a text, without its care for HTML.
fn write_text(text: &str, out: &mut String) {
    let written = Value::from(text).to_string();
    let written = written.replace('\u{2028}', "\\u2028");
    out.push_str(&written.replace('\u{2029}', "\\u2029"));
}

struct Import {
    report: OpaReport,
    data: Map<String, Value>,
    /// Name in our bundle, with the path in theirs and the text.
    policies: BTreeMap<String, (String, String)>,
}

impl Import {
    fn problem(&mut self, path: &str, line: usize, message: impl Into<String>) {
        self.report.problems.push(OpaProblem {
            path: path.to_owned(),
            line,
            message: message.into(),
        });
    }

    fn file(&mut self, path: &str, bytes: &[u8]) {
        let name = name_of(path);
        let becomes = if name == OPA_MANIFEST {
            "read".to_owned()
        } else if name.ends_with("_test.rego") {
            "left out: tests of OPA use `with`; write them in tests/*.json".to_owned()
        } else if path.ends_with(REGO) {
            self.policy(path, bytes)
        } else if name == "data.json" {
            self.data(path, bytes)
        } else if name.ends_with(".wasm") || name == "plan.json" {
            "left out: compiled from the rules, which are compiled anew".to_owned()
        } else if matches!(name, "data.yaml" | "data.yml") {
            self.problem(path, 0, "data in YAML: convert it to JSON");
            "not taken".to_owned()
        } else {
            "left out: OPA does not load it either".to_owned()
        };
        self.report.files.push(OpaFile {
            path: path.to_owned(),
            becomes,
        });
    }

    fn policy(&mut self, path: &str, bytes: &[u8]) -> String {
        let Ok(text) = std::str::from_utf8(bytes) else {
            self.problem(path, 0, "not UTF-8");
            return "not taken".to_owned();
        };
        let stem = path.strip_suffix(REGO).unwrap_or(path);
        let stem: String = stem
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '_' {
                    c
                } else {
                    '-'
                }
            })
            .collect();
        let stem = stem.trim_start_matches(['-', '_']);
        let stem = stem.get(stem.len().saturating_sub(50)..).unwrap_or(stem);
        let stem = stem.trim_start_matches(['-', '_']);
        let mut name = format!("{POLICIES_DIR}p-{stem}{REGO}");
        let mut number = 2;
        while self.policies.contains_key(&name) {
            name = format!("{POLICIES_DIR}p-{stem}-{number}{REGO}");
            number += 1;
        }
        self.policies
            .insert(name.clone(), (path.to_owned(), text.to_owned()));
        name
    }

    fn data(&mut self, path: &str, bytes: &[u8]) -> String {
        let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
        let value = match strict::parse(bytes) {
            Ok(value) => value,
            Err(error) => {
                self.problem(path, error.line(), error.to_string());
                return "not taken".to_owned();
            }
        };
        let mut nested = value;
        for part in dir.rsplit('/').filter(|part| !part.is_empty()) {
            nested = json!({ part: nested });
        }
        let Value::Object(fields) = nested else {
            self.problem(path, 0, "the data document must be an object");
            return "not taken".to_owned();
        };
        let mut leaves = Vec::new();
        paths(&fields, dir, &mut leaves);
        if let Some(leaf) = leaves.iter().find(|leaf| !self.under_roots(leaf)) {
            let message = format!("`{leaf}` lies outside the roots of the manifest");
            self.problem(path, 0, message);
        }
        if let Err(key) = merge(&mut self.data, fields) {
            self.problem(path, 0, format!("`{key}` is in another data.json too"));
        }
        DATA.to_owned()
    }

    fn under_roots(&self, path: &str) -> bool {
        self.report.roots.iter().any(|root| {
            let root = root.trim_matches('/');
            root.is_empty()
                || path
                    .strip_prefix(root)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Looks at every policy by itself, so that one that does not parse hides nothing of the others.
    fn packages(&mut self) {
        let policies: Vec<(String, String)> = self.policies.values().cloned().collect();
        for (path, text) in &policies {
            let module = Module { path, text };
            match parse(&[module]) {
                Err(fault) => self.problem(path, fault.line, fault.message),
                Ok((engine, _, found)) => {
                    for (_, finding) in found {
                        let message = format!("`{}`: {}", finding.name, finding.reason);
                        self.problem(path, finding.line, message);
                    }
                    for package in engine.get_packages().unwrap_or_default() {
                        let package = author_words(&package);
                        let place = package
                            .strip_prefix("data.")
                            .unwrap_or(&package)
                            .replace('.', "/");
                        if !self.under_roots(&place) {
                            let message = format!(
                                "package `{package}` lies outside the roots of the manifest"
                            );
                            self.problem(path, 1, message);
                        }
                    }
                }
            }
        }
    }

    /// The files of a bundle, proved to compile; none where something is in the way.
    fn assemble(&mut self, wanted: &OpaImport) -> Result<OpaFiles, OpaError> {
        let bytes = |value: &Value| {
            strict::to_sorted_bytes(value).map_err(|error| OpaError::archive(error.to_string()))
        };
        let mut files: BTreeMap<String, Vec<u8>> = self
            .policies
            .iter()
            .map(|(name, (_, text))| (name.clone(), text.clone().into_bytes()))
            .collect();
        if let Some(rule) = &wanted.allow {
            let word = |part: &str| {
                !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            };
            if !rule.starts_with("data.") || !rule.split('.').all(word) {
                return Err(OpaError::archive(format!(
                    "`{}` is not a rule such as data.authz.allow",
                    clip(rule)
                )));
            }
            let text = format!("package tidelock\n\ndecision := {{\"allow\": {rule}}}\n");
            files.insert(format!("{POLICIES_DIR}tidelock{REGO}"), text.into_bytes());
        }
        let open = json!({"type": "object", "additionalProperties": true});
        let action = json!({"principal": wanted.principals, "resource": wanted.resources,
            "attributes": open, "params": open, "context": open});
        let actions: Map<String, Value> = wanted
            .actions
            .iter()
            .map(|name| (name.clone(), action.clone()))
            .collect();
        let schema = json!({"format": 1, "actions": actions});
        files.insert(INPUT_SCHEMA.to_owned(), bytes(&schema)?);
        if !self.data.is_empty() {
            let data = Value::Object(self.data.clone());
            files.insert(DATA.to_owned(), bytes(&data)?);
        }
        let base = template(&wanted.name, &wanted.domain, wanted.created_unix_ms)?;
        for (path, text) in base.into_iter().filter(|(path, _)| path == MANIFEST) {
            let mut manifest =
                strict::parse(&text).map_err(|error| OpaError::archive(error.to_string()))?;
            if let Some(fields) = manifest.as_object_mut() {
                fields.insert("engine".to_owned(), "rego".into());
                if let Some(classes) = fields.get_mut("classes").and_then(Value::as_object_mut) {
                    // Nothing is known of what the actions do: all of them have effects.
                    classes.remove("observe");
                }
            }
            files.insert(path, bytes(&manifest)?);
        }
        if self.report.problems.is_empty() {
            let builder = files
                .iter()
                .fold(BundleBuilder::new(), |builder, (path, bytes)| {
                    builder.file(path, bytes.clone())
                });
            if let Err(error) = builder.build().and_then(|archive| run_tests(&archive)) {
                let (path, line, message) = self.locate(&error);
                self.problem(&path, line, message);
            }
        }
        if !self.report.problems.is_empty() {
            return Ok(Vec::new());
        }
        Ok(files.into_iter().collect())
    }

    fn locate(&self, error: &BundleError) -> (String, usize, String) {
        match error {
            BundleError::Compile {
                file,
                line,
                message,
            } => {
                let theirs = self.policies.get(file).map(|(path, _)| path.clone());
                (
                    theirs.unwrap_or_else(|| file.clone()),
                    *line,
                    message.clone(),
                )
            }
            other => (String::new(), 0, other.to_string()),
        }
    }
}

/// The paths of the leaves below a directory, in the manner of roots.
fn paths(fields: &Map<String, Value>, dir: &str, found: &mut Vec<String>) {
    let mut place = fields;
    for part in dir.split('/').filter(|part| !part.is_empty()) {
        match place.get(part) {
            Some(Value::Object(inner)) => place = inner,
            _ => {
                found.push(dir.to_owned());
                return;
            }
        }
    }
    let under = |key: &String| match dir {
        "" => key.clone(),
        dir => format!("{dir}/{key}"),
    };
    fn walk(value: &Value, at: String, found: &mut Vec<String>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, inner) in map {
                    walk(inner, format!("{at}/{key}"), found);
                }
            }
            _ => found.push(at),
        }
    }
    for (key, value) in place {
        walk(value, under(key), found);
    }
}

/// Joins two documents; the key that both have.
fn merge(into: &mut Map<String, Value>, from: Map<String, Value>) -> Result<(), String> {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (None, value) => _ = into.insert(key, value),
            (Some(Value::Object(held)), Value::Object(more)) => merge(held, more)?,
            (Some(_), _) => return Err(key),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_digested_as_opa_does() {
        let text =
            "{ \"b\" : [1.0, -2e+3, true, null, \"x\\u00e9<\\n\"],\n \"a\": {\"d\":{}, \"c\": 0} }";
        let written = canonical(text.as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8(written).unwrap(),
            "{\"a\":{\"c\":0,\"d\":{}},\"b\":[1.0,-2e+3,true,null,\"xé<\\n\"]}"
        );
        assert_eq!(canonical(b"12").unwrap(), b"12");
        assert_eq!(
            canonical("\"\u{2028}\"".as_bytes()).unwrap(),
            b"\"\\u2028\""
        );
        assert!(canonical(b"{\"a\":1,\"a\":1}").is_err());
        assert!(canonical(b"[\"\\u0000n1\"]").is_err());
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for (given, clean) in [
            ("/a/b.rego", "a/b.rego"),
            ("./a", "a"),
            ("a/", "a"),
            ("/", ""),
        ] {
            assert_eq!(path(given.as_bytes()).unwrap(), clean);
        }
        for given in ["../a", "a/../b", "//a", "a//b", "a/./b", "a\\b", ""] {
            assert!(path(given.as_bytes()).is_err(), "{given}");
        }
        assert!(path("a".repeat(OPA_PATH_BYTES_MAX + 1).as_bytes()).is_err());
    }
}
