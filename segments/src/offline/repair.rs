//! Repair of a root: a plan that is printed, and the act that does exactly what was printed.
//!
//! Nothing that may be evidence is deleted: damaged files move to the quarantine. Only files under
//! `tmp/`, which never had a name, are removed. What a repair has done stands in a note below the
//! root ([`REPAIRS_PATH`]) before the first step, durably, and the node turns it into a record of its
//! audit log at the next start. So no repair is silent, one that a crash cut short included.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fsck::{CATALOG, MAY_BE_NEWEST};
use super::{FsckOptions, FsckReport, Offline, Progress, Remedy};
use crate::disk::{Disk, DiskError, DiskFault, DiskOp, OpenMode};
use crate::id::{DomainId, Sha256Hash};
use crate::ledger::{CeilingReached, Charge, Ledger};
use crate::limits::{MAX_REPAIR_NOTES, MAX_REPAIR_STEPS, MAX_REPAIRS_BYTES};
use crate::root::QUARANTINE;

/// Where repairs are noted, below the root.
pub const REPAIRS_PATH: &str = "state/repairs";
const LOCK: &str = "lock";

/// What one step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepairAction {
    /// Moves a file to the quarantine.
    Quarantine,
    /// Removes a file that was never published.
    Remove,
}

impl RepairAction {
    fn word(self) -> &'static str {
        match self {
            Self::Quarantine => "quarantine",
            Self::Remove => "remove",
        }
    }
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// From 1.
    pub number: usize,
    /// What is done.
    pub action: RepairAction,
    /// To which file, below the root.
    pub path: String,
    /// Where it goes, below the root; for what is removed: nowhere.
    pub to: Option<String>,
    /// The code of the finding.
    pub code: String,
    /// What the finding means.
    pub meaning: String,
    /// Which file it was when it was looked at.
    #[serde(skip)]
    ino: u64,
}

/// What a repair would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairPlan {
    /// In this order.
    pub steps: Vec<PlannedStep>,
    /// Findings beyond the limit of one repair: repair again.
    pub left_for_later: usize,
    /// Names exactly these steps on exactly these files.
    pub digest: Sha256Hash,
}

/// One repair, as it is noted below the root and later recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepairNote {
    /// The plan's digest.
    pub plan: Sha256Hash,
    /// When it was begun, by the clock of the machine.
    pub unix_ms: u64,
    /// Whether the last step was done; if not, some of the steps may not have been.
    pub complete: bool,
    /// The steps.
    pub steps: Vec<PlannedStep>,
}

/// What a repair has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// The plan that was carried out.
    pub plan: RepairPlan,
    /// Where it is noted for the node to record.
    pub note: &'static str,
}

/// Why nothing, or not all, was repaired.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RepairError {
    /// A node holds the root.
    #[error(
        "the root is in use by a running node; stop it first. Nothing was changed: the node itself \
         quarantines what it finds damaged"
    )]
    InUse,
    /// There is no lock file, so this is no root of a node, or its marker is gone.
    #[error(
        "there is no lock file: this is not the root of a node, or it was copied; start the node once"
    )]
    NoLock,
    /// The plan is another than the one that was agreed to.
    #[error("the plan is {found} by now and not {expected}; look at it again. Nothing was changed")]
    PlanChanged {
        /// The digest that was named.
        expected: Sha256Hash,
        /// The digest of the plan as it is now.
        found: Sha256Hash,
    },
    /// Nothing below the root may outgrow the ceiling, a note neither.
    #[error("no room to note the repair, so nothing was changed: {0}")]
    Ceiling(#[from] CeilingReached),
    /// The note of earlier repairs is damaged or full.
    #[error(
        "{REPAIRS_PATH} {0}; start the node, which records and removes it. Nothing was changed"
    )]
    Notes(&'static str),
    /// A file is another than the one that was looked at.
    #[error(
        "step {step}: {path} changed since it was looked at; the steps before were done and are \
         noted, the rest was not"
    )]
    Changed {
        /// The step.
        step: usize,
        /// The file.
        path: String,
    },
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Where a file goes, if that name is free.
fn quarantined(rel: &str) -> String {
    format!("{QUARANTINE}/{}", rel.replace('/', "-"))
}

