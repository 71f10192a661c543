//! The check of a whole root: every file is either known and good, or a finding.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{ATTEMPTS, Offline, OwnLog, Progress, Source, kind_dir, receipts_name, segment_id};
use crate::disk::{DiskError, FileKind, FileStat};
use crate::id::{Kind, NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::Endorsement;
use crate::ledger::{Charge, Ladder, Ledger, Usage};
use crate::limits::{MAX_ENDORSEMENT_BYTES, MAX_STATE_FILE_BYTES};
use crate::receipt::CustodyReceipt;
use crate::root::{BULK_DIRS, QUARANTINE, is_ours};
use crate::store::receipts::{self, MAX_RECEIPTS_FILE_BYTES};
use crate::store::{RECEIPTS_DIR, Unusable, load_index};
use crate::verify::{
    self, AuditFault, AuditReport, VerifyOptions, VerifyProgress, verify_and_list,
};

/// State files of the form `{"check", "value"}`.
const CHECKED_FILES: [&str; 4] = [
    "clock",
    "revocation/keys",
    "state/accepted-logs",
    "state/quotas",
];
const PARTIAL_DIR: &str = "partial/";
/// Without it the node builds its index again.
pub(super) const CATALOG: &str = "index/catalog";

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something that was written is lost, changed or contradicts something else.
    Damage,
    /// What a crash left behind; it takes room and does no harm.
    Leftover,
    /// Nobody of ours made it so.
    Foreign,
    /// Worth knowing.
    Note,
}

/// The sequences held of every log: inclusive ranges, ascending.
type Sequences = BTreeMap<Origin, Vec<(u64, u64)>>;

/// What repair would do about a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing; the text says who does, or why nobody may.
    Leave(&'static str),
    /// Move the file to the quarantine.
    Quarantine,
    /// Remove a file that was never published.
    Remove,
    /// Remove what can be computed again from the segments, so that the node does.
    Rebuild,
}

impl Remedy {
    /// One word and what it stands for.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Leave(why) => format!("nothing: {why}"),
            Self::Quarantine => "move it to the quarantine".to_owned(),
            Self::Remove => "remove it".to_owned(),
            Self::Rebuild => {
                "move it to the quarantine; the node builds it again at its next start".to_owned()
            }
        }
    }
}

impl Serialize for Remedy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text())
    }
}

/// One thing that is not as it should be, or worth knowing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable word for scripts.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// The file, below the root; empty where no single file is meant.
    pub path: String,
    /// What the file system allocates to it.
    pub allocated_bytes: u64,
    /// Its permission bits, octal; empty where no file is meant.
    pub mode: String,
    /// The user it belongs to.
    pub uid: Option<u32>,
    /// What it means.
    pub meaning: String,
    /// What repair would do.
    pub repair: Remedy,
    #[serde(skip)]
    pub(super) ino: u64,
}

/// What the check needs to know of the node whose root it is.
#[derive(Debug, Clone)]
pub struct FsckOptions {
    /// The node, by its config.
    pub node_id: NodeId,
    /// The ceiling, by its config.
    pub ceiling_bytes: u64,
    /// The part of it kept for urgent and state writes.
    pub reserve_bytes: u64,
    /// The share of audit held for others.
    pub custody_max_bytes: u64,
    /// Names below the root that are the node's although no file of its store: its socket.
    pub known: Vec<String>,
    /// Whether some process holds the root now: then `tmp/` is in use.
    pub in_use: bool,
}

/// What lies in one area of the root.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usages {
    /// Files, directories included.
    pub files: u64,
    /// What the file system allocates to them.
    pub allocated_bytes: u64,
}

/// The whole check.
#[derive(Debug, Clone, Serialize)]
pub struct FsckReport {
    /// Whether nothing is damaged.
    pub ok: bool,
    /// Everything that was found, worst first, then by path.
    pub findings: Vec<Finding>,
    /// Segments that were read, all kinds.
    pub segments: u64,
    /// Audit records verified, unread ones included.
    pub records: u64,
    /// Of them, records that are encrypted and were not read for want of a key.
    pub unread_records: u64,
    /// What lies where: by first component, `foreign` for what is nobody's.
    pub areas: BTreeMap<String, Usages>,
    /// The ledger's arithmetic as the node would do it at start.
    pub usage: Usage,
    /// The state of the ladder that follows.
    pub ladder: Ladder,
    #[serde(skip)]
    pub(super) catalog_ino: Option<u64>,
}

