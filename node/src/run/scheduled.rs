//! Bundles that wait for their time: verified and stored when they come, activated at their `not_before`
//! without any contact.
//!
//! They lie in the segment store, so they go on to peers and outlive a restart; the schedule itself is made
//! from the store. It holds a few bundles, each of a higher epoch and a later time than the one before. When
//! the time of one has come by the trusted clock, it goes through the pipeline like any other
//! ([`Node::activate`]): signatures, compiler, tests and gates are asked again by the trust of that moment.
//! A clock in doubt activates nothing (INV-18).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tidelock_policy::{ContentId, Manifest, Package, Role, TrustFile, signed_manifest};
use tidelock_segments::{Charge, Kind, Origin, SegmentRef};

use super::{
    activate::{ACTIVATION_BUSY, Order},
    admit::{Denied, judge},
    node::Node,
    trust::is_statement,
};
use crate::worker::For;

/// Bundles that wait for their time (INV-07): 4 MiB of disk each at most, none of it from the reserve, and
/// about 600 bytes of memory.
const SCHEDULED_MAX: usize = 4;

/// How soon a bundle whose time has come and that was refused is tried again; each wait is twice the one
/// before, up to [`AGAIN_MOST`].
const AGAIN_FIRST: Duration = Duration::from_secs(15);
const AGAIN_MOST: Duration = Duration::from_secs(600);

/// Why what is due waits on: nobody's word ends an emergency but one that is given during it.
const EMERGENCY_DECIDES: &str = "BREAK_GLASS_DECIDES";

/// Why what is due does not begin to decide by itself where the floor is not known.
const NO_FLOOR: &str = "its time has come, and it is not known which epoch decided here last, or whether this one \
                        was set aside: install it, or a newer one";

/// A package whose time has not come, signed by those who may.
pub(super) struct Ahead {
    package: Package,
    manifest: Manifest,
    start: Start,
}

/// The time of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Start {
    unix_ms: u64,
    /// As the manifest writes it.
    text: String,
}

impl Start {
    /// Of a bundle that may wait for it: an emergency is signed for no time that has not come.
    fn of(manifest: &Manifest) -> Option<Self> {
        (manifest.role == Role::Policy).then_some(())?;
        Some(Self {
            unix_ms: manifest.validity.not_before_unix_ms?,
            text: manifest.not_before.clone()?,
        })
    }
}

/// What is known of a bundle that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    segment: SegmentRef,
    content_id: ContentId,
    start: Start,
    since_unix_ms: u64,
    /// Why it does not decide although its time has come: the code and a text.
    refused: Option<(&'static str, String)>,
    again_at: Duration,
    wait: Duration,
}

/// What a new bundle would do to the schedule.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// It has one, and these lose theirs: it comes into force before them.
    Free(Vec<SegmentRef>),
    /// It has it already.
    Taken,
}

/// The bundles that wait, by epoch.
#[derive(Debug, Default)]
struct Schedule {
    entries: BTreeMap<u64, Entry>,
    /// Stored above the floor, and not let wait by this trust; another may.
    kept_out: Vec<SegmentRef>,
    /// By which trust they were judged.
    trust: Option<Arc<TrustFile>>,
    /// When it is made again, because a stored segment could not be read.
    unread_again_at: Option<Duration>,
}

impl Schedule {
    /// Where a bundle of this epoch, content and time belongs. Epochs and times rise together: what would
    /// come into force after a higher epoch has no use.
    fn place(&self, epoch: u64, content_id: &ContentId, at_unix_ms: u64) -> Result<Place, Denied> {
        if let Some(held) = self.entries.get(&epoch) {
            if held.content_id == *content_id {
                return Ok(Place::Taken);
            }
            return Err(Denied::local(
                "BUNDLE_CONFLICT",
                format!(
                    "epoch {epoch} is taken by {}, which waits for its time; give the changed content a new \
                     epoch",
                    held.content_id
                ),
            ));
        }
        let mut above = self.entries.range(epoch..);
        if let Some((higher, _)) = above.find(|(_, held)| held.start.unix_ms <= at_unix_ms) {
            return Err(Denied::local(
                "BUNDLE_EPOCH",
                format!(
                    "epoch {higher} comes into force before epoch {epoch} would; build a newer epoch"
                ),
            ));
        }
        let below = self.entries.range(..epoch);
        let loses = below.filter(|(_, held)| held.start.unix_ms >= at_unix_ms);
        let loses: Vec<SegmentRef> = loses.map(|(_, held)| held.segment.clone()).collect();
        if self.entries.len() - loses.len() >= SCHEDULED_MAX {
            return Err(Denied::local(
                "BUNDLE_NOT_YET",
                format!(
                    "{SCHEDULED_MAX} bundles wait for their time already; offer it again later"
                ),
            ));
        }
        Ok(Place::Free(loses))
    }

