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

use crate::{Row, in_turn};

pub use children::{Running, child, say};
pub use great::{chain, noise};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A name and what runs under it.
type Group = (&'static str, fn(&Path, bool) -> Vec<Row>);

/// What runs, in this order; a group shares what it made on the disk.
const GROUPS: [Group; 8] = [
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
    in_turn(&GROUPS, only, |group, dir| group(dir, long))
}
