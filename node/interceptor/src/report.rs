//! What became of an action that was allowed here and executed elsewhere, told once by its caller.
//!
//! An allow says only that a permit was made. Its caller may say what happened, while the node still
//! knows the allow: it keeps a bounded window of them in memory, and after a restart reads one back
//! from the log, outcomes included, so that what was reported stays reported. Beyond the window a
//! report is refused, never taken on trust.
//!
//! Indexes count from 0 in each incarnation of the log (decision 0022): with the first record of a new one
//! all that was known of the one before is forgotten, so that no report is linked to a decision of another
//! log. When the window is full, the oldest decision of whoever has the most in it goes: one busy caller
//! does not take the others' part.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::Serialize;
use serde_json::Value;
use tidelock_segments::{Appended, Sha256Hash};

use crate::{
    action::{Fields, InvalidCode, InvalidRequest, canonical_bytes},
    answer::RecordPosition,
    caller::Caller,
    json,
    limits::{
        MAX_DENIED_KNOWN, MAX_INLINE_BYTES, MAX_OPEN_REPORTS, READ_BACK_PAUSE, READ_BACK_TRIES,
        REPORT_AGE,
    },
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

/// Reads earlier runs back, or says why that cannot be done just now.
pub type History<'a> = &'a dyn Fn() -> Result<EarlierRecords, String>;

/// What earlier runs recorded in the log that they left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EarlierRecords {
    /// Which incarnation of the log it is.
    pub incarnation: u64,
    /// Its last records with their indexes, oldest first.
    pub records: Vec<(u64, Vec<u8>)>,
}

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
    /// Hash of type, id, door and whose word it is: all that a record of the short form has.
    AtDoor(Sha256Hash),
}

impl For {
    pub(crate) fn caller(caller: &Caller) -> Option<Self> {
        principal_hash(&record::caller_of(caller)).map(Self::Principal)
    }

    /// Whose part of the window it counts to.
    fn holder(self) -> Sha256Hash {
        match self {
            Self::Principal(hash) | Self::AtDoor(hash) => hash,
        }
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
    /// Which incarnation of the log all of this is of, once a record of it is known.
    incarnation: Option<u64>,
    allowed: BTreeMap<u64, Allowed>,
    /// The indexes of `allowed` by holder, and how many each has.
    held: BTreeMap<Sha256Hash, BTreeSet<u64>>,
    by_count: BTreeSet<(usize, Sha256Hash)>,
    denied: BTreeMap<u64, Sha256Hash>,
    /// Of a decision below this index that is not known, nothing can be said any more.
    horizon: u64,
    history: ReadBack,
}

/// How far reading earlier runs back has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ReadBack {
    /// It was not asked for yet.
    #[default]
    Untried,
    /// Somebody reads.
    Underway { tries: u32 },
    /// The disk refused; not before this time again.
    Failed { tries: u32, again_at: Duration },
    /// It is known, or there is none.
    Done,
}

/// What to do about earlier runs before a report is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Earlier {
    /// All that can be known is known.
    Known,
    /// Read them, and give them to [`Reports::read_back`].
    Read,
    /// They cannot be read just now: nothing can be said of a decision that is not known.
    Unreadable,
}

impl Reports {
    /// An allow was answered.
    pub(crate) fn allowed(&mut self, at: Appended, made_for: For, at_unix_ms: u64) {
        if !self.is_of(at.incarnation) {
            return;
        }
        let allowed = Allowed {
            leaf: at.leaf,
            made_for,
            at_unix_ms,
            told: Told::No,
        };
        self.insert(at.index, allowed);
        self.bound();
    }

    /// Something else than an allow was answered.
    pub(crate) fn denied(&mut self, at: Appended) {
        if !self.is_of(at.incarnation) {
            return;
        }
        self.denied.insert(at.index, at.leaf);
        self.bound();
    }

    /// Whether a record of this incarnation is of the log that is kept account of. A later one begins with
    /// nothing known; what comes late of an earlier one is nobody's to report any more.
    fn is_of(&mut self, incarnation: u64) -> bool {
        match self.incarnation {
            Some(known) if known == incarnation => true,
            Some(known) if known > incarnation => false,
            Some(_) => {
                *self = Self {
                    incarnation: Some(incarnation),
                    // Nothing of it was before this run.
                    history: ReadBack::Done,
                    ..Self::default()
                };
                true
            }
            None => {
                self.incarnation = Some(incarnation);
                true
            }
        }
    }

    fn insert(&mut self, index: u64, allowed: Allowed) {
        let holder = allowed.made_for.holder();
        self.remove(index);
        self.allowed.insert(index, allowed);
        let held = self.held.entry(holder).or_default();
        self.by_count.remove(&(held.len(), holder));
        held.insert(index);
        self.by_count.insert((held.len(), holder));
    }

