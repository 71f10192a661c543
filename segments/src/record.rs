//! Bytes of the active log file: its header block, and the frames after it.
//!
//! The active file is a header block followed by frames, each `length | crc32c | bytes`, padded to eight
//! bytes. The checksum covers the file's salt, the frame's offset and its length, so a frame that was
//! written for another place or another file does not pass. A *mark* is a frame that opens every
//! batch: at offset `x` it attests that every byte below `x` was durable when it was written, and it
//! carries the signed head of the tree below. That is how recovery tells a torn tail (no valid mark
//! follows) from damage to acknowledged data (one does).

use std::fmt;

pub(crate) use crate::body::{
    build_body, iter_records, parse_body, push_record, read_records_with, seal_overhead_bytes,
};
use crate::checkpoint::Checkpoint;
use crate::codec;
use crate::id::{DomainId, Origin, SegmentId, Sha256Hash};
use crate::keys::LogPublicKey;
use crate::limits::{LOG_HEADER_BYTES, MAX_LOG_FILE_BYTES, MAX_RECORD_BYTES, MIN_LOG_FILE_BYTES};
use crate::merkle::{Frontier, MerkleError, leaf_hash};

fn len32(record: &[u8]) -> u32 {
    u32::try_from(record.len()).unwrap_or(u32::MAX)
}

/// The first eight bytes of an active log file.
pub(crate) const LOG_MAGIC: &[u8; 8] = b"TIDELOG1";

/// Set in a frame's length field for a mark.
const MARK_BIT: u32 = 0x8000_0000;
const MARK_LEN: usize = 8 + 32 + 64;
const FRAME_HEAD: usize = 8;
const ALIGN: usize = 8;

/// The header block of an active file: everything needed to go on after a crash.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub(crate) struct LogHeader {
    pub(crate) domain: DomainId,
    pub(crate) origin: Origin,
    pub(crate) log_key: LogPublicKey,
    pub(crate) sequence: u64,
    pub(crate) prev: Option<SegmentId>,
    pub(crate) first_index: u64,
    pub(crate) frontier: Vec<[u8; 32]>,
    pub(crate) file_bytes: u64,
    pub(crate) created_unix_ms: u64,
}

/// Why the header block of an active file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LogHeaderError {
    /// The block is all zero or torn.
    #[error("the header block is not valid")]
    Invalid,
    /// The file is shorter or longer than its header says.
    #[error("the file has {found} bytes where its header says {expected}")]
    FileLength {
        /// On disk.
        found: u64,
        /// In the header.
        expected: u64,
    },
}

impl LogHeader {
    const MAX: usize = 3 * 1024;

    /// The header block, padded to [`LOG_HEADER_BYTES`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let head = codec::encode::<_, { Self::MAX }>(self)?;
        let mut out = Vec::with_capacity(4096);
        out.extend_from_slice(LOG_MAGIC);
        out.extend_from_slice(&len32(&head).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
        out.extend_from_slice(&head);
        out.resize(usize::try_from(LOG_HEADER_BYTES).unwrap_or(4096), 0);
        Ok(out)
    }

    pub(crate) fn decode(file: &[u8]) -> Result<Self, LogHeaderError> {
        let invalid = || LogHeaderError::Invalid;
        let rest = file.strip_prefix(LOG_MAGIC).ok_or_else(invalid)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(invalid)?;
        let (crc, rest) = rest.split_first_chunk::<4>().ok_or_else(invalid)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| invalid())?;
        let head = rest.get(..length).ok_or_else(invalid)?;
        if crc32c::crc32c(head) != u32::from_le_bytes(*crc) {
            return Err(invalid());
        }
        let header: Self = codec::decode::<_, { Self::MAX }>(head).map_err(|_| invalid())?;
        if header.frontier.len() != Frontier::hashes_for(header.first_index)
            || !(MIN_LOG_FILE_BYTES..=MAX_LOG_FILE_BYTES).contains(&header.file_bytes)
        {
            return Err(invalid());
        }
        let found = file.len() as u64;
        if found != header.file_bytes {
            return Err(LogHeaderError::FileLength {
                found,
                expected: header.file_bytes,
            });
        }
        Ok(header)
    }

    /// The salt of every checksum in this file.
    pub(crate) fn salt(&self) -> u32 {
        let seed = Sha256Hash::of_parts(&[
            self.domain.as_str().as_bytes(),
            b"\n",
            self.origin.as_str().as_bytes(),
            b"\n",
            &self.sequence.to_le_bytes(),
        ]);
        let [a, b, c, d, ..] = *seed.as_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    pub(crate) fn tree(&self) -> Result<Frontier, MerkleError> {
        let hashes = self
            .frontier
            .iter()
            .map(|h| Sha256Hash::from_bytes(*h))
            .collect();
        Frontier::from_hashes(self.first_index, hashes)
    }
}