impl RepairPlan {
    /// What to do about the findings of a check: one step a file.
    #[must_use]
    pub fn of(report: &FsckReport) -> Self {
        let mut steps: Vec<PlannedStep> = Vec::new();
        let mut left_for_later = 0;
        for finding in &report.findings {
            let action = match finding.repair {
                Remedy::Leave(_) => continue,
                Remedy::Quarantine | Remedy::Rebuild => RepairAction::Quarantine,
                Remedy::Remove => RepairAction::Remove,
            };
            if steps.iter().any(|step| step.path == finding.path) {
                continue;
            }
            if steps.len() >= MAX_REPAIR_STEPS {
                left_for_later += 1;
                continue;
            }
            steps.push(PlannedStep {
                number: steps.len() + 1,
                action,
                path: finding.path.clone(),
                to: (action == RepairAction::Quarantine).then(|| quarantined(&finding.path)),
                code: finding.code.to_owned(),
                meaning: finding.meaning.clone(),
                ino: finding.ino,
            });
        }
        // An index that lists what was moved away would lie; without it the node builds it again,
        // unless that could make it forget the newest segment of its own log.
        let moves_audit = steps
            .iter()
            .any(|step| step.path.starts_with("segments/audit/"));
        let doubtful = report
            .findings
            .iter()
            .any(|finding| finding.repair == Remedy::Leave(MAY_BE_NEWEST));
        if let Some(ino) = report.catalog_ino
            && moves_audit
            && !doubtful
            && !steps.iter().any(|step| step.path == CATALOG)
        {
            steps.push(PlannedStep {
                number: steps.len() + 1,
                action: RepairAction::Quarantine,
                path: CATALOG.to_owned(),
                to: Some(quarantined(CATALOG)),
                code: "index_outdated".to_owned(),
                meaning:
                    "it lists segments that the steps before move away; the node builds it again \
                          at its next start"
                        .to_owned(),
                ino,
            });
        }
        let mut lines = String::from("tidelock repair plan v1\n");
        for step in &steps {
            // Writing to a String cannot fail.
            let _ = writeln!(lines, "{} {} {}", step.action.word(), step.ino, step.path);
        }
        Self {
            steps,
            left_for_later,
            digest: Sha256Hash::of(lines.as_bytes()),
        }
    }
}

/// Repairs a root: takes its lock, checks it again, and does what the plan says, if it is the plan
/// that was agreed to. An empty plan does nothing and leaves no note.
///
/// # Errors
/// [`RepairError`], telling what was done where it is not all or nothing.
pub fn repair(
    disk: &dyn Disk,
    root: &Path,
    domain: &DomainId,
    options: &FsckOptions,
    agreed: Option<Sha256Hash>,
    unix_ms: u64,
    watch: &mut dyn FnMut(Progress),
) -> Result<Applied, RepairError> {
    let offline = Offline::open(disk, root, domain)?;
    let lock_path = offline.root.join(LOCK);
    match disk.stat(&lock_path) {
        Err(DiskError {
            fault: DiskFault::NotFound,
            ..
        }) => return Err(RepairError::NoLock),
        other => other?,
    };
    let lock = match disk.lock(&lock_path) {
        Err(DiskError {
            fault: DiskFault::Busy,
            ..
        }) => return Err(RepairError::InUse),
        other => other?,
    };
    let options = FsckOptions {
        in_use: false,
        ..options.clone()
    };
    let report = offline.fsck(&options, watch)?;
    let plan = RepairPlan::of(&report);
    if let Some(expected) = agreed
        && expected != plan.digest
    {
        return Err(RepairError::PlanChanged {
            expected,
            found: plan.digest,
        });
    }
    if !plan.steps.is_empty() {
        act(&offline, &plan, &report, unix_ms)?;
    }
    drop(lock);
    Ok(Applied {
        plan,
        note: REPAIRS_PATH,
    })
}

