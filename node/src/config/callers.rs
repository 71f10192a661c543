//! The parts of `[gateway]` that say who a caller is, beside tokens and user ids.

use std::{net::SocketAddr, path::PathBuf};

use tidelock_gateway::{OidcRule, Pattern, Scopes, TokenSet, limits};
use tidelock_interceptor::Principal;
use tidelock_transport::svid::SpiffeId;

use super::{GatewaySection, reader::Section};

/// The keys of sources that stand in more than one place here.
const OIDC: &str = "oidc.principal_type";
/// See [`OIDC`].
const SPIFFE: &str = "tls.trust_domains.rules.principal_type";
/// The type of callers without credentials.
pub(crate) const ANONYMOUS_TYPE: &str = "Service";
/// The type of the local operator's principal, which nobody else may have.
const OPERATOR_TYPE: &str = "Operator";
/// Longest time for which a workload token may be valid, seconds: a day.
const LIFETIME_MAX_S: u64 = 86_400;

/// One issuer of workload tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct OidcSection {
    /// The `iss` of its tokens.
    pub issuer: String,
    /// What must be in their `aud`.
    pub audience: String,
    /// The file with its public keys.
    pub jwks: PathBuf,
    /// The claim that names the principal.
    pub principal_claim: String,
    /// The type of its principals, of no other issuer.
    pub principal_type: String,
    /// Longest time from `iat` to `exp`, seconds.
    pub lifetime_max_s: u64,
    /// How far its clock may be off, seconds.
    pub leeway_s: u64,
    /// Who may do what.
    pub rules: Vec<OidcRule>,
}

/// `[gateway.tls]`: the door for callers on other machines.
#[derive(Debug, Clone, PartialEq)]
pub struct TlsSection {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The door's own certificate chain, PEM, leaf first.
    pub certificate: PathBuf,
    /// Its key, mode 0600 or tighter.
    pub key: PathBuf,
    /// Handshakes that one address may begin in a second, and four times as many at once.
    pub handshakes_per_second: u32,
    /// Whose certificates are taken.
    pub trust_domains: Vec<TrustDomainSection>,
}

/// One SPIFFE trust domain whose workloads may call.
#[derive(Debug, Clone, PartialEq)]
pub struct TrustDomainSection {
    /// Its name, as in `spiffe://NAME/…`.
    pub name: String,
    /// PEM, its authorities.
    pub ca: PathBuf,
    /// Its CRLs, PEM or DER.
    pub crls: Vec<PathBuf>,
    /// Take its certificates without any CRL (loud, off by default).
    pub allow_without_crl: bool,
    /// Who may do what.
    pub rules: Vec<SpiffeRule>,
}

/// What some workloads of a trust domain are here, and may do.
#[derive(Debug, Clone, PartialEq)]
pub struct SpiffeRule {
    /// A SPIFFE id, or the beginning of some up to a slash.
    pub id: Pattern,
    /// Who they are.
    pub principal: SpiffePrincipal,
    /// What they may do.
    pub scopes: Scopes,
}

/// The principal that a workload is.
#[derive(Debug, Clone, PartialEq)]
pub enum SpiffePrincipal {
    /// This one, by type and id.
    Named(String, String),
    /// One of this type, whose id is the SPIFFE id.
    OfType(String),
}

/// Somebody whose word a principal's name is, and what may be named.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Stating<'a> {
    /// The key of the config, below `gateway`.
    key: &'static str,
    /// Who, in words.
    who: String,
    /// The type of those who are named.
    kind: &'a str,
}

/// The types that two sources of identity could both name principals of, and the config does not share:
/// where in `[gateway]`, and what. A source that names any principal of a type is kept apart from every
/// other; principals that the operator has named one by one are his own word, and may have several ways
/// in.
pub(crate) fn shared_types(
    section: &GatewaySection,
    tokens: Option<&TokenSet>,
) -> Vec<(&'static str, String)> {
    let (open, named) = (open_sources(section), named_sources(section, tokens));
    let mut found = Vec::new();
    for (at, one) in open.iter().enumerate() {
        let is_shared = section.allow_shared_principal_types.iter();
        let may_share = is_shared.clone().any(|kind| kind == one.kind);
        let others = open.iter().take(at).chain(&named);
        for other in others.filter(|other| other.kind == one.kind && other.who != one.who) {
            // Of issuers none is the operator's: these are never shared.
            let issuers = one.key == OIDC && other.key == OIDC;
            if may_share && !issuers {
                continue;
            }
            let way_out = match issuers {
                true => "give each its own type",
                false => {
                    "give each its own type, or list it in gateway.allow_shared_principal_types"
                }
            };
            found.push((
                one.key,
                format!(
                    "{} and {} could both name principals of the type `{}`, and each those of the other: {way_out}",
                    one.who, other.who, one.kind
                ),
            ));
        }
    }
    found
}

