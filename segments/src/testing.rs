//! A simulated disk for tests of this crate and of those above it. Not for production.
//!
//! [`SimDisk`] is a file system in memory, rooted at `/sim`, that knows what has been synced.
//!
//! **Loss of power** ([`SimDisk::crash`], or [`Snapshot::image`] for a chosen outcome). Of every
//! write that was not synced any subset of its 512-byte sectors survives, each whole; a sector
//! written twice may come back in either state. Of the name changes in every directory that was not
//! synced any prefix survives, whatever survives of data and of other directories: a name may be
//! there without its data, and data without its name is gone. A rename within one directory is one
//! change; from one directory to another it may leave both names, only the new or only the old,
//! never none. A synced file whose directory was not synced may lose its name.
//!
//! **Errors** ([`SimDisk::inject`], [`SimDisk::inject_from`], [`SimDisk::fail_reading`]). Calls are
//! numbered from the first ever as 1: those that write (create, write, allocate, sync, sync of a
//! directory, rename, remove, make a directory) and, apart from them, those that read (open, read,
//! stat, list). Any may fail with any fault, before or after it was done ([`Fault`]). A failed sync
//! loses the unsynced writes of that file in the way that Linux does: reading still shows them and
//! the next sync succeeds; [`SimDisk::drop_caches`] then shows what the device has.
//!
//! **Lies of the device**: a sync that does nothing ([`Fault::LostSync`]), a write that never
//! arrives, arrives elsewhere, or there as well, or with other bits ([`Fault::LostWrite`],
//! [`Fault::Misdirected`], [`Fault::Duplicated`], [`Fault::Flipped`]); sectors that rot or cannot be
//! read ([`SimDisk::flip`], [`SimDisk::flip_on_device`], [`SimDisk::spoil_sector`]).
//!
//! **Surroundings**: a foreign hand plants, replaces or removes files, open ones too
//! ([`SimDisk::plant`], [`SimDisk::replace`], [`SimDisk::unlink`]); another tenant fills the file
//! system ([`SimDisk::set_tenant`]); calls take time on a virtual clock ([`SimDisk::set_latency`],
//! [`Fault::Slow`], [`SimDisk::clock`]).
//!
//! Everything is a function of the calls and of the seeds given: no clock, no thread, no randomness
//! of its own. [`SimDisk::digest`] tells whether two runs ended alike. Contents are shared pages, so
//! a [`Snapshot`] before every call ([`SimDisk::record`]) costs microseconds, and one run of a
//! workload gives every crash image of it:
//!
//! ```
//! use tidelock_segments::testing::{Bound, SimDisk};
//! use tidelock_segments::{Disk, OpenMode};
//!
//! let disk = SimDisk::new();
//! let path = std::path::Path::new("/sim/file");
//! disk.record();
//! let file = disk.open(path, OpenMode::CreateNew)?;
//! file.write_at(0, &[7; 1024])?;
//! file.sync_data()?;
//! disk.sync_dir("/sim".as_ref())?;
//! let mut seen = std::collections::BTreeSet::new();
//! for before in disk.recorded() {
//!     for survivors in before.survivors(&Bound::SMALL) {
//!         seen.insert(before.image(&survivors).content(path));
//!     }
//! }
//! // No name, no bytes, one sector or the other, or both.
//! assert_eq!(seen.len(), 5);
//! # Ok::<(), tidelock_segments::DiskError>(())
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{
    Disk, DiskError, DiskFault, DiskFile, DiskOp, FileKind, FileStat, OpenMode, Volume,
};
use crate::format::{FormatError, SegmentHeader, seal_unsigned};
use crate::id::{DomainId, NodeId, Origin};
use crate::keys::{Endorsement, LogPublicKey};

mod content;
mod survival;

use self::content::{Content, Data};
pub use self::survival::{Bound, Survival, Survivors};
use self::survival::{Random, mix};

const SECTOR_BYTES: usize = 512;
const BLOCK_BYTES: u64 = 4096;

/// A segment of policy or revocation, which carries no signature of its own: the bytes of it, first of
/// its kind and with the time 0.
///
/// # Errors
/// [`FormatError`]: an audit origin, or what no segment can hold.
pub fn unsigned_segment(
    domain: &DomainId,
    origin: Origin,
    sequence: u64,
    body: &[u8],
) -> Result<Vec<u8>, FormatError> {
    let header = SegmentHeader {
        kind: origin.kind(),
        domain: domain.clone(),
        origin,
        sequence,
        prev: None,
        created_unix_ms: 0,
    };
    seal_unsigned(&header, body)
}

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

/// What goes wrong in a writing call. A fault that does not suit the call (a lost sync where a
/// rename is made) does nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The call fails and nothing is done. A sync that fails drops the file's unsynced writes.
    Fail(DiskFault),
    /// The call fails although it was done; of a write, only the first half of its sectors.
    FailDone(DiskFault),
    /// A sync of a file or directory succeeds and persists nothing.
    LostSync,
    /// A write succeeds, and is seen in the cache, but never arrives on the device.
    LostWrite,
    /// A write succeeds, and is seen in the cache, but arrives elsewhere on the device.
    Misdirected(Place),
    /// A write arrives where it should and elsewhere on the device too.
    Duplicated(Place),
    /// A write arrives on the device with these bits of one of its bytes changed.
    Flipped {
        /// Which byte of the write.
        byte: usize,
        /// Which bits of it.
        bits: u8,
    },
    /// The call takes this long on the virtual clock.
    Slow {
        /// How long.
        delay_us: u64,
    },
}

/// Where a stray write arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file; `None` is the one that was meant. Nothing happens if there is no such file.
    pub path: Option<PathBuf>,
    /// The offset in it. A write past the end of the file arrives nowhere.
    pub offset: u64,
}

/// How the device treats one write.
#[derive(Debug, Clone)]
enum Stray {
    Lost,
    Misdirected(u64, usize),
    Duplicated(u64, usize),
    Flipped(usize, u8),
}

#[derive(Debug, Clone)]
struct Write {
    call: u64,
    offset: usize,
    data: Data,
    stray: Option<Stray>,
}

impl Write {
    fn end(&self) -> usize {
        self.offset + self.data.len()
    }
}

