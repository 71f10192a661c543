//! Which certificates are revoked, and whether we may still believe that we know.
//!
//! A CRL is verified **once**, when it is loaded ([`VerifiedCrl::verify`]); afterwards a handshake
//! only looks serial numbers up. [`RevocationState`] is an immutable value; [`Revocation`] holds the
//! current one behind an atomic pointer, so a new CRL needs no new TLS configuration. Start at
//! [`RevocationState::check`].
//!
//! The rules (rulings 5, 9, 10 and 12):
//!
//! - No CRL, an expired CRL or a CRL of an issuer we do not know is no licence to believe: refused.
//! - One CRL per issuer, the highest number; a lower number is refused (INV-16).
//! - Two different CRLs of one number: the union of what they revoke holds, and it is reported.
//! - A CRL from the future revokes at once, but displaces nothing and counts as fresh only when its
//!   time has come. Nothing is un-revoked meanwhile.
//! - Revoked is revoked by (issuer, serial) and by key: the key of a certificate that was revoked
//!   for more than a change of its paper is refused in any other certificate too.
//!
//! It is not a store: persisting CRLs (as segments, see [`crl_segment`]) is the node's work, and a
//! verified CRL takes effect here even if storing it fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use tidelock_segments::{
    DomainId, FormatError, Kind, Origin, SegmentHeader, VerifiedSegment, seal_unsigned,
};
use x509_parser::asn1_rs::Any;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::verifier::{ALGORITHMS, Trust};

/// Largest CRL in bytes: about 100,000 entries of 40 bytes. One is held for each issuer while it is
/// being read, and the node's reserve keeps disk room for one per issuer (ruling 10).
pub const MAX_CRL_BYTES: usize = 4 * 1024 * 1024;

/// Largest file with CRLs: one of the largest CRLs in PEM, or several that are smaller.
pub const MAX_CRL_FILE_BYTES: usize = 2 * MAX_CRL_BYTES;

/// Most entries of one CRL. An entry costs 22 bytes in memory: at most 2.9 MiB a list, and an
/// issuer has at most two lists (current and ahead) and one union of displaced ones.
pub const MAX_CRL_ENTRIES: usize = 131_072;

/// Most issuers whose CRLs are held. An issuer at every limit costs 17 MiB (two CRLs with their
/// entries, one union), all sixteen 272 MiB; a site of one CA and a thousand revocations 100 KiB.
pub const MAX_ISSUERS: usize = crate::verifier::MAX_AUTHORITIES;

/// Most revoked keys remembered: 32 bytes each, about 1 MiB with the tree around them.
pub const MAX_REVOKED_KEYS: usize = 16_384;

/// How far ahead of our clock a CRL's thisUpdate may lie and still be plausible. Clocks of one site
/// differ by seconds; five minutes is what Kerberos grew old with.
pub const CLOCK_SKEW_MS: u64 = 5 * 60 * 1000;

/// Longest certificate serial number in octets (RFC 5280).
pub const MAX_SERIAL_BYTES: usize = 20;

// The smallest entry (serial of one octet, UTCTime) has 20 bytes of DER: a CRL of so many entries
// fits, so the limit on entries is a limit of its own and not implied by the limit on bytes.
const _: () = assert!(MAX_CRL_ENTRIES * 20 <= MAX_CRL_BYTES);
const _: () = assert!(MAX_CRL_BYTES as u64 <= tidelock_segments::limits::MAX_BODY_BYTES);

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
            // Writing to a String cannot fail.
            let _ = write!(out, "{byte:02x}");
            out
        })
}

/// A name from somebody else's file, fit for a message: no control characters, no more than 200.
pub(crate) fn printable(name: &str) -> String {
    name.chars()
        .take(200)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// SHA-256 of a DER-encoded subject public key info: the identity of a key, and of an issuer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpkiHash([u8; 32]);

impl SpkiHash {
    /// Hashes a complete DER-encoded subject public key info.
    #[must_use]
    pub fn of(spki_der: &[u8]) -> Self {
        let mut out = [0u8; 32];
        for (slot, byte) in out
            .iter_mut()
            .zip(digest::digest(&digest::SHA256, spki_der).as_ref())
        {
            *slot = *byte;
        }
        Self(out)
    }

    /// Takes a hash that was made elsewhere (a configured revoked key, a persisted one).
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex(&self.0))
    }
}

impl fmt::Debug for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A certificate serial number without leading zero octets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial {
    length: u8,
    bytes: [u8; MAX_SERIAL_BYTES],
}

