//! Public keys of callers and issuers, and signatures under them. A key has one algorithm: what a
//! message says of its own algorithm is only compared with it.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject as _;

/// The kinds of keys that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256, keys of 2048 to 8192 bits.
    Rs256,
    /// ECDSA on P-256 with SHA-256, signatures of 64 bytes.
    Es256,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// Its name in JOSE headers.
    pub(crate) fn jose(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
        }
    }

    /// Its name in HTTP message signatures.
    pub(crate) fn http(self) -> &'static str {
        match self {
            Self::Rs256 => "rsa-v1_5-sha256",
            Self::Es256 => "ecdsa-p256-sha256",
            Self::EdDsa => "ed25519",
        }
    }
}

/// What comes before the point of a P-256 key in its subject public key info.
const P256_PREFIX: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// What comes before an Ed25519 key in its subject public key info (RFC 8410).
const ED25519_PREFIX: &[u8] = &[
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// Bits of the smallest RSA key that is taken.
const RSA_BITS_MIN: usize = 2048;
/// Bits of the largest.
const RSA_BITS_MAX: usize = 8192;

/// A public key.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum VerifyingKey {
    /// Modulus and exponent, big-endian.
    Rsa { n: Vec<u8>, e: Vec<u8> },
    /// An uncompressed point.
    P256(Vec<u8>),
    /// 32 bytes.
    Ed25519(Vec<u8>),
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.algorithm().jose())
    }
}

impl VerifyingKey {
    /// An RSA key.
    pub(crate) fn rsa(n: Vec<u8>, e: Vec<u8>) -> Result<Self, &'static str> {
        let bits = |number: &[u8]| match number.first() {
            Some(first) if *first != 0 => {
                let zeros = usize::try_from(first.leading_zeros()).unwrap_or_default();
                number.len() * 8 - zeros
            }
            // Leading zeros make a short number look long.
            _ => 0,
        };
        if bits(&n) < RSA_BITS_MIN {
            return Err("an RSA key below 2048 bits");
        }
        if bits(&n) > RSA_BITS_MAX {
            return Err("an RSA key above 8192 bits");
        }
        let odd = |number: &[u8]| number.last().is_some_and(|last| last & 1 == 1);
        if !odd(&n) || !odd(&e) || !(2..=33).contains(&bits(&e)) {
            return Err("an RSA key with an unusable modulus or exponent");
        }
        Ok(Self::Rsa { n, e })
    }

    /// A key on P-256, from its uncompressed point.
    pub(crate) fn p256(point: Vec<u8>) -> Result<Self, &'static str> {
        match ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point) {
            Ok(_) if point.len() == 65 => Ok(Self::P256(point)),
            _ => Err("a point that is not on P-256"),
        }
    }

    /// An Ed25519 key.
    pub(crate) fn ed25519(key: Vec<u8>) -> Result<Self, &'static str> {
        match ParsedPublicKey::new(&ED25519, &key) {
            Ok(_) if key.len() == 32 => Ok(Self::Ed25519(key)),
            _ => Err("no Ed25519 key"),
        }
    }

    /// A key that signs requests: Ed25519 or P-256, in PEM.
    pub(crate) fn from_pem(pem: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str =
            "must be the PEM of an Ed25519 or P-256 public key (openssl pkey -pubout)";
        let spki = SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).map_err(|_| EXPECTED)?;
        if let Some(key) = spki.strip_prefix(ED25519_PREFIX) {
            return Self::ed25519(key.to_vec()).map_err(|_| EXPECTED);
        }
        let point = spki.strip_prefix(P256_PREFIX).ok_or(EXPECTED)?;
        Self::p256(point.to_vec()).map_err(|_| EXPECTED)
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        match self {
            Self::Rsa { .. } => Algorithm::Rs256,
            Self::P256(_) => Algorithm::Es256,
            Self::Ed25519(_) => Algorithm::EdDsa,
        }
    }

    /// Whether this is a signature over the message under this key.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let by = |algorithm: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(algorithm, key)
                .verify(message, signature)
                .is_ok()
        };
        match self {
            Self::Rsa { n, e } => RsaPublicKeyComponents { n, e }
                .verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
                .is_ok(),
            Self::P256(point) => by(&ECDSA_P256_SHA256_FIXED, point),
            Self::Ed25519(key) => by(&ED25519, key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    fn bytes(text: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(text).unwrap()
    }

    /// RFC 7515 A.3 and RFC 8037 A.4.
    #[test]
    fn the_vectors_of_the_standards_verify_and_others_do_not() {
        let point = [
            &[4][..],
            &bytes("f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU"),
            &bytes("x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"),
        ];
        let cases = [
            (
                VerifyingKey::p256(point.concat()).unwrap(),
                "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ",
                "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
            ),
            (
                VerifyingKey::ed25519(bytes("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"))
                    .unwrap(),
                "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc",
                "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
            ),
        ];
        for (key, message, signature) in &cases {
            let signature = bytes(signature);
            assert!(key.verifies(message.as_bytes(), &signature), "{key:?}");
            for at in 0..signature.len() {
                let mut other = signature.clone();
                other[at] ^= 1;
                assert!(!key.verifies(message.as_bytes(), &other), "{key:?} {at}");
            }
            assert!(!key.verifies(&message.as_bytes()[1..], &signature));
            assert!(!key.verifies(message.as_bytes(), &signature[1..]));
            assert!(!key.verifies(message.as_bytes(), &[]));
        }
        let [(first, ..), (second, message, signature)] = &cases;
        assert!(!first.verifies(message.as_bytes(), &bytes(signature)));
        assert_ne!(first, second);
    }

    #[test]
    fn keys_that_are_weak_or_none_are_refused() {
        let modulus = |bits: usize| {
            let mut n = vec![0; bits.div_ceil(8)];
            n[0] = 1 << ((bits - 1) % 8);
            let last = n.len() - 1;
            n[last] |= 1;
            n
        };
        let e = vec![1, 0, 1];
        assert!(
            VerifyingKey::rsa(modulus(2048), e.clone()).is_ok(),
            "positive control"
        );
        for bits in [512, 1024, 2047, 8193] {
            assert!(
                VerifyingKey::rsa(modulus(bits), e.clone()).is_err(),
                "{bits}"
            );
        }
        // 1024 bits that look like 2048.
        let padded = [vec![0; 128], modulus(1024)].concat();
        assert!(VerifyingKey::rsa(padded, e).is_err());
        for e in [vec![], vec![1], vec![2], vec![0, 1, 0, 1], vec![1; 9]] {
            assert!(
                VerifyingKey::rsa(modulus(2048), e.clone()).is_err(),
                "{e:?}"
            );
        }
        assert!(
            VerifyingKey::p256([&[4][..], &[7; 64]].concat()).is_err(),
            "not on the curve"
        );
        assert!(VerifyingKey::ed25519(vec![1; 31]).is_err());
        assert!(
            VerifyingKey::from_pem("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
                .is_err()
        );
    }
}
