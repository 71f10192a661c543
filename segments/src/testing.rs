//! A simulated disk for tests of this crate and of those above it. Not for production.
//!
//! [`SimDisk`] is a file system in memory that knows what has been synced. [`SimDisk::crash`] is a
//! loss of power: of every write that was not synced, any subset of its 512-byte sectors survives;
//! of the name changes in every directory that were not synced, any prefix does. A rename from one
//! directory to another may leave both names, or only the new or only the old, never none. A failed
//! sync loses the unsynced writes of that file in the way that Linux does: reading still shows them,
//! and the next sync succeeds. Faults and the moment of the crash are given as the number of the
//! writing call, so a test can walk through all of them, and one seed gives one outcome.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{
    Disk, DiskError, DiskFault, DiskFile, DiskOp, FileKind, FileStat, OpenMode, Volume,
};
use crate::id::NodeId;
use crate::keys::{Endorsement, LogPublicKey};

const SECTOR: usize = 512;
const BLOCK: u64 = 4096;

/// An endorsement with a chain and signature of nonsense: fits wherever only this crate looks, and
/// is refused by whoever checks the certificate chain.
#[must_use]
pub fn unchecked_endorsement(
    node_id: &NodeId,
    log_key: &LogPublicKey,
    incarnation: u64,
) -> Endorsement {
    Endorsement {
        node_id: node_id.clone(),
        log_key: *log_key,
        incarnation,
        chain: vec![b"no certificate".to_vec()],
        scheme: 0x0403,
        signature: b"no signature".to_vec(),
    }
}

/// What survives of everything that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// A subset that this seed gives.
    Seed(u64),
}

/// A sequence of pseudo-random numbers (splitmix64).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Survival {
    fn random(self) -> Random {
        Random(match self {
            Self::Seed(seed) => seed,
            Self::None | Self::All => 0,
        })
    }

    fn keeps(self, random: &mut Random) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Seed(_) => random.next() & 1 == 1,
        }
    }

    /// How many of `count` things in order survive.
    fn prefix(self, random: &mut Random, count: u64) -> u64 {
        match self {
            Self::None => 0,
            Self::All => count,
            Self::Seed(_) => random.next() % (count + 1),
        }
    }
}

#[derive(Debug, Clone)]
struct Write {
    offset: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Inode {
    dir: bool,
    cached: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Write>,
    opens: usize,
}

impl Inode {
    fn new(dir: bool) -> Self {
        Self {
            dir,
            cached: Vec::new(),
            durable: Vec::new(),
            pending: Vec::new(),
            opens: 0,
        }
    }

    fn allocated(&self) -> u64 {
        if self.dir {
            BLOCK
        } else {
            (self.cached.len() as u64).next_multiple_of(BLOCK)
        }
    }

    fn settle(&mut self, survival: Survival, random: &mut Random) {
        for write in std::mem::take(&mut self.pending) {
            let mut at = 0;
            while at < write.bytes.len() {
                let to_sector_end = SECTOR - (write.offset + at) % SECTOR;
                let piece = to_sector_end.min(write.bytes.len() - at);
                if survival.keeps(random) {
                    let bytes = write.bytes.get(at..at + piece).unwrap_or_default();
                    overwrite(&mut self.durable, write.offset + at, bytes);
                }
                at += piece;
            }
        }
        self.cached.clone_from(&self.durable);
        self.opens = 0;
    }
}

fn overwrite(target: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if target.len() < end {
        target.resize(end, 0);
    }
    if let Some(place) = target.get_mut(offset..end) {
        place.copy_from_slice(bytes);
    }
}

#[derive(Debug, Clone)]
enum Change {
    Link {
        path: PathBuf,
        ino: u64,
        rename: Option<u64>,
    },
    Unlink {
        path: PathBuf,
        rename: Option<u64>,
    },
}

#[derive(Debug)]
struct Sim {
    inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    changes: Vec<(PathBuf, Change)>,
    next_ino: u64,
    next_rename: u64,
    locked: BTreeSet<u64>,
    generation: u64,
    off: bool,
    calls: u64,
    crash_at: Option<u64>,
    faults: BTreeMap<u64, DiskFault>,
    capacity: u64,
    peak: u64,
    syncs: u64,
    synced_renames: BTreeSet<u64>,
    boots: u64,
    network: Option<&'static str>,
    copy_on_write: Option<&'static str>,
}

impl Sim {
    /// Bytes as `du` would see them, unlinked but open files included. What only a crash could bring
    /// back takes no space now.
    fn allocated(&self) -> u64 {
        let named: BTreeSet<u64> = self.names.values().copied().collect();
        self.inodes
            .iter()
            .filter(|(ino, inode)| **ino > BASE_INO && (named.contains(ino) || inode.opens > 0))
            .map(|(_, inode)| inode.allocated())
            .sum()
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(self.allocated());
    }

