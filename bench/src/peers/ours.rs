//! Our log, with leaf hashes, tree, signed checkpoints and sealing on, as a node runs it.

use std::{path::Path, sync::Arc, time::SystemTime};

use tidelock_segments::{
    AuditLog, Disk, DomainId, Endorsement, LogConfig, LogPublicKey, NodeId, RealDisk, RecordClass,
    Recovery, Root, RootOptions, SealOptions, Store,
};

use super::{Log, text};

/// The greatest size that a node chooses by itself.
pub const SEGMENT_BYTES: u64 = 8 << 20;
pub const CEILING_BYTES: u64 = 48 << 30;

pub struct Node {
    pub root: Arc<Root>,
    pub store: Arc<Store>,
    pub log: Arc<AuditLog>,
    pub recovery: Recovery,
}

pub fn domain() -> DomainId {
    DomainId::new("bench").expect("a domain")
}

/// As long as a real one with a chain of two certificates; whether a chain is good is not the
/// business of the log.
pub fn endorsement(node: &NodeId, key: &LogPublicKey, incarnation: u64) -> Endorsement {
    let certificate = |bytes: usize, seed: u8| {
        (0..bytes)
            .map(|n| (n as u8).wrapping_mul(151) ^ seed)
            .collect()
    };
    Endorsement {
        node_id: node.clone(),
        log_key: *key,
        incarnation,
        chain: vec![certificate(620, 1), certificate(480, 2)],
        scheme: 0x0403,
        signature: certificate(71, 3),
    }
}

pub fn now_unix_ms() -> u64 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_millis() as u64)
}

pub fn config(node: &NodeId, segment_bytes: u64) -> LogConfig {
    LogConfig {
        domain: domain(),
        node_id: node.clone(),
        segment_bytes,
        segment_max_age_ms: 3_600_000,
        custody_required: 1,
        min_retention_ms: 0,
        clock: Arc::new(now_unix_ms),
        archives: std::collections::BTreeSet::new(),
        overwrite_oldest: false,
        seal: SealOptions::default(),
    }
}

impl Node {
    pub fn open_with(
        disk: Arc<dyn Disk>,
        dir: &Path,
        ceiling_bytes: u64,
        segment_bytes: u64,
    ) -> Result<Self, String> {
        std::fs::create_dir_all(dir).map_err(text)?;
        let id = NodeId::new("n1").map_err(text)?;
        let options = RootOptions {
            ceiling_bytes,
            reserve_bytes: 1 << 20,
        };
        let root = Root::open(disk, dir, options).map_err(text)?;
        root.ledger().set_custody_max(ceiling_bytes / 2);
        let store = Store::open(root.clone(), domain()).map_err(text)?;
        let (log, recovery) = AuditLog::open(
            root.clone(),
            store.clone(),
            config(&id, segment_bytes),
            &|key, incarnation| Ok(endorsement(&id, key, incarnation)),
        )
        .map_err(text)?;
        Ok(Self {
            root,
            store,
            log,
            recovery,
        })
    }

    pub fn open(dir: &Path) -> Result<Self, String> {
        Self::open_with(Arc::new(RealDisk), dir, CEILING_BYTES, SEGMENT_BYTES)
    }

    /// The one place where records go in.
    pub fn append(&self, record: &[u8]) -> Result<(), String> {
        self.log
            .append(RecordClass::Decision, record.to_vec())
            .map(drop)
            .map_err(text)
    }
}

pub struct Ours(pub Node);

impl Log for Ours {
    fn append(&self, _: usize, record: &[u8]) -> Result<(), String> {
        self.0.append(record)
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.0.log.close();
    }
}

pub fn open(dir: &Path, _: usize) -> Result<Box<dyn Log>, String> {
    Ok(Box::new(Ours(Node::open(dir)?)))
}

pub fn read_back(dir: &Path) -> Result<Vec<Vec<u8>>, String> {
    let node = Node::open(dir)?;
    let records = node.log.tail(usize::MAX).map_err(text)?;
    node.log.close();
    Ok(records.into_iter().map(|(_, record)| record).collect())
}
