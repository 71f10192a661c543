//! Denials that are counted instead of recorded one by one (ruling 20).
//!
//! A principal may write denials one by one up to a budget of record bytes. Beyond it they are
//! counted, exactly, by principal and reason, in a window; at its end the window becomes one
//! record. Answers that could not be recorded at all are counted in the same window. A window whose
//! record could not be written is merged into the next, so nothing is forgotten while the log has
//! no room, and memory does not grow meanwhile (INV-07).

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, Value, json};

use crate::{
    consult::ConsultNote,
    limits::{MAX_SUMMARY_CONSULTS, MAX_SUMMARY_PRINCIPALS},
};

type Counts = BTreeMap<&'static str, u64>;

/// What came of questions: the decision point, what it said or why it did not, and what stood in for it.
type Consulted = (String, &'static str, &'static str);

/// Whose denials are counted together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Counted {
    /// Type and id of the caller.
    pub(crate) who: (String, String),
    /// Those of the proxy whose word that is.
    pub(crate) stated_by: Option<(String, String)>,
}

impl Counted {
    /// One line of a window's record.
    fn line(&self, counts: &Counts) -> Value {
        let (kind, id) = &self.who;
        let mut line = json!({"type": kind, "id": id, "counts": counts});
        if let (Some((kind, id)), Value::Object(fields)) = (&self.stated_by, &mut line) {
            fields.insert("stated_by".to_owned(), json!({"type": kind, "id": id}));
        }
        line
    }
}

/// What happened between two moments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// Sequence numbers of the first and last window merged into this one.
    first: u64,
    last: u64,
    opened: Duration,
    from_unix_ms: u64,
    to_unix_ms: u64,
    principals: BTreeMap<Counted, Counts>,
    /// Principals beyond the limit, together.
    other: Counts,
    /// Answers that have no record of their own, by reason, of all principals together.
    unrecorded: Counts,
    /// Counted denials after a decision point was asked, of all principals together.
    consults: BTreeMap<Consulted, u64>,
}

/// The open window, and the way to the next.
#[derive(Debug)]
pub(crate) struct Summary {
    /// Makes window ids of different runs different.
    boot_unix_ms: u64,
    next: u64,
    open: Option<Window>,
}

impl Summary {
    pub(crate) fn new(boot_unix_ms: u64) -> Self {
        Self {
            boot_unix_ms,
            next: 0,
            open: None,
        }
    }

