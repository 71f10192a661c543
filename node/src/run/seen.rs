//! The mesh as seen from outside: counters that outlive their window, the mesh's part of `/metrics`,
//! and the answer to "why is this segment not there yet". Figures only; nothing decides by them.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Map, Value, json};
use tidelock_gateway::OperatorError;
use tidelock_segments::{Kind, NodeId, Origin, SegmentId, SegmentRef};
use tidelock_transport::{
    session::{Lag, Refusal, Standing},
    shell::{Answer, MeshHandle, PeerStatus, SegmentStanding},
};

use super::{
    doors::{bad, unknown_peer},
    node::Node,
};

/// Reasons of refused peers and segments that are told apart; their codes are words of this program,
/// of which there are fewer (INV-07).
const REASONS_MAX: usize = 128;
/// Refused segments that are remembered with their reason, about 400 bytes each (INV-07).
const REFUSED_SEGMENTS_MAX: usize = 1_024;
/// Failed dials that are remembered, one a peer (INV-07).
const DIALS_MAX: usize = tidelock_transport::limits::MAX_PEERS;
/// Longest text kept of a message, characters.
const TEXT_MAX: usize = 256;
/// How long a session may take to answer a question.
const PATIENCE: Duration = Duration::from_secs(3);

/// A segment of a peer that was not taken.
#[derive(Debug, Clone)]
struct RefusedSegment {
    peer: NodeId,
    id: SegmentId,
    origin: Origin,
    code: &'static str,
    message: String,
    unix_ms: u64,
}

#[derive(Debug, Default)]
struct Inner {
    peers_refused: BTreeMap<String, u64>,
    segments_refused: BTreeMap<String, u64>,
    refused: VecDeque<RefusedSegment>,
    dials: BTreeMap<NodeId, (u64, String)>,
}

/// What was counted since the start.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<Inner>);

fn add(counts: &mut BTreeMap<String, u64>, reason: &str) {
    let known = counts.len() < REASONS_MAX || counts.contains_key(reason);
    let reason = if known { reason } else { "(others)" };
    let count = counts.entry(reason.to_owned()).or_default();
    *count = count.saturating_add(1);
}

fn short(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

impl Seen {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn peer_refused(&self, reason: &str) {
        add(&mut self.inner().peers_refused, reason);
    }

    pub(super) fn segment_refused(
        &self,
        peer: &NodeId,
        reference: &SegmentRef,
        refusal: &Refusal,
        unix_ms: u64,
    ) {
        let mut inner = self.inner();
        add(&mut inner.segments_refused, refusal.code);
        inner
            .refused
            .retain(|old| old.peer != *peer || old.id != reference.id);
        if inner.refused.len() >= REFUSED_SEGMENTS_MAX {
            inner.refused.pop_front();
        }
        inner.refused.push_back(RefusedSegment {
            peer: peer.clone(),
            id: reference.id,
            origin: reference.origin.clone(),
            code: refusal.code,
            message: short(&refusal.message),
            unix_ms,
        });
    }

    pub(super) fn dial_failed(&self, peer: &NodeId, unix_ms: u64, reason: &str) {
        let mut inner = self.inner();
        if inner.dials.len() < DIALS_MAX || inner.dials.contains_key(peer) {
            inner.dials.insert(peer.clone(), (unix_ms, short(reason)));
        }
    }

    fn refusal(&self, peer: &NodeId, id: &SegmentId) -> Option<RefusedSegment> {
        self.inner()
            .refused
            .iter()
            .find(|refused| refused.peer == *peer && refused.id == *id)
            .cloned()
    }

    fn last_dial(&self, peer: &NodeId) -> Option<(u64, String)> {
        self.inner().dials.get(peer).cloned()
    }
}

// ---- Metrics ----

/// A label's value, as the text format wants it.
fn escaped(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c {
            '\\' => vec!['\\', '\\'],
            '"' => vec!['\\', '"'],
            '\n' => vec!['\\', 'n'],
            c => vec![c],
        })
        .collect()
}

/// One metric: its lines, and its head where it has any.
struct Metric<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
    lines: String,
}

impl<'a> Metric<'a> {
    fn new(name: &'a str, kind: &'a str, help: &'a str) -> Self {
        Self {
            name,
            kind,
            help,
            lines: String::new(),
        }
    }

    fn line(&mut self, labels: &[(&str, &str)], value: u64) {
        self.write(labels, &value.to_string());
    }

