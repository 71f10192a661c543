//! Certificate, key and CA files, and the TLS configurations made from them.
//!
//! [`MeshTls`] is the door: it makes the rustls and quinn configurations, turns a finished handshake
//! into a [`VerifiedPeer`], rechecks live sessions, says what is wrong with the node's own papers,
//! and takes new credentials while running. The configurations hold nothing but a reference to what
//! is current, so none of them is ever rebuilt.
//!
//! What is fixed and cannot be configured: TLS 1.3 only, ALPN `tidelock/1`, certificates on both
//! sides, X25519MLKEM768 preferred, no resumption, no tickets, no 0-RTT. A resumed session would
//! skip the certificate, and with it the revocation check.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig, SignatureScheme};
use tidelock_segments::NodeId;
use zeroize::Zeroizing;

use crate::identity::{self, IdentityRules};
use crate::revocation::{Freshness, Revocation};
use crate::verifier::{
    ALGORITHMS, MAX_CHAIN_CERTIFICATES, PeerRole, Refusal, TidelockVerifier, Trust, TrustError,
    VerifiedPeer, unix_ms,
};

/// The application protocol of this version.
pub const ALPN: &[u8] = b"tidelock/1";

/// What a client passes where quinn wants a host name. It is neither sent nor checked: a peer is
/// known by its node id.
pub const SERVER_NAME: &str = "peer.tidelock.invalid";

/// Largest certificate, key or CA file that is read: held in memory three times while loading.
pub const MAX_PEM_BYTES: u64 = 256 * 1024;

/// Wall clock of the process, as unix milliseconds.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Told of each refusal in a handshake, from inside the handshake: it must not wait. For the record
/// and the counters; the peer learns no more than a TLS alert.
pub type RefusalObserver = Arc<dyn Fn(&Refusal, PeerRole) + Send + Sync>;

/// Why credentials were not taken. The fault is the local configuration's.
///
/// Only what cannot be read at all is an error here. Papers that can be read but are no good
/// (expired, revoked, of another CA or domain) keep the transport closed instead, see
/// [`MeshTls::own_status`]; the node starts and decides (ruling 12).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {}: {kind}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        kind: std::io::ErrorKind,
    },
    /// Not a regular file, or a file too large to be one of ours.
    #[error("{} is not a regular file of at most {MAX_PEM_BYTES} bytes", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Others could read the private key.
    #[error(
        "the key file {} has mode {mode:04o}; others may read it. chmod 600 it, and make a new key \
         if it was ever exposed",
        path.display()
    )]
    KeyMode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No certificate in the certificate file, or PEM that is cut off.
    #[error("the certificate file is not PEM with at least one certificate: {detail}")]
    Certificates {
        /// What was wrong.
        detail: String,
    },
    /// More certificates than [`MAX_CHAIN_CERTIFICATES`].
    #[error("the certificate file holds {found} certificates, at most {max} are sent")]
    ChainTooLong {
        /// How many there were.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The private key is encrypted.
    #[error(
        "the key file is encrypted, and a node starts unattended; store it decrypted with mode 600"
    )]
    KeyEncrypted,
    /// No private key in the key file, or one that is not supported.
    #[error(
        "the key file holds no usable private key: {detail}. Supported are ECDSA P-256 and P-384, \
         Ed25519 and RSA from 2048 bits, in PEM"
    )]
    Key {
        /// What was wrong.
        detail: String,
    },
    /// The key is not that of the certificate.
    #[error("the private key does not belong to the first certificate of the certificate file")]
    KeyMismatch,
    /// The CA file is not good.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl CredentialsError {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } | Self::NotAFile { .. } => "CREDENTIALS_UNREADABLE",
            Self::KeyMode { .. } => "KEY_MODE",
            Self::Certificates { .. } | Self::ChainTooLong { .. } => "CERTIFICATE_FILE",
            Self::KeyEncrypted | Self::Key { .. } => "KEY_FILE",
            Self::KeyMismatch => "KEY_MISMATCH",
            Self::Trust(_) => "CA_FILE",
        }
    }
}

/// A configuration that TLS refuses. It cannot happen with the provider that we build, and is an
/// error instead of a panic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot make a TLS configuration: {detail}")]
pub struct TlsError {
    detail: String,
}

impl TlsError {
    fn new(error: impl fmt::Display) -> Self {
        Self {
            detail: error.to_string(),
        }
    }
}

