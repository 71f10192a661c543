//! Bytes and round trips until two nodes know what the other lacks, counted between two session
//! machines: every frame as it is encoded.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use serde_json::json;
use tidelock_segments::{Head, Kind, LogKey, NodeId, Origin, SegmentId, SegmentRef};
use tidelock_transport::{
    frame::Frame,
    limits::MAX_IN_FLIGHT,
    session::{
        AnnouncedQuota, KindSet, LocalHello, PeerLimits, PeerPosture, Refusal, SessionConfig,
        SessionMachine, View,
    },
};
use tokio::runtime::Runtime;

use super::site::named;
use crate::{
    Row,
    peers::{domain, endorsement, text},
};

const ORIGINS: u64 = 1_000;
const SEGMENTS: u64 = 1_000_000;
/// One way.
const LATENCY: Duration = Duration::from_millis(50);
const AIM: &str = "<= 20 B an origin";
const AIM_TRIPS: &str = "<= 1";

pub fn rows(_: &Runtime, _: &Path) -> Vec<Row> {
    measure().unwrap_or_else(|why| vec![Row::not_run("reconcile-equal", "", AIM, why)])
}

/// A node that holds the first `each` segments of every origin, without any of them.
struct Holds {
    origins: Vec<(Origin, u64)>,
    each: BTreeMap<Origin, u64>,
}

fn id_of(origin: u64, sequence: u64) -> SegmentId {
    SegmentId::of(&[origin.to_le_bytes(), sequence.to_le_bytes()].concat())
}

impl Holds {
    fn new(each: impl Fn(u64) -> u64) -> Result<Self, String> {
        let mut origins = Vec::new();
        for number in 0..ORIGINS {
            let node = named(&format!("node-{number:04}"))?;
            let mut seed = [3; 32];
            seed[..8].copy_from_slice(&number.to_le_bytes());
            let key = LogKey::from_seed(&seed).map_err(text)?;
            origins.push((Origin::audit(&node, &key.public(), 1), number));
        }
        let each = origins.iter().map(|(origin, n)| (origin.clone(), each(*n)));
        Ok(Self {
            each: each.collect(),
            origins,
        })
    }

    fn number(&self, origin: &Origin) -> Option<u64> {
        let (_, number) = self.origins.iter().find(|(known, _)| known == origin)?;
        Some(*number)
    }
}

impl View for Holds {
    fn heads(&self) -> Vec<Head> {
        let heads = self.origins.iter().map(|(origin, _)| self.head(origin));
        heads.flatten().collect()
    }
    fn head(&self, origin: &Origin) -> Option<Head> {
        let last = self.each.get(origin)?.checked_sub(1)?;
        Some(Head {
            origin: origin.clone(),
            ranges: vec![(0, last)],
            last_id: id_of(self.number(origin)?, last),
        })
    }
    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        let (Some(number), Some(held)) = (self.number(origin), self.each.get(origin)) else {
            return Vec::new();
        };
        (from..=to.min(held.saturating_sub(1)))
            .take(max)
            .map(|sequence| SegmentRef {
                id: id_of(number, sequence),
                kind: Kind::Audit,
                origin: origin.clone(),
                sequence,
                size_bytes: 100_000,
                prev: sequence.checked_sub(1).map(|before| id_of(number, before)),
            })
            .collect()
    }
    fn reference(&self, _: &SegmentId) -> Option<SegmentRef> {
        None
    }
    fn wants_origin(&self, _: &Origin) -> bool {
        true
    }
    fn wants(&self, _: &SegmentRef) -> bool {
        true
    }
    fn receipt_wants(&self) -> Vec<SegmentId> {
        Vec::new()
    }
    fn receipt_for(&self, _: &SegmentId) -> Option<Vec<u8>> {
        None
    }
    fn take_receipt(&self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }
}

/// What went over the line.
#[derive(Default)]
struct Course {
    /// By type of frame: how many, and their bytes.
    frames: BTreeMap<String, (u64, u64)>,
    /// When both sides had answered the other's Hello, and when all was known.
    established: Duration,
    known: Duration,
}

impl Course {
    fn bytes_of(&self, greeting: bool) -> u64 {
        let hello = |name: &str| name.starts_with("Hello");
        let frames = self.frames.iter();
        frames
            .filter(|(name, _)| hello(name) == greeting)
            .map(|(_, (_, bytes))| bytes)
            .sum()
    }

    /// After the Hellos, which every session has.
    fn round_trips(&self) -> f64 {
        (self.known - self.established).as_secs_f64() / (2.0 * LATENCY.as_secs_f64())
    }
}

fn machine(node: &NodeId, peer: &NodeId, view: &Holds) -> Result<SessionMachine, String> {
    let mut seed = [9; 32];
    seed[0] = node.as_str().len() as u8;
    let key = LogKey::from_seed(&seed).map_err(text)?;
    let local = LocalHello {
        domain: domain(),
        node_id: node.clone(),
        limits: PeerLimits {
            kinds: KindSet::ALL,
            max_segment_bytes: tidelock_segments::limits::MAX_SEGMENT_BYTES,
            custody_free_bytes: u64::MAX,
            max_in_flight: MAX_IN_FLIGHT,
        },
        quota: AnnouncedQuota {
            frames_per_second: 50_000,
            in_bytes_per_second: 1 << 31,
            in_bytes_left_today: u64::MAX,
            out_bytes_per_second: 1 << 31,
        },
        posture: PeerPosture::Normal,
        endorsement: Some(endorsement(node, &key.public(), 1).encode().map_err(text)?),
    };
    let config = SessionConfig::default();
    Ok(SessionMachine::new(
        config,
        local,
        peer.clone(),
        [5; 32],
        Duration::ZERO,
        view,
    ))
}