    /// Milliseconds as seconds with three decimals: exact, and without floating point.
    fn seconds(&mut self, labels: &[(&str, &str)], ms: u64) {
        self.write(labels, &format!("{}.{:03}", ms / 1_000, ms % 1_000));
    }

    fn write(&mut self, labels: &[(&str, &str)], value: &str) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        let name = self.name;
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{name}{{{}}} {value}", labels.join(","));
    }

    fn end(self, text: &mut String) {
        let Self {
            name,
            kind,
            help,
            lines,
        } = self;
        if !lines.is_empty() {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}");
        }
    }
}

fn lag_metrics(peers: &[&PeerStatus], text: &mut String) {
    type Figure = fn(&Lag) -> [u64; 2];
    let figures: [(&str, &str, Figure); 2] = [
        (
            "tidelock_peer_lag_segments",
            "Segments that the peer lacks of this node (to_peer), or this node of the peer (from_peer).",
            |lag| [lag.to_peer_segments, lag.from_peer_segments],
        ),
        (
            "tidelock_peer_lag_bytes",
            "Bytes of them; from_peer as far as they are listed.",
            |lag| [lag.to_peer_bytes, lag.from_peer_bytes],
        ),
    ];
    for (name, help, figure) in figures {
        let mut metric = Metric::new(name, "gauge", help);
        for peer in peers {
            if let Some(lag) = &peer.lag {
                let [to_peer, from_peer] = figure(lag);
                let id = peer.node_id.as_str();
                metric.line(&[("peer", id), ("direction", "to_peer")], to_peer);
                metric.line(&[("peer", id), ("direction", "from_peer")], from_peer);
            }
        }
        metric.end(text);
    }
    let mut metric = Metric::new(
        "tidelock_peer_lag_seconds",
        "gauge",
        "Since the lag was last known to be nothing; since the start, if never.",
    );
    for peer in peers {
        let id = peer.node_id.as_str();
        metric.seconds(
            &[("peer", id), ("direction", "to_peer")],
            peer.lag_to_peer_ms,
        );
        metric.seconds(
            &[("peer", id), ("direction", "from_peer")],
            peer.lag_from_peer_ms,
        );
    }
    metric.end(text);
}

/// What is told of each peer of the configuration. Whoever else was met gets no label (INV-07).
fn peer_metrics(peers: &[PeerStatus], text: &mut String) {
    let peers: Vec<&PeerStatus> = peers.iter().filter(|peer| peer.configured).collect();
    type Figure = fn(&PeerStatus) -> u64;
    let figures: [(&str, &str, &str, Figure); 9] = [
        (
            "tidelock_peer_connected",
            "gauge",
            "Whether a session with the peer is established.",
            |p| u64::from(p.connected),
        ),
        (
            "tidelock_peer_sessions_total",
            "counter",
            "Sessions established with the peer.",
            |p| p.sessions,
        ),
        (
            "tidelock_peer_dials_total",
            "counter",
            "Dials to the peer.",
            |p| p.dials,
        ),
        (
            "tidelock_peer_received_bytes_total",
            "counter",
            "Bytes of segments taken from the peer.",
            |p| p.bytes_in,
        ),
        (
            "tidelock_peer_sent_bytes_total",
            "counter",
            "Bytes of segments sent to the peer.",
            |p| p.bytes_out,
        ),
        (
            "tidelock_peer_refused_segments_total",
            "counter",
            "Segments of the peer that were not taken.",
            |p| p.refused_in,
        ),
        (
            "tidelock_peer_sent_packets_total",
            "counter",
            "QUIC packets sent to the peer.",
            |p| p.sent_packets,
        ),
        (
            "tidelock_peer_lost_packets_total",
            "counter",
            "QUIC packets to the peer that were declared lost; what they carried was sent again.",
            |p| p.lost_packets,
        ),
        (
            "tidelock_peer_lost_bytes_total",
            "counter",
            "Bytes of those packets.",
            |p| p.lost_bytes,
        ),
    ];
    for (name, kind, help, figure) in figures {
        let mut metric = Metric::new(name, kind, help);
        for peer in &peers {
            metric.line(&[("peer", peer.node_id.as_str())], figure(peer));
        }
        metric.end(text);
    }
    lag_metrics(&peers, text);
    let mut debt = Metric::new(
        "tidelock_peer_quota_debt_seconds",
        "gauge",
        "Until what last waited at the peer's bucket is paid.",
    );
    let mut waits = Metric::new(
        "tidelock_peer_quota_waits_total",
        "counter",
        "Requests that had to wait for the peer's bucket.",
    );
    for peer in &peers {
        for bucket in &peer.quota {
            let labels = [("peer", peer.node_id.as_str()), ("bucket", bucket.bucket)];
            debt.seconds(&labels, bucket.debt_ms);
            waits.line(&labels, bucket.waits);
        }
    }
    debt.end(text);
    waits.end(text);
}