/// Whoever names principals of a type by ids that come from outside.
fn open_sources(section: &GatewaySection) -> Vec<Stating<'_>> {
    let issuers = section.oidc.iter().map(|issuer| Stating {
        key: OIDC,
        who: format!("the issuer {}", issuer.issuer),
        kind: &issuer.principal_type,
    });
    let domains = section.tls.iter().flat_map(|tls| &tls.trust_domains);
    let domains = domains.flat_map(|domain| {
        domain
            .rules
            .iter()
            .filter_map(|rule| match &rule.principal {
                SpiffePrincipal::OfType(kind) => Some(Stating {
                    key: SPIFFE,
                    who: format!("the trust domain {}", domain.name),
                    kind,
                }),
                SpiffePrincipal::Named(..) => None,
            })
    });
    let hops = section.identity_headers.iter().map(|hop| Stating {
        key: "identity_headers.principal_type",
        who: format!("the header {} of {}", hop.header, hop.principal),
        kind: &hop.principal_type,
    });
    let proxies = section.proxies.iter().filter_map(|proxy| {
        Some(Stating {
            key: "proxies.subject_type",
            who: format!("the checks of {}", proxy.principal),
            kind: proxy.terms.stated_type()?,
        })
    });
    distinct(issuers.chain(domains).chain(hops).chain(proxies))
}

/// Principals that the operator has named one by one.
fn named_sources<'a>(
    section: &'a GatewaySection,
    tokens: Option<&'a TokenSet>,
) -> Vec<Stating<'a>> {
    let kind_of = |principal: &'a str| principal.split_once("::").map(|(kind, _)| kind);
    let users = section.users.iter().filter_map(|user| {
        Some(Stating {
            key: "users.principal",
            who: "gateway.users".to_owned(),
            kind: kind_of(&user.principal)?,
        })
    });
    let domains = section.tls.iter().flat_map(|tls| &tls.trust_domains);
    let domains = domains.flat_map(|domain| {
        domain
            .rules
            .iter()
            .filter_map(|rule| match &rule.principal {
                SpiffePrincipal::Named(kind, _) => Some(Stating {
                    key: SPIFFE,
                    who: format!("the trust domain {}", domain.name),
                    kind,
                }),
                SpiffePrincipal::OfType(_) => None,
            })
    });
    let grants = tokens.into_iter().flat_map(TokenSet::grants);
    let tokens = grants.map(|grant| Stating {
        key: "tokens",
        who: "the token file".to_owned(),
        kind: grant.principal_type(),
    });
    let anonymous = section.allow_anonymous_loopback.then(|| Stating {
        key: "allow_anonymous_loopback",
        who: "gateway.allow_anonymous_loopback".to_owned(),
        kind: ANONYMOUS_TYPE,
    });
    distinct(users.chain(domains).chain(tokens).chain(anonymous))
}

/// Each once: two rules of one trust domain are one source.
fn distinct<'a>(all: impl Iterator<Item = Stating<'a>>) -> Vec<Stating<'a>> {
    let mut all: Vec<Stating<'_>> = all.collect();
    all.sort();
    all.dedup();
    all
}

/// Reads `[gateway.tls]`.
pub(super) fn tls(gateway: &mut Section<'_>) -> Option<TlsSection> {
    let mut s = gateway.optional_section("tls")?;
    let listen = s.address("listen");
    let certificate = s.required_path("certificate");
    let key = s.required_path("key");
    let handshakes_per_second = s.number32(
        "handshakes_per_second",
        limits::HANDSHAKES_DEFAULT.per_second,
        1..=10_000,
    );
    let mut trust_domains: Vec<TrustDomainSection> = Vec::new();
    let mut listed = 0;
    for mut domain in s.tables("trust_domains") {
        listed += 1;
        let name = domain.parsed("name", |name| {
            SpiffeId::parse(&format!("spiffe://{name}/x"))
                .map(|id| id.trust_domain().to_owned())
                .map_err(|error| error.to_string())
        });
        let ca = domain.required_path("ca");
        let crls = domain.paths("crls");
        let allow_without_crl = domain.boolean("allow_without_crl", false);
        if crls.is_empty() && !allow_without_crl {
            domain.mistake(
                "crls",
                "names no file: nobody could be known to be unrevoked; give the domain's CRLs, or set \
                 allow_without_crl = true where its certificates live for hours only",
            );
        }
        if !crls.is_empty() && allow_without_crl {
            domain.mistake(
                "allow_without_crl",
                "makes no sense together with `crls`; keep one",
            );
        }
        let rules = spiffe_rules(&mut domain, name.as_deref());
        if let (Some(name), Some(ca)) = (name, ca) {
            if trust_domains.iter().any(|other| other.name == name) {
                domain.mistake("name", "is listed twice; keep one entry per trust domain");
            }
            trust_domains.push(TrustDomainSection {
                name,
                ca,
                crls,
                allow_without_crl,
                rules,
            });
        }
        domain.finish();
    }
    if listed == 0 || listed > limits::ISSUERS_MAX {
        s.mistake(
            "trust_domains",
            format!(
                "1 to {} entries [[gateway.tls.trust_domains]] say whose certificates are taken",
                limits::ISSUERS_MAX
            ),
        );
    }
    s.finish();
    Some(TlsSection {
        listen: listen?,
        certificate: certificate?,
        key: key?,
        handshakes_per_second,
        trust_domains,
    })
}

