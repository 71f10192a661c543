//! Segment keys wrapped to X25519 recipients of [age](https://age-encryption.org/v1), so that a node can
//! seal what only the holder of an offline key reads, with the keys and tools people already have.
//!
//! The wrapped key is a whole age v1 file whose content is the 32 bytes of the segment key; `age
//! --decrypt` opens it. Only that much of the format is here: X25519 stanzas, one chunk; the many chunks of
//! an encrypted volume are in `volume/stream.rs`. The crate `age`
//! would bring a second provider of X25519, ChaCha20-Poly1305 and SHA-256 into the binary; the rule is
//! one (`deny.toml`), and aws-lc-rs has all three.

use std::fmt;

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::{hkdf, hmac, rand};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use zeroize::Zeroizing;

use crate::crypt::{CryptError, KEY_BYTES, KeyUnwrap, KeyWrap, SegmentKey, WrappedKey};
use crate::limits::{MAX_AGE_RECIPIENTS, MAX_WRAPPED_BYTES};

pub(crate) const VERSION_LINE: &str = "age-encryption.org/v1";
const X25519_INFO: &[u8] = b"age-encryption.org/v1/X25519";
const FILE_KEY_BYTES: usize = 16;
pub(crate) const NONCE_BYTES: usize = 16;
pub(crate) const TAG_BYTES: usize = 16;
/// Content of a chunk.
pub(crate) const CHUNK_BYTES: usize = 64 * 1024;
/// The version line, `---`, a space, 43 characters of MAC, and their line feeds.
const HEADER_AROUND_BYTES: usize = VERSION_LINE.len() + 1 + 3 + 1 + 43 + 1;
/// `-> X25519 `, two lines of 43 characters and their line feeds.
const RECIPIENT_BYTES: usize = 10 + 2 * (43 + 1);
/// A line of a stanza's body is full at this length; a shorter one, even an empty one, ends it.
const COLUMNS: usize = 64;

/// Why a text is no age key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AgeError {
    /// Not an X25519 recipient.
    #[error("not an age recipient; one begins with age1 and comes from age-keygen -y")]
    Recipient,
    /// Not an identity.
    #[error("no AGE-SECRET-KEY-1 line, or a malformed one; age-keygen makes the file")]
    Identity,
    /// None, or more than the wrapped key has room for.
    #[error("1 to 16 recipients can be named, each once")]
    Count,
}

/// The public halves that segment keys are wrapped to.
#[derive(Clone, PartialEq, Eq)]
pub struct AgeRecipients(Vec<[u8; 32]>);

impl AgeRecipients {
    /// Reads `age1…` recipients.
    ///
    /// # Errors
    /// [`AgeError`] if one is malformed, they are too many, or one stands twice.
    pub fn new<T: AsRef<str>>(texts: &[T]) -> Result<Self, AgeError> {
        let mut all = Vec::with_capacity(texts.len());
        for text in texts {
            let key = bech32("age", text.as_ref()).ok_or(AgeError::Recipient)?;
            if all.contains(&*key) {
                return Err(AgeError::Count);
            }
            all.push(*key);
        }
        if all.is_empty() || all.len() > MAX_AGE_RECIPIENTS {
            return Err(AgeError::Count);
        }
        Ok(Self(all))
    }

    /// How long an age file for these is at most, its content being so long.
    #[must_use]
    pub fn file_bytes(&self, content_bytes: u64) -> u64 {
        let header = HEADER_AROUND_BYTES + RECIPIENT_BYTES * self.0.len() + NONCE_BYTES;
        let tags = (content_bytes / CHUNK_BYTES as u64 + 1).saturating_mul(TAG_BYTES as u64);
        content_bytes
            .saturating_add(tags)
            .saturating_add(header as u64)
    }
}

impl fmt::Debug for AgeRecipients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgeRecipients({})", self.0.len())
    }
}

/// Private halves, from the file that `age-keygen` writes. Erased from memory when dropped, never shown.
pub struct AgeIdentity(Vec<Zeroizing<[u8; 32]>>);

impl AgeIdentity {
    /// Reads the text of an identity file: lines of `AGE-SECRET-KEY-1…`, empty ones and comments.
    ///
    /// # Errors
    /// [`AgeError::Identity`] if there is none or a line is anything else.
    pub fn parse(text: &str) -> Result<Self, AgeError> {
        let mut all = Vec::new();
        for line in text.lines().map(str::trim_end) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            all.push(bech32("age-secret-key-", line).ok_or(AgeError::Identity)?);
        }
        if all.is_empty() || all.len() > MAX_AGE_RECIPIENTS {
            return Err(AgeError::Identity);
        }
        Ok(Self(all))
    }
}

