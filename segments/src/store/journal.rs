//! The journal of the index: a ring of 128 blocks of 512 bytes, allocated and zeroed when it is made.
//!
//! Every change of an audit segment or of its receipts is announced here and synced before the
//! rename or unlink that makes it. A start reads the blocks after the catalog's number and looks at
//! the files that they name: what lies there is what is held. One change is under way at a time, so
//! at most the last announcement is in doubt.

use super::chain::{ChainEntry, ENTRY_BYTES};
use crate::id::Origin;

/// Bytes of one announcement.
pub(crate) const BLOCK_BYTES: usize = 512;
/// Announcements in the ring, and so the most that a start replays.
pub(crate) const JOURNAL_BLOCKS: u64 = 128;
/// Bytes of the ring.
pub(super) const JOURNAL_BYTES: u64 = JOURNAL_BLOCKS * BLOCK_BYTES as u64;

const HAS_BEFORE: u8 = 1;
const HAS_AFTER: u8 = 2;
const HEAD_BYTES: usize = 4 + 8 + 1 + 1 + 2 + 8;
/// Longest origin text in an announcement: an audit origin has at most 107 bytes.
const MAX_TEXT_BYTES: usize = BLOCK_BYTES - HEAD_BYTES - 2 * ENTRY_BYTES;

const _: () = assert!(MAX_TEXT_BYTES >= 107);

/// What one announcement says: this place of this log goes from one entry to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) origin: Origin,
    pub(super) sequence: u64,
    pub(super) before: Option<ChainEntry>,
    pub(super) after: Option<ChainEntry>,
}

/// Where the announcement with this number lies.
pub(super) fn offset(number: u64) -> u64 {
    number % JOURNAL_BLOCKS * BLOCK_BYTES as u64
}

impl Change {
    /// The block; `None` if the origin is too long to be one of an audit log.
    pub(super) fn encode(&self, number: u64) -> Option<Vec<u8>> {
        let text = self.origin.as_str().as_bytes();
        if text.len() > MAX_TEXT_BYTES {
            return None;
        }
        let fields = |entry: &Option<ChainEntry>| match entry {
            Some(entry) => entry.encode(),
            None => [0; ENTRY_BYTES],
        };
        let flags = u8::from(self.before.is_some()) * HAS_BEFORE
            + u8::from(self.after.is_some()) * HAS_AFTER;
        let mut rest = number.to_le_bytes().to_vec();
        rest.extend_from_slice(&[flags, 0]);
        rest.extend_from_slice(&u16::try_from(text.len()).ok()?.to_le_bytes());
        rest.extend_from_slice(&self.sequence.to_le_bytes());
        rest.extend_from_slice(&fields(&self.before));
        rest.extend_from_slice(&fields(&self.after));
        rest.extend_from_slice(text);
        rest.resize(BLOCK_BYTES - 4, 0);
        let mut out = crc32c::crc32c(&rest).to_le_bytes().to_vec();
        out.append(&mut rest);
        Some(out)
    }

    /// Reads a block; `None` if it is blank, torn or damaged. Bits that have no meaning here are
    /// damage too: an announcement has one spelling.
    pub(super) fn decode(block: &[u8]) -> Option<(u64, Self)> {
        let (number, change) = Self::read(block)?;
        (change.encode(number)? == block).then_some((number, change))
    }

    fn read(block: &[u8]) -> Option<(u64, Self)> {
        let (crc, rest) = block.split_first_chunk::<4>()?;
        if rest.len() != BLOCK_BYTES - 4 || crc32c::crc32c(rest) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let ([flags, _], rest) = rest.split_first_chunk::<2>()?;
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let (sequence, rest) = rest.split_first_chunk::<8>()?;
        let (before, rest) = rest.split_first_chunk::<ENTRY_BYTES>()?;
        let (after, rest) = rest.split_first_chunk::<ENTRY_BYTES>()?;
        let text = rest.get(..usize::from(u16::from_le_bytes(*length)))?;
        let origin = Origin::parse(std::str::from_utf8(text).ok()?).ok()?;
        let entry = |bit: u8, fields| (flags & bit != 0).then(|| ChainEntry::decode(fields));
        Some((
            u64::from_le_bytes(*number),
            Self {
                origin,
                sequence: u64::from_le_bytes(*sequence),
                before: entry(HAS_BEFORE, before),
                after: entry(HAS_AFTER, after),
            },
        ))
    }
}

