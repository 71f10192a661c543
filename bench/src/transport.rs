//! The mesh beside its peers: what moving segments, handshakes, revocation, storms, idle and hostile
//! peers and reconciling cost. Everything speaks to loopback only.

mod bulk;
mod handshake;
mod hostile;
mod idle;
mod iroh;
mod reconcile;
mod revocation;
mod site;
mod small;
mod storm;
mod swarm;
mod syncthing;

use std::{os::unix::process::CommandExt as _, path::Path};

use tokio::runtime::Runtime;

use crate::{Row, in_turn, segments};

/// A name and what runs under it.
type Group = (&'static str, fn(&Runtime, &Path) -> Vec<Row>);

/// What runs, in this order.
const GROUPS: [Group; 8] = [
    ("bulk", bulk::rows),
    ("handshake", handshake::rows),
    ("revocation", revocation::rows),
    ("storm", storm::rows),
    ("idle", idle::rows),
    ("hostile", hostile::rows),
    ("reconcile", reconcile::rows),
    ("small", small::rows),
];

/// The names of the groups.
pub fn groups() -> impl Iterator<Item = &'static str> {
    GROUPS.iter().map(|(name, _)| *name)
}

pub fn rows(only: Option<&str>) -> Vec<Row> {
    in_turn(&GROUPS, only, |group, dir| {
        // A runtime of its own: what a group leaves running ends with it.
        let runtime = Runtime::new().expect("a runtime");
        let rows = group(&runtime, dir);
        runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        rows
    })
}

/// Starts the program anew if its allocator may change its ways. Each endpoint of quinn allocates tens
/// of MiB of zeroed buffers that nothing is ever written to. glibc has such memory from the kernel, for
/// nothing; but once it has freed one it raises its threshold and clears the next by hand, and a second
/// thousand of peers in one process takes all memory of the machine. Answers only what went wrong.
pub fn with_steady_allocator() -> Option<String> {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if std::env::var_os(TUNABLES).is_some() {
        return None;
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(why) => return Some(why.to_string()),
    };
    let error = std::process::Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(TUNABLES, "glibc.malloc.mmap_threshold=1048576")
        .exec();
    Some(error.to_string())
}

/// A process of its own, to be weighed.
pub fn child(args: &[String]) {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["transport-hold", dir, system] => idle::hold(Path::new(dir), system),
        ["transport-besieged", dir] => hostile::besieged(Path::new(dir)),
        _ => Err(format!("unknown: {words:?}")),
    };
    if let Err(why) = done {
        segments::say(&serde_json::json!({"failed": why}));
        std::process::exit(1);
    }
}