    /// Counts one writing call. `Ok(true)` means: do it, then lose power.
    fn call(&mut self, op: DiskOp, path: &Path) -> Result<bool, DiskError> {
        self.alive(op, path)?;
        self.calls += 1;
        if let Some(fault) = self.faults.get(&self.calls) {
            return Err(DiskError::new(op, path, *fault));
        }
        Ok(self.crash_at == Some(self.calls))
    }

    fn alive(&self, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        if self.off {
            Err(DiskError::new(op, path, POWER_LOST))
        } else {
            Ok(())
        }
    }

    fn end(&mut self, crash: bool, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        self.note_peak();
        self.off |= crash;
        self.alive(op, path)
    }

    fn inode(&mut self, ino: u64) -> &mut Inode {
        self.inodes.entry(ino).or_insert_with(|| Inode::new(false))
    }

    fn room(&self, more: u64) -> bool {
        self.allocated().saturating_add(more) <= self.capacity
    }

    fn change(&mut self, change: Change) {
        let path = match &change {
            Change::Link { path, ino, .. } => {
                self.names.insert(path.clone(), *ino);
                path
            }
            Change::Unlink { path, .. } => {
                self.names.remove(path);
                path
            }
        };
        let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
        self.changes.push((dir, change));
    }

    fn apply(names: &mut BTreeMap<PathBuf, u64>, change: &Change) {
        match change {
            Change::Link { path, ino, .. } => {
                names.insert(path.clone(), *ino);
            }
            Change::Unlink { path, .. } => {
                names.remove(path);
            }
        }
    }

    fn parent_is_dir(&self, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let is_dir = self
            .names
            .get(parent)
            .and_then(|ino| self.inodes.get(ino))
            .is_some_and(|inode| inode.dir);
        if is_dir {
            Ok(())
        } else {
            Err(DiskError::new(op, path, DiskFault::NotFound))
        }
    }

