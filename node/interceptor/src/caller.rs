//! Who asks, as the gateway authenticated it.

use serde::Serialize;

use crate::action::{InvalidRequest, check_principal_id, check_type};

/// A type and an id, for instance `Agent` and `coder-7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Principal {
    #[serde(rename = "type")]
    kind: String,
    id: String,
}

impl Principal {
    /// A principal.
    ///
    /// # Errors
    /// The type is no identifier, or the id is empty, too long or not plain text.
    pub fn new(kind: &str, id: &str) -> Result<Self, InvalidRequest> {
        check_type("principal type", kind)?;
        check_principal_id(id)?;
        Ok(Self {
            kind: kind.to_owned(),
            id: id.to_owned(),
        })
    }

    /// A principal as records show it.
    pub(crate) fn redacted(kind: &str, id: &str) -> Self {
        Self {
            kind: kind.to_owned(),
            id: id.to_owned(),
        }
    }

    /// The type.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The id within the type.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// An authenticated caller: its principal, its scope, and the door it came through. Only doors make
/// one, after they authenticated whoever is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Type of the caller's own principal.
    pub principal_type: String,
    /// Id of the caller's own principal.
    pub principal_id: String,
    /// Whether it may name another principal in its requests.
    pub may_act_as: bool,
    /// How it came in, for instance `tcp` or `unix`.
    pub door: &'static str,
    /// Whose word the name is, where the caller did not authenticate itself.
    pub stated_by: Option<Box<StatedBy>>,
}

/// The authenticated principal that has stated a caller's name: a proxy, which records must show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatedBy {
    /// Type of its principal.
    pub principal_type: String,
    /// Id of its principal.
    pub principal_id: String,
    /// How it came in itself.
    pub door: &'static str,
}

impl Caller {
    /// The caller's own principal.
    ///
    /// # Errors
    /// The door let a malformed name through.
    pub fn principal(&self) -> Result<Principal, InvalidRequest> {
        Principal::new(&self.principal_type, &self.principal_id)
    }
}
