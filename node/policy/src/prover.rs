//! The part of the widening gate that asks a solver: what must be unsatisfiable if the newer policies
//! permit nothing new, and what a solution means.
//!
//! For each kind of request that the newer schema knows (type of principal, action, type of resource) there is
//! one question: is there a request that the newer bundle permits and the older one does not? Cedar's
//! symbolic compiler makes the terms. Three things differ between its world and this engine, and each is
//! settled so that an error can only cost a proof:
//!
//! - Cedar skips a policy that errs, here any error denies. So "does not permit" is "Cedar denies, or a policy
//!   errs", and "permits" is "Cedar allows, and none errs".
//! - In the compiler's world every entity exists. Here a principal that nobody described has no attributes,
//!   and reading one errs. So the terms are made for a schema in which every attribute of an entity may be
//!   absent ([`Shapes::relaxed`]); the policies are still checked against the real one.
//! - That world is larger than the real one, where an entity has all its required attributes or nothing at
//!   all. What cannot be ([`Worlds`]) is forbidden in the newer bundle: only requests are
//!   left out that no node can meet.
//!
//! Entities of both bundles are the same (compared before), so whatever holds for all entities holds for
//! them. The node runs the solver; nothing here does. Everything here runs in a worker: the compiler
//! panics on what it does not know.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::str::FromStr as _;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use cedar_policy::{
    Entity, EntityTypeName, EntityUid, Policy, PolicyId, PolicySet, RequestEnv, Schema,
    schema_str_to_json_with_resolved_types,
};
use cedar_policy_core::ast::{BinaryOp, Expr, ExprKind};
use cedar_policy_symcc::{
    CedarSymCompiler, CompiledPolicy, CompiledPolicySet, Env, SmtLibScript as _, SymEnv,
    WellFormedAsserts, always_denies_asserts,
    err::Error,
    implies_asserts, never_errors_asserts, never_matches_asserts,
    solver::{Decision, DecisionWithModel, Solver, SolverError},
    term::Term,
    term_factory::{and, not, or},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWrite;

use crate::archive::{self, ENTITIES, Files, SCHEMA};
use crate::bundle::on_stack;
use crate::cedar::{self, CedarEngine};
use crate::error::{BundleError, chain};
use crate::limits::{
    PROOF_MODELS_MAX, PROOF_QUESTION_BYTES_MAX, PROOF_REQUEST_KINDS_MAX, PROOF_SUPPOSED_MAX,
    PROVER_STACK_BYTES, REACHED_ENTITIES_MAX, VALUE_DEPTH_MAX,
};
use crate::request::{Engine as _, NODE_MEMBER, PolicyRequest, Verdict};
use crate::widening::{Counterexample, WhyUnproven};

/// What a solver has to be asked about two bundles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Questions {
    /// One for each kind of request that is not settled without. None at all: nothing is wider.
    Asked(Vec<Question>),
    /// There is no question that would decide it.
    None {
        /// Why.
        reason: WhyUnproven,
        /// The same for people.
        detail: String,
    },
}

/// What a solver has to be asked about one kind of request. Scripts are SMT-LIB 2, each whole in itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The kind of request, for people.
    pub about: String,
    /// Ends with `(check-sat)`: `unsat` proves that nothing new is permitted. Empty where it is known that
    /// the answer is `sat`.
    pub script: String,
    /// Scripts that end with `(get-model)`: what may show a request that is permitted newly.
    pub models: Vec<String>,
    /// What it means if no model does.
    pub otherwise: WhyUnproven,
}

