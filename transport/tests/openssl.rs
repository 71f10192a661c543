//! Certificates and CRLs made by the `openssl` command line, through real handshakes.
//!
//! Every refusal stands beside its positive control: the same probe gets through when it may. The
//! clock is injected; "now" is the first of June 2030.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside the functions that clippy knows as tests"
)]

#[path = "support/openssl.rs"]
mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::crypto::rustls::HandshakeData;
use rustls::{ClientConnection, HandshakeKind, ServerConnection};
use tempfile::TempDir;
use tidelock_segments::{DomainId, LogKey, NodeId, verify_segment};
use tidelock_transport::endorse::{EndorsementError, endorse, verify_endorsement};
use tidelock_transport::identity::{IdentityRules, IdentitySource};
use tidelock_transport::revocation::{
    CrlError, Freshness, Outcome, Revocation, RevocationOptions, RevocationState, VerifiedCrl,
    crl_segment, crls_in_file,
};
use tidelock_transport::tls::{ALPN, Credentials, CredentialsError, MeshTls, SERVER_NAME};
use tidelock_transport::verifier::{PeerRole, Refusal, Trust, TrustError, VerifiedPeer};

use support::{AFTER, BEFORE, Ca, DAY, Issued, JULY, Key, MAY, NOW, Request};

const DOMAIN: &str = "ship-7";

/// One side of a handshake: a node's TLS, its clock, and the codes of what it refused.
struct Node {
    tls: Arc<MeshTls>,
    clock: Arc<AtomicU64>,
    refused: Arc<Mutex<Vec<&'static str>>>,
}

impl Node {
    fn new(id: &str, issued: &Issued, ca_pem: &[u8]) -> Self {
        Self::with_rules(id, issued, ca_pem, false)
    }

    fn with_rules(id: &str, issued: &Issued, ca_pem: &[u8], allow_without_domain: bool) -> Self {
        let credentials =
            Credentials::from_pem(&issued.chain_pem(), &issued.key_pem(), ca_pem).unwrap();
        let clock = Arc::new(AtomicU64::new(NOW));
        let refused = Arc::new(Mutex::new(Vec::new()));
        let tls = MeshTls::new(
            IdentityRules {
                domain: DomainId::new(DOMAIN).unwrap(),
                allow_without_domain,
            },
            NodeId::new(id).unwrap(),
            credentials,
            Arc::new(Revocation::default()),
            {
                let clock = Arc::clone(&clock);
                Arc::new(move || clock.load(Ordering::Relaxed))
            },
            Some({
                let refused = Arc::clone(&refused);
                Arc::new(move |refusal: &Refusal, _| refused.lock().unwrap().push(refusal.code()))
            }),
        );
        Self {
            tls: Arc::new(tls),
            clock,
            refused,
        }
    }

    /// Takes a CRL, which must be good.
    fn crl(&self, der: &[u8]) -> Outcome {
        self.try_crl(der).unwrap()
    }

    fn try_crl(&self, der: &[u8]) -> Result<Outcome, CrlError> {
        let crl = VerifiedCrl::verify(der, self.tls.credentials().trust())?;
        let imported = self.tls.revocation().import(crl, self.tls.now_unix_ms())?;
        Ok(imported.outcome)
    }

    fn at(&self, unix_ms: u64) {
        self.clock.store(unix_ms, Ordering::Relaxed);
    }

    fn take_refused(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.refused.lock().unwrap())
    }
}

/// What came of one attempt. A byte moves only where both sides let the other in.
#[derive(Debug, PartialEq, Eq)]
enum Met {
    /// A byte went through; the names that server and client saw.
    Yes {
        server_saw: String,
        client_saw: String,
    },
    /// The codes of those who refused.
    No {
        by_server: Vec<&'static str>,
        by_client: Vec<&'static str>,
    },
}

impl Met {
    fn yes(server_saw: &str, client_saw: &str) -> Self {
        Self::Yes {
            server_saw: server_saw.to_owned(),
            client_saw: client_saw.to_owned(),
        }
    }

    fn server_refused(code: &'static str) -> Self {
        Self::No {
            by_server: vec![code],
            by_client: vec![],
        }
    }

    fn client_refused(code: &'static str) -> Self {
        Self::No {
            by_server: vec![],
            by_client: vec![code],
        }
    }
}

/// A quinn handshake over UDP on loopback, and one byte from server to client.
async fn meet_expecting(server: &Node, client: &Node, expected: Option<&str>) -> Met {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = quinn::ServerConfig::with_crypto(server.tls.quic_server_config().unwrap());
    let listening = quinn::Endpoint::server(config, loopback).unwrap();
    let address = listening.local_addr().unwrap();

    let tls = Arc::clone(&server.tls);
    let accept = async {
        let connection = listening.accept().await.unwrap().await.ok()?;
        let peer = tls
            .verified_peer(connection.peer_identity(), PeerRole::Client)
            .ok()?;
        let mut stream = connection.open_uni().await.ok()?;
        stream.write_all(b"x").await.ok()?;
        stream.finish().ok()?;
        connection.closed().await;
        Some(peer)
    };
    let expected = expected.map(|id| NodeId::new(id).unwrap());
    let call = async {
        let mut endpoint = quinn::Endpoint::client(loopback).unwrap();
        let config = client.tls.quic_client_config(expected.as_ref()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(config));
        let connection = endpoint.connect(address, SERVER_NAME).unwrap().await.ok()?;
        let data = connection
            .handshake_data()
            .unwrap()
            .downcast::<HandshakeData>()
            .unwrap();
        assert_eq!(data.protocol.as_deref(), Some(ALPN));
        let peer = client
            .tls
            .verified_peer(connection.peer_identity(), PeerRole::Server)
            .ok()?;
        let byte = connection
            .accept_uni()
            .await
            .ok()?
            .read_to_end(1)
            .await
            .ok()?;
        assert_eq!(byte, b"x");
        connection.close(0u8.into(), b"");
        endpoint.wait_idle().await;
        Some(peer)
    };
    let (accepted, called) = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::join!(accept, call)
    })
    .await
    .expect("a handshake ends");
    let (by_server, by_client) = (server.take_refused(), client.take_refused());
    let name = |peer: VerifiedPeer| peer.node_id().to_string();
    match (accepted, called) {
        (Some(at_server), Some(at_client)) => {
            assert_eq!((by_server, by_client), (vec![], vec![]));
            Met::Yes {
                server_saw: name(at_server),
                client_saw: name(at_client),
            }
        }
        (server, None) => {
            // The client cannot have had its byte; whether the server saw it go is all the same.
            drop(server);
            Met::No {
                by_server,
                by_client,
            }
        }
        (None, Some(_)) => panic!("the client got a byte from a server that refused it"),
    }
}

async fn meet(server: &Node, client: &Node) -> Met {
    meet_expecting(server, client, None).await
}

/// A site with one root and two nodes that hold its first CRL.
struct Site {
    dir: TempDir,
    ca: Ca,
    a: Node,
    b: Node,
    b_issued: Issued,
}

impl Site {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let ca = Ca::root(&dir, "ca", "Site CA", Key::P256);
        let a = ca.issue(&Request::node(DOMAIN, "a"));
        let b_issued = ca.issue(&Request::node(DOMAIN, "b"));
        let a = Node::new("a", &a, &ca.pem());
        let b = Node::new("b", &b_issued, &ca.pem());
        let crl = ca.crl_now(1);
        assert_eq!(a.crl(&crl), Outcome::Newest);
        assert_eq!(b.crl(&crl), Outcome::Newest);
        Self {
            dir,
            ca,
            a,
            b,
            b_issued,
        }
    }

    /// Another node of this site, which holds its first CRL.
    fn node(&self, id: &str, request: &Request<'_>) -> Node {
        let node = Node::new(id, &self.ca.issue(request), &self.ca.pem());
        node.crl(&self.ca.crl_now(1));
        node
    }

    /// The positive control: a and b meet.
    async fn control(&self) {
        assert_eq!(meet(&self.a, &self.b).await, Met::yes("b", "a"));
        assert_eq!(meet(&self.b, &self.a).await, Met::yes("a", "b"));
    }
}

#[tokio::test]
async fn two_nodes_of_a_domain_meet() {
    let site = Site::new();
    site.control().await;
    let own = site.a.tls.own_status().unwrap();
    assert_eq!(own.freshness, Freshness::Fresh);
    assert!(own.not_after_unix_ms > NOW);
    // The right node answers, or none.
    assert_eq!(
        meet_expecting(&site.a, &site.b, Some("a")).await,
        Met::yes("b", "a")
    );
    assert_eq!(
        meet_expecting(&site.a, &site.b, Some("c")).await,
        Met::client_refused("NODE_UNEXPECTED")
    );
}

