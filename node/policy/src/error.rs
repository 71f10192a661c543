//! What can be wrong with a bundle, a key or a slot, with stable codes.

use thiserror::Error;

use crate::ContentId;
use crate::trust::{Quorum, Role, TrustError};

/// Why a bundle was refused. Grouped by whose fault it is; [`code`](Self::code) is stable.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BundleError {
    // Damaged or ill-made bytes.
    /// The package, the archive or a file in it is not in the documented form.
    #[error("{0}")]
    Format(String),
    /// A file's bytes do not have the digest that the manifest states.
    #[error("file `{file}` does not have the digest that the manifest states: rebuild the bundle")]
    Digest {
        /// Path of the file in the archive.
        file: String,
    },

    // Who signed it.
    /// Too few distinct trusted keys signed the archive.
    #[error(
        "{valid} of the {needed} needed signatures are by distinct keys of the trust file \
         ({unknown} by none of them): sign the archive with more of the trusted keys"
    )]
    Signature {
        /// Distinct trusted keys whose signature verifies.
        valid: usize,
        /// Threshold of the trust file.
        needed: usize,
        /// Signatures that no trusted key verifies.
        unknown: usize,
    },
    /// The keys that signed it are trusted, but not for what the bundle says that it is.
    #[error(
        "the bundle says that it is of role `{stated}`, and {valid} of the {} needed signatures are by \
         distinct keys of that role: sign it with keys that the trust file gives the role", needed_text(*needed)
    )]
    Role {
        /// Role that the manifest states.
        stated: Role,
        /// Distinct keys of the role that signed.
        valid: usize,
        /// Threshold of the role; none if the trust file does not have it.
        needed: Option<usize>,
    },
    /// The keys that signed it are of the role, but not for the time of its making.
    #[error(
        "{valid} of the {needed} needed signatures are by keys that may sign what was made at \
         {created_at}: see not_before and not_after in the trust file"
    )]
    KeyTime {
        /// Distinct keys of the role whose time it is.
        valid: usize,
        /// Threshold of the role.
        needed: usize,
        /// When the bundle was made, as it says.
        created_at: String,
    },
    /// The bundle, or the trust file, belongs to another domain.
    #[error("{what} is of domain `{found}`, this node is of domain `{expected}`")]
    Domain {
        /// `the bundle` or `the trust file`.
        what: &'static str,
        /// Domain of this node.
        expected: String,
        /// Domain found.
        found: String,
    },

    // Its place in the sequence.
    /// The epoch is below the highest one that was ever active here.
    #[error(
        "epoch {offered} is below epoch {floor}, which was active here: build it with a higher epoch"
    )]
    Epoch {
        /// Highest epoch ever active here.
        floor: u64,
        /// Epoch offered.
        offered: u64,
    },
    /// The epoch was active here with other content.
    #[error(
        "epoch {epoch} was active here as {known}, this is {offered}: build it with a higher epoch"
    )]
    Conflict {
        /// The epoch in question.
        epoch: u64,
        /// Content that was active.
        known: ContentId,
        /// Content offered.
        offered: ContentId,
    },

    // Its time.
    /// Its `not_before` lies ahead.
    #[error("the bundle may not decide yet: its not_before lies {seconds} s ahead")]
    NotYet {
        /// How far, in seconds.
        seconds: u64,
    },
    /// Its `expires_at` has passed.
    #[error("the bundle expired {seconds} s ago: install a newer one")]
    Expired {
        /// How long ago, in seconds.
        seconds: u64,
    },

    // What this node can run.
    /// The bundle asks for a newer node.
    #[error("the bundle needs node version {needed} or newer, this is {running}: update the node")]
    NodeVersion {
        /// `min_node_version` of the manifest.
        needed: String,
        /// Version of this node.
        running: String,
    },
    /// The bundle names an engine that this node does not have.
    #[error("the bundle names engine `{0}`, this node has `cedar`, `rego` and `cedar+rego`")]
    Engine(String),

    // Its policies.
    /// A policy does not compile.
    #[error("{file}, line {line}: {message}")]
    Compile {
        /// Path of the file in the archive.
        file: String,
        /// Line on which the policy begins.
        line: usize,
        /// What the compiler says.
        message: String,
    },
    /// The schema is ill-formed, or policies, entities or classes do not fit it.
    #[error("{file}: {message}")]
    Schema {
        /// Path of the file in the archive.
        file: String,
        /// What does not fit.
        message: String,
    },
    /// The bundle's own tests fail.
    #[error("{failed} of {total} tests of the bundle fail; first: {first}")]
    Tests {
        /// Tests that failed.
        failed: usize,
        /// Tests in all.
        total: usize,
        /// The first failure.
        first: String,
    },

    // A fault of this program.
    /// The compiler panicked or its thread could not be started.
    #[error("the policy compiler failed: {0}")]
    Compiler(String),

    // What another process said of it.
    /// The worker in which the bundle was compiled first refused it, or did not live to say so.
    #[error("{message}")]
    Worker {
        /// One of [`BundleError::CODES`].
        code: &'static str,
        /// What the worker said, or what became of it.
        message: String,
    },
}