impl fmt::Debug for AgeIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgeIdentity({} secret)", self.0.len())
    }
}

impl KeyWrap for AgeRecipients {
    fn wrap(&self, key: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
        let bytes = self
            .seal(key)
            .ok_or_else(|| CryptError::Wrap("age: the library refused a recipient".to_owned()))?;
        Ok(vec![WrappedKey {
            scheme: WrappedKey::AGE,
            bytes,
        }])
    }
}

impl AgeRecipients {
    fn seal(&self, key: &SegmentKey) -> Option<Vec<u8>> {
        let (mut out, payload_key) = self.begin()?;
        out.extend_from_slice(&seal(
            &payload_key,
            chunk_nonce(0, true),
            key.expose_secret(),
        )?);
        Some(out)
    }

    /// What stands before the first chunk of an age file for these, and the key of its chunks.
    pub(crate) fn begin(&self) -> Option<(Vec<u8>, PayloadKey)> {
        let mut file_key = Zeroizing::new([0; FILE_KEY_BYTES]);
        let mut nonce = [0; NONCE_BYTES];
        rand::fill(file_key.as_mut_slice()).ok()?;
        rand::fill(&mut nonce).ok()?;
        let mut header = format!("{VERSION_LINE}\n");
        for recipient in &self.0 {
            let ephemeral = PrivateKey::generate(&X25519).ok()?;
            let share = ephemeral.compute_public_key().ok()?;
            let wrap_key = wrap_key(&ephemeral, recipient, share.as_ref(), recipient)?;
            let body = seal(&wrap_key, [0; 12], file_key.as_slice())?;
            header.push_str(&format!(
                "-> X25519 {}\n{}\n",
                STANDARD_NO_PAD.encode(share.as_ref()),
                STANDARD_NO_PAD.encode(body)
            ));
        }
        header.push_str("---");
        let mac = hmac::sign(&mac_key(&file_key)?, header.as_bytes());
        header.push_str(&format!(" {}\n", STANDARD_NO_PAD.encode(mac.as_ref())));
        let mut out = header.into_bytes();
        out.extend_from_slice(&nonce);
        let payload_key = derive(&nonce, file_key.as_slice(), b"payload")?;
        Some((out, payload_key))
    }
}

impl KeyUnwrap for AgeIdentity {
    fn unwrap_key(&self, wrapped: &[WrappedKey]) -> Result<SegmentKey, CryptError> {
        wrapped
            .iter()
            .filter(|one| one.scheme == WrappedKey::AGE && one.bytes.len() <= MAX_WRAPPED_BYTES)
            .find_map(|one| self.open(&one.bytes))
            .ok_or(CryptError::NoKey)
    }
}

impl AgeIdentity {
    fn open(&self, file: &[u8]) -> Option<SegmentKey> {
        let (payload_key, sealed) = self.begin(file)?;
        if sealed.len() != KEY_BYTES + TAG_BYTES {
            return None;
        }
        SegmentKey::from_slice(&open(&payload_key, chunk_nonce(0, true), sealed)?).ok()
    }

    /// The key of the chunks of an age file that is to one of these, and what follows its header.
    pub(crate) fn begin<'f>(&self, file: &'f [u8]) -> Option<(PayloadKey, &'f [u8])> {
        let header = Header::parse(file)?;
        let file_key = header
            .stanzas
            .iter()
            .flat_map(|stanza| self.0.iter().map(move |secret| (stanza, secret)))
            .find_map(|((share, body), secret)| open_stanza(secret, share, body))?;
        hmac::verify(&mac_key(&file_key)?, header.covered, &header.mac).ok()?;
        let (nonce, sealed) = header.payload.split_first_chunk::<NONCE_BYTES>()?;
        Some((derive(nonce, file_key.as_slice(), b"payload")?, sealed))
    }
}

/// The key of the chunks of one age file.
pub(crate) type PayloadKey = Zeroizing<[u8; 32]>;

/// Chunk number and the flag of the last one.
pub(crate) fn chunk_nonce(chunk: u64, last: bool) -> [u8; 12] {
    let [a, b, c, d, e, f, g, h] = chunk.to_be_bytes();
    [0, 0, 0, a, b, c, d, e, f, g, h, u8::from(last)]
}

