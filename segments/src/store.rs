//! The content-addressed store of segments: `segments/<kind>/<hex>.seg`.
//!
//! A segment enters only as a [`VerifiedSegment`] and by one protocol: reserve, write to a temporary
//! name, sync, rename, sync the directory. It leaves only by [`Store::get`], which verifies every
//! byte again; a damaged file goes to the quarantine and is never served. The index is in memory and
//! rebuilt from the files, so losing it costs nothing. Custody receipts for the node's own segments
//! lie beside them in `receipts/`.
//!
//! The store is synchronous and may be called from any thread. After a failed sync it latches: it
//! goes on serving what it holds and refuses writes until [`Store::reopen`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::body::AuditSpan;
use crate::disk::{DiskError, DiskFault, DiskOp, OpenMode};
use crate::format::{
    self, FormatError, Head, SegmentHeader, SegmentRef, VerifiedSegment, verify_segment,
};
use crate::id::{DomainId, Kind, NodeId, Origin, SegmentId};
use crate::ledger::{CeilingReached, Charge, Reservation};
use crate::limits::{MAX_RECEIPTS_PER_SEGMENT, MAX_REFS};
use crate::receipt::{CustodyReceipt, ReceiptError};
use crate::record;
use crate::root::{Root, RootError};

const RECEIPTS: &str = "receipts";
/// As much of a file as an index needs: header, and the head of an audit body with its checkpoint.
const PEEK_BYTES: usize = 16 * 1024;

/// Why the store refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No such segment is held.
    #[error("no segment {0} is held")]
    NotHeld(SegmentId),
    /// The file was damaged; it is in the quarantine now and no longer held.
    #[error("segment {id} was damaged on disk and is in quarantine: {reason}")]
    Damaged {
        /// Which segment.
        id: SegmentId,
        /// What was wrong.
        reason: String,
    },
    /// Two different audit segments claim the same place in one log.
    #[error(
        "fork in {origin} at sequence {sequence}: {held} is held and {offered} contradicts it; \
         an operator has to look at both"
    )]
    Fork {
        /// The log.
        origin: Origin,
        /// The place.
        sequence: u64,
        /// What is held.
        held: SegmentId,
        /// What was offered.
        offered: SegmentId,
    },
    /// A segment of another domain.
    #[error("segment of domain {0} refused; this store belongs to another domain")]
    Domain(DomainId),
    /// The ceiling does not allow it.
    #[error(transparent)]
    Ceiling(#[from] CeilingReached),
    /// The file system is full below our own ceiling: somebody else fills it.
    #[error("the file system is full below the ceiling; free space on it")]
    FileSystemFull,
    /// A write or sync failed earlier; nothing is written until the store is reopened.
    #[error("the store is latched after {0}; reopen it when the disk is sound")]
    Latched(String),
    /// The receipt was refused.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// The receipt is for another domain, log, range or root than the segment's.
    #[error("the receipt does not fit segment {0}")]
    ReceiptMismatch(SegmentId),
    /// Enough receipts are held for this segment.
    #[error("segment {0} has {MAX_RECEIPTS_PER_SEGMENT} receipts already")]
    TooManyReceipts(SegmentId),
    /// The root or the disk refused.
    #[error(transparent)]
    Root(RootError),
}

impl From<RootError> for StoreError {
    fn from(error: RootError) -> Self {
        match error {
            RootError::Ceiling(ceiling) => Self::Ceiling(ceiling),
            full if full.is_file_system_full() => Self::FileSystemFull,
            other => Self::Root(other),
        }
    }
}

/// What [`Store::put`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// It is stored now, durably.
    Stored,
    /// It was held before; nothing was written (INV-08).
    AlreadyHeld,
}

/// What one call of [`Store::scrub`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ScrubReport {
    /// Segments read and verified.
    pub checked: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Segments that went to the quarantine.
    pub damaged: Vec<SegmentId>,
    /// Whether this call reached the end of the store; the next begins anew.
    pub wrapped: bool,
}

#[derive(Debug)]
struct Entry {
    reference: SegmentRef,
    span: Option<AuditSpan>,
    created_unix_ms: u64,
    allocated: u64,
    account: Charge,
    custodians: BTreeSet<NodeId>,
}