impl Node {
    /// The mesh's part of `/metrics`. Answers from memory: it runs on a network thread.
    pub(super) fn mesh_metrics(&self, text: &mut String) {
        if let Some(mesh) = self.mesh.get() {
            peer_metrics(&mesh.peers(), text);
            let refusals = mesh.refusals();
            let mut metric = Metric::new(
                "tidelock_connections_refused_total",
                "counter",
                "Connections refused before authentication, by reason.",
            );
            for (reason, count) in [
                ("closed", refusals.closed),
                ("address_quota", refusals.address_quota),
                ("busy", refusals.busy),
                ("handshake", refusals.handshake),
            ] {
                metric.line(&[("reason", reason)], count);
            }
            metric.end(text);
        }
        if let Some(beacon) = self.mesh.get().and_then(MeshHandle::beacon) {
            let mut metric = Metric::new(
                "tidelock_beacons_total",
                "counter",
                "Beacons sent and heard, and packets to the group that were not followed, by reason.",
            );
            metric.line(&[("outcome", "sent")], beacon.sent);
            metric.line(&[("outcome", "heard")], beacon.heard);
            for (reason, count) in &beacon.refused {
                metric.line(&[("outcome", reason)], *count);
            }
            metric.end(text);
            let mut metric = Metric::new(
                "tidelock_beacon_dials_total",
                "counter",
                "Dials that beacons caused, and what they came to.",
            );
            metric.line(&[("outcome", "dialled")], beacon.dials);
            metric.line(&[("outcome", "met")], beacon.met);
            metric.line(&[("outcome", "not_missing")], beacon.not_missing);
            metric.line(&[("outcome", "failed")], beacon.failed);
            metric.end(text);
        }
        let now = self.clock.unix_ms();
        let mut age = Metric::new(
            "tidelock_crl_age_seconds",
            "gauge",
            "Since thisUpdate of the CRL in force.",
        );
        let mut left = Metric::new(
            "tidelock_crl_fresh_seconds",
            "gauge",
            "Until nextUpdate of the CRL in force; 0 when it has passed.",
        );
        for issuer in self.revocation.state().issuers(now) {
            let labels = [("issuer", issuer.name.as_str())];
            if let Some(this_update) = issuer.this_update_unix_ms {
                age.seconds(&labels, now.saturating_sub(this_update));
            }
            if let Some(next_update) = issuer.next_update_unix_ms {
                left.seconds(&labels, next_update.saturating_sub(now));
            }
        }
        age.end(text);
        left.end(text);
        let inner = self.seen.inner();
        for (name, help, counts) in [
            (
                "tidelock_peers_refused_total",
                "Peers refused, in the handshake or after it, by reason.",
                &inner.peers_refused,
            ),
            (
                "tidelock_segments_refused_total",
                "Segments of peers that were not taken, by reason.",
                &inner.segments_refused,
            ),
        ] {
            let mut metric = Metric::new(name, "counter", help);
            for (reason, count) in counts {
                metric.line(&[("reason", reason)], *count);
            }
            metric.end(text);
        }
    }
}

// ---- Why ----

/// An answer to "why is it not there": a stable code, a sentence, and facts.
#[derive(Debug)]
struct Why {
    code: &'static str,
    message: String,
    facts: Map<String, Value>,
}

impl Why {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            facts: Map::new(),
        }
    }

    fn fact(mut self, name: &str, value: Value) -> Self {
        self.facts.insert(name.to_owned(), value);
        self
    }
}

/// Whether a session has it in hand, or will ask for it.
fn is_under_way(standing: &Standing) -> bool {
    matches!(
        standing,
        Standing::Requested
            | Standing::Receiving
            | Standing::Admitting
            | Standing::Queued { .. }
            | Standing::Deferred
    )
}

