//! Who may speak: the chain, its revocation and its domain, judged in this order, on both sides.
//!
//! [`verify_chain`] is the only judgement: webpki builds and checks the path, then every
//! certificate of the path is looked up in the [`RevocationState`], then the names are read. The
//! TLS verifier ([`TidelockVerifier`]), the check after the handshake, the recheck of live sessions
//! and the check of endorsements all call it. What passes is a [`VerifiedChain`]; what passes and
//! bears a name of our domain is a [`VerifiedPeer`]. Neither can be made elsewhere.
//!
//! A TLS handshake alone is no authentication: in TLS 1.3 the client is done before the server has
//! judged it, so a peer counts only after Hello and HelloAck ([`crate::session`]).

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use tidelock_segments::NodeId;
use webpki::aws_lc_rs as algorithms;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::time::ASN1Time;

use crate::identity::{self, IdentityError, IdentityRules, PeerIdentity};
use crate::revocation::{
    ChainKey, Freshness, Revocation, RevocationError, Serial, SpkiHash, printable,
};
use crate::tls::TlsShared;

/// Most certificates that a peer may send; the same as an endorsement may carry.
pub const MAX_CHAIN_CERTIFICATES: usize = tidelock_segments::limits::MAX_CHAIN_CERTIFICATES;

/// Most trusted authorities (roots and intermediates). Each costs a few KiB.
pub const MAX_AUTHORITIES: usize = 16;

/// The signature algorithms that count, in certificates, CRLs, handshakes and endorsements: ECDSA
/// P-256 and P-384, Ed25519, RSA of 2048 bits and more. No SHA-1.
pub static ALGORITHMS: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        algorithms::ECDSA_P256_SHA256,
        algorithms::ECDSA_P256_SHA384,
        algorithms::ECDSA_P256_SHA512,
        algorithms::ECDSA_P384_SHA256,
        algorithms::ECDSA_P384_SHA384,
        algorithms::ECDSA_P384_SHA512,
        algorithms::ED25519,
        algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
        algorithms::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
        algorithms::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
        algorithms::RSA_PKCS1_2048_8192_SHA256,
        algorithms::RSA_PKCS1_2048_8192_SHA384,
        algorithms::RSA_PKCS1_2048_8192_SHA512,
        algorithms::RSA_PKCS1_2048_8192_SHA256_ABSENT_PARAMS,
        algorithms::RSA_PKCS1_2048_8192_SHA384_ABSENT_PARAMS,
        algorithms::RSA_PKCS1_2048_8192_SHA512_ABSENT_PARAMS,
    ],
    // TLS 1.3 binds the curve to the scheme, so one algorithm each.
    mapping: &[
        (SignatureScheme::ED25519, &[algorithms::ED25519]),
        (
            SignatureScheme::ECDSA_NISTP256_SHA256,
            &[algorithms::ECDSA_P256_SHA256],
        ),
        (
            SignatureScheme::ECDSA_NISTP384_SHA384,
            &[algorithms::ECDSA_P384_SHA384],
        ),
        (
            SignatureScheme::RSA_PSS_SHA256,
            &[algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY],
        ),
        (
            SignatureScheme::RSA_PSS_SHA384,
            &[algorithms::RSA_PSS_2048_8192_SHA384_LEGACY_KEY],
        ),
        (
            SignatureScheme::RSA_PSS_SHA512,
            &[algorithms::RSA_PSS_2048_8192_SHA512_LEGACY_KEY],
        ),
    ],
};

