//! The node's log key (Ed25519) and its endorsement by the node's certificate key.
//!
//! A log key signs checkpoints, sealed audit segments and custody receipts. The endorsement ties
//! it to a certificate, and travels with whatever the key signed, so a third node that never met
//! the origin can check it. This module checks log-key signatures; whether an endorsement's
//! certificate chain is good is an X.509 question and belongs to `tidelock-transport`.

use std::fmt;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use bincode::{Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::codec::{self, CodecError};
use crate::id::{NodeId, Sha256Hash, hex, unhex32};
use crate::limits::{MAX_CHAIN_CERTIFICATES, MAX_ENDORSEMENT_BYTES};

/// What can go wrong with a key or a signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The system's random source or the key generator failed.
    #[error("cannot generate a log key")]
    Generate,
    /// Not an Ed25519 key in PKCS#8.
    #[error("not an Ed25519 private key in PKCS#8; remove the file to make a new log key")]
    Pkcs8,
    /// The signature does not belong to this message and key.
    #[error("signature does not verify")]
    Signature,
}

/// The private half of a log key.
pub struct LogKey {
    pair: Ed25519KeyPair,
    public: LogPublicKey,
}

impl LogKey {
    fn from_pair(pair: Ed25519KeyPair) -> Result<Self, KeyError> {
        let public =
            <[u8; 32]>::try_from(pair.public_key().as_ref()).map_err(|_| KeyError::Pkcs8)?;
        Ok(Self {
            pair,
            public: LogPublicKey(public),
        })
    }

    /// Makes a new key from the system's random source.
    ///
    /// # Errors
    /// [`KeyError::Generate`] if the random source fails.
    pub fn generate() -> Result<Self, KeyError> {
        Self::from_pair(Ed25519KeyPair::generate().map_err(|_| KeyError::Generate)?)
    }

    /// Makes the key that belongs to this 32-byte seed. For tests and vectors, where the same key
    /// is needed again; a node generates its key.
    ///
    /// # Errors
    /// [`KeyError::Pkcs8`] if the library refuses the seed.
    pub fn from_seed(seed: &[u8; 32]) -> Result<Self, KeyError> {
        Self::from_pair(Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| KeyError::Pkcs8)?)
    }

    /// Reads a key as [`LogKey::to_pkcs8`] writes it.
    ///
    /// # Errors
    /// [`KeyError::Pkcs8`] if the bytes are anything else.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        Self::from_pair(Ed25519KeyPair::from_pkcs8(der).map_err(|_| KeyError::Pkcs8)?)
    }

    /// The key as PKCS#8 v2 DER, in memory that is wiped when dropped.
    ///
    /// # Errors
    /// [`KeyError::Generate`] if the library cannot encode the key.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let der: aws_lc_rs::encoding::Pkcs8V2Der<'_> =
            self.pair.as_der().map_err(|_| KeyError::Generate)?;
        Ok(Zeroizing::new(der.as_ref().to_vec()))
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> LogPublicKey {
        self.public
    }

    /// Signs a message (Ed25519, RFC 8032).
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut out = [0u8; 64];
        for (slot, byte) in out.iter_mut().zip(self.pair.sign(message).as_ref()) {
            *slot = *byte;
        }
        out
    }
}

impl fmt::Debug for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogKey")
            .field(&self.public.fingerprint())
            .finish()
    }
}

/// The public half of a log key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct LogPublicKey([u8; 32]);

impl LogPublicKey {
    /// Takes the 32 raw bytes. Whether they are a point on the curve shows at the first `verify`.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Checks a signature by this key.
    ///
    /// # Errors
    /// [`KeyError::Signature`] if it is not one.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(message, signature)
            .map_err(|_| KeyError::Signature)
    }

    /// The first 16 hexadecimal digits of the key's SHA-256, as they stand in an origin.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        Sha256Hash::of(&self.0).hex().chars().take(16).collect()
    }
}

impl Serialize for LogPublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&hex(&self.0))
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for LogPublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            unhex32(&text).map(Self).ok_or_else(|| {
                serde::de::Error::custom("expected 64 lower-case hexadecimal digits")
            })
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

impl fmt::Debug for LogPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogPublicKey")
            .field(&self.fingerprint())
            .finish()
    }
}

