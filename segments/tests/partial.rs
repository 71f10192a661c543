//! Verified ranges and partials: the tree against `blake3` and `bao-tree`, slices with every byte
//! flipped, partials over kills, damage, the ceiling, several sources and threads.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use bao_tree::io::BaoContentItem;
use bao_tree::io::outboard::PreOrderMemOutboard;
use bao_tree::io::round_up_to_chunks;
use bao_tree::io::sync::{DecodeResponseIter, encode_ranges_validated};
use bao_tree::{BaoTree, BlockSize, ByteRanges};
use common::{KIB, MIB, ROOT, Settings, domain, foreign_segments, key_of, node};
use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_segments::bao::{self, BaoError, GROUP_BYTES, Item, Outboard};
use tidelock_segments::limits::{
    MAP_INTERVAL_BYTES, MAX_PARTIALS, MAX_SEGMENT_BYTES, NOTE_INTERVAL_BYTES,
};
use tidelock_segments::testing::{SimDisk, Survival, unsigned_segment};
use tidelock_segments::{
    Charge, DiskFault, FormatError, Kind, Origin, Partial, PartialError, PutOutcome, RealDisk,
    Root, RootOptions, SegmentId, SegmentRef, Store, StoreError, VerifiedSegment, verify_segment,
};

/// Bytes in which no group is like another.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[5]
        })
        .collect()
}

fn slice_of(bytes: &[u8], range: &Range<u64>) -> Vec<u8> {
    let outboard = Outboard::of(bytes).unwrap();
    bao::encode_range(&outboard, range, |offset, buffer: &mut [u8]| {
        bao::copy_from(bytes, offset, buffer)
    })
    .unwrap()
}

/// Verified groups, by their offset.
type Groups = Vec<(u64, Vec<u8>)>;

/// What a slice yields: the verified groups, and how it ended.
fn decoded(
    id: &SegmentId,
    size: u64,
    range: &Range<u64>,
    slice: &[u8],
) -> (Groups, Result<(), BaoError>) {
    let mut groups = Vec::new();
    let end = bao::decode_range(id, size, range, slice, |item| {
        if let Item::Group { offset, bytes } = item {
            groups.push((offset, bytes.to_vec()));
        }
        Ok(())
    });
    (groups, end)
}

fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        1usize..200_000,
        (0usize..20, -2i64..=2).prop_map(|(groups, by)| {
            usize::try_from((groups as i64 * 16_384 + by).max(1)).unwrap()
        }),
        200_000usize..1_500_000,
    ]
}

fn ranged(size: usize) -> impl Strategy<Value = Range<u64>> {
    let size = size as u64;
    (0..size, 1..=MIB - 2 * GROUP_BYTES)
        .prop_map(move |(start, len)| start..(start + len).min(size))
}