    fn crash(&mut self, survival: Survival) {
        let mut random = survival.random();
        let mut per_dir: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for (dir, _) in &self.changes {
            *per_dir.entry(dir.clone()).or_default() += 1;
        }
        for count in per_dir.values_mut() {
            *count = survival.prefix(&mut random, *count);
        }
        let mut linked: BTreeSet<u64> = BTreeSet::new();
        let mut unlinks = Vec::new();
        for (dir, change) in std::mem::take(&mut self.changes) {
            let left = per_dir.entry(dir).or_default();
            if *left == 0 {
                continue;
            }
            *left -= 1;
            match &change {
                Change::Link {
                    rename: Some(rename),
                    ..
                } => {
                    linked.insert(*rename);
                    Self::apply(&mut self.durable_names, &change);
                }
                Change::Unlink {
                    rename: Some(_), ..
                } => unlinks.push(change),
                Change::Link { .. } | Change::Unlink { .. } => {
                    Self::apply(&mut self.durable_names, &change);
                }
            }
        }
        for change in unlinks {
            if let Change::Unlink {
                rename: Some(rename),
                ..
            } = &change
                && (linked.contains(rename) || self.synced_renames.contains(rename))
            {
                Self::apply(&mut self.durable_names, &change);
            }
        }
        // A name below a directory that did not survive leads nowhere.
        let dirs: BTreeSet<PathBuf> = self.durable_names.keys().cloned().collect();
        self.durable_names.retain(|path, _| {
            path.ancestors()
                .skip(1)
                .all(|dir| dir == Path::new("/") || dirs.contains(dir))
        });
        self.names.clone_from(&self.durable_names);
        let named: BTreeSet<u64> = self.names.values().copied().collect();
        self.inodes.retain(|ino, _| named.contains(ino));
        for inode in self.inodes.values_mut() {
            inode.settle(survival, &mut random);
        }
        self.synced_renames.clear();
        self.locked.clear();
        self.generation += 1;
        self.boots += 1;
        self.off = false;
        self.crash_at = None;
        self.faults.clear();
        self.note_peak();
    }
}

/// `/` and `/sim`, which stand for the world outside the root.
const BASE_INO: u64 = 2;

/// What every call answers after the power is lost.
const POWER_LOST: DiskFault = DiskFault::Os(5);

/// A file system in memory, rooted at `/sim`. Clones share it.
#[derive(Debug, Clone)]
pub struct SimDisk {
    sim: Arc<Mutex<Sim>>,
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl SimDisk {
    /// An empty disk of great capacity.
    #[must_use]
    pub fn new() -> Self {
        let base: BTreeMap<PathBuf, u64> =
            [(PathBuf::from("/"), 1), (PathBuf::from("/sim"), BASE_INO)].into();
        Self {
            sim: Arc::new(Mutex::new(Sim {
                inodes: [(1, Inode::new(true)), (BASE_INO, Inode::new(true))].into(),
                names: base.clone(),
                durable_names: base,
                changes: Vec::new(),
                next_ino: BASE_INO + 1,
                next_rename: 0,
                locked: BTreeSet::new(),
                generation: 0,
                off: false,
                calls: 0,
                crash_at: None,
                faults: BTreeMap::new(),
                capacity: u64::MAX / 2,
                peak: 0,
                syncs: 0,
                synced_renames: BTreeSet::new(),
                boots: 0,
                network: None,
                copy_on_write: None,
            })),
        }
    }

    /// The same disk as a trait object.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    fn sim(&self) -> MutexGuard<'_, Sim> {
        self.sim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Limits the disk; beyond it every write answers [`DiskFault::NoSpace`].
    pub fn set_capacity(&self, bytes: u64) {
        self.sim().capacity = bytes;
    }

    /// Makes the disk claim to be a network file system.
    pub fn set_network(&self, name: Option<&'static str>) {
        self.sim().network = name;
    }

    /// Makes the disk claim to write every change to another place.
    pub fn set_copy_on_write(&self, name: Option<&'static str>) {
        self.sim().copy_on_write = name;
    }

    /// How many writing calls there were.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.sim().calls
    }

    /// How many syncs of files succeeded.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.sim().syncs
    }

    /// The writing call with this number, counted from the first ever as 1, fails once.
    pub fn fail_call(&self, number: u64, fault: DiskFault) {
        self.sim().faults.insert(number, fault);
    }

    /// The power is lost during the writing call with this number; then every call fails until
    /// [`SimDisk::crash`].
    pub fn crash_at_call(&self, number: u64) {
        self.sim().crash_at = Some(number);
    }

