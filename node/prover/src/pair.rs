//! Two bundles, and the questions about each kind of request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cedar_policy::{Effect, Policy, PolicyId, PolicySet, RequestEnv, Schema};
use cedar_policy_symcc::{
    CompiledPolicy, CompiledPolicySet, SymEnv, WellFormedAsserts, err::Error,
    never_matches_asserts, term::Term,
};
use tidelock_policy::{BundleError, CedarEngine, Contents, SCHEMA, limits::REACHED_ENTITIES_MAX};

use crate::limits::{PROOF_FIRST_POLICIES_MAX, PROOF_REQUEST_KINDS_MAX};
use crate::questions::{Part, Question, Refusal, describe, unsupported};
use crate::scribe::{Scribe, at_once, compiler};
use crate::shapes::Shapes;
use crate::shortcuts::{Own, apart, bearing, by_scope};
use crate::terms::{First, Terms, is_false};
use crate::widening::WhyUnproven;
use crate::worlds::Worlds;

/// A bundle whose engine is Cedar, compiled.
pub(crate) struct Side {
    pub(crate) contents: Contents,
    pub(crate) engine: CedarEngine,
    policies: PolicySet,
}

impl Side {
    pub(crate) fn read(archive: &[u8]) -> Result<Self, BundleError> {
        let contents = Contents::read(archive)?;
        Ok(Self {
            engine: contents.cedar_engine()?,
            policies: contents.cedar_policies()?,
            contents,
        })
    }

    /// What makes each policy the decision that it is.
    fn keys(&self) -> BTreeSet<String> {
        self.policies.policies().map(key).collect()
    }
}

/// Two bundles whose entities are the same.
pub(crate) struct Pair {
    pub(crate) older: Side,
    pub(crate) newer: Side,
    parts: Parts,
    /// The schema of the newer one: policies of both are checked against it.
    schema: Schema,
    pub(crate) shapes: Shapes,
    relaxed: Schema,
    /// Kinds of request of the newer one, in the order of their names.
    pub(crate) kinds: Vec<RequestEnv>,
    /// Those of them that mean the same to the older one.
    shared: BTreeSet<RequestEnv>,
}

/// The policies of two bundles: those that are the same decision for every request, and the others.
struct Parts {
    common: Vec<Policy>,
    older_own: Vec<Policy>,
    newer_own: Vec<Policy>,
}

impl Parts {
    fn of(older: &Side, newer: &Side) -> Self {
        let both: BTreeSet<String> = older.keys().intersection(&newer.keys()).cloned().collect();
        let part = |side: &Side| -> (Vec<Policy>, Vec<Policy>) {
            let policies = side.policies.policies().cloned();
            policies.partition(|policy| both.contains(&key(policy)))
        };
        let (common, newer_own) = part(newer);
        Self {
            common,
            older_own: part(older).1,
            newer_own,
        }
    }
}

impl Pair {
    /// The questions are whole ones from here on.
    #[cfg(test)]
    pub(crate) fn take_nothing_as_common(&mut self) {
        let common = std::mem::take(&mut self.parts.common);
        self.parts.older_own.extend(common.iter().cloned());
        self.parts.newer_own.extend(common);
    }