fn spiffe_rules(domain: &mut Section<'_>, name: Option<&str>) -> Vec<SpiffeRule> {
    let mut rules = Vec::new();
    let mut listed = 0;
    for mut s in domain.tables("rules") {
        listed += 1;
        if s.required_string("id").is_none() {
            s.finish();
            continue;
        }
        let id = pattern(&mut s, "id");
        if let (Some(id), Some(name)) = (&id, name) {
            let (text, prefix) = id.parts();
            let inside = text.starts_with(&format!("spiffe://{name}/"));
            let whole = match prefix {
                true => text.ends_with('/'),
                false => SpiffeId::parse(text).is_ok(),
            };
            if !inside || !whole {
                s.mistake(
                    "id",
                    format!(
                        "must be an id of this trust domain, or the beginning of some: \
                         \"spiffe://{name}/ns/prod/sa/x\" or \"spiffe://{name}/ns/prod/*\""
                    ),
                );
            }
        }
        let principal = match (
            s.optional_string("principal"),
            s.optional_string("principal_type"),
        ) {
            (Some(named), None) => {
                let (kind, id) = named.split_once("::").unwrap_or_default();
                let known = Principal::new(kind, id).map_err(|error| error.to_string());
                match given_type(kind).and(known) {
                    Ok(_) => Some(SpiffePrincipal::Named(kind.to_owned(), id.to_owned())),
                    Err(error) => {
                        let form = "must have the form Type::id, as in Agent::ops-1";
                        s.mistake("principal", format!("{form}: {error}"));
                        None
                    }
                }
            }
            (None, Some(kind)) => given_type(&kind)
                .map(SpiffePrincipal::OfType)
                .map_err(|error| s.mistake("principal_type", error))
                .ok(),
            _ => {
                s.mistake(
                    "principal",
                    "either `principal` (Type::id, who these workloads are) or `principal_type` (their \
                     SPIFFE ids are the ids) is required",
                );
                None
            }
        };
        let scopes = scopes(&mut s);
        if let (Some(id), Some(principal), Some(scopes)) = (id, principal, scopes) {
            rules.push(SpiffeRule {
                id,
                principal,
                scopes,
            });
        }
        s.finish();
    }
    if listed == 0 || listed > limits::RULES_MAX {
        domain.mistake(
            "rules",
            format!(
                "1 to {} rules [[gateway.tls.trust_domains.rules]] say which workload is who; without one nobody is let in",
                limits::RULES_MAX
            ),
        );
    }
    rules
}

/// Headers in which nobody can be named: they have a meaning of their own.
const HEADERS_TAKEN: [&str; 9] = [
    "authorization",
    "connection",
    "content-digest",
    "content-length",
    "content-type",
    "cookie",
    "host",
    "signature",
    "signature-input",
];

/// A proxy that is believed in a header.
#[derive(Debug, Clone, PartialEq)]
pub struct IdentityHeaderSection {
    /// `Type::id` of the principal as which the proxy authenticates.
    pub principal: String,
    /// The header, in lower case.
    pub header: String,
    /// The type of those whom it names.
    pub principal_type: String,
    /// Whom it may name.
    pub allow: Vec<Pattern>,
}

