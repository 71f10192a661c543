//! Volumes: segments and custody receipts on their way by hand. The bytes are laid out in
//! `docs/src/format.md`.
//!
//! A volume is a header, entries, and an index at the end. After the header and after every entry stands
//! the BLAKE3 hash of all bytes of the volume before it, so that a torn or changed volume is found at
//! once, what lies before the damage can be used, and no entry can be moved to another place or volume.
//!
//! A volume proves nothing about who made it: its hashes find damage, not malice. Every segment and
//! receipt in it is signed by itself and is judged by a node as if it had come in a session.
//!
//! Sans-io: [`VolumeWriter`] and [`VolumeReader`] work over `Write` and `Read` and hold one entry and
//! the index in memory. [`AgeWriter`] and [`AgeReader`] go between them and the file if the volume is
//! encrypted.

mod stream;

use std::io::{self, Read, Write};

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::crypt::CryptError;
use crate::format::SegmentRef;
use crate::id::{DomainId, NodeId, SegmentId};
use crate::limits::{
    MAX_RECEIPT_BYTES, MAX_SEGMENT_BYTES, MAX_VOLUME_BYTES, MAX_VOLUME_ENTRIES,
    MAX_VOLUME_FRONT_BYTES, MAX_VOLUME_HEADER_BYTES, MAX_VOLUME_INDEX_BYTES,
};
use crate::receipt::CustodyReceipt;

pub use stream::{AgeReader, AgeWriter, ENCRYPTED_MAGIC};

/// The first eight bytes of every volume; the digit is the format version.
pub const VOLUME_MAGIC: &[u8; 8] = b"TIDEVOL1";

/// The first eight bytes of the list beside an encrypted volume.
pub const LIST_MAGIC: &[u8; 8] = b"TIDEIDS1";

/// What such a list has beside the keys of its entries.
const LIST_AROUND_BYTES: usize = 8 + 32 + 16 + 4 + 1 + 8 + 32 + 32;

/// Largest such list.
pub const MAX_VOLUME_LIST_BYTES: usize = LIST_AROUND_BYTES + 32 * MAX_VOLUME_ENTRIES;

const CHECK_BYTES: usize = 32;
/// Tag, length of the front, length of the body.
const ENTRY_HEAD_BYTES: usize = 1 + 4 + 4;

const TAG_SEGMENT: u8 = 1;
const TAG_RECEIPT: u8 = 2;
const TAG_INDEX: u8 = 3;

/// Why a volume cannot be written, or not be read any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// Not a volume.
    #[error("not a volume of format version 1")]
    Magic,
    /// It ends too early.
    #[error("cut off after {offset} sound bytes")]
    Torn {
        /// How many bytes before the cut are sound.
        offset: u64,
    },
    /// Bytes of it changed.
    #[error("damaged after {offset} sound bytes")]
    Damaged {
        /// How many bytes before the damage are sound.
        offset: u64,
    },
    /// A part is longer than it may be, or too many.
    #[error("{part} of {length} exceeds the limit of {max}")]
    TooLong {
        /// Which part.
        part: &'static str,
        /// Its length, or their number.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// A part is no canonical encoding, though nothing changed on the way.
    #[error("bad {part}: {fault}")]
    Codec {
        /// Which part.
        part: &'static str,
        /// What is wrong with it.
        fault: CodecError,
    },
    /// An entry of a kind that this version does not know.
    #[error("an entry of the unknown kind {0}")]
    Tag(u8),
    /// The index is not that of the entries.
    #[error("the index does not fit the entries")]
    Index,
    /// Something follows the index.
    #[error("bytes follow the end of the volume")]
    Trailing,
    /// It cannot be decrypted.
    #[error(transparent)]
    Crypt(#[from] CryptError),
    /// The reader or writer failed.
    #[error("{0}")]
    Io(String),
}

impl From<io::Error> for VolumeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

/// What a volume says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct VolumeHeader {
    /// The domain of all that is in it.
    pub domain: DomainId,
    /// The node that wrote it.
    pub exporter: NodeId,
    /// The node that it is meant for; any, if none is named.
    pub addressee: Option<NodeId>,
    /// What the volumes of one export have in common.
    pub export_id: [u8; 16],
    /// Its number in the export, from 1.
    pub number: u32,
    /// When it was begun, by the exporter's clock.
    pub created_unix_ms: u64,
}