    pub(crate) fn of(older: Side, newer: Side) -> Result<Self, Refusal> {
        let [(old_level, old_entities), (new_level, _)] =
            [older.engine.reach(), newer.engine.reach()];
        // The older one would look further, and refuse requests that reach too much.
        if old_level > new_level && old_entities + 2 > REACHED_ENTITIES_MAX {
            return Err((
                WhyUnproven::Reach,
                "the older policies look more steps from entity to entity, and may refuse requests for that"
                    .to_owned(),
            ));
        }
        let old_shapes = Shapes::read(&older.contents)?;
        let shapes = Shapes::read(&newer.contents)?;
        // Policies of both are read with the newer schema: what the older ones say of an action would be
        // another thing there.
        if let Some(action) = old_shapes.other_action(&shapes) {
            return Err((
                WhyUnproven::Schema,
                format!("the schemas differ in action {action} or its groups"),
            ));
        }
        let schema = shapes.schema(shapes.resolved.clone())?;
        let relaxed = shapes.schema(shapes.relaxed()?)?;
        let mut kinds: Vec<RequestEnv> = schema.request_envs().collect();
        kinds.sort_by_key(describe);
        if kinds.len() > PROOF_REQUEST_KINDS_MAX {
            return Err((
                WhyUnproven::TooLarge,
                format!(
                    "{} kinds of request (type of principal, action, type of resource), at most \
                     {PROOF_REQUEST_KINDS_MAX} are proved",
                    kinds.len()
                ),
            ));
        }
        let known: BTreeSet<RequestEnv> = old_shapes
            .schema(old_shapes.resolved.clone())?
            .request_envs()
            .collect();
        let same_types = old_shapes.same_types(&shapes);
        let shared = kinds
            .iter()
            .filter(|kind| {
                let action = kind.action().id().unescaped();
                same_types && known.contains(kind) && old_shapes.same_context(&shapes, action)
            })
            .cloned()
            .collect();
        Ok(Self {
            parts: Parts::of(&older, &newer),
            older,
            newer,
            schema,
            shapes,
            relaxed,
            kinds,
            shared,
        })
    }

    fn symbols(&self, kind: &RequestEnv) -> Result<SymEnv, Refusal> {
        SymEnv::new(&self.relaxed, kind).map_err(|error| unsupported(&error))
    }

    fn compile(
        &self,
        policy: &Policy,
        kind: &RequestEnv,
        symbols: &SymEnv,
    ) -> Result<CompiledPolicy, Refusal> {
        CompiledPolicy::compile_with_custom_symenv(policy, kind, &self.schema, symbols.clone())
            .map_err(|error| unsupported(&error))
    }

