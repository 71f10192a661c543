//! What happened lately, for the operator: a bounded ring of events, newest last.
//!
//! It is no evidence (that is the audit log); it answers "why is this peer not connected" and
//! "when did that segment come" without a search through logs.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use serde_json::{Map, Value, json};

/// Entries kept; at about 300 bytes each the ring holds at most 1.2 MiB (INV-07).
const ENTRIES_MAX: usize = 4_096;

/// Longest text in an entry, characters: details can be of a peer's making.
const TEXT_MAX: usize = 256;
/// Events that a peer can cause as often as it likes.
const REPEATED: [&str; 5] = [
    "peer_refused",
    "dial_failed",
    "session_failed",
    "transfer_failed",
    "segment_refused",
];
/// How far back a repetition is looked for.
const RECENT: usize = 64;

/// The ring.
#[derive(Debug, Default)]
pub(super) struct Journal {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    entries: VecDeque<(u64, Value)>,
}

impl Journal {
    /// Notes one event at `unix_ms`; the oldest entry makes room.
    /// An event of the same kind, peer and reason as a recent one is counted there instead, so that
    /// a flood of refusals pushes nothing out.
    pub(super) fn note(&self, unix_ms: u64, event: &str, fields: Value) {
        let mut entry = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        for value in entry.values_mut() {
            if let Value::String(text) = value
                && text.len() > TEXT_MAX
            {
                *text = text.chars().take(TEXT_MAX).collect();
            }
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if REPEATED.contains(&event) {
            let same = |old: &Value| {
                old.get("event").and_then(Value::as_str) == Some(event)
                    && old.get("peer") == entry.get("peer")
                    && old.get("reason") == entry.get("reason")
            };
            let recent = inner.entries.iter_mut().rev().take(RECENT);
            if let Some(old) = recent
                .map(|(_, old)| old)
                .find(|old| same(old))
                .and_then(Value::as_object_mut)
            {
                let count = old.get("count").and_then(Value::as_u64).unwrap_or(1);
                old.insert("count".to_owned(), json!(count.saturating_add(1)));
                old.insert("last_unix_ms".to_owned(), json!(unix_ms));
                return;
            }
        }
        let fields = Value::Object(entry.clone()).to_string();
        tracing::info!(event, fields, "journal");
        inner.next += 1;
        let line = inner.next;
        entry.insert("line".to_owned(), json!(line));
        entry.insert("unix_ms".to_owned(), json!(unix_ms));
        entry.insert("event".to_owned(), json!(event));
        if inner.entries.len() >= ENTRIES_MAX {
            inner.entries.pop_front();
        }
        inner.entries.push_back((line, Value::Object(entry)));
    }

    /// The entries after line `since`.
    pub(super) fn since(&self, since: u64) -> Vec<Value> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entries
            .iter()
            .filter(|(line, _)| *line > since)
            .map(|(_, entry)| entry.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inv_07_a_flood_of_one_event_is_one_entry() {
        let journal = Journal::default();
        for n in 0..1_000 {
            journal.note(
                n,
                "peer_refused",
                json!({"peer": "b", "reason": "cert_revoked"}),
            );
        }
        journal.note(
            1_001,
            "peer_refused",
            json!({"peer": "c", "reason": "cert_revoked"}),
        );
        let all = journal.since(0);
        assert_eq!(all.len(), 2, "another peer is another entry");
        assert_eq!(all[0]["count"], 1_000);
        assert_eq!(all[0]["last_unix_ms"], 999);
    }

    #[test]
    fn inv_07_the_ring_is_bounded_and_lines_only_rise() {
        let journal = Journal::default();
        for n in 0..ENTRIES_MAX + 10 {
            journal.note(1, "x", json!({"n": n}));
        }
        let all = journal.since(0);
        assert_eq!(all.len(), ENTRIES_MAX);
        assert_eq!(all[0]["line"], 11);
        assert_eq!(journal.since(ENTRIES_MAX as u64 + 9).len(), 1);
    }
}