/// The slice as the other implementation writes it.
fn by_bao_tree(bytes: &[u8], range: &Range<u64>) -> Vec<u8> {
    let outboard = PreOrderMemOutboard::create(bytes, BlockSize::from_chunk_log(4));
    let chunks = round_up_to_chunks(&ByteRanges::from(range.clone()));
    let mut out = Vec::new();
    encode_ranges_validated(bytes, &outboard, &chunks, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_tree_is_blake3s_and_the_slices_are_bao_trees(
        (size, range, seed) in sizes().prop_flat_map(|s| (Just(s), ranged(s), any::<u64>()))
    ) {
        let bytes = noise(size, seed);
        let outboard = Outboard::of(&bytes).unwrap();
        let id = SegmentId::of(&bytes);
        prop_assert_eq!(outboard.id(), id);
        let theirs = PreOrderMemOutboard::create(&bytes, BlockSize::from_chunk_log(4));
        prop_assert_eq!(outboard.pairs().concat(), theirs.data);
        let aligned = bao::aligned(size as u64, &range).unwrap();
        let slice = slice_of(&bytes, &range);
        prop_assert_eq!(&slice, &by_bao_tree(&bytes, &aligned));
        prop_assert_eq!(slice.len() as u64, bao::slice_len(size as u64, &range).unwrap());
        // Theirs reads ours, ours reads theirs: the same bytes.
        let chunks = round_up_to_chunks(&ByteRanges::from(aligned.clone()));
        let tree = BaoTree::new(size as u64, BlockSize::from_chunk_log(4));
        let root = (*id.as_bytes()).into();
        for item in DecodeResponseIter::new(root, tree, slice.as_slice(), &chunks) {
            prop_assert!(item.is_ok());
        }
        let (groups, end) = decoded(&id, size as u64, &range, &slice);
        prop_assert_eq!(end, Ok(()));
        let all: Vec<u8> = groups.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        let wanted = usize::try_from(aligned.start).unwrap()..usize::try_from(aligned.end).unwrap();
        prop_assert_eq!(all, bytes[wanted].to_vec());
    }

    #[test]
    fn a_damaged_slice_yields_only_what_is_before_the_damage(
        (size, range, seed, place, bit) in sizes()
            .prop_flat_map(|s| (Just(s), ranged(s), any::<u64>(), any::<prop::sample::Index>(), 0u8..8))
    ) {
        let bytes = noise(size, seed);
        let id = SegmentId::of(&bytes);
        let good = slice_of(&bytes, &range);
        let mut bad = good.clone();
        let at = place.index(bad.len());
        bad[at] ^= 1 << bit;
        let (groups, end) = decoded(&id, size as u64, &range, &bad);
        prop_assert!(matches!(end, Err(BaoError::Mismatch { .. })), "{:?}", end);
        for (offset, group) in groups {
            let from = usize::try_from(offset).unwrap();
            prop_assert_eq!(&group, &bytes[from..from + group.len()]);
        }
        for cut in [0, at, good.len() - 1] {
            let (none, end) = decoded(&id, size as u64, &range, &good[..cut]);
            let refused = none.is_empty() && matches!(end, Err(BaoError::Length { .. }));
            prop_assert!(refused);
        }
    }

    #[test]
    fn slices_in_any_order_make_the_segment(
        size in 1usize..400_000,
        seed in any::<u64>(),
        order in prop::collection::vec((any::<prop::sample::Index>(), 1u64..200_000, any::<u8>()), 0..12),
    ) {
        let segment = policy(1, &noise(size, seed));
        let (from, to) = (MemStore::new(), MemStore::new());
        from.store.put(&segment, Charge::Normal).unwrap();
        let reference = segment.reference();
        let mut partial = to.store.partial(&reference, Charge::Normal).unwrap();
        for (start, len, damage) in order {
            let start = start.index(usize::try_from(reference.size_bytes).unwrap()) as u64;
            let range = start..(start + len).min(reference.size_bytes);
            let mut slice = from.store.read_range_encoded(&reference.id, &range).unwrap();
            match damage {
                0..64 => {
                    let at = usize::from(damage) * slice.len() / 64;
                    slice[at] ^= 0x10;
                    prop_assert!(matches!(partial.accept(&range, &slice), Err(PartialError::Slice(_))));
                }
                64..96 => {
                    partial.sync().unwrap();
                    drop(partial);
                    partial = to.store.partial(&reference, Charge::Normal).unwrap();
                }
                _ => {
                    partial.accept(&range, &slice).unwrap();
                    prop_assert_eq!(partial.accept(&range, &slice).unwrap().new_bytes, 0);
                }
            }
            prop_assert!(!to.store.contains(&reference.id));
        }
        receive_rest(&from.store, &partial);
        let (received, outcome) = partial.finish().unwrap();
        prop_assert_eq!(outcome, PutOutcome::Stored);
        prop_assert_eq!(&received, &segment);
        drop(partial);
        prop_assert_eq!(to.store.get(&reference.id).unwrap(), segment);
        to.assert_clean();
    }
}

struct MemStore {
    disk: SimDisk,
    root: Arc<Root>,
    store: Arc<Store>,
    /// What the store itself keeps reserved.
    standing_bytes: u64,
}

impl MemStore {
    fn new() -> Self {
        Self::with(&Settings::default(), SimDisk::new())
    }

    fn with(settings: &Settings, disk: SimDisk) -> Self {
        let root = settings.open_root(disk.disk()).unwrap();
        let store = Store::open(Arc::clone(&root), domain()).unwrap();
        let standing_bytes = root.ledger().usage().reserved_bytes;
        Self {
            disk,
            root,
            store,
            standing_bytes,
        }
    }

    /// No power, and up again.
    fn after(self, survival: Survival) -> Self {
        let Self {
            disk, root, store, ..
        } = self;
        drop((root, store));
        disk.crash(survival);
        Self::with(&Settings::default(), disk)
    }

    /// The process dies, the machine does not.
    fn killed(self) -> Self {
        let Self {
            disk, root, store, ..
        } = self;
        drop((root, store));
        disk.kill();
        Self::with(&Settings::default(), disk)
    }

    fn assert_ledger(&self) {
        let usage = self.root.ledger().usage();
        let measured = self.root.measure().unwrap();
        assert_eq!(usage.allocated_bytes, measured, "{usage:?}");
        assert_eq!(usage.overrun_bytes, 0);
    }

    /// Nothing of any partial is left, neither on disk nor in the ledger.
    fn assert_clean(&self) {
        assert_eq!(self.store.partials(), Vec::new());
        assert_eq!(self.root.list("partial").unwrap(), Vec::<String>::new());
        assert_eq!(
            self.root.ledger().usage().reserved_bytes,
            self.standing_bytes
        );
        self.assert_ledger();
    }
}

fn policy(sequence: u64, body: &[u8]) -> VerifiedSegment {
    let base = Origin::policy("base").unwrap();
    let bytes = unsigned_segment(&domain(), base, sequence, body).unwrap();
    verify_segment(bytes, None, &domain()).unwrap()
}

/// Cuts a range into what one slice may carry.
fn slices(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let step = usize::try_from(MIB).unwrap();
    range
        .clone()
        .step_by(step)
        .map(move |start| start..(start + MIB).min(range.end))
}

/// Fetches all that is missing.
fn receive_rest(from: &Store, partial: &Partial) {
    let id = partial.reference().id;
    for range in partial.missing().into_iter().flat_map(slices) {
        let slice = from.read_range_encoded(&id, &range).unwrap();
        partial.accept(&range, &slice).unwrap();
    }
    assert_eq!(partial.missing(), Vec::new());
}

fn part_path(id: &SegmentId, ending: &str) -> PathBuf {
    Path::new(ROOT).join(format!("partial/{}.{ending}", id.hex()))
}

fn received(store: &Store, id: &SegmentId) -> u64 {
    let all = store.partials();
    all.iter()
        .find(|info| info.reference.id == *id)
        .map_or(0, |info| info.received_bytes)
}

#[test]
fn impossible_ranges_and_sizes_are_refused() {
    let size = 100_000;
    for range in [
        0..0,
        5..5,
        100_000..100_001,
        0..100_001,
        u64::MAX - 1..u64::MAX,
    ] {
        let refused = bao::slice_len(size, &range);
        assert!(matches!(refused, Err(BaoError::Range { .. })), "{range:?}");
    }
    let backwards = Range { start: 7, end: 3 };
    assert!(bao::aligned(size, &backwards).is_err());
    assert_eq!(bao::aligned(size, &(20_000..20_001)), Ok(16_384..32_768));
    assert_eq!(bao::aligned(size, &(99_999..100_000)), Ok(98_304..100_000));
    let too_large = MAX_SEGMENT_BYTES + 1;
    assert_eq!(
        bao::slice_len(too_large, &(0..1)),
        Err(BaoError::Size {
            size_bytes: too_large
        })
    );
    // One slice holds 1 MiB of content and no more.
    assert!(bao::slice_len(4 * MIB, &(0..MIB)).is_ok());
    assert!(bao::slice_len(4 * MIB, &(1..MIB + 1)).is_err());
    assert_eq!(bao::slice_len(0, &(0..0)), Ok(0));
    assert_eq!(decoded(&SegmentId::of(b""), 0, &(0..0), b"").1, Ok(()));
    assert!(decoded(&SegmentId::of(b"x"), 0, &(0..0), b"").1.is_err());
}

#[test]
fn every_flipped_byte_of_a_slice_is_refused_at_its_group() {
    let bytes = noise(70_000, 3);
    let id = SegmentId::of(&bytes);
    let size = bytes.len() as u64;
    let range = 20_000..40_000;
    let good = slice_of(&bytes, &range);
    // The control: unchanged it is taken, group for group.
    let (groups, end) = decoded(&id, size, &range, &good);
    assert_eq!((groups.len(), end), (2, Ok(())));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        let (groups, end) = decoded(&id, size, &range, &bad);
        let Err(BaoError::Mismatch { start, end }) = end else {
            panic!("byte {at}: {end:?}");
        };
        // What came before is whole, and the fault is named where it is.
        assert!(groups.iter().all(|(offset, group)| {
            let from = usize::try_from(*offset).unwrap();
            *offset + group.len() as u64 <= start && bytes[from..from + group.len()] == **group
        }));
        assert!(start < end && end <= size, "byte {at}");
        // Content of a group counts for that group alone: pairs stand before it.
        let is_content = groups.len() * 16_384 + 16_384 <= at && end - start <= GROUP_BYTES;
        assert!(
            !is_content || start >= 16_384 * (1 + groups.len() as u64),
            "byte {at}"
        );
    }
}

