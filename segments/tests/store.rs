//! The store and the root on the simulated disk: put, get, heads, quarantine, ceiling, locks.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use common::{KIB, MIB, ROOT, Settings, domain, foreign_segments};
use tidelock_segments::testing::{SimDisk, Survival, unsigned_segment};
use tidelock_segments::{
    Charge, DiskFault, DomainId, FormatError, Head, Kind, LogError, Origin, PutOutcome, Root,
    RootError, RootOptions, SegmentHeader, SegmentId, Store, StoreError, VerifiedSegment,
    seal_unsigned, verify_segment,
};

fn policy(name: &str, sequence: u64, body: &[u8]) -> VerifiedSegment {
    segment(Origin::policy(name).unwrap(), sequence, body)
}

fn crl(issuer: u8, number: u64, body: &[u8]) -> VerifiedSegment {
    segment(Origin::crl(&[issuer; 32]), number, body)
}

fn segment(origin: Origin, sequence: u64, body: &[u8]) -> VerifiedSegment {
    let bytes = unsigned_segment(&domain(), origin, sequence, body).unwrap();
    verify_segment(bytes, None, &domain()).unwrap()
}

fn open(disk: &SimDisk) -> (Arc<Root>, Arc<Store>) {
    let root = Settings::default().open_root(disk.disk()).unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    (root, store)
}

fn path_of(kind: Kind, id: &SegmentId) -> PathBuf {
    Path::new(ROOT).join(format!("segments/{kind}/{}.seg", id.hex()))
}

#[test]
fn what_is_put_comes_back_after_a_crash() {
    let disk = SimDisk::new();
    let (root, store) = open(&disk);
    let one = policy("base", 1, b"bundle");
    assert_eq!(store.put(&one, Charge::Reserve), Ok(PutOutcome::Stored));
    assert_eq!(store.get(&one.id()), Ok(one.clone()));
    drop((root, store));
    disk.crash(Survival::None);
    let (_root, store) = open(&disk);
    assert_eq!(store.get(&one.id()), Ok(one.clone()));
    assert_eq!(store.reference(&one.id()), Some(one.reference()));
    assert_eq!(
        store.find(&Origin::policy("base").unwrap(), 1),
        Some(one.reference())
    );
}

#[test]
fn inv_08_the_same_segment_from_many_threads_is_stored_once() {
    let disk = SimDisk::new();
    let (root, store) = open(&disk);
    let one = policy("base", 1, &vec![7; 100_000]);
    let (calls, barrier) = (disk.calls(), Barrier::new(8));
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            barrier.wait();
            store.put(&one, Charge::Normal).unwrap()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(
        outcomes
            .iter()
            .filter(|o| **o == PutOutcome::Stored)
            .count(),
        1
    );
    // Create, allocate, write, sync, rename, directory sync: once.
    assert_eq!(disk.calls() - calls, 6);
    assert_eq!(store.put(&one, Charge::Normal), Ok(PutOutcome::AlreadyHeld));
    assert_eq!(disk.calls() - calls, 6);
    assert_eq!(store.list(None).len(), 1);
    assert_eq!(
        root.ledger().usage().allocated_bytes,
        root.measure().unwrap()
    );
}

#[test]
fn inv_08_a_failed_put_leaves_nothing_and_may_be_repeated() {
    let one = policy("base", 1, b"bundle");
    for call in 1..=6 {
        for fault in [DiskFault::NoSpace, DiskFault::Os(5)] {
            let disk = SimDisk::new();
            let (root, store) = open(&disk);
            disk.fail_call(disk.calls() + call, fault);
            assert!(store.put(&one, Charge::Normal).is_err());
            assert!(!store.contains(&one.id()));
            if let Some(reason) = store.latched() {
                assert_eq!(
                    store.put(&one, Charge::Normal),
                    Err(StoreError::Latched(reason))
                );
                store.reopen().unwrap();
            } else {
                assert_eq!(fault, DiskFault::NoSpace);
            }
            store.put(&one, Charge::Normal).unwrap();
            assert_eq!(store.get(&one.id()), Ok(one.clone()));
            assert_eq!(
                disk.files()
                    .iter()
                    .filter(|p| p.starts_with("/sim/root/tmp"))
                    .count(),
                0
            );
            drop((root, store));
            disk.crash(Survival::None);
            let (root, store) = open(&disk);
            assert_eq!(store.get(&one.id()), Ok(one.clone()), "{fault:?} at {call}");
            assert_eq!(
                root.ledger().usage().allocated_bytes,
                root.measure().unwrap()
            );
        }
    }
}

