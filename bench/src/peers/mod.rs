//! The peers of `just bench segments`, and our log in the same clothes: a record goes in and is
//! durable when the call returns. Each is set up as its documentation says a durable log is made.

mod bare;
mod fjall;
mod okaywal;
mod ours;
mod raft_engine;
pub mod raw;
mod redb;
mod sqlite;

use std::{collections::BTreeSet, path::Path};

pub use self::{
    bare::{BARE, bare_is_bare},
    ours::{CEILING_BYTES, Node, Ours, SEGMENT_BYTES, domain, endorsement},
    raw::Raw,
};

/// An open log.
pub trait Log: Send + Sync {
    /// Durable when it returns.
    fn append(&self, writer: usize, record: &[u8]) -> Result<(), String>;
}

/// Something that keeps records durably.
pub struct System {
    pub name: &'static str,
    pub open: fn(&Path, usize) -> Result<Box<dyn Log>, String>,
    /// Opens what an ended log left, and reads all of its records.
    pub read_back: fn(&Path) -> Result<Vec<Vec<u8>>, String>,
}

pub const OURS: &str = "tidelock";

/// Ours first; the argument of `open` is the number of writers.
pub const SYSTEMS: [System; 6] = [
    System {
        name: OURS,
        open: ours::open,
        read_back: ours::read_back,
    },
    System {
        name: "okaywal 0.3.1",
        open: okaywal::open,
        read_back: okaywal::read_back,
    },
    System {
        name: "raft-engine 0.4.2",
        open: raft_engine::open,
        read_back: raft_engine::read_back,
    },
    System {
        name: "sqlite (wal, full)",
        open: sqlite::open,
        read_back: sqlite::read_back,
    },
    System {
        name: "redb 4.4",
        open: redb::open,
        read_back: redb::read_back,
    },
    System {
        name: "fjall 3.1",
        open: fjall::open,
        read_back: fjall::read_back,
    },
];

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// 64 hexadecimal digits that no compressor can foretell, others for every number.
fn hash(n: u64) -> String {
    let mut out = String::with_capacity(64);
    for part in 0..4 {
        // splitmix64 over a counter of its own for every part: no two records share one.
        let mut z = n
            .wrapping_mul(4)
            .wrapping_add(part)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        out.push_str(&format!("{:016x}", z ^ (z >> 31)));
    }
    out
}

/// A record of exactly `bytes` bytes in the form of a decision's, no two alike: the number is in the
/// resource and in a hash.
pub fn decision(n: u64, bytes: usize) -> Vec<u8> {
    let (hash, agent, at) = (hash(n), n % 97, 1_790_000_000_000 + n / 50);
    let head = format!(
        "{{\"action\":\"fs.read\",\"action_hash\":\"{hash}\",\"at\":{at},\"caller\":{{\"door\":\"http\",\
         \"id\":\"agent-{agent:02}\",\"type\":\"Agent\"}},\"decision\":\"allow\",\"node\":\"n1\",\
         \"policies\":[\"read-own\"],\"posture\":\"normal\",\"reason\":\"POLICY_ALLOW\",\
         \"resource\":{{\"id\":\"/srv/"
    );
    let tail = format!("/{n:09}.csv\",\"type\":\"File\"}},\"type\":\"decision\",\"v\":1}}");
    let room = bytes.saturating_sub(head.len() + tail.len());
    let mut record = head.into_bytes();
    record.extend(
        b"reports/2026/quarterly/region-north/"
            .iter()
            .cycle()
            .take(room),
    );
    record.extend(tail.as_bytes());
    record
}

/// A record with every field that the interceptor writes (docs/src/records.md). With `own_params` it
/// has parameters of its own, so a second hash without a like, and a request id.
pub fn full_decision(n: u64, own_params: bool) -> Vec<u8> {
    let (agent, at, own) = (n % 97, 1_790_000_000_000 + n / 50, hash(n));
    let (params, params_hash, request) = if own_params {
        let random = hash(!n);
        let id = format!(
            "{}-{}-4{}-8{}-{}",
            &random[..8],
            &random[8..12],
            &random[12..15],
            &random[15..18],
            &random[18..30]
        );
        (
            format!("\"params\":{{\"limit\":{},\"offset\":{}}},", n % 50, n * 50),
            hash(n ^ (1 << 60)),
            format!("\"request_id\":\"{id}\","),
        )
    } else {
        (String::new(), hash(u64::MAX), String::new())
    };
    format!(
        "{{\"action\":\"fs.read\",\"action_hash\":\"{own}\",\"at\":{at},\"bundle\":{{\"epoch\":7,\"hash\":\"{}\",\
         \"name\":\"base\",\"source\":\"active\"}},\"caller\":{{\"door\":\"http\",\"id\":\"agent-{agent:02}\",\
         \"type\":\"Agent\"}},\"decision\":\"allow\",\"node\":\"n1\",{params}\"params_hash\":\"{params_hash}\",\
         \"policies\":[\"read-own\"],\"posture\":\"normal\",\"principal\":{{\"id\":\"agent-{agent:02}\",\
         \"type\":\"Agent\"}},\"reason\":\"POLICY_ALLOW\",{request}\"resource\":{{\
         \"id\":\"/srv/reports/2026/region-north/{n:09}.csv\",\"type\":\"File\"}},\"type\":\"decision\",\"v\":1}}",
        hash(u64::MAX - 1)
    )
    .into_bytes()
}

/// Eight writers append, the log is closed and opened again: is all of it there?
pub fn check(system: &System, dir: &Path) -> Result<(), String> {
    const WRITERS: usize = 8;
    const EACH: u64 = 120;
    let log = (system.open)(dir, WRITERS)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let log = &log;
                scope.spawn(move || {
                    (0..EACH).try_for_each(|n| {
                        log.append(writer, &decision(writer as u64 * EACH + n, 512))
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().map_err(|_| "a writer panicked".to_owned())?)
    })?;
    drop(log);
    let held: BTreeSet<Vec<u8>> = (system.read_back)(dir)?.into_iter().collect();
    let missing = (0..WRITERS as u64 * EACH)
        .filter(|n| !held.contains(&decision(*n, 512)))
        .count();
    if missing > 0 {
        return Err(format!(
            "{}: {missing} acknowledged records are not there after a reopen",
            system.name
        ));
    }
    Ok(())
}