/// One name below the root.
struct Entry {
    rel: String,
    stat: FileStat,
}

/// Whether the node gives files of its own this name.
fn is_known(rel: &str, stat: &FileStat, known: &[String]) -> bool {
    rel.is_empty() || known.iter().any(|name| name == rel) || is_ours(rel, stat.kind)
}

/// The endings of what claims that some of a partial segment is there.
const CLAIMS: [&str; 2] = ["map", "note"];

/// The id in the name of a partial segment, its map or its notes.
fn partial_name(name: &str) -> Option<SegmentId> {
    let (hex, ending) = name.split_once('.')?;
    let is_known = ending == "part" || CLAIMS.contains(&ending);
    SegmentId::from_hex(hex).ok().filter(|_| is_known)
}

impl Entry {
    fn finding(
        &self,
        code: &'static str,
        severity: Severity,
        meaning: impl Into<String>,
        repair: Remedy,
    ) -> Finding {
        Finding {
            code,
            severity,
            path: self.rel.clone(),
            allocated_bytes: self.stat.allocated_bytes,
            mode: format!("{:04o}", self.stat.mode),
            uid: Some(self.stat.uid),
            meaning: meaning.into(),
            repair,
            ino: self.stat.ino,
        }
    }
}

/// A finding about a file whose entry may not have been listed, or about no file.
fn about(
    code: &'static str,
    severity: Severity,
    path: &str,
    meaning: impl Into<String>,
    repair: Remedy,
) -> Finding {
    Finding {
        code,
        severity,
        path: path.to_owned(),
        allocated_bytes: 0,
        mode: String::new(),
        uid: None,
        meaning: meaning.into(),
        repair,
        ino: 0,
    }
}

