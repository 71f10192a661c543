//! Bytes of the index: one entry of fixed size for every audit segment that is held, by sequence.
//!
//! A log's entries lie in pages of 112, each a file of 16 KiB that is allocated whole when it is
//! made, so an entry is written in place. Which sequences are held is not told by the pages but by
//! the catalog and the journal; an entry of a sequence that is not held means nothing. Every entry
//! carries a checksum over its log and its sequence too, so one that lies in a wrong place is no
//! entry. See `docs/src/format.md`.

use crate::body::AuditSpan;
use crate::format::{SegmentRef, VerifiedSegment};
use crate::id::{Kind, Origin, SegmentId, Sha256Hash};

/// Bytes of a page, and so of a page's file.
pub(crate) const PAGE_BYTES: usize = 16 * 1024;
/// Bytes before the first entry of a page.
pub(super) const PAGE_HEAD_BYTES: usize = 256;
/// Bytes of an entry in a page: its fields, four bytes of checksum and four of zero.
pub(super) const SLOT_BYTES: usize = 144;
/// Bytes of an entry's fields.
pub(super) const ENTRY_BYTES: usize = 136;
/// Entries of a page.
pub(super) const PAGE_ENTRIES: u64 = 112;
/// The first eight bytes of a page.
pub(super) const PAGE_MAGIC: &[u8; 8] = b"TIDECHN1";
/// Files are allocated in these units.
const SECTOR_BYTES: u64 = 512;

const _: () =
    assert!(PAGE_HEAD_BYTES as u64 + SLOT_BYTES as u64 * PAGE_ENTRIES == PAGE_BYTES as u64);
const _: () = assert!(ENTRY_BYTES + 8 == SLOT_BYTES);

const HAS_PREV: u16 = 1;

/// What names a log in the index: the first 16 bytes of BLAKE3 over the origin's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LogName(pub(super) [u8; 16]);

impl LogName {
    pub(super) fn of(origin: &Origin) -> Self {
        let hash = blake3::hash(origin.as_str().as_bytes());
        let mut name = [0; 16];
        for (slot, byte) in name.iter_mut().zip(hash.as_bytes()) {
            *slot = *byte;
        }
        Self(name)
    }

    pub(super) fn page_file(&self, page: u64) -> String {
        format!("{}-{page}.idx", crate::id::hex(&self.0))
    }
}

/// A page of one log.
pub(super) type PageId = (LogName, u64);

/// Where an entry lies: its page and the offset in it.
pub(super) fn place(sequence: u64) -> (u64, usize) {
    let slot = usize::try_from(sequence % PAGE_ENTRIES).unwrap_or(0);
    (sequence / PAGE_ENTRIES, PAGE_HEAD_BYTES + slot * SLOT_BYTES)
}

/// The first bytes of a page.
pub(super) fn page_head(id: &PageId) -> Vec<u8> {
    let mut head = PAGE_MAGIC.to_vec();
    head.extend_from_slice(&id.0.0);
    head.extend_from_slice(&id.1.to_le_bytes());
    let crc = crc32c::crc32c(&head);
    head.extend_from_slice(&crc.to_le_bytes());
    head
}

/// What the index knows of an audit segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChainEntry {
    pub(crate) id: SegmentId,
    pub(super) prev: Option<SegmentId>,
    pub(crate) span: AuditSpan,
    pub(crate) created_unix_ms: u64,
    pub(super) size_bytes: u64,
    /// Allocated to the segment's file.
    pub(crate) allocated: u64,
    /// Allocated to the file of its receipts; 0 if there is none.
    pub(super) receipts: u64,
    /// Receipts that lie in it.
    pub(super) custodians: u16,
}

fn sectors(bytes: u64) -> [u8; 4] {
    u32::try_from(bytes.div_ceil(SECTOR_BYTES))
        .unwrap_or(u32::MAX)
        .to_le_bytes()
}

/// Takes fixed pieces from the front; zeros where there are none left.
struct Take<'a>(&'a [u8]);

impl Take<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((piece, rest)) => {
                self.0 = rest;
                *piece
            }
            None => [0; N],
        }
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u64 {
        u64::from(u32::from_le_bytes(self.bytes()))
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }
}

impl ChainEntry {
    /// The entry of an audit segment, before it has receipts; `None` for other kinds.
    pub(super) fn of(segment: &VerifiedSegment, allocated: u64) -> Option<Self> {
        let reference = segment.reference();
        Some(Self {
            id: reference.id,
            prev: reference.prev,
            span: segment.audit_span()?,
            created_unix_ms: segment.header().created_unix_ms,
            size_bytes: reference.size_bytes,
            allocated,
            receipts: 0,
            custodians: 0,
        })
    }

    pub(crate) fn reference(&self, origin: &Origin, sequence: u64) -> SegmentRef {
        SegmentRef {
            id: self.id,
            kind: Kind::Audit,
            origin: origin.clone(),
            sequence,
            size_bytes: self.size_bytes,
            prev: self.prev,
        }
    }

