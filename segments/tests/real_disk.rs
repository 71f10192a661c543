//! The real file system: the same log and store on the disk that holds the temporary directory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{LONG, MIB, Settings, domain, foreign_segments, node};
use tidelock_segments::testing::SimDisk;
use tidelock_segments::{
    AppendError, Charge, DiskFault, LogError, RealDisk, RecordClass, Root, RootError, RootOptions,
    VerifiedSegment, verify_log,
};

/// Stops the other threads of a test also when an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What `du` counts: 512 x blocks of every inode.
fn du(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    let mut total = meta.blocks() * 512;
    if meta.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            total += du(&entry.path());
        }
    }
    total
}

fn options() -> RootOptions {
    RootOptions {
        ceiling_bytes: 16 * MIB,
        reserve_bytes: 2 * MIB,
    }
}

fn settings(dir: &Path, ceiling: u64) -> Settings {
    // Leaked once a test: the settings take a plain path.
    let path: &'static str = Box::leak(dir.join("root").to_str().unwrap().to_owned().into());
    Settings {
        path,
        ceiling,
        ..Settings::default()
    }
}

#[test]
fn a_log_survives_a_restart_and_modes_are_private() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path(), 64 * MIB);
    let root_path = dir.path().join("root");
    let before = {
        let n = settings.open(Arc::new(RealDisk::new())).unwrap();
        for i in 0..200 {
            n.append(format!("record {i}").as_bytes()).unwrap();
        }
        n.log.seal_now().unwrap().unwrap();
        n.append(b"after").unwrap();
        n.store
            .put(&foreign_segments("n9", 1)[0], Charge::Normal)
            .unwrap();
        n.log.close();
        n.assert_ledger();
        assert_eq!(n.root.measure().unwrap(), du(&root_path));
        n.records()
    };
    for (path, mode) in [
        ("", 0o700),
        ("keys", 0o700),
        ("keys/log.pk8", 0o600),
        ("log", 0o700),
        ("lock", 0o600),
    ] {
        let meta = std::fs::metadata(root_path.join(path)).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{path}");
    }
    let report = verify_log(&RealDisk::new(), &root_path, &domain()).unwrap();
    assert!(report.ok, "{report:?}");
    let n = settings.open(Arc::new(RealDisk::new())).unwrap();
    assert_eq!(n.recovery.new_incarnation, None);
    assert_eq!(n.records(), before);
    // A running node is verified as well, while it writes and seals.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (n, stop) = (&n, &stop);
        let stopping = StopOnDrop(stop);
        scope.spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                n.append(&[b'w'; 3000]).unwrap();
            }
        });
        for _ in 0..10 {
            let report = verify_log(&RealDisk::new(), &root_path, &domain()).unwrap();
            assert!(report.ok, "{report:?}");
        }
        drop(stopping);
    });
}

#[test]
fn inv_04_du_never_exceeds_the_ceiling_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let ceiling = 8 * MIB;
    let settings = settings(dir.path(), ceiling);
    let root_path = dir.path().join("root");
    let n = settings.open(Arc::new(RealDisk::new())).unwrap();
    let foreign = foreign_segments("n9", 40);
    let stop = AtomicBool::new(false);
    let peak = std::thread::scope(|scope| {
        let (stop, n, root_path) = (&stop, &n, &root_path);
        let stopping = StopOnDrop(stop);
        let sampler = scope.spawn(move || {
            let mut peak = 0;
            while !stop.load(Ordering::SeqCst) {
                peak = peak.max(du(root_path));
            }
            peak
        });
        let putter = scope.spawn(move || {
            for segment in &foreign {
                let _ = n.store.put(segment, Charge::Normal);
                let _ = n
                    .root
                    .write_atomic("state/slot", segment.bytes(), Charge::Reserve);
            }
        });
        let record = vec![b'x'; 20_000];
        let license = || {
            for reference in n.store.own_audit(&node("n1")) {
                n.licensed_by(&reference, &["n2"]);
            }
        };
        let mut refused = 0;
        for round in 0..900 {
            if n.append(&record) == Err(AppendError::Capacity) {
                refused += 1;
            }
            if round == 600 {
                license();
            }
        }
        assert!(refused > 0, "the ceiling was never met");
        license();
        n.append(b"after the licences").unwrap();
        putter.join().unwrap();
        drop(stopping);
        sampler.join().unwrap()
    });
    assert!(peak <= ceiling, "{peak}");
    // Half of it is the share of the own log.
    assert!(peak > ceiling / 5 * 2, "{peak}");
    n.log.close();
    n.assert_ledger();
}

