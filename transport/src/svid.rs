//! X.509-SVIDs: certificates of workloads that carry a SPIFFE id, as callers of a node present them.
//!
//! It reads names and constraints of a leaf only. Whether the certificate may be believed is
//! [`crate::verifier::verify_chain`]'s question, with the authorities of its trust domain.

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

use crate::identity::{self, IdentityError, spiffe_parts};

/// The SPIFFE id of a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiffeId {
    uri: String,
    trust_domain_bytes: usize,
}

impl SpiffeId {
    /// Reads the one URI name of a leaf, and holds the leaf against what SPIFFE asks of an SVID: no
    /// authority, made for signatures, and a path.
    ///
    /// # Errors
    /// [`IdentityError`], with what is wrong.
    pub fn of_leaf(leaf: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let malformed = |detail: &str| IdentityError::Malformed {
            detail: detail.to_owned(),
        };
        let parsed = identity::parse(leaf)?;
        if parsed.is_ca() {
            return Err(malformed("a certificate of an authority is no caller's"));
        }
        let usage = parsed
            .key_usage()
            .map_err(|_| malformed("bad key usage"))?
            .ok_or_else(|| malformed("no key usage; an SVID has digitalSignature"))?
            .value;
        if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
            return Err(malformed(
                "the key usage must have digitalSignature, and neither keyCertSign nor cRLSign",
            ));
        }
        let names = parsed
            .subject_alternative_name()
            .map_err(|_| malformed("bad SAN extension"))?;
        let mut uris = Vec::new();
        for name in names.iter().flat_map(|san| &san.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::Invalid(..) => return Err(malformed("bad SAN entry")),
                _ => {}
            }
        }
        match uris.as_slice() {
            [] => Err(malformed("no URI name; an SVID has one, spiffe://…")),
            [uri] => Self::parse(uri),
            several => Err(IdentityError::Ambiguous {
                count: several.len(),
            }),
        }
    }

    /// Reads the id of a workload: a trust domain and a path.
    ///
    /// # Errors
    /// [`IdentityError::Uri`].
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        let (trust_domain, path) = spiffe_parts(uri)?;
        if path.is_empty() {
            return Err(IdentityError::Uri {
                uri: uri.to_owned(),
                reason: "the id of a workload has a path",
            });
        }
        Ok(Self {
            uri: uri.to_owned(),
            trust_domain_bytes: trust_domain.len(),
        })
    }

    /// The whole id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        let rest = self.uri.strip_prefix("spiffe://").unwrap_or_default();
        rest.get(..self.trust_domain_bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_a_trust_domain_and_a_path() {
        let id = SpiffeId::parse("spiffe://site.example/ns/prod/peers").unwrap();
        assert_eq!(id.trust_domain(), "site.example");
        assert_eq!(id.as_str(), "spiffe://site.example/ns/prod/peers");
        for bad in [
            "spiffe://site.example",
            "spiffe://site.example/",
            "spiffe:///ns",
            "https://site.example/ns",
            "SPIFFE://site.example/ns",
            "spiffe://Site.example/ns",
            "spiffe://site.example:1/ns",
            "spiffe://u@site.example/ns",
            "spiffe://site.example/ns?x",
            "spiffe://site.example/ns#x",
            "spiffe://site.example/ns/",
            "spiffe://site.example//ns",
            "spiffe://site.example/ns/../x",
            "spiffe://site.example/n%73",
        ] {
            let refused = SpiffeId::parse(bad).unwrap_err();
            assert_eq!(refused.code(), "IDENTITY_MALFORMED", "{bad}");
        }
        let long = format!("spiffe://td/{}", "x".repeat(2048));
        assert!(SpiffeId::parse(&long).is_err());
    }
}
