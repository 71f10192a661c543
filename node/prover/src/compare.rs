//! The part of the gate that needs no solver: limits of age, times, engines, entities.
//!
//! The fields of the manifest are named one by one: a new one does not compile until somebody has said what its
//! loosening is.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tidelock_policy::{
    BundleError, ClassLimits, ConsultTerms, Contents, ENTITIES, INPUT_SCHEMA, MANIFEST, Manifest,
    Role, SCHEMA, Validity, WhenExpired, WhenRestricted, WhenUnreachable,
};

use crate::limits::CREATED_AHEAD_S_MAX;
use crate::widening::{WhyUnproven, Widening};

/// What can be said of two archives without a solver; nothing where the policies have to be proved.
///
/// `now_unix_ms` is the trusted time of who asks: a bundle made in the future would not age.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn compare_limits(
    before: &[u8],
    after: &[u8],
    now_unix_ms: u64,
) -> Result<Option<Widening>, BundleError> {
    let (before, after) = (Side::read(before)?, Side::read(after)?);
    let looser = loosened(before.manifest(), after.manifest(), now_unix_ms);
    if !looser.is_empty() {
        return Ok(Some(Widening::Wider {
            looser,
            counterexample: None,
        }));
    }
    let cedar_alone = before.is_cedar_alone() && after.is_cedar_alone();
    if differs_in_time(before.manifest(), after.manifest())
        && (!cedar_alone || before.may_read_posture() || after.may_read_posture())
    {
        return Ok(Some(Widening::unproven(
            WhyUnproven::PostureRead,
            "the limits of an action class or the bundle's times differ, and policies may look at `tidelock` \
             in the context: change the limits and the policies in two bundles",
        )));
    }
    if before.deciding() == after.deciding() && before.manifest().engine == after.manifest().engine
    {
        return Ok(Some(Widening::NotWider));
    }
    if !cedar_alone {
        return Ok(Some(Widening::unproven(
            WhyUnproven::OtherEngine,
            "policies in Rego differ or stand beside those that do: only Cedar can be proved",
        )));
    }
    if before.entities()? != after.entities()? {
        return Ok(Some(Widening::unproven(
            WhyUnproven::Entities,
            format!(
                "{ENTITIES} differs: who is what, and member of what, is not a matter of proof"
            ),
        )));
    }
    Ok(None)
}

struct Side(Contents);

impl Side {
    fn read(archive: &[u8]) -> Result<Self, BundleError> {
        Contents::read(archive).map(Self)
    }

    fn manifest(&self) -> &Manifest {
        self.0.manifest()
    }

    fn is_cedar_alone(&self) -> bool {
        self.manifest().engine == "cedar"
    }

    /// The files that bear on a decision, all but the manifest, which is compared by its fields.
    fn deciding(&self) -> BTreeMap<&str, &[u8]> {
        let decides = |path: &str| path != MANIFEST && !path.starts_with("tests/");
        self.0.files().filter(|(path, _)| decides(path)).collect()
    }

    /// Whether a policy could look at what the node says of itself: only where a schema lets it in.
    fn may_read_posture(&self) -> bool {
        let says = |path: &str| {
            let text = self.0.file(path).map(String::from_utf8_lossy);
            // A name can be written in escapes too.
            text.is_some_and(|text| text.contains("tidelock") || text.contains('\\'))
        };
        says(SCHEMA) || says(INPUT_SCHEMA)
    }

    /// The entities by their names; the order in which they and their parents are listed says nothing.
    fn entities(&self) -> Result<BTreeMap<String, Value>, BundleError> {
        let mut entities = BTreeMap::new();
        for mut entity in self.0.entities()? {
            if let Some(parents) = entity.get_mut("parents").and_then(Value::as_array_mut) {
                parents.sort_by_key(ToString::to_string);
            }
            let name = entity.get("uid").map(ToString::to_string);
            entities.insert(name.unwrap_or_default(), entity);
        }
        Ok(entities)
    }
}

/// How long after its making a bundle ends; `None`: never.
fn lifetime_ms(manifest: &Manifest) -> Option<u64> {
    let end = manifest.validity.expires_unix_ms?;
    Some(end.saturating_sub(manifest.created_unix_ms))
}