impl VolumeHeader {
    /// The export id as text: 32 hex digits.
    #[must_use]
    pub fn export(&self) -> String {
        crate::id::hex(&self.export_id)
    }
}

/// Which receipt an entry is.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
pub struct ReceiptMark {
    /// The segment that the receipt is for.
    pub segment_id: SegmentId,
    /// Who gave it.
    pub custodian: NodeId,
}

/// What an entry is, without its content.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryMark {
    /// A segment.
    Segment(SegmentRef),
    /// A custody receipt.
    Receipt(ReceiptMark),
}

impl EntryMark {
    /// What tells entries apart: two with the same key bring the same thing.
    #[must_use]
    pub fn key(&self) -> [u8; 32] {
        match self {
            Self::Segment(reference) => *reference.id.as_bytes(),
            Self::Receipt(mark) => {
                let mut hash = blake3::Hasher::new();
                hash.update(b"tidelock receipt mark v1\0");
                hash.update(mark.segment_id.as_bytes());
                hash.update(mark.custodian.as_str().as_bytes());
                *hash.finalize().as_bytes()
            }
        }
    }
}

/// What an encrypted volume is and holds, in clear beside it, so that who wrote it can go on without being
/// able to read it: hashes and numbers only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeList {
    /// The recipients, as [`VolumeList::recipients`] hashes them.
    pub recipients: [u8; 32],
    /// [`VolumeHeader::export_id`].
    pub export_id: [u8; 16],
    /// [`VolumeHeader::number`].
    pub number: u32,
    /// Whether it is the last volume of its export.
    pub last: bool,
    /// Length of the encrypted file.
    pub file_bytes: u64,
    /// BLAKE3 of the encrypted file.
    pub file_hash: [u8; 32],
    /// [`EntryMark::key`] of each entry, in their order.
    pub keys: Vec<[u8; 32]>,
}

impl VolumeList {
    /// The hash of a set of recipients, in any order.
    #[must_use]
    pub fn recipients<T: AsRef<str>>(texts: &[T]) -> [u8; 32] {
        let mut texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        texts.sort_unstable();
        let mut hash = blake3::Hasher::new();
        hash.update(b"tidelock volume recipients v1\0");
        for text in texts {
            hash.update(text.as_bytes());
            hash.update(b"\n");
        }
        *hash.finalize().as_bytes()
    }

    /// How long the list of so many entries is.
    #[must_use]
    pub fn bytes(entries: usize) -> u64 {
        (entries as u64)
            .saturating_mul(32)
            .saturating_add(LIST_AROUND_BYTES as u64)
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = LIST_MAGIC.to_vec();
        out.extend_from_slice(&self.recipients);
        out.extend_from_slice(&self.export_id);
        out.extend_from_slice(&self.number.to_le_bytes());
        out.push(u8::from(self.last));
        out.extend_from_slice(&self.file_bytes.to_le_bytes());
        out.extend_from_slice(&self.file_hash);
        for key in &self.keys {
            out.extend_from_slice(key);
        }
        let check = blake3::hash(&out);
        out.extend_from_slice(check.as_bytes());
        out
    }

