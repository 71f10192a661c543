//! `tidelock peers qlog`: the course of a session as qlog, a JSON text sequence (RFC 7464) by
//! draft-ietf-quic-qlog-main-schema-02 (`qlog_version` 0.3), from samples of the node's status. The
//! session itself writes nothing (decision 0024): it can be held up by no sink.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{
    ConfigArg, Exit, Failure,
    node::{Door, at},
};
use crate::clock::wall_unix_ms;

/// What was told of the session with one peer so far.
#[derive(Debug, Default)]
struct Trace {
    /// How long the session had been connected at the last sample; none between sessions.
    connected_ms: Option<u64>,
    metrics: Map<String, Value>,
    packets: Value,
}

impl Trace {
    /// The first record of the file.
    fn header(node: &Value, peer: &str, state: &Value) -> Value {
        let side = match at(state, "/detail/outbound").as_bool() {
            Some(true) => "client",
            Some(false) => "server",
            None => "unknown",
        };
        json!({
            "qlog_version": "0.3",
            "qlog_format": "JSON-SEQ",
            "title": format!("tidelock: sessions with {peer}"),
            "trace": {
                "vantage_point": {"name": node, "type": side},
                "common_fields": {"time_format": "absolute", "protocol_type": ["QUIC", "tidelock"]},
            },
        })
    }

    /// What is new in the state of a peer, as events at `unix_ms`.
    fn events(&mut self, state: &Value, unix_ms: u64) -> Vec<Value> {
        let get = |name: &str| at(state, &format!("/detail/{name}")).clone();
        let mut events = Vec::new();
        let mut tell = |name: &str, data: Value| {
            events.push(json!({"time": unix_ms, "name": name, "data": data}));
        };
        let connected_ms = get("connected_ms").as_u64();
        // A session is younger than the one before only if it is another.
        let is_new = match (self.connected_ms, connected_ms) {
            (Some(before), Some(now)) => now < before,
            (None, Some(_)) => true,
            (_, None) => false,
        };
        if self.connected_ms.is_some() && (is_new || connected_ms.is_none()) {
            tell("tidelock:session_ended", get("last_close"));
            self.metrics.clear();
        }
        if is_new {
            tell(
                "tidelock:session_started",
                json!({
                    "address": at(state, "/address"),
                    "outbound": get("outbound"),
                    "congestion": get("congestion"),
                    "connected_ms": connected_ms,
                }),
            );
        }
        self.connected_ms = connected_ms;
        let mut metrics = Map::new();
        if let Some(us) = get("round_trip_us").as_u64() {
            // qlog has milliseconds with a fraction: as many as there are seconds in a thousand of it.
            let thousandfold = Duration::from_micros(us.saturating_mul(1_000));
            metrics.insert("smoothed_rtt".to_owned(), json!(thousandfold.as_secs_f64()));
        }
        if let Some(bytes) = get("window_bytes").as_u64() {
            metrics.insert("congestion_window".to_owned(), json!(bytes));
        }
        // By qlog an event has only the values that changed.
        let changed: Map<String, Value> = metrics
            .into_iter()
            .filter(|(name, value)| self.metrics.get(name) != Some(value))
            .collect();
        if !changed.is_empty() {
            self.metrics.extend(changed.clone());
            tell("recovery:metrics_updated", Value::Object(changed));
        }
        let packets = json!({
            "sent": get("sent_packets"),
            "lost": get("lost_packets"),
            "lost_bytes": get("lost_bytes"),
        });
        if packets != self.packets {
            self.packets.clone_from(&packets);
            tell("tidelock:packets", packets);
        }
        events
    }
}

/// One record of a JSON text sequence.
fn record(value: &Value) -> String {
    format!("\u{1e}{value}\n")
}

fn find<'s>(status: &'s Value, peer: &str) -> Result<&'s Value, Failure> {
    let peers = at(status, "/mesh/peers").as_array();
    let found = peers.into_iter().flatten().find(|p| at(p, "/id") == peer);
    found.ok_or_else(|| {
        let known: Vec<&str> = peers
            .into_iter()
            .flatten()
            .filter_map(|p| at(p, "/id").as_str())
            .collect();
        Failure::cannot_run(format!(
            "this node knows no peer {peer}; it knows: {}",
            match known.is_empty() {
                true => "none".to_owned(),
                false => known.join(", "),
            }
        ))
    })
}

