//! Offline verification of audit logs: a stopped root or a running node's, without its lock.
//!
//! Everything is computed again from the files: ids, signatures, links, indexes, every leaf hash, and
//! the root of every checkpoint. Absence is a fault too: in the node's own log a range may only be
//! missing below the cursor that eviction persisted. Of logs held for others a node may hold a part;
//! there, missing ranges are listed as gaps. Certificate chains of endorsements are not judged here.
//!
//! Records of encrypted segments are read with the keys given. Without one, everything else of such a
//! segment is verified, that its tree continues the one before it included, and the report counts it:
//! [`OriginReport::unread_segments`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::body::{self, BodyError};
use crate::checkpoint::{self, Checkpoint};
use crate::crypt::KeyUnwrap;
use crate::disk::{self, Disk, DiskError, DiskFault, OpenMode};
use crate::format::{self, VerifiedSegment, verify_segment};
use crate::frame::{self, LogHeader};
use crate::id::{DomainId, Origin, SegmentId, Sha256Hash};
use crate::keys::LogPublicKey;
use crate::limits::{MAX_LOG_FILE_BYTES, MAX_SEGMENT_BYTES};
use crate::log::{LogState, STATE_PATH, parse_name};
use crate::merkle::{Frontier, leaf_hash};
use crate::root::{QUARANTINE, list_dir};

/// How often a changing root is read again before its state is taken as it is.
const ATTEMPTS: usize = 4;
/// As much of a file as tells whose it is.
const FRONT_BYTES: usize = 2 * 1024;

/// Something that is wrong with a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "fault", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditFault {
    /// A segment file does not verify.
    #[error("{file}: {reason}")]
    Segment {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A segment does not link to the one before it.
    #[error("segment {sequence} does not link to the one before it")]
    Link {
        /// Its sequence.
        sequence: u64,
    },
    /// Two segments claim one place.
    #[error("two segments claim sequence {sequence}: a fork")]
    Fork {
        /// The sequence.
        sequence: u64,
    },
    /// A segment does not begin with the tree that the one before it ended with.
    #[error("segment {sequence} does not begin where the one before it ended")]
    Tree {
        /// Its sequence.
        sequence: u64,
    },
    /// Records of the own log are missing and were not evicted.
    #[error("records {first} to {last} are missing and no eviction accounts for them")]
    Missing {
        /// First missing index.
        first: u64,
        /// Last missing index.
        last: u64,
    },
    /// The active file is damaged or does not continue the log.
    #[error("{file}: {reason}")]
    Active {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The log is not the one that signed a checkpoint which was seen earlier: it was rolled back, cut
    /// short or rewritten (INV-17).
    #[error("a checkpoint of {size} records was seen: {reason}")]
    Contradicts {
        /// The size in that checkpoint.
        size: u64,
        /// What does not fit.
        reason: String,
    },
    /// The state file is damaged.
    #[error("{file} is damaged")]
    State {
        /// The file.
        file: String,
    },
}

/// What was found of one log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OriginReport {
    /// The log.
    pub origin: Origin,
    /// Whether it is the current incarnation of the log of the node whose root this is.
    pub own: bool,
    /// Sealed segments read.
    pub segments: u64,
    /// Of them, those whose records are encrypted and were not read for want of a key: id, signature,
    /// span, checkpoint and links are verified, the contents are not.
    pub unread_segments: u64,
    /// Records verified, those of the active file and of unread segments included.
    pub records: u64,
    /// Of them, those in unread segments.
    pub unread_records: u64,
    /// Records of them in the active file.
    pub active_records: u64,
    /// Bytes of a torn tail in the active file: a write under way, or one that a crash cut off.
    pub torn_bytes: u64,
    /// One more than the highest index read.
    pub size: u64,
    /// Root of the tree over records `0..size`.
    pub root: Sha256Hash,
    /// The newest signed checkpoint read.
    pub checkpoint: Option<String>,
    /// Index ranges that are not here, inclusive.
    pub gaps: Vec<(u64, u64)>,
    /// Records below this index were evicted under licence.
    pub evicted_below: u64,
    /// Sizes of checkpoints seen earlier that could not be compared, as the records at that point are
    /// evicted, missing or unread.
    pub uncompared: Vec<u64>,
    /// What is wrong.
    pub faults: Vec<AuditFault>,
}

