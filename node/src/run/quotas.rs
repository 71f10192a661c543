//! Quotas of peers: changed live by an operator, and kept over a restart together with what every peer
//! owes, so that a restart grants nothing (INV-13).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidelock_gateway::OperatorError;
use tidelock_quota::Rate;
use tidelock_segments::NodeId;
use tidelock_transport::{
    limits::MAX_PEERS,
    shell::{MeshHandle, PeerDebt, PeerQuota},
};

use super::{
    doors::{bad, unknown_peer, unrecorded},
    node::Node,
};
use crate::config::{
    Config, MeshSection, PEER_BYTES_PER_DAY, PEER_BYTES_PER_SECOND, PEER_REQUESTS_PER_SECOND,
};

/// Where they lie below the root.
pub(super) const QUOTAS_FILE: &str = "state/quotas";

/// What an operator has set for one peer. What is not set is as in the config.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OwnQuota {
    bytes_per_second: Option<u32>,
    requests_per_second: Option<u32>,
    /// 0 is no bound.
    bytes_per_day: Option<u64>,
}

impl OwnQuota {
    fn is_common(&self) -> bool {
        *self == Self::default()
    }

    fn over(&self, section: &MeshSection) -> PeerQuota {
        peer_quota(
            self.bytes_per_second
                .unwrap_or(section.peer_bytes_per_second),
            self.requests_per_second
                .unwrap_or(section.peer_requests_per_second),
            self.bytes_per_day.unwrap_or(section.peer_bytes_per_day),
        )
    }

    /// These, with what the request changes.
    fn changed(mut self, body: &Value) -> Result<Self, OperatorError> {
        if body.get("common").and_then(Value::as_bool) == Some(true) {
            self = Self::default();
        }
        if let Some(value) = number(body, "bytes_per_second", PEER_BYTES_PER_SECOND)? {
            self.bytes_per_second = Some(value);
        }
        if let Some(value) = number(body, "requests_per_second", PEER_REQUESTS_PER_SECOND)? {
            self.requests_per_second = Some(value);
        }
        match body.get("bytes_per_day") {
            None | Some(Value::Null) => {}
            Some(value) => {
                let bytes = value
                    .as_u64()
                    .filter(|bytes| *bytes == 0 || PEER_BYTES_PER_DAY.contains(bytes));
                self.bytes_per_day = Some(bytes.ok_or_else(|| {
                    bad(format!(
                        "`bytes_per_day` must be 0, for no bound, or from {} to {}",
                        PEER_BYTES_PER_DAY.start(),
                        PEER_BYTES_PER_DAY.end()
                    ))
                })?);
            }
        }
        Ok(self)
    }
}

fn number(
    body: &Value,
    key: &str,
    range: std::ops::RangeInclusive<u32>,
) -> Result<Option<u32>, OperatorError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|value| u32::try_from(value).ok())
            .filter(|value| range.contains(value))
            .map(Some)
            .ok_or_else(|| {
                bad(format!(
                    "`{key}` must be from {} to {}",
                    range.start(),
                    range.end()
                ))
            }),
    }
}

/// Twice the rate at once; the bucket of bytes never smaller than a segment, which would never pass.
fn peer_quota(bytes_per_second: u32, requests_per_second: u32, bytes_per_day: u64) -> PeerQuota {
    let kib = (bytes_per_second / 1_024).max(1);
    let bytes = Rate {
        per_second: kib,
        burst: kib.saturating_mul(2).max(128 * 1_024),
    };
    PeerQuota {
        frames: Rate {
            per_second: requests_per_second,
            burst: requests_per_second.saturating_mul(2),
        },
        bulk_in_kib: bytes,
        out_kib: bytes,
        daily_in_bytes: match bytes_per_day {
            0 => u64::MAX,
            bytes => bytes,
        },
    }
}

/// What every peer may cost by the config.
pub(super) fn common_quota(section: &MeshSection) -> PeerQuota {
    OwnQuota::default().over(section)
}

/// The state file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeptQuotas {
    saved_unix_ms: u64,
    own: BTreeMap<NodeId, OwnQuota>,
    owed: BTreeMap<NodeId, PeerDebt>,
}

impl KeptQuotas {
    /// For a file that is damaged: whoever is known owes everything. Quotas that an operator had set
    /// are lost; the log has their records.
    pub(super) fn lost(config: &Config, now_unix_ms: u64) -> Self {
        let owed = config.mesh.peers.iter();
        Self {
            saved_unix_ms: now_unix_ms,
            own: BTreeMap::new(),
            owed: owed
                .map(|peer| (peer.id.clone(), PeerDebt::SPENT))
                .collect(),
        }
    }

    /// The quotas of single peers.
    pub(super) fn own(&self, section: &MeshSection) -> BTreeMap<NodeId, PeerQuota> {
        let own = self.own.iter();
        own.map(|(peer, own)| (peer.clone(), own.over(section)))
            .collect()
    }