impl BundleError {
    /// Every code that [`code`](Self::code) answers.
    pub const CODES: &[&str] = &[
        "BUNDLE_COMPILE",
        "BUNDLE_CONFLICT",
        "BUNDLE_DIGEST",
        "BUNDLE_DOMAIN",
        "BUNDLE_ENGINE",
        "BUNDLE_EPOCH",
        "BUNDLE_EXPIRED",
        "BUNDLE_FORMAT",
        "BUNDLE_KEY_TIME",
        "BUNDLE_NODE_VERSION",
        "BUNDLE_NOT_YET",
        "BUNDLE_ROLE",
        "BUNDLE_SCHEMA",
        "BUNDLE_SIGNATURE",
        "BUNDLE_TESTS",
        "BUNDLE_WORKER_ANSWER",
        "BUNDLE_WORKER_BUSY",
        "BUNDLE_WORKER_CRASHED",
        "BUNDLE_WORKER_TIMEOUT",
        "BUNDLE_WORKER_UNAVAILABLE",
    ];

    /// What a worker told with one of [`CODES`](Self::CODES); nothing for a code that is none.
    #[must_use]
    pub fn told(code: &str, message: &str) -> Option<Self> {
        let code = Self::CODES.iter().find(|known| **known == code)?;
        Some(Self::Worker {
            code,
            message: clip(message),
        })
    }

    /// The stable reason code, as recorded and shown.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(_) => "BUNDLE_FORMAT",
            Self::Digest { .. } => "BUNDLE_DIGEST",
            Self::Signature { .. } => "BUNDLE_SIGNATURE",
            Self::Role { .. } => "BUNDLE_ROLE",
            Self::KeyTime { .. } => "BUNDLE_KEY_TIME",
            Self::NotYet { .. } => "BUNDLE_NOT_YET",
            Self::Expired { .. } => "BUNDLE_EXPIRED",
            Self::Domain { .. } => "BUNDLE_DOMAIN",
            Self::Epoch { .. } => "BUNDLE_EPOCH",
            Self::Conflict { .. } => "BUNDLE_CONFLICT",
            Self::NodeVersion { .. } => "BUNDLE_NODE_VERSION",
            Self::Engine(_) => "BUNDLE_ENGINE",
            Self::Compile { .. } | Self::Compiler(_) => "BUNDLE_COMPILE",
            Self::Schema { .. } => "BUNDLE_SCHEMA",
            Self::Tests { .. } => "BUNDLE_TESTS",
            Self::Worker { code, .. } => code,
        }
    }

    pub(crate) fn format(message: impl Into<String>) -> Self {
        Self::Format(message.into())
    }

    pub(crate) fn schema(file: &str, message: impl std::fmt::Display) -> Self {
        Self::Schema {
            file: file.to_owned(),
            message: clip(&message.to_string()),
        }
    }
}

