//! Who a certificate says its holder is: domain and node id from the URI SAN.
//!
//! The only name that counts is a URI SAN of the form
//! `spiffe://<trust domain>/…/domains/<domain>/…/peers/<node id>`; the two pairs may stand anywhere
//! in the path. Strict by default: a certificate without them is nobody. Start at
//! [`PeerIdentity::from_certificate`].
//!
//! This module reads names only. Whether the certificate may be believed at all (chain, validity,
//! revocation) is [`crate::verifier`]'s question, and it asks this module last.

use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use tidelock_segments::{DomainId, NodeId};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

/// Longest URI SAN that is read: SPIFFE's own limit. Longer is refused, so one certificate can make
/// us hold at most this much text.
pub const MAX_SPIFFE_ID_BYTES: usize = 2048;

/// Longest trust domain, as SPIFFE has it.
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// Most path segments of a URI SAN that are looked at; longer paths are refused.
pub const MAX_PATH_SEGMENTS: usize = 64;

const _: () = assert!(MAX_TRUST_DOMAIN_BYTES < MAX_SPIFFE_ID_BYTES);
const _: () = assert!(MAX_PATH_SEGMENTS * 2 <= MAX_SPIFFE_ID_BYTES);

/// Why a certificate does not say who its holder is. The fault is the certificate's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The certificate, or its subject alternative name, cannot be read.
    #[error("the certificate's names cannot be read: {detail}")]
    Malformed {
        /// What was wrong.
        detail: String,
    },
    /// More than one SPIFFE URI: which one counts would be a guess.
    #[error("the certificate has {count} spiffe URI names; issue it with exactly one")]
    Ambiguous {
        /// How many there were.
        count: usize,
    },
    /// A SPIFFE URI that is not written as it must be.
    #[error("the URI name {uri:?} is refused: {reason}")]
    Uri {
        /// The name as it stands in the certificate.
        uri: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No domain in the certificate.
    #[error(
        "the certificate names no domain; issue it with the URI SAN \
         spiffe://<trust domain>/domains/<domain>/peers/<node id>"
    )]
    DomainMissing,
    /// A domain, but no node id.
    #[error("the certificate names no node; its URI SAN needs the path segments peers/<node id>")]
    NodeMissing,
    /// The certificate belongs to another domain.
    #[error("the certificate belongs to domain {presented}, this node to domain {expected}")]
    WrongDomain {
        /// This node's domain.
        expected: DomainId,
        /// The certificate's domain.
        presented: DomainId,
    },
}

impl IdentityError {
    /// The stable code of this refusal.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Malformed { .. } | Self::Uri { .. } => "IDENTITY_MALFORMED",
            Self::Ambiguous { .. } => "IDENTITY_AMBIGUOUS",
            Self::DomainMissing => "DOMAIN_MISSING",
            Self::NodeMissing => "NODE_MISSING",
            Self::WrongDomain { .. } => "DOMAIN_WRONG",
        }
    }
}

/// What a node demands of the names in a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityRules {
    /// The domain that this node belongs to.
    pub domain: DomainId,
    /// Loosening, off by default: take certificates that name no domain, with the node id from DNS
    /// SAN, CN or the certificate's SHA-256. Whoever turns it on says so in posture and doctor.
    pub allow_without_domain: bool,
}

/// Where a node id was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdentitySource {
    /// The SPIFFE URI SAN, domain included.
    SpiffeUri,
    /// The first DNS SAN that is a node id (only with `allow_without_domain`).
    DnsName,
    /// The subject's common name (only with `allow_without_domain`).
    CommonName,
    /// The certificate's SHA-256 (only with `allow_without_domain`).
    CertificateHash,
}

