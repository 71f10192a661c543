//! Who callers are, beside tokens and user ids: what the config names is read and joined.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::Path,
    sync::{Arc, PoisonError},
};

use arc_swap::ArcSwap;
use hyper::header::HeaderName;
use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use serde_json::json;
use tidelock_gateway::{
    AuthConfig, CallerTime, CertifiedCallers, GatewayHandle, Grant, Jwks, Moment, OidcIssuer,
    Proxies, Proxy, RefusedCertificate,
};
use tidelock_transport::{
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl, crls_in_file},
    svid::SpiffeId,
    tls::load_certified,
    verifier::{PeerRole, Trust, verify_chain},
};

use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{node::Node, papers::Ending};
use crate::{
    cli::Failure,
    clock::NodeClock,
    config::{GatewaySection, SpiffePrincipal, SpiffeRule, TlsSection, TrustDomainSection},
};

/// Callers are judged by the node's trusted time (INV-18).
pub(crate) fn time(clock: &Arc<NodeClock>) -> CallerTime {
    let clock = clock.clone();
    CallerTime::new(move || {
        let now = clock.trusted();
        Moment {
            unix_ms: now.unix_ms,
            suspect: now.suspect,
        }
    })
}

/// Adds the issuers of workload tokens, whose files of keys are read at start and on reload, and the
/// proxies that are believed in a header.
pub(super) fn with_others(
    mut auth: AuthConfig,
    section: &GatewaySection,
) -> Result<AuthConfig, Failure> {
    for hop in &section.identity_headers {
        let (kind, id) = hop.principal.split_once("::").unwrap_or_default();
        auth = auth.proxy(Proxy {
            hop_type: kind.to_owned(),
            hop_id: id.to_owned(),
            header: HeaderName::try_from(&hop.header)?,
            principal_type: hop.principal_type.clone(),
            allow: hop.allow.clone(),
        });
    }
    for oidc in &section.oidc {
        auth = auth.issuer(OidcIssuer {
            issuer: oidc.issuer.clone(),
            audience: oidc.audience.clone(),
            keys: Jwks::load(&oidc.jwks)?,
            principal_claim: oidc.principal_claim.clone(),
            principal_type: oidc.principal_type.clone(),
            rules: oidc.rules.clone(),
            lifetime_max_s: oidc.lifetime_max_s,
            leeway_s: oidc.leeway_s,
        });
    }
    Ok(auth)
}

/// The proxies that ask for the requests that they hold back, and how those are read.
pub(super) fn proxies(section: &GatewaySection) -> Proxies {
    let proxies = section.proxies.iter().filter_map(|proxy| {
        let (kind, id) = proxy.principal.split_once("::")?;
        Some(((kind.to_owned(), id.to_owned()), proxy.terms.clone()))
    });
    proxies.collect()
}

/// A fault in the files of the TLS door.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {message}")]
pub(crate) struct PapersFault {
    /// The key that names the file.
    pub(crate) key: &'static str,
    /// What is wrong with it.
    pub(crate) message: String,
}

impl PapersFault {
    fn at(key: &'static str, path: &Path, error: impl fmt::Display) -> Self {
        Self {
            key,
            message: format!("{}: {error}", path.display()),
        }
    }
}

/// Everything that is wrong with the files of the TLS door.
pub(crate) fn papers_mistakes(tls: &TlsSection) -> Vec<PapersFault> {
    let own = load_certified(&tls.certificate, &tls.key).err();
    let own = own.map(|error| PapersFault::at("gateway.tls.certificate", &tls.certificate, error));
    let domains = tls.trust_domains.iter().filter_map(|domain| {
        TrustedDomain::load(domain, 0, &CrlFloors::new(), &mut Vec::new()).err()
    });
    own.into_iter().chain(domains).collect()
}

/// The highest number of a CRL that was in force at the TLS door, by trust domain and issuer. Kept below
/// the root.
pub(crate) type CrlFloors = BTreeMap<String, BTreeMap<String, u64>>;