    /// Whether the power is lost.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.sim().off
    }

    /// Loses power now, if it is not lost yet, and starts the machine again with what survives. Open
    /// files are dead, locks are gone.
    pub fn crash(&self, survival: Survival) {
        self.sim().crash(survival);
    }

    /// Kills the processes but not the machine: what was written is there, locks are gone.
    pub fn kill(&self) {
        let mut sim = self.sim();
        sim.generation += 1;
        sim.locked.clear();
        for inode in sim.inodes.values_mut() {
            inode.opens = 0;
        }
        sim.off = false;
        sim.crash_at = None;
        sim.faults.clear();
    }

    /// Bytes allocated now, as `du` would count them below `/sim`.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.sim().allocated()
    }

    /// The most that was ever allocated.
    #[must_use]
    pub fn peak_allocated(&self) -> u64 {
        self.sim().peak
    }

    /// A file's content as a reader sees it now.
    #[must_use]
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let sim = self.sim();
        let ino = sim.names.get(path)?;
        sim.inodes.get(ino).map(|inode| inode.cached.clone())
    }

    /// Puts a file there, durably, past every rule and count: a foreign hand.
    pub fn plant(&self, path: &Path, bytes: &[u8]) {
        let mut sim = self.sim();
        let ino = match sim.names.get(path) {
            Some(ino) => *ino,
            None => {
                sim.next_ino += 1;
                let ino = sim.next_ino;
                sim.names.insert(path.to_owned(), ino);
                sim.durable_names.insert(path.to_owned(), ino);
                ino
            }
        };
        let inode = sim.inode(ino);
        inode.pending.clear();
        inode.cached = bytes.to_vec();
        inode.durable = bytes.to_vec();
    }

    /// Changes bits of one byte of a file, on the device and in the cache.
    pub fn flip(&self, path: &Path, offset: usize, bits: u8) {
        if let Some(mut bytes) = self.content(path) {
            if let Some(byte) = bytes.get_mut(offset) {
                *byte ^= bits;
            }
            self.plant(path, &bytes);
        }
    }

    /// The paths of all files, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let sim = self.sim();
        let is_file = |ino: &u64| sim.inodes.get(ino).is_some_and(|inode| !inode.dir);
        sim.names
            .iter()
            .filter(|(_, ino)| is_file(ino))
            .map(|(path, _)| path.clone())
            .collect()
    }

    /// Copies a tree to another name, with new inodes, durably: a restored backup or a clone.
    pub fn copy_tree(&self, from: &Path, to: &Path) {
        let mut sim = self.sim();
        let entries: Vec<(PathBuf, u64)> = sim
            .names
            .iter()
            .filter_map(|(path, ino)| Some((to.join(path.strip_prefix(from).ok()?), *ino)))
            .collect();
        for (path, ino) in entries {
            let path: PathBuf = path.components().collect();
            let Some(mut inode) = sim.inodes.get(&ino).cloned() else {
                continue;
            };
            inode.opens = 0;
            inode.durable.clone_from(&inode.cached);
            inode.pending.clear();
            sim.next_ino += 1;
            let new = sim.next_ino;
            sim.inodes.insert(new, inode);
            sim.names.insert(path.clone(), new);
            sim.durable_names.insert(path, new);
        }
    }

    fn handle(&self, sim: &mut Sim, ino: u64, path: &Path, locks: bool) -> Box<dyn DiskFile> {
        sim.inode(ino).opens += 1;
        if locks {
            sim.locked.insert(ino);
        }
        Box::new(SimFile {
            sim: Arc::clone(&self.sim),
            ino,
            path: path.to_owned(),
            generation: sim.generation,
            locks,
        })
    }

    fn create(sim: &mut Sim, op: DiskOp, path: &Path, dir: bool) -> Result<u64, DiskError> {
        sim.parent_is_dir(op, path)?;
        if sim.names.contains_key(path) {
            return Err(DiskError::new(op, path, DiskFault::Exists));
        }
        let crash = sim.call(op, path)?;
        if dir && !sim.room(BLOCK) {
            return Err(DiskError::new(op, path, DiskFault::NoSpace));
        }
        sim.next_ino += 1;
        let ino = sim.next_ino;
        sim.inodes.insert(ino, Inode::new(dir));
        sim.change(Change::Link {
            path: path.to_owned(),
            ino,
            rename: None,
        });
        sim.end(crash, op, path)?;
        Ok(ino)
    }
}

