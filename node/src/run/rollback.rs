//! Going back: an operator sets the active bundle aside, and the last known good one serves.
//!
//! The floor stays (INV-16), so nothing older is installed; ruling 14 holds for what serves.

use std::sync::PoisonError;

use serde_json::{Value, json};
use tidelock_gateway::OperatorError;
use tidelock_policy::{
    ActivateError, AsideCause, ContentId, Slots, Source, VerifiedBundle, difference,
    limits::{MESSAGE_BYTES_MAX, REPLAY_RECORDS_MAX},
};

use super::{
    admit::Denied,
    doors::{bad, refused, unrecorded},
    node::Node,
    plan::short_digest,
    replay::{Before, Replay, Span},
};
use crate::worker::For;

/// Names what a rollback would do.
fn plan_of(aside: &ContentId, serves: &ContentId) -> String {
    short_digest(&format!(
        "tidelock rollback\naside {aside}\nserves {serves}\n"
    ))
}

/// The command that undoes what was activated last; null where nothing stands behind it.
pub(super) fn undo_of(slots: &Slots) -> Value {
    let active = slots
        .current()
        .filter(|current| current.source() == Source::Active);
    match (active, slots.standby()) {
        (Some(active), Some(standby)) => {
            let plan = plan_of(active.bundle().content_id(), &standby.content_id);
            json!(format!("tidelock policy rollback --plan {plan} --apply"))
        }
        _ => Value::Null,
    }
}

fn named(bundle: &VerifiedBundle) -> Value {
    let manifest = bundle.manifest();
    json!({
        "name": manifest.name, "epoch": manifest.epoch, "version": manifest.version,
        "hash": bundle.content_id(),
    })
}

fn denied(error: &ActivateError) -> OperatorError {
    refused(&Denied::local(error.code(), error))
}

impl Node {
    /// Shows what going back would mean, or goes back by the plan that showed it.
    pub(super) fn operate_policy_rollback(
        &self,
        body: &Value,
        apply: bool,
    ) -> Result<Value, OperatorError> {
        let text = |key: &str| body.get(key).and_then(Value::as_str);
        let reason = text("reason").unwrap_or_default();
        if reason.len() > MESSAGE_BYTES_MAX {
            return Err(bad(format!(
                "`reason` has at most {MESSAGE_BYTES_MAX} bytes"
            )));
        }
        // A plan changes nothing, and replays.
        let _turn = apply.then(|| {
            self.activating
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        });
        let trust = self
            .policy_trust
            .load_full()
            .ok_or_else(|| refused(&super::trust::no_trust()))?;
        let load = |package| self.load_package(package, &trust, For::Slots);
        let current = self
            .slots
            .current()
            .filter(|current| current.source() == Source::Active)
            .ok_or_else(|| denied(&ActivateError::NotActive))?;
        let standby = self
            .slots
            .read_standby_by(&load)
            .map_err(|error| denied(&error))?;
        let plan = plan_of(current.bundle().content_id(), standby.content_id());
        let (sets_aside, serves) = (named(current.bundle()), named(&standby));
        if !apply {
            let changes = difference(
                &current.bundle().package().archive,
                &standby.package().archive,
            )
            .map_err(|error| refused(&Denied::local(error.code(), error)))?;
            // To go back must not depend on it.
            let replay = self.replay(
                &Before::Bundle(current.bundle()),
                &standby,
                Span::newest(REPLAY_RECORDS_MAX),
            );
            return Ok(json!({
                "plan": plan,
                "sets_aside": sets_aside,
                "serves": serves,
                "posture": standby_posture(),
                "changes": changes,
                "replay": replay.ok().map(Replay::told),
            }));
        }
        if text("plan") != Some(plan.as_str()) {
            return Err(refused(&Denied::local(
                "PLAN_STALE",
                "what would be set aside, or what would serve, is not what the plan said: look at a new \
                 plan (tidelock policy rollback)",
            )));
        }
        let undo = format!(
            "tidelock policy activate FILE, with the bundle of {}, and then by its plan",
            current.bundle().content_id()
        );
        let detail = json!({
            "sets_aside": sets_aside, "serves": serves, "reason": reason, "plan": plan, "undo": undo,
        });
        self.record_act("policy_rolled_back", detail)
            .map_err(unrecorded)?;
        let at_unix_ms = self.clock.unix_ms();
        let set = self
            .slots
            .set_aside_by(AsideCause::Operator, reason, at_unix_ms, &load);
        if let Err(error) = set {
            self.event(
                "policy_not_rolled_back",
                json!({"code": error.code(), "message": error.to_string()}),
            );
            return Err(denied(&error));
        }
        self.waiting.judge_anew();
        self.confirm_from_store();
        Ok(json!({
            "set_aside": sets_aside,
            "serves": serves,
            "posture": standby_posture(),
            "undo": undo,
        }))
    }
}

/// What a bundle that stands in decides in, at best.
fn standby_posture() -> &'static str {
    tidelock_policy::Posture::Restricted.as_str()
}