#[derive(Debug, Clone)]
struct Inode {
    dir: bool,
    /// Names that lead to it now.
    links: u64,
    opens: u64,
    cached: Content,
    durable: Content,
    pending: Vec<Write>,
    /// Cache and device differ in more than what is pending.
    diverged: bool,
}

impl Inode {
    fn new(dir: bool) -> Self {
        Self {
            dir,
            links: 0,
            opens: 0,
            cached: Content::default(),
            durable: Content::default(),
            pending: Vec::new(),
            diverged: false,
        }
    }

    fn allocated(&self) -> u64 {
        if self.dir {
            BLOCK_BYTES
        } else {
            self.cached.allocated()
        }
    }

    /// Bytes that it takes now. What only a crash could bring back takes none.
    fn weight(&self) -> u64 {
        if self.links > 0 || self.opens > 0 {
            self.allocated()
        } else {
            0
        }
    }
}

/// A part of an unsynced write that survives or does not.
#[derive(Debug, Clone, Copy)]
struct Piece {
    ino: u64,
    write: usize,
    call: u64,
    from: usize,
    to: usize,
}

/// One change of a name: it leads to an inode now, or nowhere.
#[derive(Debug, Clone)]
struct Change {
    dir: Arc<Path>,
    path: Arc<Path>,
    link: Option<u64>,
    rename: Option<u64>,
    /// The second half of a rename within one directory: never cut off from the first.
    tied: bool,
    call: u64,
}

type Names = BTreeMap<Arc<Path>, u64>;

