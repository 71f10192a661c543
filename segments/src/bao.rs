//! Ranges of a segment that prove themselves: BLAKE3's own tree, in groups of 16 KiB.
//!
//! A segment's id is the root of a binary tree over its bytes. A *slice* is a range of whole groups
//! together with the pairs of hashes on the way from the root to them, in pre-order, so that each
//! group is checked against the id by itself, whoever sent it. The bytes are those of the bao
//! encoding with 16 chunks in a group and without a length in front, as the crate `bao-tree` writes
//! them at block size 4. The layout is in `docs/src/format.md`.
//!
//! The functions do no I/O of their own: whoever calls brings the bytes. Start at [`encode_range`]
//! and [`decode_range`].

use std::ops::Range;

use blake3::hazmat::{HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::id::SegmentId;
use crate::limits::{MAX_SEGMENT_BYTES, MAX_SLICE_BYTES};

/// Bytes of a group: 16 chunks of BLAKE3. The last group of a segment may be shorter.
pub const GROUP_BYTES: u64 = 16 * 1024;
const GROUP: usize = 16 * 1024;

/// The hashes of the left and the right half below a node, one after the other.
pub type Pair = [u8; 64];

const PAIR: usize = size_of::<Pair>();

/// Why a slice was not made or not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BaoError {
    /// Larger than any segment.
    #[error("{size_bytes} bytes exceed the limit of {MAX_SEGMENT_BYTES} for a segment")]
    Size {
        /// The claimed size.
        size_bytes: u64,
    },
    /// Empty, outside of the segment or longer than a slice may be.
    #[error(
        "the range {start}..{end} is empty, outside of the {size_bytes} bytes of the segment, or \
         longer than {MAX_SLICE_BYTES} bytes"
    )]
    Range {
        /// The range's first byte.
        start: u64,
        /// The byte after its last.
        end: u64,
        /// The segment's size.
        size_bytes: u64,
    },
    /// A slice of another length than its range and the segment's size demand.
    #[error("the slice has {actual} bytes where {expected} are needed")]
    Length {
        /// What the range demands.
        expected: u64,
        /// What is there.
        actual: u64,
    },
    /// Hashes or content that do not belong to the segment.
    #[error("bytes {start}..{end} do not belong to the segment")]
    Mismatch {
        /// The first byte in doubt.
        start: u64,
        /// The byte after the last in doubt.
        end: u64,
    },
}

/// How many groups a segment of this size has: at least one.
///
/// # Errors
/// [`BaoError::Size`] above [`MAX_SEGMENT_BYTES`].
pub(crate) fn groups(size_bytes: u64) -> Result<usize, BaoError> {
    usize::try_from(size_bytes.div_ceil(GROUP_BYTES).max(1))
        .ok()
        .filter(|_| size_bytes <= MAX_SEGMENT_BYTES)
        .ok_or(BaoError::Size { size_bytes })
}

/// The length of one group.
pub(crate) fn group_len(size_bytes: u64, group: usize) -> usize {
    let left = size_bytes.saturating_sub(group as u64 * GROUP_BYTES);
    usize::try_from(left).unwrap_or(GROUP).min(GROUP)
}

/// The bytes of a range of groups.
pub(crate) fn bytes_of(size_bytes: u64, groups: &Range<usize>) -> Range<u64> {
    let end = (groups.end as u64 * GROUP_BYTES).min(size_bytes);
    groups.start as u64 * GROUP_BYTES..end
}

/// The groups that a range of bytes touches.
fn groups_of(size_bytes: u64, range: &Range<u64>) -> Result<Range<usize>, BaoError> {
    let all = groups(size_bytes)?;
    let refused = BaoError::Range {
        start: range.start,
        end: range.end,
        size_bytes,
    };
    // An empty segment has one group, which is empty.
    let whole_of_nothing = size_bytes == 0 && *range == (0..0);
    if range.end > size_bytes || (range.start >= range.end && !whole_of_nothing) {
        return Err(refused);
    }
    let index = |n: u64| usize::try_from(n).map_err(|_| refused);
    let first = index(range.start / GROUP_BYTES)?;
    let end = index(range.end.div_ceil(GROUP_BYTES))?.max(1);
    let touched = bytes_of(size_bytes, &(first..end));
    if end > all || touched.end - touched.start > MAX_SLICE_BYTES {
        return Err(refused);
    }
    Ok(first..end)
}

/// The range widened to whole groups: what a slice for it carries.
///
/// # Errors
/// [`BaoError`] if the size or the range is refused.
pub fn aligned(size_bytes: u64, range: &Range<u64>) -> Result<Range<u64>, BaoError> {
    Ok(bytes_of(size_bytes, &groups_of(size_bytes, range)?))
}

