//! `log/state`: which incarnation the log is in, where it runs, and from which index it is kept.

use bincode::{Decode, Encode};

use crate::codec;
use crate::disk::FileStat;
use crate::id::{NodeId, Origin, SegmentId, Sha256Hash};
use crate::merkle::{Frontier, MerkleError};

/// Path of the state file below the root.
pub(crate) const STATE_PATH: &str = "log/state";
const MAGIC: &[u8; 8] = b"TIDESTA4";
const MAGIC_3: &[u8; 8] = b"TIDESTA3";
const MAGIC_2: &[u8; 8] = b"TIDESTA2";
const MAGIC_1: &[u8; 8] = b"TIDESTA1";
const MAX: usize = 512 * 1024;
/// Most origins of older incarnations whose cursor is remembered; the oldest go first.
const MAX_CURSORS: usize = 64;

/// Where a log's root was seen last (ruling 8).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Marker {
    pub(crate) boot_id: String,
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

impl Marker {
    pub(crate) fn new(boot_id: String, stat: &FileStat) -> Self {
        Self {
            boot_id,
            dev: stat.dev,
            ino: stat.ino,
        }
    }

    /// Whether this is the place that was recorded. Device numbers may change at boot, inodes do not.
    pub(crate) fn same_place(&self, now: &Self) -> bool {
        self.ino == now.ino && (self.dev == now.dev || self.boot_id != now.boot_id)
    }
}

/// The end of what has been sealed, kept so that eviction may remove every segment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct SealedEnd {
    pub(crate) next_sequence: u64,
    pub(crate) prev: Option<SegmentId>,
    pub(crate) size: u64,
    pub(crate) frontier: Vec<[u8; 32]>,
}

impl SealedEnd {
    pub(crate) fn start() -> Self {
        Self {
            next_sequence: 0,
            prev: None,
            size: 0,
            frontier: Vec::new(),
        }
    }

    /// The end of a tree that is sealed up to there.
    pub(crate) fn of(next_sequence: u64, prev: Option<SegmentId>, tree: &Frontier) -> Self {
        Self {
            next_sequence,
            prev,
            size: tree.size(),
            frontier: tree.hashes().iter().map(|hash| *hash.as_bytes()).collect(),
        }
    }

    pub(crate) fn tree(&self) -> Result<Frontier, MerkleError> {
        let hashes = self
            .frontier
            .iter()
            .map(|h| Sha256Hash::from_bytes(*h))
            .collect();
        Frontier::from_hashes(self.size, hashes)
    }
}

/// The cursor of one origin: records below this index may be gone, for they were evicted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Cursor {
    pub(crate) origin: Origin,
    pub(crate) min_index: u64,
    pub(crate) min_sequence: u64,
    /// Root of the tree over the records below `min_index`; unknown of what a version before evicted.
    pub(crate) root: Option<[u8; 32]>,
}

/// Segments of a log below this sequence were given up under licence. Where as many cursors are kept as
/// there may be, logs older than all of theirs count as given up whole: theirs are forgotten.
pub(crate) fn given_up_below(cursors: &[Cursor], origin: &Origin) -> u64 {
    let number = |origin: &Origin| origin.audit_parts().map(|parts| parts.2);
    if let Some(cursor) = cursors.iter().find(|cursor| cursor.origin == *origin) {
        return cursor.min_sequence;
    }
    let oldest = cursors.iter().map(|cursor| number(&cursor.origin)).min();
    if cursors.len() >= MAX_CURSORS && Some(number(origin)) < oldest {
        return u64::MAX;
    }
    0
}

/// A head of an earlier own log that the first record of this one names.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Named {
    pub(crate) origin: Origin,
    pub(crate) size: u64,
}

/// The oldest sealed segment of this log that contradicts what a peer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Contradicted {
    pub(crate) sequence: u64,
    pub(crate) id: SegmentId,
}

/// The content of the state file.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct LogState {
    pub(crate) node_id: NodeId,
    pub(crate) origin: Origin,
    pub(crate) incarnation: u64,
    pub(crate) marker: Marker,
    pub(crate) sealed: SealedEnd,
    pub(crate) cursors: Vec<Cursor>,
    /// Records of evictions, and of the incarnation's begin, that may not stand in the log yet.
    pub(crate) owed: Vec<Vec<u8>>,
    /// A peer was seen to hold a later part of this node's log: nothing more is sealed in this
    /// incarnation, and the next one begins at the next start at the latest (ruling 8).
    pub(crate) superseded: bool,
    /// What the first record names. Empty in a state of a version before.
    pub(crate) named: Vec<Named>,
    /// It and the segments that follow it go into the quarantine before anything is named as the head
    /// of this log. What stands in these places once it is gone came from peers.
    pub(crate) contradicted: Option<Contradicted>,
}

