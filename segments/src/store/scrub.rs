//! The store's slow walks: every segment is read again from time to time (scrub), and every name under
//! the root is looked at for files that are not the node's (survey).

use std::time::Duration;

use serde::Serialize;

use super::{CHAIN_DIR, Change, RECEIPTS_DIR, Store, StoreError, id_of, kind_dir};
use crate::disk::{DiskError, DiskFault, FileKind};
use crate::format::SegmentRef;
use crate::id::{Kind, Origin, SegmentId};
use crate::ledger::Charge;
use crate::limits::{MAX_FOREIGN_PATHS, NAMES_AT_ONCE};
use crate::root::{RootError, is_ours, join};

/// What a segment is charged at least: opening it and checking its signature cost what reading so much does.
const SCRUB_CHARGE_MIN_BYTES: u64 = 64 << 10;
/// Names that one call of [`Store::scrub`] looks at beside its segments.
const NAMES_A_SCRUB: usize = 64;
/// Segments scrubbed until the place is written down.
const PLACE_KEPT_AFTER: u64 = 256;
/// Most directories waiting to be looked at; beyond, a foreign tree is counted by its top alone.
const MAX_DIRS_WAITING: usize = 1024;

/// What one call of [`Store::scrub`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ScrubReport {
    /// Segments read and verified.
    pub checked: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What they took of the budget.
    pub charged_bytes: u64,
    /// Segments that went to the quarantine.
    pub damaged: Vec<SegmentId>,
    /// Whether this call reached the end of the store; the next begins anew.
    pub wrapped: bool,
}

/// Files under the root that are not the node's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ForeignReport {
    /// Their allocated bytes, as the ledger counts them.
    pub bytes: u64,
    /// Up to 16 of their paths below the root.
    pub paths: Vec<String>,
    /// How often the whole root was looked at since the start.
    pub rounds: u64,
}

/// A bound for the rate of scrubbing: a token bucket in bytes. Time is given by the caller, from a
/// clock that does not step back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrubPace {
    bytes_per_second: u64,
    /// Bytes that may be read now; below zero after a segment that was larger than the budget.
    available: i64,
    refilled: Option<Duration>,
}

impl ScrubPace {
    /// At most this many bytes a second, on average over any second and one segment. 0 stops it.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            available: 0,
            refilled: None,
        }
    }

    /// The budget for a call of [`Store::scrub`] now; 0 means: not yet. Never more than a second's.
    pub fn budget_bytes(&mut self, now: Duration) -> u64 {
        let since = match self.refilled {
            Some(before) if now < before => return 0,
            Some(before) => now - before,
            None => Duration::ZERO,
        };
        let gained = u128::from(self.bytes_per_second) * since.as_micros() / 1_000_000;
        if gained > 0 || self.refilled.is_none() {
            // What a short time does not fill up to a byte is kept for the next call.
            self.refilled = Some(now);
        }
        let most = i64::try_from(self.bytes_per_second).unwrap_or(i64::MAX);
        let gained = i64::try_from(gained).unwrap_or(i64::MAX);
        self.available = self.available.saturating_add(gained).min(most);
        u64::try_from(self.available).unwrap_or(0)
    }

    /// Notes what a call of [`Store::scrub`] charged.
    pub fn spent(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.available = self.available.saturating_sub(bytes);
    }
}

/// Where the survey is.
#[derive(Debug, Default)]
pub(super) struct Survey {
    todo: Vec<String>,
    dir: Option<String>,
    /// Names of that directory that are still to be looked at, the next one last.
    names: Vec<String>,
    /// The last name of those, if there may be more.
    more_after: Option<String>,
    seen_bytes: u64,
    seen_paths: Vec<String>,
    report: ForeignReport,
}