fn apply(names: &mut Names, change: &Change) {
    match change.link {
        Some(ino) => {
            names.insert(Arc::clone(&change.path), ino);
        }
        None => {
            names.remove(&change.path);
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

#[derive(Debug, Clone)]
struct Sim {
    inodes: BTreeMap<u64, Arc<Inode>>,
    names: Names,
    durable_names: Names,
    changes: Vec<Change>,
    next_ino: u64,
    next_rename: u64,
    synced_renames: BTreeSet<u64>,
    locked: BTreeSet<u64>,
    generation: u64,
    boots: u64,
    off: bool,
    calls: u64,
    readings: u64,
    /// The last call that made anything durable, and the last that changed anything.
    durable_at: u64,
    changed_at: u64,
    syncs: u64,
    crash_at: Option<u64>,
    faults: BTreeMap<u64, Fault>,
    standing: Option<(u64, Fault)>,
    reading_faults: BTreeMap<u64, DiskFault>,
    spoilt: BTreeSet<(u64, usize)>,
    capacity: u64,
    tenant: u64,
    used: u64,
    peak: u64,
    network: Option<&'static str>,
    copy_on_write: Option<&'static str>,
    now_us: u64,
    latency_us: BTreeMap<&'static str, u64>,
}

/// `/` and `/sim`, which stand for the world outside the root.
const BASE_INO: u64 = 2;

/// What every call answers after the power is lost.
const POWER_LOST: DiskFault = DiskFault::Os(5);

/// What reading a sector that rotted away answers.
const UNREADABLE: DiskFault = DiskFault::Os(5);

/// What a call is to do besides its work.
#[derive(Debug, Default)]
struct Turn {
    crash: bool,
    fault: Option<Fault>,
}

impl Sim {
    fn new() -> Self {
        let base: Names = [
            (Arc::from(Path::new("/")), 1),
            (Arc::from(Path::new("/sim")), BASE_INO),
        ]
        .into();
        let dir = || {
            let mut inode = Inode::new(true);
            inode.links = 1;
            Arc::new(inode)
        };
        Self {
            inodes: [(1, dir()), (BASE_INO, dir())].into(),
            names: base.clone(),
            durable_names: base,
            changes: Vec::new(),
            next_ino: BASE_INO + 1,
            next_rename: 0,
            synced_renames: BTreeSet::new(),
            locked: BTreeSet::new(),
            generation: 0,
            boots: 0,
            off: false,
            calls: 0,
            readings: 0,
            durable_at: 0,
            changed_at: 0,
            syncs: 0,
            crash_at: None,
            faults: BTreeMap::new(),
            standing: None,
            reading_faults: BTreeMap::new(),
            spoilt: BTreeSet::new(),
            capacity: u64::MAX / 2,
            tenant: 0,
            used: 0,
            peak: 0,
            network: None,
            copy_on_write: None,
            now_us: 0,
            latency_us: BTreeMap::new(),
        }
    }

    fn alive(&self, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        if self.off {
            Err(DiskError::new(op, path, POWER_LOST))
        } else {
            Ok(())
        }
    }

    fn pass_time(&mut self, op: DiskOp) {
        if !self.latency_us.is_empty() {
            let each = self.latency_us.get(key_of(op)).copied().unwrap_or(0);
            self.now_us = self.now_us.saturating_add(each);
        }
    }

    /// Counts one reading call.
    fn reading(&mut self, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        self.alive(op, path)?;
        self.readings += 1;
        self.pass_time(op);
        match self.reading_faults.get(&self.readings) {
            Some(fault) => Err(DiskError::new(op, path, *fault)),
            None => Ok(()),
        }
    }

    /// Counts one writing call. If it is the last one, the caller does it and then loses power.
    fn writing(&mut self, op: DiskOp, path: &Path) -> Result<Turn, DiskError> {
        self.alive(op, path)?;
        self.calls += 1;
        self.pass_time(op);
        let standing = self
            .standing
            .as_ref()
            .filter(|(from, _)| self.calls >= *from)
            .map(|(_, fault)| fault);
        let fault = self.faults.get(&self.calls).or(standing).cloned();
        let crash = self.crash_at == Some(self.calls);
        match fault {
            Some(Fault::Fail(fault)) => Err(DiskError::new(op, path, fault)),
            Some(Fault::Slow { delay_us }) => {
                self.now_us = self.now_us.saturating_add(delay_us);
                Ok(Turn { crash, fault: None })
            }
            fault => Ok(Turn { crash, fault }),
        }
    }

    /// The end of a call that was done.
    fn end(&mut self, turn: &Turn, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        self.off |= turn.crash;
        self.alive(op, path)?;
        match turn.fault {
            Some(Fault::FailDone(fault)) => Err(DiskError::new(op, path, fault)),
            _ => Ok(()),
        }
    }

    /// Changes an inode and keeps the sum of what is allocated.
    fn change_inode<T>(&mut self, ino: u64, change: impl FnOnce(&mut Inode) -> T) -> T {
        let inode = self
            .inodes
            .entry(ino)
            .or_insert_with(|| Arc::new(Inode::new(false)));
        let before = inode.weight();
        let inode = Arc::make_mut(inode);
        let out = change(inode);
        if ino > BASE_INO {
            self.used = self.used.saturating_sub(before) + inode.weight();
            self.peak = self.peak.max(self.used);
        }
        out
    }

    fn count_used(&mut self) {
        self.used = self
            .inodes
            .iter()
            .filter(|(ino, _)| **ino > BASE_INO)
            .map(|(_, inode)| inode.weight())
            .sum();
        self.peak = self.peak.max(self.used);
    }

    /// Writing over blocks that a file has needs no room.
    fn room(&self, more: u64) -> bool {
        more == 0 || self.used.saturating_add(self.tenant).saturating_add(more) <= self.capacity
    }

    fn name(&mut self, path: &Arc<Path>, link: Option<u64>) {
        let old = match link {
            Some(ino) => self.names.insert(Arc::clone(path), ino),
            None => self.names.remove(path),
        };
        if let Some(ino) = link {
            self.change_inode(ino, |inode| inode.links += 1);
        }
        if let Some(old) = old {
            self.change_inode(old, |inode| inode.links = inode.links.saturating_sub(1));
        }
    }

    fn change(&mut self, path: &Arc<Path>, link: Option<u64>, rename: Option<u64>, tied: bool) {
        self.name(path, link);
        self.changed_at = self.calls;
        self.changes.push(Change {
            dir: parent(path).into(),
            path: Arc::clone(path),
            link,
            rename,
            tied,
            call: self.calls,
        });
    }

    fn parent_is_dir(&self, op: DiskOp, path: &Path) -> Result<(), DiskError> {
        let is_dir = self
            .names
            .get(parent(path))
            .and_then(|ino| self.inodes.get(ino))
            .is_some_and(|inode| inode.dir);
        if is_dir {
            Ok(())
        } else {
            Err(DiskError::new(op, path, DiskFault::NotFound))
        }
    }

    /// Makes a directory's names durable, and of a rename out of it the other half too.
    fn sync_names(&mut self, dir: &Path) {
        let moved: BTreeSet<u64> = self
            .changes
            .iter()
            .filter(|change| *change.dir == *dir && change.link.is_none())
            .filter_map(|change| change.rename)
            .collect();
        // The new name, and what was done before it in its directory, goes with the old one.
        let mut until: BTreeMap<Arc<Path>, usize> = BTreeMap::new();
        for (at, change) in self.changes.iter().enumerate() {
            let other = change.link.is_some() && change.rename.is_some_and(|r| moved.contains(&r));
            if *change.dir == *dir || other {
                until.insert(Arc::clone(&change.dir), at);
            }
        }
        let mut left = Vec::new();
        for (at, change) in std::mem::take(&mut self.changes).into_iter().enumerate() {
            if until.get(&change.dir).is_some_and(|last| at <= *last) {
                if let (Some(rename), Some(_)) = (change.rename, change.link) {
                    self.synced_renames.insert(rename);
                }
                apply(&mut self.durable_names, &change);
                self.durable_at = self.calls;
            } else {
                left.push(change);
            }
        }
        self.changes = left;
    }

    /// The unsynced writes in the pieces that survive or do not. What would change nothing is left
    /// out.
    fn pieces(&self) -> Vec<Piece> {
        let mut out = Vec::new();
        for (ino, inode) in &self.inodes {
            let mut touched: BTreeSet<usize> = BTreeSet::new();
            for (index, write) in inode.pending.iter().enumerate() {
                let (start, end) = (write.offset, write.end());
                let first = start / SECTOR_BYTES;
                let last = end.div_ceil(SECTOR_BYTES);
                let mut push = |from, to| {
                    out.push(Piece {
                        ino: *ino,
                        write: index,
                        call: write.call,
                        from,
                        to,
                    });
                };
                let only_length = matches!(write.data, Data::Zeros(_))
                    && write.stray.is_none()
                    && touched.range(first..last).next().is_none()
                    && inode.durable.is_zero(start, end);
                if only_length {
                    let cuts = [
                        start,
                        ((first + 1) * SECTOR_BYTES).min(end),
                        (last.saturating_sub(1) * SECTOR_BYTES).max(start),
                        end,
                    ];
                    let mut from = start;
                    for to in cuts {
                        if to > from && to > inode.durable.len() {
                            push(from, to);
                            from = to;
                        }
                    }
                    continue;
                }
                for sector in first..last {
                    let from = (sector * SECTOR_BYTES).max(start);
                    let to = ((sector + 1) * SECTOR_BYTES).min(end);
                    let fresh = touched.insert(sector);
                    let idle = fresh
                        && write.stray.is_none()
                        && inode.durable.has(start, &write.data, from, to);
                    if !idle {
                        push(from, to);
                    }
                }
            }
        }
        out
    }

    /// Puts a part of a pending write on the device, wherever the device puts it.
    fn arrive(&mut self, ino: u64, write: &Write, from: usize, to: usize) {
        let elsewhere = match &write.stray {
            None | Some(Stray::Lost | Stray::Flipped(..)) => None,
            Some(Stray::Misdirected(ino, offset) | Stray::Duplicated(ino, offset)) => {
                Some((*ino, *offset))
            }
        };
        if let Some((target, offset)) = elsewhere {
            let at = offset.saturating_add(from - write.offset);
            let len = to - from;
            self.change_inode(target, |inode| {
                if at.saturating_add(len) <= inode.durable.len() {
                    let mut part = Content::default();
                    part.put(write.offset, &write.data, write.offset, write.end());
                    let mut bytes = vec![0; len];
                    part.read(from, &mut bytes);
                    inode.durable.write(at, &bytes);
                    inode.diverged = true;
                }
            });
        }
        let astray = matches!(write.stray, Some(Stray::Lost | Stray::Misdirected(..)));
        self.change_inode(ino, |inode| {
            if astray {
                inode.diverged = true;
                return;
            }
            inode.durable.put(write.offset, &write.data, from, to);
            if let Some(Stray::Flipped(byte, bits)) = write.stray
                && (from..to).contains(&(write.offset + byte))
            {
                let mut one = [0];
                inode.durable.read(write.offset + byte, &mut one);
                inode
                    .durable
                    .write(write.offset + byte, &one.map(|b| b ^ bits));
                inode.diverged = true;
            }
        });
    }

    /// A sync that really happens.
    fn sync_file(&mut self, ino: u64) {
        let pending = self.change_inode(ino, |inode| std::mem::take(&mut inode.pending));
        let len = self.inodes.get(&ino).map_or(0, |inode| inode.cached.len());
        let plain = pending.iter().all(|write| write.stray.is_none());
        let shared = self.change_inode(ino, |inode| {
            // A sync that failed before lost writes for good, though they are still in the cache.
            let shared = plain && !inode.diverged;
            if shared {
                inode.durable = inode.cached.clone();
            }
            shared
        });
        if !shared {
            for write in &pending {
                self.arrive(ino, write, write.offset, write.end());
            }
            self.change_inode(ino, |inode| inode.durable.extend(len));
        }
        if !pending.is_empty() {
            self.durable_at = self.calls;
        }
        self.syncs += 1;
    }

    /// How many changes of names each directory has that may be lost, in the order of directories.
    fn unsynced_names(&self) -> BTreeMap<Arc<Path>, usize> {
        let mut counts = BTreeMap::new();
        for change in self.changes.iter().filter(|change| !change.tied) {
            *counts.entry(Arc::clone(&change.dir)).or_insert(0) += 1;
        }
        counts
    }

    /// The choice that a survival makes.
    fn choose(&self, survival: Survival) -> Survivors {
        let mut random = Random(match survival {
            Survival::Seed(seed) => seed,
            Survival::None | Survival::All => 0,
        });
        let names = self
            .unsynced_names()
            .values()
            .map(|count| match survival {
                Survival::None => 0,
                Survival::All => *count,
                Survival::Seed(_) => survival::below(&mut random, count + 1),
            })
            .collect();
        let pieces = self
            .pieces()
            .iter()
            .map(|_| match survival {
                Survival::None => false,
                Survival::All => true,
                Survival::Seed(_) => random.next() & 1 == 1,
            })
            .collect();
        Survivors {
            kill: false,
            pieces,
            names,
        }
    }

    fn kill(&mut self) {
        self.generation += 1;
        self.locked.clear();
        for inode in self.inodes.values_mut() {
            if inode.opens > 0 {
                Arc::make_mut(inode).opens = 0;
            }
        }
        self.count_used();
        self.calm();
    }

    /// No fault and no crash is planned any more.
    fn calm(&mut self) {
        self.off = false;
        self.crash_at = None;
        self.faults.clear();
        self.reading_faults.clear();
        self.standing = None;
    }

    fn crash(&mut self, survivors: &Survivors) {
        if survivors.kill {
            return self.kill();
        }
        let mut left: BTreeMap<Arc<Path>, usize> = self.unsynced_names();
        for (count, kept) in left.values_mut().zip(&survivors.names) {
            *count = (*count).min(*kept);
        }
        let mut linked: BTreeSet<u64> = BTreeSet::new();
        let mut moved_away = Vec::new();
        for change in std::mem::take(&mut self.changes) {
            if change.tied {
                // The other half of it came just before.
                if change.rename.is_some_and(|rename| linked.contains(&rename)) {
                    apply(&mut self.durable_names, &change);
                }
                continue;
            }
            let Some(left) = left.get_mut(&change.dir).filter(|left| **left > 0) else {
                continue;
            };
            *left -= 1;
            match (change.rename, change.link) {
                (Some(_), None) => moved_away.push(change),
                (rename, _) => {
                    linked.extend(rename);
                    apply(&mut self.durable_names, &change);
                }
            }
        }
        for change in moved_away {
            let new_name =
                |rename| linked.contains(&rename) || self.synced_renames.contains(&rename);
            if change.rename.is_some_and(new_name) {
                apply(&mut self.durable_names, &change);
            }
        }
        // A name below a directory that did not survive leads nowhere.
        let dirs: BTreeSet<Arc<Path>> = self.durable_names.keys().cloned().collect();
        self.durable_names
            .retain(|path, _| path.ancestors().skip(1).all(|dir| dirs.contains(dir)));
        for (piece, kept) in self.pieces().iter().zip(&survivors.pieces) {
            let write = self
                .inodes
                .get(&piece.ino)
                .and_then(|inode| inode.pending.get(piece.write))
                .cloned();
            if let Some(write) = write.filter(|_| *kept) {
                self.arrive(piece.ino, &write, piece.from, piece.to);
            }
        }
        self.names = self.durable_names.clone();
        let mut links: BTreeMap<u64, u64> = BTreeMap::new();
        for ino in self.names.values() {
            *links.entry(*ino).or_default() += 1;
        }
        self.inodes.retain(|ino, _| links.contains_key(ino));
        for (ino, inode) in &mut self.inodes {
            let count = links.get(ino).copied().unwrap_or(0);
            let clean = inode.pending.is_empty() && !inode.diverged;
            if clean && inode.links == count && inode.opens == 0 {
                continue;
            }
            let inode = Arc::make_mut(inode);
            inode.links = count;
            inode.opens = 0;
            if !clean {
                inode.pending.clear();
                inode.diverged = false;
                inode.cached = inode.durable.clone();
            }
        }
        self.count_used();
        self.synced_renames.clear();
        self.locked.clear();
        self.generation += 1;
        self.boots += 1;
        self.calm();
    }

    fn stat(&self, ino: u64) -> FileStat {
        let (dir, len, allocated_bytes, nlink) =
            self.inodes.get(&ino).map_or((false, 0, 0, 0), |inode| {
                (
                    inode.dir,
                    inode.cached.len(),
                    inode.allocated(),
                    inode.links,
                )
            });
        FileStat {
            kind: if dir { FileKind::Dir } else { FileKind::File },
            len: len as u64,
            allocated_bytes,
            dev: 7,
            ino,
            nlink,
            mode: if dir { 0o700 } else { 0o600 },
            uid: 1000,
        }
    }
}

/// A word for each operation, as the key of its latency.
fn key_of(op: DiskOp) -> &'static str {
    match op {
        DiskOp::Open => "open",
        DiskOp::Read => "read",
        DiskOp::Write => "write",
        DiskOp::Allocate => "allocate",
        DiskOp::Sync | DiskOp::SyncDir => "sync",
        _ => "other",
    }
}

/// The disk as it stood before one writing call. Cheap to keep and to copy.
#[derive(Debug, Clone)]
pub struct Snapshot {
    sim: Sim,
    op: DiskOp,
    path: PathBuf,
}

impl Snapshot {
    /// The number of the writing call before which it was taken.
    #[must_use]
    pub fn call(&self) -> u64 {
        self.sim.calls + 1
    }

    /// What that call does, and on which path; for the snapshot at the end it names the root.
    #[must_use]
    pub fn next(&self) -> (DiskOp, &Path) {
        (self.op, &self.path)
    }

    /// What may survive a loss of power here, within the bound; see [`Bound`].
    #[must_use]
    pub fn survivors(&self, bound: &Bound) -> Vec<Survivors> {
        let names: Vec<usize> = self.sim.unsynced_names().into_values().collect();
        survival::choices(self.sim.pieces().len(), &names, bound)
    }

    /// How many pieces of data and changes of names are not synced.
    #[must_use]
    pub fn unsynced(&self) -> (usize, usize) {
        (
            self.sim.pieces().len(),
            self.sim.unsynced_names().values().sum(),
        )
    }

    /// A number that is the same for two images of one run only if they are the same image.
    #[must_use]
    pub fn key(&self, survivors: &Survivors) -> u64 {
        let sim = &self.sim;
        let mut key = mix(sim.durable_at);
        let mut add = |number: u64| key = mix(key.rotate_left(5) ^ number);
        if survivors.kill {
            add(sim.changed_at | 1 << 63);
            return key;
        }
        for (piece, kept) in sim.pieces().iter().zip(&survivors.pieces) {
            if *kept {
                add(piece.call);
                add(piece.from as u64);
            }
        }
        let mut left = sim.unsynced_names();
        for (count, kept) in left.values_mut().zip(&survivors.names) {
            *count = (*count).min(*kept);
        }
        for change in sim.changes.iter().filter(|change| !change.tied) {
            if let Some(left) = left.get_mut(&change.dir).filter(|left| **left > 0) {
                *left -= 1;
                add(change.call << 1 | 1 << 62 | u64::from(change.link.is_some()));
            }
        }
        key
    }

    /// The disk of the machine that comes up again with these survivors.
    #[must_use]
    pub fn image(&self, survivors: &Survivors) -> SimDisk {
        let mut sim = self.sim.clone();
        sim.crash(survivors);
        SimDisk::of(sim)
    }

    /// The disk of the machine that comes up again, by a survival.
    #[must_use]
    pub fn crash(&self, survival: Survival) -> SimDisk {
        self.image(&self.sim.choose(survival))
    }
}

#[derive(Debug)]
struct State {
    sim: Sim,
    recorded: Option<Vec<Snapshot>>,
}

impl State {
    fn writing(&mut self, op: DiskOp, path: &Path) -> Result<Turn, DiskError> {
        if !self.sim.off
            && let Some(recorded) = &mut self.recorded
        {
            recorded.push(Snapshot {
                sim: self.sim.clone(),
                op,
                path: path.to_owned(),
            });
        }
        self.sim.writing(op, path)
    }
}

/// A file system in memory, rooted at `/sim`. Clones share it.
#[derive(Debug, Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
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
        Self::of(Sim::new())
    }

    fn of(sim: Sim) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                sim,
                recorded: None,
            })),
        }
    }

    /// The same disk as a trait object.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, f: impl FnOnce(&mut Sim) -> T) -> T {
        f(&mut self.state().sim)
    }

    // ---- snapshots ----------------------------------------------------------------------------

    /// The disk as it stands, before the next writing call.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            sim: self.state().sim.clone(),
            op: DiskOp::Stat,
            path: PathBuf::from("/sim"),
        }
    }

    /// From now on keeps a snapshot before every writing call.
    pub fn record(&self) {
        self.state().recorded = Some(Vec::new());
    }

    /// Ends the recording and gives its snapshots, with one more of the disk as it stands.
    #[must_use]
    pub fn recorded(&self) -> Vec<Snapshot> {
        let mut recorded = self.state().recorded.take().unwrap_or_default();
        recorded.push(self.snapshot());
        recorded
    }

    /// Another disk that is as this one would be after the death of all processes; what is done to
    /// one is not seen by the other.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut sim = self.state().sim.clone();
        sim.kill();
        Self::of(sim)
    }

    /// A BLAKE3 over all names and contents, in the cache and on the device: two runs that are the
    /// same end with the same.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let state = self.state();
        let mut hasher = blake3::Hasher::new();
        for names in [&state.sim.names, &state.sim.durable_names] {
            for (path, ino) in names {
                hasher.update(path.as_os_str().as_encoded_bytes());
                hasher.update(&[0]);
                hasher.update(&ino.to_le_bytes());
            }
        }
        for (ino, inode) in &state.sim.inodes {
            hasher.update(&ino.to_le_bytes());
            for content in [&inode.cached, &inode.durable] {
                hasher.update(&(content.len() as u64).to_le_bytes());
                hasher.update(&content.to_vec());
            }
        }
        *hasher.finalize().as_bytes()
    }

    // ---- calls and what goes wrong in them ----------------------------------------------------

    /// How many writing calls there were.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.state().sim.calls
    }

    /// How many reading calls there were.
    #[must_use]
    pub fn readings(&self) -> u64 {
        self.state().sim.readings
    }

    /// How many syncs of files succeeded.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.state().sim.syncs
    }

    /// The writing call with this number, counted from the first ever as 1, fails once.
    pub fn fail_call(&self, number: u64, fault: DiskFault) {
        self.inject(number, Fault::Fail(fault));
    }

    /// The writing call with this number goes wrong in this way.
    pub fn inject(&self, number: u64, fault: Fault) {
        self.with(|sim| sim.faults.insert(number, fault));
    }

    /// Every writing call from this number on goes wrong in this way, until [`SimDisk::repair`].
    pub fn inject_from(&self, number: u64, fault: Fault) {
        self.with(|sim| sim.standing = Some((number, fault)));
    }

    /// The reading call with this number, counted from the first ever as 1, fails once.
    pub fn fail_reading(&self, number: u64, fault: DiskFault) {
        self.with(|sim| sim.reading_faults.insert(number, fault));
    }

    /// Forgets every fault and crash that was planned.
    pub fn repair(&self) {
        self.with(Sim::calm);
    }

    /// The power is lost during the writing call with this number; then every call fails until
    /// [`SimDisk::crash`].
    pub fn crash_at_call(&self, number: u64) {
        self.with(|sim| sim.crash_at = Some(number));
    }

    /// Whether the power is lost.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.state().sim.off
    }

    /// Loses power now, if it is not lost yet, and starts the machine again with what survives. Open
    /// files are dead, locks are gone.
    pub fn crash(&self, survival: Survival) {
        self.with(|sim| {
            let survivors = sim.choose(survival);
            sim.crash(&survivors);
        });
    }

    /// Kills the processes but not the machine: what was written is there, locks are gone.
    pub fn kill(&self) {
        self.with(Sim::kill);
    }

    /// Forgets what the page cache holds besides unsynced writes: what is read next comes from the
    /// device.
    pub fn drop_caches(&self) {
        self.with(|sim| {
            for inode in sim.inodes.values_mut().filter(|inode| inode.diverged) {
                let inode = Arc::make_mut(inode);
                let mut content = inode.durable.clone();
                for write in &inode.pending {
                    content.put(write.offset, &write.data, write.offset, write.end());
                }
                inode.cached = content;
                inode.diverged = inode.pending.iter().any(|write| write.stray.is_some());
            }
            sim.count_used();
        });
    }

    // ---- space, time, surroundings ------------------------------------------------------------

    /// Limits the disk; beyond it every write answers [`DiskFault::NoSpace`].
    pub fn set_capacity(&self, bytes: u64) {
        self.with(|sim| sim.capacity = bytes);
    }

    /// So many bytes of the capacity belong to another tenant of the file system.
    pub fn set_tenant(&self, bytes: u64) {
        self.with(|sim| sim.tenant = bytes);
    }

    /// Makes the disk claim to be a network file system.
    pub fn set_network(&self, name: Option<&'static str>) {
        self.with(|sim| sim.network = name);
    }

    /// Makes the disk claim to write every change to another place.
    pub fn set_copy_on_write(&self, name: Option<&'static str>) {
        self.with(|sim| sim.copy_on_write = name);
    }

    /// Every call of this kind takes so long on the virtual clock.
    pub fn set_latency(&self, op: DiskOp, latency_us: u64) {
        self.with(|sim| sim.latency_us.insert(key_of(op), latency_us));
    }

    /// The virtual clock: it stands still but for what calls take, and for this.
    pub fn advance(&self, micros: u64) {
        self.with(|sim| sim.now_us = sim.now_us.saturating_add(micros));
    }

    /// The virtual clock in milliseconds after `start_unix_ms`, as [`crate::LogConfig`] takes it.
    #[must_use]
    pub fn clock(&self, start_unix_ms: u64) -> Arc<dyn Fn() -> u64 + Send + Sync> {
        let disk = self.clone();
        Arc::new(move || start_unix_ms.saturating_add(disk.state().sim.now_us / 1000))
    }

    /// Bytes allocated now, as `du` would count them below `/sim`.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.state().sim.used
    }

    /// The most that was ever allocated.
    #[must_use]
    pub fn peak_allocated(&self) -> u64 {
        self.state().sim.peak
    }

    // ---- contents, and foreign hands in them --------------------------------------------------

    /// A file's content as a reader sees it now.
    #[must_use]
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        self.with(|sim| Some(sim.inodes.get(sim.names.get(path)?)?.cached.to_vec()))
    }

    /// The paths of all files, sorted.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.with(|sim| {
            let is_file = |ino: &u64| sim.inodes.get(ino).is_some_and(|inode| !inode.dir);
            let files = sim.names.iter().filter(|(_, ino)| is_file(ino));
            files.map(|(path, _)| path.to_path_buf()).collect()
        })
    }

    /// Puts a file there, durably, past every rule and count: a foreign hand. A file of that name
    /// gets the new content and stays the same inode.
    pub fn plant(&self, path: &Path, bytes: &[u8]) {
        self.with(|sim| {
            let ino = match sim.names.get(path) {
                Some(ino) => *ino,
                None => Self::plant_name(sim, path),
            };
            sim.change_inode(ino, |inode| {
                inode.pending.clear();
                inode.diverged = false;
                inode.cached = Content::of(bytes);
                inode.durable = inode.cached.clone();
            });
        });
    }

    fn plant_name(sim: &mut Sim, path: &Path) -> u64 {
        sim.next_ino += 1;
        let ino = sim.next_ino;
        let path: Arc<Path> = path.into();
        sim.inodes.insert(ino, Arc::new(Inode::new(false)));
        sim.name(&path, Some(ino));
        sim.durable_names.insert(path, ino);
        ino
    }

    /// Puts another file there under the name, durably; whoever has the old one open keeps it.
    pub fn replace(&self, path: &Path, bytes: &[u8]) {
        self.unlink(path);
        self.plant(path, bytes);
    }

    /// Removes a name, durably; whoever has the file open keeps it.
    pub fn unlink(&self, path: &Path) {
        self.with(|sim| {
            sim.name(&path.into(), None);
            sim.durable_names.remove(path);
            sim.changes.retain(|change| *change.path != *path);
        });
    }

    /// Changes bits of one byte of a file, on the device and in the cache.
    pub fn flip(&self, path: &Path, offset: usize, bits: u8) {
        self.flip_in(path, offset, bits, true);
    }

    /// Changes bits of one byte of a file on the device only: it shows after a crash or
    /// [`SimDisk::drop_caches`].
    pub fn flip_on_device(&self, path: &Path, offset: usize, bits: u8) {
        self.flip_in(path, offset, bits, false);
    }

    fn flip_in(&self, path: &Path, offset: usize, bits: u8, cache: bool) {
        self.with(|sim| {
            let Some(ino) = sim.names.get(path).copied() else {
                return;
            };
            sim.change_inode(ino, |inode| {
                let mut one = [0];
                if inode.durable.read(offset, &mut one) {
                    inode.durable.write(offset, &one.map(|byte| byte ^ bits));
                }
                if !cache {
                    inode.diverged = true;
                } else if inode.cached.read(offset, &mut one) {
                    inode.cached.write(offset, &one.map(|byte| byte ^ bits));
                }
            });
        });
    }

    /// Reading any byte of this sector fails until it is written again.
    pub fn spoil_sector(&self, path: &Path, offset: usize) {
        self.with(|sim| {
            if let Some(ino) = sim.names.get(path) {
                sim.spoilt.insert((*ino, offset / SECTOR_BYTES));
            }
        });
    }

    /// Copies a tree to another name, with new inodes, durably: a restored backup or a clone.
    pub fn copy_tree(&self, from: &Path, to: &Path) {
        self.with(|sim| {
            let entries: Vec<(PathBuf, u64)> = sim
                .names
                .iter()
                .filter_map(|(path, ino)| Some((to.join(path.strip_prefix(from).ok()?), *ino)))
                .collect();
            for (path, ino) in entries {
                let path: PathBuf = path.components().collect();
                let Some(inode) = sim.inodes.get(&ino).cloned() else {
                    continue;
                };
                let new = Self::plant_name(sim, &path);
                sim.change_inode(new, |copy| {
                    copy.dir = inode.dir;
                    copy.cached = inode.cached.clone();
                    copy.durable = inode.cached.clone();
                });
            }
        });
    }

    // ---- the calls themselves -----------------------------------------------------------------

    fn handle(&self, sim: &mut Sim, ino: u64, path: &Path, locks: bool) -> Box<dyn DiskFile> {
        sim.change_inode(ino, |inode| inode.opens += 1);
        if locks {
            sim.locked.insert(ino);
        }
        Box::new(SimFile {
            state: Arc::clone(&self.state),
            ino,
            path: path.to_owned(),
            generation: sim.generation,
            locks,
        })
    }

    fn create(state: &mut State, op: DiskOp, path: &Path, dir: bool) -> Result<u64, DiskError> {
        state.sim.alive(op, path)?;
        state.sim.parent_is_dir(op, path)?;
        if state.sim.names.contains_key(path) {
            return Err(DiskError::new(op, path, DiskFault::Exists));
        }
        let turn = state.writing(op, path)?;
        let sim = &mut state.sim;
        if dir && !sim.room(BLOCK_BYTES) {
            return Err(DiskError::new(op, path, DiskFault::NoSpace));
        }
        sim.next_ino += 1;
        let ino = sim.next_ino;
        sim.inodes.insert(ino, Arc::new(Inode::new(dir)));
        sim.change(&path.into(), Some(ino), None, false);
        sim.end(&turn, op, path)?;
        Ok(ino)
    }
}

