//! The package: an archive with its detached signatures, as it travels and as it lies in a slot.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use x509_parser::pem::Pem;

use crate::error::{BundleError, KeyError};
use crate::json;
use crate::limits::{
    ARCHIVE_BYTES_MAX, SIGNATURE_BYTES_MAX, SIGNATURE_FILE_BYTES_MAX, SIGNATURES_MAX,
};

const MAGIC: &[u8; 8] = b"TIDEPKG1";

/// SHA-256 of a bundle's archive as `sha256:` and 64 hex digits: the identity of a policy.
/// Signatures are no part of it; a further signature makes no new policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentId(String);

impl ContentId {
    /// The identity of an archive.
    #[must_use]
    pub fn of(archive: &[u8]) -> Self {
        Self(sha256(archive))
    }

    /// The text form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContentId {
    type Error = BundleError;

    fn try_from(text: String) -> Result<Self, BundleError> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text))
        } else {
            Err(BundleError::format(
                "a content id is `sha256:` followed by 64 lower-case hex digits",
            ))
        }
    }
}

impl From<ContentId> for String {
    fn from(id: ContentId) -> Self {
        id.0
    }
}

/// The digest form that manifests use.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(7 + 64);
    text.push_str("sha256:");
    for byte in digest(&SHA256, bytes).as_ref() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// An archive and signatures over it. Nothing of it has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// The archive, as `tidelock bundle build` wrote it.
    pub archive: Vec<u8>,
    /// Detached ECDSA P-256 SHA-256 signatures over the archive, DER.
    pub signatures: Vec<Vec<u8>>,
}

impl Package {
    /// Identity of the archive.
    #[must_use]
    pub fn content_id(&self) -> ContentId {
        ContentId::of(&self.archive)
    }

    /// The bytes of a policy segment's body and of a slot: `TIDEPKG1`, archive length (u32, little
    /// endian), archive, number of signatures (u8), then each as length (u8) and DER, in ascending
    /// order without repetition, so the same signatures make the same bytes.
    ///
    /// # Errors
    /// [`BundleError::Format`] if a limit is exceeded.
    pub fn encode(&self) -> Result<Vec<u8>, BundleError> {
        let mut signatures: Vec<&[u8]> = self.signatures.iter().map(Vec::as_slice).collect();
        signatures.sort_unstable();
        signatures.dedup();
        let too_many = || {
            BundleError::format(format!(
                "a package holds at most {SIGNATURES_MAX} signatures"
            ))
        };
        if signatures.len() > SIGNATURES_MAX {
            return Err(too_many());
        }
        let count = u8::try_from(signatures.len()).map_err(|_| too_many())?;
        let archive_len = u32::try_from(self.archive.len())
            .ok()
            .filter(|_| self.archive.len() <= ARCHIVE_BYTES_MAX)
            .ok_or_else(|| {
                BundleError::format(format!(
                    "the archive is larger than {ARCHIVE_BYTES_MAX} bytes"
                ))
            })?;
        let mut bytes = Vec::with_capacity(self.archive.len() + 16 + 80 * signatures.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&archive_len.to_le_bytes());
        bytes.extend_from_slice(&self.archive);
        bytes.push(count);
        for signature in signatures {
            let len = u8::try_from(signature.len())
                .ok()
                .filter(|_| is_signature(signature))
                .ok_or_else(|| BundleError::format("a signature is not in DER form"))?;
            bytes.push(len);
            bytes.extend_from_slice(signature);
        }
        Ok(bytes)
    }

