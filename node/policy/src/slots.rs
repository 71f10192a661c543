//! The two slots on disk, active and last known good, and the floor under them.
//!
//! Small files behind [`SlotStorage`]. `active` and `lkg` hold an encoded package, `floor` the highest
//! epoch that was ever active, its content and the oldest epoch that may stand in for it; `freshness`
//! the newest statement of the authority about the bundle; `aside` what does not decide although it is
//! the newest, and what is on trial. Activation writes `aside` (the trial), `lkg`, `active`, `floor`,
//! in this order, and only then lets the new bundle
//! decide; a crash between two writes leaves a state that [`Slots::open`] completes.
//!
//! Fallback is not rollback: the floor never moves back, and a last known good bundle that has to
//! serve does so in posture `restricted` at best. To go back is to set the active bundle aside.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use serde::{Deserialize, Serialize};

use crate::aside::{AsideCause, Marks, SetAside};
use crate::bundle::{LoadContext, VerifiedBundle};
use crate::consult::ConsultTerms;
use crate::error::{ActivateError, BundleError, StatementError, clip};
use crate::freshness::Freshness;
use crate::json;
use crate::manifest::{ClassLimits, WhenRestricted};
use crate::package::{ContentId, Package, sha256};
use crate::posture::{Posture, posture};
use crate::request::{Engine, PolicyRequest};
use crate::signed::SignedDocument;
use crate::trust::{Role, TrustFile};

const ACTIVE: &str = "active";
const LKG: &str = "lkg";
const FLOOR: &str = "floor";
const FRESHNESS: &str = "freshness";
const ASIDE: &str = "aside";

/// Where the slots live. A write is atomic and durable when it returns; a slot that was never
/// written reads as `None`.
///
/// Two implementations: the node's root directory, and
/// [`MemorySlots`](crate::testing::MemorySlots).
pub trait SlotStorage: Send + Sync {
    /// Reads a slot: `active`, `lkg`, `floor`, `aside`, `freshness`, `trust` or `trust-newest`.
    ///
    /// # Errors
    /// What the storage says.
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>>;

    /// Replaces a slot.
    ///
    /// # Errors
    /// What the storage says; the slot then holds what it held before, or the new content.
    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()>;
}

/// How a package from a slot becomes a bundle that may decide: [`VerifiedBundle::load`] and whatever
/// has to be asked before it.
pub type LoadPackage<'a> = dyn Fn(Package) -> Result<VerifiedBundle, BundleError> + 'a;

/// Which slot a deciding bundle came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The active slot.
    Active,
    /// The last known good bundle, because the active one is damaged or was set aside.
    LastKnownGood,
}

/// The bundle that decides now.
pub struct ActivePolicy {
    bundle: Arc<VerifiedBundle>,
    engine: Arc<dyn Engine>,
    source: Source,
    /// When the authority last confirmed the bundle; 0 where it has not.
    confirmed_unix_ms: AtomicU64,
}

impl std::fmt::Debug for ActivePolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActivePolicy")
            .field("bundle", &self.bundle)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl ActivePolicy {
    fn new(bundle: VerifiedBundle, source: Source) -> Self {
        let engine = bundle.engine();
        Self {
            bundle: Arc::new(bundle),
            engine,
            source,
            confirmed_unix_ms: AtomicU64::new(0),
        }
    }

    pub(crate) fn with_engine(
        bundle: VerifiedBundle,
        source: Source,
        engine: Arc<dyn Engine>,
    ) -> Self {
        Self {
            bundle: Arc::new(bundle),
            engine,
            source,
            confirmed_unix_ms: AtomicU64::new(0),
        }
    }

    /// The bundle.
    #[must_use]
    pub fn bundle(&self) -> &VerifiedBundle {
        &self.bundle
    }

    /// The engine that evaluates its policies.
    #[must_use]
    pub fn engine(&self) -> &dyn Engine {
        self.engine.as_ref()
    }

    /// The engine for another thread.
    #[must_use]
    pub fn shared_engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.engine)
    }

    /// The slot it came from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// Posture of an action at this time, by the limits of its class. An action of no class gets
    /// the worst posture of all classes.
    #[must_use]
    pub fn posture(&self, action: &str, trusted_now_unix_ms: u64) -> Posture {
        match self.bundle.class_of(action) {
            Some((_, limits)) => self.judge(limits, trusted_now_unix_ms),
            None => self.overall_posture(trusted_now_unix_ms),
        }
    }

    /// What posture `restricted` does to the action. One of no class is denied.
    #[must_use]
    pub fn when_restricted(&self, action: &str) -> WhenRestricted {
        self.bundle
            .class_of(action)
            .map_or(WhenRestricted::Deny, |(_, limits)| limits.when_restricted)
    }

    /// The decision point that has to agree to the action, if its class has one.
    #[must_use]
    pub fn consult(&self, action: &str) -> Option<&ConsultTerms> {
        let (_, limits) = self.bundle.class_of(action)?;
        limits.consult.as_ref()
    }

    /// The worst posture of all classes: what the node shows and tells its peers.
    #[must_use]
    pub fn overall_posture(&self, trusted_now_unix_ms: u64) -> Posture {
        let classes = self.bundle.manifest().classes.values();
        classes
            .map(|limits| self.judge(limits, trusted_now_unix_ms))
            .max()
            .unwrap_or_else(|| self.floor())
    }

    /// From when the age of the policy counts: the making of the bundle, or the newest statement of its
    /// authority that it is still in force (ruling 15). Contact, activation and restart do not move it.
    #[must_use]
    pub fn confirmed_unix_ms(&self) -> u64 {
        let confirmed = self.confirmed_unix_ms.load(Ordering::Acquire);
        self.bundle.manifest().created_unix_ms.max(confirmed)
    }

    /// Age of the policy at this trusted time, in seconds.
    #[must_use]
    pub fn age_s(&self, trusted_now_unix_ms: u64) -> u64 {
        trusted_now_unix_ms.saturating_sub(self.confirmed_unix_ms()) / 1000
    }

    /// Puts what the node knows of itself into a request's context, as `tidelock`, where the schema
    /// declares it for the action: posture and age of the policy.
    ///
    /// # Errors
    /// A text that denies the request, if its context holds `tidelock` already: whoever sent it must not
    /// choose what policies take for the node's own word.
    pub fn describe_node(
        &self,
        request: &mut PolicyRequest,
        posture: Posture,
        trusted_now_unix_ms: u64,
    ) -> Result<(), String> {
        self.bundle
            .describe_node(request, posture, self.age_s(trusted_now_unix_ms))
    }

    fn confirm(&self, freshness: &Freshness) {
        let manifest = self.bundle.manifest();
        if freshness.names(&manifest.name, manifest.epoch, self.bundle.content_id()) {
            self.confirmed_unix_ms
                .fetch_max(freshness.issued_unix_ms, Ordering::AcqRel);
        }
    }

    fn judge(&self, limits: &ClassLimits, trusted_now_unix_ms: u64) -> Posture {
        let created = self.confirmed_unix_ms();
        let validity = self.bundle.manifest().validity.posture(trusted_now_unix_ms);
        let floor = self.floor().max(validity);
        posture(created, trusted_now_unix_ms, limits, floor)
    }

    fn floor(&self) -> Posture {
        match self.source {
            Source::Active => Posture::Normal,
            Source::LastKnownGood => Posture::Restricted,
        }
    }
}