/// The announcements after `number`, in order. An error tells why the ring cannot be relied upon:
/// one in the middle is missing.
pub(super) fn after(ring: &[u8], number: u64) -> Result<Vec<Change>, &'static str> {
    let mut found: Vec<(u64, Change)> = ring
        .chunks(BLOCK_BYTES)
        .filter_map(Change::decode)
        .filter(|(of, _)| *of >= number)
        .collect();
    found.sort_by_key(|(of, _)| *of);
    // The one that the catalog ends with is still there: a journal that was lost whole shows.
    if number > 0 {
        match found.first() {
            Some((of, _)) if *of == number => {
                found.remove(0);
            }
            _ => return Err("the journal does not continue the catalog"),
        }
    }
    let expected = (1..).map(|step| number.saturating_add(step));
    if found
        .iter()
        .zip(expected)
        .any(|((of, _), want)| *of != want)
    {
        return Err("an announcement in the journal is missing");
    }
    Ok(found.into_iter().map(|(_, change)| change).collect())
}

/// Reads a ring from its first announcement on, and gives what its good blocks would be written as;
/// for the fuzz harness.
pub(crate) fn reencode_ring(ring: &[u8]) -> Option<Vec<u8>> {
    let blocks: Vec<(u64, Change)> = ring
        .chunks(BLOCK_BYTES)
        .filter_map(Change::decode)
        .collect();
    let (first, _) = blocks.first()?;
    for number in [0, *first] {
        // However many of them continue one another, they are among those.
        let tail = after(ring, number).unwrap_or_default();
        if !(tail.iter()).all(|change| blocks.iter().any(|(_, read)| read == change)) {
            return Some(Vec::new());
        }
    }
    let blocks: Option<Vec<Vec<u8>>> = blocks
        .iter()
        .map(|(number, change)| change.encode(*number))
        .collect();
    Some(blocks?.concat())
}

#[cfg(test)]
mod tests {
    use super::super::chain::tests::entry;
    use super::*;

    fn change(sequence: u64) -> Change {
        Change {
            origin: Origin::parse(&format!(
                "audit/{}/0123456789abcdef/{}",
                "n".repeat(63),
                u64::MAX
            ))
            .unwrap(),
            sequence,
            before: sequence.is_multiple_of(2).then(|| entry(1, None)),
            after: sequence.is_multiple_of(3).then(|| entry(2, Some(1))),
        }
    }

    #[test]
    fn a_change_comes_back_and_no_bit_of_it_may_flip() {
        for sequence in 0..6 {
            let mut block = change(sequence).encode(77).unwrap();
            assert_eq!(block.len(), BLOCK_BYTES);
            assert_eq!(Change::decode(&block), Some((77, change(sequence))));
            for bit in 0..BLOCK_BYTES * 8 {
                block[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Change::decode(&block), None);
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
        assert_eq!(Change::decode(&[0; BLOCK_BYTES]), None);
    }

    #[test]
    fn a_ring_gives_its_tail_and_tells_of_a_hole() {
        let mut ring = vec![0; usize::try_from(JOURNAL_BYTES).unwrap()];
        for number in 1..=200u64 {
            let at = usize::try_from(offset(number)).unwrap();
            ring[at..at + BLOCK_BYTES].copy_from_slice(&change(number).encode(number).unwrap());
        }
        let tail = after(&ring, 150).unwrap();
        assert_eq!(tail.len(), 50);
        assert_eq!((tail[0].sequence, tail[49].sequence), (151, 200));
        assert_eq!(after(&ring, 200), Ok(vec![]));
        // Announcements that were overwritten meanwhile.
        assert!(after(&ring, 60).is_err());
        // The last one torn: it was never synced. One before it: damage.
        ring[usize::try_from(offset(200)).unwrap() + 20] ^= 1;
        assert_eq!(after(&ring, 150).unwrap().len(), 49);
        ring[usize::try_from(offset(180)).unwrap() + 20] ^= 1;
        assert!(after(&ring, 150).is_err());
    }
}