impl Serial {
    /// Takes the content octets of the DER INTEGER.
    ///
    /// `None` if it is longer than [`MAX_SERIAL_BYTES`] without its leading zeros.
    #[must_use]
    pub fn new(content: &[u8]) -> Option<Self> {
        let first = content
            .iter()
            .position(|b| *b != 0)
            .unwrap_or(content.len());
        let digits = content.get(first..)?;
        if digits.len() > MAX_SERIAL_BYTES {
            return None;
        }
        let mut bytes = [0u8; MAX_SERIAL_BYTES];
        for (slot, byte) in bytes.iter_mut().zip(digits) {
            *slot = *byte;
        }
        Some(Self {
            length: u8::try_from(digits.len()).ok()?,
            bytes,
        })
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes.get(..usize::from(self.length)) {
            Some([]) | None => f.write_str("00"),
            Some(digits) => f.write_str(&hex(digits)),
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a certificate of a path is revoked by. Never its fingerprint: an ECDSA signature can be
/// rewritten by anybody without becoming invalid, and the fingerprint changes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainKey {
    /// The key of the authority that issued the certificate.
    pub issuer: SpkiHash,
    /// The serial number that the issuer gave it.
    pub serial: Serial,
    /// The certificate's own key.
    pub spki: SpkiHash,
}

/// Why a CRL was not taken. The fault is the CRL's, or of whoever brought it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CrlError {
    /// Larger than [`MAX_CRL_BYTES`] or more entries than [`MAX_CRL_ENTRIES`].
    #[error("the CRL has {found} {what}, the limit is {max}; drop expired certificates from it")]
    TooLarge {
        /// What there was too much of.
        what: &'static str,
        /// How much was found.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// Not a CRL in DER, or one that cannot be read whole.
    #[error("the file is not a CRL in DER or cannot be read whole: {detail}")]
    Malformed {
        /// What was wrong.
        detail: String,
    },
    /// A CRL that covers less than all certificates of its issuer, or more than its issuer.
    #[error("the CRL is {scope}; only complete CRLs are taken, issue one without that extension")]
    Scope {
        /// What kind of CRL it is.
        scope: &'static str,
    },
    /// No CRL number.
    #[error("the CRL has no usable number; set crlnumber at the CA (0 to 2^64-1)")]
    NoNumber,
    /// No nextUpdate, or one that is not after thisUpdate.
    #[error("the CRL has no nextUpdate after its thisUpdate; set default_crl_days at the CA")]
    NoNextUpdate,
    /// No trusted authority has the issuer's name.
    #[error(
        "the CRL's issuer ({issuer}) is not among the trusted authorities; add its certificate to \
         the CA file"
    )]
    UnknownIssuer {
        /// The issuer's name.
        issuer: String,
    },
    /// An authority of that name is trusted, but did not sign this.
    #[error("the CRL's signature does not belong to the trusted authority {issuer}")]
    Signature {
        /// The issuer's name.
        issuer: String,
    },
    /// The authority's certificate does not allow it to sign CRLs.
    #[error("the certificate of {issuer} lacks the key usage cRLSign; reissue it")]
    NotACrlSigner {
        /// The issuer's name.
        issuer: String,
    },
    /// An older CRL than the one that is held.
    #[error("the CRL has number {number}, but number {held} of the same issuer is held already")]
    Older {
        /// The number of the CRL that was offered.
        number: u64,
        /// The number that is held.
        held: u64,
    },
    /// The CRL's distribution point is another than that of the CRL held: part of a split list.
    #[error(
        "the CRL names another distribution point than the one held; split CRLs are not taken, \
         issue one complete CRL"
    )]
    OtherPart,
    /// Conflicting or displaced CRLs revoke more than can be held.
    #[error("conflicting CRLs of {issuer} revoke more than {max} certificates; ask the CA why")]
    TooManyConflicts {
        /// The issuer.
        issuer: SpkiHash,
        /// The limit.
        max: usize,
    },
    /// The segment around the CRL contradicts it.
    #[error("the segment's origin or sequence is not that of the CRL in it")]
    Envelope,
}

impl CrlError {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "CRL_TOO_LARGE",
            Self::Malformed { .. } => "CRL_MALFORMED",
            Self::Scope { .. } | Self::OtherPart => "CRL_SCOPE",
            Self::NoNumber => "CRL_NO_NUMBER",
            Self::NoNextUpdate => "CRL_NO_NEXT_UPDATE",
            Self::UnknownIssuer { .. } => "CRL_UNKNOWN_ISSUER",
            Self::Signature { .. } => "CRL_SIGNATURE",
            Self::NotACrlSigner { .. } => "CRL_NOT_A_SIGNER",
            Self::Older { .. } => "CRL_OLDER",
            Self::TooManyConflicts { .. } => "CRL_CONFLICTS",
            Self::Envelope => "CRL_ENVELOPE",
        }
    }
}

/// Why a path is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RevocationError {
    /// A certificate of the path stands in its issuer's CRL.
    #[error("{} with serial {serial} is revoked by its issuer", place(*.position))]
    Revoked {
        /// Its place in the path, 0 is the peer's own certificate.
        position: usize,
        /// Its serial number.
        serial: Serial,
    },
    /// The key of a certificate of the path belonged to a revoked certificate.
    #[error(
        "the key of {} was revoked with another certificate; issue it under a new key",
        place(*.position)
    )]
    KeyRevoked {
        /// Its place in the path, 0 is the peer's own certificate.
        position: usize,
        /// The key.
        key: SpkiHash,
    },
    /// There is no CRL of an issuer in the path.
    #[error(
        "no CRL of the issuer {issuer} is held, so nobody can say what it revoked; import one \
         (tidelock crl import FILE)"
    )]
    Missing {
        /// The issuer.
        issuer: SpkiHash,
    },
    /// The CRL of an issuer in the path has expired, grace included.
    #[error(
        "the CRL of the issuer {issuer} expired at {next_update_unix_ms} ms; import a newer one \
         (tidelock crl import FILE)"
    )]
    Expired {
        /// The issuer.
        issuer: SpkiHash,
        /// When it expired.
        next_update_unix_ms: u64,
    },
    /// The only CRL of an issuer in the path comes from the future.
    #[error(
        "the CRL of the issuer {issuer} begins at {this_update_unix_ms} ms, after this node's \
         time; check the clock"
    )]
    NotYetValid {
        /// The issuer.
        issuer: SpkiHash,
        /// When it begins.
        this_update_unix_ms: u64,
    },
}

fn place(position: usize) -> &'static str {
    if position == 0 {
        "the certificate"
    } else {
        "an authority in the chain"
    }
}

