//! The scope index: finds the policies whose scope a request meets, and evaluates no others.
//!
//! A policy is its scope (`principal`, `action` and `resource` constraints) and its conditions, in
//! this order, joined by `&&`. A scope cannot err: it compares and looks up ancestors. So a policy
//! whose scope is false is false without a diagnostic, and leaving it out changes neither decision
//! nor reasons nor errors. Policies of equal scope lie together in one prepared policy set, the
//! sets whose scope a request meets are asked one by one, and their answers are joined as Cedar
//! joins the answers of policies: a forbid wins, then a permit, then nothing; errors add up.
//!
//! The work of a request grows with the policies that it meets, and with the smaller of the number
//! of its ancestors and of the groups that policies name; not with the policies of the bundle.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use cedar_policy::{
    ActionConstraint, Authorizer, Decision, Entities, EntityTypeName, EntityUid, Policy, PolicyId,
    PolicySet, PolicySetError, PrincipalConstraint, Request, ResourceConstraint, Response,
};

use crate::limits::INDEX_ENTRIES_MAX;

/// Setting up an evaluation costs about as much as this many policies whose scope is false.
const SET_COST_POLICIES: usize = 4;

/// A policy set, prepared so that a request costs the policies that its scope meets.
pub struct ScopeIndex {
    /// Every policy, for requests that meet nearly all sets, and for actions that are not indexed.
    all: PolicySet,
    policies: usize,
    /// Policies of equal scope.
    sets: Vec<PolicySet>,
    actions: HashMap<EntityUid, Arc<ByPrincipal>>,
}

/// What the policies say together, in the terms of Cedar's response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// The decision, errors not considered.
    pub decision: Decision,
    /// Ids of the policies that determined it, sorted.
    pub reasons: Vec<PolicyId>,
    /// Ids of the policies that errored with what they say, sorted.
    pub errors: Vec<(PolicyId, String)>,
}

type ByPrincipal = Part<Part<usize>>;

/// One constraint of a scope, of the principal or the resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Constraint {
    Any,
    Is(EntityTypeName),
    Eq(EntityUid),
    In(EntityUid),
    IsIn(EntityTypeName, EntityUid),
}

impl From<PrincipalConstraint> for Constraint {
    fn from(constraint: PrincipalConstraint) -> Self {
        match constraint {
            PrincipalConstraint::Any => Self::Any,
            PrincipalConstraint::Is(kind) => Self::Is(kind),
            PrincipalConstraint::Eq(uid) => Self::Eq(uid),
            PrincipalConstraint::In(uid) => Self::In(uid),
            PrincipalConstraint::IsIn(kind, uid) => Self::IsIn(kind, uid),
        }
    }
}

impl From<ResourceConstraint> for Constraint {
    fn from(constraint: ResourceConstraint) -> Self {
        match constraint {
            ResourceConstraint::Any => Self::Any,
            ResourceConstraint::Is(kind) => Self::Is(kind),
            ResourceConstraint::Eq(uid) => Self::Eq(uid),
            ResourceConstraint::In(uid) => Self::In(uid),
            ResourceConstraint::IsIn(kind, uid) => Self::IsIn(kind, uid),
        }
    }
}

/// What lies behind each constraint of one place of the scope.
struct Part<T> {
    any: Vec<T>,
    is: HashMap<EntityTypeName, Vec<T>>,
    eq: HashMap<EntityUid, Vec<T>>,
    /// `in` an entity, for entities of one type where the constraint says so.
    within: HashMap<EntityUid, Vec<(Option<EntityTypeName>, T)>>,
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self {
            any: Vec::new(),
            is: HashMap::new(),
            eq: HashMap::new(),
            within: HashMap::new(),
        }
    }
}

impl<T> Part<T> {
    fn insert(&mut self, constraint: Constraint, value: T) {
        match constraint {
            Constraint::Any => self.any.push(value),
            Constraint::Is(kind) => self.is.entry(kind).or_default().push(value),
            Constraint::Eq(uid) => self.eq.entry(uid).or_default().push(value),
            Constraint::In(uid) => self.within.entry(uid).or_default().push((None, value)),
            Constraint::IsIn(kind, uid) => {
                self.within
                    .entry(uid)
                    .or_default()
                    .push((Some(kind), value));
            }
        }
    }