impl Disk for SimDisk {
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError> {
        Ok(path.to_owned())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError> {
        let mut sim = self.sim();
        sim.alive(DiskOp::Open, path)?;
        let ino = if mode == OpenMode::CreateNew {
            Self::create(&mut sim, DiskOp::Open, path, false)?
        } else {
            let missing = || DiskError::new(DiskOp::Open, path, DiskFault::NotFound);
            let ino = *sim.names.get(path).ok_or_else(missing)?;
            if sim.inode(ino).dir {
                return Err(DiskError::new(DiskOp::Open, path, DiskFault::NotPlain));
            }
            ino
        };
        Ok(self.handle(&mut sim, ino, path, false))
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let mut sim = self.sim();
        sim.alive(DiskOp::Lock, path)?;
        let ino = match sim.names.get(path) {
            Some(ino) => *ino,
            None => Self::create(&mut sim, DiskOp::Lock, path, false)?,
        };
        if sim.locked.contains(&ino) {
            return Err(DiskError::new(DiskOp::Lock, path, DiskFault::Busy));
        }
        Ok(self.handle(&mut sim, ino, path, true))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        let mut sim = self.sim();
        let crash = sim.call(DiskOp::Rename, to)?;
        sim.parent_is_dir(DiskOp::Rename, to)?;
        let missing = || DiskError::new(DiskOp::Rename, from, DiskFault::NotFound);
        let ino = *sim.names.get(from).ok_or_else(missing)?;
        sim.next_rename += 1;
        let rename = Some(sim.next_rename);
        sim.change(Change::Link {
            path: to.to_owned(),
            ino,
            rename,
        });
        sim.change(Change::Unlink {
            path: from.to_owned(),
            rename,
        });
        sim.end(crash, DiskOp::Rename, to)
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        let mut sim = self.sim();
        let crash = sim.call(DiskOp::Remove, path)?;
        if !sim.names.contains_key(path) {
            return Err(DiskError::new(DiskOp::Remove, path, DiskFault::NotFound));
        }
        sim.change(Change::Unlink {
            path: path.to_owned(),
            rename: None,
        });
        sim.end(crash, DiskOp::Remove, path)
    }

    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        let mut sim = self.sim();
        sim.alive(DiskOp::CreateDir, path)?;
        Self::create(&mut sim, DiskOp::CreateDir, path, true).map(|_| ())
    }

    fn sync_dir(&self, path: &Path) -> Result<(), DiskError> {
        let mut sim = self.sim();
        let crash = sim.call(DiskOp::SyncDir, path)?;
        if crash {
            return sim.end(true, DiskOp::SyncDir, path);
        }
        let (synced, left): (Vec<_>, Vec<_>) = std::mem::take(&mut sim.changes)
            .into_iter()
            .partition(|(dir, _)| dir == path);
        sim.changes = left;
        for (_, change) in synced {
            if let Change::Link {
                rename: Some(rename),
                ..
            } = &change
            {
                sim.synced_renames.insert(*rename);
            }
            Sim::apply(&mut sim.durable_names, &change);
        }
        Ok(())
    }

    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError> {
        let sim = self.sim();
        sim.alive(DiskOp::ReadDir, path)?;
        if !sim.names.contains_key(path) {
            return Err(DiskError::new(DiskOp::ReadDir, path, DiskFault::NotFound));
        }
        Ok(sim
            .names
            .keys()
            .filter(|name| name.parent() == Some(path))
            .filter_map(|name| name.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect())
    }

    fn stat(&self, path: &Path) -> Result<FileStat, DiskError> {
        let sim = self.sim();
        sim.alive(DiskOp::Stat, path)?;
        let missing = || DiskError::new(DiskOp::Stat, path, DiskFault::NotFound);
        let ino = sim.names.get(path).ok_or_else(missing)?;
        Ok(stat(&sim, *ino))
    }

    fn volume(&self, path: &Path) -> Result<Volume, DiskError> {
        let sim = self.sim();
        sim.alive(DiskOp::Volume, path)?;
        Ok(Volume {
            block_bytes: BLOCK,
            available_bytes: sim.capacity.saturating_sub(sim.allocated()),
            network: sim.network,
            copy_on_write: sim.copy_on_write,
        })
    }

    fn boot_id(&self) -> Result<String, DiskError> {
        Ok(format!("boot-{}", self.sim().boots))
    }

    fn own_uid(&self) -> u32 {
        1000
    }
}

fn stat(sim: &Sim, ino: u64) -> FileStat {
    let (dir, len, allocated_bytes) = sim.inodes.get(&ino).map_or((false, 0, 0), |inode| {
        (inode.dir, inode.cached.len(), inode.allocated())
    });
    FileStat {
        kind: if dir { FileKind::Dir } else { FileKind::File },
        len: len as u64,
        allocated_bytes,
        dev: 7,
        ino,
        nlink: sim.names.values().filter(|named| **named == ino).count() as u64,
        mode: if dir { 0o700 } else { 0o600 },
        uid: 1000,
    }
}

#[derive(Debug)]
struct SimFile {
    sim: Arc<Mutex<Sim>>,
    ino: u64,
    path: PathBuf,
    generation: u64,
    locks: bool,
}

impl SimFile {
    fn sim(&self, op: DiskOp) -> Result<MutexGuard<'_, Sim>, DiskError> {
        let sim = self.sim.lock().unwrap_or_else(PoisonError::into_inner);
        if sim.generation != self.generation {
            return Err(DiskError::new(op, &self.path, POWER_LOST));
        }
        sim.alive(op, &self.path)?;
        Ok(sim)
    }

