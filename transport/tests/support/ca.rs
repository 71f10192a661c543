//! A certificate authority in memory, and what it gives the nodes of a site. For one of files and
//! commands see `openssl.rs`.
#![allow(
    dead_code,
    reason = "each test file uses its own part of the authority"
)]

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, RevokedCertParams,
    SanType, SerialNumber, SignatureAlgorithm, date_time_ymd,
};
use tidelock_segments::{DomainId, NodeId};
use tidelock_transport::{
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl},
    tls::{Credentials, MeshTls},
};

/// 2030-06-01: "now" for certificates and CRLs.
pub(crate) const NOW_UNIX_MS: u64 = 1_906_502_400_000;

pub(crate) fn domain() -> DomainId {
    DomainId::new("site").unwrap()
}

pub(crate) fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// The site's CA.
pub(crate) struct Ca {
    algorithm: &'static SignatureAlgorithm,
    issuer: CertifiedIssuer<'static, KeyPair>,
    next_serial: AtomicU64,
}

impl Ca {
    pub(crate) fn new() -> Self {
        Self::with(&PKCS_ECDSA_P256_SHA256)
    }

    /// Whose keys, and those of all nodes, are of this kind.
    pub(crate) fn with(algorithm: &'static SignatureAlgorithm) -> Self {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "site CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer =
            CertifiedIssuer::self_signed(params, KeyPair::generate_for(algorithm).unwrap())
                .unwrap();
        Self {
            algorithm,
            issuer,
            next_serial: AtomicU64::new(100),
        }
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A node's papers under a new key.
    pub(crate) fn papers(&self, node: &str) -> Papers {
        self.papers_trusting(node, &self.pem())
    }

    /// Credentials of the node with another CA file.
    pub(crate) fn issue_trusting(&self, node: &str, authorities: &str) -> (Credentials, u64) {
        let papers = self.papers_trusting(node, authorities);
        (papers.credentials(), papers.serial)
    }

    pub(crate) fn papers_trusting(&self, node: &str, authorities: &str) -> Papers {
        let serial = self.next_serial.fetch_add(1, Ordering::Relaxed);
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, node);
        params.serial_number = Some(SerialNumber::from(serial));
        let uri = format!("spiffe://example.org/domains/site/peers/{node}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        let key = KeyPair::generate_for(self.algorithm).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Papers {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
            authorities: authorities.to_owned(),
            crl: self.crl(1, &[]),
            serial,
        }
    }

    pub(crate) fn crl(&self, number: u64, revoked: &[u64]) -> Vec<u8> {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2030, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2030, 1, 1),
            next_update: date_time_ymd(2031, 1, 1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

/// What a node needs of the site, as files would hold it.
pub(crate) struct Papers {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) authorities: String,
    pub(crate) crl: Vec<u8>,
    pub(crate) serial: u64,
}

impl Papers {
    pub(crate) fn credentials(&self) -> Credentials {
        let [certificate, key, authorities] =
            [&self.certificate, &self.key, &self.authorities].map(|pem| pem.as_bytes());
        Credentials::from_pem(certificate, key, authorities).unwrap()
    }

    /// TLS of the node with them and the CRL, at [`NOW_UNIX_MS`].
    pub(crate) fn tls(&self, node: &str) -> MeshTls {
        let credentials = self.credentials();
        let revocation = Arc::new(Revocation::new(RevocationState::new(
            RevocationOptions::default(),
        )));
        let crl = VerifiedCrl::verify(&self.crl, credentials.trust()).unwrap();
        revocation.import(crl, NOW_UNIX_MS).unwrap();
        let rules = IdentityRules {
            domain: domain(),
            allow_without_domain: false,
        };
        let clock = Arc::new(|| NOW_UNIX_MS);
        MeshTls::new(rules, node_id(node), credentials, revocation, clock, None)
    }
}
