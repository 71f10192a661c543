//! The trust file: whose signatures make a bundle valid on this node, and how many of them.

use std::collections::BTreeSet;

use aws_lc_rs::digest::{Digest, SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use thiserror::Error;
use toml_edit::{Document, Item, Table, Value};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::archive::is_name;
use crate::limits::{TRUST_FILE_BYTES_MAX, TRUST_KEYS_MAX};
use crate::package::Package;

/// Everything that is wrong with a trust file, each with its line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("trust file: {}", .problems.join("; "))]
pub struct TrustError {
    /// One sentence for each mistake, in the order of the file.
    pub problems: Vec<String>,
}

/// The keys that may sign bundles for a domain, and how many of them must.
#[derive(Debug, Clone)]
pub struct TrustFile {
    domain: String,
    threshold: usize,
    keys: Vec<TrustedKey>,
}

#[derive(Debug, Clone)]
struct TrustedKey {
    id: String,
    key: ParsedPublicKey,
    point: Vec<u8>,
}

/// How the signatures of a package fare against a trust file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Signers {
    /// Ids of the distinct keys that signed, sorted.
    pub(crate) ids: Vec<String>,
    /// Signatures that no key verifies.
    pub(crate) unknown: usize,
}

impl TrustFile {
    /// Reads a trust file and reports every mistake in it at once.
    ///
    /// # Errors
    /// [`TrustError`] with a line for each mistake.
    pub fn parse(text: &str) -> Result<Self, TrustError> {
        let only = |problem: String| TrustError {
            problems: vec![problem],
        };
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

    /// A trust file without keys: nothing verifies against it. For a node whose own trust file is
    /// unusable, which starts and denies.
    #[must_use]
    pub fn nobody(domain: &str) -> Self {
        Self {
            domain: domain.to_owned(),
            threshold: 1,
            keys: Vec::new(),
        }
    }

    /// The domain that the keys speak for.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// How many distinct keys must have signed.
    #[must_use]
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// Ids of the keys, in the order of the file.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.id.as_str())
    }

    /// Which keys signed the package. A key counts once, however many signatures it made.
    pub(crate) fn signers(&self, package: &Package) -> Signers {
        let hash: Digest = digest(&SHA256, &package.archive);
        let mut ids = BTreeSet::new();
        let mut unknown = 0;
        for signature in &package.signatures {
            let signer = self
                .keys
                .iter()
                .find(|trusted| trusted.key.verify_digest_sig(&hash, signature).is_ok());
            match signer {
                Some(trusted) => _ = ids.insert(trusted.id.clone()),
                None => unknown += 1,
            }
        }
        Signers {
            ids: ids.into_iter().collect(),
            unknown,
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<String>,
}

impl Reader<'_> {
    fn problem(&mut self, span: Option<std::ops::Range<usize>>, message: impl std::fmt::Display) {
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
        self.known_keys(table, &["format", "domain", "threshold", "keys"]);
        match self.integer(table, "format") {
            Some(1) | None => {}
            Some(other) => {
                let span = table.get("format").and_then(Item::span);
                self.problem(
                    span,
                    format!("format {other} is not known, this node reads 1"),
                );
            }
        }
        let domain = self.string(table, "domain").unwrap_or_default();
        if !domain.is_empty() && !is_name(&domain) {
            let span = table.get("domain").and_then(Item::span);
            self.problem(
                span,
                "domain must be 1 to 63 of letters, digits, `.`, `_`, `-`",
            );
        }
        let keys = self.keys(table);
        let threshold = self.integer(table, "threshold");
        let count = i64::try_from(keys.len()).unwrap_or(i64::MAX);
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
        TrustFile {
            domain,
            threshold,
            keys,
        }
    }

    fn keys(&mut self, table: &Table) -> Vec<TrustedKey> {
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
            self.known_keys(table, &["id", "public_key_pem"]);
            let id = self.string(table, "id");
            let pem = self.string(table, "public_key_pem");
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
                    keys.push(TrustedKey { id, key, point });
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
    let not_p256 = "not an ECDSA P-256 key (make one with `openssl genpkey -algorithm EC \
                    -pkeyopt ec_paramgen_curve:P-256`)";
    let (rest, spki) = SubjectPublicKeyInfo::from_der(&block.contents).map_err(|_| not_p256)?;
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
