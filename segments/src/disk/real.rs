//! The real disk: Linux system calls, every path walked without following links.

use std::collections::BinaryHeap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    Advice, AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, Stat, StatFs,
    StatxFlags,
};
use rustix::io::Errno;

use super::{
    DIRECT_BUFFER_ALIGN_BYTES, Disk, DiskError, DiskFault, DiskFile, DiskOp, FileKind, FileStat,
    OpenMode, Volume,
};

/// The operating system's file systems.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl RealDisk {
    /// The real disk.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

/// A thread that makes one system call.
const SYNC_STACK_BYTES: usize = 64 * 1024;

/// Zeros are written in pieces of this size.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

fn fault(errno: Errno) -> DiskFault {
    match errno {
        Errno::NOENT => DiskFault::NotFound,
        Errno::EXIST => DiskFault::Exists,
        Errno::NOSPC | Errno::DQUOT => DiskFault::NoSpace,
        Errno::AGAIN => DiskFault::Busy,
        Errno::ACCESS | Errno::PERM => DiskFault::Denied,
        Errno::LOOP | Errno::NOTDIR => DiskFault::NotPlain,
        other => DiskFault::Os(other.raw_os_error()),
    }
}

fn failed(op: DiskOp, path: &Path) -> impl Fn(Errno) -> DiskError + '_ {
    move |errno| DiskError::new(op, path, fault(errno))
}

const DIR_FLAGS: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens the directory of an absolute path for use in `…at` calls, component by component.
fn walk(op: DiskOp, dir: &Path, named: &Path) -> Result<OwnedFd, DiskError> {
    let failed = failed(op, named);
    let mut at = rustix::fs::open("/", DIR_FLAGS, Mode::empty()).map_err(&failed)?;
    for component in dir.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => {
                at = rustix::fs::openat(&at, name, DIR_FLAGS, Mode::empty()).map_err(&failed)?;
            }
            Component::CurDir | Component::ParentDir | Component::Prefix(_) => {
                return Err(DiskError::new(op, named, DiskFault::NotPlain));
            }
        }
    }
    Ok(at)
}

/// The open parent directory and the last component.
fn parent(op: DiskOp, path: &Path) -> Result<(OwnedFd, &Path), DiskError> {
    match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) if path.is_absolute() => {
            Ok((walk(op, dir, path)?, Path::new(name)))
        }
        _ => Err(DiskError::new(op, path, DiskFault::NotPlain)),
    }
}

fn open_at(op: DiskOp, path: &Path, flags: OFlags) -> Result<OwnedFd, DiskError> {
    let (dir, name) = parent(op, path)?;
    // O_NONBLOCK: a pipe planted under this name must not block the open.
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::openat(&dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed(op, path))
}

/// Most bytes of a file that is only read that are asked of the device at once. A read of a whole segment,
/// and the megabytes that a kernel reads ahead of it, would stand in the device's queue before the
/// syncs of the log.
const READ_AT_ONCE_BYTES: usize = 256 * 1024;

/// The alignment that direct reads and writes of the log keep.
const DIRECT_ALIGN_BYTES: u32 = 512;

/// Switches the page cache off for an open file if the file system allows it for multiples of 512
/// bytes, and gives the alignment that holds from then on.
fn make_direct(fd: &OwnedFd) -> u64 {
    let fits = |align: u32| align != 0 && DIRECT_ALIGN_BYTES.is_multiple_of(align);
    let allowed =
        rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).is_ok_and(|stat| {
            fits(stat.stx_dio_offset_align)
                && usize::try_from(stat.stx_dio_mem_align).is_ok_and(|align| {
                    align != 0 && DIRECT_BUFFER_ALIGN_BYTES.is_multiple_of(align)
                })
        });
    let switched = allowed
        && rustix::fs::fcntl_getfl(fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT))
            .is_ok();
    if switched {
        u64::from(DIRECT_ALIGN_BYTES)
    } else {
        1
    }
}