#[derive(Debug, Default)]
struct Index {
    entries: BTreeMap<SegmentId, Entry>,
    origins: BTreeMap<(Kind, Origin), BTreeSet<(u64, SegmentId)>>,
    under_way: BTreeSet<SegmentId>,
    own_node: Option<NodeId>,
    foreign_bytes: u64,
    scrubbed: Option<SegmentId>,
    latched: Option<String>,
}

impl Index {
    fn insert(&mut self, entry: Entry) {
        let reference = &entry.reference;
        self.origins
            .entry((reference.kind, reference.origin.clone()))
            .or_default()
            .insert((reference.sequence, reference.id));
        if entry.account == Charge::Custody {
            self.foreign_bytes = self.foreign_bytes.saturating_add(entry.allocated);
        }
        self.entries.insert(reference.id, entry);
    }

    fn remove(&mut self, id: &SegmentId) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        let key = (entry.reference.kind, entry.reference.origin.clone());
        if let Some(sequences) = self.origins.get_mut(&key) {
            sequences.remove(&(entry.reference.sequence, *id));
            if sequences.is_empty() {
                self.origins.remove(&key);
            }
        }
        if entry.account == Charge::Custody {
            self.foreign_bytes = self.foreign_bytes.saturating_sub(entry.allocated);
        }
        Some(entry)
    }

    fn at(&self, origin: &Origin, from: u64, to: u64) -> impl Iterator<Item = (u64, SegmentId)> {
        let first = (from, SegmentId::from_bytes([0; 32]));
        let last = (to, SegmentId::from_bytes([0xff; 32]));
        let range = (from <= to).then_some(first..=last);
        self.origins
            .get(&(origin.kind(), origin.clone()))
            .into_iter()
            .zip(range)
            .flat_map(|(sequences, range)| sequences.range(range))
            .copied()
    }

    /// Audit held for another node is charged to its own share (ruling 3).
    fn account(&self, reference: &SegmentRef, asked: Charge) -> Charge {
        match &self.own_node {
            Some(own) if reference.kind == Kind::Audit => {
                if reference.origin.audit_node() == Some(own.as_str()) {
                    asked
                } else {
                    Charge::Custody
                }
            }
            _ => asked,
        }
    }

    /// INV-17: a place in an audit log is taken once, and neighbours are linked by hash.
    fn check_fork(&self, new: &SegmentRef) -> Result<(), StoreError> {
        if new.kind != Kind::Audit {
            return Ok(());
        }
        let fork = |held| StoreError::Fork {
            origin: new.origin.clone(),
            sequence: new.sequence,
            held,
            offered: new.id,
        };
        if let Some((_, held)) = self.at(&new.origin, new.sequence, new.sequence).next() {
            return Err(fork(held));
        }
        if let Some(before) = new.sequence.checked_sub(1)
            && let Some((_, held)) = self.at(&new.origin, before, before).next()
            && new.prev != Some(held)
        {
            return Err(fork(held));
        }
        if let Some(after) = new.sequence.checked_add(1)
            && let Some((_, held)) = self.at(&new.origin, after, after).next()
            && self
                .entries
                .get(&held)
                .is_some_and(|e| e.reference.prev != Some(new.id))
        {
            return Err(fork(held));
        }
        Ok(())
    }
}

/// The segments below one root.
#[derive(Debug)]
pub struct Store {
    root: Arc<Root>,
    domain: DomainId,
    index: Mutex<Index>,
    put_ended: Condvar,
}

fn segment_path(kind: Kind, id: &SegmentId) -> String {
    format!("{}/{}.seg", kind_dir(kind), id.hex())
}

fn kind_dir(kind: Kind) -> String {
    format!("segments/{kind}")
}

fn receipt_path(id: &SegmentId, custodian: &NodeId) -> String {
    format!("{RECEIPTS}/{}-{custodian}.rcpt", id.hex())
}

/// The parts of a receipt's file name.
fn parse_receipt_name(name: &str) -> Option<(SegmentId, NodeId)> {
    let (hex, rest) = name.strip_suffix(".rcpt")?.split_at_checked(64)?;
    Some((
        SegmentId::from_hex(hex).ok()?,
        NodeId::new(rest.strip_prefix('-')?).ok()?,
    ))
}