#[test]
fn a_slice_of_another_place_size_or_segment_is_refused() {
    let bytes = noise(150_000, 4);
    let (id, size) = (SegmentId::of(&bytes), 150_000);
    let here = slice_of(&bytes, &(0..16_384));
    assert_eq!(decoded(&id, size, &(0..16_384), &here).1, Ok(()));
    let there = slice_of(&bytes, &(16_384..32_768));
    assert!(decoded(&id, size, &(0..16_384), &there).1.is_err());
    assert!(
        decoded(&SegmentId::of(b"other"), size, &(0..16_384), &here)
            .1
            .is_err()
    );
    // The last group proves the size: under another one it does not fit.
    let last = slice_of(&bytes, &(147_456..150_000));
    assert_eq!(decoded(&id, size, &(147_456..150_000), &last).1, Ok(()));
    for other in [149_999, 150_001, 147_456, 163_840, 300_000] {
        let end = bao::aligned(other, &(other - 1..other)).unwrap();
        assert!(decoded(&id, other, &end, &last).1.is_err(), "{other}");
    }
}

#[test]
fn a_range_is_served_from_the_file_and_damage_goes_to_quarantine() {
    let segment = policy(1, &noise(300_000, 5));
    let reference = segment.reference();
    let s = MemStore::new();
    s.store.put(&segment, Charge::Normal).unwrap();
    let slice = s
        .store
        .read_range_encoded(&reference.id, &(50_000..60_000))
        .unwrap();
    assert_eq!(slice, slice_of(segment.bytes(), &(50_000..60_000)));
    assert!(matches!(
        s.store.read_range_encoded(&reference.id, &(0..400_000)),
        Err(StoreError::Range(_))
    ));
    let stranger = SegmentId::of(b"stranger");
    assert_eq!(
        s.store.read_range_encoded(&stranger, &(0..1)),
        Err(StoreError::NotHeld(stranger))
    );
    let path = Path::new(ROOT).join(format!("segments/policy/{}.seg", reference.id.hex()));
    s.disk.flip(&path, 55_000, 1);
    // The tree is known: what is not damaged is still served, what is damaged never.
    assert!(
        s.store
            .read_range_encoded(&reference.id, &(0..10_000))
            .is_ok()
    );
    assert!(matches!(
        s.store.read_range_encoded(&reference.id, &(50_000..60_000)),
        Err(StoreError::Damaged { .. })
    ));
    assert!(!s.store.contains(&reference.id));
    assert_eq!(s.root.list("quarantine").unwrap().len(), 1);
    s.assert_ledger();
    // Without a known tree the whole file is looked at first.
    let s = MemStore::new();
    s.store.put(&segment, Charge::Normal).unwrap();
    s.disk.flip(&path, 55_000, 1);
    assert!(matches!(
        s.store.read_range_encoded(&reference.id, &(0..10_000)),
        Err(StoreError::Damaged { .. })
    ));
}

#[test]
fn a_kill_costs_at_most_what_came_since_the_last_note_and_lost_power_since_the_last_map() {
    let from = MemStore::new();
    let segment = policy(1, &noise(5 * 1024 * 1024, 6));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    for (taken, power) in [0u64, 3, 64, 70, 200, 321]
        .into_iter()
        .flat_map(|taken| [(taken, true), (taken, false)])
    {
        let to = MemStore::new();
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        for group in 0..taken {
            let start = group * GROUP_BYTES;
            let range = start..(start + GROUP_BYTES).min(reference.size_bytes);
            let slice = from
                .store
                .read_range_encoded(&reference.id, &range)
                .unwrap();
            partial.accept(&range, &slice).unwrap();
        }
        let before = received(&to.store, &reference.id);
        // A kill: nothing of the process's own ends in order.
        std::mem::forget(partial);
        let to = if power {
            to.after(Survival::None)
        } else {
            to.killed()
        };
        to.assert_ledger();
        let after = received(&to.store, &reference.id);
        let most = if power {
            MAP_INTERVAL_BYTES
        } else {
            NOTE_INTERVAL_BYTES
        };
        assert!(before - after < most, "{taken}: {before} {after}");
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        let missing: u64 = partial.missing().iter().map(|r| r.end - r.start).sum();
        assert_eq!(missing, reference.size_bytes - after, "{taken}");
        receive_rest(&from.store, &partial);
        partial.finish().unwrap();
        drop(partial);
        assert_eq!(to.store.get(&reference.id), Ok(segment.clone()));
        to.assert_clean();
    }
}

/// When what was received is made durable, besides the map's own intervals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syncs {
    /// After every slice.
    Each,
    /// Not before the end: most is only noted.
    Last,
}

/// Receives over any number of losses of power.
fn receive(
    to: &MemStore,
    from: &Store,
    reference: &SegmentRef,
    syncs: Syncs,
) -> Result<(), PartialError> {
    let partial = match to.store.partial(reference, Charge::Normal) {
        Err(PartialError::AlreadyHeld(_)) => return Ok(()),
        other => other?,
    };
    for range in partial.missing().into_iter().flat_map(slices) {
        let slice = from.read_range_encoded(&reference.id, &range).unwrap();
        partial.accept(&range, &slice)?;
        if syncs == Syncs::Each {
            partial.sync()?;
        }
    }
    partial.finish()?;
    Ok(())
}

#[test]
fn inv_08_power_lost_at_any_call_of_a_transfer_never_shows_wrong_bytes() {
    power_lost_at_any_call(Syncs::Each);
    power_lost_at_any_call(Syncs::Last);
}