/// `st_*` fields differ in width and sign between architectures.
#[expect(
    clippy::useless_conversion,
    reason = "the field types differ between architectures; on this one some conversions are plain"
)]
fn to_stat(stat: &Stat) -> FileStat {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Dir,
        FileType::Symlink => FileKind::Symlink,
        _ => FileKind::Other,
    };
    FileStat {
        kind,
        len: u64::try_from(stat.st_size).unwrap_or(0),
        allocated_bytes: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512),
        dev: u64::try_from(stat.st_dev).unwrap_or(0),
        ino: u64::try_from(stat.st_ino).unwrap_or(0),
        nlink: u64::try_from(stat.st_nlink).unwrap_or(0),
        mode: u32::try_from(stat.st_mode).unwrap_or(0) & 0o7777,
        uid: stat.st_uid,
    }
}

/// The magic number of a file system.
#[expect(
    clippy::unnecessary_fallible_conversions,
    reason = "the field types differ between architectures; on this one some conversions are plain"
)]
fn magic(fs: &StatFs) -> i128 {
    // The type is signed on most architectures; the magic numbers are unsigned 32-bit values.
    i128::try_from(fs.f_type).unwrap_or(0) & 0xffff_ffff
}

/// File systems that write every change to another place, by their magic number.
fn copy_on_write_name(magic: i128) -> Option<&'static str> {
    Some(match magic {
        0x9123_683e => "btrfs",
        0xca45_1a4e => "bcachefs",
        0x2fc1_2fc1 => "zfs",
        _ => return None,
    })
}

/// Names of the network file systems known by their magic number (INV-01).
fn network_name(magic: i128) -> Option<&'static str> {
    Some(match magic {
        0x6969 => "nfs",
        0xff53_4d42 => "cifs",
        0xfe53_4d42 => "smb2",
        0x517b => "smb",
        0x0102_1997 => "9p",
        0x00c3_6400 => "ceph",
        0x5346_414f | 0x6b41_4653 => "afs",
        0x7375_7245 => "coda",
        0x7461_636f => "ocfs2",
        0x0116_1970 => "gfs2",
        0x0bd0_0bd0 => "lustre",
        0x564c => "ncp",
        0x4750_4653 => "gpfs",
        0x1983_0326 => "beegfs",
        _ => return None,
    })
}