    fn compile_each<'p>(
        &self,
        policies: impl IntoIterator<Item = &'p Policy>,
        kind: &RequestEnv,
        symbols: &SymEnv,
    ) -> Result<Vec<Own<'p>>, Refusal> {
        let each = policies.into_iter().map(|policy| {
            Ok(Own {
                policy,
                compiled: self.compile(policy, kind, symbols)?,
            })
        });
        each.collect()
    }

    fn compile_set(
        &self,
        policies: &PolicySet,
        kind: &RequestEnv,
        symbols: &SymEnv,
    ) -> Result<CompiledPolicySet, Refusal> {
        CompiledPolicySet::compile_with_custom_symenv(policies, kind, &self.schema, symbols.clone())
            .map_err(|error| unsupported(&error))
    }

    /// The own policies of the older bundle; `None` where it permits nothing that it would know.
    fn older_own(
        &self,
        kind: &RequestEnv,
        symbols: &SymEnv,
    ) -> Result<Option<Vec<Own<'_>>>, Refusal> {
        // Where the older bundle does not know the request as the newer one does, it permits nothing.
        if !self.shared.contains(kind) {
            return Ok(None);
        }
        match self.compile_each(&self.parts.older_own, kind, symbols) {
            Ok(own) => Ok(Some(own)),
            // It names what the newer schema has not: then the two are not comparable here.
            Err(_) if self.older.contents.file(SCHEMA) != self.newer.contents.file(SCHEMA) => {
                Ok(None)
            }
            Err(refusal) => Err(refusal),
        }
    }

    /// The terms of one kind of request, or nothing where no request of it can be permitted newly.
    pub(crate) fn terms(&self, kind: &RequestEnv) -> Result<Option<Terms>, Refusal> {
        let symbols = self.symbols(kind)?;
        let Some(older) = self.older_own(kind, &symbols)? else {
            let all = self.parts.newer_own.iter().chain(&self.parts.common);
            let newer = self.compile_each(all, kind, &symbols)?;
            return self.compared(kind, symbols, None, &newer, &[]).map(Some);
        };
        let newer = self.compile_each(&self.parts.newer_own, kind, &symbols)?;
        let bearing = bearing(&older, &newer);
        if bearing.is_empty() {
            return Ok(None);
        }
        let near = self.parts.common.iter();
        let near = near.filter(|policy| !bearing.iter().all(|other| apart(policy, other)));
        let mut common = self.compile_each(near, kind, &symbols)?;
        common.retain(|own| own.may_match() || own.may_err());
        self.compared(kind, symbols, Some(&older), &newer, &common)
            .map(Some)
    }

    fn compared(
        &self,
        kind: &RequestEnv,
        symbols: SymEnv,
        older_own: Option<&[Own<'_>]>,
        newer_own: &[Own<'_>],
        common: &[Own<'_>],
    ) -> Result<Terms, Refusal> {
        let compile = |policies: &PolicySet| self.compile_set(policies, kind, &symbols);
        let before = set(all_of(older_own.into_iter().flatten().chain(common)));
        let after = set(all_of(newer_own.iter().chain(common)));
        let worlds = Worlds::of([&before, &after], &self.shapes, kind);
        let forbids = |texts: &[String]| self.forbids(texts, kind, &symbols);
        let impossible = forbids(&worlds.impossible);
        let (strangers, described) = (forbids(&worlds.strangers), forbids(&worlds.described));
        let realistic = |more: &[Policy]| {
            let newer = all_of(newer_own.iter().chain(common));
            compile(&set(newer.chain(&impossible).chain(more)))
        };
        let first = match older_own {
            Some(older_own) => self.first(
                older_own,
                newer_own,
                common,
                [&impossible, &strangers],
                &compile,
            )?,
            None => Vec::new(),
        };
        Ok(Terms {
            permitted: realistic(&[])?,
            described: realistic(&strangers)?,
            strangers: realistic(&described)?,
            older: older_own.is_some().then(|| compile(&before)).transpose()?,
            newer_erring: erring(newer_own.iter().chain(common)),
            // One that is in both errs in both, and then the newer bundle permits nothing either.
            older_erring: erring(older_own.into_iter().flatten()),
            first,
            symbols,
        })
    }

    /// The parts of the stronger question, the third shortcut of `shortcuts.rs`; none where they would be the whole one.
    fn first(
        &self,
        older: &[Own<'_>],
        newer: &[Own<'_>],
        common: &[Own<'_>],
        [impossible, strangers]: [&[Policy]; 2],
        compile: &dyn Fn(&PolicySet) -> Result<CompiledPolicySet, Refusal>,
    ) -> Result<Vec<First>, Refusal> {
        let is_permit = |own: &&Own<'_>| own.policy.effect() == Effect::Permit;
        let forbids: Vec<&Own<'_>> = newer.iter().filter(|own| !is_permit(own)).collect();
        let mut scopes = by_scope(newer.iter().filter(is_permit));
        if scopes.len() * (1 + forbids.len() + impossible.len()) > PROOF_FIRST_POLICIES_MAX {
            scopes = BTreeMap::from([(String::new(), newer.iter().filter(is_permit).collect())]);
        }
        if common.is_empty() && scopes.len() < 2 {
            return Ok(Vec::new());
        }
        let mut before = by_scope(older.iter().filter(is_permit));
        if scopes.contains_key("") {
            before = BTreeMap::from([(String::new(), older.iter().filter(is_permit).collect())]);
        }
        let compile = |policies: &PolicySet| compile(policies).map(Box::new);
        let mut first = Vec::new();
        for (scope, permits) in scopes {
            let own = || all_of(permits.iter().chain(&forbids).copied());
            let older = before.remove(&scope).unwrap_or_default();
            first.push(First::Permits {
                newer: compile(&set(own().chain(impossible)))?,
                described: compile(&set(own().chain(impossible).chain(strangers)))?,
                older: compile(&set(all_of(older)))?,
                erring: erring(permits.iter().chain(&forbids).copied()),
            });
        }
        let denying = older
            .iter()
            .filter(|own| !is_permit(own) && own.may_match());
        let denying: Vec<CompiledPolicy> = denying.map(|own| own.compiled.clone()).collect();
        let older_erring = erring(older);
        if !denying.is_empty() || !older_erring.is_empty() {
            let anything = anything()?;
            let open = all_of(forbids).chain([&anything]).chain(impossible);
            first.push(First::Denies {
                open: compile(&set(open))?,
                denying,
                older_erring,
                erring: erring(newer),
            });
        }
        Ok(first)
    }

    /// A forbid for each condition. One that has no sense for this kind of request is left out, which only loses precision.
    fn forbids(&self, conditions: &[String], kind: &RequestEnv, symbols: &SymEnv) -> Vec<Policy> {
        let policies = conditions.iter().filter_map(|condition| {
            let text = format!("forbid(principal, action, resource) when {{ {condition} }};");
            Policy::parse(None, text).ok()
        });
        let has_sense = |policy: &Policy| {
            let compiled = self.compile(policy, kind, symbols);
            compiled.is_ok_and(|compiled| !is_false(&never_matches_asserts(&compiled)))
        };
        policies.filter(has_sense).collect()
    }

    /// The question about one kind of request, or nothing where it is known without one that nothing of it is permitted
    /// newly.
    pub(crate) fn question(&self, kind: &RequestEnv) -> Result<Option<Question>, Refusal> {
        let Some(terms) = self.terms(kind)? else {
            return Ok(None);
        };
        let ask = |asserts: Arc<Vec<Term>>| {
            let mut solver = Scribe::default();
            let mut compiler = compiler(&mut solver)?;
            let asked = compiler.check_unsat_raw(asserts, &terms.symbols);
            match at_once(asked)? {
                Ok(true) => Ok(None),
                Ok(false) => Ok(Some(String::new())),
                Err(Error::SolverUnknown) => solver.take().map(Some),
                Err(error) => Err(unsupported(&error)),
            }
        };
        let mut first = Vec::new();
        for (number, part) in terms.first.iter().enumerate() {
            if let Some(script) = ask(part.widened())? {
                let model = part
                    .model()
                    .map(|asserts| model_script(&asserts))
                    .transpose()?;
                first.push(Part {
                    number,
                    script,
                    model,
                });
            }
        }
        if first.is_empty() && !terms.first.is_empty() {
            return Ok(None);
        }
        let Some(script) = ask(terms.widened())? else {
            return Ok(None);
        };
        let models = terms.models();
        let models = models.iter().map(model_script);
        let models = models.collect::<Result<_, _>>()?;
        Ok(Some(Question {
            about: describe(kind),
            first,
            script,
            models,
            otherwise: match terms.older {
                Some(_) => WhyUnproven::Unconfirmed,
                None => WhyUnproven::Schema,
            },
        }))
    }
}

/// What a solver has to be asked for a model of these; empty where nothing has to be asked: any model does, or none.
fn model_script(asserts: &WellFormedAsserts<'_>) -> Result<String, Refusal> {
    let mut solver = Scribe::default();
    match at_once(compiler(&mut solver)?.check_sat(asserts))? {
        Err(Error::SolverUnknown) => solver.take(),
        _ => Ok(String::new()),
    }
}

/// A set of these policies, whatever their ids.
fn set<'p>(policies: impl IntoIterator<Item = &'p Policy>) -> PolicySet {
    let mut set = PolicySet::new();
    for (number, policy) in policies.into_iter().enumerate() {
        // Two numbers are never the same.
        let _ = set.add(policy.new_id(PolicyId::new(number.to_string())));
    }
    set
}

fn all_of<'p>(own: impl IntoIterator<Item = &'p Own<'p>>) -> impl Iterator<Item = &'p Policy> {
    own.into_iter().map(|own| own.policy)
}

/// A permit of everything.
fn anything() -> Result<Policy, Refusal> {
    let id = PolicyId::new("anything");
    Policy::parse(Some(id), "permit(principal, action, resource);")
        .map_err(|error| unsupported(&error))
}

fn erring<'p>(policies: impl IntoIterator<Item = &'p Own<'p>>) -> Vec<CompiledPolicy> {
    let erring = policies.into_iter().filter(|own| own.may_err());
    erring.map(|own| own.compiled.clone()).collect()
}

/// What makes a policy the same decision for every request, whatever its id.
fn key(policy: &Policy) -> String {
    format!("{} {}", policy.effect(), policy.as_ref().condition())
}
