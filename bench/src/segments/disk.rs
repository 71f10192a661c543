//! What reaches the disk: the counters of the device, and of our own calls.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tidelock_segments::{Disk, DiskError, DiskFile, FileStat, OpenMode, RealDisk, Volume};

use crate::peers::text;

/// Bytes written to the device below a path since boot, by anybody.
pub fn device_bytes(dir: &Path) -> Result<u64, String> {
    let dev = fs::metadata(dir).map_err(text)?.dev();
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let stats = fs::read_to_string("/proc/diskstats").map_err(text)?;
    stats
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|f| f.len() > 9 && f[0] == major.to_string() && f[1] == minor.to_string())
        .and_then(|fields| fields[9].parse::<u64>().ok())
        .map(|sectors| sectors * 512)
        .ok_or_else(|| format!("/proc/diskstats has no device {major}:{minor}"))
}

/// Lets everything that is dirty reach the device, so that the next slice does not pay for it.
pub fn settle(dir: &Path) {
    if let Ok(dir) = fs::File::open(dir) {
        let _ = rustix::fs::syncfs(&dir);
    }
}

/// Drops the cached pages of every file below.
pub fn forget_pages(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            forget_pages(&path);
        } else if let Ok(file) = fs::File::open(&path) {
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

/// Bytes that the file system allocates to all files below, by their first directory.
pub fn allocated(dir: &Path) -> BTreeMap<String, u64> {
    fn add(dir: &Path, total: &mut u64) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            *total += fs::symlink_metadata(&path).map_or(0, |m| m.blocks() * 512);
            if path.is_dir() {
                add(&path, total);
            }
        }
    }
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let mut total = fs::symlink_metadata(&path).map_or(0, |m| m.blocks() * 512);
        add(&path, &mut total);
        out.insert(entry.file_name().to_string_lossy().into_owned(), total);
    }
    out
}

/// Bytes written and syncs, by what they were for.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<&'static str, u64>>);

impl Counts {
    fn add(&self, what: &'static str, n: u64) {
        *self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(what)
            .or_default() += n;
    }

    pub fn take(&self) -> BTreeMap<&'static str, u64> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The real disk with its writes counted, or without its syncs.
#[derive(Debug, Default)]
pub struct Watched {
    pub counts: Arc<Counts>,
    /// Only to fill a great store quickly, never for what is timed.
    pub without_sync: bool,
}

#[derive(Debug)]
struct WatchedFile {
    file: Box<dyn DiskFile>,
    counts: Arc<Counts>,
    path: PathBuf,
    without_sync: bool,
    /// A file that is filled with zeros is one of the log's, under whatever name it began.
    of_log: AtomicBool,
}

impl WatchedFile {
    fn what(&self) -> &'static str {
        let path = self.path.to_string_lossy();
        if self.of_log.load(Ordering::Relaxed) || path.ends_with(".log") {
            "commit"
        } else if path.contains("/index/") {
            "index"
        } else {
            "seal and state"
        }
    }
}

impl DiskFile for WatchedFile {
    fn align_bytes(&self) -> u64 {
        self.file.align_bytes()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        self.file.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.counts.add(self.what(), bytes.len() as u64);
        self.file.write_at(offset, bytes)
    }
    fn sync_data(&self) -> Result<(), DiskError> {
        if self.without_sync {
            return Ok(());
        }
        self.counts.add(
            if self.what() == "commit" {
                "syncs of the log"
            } else {
                "other syncs"
            },
            1,
        );
        self.file.sync_data()
    }
    fn allocate(&self, len: u64) -> Result<(), DiskError> {
        self.file.allocate(len)
    }
    fn zero_fill(&self, len: u64) -> Result<(), DiskError> {
        self.of_log.store(true, Ordering::Relaxed);
        self.counts.add("zero-fill", len);
        self.file.zero_fill(len)
    }
    fn stat(&self) -> Result<FileStat, DiskError> {
        self.file.stat()
    }
}

impl Watched {
    fn wrap(&self, path: &Path, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        Box::new(WatchedFile {
            file,
            counts: self.counts.clone(),
            path: path.to_owned(),
            without_sync: self.without_sync,
            of_log: AtomicBool::new(false),
        })
    }
}

impl Disk for Watched {
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError> {
        RealDisk.canonical(path)
    }
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError> {
        Ok(self.wrap(path, RealDisk.open(path, mode)?))
    }
    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        Ok(self.wrap(path, RealDisk.lock(path)?))
    }
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        RealDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        RealDisk.remove(path)
    }
    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        RealDisk.create_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> Result<(), DiskError> {
        if self.without_sync {
            return Ok(());
        }
        self.counts.add("syncs of directories", 1);
        RealDisk.sync_dir(path)
    }
    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError> {
        RealDisk.read_dir(path)
    }
    fn read_dir_after(
        &self,
        path: &Path,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<String>, DiskError> {
        RealDisk.read_dir_after(path, after, max)
    }
    fn stat(&self, path: &Path) -> Result<FileStat, DiskError> {
        RealDisk.stat(path)
    }
    fn volume(&self, path: &Path) -> Result<Volume, DiskError> {
        RealDisk.volume(path)
    }
    fn boot_id(&self) -> Result<String, DiskError> {
        RealDisk.boot_id()
    }
    fn own_uid(&self) -> u32 {
        RealDisk.own_uid()
    }
}
