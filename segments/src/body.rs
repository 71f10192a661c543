//! The body of a sealed audit segment: what `docs/src/format.md` calls version 1 and version 2.
//!
//! Both begin with `version | first index | count | frontier | checkpoint`, so that a reader of the
//! first few kilobytes knows the span and the root. Version 1 goes on with the records. Version 2, the
//! one that is written, goes on with the tree after them and an index of blocks: 64 KiB of records
//! each, compressed with zstd and sealed with AES-256-GCM as the flags say. Whoever has no key, or does
//! not need the records, checks everything in front of the blocks; one record costs one block.
//!
//! Nothing here trusts a length: the index must add up to the bytes that are there before anything is
//! allocated, a block is unpacked into a buffer of exactly the length that the index states, and a
//! block is one zstd frame with nothing behind it.

use std::sync::Arc;

use serde::Serialize;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

use crate::checkpoint::{self, Checkpoint, CheckpointError};
use crate::crypt::{self, BlockCipher, CryptError, KeyUnwrap, KeyWrap, TAG_BYTES, WrappedKey};
use crate::id::{DomainId, Origin, Sha256Hash};
use crate::keys::LogPublicKey;
use crate::limits::{
    BLOCK_BYTES, MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_CHECKPOINT_BYTES, MAX_RAW_BYTES,
    MAX_RECORD_BYTES, MAX_WRAPPED_BYTES, MAX_WRAPPED_KEYS, MAX_ZSTD_GROWTH_BYTES,
};
use crate::merkle::{Frontier, MerkleError, PartialTree};

/// Records one after the other.
const VERSION_1: u16 = 1;
/// Records in blocks: the version that is written.
const VERSION_2: u16 = 2;

const FLAG_ZSTD: u8 = 1;
const FLAG_ENCRYPTED: u8 = 2;

/// Before each record: its length. As the length is at most 65,535, the last byte of it is zero, which
/// is the prefix of an RFC 6962 leaf: prefix and record are hashed where they lie.
const RECORD_HEAD: usize = 4;

/// The smallest record with its length.
const MIN_RECORD: u32 = 5;

/// An entry of the block index.
const ENTRY_BYTES: usize = 12;

/// The first bytes of every zstd frame that is not a skippable one.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Chosen by measurement on decision records: in 64 KiB blocks level 1 is smaller than 2 to 9 and costs
/// a quarter of 6; 15 would save a tenth more for a hundred times the time. `docs/src/format.md` has the
/// figures. A reader does not depend on it.
const ZSTD_LEVEL: i32 = 1;

/// Whether sealed segments are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Records are stored as they are.
    Off,
    /// Each block is a zstd frame.
    #[default]
    Zstd,
}

/// How a log's segments are sealed. The default compresses and does not encrypt.
#[derive(Debug, Clone, Default)]
pub struct SealOptions {
    /// Whether blocks are compressed.
    pub compression: Compression,
    /// To whom the key of each segment is wrapped; `None` leaves the records readable by all.
    pub encryption: Option<Arc<dyn KeyWrap>>,
    /// With what the node itself reads its sealed segments again, where it can. Without it an encrypted
    /// log goes on all the same; only `AuditLog::tail` ends where the sealed part begins.
    pub decryption: Option<Arc<dyn KeyUnwrap>>,
}

