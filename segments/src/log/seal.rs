//! Work that is done beside the commits, without the core's lock: sealing a full file, making the next
//! one ready, evicting. Each is planned under the lock, done without it, and noted under it again.

use std::sync::{Arc, Mutex, PoisonError};

use super::file::LiveFile;
use super::state::{Cursor, LogState, STATE_PATH};
use super::{LogConfig, LogError};
use crate::body::{self, seal_overhead_bytes};
use crate::checkpoint::Checkpoint;
use crate::format::{self, SegmentHeader, SegmentRef, verify_segment};
use crate::frame::LogHeader;
use crate::id::{Kind, SegmentId};
use crate::keys::{Endorsement, LogKey};
use crate::ledger::{Charge, Reservation};
use crate::limits::LOG_HEADER_BYTES;
use crate::merkle::{Frontier, leaf_hash};
use crate::root::{Root, RootError, Staged};
use crate::store::Store;

/// A file that takes no more records, and what is in it.
pub(super) struct Full {
    pub(super) path: String,
    pub(super) header: LogHeader,
    /// `length | bytes` of every record.
    pub(super) records: Vec<u8>,
    pub(super) count: u32,
    /// The tree after the last record, and its head.
    pub(super) tree: Frontier,
    pub(super) head: Checkpoint,
    /// Whether the file may be used again: not after a failed write or sync.
    pub(super) sound: bool,
}

/// Everything that sealing one file needs.
pub(super) struct SealJob {
    pub(super) full: Arc<Full>,
    pub(super) room: Option<Reservation>,
    pub(super) prev: Option<SegmentId>,
    pub(super) endorsement: Arc<Endorsement>,
    pub(super) key: Arc<LogKey>,
    pub(super) root: Arc<Root>,
    pub(super) store: Arc<Store>,
    pub(super) config: LogConfig,
}

impl SealJob {
    /// Seals the file into a segment and puts it into the store.
    pub(super) fn run(self) -> Result<SegmentRef, LogError> {
        let full = &self.full;
        let header = &full.header;
        if let Some(stored) = self.store.find(&header.origin, header.sequence) {
            // Only the naming of the segment had failed before, and it turned out to be there.
            let same = self.store.audit_span(&stored.id).is_some_and(|span| {
                span.root == full.head.root && span.last.checked_add(1) == Some(full.head.size)
            });
            return if same {
                Ok(stored)
            } else {
                Err(LogError::Memory)
            };
        }
        let room = match self.room {
            Some(room) => room,
            None => {
                // Sealing ends with less on the disk than it began with, so it may use the reserve.
                let raw = full.records.len() as u64;
                let bound = self
                    .root
                    .stage_bound(raw.saturating_add(seal_overhead_bytes(raw)));
                self.root
                    .ledger()
                    .reserve(bound, Charge::Reserve)
                    .map_err(RootError::from)?
            }
        };
        let before = header.tree().map_err(|_| LogError::Memory)?;
        // Computed again from the bytes that go into the segment: a flipped bit in memory must never
        // be signed.
        let mut again = before.clone();
        for record in body::iter_records(&full.records) {
            again.append(leaf_hash(record));
        }
        if again != full.tree || again.root() != full.head.root {
            return Err(LogError::Memory);
        }
        let note = full.head.sign(&self.key);
        let body = body::build_body(
            &before,
            &again,
            full.count,
            &note,
            &full.records,
            &self.config.seal,
        )?;
        let header = SegmentHeader {
            kind: Kind::Audit,
            domain: self.config.domain.clone(),
            origin: header.origin.clone(),
            sequence: header.sequence,
            prev: self.prev,
            created_unix_ms: (self.config.clock)(),
        };
        let bytes = format::seal_signed(&header, &body, &self.key, &self.endorsement)?;
        drop(body);
        let segment = verify_segment(bytes, None, &self.config.domain)?;
        let reference = segment.reference();
        self.store.put_reserved(&segment, room)?;
        Ok(reference)
    }
}

/// The state file. A newer content is never replaced by an older one, whoever comes first.
#[derive(Debug)]
pub(super) struct StateFile {
    root: Arc<Root>,
    /// The version that was written last.
    written: Mutex<u64>,
}

/// The state at one moment.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub(super) version: u64,
    pub(super) state: LogState,
}

impl StateFile {
    pub(super) fn new(root: Arc<Root>) -> Self {
        Self {
            root,
            written: Mutex::default(),
        }
    }

    /// Makes the state durable, unless a newer one is.
    pub(super) fn write(&self, snapshot: &Snapshot) -> Result<(), LogError> {
        let bytes = snapshot
            .state
            .encode()
            .map_err(|_| LogError::Config("the state is too large"))?;
        // A number, whole at any time.
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written < snapshot.version {
            self.root
                .write_atomic(STATE_PATH, &bytes, Charge::Reserve)?;
            *written = snapshot.version;
        }
        Ok(())
    }
}

/// A file that has served and may be used again.
#[derive(Debug)]
pub(super) struct Recycled {
    pub(super) staged: Staged,
    pub(super) file_bytes: u64,
}

/// The next file, under its name, and the room to seal it.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) sequence: u64,
    pub(super) path: String,
    pub(super) file: LiveFile,
    pub(super) seal_room: Reservation,
    pub(super) file_bytes: u64,
    /// Whether it was used before.
    pub(super) stale: bool,
}

/// How to make the next file ready.
pub(super) struct SparePlan {
    pub(super) sequence: u64,
    pub(super) path: String,
    pub(super) from: Option<Recycled>,
    pub(super) file_bytes: u64,
    pub(super) charge: Charge,
}

impl SparePlan {
    pub(super) fn run(self, root: &Arc<Root>) -> Result<Spare, LogError> {
        let bytes = self.file_bytes;
        let bound = root.stage_bound(bytes.saturating_add(seal_overhead_bytes(bytes)));
        // Room first, then I/O: at capacity this is asked for every append.
        let seal_room = root
            .ledger()
            .reserve(bound, self.charge)
            .map_err(RootError::from)?;
        let stale = self.from.is_some();
        let mut staged = match self.from {
            Some(recycled) => {
                // Without the old header it cannot be mistaken for a file that was put back.
                let none = vec![0; usize::try_from(LOG_HEADER_BYTES).unwrap_or(4096)];
                recycled.staged.overwrite(0, &none)?;
                recycled.staged
            }
            None => {
                let mut staged = root.stage(&self.path, bytes, self.charge)?;
                staged.fill_zeros()?;
                staged
            }
        };
        staged.rename(self.path.clone());
        staged.publish()?;
        Ok(Spare {
            sequence: self.sequence,
            file: LiveFile::open(root, &self.path)?,
            path: self.path,
            seal_room,
            file_bytes: bytes,
            stale,
        })
    }
}

/// Segments that go, and the record that says so.
pub(super) struct Eviction {
    pub(super) segments: Vec<SegmentRef>,
    pub(super) record: Vec<u8>,
    /// What the cursors were, should the new ones not become durable.
    pub(super) cursors_before: Vec<Cursor>,
    pub(super) snapshot: Snapshot,
}

impl Eviction {
    /// Cursor first, then unlink: a crash between the two is finished at the next start. Tells whether
    /// the cursor is durable, so that the record of it is owed.
    pub(super) fn run(&self, store: &Store, file: &StateFile) -> (bool, Result<(), LogError>) {
        if let Err(error) = file.write(&self.snapshot) {
            return (false, Err(error));
        }
        for segment in &self.segments {
            if let Err(error) = store.remove(&segment.id) {
                return (true, Err(error.into()));
            }
        }
        (true, Ok(()))
    }
}