/// The floor that a CRL of this trust domain is below. INV-16: it does not count then, wherever it comes from
/// and over restarts too.
fn floor_above(floors: &CrlFloors, domain: &str, crl: &VerifiedCrl) -> Option<u64> {
    let floor = floors.get(domain)?.get(&crl.issuer().to_string())?;
    (crl.number() < *floor).then_some(*floor)
}

/// The TLS door's own papers, and whose it takes. Replaced as one.
pub(crate) struct DoorPapers {
    certified: Arc<CertifiedKey>,
    domains: Vec<TrustedDomain>,
    /// CRLs that were left out because a higher number has been in force.
    older: Vec<String>,
}

impl DoorPapers {
    /// Reads them; nothing where there is no TLS door.
    pub(super) fn of(
        section: &GatewaySection,
        now_unix_ms: u64,
        floors: &CrlFloors,
    ) -> Result<Option<Self>, Failure> {
        match &section.tls {
            None => Ok(None),
            Some(tls) => Ok(Some(Self::load(tls, now_unix_ms, floors)?)),
        }
    }

    /// Reads them. A CRL below the floor of its issuer does not count.
    pub(crate) fn load(
        tls: &TlsSection,
        now_unix_ms: u64,
        floors: &CrlFloors,
    ) -> Result<Self, Failure> {
        let mut older = Vec::new();
        let mut domains = Vec::new();
        for section in &tls.trust_domains {
            domains.push(TrustedDomain::load(
                section,
                now_unix_ms,
                floors,
                &mut older,
            )?);
        }
        Ok(Self {
            certified: load_certified(&tls.certificate, &tls.key)?,
            domains,
            older,
        })
    }

    /// When the door's certificate, each authority and each CRL ends.
    pub(crate) fn endings(&self, now_unix_ms: u64) -> Vec<Ending> {
        let own = self.certified.cert.first().and_then(|leaf| {
            let (_, leaf) = X509Certificate::from_der(leaf).ok()?;
            let ends_s = u64::try_from(leaf.validity().not_after.timestamp()).ok()?;
            Some(Ending {
                paper: "door certificate",
                name: "gateway.tls".to_owned(),
                ends_unix_ms: ends_s.saturating_mul(1_000),
            })
        });
        let domains = self.domains.iter().flat_map(|domain| {
            let authorities = domain.trust.authorities().iter();
            let authorities = authorities.map(|authority| Ending {
                paper: "door ca",
                name: format!("{}: {}", domain.name, authority.name()),
                ends_unix_ms: authority.not_after_unix_ms(),
            });
            let crls = domain.revocation.state().issuers(now_unix_ms);
            let crls = crls.into_iter().filter_map(|crl| {
                Some(Ending {
                    paper: "door crl",
                    name: format!("{}: {}", domain.name, crl.name),
                    ends_unix_ms: crl.next_update_unix_ms?,
                })
            });
            authorities.chain(crls).collect::<Vec<_>>()
        });
        own.into_iter().chain(domains).collect()
    }

    /// The highest numbers: those that are in force, and those that were before.
    // INV-16: a number from the future is not in force, and may be a mistake of the CA's clock.
    fn raise(&self, floors: &mut CrlFloors, now_unix_ms: u64) {
        for domain in &self.domains {
            for issuer in domain.revocation.state().issuers(now_unix_ms) {
                let Some(number) = issuer.number else {
                    continue;
                };
                let floors = floors.entry(domain.name.clone()).or_default();
                let floor = floors.entry(issuer.issuer.to_string()).or_default();
                *floor = number.max(*floor);
            }
        }
    }