impl RevocationError {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Revoked { .. } => "CERT_REVOKED",
            Self::KeyRevoked { .. } => "KEY_REVOKED",
            Self::Missing { .. } => "CRL_MISSING",
            Self::Expired { .. } => "CRL_EXPIRED",
            Self::NotYetValid { .. } => "CRL_NOT_YET_VALID",
        }
    }
}

/// One entry of a CRL, or of a union of CRLs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    serial: Serial,
    /// The revocation says something of the key, not only of the paper.
    key_too: bool,
}

/// A CRL whose signature by a trusted authority was checked, and which was read to its last byte.
///
/// ```
/// use tidelock_transport::revocation::VerifiedCrl;
/// fn number(crl: &VerifiedCrl) -> u64 {
///     crl.number()
/// }
/// ```
///
/// ```compile_fail,E0451
/// use tidelock_transport::revocation::VerifiedCrl;
/// let unchecked = VerifiedCrl { number: 7, ..todo!() };
/// ```
#[derive(Debug)]
pub struct VerifiedCrl {
    issuer: SpkiHash,
    issuer_name: String,
    number: u64,
    this_update_unix_ms: u64,
    next_update_unix_ms: u64,
    distribution_point: Option<Vec<u8>>,
    /// SHA-256 of the signed part: an ECDSA signature can be rewritten, what it signs cannot.
    content: SpkiHash,
    /// Sorted by serial, no serial twice.
    entries: Vec<Entry>,
    der: Vec<u8>,
}