/// Why the body of an audit segment was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BodyError {
    /// A version that this reader does not know.
    #[error("audit body version {0} is not known; a newer node wrote it")]
    Version(u16),
    /// A flag that this reader does not know.
    #[error("audit body flags {0:#04x} are not known; a newer node wrote it")]
    Flags(u8),
    /// The lengths inside do not add up.
    #[error("truncated or with bytes left over, in the {0}")]
    Length(&'static str),
    /// No record, or more than an index can count.
    #[error("a sealed segment holds at least one record and its last index fits 64 bits")]
    Count,
    /// A record is empty or too long.
    #[error("record {index} has {length} bytes; it must have 1 to 65535")]
    Record {
        /// Its index.
        index: u64,
        /// Its length.
        length: usize,
    },
    /// The checkpoint is malformed or of another log.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint's size is not the index after the last record.
    #[error("the checkpoint's size {found} is not {expected}, the end of the records")]
    Size {
        /// In the checkpoint.
        found: u64,
        /// Computed.
        expected: u64,
    },
    /// The records do not lead to the checkpoint's root.
    #[error("the records lead to root {computed} but the checkpoint states {stated}")]
    Root {
        /// From the records.
        computed: Sha256Hash,
        /// In the checkpoint.
        stated: Sha256Hash,
    },
    /// The frontier has the wrong number of hashes.
    #[error("frontier: {0}")]
    Frontier(#[from] MerkleError),
    /// The index of blocks contradicts itself or a limit.
    #[error("block index: {0}")]
    Index(&'static str),
    /// A block is not what the index says.
    #[error("block {block}: {what}")]
    Block {
        /// Its number, from 0.
        block: u32,
        /// What does not fit.
        what: &'static str,
    },
    /// The records are encrypted and no key was given.
    #[error("the records are encrypted; give the key to read them")]
    Encrypted,
    /// A key is missing or another, or could not be wrapped.
    #[error(transparent)]
    Crypt(#[from] CryptError),
    /// zstd refused to work; a fault of this program or want of memory.
    #[error("zstd: {0}")]
    Zstd(String),
    /// The record asked for is in another segment.
    #[error("record {0} is not in this segment")]
    Absent(u64),
}

/// Which records an audit segment holds, and the tree's root after the last of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AuditSpan {
    /// Index of the first record.
    pub first: u64,
    /// Index of the last record.
    pub last: u64,
    /// Root of the tree over records `0..=last`.
    pub root: Sha256Hash,
}

/// One block: where it starts among the records, and its bytes as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block<'a> {
    /// Offset of its first record from the segment's first.
    first: u32,
    count: u32,
    raw_len: usize,
    stored: &'a [u8],
    encrypted: bool,
    zstd: bool,
}

/// The body of an audit segment, taken apart. Its form was checked, except what is inside the blocks of
/// version 2; whether the records lead to the root is checked by [`AuditBody::check_tree`], which reads
/// and hashes every record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditBody<'a> {
    version: u16,
    first: u64,
    last: u64,
    before: Frontier,
    checkpoint: Checkpoint,
    note: &'a str,
    after: Option<Frontier>,
    wrapped: Vec<WrappedKey>,
    front: &'a [u8],
    blocks: Vec<Block<'a>>,
}

impl<'a> AuditBody<'a> {
    /// The version of its layout: 1 or 2.
    #[must_use]
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The span of records.
    #[must_use]
    pub fn span(&self) -> AuditSpan {
        AuditSpan {
            first: self.first,
            last: self.last,
            root: self.checkpoint.root,
        }
    }

