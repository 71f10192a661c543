//! The activation pipeline: every step between a package and a bundle that decides, in order, on whatever
//! way it came.
//!
//! verify, compile in a worker, validate, the bundle's own tests ([`Node::verify_package`]); its place in the
//! sequence and what was set aside here; the plan; the widening gate; shadow replay; the rollback target and
//! the other slots, durable; the atomic switch; the self-check. What fails before the switch changes
//! nothing; what fails the self-check is set aside, and the last known good bundle serves.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tidelock_policy::{
    Activation, ActivationKind, ActivationRules, ActivePolicy, AsideCause, BlockOn, ContentId,
    Floor, Manifest, NotRead, Package, Role, SetAside, TrustFile, VerifiedBundle,
    limits::{REPLAY_RECORDS_MAX, SELF_CHECK_CASES_MAX},
};
use tidelock_prover::Widening;
use tidelock_segments::{Charge, NodeId, SegmentRef, VerifiedSegment};

use super::{
    admit::Denied,
    node::Node,
    plan::{AcceptedFlips, PlanName},
    replay::{Before, Replay, Span},
    rollback::undo_of,
    self_check::{Fault, Surroundings, self_check},
    trust::no_trust,
    waiting::{Offered, waits},
};
use crate::worker::For;

/// What the self-check may take. One question more may be under way, which is asked five times at most.
const SELF_CHECK_MAX: Duration = Duration::from_secs(2);
/// Before a question is asked again.
const SELF_CHECK_PAUSE: Duration = Duration::from_millis(100);

/// Of a flip that a plan did not show.
const FLIP_CHARS_SHOWN: usize = 600;

/// How often a bundle is looked at while what decides, or the trust, goes on changing under the look.
const LOOKS_MAX: usize = 3;

/// Why a bundle is to be offered again, and soon.
pub(super) const ACTIVATION_BUSY: &str = "ACTIVATION_BUSY";

/// On whose word a bundle is to be activated, and after which look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order<'a> {
    asker: For,
    look: Look<'a>,
    accepts_flips: bool,
    /// Nobody asks for it now: its time has come.
    by_schedule: bool,
}

#[derive(Debug, Clone, Copy)]
enum Look<'a> {
    /// Nobody looked.
    None,
    /// The plan is being drawn.
    Drawing,
    /// The plan that an operator looked at.
    Plan(&'a PlanName),
}

impl<'a> Order<'a> {
    pub(super) fn unlooked(asker: For) -> Self {
        Self {
            asker,
            look: Look::None,
            accepts_flips: false,
            by_schedule: false,
        }
    }

    pub(super) fn scheduled() -> Self {
        Self {
            by_schedule: true,
            ..Self::unlooked(For::Peer)
        }
    }

    pub(super) fn drawing(accepts_flips: bool) -> Self {
        Self {
            asker: For::Operator,
            look: Look::Drawing,
            accepts_flips,
            by_schedule: false,
        }
    }

    pub(super) fn planned(plan: &'a PlanName, accepts_flips: bool) -> Self {
        Self {
            look: Look::Plan(plan),
            ..Self::drawing(accepts_flips)
        }
    }

    fn plan(&self) -> Option<&'a PlanName> {
        match self.look {
            Look::Plan(plan) => Some(plan),
            Look::None | Look::Drawing => None,
        }
    }
}

/// What a bundle has passed before the switch.
pub(super) struct Passed {
    /// What is known of its permitting more than the one before.
    widening: Widening,
    /// Flips that would have blocked, and that an operator accepted.
    pub(super) accepted: Option<Replay>,
}

/// Who looks at bundles: what may take long for one holds up none of the others.
#[derive(Debug, Default)]
pub(super) struct Looking {
    urgent: Mutex<()>,
    operator: Mutex<()>,
    peer: Mutex<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// Emergencies, and what ought to decide already: neither is proved nor replayed.
    Urgent,
    Operator,
    Peer,
}

impl Looking {
    fn of(&self, lane: Lane) -> &Mutex<()> {
        match lane {
            Lane::Urgent => &self.urgent,
            Lane::Operator => &self.operator,
            Lane::Peer => &self.peer,
        }
    }
}

