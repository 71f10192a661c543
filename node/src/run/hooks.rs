//! What the mesh asks of the node, and what it tells it.

use std::{
    collections::BTreeMap,
    net::SocketAddrV4,
    ops::Range,
    sync::{Arc, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tidelock_policy::Posture;
use tidelock_quota::MonotonicClock;
use tidelock_segments::{
    Charge, CustodyReceipt, Endorsement, Head, Kind, LogError, NodeId, Origin, Partial,
    PartialError, PutOutcome, SegmentId, SegmentRef, StoreError, VerifiedSegment,
};
use tidelock_transport::{
    beacon::BeaconKey,
    dial::{DialConfig, PeerConfig},
    session::{Fault, KindSet, PeerHello, PeerLimits, PeerPosture, Refusal},
    shell::{
        Admitted, BeaconConfig, HelloFacts, Mesh, MeshConfig, MeshEvent, MeshHooks, PeerQuota,
        PeerStatus, QuicConfig, QuotaConfig,
    },
};

use super::{admit::Denied, node::Node, quotas::common_quota, trust::is_statement};
use crate::{
    cli::Failure,
    config::{BeaconSection, Config, MeshSection},
};

/// Why a receipt for a segment that is not held, any more or at all, is not kept.
pub(super) const RECEIPT_OF_NOTHING: &str = "RECEIPT_OF_NOTHING";

/// The node, as the mesh sees it.
pub(super) struct Hooks(pub(super) Arc<Node>);

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self {
            code: denied.code,
            message: denied.message,
            fault: if denied.bringer {
                Fault::Peer
            } else {
                Fault::Local
            },
        }
    }
}

fn admitted(put: PutOutcome) -> Admitted {
    match put {
        PutOutcome::Stored => Admitted::Stored,
        PutOutcome::AlreadyHeld => Admitted::AlreadyHeld,
    }
}