    /// Everything whose constraint the entity meets.
    fn meets(&self, member: &Member<'_>, visit: &mut impl FnMut(&T)) {
        let kind = member.uid.type_name();
        self.any.iter().for_each(&mut *visit);
        for found in [self.is.get(kind), self.eq.get(member.uid)] {
            found.into_iter().flatten().for_each(&mut *visit);
        }
        let mut group = |within: &Vec<(Option<EntityTypeName>, T)>| {
            for (only, value) in within {
                if only.as_ref().is_none_or(|only| only == kind) {
                    visit(value);
                }
            }
        };
        if self.within.len() <= member.ancestors.len() {
            for (uid, within) in &self.within {
                if uid == member.uid || member.entities.is_ancestor_of(uid, member.uid) {
                    group(within);
                }
            }
        } else if !self.within.is_empty() {
            for uid in std::iter::once(&member.uid).chain(&member.ancestors) {
                self.within.get(*uid).into_iter().for_each(&mut group);
            }
        }
    }
}

/// The principal or the resource of a request, with what it is a member of.
struct Member<'a> {
    uid: &'a EntityUid,
    ancestors: Vec<&'a EntityUid>,
    entities: &'a Entities,
}

impl<'a> Member<'a> {
    fn new(uid: &'a EntityUid, entities: &'a Entities) -> Self {
        Self {
            uid,
            ancestors: entities.ancestors(uid).into_iter().flatten().collect(),
            entities,
        }
    }
}

/// The scope of a policy: what policies lie together by.
type Key = (Constraint, Constraint, Vec<u32>);

impl ScopeIndex {
    /// Prepares the policies for requests with these action entities. A request with another one
    /// is judged all the same, without the index.
    ///
    /// # Errors
    /// If a policy cannot be put into a smaller set; Cedar has no reason to refuse that.
    pub fn new(all: PolicySet, actions: &Entities) -> Result<Self, Box<PolicySetError>> {
        let uids: Vec<EntityUid> = actions.iter().map(|action| action.uid()).collect();
        let mut members: HashMap<&EntityUid, Vec<u32>> = HashMap::new();
        for (number, uid) in (0_u32..).zip(&uids) {
            members.entry(uid).or_default().push(number);
            for group in actions.ancestors(uid).into_iter().flatten() {
                members.entry(group).or_default().push(number);
            }
        }
        let numbers: HashMap<&EntityUid, u32> = uids.iter().zip(0_u32..).collect();
        let every: Vec<u32> = (0_u32..).zip(&uids).map(|(number, _)| number).collect();
        let admitted = |policy: &Policy| match policy.action_constraint() {
            ActionConstraint::Any => every.clone(),
            ActionConstraint::Eq(named) => numbers.get(&named).copied().into_iter().collect(),
            ActionConstraint::In(groups) => {
                let mut numbers: Vec<u32> = groups
                    .iter()
                    .filter_map(|group| members.get(group))
                    .flatten()
                    .copied()
                    .collect();
                numbers.sort_unstable();
                numbers.dedup();
                numbers
            }
        };
        let scope = |policy: &Policy| -> Key {
            (
                policy.principal_constraint().into(),
                policy.resource_constraint().into(),
                admitted(policy),
            )
        };
        let mut groups: BTreeMap<Key, Vec<&Policy>> = BTreeMap::new();
        for policy in all.policies() {
            groups.entry(scope(policy)).or_default().push(policy);
        }

        // Which sets an action may need. Actions with the same sets share one part; if even so it
        // would be too many, all share one, and the policies look at the action themselves.
        let mut needed: Vec<Vec<usize>> = vec![Vec::new(); uids.len()];
        for (set, (_, _, numbers)) in groups.keys().enumerate() {
            for number in numbers {
                if let Some(sets) = usize::try_from(*number)
                    .ok()
                    .and_then(|number| needed.get_mut(number))
                {
                    sets.push(set);
                }
            }
        }
        let mut parts: BTreeMap<&Vec<usize>, Arc<ByPrincipal>> =
            needed.iter().map(|sets| (sets, Arc::default())).collect();
        let entries: usize = parts.keys().map(|sets| sets.len()).sum();
        let keys: Vec<&Key> = groups.keys().collect();
        if entries > INDEX_ENTRIES_MAX {
            let shared = Arc::new(by_principal(keys.iter().copied().enumerate()));
            parts
                .values_mut()
                .for_each(|part| *part = Arc::clone(&shared));
        } else {
            for (sets, part) in &mut parts {
                let chosen = sets
                    .iter()
                    .filter_map(|set| keys.get(*set).map(|key| (*set, *key)));
                *part = Arc::new(by_principal(chosen));
            }
        }
        let actions = uids
            .iter()
            .zip(&needed)
            .filter_map(|(uid, sets)| Some((uid.clone(), Arc::clone(parts.get(sets)?))))
            .collect();
        let sets = groups
            .values()
            .map(|policies| subset(&all, policies))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            policies: all.num_of_policies(),
            sets,
            actions,
            all,
        })
    }

    /// The policies that are indexed.
    #[must_use]
    pub fn policy_set(&self) -> &PolicySet {
        &self.all
    }

    /// What [`Authorizer::is_authorized`] says of the request under all policies.
    #[must_use]
    pub fn is_authorized(
        &self,
        authorizer: &Authorizer,
        request: &Request,
        entities: &Entities,
    ) -> Joined {
        let mut joined = Joined {
            decision: Decision::Deny,
            reasons: Vec::new(),
            errors: Vec::new(),
        };
        match self.met(request, entities) {
            Some(sets) => {
                for set in sets.iter().filter_map(|set| self.sets.get(*set)) {
                    joined.add(&authorizer.is_authorized(request, set, entities));
                }
            }
            None => joined.add(&authorizer.is_authorized(request, &self.all, entities)),
        }
        joined.reasons.sort_unstable();
        joined.errors.sort_unstable();
        joined
    }

    /// The sets whose scope the request meets; none where asking all policies at once is as good.
    fn met(&self, request: &Request, entities: &Entities) -> Option<Vec<usize>> {
        let (principal, action, resource) =
            (request.principal()?, request.action()?, request.resource()?);
        let part = self.actions.get(action)?;
        let principal = Member::new(principal, entities);
        let resource = Member::new(resource, entities);
        let mut sets = Vec::new();
        part.meets(&principal, &mut |part| {
            part.meets(&resource, &mut |set| sets.push(*set));
        });
        (sets.len() <= 1 || sets.len() * SET_COST_POLICIES < self.policies).then_some(sets)
    }
}

