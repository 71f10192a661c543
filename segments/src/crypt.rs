//! Encryption of sealed segments at rest: one fresh AES-256-GCM key per segment, wrapped to those who
//! may read.
//!
//! The records of an encrypted segment can be read by whoever unwraps its key and by nobody else; the
//! id, the signature, the span, the signed checkpoint and the links can be checked by all. So a peer
//! mirrors and vouches for what it cannot read. [`KeyWrap`] and [`KeyUnwrap`] are the two sides of a
//! way to hand the key on; [`SiteKey`] is one of them, a 256-bit key that all readers of a site hold.
//!
//! A key seals at most [`MAX_BLOCKS`](crate::limits::MAX_BLOCKS) blocks, each under its own number as
//! nonce, and is then forgotten, so a nonce never repeats under a key.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::key_wrap::{AES_256, KeyEncryptionKey, KeyWrap as _};
use aws_lc_rs::rand;
use zeroize::Zeroizing;

use crate::id::Sha256Hash;
use crate::limits::{MAX_WRAPPED_BYTES, MAX_WRAPPED_KEYS};

/// Length of a segment key and of a site key.
pub const KEY_BYTES: usize = 32;

/// Bytes that sealing adds to a block: the AES-GCM tag.
pub(crate) const TAG_BYTES: usize = 16;

/// What stands before the hash of the front of a body in the associated data of its blocks.
const BLOCK_CONTEXT: &[u8] = b"tidelock audit block v2\0";

/// Why a segment key could not be made, wrapped or unwrapped, or a block not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CryptError {
    /// The system's random source failed.
    #[error("the system's random source failed")]
    Random,
    /// The key could not be wrapped.
    #[error("cannot wrap the segment key: {0}")]
    Wrap(String),
    /// No key that the reader has opens the segment.
    #[error("no key given unwraps the key of this segment; it was sealed to another recipient")]
    NoKey,
    /// Too many or too long wrapped keys, or none.
    #[error("a segment has 1 to 8 wrapped keys of together at most 4096 bytes")]
    Recipients,
    /// A key of the wrong length.
    #[error("a key must have 32 bytes, not {0}")]
    KeyLength(usize),
    /// The library refused to seal a block.
    #[error("cannot seal a block")]
    Seal,
}

/// The AES-256-GCM key of one segment. Erased from memory when dropped, and never shown.
pub struct SegmentKey(Zeroizing<[u8; KEY_BYTES]>);

impl SegmentKey {
    /// A fresh key from the system's random source.
    ///
    /// # Errors
    /// [`CryptError::Random`] if the source fails.
    pub fn generate() -> Result<Self, CryptError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        rand::fill(key.as_mut_slice()).map_err(|_| CryptError::Random)?;
        Ok(Self(key))
    }

    /// The key in these bytes, as a [`KeyUnwrap`] recovered them.
    ///
    /// # Errors
    /// [`CryptError::KeyLength`] if they are not 32.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, CryptError> {
        let key =
            <[u8; KEY_BYTES]>::try_from(bytes).map_err(|_| CryptError::KeyLength(bytes.len()))?;
        Ok(Self(Zeroizing::new(key)))
    }

    /// The secret bytes, for a [`KeyWrap`] only.
    #[must_use]
    pub fn expose_secret(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl fmt::Debug for SegmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SegmentKey(secret)")
    }
}

/// A segment key, wrapped to one recipient or more, as it stands in the segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// How it is wrapped: [`WrappedKey::SITE_KEY`] or [`WrappedKey::AGE`].
    pub scheme: u8,
    /// The bytes that the scheme defines.
    pub bytes: Vec<u8>,
}

impl WrappedKey {
    /// AES key wrap (RFC 3394) under a 256-bit site key: 40 bytes.
    pub const SITE_KEY: u8 = 1;
    /// An age v1 file whose content is the 32 bytes of the key, for one or more recipients.
    pub const AGE: u8 = 2;
}

/// The side that seals: wraps fresh segment keys to those who may read. Holds no secret unless the
/// scheme is symmetric.
pub trait KeyWrap: fmt::Debug + Send + Sync {
    /// Where the key of the next segment comes from. The system's random source; only test vectors,
    /// which need the same bytes again, have another.
    ///
    /// # Errors
    /// [`CryptError::Random`].
    fn fresh_key(&self) -> Result<SegmentKey, CryptError> {
        SegmentKey::generate()
    }