#[tokio::test]
async fn inv_09_without_a_domain_no_session() {
    let site = Site::new();
    for san in [
        None,
        Some("DNS:c".to_owned()),
        Some("URI:spiffe://example.org/workload".to_owned()),
    ] {
        let request = Request {
            san,
            ..Request::node(DOMAIN, "c")
        };
        let c = site.node("c", &request);
        assert_eq!(
            meet(&site.a, &c).await,
            Met::server_refused("DOMAIN_MISSING")
        );
        assert_eq!(
            meet(&c, &site.a).await,
            Met::client_refused("DOMAIN_MISSING")
        );
        assert_eq!(c.tls.own_status().unwrap_err().code(), "DOMAIN_MISSING");
    }
    site.control().await;
}

#[tokio::test]
async fn the_loosened_rule_takes_dns_then_cn_then_the_hash() {
    let site = Site::new();
    let a = site.ca.issue(&Request::node(DOMAIN, "a"));
    let a = Node::with_rules("a", &a, &site.ca.pem(), true);
    a.crl(&site.ca.crl_now(1));
    let spiffe_less = |cn, san: Option<&str>| Request {
        san: san.map(str::to_owned),
        ..Request::node(DOMAIN, cn)
    };
    for (request, name, source) in [
        (
            spiffe_less("cn-1", Some("DNS:dns-1")),
            "dns-1",
            IdentitySource::DnsName,
        ),
        (
            spiffe_less("cn-2", Some("DNS:*.wild,DNS:dns-2")),
            "dns-2",
            IdentitySource::DnsName,
        ),
        (
            spiffe_less("cn-3", None),
            "cn-3",
            IdentitySource::CommonName,
        ),
        (
            spiffe_less("not a node id", None),
            "sha256-",
            IdentitySource::CertificateHash,
        ),
        (
            Request::node(DOMAIN, "strict"),
            "strict",
            IdentitySource::SpiffeUri,
        ),
    ] {
        let issued = site.ca.issue(&request);
        let credentials =
            Credentials::from_pem(&issued.chain_pem(), &issued.key_pem(), &site.ca.pem()).unwrap();
        let peer = a
            .tls
            .verify_presented(credentials.chain(), PeerRole::Client)
            .unwrap();
        assert!(peer.node_id().as_str().starts_with(name), "{peer:?}");
        assert_eq!(peer.identity().source(), source);
        assert_eq!(peer.identity().domain().as_str(), DOMAIN);
    }
    // Loosened is not lawless: another domain is another domain.
    let stranger = site.node("d", &Request::node("ship-8", "d"));
    assert_eq!(
        meet(&a, &stranger).await,
        Met::No {
            by_server: vec!["DOMAIN_WRONG"],
            // The stranger is of ship-8 in its certificate only; its rules are those of ship-7.
            by_client: vec![],
        }
    );
}

#[tokio::test]
async fn inv_09_another_domain_or_an_odd_name_is_refused() {
    let site = Site::new();
    let named = |san: &str| Request {
        san: Some(san.to_owned()),
        ..Request::node(DOMAIN, "c")
    };
    for (request, code) in [
        (Request::node("ship-8", "c"), "DOMAIN_WRONG"),
        (
            named("URI:spiffe://example.org/domains/ship-7"),
            "NODE_MISSING",
        ),
        (
            named("URI:spiffe://example.org/domains/ship-7/peers/"),
            "IDENTITY_MALFORMED",
        ),
        (
            named("URI:spiffe://example.org/domains/ship-7/peers/%63"),
            "IDENTITY_MALFORMED",
        ),
        (
            named("URI:SPIFFE://example.org/domains/ship-7/peers/c"),
            "IDENTITY_MALFORMED",
        ),
        (
            named(
                "URI:spiffe://example.org/domains/ship-7/peers/c,\
                 URI:spiffe://example.org/domains/ship-7/peers/d",
            ),
            "IDENTITY_AMBIGUOUS",
        ),
    ] {
        let c = site.node("c", &request);
        assert_eq!(
            meet(&site.a, &c).await,
            Met::server_refused(code),
            "{request:?}"
        );
        assert_eq!(
            meet(&c, &site.a).await,
            Met::client_refused(code),
            "{request:?}"
        );
    }
    // Other names beside the one that counts do no harm.
    let c = site.node(
        "c",
        &named(
            "DNS:c.example,URI:https://example.org/c,URI:spiffe://td/x/domains/ship-7/y/peers/c",
        ),
    );
    assert_eq!(meet(&site.a, &c).await, Met::yes("c", "a"));
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_on_both_sides() {
    let site = Site::new();
    site.control().await;
    site.ca.revoke(&site.b_issued.cert, Some("keyCompromise"));
    assert_eq!(site.a.crl(&site.ca.crl_now(2)), Outcome::Newest);
    // b has not heard of it, a has: enough, whoever calls.
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );
    assert_eq!(
        meet(&site.b, &site.a).await,
        Met::client_refused("CERT_REVOKED")
    );
    // A bystander of the same CA is not touched.
    let c = site.node("c", &Request::node(DOMAIN, "c"));
    assert_eq!(meet(&site.a, &c).await, Met::yes("c", "a"));
    // Under a new key b is welcome again.
    let again = site.node("b", &Request::node(DOMAIN, "b"));
    assert_eq!(meet(&site.a, &again).await, Met::yes("b", "a"));
}

#[tokio::test]
async fn a_revoked_key_does_not_come_back_in_another_certificate() {
    let site = Site::new();
    let reissued = Request {
        reuse: Some(&site.b_issued),
        ..Request::node(DOMAIN, "b")
    };
    let same_key = site.node("b", &reissued);
    assert_eq!(meet(&site.a, &same_key).await, Met::yes("b", "a"));

    site.ca.revoke(&site.b_issued.cert, None);
    site.a.crl(&site.ca.crl_now(2));
    // a meets the revoked certificate, and from then on knows its key.
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );
    assert_eq!(
        meet(&site.a, &same_key).await,
        Met::server_refused("KEY_REVOKED")
    );
    // The node keeps the set across restarts.
    let keys = site.a.tls.revocation().state().revoked_keys().clone();
    assert_eq!(keys.len(), 1);
    let restarted = site.node("a", &Request::node(DOMAIN, "a"));
    assert_eq!(meet(&restarted, &same_key).await, Met::yes("b", "a"));
    restarted.tls.revocation().add_revoked_keys(keys);
    assert_eq!(
        meet(&restarted, &same_key).await,
        Met::server_refused("KEY_REVOKED")
    );

    // A renewal under the same key, its predecessor revoked as superseded, is a change of paper.
    let c_issued = site.ca.issue(&Request::node(DOMAIN, "c"));
    let c_old = Node::new("c", &c_issued, &site.ca.pem());
    c_old.crl(&site.ca.crl_now(1));
    let renewed = Request {
        reuse: Some(&c_issued),
        ..Request::node(DOMAIN, "c")
    };
    let c_new = site.node("c", &renewed);
    site.ca.revoke(&c_issued.cert, Some("superseded"));
    site.a.crl(&site.ca.crl_now(3));
    assert_eq!(
        meet(&site.a, &c_old).await,
        Met::server_refused("CERT_REVOKED")
    );
    assert_eq!(meet(&site.a, &c_new).await, Met::yes("c", "a"));
}

/// Order of the group of P-256.
const P256_ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
];

/// A DER element.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap();
    let [high, low] = length.to_be_bytes();
    let mut element = match length {
        0..0x80 => vec![tag, low],
        0x80..0x100 => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    element.extend(content);
    element
}

/// The same certificate with the other half of its ECDSA signature changed, by whoever has no key.
fn resigned(certificate: &[u8], other: impl Fn([u8; 32]) -> [u8; 32]) -> Vec<u8> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
    let signature = &parsed.signature_value.data;
    // SEQUENCE of two INTEGERs, each below 128 bytes.
    let r_end = 4 + usize::from(signature[3]);
    let (r, s) = (&signature[2..r_end], &signature[r_end + 2..]);
    let mut number = [0; 32];
    let digits = s.strip_prefix(&[0]).unwrap_or(s);
    number[32 - digits.len()..].copy_from_slice(digits);
    let number = other(number);
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let mut digits = number[zeros..].to_vec();
    if digits[0] >= 0x80 {
        digits.insert(0, 0);
    }
    let pair = der(0x30, &[r, &der(0x02, &digits)].concat());
    let bits = der(0x03, &[&[0], &pair[..]].concat());
    let before = certificate.len() - der(0x03, &[&[0], signature.as_ref()].concat()).len();
    der(0x30, &[&certificate[4..before], &bits].concat())
}

/// `order - number`, which verifies as well as the number does.
fn negated(number: [u8; 32]) -> [u8; 32] {
    let mut result = [0; 32];
    let mut borrow = 0_i16;
    for at in (0..32).rev() {
        let digit = i16::from(P256_ORDER[at]) - i16::from(number[at]) - borrow;
        borrow = i16::from(digit < 0);
        result[at] = u8::try_from(digit.rem_euclid(256)).unwrap();
    }
    result
}