impl Node {
    /// Why a segment is not at a peer yet, or not here from that peer.
    pub(super) fn operate_why(&self, body: &Value) -> Result<Value, OperatorError> {
        let field = |name: &str| {
            body.get(name)
                .and_then(Value::as_str)
                .ok_or_else(|| bad(format!("`{name}` is required")))
        };
        let id: SegmentId = field("segment")?
            .parse()
            .map_err(|e| bad(format!("`segment`: {e}")))?;
        let peer = NodeId::new(field("peer")?).map_err(|e| bad(format!("`peer`: {e}")))?;
        let statuses = self.mesh.get().map(MeshHandle::peers).unwrap_or_default();
        let status = statuses.iter().find(|status| status.node_id == peer);
        let configured = self.config.load().mesh.peers.iter().any(|p| p.id == peer);
        if status.is_none() && !configured {
            return Err(unknown_peer(&peer));
        }
        let held = self.store.reference(&id);
        let why = match &held {
            Some(held) => self.why_not_there(held, &peer, status),
            None => self.why_not_here(&id, &peer, status),
        };
        let mut answer = json!({
            "segment": id,
            "peer": peer,
            "direction": if held.is_some() { "to_peer" } else { "from_peer" },
            "code": why.code,
            "message": why.message,
        });
        if let Some(fields) = answer.as_object_mut() {
            if let Some(held) = &held {
                fields.insert("kind".to_owned(), json!(held.kind));
                fields.insert("origin".to_owned(), json!(held.origin));
                fields.insert("sequence".to_owned(), json!(held.sequence));
                fields.insert("bytes".to_owned(), json!(held.size_bytes));
            }
            fields.extend(why.facts);
        }
        Ok(answer)
    }

    /// What keeps any segment from moving between the two: no session. Else what the session says.
    fn ask_session(
        &self,
        peer: &NodeId,
        id: &SegmentId,
        held: Option<&SegmentRef>,
        status: Option<&PeerStatus>,
    ) -> Result<SegmentStanding, Why> {
        if let Some(reason) = self.transport_fault() {
            return Err(Why::new(
                "transport_closed",
                format!("this node's transport is closed: {reason}"),
            ));
        }
        let answer = self.mesh.get().map_or(Answer::NoSession, |mesh| {
            mesh.standing(peer, id, held, PATIENCE)
        });
        match answer {
            Answer::Standing(standing) => Ok(standing),
            Answer::Busy => Err(Why::new(
                "busy",
                "the session ended or had no time to answer; ask again",
            )),
            Answer::NoSession => Err(self.no_session(peer, status)),
        }
    }

    fn no_session(&self, peer: &NodeId, status: Option<&PeerStatus>) -> Why {
        let close = status.and_then(|status| status.last_close.as_ref());
        let now = self.clock.unix_ms();
        let mut why =
            if self.is_revoked(peer) || close.is_some_and(|close| close.code == Some("revoked")) {
                Why::new(
                    "revoked",
                    "the peer's certificate or key is revoked; it needs a new certificate",
                )
            } else if let Some(ms) = status.and_then(|status| status.cooling_ms) {
                Why::new(
                    "cooling_down",
                    "the peer misbehaved and is left alone for a while",
                )
                .fact("cooling_ms", json!(ms))
            } else {
                Why::new("session_down", "there is no session with the peer")
            };
        if let Some(close) = close {
            why = why
                .fact(
                    "down_since_unix_ms",
                    json!(now.saturating_sub(close.ago_ms)),
                )
                .fact("last_close", json!(close));
        }
        if let Some((at, reason)) = self.seen.last_dial(peer) {
            why = why
                .fact("last_dial_unix_ms", json!(at))
                .fact("last_dial_error", json!(reason));
        }
        let next_dial_ms = status.and_then(|status| status.next_dial_ms);
        let configured = status.is_some_and(|status| status.configured);
        why = match next_dial_ms {
            Some(ms) => why.fact("next_dial_ms", json!(ms)),
            None => why.fact("dialling", json!(configured)),
        };
        if let Some(left) = status.and_then(|status| status.budget_left) {
            why = why.fact("dial_budget_left", json!(left));
        }
        why
    }

    /// Whether the certificate that the peer has shown last is revoked by now.
    fn is_revoked(&self, peer: &NodeId) -> bool {
        let shown: Vec<_> = self
            .endorsements
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter(|((node, _), _)| node == peer)
            .map(|(_, endorsement)| endorsement.clone())
            .collect();
        shown.iter().any(|endorsement| {
            self.judge_endorsement(endorsement, self.clock.unix_ms())
                .is_err_and(|denied| denied.is_revoked())
        })
    }