impl VerifiedCrl {
    /// Reads a CRL in DER and checks that a trusted authority signed it. No time is involved: what
    /// the CRL's times mean is judged each time that somebody asks.
    ///
    /// # Errors
    /// [`CrlError`] saying what is wrong and the way out.
    pub fn verify(der: &[u8], trust: &Trust) -> Result<Self, CrlError> {
        if der.len() > MAX_CRL_BYTES {
            return Err(CrlError::TooLarge {
                what: "bytes",
                found: der.len(),
                max: MAX_CRL_BYTES,
            });
        }
        let (rest, crl) =
            CertificateRevocationList::from_der(der).map_err(|e| malformed(&e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes after the CRL"));
        }
        let (number, distribution_point) = scope_and_number(&crl)?;
        let this_update_unix_ms = unix_ms(crl.last_update().timestamp())?;
        let next_update_unix_ms = match crl.next_update() {
            Some(time) => unix_ms(time.timestamp())?,
            None => return Err(CrlError::NoNextUpdate),
        };
        if next_update_unix_ms <= this_update_unix_ms {
            return Err(CrlError::NoNextUpdate);
        }
        let signed = SignedParts::of(der)?;
        let authority = signer(&crl, &signed, trust)?;
        // Entries come from webpki's reader, the one that refuses a CRL with anything critical or
        // indirect in it. Both readers must have seen the same number of entries: one that stops
        // early at an odd entry would silently un-revoke the rest.
        let entries = entries(der)?;
        if entries.len() != crl.iter_revoked_certificates().count() {
            return Err(malformed("two readers disagree on the number of entries"));
        }
        Ok(Self {
            issuer: authority.0,
            issuer_name: authority.1,
            number,
            this_update_unix_ms,
            next_update_unix_ms,
            distribution_point,
            content: SpkiHash::of(signed.message),
            entries: union(&entries, &[]),
            der: der.to_vec(),
        })
    }

    /// Reads the CRL out of a revocation segment, and checks that its origin and sequence are those
    /// of the CRL.
    ///
    /// # Errors
    /// [`CrlError`], of the CRL or of its envelope.
    pub fn from_segment(segment: &VerifiedSegment, trust: &Trust) -> Result<Self, CrlError> {
        let header = segment.header();
        if header.kind != Kind::Revocation {
            return Err(CrlError::Envelope);
        }
        let crl = Self::verify(segment.body(), trust)?;
        if header.origin != crl.origin() || header.sequence != crl.number {
            return Err(CrlError::Envelope);
        }
        Ok(crl)
    }

    /// The key of the authority that signed it.
    #[must_use]
    pub fn issuer(&self) -> SpkiHash {
        self.issuer
    }

    /// The authority's name, as its certificate has it.
    #[must_use]
    pub fn issuer_name(&self) -> &str {
        &self.issuer_name
    }

    /// The CRL number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// When it begins. A time signed by the CA: it may raise the node's time floor.
    #[must_use]
    pub fn this_update_unix_ms(&self) -> u64 {
        self.this_update_unix_ms
    }

    /// When the next is due, and this one expires.
    #[must_use]
    pub fn next_update_unix_ms(&self) -> u64 {
        self.next_update_unix_ms
    }

    /// How many certificates it revokes.
    #[must_use]
    pub fn revoked_count(&self) -> usize {
        self.entries.len()
    }

    /// The CRL in DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The origin of its segment.
    #[must_use]
    pub fn origin(&self) -> Origin {
        Origin::crl(self.issuer.as_bytes())
    }
}

/// The CRLs of a file, in DER: one, if the file is DER, or all of a PEM file. They are not verified.
///
/// # Errors
/// [`CrlError::Malformed`] if there is none, or one is cut off; [`CrlError::TooLarge`].
pub fn crls_in_file(bytes: &[u8]) -> Result<Vec<Vec<u8>>, CrlError> {
    let max = MAX_CRL_FILE_BYTES;
    if bytes.len() > max {
        return Err(CrlError::TooLarge {
            what: "bytes",
            found: bytes.len(),
            max,
        });
    }
    // A CRL in DER is a SEQUENCE; no text begins like this.
    if bytes.first() == Some(&0x30) {
        return Ok(vec![bytes.to_vec()]);
    }
    let crls = CertificateRevocationListDer::pem_slice_iter(bytes)
        .map(|crl| crl.map(|der| der.to_vec()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| malformed(&e.to_string()))?;
    if crls.is_empty() {
        return Err(malformed("neither DER nor PEM with an X509 CRL in it"));
    }
    Ok(crls)
}

/// The segment that carries a CRL: deterministic, so every node that is handed the same CRL makes
/// the same segment (ruling 5). Gaps in the sequence are normal.
///
/// # Errors
/// [`FormatError`] if the segment format refuses it.
pub fn crl_segment(domain: &DomainId, crl: &VerifiedCrl) -> Result<Vec<u8>, FormatError> {
    let header = SegmentHeader {
        kind: Kind::Revocation,
        domain: domain.clone(),
        origin: crl.origin(),
        sequence: crl.number,
        prev: None,
        created_unix_ms: 0,
    };
    seal_unsigned(&header, &crl.der)
}

fn malformed(detail: &str) -> CrlError {
    CrlError::Malformed {
        detail: detail.to_owned(),
    }
}

fn unix_ms(seconds: i64) -> Result<u64, CrlError> {
    u64::try_from(seconds)
        .ok()
        .and_then(|s| s.checked_mul(1000))
        .ok_or_else(|| malformed("a time before 1970"))
}

/// OIDs below id-ce (2.5.29), as the last arc.
fn id_ce(extension: &x509_parser::extensions::X509Extension<'_>) -> Option<u8> {
    match extension.oid.as_bytes() {
        [0x55, 0x1d, last] => Some(*last),
        _ => None,
    }
}

fn scope_and_number(
    crl: &CertificateRevocationList<'_>,
) -> Result<(u64, Option<Vec<u8>>), CrlError> {
    let mut number = None;
    let mut distribution_point = None;
    for extension in crl.extensions() {
        match id_ce(extension) {
            Some(20) => {
                let (rest, integer) =
                    Any::from_der(extension.value).map_err(|_| CrlError::NoNumber)?;
                let digits = match integer.data {
                    [first, ..] if first & 0x80 != 0 => return Err(CrlError::NoNumber),
                    [0, digits @ ..] | digits => digits,
                };
                if !rest.is_empty() || digits.len() > 8 || number.is_some() {
                    return Err(CrlError::NoNumber);
                }
                number = Some(digits.iter().fold(0u64, |n, d| n << 8 | u64::from(*d)));
            }
            Some(27) => {
                return Err(CrlError::Scope {
                    scope: "a delta CRL",
                });
            }
            Some(28) => {
                let (_, idp) = Any::from_der(extension.value)
                    .map_err(|_| malformed("bad issuing distribution point"))?;
                distribution_point = Some(idp_point(idp.data)?);
            }
            _ => {}
        }
    }
    Ok((number.ok_or(CrlError::NoNumber)?, distribution_point))
}

/// The distribution point of an issuing distribution point extension that restricts nothing else.
fn idp_point(mut fields: &[u8]) -> Result<Vec<u8>, CrlError> {
    let mut point = Vec::new();
    while !fields.is_empty() {
        let (rest, field) =
            Any::from_der(fields).map_err(|_| malformed("bad issuing distribution point"))?;
        match field.tag().0 {
            0 => point = field.data.to_vec(),
            // An explicit FALSE restricts nothing.
            1 | 2 | 4 | 5 if field.data == [0] => {}
            1 => {
                return Err(CrlError::Scope {
                    scope: "for user certificates only",
                });
            }
            2 => {
                return Err(CrlError::Scope {
                    scope: "for CA certificates only",
                });
            }
            3 => {
                return Err(CrlError::Scope {
                    scope: "for some reasons only",
                });
            }
            4 => {
                return Err(CrlError::Scope {
                    scope: "an indirect CRL",
                });
            }
            _ => {
                return Err(CrlError::Scope {
                    scope: "for attribute certificates only",
                });
            }
        }
        fields = rest;
    }
    Ok(point)
}

/// The three parts of `SEQUENCE { tbs, algorithm, signature }`, byte for byte.
struct SignedParts<'a> {
    message: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl<'a> SignedParts<'a> {
    fn of(der: &'a [u8]) -> Result<Self, CrlError> {
        let read = |bytes: &'a [u8]| Any::from_der(bytes).map_err(|e| malformed(&e.to_string()));
        let (_, outer) = read(der)?;
        let (after_message, _) = read(outer.data)?;
        let length = outer.data.len().saturating_sub(after_message.len());
        let message = outer.data.get(..length).unwrap_or_default();
        let (after_algorithm, algorithm) = read(after_message)?;
        let (rest, signature) = read(after_algorithm)?;
        match signature.data {
            // The first octet of a BIT STRING counts its unused bits.
            [0, signature @ ..] if rest.is_empty() => Ok(Self {
                message,
                algorithm: algorithm.data,
                signature,
            }),
            _ => Err(malformed("bad signature field")),
        }
    }

    fn is_by(&self, spki_der: &[u8]) -> bool {
        let spki = rustls::pki_types::SubjectPublicKeyInfoDer::from(spki_der);
        let Ok(key) = webpki::RawPublicKeyEntity::try_from(&spki) else {
            return false;
        };
        // One signature OID stands for several (curve, hash) pairs; the wrong ones refuse the key.
        ALGORITHMS
            .all
            .iter()
            .filter(|algorithm| algorithm.signature_alg_id().as_ref() == self.algorithm)
            .any(|algorithm| {
                key.verify_signature(*algorithm, self.message, self.signature)
                    .is_ok()
            })
    }
}

fn signer(
    crl: &CertificateRevocationList<'_>,
    signed: &SignedParts<'_>,
    trust: &Trust,
) -> Result<(SpkiHash, String), CrlError> {
    let issuer = printable(&crl.issuer().to_string());
    let mut named = false;
    for authority in trust.authorities() {
        if authority.subject_der() != crl.issuer().as_raw() {
            continue;
        }
        named = true;
        if signed.is_by(authority.spki_der()) {
            if !authority.may_sign_crls() {
                return Err(CrlError::NotACrlSigner { issuer });
            }
            return Ok((authority.id(), issuer));
        }
    }
    Err(if named {
        CrlError::Signature { issuer }
    } else {
        CrlError::UnknownIssuer { issuer }
    })
}

fn entries(der: &[u8]) -> Result<Vec<Entry>, CrlError> {
    use webpki::RevocationReason as Reason;
    let refused = |e: webpki::Error| match e {
        webpki::Error::UnsupportedDeltaCrl => CrlError::Scope {
            scope: "a delta CRL",
        },
        webpki::Error::UnsupportedIndirectCrl => CrlError::Scope {
            scope: "an indirect CRL",
        },
        other => malformed(&format!("{other:?}")),
    };
    let list = webpki::BorrowedCertRevocationList::from_der(der).map_err(refused)?;
    let mut entries = Vec::new();
    for revoked in &list {
        let revoked = revoked.map_err(refused)?;
        if entries.len() >= MAX_CRL_ENTRIES {
            return Err(CrlError::TooLarge {
                what: "entries",
                found: entries.len() + 1,
                max: MAX_CRL_ENTRIES,
            });
        }
        let serial = Serial::new(revoked.serial_number)
            .ok_or_else(|| malformed("a serial number of more than 20 octets"))?;
        let key_too = match revoked.reason_code {
            // Belongs into delta CRLs only; here it would mean "not revoked" to some and
            // "revoked" to others.
            Some(Reason::RemoveFromCrl) => return Err(malformed("removeFromCRL in a full CRL")),
            // A change of paper or a pause: the key is as good as before.
            Some(
                Reason::AffiliationChanged
                | Reason::Superseded
                | Reason::CessationOfOperation
                | Reason::CertificateHold,
            ) => false,
            _ => true,
        };
        entries.push(Entry { serial, key_too });
    }
    Ok(entries)
}

/// The sorted union of two lists; a serial in both keeps the graver entry.
fn union(one: &[Entry], other: &[Entry]) -> Vec<Entry> {
    let mut all: Vec<Entry> = one.iter().chain(other).copied().collect();
    // Graver first among equals, so that `dedup_by_key` keeps it.
    all.sort_unstable_by(|a, b| a.serial.cmp(&b.serial).then(b.key_too.cmp(&a.key_too)));
    all.dedup_by_key(|entry| entry.serial);
    all
}

fn find(entries: &[Entry], serial: &Serial) -> Option<Entry> {
    let at = entries
        .binary_search_by(|entry| entry.serial.cmp(serial))
        .ok()?;
    entries.get(at).copied()
}

/// How a node judges freshness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevocationOptions {
    /// How long past nextUpdate a CRL is still used. For sites that are dark for long; its use is
    /// shown in [`Freshness::Grace`], never silent.
    pub grace_ms: u64,
    /// Loosening, off by default: an issuer without any CRL has revoked nothing. It covers absence
    /// only, never an expired CRL.
    pub allow_missing: bool,
}

/// How fresh the knowledge about one issuer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Freshness {
    /// Between thisUpdate and nextUpdate.
    Fresh,
    /// Past nextUpdate, within the configured grace.
    Grace,
    /// No CRL, and `allow_missing` is set.
    MissingAllowed,
    /// Not to be believed: past nextUpdate and grace.
    Expired,
    /// Not to be believed: the only CRL comes from the future.
    NotYetValid,
}

