//! What became of an action that was allowed here and executed elsewhere, told once by its caller.
//!
//! An allow says only that a permit was made. Its caller may say what happened, while the node still
//! knows the allow: it keeps a bounded window of them in memory, and after a restart reads one back
//! from the log, outcomes included, so that what was reported stays reported. Beyond the window a
//! report is refused, never taken on trust.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use tidelock_segments::Sha256Hash;

use crate::{
    action::{Fields, InvalidCode, InvalidRequest, canonical_bytes},
    answer::RecordPosition,
    caller::Caller,
    json,
    limits::{MAX_DENIED_KNOWN, MAX_INLINE_BYTES, MAX_OPEN_REPORTS, REPORT_AGE},
    reason::Reason,
    record,
};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionOutcome {
    /// The action took effect.
    Executed,
    /// It was tried and failed; it may have taken effect in part.
    Failed,
    /// It was not tried.
    NotExecuted,
}

impl ActionOutcome {
    /// The word for it in requests and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Executed => "executed",
            Self::Failed => "failed",
            Self::NotExecuted => "not_executed",
        }
    }
}

/// A report that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reported {
    /// What was reported.
    pub outcome: ActionOutcome,
    /// The decision.
    pub decision: RecordPosition,
    /// Where the outcome is recorded.
    pub record: RecordPosition,
}

/// Why a report was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportRefused {
    /// It was not understood.
    #[error("{}: {}", .0.code(), .0.message())]
    Invalid(#[from] InvalidRequest),
    /// No decision is known with this index and leaf.
    #[error("no decision of this log has that index and leaf")]
    Unknown,
    /// The decision was made for another caller.
    #[error("the decision was made for another caller")]
    NotYours,
    /// The action was not allowed, so there is no outcome of it.
    #[error("that decision allowed nothing, so it has no outcome")]
    NotAllowed,
    /// There is an outcome of this decision, or one is being written.
    #[error("the outcome of that decision is recorded already")]
    AlreadyReported,
    /// The decision is older than what is kept.
    #[error("that decision is older than what this node keeps for reports")]
    TooLate,
    /// It could not be recorded.
    #[error("the outcome could not be recorded, report again")]
    Unrecorded(Reason),
}

impl ReportRefused {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => Reason::InvalidRequest.as_str(),
            Self::Unknown => "UNKNOWN_RECORD",
            Self::NotYours => "NOT_YOURS",
            Self::NotAllowed => "NOT_ALLOWED",
            Self::AlreadyReported => "ALREADY_REPORTED",
            Self::TooLate => "TOO_LATE",
            Self::Unrecorded(reason) => reason.as_str(),
        }
    }
}

/// Takes the outcome of one report, once.
pub type ReportDone = Box<dyn FnOnce(Result<Reported, ReportRefused>) + Send>;

/// Records of earlier runs with their indexes, oldest first, as they are read back.
pub type History<'a> = &'a dyn Fn() -> Vec<(u64, Vec<u8>)>;

/// A report as it was read.
pub(crate) struct Report {
    pub(crate) index: u64,
    pub(crate) leaf: String,
    pub(crate) outcome: ActionOutcome,
    pub(crate) detail: Value,
}

impl Report {
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, InvalidRequest> {
        let mut report = Fields::new("report", json::parse(bytes)?)?;
        let mut record = Fields::new("record", report.required("record")?)?;
        let index = record.required("index")?.as_u64().ok_or_else(|| {
            InvalidRequest::new(
                InvalidCode::WrongType,
                "\"index\" of record must be an integer from 0",
            )
        })?;
        let leaf = record.text("leaf")?;
        record.finish(&["index", "leaf"])?;
        let outcome = match report.text("outcome")?.as_str() {
            "executed" => ActionOutcome::Executed,
            "failed" => ActionOutcome::Failed,
            "not_executed" => ActionOutcome::NotExecuted,
            _ => {
                return Err(InvalidRequest::new(
                    InvalidCode::Name,
                    "outcome must be executed, failed or not_executed",
                ));
            }
        };
        let detail = report.object("detail")?;
        report.finish(&["record", "outcome", "detail"])?;
        let bytes = canonical_bytes(&detail)?.len();
        if bytes > MAX_INLINE_BYTES {
            return Err(InvalidRequest::new(
                InvalidCode::TooLarge,
                format!("detail is {bytes} bytes, at most {MAX_INLINE_BYTES} are recorded"),
            ));
        }
        Ok(Self {
            index,
            leaf,
            outcome,
            detail,
        })
    }
}

/// For whom a decision was made, as its record says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// Hash of type and id.
    Principal(Sha256Hash),
    /// Hash of type, id and door: all that a record of the short form has.
    AtDoor(Sha256Hash),
}

impl For {
    pub(crate) fn caller(caller: &Caller) -> Option<Self> {
        principal_hash(&record::caller_of(caller)).map(Self::Principal)
    }