    fn forget(&mut self, segment: &SegmentRef) {
        let is_it = |entry: &Entry| entry.segment.id == segment.id;
        if self.entries.get(&segment.sequence).is_some_and(is_it) {
            self.entries.remove(&segment.sequence);
        }
    }

    /// Those of the lowest epochs that are kept out and for which there is no room: together with what waits
    /// they are no more than may wait (INV-07).
    fn surplus(&mut self) -> Vec<SegmentRef> {
        let room = SCHEDULED_MAX.saturating_sub(self.entries.len());
        self.kept_out.sort_by_key(|segment| segment.sequence);
        let surplus = self.kept_out.len().saturating_sub(room);
        self.kept_out.drain(..surplus).collect()
    }

    /// The bundles to be tried now, the highest epoch first.
    fn due(&self, trusted_unix_ms: u64, now: Duration) -> Vec<SegmentRef> {
        let all = self.entries.values().rev();
        let due =
            all.filter(|entry| entry.start.unix_ms <= trusted_unix_ms && entry.again_at <= now);
        due.map(|entry| entry.segment.clone()).collect()
    }

    /// Notes that a bundle was refused at its time; whether that is news.
    fn note_refused(&mut self, epoch: u64, denied: &Denied, now: Duration) -> bool {
        let Some(entry) = self.entries.get_mut(&epoch) else {
            return false;
        };
        entry.wait = match denied.code {
            // Its end is not waited for any longer than that.
            EMERGENCY_DECIDES => AGAIN_FIRST,
            _ => (entry.wait * 2).clamp(AGAIN_FIRST, AGAIN_MOST),
        };
        entry.again_at = now.saturating_add(entry.wait);
        let before = entry.refused.replace((denied.code, denied.message.clone()));
        before.is_none_or(|(code, _)| code != denied.code)
    }

    /// Whether nothing is to be judged anew at this time.
    fn is_made_by(&self, trust: &Arc<TrustFile>, now: Duration) -> bool {
        self.is_judged_by(trust) && self.unread_again_at.is_none_or(|again_at| now < again_at)
    }

    fn is_judged_by(&self, trust: &Arc<TrustFile>) -> bool {
        let judged_by = self.trust.as_ref();
        judged_by.is_some_and(|judged_by| Arc::ptr_eq(judged_by, trust))
    }

    fn told(&self) -> Value {
        let told = self.entries.iter().map(|(epoch, entry)| {
            let refused = entry.refused.as_ref();
            json!({
                "segment": entry.segment.id, "name": entry.segment.origin.policy_name(), "epoch": epoch,
                "hash": entry.content_id,
                "not_before": entry.start.text, "since_unix_ms": entry.since_unix_ms,
                "refused": refused.map(|(code, message)| json!({"code": code, "message": message})),
            })
        });
        told.collect()
    }
}

/// Content and time of a stored bundle, or why it may not wait.
type Judged = Result<(ContentId, Option<Start>), Denied>;

/// INV-16: up to which epoch nothing is activated by nobody's word where the floor is not known, because it was
/// lost or nothing has decided yet: the newest that may have decided tells.
fn lost_floor(judged: &[(SegmentRef, Option<Judged>)], trusted_unix_ms: u64) -> u64 {
    let is_ahead = |judged: &Option<Judged>| match judged {
        Some(Ok((_, Some(start)))) => start.unix_ms > trusted_unix_ms,
        _ => false,
    };
    let decided = judged.iter().filter(|(_, judged)| !is_ahead(judged));
    let newest = decided.map(|(segment, _)| segment.sequence).max();
    newest.unwrap_or_default()
}

/// Whether no trust will ever let it wait, because another bundle has its place.
fn is_superseded(denied: &Denied) -> bool {
    ["BUNDLE_EPOCH", "BUNDLE_CONFLICT"].contains(&denied.code)
}

