//! What a bundle changes against another: for the person who decides whether it shall decide.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::archive::{self, ENTITIES, Files, LINKS, MANIFEST, SCHEMA};
use crate::bundle::on_stack;
use crate::cedar;
use crate::error::BundleError;
use crate::limits::{COMPILE_STACK_BYTES, DIFFERENCES_LISTED_MAX};
use crate::manifest::{ClassLimits, Manifest};

/// Names that came, went, or stand for something else, each list sorted and at most
/// [`DIFFERENCES_LISTED_MAX`] long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Only in the newer bundle.
    pub added: Vec<String>,
    /// Only in the older one.
    pub removed: Vec<String>,
    /// In both, and not the same.
    pub changed: Vec<String>,
    /// How many more there are of all three together.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_listed: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Changes {
    fn between<T: PartialEq>(before: &BTreeMap<String, T>, after: &BTreeMap<String, T>) -> Self {
        let mut changes = Self::default();
        for name in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
            let list = match (before.get(name), after.get(name)) {
                (None, _) => &mut changes.added,
                (_, None) => &mut changes.removed,
                (Some(old), Some(new)) if old != new => &mut changes.changed,
                _ => continue,
            };
            if list.len() < DIFFERENCES_LISTED_MAX {
                list.push(name.clone());
            } else {
                changes.not_listed += 1;
            }
        }
        changes
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.removed.is_empty() && self.changed.is_empty()
    }
}

/// What one bundle changes against another. Equal parts are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Members of the manifest that differ, each with the value before and after, without the
    /// digests of the files.
    pub manifest: BTreeMap<String, (serde_json::Value, serde_json::Value)>,
    /// Cedar policies by id, made from templates or not.
    pub policies: Changes,
    /// Texts of the policies that came, went or changed: before and after. As many as are listed.
    pub texts: BTreeMap<String, (Option<String>, Option<String>)>,
    /// Action classes: their limits, or which actions they have.
    pub classes: Changes,
    /// Files beside these: schema, entities, links, tests, policies of other engines.
    pub files: Changes,
}

impl Difference {
    /// Whether the two bundles are the same but for who signed them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

struct Side {
    manifest: BTreeMap<String, serde_json::Value>,
    classes: BTreeMap<String, ClassLimits>,
    policies: BTreeMap<String, String>,
    files: Files,
}

impl Side {
    fn read(archive: &[u8]) -> Result<Self, BundleError> {
        let files = archive::read(archive)?;
        let manifest = Manifest::of(&files)?;
        let classes = manifest.classes.clone();
        let policies = cedar::policy_texts(&files)?;
        let members = serde_json::to_value(&manifest)
            .map_err(|error| BundleError::format(format!("{MANIFEST}: {error}")))?;
        let manifest = members
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| !matches!(name.as_str(), "files" | "classes"))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        Ok(Self {
            manifest,
            classes,
            policies,
            files,
        })
    }
}

/// What `after` changes against `before`, two archives. Nothing is said about who signed them.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn difference(before: &[u8], after: &[u8]) -> Result<Difference, BundleError> {
    // Policies are parsed on a stack of the size that they are compiled on.
    on_stack(COMPILE_STACK_BYTES, || compare(before, after))
}

fn compare(before: &[u8], after: &[u8]) -> Result<Difference, BundleError> {
    let (before, after) = (Side::read(before)?, Side::read(after)?);
    let members: BTreeSet<&String> = before
        .manifest
        .keys()
        .chain(after.manifest.keys())
        .collect();
    let manifest = members
        .into_iter()
        .filter_map(|name| {
            let old = before.manifest.get(name).cloned().unwrap_or_default();
            let new = after.manifest.get(name).cloned().unwrap_or_default();
            (old != new).then(|| (name.clone(), (old, new)))
        })
        .collect();
    let policies = Changes::between(&before.policies, &after.policies);
    let texts = [&policies.added, &policies.removed, &policies.changed]
        .into_iter()
        .flatten()
        .map(|id| {
            let text = |side: &Side| side.policies.get(id).cloned();
            (id.clone(), (text(&before), text(&after)))
        })
        .collect();
    let others = |side: &Side| -> BTreeMap<String, Vec<u8>> {
        let other = |path: &str| {
            matches!(path, SCHEMA | ENTITIES | LINKS)
                || !(path == MANIFEST || path.ends_with(".cedar"))
        };
        let files = side.files.iter().filter(|(path, _)| other(path));
        files
            .map(|(path, bytes)| (path.clone(), bytes.clone()))
            .collect()
    };
    Ok(Difference {
        manifest,
        policies,
        texts,
        classes: Changes::between(&before.classes, &after.classes),
        files: Changes::between(&others(&before), &others(&after)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{BundleBuilder, template};

    fn archive(epoch: u64, change: impl Fn(&mut Value), policies: &str) -> Vec<u8> {
        let files = template("site", "harbour", 0).unwrap();
        let mut builder = BundleBuilder::new().epoch(epoch);
        for (path, mut bytes) in files {
            if path == MANIFEST {
                let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
                change(&mut manifest);
                bytes = serde_json::to_vec(&manifest).unwrap();
            }
            builder = builder.file(&path, bytes);
        }
        builder
            .file("policies/base.cedar", policies.into())
            .build()
            .unwrap()
    }

    const READ: &str = "@id(\"read\") permit(principal, action, resource);";
    const HALT: &str = "@id(\"halt\") forbid(principal, action, resource);";

    #[test]
    fn a_bundle_differs_from_itself_in_nothing() {
        let one = archive(1, |_| {}, READ);
        assert!(difference(&one, &one).unwrap().is_empty());
    }

    #[test]
    fn every_part_that_differs_is_named() {
        let before = archive(1, |_| {}, &format!("{READ}{HALT}"));
        let narrower = READ.replace("principal,", "principal is Agent,");
        let more = "@id(\"more\") permit(principal, action, resource);";
        let class = |manifest: &mut Value| {
            let classes = manifest["classes"].as_object_mut().unwrap();
            let first = classes.values_mut().next().unwrap();
            first["close_after_s"] = json!(first["close_after_s"].as_u64().unwrap() + 1);
        };
        let after = archive(2, class, &format!("{narrower}{more}"));
        let found = difference(&before, &after).unwrap();
        assert_eq!(found.policies.added, ["more"]);
        assert_eq!(found.policies.removed, ["halt"]);
        assert_eq!(found.policies.changed, ["read"]);
        assert_eq!(found.texts["halt"].1, None);
        let (old, new) = &found.texts["read"];
        assert!(!old.as_deref().unwrap().contains("Agent"));
        assert!(new.as_deref().unwrap().contains("Agent"));
        assert_eq!(found.classes.changed.len(), 1);
        assert_eq!(found.manifest["epoch"], (json!(1), json!(2)));
        assert_eq!(found.manifest.len(), 1);
        assert!(found.files.is_empty());
        let back = difference(&after, &before).unwrap();
        assert_eq!(back.policies.added, ["halt"]);
        assert_eq!(back.texts["read"], (new.clone(), old.clone()));
    }

    #[test]
    fn lists_are_bounded_and_say_what_they_leave_out() {
        let many = |count: usize| -> BTreeMap<String, usize> {
            (0..count).map(|n| (format!("{n:05}"), n)).collect()
        };
        let found = Changes::between(&many(0), &many(DIFFERENCES_LISTED_MAX + 3));
        assert_eq!(found.added.len(), DIFFERENCES_LISTED_MAX);
        assert_eq!(found.not_listed, 3);
    }
}