/// Why a chain is refused. Every variant has a stable [`Refusal::code`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No certificate at all.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// More certificates than [`MAX_CHAIN_CERTIFICATES`].
    #[error("the chain has {length} certificates, at most {max} are read")]
    ChainTooLong {
        /// How many there were.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// A certificate that cannot be read.
    #[error("a certificate of the chain cannot be read: {detail}")]
    Malformed {
        /// What was wrong.
        detail: String,
    },
    /// No path to a trusted authority.
    #[error(
        "no trusted authority issued the certificate; add the CA to the CA file, or send the \
         missing intermediate in the chain"
    )]
    UnknownAuthority,
    /// Past notAfter, of any certificate of the path.
    #[error("a certificate of the chain expired at {not_after_unix_ms} ms; renew it")]
    Expired {
        /// When it expired.
        not_after_unix_ms: u64,
    },
    /// Before notBefore, of any certificate of the path.
    #[error("a certificate of the chain begins at {not_before_unix_ms} ms only; check the clock")]
    NotYetValid {
        /// When it begins.
        not_before_unix_ms: u64,
    },
    /// Its extended key usage does not allow what it is used for.
    #[error(
        "the certificate is not made for this use; a node needs both extended key usages, \
         serverAuth and clientAuth, or none"
    )]
    Usage,
    /// A signature in the chain, or over the endorsement, does not verify.
    #[error("a signature does not verify")]
    Signature,
    /// A key or algorithm outside the supported ones.
    #[error(
        "unsupported key or algorithm; use ECDSA P-256 or P-384, Ed25519 or RSA from 2048 bits"
    )]
    Algorithm,
    /// Anything else that webpki refuses: name constraints, path length, critical extensions.
    #[error("the chain is refused: {detail}")]
    Chain {
        /// webpki's words.
        detail: String,
    },
    /// Revoked, or not known to be unrevoked.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    /// No name, or a name of another domain.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A good peer, but not the one that was called.
    #[error("called {expected}, but {presented} answered")]
    OtherNode {
        /// Who was called.
        expected: NodeId,
        /// Who answered.
        presented: NodeId,
    },
}

impl Refusal {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "CERT_ABSENT",
            Self::ChainTooLong { .. } => "CERT_CHAIN_TOO_LONG",
            Self::Malformed { .. } => "CERT_MALFORMED",
            Self::UnknownAuthority => "CERT_UNKNOWN_CA",
            Self::Expired { .. } => "CERT_EXPIRED",
            Self::NotYetValid { .. } => "CERT_NOT_YET_VALID",
            Self::Usage => "CERT_USAGE",
            Self::Signature => "CERT_SIGNATURE",
            Self::Algorithm => "CERT_ALGORITHM",
            Self::Chain { .. } => "CERT_CHAIN",
            Self::Revocation(error) => error.code(),
            Self::Identity(error) => error.code(),
            Self::OtherNode { .. } => "NODE_UNEXPECTED",
        }
    }

    /// Our refusal in rustls's words, chosen so that the other side gets the fitting TLS alert.
    fn to_rustls(&self) -> rustls::Error {
        let certificate = match self {
            Self::NoCertificate => return rustls::Error::NoCertificatesPresented,
            Self::Malformed { .. } => CertificateError::BadEncoding,
            Self::UnknownAuthority => CertificateError::UnknownIssuer,
            Self::Expired { .. } => CertificateError::Expired,
            Self::NotYetValid { .. } => CertificateError::NotValidYet,
            Self::Usage => CertificateError::InvalidPurpose,
            Self::Signature => CertificateError::BadSignature,
            Self::Revocation(
                RevocationError::Revoked { .. } | RevocationError::KeyRevoked { .. },
            ) => CertificateError::Revoked,
            Self::Revocation(RevocationError::Expired { .. }) => {
                CertificateError::ExpiredRevocationList
            }
            Self::Revocation(_) => CertificateError::UnknownRevocationStatus,
            Self::ChainTooLong { .. }
            | Self::Algorithm
            | Self::Chain { .. }
            | Self::Identity(_)
            | Self::OtherNode { .. } => {
                CertificateError::Other(rustls::OtherError(Arc::new(self.clone())))
            }
        };
        rustls::Error::InvalidCertificate(certificate)
    }

    fn from_webpki(error: webpki::Error) -> Self {
        use webpki::Error as E;
        let ms = |time: UnixTime| time.as_secs().saturating_mul(1000);
        match error {
            E::BadDer | E::BadDerTime | E::TrailingData(_) => Self::Malformed {
                detail: format!("{error:?}"),
            },
            E::UnknownIssuer => Self::UnknownAuthority,
            E::CertExpired { not_after, .. } => Self::Expired {
                not_after_unix_ms: ms(not_after),
            },
            E::CertNotValidYet { not_before, .. } => Self::NotYetValid {
                not_before_unix_ms: ms(not_before),
            },
            E::RequiredEkuNotFoundContext(_) => Self::Usage,
            E::InvalidSignatureForPublicKey => Self::Signature,
            E::UnsupportedSignatureAlgorithmContext(_)
            | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => Self::Algorithm,
            other => Self::Chain {
                detail: format!("{other:?}"),
            },
        }
    }
}