/// The highest epoch that was ever active on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// That epoch.
    pub epoch: u64,
    /// What was active at that epoch: to be looked for in the segment store when the slot is
    /// damaged.
    pub content_id: ContentId,
    /// Oldest epoch that may serve in its stead.
    pub min_fallback_epoch: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FloorFile {
    format: u64,
    floor: Floor,
    check: String,
}

impl Floor {
    fn of(bundle: &VerifiedBundle) -> Self {
        Self {
            epoch: bundle.epoch(),
            content_id: bundle.content_id().clone(),
            min_fallback_epoch: match bundle.manifest().role {
                // An emergency ends; what it forbade for ever would not.
                Role::BreakGlass => 0,
                _ => bundle.manifest().min_fallback_epoch,
            },
        }
    }

    fn check(&self) -> String {
        let text = format!(
            "{} {} {}",
            self.epoch, self.content_id, self.min_fallback_epoch
        );
        sha256(text.as_bytes())
    }

    fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        json::to_sorted_bytes(&FloorFile {
            format: 1,
            floor: self.clone(),
            check: self.check(),
        })
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let file: FloorFile = json::parse_as(bytes).map_err(|error| error.to_string())?;
        if file.format != 1 {
            return Err(format!(
                "format {} is not known, this node reads 1",
                file.format
            ));
        }
        // A flipped digit must not pass for another epoch.
        if file.check != file.floor.check() {
            return Err("its check value does not match".to_owned());
        }
        Ok(file.floor)
    }
}

/// One thing that is wrong with the slots. The node records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SlotFault {
    /// `active`, `lkg`, `floor`, `aside` or `freshness`.
    pub slot: &'static str,
    /// Stable code: one of [`BundleError::code`], or `SLOT_UNREADABLE`, `SLOT_MISSING`,
    /// `SLOT_WRITE`, `FLOOR_DAMAGED`, `ASIDE_DAMAGED`, `LKG_BELOW_FALLBACK`, `LKG_BREAK_GLASS`.
    pub code: &'static str,
    /// What happened and the way out, for people.
    pub message: String,
}

/// How an activated bundle stands to the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationKind {
    /// The first one on this node.
    First,
    /// A higher epoch.
    Forward,
    /// The same content again: a damaged slot is mended, otherwise nothing changes.
    Reinstalled,
}

/// A bundle that has begun to decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Activation {
    /// How it stands to the one before.
    pub kind: ActivationKind,
    /// Name of the bundle.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its content.
    pub content_id: ContentId,
    /// Epoch and content of the bundle that decided before, if any did.
    pub replaced: Option<(u64, ContentId)>,
}

/// The bundle that would serve if the active one were set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Standby {
    /// Its name.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its content.
    pub content_id: ContentId,
}

impl Standby {
    fn of(bundle: &VerifiedBundle) -> Self {
        Self {
            name: bundle.manifest().name.clone(),
            epoch: bundle.epoch(),
            content_id: bundle.content_id().clone(),
        }
    }
}

/// A bundle that was set aside, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reverted {
    /// What does not decide any more.
    pub aside: SetAside,
    /// What serves in its stead, in posture `restricted` at best; none: every action is denied.
    pub serves: Option<Standby>,
    /// Why a restart would not know of it, where the slot could not be written.
    pub not_kept: Option<String>,
}