    /// The signed note of the checkpoint at the last record.
    #[must_use]
    pub fn checkpoint_note(&self) -> &'a str {
        self.note
    }

    /// The tree before the first record.
    #[must_use]
    pub fn frontier_before(&self) -> &Frontier {
        &self.before
    }

    /// The tree after the last record, which version 2 states and which has the checkpoint's root.
    #[must_use]
    pub fn frontier_after(&self) -> Option<&Frontier> {
        self.after.as_ref()
    }

    /// Whether reading the records takes a key.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        !self.wrapped.is_empty()
    }

    /// The segment key, wrapped to each recipient; empty where nothing is encrypted.
    #[must_use]
    pub fn wrapped_keys(&self) -> &[WrappedKey] {
        &self.wrapped
    }

    /// Bytes of the records and their lengths, before compression.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.raw_len as u64).sum()
    }

    /// Bytes that they take as stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.blocks
            .iter()
            .map(|block| block.stored.len() as u64)
            .sum()
    }

    /// Reads the records in order, one block in memory at a time.
    ///
    /// # Errors
    /// [`BodyError::Encrypted`] without a key for an encrypted body, [`BodyError::Crypt`] with a wrong one.
    pub fn records(&self, keys: Option<&dyn KeyUnwrap>) -> Result<RecordReader<'_, 'a>, BodyError> {
        if self.is_encrypted() && keys.is_none() {
            return Err(BodyError::Encrypted);
        }
        Ok(RecordReader {
            blocks: BlockReader::new(self, keys)?,
            number: 0,
            raw: Raw::Stored(&[]),
            at: 0,
            left: 0,
            index: self.first,
        })
    }

    /// Reads one record, and only the block that holds it. Whether it is the one that the checkpoint
    /// covers shows with [`crate::prove_record`]. Record 0 of a log is never encrypted.
    ///
    /// # Errors
    /// [`BodyError::Absent`] if another segment holds it; otherwise as [`AuditBody::records`].
    pub fn record(&self, index: u64, keys: Option<&dyn KeyUnwrap>) -> Result<Vec<u8>, BodyError> {
        let absent = || BodyError::Absent(index);
        let offset = index
            .checked_sub(self.first)
            .filter(|_| index <= self.last)
            .and_then(|offset| u32::try_from(offset).ok())
            .ok_or_else(absent)?;
        let number = self
            .blocks
            .partition_point(|block| block.first <= offset)
            .checked_sub(1)
            .ok_or_else(absent)?;
        let block = self.blocks.get(number).ok_or_else(absent)?;
        let keys = keys.filter(|_| block.encrypted);
        let mut reader = BlockReader::new(self, keys)?;
        let raw = match reader.load(number)? {
            Raw::Stored(bytes) => bytes,
            Raw::Unpacked => reader.raw.as_slice(),
        };
        let mut found = None;
        walk(raw, block, self.first, number, |at, leaf| {
            if at == index {
                found = leaf.get(1..).map(<[u8]>::to_vec);
            }
        })?;
        found.ok_or_else(absent)
    }

    /// Checks the signature of the checkpoint by `key`, without reading a record.
    ///
    /// # Errors
    /// [`BodyError::Checkpoint`].
    pub fn check_checkpoint(&self, key: &LogPublicKey) -> Result<(), BodyError> {
        Checkpoint::verify(self.note, &self.checkpoint.origin_line, key)?;
        Ok(())
    }

    /// Hashes every record and compares with the checkpoint, whose signature by `key` is checked
    /// too. Gives the tree after the last record.
    ///
    /// # Errors
    /// [`BodyError::Root`] or [`BodyError::Checkpoint`] if it does not fit; as [`AuditBody::records`] and
    /// [`BodyError::Block`] if the records cannot be read.
    pub fn check_tree(
        &self,
        key: &LogPublicKey,
        keys: Option<&dyn KeyUnwrap>,
    ) -> Result<Frontier, BodyError> {
        self.check_tree_at(key, keys, &[]).map(|(tree, _)| tree)
    }

    /// As [`AuditBody::check_tree`]; gives the roots at those of these sizes that lie in this segment, too.
    pub(crate) fn check_tree_at(
        &self,
        key: &LogPublicKey,
        keys: Option<&dyn KeyUnwrap>,
        sizes: &[u64],
    ) -> Result<(Frontier, Vec<(u64, Sha256Hash)>), BodyError> {
        self.check_checkpoint(key)?;
        let mut tree = self.before.clone();
        let mut roots = Vec::new();
        self.each_leaf(keys, |leaf| {
            tree.append(leaf);
            if sizes.contains(&tree.size()) {
                roots.push((tree.size(), tree.root()));
            }
        })?;
        let computed = tree.root();
        if computed != self.checkpoint.root {
            return Err(BodyError::Root {
                computed,
                stated: self.checkpoint.root,
            });
        }
        Ok((tree, roots))
    }

    /// The tree with the leaves of this segment, from which proofs are made.
    ///
    /// # Errors
    /// As [`AuditBody::records`], and [`BodyError::Root`] if it is not the checkpoint's tree.
    pub(crate) fn tree(&self, keys: Option<&dyn KeyUnwrap>) -> Result<PartialTree, BodyError> {
        let mut tree = PartialTree::new(self.before.clone());
        self.each_leaf(keys, |leaf| tree.push(leaf))?;
        let computed = tree.root();
        if computed != self.checkpoint.root {
            return Err(BodyError::Root {
                computed,
                stated: self.checkpoint.root,
            });
        }
        Ok(tree)
    }

    fn each_leaf(
        &self,
        keys: Option<&dyn KeyUnwrap>,
        mut leaf: impl FnMut(Sha256Hash),
    ) -> Result<(), BodyError> {
        if self.is_encrypted() && keys.is_none() {
            return Err(BodyError::Encrypted);
        }
        let mut reader = BlockReader::new(self, keys)?;
        for (number, block) in self.blocks.iter().enumerate() {
            let raw = match reader.load(number)? {
                Raw::Stored(bytes) => bytes,
                Raw::Unpacked => reader.raw.as_slice(),
            };
            walk(raw, block, self.first, number, |_, bytes| {
                leaf(Sha256Hash::of(bytes));
            })?;
        }
        Ok(())
    }
}

/// Where the bytes of an unpacked block are.
#[derive(Clone, Copy)]
enum Raw<'a> {
    /// In the body itself.
    Stored(&'a [u8]),
    /// In the reader's buffer.
    Unpacked,
}

/// Unpacks blocks into buffers that it keeps, so that it never holds more than one.
struct BlockReader<'b, 'a> {
    body: &'b AuditBody<'a>,
    cipher: Option<BlockCipher>,
    zstd: Option<Decompressor<'static>>,
    opened: Vec<u8>,
    raw: Vec<u8>,
}

impl<'b, 'a> BlockReader<'b, 'a> {
    fn new(body: &'b AuditBody<'a>, keys: Option<&dyn KeyUnwrap>) -> Result<Self, BodyError> {
        let cipher = match keys {
            Some(keys) if body.is_encrypted() => {
                let key = keys.unwrap_key(&body.wrapped)?;
                Some(BlockCipher::new(&key, body.front)?)
            }
            _ => None,
        };
        Ok(Self {
            body,
            cipher,
            zstd: None,
            opened: Vec::new(),
            raw: Vec::new(),
        })
    }