    /// Reads what [`encode`](Self::encode) wrote, and only that.
    ///
    /// # Errors
    /// [`BundleError::Format`] for every other input.
    pub fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        let damaged = || BundleError::format("the package is cut short");
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or_else(|| BundleError::format("this is not a policy package (no TIDEPKG1)"))?;
        let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(damaged)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| damaged())?;
        if len > ARCHIVE_BYTES_MAX {
            return Err(BundleError::format(format!(
                "the archive is larger than {ARCHIVE_BYTES_MAX} bytes"
            )));
        }
        let (archive, rest) = rest.split_at_checked(len).ok_or_else(damaged)?;
        let (count, mut rest) = rest.split_first().ok_or_else(damaged)?;
        if usize::from(*count) > SIGNATURES_MAX {
            return Err(BundleError::format(format!(
                "a package holds at most {SIGNATURES_MAX} signatures"
            )));
        }
        let mut signatures: Vec<Vec<u8>> = Vec::new();
        for _ in 0..*count {
            let (len, tail) = rest.split_first().ok_or_else(damaged)?;
            let (signature, tail) = tail
                .split_at_checked(usize::from(*len))
                .ok_or_else(damaged)?;
            if !is_signature(signature) {
                return Err(BundleError::format("a signature is not in DER form"));
            }
            if signatures
                .last()
                .is_some_and(|last| last.as_slice() >= signature)
            {
                return Err(BundleError::format(
                    "the signatures are not in ascending order",
                ));
            }
            signatures.push(signature.to_vec());
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(BundleError::format("bytes follow the package"));
        }
        Ok(Self {
            archive: archive.to_vec(),
            signatures,
        })
    }
}

/// Whether bytes have the outer form of a P-256 signature: one DER sequence of fitting length.
/// Whether it is one is for the verification to say.
pub(crate) fn is_signature(bytes: &[u8]) -> bool {
    bytes.len() <= SIGNATURE_BYTES_MAX
        && matches!(bytes, [0x30, len, body @ ..] if usize::from(*len) == body.len())
}

/// Reads a detached signature as the usual tools write it: DER (`openssl dgst -sha256 -sign`),
/// base64 of DER (`cosign sign-blob --output-signature`), or a Sigstore bundle
/// (`cosign sign-blob --key … --bundle`), of which only the signature is taken.
///
/// # Errors
/// [`KeyError::NotASignature`] for anything else.
pub fn decode_signature(bytes: &[u8]) -> Result<Vec<u8>, KeyError> {
    if is_signature(bytes) {
        return Ok(bytes.to_vec());
    }
    let text = bytes.trim_ascii();
    let base64 = if text.first() == Some(&b'{') && text.len() <= SIGNATURE_FILE_BYTES_MAX {
        let bundle = json::parse(text).map_err(|_| KeyError::NotASignature)?;
        // The standard form, and the one that cosign wrote before it.
        bundle
            .pointer("/messageSignature/signature")
            .or_else(|| bundle.get("base64Signature"))
            .and_then(|signature| signature.as_str())
            .ok_or(KeyError::NotASignature)?
            .as_bytes()
            .to_vec()
    } else {
        text.to_vec()
    };
    STANDARD
        .decode(base64)
        .ok()
        .filter(|der| is_signature(der))
        .ok_or(KeyError::NotASignature)
}