/// What is known of one issuer, for status and doctor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerStatus {
    /// The issuer's key.
    pub issuer: SpkiHash,
    /// The issuer's name.
    pub name: String,
    /// The number of the CRL in force, if one is.
    pub number: Option<u64>,
    /// When the CRL in force began.
    pub this_update_unix_ms: Option<u64>,
    /// When the CRL in force expires.
    pub next_update_unix_ms: Option<u64>,
    /// How many certificates are revoked, unions included.
    pub revoked: usize,
    /// How fresh it is.
    pub freshness: Freshness,
    /// Number and thisUpdate of a CRL from the future: either the clock or the CA's is wrong.
    pub ahead: Option<(u64, u64)>,
    /// Two different CRLs of one number were seen: ask the CA.
    pub conflict: bool,
}

/// What a taken CRL was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The newest of its issuer; in force.
    Newest,
    /// Held already; nothing changed.
    AlreadyHeld,
    /// Another CRL of this number is held: the union of both is in force. Report it.
    Conflict,
    /// From the future: its revocations are in force, its freshness is not. The clock is suspect.
    Ahead,
}

/// The result of taking a CRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// What it was.
    pub outcome: Outcome,
    /// Whose it was.
    pub issuer: SpkiHash,
    /// Its number.
    pub number: u64,
    /// How many serials are revoked now that were not before.
    pub newly_revoked: usize,
}

/// Serials that stay revoked although their CRL was displaced, until a CRL with a higher number
/// than theirs is in force.
#[derive(Debug, Clone, Default)]
struct Carried {
    number: u64,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Issuer {
    /// The highest number whose time was plausible when it came.
    current: Option<Arc<VerifiedCrl>>,
    /// The highest number whose time was not.
    ahead: Option<Arc<VerifiedCrl>>,
    carried: Arc<Carried>,
    conflict: bool,
}

impl Issuer {
    /// The CRL in force at this time: the future becomes present without anybody telling.
    fn in_force(&self, now_unix_ms: u64) -> Option<&Arc<VerifiedCrl>> {
        self.ahead
            .as_ref()
            .filter(|crl| plausible(crl, now_unix_ms))
            .or(self.current.as_ref())
    }