impl Store {
    /// Reads and verifies segments, beginning where the last call ended, until the budget is used, of which
    /// each takes its size and 64 KiB at least, and looks at a few names for files that are not the node's. Where it goes on is kept across
    /// restarts, roughly.
    ///
    /// # Errors
    /// [`StoreError`] if the disk refuses otherwise than by damage.
    pub fn scrub(&self, budget_bytes: u64) -> Result<ScrubReport, StoreError> {
        let mut report = ScrubReport::default();
        if self.index().suspect.is_some() {
            let mut writer = self.writer();
            self.heal(&mut writer)?;
        }
        while report.charged_bytes < budget_bytes {
            let Some(next) = self.next_to_scrub() else {
                report.wrapped = true;
                break;
            };
            match self.get(&next.id) {
                Ok(_) => {}
                Err(StoreError::Damaged { .. }) => report.damaged.push(next.id),
                Err(StoreError::NotHeld(_)) => continue,
                Err(error) => return Err(error),
            }
            report.checked += 1;
            report.bytes = report.bytes.saturating_add(next.size_bytes);
            let charge = next.size_bytes.max(SCRUB_CHARGE_MIN_BYTES);
            report.charged_bytes = report.charged_bytes.saturating_add(charge);
        }
        if budget_bytes > 0 {
            self.survey(NAMES_A_SCRUB)?;
            self.keep_place()?;
        }
        Ok(report)
    }

    /// Writes the place down from time to time; without room or journal it is kept in memory only.
    fn keep_place(&self) -> Result<(), StoreError> {
        if self.index().scrubbed_since < PLACE_KEPT_AFTER {
            return Ok(());
        }
        let mut writer = self.writer();
        if writer.journal.is_some() && self.check_latch().is_ok() {
            match self.checkpoint(&mut writer) {
                Err(error) if !error.is_room() => {
                    self.latch_on(&error);
                    return Err(error);
                }
                Ok(()) | Err(_) => {}
            }
        }
        self.index().scrubbed_since = 0;
        Ok(())
    }

    /// The segment after the one that was scrubbed last; `None` once at the end.
    fn next_to_scrub(&self) -> Option<SegmentRef> {
        use std::ops::Bound::{Excluded, Unbounded};
        let mut index = self.index();
        if index.scrubbed.is_none() {
            let next = match index.scrubbed_small {
                None => index.small.iter().next(),
                Some(last) => index.small.range((Excluded(last), Unbounded)).next(),
            }
            .map(|(id, small)| (*id, small.reference.clone()));
            if let Some((id, reference)) = next {
                index.scrubbed_small = Some(id);
                return Some(reference);
            }
        }
        let after = index.scrubbed.clone();
        drop(index);
        // After the small kinds the audit follows from its begin.
        let next = self.list_after(Kind::Audit, after.as_ref(), 1).pop();
        let mut index = self.index();
        match &next {
            Some(next) => {
                index.scrubbed = Some((next.origin.clone(), next.sequence));
                index.scrubbed_since = index.scrubbed_since.saturating_add(1);
            }
            None => {
                index.scrubbed = None;
                index.scrubbed_small = None;
            }
        }
        next
    }

    /// Looks at up to `max` names under the root, beginning where the last call ended; `true` when
    /// everything was looked at once more. Foreign files are counted in the ledger, and given back
    /// when they are gone; a segment's file that the index does not know is taken in if it is good, and
    /// put into the quarantine if not.
    ///
    /// # Errors
    /// [`StoreError`] if the disk refuses.
    pub fn survey(&self, max: usize) -> Result<bool, StoreError> {
        let mut survey = self
            .survey
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let survey = &mut *survey;
        for _ in 0..max {
            if survey.names.is_empty() && !self.fill_names(survey)? {
                self.end_round(survey)?;
                return Ok(true);
            }
            let (Some(name), Some(dir)) = (survey.names.pop(), &survey.dir) else {
                continue;
            };
            let rel = join(dir, &name);
            self.look(survey, rel)?;
            let ledger = self.root.ledger();
            if survey.seen_bytes > ledger.usage().foreign_bytes {
                // More is known at once; less only when everything was seen.
                ledger.set_foreign(survey.seen_bytes);
                survey.report.bytes = survey.seen_bytes;
            }
        }
        Ok(false)
    }