/// The parts of an age file that matter here; stanzas of other types are skipped.
struct Header<'a> {
    /// Ephemeral share and body of each X25519 stanza.
    stanzas: Vec<([u8; 32], Vec<u8>)>,
    covered: &'a [u8],
    mac: Vec<u8>,
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Option<Self> {
        let mut rest = file;
        if line(&mut rest)? != VERSION_LINE {
            return None;
        }
        let mut stanzas = Vec::new();
        loop {
            let at = file.len() - rest.len();
            let head = line(&mut rest)?;
            if let Some(mac) = head.strip_prefix("--- ") {
                return Some(Self {
                    stanzas,
                    covered: file.get(..at + 3)?,
                    mac: STANDARD_NO_PAD.decode(mac).ok()?,
                    payload: rest,
                });
            }
            let words: Vec<&str> = head.strip_prefix("-> ")?.split(' ').collect();
            let mut body = String::new();
            loop {
                let part = line(&mut rest)?;
                body.push_str(part);
                if part.len() < COLUMNS {
                    break;
                }
            }
            let body = STANDARD_NO_PAD.decode(body).ok()?;
            if let ["X25519", share] = words.as_slice() {
                let share = STANDARD_NO_PAD.decode(share).ok()?;
                stanzas.push((<[u8; 32]>::try_from(share).ok()?, body));
            }
        }
    }
}

fn line<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let (line, tail) = rest.split_at_checked(end)?;
    *rest = tail.get(1..)?;
    std::str::from_utf8(line).ok()
}

fn open_stanza(
    secret: &Zeroizing<[u8; 32]>,
    share: &[u8; 32],
    body: &[u8],
) -> Option<Zeroizing<[u8; FILE_KEY_BYTES]>> {
    let private = PrivateKey::from_private_key(&X25519, secret.as_slice()).ok()?;
    let own = private.compute_public_key().ok()?;
    let wrap_key = wrap_key(&private, share, share, own.as_ref())?;
    if body.len() != FILE_KEY_BYTES + TAG_BYTES {
        return None;
    }
    let file_key = open(&wrap_key, [0; 12], body)?;
    <[u8; FILE_KEY_BYTES]>::try_from(file_key.as_slice())
        .ok()
        .map(Zeroizing::new)
}

/// The key that wraps the file key for one recipient. An all-zero shared secret is refused by the
/// library.
fn wrap_key(
    private: &PrivateKey,
    peer: &[u8],
    share: &[u8],
    recipient: &[u8],
) -> Option<Zeroizing<[u8; 32]>> {
    let peer = UnparsedPublicKey::new(&X25519, peer);
    agree(private, peer, (), |shared| {
        derive(&[share, recipient].concat(), shared, X25519_INFO).ok_or(())
    })
    .ok()
}

fn mac_key(file_key: &[u8; FILE_KEY_BYTES]) -> Option<hmac::Key> {
    let key = derive(&[], file_key, b"header")?;
    Some(hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()))
}

fn derive(salt: &[u8], secret: &[u8], info: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
    let mut out = Zeroizing::new([0; 32]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[info], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(out.as_mut_slice()))
        .ok()?;
    Some(out)
}

fn cipher(key: &Zeroizing<[u8; 32]>) -> Option<LessSafeKey> {
    UnboundKey::new(&CHACHA20_POLY1305, key.as_slice())
        .ok()
        .map(LessSafeKey::new)
}

/// Each key is used for one message only, or for the chunks of one file under their numbers, so a
/// nonce never repeats under it.
pub(crate) fn seal(key: &Zeroizing<[u8; 32]>, nonce: [u8; 12], plain: &[u8]) -> Option<Vec<u8>> {
    let mut out = plain.to_vec();
    cipher(key)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut out)
        .ok()?;
    Some(out)
}

pub(crate) fn open(
    key: &Zeroizing<[u8; 32]>,
    nonce: [u8; 12],
    sealed: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(sealed.to_vec());
    let length = cipher(key)?
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut out)
        .ok()?
        .len();
    out.truncate(length);
    Some(out)
}

