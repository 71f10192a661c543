//! The trust file: whose signatures count on this node, for what, and how many of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use aws_lc_rs::digest::{Digest, SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml_edit::{Document, Item, Table, Value};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::archive::is_name;
use crate::json;
use crate::limits::{
    EPOCH_MAX, REPLAY_RECORDS_MAX, SIGNATURES_MAX, TRUST_FILE_BYTES_MAX, TRUST_KEYS_MAX,
};
use crate::manifest::{rfc3339, unix_ms};
use crate::package::{ContentId, Package};

/// What a P-256 `SubjectPublicKeyInfo` begins with; the uncompressed point follows.
pub(crate) const SPKI_PREFIX: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// The word that a trust document begins its type with.
const DOCUMENT_TYPE: &str = "tidelock-trust";

/// Everything that is wrong with a trust file, each with its line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("trust file: {}", .problems.join("; "))]
pub struct TrustError {
    /// One sentence for each mistake, in the order of the file.
    pub problems: Vec<String>,
}

/// What a key may sign. Each role has a threshold of its own.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Bundles, and statements that one is still in force.
    #[default]
    Policy,
    /// Emergency bundles: short-lived, and shown as such wherever the node speaks.
    BreakGlass,
    /// Releases of the program.
    Release,
    /// The next version of the trust document.
    Trust,
}

impl Role {
    /// Every role, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Policy, Self::BreakGlass, Self::Release, Self::Trust];

    /// The word in files and messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::BreakGlass => "break-glass",
            Self::Release => "release",
            Self::Trust => "trust",
        }
    }

    /// The role of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which recorded actions that would come out otherwise keep a bundle from being activated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockOn {
    /// None: they are reported only.
    #[default]
    None,
    /// Any of them.
    AnyFlip,
    /// Those that were denied and would be allowed.
    DenyToAllow,
}

impl BlockOn {
    /// Every choice, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::None, Self::AnyFlip, Self::DenyToAllow];

    /// The word in files and messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::AnyFlip => "any_flip",
            Self::DenyToAllow => "deny_to_allow",
        }
    }
}

/// `[activation]` of a trust file: what a well-signed bundle must pass besides before it decides, on
/// whatever way it came. Without the table nothing further is asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationRules {
    /// Which flips of recorded actions block.
    #[serde(default, skip_serializing_if = "is_report_only")]
    pub block_on: BlockOn,
    /// How many of the newest recorded actions are asked again for that; [`REPLAY_RECORDS_MAX`] if it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_records: Option<u64>,
    /// How many distinct keys of role `policy` must have signed a bundle that is not proved to permit
    /// nothing new; absent: no more than any other.
    #[serde(
        default,
        rename = "widening_signatures",
        skip_serializing_if = "Option::is_none"
    )]
    pub widening_threshold: Option<usize>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_report_only(block_on: &BlockOn) -> bool {
    *block_on == BlockOn::None
}

impl ActivationRules {
    /// Whether they ask for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What makes no sense about them, given how many keys of role `policy` there are.
    fn problems(&self, policy_keys: usize) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(records) = self.replay_records {
            if !(1..=REPLAY_RECORDS_MAX).contains(&records) {
                problems.push(format!(
                    "activation.replay_records must be 1 to {REPLAY_RECORDS_MAX}"
                ));
            }
            if self.block_on == BlockOn::None {
                problems.push(
                    "activation.replay_records says over how many actions `block_on` looks, and \
                     `block_on` is `none`"
                        .to_owned(),
                );
            }
        }
        if let Some(needed) = self.widening_threshold
            && !(1..=policy_keys).contains(&needed)
        {
            problems.push(format!(
                "activation.widening_signatures must be 1 to the number of keys of role `policy`, \
                 {policy_keys}"
            ));
        }
        problems
    }
}

/// The keys that may sign for a domain, what each may sign, and how many of them must.
///
/// It is a file of the operator's or a version of the trust document that follows from one; both say
/// the same things and have the same identity ([`id`](Self::id)).
#[derive(Debug, Clone)]
pub struct TrustFile {
    domain: String,
    version: u64,
    previous: Option<ContentId>,
    created_unix_ms: Option<u64>,
    thresholds: BTreeMap<Role, usize>,
    activation: ActivationRules,
    keys: Vec<TrustedKey>,
}