fn power_lost_at_any_call(syncs: Syncs) {
    let from = MemStore::new();
    let segment = policy(1, &noise(1_200_000, 7));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let calls = {
        let to = MemStore::new();
        let before = to.disk.calls();
        receive(&to, &from.store, &reference, syncs).unwrap();
        to.assert_clean();
        to.disk.calls() - before
    };
    assert!(calls > 20, "{calls}");
    for call in 1..=calls {
        for survival in [Survival::None, Survival::All, Survival::Seed(call)] {
            let to = MemStore::new();
            to.disk.crash_at_call(to.disk.calls() + call);
            let _ = receive(&to, &from.store, &reference, syncs);
            let to = to.after(survival);
            to.assert_ledger();
            if to.store.contains(&reference.id) {
                assert_eq!(to.store.get(&reference.id), Ok(segment.clone()));
            }
            // Whatever the map claims is there, and the rest can be had.
            let claimed = received(&to.store, &reference.id);
            if let Ok(partial) = to.store.partial(&reference, Charge::Normal) {
                let missing: u64 = partial.missing().iter().map(|r| r.end - r.start).sum();
                let there = reference.size_bytes - missing;
                // A note may have outlived what it claims; that is found out.
                let is_told = there == claimed || (syncs == Syncs::Last && there < claimed);
                assert!(is_told, "{call} {survival:?}: {there} {claimed}");
            }
            receive(&to, &from.store, &reference, syncs).unwrap();
            assert_eq!(to.store.get(&reference.id), Ok(segment.clone()));
            to.assert_clean();
            assert!(to.disk.peak_allocated() <= Settings::default().ceiling);
        }
    }
}

#[test]
fn an_error_at_any_call_of_a_transfer_is_told_and_made_good() {
    error_at_any_call(Syncs::Each);
    error_at_any_call(Syncs::Last);
}

fn error_at_any_call(syncs: Syncs) {
    let from = MemStore::new();
    let segment = policy(1, &noise(1_200_000, 8));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let calls = {
        let to = MemStore::new();
        let before = to.disk.calls();
        receive(&to, &from.store, &reference, syncs).unwrap();
        to.disk.calls() - before
    };
    for call in 1..=calls {
        for fault in [DiskFault::NoSpace, DiskFault::Os(5)] {
            let to = MemStore::new();
            to.disk.fail_call(to.disk.calls() + call, fault);
            let first = receive(&to, &from.store, &reference, syncs);
            if first.is_ok() {
                // Only tidying up after the rename may fail unnoticed.
                assert!(to.store.contains(&reference.id), "{call}");
            }
            if to.store.latched().is_some() {
                to.store.reopen().unwrap();
            }
            receive(&to, &from.store, &reference, syncs).unwrap();
            assert_eq!(to.store.get(&reference.id), Ok(segment.clone()), "{call}");
            let usage = to.root.ledger().usage();
            assert_eq!(
                usage.allocated_bytes,
                to.root.measure().unwrap(),
                "{call} {fault:?}"
            );
            assert_eq!(
                (usage.overrun_bytes, usage.reserved_bytes),
                (0, to.standing_bytes),
                "{call}"
            );
        }
    }
}

#[test]
fn damage_in_a_partial_is_dropped_and_fetched_again() {
    let from = MemStore::new();
    let segment = policy(1, &noise(400_000, 9));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let to = MemStore::new();
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    receive_rest(&from.store, &partial);
    partial.sync().unwrap();
    drop(partial);
    to.disk.flip(&part_path(&reference.id, "part"), 100_000, 1);
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    assert_eq!(partial.missing(), vec![98_304..114_688]);
    assert!(matches!(
        partial.finish(),
        Err(PartialError::Incomplete {
            missing_bytes: 16_384
        })
    ));
    receive_rest(&from.store, &partial);
    // Damage between the last check and the end is seen too.
    to.disk.flip(&part_path(&reference.id, "part"), 399_000, 1);
    let damaged = partial.finish();
    assert!(
        matches!(damaged, Err(PartialError::Damaged { .. })),
        "{damaged:?}"
    );
    assert_eq!(partial.missing().len(), 1);
    assert!(!to.store.contains(&reference.id));
    receive_rest(&from.store, &partial);
    assert_eq!(partial.finish().unwrap().1, PutOutcome::Stored);
    drop(partial);
    to.assert_clean();
}

#[test]
fn a_map_with_any_byte_changed_is_not_believed() {
    let from = MemStore::new();
    let segment = policy(1, &noise(100_000, 10));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let map = part_path(&reference.id, "map");
    let to = MemStore::new();
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    let slice = from
        .store
        .read_range_encoded(&reference.id, &(0..40_000))
        .unwrap();
    partial.accept(&(0..40_000), &slice).unwrap();
    partial.sync().unwrap();
    drop(partial);
    let len = to.disk.content(&map).unwrap().len();
    // The control: unchanged it is believed.
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    assert_eq!(partial.missing(), vec![49_152..reference.size_bytes]);
    drop(partial);
    for at in 0..len {
        let to = MemStore::new();
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        partial.accept(&(0..40_000), &slice).unwrap();
        partial.sync().unwrap();
        drop(partial);
        to.disk.flip(&map, at, 1);
        let to = to.after(Survival::All);
        assert_eq!(received(&to.store, &reference.id), 0, "byte {at}");
        to.assert_clean();
    }
}

/// A store that was killed with two notes written and nothing synced, and what it had.
fn noted(from: &Store, reference: &SegmentRef) -> (MemStore, u64) {
    let to = MemStore::new();
    let partial = to.store.partial(reference, Charge::Normal).unwrap();
    let taken = 2 * NOTE_INTERVAL_BYTES;
    for range in slices(0..taken) {
        let slice = from.read_range_encoded(&reference.id, &range).unwrap();
        partial.accept(&range, &slice).unwrap();
    }
    std::mem::forget(partial);
    (to.killed(), taken)
}

#[test]
fn a_note_with_a_byte_changed_is_not_believed_and_the_one_before_it_is() {
    let from = MemStore::new();
    let segment = policy(1, &noise(1_200_000, 12));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let name = part_path(&reference.id, "note");
    let (control, taken) = noted(&from.store, &reference);
    assert_eq!(
        received(&control.store, &reference.id),
        taken,
        "the control"
    );
    // The second note is in the second place.
    let len = control.disk.content(&name).unwrap().len();
    for at in (len / 2..len / 2 + 400).step_by(7) {
        let (to, _) = noted(&from.store, &reference);
        to.disk.flip(&name, at, 1);
        let to = to.killed();
        let kept = received(&to.store, &reference.id);
        assert_eq!(kept, NOTE_INTERVAL_BYTES, "byte {at}");
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        let missing: u64 = partial.missing().iter().map(|r| r.end - r.start).sum();
        assert_eq!(missing, reference.size_bytes - kept, "byte {at}");
        drop(partial);
        to.assert_ledger();
    }
}