/// Signs an archive with a PEM key (PKCS#8 or SEC 1, ECDSA P-256): what
/// `openssl dgst -sha256 -sign` does.
///
/// # Errors
/// [`KeyError`] if the PEM holds no usable key.
pub fn sign(archive: &[u8], private_key_pem: &str) -> Result<Vec<u8>, KeyError> {
    let mut key = None;
    for pem in Pem::iter_from_buffer(private_key_pem.as_bytes()) {
        let pem = pem.map_err(|_| KeyError::NoPrivateKey)?;
        match pem.label.as_str() {
            "PRIVATE KEY" | "EC PRIVATE KEY" => key = Some(pem.contents),
            "ENCRYPTED PRIVATE KEY"
            | "ENCRYPTED COSIGN PRIVATE KEY"
            | "ENCRYPTED SIGSTORE PRIVATE KEY" => return Err(KeyError::Encrypted),
            _ => {}
        }
    }
    let der = key.ok_or(KeyError::NoPrivateKey)?;
    let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, &der)
        .map_err(|_| KeyError::NotP256)?;
    let signature = pair
        .sign(&SystemRandom::new(), archive)
        .map_err(|_| KeyError::Signing)?;
    Ok(signature.as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(fill: u8) -> Vec<u8> {
        [&[0x30, 6][..], &[0x02, 0x01, fill, 0x02, 0x01, fill]].concat()
    }

    #[test]
    fn packages_survive_the_way_and_have_one_form() {
        let package = Package {
            archive: b"archive".to_vec(),
            signatures: vec![signature(1), signature(2)],
        };
        let bytes = package.encode().unwrap();
        assert_eq!(Package::decode(&bytes).unwrap(), package);
        let disordered = Package {
            signatures: vec![signature(2), signature(1), signature(2)],
            ..package.clone()
        };
        assert_eq!(disordered.encode().unwrap(), bytes);
        assert_eq!(disordered.content_id(), package.content_id());
    }

    #[test]
    fn every_cut_and_every_addition_is_refused() {
        let package = Package {
            archive: vec![7; 40],
            signatures: vec![signature(1), signature(2)],
        };
        let bytes = package.encode().unwrap();
        for end in 0..bytes.len() {
            assert!(Package::decode(&bytes[..end]).is_err(), "{end}");
        }
        let longer = [&bytes[..], b"\0"].concat();
        assert!(
            Package::decode(&longer)
                .unwrap_err()
                .to_string()
                .contains("follow")
        );
        let mut swapped = bytes.clone();
        let at = bytes.len() - 18;
        swapped.copy_within(at + 9..at + 18, at);
        assert!(
            Package::decode(&swapped)
                .unwrap_err()
                .to_string()
                .contains("ascending")
        );
        let mut huge = bytes;
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(
            Package::decode(&huge)
                .unwrap_err()
                .to_string()
                .contains("larger")
        );
    }

    #[test]
    fn limits_hold_on_both_ways() {
        let many = Package {
            archive: Vec::new(),
            signatures: (0..=SIGNATURES_MAX)
                .map(|n| signature(u8::try_from(n).unwrap()))
                .collect(),
        };
        assert!(many.encode().unwrap_err().to_string().contains("at most"));
        let raw = Package {
            archive: Vec::new(),
            signatures: vec![vec![1; 64]],
        };
        assert!(raw.encode().unwrap_err().to_string().contains("DER"));
        let large = Package {
            archive: vec![0; ARCHIVE_BYTES_MAX + 1],
            signatures: Vec::new(),
        };
        assert!(large.encode().unwrap_err().to_string().contains("larger"));
    }

    #[test]
    fn signatures_are_read_as_the_tools_write_them() {
        let der = signature(9);
        let base64 = STANDARD.encode(&der);
        assert_eq!(decode_signature(&der), Ok(der.clone()));
        assert_eq!(decode_signature(base64.as_bytes()), Ok(der.clone()));
        assert_eq!(
            decode_signature(format!("{base64}\n").as_bytes()),
            Ok(der.clone())
        );
        let sigstore = format!(
            r#"{{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json",
                "verificationMaterial":{{"publicKey":{{"hint":"x"}}}},
                "messageSignature":{{"messageDigest":{{"algorithm":"SHA2_256","digest":""}},
                                     "signature":"{base64}"}}}}"#
        );
        assert_eq!(decode_signature(sigstore.as_bytes()), Ok(der.clone()));
        let older = format!("{{\"base64Signature\":\"{base64}\",\"cert\":\"\"}}\n");
        assert_eq!(decode_signature(older.as_bytes()), Ok(der));
        for wrong in [
            "{}",
            "{\"base64Signature\":1}",
            "{\"base64Signature\":\"aGk=\"}",
            "{",
        ] {
            assert_eq!(
                decode_signature(wrong.as_bytes()),
                Err(KeyError::NotASignature)
            );
        }
        for wrong in [&b""[..], b"\n", b"hello", &[0x30], &[0x30, 9, 1], &[0; 64]] {
            assert_eq!(decode_signature(wrong), Err(KeyError::NotASignature));
        }
    }

    #[test]
    fn content_ids_carry_their_prefix() {
        let id = ContentId::of(b"");
        assert_eq!(
            id.as_str(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(ContentId::try_from(id.to_string()), Ok(id.clone()));
        let hex = &id.as_str()[7..];
        for wrong in [
            hex.to_owned(),
            format!("blake3:{hex}"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{}", &hex[1..]),
        ] {
            assert!(ContentId::try_from(wrong).is_err());
        }
    }
}
