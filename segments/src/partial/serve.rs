//! Ranges of segments that are held, for peers that fetch them in parts.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bao::{self, BaoError, Outboard};
use crate::disk::{DiskError, DiskFault, OpenMode};
use crate::format::SegmentRef;
use crate::id::SegmentId;
use crate::limits::MAX_OUTBOARDS_BYTES;
use crate::root::RootError;
use crate::store::{Store, StoreError, segment_path};

/// The trees of segments that were asked for lately.
#[derive(Debug, Default)]
pub(super) struct Outboards(Mutex<VecDeque<Arc<Outboard>>>);

impl Outboards {
    fn all(&self) -> MutexGuard<'_, VecDeque<Arc<Outboard>>> {
        // Changes under the lock are whole before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &SegmentId) -> Option<Arc<Outboard>> {
        let mut outboards = self.all();
        let at = outboards.iter().position(|known| known.id() == *id)?;
        let found = outboards.remove(at)?;
        outboards.push_back(Arc::clone(&found));
        Some(found)
    }

    fn remember(&self, outboard: &Arc<Outboard>) {
        let mut outboards = self.all();
        outboards.retain(|known| known.id() != outboard.id());
        outboards.push_back(Arc::clone(outboard));
        // INV-07: the oldest go, and a whole entry is counted for each, hashes or none.
        let cost = |known: &Arc<Outboard>| size_of_val(known.pairs()) + 256;
        while outboards.iter().map(cost).sum::<usize>() > MAX_OUTBOARDS_BYTES {
            outboards.pop_front();
        }
    }
}

impl Store {
    /// The slice for a range of a segment that is held, widened to whole groups of 16 KiB: at most
    /// 1 MiB. Only the range is read, and checked against the segment's tree; the tree is computed
    /// from the whole file when a segment is asked for the first time or was not for long.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`]; [`StoreError::Range`]; [`StoreError::Damaged`] if the file does not
    /// fit its id, which is then in quarantine; the disk's refusal.
    pub fn read_range_encoded(
        &self,
        id: &SegmentId,
        range: &Range<u64>,
    ) -> Result<Vec<u8>, StoreError> {
        let held = self.reference(id).ok_or(StoreError::NotHeld(*id))?;
        bao::aligned(held.size_bytes, range)?;
        match self.encode_held(&held, range) {
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

    fn encode_held(&self, held: &SegmentRef, range: &Range<u64>) -> Result<Vec<u8>, StoreError> {
        let id = held.id;
        let damaged = |reason: String| StoreError::Damaged { id, reason };
        let file = match self
            .root()
            .open_file(&segment_path(held.kind, &id), OpenMode::Read)
        {
            Err(RootError::Disk(DiskError {
                fault: DiskFault::NotFound,
                ..
            })) => return Err(damaged("its file is gone".to_owned())),
            other => other?,
        };
        if file.stat().map_err(RootError::Disk)?.len != held.size_bytes {
            return Err(damaged("its file has another length".to_owned()));
        }
        let read = |offset: u64, buffer: &mut [u8]| {
            file.read_at(offset, buffer)
                .map_err(|error| damaged(format!("cannot read it: {}", error.fault)))
        };
        let outboard = match self.transfers.outboards.find(&id) {
            Some(outboard) => outboard,
            None => {
                let outboard = Arc::new(Outboard::compute(held.size_bytes, read)?);
                if outboard.id() != id {
                    return Err(damaged(format!("its bytes have id {}", outboard.id())));
                }
                self.transfers.outboards.remember(&outboard);
                outboard
            }
        };
        bao::encode_range(&outboard, range, read).map_err(|error| match error {
            StoreError::Range(mismatch @ BaoError::Mismatch { .. }) => {
                damaged(mismatch.to_string())
            }
            other => other,
        })
    }
}
