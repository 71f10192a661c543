//! Signed documents about trust and freshness: how they come in, and what they change. And releases that
//! an operator asks the node to verify.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{MutexGuard, PoisonError},
};

use serde_json::{Value, json};
use tidelock_gateway::OperatorError;
use tidelock_policy::{
    Extended, FRESHNESS_ORIGIN, Freshness, NewestTrust, SignedDocument, SlotStorage,
    StatementError, TRUST_NEWEST_SLOT, TRUST_ORIGIN, TRUST_SLOT, TrustChain, TrustFile, Version,
    is_signed_document, verify_release,
};
use tidelock_segments::{
    Charge, DomainId, Kind, NodeId, Origin, SegmentHeader, SegmentId, SegmentRef, Store,
    VerifiedSegment, seal_unsigned, verify_segment,
};

use super::{admit::Denied, doors::bad, node::Node, policy::RootSlots};
use crate::worker::For;

/// Segments of one version of the trust document that are remembered as looked at (INV-07): one for each
/// set of signatures under it, 2 KiB.
const TRUST_SEEN_MAX: usize = 64;

/// Whether a policy segment of this origin carries a signed document and no bundle.
pub(super) fn is_statement(origin: &Origin) -> bool {
    origin
        .policy_name()
        .is_some_and(|name| [TRUST_ORIGIN, FRESHNESS_ORIGIN].contains(&name))
}

/// The chain of trust documents: what was kept, held against the configured file, and what the segment
/// store has beyond it.
pub(super) fn open_chain(
    storage: &dyn SlotStorage,
    store: &Store,
    configured: TrustFile,
) -> Result<TrustChain, String> {
    let kept = match storage.read(TRUST_SLOT) {
        Ok(None) => None,
        Ok(Some(bytes)) => Some(TrustChain::decode(&bytes)),
        Err(error) => Some(Err(StatementError::Damaged(error.to_string()))),
    };
    let (mut chain, damage) = match kept {
        None => (TrustChain::new(configured).map_err(text)?, None),
        Some(Ok(chain)) => (chain.reconcile(configured).map_err(text)?, None),
        Some(Err(error)) => (TrustChain::new(configured).map_err(text)?, Some(error)),
    };
    let mut held: Vec<SegmentRef> = store.list(Some(Kind::Policy));
    held.retain(|segment| segment.origin.policy_name() == Some(TRUST_ORIGIN));
    held.sort_by_key(|segment| segment.sequence);
    for segment in held {
        let signed = store
            .get(&segment.id)
            .ok()
            .and_then(|segment| SignedDocument::decode(segment.body()).ok());
        // What does not follow is of a chain that this node does not follow.
        if let Some(Err(error)) = signed.map(|signed| chain.extend(signed)) {
            tracing::warn!(%error, id = %segment.id, "a stored trust document does not follow");
        }
    }
    if let Some(error) = damage {
        if chain.links().next().is_none() {
            // To go back to the configured file would trust keys again that were replaced.
            return Err(format!(
                "{error}, and the store holds no trust document: if no key was ever replaced by one, \
                 remove policy/{TRUST_SLOT} below the root"
            ));
        }
        tracing::error!(%error, "the trust chain was restored from the segment store");
    }
    keep_chain(storage, &chain)?;
    Ok(chain)
}

fn text(error: StatementError) -> String {
    error.to_string()
}

/// Writes the chain, if there is one: a configured file by itself is kept nowhere else.
pub(super) fn keep_chain(storage: &dyn SlotStorage, chain: &TrustChain) -> Result<(), String> {
    let held = storage.read(TRUST_SLOT).ok().flatten();
    if chain.links().next().is_none() && held.is_none() {
        return Ok(());
    }
    let bytes = chain.encode().map_err(text)?;
    let write = |slot: &str, bytes: &[u8]| {
        if storage
            .read(slot)
            .is_ok_and(|held| held.as_deref() == Some(bytes))
        {
            return Ok(());
        }
        storage
            .write(slot, bytes)
            .map_err(|error| format!("cannot write slot `{slot}`: {error}"))
    };
    write(TRUST_SLOT, &bytes)?;
    // After the chain: one that is behind it costs nothing, one that is ahead would shut the node.
    if missing_trust(storage, chain).is_none() {
        write(TRUST_NEWEST_SLOT, &chain.newest().encode().map_err(text)?)?;
    }
    Ok(())
}