/// The schedule of one node.
#[derive(Default)]
pub(super) struct Scheduled(Mutex<Schedule>);

impl Scheduled {
    fn held(&self) -> MutexGuard<'_, Schedule> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epochs of which bundles wait: another of the same epoch may be in force now, or an emergency.
    pub(super) fn epochs(&self, origin: &Origin) -> Vec<u64> {
        let held = self.held();
        let of_it = held
            .entries
            .values()
            .filter(|held| held.segment.origin == *origin);
        of_it.map(|held| held.segment.sequence).collect()
    }

    /// Whether this content waits here, and was compiled for that.
    pub(super) fn has(&self, content_id: &ContentId) -> bool {
        let held = self.held();
        held.entries
            .values()
            .any(|held| held.content_id == *content_id)
    }

    pub(super) fn told(&self) -> Value {
        self.held().told()
    }
}

impl Node {
    /// A package of the policy authority whose time has not come; nothing, where it is to be activated now or
    /// refused. What has decided here does so again without waiting (ruling 13).
    pub(super) fn ahead(&self, package: &[u8]) -> Result<Option<Ahead>, Denied> {
        let trust = self.bundle_trust()?;
        let package = Package::decode(package).map_err(judge)?;
        let manifest = signed_manifest(&package, &trust, &self.context).map_err(judge)?;
        let floor = self.slots.floor();
        let has_decided = floor.is_some_and(|floor| floor.content_id == package.content_id());
        let now = self.clock.unix_ms();
        let start = Start::of(&manifest).filter(|start| !has_decided && start.unix_ms > now);
        Ok(start.map(|start| Ahead {
            package,
            manifest,
            start,
        }))
    }

    /// What can be said before anything is compiled of a package that is activated or waits for its time.
    pub(super) fn check_arrival(&self, package: &[u8]) -> Result<(Package, Manifest), Denied> {
        match self.ahead(package)? {
            None => self.check_offer(package),
            Some(ahead) => {
                self.check_place(&ahead)?;
                Ok((ahead.package, ahead.manifest))
            }
        }
    }

    pub(super) fn check_place(&self, ahead: &Ahead) -> Result<(), Denied> {
        self.place_of(ahead).map(drop)
    }

    fn place_of(&self, ahead: &Ahead) -> Result<Place, Denied> {
        let content_id = ahead.package.content_id();
        self.check_epoch(&ahead.manifest, &content_id)?;
        let epoch = ahead.manifest.epoch;
        self.scheduled
            .held()
            .place(epoch, &content_id, ahead.start.unix_ms)
    }

    /// Activates a bundle, or puts it in place where its time has not come; what that did.
    pub(super) fn install_or_schedule(&self, package: &[u8], asker: For) -> Result<Value, Denied> {
        match self.ahead(package)? {
            None => self
                .install_bundle(package, asker)
                .map(|activated| activated.told()),
            Some(ahead) => self.schedule(package, &ahead, asker),
        }
    }

    /// What putting a package in place would do, if its time has not come.
    pub(super) fn plan_ahead(&self, package: &[u8]) -> Result<Option<Value>, Denied> {
        let Some(ahead) = self.ahead(package)? else {
            return Ok(None);
        };
        self.check_place(&ahead)?;
        let bundle = self.verify_package(package, For::Operator)?;
        let manifest = bundle.manifest();
        Ok(Some(json!({
            "schedule": format!("{} epoch {}", manifest.name, manifest.epoch),
            "not_before": manifest.not_before,
            "hash": bundle.content_id(),
            "signers": bundle.signers(),
            "expires_at": manifest.expires_at,
        })))
    }