impl MeshHooks for Hooks {
    fn heads(&self) -> Vec<Head> {
        self.0.store.heads()
    }

    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        self.0.store.refs(origin, from, to, max)
    }

    fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        self.0.store.reference(id)
    }

    fn read(&self, id: &SegmentId) -> Option<Vec<u8>> {
        let segment = self.0.readable(id, self.0.store.get(id))?;
        Some(segment.into_bytes())
    }

    fn wants_origin(&self, origin: &Origin) -> bool {
        match origin.kind() {
            Kind::Revocation | Kind::Policy => true,
            Kind::Audit => {
                let foreign = !self.0.is_own(origin);
                (foreign || self.0.is_own_log(origin)) && !self.0.is_forked(origin)
            }
            Kind::Witness => false,
        }
    }

    fn settled_below(&self, origin: &Origin) -> u64 {
        self.0.log.evicted_below(origin)
    }

    fn open_numbers(&self, origin: &Origin) -> Vec<u64> {
        self.0.scheduled.epochs(origin)
    }

    fn wants(&self, reference: &SegmentRef) -> bool {
        let now = self.0.clock.monotonic();
        !self.0.waiting.holds(&reference.id, now) && self.0.wants(reference)
    }

    fn admit(&self, peer: &NodeId, segment: VerifiedSegment) -> Result<Admitted, Refusal> {
        self.0
            .admit(peer, &segment)
            .map(admitted)
            .map_err(Refusal::from)
    }

    fn admit_all(
        &self,
        peer: &NodeId,
        segments: Vec<VerifiedSegment>,
        alive: &dyn Fn() -> Result<(), Refusal>,
    ) -> Vec<Result<Admitted, Refusal>> {
        let answers = self.0.admit_all(peer, &segments, alive);
        answers
            .into_iter()
            .map(|answer| answer.map(admitted))
            .collect()
    }

    fn read_range(&self, id: &SegmentId, range: &Range<u64>) -> Option<Vec<u8>> {
        self.0
            .readable(id, self.0.store.read_range_encoded(id, range))
    }

    fn partial(&self, reference: &SegmentRef) -> Result<Partial, PartialError> {
        self.0.store.partial(reference, Charge::Custody)
    }

    fn admit_partial(
        &self,
        peer: &NodeId,
        partial: &Partial,
    ) -> Result<(SegmentRef, Admitted), Refusal> {
        let reference = partial.reference().clone();
        let put = self.0.admit_partial(peer, partial)?;
        Ok((reference, admitted(put)))
    }

    fn receipt_for(&self, id: &SegmentId) -> Option<Vec<u8>> {
        self.0
            .log
            .issue_receipt(id)
            .map_err(|e| e.to_string())
            .and_then(|receipt| receipt.encode().map_err(|e| e.to_string()))
            .map_err(|why| tracing::warn!(%id, why, "no custody receipt is given"))
            .ok()
    }

    fn receipt_wants(&self, peer: &NodeId) -> Vec<SegmentId> {
        let config = self.0.config.load();
        // One more than are needed: a receipt may stop counting when its custodian is revoked.
        let wanted = usize::try_from(config.audit.custody)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        self.0
            .store
            .lacking_custody(
                &config.node.id,
                wanted,
                Some(peer),
                tidelock_segments::limits::MAX_REFS,
            )
            .into_iter()
            .map(|s| s.id)
            .collect()
    }

    fn take_receipt(&self, peer: &NodeId, receipt: &[u8]) -> Result<(), Refusal> {
        Ok(self.0.take_receipt(peer, receipt)?)
    }

    fn hello_local(&self) -> HelloFacts {
        let usage = self.0.root.ledger().usage();
        HelloFacts {
            limits: PeerLimits {
                kinds: KindSet::of(&[Kind::Revocation, Kind::Policy, Kind::Audit]),
                max_segment_bytes: tidelock_segments::limits::MAX_SEGMENT_BYTES,
                custody_free_bytes: usage.custody_max_bytes.saturating_sub(usage.custody_bytes),
                max_in_flight: tidelock_transport::limits::MAX_IN_FLIGHT,
            },
            posture: match self.0.interceptor.posture() {
                Posture::Normal => PeerPosture::Normal,
                Posture::Stale => PeerPosture::Stale,
                Posture::Restricted => PeerPosture::Restricted,
                Posture::Closed => PeerPosture::Closed,
            },
            endorsement: self.0.log.endorsement().encode().ok(),
        }
    }

    fn authenticated(&self, hello: &PeerHello) {
        self.0.learn_endorsement(hello);
    }

    fn event(&self, event: MeshEvent) {
        self.0.mesh_event(event);
    }
}

impl Node {
    /// Whether it is a log of this very node.
    pub(super) fn is_own(&self, origin: &Origin) -> bool {
        origin.audit_node() == Some(self.config.load().node.id.as_str())
    }

    /// What was read for a peer. That it is held no longer is no fault, and damage is told where it is
    /// found ([`Node::note_damage`]); what is left is the disk.
    fn readable<T>(&self, id: &SegmentId, read: Result<T, StoreError>) -> Option<T> {
        match read {
            Ok(read) => Some(read),
            Err(StoreError::NotHeld(_) | StoreError::Damaged { .. }) => None,
            Err(error) => {
                self.event(
                    "segment_unreadable",
                    json!({"segment": id, "why": error.to_string()}),
                );
                None
            }
        }
    }