#[test]
fn what_was_only_noted_is_durable_once_somebody_goes_on_with_it() {
    let from = MemStore::new();
    let segment = policy(1, &noise(1_200_000, 13));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    for is_resumed in [false, true] {
        let (to, taken) = noted(&from.store, &reference);
        if is_resumed {
            let partial = to.store.partial(&reference, Charge::Normal).unwrap();
            std::mem::forget(partial);
        }
        let to = to.after(Survival::None);
        let kept = received(&to.store, &reference.id);
        assert_eq!(kept, if is_resumed { taken } else { 0 });
        to.assert_ledger();
        receive(&to, &from.store, &reference, Syncs::Last).unwrap();
        assert_eq!(to.store.get(&reference.id), Ok(segment.clone()));
        to.assert_clean();
    }
}

#[test]
fn what_was_claimed_is_judged_at_the_end_and_a_proven_size_stays() {
    let from = MemStore::new();
    let segment = policy(1, &noise(100_000, 11));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let to = MemStore::new();
    let mut lie = reference.clone();
    lie.sequence = 2;
    let partial = to.store.partial(&lie, Charge::Normal).unwrap();
    receive_rest(&from.store, &partial);
    assert!(matches!(partial.finish(), Err(PartialError::Claim { .. })));
    assert_eq!(partial.finish(), Err(PartialError::Ended));
    drop(partial);
    to.assert_clean();
    for impossible in [
        SegmentRef {
            size_bytes: 0,
            ..reference.clone()
        },
        SegmentRef {
            size_bytes: MAX_SEGMENT_BYTES + 1,
            ..reference.clone()
        },
        SegmentRef {
            kind: Kind::Audit,
            ..reference.clone()
        },
    ] {
        assert!(
            to.store.partial(&impossible, Charge::Normal).is_err(),
            "{impossible:?}"
        );
    }
    // Another claim of the same size goes on with what has arrived; one of another size does not,
    // and is refused once the last group has proved the size.
    let begin = |range: Range<u64>| {
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        let slice = from
            .store
            .read_range_encoded(&reference.id, &range)
            .unwrap();
        partial.accept(&range, &slice).unwrap();
        partial.sync().unwrap();
    };
    begin(0..16_384);
    let partial = to.store.partial(&lie, Charge::Normal).unwrap();
    assert_eq!(partial.missing(), vec![16_384..reference.size_bytes]);
    drop(partial);
    let other_size = SegmentRef {
        size_bytes: 120_000,
        ..reference.clone()
    };
    let partial = to.store.partial(&other_size, Charge::Normal).unwrap();
    assert_eq!(partial.missing(), vec![0..120_000]);
    drop(partial);
    begin(reference.size_bytes - 1..reference.size_bytes);
    assert!(matches!(
        to.store.partial(&other_size, Charge::Normal),
        Err(PartialError::Claim { .. })
    ));
    receive(&to, &from.store, &reference, Syncs::Each).unwrap();
    to.assert_clean();
}

#[test]
fn a_good_hash_of_bad_bytes_is_no_segment() {
    let bytes = noise(50_000, 12);
    let to = MemStore::new();
    let reference = SegmentRef {
        id: SegmentId::of(&bytes),
        size_bytes: 50_000,
        ..policy(1, b"x").reference()
    };
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    partial
        .accept(&(0..50_000), &slice_of(&bytes, &(0..50_000)))
        .unwrap();
    assert_eq!(
        partial.finish(),
        Err(PartialError::Format(FormatError::Magic))
    );
    drop(partial);
    to.assert_clean();
}

