//! A node's root, store and log on a disk, for the tests of this crate.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of a #[test] function"
)]
#![allow(
    dead_code,
    reason = "each test file uses its own part of the common helpers"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidelock_segments::testing::{SimDisk, unchecked_endorsement};
use tidelock_segments::{
    AppendError, Appended, AuditLog, Checkpoint, Compression, CustodyReceipt, Disk, DomainId,
    Endorsement, Kind, LogConfig, LogError, LogKey, NodeId, Origin, RecordClass, Recovery, Root,
    RootOptions, SealOptions, SegmentHeader, SegmentId, SegmentRef, Store, VerifiedSegment, merkle,
    origin_line, seal_signed, verify_segment,
};

/// Long enough for a loaded machine; a test that waits for it has failed.
pub(crate) const LONG: Duration = Duration::from_secs(30);
pub(crate) const ROOT: &str = "/sim/root";
pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * 1024;

/// Says past the test runner that a test could not run; where CI can run everything, that is a failure.
pub(crate) fn not_run(test: &str, why: &str) {
    use std::io::Write as _;
    let mut past_the_runner = std::io::stderr();
    writeln!(past_the_runner, "not run: {test}: {why}").unwrap();
    let in_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(!in_ci, "{test} must run in CI: {why}");
}

pub(crate) fn domain() -> DomainId {
    DomainId::new("site").unwrap()
}

pub(crate) fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) node: &'static str,
    pub(crate) path: &'static str,
    pub(crate) ceiling: u64,
    pub(crate) reserve: u64,
    pub(crate) custody: usize,
    pub(crate) segment_bytes: u64,
    pub(crate) max_age_ms: u64,
    pub(crate) retention_ms: u64,
    pub(crate) archives: &'static [&'static str],
    pub(crate) overwrite_oldest: bool,
    /// Without threads, so that what is written is a function of what is asked for.
    pub(crate) inline: bool,
    pub(crate) clock: Arc<AtomicU64>,
    /// Without compression unless a test says otherwise: what tests append would shrink to nothing, and
    /// no ceiling would ever be reached.
    pub(crate) seal: SealOptions,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            node: "n1",
            path: ROOT,
            ceiling: 64 * MIB,
            reserve: 2 * MIB,
            custody: 1,
            segment_bytes: 128 * KIB,
            max_age_ms: 60_000,
            retention_ms: 0,
            archives: &[],
            overwrite_oldest: false,
            inline: false,
            clock: Arc::new(AtomicU64::new(1_700_000_000_000)),
            seal: SealOptions {
                compression: Compression::Off,
                ..SealOptions::default()
            },
        }
    }
}

pub(crate) struct Node {
    pub(crate) root: Arc<Root>,
    pub(crate) store: Arc<Store>,
    pub(crate) log: Arc<AuditLog>,
    pub(crate) recovery: Recovery,
}

impl Settings {
    pub(crate) fn config(&self) -> LogConfig {
        let clock = Arc::clone(&self.clock);
        LogConfig {
            domain: domain(),
            node_id: node(self.node),
            segment_bytes: self.segment_bytes,
            segment_max_age_ms: self.max_age_ms,
            custody_required: self.custody,
            archives: self.archives.iter().map(|name| node(name)).collect(),
            overwrite_oldest: self.overwrite_oldest,
            min_retention_ms: self.retention_ms,
            clock: Arc::new(move || clock.load(Ordering::SeqCst)),
            seal: self.seal.clone(),
        }
    }

    pub(crate) fn open_root(&self, disk: Arc<dyn Disk>) -> Result<Arc<Root>, LogError> {
        let options = RootOptions {
            ceiling_bytes: self.ceiling,
            reserve_bytes: self.reserve,
        };
        let root = Root::open(disk, Path::new(self.path), options)?;
        root.ledger().set_custody_max(self.ceiling / 4);
        Ok(root)
    }

    pub(crate) fn open(&self, disk: Arc<dyn Disk>) -> Result<Node, LogError> {
        let root = self.open_root(disk)?;
        let store = Store::open(Arc::clone(&root), domain())?;
        let name = node(self.node);
        let open = if self.inline {
            AuditLog::open_inline
        } else {
            AuditLog::open
        };
        let (log, recovery) = open(
            Arc::clone(&root),
            Arc::clone(&store),
            self.config(),
            &|key, incarnation| Ok(unchecked_endorsement(&name, key, incarnation)),
        )?;
        Ok(Node {
            root,
            store,
            log,
            recovery,
        })
    }

    /// Without threads, so that the disk sees the same calls in every run.
    pub(crate) fn open_inline(&self, disk: Arc<dyn Disk>) -> Result<Node, LogError> {
        let root = self.open_root(disk)?;
        let store = Store::open(Arc::clone(&root), domain())?;
        let name = node(self.node);
        let (log, recovery) = AuditLog::open_inline(
            Arc::clone(&root),
            Arc::clone(&store),
            self.config(),
            &|key, incarnation| Ok(unchecked_endorsement(&name, key, incarnation)),
        )?;
        Ok(Node {
            root,
            store,
            log,
            recovery,
        })
    }