/// A certificate is known by issuer, serial and key. Its fingerprint says nothing: of every ECDSA
/// signature anybody can make a second one, and so of every certificate another one.
#[tokio::test]
async fn a_malleated_certificate_is_revoked_with_the_one_that_it_was_made_from() {
    let site = Site::new();
    let original = site.b.tls.credentials().chain()[0].clone();
    let node = |name: &str, certificate: &[u8]| {
        let files = ["der", "pem"].map(|kind| site.dir.path().join(format!("{name}.{kind}")));
        std::fs::write(&files[0], certificate).unwrap();
        let [from, to] = files.each_ref().map(|file| file.to_str().unwrap());
        support::openssl(&["x509", "-inform", "DER", "-in", from, "-out", to]);
        let issued = Issued {
            chain: files[1].clone(),
            ..site.b_issued.clone()
        };
        let node = Node::new("b", &issued, &site.ca.pem());
        node.crl(&site.ca.crl_now(1));
        node
    };
    assert_eq!(resigned(&original, |same| same), original.as_ref());
    let malleated = resigned(&original, negated);
    assert_ne!(malleated, original.as_ref());
    assert_eq!(resigned(&malleated, negated), original.as_ref());
    let twin = node("twin", &malleated);
    // The controls: it is a good certificate of the CA, and one whose signature is merely changed is not.
    assert_eq!(meet(&site.a, &twin).await, Met::yes("b", "a"));
    let spoilt = node(
        "spoilt",
        &resigned(&original, |mut number| {
            number[31] ^= 1;
            number
        }),
    );
    assert_eq!(
        meet(&site.a, &spoilt).await,
        Met::server_refused("CERT_SIGNATURE")
    );

    site.ca.revoke(&site.b_issued.cert, Some("keyCompromise"));
    site.a.crl(&site.ca.crl_now(2));
    assert_eq!(
        meet(&site.a, &twin).await,
        Met::server_refused("CERT_REVOKED")
    );
    assert_eq!(
        meet(&twin, &site.a).await,
        Met::client_refused("CERT_REVOKED")
    );
    let c = site.node("c", &Request::node(DOMAIN, "c"));
    assert_eq!(meet(&site.a, &c).await, Met::yes("c", "a"), "a bystander");
}

/// As step-ca makes them: a root for one intermediate, an intermediate for leaves only, a leaf for a day
/// with the extension that names its provisioner, and CRLs that name where they lie.
#[tokio::test]
async fn certificates_and_crls_in_the_style_of_step_ca_work_and_end_where_they_say() {
    let site = Site::new();
    let issuing = site.ca.intermediate_with("Issuing CA", Key::P256, Some(0));
    let both = [site.ca.pem(), issuing.pem()].concat();
    let for_a_day = |id| Request {
        start: "300531235900Z",
        end: "300602000000Z",
        more: "keyUsage = critical,digitalSignature\nsubjectKeyIdentifier = hash\n\
               1.3.6.1.4.1.37476.9000.64.1 = DER:300B0201010404736974650400\n",
        ..Request::node(DOMAIN, id)
    };
    let node = |id, ca: &Ca| {
        let node = Node::new(id, &ca.issue(&for_a_day(id)), &both);
        node.crl(&site.ca.crl_with("point", 1, MAY, JULY));
        node.crl(&issuing.crl_with("point", 1, MAY, JULY));
        node
    };
    let (c, d) = (node("c", &issuing), node("d", &issuing));
    assert_eq!(meet(&c, &d).await, Met::yes("d", "c"));
    c.at(NOW + DAY + 1_000);
    assert_eq!(meet(&c, &d).await, Met::server_refused("CERT_EXPIRED"));
    c.at(NOW);

    // An authority below one that may have none, and a leaf that issues.
    let below = issuing.intermediate("Below CA", Key::P256);
    let leaf = issuing.issue(&for_a_day("f"));
    let no_authority = issuing.with_papers("f", Key::P256, &leaf);
    for (what, issuer) in [("too deep", &below), ("no authority", &no_authority)] {
        let e = node("e", issuer);
        assert_eq!(
            meet(&c, &e).await,
            Met::server_refused("CERT_CHAIN"),
            "{what}"
        );
    }
    assert_eq!(meet(&c, &d).await, Met::yes("d", "c"), "the control");
    let revoked = issuing.issue(&for_a_day("e"));
    let e = Node::new("e", &revoked, &both);
    for ca in [&site.ca, &issuing] {
        e.crl(&ca.crl_with("point", 1, MAY, JULY));
    }
    assert_eq!(meet(&c, &e).await, Met::yes("e", "c"));
    issuing.revoke(&revoked.cert, None);
    c.crl(&issuing.crl_with("point", 2, MAY, JULY));
    assert_eq!(meet(&c, &e).await, Met::server_refused("CERT_REVOKED"));
    assert_eq!(meet(&c, &d).await, Met::yes("d", "c"), "a bystander");
}

/// A root with an intermediate that issues: the roots' file, and the intermediate with it.
struct Deep {
    site: Site,
    sub: Ca,
    both: Vec<u8>,
}

impl Deep {
    fn new() -> Self {
        let site = Site::new();
        let sub = site.ca.intermediate("Sub CA", Key::P384);
        let both = [site.ca.pem(), sub.pem()].concat();
        Self { site, sub, both }
    }

    fn node(&self, id: &str, ca_pem: &[u8]) -> Node {
        Node::new(id, &self.sub.issue(&Request::node(DOMAIN, id)), ca_pem)
    }
}

#[tokio::test]
async fn with_an_intermediate_every_issuer_needs_its_crl() {
    let deep = Deep::new();
    let (root_crl, sub_crl) = (deep.site.ca.crl_now(1), deep.sub.crl_now(1));
    let c = deep.node("c", &deep.both);
    let d = deep.node("d", &deep.both);
    for node in [&c, &d] {
        assert_eq!(node.crl(&root_crl), Outcome::Newest);
    }
    assert_eq!(
        meet(&c, &d).await,
        Met::No {
            by_server: vec![],
            by_client: vec!["CRL_MISSING"],
        }
    );
    for node in [&c, &d] {
        assert_eq!(node.crl(&sub_crl), Outcome::Newest);
    }
    assert_eq!(meet(&c, &d).await, Met::yes("d", "c"));

    // The other way about: the intermediate's CRL alone says nothing of the intermediate.
    let e = deep.node("e", &deep.both);
    e.crl(&sub_crl);
    assert_eq!(meet(&e, &c).await, Met::server_refused("CRL_MISSING"));
    e.crl(&root_crl);
    assert_eq!(meet(&e, &c).await, Met::yes("c", "e"));

    // A node under the root meets those below the intermediate if it was given the intermediate.
    let f_issued = deep.site.ca.issue(&Request::node(DOMAIN, "f"));
    let f = Node::new("f", &f_issued, &deep.both);
    f.crl(&root_crl);
    f.crl(&sub_crl);
    assert_eq!(meet(&f, &c).await, Met::yes("c", "f"));
    let blind = Node::new("f", &f_issued, &deep.site.ca.pem());
    blind.crl(&root_crl);
    assert!(matches!(
        blind.try_crl(&sub_crl),
        Err(CrlError::UnknownIssuer { .. })
    ));
    assert_eq!(meet(&blind, &c).await, Met::server_refused("CRL_MISSING"));
    // A node's own intermediates count as given.
    let own = deep.node("g", &deep.site.ca.pem());
    own.crl(&root_crl);
    assert_eq!(own.crl(&sub_crl), Outcome::Newest);
    assert_eq!(meet(&own, &c).await, Met::yes("c", "g"));
}

#[tokio::test]
async fn a_revoked_intermediate_takes_everybody_below_with_it() {
    let deep = Deep::new();
    let (root_crl, sub_crl) = (deep.site.ca.crl_now(1), deep.sub.crl_now(1));
    let c = deep.node("c", &deep.both);
    let a = Node::new(
        "a",
        &deep.site.ca.issue(&Request::node(DOMAIN, "a")),
        &deep.both,
    );
    for node in [&a, &c] {
        node.crl(&root_crl);
        node.crl(&sub_crl);
    }
    assert_eq!(meet(&a, &c).await, Met::yes("c", "a"));
    deep.site.ca.revoke(&deep.sub.cert(), Some("CACompromise"));
    a.crl(&deep.site.ca.crl_now(2));
    assert_eq!(meet(&a, &c).await, Met::server_refused("CERT_REVOKED"));
    assert_eq!(meet(&c, &a).await, Met::client_refused("CERT_REVOKED"));
    // Those directly below the root go on.
    assert_eq!(meet(&a, &deep.site.b).await, Met::yes("b", "a"));
}

