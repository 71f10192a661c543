//! What activating a bundle would change: the plan that an operator reads before it acts.

use std::time::{Duration, Instant};

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Map, Value, json};
use tidelock_gateway::OperatorError;
use tidelock_interceptor::recorded_request;
use tidelock_policy::{
    Engine, Evaluation, PolicyRequest, Posture, Verdict, VerifiedBundle, difference,
    limits::REPLAY_RECORDS_MAX,
};

use super::{
    activate::Order,
    admit::Denied,
    doors::{bad, field_bytes, refused},
    node::Node,
};
use crate::worker::For;

/// Decisions that come out otherwise and are listed one by one.
const FLIPS_LISTED_MAX: usize = 50;

/// What the second asking may take. Policies have no deadline here as they have it for callers.
const REPLAY_MAX: Duration = Duration::from_secs(5);

impl Node {
    pub(super) fn operate_policy_plan(&self, body: &Value) -> Result<Value, OperatorError> {
        let package = field_bytes(body, "package")?;
        let bundle = self
            .check_offer(&package)
            .and_then(|_| self.verify_package(&package, For::Operator))
            .map_err(|denied| refused(&denied))?;
        let last = match body.get("replay") {
            None => REPLAY_RECORDS_MAX,
            Some(last) => last
                .as_u64()
                .filter(|last| *last <= REPLAY_RECORDS_MAX)
                .ok_or_else(|| bad(format!("`replay` is a number up to {REPLAY_RECORDS_MAX}")))?,
        };
        let accepts_flips = accepts_flips(body)?;
        let plan = self.plan_of(&bundle, accepts_flips);
        // What the act would be refused for.
        let gates = self.check_gates(&bundle, &Order::planned(&plan, accepts_flips));
        let blocked = gates
            .err()
            .map(|denied| json!({"code": denied.code, "message": denied.message}));
        let current = self.slots.current();
        let changes = current
            .as_ref()
            .map(|current| {
                difference(
                    &current.bundle().package().archive,
                    &bundle.package().archive,
                )
            })
            .transpose()
            .map_err(|error| refused(&Denied::local(error.code(), error)))?;
        let replay = self
            .replay(current.as_ref().map(|c| c.bundle()), &bundle, last)
            .map_err(|message| OperatorError {
                status: 503,
                code: "AUDIT_UNAVAILABLE".to_owned(),
                message,
            })?;
        let manifest = bundle.manifest();
        Ok(json!({
            "plan": plan,
            "accept_flips": accepts_flips,
            "blocked": blocked,
            "activate": {"name": manifest.name, "epoch": manifest.epoch, "version": manifest.version,
                         "hash": bundle.content_id(), "signers": bundle.signers(),
                         "tests_passed": bundle.tests_passed(), "warnings": bundle.warnings()},
            "replaces": current.as_ref().map(|current| {
                let manifest = current.bundle().manifest();
                json!({"name": manifest.name, "epoch": manifest.epoch, "version": manifest.version,
                       "hash": current.bundle().content_id()})
            }),
            "changes": changes,
            "widening": self.plan_widening(&bundle, body),
            "replay": replay.told(),
        }))
    }

    /// Activates a bundle if that is still what the plan said: the same bundle in place of the same
    /// one, signed by the same keys.
    pub(super) fn operate_policy_activate(
        &self,
        body: &Value,
        apply: bool,
    ) -> Result<Value, OperatorError> {
        if !apply {
            return self.operate_policy_plan(body);
        }
        let package = field_bytes(body, "package")?;
        let plan = body
            .get("plan")
            .and_then(Value::as_str)
            .ok_or_else(|| bad("`plan` is required: the one that policy.plan answered"))?;
        self.activate(&package, &Order::planned(plan, accepts_flips(body)?))
            .map(|activated| activated.told())
            .map_err(|denied| {
                self.reject_bundle(&denied);
                refused(&denied)
            })
    }

    /// Names what an activation would do.
    pub(super) fn plan_of(&self, bundle: &VerifiedBundle, accepts_flips: bool) -> String {
        let mut text = format!("tidelock plan\n{}\n", bundle.content_id());
        for signer in bundle.signers() {
            text.push_str(&format!("signer {signer}\n"));
        }
        if let Some(current) = self.slots.current() {
            text.push_str(&format!(
                "replaces {} {:?}\n",
                current.bundle().content_id(),
                current.source()
            ));
        }
        if let Some(aside) = self.slots.aside() {
            text.push_str(&format!("aside {}\n", aside.content_id));
        }
        if accepts_flips {
            text.push_str("flips are accepted\n");
        }
        short_digest(&text)
    }

