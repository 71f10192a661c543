//! The door for callers on other machines: TLS 1.3, certificates on both sides.
//!
//! What a certificate means is said by [`CertifiedCallers`], which the node implements. It is asked in
//! the handshake, before any byte of HTTP is read, and again at every request of the connection: a
//! revocation, a reload or the end of a certificate counts from the next request on.
//!
//! What is fixed and cannot be configured: TLS 1.3 only, a client certificate always, no resumption,
//! no tickets, no 0-RTT. A resumed session would skip the certificate.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig,
    SignatureScheme,
};

use crate::auth::Grant;
use crate::credentials::CredentialFault;

/// The code of a handshake that failed for another reason than the client's certificate.
const HANDSHAKE: &str = "TLS_HANDSHAKE";

/// Why a client's certificate was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct RefusedCertificate {
    /// The stable code.
    pub code: &'static str,
    /// What is wrong, for the operator.
    pub message: String,
}

/// Says who a certificate is, by what holds now.
pub trait CertifiedCallers: fmt::Debug + Send + Sync + 'static {
    /// The certificate and key of the door itself.
    fn certificate(&self) -> Arc<CertifiedKey>;

    /// Judges a chain, leaf first. Must not block.
    ///
    /// # Errors
    /// [`RefusedCertificate`], which is counted and never recorded one by one.
    fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<Grant, RefusedCertificate>;
}

/// A TLS door to open.
#[derive(Clone, Debug)]
pub struct TlsDoor {
    /// Where to listen; other machines may reach it.
    pub address: SocketAddr,
    /// The cryptography.
    pub provider: Arc<CryptoProvider>,
    /// Who its callers are.
    pub callers: Arc<dyn CertifiedCallers>,
}

impl TlsDoor {
    /// The configuration for those who call.
    ///
    /// # Errors
    /// Only with a provider that cannot speak TLS 1.3.
    pub(crate) fn server_config(&self) -> Result<ServerConfig, rustls::Error> {
        let verifier = Verifier {
            callers: Arc::clone(&self.callers),
            provider: Arc::clone(&self.provider),
        };
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(OwnCertificate(Arc::clone(&self.callers))));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

/// Under which code a handshake that failed is counted, and as what.
pub(crate) fn refusal_of(error: &io::Error) -> (&'static str, CredentialFault) {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::NoCertificatesPresented) => {
            let fault = CredentialFault::CertificateAbsent;
            (fault.code(), fault)
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(refused)))) => {
            let refused = refused.downcast_ref::<RefusedCertificate>();
            let code = refused.map_or(HANDSHAKE, |refused| refused.code);
            (code, CredentialFault::CertificateRefused)
        }
        _ => (HANDSHAKE, CredentialFault::None),
    }
}

/// The door's certificate of the moment.
#[derive(Debug)]
struct OwnCertificate(Arc<dyn CertifiedCallers>);

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.certificate())
    }
}

#[derive(Debug)]
struct Verifier {
    callers: Arc<dyn CertifiedCallers>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // It would name our authorities to strangers.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // Callers are judged by the node's trusted time, which rustls does not know (INV-18).
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(end_entity)
            .chain(intermediates)
            .cloned()
            .collect();
        match self.callers.judge(&chain) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(refused) => Err(rustls::Error::InvalidCertificate(CertificateError::Other(
                OtherError(Arc::new(refused)),
            ))),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(
            rustls::PeerIncompatible::Tls12NotOfferedOrEnabled,
        ))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