impl Offline<'_> {
    /// Checks everything below the root, reading every segment once.
    ///
    /// # Errors
    /// [`DiskError`] if the root cannot be read. Damage is no error but part of the report.
    pub fn fsck(
        &self,
        options: &FsckOptions,
        watch: &mut dyn FnMut(Progress),
    ) -> Result<FsckReport, DiskError> {
        let mut progress = |of: VerifyProgress| watch(of.into());
        let verify = VerifyOptions {
            keys: self.keys(),
            seen: &[],
            progress: Some(&mut progress),
            only: None,
        };
        let (audit, held) = verify_and_list(self.disk, &self.root, &self.domain, verify)?;
        let own = self.own_log().ok().flatten();
        let entries = self.walk(false)?;
        let mut findings = Vec::new();
        self.audit_findings(&audit, own.as_ref(), &entries, &mut findings);
        let others = self.other_segments(&entries, &mut findings)?;
        self.receipt_findings(&entries, &mut findings)?;
        self.state_findings(&entries, options, own.is_some(), &mut findings)?;
        self.index_findings(&entries, &held, &mut findings)?;
        place_findings(&entries, options, &mut findings);
        partial_findings(&entries, &mut findings);
        let findings = self.seen_again(findings)?;
        let catalog = entries.iter().find(|entry| entry.rel == CATALOG);
        let catalog_ino = catalog.map(|entry| entry.stat.ino);
        let custody_bytes = self.custody_bytes(&entries, held, options)?;
        let usage = ledger(allocated(&entries), custody_bytes, options);
        let ladder = usage.ladder();
        let usage = usage.usage();
        let mut report = FsckReport {
            ok: true,
            findings,
            segments: others + audit.origins.iter().map(|o| o.segments).sum::<u64>(),
            records: audit.origins.iter().map(|o| o.records).sum(),
            unread_records: audit.origins.iter().map(|o| o.unread_records).sum(),
            areas: areas(&entries, &options.known),
            usage,
            ladder,
            catalog_ino,
        };
        if usage.allocated_bytes > options.ceiling_bytes {
            report.findings.push(about(
                "over_ceiling",
                Severity::Note,
                "",
                format!(
                    "{} bytes are allocated below the root, the ceiling is {}: the node starts sealed \
                     and does not grow",
                    usage.allocated_bytes, options.ceiling_bytes
                ),
                Remedy::Leave("raise node.ceiling_bytes, or remove foreign files"),
            ));
        }
        report
            .findings
            .sort_by(|a, b| (a.severity, &a.path, a.code).cmp(&(b.severity, &b.path, b.code)));
        report.ok = report
            .findings
            .iter()
            .all(|finding| finding.severity != Severity::Damage);
        Ok(report)
    }

    /// The ledger's figures and the state of the ladder, as the node would begin with them: by its
    /// index, as it does itself, or without one by a look at every file.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn usage_of(&self, options: &FsckOptions) -> Result<(Usage, Ladder), DiskError> {
        let index = load_index(self.disk, &self.root).ok();
        let ledger = match index.filter(|index| *index.domain() == self.domain) {
            Some(index) => {
                let others = allocated(&self.walk(true)?);
                let custody_bytes = index.custody_bytes(&options.node_id);
                ledger(
                    others.saturating_add(index.bulk_bytes),
                    custody_bytes,
                    options,
                )
            }
            None => {
                let entries = self.walk(false)?;
                let custody_bytes = self.custody_bytes(&entries, None, options)?;
                ledger(allocated(&entries), custody_bytes, options)
            }
        };
        Ok((ledger.usage(), ledger.ladder()))
    }

    /// What is allocated to audit of other nodes. Without a list of what is held, by the headers.
    fn custody_bytes(
        &self,
        entries: &[Entry],
        held: verify::Held,
        options: &FsckOptions,
    ) -> Result<u64, DiskError> {
        let own = options.node_id.as_str();
        let mut sum = 0u64;
        let Some(held) = held else {
            self.audit_segments(Source::Headers, &mut |held, _| {
                if held.reference.origin.audit_node() != Some(own) {
                    sum = sum.saturating_add(held.allocated_bytes);
                }
            })?;
            return Ok(sum);
        };
        let mut ids: Vec<SegmentId> = held
            .into_iter()
            .filter(|(origin, _)| origin.audit_node() != Some(own))
            .flat_map(|(_, log)| log.ids)
            .collect();
        ids.sort_unstable();
        for entry in entries {
            let id = entry
                .rel
                .strip_prefix("segments/audit/")
                .and_then(segment_id);
            if id.is_some_and(|id| ids.binary_search(&id).is_ok()) {
                sum = sum.saturating_add(entry.stat.allocated_bytes);
            }
        }
        Ok(sum)
    }

    /// Everything below the root, directories before what is in them; without the files of the directories
    /// that grow with the store if so asked.
    fn walk(&self, without_bulk: bool) -> Result<Vec<Entry>, DiskError> {
        let mut entries = vec![Entry {
            rel: String::new(),
            stat: self.disk.stat(&self.root)?,
        }];
        let mut todo = vec![String::new()];
        while let Some(dir) = todo.pop() {
            if without_bulk && BULK_DIRS.contains(&dir.as_str()) {
                continue;
            }
            for name in self.list(&dir)? {
                let rel = if dir.is_empty() {
                    name
                } else {
                    format!("{dir}/{name}")
                };
                let Some(stat) = super::still_there(self.disk.stat(&self.root.join(&rel)))? else {
                    continue;
                };
                if stat.kind == FileKind::Dir {
                    todo.push(rel.clone());
                }
                entries.push(Entry { rel, stat });
            }
        }
        Ok(entries)
    }

    fn audit_findings(
        &self,
        audit: &AuditReport,
        own: Option<&OwnLog>,
        entries: &[Entry],
        findings: &mut Vec<Finding>,
    ) {
        for fault in &audit.faults {
            findings.push(self.audit_finding(fault, None, own, entries));
        }
        for report in &audit.origins {
            for fault in &report.faults {
                findings.push(self.audit_finding(fault, Some(&report.origin), own, entries));
            }
            if report.torn_bytes > 0 {
                findings.push(about(
                    "log_torn_tail",
                    Severity::Note,
                    "",
                    format!(
                        "{}: {} bytes after the last whole record: a write under way, or one that a \
                         crash cut off before anybody was told of it",
                        report.origin, report.torn_bytes
                    ),
                    Remedy::Leave("the node cuts it off at its next start and records that"),
                ));
            }
        }
    }

    fn audit_finding(
        &self,
        fault: &AuditFault,
        log: Option<&Origin>,
        own: Option<&OwnLog>,
        entries: &[Entry],
    ) -> Finding {
        const JUDGED_BY_THE_NODE: Remedy = Remedy::Leave(
            "the node itself moves it to the quarantine at its next start, and begins a new \
             incarnation before it signs anything",
        );
        let (code, path, repair) = match fault {
            AuditFault::Segment { file, .. } => (
                "segment_damaged",
                file.as_str(),
                self.segment_remedy(file, own),
            ),
            AuditFault::Link { .. } => ("log_link", "", Remedy::Leave(CONTRADICTION)),
            AuditFault::Fork { .. } => ("log_fork", "", Remedy::Leave(CONTRADICTION)),
            AuditFault::Contradicts { .. } => ("log_contradicts", "", Remedy::Leave(CONTRADICTION)),
            AuditFault::Tree { .. } => ("log_tree", "", Remedy::Leave(CONTRADICTION)),
            AuditFault::Missing { .. } => (
                "log_missing",
                "",
                Remedy::Leave("what is gone cannot be made again; a custodian may hold it"),
            ),
            AuditFault::Active { file, .. } => {
                ("log_file_damaged", file.as_str(), JUDGED_BY_THE_NODE)
            }
            AuditFault::State { file } => ("log_state_damaged", file.as_str(), JUDGED_BY_THE_NODE),
        };
        let meaning = match log {
            None => fault.to_string(),
            Some(log) => format!("{log}: {fault}"),
        };
        match entries
            .iter()
            .find(|entry| !path.is_empty() && entry.rel == path)
        {
            Some(entry) => entry.finding(code, Severity::Damage, meaning, repair),
            None => about(code, Severity::Damage, path, meaning, repair),
        }
    }

    /// A damaged segment goes to the quarantine, unless the log may still have to account for its
    /// place: as long as neither the state file nor an open log file says that a later sequence has
    /// begun, a node that does not see it would sign the same indexes again. Then only the node,
    /// which begins a new incarnation over it, may judge.
    fn segment_remedy(&self, file: &str, own: Option<&OwnLog>) -> Remedy {
        const NEWEST: Remedy = Remedy::Leave(MAY_BE_NEWEST);
        let id = file.rsplit_once('/').and_then(|(_, name)| segment_id(name));
        let (Some(own), Some(id)) = (own, id) else {
            return NEWEST;
        };
        let begun = self
            .log_bytes(&own.origin)
            .unwrap_or_default()
            .last()
            .map(|(_, header, _)| header.sequence);
        match self.describe(Kind::Audit, &id) {
            Ok(Some(info))
                if info.reference.origin != own.origin
                    || info.reference.sequence < own.sealed_below =>
            {
                Remedy::Quarantine
            }
            _ if begun.is_some() => Remedy::Quarantine,
            _ => NEWEST,
        }
    }

    /// Segments of the kinds that are no audit. Answers how many were read.
    fn other_segments(
        &self,
        entries: &[Entry],
        findings: &mut Vec<Finding>,
    ) -> Result<u64, DiskError> {
        let mut read = 0;
        for entry in entries.iter().filter(|e| e.stat.kind == FileKind::File) {
            let Some((dir, name)) = entry.rel.rsplit_once('/') else {
                continue;
            };
            let kind = Kind::ALL.into_iter().find(|kind| dir == kind_dir(*kind));
            let (Some(kind), Some(id)) = (kind, segment_id(name)) else {
                continue;
            };
            if kind == Kind::Audit {
                continue;
            }
            read += 1;
            if let Err(error) = self.read(kind, &id) {
                findings.push(entry.finding(
                    "segment_damaged",
                    Severity::Damage,
                    format!("{error}"),
                    Remedy::Quarantine,
                ));
            }
        }
        Ok(read)
    }

    fn receipt_findings(
        &self,
        entries: &[Entry],
        findings: &mut Vec<Finding>,
    ) -> Result<(), DiskError> {
        for entry in entries {
            let Some((RECEIPTS_DIR, name)) = entry.rel.rsplit_once('/') else {
                continue;
            };
            let Some(id) = receipts_name(name) else {
                continue;
            };
            let Some(bytes) = self.read_file(&entry.rel, MAX_RECEIPTS_FILE_BYTES)? else {
                continue;
            };
            let Some(info) = self.describe(Kind::Audit, &id).unwrap_or_default() else {
                if self.kind_of(&id)?.is_none() {
                    findings.push(entry.finding(
                        "receipt_orphaned",
                        Severity::Leftover,
                        format!("a custody receipt for {id}, which is not held"),
                        Remedy::Quarantine,
                    ));
                }
                continue;
            };
            let held = receipts::decode(&bytes);
            // Damaged ones are not decoded, so the good ones alone would be another file.
            let whole = receipts::encode(&held).is_ok_and(|again| again == bytes);
            let damaged = (!whole).then(|| "a receipt in it is damaged".to_owned());
            let fault_of = |receipt: &CustodyReceipt| {
                let fits = receipt.segment_id == id
                    && receipt.domain == self.domain
                    && receipt.origin == info.reference.origin
                    && info.span.is_some_and(|span| {
                        (span.first, span.last, span.root)
                            == (receipt.first, receipt.last, receipt.root_at_last)
                    });
                match receipt.verify_signature() {
                    Err(error) => Some(error.to_string()),
                    Ok(()) if !fits => Some(format!(
                        "the receipt of {} fits another segment, range or root",
                        receipt.custodian
                    )),
                    Ok(()) => None,
                }
            };
            let faulty = damaged.or_else(|| held.iter().find_map(fault_of));
            let repair = if held.iter().any(|receipt| fault_of(receipt).is_none()) {
                Remedy::Leave(
                    "the others in it are good and count; the file is written anew with the next",
                )
            } else {
                Remedy::Quarantine
            };
            if let Some(why) = faulty {
                findings.push(entry.finding(
                    "receipt_damaged",
                    Severity::Damage,
                    format!("{why}; it licenses nothing"),
                    repair,
                ));
            }
        }
        Ok(())
    }

    /// The sequences of every log by the headers of its files: inclusive ranges, ascending. `None` if
    /// there is a file that cannot be told to be of any log.
    fn sequences(&self) -> Result<Option<Sequences>, DiskError> {
        let mut all: BTreeMap<Origin, BTreeSet<u64>> = BTreeMap::new();
        for id in self.segment_ids(Kind::Audit)? {
            match self.describe(Kind::Audit, &id) {
                Ok(Some(info)) => {
                    let reference = info.reference;
                    all.entry(reference.origin)
                        .or_default()
                        .insert(reference.sequence);
                }
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
        }
        let ranges = |sequences: BTreeSet<u64>| {
            let mut ranges: Vec<(u64, u64)> = Vec::new();
            for sequence in sequences {
                verify::push_sequence(&mut ranges, sequence);
            }
            ranges
        };
        Ok(Some(
            all.into_iter()
                .map(|(origin, sequences)| (origin, ranges(sequences)))
                .collect(),
        ))
    }

    /// The store's index against the files that it is about. While a node runs both move, so they are
    /// compared until they agree or have been looked at often enough.
    fn index_findings(
        &self,
        entries: &[Entry],
        held: &verify::Held,
        findings: &mut Vec<Finding>,
    ) -> Result<(), DiskError> {
        let Some(catalog) = entries.iter().find(|entry| entry.rel == CATALOG) else {
            return Ok(());
        };
        let mut last = None;
        // What was verified a moment ago, to begin with; what does not fit may have changed since.
        let mut verified = held.as_ref().map(|held| {
            held.iter()
                .map(|(origin, log)| (origin.clone(), log.sequences.clone()))
                .collect()
        });
        for _ in 0..ATTEMPTS {
            let index = load_index(self.disk, &self.root).map(|loaded| loaded.held());
            // A damaged segment explains why they differ. Building the index anew over it would make
            // the node forget that its place is taken.
            let files = match verified.take() {
                Some(files) => Some(files),
                None => self.sequences()?,
            };
            let Some(files) = files else {
                return Ok(());
            };
            last = match index {
                Ok(index) if index == files => return Ok(()),
                Err(Unusable::Missing) => return Ok(()),
                Err(Unusable::Damaged(why)) => Some(("index_damaged", why)),
                Ok(index) => {
                    let differs = index
                        .keys()
                        .chain(files.keys())
                        .find(|origin| index.get(*origin) != files.get(*origin));
                    differs.map(|origin| {
                        let text = |of: &Sequences| {
                            format!("{:?}", of.get(origin).map_or(&[][..], Vec::as_slice))
                        };
                        (
                            "index_disagrees",
                            format!(
                                "of {origin} it lists the sequences {}, the files have {}",
                                text(&index),
                                text(&files)
                            ),
                        )
                    })
                }
            };
        }
        if let Some((code, why)) = last {
            findings.push(catalog.finding(code, Severity::Damage, why, Remedy::Rebuild));
        }
        Ok(())
    }

    fn state_findings(
        &self,
        entries: &[Entry],
        options: &FsckOptions,
        has_log: bool,
        findings: &mut Vec<Finding>,
    ) -> Result<(), DiskError> {
        let entry = |rel: &str| entries.iter().find(|entry| entry.rel == rel);
        let claim = format!("{} of domain {}\n", options.node_id, self.domain);
        if let Some(found) = entry("owner") {
            let bytes = self.read_file("owner", MAX_STATE_FILE_BYTES)?;
            if bytes.is_some_and(|bytes| bytes != claim.as_bytes()) {
                findings.push(found.finding(
                    "owner_other",
                    Severity::Damage,
                    format!(
                        "it does not say `{}`: the root is another node's",
                        claim.trim()
                    ),
                    Remedy::Leave("mend node.id and node.domain, or choose another root"),
                ));
            }
        }
        for rel in CHECKED_FILES {
            let Some(found) = entry(rel) else { continue };
            let bytes = self.read_file(rel, MAX_STATE_FILE_BYTES)?;
            if bytes.is_some_and(|bytes| !passes_its_check(&bytes)) {
                findings.push(found.finding(
                    "state_file_damaged",
                    Severity::Damage,
                    "its check does not match its value",
                    Remedy::Leave(
                        "the node does not use it, records state_damaged at its next start and \
                         writes it anew; gone without a word it would be worse",
                    ),
                ));
            }
        }
        if let Some(found) = entry("keys/endorsement") {
            let bytes = self.read_file("keys/endorsement", MAX_ENDORSEMENT_BYTES as u64)?;
            if bytes.is_some_and(|bytes| Endorsement::decode(&bytes).is_err()) {
                findings.push(found.finding(
                    "endorsement_damaged",
                    Severity::Damage,
                    "it is no endorsement; the node makes a new one from its certificate",
                    Remedy::Quarantine,
                ));
            }
        }
        if has_log && entry("keys/log.pk8").is_none() {
            findings.push(about(
                "log_key_missing",
                Severity::Damage,
                "keys/log.pk8",
                "there is a log and not the key that signs it",
                Remedy::Leave("the node makes a new key and begins a new incarnation"),
            ));
        }
        if entry("lock").is_none() {
            findings.push(about(
                "lock_missing",
                Severity::Damage,
                "lock",
                "the file that marks the place of this root is gone",
                Remedy::Leave(
                    "the node makes it again and begins a new incarnation, as after a copy",
                ),
            ));
        }
        if entry("policy/active").is_none() {
            findings.push(about(
                "policy_absent",
                Severity::Note,
                "policy/active",
                "no bundle is active: every action is denied NO_POLICY",
                Remedy::Leave("tidelock bundle install, or contact with a peer"),
            ));
        }
        if entry(super::REPAIRS_PATH).is_some() {
            findings.push(about(
                "repair_unrecorded",
                Severity::Note,
                super::REPAIRS_PATH,
                "a repair was made here that the audit log does not tell of yet",
                Remedy::Leave("the node records it at its next start"),
            ));
        }
        Ok(())
    }

    /// Leaves out what was only passing: files that are gone or another by now.
    fn seen_again(&self, findings: Vec<Finding>) -> Result<Vec<Finding>, DiskError> {
        let mut kept = Vec::with_capacity(findings.len());
        for finding in findings {
            let passing = finding.ino != 0 && finding.severity != Severity::Note && {
                let path = self.root.join(&finding.path);
                super::still_there(self.disk.stat(&path))?
                    .is_none_or(|stat| stat.ino != finding.ino)
            };
            if !passing {
                kept.push(finding);
            }
        }
        Ok(kept)
    }
}

