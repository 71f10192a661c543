//! Our log without leaf hashes, tree and signatures: only to weigh what those cost.

use std::{path::Path, sync::Arc};

use tidelock_segments_bare::{
    AuditLog, DomainId, Endorsement, LogConfig, LogPublicKey, MISSING, NodeId, RealDisk,
    RecordClass, Root, RootOptions, SealOptions, Store,
};

use super::{
    Log, System,
    ours::{self, CEILING_BYTES, SEGMENT_BYTES},
    text,
};

pub const BARE: System = System {
    name: "the same log without them",
    open,
    read_back,
};

struct Bare(Arc<AuditLog>);

impl Log for Bare {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        self.0
            .append(RecordClass::Decision, record.to_vec())
            .map(drop)
            .map_err(text)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn log(dir: &Path) -> Result<Arc<AuditLog>, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let (domain, node) = (
        DomainId::new("bench").map_err(text)?,
        NodeId::new("n1").map_err(text)?,
    );
    let options = RootOptions {
        ceiling_bytes: CEILING_BYTES,
        reserve_bytes: 1 << 20,
    };
    let root = Root::open(Arc::new(RealDisk), dir, options).map_err(text)?;
    let store = Store::open(root.clone(), domain.clone()).map_err(text)?;
    let config = LogConfig {
        domain,
        node_id: node.clone(),
        segment_bytes: SEGMENT_BYTES,
        segment_max_age_ms: 3_600_000,
        custody_required: 1,
        min_retention_ms: 0,
        clock: Arc::new(ours::now_unix_ms),
        archives: std::collections::BTreeSet::new(),
        overwrite_oldest: false,
        seal: SealOptions::default(),
    };
    AuditLog::open(root, store, config, &|key, incarnation| {
        Ok(endorsement(&node, key, incarnation))
    })
    .map(|(log, _)| log)
    .map_err(text)
}

/// Of the same size as [`ours::endorsement`].
fn endorsement(node: &NodeId, key: &LogPublicKey, incarnation: u64) -> Endorsement {
    Endorsement {
        node_id: node.clone(),
        log_key: *key,
        incarnation,
        chain: vec![vec![1; 620], vec![2; 480]],
        scheme: 0x0403,
        signature: vec![3; 71],
    }
}

fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    Ok(Box::new(Bare(log(dir)?)))
}

fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let log = log(dir)?;
    let records = log.tail(usize::MAX).map_err(text)?;
    log.close();
    Ok(records.into_iter().map(|(_, record)| record).collect())
}

/// Whether everything was cut that had to be, and records still come back.
pub fn bare_is_bare(dir: &Path) -> Result<(), String> {
    if !MISSING.is_empty() {
        return Err(format!("bench/bare does not find in the source: {MISSING}"));
    }
    super::check(&BARE, dir)
}