    fn put(&self, op: DiskOp, offset: u64, bytes: Vec<u8>) -> Result<(), DiskError> {
        let mut sim = self.sim(op)?;
        let crash = sim.call(op, &self.path)?;
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let inode = sim.inode(self.ino);
        let before = inode.allocated();
        let after = ((offset + bytes.len()).max(inode.cached.len()) as u64).next_multiple_of(BLOCK);
        if !sim.room(after - before) {
            return Err(DiskError::new(op, &self.path, DiskFault::NoSpace));
        }
        let inode = sim.inode(self.ino);
        overwrite(&mut inode.cached, offset, &bytes);
        inode.pending.push(Write { offset, bytes });
        sim.end(crash, op, &self.path)
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let mut sim = self.sim(DiskOp::Read)?;
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        match sim
            .inode(self.ino)
            .cached
            .get(offset..offset.saturating_add(buffer.len()))
        {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(DiskError::new(DiskOp::Read, &self.path, DiskFault::Short)),
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.put(DiskOp::Write, offset, bytes.to_vec())
    }

    fn sync_data(&self) -> Result<(), DiskError> {
        let mut sim = self.sim(DiskOp::Sync)?;
        match sim.call(DiskOp::Sync, &self.path) {
            Ok(true) => sim.end(true, DiskOp::Sync, &self.path),
            Ok(false) => {
                let mut random = Survival::All.random();
                let inode = sim.inode(self.ino);
                let (cached, opens) = (inode.cached.clone(), inode.opens);
                inode.settle(Survival::All, &mut random);
                // A sync that failed before lost writes for good; they are still in the cache.
                inode.cached = cached;
                inode.opens = opens;
                let len = inode.cached.len();
                if inode.durable.len() < len {
                    inode.durable.resize(len, 0);
                }
                sim.syncs += 1;
                Ok(())
            }
            Err(error) => {
                sim.inode(self.ino).pending.clear();
                Err(error)
            }
        }
    }

    fn allocate(&self, len: u64) -> Result<(), DiskError> {
        let have = self.sim(DiskOp::Allocate)?.inode(self.ino).cached.len() as u64;
        let missing = usize::try_from(len.saturating_sub(have)).unwrap_or(0);
        self.put(DiskOp::Allocate, have, vec![0; missing])
    }

    fn zero_fill(&self, len: u64) -> Result<(), DiskError> {
        let len = usize::try_from(len).unwrap_or(0);
        self.put(DiskOp::Allocate, 0, vec![0; len])
    }

    fn stat(&self) -> Result<FileStat, DiskError> {
        let sim = self.sim(DiskOp::Stat)?;
        Ok(stat(&sim, self.ino))
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut sim = self.sim.lock().unwrap_or_else(PoisonError::into_inner);
        if sim.generation != self.generation {
            return;
        }
        if let Some(inode) = sim.inodes.get_mut(&self.ino) {
            inode.opens = inode.opens.saturating_sub(1);
        }
        if self.locks {
            sim.locked.remove(&self.ino);
        }
    }
}