/// The content of the version before this.
#[derive(Encode, Decode)]
struct LogState3 {
    node_id: NodeId,
    origin: Origin,
    incarnation: u64,
    marker: Marker,
    sealed: SealedEnd,
    cursors: Vec<Cursor>,
    owed: Vec<Vec<u8>>,
    superseded: bool,
    named: Vec<Named>,
}

impl From<LogState3> for LogState {
    fn from(old: LogState3) -> Self {
        Self {
            node_id: old.node_id,
            origin: old.origin,
            incarnation: old.incarnation,
            marker: old.marker,
            sealed: old.sealed,
            cursors: old.cursors,
            owed: old.owed,
            superseded: old.superseded,
            named: old.named,
            contradicted: None,
        }
    }
}

/// The content of the second version.
#[derive(Encode, Decode)]
struct LogState2 {
    node_id: NodeId,
    origin: Origin,
    incarnation: u64,
    marker: Marker,
    sealed: SealedEnd,
    cursors: Vec<Cursor>,
    owed: Vec<Vec<u8>>,
}

impl From<LogState2> for LogState3 {
    fn from(old: LogState2) -> Self {
        Self {
            node_id: old.node_id,
            origin: old.origin,
            incarnation: old.incarnation,
            marker: old.marker,
            sealed: old.sealed,
            cursors: old.cursors,
            owed: old.owed,
            superseded: false,
            named: Vec::new(),
        }
    }
}

#[derive(Encode, Decode)]
struct Cursor1 {
    origin: Origin,
    min_index: u64,
    min_sequence: u64,
}

/// The content of the first version.
#[derive(Encode, Decode)]
struct LogState1 {
    node_id: NodeId,
    origin: Origin,
    incarnation: u64,
    marker: Marker,
    sealed: SealedEnd,
    cursors: Vec<Cursor1>,
    owed: Vec<Vec<u8>>,
}

impl From<LogState1> for LogState2 {
    fn from(old: LogState1) -> Self {
        Self {
            node_id: old.node_id,
            origin: old.origin,
            incarnation: old.incarnation,
            marker: old.marker,
            sealed: old.sealed,
            cursors: old
                .cursors
                .into_iter()
                .map(|cursor| Cursor {
                    origin: cursor.origin,
                    min_index: cursor.min_index,
                    min_sequence: cursor.min_sequence,
                    root: None,
                })
                .collect(),
            owed: old.owed,
        }
    }
}