#[derive(Debug, Clone)]
pub(crate) struct TrustedKey {
    id: String,
    roles: BTreeSet<Role>,
    not_before_unix_ms: Option<u64>,
    not_after_unix_ms: Option<u64>,
    key: ParsedPublicKey,
    point: Vec<u8>,
}

impl TrustedKey {
    /// Whether the key may sign, in this role, what says that it was made at this time.
    fn may(&self, role: Role, at: Option<u64>) -> bool {
        self.roles.contains(&role)
            && at.is_none_or(|at| {
                self.not_before_unix_ms.is_none_or(|from| at >= from)
                    && self.not_after_unix_ms.is_none_or(|to| at <= to)
            })
    }
}

/// A key of a trust file, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyInfo {
    /// Its id.
    pub id: String,
    /// What it may sign.
    pub roles: Vec<Role>,
    /// From when on, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before_unix_ms: Option<u64>,
    /// Until when, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after_unix_ms: Option<u64>,
}

/// How signatures fare against one role of a trust file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quorum {
    /// Ids of the distinct keys of the role that signed, sorted.
    pub ids: Vec<String>,
    /// Threshold of the role; none if the trust file does not have it.
    pub needed: Option<usize>,
    /// Signatures that no trusted key verifies.
    pub unknown: usize,
}

impl Quorum {
    /// Whether enough distinct keys signed. Never for a role that the trust file does not have.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        self.needed.is_some_and(|needed| self.ids.len() >= needed)
    }
}

/// The distinct keys that signed something, whatever their roles.
pub(crate) struct Signed<'t> {
    trust: &'t TrustFile,
    keys: BTreeMap<&'t str, &'t TrustedKey>,
    unknown: usize,
}

impl Signed<'_> {
    /// The keys that count for a role, for what says that it was made at this time.
    pub(crate) fn quorum(&self, role: Role, at: Option<u64>) -> Quorum {
        Quorum {
            ids: self
                .keys
                .values()
                .filter(|key| key.may(role, at))
                .map(|key| key.id.clone())
                .collect(),
            needed: self.trust.thresholds.get(&role).copied(),
            unknown: self.unknown,
        }
    }
}

/// The trust document as it is hashed, signed and carried.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDocument {
    r#type: String,
    format: u64,
    domain: String,
    version: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<ContentId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    thresholds: BTreeMap<Role, usize>,
    #[serde(default, skip_serializing_if = "ActivationRules::is_empty")]
    activation: ActivationRules,
    keys: Vec<RawKey>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    id: String,
    roles: BTreeSet<Role>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_before: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
    /// Base64 of the DER `SubjectPublicKeyInfo`.
    public_key: String,
}

fn only(problem: impl Into<String>) -> TrustError {
    TrustError {
        problems: vec![problem.into()],
    }
}

impl TrustFile {
    /// Reads a trust file and reports every mistake in it at once.
    ///
    /// # Errors
    /// [`TrustError`] with a line for each mistake.
    pub fn parse(text: &str) -> Result<Self, TrustError> {
        if text.len() > TRUST_FILE_BYTES_MAX {
            return Err(only(format!("larger than {TRUST_FILE_BYTES_MAX} bytes")));
        }
        let document = Document::parse(text).map_err(|error| only(error.to_string()))?;
        let mut reader = Reader {
            text,
            problems: Vec::new(),
        };
        let file = reader.file(document.as_table());
        if reader.problems.is_empty() {
            Ok(file)
        } else {
            Err(TrustError {
                problems: reader.problems,
            })
        }
    }