impl Disk for SimDisk {
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError> {
        Ok(path.to_owned())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError> {
        let mut state = self.state();
        let ino = if mode == OpenMode::CreateNew {
            Self::create(&mut state, DiskOp::Open, path, false)?
        } else {
            state.sim.reading(DiskOp::Open, path)?;
            let missing = || DiskError::new(DiskOp::Open, path, DiskFault::NotFound);
            let ino = *state.sim.names.get(path).ok_or_else(missing)?;
            if state.sim.inodes.get(&ino).is_some_and(|inode| inode.dir) {
                return Err(DiskError::new(DiskOp::Open, path, DiskFault::NotPlain));
            }
            ino
        };
        Ok(self.handle(&mut state.sim, ino, path, false))
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let mut state = self.state();
        state.sim.alive(DiskOp::Lock, path)?;
        let ino = match state.sim.names.get(path) {
            Some(ino) => *ino,
            None => Self::create(&mut state, DiskOp::Lock, path, false)?,
        };
        if state.sim.locked.contains(&ino) {
            return Err(DiskError::new(DiskOp::Lock, path, DiskFault::Busy));
        }
        Ok(self.handle(&mut state.sim, ino, path, true))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        let mut state = self.state();
        let turn = state.writing(DiskOp::Rename, to)?;
        let sim = &mut state.sim;
        sim.parent_is_dir(DiskOp::Rename, to)?;
        let missing = || DiskError::new(DiskOp::Rename, from, DiskFault::NotFound);
        let ino = *sim.names.get(from).ok_or_else(missing)?;
        sim.next_rename += 1;
        let rename = Some(sim.next_rename);
        let tied = parent(from) == parent(to);
        sim.change(&to.into(), Some(ino), rename, false);
        sim.change(&from.into(), None, rename, tied);
        sim.end(&turn, DiskOp::Rename, to)
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        let mut state = self.state();
        let turn = state.writing(DiskOp::Remove, path)?;
        let sim = &mut state.sim;
        if !sim.names.contains_key(path) {
            return Err(DiskError::new(DiskOp::Remove, path, DiskFault::NotFound));
        }
        sim.change(&path.into(), None, None, false);
        sim.end(&turn, DiskOp::Remove, path)
    }

    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        Self::create(&mut self.state(), DiskOp::CreateDir, path, true).map(|_| ())
    }

