//! Records that the log writes about itself. JSON with sorted keys and no spaces, which is RFC 8785
//! canonical for these contents.

use serde::{Deserialize, Serialize};

use crate::id::{NodeId, Origin, SegmentId, Sha256Hash};

/// The highest head of an earlier log of this node, as far as it can tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedHead {
    /// The log.
    pub origin: Origin,
    /// Root of the tree over its records.
    pub root: Sha256Hash,
    /// How many they are.
    pub size: u64,
}

/// The heads that the first record of a log names: the log before it first, then other earlier logs
/// of the node, newest first. Empty if it names none, or is no such record. What a peer holds of the
/// node must be among them, or the new log is evidence (ruling 7).
#[must_use]
pub fn named_heads(record: &[u8]) -> Vec<NamedHead> {
    #[derive(Deserialize)]
    struct First {
        r#type: String,
        previous_head: Option<NamedHead>,
        #[serde(default)]
        other_heads: Vec<NamedHead>,
    }
    match serde_json::from_slice::<First>(record) {
        Ok(first) if first.r#type == INCARNATION => first
            .previous_head
            .into_iter()
            .chain(first.other_heads)
            .collect(),
        Ok(_) | Err(_) => Vec::new(),
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes fields by reference"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The type of the first record of an incarnation.
pub(crate) const INCARNATION: &str = "incarnation";

/// One lifecycle record. Fields stand in alphabetical order; `type` is the tag's value.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Event<'a> {
    Incarnation {
        incarnation: u64,
        #[serde(skip_serializing_if = "<[NamedHead]>::is_empty")]
        other_heads: &'a [NamedHead],
        previous_head: Option<&'a NamedHead>,
        previous_origin: Option<&'a Origin>,
        quarantined: &'a [String],
        #[serde(skip_serializing_if = "is_zero")]
        quarantined_more: u64,
        reason: &'a str,
        r#type: &'static str,
        unix_ms: u64,
    },
    Recovered {
        records: u64,
        truncated_at_index: u64,
        truncated_bytes: u64,
        truncated_records_estimate: u64,
        r#type: &'static str,
        unix_ms: u64,
    },
    Evicted {
        custodians: Vec<Vec<NodeId>>,
        first: u64,
        last: u64,
        origin: &'a Origin,
        segments: Vec<SegmentId>,
        r#type: &'static str,
        unix_ms: u64,
    },
    Gap {
        count: u64,
        first: u64,
        last: u64,
        origin: &'a Origin,
        root_after: Sha256Hash,
        root_before: Option<Sha256Hash>,
        segments: Vec<SegmentId>,
        r#type: &'static str,
        unix_ms: u64,
    },
    Refused {
        decisions: u64,
        denials: u64,
        first_unix_ms: u64,
        last_unix_ms: u64,
        r#type: &'static str,
        unix_ms: u64,
        window: u64,
    },
    Reopened {
        device: &'static str,
        reason: &'a str,
        r#type: &'static str,
        unix_ms: u64,
    },
}

impl Event<'_> {
    /// The record's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        // These types have no map with non-text keys and no failing serializer.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted() {
        let head = NamedHead {
            origin: Origin::parse("audit/n1/0123456789abcdef/2").unwrap(),
            root: Sha256Hash::of(b"root"),
            size: 3,
        };
        let first = Event::Incarnation {
            incarnation: 3,
            other_heads: std::slice::from_ref(&head),
            previous_head: Some(&head),
            previous_origin: Some(&head.origin),
            quarantined: &[],
            quarantined_more: 1,
            reason: "moved",
            r#type: INCARNATION,
            unix_ms: 5,
        };
        assert_eq!(named_heads(&first.bytes()), [head.clone(), head.clone()]);
        assert_eq!(
            named_heads(br#"{"type":"incarnation","previous_head":null}"#),
            []
        );
        assert_eq!(named_heads(b"{}"), []);
        let events = [
            first,
            Event::Recovered {
                records: 3,
                truncated_at_index: 3,
                truncated_bytes: 9,
                truncated_records_estimate: 1,
                r#type: "recovered",
                unix_ms: 5,
            },
            Event::Reopened {
                device: "matches",
                reason: "eio",
                r#type: "reopened",
                unix_ms: 5,
            },
            Event::Refused {
                decisions: 1,
                denials: 2,
                first_unix_ms: 3,
                last_unix_ms: 4,
                r#type: "refused_at_capacity",
                unix_ms: 5,
                window: 6,
            },
            Event::Gap {
                count: 2,
                first: 3,
                last: 4,
                origin: &Origin::parse("audit/n1/0123456789abcdef/2").unwrap(),
                root_after: Sha256Hash::of(b"after"),
                root_before: None,
                segments: Vec::new(),
                r#type: "gap",
                unix_ms: 5,
            },
        ];
        for event in events {
            let value: serde_json::Value = serde_json::from_slice(&event.bytes()).unwrap();
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            let text = String::from_utf8(event.bytes()).unwrap();
            let at: Vec<_> = keys
                .iter()
                .map(|k| text.find(&format!("\"{k}\":")).unwrap())
                .collect();
            assert!(at.is_sorted(), "{text}");
        }
    }
}