/// What is known beside the bundle that decides.
#[derive(Clone, Default)]
struct Held {
    floor: Option<Floor>,
    /// The file of it was lost together with the active bundle: it was as high as this or higher.
    floor_is_lost: bool,
    marks: Marks,
    /// What the last known good slot holds, if it verified when it was read or written last.
    lkg: Option<Standby>,
}

impl Held {
    fn aside(&self) -> Option<&SetAside> {
        self.marks.aside_of(self.floor.as_ref())
    }

    /// Whatever the floor says: it may be lost.
    fn was_set_aside(&self, content_id: &ContentId) -> bool {
        let aside = self.marks.aside.as_ref();
        aside.is_some_and(|aside| aside.content_id == *content_id)
    }

    /// What was set aside, if it is the newest or above what is.
    fn lasting_aside(&self) -> Option<&SetAside> {
        let floor = self.floor.as_ref().map_or(0, |floor| floor.epoch);
        let above = self.marks.aside.as_ref();
        self.aside()
            .or_else(|| above.filter(|aside| aside.epoch > floor))
    }

    /// The last known good bundle, before the slot is written over; that of an activation before this one that
    /// was stopped there.
    fn behind(&self) -> Option<ContentId> {
        let is_floor = |lkg: &&Standby| self.is_floor(&lkg.content_id);
        match self.lkg.as_ref().filter(|lkg| !is_floor(lkg)) {
            Some(lkg) => Some(lkg.content_id.clone()),
            None => self.marks.behind.clone(),
        }
    }

    fn is_floor(&self, content_id: &ContentId) -> bool {
        let floor = self.floor.as_ref();
        floor.is_some_and(|floor| floor.content_id == *content_id)
    }

    fn standby(&self) -> Option<&Standby> {
        let floor = self.floor.as_ref()?;
        self.lkg.as_ref().filter(|lkg| {
            lkg.epoch >= floor.min_fallback_epoch && lkg.content_id != floor.content_id
        })
    }
}

/// Why the slots do not read back as what decides.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRead {
    /// The disk did not answer, which says nothing of what it holds.
    #[error("{0}")]
    Storage(String),
    /// They hold something else.
    #[error("{0}")]
    Other(String),
}

/// The slots of one node.
pub struct Slots {
    storage: Arc<dyn SlotStorage>,
    current: ArcSwapOption<ActivePolicy>,
    /// Whoever writes the slots has it, while a bundle loads and a disk syncs.
    turn: Mutex<()>,
    /// What is known of them: changed together with `current`, by whoever has the turn, and never held for long.
    held: Mutex<Held>,
    freshness: Mutex<Option<Freshness>>,
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slots")
            .field("current", &self.current())
            .finish_non_exhaustive()
    }
}

/// What reading the slots came to.
struct Found {
    current: Option<ActivePolicy>,
    held: Held,
    freshness: Option<Freshness>,
    faults: Vec<SlotFault>,
}

impl Slots {
    /// Reads the slots and verifies what they hold. Never fails: without a usable bundle nothing is
    /// current, and every action is denied `NO_POLICY`.
    #[must_use]
    pub fn open(
        storage: Arc<dyn SlotStorage>,
        trust: &TrustFile,
        context: &LoadContext,
    ) -> (Self, Vec<SlotFault>) {
        Self::open_by(storage, trust, &|package| {
            VerifiedBundle::load(package, trust, context)
        })
    }

    /// [`open`](Self::open) where more stands before a bundle than [`VerifiedBundle::load`].
    #[must_use]
    pub fn open_by(
        storage: Arc<dyn SlotStorage>,
        trust: &TrustFile,
        load: &LoadPackage<'_>,
    ) -> (Self, Vec<SlotFault>) {
        let found = read(storage.as_ref(), None, trust, load);
        let slots = Self {
            storage,
            current: ArcSwapOption::from(found.current.map(Arc::new)),
            turn: Mutex::default(),
            held: Mutex::new(found.held),
            freshness: Mutex::new(found.freshness),
        };
        (slots, found.faults)
    }

    /// Reads and verifies the slots again, after the trust file changed: a bundle whose signers are
    /// no longer trusted stops deciding here, not at the next start.
    pub fn reload(&self, trust: &TrustFile, context: &LoadContext) -> Vec<SlotFault> {
        self.reload_by(trust, &|package| {
            VerifiedBundle::load(package, trust, context)
        })
    }

    /// [`reload`](Self::reload) where more stands before a bundle than [`VerifiedBundle::load`].
    pub fn reload_by(&self, trust: &TrustFile, load: &LoadPackage<'_>) -> Vec<SlotFault> {
        let _turn = self.turn();
        let known = self.lock().clone();
        let found = read(self.storage.as_ref(), Some(known), trust, load);
        let mut held = self.lock();
        *held = found.held;
        *self.held_freshness() = found.freshness;
        self.current.store(found.current.map(Arc::new));
        found.faults
    }

    /// The bundle that decides now. Cheap: asked for every request.
    #[must_use]
    pub fn current(&self) -> Option<Arc<ActivePolicy>> {
        self.current.load_full()
    }

    /// The highest epoch that was ever active, with its content.
    #[must_use]
    pub fn floor(&self) -> Option<Floor> {
        self.lock().floor.clone()
    }