/// What has to be asked so that `after` is proved to permit nothing that `before` does not.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn questions(before: &[u8], after: &[u8]) -> Result<Questions, BundleError> {
    on_stack(PROVER_STACK_BYTES, || {
        let pair = match Pair::read(before, after)? {
            Ok(pair) => pair,
            Err((reason, detail)) => return Ok(Questions::None { reason, detail }),
        };
        let mut asked = Vec::new();
        let mut bytes = 0;
        for kind in &pair.kinds {
            let question = match pair.question(kind) {
                Ok(Some(question)) => question,
                Ok(None) => continue,
                Err((reason, detail)) => {
                    let detail = format!("{}: {detail}", describe(kind));
                    return Ok(Questions::None { reason, detail });
                }
            };
            bytes += question.script.len() + question.models.iter().map(String::len).sum::<usize>();
            if bytes > PROOF_QUESTION_BYTES_MAX {
                return Ok(Questions::None {
                    reason: WhyUnproven::TooLarge,
                    detail: format!("the question is longer than {PROOF_QUESTION_BYTES_MAX} bytes"),
                });
            }
            asked.push(question);
        }
        Ok(Questions::Asked(asked))
    })
}

/// The request that a solver's answer to the model script `number` about this kind of request stands
/// for, if `after` permits it and `before` does not when both are asked.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn confirm(
    before: &[u8],
    after: &[u8],
    about: &str,
    number: usize,
    model: &str,
) -> Result<Option<Counterexample>, BundleError> {
    on_stack(PROVER_STACK_BYTES, || {
        let Ok(pair) = Pair::read(before, after)? else {
            return Ok(None);
        };
        let kind = pair.kinds.iter().find(|kind| describe(kind) == about);
        let env = kind.and_then(|kind| pair.solution(kind, number, model).ok().flatten());
        Ok(env.and_then(|env| pair.confirmed(&env)))
    })
}

type Refusal = (WhyUnproven, String);

fn unsupported(error: &dyn std::fmt::Display) -> Refusal {
    (WhyUnproven::Unsupported, error.to_string())
}

/// For instance `Agent, fs.read, File`.
fn describe(kind: &RequestEnv) -> String {
    format!(
        "{}, {}, {}",
        kind.principal(),
        kind.action().id().unescaped(),
        kind.resource()
    )
}

/// Two bundles whose engine is Cedar and whose entities are the same.
struct Pair {
    files: [Files; 2],
    engines: [CedarEngine; 2],
    policies: [PolicySet; 2],
    /// What makes a policy the same decision for every request: effect and condition. Those of both.
    common: BTreeSet<String>,
    /// The schema of the newer one: policies of both are checked against it.
    schema: Schema,
    shapes: Shapes,
    relaxed: Schema,
    /// Kinds of request of the newer one, in the order of their names.
    kinds: Vec<RequestEnv>,
    /// Those of them that mean the same to the older one.
    shared: BTreeSet<RequestEnv>,
}