#[test]
fn inv_11_heads_and_lists_come_in_the_order_of_urgency() {
    let disk = SimDisk::new();
    let (_root, store) = open(&disk);
    let audit = foreign_segments("n9", 2);
    let all = [
        audit[1].clone(),
        policy("zeta", 2, b"z2"),
        audit[0].clone(),
        policy("alpha", 5, b"a5"),
        crl(9, 7, b"crl"),
        policy("alpha", 1, b"a1"),
        policy("alpha", 2, b"a2"),
        crl(1, 3, b"crl"),
    ];
    for segment in &all {
        store.put(segment, Charge::Normal).unwrap();
    }
    let kinds: Vec<_> = store
        .heads()
        .iter()
        .map(|head| head.origin.kind())
        .collect();
    assert_eq!(
        kinds,
        [
            Kind::Revocation,
            Kind::Revocation,
            Kind::Policy,
            Kind::Policy,
            Kind::Audit
        ]
    );
    let alpha = store.heads()[2].clone();
    assert_eq!(alpha.ranges, [(1, 2), (5, 5)]);
    assert_eq!(alpha.last_id, all[3].id());
    assert!(alpha.is_well_formed());
    assert_eq!(store.heads()[4].ranges, [(0, 1)]);
    let refs = store.refs(&alpha.origin, 2, 9, 10);
    assert_eq!(refs.iter().map(|r| r.sequence).collect::<Vec<_>>(), [2, 5]);
    assert_eq!(store.refs(&alpha.origin, 0, u64::MAX, 1).len(), 1);
    assert_eq!(store.refs(&alpha.origin, 9, 2, 10), []);
    let listed: Vec<_> = store.list(None).iter().map(|r| r.kind).collect();
    assert!(listed.is_sorted());
    assert_eq!(store.list(Some(Kind::Policy)).len(), 4);
}

#[test]
fn heads_are_bounded_and_checked() {
    let origin = Origin::policy("p").unwrap();
    let id = SegmentId::of(b"x");
    let many = Head::from_sequences(origin.clone(), (0..100).map(|i| i * 2), id);
    assert_eq!(many.ranges.len(), 32);
    assert_eq!(many.ranges.last(), Some(&(198, 198)));
    assert!(many.is_well_formed());
    let head = |ranges: Vec<(u64, u64)>| Head {
        origin: origin.clone(),
        ranges,
        last_id: id,
    };
    assert!(head(vec![(0, 0), (2, u64::MAX)]).is_well_formed());
    for bad in [
        vec![],
        vec![(2, 1)],
        vec![(0, 1), (2, 3)],
        vec![(4, 5), (0, 1)],
        vec![(0, u64::MAX), (3, 4)],
        (0..33).map(|i| (i * 2, i * 2)).collect(),
    ] {
        assert!(!head(bad.clone()).is_well_formed(), "{bad:?}");
    }
}

#[test]
fn a_damaged_segment_is_never_served_and_never_deleted() {
    let disk = SimDisk::new();
    let (root, store) = open(&disk);
    let one = policy("base", 1, b"a body that will rot");
    let two = policy("base", 2, b"a body that will not");
    store.put(&one, Charge::Normal).unwrap();
    store.put(&two, Charge::Normal).unwrap();
    let middle = one.bytes().len() / 2;
    disk.flip(&path_of(Kind::Policy, &one.id()), middle, 0x40);
    assert!(matches!(
        store.get(&one.id()),
        Err(StoreError::Damaged { .. })
    ));
    assert_eq!(store.get(&one.id()), Err(StoreError::NotHeld(one.id())));
    assert!(store.get(&two.id()).is_ok());
    assert_eq!(store.heads()[0].ranges, [(2, 2)]);
    let kept = disk
        .files()
        .into_iter()
        .filter(|p| p.starts_with("/sim/root/quarantine"))
        .count();
    assert_eq!(kept, 1);
    assert_eq!(
        root.ledger().usage().allocated_bytes,
        root.measure().unwrap()
    );
    // It may be fetched again.
    assert_eq!(store.put(&one, Charge::Normal), Ok(PutOutcome::Stored));
    assert!(store.get(&one.id()).is_ok());
}

