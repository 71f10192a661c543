//! The bytes of a simulated file in pages that copies share until one of them writes.

use std::sync::Arc;

use super::{BLOCK_BYTES, SECTOR_BYTES};

const PAGE: usize = 4096;

/// Bytes of a write. A zero-fill of a whole log file is one number.
#[derive(Debug, Clone)]
pub(super) enum Data {
    Bytes(Arc<[u8]>),
    Zeros(usize),
}

impl Data {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeros(len) => *len,
        }
    }

    /// The front part of it.
    pub(super) fn front(&self, len: usize) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes(bytes.get(..len).unwrap_or(bytes).into()),
            Self::Zeros(all) => Self::Zeros(len.min(*all)),
        }
    }
}

/// A file's content. What lies beyond `len` in the last page is zero.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    len: usize,
    /// `None` is a page of zeros.
    pages: Vec<Option<Arc<[u8; PAGE]>>>,
}

impl Content {
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.write(0, bytes);
        content
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn allocated(&self) -> u64 {
        (self.len as u64).next_multiple_of(BLOCK_BYTES)
    }

    /// Makes it at least this long, with zeros.
    pub(super) fn extend(&mut self, len: usize) {
        if len > self.len {
            self.len = len;
            self.pages.resize(len.div_ceil(PAGE), None);
        }
    }

    /// Pages that a range touches: number, offset in the page, and the range's part in it.
    fn parts(offset: usize, len: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            (done < len).then(|| {
                let at = offset + done;
                let inside = at % PAGE;
                let count = (PAGE - inside).min(len - done);
                let part = (at / PAGE, inside, done, count);
                done += count;
                part
            })
        })
    }

    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.extend(offset + bytes.len());
        for (page, inside, done, count) in Self::parts(offset, bytes.len()) {
            let from = bytes.get(done..done + count).unwrap_or_default();
            let Some(slot) = self.pages.get_mut(page) else {
                continue;
            };
            if slot.is_none() && from.iter().all(|byte| *byte == 0) {
                continue;
            }
            let page = Arc::make_mut(slot.get_or_insert_with(|| Arc::new([0; PAGE])));
            if let Some(to) = page.get_mut(inside..inside + count) {
                to.copy_from_slice(from);
            }
        }
    }

    pub(super) fn zero(&mut self, offset: usize, len: usize) {
        self.extend(offset + len);
        for (page, inside, _, count) in Self::parts(offset, len) {
            let Some(slot) = self.pages.get_mut(page) else {
                continue;
            };
            if count == PAGE {
                *slot = None;
            } else if let Some(page) = slot
                && let Some(to) = Arc::make_mut(page).get_mut(inside..inside + count)
            {
                to.fill(0);
            }
        }
    }

    /// Writes the part `from..to`, given as offsets in the file, of data that stands at `offset`.
    pub(super) fn put(&mut self, offset: usize, data: &Data, from: usize, to: usize) {
        match data {
            Data::Zeros(_) => self.zero(from, to - from),
            Data::Bytes(bytes) => {
                let part = from.saturating_sub(offset)..to.saturating_sub(offset);
                self.write(from, bytes.get(part).unwrap_or_default());
            }
        }
    }

    /// Fills the buffer; false if the file ends before.
    pub(super) fn read(&self, offset: usize, buffer: &mut [u8]) -> bool {
        if offset.saturating_add(buffer.len()) > self.len {
            return false;
        }
        for (page, inside, done, count) in Self::parts(offset, buffer.len()) {
            let Some(to) = buffer.get_mut(done..done + count) else {
                continue;
            };
            match self.pages.get(page) {
                Some(Some(page)) => {
                    to.copy_from_slice(page.get(inside..inside + count).unwrap_or_default());
                }
                _ => to.fill(0),
            }
        }
        true
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.read(0, &mut out);
        out
    }

    /// Whether writing this part would change nothing, not even the length.
    pub(super) fn has(&self, offset: usize, data: &Data, from: usize, to: usize) -> bool {
        if to > self.len {
            return false;
        }
        match data {
            Data::Zeros(_) => self.is_zero(from, to),
            Data::Bytes(bytes) => {
                let part = from.saturating_sub(offset)..to.saturating_sub(offset);
                let mut held = [0; SECTOR_BYTES];
                match (bytes.get(part), held.get_mut(..to - from)) {
                    (Some(new), Some(held)) => self.read(from, held) && *held == *new,
                    _ => false,
                }
            }
        }
    }

    /// Whether a range reads as zeros; beyond the end it does.
    pub(super) fn is_zero(&self, from: usize, to: usize) -> bool {
        Self::parts(from, to.saturating_sub(from)).all(|(page, inside, _, count)| {
            match self.pages.get(page) {
                Some(Some(page)) => page
                    .get(inside..inside + count)
                    .is_none_or(|part| part.iter().all(|byte| *byte == 0)),
                _ => true,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_a_plain_vector_does_and_copies_share_nothing_that_is_written() {
        let mut plain: Vec<u8> = Vec::new();
        let mut pages = Content::default();
        let mut random = super::super::Random(7);
        for round in 0..500usize {
            let offset = super::super::survival::below(&mut random, 20_000);
            let len = super::super::survival::below(&mut random, 9_000);
            let before = pages.clone();
            let old = plain.clone();
            if plain.len() < offset + len {
                plain.resize(offset + len, 0);
            }
            if round % 3 == 0 {
                pages.zero(offset, len);
                plain[offset..offset + len].fill(0);
            } else {
                let bytes = vec![u8::try_from(round % 256).unwrap(); len];
                pages.write(offset, &bytes);
                plain[offset..offset + len].copy_from_slice(&bytes);
            }
            assert_eq!(before.to_vec(), old);
            assert_eq!(pages.to_vec(), plain);
            let sector = offset / SECTOR_BYTES * SECTOR_BYTES;
            let end = (sector + SECTOR_BYTES).min(plain.len());
            assert_eq!(
                pages.is_zero(sector, end),
                plain[sector..end].iter().all(|b| *b == 0)
            );
            let same = Data::Bytes(plain[sector..end].into());
            assert!(pages.has(sector, &same, sector, end));
        }
        let mut none = [0; 1];
        assert!(!pages.read(plain.len(), &mut none));
    }
}