    fn load(&mut self, number: usize) -> Result<Raw<'a>, BodyError> {
        let fault = |what| BodyError::Block {
            block: u32::try_from(number).unwrap_or(u32::MAX),
            what,
        };
        let block = self
            .body
            .blocks
            .get(number)
            .ok_or_else(|| fault("not in the index"))?;
        let mut bytes = block.stored;
        if block.encrypted {
            let cipher = self.cipher.as_ref().ok_or(BodyError::Encrypted)?;
            let refused = || fault("not what was encrypted here with this key");
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            if !block.zstd {
                cipher
                    .open(number, bytes, &mut self.raw)
                    .ok_or_else(refused)?;
                return Ok(Raw::Unpacked);
            }
            bytes = cipher
                .open(number, bytes, &mut self.opened)
                .ok_or_else(refused)?;
        }
        if !block.zstd {
            return Ok(Raw::Stored(block.stored));
        }
        let whole = bytes.starts_with(&ZSTD_MAGIC)
            && zstd_safe::find_frame_compressed_size(bytes) == Ok(bytes.len())
            && matches!(
                zstd_safe::get_frame_content_size(bytes),
                Ok(Some(length)) if length == block.raw_len as u64
            );
        if !whole {
            return Err(fault("not one zstd frame of the stated length"));
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            empty => empty
                .insert(Decompressor::new().map_err(|error| BodyError::Zstd(error.to_string()))?),
        };
        self.raw.resize(block.raw_len, 0);
        match zstd.decompress_to_buffer(bytes, self.raw.as_mut_slice()) {
            Ok(length) if length == block.raw_len => Ok(Raw::Unpacked),
            _ => Err(fault("does not unpack to the stated length")),
        }
    }
}

/// The end of the record whose length stands at `at`.
fn record_end(raw: &[u8], at: usize, index: u64) -> Result<usize, BodyError> {
    let head = raw
        .get(at..)
        .and_then(|rest| rest.first_chunk::<RECORD_HEAD>())
        .ok_or(BodyError::Length("record length"))?;
    let length = usize::try_from(u32::from_le_bytes(*head)).unwrap_or(usize::MAX);
    if length == 0 || length > MAX_RECORD_BYTES {
        return Err(BodyError::Record { index, length });
    }
    let end = at + RECORD_HEAD + length;
    if end > raw.len() {
        return Err(BodyError::Length("records"));
    }
    Ok(end)
}

/// Calls `each` with the index and the leaf (a zero byte and the record) of every record of a block.
fn walk(
    raw: &[u8],
    block: &Block<'_>,
    first: u64,
    number: usize,
    mut each: impl FnMut(u64, &[u8]),
) -> Result<(), BodyError> {
    let mut at = 0;
    let start = first.saturating_add(block.first.into());
    for index in (start..).take(usize::try_from(block.count).unwrap_or(usize::MAX)) {
        let end = record_end(raw, at, index)?;
        each(
            index,
            raw.get(at + RECORD_HEAD - 1..end).unwrap_or_default(),
        );
        at = end;
    }
    if at != raw.len() {
        return Err(BodyError::Block {
            block: u32::try_from(number).unwrap_or(u32::MAX),
            what: "bytes left over after its last record",
        });
    }
    Ok(())
}

/// Reads records one after the other; see [`AuditBody::records`].
pub struct RecordReader<'b, 'a> {
    blocks: BlockReader<'b, 'a>,
    /// The block to load next.
    number: usize,
    raw: Raw<'a>,
    at: usize,
    /// Records left in the loaded block.
    left: u32,
    index: u64,
}

impl std::fmt::Debug for RecordReader<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordReader")
            .field("next", &self.index)
            .finish_non_exhaustive()
    }
}

impl RecordReader<'_, '_> {
    /// The next record with its index; `None` after the last. The bytes lie in the reader's buffer, so
    /// they are gone at the next call. (No `Iterator`, which could not lend them.)
    ///
    /// # Errors
    /// [`BodyError::Block`], [`BodyError::Record`] or [`BodyError::Length`] if a block is not what the index
    /// says.
    pub fn next_record(&mut self) -> Result<Option<(u64, &[u8])>, BodyError> {
        let blocks = &self.blocks.body.blocks;
        if self.left == 0 {
            let Some(block) = blocks.get(self.number) else {
                return Ok(None);
            };
            self.raw = self.blocks.load(self.number)?;
            self.number += 1;
            self.left = block.count;
            self.at = 0;
        }
        let raw = match self.raw {
            Raw::Stored(bytes) => bytes,
            Raw::Unpacked => self.blocks.raw.as_slice(),
        };
        let end = record_end(raw, self.at, self.index)?;
        let record = raw.get(self.at + RECORD_HEAD..end).unwrap_or_default();
        self.left -= 1;
        if self.left == 0 && end != raw.len() {
            return Err(BodyError::Block {
                block: u32::try_from(self.number - 1).unwrap_or(u32::MAX),
                what: "bytes left over after its last record",
            });
        }
        self.at = end;
        let index = self.index;
        self.index = index.saturating_add(1);
        Ok(Some((index, record)))
    }
}

