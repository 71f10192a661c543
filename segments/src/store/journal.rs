//! The journal of the index: a ring of 128 blocks of 512 bytes, allocated and zeroed when it is made.
//!
//! Every change of an audit segment or of its receipts is announced here and synced before the
//! rename or unlink that makes it. A start reads the blocks after the catalog's number and looks at
//! the files that they name: what lies there is what is held. Changes that are made together are
//! announced together, with one sync; each block tells how many of its group stand before it. One
//! change or group is under way at a time, so at most the last one's announcements are in doubt.

use super::chain::{ChainEntry, ENTRY_BYTES};
use crate::id::Origin;
use crate::limits::MAX_PUT_GROUP;

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
const _: () = assert!(MAX_PUT_GROUP <= u8::MAX as usize);

/// What one announcement says: this place of this log goes from one entry to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) origin: Origin,
    pub(super) sequence: u64,
    pub(super) before: Option<ChainEntry>,
    pub(super) after: Option<ChainEntry>,
}

/// One announcement, as it stands in the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) number: u64,
    /// How many announcements right before this one were synced with it.
    pub(super) of_group: u8,
    pub(super) change: Change,
}

/// What the ring says beyond a catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) changes: Vec<Change>,
    /// The last number in use.
    pub(super) number: u64,
}

/// Where the announcement with this number lies.
pub(super) fn offset(number: u64) -> u64 {
    number % JOURNAL_BLOCKS * BLOCK_BYTES as u64
}

impl Change {
    /// The block; `None` if the origin is too long to be one of an audit log.
    pub(super) fn encode(&self, number: u64, of_group: u8) -> Option<Vec<u8>> {
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
        rest.extend_from_slice(&[flags, of_group]);
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
    pub(super) fn decode(block: &[u8]) -> Option<Announced> {
        let read = Self::read(block)?;
        let again = read.change.encode(read.number, read.of_group)?;
        (again == block).then_some(read)
    }

    fn read(block: &[u8]) -> Option<Announced> {
        let (crc, rest) = block.split_first_chunk::<4>()?;
        if rest.len() != BLOCK_BYTES - 4 || crc32c::crc32c(rest) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let ([flags, of_group], rest) = rest.split_first_chunk::<2>()?;
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let (sequence, rest) = rest.split_first_chunk::<8>()?;
        let (before, rest) = rest.split_first_chunk::<ENTRY_BYTES>()?;
        let (after, rest) = rest.split_first_chunk::<ENTRY_BYTES>()?;
        let text = rest.get(..usize::from(u16::from_le_bytes(*length)))?;
        let origin = Origin::parse(std::str::from_utf8(text).ok()?).ok()?;
        let entry = |bit: u8, fields| (flags & bit != 0).then(|| ChainEntry::decode(fields));
        Some(Announced {
            number: u64::from_le_bytes(*number),
            of_group: *of_group,
            change: Self {
                origin,
                sequence: u64::from_le_bytes(*sequence),
                before: entry(HAS_BEFORE, before),
                after: entry(HAS_AFTER, after),
            },
        })
    }
}

/// The announcements after `number`, in order. Of the last group any may be missing: it was not synced
/// whole, so nothing of it was begun. An error tells why the ring cannot be relied upon: one before
/// that is missing.
pub(super) fn after(ring: &[u8], number: u64) -> Result<Tail, &'static str> {
    let mut found: Vec<Announced> = ring
        .chunks(BLOCK_BYTES)
        .filter_map(Change::decode)
        .filter(|announced| announced.number >= number)
        .collect();
    found.sort_by_key(|announced| announced.number);
    // The one that the catalog ends with is still there: a journal that was lost whole shows.
    if number > 0 {
        match found.first() {
            Some(announced) if announced.number == number => {
                found.remove(0);
            }
            _ => return Err("the journal does not continue the catalog"),
        }
    }
    let Some(last) = found.last() else {
        let changes = Vec::new();
        return Ok(Tail { changes, number });
    };
    let (last, group) = (last.number, u64::from(last.of_group));
    let synced = last.checked_sub(group).and_then(|n| n.checked_sub(1));
    let Some(synced) = synced.filter(|synced| *synced >= number) else {
        return Err("an announcement in the journal has a group that began before the catalog");
    };
    let there = found.iter().map(|announced| announced.number);
    if !there
        .take_while(|there| *there <= synced)
        .eq((number..synced).map(|before| before.saturating_add(1)))
    {
        return Err("an announcement in the journal is missing");
    }
    Ok(Tail {
        changes: found
            .into_iter()
            .map(|announced| announced.change)
            .collect(),
        number: last,
    })
}

