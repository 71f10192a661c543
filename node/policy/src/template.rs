//! The files of a new bundle: something that builds, passes its tests and is worth changing.

use crate::archive::{MANIFEST, SCHEMA, is_name};
use crate::error::BundleError;
use crate::json;
use crate::manifest::rfc3339;

const SCHEMA_TEXT: &str = include_str!("../template/schema.cedarschema");
const POLICY_TEXT: &str = include_str!("../template/policies/base.cedar");
const TESTS_TEXT: &str = include_str!("../template/tests/base.json");

/// Files of a new bundle, path and bytes, with everything that agents commonly do declared in the
/// schema and a cautious policy: reading under `/srv` is allowed, secrets and `main` are guarded.
///
/// # Errors
/// [`BundleError::Format`] if name or domain are not names, or the time is none.
pub fn template(
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
                "actions": ["fs.read"],
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
    Ok(vec![
        (MANIFEST.to_owned(), manifest),
        (SCHEMA.to_owned(), SCHEMA_TEXT.into()),
        ("policies/base.cedar".to_owned(), POLICY_TEXT.into()),
        ("tests/base.json".to_owned(), TESTS_TEXT.into()),
    ])
}