    pub(super) fn wants(&self, reference: &SegmentRef) -> bool {
        match reference.kind {
            Kind::Revocation => self
                .revocation
                .state()
                .crls()
                .iter()
                .filter(|crl| crl.origin() == reference.origin)
                .all(|crl| reference.sequence >= crl.number()),
            Kind::Policy if is_statement(&reference.origin) => self.wants_statement(reference),
            // The floor's own epoch is of use only while it is not held whole, and was not set aside.
            Kind::Policy => self.slots.floor().is_none_or(|floor| {
                let held = || {
                    self.store
                        .find(&reference.origin, reference.sequence)
                        .is_some()
                };
                reference.sequence > floor.epoch
                    || (reference.sequence == floor.epoch
                        && self.slots.aside().is_none()
                        && (self.slots.wanted().is_some() || !held()))
            }),
            Kind::Audit if self.is_own_log(&reference.origin) => self.wants_own(reference),
            Kind::Audit => {
                let usage = self.root.ledger().usage();
                let unused = self.store.unused_partial_bytes(Charge::Custody);
                let kept_bytes = usage.custody_bytes.saturating_sub(unused);
                // The room of one that is half here is taken already.
                kept_bytes.saturating_add(reference.size_bytes) <= usage.custody_max_bytes
                    || self
                        .store
                        .partials()
                        .iter()
                        .any(|partial| partial.reference.id == reference.id)
            }
            Kind::Witness => false,
        }
    }

    fn take_receipt(&self, peer: &NodeId, bytes: &[u8]) -> Result<(), Denied> {
        let receipt =
            CustodyReceipt::decode(bytes).map_err(|e| Denied::bringer("RECEIPT_FORMAT", e))?;
        if receipt.custodian != *peer {
            return Err(Denied::bringer(
                "RECEIPT_CUSTODIAN",
                "the receipt is not the peer's own",
            ));
        }
        self.check_receipt(&receipt)?;
        match self.keep_receipt(&receipt) {
            // Evicted on the receipts of others: one more is no fault and of no use.
            Err(denied) if denied.code == RECEIPT_OF_NOTHING => Ok(()),
            other => other,
        }
    }

    /// Judges who gave a receipt; whether it fits a segment is judged when it is kept.
    pub(super) fn check_receipt(&self, receipt: &CustodyReceipt) -> Result<(), Denied> {
        let custodian = self.check_endorsement(&receipt.endorsement, receipt.issued_unix_ms)?;
        if custodian != receipt.custodian {
            return Err(Denied::bringer(
                "RECEIPT_CUSTODIAN",
                "the endorsement names another node",
            ));
        }
        Ok(())
    }

    /// Keeps a receipt that [`Node::check_receipt`] found good.
    pub(super) fn keep_receipt(&self, receipt: &CustodyReceipt) -> Result<(), Denied> {
        self.log.take_receipt(receipt).map_err(|error| match error {
            e @ LogError::Store(StoreError::NotHeld(_)) => Denied::local(RECEIPT_OF_NOTHING, e),
            e @ (LogError::Receipt(_)
            | LogError::Store(StoreError::Receipt(_) | StoreError::ReceiptMismatch(_))) => {
                Denied::bringer("RECEIPT_REFUSED", e)
            }
            e => Denied::local("RECEIPT_NOT_KEPT", e),
        })
    }

    /// Keeps the newest endorsement that a node has shown in an authenticated Hello (decision 0016).
    fn learn_endorsement(&self, hello: &PeerHello) {
        let Some(bytes) = &hello.endorsement else {
            return;
        };
        let Ok(endorsement) = Endorsement::decode(bytes) else {
            return;
        };
        // Judged by itself: an older one must not vouch for its own successor.
        let vouched = self.judge_endorsement(&endorsement, self.clock.unix_ms());
        if endorsement.node_id != hello.node_id || vouched.as_ref() != Ok(&hello.node_id) {
            return;
        }
        let mut known = self
            .endorsements
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // One log key a node: an older incarnation's audit carries its own endorsement.
        known.retain(|(node, _), _| *node != endorsement.node_id);
        if known.len() < tidelock_transport::limits::MAX_PEERS {
            known.insert(
                (endorsement.node_id.clone(), endorsement.log_key),
                endorsement,
            );
        }
    }