    /// Whether the floor was lost and nothing has been activated since: it was [`floor`](Self::floor) or higher.
    #[must_use]
    pub fn is_floor_lost(&self) -> bool {
        self.lock().floor_is_lost
    }

    /// The newest bundle, if it was set aside.
    #[must_use]
    pub fn aside(&self) -> Option<SetAside> {
        self.lock().aside().cloned()
    }

    /// Whether this content was set aside here and nothing newer has come since, be the floor lost or not.
    #[must_use]
    pub fn was_set_aside(&self, content_id: &ContentId) -> bool {
        self.lock().was_set_aside(content_id)
    }

    /// What would serve if the active bundle were set aside, as far as is known without reading it.
    #[must_use]
    pub fn standby(&self) -> Option<Standby> {
        self.lock().standby().cloned()
    }

    /// The content that stood behind the active bundle, where an activation was stopped after it was written over
    /// and before anything came in its place: to be looked for in the segment store and handed to
    /// [`restore_standby`](Self::restore_standby).
    #[must_use]
    pub fn lost_standby(&self) -> Option<ContentId> {
        let held = self.lock();
        let lkg = held.lkg.as_ref()?;
        let behind = held.marks.behind.as_ref()?;
        (held.is_floor(&lkg.content_id) && !held.is_floor(behind)).then(|| behind.clone())
    }

    /// Puts back what stood behind the active bundle.
    ///
    /// # Errors
    /// [`ActivateError`]: it is not [what was lost](Self::lost_standby), may not stand in, or cannot be written;
    /// then nothing has changed.
    pub fn restore_standby(&self, bundle: &VerifiedBundle) -> Result<Standby, ActivateError> {
        let _turn = self.turn();
        if self.lost_standby().as_ref() != Some(bundle.content_id()) {
            return Err(ActivateError::NoFallback {
                why: "it is not what was lost".to_owned(),
            });
        }
        check_stands_in(bundle, self.floor().as_ref())?;
        self.write(LKG, &bundle.package().encode()?)?;
        let standby = Standby::of(bundle);
        self.lock().lkg = Some(standby.clone());
        Ok(standby)
    }