/// The name of a peer, as read from its certificate.
///
/// A value of this type is a *name*, checked against this node's domain; that its bearer may be
/// believed is said by [`crate::verifier::VerifiedPeer`], which only the verifier makes.
///
/// ```
/// use tidelock_transport::identity::PeerIdentity;
/// fn shown(it: &PeerIdentity) -> String {
///     format!("{:?}", it.domain())
/// }
/// ```
///
/// ```compile_fail,E0451
/// use tidelock_transport::identity::PeerIdentity;
/// let forged = PeerIdentity { domain: todo!(), node_id: todo!(), trust_domain: None, source: todo!() };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    domain: DomainId,
    node_id: NodeId,
    trust_domain: Option<String>,
    source: IdentitySource,
}

impl PeerIdentity {
    /// The domain. With `allow_without_domain` and none in the certificate: this node's own.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// The node.
    #[must_use]
    pub fn node_id(&self) -> &NodeId {
        &self.node_id
    }

    /// The SPIFFE trust domain, where the certificate has one.
    #[must_use]
    pub fn trust_domain(&self) -> Option<&str> {
        self.trust_domain.as_deref()
    }

    /// Where the node id was found.
    #[must_use]
    pub fn source(&self) -> IdentitySource {
        self.source
    }

    /// Reads the names in a certificate and holds them against the rules.
    ///
    /// # Errors
    /// [`IdentityError`]; every one means "no session".
    pub fn from_certificate(
        certificate: &CertificateDer<'_>,
        rules: &IdentityRules,
    ) -> Result<Self, IdentityError> {
        let parsed = parse(certificate)?;
        let names = Names::of(&parsed)?;
        match names.spiffe.as_slice() {
            [] => Self::without_domain(certificate, &parsed, &names, None, rules),
            [uri] => {
                let id = SpiffeId::parse(uri)?;
                match (id.domain, id.node) {
                    (Some(domain), node) => {
                        if domain != rules.domain {
                            return Err(IdentityError::WrongDomain {
                                expected: rules.domain.clone(),
                                presented: domain,
                            });
                        }
                        Ok(Self {
                            domain,
                            node_id: node.ok_or(IdentityError::NodeMissing)?,
                            trust_domain: Some(id.trust_domain),
                            source: IdentitySource::SpiffeUri,
                        })
                    }
                    (None, _) => Self::without_domain(
                        certificate,
                        &parsed,
                        &names,
                        Some(id.trust_domain),
                        rules,
                    ),
                }
            }
            several => Err(IdentityError::Ambiguous {
                count: several.len(),
            }),
        }
    }

    /// The loosened reading: DNS SAN, then CN, then the hash of the certificate.
    fn without_domain(
        certificate: &CertificateDer<'_>,
        parsed: &X509Certificate<'_>,
        names: &Names,
        trust_domain: Option<String>,
        rules: &IdentityRules,
    ) -> Result<Self, IdentityError> {
        if !rules.allow_without_domain {
            return Err(IdentityError::DomainMissing);
        }
        let dns = names.dns.iter().find_map(|name| NodeId::new(name).ok());
        let common_name = || {
            parsed
                .subject()
                .iter_common_name()
                .find_map(|cn| cn.as_str().ok().and_then(|text| NodeId::new(text).ok()))
        };
        let (node_id, source) = if let Some(node) = dns {
            (node, IdentitySource::DnsName)
        } else if let Some(node) = common_name() {
            (node, IdentitySource::CommonName)
        } else {
            // A node id has at most 63 characters; 56 digits of the hash leave 224 bits.
            let hash = digest::digest(&digest::SHA256, certificate);
            let digits: String = crate::revocation::hex(hash.as_ref())
                .chars()
                .take(56)
                .collect();
            let node =
                NodeId::new(&format!("sha256-{digits}")).map_err(|e| IdentityError::Malformed {
                    detail: e.to_string(),
                })?;
            (node, IdentitySource::CertificateHash)
        };
        Ok(Self {
            domain: rules.domain.clone(),
            node_id,
            trust_domain,
            source,
        })
    }
}

pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, IdentityError> {
    let malformed = |detail: String| IdentityError::Malformed { detail };
    let (rest, parsed) = X509Certificate::from_der(certificate.as_ref())
        .map_err(|e| malformed(format!("not an X.509 certificate ({e})")))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after the certificate".to_owned()));
    }
    Ok(parsed)
}