    fn mesh_event(&self, event: MeshEvent) {
        let now = self.clock.unix_ms();
        match event {
            MeshEvent::SessionUp { peer, address, outbound, .. } => self.journal.note(
                now,
                "session_established",
                json!({"peer": peer, "address": address, "outbound": outbound}),
            ),
            MeshEvent::Requested { peer, reference } => self.journal.note(
                now,
                "segment_requested",
                json!({
                    "peer": peer, "segment": reference.id, "kind": reference.kind,
                    "origin": reference.origin, "sequence": reference.sequence,
                }),
            ),
            MeshEvent::SessionDown { peer, address, code, reason, by_peer, established } => {
                let code = code.map_or("lost", |c| c.as_str());
                let fields = json!({
                    "peer": peer, "address": address, "reason": code, "detail": reason, "by_peer": by_peer,
                });
                if established && code == "revoked" && !by_peer {
                    self.event("session_closed", fields);
                } else if established {
                    self.journal.note(now, "session_closed", fields);
                } else {
                    self.journal.note(now, "session_failed", fields);
                }
            }
            MeshEvent::DialFailed { peer, address, reason } => {
                self.seen.dial_failed(&peer, now, &reason);
                self.journal.note(
                    now,
                    "dial_failed",
                    json!({"peer": peer, "address": address, "reason": reason}),
                );
            }
            MeshEvent::PeerRefused { peer, address, code, reason } => {
                let name = peer.as_ref().map_or("(unknown)", |p| p.as_str());
                self.count_refusal(name, code);
                self.journal.note(
                    now,
                    "peer_refused",
                    json!({"peer": peer, "address": address, "reason": code, "detail": reason}),
                );
            }
            MeshEvent::Refusals(counts) => {
                self.interceptor.record_event("connections_refused", &json!(counts));
            }
            // Noted where the segment was admitted.
            MeshEvent::Stored { .. } => {}
            MeshEvent::TransferFailed { peer, reference, refusal } => {
                self.seen.segment_refused(&peer, &reference, &refusal, now);
                self.journal.note(
                    now,
                    "transfer_failed",
                    json!({"peer": peer, "segment": reference.id, "code": refusal.code, "message": refusal.message}),
                );
            }
            // A claim without proof: shown, and no record is spent on it.
            MeshEvent::ForkSuspected { peer, origin, sequence, ours, theirs } => self.journal.note(
                now,
                "audit_fork_suspected",
                json!({"peer": peer, "origin": origin, "sequence": sequence, "ours": ours, "theirs": theirs}),
            ),
            MeshEvent::ReceiptTaken { peer, id } => {
                self.journal.note(now, "receipt_taken", json!({"peer": peer, "segment": id}));
                self.log.reclaim();
            }
            MeshEvent::ReceiptRefused { peer, id, refusal } => self.journal.note(
                now,
                "receipt_refused",
                json!({"peer": peer, "segment": id, "code": refusal.code, "message": refusal.message}),
            ),
            MeshEvent::TransportClosed { reason } => {
                self.event("transport_closed", json!({"reason": reason}));
            }
            MeshEvent::Discovery { fault } => {
                self.journal.note(now, "discovery", json!({"fault": fault}));
            }
            MeshEvent::TransportOpened => self.event("transport_opened", json!({})),
            MeshEvent::EventsLost { count } => {
                self.event("mesh_events_lost", json!({"count": count}));
            }
        }
    }
}

/// One peer, as `status` and `peers` show it.
pub(super) fn peer_json(peer: &PeerStatus, configured: &MeshSection) -> Value {
    let state = if peer.connected {
        "connected"
    } else if peer.cooling_ms.is_some() {
        "cooling down"
    } else {
        "not connected"
    };
    let address = configured
        .peers
        .iter()
        .find(|p| p.id == peer.node_id)
        .and_then(|p| p.address)
        .or(peer.address);
    json!({
        "id": peer.node_id,
        "state": state,
        "address": address,
        "last_reason": peer.last_close.as_ref().map(|c| {
            c.code.map_or_else(|| c.reason.clone(), |code| format!("{code}: {}", c.reason))
        }),
        "detail": peer,
    })
}