    /// Whether the bundle that decides has not passed its self-check: the process was stopped before.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        let held = self.lock();
        let floor = held.floor.as_ref().map(|floor| &floor.content_id);
        held.marks.trial.is_some()
            && held.marks.trial.as_ref() == floor
            && self.current().is_some_and(|current| {
                current.source == Source::Active && Some(current.bundle.content_id()) == floor
            })
    }

    /// The newest statement of the authority about the bundle that decides.
    #[must_use]
    pub fn freshness(&self) -> Option<Freshness> {
        let held = self.held_freshness().clone()?;
        let current = self.current()?;
        let manifest = current.bundle.manifest();
        held.names(&manifest.name, manifest.epoch, current.bundle.content_id())
            .then_some(held)
    }

    /// Whether a statement would make the deciding bundle younger.
    ///
    /// # Errors
    /// [`StatementError`]: not the bundle that decides, or an older statement.
    pub fn check_confirms(&self, freshness: &Freshness) -> Result<(), StatementError> {
        let other = || StatementError::Other {
            bundle: freshness.bundle.clone(),
            epoch: freshness.epoch,
        };
        let current = self.current().ok_or_else(other)?;
        let manifest = current.bundle.manifest();
        if !freshness.names(&manifest.name, manifest.epoch, current.bundle.content_id()) {
            return Err(other());
        }
        // A freeze: a statement from before the newest one that is known makes nothing younger.
        let known = current.confirmed_unix_ms();
        if freshness.issued_unix_ms < known {
            return Err(StatementError::Stale {
                newer_by_s: (known - freshness.issued_unix_ms) / 1000,
            });
        }
        Ok(())
    }

    /// Keeps a verified statement about the bundle that decides, and counts its age from there. The
    /// encoded statement is kept as it was signed, and verified again at each start.
    ///
    /// # Errors
    /// [`StatementError`]; nothing has changed then.
    pub fn confirm(
        &self,
        signed: &SignedDocument,
        trust: &TrustFile,
    ) -> Result<Freshness, StatementError> {
        let _turn = self.turn();
        let freshness = Freshness::verify(signed, trust)?;
        self.check_confirms(&freshness)?;
        let written = self.storage.write(FRESHNESS, &signed.encode()?);
        written.map_err(|error| StatementError::Storage {
            slot: FRESHNESS,
            message: error.to_string(),
        })?;
        *self.held_freshness() = Some(freshness.clone());
        if let Some(current) = self.current() {
            current.confirm(&freshness);
        }
        Ok(freshness)
    }

    fn held_freshness(&self) -> MutexGuard<'_, Option<Freshness>> {
        // A plain value: a panic elsewhere leaves it whole.
        self.freshness
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The content to look for in the segment store and hand to [`activate`](Self::activate): set
    /// while the active slot is not usable and the floor says what was there. What was set aside is not, nor what is
    /// known where the floor was lost: it may be older.
    #[must_use]
    pub fn wanted(&self) -> Option<Floor> {
        let held = self.lock();
        let is_unknown = held.floor_is_lost || held.aside().is_some();
        let floor = held.floor.clone().filter(|_| !is_unknown)?;
        let healthy = self.current().is_some_and(|current| {
            current.source == Source::Active && *current.bundle.content_id() == floor.content_id
        });
        (!healthy).then_some(floor)
    }

    /// Makes a verified bundle the one that decides, on trial until [`settle`](Self::settle).
    ///
    /// INV-16: the epoch must be above the floor, or the floor's own content again. The floor moves
    /// before the slots are written, so that two contents of one epoch cannot both get in, even if
    /// a write fails half-way.
    ///
    /// # Errors
    /// [`ActivateError`]; the bundle that decided before still does.
    pub fn activate(&self, bundle: VerifiedBundle) -> Result<Activation, ActivateError> {
        self.put(bundle, false)
    }

    /// [`activate`](Self::activate) on the word of an operator, who may take into use again what was set
    /// aside.
    ///
    /// # Errors
    /// [`ActivateError`]; the bundle that decided before still does.
    pub fn reinstate(&self, bundle: VerifiedBundle) -> Result<Activation, ActivateError> {
        self.put(bundle, true)
    }

    fn put(&self, bundle: VerifiedBundle, lifts: bool) -> Result<Activation, ActivateError> {
        let _turn = self.turn();
        let mut next = self.lock().clone();
        let written = self.write_bundle(&mut next, bundle, lifts);
        // INV-16: what was raised counts, even if a write failed half-way.
        let mut held = self.lock();
        *held = next;
        let (activation, policy) = written?;
        self.current.store(Some(Arc::new(policy)));
        Ok(activation)
    }

    fn write_bundle(
        &self,
        held: &mut Held,
        bundle: VerifiedBundle,
        lifts: bool,
    ) -> Result<(Activation, ActivePolicy), ActivateError> {
        let mut raised = Floor::of(&bundle);
        if let Some(known) = held.floor.as_ref() {
            check_forward(known, &raised)?;
            // The authority may forbid more old epochs, never fewer.
            raised.min_fallback_epoch = raised.min_fallback_epoch.max(known.min_fallback_epoch);
        }
        let is_aside = held.was_set_aside(&raised.content_id);
        if is_aside && !lifts {
            return Err(ActivateError::SetAside {
                epoch: raised.epoch,
            });
        }
        let package = bundle.package().encode()?;
        let before = self.current();
        let replaced = before
            .as_ref()
            .map(|before| (before.bundle.epoch(), before.bundle.content_id().clone()));
        let kind = match held.floor.as_ref() {
            None => ActivationKind::First,
            Some(known) if known.content_id == raised.content_id => ActivationKind::Reinstalled,
            Some(_) => ActivationKind::Forward,
        };
        let decides_already = before.as_ref().is_some_and(|before| {
            before.source == Source::Active && before.bundle.content_id() == bundle.content_id()
        });
        let unchecked = held.marks.trial.clone();
        if !decides_already {
            // Before anything else: whatever a crash leaves, it is known that nobody has checked it.
            let trial = Some(raised.content_id.clone());
            let marks = Marks {
                aside: held.marks.aside.clone(),
                trial,
                behind: held.behind(),
            };
            self.write_marks(held, marks)?;
        }
        // What decided without fault until now becomes the last known good. A bundle that itself
        // only stands in is there already, and one that nobody has checked yet is none.
        if let Some(before) = &before
            && before.source == Source::Active
            && unchecked.as_ref() != Some(before.bundle.content_id())
            && !decides_already
            // An emergency that is over does not come back.
            && before.bundle.manifest().role != Role::BreakGlass
        {
            self.write(LKG, &before.bundle.package().encode()?)?;
            held.lkg = Some(Standby::of(&before.bundle));
        }
        held.floor = Some(raised.clone());
        self.write(ACTIVE, &package)?;
        let encoded = raised.encode().map_err(|error| ActivateError::Storage {
            slot: FLOOR,
            message: error.to_string(),
        })?;
        self.write(FLOOR, &encoded)?;
        held.floor_is_lost = false;
        if is_aside {
            let marks = Marks {
                aside: None,
                ..held.marks.clone()
            };
            self.write_marks(held, marks)?;
        }
        let activation = Activation {
            kind,
            name: bundle.manifest().name.clone(),
            epoch: bundle.epoch(),
            content_id: bundle.content_id().clone(),
            replaced,
        };
        let policy = ActivePolicy::new(bundle, Source::Active);
        if let Some(freshness) = self.held_freshness().as_ref() {
            policy.confirm(freshness);
        }
        Ok((activation, policy))
    }

    /// The bundle that decides has passed its self-check.
    ///
    /// # Errors
    /// [`ActivateError::Storage`]: it decides, and is checked again at the next start.
    pub fn settle(&self) -> Result<(), ActivateError> {
        let _turn = self.turn();
        let mut next = self.lock().clone();
        let marks = Marks {
            aside: next.lasting_aside().cloned(),
            ..Marks::default()
        };
        let written = self.write_marks(&mut next, marks);
        *self.lock() = next;
        written
    }

    /// Whether what lies in the slots is what decides: the active bundle, the floor and what is marked.
    ///
    /// # Errors
    /// The first slot that says something else, for people.
    pub fn check_reads_back(&self) -> Result<(), NotRead> {
        let _turn = self.turn();
        let held = self.lock().clone();
        let read = |slot: &str| {
            let read = self.storage.read(slot);
            read.map_err(|error| NotRead::Storage(format!("slot `{slot}` cannot be read: {error}")))
        };
        let other =
            |slot: &str| NotRead::Other(format!("slot `{slot}` does not hold what was written"));
        let none = || NotRead::Other("no bundle decides".to_owned());
        let current = self.current().ok_or_else(none)?;
        let package = current.bundle.package().encode();
        let package = package.map_err(|error| NotRead::Other(error.to_string()))?;
        if read(ACTIVE)?.as_ref() != Some(&package) {
            return Err(other(ACTIVE));
        }
        let floor = read(FLOOR)?.and_then(|bytes| Floor::decode(&bytes).ok());
        if floor != held.floor {
            return Err(other(FLOOR));
        }
        let marks = match read(ASIDE)? {
            None => Marks::default(),
            Some(bytes) => Marks::decode(&bytes).map_err(|_| other(ASIDE))?,
        };
        match marks == held.marks {
            true => Ok(()),
            false => Err(other(ASIDE)),
        }
    }

    /// The bundle that would serve if the active one were set aside, read from its slot and verified.
    ///
    /// # Errors
    /// [`ActivateError::NoFallback`] with the reason.
    pub fn read_standby_by(&self, load: &LoadPackage<'_>) -> Result<VerifiedBundle, ActivateError> {
        let held = self.lock().clone();
        self.load_standby(&held, load)
    }

    fn load_standby(
        &self,
        held: &Held,
        load: &LoadPackage<'_>,
    ) -> Result<VerifiedBundle, ActivateError> {
        let none = |why: String| ActivateError::NoFallback { why };
        let bytes = match self.storage.read(LKG) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(none("no bundle decided before this one".to_owned())),
            Err(error) => return Err(none(format!("it cannot be read: {error}"))),
        };
        let bundle = Package::decode(&bytes)
            .and_then(load)
            .map_err(|error| none(format!("{}: {error}", error.code())))?;
        check_stands_in(&bundle, held.floor.as_ref())?;
        Ok(bundle)
    }

    /// Sets the active bundle aside: the last known good one serves, in posture `restricted` at best, until
    /// a bundle of a higher epoch comes or an operator [reinstates](Self::reinstate) this one. The floor
    /// stays (INV-16).
    ///
    /// The slot is durable before the switch. Only where the node itself sets it aside does it stop
    /// deciding even if the slot cannot be written, or if nothing can serve in its stead.
    ///
    /// # Errors
    /// [`ActivateError`]: no active bundle decides, or, for an operator, none may stand in or the slot
    /// cannot be written. Then nothing has changed.
    pub fn set_aside_by(
        &self,
        cause: AsideCause,
        reason: &str,
        at_unix_ms: u64,
        load: &LoadPackage<'_>,
    ) -> Result<Reverted, ActivateError> {
        let _turn = self.turn();
        let mut next = self.lock().clone();
        let current = self
            .current()
            .filter(|current| current.source == Source::Active)
            .ok_or(ActivateError::NotActive)?;
        let by_operator = cause == AsideCause::Operator;
        // From its slot: what does not verify there would not serve after a restart either.
        let standby = self.load_standby(&next, load).and_then(|standby| {
            // An activation that a fault ended midway leaves what decides in both slots.
            match standby.content_id() == current.bundle.content_id() {
                true => Err(ActivateError::NoFallback {
                    why: "what would stand in is the bundle that decides; activate another one"
                        .to_owned(),
                }),
                false => Ok(standby),
            }
        });
        let standby = match standby {
            Err(error) if by_operator => return Err(error),
            read => read.ok(),
        };
        let aside = SetAside {
            epoch: current.bundle.epoch(),
            content_id: current.bundle.content_id().clone(),
            cause,
            reason: clip(reason),
            at_unix_ms,
        };
        let marks = Marks {
            aside: Some(aside.clone()),
            ..Marks::default()
        };
        let not_kept = match self.write_marks(&mut next, marks.clone()) {
            Err(error) if by_operator => return Err(error),
            Err(error) => Some(error.to_string()),
            Ok(()) => None,
        };
        next.marks = marks;
        let serves = standby.as_ref().map(Standby::of);
        let policy = standby.map(|bundle| {
            let policy = ActivePolicy::new(bundle, Source::LastKnownGood);
            if let Some(freshness) = self.held_freshness().as_ref() {
                policy.confirm(freshness);
            }
            Arc::new(policy)
        });
        let mut held = self.lock();
        *held = next;
        self.current.store(policy);
        Ok(Reverted {
            aside,
            serves,
            not_kept,
        })
    }

    /// Writes the slot `aside`, then takes what it says for true.
    fn write_marks(&self, held: &mut Held, marks: Marks) -> Result<(), ActivateError> {
        let bytes = marks.encode().map_err(|error| ActivateError::Storage {
            slot: ASIDE,
            message: error.to_string(),
        })?;
        self.write(ASIDE, &bytes)?;
        held.marks = marks;
        Ok(())
    }

    /// Writes a slot unless it already holds these bytes.
    fn write(&self, slot: &'static str, bytes: &[u8]) -> Result<(), ActivateError> {
        if self
            .storage
            .read(slot)
            .is_ok_and(|held| held.as_deref() == Some(bytes))
        {
            return Ok(());
        }
        self.storage
            .write(slot, bytes)
            .map_err(|error| ActivateError::Storage {
                slot,
                message: error.to_string(),
            })
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        // It holds nothing that a panic could leave half-done.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing panics while holding it; if something did, the floor in it is still the highest.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What may stand in for the newest bundle (ruling 14).
fn check_stands_in(bundle: &VerifiedBundle, floor: Option<&Floor>) -> Result<(), ActivateError> {
    let none = |why: String| Err(ActivateError::NoFallback { why });
    if bundle.manifest().role == Role::BreakGlass {
        return none("it is an emergency bundle".to_owned());
    }
    let Some(floor) = floor else {
        return Ok(());
    };
    if bundle.epoch() < floor.min_fallback_epoch {
        return none(format!(
            "epoch {} may not stand in: the active bundle allows none below {}",
            bundle.epoch(),
            floor.min_fallback_epoch
        ));
    }
    if *bundle.content_id() == floor.content_id {
        return none("no other bundle is kept beside this one".to_owned());
    }
    Ok(())
}

/// INV-16: a lower epoch never, the same epoch only with the same content.
fn check_forward(known: &Floor, offered: &Floor) -> Result<(), BundleError> {
    if offered.epoch < known.epoch {
        return Err(BundleError::Epoch {
            floor: known.epoch,
            offered: offered.epoch,
        });
    }
    if offered.epoch == known.epoch && offered.content_id != known.content_id {
        return Err(BundleError::Conflict {
            epoch: known.epoch,
            known: known.content_id.clone(),
            offered: offered.content_id.clone(),
        });
    }
    Ok(())
}

enum SlotContent {
    Empty,
    Good(Box<VerifiedBundle>),
    Bad,
}

fn read(
    storage: &dyn SlotStorage,
    known: Option<Held>,
    trust: &TrustFile,
    load_package: &LoadPackage<'_>,
) -> Found {
    let mut faults = Vec::new();
    let mut floor_damaged = false;
    let stored = match storage.read(FLOOR) {
        Ok(None) => None,
        Ok(Some(bytes)) => match Floor::decode(&bytes) {
            Ok(floor) => Some(floor),
            Err(message) => {
                floor_damaged = true;
                faults.push(SlotFault {
                    slot: FLOOR,
                    code: "FLOOR_DAMAGED",
                    message,
                });
                None
            }
        },
        Err(error) => {
            floor_damaged = true;
            let message = error.to_string();
            faults.push(SlotFault {
                slot: FLOOR,
                code: "SLOT_UNREADABLE",
                message,
            });
            None
        }
    };
    let is_reload = known.is_some();
    let known = known.unwrap_or_default();
    let (mut marks, unreadable) = read_marks(storage, &mut faults);
    if known.aside().is_some() || (unreadable && is_reload) {
        // Nor does the disk put back what this process has set aside.
        marks = known.marks;
    }
    // A slot that cannot be read may have said that the newest bundle is not to decide.
    let doubt = unreadable && !is_reload;
    let was_lost = match &known.floor {
        None => true,
        Some(_) => known.floor_is_lost,
    };
    // INV-16: what this process knows already is never lowered by what the disk says.
    let mut floor = match (stored.clone(), known.floor) {
        (Some(stored), Some(known)) if stored.epoch < known.epoch => Some(known),
        (stored, known) => stored.or(known),
    };
    let active = load(storage, ACTIVE, load_package, &mut faults);
    let lkg = load(storage, LKG, load_package, &mut faults);
    let empty = matches!((&active, &lkg), (SlotContent::Empty, SlotContent::Empty));
    if floor.is_none() && !floor_damaged && !empty {
        floor_damaged = true;
        faults.push(SlotFault {
            slot: FLOOR,
            code: "SLOT_MISSING",
            message: "the floor is gone although a slot is filled".to_owned(),
        });
    }
    let floor_is_lost = stored.is_none()
        && was_lost
        && (floor_damaged || !empty)
        && !matches!(active, SlotContent::Good(_));
    if floor.is_some() && matches!(active, SlotContent::Empty) {
        faults.push(SlotFault {
            slot: ACTIVE,
            code: "SLOT_MISSING",
            message: "the active bundle is gone: meet a peer or install it again".to_owned(),
        });
    }
    let standby = match &lkg {
        SlotContent::Good(bundle) if bundle.manifest().role != Role::BreakGlass => {
            Some(Standby::of(bundle))
        }
        _ => None,
    };
    let is_kept_out = |floor: &Floor| doubt || marks.aside_of(Some(floor)).is_some();
    let current = choose(
        active,
        lkg,
        &is_kept_out,
        &mut floor,
        floor_damaged || floor_is_lost,
        &mut faults,
    );
    if let Some(floor) = floor.as_ref().filter(|_| doubt) {
        marks.aside = Some(SetAside {
            epoch: floor.epoch,
            content_id: floor.content_id.clone(),
            cause: AsideCause::Unreadable,
            reason:
                "the slot `aside` cannot be read, so it is not known whether this bundle may decide"
                    .to_owned(),
            at_unix_ms: 0,
        });
    }
    // What the last known good bundle proves is no floor: the next start must know that too.
    if let Some(floor) = &floor
        && !floor_is_lost
        && stored.as_ref() != Some(floor)
    {
        // A crash between two writes of an activation, or a damaged floor: complete it.
        let written = floor
            .encode()
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                storage
                    .write(FLOOR, &bytes)
                    .map_err(|error| error.to_string())
            });
        if let Err(message) = written {
            faults.push(SlotFault {
                slot: FLOOR,
                code: "SLOT_WRITE",
                message,
            });
        }
    }
    let freshness = read_freshness(storage, trust, &mut faults);
    if let (Some(policy), Some(freshness)) = (&current, &freshness) {
        policy.confirm(freshness);
    }
    Found {
        current,
        held: Held {
            floor,
            floor_is_lost,
            marks,
            lkg: standby,
        },
        freshness,
        faults,
    }
}

