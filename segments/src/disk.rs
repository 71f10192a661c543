//! The disk behind the store: a small trait, and its real implementation.
//!
//! Everything that this crate writes goes through [`Disk`], so that crashes, torn writes and errors
//! can be injected by [`crate::testing::SimDisk`] in tests. [`RealDisk`] never follows a symbolic
//! link: it walks every path from `/` with `O_NOFOLLOW`, so a link planted below the root leads
//! nowhere.

use std::fmt;
use std::path::{Path, PathBuf};

mod real;

pub use real::RealDisk;

/// What was attempted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskOp {
    /// Opening or creating a file.
    Open,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Allocating and zero-filling.
    Allocate,
    /// Syncing a file.
    Sync,
    /// Syncing a directory.
    SyncDir,
    /// Renaming.
    Rename,
    /// Removing.
    Remove,
    /// Making a directory.
    CreateDir,
    /// Listing a directory.
    ReadDir,
    /// Asking for size, owner and kind.
    Stat,
    /// Taking the exclusive lock.
    Lock,
    /// Asking for the kind of file system.
    Volume,
}

impl fmt::Display for DiskOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Allocate => "allocate",
            Self::Sync => "sync",
            Self::SyncDir => "sync the directory",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::CreateDir => "create the directory",
            Self::ReadDir => "list",
            Self::Stat => "stat",
            Self::Lock => "lock",
            Self::Volume => "examine the file system of",
        })
    }
}

/// How it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskFault {
    /// No such file.
    #[error("no such file or directory")]
    NotFound,
    /// A file of that name exists.
    #[error("it exists already")]
    Exists,
    /// The file system is full.
    #[error("no space left on the file system")]
    NoSpace,
    /// Somebody else holds the lock.
    #[error("another process holds it")]
    Busy,
    /// Not permitted.
    #[error("permission denied")]
    Denied,
    /// A symbolic link or something else than a file or directory stands in the way.
    #[error("a symbolic link or special file stands in the way")]
    NotPlain,
    /// Fewer bytes than asked for.
    #[error("the file ends too early")]
    Short,
    /// Another error of the operating system.
    #[error("operating system error {0}")]
    Os(i32),
}

/// A failed disk operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {op} {}: {fault}", path.display())]
pub struct DiskError {
    /// What was attempted.
    pub op: DiskOp,
    /// On which path.
    pub path: PathBuf,
    /// How it failed.
    pub fault: DiskFault,
}

impl DiskError {
    pub(crate) fn new(op: DiskOp, path: &Path, fault: DiskFault) -> Self {
        Self {
            op,
            path: path.to_owned(),
            fault,
        }
    }
}

/// What a directory entry or open file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A device, socket or pipe.
    Other,
}

/// Facts about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStat {
    /// What it is.
    pub kind: FileKind,
    /// Its length.
    pub len: u64,
    /// The bytes that the file system allocates to it: 512 x `st_blocks`.
    pub allocated_bytes: u64,
    /// The device it lies on.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// Its number of names.
    pub nlink: u64,
    /// Its permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
}

/// Facts about the file system below a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The allocation unit.
    pub block_bytes: u64,
    /// Bytes available to this process.
    pub available_bytes: u64,
    /// The name of the network file system, if it is a known one.
    pub network: Option<&'static str>,
    /// The name of the file system, if it is a known one that writes every change to another place,
    /// so that allocating ahead reserves nothing.
    pub copy_on_write: Option<&'static str>,
}

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// For reading.
    Read,
    /// For reading and writing; it exists.
    ReadWrite,
    /// For reading and writing; it must not exist.
    CreateNew,
    /// For reading and writing past the page cache; it exists. Where the file system does not allow
    /// that for multiples of 512 bytes, as [`OpenMode::ReadWrite`].
    Direct,
}

