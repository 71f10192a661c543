//! Opening the doors: a TCP socket on loopback, a TLS socket, a Unix socket with a mode.
//!
//! The Unix socket appears under its name only when its mode is already right: it is made in a
//! directory that nobody else can enter and then renamed. A socket file that is left over is
//! replaced only when nobody listens on it; anything else under that name is left alone.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::os::unix::net::{SocketAddr as StdSocketAddr, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

/// The widest mode that a socket may have: owner and group.
const MODE_MAX: u32 = 0o660;

/// A Unix socket to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixDoor {
    path: PathBuf,
    mode: u32,
    private_dir: bool,
}

impl UnixDoor {
    /// A socket at this path, for its owner only (mode 0600).
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mode: 0o600,
            private_dir: false,
        }
    }

    /// The socket's mode, at most 0660.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// The socket's directory is made with mode 0700 if it is missing, and refused if it is open
    /// to anybody else.
    #[must_use]
    pub fn private_dir(mut self) -> Self {
        self.private_dir = true;
        self
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Why a door could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// The TCP address can be reached from other machines.
    #[error(
        "gateway address {0} is not a loopback address: without TLS the decision API is for this machine only, use 127.0.0.1 or [::1]"
    )]
    NotLoopback(SocketAddr),
    /// Something already listens there.
    #[error("gateway address {0} is in use: stop what listens there or choose another port")]
    TcpInUse(SocketAddr),
    /// The system would not open the TCP socket.
    #[error("gateway address {address} cannot be opened: {reason}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// A live server has the socket.
    #[error("socket {} is in use by a running server: stop it or choose another path", .0.display())]
    SocketInUse(PathBuf),
    /// Something other than a socket has the name.
    #[error("{} exists and is not a socket: move it away or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The mode would let everybody in, or not even the owner.
    #[error("socket mode {0:04o} is not usable: it may be 0600 to 0660")]
    Mode(u32),
    /// The directory is open to others, who could swap the socket.
    #[error(
        "socket directory {} has mode {mode:04o}, writable by others{}: run `chmod {} {}`",
        path.display(),
        if *.private { " or not private" } else { "" },
        if *.private { "700" } else { "go-w" },
        path.display()
    )]
    DirectoryMode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Whether a private directory was asked for.
        private: bool,
    },
    /// The directory belongs to somebody else.
    #[error(
        "socket directory {} belongs to user id {owner}, not to root or to the node's own user",
        path.display()
    )]
    DirectoryOwner {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The system would not make the Unix socket.
    #[error("socket {} cannot be opened: {reason}", path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

pub(crate) async fn tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::NotLoopback(address));
    }
    bind(address).await
}

/// Opens the door that other machines may reach. Only one that speaks TLS is opened so.
pub(crate) async fn tls(address: SocketAddr) -> Result<TcpListener, ListenError> {
    bind(address).await
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => ListenError::TcpInUse(address),
            _ => ListenError::Tcp {
                address,
                reason: error.to_string(),
            },
        })
}

/// A listening Unix socket, whose file goes when this does, if it is still the same file.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    pub(crate) listener: UnixListener,
    _file: SocketFile,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket file was left behind");
        }
    }
}

pub(crate) fn unix(door: &UnixDoor) -> Result<UnixSocket, ListenError> {
    if door.mode & !MODE_MAX != 0 || door.mode & 0o600 != 0o600 {
        return Err(ListenError::Mode(door.mode));
    }
    let failed = |error: io::Error| ListenError::Unix {
        path: door.path.clone(),
        reason: error.to_string(),
    };
    let directory = match door.path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The name it will have must be one that a client can give to the kernel.
    StdSocketAddr::from_pathname(&door.path).map_err(failed)?;
    check_directory(directory, door.private_dir, failed)?;
    check_name_is_free(&door.path, failed)?;

    // Short names: a socket's path has 107 bytes in all.
    let cradle = directory.join(format!(".tl{}", std::process::id()));
    let _ = fs::remove_dir_all(&cradle);
    DirBuilder::new()
        .mode(0o700)
        .create(&cradle)
        .map_err(failed)?;
    let born = cradle.join("s");
    let made = UnixListener::bind(&born).and_then(|listener| {
        fs::set_permissions(&born, Permissions::from_mode(door.mode))?;
        let found = fs::symlink_metadata(&born)?;
        fs::rename(&born, &door.path)?;
        Ok((listener, found))
    });
    let _ = fs::remove_dir_all(&cradle);
    let (listener, found) = made.map_err(failed)?;
    let file = SocketFile {
        path: door.path.clone(),
        device: found.dev(),
        inode: found.ino(),
    };
    Ok(UnixSocket {
        listener,
        _file: file,
    })
}