/// Why a signed document that is no bundle was refused; [`code`](Self::code) is stable.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StatementError {
    /// Not in the documented form.
    #[error("{0}")]
    Format(String),
    /// Too few distinct keys of the role signed it, or not in their time.
    #[error(
        "{valid} of the {} needed signatures are by distinct keys of role `{role}`: sign it with more of \
         them, within their time", needed_text(*needed)
    )]
    Signature {
        /// The role.
        role: Role,
        /// Distinct keys that count.
        valid: usize,
        /// Threshold of the role; none if the trust file does not have it.
        needed: Option<usize>,
    },
    /// It is of another domain.
    #[error("it is of domain `{found}`, this node is of domain `{expected}`")]
    Domain {
        /// Domain of this node.
        expected: String,
        /// Domain found.
        found: String,
    },
    /// A freshness statement that speaks of another bundle than the one that decides.
    #[error("it speaks of {bundle} epoch {epoch}, which is not the bundle that decides here")]
    Other {
        /// Name of the bundle it speaks of.
        bundle: String,
        /// Epoch it speaks of.
        epoch: u64,
    },
    /// A freshness statement that is older than one that is known.
    #[error("a statement is known that was issued {newer_by_s} s later")]
    Stale {
        /// How much later, in seconds.
        newer_by_s: u64,
    },
    /// A trust document below the one that holds, from before the chain's beginning.
    #[error("trust version {offered} is below version {current}, which holds here")]
    Older {
        /// Version that holds.
        current: u64,
        /// Version offered.
        offered: u64,
    },
    /// A trust document of a version that has other content here.
    #[error("trust version {version} is {known} here, this is {offered}")]
    Conflict {
        /// The version.
        version: u64,
        /// Content that holds.
        known: ContentId,
        /// Content offered.
        offered: ContentId,
    },
    /// Versions between the one that holds and this one are missing.
    #[error("trust version {offered} does not follow version {current}: bring those between first")]
    Gap {
        /// Version that holds.
        current: u64,
        /// Version offered.
        offered: u64,
    },
    /// It does not name the document before.
    #[error("its `previous` is not {expected}, which holds here")]
    Chain {
        /// What it should name.
        expected: ContentId,
    },
    /// The chain has as many documents as one node keeps.
    #[error(
        "the chain has reached its limit: make the current document the configured trust file \
         (`tidelock trust show --toml`), with a version above it"
    )]
    Full,
    /// What was kept of the chain cannot be read.
    #[error("the kept trust chain is damaged: {0}")]
    Damaged(String),
    /// The configured trust file is not a version of the chain.
    #[error(
        "the configured trust file (version {configured_version}, {configured}) is not in the chain that this \
         node has come to follow, which is at version {current}: put back the file that the chain began \
         with, or take the current document (`tidelock trust show --toml`), or give the file a version \
         above {current} to begin anew"
    )]
    Contradiction {
        /// Identity of the configured file.
        configured: ContentId,
        /// Version that it states.
        configured_version: u64,
        /// Version that the chain has come to.
        current: u64,
    },
    /// A slot could not be written.
    #[error("cannot write slot `{slot}`: {message}")]
    Storage {
        /// The slot.
        slot: &'static str,
        /// What the storage says.
        message: String,
    },
}

impl StatementError {
    /// The stable reason code, as recorded and shown.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Format(_) => "STATEMENT_FORMAT",
            Self::Signature { .. } => "STATEMENT_SIGNATURE",
            Self::Domain { .. } => "STATEMENT_DOMAIN",
            Self::Other { .. } => "FRESHNESS_OTHER_BUNDLE",
            Self::Stale { .. } => "FRESHNESS_OLDER",
            Self::Older { .. } => "TRUST_OLDER",
            Self::Conflict { .. } => "TRUST_CONFLICT",
            Self::Gap { .. } => "TRUST_GAP",
            Self::Chain { .. } => "TRUST_CHAIN",
            Self::Full => "TRUST_FULL",
            Self::Damaged(_) => "TRUST_DAMAGED",
            Self::Contradiction { .. } => "TRUST_CONTRADICTION",
            Self::Storage { .. } => "STATEMENT_STORAGE",
        }
    }

    pub(crate) fn signature(role: Role, quorum: &Quorum) -> Self {
        Self::Signature {
            role,
            valid: quorum.ids.len(),
            needed: quorum.needed,
        }
    }
}

impl From<TrustError> for StatementError {
    fn from(error: TrustError) -> Self {
        Self::Format(clip(&error.to_string()))
    }
}

