//! Bytes of an active log file: a header block, then batches of frames.
//!
//! A frame is `length | crc32c | bytes`, padded to eight bytes. The checksum covers the file's salt,
//! the frame's offset and its length, so a frame that was written for another place or another file
//! does not pass. A batch is a *mark*, the frames of its records, and zeros up to the next sector: what
//! was acknowledged never shares a sector with what is written later. The mark at offset `x` attests
//! that every byte below `x` was durable when it was written, and names the root that the tree has after
//! its own batch, so that no other bytes than those of this batch complete it. That is how recovery
//! tells a torn tail (no valid mark follows) from damage to acknowledged data (one does), also in a
//! file that was used before and has stale bytes behind its end (see `docs/src/format.md`).

use std::fmt;
use std::ops::Range;

use crate::body::push_record;
use crate::checkpoint::{self, Checkpoint};
use crate::codec;
use crate::id::{DomainId, Origin, SegmentId, Sha256Hash};
use crate::keys::{LogKey, LogPublicKey};
use crate::limits::{LOG_HEADER_BYTES, MAX_LOG_FILE_BYTES, MAX_RECORD_BYTES, MIN_LOG_FILE_BYTES};
use crate::merkle::{Frontier, MerkleError, leaf_hash};

/// The first eight bytes of an active log file.
pub(crate) const LOG_MAGIC: &[u8; 8] = b"TIDELOG2";
/// Those of the version before, which is read, sealed and never continued.
const LOG_MAGIC_1: &[u8; 8] = b"TIDELOG1";

/// Set in a frame's length field for a mark.
const MARK_BIT: u32 = 0x8000_0000;
const MARK_LEN: usize = 8 + 8 + 64 + 4 + 4 + 32;
const MARK_LEN_1: usize = 8 + 32 + 64;
const FRAME_HEAD: usize = 8;
const ALIGN: usize = 8;
/// A batch begins at a multiple of this: a sector is written once.
pub(crate) const BATCH_ALIGN: usize = 512;

/// The header block of an active file: everything needed to go on after a crash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogHeader {
    pub(crate) domain: DomainId,
    pub(crate) origin: Origin,
    pub(crate) log_key: LogPublicKey,
    pub(crate) sequence: u64,
    pub(crate) first_index: u64,
    pub(crate) frontier: Vec<[u8; 32]>,
    pub(crate) file_bytes: u64,
    pub(crate) created_unix_ms: u64,
    /// Where every checksum in this file starts from.
    pub(crate) salt: u32,
    /// Whether the file was used before, so that what is behind its end says nothing.
    pub(crate) stale: bool,
    /// Of the version before: its frames have no batches.
    pub(crate) version_1: bool,
}

#[derive(bincode::Encode, bincode::Decode)]
struct Fields {
    domain: DomainId,
    origin: Origin,
    log_key: LogPublicKey,
    sequence: u64,
    first_index: u64,
    frontier: Vec<[u8; 32]>,
    file_bytes: u64,
    created_unix_ms: u64,
    salt: u32,
    stale: bool,
}