    fn find(&self, serial: &Serial, now_unix_ms: u64) -> Option<Entry> {
        let in_force = self.in_force(now_unix_ms);
        let floor = in_force.map_or(0, |crl| crl.number);
        let ahead = self.ahead.as_ref().filter(|crl| crl.number >= floor);
        let carried = (self.carried.number >= floor).then_some(self.carried.entries.as_slice());
        [
            in_force.map(|crl| crl.entries.as_slice()),
            ahead.map(|crl| crl.entries.as_slice()),
            carried,
        ]
        .into_iter()
        .flatten()
        .filter_map(|entries| find(entries, serial))
        // Graver wins, so that the answer does not depend on the order of arrival.
        .max_by_key(|entry| entry.key_too)
    }

    fn revoked(&self, now_unix_ms: u64) -> Vec<Entry> {
        let in_force = self.in_force(now_unix_ms);
        let floor = in_force.map_or(0, |crl| crl.number);
        let mut all = in_force.map(|crl| crl.entries.clone()).unwrap_or_default();
        if let Some(ahead) = self.ahead.as_ref().filter(|crl| crl.number > floor) {
            all = union(&all, &ahead.entries);
        }
        if self.carried.number >= floor {
            all = union(&all, &self.carried.entries);
        }
        all
    }

    fn carry(&mut self, crl: &VerifiedCrl) -> Result<(), CrlError> {
        let entries = union(&self.carried.entries, &crl.entries);
        if entries.len() > MAX_CRL_ENTRIES {
            return Err(CrlError::TooManyConflicts {
                issuer: crl.issuer,
                max: MAX_CRL_ENTRIES,
            });
        }
        // The union under the higher number: an entry may stay revoked longer than its own CRL
        // asks for, never shorter.
        self.carried = Arc::new(Carried {
            number: self.carried.number.max(crl.number),
            entries,
        });
        Ok(())
    }
}

fn plausible(crl: &VerifiedCrl, now_unix_ms: u64) -> bool {
    crl.this_update_unix_ms <= now_unix_ms.saturating_add(CLOCK_SKEW_MS)
}

/// Everything that is known about revocation, at one moment. Immutable.
#[derive(Debug, Clone, Default)]
pub struct RevocationState {
    options: RevocationOptions,
    issuers: BTreeMap<SpkiHash, Issuer>,
    revoked_keys: Arc<BTreeSet<SpkiHash>>,
}

impl RevocationState {
    /// A state that knows nothing yet, and so refuses every path unless `allow_missing` is set.
    #[must_use]
    pub fn new(options: RevocationOptions) -> Self {
        Self {
            options,
            ..Self::default()
        }
    }

    /// The options it judges by.
    #[must_use]
    pub fn options(&self) -> &RevocationOptions {
        &self.options
    }

    /// This state and one CRL more.
    ///
    /// # Errors
    /// [`CrlError::Older`], [`CrlError::OtherPart`] or [`CrlError::TooManyConflicts`]; the state
    /// is unchanged.
    pub fn with_crl(
        &self,
        crl: Arc<VerifiedCrl>,
        now_unix_ms: u64,
    ) -> Result<(Self, Imported), CrlError> {
        let empty = Issuer {
            current: None,
            ahead: None,
            carried: Arc::new(Carried::default()),
            conflict: false,
        };
        if !self.issuers.contains_key(&crl.issuer) && self.issuers.len() >= MAX_ISSUERS {
            return Err(CrlError::TooLarge {
                what: "issuers",
                found: self.issuers.len() + 1,
                max: MAX_ISSUERS,
            });
        }
        let before = self.issuers.get(&crl.issuer).cloned().unwrap_or(empty);
        let mut after = before.clone();
        // The future that has become present takes its place first.
        if after
            .ahead
            .as_ref()
            .is_some_and(|ahead| plausible(ahead, now_unix_ms))
        {
            after.current = after.ahead.take();
        }
        let outcome = place_crl(&mut after, &crl, now_unix_ms)?;
        let newly_revoked = if outcome == Outcome::AlreadyHeld {
            0
        } else {
            let was = before.revoked(now_unix_ms);
            let new = after.revoked(now_unix_ms);
            new.iter()
                .filter(|entry| find(&was, &entry.serial).is_none())
                .count()
        };
        let imported = Imported {
            outcome,
            issuer: crl.issuer,
            number: crl.number,
            newly_revoked,
        };
        let mut state = self.clone();
        state.issuers.insert(crl.issuer, after);
        Ok((state, imported))
    }

    /// This state with more revoked keys (from configuration, from disk, or learned). Past
    /// [`MAX_REVOKED_KEYS`] the rest is left out; their serials stay revoked.
    #[must_use]
    pub fn with_revoked_keys(&self, keys: impl IntoIterator<Item = SpkiHash>) -> Self {
        let mut set = BTreeSet::clone(&self.revoked_keys);
        for key in keys {
            if set.len() >= MAX_REVOKED_KEYS {
                tracing::warn!(
                    limit = MAX_REVOKED_KEYS,
                    "the set of revoked keys is full; further keys are refused by serial only"
                );
                break;
            }
            set.insert(key);
        }
        Self {
            revoked_keys: Arc::new(set),
            ..self.clone()
        }
    }

