//! What can be wrong with a bundle, a key or a slot, with stable codes.

use thiserror::Error;

use crate::ContentId;

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
    #[error("the bundle names engine `{0}`, this node has `cedar`")]
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
        "BUNDLE_FORMAT",
        "BUNDLE_NODE_VERSION",
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
}

impl ActivateError {
    /// The stable reason code, as recorded and shown.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused(error) => error.code(),
            Self::Storage { .. } => "BUNDLE_STORAGE",
        }
    }
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