fn act(
    offline: &Offline<'_>,
    plan: &RepairPlan,
    report: &FsckReport,
    unix_ms: u64,
) -> Result<(), RepairError> {
    let mut notes = read_notes(offline)?;
    if notes.len() >= MAX_REPAIR_NOTES {
        return Err(RepairError::Notes("holds as many repairs as it may"));
    }
    notes.push(RepairNote {
        plan: plan.digest,
        unix_ms,
        complete: false,
        steps: plan.steps.clone(),
    });
    // INV-04: room is reserved before the first byte, also when nobody else writes.
    let ledger = Ledger::new(
        report.usage.ceiling_bytes,
        report.usage.reserve_bytes,
        report.usage.allocated_bytes,
    );
    let block = offline.disk.volume(&offline.root)?.block_bytes;
    let length = encode(&notes)?.len() as u64;
    // Twice the note, for the new one stands beside the old until renamed; and the directories that
    // get a name.
    let bound = length
        .next_multiple_of(block)
        .saturating_mul(2)
        .saturating_add(block.saturating_mul(16));
    let room = ledger.reserve(bound, Charge::Reserve)?;
    for dir in ["tmp", "state", QUARANTINE] {
        make_dir(offline, dir)?;
    }
    write_notes(offline, &notes)?;
    for step in &plan.steps {
        carry_out(offline, step)?;
    }
    if let Some(note) = notes.last_mut() {
        note.complete = true;
    }
    write_notes(offline, &notes)?;
    drop(room);
    Ok(())
}

fn make_dir(offline: &Offline<'_>, rel: &str) -> Result<(), DiskError> {
    match offline.disk.create_dir(&offline.root.join(rel)) {
        Ok(()) => offline.disk.sync_dir(&offline.root),
        Err(DiskError {
            fault: DiskFault::Exists,
            ..
        }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn carry_out(offline: &Offline<'_>, step: &PlannedStep) -> Result<(), RepairError> {
    let disk = offline.disk;
    let from = offline.root.join(&step.path);
    if super::still_there(disk.stat(&from))?.is_none_or(|stat| stat.ino != step.ino) {
        return Err(RepairError::Changed {
            step: step.number,
            path: step.path.clone(),
        });
    }
    match &step.to {
        None => disk.remove(&from)?,
        Some(to) => {
            let mut target = offline.root.join(to);
            let mut number = 1u32;
            let mut has_name = false;
            while let Some(stat) = super::still_there(disk.stat(&target))? {
                if stat.ino == step.ino {
                    has_name = true;
                    break;
                }
                target = offline.root.join(format!("{to}.{number}"));
                number = number.saturating_add(1);
            }
            if has_name {
                // A crash came between the two directories of an earlier move: it has both names.
                disk.remove(&from)?;
            } else {
                disk.rename(&from, &target)?;
            }
            disk.sync_dir(&offline.root.join(QUARANTINE))?;
        }
    }
    disk.sync_dir(from.parent().unwrap_or(&offline.root))?;
    Ok(())
}

fn encode(notes: &[RepairNote]) -> Result<Vec<u8>, RepairError> {
    let bytes = serde_json::to_vec(notes).map_err(|_| RepairError::Notes("cannot be written"))?;
    if bytes.len() as u64 > MAX_REPAIRS_BYTES {
        return Err(RepairError::Notes("would grow beyond its limit"));
    }
    Ok(bytes)
}

/// The repairs that the node has not recorded yet.
fn read_notes(offline: &Offline<'_>) -> Result<Vec<RepairNote>, RepairError> {
    match offline.read_file(REPAIRS_PATH, MAX_REPAIRS_BYTES)? {
        None => Ok(Vec::new()),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|_| RepairError::Notes("is damaged")),
    }
}

/// Replaces the note durably: after a crash it is the old or the new one.
fn write_notes(offline: &Offline<'_>, notes: &[RepairNote]) -> Result<(), RepairError> {
    let disk = offline.disk;
    let bytes = encode(notes)?;
    // A free name: what an earlier repair left there is a step of this one.
    let mut number = 0u32;
    let mut temp = offline.root.join("tmp/repairs-0");
    while super::still_there(disk.stat(&temp))?.is_some() {
        number = number.saturating_add(1);
        temp = offline.root.join(format!("tmp/repairs-{number}"));
    }
    let file = disk.open(&temp, OpenMode::CreateNew)?;
    file.write_at(0, &bytes)?;
    file.sync_data()?;
    drop(file);
    let to = offline.root.join(REPAIRS_PATH);
    disk.rename(&temp, &to)?;
    let dir = to
        .parent()
        .ok_or_else(|| DiskError::new(DiskOp::Rename, &to, DiskFault::NotPlain))?;
    disk.sync_dir(dir)?;
    Ok(())
}
