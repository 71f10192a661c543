//! Freshness statements: the authority's signed word that a bundle is still in force.

use serde::{Deserialize, Serialize};

use crate::archive::is_name;
use crate::error::StatementError;
use crate::json;
use crate::limits::EPOCH_MAX;
use crate::manifest::{rfc3339, unix_ms};
use crate::package::ContentId;
use crate::signed::SignedDocument;
use crate::trust::{Role, TrustFile};

const DOCUMENT_TYPE: &str = "tidelock-freshness";

/// Name under which freshness statements travel, where a bundle has its own.
pub const FRESHNESS_ORIGIN: &str = "z.tidelock.freshness";

/// What a freshness statement says: this bundle was in force at this time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Freshness {
    /// Domain that it is for.
    pub domain: String,
    /// Name of the bundle.
    pub bundle: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its content.
    pub content_id: ContentId,
    /// When the authority said so, Unix milliseconds.
    pub issued_unix_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    r#type: String,
    format: u64,
    domain: String,
    bundle: String,
    epoch: u64,
    content: ContentId,
    issued_at: String,
}

impl Freshness {
    /// The document that is signed.
    ///
    /// # Errors
    /// [`StatementError::Format`] for a name, an epoch or a time that is none.
    pub fn document(&self) -> Result<Vec<u8>, StatementError> {
        let format = |message: String| StatementError::Format(message);
        if !is_name(&self.domain) || !is_name(&self.bundle) {
            return Err(format("domain and bundle must be names".to_owned()));
        }
        if !(1..=EPOCH_MAX).contains(&self.epoch) {
            return Err(format(format!("epoch must be 1 to {EPOCH_MAX}")));
        }
        let issued_at = rfc3339(self.issued_unix_ms).map_err(|error| format(error.to_string()))?;
        json::to_sorted_bytes(&Raw {
            r#type: DOCUMENT_TYPE.to_owned(),
            format: 1,
            domain: self.domain.clone(),
            bundle: self.bundle.clone(),
            epoch: self.epoch,
            content: self.content_id.clone(),
            issued_at,
        })
        .map_err(|error| format(error.to_string()))
    }

    /// Reads a document in its one form. Nothing is said about who signed it.
    ///
    /// # Errors
    /// [`StatementError::Format`].
    pub fn read(document: &[u8]) -> Result<Self, StatementError> {
        let format = |message: String| StatementError::Format(message);
        let raw: Raw = json::parse_as(document).map_err(|error| format(error.to_string()))?;
        if raw.r#type != DOCUMENT_TYPE || raw.format != 1 {
            return Err(format(format!(
                "type must be {DOCUMENT_TYPE} and format 1, not {} and {}",
                raw.r#type, raw.format
            )));
        }
        let issued_unix_ms = unix_ms(&raw.issued_at).ok_or_else(|| {
            format("issued_at must be a time such as 2026-01-31T12:00:00Z".to_owned())
        })?;
        let freshness = Self {
            domain: raw.domain,
            bundle: raw.bundle,
            epoch: raw.epoch,
            content_id: raw.content,
            issued_unix_ms,
        };
        if freshness.document()? != document {
            return Err(format(
                "the statement is not in its one form: `tidelock bundle freshness make` writes it"
                    .to_owned(),
            ));
        }
        Ok(freshness)
    }

    /// Reads a statement that enough policy keys of this trust file have signed.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn verify(signed: &SignedDocument, trust: &TrustFile) -> Result<Self, StatementError> {
        let by = signed.signed_by(trust);
        let quorum = by.quorum(Role::Policy, None);
        if !quorum.is_reached() {
            return Err(StatementError::signature(Role::Policy, &quorum));
        }
        let freshness = Self::read(&signed.document)?;
        if freshness.domain != trust.domain() {
            return Err(StatementError::Domain {
                expected: trust.domain().to_owned(),
                found: freshness.domain,
            });
        }
        let in_time = by.quorum(Role::Policy, Some(freshness.issued_unix_ms));
        if !in_time.is_reached() {
            return Err(StatementError::signature(Role::Policy, &in_time));
        }
        Ok(freshness)
    }

    /// Whether it speaks of this bundle.
    #[must_use]
    pub fn names(&self, bundle: &str, epoch: u64, content_id: &ContentId) -> bool {
        self.bundle == bundle && self.epoch == epoch && self.content_id == *content_id
    }
}
