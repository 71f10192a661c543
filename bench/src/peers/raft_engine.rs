//! raft-engine: TiKV's log. One region for each writer, as TiKV has it, every write with a sync.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use protobuf::well_known_types::BytesValue;
use raft_engine::{Config, Engine, LogBatch, MessageExt};

use super::{Log, text};

/// An entry is bytes; its index stands in front of them.
struct Entries;

impl MessageExt for Entries {
    type Entry = BytesValue;

    fn index(entry: &BytesValue) -> u64 {
        entry
            .value
            .first_chunk::<8>()
            .map_or(0, |index| u64::from_le_bytes(*index))
    }
}

struct RaftEngine {
    engine: Engine,
    next: Vec<AtomicU64>,
}

impl Log for RaftEngine {
    fn append(&self, writer: usize, record: &[u8]) -> Result<(), String> {
        let index = self.next[writer].fetch_add(1, Ordering::Relaxed);
        let mut entry = BytesValue::default();
        entry.value = [index.to_le_bytes().as_slice(), record].concat();
        let mut batch = LogBatch::with_capacity(1);
        batch
            .add_entries::<Entries>(writer as u64 + 1, &[entry])
            .map_err(text)?;
        self.engine.write(&mut batch, true).map(drop).map_err(text)
    }
}

fn engine(dir: &Path) -> Result<Engine, String> {
    let dir = dir.to_str().ok_or("a path that is no text")?.to_owned();
    Engine::open(Config {
        dir,
        ..Config::default()
    })
    .map_err(text)
}

pub fn open(dir: &Path, writers: usize) -> Result<Box<dyn Log>, String> {
    let next = (0..writers).map(|_| AtomicU64::new(1)).collect();
    Ok(Box::new(RaftEngine {
        engine: engine(dir)?,
        next,
    }))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let engine = engine(dir)?;
    let mut entries: Vec<BytesValue> = Vec::new();
    for region in engine.raft_groups() {
        if let (Some(first), Some(last)) = (engine.first_index(region), engine.last_index(region)) {
            engine
                .fetch_entries_to::<Entries>(region, first, last + 1, None, &mut entries)
                .map_err(text)?;
        }
    }
    Ok(entries
        .into_iter()
        .map(|entry| entry.value[8..].to_vec())
        .collect())
}