fn allocated(entries: &[Entry]) -> u64 {
    entries
        .iter()
        .map(|entry| entry.stat.allocated_bytes)
        .fold(0, u64::saturating_add)
}

/// The ledger as the node would begin with it.
fn ledger(allocated_bytes: u64, custody_bytes: u64, options: &FsckOptions) -> Arc<Ledger> {
    let ledger = Ledger::new(options.ceiling_bytes, options.reserve_bytes, 0);
    ledger.set_custody_max(options.custody_max_bytes);
    ledger.found(custody_bytes, Charge::Custody);
    ledger.found(
        allocated_bytes.saturating_sub(custody_bytes),
        Charge::Normal,
    );
    ledger
}

pub(super) const MAY_BE_NEWEST: &str =
    "it may be the newest of the own log; the node judges it at its next start";
const CONTRADICTION: &str = "both are evidence; an operator has to look at them";

/// Whether `{"check": "sha256:…", "value": …}` holds the SHA-256 of its value's bytes.
fn passes_its_check(bytes: &[u8]) -> bool {
    const VALUE: &[u8] = b",\"value\":";
    let Some(rest) = bytes.strip_prefix(b"{\"check\":\"") else {
        return false;
    };
    let Some((check, rest)) = rest.split_at_checked("sha256:".len() + 64) else {
        return false;
    };
    let value = rest
        .strip_prefix(b"\"")
        .and_then(|rest| rest.strip_prefix(VALUE))
        .and_then(|rest| rest.strip_suffix(b"}"));
    value.is_some_and(|value| Sha256Hash::of(value).to_string().as_bytes() == check)
}

