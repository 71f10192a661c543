//! What the parent tells its child to do, and what the child says it did.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tidelock_segments::{SegmentId, Sha256Hash};

/// Names the child's orders in its environment.
pub(crate) const ORDERS: &str = "TIDELOCK_KERNEL_CHILD";

/// The orders of a child.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) root: PathBuf,
    pub(crate) ceiling_bytes: u64,
    pub(crate) reserve_bytes: u64,
    pub(crate) segment_bytes: u64,
    /// A directory of segments of another node, to be put.
    pub(crate) foreign: PathBuf,
    pub(crate) work: Work,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Work {
    /// Everything at once from several threads until killed, or until the time is over.
    Load {
        seed: u64,
        writers: u64,
        largest_record_bytes: u64,
        for_ms: u64,
        /// Whether custodians take over what is sealed once the ladder asks for it.
        licence: bool,
        /// Whether a latched log or store is reopened.
        mend: bool,
    },
    /// A short sequence on one thread; with `inline` the log has no thread either.
    Script { inline: bool },
    /// Fills every account until it refuses, then lets custodians take over and goes on.
    Fill,
}

/// One line from the child. What is acknowledged is said after it was acknowledged; what is about to
/// change is said before it is changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    Opened {
        records: u64,
        truncated_bytes: u64,
        quarantined: Vec<String>,
        new_incarnation: Option<String>,
        us: u64,
    },
    /// A record is durable.
    Acked {
        index: u64,
        leaf: Sha256Hash,
        us: u64,
    },
    /// A record was not acknowledged: `Capacity`, `Unavailable`, `QueueFull` or `TooLarge`.
    Refused {
        error: String,
        why: String,
        us: u64,
    },
    /// A signed head.
    Head {
        note: String,
    },
    /// Leaves of a sealed segment, from this index on.
    Leaves {
        first: u64,
        leaves: Vec<Sha256Hash>,
    },
    /// A receipt for these records is about to be handed in.
    Licensing {
        first: u64,
        last: u64,
    },
    Sealed {
        id: SegmentId,
    },
    Putting {
        id: SegmentId,
    },
    /// It is held: stored now, or before.
    Put {
        id: SegmentId,
        stored: bool,
    },
    Removing {
        id: SegmentId,
    },
    Removed {
        id: SegmentId,
    },
    Slotting {
        number: u64,
    },
    Slot {
        number: u64,
    },
    /// Something else than an append failed.
    Failed {
        op: String,
        why: String,
    },
    /// How it went with reopening after a latch; `why` is empty if well.
    Reopened {
        why: String,
    },
    /// What was latched is reopened, or custodians have taken over what is full; appends follow.
    Mended,
    /// All accounts are full.
    Full,
    Ended {
        latched: Option<String>,
    },
}