/// Reads a ring from its first announcement on, and gives what its good blocks would be written as;
/// for the fuzz harness.
pub(crate) fn reencode_ring(ring: &[u8]) -> Option<Vec<u8>> {
    let blocks: Vec<Announced> = ring
        .chunks(BLOCK_BYTES)
        .filter_map(Change::decode)
        .collect();
    let first = blocks.first()?.number;
    for number in [0, first] {
        // However many of them continue one another, they are among those.
        let tail = after(ring, number).map_or_else(|_| Vec::new(), |tail| tail.changes);
        if !(tail.iter()).all(|change| blocks.iter().any(|read| read.change == *change)) {
            return Some(Vec::new());
        }
    }
    let blocks: Option<Vec<Vec<u8>>> = blocks
        .iter()
        .map(|read| read.change.encode(read.number, read.of_group))
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
        for (sequence, of_group) in (0..6).zip([0, 0, 1, 31, 7, 255]) {
            let mut block = change(sequence).encode(77, of_group).unwrap();
            assert_eq!(block.len(), BLOCK_BYTES);
            let announced = Announced {
                number: 77,
                of_group,
                change: change(sequence),
            };
            assert_eq!(Change::decode(&block), Some(announced));
            for bit in 0..BLOCK_BYTES * 8 {
                block[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Change::decode(&block), None);
                block[bit / 8] ^= 1 << (bit % 8);
            }
        }
        assert_eq!(Change::decode(&[0; BLOCK_BYTES]), None);
    }

    /// A ring with these announcements: number, and how many of its group stand before it.
    fn ring(of: impl IntoIterator<Item = (u64, u8)>) -> Vec<u8> {
        let mut ring = vec![0; usize::try_from(JOURNAL_BYTES).unwrap()];
        for (number, of_group) in of {
            let at = usize::try_from(offset(number)).unwrap();
            let block = change(number).encode(number, of_group).unwrap();
            ring[at..at + BLOCK_BYTES].copy_from_slice(&block);
        }
        ring
    }

    #[test]
    fn a_ring_gives_its_tail_and_tells_of_a_hole() {
        let mut ring = ring((1..=200).map(|number| (number, 0)));
        let tail = after(&ring, 150).unwrap();
        assert_eq!((tail.changes.len(), tail.number), (50, 200));
        let sequences = (tail.changes[0].sequence, tail.changes[49].sequence);
        assert_eq!(sequences, (151, 200));
        let none = Tail {
            changes: Vec::new(),
            number: 200,
        };
        assert_eq!(after(&ring, 200), Ok(none));
        // Announcements that were overwritten meanwhile.
        assert!(after(&ring, 60).is_err());
        // The last one torn: it was never synced. One before it: damage.
        ring[usize::try_from(offset(200)).unwrap() + 20] ^= 1;
        assert_eq!(after(&ring, 150).unwrap().changes.len(), 49);
        ring[usize::try_from(offset(180)).unwrap() + 20] ^= 1;
        assert!(after(&ring, 150).is_err());
    }

    #[test]
    fn of_the_last_group_any_may_be_missing_and_of_those_before_none() {
        let before = [(1, 0), (2, 0), (3, 1), (4, 2)];
        let group = [(5, 0), (6, 1), (7, 2), (8, 3)];
        for kept in 0u32..16 {
            let some = (0..4).filter(|at| kept >> at & 1 == 1).map(|at| group[at]);
            let last = some.clone().next_back().map_or(4, |(number, _)| number);
            let tail = after(&ring(before.into_iter().chain(some.clone())), 1).unwrap();
            assert_eq!(tail.number, last, "{kept:b}");
            let sequences: Vec<u64> = tail.changes.iter().map(|c| c.sequence).collect();
            let there = [2, 3, 4].into_iter().chain(some.map(|(number, _)| number));
            assert_eq!(sequences, there.collect::<Vec<_>>(), "{kept:b}");
        }
        // The same hole in a group that another one follows is damage.
        let torn = [(5, 0), (7, 2), (8, 3)];
        let ring_of = |more: &[(u64, u8)]| {
            let all = before.iter().chain(&torn).chain(more).copied();
            after(&ring(all), 1)
        };
        assert!(ring_of(&[]).is_ok());
        for next in [[(9, 0)].as_slice(), &[(9, 0), (10, 1)], &[(10, 1)]] {
            assert!(ring_of(next).is_err(), "{next:?}");
        }
        // A group does not begin before the catalog that it follows.
        assert!(after(&ring([(5, 0), (6, 1), (7, 2)]), 5).is_err());
    }
}
