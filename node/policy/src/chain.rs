//! The trust chain: how keys are replaced without touching a node.
//!
//! It begins with the operator's configured trust file. Each further document names the one before by
//! its hash and is signed by enough `trust` keys of that one and of itself, so a node that was dark over
//! several rotations walks from one to the next. The chain only grows.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::error::StatementError;
use crate::json;
use crate::limits::TRUST_LINKS_MAX;
use crate::package::{ContentId, sha256};
use crate::signed::SignedDocument;
use crate::trust::{Role, TrustFile};

/// Name under which trust documents travel, where a bundle has its own. It sorts before bundles.
pub const TRUST_ORIGIN: &str = "0.tidelock.trust";

/// Name of the slot that holds the chain.
pub const TRUST_SLOT: &str = "trust";

/// Name of the slot that says which document was the newest, beside the chain: what is left of it when the
/// chain is damaged, and must be made again from what the segment store holds.
pub const TRUST_NEWEST_SLOT: &str = "trust-newest";

/// The newest document that ever held on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewestTrust {
    /// Its version.
    pub version: u64,
    /// Its identity.
    pub id: ContentId,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewestFile {
    format: u64,
    newest: NewestTrust,
    check: String,
}

impl NewestTrust {
    fn check(&self) -> String {
        sha256(format!("{} {}", self.version, self.id).as_bytes())
    }

    /// What the slot holds.
    ///
    /// # Errors
    /// [`StatementError::Format`]; cannot happen to what this crate made.
    pub fn encode(&self) -> Result<Vec<u8>, StatementError> {
        json::to_sorted_bytes(&NewestFile {
            format: 1,
            newest: self.clone(),
            check: self.check(),
        })
        .map_err(|error| StatementError::Format(error.to_string()))
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// [`StatementError::Damaged`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        let file: NewestFile =
            json::parse_as(bytes).map_err(|error| StatementError::Damaged(error.to_string()))?;
        if file.format != 1 || file.check != file.newest.check() {
            return Err(StatementError::Damaged(
                "its format or its check value does not match".to_owned(),
            ));
        }
        Ok(file.newest)
    }
}

/// What a document did to a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extended {
    /// It is the current one now.
    Forward,
    /// It was in the chain already.
    Known,
}

/// The configured trust file and the documents that follow it.
#[derive(Debug, Clone)]
pub struct TrustChain {
    root: TrustFile,
    root_id: ContentId,
    links: Vec<Link>,
}

#[derive(Debug, Clone)]
struct Link {
    signed: SignedDocument,
    trust: TrustFile,
    id: ContentId,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainFile {
    format: u64,
    /// Base64 of the first document.
    root: String,
    /// Base64 of each encoded signed document that follows, in order.
    links: Vec<String>,
    check: String,
}

impl ChainFile {
    fn check(&self) -> String {
        sha256(format!("{}\n{}", self.root, self.links.join("\n")).as_bytes())
    }
}

impl TrustChain {
    /// A chain that begins, and ends, with this file.
    ///
    /// # Errors
    /// [`StatementError::Format`] if the file has no document.
    pub fn new(root: TrustFile) -> Result<Self, StatementError> {
        let root_id = root.id()?;
        Ok(Self {
            root,
            root_id,
            links: Vec::new(),
        })
    }

    /// The trust that holds now.
    #[must_use]
    pub fn current(&self) -> &TrustFile {
        self.links.last().map_or(&self.root, |link| &link.trust)
    }

    /// Its identity.
    #[must_use]
    pub fn current_id(&self) -> &ContentId {
        self.links.last().map_or(&self.root_id, |link| &link.id)
    }

    /// The signed documents after the first, in order.
    pub fn links(&self) -> impl Iterator<Item = (u64, &SignedDocument)> {
        self.links
            .iter()
            .map(|link| (link.trust.version(), &link.signed))
    }

    /// What this chain has come to.
    #[must_use]
    pub fn newest(&self) -> NewestTrust {
        NewestTrust {
            version: self.current().version(),
            id: self.current_id().clone(),
        }
    }

    /// Whether this chain has not come as far as one did that held here: INV-16, keys that were replaced
    /// must not be trusted again. A chain that begins above it has left it behind.
    ///
    /// # Errors
    /// [`StatementError::Conflict`] if it has another document of that version.
    pub fn lacks(&self, newest: &NewestTrust) -> Result<bool, StatementError> {
        match self.id_of(newest.version) {
            Some(id) if *id != newest.id => Err(StatementError::Conflict {
                version: newest.version,
                known: newest.id.clone(),
                offered: id.clone(),
            }),
            _ => Ok(self.current().version() < newest.version),
        }
    }

    /// The trust of this version, if the chain has it.
    fn trust_of(&self, version: u64) -> Option<&TrustFile> {
        let all = std::iter::once(&self.root).chain(self.links.iter().map(|link| &link.trust));
        all.into_iter().find(|trust| trust.version() == version)
    }

    /// Identity of the document of this version, if the chain has it.
    fn id_of(&self, version: u64) -> Option<&ContentId> {
        if self.root.version() == version {
            return Some(&self.root_id);
        }
        let found = self
            .links
            .iter()
            .find(|link| link.trust.version() == version);
        found.map(|link| &link.id)
    }