#[test]
fn inv_08_two_sources_at_once_write_each_group_once() {
    let from = MemStore::new();
    let segment = policy(1, &noise(3_000_000, 13));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let to = MemStore::new();
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    let busy = to.store.partial(&reference, Charge::Normal).map(|_| ());
    assert_eq!(busy, Err(PartialError::Busy(reference.id)));
    let all: Vec<Range<u64>> = (0..reference.size_bytes)
        .step_by(100_000)
        .map(|start| start..(start + 100_000).min(reference.size_bytes))
        .collect();
    let barrier = Barrier::new(2);
    let new: u64 = std::thread::scope(|scope| {
        let work = |backwards: bool| {
            barrier.wait();
            let mut ranges = all.clone();
            if backwards {
                ranges.reverse();
            }
            let mut new = 0;
            for range in ranges {
                let slice = from
                    .store
                    .read_range_encoded(&reference.id, &range)
                    .unwrap();
                new += partial.accept(&range, &slice).unwrap().new_bytes;
            }
            new
        };
        let threads = [
            scope.spawn(move || work(false)),
            scope.spawn(move || work(true)),
        ];
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(new, reference.size_bytes);
    // Both want to finish: one does, the other is told that it is over.
    let barrier = Barrier::new(2);
    let ends: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            barrier.wait();
            partial.finish().map(|(_, outcome)| outcome)
        };
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(ends.contains(&Ok(PutOutcome::Stored)) && ends.contains(&Err(PartialError::Ended)));
    drop(partial);
    assert_eq!(
        to.store.partial(&reference, Charge::Normal).map(|_| ()),
        Err(PartialError::AlreadyHeld(reference.id))
    );
    assert_eq!(to.store.get(&reference.id), Ok(segment));
    to.assert_clean();
}

#[test]
fn inv_08_a_put_that_overtakes_a_partial_is_stored_once() {
    let segment = policy(1, &noise(100_000, 14));
    let to = MemStore::new();
    let partial = to
        .store
        .partial(&segment.reference(), Charge::Normal)
        .unwrap();
    let all = 0..segment.reference().size_bytes;
    partial
        .accept(&all, &slice_of(segment.bytes(), &all))
        .unwrap();
    to.store.put(&segment, Charge::Normal).unwrap();
    assert_eq!(partial.finish().unwrap().1, PutOutcome::AlreadyHeld);
    drop(partial);
    assert_eq!(to.store.list(None).len(), 1);
    to.assert_clean();
}

/// The first segment of the log of a node whose key is known, with this record.
fn first_audit(record: &[u8]) -> VerifiedSegment {
    let settings = Settings {
        node: "n2",
        ..Settings::default()
    };
    let disk = SimDisk::new();
    let root = settings.open_root(disk.disk()).unwrap();
    let key = key_of("n2").to_pkcs8().unwrap();
    root.write_atomic("keys/log.pk8", &key, Charge::Reserve)
        .unwrap();
    drop(root);
    let n = settings.sim(&disk);
    n.append(record).unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    n.store.get(&sealed.id).unwrap()
}

#[test]
fn inv_17_a_fork_is_refused_at_the_end_of_its_transfer() {
    let (held, fork) = (first_audit(b"one history"), first_audit(b"another"));
    assert_eq!(held.reference().origin, fork.reference().origin);
    let all = 0..fork.reference().size_bytes;
    let transfer = |to: &MemStore, segment: &VerifiedSegment| {
        let partial = to
            .store
            .partial(&segment.reference(), Charge::Normal)
            .unwrap();
        partial
            .accept(&all, &slice_of(segment.bytes(), &all))
            .unwrap();
        partial.finish().map(|(_, outcome)| outcome)
    };
    let to = MemStore::new();
    to.store.put(&held, Charge::Normal).unwrap();
    let refused = StoreError::Fork {
        origin: fork.reference().origin,
        sequence: 0,
        held: held.id(),
        offered: fork.id(),
    };
    assert_eq!(transfer(&to, &fork), Err(PartialError::Store(refused)));
    assert!(!to.store.contains(&fork.id()));
    to.assert_clean();
    // The control: where nothing contradicts it, it is taken.
    assert_eq!(transfer(&MemStore::new(), &fork), Ok(PutOutcome::Stored));
}

#[test]
fn inv_04_a_transfer_is_reserved_whole_and_never_exceeds_the_ceiling() {
    let from = MemStore::new();
    let segment = policy(1, &noise(3_000_000, 15));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    // Up from far too little: refused before a byte is written, until it fits.
    let mut fitted = false;
    for ceiling in (4 * MIB..8 * MIB).step_by(usize::try_from(64 * KIB).unwrap()) {
        let settings = Settings {
            ceiling,
            reserve: MIB,
            ..Settings::default()
        };
        let to = MemStore::with(&settings, SimDisk::new());
        let calls = to.disk.calls();
        match to.store.partial(&reference, Charge::Normal) {
            Err(PartialError::Store(StoreError::Ceiling(_))) => {
                assert!(
                    !fitted,
                    "a greater ceiling is refused where a smaller one was enough"
                );
                assert_eq!(
                    to.disk.calls(),
                    calls,
                    "nothing is written before it is reserved"
                );
            }
            other => {
                fitted = true;
                let partial = other.unwrap();
                receive_rest(&from.store, &partial);
                partial.finish().unwrap();
            }
        }
        assert!(to.disk.peak_allocated() <= ceiling);
        to.assert_clean();
    }
    assert!(fitted);
}

#[test]
fn inv_04_old_partials_make_room_and_used_ones_stay() {
    let from = MemStore::new();
    let segments: Vec<_> = (1..=4)
        .map(|n| policy(n, &noise(1_000_000, 20 + n)))
        .collect();
    for segment in &segments {
        from.store.put(segment, Charge::Normal).unwrap();
    }
    let settings = Settings {
        ceiling: 6 * MIB,
        reserve: MIB,
        ..Settings::default()
    };
    let to = MemStore::with(&settings, SimDisk::new());
    let take = |n: usize| {
        let reference = segments[n].reference();
        let partial = to.store.partial(&reference, Charge::Normal).unwrap();
        let slice = from
            .store
            .read_range_encoded(&reference.id, &(0..16_384))
            .unwrap();
        partial.accept(&(0..16_384), &slice).unwrap();
        partial.sync().unwrap();
        partial
    };
    drop(take(1));
    let held = take(0);
    drop(take(2));
    // The fourth does not fit: the oldest that nobody holds goes, the one in use stays.
    drop(take(3));
    let left: Vec<_> = to
        .store
        .partials()
        .into_iter()
        .map(|p| p.reference.sequence)
        .collect();
    assert!(
        !left.contains(&2) && left.contains(&1) && left.contains(&4),
        "{left:?}"
    );
    assert!(to.disk.peak_allocated() <= settings.ceiling);
    receive_rest(&from.store, &held);
    held.finish().unwrap();
    drop(held);
    to.assert_ledger();
    // Whoever needs room may ask for it.
    assert!(to.store.give_up_partials(Charge::Custody, MIB).unwrap() == 0);
    assert!(to.store.give_up_partials(Charge::Normal, u64::MAX).unwrap() > MIB);
    to.assert_clean();
}

#[test]
fn inv_04_a_partial_of_foreign_audit_is_charged_to_custody_before_and_after_a_start() {
    let audit = foreign_segments("n2", 1).remove(0);
    let to = MemStore::new();
    to.store.set_own_node(&node("n1"));
    let partial = to
        .store
        .partial(&audit.reference(), Charge::Normal)
        .unwrap();
    let all = 0..audit.reference().size_bytes;
    let custody = |s: &MemStore| s.root.ledger().usage().custody_bytes;
    assert!(custody(&to) >= all.end);
    partial
        .accept(&all, &slice_of(audit.bytes(), &all))
        .unwrap();
    partial.sync().unwrap();
    drop(partial);
    let before = custody(&to);
    let to = to.after(Survival::None);
    assert_eq!(custody(&to), 0);
    to.store.set_own_node(&node("n1"));
    assert_eq!(custody(&to), before);
    to.assert_ledger();
    let partial = to
        .store
        .partial(&audit.reference(), Charge::Normal)
        .unwrap();
    partial.finish().unwrap();
    drop(partial);
    to.assert_clean();
    assert_eq!(custody(&to), to.store.foreign_audit_bytes());
    to.store.remove(&audit.id()).unwrap();
    assert_eq!(custody(&to), 0);
    // A full share refuses, though the ceiling is far away.
    to.root.ledger().set_custody_max(4096);
    assert!(matches!(
        to.store.partial(&audit.reference(), Charge::Normal),
        Err(PartialError::Store(StoreError::Ceiling(_)))
    ));
}

#[test]
fn inv_07_the_number_of_partials_is_bounded() {
    let to = MemStore::new();
    let reference = |n: u64| SegmentRef {
        id: SegmentId::of(&n.to_le_bytes()),
        size_bytes: 1000,
        ..policy(n, b"x").reference()
    };
    let mut held: Vec<_> = (0..MAX_PARTIALS as u64)
        .map(|n| to.store.partial(&reference(n), Charge::Normal).unwrap())
        .collect();
    let one_more = reference(1_000_000);
    assert_eq!(
        to.store.partial(&one_more, Charge::Normal).map(|_| ()),
        Err(PartialError::TooMany)
    );
    drop(held.pop());
    drop(to.store.partial(&one_more, Charge::Normal).unwrap());
    assert_eq!(to.store.partials().len(), MAX_PARTIALS);
    drop(held);
    to.assert_ledger();
}

#[test]
fn inv_04_partials_on_a_real_disk_are_booked_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let options = RootOptions {
        ceiling_bytes: 32 * MIB,
        reserve_bytes: 6 * MIB,
    };
    let open = || {
        let disk = Arc::new(RealDisk::new());
        let root = Root::open(disk, &dir.path().join("root"), options).unwrap();
        let store = Store::open(Arc::clone(&root), domain()).unwrap();
        (root, store)
    };
    let assert_booked = |root: &Root| {
        let usage = root.ledger().usage();
        assert_eq!(usage.allocated_bytes, root.measure().unwrap(), "{usage:?}");
        assert_eq!(usage.overrun_bytes, 0);
    };
    let from = MemStore::new();
    let (root, store) = open();
    for n in 1..=4 {
        let segment = policy(n, &noise(2_500_000, n));
        let reference = segment.reference();
        from.store.put(&segment, Charge::Normal).unwrap();
        let partial = store.partial(&reference, Charge::Normal).unwrap();
        assert_booked(&root);
        receive_rest(&from.store, &partial);
        partial.sync().unwrap();
        assert_booked(&root);
        if n % 2 == 0 {
            partial.finish().unwrap();
            assert_eq!(store.get(&reference.id), Ok(segment));
        }
        drop(partial);
        assert_booked(&root);
    }
    drop((root, store));
    let (root, store) = open();
    assert_booked(&root);
    assert_eq!((store.partials().len(), store.list(None).len()), (2, 2));
    for info in store.partials() {
        let partial = store.partial(&info.reference, Charge::Normal).unwrap();
        assert_eq!(partial.missing(), Vec::new());
        partial.finish().unwrap();
    }
    assert_booked(&root);
    assert_eq!((store.partials().len(), store.list(None).len()), (0, 4));
}