/// Iterates `length | bytes` records.
struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (record, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        Some(record)
    }
}

/// Adds one `length | bytes` record, as a block holds it.
pub(crate) fn push_record(out: &mut Vec<u8>, record: &[u8]) {
    out.extend_from_slice(&len32(record.len()).to_le_bytes());
    out.extend_from_slice(record);
}

/// The records in a sequence of `length | bytes` records.
pub(crate) fn iter_records(records: &[u8]) -> impl Iterator<Item = &[u8]> {
    Records { rest: records }
}

fn len32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The most that a body of version 2 and what stands around it in a segment add to the records of an
/// active file of this size: what sealing has to reserve beside the file's own bytes.
pub(crate) const fn seal_overhead_bytes(file_bytes: u64) -> u64 {
    const PER_BLOCK: u64 = (ENTRY_BYTES + MAX_ZSTD_GROWTH_BYTES + TAG_BYTES) as u64;
    // Two neighbours together exceed a block, so there are at most twice as many as would fill up.
    let blocks = 2 * (file_bytes / BLOCK_BYTES as u64) + 3;
    FIXED_OVERHEAD_BYTES + blocks * PER_BLOCK
}

/// Header, two frontiers, checkpoint, wrapped keys, trailer.
const FIXED_OVERHEAD_BYTES: u64 = (crate::limits::MAX_HEADER_BYTES
    + 2 * 64 * 32
    + MAX_CHECKPOINT_BYTES
    + MAX_WRAPPED_BYTES
    + 3 * MAX_WRAPPED_KEYS
    + crate::limits::MAX_TRAILER_BYTES
    + 64) as u64;

/// Cuts `length | bytes` records into blocks: offset of the first record, and the bytes.
fn cut(records: &[u8], first_alone: bool) -> Vec<(u32, &[u8])> {
    let mut blocks = Vec::new();
    let (mut start, mut at) = (0, 0);
    let (mut first, mut index) = (0u32, 0u32);
    for record in iter_records(records) {
        let end = at + RECORD_HEAD + record.len();
        if at > start && (end - start > BLOCK_BYTES || (first_alone && index == 1)) {
            blocks.push((first, records.get(start..at).unwrap_or_default()));
            (start, first) = (at, index);
        }
        (at, index) = (end, index.saturating_add(1));
    }
    blocks.push((first, records.get(start..at).unwrap_or_default()));
    blocks
}