/// Reads every `[[gateway.identity_headers]]`.
pub(super) fn identity_headers(gateway: &mut Section<'_>) -> Vec<IdentityHeaderSection> {
    let mut hops: Vec<IdentityHeaderSection> = Vec::new();
    for mut s in gateway.tables("identity_headers") {
        let principal = s.parsed("principal", |text| {
            let (kind, id) = text.split_once("::").unwrap_or_default();
            match Principal::new(kind, id) {
                Ok(_) => Ok(text.to_owned()),
                Err(error) => Err(format!(
                    "must have the form Type::id, as in Service::envoy-1: {error}"
                )),
            }
        });
        let header = s.parsed("header", |name| {
            let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            match plain && !HEADERS_TAKEN.contains(&name) {
                true => Ok(name.to_owned()),
                false => Err("must be the name of a header in lower case that has no other meaning, as in x-forwarded-user"),
            }
        });
        let principal_type = s.parsed("principal_type", given_type);
        let allow = s.list("allow", Pattern::parse);
        if allow.is_empty() || allow.len() > limits::RULES_MAX {
            s.mistake(
                "allow",
                format!(
                    "1 to {} names or beginnings of names say for whom this proxy may ask",
                    limits::RULES_MAX
                ),
            );
        }
        if let (Some(principal), Some(header), Some(principal_type)) =
            (principal, header, principal_type)
        {
            if hops.iter().any(|other| other.principal == principal) {
                s.mistake("principal", "is listed twice; keep one entry per proxy");
            }
            hops.push(IdentityHeaderSection {
                principal,
                header,
                principal_type,
                allow,
            });
        }
        s.finish();
    }
    hops
}

/// Reads every `[[gateway.oidc]]`.
pub(super) fn oidc(gateway: &mut Section<'_>) -> Vec<OidcSection> {
    let mut issuers: Vec<OidcSection> = Vec::new();
    let mut listed = 0;
    for mut s in gateway.tables("oidc") {
        listed += 1;
        if listed > limits::ISSUERS_MAX {
            s.mistake(
                "issuer",
                format!("more than {} issuers", limits::ISSUERS_MAX),
            );
            break;
        }
        let issuer = s.required_string("issuer");
        let audience = s.required_string("audience");
        let jwks = s.required_path("jwks");
        let principal_claim = s
            .optional_string("principal_claim")
            .unwrap_or_else(|| "sub".to_owned());
        let principal_type = s.parsed("principal_type", given_type);
        let lifetime_max_s = s.integer("lifetime_max_s", 3_600, 1..=LIFETIME_MAX_S);
        let leeway_s = s.integer("leeway_s", 30, 0..=300);
        let rules = rules(&mut s);
        if let (Some(issuer), Some(audience), Some(jwks), Some(principal_type)) =
            (issuer, audience, jwks, principal_type)
        {
            if issuers.iter().any(|other| other.issuer == issuer) {
                s.mistake("issuer", "is listed twice; keep one entry per issuer");
            }
            issuers.push(OidcSection {
                issuer,
                audience,
                jwks,
                principal_claim,
                principal_type,
                lifetime_max_s,
                leeway_s,
                rules,
            });
        }
        s.finish();
    }
    issuers
}

fn rules(issuer: &mut Section<'_>) -> Vec<OidcRule> {
    let mut rules = Vec::new();
    let mut listed = 0;
    for mut s in issuer.tables("rules") {
        listed += 1;
        let subject = pattern(&mut s, "subject");
        let claim = s.optional_string("claim");
        let value = pattern(&mut s, "value");
        if claim.is_some() != value.is_some() {
            s.mistake(
                "claim",
                "`claim` and `value` belong together; give both or none",
            );
        }
        if subject.is_none() && claim.is_none() {
            s.mistake(
                "subject",
                "is required where no `claim` is named; \"*\" is everybody of this issuer",
            );
        }
        if let Some(scopes) = scopes(&mut s) {
            rules.push(OidcRule {
                subject,
                claim: claim.zip(value),
                scopes,
            });
        }
        s.finish();
    }
    if listed == 0 || listed > limits::RULES_MAX {
        issuer.mistake(
            "rules",
            format!(
                "1 to {} rules [[gateway.oidc.rules]] say who of this issuer may do what; without one nobody is let in",
                limits::RULES_MAX
            ),
        );
    }
    rules
}

/// A type of principals that others than the node itself name.
pub(super) fn given_type(kind: &str) -> Result<String, String> {
    if kind == OPERATOR_TYPE {
        return Err(
            "`Operator` is the local operator; give these principals another type".to_owned(),
        );
    }
    match Principal::new(kind, "x") {
        Ok(_) => Ok(kind.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn pattern(s: &mut Section<'_>, key: &'static str) -> Option<Pattern> {
    let text = s.optional_string(key)?;
    Pattern::parse(&text)
        .map_err(|error| s.mistake(key, error.to_string()))
        .ok()
}

/// The scopes that a rule grants. There is no default: what is granted is written down.
pub(super) fn scopes(s: &mut Section<'_>) -> Option<Scopes> {
    let Some(names) = s.strings("scopes") else {
        s.mistake(
            "scopes",
            "is required: a list of \"decide\", \"explain\", \"act_as\"; [] for none",
        );
        return None;
    };
    let mut scopes = Scopes::default();
    for name in &names {
        if !scopes.add(name) {
            s.mistake(
                "scopes",
                format!("`{name}` is no scope: there are \"decide\", \"explain\" and \"act_as\""),
            );
        }
    }
    Some(scopes)
}