#[derive(bincode::Encode, bincode::Decode)]
struct Fields1 {
    domain: DomainId,
    origin: Origin,
    log_key: LogPublicKey,
    sequence: u64,
    _prev: Option<SegmentId>,
    first_index: u64,
    frontier: Vec<[u8; 32]>,
    file_bytes: u64,
    created_unix_ms: u64,
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

/// The salt of a file: only who holds the log key can tell it before the file is in use, so nobody can
/// put bytes into a record that would pass as a frame in the file's next use.
pub(crate) fn derive_salt(key: &LogKey, origin: &Origin, sequence: u64) -> u32 {
    let message = format!("tidelock log salt v1\0{origin}\n{sequence}");
    let [a, b, c, d, ..] = *Sha256Hash::of(&key.sign(message.as_bytes())).as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl LogHeader {
    const MAX: usize = 3 * 1024;

    /// The header block, padded to [`LOG_HEADER_BYTES`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let fields = Fields {
            domain: self.domain.clone(),
            origin: self.origin.clone(),
            log_key: self.log_key,
            sequence: self.sequence,
            first_index: self.first_index,
            frontier: self.frontier.clone(),
            file_bytes: self.file_bytes,
            created_unix_ms: self.created_unix_ms,
            salt: self.salt,
            stale: self.stale,
        };
        let head = codec::encode::<_, { Self::MAX }>(&fields)?;
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
        let (magic, rest) = file.split_first_chunk::<8>().ok_or_else(invalid)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(invalid)?;
        let (crc, rest) = rest.split_first_chunk::<4>().ok_or_else(invalid)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| invalid())?;
        let head = rest.get(..length).ok_or_else(invalid)?;
        if crc32c::crc32c(head) != u32::from_le_bytes(*crc) {
            return Err(invalid());
        }
        let header = if magic == LOG_MAGIC {
            let fields: Fields = codec::decode::<_, { Self::MAX }>(head).map_err(|_| invalid())?;
            Self {
                domain: fields.domain,
                origin: fields.origin,
                log_key: fields.log_key,
                sequence: fields.sequence,
                first_index: fields.first_index,
                frontier: fields.frontier,
                file_bytes: fields.file_bytes,
                created_unix_ms: fields.created_unix_ms,
                salt: fields.salt,
                stale: fields.stale,
                version_1: false,
            }
        } else if magic == LOG_MAGIC_1 {
            let fields: Fields1 = codec::decode::<_, { Self::MAX }>(head).map_err(|_| invalid())?;
            Self {
                salt: salt_1_of(&fields.domain, &fields.origin, fields.sequence),
                domain: fields.domain,
                origin: fields.origin,
                log_key: fields.log_key,
                sequence: fields.sequence,
                first_index: fields.first_index,
                frontier: fields.frontier,
                file_bytes: fields.file_bytes,
                created_unix_ms: fields.created_unix_ms,
                stale: false,
                version_1: true,
            }
        } else {
            return Err(invalid());
        };
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

    pub(crate) fn tree(&self) -> Result<Frontier, MerkleError> {
        let hashes = self
            .frontier
            .iter()
            .map(|h| Sha256Hash::from_bytes(*h))
            .collect();
        Frontier::from_hashes(self.first_index, hashes)
    }
}

fn salt_1_of(domain: &DomainId, origin: &Origin, sequence: u64) -> u32 {
    let seed = Sha256Hash::of_parts(&[
        domain.as_str().as_bytes(),
        b"\n",
        origin.as_str().as_bytes(),
        b"\n",
        &sequence.to_le_bytes(),
    ]);
    let [a, b, c, d, ..] = *seed.as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn len32(record: &[u8]) -> u32 {
    u32::try_from(record.len()).unwrap_or(u32::MAX)
}

/// What opens a batch.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Records below it, all durable.
    pub(crate) size: u64,
    /// The newest head that was signed, by its size: not more than `size`.
    pub(crate) signed_size: u64,
    /// The signature of that head's checkpoint.
    pub(crate) signature: [u8; 64],
    /// Records in its batch.
    pub(crate) count: u32,
    /// Bytes of its batch, this mark included, the zeros at the end not.
    pub(crate) bytes: u32,
    /// Root of the tree after its batch.
    pub(crate) root_after: Sha256Hash,
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mark({} + {})", self.size, self.count)
    }
}

/// One frame of the active file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    Record(&'a [u8]),
    /// The payload of a mark.
    Mark(&'a [u8]),
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

/// Writes a batch for one file to the end of a buffer; what stands before `start` in the buffer is none
/// of its business.
pub(crate) struct BatchWriter<'a> {
    pub(crate) salt: u32,
    /// Offset of the batch in the file.
    pub(crate) base: u64,
    pub(crate) start: usize,
    pub(crate) out: &'a mut Vec<u8>,
}