    /// What is owed now. A clock that is in doubt pays nothing.
    pub(super) fn owed(&self, now_unix_ms: u64, suspect: bool) -> BTreeMap<NodeId, PeerDebt> {
        let since = match suspect {
            true => 0,
            false => now_unix_ms.saturating_sub(self.saved_unix_ms),
        };
        let since = Duration::from_millis(since);
        let owed = self.owed.iter();
        owed.map(|(peer, debt)| (peer.clone(), debt.after(since)))
            .collect()
    }
}

/// The quotas of peers that this node keeps.
pub(super) struct OwnQuotas {
    /// Held over a change, its record, its file and the mesh: changes take effect in the order in which
    /// they are kept. Never taken on a network thread (INV-10).
    turn: Mutex<()>,
    /// Held only to look or to replace.
    kept: Mutex<KeptQuotas>,
}

impl OwnQuotas {
    pub(super) fn new(kept: KeptQuotas) -> Self {
        Self {
            turn: Mutex::default(),
            kept: Mutex::new(kept),
        }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As they were kept last.
    pub(super) fn kept(&self) -> KeptQuotas {
        self.lock().clone()
    }

    fn keep(&self, new: KeptQuotas) {
        *self.lock() = new;
    }

    fn lock(&self) -> MutexGuard<'_, KeptQuotas> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rate_json(quota: &PeerQuota) -> Value {
    json!({
        "bytes_per_second": u64::from(quota.bulk_in_kib.per_second).saturating_mul(1_024),
        "requests_per_second": quota.frames.per_second,
        "bytes_per_day": (quota.daily_in_bytes != u64::MAX).then_some(quota.daily_in_bytes),
    })
}

impl Node {
    /// Peers with a quota of their own, for the status. Waits for no disk.
    pub(super) fn own_quotas(&self) -> BTreeSet<NodeId> {
        self.quotas.lock().own.keys().cloned().collect()
    }

    /// `peers.quota`: what a peer may cost and owes; with changes and `apply` it is changed from now on.
    pub(super) fn operate_quota(&self, body: &Value, apply: bool) -> Result<Value, OperatorError> {
        let name = body
            .get("peer")
            .and_then(Value::as_str)
            .ok_or_else(|| bad("`peer` is required"))?;
        let peer = NodeId::new(name).map_err(|e| bad(format!("`peer`: {e}")))?;
        let config = self.config.load_full();
        let section = &config.mesh;
        let _turn = self.quotas.turn();
        let mut new = self.quotas.kept();
        let before = new.own.get(&peer).copied().unwrap_or_default();
        if before.is_common()
            && !section.peers.iter().any(|configured| configured.id == peer)
            && !self.was_met(&peer)
        {
            return Err(unknown_peer(&peer));
        }
        let after = before.changed(body)?;
        let (was, will_be) = (before.over(section), after.over(section));
        let mesh = self.mesh.get();
        let debt = mesh.and_then(|mesh| mesh.owed().remove(&peer));
        let answer = json!({
            "peer": peer,
            "own": !after.is_common(),
            "before": rate_json(&was),
            "after": rate_json(&will_be),
            // Not known after a damaged file: then all of a bounded day counts as used.
            "used_today_bytes": Some(debt.map_or(0, |debt| debt.day_used_bytes))
                .filter(|used| *used != u64::MAX),
        });
        let in_force = mesh.is_none_or(|mesh| mesh.quota(&peer) == will_be);
        if !apply || (after == before && in_force) {
            return Ok(answer);
        }
        if !after.is_common() && !new.own.contains_key(&peer) && new.own.len() >= MAX_PEERS {
            return Err(OperatorError {
                status: 409,
                code: "TOO_MANY_QUOTAS".to_owned(),
                message: format!(
                    "{MAX_PEERS} peers have a quota of their own already; give one of them the \
                     common one with --common"
                ),
            });
        }
        self.record_act("peer_quota_set", answer.clone())
            .map_err(unrecorded)?;
        match after.is_common() {
            true => new.own.remove(&peer),
            false => new.own.insert(peer.clone(), after),
        };
        self.fill_debts(&mut new);
        if !self.write_state(QUOTAS_FILE, &new) {
            return Err(self.quota_not_set(
                &peer,
                "STATE_NOT_WRITTEN",
                format!("{QUOTAS_FILE} cannot be written; the old quota holds"),
            ));
        }
        self.quotas.keep(new);
        if let Some(mesh) = mesh {
            let own = (!after.is_common()).then_some(will_be);
            mesh.set_quota(&peer, own).map_err(|error| {
                self.quota_not_set(
                    &peer,
                    "QUOTA_NOT_IN_FORCE",
                    format!(
                        "it is kept for the next start, and until then the old one holds: {error}"
                    ),
                )
            })?;
        }
        Ok(answer)
    }

    /// Takes back, in the log, an act that was recorded before it failed.
    fn quota_not_set(&self, peer: &NodeId, code: &str, message: String) -> OperatorError {
        self.event(
            "peer_quota_not_set",
            json!({"peer": peer, "code": code, "why": message}),
        );
        OperatorError {
            status: 503,
            code: code.to_owned(),
            message,
        }
    }