/// A node's certificate chain and key, and whom it trusts. Loaded, replaced and dropped as one, so
/// that no moment has the certificate of one set and the CA of another.
#[derive(Clone)]
pub struct Credentials {
    certified: Arc<CertifiedKey>,
    trust: Trust,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of the key.
        f.debug_struct("Credentials")
            .field("certificates", &self.certified.cert.len())
            .field("authorities", &self.trust.authorities().len())
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the three PEM files. The key file must not be readable for anybody but its owner.
    ///
    /// # Errors
    /// [`CredentialsError`] naming the file and the way out.
    pub fn load(
        certificates: &Path,
        key: &Path,
        authorities: &Path,
    ) -> Result<Self, CredentialsError> {
        Self::from_pem(
            &read_file(certificates, false)?,
            &read_file(key, true)?,
            &read_file(authorities, false)?,
        )
    }

    /// As [`Credentials::load`], from memory.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn from_pem(
        certificates: &[u8],
        key: &[u8],
        authorities: &[u8],
    ) -> Result<Self, CredentialsError> {
        let certified = certified_from_pem(certificates, key)?;
        let trust = Trust::from_pem(authorities)?.with_own_chain(&certified.cert);
        Ok(Self {
            certified: Arc::new(certified),
            trust,
        })
    }

    /// The certificate chain, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// When the node's own certificate ends; `None` if it cannot be read.
    #[must_use]
    pub fn not_after_unix_ms(&self) -> Option<u64> {
        let certificate = identity::parse(self.chain().first()?).ok()?;
        Some(unix_ms(certificate.validity().not_after))
    }

    /// Whom the node trusts.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The configuration for calling an HTTPS server that is no peer. It must show a certificate of these
    /// authorities for the name that is called; with CRLs (DER), every certificate of its path must be
    /// covered by one that is in time and does not list it.
    ///
    /// # Errors
    /// [`TlsError`] where a CRL cannot be read.
    pub fn https_client_config(
        &self,
        crls: Vec<Vec<u8>>,
        clock: WallClock,
    ) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(provider());
        let roots = Arc::new(RootCertStore {
            roots: self.trust.anchors().to_vec(),
        });
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let verifier = verifier
            .with_crls(crls.into_iter().map(CertificateRevocationListDer::from))
            .enforce_revocation_expiration()
            .build()
            .map_err(TlsError::new)?;
        let time = Arc::new(WallTime(clock));
        let mut config = ClientConfig::builder_with_details(provider, time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::new)?
            .with_webpki_verifier(verifier)
            .with_client_cert_resolver(Arc::new(OwnCertificate(Arc::clone(&self.certified))));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// Signs with the certificate key, in the scheme that the key prefers.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<(SignatureScheme, Vec<u8>), TlsError> {
        let signer = self
            .certified
            .key
            .choose_scheme(&ALGORITHMS.supported_schemes())
            .ok_or_else(|| TlsError::new("the certificate key signs in no supported scheme"))?;
        let signature = signer.sign(message).map_err(TlsError::new)?;
        Ok((signer.scheme(), signature))
    }
}

/// Reads a certificate chain, leaf first, and its key, in PEM, for a door that speaks TLS. The key file
/// must not be readable for anybody but its owner.
///
/// # Errors
/// [`CredentialsError`] naming the file and the way out.
pub fn load_certified(
    certificates: &Path,
    key: &Path,
) -> Result<Arc<CertifiedKey>, CredentialsError> {
    let certified = certified_from_pem(&read_file(certificates, false)?, &read_file(key, true)?)?;
    Ok(Arc::new(certified))
}

fn certified_from_pem(certificates: &[u8], key: &[u8]) -> Result<CertifiedKey, CredentialsError> {
    let chain = CertificateDer::pem_slice_iter(certificates)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| CredentialsError::Certificates {
            detail: e.to_string(),
        })?;
    if chain.is_empty() {
        return Err(CredentialsError::Certificates {
            detail: "there is none".to_owned(),
        });
    }
    if chain.len() > MAX_CHAIN_CERTIFICATES {
        return Err(CredentialsError::ChainTooLong {
            found: chain.len(),
            max: MAX_CHAIN_CERTIFICATES,
        });
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| {
        if key.windows(9).any(|window| window == b"ENCRYPTED") {
            CredentialsError::KeyEncrypted
        } else {
            CredentialsError::Key {
                detail: e.to_string(),
            }
        }
    })?;
    let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(|e| match e {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            CredentialsError::KeyMismatch
        }
        rustls::Error::InvalidCertificate(e) => CredentialsError::Certificates {
            detail: e.to_string(),
        },
        other => CredentialsError::Key {
            detail: other.to_string(),
        },
    })?;
    let schemes: Vec<SignatureScheme> = ALGORITHMS.supported_schemes();
    if certified.key.choose_scheme(&schemes).is_none() {
        return Err(CredentialsError::Key {
            detail: "unsupported kind of key".to_owned(),
        });
    }
    Ok(certified)
}