    /// The keys that are refused in any certificate. The node keeps them across restarts.
    #[must_use]
    pub fn revoked_keys(&self) -> &BTreeSet<SpkiHash> {
        &self.revoked_keys
    }

    /// Judges every certificate of a verified path, and says how fresh the least fresh of the CRLs
    /// is.
    ///
    /// # Errors
    /// [`RevocationError`]: revoked, or not known to be unrevoked. Revoked is looked for first in
    /// the whole path, so an expired CRL still says `CERT_REVOKED` of what it lists.
    pub fn check(&self, path: &[ChainKey], now_unix_ms: u64) -> Result<Freshness, RevocationError> {
        for (position, key) in path.iter().enumerate() {
            if self.entry(key, now_unix_ms).is_some() {
                return Err(RevocationError::Revoked {
                    position,
                    serial: key.serial,
                });
            }
            if self.revoked_keys.contains(&key.spki) {
                return Err(RevocationError::KeyRevoked {
                    position,
                    key: key.spki,
                });
            }
        }
        let mut least = Freshness::Fresh;
        for key in path {
            let freshness = self.freshness(&key.issuer, now_unix_ms)?;
            least = least.max(freshness);
        }
        Ok(least)
    }

    /// The keys among these that were revoked together with their certificate.
    #[must_use]
    pub fn keys_to_learn(&self, path: &[ChainKey], now_unix_ms: u64) -> Vec<SpkiHash> {
        path.iter()
            .filter(|key| {
                self.entry(key, now_unix_ms)
                    .is_some_and(|entry| entry.key_too)
            })
            .map(|key| key.spki)
            .filter(|spki| !self.revoked_keys.contains(spki))
            .collect()
    }

    fn entry(&self, key: &ChainKey, now_unix_ms: u64) -> Option<Entry> {
        self.issuers
            .get(&key.issuer)?
            .find(&key.serial, now_unix_ms)
    }

    fn freshness(&self, issuer: &SpkiHash, now: u64) -> Result<Freshness, RevocationError> {
        let Some(held) = self.issuers.get(issuer) else {
            return if self.options.allow_missing {
                Ok(Freshness::MissingAllowed)
            } else {
                Err(RevocationError::Missing { issuer: *issuer })
            };
        };
        match held.in_force(now) {
            Some(crl) => match self.freshness_of(crl, now) {
                Freshness::Expired => Err(RevocationError::Expired {
                    issuer: *issuer,
                    next_update_unix_ms: crl.next_update_unix_ms,
                }),
                freshness => Ok(freshness),
            },
            None => Err(RevocationError::NotYetValid {
                issuer: *issuer,
                this_update_unix_ms: held.ahead.as_ref().map_or(0, |crl| crl.this_update_unix_ms),
            }),
        }
    }

    fn freshness_of(&self, crl: &VerifiedCrl, now: u64) -> Freshness {
        let end = crl.next_update_unix_ms;
        if now < end {
            Freshness::Fresh
        } else if now < end.saturating_add(self.options.grace_ms) {
            Freshness::Grace
        } else {
            Freshness::Expired
        }
    }

    /// The CRLs in force and those from the future, for the store, the bundle of a new node and
    /// the reserve.
    #[must_use]
    pub fn crls(&self) -> Vec<Arc<VerifiedCrl>> {
        self.issuers
            .values()
            .flat_map(|issuer| issuer.current.iter().chain(issuer.ahead.iter()).cloned())
            .collect()
    }

    /// What is known of each issuer.
    #[must_use]
    pub fn issuers(&self, now_unix_ms: u64) -> Vec<IssuerStatus> {
        self.issuers
            .iter()
            .map(|(id, issuer)| {
                let in_force = issuer.in_force(now_unix_ms);
                let ahead = issuer
                    .ahead
                    .as_ref()
                    .filter(|crl| !plausible(crl, now_unix_ms));
                IssuerStatus {
                    issuer: *id,
                    name: in_force
                        .or(issuer.ahead.as_ref())
                        .map(|crl| crl.issuer_name.clone())
                        .unwrap_or_default(),
                    number: in_force.map(|crl| crl.number),
                    this_update_unix_ms: in_force.map(|crl| crl.this_update_unix_ms),
                    next_update_unix_ms: in_force.map(|crl| crl.next_update_unix_ms),
                    revoked: issuer.revoked(now_unix_ms).len(),
                    freshness: in_force.map_or(Freshness::NotYetValid, |crl| {
                        self.freshness_of(crl, now_unix_ms)
                    }),
                    ahead: ahead.map(|crl| (crl.number, crl.this_update_unix_ms)),
                    conflict: issuer.conflict,
                }
            })
            .collect()
    }
}

/// Puts one CRL where it belongs among those of its issuer.
fn place_crl(
    issuer: &mut Issuer,
    crl: &Arc<VerifiedCrl>,
    now_unix_ms: u64,
) -> Result<Outcome, CrlError> {
    let held = [issuer.current.clone(), issuer.ahead.clone()];
    for other in held.iter().flatten() {
        if other.content == crl.content {
            return Ok(Outcome::AlreadyHeld);
        }
        if other.distribution_point != crl.distribution_point {
            return Err(CrlError::OtherPart);
        }
    }
    // INV-16: never backwards. Only what is in force counts; a number from the future may be a
    // mistake of the CA's clock, and must not shut out the CRLs that lie before it.
    if let Some(current) = &issuer.current
        && crl.number < current.number
    {
        return Err(CrlError::Older {
            number: crl.number,
            held: current.number,
        });
    }
    if held
        .iter()
        .flatten()
        .any(|other| other.number == crl.number)
    {
        issuer.carry(crl)?;
        issuer.conflict = true;
        return Ok(Outcome::Conflict);
    }
    if plausible(crl, now_unix_ms) {
        issuer.current = Some(Arc::clone(crl));
        // What the CA said later holds; earlier words from the future are void now.
        issuer.ahead = issuer
            .ahead
            .take()
            .filter(|ahead| ahead.number > crl.number);
        if issuer.carried.number < crl.number {
            issuer.carried = Arc::new(Carried::default());
            issuer.conflict = false;
        }
        return Ok(Outcome::Newest);
    }
    // Of several from the future the highest is kept; the others' revocations go on to hold.
    match issuer.ahead.take() {
        Some(ahead) if ahead.number > crl.number => {
            issuer.ahead = Some(ahead);
            issuer.carry(crl)?;
        }
        Some(ahead) => {
            issuer.carry(&ahead)?;
            issuer.ahead = Some(Arc::clone(crl));
        }
        None => issuer.ahead = Some(Arc::clone(crl)),
    }
    Ok(Outcome::Ahead)
}

/// The current [`RevocationState`], shared by every handshake of the process.
#[derive(Debug, Default)]
pub struct Revocation {
    state: ArcSwap<RevocationState>,
    /// Writers take turns; readers never wait.
    writing: Mutex<()>,
}

impl Revocation {
    /// Starts from a state.
    #[must_use]
    pub fn new(state: RevocationState) -> Self {
        Self {
            state: ArcSwap::from_pointee(state),
            writing: Mutex::new(()),
        }
    }

