//! Custody receipts: a peer's signed word that it holds a range of a log durably (ruling 1).
//!
//! Enough receipts of distinct custodians are the only licence to evict an own sealed segment. A
//! receipt names the segment, the range and the root at its end, so it cannot be moved to another
//! segment. Whether the custodian's certificate is good is judged by the transport before a receipt
//! reaches the store.

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::body::{self, BodyError};
use crate::codec::{self, CodecError};
use crate::format::VerifiedSegment;
use crate::id::{DomainId, NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::{Endorsement, LogKey, LogPublicKey};
use crate::limits::MAX_RECEIPT_BYTES;

/// What stands before every receipt message.
pub(crate) const RECEIPT_CONTEXT: &[u8] = b"tidelock custody receipt v1\0";

/// Why a receipt was not made or not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// Not the bytes of a receipt.
    #[error("receipt: {0}")]
    Codec(#[from] CodecError),
    /// Only audit segments are taken into custody.
    #[error("{0} is no audit segment; only audit segments are taken into custody")]
    NotAudit(SegmentId),
    /// The records of the segment do not fit its checkpoint; no custody of what is not whole.
    #[error("segment {id} is not consistent: {fault}")]
    Inconsistent {
        /// The segment.
        id: SegmentId,
        /// What does not fit.
        fault: BodyError,
    },
    /// Signer and endorsement do not name the same custodian and key.
    #[error("signer and endorsement do not name the custodian {0}")]
    Signer(NodeId),
    /// The signature does not verify.
    #[error("the custodian's signature does not verify")]
    Signature,
    /// The origin would give a receipt to itself.
    #[error("a node cannot be custodian of its own log")]
    OwnLog,
}

/// A custodian's statement that it holds a segment of an origin's log durably until released.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct CustodyReceipt {
    /// The domain.
    pub domain: DomainId,
    /// The log.
    pub origin: Origin,
    /// The segment held.
    pub segment_id: SegmentId,
    /// Index of its first record.
    pub first: u64,
    /// Index of its last record.
    pub last: u64,
    /// Root of the tree over the records `0..=last`.
    pub root_at_last: Sha256Hash,
    /// Who holds it.
    pub custodian: NodeId,
    /// When the receipt was made, by the custodian's clock.
    pub issued_unix_ms: u64,
    /// The custodian's log key.
    pub signer: LogPublicKey,
    /// Its signature over [`CustodyReceipt::message`].
    #[serde(skip)]
    pub signature: [u8; 64],
    /// The custodian's endorsement of that key.
    #[serde(skip)]
    pub endorsement: Endorsement,
}

impl CustodyReceipt {
    /// Makes a receipt for a segment that this node has stored durably. Hashes every record first:
    /// a custodian vouches for the root, so it computes it. Of an encrypted segment, which a custodian
    /// cannot read, it vouches for the bytes and for the root that the origin signed.
    ///
    /// # Errors
    /// [`ReceiptError`] if the segment is no consistent audit segment of another node, or if the
    /// endorsement is not for this key.
    pub fn issue(
        segment: &VerifiedSegment,
        custodian: &NodeId,
        issued_unix_ms: u64,
        key: &LogKey,
        endorsement: &Endorsement,
    ) -> Result<Self, ReceiptError> {
        let id = segment.id();
        let header = segment.header();
        let (Some(span), Some(origin_endorsement)) = (segment.audit_span(), segment.endorsement())
        else {
            return Err(ReceiptError::NotAudit(id));
        };
        if origin_endorsement.node_id == *custodian {
            return Err(ReceiptError::OwnLog);
        }
        let origin_key = &origin_endorsement.log_key;
        body::parse_body(segment.body(), &header.domain, &header.origin)
            .and_then(|body| match body.is_encrypted() {
                true => body.check_checkpoint(origin_key),
                false => body.check_tree(origin_key, None).map(|_| ()),
            })
            .map_err(|fault| ReceiptError::Inconsistent { id, fault })?;
        let mut receipt = Self {
            domain: header.domain.clone(),
            origin: header.origin.clone(),
            segment_id: id,
            first: span.first,
            last: span.last,
            root_at_last: span.root,
            custodian: custodian.clone(),
            issued_unix_ms,
            signer: key.public(),
            signature: [0; 64],
            endorsement: endorsement.clone(),
        };
        receipt.signature = key.sign(&receipt.message());
        receipt.verify_signature()?;
        Ok(receipt)
    }

    /// The bytes that the custodian signs.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        let mut out = RECEIPT_CONTEXT.to_vec();
        let mut field = |bytes: &[u8]| {
            out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        field(self.domain.as_str().as_bytes());
        field(self.origin.as_str().as_bytes());
        field(self.segment_id.as_bytes());
        field(&self.first.to_le_bytes());
        field(&self.last.to_le_bytes());
        field(self.root_at_last.as_bytes());
        field(self.custodian.as_str().as_bytes());
        field(&self.issued_unix_ms.to_le_bytes());
        out
    }

    /// Checks the signature, and that signer, endorsement and custodian agree. The endorsement's
    /// certificate chain is the transport's to judge.
    ///
    /// # Errors
    /// [`ReceiptError`] telling what does not fit.
    pub fn verify_signature(&self) -> Result<(), ReceiptError> {
        if self.endorsement.node_id != self.custodian || self.endorsement.log_key != self.signer {
            return Err(ReceiptError::Signer(self.custodian.clone()));
        }
        if self.origin.audit_node() == Some(self.custodian.as_str()) {
            return Err(ReceiptError::OwnLog);
        }
        self.signer
            .verify(&self.message(), &self.signature)
            .map_err(|_| ReceiptError::Signature)
    }

    /// The canonical bytes.
    ///
    /// # Errors
    /// [`ReceiptError::Codec`] if a limit is exceeded.
    pub fn encode(&self) -> Result<Vec<u8>, ReceiptError> {
        Ok(codec::encode::<Self, MAX_RECEIPT_BYTES>(self)?)
    }

    /// Reads the canonical bytes. Checks form only; see [`CustodyReceipt::verify_signature`].
    ///
    /// # Errors
    /// [`ReceiptError::Codec`] if they are not a receipt.
    pub fn decode(bytes: &[u8]) -> Result<Self, ReceiptError> {
        let receipt: Self = codec::decode::<_, MAX_RECEIPT_BYTES>(bytes)?;
        receipt.endorsement.check_limits()?;
        Ok(receipt)
    }
}