    fn is(self, caller: &Caller) -> bool {
        let named = record::caller_of(caller);
        match self {
            Self::Principal(hash) => principal_hash(&named) == Some(hash),
            Self::AtDoor(hash) => {
                canonical_bytes(&named).is_ok_and(|bytes| Sha256Hash::of(&bytes) == hash)
            }
        }
    }
}

fn principal_hash(caller: &Value) -> Option<Sha256Hash> {
    let named = serde_json::json!([caller.get("type")?, caller.get("id")?]);
    canonical_bytes(&named)
        .ok()
        .map(|bytes| Sha256Hash::of(&bytes))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    No,
    Underway,
    Yes,
}

#[derive(Debug)]
struct Allowed {
    leaf: Sha256Hash,
    made_for: For,
    at_unix_ms: u64,
    told: Told,
}

/// The decisions that outcomes can be reported of.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    allowed: BTreeMap<u64, Allowed>,
    denied: BTreeMap<u64, Sha256Hash>,
    /// Below this index nothing is known.
    horizon: u64,
    was_read_back: bool,
}

impl Reports {
    /// An allow was answered.
    pub(crate) fn allowed(&mut self, at: RecordPosition, made_for: For, at_unix_ms: u64) {
        let allowed = Allowed {
            leaf: at.leaf,
            made_for,
            at_unix_ms,
            told: Told::No,
        };
        self.allowed.insert(at.index, allowed);
        self.bound();
    }

    /// Something else than an allow was answered.
    pub(crate) fn denied(&mut self, at: RecordPosition) {
        self.denied.insert(at.index, at.leaf);
        self.bound();
    }

    // INV-07: the oldest go.
    fn bound(&mut self) {
        while self.allowed.len() > MAX_OPEN_REPORTS {
            if let Some((index, _)) = self.allowed.pop_first() {
                self.horizon = self.horizon.max(index + 1);
            }
        }
        while self.denied.len() > MAX_DENIED_KNOWN {
            self.denied.pop_first();
        }
    }

    /// Whether an earlier run has to be looked at before this index can be judged. Says so once: whoever
    /// asks while the log is read is told what is known by then.
    pub(crate) fn wants_history(&mut self, index: u64) -> bool {
        let wants = !self.was_read_back
            && !self.allowed.contains_key(&index)
            && !self.denied.contains_key(&index);
        self.was_read_back |= wants;
        wants
    }

    /// Takes what an earlier run left. What is known already stays.
    pub(crate) fn read_back(&mut self, records: &[(u64, Vec<u8>)]) {
        let first = records.first().map_or(0, |(index, _)| *index);
        self.horizon = self.horizon.max(first);
        for (index, bytes) in records {
            let Ok(Value::Object(record)) = serde_json::from_slice(bytes) else {
                continue;
            };
            let word = |key: &str| record.get(key).and_then(Value::as_str).unwrap_or_default();
            let leaf = tidelock_segments::merkle::leaf_hash(bytes);
            match word("type") {
                "decision" if word("decision") == "allow" => {
                    let made_for = match record.get("caller") {
                        Some(caller) => principal_hash(caller).map(For::Principal),
                        None => word("caller_hash").parse().ok().map(For::AtDoor),
                    };
                    let at = record.get("at").and_then(Value::as_u64);
                    if let (Some(made_for), Some(at_unix_ms)) = (made_for, at) {
                        self.allowed.entry(*index).or_insert(Allowed {
                            leaf,
                            made_for,
                            at_unix_ms,
                            told: Told::No,
                        });
                    }
                }
                "decision" | "explain" => _ = self.denied.insert(*index, leaf),
                // Whatever it says, it is the one outcome of its decision.
                "outcome" => {
                    let of = record.get("decision_index").and_then(Value::as_u64);
                    if let Some(allowed) = of.and_then(|of| self.allowed.get_mut(&of)) {
                        allowed.told = Told::Yes;
                    }
                }
                _ => {}
            }
        }
        self.bound();
    }

    /// Claims a decision for this report.
    pub(crate) fn claim(
        &mut self,
        report: &Report,
        caller: &Caller,
        now_unix_ms: u64,
    ) -> Result<RecordPosition, ReportRefused> {
        let Some(allowed) = self.allowed.get_mut(&report.index) else {
            let denied = self.denied.get(&report.index);
            return Err(match denied {
                Some(leaf) if leaf.to_string() == report.leaf => ReportRefused::NotAllowed,
                None if report.index < self.horizon => ReportRefused::TooLate,
                _ => ReportRefused::Unknown,
            });
        };
        // Who cannot name the leaf learns nothing of the record.
        if allowed.leaf.to_string() != report.leaf {
            return Err(ReportRefused::Unknown);
        }
        if !allowed.made_for.is(caller) {
            return Err(ReportRefused::NotYours);
        }
        if allowed.told != Told::No {
            return Err(ReportRefused::AlreadyReported);
        }
        let age_ms = u128::from(now_unix_ms.saturating_sub(allowed.at_unix_ms));
        if age_ms > REPORT_AGE.as_millis() {
            return Err(ReportRefused::TooLate);
        }
        allowed.told = Told::Underway;
        Ok(RecordPosition {
            index: report.index,
            leaf: allowed.leaf,
        })
    }