/// Writes samples to standard output until `time` is over.
///
/// # Errors
/// No such peer, no node that answers, or nobody who reads.
pub(super) fn write(
    peer: &str,
    time: Duration,
    interval: Duration,
    config: &ConfigArg,
) -> Result<Exit, Failure> {
    let door = Door::of(config)?;
    let mut out = std::io::stdout().lock();
    let mut trace = Trace::default();
    let begun = Instant::now();
    let mut is_first = true;
    loop {
        let status = door.get("/v1/status")?;
        let state = find(&status, peer)?;
        let mut text = String::new();
        if std::mem::take(&mut is_first) {
            text = record(&Trace::header(at(&status, "/node"), peer, state));
        }
        for event in trace.events(state, wall_unix_ms()) {
            text.push_str(&record(&event));
        }
        // Flushed at once: it may be watched, and the command may be stopped at any time.
        out.write_all(text.as_bytes())?;
        out.flush()?;
        if begun.elapsed() >= time {
            return Ok(Exit::Done);
        }
        std::thread::sleep(interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(connected_ms: Option<u64>, rtt_us: u64, lost: u64) -> Value {
        json!({
            "id": "b", "address": "127.0.0.1:1",
            "detail": {
                "connected_ms": connected_ms, "outbound": connected_ms.map(|_| true),
                "round_trip_us": connected_ms.map(|_| rtt_us),
                "window_bytes": connected_ms.map(|_| 14_720),
                "sent_packets": 9, "lost_packets": lost, "lost_bytes": lost * 1_200,
                "last_close": {"code": "lost"},
            },
        })
    }

    fn names(events: &[Value]) -> Vec<&str> {
        events.iter().filter_map(|e| e["name"].as_str()).collect()
    }

    #[test]
    fn only_what_changed_is_told_and_a_new_session_is_told_apart() {
        let mut trace = Trace::default();
        let all = [
            "tidelock:session_started",
            "recovery:metrics_updated",
            "tidelock:packets",
        ];
        assert_eq!(names(&trace.events(&state(Some(5), 1_500, 0), 1)), all);
        assert!(trace.events(&state(Some(105), 1_500, 0), 2).is_empty());
        let events = trace.events(&state(Some(205), 2_500, 0), 3);
        assert_eq!(
            events,
            [json!({"time": 3, "name": "recovery:metrics_updated", "data": {"smoothed_rtt": 2.5}})]
        );
        let events = trace.events(&state(Some(305), 2_500, 1), 4);
        assert_eq!(names(&events), ["tidelock:packets"]);
        // Between two samples one ended and the next began.
        let events = trace.events(&state(Some(5), 2_500, 1), 5);
        let anew = [
            "tidelock:session_ended",
            "tidelock:session_started",
            "recovery:metrics_updated",
        ];
        assert_eq!(names(&events), anew);
        assert_eq!(
            names(&trace.events(&state(None, 0, 1), 6)),
            ["tidelock:session_ended"]
        );
        assert!(trace.events(&state(None, 0, 1), 7).is_empty());
    }

    #[test]
    fn a_record_is_one_of_rfc_7464() {
        let header = Trace::header(&json!("a"), "b", &state(Some(1), 1, 0));
        assert_eq!(header["trace"]["vantage_point"]["type"], "client");
        let text = record(&header);
        let inner = text
            .strip_prefix('\u{1e}')
            .and_then(|rest| rest.strip_suffix('\n'))
            .expect("RS, the text, LF");
        assert!(!inner.contains('\n'));
        assert_eq!(serde_json::from_str::<Value>(inner).expect("JSON"), header);
    }

    #[test]
    fn a_peer_that_is_not_there_is_named_beside_those_that_are() {
        let status = json!({"mesh": {"peers": [state(None, 0, 0)]}});
        assert!(find(&status, "b").is_ok());
        let why = find(&status, "c").expect_err("unknown").message;
        assert!(why.contains('c') && why.ends_with("it knows: b"), "{why}");
    }
}
