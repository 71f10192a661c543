//! Who callers are, beside tokens and user ids: what the config names is read and joined.

use tidelock_gateway::{AuthConfig, CallerTime, Jwks, Moment, OidcIssuer};

use crate::{cli::Failure, clock::NodeClock, config::GatewaySection};
use std::sync::Arc;

/// Callers are judged by the node's trusted time (INV-18).
pub(super) fn time(clock: &Arc<NodeClock>) -> CallerTime {
    let clock = clock.clone();
    CallerTime::new(move || {
        let now = clock.trusted();
        Moment {
            unix_ms: now.unix_ms,
            suspect: now.suspect,
        }
    })
}

/// Adds the issuers of workload tokens; their files of keys are read at start and on reload.
pub(super) fn with_issuers(
    mut auth: AuthConfig,
    section: &GatewaySection,
) -> Result<AuthConfig, Failure> {
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