/// The whole report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditReport {
    /// Whether no log has a fault.
    pub ok: bool,
    /// The logs, by origin.
    pub origins: Vec<OriginReport>,
    /// Faults that belong to no log.
    pub faults: Vec<AuditFault>,
    /// Files in the quarantine: damage that was found and kept earlier.
    pub quarantined: Vec<String>,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Which reading of the root this is, from 1: a root that changes meanwhile is read again.
    pub attempt: usize,
    /// Files read.
    pub files: u64,
    /// Files to read.
    pub files_total: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Records verified.
    pub records: u64,
}

/// What a verification may use, and whom it tells how far it is.
#[derive(Default)]
pub struct VerifyOptions<'a> {
    /// With what encrypted records are read.
    pub keys: Option<&'a dyn KeyUnwrap>,
    /// Signed checkpoints of these logs that were seen earlier or elsewhere: by a peer, by an operator
    /// who wrote one down. Files alone cannot show that all of them were rolled back together.
    pub seen: &'a [String],
    /// Called after every file; for a progress bar.
    pub progress: Option<&'a mut dyn FnMut(VerifyProgress)>,
    /// Only this log. A file that cannot be told to be of another log is a fault of this one.
    pub only: Option<&'a Origin>,
}

impl fmt::Debug for VerifyOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyOptions")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

/// Verifies every audit log that a root holds, without any key.
///
/// # Errors
/// [`DiskError`] if the root cannot be read. Damage is no error but part of the report.
pub fn verify_log(
    disk: &dyn Disk,
    root: &Path,
    domain: &DomainId,
) -> Result<AuditReport, DiskError> {
    verify_log_with(disk, root, domain, VerifyOptions::default())
}

/// Verifies every audit log that a root holds. A key that does not open a segment is a fault of that
/// segment: whoever gives keys wants the records read.
///
/// # Errors
/// As [`verify_log`].
pub fn verify_log_with(
    disk: &dyn Disk,
    root: &Path,
    domain: &DomainId,
    options: VerifyOptions<'_>,
) -> Result<AuditReport, DiskError> {
    Ok(verify_and_list(disk, root, domain, options)?.0)
}

/// Like [`verify_log_with`], and tells which segments it read.
pub(crate) fn verify_and_list(
    disk: &dyn Disk,
    root: &Path,
    domain: &DomainId,
    mut options: VerifyOptions<'_>,
) -> Result<(AuditReport, Held), DiskError> {
    let root = disk.canonical(root)?;
    disk.stat(&root)?;
    let mut attempt = 1;
    loop {
        let before = listing(disk, &root)?;
        let (report, held) = verify_once(disk, &root, domain, &mut options, attempt)?;
        // A node may seal, evict or write meanwhile; a fault that stays is a fault.
        if report.ok || attempt >= ATTEMPTS || (attempt > 1 && before == listing(disk, &root)?) {
            return Ok((report, held));
        }
        attempt += 1;
    }
}

/// The sealed segments of one log that were read and verified.
#[derive(Debug, Default)]
pub(crate) struct HeldLog {
    /// Inclusive ranges, ascending.
    pub(crate) sequences: Vec<(u64, u64)>,
    pub(crate) ids: Vec<SegmentId>,
}

impl HeldLog {
    fn of(segments: &BTreeMap<u64, Vec<Link>>) -> Self {
        let mut held = Self::default();
        for (sequence, links) in segments {
            held.ids.extend(links.iter().map(|link| link.id));
            push_sequence(&mut held.sequences, *sequence);
        }
        held
    }
}

/// Adds a sequence to inclusive ranges that are all below it.
pub(crate) fn push_sequence(ranges: &mut Vec<(u64, u64)>, sequence: u64) {
    match ranges.last_mut() {
        Some((_, end)) if end.checked_add(1) == Some(sequence) => *end = sequence,
        _ => ranges.push((sequence, sequence)),
    }
}

/// What is held of every log; `None` where a file is damaged, so that nobody can say of which log it is.
pub(crate) type Held = Option<BTreeMap<Origin, HeldLog>>;