/// Allocated bytes of a root that is being written: a walk takes time, so a file may be counted before
/// it is removed and its successor after. Every inode counts once, and a sum above the ceiling counts
/// only if no walk of three finds less.
fn du_of_the_living(path: &Path, ceiling: u64) -> u64 {
    fn walk(path: &Path, seen: &mut BTreeSet<u64>) -> u64 {
        let Ok(meta) = std::fs::symlink_metadata(path) else {
            return 0;
        };
        let mut total = if seen.insert(meta.ino()) {
            meta.blocks() * 512
        } else {
            0
        };
        if meta.is_dir() {
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                total += walk(&entry.path(), seen);
            }
        }
        total
    }
    let mut least = u64::MAX;
    for _ in 0..3 {
        least = least.min(walk(path, &mut BTreeSet::new()));
        if least <= ceiling {
            break;
        }
    }
    least
}

/// Segments of another node's log with two records of this length each.
fn large_foreign_segments(count: u64, length: usize) -> Vec<VerifiedSegment> {
    let disk = SimDisk::new();
    let other = Settings {
        node: "n9",
        ceiling: 1024 * MIB,
        segment_bytes: 256 * 1024,
        ..Settings::default()
    }
    .sim(&disk);
    let mut out = Vec::new();
    for i in 0..count {
        for half in [0u8, 1] {
            // Bytes that no compression makes smaller.
            let mut record = vec![half; length];
            let seed = i.to_le_bytes();
            blake3::Hasher::new_derive_key("records of a test")
                .update(&seed)
                .update(&[half])
                .finalize_xof()
                .fill(&mut record);
            other.append(&record).unwrap();
        }
        let sealed = other.log.seal_now().unwrap().unwrap();
        out.push(other.store.get(&sealed.id).unwrap());
        // The simulated disk gets slow with what lies on it.
        other.store.remove(&sealed.id).unwrap();
    }
    out
}

#[test]
fn inv_04_the_ceiling_is_used_to_95_percent_and_never_exceeded() {
    for (ceiling, reserve, segment_bytes) in
        [(16 * MIB, 2 * MIB, MIB), (64 * MIB, 4 * MIB, 4 * MIB)]
    {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            reserve,
            segment_bytes,
            ..settings(dir.path(), ceiling)
        };
        let root_path = dir.path().join("root");
        let custody = ceiling / 10 * 4;
        let foreign = large_foreign_segments(custody / 120_000 + 4, 60_000);
        let n = settings.open(Arc::new(RealDisk::new())).unwrap();
        n.root.ledger().set_custody_max(custody);
        let stop = AtomicBool::new(false);
        let peak = std::thread::scope(|scope| {
            let (stop, n, root_path) = (&stop, &n, &root_path);
            let stopping = StopOnDrop(stop);
            let poll = scope.spawn(move || {
                let mut peak = 0;
                while !stop.load(Ordering::SeqCst) {
                    peak = peak.max(du_of_the_living(root_path, ceiling));
                    std::thread::sleep(Duration::from_millis(10));
                }
                peak
            });
            let custodian = scope.spawn(move || {
                let refused = |segment| n.store.put(segment, Charge::Normal).is_err();
                assert!(foreign.iter().any(refused), "the share was never met");
            });
            let reports = scope.spawn(move || {
                for i in 0..50u8 {
                    let _ = n.root.write_atomic(
                        &format!("state/{}", i % 5),
                        &[i; 30_000],
                        Charge::Reserve,
                    );
                }
            });
            // The own log, at full speed until it is refused, by many at once.
            let submitters: Vec<_> = (0..4u8)
                .map(|number| {
                    scope.spawn(move || {
                        let mut record = vec![0; 20_000];
                        for i in 0u64.. {
                            blake3::Hasher::new_derive_key("records of a test")
                                .update(&i.to_le_bytes())
                                .update(&[number])
                                .finalize_xof()
                                .fill(&mut record);
                            match n.append(&record) {
                                Ok(_) => {}
                                Err(AppendError::Capacity) => break,
                                Err(other) => panic!("{other}"),
                            }
                        }
                    })
                })
                .collect();
            for thread in submitters {
                thread.join().unwrap();
            }
            custodian.join().unwrap();
            reports.join().unwrap();
            // What is left, by writes of the reserve.
            for length in [200_000, 30_000, 2_000] {
                for i in 0u32.. {
                    let rel = format!("state/rest-{length}-{i}");
                    let bytes = vec![7; length];
                    if n.root.write_atomic(&rel, &bytes, Charge::Reserve).is_err() {
                        break;
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(50));
            drop(stopping);
            poll.join().unwrap()
        });
        let used = du(&root_path);
        let usage = n.root.ledger().usage();
        assert!(peak <= ceiling, "{peak} of {ceiling}: {usage:?}");
        assert!(used <= ceiling && used * 100 >= ceiling * 95, "{usage:?}");
        assert!(usage.custody_bytes * 100 >= custody * 95, "{usage:?}");
        n.assert_ledger();
        n.log.close();
        println!(
            "ceiling {ceiling}: peak {peak}, at the end {used}, {:.2} % used",
            used as f64 / ceiling as f64 * 100.0
        );
    }
}

#[test]
fn inv_01_unsafe_roots_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| Root::open(Arc::new(RealDisk::new()), path, options()).map(|_| ());
    let root = dir.path().join("root");
    assert_eq!(open(&root), Ok(()));
    // Held by another.
    let held = Root::open(Arc::new(RealDisk::new()), &root, options()).unwrap();
    assert_eq!(open(&root), Err(RootError::InUse { path: root.clone() }));
    drop(held);
    assert_eq!(open(&root), Ok(()));
    // Writable by others.
    for mode in [0o770, 0o707, 0o777] {
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(mode)).unwrap();
        let refused = open(&root);
        let expected = matches!(refused, Err(RootError::Unsafe { .. }));
        assert_eq!(expected, mode & 0o022 != 0, "{mode:o} {refused:?}");
    }
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(open(&root), Ok(()));
    // A link in place of the root, a file, a missing parent.
    let link = dir.path().join("link");
    symlink(&root, &link).unwrap();
    assert!(matches!(open(&link), Err(RootError::Unsafe { .. })));
    let file = dir.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    assert!(matches!(open(&file), Err(RootError::Unsafe { .. })));
    assert!(matches!(
        open(&dir.path().join("none/root")),
        Err(RootError::Disk(_))
    ));
}