#[test]
fn scrub_finds_what_nobody_reads() {
    let disk = SimDisk::new();
    let (_root, store) = open(&disk);
    let segments: Vec<_> = (0..5).map(|i| policy("base", i, &[7; 3000])).collect();
    for segment in &segments {
        store.put(segment, Charge::Normal).unwrap();
    }
    let whole = store.scrub(u64::MAX).unwrap();
    assert_eq!(
        (whole.checked, whole.damaged.len(), whole.wrapped),
        (5, 0, true)
    );
    disk.flip(&path_of(Kind::Policy, &segments[3].id()), 1000, 1);
    let mut damaged = Vec::new();
    for _ in 0..6 {
        damaged.extend(store.scrub(1).unwrap().damaged);
    }
    assert_eq!(damaged, [segments[3].id()]);
}

#[test]
fn files_that_are_no_segments_are_told_apart_at_start() {
    let disk = SimDisk::new();
    let (root, store) = open(&disk);
    let one = policy("base", 1, b"bundle");
    let two = policy("base", 2, b"bundle two");
    store.put(&one, Charge::Normal).unwrap();
    store.put(&two, Charge::Normal).unwrap();
    drop((root, store));
    let bytes = disk.content(&path_of(Kind::Policy, &one.id())).unwrap();
    disk.plant(&path_of(Kind::Policy, &one.id()), &bytes[..bytes.len() / 2]);
    disk.plant(&path_of(Kind::Policy, &SegmentId::of(b"zero")), b"");
    // A good segment in the directory of another kind.
    let good = disk.content(&path_of(Kind::Policy, &two.id())).unwrap();
    disk.plant(&path_of(Kind::Audit, &two.id()), &good);
    disk.plant(
        &Path::new(ROOT).join("segments/policy/README"),
        b"a foreign file",
    );
    let (root, store) = open(&disk);
    assert_eq!(store.list(None), [two.reference()]);
    // Audit segments are not listed at start; the survey comes by.
    assert_eq!(root.list("quarantine").unwrap().len(), 2);
    while !store.survey(1).unwrap() {}
    assert_eq!(store.list(None), [two.reference()]);
    assert_eq!(root.list("quarantine").unwrap().len(), 3);
    assert!(root.exists("segments/policy/README").unwrap());
    assert_eq!(
        root.ledger().usage().allocated_bytes,
        root.measure().unwrap()
    );
}