    /// Judges a chain, leaf first.
    pub(crate) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        now_unix_ms: u64,
    ) -> Result<Grant, RefusedCertificate> {
        let refused = |code, message: String| RefusedCertificate { code, message };
        let leaf = chain
            .first()
            .ok_or_else(|| refused("CERT_ABSENT", "no certificate".to_owned()))?;
        let id =
            SpiffeId::of_leaf(leaf).map_err(|error| refused(error.code(), error.to_string()))?;
        let unknown = || {
            let message = format!("trust domain {} is not taken here", id.trust_domain());
            refused("TRUST_DOMAIN_UNKNOWN", message)
        };
        let mut domains = self.domains.iter();
        let domain = domains
            .find(|domain| domain.name == id.trust_domain())
            .ok_or_else(unknown)?;
        // The authorities of this trust domain only: no other can name its workloads.
        verify_chain(
            chain,
            PeerRole::Client,
            &domain.trust,
            &domain.revocation,
            now_unix_ms,
        )
        .map_err(|error| refused(error.code(), error.to_string()))?;
        let mut rules = domain.rules.iter();
        let rule = rules
            .find(|rule| rule.id.matches(id.as_str()))
            .ok_or_else(|| refused("CALLER_UNMAPPED", format!("no rule for {}", id.as_str())))?;
        let (kind, name) = match &rule.principal {
            SpiffePrincipal::Named(kind, name) => (kind, name.as_str()),
            SpiffePrincipal::OfType(kind) => (kind, id.as_str()),
        };
        Grant::new(kind, name, rule.scopes)
            .map_err(|error| refused("CALLER_PRINCIPAL", error.to_string()))
    }
}

/// One trust domain: its authorities, what they have revoked, and who its workloads are here.
struct TrustedDomain {
    name: String,
    trust: Trust,
    revocation: Revocation,
    rules: Vec<SpiffeRule>,
}

impl TrustedDomain {
    fn load(
        section: &TrustDomainSection,
        now_unix_ms: u64,
        floors: &CrlFloors,
        older: &mut Vec<String>,
    ) -> Result<Self, PapersFault> {
        const CA: &str = "gateway.tls.trust_domains.ca";
        const CRLS: &str = "gateway.tls.trust_domains.crls";
        let pem = fs::read(&section.ca).map_err(|e| PapersFault::at(CA, &section.ca, e))?;
        let trust = Trust::from_pem(&pem).map_err(|e| PapersFault::at(CA, &section.ca, e))?;
        let revocation = Revocation::new(RevocationState::new(RevocationOptions {
            grace_ms: 0,
            allow_missing: section.allow_without_crl,
        }));
        for path in &section.crls {
            let fault = |error: &dyn fmt::Display| PapersFault::at(CRLS, path, error);
            let bytes = fs::read(path).map_err(|e| fault(&e))?;
            for der in crls_in_file(&bytes).map_err(|e| fault(&e))? {
                let crl = VerifiedCrl::verify(&der, &trust).map_err(|e| fault(&e))?;
                // Its issuer then has no callers until a newer one is there.
                if let Some(floor) = floor_above(floors, &section.name, &crl) {
                    let (name, number) = (crl.issuer_name(), crl.number());
                    let path = path.display();
                    older.push(format!(
                        "{path}: CRL {number} of {name} is older than {floor}, which was in force: give the newest one"
                    ));
                    continue;
                }
                revocation.import(crl, now_unix_ms).map_err(|e| fault(&e))?;
            }
        }
        Ok(Self {
            name: section.name.clone(),
            trust,
            revocation,
            rules: section.rules.clone(),
        })
    }
}

/// Where the highest numbers of the door's CRLs lie below the root.
pub(super) const CRL_FLOORS_FILE: &str = "state/door-crls";

/// The callers of the TLS door.
pub(super) struct Certified {
    clock: Arc<NodeClock>,
    papers: ArcSwap<DoorPapers>,
}

/// What a running node holds of its gateway, to take other callers into use.
pub(super) struct Doorkeeper {
    pub(super) gateway: GatewayHandle,
    pub(super) certified: Option<Arc<Certified>>,
}

impl Doorkeeper {
    pub(super) fn endings(&self, now_unix_ms: u64) -> Vec<Ending> {
        let papers = self.certified.as_ref().map(|door| door.papers.load());
        papers.map_or_else(Vec::new, |papers| papers.endings(now_unix_ms))
    }