    /// Reads a trust document in its one form, as [`document`](Self::document) writes it.
    ///
    /// # Errors
    /// [`TrustError`]: not in that form, or it makes no sense.
    pub fn from_document(bytes: &[u8]) -> Result<Self, TrustError> {
        if bytes.len() > TRUST_FILE_BYTES_MAX {
            return Err(only(format!("larger than {TRUST_FILE_BYTES_MAX} bytes")));
        }
        let raw: RawDocument = json::parse_as(bytes).map_err(|error| only(error.to_string()))?;
        if raw.r#type != DOCUMENT_TYPE || raw.format != 2 {
            return Err(only(format!(
                "type must be {DOCUMENT_TYPE} and format 2, not {} and {}",
                raw.r#type, raw.format
            )));
        }
        let mut problems = Vec::new();
        let mut time = |text: &Option<String>| -> Option<u64> {
            let text = text.as_ref()?;
            let at = unix_ms(text);
            if at.is_none() {
                problems.push(format!(
                    "`{text}` is not a time such as 2026-01-31T12:00:00Z"
                ));
            }
            at
        };
        let created_unix_ms = time(&raw.created_at);
        let times: Vec<(Option<u64>, Option<u64>)> = raw
            .keys
            .iter()
            .map(|key| (time(&key.not_before), time(&key.not_after)))
            .collect();
        let mut keys = Vec::new();
        for (raw, (not_before_unix_ms, not_after_unix_ms)) in raw.keys.into_iter().zip(times) {
            let read = STANDARD
                .decode(&raw.public_key)
                .map_err(|_| "not base64")
                .and_then(|der| point_of(&der));
            match read {
                Ok((key, point)) => keys.push(TrustedKey {
                    id: raw.id,
                    roles: raw.roles,
                    not_before_unix_ms,
                    not_after_unix_ms,
                    key,
                    point,
                }),
                Err(reason) => problems.push(format!("key `{}`: {reason}", raw.id)),
            }
        }
        let file = Self {
            domain: raw.domain,
            version: raw.version,
            previous: raw.previous,
            created_unix_ms,
            thresholds: raw.thresholds,
            activation: raw.activation,
            keys,
        };
        problems.extend(file.problems());
        if problems.is_empty() && file.document().as_deref() != Ok(bytes) {
            problems.push(
                "the document is not in its one form: `tidelock trust rotate` writes it".to_owned(),
            );
        }
        if problems.is_empty() {
            Ok(file)
        } else {
            Err(TrustError { problems })
        }
    }

    /// The document that says what this file says: the bytes that are hashed and signed.
    ///
    /// # Errors
    /// [`TrustError`] for a time that is none of the calendar.
    pub fn document(&self) -> Result<Vec<u8>, TrustError> {
        let text = |at: Option<u64>| {
            at.map(rfc3339)
                .transpose()
                .map_err(|error| only(error.to_string()))
        };
        let keys = self
            .keys
            .iter()
            .map(|key| {
                Ok(RawKey {
                    id: key.id.clone(),
                    roles: key.roles.clone(),
                    not_before: text(key.not_before_unix_ms)?,
                    not_after: text(key.not_after_unix_ms)?,
                    public_key: key.spki_base64(),
                })
            })
            .collect::<Result<_, TrustError>>()?;
        json::to_sorted_bytes(&RawDocument {
            r#type: DOCUMENT_TYPE.to_owned(),
            format: 2,
            domain: self.domain.clone(),
            version: self.version,
            previous: self.previous.clone(),
            created_at: text(self.created_unix_ms)?,
            thresholds: self.thresholds.clone(),
            activation: self.activation,
            keys,
        })
        .map_err(|error| only(error.to_string()))
    }

    /// The file, format 2, that says what this document says.
    ///
    /// # Errors
    /// [`TrustError`] for a time that is none of the calendar.
    pub fn to_toml(&self) -> Result<String, TrustError> {
        use fmt::Write as _;
        let time = |name: &str, at: Option<u64>| -> Result<String, TrustError> {
            let text = at.map(rfc3339).transpose();
            let text = text.map_err(|error| only(error.to_string()))?;
            Ok(text.map_or_else(String::new, |text| format!("{name} = \"{text}\"\n")))
        };
        let mut text = format!(
            "format = 2\ndomain = \"{}\"\nversion = {}\n",
            self.domain, self.version
        );
        if let Some(previous) = &self.previous {
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(text, "previous = \"{previous}\"");
        }
        text.push_str(&time("created_at", self.created_unix_ms)?);
        text.push_str("\n[thresholds]\n");
        for (role, threshold) in &self.thresholds {
            let _ = writeln!(text, "{role} = {threshold}");
        }
        if !self.activation.is_empty() {
            text.push_str("\n[activation]\n");
        }
        if self.activation.block_on != BlockOn::None {
            let _ = writeln!(text, "block_on = \"{}\"", self.activation.block_on.as_str());
        }
        if let Some(records) = self.activation.replay_records {
            let _ = writeln!(text, "replay_records = {records}");
        }
        if let Some(needed) = self.activation.widening_threshold {
            let _ = writeln!(text, "widening_signatures = {needed}");
        }
        for key in &self.keys {
            let roles: Vec<String> = key.roles.iter().map(|role| format!("\"{role}\"")).collect();
            let _ = writeln!(
                text,
                "\n[[keys]]\nid = \"{}\"\nroles = [{}]",
                key.id,
                roles.join(", ")
            );
            text.push_str(&time("not_before", key.not_before_unix_ms)?);
            text.push_str(&time("not_after", key.not_after_unix_ms)?);
            let _ = writeln!(
                text,
                "public_key_pem = \"\"\"\n-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n\"\"\"",
                key.spki_base64()
            );
        }
        Ok(text)
    }

    /// The same keys and thresholds as the version that follows `before`.
    #[must_use]
    pub fn following(mut self, before: &Self, before_id: ContentId, created_unix_ms: u64) -> Self {
        self.version = before.version.saturating_add(1);
        self.previous = Some(before_id);
        self.created_unix_ms = Some(created_unix_ms);
        self
    }

    /// SHA-256 of the document.
    ///
    /// # Errors
    /// [`TrustError`] for a time that is none of the calendar.
    pub fn id(&self) -> Result<ContentId, TrustError> {
        Ok(ContentId::of(&self.document()?))
    }

    /// A trust file without keys: nothing verifies against it. For a node whose own trust file is
    /// unusable, which starts and denies.
    #[must_use]
    pub fn nobody(domain: &str) -> Self {
        Self {
            domain: domain.to_owned(),
            version: 1,
            previous: None,
            created_unix_ms: None,
            thresholds: BTreeMap::from([(Role::Policy, 1)]),
            activation: ActivationRules::default(),
            keys: Vec::new(),
        }
    }

    /// The domain that the keys speak for.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Its place in the sequence of trust documents; a configured file that says nothing is 1.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Identity of the version before it.
    #[must_use]
    pub fn previous(&self) -> Option<&ContentId> {
        self.previous.as_ref()
    }

    /// When it was made, as it says, Unix milliseconds.
    #[must_use]
    pub fn created_unix_ms(&self) -> Option<u64> {
        self.created_unix_ms
    }

    /// How many distinct keys must have signed a bundle.
    #[must_use]
    pub fn threshold(&self) -> usize {
        self.threshold_of(Role::Policy).unwrap_or(usize::MAX)
    }

    /// How many distinct keys must have signed in this role; none if the file does not have it.
    #[must_use]
    pub fn threshold_of(&self, role: Role) -> Option<usize> {
        self.thresholds.get(&role).copied()
    }

    /// What a bundle must pass besides its signatures.
    #[must_use]
    pub fn activation(&self) -> &ActivationRules {
        &self.activation
    }

    /// Ids of the keys, in the order of the file.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.id.as_str())
    }

    /// The keys, in the order of the file.
    #[must_use]
    pub fn keys(&self) -> Vec<KeyInfo> {
        let info = |key: &TrustedKey| KeyInfo {
            id: key.id.clone(),
            roles: key.roles.iter().copied().collect(),
            not_before_unix_ms: key.not_before_unix_ms,
            not_after_unix_ms: key.not_after_unix_ms,
        };
        self.keys.iter().map(info).collect()
    }

    /// Which keys made these detached signatures over the bytes, in this role. A key counts once,
    /// however many signatures it made; `at` is when the signed thing says that it was made.
    #[must_use]
    pub fn quorum(
        &self,
        role: Role,
        bytes: &[u8],
        signatures: &[Vec<u8>],
        at: Option<u64>,
    ) -> Quorum {
        let hinted = signatures.iter().map(|der| (None, der.as_slice()));
        self.signed(bytes, hinted).quorum(role, at)
    }

    /// The signatures under a package that keys of this file made, one of each key, whatever its roles.
    #[must_use]
    pub fn signatures_of(&self, package: &Package) -> BTreeMap<String, Vec<u8>> {
        let hash: Digest = digest(&SHA256, &package.archive);
        let made_by = |signature: &Vec<u8>| {
            let made = |key: &&TrustedKey| key.key.verify_digest_sig(&hash, signature).is_ok();
            let key = self.keys.iter().find(made)?;
            Some((key.id.clone(), signature.clone()))
        };
        let signatures = package.signatures.iter().take(SIGNATURES_MAX);
        signatures.filter_map(made_by).collect()
    }

    /// Which keys signed a package.
    pub(crate) fn signed_package(&self, package: &Package) -> Signed<'_> {
        let signatures = package.signatures.iter();
        self.signed(
            &package.archive,
            signatures.map(|der| (None, der.as_slice())),
        )
    }

    /// Which keys made these signatures. A hint only says which key to try first; it proves nothing.
    pub(crate) fn signed<'s>(
        &self,
        bytes: &[u8],
        signatures: impl Iterator<Item = (Option<&'s str>, &'s [u8])>,
    ) -> Signed<'_> {
        let hash: Digest = digest(&SHA256, bytes);
        let mut keys = BTreeMap::new();
        let mut unknown = 0;
        // INV-07: bounds the verifications, whatever the caller was given.
        for (hint, signature) in signatures.take(SIGNATURES_MAX) {
            let made_by = |key: &&TrustedKey| key.key.verify_digest_sig(&hash, signature).is_ok();
            let hinted = hint.and_then(|hint| self.keys.iter().find(|key| key.id == hint));
            let signer = hinted
                .filter(made_by)
                .or_else(|| self.keys.iter().find(made_by));
            match signer {
                Some(key) => _ = keys.insert(key.id.as_str(), key),
                None => unknown += 1,
            }
        }
        Signed {
            trust: self,
            keys,
            unknown,
        }
    }

    /// What makes no sense about keys, roles and thresholds.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !is_name(&self.domain) {
            problems.push("domain must be 1 to 63 of letters, digits, `.`, `_`, `-`".to_owned());
        }
        if !(1..=EPOCH_MAX).contains(&self.version) {
            problems.push(format!("version must be 1 to {EPOCH_MAX}"));
        }
        if self.keys.len() > TRUST_KEYS_MAX {
            problems.push(format!("more than {TRUST_KEYS_MAX} keys"));
        }
        for (number, key) in self.keys.iter().enumerate() {
            if !is_name(&key.id) {
                problems.push(format!(
                    "key id `{}` must be 1 to 63 of letters, digits, `.`, `_`, `-`",
                    key.id
                ));
            }
            for other in self.keys.iter().take(number) {
                if other.id == key.id {
                    problems.push(format!("key id `{}` stands twice", key.id));
                } else if other.point == key.point {
                    // Two names for one key would let one signer reach a threshold of two.
                    problems.push(format!("`{}` and `{}` are the same key", key.id, other.id));
                }
            }
            problems.extend(self.key_problems(key));
        }
        if !self.thresholds.contains_key(&Role::Policy) {
            problems.push("no threshold for role `policy`: no bundle could ever verify".to_owned());
        }
        let count_of = |role: &Role| {
            let of_role = |key: &&TrustedKey| key.roles.contains(role);
            self.keys.iter().filter(of_role).count()
        };
        problems.extend(self.activation.problems(count_of(&Role::Policy)));
        for (role, threshold) in &self.thresholds {
            let count = count_of(role);
            if !(1..=count).contains(threshold) {
                problems.push(format!(
                    "threshold of role `{role}` must be 1 to the number of its keys, {count}"
                ));
            }
        }
        problems
    }

    fn key_problems(&self, key: &TrustedKey) -> Vec<String> {
        let mut problems = Vec::new();
        if key.roles.is_empty() {
            problems.push(format!("key `{}` has no role", key.id));
        }
        for role in &key.roles {
            if !self.thresholds.contains_key(role) {
                problems.push(format!(
                    "key `{}` has role `{role}`, which has no threshold",
                    key.id
                ));
            }
        }
        if let (Some(from), Some(to)) = (key.not_before_unix_ms, key.not_after_unix_ms)
            && from > to
        {
            problems.push(format!("key `{}` ends before it begins", key.id));
        }
        problems
    }
}