    fn remove(&mut self, index: u64) {
        let Some(holder) = self.allowed.remove(&index).map(|a| a.made_for.holder()) else {
            return;
        };
        let Some(held) = self.held.get_mut(&holder) else {
            return;
        };
        self.by_count.remove(&(held.len(), holder));
        held.remove(&index);
        match held.len() {
            0 => _ = self.held.remove(&holder),
            left => _ = self.by_count.insert((left, holder)),
        }
    }

    // INV-07: the oldest of whoever holds the most goes.
    fn bound(&mut self) {
        while self.allowed.len() > MAX_OPEN_REPORTS {
            let most = self.by_count.last().map(|(_, holder)| *holder);
            let oldest = most.and_then(|holder| self.held.get(&holder)?.first().copied());
            let Some(index) = oldest.or_else(|| self.allowed.keys().next().copied()) else {
                break;
            };
            self.remove(index);
            self.horizon = self.horizon.max(index.saturating_add(1));
        }
        while self.denied.len() > MAX_DENIED_KNOWN {
            self.denied.pop_first();
        }
    }

    /// Whether an earlier run has to be looked at before this index can be judged. One reads at a time,
    /// and again only after a pause where the disk refused; until then nobody is told that a decision
    /// does not exist.
    pub(crate) fn earlier(&mut self, index: u64, now: Duration) -> Earlier {
        if self.allowed.contains_key(&index) || self.denied.contains_key(&index) {
            return Earlier::Known;
        }
        let tries = match self.history {
            ReadBack::Done => return Earlier::Known,
            ReadBack::Underway { .. } => return Earlier::Unreadable,
            ReadBack::Failed { tries, again_at } if tries >= READ_BACK_TRIES || now < again_at => {
                return Earlier::Unreadable;
            }
            ReadBack::Failed { tries, .. } => tries,
            ReadBack::Untried => 0,
        };
        self.history = ReadBack::Underway { tries };
        Earlier::Read
    }

    /// Earlier runs could not be read.
    pub(crate) fn not_read_back(&mut self, now: Duration) {
        if let ReadBack::Underway { tries } = self.history {
            self.history = ReadBack::Failed {
                tries: tries.saturating_add(1),
                again_at: now.saturating_add(READ_BACK_PAUSE),
            };
        }
    }

