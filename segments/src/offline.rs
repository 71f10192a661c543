//! Reading a root from outside, of a stopped or of a running node: no lock, no change.
//!
//! Everything here comes from the files as `docs/src/format.md` describes them, so that the tools
//! see what is on the disk and not what a node believes of it. The index says where to look and is
//! believed in nothing else. A running node seals, evicts and
//! writes meanwhile: a file that vanished between listing and reading is no fault, and what looks
//! wrong is looked at again before it is reported.
//!
//! Where to start: [`Offline`] for single segments and the own log, [`Offline::fsck`] for the whole
//! root, [`RepairPlan`] for what may be done about it. What depends on where things lie is in the
//! first part of this file only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::body::{self, AuditSpan, BodyError};
use crate::checkpoint::{self, Checkpoint};
use crate::crypt::KeyUnwrap;
use crate::disk::{self, Disk, DiskError, DiskFault, DiskFile, OpenMode};
use crate::format::{self, FormatError, SegmentRef, VerifiedSegment, verify_segment};
use crate::frame::{self, LogHeader};
use crate::id::{DomainId, Kind, NodeId, Origin, SegmentId};
use crate::keys::Endorsement;
use crate::limits::{MAX_LOG_FILE_BYTES, MAX_SEGMENT_BYTES};
use crate::log::{LogState, STATE_PATH};
use crate::receipt::CustodyReceipt;
use crate::root::list_dir;
use crate::store::RECEIPTS_DIR;
use crate::store::receipts::{self, MAX_RECEIPTS_FILE_BYTES};
use crate::verify::VerifyProgress;

mod fsck;
mod held;
mod prove;
mod repair;

pub use fsck::{Finding, FsckOptions, FsckReport, Remedy, Severity, Usages};
pub use held::{Held, Source};
pub use prove::{LogProof, LogProofError};
pub use repair::{
    Applied, PlannedStep, REPAIRS_PATH, RepairAction, RepairError, RepairNote, RepairPlan, repair,
};

/// As much of a file as its description needs: header, and all of an audit body that stands before
/// the records.
const PEEK_BYTES: usize = 32 * 1024;
/// How often a changing log is read again before what was found counts.
const ATTEMPTS: usize = 4;

// ---- where things lie ---------------------------------------------------------------------------

const LOG_DIR: &str = "log";

/// The directory of the segments of one kind, below the root.
fn kind_dir(kind: Kind) -> String {
    format!("segments/{kind}")
}

/// Path of a segment below the root.
#[must_use]
pub fn segment_path(kind: Kind, id: &SegmentId) -> String {
    format!("{}/{}.seg", kind_dir(kind), id.hex())
}

/// The id in a segment's file name.
fn segment_id(name: &str) -> Option<SegmentId> {
    SegmentId::from_hex(name.strip_suffix(".seg")?).ok()
}

/// Incarnation and sequence in the name of a log file.
fn log_name(name: &str) -> Option<(u64, u64)> {
    let (incarnation, sequence) = name.strip_suffix(".log")?.split_once('-')?;
    Some((incarnation.parse().ok()?, sequence.parse().ok()?))
}

/// The segment in the name of a file of receipts.
fn receipts_name(name: &str) -> Option<SegmentId> {
    SegmentId::from_hex(name.strip_suffix(".rcpts")?).ok()
}

// ---- reading ------------------------------------------------------------------------------------

/// How far long work has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Files done.
    pub files: u64,
    /// Files there are.
    pub files_total: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Audit records verified.
    pub records: u64,
}

impl From<VerifyProgress> for Progress {
    fn from(of: VerifyProgress) -> Self {
        Self {
            files: of.files,
            files_total: of.files_total,
            bytes: of.bytes,
            records: of.records,
        }
    }
}