    /// Puts into force what an operator has changed while the mesh started with `began_with`.
    pub(super) fn catch_up_quotas(&self, began_with: &BTreeMap<NodeId, PeerQuota>) {
        let _turn = self.quotas.turn();
        let own = self.quotas.kept().own(&self.config.load().mesh);
        let Some(mesh) = self.mesh.get() else {
            return;
        };
        for peer in began_with.keys().chain(own.keys()) {
            let quota = own.get(peer);
            if quota != began_with.get(peer)
                && let Err(error) = mesh.set_quota(peer, quota.copied())
            {
                self.quota_not_set(peer, "QUOTA_NOT_IN_FORCE", error.to_string());
            }
        }
    }

    fn was_met(&self, peer: &NodeId) -> bool {
        let statuses = self.mesh.get().map(MeshHandle::peers).unwrap_or_default();
        statuses.iter().any(|status| status.node_id == *peer)
    }

    /// What is owed, as the mesh knows it; before it runs, what was kept stays.
    fn fill_debts(&self, kept: &mut KeptQuotas) {
        if let Some(mesh) = self.mesh.get() {
            kept.owed = mesh.owed();
            kept.saved_unix_ms = self.clock.unix_ms();
        }
    }

    /// Once a minute and at the end.
    pub(super) fn keep_quotas(&self) {
        let _turn = self.quotas.turn();
        let kept = self.quotas.kept();
        let mut new = kept.clone();
        self.fill_debts(&mut new);
        let idle = new.owed.is_empty() && kept.owed.is_empty();
        if !idle && new != kept && self.write_state(QUOTAS_FILE, &new) {
            self.quotas.keep(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_names_what_it_changes_and_is_checked() {
        let own = OwnQuota::default();
        let day = json!({"bytes_per_day": 1_u64 << 30});
        let own = own.changed(&day).unwrap();
        let own = own
            .changed(&json!({"bytes_per_second": 1 << 20, "requests_per_second": null}))
            .unwrap();
        let expected = OwnQuota {
            bytes_per_second: Some(1 << 20),
            requests_per_second: None,
            bytes_per_day: Some(1 << 30),
        };
        assert_eq!(own, expected);
        let common = own.changed(&json!({"common": true})).unwrap();
        assert!(common.is_common());
        for wrong in [
            json!({"bytes_per_second": 1}),
            json!({"bytes_per_second": u64::MAX}),
            json!({"requests_per_second": "many"}),
            json!({"requests_per_second": 0}),
            json!({"bytes_per_day": 1}),
        ] {
            assert!(own.changed(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn inv_10_a_status_does_not_wait_for_a_quota_that_is_being_written() {
        let quotas = OwnQuotas::new(KeptQuotas::default());
        let _turn = quotas.turn();
        let new = KeptQuotas {
            own: BTreeMap::from([(NodeId::new("b").unwrap(), OwnQuota::default())]),
            ..KeptQuotas::default()
        };
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| quotas.kept());
            assert_eq!(looking.join().unwrap(), KeptQuotas::default());
        });
        quotas.keep(new.clone());
        assert_eq!(quotas.kept(), new);
        assert!(
            quotas.turn.try_lock().is_err(),
            "a change waits for its turn"
        );
    }

    #[test]
    fn inv_13_time_pays_debts_and_a_clock_in_doubt_does_not() {
        let peer = NodeId::new("b").unwrap();
        let debt = PeerDebt {
            bulk_in_ms: 5_000,
            day_used_bytes: 9,
            day_age_ms: 1_000,
            ..PeerDebt::default()
        };
        let kept = KeptQuotas {
            saved_unix_ms: 100_000,
            own: BTreeMap::new(),
            owed: BTreeMap::from([(peer.clone(), debt)]),
        };
        let later = kept.owed(102_000, false);
        assert_eq!(
            (later[&peer].bulk_in_ms, later[&peer].day_age_ms),
            (3_000, 3_000)
        );
        assert_eq!(kept.owed(102_000, true)[&peer], debt);
        assert_eq!(
            kept.owed(50_000, false)[&peer],
            debt,
            "a clock that was put back"
        );
    }

    #[test]
    fn what_is_kept_is_read_again() {
        let peer = NodeId::new("b").unwrap();
        let kept = KeptQuotas {
            saved_unix_ms: 7,
            own: BTreeMap::from([(
                peer.clone(),
                OwnQuota {
                    bytes_per_day: Some(0),
                    ..OwnQuota::default()
                },
            )]),
            owed: BTreeMap::from([(peer, PeerDebt::SPENT)]),
        };
        let text = serde_json::to_string(&kept).unwrap();
        assert_eq!(serde_json::from_str::<KeptQuotas>(&text).unwrap(), kept);
        assert!(serde_json::from_str::<KeptQuotas>(&text.replace("own", "own2")).is_err());
    }
}
