//! The simulated disk does what its fault model says, and nothing when nothing is injected.

use std::collections::BTreeSet;
use std::path::Path;

use tidelock_segments::testing::{Bound, Fault, Place, SimDisk, Survival};
use tidelock_segments::{Disk, DiskFault, DiskFile, DiskOp, OpenMode};

const EIO: DiskFault = DiskFault::Os(5);

fn path(name: &str) -> std::path::PathBuf {
    Path::new("/sim").join(name)
}

#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn create(disk: &SimDisk, name: &str) -> Box<dyn DiskFile> {
    let file = disk.open(&path(name), OpenMode::CreateNew).unwrap();
    disk.sync_dir(Path::new("/sim")).unwrap();
    file
}

#[test]
fn every_subset_of_sectors_survives_and_sectors_are_whole() {
    let disk = SimDisk::new();
    let file = create(&disk, "a");
    file.write_at(0, &[1; 2048]).unwrap();
    file.sync_data().unwrap();
    // Not aligned: five sectors are touched.
    file.write_at(100, &[2; 2048]).unwrap();
    let snapshot = disk.snapshot();
    assert_eq!(snapshot.unsynced(), (5, 0));
    let bound = Bound {
        all_subsets_up_to: 5,
        all_pairs_up_to: 64,
        ..Bound::SMALL
    };
    let mut seen = BTreeSet::new();
    for survivors in snapshot.survivors(&bound) {
        let content = snapshot.image(&survivors).content(&path("a")).unwrap();
        for sector in content.chunks(512) {
            let new = sector.iter().filter(|byte| **byte == 2).count();
            assert!([0, 100, 412, 512].contains(&new), "{new}");
        }
        seen.insert(content);
    }
    assert_eq!(seen.len(), 32);
    // What is synced survives in every one of them.
    file.sync_data().unwrap();
    for survivors in disk.snapshot().survivors(&bound) {
        let image = disk.snapshot().image(&survivors);
        assert_eq!(image.content(&path("a")).unwrap()[100..], [2; 2048]);
    }
}

#[test]
fn names_survive_as_prefixes_of_each_directory_and_a_rename_never_loses_both() {
    let disk = SimDisk::new();
    for dir in ["a", "b"] {
        disk.create_dir(&path(dir)).unwrap();
    }
    disk.sync_dir(Path::new("/sim")).unwrap();
    for name in ["a/1", "a/2"] {
        disk.open(&path(name), OpenMode::CreateNew).unwrap();
    }
    disk.sync_dir(&path("a")).unwrap();
    disk.rename(&path("a/1"), &path("b/1")).unwrap();
    disk.rename(&path("a/2"), &path("a/3")).unwrap();
    disk.remove(&path("b/1")).unwrap();
    let snapshot = disk.snapshot();
    let mut seen = BTreeSet::new();
    for survivors in snapshot.survivors(&Bound::LARGE) {
        let image = snapshot.image(&survivors);
        let there = |name: &str| image.content(&path(name)).is_some();
        // Within one directory a rename is one step.
        assert!(there("a/2") != there("a/3"));
        seen.insert((there("a/1"), there("b/1"), there("a/3")));
    }
    // Old, both, new, removed; but not "a/3" while "a/1" is still only in its old place's past.
    assert!(seen.contains(&(true, false, false)) && seen.contains(&(true, true, false)));
    assert!(seen.contains(&(false, true, true)) && seen.contains(&(false, false, true)));

    // The old name's directory is synced alone: the new name is durable too.
    disk.rename(&path("a/3"), &path("b/3")).unwrap();
    disk.sync_dir(&path("a")).unwrap();
    disk.crash(Survival::None);
    assert!(disk.content(&path("a/3")).is_none() && disk.content(&path("b/3")).is_some());
}

#[test]
fn a_name_may_survive_without_data_and_data_without_a_name_is_gone() {
    let disk = SimDisk::new();
    let file = disk.open(&path("a"), OpenMode::CreateNew).unwrap();
    file.write_at(0, b"data").unwrap();
    let before = disk.snapshot();
    let seen: BTreeSet<_> = before
        .survivors(&Bound::SMALL)
        .iter()
        .map(|survivors| before.image(survivors).content(&path("a")))
        .collect();
    assert_eq!(
        seen,
        [None, Some(Vec::new()), Some(b"data".to_vec())].into()
    );
    file.sync_data().unwrap();
    assert!(
        disk.snapshot()
            .crash(Survival::None)
            .content(&path("a"))
            .is_none()
    );
    assert_eq!(
        disk.snapshot()
            .crash(Survival::All)
            .content(&path("a"))
            .unwrap(),
        b"data"
    );
}