    /// Compiles and tests a bundle as if it were to decide now, and stores it.
    fn schedule(&self, package: &[u8], ahead: &Ahead, asker: For) -> Result<Value, Denied> {
        let is_known = matches!(self.place_of(ahead)?, Place::Taken);
        if !is_known {
            self.verify_package(package, asker)?;
        }
        let _turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Compiling took its time: the trust and what decides may be others by now.
        let trust = self.bundle_trust()?;
        signed_manifest(&ahead.package, &trust, &self.context).map_err(judge)?;
        let told = json!({
            "name": ahead.manifest.name, "epoch": ahead.manifest.epoch,
            "hash": ahead.package.content_id(), "not_before": ahead.start.text,
        });
        let loses = match self.place_of(ahead)? {
            Place::Taken => {
                self.join_scheduled(ahead, &trust)?;
                return Ok(json!({"scheduled": told}));
            }
            Place::Free(_) if is_known => {
                let why = "the bundle that waited was dropped meanwhile: offer it again";
                return Err(Denied::local(ACTIVATION_BUSY, why));
            }
            Place::Free(loses) => loses,
        };
        let segment = self.own_policy_segment(&ahead.package, &ahead.manifest)?;
        // Not from the reserve: what is ahead of its time never takes the room of what is due.
        self.store
            .put(&segment, Charge::Normal)
            .map_err(|error| Denied::local("STORE", error))?;
        self.keep_passes();
        let content_id = ahead.package.content_id();
        let start = (ahead.start.clone(), self.clock.unix_ms());
        self.enter(segment.reference(), loses, content_id, start);
        self.drop_surplus();
        self.event("bundle_scheduled", told.clone());
        self.offered(segment.reference());
        Ok(json!({"scheduled": told}))
    }

    /// Puts the signatures that count of another copy to those of the bundle that waits, as the copies of what
    /// an operator is waited for add up.
    fn join_scheduled(&self, ahead: &Ahead, trust: &TrustFile) -> Result<(), Denied> {
        let epoch = ahead.manifest.epoch;
        let held = self.scheduled.held().entries.get(&epoch).cloned();
        let Some(entry) = held else {
            return Ok(());
        };
        let stored = self.store.get(&entry.segment.id);
        let stored = stored.map_err(|error| Denied::local("STORE", error))?;
        let stored = Package::decode(stored.body()).map_err(judge)?;
        let mut signatures = trust.signatures_of(&stored);
        let before = signatures.len();
        for (signer, signature) in trust.signatures_of(&ahead.package) {
            signatures.entry(signer).or_insert(signature);
        }
        if signatures.len() == before {
            return Ok(());
        }
        let joined = Package {
            archive: stored.archive,
            signatures: signatures.into_values().collect(),
        };
        let segment = self.own_policy_segment(&joined, &ahead.manifest)?;
        self.store
            .put(&segment, Charge::Normal)
            .map_err(|error| Denied::local("STORE", error))?;
        let old = entry.segment.id;
        let joined = Entry {
            segment: segment.reference(),
            again_at: Duration::ZERO,
            ..entry
        };
        self.scheduled.held().entries.insert(epoch, joined);
        if old != segment.id()
            && let Err(error) = self.store.remove(&old)
        {
            tracing::warn!(%error, id = %old, "a policy segment with fewer signatures stays");
        }
        self.offered(segment.reference());
        Ok(())
    }

    /// Gives a stored bundle its place, and takes it from those that come into force after it.
    fn enter(
        &self,
        segment: SegmentRef,
        loses: Vec<SegmentRef>,
        content_id: ContentId,
        (start, since_unix_ms): (Start, u64),
    ) {
        for lost in loses {
            self.withdraw(
                &lost,
                "BUNDLE_EPOCH",
                "a newer epoch comes into force before it",
            );
        }
        let entry = Entry {
            content_id,
            start,
            since_unix_ms,
            refused: None,
            again_at: Duration::ZERO,
            wait: Duration::ZERO,
            segment,
        };
        let epoch = entry.segment.sequence;
        self.scheduled.held().entries.insert(epoch, entry);
    }

    /// Takes a bundle out of the schedule and the store, and says why.
    fn withdraw(&self, segment: &SegmentRef, code: &str, why: &str) {
        self.scheduled.held().forget(segment);
        if let Err(error) = self.store.remove(&segment.id) {
            tracing::warn!(%error, id = %segment.id, "a policy segment that waited stays");
        }
        self.tell_unscheduled(segment, code, why);
    }

    /// Takes a bundle out of the schedule. Its segment stays: a trust file that was a mistake, or a program of
    /// before, must not cost a site its policy.
    fn keep_out(&self, segment: &SegmentRef, denied: &Denied, is_known: bool) {
        let mut held = self.scheduled.held();
        held.forget(segment);
        held.kept_out.push(segment.clone());
        drop(held);
        if !is_known {
            self.tell_unscheduled(segment, denied.code, &denied.message);
        }
    }

    fn drop_surplus(&self) {
        let surplus = self.scheduled.held().surplus();
        for segment in surplus {
            self.withdraw(&segment, "BUNDLE_NOT_YET", "others wait in its place");
        }
    }

