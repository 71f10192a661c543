//! The store and its log beside peers: durable appends, bytes on the device, opening after a kill,
//! verifying, disk and memory that a great store takes.
//!
//! Every row is bounded in time; `--long` adds those that need ten gigabytes or a million files.

mod append;
mod children;
mod disk;
mod great;
mod space;

use std::path::Path;

use crate::Row;

pub use children::{Running, child, say};
pub use great::{chain, noise};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What runs, in this order; a group shares what it made on the disk.
const GROUPS: [(&str, fn(&Path, bool) -> Vec<Row>); 8] = [
    ("append", append::rows),
    ("tree-tax", append::tree_tax),
    ("device-bytes", append::device_bytes_rows),
    ("verify", space::verify_rows),
    ("decisions", space::decision_rows),
    ("freed", space::freed_rows),
    ("open", great::open),
    ("memory", great::memory),
];

/// The names of the groups.
pub fn groups() -> impl Iterator<Item = &'static str> {
    GROUPS.iter().map(|(name, _)| *name)
}

pub fn rows(long: bool, only: Option<&str>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, group) in GROUPS {
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let begun = std::time::Instant::now();
        let dir = tempfile::Builder::new()
            .prefix("tlb")
            .tempdir_in("target")
            .expect("a directory in target");
        let path = dir.path().canonicalize().expect("a path");
        rows.extend(group(&path, long));
        drop(dir);
        eprintln!("  {name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    rows
}