impl BatchWriter<'_> {
    fn push(&mut self, length: u32, payload: &[u8]) {
        let written = self.out.len().saturating_sub(self.start) as u64;
        let crc = frame_crc(
            self.salt,
            self.base.saturating_add(written),
            length,
            payload,
        );
        self.out.extend_from_slice(&length.to_le_bytes());
        self.out.extend_from_slice(&crc.to_le_bytes());
        self.out.extend_from_slice(payload);
        self.pad(ALIGN);
    }

    fn pad(&mut self, align: usize) {
        let written = self.out.len().saturating_sub(self.start);
        self.out
            .resize(self.start + written.next_multiple_of(align), 0);
    }

    pub(crate) fn mark(&mut self, mark: &Mark) {
        let mut payload = [0; MARK_LEN];
        let parts: [&[u8]; 6] = [
            &mark.size.to_le_bytes(),
            &mark.signed_size.to_le_bytes(),
            &mark.signature,
            &mark.count.to_le_bytes(),
            &mark.bytes.to_le_bytes(),
            mark.root_after.as_bytes(),
        ];
        for (slot, byte) in payload.iter_mut().zip(parts.iter().copied().flatten()) {
            *slot = *byte;
        }
        self.push(len32(&payload) | MARK_BIT, &payload);
    }

    pub(crate) fn record(&mut self, record: &[u8]) {
        self.push(len32(record), record);
    }

    /// Fills up the last sector.
    pub(crate) fn end(&mut self) {
        self.pad(BATCH_ALIGN);
    }
}

/// Bytes of the mark and the record frames of a batch, without the zeros at the end.
pub(crate) fn batch_bytes(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.fold(MARK_BYTES, |sum, length| {
        sum.saturating_add(frame_bytes(length))
    })
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
        payload_len == MARK_LEN || payload_len == MARK_LEN_1
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
    if !all_zero(file.get(offset + FRAME_HEAD + payload_len..end)?) {
        return None;
    }
    let frame = if is_mark {
        Frame::Mark(payload)
    } else {
        Frame::Record(payload)
    };
    Some((frame, end))
}

fn all_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn parse_mark(payload: &[u8]) -> Option<Mark> {
    let (size, rest) = payload.split_first_chunk::<8>()?;
    let (signed_size, rest) = rest.split_first_chunk::<8>()?;
    let (signature, rest) = rest.split_first_chunk::<64>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let (bytes, rest) = rest.split_first_chunk::<4>()?;
    Some(Mark {
        size: u64::from_le_bytes(*size),
        signed_size: u64::from_le_bytes(*signed_size),
        signature: *signature,
        count: u32::from_le_bytes(*count),
        bytes: u32::from_le_bytes(*bytes),
        root_after: Sha256Hash::from_bytes(<[u8; 32]>::try_from(rest).ok()?),
    })
}

fn read_mark(file: &[u8], salt: u32, offset: usize) -> Option<Mark> {
    let length = u32::from_le_bytes(*file.get(offset..)?.first_chunk::<4>()?);
    // Looked at before the checksum: almost every offset ends here.
    if length & MARK_BIT == 0 {
        return None;
    }
    match read_frame(file, salt, 0, offset)?.0 {
        Frame::Mark(payload) => parse_mark(payload),
        Frame::Record(_) => None,
    }
}

/// The records of a batch whose mark stands at `offset`, the tree after them, and the offset after it;
/// `None` if anything in it is not what the mark says.
fn read_batch<'a>(
    file: &'a [u8],
    salt: u32,
    mark: &Mark,
    offset: usize,
    before: &Frontier,
) -> Option<(Vec<&'a [u8]>, Frontier, usize)> {
    let end = offset.checked_add(usize::try_from(mark.bytes).ok()?)?;
    let next = end.checked_next_multiple_of(BATCH_ALIGN)?;
    let padding = file.get(end..next)?;
    let mut at = offset.checked_add(MARK_BYTES)?;
    let mut records = Vec::new();
    let mut tree = before.clone();
    while at < end {
        let (Frame::Record(record), after) = read_frame(file, salt, 0, at)? else {
            return None;
        };
        tree.append(leaf_hash(record));
        records.push(record);
        at = after;
    }
    let whole = at == end
        && records.len() == usize::try_from(mark.count).ok()?
        && tree.root() == mark.root_after
        && all_zero(padding);
    whole.then_some((records, tree, next))
}

/// The last valid mark at or after `from`: it attests the bytes below it.
pub(crate) fn mark_after(file: &[u8], salt: u32, from: usize) -> Option<(usize, Mark)> {
    (from.next_multiple_of(BATCH_ALIGN)..file.len())
        .step_by(BATCH_ALIGN)
        .rev()
        .find_map(|at| Some((at, read_mark(file, salt, at)?)))
}