    /// The fields.
    pub(super) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let prev = self.prev.map_or([0; 32], |prev| *prev.as_bytes());
        let flags = if self.prev.is_some() { HAS_PREV } else { 0 };
        let mut out = [0; ENTRY_BYTES];
        let fields: [&[u8]; 11] = [
            self.id.as_bytes(),
            &prev,
            self.span.root.as_bytes(),
            &self.created_unix_ms.to_le_bytes(),
            &self.span.first.to_le_bytes(),
            &self.span.last.to_le_bytes(),
            &u32::try_from(self.size_bytes)
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
            &sectors(self.allocated),
            &sectors(self.receipts),
            &self.custodians.to_le_bytes(),
            &flags.to_le_bytes(),
        ];
        for (slot, byte) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *slot = *byte;
        }
        out
    }

    /// Reads the fields; their checksum was looked at by the caller.
    pub(super) fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let mut take = Take(bytes);
        let id = SegmentId::from_bytes(take.bytes());
        let prev = SegmentId::from_bytes(take.bytes());
        let root = Sha256Hash::from_bytes(take.bytes());
        let created_unix_ms = take.u64();
        let (first, last) = (take.u64(), take.u64());
        let size_bytes = take.u32();
        let (allocated, receipts) = (take.u32() * SECTOR_BYTES, take.u32() * SECTOR_BYTES);
        let custodians = take.u16();
        let flags = take.u16();
        Self {
            id,
            prev: (flags & HAS_PREV != 0).then_some(prev),
            span: AuditSpan { first, last, root },
            created_unix_ms,
            size_bytes,
            allocated,
            receipts,
            custodians,
        }
    }

    /// The entry with its checksum, as it lies in a page.
    pub(super) fn slot(&self, log: &LogName, sequence: u64) -> Vec<u8> {
        let fields = self.encode();
        let mut out = fields.to_vec();
        out.extend_from_slice(&checksum(log, sequence, &fields).to_le_bytes());
        out.resize(SLOT_BYTES, 0);
        out
    }

    /// Reads an entry out of a page; `None` if there is none or it is damaged. Bits that have no
    /// meaning here are damage too: an entry has one spelling.
    pub(super) fn from_page(page: &[u8], log: &LogName, sequence: u64) -> Option<Self> {
        let (_, at) = place(sequence);
        let slot = page.get(at..at + SLOT_BYTES)?;
        let fields = slot.first_chunk::<ENTRY_BYTES>()?;
        let entry = Self::decode(fields);
        let blank = fields.iter().all(|byte| *byte == 0);
        (!blank && entry.slot(log, sequence) == slot).then_some(entry)
    }
}

/// Reads the slot of a log's first entry, and gives what it would be written as; for the fuzz harness.
pub(crate) fn reencode_slot(slot: &[u8], log: &Origin) -> Option<Vec<u8>> {
    let (log, at) = (LogName::of(log), place(0).1);
    if slot.len() != SLOT_BYTES {
        return None;
    }
    let mut page = vec![0; PAGE_BYTES];
    page.get_mut(at..at + SLOT_BYTES)?.copy_from_slice(slot);
    Some(ChainEntry::from_page(&page, &log, 0)?.slot(&log, 0))
}

/// Makes the checksum of such a slot right again.
pub(crate) fn reseal_slot(slot: &mut [u8], log: &Origin) {
    if let Some((fields, rest)) = slot.split_first_chunk_mut::<ENTRY_BYTES>()
        && let Some(crc) = rest.first_chunk_mut::<4>()
    {
        *crc = checksum(&LogName::of(log), 0, fields).to_le_bytes();
    }
}

fn checksum(log: &LogName, sequence: u64, fields: &[u8; ENTRY_BYTES]) -> u32 {
    let crc = crc32c::crc32c(&log.0);
    let crc = crc32c::crc32c_append(crc, &sequence.to_le_bytes());
    crc32c::crc32c_append(crc, fields)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::store) fn entry(byte: u8, prev: Option<u8>) -> ChainEntry {
        ChainEntry {
            id: SegmentId::from_bytes([byte; 32]),
            prev: prev.map(|b| SegmentId::from_bytes([b; 32])),
            span: AuditSpan {
                first: 7,
                last: u64::MAX,
                root: Sha256Hash::from_bytes([byte ^ 0xff; 32]),
            },
            created_unix_ms: u64::MAX - 1,
            size_bytes: 32 * 1024 * 1024,
            allocated: 33 * 1024 * 1024,
            receipts: 4096,
            custodians: 64,
        }
    }

    #[test]
    fn an_entry_comes_back_and_is_bound_to_its_place() {
        let log = LogName([1; 16]);
        for (sequence, prev) in [(0, None), (1, Some(9)), (111, Some(0)), (112, Some(3))] {
            let entry = entry(5, prev);
            let mut page = vec![0; PAGE_BYTES];
            let at = place(sequence).1;
            page[at..at + SLOT_BYTES].copy_from_slice(&entry.slot(&log, sequence));
            assert_eq!(ChainEntry::from_page(&page, &log, sequence), Some(entry));
            // Another log, another page's same slot, a blank slot, a flipped bit.
            assert_eq!(
                ChainEntry::from_page(&page, &LogName([2; 16]), sequence),
                None
            );
            assert_eq!(
                ChainEntry::from_page(&page, &log, sequence + PAGE_ENTRIES),
                None
            );
            assert_eq!(ChainEntry::from_page(&page, &log, sequence + 1), None);
            for bit in 0..(ENTRY_BYTES + 4) * 8 {
                page[at + bit / 8] ^= 1 << (bit % 8);
                assert_eq!(ChainEntry::from_page(&page, &log, sequence), None);
                page[at + bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn the_last_entry_ends_with_the_page() {
        assert_eq!(place(PAGE_ENTRIES - 1).1 + SLOT_BYTES, PAGE_BYTES);
        assert_eq!(place(PAGE_ENTRIES), (1, PAGE_HEAD_BYTES));
        assert_eq!(place(u64::MAX).0, u64::MAX / PAGE_ENTRIES);
    }
}
