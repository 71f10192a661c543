//! Names: segments, hashes, domains, nodes, origins and kinds.
//!
//! Every name is a newtype with a private field, made only by a constructor that checks it, so a
//! value of the type is a checked value. Two hash roles exist and never mix: [`SegmentId`] is
//! BLAKE3 (`blake3:` + 64 hex) and [`Sha256Hash`] is SHA-256 (`sha256:` + 64 hex). A text with
//! another prefix, upper case digits or another length is refused.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use bincode::de::{BorrowDecoder, Decoder};
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::keys::LogPublicKey;
use crate::limits::{MAX_NAME_BYTES, MAX_ORIGIN_BYTES};

/// Why a text is not the name it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// The prefix that tells the hash roles apart is missing or another one.
    #[error("expected the prefix {expected:?}; write the hash with it")]
    Prefix {
        /// The prefix that belongs here.
        expected: &'static str,
    },
    /// Not 64 lower-case hexadecimal digits.
    #[error("expected 64 lower-case hexadecimal digits after the prefix")]
    Hex,
    /// Empty or longer than allowed.
    #[error("{what} has {length} bytes; it must have 1 to {max}")]
    Length {
        /// Which name.
        what: &'static str,
        /// Its length.
        length: usize,
        /// The longest allowed.
        max: usize,
    },
    /// A character outside the allowed set, or a first character that is not alphanumeric.
    #[error("{what} may hold only A-Z a-z 0-9 . _ - and must start with a letter or digit")]
    Characters {
        /// Which name.
        what: &'static str,
    },
    /// An origin of no known form.
    #[error(
        "not an origin; known forms are policy/<name>, crl/<64 hex> and audit/<node>/<16 hex>/<incarnation>"
    )]
    Origin,
    /// A kind number or word that does not exist.
    #[error("unknown segment kind; known are revocation, policy, witness and audit")]
    Kind,
}