/// A head that the log key has signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SignedHead {
    pub(crate) size: u64,
    pub(crate) root: Sha256Hash,
    pub(crate) signature: [u8; 64],
}

/// What a file holds that was made ready under the name of `sequence`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// It was taken into use.
    Begun(Box<LogHeader>),
    /// It was not: nothing in it was ever acknowledged. The mark is that of a first batch that was
    /// cut off.
    Prepared(Option<Mark>),
    /// It was taken into use and cannot be read.
    Damaged(String),
}

/// Tells what a log file is. The header is written and synced together with the first batch, so a file
/// without one holds nothing that was acknowledged, unless a later batch is in it. (The header of an
/// earlier use is zeroed before a file gets its new name.)
pub(crate) fn classify(
    file: &[u8],
    domain: &DomainId,
    origin: &Origin,
    sequence: u64,
    key: &LogKey,
) -> Content {
    match LogHeader::decode(file) {
        Ok(header)
            if header.sequence == sequence
                && header.origin == *origin
                && header.domain == *domain =>
        {
            Content::Begun(Box::new(header))
        }
        Ok(_) => Content::Damaged("it belongs to another log or place".to_owned()),
        Err(error @ LogHeaderError::FileLength { .. }) => Content::Damaged(error.to_string()),
        Err(error @ LogHeaderError::Invalid) => {
            let salt = derive_salt(key, origin, sequence);
            let first = usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX);
            let later = mark_after(file, salt, first.saturating_add(1)).is_some();
            let old = file.starts_with(LOG_MAGIC_1)
                || mark_after_1(file, salt_1_of(domain, origin, sequence), first).is_some();
            if later || old {
                Content::Damaged(error.to_string())
            } else {
                Content::Prepared(read_mark(file, salt, first))
            }
        }
    }
}

/// Whether a file was only made ready: it has no header. For readers without the log key.
pub(crate) fn was_not_begun(file: &[u8]) -> bool {
    let block = usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX);
    file.get(..block).is_some_and(all_zero)
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
    /// Offset after the last whole batch.
    pub(crate) end: usize,
    /// The newest signed head that the file carries, verified.
    pub(crate) signed: Option<SignedHead>,
    /// Bytes of a batch that was cut off; never acknowledged.
    pub(crate) torn_bytes: u64,
    /// The records in it, from its mark or else from the length fields that can be read.
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

/// Where a scan stands.
struct Reader<'a> {
    file: &'a [u8],
    salt: u32,
    at: usize,
    tree: Frontier,
    records: Vec<u8>,
    count: u32,
    /// Every head that the file passes through, by size.
    heads: Vec<(u64, Sha256Hash)>,
    /// The newest signature: size of its head, the signature, offset of the mark.
    signed: Option<(u64, [u8; 64], usize)>,
}

impl Reader<'_> {
    fn take(&mut self, record: &[u8]) {
        push_record(&mut self.records, record);
        self.count = self.count.saturating_add(1);
    }

    /// Batches, as long as they are whole.
    fn batches(&mut self) -> Result<Option<Mark>, Damage> {
        while let Some(mark) = read_mark(self.file, self.salt, self.at) {
            if mark.size != self.tree.size() || mark.signed_size > mark.size {
                return Err(Damage::Mark { at: self.at as u64 });
            }
            let Some((records, tree, next)) =
                read_batch(self.file, self.salt, &mark, self.at, &self.tree)
            else {
                return Ok(Some(mark));
            };
            records.into_iter().for_each(|record| self.take(record));
            self.signed = Some((mark.signed_size, mark.signature, self.at));
            self.heads.push((tree.size(), tree.root()));
            self.tree = tree;
            self.at = next;
        }
        Ok(None)
    }

    /// Frames of the version before: marks stand anywhere between records and name their root.
    fn frames_1(&mut self) -> Result<(), Damage> {
        while let Some((frame, next)) = read_frame(self.file, self.salt, 0, self.at) {
            match frame {
                Frame::Record(record) => {
                    self.tree.append(leaf_hash(record));
                    self.take(record);
                }
                Frame::Mark(payload) => {
                    let (size, root, signature) = parse_mark_1(payload)
                        .filter(|(size, root, _)| {
                            *size == self.tree.size() && *root == self.tree.root()
                        })
                        .ok_or(Damage::Mark { at: self.at as u64 })?;
                    self.heads.push((size, root));
                    self.signed = Some((size, signature, self.at));
                }
            }
            self.at = next;
        }
        Ok(())
    }
}