/// INV-16: why a chain must not be trusted, because another has come further on this node. It may be
/// extended all the same, and is trusted when it has caught up.
pub(super) fn missing_trust(storage: &dyn SlotStorage, chain: &TrustChain) -> Option<String> {
    let bytes = storage.read(TRUST_NEWEST_SLOT).ok().flatten()?;
    let newest = match NewestTrust::decode(&bytes) {
        Ok(newest) => newest,
        Err(error) => {
            // What the chain itself says is left; the next one that is written mends it.
            tracing::error!(%error, "which trust document was the newest cannot be read");
            return None;
        }
    };
    match chain.lacks(&newest) {
        Ok(false) => None,
        Ok(true) => Some(format!(
            "trust document {} of version {} held here and is lost, what is left ends at version {}: meet \
             a peer or install it again (tidelock trust install)",
            newest.id,
            newest.version,
            chain.current().version()
        )),
        Err(error) => Some(error.to_string()),
    }
}

/// What a signed document is about; its own type says it.
enum Statement {
    Trust(u64),
    Freshness(u64),
}

impl Statement {
    fn read(signed: &SignedDocument) -> Result<Self, Denied> {
        if let Ok(trust) = TrustFile::from_document(&signed.document) {
            return Ok(Self::Trust(trust.version()));
        }
        Freshness::read(&signed.document)
            .map(|freshness| Self::Freshness(freshness.issued_unix_ms))
            .map_err(judge)
    }

    /// The segment that carries it: the same bytes on every node (ruling 5).
    fn segment(&self, domain: &DomainId, body: &[u8]) -> Result<VerifiedSegment, Denied> {
        let (name, sequence) = match self {
            Self::Trust(version) => (TRUST_ORIGIN, *version),
            Self::Freshness(issued_unix_ms) => (FRESHNESS_ORIGIN, *issued_unix_ms),
        };
        let format = |error: &dyn std::fmt::Display| Denied::bringer("STATEMENT_FORMAT", error);
        let header = SegmentHeader {
            kind: Kind::Policy,
            domain: domain.clone(),
            origin: Origin::policy(name).map_err(|e| format(&e))?,
            sequence,
            prev: None,
            created_unix_ms: 0,
        };
        let bytes = seal_unsigned(&header, body).map_err(|e| format(&e))?;
        verify_segment(bytes, None, domain).map_err(|e| format(&e))
    }
}

/// As for bundles: who passes on what is not in its form is to blame, else nobody is.
fn judge(error: StatementError) -> Denied {
    match error.code() {
        code @ "STATEMENT_FORMAT" => Denied::bringer(code, error),
        code => Denied::local(code, error),
    }
}

impl Node {
    /// What a signed document would change; nothing is changed.
    fn plan_statement(&self, body: &[u8]) -> Result<(SignedDocument, Statement, Value), Denied> {
        let signed = SignedDocument::decode(body).map_err(judge)?;
        let statement = Statement::read(&signed)?;
        let plan = match &statement {
            Statement::Trust(version) => {
                let mut chain = self.trust_chain()?;
                let outcome = chain.extend(signed.clone()).map_err(judge)?;
                let still = self.slots.current().map(|policy| {
                    let package = policy.bundle().package().clone();
                    self.load_package(package, chain.current(), For::Slots)
                        .is_ok()
                });
                json!({
                    "trust_version": version,
                    "document": chain.current_id(),
                    "known": outcome == Extended::Known,
                    "deciding_bundle_stays_trusted": still,
                })
            }
            Statement::Freshness(_) => {
                let trust = self.statement_trust()?;
                let freshness = Freshness::verify(&signed, &trust).map_err(judge)?;
                let confirms = match self.slots.check_confirms(&freshness) {
                    // Statements may overtake their bundle: it is kept until that decides.
                    Err(StatementError::Other { .. }) if self.may_come(&freshness) => false,
                    other => other.map(|()| true).map_err(judge)?,
                };
                json!({
                    "bundle": freshness.bundle,
                    "epoch": freshness.epoch,
                    "issued_unix_ms": freshness.issued_unix_ms,
                    "confirms_the_deciding_bundle": confirms,
                })
            }
        };
        Ok((signed, statement, plan))
    }

