//! Small file systems of our own: an image in memory, mounted over a loop device.
//!
//! They are made in a mount namespace of one test: when its last process ends, for whatever reason,
//! the kernel unmounts everything and frees the loop devices and the memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::common::not_run;

/// Set in the process that has a mount namespace of its own.
const INSIDE: &str = "TIDELOCK_KERNEL_MOUNTS";

/// Whether the programs are there; says which is not.
pub(crate) fn missing(programs: &[&str]) -> Option<String> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let absent = |program: &&&str| {
        let there = std::env::split_paths(&paths)
            .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
            .any(|dir| dir.join(program).is_file());
        !there
    };
    let absent: Vec<_> = programs.iter().filter(absent).copied().collect();
    (!absent.is_empty()).then(|| format!("{} not installed", absent.join(", ")))
}

/// Whether this process may mount. If not yet, the test is run again in a process that may, and this
/// answers `false` when that has passed.
pub(crate) fn may_mount(test: &str, programs: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == test) {
        crate::die_with_parent();
        return true;
    }
    if !rustix::process::getuid().is_root() {
        not_run(test, "needs root to mount");
        return false;
    }
    let needed: Vec<_> = ["unshare", "mount", "umount", "findmnt"]
        .iter()
        .chain(programs)
        .copied()
        .collect();
    if let Some(why) = missing(&needed) {
        not_run(test, &why);
        return false;
    }
    let probe = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "test",
            "-e",
            "/dev/loop-control",
        ])
        .output()
        .unwrap();
    if !probe.status.success() {
        not_run(test, "no mount namespace or no loop devices here");
        return false;
    }
    let inside = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--include-ignored", "--nocapture"])
        .env(INSIDE, test)
        .output()
        .unwrap();
    print!("{}", String::from_utf8_lossy(&inside.stdout));
    eprint!("{}", String::from_utf8_lossy(&inside.stderr));
    assert!(inside.status.success(), "{test}: {}", inside.status);
    false
}

/// Runs a program that must succeed.
pub(crate) fn sh(program: &str, args: &[&str]) -> String {
    let output = try_sh(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub(crate) fn try_sh(program: &str, args: &[&str]) -> Output {
    // Not every user's path has these directories, where mkfs lies.
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .unwrap()
}

/// A kind of file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ext4 {
        block_bytes: u32,
    },
    /// With reflink, the default.
    Xfs,
}

pub(crate) const KINDS: [Kind; 3] = [
    Kind::Ext4 { block_bytes: 1024 },
    Kind::Ext4 { block_bytes: 4096 },
    Kind::Xfs,
];

impl Kind {
    pub(crate) const PROGRAMS: [&'static str; 3] = ["mkfs.ext4", "mkfs.xfs", "xfs_io"];
}

/// A mounted file system; unmounted when dropped.
pub(crate) struct Mounted {
    /// Where it is mounted.
    pub(crate) point: PathBuf,
    /// The loop device. Held open, it stays the same one while nothing is mounted from it; closed, it
    /// is free.
    device: PathBuf,
    held: Option<std::fs::File>,
    memory: tempfile::TempDir,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Mounted {
    pub(crate) fn new(kind: Kind) -> Self {
        let memory = tempfile::tempdir().unwrap();
        sh(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                "size=512m",
                "tidelock-test",
                text(memory.path()),
            ],
        );
        let image = memory.path().join("image");
        let point = memory.path().join("point");
        std::fs::create_dir(&point).unwrap();
        let file = std::fs::File::create(&image).unwrap();
        match kind {
            Kind::Ext4 { block_bytes } => {
                file.set_len(128 << 20).unwrap();
                let block = block_bytes.to_string();
                sh(
                    "mkfs.ext4",
                    &[
                        "-q",
                        "-F",
                        "-m",
                        "0",
                        "-b",
                        &block,
                        "-e",
                        "remount-ro",
                        text(&image),
                    ],
                );
            }
            Kind::Xfs => {
                // mkfs refuses to make a smaller one.
                file.set_len(320 << 20).unwrap();
                sh("mkfs.xfs", &["-q", "-m", "reflink=1", text(&image)]);
            }
        }
        sh("mount", &["-o", "loop", text(&image), text(&point)]);
        let device = PathBuf::from(sh("findmnt", &["-n", "-o", "SOURCE", text(&point)]));
        let held = Some(std::fs::File::open(&device).unwrap());
        Self {
            point,
            device,
            held,
            memory,
        }
    }

    /// Mounts it again; what a crash left is replayed then.
    pub(crate) fn mount(&self) {
        sh("mount", &[text(&self.device), text(&self.point)]);
    }

    pub(crate) fn unmount(&self) {
        for _ in 0..100 {
            if try_sh("umount", &[text(&self.point)]).status.success() {
                return;
            }
            // A process that was just killed holds it for a moment.
            std::thread::sleep(Duration::from_millis(20));
        }
        sh("umount", &[text(&self.point)]);
    }

    /// The loop device's name, such as `loop3`.
    pub(crate) fn device_name(&self) -> &str {
        self.device.file_name().unwrap().to_str().unwrap()
    }

    /// Cuts the file system off as a power cut does: nothing more reaches the image, and nothing that
    /// is only in memory is written.
    pub(crate) fn cut(&self) {
        sh("xfs_io", &["-x", "-c", "shutdown", text(&self.point)]);
    }

    pub(crate) fn freeze_for(&self, seconds: &str) -> std::process::Child {
        // A process of its own, so that it is thawed even if this one ends meanwhile.
        Command::new("sh")
            .args([
                "-c",
                "fsfreeze -f \"$1\" && sleep \"$2\"; fsfreeze -u \"$1\"",
                "sh",
            ])
            .arg(&self.point)
            .arg(seconds)
            .spawn()
            .unwrap()
    }

    /// Another tenant's file takes all that is left. Gives its path.
    pub(crate) fn fill(&self) -> PathBuf {
        use std::io::Write as _;
        let path = self.point.join("tenant");
        let mut file = std::fs::File::create(&path).unwrap();
        for piece in [1 << 20, 64 << 10, 4096, 512] {
            let bytes = vec![b't'; piece];
            while file.write_all(&bytes).is_ok() {}
            let _ = file.sync_all();
        }
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a test that fails may still have files open here.
        try_sh("umount", &["-l", text(&self.point)]);
        self.held = None;
        try_sh("umount", &["-l", text(self.memory.path())]);
    }
}