/// Why one file could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfflineError {
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Not a good segment.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Not a good audit body.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The file is shorter than its header says.
    #[error("it is truncated")]
    Truncated,
    /// It lies among segments of another kind, or its header names another domain.
    #[error("it belongs to another domain or kind")]
    Misplaced,
    /// The log's state file does not pass its check.
    #[error("{STATE_PATH} is damaged; tidelock segment fsck says more")]
    State,
    /// A log file is damaged.
    #[error("{0} is damaged; tidelock segment fsck says more")]
    Damaged(String),
    /// There is no log.
    #[error("there is no log: {0} is not there")]
    Absent(String),
    /// A record that must be there is not.
    #[error("record {0} cannot be read; tidelock audit verify says more")]
    Unreadable(u64),
}

/// A segment, described by its front without reading its records. Only [`Offline::read`] verifies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentInfo {
    /// Id, kind, origin, sequence, length and link.
    #[serde(flatten)]
    pub reference: SegmentRef,
    /// When it was sealed; 0 for policy and revocation.
    pub created_unix_ms: u64,
    /// What the file system allocates to it.
    pub allocated_bytes: u64,
    /// Bytes of its content before compression.
    pub raw_bytes: u64,
    /// Its records, of an audit segment.
    pub span: Option<AuditSpan>,
    /// The version of its body, of an audit segment.
    pub body_version: Option<u16>,
    /// Whether its records are compressed.
    pub compressed: bool,
    /// Whether its records can be read with a key only.
    pub encrypted: bool,
}

impl SegmentInfo {
    /// How many records it holds.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.span
            .map_or(0, |span| (span.last - span.first).saturating_add(1))
    }
}

/// The own log, by its state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OwnLog {
    /// The node.
    pub node_id: NodeId,
    /// The log of the current incarnation.
    pub origin: Origin,
    /// Which incarnation it is.
    pub incarnation: u64,
    /// Segments with a lower sequence are sealed. More may be: the file is not written with each seal.
    pub sealed_below: u64,
    /// The last of them that the state file knows.
    pub last_sealed: Option<SegmentId>,
    /// For each own log: records below this index were evicted under licence.
    pub min_index: Vec<(Origin, u64)>,
    /// A peer was seen to hold a later part of it: the next incarnation follows.
    pub superseded: bool,
}

impl OwnLog {
    /// Records of a log below this index were evicted under licence.
    #[must_use]
    pub fn min_index(&self, origin: &Origin) -> u64 {
        self.min_index
            .iter()
            .find(|(of, _)| of == origin)
            .map_or(0, |(_, min)| *min)
    }
}

/// One log file, read whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogFile {
    /// Its path below the root.
    pub file: String,
    /// The log it belongs to.
    pub origin: Origin,
    /// The sequence that its segment will have.
    pub sequence: u64,
    /// Index of its first record.
    pub first_index: u64,
    /// Whole records in it.
    pub records: u64,
    /// Bytes of these records.
    pub record_bytes: u64,
    /// When it was made.
    pub created_unix_ms: u64,
    /// The newest signed head in it.
    pub checkpoint: Option<String>,
    /// Bytes of a write under way, or one that a crash cut off.
    pub torn_bytes: u64,
}

/// A root, read from outside.
#[derive(Debug)]
pub struct Offline<'d> {
    disk: &'d dyn Disk,
    root: PathBuf,
    domain: DomainId,
    keys: Option<Arc<dyn KeyUnwrap>>,
}