/// The operations on a disk that the store needs. Paths are absolute.
///
/// All methods return [`DiskError`] and none retries.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Makes a path absolute and free of symbolic links and dots; it may not exist yet, its parent
    /// must.
    ///
    /// # Errors
    /// [`DiskError`] if the parent does not exist.
    fn canonical(&self, path: &Path) -> Result<PathBuf, DiskError>;
    /// Opens a file; a created one has mode 0600.
    ///
    /// # Errors
    /// [`DiskError`].
    fn open(&self, path: &Path, mode: OpenMode) -> Result<Box<dyn DiskFile>, DiskError>;
    /// Opens or creates a file and locks it exclusively until the value is dropped.
    ///
    /// # Errors
    /// [`DiskFault::Busy`] if another holds it.
    fn lock(&self, path: &Path) -> Result<Box<dyn DiskFile>, DiskError>;
    /// Renames, replacing a file of that name.
    ///
    /// # Errors
    /// [`DiskError`].
    fn rename(&self, from: &Path, to: &Path) -> Result<(), DiskError>;
    /// Removes a file.
    ///
    /// # Errors
    /// [`DiskError`].
    fn remove(&self, path: &Path) -> Result<(), DiskError>;
    /// Makes a directory with mode 0700.
    ///
    /// # Errors
    /// [`DiskFault::Exists`] if there is one.
    fn create_dir(&self, path: &Path) -> Result<(), DiskError>;
    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// [`DiskError`].
    fn sync_dir(&self, path: &Path) -> Result<(), DiskError>;
    /// Makes the content of several files durable, each as [`DiskFile::sync_data`] does; the answers are
    /// in the order of the files. Many at once may cost less than one after the other.
    fn sync_files(&self, files: &[&dyn DiskFile]) -> Vec<Result<(), DiskError>> {
        files.iter().map(|file| file.sync_data()).collect()
    }
    /// The names in a directory, sorted, without `.` and `..`. Names that are not UTF-8 are given in
    /// a lossy form: they are foreign.
    ///
    /// # Errors
    /// [`DiskError`].
    fn read_dir(&self, path: &Path) -> Result<Vec<String>, DiskError>;
    /// The first `max` names in a directory that come after this one in the order of
    /// [`Disk::read_dir`], so that a directory of any size is read in bounded memory.
    ///
    /// # Errors
    /// [`DiskError`].
    fn read_dir_after(
        &self,
        path: &Path,
        after: Option<&str>,
        max: usize,
    ) -> Result<Vec<String>, DiskError> {
        let mut names = self.read_dir(path)?;
        names.retain(|name| after.is_none_or(|after| name.as_str() > after));
        names.truncate(max);
        Ok(names)
    }
    /// Facts about a path, without following a symbolic link.
    ///
    /// # Errors
    /// [`DiskFault::NotFound`] if there is nothing.
    fn stat(&self, path: &Path) -> Result<FileStat, DiskError>;
    /// Facts about the file system.
    ///
    /// # Errors
    /// [`DiskError`].
    fn volume(&self, path: &Path) -> Result<Volume, DiskError>;
    /// A text that is another after every boot of the machine.
    ///
    /// # Errors
    /// [`DiskError`].
    fn boot_id(&self) -> Result<String, DiskError>;
    /// The user that this process acts as.
    fn own_uid(&self) -> u32;
}

/// An open file.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads exactly as many bytes as the buffer holds.
    ///
    /// # Errors
    /// [`DiskFault::Short`] if the file ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DiskError>;
    /// Writes all of the bytes.
    ///
    /// # Errors
    /// [`DiskError`]; how many bytes were written is then unknown.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;
    /// Makes the content durable.
    ///
    /// # Errors
    /// [`DiskError`]; what is on the device is then unknown, and a second call proves nothing.
    fn sync_data(&self) -> Result<(), DiskError>;
    /// Allocates `len` bytes from the start of the file, so that writing them needs no space.
    ///
    /// # Errors
    /// [`DiskFault::NoSpace`] if they are not there.
    fn allocate(&self, len: u64) -> Result<(), DiskError>;
    /// Allocates `len` bytes and writes zeros, so that later writes change no metadata.
    ///
    /// # Errors
    /// [`DiskError`].
    fn zero_fill(&self, len: u64) -> Result<(), DiskError>;
    /// Facts about the file.
    ///
    /// # Errors
    /// [`DiskError`].
    fn stat(&self) -> Result<FileStat, DiskError>;
    /// Of what every offset and length must be a multiple, in bytes, when reading and writing; 1
    /// unless the file was opened with [`OpenMode::Direct`]. Where it is more than 1, buffers must
    /// begin at an address that [`DIRECT_BUFFER_ALIGN_BYTES`] divides.
    fn align_bytes(&self) -> u64 {
        1
    }
}

/// The address of a buffer for direct reads and writes is a multiple of this.
pub const DIRECT_BUFFER_ALIGN_BYTES: usize = 4096;

/// Reads a whole file of at most `max` bytes.
pub(crate) fn read_all(disk: &dyn Disk, path: &Path, max: u64) -> Result<Vec<u8>, DiskError> {
    let file = disk.open(path, OpenMode::Read)?;
    let len = file.stat()?.len;
    let size = usize::try_from(len).ok().filter(|_| len <= max);
    let size = size.ok_or_else(|| DiskError::new(DiskOp::Read, path, DiskFault::NoSpace))?;
    let mut buffer = vec![0; size];
    file.read_at(0, &mut buffer)?;
    Ok(buffer)
}