    /// Reads the bytes; `None` if they are damaged or no such list.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MAX_VOLUME_LIST_BYTES {
            return None;
        }
        let (listed, check) = bytes.split_last_chunk::<CHECK_BYTES>()?;
        if blake3::hash(listed) != *check {
            return None;
        }
        let rest = listed.strip_prefix(LIST_MAGIC)?;
        let (recipients, rest) = rest.split_first_chunk::<32>()?;
        let (export_id, rest) = rest.split_first_chunk::<16>()?;
        let (number, rest) = rest.split_first_chunk::<4>()?;
        let (last, rest) = rest.split_first()?;
        let (file_bytes, rest) = rest.split_first_chunk::<8>()?;
        let (file_hash, rest) = rest.split_first_chunk::<32>()?;
        let (keys, rest) = rest.as_chunks::<32>();
        (rest.is_empty() && *last <= 1).then(|| Self {
            recipients: *recipients,
            export_id: *export_id,
            number: u32::from_le_bytes(*number),
            last: *last == 1,
            file_bytes: u64::from_le_bytes(*file_bytes),
            file_hash: *file_hash,
            keys: keys.to_vec(),
        })
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeEntry {
    /// What the writer says it is; whoever uses the content judges that for himself.
    pub mark: EntryMark,
    /// The bytes of the segment or receipt.
    pub bytes: Vec<u8>,
}