impl Store {
    /// Opens the store and builds the index from the files' headers. A file that cannot be a segment
    /// of this domain goes to the quarantine.
    ///
    /// # Errors
    /// [`StoreError`] if the root or the disk refuses.
    pub fn open(root: Arc<Root>, domain: DomainId) -> Result<Arc<Self>, StoreError> {
        for kind in Kind::ALL {
            root.ensure_dir(&kind_dir(kind))?;
        }
        root.ensure_dir(RECEIPTS)?;
        let store = Self {
            root,
            domain,
            index: Mutex::default(),
            put_ended: Condvar::new(),
        };
        store.rebuild(false)?;
        Ok(Arc::new(store))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Changes under the lock are whole before anything can panic.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// The domain.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// Reads the directories; with `verify_new`, files that the index did not know are read whole.
    fn rebuild(&self, verify_new: bool) -> Result<(), StoreError> {
        let mut found = Vec::new();
        for kind in Kind::ALL {
            for name in self.root.list(&kind_dir(kind))? {
                let rel = format!("{}/{name}", kind_dir(kind));
                let Some(id) = name
                    .strip_suffix(".seg")
                    .and_then(|hex| SegmentId::from_hex(hex).ok())
                else {
                    tracing::warn!(
                        file = rel,
                        "foreign file in the store; it counts to the ceiling"
                    );
                    continue;
                };
                if self.index().entries.contains_key(&id) {
                    continue;
                }
                let entry = match self.peek(&rel, kind, id) {
                    Ok(entry) if verify_new => self.read(&rel, id).map(|_| entry),
                    other => other,
                };
                match entry {
                    Ok(entry) => found.push(entry),
                    Err(StoreError::Damaged { reason, .. }) => {
                        let to = self.root.move_to_quarantine(&rel, Charge::Normal)?;
                        tracing::error!(%id, reason, to, "damaged segment moved to quarantine");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let receipts: Vec<_> = self
            .root
            .list(RECEIPTS)?
            .iter()
            .filter_map(|name| parse_receipt_name(name))
            .collect();
        let mut index = self.index();
        for mut entry in found {
            entry.account = index.account(&entry.reference, Charge::Normal);
            if entry.account == Charge::Custody {
                self.root.ledger().freed(entry.allocated, Charge::Normal);
                self.root.ledger().found(entry.allocated, Charge::Custody);
            }
            index.insert(entry);
        }
        for (id, custodian) in receipts {
            if let Some(entry) = index.entries.get_mut(&id) {
                entry.custodians.insert(custodian);
            }
        }
        Ok(())
    }

    /// Reads the front of a file.
    fn peek(&self, rel: &str, kind: Kind, id: SegmentId) -> Result<Entry, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { id, reason };
        let file = self.root.open_file(rel, OpenMode::Read)?;
        let stat = file.stat().map_err(RootError::Disk)?;
        let mut front = vec![
            0;
            usize::try_from(stat.len)
                .unwrap_or(PEEK_BYTES)
                .min(PEEK_BYTES)
        ];
        file.read_at(0, &mut front).map_err(RootError::Disk)?;
        let mut rest = front.as_slice();
        let (header, body_len) =
            format::peek_header(&mut rest).map_err(|e| damaged(e.to_string()))?;
        let SegmentHeader {
            domain,
            origin,
            sequence,
            prev,
            created_unix_ms,
            ..
        } = header;
        if domain != self.domain || header.kind != kind || origin.kind() != kind {
            return Err(damaged("it belongs to another domain or kind".to_owned()));
        }
        let head_len = (front.len() - rest.len()) as u64;
        if stat.len < head_len.saturating_add(body_len).saturating_add(4) {
            return Err(damaged("it is truncated".to_owned()));
        }
        let span = match kind {
            Kind::Audit => Some(
                record::peek_span(rest, &domain, &origin).map_err(|e| damaged(e.to_string()))?,
            ),
            _ => None,
        };
        let reference = SegmentRef {
            id,
            kind,
            origin,
            sequence,
            size_bytes: stat.len,
            prev,
        };
        Ok(Entry {
            reference,
            span,
            created_unix_ms,
            allocated: stat.allocated_bytes,
            account: Charge::Normal,
            custodians: BTreeSet::new(),
        })
    }

    fn read(&self, rel: &str, id: SegmentId) -> Result<VerifiedSegment, StoreError> {
        let bytes = match self.root.read(rel) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(StoreError::Damaged {
                    id,
                    reason: "its file is gone".to_owned(),
                });
            }
            Err(RootError::Disk(DiskError {
                op: DiskOp::Read,
                fault,
                ..
            })) => {
                return Err(StoreError::Damaged {
                    id,
                    reason: format!("cannot read it: {fault}"),
                });
            }
            Err(error) => return Err(error.into()),
        };
        verify_segment(bytes, Some(id), &self.domain).map_err(|e: FormatError| {
            StoreError::Damaged {
                id,
                reason: e.to_string(),
            }
        })
    }

    /// Tells the store whose audit is the node's own: all other audit is charged to the custody share.
    pub fn set_own_node(&self, node: &NodeId) {
        let mut index = self.index();
        index.own_node = Some(node.clone());
        let mut moved = 0u64;
        for entry in index.entries.values_mut() {
            let foreign = entry.reference.kind == Kind::Audit
                && entry.reference.origin.audit_node() != Some(node.as_str());
            if foreign && entry.account != Charge::Custody {
                entry.account = Charge::Custody;
                moved = moved.saturating_add(entry.allocated);
            }
        }
        index.foreign_bytes = index.foreign_bytes.saturating_add(moved);
        self.root.ledger().freed(moved, Charge::Normal);
        self.root.ledger().found(moved, Charge::Custody);
    }

    /// Stores a segment durably. INV-08: the same segment again, also from two threads at once, is
    /// stored once.
    ///
    /// # Errors
    /// [`StoreError`]: the ceiling, a fork, a latched store, or the disk. Nothing is then held that
    /// was not before.
    pub fn put(&self, segment: &VerifiedSegment, charge: Charge) -> Result<PutOutcome, StoreError> {
        self.put_from(segment, charge, None)
    }

    /// Like [`Store::put`], from bytes reserved earlier.
    pub(crate) fn put_reserved(
        &self,
        segment: &VerifiedSegment,
        reservation: Reservation,
    ) -> Result<PutOutcome, StoreError> {
        self.put_from(segment, Charge::Normal, Some(reservation))
    }

    fn put_from(
        &self,
        segment: &VerifiedSegment,
        charge: Charge,
        reservation: Option<Reservation>,
    ) -> Result<PutOutcome, StoreError> {
        let reference = segment.reference();
        let id = reference.id;
        if segment.header().domain != self.domain {
            return Err(StoreError::Domain(segment.header().domain.clone()));
        }
        let account = {
            let mut index = self.index();
            while index.under_way.contains(&id) {
                index = self
                    .put_ended
                    .wait(index)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if index.entries.contains_key(&id) {
                return Ok(PutOutcome::AlreadyHeld);
            }
            if let Some(reason) = &index.latched {
                return Err(StoreError::Latched(reason.clone()));
            }
            index.check_fork(&reference)?;
            index.under_way.insert(id);
            index.account(&reference, charge)
        };
        let path = segment_path(reference.kind, &id);
        let written = self.write(&path, segment.bytes(), account, reservation);
        let mut index = self.index();
        index.under_way.remove(&id);
        let outcome = match written {
            Ok(allocated) => {
                let span = segment.audit_span();
                // Two forks may have been under way at once; the second to finish is refused.
                match index.check_fork(&reference) {
                    Ok(()) => {
                        let account = if account == Charge::Custody {
                            account
                        } else {
                            Charge::Normal
                        };
                        index.insert(Entry {
                            reference,
                            span,
                            created_unix_ms: segment.header().created_unix_ms,
                            allocated,
                            account,
                            custodians: BTreeSet::new(),
                        });
                        Ok(PutOutcome::Stored)
                    }
                    Err(fork) => {
                        if let Err(error) = self.root.remove_charged(&path, account) {
                            tracing::warn!(%error, "cannot remove a refused fork");
                        }
                        Err(fork)
                    }
                }
            }
            Err(error) => {
                if let StoreError::Root(RootError::Disk(disk)) = &error {
                    // What is on the device is unknown now. Never synced again as if it were safe.
                    index.latched = Some(disk.to_string());
                }
                Err(error)
            }
        };
        drop(index);
        self.put_ended.notify_all();
        outcome
    }

    fn write(
        &self,
        rel: &str,
        bytes: &[u8],
        account: Charge,
        reservation: Option<Reservation>,
    ) -> Result<u64, StoreError> {
        let len = bytes.len() as u64;
        let mut staged = match reservation {
            Some(reservation) => self.root.stage_with(rel, len, reservation)?,
            None => self.root.stage(rel, len, account)?,
        };
        staged.fill(bytes)?;
        Ok(staged.publish()?.allocated)
    }

    /// Why the store refuses writes, if it does.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        self.index().latched.clone()
    }

    /// Takes a latched store into use again: syncs the directories, reads every file whole that the
    /// index does not know, and then accepts writes.
    ///
    /// # Errors
    /// [`StoreError`] if the disk still refuses; the store stays latched.
    pub fn reopen(&self) -> Result<(), StoreError> {
        for kind in Kind::ALL {
            let dir = self.root.path().join(kind_dir(kind));
            self.root.disk().sync_dir(&dir).map_err(RootError::Disk)?;
        }
        self.rebuild(true)?;
        self.index().latched = None;
        Ok(())
    }

    /// Reads and verifies a segment. A damaged one is moved to the quarantine and dropped.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], [`StoreError::Damaged`] or the disk's refusal.
    pub fn get(&self, id: &SegmentId) -> Result<VerifiedSegment, StoreError> {
        let kind = self.reference(id).ok_or(StoreError::NotHeld(*id))?.kind;
        match self.read(&segment_path(kind, id), *id) {
            Err(StoreError::Damaged { id, reason }) => {
                if !self.contains(&id) {
                    // Evicted while it was being read.
                    return Err(StoreError::NotHeld(id));
                }
                self.quarantine(&id, &reason)?;
                Err(StoreError::Damaged { id, reason })
            }
            other => other,
        }
    }

    /// Whether it is held.
    #[must_use]
    pub fn contains(&self, id: &SegmentId) -> bool {
        self.index().entries.contains_key(id)
    }

    /// Its reference, if it is held.
    #[must_use]
    pub fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        self.index()
            .entries
            .get(id)
            .map(|entry| entry.reference.clone())
    }

    /// The span of records of an audit segment that is held.
    #[must_use]
    pub fn audit_span(&self, id: &SegmentId) -> Option<AuditSpan> {
        self.index().entries.get(id).and_then(|entry| entry.span)
    }

    /// When a held segment was sealed, by its header.
    pub(crate) fn created_unix_ms(&self, id: &SegmentId) -> Option<u64> {
        self.index()
            .entries
            .get(id)
            .map(|entry| entry.created_unix_ms)
    }

    /// The audit segments of this node's own log, all incarnations, oldest first.
    #[must_use]
    pub fn own_audit(&self, node: &NodeId) -> Vec<SegmentRef> {
        let index = self.index();
        let mut own: Vec<(u64, SegmentRef)> = index
            .origins
            .iter()
            .filter_map(|((_, origin), sequences)| {
                let (of, _, incarnation) = origin.audit_parts()?;
                (of == *node).then_some((incarnation, sequences))
            })
            .flat_map(|(incarnation, sequences)| {
                let entries = sequences.iter().filter_map(|(_, id)| index.entries.get(id));
                entries.map(move |entry| (incarnation, entry.reference.clone()))
            })
            .collect();
        own.sort_by_key(|(incarnation, reference)| (*incarnation, reference.sequence));
        own.into_iter().map(|(_, reference)| reference).collect()
    }

    /// What is held of an origin with sequences `from..=to`, ascending, at most `max` and never more
    /// than [`MAX_REFS`].
    #[must_use]
    pub fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        let index = self.index();
        index
            .at(origin, from, to)
            .take(max.min(MAX_REFS))
            .filter_map(|(_, id)| index.entries.get(&id).map(|entry| entry.reference.clone()))
            .collect()
    }

