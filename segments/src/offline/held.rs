//! Which audit segments a root holds, by the store's index.
//!
//! The names of the files say what is held. What is in a file is told by the index where it lists it,
//! which costs a page for 112 segments, and by its header where it does not. The index is evidence of
//! nothing: whoever finds less by it than was asked for looks again by the headers, and what has to be
//! sound is read.

use super::{Offline, SegmentInfo};
use crate::body::AuditSpan;
use crate::disk::DiskError;
use crate::format::SegmentRef;
use crate::id::Kind;
use crate::store::load_index;

/// Who tells what is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The index, and the headers of what it does not list.
    Index,
    /// The header of each file.
    Headers,
}

/// An audit segment that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Id, origin, sequence, length and link.
    pub reference: SegmentRef,
    /// Its records.
    pub span: AuditSpan,
    /// When it was sealed.
    pub created_unix_ms: u64,
    /// What the file system allocates to it.
    pub allocated_bytes: u64,
    /// Bytes of its content before compression; only a header says.
    pub raw_bytes: Option<u64>,
}

impl Held {
    fn by_header(info: SegmentInfo) -> Option<Self> {
        Some(Self {
            span: info.span?,
            reference: info.reference,
            created_unix_ms: info.created_unix_ms,
            allocated_bytes: info.allocated_bytes,
            raw_bytes: Some(info.raw_bytes),
        })
    }

    /// How many records it holds.
    #[must_use]
    pub fn records(&self) -> u64 {
        (self.span.last.saturating_sub(self.span.first)).saturating_add(1)
    }
}

impl Offline<'_> {
    /// Gives every audit segment that is held to `each`, in no order, with how many there are. Of a
    /// file whose header cannot be read nothing is said: [`Offline::fsck`] does. Takes some 33 bytes of
    /// memory for each file beside its name.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn audit_segments(
        &self,
        source: Source,
        each: &mut dyn FnMut(Held, u64),
    ) -> Result<(), DiskError> {
        let mut ids = self.segment_ids(Kind::Audit)?;
        ids.sort_unstable();
        let total = ids.len() as u64;
        let mut told = vec![false; ids.len()];
        let index = match source {
            Source::Index => load_index(self.disk, &self.root).ok(),
            Source::Headers => None,
        };
        // One that lists far more than there are files is not worth walking through.
        let index = index.filter(|index| {
            *index.domain() == self.domain && index.count() <= total.saturating_mul(2)
        });
        if let Some(index) = index {
            index.entries(self.disk, &self.root, &mut |origin, sequence, entry| {
                let Ok(at) = ids.binary_search(&entry.id) else {
                    return;
                };
                let Some(told) = told.get_mut(at).filter(|told| !**told) else {
                    return;
                };
                *told = true;
                let held = Held {
                    reference: entry.reference(origin, sequence),
                    span: entry.span,
                    created_unix_ms: entry.created_unix_ms,
                    allocated_bytes: entry.allocated,
                    raw_bytes: None,
                };
                each(held, total);
            });
        }
        for (id, _) in ids.iter().zip(told).filter(|(_, told)| !told) {
            if let Ok(Some(info)) = self.describe(Kind::Audit, id)
                && let Some(held) = Held::by_header(info)
            {
                each(held, total);
            }
        }
        Ok(())
    }
}