impl Pair {
    fn read(before: &[u8], after: &[u8]) -> Result<Result<Self, Refusal>, BundleError> {
        let files = [archive::read(before)?, archive::read(after)?];
        let [old, new] = &files;
        let engines = [CedarEngine::compile(old)?, CedarEngine::compile(new)?];
        let policies = [cedar::static_policies(old)?, cedar::static_policies(new)?];
        let [older, newer] = &policies;
        let keys = |set: &PolicySet| -> BTreeSet<String> { set.policies().map(key).collect() };
        let common = keys(older).intersection(&keys(newer)).cloned().collect();
        let shapes = [Shapes::read(old)?, Shapes::read(new)?];
        let [(old_level, old_entities), (new_level, _)] = [engines[0].reach(), engines[1].reach()];
        // The older one would look further, and refuse requests that reach too much.
        if old_level > new_level && old_entities + 2 > REACHED_ENTITIES_MAX {
            return Ok(Err((
                WhyUnproven::Reach,
                "the older policies look more steps from entity to entity, and may refuse requests for that"
                    .to_owned(),
            )));
        }
        let [old_shapes, shapes] = shapes;
        let schema = shapes.schema(shapes.resolved.clone())?;
        let relaxed = shapes.schema(shapes.relaxed()?)?;
        let mut kinds: Vec<RequestEnv> = schema.request_envs().collect();
        kinds.sort_by_key(describe);
        if kinds.len() > PROOF_REQUEST_KINDS_MAX {
            return Ok(Err((
                WhyUnproven::TooLarge,
                format!(
                    "{} kinds of request (type of principal, action, type of resource), at most \
                     {PROOF_REQUEST_KINDS_MAX} are proved",
                    kinds.len()
                ),
            )));
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
        Ok(Ok(Self {
            files,
            engines,
            policies,
            common,
            schema,
            shapes,
            relaxed,
            kinds,
            shared,
        }))
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
    fn terms(&self, kind: &RequestEnv) -> Result<Option<Terms>, Refusal> {
        let symbols = self.symbols(kind)?;
        let [before, after] = &self.policies;
        // Where the older bundle does not know the request as the newer one does, it permits nothing.
        let is_shared = self.shared.contains(kind);
        let older = is_shared
            .then(|| self.compile_each(before, kind, &symbols))
            .transpose();
        let older = match older {
            Ok(older) => older,
            // It names what the newer schema has not: then the two are not comparable here.
            Err(_) if self.files[0].get(SCHEMA) != self.files[1].get(SCHEMA) => None,
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
        let worlds = Worlds::of(&self.policies, &self.shapes, kind);
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

    fn question(&self, kind: &RequestEnv) -> Result<Option<Question>, Refusal> {
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

    /// What a solver's model stands for.
    fn solution(
        &self,
        kind: &RequestEnv,
        number: usize,
        model: &str,
    ) -> Result<Option<Env>, Refusal> {
        let Some(terms) = self.terms(kind)? else {
            return Ok(None);
        };
        let Some(asserts) = terms.models().into_iter().nth(number) else {
            return Ok(None);
        };
        let mut solver = Scribe {
            model: Some(model.to_owned()),
            ..Scribe::default()
        };
        let mut compiler = compiler(&mut solver)?;
        at_once(compiler.check_sat(&asserts))?.map_err(|error| unsupported(&error))
    }

    /// Asks both bundles, first with their own entities, then with those of the model.
    fn confirmed(&self, env: &Env) -> Option<Counterexample> {
        let mut request = request_of(env)?;
        let resource = env.request.resource()?;
        let described = env
            .entities
            .get(resource)
            .map(|entity| self.shapes.whole(entity));
        let attributes = match described {
            Some(described) => described?.get("attrs").cloned(),
            None => self
                .shapes
                .filled(&resource.type_name().to_string(), &Map::new()),
        };
        if let Some(Value::Object(attributes)) = attributes {
            request.resource_attributes = attributes;
        }
        let [old, new] = &self.engines;
        if let Some(found) = judged(old, new, &request, None) {
            return Some(found);
        }
        let mut supposed = Vec::new();
        for entity in env.entities.iter().take(PROOF_SUPPOSED_MAX) {
            let says_nothing = entity.attrs().next().is_none()
                && entity.tags().next().is_none()
                && env
                    .entities
                    .ancestors(&entity.uid())
                    .is_none_or(|mut all| all.next().is_none());
            // One of whom nothing is said is one whom nobody described.
            if self.shapes.declares(&entity.uid()) && !(says_nothing && entity.uid() != *resource) {
                supposed.push(self.shapes.whole(entity)?);
            }
        }
        let supposed = Value::Array(supposed);
        let with = |files: &Files| {
            let mut files = files.clone();
            files.insert(ENTITIES.to_owned(), supposed.to_string().into_bytes());
            CedarEngine::compile(&files).ok()
        };
        let [old, new] = &self.files;
        judged(&with(old)?, &with(new)?, &request, Some(&supposed))
    }
}

fn judged(
    before: &CedarEngine,
    after: &CedarEngine,
    request: &PolicyRequest,
    supposed: Option<&Value>,
) -> Option<Counterexample> {
    let now = before.evaluate(request);
    let then = after.evaluate(request);
    let is_found = then.verdict == Verdict::Permit && now.verdict != Verdict::Permit;
    is_found.then(|| Counterexample {
        principal: (request.principal_type.clone(), request.principal_id.clone()),
        action: request.action.clone(),
        resource: (request.resource_type.clone(), request.resource_id.clone()),
        attributes: Value::Object(request.resource_attributes.clone()),
        params: request.params.clone(),
        context: request.context.clone(),
        entities: supposed.cloned(),
        before: now.verdict,
        permitted_by: then.policies,
    })
}

/// The request of a model as callers make them; nothing if no caller could.
fn request_of(env: &Env) -> Option<PolicyRequest> {
    let principal = env.request.principal()?;
    let resource = env.request.resource()?;
    let Ok(Value::Object(mut context)) = env.request.context()?.to_json_value() else {
        return None;
    };
    let params = context.remove("params").unwrap_or_default();
    if let Some(node) = context.get(NODE_MEMBER) {
        let posture = node
            .get("posture")
            .is_none_or(|posture| POSTURES.iter().any(|known| posture == known));
        let age = node
            .get("policy_age_s")
            .is_none_or(|age| age.as_u64().is_some());
        if !(posture && age) {
            return None;
        }
    }
    Some(PolicyRequest {
        principal_type: principal.type_name().to_string(),
        principal_id: principal.id().unescaped().to_owned(),
        action: env.request.action()?.id().unescaped().to_owned(),
        resource_type: resource.type_name().to_string(),
        resource_id: resource.id().unescaped().to_owned(),
        resource_attributes: Map::new(),
        params,
        context: Value::Object(context),
    })
}

const POSTURES: [&str; 4] = ["normal", "stale", "restricted", "closed"];

/// What makes a policy the same decision for every request, whatever its id.
fn key(policy: &Policy) -> String {
    format!("{} {}", policy.effect(), policy.as_ref().condition())
}

/// One policy in terms.
struct Each {
    in_both: bool,
    compiled: CompiledPolicy,
}

/// Terms of one kind of request.
struct Terms {
    symbols: SymEnv,
    /// The newer policies, and what cannot be as further forbids.
    permitted: CompiledPolicySet,
    /// The same for requests in which every entity is described, and in which none is: where to look first.
    described: CompiledPolicySet,
    strangers: CompiledPolicySet,
    /// The older ones; `None` where they permit nothing that they would know.
    older: Option<CompiledPolicySet>,
    newer_erring: Vec<CompiledPolicy>,
    older_erring: Vec<CompiledPolicy>,
}

impl Terms {
    /// What is unsatisfiable if nothing new is permitted. Each list of asserts is taken as a whole: what it says of
    /// the entities of its own terms is true of every entity, so it may stand, or be missing, anywhere.
    fn widened(&self) -> Arc<Vec<Term>> {
        let mut asserts: Vec<Term> = always_denies_asserts(&self.permitted).asserts().to_vec();
        for policy in &self.newer_erring {
            asserts.push(not(all(&never_errors_asserts(policy))));
        }
        if let Some(older) = &self.older {
            let denied = all(&implies_asserts(&self.permitted, older));
            let errs = self.older_erring.iter();
            asserts.push(errs.fold(denied, |found, policy| {
                or(found, all(&never_errors_asserts(policy)))
            }));
        }
        Arc::new(asserts)
    }

    /// What to look for models of. They come near to [`widened`](Self::widened), which has none to give: what
    /// they find is asked of both bundles.
    fn models(&self) -> Vec<WellFormedAsserts<'_>> {
        let mut models = match &self.older {
            Some(older) => vec![
                implies_asserts(&self.described, older),
                implies_asserts(&self.permitted, older),
                // Of whom nothing is known, there the older one may err.
                always_denies_asserts(&self.strangers),
            ],
            None => vec![
                always_denies_asserts(&self.described),
                always_denies_asserts(&self.permitted),
            ],
        };
        let errs = self.older_erring.iter();
        models.extend(errs.map(never_errors_asserts));
        models.truncate(PROOF_MODELS_MAX);
        models
    }
}

fn all(asserts: &WellFormedAsserts<'_>) -> Term {
    let terms = asserts.asserts().iter().cloned();
    terms.fold(true.into(), and)
}

/// Whether no solver has to be asked to know that it cannot be.
fn is_false(asserts: &WellFormedAsserts<'_>) -> bool {
    asserts.asserts().iter().any(|term| *term == false.into())
}

/// A solver that only writes down what it is asked; with a model, it answers with that.
#[derive(Default)]
struct Scribe {
    script: Vec<u8>,
    model: Option<String>,
}

impl Scribe {
    fn take(&mut self) -> Result<String, Refusal> {
        let script = String::from_utf8(std::mem::take(&mut self.script));
        spoken(&script.map_err(|error| unsupported(&error))?)
            .ok_or_else(|| unsupported(&"a name with a control character"))
    }
}

impl Solver for &mut Scribe {
    fn smtlib_input(&mut self) -> &mut (dyn AsyncWrite + Unpin + Send) {
        &mut self.script
    }

    async fn enable_models(&mut self) -> Result<(), SolverError> {
        let input = self.smtlib_input();
        Ok(input.set_option("produce-models", "true").await?)
    }

    async fn check_sat(&mut self) -> Result<Decision, SolverError> {
        self.smtlib_input().check_sat().await?;
        Ok(Decision::Unknown)
    }

    async fn check_sat_with_model(&mut self) -> Result<DecisionWithModel, SolverError> {
        self.smtlib_input().check_sat().await?;
        self.smtlib_input().get_model().await?;
        Ok(match self.model.take() {
            Some(model) => DecisionWithModel::Sat { model },
            None => DecisionWithModel::Unknown,
        })
    }
}

fn compiler(solver: &mut Scribe) -> Result<CedarSymCompiler<&mut Scribe>, Refusal> {
    CedarSymCompiler::new(solver).map_err(|error| unsupported(&error))
}

/// A script without its comments, into which the compiler writes names as they are: whoever can end a comment
/// speaks to the solver. None where a control character is left, which would end one elsewhere.
fn spoken(script: &str) -> Option<String> {
    let lines = script.split('\n');
    let kept: Vec<&str> = lines
        .filter(|line| !line.trim_start().starts_with(';'))
        .collect();
    let clean = kept.iter().all(|line| !line.chars().any(char::is_control));
    clean.then(|| kept.join("\n"))
}

/// What a future comes to that never waits: everything is written to memory.
fn at_once<T>(future: impl Future<Output = T>) -> Result<T, Refusal> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Ok(value),
        Poll::Pending => Err(unsupported(&"the compiler waits for something")),
    }
}

/// The schema as data: which attributes entities have, and which of them always.
struct Shapes {
    resolved: Value,
    /// Attributes of each entity type, and whether it is required.
    attributes: BTreeMap<String, BTreeMap<String, bool>>,
}

impl Shapes {
    fn read(files: &Files) -> Result<Self, BundleError> {
        let source = files
            .get(SCHEMA)
            .map(|bytes| String::from_utf8_lossy(bytes));
        let source = source.unwrap_or_default();
        let (resolved, _) = schema_str_to_json_with_resolved_types(&source)
            .map_err(|error| BundleError::schema(SCHEMA, chain(&error)))?;
        let mut shapes = Self {
            resolved,
            attributes: BTreeMap::new(),
        };
        for (name, declared) in shapes.part("entityTypes") {
            let listed = shapes.record(declared.get("shape"))?;
            let listed = listed.get("attributes").and_then(Value::as_object);
            let required =
                |attribute: &Value| attribute.get("required") != Some(&Value::Bool(false));
            let of_type = listed
                .into_iter()
                .flatten()
                .map(|(name, attribute)| (name.clone(), required(attribute)))
                .collect();
            shapes.attributes.insert(name.clone(), of_type);
        }
        Ok(shapes)
    }

    fn part(&self, key: &str) -> Map<String, Value> {
        let part = self.resolved.get("").and_then(|all| all.get(key));
        part.and_then(Value::as_object).cloned().unwrap_or_default()
    }

    /// A record type, whatever common types stand before it.
    fn record(&self, declared: Option<&Value>) -> Result<Value, BundleError> {
        let Some(declared) = declared else {
            return Ok(json!({"type": "Record", "attributes": {}}));
        };
        let mut declared = declared.clone();
        let common = self.part("commonTypes");
        for _ in 0..=common.len() {
            let word = |key: &str| declared.get(key).and_then(Value::as_str);
            match word("type") {
                Some("Record") => return Ok(declared),
                Some("EntityOrCommon") => match word("name").and_then(|name| common.get(name)) {
                    Some(found) => declared = found.clone(),
                    None => break,
                },
                Some(name) => match common.get(name) {
                    Some(found) => declared = found.clone(),
                    None => break,
                },
                None => break,
            }
        }
        Err(BundleError::schema(SCHEMA, "attributes that are no record"))
    }

    /// The schema in which every attribute of every entity may be absent.
    fn relaxed(&self) -> Result<Value, BundleError> {
        let mut relaxed = self.resolved.clone();
        let types = relaxed
            .get_mut("")
            .and_then(|all| all.get_mut("entityTypes"))
            .and_then(Value::as_object_mut);
        for (_, declared) in types.into_iter().flatten() {
            // One that lists its ids has no attributes.
            let Some(declared) = declared
                .as_object_mut()
                .filter(|map| !map.contains_key("enum"))
            else {
                continue;
            };
            let mut shape = self.record(declared.get("shape"))?;
            let attributes = shape.get_mut("attributes").and_then(Value::as_object_mut);
            for (_, attribute) in attributes.into_iter().flatten() {
                if let Some(attribute) = attribute.as_object_mut() {
                    attribute.insert("required".to_owned(), Value::Bool(false));
                }
            }
            declared.insert("shape".to_owned(), shape);
        }
        Ok(relaxed)
    }

    fn schema(&self, value: Value) -> Result<Schema, BundleError> {
        Schema::from_json_value(value).map_err(|error| BundleError::schema(SCHEMA, chain(&error)))
    }

    /// Whether what both declare, they declare alike.
    fn same_types(&self, other: &Self) -> bool {
        ["entityTypes", "commonTypes"].into_iter().all(|key| {
            let others = other.part(key);
            self.part(key)
                .iter()
                .all(|(name, declared)| others.get(name).is_none_or(|same| same == declared))
        })
    }

    /// Whether an action has the same context and the same groups.
    fn same_action(&self, other: &Self, action: &str) -> bool {
        let (ours, theirs) = (self.part("actions"), other.part("actions"));
        let context = |actions: &Map<String, Value>| {
            actions
                .get(action)
                .and_then(|action| action.get("appliesTo"))
                .and_then(|applies| applies.get("context"))
                .cloned()
        };
        context(&ours) == context(&theirs) && groups(&ours, action) == groups(&theirs, action)
    }

    fn declares(&self, uid: &EntityUid) -> bool {
        self.attributes.contains_key(&uid.type_name().to_string())
    }

    /// An entity of a model as a bundle could describe it. A model says nothing of what no policy looks at.
    fn whole(&self, entity: &Entity) -> Option<Value> {
        let mut described = entity.to_json_value().ok()?;
        let name = entity.uid().type_name().to_string();
        if let Some(attributes) = described.get_mut("attrs") {
            let known = attributes.as_object().cloned().unwrap_or_default();
            *attributes = self.filled(&name, &known)?;
        }
        Some(described)
    }

    /// The attributes of an entity of this type, with some value for each that is required and not there.
    fn filled(&self, name: &str, known: &Map<String, Value>) -> Option<Value> {
        let types = self.part("entityTypes");
        let shape = self.record(types.get(name)?.get("shape")).ok()?;
        let mut filled = self.some_value(&shape, 0)?;
        if let Some(filled) = filled.as_object_mut() {
            filled.extend(known.clone());
        }
        Some(filled)
    }

    fn some_value(&self, declared: &Value, depth: usize) -> Option<Value> {
        let word = |key: &str| declared.get(key).and_then(Value::as_str);
        if depth > VALUE_DEPTH_MAX {
            return None;
        }
        let name = match word("type")? {
            "Record" => {
                let mut filled = Map::new();
                let listed = declared.get("attributes").and_then(Value::as_object);
                for (name, attribute) in listed.into_iter().flatten() {
                    if attribute.get("required") != Some(&Value::Bool(false)) {
                        filled.insert(name.clone(), self.some_value(attribute, depth + 1)?);
                    }
                }
                return Some(Value::Object(filled));
            }
            "Set" => return Some(json!([])),
            "Entity" | "EntityOrCommon" => word("name")?,
            name => name,
        };
        if let Some(common) = self.part("commonTypes").get(name) {
            return self.some_value(common, depth + 1);
        }
        if let Some(entity) = self.part("entityTypes").get(name) {
            let listed = entity.get("enum").and_then(Value::as_array);
            let id = listed
                .and_then(|ids| ids.first()?.as_str())
                .unwrap_or_default();
            return Some(json!({"__entity": {"type": name, "id": id}}));
        }
        match name.strip_prefix("__cedar::").unwrap_or(name) {
            "Bool" | "Boolean" => Some(json!(false)),
            "Long" => Some(json!(0)),
            "String" => Some(json!("")),
            _ => None,
        }
    }
}

/// Every group that an action is in, over any number of steps.
fn groups(actions: &Map<String, Value>, action: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut next = vec![action.to_owned()];
    while let Some(name) = next.pop() {
        let listed = actions
            .get(&name)
            .and_then(|action| action.get("memberOf"))
            .and_then(Value::as_array);
        for group in listed.into_iter().flatten() {
            if let Some(id) = group.get("id").and_then(Value::as_str)
                && found.insert(id.to_owned())
            {
                next.push(id.to_owned());
            }
        }
    }
    found
}

/// What policies look at.
#[derive(Default)]
struct Looked {
    /// Names of attributes, of whatever.
    attributes: BTreeSet<String>,
    /// Expressions that may be entities whose attributes, tags or groups are asked for, with what else is said of
    /// the same one.
    at: BTreeMap<String, Asked>,
}

#[derive(Default)]
struct Asked {
    within: BTreeSet<String>,
    tags: BTreeSet<String>,
}

impl Looked {
    fn into(policies: &[PolicySet]) -> Self {
        let mut looked = Self::default();
        for policy in policies.iter().flat_map(PolicySet::policies) {
            for expr in policy.as_ref().condition().subexpressions() {
                looked.note(expr);
            }
        }
        looked
    }

    fn note(&mut self, expr: &Expr) {
        match expr.expr_kind() {
            ExprKind::GetAttr { expr, attr } | ExprKind::HasAttr { expr, attr } => {
                self.asked(expr);
                self.attributes.insert(attr.to_string());
            }
            ExprKind::ExtHasAttr { expr, attrs } => {
                self.asked(expr);
                self.attributes
                    .extend(attrs.iter().map(ToString::to_string));
            }
            ExprKind::BinaryApp { op, arg1, arg2 } => match op {
                BinaryOp::In => _ = self.asked(arg1).within.insert(arg2.to_string()),
                BinaryOp::HasTag | BinaryOp::GetTag => {
                    _ = self.asked(arg1).tags.insert(arg2.to_string());
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn asked(&mut self, expr: &Expr) -> &mut Asked {
        self.at.entry(expr.to_string()).or_default()
    }
}

/// Conditions on requests, in the words of policies. Those that have no sense for a kind of request do not
/// compile, and are left out.
#[derive(Default)]
struct Worlds {
    /// What no node can meet: an entity with some of its required attributes, or with none of them and
    /// something else; a resource that lacks one; a posture that is none.
    impossible: Vec<String>,
    /// That an entity is one that nobody described.
    strangers: Vec<String>,
    /// That an entity is one that somebody did.
    described: Vec<String>,
}

impl Worlds {
    fn note(&mut self, condition: String) {
        if self.impossible.len() < PROOF_SUPPOSED_MAX {
            self.impossible.push(condition);
        }
    }

    fn of(policies: &[PolicySet], shapes: &Shapes, kind: &RequestEnv) -> Self {
        let looked = Looked::into(policies);
        let mut worlds = Self::default();
        let split = |name: &EntityTypeName| {
            let empty = BTreeMap::new();
            let attributes = shapes.attributes.get(&name.to_string()).unwrap_or(&empty);
            let looked_at = attributes
                .iter()
                .filter(|(name, _)| looked.attributes.contains(*name));
            let (required, optional): (Vec<_>, Vec<_>) =
                looked_at.partition(|(_, required)| **required);
            let quoted = |list: Vec<(&String, &bool)>| -> Vec<String> {
                list.iter()
                    .map(|(name, _)| format!("\"{}\"", name.escape_debug()))
                    .collect()
            };
            (quoted(required), quoted(optional))
        };
        for attribute in split(kind.resource()).0 {
            worlds.note(format!("!(resource has {attribute})"));
        }
        for (expr, asked) in &looked.at {
            let types: Vec<EntityTypeName> = match expr.as_str() {
                "principal" => vec![kind.principal().clone()],
                // These are never absent.
                "resource" | "context" | "action" => continue,
                _ => shapes
                    .attributes
                    .keys()
                    .filter_map(|name| EntityTypeName::from_str(name).ok())
                    .collect(),
            };
            for name in types {
                let (required, optional) = split(&name);
                let Some((first, others)) = required.split_first() else {
                    continue;
                };
                let is = match expr.as_str() {
                    "principal" => String::new(),
                    _ => format!("({expr}) is {name} && "),
                };
                let has = format!("{is}({expr}) has {first}");
                let absent = format!("{is}!(({expr}) has {first})");
                if worlds.strangers.len() < PROOF_SUPPOSED_MAX {
                    worlds.strangers.push(absent.clone());
                    worlds.described.push(has);
                }
                for other in others {
                    worlds.note(format!(
                        "{is}(({expr}) has {first}) != (({expr}) has {other})"
                    ));
                }
                for other in optional {
                    worlds.note(format!("{absent} && ({expr}) has {other}"));
                }
                for group in &asked.within {
                    worlds.note(format!(
                        "{absent} && ({expr}) in ({group}) && ({expr}) != ({group})"
                    ));
                    worlds.note(format!(
                        "{absent} && ({expr}) in ({group}) && !(({group}).contains({expr}))"
                    ));
                }
                for tag in &asked.tags {
                    worlds.note(format!("{absent} && ({expr}).hasTag({tag})"));
                }
            }
        }
        let postures = POSTURES.map(|posture| format!("\"{posture}\"")).join(", ");
        worlds.note(format!(
            "!([{postures}].contains(context.{NODE_MEMBER}.posture))"
        ));
        worlds.note(format!("context.{NODE_MEMBER}.policy_age_s < 0"));
        worlds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler writes names into comments as they are, and the solver ends a comment at a carriage return.
    #[test]
    fn who_names_an_attribute_says_nothing_to_the_solver() {
        let named = |name: &str| spoken(&format!("(a)\n; {name}\n(check-sat)\n"));
        let plain = Some("(a)\n(check-sat)\n".to_owned());
        assert_eq!(named("day"), plain);
        assert_eq!(named("x\r(assert false)(check-sat)(exit);"), plain);
        assert_eq!(spoken("(declare x) ; x\r(exit)\n"), None);
        assert_eq!(spoken("(a)\u{85}\n"), None);
    }
}
