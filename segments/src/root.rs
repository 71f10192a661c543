//! The local root: one directory, one lock, one ledger (INV-01, INV-04).
//!
//! Everything that a node keeps lies below one directory that only one process holds. [`Root::open`]
//! refuses what would make that promise hollow: a root that another process holds, one on a network
//! file system, one that others may write to, one behind a symbolic link. All writes go through
//! [`Root::write_atomic`] or, inside this crate, through a staged file: reserve, write to `tmp/`,
//! sync, rename, sync the directory.
//!
//! What lies under the root is counted at start by a walk, but for the three directories that grow
//! with the store: of those the store's index tells the bytes, and they are walked only when there is
//! no index that can be relied upon. Files that are not the node's own, by name, are foreign: they are
//! counted apart and shrink what is left (ruling 23).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{
    self, Disk, DiskError, DiskFault, DiskFile, DiskOp, FileKind, FileStat, OpenMode,
};
use crate::id::{Kind, SegmentId};
use crate::ledger::{CeilingReached, Charge, Ledger, Reservation};
use crate::limits::{
    DIRECTORY_SLACK_BLOCKS, MAX_PATH_DEPTH, MAX_STATE_FILE_BYTES, MIN_CEILING_BYTES,
    MIN_LOG_FILE_BYTES, NAMES_AT_ONCE,
};
use crate::store::{CHAIN_DIR, Loaded, RECEIPTS_DIR, Unusable, load_index};

/// The file whose lock is the exclusive right to the root, and whose inode marks it (ruling 8).
const LOCK: &str = "lock";
/// Where files are written before they get their name.
const TMP: &str = "tmp";
/// Where damaged files go. Nothing is ever deleted from here by the node.
pub(crate) const QUARANTINE: &str = "quarantine";
/// Room kept on file systems where nothing can be allocated ahead.
const BALLAST: &str = "ballast";
/// The directories that grow with the store.
pub(crate) const BULK_DIRS: [&str; 3] = ["segments/audit", RECEIPTS_DIR, CHAIN_DIR];
/// Directories in which every plain file is the node's own.
const PLAIN_DIRS: [&str; 6] = ["keys", "policy", "quarantine", "revocation", "state", TMP];