    /// A root that has a log key already, the same for the same name: nothing random is left.
    pub(crate) fn plant_key(&self, disk: &SimDisk) {
        let root = Path::new(self.path);
        let keys = root.join("keys");
        for dir in [root, &keys] {
            disk.create_dir(dir).unwrap();
            disk.sync_dir(dir.parent().unwrap()).unwrap();
        }
        let key = key_of(self.node).to_pkcs8().unwrap();
        disk.plant(&keys.join("log.pk8"), &key);
    }

    pub(crate) fn sim(&self, disk: &SimDisk) -> Node {
        self.open(disk.disk()).unwrap()
    }
}

impl Node {
    pub(crate) fn append(&self, bytes: &[u8]) -> Result<Appended, AppendError> {
        self.log
            .append_wait(RecordClass::Decision, bytes.to_vec(), LONG)
    }

    pub(crate) fn state(&self, bytes: &[u8]) -> Result<Appended, AppendError> {
        self.log
            .append_wait(RecordClass::State, bytes.to_vec(), LONG)
    }

    pub(crate) fn records(&self) -> Vec<(u64, Vec<u8>)> {
        self.log.tail(usize::MAX).unwrap()
    }

    /// Waits until nothing but the active file is unsealed.
    pub(crate) fn wait_sealed(&self) {
        let start = std::time::Instant::now();
        while self.log.stat().unsealed_files > 1 {
            assert!(start.elapsed() < LONG, "{:?}", self.log.stat());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The ledger says what the disk says, once nothing is being written.
    pub(crate) fn assert_ledger(&self) {
        let start = std::time::Instant::now();
        // Files are sealed and made ready by a thread of their own, which may begin between the two
        // readings: each attempt compares one pair, and the pair that is compared is the one judged.
        loop {
            let usage = self.root.ledger().usage();
            let measured = self.root.measure().unwrap();
            assert_eq!(usage.overrun_bytes, 0);
            if usage.allocated_bytes == measured {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(2),
                "the disk has {measured} bytes: {usage:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Receipts of these custodians for one of this node's segments.
    pub(crate) fn licensed_by(&self, reference: &SegmentRef, custodians: &[&str]) {
        let segment = self.store.get(&reference.id).unwrap();
        for name in custodians {
            self.log.take_receipt(&receipt(&segment, name)).unwrap();
        }
    }
}

/// A custodian's key: the same for the same name.
pub(crate) fn key_of(name: &str) -> LogKey {
    let mut seed = [0x5a; 32];
    for (slot, byte) in seed.iter_mut().zip(name.bytes()) {
        *slot = byte;
    }
    LogKey::from_seed(&seed).unwrap()
}

pub(crate) fn endorsement_of(name: &str) -> Endorsement {
    unchecked_endorsement(&node(name), &key_of(name).public(), 1)
}

pub(crate) fn receipt(segment: &VerifiedSegment, custodian: &str) -> CustodyReceipt {
    CustodyReceipt::issue(
        segment,
        &node(custodian),
        1_700_000_000_000,
        &key_of(custodian),
        &endorsement_of(custodian),
    )
    .unwrap()
}

/// Sealed segments of another node's log, the same for the same name.
pub(crate) fn foreign_segments(name: &'static str, count: usize) -> Vec<VerifiedSegment> {
    let disk = SimDisk::new();
    let settings = Settings {
        node: name,
        ..Settings::default()
    };
    settings.plant_key(&disk);
    let other = settings.sim(&disk);
    let mut out = Vec::new();
    for i in 0..count {
        other
            .append(format!("{name} record {i}").as_bytes())
            .unwrap();
        let sealed = other.log.seal_now().unwrap().unwrap();
        out.push(other.store.get(&sealed.id).unwrap());
    }
    out
}

pub(crate) fn ids(refs: &[SegmentRef]) -> Vec<SegmentId> {
    refs.iter().map(|reference| reference.id).collect()
}

/// Segments of a node's log with one record each, in a form made by hand: two histories of one log
/// have the same records up to where they part.
pub(crate) fn history(name: &str, records: &[&str]) -> Vec<VerifiedSegment> {
    let key = key_of(name);
    let origin = Origin::audit(&node(name), &key.public(), 1);
    let line = origin_line(&domain(), &origin).unwrap();
    let mut tree = merkle::Frontier::new();
    let mut out: Vec<VerifiedSegment> = Vec::new();
    for (sequence, record) in (0u64..).zip(records) {
        // The body by docs/src/format.md, version 1.
        let mut body = 1_u16.to_le_bytes().to_vec();
        body.extend(sequence.to_le_bytes());
        body.extend(1_u32.to_le_bytes());
        for hash in tree.hashes() {
            body.extend(hash.as_bytes());
        }
        tree.append(merkle::leaf_hash(record.as_bytes()));
        let note = Checkpoint {
            origin_line: line.clone(),
            size: tree.size(),
            root: tree.root(),
        }
        .sign(&key);
        for part in [note.as_bytes(), record.as_bytes()] {
            body.extend(u32::try_from(part.len()).unwrap().to_le_bytes());
            body.extend(part);
        }
        let header = SegmentHeader {
            kind: Kind::Audit,
            domain: domain(),
            origin: origin.clone(),
            sequence,
            prev: out.last().map(VerifiedSegment::id),
            created_unix_ms: 1_700_000_000_000 + sequence,
        };
        let bytes = seal_signed(&header, &body, &key, &endorsement_of(name)).unwrap();
        out.push(verify_segment(bytes, None, &domain()).unwrap());
    }
    out
}