/// Writes bytes as lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('?');
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        out.push(digit(byte >> 4));
        out.push(digit(byte & 0xf));
    }
    out
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// Reads exactly 64 lower-case hexadecimal digits.
pub(crate) fn unhex32(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 {
        return None;
    }
    let mut out = [0u8; 32];
    for (slot, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *slot = hex_digit(*high)? << 4 | hex_digit(*low)?;
    }
    Some(out)
}

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name([u8; 32]);

        impl $name {
            /// The prefix of the text form.
            pub const PREFIX: &'static str = $prefix;

            /// Takes the raw hash value.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The raw hash value.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// 64 lower-case hexadecimal digits without the prefix, as used in file names.
            #[must_use]
            pub fn hex(&self) -> String {
                hex(&self.0)
            }

            /// Reads 64 lower-case hexadecimal digits without the prefix.
            ///
            /// # Errors
            /// [`IdError::Hex`] if the text is anything else.
            pub fn from_hex(text: &str) -> Result<Self, IdError> {
                unhex32(text).map(Self).ok_or(IdError::Hex)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                f.write_str(&self.hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let hex = text
                    .strip_prefix($prefix)
                    .ok_or(IdError::Prefix { expected: $prefix })?;
                Self::from_hex(hex)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?
                        .parse()
                        .map_err(serde::de::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

hash_type!(
    /// The identity of a segment: BLAKE3 over every byte of its file.
    ///
    /// ```
    /// use tidelock_segments::SegmentId;
    /// let id = SegmentId::of(b"bytes");
    /// assert_eq!(id.to_string().parse::<SegmentId>(), Ok(id));
    /// assert!(id.hex().parse::<SegmentId>().is_err(), "the prefix is not optional");
    /// ```
    SegmentId,
    "blake3:"
);

impl SegmentId {
    /// The id of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

hash_type!(
    /// A SHA-256 value: Merkle leaves and roots, file digests, action hashes.
    Sha256Hash,
    "sha256:"
);

impl Sha256Hash {
    /// SHA-256 of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        // One call into the library, without a context that it would allocate: this is what verifying
        // a log spends its time on.
        let mut out = [0u8; 32];
        if let Some(digest) = digest::digest(&digest::SHA256, bytes)
            .as_ref()
            .first_chunk::<32>()
        {
            out = *digest;
        }
        Self(out)
    }

    /// SHA-256 of the concatenation of these parts.
    #[must_use]
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(part);
        }
        let mut out = [0u8; 32];
        for (slot, byte) in out.iter_mut().zip(context.finish().as_ref()) {
            *slot = *byte;
        }
        Self(out)
    }
}

fn check_name(what: &'static str, text: &str) -> Result<(), IdError> {
    if text.is_empty() || text.len() > MAX_NAME_BYTES {
        return Err(IdError::Length {
            what,
            length: text.len(),
            max: MAX_NAME_BYTES,
        });
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !text.bytes().all(allowed)
        || !text
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
    {
        return Err(IdError::Characters { what });
    }
    Ok(())
}

/// Encode as text, decode through the checking constructor: a decoded name is a checked name.
macro_rules! text_codec {
    ($name:ident, $make:expr) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                $make(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Encode for $name {
            fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
                self.0.encode(encoder)
            }
        }

        impl<C> Decode<C> for $name {
            fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
                let text = String::decode(decoder)?;
                $make(&text).map_err(|e| DecodeError::OtherString(e.to_string()))
            }
        }

        impl<'de, C> BorrowDecode<'de, C> for $name {
            fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(
                decoder: &mut D,
            ) -> Result<Self, DecodeError> {
                Self::decode(decoder)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                $make(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! plain_name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Checks and takes the name: 1 to 63 of `A-Za-z0-9._-`, the first alphanumeric.
            ///
            /// # Errors
            /// [`IdError::Length`] or [`IdError::Characters`].
            pub fn new(text: &str) -> Result<Self, IdError> {
                check_name($what, text)?;
                Ok(Self(text.to_owned()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        text_codec!($name, $name::new);
    };
}

plain_name!(
    /// One trust domain: one CA, one policy authority.
    DomainId,
    "a domain"
);
plain_name!(
    /// One node of a domain.
    NodeId,
    "a node id"
);

/// What a segment carries. The numeric order is the order of urgency (INV-11).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A CA's revocation list.
    Revocation = 1,
    /// A signed policy package.
    Policy = 2,
    /// Evidence about the logs of others.
    Witness = 3,
    /// A sealed part of a node's audit log.
    Audit = 4,
}

impl Kind {
    /// Every kind, most urgent first (INV-11).
    pub const ALL: [Self; 4] = [Self::Revocation, Self::Policy, Self::Witness, Self::Audit];

    /// The number in the format.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The kind with this number.
    ///
    /// # Errors
    /// [`IdError::Kind`] if there is none.
    pub const fn from_number(number: u8) -> Result<Self, IdError> {
        match number {
            1 => Ok(Self::Revocation),
            2 => Ok(Self::Policy),
            3 => Ok(Self::Witness),
            4 => Ok(Self::Audit),
            _ => Err(IdError::Kind),
        }
    }

    /// The word used in directories, messages and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Revocation => "revocation",
            Self::Policy => "policy",
            Self::Witness => "witness",
            Self::Audit => "audit",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or(IdError::Kind)
    }
}

impl Encode for Kind {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.number().encode(encoder)
    }
}

impl<C> Decode<C> for Kind {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Self::from_number(u8::decode(decoder)?).map_err(|e| DecodeError::OtherString(e.to_string()))
    }
}

impl<'de, C> BorrowDecode<'de, C> for Kind {
    fn borrow_decode<D: BorrowDecoder<'de, Context = C>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        Self::decode(decoder)
    }
}

/// The log that a segment belongs to: `policy/<name>`, `crl/<sha256 of the issuer's SPKI>` or
/// `audit/<node id>/<log key fingerprint>/<incarnation>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin(String);

text_codec!(Origin, Origin::parse);

impl Origin {
    /// The origin of the policy with this name.
    ///
    /// # Errors
    /// [`IdError`] if the name is not 1 to 63 of `A-Za-z0-9._-`, the first alphanumeric.
    pub fn policy(name: &str) -> Result<Self, IdError> {
        check_name("a policy name", name)?;
        Ok(Self(format!("policy/{name}")))
    }

    /// The origin of the CRLs of the issuer whose subject public key info hashes to this.
    #[must_use]
    pub fn crl(issuer_spki_sha256: &[u8; 32]) -> Self {
        Self(format!("crl/{}", hex(issuer_spki_sha256)))
    }

    /// The origin of one incarnation of a node's audit log.
    #[must_use]
    pub fn audit(node: &NodeId, key: &LogPublicKey, incarnation: u64) -> Self {
        Self(format!("audit/{node}/{}/{incarnation}", key.fingerprint()))
    }

    /// Reads an origin, strictly: only the exact text that a constructor writes is accepted.
    ///
    /// # Errors
    /// [`IdError`] naming what is wrong.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        if text.len() > MAX_ORIGIN_BYTES {
            return Err(IdError::Length {
                what: "an origin",
                length: text.len(),
                max: MAX_ORIGIN_BYTES,
            });
        }
        let (head, rest) = text.split_once('/').ok_or(IdError::Origin)?;
        match head {
            "policy" => Self::policy(rest),
            "crl" => unhex32(rest)
                .map(|hash| Self::crl(&hash))
                .ok_or(IdError::Hex),
            "audit" => {
                let mut parts = rest.split('/');
                let (Some(node), Some(fingerprint), Some(incarnation), None) =
                    (parts.next(), parts.next(), parts.next(), parts.next())
                else {
                    return Err(IdError::Origin);
                };
                check_name("a node id", node)?;
                if fingerprint.len() != 16 || fingerprint.bytes().any(|b| hex_digit(b).is_none()) {
                    return Err(IdError::Origin);
                }
                let number: u64 = incarnation.parse().map_err(|_| IdError::Origin)?;
                if number.to_string() != incarnation {
                    return Err(IdError::Origin);
                }
                Ok(Self(text.to_owned()))
            }
            _ => Err(IdError::Origin),
        }
    }

    /// The origin as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The kind of segments that this origin's log holds.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.0.split_once('/') {
            Some(("policy", _)) => Kind::Policy,
            Some(("crl", _)) => Kind::Revocation,
            _ => Kind::Audit,
        }
    }

    /// The policy's name, of a policy origin.
    #[must_use]
    pub fn policy_name(&self) -> Option<&str> {
        self.0.strip_prefix("policy/")
    }

    /// The SHA-256 of the issuer's SPKI in hexadecimal, of a CRL origin.
    #[must_use]
    pub fn crl_issuer_hex(&self) -> Option<&str> {
        self.0.strip_prefix("crl/")
    }

    /// The node whose audit log this is, of an audit origin.
    #[must_use]
    pub fn audit_node(&self) -> Option<&str> {
        self.0.strip_prefix("audit/")?.split('/').next()
    }

    /// Node, log key fingerprint and incarnation, of an audit origin.
    #[must_use]
    pub fn audit_parts(&self) -> Option<(NodeId, &str, u64)> {
        let mut parts = self.0.strip_prefix("audit/")?.split('/');
        let node = NodeId::new(parts.next()?).ok()?;
        let fingerprint = parts.next()?;
        let incarnation = parts.next()?.parse().ok()?;
        Some((node, fingerprint, incarnation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_text_is_strict() {
        let id = SegmentId::of(b"x");
        assert_eq!(id.to_string().parse::<SegmentId>(), Ok(id));
        let sha = Sha256Hash::of(b"x");
        assert_eq!(sha.to_string().parse::<Sha256Hash>(), Ok(sha));
        // The roles never mix, upper case and other lengths are refused.
        assert_eq!(
            sha.to_string().parse::<SegmentId>(),
            Err(IdError::Prefix {
                expected: "blake3:"
            })
        );
        let upper = format!("blake3:{}", id.hex().to_uppercase());
        assert_eq!(upper.parse::<SegmentId>(), Err(IdError::Hex));
        assert_eq!(
            format!("blake3:{}0", id.hex()).parse::<SegmentId>(),
            Err(IdError::Hex)
        );
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<SegmentId>(&json).unwrap(), id);
    }

    #[test]
    fn sha256_of_parts_is_sha256_of_the_whole() {
        assert_eq!(
            Sha256Hash::of_parts(&[b"ab", b"", b"c"]),
            Sha256Hash::of(b"abc")
        );
        assert_eq!(
            Sha256Hash::of(b"abc").hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn names() {
        for good in ["a", "node-1", "A.b_c-9", &"x".repeat(63)] {
            assert_eq!(NodeId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".a", "-a", "a b", "a/b", "ä", "a\n", &"x".repeat(64)] {
            assert!(NodeId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn origins() {
        let key = LogPublicKey::from_bytes([7; 32]);
        let node = NodeId::new("n1").unwrap();
        let audit = Origin::audit(&node, &key, 3);
        assert_eq!(Origin::parse(audit.as_str()), Ok(audit.clone()));
        assert_eq!(audit.kind(), Kind::Audit);
        assert_eq!(audit.audit_node(), Some("n1"));
        assert_eq!(
            audit.audit_parts(),
            Some((node, key.fingerprint().as_str(), 3))
        );
        let crl = Origin::crl(&[9; 32]);
        assert_eq!(Origin::parse(crl.as_str()), Ok(crl.clone()));
        assert_eq!(crl.kind(), Kind::Revocation);
        assert_eq!(crl.audit_parts(), None);
        let policy = Origin::policy("base").unwrap();
        assert_eq!(Origin::parse("policy/base"), Ok(policy.clone()));
        assert_eq!(
            (policy.kind(), policy.policy_name()),
            (Kind::Policy, Some("base"))
        );
        for bad in [
            "",
            "policy",
            "policy/",
            "policy/a/b",
            "crl/00",
            "audit/n1",
            "audit/n1/0/1",
            "audit/n1/0000000000000000/01",
            "audit/n1/0000000000000000/1/2",
            "audit/n1/000000000000000G/1",
            "witness/x",
            "Policy/base",
        ] {
            assert!(Origin::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn inv_11_kind_numbers_are_the_order_of_urgency() {
        let mut kinds = Kind::ALL;
        kinds.sort();
        assert_eq!(kinds, Kind::ALL);
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind.number()), Ok(kind));
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        assert_eq!(Kind::from_number(0), Err(IdError::Kind));
        assert_eq!(Kind::from_number(5), Err(IdError::Kind));
    }
}
