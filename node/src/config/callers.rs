//! The parts of `[gateway]` that say who a caller is, beside tokens and user ids.

use std::path::PathBuf;

use tidelock_gateway::{OidcRule, Pattern, Scopes, limits};
use tidelock_interceptor::Principal;

use super::reader::Section;

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
            if issuers.iter().any(|o| o.principal_type == principal_type) {
                s.mistake(
                    "principal_type",
                    "is that of another issuer, who could then name this one's principals; give each its own",
                );
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