#[tokio::test]
async fn a_path_is_keyed_from_the_leaf_to_the_root() {
    let deep = Deep::new();
    let subsub = deep.sub.intermediate("Sub Sub CA", Key::Ed25519);
    let pem = [deep.both.clone(), subsub.pem()].concat();
    let c = Node::new("c", &subsub.issue(&Request::node(DOMAIN, "c")), &pem);
    for crl in [
        deep.site.ca.crl_now(1),
        deep.sub.crl_now(1),
        subsub.crl_now(1),
    ] {
        c.crl(&crl);
    }
    let credentials = c.tls.credentials();
    let peer = c
        .tls
        .verify_presented(credentials.chain(), PeerRole::Client)
        .unwrap();
    let keys = peer.keys();
    assert_eq!(keys.len(), 3);
    let ids: Vec<_> = credentials
        .trust()
        .authorities()
        .iter()
        .map(|ca| ca.id())
        .collect();
    assert_eq!(ids.len(), 3);
    // root, sub, subsub in the file; leaf first in the path.
    assert_eq!(keys[0].issuer, ids[2]);
    assert_eq!((keys[1].issuer, keys[1].spki), (ids[1], ids[2]));
    assert_eq!((keys[2].issuer, keys[2].spki), (ids[0], ids[1]));
    for (key, issued) in keys.iter().zip([&credentials.chain()[0]]) {
        let (_, cert) = x509_parser::parse_x509_certificate(issued).unwrap();
        let serial = cert.raw_serial_as_string().replace(':', "");
        assert!(
            serial
                .trim_start_matches("00")
                .ends_with(&key.serial.to_string()),
            "{serial}"
        );
    }
}

#[tokio::test]
async fn expired_and_not_yet_valid() {
    let site = Site::new();
    let until_may = Request {
        end: MAY,
        ..Request::node(DOMAIN, "c")
    };
    let from_july = Request {
        start: JULY,
        ..Request::node(DOMAIN, "d")
    };
    let c = site.node("c", &until_may);
    let d = site.node("d", &from_july);
    assert_eq!(meet(&site.a, &c).await, Met::server_refused("CERT_EXPIRED"));
    assert_eq!(meet(&c, &site.a).await, Met::client_refused("CERT_EXPIRED"));
    assert_eq!(
        meet(&site.a, &d).await,
        Met::server_refused("CERT_NOT_YET_VALID")
    );
    assert_eq!(
        meet(&d, &site.a).await,
        Met::client_refused("CERT_NOT_YET_VALID")
    );
    assert_eq!(c.tls.own_status().unwrap_err().code(), "CERT_EXPIRED");
    assert_eq!(d.tls.own_status().unwrap_err().code(), "CERT_NOT_YET_VALID");
    // The control is the clock: c was good in April, under a CRL of April.
    let april = NOW - 45 * DAY;
    let crl = site.ca.crl(2, "300401000000Z", "300601000001Z");
    for node in [&site.a, &c] {
        node.at(april);
        node.tls
            .revocation()
            .set_options(RevocationOptions::default());
        assert_eq!(node.crl(&crl), Outcome::Newest);
    }
    assert_eq!(meet(&site.a, &c).await, Met::yes("c", "a"));
}

#[tokio::test]
async fn a_live_session_is_rechecked_against_clock_crl_and_credentials() {
    let site = Site::new();
    let until_july = Request {
        end: "300615000000Z",
        ..Request::node(DOMAIN, "c")
    };
    let c = site.ca.issue(&until_july);
    let chain = Credentials::from_pem(&c.chain_pem(), &c.key_pem(), &site.ca.pem()).unwrap();
    let live = site
        .a
        .tls
        .verify_presented(chain.chain(), PeerRole::Client)
        .unwrap();
    let bystander = site.b.tls.credentials();
    let bystander = site
        .a
        .tls
        .verify_presented(bystander.chain(), PeerRole::Server)
        .unwrap();
    assert_eq!(site.a.tls.recheck(&live), Ok(()));
    assert_eq!(live.chain().not_after_unix_ms(), NOW + 14 * DAY);

    site.a.at(NOW + 15 * DAY);
    assert_eq!(
        site.a.tls.recheck(&live).unwrap_err().code(),
        "CERT_EXPIRED"
    );
    assert_eq!(site.a.tls.recheck(&bystander), Ok(()));
    site.a.at(NOW + 31 * DAY);
    assert_eq!(
        site.a.tls.recheck(&bystander).unwrap_err().code(),
        "CRL_EXPIRED"
    );
    site.a.at(NOW);
    assert_eq!(site.a.tls.recheck(&live), Ok(()));

    site.ca.revoke(&c.cert, None);
    site.a.crl(&site.ca.crl_now(2));
    assert_eq!(
        site.a.tls.recheck(&live).unwrap_err().code(),
        "CERT_REVOKED"
    );
    assert_eq!(site.a.tls.recheck(&bystander), Ok(()));

    // Trust withdrawn: a new CA file without the old root.
    let other = Ca::root(&site.dir, "other", "Other CA", Key::P256);
    let a = other.issue(&Request::node(DOMAIN, "a"));
    let credentials = Credentials::from_pem(&a.chain_pem(), &a.key_pem(), &other.pem()).unwrap();
    site.a.tls.replace_credentials(credentials);
    assert_eq!(
        site.a.tls.recheck(&bystander).unwrap_err().code(),
        "CERT_UNKNOWN_CA"
    );
}

#[tokio::test]
async fn an_unknown_ca_is_refused_even_under_the_same_name() {
    let site = Site::new();
    for (directory, name) in [("foreign", "Foreign CA"), ("twin", "Site CA")] {
        let foreign = Ca::root(&site.dir, directory, name, Key::P256);
        let issued = foreign.issue(&Request::node(DOMAIN, "c"));
        // It trusts our CA and holds our CRL, so only our side has a reason to refuse.
        let c = Node::new("c", &issued, &[site.ca.pem(), foreign.pem()].concat());
        c.crl(&site.ca.crl_now(1));
        c.crl(&foreign.crl_now(1));
        let Met::No {
            by_server,
            by_client,
        } = meet(&site.a, &c).await
        else {
            panic!("let in")
        };
        assert!(by_client.is_empty());
        let [code] = by_server.as_slice() else {
            panic!("{by_server:?}")
        };
        assert!(
            ["CERT_UNKNOWN_CA", "CERT_SIGNATURE"].contains(code),
            "{code}"
        );
        // Its CRL is no better.
        let refused = site.a.try_crl(&foreign.crl_now(2)).unwrap_err();
        match directory {
            "twin" => assert!(matches!(refused, CrlError::Signature { .. }), "{refused}"),
            _ => assert!(
                matches!(refused, CrlError::UnknownIssuer { .. }),
                "{refused}"
            ),
        }
        // Positive control: who trusts that CA lets its node in.
        let host_issued = site.ca.issue(&Request::node(DOMAIN, "h"));
        let host = Node::new("h", &host_issued, &[site.ca.pem(), foreign.pem()].concat());
        host.crl(&site.ca.crl_now(1));
        host.crl(&foreign.crl_now(1));
        assert_eq!(meet(&host, &c).await, Met::yes("c", "h"));
    }
}

#[tokio::test]
async fn without_a_crl_nobody_is_let_in_unless_the_site_says_so() {
    let site = Site::new();
    let a = site.ca.issue(&Request::node(DOMAIN, "a"));
    let a = Node::new("a", &a, &site.ca.pem());
    assert_eq!(meet(&a, &site.b).await, Met::server_refused("CRL_MISSING"));
    assert_eq!(meet(&site.b, &a).await, Met::client_refused("CRL_MISSING"));
    assert_eq!(a.tls.own_status().unwrap_err().code(), "CRL_MISSING");

    a.tls.revocation().set_options(RevocationOptions {
        allow_missing: true,
        ..RevocationOptions::default()
    });
    assert_eq!(meet(&a, &site.b).await, Met::yes("b", "a"));
    assert_eq!(
        a.tls.own_status().unwrap().freshness,
        Freshness::MissingAllowed
    );
    // Absence is not expiry: the loosening does not revive an expired CRL.
    a.crl(&site.ca.crl(1, "300401000000Z", MAY));
    assert_eq!(meet(&a, &site.b).await, Met::server_refused("CRL_EXPIRED"));
}

#[tokio::test]
async fn an_expired_crl_is_refused_unless_within_the_grace() {
    let site = Site::new();
    site.control().await;
    site.a.at(NOW + 31 * DAY);
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CRL_EXPIRED")
    );
    assert_eq!(
        meet(&site.b, &site.a).await,
        Met::client_refused("CRL_EXPIRED")
    );
    let grace = |days: u64| RevocationOptions {
        grace_ms: days * DAY,
        allow_missing: false,
    };
    site.a.tls.revocation().set_options(grace(10));
    assert_eq!(meet(&site.a, &site.b).await, Met::yes("b", "a"));
    assert_eq!(site.a.tls.own_status().unwrap().freshness, Freshness::Grace);
    site.a.at(NOW + 41 * DAY);
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CRL_EXPIRED")
    );
    // The next CRL mends it.
    assert_eq!(
        site.a.crl(&site.ca.crl(2, JULY, "301001000000Z")),
        Outcome::Newest
    );
    assert_eq!(meet(&site.a, &site.b).await, Met::yes("b", "a"));
    // An expired list still names whom it revokes.
    site.ca.revoke(&site.b_issued.cert, None);
    site.a.crl(&site.ca.crl(3, JULY, "300702000000Z"));
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );
}