impl Disk for RealDisk {
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError> {
        let bad = |e: std::io::Error| {
            let fault = e.raw_os_error().map_or(DiskFault::NotPlain, |code| {
                fault(Errno::from_raw_os_error(code))
            });
            DiskError::new(DiskOp::Stat, path, fault)
        };
        let absolute = std::path::absolute(path).map_err(bad)?;
        match (absolute.parent(), absolute.file_name()) {
            (Some(parent), Some(name)) => {
                Ok(std::fs::canonicalize(parent).map_err(bad)?.join(name))
            }
            _ => Err(DiskError::new(DiskOp::Stat, path, DiskFault::NotPlain)),
        }
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError> {
        let flags = match mode {
            OpenMode::Read => OFlags::RDONLY,
            OpenMode::ReadWrite | OpenMode::Direct => OFlags::RDWR,
            OpenMode::CreateNew => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
        };
        let fd = open_at(DiskOp::Open, path, flags)?;
        if mode == OpenMode::Read {
            // No reading ahead. Where it is not understood the reads are only less polite.
            let _ = rustix::fs::fadvise(&fd, 0, None, Advice::Random);
        }
        let align_bytes = match mode {
            OpenMode::Direct => make_direct(&fd),
            OpenMode::Read | OpenMode::ReadWrite | OpenMode::CreateNew => 1,
        };
        let file = RealFile {
            fd,
            path: path.to_owned(),
            align_bytes,
        };
        if file.stat()?.kind != FileKind::File {
            return Err(DiskError::new(DiskOp::Open, path, DiskFault::NotPlain));
        }
        Ok(Box::new(file))
    }

    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError> {
        let fd = open_at(DiskOp::Lock, path, OFlags::RDWR | OFlags::CREATE)?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)
            .map_err(failed(DiskOp::Lock, path))?;
        Ok(Box::new(RealFile {
            fd,
            path: path.to_owned(),
            align_bytes: 1,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError> {
        let (from_dir, from_name) = parent(DiskOp::Rename, from)?;
        let (to_dir, to_name) = parent(DiskOp::Rename, to)?;
        rustix::fs::renameat(&from_dir, from_name, &to_dir, to_name)
            .map_err(failed(DiskOp::Rename, to))
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        let (dir, name) = parent(DiskOp::Remove, path)?;
        rustix::fs::unlinkat(&dir, name, AtFlags::empty()).map_err(failed(DiskOp::Remove, path))
    }

    fn create_dir(&self, path: &Path) -> Result<(), DiskError> {
        let (dir, name) = parent(DiskOp::CreateDir, path)?;
        rustix::fs::mkdirat(&dir, name, Mode::RWXU).map_err(failed(DiskOp::CreateDir, path))
    }

    fn sync_dir(&self, path: &Path) -> Result<(), DiskError> {
        let fd = open_at(DiskOp::SyncDir, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        rustix::fs::fsync(&fd).map_err(failed(DiskOp::SyncDir, path))
    }

    fn sync_files(&self, files: &[&dyn DiskFile]) -> Vec<Result<(), DiskError>> {
        let Some((own, others)) = files.split_first() else {
            return Vec::new();
        };
        // A thread for each: syncs that wait at the same time share the file system's journal commits
        // and the device's flushes, and one after the other would pay for each of both.
        std::thread::scope(|scope| {
            let begun: Vec<_> = others
                .iter()
                .map(|file| {
                    let sync = || file.sync_data();
                    let thread = std::thread::Builder::new().stack_size(SYNC_STACK_BYTES);
                    // No thread to be had: it is done by this one.
                    thread.spawn_scoped(scope, sync).map_err(|_| file)
                })
                .collect();
            let mut done = vec![own.sync_data()];
            done.extend(begun.into_iter().map(|begun| {
                match begun {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    Err(file) => file.sync_data(),
                }
            }));
            done
        })
    }

    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError> {
        let fd = open_at(DiskOp::ReadDir, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let dir = rustix::fs::Dir::new(fd).map_err(failed(DiskOp::ReadDir, path))?;
        let mut names = Vec::new();
        for entry in dir {
            let entry = entry.map_err(failed(DiskOp::ReadDir, path))?;
            let name = entry.file_name().to_string_lossy();
            if name != "." && name != ".." {
                names.push(name.into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn read_dir_after(
        &self,
        path: &Path,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<String>, DiskError> {
        let fd = open_at(DiskOp::ReadDir, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let dir = rustix::fs::Dir::new(fd).map_err(failed(DiskOp::ReadDir, path))?;
        // The smallest names after the one asked for; the largest of them goes when there are too many.
        let mut names: BinaryHeap<String> = BinaryHeap::new();
        for entry in dir {
            let entry = entry.map_err(failed(DiskOp::ReadDir, path))?;
            let name = entry.file_name().to_string_lossy();
            let wanted = name != "."
                && name != ".."
                && after.is_none_or(|after| *name > *after)
                && (names.len() < max || names.peek().is_some_and(|largest| *name < **largest));
            if wanted {
                names.push(name.into_owned());
                if names.len() > max {
                    names.pop();
                }
            }
        }
        Ok(names.into_sorted_vec())
    }

    fn stat(&self, path: &Path) -> Result<FileStat, DiskError> {
        let (dir, name) = parent(DiskOp::Stat, path)?;
        rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map(|stat| to_stat(&stat))
            .map_err(failed(DiskOp::Stat, path))
    }

    fn volume(&self, path: &Path) -> Result<Volume, DiskError> {
        let fd = open_at(DiskOp::Volume, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let failed = failed(DiskOp::Volume, path);
        let kind = rustix::fs::fstatfs(&fd).map_err(&failed)?;
        let size = rustix::fs::fstatvfs(&fd).map_err(&failed)?;
        Ok(Volume {
            block_bytes: size.f_bsize.clamp(512, 1024 * 1024),
            available_bytes: size.f_bavail.saturating_mul(size.f_frsize),
            network: network_name(magic(&kind)),
            copy_on_write: copy_on_write_name(magic(&kind)),
        })
    }

    fn boot_id(&self) -> Result<String, DiskError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        std::fs::read_to_string(path)
            .map(|text| text.trim().to_owned())
            .map_err(|e| {
                let code = e.raw_os_error().unwrap_or(0);
                DiskError::new(DiskOp::Read, path, fault(Errno::from_raw_os_error(code)))
            })
    }

    fn own_uid(&self) -> u32 {
        rustix::process::geteuid().as_raw()
    }
}

#[derive(Debug)]
struct RealFile {
    fd: OwnedFd,
    path: PathBuf,
    align_bytes: u64,
}

impl RealFile {
    fn failed(&self, op: DiskOp, errno: Errno) -> DiskError {
        DiskError::new(op, &self.path, fault(errno))
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        let mut done = 0usize;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at_once = rest.len().min(READ_AT_ONCE_BYTES);
            let piece = rest.get_mut(..at_once).unwrap_or_default();
            match rustix::io::pread(&self.fd, piece, offset.saturating_add(done as u64)) {
                Ok(0) => return Err(DiskError::new(DiskOp::Read, &self.path, DiskFault::Short)),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed(DiskOp::Read, errno)),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut done = 0usize;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pwrite(&self.fd, rest, offset.saturating_add(done as u64)) {
                Ok(0) => {
                    return Err(DiskError::new(
                        DiskOp::Write,
                        &self.path,
                        DiskFault::NoSpace,
                    ));
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.failed(DiskOp::Write, errno)),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> Result<(), DiskError> {
        rustix::fs::fdatasync(&self.fd).map_err(|errno| self.failed(DiskOp::Sync, errno))
    }

    fn allocate(&self, len: u64) -> Result<(), DiskError> {
        match rustix::fs::fallocate(self.fd.as_fd(), FallocateFlags::empty(), 0, len) {
            // The file system cannot allocate ahead; the write that follows allocates.
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(self.failed(DiskOp::Allocate, errno)),
        }
    }

    fn zero_fill(&self, len: u64) -> Result<(), DiskError> {
        self.allocate(len)?;
        let mut at = 0u64;
        while at < len {
            let piece = usize::try_from(len - at)
                .unwrap_or(usize::MAX)
                .min(ZEROS.len());
            self.write_at(at, ZEROS.get(..piece).unwrap_or(&ZEROS))?;
            at += piece as u64;
        }
        Ok(())
    }

    fn stat(&self) -> Result<FileStat, DiskError> {
        rustix::fs::fstat(&self.fd)
            .map(|stat| to_stat(&stat))
            .map_err(|errno| self.failed(DiskOp::Stat, errno))
    }
    fn align_bytes(&self) -> u64 {
        self.align_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_apart_by_their_magic_number() {
        assert_eq!(copy_on_write_name(0x9123_683e), Some("btrfs"));
        assert_eq!(copy_on_write_name(0xca45_1a4e), Some("bcachefs"));
        assert_eq!(copy_on_write_name(0x2fc1_2fc1), Some("zfs"));
        // ext4, xfs, tmpfs.
        for plain in [0xef53, 0x5846_5342, 0x0102_1994] {
            assert_eq!(copy_on_write_name(plain), None);
            assert_eq!(network_name(plain), None);
        }
        assert_eq!(network_name(0x6969), Some("nfs"));
    }

    #[test]
    fn a_directory_is_read_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        for i in 0..100 {
            std::fs::write(path.join(format!("{i:03}")), b"").unwrap();
        }
        let disk = RealDisk::new();
        let (mut all, mut after): (Vec<String>, Option<String>) = (Vec::new(), None);
        loop {
            let names = disk.read_dir_after(&path, after.as_deref(), 7).unwrap();
            assert!(names.len() <= 7);
            let Some(last) = names.last() else { break };
            after = Some(last.clone());
            all.extend(names);
        }
        assert_eq!(all, disk.read_dir(&path).unwrap());
        assert_eq!(all.len(), 100);
    }
}
