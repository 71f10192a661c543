//! What of two bundles a question needs, and the question that is asked first. Both are smaller than all that the bundles
//! hold, and neither proves anything that all of it would not.
//!
//! Policies that are in both bundles are *common*, the others each bundle's *own*. Suppose that the newer bundle
//! permits a request, and the older one does not. In the newer one nothing errs and no forbid matches, so of the common
//! policies none errs and no forbid matches, in the older bundle either. Then the older one fails to permit it for one of
//! three reasons: an own policy of it errs; an own forbid of it matches; or no permit of it matches, no common one
//! either, and what permits the request is an own permit of the newer bundle. So
//!
//! 1. *some policy of these bears on the request*: own permits of the newer bundle, own forbids and own erring policies
//!    of the older one ([`bearing`]). Where there are none of them, nothing is permitted newly, and nothing is asked.
//! 2. *A common policy whose scope excludes the scopes of all of these can be left out* ([`apart`]). On a request
//!    that one of these bears on, its scope does not match: it neither decides nor errs. And what the two
//!    smaller bundles decide differently, one of these bears on as well, by the same argument: the smaller question has
//!    the same answer as the whole one, in both directions.
//! 3. *Without any common policy the question is stronger, and falls into parts*: for each scope, an own permit of the
//!    newer bundle of that scope matches, no own forbid of it does, and no own permit of the older one of the same
//!    scope; and, as one part, an own policy of the older bundle errs, or an own forbid of it matches, where no own
//!    forbid of the newer one does. Whatever is newly permitted is an answer to one of them, by the three reasons above.
//!    `unsat` of all settles the matter. Any other word settles nothing: a model is worth asking both bundles about, and
//!    if it is none, the whole question is asked.
//!
//! The whole question is what is left if nothing is common; the tests hold the one against the other.

use std::collections::BTreeMap;

use cedar_policy::{Effect, EntityUid, Policy, PrincipalConstraint, ResourceConstraint};
use cedar_policy_symcc::{CompiledPolicy, never_errors_asserts, never_matches_asserts};

use crate::terms::is_false;

/// An own policy of one of the bundles, in terms.
pub(crate) struct Own<'p> {
    pub(crate) policy: &'p Policy,
    pub(crate) compiled: CompiledPolicy,
}

impl Own<'_> {
    pub(crate) fn may_match(&self) -> bool {
        !is_false(&never_matches_asserts(&self.compiled))
    }

    pub(crate) fn may_err(&self) -> bool {
        !is_false(&never_errors_asserts(&self.compiled))
    }

    fn may_be(&self, effect: Effect) -> bool {
        self.policy.effect() == effect && self.may_match()
    }
}

/// The policies without which nothing is permitted newly.
pub(crate) fn bearing<'p>(older: &[Own<'p>], newer: &[Own<'p>]) -> Vec<&'p Policy> {
    let permits = newer.iter().filter(|own| own.may_be(Effect::Permit));
    let denies = older
        .iter()
        .filter(|own| own.may_be(Effect::Forbid) || own.may_err());
    permits.chain(denies).map(|own| own.policy).collect()
}

/// Policies by their scopes, the action aside: it is the same for all that bear on one kind of request.
pub(crate) fn by_scope<'a, 'p>(
    policies: impl Iterator<Item = &'a Own<'p>>,
) -> BTreeMap<String, Vec<&'a Own<'p>>>
where
    'p: 'a,
{
    let mut scopes: BTreeMap<String, Vec<&Own<'_>>> = BTreeMap::new();
    for own in policies.filter(|own| own.may_match()) {
        let principal = own.policy.principal_constraint();
        let scope = format!("{principal:?} {:?}", own.policy.resource_constraint());
        scopes.entry(scope).or_default().push(own);
    }
    scopes
}

/// Whether no request matches the scopes of both. Scopes come first and never err, so what one of them excludes is not
/// looked at any further.
pub(crate) fn apart(one: &Policy, other: &Policy) -> bool {
    let differ = |one: Option<EntityUid>, other: Option<EntityUid>| matches!((one, other), (Some(one), Some(other)) if one != other);
    let principal = |policy: &Policy| match policy.principal_constraint() {
        PrincipalConstraint::Eq(uid) => Some(uid),
        _ => None,
    };
    let resource = |policy: &Policy| match policy.resource_constraint() {
        ResourceConstraint::Eq(uid) => Some(uid),
        _ => None,
    };
    differ(principal(one), principal(other)) || differ(resource(one), resource(other))
}

#[cfg(test)]
mod tests;