    /// The state of this moment.
    #[must_use]
    pub fn state(&self) -> Arc<RevocationState> {
        self.state.load_full()
    }

    /// Takes a verified CRL. From the return on, every handshake and every recheck judges by it
    /// (ruling 10: whether it can be stored is another matter).
    ///
    /// # Errors
    /// As [`RevocationState::with_crl`].
    pub fn import(&self, crl: VerifiedCrl, now_unix_ms: u64) -> Result<Imported, CrlError> {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, imported) = self.state.load().with_crl(Arc::new(crl), now_unix_ms)?;
        self.state.store(Arc::new(state));
        Ok(imported)
    }

    /// Adds revoked keys from configuration or disk.
    pub fn add_revoked_keys(&self, keys: impl IntoIterator<Item = SpkiHash>) {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.state.load().with_revoked_keys(keys);
        self.state.store(Arc::new(state));
    }

    /// Changes grace or `allow_missing` (configuration reload).
    pub fn set_options(&self, options: RevocationOptions) {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = RevocationState {
            options,
            ..RevocationState::clone(&self.state.load())
        };
        self.state.store(Arc::new(state));
    }

    /// Judges a path like [`RevocationState::check`]; the key of a certificate found revoked is
    /// remembered, so that it cannot come back in another certificate.
    ///
    /// Only paths that were verified up to a trusted authority may be handed in: a stranger's
    /// certificate could otherwise teach us to refuse somebody else's key.
    ///
    /// # Errors
    /// As [`RevocationState::check`].
    pub fn check(&self, path: &[ChainKey], now_unix_ms: u64) -> Result<Freshness, RevocationError> {
        let state = self.state.load();
        let verdict = state.check(path, now_unix_ms);
        if matches!(verdict, Err(RevocationError::Revoked { .. })) {
            let learned = state.keys_to_learn(path, now_unix_ms);
            if !learned.is_empty() {
                self.add_revoked_keys(learned);
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_ignore_leading_zeros_and_have_a_limit() {
        let serial = |bytes: &[u8]| Serial::new(bytes).unwrap();
        assert_eq!(serial(&[0, 0x80, 1]), serial(&[0x80, 1]));
        assert_ne!(serial(&[1, 0]), serial(&[1]));
        assert_eq!(serial(&[0, 0x8f, 1]).to_string(), "8f01");
        assert_eq!(serial(&[0]).to_string(), "00");
        assert!(Serial::new(&[1; 20]).is_some());
        assert!(Serial::new(&[[0; 1].as_slice(), &[0xff; 20]].concat()).is_some());
        assert_eq!(Serial::new(&[1; 21]), None);
    }

    #[test]
    fn a_union_is_sorted_and_keeps_the_graver_entry() {
        let entry = |n: u8, key_too| Entry {
            serial: Serial::new(&[n]).unwrap(),
            key_too,
        };
        let all = union(
            &[entry(3, false), entry(1, true)],
            &[entry(3, true), entry(2, false)],
        );
        assert_eq!(all, [entry(1, true), entry(2, false), entry(3, true)]);
        assert_eq!(find(&all, &entry(2, false).serial), Some(entry(2, false)));
        assert_eq!(find(&all, &Serial::new(&[4]).unwrap()), None);
    }

    #[test]
    fn revoked_keys_are_bounded() {
        let key = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            SpkiHash::from_bytes(bytes)
        };
        let state = RevocationState::default().with_revoked_keys((0..MAX_REVOKED_KEYS).map(key));
        assert_eq!(state.revoked_keys().len(), MAX_REVOKED_KEYS);
        let state = state.with_revoked_keys([key(MAX_REVOKED_KEYS)]);
        assert_eq!(state.revoked_keys().len(), MAX_REVOKED_KEYS);
    }

    #[test]
    fn names_in_messages_are_printable_and_short() {
        assert_eq!(printable("CN=Site CA"), "CN=Site CA");
        assert_eq!(printable("a\u{1b}[31m\nb"), "a\u{fffd}[31m\u{fffd}b");
        assert_eq!(printable(&"x".repeat(10_000)).len(), 200);
    }
}
