//! The certificate key's word for the log key (ruling 7).
//!
//! A node's log key signs its audit segments and receipts. The endorsement says, with the key of a
//! certificate, that this log key speaks for this node in this incarnation; it travels with the
//! segment, so a node that never met the origin can check it. [`endorse`] makes one,
//! [`verify_endorsement`] judges one. The bytes that are signed are defined by
//! [`Endorsement::message`]; its context prefix keeps the signature from meaning anything else (a
//! TLS 1.3 handshake signature begins with 64 spaces).
//!
//! It does not judge forks: whether a new key or incarnation of a known node is believed is for
//! whoever holds that node's heads.

use rustls::SignatureScheme;
use rustls::pki_types::CertificateDer;
use tidelock_segments::{Endorsement, LogPublicKey, NodeId};

use crate::identity::{IdentityRules, PeerIdentity};
use crate::revocation::{CLOCK_SKEW_MS, Revocation};
use crate::tls::{Credentials, TlsError};
use crate::verifier::{ALGORITHMS, PeerRole, Refusal, Trust, VerifiedChain, verify_chain_at};

/// Why an endorsement is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndorsementError {
    /// Its chain, names or signature are refused. `CERT_REVOKED` and `KEY_REVOKED` are the cases in
    /// which a head cosigned before the CRL came may still save what it covers (ruling 4).
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The endorsement names one node, its certificate another.
    #[error("the endorsement is for node {endorsed}, its certificate belongs to {certified}")]
    OtherNode {
        /// The node in the endorsement.
        endorsed: NodeId,
        /// The node in the certificate.
        certified: NodeId,
    },
    /// What it should cover claims to be signed in the future.
    #[error("it is used for something signed at {signed_at_unix_ms} ms, after this node's time")]
    FromTheFuture {
        /// The claimed time.
        signed_at_unix_ms: u64,
    },
}

impl EndorsementError {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.code(),
            Self::OtherNode { .. } => "ENDORSEMENT_NODE",
            Self::FromTheFuture { .. } => "ENDORSEMENT_TIME",
        }
    }

    /// Whether the certificate behind it is known to be revoked, as opposed to not good for another
    /// reason.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        matches!(self.code(), "CERT_REVOKED" | "KEY_REVOKED")
    }
}

/// An endorsement that was believed.
///
/// ```
/// use tidelock_transport::endorse::VerifiedEndorsement;
/// fn shown(it: &VerifiedEndorsement) -> String {
///     format!("{:?}", it.identity())
/// }
/// ```
///
/// ```compile_fail,E0451
/// use tidelock_transport::endorse::VerifiedEndorsement;
/// let forged = VerifiedEndorsement { identity: todo!(), chain: todo!(), expired: false };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedEndorsement {
    identity: PeerIdentity,
    chain: VerifiedChain,
    expired: bool,
}

impl VerifiedEndorsement {
    /// The node that the log key speaks for.
    #[must_use]
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// The path of the endorsing certificate.
    #[must_use]
    pub fn chain(&self) -> &VerifiedChain {
        &self.chain
    }

    /// The certificate was valid when the thing was signed and has expired since. Its CA may have
    /// dropped it from the CRL, so "not revoked" says a little less.
    #[must_use]
    pub fn expired(&self) -> bool {
        self.expired
    }
}

/// Endorses a log key with the certificate key.
///
/// # Errors
/// [`TlsError`] if the key cannot sign.
pub fn endorse(
    credentials: &Credentials,
    node_id: &NodeId,
    log_key: &LogPublicKey,
    incarnation: u64,
) -> Result<Endorsement, TlsError> {
    let chain: Vec<Vec<u8>> = credentials.chain().iter().map(|der| der.to_vec()).collect();
    let message = Endorsement::message(node_id, log_key, incarnation, &chain);
    let (scheme, signature) = credentials.sign(&message)?;
    Ok(Endorsement {
        node_id: node_id.clone(),
        log_key: *log_key,
        incarnation,
        chain,
        scheme: u16::from(scheme),
        signature,
    })
}

/// Judges an endorsement under something that claims to be signed at `signed_at_unix_ms`.
///
/// The certificate must have been valid at that time (an old segment does not rot with the
/// certificate of its day), must not be revoked as far as is known now, and must name the node that
/// is endorsed. For a live peer's Hello pass the same time twice.
///
/// # Errors
/// [`EndorsementError`]: nothing that rests on it is accepted.
pub fn verify_endorsement(
    endorsement: &Endorsement,
    trust: &Trust,
    revocation: &Revocation,
    rules: &IdentityRules,
    signed_at_unix_ms: u64,
    now_unix_ms: u64,
) -> Result<VerifiedEndorsement, EndorsementError> {
    if signed_at_unix_ms > now_unix_ms.saturating_add(CLOCK_SKEW_MS) {
        return Err(EndorsementError::FromTheFuture { signed_at_unix_ms });
    }
    let presented: Vec<CertificateDer<'_>> = endorsement
        .chain
        .iter()
        .map(|der| CertificateDer::from(der.as_slice()))
        .collect();
    let chain = verify_chain_at(
        &presented,
        PeerRole::Client,
        trust,
        revocation,
        signed_at_unix_ms,
        now_unix_ms,
    )?;
    let leaf = presented.first().ok_or(Refusal::NoCertificate)?;
    verify_signature(endorsement, leaf)?;
    let identity = PeerIdentity::from_certificate(leaf, rules).map_err(Refusal::from)?;
    if identity.node_id() != &endorsement.node_id {
        return Err(EndorsementError::OtherNode {
            endorsed: endorsement.node_id.clone(),
            certified: identity.node_id().clone(),
        });
    }
    let expired = now_unix_ms > chain.not_after_unix_ms();
    Ok(VerifiedEndorsement {
        identity,
        chain,
        expired,
    })
}

fn verify_signature(endorsement: &Endorsement, leaf: &CertificateDer<'_>) -> Result<(), Refusal> {
    let scheme = SignatureScheme::from(endorsement.scheme);
    let algorithm = ALGORITHMS
        .mapping
        .iter()
        .find(|(known, _)| *known == scheme)
        .and_then(|(_, algorithms)| algorithms.first())
        .ok_or(Refusal::Algorithm)?;
    webpki::EndEntityCert::try_from(leaf)
        .and_then(|certificate| {
            certificate.verify_signature(
                *algorithm,
                &endorsement.signed_message(),
                &endorsement.signature,
            )
        })
        .map_err(|error| match error {
            webpki::Error::InvalidSignatureForPublicKey => Refusal::Signature,
            _ => Refusal::Algorithm,
        })
}