/// The 32 bytes in a Bech32 text (BIP 173) with this prefix, in one case throughout.
fn bech32(prefix: &str, text: &str) -> Option<Zeroizing<[u8; 32]>> {
    const CHARSET: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    const CHECKSUM: usize = 6;
    let lower = Zeroizing::new(text.to_ascii_lowercase());
    if *lower != text && text.to_ascii_uppercase() != text {
        return None;
    }
    let data = lower.strip_prefix(prefix)?.strip_prefix('1')?;
    let values = data
        .bytes()
        .map(|byte| CHARSET.iter().position(|c| *c == byte))
        .map(|value| value.and_then(|value| u8::try_from(value).ok()))
        .collect::<Option<Vec<u8>>>()
        .map(Zeroizing::new)?;
    let mut sum = 1u32;
    let expanded = prefix
        .bytes()
        .map(|byte| byte >> 5)
        .chain([0])
        .chain(prefix.bytes().map(|byte| byte & 31))
        .chain(values.iter().copied());
    for value in expanded {
        let top = sum >> 25;
        sum = ((sum & 0x01ff_ffff) << 5) ^ u32::from(value);
        for (bit, constant) in [
            0x3b6a_57b2,
            0x2650_8e6d,
            0x1ea1_19fa,
            0x3d42_33dd,
            0x2a14_62b3,
        ]
        .into_iter()
        .enumerate()
        {
            if top >> bit & 1 == 1 {
                sum ^= constant;
            }
        }
    }
    if sum != 1 {
        return None;
    }
    let payload = values.get(..values.len().checked_sub(CHECKSUM)?)?;
    let mut out = Zeroizing::new([0; 32]);
    let (mut bits, mut have, mut at) = (0u32, 0u32, 0usize);
    for value in payload {
        bits = (bits << 5) | u32::from(*value);
        have += 5;
        if have >= 8 {
            have -= 8;
            *out.get_mut(at)? = u8::try_from(bits >> have & 0xff).ok()?;
            bits &= (1 << have) - 1;
            at += 1;
        }
    }
    // What is left over are padding bits: fewer than a value, and zero.
    (at == 32 && have < 5 && bits == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pair of the age specification's test kit (testkit, `x25519`).
    const RECIPIENT: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
    const IDENTITY: &str =
        "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";

    #[test]
    fn the_pair_of_the_specification_belongs_together() {
        let identity = AgeIdentity::parse(&format!("# made by hand\n\n{IDENTITY}\n")).unwrap();
        assert_eq!(*identity.0[0], [0x42; 32]);
        let recipients = AgeRecipients::new(&[RECIPIENT]).unwrap();
        let public = PrivateKey::from_private_key(&X25519, &[0x42; 32])
            .unwrap()
            .compute_public_key()
            .unwrap();
        assert_eq!(recipients.0[0], public.as_ref());
    }

    #[test]
    fn a_key_goes_through_and_every_changed_byte_is_refused() {
        let identity = AgeIdentity::parse(IDENTITY).unwrap();
        let recipients = AgeRecipients::new(&[RECIPIENT]).unwrap();
        let key = SegmentKey::generate().unwrap();
        let wrapped = recipients.wrap(&key).unwrap();
        assert_eq!(
            identity.unwrap_key(&wrapped).unwrap().expose_secret(),
            key.expose_secret()
        );
        for at in 0..wrapped[0].bytes.len() {
            let mut bad = wrapped.clone();
            bad[0].bytes[at] ^= 1;
            assert_eq!(
                identity.unwrap_key(&bad).unwrap_err(),
                CryptError::NoKey,
                "byte {at}"
            );
            bad[0].bytes.truncate(at);
            assert!(identity.unwrap_key(&bad).is_err(), "length {at}");
        }
    }

    #[test]
    fn malformed_keys_are_refused_and_secrets_not_shown() {
        for bad in [
            "",
            "age1",
            &RECIPIENT[..60],
            &RECIPIENT.replace("zvk", "zvq"),
            &RECIPIENT.replace("age1z", "age1Z"),
            &RECIPIENT.replace("age1", "bge1"),
            IDENTITY,
        ] {
            assert_eq!(
                AgeRecipients::new(&[bad]),
                Err(AgeError::Recipient),
                "{bad}"
            );
        }
        assert_eq!(
            AgeRecipients::new(&[RECIPIENT, RECIPIENT]),
            Err(AgeError::Count)
        );
        assert_eq!(AgeRecipients::new::<&str>(&[]), Err(AgeError::Count));
        for bad in ["", "# only a comment", RECIPIENT, &IDENTITY[..70]] {
            assert_eq!(
                AgeIdentity::parse(bad).unwrap_err(),
                AgeError::Identity,
                "{bad}"
            );
        }
        let shown = format!("{:?}", AgeIdentity::parse(IDENTITY).unwrap());
        assert_eq!(shown, "AgeIdentity(1 secret)");
    }
}