/// A bundle that was looked at.
struct Looked {
    bundle: VerifiedBundle,
    passed: Passed,
}

/// What a look depends on and that changes only by turns.
struct Surrounding {
    trust: Arc<TrustFile>,
    current: Option<Arc<ActivePolicy>>,
    floor: Option<Floor>,
    aside: Option<SetAside>,
}

impl PartialEq for Surrounding {
    fn eq(&self, other: &Self) -> bool {
        let ours = self.current.as_ref().map(Arc::as_ptr);
        let theirs = other.current.as_ref().map(Arc::as_ptr);
        Arc::ptr_eq(&self.trust, &other.trust)
            && ours == theirs
            && self.floor == other.floor
            && self.aside == other.aside
    }
}

/// What storing a bundle's segment came to.
#[derive(Default)]
struct Kept {
    /// The segment, if it is new here.
    new: Option<SegmentRef>,
    /// Those of the same content that it takes the place of.
    outdated: Vec<SegmentRef>,
}

/// A bundle that began to decide, and passed its self-check.
pub(super) struct Activated {
    pub(super) activation: Activation,
    widening: Widening,
    accepted: Option<Value>,
    undo: Value,
}

impl Activated {
    /// What installing the bundle did.
    pub(super) fn told(&self) -> Value {
        let activation = &self.activation;
        json!({
            "name": activation.name,
            "epoch": activation.epoch,
            "hash": activation.content_id,
            "kind": activation.kind,
            "replaced_epoch": activation.replaced.as_ref().map(|(epoch, _)| *epoch),
            "widening": self.widening.word(),
            "accepted_flips": self.accepted,
            "undo": self.undo,
        })
    }
}

impl Node {
    /// Verifies, stores and activates a bundle; INV-06: by local trust, clock and disk only.
    pub(super) fn install_bundle(&self, package: &[u8], asker: For) -> Result<Activated, Denied> {
        self.activate(package, &Order::unlooked(asker))
    }

    /// The pipeline. What takes long, compiling, proof and replay, is done before the turn is taken, for which
    /// withdrawals, rollbacks and emergencies wait. It counts only if trust and what decides are still the same
    /// then, so that no bundle is judged by a trust file that a reload replaced meanwhile.
    pub(super) fn activate(&self, package: &[u8], order: &Order<'_>) -> Result<Activated, Denied> {
        let (signed, manifest) = self.check_offer(package)?;
        let _lane = self
            .looking
            .of(self.lane_of(&manifest, &signed.content_id(), order))
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for _ in 0..LOOKS_MAX {
            let around = self.surroundings().ok_or_else(no_trust)?;
            let looked = self.look(package, order);
            let _turn = self
                .activating
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // Nor does a refusal hold by what was replaced meanwhile.
            if self.surroundings().is_some_and(|now| now == around) {
                return self.take(looked?, order);
            }
        }
        Err(Denied::local(
            ACTIVATION_BUSY,
            "what decides here, or the trust, changed each time while the bundle was looked at: offer it again",
        ))
    }

    /// INV-07: one bundle a lane is loaded at a time.
    fn lane_of(&self, manifest: &Manifest, content_id: &ContentId, order: &Order<'_>) -> Lane {
        let is_held = self.slots.wanted();
        let is_held = is_held.is_some_and(|floor| floor.content_id == *content_id);
        match order.asker {
            _ if manifest.role == Role::BreakGlass || is_held => Lane::Urgent,
            For::Slots => Lane::Urgent,
            For::Operator => Lane::Operator,
            For::Peer => Lane::Peer,
        }
    }

    fn surroundings(&self) -> Option<Surrounding> {
        Some(Surrounding {
            trust: self.policy_trust.load_full()?,
            current: self.slots.current(),
            floor: self.slots.floor(),
            aside: self.slots.aside(),
        })
    }

    /// Everything before the switch that is not over at once.
    fn look(&self, package: &[u8], order: &Order<'_>) -> Result<Looked, Denied> {
        self.check_offer(package)?;
        if order.by_schedule {
            self.check_no_emergency()?;
        }
        let bundle = self.verify_package(package, order.asker)?;
        let passed = self.check_gates(&bundle, order)?;
        Ok(Looked { bundle, passed })
    }

