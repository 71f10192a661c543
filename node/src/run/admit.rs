//! What may enter: bundles, CRLs and other nodes' audit, from the operator, a peer or the disk.
//!
//! Every way in ends here, so that a segment from a peer and a file from the operator pass the same
//! checks. What is refused leaves nothing behind but an event.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use serde_json::{Value, json};
use tidelock_policy::{
    Activation, BundleError, ContentId, Manifest, Package, Role, TrustFile, VerifiedBundle,
    signed_manifest,
};
use tidelock_segments::{
    Charge, CustodyReceipt, Endorsement, Kind, LogError, NamedHead, NodeId, Origin, OwnSegment,
    Partial, PartialError, PutOutcome, SegmentRef, Sha256Hash, StoreError, VerifiedSegment,
    named_heads, parse_body, verify_segment,
};
use tidelock_transport::{
    endorse::verify_endorsement,
    revocation::{CrlError, Imported, Outcome, VerifiedCrl, crl_segment, crls_in_file},
    session::Refusal,
};

use super::{
    node::{ACCEPTED_LOGS_FILE, Node, identity_rules, worker_terms},
    policy::policy_segment,
    trust::{carries_statement, is_statement, no_trust},
};
use crate::{clock::SANITY_BOUND, worker::For};

/// How far above the floor keys of an emergency may go.
const BREAK_GLASS_EPOCHS_MAX: u64 = 1_000;

/// Segments of one epoch of one bundle that are looked at when it comes again: one, and those that
/// earlier keys signed.
const MAX_POLICY_OF_ONE_EPOCH: usize = 64;

/// Origins that are remembered as forked (INV-07); more than the mesh has peers.
const FORKED_MAX: usize = 1_024;

/// Why something was not let in: a stable code and a message for whoever must act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub(super) struct Denied {
    pub(super) code: &'static str,
    pub(super) message: String,
    /// Whether whoever brought it is to blame, rather than this node's own state.
    pub(super) bringer: bool,
}

impl Denied {
    pub(super) fn bringer(code: &'static str, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
            bringer: true,
        }
    }

    pub(super) fn local(code: &'static str, message: impl ToString) -> Self {
        Self {
            bringer: false,
            ..Self::bringer(code, message)
        }
    }

    /// Whether the certificate or its key is known to be revoked.
    pub(super) fn is_revoked(&self) -> bool {
        ["CERT_REVOKED", "KEY_REVOKED"].contains(&self.code)
    }

    /// Whether a newer endorsement of the same log key may stand in.
    fn may_be_stood_in_for(&self) -> bool {
        self.is_revoked() || self.code == "CERT_EXPIRED"
    }
}

/// Why a segment in ranges was not let in.
enum PartialDenied {
    Denied(Denied),
    Partial(PartialError),
}

impl From<PartialError> for PartialDenied {
    fn from(error: PartialError) -> Self {
        Self::Partial(error)
    }
}

/// Who is to blame for a bundle. A peer that passes on what another authority signed, or what needs a newer
/// node, has done nothing wrong; one that passes on what is no bundle has.
pub(super) fn judge(error: BundleError) -> Denied {
    match error.code() {
        code @ ("BUNDLE_FORMAT" | "BUNDLE_DIGEST") => Denied::bringer(code, error),
        code => Denied::local(code, error),
    }
}

/// What a taken CRL was, in the word that events and answers use.
pub(super) fn outcome_word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Newest => "newest",
        Outcome::AlreadyHeld => "already_held",
        Outcome::Conflict => "conflict",
        Outcome::Ahead => "ahead",
        _ => "taken",
    }
}

/// The heads that the first record of a log names.
fn heads_named_by(segment: &VerifiedSegment) -> Vec<NamedHead> {
    let header = segment.header();
    parse_body(segment.body(), &header.domain, &header.origin)
        // Never encrypted, so that every peer can read it.
        .and_then(|body| body.record(0, None))
        .map(|record| named_heads(&record))
        .unwrap_or_default()
}

/// The highest head that is held of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HeldHead {
    origin: Origin,
    size: u64,
    root: Sha256Hash,
}

/// Ruling 7: what is wrong with a new log of a known node, given the heads that its first record names
/// and those that are held. It must name the newest log that is held, of the same key if there is one,
/// at the head that is held or beyond it.
fn lineage_fault(origin: &Origin, named: &[NamedHead], held: &[HeldHead]) -> Option<String> {
    let parts = |of: &Origin| {
        of.audit_parts()
            .map(|(_, key, number)| (key.to_owned(), number))
    };
    let key = parts(origin).map(|(key, _)| key);
    let same_key = |head: &&HeldHead| parts(&head.origin).map(|(key, _)| key) == key;
    let number = |head: &&HeldHead| parts(&head.origin).map(|(_, number)| number);
    let newest = held
        .iter()
        .filter(same_key)
        .max_by_key(number)
        .or_else(|| held.iter().max_by_key(number))?;
    let Some(claim) = named.iter().find(|head| head.origin == newest.origin) else {
        return Some(format!(
            "it does not name {}, of which a head of {} records is held here",
            newest.origin, newest.size
        ));
    };
    if claim.size < newest.size {
        return Some(format!(
            "it names {} at {} records, and {} are held here",
            newest.origin, claim.size, newest.size
        ));
    }
    (claim.size == newest.size && claim.root != newest.root).then(|| {
        format!(
            "it names another root of {} at {} records than the one that is held here",
            newest.origin, newest.size
        )
    })
}