    /// The outcome of a claimed decision is durable, or it is not and may be reported again.
    pub(crate) fn settle(&mut self, index: u64, is_recorded: bool) {
        if let Some(allowed) = self.allowed.get_mut(&index) {
            allowed.told = match is_recorded {
                true => Told::Yes,
                false => Told::No,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(id: &str, door: &'static str) -> Caller {
        Caller {
            principal_type: "Agent".to_owned(),
            principal_id: id.to_owned(),
            may_act_as: false,
            door,
        }
    }

    fn at(index: u64) -> RecordPosition {
        RecordPosition {
            index,
            leaf: Sha256Hash::of(&index.to_le_bytes()),
        }
    }

    fn report(position: RecordPosition) -> Report {
        Report {
            index: position.index,
            leaf: position.leaf.to_string(),
            outcome: ActionOutcome::Executed,
            detail: Value::Null,
        }
    }

    #[test]
    fn a_report_is_taken_once_and_again_only_when_it_was_not_recorded() {
        let mut reports = Reports::default();
        let (mine, other) = (caller("a", "tcp"), caller("b", "tcp"));
        reports.allowed(at(7), For::caller(&mine).unwrap(), 1_000);
        reports.denied(at(8));
        let mut claim =
            |position, caller: &Caller, now| reports.claim(&report(position), caller, now);
        assert_eq!(claim(at(7), &other, 1_000), Err(ReportRefused::NotYours));
        assert_eq!(claim(at(8), &mine, 1_000), Err(ReportRefused::NotAllowed));
        assert_eq!(claim(at(9), &mine, 1_000), Err(ReportRefused::Unknown));
        let day_ms = u64::try_from(REPORT_AGE.as_millis()).unwrap();
        assert_eq!(
            claim(at(7), &mine, 1_001 + day_ms),
            Err(ReportRefused::TooLate)
        );
        // The same principal through another door is the same.
        assert_eq!(
            claim(at(7), &caller("a", "unix"), 1_000 + day_ms),
            Ok(at(7))
        );
        assert_eq!(
            claim(at(7), &mine, 1_000),
            Err(ReportRefused::AlreadyReported)
        );
        reports.settle(7, false);
        assert!(reports.claim(&report(at(7)), &mine, 1_000).is_ok());
        reports.settle(7, true);
        assert_eq!(
            reports.claim(&report(at(7)), &mine, 1_000),
            Err(ReportRefused::AlreadyReported)
        );
    }

    #[test]
    fn inv_07_the_decisions_that_wait_for_a_report_are_bounded_and_the_oldest_go() {
        let mut reports = Reports::default();
        let mine = caller("a", "tcp");
        let all = u64::try_from(MAX_OPEN_REPORTS).unwrap() + 10;
        for index in 0..all {
            reports.allowed(at(index), For::caller(&mine).unwrap(), 0);
            reports.denied(at(all + index));
        }
        assert_eq!(reports.allowed.len(), MAX_OPEN_REPORTS);
        assert_eq!(reports.denied.len(), MAX_DENIED_KNOWN);
        assert_eq!(
            reports.claim(&report(at(3)), &mine, 0),
            Err(ReportRefused::TooLate)
        );
        assert!(reports.claim(&report(at(10)), &mine, 0).is_ok());
    }

    #[test]
    fn an_earlier_run_is_read_back_with_what_was_reported_of_it() {
        let mine = caller("a", "tcp");
        let named = record::caller_of(&mine);
        let short = Sha256Hash::of(&canonical_bytes(&named).unwrap());
        let records: Vec<(u64, Vec<u8>)> = [
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "caller": named}),
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "form": "short",
                               "caller_hash": short.to_string()}),
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "caller": named}),
            serde_json::json!({"type": "outcome", "outcome": "not_released", "decision_index": 42}),
            serde_json::json!({"type": "decision", "decision": "deny", "at": 5, "caller": named}),
        ]
        .iter()
        .zip(40..)
        .map(|(record, index)| (index, serde_json::to_vec(record).unwrap()))
        .collect();
        let position = |index: usize| RecordPosition {
            index: records[index].0,
            leaf: tidelock_segments::merkle::leaf_hash(&records[index].1),
        };
        let mut reports = Reports::default();
        assert!(reports.wants_history(40));
        reports.read_back(&records);
        assert!(!reports.wants_history(40), "once a run");
        let mut claim = |index, caller: &Caller| reports.claim(&report(position(index)), caller, 6);
        assert!(claim(0, &mine).is_ok());
        assert_eq!(claim(1, &caller("b", "tcp")), Err(ReportRefused::NotYours));
        assert!(claim(1, &mine).is_ok(), "a record of the short form");
        assert_eq!(claim(2, &mine), Err(ReportRefused::AlreadyReported));
        assert_eq!(claim(4, &mine), Err(ReportRefused::NotAllowed));
        assert_eq!(
            reports.claim(&report(at(39)), &mine, 6),
            Err(ReportRefused::TooLate)
        );
    }
}