/// The exact length of the slice for a range, before anything is read.
///
/// # Errors
/// [`BaoError`] if the size or the range is refused.
pub fn slice_len(size_bytes: u64, range: &Range<u64>) -> Result<u64, BaoError> {
    let wanted = groups_of(size_bytes, range)?;
    let bytes = bytes_of(size_bytes, &wanted);
    let pairs = pairs_above(groups(size_bytes)?, &|span| overlap(span, &wanted));
    Ok(bytes.end - bytes.start + (pairs.len() * PAIR) as u64)
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// How many of the groups below a node lie in its left half: the largest power of two below.
fn split(count: usize) -> usize {
    count.div_ceil(2).next_power_of_two()
}

/// The places, in pre-order over the whole tree, of the pairs above the wanted groups.
pub(crate) fn pairs_above(groups: usize, wanted: &dyn Fn(&Range<usize>) -> bool) -> Vec<usize> {
    fn descend(
        span: Range<usize>,
        place: usize,
        wanted: &dyn Fn(&Range<usize>) -> bool,
        found: &mut Vec<usize>,
    ) {
        if span.len() < 2 || !wanted(&span) {
            return;
        }
        found.push(place);
        let left = split(span.len());
        let middle = span.start + left;
        descend(span.start..middle, place + 1, wanted, found);
        descend(middle..span.end, place + left, wanted, found);
    }
    let mut found = Vec::new();
    descend(0..groups, 0, wanted, &mut found);
    found
}

/// The hash of a group. It is the root's only if the group is the whole segment.
fn group_hash(group: usize, bytes: &[u8], root: bool) -> [u8; 32] {
    if root {
        return *blake3::hash(bytes).as_bytes();
    }
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(group as u64 * GROUP_BYTES);
    hasher.update(bytes).finalize_non_root()
}

fn halves(pair: &Pair) -> ([u8; 32], [u8; 32]) {
    let (mut left, mut right) = ([0; 32], [0; 32]);
    for (slot, byte) in left.iter_mut().chain(right.iter_mut()).zip(pair) {
        *slot = *byte;
    }
    (left, right)
}

fn joined(left: &[u8; 32], right: &[u8; 32]) -> Pair {
    let mut pair = [0; PAIR];
    for (slot, byte) in pair.iter_mut().zip(left.iter().chain(right)) {
        *slot = *byte;
    }
    pair
}

fn pair_hash(left: &[u8; 32], right: &[u8; 32], root: bool) -> [u8; 32] {
    if root {
        *merge_subtrees_root(left, right, Mode::Hash).as_bytes()
    } else {
        merge_subtrees_non_root(left, right, Mode::Hash)
    }
}

/// Where a walk down the tree gets hashes and content from, and what it does with those that fit.
pub(crate) trait Visit {
    type Error;
    /// Whether any of these groups is asked for.
    fn wants(&self, groups: &Range<usize>) -> bool;
    /// The pair at a place of the pre-order, if there is one.
    fn pair(&mut self, place: usize) -> Result<Option<Pair>, Self::Error>;
    /// Fills the buffer with a group; `false` if it cannot be had.
    fn group(&mut self, group: usize, buffer: &mut [u8]) -> Result<bool, Self::Error>;
    /// A pair that fits.
    fn good_pair(&mut self, place: usize, pair: &Pair) -> Result<(), Self::Error>;
    /// A group that fits.
    fn good_group(&mut self, group: usize, bytes: &[u8]) -> Result<(), Self::Error>;
    /// What stands above or in these groups does not fit; after `Ok` the walk goes on beside them.
    fn bad(&mut self, groups: Range<usize>) -> Result<(), Self::Error>;
}

/// Walks down from the id, in pre-order, and checks every pair and group before it is handed on.
pub(crate) fn walk<V: Visit>(
    id: &SegmentId,
    size_bytes: u64,
    groups: usize,
    visit: &mut V,
) -> Result<(), V::Error> {
    struct Walk<'a, V> {
        size_bytes: u64,
        groups: usize,
        buffer: Vec<u8>,
        visit: &'a mut V,
    }
    impl<V: Visit> Walk<'_, V> {
        fn descend(
            &mut self,
            span: Range<usize>,
            place: usize,
            expected: &[u8; 32],
        ) -> Result<(), V::Error> {
            if !self.visit.wants(&span) {
                return Ok(());
            }
            let root = span.len() == self.groups;
            if span.len() == 1 {
                self.buffer
                    .resize(group_len(self.size_bytes, span.start), 0);
                return if self.visit.group(span.start, &mut self.buffer)?
                    && group_hash(span.start, &self.buffer, root) == *expected
                {
                    self.visit.good_group(span.start, &self.buffer)
                } else {
                    self.visit.bad(span)
                };
            }
            let Some(pair) = self.visit.pair(place)? else {
                return self.visit.bad(span);
            };
            let (left, right) = halves(&pair);
            if pair_hash(&left, &right, root) != *expected {
                return self.visit.bad(span);
            }
            self.visit.good_pair(place, &pair)?;
            let count = split(span.len());
            let middle = span.start + count;
            self.descend(span.start..middle, place + 1, &left)?;
            self.descend(middle..span.end, place + count, &right)
        }
    }
    Walk {
        size_bytes,
        groups,
        buffer: Vec::with_capacity(GROUP),
        visit,
    }
    .descend(0..groups, 0, id.as_bytes())
}