    /// Appends a document, if it follows. INV-16: nothing is taken back, and no version has two contents.
    ///
    /// # Errors
    /// The first check that fails; the chain is as it was.
    pub fn extend(&mut self, signed: SignedDocument) -> Result<Extended, StatementError> {
        let before = self.current();
        let by_before = signed.signed_by(before);
        let id = ContentId::of(&signed.document);
        if self.root_id == id || self.links.iter().any(|link| link.id == id) {
            return Ok(Extended::Known);
        }
        let trust = TrustFile::from_document(&signed.document)?;
        if trust.domain() != before.domain() {
            return Err(StatementError::Domain {
                expected: before.domain().to_owned(),
                found: trust.domain().to_owned(),
            });
        }
        if trust.version() <= before.version() {
            return Err(match self.id_of(trust.version()) {
                Some(known) => {
                    // A second document of one version is evidence only if those who may make one signed it:
                    // whoever passes on what he made up himself must not raise that alarm.
                    // The first document has no predecessor but itself.
                    let maker = self
                        .trust_of(trust.version().saturating_sub(1))
                        .or_else(|| self.trust_of(trust.version()));
                    if let Some(before) = maker {
                        let by = signed.signed_by(before);
                        let quorum = by.quorum(Role::Trust, trust.created_unix_ms());
                        if !quorum.is_reached() {
                            return Err(StatementError::signature(Role::Trust, &quorum));
                        }
                    }
                    StatementError::Conflict {
                        version: trust.version(),
                        known: known.clone(),
                        offered: id,
                    }
                }
                None => StatementError::Older {
                    current: before.version(),
                    offered: trust.version(),
                },
            });
        }
        if trust.version() != before.version() + 1 {
            return Err(StatementError::Gap {
                current: before.version(),
                offered: trust.version(),
            });
        }
        let Some(created_unix_ms) = trust.created_unix_ms() else {
            return Err(StatementError::Format("created_at is missing".to_owned()));
        };
        if trust.previous() != Some(self.current_id()) {
            return Err(StatementError::Chain {
                expected: self.current_id().clone(),
            });
        }
        if before
            .created_unix_ms()
            .is_some_and(|before| created_unix_ms < before)
        {
            return Err(StatementError::Format(
                "created_at lies before that of the version before".to_owned(),
            ));
        }
        if trust.threshold_of(Role::Trust).is_none() {
            return Err(StatementError::Format(
                "it has no role `trust`: nobody could ever replace it".to_owned(),
            ));
        }
        // By those who hold it now, and by those who are to hold it: a key that nobody has, or that is
        // mistyped, never locks a domain out.
        for by in [by_before, signed.signed_by(&trust)] {
            let quorum = by.quorum(Role::Trust, Some(created_unix_ms));
            if !quorum.is_reached() {
                return Err(StatementError::signature(Role::Trust, &quorum));
            }
        }
        if self.links.len() >= TRUST_LINKS_MAX {
            return Err(StatementError::Full);
        }
        self.links.push(Link { signed, trust, id });
        Ok(Extended::Forward)
    }

    /// What the slot holds.
    ///
    /// # Errors
    /// [`StatementError::Format`]; cannot happen to what this crate made.
    pub fn encode(&self) -> Result<Vec<u8>, StatementError> {
        let mut file = ChainFile {
            format: 1,
            root: STANDARD.encode(self.root.document()?),
            links: self
                .links
                .iter()
                .map(|link| Ok(STANDARD.encode(link.signed.encode()?)))
                .collect::<Result<_, StatementError>>()?,
            check: String::new(),
        };
        file.check = file.check();
        json::to_sorted_bytes(&file).map_err(|error| StatementError::Format(error.to_string()))
    }

    /// Reads a slot and walks what it holds from its first document on: nothing is believed because it
    /// lay on disk.
    ///
    /// # Errors
    /// [`StatementError::Damaged`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        let damaged = |why: String| StatementError::Damaged(why);
        let file: ChainFile = json::parse_as(bytes).map_err(|error| damaged(error.to_string()))?;
        if file.format != 1 || file.check != file.check() || file.links.len() > TRUST_LINKS_MAX {
            return Err(damaged(
                "its format or its check value does not match".to_owned(),
            ));
        }
        let read = |text: &str| {
            STANDARD
                .decode(text)
                .map_err(|error| damaged(error.to_string()))
        };
        let walk = || -> Result<Self, StatementError> {
            let mut chain = Self::new(TrustFile::from_document(&read(&file.root)?)?)?;
            for link in &file.links {
                chain.extend(SignedDocument::decode(&read(link)?)?)?;
            }
            Ok(chain)
        };
        walk().map_err(|error| damaged(error.to_string()))
    }

    /// Holds the configured trust file against the chain that is kept. A file that is a version of the
    /// chain changes nothing; one of a higher version than the chain has come to is the operator's own
    /// new beginning; any other contradicts it.
    ///
    /// # Errors
    /// [`StatementError::Contradiction`].
    pub fn reconcile(self, configured: TrustFile) -> Result<Self, StatementError> {
        let id = configured.id()?;
        if self.id_of(configured.version()) == Some(&id) {
            return Ok(self);
        }
        if configured.version() > self.current().version()
            || (self.links.is_empty() && configured.version() >= self.current().version())
        {
            return Self::new(configured);
        }
        Err(StatementError::Contradiction {
            configured: id,
            configured_version: configured.version(),
            current: self.current().version(),
        })
    }
}
