//! What activating a bundle would change: the plan that an operator reads before it acts.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Value, json};
use tidelock_gateway::OperatorError;
use tidelock_policy::{VerifiedBundle, difference, limits::REPLAY_RECORDS_MAX};

use super::{
    activate::Order,
    admit::Denied,
    doors::{bad, field_bytes, refused},
    node::Node,
    replay::Span,
};
use crate::worker::For;

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
        // What the act would be refused for.
        let gates = self.check_gates(&bundle, &Order::drawing(accepts_flips));
        let (accepted, blocked) = match gates {
            Ok(passed) => (passed.accepted, None),
            Err(denied) => (
                None,
                Some(json!({"code": denied.code, "message": denied.message})),
            ),
        };
        let block_on = self.activation_rules().map_err(|denied| refused(&denied))?;
        let block_on = block_on.block_on;
        let plan = PlanName {
            base: self.plan_of(&bundle, accepts_flips),
            flips: accepted.as_ref().map(|replay| replay.acceptable(block_on)),
        };
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
        // What is accepted is what is shown.
        let replay = match accepted {
            Some(accepted) => accepted,
            None => self
                .replay(
                    &self.measure(current.as_deref()),
                    &bundle,
                    Span::newest(last),
                )
                .map_err(|message| OperatorError {
                    status: 503,
                    code: "AUDIT_UNAVAILABLE".to_owned(),
                    message,
                })?,
        };
        let manifest = bundle.manifest();
        Ok(json!({
            "plan": plan.to_string(),
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
        let plan = PlanName::parse(plan);
        self.activate(&package, &Order::planned(&plan, accepts_flips(body)?))
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
}

/// The name of a plan: what would be put in place of what, and which flips an operator accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlanName {
    /// What [`Node::plan_of`] says.
    pub(super) base: String,
    /// Where some block that are accepted.
    pub(super) flips: Option<AcceptedFlips>,
}

/// Flips that block and that an operator was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AcceptedFlips {
    /// The newest record that was looked at for them.
    pub(super) newest: u64,
    /// Names them.
    pub(super) digest: String,
}

impl PlanName {
    /// Reads a name. What is none is the name of no plan.
    pub(super) fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '-');
        let base = parts.next().unwrap_or_default().to_owned();
        let newest = parts.next().and_then(|newest| newest.parse().ok());
        let flips = newest
            .zip(parts.next())
            .map(|(newest, digest)| AcceptedFlips {
                newest,
                digest: digest.to_owned(),
            });
        let name = Self { base, flips };
        match name.to_string() == text {
            true => name,
            false => Self {
                base: text.to_owned(),
                flips: None,
            },
        }
    }
}

impl fmt::Display for PlanName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)?;
        match &self.flips {
            None => Ok(()),
            Some(AcceptedFlips { newest, digest }) => write!(f, "-{newest}-{digest}"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_plans_are_read_as_they_are_written() {
        let named = |text: &str| {
            let name = PlanName::parse(text);
            assert_eq!(name.to_string(), text);
            name.flips.map(|flips| (flips.newest, flips.digest))
        };
        assert_eq!(named("5f3c2a9be01d7744"), None);
        let flips = named("5f3c2a9be01d7744-1042-91ab5f3c2a9be01d");
        assert_eq!(flips, Some((1042, "91ab5f3c2a9be01d".to_owned())));
        for none in ["", "-", "a-b-c", "a-1", "a-01-b", "a--1-b", "a-+1-b"] {
            assert_eq!(named(none), None, "{none}");
        }
    }
}
