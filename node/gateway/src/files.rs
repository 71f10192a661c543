//! Files that say who may call: read only if nobody else could have written them.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Who may have access to a file beside its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nobody: what stands in it helps an attacker.
    OwnerOnly,
    /// Others may read it, and not write it.
    ReadByOthers,
}

impl Access {
    fn forbidden(self) -> u32 {
        match self {
            Self::OwnerOnly => 0o077,
            Self::ReadByOthers => 0o022,
        }
    }
}

/// Why a file of callers was not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Not there, or not readable.
    #[error("{what} {} cannot be read: {reason}", path.display())]
    Unreadable {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A directory, device or pipe.
    #[error("{what} {} is not a regular file", path.display())]
    NotAFile {
        /// What the file should be.
        what: &'static str,
        /// What was found.
        path: PathBuf,
    },
    /// Others have more access than they may.
    #[error("{what} {} has mode {mode:04o}, open to others than its owner: run `{way_out}` on it", path.display())]
    LooseMode {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What mends it.
        way_out: &'static str,
    },
    /// The owner is neither root nor the node's user.
    #[error("{what} {} belongs to user id {owner}, not to root or to the node's own user", path.display())]
    ForeignOwner {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// More than such a file can be.
    #[error("{what} {} is longer than {max} bytes", path.display())]
    TooLong {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
}

/// Reads the text of a file, after looking at who else could have written it.
pub(crate) fn read(
    path: &Path,
    what: &'static str,
    access: Access,
    max: usize,
) -> Result<String, FileError> {
    let unreadable = |error: std::io::Error| FileError::Unreadable {
        what,
        path: path.to_owned(),
        reason: error.to_string(),
    };
    // What is judged is the open file, not a name that may have come to mean another one.
    let file = File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?;
    if !found.is_file() {
        return Err(FileError::NotAFile {
            what,
            path: path.to_owned(),
        });
    }
    let mode = found.mode() & 0o7777;
    if mode & access.forbidden() != 0 {
        return Err(FileError::LooseMode {
            what,
            path: path.to_owned(),
            mode,
            way_out: match access {
                Access::OwnerOnly => "chmod 600",
                Access::ReadByOthers => "chmod go-w",
            },
        });
    }
    if found.uid() != 0 && found.uid() != rustix::process::geteuid().as_raw() {
        return Err(FileError::ForeignOwner {
            what,
            path: path.to_owned(),
            owner: found.uid(),
        });
    }
    let mut text = String::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX);
    file.take(limit.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() > max {
        return Err(FileError::TooLong {
            what,
            path: path.to_owned(),
            max,
        });
    }
    Ok(text)
}