    /// Wraps a segment key to every recipient.
    ///
    /// # Errors
    /// [`CryptError::Wrap`] or [`CryptError::Recipients`]; nothing is sealed then.
    fn wrap(&self, key: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError>;
}

/// The side that reads.
pub trait KeyUnwrap: fmt::Debug + Send + Sync {
    /// Finds a wrapped key that this reader can open, and opens it.
    ///
    /// # Errors
    /// [`CryptError::NoKey`] if none can be opened; a changed one is the same.
    fn unwrap_key(&self, wrapped: &[WrappedKey]) -> Result<SegmentKey, CryptError>;
}

/// Wraps to all of them.
impl KeyWrap for Vec<Arc<dyn KeyWrap>> {
    fn wrap(&self, key: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
        let mut all = Vec::new();
        for one in self {
            all.extend(one.wrap(key)?);
        }
        check_wrapped(&all)?;
        Ok(all)
    }
}

/// The first that opens it.
impl KeyUnwrap for Vec<Arc<dyn KeyUnwrap>> {
    fn unwrap_key(&self, wrapped: &[WrappedKey]) -> Result<SegmentKey, CryptError> {
        self.iter()
            .find_map(|one| one.unwrap_key(wrapped).ok())
            .ok_or(CryptError::NoKey)
    }
}

/// Whether a segment may carry these wrapped keys.
pub(crate) fn check_wrapped(wrapped: &[WrappedKey]) -> Result<(), CryptError> {
    let bytes: usize = wrapped.iter().map(|one| one.bytes.len()).sum();
    if wrapped.is_empty()
        || wrapped.len() > MAX_WRAPPED_KEYS
        || bytes > MAX_WRAPPED_BYTES
        || wrapped.iter().any(|one| one.bytes.is_empty())
    {
        return Err(CryptError::Recipients);
    }
    Ok(())
}

/// A 256-bit key that every reader of a site holds, from a file that only they can read. The caller
/// checks the file's mode. Erased from memory when dropped, and never shown.
pub struct SiteKey(Zeroizing<[u8; KEY_BYTES]>);

impl SiteKey {
    /// The key in these bytes.
    ///
    /// # Errors
    /// [`CryptError::KeyLength`] if they are not 32.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, CryptError> {
        let key =
            <[u8; KEY_BYTES]>::try_from(bytes).map_err(|_| CryptError::KeyLength(bytes.len()))?;
        Ok(Self(Zeroizing::new(key)))
    }

    fn kek(&self) -> Option<KeyEncryptionKey<aws_lc_rs::key_wrap::AesBlockCipher>> {
        KeyEncryptionKey::new(&AES_256, self.0.as_slice()).ok()
    }
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SiteKey(secret)")
    }
}

impl KeyWrap for SiteKey {
    fn wrap(&self, key: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
        let refused = || CryptError::Wrap("AES key wrap failed".to_owned());
        let mut out = [0; KEY_BYTES + 8];
        let wrapped = self
            .kek()
            .ok_or_else(refused)?
            .wrap(key.expose_secret(), &mut out)
            .map_err(|_| refused())?;
        Ok(vec![WrappedKey {
            scheme: WrappedKey::SITE_KEY,
            bytes: wrapped.to_vec(),
        }])
    }
}

impl KeyUnwrap for SiteKey {
    fn unwrap_key(&self, wrapped: &[WrappedKey]) -> Result<SegmentKey, CryptError> {
        for one in wrapped {
            if one.scheme != WrappedKey::SITE_KEY || one.bytes.len() != KEY_BYTES + 8 {
                continue;
            }
            let mut out = Zeroizing::new([0; KEY_BYTES + 8]);
            if let Some(kek) = self.kek()
                && let Ok(key) = kek.unwrap(&one.bytes, out.as_mut_slice())
            {
                return SegmentKey::from_slice(key);
            }
        }
        Err(CryptError::NoKey)
    }
}

/// Seals and opens the blocks of one body.
pub(crate) struct BlockCipher {
    key: LessSafeKey,
    aad: Vec<u8>,
}

impl BlockCipher {
    /// `front` is everything of the body before the first block.
    pub(crate) fn new(key: &SegmentKey, front: &[u8]) -> Result<Self, CryptError> {
        let unbound =
            UnboundKey::new(&AES_256_GCM, key.expose_secret()).map_err(|_| CryptError::Seal)?;
        Ok(Self {
            key: LessSafeKey::new(unbound),
            aad: [BLOCK_CONTEXT, Sha256Hash::of(front).as_bytes()].concat(),
        })
    }

