//! The manifest: what a bundle says of itself, and the limits of each action class.

use std::collections::{BTreeMap, BTreeSet};

use semver::Version;
use serde::{Deserialize, Serialize};

use crate::archive::{Files, MANIFEST, is_name};
use crate::consult::ConsultTerms;
use crate::error::BundleError;
use crate::json;
use crate::limits::{AGE_S_MAX, CLASSES_MAX, EPOCH_MAX, RESERVED_NAMES};
use crate::trust::Role;
use crate::validity::{Validity, WhenExpired};

/// What posture `restricted` does to a class of actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenRestricted {
    /// Every action of the class is denied. For anything with effects.
    Deny,
    /// The policies go on deciding, and each decision gets a record of the short form (ruling 19).
    Degrade,
    /// The policies go on deciding as ever, with full records. Loud: `doctor` shows it.
    Continue,
}

/// A class of actions and how old the bundle may get for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassLimits {
    /// Actions of the class, by name.
    pub actions: Vec<String>,
    /// From this age on the posture is `stale`.
    pub stale_after_s: u64,
    /// From this age on the posture is `restricted`.
    pub restrict_after_s: u64,
    /// From this age on the posture is `closed`.
    pub close_after_s: u64,
    /// What posture `restricted` means for this class.
    pub when_restricted: WhenRestricted,
    /// The decision point that has to agree to what the policies permit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consult: Option<ConsultTerms>,
}

/// The checked manifest of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// Name of the bundle; one domain may have several.
    pub name: String,
    /// Domain that the bundle is for.
    pub domain: String,
    /// Position in the bundle's forward-only sequence, from 1.
    pub epoch: u64,
    /// Version for people, semver.
    pub version: String,
    /// Engine that evaluates the policies: `cedar`, `rego` or `cedar+rego`.
    pub engine: String,
    /// Oldest node version that may run the bundle, semver.
    pub min_node_version: String,
    /// When the authority made the bundle, RFC 3339. Its age counts from here.
    pub created_at: String,
    /// [`created_at`](Self::created_at) in unix milliseconds.
    #[serde(skip)]
    pub created_unix_ms: u64,
    /// The role whose keys must have signed it. `policy` is not written.
    #[serde(skip_serializing_if = "is_policy")]
    pub role: Role,
    /// From when on it may decide, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    /// Until when it may decide, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// Role and times as the node judges them.
    #[serde(skip)]
    pub validity: Validity,
    /// Oldest epoch that may serve as last known good while this epoch is the floor.
    pub min_fallback_epoch: u64,
    /// Action classes by name.
    pub classes: BTreeMap<String, ClassLimits>,
    /// Class of the actions that no class names. Without it every action must be named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_class: Option<String>,
    /// SHA-256 (`sha256:` and 64 hex digits) of every other file, by path.
    pub files: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Raw {
    format: u64,
    name: String,
    domain: String,
    epoch: u64,
    version: String,
    engine: String,
    min_node_version: String,
    created_at: String,
    #[serde(default)]
    role: Role,
    #[serde(default)]
    not_before: Option<String>,
    #[serde(default)]
    expires_at: Option<String>,
    #[serde(default)]
    when_expired: WhenExpired,
    min_fallback_epoch: u64,
    classes: BTreeMap<String, ClassLimits>,
    #[serde(default)]
    default_class: Option<String>,
    files: BTreeMap<String, String>,
}

impl Manifest {
    /// The manifest among the files of an archive.
    pub(crate) fn of(files: &Files) -> Result<Self, BundleError> {
        let bytes = files
            .get(MANIFEST)
            .ok_or_else(|| BundleError::format(format!("the bundle has no {MANIFEST}")))?;
        Self::parse(bytes)
    }