#[tokio::test]
async fn inv_16_crl_numbers_only_move_forward() {
    let site = Site::new();
    let early = site.ca.crl_now(5);
    site.ca.revoke(&site.b_issued.cert, None);
    let late = site.ca.crl_now(300);
    assert_eq!(site.a.crl(&early), Outcome::Newest);
    assert_eq!(meet(&site.a, &site.b).await, Met::yes("b", "a"));
    assert_eq!(site.a.crl(&late), Outcome::Newest);
    assert_eq!(site.a.crl(&late), Outcome::AlreadyHeld);
    // The older list, without b in it, does not bring b back.
    assert_eq!(
        site.a.try_crl(&early),
        Err(CrlError::Older {
            number: 5,
            held: 300
        })
    );
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );
    // Order of arrival does not matter to a node that loads its store in any order.
    let other = site.node("o", &Request::node(DOMAIN, "o"));
    assert_eq!(other.crl(&late), Outcome::Newest);
    assert!(other.try_crl(&early).is_err());
    assert_eq!(
        other.tls.revocation().state().issuers(NOW),
        site.a.tls.revocation().state().issuers(NOW)
    );
}

#[tokio::test]
async fn a_crl_from_the_future_revokes_at_once_and_displaces_nothing() {
    let site = Site::new();
    let c_issued = site.ca.issue(&Request::node(DOMAIN, "c"));
    let c = Node::new("c", &c_issued, &site.ca.pem());
    c.crl(&site.ca.crl_now(1));
    site.ca.revoke(&site.b_issued.cert, Some("certificateHold"));
    site.a.crl(&site.ca.crl_now(2));
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );

    // Number 3 of August: b is not in it any more, c is.
    release(&site.ca, &site.b_issued);
    site.ca.revoke(&c_issued.cert, None);
    let third = site.ca.crl(3, "300801000000Z", "301001000000Z");
    assert_eq!(site.a.crl(&third), Outcome::Ahead);
    let status = &site.a.tls.revocation().state().issuers(NOW)[0];
    assert_eq!(status.number, Some(2));
    assert_eq!(status.ahead.map(|(number, _)| number), Some(3));
    // c is out at once, b not yet in again.
    assert_eq!(meet(&site.a, &c).await, Met::server_refused("CERT_REVOKED"));
    assert_eq!(
        meet(&site.a, &site.b).await,
        Met::server_refused("CERT_REVOKED")
    );
    // It gives no freshness: the one of May to July expires in July as before.
    site.a.at(NOW + 31 * DAY);
    let d = site.node("d", &Request::node(DOMAIN, "d"));
    assert_eq!(meet(&site.a, &d).await, Met::server_refused("CRL_EXPIRED"));
    // In August it is in force without anybody telling.
    for node in [&site.a, &site.b] {
        node.at(NOW + 62 * DAY);
        let _ = node.try_crl(&third);
    }
    assert_eq!(meet(&site.a, &site.b).await, Met::yes("b", "a"));
    assert_eq!(meet(&site.a, &c).await, Met::server_refused("CERT_REVOKED"));
    assert_eq!(
        site.a.tls.revocation().state().issuers(NOW + 62 * DAY)[0].number,
        Some(3)
    );

    // A node whose only CRL comes from the future believes nobody, and knows why.
    let lost = Node::new(
        "l",
        &site.ca.issue(&Request::node(DOMAIN, "l")),
        &site.ca.pem(),
    );
    assert_eq!(lost.crl(&third), Outcome::Ahead);
    assert_eq!(
        meet(&lost, &d).await,
        Met::server_refused("CRL_NOT_YET_VALID")
    );
    lost.at(NOW + 62 * DAY);
    d.at(NOW + 62 * DAY);
    d.crl(&third);
    assert_eq!(meet(&lost, &d).await, Met::yes("d", "l"));
}

/// Takes a certificate off hold in the CA's database: openssl has no command for it.
fn release(ca: &Ca, issued: &Issued) {
    let index = ca.config().with_file_name("index.txt");
    let serial = support::openssl(&[
        "x509",
        "-noout",
        "-serial",
        "-in",
        issued.cert.to_str().unwrap(),
    ]);
    let serial = String::from_utf8(serial)
        .unwrap()
        .trim()
        .replace("serial=", "");
    let text: String = std::fs::read_to_string(&index)
        .unwrap()
        .lines()
        .map(|line| {
            if !line.contains(&serial) {
                return format!("{line}\n");
            }
            let mut fields: Vec<&str> = line.split('\t').collect();
            fields[0] = "V";
            fields[2] = "";
            fields.join("\t") + "\n"
        })
        .collect();
    std::fs::write(index, text).unwrap();
}

#[tokio::test]
async fn several_crls_from_the_future_never_unrevoke_each_other() {
    let site = Site::new();
    let c_issued = site.ca.issue(&Request::node(DOMAIN, "c"));
    let c = Node::new("c", &c_issued, &site.ca.pem());
    c.crl(&site.ca.crl_now(1));
    site.ca.revoke(&c_issued.cert, Some("certificateHold"));
    let fifth = site.ca.crl(5, "300801000000Z", "301001000000Z");
    release(&site.ca, &c_issued);
    let sixth = site.ca.crl(6, "300802000000Z", "301001000000Z");
    for order in [[&fifth, &sixth], [&sixth, &fifth]] {
        let a = Node::new(
            "a",
            &site.ca.issue(&Request::node(DOMAIN, "a")),
            &site.ca.pem(),
        );
        a.crl(&site.ca.crl_now(1));
        assert_eq!(meet(&a, &c).await, Met::yes("c", "a"));
        assert_eq!(a.crl(order[0]), Outcome::Ahead);
        assert_eq!(a.crl(order[1]), Outcome::Ahead);
        assert_eq!(meet(&a, &c).await, Met::server_refused("CERT_REVOKED"));
        // A plausible one between them and the present takes its place.
        assert_eq!(a.crl(&site.ca.crl_now(2)), Outcome::Newest);
        assert_eq!(meet(&a, &c).await, Met::server_refused("CERT_REVOKED"));
        // In August number 6 holds, and c is released.
        a.at(NOW + 70 * DAY);
        let chain = c.tls.credentials();
        assert!(
            a.tls
                .verify_presented(chain.chain(), PeerRole::Client)
                .is_ok()
        );
    }
}

#[tokio::test]
async fn two_crls_of_one_number_revoke_together() {
    let site = Site::new();
    let c_issued = site.ca.issue(&Request::node(DOMAIN, "c"));
    let c = Node::new("c", &c_issued, &site.ca.pem());
    c.crl(&site.ca.crl_now(1));
    site.ca.revoke(&site.b_issued.cert, Some("certificateHold"));
    let with_b = site.ca.crl_now(7);
    release(&site.ca, &site.b_issued);
    site.ca.revoke(&c_issued.cert, None);
    let with_c = site.ca.crl_now(7);
    for order in [[&with_b, &with_c], [&with_c, &with_b]] {
        let a = Node::new(
            "a",
            &site.ca.issue(&Request::node(DOMAIN, "a")),
            &site.ca.pem(),
        );
        a.crl(&site.ca.crl_now(1));
        assert_eq!(a.crl(order[0]), Outcome::Newest);
        assert_eq!(a.crl(order[1]), Outcome::Conflict);
        assert_eq!(meet(&a, &site.b).await, Met::server_refused("CERT_REVOKED"));
        assert_eq!(meet(&a, &c).await, Met::server_refused("CERT_REVOKED"));
        let status = a.tls.revocation().state().issuers(NOW)[0].clone();
        assert!(status.conflict);
        assert_eq!(status.revoked, 2);
        // The CA is not refused as a forker: its next CRL ends the matter.
        assert_eq!(a.crl(&site.ca.crl_now(8)), Outcome::Newest);
        assert_eq!(meet(&a, &site.b).await, Met::yes("b", "a"));
        assert!(!a.tls.revocation().state().issuers(NOW)[0].conflict);
    }
}

#[test]
fn the_same_crl_signed_twice_is_one_crl() {
    let site = Site::new();
    // ECDSA signatures are random: the same list, signed again, has other bytes.
    let (once, twice) = (site.ca.crl_now(2), site.ca.crl_now(2));
    assert_ne!(once, twice);
    assert_eq!(site.a.crl(&once), Outcome::Newest);
    assert_eq!(site.a.crl(&twice), Outcome::AlreadyHeld);
    // Positive control: another list of that number is a conflict.
    assert_eq!(site.a.crl(&site.ca.crl(2, MAY, AFTER)), Outcome::Conflict);
}

#[test]
fn inv_16_a_displaced_crl_from_the_future_never_comes_into_force() {
    let site = Site::new();
    let tenth = site.ca.crl(10, "300801000000Z", "301001000000Z");
    assert_eq!(site.a.crl(&tenth), Outcome::Ahead);
    site.ca.revoke(&site.b_issued.cert, None);
    assert_eq!(site.a.crl(&site.ca.crl(12, MAY, AFTER)), Outcome::Newest);
    // In August the tenth would be plausible; the twelfth has taken its place for good.
    let august = NOW + 62 * DAY;
    site.a.at(august);
    assert_eq!(
        site.a.tls.revocation().state().issuers(august)[0].number,
        Some(12)
    );
    let b = site.b.tls.credentials();
    let refused = site
        .a
        .tls
        .verify_presented(b.chain(), PeerRole::Client)
        .unwrap_err();
    assert_eq!(refused.code(), "CERT_REVOKED");
    assert_eq!(
        site.a.try_crl(&tenth),
        Err(CrlError::Older {
            number: 10,
            held: 12
        })
    );
    // Positive control: where nothing displaced it, it comes into force by itself.
    site.b.crl(&tenth);
    assert_eq!(
        site.b.tls.revocation().state().issuers(august)[0].number,
        Some(10)
    );
}