    /// The number of the block as 96 bits, little endian.
    fn nonce(block: u32) -> Nonce {
        let mut nonce = [0; 12];
        for (slot, byte) in nonce.iter_mut().zip(block.to_le_bytes()) {
            *slot = byte;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Encrypts in place and appends the tag.
    pub(crate) fn seal(&self, block: u32, bytes: &mut Vec<u8>) -> Result<(), CryptError> {
        self.key
            .seal_in_place_append_tag(Self::nonce(block), Aad::from(&self.aad), bytes)
            .map_err(|_| CryptError::Seal)
    }

    /// Decrypts into `out`; `None` if the block is not what was sealed under this number here.
    pub(crate) fn open<'o>(
        &self,
        block: u32,
        sealed: &[u8],
        out: &'o mut Vec<u8>,
    ) -> Option<&'o [u8]> {
        let length = sealed.len().checked_sub(TAG_BYTES)?;
        let (bytes, tag) = sealed.split_at_checked(length)?;
        out.resize(length, 0);
        self.key
            .open_separate_gather(Self::nonce(block), Aad::from(&self.aad), bytes, tag, out)
            .ok()?;
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{hex, unhex32};

    #[test]
    fn rfc_3394_wraps_256_bits_of_key_data_with_a_256_bit_key() {
        // RFC 3394, 4.6.
        let kek =
            unhex32("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f").unwrap();
        let key =
            unhex32("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f").unwrap();
        let site = SiteKey::from_slice(&kek).unwrap();
        let wrapped = site.wrap(&SegmentKey::from_slice(&key).unwrap()).unwrap();
        assert_eq!(
            hex(&wrapped[0].bytes),
            "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
        );
        assert_eq!(site.unwrap_key(&wrapped).unwrap().expose_secret(), &key);
    }

    #[test]
    fn another_key_and_every_changed_byte_of_a_wrapped_key_are_refused() {
        let site = SiteKey::from_slice(&[1; 32]).unwrap();
        let other = SiteKey::from_slice(&[2; 32]).unwrap();
        let key = SegmentKey::generate().unwrap();
        let good = site.wrap(&key).unwrap();
        assert_eq!(
            site.unwrap_key(&good).unwrap().expose_secret(),
            key.expose_secret()
        );
        assert_eq!(other.unwrap_key(&good).unwrap_err(), CryptError::NoKey);
        for at in 0..good[0].bytes.len() {
            let mut bad = good.clone();
            bad[0].bytes[at] ^= 1;
            assert_eq!(site.unwrap_key(&bad).unwrap_err(), CryptError::NoKey);
        }
        let mut renamed = good.clone();
        renamed[0].scheme = WrappedKey::AGE;
        assert_eq!(site.unwrap_key(&renamed).unwrap_err(), CryptError::NoKey);
        // One of several is enough, in either place.
        let both: Vec<Arc<dyn KeyWrap>> = vec![
            Arc::new(SiteKey::from_slice(&[2; 32]).unwrap()),
            Arc::new(SiteKey::from_slice(&[1; 32]).unwrap()),
        ];
        let both = both.wrap(&key).unwrap();
        for reader in [&site, &other] {
            assert_eq!(
                reader.unwrap_key(&both).unwrap().expose_secret(),
                key.expose_secret()
            );
        }
    }

    #[test]
    fn secrets_are_not_shown_and_keys_are_fresh() {
        let site = SiteKey::from_slice(&[0xab; 32]).unwrap();
        let key = SegmentKey::from_slice(&[0xab; 32]).unwrap();
        for text in [format!("{site:?}"), format!("{key:?}")] {
            assert!(!text.contains("171") && !text.contains("ab"), "{text}");
        }
        let (one, other) = (site.fresh_key().unwrap(), site.fresh_key().unwrap());
        assert_ne!(one.expose_secret(), other.expose_secret());
        assert_eq!(
            SiteKey::from_slice(&[1; 31]).unwrap_err(),
            CryptError::KeyLength(31)
        );
    }

    #[test]
    fn a_block_opens_in_its_place_only() {
        let key = SegmentKey::generate().unwrap();
        let cipher = BlockCipher::new(&key, b"front").unwrap();
        let mut sealed = b"block".to_vec();
        cipher.seal(3, &mut sealed).unwrap();
        let mut out = Vec::new();
        assert_eq!(cipher.open(3, &sealed, &mut out), Some(&b"block"[..]));
        assert_eq!(cipher.open(4, &sealed, &mut out), None);
        let elsewhere = BlockCipher::new(&key, b"other front").unwrap();
        assert_eq!(elsewhere.open(3, &sealed, &mut out), None);
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 0x10;
            assert_eq!(cipher.open(3, &bad, &mut out), None, "byte {at}");
        }
        assert_eq!(cipher.open(3, &sealed[..10], &mut out), None);
    }
}