/// Puts the body of a sealed segment together. `records` is what [`push_record`] wrote; `before` and
/// `after` are the trees around them, and `note` is the checkpoint of `after`.
///
/// # Errors
/// [`BodyError::Crypt`] if there is no random key or it cannot be wrapped, [`BodyError::Zstd`] if zstd
/// refuses.
pub(crate) fn build_body(
    before: &Frontier,
    after: &Frontier,
    count: u32,
    note: &str,
    records: &[u8],
    options: &SealOptions,
) -> Result<Vec<u8>, BodyError> {
    let key = match &options.encryption {
        None => None,
        Some(wrap) => {
            let key = wrap.fresh_key()?;
            let wrapped = wrap.wrap(&key)?;
            crypt::check_wrapped(&wrapped)?;
            Some((key, wrapped))
        }
    };
    let zstd = options.compression == Compression::Zstd;
    // The first record of a log says which log it continues. Peers must be able to read that before they
    // accept the log, and it holds nothing else, so it stands in a block of its own that is never
    // encrypted.
    let open_blocks = usize::from(key.is_some() && before.size() == 0);
    let cut = cut(records, open_blocks > 0);
    let mut stored: Vec<Vec<u8>> = Vec::with_capacity(cut.len());
    let mut compressor = match zstd {
        true => {
            Some(Compressor::new(ZSTD_LEVEL).map_err(|error| BodyError::Zstd(error.to_string()))?)
        }
        false => None,
    };
    for (_, raw) in &cut {
        stored.push(match &mut compressor {
            Some(compressor) => compressor
                .compress(raw)
                .map_err(|error| BodyError::Zstd(error.to_string()))?,
            None => raw.to_vec(),
        });
    }
    let total: usize = stored.iter().map(|block| block.len() + TAG_BYTES).sum();
    let mut out = Vec::with_capacity(total + 8 * 1024 + cut.len() * ENTRY_BYTES);
    out.extend_from_slice(&VERSION_2.to_le_bytes());
    out.extend_from_slice(&before.size().to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
    for hash in before.hashes() {
        out.extend_from_slice(hash.as_bytes());
    }
    out.extend_from_slice(&len32(note.len()).to_le_bytes());
    out.extend_from_slice(note.as_bytes());
    let flags = if zstd { FLAG_ZSTD } else { 0 } | if key.is_some() { FLAG_ENCRYPTED } else { 0 };
    out.push(flags);
    for hash in after.hashes() {
        out.extend_from_slice(hash.as_bytes());
    }
    if let Some((_, wrapped)) = &key {
        out.push(u8::try_from(wrapped.len()).unwrap_or(u8::MAX));
        for one in wrapped {
            out.push(one.scheme);
            out.extend_from_slice(
                &u16::try_from(one.bytes.len())
                    .unwrap_or(u16::MAX)
                    .to_le_bytes(),
            );
            out.extend_from_slice(&one.bytes);
        }
    }
    out.extend_from_slice(&len32(cut.len()).to_le_bytes());
    for (number, ((first, raw), stored)) in cut.iter().zip(&stored).enumerate() {
        let tag = if key.is_some() && number >= open_blocks {
            TAG_BYTES
        } else {
            0
        };
        out.extend_from_slice(&first.to_le_bytes());
        out.extend_from_slice(&len32(raw.len()).to_le_bytes());
        out.extend_from_slice(&len32(stored.len() + tag).to_le_bytes());
    }
    let cipher = match &key {
        Some((key, _)) => Some(BlockCipher::new(key, &out)?),
        None => None,
    };
    for (number, mut block) in stored.into_iter().enumerate() {
        if let Some(cipher) = &cipher
            && number >= open_blocks
        {
            cipher.seal(len32(number), &mut block)?;
        }
        out.extend_from_slice(&block);
    }
    Ok(out)
}

fn take<'a>(rest: &mut &'a [u8], count: usize, part: &'static str) -> Result<&'a [u8], BodyError> {
    let (head, tail) = rest
        .split_at_checked(count)
        .ok_or(BodyError::Length(part))?;
    *rest = tail;
    Ok(head)
}

fn take_array<const N: usize>(rest: &mut &[u8], part: &'static str) -> Result<[u8; N], BodyError> {
    <[u8; N]>::try_from(take(rest, N, part)?).map_err(|_| BodyError::Length(part))
}

fn take_u32(rest: &mut &[u8], part: &'static str) -> Result<u32, BodyError> {
    Ok(u32::from_le_bytes(take_array(rest, part)?))
}

fn take_frontier(rest: &mut &[u8], size: u64) -> Result<Frontier, BodyError> {
    let mut hashes = Vec::with_capacity(Frontier::hashes_for(size));
    for _ in 0..Frontier::hashes_for(size) {
        hashes.push(Sha256Hash::from_bytes(take_array(rest, "frontier")?));
    }
    Ok(Frontier::from_hashes(size, hashes)?)
}

struct Head<'a> {
    version: u16,
    before: Frontier,
    count: u32,
    checkpoint: Checkpoint,
    note: &'a str,
}

/// Reads what both versions begin with.
fn parse_head<'a>(
    rest: &mut &'a [u8],
    domain: &DomainId,
    origin: &Origin,
) -> Result<Head<'a>, BodyError> {
    let version = u16::from_le_bytes(take_array(rest, "version")?);
    if !(VERSION_1..=VERSION_2).contains(&version) {
        return Err(BodyError::Version(version));
    }
    let first = u64::from_le_bytes(take_array(rest, "first index")?);
    let count = take_u32(rest, "count")?;
    let end = first.checked_add(count.into()).ok_or(BodyError::Count)?;
    if count == 0 {
        return Err(BodyError::Count);
    }
    let before = take_frontier(rest, first)?;
    let length = usize::try_from(take_u32(rest, "checkpoint length")?)
        .ok()
        .filter(|n| *n <= MAX_CHECKPOINT_BYTES)
        .ok_or(BodyError::Length("checkpoint"))?;
    let note = std::str::from_utf8(take(rest, length, "checkpoint")?)
        .map_err(|_| CheckpointError::Malformed("not UTF-8"))?;
    let checkpoint = Checkpoint::parse(note)?;
    let expected = checkpoint::origin_line(domain, origin).unwrap_or_default();
    if checkpoint.origin_line != expected {
        return Err(CheckpointError::Origin {
            found: checkpoint.origin_line,
            expected,
        }
        .into());
    }
    if checkpoint.size != end {
        return Err(BodyError::Size {
            found: checkpoint.size,
            expected: end,
        });
    }
    Ok(Head {
        version,
        before,
        count,
        checkpoint,
        note,
    })
}