/// `None` where the file has vanished since it was listed.
fn still_there<T>(result: Result<T, DiskError>) -> Result<Option<T>, DiskError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(DiskError {
            fault: DiskFault::NotFound,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl<'d> Offline<'d> {
    /// Looks at the root at `path`.
    ///
    /// # Errors
    /// [`DiskError`] if there is no such directory or it cannot be read.
    pub fn open(disk: &'d dyn Disk, path: &Path, domain: &DomainId) -> Result<Self, DiskError> {
        let root = disk.canonical(path)?;
        disk.read_dir(&root)?;
        Ok(Self {
            disk,
            root,
            domain: domain.clone(),
            keys: None,
        })
    }

    /// Reads encrypted records with these keys. Without, everything but their content is verified.
    #[must_use]
    pub fn with_keys(mut self, keys: Option<Arc<dyn KeyUnwrap>>) -> Self {
        self.keys = keys;
        self
    }

    /// With what encrypted records are read here.
    #[must_use]
    pub fn keys(&self) -> Option<&dyn KeyUnwrap> {
        self.keys.as_deref()
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn list(&self, rel: &str) -> Result<Vec<String>, DiskError> {
        list_dir(self.disk, &self.root.join(rel))
    }

    fn read_file(&self, rel: &str, max: u64) -> Result<Option<Vec<u8>>, DiskError> {
        still_there(disk::read_all(self.disk, &self.root.join(rel), max))
    }

    /// The ids of the segments of one kind, by their file names, in order of the ids.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn segment_ids(&self, kind: Kind) -> Result<Vec<SegmentId>, DiskError> {
        let names = self.list(&kind_dir(kind))?;
        Ok(names.iter().filter_map(|name| segment_id(name)).collect())
    }

    /// Which kind of segment lies under this id, if any does.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn kind_of(&self, id: &SegmentId) -> Result<Option<Kind>, DiskError> {
        for kind in Kind::ALL {
            let path = self.root.join(segment_path(kind, id));
            if still_there(self.disk.stat(&path))?.is_some() {
                return Ok(Some(kind));
            }
        }
        Ok(None)
    }

    /// Describes a segment from its front; `None` if it is not there.
    ///
    /// # Errors
    /// [`OfflineError`] if the front is not that of a segment of this kind and domain.
    pub fn describe(
        &self,
        kind: Kind,
        id: &SegmentId,
    ) -> Result<Option<SegmentInfo>, OfflineError> {
        let path = self.root.join(segment_path(kind, id));
        let Some(file) = still_there(self.disk.open(&path, OpenMode::Read))? else {
            return Ok(None);
        };
        self.describe_file(file.as_ref(), kind, id).map(Some)
    }

    fn describe_file(
        &self,
        file: &dyn DiskFile,
        kind: Kind,
        id: &SegmentId,
    ) -> Result<SegmentInfo, OfflineError> {
        let stat = file.stat()?;
        let length = usize::try_from(stat.len).unwrap_or(usize::MAX);
        let mut front = vec![0; length.min(PEEK_BYTES)];
        file.read_at(0, &mut front)?;
        let mut rest = front.as_slice();
        let (header, body_len) = format::peek_header(&mut rest)?;
        if header.domain != self.domain || header.kind != kind || header.origin.kind() != kind {
            return Err(OfflineError::Misplaced);
        }
        let head_len = (front.len() - rest.len()) as u64;
        if stat.len < head_len.saturating_add(body_len).saturating_add(4) {
            return Err(OfflineError::Truncated);
        }
        let front = match kind {
            Kind::Audit => Some(body::peek_front(
                rest,
                body_len,
                &header.domain,
                &header.origin,
            )?),
            _ => None,
        };
        Ok(SegmentInfo {
            reference: SegmentRef {
                id: *id,
                kind,
                origin: header.origin,
                sequence: header.sequence,
                size_bytes: stat.len,
                prev: header.prev,
            },
            created_unix_ms: header.created_unix_ms,
            allocated_bytes: stat.allocated_bytes,
            raw_bytes: front.map_or(body_len, |front| front.raw_bytes),
            span: front.map(|front| front.span),
            body_version: front.map(|front| front.version),
            compressed: front.is_some_and(|front| front.zstd),
            encrypted: front.is_some_and(|front| front.encrypted),
        })
    }

    /// The endorsement at the end of a signed segment, without reading what lies before it. Nothing
    /// of it is verified here.
    ///
    /// # Errors
    /// [`OfflineError`] if the file has not the form of a segment.
    pub fn endorsement(
        &self,
        kind: Kind,
        id: &SegmentId,
    ) -> Result<Option<Endorsement>, OfflineError> {
        let path = self.root.join(segment_path(kind, id));
        let Some(file) = still_there(self.disk.open(&path, OpenMode::Read))? else {
            return Ok(None);
        };
        let len = file.stat()?.len;
        let mut front = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(PEEK_BYTES)];
        file.read_at(0, &mut front)?;
        let mut rest = front.as_slice();
        let (_, body_len) = format::peek_header(&mut rest)?;
        let at = ((front.len() - rest.len()) as u64).saturating_add(body_len);
        let left = len.checked_sub(at).ok_or(OfflineError::Truncated)?;
        let mut end = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(64 * 1024)];
        file.read_at(at, &mut end)?;
        Ok(format::parse_trailer(&end)?)
    }

    /// Reads and verifies a segment: hash, layout, encoding, domain, rules of its kind, signature and
    /// form of the body. `None` if it is not there.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn read(
        &self,
        kind: Kind,
        id: &SegmentId,
    ) -> Result<Option<VerifiedSegment>, OfflineError> {
        let Some(bytes) = self.read_file(&segment_path(kind, id), MAX_SEGMENT_BYTES)? else {
            return Ok(None);
        };
        let segment = verify_segment(bytes, Some(*id), &self.domain)?;
        if segment.header().kind != kind {
            return Err(OfflineError::Misplaced);
        }
        Ok(Some(segment))
    }

    /// Like [`Offline::read`], and hashes every record of an audit segment into the tree that its
    /// checkpoint states. Of an encrypted one without a key only the checkpoint's signature is
    /// verified: the answer is whether its records were read.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn verify(
        &self,
        kind: Kind,
        id: &SegmentId,
    ) -> Result<Option<(VerifiedSegment, bool)>, OfflineError> {
        let Some(segment) = self.read(kind, id)? else {
            return Ok(None);
        };
        let mut was_read = true;
        if kind == Kind::Audit {
            let header = segment.header();
            let body = body::parse_body(segment.body(), &header.domain, &header.origin)?;
            let key = segment.endorsement().map(|e| e.log_key);
            let key = key.ok_or(FormatError::Unsigned)?;
            was_read = self.keys.is_some() || !body.is_encrypted();
            if was_read {
                body.check_tree(&key, self.keys())?;
            } else {
                body.check_checkpoint(&key)?;
            }
        }
        Ok(Some((segment, was_read)))
    }

    /// The good custody receipts that are held for a segment: they decode, name it and are signed.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn receipts(&self, id: &SegmentId) -> Result<Vec<CustodyReceipt>, DiskError> {
        let mut found = self.receipts_unjudged(id)?;
        found.retain(|r| r.segment_id == *id && r.verify_signature().is_ok());
        Ok(found)
    }

    fn receipts_unjudged(&self, id: &SegmentId) -> Result<Vec<CustodyReceipt>, DiskError> {
        let rel = format!("{RECEIPTS_DIR}/{}.rcpts", id.hex());
        let bytes = self.read_file(&rel, MAX_RECEIPTS_FILE_BYTES)?;
        Ok(bytes.map_or_else(Vec::new, |bytes| receipts::decode(&bytes)))
    }

    /// The custodians of every segment that has receipts. Reads the receipts and judges nothing.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn custodians(&self) -> Result<BTreeMap<SegmentId, Vec<NodeId>>, DiskError> {
        let mut out = BTreeMap::new();
        for id in self
            .list(RECEIPTS_DIR)?
            .iter()
            .filter_map(|name| receipts_name(name))
        {
            let receipts = self.receipts_unjudged(&id)?;
            out.insert(id, receipts.into_iter().map(|r| r.custodian).collect());
        }
        Ok(out)
    }

    /// Where the own log stands; `None` if there is no log yet.
    ///
    /// # Errors
    /// [`OfflineError::State`] if the state file is damaged.
    pub fn own_log(&self) -> Result<Option<OwnLog>, OfflineError> {
        let Some(bytes) = self.read_file(STATE_PATH, MAX_SEGMENT_BYTES)? else {
            return Ok(None);
        };
        let state = LogState::decode(&bytes).ok_or(OfflineError::State)?;
        Ok(Some(OwnLog {
            node_id: state.node_id,
            origin: state.origin,
            incarnation: state.incarnation,
            sealed_below: state.sealed.next_sequence,
            last_sealed: state.sealed.prev,
            superseded: state.superseded,
            min_index: state
                .cursors
                .into_iter()
                .map(|cursor| (cursor.origin, cursor.min_index))
                .collect(),
        }))
    }

    /// The log files of one log, in order, with their bytes. A file that is not valid from its first
    /// byte is left out: [`Offline::fsck`] reports it.
    fn log_bytes(&self, origin: &Origin) -> Result<Vec<(String, LogHeader, Vec<u8>)>, DiskError> {
        let mut out = Vec::new();
        for name in self.list(LOG_DIR)? {
            if log_name(&name).is_none() {
                continue;
            }
            let rel = format!("{LOG_DIR}/{name}");
            let Some(bytes) = self.read_file(&rel, MAX_LOG_FILE_BYTES)? else {
                continue;
            };
            match LogHeader::decode(&bytes) {
                Ok(header) if header.origin == *origin && header.domain == self.domain => {
                    out.push((rel, header, bytes));
                }
                _ => {}
            }
        }
        out.sort_by_key(|(_, header, _)| header.sequence);
        Ok(out)
    }

    /// The log files of one log: what is written and not sealed yet.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn log_files(&self, origin: &Origin) -> Result<Vec<LogFile>, DiskError> {
        let line = checkpoint::origin_line(&self.domain, origin).unwrap_or_default();
        let mut out = Vec::new();
        for (file, header, bytes) in self.log_bytes(origin)? {
            let Ok(scan) = frame::scan(&bytes, &header, &line) else {
                continue;
            };
            let checkpoint = scan.signed.map(|mark| {
                let head = Checkpoint {
                    origin_line: line.clone(),
                    size: mark.size,
                    root: mark.root,
                };
                head.with_signature(&header.log_key, &mark.signature)
            });
            out.push(LogFile {
                file,
                origin: header.origin,
                sequence: header.sequence,
                first_index: header.first_index,
                records: scan.count.into(),
                record_bytes: scan.records.len() as u64,
                created_unix_ms: header.created_unix_ms,
                checkpoint,
                torn_bytes: scan.torn_bytes,
            });
        }
        Ok(out)
    }

    /// How many records the own log has now, those not sealed yet included.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn log_size(&self, own: &OwnLog) -> Result<u64, OfflineError> {
        let active = self.log_bytes(&own.origin)?;
        let ends = active.iter().map(|(_, header, bytes)| {
            let records = log_records(header, bytes);
            header.first_index + body::iter_records(&records).count() as u64
        });
        match ends.max() {
            Some(end) => Ok(end),
            None => Ok(self
                .chain_before(&own.origin, u64::MAX, None, Source::Index)?
                .last()
                .map_or(0, |(_, span)| span.last.saturating_add(1))),
        }
    }

    /// The sealed segments of a log that end before `end`, oldest first. `newest`, if it ends just
    /// there, spares the search through the store.
    fn chain_before(
        &self,
        of: &Origin,
        end: u64,
        newest: Option<(SegmentId, u64)>,
        source: Source,
    ) -> Result<Vec<(SegmentId, AuditSpan)>, OfflineError> {
        let mut chain = Vec::new();
        if let Some((id, from)) = newest {
            let mut at = Some(id);
            while let Some(id) = at {
                let Some(info) = self.describe(Kind::Audit, &id)? else {
                    break;
                };
                let span = info.span.ok_or(OfflineError::Truncated)?;
                chain.push((id, span));
                at = info.reference.prev.filter(|_| span.first > from);
            }
            if chain
                .first()
                .is_some_and(|(_, span)| span.last.checked_add(1) == Some(end))
            {
                chain.reverse();
                return Ok(chain);
            }
            chain.clear();
        }
        // What cannot be described shows as a record that is missing.
        self.audit_segments(source, &mut |held, _| {
            if held.reference.origin == *of && held.span.last < end {
                chain.push((held.reference.id, held.span));
            }
        })?;
        chain.sort_by_key(|(_, span)| span.first);
        Ok(chain)
    }

    /// Gives the records of the own log from index `next` on to `each`, oldest first, and answers the
    /// index after the last. Records that were evicted under licence are passed over; those that are
    /// missing otherwise are given as a gap.
    ///
    /// # Errors
    /// [`OfflineError`] if a record that is there cannot be read; those before it were given.
    pub fn records_from(
        &self,
        next: u64,
        each: &mut dyn FnMut(LogEntry<'_>),
    ) -> Result<u64, OfflineError> {
        let mut reading = Reading {
            next,
            last_attempt: false,
            each,
        };
        for _ in 1..ATTEMPTS {
            // Sealed or evicted while it was read: the next look finds it in its new place.
            if self.records_once(&mut reading).is_ok() {
                return Ok(reading.next);
            }
        }
        reading.last_attempt = true;
        self.records_once(&mut reading)?;
        Ok(reading.next)
    }

    fn records_once(&self, reading: &mut Reading<'_>) -> Result<(), OfflineError> {
        let Some(own) = self.own_log()? else {
            return Ok(());
        };
        // Log files first: one that is sealed after this is read twice and not missed.
        let active = self.log_bytes(&own.origin)?;
        let own = self.own_log()?.unwrap_or(own);
        reading.next = reading.next.max(own.min_index(&own.origin));
        let end = active
            .first()
            .map_or(u64::MAX, |(_, header, _)| header.first_index);
        if reading.next < end {
            let newest = own.last_sealed.map(|id| (id, reading.next));
            // That a record is missing is said by the files alone.
            let source = match reading.last_attempt {
                true => Source::Headers,
                false => Source::Index,
            };
            for (id, span) in self.chain_before(&own.origin, end, newest, source)? {
                if span.last < reading.next {
                    continue;
                }
                let Some(segment) = self.read(Kind::Audit, &id)? else {
                    return Err(OfflineError::Unreadable(reading.next));
                };
                let header = segment.header();
                let body = body::parse_body(segment.body(), &header.domain, &header.origin)?;
                let mut records = body.records(self.keys())?;
                while let Some((index, record)) = records.next_record()? {
                    reading.give(index, record)?;
                }
            }
        }
        let line = checkpoint::origin_line(&self.domain, &own.origin).unwrap_or_default();
        for (_, header, bytes) in active {
            let scan = frame::scan(&bytes, &header, &line)
                .map_err(|_| OfflineError::Unreadable(reading.next))?;
            for (index, record) in (header.first_index..).zip(body::iter_records(&scan.records)) {
                reading.give(index, record)?;
            }
        }
        Ok(())
    }
}