    /// What the survey found.
    #[must_use]
    pub fn foreign(&self) -> ForeignReport {
        let survey = self
            .survey
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        ForeignReport {
            bytes: self.root.ledger().usage().foreign_bytes,
            ..survey.report.clone()
        }
    }

    /// More names to look at; `false` when there are none left in this round.
    fn fill_names(&self, survey: &mut Survey) -> Result<bool, StoreError> {
        loop {
            let after = survey.more_after.take();
            if after.is_none() {
                let first = survey.dir.is_none() && survey.todo.is_empty();
                survey.dir = if first {
                    Some(String::new())
                } else {
                    survey.todo.pop()
                };
            }
            let Some(dir) = &survey.dir else {
                return Ok(false);
            };
            let path = self.root.path().join(dir);
            let disk = self.root.disk();
            let names = match disk.read_dir_after(&path, after.as_deref(), NAMES_AT_ONCE) {
                Ok(names) => names,
                // Gone since, or not ours to read.
                Err(DiskError {
                    fault: DiskFault::NotFound | DiskFault::Denied | DiskFault::NotPlain,
                    ..
                }) => Vec::new(),
                Err(error) => return Err(RootError::Disk(error).into()),
            };
            if names.len() == NAMES_AT_ONCE {
                survey.more_after = names.last().cloned();
            }
            survey.names = names;
            survey.names.reverse();
            if !survey.names.is_empty() {
                return Ok(true);
            }
            if survey.todo.is_empty() {
                return Ok(false);
            }
        }
    }

    fn end_round(&self, survey: &mut Survey) -> Result<(), StoreError> {
        let bytes = std::mem::take(&mut survey.seen_bytes);
        let paths = std::mem::take(&mut survey.seen_paths);
        if bytes != survey.report.bytes || paths != survey.report.paths {
            tracing::warn!(
                bytes,
                ?paths,
                "files under the root that are not the node's; they count to the ceiling"
            );
        }
        survey.dir = None;
        survey.report.bytes = bytes;
        survey.report.paths = paths;
        survey.report.rounds = survey.report.rounds.saturating_add(1);
        self.root.ledger().set_foreign(bytes);
        self.root.tend_ballast();
        let mut writer = self.writer();
        if writer.journal.is_none() && self.check_latch().is_ok() {
            self.write_anew(&mut writer)?;
        }
        Ok(())
    }

    /// Looks at one name.
    fn look(&self, survey: &mut Survey, rel: String) -> Result<(), StoreError> {
        let stat = match self.root.disk().stat(&self.root.path().join(&rel)) {
            Ok(stat) => stat,
            // Gone since it was listed, or a name that is no text.
            Err(DiskError {
                fault: DiskFault::NotFound | DiskFault::NotPlain,
                ..
            }) => return Ok(()),
            Err(error) => return Err(RootError::Disk(error).into()),
        };
        let ours = is_ours(&rel, stat.kind) && !self.is_stray(&rel, stat.allocated_bytes)?;
        if !ours {
            survey.seen_bytes = survey.seen_bytes.saturating_add(stat.allocated_bytes);
            if survey.seen_paths.len() < MAX_FOREIGN_PATHS {
                survey.seen_paths.push(rel.clone());
            }
        }
        if stat.kind == FileKind::Dir && survey.todo.len() < MAX_DIRS_WAITING {
            survey.todo.push(rel);
        }
        Ok(())
    }

    /// Sees to a file that has a name of ours but that nothing knows. `true` if it stays and is
    /// foreign.
    fn is_stray(&self, rel: &str, bytes: u64) -> Result<bool, StoreError> {
        let Some((dir, name)) = rel.rsplit_once('/') else {
            return Ok(false);
        };
        let audit = kind_dir(Kind::Audit);
        if dir == audit
            && let Some(id) = id_of(name, ".seg")
        {
            if self.locate_audit(&id).is_none() {
                self.adopt(&id, rel, bytes)?;
            }
        } else if dir == RECEIPTS_DIR
            && let Some(id) = id_of(name, ".rcpts")
        {
            if self.locate_audit(&id).is_none() {
                let _writer = self.writer();
                if self.locate_audit(&id).is_none() {
                    tracing::warn!(rel, "receipts of no segment are removed");
                    self.root.unlink(rel, 0, Charge::Normal)?;
                }
            }
        } else if dir == CHAIN_DIR {
            let _writer = self.writer();
            if !self.index().knows_page(name) {
                tracing::warn!(rel, "a page of no log is removed from the index");
                self.root.unlink(rel, 0, Charge::Normal)?;
            }
        } else if dir.starts_with("segments/")
            && let Some(id) = id_of(name, ".seg")
        {
            let index = self.index();
            return Ok(!index.small.contains_key(&id) && !index.under_way.contains(&id));
        }
        Ok(false)
    }