impl VolumeEntry {
    /// Whether the content is what its mark names: the very segment, or a receipt that is signed by a key
    /// that it says is the custodian's. Who endorsed that key is the node's to judge.
    #[must_use]
    pub fn is_as_marked(&self) -> bool {
        match &self.mark {
            EntryMark::Segment(reference) => SegmentId::of(&self.bytes) == reference.id,
            EntryMark::Receipt(mark) => CustodyReceipt::decode(&self.bytes).is_ok_and(|receipt| {
                receipt.segment_id == mark.segment_id
                    && receipt.custodian == mark.custodian
                    && receipt.verify_signature().is_ok()
            }),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct IndexEntry {
    offset: u64,
    mark: EntryMark,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct Index {
    last: bool,
    entries: Vec<IndexEntry>,
}

fn encode<T: Encode, const MAX: usize>(
    value: &T,
    part: &'static str,
) -> Result<Vec<u8>, VolumeError> {
    codec::encode::<T, MAX>(value).map_err(|fault| VolumeError::Codec { part, fault })
}

fn decode<T: Encode + Decode<()>, const MAX: usize>(
    bytes: &[u8],
    part: &'static str,
) -> Result<T, VolumeError> {
    codec::decode::<T, MAX>(bytes).map_err(|fault| VolumeError::Codec { part, fault })
}

fn at_most(part: &'static str, length: u64, max: u64) -> Result<(), VolumeError> {
    match length > max {
        true => Err(VolumeError::TooLong { part, length, max }),
        false => Ok(()),
    }
}

fn length32(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes()
}

fn mark_of(tag: u8, front: &[u8]) -> Result<EntryMark, VolumeError> {
    match tag {
        TAG_SEGMENT => Ok(EntryMark::Segment(decode::<_, MAX_VOLUME_FRONT_BYTES>(
            front,
            "reference",
        )?)),
        TAG_RECEIPT => Ok(EntryMark::Receipt(decode::<_, MAX_VOLUME_FRONT_BYTES>(
            front,
            "receipt mark",
        )?)),
        other => Err(VolumeError::Tag(other)),
    }
}

// ---- writing ------------------------------------------------------------------------------------

/// Writes one volume.
pub struct VolumeWriter<W> {
    write: W,
    hash: blake3::Hasher,
    offset: u64,
    index: Vec<IndexEntry>,
    index_bytes: u64,
}

impl<W: Write> VolumeWriter<W> {
    /// Begins a volume.
    ///
    /// # Errors
    /// [`VolumeError::Io`] of the writer.
    pub fn new(write: W, header: &VolumeHeader) -> Result<Self, VolumeError> {
        let mut writer = Self {
            write,
            hash: blake3::Hasher::new(),
            offset: 0,
            index: Vec::new(),
            index_bytes: 0,
        };
        let header = encode::<_, MAX_VOLUME_HEADER_BYTES>(header, "header")?;
        writer.put(VOLUME_MAGIC)?;
        writer.put(&length32(&header))?;
        writer.put(&header)?;
        writer.check()?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), VolumeError> {
        self.write.write_all(bytes)?;
        self.hash.update(bytes);
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(())
    }

    fn check(&mut self) -> Result<(), VolumeError> {
        let hash = self.hash.finalize();
        self.put(hash.as_bytes())
    }

    fn entry(&mut self, tag: u8, front: &[u8], body: &[u8]) -> Result<(), VolumeError> {
        self.put(&[tag])?;
        self.put(&length32(front))?;
        self.put(&length32(body))?;
        self.put(front)?;
        self.put(body)?;
        self.check()
    }

    /// How many bytes the volume has if it is finished now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let end = ENTRY_HEAD_BYTES + 1 + 8 + CHECK_BYTES;
        self.offset
            .saturating_add(self.index_bytes)
            .saturating_add(end as u64)
    }

    /// Whether a body of this length still fits a volume of at most `max_bytes`. The first always does.
    #[must_use]
    pub fn has_room(&self, body_bytes: u64, max_bytes: u64) -> bool {
        let most = (ENTRY_HEAD_BYTES + 2 * MAX_VOLUME_FRONT_BYTES + CHECK_BYTES) as u64;
        let grown = self.bytes().saturating_add(most).saturating_add(body_bytes);
        self.index.is_empty()
            || (self.index.len() < MAX_VOLUME_ENTRIES && grown <= max_bytes.min(MAX_VOLUME_BYTES))
    }

    /// How many entries it has.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.index.len()
    }

    /// Writes one entry.
    ///
    /// # Errors
    /// [`VolumeError::TooLong`] if the body or the volume would be, [`VolumeError::Io`] of the writer;
    /// the volume is of no use then.
    pub fn push(&mut self, entry: &VolumeEntry) -> Result<(), VolumeError> {
        let (tag, front, max) = match &entry.mark {
            EntryMark::Segment(reference) => (
                TAG_SEGMENT,
                encode::<_, MAX_VOLUME_FRONT_BYTES>(reference, "reference")?,
                MAX_SEGMENT_BYTES,
            ),
            EntryMark::Receipt(mark) => (
                TAG_RECEIPT,
                encode::<_, MAX_VOLUME_FRONT_BYTES>(mark, "receipt mark")?,
                MAX_RECEIPT_BYTES as u64,
            ),
        };
        let length = entry.bytes.len() as u64;
        at_most("an entry", length, max)?;
        let (count, most) = (self.index.len() as u64, MAX_VOLUME_ENTRIES as u64);
        at_most("the number of entries", count.saturating_add(1), most)?;
        let grown = self.bytes().saturating_add(length);
        at_most("the volume", grown.saturating_add(1024), MAX_VOLUME_BYTES)?;
        let place = IndexEntry {
            offset: self.offset,
            mark: entry.mark.clone(),
        };
        let place_bytes = encode::<_, { MAX_VOLUME_FRONT_BYTES + 16 }>(&place, "index")?.len();
        self.entry(tag, &front, &entry.bytes)?;
        self.index_bytes = self.index_bytes.saturating_add(place_bytes as u64);
        self.index.push(place);
        Ok(())
    }

    /// Writes the index; `last` if no further volume of the export follows. The caller brings the bytes
    /// to the device.
    ///
    /// # Errors
    /// [`VolumeError::Io`] of the writer.
    pub fn finish(mut self, last: bool) -> Result<W, VolumeError> {
        let index = Index {
            last,
            entries: std::mem::take(&mut self.index),
        };
        let body = encode::<_, MAX_VOLUME_INDEX_BYTES>(&index, "index")?;
        self.entry(TAG_INDEX, &[], &body)?;
        self.write.flush()?;
        Ok(self.write)
    }
}

// ---- reading ------------------------------------------------------------------------------------

/// Reads one volume, entry by entry. Nothing is given out before its hash was checked.
pub struct VolumeReader<R> {
    read: R,
    hash: blake3::Hasher,
    /// How many bytes were read.
    offset: u64,
    /// How many of them are sound.
    sound: u64,
    header: VolumeHeader,
    index: Vec<IndexEntry>,
    last: Option<bool>,
    failed: Option<VolumeError>,
}

impl<R: Read> VolumeReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`VolumeError`]: not a volume, or its header is damaged.
    pub fn open(read: R) -> Result<Self, VolumeError> {
        let mut front = Front {
            read,
            hash: blake3::Hasher::new(),
            offset: 0,
            sound: 0,
        };
        let mut magic = [0; 8];
        front.fill(&mut magic)?;
        if magic != *VOLUME_MAGIC {
            return Err(VolumeError::Magic);
        }
        let mut length = [0; 4];
        front.fill(&mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        at_most("the header", length, MAX_VOLUME_HEADER_BYTES as u64)?;
        let header = front.take(length)?;
        front.check()?;
        let Front {
            read,
            hash,
            offset,
            sound,
        } = front;
        Ok(Self {
            read,
            hash,
            offset,
            sound,
            header: decode::<_, MAX_VOLUME_HEADER_BYTES>(&header, "header")?,
            index: Vec::new(),
            last: None,
            failed: None,
        })
    }

    /// What it says of itself.
    #[must_use]
    pub fn header(&self) -> &VolumeHeader {
        &self.header
    }

    /// Whether it is the last volume of its export; known once all of it was read.
    #[must_use]
    pub fn is_last(&self) -> Option<bool> {
        self.last
    }

    /// The next entry, or `None` after the last one of a volume that is whole.
    ///
    /// # Errors
    /// [`VolumeError`] where it is torn, damaged or malformed, and the same again from then on. What
    /// was given before is sound.
    pub fn next_entry(&mut self) -> Result<Option<VolumeEntry>, VolumeError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if self.last.is_some() {
            return Ok(None);
        }
        let entry = self.read_entry();
        if let Err(error) = &entry {
            self.failed = Some(error.clone());
        }
        entry
    }

