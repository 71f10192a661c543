//! What a solver's model stands for, and whether it shows anything: a model is believed when both bundles were asked.

use cedar_policy::RequestEnv;
use cedar_policy_symcc::Env;
use serde_json::{Map, Value};
use tidelock_policy::{BundleError, CedarEngine, Engine as _, NODE_MEMBER, PolicyRequest, Verdict};

use crate::limits::PROOF_SUPPOSED_MAX;
use crate::pair::{Pair, Side};
use crate::questions::{ModelOf, Refusal, describe, on_stack, unsupported};
use crate::scribe::{Scribe, at_once, compiler};
use crate::terms::First;
use crate::widening::Counterexample;
use crate::worlds::POSTURES;

/// The request that a model, the solver's answer about this kind of request, stands
/// for, if `after` permits it and `before` does not when both are asked.
///
/// # Errors
/// [`BundleError`] where one of them is no bundle.
pub fn confirm(
    before: &[u8],
    after: &[u8],
    about: &str,
    whose: ModelOf,
    model: &str,
) -> Result<Option<Counterexample>, BundleError> {
    on_stack(|| {
        let Ok(pair) = Pair::of(Side::read(before)?, Side::read(after)?) else {
            return Ok(None);
        };
        let kind = pair.kinds.iter().find(|kind| describe(kind) == about);
        let env = kind.and_then(|kind| pair.solution(kind, whose, model).ok().flatten());
        Ok(env.and_then(|env| pair.confirmed(&env)))
    })
}

impl Pair {
    /// What a solver's model stands for.
    pub(crate) fn solution(
        &self,
        kind: &RequestEnv,
        whose: ModelOf,
        model: &str,
    ) -> Result<Option<Env>, Refusal> {
        let Some(terms) = self.terms(kind)? else {
            return Ok(None);
        };
        let asserts = match whose {
            ModelOf::First(number) => terms.first.get(number).and_then(First::model),
            ModelOf::Whole(number) => terms.models().into_iter().nth(number),
        };
        let Some(asserts) = asserts else {
            return Ok(None);
        };
        let mut solver = Scribe::answering(model);
        let mut compiler = compiler(&mut solver)?;
        at_once(compiler.check_sat(&asserts))?.map_err(|error| unsupported(&error))
    }

    /// Asks both bundles, first with their own entities, then with those of the model.
    pub(crate) fn confirmed(&self, env: &Env) -> Option<Counterexample> {
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
        let (old, new) = (&self.older, &self.newer);
        if let Some(found) = judged(&old.engine, &new.engine, &request, None) {
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
        let with = |side: &Side| side.contents.cedar_engine_supposing(&supposed).ok();
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
