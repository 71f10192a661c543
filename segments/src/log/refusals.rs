//! Counts of what was refused at capacity, kept in a file of fixed size, so that a crash loses none: a
//! refusal is answered after its count is durable, and a full disk has room for it.

use std::sync::Arc;

use super::file::{AlignedBuffer, LiveFile};
use crate::frame::BATCH_ALIGN;
use crate::ledger::Charge;
use crate::root::{Root, RootError};

/// Path of the file below the root.
pub(crate) const REFUSALS_PATH: &str = "log/refused";
const MAGIC: &[u8; 8] = b"TIDEREF1";
/// Two slots that are written in turn, so that a torn write leaves the one before.
const SLOTS: u64 = 2;
const SLOT_BYTES: usize = BATCH_ALIGN;
const FILE_BYTES: u64 = SLOTS * SLOT_BYTES as u64;

/// What was refused since the last summary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Refused {
    /// Number of the summary that will tell of it.
    pub(super) window: u64,
    pub(super) decisions: u64,
    pub(super) denials: u64,
    pub(super) first_unix_ms: u64,
    pub(super) last_unix_ms: u64,
}

impl Refused {
    pub(super) fn is_empty(&self) -> bool {
        self.decisions == 0 && self.denials == 0
    }

    pub(super) fn next_window(&self) -> Self {
        Self {
            window: self.window.saturating_add(1),
            ..Self::default()
        }
    }

    fn numbers(&self) -> [u64; 5] {
        [
            self.window,
            self.decisions,
            self.denials,
            self.first_unix_ms,
            self.last_unix_ms,
        ]
    }
}

fn encode(generation: u64, refused: &Refused) -> Vec<u8> {
    let mut body = generation.to_le_bytes().to_vec();
    for number in refused.numbers() {
        body.extend_from_slice(&number.to_le_bytes());
    }
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    out.extend_from_slice(&body);
    out.resize(SLOT_BYTES, 0);
    out
}

fn decode(slot: &[u8]) -> Option<(u64, Refused)> {
    let (crc, rest) = slot.strip_prefix(MAGIC)?.split_first_chunk::<4>()?;
    let body = rest.get(..48)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut numbers = body
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let generation = numbers.next()?;
    Some((
        generation,
        Refused {
            window: numbers.next()?,
            decisions: numbers.next()?,
            denials: numbers.next()?,
            first_unix_ms: numbers.next()?,
            last_unix_ms: numbers.next()?,
        },
    ))
}

/// The open file.
pub(super) struct Refusals {
    root: Arc<Root>,
    /// `None` where there is no room for the file, or after it failed: then a crash loses the counts.
    file: Option<LiveFile>,
    generation: u64,
    buffer: AlignedBuffer,
}

impl Refusals {
    /// Opens or makes the file and reads what was counted.
    pub(super) fn open(root: &Arc<Root>) -> Result<(Self, Refused), RootError> {
        let mut this = Self {
            root: Arc::clone(root),
            file: None,
            generation: 0,
            buffer: AlignedBuffer::with_room(SLOT_BYTES),
        };
        let mut refused = Refused::default();
        if let Some(bytes) = root.read(REFUSALS_PATH)? {
            let newest = bytes
                .chunks(SLOT_BYTES)
                .filter_map(decode)
                .max_by_key(|(generation, _)| *generation);
            if let Some((generation, found)) = newest {
                this.generation = generation;
                refused = found;
            }
            if bytes.len() as u64 == FILE_BYTES {
                this.file = Some(LiveFile::open(root, REFUSALS_PATH)?);
            }
        }
        if this.file.is_none() {
            this.make(&refused)?;
        }
        Ok((this, refused))
    }

    /// Makes the file anew, in the reserve.
    fn make(&mut self, refused: &Refused) -> Result<(), RootError> {
        self.generation = self.generation.saturating_add(1);
        let bytes = encode(self.generation, refused).repeat(usize::try_from(SLOTS).unwrap_or(2));
        match self
            .root
            .write_atomic(REFUSALS_PATH, &bytes, Charge::Reserve)
        {
            Ok(()) => {
                self.file = Some(LiveFile::open(&self.root, REFUSALS_PATH)?);
                Ok(())
            }
            // Starting above the ceiling is allowed (ruling 23).
            Err(RootError::Ceiling(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes the counts durable. After a failure the file is not used again in this run, until
    /// [`Refusals::reopen`].
    pub(super) fn keep(&mut self, refused: &Refused) {
        let Some(file) = self.file.take() else { return };
        self.generation = self.generation.saturating_add(1);
        let (bytes, start) = self.buffer.parts();
        bytes.truncate(start);
        bytes.extend_from_slice(&encode(self.generation, refused));
        let offset = self.generation % SLOTS * SLOT_BYTES as u64;
        match file.commit(offset, self.buffer.content()) {
            Ok(file) => self.file = Some(file),
            Err(error) => {
                tracing::error!(%error, "counts of refused records are kept in memory only");
            }
        }
    }

    /// Makes the file anew after a failure.
    pub(super) fn reopen(&mut self, refused: &Refused) -> Result<(), RootError> {
        if self.file.is_some() {
            return Ok(());
        }
        self.make(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_reads_back_and_every_flipped_byte_of_it_is_seen() {
        let refused = Refused {
            window: 3,
            decisions: 7,
            denials: 9,
            first_unix_ms: 11,
            last_unix_ms: 13,
        };
        let slot = encode(5, &refused);
        assert_eq!(decode(&slot), Some((5, refused)));
        for at in 0..60 {
            let mut bad = slot.clone();
            bad[at] ^= 4;
            assert_eq!(decode(&bad), None, "byte {at}");
        }
    }
}