    /// Counts one denial of this principal, and what a decision point had to do with it; returns the id of
    /// the window that it is counted in.
    pub(crate) fn count(
        &mut self,
        principal: Counted,
        (what, note): (&'static str, Option<&ConsultNote>),
        (now, unix_ms): (Duration, u64),
    ) -> String {
        let window = self.window(now, unix_ms);
        let full = window.principals.len() >= MAX_SUMMARY_PRINCIPALS;
        let counts = if full && !window.principals.contains_key(&principal) {
            &mut window.other
        } else {
            window.principals.entry(principal).or_default()
        };
        *counts.entry(what).or_default() += 1;
        if let Some(note) = note {
            let (upstream, outcome, fallback) = note.counted();
            count_one(
                &mut window.consults,
                (upstream.to_owned(), outcome, fallback),
                1,
            );
        }
        let last = window.last;
        self.id(last)
    }

    /// Counts one answer that could not be recorded.
    pub(crate) fn count_unrecorded(&mut self, what: &'static str, now: Duration, unix_ms: u64) {
        *self
            .window(now, unix_ms)
            .unrecorded
            .entry(what)
            .or_default() += 1;
    }

    fn window(&mut self, now: Duration, unix_ms: u64) -> &mut Window {
        let next = &mut self.next;
        let window = self.open.get_or_insert_with(|| {
            *next += 1;
            Window {
                first: *next,
                last: *next,
                opened: now,
                from_unix_ms: unix_ms,
                to_unix_ms: unix_ms,
                principals: BTreeMap::new(),
                other: Counts::new(),
                unrecorded: Counts::new(),
                consults: BTreeMap::new(),
            }
        });
        window.to_unix_ms = window.to_unix_ms.max(unix_ms);
        window
    }

    /// Takes the window out when it has been open that long.
    pub(crate) fn take_due(&mut self, now: Duration, length: Duration) -> Option<Window> {
        let due = self
            .open
            .as_ref()
            .is_some_and(|w| now.saturating_sub(w.opened) >= length);
        if due { self.open.take() } else { None }
    }

    /// Puts a window back whose record could not be written.
    pub(crate) fn put_back(&mut self, failed: Window, now: Duration) {
        let Some(open) = &mut self.open else {
            self.open = Some(Window {
                opened: now,
                ..failed
            });
            return;
        };
        open.first = open.first.min(failed.first);
        open.last = open.last.max(failed.last);
        open.from_unix_ms = open.from_unix_ms.min(failed.from_unix_ms);
        open.to_unix_ms = open.to_unix_ms.max(failed.to_unix_ms);
        merge(&mut open.other, failed.other);
        merge(&mut open.unrecorded, failed.unrecorded);
        for (consulted, count) in failed.consults {
            count_one(&mut open.consults, consulted, count);
        }
        for (principal, counts) in failed.principals {
            let full = open.principals.len() >= MAX_SUMMARY_PRINCIPALS;
            if full && !open.principals.contains_key(&principal) {
                merge(&mut open.other, counts);
            } else {
                merge(open.principals.entry(principal).or_default(), counts);
            }
        }
    }

    fn id(&self, sequence: u64) -> String {
        format!("{:x}-{sequence}", self.boot_unix_ms)
    }

    /// The fields of the window's record.
    pub(crate) fn fields(&self, window: &Window) -> Map<String, Value> {
        let principals: Vec<Value> = window
            .principals
            .iter()
            .map(|(principal, counts)| principal.line(counts))
            .collect();
        let mut fields = Map::new();
        fields.insert("first_window".to_owned(), self.id(window.first).into());
        fields.insert("last_window".to_owned(), self.id(window.last).into());
        fields.insert("from_unix_ms".to_owned(), window.from_unix_ms.into());
        fields.insert("to_unix_ms".to_owned(), window.to_unix_ms.into());
        fields.insert("principals".to_owned(), principals.into());
        fields.insert("other".to_owned(), json!(window.other));
        fields.insert("unrecorded".to_owned(), json!(window.unrecorded));
        if !window.consults.is_empty() {
            let consults: Vec<Value> = window
                .consults
                .iter()
                .map(|((upstream, outcome, fallback), count)| {
                    json!({"upstream": upstream, "outcome": outcome, "fallback": fallback, "count": count})
                })
                .collect();
            fields.insert("consults".to_owned(), consults.into());
        }
        fields
    }
}

/// Counts a denial by its decision point, all of those beyond the limit together, under no name.
fn count_one(into: &mut BTreeMap<Consulted, u64>, mut consulted: Consulted, count: u64) {
    if into.len() >= MAX_SUMMARY_CONSULTS && !into.contains_key(&consulted) {
        consulted.0 = String::new();
    }
    *into.entry(consulted).or_default() += count;
}

fn merge(into: &mut Counts, from: Counts) {
    for (what, count) in from {
        *into.entry(what).or_default() += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn principal(n: usize) -> Counted {
        Counted {
            who: ("Agent".to_owned(), format!("a{n:05}")),
            stated_by: None,
        }
    }

    #[test]
    fn a_name_that_a_proxy_stated_is_counted_beside_the_same_name_of_its_own() {
        let mut summary = Summary::new(1);
        let stated = Counted {
            stated_by: Some(("Service".to_owned(), "envoy-1".to_owned())),
            ..principal(1)
        };
        for counted in [principal(1), stated.clone(), stated] {
            summary.count(counted, ("NO_MATCH", None), (S, 10));
        }
        let window = summary.take_due(S * 9, S).unwrap();
        assert_eq!(
            summary.fields(&window)["principals"],
            json!([
                {"type": "Agent", "id": "a00001", "counts": {"NO_MATCH": 1}},
                {"type": "Agent", "id": "a00001", "counts": {"NO_MATCH": 2},
                 "stated_by": {"type": "Service", "id": "envoy-1"}},
            ])
        );
    }

    #[test]
    fn counts_are_exact_and_windows_have_ids() {
        let mut summary = Summary::new(0xabc);
        for n in 0..10 {
            let id = summary.count(principal(n % 2), ("NO_MATCH", None), (S, 100 + n as u64));
            assert_eq!(id, "abc-1");
        }
        summary.count_unrecorded("AUDIT_UNAVAILABLE", S, 200);
        assert_eq!(summary.take_due(S * 2, S * 5), None, "not due yet");
        let window = summary.take_due(S * 6, S * 5).unwrap();
        assert_eq!(
            Value::Object(summary.fields(&window)),
            json!({
                "first_window": "abc-1", "last_window": "abc-1",
                "from_unix_ms": 100, "to_unix_ms": 200,
                "principals": [
                    {"type": "Agent", "id": "a00000", "counts": {"NO_MATCH": 5}},
                    {"type": "Agent", "id": "a00001", "counts": {"NO_MATCH": 5}},
                ],
                "other": {}, "unrecorded": {"AUDIT_UNAVAILABLE": 1},
            })
        );
        let next = summary.count(principal(0), ("NO_MATCH", None), (S * 7, 300));
        assert_eq!(next, "abc-2");
    }

    #[test]
    fn a_window_that_could_not_be_written_is_merged_into_the_next() {
        let mut summary = Summary::new(1);
        summary.count(principal(1), ("NO_MATCH", None), (S, 10));
        let first = summary.take_due(S * 9, S).unwrap();
        summary.count(principal(1), ("NO_MATCH", None), (S * 10, 20));
        summary.count(principal(2), ("POLICY_DENY", None), (S * 10, 30));
        summary.put_back(first, S * 10);
        let merged = summary.take_due(S * 20, S).unwrap();
        let fields = summary.fields(&merged);
        assert_eq!(
            (&fields["first_window"], &fields["last_window"]),
            (&json!("1-1"), &json!("1-2"))
        );
        assert_eq!(
            (&fields["from_unix_ms"], &fields["to_unix_ms"]),
            (&json!(10), &json!(30))
        );
        assert_eq!(fields["principals"][0]["counts"], json!({"NO_MATCH": 2}));

        // With no open window it simply waits for its next turn.
        summary.put_back(merged.clone(), S * 20);
        assert_eq!(summary.take_due(S * 20, S), None);
        assert_eq!(
            summary.take_due(S * 21, S),
            Some(Window {
                opened: S * 20,
                ..merged
            })
        );
    }

    #[test]
    fn inv_07_a_window_holds_a_bounded_number_of_decision_points_and_loses_no_count() {
        let mut consults = BTreeMap::new();
        let all = MAX_SUMMARY_CONSULTS * 3;
        for n in 0..all {
            count_one(&mut consults, (format!("up-{n}"), "deny", "none"), 1);
        }
        count_one(&mut consults, ("up-0".to_owned(), "deny", "none"), 4);
        assert_eq!(consults.len(), MAX_SUMMARY_CONSULTS + 1);
        assert_eq!(consults.values().sum::<u64>(), all as u64 + 4);
        let nameless = (String::new(), "deny", "none");
        let beyond = (all - MAX_SUMMARY_CONSULTS) as u64;
        assert_eq!(consults.get(&nameless), Some(&beyond));
        assert_eq!(consults.get(&("up-0".to_owned(), "deny", "none")), Some(&5));
    }

    #[test]
    fn inv_07_a_window_holds_a_bounded_number_of_principals_and_loses_no_count() {
        let mut summary = Summary::new(1);
        let all = MAX_SUMMARY_PRINCIPALS * 3;
        let total = |window: &Window| {
            window
                .principals
                .values()
                .chain([&window.other])
                .flat_map(Counts::values)
                .sum::<u64>()
        };
        for n in 0..all {
            summary.count(principal(n), ("NO_MATCH", None), (S, 1));
        }
        let window = summary.take_due(S * 2, S).unwrap();
        assert_eq!(window.principals.len(), MAX_SUMMARY_PRINCIPALS);
        assert_eq!(total(&window), all as u64);
        for n in all..all * 2 {
            summary.count(principal(n), ("NO_MATCH", None), (S * 2, 1));
        }
        summary.put_back(window, S * 2);
        let merged = summary.take_due(S * 4, S).unwrap();
        assert_eq!(merged.principals.len(), MAX_SUMMARY_PRINCIPALS);
        assert_eq!(total(&merged), all as u64 * 2);
    }
}