fn parse_mark_1(payload: &[u8]) -> Option<(u64, Sha256Hash, [u8; 64])> {
    let (size, rest) = payload.split_first_chunk::<8>()?;
    let (root, rest) = rest.split_first_chunk::<32>()?;
    Some((
        u64::from_le_bytes(*size),
        Sha256Hash::from_bytes(*root),
        <[u8; 64]>::try_from(rest).ok()?,
    ))
}

fn mark_after_1(file: &[u8], salt: u32, from: usize) -> Option<usize> {
    (from.next_multiple_of(ALIGN)..file.len())
        .step_by(ALIGN)
        .find(|at| {
            file.get(*at..)
                .and_then(<[u8]>::first_chunk::<4>)
                .is_some_and(|length| u32::from_le_bytes(*length) & MARK_BIT != 0)
                && matches!(read_frame(file, salt, 0, *at), Some((Frame::Mark(_), _)))
        })
}

/// Reads all batches of an active file.
pub(crate) fn scan(file: &[u8], header: &LogHeader, origin_line: &str) -> Result<Scan, Damage> {
    let tree = header.tree().map_err(|e| Damage::Header(e.to_string()))?;
    let mut reader = Reader {
        file,
        salt: header.salt,
        at: usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX),
        records: Vec::with_capacity(file.len()),
        count: 0,
        heads: vec![(tree.size(), tree.root())],
        tree,
        signed: None,
    };
    let (torn_mark, attested) = if header.version_1 {
        reader.frames_1()?;
        (None, mark_after_1(file, header.salt, reader.at))
    } else {
        let torn = reader.batches()?;
        let from = reader.at.saturating_add(BATCH_ALIGN);
        let later = mark_after(file, header.salt, from).filter(|(_, mark)| {
            // One of this file, written after what is above.
            mark.size >= reader.tree.size()
        });
        (torn, later.map(|(at, _)| at))
    };
    if let Some(attested) = attested {
        // INV-17 and ruling 24: what a mark attests was acknowledged, so this is not a torn tail.
        return Err(Damage::Frame {
            at: reader.at as u64,
            attested: attested as u64,
        });
    }
    let signed = verify_signed(&reader, header, origin_line)?;
    let (torn_bytes, torn_records) = match torn_mark {
        Some(mark) => (u64::from(mark.bytes), u64::from(mark.count).max(1)),
        // Bytes of the file's earlier use say nothing.
        None if header.stale => (0, 0),
        None => {
            let tail = file.get(reader.at..).unwrap_or_default();
            let last = tail.iter().rposition(|byte| *byte != 0);
            let torn = last.map_or(0, |last| last + 1);
            let records = estimate_records(tail.get(..torn).unwrap_or_default());
            (torn as u64, records)
        }
    };
    Ok(Scan {
        records: reader.records,
        count: reader.count,
        tree: reader.tree,
        end: reader.at,
        signed,
        torn_bytes,
        torn_records,
    })
}

/// The newest signature covers everything below it, so it alone is verified. One of a head in an
/// earlier file is judged there.
fn verify_signed(
    reader: &Reader<'_>,
    header: &LogHeader,
    origin_line: &str,
) -> Result<Option<SignedHead>, Damage> {
    let Some((size, signature, at)) = reader.signed else {
        return Ok(None);
    };
    if size < header.first_index {
        return Ok(None);
    }
    let root = reader
        .heads
        .binary_search_by_key(&size, |(size, _)| *size)
        .ok()
        .and_then(|found| reader.heads.get(found))
        .map(|(_, root)| *root);
    let head = root.map(|root| Checkpoint {
        origin_line: origin_line.to_owned(),
        size,
        root,
    });
    match head {
        Some(head)
            if header
                .log_key
                .verify(head.text().as_bytes(), &signature)
                .is_ok() =>
        {
            Ok(Some(SignedHead {
                size,
                root: head.root,
                signature,
            }))
        }
        _ => Err(Damage::Mark { at: at as u64 }),
    }
}