    /// The segment at this place of an origin's log; the one with the lowest id where there are
    /// several (policy with further signatures, conflicting CRLs of one number).
    #[must_use]
    pub fn find(&self, origin: &Origin, sequence: u64) -> Option<SegmentRef> {
        self.refs(origin, sequence, sequence, 1).pop()
    }

    /// What is held, by origin: most urgent kind first, then by name (INV-11).
    #[must_use]
    pub fn heads(&self) -> Vec<Head> {
        let index = self.index();
        index
            .origins
            .iter()
            .filter_map(|((_, origin), sequences)| {
                let (_, last_id) = sequences.last()?;
                let numbers = sequences.iter().map(|(sequence, _)| *sequence);
                Some(Head::from_sequences(origin.clone(), numbers, *last_id))
            })
            .collect()
    }

    /// Everything that is held, of one kind or of all, in the order of INV-11.
    #[must_use]
    pub fn list(&self, kind: Option<Kind>) -> Vec<SegmentRef> {
        let index = self.index();
        index
            .origins
            .iter()
            .filter(|((of, _), _)| kind.is_none_or(|kind| kind == *of))
            .flat_map(|(_, sequences)| sequences)
            .filter_map(|(_, id)| index.entries.get(id).map(|entry| entry.reference.clone()))
            .collect()
    }