    fn why_not_there(&self, held: &SegmentRef, peer: &NodeId, status: Option<&PeerStatus>) -> Why {
        if self.store.custodians(&held.id).contains(peer) {
            return Why::new("held", "it is there: the peer has given a custody receipt")
                .fact("by", json!("receipt"));
        }
        let said = match self.ask_session(peer, &held.id, Some(held), status) {
            Ok(said) => said,
            Err(why) => return why,
        };
        let free_bytes = status.and_then(|status| status.custody_free_bytes);
        let debt = said
            .quota
            .iter()
            .find(|debt| debt.bucket == "out" && debt.debt_ms > 0);
        match (said.standing, debt) {
            (Standing::HeldThere, _) => {
                Why::new("held", "it is there: the peer's head covers it").fact("by", json!("head"))
            }
            (Standing::OwnLog, _) => Why::new(
                "own_log",
                "it is of the peer's own log: it takes back only what damage or a restored root has cost it",
            ),
            (Standing::KindNotKept, _) => {
                Why::new("kind_not_kept", "the peer does not keep this kind")
            }
            (Standing::TooLarge, _) => Why::new("too_large", "it is bigger than the peer takes"),
            (Standing::Serving, Some(debt)) => Why::new(
                "quota",
                "the peer has asked for it; it waits for the peer's share of this node's uplink",
            )
            .fact("bucket", json!(debt.bucket))
            .fact("wait_ms", json!(debt.debt_ms)),
            (Standing::Serving, None) => Why::new(
                "in_flight",
                "the peer has asked for it and it is being sent",
            ),
            (Standing::Superseded, _) => Why::new(
                "below_floor",
                "the peer holds a newer one, and only the newest counts",
            ),
            (standing @ (Standing::Hole | Standing::Offered), _)
                if held.kind == Kind::Audit
                    && free_bytes.is_some_and(|free| free < held.size_bytes) =>
            {
                Why::new(
                    "no_room",
                    "the peer said in its last Hello that it has no room for it",
                )
                .fact("custody_free_bytes", json!(free_bytes))
                .fact("hole", json!(standing == Standing::Hole))
            }
            (Standing::Hole, _) => Why::new(
                "hole",
                "the peer holds later segments of this log and not this one: it evicted it, or \
                 did not take it",
            ),
            (Standing::NotOffered, _) => {
                Why::new("not_offered", "the peer is told of it with the next heads")
            }
            (Standing::NotEstablished, _) => {
                Why::new("greeting", "the session with the peer is being set up")
            }
            _ => Why::new(
                "offered",
                "the peer was told of it and has not asked for it: what holds it back is there to \
                 be seen, with the same command",
            ),
        }
    }

    fn why_not_here(&self, id: &SegmentId, peer: &NodeId, status: Option<&PeerStatus>) -> Why {
        let said = self.ask_session(peer, id, None, status);
        // What was refused before is no answer while it is on its way again.
        let refused = match &said {
            Ok(said) if is_under_way(&said.standing) => None,
            Ok(_) | Err(_) => self.seen.refusal(peer, id),
        };
        if let Some(refused) = refused {
            let fork = ["AUDIT_FORK", "AUDIT_LINEAGE"].contains(&refused.code)
                || self.is_forked(&refused.origin);
            let why = match (fork, said) {
                (true, _) => Why::new(
                    "fork",
                    "its log contradicts what is held here and waits for an operator: tidelock audit accept",
                ),
                (false, Ok(_)) => Why::new("refused", "it came from this peer and was not taken"),
                (false, Err(why)) => why,
            };
            return why
                .fact("origin", json!(refused.origin))
                .fact("refusal", json!(refused.code))
                .fact("refusal_message", json!(refused.message))
                .fact("refused_unix_ms", json!(refused.unix_ms));
        }
        let said = match said {
            Ok(said) => said,
            Err(why) => return why,
        };
        let why = match said.standing {
            Standing::Requested => Why::new("in_flight", "this node has asked the peer for it")
                .fact("stage", json!("requested")),
            Standing::Receiving => {
                Why::new("in_flight", "it is arriving").fact("stage", json!("receiving"))
            }
            Standing::Admitting => Why::new("in_flight", "it is here and being looked at")
                .fact("stage", json!("admitting")),
            Standing::Queued { .. } => match said.held_ms {
                Some(ms) => {
                    let owed: Vec<&'static str> = said
                        .quota
                        .iter()
                        .filter(|debt| debt.bucket != "out" && debt.debt_ms > 0)
                        .map(|debt| debt.bucket)
                        .collect();
                    Why::new(
                        "quota",
                        "it waits for a quota of this node or for room in its buffers",
                    )
                    .fact("buckets", json!(owed))
                    .fact("wait_ms", json!(ms))
                }
                None => Why::new("queued", "it waits for its turn: urgency first, then age"),
            },
            Standing::Deferred => {
                Why::new("elsewhere", "another session of this node is fetching it")
            }
            Standing::SetAside => {
                Why::new("refused", "it was not taken from this peer in this session")
            }
            Standing::NotEstablished => {
                Why::new("greeting", "the session with the peer is being set up")
            }
            _ => {
                let usage = self.root.ledger().usage();
                Why::new(
                    "not_listed",
                    "neither is it held here, nor has the peer listed it as something that this \
                     node lacks and takes",
                )
                .fact(
                    "custody_free_bytes_here",
                    json!(usage.custody_max_bytes.saturating_sub(usage.custody_bytes)),
                )
            }
        };
        match &said.listed {
            Some(listed) => why
                .fact("kind", json!(listed.kind))
                .fact("origin", json!(listed.origin))
                .fact("sequence", json!(listed.sequence))
                .fact("bytes", json!(listed.size_bytes)),
            None => why,
        }
    }
}