/// The highest head that a damaged file still tells of, as (size, root): the end of its whole batches,
/// or what its last valid mark says its batch led to.
pub(crate) fn highest_head(file: &[u8], header: &LogHeader) -> Option<(u64, Sha256Hash)> {
    let tree = header.tree().ok()?;
    let whole = {
        let mut reader = Reader {
            file,
            salt: header.salt,
            at: usize::try_from(LOG_HEADER_BYTES).ok()?,
            records: Vec::new(),
            count: 0,
            heads: Vec::new(),
            tree,
            signed: None,
        };
        let _ = if header.version_1 {
            reader.frames_1().map(|()| None)
        } else {
            reader.batches()
        };
        (reader.tree.size(), reader.tree.root())
    };
    let from = usize::try_from(LOG_HEADER_BYTES).ok()?;
    let last = (!header.version_1)
        .then(|| mark_after(file, header.salt, from))
        .flatten()
        .map(|(_, mark)| {
            (
                mark.size.saturating_add(u64::from(mark.count)),
                mark.root_after,
            )
        });
    Some(last.filter(|(size, _)| *size > whole.0).unwrap_or(whole))
}

/// Makes the checksum of the frame at `at` right again; gives where its payload lies.
fn reseal_frame(file: &mut [u8], salt: u32, at: usize) -> Option<Range<usize>> {
    let length = u32::from_le_bytes(*file.get(at..)?.first_chunk()?);
    if length == 0 {
        return None;
    }
    let begin = at.checked_add(FRAME_HEAD)?;
    let end = begin.checked_add(usize::try_from(length & !MARK_BIT).ok()?)?;
    let crc = frame_crc(salt, at as u64, length, file.get(begin..end)?);
    file.get_mut(at.checked_add(4)?..begin)?
        .copy_from_slice(&crc.to_le_bytes());
    Some(begin..end)
}

/// For the fuzz harness: makes the checksums in changed frames of the version before right again, as
/// far as their length fields lead.
pub(crate) fn reseal_frames_1(file: &mut [u8], header: &LogHeader) {
    let mut at = usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX);
    while let Some(payload) = reseal_frame(file, header.salt, at) {
        at = payload.end.next_multiple_of(ALIGN);
    }
}