/// Why a CA file was not taken. The fault is the local configuration's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Not PEM, or a PEM block that is cut off.
    #[error("the CA file is not PEM: {detail}")]
    Pem {
        /// What was wrong.
        detail: String,
    },
    /// No self-signed certificate in it.
    #[error("the CA file holds no root (a self-signed CA certificate); add the root of your CA")]
    NoRoot,
    /// More certificates than [`MAX_AUTHORITIES`].
    #[error("the CA file holds {found} certificates, at most {max} are taken")]
    TooMany {
        /// How many there were.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// A certificate that cannot be read.
    #[error("certificate {index} of the CA file cannot be read: {detail}")]
    Malformed {
        /// Its place in the file, from 1.
        index: usize,
        /// What was wrong.
        detail: String,
    },
    /// A certificate that is not a CA's.
    #[error(
        "certificate {index} of the CA file ({subject}) is not a CA certificate (basicConstraints \
         CA:TRUE); put the node's own certificate into the certificate file"
    )]
    NotACa {
        /// Its place in the file, from 1.
        index: usize,
        /// Its subject.
        subject: String,
    },
}

/// A CA, root or intermediate, whose CRLs are taken.
#[derive(Debug, Clone)]
pub struct Authority {
    id: SpkiHash,
    name: String,
    subject_der: Vec<u8>,
    spki_der: Vec<u8>,
    crl_sign: bool,
    root: bool,
    not_after_unix_ms: u64,
}

impl Authority {
    fn read(index: usize, der: &CertificateDer<'_>) -> Result<Self, TrustError> {
        let parsed = identity::parse(der).map_err(|e| TrustError::Malformed {
            index,
            detail: e.to_string(),
        })?;
        let subject = printable(&parsed.subject().to_string());
        if !parsed.is_ca() {
            return Err(TrustError::NotACa { index, subject });
        }
        let crl_sign = match parsed.key_usage() {
            Ok(usage) => usage.is_none_or(|usage| usage.value.crl_sign()),
            Err(e) => {
                return Err(TrustError::Malformed {
                    index,
                    detail: e.to_string(),
                });
            }
        };
        Ok(Self {
            id: SpkiHash::of(parsed.public_key().raw),
            name: subject,
            subject_der: parsed.subject().as_raw().to_vec(),
            spki_der: parsed.public_key().raw.to_vec(),
            crl_sign,
            root: is_root(&parsed),
            not_after_unix_ms: unix_ms(parsed.validity().not_after),
        })
    }

    /// Its key: the issuer half of a revocation.
    #[must_use]
    pub fn id(&self) -> SpkiHash {
        self.id
    }

    /// Its subject, readable.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is a root.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.root
    }

    /// When its certificate ends.
    #[must_use]
    pub fn not_after_unix_ms(&self) -> u64 {
        self.not_after_unix_ms
    }

    pub(crate) fn subject_der(&self) -> &[u8] {
        &self.subject_der
    }

    pub(crate) fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    pub(crate) fn may_sign_crls(&self) -> bool {
        self.crl_sign
    }
}

/// A root names itself as its issuer, by name and, where the certificate says, by key. (A rolled-over
/// key is certified under the same name by the old key: that is an intermediate.) The signature of
/// a root over itself proves nothing and is not asked for.
fn is_root(parsed: &X509Certificate<'_>) -> bool {
    let mut own_key = None;
    let mut issuing_key = None;
    for extension in parsed.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => own_key = Some(id.0),
            ParsedExtension::AuthorityKeyIdentifier(authority) => {
                issuing_key = authority.key_identifier.as_ref().map(|id| id.0);
            }
            _ => {}
        }
    }
    parsed.subject().as_raw() == parsed.issuer().as_raw()
        && (issuing_key.is_none() || own_key.is_none() || issuing_key == own_key)
}