/// Files that are nobody's, modes, owners, second names, `tmp/` and the quarantine.
fn place_findings(entries: &[Entry], options: &FsckOptions, findings: &mut Vec<Finding>) {
    let owner = entries.first().map(|root| root.stat.uid);
    let in_quarantine = |entry: &Entry| {
        entry
            .rel
            .strip_prefix(QUARANTINE)
            .is_some_and(|rest| !rest.is_empty())
    };
    // Files with several names: how many lie here, and whether one of them is in the quarantine.
    let mut names: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
    for entry in entries {
        if entry.stat.kind == FileKind::File && entry.stat.nlink > 1 {
            let (count, moved) = names.entry(entry.stat.ino).or_default();
            *count += 1;
            *moved |= in_quarantine(entry);
        }
    }
    for entry in entries {
        let stat = &entry.stat;
        if !entry.rel.is_empty() && !is_known(&entry.rel, stat, &options.known) {
            let what = match stat.kind {
                FileKind::File => "a file",
                FileKind::Dir => "a directory",
                FileKind::Symlink => "a symbolic link",
                FileKind::Other => "a device, socket or pipe",
            };
            findings.push(entry.finding(
                "foreign_file",
                Severity::Foreign,
                format!("{what} that no node made; it counts to the ceiling"),
                Remedy::Leave("it is not ours; remove it if it is nobody's"),
            ));
            continue;
        }
        let is_socket = options.known.contains(&entry.rel);
        if stat.mode & 0o077 != 0 && !is_socket && entry.rel != QUARANTINE {
            findings.push(entry.finding(
                "mode_loose",
                Severity::Foreign,
                "group or others have rights to it; the node gives none",
                Remedy::Leave("chmod go= on it, after asking who changed it"),
            ));
        }
        if Some(stat.uid) != owner {
            findings.push(entry.finding(
                "owner_foreign",
                Severity::Foreign,
                "it belongs to another user than the root does",
                Remedy::Leave("chown it, after asking who changed it"),
            ));
        }
        match names.get(&stat.ino).filter(|_| stat.kind == FileKind::File) {
            Some((count, true)) if *count == stat.nlink && in_quarantine(entry) => {}
            Some((count, true)) if *count == stat.nlink => findings.push(entry.finding(
                "half_moved",
                Severity::Leftover,
                "a crash cut its move to the quarantine off: it has both names",
                Remedy::Quarantine,
            )),
            Some(_) => findings.push(entry.finding(
                "second_name",
                Severity::Foreign,
                format!(
                    "the file has {} names: it can be changed from elsewhere",
                    stat.nlink
                ),
                Remedy::Leave("find the other name and remove it"),
            )),
            None => {}
        }
        if entry.rel.starts_with("tmp/") && !options.in_use {
            findings.push(entry.finding(
                "temporary_file",
                Severity::Leftover,
                "a write that a crash cut off before the file got its name",
                Remedy::Remove,
            ));
        }
        if in_quarantine(entry) {
            findings.push(entry.finding(
                "quarantined",
                Severity::Note,
                "damage that was found earlier, or what a restored log held against its peers",
                Remedy::Leave("yours to look at, keep elsewhere and remove"),
            ));
        }
    }
}