impl TrustedKey {
    fn spki_base64(&self) -> String {
        STANDARD.encode([SPKI_PREFIX, &self.point].concat())
    }
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<String>,
}

impl Reader<'_> {
    fn problem(&mut self, span: Option<std::ops::Range<usize>>, message: impl fmt::Display) {
        let before = span.and_then(|span| self.text.get(..span.start));
        self.problems.push(match before {
            Some(before) => {
                let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
                format!("line {line}: {message}")
            }
            None => message.to_string(),
        });
    }

    fn file(&mut self, table: &Table) -> TrustFile {
        let format = self.integer(table, "format");
        let is_first = format != Some(2);
        match format {
            Some(1 | 2) | None => {}
            Some(other) => {
                let span = table.get("format").and_then(Item::span);
                self.problem(
                    span,
                    format!("format {other} is not known, this node reads 1 and 2"),
                );
            }
        }
        if is_first {
            self.known_keys(table, &["format", "domain", "threshold", "keys"]);
        } else {
            self.known_keys(
                table,
                &[
                    "format",
                    "domain",
                    "version",
                    "previous",
                    "created_at",
                    "thresholds",
                    "activation",
                    "keys",
                ],
            );
        }
        let domain = self.string(table, "domain").unwrap_or_default();
        if !domain.is_empty() && !is_name(&domain) {
            let span = table.get("domain").and_then(Item::span);
            self.problem(
                span,
                "domain must be 1 to 63 of letters, digits, `.`, `_`, `-`",
            );
        }
        let keys = self.keys(table, is_first);
        if is_first {
            let thresholds = self.one_threshold(table, keys.len());
            return TrustFile {
                domain,
                version: 1,
                previous: None,
                created_unix_ms: None,
                thresholds,
                activation: ActivationRules::default(),
                keys,
            };
        }
        let version = match table.get("version") {
            None => 1,
            Some(_) => self
                .integer(table, "version")
                .and_then(|value| u64::try_from(value).ok())
                .unwrap_or_default(),
        };
        let previous = self.optional(table, "previous").and_then(|text| {
            let id = ContentId::try_from(text);
            if id.is_err() {
                let span = table.get("previous").and_then(Item::span);
                self.problem(span, "previous must be `sha256:` and 64 hex digits");
            }
            id.ok()
        });
        let file = TrustFile {
            domain,
            version,
            previous,
            created_unix_ms: self.time(table, "created_at"),
            thresholds: self.thresholds(table),
            activation: self.activation(table),
            keys,
        };
        // What has a line was said with it; what is left concerns the file as a whole.
        if self.problems.is_empty() {
            self.problems.extend(file.problems());
        }
        file
    }

    fn one_threshold(&mut self, table: &Table, keys: usize) -> BTreeMap<Role, usize> {
        let threshold = self.integer(table, "threshold");
        let count = i64::try_from(keys).unwrap_or(i64::MAX);
        if let Some(threshold) = threshold
            && !(1..=count.max(1)).contains(&threshold)
        {
            let span = table.get("threshold").and_then(Item::span);
            self.problem(
                span,
                format!("threshold must be 1 to the number of usable keys, {count}"),
            );
        }
        let threshold = threshold
            .and_then(|value| usize::try_from(value).ok())
            .unwrap_or(1);
        BTreeMap::from([(Role::Policy, threshold)])
    }

    fn thresholds(&mut self, table: &Table) -> BTreeMap<Role, usize> {
        let Some(item) = table.get("thresholds") else {
            self.problem(None, "no [thresholds]: say how many keys each role needs");
            return BTreeMap::new();
        };
        let Some(thresholds) = item.as_table() else {
            self.problem(
                item.span(),
                "thresholds must be written as a [thresholds] table",
            );
            return BTreeMap::new();
        };
        let words = Role::ALL.map(Role::as_str);
        self.known_keys(thresholds, &words);
        let mut found = BTreeMap::new();
        for role in Role::ALL {
            if thresholds.contains_key(role.as_str()) {
                let threshold = self.integer(thresholds, role.as_str());
                let threshold = threshold.and_then(|value| usize::try_from(value).ok());
                found.insert(role, threshold.unwrap_or_default());
            }
        }
        found
    }

    /// `[activation]`, which may be absent. No number of signatures and 0 of them are the same.
    fn activation(&mut self, table: &Table) -> ActivationRules {
        let Some(item) = table.get("activation") else {
            return ActivationRules::default();
        };
        let Some(rules) = item.as_table() else {
            self.problem(
                item.span(),
                "activation must be written as an [activation] table",
            );
            return ActivationRules::default();
        };
        self.known_keys(
            rules,
            &["block_on", "replay_records", "widening_signatures"],
        );
        let block_on = self.optional(rules, "block_on").and_then(|word| {
            let choice = BlockOn::ALL
                .into_iter()
                .find(|choice| choice.as_str() == word);
            if choice.is_none() {
                let words = BlockOn::ALL.map(BlockOn::as_str).join(", ");
                let span = rules.get("block_on").and_then(Item::span);
                self.problem(span, format!("block_on must be one of: {words}"));
            }
            choice
        });
        let mut number = |key: &str| {
            rules.get(key)?;
            let number = self.integer(rules, key)?;
            // What is no count is out of bounds, and said to be.
            Some(u64::try_from(number).unwrap_or(u64::MAX))
        };
        ActivationRules {
            block_on: block_on.unwrap_or_default(),
            replay_records: number("replay_records"),
            widening_threshold: number("widening_signatures")
                .filter(|needed| *needed > 0)
                .map(|needed| usize::try_from(needed).unwrap_or(usize::MAX)),
        }
    }

    fn roles(&mut self, table: &Table) -> BTreeSet<Role> {
        let Some(item) = table.get("roles") else {
            self.problem(table.span(), "`roles` is missing");
            return BTreeSet::new();
        };
        let roles: Option<BTreeSet<Role>> = item.as_array().and_then(|array| {
            array
                .iter()
                .map(|word| Role::parse(word.as_str()?))
                .collect()
        });
        roles.unwrap_or_else(|| {
            let words = Role::ALL.map(Role::as_str).join(", ");
            self.problem(item.span(), format!("roles must be a list of: {words}"));
            BTreeSet::new()
        })
    }

    /// A text that may be absent.
    fn optional(&mut self, table: &Table, key: &str) -> Option<String> {
        table.get(key)?;
        self.string(table, key)
    }

    fn time(&mut self, table: &Table, key: &str) -> Option<u64> {
        let text = self.optional(table, key)?;
        let at = unix_ms(&text);
        if at.is_none() {
            let span = table.get(key).and_then(Item::span);
            self.problem(
                span,
                format!("{key} must be a time such as 2026-01-31T12:00:00Z, not `{text}`"),
            );
        }
        at
    }

    fn keys(&mut self, table: &Table, is_first: bool) -> Vec<TrustedKey> {
        let Some(item) = table.get("keys") else {
            self.problem(
                None,
                "no [[keys]]: name at least one key that may sign bundles",
            );
            return Vec::new();
        };
        let Some(tables) = item.as_array_of_tables() else {
            self.problem(item.span(), "keys must be written as [[keys]] tables");
            return Vec::new();
        };
        if tables.len() > TRUST_KEYS_MAX {
            self.problem(item.span(), format!("more than {TRUST_KEYS_MAX} keys"));
            return Vec::new();
        }
        let mut keys: Vec<TrustedKey> = Vec::new();
        for table in tables {
            let known: &[&str] = match is_first {
                true => &["id", "public_key_pem"],
                false => &["id", "roles", "not_before", "not_after", "public_key_pem"],
            };
            self.known_keys(table, known);
            let id = self.string(table, "id");
            let pem = self.string(table, "public_key_pem");
            let (roles, not_before_unix_ms, not_after_unix_ms) = match is_first {
                // A file of the first format gives no power that it did not give before.
                true => (BTreeSet::from([Role::Policy]), None, None),
                false => (
                    self.roles(table),
                    self.time(table, "not_before"),
                    self.time(table, "not_after"),
                ),
            };
            let span = table.get("id").and_then(Item::span);
            if let Some(id) = &id {
                if !is_name(id) {
                    self.problem(
                        span.clone(),
                        format!("key id `{id}` must be 1 to 63 of letters, digits, `.`, `_`, `-`"),
                    );
                }
                if keys.iter().any(|key| key.id == *id) {
                    self.problem(span.clone(), format!("key id `{id}` stands twice"));
                }
            }
            let Some(pem) = pem else { continue };
            let pem_span = table.get("public_key_pem").and_then(Item::span);
            match public_key(&pem) {
                Err(reason) => self.problem(pem_span, format!("public_key_pem: {reason}")),
                Ok((key, point)) => {
                    let id = id.unwrap_or_default();
                    if let Some(other) = keys.iter().find(|key| key.point == point) {
                        // Two names for one key would let one signer reach a threshold of two.
                        let message = format!("`{id}` and `{}` are the same key", other.id);
                        self.problem(pem_span, message);
                    }
                    keys.push(TrustedKey {
                        id,
                        roles,
                        not_before_unix_ms,
                        not_after_unix_ms,
                        key,
                        point,
                    });
                }
            }
        }
        keys
    }

    fn known_keys(&mut self, table: &Table, known: &[&str]) {
        for (key, item) in table {
            if !known.contains(&key) {
                let span = table
                    .key(key)
                    .and_then(toml_edit::Key::span)
                    .or_else(|| item.span());
                self.problem(
                    span,
                    format!("unknown key `{key}`, known are {}", known.join(", ")),
                );
            }
        }
    }

    fn integer(&mut self, table: &Table, key: &str) -> Option<i64> {
        self.value(table, key, "an integer", Value::as_integer)
    }

    fn string(&mut self, table: &Table, key: &str) -> Option<String> {
        self.value(table, key, "a text", |value| {
            value.as_str().map(str::to_owned)
        })
    }

    fn value<T>(
        &mut self,
        table: &Table,
        key: &str,
        kind: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let Some(item) = table.get(key) else {
            self.problem(table.span(), format!("`{key}` is missing"));
            return None;
        };
        let value = item.as_value().and_then(read);
        if value.is_none() {
            self.problem(item.span(), format!("`{key}` must be {kind}"));
        }
        value
    }
}