    /// Removes a segment and its receipts. Whether it may be removed is the caller's question.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] or the disk's refusal.
    pub fn remove(&self, id: &SegmentId) -> Result<(), StoreError> {
        let entry = self.index().remove(id).ok_or(StoreError::NotHeld(*id))?;
        let path = segment_path(entry.reference.kind, id);
        if let Err(error) = self.root.remove_charged(&path, entry.account) {
            if self.root.exists(&path).unwrap_or(true) {
                self.index().insert(entry);
            }
            return Err(error.into());
        }
        for custodian in &entry.custodians {
            self.root.remove(&receipt_path(id, custodian))?;
        }
        Ok(())
    }

    /// Takes a segment out of use and keeps its file in the quarantine. Gives the file's new path
    /// below the root; `None` if the file was gone already.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`] or the disk's refusal.
    pub fn quarantine(&self, id: &SegmentId, reason: &str) -> Result<Option<String>, StoreError> {
        let entry = self.index().remove(id).ok_or(StoreError::NotHeld(*id))?;
        let path = segment_path(entry.reference.kind, id);
        match self.root.move_to_quarantine(&path, entry.account) {
            Ok(to) => {
                tracing::error!(%id, reason, to, "segment moved to quarantine");
                Ok(Some(to))
            }
            Err(RootError::Disk(DiskError {
                fault: DiskFault::NotFound,
                ..
            })) => {
                self.root.ledger().freed(entry.allocated, entry.account);
                tracing::error!(%id, reason, "the file of a segment is gone");
                Ok(None)
            }
            Err(error) => {
                // Out of use all the same: what is suspect is not served.
                Err(error.into())
            }
        }
    }