    fn tell_unscheduled(&self, segment: &SegmentRef, code: &str, why: &str) {
        self.event(
            "bundle_unscheduled",
            json!({
                "name": segment.origin.policy_name(), "epoch": segment.sequence, "segment": segment.id,
                "code": code, "why": why,
            }),
        );
    }

    /// Once a second, beside the loop: drops what may not wait any more, and activates what is due.
    pub(super) fn tend_schedule(&self) {
        self.review_schedule();
        let trusted = self.clock.trusted();
        // INV-18: by a clock in doubt nobody's time has come.
        if trusted.suspect {
            return;
        }
        let now = self.clock.monotonic();
        let due = self.scheduled.held().due(trusted.unix_ms, now);
        for segment in due {
            let read = self.store.get(&segment.id);
            let read = read.map_err(|error| Denied::local("STORE", error));
            let activated = read
                .as_ref()
                .map_err(Denied::clone)
                .and_then(|read| self.activate(read.body(), &Order::scheduled()));
            match activated {
                Ok(_) => break,
                Err(denied) => {
                    self.not_activated_at_its_time(&segment, &denied);
                    // So that the signatures of copies which peers bring from now on add up with its own.
                    let _ = read.map(|read| self.note_waiting(&read, &denied));
                }
            }
        }
        self.review_schedule();
    }

    /// INV-18: by a clock in doubt nobody's time has come, on whatever way a bundle with a time of its own comes.
    pub(super) fn check_begun(
        &self,
        manifest: &Manifest,
        content_id: &ContentId,
    ) -> Result<(), Denied> {
        let trusted = self.clock.trusted();
        let floor = self.slots.floor();
        let has_decided = floor.is_some_and(|floor| floor.content_id == *content_id);
        let begins = Start::of(manifest).filter(|start| start.unix_ms <= trusted.unix_ms);
        if begins.is_none() || has_decided || !trusted.suspect {
            return Ok(());
        }
        Err(Denied::local(
            "CLOCK_SUSPECT",
            "its time has come by a clock that is in doubt: look at it, and accept it with tidelock clock accept",
        ))
    }

    /// Whether an emergency that is not over decides, given the trusted time.
    pub(super) fn check_no_emergency(&self) -> Result<(), Denied> {
        let current = self.slots.current();
        let now = self.clock.unix_ms();
        let emergency = current.filter(|current| {
            let manifest = current.bundle().manifest();
            manifest.role == Role::BreakGlass && manifest.validity.check_now(now).is_ok()
        });
        let Some(emergency) = emergency else {
            return Ok(());
        };
        Err(Denied::local(
            EMERGENCY_DECIDES,
            format!(
                "its time has come while the emergency bundle of epoch {} decides: it is activated when that one \
                 is over; to end the emergency now, install a bundle of a higher epoch",
                emergency.bundle().epoch()
            ),
        ))
    }

    fn not_activated_at_its_time(&self, segment: &SegmentRef, denied: &Denied) {
        if denied.code == "BUNDLE_EXPIRED" {
            return self.withdraw(segment, denied.code, &denied.message);
        }
        let now = self.clock.monotonic();
        let epoch = segment.sequence;
        let is_news = self.scheduled.held().note_refused(epoch, denied, now);
        if is_news {
            self.event(
                "bundle_rejected",
                json!({
                    "epoch": epoch, "code": denied.code, "message": denied.message, "by": "schedule",
                }),
            );
        }
    }

    /// Drops what may not wait any more, and judges all of it anew where another trust holds.
    pub(super) fn review_schedule(&self) {
        let _turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.drop_what_is_over();
        // Without trust nothing is activated; what waits is judged when there is one again.
        let Some(trust) = self.policy_trust.load_full() else {
            return;
        };
        let now = self.clock.monotonic();
        if !self.scheduled.held().is_made_by(&trust, now) {
            let all_read = self.judge_schedule(&trust);
            let mut held = self.scheduled.held();
            held.trust = Some(trust);
            held.unread_again_at = (!all_read).then(|| now.saturating_add(AGAIN_FIRST));
        }
    }