struct Names {
    spiffe: Vec<String>,
    dns: Vec<String>,
}

impl Names {
    fn of(parsed: &X509Certificate<'_>) -> Result<Self, IdentityError> {
        let mut names = Self {
            spiffe: Vec::new(),
            dns: Vec::new(),
        };
        let extension =
            parsed
                .subject_alternative_name()
                .map_err(|e| IdentityError::Malformed {
                    detail: format!("bad SAN extension ({e})"),
                })?;
        for name in extension.iter().flat_map(|san| &san.value.general_names) {
            match name {
                GeneralName::URI(uri) => {
                    let scheme = uri.split(':').next().unwrap_or_default();
                    if scheme.eq_ignore_ascii_case("spiffe") {
                        names.spiffe.push((*uri).to_owned());
                    }
                }
                GeneralName::DNSName(dns) => names.dns.push((*dns).to_owned()),
                GeneralName::Invalid(tag, _) => {
                    return Err(IdentityError::Malformed {
                        detail: format!("bad SAN entry with tag {tag}"),
                    });
                }
                _ => {}
            }
        }
        Ok(names)
    }
}

/// A SPIFFE id taken apart, with SPIFFE's own grammar (no query, fragment, port, user, percent
/// signs, empty or dot segments).
#[derive(Debug, PartialEq, Eq)]
struct SpiffeId {
    trust_domain: String,
    domain: Option<DomainId>,
    node: Option<NodeId>,
}

fn refused_uri(uri: &str, reason: &'static str) -> IdentityError {
    IdentityError::Uri {
        uri: uri.chars().take(256).collect(),
        reason,
    }
}