    fn read_entry(&mut self) -> Result<Option<VolumeEntry>, VolumeError> {
        let offset = self.offset;
        let mut front = Front {
            read: &mut self.read,
            hash: self.hash.clone(),
            offset,
            sound: self.sound,
        };
        let (mut tag, mut front_length, mut body_length) = ([0; 1], [0; 4], [0; 4]);
        front.fill(&mut tag)?;
        front.fill(&mut front_length)?;
        front.fill(&mut body_length)?;
        let [tag] = tag;
        let max = match tag {
            TAG_SEGMENT => MAX_SEGMENT_BYTES,
            TAG_RECEIPT => MAX_RECEIPT_BYTES as u64,
            TAG_INDEX => MAX_VOLUME_INDEX_BYTES as u64,
            other => return Err(VolumeError::Tag(other)),
        };
        let front_length = u64::from(u32::from_le_bytes(front_length));
        let body_length = u64::from(u32::from_le_bytes(body_length));
        at_most(
            "the front of an entry",
            front_length,
            MAX_VOLUME_FRONT_BYTES as u64,
        )?;
        at_most("an entry", body_length, max)?;
        let front_bytes = front.take(front_length)?;
        let bytes = front.take(body_length)?;
        front.check()?;
        (self.hash, self.offset, self.sound) = (front.hash, front.offset, front.sound);
        if tag == TAG_INDEX {
            let index: Index = decode::<_, MAX_VOLUME_INDEX_BYTES>(&bytes, "index")?;
            if !front_bytes.is_empty() || index.entries != self.index {
                return Err(VolumeError::Index);
            }
            if self
                .read
                .read(&mut [0])
                .map_err(|e| broken(&e, self.sound))?
                != 0
            {
                return Err(VolumeError::Trailing);
            }
            self.last = Some(index.last);
            return Ok(None);
        }
        let (count, most) = (self.index.len() as u64, MAX_VOLUME_ENTRIES as u64);
        at_most("the number of entries", count.saturating_add(1), most)?;
        let mark = mark_of(tag, &front_bytes)?;
        self.index.push(IndexEntry {
            offset,
            mark: mark.clone(),
        });
        Ok(Some(VolumeEntry { mark, bytes }))
    }
}