/// Starts the mesh as soon as there is an identity to start it with.
pub(super) async fn ensure_mesh(node: &Arc<Node>) -> Result<(), Failure> {
    let Some(began_with) = start_mesh(node)? else {
        return Ok(());
    };
    let node = node.clone();
    tokio::task::spawn_blocking(move || node.catch_up_quotas(&began_with)).await?;
    Ok(())
}

/// The quotas that the mesh began with, if it was started here.
fn start_mesh(node: &Arc<Node>) -> Result<Option<BTreeMap<NodeId, PeerQuota>>, Failure> {
    let Some(tls) = node.tls.load_full() else {
        return Ok(None);
    };
    // Nothing is left half-done by whoever panicked here.
    let _turn = node
        .mesh_start
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if node.mesh.get().is_some() {
        return Ok(None);
    }
    let mut config = mesh_config(&node.config.load())?;
    let kept = node.quotas.kept();
    let now = node.clock.trusted();
    config.own_quotas = kept.own(&node.config.load().mesh);
    config.owed = kept.owed(now.unix_ms, now.suspect);
    let began_with = config.own_quotas.clone();
    let mesh = Mesh::start(
        config,
        tls,
        Arc::new(Hooks(node.clone())),
        MonotonicClock::default(),
    )?;
    // What the log seals reaches the peers at once.
    let sealed = mesh.clone();
    node.log
        .on_seal(Box::new(move |reference| sealed.notify_stored(&reference)));
    // Only this function sets it, one caller after the other.
    let _ = node.mesh.set(mesh);
    Ok(Some(began_with))
}

fn mesh_config(config: &Config) -> Result<MeshConfig, Failure> {
    let section = &config.mesh;
    let peers = section
        .peers
        .iter()
        .map(|p| PeerConfig {
            node_id: p.id.clone(),
            addresses: p.address.into_iter().collect(),
        })
        .collect();
    let common = common_quota(section);
    Ok(MeshConfig {
        beacon: beacon_config(&config.beacon)?,
        dial: DialConfig {
            base: Duration::from_millis(section.redial_base_ms),
            cap: Duration::from_millis(section.redial_cap_ms),
            ..DialConfig::default()
        },
        quic: QuicConfig {
            keep_alive: Duration::from_millis(section.keep_alive_ms),
            idle_timeout: Duration::from_millis(section.idle_timeout_ms),
            congestion: section.congestion,
            send_bytes_per_second: Some(section.send_bytes_per_second).filter(|cap| *cap > 0),
            ..QuicConfig::default()
        },
        congestion_of_peers: section
            .peers
            .iter()
            .filter_map(|p| Some((p.id.clone(), p.congestion?)))
            .collect(),
        quotas: QuotaConfig {
            frames: common.frames,
            bulk_in_kib: common.bulk_in_kib,
            out_kib: common.out_kib,
            daily_in_bytes: common.daily_in_bytes,
            ..QuotaConfig::default()
        },
        ..MeshConfig::new(section.listen, peers)
    })
}

/// Discovery as the config wants it; the key's file must be private.
pub(super) fn beacon_config(section: &BeaconSection) -> Result<Option<BeaconConfig>, Failure> {
    let (true, Some(path)) = (section.enabled, &section.key_file) else {
        return Ok(None);
    };
    let key = crate::sealing::key_bytes(path)
        .map_err(|error| Failure::cannot_run(format!("beacon.key_file: {error}")))?;
    Ok(Some(BeaconConfig {
        group: SocketAddrV4::new(section.group, section.port),
        interval: Duration::from_secs(section.interval_s),
        key: Arc::new(BeaconKey::new(&key)),
    }))
}