    /// Asks both bundles what was asked lately. Engines are pure: nothing comes of it but the answer.
    pub(super) fn replay(
        &self,
        before: Option<&VerifiedBundle>,
        after: &VerifiedBundle,
        last: u64,
    ) -> Result<Replay, String> {
        let last = usize::try_from(last).unwrap_or(usize::MAX);
        let records = self.log.tail(last).map_err(|e| e.to_string())?;
        let begun = Instant::now();
        let mut seen = Replay::default();
        // The newest first: they are what matters if time runs out.
        for (index, bytes) in records.into_iter().rev() {
            if begun.elapsed() >= REPLAY_MAX {
                seen.ended_early = true;
                break;
            }
            let record: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            match recorded_request(&record) {
                Ok(request) => seen.ask(index, &record, &request, before, after),
                Err(why) => seen.leave_out(why.as_str()),
            }
        }
        Ok(seen)
    }
}

fn accepts_flips(body: &Value) -> Result<bool, OperatorError> {
    match body.get("accept_flips") {
        None => Ok(false),
        Some(accepts) => accepts
            .as_bool()
            .ok_or_else(|| bad("`accept_flips` is true or false")),
    }
}

/// A name for what a text says, short enough to be copied by hand.
pub(super) fn short_digest(text: &str) -> String {
    let hash = digest(&SHA256, text.as_bytes());
    let short = hash.as_ref().iter().take(8);
    short.map(|byte| format!("{byte:02x}")).collect()
}

/// What a bundle says to a recorded request, as if it were new and its node well.
fn asked(bundle: &VerifiedBundle, request: &PolicyRequest) -> Evaluation {
    let mut request = request.clone();
    match bundle.describe_node(&mut request, Posture::Normal, 0) {
        Ok(()) => bundle.evaluate(&request),
        Err(error) => Evaluation {
            verdict: Verdict::Error,
            policies: Vec::new(),
            errors: vec![error],
        },
    }
}

/// How recorded actions come out.
#[derive(Default)]
pub(super) struct Replay {
    same: u64,
    flips: Vec<Value>,
    to_allow: u64,
    to_deny: u64,
    left_out: Map<String, Value>,
    ended_early: bool,
}

impl Replay {
    fn ask(
        &mut self,
        index: u64,
        record: &Value,
        request: &PolicyRequest,
        before: Option<&VerifiedBundle>,
        after: &VerifiedBundle,
    ) {
        let now = before.map(|before| asked(before, request));
        let then = asked(after, request);
        let allowed = now
            .as_ref()
            .is_some_and(|now| now.verdict == Verdict::Permit);
        let allows = then.verdict == Verdict::Permit;
        match (allowed, allows) {
            (false, true) => self.to_allow += 1,
            (true, false) => self.to_deny += 1,
            _ => {
                self.same += 1;
                return;
            }
        }
        if self.flips.len() < FLIPS_LISTED_MAX {
            let part = |key: &str| record.get(key).cloned().unwrap_or_default();
            self.flips.push(json!({
                "index": index,
                "principal": part("principal"),
                "action": part("action"),
                "resource": part("resource"),
                "before": now.map(|now| json!({"verdict": now.verdict, "policies": now.policies})),
                "after": {"verdict": then.verdict, "policies": then.policies, "errors": then.errors},
            }));
        }
    }

    fn leave_out(&mut self, why: &str) {
        let count = self
            .left_out
            .entry(why.to_owned())
            .or_insert_with(|| 0.into());
        *count = (count.as_u64().unwrap_or_default() + 1).into();
    }

    pub(super) fn to_allow(&self) -> u64 {
        self.to_allow
    }

    pub(super) fn to_deny(&self) -> u64 {
        self.to_deny
    }

    /// Whether time ran out before all were asked.
    pub(super) fn ended_early(&self) -> bool {
        self.ended_early
    }

    /// How many came out otherwise.
    pub(super) fn counts(self) -> Value {
        json!({"deny_to_allow": self.to_allow, "allow_to_deny": self.to_deny, "ended_early": self.ended_early})
    }

    pub(super) fn told(self) -> Value {
        json!({
            "same": self.same,
            "deny_to_allow": self.to_allow,
            "allow_to_deny": self.to_deny,
            "flips": self.flips,
            "not_asked": self.left_out,
            "ended_early": self.ended_early,
        })
    }
}