/// Whom a node trusts to issue certificates and CRLs: the roots, and the intermediates it was
/// given. An intermediate that is not in here can still stand in a peer's chain, but its CRL cannot
/// be checked, so nobody below it is let in.
#[derive(Debug, Clone)]
pub struct Trust {
    anchors: Vec<TrustAnchor<'static>>,
    intermediates: Vec<CertificateDer<'static>>,
    authorities: Vec<Authority>,
}

impl Trust {
    /// Reads a CA file: PEM certificates, at least one of them self-signed.
    ///
    /// # Errors
    /// [`TrustError`] naming the certificate and the way out.
    pub fn from_pem(pem: &[u8]) -> Result<Self, TrustError> {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| TrustError::Pem {
                detail: e.to_string(),
            })?;
        if certificates.len() > MAX_AUTHORITIES {
            return Err(TrustError::TooMany {
                found: certificates.len(),
                max: MAX_AUTHORITIES,
            });
        }
        let mut trust = Self {
            anchors: Vec::new(),
            intermediates: Vec::new(),
            authorities: Vec::new(),
        };
        for (at, certificate) in certificates.into_iter().enumerate() {
            trust.add(at + 1, certificate)?;
        }
        if trust.anchors.is_empty() {
            return Err(TrustError::NoRoot);
        }
        Ok(trust)
    }

    fn add(
        &mut self,
        index: usize,
        certificate: CertificateDer<'static>,
    ) -> Result<(), TrustError> {
        let authority = Authority::read(index, &certificate)?;
        if authority.root {
            let anchor = webpki::anchor_from_trusted_cert(&certificate)
                .map_err(|e| TrustError::Malformed {
                    index,
                    detail: format!("{e:?}"),
                })?
                .to_owned();
            self.anchors.push(anchor);
        } else {
            self.intermediates.push(certificate);
        }
        self.authorities.push(authority);
        Ok(())
    }

    /// This trust and the intermediates of the node's own chain: what the owner gave the node to
    /// present, it may also take CRLs from. Roots are never taken from there.
    pub(crate) fn with_own_chain(mut self, chain: &[CertificateDer<'static>]) -> Self {
        for certificate in chain.iter().skip(1) {
            if self.authorities.len() >= MAX_AUTHORITIES {
                break;
            }
            if let Ok(authority) = Authority::read(0, certificate)
                && !authority.root
                && !self.authorities.iter().any(|known| {
                    known.id == authority.id && known.subject_der == authority.subject_der
                })
            {
                self.intermediates.push(certificate.clone());
                self.authorities.push(authority);
            }
        }
        self
    }

    /// The roots, for a verifier that is not of peers.
    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }

    /// Every authority, for status, doctor and the reserve.
    #[must_use]
    pub fn authorities(&self) -> &[Authority] {
        &self.authorities
    }
}

/// What the bearer of a certificate did with it: decides the extended key usage asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It called us.
    Client,
    /// It answered us.
    Server,
}

/// A path that was verified up to a trusted root and in which nothing is revoked.
///
/// ```
/// use tidelock_transport::verifier::VerifiedChain;
/// fn end(chain: &VerifiedChain) -> u64 {
///     chain.not_after_unix_ms()
/// }
/// ```
///
/// ```compile_fail,E0451
/// use tidelock_transport::verifier::VerifiedChain;
/// let forged = VerifiedChain { keys: vec![], not_after_unix_ms: 0, freshness: todo!() };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedChain {
    keys: Vec<ChainKey>,
    not_after_unix_ms: u64,
    freshness: Freshness,
}

impl VerifiedChain {
    /// The certificates of the path, leaf first, the root left out: what a revocation names.
    #[must_use]
    pub fn keys(&self) -> &[ChainKey] {
        &self.keys
    }

    /// The earliest notAfter of the path.
    #[must_use]
    pub fn not_after_unix_ms(&self) -> u64 {
        self.not_after_unix_ms
    }

    /// How fresh the least fresh CRL of the path was.
    #[must_use]
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }
}

