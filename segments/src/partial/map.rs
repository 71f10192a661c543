//! What of a partial has arrived: the map on the disk, and checking what it claims against the id.

use std::ops::Range;

use bincode::{Decode, Encode};

use crate::bao::{self, Pair, Visit};
use crate::codec;
use crate::disk::DiskFile;
use crate::format::SegmentRef;
use crate::id::SegmentId;
use crate::limits::MAX_MAP_BYTES;

/// The first eight bytes of a map; the digit is its version.
const MAP_MAGIC: &[u8; 8] = b"TIDEPAR1";
/// Magic and checksum.
const MAP_FRONT: usize = 12;

/// The map, as it lies on the disk behind magic and checksum.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Map {
    pub(super) reference: SegmentRef,
    pub(super) serial: u64,
    bitmap: Vec<u8>,
    pub(super) pairs: Vec<Pair>,
}

impl Map {
    pub(super) fn new(
        reference: &SegmentRef,
        serial: u64,
        have: &[bool],
        pairs: &[Option<Pair>],
    ) -> Self {
        let mut bitmap = vec![0u8; have.len().div_ceil(8)];
        for (byte, eight) in bitmap.iter_mut().zip(have.chunks(8)) {
            for (bit, held) in eight.iter().enumerate() {
                *byte |= u8::from(*held) << bit;
            }
        }
        let needed = bao::pairs_above(have.len(), &|span| any(have, span));
        Self {
            reference: reference.clone(),
            serial,
            bitmap,
            pairs: needed
                .into_iter()
                .filter_map(|place| pairs.get(place).copied().flatten())
                .collect(),
        }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let body = codec::encode::<_, MAX_MAP_BYTES>(self)?;
        let mut out = MAP_MAGIC.to_vec();
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads a map; the groups that it claims and the hashes above them are not checked yet.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, Vec<bool>)> {
        let (front, body) = bytes.split_at_checked(MAP_FRONT)?;
        let (magic, sum) = front.split_at_checked(MAP_MAGIC.len())?;
        if magic != MAP_MAGIC || sum != crc32c::crc32c(body).to_le_bytes() {
            return None;
        }
        let map: Self = codec::decode::<_, MAX_MAP_BYTES>(body).ok()?;
        let groups = bao::groups(map.reference.size_bytes).ok()?;
        if map.bitmap.len() != groups.div_ceil(8) {
            return None;
        }
        let bits = map
            .bitmap
            .iter()
            .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        let mut have: Vec<bool> = bits.collect();
        let unused = have.split_off(groups);
        let needed = bao::pairs_above(groups, &|span| any(&have, span)).len();
        (!unused.contains(&true) && map.pairs.len() == needed).then_some((map, have))
    }

    /// An upper bound of a map's length for so many groups.
    pub(super) fn bound(groups: usize) -> u64 {
        (1024 + 512 + groups.div_ceil(8) + groups * size_of::<Pair>()) as u64
    }
}

/// Notes: two places of one length, each with the length of a map and the map.
pub(super) mod note {
    use super::Map;

    const LENGTH: usize = 4;

    /// Length of one place.
    pub(in super::super) fn place_bytes(groups: usize) -> u64 {
        LENGTH as u64 + Map::bound(groups)
    }

    /// Length of the file.
    pub(in super::super) fn file_bytes(groups: usize) -> u64 {
        2 * place_bytes(groups)
    }

    /// What is written into a place.
    pub(in super::super) fn encode(map: &[u8]) -> Vec<u8> {
        let length = u32::try_from(map.len()).unwrap_or(u32::MAX);
        [&length.to_le_bytes(), map].concat()
    }

    /// What the two places hold, maps or not.
    pub(in super::super) fn places(file: &[u8]) -> Vec<&[u8]> {
        let (first, second) = file.split_at(file.len() / 2);
        let places = [first, second].into_iter().filter_map(|place| {
            let (length, rest) = place.split_first_chunk::<LENGTH>()?;
            rest.get(..usize::try_from(u32::from_le_bytes(*length)).ok()?)
        });
        places.collect()
    }
}

/// Reads a map and writes it again, for the check that it has one encoding only.
pub(crate) fn reencode_map(bytes: &[u8]) -> Option<Vec<u8>> {
    Map::decode(bytes)?.0.encode().ok()
}

pub(super) fn any(have: &[bool], span: &Range<usize>) -> bool {
    have.get(span.clone())
        .is_some_and(|part| part.contains(&true))
}

pub(super) fn received_bytes(size_bytes: u64, have: &[bool]) -> u64 {
    have.iter()
        .enumerate()
        .filter(|(_, held)| **held)
        .map(|(group, _)| bao::group_len(size_bytes, group) as u64)
        .sum()
}

/// The groups that have arrived, and the pairs that prove them, by their place in pre-order.
pub(super) type Progress = (Vec<bool>, Vec<Option<Pair>>);

/// Goes through what is claimed to be there and keeps what fits the id.
pub(super) struct Recheck<'a> {
    have: &'a [bool],
    pairs: &'a [Option<Pair>],
    file: &'a dyn DiskFile,
    good: Vec<bool>,
    good_pairs: Vec<Option<Pair>>,
}

impl<'a> Recheck<'a> {
    pub(super) fn run(
        id: &SegmentId,
        size_bytes: u64,
        have: &'a [bool],
        pairs: &'a [Option<Pair>],
        file: &'a dyn DiskFile,
    ) -> Progress {
        let mut recheck = Self {
            have,
            pairs,
            file,
            good: vec![false; have.len()],
            good_pairs: vec![None; pairs.len()],
        };
        let Ok(()) = bao::walk(id, size_bytes, have.len(), &mut recheck);
        (recheck.good, recheck.good_pairs)
    }
}

impl Visit for Recheck<'_> {
    type Error = std::convert::Infallible;

    fn wants(&self, groups: &Range<usize>) -> bool {
        any(self.have, groups)
    }

    fn pair(&mut self, place: usize) -> Result<Option<Pair>, Self::Error> {
        Ok(self.pairs.get(place).copied().flatten())
    }

    fn group(&mut self, group: usize, buffer: &mut [u8]) -> Result<bool, Self::Error> {
        let offset = group as u64 * bao::GROUP_BYTES;
        Ok(self.file.read_at(offset, buffer).is_ok())
    }

    fn good_pair(&mut self, place: usize, pair: &Pair) -> Result<(), Self::Error> {
        if let Some(slot) = self.good_pairs.get_mut(place) {
            *slot = Some(*pair);
        }
        Ok(())
    }

    fn good_group(&mut self, group: usize, _bytes: &[u8]) -> Result<(), Self::Error> {
        if let Some(slot) = self.good.get_mut(group) {
            *slot = true;
        }
        Ok(())
    }

    fn bad(&mut self, groups: Range<usize>) -> Result<(), Self::Error> {
        tracing::warn!(
            ?groups,
            "groups of a partial do not fit its segment; dropped"
        );
        Ok(())
    }
}