/// What of the manifest lets more be permitted, in words. Times count from the making of each bundle:
/// that a newer bundle is younger is what it is made for.
fn loosened(before: &Manifest, after: &Manifest, now_unix_ms: u64) -> Vec<String> {
    let Manifest {
        // Names, positions and versions decide nothing; which engine and files is compared elsewhere.
        name: _,
        domain: _,
        epoch: _,
        version: _,
        engine: _,
        min_node_version: _,
        files: _,
        // Texts of what `validity` and `created_unix_ms` hold.
        created_at: _,
        role: _,
        not_before: _,
        expires_at: _,
        // What stands in for this bundle is the one that it replaced, which decided before.
        min_fallback_epoch: _,
        // Action by action, below.
        classes: _,
        default_class: _,
        created_unix_ms,
        validity,
    } = after;
    let Validity {
        // Which keys had to sign it is judged where signatures are.
        role: _,
        not_before_unix_ms,
        expires_unix_ms,
        when_expired,
    } = validity;
    let mut looser = Vec::new();
    let ahead_ms = created_unix_ms.saturating_sub(now_unix_ms);
    if ahead_ms > CREATED_AHEAD_S_MAX * 1000 {
        looser.push(format!(
            "created_at lies {} hours ahead, and until then the bundle does not age",
            ahead_ms / 3_600_000
        ));
    }
    if not_before_unix_ms.unwrap_or(0) < before.validity.not_before_unix_ms.unwrap_or(0) {
        looser.push("not_before is earlier".to_owned());
    }
    // Not counted from the making: what is granted for a day would be renewed every day.
    match (before.validity.expires_unix_ms, *expires_unix_ms) {
        (Some(_), None) => looser.push("it does not expire".to_owned()),
        (Some(old), Some(new)) if new > old => {
            looser.push(format!("it expires {} s later", (new - old) / 1000));
        }
        _ => {}
    }
    if (before.validity.when_expired, *when_expired) == (WhenExpired::Close, WhenExpired::Restrict)
    {
        looser.push("when_expired is `restrict`, not `close`".to_owned());
    }
    for (action, old, new) in classes(before, after) {
        let ClassLimits {
            actions: _,
            stale_after_s,
            restrict_after_s,
            close_after_s,
            when_restricted,
            consult,
        } = new;
        for (limit, old, new) in [
            ("stale_after_s", old.stale_after_s, *stale_after_s),
            ("restrict_after_s", old.restrict_after_s, *restrict_after_s),
            ("close_after_s", old.close_after_s, *close_after_s),
        ] {
            if new > old {
                looser.push(format!("{action}: {limit} {new}, not {old}"));
            }
        }
        if old.when_restricted == WhenRestricted::Deny && *when_restricted != WhenRestricted::Deny {
            looser.push(format!("{action}: when_restricted is no longer `deny`"));
        }
        looser.extend(
            less_consulted(old.consult.as_ref(), consult.as_ref())
                .into_iter()
                .map(|what| format!("{action}: {what}")),
        );
    }
    looser
}

/// What lets more pass of the decision point that has to agree. Nothing that comes of its absence but an
/// earlier answer permits anything, and how long it is waited for does not either.
fn less_consulted(before: Option<&ConsultTerms>, after: Option<&ConsultTerms>) -> Vec<String> {
    let Some(old) = before else {
        return Vec::new();
    };
    let Some(ConsultTerms {
        upstream,
        deadline_ms: _,
        when_unreachable,
        allow_lifetime_s,
        // What denied is remembered as a deny or as nothing, and nothing permits nothing.
        deny_lifetime_s: _,
    }) = after
    else {
        return vec![format!("{} no longer has to agree", old.upstream)];
    };
    let mut looser = Vec::new();
    if *upstream != old.upstream {
        looser.push(format!("{upstream} has to agree, not {}", old.upstream));
    }
    if *when_unreachable == WhenUnreachable::Cached
        && old.when_unreachable != WhenUnreachable::Cached
    {
        looser.push("consult.when_unreachable is `cached`".to_owned());
    } else if *allow_lifetime_s > old.allow_lifetime_s {
        looser.push(format!(
            "consult.allow_lifetime_s {allow_lifetime_s}, not {}",
            old.allow_lifetime_s
        ));
    }
    looser
}

/// The limits of each action before and after, of those that both bundles have a class for. Actions
/// that neither names have the default class of each.
fn classes<'m>(
    before: &'m Manifest,
    after: &'m Manifest,
) -> Vec<(String, &'m ClassLimits, &'m ClassLimits)> {
    let both = [before, after].into_iter();
    let named: BTreeSet<&String> = both
        .flat_map(|manifest| manifest.classes.values())
        .flat_map(|class| &class.actions)
        .collect();
    let default = |manifest: &'m Manifest| manifest.classes.get(manifest.default_class.as_ref()?);
    let mut found: Vec<_> = named
        .into_iter()
        .filter_map(|action| {
            let (_, old) = before.class_of(action)?;
            let (_, new) = after.class_of(action)?;
            Some((format!("action {action}"), old, new))
        })
        .collect();
    if let (Some(old), Some(new)) = (default(before), default(after)) {
        found.push(("default class".to_owned(), old, new));
    }
    found
}

/// Whether posture can differ between the two at the same age.
fn differs_in_time(before: &Manifest, after: &Manifest) -> bool {
    let of = |manifest: &Manifest| {
        (
            manifest.role == Role::BreakGlass,
            manifest.validity.not_before_unix_ms,
            lifetime_ms(manifest),
            manifest.validity.when_expired,
        )
    };
    let limits = |class: &ClassLimits| {
        (
            class.stale_after_s,
            class.restrict_after_s,
            class.close_after_s,
            class.when_restricted,
        )
    };
    of(before) != of(after)
        || classes(before, after)
            .into_iter()
            .any(|(_, old, new)| limits(old) != limits(new))
}