/// Every pair of a segment's tree above its groups, in pre-order: 64 bytes for each 16 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outboard {
    id: SegmentId,
    size_bytes: u64,
    groups: usize,
    pairs: Vec<Pair>,
}

impl Outboard {
    /// Reads a whole segment, group by group, and computes its tree and so its id.
    ///
    /// # Errors
    /// [`BaoError::Size`], or what `read` answers.
    pub fn compute<E: From<BaoError>>(
        size_bytes: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        fn build<E>(
            span: Range<usize>,
            place: usize,
            root: bool,
            pairs: &mut [Pair],
            hash: &mut dyn FnMut(usize, bool) -> Result<[u8; 32], E>,
        ) -> Result<[u8; 32], E> {
            if span.len() == 1 {
                return hash(span.start, root);
            }
            let count = split(span.len());
            let middle = span.start + count;
            let left = build(span.start..middle, place + 1, false, pairs, hash)?;
            let right = build(middle..span.end, place + count, false, pairs, hash)?;
            if let Some(slot) = pairs.get_mut(place) {
                *slot = joined(&left, &right);
            }
            Ok(pair_hash(&left, &right, root))
        }
        let groups = groups(size_bytes)?;
        let mut pairs = vec![[0; PAIR]; groups - 1];
        let mut buffer = Vec::with_capacity(GROUP);
        let mut hash = |group: usize, root: bool| -> Result<[u8; 32], E> {
            buffer.resize(group_len(size_bytes, group), 0);
            read(group as u64 * GROUP_BYTES, &mut buffer)?;
            Ok(group_hash(group, &buffer, root))
        };
        let root = build(0..groups, 0, true, &mut pairs, &mut hash)?;
        Ok(Self {
            id: SegmentId::from_bytes(root),
            size_bytes,
            groups,
            pairs,
        })
    }

    /// The tree of bytes that are in memory.
    ///
    /// # Errors
    /// [`BaoError::Size`].
    pub fn of(bytes: &[u8]) -> Result<Self, BaoError> {
        Self::compute(bytes.len() as u64, |offset, buffer: &mut [u8]| {
            copy_from(bytes, offset, buffer)
        })
    }

    /// The id of the bytes that the tree was made of.
    #[must_use]
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// The size of the segment.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The pairs in pre-order.
    #[must_use]
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }
}

/// Reads from bytes in memory, for callers of [`Outboard::compute`] and [`encode_range`].
///
/// # Errors
/// [`BaoError::Length`] if the bytes end before the buffer is full.
pub fn copy_from(bytes: &[u8], offset: u64, buffer: &mut [u8]) -> Result<(), BaoError> {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    match bytes.get(from..from.saturating_add(buffer.len())) {
        Some(part) => {
            buffer.copy_from_slice(part);
            Ok(())
        }
        None => Err(BaoError::Length {
            expected: offset.saturating_add(buffer.len() as u64),
            actual: bytes.len() as u64,
        }),
    }
}