    /// Takes what an earlier run left. What is known already stays. Of a log that ended meanwhile nothing
    /// is taken.
    pub(crate) fn read_back(&mut self, earlier: &EarlierRecords) {
        if !matches!(self.history, ReadBack::Underway { .. }) {
            return;
        }
        self.history = ReadBack::Done;
        if !self.is_of(earlier.incarnation) {
            return;
        }
        let records = &earlier.records;
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
                    if let (Some(made_for), Some(at_unix_ms)) = (made_for, at)
                        && !self.allowed.contains_key(index)
                    {
                        let told = Told::No;
                        let allowed = Allowed {
                            leaf,
                            made_for,
                            at_unix_ms,
                            told,
                        };
                        self.insert(*index, allowed);
                    }
                }
                "decision" | "explain" => _ = self.denied.insert(*index, leaf),
                // Whatever it says, it is the one outcome of its decision.
                "outcome" => {
                    let of = record.get("decision_index").and_then(Value::as_u64);
                    let of = of.and_then(|of| self.allowed.get_mut(&of));
                    // By its leaf too: an index alone is that of another record in another log.
                    if let Some(allowed) =
                        of.filter(|of| of.leaf.to_string() == word("decision_leaf"))
                    {
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
    pub(crate) fn settle(&mut self, decision: RecordPosition, is_recorded: bool) {
        if let Some(allowed) = self.allowed.get_mut(&decision.index)
            && allowed.leaf == decision.leaf
        {
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
            stated_by: None,
        }
    }

    fn at(index: u64) -> Appended {
        Appended {
            incarnation: 1,
            index,
            leaf: Sha256Hash::of(&index.to_le_bytes()),
        }
    }

    fn report(position: impl Into<RecordPosition>) -> Report {
        let position = position.into();
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
        let mut claim = |position: Appended, caller: &Caller, now| {
            reports.claim(&report(position), caller, now)
        };
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
            Ok(at(7).into())
        );
        assert_eq!(
            claim(at(7), &mine, 1_000),
            Err(ReportRefused::AlreadyReported)
        );
        reports.settle(at(7).into(), false);
        assert!(reports.claim(&report(at(7)), &mine, 1_000).is_ok());
        reports.settle(at(7).into(), true);
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
        let third =
            serde_json::json!({"type": "decision", "decision": "allow", "at": 6, "caller": named});
        let third_leaf =
            tidelock_segments::merkle::leaf_hash(&serde_json::to_vec(&third).unwrap()).to_string();
        let records: Vec<(u64, Vec<u8>)> = [
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "caller": named}),
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "form": "short",
                               "caller_hash": short.to_string()}),
            third,
            serde_json::json!({"type": "outcome", "outcome": "not_released", "decision_index": 42,
                               "decision_leaf": third_leaf}),
            serde_json::json!({"type": "decision", "decision": "deny", "at": 5, "caller": named}),
            // Of a decision of another log at the same index.
            serde_json::json!({"type": "outcome", "outcome": "executed", "decision_index": 40,
                               "decision_leaf": Sha256Hash::of(b"another").to_string()}),
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
        assert_eq!(reports.earlier(40, Duration::ZERO), Earlier::Read);
        reports.read_back(&EarlierRecords {
            incarnation: 1,
            records: records.clone(),
        });
        assert_eq!(reports.earlier(39, Duration::ZERO), Earlier::Known);
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

    /// After a restart a disk that refused once made the node say of every earlier decision that there is
    /// no such one, until its next start.
    #[test]
    fn what_cannot_be_read_back_is_tried_again_a_bounded_number_of_times() {
        let mut reports = Reports::default();
        let mut now = Duration::ZERO;
        for _ in 0..READ_BACK_TRIES {
            assert_eq!(reports.earlier(5, now), Earlier::Read);
            assert_eq!(reports.earlier(5, now), Earlier::Unreadable, "one reads");
            reports.not_read_back(now);
            assert_eq!(reports.earlier(5, now), Earlier::Unreadable, "a pause");
            now += READ_BACK_PAUSE;
        }
        let day = Duration::from_secs(86_400);
        assert_eq!(reports.earlier(5, now + day), Earlier::Unreadable);
        // The control: one that ends well.
        let mut reports = Reports::default();
        assert_eq!(reports.earlier(5, now), Earlier::Read);
        reports.not_read_back(now);
        assert_eq!(reports.earlier(5, now + READ_BACK_PAUSE), Earlier::Read);
        reports.read_back(&EarlierRecords::default());
        assert_eq!(reports.earlier(5, now), Earlier::Known);
    }

    /// A node whose log was superseded goes on in its next incarnation, whose indexes begin at 0: a caller
    /// who kept index and leaf of an old allow could have had its outcome written beside a decision of
    /// another log.
    #[test]
    fn with_a_new_incarnation_nothing_of_the_one_before_can_be_reported() {
        let mine = caller("a", "tcp");
        let made_for = For::caller(&mine).unwrap();
        let of = |incarnation, index| Appended {
            incarnation,
            leaf: Sha256Hash::of(format!("{incarnation} {index}").as_bytes()),
            index,
        };
        // Neither what was read back before the log changed, though nothing was recorded in this run.
        let mut reports = Reports::default();
        assert_eq!(reports.earlier(3, Duration::ZERO), Earlier::Read);
        let named = record::caller_of(&mine);
        let allow =
            serde_json::json!({"type": "decision", "decision": "allow", "at": 5, "caller": named});
        let allow = serde_json::to_vec(&allow).unwrap();
        let leaf = tidelock_segments::merkle::leaf_hash(&allow);
        reports.read_back(&EarlierRecords {
            incarnation: 1,
            records: vec![(3, allow)],
        });
        assert_eq!(reports.allowed.len(), 1, "the control");
        reports.denied(of(2, 0));
        let old = report(RecordPosition { index: 3, leaf });
        assert_eq!(reports.claim(&old, &mine, 6), Err(ReportRefused::Unknown));

        let mut reports = Reports::default();
        for index in [3, 40] {
            reports.allowed(of(1, index), made_for, 0);
        }
        let claimed = reports.claim(&report(of(1, 3)), &mine, 0).unwrap();
        reports.allowed(of(2, 3), made_for, 0);
        // What was on its way when the log changed.
        reports.allowed(of(1, 41), made_for, 0);
        reports.denied(of(1, 5));
        for old in [of(1, 3), of(1, 40), of(1, 41), of(1, 5)] {
            assert_eq!(
                reports.claim(&report(old), &mine, 0),
                Err(ReportRefused::Unknown),
                "{old:?}"
            );
        }
        // Nor does the end of an old report close the new decision at its index.
        reports.settle(claimed, true);
        assert_eq!(reports.earlier(7, Duration::ZERO), Earlier::Known);
        assert_eq!(
            reports.claim(&report(of(2, 3)), &mine, 0),
            Ok(of(2, 3).into())
        );
    }

    #[test]
    fn inv_13_a_busy_caller_does_not_take_the_others_part_of_the_window() {
        let mut reports = Reports::default();
        let (busy, quiet) = (caller("busy", "tcp"), caller("quiet", "tcp"));
        reports.allowed(at(0), For::caller(&quiet).unwrap(), 0);
        let all = u64::try_from(MAX_OPEN_REPORTS).unwrap() + 10;
        for index in 1..all {
            reports.allowed(at(index), For::caller(&busy).unwrap(), 0);
        }
        assert_eq!(reports.allowed.len(), MAX_OPEN_REPORTS);
        assert_eq!(reports.held.len(), 2);
        assert_eq!(
            reports.claim(&report(at(1)), &busy, 0),
            Err(ReportRefused::TooLate)
        );
        assert!(reports.claim(&report(at(0)), &quiet, 0).is_ok());
        assert!(reports.claim(&report(at(all - 1)), &busy, 0).is_ok());
    }
}
