//! The files of a new bundle: something that builds, passes its tests and is worth changing.

use crate::archive::{ENTITIES, MANIFEST, SCHEMA, is_name};
use crate::error::BundleError;
use crate::json;
use crate::manifest::rfc3339;

/// What a new bundle begins from. Each loads, passes its own tests, and its tests cover its policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starter {
    /// An agent that changes code: files, URLs, programs, repositories, tools.
    CodingAgent,
    /// An agent that keeps machines running: hosts, units, logs, diagnostics; with entities.
    OperationsAgent,
    /// Services that call each other: who may call which URL; with groups.
    ServiceMesh,
}

impl Starter {
    /// Every starter.
    pub const ALL: [Self; 3] = [Self::CodingAgent, Self::OperationsAgent, Self::ServiceMesh];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CodingAgent => "coding-agent",
            Self::OperationsAgent => "operations-agent",
            Self::ServiceMesh => "service-mesh",
        }
    }

    /// Actions that only look: their class lives longer without news from the authority.
    fn looks(self) -> &'static [&'static str] {
        match self {
            Self::CodingAgent => &["fs.read"],
            Self::OperationsAgent => &["fs.read", "unit.status"],
            Self::ServiceMesh => &["net.get"],
        }
    }

    fn texts(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::CodingAgent => &[
                (
                    SCHEMA,
                    include_str!("../starters/coding-agent/schema.cedarschema"),
                ),
                (
                    "policies/base.cedar",
                    include_str!("../starters/coding-agent/policies/base.cedar"),
                ),
                (
                    "tests/base.json",
                    include_str!("../starters/coding-agent/tests/base.json"),
                ),
            ],
            Self::OperationsAgent => &[
                (
                    SCHEMA,
                    include_str!("../starters/operations-agent/schema.cedarschema"),
                ),
                (
                    ENTITIES,
                    include_str!("../starters/operations-agent/entities.json"),
                ),
                (
                    "policies/base.cedar",
                    include_str!("../starters/operations-agent/policies/base.cedar"),
                ),
                (
                    "tests/base.json",
                    include_str!("../starters/operations-agent/tests/base.json"),
                ),
            ],
            Self::ServiceMesh => &[
                (
                    SCHEMA,
                    include_str!("../starters/service-mesh/schema.cedarschema"),
                ),
                (
                    ENTITIES,
                    include_str!("../starters/service-mesh/entities.json"),
                ),
                (
                    "policies/base.cedar",
                    include_str!("../starters/service-mesh/policies/base.cedar"),
                ),
                (
                    "tests/base.json",
                    include_str!("../starters/service-mesh/tests/base.json"),
                ),
            ],
        }
    }
}

/// The files of the starter for coding agents: see [`starter`].
///
/// # Errors
/// As [`starter`].
pub fn template(
    name: &str,
    domain: &str,
    created_unix_ms: u64,
) -> Result<Vec<(String, Vec<u8>)>, BundleError> {
    starter(Starter::CodingAgent, name, domain, created_unix_ms)
}

/// Files of a new bundle, path and bytes: the manifest first.
///
/// # Errors
/// [`BundleError::Format`] if name or domain are not names, or the time is none.
pub fn starter(
    starter: Starter,
    name: &str,
    domain: &str,
    created_unix_ms: u64,
) -> Result<Vec<(String, Vec<u8>)>, BundleError> {
    for (what, value) in [("name", name), ("domain", domain)] {
        if !is_name(value) {
            return Err(BundleError::format(format!(
                "{what} must be 1 to 63 of letters, digits, `.`, `_`, `-`, not `{value}`"
            )));
        }
    }
    let day = 24 * 3600;
    let manifest = serde_json::json!({
        "format": 1,
        "name": name,
        "domain": domain,
        "epoch": 1,
        "version": "0.1.0",
        "engine": "cedar",
        "min_node_version": "0.1.0",
        "created_at": rfc3339(created_unix_ms)?,
        "min_fallback_epoch": 0,
        "classes": {
            "observe": {
                "actions": starter.looks(),
                "stale_after_s": 7 * day,
                "restrict_after_s": 30 * day,
                "close_after_s": 180 * day,
                "when_restricted": "degrade",
            },
            "effect": {
                "actions": [],
                "stale_after_s": 7 * day,
                "restrict_after_s": 30 * day,
                "close_after_s": 90 * day,
                "when_restricted": "deny",
            },
        },
        "default_class": "effect",
        "files": {},
    });
    let manifest = json::to_sorted_bytes(&manifest)
        .map_err(|error| BundleError::format(format!("{MANIFEST}: {error}")))?;
    let texts = starter.texts().iter();
    let texts = texts.map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec()));
    Ok(std::iter::once((MANIFEST.to_owned(), manifest))
        .chain(texts)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Authority;
    use crate::{BundleBuilder, run_tests};

    #[test]
    fn every_starter_loads_passes_its_tests_and_covers_its_policies() {
        let authority = Authority::new("harbour", 1).unwrap();
        for kind in Starter::ALL {
            let builder = starter(kind, "site", "harbour", 1_769_860_800_000)
                .unwrap()
                .into_iter()
                .fold(BundleBuilder::new(), |builder, (path, bytes)| {
                    builder.file(&path, bytes)
                });
            let report = run_tests(&builder.clone().build().unwrap()).unwrap();
            assert_eq!(report.failures, [], "{}", kind.name());
            assert_eq!(report.uncovered, Some(Vec::new()), "{}", kind.name());
            let bundle = authority.load(builder).unwrap();
            assert_eq!(bundle.warnings(), Vec::<String>::new(), "{}", kind.name());
        }
    }
}