    /// Keeps a receipt for an own or foreign audit segment that is held. The receipt must fit the
    /// segment in domain, log, range and root, and its signature must verify; its endorsement's
    /// certificate chain must have been judged by the caller. Again the same custodian's: replaced.
    ///
    /// # Errors
    /// [`StoreError`] telling what does not fit.
    pub fn put_receipt(&self, receipt: &CustodyReceipt) -> Result<(), StoreError> {
        let id = receipt.segment_id;
        receipt.verify_signature()?;
        {
            let index = self.index();
            if let Some(reason) = &index.latched {
                return Err(StoreError::Latched(reason.clone()));
            }
            let entry = index.entries.get(&id).ok_or(StoreError::NotHeld(id))?;
            let fits = receipt.domain == self.domain
                && receipt.origin == entry.reference.origin
                && entry.span.is_some_and(|span| {
                    (span.first, span.last, span.root)
                        == (receipt.first, receipt.last, receipt.root_at_last)
                });
            if !fits {
                return Err(StoreError::ReceiptMismatch(id));
            }
            if entry.custodians.len() >= MAX_RECEIPTS_PER_SEGMENT
                && !entry.custodians.contains(&receipt.custodian)
            {
                return Err(StoreError::TooManyReceipts(id));
            }
        }
        let bytes = receipt.encode()?;
        self.root.write_atomic(
            &receipt_path(&id, &receipt.custodian),
            &bytes,
            Charge::Reserve,
        )?;
        if let Some(entry) = self.index().entries.get_mut(&id) {
            entry.custodians.insert(receipt.custodian.clone());
        }
        Ok(())
    }