/// Reads the span from the front of a body, without its records.
pub(crate) fn peek_span(
    mut rest: &[u8],
    domain: &DomainId,
    origin: &Origin,
) -> Result<AuditSpan, BodyError> {
    let head = parse_head(&mut rest, domain, origin)?;
    Ok(AuditSpan {
        first: head.before.size(),
        last: head.checkpoint.size.saturating_sub(1),
        root: head.checkpoint.root,
    })
}

/// What the front of a body tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Front {
    pub(crate) span: AuditSpan,
    pub(crate) version: u16,
    pub(crate) zstd: bool,
    pub(crate) encrypted: bool,
    /// Bytes of the records before compression, with their lengths.
    pub(crate) raw_bytes: u64,
}

/// Describes a body of `body_bytes` from its front, which must hold all that stands before the records.
pub(crate) fn peek_front(
    front: &[u8],
    body_bytes: u64,
    domain: &DomainId,
    origin: &Origin,
) -> Result<Front, BodyError> {
    let mut rest = front;
    let head = parse_head(&mut rest, domain, origin)?;
    let span = AuditSpan {
        first: head.before.size(),
        last: head.checkpoint.size.saturating_sub(1),
        root: head.checkpoint.root,
    };
    let plain = Front {
        span,
        version: head.version,
        zstd: false,
        encrypted: false,
        raw_bytes: body_bytes.saturating_sub((front.len() - rest.len()) as u64),
    };
    if head.version == VERSION_1 {
        return Ok(plain);
    }
    let [flags] = take_array(&mut rest, "flags")?;
    take_frontier(&mut rest, head.checkpoint.size)?;
    if flags & FLAG_ENCRYPTED != 0 {
        take_wrapped(&mut rest)?;
    }
    let blocks = usize::try_from(take_u32(&mut rest, "block count")?).unwrap_or(usize::MAX);
    if blocks > MAX_BLOCKS {
        return Err(BodyError::Index("no block, or too many"));
    }
    let mut raw_bytes = 0u64;
    for mut entry in take(&mut rest, blocks * ENTRY_BYTES, "block index")?.chunks_exact(ENTRY_BYTES)
    {
        take_u32(&mut entry, "block index")?;
        raw_bytes += u64::from(take_u32(&mut entry, "block index")?);
    }
    Ok(Front {
        zstd: flags & FLAG_ZSTD != 0,
        encrypted: flags & FLAG_ENCRYPTED != 0,
        raw_bytes,
        ..plain
    })
}

/// Takes the body of an audit segment apart and checks its form: of version 1 every byte, of version 2
/// everything but what is inside the blocks, for which a key may be needed.
///
/// # Errors
/// [`BodyError`] naming the first thing that does not fit.
pub fn parse_body<'a>(
    body: &'a [u8],
    domain: &DomainId,
    origin: &Origin,
) -> Result<AuditBody<'a>, BodyError> {
    let mut rest = body;
    let head = parse_head(&mut rest, domain, origin)?;
    let first = head.before.size();
    let last = head.checkpoint.size.saturating_sub(1);
    let mut parsed = AuditBody {
        version: head.version,
        first,
        last,
        before: head.before,
        checkpoint: head.checkpoint,
        note: head.note,
        after: None,
        wrapped: Vec::new(),
        front: &[],
        blocks: Vec::new(),
    };
    if head.version == VERSION_1 {
        let block = Block {
            first: 0,
            count: head.count,
            raw_len: rest.len(),
            stored: rest,
            encrypted: false,
            zstd: false,
        };
        walk(rest, &block, first, 0, |_, _| {}).map_err(|fault| match fault {
            BodyError::Block { .. } => BodyError::Length("records"),
            other => other,
        })?;
        parsed.blocks.push(block);
        return Ok(parsed);
    }
    let [flags] = take_array(&mut rest, "flags")?;
    if flags & !(FLAG_ZSTD | FLAG_ENCRYPTED) != 0 {
        return Err(BodyError::Flags(flags));
    }
    let after = take_frontier(&mut rest, parsed.checkpoint.size)?;
    let computed = after.root();
    if computed != parsed.checkpoint.root {
        return Err(BodyError::Root {
            computed,
            stated: parsed.checkpoint.root,
        });
    }
    parsed.after = Some(after);
    if flags & FLAG_ENCRYPTED != 0 {
        parsed.wrapped = take_wrapped(&mut rest)?;
    }
    parsed.blocks = take_blocks(&mut rest, head.count, flags, first)?;
    let stored: usize = parsed.blocks.iter().map(|block| block.stored.len()).sum();
    parsed.front = body
        .get(..body.len().saturating_sub(stored))
        .unwrap_or_default();
    Ok(parsed)
}