    /// Takes in a good audit segment that lies in its place and is not in the index: an announcement
    /// of it was lost to damage, or somebody put it there.
    pub(super) fn adopt(&self, id: &SegmentId, rel: &str, bytes: u64) -> Result<(), StoreError> {
        let mut writer = self.writer();
        if self.locate_audit(id).is_some()
            || writer.doubtful.contains(id)
            || self.check_latch().is_err()
        {
            return Ok(());
        }
        let checked = self
            .read(rel, *id)
            .and_then(|_| self.peek(rel, Kind::Audit, *id));
        let mut reason = match &checked {
            Ok(_) => None,
            Err(StoreError::Damaged { reason, .. }) => Some(reason.clone()),
            Err(_) => return checked.map(|_| ()),
        };
        if let Ok(peeked) = &checked {
            let reference = peeked.reference(*id);
            let (origin, sequence) = (reference.origin.clone(), reference.sequence);
            let forks = self.check_fork(&mut self.index(), &reference);
            match (forks, peeked.entry(*id)) {
                (Ok(()), Some(entry)) => {
                    self.announce(&mut writer, &[announcement(&origin, sequence, entry)])?;
                    let mut index = self.index();
                    index.ready_page(&self.root, &origin, sequence, &mut writer.spare, false)?;
                    index.write(&self.root, &origin, sequence, &entry);
                    index.add(&origin, sequence, &entry);
                    let account = index.log(&origin).account;
                    self.root.ledger().found(entry.allocated, account);
                    tracing::warn!(%id, %origin, sequence, "a segment that no index knew is taken in");
                    drop(index);
                    self.note().orphans += 1;
                }
                (Err(fork), _) => reason = Some(fork.to_string()),
                (Ok(()), None) => reason = Some("it is no audit segment".to_owned()),
            }
        }
        if let Some(reason) = reason {
            self.root.ledger().found(bytes, Charge::Normal);
            self.put_aside(rel, id, &reason)?;
        }
        Ok(())
    }
}

fn announcement(origin: &Origin, sequence: u64, entry: super::ChainEntry) -> Change {
    Change {
        origin: origin.clone(),
        sequence,
        before: None,
        after: Some(entry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_over_any_time() {
        let mut pace = ScrubPace::new(1000);
        let at = Duration::from_millis;
        assert_eq!(pace.budget_bytes(at(0)), 0);
        assert_eq!(pace.budget_bytes(at(500)), 500);
        pace.spent(200);
        assert_eq!(pace.budget_bytes(at(500)), 300);
        // Never more than a second's worth is saved up.
        assert_eq!(pace.budget_bytes(at(100_000)), 1000);
        // A large segment is paid off before the next.
        pace.spent(5000);
        assert_eq!(pace.budget_bytes(at(103_000)), 0);
        assert_eq!(pace.budget_bytes(at(104_500)), 500);
        // A clock that steps back gives nothing.
        assert_eq!(pace.budget_bytes(at(50_000)), 0);
        assert_eq!(pace.budget_bytes(at(104_600)), 600);
        let mut total = 0;
        let mut pace = ScrubPace::new(1_000_000);
        for ms in 0..=10_000 {
            let budget = pace.budget_bytes(at(ms));
            pace.spent(budget);
            total += budget;
        }
        assert_eq!(total, 10_000_000);
        let mut stopped = ScrubPace::new(0);
        assert_eq!(stopped.budget_bytes(at(1_000_000)), 0);
    }
}
