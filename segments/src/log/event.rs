//! Records that the log writes about itself. JSON with sorted keys and no spaces, which is RFC 8785
//! canonical for these contents.

use serde::Serialize;

use crate::id::{NodeId, Origin, SegmentId, Sha256Hash};

/// The highest head of the log before, as far as this node can tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PreviousHead {
    pub(crate) origin: Origin,
    pub(crate) root: Sha256Hash,
    pub(crate) size: u64,
}

/// One lifecycle record. Fields stand in alphabetical order; `type` is the tag's value.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Event<'a> {
    Incarnation {
        incarnation: u64,
        previous_head: Option<&'a PreviousHead>,
        previous_origin: Option<&'a Origin>,
        quarantined: &'a [String],
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
        let events = [
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
