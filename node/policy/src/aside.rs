//! What was taken out of use on this node, and what is still on trial: the slot `aside`.
//!
//! A bundle that an operator goes back from, or that fails its self-check, stays in the active slot and
//! keeps the floor. This slot says that it does not decide, and survives a restart like the floor does.

use serde::{Deserialize, Serialize};

use crate::json;
use crate::package::{ContentId, sha256};
use crate::slots::Floor;

/// Who set a bundle aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AsideCause {
    /// An operator, by `tidelock policy rollback`.
    Operator,
    /// The node itself, because the bundle did not answer as it must after it was activated.
    SelfCheck,
    /// The slot that would say it cannot be read, so that nobody knows whether it was.
    Unreadable,
}

/// A bundle that is the newest here and does not decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetAside {
    /// Its epoch.
    pub epoch: u64,
    /// Its content.
    pub content_id: ContentId,
    /// Who set it aside.
    pub cause: AsideCause,
    /// Why, for people.
    pub reason: String,
    /// When, Unix milliseconds.
    pub at_unix_ms: u64,
}

/// What the slot says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Marks {
    /// In effect only while the floor names the same content.
    pub(crate) aside: Option<SetAside>,
    /// What was being activated and has not passed its self-check yet.
    pub(crate) trial: Option<ContentId>,
    /// The last known good bundle until this trial, while the slot `lkg` is written over: a process that stops
    /// before `active` is written has the same bundle in both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) behind: Option<ContentId>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MarksFile {
    format: u64,
    marks: Marks,
    check: String,
}

impl Marks {
    /// What is set aside, given what the newest bundle is: nothing of an older one is left of it.
    pub(crate) fn aside_of(&self, floor: Option<&Floor>) -> Option<&SetAside> {
        let floor = floor?;
        let aside = self.aside.as_ref()?;
        (aside.content_id == floor.content_id).then_some(aside)
    }

    fn check(&self) -> Result<String, serde_json::Error> {
        json::to_sorted_bytes(self).map(|bytes| sha256(&bytes))
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        json::to_sorted_bytes(&MarksFile {
            format: 1,
            marks: self.clone(),
            check: self.check()?,
        })
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let file: MarksFile = json::parse_as(bytes).map_err(|error| error.to_string())?;
        if file.format != 1 {
            return Err(format!(
                "format {} is not known, this node reads 1",
                file.format
            ));
        }
        let check = file.marks.check().map_err(|error| error.to_string())?;
        if file.check != check {
            return Err("its check value does not match".to_owned());
        }
        Ok(file.marks)
    }
}