#[test]
fn leftovers_are_removed_and_foreign_files_are_left_alone() {
    let from = MemStore::new();
    let segment = policy(1, &noise(100_000, 30));
    let reference = segment.reference();
    from.store.put(&segment, Charge::Normal).unwrap();
    let to = MemStore::new();
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    partial.abandon().unwrap();
    assert_eq!(
        partial.accept(&(0..1), b""),
        Err(PartialError::Slice(BaoError::Length {
            expected: bao::slice_len(reference.size_bytes, &(0..1)).unwrap(),
            actual: 0,
        }))
    );
    assert_eq!(partial.finish(), Err(PartialError::Ended));
    assert_eq!(partial.missing(), Vec::new());
    drop(partial);
    to.assert_clean();
    let write = |name: &str| {
        let rel = format!("partial/{name}");
        to.root
            .write_atomic(&rel, b"whatever", Charge::Normal)
            .unwrap();
    };
    let hex = SegmentId::of(b"gone").hex();
    for ending in ["part", "map", "new"] {
        write(&format!("{hex}.{ending}"));
    }
    for foreign in ["README", "x.part", "0000.map"] {
        write(foreign);
    }
    let to = to.after(Survival::All);
    assert_eq!(
        to.root.list("partial").unwrap(),
        ["0000.map", "README", "x.part"]
    );
    assert_eq!(to.store.partials(), Vec::new());
    to.assert_ledger();
    receive(&to, &from.store, &reference, Syncs::Each).unwrap();
    to.assert_ledger();
}

fn vectors_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors/segments/bao")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

/// Content that any reader of a vector can make again: byte i is the low byte of i / 7 + i * 31.
fn content(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i / 7 + i * 31).to_le_bytes()[0])
        .collect()
}

fn slice_vector(size: usize, range: Range<u64>) -> Value {
    let bytes = content(size);
    json!({
        "size": size,
        "content": "byte i is the low byte of i / 7 + i * 31",
        "id": SegmentId::of(&bytes),
        "start": range.start,
        "end": range.end,
        "hex": hex(&slice_of(&bytes, &range)),
    })
}

/// The map of a partial of five groups of which the second and the last have arrived.
fn map_vector() -> Value {
    let segment = policy(3, &content(70_000));
    let reference = segment.reference();
    let to = MemStore::new();
    let partial = to.store.partial(&reference, Charge::Normal).unwrap();
    for range in [
        20_000..20_001,
        reference.size_bytes - 1..reference.size_bytes,
    ] {
        partial
            .accept(&range, &slice_of(segment.bytes(), &range))
            .unwrap();
    }
    partial.sync().unwrap();
    let outboard = Outboard::of(segment.bytes()).unwrap();
    let pairs = [0, 1, 2].map(|place: usize| hex(&outboard.pairs()[place]));
    json!({
        "reference": serde_json::to_value(&reference).unwrap(),
        "body": "byte i is the low byte of i / 7 + i * 31, 70000 of them",
        "serial": 1,
        "groups": [1, 4],
        "pairs_hex": pairs,
        "hex": hex(&to.disk.content(&part_path(&reference.id, "map")).unwrap()),
    })
}

fn vectors() -> Vec<(&'static str, Value)> {
    vec![
        ("slice-last-group", slice_vector(100_000, 99_000..99_001)),
        ("slice-whole", slice_vector(1000, 0..1000)),
        ("map", map_vector()),
    ]
}

