//! The widening gate: whether a bundle that permits more than the one that decides has the signatures that
//! the trust file asks for that.
//!
//! It is compared with what decides now: the bundle of the floor, or what stands in for it since it was set
//! aside. Where another one stands in because the floor's is damaged, there is nothing to compare with: less
//! than the stand-in permits may still be more than the damaged one did.

use std::sync::Arc;

use serde_json::{Value, json};
use tidelock_policy::{ActivePolicy, AsideCause, Role, Source, VerifiedBundle};
use tidelock_prover::{WhyUnproven, Widening};

use super::{
    admit::Denied,
    node::{Node, proof_terms},
};
use crate::worker::For;

impl Node {
    /// Lets a bundle on if nobody asks for more, if enough keys signed it, or if it is proved not wider.
    ///
    /// # Errors
    /// `WIDER_UNSIGNED` or `WIDENING_UNPROVEN`, which are never the bringer's fault.
    pub(super) fn widening_gate(
        &self,
        bundle: &VerifiedBundle,
        asker: For,
    ) -> Result<Widening, Denied> {
        let Some(needed) = self.widening_signatures(bundle) else {
            return Ok(self.widening_seen(bundle));
        };
        let said = self.widening_of(bundle, asker);
        let code = match said {
            Widening::NotWider => return Ok(said),
            Widening::Wider { .. } => "WIDER_UNSIGNED",
            _ => "WIDENING_UNPROVEN",
        };
        Err(Denied::local(
            code,
            format!(
                "{said}; the trust file asks for {needed} signatures of role `policy` for that, and there are {}: \
                 have it signed by another key, or build one that permits no more",
                bundle.signers().len()
            ),
        ))
    }

    /// What a plan says of it: the verdict, and how many signatures it takes.
    pub(super) fn plan_widening(&self, bundle: &VerifiedBundle, body: &Value) -> Value {
        let said = match body.get("prove") {
            Some(Value::Bool(false)) => self.widening_seen(bundle),
            _ => self.widening_of(bundle, For::Operator),
        };
        let mut told = json!(said);
        if let Some(told) = told.as_object_mut() {
            told.insert("text".to_owned(), said.to_string().into());
            let lacking = self
                .widening_signatures(bundle)
                .filter(|_| said != Widening::NotWider);
            told.insert("signatures_needed".to_owned(), json!(lacking));
        }
        told
    }

    /// How many signatures the trust file asks for a bundle that is not proved, if this one has fewer. What is
    /// signed for an emergency has its own threshold, and its own short end.
    fn widening_signatures(&self, bundle: &VerifiedBundle) -> Option<usize> {
        let trust = self.policy_trust.load();
        let needed = trust.as_ref()?.activation().widening_threshold?;
        let counts = bundle.manifest().role == Role::Policy;
        (counts && bundle.signers().len() < needed).then_some(needed)
    }

    /// What can be said without a solver.
    fn widening_seen(&self, bundle: &VerifiedBundle) -> Widening {
        let not_asked = || {
            Widening::unproven(
                WhyUnproven::NotAsked,
                "nobody asks for the proof; `tidelock policy plan` makes it",
            )
        };
        match self.widening_base(bundle) {
            Ok(base) => self
                .prover
                .glance(base.bundle(), bundle, self.clock.unix_ms())
                .unwrap_or_else(not_asked),
            Err(settled) => settled,
        }
    }

    fn widening_of(&self, bundle: &VerifiedBundle, asker: For) -> Widening {
        match self.widening_base(bundle) {
            Ok(base) => self.prover.prove(
                base.bundle(),
                bundle,
                self.clock.unix_ms(),
                asker,
                &proof_terms(&self.config.load()),
            ),
            Err(settled) => settled,
        }
    }

    /// The bundle to compare with, or what is to be said where there is none.
    fn widening_base(&self, bundle: &VerifiedBundle) -> Result<Arc<ActivePolicy>, Widening> {
        let Some(floor) = self.slots.floor() else {
            return Err(Widening::unproven(
                WhyUnproven::First,
                "no bundle has decided here, so every permit is new",
            ));
        };
        // What was the last to be activated may always be installed again (ruling 13).
        if floor.content_id == *bundle.content_id() && self.slots.aside().is_none() {
            return Err(Widening::NotWider);
        }
        // What was set aside on purpose is no measure: it is compared with what decides in its place.
        let is_aside = self
            .slots
            .aside()
            .is_some_and(|aside| aside.cause == AsideCause::Operator);
        let base = self
            .slots
            .current()
            .filter(|current| {
                is_aside
                    || current.source() == Source::Active
                        && *current.bundle().content_id() == floor.content_id
            })
            .ok_or_else(|| {
                Widening::unproven(
                    WhyUnproven::BaseDamaged,
                    format!(
                        "the bundle of epoch {} is damaged, was set aside or is no longer trusted: nothing may \
                         be taken for what it permitted",
                        floor.epoch
                    ),
                )
            })?;
        let manifest = base.bundle().manifest();
        let is_over = manifest
            .validity
            .expires_unix_ms
            .is_some_and(|end| end <= self.clock.unix_ms());
        if manifest.role != Role::Policy || is_over {
            return Err(Widening::unproven(
                WhyUnproven::BaseEnded,
                "what decides was for an emergency or is past its end, and no measure of what may go on",
            ));
        }
        Ok(base)
    }
}