    /// Reads and checks a manifest; every mistake in it is reported, not only the first.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let raw: Raw = json::parse_as(bytes)
            .map_err(|error| BundleError::format(format!("{MANIFEST}: {error}")))?;
        let created_unix_ms = unix_ms(&raw.created_at);
        let mut problems = problems(&raw, created_unix_ms);
        let validity = Validity {
            role: raw.role,
            not_before_unix_ms: raw.not_before.as_deref().and_then(unix_ms),
            expires_unix_ms: raw.expires_at.as_deref().and_then(unix_ms),
            when_expired: raw.when_expired,
        };
        problems.extend(validity.problems(created_unix_ms.unwrap_or_default()));
        if !problems.is_empty() {
            return Err(BundleError::format(format!(
                "{MANIFEST}: {}",
                problems.join("; ")
            )));
        }
        Ok(Self {
            name: raw.name,
            domain: raw.domain,
            epoch: raw.epoch,
            version: raw.version,
            engine: raw.engine,
            min_node_version: raw.min_node_version,
            created_at: raw.created_at,
            created_unix_ms: created_unix_ms.unwrap_or_default(),
            role: raw.role,
            not_before: raw.not_before,
            expires_at: raw.expires_at,
            validity,
            min_fallback_epoch: raw.min_fallback_epoch,
            classes: raw.classes,
            default_class: raw.default_class,
            files: raw.files,
        })
    }

    /// Class of an action: the one that names it, else the default class.
    #[must_use]
    pub fn class_of(&self, action: &str) -> Option<(&str, &ClassLimits)> {
        self.classes
            .iter()
            .find(|(_, class)| class.actions.iter().any(|named| named == action))
            .or_else(|| {
                let default = self.default_class.as_ref()?;
                self.classes.get_key_value(default)
            })
            .map(|(name, class)| (name.as_str(), class))
    }

    /// Checks the classes against the actions that the schema lets be judged: each in exactly one
    /// class, and no class naming an action that does not exist.
    pub(crate) fn check_actions(&self, judged: &BTreeSet<String>) -> Result<(), BundleError> {
        let refuse = |message: String| Err(BundleError::schema(MANIFEST, message));
        for (name, class) in &self.classes {
            for action in &class.actions {
                if !judged.contains(action) {
                    return refuse(format!(
                        "class `{name}` names action `{action}`, which the schema does not apply \
                         to any principal and resource"
                    ));
                }
            }
        }
        for action in judged {
            if self.class_of(action).is_none() {
                return refuse(format!(
                    "action `{action}` is in no class: name it in one or set `default_class`"
                ));
            }
        }
        Ok(())
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_policy(role: &Role) -> bool {
    *role == Role::Policy
}

/// The instant of an RFC 3339 text in unix milliseconds, if it lies in this era.
pub(crate) fn unix_ms(text: &str) -> Option<u64> {
    let at: jiff::Timestamp = text.parse().ok()?;
    u64::try_from(at.as_millisecond()).ok()
}

/// An instant as RFC 3339 text with milliseconds only where it has them.
pub(crate) fn rfc3339(unix_ms: u64) -> Result<String, BundleError> {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map(|at| at.to_string())
        .ok_or_else(|| BundleError::format(format!("{unix_ms} ms is not a time of the calendar")))
}

fn problems(raw: &Raw, created_unix_ms: Option<u64>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |good: bool, problem: &dyn Fn() -> String| {
        if !good {
            problems.push(problem());
        }
    };
    check(raw.format == 1, &|| {
        format!("format {} is not known, this node reads 1", raw.format)
    });
    for (key, value) in [("name", &raw.name), ("domain", &raw.domain)] {
        check(is_name(value), &|| {
            format!("{key} must be 1 to 63 of letters, digits, `.`, `_`, `-`, not `{value}`")
        });
    }
    check(!raw.name.contains(RESERVED_NAMES), &|| {
        format!("name must not contain `{RESERVED_NAMES}`")
    });
    check((1..=EPOCH_MAX).contains(&raw.epoch), &|| {
        format!("epoch must be 1 to {EPOCH_MAX}")
    });
    check(raw.min_fallback_epoch <= raw.epoch, &|| {
        format!(
            "min_fallback_epoch {} is above epoch {}",
            raw.min_fallback_epoch, raw.epoch
        )
    });
    for (key, value) in [
        ("version", &raw.version),
        ("min_node_version", &raw.min_node_version),
    ] {
        check(Version::parse(value).is_ok(), &|| {
            format!("{key} must be a semantic version such as 1.4.0, not `{value}`")
        });
    }
    check(created_unix_ms.is_some(), &|| {
        format!(
            "created_at must be a time such as 2026-01-31T12:00:00Z, not `{}`",
            raw.created_at
        )
    });
    for (key, value) in [
        ("not_before", &raw.not_before),
        ("expires_at", &raw.expires_at),
    ] {
        check(
            value.as_deref().is_none_or(|text| unix_ms(text).is_some()),
            &|| format!("{key} must be a time such as 2026-01-31T12:00:00Z"),
        );
    }
    check((1..=CLASSES_MAX).contains(&raw.classes.len()), &|| {
        format!("classes must hold 1 to {CLASSES_MAX} classes")
    });
    if let Some(default) = &raw.default_class {
        check(raw.classes.contains_key(default), &|| {
            format!("default_class `{default}` is not one of classes")
        });
    }
    let mut seen = BTreeMap::new();
    for (name, class) in &raw.classes {
        check(is_name(name), &|| {
            format!("class name `{name}` must be 1 to 63 of letters, digits, `.`, `_`, `-`")
        });
        check(
            class.stale_after_s >= 1
                && class.stale_after_s <= class.restrict_after_s
                && class.restrict_after_s <= class.close_after_s
                && class.close_after_s <= AGE_S_MAX,
            &|| {
                format!(
                    "class `{name}` needs 1 <= stale_after_s <= restrict_after_s <= close_after_s \
                     <= {AGE_S_MAX}"
                )
            },
        );
        for problem in class.consult.iter().flat_map(|terms| terms.problems(name)) {
            check(false, &|| problem.clone());
        }
        for action in &class.actions {
            if let Some(other) = seen.insert(action, name) {
                check(false, &|| {
                    format!("action `{action}` is in class `{other}` and in `{name}`")
                });
            }
        }
    }
    problems
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::consult::WhenUnreachable;

    pub(crate) fn valid() -> Value {
        json!({
            "format": 1, "name": "base", "domain": "site-1", "epoch": 3, "version": "1.0.0",
            "engine": "cedar", "min_node_version": "0.1.0", "created_at": "2026-01-31T12:00:00Z",
            "min_fallback_epoch": 2, "role": "policy", "not_before": "2026-01-31T12:00:00Z",
            "expires_at": "2027-01-31T12:00:00Z", "when_expired": "close",
            "classes": {
                "read": {"actions": ["fs.read"], "stale_after_s": 10, "restrict_after_s": 20,
                         "close_after_s": 30, "when_restricted": "continue"},
                "effect": {"actions": [], "stale_after_s": 1, "restrict_after_s": 2,
                           "close_after_s": 3, "when_restricted": "deny",
                           "consult": {"upstream": "authority", "deadline_ms": 500,
                                       "when_unreachable": "cached", "allow_lifetime_s": 3600,
                                       "deny_lifetime_s": 60}},
            },
            "default_class": "effect",
            "files": {},
        })
    }

    fn parse(value: &Value) -> Result<Manifest, BundleError> {
        Manifest::parse(value.to_string().as_bytes())
    }

    #[test]
    fn a_valid_manifest_is_read() {
        let manifest = parse(&valid()).unwrap();
        assert_eq!(manifest.created_unix_ms, 1_769_860_800_000);
        assert_eq!(manifest.class_of("fs.read").unwrap().0, "read");
        assert_eq!(manifest.class_of("other").unwrap().0, "effect");
        let actions = ["fs.read", "other"].map(str::to_owned).into();
        assert_eq!(manifest.check_actions(&actions), Ok(()));
    }

    #[test]
    fn a_class_is_referred_to_a_decision_point_only_where_it_says_so_and_fails_closed() {
        let mut value = valid();
        assert!(parse(&value).unwrap().classes["read"].consult.is_none());
        value["classes"]["effect"]["consult"] = json!({"upstream": "a", "deadline_ms": 5_000});
        let manifest = parse(&value).unwrap();
        let terms = manifest.classes["effect"].consult.as_ref().unwrap();
        assert_eq!(terms.when_unreachable, WhenUnreachable::Deny);
        assert_eq!((terms.allow_lifetime_s, terms.deny_lifetime_s), (0, 0));
    }

    #[test]
    fn each_wrong_value_is_refused_by_name() {
        let long = "x".repeat(64);
        for (pointer, wrong, word) in [
            ("/format", json!(2), "format 2"),
            ("/name", json!("../x"), "name must"),
            ("/name", json!(long), "name must"),
            ("/domain", json!(""), "domain must"),
            ("/epoch", json!(0), "epoch must"),
            ("/epoch", json!(1_u64 << 53), "epoch must"),
            ("/epoch", json!(-1), "invalid value"),
            ("/epoch", json!(1.0), "invalid type"),
            ("/epoch", json!("3"), "invalid type"),
            ("/min_fallback_epoch", json!(4), "above epoch 3"),
            ("/version", json!("1"), "version must"),
            ("/min_node_version", json!("new"), "min_node_version must"),
            ("/created_at", json!("yesterday"), "created_at must"),
            (
                "/created_at",
                json!("1969-12-31T23:59:59Z"),
                "created_at must",
            ),
            ("/name", json!("a.tidelock.b"), "name must not contain"),
            ("/role", json!("trust"), "role must be"),
            ("/role", json!("root"), "unknown variant"),
            ("/role", json!("break-glass"), "at most 72 hours"),
            ("/not_before", json!("soon"), "not_before must"),
            ("/expires_at", json!("never"), "expires_at must"),
            (
                "/expires_at",
                json!("2026-01-31T12:00:00Z"),
                "expires_at must lie",
            ),
            ("/when_expired", json!("allow"), "unknown variant"),
            ("/classes", json!({}), "classes must"),
            (
                "/classes/read/stale_after_s",
                json!(0),
                "class `read` needs",
            ),
            (
                "/classes/read/stale_after_s",
                json!(21),
                "class `read` needs",
            ),
            (
                "/classes/read/restrict_after_s",
                json!(31),
                "class `read` needs",
            ),
            (
                "/classes/read/close_after_s",
                json!(AGE_S_MAX + 1),
                "class `read` needs",
            ),
            (
                "/classes/read/when_restricted",
                json!("maybe"),
                "unknown variant",
            ),
            (
                "/classes/effect/actions",
                json!(["fs.read"]),
                "is in class `effect` and in `read`",
            ),
            (
                "/classes/effect/actions",
                json!(["x", "x"]),
                "is in class `effect` and in `effect`",
            ),
            ("/default_class", json!("none"), "default_class `none`"),
            (
                "/classes/effect/consult/upstream",
                json!("a b"),
                "class `effect`: consult.upstream",
            ),
            (
                "/classes/effect/consult/deadline_ms",
                json!(0),
                "class `effect`: consult.deadline_ms",
            ),
            (
                "/classes/effect/consult/deadline_ms",
                json!(5_001),
                "class `effect`: consult.deadline_ms",
            ),
            (
                "/classes/effect/consult/when_unreachable",
                json!("allow"),
                "unknown variant",
            ),
            (
                "/classes/effect/consult/when_unreachable",
                json!("deny"),
                "go together",
            ),
            (
                "/classes/effect/consult/allow_lifetime_s",
                json!(0),
                "go together",
            ),
            (
                "/classes/effect/consult/allow_lifetime_s",
                json!(2_592_001),
                "consult.allow_lifetime_s must",
            ),
            (
                "/classes/effect/consult/deny_lifetime_s",
                json!(2_592_001),
                "consult.deny_lifetime_s must",
            ),
            (
                "/classes/effect/consult",
                json!({"upstream": "a"}),
                "missing field",
            ),
            (
                "/classes/effect/consult",
                json!({"upstream": "a", "deadline_ms": 9, "url": "https://a"}),
                "unknown field `url`",
            ),
        ] {
            let mut value = valid();
            *value.pointer_mut(pointer).unwrap() = wrong;
            let error = parse(&value).unwrap_err();
            assert_eq!(error.code(), "BUNDLE_FORMAT");
            assert!(error.to_string().contains(word), "{pointer}: {error}");
        }
    }

    #[test]
    fn unknown_missing_and_duplicate_keys_are_refused() {
        let mut unknown = valid();
        unknown["colour"] = json!("red");
        assert!(
            parse(&unknown)
                .unwrap_err()
                .to_string()
                .contains("unknown field `colour`")
        );
        let mut inner = valid();
        inner["classes"]["read"]["colour"] = json!(1);
        assert!(
            parse(&inner)
                .unwrap_err()
                .to_string()
                .contains("unknown field `colour`")
        );
        let optional = [
            "default_class",
            "role",
            "not_before",
            "expires_at",
            "when_expired",
        ];
        let keys: Vec<String> = valid().as_object().unwrap().keys().cloned().collect();
        for key in keys.iter().filter(|key| !optional.contains(&key.as_str())) {
            let mut missing = valid();
            missing.as_object_mut().unwrap().remove(key);
            assert!(
                parse(&missing)
                    .unwrap_err()
                    .to_string()
                    .contains("missing field"),
                "{key}"
            );
        }
        for (once, twice) in [
            ("\"epoch\":3", "\"epoch\":3,\"epoch\":3"),
            (
                "\"stale_after_s\":10",
                "\"stale_after_s\":10,\"stale_after_s\":10",
            ),
            ("\"files\":{}", "\"files\":{\"a\":\"\",\"a\":\"\"}"),
        ] {
            let text = valid().to_string();
            assert!(text.contains(once), "{text}");
            let error = Manifest::parse(text.replace(once, twice).as_bytes()).unwrap_err();
            assert!(error.to_string().contains("stands twice"), "{error}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let mut value = valid();
        value["name"] = json!(" ");
        value["version"] = json!("x");
        value["created_at"] = json!("x");
        let text = parse(&value).unwrap_err().to_string();
        for word in ["name must", "version must", "created_at must"] {
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn classes_and_schema_must_agree() {
        let mut value = valid();
        let manifest = parse(&value).unwrap();
        let actions: BTreeSet<String> = ["fs.write".to_owned()].into();
        let error = manifest.check_actions(&actions).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_SCHEMA");
        assert!(
            error.to_string().contains("names action `fs.read`"),
            "{error}"
        );
        value.as_object_mut().unwrap().remove("default_class");
        let manifest = parse(&value).unwrap();
        let actions: BTreeSet<String> = ["fs.read", "fs.write"].map(str::to_owned).into();
        let error = manifest.check_actions(&actions).unwrap_err();
        assert!(
            error.to_string().contains("`fs.write` is in no class"),
            "{error}"
        );
    }

    #[test]
    fn times_are_written_as_they_are_read() {
        for at in [0, 1_769_860_800_000, 1_769_860_800_123] {
            assert_eq!(unix_ms(&rfc3339(at).unwrap()), Some(at));
        }
        assert!(rfc3339(u64::MAX).is_err());
    }
}