    /// Whether the bundle that a statement names may still begin to decide here.
    fn may_come(&self, freshness: &Freshness) -> bool {
        self.slots.floor().is_none_or(|floor| {
            freshness.epoch > floor.epoch
                || (freshness.epoch == floor.epoch && freshness.content_id == floor.content_id)
        })
    }

    fn statement_trust(&self) -> Result<std::sync::Arc<TrustFile>, Denied> {
        self.policy_trust.load_full().ok_or_else(no_trust)
    }

    fn trust_chain(&self) -> Result<TrustChain, Denied> {
        self.trust_chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(no_trust)
    }

    /// Segments of the trust document that holds which were looked at, whatever came of it.
    fn seen_trust(&self) -> MutexGuard<'_, VecDeque<SegmentId>> {
        self.trust_seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that a segment is the one envelope of its document.
    pub(super) fn check_statement(&self, segment: &VerifiedSegment) -> Result<(), Denied> {
        let (_, statement, _) = self.plan_statement(segment.body())?;
        self.check_envelope(&statement, segment)
    }

    fn check_envelope(
        &self,
        statement: &Statement,
        segment: &VerifiedSegment,
    ) -> Result<(), Denied> {
        let domain = self.config.load().node.domain.clone();
        if statement.segment(&domain, segment.body())?.id() != segment.id() {
            return Err(Denied::bringer(
                "STATEMENT_FORMAT",
                "the segment does not fit its document",
            ));
        }
        Ok(())
    }

    /// Lets a signed document of a peer or a medium in.
    pub(super) fn admit_statement(
        &self,
        peer: &NodeId,
        segment: &VerifiedSegment,
    ) -> Result<(), Denied> {
        if segment.header().origin.policy_name() == Some(TRUST_ORIGIN) {
            let mut seen = self.seen_trust();
            // INV-07: who makes ever new envelopes of one document has them looked at again.
            if seen.len() >= TRUST_SEEN_MAX {
                seen.pop_front();
            }
            seen.push_back(segment.id());
        }
        self.check_statement(segment)
            .and_then(|()| self.install_statement(segment.body()).map(drop))
            .inspect_err(|denied| {
                self.rejected(
                    "statement_rejected",
                    peer,
                    denied,
                    json!({"segment": segment.id(), "code": denied.code, "message": denied.message}),
                );
            })
    }

    /// Verifies a signed document, keeps it and acts on it; by local trust, clock and disk only.
    fn install_statement(&self, body: &[u8]) -> Result<Value, Denied> {
        let _turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (signed, statement, plan) = self.plan_statement(body)?;
        let domain = self.config.load().node.domain.clone();
        let segment = statement.segment(&domain, body)?;
        match statement {
            Statement::Trust(_) => self.take_trust(signed, &plan)?,
            Statement::Freshness(_) => self.take_freshness(&signed)?,
        }
        // Other signatures under a document that is held make no new one (ruling 5).
        if self.holds_policy(&segment.reference()) {
            return Ok(plan);
        }
        // In force already; a store that is full or shut does not undo it (ruling 10).
        match self.store.put(&segment, Charge::Reserve) {
            Ok(_) => {
                self.drop_superseded_freshness(&segment.reference());
                self.offered(segment.reference());
            }
            Err(error) => self.event("statement_not_stored", json!({"why": error.to_string()})),
        }
        Ok(plan)
    }