/// What is marked, and whether that could not be read.
fn read_marks(storage: &dyn SlotStorage, faults: &mut Vec<SlotFault>) -> (Marks, bool) {
    let (code, message) = match storage.read(ASIDE) {
        Ok(None) => return (Marks::default(), false),
        Ok(Some(bytes)) => match Marks::decode(&bytes) {
            Ok(marks) => return (marks, false),
            Err(message) => ("ASIDE_DAMAGED", message),
        },
        Err(error) => ("SLOT_UNREADABLE", error.to_string()),
    };
    faults.push(SlotFault {
        slot: ASIDE,
        code,
        message: format!(
            "{message}; the newest bundle does not decide until an operator activates it again, or one \
             of a higher epoch comes"
        ),
    });
    (Marks::default(), true)
}

/// A statement that is lost or damaged makes the bundle older, never younger.
fn read_freshness(
    storage: &dyn SlotStorage,
    trust: &TrustFile,
    faults: &mut Vec<SlotFault>,
) -> Option<Freshness> {
    let fault = |code, message| SlotFault {
        slot: FRESHNESS,
        code,
        message,
    };
    let bytes = match storage.read(FRESHNESS) {
        Ok(bytes) => bytes?,
        Err(error) => {
            faults.push(fault("SLOT_UNREADABLE", error.to_string()));
            return None;
        }
    };
    let read = SignedDocument::decode(&bytes).and_then(|signed| Freshness::verify(&signed, trust));
    match read {
        Ok(freshness) => Some(freshness),
        Err(error) => {
            faults.push(fault(error.code(), error.to_string()));
            None
        }
    }
}