/// Two nodes meet; ends when the first has asked for the `lacking` segments that it lacks and nothing
/// is on its way any more. A segment is there as soon as it is asked for: what moving it takes belongs
/// to other rows, but more is listed only as room for it comes free.
fn meet(views: [&Holds; 2], lacking: usize) -> Result<Course, String> {
    let names = [named("a")?, named("b")?];
    let mut sides = [
        machine(&names[0], &names[1], views[0])?,
        machine(&names[1], &names[0], views[1])?,
    ];
    let mut course = Course::default();
    let mut lines: [Vec<(Duration, Frame)>; 2] = [Vec::new(), Vec::new()];
    let mut now = Duration::ZERO;
    let mut asked = BTreeSet::new();
    loop {
        // No more than a session has in flight before its frames are written.
        for _ in 0..MAX_IN_FLIGHT {
            let Some(wanted) = sides[0].poll_want(now).cloned() else {
                break;
            };
            sides[0].fetch(&wanted.id, now);
            sides[0]
                .handle_segment(wanted.kind, &wanted.id, wanted.size_bytes, now)
                .map_err(|refusal| refusal.message)?;
            sides[0].handle_received(&wanted.id);
            sides[0].handle_admitted(&wanted.id, now);
            asked.insert(wanted.id);
        }
        for (side, machine) in sides.iter_mut().enumerate() {
            while let Some(frame) = machine.poll_frame() {
                if matches!(frame, Frame::Fetch(_)) {
                    continue;
                }
                let bytes = frame.encode().map_err(text)?.len() as u64;
                let name = format!("{frame:?}");
                let kind = name.split(['(', ' ']).next().unwrap_or_default().to_owned();
                let counted = course.frames.entry(kind).or_default();
                *counted = (counted.0 + 1, counted.1 + bytes);
                lines[1 - side].push((now + LATENCY, frame));
            }
            while machine.poll_event().is_some() {}
            if let Some(close) = machine.closed() {
                return Err(close.to_string());
            }
        }
        if sides[0].poll_want(now).is_some() {
            continue;
        }
        if course.established.is_zero() && sides.iter().all(SessionMachine::is_established) {
            course.established = now;
        }
        if !course.established.is_zero() && asked.len() == lacking && course.known.is_zero() {
            course.known = now;
        }
        // What is due next: a frame, or a machine's own time. Stalls are looked for much later.
        let due = lines.iter().flatten().map(|(at, _)| *at).min();
        let timers = sides.iter().filter_map(SessionMachine::poll_timeout).min();
        let next = match (due, timers) {
            (Some(due), Some(timer)) => due.min(timer),
            (Some(due), None) => due,
            (None, Some(timer)) if timer < now + Duration::from_secs(1) => timer,
            (None, _) => break,
        };
        now = now.max(next);
        for side in 0..2 {
            let line = std::mem::take(&mut lines[side]);
            let (here, later) = line.into_iter().partition(|(at, _)| *at <= now);
            lines[side] = later;
            let here: Vec<(Duration, Frame)> = here;
            for (_, frame) in here {
                sides[side].handle_frame(frame, now, views[side]);
            }
            if sides[side].poll_timeout().is_some_and(|at| at <= now) {
                sides[side].handle_timeout(now, views[side]);
            }
        }
    }
    if asked.len() != lacking {
        return Err(format!(
            "{} of {lacking} segments are known to be lacking",
            asked.len()
        ));
    }
    Ok(course)
}

fn measure() -> Result<Vec<Row>, String> {
    let full = Holds::new(|_| SEGMENTS / ORIGINS)?;
    // One more of every origin: 1,000 differences, spread as far as they can be.
    let spread = Holds::new(|_| SEGMENTS / ORIGINS + 1)?;
    let mut rows = Vec::new();
    for (id, trips_id, other, lacking) in [
        ("reconcile-equal", "reconcile-equal-trips", &full, 0),
        (
            "reconcile-1000-apart",
            "reconcile-1000-apart-trips",
            &spread,
            1_000,
        ),
    ] {
        let course = meet([&full, other], lacking)?;
        let (rest, trips) = (course.bytes_of(false), course.round_trips());
        let each = rest as f64 / ORIGINS as f64;
        let detail = json!({
            "bytes": rest, "hello_bytes": course.bytes_of(true), "frames": course.frames,
            "what": "all frames of both sides after the Hellos, until the lacking segments are known by id; first contact, so every origin is named once",
        });
        rows.push(Row::absolute(id, "B an origin", each, None, AIM, each <= 20.0).with(detail));
        rows.push(Row::absolute(
            trips_id,
            "round trips",
            trips,
            None,
            AIM_TRIPS,
            trips <= 1.0,
        ));
    }
    Ok(rows)
}