/// Why a bundle could not be assembled from a directory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BuildError {
    /// A file or directory could not be read.
    #[error("cannot read {path}: {message}")]
    Read {
        /// The path as given.
        path: String,
        /// What the system says.
        message: String,
    },
    /// What was read does not make a bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Why a key or a detached signature is of no use.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// No PEM block with a private key.
    #[error(
        "no private key in PEM form found (expected BEGIN PRIVATE KEY or BEGIN EC PRIVATE KEY)"
    )]
    NoPrivateKey,
    /// The private key is protected by a passphrase.
    #[error(
        "the private key is encrypted: sign with `cosign sign-blob` or `openssl dgst -sha256 -sign`"
    )]
    Encrypted,
    /// A key of another kind.
    #[error("the key is not an ECDSA P-256 key")]
    NotP256,
    /// The signature is in no known form.
    #[error("the signature is neither DER, nor base64 of DER, nor a Sigstore bundle")]
    NotASignature,
    /// The random generator or the signing operation failed.
    #[error("signing failed")]
    Signing,
}

/// Why a bundle was not activated.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ActivateError {
    /// Its place in the sequence forbids it.
    #[error(transparent)]
    Refused(#[from] BundleError),
    /// A slot could not be written. The bundle that decided before still does.
    #[error("cannot write slot `{slot}`: {message}")]
    Storage {
        /// The slot.
        slot: &'static str,
        /// What the storage says.
        message: String,
    },
    /// It was set aside on this node.
    #[error(
        "epoch {epoch} was set aside on this node; where that was wrong, an operator activates it by plan \
         (tidelock policy activate), else a bundle of a higher epoch takes its place"
    )]
    SetAside {
        /// Its epoch.
        epoch: u64,
    },
    /// No bundle from the active slot decides, so there is none to set aside.
    #[error("no bundle of the active slot decides, so there is nothing to go back from")]
    NotActive,
    /// Nothing may serve in place of the active bundle.
    #[error(
        "the last known good bundle cannot serve: {why}; the way out is forward: sign the older content \
         with a new epoch and activate that"
    )]
    NoFallback {
        /// Why not.
        why: String,
    },
}

impl ActivateError {
    /// The stable reason code, as recorded and shown.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused(error) => error.code(),
            Self::Storage { .. } => "BUNDLE_STORAGE",
            Self::SetAside { .. } => "POLICY_SET_ASIDE",
            Self::NotActive => "POLICY_NOT_ACTIVE",
            Self::NoFallback { .. } => "POLICY_NO_FALLBACK",
        }
    }
}

fn needed_text(needed: Option<usize>) -> String {
    needed.map_or_else(|| "(no key has it)".to_owned(), |n| n.to_string())
}

/// Bounds a message that carries text from outside, at a character boundary.
pub(crate) fn clip(message: &str) -> String {
    let limit = crate::limits::MESSAGE_BYTES_MAX;
    if message.len() <= limit {
        return message.to_owned();
    }
    let mut clipped: String = message
        .char_indices()
        .take_while(|(at, character)| at + character.len_utf8() <= limit)
        .map(|(_, character)| character)
        .collect();
    clipped.push('…');
    clipped
}

/// An error and its causes in one line. Cedar's own messages often leave the point to the cause.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !message.contains(&cause_text) {
            message.push_str(": ");
            message.push_str(&cause_text);
        }
        source = cause.source();
    }
    message.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes cross a process boundary as text: one that the list lacks would be taken for no code.
    #[test]
    fn every_code_stands_in_the_list_and_in_the_book() {
        let source = include_str!("error.rs");
        let book = include_str!("../../../docs/src/policy.md");
        let mut codes: Vec<&str> = source
            .split('"')
            .filter(|text| text.strip_prefix("BUNDLE_").is_some_and(is_code))
            // What a slot could not be written is no worker's to say.
            .filter(|code| *code != "BUNDLE_STORAGE")
            .collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes, BundleError::CODES);
        for code in codes {
            assert!(
                book.contains(&format!("| `{code}` |")),
                "{code} is not in policy.md"
            );
            assert_eq!(BundleError::told(code, "why").unwrap().code(), code);
        }
        assert_eq!(BundleError::told("no code", "why"), None);
    }

    fn is_code(text: &str) -> bool {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
    }
}