#[test]
fn inv_01_a_link_inside_the_root_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), b"secret").unwrap();
    let root = Root::open(
        Arc::new(RealDisk::new()),
        &dir.path().join("root"),
        options(),
    )
    .unwrap();
    root.write_atomic("state/real", b"fine", Charge::Normal)
        .unwrap();
    symlink(outside.join("secret"), root.path().join("state/link")).unwrap();
    symlink(&outside, root.path().join("linked")).unwrap();
    assert_eq!(
        root.read("state/real").unwrap().as_deref(),
        Some(&b"fine"[..])
    );
    assert!(matches!(root.read("state/link"), Err(RootError::Disk(_))));
    assert!(matches!(
        root.read("linked/secret"),
        Err(RootError::Disk(_))
    ));
    assert!(
        root.write_atomic("linked/new", b"x", Charge::Normal)
            .is_err()
    );
    assert!(!outside.join("new").exists());
    // Replacing the link itself is not following it.
    root.write_atomic("state/link", b"mine", Charge::Normal)
        .unwrap();
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[test]
fn a_loose_log_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path(), 64 * MIB);
    drop(settings.open(Arc::new(RealDisk::new())).unwrap());
    let key = dir.path().join("root/keys/log.pk8");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let refused = settings.open(Arc::new(RealDisk::new()));
    assert!(matches!(refused, Err(LogError::KeyMode(0o640))));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(settings.open(Arc::new(RealDisk::new())).is_ok());
}

#[test]
fn many_submitters_share_few_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        segment_bytes: 4 * MIB,
        ..settings(dir.path(), 64 * MIB)
    };
    let n = settings.open(Arc::new(RealDisk::new())).unwrap();
    let before = n.log.stat();
    std::thread::scope(|scope| {
        for thread in 0..32 {
            let n = &n;
            scope.spawn(move || {
                for i in 0..100 {
                    n.log
                        .append_wait(
                            RecordClass::Decision,
                            format!("{thread} {i}").into_bytes(),
                            LONG,
                        )
                        .unwrap();
                }
            });
        }
    });
    let after = n.log.stat();
    let (records, batches) = (
        after.records - before.records,
        after.batches - before.batches,
    );
    assert_eq!(records, 3200);
    assert!(
        batches * 2 < records,
        "{batches} batches for {records} records"
    );
}

#[test]
fn disk_errors_name_the_thing() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::new();
    let path = dir.path().canonicalize().unwrap().join("none");
    let error = tidelock_segments::Disk::stat(&disk, &path).unwrap_err();
    assert_eq!(error.fault, DiskFault::NotFound);
    assert_eq!(
        error.to_string(),
        format!("cannot stat {}: no such file or directory", path.display())
    );
}