/// The certificates of a path and their end, without any judgement on revocation.
fn build_path(
    chain: &[CertificateDer<'_>],
    role: PeerRole,
    trust: &Trust,
    at_unix_ms: u64,
) -> Result<(Vec<ChainKey>, u64), Refusal> {
    let (leaf, sent) = chain.split_first().ok_or(Refusal::NoCertificate)?;
    if chain.len() > MAX_CHAIN_CERTIFICATES {
        return Err(Refusal::ChainTooLong {
            length: chain.len(),
            max: MAX_CHAIN_CERTIFICATES,
        });
    }
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(Refusal::from_webpki)?;
    let intermediates: Vec<CertificateDer<'_>> =
        sent.iter().chain(&trust.intermediates).cloned().collect();
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    let path = leaf
        .verify_for_usage(
            ALGORITHMS.all,
            &trust.anchors,
            &intermediates,
            UnixTime::since_unix_epoch(std::time::Duration::from_millis(at_unix_ms)),
            usage,
            None,
            None,
        )
        .map_err(Refusal::from_webpki)?;

    let certificates: Vec<&webpki::Cert<'_>> = std::iter::once(&**path.end_entity())
        .chain(path.intermediate_certificates())
        .collect();
    let root = anchor_spki(path.anchor());
    let issuers = certificates
        .iter()
        .skip(1)
        .map(|issuer| SpkiHash::of(&issuer.subject_public_key_info()))
        .chain(std::iter::once(root));
    let mut keys = Vec::with_capacity(certificates.len());
    let mut not_after_unix_ms = u64::MAX;
    for (certificate, issuer) in certificates.iter().zip(issuers) {
        let serial = Serial::new(certificate.serial()).ok_or_else(|| Refusal::Malformed {
            detail: "a serial number of more than 20 octets".to_owned(),
        })?;
        let spki = SpkiHash::of(&certificate.subject_public_key_info());
        keys.push(ChainKey {
            issuer,
            serial,
            spki,
        });
        let der = certificate.der();
        let parsed = identity::parse(&der)?;
        not_after_unix_ms = not_after_unix_ms.min(unix_ms(parsed.validity().not_after));
    }
    Ok((keys, not_after_unix_ms))
}

/// A trust anchor keeps the content of its subject public key info without the SEQUENCE around it.
fn anchor_spki(anchor: &TrustAnchor<'_>) -> SpkiHash {
    let content = anchor.subject_public_key_info.as_ref();
    let length = content.len().to_be_bytes();
    let first = length.iter().position(|b| *b != 0).unwrap_or(length.len());
    let digits = length.get(first..).unwrap_or_default();
    let mut der = vec![0x30];
    match digits {
        [] => der.push(0),
        [short] if *short < 0x80 => der.push(*short),
        _ => {
            // At most eight octets of length, so this cannot overflow the octet.
            der.push(0x80 | u8::try_from(digits.len()).unwrap_or(8));
            der.extend_from_slice(digits);
        }
    }
    der.extend_from_slice(content);
    SpkiHash::of(&der)
}

pub(crate) fn unix_ms(time: ASN1Time) -> u64 {
    u64::try_from(time.timestamp())
        .unwrap_or(0)
        .saturating_mul(1000)
}

/// Verifies a chain (leaf first) at a time, and looks every certificate of the path up.
///
/// # Errors
/// [`Refusal`]; no session, no segment, no endorsement.
pub fn verify_chain(
    chain: &[CertificateDer<'_>],
    role: PeerRole,
    trust: &Trust,
    revocation: &Revocation,
    now_unix_ms: u64,
) -> Result<VerifiedChain, Refusal> {
    verify_chain_at(chain, role, trust, revocation, now_unix_ms, now_unix_ms)
}

/// As [`verify_chain`], with the validity of the certificates judged at another time than their
/// revocation: for what was signed in the past.
pub(crate) fn verify_chain_at(
    chain: &[CertificateDer<'_>],
    role: PeerRole,
    trust: &Trust,
    revocation: &Revocation,
    valid_at_unix_ms: u64,
    now_unix_ms: u64,
) -> Result<VerifiedChain, Refusal> {
    let (keys, not_after_unix_ms) = build_path(chain, role, trust, valid_at_unix_ms)?;
    let freshness = revocation.check(&keys, now_unix_ms)?;
    Ok(VerifiedChain {
        keys,
        not_after_unix_ms,
        freshness,
    })
}

/// A peer of our domain, whose chain verifies and is not revoked: what a session is made for.
///
/// It holds at the moment of the check. For a live session ask again with
/// [`MeshTls::recheck`](crate::tls::MeshTls::recheck).
///
/// ```
/// use tidelock_transport::verifier::VerifiedPeer;
/// fn greet(peer: &VerifiedPeer) -> String {
///     peer.node_id().to_string()
/// }
/// ```
///
/// ```compile_fail,E0451
/// use tidelock_transport::verifier::VerifiedPeer;
/// let forged = VerifiedPeer { identity: todo!(), chain: todo!(), presented: vec![], role: todo!() };
/// ```
#[derive(Debug, Clone)]
pub struct VerifiedPeer {
    identity: PeerIdentity,
    chain: VerifiedChain,
    presented: Vec<CertificateDer<'static>>,
    role: PeerRole,
}

impl VerifiedPeer {
    pub(crate) fn verify(
        presented: &[CertificateDer<'_>],
        role: PeerRole,
        trust: &Trust,
        revocation: &Revocation,
        rules: &IdentityRules,
        now_unix_ms: u64,
    ) -> Result<Self, Refusal> {
        // INV-09: chain, then revocation, then domain; nothing of the peer moves before.
        let chain = verify_chain(presented, role, trust, revocation, now_unix_ms)?;
        let leaf = presented.first().ok_or(Refusal::NoCertificate)?;
        let identity = PeerIdentity::from_certificate(leaf, rules)?;
        let presented = presented
            .iter()
            .map(|der| der.clone().into_owned())
            .collect();
        Ok(Self {
            identity,
            chain,
            presented,
            role,
        })
    }

    /// Its name.
    #[must_use]
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// Its node id.
    #[must_use]
    pub fn node_id(&self) -> &NodeId {
        self.identity.node_id()
    }

    /// Its verified path.
    #[must_use]
    pub fn chain(&self) -> &VerifiedChain {
        &self.chain
    }

    /// The (issuer, serial, key) of each certificate of its path, leaf first.
    #[must_use]
    pub fn keys(&self) -> &[ChainKey] {
        self.chain.keys()
    }

    /// The certificates as it presented them, leaf first.
    #[must_use]
    pub fn presented(&self) -> &[CertificateDer<'static>] {
        &self.presented
    }

    /// Whether it called or answered.
    #[must_use]
    pub fn role(&self) -> PeerRole {
        self.role
    }
}

/// The verifier that rustls asks, for clients and servers alike. It holds no state of its own: each
/// question is judged by the credentials, CRLs and rules of the moment, so a reload needs no new
/// configuration.
pub struct TidelockVerifier {
    shared: Arc<TlsShared>,
    expected: Option<NodeId>,
}

impl TidelockVerifier {
    pub(crate) fn new(shared: Arc<TlsShared>, expected: Option<NodeId>) -> Self {
        Self { shared, expected }
    }

    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(end_entity)
            .chain(intermediates)
            .cloned()
            .collect();
        let now_unix_ms = now.as_secs().saturating_mul(1000);
        let verdict = self
            .shared
            .verify(&chain, role, now_unix_ms)
            .and_then(|peer| match &self.expected {
                Some(expected) if expected != peer.node_id() => Err(Refusal::OtherNode {
                    expected: expected.clone(),
                    presented: peer.node_id().clone(),
                }),
                _ => Ok(()),
            });
        verdict.map_err(|refusal| {
            self.shared.observe(&refusal, role);
            refusal.to_rustls()
        })
    }
}

impl fmt::Debug for TidelockVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TidelockVerifier")
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl ClientCertVerifier for TidelockVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A node has one certificate, so a hint chooses nothing; and it would name our CA to
        // strangers.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, PeerRole::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

impl ServerCertVerifier for TidelockVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // A peer is known by its node id, not by a host name.
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, PeerRole::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

fn tls12_refused() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled)
}