fn check_directory(
    directory: &Path,
    private: bool,
    failed: impl Fn(io::Error) -> ListenError,
) -> Result<(), ListenError> {
    if private {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
    }
    let found = fs::metadata(directory).map_err(&failed)?;
    let owner = found.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(ListenError::DirectoryOwner {
            path: directory.to_owned(),
            owner,
        });
    }
    let mode = found.mode() & 0o7777;
    // In a sticky directory others can add names but not replace ours.
    let sticky = mode & 0o1000 != 0;
    let open = if private {
        mode & 0o077 != 0
    } else {
        mode & 0o022 != 0 && !sticky
    };
    if open {
        return Err(ListenError::DirectoryMode {
            path: directory.to_owned(),
            mode,
            private,
        });
    }
    Ok(())
}

fn check_name_is_free(
    path: &Path,
    failed: impl Fn(io::Error) -> ListenError,
) -> Result<(), ListenError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            Err(ListenError::NotASocket(path.to_owned()))
        }
        // Only a refused connection says that nobody listens; a full queue or a missing
        // permission does not.
        Ok(_) => match StdUnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            _ => Err(ListenError::SocketInUse(path.to_owned())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn only_loopback_is_opened() {
        for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0", "[2001:db8::1]:0"] {
            let address = address.parse().unwrap();
            assert_eq!(
                tcp(address).await.unwrap_err(),
                ListenError::NotLoopback(address)
            );
        }
        let open = tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let taken = open.local_addr().unwrap();
        assert_eq!(tcp(taken).await.unwrap_err(), ListenError::TcpInUse(taken));
        assert!(tcp("127.0.0.3:0".parse().unwrap()).await.is_ok());
    }

    #[tokio::test]
    async fn a_socket_has_its_mode_and_leaves_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for mode in [0o600, 0o660] {
            let socket = unix(&UnixDoor::new(&path).mode(mode)).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
            assert!(StdUnixStream::connect(&path).is_ok());
            drop(socket);
            assert!(!path.exists());
        }
        for mode in [0o666, 0o661, 0o777, 0o400, 0o4600] {
            let refused = unix(&UnixDoor::new(&path).mode(mode)).map(|_| ());
            assert_eq!(refused, Err(ListenError::Mode(mode)));
        }
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            0,
            "nothing is left over"
        );
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let live = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(
            unix(&UnixDoor::new(&path)).map(|_| ()),
            Err(ListenError::SocketInUse(path.clone()))
        );
        drop(live);
        assert!(path.exists(), "its server is gone, its file is not");
        let ours = unix(&UnixDoor::new(&path)).unwrap();
        assert!(StdUnixStream::connect(&path).is_ok());

        // A file that has since come to be somebody else's stays.
        fs::remove_file(&path).unwrap();
        let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert_eq!(
            unix(&UnixDoor::new(&path)).map(|_| ()),
            Err(ListenError::NotASocket(path.clone()))
        );
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(
            unix(&UnixDoor::new(&link)).map(|_| ()),
            Err(ListenError::NotASocket(link))
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }

    #[tokio::test]
    async fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("run");
        let door = UnixDoor::new(parent.join("s"));
        assert!(
            matches!(unix(&door), Err(ListenError::Unix { .. })),
            "it does not exist"
        );

        let private = door.clone().private_dir();
        drop(unix(&private).unwrap());
        assert_eq!(fs::metadata(&parent).unwrap().mode() & 0o7777, 0o700);

        chmod(&parent, 0o750);
        let refused = ListenError::DirectoryMode {
            path: parent.clone(),
            mode: 0o750,
            private: true,
        };
        assert_eq!(unix(&private).map(|_| ()), Err(refused));
        assert!(
            unix(&door).is_ok(),
            "group may look, so long as it may not write"
        );

        chmod(&parent, 0o777);
        let refused = ListenError::DirectoryMode {
            path: parent.clone(),
            mode: 0o777,
            private: false,
        };
        assert_eq!(unix(&door).map(|_| ()), Err(refused));
        chmod(&parent, 0o1777);
        assert!(unix(&door).is_ok());
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("x".repeat(120));
        fs::create_dir(&parent).unwrap();
        assert!(matches!(
            unix(&UnixDoor::new(parent.join("s"))),
            Err(ListenError::Unix { .. })
        ));
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 0);
    }
}