/// Why a root was not opened or a file in it not written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// Another process holds the root.
    #[error("{} is in use by another process; stop it or choose another root", path.display())]
    InUse {
        /// The root.
        path: PathBuf,
    },
    /// The root lies on a network file system.
    #[error(
        "{} lies on {kind}, a network file system, where locks and syncs cannot be relied upon; \
         choose a local disk",
        path.display()
    )]
    NetworkFileSystem {
        /// The root.
        path: PathBuf,
        /// Which one.
        kind: &'static str,
    },
    /// The root or a part of it is not safe to use.
    #[error("{} is not safe: {why}", path.display())]
    Unsafe {
        /// What is unsafe.
        path: PathBuf,
        /// Why, and the way out.
        why: &'static str,
    },
    /// The options contradict each other.
    #[error("bad root options: {0}")]
    Options(&'static str),
    /// Not a path that may be used inside the root.
    #[error("{0:?} is not a plain relative path of A-Z a-z 0-9 . _ - below the root")]
    Path(String),
    /// The content exceeds the limit.
    #[error("{rel} has {bytes} bytes where at most {max} are allowed")]
    TooLarge {
        /// The file.
        rel: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The ceiling does not allow the write.
    #[error(transparent)]
    Ceiling(#[from] CeilingReached),
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The size of a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootOptions {
    /// The bytes that the file system may allocate to the root, at most.
    pub ceiling_bytes: u64,
    /// The part of them kept for urgent and state writes.
    pub reserve_bytes: u64,
}

/// The open root. Dropping the last reference gives the lock back.
#[derive(Debug)]
pub struct Root {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    ledger: Arc<Ledger>,
    block_bytes: u64,
    /// The file system, if it writes every change to another place.
    copy_on_write: Option<&'static str>,
    /// Allocated bytes of the ballast; 0 while it is given up.
    ballast: Mutex<u64>,
    /// What the store left of its index, until a store takes it.
    index: Mutex<Option<Result<Loaded, Unusable>>>,
    /// Allocated bytes of each directory as last booked, by relative path.
    dirs: Mutex<BTreeMap<String, u64>>,
    next_temp: AtomicU64,
    marker: FileStat,
    _lock: Box<dyn DiskFile>,
}

impl Root {
    /// Opens or makes the root, takes its lock and counts what lies there.
    ///
    /// # Errors
    /// [`RootError`]: in use, on a network file system, unsafe, or the disk refused.
    pub fn open(
        disk: Arc<dyn Disk>,
        path: &Path,
        options: RootOptions,
    ) -> Result<Arc<Self>, RootError> {
        if options.ceiling_bytes < MIN_CEILING_BYTES {
            return Err(RootError::Options("the ceiling is below 1 MiB"));
        }
        if options.reserve_bytes >= options.ceiling_bytes {
            return Err(RootError::Options(
                "the reserve is not smaller than the ceiling",
            ));
        }
        let path = disk.canonical(path)?;
        let not_safe = |why| RootError::Unsafe {
            path: path.clone(),
            why,
        };
        let stat = match disk.stat(&path) {
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => {
                disk.create_dir(&path)?;
                disk.stat(&path)?
            }
            other => other?,
        };
        match stat.kind {
            FileKind::Dir => {}
            FileKind::Symlink => {
                return Err(not_safe("it is a symbolic link; name the directory itself"));
            }
            FileKind::File | FileKind::Other => return Err(not_safe("it is not a directory")),
        }
        // INV-01: nobody but this node's user can put anything below the root.
        if stat.mode & 0o022 != 0 {
            return Err(not_safe(
                "group or others may write to it; run chmod go-w on it",
            ));
        }
        if stat.uid != disk.own_uid() {
            return Err(not_safe(
                "it belongs to another user; run as its owner or chown it",
            ));
        }
        if let (Some(parent), Err(_)) = (path.parent(), disk.stat(&path.join(LOCK))) {
            // The first start, or one that was killed early: the root's own name may not be durable.
            disk.sync_dir(parent)?;
        }
        let volume = disk.volume(&path)?;
        if let Some(kind) = volume.network {
            return Err(RootError::NetworkFileSystem { path, kind });
        }
        let lock = match disk.lock(&path.join(LOCK)) {
            Err(DiskError {
                fault: DiskFault::Busy,
                ..
            }) => return Err(RootError::InUse { path }),
            other => other?,
        };
        let marker = lock.stat()?;
        let root = Self {
            ledger: Ledger::new(options.ceiling_bytes, options.reserve_bytes, 0),
            disk,
            path,
            block_bytes: volume.block_bytes,
            copy_on_write: volume.copy_on_write,
            ballast: Mutex::new(0),
            index: Mutex::new(None),
            dirs: Mutex::default(),
            next_temp: AtomicU64::new(0),
            marker,
            _lock: lock,
        };
        root.remove_temporary_files()?;
        let index = load_index(&*root.disk, &root.path);
        let mut walk = Walk {
            bulk: index.is_err(),
            ..Walk::default()
        };
        root.walk(&mut walk)?;
        // Whoever ran before may have been killed between giving a name and syncing the directory:
        // then the name is there now and may be gone after the next loss of power. What this start
        // finds, it relies upon, so it makes it durable first.
        for rel in walk.dirs.keys() {
            root.disk.sync_dir(&root.path.join(rel))?;
        }
        let indexed = index.as_ref().map_or(0, |loaded| loaded.bulk_bytes);
        let own = walk.own_bytes.saturating_add(indexed);
        root.ledger.found(own, Charge::Normal);
        root.ledger.set_foreign(walk.foreign_bytes);
        *root.dirs.lock().unwrap_or_else(PoisonError::into_inner) = walk.dirs;
        *root.index.lock().unwrap_or_else(PoisonError::into_inner) = Some(index);
        root.ensure_dir(TMP)?;
        let root = Arc::new(root);
        root.find_ballast()?;
        root.tend_ballast();
        Ok(root)
    }

    /// The store's index as it was found when the root was opened; once.
    pub(crate) fn take_index(&self) -> Option<Result<Loaded, Unusable>> {
        self.index
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// What a crash left behind in `tmp/` was never published and is nobody's.
    fn remove_temporary_files(&self) -> Result<(), RootError> {
        let tmp = self.path.join(TMP);
        match self.disk.read_dir(&tmp) {
            Ok(names) => {
                for name in names {
                    self.disk.remove(&tmp.join(name))?;
                }
                Ok(())
            }
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ledger of its disk space.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The disk it lies on.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The lock file's device and inode: another after a copy, the same after a restart.
    pub(crate) fn marker(&self) -> FileStat {
        self.marker
    }

    /// An upper bound of what the file system allocates to a file of this length: whole blocks, one
    /// more for the map of extents, and one for each further 16 MiB of a fragmented file.
    #[must_use]
    pub fn allocation_bound(&self, len: u64) -> u64 {
        let extra = len / (16 * 1024 * 1024) + 1;
        len.next_multiple_of(self.block_bytes)
            .saturating_add(extra.saturating_mul(self.block_bytes))
    }

    pub(crate) fn slack(&self) -> u64 {
        DIRECTORY_SLACK_BLOCKS.saturating_mul(self.block_bytes)
    }

    /// Walks the whole root and adds up what is allocated, foreign files included. Compare with the
    /// ledger while nothing is being written.
    ///
    /// # Errors
    /// [`RootError::Disk`].
    pub fn measure(&self) -> Result<u64, RootError> {
        let mut walk = Walk {
            bulk: true,
            ..Walk::default()
        };
        self.walk(&mut walk)?;
        Ok(walk.own_bytes.saturating_add(walk.foreign_bytes))
    }

    fn walk(&self, walk: &mut Walk) -> Result<(), RootError> {
        let mut todo = vec![(String::new(), self.path.clone())];
        while let Some((rel, dir)) = todo.pop() {
            let own = self.disk.stat(&dir)?.allocated_bytes;
            if rel.is_empty() || is_ours(&rel, FileKind::Dir) {
                walk.own_bytes = walk.own_bytes.saturating_add(own);
                walk.dirs.insert(rel.clone(), own);
            } else {
                walk.foreign_bytes = walk.foreign_bytes.saturating_add(own);
            }
            if BULK_DIRS.contains(&rel.as_str()) && !walk.bulk {
                continue;
            }
            let mut after: Option<String> = None;
            loop {
                let names = self
                    .disk
                    .read_dir_after(&dir, after.as_deref(), NAMES_AT_ONCE)?;
                for name in &names {
                    let path = dir.join(name);
                    let rel = join(&rel, name);
                    let stat = match self.disk.stat(&path) {
                        // Removed since it was listed.
                        Err(DiskError {
                            fault: DiskFault::NotFound,
                            ..
                        }) => continue,
                        other => other?,
                    };
                    if stat.kind == FileKind::Dir {
                        todo.push((rel, path));
                    } else if is_ours(&rel, stat.kind) {
                        walk.own_bytes = walk.own_bytes.saturating_add(stat.allocated_bytes);
                    } else {
                        walk.foreign_bytes =
                            walk.foreign_bytes.saturating_add(stat.allocated_bytes);
                    }
                }
                if names.len() < NAMES_AT_ONCE {
                    break;
                }
                after = names.last().cloned();
            }
        }
        Ok(())
    }

    /// Does a step that needs space on the file system; for a write of the reserve it is done again
    /// after the ballast was given up.
    fn with_ballast<T>(
        &self,
        charge: Charge,
        step: impl Fn() -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        match step() {
            Err(DiskError {
                fault: DiskFault::NoSpace,
                ..
            }) if charge == Charge::Reserve && self.give_up_ballast() => step(),
            other => other,
        }
    }

    // ---- ballast ------------------------------------------------------------------------------

    fn ballast(&self) -> MutexGuard<'_, u64> {
        self.ballast.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ballast of an earlier run is taken over, or removed where it serves nothing.
    fn find_ballast(&self) -> Result<(), RootError> {
        match self.stat(BALLAST) {
            Ok(stat) if self.copy_on_write.is_some() => *self.ballast() = stat.allocated_bytes,
            Ok(_) => self.remove(BALLAST)?,
            Err(RootError::Disk(DiskError {
                fault: DiskFault::NotFound,
                ..
            })) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Where every change is written to another place, room that was allocated ahead is no room: a
    /// file system full of other files would stop the reserve's writes too. There a file of one active
    /// log file's bound is kept, and given up when that happens. Made again once there is plenty.
    pub(crate) fn tend_ballast(self: &Arc<Self>) {
        let Some(file_system) = self.copy_on_write else {
            return;
        };
        let bytes = self.stage_bound(MIN_LOG_FILE_BYTES);
        let plenty = self
            .disk
            .volume(&self.path)
            .is_ok_and(|volume| volume.available_bytes / 4 >= bytes);
        if *self.ballast() > 0 || !plenty {
            return;
        }
        let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
        // Bytes that no file system can compress.
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        let made = self
            .stage(BALLAST, bytes, Charge::Reserve)
            .and_then(|mut staged| {
                staged.fill(&content)?;
                staged.publish()
            });
        match made {
            Ok(published) => *self.ballast() = published.allocated,
            Err(error) => tracing::warn!(%error, file_system, "no ballast can be kept"),
        }
    }

    /// Gives the ballast up for a write of the reserve; `false` if there is none.
    pub(crate) fn give_up_ballast(&self) -> bool {
        let mut ballast = self.ballast();
        if *ballast == 0 {
            return false;
        }
        match self.remove(BALLAST) {
            Ok(()) => {
                *ballast = 0;
                tracing::warn!("the file system is full; the ballast is given up");
                true
            }
            Err(error) => {
                tracing::error!(%error, "the ballast cannot be given up");
                false
            }
        }
    }

    /// The absolute path of a checked relative one.
    fn absolute(&self, rel: &str) -> Result<PathBuf, RootError> {
        let plain = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if rel.split('/').count() > MAX_PATH_DEPTH || !rel.split('/').all(plain) {
            return Err(RootError::Path(rel.to_owned()));
        }
        Ok(self.path.join(rel))
    }

    /// Books what a directory has grown or shrunk by.
    pub(crate) fn book_dir(&self, rel: &str) -> Result<(), RootError> {
        let path = if rel.is_empty() {
            self.path.clone()
        } else {
            self.path.join(rel)
        };
        let mut dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.disk.stat(&path)?.allocated_bytes;
        let before = dirs.insert(rel.to_owned(), now).unwrap_or(0);
        if now > before {
            self.ledger.found(now - before, Charge::Normal);
        } else {
            self.ledger.freed(before - now, Charge::Normal);
        }
        Ok(())
    }

    /// Makes a directory and those above it, if they are not there.
    pub(crate) fn ensure_dir(&self, rel: &str) -> Result<(), RootError> {
        let path = self.absolute(rel)?;
        if self
            .dirs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(rel)
        {
            return Ok(());
        }
        let parent = match rel.rsplit_once('/') {
            Some((parent, _)) => {
                self.ensure_dir(parent)?;
                parent
            }
            None => "",
        };
        let slack = self
            .ledger
            .reserve(self.slack().saturating_mul(2), Charge::Reserve)?;
        match self.disk.create_dir(&path) {
            Ok(()) => {}
            Err(DiskError {
                fault: DiskFault::Exists,
                ..
            }) => {
                if self.disk.stat(&path)?.kind != FileKind::Dir {
                    let why = "something else than a directory has this name; move it away";
                    return Err(RootError::Unsafe { path, why });
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.disk.sync_dir(path.parent().unwrap_or(&self.path))?;
        drop(slack);
        self.book_dir(rel)?;
        self.book_dir(parent)
    }

    /// Whether a file is there.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn exists(&self, rel: &str) -> Result<bool, RootError> {
        match self.disk.stat(&self.absolute(rel)?) {
            Ok(_) => Ok(true),
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// A file's content; `None` if there is no such file.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn read(&self, rel: &str) -> Result<Option<Vec<u8>>, RootError> {
        let path = self.absolute(rel)?;
        match disk::read_all(&*self.disk, &path, MAX_STATE_FILE_BYTES) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The names in a directory; none if it is not there.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn list(&self, rel: &str) -> Result<Vec<String>, RootError> {
        match self.disk.read_dir(&self.absolute(rel)?) {
            Ok(names) => Ok(names),
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Replaces or makes a file, durably and in one step: after a crash it has the old content or the
    /// new one.
    ///
    /// # Errors
    /// [`RootError::Ceiling`] if the ceiling does not allow it, [`RootError::Disk`] if the disk
    /// refused; the old content is then still there.
    pub fn write_atomic(
        self: &Arc<Self>,
        rel: &str,
        bytes: &[u8],
        charge: Charge,
    ) -> Result<(), RootError> {
        let len = bytes.len() as u64;
        if len > MAX_STATE_FILE_BYTES {
            let max = MAX_STATE_FILE_BYTES;
            return Err(RootError::TooLarge {
                rel: rel.to_owned(),
                bytes: len,
                max,
            });
        }
        let mut staged = self.stage(rel, len, charge)?;
        staged.fill(bytes)?;
        staged.publish().map(|_| ())
    }

    /// Removes a file durably.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn remove(&self, rel: &str) -> Result<(), RootError> {
        self.remove_charged(rel, Charge::Normal).map(|_| ())
    }

    /// Removes a file and gives its bytes back to the account they were charged to.
    pub(crate) fn remove_charged(&self, rel: &str, charge: Charge) -> Result<u64, RootError> {
        let path = self.absolute(rel)?;
        let bytes = self.disk.stat(&path)?.allocated_bytes;
        self.disk.remove(&path)?;
        self.ledger.freed(bytes, charge);
        let dir = parent_of(rel);
        self.disk.sync_dir(path.parent().unwrap_or(&self.path))?;
        self.book_dir(dir)?;
        Ok(bytes)
    }

    /// Removes a file that the index can do without; nothing is synced. `bytes` are given back to the
    /// account.
    pub(crate) fn unlink(&self, rel: &str, bytes: u64, charge: Charge) -> Result<(), RootError> {
        match self.disk.remove(&self.absolute(rel)?) {
            Ok(())
            | Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => {}
            Err(error) => return Err(error.into()),
        }
        self.ledger.freed(bytes, charge);
        self.book_dir(parent_of(rel))
    }

    /// Makes a file of zeros under its own name, or takes over one that is there; nothing is synced.
    /// Gives it with its allocated bytes.
    pub(crate) fn make_in_place(
        &self,
        rel: &str,
        len: u64,
        mut room: Reservation,
    ) -> Result<(Box<dyn DiskFile>, u64), RootError> {
        let path = self.absolute(rel)?;
        self.ensure_dir(parent_of(rel))?;
        let file = match self.disk.open(&path, OpenMode::CreateNew) {
            Err(DiskError {
                fault: DiskFault::Exists,
                ..
            }) => self.disk.open(&path, OpenMode::ReadWrite)?,
            other => other?,
        };
        // Zero-filled whole at once: what is written into it later needs no space. Allocated only, ext4
        // splits the unwritten extent at every write, and takes a block for the map of extents.
        let allocated = file
            .zero_fill(len)
            .and_then(|()| file.sync_data())
            .and_then(|()| Ok(file.stat()?.allocated_bytes));
        match allocated {
            Ok(allocated) => {
                room.book(allocated);
                self.book_dir(parent_of(rel))?;
                Ok((file, allocated))
            }
            Err(error) => {
                drop(file);
                if let Err(stays) = self.disk.remove(&path) {
                    tracing::warn!(error = %stays, "cannot remove a file that found no room");
                    room.book(room.bytes());
                }
                Err(error.into())
            }
        }
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_dir(&self, rel: &str) -> Result<(), RootError> {
        Ok(self.disk.sync_dir(&self.absolute(rel)?)?)
    }

    /// Names in a directory after this one, sorted, at most so many; none if it is not there.
    pub(crate) fn list_after(
        &self,
        rel: &str,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<String>, RootError> {
        match self.disk.read_dir_after(&self.absolute(rel)?, after, max) {
            Ok(names) => Ok(names),
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets that a directory was seen, so that it is made again should it be gone.
    pub(crate) fn forget_dir(&self, rel: &str) {
        let mut dirs = self.dirs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(path) = self.absolute(rel)
            && matches!(
                self.disk.stat(&path),
                Err(DiskError {
                    fault: DiskFault::NotFound,
                    ..
                })
            )
            && let Some(bytes) = dirs.remove(rel)
        {
            self.ledger.freed(bytes, Charge::Normal);
        }
    }

    /// Gives a file that is complete and synced another name, durably; a file of that name is
    /// replaced. Its bytes stay charged as they are. The caller has reserved room for the directories.
    pub(crate) fn rename_file(&self, from: &str, to: &str) -> Result<(), RootError> {
        let (old, new) = (self.absolute(from)?, self.absolute(to)?);
        self.disk.rename(&old, &new)?;
        let (old_dir, new_dir) = (parent_of(from), parent_of(to));
        self.disk.sync_dir(new.parent().unwrap_or(&self.path))?;
        if old_dir != new_dir {
            self.disk.sync_dir(old.parent().unwrap_or(&self.path))?;
            self.book_dir(old_dir)?;
        }
        self.book_dir(new_dir)
    }

    /// Creates an empty file that is not there yet. The caller has reserved what will be in it.
    pub(crate) fn create_file(&self, rel: &str) -> Result<Box<dyn DiskFile>, RootError> {
        let path = self.absolute(rel)?;
        self.ensure_dir(parent_of(rel))?;
        Ok(self.disk.open(&path, OpenMode::CreateNew)?)
    }

    /// Moves a file to the quarantine under a name that is free there, and gives that name.
    pub(crate) fn move_to_quarantine(
        &self,
        rel: &str,
        charge: Charge,
    ) -> Result<String, RootError> {
        let from = self.absolute(rel)?;
        self.ensure_dir(QUARANTINE)?;
        let base = rel.replace('/', "-");
        let mut name = base.clone();
        let mut number = 1u32;
        while self.exists(&format!("{QUARANTINE}/{name}"))? {
            name = format!("{base}.{number}");
            number = number.saturating_add(1);
        }
        let target = format!("{QUARANTINE}/{name}");
        let to = self.absolute(&target)?;
        // A name needs no file space, only perhaps a block of the directory; without room for that
        // the move still goes ahead, for leaving a damaged file in place is worse than being short.
        let slack = self.ledger.reserve(self.slack(), Charge::Reserve).ok();
        let bytes = self.disk.stat(&from)?.allocated_bytes;
        self.disk.rename(&from, &to)?;
        self.disk.sync_dir(&self.path.join(QUARANTINE))?;
        self.disk.sync_dir(from.parent().unwrap_or(&self.path))?;
        drop(slack);
        self.ledger.freed(bytes, charge);
        self.ledger.found(bytes, Charge::Normal);
        self.book_dir(QUARANTINE)?;
        self.book_dir(parent_of(rel))?;
        Ok(target)
    }

    /// Opens a file that is there.
    pub(crate) fn open_file(
        &self,
        rel: &str,
        mode: OpenMode,
    ) -> Result<Box<dyn DiskFile>, RootError> {
        Ok(self.disk.open(&self.absolute(rel)?, mode)?)
    }

    /// Facts about a file.
    pub(crate) fn stat(&self, rel: &str) -> Result<FileStat, RootError> {
        Ok(self.disk.stat(&self.absolute(rel)?)?)
    }

    /// What must be reserved to write and name a file of this length: its blocks, and room for both
    /// directories to grow.
    pub(crate) fn stage_bound(&self, len: u64) -> u64 {
        self.allocation_bound(len)
            .saturating_add(self.slack().saturating_mul(2))
    }

    /// Reserves room for a file of `len` bytes and creates it under a temporary name; it gets the
    /// name `rel` when published.
    pub(crate) fn stage(
        self: &Arc<Self>,
        rel: &str,
        len: u64,
        charge: Charge,
    ) -> Result<Staged, RootError> {
        // INV-04: reserved before the first byte.
        let reservation = self.ledger.reserve(self.stage_bound(len), charge)?;
        self.stage_with(rel, len, reservation)
    }

    /// Like [`Root::stage`], from bytes reserved earlier.
    pub(crate) fn stage_with(
        self: &Arc<Self>,
        rel: &str,
        len: u64,
        reservation: Reservation,
    ) -> Result<Staged, RootError> {
        self.absolute(rel)?;
        let dir = parent_of(rel);
        if !dir.is_empty() {
            self.ensure_dir(dir)?;
        }
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        let temp = format!("{TMP}/{number}");
        let path = self.absolute(&temp)?;
        let charge = reservation.charge();
        let file = self.with_ballast(charge, || self.disk.open(&path, OpenMode::CreateNew))?;
        Ok(Staged {
            root: Arc::clone(self),
            file: Some(file),
            temp: Some(temp),
            rel: rel.to_owned(),
            charge,
            reservation: Some(reservation),
            booked: 0,
            len,
        })
    }

    /// Syncs the content of files that were written, at once.
    pub(crate) fn sync_staged<'s>(
        &self,
        all: impl Iterator<Item = &'s mut Staged>,
    ) -> Vec<Result<(), RootError>> {
        let mut all: Vec<&mut Staged> = all.collect();
        let files: Result<Vec<&dyn DiskFile>, RootError> =
            all.iter().map(|staged| staged.file()).collect();
        let synced = match files {
            Ok(files) => self.disk.sync_files(&files),
            Err(error) => return all.iter().map(|_| Err(error.clone())).collect(),
        };
        all.iter_mut()
            .zip(synced)
            .map(|(staged, synced)| synced.map_err(RootError::from).and_then(|()| staged.book()))
            .collect()
    }

    /// Counts what this directory has grown by through names that are durable. An error from here on
    /// would say that they are not, and whoever then goes on as before writes the same place of a log
    /// twice.
    pub(crate) fn named_in(&self, dir: &str) {
        for dir in [TMP, dir] {
            if let Err(error) = self.book_dir(dir) {
                tracing::warn!(%error, dir, "cannot measure a directory; the next write in it does");
            }
        }
    }

    /// Takes a file that has served from its place, to be given another name: its blocks stay
    /// allocated and charged. What is in it is stale.
    pub(crate) fn restage(self: &Arc<Self>, rel: &str) -> Result<Staged, RootError> {
        let reservation = self
            .ledger
            .reserve(self.slack().saturating_mul(2), Charge::Normal)?;
        let from = self.absolute(rel)?;
        let file = self.disk.open(&from, OpenMode::ReadWrite)?;
        let stat = file.stat()?;
        let number = self.next_temp.fetch_add(1, Ordering::Relaxed);
        let temp = format!("{TMP}/{number}");
        self.disk.rename(&from, &self.absolute(&temp)?)?;
        Ok(Staged {
            root: Arc::clone(self),
            file: Some(file),
            temp: Some(temp),
            rel: rel.to_owned(),
            charge: Charge::Normal,
            reservation: Some(reservation),
            booked: stat.allocated_bytes,
            len: stat.len,
        })
    }
}

/// What a walk adds up.
#[derive(Debug, Default)]
struct Walk {
    /// Whether the directories that grow with the store are walked too.
    bulk: bool,
    own_bytes: u64,
    foreign_bytes: u64,
    dirs: BTreeMap<String, u64>,
}

pub(crate) fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() {
        name.to_owned()
    } else {
        format!("{dir}/{name}")
    }
}

/// Whether a path below the root is one that a node makes, by its name and kind. All others are
/// foreign.
pub(crate) fn is_ours(rel: &str, kind: FileKind) -> bool {
    let hex = |text: &str, digits: usize| {
        text.len() == digits
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let of_segment = |name: &str, ends: &[&str]| {
        ends.iter().any(|end| {
            name.strip_suffix(end)
                .is_some_and(|hex| SegmentId::from_hex(hex).is_ok())
        })
    };
    let kind_dir = |dir: &str| {
        dir.strip_prefix("segments/")
            .is_some_and(|name| Kind::ALL.iter().any(|kind| kind.as_str() == name))
    };
    match kind {
        FileKind::Dir => {
            let dirs = [
                "log",
                "partial",
                "segments",
                "index",
                RECEIPTS_DIR,
                CHAIN_DIR,
            ];
            PLAIN_DIRS.contains(&rel) || dirs.contains(&rel) || kind_dir(rel)
        }
        FileKind::File => match rel.rsplit_once('/') {
            None => [LOCK, BALLAST, "owner", "clock"].contains(&rel),
            Some((dir, _)) if PLAIN_DIRS.contains(&dir) => true,
            Some(("log", name)) => ["state", "refused"].contains(&name) || name.ends_with(".log"),
            Some(("partial", name)) => of_segment(name, &[".part", ".map", ".new", ".note"]),
            Some(("index", name)) => ["catalog", "journal"].contains(&name),
            Some((dir, name)) if dir == RECEIPTS_DIR => of_segment(name, &[".rcpts"]),
            Some((dir, name)) if dir == CHAIN_DIR => name
                .strip_suffix(".idx")
                .and_then(|stem| stem.split_once('-'))
                .is_some_and(|(log, page)| hex(log, 32) && page.parse::<u64>().is_ok()),
            Some((dir, name)) => kind_dir(dir) && of_segment(name, &[".seg"]),
        },
        // The local door of a node may stand in its root.
        FileKind::Other => !rel.contains('/') && rel.ends_with(".sock"),
        FileKind::Symlink => false,
    }
}

fn parent_of(rel: &str) -> &str {
    rel.rsplit_once('/').map_or("", |(dir, _)| dir)
}

/// A file that is being written under a temporary name. Unless published it is removed again.
#[derive(Debug)]
pub(crate) struct Staged {
    root: Arc<Root>,
    file: Option<Box<dyn DiskFile>>,
    temp: Option<String>,
    rel: String,
    reservation: Option<Reservation>,
    charge: Charge,
    /// Allocated bytes that the ledger has booked for it so far.
    booked: u64,
    len: u64,
}

/// What publishing gives: the open file and its allocated bytes.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) file: Box<dyn DiskFile>,
    pub(crate) allocated: u64,
}

impl RootError {
    /// Whether the file system was full before a file got its name. A full file system while naming
    /// it leaves unknown what is on the device, as any other failure there does.
    pub(crate) fn is_file_system_full(&self) -> bool {
        matches!(
            self,
            Self::Disk(DiskError { fault: DiskFault::NoSpace, op, .. })
                if !matches!(op, DiskOp::Rename | DiskOp::SyncDir)
        )
    }
}

impl Staged {
    fn file(&self) -> Result<&dyn DiskFile, RootError> {
        self.file
            .as_deref()
            .ok_or_else(|| RootError::Path(self.rel.clone()))
    }

    /// Gives it another final name.
    pub(crate) fn rename(&mut self, rel: String) {
        self.rel = rel;
    }

    /// Writes and syncs the whole content.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> Result<(), RootError> {
        self.write(bytes)?;
        self.file()?.sync_data()?;
        self.book()
    }

    /// Writes the whole content; it is synced by [`Root::sync_staged`].
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), RootError> {
        let file = self.file()?;
        if self.len > 0 {
            self.root.with_ballast(self.charge, || {
                // Allocating the exact length first keeps file systems from allocating ahead of it.
                file.allocate(self.len)?;
                file.write_at(0, bytes)
            })?;
        }
        Ok(())
    }

    /// Allocated bytes booked for it so far.
    pub(crate) fn booked(&self) -> u64 {
        self.booked
    }

    /// Makes it a file of zeros, and syncs it.
    pub(crate) fn fill_zeros(&mut self) -> Result<(), RootError> {
        let file = self.file()?;
        self.root
            .with_ballast(self.charge, || file.zero_fill(self.len))?;
        file.sync_data()?;
        self.book()
    }

    /// Turns what was reserved for the content into what is allocated.
    fn book(&mut self) -> Result<(), RootError> {
        let allocated = self.file()?.stat()?.allocated_bytes;
        if let Some(reservation) = &mut self.reservation {
            reservation.book(allocated.saturating_sub(self.booked));
            self.booked = self.booked.max(allocated);
        }
        Ok(())
    }

    /// Overwrites a part and syncs.
    pub(crate) fn overwrite(&self, offset: u64, bytes: &[u8]) -> Result<(), RootError> {
        let file = self.file()?;
        file.write_at(offset, bytes)?;
        Ok(file.sync_data()?)
    }

    /// Gives it its name, durably.
    pub(crate) fn publish(mut self) -> Result<Published, RootError> {
        let file = self.name()?;
        let dir = parent_of(&self.rel);
        self.root.disk.sync_dir(&self.root.path.join(dir))?;
        self.root.named_in(dir);
        Ok(Published {
            file,
            allocated: self.booked,
        })
    }

    /// Gives it its name. It is durable once the directory is synced, and then [`Root::named_in`] counts
    /// what the directory has grown by.
    pub(crate) fn name(&mut self) -> Result<Box<dyn DiskFile>, RootError> {
        self.book()?;
        let (Some(file), Some(temp)) = (self.file.take(), self.temp.clone()) else {
            return Err(RootError::Path(self.rel.clone()));
        };
        let root = &self.root;
        let from = root.absolute(&temp)?;
        let to = root.absolute(&self.rel)?;
        let replaced = match root.disk.stat(&to) {
            Ok(stat) => stat.allocated_bytes,
            Err(DiskError {
                fault: DiskFault::NotFound,
                ..
            }) => 0,
            Err(error) => return Err(error.into()),
        };
        root.disk.rename(&from, &to)?;
        self.temp = None;
        root.ledger.freed(replaced, Charge::Normal);
        Ok(file)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.file = None;
        let Some(temp) = self.temp.take() else { return };
        let removed = self
            .root
            .absolute(&temp)
            .and_then(|path| Ok(self.root.disk.remove(&path)?));
        match removed {
            Ok(()) => self.root.ledger.freed(self.booked, self.charge),
            Err(error) => {
                // It stays until the next start, so it stays charged until then.
                tracing::warn!(%error, "cannot remove a temporary file");
                if let (Some(mut reservation), Ok(stat)) =
                    (self.reservation.take(), self.root.stat(&temp))
                {
                    reservation.book(stat.allocated_bytes.saturating_sub(self.booked));
                }
            }
        }
    }
}

/// The names in a directory, none if it is not there. Used by offline readers, which take no lock.
pub(crate) fn list_dir(disk: &dyn Disk, path: &Path) -> Result<Vec<String>, DiskError> {
    match disk.read_dir(path) {
        Ok(names) => Ok(names),
        Err(DiskError {
            op: DiskOp::ReadDir,
            fault: DiskFault::NotFound,
            ..
        }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