/// Partial segments without their map, maps without bytes, and partials of what is held by now.
fn partial_findings(entries: &[Entry], findings: &mut Vec<Finding>) {
    let names: BTreeSet<&str> = entries
        .iter()
        .filter_map(|entry| entry.rel.strip_prefix(PARTIAL_DIR))
        .collect();
    let held: BTreeSet<SegmentId> = entries
        .iter()
        .filter_map(|entry| entry.rel.rsplit_once('/'))
        .filter(|(dir, _)| dir.starts_with("segments/"))
        .filter_map(|(_, name)| segment_id(name))
        .collect();
    for entry in entries {
        let Some(name) = entry.rel.strip_prefix(PARTIAL_DIR) else {
            continue;
        };
        let Some(id) = partial_name(name) else {
            continue;
        };
        let is_there = |ending| names.contains(format!("{}.{ending}", id.hex()).as_str());
        let is_half = if name.ends_with(".part") {
            !CLAIMS.into_iter().any(is_there)
        } else {
            !is_there("part")
        };
        let why = if held.contains(&id) {
            "a part of a segment that is held whole by now"
        } else if is_half {
            "a half of a transfer whose other half is gone"
        } else {
            continue;
        };
        findings.push(entry.finding(
            "partial_useless",
            Severity::Leftover,
            why,
            Remedy::Quarantine,
        ));
    }
}

/// What lies where.
fn areas(entries: &[Entry], known: &[String]) -> BTreeMap<String, Usages> {
    let mut areas: BTreeMap<String, Usages> = BTreeMap::new();
    for entry in entries {
        let area = if entry.rel.is_empty() {
            "root"
        } else if !is_known(&entry.rel, &entry.stat, known) {
            "foreign"
        } else {
            match entry.rel.split_once('/') {
                Some((first, _)) => first,
                None if entry.stat.kind == FileKind::Dir => &entry.rel,
                None => "root",
            }
        };
        let usages = areas.entry(area.to_owned()).or_default();
        usages.files += 1;
        usages.allocated_bytes = usages
            .allocated_bytes
            .saturating_add(entry.stat.allocated_bytes);
    }
    areas
}
