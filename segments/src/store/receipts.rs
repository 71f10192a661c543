//! The file of a segment's receipts: `receipts/<hex>.rcpts`, all of them in the order of their
//! custodians, each with its own checksum. A damaged one does not count; the others do.

use crate::id::NodeId;
use crate::limits::{MAX_RECEIPT_BYTES, MAX_RECEIPTS_PER_SEGMENT};
use crate::receipt::{CustodyReceipt, ReceiptError};

pub(crate) const RECEIPTS_MAGIC: &[u8; 8] = b"TIDERCP1";

/// Most bytes of such a file.
pub(crate) const MAX_RECEIPTS_FILE_BYTES: u64 =
    8 + MAX_RECEIPTS_PER_SEGMENT as u64 * (8 + MAX_RECEIPT_BYTES as u64);

/// The bytes of a file that holds these.
pub(crate) fn encode(receipts: &[CustodyReceipt]) -> Result<Vec<u8>, ReceiptError> {
    let mut out = RECEIPTS_MAGIC.to_vec();
    for receipt in receipts {
        let bytes = receipt.encode()?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

/// The receipts of a file that are whole, one a custodian; their signatures are not looked at.
pub(crate) fn decode(bytes: &[u8]) -> Vec<CustodyReceipt> {
    let mut found: Vec<CustodyReceipt> = Vec::new();
    let Some(mut rest) = bytes.strip_prefix(RECEIPTS_MAGIC) else {
        return found;
    };
    while let Some((length, after)) = rest.split_first_chunk::<4>()
        && let Some((crc, after)) = after.split_first_chunk::<4>()
        && let Ok(length) = usize::try_from(u32::from_le_bytes(*length))
        && length <= MAX_RECEIPT_BYTES
        && let Some((piece, after)) = after.split_at_checked(length)
        && found.len() < MAX_RECEIPTS_PER_SEGMENT
    {
        rest = after;
        if crc32c::crc32c(piece) != u32::from_le_bytes(*crc) {
            continue;
        }
        if let Ok(receipt) = CustodyReceipt::decode(piece)
            && !found.iter().any(|held| held.custodian == receipt.custodian)
        {
            found.push(receipt);
        }
    }
    found
}

/// Puts a receipt among those that are there, in the place of the same custodian's older one.
pub(super) fn insert(receipts: &mut Vec<CustodyReceipt>, receipt: CustodyReceipt) {
    remove(receipts, &receipt.custodian);
    let at = receipts.partition_point(|held| held.custodian < receipt.custodian);
    receipts.insert(at, receipt);
}

/// Takes a custodian's receipt out.
pub(super) fn remove(receipts: &mut Vec<CustodyReceipt>, custodian: &NodeId) {
    receipts.retain(|held| held.custodian != *custodian);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{DomainId, Origin, SegmentId, Sha256Hash};
    use crate::keys::LogKey;
    use crate::testing::unchecked_endorsement;

    fn receipt(custodian: &str) -> CustodyReceipt {
        let key = LogKey::from_seed(&[7; 32]).unwrap();
        let custodian = NodeId::new(custodian).unwrap();
        CustodyReceipt {
            domain: DomainId::new("site").unwrap(),
            origin: Origin::parse("audit/n1/0123456789abcdef/1").unwrap(),
            segment_id: SegmentId::of(b"x"),
            first: 0,
            last: 4,
            root_at_last: Sha256Hash::of(b"x"),
            endorsement: unchecked_endorsement(&custodian, &key.public(), 1),
            custodian,
            issued_unix_ms: 5,
            signer: key.public(),
            signature: [9; 64],
        }
    }

    #[test]
    fn a_damaged_receipt_costs_only_itself() {
        let mut all = Vec::new();
        for custodian in ["n4", "n2", "n3", "n2"] {
            insert(&mut all, receipt(custodian));
        }
        let names = |of: &[CustodyReceipt]| -> Vec<String> {
            of.iter().map(|r| r.custodian.to_string()).collect()
        };
        assert_eq!(names(&all), ["n2", "n3", "n4"]);
        let mut bytes = encode(&all).unwrap();
        assert_eq!(decode(&bytes), all);
        // Inside of the second receipt.
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        assert_eq!(names(&decode(&bytes)), ["n2", "n4"]);
        bytes[middle] ^= 1;
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).len() < 3);
        }
        bytes[0] ^= 1;
        assert!(decode(&bytes).is_empty());
        remove(&mut all, &NodeId::new("n3").unwrap());
        assert_eq!(names(&all), ["n2", "n4"]);
    }
}