fn listing(disk: &dyn Disk, root: &Path) -> Result<Vec<String>, DiskError> {
    let mut names = list_dir(disk, &root.join("segments/audit"))?;
    names.extend(list_dir(disk, &root.join("log"))?);
    Ok(names)
}

/// A file that may vanish between listing and reading.
fn read(disk: &dyn Disk, path: &Path, max: u64) -> Result<Option<Vec<u8>>, DiskError> {
    match disk::read_all(disk, path, max) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(DiskError {
            fault: DiskFault::NotFound,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// One segment, reduced to what the chain needs: there is one of these in memory for every file.
struct Link {
    id: SegmentId,
    prev: Option<SegmentId>,
    /// Size and root of the tree before the first record: the root fixes the frontier.
    before: (u64, Sha256Hash),
    /// Size and root after the last one.
    after: (u64, Sha256Hash),
    /// Whether its records were read.
    read: bool,
}

/// One segment that verifies.
struct Verified {
    origin: Origin,
    sequence: u64,
    link: Link,
    bytes: u64,
    note: String,
    key: LogPublicKey,
    /// Roots at sizes of checkpoints seen earlier.
    roots: Vec<(u64, Sha256Hash)>,
}

/// The sizes of the checkpoints that were seen of this log.
fn sizes_seen(seen: &[(Checkpoint, &str)], line: &str) -> Vec<u64> {
    seen.iter()
        .filter(|(checkpoint, _)| checkpoint.origin_line == line)
        .map(|(checkpoint, _)| checkpoint.size)
        .collect()
}

/// What is known of one log besides its report.
#[derive(Default)]
struct Known {
    key: Option<LogPublicKey>,
    roots: BTreeMap<u64, Sha256Hash>,
    /// Size and root before the first record, of the sealed segments by sequence.
    sealed: BTreeMap<u64, (u64, Sha256Hash)>,
    /// The checkpoint of the sealed segment with the highest sequence, and that sequence.
    newest: Option<(u64, String)>,
}

impl Known {
    /// Holds a log against the checkpoints of it that were seen (INV-17).
    fn compare(&self, report: &mut OriginReport, seen: &[(Checkpoint, &str)], line: &str) {
        for (checkpoint, note) in seen.iter().filter(|(c, _)| c.origin_line == line) {
            let size = checkpoint.size;
            let signed = self
                .key
                .is_some_and(|key| Checkpoint::verify(note, line, &key).is_ok());
            let reason = if !signed {
                "the log's key did not sign it"
            } else if size > report.size {
                "the log ends before it"
            } else {
                match self.roots.get(&size) {
                    Some(root) if *root == checkpoint.root => continue,
                    Some(_) => "the records up to there are others",
                    None => {
                        report.uncompared.push(size);
                        continue;
                    }
                }
            };
            report.faults.push(AuditFault::Contradicts {
                size,
                reason: reason.to_owned(),
            });
        }
    }
}

/// Whether the front of a file says that it is of another log than `only`.
fn is_of_another(disk: &dyn Disk, path: &Path, only: &Origin) -> bool {
    let Ok(file) = disk.open(path, OpenMode::Read) else {
        return false;
    };
    let len = file.stat().map_or(0, |stat| stat.len);
    let mut front = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(FRONT_BYTES)];
    if file.read_at(0, &mut front).is_err() {
        return false;
    }
    format::peek_header(&mut front.as_slice()).is_ok_and(|(header, _)| header.origin != *only)
}

fn verify_once(
    disk: &dyn Disk,
    root: &Path,
    domain: &DomainId,
    options: &mut VerifyOptions<'_>,
    attempt: usize,
) -> Result<(AuditReport, Held), DiskError> {
    let mut faults = Vec::new();
    let mut seen = Vec::new();
    for note in options.seen {
        match Checkpoint::parse(note) {
            Ok(checkpoint) => seen.push((checkpoint, note.as_str())),
            Err(error) => faults.push(AuditFault::Contradicts {
                size: 0,
                reason: error.to_string(),
            }),
        }
    }
    let mut known: BTreeMap<Origin, Known> = BTreeMap::new();
    let mut logs: BTreeMap<Origin, BTreeMap<u64, Vec<Link>>> = BTreeMap::new();
    let sealed = list_dir(disk, &root.join("segments/audit"))?;
    let mut done = VerifyProgress {
        attempt,
        files: 0,
        files_total: sealed.len() as u64,
        bytes: 0,
        records: 0,
    };
    for name in sealed {
        let Some(id) = name
            .strip_suffix(".seg")
            .and_then(|hex| SegmentId::from_hex(hex).ok())
        else {
            continue;
        };
        let file = format!("segments/audit/{name}");
        let other = |only| is_of_another(disk, &root.join(&file), only);
        if options.only.is_some_and(other) {
            done.files += 1;
            continue;
        }
        let read = read_segment(disk, &root.join(&file), id, domain, options.keys, &seen)?;
        done.files += 1;
        if let Some(Ok(segment)) = &read {
            done.bytes += segment.bytes;
            let link = &segment.link;
            done.records += link.after.0.saturating_sub(link.before.0);
        }
        if let Some(progress) = &mut options.progress {
            progress(done);
        }
        match read {
            None => {}
            Some(Ok(segment)) => {
                let Verified {
                    origin,
                    sequence,
                    link,
                    ..
                } = segment;
                let known = known.entry(origin.clone()).or_default();
                known.key = Some(segment.key);
                known.sealed.insert(sequence, link.before);
                let ends = [link.before, link.after];
                let asked = |(size, _): &(u64, _)| seen.iter().any(|(c, _)| c.size == *size);
                known
                    .roots
                    .extend(segment.roots.into_iter().chain(ends).filter(asked));
                if known.newest.as_ref().is_none_or(|(of, _)| *of < sequence) {
                    known.newest = Some((sequence, segment.note));
                }
                logs.entry(origin)
                    .or_default()
                    .entry(sequence)
                    .or_insert_with(|| Vec::with_capacity(1))
                    .push(link);
            }
            Some(Err(reason)) => faults.push(AuditFault::Segment { file, reason }),
        }
    }
    // Read after the segments: eviction persists the cursor before it unlinks.
    let state = match read(disk, &root.join(STATE_PATH), MAX_SEGMENT_BYTES)? {
        None => None,
        Some(bytes) => {
            let state = LogState::decode(&bytes);
            if state.is_none() {
                faults.push(AuditFault::State {
                    file: STATE_PATH.to_owned(),
                });
            }
            state
        }
    };
    if let Some(state) = &state
        && options.only.is_none_or(|only| *only == state.origin)
    {
        logs.entry(state.origin.clone()).or_default();
    }
    // All faults so far but that of the state file are of segments.
    let readable = !(faults.iter()).any(|fault| matches!(fault, AuditFault::Segment { .. }));
    let held = readable.then(|| {
        logs.iter()
            .filter(|(_, segments)| !segments.is_empty())
            .map(|(origin, segments)| (origin.clone(), HeldLog::of(segments)))
            .collect()
    });
    let mut origins: Vec<OriginReport> = logs
        .into_iter()
        .map(|(origin, segments)| {
            let own_node = state
                .as_ref()
                .filter(|state| origin.audit_node() == Some(state.node_id.as_str()));
            let cursor = own_node.map(|state| state.cursor(&origin).0);
            let own = own_node.is_some_and(|state| state.origin == origin);
            let mut report = chain(origin, segments, own, cursor);
            let newest = known
                .get_mut(&report.origin)
                .and_then(|of| of.newest.take());
            report.checkpoint = newest.map(|(_, note)| note);
            report
        })
        .collect();
    // In the order of their sequence: several may wait to be sealed.
    let mut active: Vec<((u64, u64), String)> = list_dir(disk, &root.join("log"))?
        .into_iter()
        .filter_map(|name| Some((parse_name(&name)?, format!("log/{name}"))))
        .collect();
    active.sort();
    for (_, file) in active {
        let Some(bytes) = read(disk, &root.join(&file), MAX_LOG_FILE_BYTES)? else {
            continue;
        };
        let fault = |reason: String| AuditFault::Active {
            file: file.clone(),
            reason,
        };
        if frame::was_not_begun(&bytes) {
            // Made ready for later; nothing was ever written to it.
            continue;
        }
        let header = match LogHeader::decode(&bytes) {
            Ok(header) => header,
            Err(error) => {
                faults.push(fault(error.to_string()));
                continue;
            }
        };
        match origins
            .iter_mut()
            .find(|report| report.own && report.origin == header.origin)
        {
            Some(report) => {
                let known = known.entry(header.origin.clone()).or_default();
                if let Err(reason) = add_active(report, &bytes, &header, domain, &seen, known) {
                    report.faults.push(fault(reason));
                }
            }
            None if options.only.is_some_and(|only| *only != header.origin) => {}
            None => faults.push(fault("it belongs to no known log".to_owned())),
        }
    }
    for report in &mut origins {
        let line = checkpoint::origin_line(domain, &report.origin).unwrap_or_default();
        let nothing = Known::default();
        let known = known.get(&report.origin).unwrap_or(&nothing);
        known.compare(report, &seen, &line);
    }
    for (checkpoint, _) in &seen {
        let line = |report: &OriginReport| checkpoint::origin_line(domain, &report.origin);
        if !origins
            .iter()
            .any(|report| line(report).is_some_and(|line| line == checkpoint.origin_line))
        {
            faults.push(AuditFault::Contradicts {
                size: checkpoint.size,
                reason: format!("{} is not here", checkpoint.origin_line),
            });
        }
    }
    let ok = faults.is_empty() && origins.iter().all(|report| report.faults.is_empty());
    let quarantined = list_dir(disk, &root.join(QUARANTINE))?;
    let report = AuditReport {
        ok,
        origins,
        faults,
        quarantined,
    };
    Ok((report, held))
}

type Read = Result<Verified, String>;

fn read_segment(
    disk: &dyn Disk,
    path: &Path,
    id: SegmentId,
    domain: &DomainId,
    keys: Option<&dyn KeyUnwrap>,
    seen: &[(Checkpoint, &str)],
) -> Result<Option<Read>, DiskError> {
    let bytes = match read(disk, path, MAX_SEGMENT_BYTES) {
        Ok(None) => return Ok(None),
        Ok(Some(bytes)) => bytes,
        // A sector that cannot be read is a fault of this file, not of the whole reading.
        Err(error) => return Ok(Some(Err(error.to_string()))),
    };
    let length = bytes.len() as u64;
    let verified = verify_segment(bytes, Some(id), domain)
        .map_err(|e| e.to_string())
        .and_then(|segment| reduce(&segment, length, keys, seen).map_err(|e| e.to_string()));
    Ok(Some(verified))
}

fn reduce(
    segment: &VerifiedSegment,
    bytes: u64,
    keys: Option<&dyn KeyUnwrap>,
    seen: &[(Checkpoint, &str)],
) -> Result<Verified, BodyError> {
    let header = segment.header();
    let body = body::parse_body(segment.body(), &header.domain, &header.origin)?;
    let key = segment
        .endorsement()
        .map(|endorsement| endorsement.log_key)
        .ok_or(BodyError::Length("trailer"))?;
    let read = keys.is_some() || !body.is_encrypted();
    let mut roots = Vec::new();
    if read {
        let line = checkpoint::origin_line(&header.domain, &header.origin).unwrap_or_default();
        roots = body.check_tree_at(&key, keys, &sizes_seen(seen, &line))?.1;
    } else {
        body.check_checkpoint(&key)?;
    }
    let span = body.span();
    let before = body.frontier_before();
    let link = Link {
        id: segment.id(),
        prev: header.prev,
        before: (before.size(), before.root()),
        after: (span.last.saturating_add(1), span.root),
        read,
    };
    Ok(Verified {
        origin: header.origin.clone(),
        sequence: header.sequence,
        link,
        bytes,
        note: body.checkpoint_note().to_owned(),
        key,
        roots,
    })
}

/// Walks the segments of one log in order. `cursor` is the eviction cursor, of own logs.
fn chain(
    origin: Origin,
    segments: BTreeMap<u64, Vec<Link>>,
    own: bool,
    cursor: Option<u64>,
) -> OriginReport {
    let mut report = OriginReport {
        origin,
        own,
        segments: 0,
        unread_segments: 0,
        records: 0,
        unread_records: 0,
        active_records: 0,
        torn_bytes: 0,
        size: 0,
        root: Frontier::new().root(),
        checkpoint: None,
        gaps: Vec::new(),
        evicted_below: cursor.unwrap_or(0),
        uncompared: Vec::new(),
        faults: Vec::new(),
    };
    let mut last: Option<(u64, SegmentId, (u64, Sha256Hash))> = None;
    for (sequence, links) in segments {
        if links.len() > 1 {
            report.faults.push(AuditFault::Fork { sequence });
        }
        let Some(link) = links.into_iter().next() else {
            continue;
        };
        let first_index = link.before.0;
        match &last {
            Some((before, id, tree)) if before.checked_add(1) == Some(sequence) => {
                if link.prev != Some(*id) {
                    report.faults.push(AuditFault::Link { sequence });
                }
                if link.before != *tree {
                    report.faults.push(AuditFault::Tree { sequence });
                }
            }
            _ => {
                gap(&mut report, first_index, cursor);
            }
        }
        report.segments += 1;
        let count = link.after.0.saturating_sub(first_index);
        report.records += count;
        if !link.read {
            report.unread_segments += 1;
            report.unread_records += count;
        }
        (report.size, report.root) = link.after;
        last = Some((sequence, link.id, link.after));
    }
    report
}

/// Notes that records from the report's size up to `next` are not here.
fn gap(report: &mut OriginReport, next: u64, cursor: Option<u64>) {
    let from = report.size;
    if next == from {
        return;
    }
    if next < from {
        report.faults.push(AuditFault::Missing {
            first: next,
            last: from.saturating_sub(1),
        });
        return;
    }
    report.gaps.push((from, next.saturating_sub(1)));
    if let Some(cursor) = cursor
        && next > cursor
    {
        let first = from.max(cursor);
        report.faults.push(AuditFault::Missing {
            first,
            last: next.saturating_sub(1),
        });
    }
}

/// Adds the active file to the report of its log.
fn add_active(
    report: &mut OriginReport,
    bytes: &[u8],
    header: &LogHeader,
    domain: &DomainId,
    seen: &[(Checkpoint, &str)],
    known: &mut Known,
) -> Result<(), String> {
    if header.domain != *domain {
        return Err(format!("it belongs to domain {}", header.domain));
    }
    let before = header.tree().map_err(|e| e.to_string())?;
    if let Some(start) = known.sealed.get(&header.sequence) {
        // Sealed a moment ago, or a crash came before its removal: everything in it was read above.
        return match *start == (before.size(), before.root()) {
            true => Ok(()),
            false => Err("it does not begin with the tree of its sealed segment".to_owned()),
        };
    }
    if header.first_index < report.size {
        return Err("it begins inside what is sealed".to_owned());
    }
    let line = checkpoint::origin_line(domain, &header.origin).unwrap_or_default();
    let scan = frame::scan(bytes, header, &line).map_err(|e| e.to_string())?;
    if header.first_index == report.size && before.root() != report.root {
        return Err("it does not begin with the tree of the sealed segments".to_owned());
    }
    gap(report, header.first_index, Some(report.evicted_below));
    known.key = Some(header.log_key);
    let sizes = sizes_seen(seen, &line);
    let mut tree = before;
    for record in body::iter_records(&scan.records).take_while(|_| !sizes.is_empty()) {
        tree.append(leaf_hash(record));
        if sizes.contains(&tree.size()) {
            known.roots.insert(tree.size(), tree.root());
        }
    }
    known.roots.insert(scan.tree.size(), scan.tree.root());
    report.active_records += u64::from(scan.count);
    report.records += u64::from(scan.count);
    report.torn_bytes += scan.torn_bytes;
    report.size = scan.tree.size();
    report.root = scan.tree.root();
    if let Some(mark) = scan.signed {
        let head = Checkpoint {
            origin_line: line,
            size: mark.size,
            root: mark.root,
        };
        report.checkpoint = Some(head.with_signature(&header.log_key, &mark.signature));
    }
    Ok(())
}