    /// The receipts held for a segment, by custodian. One whose file is damaged does not count.
    #[must_use]
    pub fn receipts(&self, id: &SegmentId) -> Vec<CustodyReceipt> {
        let custodians = self
            .index()
            .entries
            .get(id)
            .map(|entry| entry.custodians.clone())
            .unwrap_or_default();
        custodians
            .iter()
            .filter_map(|custodian| self.read_receipt(id, custodian))
            .collect()
    }

    fn read_receipt(&self, id: &SegmentId, custodian: &NodeId) -> Option<CustodyReceipt> {
        let span = self.audit_span(id)?;
        let bytes = self.root.read(&receipt_path(id, custodian)).ok()??;
        let receipt = CustodyReceipt::decode(&bytes).ok()?;
        let fits = receipt.segment_id == *id
            && receipt.custodian == *custodian
            && (receipt.first, receipt.last, receipt.root_at_last)
                == (span.first, span.last, span.root)
            && receipt.verify_signature().is_ok();
        fits.then_some(receipt)
    }

    /// The custodians that a receipt is held of, without reading the receipts.
    #[must_use]
    pub fn custodians(&self, id: &SegmentId) -> BTreeSet<NodeId> {
        self.index()
            .entries
            .get(id)
            .map(|entry| entry.custodians.clone())
            .unwrap_or_default()
    }

    /// Removes every receipt that the caller names, such as those of a revoked custodian (ruling 4),
    /// and tells how many.
    ///
    /// # Errors
    /// [`StoreError`] if a file cannot be removed; those before it are gone.
    pub fn remove_receipts_by(
        &self,
        condemned: &dyn Fn(&CustodyReceipt) -> bool,
    ) -> Result<usize, StoreError> {
        let all: Vec<(SegmentId, NodeId)> = {
            let index = self.index();
            let pairs = |(id, entry): (&SegmentId, &Entry)| {
                entry
                    .custodians
                    .iter()
                    .map(|c| (*id, c.clone()))
                    .collect::<Vec<_>>()
            };
            index.entries.iter().flat_map(pairs).collect()
        };
        let mut removed = 0;
        for (id, custodian) in all {
            let Some(receipt) = self.read_receipt(&id, &custodian) else {
                continue;
            };
            if condemned(&receipt) {
                // It stops counting at once, whatever the disk says.
                if let Some(entry) = self.index().entries.get_mut(&id) {
                    entry.custodians.remove(&custodian);
                }
                self.root.remove(&receipt_path(&id, &custodian))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Allocated bytes of the audit that is held for other nodes.
    #[must_use]
    pub fn foreign_audit_bytes(&self) -> u64 {
        self.index().foreign_bytes
    }

    /// Reads and verifies segments, beginning where the last call ended, until the budget is used.
    ///
    /// # Errors
    /// [`StoreError`] if the disk refuses otherwise than by damage.
    pub fn scrub(&self, budget_bytes: u64) -> Result<ScrubReport, StoreError> {
        let mut report = ScrubReport::default();
        while report.bytes < budget_bytes {
            let next = {
                let mut index = self.index();
                let next = match index.scrubbed {
                    None => index.entries.iter().next(),
                    Some(last) => {
                        use std::ops::Bound::{Excluded, Unbounded};
                        index.entries.range((Excluded(last), Unbounded)).next()
                    }
                }
                .map(|(id, entry)| (*id, entry.reference.size_bytes));
                index.scrubbed = next.map(|(id, _)| id);
                next
            };
            let Some((id, bytes)) = next else {
                report.wrapped = true;
                break;
            };
            match self.get(&id) {
                Ok(_) => {}
                Err(StoreError::Damaged { .. }) => report.damaged.push(id),
                Err(StoreError::NotHeld(_)) => continue,
                Err(error) => return Err(error),
            }
            report.checked += 1;
            report.bytes = report.bytes.saturating_add(bytes);
        }
        Ok(report)
    }
}