#[test]
fn crls_that_cover_less_or_say_too_little_are_refused() {
    let site = Site::new();
    let ca = &site.ca;
    for (section, what) in [
        ("delta", "a delta CRL"),
        ("indirect", "an indirect CRL"),
        ("users", "for user certificates only"),
        ("cas", "for CA certificates only"),
        ("reasons", "for some reasons only"),
    ] {
        let refused = site
            .a
            .try_crl(&ca.crl_with(section, 9, MAY, JULY))
            .unwrap_err();
        assert_eq!(refused, CrlError::Scope { scope: what });
    }
    let critical = site
        .a
        .try_crl(&ca.crl_with("critical", 9, MAY, JULY))
        .unwrap_err();
    assert_eq!(critical.code(), "CRL_MALFORMED", "{critical}");
    // A number beyond 64 bits, and times that stand still.
    let huge = site.a.try_crl(&ca.crl(u64::MAX, MAY, JULY));
    assert_eq!(huge, Ok(Outcome::Newest), "2^64-1 is the largest");
    let still = site.b.try_crl(&ca.crl(9, MAY, MAY)).unwrap_err();
    assert_eq!(still, CrlError::NoNextUpdate);
    // A named distribution point alone narrows nothing; but one CRL is not a part of another.
    assert_eq!(
        site.b.try_crl(&ca.crl_with("point", 9, MAY, JULY)),
        Err(CrlError::OtherPart)
    );
    let fresh = Node::new(
        "f",
        &site.ca.issue(&Request::node(DOMAIN, "f")),
        &site.ca.pem(),
    );
    assert_eq!(
        fresh.crl(&ca.crl_with("point", 9, MAY, JULY)),
        Outcome::Newest
    );
    assert_eq!(
        fresh.crl(&ca.crl_with("point", 10, MAY, JULY)),
        Outcome::Newest
    );
    assert_eq!(
        fresh.try_crl(&ca.crl_with("other_point", 11, MAY, JULY)),
        Err(CrlError::OtherPart)
    );
}

#[test]
fn a_crl_cut_or_changed_anywhere_is_refused() {
    let site = Site::new();
    site.ca.revoke(&site.b_issued.cert, Some("keyCompromise"));
    let good = site.ca.crl_now(2);
    let credentials = site.a.tls.credentials();
    let trust = credentials.trust();
    assert_eq!(
        VerifiedCrl::verify(&good, trust).unwrap().revoked_count(),
        1
    );
    for length in 0..good.len() {
        assert!(
            VerifiedCrl::verify(&good[..length], trust).is_err(),
            "cut at {length}"
        );
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(VerifiedCrl::verify(&bad, trust).is_err(), "changed at {at}");
    }
    let mut longer = good;
    longer.push(0);
    assert!(VerifiedCrl::verify(&longer, trust).is_err());
    assert!(matches!(
        VerifiedCrl::verify(&vec![0x30; 5 * 1024 * 1024], trust),
        Err(CrlError::TooLarge { .. })
    ));
}

#[test]
fn a_long_crl_is_read_whole() {
    let site = Site::new();
    site.ca.revoke_serials(0x1000_0000, 5_000);
    site.ca.revoke(&site.b_issued.cert, None);
    let credentials = site.a.tls.credentials();
    let crl = VerifiedCrl::verify(&site.ca.crl_now(2), credentials.trust()).unwrap();
    assert_eq!(crl.revoked_count(), 5_001);
    let imported = site.a.tls.revocation().import(crl, NOW).unwrap();
    assert_eq!(
        (imported.outcome, imported.newly_revoked),
        (Outcome::Newest, 5_001)
    );
    let b = site.b.tls.credentials();
    let refused = site
        .a
        .tls
        .verify_presented(b.chain(), PeerRole::Client)
        .unwrap_err();
    assert_eq!(refused.code(), "CERT_REVOKED");
}

#[test]
fn a_crl_travels_in_a_segment_that_everybody_makes_alike() {
    let site = Site::new();
    let credentials = site.a.tls.credentials();
    let trust = credentials.trust();
    let domain = DomainId::new(DOMAIN).unwrap();
    let der = site.ca.crl_now(42);
    let crl = VerifiedCrl::verify(&der, trust).unwrap();
    let bytes = crl_segment(&domain, &crl).unwrap();
    let again = VerifiedCrl::verify(&der, site.b.tls.credentials().trust()).unwrap();
    assert_eq!(bytes, crl_segment(&domain, &again).unwrap());

    let segment = verify_segment(bytes, None, &domain).unwrap();
    assert_eq!(segment.header().sequence, 42);
    assert_eq!(segment.header().origin, crl.origin());
    let back = VerifiedCrl::from_segment(&segment, trust).unwrap();
    assert_eq!(back.der(), crl.der());

    // The envelope may not say otherwise than the CRL.
    let mut header = segment.header().clone();
    header.sequence = 43;
    let lying = tidelock_segments::seal_unsigned(&header, crl.der()).unwrap();
    let lying = verify_segment(lying, None, &domain).unwrap();
    assert_eq!(
        VerifiedCrl::from_segment(&lying, trust).unwrap_err(),
        CrlError::Envelope
    );
}

#[tokio::test]
async fn every_supported_kind_of_key_and_no_other() {
    let site = Site::new();
    for (n, kind) in [Key::P384, Key::Ed25519, Key::Rsa2048]
        .into_iter()
        .enumerate()
    {
        let ca = Ca::root(&site.dir, &format!("kind-{n}"), &format!("CA {n}"), kind);
        let request = Request {
            kind,
            ..Request::node(DOMAIN, "c")
        };
        let c = Node::new("c", &ca.issue(&request), &ca.pem());
        let d = Node::new("d", &ca.issue(&Request::node(DOMAIN, "d")), &ca.pem());
        c.crl(&ca.crl_now(1));
        d.crl(&ca.crl_now(1));
        assert_eq!(meet(&c, &d).await, Met::yes("d", "c"), "{kind:?}");
        assert_eq!(meet(&d, &c).await, Met::yes("c", "d"), "{kind:?}");
        // And the log key's endorsement in the same kind.
        let log_key = LogKey::generate().unwrap().public();
        let node_id = NodeId::new("c").unwrap();
        let credentials = c.tls.credentials();
        let endorsement = endorse(&credentials, &node_id, &log_key, 1).unwrap();
        let verdict = verify_endorsement(
            &endorsement,
            d.tls.credentials().trust(),
            d.tls.revocation(),
            d.tls.rules(),
            NOW,
            NOW,
        );
        assert!(verdict.is_ok(), "{kind:?}: {verdict:?}");
    }
    for kind in [Key::P521, Key::Rsa1024] {
        let request = Request {
            kind,
            ..Request::node(DOMAIN, "c")
        };
        let issued = site.ca.issue(&request);
        let refused = Credentials::from_pem(&issued.chain_pem(), &issued.key_pem(), &site.ca.pem());
        let code = refused.unwrap_err().code();
        assert_eq!(code, "KEY_FILE", "{kind:?}");
    }
    site.control().await;
}

#[tokio::test]
async fn a_weak_authority_is_refused() {
    let dir = TempDir::new().unwrap();
    for (n, (kind, good)) in [
        (Key::Rsa1024, false),
        (Key::P521, false),
        (Key::Rsa2048, true),
    ]
    .into_iter()
    .enumerate()
    {
        let ca = Ca::root(&dir, &format!("weak-{n}"), "Weak CA", kind);
        let c = Node::new("c", &ca.issue(&Request::node(DOMAIN, "c")), &ca.pem());
        let verdict = c.try_crl(&ca.crl_now(1));
        assert_eq!(verdict.is_ok(), good, "{kind:?}: {verdict:?}");
        assert_eq!(c.tls.own_status().is_ok(), good, "{kind:?}");
    }
}

#[tokio::test]
async fn a_certificate_must_be_made_for_both_uses() {
    let site = Site::new();
    let only = |eku| Request {
        eku,
        ..Request::node(DOMAIN, "c")
    };
    let server_only = site.node("c", &only(Some("serverAuth")));
    assert_eq!(
        meet(&site.a, &server_only).await,
        Met::server_refused("CERT_USAGE")
    );
    assert_eq!(
        server_only.tls.own_status().unwrap_err().code(),
        "CERT_USAGE"
    );
    let client_only = site.node("c", &only(Some("clientAuth")));
    assert_eq!(
        meet(&client_only, &site.a).await,
        Met::client_refused("CERT_USAGE")
    );
    assert_eq!(
        client_only.tls.own_status().unwrap_err().code(),
        "CERT_USAGE"
    );
    let unrestricted = site.node("c", &only(None));
    assert_eq!(meet(&site.a, &unrestricted).await, Met::yes("c", "a"));
    assert!(unrestricted.tls.own_status().is_ok());
}