/// The certificate key's statement that a log key speaks for a node, for one incarnation of its log
/// (ruling 7).
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Endorsement {
    /// The node that the log key speaks for.
    pub node_id: NodeId,
    /// The endorsed key.
    pub log_key: LogPublicKey,
    /// The incarnation of the node's log that the key may sign.
    pub incarnation: u64,
    /// The certificate chain in DER, leaf first.
    pub chain: Vec<Vec<u8>>,
    /// The TLS `SignatureScheme` of the signature.
    pub scheme: u16,
    /// The leaf certificate key's signature over [`Endorsement::message`].
    pub signature: Vec<u8>,
}

impl Endorsement {
    /// What stands before every endorsement message, so that the signature can mean nothing else.
    pub const CONTEXT: &'static [u8] = b"tidelock log key endorsement v1\0";

    /// The bytes that the certificate key signs.
    #[must_use]
    pub fn message(
        node_id: &NodeId,
        log_key: &LogPublicKey,
        incarnation: u64,
        chain: &[Vec<u8>],
    ) -> Vec<u8> {
        let mut out = Self::CONTEXT.to_vec();
        let mut field = |bytes: &[u8]| {
            out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        field(node_id.as_str().as_bytes());
        field(log_key.as_bytes());
        field(&incarnation.to_le_bytes());
        for certificate in chain {
            field(certificate);
        }
        out
    }

    /// The message that this endorsement's signature should cover.
    #[must_use]
    pub fn signed_message(&self) -> Vec<u8> {
        Self::message(&self.node_id, &self.log_key, self.incarnation, &self.chain)
    }

    /// The canonical bytes, as they travel in Hello.
    ///
    /// # Errors
    /// [`CodecError`] if it exceeds its limits.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        self.check_limits()?;
        codec::encode::<Self, MAX_ENDORSEMENT_BYTES>(self)
    }

    /// Reads what [`Endorsement::encode`] wrote.
    ///
    /// # Errors
    /// [`CodecError`] if the bytes are not the canonical encoding of an endorsement.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let endorsement = codec::decode::<Self, MAX_ENDORSEMENT_BYTES>(bytes)?;
        endorsement.check_limits()?;
        Ok(endorsement)
    }

    pub(crate) fn check_limits(&self) -> Result<(), CodecError> {
        if self.chain.len() > MAX_CHAIN_CERTIFICATES {
            return Err(CodecError::TooLong {
                length: self.chain.len(),
                max: MAX_CHAIN_CERTIFICATES,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pkcs8_round_trip_signs_alike() {
        let key = LogKey::generate().unwrap();
        let again = LogKey::from_pkcs8(&key.to_pkcs8().unwrap()).unwrap();
        assert_eq!(key.public(), again.public());
        let signature = again.sign(b"message");
        assert_eq!(key.public().verify(b"message", &signature), Ok(()));
        assert_eq!(
            key.public().verify(b"massage", &signature),
            Err(KeyError::Signature)
        );
        assert!(LogKey::from_pkcs8(b"no key").is_err());
    }

    #[test]
    fn rfc_8032_test_1() {
        let seed =
            unhex32("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60").unwrap();
        let key = LogKey::from_seed(&seed).unwrap();
        assert_eq!(
            hex(key.public().as_bytes()),
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        );
        assert!(hex(&key.sign(b"")).starts_with("e5564300c360ac729086e2cc806e828a84877f1e"));
    }

    #[test]
    fn endorsement_fields_cannot_run_into_each_other() {
        let key = LogPublicKey::from_bytes([1; 32]);
        let node = NodeId::new("n").unwrap();
        let one = Endorsement::message(&node, &key, 1, &[vec![1, 2], vec![3]]);
        let other = Endorsement::message(&node, &key, 1, &[vec![1], vec![2, 3]]);
        assert_ne!(one, other);
        let endorsement = Endorsement {
            node_id: node,
            log_key: key,
            incarnation: 1,
            chain: vec![vec![0x30, 0x00]],
            scheme: 0x0403,
            signature: vec![5; 70],
        };
        let bytes = endorsement.encode().unwrap();
        assert_eq!(Endorsement::decode(&bytes), Ok(endorsement));
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(Endorsement::decode(&longer), Err(CodecError::NotCanonical));
        assert!(Endorsement::decode(&bytes[..bytes.len() - 1]).is_err());
    }
}