impl std::fmt::Debug for ScopeIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScopeIndex")
            .field("policies", &self.policies)
            .field("sets", &self.sets.len())
            .finish_non_exhaustive()
    }
}

impl Joined {
    /// Adds what further policies say. A response names the permits if it allows, and the forbids
    /// otherwise.
    fn add(&mut self, response: &Response) {
        let diagnostics = response.diagnostics();
        for error in diagnostics.errors() {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(inner) = error;
            self.errors
                .push((inner.policy_id().clone(), crate::error::chain(error)));
        }
        let mut reasons = diagnostics.reason().cloned().peekable();
        if reasons.peek().is_none() {
            return;
        }
        let forbidden = self.decision == Decision::Deny && !self.reasons.is_empty();
        match response.decision() {
            Decision::Allow if forbidden => {}
            Decision::Allow => {
                self.decision = Decision::Allow;
                self.reasons.extend(reasons);
            }
            Decision::Deny => {
                if !forbidden {
                    self.reasons.clear();
                    self.decision = Decision::Deny;
                }
                self.reasons.extend(reasons);
            }
        }
    }
}

fn by_principal<'k>(keys: impl Iterator<Item = (usize, &'k Key)>) -> ByPrincipal {
    let mut grouped: BTreeMap<&Constraint, Part<usize>> = BTreeMap::new();
    for (set, (principal, resource, _)) in keys {
        grouped
            .entry(principal)
            .or_default()
            .insert(resource.clone(), set);
    }
    let mut part = Part::default();
    for (principal, resources) in grouped {
        part.insert(principal.clone(), resources);
    }
    part
}

/// A set of some of the policies, with the templates that they are linked from.
fn subset(all: &PolicySet, policies: &[&Policy]) -> Result<PolicySet, Box<PolicySetError>> {
    let mut set = PolicySet::new();
    for policy in policies {
        match (policy.template_id(), policy.template_links()) {
            (Some(template), Some(values)) => {
                if set.template(template).is_none()
                    && let Some(template) = all.template(template)
                {
                    set.add_template(template.clone())?;
                }
                set.link(template.clone(), policy.id().clone(), values)?;
            }
            _ => set.add((*policy).clone())?,
        }
    }
    Ok(set)
}