/// How long after the last segment of an own log came the next incarnation begins, when all that a peer
/// listed is here.
const OWN_SETTLES: Duration = Duration::from_secs(1);
/// The same when a peer has listed more: it may have gone, or never have had it.
const OWN_PATIENCE: Duration = Duration::from_secs(10);
/// Own logs of which a peer's claims are remembered (INV-07).
const OWN_CLAIMS_MAX: usize = 64;

/// What peers hold of this node's own logs and it does not.
#[derive(Debug, Default)]
pub(super) struct OwnAhead {
    /// Highest number that was listed of each log. Claims, not proofs.
    listed: BTreeMap<Origin, u64>,
    /// When the last segment of one of them came, or the change was tried last.
    last: Duration,
    /// Why the change failed last; told once (INV-07).
    failed: Option<String>,
}

impl OwnAhead {
    fn note_listed(&mut self, origin: &Origin, sequence: u64) -> bool {
        if self.listed.len() >= OWN_CLAIMS_MAX && !self.listed.contains_key(origin) {
            return false;
        }
        let first = !self.listed.contains_key(origin);
        let highest = self.listed.entry(origin.clone()).or_default();
        *highest = sequence.max(*highest);
        first
    }

    /// Whether the next incarnation may begin: everything listed is held, or nothing comes any more.
    fn is_settled(&self, now: Duration, newest: impl Fn(&Origin) -> Option<u64>) -> bool {
        let all = self
            .listed
            .iter()
            .all(|(origin, highest)| newest(origin).is_some_and(|newest| newest >= *highest));
        let quiet = now.saturating_sub(self.last);
        quiet >= if all { OWN_SETTLES } else { OWN_PATIENCE }
    }
}

impl Node {
    // ---- policy

    /// Verifies a package as a node does before it activates: signatures, then a worker compiles it, then
    /// this process.
    pub(super) fn verify_package(
        &self,
        package: &[u8],
        asker: For,
    ) -> Result<VerifiedBundle, Denied> {
        let trust = self.bundle_trust()?;
        Package::decode(package)
            .and_then(|package| self.load_package(package, &trust, asker))
            .map_err(judge)
    }

    /// What can be said of a package before anything is compiled: who signed it, what it is, and whether
    /// the floor would let it in. A bundle whose epoch is over costs no worker.
    pub(super) fn check_offer(&self, package: &[u8]) -> Result<(Package, Manifest), Denied> {
        let trust = self.bundle_trust()?;
        let package = Package::decode(package).map_err(judge)?;
        let manifest = signed_manifest(&package, &trust, &self.context).map_err(judge)?;
        self.check_floor(&manifest, &package.content_id())?;
        Ok((package, manifest))
    }

    pub(super) fn bundle_trust(&self) -> Result<Arc<TrustFile>, Denied> {
        self.policy_trust.load_full().ok_or_else(no_trust)
    }

    /// The one way from a package to a bundle in this process. The content that decides has been through
    /// it: it is asked for its signatures only, so that no worker that fails can take it out of use.
    pub(super) fn load_package(
        &self,
        package: Package,
        trust: &TrustFile,
        asker: For,
    ) -> Result<VerifiedBundle, BundleError> {
        if let Some(deciding) = self.slots.current()
            && *deciding.bundle().content_id() == package.content_id()
        {
            return deciding
                .bundle()
                .signed_again(package, trust, &self.context);
        }
        let terms = worker_terms(&self.config.load());
        self.vetter
            .vet(package, trust, &self.context, asker, terms)?
            .load(trust, &self.context)
    }

    /// Whether the floor would let this bundle activate (INV-16, ruling 13).
    pub(super) fn check_floor(
        &self,
        manifest: &Manifest,
        content_id: &ContentId,
    ) -> Result<(), Denied> {
        let floor = self.slots.floor();
        let is_again = floor
            .as_ref()
            .is_some_and(|floor| floor.content_id == *content_id);
        // What was active may always be installed again (ruling 13); its time gates each request.
        if !is_again {
            manifest
                .validity
                .check_now(self.clock.unix_ms())
                .map_err(|error| Denied::local(error.code(), error))?;
        }
        self.check_epoch(manifest, content_id)
    }

    /// The same, whatever the time.
    pub(super) fn check_epoch(
        &self,
        manifest: &Manifest,
        content_id: &ContentId,
    ) -> Result<(), Denied> {
        let Some(floor) = self.slots.floor() else {
            return Ok(());
        };
        let epoch = manifest.epoch;
        if epoch < floor.epoch {
            return Err(Denied::local(
                "BUNDLE_EPOCH",
                format!(
                    "epoch {epoch} is below the floor of {}; build a newer epoch",
                    floor.epoch
                ),
            ));
        }
        if epoch == floor.epoch && *content_id != floor.content_id {
            return Err(Denied::local(
                "BUNDLE_CONFLICT",
                format!(
                    "epoch {epoch} is taken by {}; give the changed content a new epoch",
                    floor.content_id
                ),
            ));
        }
        self.check_emergency(manifest, floor.epoch)
    }