    /// The switch and what comes with it; the turn is held.
    fn take(&self, looked: Looked, order: &Order<'_>) -> Result<Activated, Denied> {
        let Looked { bundle, passed } = looked;
        // The time may have come since.
        self.check_floor(bundle.manifest(), bundle.content_id())?;
        let was_unusable = self.slots.wanted().is_some();
        let decided_already = self.decides(&bundle);
        let emergency = emergency(&bundle);
        let created_unix_ms = bundle.manifest().created_unix_ms;
        let kept = self.keep_policy_segment(&bundle)?;
        let activation = self.switch_to(bundle, order)?;
        self.keep_passes();
        // Ruling 25: the policy authority's word alone.
        if emergency.is_none() {
            self.clock.raise_by_signed(created_unix_ms);
        }
        let activated = Activated {
            widening: passed.widening,
            accepted: passed.accepted.map(Replay::counts),
            undo: undo_of(&self.slots),
            activation,
        };
        if activated.activation.kind != ActivationKind::Reinstalled
            || was_unusable
            || !decided_already
        {
            self.event("bundle_activated", activated.told());
            if let Some(emergency) = emergency {
                self.event("break_glass_activated", emergency);
            }
        }
        let checked = match decided_already {
            true => Ok(()),
            false => self.finish_trial(),
        };
        // What follows from the switch does so whatever the check said.
        self.waiting.retain_above(activated.activation.epoch);
        self.waiting.judge_anew();
        self.drop_superseded_policy(&activated.activation);
        for old in kept.outdated {
            if let Err(error) = self.store.remove(&old.id) {
                tracing::warn!(%error, id = %old.id, "policy segment without enough signatures stays");
            }
        }
        self.confirm_from_store();
        checked?;
        if let Some(segment) = kept.new {
            self.offered(segment);
        }
        Ok(activated)
    }

    /// What stands between a verified bundle and the switch.
    pub(super) fn check_gates(
        &self,
        bundle: &VerifiedBundle,
        order: &Order<'_>,
    ) -> Result<Passed, Denied> {
        self.check_floor(bundle.manifest(), bundle.content_id())?;
        self.check_plan(bundle, order)?;
        self.check_aside(bundle, order)?;
        // What is the newest here already has passed them.
        let was_activated = self
            .slots
            .floor()
            .is_some_and(|floor| floor.content_id == *bundle.content_id());
        if was_activated && self.slots.aside().is_none() {
            return Ok(Passed {
                widening: Widening::NotWider,
                accepted: None,
            });
        }
        let widening = self.widening_gate(bundle, order.asker)?;
        let accepted = self.check_flips(bundle, order)?;
        Ok(Passed { widening, accepted })
    }

    /// What was set aside here comes back by an operator's plan alone.
    fn check_aside(&self, bundle: &VerifiedBundle, order: &Order<'_>) -> Result<(), Denied> {
        let is_aside = self.slots.was_set_aside(bundle.content_id());
        if !matches!(order.look, Look::None) || !is_aside {
            return Ok(());
        }
        let error = tidelock_policy::ActivateError::SetAside {
            epoch: bundle.epoch(),
        };
        Err(Denied::local(error.code(), error))
    }

    fn check_plan(&self, bundle: &VerifiedBundle, order: &Order<'_>) -> Result<(), Denied> {
        let now = |plan: &PlanName| self.plan_of(bundle, order.accepts_flips) == plan.base;
        if order.plan().is_none_or(now) {
            return Ok(());
        }
        Err(Denied::local(
            "PLAN_STALE",
            "what would be activated, what it would replace, who signed it or whether flips are accepted is \
             not what the plan said: look at a new plan",
        ))
    }

    pub(super) fn activation_rules(&self) -> Result<ActivationRules, Denied> {
        Ok(*self.bundle_trust()?.activation())
    }