#[test]
fn inv_17_a_fork_of_an_audit_log_is_refused() {
    // Two histories of one log, from a disk image that was restored: same inodes, so the marker does
    // not tell. A simulated disk is an image when the power is lost before anything was synced.
    let disk = SimDisk::new();
    let settings = Settings {
        node: "n9",
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    n.append(b"common").unwrap();
    let base = n.log.seal_now().unwrap().unwrap();
    let base = n.store.get(&base.id).unwrap();
    n.append(b"first of the next").unwrap();
    drop(n);
    let image: Vec<_> = disk
        .files()
        .into_iter()
        .map(|p| (disk.content(&p).unwrap(), p))
        .collect();
    let branch = |texts: &[&[u8]]| -> Vec<VerifiedSegment> {
        for path in disk.files() {
            if !image.iter().any(|(_, p)| *p == path) {
                tidelock_segments::Disk::remove(&disk, &path).unwrap();
            }
        }
        for (bytes, path) in &image {
            disk.plant(path, bytes);
        }
        let n = settings.sim(&disk);
        assert_eq!(n.recovery.new_incarnation, None);
        texts
            .iter()
            .map(|text| {
                n.append(text).unwrap();
                let sealed = n.log.seal_now().unwrap().unwrap();
                n.store.get(&sealed.id).unwrap()
            })
            .collect()
    };
    let left = branch(&[b"left one", b"left two"]);
    let right = branch(&[b"right one", b"right two"]);
    assert_eq!(left[0].header().origin, right[0].header().origin);

    let peer = SimDisk::new();
    let (_root, store) = open(&peer);
    store.put(&base, Charge::Normal).unwrap();
    store.put(&left[0], Charge::Normal).unwrap();
    let fork = |offered: &VerifiedSegment, held: &VerifiedSegment, sequence| {
        Err(StoreError::Fork {
            origin: offered.header().origin.clone(),
            sequence,
            held: held.id(),
            offered: offered.id(),
        })
    };
    // The same place twice, and a neighbour that links to something else.
    assert_eq!(
        store.put(&right[0], Charge::Normal),
        fork(&right[0], &left[0], 1)
    );
    assert_eq!(
        store.put(&right[1], Charge::Normal),
        fork(&right[1], &left[0], 2)
    );
    assert_eq!(store.put(&left[1], Charge::Normal), Ok(PutOutcome::Stored));
    // Out of order: the later one is held, and the earlier does not lead to it.
    store.remove(&left[0].id()).unwrap();
    assert_eq!(
        store.put(&right[0], Charge::Normal),
        fork(&right[0], &left[1], 1)
    );
    assert_eq!(store.put(&left[0], Charge::Normal), Ok(PutOutcome::Stored));
}

#[test]
fn policy_and_revocation_may_have_several_segments_of_one_number() {
    // Ruling 5: a further signature makes another segment of the same epoch, conflicting CRLs of one
    // number are united. Neither is a fork.
    let disk = SimDisk::new();
    let (_root, store) = open(&disk);
    for segment in [
        policy("p", 1, b"one signature"),
        policy("p", 1, b"two signatures"),
    ] {
        assert_eq!(store.put(&segment, Charge::Normal), Ok(PutOutcome::Stored));
    }
    assert_eq!(store.refs(&Origin::policy("p").unwrap(), 1, 1, 10).len(), 2);
    assert_eq!(store.heads()[0].ranges, [(1, 1)]);
}

#[test]
fn inv_04_custody_has_its_own_share_and_never_seals_the_own_log() {
    let disk = SimDisk::new();
    let settings = Settings {
        ceiling: 8 * MIB,
        reserve: 2 * MIB,
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    n.root.ledger().set_custody_max(96 * KIB);
    let mut stored = 0;
    let refused = foreign_segments("n9", 20).into_iter().find_map(|segment| {
        match n.store.put(&segment, Charge::Normal) {
            Ok(_) => {
                stored += 1;
                None
            }
            Err(error) => Some(error),
        }
    });
    assert!(
        matches!(refused, Some(StoreError::Ceiling(_))),
        "{refused:?}"
    );
    assert!(stored > 5);
    assert_eq!(
        n.store.foreign_audit_bytes(),
        n.root.ledger().usage().custody_bytes
    );
    assert!(n.root.ledger().usage().custody_bytes <= 96 * KIB);
    n.append(b"own log goes on").unwrap();
    n.assert_ledger();
    let held = n.store.foreign_audit_bytes();
    drop(n);
    // The split is found again at the next start.
    let n = settings.sim(&disk);
    assert_eq!(n.store.foreign_audit_bytes(), held);
    assert_eq!(n.root.ledger().usage().custody_bytes, held);
    let first = n.store.list(Some(Kind::Audit))[0].clone();
    n.store.remove(&first.id).unwrap();
    assert!(n.root.ledger().usage().custody_bytes < held);
    n.assert_ledger();
}

#[test]
fn inv_04_put_at_the_ceiling_writes_nothing() {
    let disk = SimDisk::new();
    let (root, store) = open(&disk);
    root.ledger()
        .set_ceiling(root.ledger().usage().allocated_bytes + 2 * MIB + 100 * KIB);
    root.ledger().set_custody_max(0);
    let calls = disk.calls();
    let big = policy("base", 1, &vec![1; 200_000]);
    assert!(matches!(
        store.put(&big, Charge::Normal),
        Err(StoreError::Ceiling(_))
    ));
    assert_eq!(disk.calls(), calls);
    // Ruling 10: the reserve holds urgent kinds.
    assert_eq!(
        store.put(&crl(1, 1, &vec![1; 200_000]), Charge::Reserve),
        Ok(PutOutcome::Stored)
    );
}

#[test]
fn inv_01_a_root_has_one_holder() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let root = settings.open_root(disk.disk()).unwrap();
    assert!(matches!(
        settings.open_root(disk.disk()),
        Err(LogError::Root(RootError::InUse { .. }))
    ));
    drop(root);
    assert!(settings.open_root(disk.disk()).is_ok());
}

#[test]
fn inv_01_network_file_systems_are_refused() {
    let disk = SimDisk::new();
    disk.set_network(Some("nfs"));
    assert!(matches!(
        Settings::default().open_root(disk.disk()),
        Err(LogError::Root(RootError::NetworkFileSystem {
            kind: "nfs",
            ..
        }))
    ));
    disk.set_network(None);
    assert!(Settings::default().open_root(disk.disk()).is_ok());
}

#[test]
fn inv_01_paths_outside_the_root_are_refused() {
    let disk = SimDisk::new();
    let root = Settings::default().open_root(disk.disk()).unwrap();
    for bad in [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        ".",
        "a/./b",
        "a b",
        "a\0",
        "a/b/c/d/e",
    ] {
        assert_eq!(
            root.write_atomic(bad, b"x", Charge::Normal),
            Err(RootError::Path(bad.to_owned())),
            "{bad:?}"
        );
        assert_eq!(root.read(bad), Err(RootError::Path(bad.to_owned())));
    }
    root.write_atomic("state/slot.active", b"x", Charge::Normal)
        .unwrap();
    assert_eq!(
        root.read("state/slot.active").unwrap().as_deref(),
        Some(&b"x"[..])
    );
    assert_eq!(root.read("state/none"), Ok(None));
}

#[test]
fn write_atomic_leaves_the_old_content_or_the_new() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let root = settings.open_root(disk.disk()).unwrap();
    root.write_atomic("state/a", &[1; 9000], Charge::Reserve)
        .unwrap();
    let start = disk.calls();
    root.write_atomic("state/a", &[2; 5000], Charge::Reserve)
        .unwrap();
    let calls = disk.calls() - start;
    assert_eq!(
        root.ledger().usage().allocated_bytes,
        root.measure().unwrap()
    );
    drop(root);
    for at in 1..=calls {
        for survival in [
            Survival::None,
            Survival::All,
            Survival::Seed(1),
            Survival::Seed(2),
        ] {
            let disk = SimDisk::new();
            let root = settings.open_root(disk.disk()).unwrap();
            root.write_atomic("state/a", &[1; 9000], Charge::Reserve)
                .unwrap();
            disk.crash_at_call(disk.calls() + at);
            assert!(
                root.write_atomic("state/a", &[2; 5000], Charge::Reserve)
                    .is_err()
            );
            drop(root);
            disk.crash(survival);
            let root = settings.open_root(disk.disk()).unwrap();
            let content = root.read("state/a").unwrap().unwrap();
            assert!(
                content == [1; 9000] || content == [2; 5000],
                "at {at} {survival:?}"
            );
            assert_eq!(
                root.ledger().usage().allocated_bytes,
                root.measure().unwrap()
            );
        }
    }
}