impl LogState {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let body = codec::encode::<_, MAX>(self)?;
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// `None` if the bytes are damaged.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (crc, body) = rest.split_first_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        if magic == MAGIC {
            codec::decode::<_, MAX>(body).ok()
        } else if magic == MAGIC_3 {
            codec::decode::<LogState3, MAX>(body).ok().map(Self::from)
        } else if magic == MAGIC_2 {
            codec::decode::<LogState2, MAX>(body)
                .ok()
                .map(|old| LogState3::from(old).into())
        } else if magic == MAGIC_1 {
            codec::decode::<LogState1, MAX>(body)
                .ok()
                .map(|old| LogState3::from(LogState2::from(old)).into())
        } else {
            None
        }
    }

    pub(crate) fn cursor(&self, origin: &Origin) -> (u64, u64) {
        self.cursors
            .iter()
            .find(|cursor| cursor.origin == *origin)
            .map_or((0, 0), |cursor| (cursor.min_index, cursor.min_sequence))
    }

    /// Root of the tree over the records of an origin that the cursor passed.
    pub(crate) fn cursor_root(&self, origin: &Origin) -> Option<Sha256Hash> {
        self.cursors
            .iter()
            .find(|cursor| cursor.origin == *origin)?
            .root
            .map(Sha256Hash::from_bytes)
    }

    /// INV-16: a cursor only moves forward. `root` is that of the tree over the records below
    /// `min_index`.
    pub(crate) fn advance(
        &mut self,
        origin: &Origin,
        min_index: u64,
        min_sequence: u64,
        root: Sha256Hash,
    ) {
        match self
            .cursors
            .iter_mut()
            .find(|cursor| cursor.origin == *origin)
        {
            Some(cursor) => {
                if min_index > cursor.min_index {
                    cursor.root = Some(*root.as_bytes());
                }
                cursor.min_index = cursor.min_index.max(min_index);
                cursor.min_sequence = cursor.min_sequence.max(min_sequence);
            }
            None => {
                if self.cursors.len() >= MAX_CURSORS {
                    self.cursors.remove(0);
                }
                self.cursors.push(Cursor {
                    origin: origin.clone(),
                    min_index,
                    min_sequence,
                    root: Some(*root.as_bytes()),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LogState {
        LogState {
            node_id: NodeId::new("n1").unwrap(),
            origin: Origin::parse("audit/n1/0123456789abcdef/2").unwrap(),
            incarnation: 2,
            marker: Marker {
                boot_id: "b".to_owned(),
                dev: 1,
                ino: 2,
            },
            sealed: SealedEnd::start(),
            cursors: Vec::new(),
            owed: Vec::new(),
            superseded: true,
            named: vec![Named {
                origin: Origin::parse("audit/n1/0123456789abcdef/1").unwrap(),
                size: 7,
            }],
            contradicted: Some(Contradicted {
                sequence: 5,
                id: SegmentId::of(b"contradicted"),
            }),
        }
    }

    #[test]
    fn round_trip_and_every_flipped_byte_is_seen() {
        let bytes = sample().encode().unwrap();
        assert_eq!(LogState::decode(&bytes), Some(sample()));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(LogState::decode(&bad), None, "byte {at}");
        }
    }

    #[test]
    fn the_marker_survives_a_boot_and_not_a_copy() {
        let here = Marker {
            boot_id: "b1".to_owned(),
            dev: 1,
            ino: 5,
        };
        assert!(here.same_place(&here));
        assert!(here.same_place(&Marker {
            boot_id: "b2".to_owned(),
            dev: 9,
            ino: 5
        }));
        assert!(!here.same_place(&Marker {
            boot_id: "b1".to_owned(),
            dev: 9,
            ino: 5
        }));
        assert!(!here.same_place(&Marker {
            boot_id: "b2".to_owned(),
            dev: 1,
            ino: 6
        }));
    }

    #[test]
    fn inv_16_a_cursor_never_moves_back() {
        let mut state = sample();
        let origin = state.origin.clone();
        let root = |text: &[u8]| Sha256Hash::of(text);
        state.advance(&origin, 10, 2, root(b"ten"));
        state.advance(&origin, 4, 1, root(b"four"));
        assert_eq!(state.cursor(&origin), (10, 2));
        assert_eq!(state.cursor_root(&origin), Some(root(b"ten")));
    }

    #[test]
    fn the_version_before_is_read() {
        let now = sample();
        let old = LogState3 {
            node_id: now.node_id.clone(),
            origin: now.origin.clone(),
            incarnation: now.incarnation,
            marker: now.marker.clone(),
            sealed: now.sealed.clone(),
            cursors: Vec::new(),
            owed: Vec::new(),
            superseded: true,
            named: now.named.clone(),
        };
        let body = codec::encode::<_, MAX>(&old).unwrap();
        let mut bytes = MAGIC_3.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let expected = LogState {
            contradicted: None,
            ..now
        };
        assert_eq!(LogState::decode(&bytes), Some(expected));
    }

    #[test]
    fn the_second_version_is_read() {
        let now = sample();
        let old = LogState2 {
            node_id: now.node_id.clone(),
            origin: now.origin.clone(),
            incarnation: now.incarnation,
            marker: now.marker.clone(),
            sealed: now.sealed.clone(),
            cursors: Vec::new(),
            owed: Vec::new(),
        };
        let body = codec::encode::<_, MAX>(&old).unwrap();
        let mut bytes = MAGIC_2.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let expected = LogState {
            superseded: false,
            named: Vec::new(),
            contradicted: None,
            ..now
        };
        assert_eq!(LogState::decode(&bytes), Some(expected));
    }

    #[test]
    fn a_log_whose_cursor_was_forgotten_stays_given_up() {
        let log = |number: u64| {
            let name = format!("audit/n1/0123456789abcdef/{number}");
            Origin::parse(&name).unwrap()
        };
        let mut state = sample();
        let root = Frontier::new().root();
        for number in 2..=MAX_CURSORS as u64 {
            state.advance(&log(number), 10, 5, root);
        }
        assert_eq!(given_up_below(&state.cursors, &log(7)), 5);
        assert_eq!(given_up_below(&state.cursors, &log(1)), 0, "there is room");
        state.advance(&log(100), 10, 5, root);
        assert_eq!(given_up_below(&state.cursors, &log(1)), u64::MAX);
        state.advance(&log(101), 10, 5, root);
        assert_eq!(given_up_below(&state.cursors, &log(2)), u64::MAX);
        assert_eq!(given_up_below(&state.cursors, &log(99)), 0, "never evicted");
    }

    #[test]
    fn the_first_version_is_read() {
        let now = sample();
        let old = LogState1 {
            node_id: now.node_id.clone(),
            origin: now.origin.clone(),
            incarnation: now.incarnation,
            marker: now.marker.clone(),
            sealed: now.sealed.clone(),
            cursors: vec![Cursor1 {
                origin: now.origin.clone(),
                min_index: 7,
                min_sequence: 1,
            }],
            owed: vec![b"owed".to_vec()],
        };
        let body = codec::encode::<_, MAX>(&old).unwrap();
        let mut bytes = MAGIC_1.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let read = LogState::decode(&bytes).unwrap();
        assert_eq!(read.cursor(&now.origin), (7, 1));
        assert_eq!(read.cursor_root(&now.origin), None);
        assert_eq!(read.owed, [b"owed".to_vec()]);
    }
}