#[test]
fn a_failed_sync_looks_clean_and_has_lost_the_data() {
    let disk = SimDisk::new();
    let file = create(&disk, "a");
    file.write_at(0, b"one").unwrap();
    file.sync_data().unwrap();
    file.write_at(0, b"two").unwrap();
    disk.fail_call(disk.calls() + 1, EIO);
    assert_eq!(file.sync_data().unwrap_err().fault, EIO);
    assert!(file.sync_data().is_ok(), "the second one looks clean");
    assert_eq!(disk.content(&path("a")).unwrap(), b"two");
    disk.drop_caches();
    assert_eq!(disk.content(&path("a")).unwrap(), b"one");
    file.write_at(0, b"two").unwrap();
    file.sync_data().unwrap();
    disk.crash(Survival::None);
    assert_eq!(disk.content(&path("a")).unwrap(), b"two");
}

#[test]
fn a_lost_sync_says_yes_and_persists_nothing() {
    for lie in [true, false] {
        let disk = SimDisk::new();
        let file = create(&disk, "a");
        if lie {
            disk.inject_from(disk.calls() + 1, Fault::LostSync);
        }
        file.write_at(0, b"x").unwrap();
        file.sync_data().unwrap();
        disk.open(&path("b"), OpenMode::CreateNew).unwrap();
        disk.sync_dir(Path::new("/sim")).unwrap();
        disk.crash(Survival::None);
        assert_eq!(disk.content(&path("a")).unwrap().is_empty(), lie);
        assert_eq!(disk.content(&path("b")).is_none(), lie);
    }
}

#[test]
fn writes_go_astray_on_the_device_while_the_cache_looks_right() {
    let elsewhere = |offset| Place {
        path: Some(path("b")),
        offset,
    };
    type Expected = (&'static [u8], &'static [u8]);
    let cases: [(Option<Fault>, Expected); 5] = [
        (None, (b"NEW.", b"....")),
        (Some(Fault::LostWrite), (b"....", b"....")),
        (Some(Fault::Misdirected(elsewhere(1))), (b"....", b".NEW")),
        (Some(Fault::Duplicated(elsewhere(0))), (b"NEW.", b"NEW.")),
        (
            Some(Fault::Flipped { byte: 1, bits: 1 }),
            (b"NDW.", b"...."),
        ),
    ];
    for (fault, (a, b)) in cases {
        for reboot in [false, true] {
            let disk = SimDisk::new();
            disk.plant(&path("a"), b"....");
            disk.plant(&path("b"), b"....");
            let file = disk.open(&path("a"), OpenMode::ReadWrite).unwrap();
            if let Some(fault) = fault.clone() {
                disk.inject(disk.calls() + 1, fault);
            }
            file.write_at(0, b"NEW").unwrap();
            file.sync_data().unwrap();
            let mut seen = [0; 3];
            file.read_at(0, &mut seen).unwrap();
            assert_eq!(&seen, b"NEW", "the cache");
            if reboot {
                disk.crash(Survival::None);
            } else {
                disk.drop_caches();
            }
            assert_eq!(disk.content(&path("a")).unwrap(), a, "{fault:?}");
            assert_eq!(disk.content(&path("b")).unwrap(), b, "{fault:?}");
        }
    }
}

#[test]
fn every_kind_of_call_can_fail_once_before_or_after_it_was_done() {
    type Call = fn(&SimDisk) -> Result<(), tidelock_segments::DiskError>;
    let calls: [(DiskOp, Call); 8] = [
        (DiskOp::Open, |d| {
            d.open(&path("new"), OpenMode::CreateNew).map(|_| ())
        }),
        (DiskOp::Write, |d| {
            d.open(&path("a"), OpenMode::ReadWrite)?
                .write_at(0, &[9; 2048])
        }),
        (DiskOp::Allocate, |d| {
            d.open(&path("a"), OpenMode::ReadWrite)?.allocate(9000)
        }),
        (DiskOp::Sync, |d| {
            d.open(&path("a"), OpenMode::ReadWrite)?.sync_data()
        }),
        (DiskOp::SyncDir, |d| d.sync_dir(Path::new("/sim"))),
        (DiskOp::Rename, |d| d.rename(&path("a"), &path("b"))),
        (DiskOp::Remove, |d| d.remove(&path("a"))),
        (DiskOp::CreateDir, |d| d.create_dir(&path("dir"))),
    ];
    for (op, call) in calls {
        let disk = SimDisk::new();
        disk.plant(&path("a"), &[1; 2048]);
        let untouched = disk.digest();
        disk.fail_call(1, EIO);
        let error = call(&disk).unwrap_err();
        assert_eq!((error.op, error.fault), (op, EIO));
        assert_eq!(disk.digest(), untouched, "{op:?}: nothing was done");
        call(&disk).unwrap();

        let again = SimDisk::new();
        again.plant(&path("a"), &[1; 2048]);
        again.inject(1, Fault::FailDone(EIO));
        assert_eq!(call(&again).unwrap_err().fault, EIO);
        match op {
            DiskOp::Write => {
                let content = again.content(&path("a")).unwrap();
                assert_eq!(content, [[9u8; 1024], [1; 1024]].concat(), "half of it");
            }
            DiskOp::Allocate => {}
            _ => assert_eq!(again.files(), disk.files(), "{op:?}: it was done"),
        }
    }
    let disk = SimDisk::new();
    disk.plant(&path("a"), b"x");
    let reading: [Call; 4] = [
        |d| d.open(&path("a"), OpenMode::Read).map(|_| ()),
        |d| d.stat(&path("a")).map(|_| ()),
        |d| d.read_dir(Path::new("/sim")).map(|_| ()),
        |d| d.open(&path("a"), OpenMode::Read)?.read_at(0, &mut [0]),
    ];
    for call in reading {
        let (calls, before) = (disk.calls(), disk.readings());
        call(&disk).unwrap();
        let used = disk.readings() - before;
        disk.fail_reading(disk.readings() + used, EIO);
        assert_eq!(call(&disk).unwrap_err().fault, EIO);
        call(&disk).unwrap();
        assert_eq!(disk.calls(), calls, "readings have their own numbers");
    }
}