    fn take_trust(&self, signed: SignedDocument, plan: &Value) -> Result<(), Denied> {
        let mut held = self
            .trust_chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let chain = held.as_mut().ok_or_else(no_trust)?;
        let mut next = chain.clone();
        if next.extend(signed).map_err(judge)? == Extended::Known {
            return Ok(());
        }
        // INV-16: durable before it holds, so that no restart trusts the old keys again.
        keep_chain(&RootSlots(self.root.clone()), &next)
            .map_err(|why| Denied::local("STATEMENT_STORAGE", why))?;
        *chain = next;
        let trust = chain.current().clone();
        let missing = missing_trust(&RootSlots(self.root.clone()), chain);
        drop(held);
        self.event("trust_rotated", plan.clone());
        if let Some(why) = missing {
            // On its way to where it was: nothing is trusted before it is there.
            self.event("policy_trust_unusable", json!({"why": why}));
            return Ok(());
        }
        self.slot_faults(&self.slots.reload_by(&trust, &|package| {
            self.load_package(package, &trust, For::Slots)
        }));
        if let Some(created_unix_ms) = trust.created_unix_ms() {
            self.clock.raise_by_signed(created_unix_ms);
        }
        self.policy_trust.store(Some(std::sync::Arc::new(trust)));
        self.look_for_policy();
        self.waiting.clear();
        Ok(())
    }

    /// Asks the peers for the bundle that ought to decide where it does not: its signatures may be those of
    /// keys that were replaced, and a peer may have it under others by now.
    pub(super) fn look_for_policy(&self) {
        if self.slots.wanted().is_some()
            && let Some(mesh) = self.mesh.get()
        {
            mesh.refresh();
        }
    }

    fn take_freshness(&self, signed: &SignedDocument) -> Result<(), Denied> {
        let trust = self.statement_trust()?;
        let before = self.slots.freshness();
        let freshness = match self.slots.confirm(signed, &trust) {
            Ok(freshness) => freshness,
            Err(StatementError::Other { .. }) => return Ok(()),
            Err(error) => return Err(judge(error)),
        };
        self.clock.raise_by_signed(freshness.issued_unix_ms);
        if before.as_ref() != Some(&freshness) {
            self.event(
                "policy_confirmed",
                json!({
                    "bundle": freshness.bundle,
                    "epoch": freshness.epoch,
                    "issued_unix_ms": freshness.issued_unix_ms,
                }),
            );
        }
        Ok(())
    }

    /// A bundle has begun to decide: what was said of it before it came counts now.
    pub(super) fn confirm_from_store(&self) {
        for held in self.store.list(Some(Kind::Policy)) {
            if held.origin.policy_name() != Some(FRESHNESS_ORIGIN) {
                continue;
            }
            let taken = self
                .store
                .get(&held.id)
                .map_err(|e| e.to_string())
                .and_then(|segment| SignedDocument::decode(segment.body()).map_err(text))
                .and_then(|signed| self.take_freshness(&signed).map_err(|e| e.to_string()));
            if let Err(why) = taken {
                tracing::debug!(why, id = %held.id, "a stored statement confirms nothing");
            }
        }
    }

    /// Only the newest statement is of use to anybody.
    fn drop_superseded_freshness(&self, newest: &SegmentRef) {
        if newest.origin.policy_name() != Some(FRESHNESS_ORIGIN) {
            return;
        }
        for old in self.store.list(Some(Kind::Policy)) {
            if old.origin == newest.origin
                && old.sequence < newest.sequence
                && let Err(error) = self.store.remove(&old.id)
            {
                tracing::warn!(%error, id = %old.id, "superseded freshness statement stays");
            }
        }
    }

    /// Whether a signed document of this origin and number is of use here.
    pub(super) fn wants_statement(&self, reference: &SegmentRef) -> bool {
        if reference.origin.policy_name() == Some(TRUST_ORIGIN) {
            let Ok(chain) = self.trust_chain() else {
                return false;
            };
            let version = chain.current().version();
            // Of the version that holds too: only who looks at what others hold of it notices a fork of it.
            return reference.sequence > version
                || (reference.sequence == version && !self.seen_trust().contains(&reference.id));
        }
        self.slots
            .current()
            .is_none_or(|policy| reference.sequence > policy.confirmed_unix_ms())
    }