/// A reader with the hash of what went by.
struct Front<R> {
    read: R,
    hash: blake3::Hasher,
    offset: u64,
    sound: u64,
}

fn broken(error: &io::Error, sound: u64) -> VolumeError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => VolumeError::Torn { offset: sound },
        io::ErrorKind::InvalidData => VolumeError::Damaged { offset: sound },
        _ => VolumeError::Io(error.to_string()),
    }
}

impl<R: Read> Front<R> {
    fn fill(&mut self, out: &mut [u8]) -> Result<(), VolumeError> {
        self.read
            .read_exact(out)
            .map_err(|e| broken(&e, self.sound))?;
        self.took(out);
        Ok(())
    }

    fn took(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.offset = self.offset.saturating_add(bytes.len() as u64);
    }

    /// Reads so many bytes; memory grows with what is really there, whatever the length says.
    fn take(&mut self, length: u64) -> Result<Vec<u8>, VolumeError> {
        let mut out = Vec::new();
        self.read
            .by_ref()
            .take(length)
            .read_to_end(&mut out)
            .map_err(|e| broken(&e, self.sound))?;
        if out.len() as u64 != length {
            return Err(VolumeError::Torn { offset: self.sound });
        }
        self.took(&out);
        Ok(out)
    }

    fn check(&mut self) -> Result<(), VolumeError> {
        let expected = self.hash.finalize();
        let mut found = [0; CHECK_BYTES];
        self.fill(&mut found)?;
        if expected != found {
            return Err(VolumeError::Damaged { offset: self.sound });
        }
        self.sound = self.offset;
        Ok(())
    }
}

/// What a fuzz harness makes of bytes: a volume that is whole, written again; `None` if it is not.
pub(crate) fn rewritten(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut reader = VolumeReader::open(bytes).ok()?;
    let mut writer = VolumeWriter::new(Vec::new(), reader.header()).ok()?;
    while let Some(entry) = reader.next_entry().ok()? {
        writer.push(&entry).ok()?;
    }
    writer.finish(reader.is_last()?).ok()
}

/// Makes the hashes of a changed volume right again, as far as its lengths can be followed.
pub(crate) fn reseal(bytes: &mut [u8]) {
    let mut hash = blake3::Hasher::new();
    let (mut from, mut at, mut first) = (0, 8, true);
    loop {
        let length = |bytes: &[u8], at: usize| -> Option<usize> {
            let field = bytes.get(at..at.checked_add(4)?)?;
            usize::try_from(u32::from_le_bytes(field.try_into().ok()?)).ok()
        };
        let end = if first {
            length(bytes, at).and_then(|n| at.checked_add(4)?.checked_add(n))
        } else {
            length(bytes, at + 1)
                .zip(length(bytes, at + 5))
                .and_then(|(a, b)| {
                    at.checked_add(ENTRY_HEAD_BYTES)?
                        .checked_add(a)?
                        .checked_add(b)
                })
        };
        let Some((before, check)) = end.and_then(|end| bytes.split_at_mut_checked(end)) else {
            return;
        };
        let (Some(new), Some(check)) = (before.get(from..), check.get_mut(..CHECK_BYTES)) else {
            return;
        };
        hash.update(new);
        for (slot, byte) in check.iter_mut().zip(hash.finalize().as_bytes()) {
            *slot = *byte;
        }
        hash.update(check);
        at = before.len() + CHECK_BYTES;
        (from, first) = (at, false);
    }
}
