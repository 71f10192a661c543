//! Signed documents that are no bundles: what they look like on their way, and what tells them apart.
//!
//! A document is canonical JSON with a member `type`; `openssl` and `cosign` sign its bytes as they are.
//! It travels as a policy segment of a reserved origin, so that whatever carries bundles carries it.

use crate::error::StatementError;
use crate::limits::{DOCUMENT_BYTES_MAX, KEY_HINT_BYTES_MAX, SIGNATURE_BYTES_MAX, SIGNATURES_MAX};
use crate::package::is_signature;
use crate::trust::{Signed, TrustFile};

const MAGIC: &[u8; 8] = b"TIDEDOC1";

/// Whether a policy segment's body is a signed document and no package.
#[must_use]
pub fn is_signed_document(body: &[u8]) -> bool {
    body.starts_with(MAGIC)
}

/// A detached signature, with the id of the key that made it where that is known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HintedSignature {
    /// ECDSA P-256 SHA-256, DER.
    pub der: Vec<u8>,
    /// Which key to try first. It proves nothing.
    pub key_hint: Option<String>,
}

/// A document and signatures over it. Nothing of it has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedDocument {
    /// The bytes that were signed.
    pub document: Vec<u8>,
    /// Signatures over them.
    pub signatures: Vec<HintedSignature>,
}

impl SignedDocument {
    /// The bytes of a policy segment's body: `TIDEDOC1`, length of the document (u32, little endian), the
    /// document, number of signatures (u8), then each as length (u8) and DER, length (u8) and key hint; in
    /// ascending order of the DER, none twice.
    ///
    /// # Errors
    /// [`StatementError::Format`] if a limit is exceeded.
    pub fn encode(&self) -> Result<Vec<u8>, StatementError> {
        let format = |message: &str| StatementError::Format(message.to_owned());
        let mut signatures: Vec<&HintedSignature> = self.signatures.iter().collect();
        signatures.sort_unstable();
        signatures.dedup_by(|one, other| one.der == other.der);
        let count = u8::try_from(signatures.len())
            .ok()
            .filter(|_| signatures.len() <= SIGNATURES_MAX)
            .ok_or_else(|| format("a document holds too many signatures"))?;
        let length = u32::try_from(self.document.len())
            .ok()
            .filter(|_| self.document.len() <= DOCUMENT_BYTES_MAX)
            .ok_or_else(|| format("the document is too large"))?;
        let mut bytes = Vec::with_capacity(self.document.len() + 16 + 144 * signatures.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&self.document);
        bytes.push(count);
        for signature in signatures {
            let hint = signature.key_hint.as_deref().unwrap_or_default();
            let der_length = u8::try_from(signature.der.len())
                .ok()
                .filter(|_| is_signature(&signature.der))
                .ok_or_else(|| format("a signature is not in DER form"))?;
            let hint_length = u8::try_from(hint.len())
                .ok()
                .filter(|_| hint.len() <= KEY_HINT_BYTES_MAX)
                .ok_or_else(|| format("a key id is too long"))?;
            bytes.push(der_length);
            bytes.extend_from_slice(&signature.der);
            bytes.push(hint_length);
            bytes.extend_from_slice(hint.as_bytes());
        }
        Ok(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote, and only that.
    ///
    /// # Errors
    /// [`StatementError::Format`] for every other input.
    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        let format = |message: &str| StatementError::Format(message.to_owned());
        let cut = || format("the document is cut short");
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| format("this is no signed document (no TIDEDOC1)"))?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let length = usize::try_from(u32::from_le_bytes(*length))
            .ok()
            .filter(|length| *length <= DOCUMENT_BYTES_MAX)
            .ok_or_else(|| format("the document is too large"))?;
        let (document, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        let (count, mut rest) = rest.split_first().ok_or_else(cut)?;
        if usize::from(*count) > SIGNATURES_MAX {
            return Err(format("a document holds too many signatures"));
        }
        let mut take = || -> Result<&[u8], StatementError> {
            let (length, tail) = rest.split_first().ok_or_else(cut)?;
            let (taken, tail) = tail
                .split_at_checked(usize::from(*length))
                .ok_or_else(cut)?;
            rest = tail;
            Ok(taken)
        };
        let mut signatures: Vec<HintedSignature> = Vec::new();
        for _ in 0..*count {
            let (der, hint) = (take()?, take()?);
            if !is_signature(der) || der.len() > SIGNATURE_BYTES_MAX {
                return Err(format("a signature is not in DER form"));
            }
            if signatures
                .last()
                .is_some_and(|last| last.der.as_slice() >= der)
            {
                return Err(format("the signatures are not in ascending order"));
            }
            let hint = std::str::from_utf8(hint)
                .ok()
                .filter(|hint| hint.len() <= KEY_HINT_BYTES_MAX)
                .ok_or_else(|| format("a key id is no text"))?;
            signatures.push(HintedSignature {
                der: der.to_vec(),
                key_hint: (!hint.is_empty()).then(|| hint.to_owned()),
            });
        }
        if !rest.is_empty() {
            return Err(format("bytes follow the document"));
        }
        Ok(Self {
            document: document.to_vec(),
            signatures,
        })
    }

    /// Which keys of the trust file signed.
    pub(crate) fn signed_by<'t>(&self, trust: &'t TrustFile) -> Signed<'t> {
        let signatures = self.signatures.iter();
        trust.signed(
            &self.document,
            signatures.map(|one| (one.key_hint.as_deref(), one.der.as_slice())),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(fill: u8, hint: Option<&str>) -> HintedSignature {
        HintedSignature {
            der: [&[0x30, 6][..], &[0x02, 0x01, fill, 0x02, 0x01, fill]].concat(),
            key_hint: hint.map(str::to_owned),
        }
    }

    #[test]
    fn documents_survive_the_way_and_have_one_form() {
        let signed = SignedDocument {
            document: b"{}".to_vec(),
            signatures: vec![signature(1, Some("alice")), signature(2, None)],
        };
        let bytes = signed.encode().unwrap();
        assert!(is_signed_document(&bytes) && !is_signed_document(b"TIDEPKG1"));
        assert_eq!(SignedDocument::decode(&bytes).unwrap(), signed);
        let disordered = SignedDocument {
            signatures: vec![signature(2, None), signature(1, Some("alice"))],
            ..signed.clone()
        };
        assert_eq!(disordered.encode().unwrap(), bytes);
        for end in 0..bytes.len() {
            assert!(SignedDocument::decode(&bytes[..end]).is_err(), "{end}");
        }
        assert!(SignedDocument::decode(&[&bytes[..], b"\0"].concat()).is_err());
        let mut huge = bytes;
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(SignedDocument::decode(&huge).is_err());
        let many = SignedDocument {
            signatures: (0..=SIGNATURES_MAX)
                .map(|n| signature(u8::try_from(n).unwrap(), None))
                .collect(),
            ..signed
        };
        assert!(many.encode().is_err());
    }
}