/// For the fuzz harness: makes changed batches pass, one after the other as far as their marks lead.
/// Checksums, roots and signatures become right; sizes, lengths and counts stay as they are.
pub(crate) fn reseal_batches(file: &mut [u8], header: &LogHeader, key: &LogKey) {
    let Ok(mut tree) = header.tree() else { return };
    let line = checkpoint::origin_line(&header.domain, &header.origin).unwrap_or_default();
    let mut heads = vec![(tree.size(), tree.root())];
    let mut at = usize::try_from(LOG_HEADER_BYTES).unwrap_or(usize::MAX);
    while let Some(payload) = reseal_frame(file, header.salt, at)
        && let Some(mark) = file.get(payload.clone()).and_then(parse_mark)
    {
        let end = at.saturating_add(usize::try_from(mark.bytes).unwrap_or(usize::MAX));
        let mut next = at.saturating_add(MARK_BYTES);
        while next < end
            && let Some(record) = reseal_frame(file, header.salt, next)
        {
            tree.append(leaf_hash(file.get(record.clone()).unwrap_or_default()));
            next = record.end.next_multiple_of(ALIGN);
        }
        let signed = heads.iter().find(|(size, _)| *size == mark.signed_size);
        let signature = signed.map_or(mark.signature, |(size, root)| {
            let head = Checkpoint {
                origin_line: line.clone(),
                size: *size,
                root: *root,
            };
            key.sign(head.text().as_bytes())
        });
        let root = tree.root();
        let parts: [(usize, &[u8]); 2] = [(16, &signature), (88, root.as_bytes())];
        for (from, part) in parts {
            let place = payload.start + from;
            if let Some(field) = file.get_mut(place..place + part.len()) {
                field.copy_from_slice(part);
            }
        }
        reseal_frame(file, header.salt, at);
        heads.push((tree.size(), root));
        at = end.max(next).next_multiple_of(BATCH_ALIGN);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::iter_records;
    use crate::id::NodeId;

    const FILE_BYTES: usize = 128 * 1024;

    struct File {
        key: LogKey,
        header: LogHeader,
        bytes: Vec<u8>,
        at: usize,
        tree: Frontier,
    }

    impl File {
        fn new(sequence: u64, first: &Frontier, old: Option<Vec<u8>>) -> Self {
            let key = LogKey::from_seed(&[7; 32]).unwrap();
            let origin = Origin::audit(&NodeId::new("n1").unwrap(), &key.public(), 1);
            let header = LogHeader {
                domain: DomainId::new("site").unwrap(),
                log_key: key.public(),
                sequence,
                first_index: first.size(),
                frontier: first.hashes().iter().map(|h| *h.as_bytes()).collect(),
                file_bytes: FILE_BYTES as u64,
                created_unix_ms: 5,
                salt: derive_salt(&key, &origin, sequence),
                stale: old.is_some(),
                version_1: false,
                origin,
            };
            let mut bytes = old.unwrap_or_else(|| vec![0; FILE_BYTES]);
            bytes[..4096].copy_from_slice(&header.encode().unwrap());
            Self {
                key,
                header,
                bytes,
                at: 4096,
                tree: first.clone(),
            }
        }

        fn line(&self) -> String {
            checkpoint::origin_line(&self.header.domain, &self.header.origin).unwrap()
        }

        fn batch(&mut self, records: &[&[u8]]) {
            let head = Checkpoint {
                origin_line: self.line(),
                size: self.tree.size(),
                root: self.tree.root(),
            };
            for record in records {
                self.tree.append(leaf_hash(record));
            }
            let mut out = Vec::new();
            let mut writer = BatchWriter {
                salt: self.header.salt,
                base: self.at as u64,
                start: 0,
                out: &mut out,
            };
            writer.mark(&Mark {
                size: head.size,
                signed_size: head.size,
                signature: self.key.sign(head.text().as_bytes()),
                count: u32::try_from(records.len()).unwrap(),
                bytes: u32::try_from(batch_bytes(records.iter().map(|r| r.len()))).unwrap(),
                root_after: self.tree.root(),
            });
            records.iter().for_each(|record| writer.record(record));
            writer.end();
            assert_eq!(out.len() % BATCH_ALIGN, 0);
            self.bytes[self.at..self.at + out.len()].copy_from_slice(&out);
            self.at += out.len();
        }

        fn scan(&self) -> Result<Scan, Damage> {
            scan(&self.bytes, &self.header, &self.line())
        }

        fn classify(&self, sequence: u64) -> Content {
            let header = &self.header;
            classify(
                &self.bytes,
                &header.domain,
                &header.origin,
                sequence,
                &self.key,
            )
        }
    }

    #[test]
    fn batches_read_back_and_keep_to_their_sectors() {
        let mut file = File::new(0, &Frontier::new(), None);
        file.batch(&[b"one", &[2; 700]]);
        file.batch(&[]);
        file.batch(&[b"three"]);
        let found = file.scan().unwrap();
        assert_eq!(found.count, 3);
        assert_eq!(found.tree, file.tree);
        assert_eq!(found.end, file.at);
        assert_eq!(found.signed.unwrap().size, 2);
        assert_eq!((found.torn_bytes, found.torn_records), (0, 0));
        let records: Vec<&[u8]> = iter_records(&found.records).collect();
        assert_eq!(records, [b"one".as_slice(), &[2; 700], b"three"]);
        assert!(matches!(file.classify(0), Content::Begun(_)));
        assert!(matches!(file.classify(1), Content::Damaged(_)));
    }

    #[test]
    fn a_batch_counts_whole_or_not_at_all() {
        let mut file = File::new(0, &Frontier::new(), None);
        file.batch(&[b"kept"]);
        let end = file.at;
        file.batch(&[&[1; 600], &[2; 600], &[3; 600]]);
        let good = file.bytes.clone();
        for sector in (end..file.at).step_by(BATCH_ALIGN) {
            file.bytes[sector..sector + BATCH_ALIGN].fill(0);
            let found = file.scan().unwrap();
            assert_eq!((found.count, found.end), (1, end), "sector {sector}");
            assert!(found.torn_bytes > 0);
            file.bytes.clone_from(&good);
        }
        assert_eq!(file.scan().unwrap().count, 4);
    }

    #[test]
    fn damage_below_a_mark_is_told_from_a_torn_tail() {
        let mut file = File::new(0, &Frontier::new(), None);
        file.batch(&[b"acknowledged"]);
        let end = file.at;
        file.batch(&[b"last"]);
        let good = file.bytes.clone();
        for at in 4096..end {
            file.bytes[at] ^= 1;
            assert!(file.scan().is_err(), "byte {at}");
            file.bytes.clone_from(&good);
        }
        assert!(file.scan().is_ok());
    }

    #[test]
    fn stale_batches_never_pass_in_the_next_use_of_a_file() {
        let mut old = File::new(0, &Frontier::new(), None);
        for _ in 0..20 {
            old.batch(&[&[9; 300]]);
        }
        let mut new = File::new(1, &old.tree, Some(old.bytes.clone()));
        assert_eq!(new.scan().unwrap().count, 0);
        new.batch(&[b"fresh"]);
        let end = new.at;
        assert_eq!(new.scan().unwrap().count, 1);
        // A batch cut off in the middle continues with stale frames of the same lengths.
        new.batch(&[&[9; 300], &[9; 300], &[9; 300]]);
        new.bytes[end + 1024..end + 1536].copy_from_slice(&old.bytes[end + 1024..end + 1536]);
        let found = new.scan().unwrap();
        assert_eq!((found.count, found.end, found.torn_records), (1, end, 3));
        // Even if both uses had the same salt, as a foreign file might: the sizes do not fit.
        let mut same = File::new(1, &old.tree, Some(old.bytes.clone()));
        same.header.salt = old.header.salt;
        assert!(same.scan().is_err());
    }

    #[test]
    fn a_file_without_its_header_holds_nothing_unless_a_later_batch_is_in_it() {
        let mut file = File::new(0, &Frontier::new(), None);
        assert!(!was_not_begun(&file.bytes));
        file.bytes[..4096].fill(0);
        assert!(was_not_begun(&file.bytes));
        assert_eq!(file.classify(0), Content::Prepared(None));
        file.batch(&[b"first"]);
        assert!(matches!(file.classify(0), Content::Prepared(Some(_))));
        file.batch(&[b"second"]);
        assert!(matches!(file.classify(0), Content::Damaged(_)));
    }

    #[test]
    fn changed_batches_pass_when_they_are_resealed() {
        let mut file = File::new(0, &Frontier::new(), None);
        file.batch(&[b"one", b"two"]);
        let second = file.at;
        file.batch(&[b"three"]);
        file.batch(&[b"four"]);
        let good = file.bytes.clone();
        reseal_batches(&mut file.bytes, &file.header, &file.key);
        assert!(file.bytes == good, "what is right is not changed");
        // A byte of the second batch's record, and it is read with all that follows.
        file.bytes[second + MARK_BYTES + FRAME_HEAD] ^= 1;
        assert!(file.scan().is_err());
        reseal_batches(&mut file.bytes, &file.header, &file.key);
        let found = file.scan().unwrap();
        assert_eq!((found.count, found.signed.unwrap().size), (4, 3));
        assert_eq!(iter_records(&found.records).nth(2), Some(&b"uhree"[..]));
    }

    #[test]
    fn the_version_before_is_read() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/vectors/segments/active-1.json"
        );
        let vector: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let hex = vector["hex_without_trailing_zeros"].as_str().unwrap();
        let mut bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        bytes.resize(
            usize::try_from(vector["file_bytes"].as_u64().unwrap()).unwrap(),
            0,
        );
        let header = LogHeader::decode(&bytes).unwrap();
        assert!(header.version_1);
        let line = checkpoint::origin_line(&header.domain, &header.origin).unwrap();
        let found = scan(&bytes, &header, &line).unwrap();
        assert_eq!(found.count, 1);
        assert_eq!(iter_records(&found.records).next().unwrap(), b"{\"n\":4}");
        assert!(found.signed.is_some());
        // Positive control: damage is seen there too.
        bytes[4096] ^= 1;
        assert!(scan(&bytes, &header, &line).map_or(true, |s| s.torn_bytes > 0));
    }
}