/// What a mark says about everything below it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) size: u64,
    pub(crate) root: Sha256Hash,
    pub(crate) signature: [u8; 64],
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mark({}, {})", self.size, self.root)
    }
}

/// One frame of the active file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    Record(&'a [u8]),
    Mark(Mark),
}

/// Bytes that a frame with this payload takes in the file.
pub(crate) const fn frame_bytes(payload: usize) -> usize {
    (FRAME_HEAD + payload).next_multiple_of(ALIGN)
}

/// Bytes that a mark takes in the file.
pub(crate) const MARK_BYTES: usize = frame_bytes(MARK_LEN);

fn frame_crc(salt: u32, offset: u64, length: u32, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(salt, &offset.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &length.to_le_bytes());
    crc32c::crc32c_append(crc, payload)
}

/// Writes frames for one file into a buffer that starts at `base` in that file.
pub(crate) struct FrameWriter<'a> {
    pub(crate) salt: u32,
    pub(crate) base: u64,
    pub(crate) out: &'a mut Vec<u8>,
}

impl FrameWriter<'_> {
    fn push(&mut self, length: u32, payload: &[u8]) {
        let offset = self.base.saturating_add(self.out.len() as u64);
        let crc = frame_crc(self.salt, offset, length, payload);
        self.out.extend_from_slice(&length.to_le_bytes());
        self.out.extend_from_slice(&crc.to_le_bytes());
        self.out.extend_from_slice(payload);
        self.out.resize(self.out.len().next_multiple_of(ALIGN), 0);
    }

    pub(crate) fn record(&mut self, record: &[u8]) {
        self.push(len32(record), record);
    }

    pub(crate) fn mark(&mut self, mark: &Mark) {
        let mut payload = Vec::with_capacity(MARK_LEN);
        payload.extend_from_slice(&mark.size.to_le_bytes());
        payload.extend_from_slice(mark.root.as_bytes());
        payload.extend_from_slice(&mark.signature);
        self.push(len32(&payload) | MARK_BIT, &payload);
    }
}

/// Reads the frame at `offset` of bytes that begin at `base` in their file; `None` if there is no
/// valid one. Gives the offset after it.
pub(crate) fn read_frame(
    file: &[u8],
    salt: u32,
    base: u64,
    offset: usize,
) -> Option<(Frame<'_>, usize)> {
    let rest = file.get(offset..)?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length);
    let is_mark = length & MARK_BIT != 0;
    let payload_len = usize::try_from(length & !MARK_BIT).ok()?;
    let fits = if is_mark {
        payload_len == MARK_LEN
    } else {
        (1..=MAX_RECORD_BYTES).contains(&payload_len)
    };
    if !fits {
        return None;
    }
    let payload = rest.get(..payload_len)?;
    if frame_crc(salt, base.checked_add(offset as u64)?, length, payload)
        != u32::from_le_bytes(*crc)
    {
        return None;
    }
    let end = offset.checked_add(frame_bytes(payload_len))?;
    // The padding is part of the frame: a flipped bit there shows as well.
    if file
        .get(offset + FRAME_HEAD + payload_len..end)?
        .iter()
        .any(|byte| *byte != 0)
    {
        return None;
    }
    let frame = if is_mark {
        let (size, rest) = payload.split_first_chunk::<8>()?;
        let (root, signature) = rest.split_first_chunk::<32>()?;
        Frame::Mark(Mark {
            size: u64::from_le_bytes(*size),
            root: Sha256Hash::from_bytes(*root),
            signature: *signature.first_chunk::<64>()?,
        })
    } else {
        Frame::Record(payload)
    };
    Some((frame, end))
}

