//! Why no policy permitted a request: of the permits that came nearest, what did not hold.
//!
//! This decides nothing. It looks at scopes first, as the index does, and evaluates the conditions of
//! the nearest policies one by one with Cedar's own authorizer.

use cedar_policy::{
    ActionConstraint, Authorizer, Decision, Effect, Entities, EntityUid, Policy, PolicySet,
    PrincipalConstraint, Request, ResourceConstraint,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::clip;
use crate::limits::{EXPLAINED_CONDITIONS_MAX, EXPLAINED_MAX, EXPLAINED_POLICIES_MAX};

/// A permit that did not apply, and what of it did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyNote {
    /// Its id.
    pub policy: String,
    /// What would have to hold for it to permit; never empty.
    pub unmet: Vec<Unmet>,
}

/// One part of a policy that does not hold for a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unmet {
    /// `principal`, `action` or `resource` of the scope, or `when` or `unless`.
    pub part: &'static str,
    /// The part as Cedar writes it.
    pub needs: String,
    /// Whether it errored instead of being false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub errored: bool,
}

/// The permits that come nearest to a request, nearest first.
pub(crate) fn nearest(
    policies: &PolicySet,
    authorizer: &Authorizer,
    request: &Request,
    entities: &Entities,
) -> Vec<PolicyNote> {
    let asked = (request.principal(), request.action(), request.resource());
    let (Some(principal), Some(action), Some(resource)) = asked else {
        return Vec::new();
    };
    let mut near: Vec<(Vec<Unmet>, &Policy)> = policies
        .policies()
        .filter(|policy| policy.effect() == Effect::Permit)
        .take(EXPLAINED_POLICIES_MAX)
        .map(|policy| {
            (
                scope(policy, [principal, action, resource], entities),
                policy,
            )
        })
        .collect();
    near.sort_by(|(a, one), (b, other)| (a.len(), one.id()).cmp(&(b.len(), other.id())));
    near.truncate(EXPLAINED_MAX);
    near.into_iter()
        .map(|(mut unmet, policy)| {
            if unmet.is_empty() {
                unmet = conditions(policy, authorizer, request, entities);
            }
            PolicyNote {
                policy: policy.id().to_string(),
                unmet,
            }
        })
        .filter(|note| !note.unmet.is_empty())
        .collect()
}

fn scope(policy: &Policy, of: [&EntityUid; 3], entities: &Entities) -> Vec<Unmet> {
    let [principal, action, resource] = of;
    let within =
        |uid: &EntityUid, group: &EntityUid| uid == group || entities.is_ancestor_of(group, uid);
    let mut unmet = Vec::new();
    let mut check = |part: &'static str, holds: bool, needs: String| {
        if !holds {
            unmet.push(Unmet {
                part,
                needs: clip(&needs),
                errored: false,
            });
        }
    };
    let (holds, needs) = match policy.principal_constraint() {
        PrincipalConstraint::Any => (true, String::new()),
        PrincipalConstraint::In(group) => (within(principal, &group), format!("in {group}")),
        PrincipalConstraint::Eq(uid) => (*principal == uid, format!("== {uid}")),
        PrincipalConstraint::Is(kind) => (*principal.type_name() == kind, format!("is {kind}")),
        PrincipalConstraint::IsIn(kind, group) => (
            *principal.type_name() == kind && within(principal, &group),
            format!("is {kind} in {group}"),
        ),
    };
    check("principal", holds, format!("principal {needs}"));
    let (holds, needs) = match policy.action_constraint() {
        ActionConstraint::Any => (true, String::new()),
        ActionConstraint::In(groups) => {
            let named: Vec<String> = groups.iter().map(ToString::to_string).collect();
            (
                groups.iter().any(|group| within(action, group)),
                format!("in [{}]", named.join(", ")),
            )
        }
        ActionConstraint::Eq(uid) => (*action == uid, format!("== {uid}")),
    };
    check("action", holds, format!("action {needs}"));
    let (holds, needs) = match policy.resource_constraint() {
        ResourceConstraint::Any => (true, String::new()),
        ResourceConstraint::In(group) => (within(resource, &group), format!("in {group}")),
        ResourceConstraint::Eq(uid) => (*resource == uid, format!("== {uid}")),
        ResourceConstraint::Is(kind) => (*resource.type_name() == kind, format!("is {kind}")),
        ResourceConstraint::IsIn(kind, group) => (
            *resource.type_name() == kind && within(resource, &group),
            format!("is {kind} in {group}"),
        ),
    };
    check("resource", holds, format!("resource {needs}"));
    unmet
}

/// Each condition alone, in a policy of its own whose scope is open.
fn conditions(
    policy: &Policy,
    authorizer: &Authorizer,
    request: &Request,
    entities: &Entities,
) -> Vec<Unmet> {
    let Ok(Value::Object(mut written)) = policy.to_json() else {
        return Vec::new();
    };
    let Some(Value::Array(conditions)) = written.remove("conditions") else {
        return Vec::new();
    };
    let mut unmet = Vec::new();
    for condition in conditions.into_iter().take(EXPLAINED_CONDITIONS_MAX) {
        let part = match condition.get("kind").and_then(Value::as_str) {
            Some("unless") => "unless",
            _ => "when",
        };
        let open = json!({"op": "All"});
        let alone = json!({
            "effect": "permit", "principal": open, "action": open, "resource": open,
            "conditions": [condition],
        });
        let Ok(alone) = Policy::from_json(None, alone) else {
            continue;
        };
        let text = alone.to_string();
        let needs = text
            .find(part)
            .and_then(|at| text.get(at..))
            .unwrap_or_default();
        let needs = clip(needs.trim().trim_end_matches(';'));
        let Ok(set) = PolicySet::from_policies([alone]) else {
            continue;
        };
        let response = authorizer.is_authorized(request, &set, entities);
        if response.decision() == Decision::Deny {
            unmet.push(Unmet {
                part,
                needs,
                errored: response.diagnostics().errors().next().is_some(),
            });
        }
    }
    unmet
}