/// Moves TLS bytes between two rustls connections until the handshake ends or one refuses.
fn in_memory(
    client: &mut ClientConnection,
    server: &mut ServerConnection,
) -> Result<(), rustls::Error> {
    while client.is_handshaking() || server.is_handshaking() || server.wants_write() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut reading = wire.as_slice();
        while !reading.is_empty() {
            server.read_tls(&mut reading).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut reading = wire.as_slice();
        while !reading.is_empty() {
            client.read_tls(&mut reading).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}

fn server_name() -> rustls::pki_types::ServerName<'static> {
    SERVER_NAME.try_into().unwrap()
}

#[test]
fn no_session_is_ever_resumed() {
    let site = Site::new();
    let server_config = Arc::new(site.a.tls.server_config().unwrap());
    let client_config = Arc::new(site.b.tls.client_config(None).unwrap());
    for _ in 0..3 {
        let mut client = ClientConnection::new(Arc::clone(&client_config), server_name()).unwrap();
        let mut server = ServerConnection::new(Arc::clone(&server_config)).unwrap();
        in_memory(&mut client, &mut server).unwrap();
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(
            client.protocol_version(),
            Some(rustls::ProtocolVersion::TLSv1_3)
        );
        let group = client.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
        assert_eq!(
            server.server_name(),
            None,
            "who is called is nobody's business"
        );
        assert!(server.peer_certificates().is_some() && client.peer_certificates().is_some());
    }
    // The same two configurations, and a CRL in between: judged anew, on either side.
    site.ca.revoke(&site.b_issued.cert, None);
    site.a.crl(&site.ca.crl_now(2));
    let mut client = ClientConnection::new(client_config, server_name()).unwrap();
    let mut server = ServerConnection::new(server_config).unwrap();
    let refused = in_memory(&mut client, &mut server).unwrap_err();
    assert_eq!(
        refused,
        rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked)
    );

    // Positive control of the control: stock rustls does resume, and the second handshake of such a
    // pair shows no certificate to the verifier.
    let mut eager_server = site.b.tls.server_config().unwrap();
    let mut eager_client = site.b.tls.client_config(None).unwrap();
    eager_server.send_tls13_tickets = 2;
    eager_server.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    eager_client.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let (eager_server, eager_client) = (Arc::new(eager_server), Arc::new(eager_client));
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let mut client = ClientConnection::new(Arc::clone(&eager_client), server_name()).unwrap();
        let mut server = ServerConnection::new(Arc::clone(&eager_server)).unwrap();
        in_memory(&mut client, &mut server).unwrap();
        kinds.push(server.handshake_kind().unwrap());
    }
    assert_eq!(kinds, [HandshakeKind::Full, HandshakeKind::Resumed]);
}

#[test]
fn a_client_without_certificate_or_protocol_is_refused() {
    let site = Site::new();
    let server_config = Arc::new(site.a.tls.server_config().unwrap());
    let attempt = |config: rustls::ClientConfig| {
        let mut client = ClientConnection::new(Arc::new(config), server_name()).unwrap();
        let mut server = ServerConnection::new(Arc::clone(&server_config)).unwrap();
        in_memory(&mut client, &mut server)
    };
    assert_eq!(attempt(site.b.tls.client_config(None).unwrap()), Ok(()));

    let mut silent = site.b.tls.client_config(None).unwrap();
    silent.client_auth_cert_resolver = Arc::new(NoCertificate);
    assert_eq!(attempt(silent), Err(rustls::Error::NoCertificatesPresented));

    let mut other = site.b.tls.client_config(None).unwrap();
    other.alpn_protocols = vec![b"h3".to_vec()];
    assert_eq!(attempt(other), Err(rustls::Error::NoApplicationProtocol));
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn credentials_are_replaced_without_new_configurations() {
    let site = Site::new();
    let server = Arc::new(site.a.tls.server_config().unwrap());
    let client = Arc::new(site.b.tls.client_config(None).unwrap());
    let seen = || {
        let mut c = ClientConnection::new(Arc::clone(&client), server_name()).unwrap();
        let mut s = ServerConnection::new(Arc::clone(&server)).unwrap();
        in_memory(&mut c, &mut s).unwrap();
        c.peer_certificates().unwrap()[0].clone()
    };
    let before = seen();
    let renewed = site.ca.issue(&Request::node(DOMAIN, "a"));
    let credentials =
        Credentials::from_pem(&renewed.chain_pem(), &renewed.key_pem(), &site.ca.pem()).unwrap();
    site.a.tls.replace_credentials(credentials);
    assert_ne!(seen(), before);
    assert_eq!(seen(), seen());
    site.control().await;
}

#[test]
fn credentials_say_what_is_wrong_with_the_files() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    let c = site.ca.issue(&Request::node(DOMAIN, "c"));
    let ca = site.ca.cert();
    assert!(Credentials::load(&c.chain, &c.key, &ca).is_ok());

    for (mode, good) in [
        (0o600, true),
        (0o400, true),
        (0o640, false),
        (0o604, false),
        (0o700, false),
    ] {
        std::fs::set_permissions(&c.key, std::fs::Permissions::from_mode(mode)).unwrap();
        match Credentials::load(&c.chain, &c.key, &ca) {
            Ok(_) => assert!(good, "{mode:o} was taken"),
            Err(refused) => {
                assert!(!good);
                assert_eq!(
                    refused,
                    CredentialsError::KeyMode {
                        path: c.key.clone(),
                        mode
                    }
                );
            }
        }
    }
    std::fs::set_permissions(&c.key, std::fs::Permissions::from_mode(0o600)).unwrap();

    let missing = c.key.with_extension("absent");
    let code = |chain, key, ca| Credentials::load(chain, key, ca).unwrap_err().code();
    assert_eq!(code(&c.chain, &missing, &ca), "CREDENTIALS_UNREADABLE");
    assert_eq!(code(site.dir.path(), &c.key, &ca), "CREDENTIALS_UNREADABLE");
    assert_eq!(code(&c.key, &c.key, &ca), "CERTIFICATE_FILE");
    assert_eq!(code(&site.b_issued.chain, &c.key, &ca), "KEY_MISMATCH");
    assert_eq!(code(&c.chain, &c.key, &c.chain), "CA_FILE");

    let (chain, key) = (c.chain_pem(), c.key_pem());
    let refused = Credentials::from_pem(&chain, &key, &chain).unwrap_err();
    assert!(matches!(
        refused,
        CredentialsError::Trust(TrustError::NotACa { index: 1, .. })
    ));
    assert_eq!(Trust::from_pem(b"").unwrap_err(), TrustError::NoRoot);
    let sub = site.ca.intermediate("Sub CA", Key::P256);
    assert_eq!(Trust::from_pem(&sub.pem()).unwrap_err(), TrustError::NoRoot);
    let many = site.ca.pem().repeat(17);
    assert!(matches!(
        Trust::from_pem(&many),
        Err(TrustError::TooMany { found: 17, .. })
    ));
    let long = [chain.clone(), site.ca.pem().repeat(6)].concat();
    let refused = Credentials::from_pem(&long, &key, &site.ca.pem()).unwrap_err();
    assert_eq!(refused, CredentialsError::ChainTooLong { found: 7, max: 6 });

    let encrypted = c.key.with_extension("enc");
    support::openssl(&[
        "pkcs8",
        "-topk8",
        "-in",
        c.key.to_str().unwrap(),
        "-out",
        encrypted.to_str().unwrap(),
        "-passout",
        "pass:secret",
    ]);
    let encrypted = std::fs::read(encrypted).unwrap();
    let refused = Credentials::from_pem(&chain, &encrypted, &site.ca.pem()).unwrap_err();
    assert_eq!(refused, CredentialsError::KeyEncrypted);
    // The old EC form, as `openssl ecparam -genkey` writes it, is read as well.
    let sec1 = support::openssl(&["ec", "-in", c.key.to_str().unwrap()]);
    assert!(Credentials::from_pem(&chain, &sec1, &site.ca.pem()).is_ok());
    let debug = format!("{:?}", site.a.tls.credentials());
    assert_eq!(debug, "Credentials { certificates: 1, authorities: 1, .. }");
}

#[test]
fn an_authority_named_like_its_issuer_is_no_root() {
    let site = Site::new();
    // A key rollover: the new key, certified by the old one under the same name.
    let rollover = site.ca.intermediate("Site CA", Key::P256);
    assert_eq!(
        Trust::from_pem(&rollover.pem()).unwrap_err(),
        TrustError::NoRoot
    );
    let trust = Trust::from_pem(&[site.ca.pem(), rollover.pem()].concat()).unwrap();
    let roots: Vec<bool> = trust.authorities().iter().map(|ca| ca.is_root()).collect();
    assert_eq!(roots, [true, false]);
}