/// The trust domain and the path segments of a SPIFFE id, by SPIFFE's own grammar.
pub(crate) fn spiffe_parts(uri: &str) -> Result<(&str, Vec<&str>), IdentityError> {
    let refuse = |reason| refused_uri(uri, reason);
    if uri.len() > MAX_SPIFFE_ID_BYTES {
        return Err(refuse("longer than 2048 bytes"));
    }
    let rest = uri
        .strip_prefix("spiffe://")
        .ok_or_else(|| refuse("it must start with spiffe:// in lower case"))?;
    let (trust_domain, path) = match rest.split_once('/') {
        Some((trust_domain, path)) => (trust_domain, Some(path)),
        None => (rest, None),
    };
    let allowed =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
    if trust_domain.is_empty()
        || trust_domain.len() > MAX_TRUST_DOMAIN_BYTES
        || !trust_domain.bytes().all(allowed)
    {
        return Err(refuse("the trust domain may hold only a-z 0-9 . _ -"));
    }
    let Some(path) = path else {
        return Ok((trust_domain, Vec::new()));
    };
    let segments: Vec<&str> = path.split('/').collect();
    if segments.len() > MAX_PATH_SEGMENTS {
        return Err(refuse("more than 64 path segments"));
    }
    for segment in &segments {
        if segment.is_empty() || matches!(*segment, "." | "..") {
            return Err(refuse("empty and dot path segments are not allowed"));
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if !segment.bytes().all(allowed) {
            return Err(refuse("path segments may hold only A-Z a-z 0-9 . _ -"));
        }
    }
    Ok((trust_domain, segments))
}

impl SpiffeId {
    fn parse(uri: &str) -> Result<Self, IdentityError> {
        let refuse = |reason| refused_uri(uri, reason);
        let (trust_domain, segments) = spiffe_parts(uri)?;
        let mut id = Self {
            trust_domain: trust_domain.to_owned(),
            domain: None,
            node: None,
        };
        let mut segments = segments.into_iter();
        while let Some(segment) = segments.next() {
            if !matches!(segment, "domains" | "peers") {
                continue;
            }
            let value = segments
                .next()
                .ok_or_else(|| refuse("domains or peers without a value"))?;
            // `domains/peers/x` can be read in two ways; one reading only, or none.
            if matches!(value, "domains" | "peers") {
                return Err(refuse("domains and peers cannot be names themselves"));
            }
            if segment == "domains" {
                let name = DomainId::new(value)
                    .map_err(|_| refuse("the domain is not 1 to 63 of A-Z a-z 0-9 . _ -"))?;
                if id.domain.replace(name).is_some() {
                    return Err(refuse("it names two domains"));
                }
            } else {
                let name = NodeId::new(value)
                    .map_err(|_| refuse("the node id is not 1 to 63 of A-Z a-z 0-9 . _ -"))?;
                if id.node.replace(name).is_some() {
                    return Err(refuse("it names two nodes"));
                }
            }
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain_and_node(uri: &str) -> (Option<String>, Option<String>) {
        let id = SpiffeId::parse(uri).unwrap();
        (
            id.domain.map(|d| d.to_string()),
            id.node.map(|n| n.to_string()),
        )
    }

    fn some(domain: &str, node: &str) -> (Option<String>, Option<String>) {
        (Some(domain.to_owned()), Some(node.to_owned()))
    }

    #[test]
    fn the_pairs_may_stand_anywhere() {
        assert_eq!(
            domain_and_node("spiffe://td/domains/d/peers/p"),
            some("d", "p")
        );
        assert_eq!(
            domain_and_node("spiffe://td/peers/p/domains/d"),
            some("d", "p")
        );
        assert_eq!(
            domain_and_node("spiffe://example.org/x/domains/ship-7/y/z/peers/Node_1.a/t"),
            some("ship-7", "Node_1.a")
        );
        assert_eq!(domain_and_node("spiffe://td/workload"), (None, None));
        assert_eq!(domain_and_node("spiffe://td"), (None, None));
        assert_eq!(
            domain_and_node("spiffe://td/peers/p"),
            (None, Some("p".to_owned()))
        );
    }

    #[test]
    fn what_is_written_otherwise_is_refused() {
        for uri in [
            "SPIFFE://td/domains/d/peers/p",
            "spiffe:/td/domains/d/peers/p",
            "spiffe:///domains/d/peers/p",
            "spiffe://TD/domains/d/peers/p",
            "spiffe://td:1/domains/d/peers/p",
            "spiffe://u@td/domains/d/peers/p",
            "spiffe://td/domains/d/peers/p?x",
            "spiffe://td/domains/d/peers/p#x",
            "spiffe://td/domains/d/peers/p/",
            "spiffe://td/domains//peers/p",
            "spiffe://td/domains/d/../peers/p",
            "spiffe://td/domains/d/./peers/p",
            "spiffe://td/domains/%64/peers/p",
            "spiffe://td/domains/d/peers",
            "spiffe://td/domains/peers/peers/p",
            "spiffe://td/domains/d/domains/e/peers/p",
            "spiffe://td/domains/d/peers/p/peers/q",
            "spiffe://td/domains/d/domains/d/peers/p",
            "spiffe://td/domains/-d/peers/p",
            "spiffe://td/domains/d/peers/é",
        ] {
            let refused = SpiffeId::parse(uri).unwrap_err();
            assert_eq!(refused.code(), "IDENTITY_MALFORMED", "{uri}: {refused}");
        }
        let long = format!(
            "spiffe://td/domains/d/peers/p/{}",
            "x".repeat(MAX_SPIFFE_ID_BYTES)
        );
        assert!(SpiffeId::parse(&long).is_err());
        let deep = format!(
            "spiffe://td/domains/d/peers/p{}",
            "/x".repeat(MAX_PATH_SEGMENTS)
        );
        assert!(SpiffeId::parse(&deep).is_err());
        let name = "n".repeat(64);
        assert!(SpiffeId::parse(&format!("spiffe://td/domains/d/peers/{name}")).is_err());
        let name = "n".repeat(63);
        assert!(SpiffeId::parse(&format!("spiffe://td/domains/d/peers/{name}")).is_ok());
    }
}