    /// Holds a newly configured trust file against the chain.
    pub(super) fn chain_with(&self, configured: TrustFile) -> Result<TrustChain, String> {
        let held = self
            .trust_chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match held {
            Some(chain) => chain.reconcile(configured).map_err(text),
            None => open_chain(&RootSlots(self.root.clone()), &self.store, configured),
        }
    }

    pub(super) fn operate_statement(
        &self,
        body: &[u8],
        apply: bool,
    ) -> Result<Value, OperatorError> {
        let planned = self.plan_statement(body).map(|(_, _, plan)| plan);
        let done = match (planned, apply) {
            (Ok(plan), false) => return Ok(plan),
            (Ok(_), true) => self.install_statement(body),
            (Err(denied), _) => Err(denied),
        };
        done.map_err(|denied| {
            if apply {
                self.event(
                    "statement_rejected",
                    json!({"code": denied.code, "message": denied.message, "by": "operator"}),
                );
            }
            super::doors::refused(&denied)
        })
    }

    pub(super) fn trust_json(&self) -> Value {
        let Ok(chain) = self.trust_chain() else {
            return Value::Null;
        };
        let trust = chain.current();
        let thresholds: serde_json::Map<String, Value> = tidelock_policy::Role::ALL
            .into_iter()
            .filter_map(|role| Some((role.to_string(), json!(trust.threshold_of(role)?))))
            .collect();
        json!({
            "version": trust.version(),
            "document": chain.current_id(),
            "previous": trust.previous(),
            "rotations": chain.links().count(),
            "thresholds": thresholds,
            "activation": trust.activation(),
            "keys": trust.keys(),
        })
    }

    /// Shows the trust that holds, as a configured file would say it.
    pub(super) fn operate_trust_show(&self) -> Result<Value, OperatorError> {
        let mut shown = self.trust_json();
        let chain = self
            .trust_chain()
            .map_err(|denied| super::doors::refused(&denied))?;
        let toml = chain
            .current()
            .to_toml()
            .map_err(|error| bad(error.to_string()))?;
        if let Some(shown) = shown.as_object_mut() {
            shown.insert("toml".to_owned(), json!(toml));
        }
        Ok(shown)
    }

    /// Verifies a release on this machine's disk by the trust that holds here. A rejection is a lifecycle
    /// event, with its step and its reason.
    pub(super) fn operate_release(&self, body: &Value) -> Result<Value, OperatorError> {
        let word = |key: &str| body.get(key).and_then(Value::as_str);
        let layout: PathBuf = word("layout")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .ok_or_else(|| bad("`layout` is required, an absolute path"))?;
        let parse = |text: &str| Version::parse(text).map_err(|e| bad(format!("{text}: {e}")));
        let installed = parse(env!("CARGO_PKG_VERSION"))?;
        let at_least = match word("at_least") {
            Some(text) => parse(text)?.max(installed),
            None => installed,
        };
        let trust = self
            .statement_trust()
            .map_err(|denied| super::doors::refused(&denied))?;
        let verified = verify_release(Path::new(&layout), &trust, &[], &at_least)
            .and_then(|verified| verified.of(word("name")));
        match verified {
            Ok(verified) => {
                let facts = serde_json::to_value(&verified).unwrap_or_default();
                self.event(
                    "release_verified",
                    json!({
                        "digest": verified.digest, "version": verified.version,
                        "fingerprint": verified.fingerprint, "signers": verified.signers,
                    }),
                );
                Ok(facts)
            }
            Err(error) => {
                self.event(
                    "release_rejected",
                    json!({
                        "layout": layout, "step": error.step(), "code": error.code(),
                        "message": error.to_string(),
                    }),
                );
                Err(OperatorError {
                    status: 422,
                    code: error.code().to_owned(),
                    message: format!("step {}: {error}", error.step()),
                })
            }
        }
    }
}

pub(super) fn no_trust() -> Denied {
    Denied::local(
        "NO_TRUST",
        "no usable trust file; see policy.trust in the config",
    )
}

/// Whether a policy segment's body is a signed document and no package.
pub(super) fn carries_statement(segment: &VerifiedSegment) -> bool {
    is_signed_document(segment.body())
}