/// A certificate that is shown whoever asks for it.
#[derive(Debug)]
struct OwnCertificate(Arc<CertifiedKey>);

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A clock of the node, for rustls.
struct WallTime(WallClock);

impl fmt::Debug for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WallTime").finish_non_exhaustive()
    }
}

impl TimeProvider for WallTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(
            Duration::from_millis((self.0)()),
        ))
    }
}

fn read_file(path: &Path, secret: bool) -> Result<Zeroizing<Vec<u8>>, CredentialsError> {
    let unreadable = |e: std::io::Error| CredentialsError::Read {
        path: path.to_owned(),
        kind: e.kind(),
    };
    // Questions go to the open file, not to the path: between two looks a path can change.
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > MAX_PEM_BYTES {
        return Err(CredentialsError::NotAFile {
            path: path.to_owned(),
        });
    }
    let mode = metadata.mode() & 0o7777;
    if secret && mode & 0o177 != 0 {
        return Err(CredentialsError::KeyMode {
            path: path.to_owned(),
            mode,
        });
    }
    // Room for the whole file at once, so that no half of a key is left in a freed buffer.
    let capacity = usize::try_from(metadata.len())
        .unwrap_or_default()
        .saturating_add(1);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(MAX_PEM_BYTES)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    Ok(bytes)
}

/// aws-lc-rs, TLS 1.3 suites only, the post-quantum hybrid first, our signature algorithms.
#[must_use]
pub fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            // Also the suite of QUIC's initial packets: quinn needs it in the list.
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
        ],
        signature_verification_algorithms: ALGORITHMS,
        ..default_provider()
    }
}

/// The state of the node's own papers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnStatus {
    /// The earliest notAfter of the node's own path.
    pub not_after_unix_ms: u64,
    /// How fresh the least fresh CRL over the node's own path is.
    pub freshness: Freshness,
}

/// What a configuration, a verifier and a handshake share: everything current.
pub(crate) struct TlsShared {
    rules: IdentityRules,
    credentials: ArcSwap<Credentials>,
    revocation: Arc<Revocation>,
    clock: WallClock,
    observer: Option<RefusalObserver>,
}

impl TlsShared {
    pub(crate) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
        now_unix_ms: u64,
    ) -> Result<VerifiedPeer, Refusal> {
        let credentials = self.credentials.load();
        VerifiedPeer::verify(
            chain,
            role,
            &credentials.trust,
            &self.revocation,
            &self.rules,
            now_unix_ms,
        )
    }

    pub(crate) fn observe(&self, refusal: &Refusal, role: PeerRole) {
        tracing::debug!(code = refusal.code(), ?role, %refusal, "peer refused");
        if let Some(observer) = &self.observer {
            observer(refusal, role);
        }
    }
}

impl fmt::Debug for TlsShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsShared")
            .field("rules", &self.rules)
            .finish_non_exhaustive()
    }
}

/// The certificate of the moment, for both directions.
#[derive(Debug)]
struct CurrentCertificate(Arc<TlsShared>);

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.credentials.load().certified))
    }
}

impl ResolvesClientCert for CurrentCertificate {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.credentials.load().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// The node's clock, for rustls.
#[derive(Debug)]
struct NodeTime(Arc<TlsShared>);

impl TimeProvider for NodeTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis((self
            .0
            .clock)(
        ))))
    }
}

/// TLS for the mesh: see the module.
#[derive(Debug)]
pub struct MeshTls {
    shared: Arc<TlsShared>,
    node_id: NodeId,
}

impl MeshTls {
    /// Puts the parts together. Whether they are any good is said by [`MeshTls::own_status`].
    #[must_use]
    pub fn new(
        rules: IdentityRules,
        node_id: NodeId,
        credentials: Credentials,
        revocation: Arc<Revocation>,
        clock: WallClock,
        observer: Option<RefusalObserver>,
    ) -> Self {
        Self {
            shared: Arc::new(TlsShared {
                rules,
                credentials: ArcSwap::from_pointee(credentials),
                revocation,
                clock,
                observer,
            }),
            node_id,
        }
    }

    /// The credentials of the moment.
    #[must_use]
    pub fn credentials(&self) -> Arc<Credentials> {
        self.shared.credentials.load_full()
    }

    /// Takes new credentials; every handshake from now on uses them. Live sessions keep what they
    /// have until they are rechecked.
    pub fn replace_credentials(&self, credentials: Credentials) {
        self.shared.credentials.store(Arc::new(credentials));
    }

    /// The revocation knowledge that handshakes are judged by.
    #[must_use]
    pub fn revocation(&self) -> &Arc<Revocation> {
        &self.shared.revocation
    }

    /// What is demanded of a peer's names.
    #[must_use]
    pub fn rules(&self) -> &IdentityRules {
        &self.shared.rules
    }

