//! Two bundles, and the questions about each kind of request.

use std::collections::BTreeSet;

use cedar_policy::{Policy, PolicyId, PolicySet, RequestEnv, Schema};
use cedar_policy_symcc::{
    CompiledPolicy, CompiledPolicySet, SymEnv, err::Error, never_errors_asserts,
    never_matches_asserts,
};
use tidelock_policy::{BundleError, CedarEngine, Contents, SCHEMA, limits::REACHED_ENTITIES_MAX};

use crate::limits::PROOF_REQUEST_KINDS_MAX;
use crate::questions::{Question, Refusal, describe, unsupported};
use crate::scribe::{Scribe, at_once, compiler};
use crate::shapes::Shapes;
use crate::terms::{Each, Terms, is_false};
use crate::widening::WhyUnproven;
use crate::worlds::Worlds;

/// A bundle whose engine is Cedar, compiled.
pub(crate) struct Side {
    pub(crate) contents: Contents,
    pub(crate) engine: CedarEngine,
    pub(crate) policies: PolicySet,
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
    /// What makes a policy the same decision for every request: effect and condition. Those of both.
    common: BTreeSet<String>,
    /// The schema of the newer one: policies of both are checked against it.
    schema: Schema,
    pub(crate) shapes: Shapes,
    relaxed: Schema,
    /// Kinds of request of the newer one, in the order of their names.
    pub(crate) kinds: Vec<RequestEnv>,
    /// Those of them that mean the same to the older one.
    shared: BTreeSet<RequestEnv>,
}

impl Pair {
    pub(crate) fn of(older: Side, newer: Side) -> Result<Self, Refusal> {
        let common = older.keys().intersection(&newer.keys()).cloned().collect();
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
                same_types && known.contains(kind) && old_shapes.same_action(&shapes, action)
            })
            .cloned()
            .collect();
        Ok(Self {
            older,
            newer,
            common,
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

    fn compile_each(
        &self,
        policies: &PolicySet,
        kind: &RequestEnv,
        symbols: &SymEnv,
    ) -> Result<Vec<Each>, Refusal> {
        let each = policies.policies().map(|policy| {
            Ok(Each {
                in_both: self.common.contains(&key(policy)),
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

    /// The terms of one kind of request, or nothing where no policy that differs bears on it.
    pub(crate) fn terms(&self, kind: &RequestEnv) -> Result<Option<Terms>, Refusal> {
        let symbols = self.symbols(kind)?;
        let (before, after) = (&self.older.policies, &self.newer.policies);
        // Where the older bundle does not know the request as the newer one does, it permits nothing.
        let is_shared = self.shared.contains(kind);
        let older = is_shared
            .then(|| self.compile_each(before, kind, &symbols))
            .transpose();
        let older = match older {
            Ok(older) => older,
            // It names what the newer schema has not: then the two are not comparable here.
            Err(_) if self.older.contents.file(SCHEMA) != self.newer.contents.file(SCHEMA) => None,
            Err(refusal) => return Err(refusal),
        };
        let newer = self.compile_each(after, kind, &symbols)?;
        if let Some(older) = &older {
            let bears = |each: &Each| {
                let never = is_false(&never_matches_asserts(&each.compiled))
                    && is_false(&never_errors_asserts(&each.compiled));
                !each.in_both && !never
            };
            if !older.iter().chain(&newer).any(bears) {
                return Ok(None);
            }
        }
        let worlds = Worlds::of([before, after], &self.shapes, kind);
        let with = |base: &PolicySet, texts: &[String]| {
            let mut policies = base.clone();
            for text in texts {
                let id = PolicyId::new(format!("no node meets {text}"));
                let text = format!("forbid(principal, action, resource) when {{ {text} }};");
                let Ok(policy) = Policy::parse(Some(id), text) else {
                    continue;
                };
                // One that has no sense for this kind of request is left out, which only loses precision.
                let Ok(compiled) = self.compile(&policy, kind, &symbols) else {
                    continue;
                };
                if !is_false(&never_matches_asserts(&compiled)) {
                    let _ = policies.add(policy);
                }
            }
            policies
        };
        let compile = |policies: &PolicySet| self.compile_set(policies, kind, &symbols);
        let realistic = with(after, &worlds.impossible);
        let permitted = compile(&realistic)?;
        let described = compile(&with(&realistic, &worlds.strangers))?;
        let strangers = compile(&with(&realistic, &worlds.described))?;
        let older_set = match &older {
            Some(_) => Some(compile(before)?),
            None => None,
        };
        let errs = |each: &Each| !is_false(&never_errors_asserts(&each.compiled));
        let newer_erring = newer.into_iter().filter(errs);
        // One that is in both errs in both, and then the newer bundle permits nothing either.
        let older_erring = older.into_iter().flatten();
        let older_erring = older_erring.filter(|each| !each.in_both).filter(errs);
        Ok(Some(Terms {
            symbols,
            permitted,
            described,
            strangers,
            older: older_set,
            newer_erring: newer_erring.map(|each| each.compiled).collect(),
            older_erring: older_erring.map(|each| each.compiled).collect(),
        }))
    }

    pub(crate) fn question(&self, kind: &RequestEnv) -> Result<Option<Question>, Refusal> {
        let Some(terms) = self.terms(kind)? else {
            return Ok(None);
        };
        let mut solver = Scribe::default();
        let script = {
            let mut compiler = compiler(&mut solver)?;
            let asked = compiler.check_unsat_raw(terms.widened(), &terms.symbols);
            match at_once(asked)? {
                Ok(true) => return Ok(None),
                Ok(false) => String::new(),
                Err(Error::SolverUnknown) => solver.take()?,
                Err(error) => return Err(unsupported(&error)),
            }
        };
        let mut models = Vec::new();
        for asserts in terms.models() {
            let mut solver = Scribe::default();
            let asked = at_once(compiler(&mut solver)?.check_sat(&asserts))?;
            models.push(match asked {
                Err(Error::SolverUnknown) => solver.take()?,
                // Nothing has to be asked: any model does, or none.
                _ => String::new(),
            });
        }
        Ok(Some(Question {
            about: describe(kind),
            script,
            models,
            otherwise: match terms.older {
                Some(_) => WhyUnproven::Unconfirmed,
                None => WhyUnproven::Schema,
            },
        }))
    }
}

/// What makes a policy the same decision for every request, whatever its id.
fn key(policy: &Policy) -> String {
    format!("{} {}", policy.effect(), policy.as_ref().condition())
}