    fn drop_what_is_over(&self) {
        let floor = self.slots.floor();
        let entries: Vec<Entry> = self.scheduled.held().entries.values().cloned().collect();
        for entry in entries {
            let segment = &entry.segment;
            let floor = floor.as_ref();
            let is_over = floor.is_some_and(|floor| floor.epoch >= segment.sequence);
            let is_newest = floor.is_some_and(|floor| floor.content_id == entry.content_id);
            // First: a segment with more signatures may have taken the place of the one that waited.
            if is_over && self.has_decided(&entry.content_id) {
                self.scheduled.held().forget(segment);
            } else if !self.store.contains(&segment.id) {
                self.withdraw(segment, "STORE", "the store has lost it");
            // Where the disk failed over the newest itself, it is tried again.
            } else if is_over && !is_newest {
                let why = "another bundle has taken its epoch, or one above it; where it is still wanted, an \
                           emergency was of too high an epoch, say: sign it with a higher one";
                self.withdraw(segment, "BUNDLE_EPOCH", why);
            }
        }
    }

    fn has_decided(&self, content_id: &ContentId) -> bool {
        let current = self.slots.current();
        let is_current = current.is_some_and(|now| now.bundle().content_id() == content_id);
        let aside = self.slots.aside();
        let standby = self.slots.standby();
        is_current
            || aside.is_some_and(|aside| aside.content_id == *content_id)
            || standby.is_some_and(|standby| standby.content_id == *content_id)
    }

    /// Makes the schedule from what the store holds above the floor and this trust lets wait; whether all of it
    /// could be read.
    fn judge_schedule(&self, trust: &Arc<TrustFile>) -> bool {
        let is_again = self.scheduled.held().is_judged_by(trust);
        let (before, kept_out) = {
            let mut held = self.scheduled.held();
            (
                std::mem::take(&mut held.entries),
                std::mem::take(&mut held.kept_out),
            )
        };
        let mut stored = self.store.list(Some(Kind::Policy));
        stored.retain(|segment| !is_statement(&segment.origin));
        let judged = stored.into_iter().map(|segment| {
            let judged = self.judge_stored(&segment, trust);
            (segment, judged)
        });
        let judged: Vec<(SegmentRef, Option<Judged>)> = judged.collect();
        let known = self.slots.floor().map(|floor| floor.epoch);
        let has_floor = known.is_some() && !self.slots.is_floor_lost();
        let floor = match known {
            Some(known) if has_floor => known,
            // What was lost was no lower than what is known yet.
            known => lost_floor(&judged, self.clock.unix_ms()).max(known.unwrap_or_default()),
        };
        let mut all_read = true;
        for (segment, judged) in judged {
            let is_due = matches!(&judged, Some(Ok((_, Some(_)))));
            let is_known = before.values().any(|known| known.segment == segment);
            if segment.sequence <= floor && has_floor {
                continue;
            }
            // What waited here since this process began has not been set aside.
            if segment.sequence <= floor && !is_known {
                if is_due {
                    self.tell_unscheduled(&segment, "FLOOR_DAMAGED", NO_FLOOR);
                }
                continue;
            }
            let known = before.get(&segment.sequence);
            let known = known.filter(|known| known.segment == segment);
            let placed = match judged {
                Some(Ok((content_id, Some(_)))) if self.slots.was_set_aside(&content_id) => Err(
                    Denied::local("POLICY_SET_ASIDE", "it was set aside on this node"),
                ),
                Some(Ok((content_id, Some(start)))) => {
                    let known = known.map(|known| (known, is_again));
                    self.place_again(&segment, content_id, start, known)
                }
                // It waits for no time: a stop came between storing and activating it.
                Some(Ok((_, None))) => Ok(()),
                Some(Err(denied)) if has_floor || known.is_some() => Err(denied),
                Some(Err(_)) => Ok(()),
                // Told where it was read; what the store has lost is withdrawn by the next look.
                None => {
                    all_read = false;
                    let known = known.cloned().map(|known| (segment.sequence, known));
                    self.scheduled.held().entries.extend(known);
                    Ok(())
                }
            };
            match placed {
                Ok(()) => {}
                Err(denied) if is_superseded(&denied) => {
                    self.withdraw(&segment, denied.code, &denied.message);
                }
                Err(denied) => {
                    let is_known = kept_out.contains(&segment);
                    self.keep_out(&segment, &denied, is_known);
                }
            }
        }
        self.drop_surplus();
        all_read
    }

