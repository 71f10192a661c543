//! What stands behind the gateway's doors: the interceptor for callers, the operator's operations.

use std::{
    fmt::Write as _,
    sync::{Arc, atomic::Ordering},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock_gateway::{BoxFuture, Decider, GiveUp, Operator, OperatorError};
use tidelock_interceptor::{
    Ask, Caller, Done, EarlierRecords, InvalidRequest, Mode, ReportDone, Search, SearchDone,
    limits::MAX_READ_BACK,
};
use tidelock_policy::{Posture, Role, WhenRestricted};
use tidelock_segments::{Ladder, NodeId, Origin, merkle};

use tidelock_transport::shell::{MeshHandle, PeerStatus};

use super::{
    activate::Order,
    admit::{Denied, outcome_word},
    hooks::peer_json,
    node::{Node, worker_terms},
    trust::is_statement,
};
use crate::worker::For;

/// The node, as the gateway sees it.
pub(super) struct Doors(pub(super) Arc<Node>);

impl Decider for Doors {
    fn decide(&self, ask: Ask<'_>, caller: &Caller, mode: Mode, done: Done) -> GiveUp {
        let pending = self.0.interceptor.decide_ask(ask, caller, mode, done);
        Box::new(move || pending.give_up())
    }

    fn search(&self, search: Result<&Search, InvalidRequest>, caller: &Caller, done: SearchDone) {
        self.0.interceptor.search(search, caller, done);
    }

    fn report(&self, body: &[u8], caller: &Caller, done: ReportDone) {
        let node = &self.0;
        // An earlier run's records only: of this one the interceptor knows more than the log.
        let history = || {
            let (incarnation, index) = node.began_at;
            let tail = node.log.tail(MAX_READ_BACK).map_err(|e| {
                tracing::warn!(error = %e, "earlier decisions cannot be read back for a report");
                e.to_string()
            })?;
            // Of an incarnation that began in this run nothing is earlier. Asked after it was read: if it
            // has changed meanwhile, what was read may be of either.
            let earlier = tail.into_iter().filter(|(at, _)| *at < index);
            Ok(EarlierRecords {
                incarnation,
                records: match node.log.incarnation() == incarnation {
                    true => earlier.collect(),
                    false => Vec::new(),
                },
            })
        };
        node.interceptor.report(body, caller, &history, done);
    }

    fn status(&self) -> Value {
        self.0.status()
    }

    fn ready(&self) -> Result<(), String> {
        if self.0.slots.current().is_none() {
            return Err(match self.0.slots.aside() {
                Some(aside) => format!(
                    "NO_POLICY: epoch {} was set aside ({}), and no other bundle can serve; sign a new epoch",
                    aside.epoch, aside.reason
                ),
                None => "NO_POLICY: no bundle verifies; tidelock bundle install one".to_owned(),
            });
        }
        if let Some(why) = self.0.log.latched() {
            // A superseded log is completed by a start only (decision 0022).
            let way_out = match self.0.log.is_superseded() {
                true => "restart the node",
                false => "tidelock audit reopen --apply",
            };
            return Err(format!(
                "AUDIT_UNAVAILABLE: {why}; when the disk is sound, {way_out}"
            ));
        }
        if self.0.root.ledger().ladder() == Ladder::Sealed {
            return Err("AUDIT_CAPACITY: the disk ceiling is reached".to_owned());
        }
        if self.0.interceptor.engines_are_exhausted() {
            return Err(
                "ENGINE_EXHAUSTED: every engine is at an evaluation that does not end; if that \
                 lasts, restart the node, and mend the policy that the log of the process names"
                    .to_owned(),
            );
        }
        if self.0.interceptor.posture() == Posture::Closed {
            return Err("POSTURE_CLOSED: policy age or the clock closes this node".to_owned());
        }
        Ok(())
    }

    fn metrics(&self) -> String {
        self.0.metrics()
    }
}

pub(super) fn refused(denied: &Denied) -> OperatorError {
    OperatorError {
        status: if denied.bringer { 422 } else { 409 },
        code: denied.code.to_owned(),
        message: denied.message.clone(),
    }
}

pub(super) fn unrecorded(why: String) -> OperatorError {
    OperatorError {
        status: 503,
        code: "AUDIT_UNAVAILABLE".to_owned(),
        message: format!("not done, because it could not be recorded: {why}"),
    }
}

pub(super) fn bad(message: impl Into<String>) -> OperatorError {
    OperatorError {
        status: 400,
        code: "INVALID_REQUEST".to_owned(),
        message: message.into(),
    }
}

pub(super) fn unknown_peer(peer: &NodeId) -> OperatorError {
    OperatorError {
        status: 404,
        code: "UNKNOWN_PEER".to_owned(),
        message: format!("{peer} is not in mesh.peers and was not met since the start"),
    }
}

pub(super) fn field_bytes(body: &Value, field: &str) -> Result<Vec<u8>, OperatorError> {
    let text = body
        .get(field)
        .and_then(Value::as_str)
        .ok_or_else(|| bad(format!("`{field}` is required, base64")))?;
    BASE64_STANDARD
        .decode(text)
        .map_err(|e| bad(format!("`{field}` is not base64: {e}")))
}

impl Operator for Doors {
    fn call(&self, op: &str, body: Value, apply: bool) -> BoxFuture<Result<Value, OperatorError>> {
        let (node, op) = (self.0.clone(), op.to_owned());
        Box::pin(async move {
            // Operations read and write the disk.
            tokio::task::spawn_blocking(move || {
                let answer = node.operate(&op, &body, apply);
                if apply {
                    node.settle();
                }
                answer
            })
            .await
            .unwrap_or_else(|_| {
                Err(OperatorError {
                    status: 500,
                    code: "BUG".to_owned(),
                    message: "the operation ended abnormally; the node's log says more".to_owned(),
                })
            })
        })
    }
}

impl Node {
    pub(super) fn operate(
        &self,
        op: &str,
        body: &Value,
        apply: bool,
    ) -> Result<Value, OperatorError> {
        match op {
            "bundle.install" => self.operate_bundle(body, apply),
            "policy.plan" => self.operate_policy_plan(body),
            "policy.activate" => self.operate_policy_activate(body, apply),
            "policy.rollback" => self.operate_policy_rollback(body, apply),
            "statement.install" => self.operate_statement(&field_bytes(body, "statement")?, apply),
            "trust.show" => self.operate_trust_show(),
            "release.verify" => self.operate_release(body),
            "crl.import" => self.operate_crl(body, apply),
            "clock.accept" => self.operate_clock(apply),
            "audit.seal" => self.operate_seal(apply),
            "audit.reopen" => self.operate_reopen(apply),
            "audit.tail" => self.operate_tail(body),
            "audit.accept" => self.operate_accept(body, apply),
            "peers.quota" => self.operate_quota(body, apply),
            "peers.why" => self.operate_why(body),
            "media.import" => self.operate_media_import(body, apply),
            "media.part" => self.operate_media_part(body),
            "media.receipts" => self.operate_media_receipts(body),
            "journal" => {
                let since = body
                    .get("since")
                    .and_then(Value::as_u64)
                    .unwrap_or_default();
                Ok(json!({"entries": self.journal.since(since)}))
            }
            _ => Err(OperatorError {
                status: 404,
                code: "UNKNOWN_OPERATION".to_owned(),
                message: format!(
                    "no operation `{op}`; there are bundle.install, policy.plan, policy.activate, policy.rollback, statement.install, trust.show, release.verify, crl.import, clock.accept, audit.seal, audit.reopen, audit.tail, audit.accept, peers.quota, peers.why, media.import, media.part, media.receipts, journal"
                ),
            }),
        }
    }

    fn operate_bundle(&self, body: &Value, apply: bool) -> Result<Value, OperatorError> {
        let package = field_bytes(body, "package")?;
        if apply {
            return self
                .install_or_schedule(&package, For::Operator)
                .map_err(|denied| {
                    self.reject_bundle(&denied);
                    refused(&denied)
                });
        }
        if let Some(plan) = self
            .plan_ahead(&package)
            .map_err(|denied| refused(&denied))?
        {
            return Ok(plan);
        }
        let order = Order::unlooked(For::Operator);
        let bundle = self
            .check_offer(&package)
            .and_then(|_| self.verify_package(&package, For::Operator))
            .and_then(|bundle| self.check_gates(&bundle, &order).map(|_| bundle))
            .map_err(|denied| refused(&denied))?;
        let manifest = bundle.manifest();
        Ok(json!({
            "activate": format!("{} epoch {}", manifest.name, manifest.epoch),
            "hash": bundle.content_id(),
            "signers": bundle.signers(),
            "role": manifest.role,
            "expires_at": manifest.expires_at,
            "replaces_epoch": self.slots.current().map(|p| p.bundle().manifest().epoch),
        }))
    }

    /// Records that a bundle of an operator's was not activated.
    pub(super) fn reject_bundle(&self, denied: &Denied) {
        self.event(
            "bundle_rejected",
            json!({"code": denied.code, "message": denied.message, "by": "operator"}),
        );
    }

    fn operate_crl(&self, body: &Value, apply: bool) -> Result<Value, OperatorError> {
        let crls = self
            .verify_crls(&field_bytes(body, "crl")?)
            .map_err(|denied| refused(&denied))?;
        let mut done = Vec::new();
        for crl in crls {
            let (issuer, number) = (crl.issuer_name().to_owned(), crl.number());
            let (revoked, next_update_unix_ms) = (crl.revoked_count(), crl.next_update_unix_ms());
            let imported = apply
                .then(|| self.apply_crl(crl))
                .transpose()
                .map_err(|denied| refused(&denied))?;
            done.push(json!({
                "issuer": issuer,
                "number": number,
                "revoked": revoked,
                "next_update_unix_ms": next_update_unix_ms,
                "outcome": imported.map(|i| outcome_word(i.outcome)),
                "newly_revoked": imported.map(|i| i.newly_revoked),
            }));
        }
        Ok(json!({"crls": done}))
    }

    fn operate_clock(&self, apply: bool) -> Result<Value, OperatorError> {
        let before = self.clock.trusted();
        let facts = json!({
            "suspect": before.suspect,
            "trusted_unix_ms": before.unix_ms,
            "wall_unix_ms": crate::clock::wall_unix_ms(),
        });
        if apply {
            self.record_act("clock_accepted", facts.clone())
                .map_err(unrecorded)?;
            self.clock.accept();
            // What was refused for the doubt.
            self.waiting.come_again();
        }
        Ok(facts)
    }

    fn operate_seal(&self, apply: bool) -> Result<Value, OperatorError> {
        if !apply {
            return Ok(json!({"seal": self.log.origin(), "records": self.log.size()}));
        }
        let sealed = self.log.seal_now().map_err(|e| OperatorError {
            status: 503,
            code: "AUDIT_UNAVAILABLE".to_owned(),
            message: e.to_string(),
        })?;
        Ok(json!({"sealed": sealed.map(|s| s.id)}))
    }

    /// Takes a log and a store that a failed write or sync had shut into use again.
    fn operate_reopen(&self, apply: bool) -> Result<Value, OperatorError> {
        let shut = json!({"log": self.log.latched(), "store": self.store.latched()});
        if apply {
            let unavailable = |message: String| OperatorError {
                status: 503,
                code: "AUDIT_UNAVAILABLE".to_owned(),
                message,
            };
            if self.log.latched().is_some() && self.log.is_superseded() {
                return Err(unavailable(
                    "the disk failed while a peer's later part of this log was being fetched; when \
                     it is sound, restart the node"
                        .to_owned(),
                ));
            }
            if self.store.latched().is_some() {
                self.store
                    .reopen()
                    .map_err(|e| unavailable(e.to_string()))?;
            }
            self.log.reopen().map_err(|e| unavailable(e.to_string()))?;
            self.record_put_aside();
            // What a latched store kept of a revoked custodian.
            self.drop_receipts_of_the_revoked();
        }
        Ok(json!({"was_shut": shut, "records": self.log.size()}))
    }

    fn operate_accept(&self, body: &Value, apply: bool) -> Result<Value, OperatorError> {
        let origin = body
            .get("origin")
            .and_then(Value::as_str)
            .ok_or_else(|| bad("`origin` is required, as in audit/NODE/KEY/INCARNATION"))
            .and_then(|text| Origin::parse(text).map_err(|e| bad(e.to_string())))?;
        if origin.audit_node().is_none() {
            return Err(bad(format!("{origin} is no audit log")));
        }
        let forked = self.is_forked(&origin);
        if apply {
            self.record_act("audit_log_accepted", json!({"origin": origin}))
                .map_err(unrecorded)?;
            self.accept_log(&origin);
        }
        Ok(json!({"accept": origin, "was_refused": forked}))
    }

    fn operate_tail(&self, body: &Value) -> Result<Value, OperatorError> {
        let lines = body
            .get("lines")
            .and_then(Value::as_u64)
            .unwrap_or(u64::MAX);
        let records = self
            .log
            .tail(usize::try_from(lines).unwrap_or(usize::MAX))
            .map_err(|e| OperatorError {
                status: 503,
                code: "AUDIT_UNAVAILABLE".to_owned(),
                message: e.to_string(),
            })?;
        let records: Vec<Value> = records
            .into_iter()
            .map(|(index, bytes)| {
                json!({
                    "index": index,
                    "leaf": merkle::leaf_hash(&bytes),
                    "record": serde_json::from_slice::<Value>(&bytes).unwrap_or_default(),
                })
            })
            .collect();
        Ok(json!({"records": records}))
    }

    /// What each kind of bucket lets pass, has done, and holds.
    fn quotas_json(&self) -> Value {
        let quotas = self.interceptor.quota_stats();
        let quotas = quotas.iter().map(|quota| {
            let stats = quota.stats;
            json!({
                "bucket": quota.bucket,
                "per_second": stats.rate.map(|rate| rate.per_second),
                "burst": stats.rate.map(|rate| rate.burst),
                "passed": stats.passed,
                "refused": stats.refused,
                "keys": stats.keys,
            })
        });
        quotas.collect()
    }

    /// What `/v1/status` answers; its shape is documented in docs/src/api.md.
    pub(super) fn status(&self) -> Value {
        let config = self.config.load();
        let usage = self.root.ledger().usage();
        let now = self.clock.trusted();
        let bundle = self.slots.current().map(|policy| {
            let manifest = policy.bundle().manifest();
            let segment = self
                .store
                .list(Some(tidelock_segments::Kind::Policy))
                .into_iter()
                .rfind(|s| s.sequence == manifest.epoch && !is_statement(&s.origin))
                .map(|s| s.id);
            json!({
                "name": manifest.name,
                "epoch": manifest.epoch,
                "version": manifest.version,
                "hash": policy.bundle().content_id(),
                "source": policy.source(),
                "role": manifest.role,
                "not_before": manifest.not_before,
                "expires_at": manifest.expires_at,
                "confirmed_unix_ms": policy.confirmed_unix_ms(),
                "segment": segment,
                "continues_when_restricted": manifest
                    .classes
                    .iter()
                    .filter(|(_, limits)| limits.when_restricted == WhenRestricted::Continue)
                    .map(|(name, _)| name)
                    .collect::<Vec<_>>(),
            })
        });
        let audit: serde_json::Map<String, Value> = self
            .store
            .heads()
            .into_iter()
            .filter(|head| head.origin.kind() == tidelock_segments::Kind::Audit)
            .filter_map(|head| {
                let last = head.ranges.last().map(|(_, last)| *last)?;
                Some((
                    head.origin.as_str().to_owned(),
                    json!({"last": last, "ranges": head.ranges}),
                ))
            })
            .collect();
        let fault = self.transport_fault();
        let peers: Vec<Value> = self
            .peers()
            .iter()
            .map(|peer| peer_json(peer, &config.mesh))
            .collect();
        let crls: Vec<Value> = self
            .revocation
            .state()
            .issuers(now.unix_ms)
            .iter()
            .map(|i| {
                json!({
                    "issuer": i.name, "number": i.number, "revoked": i.revoked,
                    "next_update_unix_ms": i.next_update_unix_ms,
                    "freshness": format!("{:?}", i.freshness).to_lowercase(),
                    "conflict": i.conflict,
                })
            })
            .collect();
        json!({
            "node": config.node.id,
            "domain": config.node.domain,
            "version": env!("CARGO_PKG_VERSION"),
            "posture": self.interceptor.posture(),
            "quotas": self.quotas_json(),
            "bundle": bundle,
            "activation": self.activation_json(),
            "consult": self.consult_json(),
            "policy_worker": self.vetter.status(worker_terms(&config)),
            "policy_age_s": self.slots.current().map(|policy| policy.age_s(now.unix_ms)),
            "trust": self.trust_json(),
            "audit": {
                "origin": self.log.origin(),
                "records": self.log.size(),
                "state": self.log.latched().map_or("open".to_owned(), |why| format!("latched: {why}")),
                "superseded": self.log.is_superseded(),
                "unlicensed_segments": self.unlicensed_segments(),
            },
            "store": {"audit": audit, "foreign_audit_bytes": self.store.foreign_audit_bytes()},
            "disk": {
                "ceiling_bytes": usage.ceiling_bytes,
                "allocated_bytes": usage.allocated_bytes,
                "reserved_bytes": usage.reserved_bytes,
                "custody_bytes": usage.custody_bytes,
                "foreign_bytes": usage.foreign_bytes,
                "ladder": self.root.ledger().ladder(),
                "seconds_to_full": self.seconds_to_full(),
            },
            "mesh": {
                "enabled": fault.is_none(), "reason": fault, "peers": peers,
                "own_quotas": self.own_quotas(),
                "beacon": self.mesh.get().and_then(MeshHandle::beacon),
            },
            "crls": crls,
            "papers": self.papers_json(),
            "clock": {"trusted_unix_ms": now.unix_ms, "suspect": now.suspect},
            "loosened": config.loosened(),
        })
    }

    fn peers(&self) -> Vec<PeerStatus> {
        self.mesh.get().map(MeshHandle::peers).unwrap_or_default()
    }

    fn metrics(&self) -> String {
        let usage = self.root.ledger().usage();
        let stats = self.interceptor.stats();
        let connected = self.peers().iter().filter(|peer| peer.connected).count();
        let gauges = [
            (
                "tidelock_disk_ceiling_bytes",
                "The disk ceiling.",
                usage.ceiling_bytes,
            ),
            (
                "tidelock_disk_allocated_bytes",
                "Bytes allocated below the root.",
                usage.allocated_bytes,
            ),
            (
                "tidelock_disk_custody_bytes",
                "Bytes of other nodes' audit.",
                usage.custody_bytes,
            ),
            (
                "tidelock_disk_ladder",
                "0 normal, 1 warn, 2 reclaim, 3 restricted, 4 sealed.",
                match self.root.ledger().ladder() {
                    Ladder::Normal => 0,
                    Ladder::Warn => 1,
                    Ladder::Reclaim => 2,
                    Ladder::Restricted => 3,
                    Ladder::Sealed => 4,
                },
            ),
            (
                "tidelock_disk_foreign_bytes",
                "Bytes of files below the root that are not the node's.",
                usage.foreign_bytes,
            ),
            (
                "tidelock_audit_records",
                "Records in the own log.",
                self.log.size(),
            ),
            (
                "tidelock_audit_unlicensed_segments",
                "Own sealed segments without enough custodians.",
                u64::try_from(self.unlicensed_segments()).unwrap_or(u64::MAX),
            ),
            (
                "tidelock_audit_incarnation",
                "Incarnation of the own log.",
                self.log.incarnation(),
            ),
            (
                "tidelock_audit_superseded",
                "1 while a peer holds a later part of the own log and the next incarnation has not begun.",
                u64::from(self.log.is_superseded()),
            ),
            (
                "tidelock_segments_damaged",
                "Stored segments found damaged since the start.",
                self.damaged.load(Ordering::Relaxed),
            ),
            (
                "tidelock_policy_epoch",
                "Epoch of the bundle that decides; 0 without one.",
                self.slots
                    .current()
                    .map_or(0, |p| p.bundle().manifest().epoch),
            ),
            (
                "tidelock_policy_age_seconds",
                "Age of the policy that decides, by its authority's word; 0 without one.",
                self.slots
                    .current()
                    .map_or(0, |p| p.age_s(self.clock.unix_ms())),
            ),
            (
                "tidelock_policy_break_glass",
                "1 while an emergency bundle decides.",
                u64::from(
                    self.slots
                        .current()
                        .is_some_and(|p| p.bundle().manifest().role == Role::BreakGlass),
                ),
            ),
            (
                "tidelock_policy_set_aside",
                "1 while the newest bundle is set aside and does not decide.",
                u64::from(self.slots.aside().is_some()),
            ),
            (
                "tidelock_trust_version",
                "Version of the trust document that holds; 0 without one.",
                self.policy_trust.load().as_ref().map_or(0, |t| t.version()),
            ),
            (
                "tidelock_peers_connected",
                "Peers with an authenticated session.",
                u64::try_from(connected).unwrap_or(u64::MAX),
            ),
        ];
        let mut text = String::new();
        for (name, help, value) in gauges {
            let _ = writeln!(
                text,
                "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}"
            );
        }
        // A rate that is not there has no number: the line is absent then.
        if let Some(seconds) = self.seconds_to_full() {
            let name = "tidelock_disk_seconds_to_full";
            let help = "Until the own share is full, at the rate of the last hour.";
            let _ = writeln!(
                text,
                "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {seconds}"
            );
        }
        text.push_str("# HELP tidelock_answers_total Answers by reason.\n# TYPE tidelock_answers_total counter\n");
        for (reason, count) in &stats.answers {
            let _ = writeln!(
                text,
                "tidelock_answers_total{{reason=\"{}\"}} {count}",
                reason.as_str()
            );
        }
        text.push_str("# HELP tidelock_quota_total Actions by bucket and outcome; a refusal counts at the narrowest bucket that was spent.\n# TYPE tidelock_quota_total counter\n");
        let quotas = self.interceptor.quota_stats();
        for quota in &quotas {
            for (outcome, count) in [
                ("passed", quota.stats.passed),
                ("refused", quota.stats.refused),
            ] {
                let _ = writeln!(
                    text,
                    "tidelock_quota_total{{bucket=\"{}\",outcome=\"{outcome}\"}} {count}",
                    quota.bucket.as_str()
                );
            }
        }
        text.push_str(
            "# HELP tidelock_quota_keys Buckets held.\n# TYPE tidelock_quota_keys gauge\n",
        );
        for quota in &quotas {
            let _ = writeln!(
                text,
                "tidelock_quota_keys{{bucket=\"{}\"}} {}",
                quota.bucket.as_str(),
                quota.stats.keys
            );
        }
        let counters = [
            (
                "tidelock_reports_total",
                "Outcomes that callers reported.",
                stats.reports,
            ),
            (
                "tidelock_searches_total",
                "Pages of searches.",
                stats.searches,
            ),
            ("tidelock_permits_total", "Permits made.", stats.permits),
            (
                "tidelock_denials_summarised_total",
                "Denials counted in summary windows.",
                stats.summarised,
            ),
            (
                "tidelock_redactions_total",
                "Secrets cut out of records.",
                stats.redactions,
            ),
            (
                "tidelock_not_released_total",
                "Records durable after their caller was given up.",
                stats.not_released,
            ),
            (
                "tidelock_records_lost_total",
                "State records that could not be written.",
                stats.records_lost,
            ),
            (
                "tidelock_engine_microseconds_total",
                "CPU time in policy engines.",
                stats.engine_us,
            ),
            (
                "tidelock_engine_abandoned_total",
                "Evaluations given up before they ended.",
                stats.abandoned,
            ),
            (
                "tidelock_engine_panics_total",
                "Panics of policy engines; each a recorded deny.",
                stats.panics,
            ),
            (
                "tidelock_answers_lost_total",
                "Panics after an evaluation; nothing was permitted, and the caller had no answer.",
                stats.lost,
            ),
        ];
        for (name, help, value) in counters {
            let _ = writeln!(
                text,
                "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}"
            );
        }
        let _ = writeln!(
            text,
            "# HELP tidelock_engines_held Engines at an evaluation that was given up; four deny everything.\n\
             # TYPE tidelock_engines_held gauge\n\
             tidelock_engines_held {}",
            stats.abandoned_now
        );
        let _ = writeln!(
            text,
            "# HELP tidelock_evaluations_under_way Evaluations that somebody waits for.\n\
             # TYPE tidelock_evaluations_under_way gauge\n\
             tidelock_evaluations_under_way {}",
            stats.evaluating
        );
        text.push_str(&self.consult_metrics());
        text.push_str(&self.papers_metrics());
        self.mesh_metrics(&mut text);
        text
    }
}