fn take_wrapped(rest: &mut &[u8]) -> Result<Vec<WrappedKey>, BodyError> {
    let [count] = take_array(rest, "wrapped keys")?;
    if usize::from(count) > MAX_WRAPPED_KEYS {
        return Err(CryptError::Recipients.into());
    }
    let mut wrapped = Vec::with_capacity(count.into());
    for _ in 0..count {
        let [scheme] = take_array(rest, "wrapped keys")?;
        let length = u16::from_le_bytes(take_array(rest, "wrapped keys")?);
        wrapped.push(WrappedKey {
            scheme,
            bytes: take(rest, length.into(), "wrapped keys")?.to_vec(),
        });
    }
    crypt::check_wrapped(&wrapped)?;
    Ok(wrapped)
}

/// Reads the index and the blocks, which fill the rest of the body.
fn take_blocks<'a>(
    rest: &mut &'a [u8],
    count: u32,
    flags: u8,
    first_index: u64,
) -> Result<Vec<Block<'a>>, BodyError> {
    let zstd = flags & FLAG_ZSTD != 0;
    let encrypted = flags & FLAG_ENCRYPTED != 0;
    let blocks = usize::try_from(take_u32(rest, "block count")?).unwrap_or(usize::MAX);
    if blocks == 0 || blocks > MAX_BLOCKS {
        return Err(BodyError::Index("no block, or too many"));
    }
    let index = take(rest, blocks * ENTRY_BYTES, "block index")?;
    let mut entries = Vec::with_capacity(blocks);
    for mut entry in index.chunks_exact(ENTRY_BYTES) {
        entries.push((
            take_u32(&mut entry, "block index")?,
            take_u32(&mut entry, "block index")?,
            take_u32(&mut entry, "block index")?,
        ));
    }
    let ends = entries
        .iter()
        .skip(1)
        .map(|(first, _, _)| *first)
        .chain([count]);
    let mut raw_total = 0u64;
    let mut out = Vec::with_capacity(blocks);
    for (number, ((first, raw, stored), end)) in entries.iter().zip(ends).enumerate() {
        let records = end
            .checked_sub(*first)
            .filter(|records| *records > 0 && (number > 0 || *first == 0))
            .ok_or(BodyError::Index("first records do not ascend from 0"))?;
        let raw_len = usize::try_from(*raw).unwrap_or(usize::MAX);
        let most = if records == 1 {
            MAX_BLOCK_BYTES
        } else {
            BLOCK_BYTES
        };
        if raw_len > most || u64::from(*raw) < u64::from(records) * u64::from(MIN_RECORD) {
            return Err(BodyError::Index("a raw length does not fit its records"));
        }
        raw_total += u64::from(*raw);
        let open = encrypted && first_index == 0 && number == 0;
        if open && records != 1 {
            return Err(BodyError::Index("record 0 is not in a block of its own"));
        }
        let encrypted = encrypted && !open;
        let tag = if encrypted { TAG_BYTES } else { 0 };
        let stored_len = usize::try_from(*stored).unwrap_or(usize::MAX);
        let fits = match stored_len.checked_sub(tag) {
            Some(packed) if zstd => packed > 0 && packed <= raw_len + MAX_ZSTD_GROWTH_BYTES,
            Some(packed) => packed == raw_len,
            None => false,
        };
        if !fits {
            return Err(BodyError::Index(
                "a stored length does not fit its raw length",
            ));
        }
        out.push(Block {
            first: *first,
            count: records,
            raw_len,
            stored: take(rest, stored_len, "blocks")?,
            encrypted,
            zstd,
        });
    }
    if raw_total > MAX_RAW_BYTES {
        return Err(BodyError::Index("more records than one segment may hold"));
    }
    if !rest.is_empty() {
        return Err(BodyError::Length("blocks"));
    }
    Ok(out)
}

/// The records of a verified audit segment that is not encrypted, with their indexes.
///
/// # Errors
/// [`BodyError`] if the segment is not an audit segment, is encrypted, or a block cannot be unpacked.
pub fn read_records(
    segment: &crate::format::VerifiedSegment,
) -> Result<Vec<(u64, Vec<u8>)>, BodyError> {
    read_records_with(segment, None)
}

/// The records of a verified audit segment with their indexes, all in memory at once.
///
/// # Errors
/// As [`read_records`]; an encrypted segment can be read with its key.
pub fn read_records_with(
    segment: &crate::format::VerifiedSegment,
    keys: Option<&dyn KeyUnwrap>,
) -> Result<Vec<(u64, Vec<u8>)>, BodyError> {
    let header = segment.header();
    let body = parse_body(segment.body(), &header.domain, &header.origin)?;
    let mut reader = body.records(keys)?;
    let mut out = Vec::new();
    while let Some((index, record)) = reader.next_record()? {
        out.push((index, record.to_vec()));
    }
    Ok(out)
}