/// An uncompressed P-256 point out of a PEM `PUBLIC KEY`.
fn public_key(text: &str) -> Result<(ParsedPublicKey, Vec<u8>), &'static str> {
    let mut blocks = Pem::iter_from_buffer(text.as_bytes());
    let block = match (blocks.next(), blocks.next()) {
        (Some(Ok(block)), None) => block,
        (Some(Ok(_)), Some(_)) => return Err("more than one PEM block"),
        _ => return Err("not a PEM block"),
    };
    if block.label.contains("PRIVATE") {
        return Err("this is a private key: put the public key here, and replace that key pair");
    }
    if block.label != "PUBLIC KEY" {
        return Err("expected BEGIN PUBLIC KEY (make it with `openssl pkey -pubout`)");
    }
    point_of(&block.contents)
}

/// An uncompressed P-256 point out of a DER `SubjectPublicKeyInfo`.
fn point_of(der: &[u8]) -> Result<(ParsedPublicKey, Vec<u8>), &'static str> {
    let not_p256 = "not an ECDSA P-256 key (make one with `openssl genpkey -algorithm EC \
                    -pkeyopt ec_paramgen_curve:P-256`)";
    let (rest, spki) = SubjectPublicKeyInfo::from_der(der).map_err(|_| not_p256)?;
    let curve = spki
        .algorithm
        .parameters
        .as_ref()
        .and_then(|any| any.as_oid().ok());
    if !rest.is_empty()
        || spki.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
        || curve != Some(OID_EC_P256)
    {
        return Err(not_p256);
    }
    let point = spki.subject_public_key.data.to_vec();
    if point.len() != 65 || point.first() != Some(&4) {
        return Err("the point must be uncompressed");
    }
    let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &point).map_err(|_| not_p256)?;
    Ok((key, point))
}
