//! Doors to the world: each executor takes a [`Permit`] by value and does exactly what it allows.
//!
//! What an executor is given is the parsed action inside the permit, never the caller's bytes, and
//! a permit is spent by the call, so that one decision is one effect. A deny has no way in here.
//!
//! The first executor is [`ReadFile`]; others follow with their own issues.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};
use tidelock_interceptor::{Permit, RecordPosition};

/// The action that [`ReadFile`] carries out.
pub const READ_ACTION: &str = "fs.read";

/// Why a permitted action was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The permit is for another action or resource type.
    #[error(
        "the permit is for {action} on a {resource_type}, this door carries out {READ_ACTION} on a File"
    )]
    OtherAction {
        /// What the permit allows.
        action: String,
        /// The type of what it allows it on.
        resource_type: String,
    },
    /// The resource lies outside the directory that this executor serves.
    #[error("{path} is not below {root}")]
    Outside {
        /// The permitted path.
        path: String,
        /// The served directory.
        root: PathBuf,
    },
    /// The file is longer than the executor reads.
    #[error("{path} is longer than {max_bytes} bytes")]
    TooLong {
        /// The permitted path.
        path: String,
        /// The limit.
        max_bytes: u64,
    },
    /// The system refused; a symbolic link on the way is refused as `ELOOP`.
    #[error("{path}: {source}")]
    Io {
        /// The permitted path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What an executor has done, with the record of the decision that allowed it.
#[derive(Debug, PartialEq, Eq)]
pub struct Done<T> {
    /// Where the allow is recorded.
    pub record: RecordPosition,
    /// The result.
    pub output: T,
}

/// Reads files below one directory, through no symbolic link.
///
/// ```compile_fail,E0308
/// # use tidelock_executors::ReadFile;
/// # use tidelock_interceptor::Action;
/// fn without_permit(door: &ReadFile, action: Action) {
///     let _ = door.execute(action);
/// }
/// ```
///
/// ```
/// # use tidelock_executors::ReadFile;
/// # use tidelock_interceptor::Permit;
/// fn with_permit(door: &ReadFile, permit: Permit) {
///     let _ = door.execute(permit);
/// }
/// ```
#[derive(Debug)]
pub struct ReadFile {
    root: PathBuf,
    directory: OwnedFd,
    max_bytes: u64,
}

impl ReadFile {
    /// Serves the files below `root`, each of at most `max_bytes`.
    ///
    /// # Errors
    /// What the system said when `root` could not be opened as a directory.
    pub fn new(root: &Path, max_bytes: u64) -> io::Result<Self> {
        let root = root.canonicalize()?;
        let directory = open(
            &root,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            root,
            directory,
            max_bytes,
        })
    }

    /// Reads the file that the permit allows.
    ///
    /// # Errors
    /// [`ExecuteError`]; the permit is spent all the same.
    pub fn execute(&self, permit: Permit) -> Result<Done<Vec<u8>>, ExecuteError> {
        let record = permit.record();
        let action = permit.into_action();
        if action.name() != READ_ACTION || action.resource_type() != "File" {
            return Err(ExecuteError::OtherAction {
                action: action.name().to_owned(),
                resource_type: action.resource_type().to_owned(),
            });
        }
        let path = action.resource_id().to_owned();
        let below =
            Path::new(&path)
                .strip_prefix(&self.root)
                .map_err(|_| ExecuteError::Outside {
                    path: path.clone(),
                    root: self.root.clone(),
                })?;
        let io = |source: io::Error| ExecuteError::Io {
            path: path.clone(),
            source,
        };
        // The kernel resolves below the open directory: what was renamed or linked since the
        // decision cannot lead out of it.
        let file = openat2(
            &self.directory,
            below,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
        .map_err(|e| io(e.into()))?;
        let mut output = Vec::new();
        let read = File::from(file)
            .take(self.max_bytes.saturating_add(1))
            .read_to_end(&mut output)
            .map_err(io)?;
        if u64::try_from(read).unwrap_or(u64::MAX) > self.max_bytes {
            return Err(ExecuteError::TooLong {
                path,
                max_bytes: self.max_bytes,
            });
        }
        Ok(Done { record, output })
    }
}
