//! Where policy lives on disk, and how a bundle comes to decide.

use std::{io, sync::Arc};

use tidelock_policy::{BundleError, Package, SlotStorage, VerifiedBundle};
use tidelock_segments::{
    Charge, DomainId, FormatError, Origin, Root, SegmentHeader, seal_unsigned,
};

/// The policy slots inside the root, charged to the reserve: a full disk never keeps policy out.
#[derive(Debug)]
pub(super) struct RootSlots(pub(super) Arc<Root>);

fn path(slot: &str) -> String {
    format!("policy/{slot}")
}

impl SlotStorage for RootSlots {
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>> {
        self.0.read(&path(slot)).map_err(io::Error::other)
    }

    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()> {
        self.0
            .write_atomic(&path(slot), bytes, Charge::Reserve)
            .map_err(io::Error::other)
    }
}

/// The policy segment of a bundle: the same bytes on every node (ruling 5).
pub(super) fn policy_segment(
    domain: &DomainId,
    bundle: &VerifiedBundle,
) -> Result<Vec<u8>, PolicySegmentError> {
    let manifest = bundle.manifest();
    let header = SegmentHeader {
        kind: tidelock_segments::Kind::Policy,
        domain: domain.clone(),
        origin: Origin::policy(&manifest.name)?,
        sequence: manifest.epoch,
        prev: None,
        created_unix_ms: 0,
    };
    let package: &Package = bundle.package();
    Ok(seal_unsigned(&header, &package.encode()?)?)
}

/// A bundle's name or size has no place in a segment.
#[derive(Debug, thiserror::Error)]
pub(super) enum PolicySegmentError {
    #[error("the bundle's name cannot be an origin: {0}")]
    Name(#[from] tidelock_segments::IdError),
    #[error(transparent)]
    Package(#[from] BundleError),
    #[error(transparent)]
    Format(#[from] FormatError),
}