#[test]
fn root_options_are_checked() {
    let disk = SimDisk::new();
    let open = |ceiling_bytes, reserve_bytes| {
        Root::open(
            disk.disk(),
            Path::new(ROOT),
            RootOptions {
                ceiling_bytes,
                reserve_bytes,
            },
        )
        .map(|_| ())
    };
    assert!(matches!(open(1000, 0), Err(RootError::Options(_))));
    assert!(matches!(open(4 * MIB, 4 * MIB), Err(RootError::Options(_))));
    assert_eq!(open(4 * MIB, MIB), Ok(()));
}

#[test]
fn a_segment_of_another_domain_is_refused() {
    let disk = SimDisk::new();
    let (_root, store) = open(&disk);
    let other = DomainId::new("elsewhere").unwrap();
    let header = SegmentHeader {
        kind: Kind::Policy,
        domain: other.clone(),
        origin: Origin::policy("p").unwrap(),
        sequence: 1,
        prev: None,
        created_unix_ms: 0,
    };
    let bytes = seal_unsigned(&header, b"x").unwrap();
    assert_eq!(
        verify_segment(bytes.clone(), None, &domain()),
        Err(FormatError::Domain {
            found: other.clone(),
            expected: domain()
        })
    );
    let segment = verify_segment(bytes, None, &other).unwrap();
    assert_eq!(
        store.put(&segment, Charge::Normal),
        Err(StoreError::Domain(other))
    );
}
