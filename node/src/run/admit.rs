//! What may enter: bundles, CRLs and other nodes' audit, from the operator, a peer or the disk.
//!
//! Every way in ends here, so that a segment from a peer and a file from the operator pass the same
//! checks. What is refused leaves nothing behind but an event.

use std::{fs, sync::PoisonError};

use serde_json::{Value, json};
use tidelock_policy::{Activation, ActivationKind, BundleError, Package, VerifiedBundle};
use tidelock_segments::{
    Charge, CustodyReceipt, Endorsement, Kind, NodeId, Origin, Partial, PartialError, PutOutcome,
    SegmentRef, StoreError, VerifiedSegment, parse_body, verify_segment,
};
use tidelock_transport::{
    endorse::verify_endorsement,
    revocation::{CrlError, Imported, Outcome, VerifiedCrl, crl_segment, crls_in_file},
};

use super::{
    node::{ACCEPTED_LOGS_FILE, Node, identity_rules},
    policy::policy_segment,
};

/// What a newer endorsement of the same log key may stand in for.
const STANDS_IN_FOR: [&str; 3] = ["CERT_REVOKED", "KEY_REVOKED", "CERT_EXPIRED"];
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

/// What installing a bundle would do, or did.
pub(super) fn describe_activation(activation: &Activation) -> Value {
    json!({
        "name": activation.name,
        "epoch": activation.epoch,
        "hash": activation.content_id,
        "kind": activation.kind,
        "replaced_epoch": activation.replaced.as_ref().map(|(epoch, _)| *epoch),
    })
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

/// The log that the first record of a log says it continues.
fn previous_origin(segment: &VerifiedSegment) -> Option<String> {
    let header = segment.header();
    let body = parse_body(segment.body(), &header.domain, &header.origin).ok()?;
    // Never encrypted, so that every peer can read it.
    let record: Value = serde_json::from_slice(&body.record(0, None).ok()?).ok()?;
    Some(record.get("previous_origin")?.as_str()?.to_owned())
}

impl Node {
    // ---- policy

    /// Verifies a package as a node does before it activates.
    pub(super) fn verify_package(&self, package: &[u8]) -> Result<VerifiedBundle, Denied> {
        let trust = self.policy_trust.load_full().ok_or_else(|| {
            Denied::local(
                "NO_TRUST",
                "no usable trust file; see policy.trust in the config",
            )
        })?;
        // A peer that passes on what another authority signed, or what needs a newer node, has done
        // nothing wrong; one that passes on what is no bundle has.
        let judge = |error: BundleError| match error.code() {
            code @ ("BUNDLE_FORMAT" | "BUNDLE_DIGEST") => Denied::bringer(code, error),
            code => Denied::local(code, error),
        };
        let package = Package::decode(package).map_err(judge)?;
        VerifiedBundle::load(package, &trust, &self.context).map_err(judge)
    }

    /// Whether the floor would let this bundle activate (INV-16, ruling 13).
    pub(super) fn check_floor(&self, bundle: &VerifiedBundle) -> Result<(), Denied> {
        let Some(floor) = self.slots.floor() else {
            return Ok(());
        };
        let epoch = bundle.manifest().epoch;
        if epoch < floor.epoch {
            return Err(Denied::local(
                "BUNDLE_EPOCH",
                format!(
                    "epoch {epoch} is below the floor of {}; build a newer epoch",
                    floor.epoch
                ),
            ));
        }
        if epoch == floor.epoch && *bundle.content_id() != floor.content_id {
            return Err(Denied::local(
                "BUNDLE_CONFLICT",
                format!(
                    "epoch {epoch} is taken by {}; give the changed content a new epoch",
                    floor.content_id
                ),
            ));
        }
        Ok(())
    }

    /// Verifies, stores and activates a bundle; INV-06: by local trust, clock and disk only. The
    /// turn is taken before the trust is read, so that no bundle is judged by a trust file that a
    /// reload replaces meanwhile.
    pub(super) fn install_bundle(&self, package: &[u8]) -> Result<Activation, Denied> {
        let _turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let bundle = self.verify_package(package)?;
        self.check_floor(&bundle)?;
        let created_unix_ms = bundle.manifest().created_unix_ms;
        let segment = self.own_policy_segment(&bundle)?;
        // The same content under further signatures is no new policy (ruling 5), and no new segment.
        let held = self
            .slots
            .floor()
            .is_some_and(|f| f.content_id == *bundle.content_id())
            && self.holds_policy(&segment.reference());
        if !held {
            self.store
                .put(&segment, Charge::Reserve)
                .map_err(|e| Denied::local("STORE", e))?;
        }
        let unusable = self.slots.wanted().is_some();
        let activation = self
            .slots
            .activate(bundle)
            .map_err(|e| Denied::local(e.code(), &e))?;
        self.clock.raise_by_signed(created_unix_ms);
        if activation.kind != ActivationKind::Reinstalled || unusable {
            self.event("bundle_activated", describe_activation(&activation));
        }
        self.drop_superseded_policy(&activation);
        if !held {
            self.offered(segment.reference());
        }
        Ok(activation)
    }

    fn own_policy_segment(&self, bundle: &VerifiedBundle) -> Result<VerifiedSegment, Denied> {
        let domain = self.config.load().node.domain.clone();
        policy_segment(&domain, bundle)
            .map_err(|e| Denied::bringer("BUNDLE_FORMAT", e))
            .and_then(|bytes| {
                verify_segment(bytes, None, &domain)
                    .map_err(|e| Denied::bringer("BUNDLE_FORMAT", e))
            })
    }

    /// Whether a readable segment of this origin and epoch is held.
    fn holds_policy(&self, wanted: &SegmentRef) -> bool {
        self.store
            .find(&wanted.origin, wanted.sequence)
            .is_some_and(|held| self.store.get(&held.id).is_ok())
    }

    /// Policy segments below both slots serve nobody any more.
    fn drop_superseded_policy(&self, activation: &Activation) {
        let lkg_epoch = activation.replaced.as_ref().map(|(epoch, _)| *epoch);
        let keep_from = lkg_epoch.map_or(activation.epoch, |lkg| lkg.min(activation.epoch));
        for old in self.store.list(Some(Kind::Policy)) {
            if old.sequence < keep_from
                && let Err(error) = self.store.remove(&old.id)
            {
                tracing::warn!(%error, id = %old.id, "superseded policy segment stays");
            }
        }
    }

    /// Ruling 14: a damaged active bundle is first restored from the store at the same epoch.
    pub(super) fn restore_policy(&self) {
        let Some(floor) = self.slots.wanted() else {
            return;
        };
        let candidates: Vec<SegmentRef> = self
            .store
            .list(Some(Kind::Policy))
            .into_iter()
            .filter(|s| s.sequence == floor.epoch)
            .collect();
        for candidate in candidates {
            let restored = self
                .store
                .get(&candidate.id)
                .map_err(|e| Denied::local("STORE", e))
                .and_then(|segment| self.install_bundle(segment.body()));
            match restored {
                Ok(activation) => {
                    self.event("bundle_restored", describe_activation(&activation));
                    return;
                }
                Err(denied) => self.event(
                    "bundle_not_restored",
                    json!({"segment": candidate.id, "code": denied.code, "message": denied.message}),
                ),
            }
        }
    }

    /// What `admit_policy` judges before anything is installed.
    fn check_policy(&self, segment: &VerifiedSegment) -> Result<VerifiedBundle, Denied> {
        let bundle = self.verify_package(segment.body())?;
        if self.own_policy_segment(&bundle)?.id() != segment.id() {
            return Err(Denied::bringer(
                "BUNDLE_FORMAT",
                "the segment does not fit its bundle",
            ));
        }
        Ok(bundle)
    }

    fn admit_policy(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        let admitted = self
            .check_policy(segment)
            .and_then(|_| self.install_bundle(segment.body()));
        match admitted {
            Ok(_) => Ok(()),
            Err(denied) => {
                self.event(
                    "bundle_rejected",
                    json!({"segment": segment.id(), "code": denied.code, "message": denied.message}),
                );
                Err(denied)
            }
        }
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
    fn drop_receipts_of_the_revoked(&self) {
        let removed = self.store.remove_receipts_by(&|receipt: &CustodyReceipt| {
            self.check_endorsement(&receipt.endorsement, receipt.issued_unix_ms)
                .is_err_and(|denied| ["CERT_REVOKED", "KEY_REVOKED"].contains(&denied.code))
        });
        match removed {
            Ok(0) => {}
            Ok(count) => self.event("receipts_dropped", json!({"count": count})),
            Err(error) => tracing::error!(%error, "receipts of revoked custodians stay on disk"),
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
                if !STANDS_IN_FOR.contains(&first.code) {
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

    /// Ruling 7: another log key or incarnation of a known node is evidence, unless it names the log
    /// that is held here, or the operator has accepted it.
    fn has_lineage(&self, segment: &VerifiedSegment) -> bool {
        let origin = &segment.header().origin;
        let known: Vec<Origin> = self
            .store
            .heads()
            .into_iter()
            .map(|head| head.origin)
            .filter(|held| held.kind() == Kind::Audit && held.audit_node() == origin.audit_node())
            .collect();
        let named =
            || previous_origin(segment).is_some_and(|p| known.iter().any(|k| k.as_str() == p));
        known.is_empty() || known.contains(origin) || self.is_accepted(origin) || named()
    }

    fn no_lineage() -> Denied {
        Denied::local(
            "AUDIT_LINEAGE",
            "a known node began a new log without naming its last one; where that is right, \
             tidelock audit accept ORIGIN",
        )
    }

    fn check_lineage(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        if self.has_lineage(segment) {
            return Ok(());
        }
        self.note_fork(
            &segment.header().origin,
            "a known node began a new log that names none that is held here",
        );
        Err(Self::no_lineage())
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
                "a segment of this node's own log is only ever written here",
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

    fn admit_audit(&self, segment: &VerifiedSegment) -> Result<PutOutcome, Denied> {
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
            Kind::Policy => self
                .check_policy(segment)
                .and_then(|bundle| self.check_floor(&bundle)),
            Kind::Audit => self.check_audit(segment).and_then(|()| {
                if !self.has_lineage(segment) {
                    return Err(Self::no_lineage());
                }
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
            Kind::Policy => self.admit_policy(segment).map(|()| PutOutcome::Stored),
            Kind::Audit => self.admit_audit(segment),
            Kind::Witness => Err(Self::no_witness()),
        };
        self.note_admitted(peer, &reference, &admitted);
        admitted
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