/// What stands next in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEntry<'a> {
    /// A record with its index.
    Record(u64, &'a [u8]),
    /// Records from the first to the last of these indexes are not held, and no eviction accounts
    /// for them.
    Gap(u64, u64),
}

/// A log that is being read, perhaps several times until it stands still.
struct Reading<'e> {
    next: u64,
    last_attempt: bool,
    each: &'e mut dyn FnMut(LogEntry<'_>),
}

impl Reading<'_> {
    /// Gives one record on unless it was given before.
    fn give(&mut self, index: u64, record: &[u8]) -> Result<(), OfflineError> {
        if index < self.next {
            return Ok(());
        }
        if index > self.next {
            if !self.last_attempt {
                return Err(OfflineError::Unreadable(self.next));
            }
            (self.each)(LogEntry::Gap(self.next, index.saturating_sub(1)));
        }
        (self.each)(LogEntry::Record(index, record));
        self.next = index.saturating_add(1);
        Ok(())
    }
}

/// The whole records of a log file, as `length | bytes`; none of one that is damaged, which
/// [`Offline::fsck`] reports.
fn log_records(header: &LogHeader, bytes: &[u8]) -> Vec<u8> {
    let line = checkpoint::origin_line(&header.domain, &header.origin).unwrap_or_default();
    frame::scan(bytes, header, &line).map_or_else(|_| Vec::new(), |scan| scan.records)
}