#[test]
fn a_crl_file_may_be_der_or_pem_with_several() {
    let site = Site::new();
    let der = site.ca.crl_now(2);
    let pem = std::fs::read(site.ca.config().with_file_name("crl-2.pem")).unwrap();
    assert_eq!(crls_in_file(&der), Ok(vec![der.clone()]));
    assert_eq!(crls_in_file(&pem), Ok(vec![der.clone()]));
    assert_eq!(crls_in_file(&pem.repeat(2)), Ok(vec![der.clone(), der]));
    for bad in [&b""[..], b"hello", &site.ca.pem(), &pem[..pem.len() / 2]] {
        assert_eq!(crls_in_file(bad).unwrap_err().code(), "CRL_MALFORMED");
    }
}

#[test]
fn a_chain_longer_than_the_limit_is_not_read() {
    let site = Site::new();
    let credentials = site.b.tls.credentials();
    let leaf = credentials.chain()[0].clone();
    let padded = |n| vec![leaf.clone(); n];
    // Certificates beside the path are ignored, up to the limit.
    assert!(
        site.a
            .tls
            .verify_presented(&padded(6), PeerRole::Client)
            .is_ok()
    );
    assert_eq!(
        site.a
            .tls
            .verify_presented(&padded(7), PeerRole::Client)
            .unwrap_err(),
        Refusal::ChainTooLong { length: 7, max: 6 }
    );
    assert_eq!(
        site.a
            .tls
            .verify_presented(&[], PeerRole::Client)
            .unwrap_err(),
        Refusal::NoCertificate
    );
    assert_eq!(
        site.a
            .tls
            .verified_peer(None, PeerRole::Client)
            .unwrap_err(),
        Refusal::NoCertificate
    );
}

#[test]
fn an_endorsement_ties_a_log_key_to_a_certificate() {
    let site = Site::new();
    let deep = site.ca.intermediate("Sub CA", Key::P256);
    let request = Request {
        end: "300615000000Z",
        ..Request::node(DOMAIN, "c")
    };
    let issued = deep.issue(&request);
    let both = [site.ca.pem(), deep.pem()].concat();
    let c = Credentials::from_pem(&issued.chain_pem(), &issued.key_pem(), &both).unwrap();
    let judge = Node::new("j", &site.ca.issue(&Request::node(DOMAIN, "j")), &both);
    judge.crl(&site.ca.crl_now(1));
    judge.crl(&deep.crl_now(1));

    let log_key = LogKey::generate().unwrap().public();
    let c_id = NodeId::new("c").unwrap();
    let good = endorse(&c, &c_id, &log_key, 3).unwrap();
    // It survives its own encoding.
    let good = tidelock_segments::Endorsement::decode(&good.encode().unwrap()).unwrap();
    let verify = |endorsement: &_, signed_at, now| {
        verify_endorsement(
            endorsement,
            judge.tls.credentials().trust(),
            judge.tls.revocation(),
            judge.tls.rules(),
            signed_at,
            now,
        )
    };
    let verdict = verify(&good, NOW, NOW).unwrap();
    assert_eq!(verdict.identity().node_id(), &c_id);
    assert_eq!(verdict.chain().keys().len(), 2);
    assert!(!verdict.expired());

    // Any change of what is endorsed.
    let mut other = good.clone();
    other.incarnation = 4;
    assert_eq!(
        verify(&other, NOW, NOW).unwrap_err().code(),
        "CERT_SIGNATURE"
    );
    let mut other = good.clone();
    other.log_key = LogKey::generate().unwrap().public();
    assert_eq!(
        verify(&other, NOW, NOW).unwrap_err().code(),
        "CERT_SIGNATURE"
    );
    let mut other = good.clone();
    other.chain.truncate(1);
    assert_eq!(
        verify(&other, NOW, NOW).unwrap_err().code(),
        "CERT_SIGNATURE"
    );
    let mut other = good.clone();
    other.scheme = 0x0201; // RSA with SHA-1
    assert_eq!(
        verify(&other, NOW, NOW).unwrap_err().code(),
        "CERT_ALGORITHM"
    );
    let mut other = good.clone();
    other.chain.clear();
    assert_eq!(verify(&other, NOW, NOW).unwrap_err().code(), "CERT_ABSENT");
    // Signed for another node with the right key: the certificate says who may.
    let liar = endorse(&c, &NodeId::new("d").unwrap(), &log_key, 3).unwrap();
    assert!(matches!(
        verify(&liar, NOW, NOW),
        Err(EndorsementError::OtherNode { .. })
    ));

    // What was signed while the certificate was valid stays good, and says that it has expired.
    let later = NOW + 20 * DAY;
    assert_eq!(
        verify(&good, later, later).unwrap_err().code(),
        "CERT_EXPIRED"
    );
    assert!(verify(&good, NOW, later).unwrap().expired());
    assert_eq!(
        verify(&good, later, NOW).unwrap_err().code(),
        "ENDORSEMENT_TIME"
    );

    // Revoked is revoked, whenever it was signed.
    deep.revoke(&issued.cert, None);
    judge.crl(&deep.crl_now(2));
    let refused = verify(&good, NOW, NOW).unwrap_err();
    assert_eq!(refused.code(), "CERT_REVOKED");
    assert!(refused.is_revoked());
}

#[test]
fn inv_18_a_step_back_of_the_clock_does_not_bring_an_older_crl_back() {
    let site = Site::new();
    site.ca.revoke(&site.b_issued.cert, None);
    site.a.crl(&site.ca.crl_now(2));
    site.a.at(NOW - 365 * DAY);
    let older = site.ca.crl(1, BEFORE, AFTER);
    assert_eq!(
        site.a.try_crl(&older),
        Err(CrlError::Older { number: 1, held: 2 })
    );
    let chain = site.b.tls.credentials();
    let refused = site
        .a
        .tls
        .verify_presented(chain.chain(), PeerRole::Client)
        .unwrap_err();
    assert_eq!(refused.code(), "CERT_REVOKED");
    // Positive control: the same older list is taken where nothing newer is held.
    let fresh = Revocation::new(RevocationState::default());
    let crl = VerifiedCrl::verify(&older, site.a.tls.credentials().trust()).unwrap();
    assert_eq!(fresh.import(crl, NOW).unwrap().outcome, Outcome::Newest);
}

/// The book's page on identity, whose commands and tables are tested here.
const PAGE: &str = include_str!("../../docs/src/identity.md");

#[test]
fn the_commands_of_the_book_work() {
    let dir = TempDir::new().unwrap();
    let mut script = String::new();
    let mut inside = false;
    for line in PAGE.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            _ if inside => script += &format!("{line}\n"),
            _ => {}
        }
    }
    let ran = std::process::Command::new("sh")
        .args(["-eu", "-c", &script])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );

    let at = |file: &str| dir.path().join(file);
    let load = |node: &str| {
        Credentials::load(
            &at(&format!("{node}/node.pem")),
            &at(&format!("{node}/node.key")),
            &at("ca/ca.pem"),
        )
        .unwrap()
    };
    let (a, b) = (load("a"), load("b"));
    let crl = |file: &str| {
        let der = crls_in_file(&std::fs::read(at(file)).unwrap())
            .unwrap()
            .remove(0);
        VerifiedCrl::verify(&der, a.trust()).unwrap()
    };
    // openssl took the time of day; the CRL, made last, says when that was.
    let now = crl("crl-2.pem").this_update_unix_ms() + 1000;
    let revocation = Arc::new(Revocation::default());
    revocation.import(crl("crl-1.pem"), now).unwrap();
    let rules = IdentityRules {
        domain: DomainId::new("ship-7").unwrap(),
        allow_without_domain: false,
    };
    let tls = MeshTls::new(
        rules,
        NodeId::new("a").unwrap(),
        a.clone(),
        Arc::clone(&revocation),
        Arc::new(move || now),
        None,
    );
    assert_eq!(tls.own_status().unwrap().freshness, Freshness::Fresh);
    let peer = tls.verify_presented(b.chain(), PeerRole::Client).unwrap();
    assert_eq!(peer.node_id().as_str(), "b");
    assert_eq!(peer.identity().trust_domain(), Some("ship-7.example"));
    revocation.import(crl("crl-2.pem"), now).unwrap();
    assert_eq!(tls.recheck(&peer).unwrap_err().code(), "CERT_REVOKED");
    assert!(tls.own_status().is_ok());
}

#[test]
fn every_code_stands_in_the_book_and_every_code_of_the_book_exists() {
    let sources = [
        include_str!("../src/identity.rs"),
        include_str!("../src/revocation.rs"),
        include_str!("../src/verifier.rs"),
        include_str!("../src/tls.rs"),
        include_str!("../src/endorse.rs"),
    ];
    let is_code = |text: &&str| {
        text.contains('_') && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
    };
    let in_code: std::collections::BTreeSet<&str> = sources
        .iter()
        .flat_map(|source| source.split("=> \"").skip(1))
        .filter_map(|rest| rest.split('"').next())
        .filter(is_code)
        .collect();
    let in_book: std::collections::BTreeSet<&str> = PAGE
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(is_code)
        .collect();
    assert!(in_code.len() > 30, "{in_code:?}");
    assert_eq!(in_code, in_book);
}