    /// Shadow replay, where the trust file says that flips block. Answers those that would have blocked and
    /// were accepted.
    fn check_flips(
        &self,
        bundle: &VerifiedBundle,
        order: &Order<'_>,
    ) -> Result<Option<Replay>, Denied> {
        let rules = self.activation_rules()?;
        // Before the first bundle nothing was allowed: all that it allows would be a flip. And what is signed
        // for an emergency is signed to come out otherwise.
        let asks_nothing = rules.block_on == BlockOn::None || self.slots.floor().is_none();
        if asks_nothing || bundle.manifest().role == Role::BreakGlass {
            return Ok(None);
        }
        let accepted = order.plan().and_then(|plan| plan.flips.as_ref());
        match accepted.filter(|_| order.accepts_flips) {
            Some(accepted) => self.check_accepted(bundle, &rules, accepted).map(Some),
            None => self.check_unaccepted(bundle, &rules, order),
        }
    }

    /// What recorded actions are held against: what decides now, or where nothing does, what the newest bundle
    /// said while it did. A node without policy would otherwise take none but by an operator's plan.
    pub(super) fn measure<'a>(&self, current: Option<&'a ActivePolicy>) -> Before<'a> {
        match current {
            Some(current) => Before::Bundle(current.bundle()),
            None => Before::Recorded(self.slots.floor().map(|floor| floor.content_id)),
        }
    }

    fn replay_for(
        &self,
        bundle: &VerifiedBundle,
        rules: &ActivationRules,
        (after, up_to): (Option<u64>, Option<u64>),
    ) -> Result<Replay, Denied> {
        let span = Span {
            last: rules.replay_records.unwrap_or(REPLAY_RECORDS_MAX),
            after,
            up_to,
        };
        let current = self.slots.current();
        self.replay(&self.measure(current.as_deref()), bundle, span)
            .map_err(|why| Denied::local("POLICY_REPLAY", not_replayed(&why)))
    }

    fn check_unaccepted(
        &self,
        bundle: &VerifiedBundle,
        rules: &ActivationRules,
        order: &Order<'_>,
    ) -> Result<Option<Replay>, Denied> {
        let replay = self.replay_for(bundle, rules, (None, None))?;
        let draws = order.accepts_flips && matches!(order.look, Look::Drawing);
        let is_blocked = replay.blocking(rules.block_on).next().is_some();
        if !replay.ended_early() && !is_blocked {
            return Ok(None);
        }
        if draws {
            return Ok(Some(replay));
        }
        if replay.ended_early() {
            let why = "it took too long; where the plan shows what is wanted, activate by one with --accept-flips";
            return Err(Denied::local("POLICY_REPLAY", not_replayed(why)));
        }
        let (to_allow, to_deny) = replay.flips();
        if order.accepts_flips {
            return Err(other_flips(&format!(
                "it showed none that block, and there are {to_allow} to allow and {to_deny} to deny now"
            )));
        }
        Err(Denied::local(
            "POLICY_FLIPS",
            format!(
                "of {} recorded actions {to_allow} that were denied would be allowed and {to_deny} the other way \
                 round, and the trust file says that this blocks ({}): look at tidelock policy plan FILE \
                 --accept-flips, and where it is right, activate by that plan",
                replay.asked(),
                rules.block_on.as_str()
            ),
        ))
    }

    /// Whether the flips are those that the plan showed: the same among the records that it was made of, and
    /// no others in what was recorded since.
    fn check_accepted(
        &self,
        bundle: &VerifiedBundle,
        rules: &ActivationRules,
        accepted: &AcceptedFlips,
    ) -> Result<Replay, Denied> {
        let newest = Some(accepted.newest);
        let shown = self.replay_for(bundle, rules, (None, newest))?;
        if shown.acceptable(rules.block_on).digest != accepted.digest {
            return Err(other_flips(
                "other actions come out otherwise among the records that it was made of",
            ));
        }
        let since = self.replay_for(bundle, rules, (newest, None))?;
        if shown.ended_early() {
            return Ok(shown.and(since));
        }
        if since.ended_early() || since.older_unread() {
            return Err(other_flips(
                "more was recorded since than can be asked again",
            ));
        }
        let known: BTreeSet<&String> = shown.blocking(rules.block_on).collect();
        let other = since
            .blocking(rules.block_on)
            .find(|flip| !known.contains(flip));
        match other {
            Some(flip) => {
                let shown: String = flip.chars().take(FLIP_CHARS_SHOWN).collect();
                Err(other_flips(&format!("recorded since: {shown}")))
            }
            None => Ok(shown.and(since)),
        }
    }

    /// Stores the segment that carries a bundle to others. The same content under further signatures is no
    /// new policy (ruling 5), and no new segment as long as those that are held are enough.
    fn keep_policy_segment(&self, bundle: &VerifiedBundle) -> Result<Kept, Denied> {
        let segment = self.own_policy_segment(bundle.package(), bundle.manifest())?;
        let reference = segment.reference();
        let Some(mut outdated) = self.outdated_policy(&reference, bundle) else {
            return Ok(Kept::default());
        };
        self.store
            .put(&segment, Charge::Reserve)
            .map_err(|e| Denied::local("STORE", e))?;
        outdated.retain(|old| old.id != reference.id);
        Ok(Kept {
            new: Some(reference),
            outdated,
        })
    }

    fn decides(&self, bundle: &VerifiedBundle) -> bool {
        self.slots.current().is_some_and(|current| {
            current.source() == tidelock_policy::Source::Active
                && current.bundle().content_id() == bundle.content_id()
        })
    }

    /// Makes the rollback target, the bundle and the floor durable, in this order, then switches. Requests
    /// under way end with the bundle that they began with.
    fn switch_to(&self, bundle: VerifiedBundle, order: &Order<'_>) -> Result<Activation, Denied> {
        let switched = match order.plan() {
            Some(_) => self.slots.reinstate(bundle),
            None => self.slots.activate(bundle),
        };
        switched.map_err(|e| Denied::local(e.code(), &e))
    }

    /// Checks the bundle that serves, and sets it aside if it does not answer as it must.
    pub(super) fn finish_trial(&self) -> Result<(), Denied> {
        let why = match self.check_serving() {
            Ok(answered) => {
                if let Err(error) = self.slots.settle() {
                    // It decides; the next start checks it again.
                    tracing::warn!(%error, "a passed self-check is not kept");
                }
                tracing::info!(answered, "the self-check after the switch passed");
                return Ok(());
            }
            Err(Fault::Engines(why)) => {
                // It stays on trial, and is asked again every second.
                tracing::warn!(
                    why,
                    "the self-check of the bundle that decides waits for an engine"
                );
                return Ok(());
            }
            Err(Fault::Bundle(why)) => why,
        };
        let trust = self.bundle_trust()?;
        let reverted = self
            .slots
            .set_aside_by(
                AsideCause::SelfCheck,
                &why,
                self.clock.unix_ms(),
                &|package| self.load_package(package, &trust, For::Slots),
            )
            .map_err(|error| Denied::local(error.code(), error))?;
        self.event(
            "policy_activation_reverted",
            json!({
                "epoch": reverted.aside.epoch,
                "hash": reverted.aside.content_id,
                "why": why,
                "serves": reverted.serves,
                "not_kept": reverted.not_kept,
            }),
        );
        let serves = reverted.serves.map_or_else(
            || "no other bundle can serve, so every action is denied".to_owned(),
            |standby| format!("epoch {} serves, restricted at best", standby.epoch),
        );
        Err(Denied::local(
            "POLICY_SELF_CHECK",
            format!(
                "the bundle was set aside, because it failed its self-check on the engines that serve: \
                 {why}; {serves}; mend it and sign it with a new epoch"
            ),
        ))
    }

    /// A self-check that found no engine free is made up for.
    pub(super) fn try_trial_again(&self) {
        if !self.slots.is_on_trial() {
            return;
        }
        // Whoever activates meanwhile checks it.
        let Ok(_turn) = self.activating.try_lock() else {
            return;
        };
        if let Err(denied) = self.finish_trial() {
            tracing::error!(%denied, "the bundle that was on trial");
        }
    }

    fn check_serving(&self) -> Result<u64, Fault> {
        self.slots.check_reads_back().map_err(|error| match error {
            NotRead::Storage(why) => Fault::Engines(why),
            NotRead::Other(why) => Fault::Bundle(why),
        })?;
        let policy = self.slots.current();
        let policy = policy.ok_or_else(|| "no bundle decides".to_owned())?;
        let cases = policy.bundle().own_cases(SELF_CHECK_CASES_MAX);
        let cases = cases.map_err(|error| error.to_string())?;
        let begun = Instant::now();
        self_check(
            &cases,
            &Surroundings {
                ask: &|request| self.interceptor.probe(&policy, request),
                wait: &|| std::thread::sleep(SELF_CHECK_PAUSE),
                has_time: &|| begun.elapsed() < SELF_CHECK_MAX,
            },
        )
    }

    /// Notes a refused bundle that waits for an operator or more signatures; whether the refusal is news.
    pub(super) fn note_waiting(&self, segment: &VerifiedSegment, denied: &Denied) -> bool {
        let header = segment.header();
        let copy = |_: &&str| self.offered_copy(segment, &Package::decode(segment.body()).ok()?);
        let name = header.origin.policy_name().filter(|_| waits(denied));
        match name.as_ref().and_then(copy).zip(name) {
            Some((copy, name)) => self.waiting.note(
                &copy,
                (name, header.sequence),
                denied,
                (self.clock.unix_ms(), self.clock.monotonic()),
            ),
            _ => true,
        }
    }

    /// Notes a refused bundle of a peer; one that waits for an operator is told once.
    pub(super) fn note_bundle_refused(
        &self,
        peer: &NodeId,
        segment: &VerifiedSegment,
        denied: &Denied,
    ) {
        if denied.code == ACTIVATION_BUSY {
            self.waiting.come_again();
        }
        if self.note_waiting(segment, denied) {
            self.rejected(
                "bundle_rejected",
                peer,
                denied,
                json!({"segment": segment.id(), "code": denied.code, "message": denied.message}),
            );
        }
    }

    /// What is to be known of a segment as a copy of its bundle; none without a trust file.
    pub(super) fn offered_copy(
        &self,
        segment: &VerifiedSegment,
        package: &Package,
    ) -> Option<Offered> {
        Some(Offered {
            segment: segment.id(),
            content_id: package.content_id(),
            signatures: self.policy_trust.load_full()?.signatures_of(package),
        })
    }

    /// Asks the peers again for bundles that may be taken by now.
    pub(super) fn ask_for_waiting(&self) {
        if self.waiting.is_due(self.clock.monotonic())
            && let Some(mesh) = self.mesh.get()
        {
            mesh.refresh();
        }
    }

    /// What is told of policy beside the bundle that decides.
    pub(super) fn activation_json(&self) -> Value {
        let rules = self.activation_rules().unwrap_or_default();
        let mut told: BTreeMap<&str, Value> = BTreeMap::from([
            ("set_aside", json!(self.slots.aside())),
            ("standby", json!(self.slots.standby())),
            ("on_trial", json!(self.slots.is_on_trial())),
            ("waiting", self.waiting.told()),
            ("scheduled", self.scheduled.told()),
            ("block_on", json!(rules.block_on)),
            ("widening_signatures", json!(rules.widening_threshold)),
        ]);
        told.extend(
            undo_of(&self.slots)
                .as_str()
                .map(|undo| ("undo", json!(undo))),
        );
        json!(told)
    }
}

fn not_replayed(why: &str) -> String {
    format!(
        "the recorded actions could not be asked again, and the trust file says that flips block: {why}"
    )
}

fn other_flips(why: &str) -> Denied {
    Denied::local(
        "PLAN_FLIPS",
        format!("not the flips that the plan showed: {why}; look at a new plan"),
    )
}

fn emergency(bundle: &VerifiedBundle) -> Option<Value> {
    (bundle.manifest().role == Role::BreakGlass).then(|| {
        json!({
            "name": bundle.manifest().name,
            "epoch": bundle.epoch(),
            "expires_at": bundle.manifest().expires_at,
            "signers": bundle.signers(),
        })
    })
}