    /// What keys of an emergency may not do: take the epochs from the policy authority, or sign for a time
    /// that has not come.
    fn check_emergency(&self, manifest: &Manifest, floor: u64) -> Result<(), Denied> {
        if manifest.role != Role::BreakGlass {
            return Ok(());
        }
        let ahead_ms = manifest
            .created_unix_ms
            .saturating_sub(self.clock.unix_ms());
        if u128::from(ahead_ms) > SANITY_BOUND.as_millis() {
            return Err(Denied::local(
                "BUNDLE_NOT_YET",
                format!(
                    "a break-glass bundle made at {}, which has not come; look at both clocks",
                    manifest.created_at
                ),
            ));
        }
        if manifest.epoch > floor.saturating_add(BREAK_GLASS_EPOCHS_MAX) {
            return Err(Denied::local(
                "BUNDLE_EPOCH",
                format!(
                    "epoch {} of a break-glass bundle is more than {BREAK_GLASS_EPOCHS_MAX} above the \
                     floor of {floor}: no bundle of the policy authority could follow it",
                    manifest.epoch
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn own_policy_segment(
        &self,
        package: &Package,
        manifest: &Manifest,
    ) -> Result<VerifiedSegment, Denied> {
        let domain = self.config.load().node.domain.clone();
        policy_segment(&domain, package, manifest)
            .map_err(|e| Denied::bringer("BUNDLE_FORMAT", e))
            .and_then(|bytes| {
                verify_segment(bytes, None, &domain)
                    .map_err(|e| Denied::bringer("BUNDLE_FORMAT", e))
            })
    }

    /// The segments of this content that a newly signed one takes the place of: none of them carries the
    /// signatures that are demanded now, because keys were replaced since or it permits more. None where one still does:
    /// further signatures, be they junk, make no segment of it.
    pub(super) fn outdated_policy(
        &self,
        wanted: &SegmentRef,
        bundle: &VerifiedBundle,
    ) -> Option<Vec<SegmentRef>> {
        let trust = self.policy_trust.load_full()?;
        let signers = bundle.signers().len();
        // What the widening gate asked of it, it asks elsewhere too.
        let needed = trust.activation().widening_threshold.unwrap_or_default();
        let has_enough = |held: &Package| {
            let held = trust.signatures_of(held).len();
            held >= needed || held >= signers
        };
        let top = wanted.sequence;
        let mut outdated = Vec::new();
        for held in self
            .store
            .refs(&wanted.origin, top, top, MAX_POLICY_OF_ONE_EPOCH)
        {
            let package = self
                .store
                .get(&held.id)
                .ok()
                .and_then(|segment| Package::decode(segment.body()).ok());
            let Some(package) = package.filter(|p| p.content_id() == *bundle.content_id()) else {
                continue;
            };
            if has_enough(&package) && signed_manifest(&package, &trust, &self.context).is_ok() {
                return None;
            }
            outdated.push(held);
        }
        Some(outdated)
    }

    /// Whether a readable segment of this origin and epoch is held.
    pub(super) fn holds_policy(&self, wanted: &SegmentRef) -> bool {
        self.store
            .find(&wanted.origin, wanted.sequence)
            .is_some_and(|held| self.store.get(&held.id).is_ok())
    }

    /// Policy segments below both slots serve nobody any more.
    pub(super) fn drop_superseded_policy(&self, activation: &Activation) {
        let replaced = activation.replaced.as_ref().map(|(epoch, _)| *epoch);
        let standby = self.slots.standby().map(|standby| standby.epoch);
        let kept = [Some(activation.epoch), replaced, standby];
        let keep_from = kept.into_iter().flatten().min().unwrap_or_default();
        for old in self.store.list(Some(Kind::Policy)) {
            if old.sequence < keep_from
                && !is_statement(&old.origin)
                && let Err(error) = self.store.remove(&old.id)
            {
                tracing::warn!(%error, id = %old.id, "superseded policy segment stays");
            }
        }
    }

    /// Ruling 14: a damaged active bundle is first restored from the store at the same epoch.
    pub(super) fn restore_policy(&self) {
        self.restoring().tell_anew();
        self.restore_from_store();
    }

    /// The same; what refuses it is told once.
    pub(super) fn restore_from_store(&self) {
        let Some(floor) = self.slots.wanted() else {
            return;
        };
        let candidates: Vec<SegmentRef> = self
            .store
            .list(Some(Kind::Policy))
            .into_iter()
            .filter(|s| s.sequence == floor.epoch && !is_statement(&s.origin))
            .collect();
        for candidate in candidates {
            let restored = self
                .store
                .get(&candidate.id)
                .map_err(|e| Denied::local("STORE", e))
                .and_then(|segment| self.install_bundle(segment.body(), For::Slots));
            match restored {
                Ok(activated) => {
                    self.event("bundle_restored", activated.told());
                    return;
                }
                Err(denied) if self.restoring().is_news(candidate.id, denied.code) => self.event(
                    "bundle_not_restored",
                    json!({"segment": candidate.id, "code": denied.code, "message": denied.message}),
                ),
                Err(_) => {}
            }
        }
    }

    /// What `admit_policy` judges before anything is installed: a worker compiles the bundle, and this
    /// process does not yet. Nobody else waits for it meanwhile. Answers the package to install: with the
    /// signatures that count of copies that wait, if there are any.
    fn check_policy(&self, segment: &VerifiedSegment) -> Result<Vec<u8>, Denied> {
        let (package, manifest) = self.check_arrival(segment.body())?;
        if self.own_policy_segment(&package, &manifest)?.id() != segment.id() {
            return Err(Denied::bringer(
                "BUNDLE_FORMAT",
                "the segment does not fit its bundle",
            ));
        }
        self.check_begun(&manifest, &package.content_id())?;
        let copy = self.offered_copy(segment, &package).ok_or_else(no_trust)?;
        if let Some(denied) = self.waiting.still(&copy, self.clock.monotonic()) {
            return Err(denied);
        }
        let joined = self.waiting.joined(&package, &copy);
        let encoded = match &joined {
            Some(joined) => joined.encode().map_err(judge)?,
            None => segment.body().to_vec(),
        };
        // Only its signatures are looked at again.
        if self.scheduled.has(&copy.content_id) {
            return Ok(encoded);
        }
        let terms = worker_terms(&self.config.load());
        let trust = self.bundle_trust()?;
        self.vetter
            .vet(package, &trust, &self.context, For::Peer, terms)
            .map_err(judge)?;
        Ok(encoded)
    }

    fn admit_policy(&self, peer: &NodeId, segment: &VerifiedSegment) -> Result<(), Denied> {
        self.check_policy(segment)
            .and_then(|package| self.install_or_schedule(&package, For::Peer))
            .map(drop)
            .inspect_err(|denied| {
                self.note_bundle_refused(peer, segment, denied);
            })
    }

    // ---- revocation

    /// Reads a CRL file, PEM or DER, and verifies each CRL in it against the trusted authorities.
    pub(super) fn verify_crls(&self, bytes: &[u8]) -> Result<Vec<VerifiedCrl>, Denied> {
        let trust = self.authorities.load_full().ok_or_else(|| {
            Denied::local(
                "NO_AUTHORITIES",
                "no usable CA file; see identity.ca in the config",
            )
        })?;
        crls_in_file(bytes)
            .and_then(|ders| {
                ders.iter()
                    .map(|der| VerifiedCrl::verify(der, &trust))
                    .collect()
            })
            .map_err(|e| Denied::bringer(e.code(), e))
    }

    /// Applies a verified CRL: in memory first, whatever the disk says (ruling 10).
    pub(super) fn apply_crl(&self, crl: VerifiedCrl) -> Result<Imported, Denied> {
        let domain = self.config.load().node.domain.clone();
        let this_update_unix_ms = crl.this_update_unix_ms();
        let segment = crl_segment(&domain, &crl)
            .and_then(|bytes| verify_segment(bytes, None, &domain))
            .map_err(|e| Denied::bringer("CRL_ENVELOPE", e))?;
        let imported = self
            .revocation
            .import(crl, self.clock.unix_ms())
            .map_err(|e| match e {
                CrlError::Older { .. } => Denied::local(e.code(), e),
                other => Denied::bringer(other.code(), other),
            })?;
        // Ruling 9: a CRL from the future revokes at once, but makes its own time no more plausible.
        if imported.outcome != Outcome::Ahead {
            self.clock.raise_by_signed(this_update_unix_ms);
        }
        // The event stands before what it causes: sessions are closed after it.
        if imported.outcome != Outcome::AlreadyHeld {
            self.event(
                "crl_applied",
                json!({
                    "issuer": imported.issuer.to_string(),
                    "number": imported.number,
                    "outcome": outcome_word(imported.outcome),
                    "newly_revoked": imported.newly_revoked,
                }),
            );
            if let Some(mesh) = self.mesh.get() {
                mesh.revocation_changed();
            }
        }
        // Also for a list that is held already: it may have come while no identity was usable.
        self.drop_receipts_of_the_revoked();
        match self.store.put(&segment, Charge::Reserve) {
            Ok(_) => {
                self.drop_superseded_crls(&segment.reference());
                self.offered(segment.reference());
            }
            Err(error) => self.event(
                "crl_not_stored",
                json!({"number": imported.number, "why": error.to_string()}),
            ),
        }
        Ok(imported)
    }

    fn drop_superseded_crls(&self, newest: &SegmentRef) {
        let current: Vec<u64> = self
            .revocation
            .state()
            .crls()
            .iter()
            .filter(|crl| crl.origin() == newest.origin)
            .map(|crl| crl.number())
            .collect();
        for old in self.store.list(Some(Kind::Revocation)) {
            if old.origin == newest.origin
                && old.sequence < newest.sequence
                && !current.contains(&old.sequence)
                && let Err(error) = self.store.remove(&old.id)
            {
                tracing::warn!(%error, id = %old.id, "superseded CRL segment stays");
            }
        }
    }

    /// Ruling 4: a revoked custodian's receipts stop counting.
    pub(super) fn drop_receipts_of_the_revoked(&self) {
        let removed = self.store.remove_receipts_by(&|receipt: &CustodyReceipt| {
            self.check_endorsement(&receipt.endorsement, receipt.issued_unix_ms)
                .is_err_and(|denied| denied.is_revoked())
        });
        let waits = removed.is_err();
        let waited = self.revoked_receipts_wait.swap(waits, Ordering::Relaxed);
        match removed {
            Ok(0) => {}
            Ok(count) => self.event("receipts_dropped", json!({"count": count})),
            // Told once; it is tried again every minute.
            Err(error) if !waited => {
                self.event("receipts_not_dropped", json!({"why": error.to_string()}));
            }
            Err(_) => {}
        }
    }

    /// Applies the stored CRLs and those that the config names.
    pub(super) fn load_crls(&self) {
        if let Some(trust) = self.authorities.load_full() {
            for held in self.store.list(Some(Kind::Revocation)) {
                let taken = self
                    .store
                    .get(&held.id)
                    .map_err(|e| e.to_string())
                    .and_then(|segment| {
                        VerifiedCrl::from_segment(&segment, &trust).map_err(|e| e.to_string())
                    })
                    .and_then(|crl| self.apply_crl(crl).map_err(|e| e.to_string()));
                if let Err(why) = taken {
                    self.event("crl_not_loaded", json!({"segment": held.id, "why": why}));
                }
            }
        }
        for path in self.config.load().revocation.crls.clone() {
            let taken = fs::read(&path)
                .map_err(|e| e.to_string())
                .and_then(|bytes| self.verify_crls(&bytes).map_err(|e| e.to_string()))
                .and_then(|crls| {
                    crls.into_iter()
                        .try_for_each(|crl| match self.apply_crl(crl) {
                            // The store knows a newer one: the file is only the first of its line.
                            Err(denied) if denied.code == "CRL_OLDER" => Ok(()),
                            other => other.map(|_| ()).map_err(|e| e.to_string()),
                        })
                });
            if let Err(why) = taken {
                self.event("crl_not_loaded", json!({"file": path, "why": why}));
            }
        }
    }

    fn check_crl(&self, segment: &VerifiedSegment) -> Result<VerifiedCrl, Denied> {
        let trust = self
            .authorities
            .load_full()
            .ok_or_else(|| Denied::local("NO_AUTHORITIES", "no usable CA file"))?;
        VerifiedCrl::from_segment(segment, &trust).map_err(|e| Denied::bringer(e.code(), e))
    }

    fn admit_crl(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        self.apply_crl(self.check_crl(segment)?).map(|_| ())
    }

    // ---- audit

    /// Judges the certificate behind a log key. Where the one that travelled with the thing is
    /// revoked or has expired, a newer one that the same node has shown for the same log key and
    /// incarnation in an authenticated Hello serves (docs/src/decisions/0016-re-endorsement.md).
    pub(super) fn check_endorsement(
        &self,
        endorsement: &Endorsement,
        signed_at_unix_ms: u64,
    ) -> Result<NodeId, Denied> {
        self.judge_endorsement(endorsement, signed_at_unix_ms)
            .or_else(|first| {
                if !first.may_be_stood_in_for() {
                    return Err(first);
                }
                let key = (endorsement.node_id.clone(), endorsement.log_key);
                let newer = self
                    .endorsements
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get(&key)
                    .filter(|newer| newer.incarnation == endorsement.incarnation)
                    .cloned();
                newer
                    .and_then(|newer| self.judge_endorsement(&newer, self.clock.unix_ms()).ok())
                    .ok_or(first)
            })
    }

    /// As [`Node::check_endorsement`], by this endorsement alone.
    pub(super) fn judge_endorsement(
        &self,
        endorsement: &Endorsement,
        signed_at_unix_ms: u64,
    ) -> Result<NodeId, Denied> {
        let trust = self
            .authorities
            .load_full()
            .ok_or_else(|| Denied::local("NO_AUTHORITIES", "no usable CA file"))?;
        let rules = identity_rules(&self.config.load());
        let now = self.clock.unix_ms();
        verify_endorsement(
            endorsement,
            &trust,
            &self.revocation,
            &rules,
            signed_at_unix_ms,
            now,
        )
        .map(|good| good.identity().node_id().clone())
        // Whoever passes it on took it in when it was good: the fault is nobody's here.
        .map_err(|e| Denied::local(e.code(), e))
    }

    /// Ruling 7: another log key or incarnation of a known node is evidence, unless it names the head
    /// that is held here, or the operator has accepted it. Beside the refusal what to note as a fork.
    fn lineage(&self, segment: &VerifiedSegment) -> Result<(), (Denied, Option<String>)> {
        let origin = &segment.header().origin;
        let known: Vec<Origin> = self
            .store
            .heads()
            .into_iter()
            .map(|head| head.origin)
            .filter(|held| held.kind() == Kind::Audit && held.audit_node() == origin.audit_node())
            .collect();
        if known.contains(origin) || self.is_accepted(origin) {
            return Ok(());
        }
        let mut held = Vec::with_capacity(known.len());
        for log in known {
            let newest = self.store.last(&log);
            let Some(span) = newest.and_then(|newest| self.store.audit_span(&newest.id)) else {
                let why = format!("the newest segment that is held of {log} cannot be read");
                return Err((Denied::local("STORE", why), None));
            };
            held.push(HeldHead {
                origin: log,
                size: span.last.saturating_add(1),
                root: span.root,
            });
        }
        let Some(why) = lineage_fault(origin, &heads_named_by(segment), &held) else {
            return Ok(());
        };
        if segment.header().sequence > 0 {
            // What a log names stands in its first segment, which another custodian may bring yet.
            let why = format!(
                "a known node began a new log, and its first segment is not held, so nobody knows \
                 what it names; where it is right, tidelock audit accept {origin}"
            );
            return Err((Denied::local("AUDIT_LINEAGE", why), None));
        }
        let fork = format!("a known node began a new log: {why}");
        let message = format!("{fork}; where that is right, tidelock audit accept {origin}");
        Err((Denied::local("AUDIT_LINEAGE", message), Some(fork)))
    }

    /// The same, and a contradiction is noted as a fork.
    fn check_lineage(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        self.lineage(segment).map_err(|(denied, fork)| {
            if let Some(fork) = fork {
                self.note_fork(&segment.header().origin, &fork);
            }
            denied
        })
    }

    // ---- own audit

    /// Whether this is a log of this node under its present log key.
    pub(super) fn is_own_log(&self, origin: &Origin) -> bool {
        let Some((node, _, incarnation)) = origin.audit_parts() else {
            return false;
        };
        node == self.config.load().node.id
            && Origin::audit(&node, &self.log.public_key(), incarnation) == *origin
    }

    /// Whether a segment of an own log that a peer lists is to be had.
    pub(super) fn wants_own(&self, reference: &SegmentRef) -> bool {
        let origin = &reference.origin;
        if reference.sequence < self.log.evicted_below(origin) {
            return false;
        }
        let newest = self.store.last(origin);
        let beyond = newest.is_none_or(|newest| reference.sequence > newest.sequence);
        let mut ahead = self
            .own_ahead
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if ahead.note_listed(origin, reference.sequence) && beyond {
            drop(ahead);
            // A claim: shown, and no record is spent on it before it is proven.
            self.journal.note(
                self.clock.unix_ms(),
                "own_log_ahead",
                json!({"origin": origin, "sequence": reference.sequence}),
            );
        }
        true
    }

    /// Takes a segment of this node's own log back from a peer: lost to damage, or to an older copy
    /// of the root that was put in its place (ruling 8).
    fn admit_own(&self, peer: &NodeId, segment: &VerifiedSegment) -> Result<PutOutcome, Denied> {
        let reference = segment.reference();
        let endorsement = segment.endorsement().ok_or_else(|| {
            Denied::bringer("ENDORSEMENT_MISSING", "the segment has no endorsement")
        })?;
        // The log key itself has signed it, and that is in this node's hands: a certificate that has
        // expired or was revoked since takes nothing from it.
        match self.judge_endorsement(endorsement, segment.header().created_unix_ms) {
            Err(denied) if !denied.may_be_stood_in_for() => return Err(denied),
            Ok(_) | Err(_) => {}
        }
        let was_superseded = self.log.is_superseded();
        let taken = self.log.take_own(segment);
        let fields = json!({
            "peer": peer, "segment": reference.id, "origin": reference.origin,
            "sequence": reference.sequence,
        });
        match taken {
            Ok(OwnSegment::AlreadyHeld) => Ok(PutOutcome::AlreadyHeld),
            Ok(OwnSegment::Restored) => {
                self.event("own_segment_restored", fields);
                Ok(PutOutcome::Stored)
            }
            Ok(OwnSegment::Later) => {
                self.own_ahead
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .last = self.clock.monotonic();
                if !was_superseded {
                    self.event("own_log_superseded", fields);
                }
                Ok(PutOutcome::Stored)
            }
            Err(error @ LogError::NotOwn(_)) => Err(Denied::bringer("OWN_FORGED", error)),
            Err(error @ (LogError::OwnFork { .. } | LogError::Store(StoreError::Fork { .. }))) => {
                self.note_fork(&reference.origin, &error.to_string());
                Err(Denied::local("OWN_FORK", error))
            }
            Err(error) => Err(Denied::local("STORE", error)),
        }
    }

    /// Begins the next incarnation once what peers hold of a superseded log has come, or comes no more.
    pub(super) fn succeed_log(&self) {
        if !self.log.is_superseded() || self.log.latched().is_some() {
            return;
        }
        let now = self.clock.monotonic();
        {
            let mut ahead = self
                .own_ahead
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let newest = |origin: &Origin| self.store.last(origin).map(|last| last.sequence);
            if !ahead.is_settled(now, newest) {
                return;
            }
            // If it fails, it is tried again after the same time.
            ahead.last = now;
            ahead.listed.clear();
        }
        let before = self.log.origin();
        match self.begin_incarnation() {
            Ok(recovery) => {
                self.own_ahead
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .failed = None;
                self.event(
                    "own_log_succeeded",
                    json!({
                        "previous": before, "origin": self.log.origin(),
                        "quarantined": recovery.quarantined,
                    }),
                );
                if let Some(mesh) = self.mesh.get() {
                    mesh.refresh();
                }
            }
            Err(why) => {
                let mut ahead = self
                    .own_ahead
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if ahead.failed.replace(why.clone()).as_ref() != Some(&why) {
                    drop(ahead);
                    self.event(
                        "own_log_not_succeeded",
                        json!({"origin": before, "why": why}),
                    );
                }
            }
        }
    }

    /// Whether an operator has accepted this log.
    fn is_accepted(&self, origin: &Origin) -> bool {
        self.accepted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(origin)
    }

    /// Whether audit of this origin waits for an operator.
    pub(super) fn is_forked(&self, origin: &Origin) -> bool {
        self.forked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(origin)
    }

    /// An operator takes a log for good, recorded by the caller; kept over restarts.
    pub(super) fn accept_log(&self, origin: &Origin) {
        self.forked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(origin);
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        accepted.insert(origin.clone());
        self.write_state(ACCEPTED_LOGS_FILE, &*accepted);
        drop(accepted);
        if let Some(mesh) = self.mesh.get() {
            mesh.refresh();
        }
    }

    /// Evidence is recorded once for an origin, however often it is offered (INV-07).
    pub(super) fn note_fork(&self, origin: &Origin, why: &str) {
        let mut forked = self.forked.lock().unwrap_or_else(PoisonError::into_inner);
        if forked.len() < FORKED_MAX && forked.insert(origin.clone()) {
            drop(forked);
            self.event("audit_fork", json!({"origin": origin, "why": why}));
        }
    }

    fn check_audit(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        let origin = &segment.header().origin;
        if origin.audit_node() == Some(self.config.load().node.id.as_str()) {
            return Err(Denied::local(
                "OWN_AUDIT",
                "the segment is of this node under another log key, which is not in its hands",
            ));
        }
        let endorsement = segment.endorsement().ok_or_else(|| {
            Denied::bringer("ENDORSEMENT_MISSING", "the segment has no endorsement")
        })?;
        let node = self.check_endorsement(endorsement, segment.header().created_unix_ms)?;
        if origin.audit_node() != Some(node.as_str()) {
            return Err(Denied::bringer(
                "ENDORSEMENT_NODE",
                "the endorsement names another node",
            ));
        }
        Ok(())
    }

    /// All that an audit segment must pass before it is stored.
    fn judge_audit(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        self.check_audit(segment)?;
        self.check_lineage(segment)
    }

    fn audit_not_stored(&self, origin: &Origin, error: &StoreError) -> Denied {
        match error {
            StoreError::Fork { .. } => {
                self.note_fork(origin, &error.to_string());
                Denied::local("AUDIT_FORK", error)
            }
            StoreError::Ceiling(_) => Denied::local("CUSTODY_FULL", error),
            _ => Denied::local("STORE", error),
        }
    }

    fn admit_audit(&self, peer: &NodeId, segment: &VerifiedSegment) -> Result<PutOutcome, Denied> {
        if self.is_own_log(&segment.header().origin) {
            return self.admit_own(peer, segment);
        }
        self.judge_audit(segment)?;
        self.store
            .put(segment, Charge::Custody)
            .map_err(|error| self.audit_not_stored(&segment.header().origin, &error))
    }

    /// Lets a segment in that a peer, or several, sent in ranges: audit only, all else comes whole.
    pub(super) fn admit_partial(
        &self,
        peer: &NodeId,
        partial: &Partial,
    ) -> Result<PutOutcome, Denied> {
        let reference = partial.reference();
        let admitted = partial
            .finish_with(|segment| match segment.header().kind {
                Kind::Audit => self.judge_audit(segment).map_err(PartialDenied::Denied),
                _ => Err(PartialDenied::Denied(Denied::local(
                    "KIND_NOT_IN_RANGES",
                    "only audit is taken in ranges",
                ))),
            })
            .map(|(_, outcome)| outcome)
            .map_err(|denied| match denied {
                PartialDenied::Denied(denied) => denied,
                PartialDenied::Partial(PartialError::Store(error)) => {
                    self.audit_not_stored(&reference.origin, &error)
                }
                PartialDenied::Partial(
                    error @ (PartialError::Format(_) | PartialError::Claim { .. }),
                ) => Denied::bringer("SEGMENT_FORMAT", error),
                PartialDenied::Partial(error) => Denied::local("STORE", error),
            });
        self.note_admitted(peer, reference, &admitted);
        admitted
    }

    /// What [`Node::admit`] would answer now. Takes nothing, and notes nothing.
    pub(super) fn judge(&self, segment: &VerifiedSegment) -> Result<PutOutcome, Denied> {
        let reference = segment.reference();
        if self.store.contains(&reference.id) {
            return Ok(PutOutcome::AlreadyHeld);
        }
        match reference.kind {
            Kind::Revocation => self.check_crl(segment).map(|_| ()),
            Kind::Policy if carries_statement(segment) => self.check_statement(segment),
            Kind::Policy => self.check_policy(segment).map(drop),
            Kind::Audit => self.check_audit(segment).and_then(|()| {
                self.lineage(segment).map_err(|(denied, _)| denied)?;
                self.store
                    .check_place(&reference)
                    .map_err(|e| Denied::local("AUDIT_FORK", e))
            }),
            Kind::Witness => Err(Self::no_witness()),
        }
        .map(|()| PutOutcome::Stored)
    }

    fn no_witness() -> Denied {
        Denied::local("KIND_NOT_KEPT", "this node keeps no witness segments")
    }

    /// Lets a segment from a peer in, or refuses it.
    pub(super) fn admit(
        &self,
        peer: &NodeId,
        segment: &VerifiedSegment,
    ) -> Result<PutOutcome, Denied> {
        let reference = segment.reference();
        let admitted = match reference.kind {
            _ if self.store.contains(&reference.id) => Ok(PutOutcome::AlreadyHeld),
            Kind::Revocation => self.admit_crl(segment).map(|()| PutOutcome::Stored),
            Kind::Policy if carries_statement(segment) => self
                .admit_statement(peer, segment)
                .map(|()| PutOutcome::Stored),
            Kind::Policy => self
                .admit_policy(peer, segment)
                .map(|()| PutOutcome::Stored),
            Kind::Audit => self.admit_audit(peer, segment),
            Kind::Witness => Err(Self::no_witness()),
        };
        self.note_admitted(peer, &reference, &admitted);
        admitted
    }

    /// Lets segments from a peer in, each as [`Node::admit`] would after those before it. Audit of logs
    /// that are known is stored together. What begins a log is stored alone, because its lineage and that
    /// of all that follows are judged by what is held then. `alive` tells whether the peer's session is.
    pub(super) fn admit_all(
        &self,
        peer: &NodeId,
        segments: &[VerifiedSegment],
        alive: &dyn Fn() -> Result<(), Refusal>,
    ) -> Vec<Result<PutOutcome, Refusal>> {
        let mut answers = Vec::with_capacity(segments.len());
        while let Some((first, more)) = segments.get(answers.len()..).and_then(<[_]>::split_first) {
            let continues = |segment: &&VerifiedSegment| {
                let origin = &segment.header().origin;
                origin.kind() == Kind::Audit
                    && !self.is_own_log(origin)
                    && self.store.holds_log(origin)
            };
            let together: Vec<&VerifiedSegment> = std::iter::once(first)
                .chain(more)
                .take_while(continues)
                .collect();
            if together.len() < 2 {
                let alone = || self.admit(peer, first).map_err(Refusal::from);
                answers.push(alive().and_then(|()| alone()));
                continue;
            }
            let judged: Vec<Result<(), Denied>> = together
                .iter()
                .map(|segment| {
                    // INV-08: what is held is not judged again.
                    match self.store.contains(&segment.id()) {
                        true => Ok(()),
                        false => self.check_audit(segment),
                    }
                })
                .collect();
            let good = together
                .iter()
                .zip(&judged)
                .filter(|(_, judged)| judged.is_ok());
            let good: Vec<&VerifiedSegment> = good.map(|(segment, _)| *segment).collect();
            // INV-09: judging takes its time, and the session may have been closed meanwhile.
            if let Err(refusal) = alive() {
                answers.extend(together.iter().map(|_| Err(refusal.clone())));
                continue;
            }
            let mut put = self.store.put_group(&good, Charge::Custody).into_iter();
            for (segment, judged) in together.into_iter().zip(judged) {
                let reference = segment.reference();
                let answer = judged.and_then(|()| match put.next() {
                    Some(put) => put.map_err(|e| self.audit_not_stored(&reference.origin, &e)),
                    None => Err(Denied::local("STORE", "the store gave no answer")),
                });
                self.note_admitted(peer, &reference, &answer);
                answers.push(answer.map_err(Refusal::from));
            }
        }
        answers
    }

    fn note_admitted(
        &self,
        peer: &NodeId,
        reference: &SegmentRef,
        admitted: &Result<PutOutcome, Denied>,
    ) {
        let fields = |extra: Value| {
            let mut fields = json!({
                "segment": reference.id, "kind": reference.kind, "origin": reference.origin,
                "sequence": reference.sequence, "peer": peer,
            });
            if let (Some(fields), Value::Object(extra)) = (fields.as_object_mut(), extra) {
                fields.extend(extra);
            }
            fields
        };
        match admitted {
            Ok(PutOutcome::Stored) => {
                self.journal
                    .note(self.clock.unix_ms(), "segment_stored", fields(json!({})));
            }
            Ok(PutOutcome::AlreadyHeld) => {
                self.journal
                    .note(self.clock.unix_ms(), "segment_again", fields(json!({})));
            }
            Err(denied) => self.journal.note(
                self.clock.unix_ms(),
                "segment_refused",
                fields(json!({"code": denied.code, "message": denied.message})),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str) -> Origin {
        Origin::parse(&format!("audit/n1/{name}")).unwrap()
    }

    fn root(text: &str) -> Sha256Hash {
        Sha256Hash::of(text.as_bytes())
    }

    fn held(name: &str, size: u64, content: &str) -> HeldHead {
        HeldHead {
            origin: log(name),
            size,
            root: root(content),
        }
    }

    fn names(name: &str, size: u64, content: &str) -> NamedHead {
        NamedHead {
            origin: log(name),
            size,
            root: root(content),
        }
    }

    const FIRST: &str = "0123456789abcdef/1";
    const SECOND: &str = "0123456789abcdef/2";
    const THIRD: &str = "0123456789abcdef/3";
    const OTHER_KEY: &str = "fedcba9876543210/1";

    #[test]
    fn ruling_7_a_new_log_names_the_head_that_is_held_by_its_hash() {
        let held = [held(FIRST, 9, "nine")];
        let fault = |named: &[NamedHead]| lineage_fault(&log(SECOND), named, &held);
        // The controls: that head, and one beyond it.
        assert_eq!(fault(&[names(FIRST, 9, "nine")]), None);
        assert_eq!(fault(&[names(FIRST, 12, "twelve")]), None);
        for (named, why) in [
            (vec![], "does not name"),
            (vec![names(OTHER_KEY, 9, "nine")], "does not name"),
            (vec![names(FIRST, 5, "five")], "at 5 records, and 9"),
            (vec![names(FIRST, 9, "another nine")], "another root"),
        ] {
            let found = fault(&named).unwrap();
            assert!(found.contains(why), "{found}");
        }
    }

    #[test]
    fn ruling_7_it_names_the_newest_of_the_logs_that_are_held() {
        let both = [held(FIRST, 9, "nine"), held(SECOND, 4, "four")];
        let fault = |named: &[NamedHead], held: &[HeldHead]| {
            lineage_fault(&log(THIRD), named, held).is_some()
        };
        assert!(fault(&[names(FIRST, 9, "nine")], &both));
        assert!(!fault(&[names(SECOND, 4, "four")], &both));
        // A peer that never had the second finds the one that it knows.
        let named = [names(SECOND, 4, "four"), names(FIRST, 9, "nine")];
        assert!(!fault(&named, &both));
        assert!(!fault(&named, &both[..1]));
        // Of a node that is not known there is nothing to name.
        assert!(!fault(&[], &[]));
        // Of the same key if there is one: the node cannot tell of a key that it never had.
        let lost = [held(FIRST, 9, "nine"), held(OTHER_KEY, 2, "two")];
        let again = log("fedcba9876543210/2");
        assert_eq!(
            lineage_fault(&again, &[names(OTHER_KEY, 2, "two")], &lost),
            None
        );
        assert!(lineage_fault(&again, &[names(FIRST, 9, "nine")], &lost).is_some());
    }

    #[test]
    fn the_next_incarnation_waits_for_what_was_listed_but_not_for_ever() {
        let mut ahead = OwnAhead::default();
        assert!(ahead.note_listed(&log(FIRST), 4));
        assert!(!ahead.note_listed(&log(FIRST), 3), "the highest counts");
        let at = OWN_SETTLES + Duration::from_secs(1);
        assert!(!ahead.is_settled(at, |_| None));
        assert!(!ahead.is_settled(at, |_| Some(3)));
        assert!(ahead.is_settled(at, |_| Some(4)));
        assert!(ahead.is_settled(OWN_PATIENCE, |_| Some(3)));
        // Each that comes begins the wait again.
        ahead.last = OWN_PATIENCE;
        assert!(!ahead.is_settled(OWN_PATIENCE, |_| Some(4)));
        // INV-07: a peer that claims logs without end fills nothing.
        for number in 0..200 {
            ahead.note_listed(&log(&format!("0123456789abcdef/{number}")), 1);
        }
        assert_eq!(ahead.listed.len(), OWN_CLAIMS_MAX);
    }
}