/// Makes the slice for a range, widened to whole groups. What is read is checked against the tree on
/// the way, so a damaged file is noticed here and not by the peer.
///
/// # Errors
/// [`BaoError::Range`]; [`BaoError::Mismatch`] if the bytes are not those of the tree; what `read`
/// answers.
pub fn encode_range<E: From<BaoError>>(
    outboard: &Outboard,
    range: &Range<u64>,
    read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    struct Encode<'a, R> {
        outboard: &'a Outboard,
        wanted: Range<usize>,
        read: R,
        out: Vec<u8>,
    }
    impl<E: From<BaoError>, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Visit for Encode<'_, R> {
        type Error = E;
        fn wants(&self, groups: &Range<usize>) -> bool {
            overlap(groups, &self.wanted)
        }
        fn pair(&mut self, place: usize) -> Result<Option<Pair>, E> {
            Ok(self.outboard.pairs.get(place).copied())
        }
        fn group(&mut self, group: usize, buffer: &mut [u8]) -> Result<bool, E> {
            (self.read)(group as u64 * GROUP_BYTES, buffer).map(|()| true)
        }
        fn good_pair(&mut self, _place: usize, pair: &Pair) -> Result<(), E> {
            self.out.extend_from_slice(pair);
            Ok(())
        }
        fn good_group(&mut self, _group: usize, bytes: &[u8]) -> Result<(), E> {
            self.out.extend_from_slice(bytes);
            Ok(())
        }
        fn bad(&mut self, groups: Range<usize>) -> Result<(), E> {
            Err(mismatch(self.outboard.size_bytes, &groups).into())
        }
    }
    let size_bytes = outboard.size_bytes;
    let length = usize::try_from(slice_len(size_bytes, range)?).unwrap_or(0);
    let mut encode = Encode {
        outboard,
        wanted: groups_of(size_bytes, range)?,
        read,
        out: Vec::with_capacity(length),
    };
    walk(&outboard.id, size_bytes, outboard.groups, &mut encode)?;
    Ok(encode.out)
}

fn mismatch(size_bytes: u64, groups: &Range<usize>) -> BaoError {
    let Range { start, end } = bytes_of(size_bytes, groups);
    BaoError::Mismatch { start, end }
}

/// One verified part of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// Hashes on the way to the groups that follow.
    Pair {
        /// Its place in the pre-order over the whole tree.
        place: usize,
        /// The hashes.
        pair: &'a Pair,
    },
    /// Content.
    Group {
        /// Its place in the segment.
        offset: u64,
        /// Its bytes.
        bytes: &'a [u8],
    },
}

/// Reads the slice for a range of the segment of this id and size, and hands on each part when it
/// was checked against the id, never before. What was handed on before an error is good.
///
/// A wrong size is noticed with the last group at the latest: a last group that fits proves the size.
///
/// # Errors
/// [`BaoError::Length`] before anything is looked at, [`BaoError::Mismatch`] at the first part that
/// does not belong to the segment, and what `take` answers.
pub fn decode_range<E: From<BaoError>>(
    id: &SegmentId,
    size_bytes: u64,
    range: &Range<u64>,
    slice: &[u8],
    take: impl FnMut(Item<'_>) -> Result<(), E>,
) -> Result<(), E> {
    struct Decode<'a, T> {
        size_bytes: u64,
        wanted: Range<usize>,
        rest: &'a [u8],
        take: T,
    }
    impl<'a, T> Decode<'a, T> {
        fn next(&mut self, count: usize) -> &'a [u8] {
            let (head, tail) = self.rest.split_at_checked(count).unwrap_or_default();
            self.rest = tail;
            head
        }
    }
    impl<E: From<BaoError>, T: FnMut(Item<'_>) -> Result<(), E>> Visit for Decode<'_, T> {
        type Error = E;
        fn wants(&self, groups: &Range<usize>) -> bool {
            overlap(groups, &self.wanted)
        }
        fn pair(&mut self, _place: usize) -> Result<Option<Pair>, E> {
            Ok(Pair::try_from(self.next(PAIR)).ok())
        }
        fn group(&mut self, _group: usize, buffer: &mut [u8]) -> Result<bool, E> {
            let bytes = self.next(buffer.len());
            let whole = bytes.len() == buffer.len();
            if whole {
                buffer.copy_from_slice(bytes);
            }
            Ok(whole)
        }
        fn good_pair(&mut self, place: usize, pair: &Pair) -> Result<(), E> {
            (self.take)(Item::Pair { place, pair })
        }
        fn good_group(&mut self, group: usize, bytes: &[u8]) -> Result<(), E> {
            let offset = group as u64 * GROUP_BYTES;
            (self.take)(Item::Group { offset, bytes })
        }
        fn bad(&mut self, groups: Range<usize>) -> Result<(), E> {
            Err(mismatch(self.size_bytes, &groups).into())
        }
    }
    let expected = slice_len(size_bytes, range)?;
    let actual = slice.len() as u64;
    if expected != actual {
        return Err(BaoError::Length { expected, actual }.into());
    }
    let mut decode = Decode {
        size_bytes,
        wanted: groups_of(size_bytes, range)?,
        rest: slice,
        take,
    };
    walk(id, size_bytes, groups(size_bytes)?, &mut decode)
}