#[test]
fn the_vectors_are_what_this_version_writes() {
    for (name, value) in vectors() {
        let path = vectors_dir().join(format!("{name}.json"));
        let text = serde_json::to_string_pretty(&value).unwrap() + "\n";
        if std::env::var_os("TIDELOCK_WRITE_VECTORS").is_some() {
            std::fs::create_dir_all(vectors_dir()).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        // By value: the order of keys is another where a crate asks serde_json to preserve it.
        assert_eq!(vector(name), value, "{name}");
    }
}

fn vector(name: &str) -> Value {
    let path = vectors_dir().join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn another_implementation_reads_the_vectors_of_slices() {
    for name in ["slice-last-group", "slice-whole"] {
        let v = vector(name);
        let number = |key: &str| v[key].as_u64().unwrap();
        let bytes = content(usize::try_from(number("size")).unwrap());
        assert_eq!(v["id"], format!("blake3:{}", blake3_hex(&bytes)));
        let start = number("start") / GROUP_BYTES * GROUP_BYTES;
        let end = number("end")
            .next_multiple_of(GROUP_BYTES)
            .min(number("size"));
        let chunks = round_up_to_chunks(&ByteRanges::from(start..end));
        let tree = BaoTree::new(number("size"), BlockSize::from_chunk_log(4));
        let slice = unhex(&v["hex"]);
        let root = blake3_of(&bytes);
        let mut read = Vec::new();
        for item in DecodeResponseIter::new(root, tree, slice.as_slice(), &chunks) {
            if let BaoContentItem::Leaf(leaf) = item.unwrap() {
                assert_eq!(leaf.offset, start + read.len() as u64);
                read.extend_from_slice(&leaf.data);
            }
        }
        let (from, to) = (
            usize::try_from(start).unwrap(),
            usize::try_from(end).unwrap(),
        );
        assert_eq!(read, bytes[from..to], "{name}");
    }
}

/// The hash by way of the other implementation's tree.
fn blake3_of(bytes: &[u8]) -> blake3::Hash {
    PreOrderMemOutboard::create(bytes, BlockSize::ZERO).root
}

fn blake3_hex(bytes: &[u8]) -> String {
    hex(blake3_of(bytes).as_bytes())
}

#[test]
fn a_second_reader_understands_the_map() {
    // By `docs/src/format.md` alone.
    let v = vector("map");
    let bytes = unhex(&v["hex"]);
    let mut rest = bytes.as_slice();
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head
    };
    let u64_of = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap());
    assert_eq!(take(8), b"TIDEPAR1");
    let sum = u32::from_le_bytes(take(4).try_into().unwrap());
    assert_eq!(sum, crc32c_of(&bytes[12..]));
    let reference = &v["reference"];
    assert_eq!(reference["id"], format!("blake3:{}", hex(take(32))));
    assert_eq!(take(1), [2]);
    let len = usize::try_from(u64_of(take(8))).unwrap();
    assert_eq!(take(len), reference["origin"].as_str().unwrap().as_bytes());
    assert_eq!(u64_of(take(8)), reference["sequence"].as_u64().unwrap());
    let size = u64_of(take(8));
    assert_eq!(size, reference["size_bytes"].as_u64().unwrap());
    assert_eq!(take(1), [0]);
    assert_eq!(u64_of(take(8)), v["serial"].as_u64().unwrap());
    assert_eq!(size.div_ceil(GROUP_BYTES), 5);
    assert_eq!((u64_of(take(8)), take(1)), (1, [0b1_0010].as_slice()));
    let pairs = v["pairs_hex"].as_array().unwrap();
    assert_eq!(u64_of(take(8)), pairs.len() as u64);
    for pair in pairs {
        assert_eq!(take(64), unhex(pair));
    }
    assert!(rest.is_empty());
}

/// crc32c, bit by bit.
fn crc32c_of(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0x82f6_3b78 & (sum & 1).wrapping_neg())
        })
    })
}

#[test]
fn inv_04_what_a_peer_only_claimed_stands_before_no_segment() {
    // Partials gave way to each other and not to whole segments: who began a few transfers and sent
    // nothing of them had the custody share for good.
    let segments = foreign_segments("n2", 32);
    let audit = &segments[0];
    let to = MemStore::new();
    to.store.set_own_node(&node("n1"));
    let share = to.root.ledger().usage().custody_max_bytes.min(4 * MIB);
    to.root.ledger().set_custody_max(share);
    let claimed = |name: &[u8], size_bytes: u64| SegmentRef {
        id: SegmentId::of(name),
        size_bytes,
        ..audit.reference()
    };
    let begin = |claim: &SegmentRef| to.store.partial(claim, Charge::Custody);
    let held = begin(&claimed(b"one", share / 2)).unwrap();
    let (mut most, mut least) = (share / 2, 0);
    while most - least > 4096 {
        let size = (most + least) / 2;
        match begin(&claimed(b"two", size)) {
            Ok(partial) => {
                partial.abandon().unwrap();
                least = size;
            }
            Err(_) => most = size,
        }
    }
    let rest = begin(&claimed(b"two", least)).unwrap();
    assert_eq!(to.store.unused_partial_bytes(Charge::Custody), 0);
    let full = to.store.put(audit, Charge::Custody);
    assert!(
        matches!(full, Err(StoreError::Ceiling(_))),
        "the control: those in use stay, {full:?}"
    );
    drop(rest);
    assert_eq!(to.store.unused_partial_bytes(Charge::Custody), least);
    // It is not given up for what would not fit without it either: a larger transfer, a larger segment.
    let larger = begin(&claimed(b"three", share));
    assert!(larger.is_err(), "{larger:?}");
    drop(larger);
    let whole = policy(1, &noise(usize::try_from(share).unwrap(), 1));
    let refused = to.store.put(&whole, Charge::Custody);
    assert!(
        matches!(refused, Err(StoreError::Ceiling(_))),
        "{refused:?}"
    );
    assert_eq!(to.store.unused_partial_bytes(Charge::Custody), least);
    assert_eq!(to.store.unused_partial_bytes(Charge::Normal), 0);
    for segment in &segments {
        to.store.put(segment, Charge::Custody).unwrap();
    }
    assert_eq!(to.store.partials().len(), 1);
    held.abandon().unwrap();
    drop(held);
    to.assert_ledger();
}

#[test]
fn inv_07_a_partial_counts_with_what_is_claimed_of_it_now() {
    // A claim of a few bytes, left and taken up as one of many, counted as few.
    let to = MemStore::new();
    let claim = |size_bytes| SegmentRef {
        size_bytes,
        ..policy(1, b"x").reference()
    };
    drop(to.store.partial(&claim(1_000), Charge::Normal).unwrap());
    let listed = || to.store.partials()[0].reference.size_bytes;
    assert_eq!(listed(), 1_000);
    drop(to.store.partial(&claim(2 * MIB), Charge::Normal).unwrap());
    assert_eq!(listed(), 2 * MIB);
    to.assert_ledger();
}
