//! What a node was told and answered, in the order of the disk's calls, and what follows from it for
//! whatever comes up again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tidelock_segments::{AuditSpan, Checkpoint, SegmentId, Sha256Hash};

/// One thing that happened.
#[derive(Debug, Clone)]
pub(crate) enum Fact {
    /// A record was handed in.
    Submitted(Arc<[u8]>),
    /// It was acknowledged at this index; or was presented there after a recovery.
    Acked(u64, Arc<[u8]>),
    /// The log showed this head.
    Head(u64, Sha256Hash),
    /// A segment was handed to the store, and was taken.
    Offered(SegmentId),
    Stored(SegmentId),
    /// An own segment was sealed, with the records of this span.
    Sealed(SegmentId, AuditSpan),
    /// A receipt was handed in, and was taken.
    Receipt(SegmentId),
    Licensed(SegmentId),
    /// Eviction was asked for.
    Evicting,
    /// A recovery has decided: what it does not present is lost, and may never come back.
    Settled,
}

/// All that had happened before some call.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) submitted: BTreeSet<Arc<[u8]>>,
    pub(crate) acked: BTreeMap<u64, Arc<[u8]>>,
    pub(crate) heads: BTreeMap<u64, Sha256Hash>,
    pub(crate) offered: BTreeSet<SegmentId>,
    pub(crate) stored: BTreeSet<SegmentId>,
    pub(crate) sealed: BTreeMap<SegmentId, AuditSpan>,
    /// Own segments for which a receipt may be held: an eviction may take them.
    pub(crate) receipts: BTreeSet<SegmentId>,
    pub(crate) licensed: BTreeSet<SegmentId>,
    pub(crate) evicting: bool,
    /// How many records were ever handed in.
    pub(crate) texts: u64,
    /// Two heads of one size that differ: never, whatever happens.
    pub(crate) forked: Option<u64>,
}

impl View {
    pub(crate) fn add(&mut self, fact: &Fact) {
        match fact {
            Fact::Submitted(bytes) => {
                self.texts += 1;
                self.submitted.insert(Arc::clone(bytes));
            }
            Fact::Acked(index, bytes) => {
                if self
                    .acked
                    .insert(*index, Arc::clone(bytes))
                    .is_some_and(|old| old != *bytes)
                {
                    self.forked = Some(*index);
                }
            }
            Fact::Head(size, root) => {
                if self
                    .heads
                    .insert(*size, *root)
                    .is_some_and(|old| old != *root)
                {
                    self.forked = Some(*size);
                }
            }
            Fact::Offered(id) => {
                self.offered.insert(*id);
            }
            Fact::Stored(id) => {
                self.stored.insert(*id);
            }
            Fact::Sealed(id, span) => {
                self.sealed.insert(*id, *span);
            }
            Fact::Receipt(id) => {
                self.receipts.insert(*id);
            }
            Fact::Licensed(id) => {
                self.licensed.insert(*id);
            }
            Fact::Evicting => self.evicting = true,
            Fact::Settled => self.submitted = self.acked.values().cloned().collect(),
        }
    }

    /// Records that were handed in and not acknowledged.
    pub(crate) fn open(&self) -> BTreeSet<&Arc<[u8]>> {
        let acked: BTreeSet<&Arc<[u8]>> = self.acked.values().collect();
        let open = |record: &&Arc<[u8]>| !acked.contains(record);
        self.submitted.iter().filter(open).collect()
    }
}

/// A history: where it began, and its facts, each with the number of disk calls made before it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) start: View,
    pub(crate) facts: Vec<(u64, Fact)>,
}

impl Model {
    pub(crate) fn from(start: View) -> Self {
        Self {
            start,
            facts: Vec::new(),
        }
    }

    /// What had happened when the call with this number was about to be made, and how many facts.
    pub(crate) fn before(&self, call: u64) -> (usize, View) {
        let mut view = self.start.clone();
        let mut count = 0;
        for (_, fact) in self.facts.iter().take_while(|(at, _)| *at < call) {
            view.add(fact);
            count += 1;
        }
        (count, view)
    }

    pub(crate) fn end(&self) -> View {
        self.before(u64::MAX).1
    }
}

/// The size and root of a signed note.
pub(crate) fn head_of(note: &str) -> Option<Fact> {
    let checkpoint = Checkpoint::parse(note).ok()?;
    Some(Fact::Head(checkpoint.size, checkpoint.root))
}