fn load(
    storage: &dyn SlotStorage,
    slot: &'static str,
    load_package: &LoadPackage<'_>,
    faults: &mut Vec<SlotFault>,
) -> SlotContent {
    let bytes = match storage.read(slot) {
        Ok(None) => return SlotContent::Empty,
        Ok(Some(bytes)) => bytes,
        Err(error) => {
            let message = error.to_string();
            faults.push(SlotFault {
                slot,
                code: "SLOT_UNREADABLE",
                message,
            });
            return SlotContent::Bad;
        }
    };
    match Package::decode(&bytes).and_then(load_package) {
        Ok(bundle) => SlotContent::Good(Box::new(bundle)),
        Err(error) => {
            faults.push(SlotFault {
                slot,
                code: error.code(),
                message: error.to_string(),
            });
            SlotContent::Bad
        }
    }
}

/// Decides what serves, and raises the floor to what was found.
fn choose(
    active: SlotContent,
    lkg: SlotContent,
    is_kept_out: &dyn Fn(&Floor) -> bool,
    floor: &mut Option<Floor>,
    floor_damaged: bool,
    faults: &mut Vec<SlotFault>,
) -> Option<ActivePolicy> {
    if let SlotContent::Good(bundle) = active {
        let mut offered = Floor::of(&bundle);
        let allowed = match floor.as_ref() {
            Some(known) => {
                offered.min_fallback_epoch =
                    offered.min_fallback_epoch.max(known.min_fallback_epoch);
                check_forward(known, &offered)
            }
            None => Ok(()),
        };
        match allowed {
            Ok(()) => {
                let kept_out = is_kept_out(&offered);
                *floor = Some(offered);
                if !kept_out {
                    return Some(ActivePolicy::new(*bundle, Source::Active));
                }
            }
            // An older bundle lies in the slot than was active: a rollback, not a fallback.
            Err(error) => faults.push(SlotFault {
                slot: ACTIVE,
                code: error.code(),
                message: error.to_string(),
            }),
        }
    }
    let SlotContent::Good(bundle) = lkg else {
        return None;
    };
    if bundle.manifest().role == Role::BreakGlass {
        faults.push(SlotFault {
            slot: LKG,
            code: "LKG_BREAK_GLASS",
            message: "an emergency bundle may not stand in".to_owned(),
        });
        return None;
    }
    let offered = Floor::of(&bundle);
    let known = match floor.as_ref() {
        Some(known) if known.epoch >= offered.epoch => known.clone(),
        _ => {
            // The floor is behind its own last known good: it was damaged or put back.
            *floor = Some(offered.clone());
            offered.clone()
        }
    };
    if floor_damaged {
        // What the lost active bundle said about fallback is unknown, so nothing may stand in.
        faults.push(SlotFault {
            slot: LKG,
            code: "LKG_BELOW_FALLBACK",
            message: "the floor is damaged, so the last known good bundle may not stand in: \
                      meet a peer or install the bundle again"
                .to_owned(),
        });
        return None;
    }
    if offered.epoch < known.min_fallback_epoch {
        faults.push(SlotFault {
            slot: LKG,
            code: "LKG_BELOW_FALLBACK",
            message: format!(
                "epoch {} may not stand in: the active bundle allows none below {}",
                offered.epoch, known.min_fallback_epoch
            ),
        });
        return None;
    }
    Some(ActivePolicy::new(*bundle, Source::LastKnownGood))
}