#[test]
fn spoilt_and_rotten_sectors() {
    let disk = SimDisk::new();
    disk.plant(&path("a"), &[1; 1024]);
    let file = disk.open(&path("a"), OpenMode::ReadWrite).unwrap();
    let mut buffer = [0; 512];
    disk.spoil_sector(&path("a"), 700);
    file.read_at(0, &mut buffer).unwrap();
    assert_eq!(file.read_at(512, &mut buffer).unwrap_err().fault, EIO);
    file.write_at(512, &[2; 512]).unwrap();
    file.read_at(512, &mut buffer).unwrap();

    disk.flip_on_device(&path("a"), 3, 0x80);
    assert_eq!(disk.content(&path("a")).unwrap()[3], 1);
    file.sync_data().unwrap();
    disk.drop_caches();
    assert_eq!(disk.content(&path("a")).unwrap()[3], 0x81);
    disk.flip(&path("a"), 3, 0x80);
    assert_eq!(disk.content(&path("a")).unwrap()[3], 1);
}

#[test]
fn foreign_hands_other_tenants_and_time() {
    let disk = SimDisk::new();
    let file = create(&disk, "a");
    file.write_at(0, b"mine").unwrap();
    assert_eq!(file.stat().unwrap().nlink, 1);
    disk.replace(&path("a"), b"theirs");
    assert_eq!(file.stat().unwrap().nlink, 0);
    let mut mine = [0; 4];
    file.read_at(0, &mut mine).unwrap();
    assert_eq!(
        (&mine, disk.content(&path("a")).unwrap()),
        (b"mine", b"theirs".to_vec())
    );
    assert_eq!(disk.allocated(), 8192, "the open one still takes its block");
    drop(file);
    assert_eq!(disk.allocated(), 4096);
    disk.unlink(&path("a"));
    assert_eq!((disk.allocated(), disk.peak_allocated()), (0, 8192));

    disk.set_capacity(100_000);
    let file = create(&disk, "b");
    file.write_at(0, &[1; 50_000]).unwrap();
    disk.set_tenant(50_000);
    assert_eq!(
        file.write_at(50_000, &[1; 10_000]).unwrap_err().fault,
        DiskFault::NoSpace
    );
    file.write_at(0, &[2; 50_000]).unwrap();
    disk.set_tenant(0);
    file.write_at(50_000, &[1; 10_000]).unwrap();

    let clock = disk.clock(1000);
    assert_eq!(clock(), 1000);
    disk.set_latency(DiskOp::Sync, 3000);
    file.sync_data().unwrap();
    assert_eq!(clock(), 1003);
    disk.inject(disk.calls() + 1, Fault::Slow { delay_us: 250_000 });
    file.write_at(0, b"x").unwrap();
    assert_eq!(clock(), 1253);
    disk.advance(1_000_000);
    assert_eq!(clock(), 2253);
}

#[test]
fn a_killed_process_leaves_the_cache_and_a_later_crash_takes_it() {
    let disk = SimDisk::new();
    let file = create(&disk, "a");
    file.write_at(0, b"data").unwrap();
    let killed = disk.fork();
    assert_eq!(killed.content(&path("a")).unwrap(), b"data");
    killed.crash(Survival::None);
    assert_eq!(killed.content(&path("a")).unwrap(), b"");
    // The first disk knows nothing of it.
    assert!(file.write_at(4, b"!").is_ok());
    assert_eq!(disk.content(&path("a")).unwrap(), b"data!");
}

#[test]
fn a_seed_replays_bit_for_bit() {
    let run = |seed: u64| {
        let disk = SimDisk::new();
        let file = create(&disk, "a");
        for i in 0..10u8 {
            file.write_at(u64::from(i) * 700, &[i; 1000]).unwrap();
            disk.open(&path(&format!("n{i}")), OpenMode::CreateNew)
                .unwrap();
        }
        disk.crash(Survival::Seed(seed));
        disk.digest()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