    /// Content and time of a stored bundle, if this trust takes it; nothing, where it cannot be read now.
    fn judge_stored(&self, segment: &SegmentRef, trust: &TrustFile) -> Option<Judged> {
        let read = self.store.get(&segment.id).ok()?;
        let judged = Package::decode(read.body()).and_then(|package| {
            let manifest = signed_manifest(&package, trust, &self.context)?;
            Ok((package.content_id(), Start::of(&manifest)))
        });
        Some(judged.map_err(judge))
    }

    fn place_again(
        &self,
        segment: &SegmentRef,
        content_id: ContentId,
        start: Start,
        known: Option<(&Entry, bool)>,
    ) -> Result<(), Denied> {
        let place = self
            .scheduled
            .held()
            .place(segment.sequence, &content_id, start.unix_ms)?;
        if let Place::Free(loses) = place {
            let since_unix_ms = known.map(|(known, _)| known.since_unix_ms);
            let since_unix_ms = since_unix_ms.unwrap_or_else(|| self.clock.unix_ms());
            self.enter(segment.clone(), loses, content_id, (start, since_unix_ms));
            // The same trust would refuse it again.
            if let Some((known, true)) = known {
                let known = (segment.sequence, known.clone());
                self.scheduled.held().entries.extend([known]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tidelock_segments::SegmentId;

    use super::*;

    const DAY_MS: u64 = 86_400_000;

    fn content(number: u8) -> ContentId {
        let text = format!("\"sha256:{}\"", format!("{number:02x}").repeat(32));
        serde_json::from_str(&text).unwrap()
    }

    fn segment(epoch: u64) -> SegmentRef {
        SegmentRef {
            id: SegmentId::from_bytes([u8::try_from(epoch).unwrap(); 32]),
            kind: Kind::Policy,
            origin: Origin::policy("site").unwrap(),
            sequence: epoch,
            size_bytes: 1,
            prev: None,
        }
    }

    fn put(schedule: &mut Schedule, epoch: u64, at_unix_ms: u64) -> Result<Vec<u64>, &'static str> {
        let number = u8::try_from(epoch).unwrap();
        let place = schedule.place(epoch, &content(number), at_unix_ms);
        let Place::Free(loses) = place.map_err(|denied| denied.code)? else {
            return Ok(vec![epoch]);
        };
        for lost in &loses {
            schedule.forget(lost);
        }
        let entry = Entry {
            segment: segment(epoch),
            content_id: content(number),
            start: Start {
                unix_ms: at_unix_ms,
                text: String::new(),
            },
            since_unix_ms: 0,
            refused: None,
            again_at: Duration::ZERO,
            wait: Duration::ZERO,
        };
        schedule.entries.insert(epoch, entry);
        Ok(loses.into_iter().map(|lost| lost.sequence).collect())
    }

    fn epochs(due: Vec<SegmentRef>) -> Vec<u64> {
        due.into_iter().map(|segment| segment.sequence).collect()
    }

    #[test]
    fn epochs_and_times_of_what_waits_rise_together() {
        let mut schedule = Schedule::default();
        assert_eq!(put(&mut schedule, 5, 10 * DAY_MS), Ok(vec![]));
        assert_eq!(put(&mut schedule, 7, 20 * DAY_MS), Ok(vec![]));
        // Again, the same; and other content of an epoch that is taken.
        assert_eq!(put(&mut schedule, 5, 10 * DAY_MS), Ok(vec![5]));
        let conflict = schedule.place(5, &content(99), 10 * DAY_MS).unwrap_err();
        assert_eq!(conflict.code, "BUNDLE_CONFLICT");
        // A higher epoch would be in force before it.
        assert_eq!(put(&mut schedule, 6, 20 * DAY_MS), Err("BUNDLE_EPOCH"));
        assert_eq!(put(&mut schedule, 6, 19 * DAY_MS), Ok(vec![]));
        // And what this one is in force before.
        assert_eq!(put(&mut schedule, 8, 15 * DAY_MS), Ok(vec![6, 7]));
        let now = Duration::ZERO;
        assert!(schedule.due(10 * DAY_MS - 1, now).is_empty());
        assert_eq!(epochs(schedule.due(10 * DAY_MS, now)), [5]);
        assert_eq!(epochs(schedule.due(15 * DAY_MS, now)), [8, 5]);
    }

    #[test]
    fn inv_16_without_a_floor_nothing_older_than_what_may_have_decided_comes_back_by_itself() {
        let at = |days: Option<u64>| {
            let start = days.map(|days| Start {
                unix_ms: days * DAY_MS,
                text: String::new(),
            });
            Some(Ok((content(1), start)))
        };
        let lost = |stored: Vec<(u64, Option<Judged>)>| {
            let stored = stored
                .into_iter()
                .map(|(epoch, judged)| (segment(epoch), judged));
            lost_floor(&stored.collect::<Vec<_>>(), 10 * DAY_MS)
        };
        // A first bundle that waits, and others after it.
        assert_eq!(lost(vec![(3, at(Some(11))), (4, at(Some(12)))]), 0);
        // The newest whose time has come may have been set aside.
        assert_eq!(
            lost(vec![(3, at(Some(8))), (4, at(Some(9))), (5, at(Some(11)))]),
            4
        );
        // One without a time of its own has decided, and so has one that cannot be read or is not trusted.
        assert_eq!(lost(vec![(3, at(Some(8))), (7, at(None))]), 7);
        assert_eq!(lost(vec![(3, at(Some(8))), (7, None)]), 7);
        let denied = || Some(Err(Denied::local("BUNDLE_SIGNATURE", "why")));
        assert_eq!(lost(vec![(3, at(Some(8))), (7, denied())]), 7);
    }

    #[test]
    fn inv_07_few_bundles_wait_and_a_refused_one_is_tried_ever_more_seldom() {
        let mut schedule = Schedule::default();
        for epoch in 1..=4 {
            assert_eq!(put(&mut schedule, epoch, epoch * DAY_MS), Ok(vec![]));
        }
        assert_eq!(put(&mut schedule, 5, 5 * DAY_MS), Err("BUNDLE_NOT_YET"));
        assert_eq!(put(&mut schedule, 5, 4 * DAY_MS), Ok(vec![4]));
        let denied = |code| Denied::local(code, "why");
        let mut now = Duration::ZERO;
        assert!(schedule.note_refused(1, &denied("POLICY_FLIPS"), now));
        assert!(schedule.told()[0]["refused"]["code"] == "POLICY_FLIPS");
        for wait_s in [15, 30, 60, 120, 240, 480, 600, 600] {
            let wait = Duration::from_secs(wait_s);
            let early = now + wait - Duration::from_millis(1);
            assert!(schedule.due(DAY_MS, early).is_empty());
            now += wait;
            assert_eq!(epochs(schedule.due(DAY_MS, now)), [1]);
            assert!(
                !schedule.note_refused(1, &denied("POLICY_FLIPS"), now),
                "told once"
            );
        }
        assert!(schedule.note_refused(1, &denied("POLICY_REPLAY"), now));
        assert!(schedule.note_refused(1, &denied(EMERGENCY_DECIDES), now));
        assert_eq!(epochs(schedule.due(DAY_MS, now + AGAIN_FIRST)), [1]);
    }

    /// A segment that could not be read at the start was never looked at again.
    #[test]
    fn a_schedule_of_which_a_segment_was_not_read_is_made_again() {
        let trust = tidelock_policy::testing::Authority::new("site-1", 1).unwrap();
        let trust = Arc::new(TrustFile::parse(&trust.trust_toml(1)).unwrap());
        let mut schedule = Schedule::default();
        assert!(!schedule.is_made_by(&trust, Duration::ZERO));
        schedule.trust = Some(trust.clone());
        assert!(schedule.is_made_by(&trust, AGAIN_MOST));
        schedule.unread_again_at = Some(AGAIN_FIRST);
        assert!(schedule.is_made_by(&trust, AGAIN_FIRST - Duration::from_millis(1)));
        assert!(!schedule.is_made_by(&trust, AGAIN_FIRST));
    }

    #[test]
    fn inv_07_what_a_trust_keeps_out_takes_the_room_that_what_waits_leaves() {
        let mut schedule = Schedule {
            kept_out: [8, 5, 7, 6].map(segment).into(),
            ..Schedule::default()
        };
        assert!(schedule.surplus().is_empty());
        for epoch in [1, 2] {
            put(&mut schedule, epoch, epoch * DAY_MS).unwrap();
        }
        assert_eq!(epochs(schedule.surplus()), [5, 6]);
        assert_eq!(epochs(schedule.kept_out.clone()), [7, 8]);
    }
}
