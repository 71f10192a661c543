//! The catalog of the index: what is held of every log as of one number of the journal.

use bincode::{Decode, Encode};

use crate::codec;
use crate::id::{DomainId, Origin, SegmentId};
use crate::limits::MAX_CATALOG_BYTES;

/// The first eight bytes; the digit is the version of the whole index.
const CATALOG_MAGIC: &[u8; 8] = b"TIDECAT2";
/// Of the version before, whose journal knows no groups; all else is alike.
const CATALOG_MAGIC_1: &[u8; 8] = b"TIDECAT1";

/// Where the catalog lies.
pub(crate) const CATALOG_PATH: &str = "index/catalog";

/// What is held of one log.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct LogRecord {
    pub(super) origin: Origin,
    /// Sequences held, inclusive, ascending and apart.
    pub(super) ranges: Vec<(u64, u64)>,
    /// Pages by number, with the bytes allocated to each.
    pub(super) pages: Vec<(u64, u64)>,
    /// Allocated to the segments.
    pub(super) allocated: u64,
    /// Allocated to their receipts.
    pub(super) receipts: u64,
    /// How many segments have this many receipts; the last counts those with more, too.
    pub(super) by_custodians: Vec<u64>,
    /// The segment with the highest sequence, if it was known.
    pub(super) last_id: Option<SegmentId>,
}

/// The catalog.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(super) struct Catalog {
    pub(super) domain: DomainId,
    /// The last announcement of the journal that is contained.
    pub(super) number: u64,
    /// Where the scrub goes on.
    pub(super) scrubbed: Option<(Origin, u64)>,
    pub(super) logs: Vec<LogRecord>,
}

impl Catalog {
    pub(super) fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let body = codec::encode::<_, MAX_CATALOG_BYTES>(self)?;
        let mut out = CATALOG_MAGIC.to_vec();
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads a catalog; the error tells why it cannot be used.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (magic, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or("the catalog is truncated")?;
        if magic != CATALOG_MAGIC && magic != CATALOG_MAGIC_1 {
            return Err("the catalog is of another version");
        }
        let (crc, body) = rest
            .split_first_chunk::<4>()
            .ok_or("the catalog is truncated")?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err("the catalog's checksum does not fit");
        }
        codec::decode::<_, MAX_CATALOG_BYTES>(body).map_err(|_| "the catalog is malformed")
    }
}

/// Reads a catalog and gives what it would be written as in its version; for the fuzz harness.
pub(crate) fn reencode(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut again = Catalog::decode(bytes).ok()?.encode().ok()?;
    if bytes.starts_with(CATALOG_MAGIC_1)
        && let Some(magic) = again.first_chunk_mut::<8>()
    {
        *magic = *CATALOG_MAGIC_1;
    }
    Some(again)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalog_comes_back_and_no_byte_of_it_may_change() {
        let catalog = Catalog {
            domain: DomainId::new("site").unwrap(),
            number: 9,
            scrubbed: Some((Origin::parse("audit/n1/0123456789abcdef/1").unwrap(), 4)),
            logs: vec![LogRecord {
                origin: Origin::parse("audit/n1/0123456789abcdef/1").unwrap(),
                ranges: vec![(0, 3), (9, 9)],
                pages: vec![(0, 16384)],
                allocated: 5 * 4096,
                receipts: 0,
                by_custodians: vec![5],
                last_id: None,
            }],
        };
        let mut bytes = catalog.encode().unwrap();
        assert_eq!(Catalog::decode(&bytes), Ok(catalog.clone()));
        for at in 0..bytes.len() {
            bytes[at] ^= 0x10;
            assert!(Catalog::decode(&bytes).is_err(), "{at}");
            bytes[at] ^= 0x10;
            assert!(Catalog::decode(&bytes[..at]).is_err(), "{at}");
        }
        bytes[7] = b'1';
        assert_eq!(Catalog::decode(&bytes), Ok(catalog));
        assert_eq!(reencode(&bytes), Some(bytes.clone()));
        bytes[7] = b'3';
        assert_eq!(
            Catalog::decode(&bytes),
            Err("the catalog is of another version")
        );
    }
}