#[cfg(test)]
mod tests {
    use tidelock_transport::session::Fault;

    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn segment(n: u64) -> SegmentRef {
        SegmentRef {
            id: SegmentId::of(&n.to_le_bytes()),
            kind: Kind::Audit,
            origin: Origin::parse("audit/x/0123456789abcdef/0").unwrap(),
            sequence: n,
            size_bytes: 1,
            prev: None,
        }
    }

    #[test]
    fn inv_07_what_peers_can_cause_is_counted_in_bounded_tables() {
        let seen = Seen::default();
        let refusal = Refusal {
            code: "STORE",
            message: "x".repeat(10_000),
            fault: Fault::Local,
        };
        for n in 0..2_000 {
            seen.peer_refused(&format!("reason-{n}"));
            seen.segment_refused(&node("b"), &segment(n), &refusal, n);
            seen.dial_failed(&node(&format!("n{n}")), n, "no answer in time");
        }
        let inner = seen.inner();
        assert!(inner.peers_refused.len() <= REASONS_MAX + 1);
        let counted: u64 = inner.peers_refused.values().sum();
        assert_eq!(counted, 2_000, "counts are exact");
        assert_eq!(inner.segments_refused["STORE"], 2_000);
        assert_eq!(inner.refused.len(), REFUSED_SEGMENTS_MAX);
        assert_eq!(inner.dials.len(), DIALS_MAX);
        drop(inner);
        let newest = seen.refusal(&node("b"), &segment(1_999).id).unwrap();
        assert_eq!(newest.message.len(), TEXT_MAX);
        assert!(seen.refusal(&node("b"), &segment(0).id).is_none());
        assert!(seen.refusal(&node("c"), &segment(1_999).id).is_none());
    }

    #[test]
    fn a_refusal_is_history_only_while_the_segment_is_on_its_way_again() {
        for standing in [
            Standing::Requested,
            Standing::Receiving,
            Standing::Admitting,
            Standing::Queued { held_until: None },
            Standing::Deferred,
        ] {
            assert!(is_under_way(&standing), "{standing:?}");
        }
        for standing in [
            Standing::SetAside,
            Standing::NotListed,
            Standing::NotEstablished,
        ] {
            assert!(!is_under_way(&standing), "{standing:?}");
        }
    }

    #[test]
    fn a_label_cannot_break_out_of_its_line() {
        let mut metric = Metric::new("x_total", "counter", "X.");
        metric.line(&[("issuer", "a\"} 1\nevil{b=\"\\")], 7);
        metric.seconds(&[], 61_005);
        let mut text = String::new();
        metric.end(&mut text);
        assert_eq!(
            text,
            "# HELP x_total X.\n# TYPE x_total counter\n\
             x_total{issuer=\"a\\\"} 1\\nevil{b=\\\"\\\\\"} 7\nx_total{} 61.005\n"
        );
        let mut nothing = String::new();
        Metric::new("y", "gauge", "Y.").end(&mut nothing);
        assert_eq!(nothing, "", "a head without lines is none");
    }
}