/// Whether a valid mark stands anywhere at or after `from`: it attests the bytes below it.
pub(crate) fn mark_after(file: &[u8], salt: u32, from: usize) -> Option<usize> {
    (from.next_multiple_of(ALIGN)..file.len())
        .step_by(ALIGN)
        .find(|at| matches!(read_mark_quickly(file, salt, *at), Some(Frame::Mark(_))))
}

/// Looks at the length field before the checksum: almost every offset ends there.
fn read_mark_quickly(file: &[u8], salt: u32, offset: usize) -> Option<Frame<'_>> {
    let length = u32::from_le_bytes(*file.get(offset..)?.first_chunk::<4>()?);
    if length & MARK_BIT == 0 {
        return None;
    }
    read_frame(file, salt, 0, offset).map(|(frame, _)| frame)
}

/// What was found in an active file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scan {
    /// `length | bytes` of every whole record.
    pub(crate) records: Vec<u8>,
    /// How many.
    pub(crate) count: u32,
    /// The tree after the last whole record.
    pub(crate) tree: Frontier,
    /// Offset after the last whole frame.
    pub(crate) end: usize,
    /// The last mark: everything below it was durable.
    pub(crate) last_mark: Option<Mark>,
    /// Bytes that are not zero after `end`: a torn tail.
    pub(crate) torn_bytes: u64,
    /// An upper estimate of the records in the torn tail, from the length fields that can be read.
    pub(crate) torn_records: u64,
}

/// Damage of data that a mark attests: never repaired in silence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// A frame below a mark is not valid.
    #[error("the frame at offset {at} is not valid, but a mark at {attested} attests it")]
    Frame {
        /// Offset of the bad frame.
        at: u64,
        /// Offset of the mark.
        attested: u64,
    },
    /// A mark does not fit the records below it.
    #[error("the mark at offset {at} does not fit the records below it")]
    Mark {
        /// Its offset.
        at: u64,
    },
    /// The header block is not valid or the file has another length.
    #[error("{0}")]
    Header(String),
}

/// Reads all frames of an active file.
pub(crate) fn scan(file: &[u8], header: &LogHeader, origin_line: &str) -> Result<Scan, Damage> {
    let salt = header.salt();
    let mut tree = header.tree().map_err(|e| Damage::Header(e.to_string()))?;
    let mut records = Vec::new();
    let mut count = 0u32;
    let mut at = usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX);
    let mut last_mark = None;
    while let Some((frame, next)) = read_frame(file, salt, 0, at) {
        match frame {
            Frame::Record(record) => {
                tree.append(leaf_hash(record));
                push_record(&mut records, record);
                count = count.saturating_add(1);
            }
            Frame::Mark(mark) => {
                let head = Checkpoint {
                    origin_line: origin_line.to_owned(),
                    size: mark.size,
                    root: mark.root,
                };
                let fits = mark.size == tree.size()
                    && mark.root == tree.root()
                    && header
                        .log_key
                        .verify(head.text().as_bytes(), &mark.signature)
                        .is_ok();
                if !fits {
                    return Err(Damage::Mark { at: at as u64 });
                }
                last_mark = Some(mark);
            }
        }
        at = next;
    }
    if let Some(mark) = mark_after(file, salt, at) {
        // INV-17 and ruling 24: what a mark attests was acknowledged, so this is not a torn tail.
        return Err(Damage::Frame {
            at: at as u64,
            attested: mark as u64,
        });
    }
    let tail = file.get(at..).unwrap_or_default();
    let last_dirty = tail.iter().rposition(|byte| *byte != 0);
    let torn = last_dirty.map_or(0, |last| last + 1);
    Ok(Scan {
        records,
        count,
        tree,
        end: at,
        last_mark,
        torn_bytes: torn as u64,
        torn_records: estimate_records(tail.get(..torn).unwrap_or_default()),
    })
}

/// Follows length fields through a torn tail; at least one if anything is there.
fn estimate_records(tail: &[u8]) -> u64 {
    let mut rest = tail;
    let mut found = 0u64;
    while let Some((length, _)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length);
        let is_mark = length & MARK_BIT != 0;
        let Ok(payload) = usize::try_from(length & !MARK_BIT) else {
            break;
        };
        if payload == 0 || payload > MAX_RECORD_BYTES {
            break;
        }
        found += u64::from(!is_mark);
        let Some(next) = rest.get(frame_bytes(payload)..) else {
            break;
        };
        rest = next;
    }
    found.max(u64::from(!tail.is_empty()))
}