    /// Takes what the CRL files of the door have, by the authorities that it has already.
    pub(super) fn take_crls(&self, tls: &TlsSection, now_unix_ms: u64, floors: &CrlFloors) {
        let Some(door) = &self.certified else { return };
        for domain in &door.papers.load().domains {
            let mut sections = tls.trust_domains.iter();
            let section = sections.find(|section| section.name == domain.name);
            let files = section.into_iter().flat_map(|section| &section.crls);
            let read = files.filter_map(|path| crls_in_file(&fs::read(path).ok()?).ok());
            for der in read.flatten() {
                // What is faulty was told with the set that was refused.
                let Ok(crl) = VerifiedCrl::verify(&der, &domain.trust) else {
                    continue;
                };
                if floor_above(floors, &domain.name, &crl).is_none() {
                    let _ = domain.revocation.import(crl, now_unix_ms);
                }
            }
        }
    }
}

impl Node {
    /// The callers of the TLS door, where there is one.
    pub(super) fn open_door(
        &self,
        section: &GatewaySection,
    ) -> Result<Option<Arc<Certified>>, Failure> {
        let papers = DoorPapers::of(section, self.clock.unix_ms(), &self.crl_floors())?;
        Ok(papers.map(|papers| {
            self.tell_older(&papers);
            Arc::new(Certified {
                clock: self.clock.clone(),
                papers: ArcSwap::from_pointee(papers),
            })
        }))
    }

    /// Takes other papers of the TLS door into use.
    pub(super) fn take_door(&self, papers: Option<DoorPapers>) {
        let certified = self
            .doorkeeper
            .get()
            .and_then(|keeper| keeper.certified.as_ref());
        if let (Some(certified), Some(papers)) = (certified, papers) {
            self.tell_older(&papers);
            certified.replace(papers, &self.crl_floors());
        }
        self.keep_crl_floors();
    }

    fn tell_older(&self, papers: &DoorPapers) {
        for why in &papers.older {
            self.event("crl_not_loaded", json!({"why": why}));
        }
    }

    pub(super) fn crl_floors(&self) -> CrlFloors {
        let kept = self.kept_crl_floors.lock();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps the highest numbers of the door's CRLs for the next start.
    pub(super) fn keep_crl_floors(&self) {
        let Some(Doorkeeper {
            certified: Some(certified),
            ..
        }) = self.doorkeeper.get()
        else {
            return;
        };
        let mut kept = self
            .kept_crl_floors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut floors = kept.clone();
        let papers = certified.papers.load();
        papers.raise(&mut floors, self.clock.unix_ms());
        if *kept != floors && self.write_state(CRL_FLOORS_FILE, &floors) {
            *kept = floors;
        }
    }
}

impl Certified {
    /// Takes other papers into use, from the next handshake and request on. Of each issuer's CRLs the
    /// highest number goes on to hold, whatever the files say now.
    pub(super) fn replace(&self, mut papers: DoorPapers, floors: &CrlFloors) {
        let now_unix_ms = self.clock.unix_ms();
        let before = self.papers.load();
        for domain in &mut papers.domains {
            let Some(old) = before.domains.iter().find(|old| old.name == domain.name) else {
                continue;
            };
            let old = old.revocation.state();
            let mut state = RevocationState::clone(&domain.revocation.state());
            let crls = old.crls().into_iter();
            for crl in crls.filter(|crl| floor_above(floors, &domain.name, crl).is_none()) {
                // INV-16: one that is older than the file's is refused here and missed by nobody.
                if let Ok((next, _)) = state.with_crl(crl, now_unix_ms) {
                    state = next;
                }
            }
            let revoked_keys = old.revoked_keys().iter().copied();
            domain.revocation = Revocation::new(state.with_revoked_keys(revoked_keys));
        }
        self.papers.store(Arc::new(papers));
    }
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certified").finish_non_exhaustive()
    }
}

impl CertifiedCallers for Certified {
    fn certificate(&self) -> Arc<CertifiedKey> {
        self.papers.load().certified.clone()
    }

    fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<Grant, RefusedCertificate> {
        let now = self.clock.trusted();
        if now.suspect {
            // INV-18: nothing that has an end is believed.
            return Err(RefusedCertificate {
                code: "CLOCK_SUSPECT",
                message: "the node's clock is in doubt".to_owned(),
            });
        }
        self.papers.load().judge(chain, now.unix_ms)
    }
}