    /// The node that these papers are meant for.
    #[must_use]
    pub fn node_id(&self) -> &NodeId {
        &self.node_id
    }

    /// Wall time, as handshakes see it.
    #[must_use]
    pub fn now_unix_ms(&self) -> u64 {
        (self.shared.clock)()
    }

    /// The configuration for those who call us.
    ///
    /// # Errors
    /// [`TlsError`], which cannot happen with our provider.
    pub fn server_config(&self) -> Result<ServerConfig, TlsError> {
        let time = Arc::new(NodeTime(Arc::clone(&self.shared)));
        let verifier = Arc::new(TidelockVerifier::new(Arc::clone(&self.shared), None));
        let mut config = ServerConfig::builder_with_details(Arc::new(provider()), time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::new)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(CurrentCertificate(Arc::clone(&self.shared))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// The configuration for calling a peer; `expected` is the node that must answer.
    ///
    /// # Errors
    /// [`TlsError`], which cannot happen with our provider.
    pub fn client_config(&self, expected: Option<&NodeId>) -> Result<ClientConfig, TlsError> {
        let time = Arc::new(NodeTime(Arc::clone(&self.shared)));
        let verifier = TidelockVerifier::new(Arc::clone(&self.shared), expected.cloned());
        let mut config = ClientConfig::builder_with_details(Arc::new(provider()), time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TlsError::new)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(CurrentCertificate(Arc::clone(&self.shared))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        Ok(config)
    }

    /// [`MeshTls::server_config`] for quinn.
    ///
    /// # Errors
    /// [`TlsError`], which cannot happen with our provider.
    pub fn quic_server_config(&self) -> Result<Arc<QuicServerConfig>, TlsError> {
        let config = QuicServerConfig::try_from(self.server_config()?).map_err(TlsError::new)?;
        Ok(Arc::new(config))
    }

    /// [`MeshTls::client_config`] for quinn.
    ///
    /// # Errors
    /// [`TlsError`], which cannot happen with our provider.
    pub fn quic_client_config(
        &self,
        expected: Option<&NodeId>,
    ) -> Result<Arc<QuicClientConfig>, TlsError> {
        let config =
            QuicClientConfig::try_from(self.client_config(expected)?).map_err(TlsError::new)?;
        Ok(Arc::new(config))
    }

    /// The peer of a finished handshake, from what quinn's `Connection::peer_identity` returns.
    ///
    /// It judges once more from the start: a CRL may have come in between. Register the connection
    /// first and ask then, and no revocation can fall between the two.
    ///
    /// # Errors
    /// [`Refusal`]: close the connection.
    pub fn verified_peer(
        &self,
        peer_identity: Option<Box<dyn Any>>,
        role: PeerRole,
    ) -> Result<VerifiedPeer, Refusal> {
        let chain = peer_identity
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
            .ok_or(Refusal::NoCertificate)?;
        self.verify_presented(&chain, role)
    }

    /// As [`MeshTls::verified_peer`], from the DER chain itself (leaf first).
    ///
    /// # Errors
    /// [`Refusal`]: close the connection.
    pub fn verify_presented(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
    ) -> Result<VerifiedPeer, Refusal> {
        self.shared.verify(chain, role, self.now_unix_ms())
    }

    /// Judges the peer of a live session again, by the credentials, CRLs and time of now: after a
    /// new CRL, after a reload, and from time to time for notAfter and nextUpdate.
    ///
    /// # Errors
    /// [`Refusal`]: close the connection with this reason.
    pub fn recheck(&self, peer: &VerifiedPeer) -> Result<(), Refusal> {
        let now = self.verify_presented(peer.presented(), peer.role())?;
        if now.node_id() == peer.node_id() {
            Ok(())
        } else {
            Err(Refusal::OtherNode {
                expected: peer.node_id().clone(),
                presented: now.node_id().clone(),
            })
        }
    }

    /// Judges the node's own papers as a peer would. A refusal keeps the transport closed with that
    /// reason; the node goes on deciding (ruling 12).
    ///
    /// # Errors
    /// [`Refusal`], with the same codes that a peer would give.
    pub fn own_status(&self) -> Result<OwnStatus, Refusal> {
        let credentials = self.credentials();
        let mut status = None;
        for role in [PeerRole::Client, PeerRole::Server] {
            let own = self.verify_presented(credentials.chain(), role)?;
            if own.node_id() != &self.node_id {
                return Err(Refusal::OtherNode {
                    expected: self.node_id.clone(),
                    presented: own.node_id().clone(),
                });
            }
            status = Some(OwnStatus {
                not_after_unix_ms: own.chain().not_after_unix_ms(),
                freshness: own.chain().freshness(),
            });
        }
        status.ok_or(Refusal::NoCertificate)
    }
}