    fn sync_dir(&self, path: &Path) -> Result<(), DiskError> {
        let mut state = self.state();
        let turn = state.writing(DiskOp::SyncDir, path)?;
        let sim = &mut state.sim;
        if !turn.crash && turn.fault != Some(Fault::LostSync) {
            sim.sync_names(path);
        }
        sim.end(&turn, DiskOp::SyncDir, path)
    }

    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError> {
        let mut state = self.state();
        let sim = &mut state.sim;
        sim.reading(DiskOp::ReadDir, path)?;
        if !sim.names.contains_key(path) {
            return Err(DiskError::new(DiskOp::ReadDir, path, DiskFault::NotFound));
        }
        let below: Arc<Path> = path.into();
        Ok(sim
            .names
            .range(below..)
            .map(|(name, _)| name)
            .take_while(|name| name.starts_with(path))
            .filter(|name| name.parent() == Some(path))
            .filter_map(|name| name.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect())
    }

    fn stat(&self, path: &Path) -> Result<FileStat, DiskError> {
        let mut state = self.state();
        let sim = &mut state.sim;
        sim.reading(DiskOp::Stat, path)?;
        let missing = || DiskError::new(DiskOp::Stat, path, DiskFault::NotFound);
        let ino = *sim.names.get(path).ok_or_else(missing)?;
        Ok(sim.stat(ino))
    }

    fn volume(&self, path: &Path) -> Result<Volume, DiskError> {
        let state = self.state();
        let sim = &state.sim;
        sim.alive(DiskOp::Volume, path)?;
        Ok(Volume {
            block_bytes: BLOCK_BYTES,
            available_bytes: sim
                .capacity
                .saturating_sub(sim.tenant)
                .saturating_sub(sim.used),
            network: sim.network,
            copy_on_write: sim.copy_on_write,
        })
    }

    fn boot_id(&self) -> Result<String, DiskError> {
        Ok(format!("boot-{}", self.state().sim.boots))
    }

    fn own_uid(&self) -> u32 {
        1000
    }
}

#[derive(Debug)]
struct SimFile {
    state: Arc<Mutex<State>>,
    ino: u64,
    path: PathBuf,
    generation: u64,
    locks: bool,
}

impl SimFile {
    fn state(&self, op: DiskOp) -> Result<MutexGuard<'_, State>, DiskError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.sim.generation != self.generation {
            return Err(DiskError::new(op, &self.path, POWER_LOST));
        }
        state.sim.alive(op, &self.path)?;
        Ok(state)
    }

    /// How the device is to treat this write.
    fn stray(&self, sim: &Sim, fault: Option<&Fault>) -> Option<Stray> {
        let place = |place: &Place| {
            let ino = match &place.path {
                Some(path) => *sim.names.get(path.as_path())?,
                None => self.ino,
            };
            Some((ino, usize::try_from(place.offset).ok()?))
        };
        match fault? {
            Fault::LostWrite => Some(Stray::Lost),
            Fault::Misdirected(to) => {
                Some(place(to).map_or(Stray::Lost, |(ino, at)| Stray::Misdirected(ino, at)))
            }
            Fault::Duplicated(to) => place(to).map(|(ino, at)| Stray::Duplicated(ino, at)),
            Fault::Flipped { byte, bits } => Some(Stray::Flipped(*byte, *bits)),
            _ => None,
        }
    }

    fn put(&self, op: DiskOp, offset: u64, data: Data) -> Result<(), DiskError> {
        let mut state = self.state(op)?;
        let turn = state.writing(op, &self.path)?;
        let sim = &mut state.sim;
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let data = match turn.fault {
            Some(Fault::FailDone(_)) => {
                let sectors = data.len() / 2 / SECTOR_BYTES;
                data.front(sectors * SECTOR_BYTES)
            }
            _ => data,
        };
        let stray = self.stray(sim, turn.fault.as_ref());
        let (before, len) = sim
            .inodes
            .get(&self.ino)
            .map_or((0, 0), |inode| (inode.allocated(), inode.cached.len()));
        let end = offset.saturating_add(data.len());
        let after = (end.max(len) as u64).next_multiple_of(BLOCK_BYTES);
        if !sim.room(after.saturating_sub(before)) {
            return Err(DiskError::new(op, &self.path, DiskFault::NoSpace));
        }
        if data.len() > 0 {
            sim.changed_at = sim.calls;
            let call = sim.calls;
            if !sim.spoilt.is_empty() {
                let healed = offset / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES);
                sim.spoilt
                    .retain(|(ino, sector)| *ino != self.ino || !healed.contains(sector));
            }
            sim.change_inode(self.ino, |inode| {
                inode.cached.put(offset, &data, offset, end);
                inode.pending.push(Write {
                    call,
                    offset,
                    data,
                    stray,
                });
            });
        }
        sim.end(&turn, op, &self.path)
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let mut state = self.state(DiskOp::Read)?;
        state.sim.reading(DiskOp::Read, &self.path)?;
        let failed = |fault| Err(DiskError::new(DiskOp::Read, &self.path, fault));
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let sectors =
            offset / SECTOR_BYTES..offset.saturating_add(buffer.len()).div_ceil(SECTOR_BYTES);
        let spoilt = &state.sim.spoilt;
        if !spoilt.is_empty()
            && spoilt
                .range((self.ino, sectors.start)..(self.ino, sectors.end))
                .next()
                .is_some()
        {
            return failed(UNREADABLE);
        }
        match state.sim.inodes.get(&self.ino) {
            Some(inode) if inode.cached.read(offset, buffer) => Ok(()),
            _ => failed(DiskFault::Short),
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.put(DiskOp::Write, offset, Data::Bytes(bytes.into()))
    }

    fn sync_data(&self) -> Result<(), DiskError> {
        let mut state = self.state(DiskOp::Sync)?;
        let turn = state.writing(DiskOp::Sync, &self.path);
        let sim = &mut state.sim;
        match turn {
            Ok(turn) => {
                let done = !turn.crash && turn.fault != Some(Fault::LostSync);
                if done {
                    sim.sync_file(self.ino);
                } else if !turn.crash {
                    sim.syncs += 1;
                }
                sim.end(&turn, DiskOp::Sync, &self.path)
            }
            Err(error) => {
                let lost = sim.change_inode(self.ino, |inode| {
                    let lost = !inode.pending.is_empty();
                    inode.diverged |= lost;
                    inode.pending.clear();
                    lost
                });
                if lost {
                    // The device has not changed, but what may still reach it has.
                    sim.durable_at = sim.calls;
                    sim.changed_at = sim.calls;
                }
                Err(error)
            }
        }
    }

    fn allocate(&self, len: u64) -> Result<(), DiskError> {
        let have = {
            let state = self.state(DiskOp::Allocate)?;
            let inode = state.sim.inodes.get(&self.ino);
            inode.map_or(0, |inode| inode.cached.len() as u64)
        };
        let missing = usize::try_from(len.saturating_sub(have)).unwrap_or(0);
        self.put(DiskOp::Allocate, have, Data::Zeros(missing))
    }

    fn zero_fill(&self, len: u64) -> Result<(), DiskError> {
        let len = usize::try_from(len).unwrap_or(0);
        self.put(DiskOp::Allocate, 0, Data::Zeros(len))
    }

    fn stat(&self) -> Result<FileStat, DiskError> {
        let mut state = self.state(DiskOp::Stat)?;
        state.sim.reading(DiskOp::Stat, &self.path)?;
        Ok(state.sim.stat(self.ino))
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let sim = &mut state.sim;
        if sim.generation != self.generation {
            return;
        }
        if sim.inodes.contains_key(&self.ino) {
            sim.change_inode(self.ino, |inode| {
                inode.opens = inode.opens.saturating_sub(1);
            });
        }
        if self.locks {
            sim.locked.remove(&self.ino);
        }
    }
}
