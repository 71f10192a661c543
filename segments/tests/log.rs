//! The audit log on the simulated disk: appending, sealing, recovering, licences, latch, capacity.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use common::{KIB, LONG, MIB, Node, ROOT, Settings, domain, foreign_segments, node, receipt};
use tidelock_segments::testing::{SimDisk, Survival, unchecked_endorsement};
use tidelock_segments::{
    AppendError, AuditFault, Checkpoint, CustodyReceipt, DiskFault, Ladder, LogError, RecordClass,
    StoreError, merkle, origin_line, read_records, verify_log,
};

fn active_file(disk: &SimDisk) -> std::path::PathBuf {
    disk.files()
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "log"))
        .unwrap()
}

fn verify(disk: &SimDisk) -> tidelock_segments::AuditReport {
    verify_log(disk, Path::new(ROOT), &domain()).unwrap()
}

#[test]
fn records_come_back_with_their_leaf_and_a_signed_head() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let first = n.append(b"one").unwrap();
    let second = n.append(b"two").unwrap();
    assert_eq!(second.index, first.index + 1);
    assert_eq!(second.leaf, merkle::leaf_hash(b"two"));
    let line = origin_line(&domain(), &n.log.origin()).unwrap();
    let head = Checkpoint::verify(&n.log.checkpoint(), &line, &n.log.public_key()).unwrap();
    let leaves: Vec<_> = n
        .records()
        .iter()
        .map(|(_, r)| merkle::leaf_hash(r))
        .collect();
    assert_eq!(
        (head.size, head.root),
        (n.log.size(), merkle::root(&leaves))
    );
    n.assert_ledger();
    assert!(verify(&disk).ok);
}

#[test]
fn a_record_must_have_1_to_65535_bytes() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    assert_eq!(n.append(b""), Err(AppendError::TooLarge));
    assert_eq!(n.append(&vec![b'x'; 65_536]), Err(AppendError::TooLarge));
    assert!(n.append(&vec![b'x'; 65_535]).is_ok());
    assert!(
        n.append(&vec![b'y'; 65_535]).is_ok(),
        "it has a file of its own"
    );
}

#[test]
fn group_commit_shares_syncs() {
    let disk = SimDisk::new();
    let n = Settings {
        segment_bytes: 4 * MIB,
        ..Settings::default()
    }
    .sim(&disk);
    let before = disk.syncs();
    let (sender, receiver) = mpsc::channel();
    let submit = |log: &tidelock_segments::AuditLog, i: usize| {
        let sender = sender.clone();
        let done = move |result| sender.send(result).unwrap();
        log.submit(
            RecordClass::Decision,
            format!("record {i}").into_bytes(),
            Box::new(done),
        );
    };
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (log, submit) = (&n.log, &submit);
            scope.spawn(move || (0..250).for_each(|i| submit(log, thread * 250 + i)));
        }
    });
    let mut indexes: Vec<u64> = (0..2000)
        .map(|_| receiver.recv_timeout(LONG).unwrap().unwrap().index)
        .collect();
    indexes.sort_unstable();
    let first = indexes[0];
    assert!(
        indexes
            .iter()
            .enumerate()
            .all(|(i, index)| *index == first + i as u64)
    );
    let syncs = disk.syncs() - before;
    assert!(syncs < 1000, "{syncs} syncs for 2000 records");
    assert_eq!(n.log.stat().records, first + 2000);
}

#[test]
fn one_append_is_one_write_and_one_sync() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    n.append(b"warm").unwrap();
    let (calls, syncs) = (disk.calls(), disk.syncs());
    for i in 0..10 {
        n.append(format!("record {i}").as_bytes()).unwrap();
    }
    assert_eq!((disk.calls() - calls, disk.syncs() - syncs), (20, 10));
}

#[test]
fn sealing_by_size_links_segments_and_keeps_every_record() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let sealed = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&sealed);
    n.log.on_seal(Box::new(move |reference| {
        seen.lock().unwrap().push(reference)
    }));
    let record = vec![b'r'; 10_000];
    for _ in 0..60 {
        n.append(&record).unwrap();
    }
    n.wait_sealed();
    // The callback comes after the segment.
    while (sealed.lock().unwrap().len() as u64) < n.log.stat().next_sequence {
        std::thread::yield_now();
    }
    let sealed = sealed.lock().unwrap().clone();
    assert!(sealed.len() >= 4, "{}", sealed.len());
    for (i, pair) in sealed.windows(2).enumerate() {
        assert_eq!(pair[1].prev, Some(pair[0].id));
        assert_eq!(pair[1].sequence, i as u64 + 1);
    }
    let mut next = 0;
    for reference in &sealed {
        let segment = n.store.get(&reference.id).unwrap();
        for (index, _) in read_records(&segment).unwrap() {
            assert_eq!(index, next);
            next += 1;
        }
    }
    assert_eq!(n.log.stat().sealed_records, next);
    assert_eq!(n.records().len() as u64, n.log.size());
    // The helper that prepares the next file has ended then.
    n.log.close();
    n.assert_ledger();
    let report = verify(&disk);
    assert!(report.ok, "{report:?}");
    assert_eq!(report.origins[0].records, n.log.size());
    assert_eq!(report.origins[0].root, n.log.stat().root);
}

#[test]
fn sealing_by_age() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    let start = settings.clock.load(Ordering::SeqCst);
    n.log.tick(start + 59_999);
    assert_eq!(n.log.stat().next_sequence, 0);
    n.log.tick(start + 60_000);
    assert_eq!(n.log.stat().next_sequence, 1);
    // The clock steps back: nothing is sealed early, nothing breaks.
    n.append(b"two").unwrap();
    n.log.tick(5);
    assert_eq!(n.log.stat().next_sequence, 1);
}

#[test]
fn a_restart_goes_on_where_it_ended() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let (origin, before) = {
        let n = settings.sim(&disk);
        for i in 0..5 {
            n.append(format!("record {i}").as_bytes()).unwrap();
        }
        n.log.seal_now().unwrap().unwrap();
        n.append(b"after the seal").unwrap();
        (n.log.origin(), n.records())
    };
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None);
    assert_eq!(n.recovery.truncated_bytes, 0);
    assert_eq!(n.log.origin(), origin);
    assert_eq!(n.records(), before);
    assert_eq!(n.append(b"next").unwrap().index, before.len() as u64);
    n.assert_ledger();
    assert!(verify(&disk).ok);
}

#[test]
fn inv_16_log_sizes_only_move_forward_across_restarts() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let mut highest = 0;
    let mut sequence = 0;
    for round in 0..6u64 {
        let n = settings.sim(&disk);
        assert!(n.log.size() >= highest, "round {round}");
        assert!(n.log.stat().next_sequence >= sequence);
        n.append(b"record").unwrap();
        if round % 2 == 0 {
            n.log.seal_now().unwrap().unwrap();
        }
        if round % 3 == 0 {
            let leaked: Vec<_> = vec![n.log.size(), n.log.stat().next_sequence];
            (highest, sequence) = (leaked[0], leaked[1]);
            drop(n);
            disk.crash(Survival::None);
        } else {
            highest = n.log.size();
            sequence = n.log.stat().next_sequence;
        }
    }
    // An older copy of the active file put in place is no continuation: a new incarnation begins
    // and the file is kept as evidence.
    let n = settings.sim(&disk);
    n.append(b"x").unwrap();
    drop(n);
    let path = active_file(&disk);
    let old = disk.content(&path).unwrap();
    let n = settings.sim(&disk);
    let origin = n.log.origin();
    n.log.seal_now().unwrap().unwrap();
    n.append(b"y").unwrap();
    drop(n);
    let newer = active_file(&disk);
    disk.plant(&newer, &old);
    let n = settings.sim(&disk);
    assert!(n.recovery.new_incarnation.is_some());
    assert_ne!(n.log.origin(), origin);
    assert_eq!(n.recovery.quarantined.len(), 1);
}

#[test]
fn a_torn_tail_is_cut_and_recorded() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"acknowledged").unwrap();
    let before = n.records();
    // The power goes during the write of a large record; half of its sectors survive.
    disk.crash_at_call(disk.calls() + 1);
    assert!(matches!(
        n.append(&vec![b'z'; 20_000]),
        Err(AppendError::Unavailable(_))
    ));
    drop(n);
    disk.crash(Survival::Seed(7));
    let n = settings.sim(&disk);
    assert!(n.recovery.truncated_bytes > 0);
    assert_eq!(n.recovery.truncated_records_estimate, 1);
    assert_eq!(n.recovery.new_incarnation, None);
    let after = n.records();
    assert_eq!(after[..before.len()], before[..]);
    let event: serde_json::Value = serde_json::from_slice(&after[before.len()].1).unwrap();
    assert_eq!(event["type"], "recovered");
    assert_eq!(event["truncated_bytes"], n.recovery.truncated_bytes);
    n.append(b"on we go").unwrap();
    n.assert_ledger();
    assert!(verify(&disk).ok);
}

#[test]
fn damage_below_a_mark_is_no_torn_tail() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    for i in 0..4 {
        n.append(format!("record {i}").as_bytes()).unwrap();
    }
    let (origin, size, root) = (n.log.origin(), n.log.size(), n.log.stat().root);
    drop(n);
    let path = active_file(&disk);
    let at = disk
        .content(&path)
        .unwrap()
        .windows(8)
        .position(|w| w == b"record 1")
        .unwrap();
    disk.flip(&path, at, 1);
    let report = verify(&disk);
    assert!(!report.ok);
    assert!(
        report
            .origins
            .iter()
            .any(|o| matches!(o.faults[..], [AuditFault::Active { .. }])),
        "{report:?}"
    );
    let n = settings.sim(&disk);
    assert!(n.recovery.new_incarnation.is_some(), "{:?}", n.recovery);
    assert_eq!(n.recovery.quarantined, ["quarantine/log-1-0.log"]);
    assert_ne!(n.log.origin(), origin);
    let first: serde_json::Value = serde_json::from_slice(&n.records()[0].1).unwrap();
    assert_eq!(first["type"], "incarnation");
    assert_eq!(first["previous_origin"], origin.as_str());
    // Ruling 7: the highest head of the log before is named, as far as the marks still tell of it.
    let head = &first["previous_head"];
    assert_eq!(head["origin"], origin.as_str());
    assert_eq!(
        (head["size"].as_u64(), head["root"].as_str()),
        (Some(size), Some(root.to_string().as_str()))
    );
    // Nothing was deleted.
    assert!(
        disk.content(&Path::new(ROOT).join("quarantine/log-1-0.log"))
            .is_some()
    );
    assert!(size > 0);
    assert!(verify(&disk).ok);
    n.assert_ledger();
}

#[test]
fn a_shortened_active_file_is_damage() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    drop(n);
    let path = active_file(&disk);
    let bytes = disk.content(&path).unwrap();
    disk.plant(&path, &bytes[..bytes.len() - 4096]);
    assert!(settings.sim(&disk).recovery.new_incarnation.is_some());
}

#[test]
fn a_copied_root_opens_a_new_incarnation_and_the_original_does_not() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    n.log.seal_now().unwrap().unwrap();
    n.append(b"two").unwrap();
    let origin = n.log.origin();
    drop(n);
    disk.copy_tree(Path::new(ROOT), Path::new("/sim/copy"));
    let copy = Settings {
        path: "/sim/copy",
        ..settings.clone()
    }
    .sim(&disk);
    assert_eq!(copy.log.incarnation(), 2);
    assert_ne!(copy.log.origin(), origin);
    assert!(copy.recovery.new_incarnation.is_some());
    // Positive control: a reboot of the original is no copy.
    disk.crash(Survival::All);
    let n = settings.sim(&disk);
    assert_eq!(n.log.origin(), origin);
    assert_eq!(n.recovery.new_incarnation, None);
}

#[test]
fn a_failed_sync_latches_until_reopened_and_loses_nothing() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"acknowledged").unwrap();
    // The second call of a commit is its sync.
    disk.fail_call(disk.calls() + 2, DiskFault::Os(5));
    assert!(matches!(
        n.append(b"lost"),
        Err(AppendError::Unavailable(_))
    ));
    assert!(n.log.latched().is_some());
    // The disk is sound again, yet nothing is written: the cache may lie.
    let calls = disk.calls();
    assert!(matches!(
        n.append(b"refused"),
        Err(AppendError::Unavailable(_))
    ));
    assert_eq!(disk.calls(), calls);
    assert!(matches!(n.log.seal_now(), Err(LogError::Latched(_))));
    n.log.reopen().unwrap();
    assert_eq!(n.log.latched(), None);
    n.append(b"again").unwrap();
    let texts: Vec<_> = n
        .records()
        .iter()
        .map(|(_, r)| String::from_utf8_lossy(r).into_owned())
        .collect();
    assert!(texts.iter().any(|t| t == "acknowledged"));
    assert!(!texts.iter().any(|t| t == "lost" || t == "refused"));
    assert!(texts.iter().any(|t| t.contains("\"type\":\"reopened\"")));
    n.assert_ledger();
    let before = n.records();
    drop(n);
    disk.crash(Survival::None);
    assert!(verify(&disk).ok);
    assert_eq!(settings.sim(&disk).records(), before);
}

#[test]
fn a_killed_process_after_a_failed_sync_does_not_trust_the_cache() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    n.append(b"acknowledged").unwrap();
    disk.fail_call(disk.calls() + 2, DiskFault::Os(5));
    assert!(n.append(b"in the cache only").is_err());
    drop(n);
    disk.kill();
    // The next process sees the record in the cache and goes on after it ...
    let n = settings.sim(&disk);
    n.append(b"next").unwrap();
    let seen = n.records();
    drop(n);
    // ... so it must be on the device by the time anything after it is acknowledged.
    disk.crash(Survival::None);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None, "{:?}", n.recovery);
    assert_eq!(n.records(), seen);
}

#[test]
fn a_removed_active_file_is_noticed() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    n.append(b"one").unwrap();
    n.log.tick(0);
    assert_eq!(n.log.latched(), None);
    tidelock_segments::Disk::remove(&disk, &active_file(&disk)).unwrap();
    n.log.tick(0);
    assert!(n.log.latched().is_some());
    n.log.reopen().unwrap();
    n.append(b"two").unwrap();
    assert!(n.records().iter().any(|(_, r)| r == b"one"));
}

/// Fills the log until an append is refused.
fn fill(n: &Node) -> usize {
    let record = vec![b'f'; 8000];
    for count in 0..100_000 {
        match n.append(&record) {
            Ok(_) => {}
            Err(AppendError::Capacity) => return count,
            Err(other) => panic!("{other:?}"),
        }
    }
    panic!("the log never filled");
}

fn small() -> Settings {
    Settings {
        ceiling: 8 * MIB,
        reserve: 2 * MIB,
        custody: 2,
        ..Settings::default()
    }
}

#[test]
fn inv_04_capacity_refuses_decisions_and_licences_bring_them_back() {
    let disk = SimDisk::new();
    let n = small().sim(&disk);
    let filled = fill(&n);
    assert!(filled > 100, "{filled}");
    assert!(n.log.stat().at_capacity);
    assert!(n.root.ledger().ladder() >= Ladder::Reclaim);
    // A denial is refused too, a state record dips into the reserve.
    let denied = n
        .log
        .append_wait(RecordClass::Denial, b"denied".to_vec(), LONG);
    assert_eq!(denied, Err(AppendError::Capacity));
    n.state(b"{\"type\":\"state\"}").unwrap();
    n.assert_ledger();
    assert!(
        disk.peak_allocated() <= 8 * MIB,
        "{}",
        disk.peak_allocated()
    );

    // One custodian is not enough, the same twice neither, the node itself never.
    let own = n.store.own_audit(&node("n1"));
    for reference in &own {
        n.licensed_by(reference, &["n2"]);
        n.licensed_by(reference, &["n2"]);
        assert!(!n.log.is_licensed(&reference.id, u64::MAX));
    }
    assert_eq!(n.append(b"still full"), Err(AppendError::Capacity));
    assert_eq!(n.store.own_audit(&node("n1")).len(), own.len());

    // A second distinct custodian: evicted oldest first, and decisions go on without a restart.
    for reference in own.iter().take(own.len() / 2) {
        if n.store.contains(&reference.id) {
            n.licensed_by(reference, &["n3"]);
        }
    }
    n.append(b"room again").unwrap();
    let left = n.store.own_audit(&node("n1"));
    assert!(left.len() < own.len());
    assert!(!n.store.contains(&own[0].id));
    assert!(n.log.stat().min_index > 0);
    let texts: Vec<_> = n
        .records()
        .iter()
        .map(|(_, r)| String::from_utf8_lossy(r).into_owned())
        .collect();
    let summary: serde_json::Value = texts
        .iter()
        .find(|t| t.contains("refused_at_capacity"))
        .map(|t| serde_json::from_str(t).unwrap())
        .unwrap();
    // The append that filled it and "still full"; the denial.
    assert_eq!(
        (summary["decisions"].as_u64(), summary["denials"].as_u64()),
        (Some(2), Some(1))
    );
    assert!(texts.iter().any(|t| t.contains("\"type\":\"evicted\"")));
    n.assert_ledger();
    assert!(
        disk.peak_allocated() <= 8 * MIB,
        "{}",
        disk.peak_allocated()
    );
    let report = verify(&disk);
    assert!(report.ok, "{report:?}");
    assert!(report.origins[0].evicted_below > 0);
}

#[test]
fn inv_04_the_ceiling_is_well_used_and_never_exceeded() {
    let disk = SimDisk::new();
    let settings = Settings {
        ceiling: 16 * MIB,
        reserve: MIB,
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    n.root.ledger().set_custody_max(0);
    fill(&n);
    for i in 0..2000 {
        if n.state(format!("{{\"i\":{i},\"pad\":\"{}\"}}", "p".repeat(4000)).as_bytes())
            .is_err()
        {
            break;
        }
    }
    n.assert_ledger();
    let peak = disk.peak_allocated();
    assert!(peak <= 16 * MIB, "{peak}");
    assert!(peak >= 16 * MIB * 90 / 100, "{peak}");
    drop(n);
    // A restart at the ceiling works and does not exceed it.
    let n = settings.sim(&disk);
    n.root.ledger().set_custody_max(0);
    assert_eq!(n.append(b"full"), Err(AppendError::Capacity));
    assert!(disk.peak_allocated() <= 16 * MIB);
    // More room is used at once.
    n.root.ledger().set_ceiling(32 * MIB);
    n.append(b"room").unwrap();
}

#[test]
fn inv_04_starting_above_the_ceiling_is_sealed_and_never_grows() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    for _ in 0..400 {
        n.append(&vec![b'a'; 8000]).unwrap();
    }
    n.log.seal_now().unwrap();
    drop(n);
    let before = disk.allocated();
    let tight = Settings {
        ceiling: 2 * MIB,
        reserve: MIB,
        ..settings
    };
    assert!(before > tight.ceiling);
    let n = tight.sim(&disk);
    assert_eq!(n.root.ledger().ladder(), Ladder::Sealed);
    assert_eq!(n.append(b"no"), Err(AppendError::Capacity));
    assert_eq!(n.state(b"no"), Err(AppendError::Capacity));
    assert!(disk.allocated() <= before);
    // Licences shrink it until it works again, though the receipts themselves find no room at first.
    let own = n.store.own_audit(&node("n1"));
    let segment = n.store.get(&own[0].id).unwrap();
    assert!(matches!(
        n.log.take_receipt(&receipt(&segment, "n2")),
        Err(LogError::Store(StoreError::Ceiling(_)))
    ));
    n.root.ledger().set_ceiling(64 * MIB);
    n.append(b"yes").unwrap();
}

#[test]
fn unlicensed_audit_is_never_evicted() {
    let disk = SimDisk::new();
    let settings = Settings {
        custody: 0,
        ..small()
    };
    let n = settings.sim(&disk);
    fill(&n);
    let own = n.store.own_audit(&node("n1"));
    // With no custody required nothing is licensed, whatever receipts there are.
    for reference in &own {
        n.licensed_by(reference, &["n2", "n3"]);
    }
    n.log.tick(u64::MAX);
    assert_eq!(n.append(b"x"), Err(AppendError::Capacity));
    assert_eq!(n.store.own_audit(&node("n1")), own);
}

#[test]
fn retention_holds_back_what_is_licensed() {
    let disk = SimDisk::new();
    let settings = Settings {
        retention_ms: 1000,
        custody: 1,
        ..small()
    };
    let n = settings.sim(&disk);
    fill(&n);
    let own = n.store.own_audit(&node("n1"));
    let start = settings.clock.load(Ordering::SeqCst);
    for reference in &own {
        n.licensed_by(reference, &["n2"]);
    }
    assert_eq!(n.append(b"x"), Err(AppendError::Capacity));
    assert!(!n.log.is_licensed(&own[0].id, start + 999));
    settings.clock.store(start + 1000, Ordering::SeqCst);
    n.log.tick(start + 1000);
    n.append(b"x").unwrap();
    assert!(!n.store.contains(&own[0].id));
}

#[test]
fn a_condemned_custodians_receipts_stop_counting() {
    let disk = SimDisk::new();
    let n = small().sim(&disk);
    n.append(b"one").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    n.licensed_by(&sealed, &["n2", "n3"]);
    assert!(n.log.is_licensed(&sealed.id, u64::MAX));
    let removed = n
        .store
        .remove_receipts_by(&|r| r.custodian.as_str() == "n3")
        .unwrap();
    assert_eq!(removed, 1);
    assert!(!n.log.is_licensed(&sealed.id, u64::MAX));
    assert_eq!(n.store.receipts(&sealed.id).len(), 1);
    n.assert_ledger();
}

#[test]
fn a_reading_error_keeps_no_other_receipt_of_a_condemned_custodian_and_hides_none() {
    // What is told, what is licensed then, and how many reading calls it took.
    let condemn = |fault: Option<u64>| {
        let disk = SimDisk::new();
        let n = small().sim(&disk);
        let mut sealed = Vec::new();
        for record in [b"one", b"two", b"six"] {
            n.append(record).unwrap();
            sealed.push(n.log.seal_now().unwrap().unwrap().id);
        }
        for id in &sealed {
            n.licensed_by(&n.store.reference(id).unwrap(), &["n2", "n3"]);
        }
        let licensed = || {
            let ids = sealed.iter();
            ids.filter(|id| n.log.is_licensed(id, u64::MAX)).count()
        };
        assert_eq!(licensed(), 3);
        let before = disk.readings();
        if let Some(after) = fault {
            disk.fail_reading(before + after, DiskFault::Os(5));
        }
        let revoked = |r: &CustodyReceipt| r.custodian.as_str() == "n3";
        let told = n.store.remove_receipts_by(&revoked);
        let (readings, left) = (disk.readings() - before, licensed());
        if n.store.latched().is_some() {
            // Nothing is evicted either until the disk is sound.
            let evicted = n.store.remove(&sealed[0]);
            assert!(matches!(evicted, Err(StoreError::Latched(_))));
            return (told, 0, readings);
        }
        n.store.remove_receipts_by(&revoked).unwrap();
        assert_eq!(licensed(), 0, "the next time all of them go");
        n.assert_ledger();
        (told, left, readings)
    };
    let (told, left, readings) = condemn(None);
    assert_eq!((told, left), (Ok(3), 0), "the control");
    let mut failed = 0;
    for after in 1..=readings {
        match condemn(Some(after)) {
            (Ok(count), left, _) => assert_eq!((count, left), (3, 0), "reading {after}"),
            (Err(_), left, _) => {
                assert!(left <= 1, "reading {after}: {left} are licensed still");
                failed += 1;
            }
        }
    }
    assert!(failed >= 3, "the file of each: {failed}");
}

#[test]
fn receipts_survive_a_restart_and_do_not_move_between_segments() {
    let disk = SimDisk::new();
    let settings = small();
    let n = settings.sim(&disk);
    let seal = |text: &[u8]| {
        n.append(text).unwrap();
        n.log.seal_now().unwrap().unwrap()
    };
    let (one, two) = (seal(b"one"), seal(b"two"));
    n.licensed_by(&one, &["n2", "n3"]);
    let mut moved = receipt(&n.store.get(&one.id).unwrap(), "n4");
    moved.segment_id = two.id;
    assert!(matches!(
        n.store.put_receipt(&moved),
        Err(StoreError::Receipt(_))
    ));
    // Signed for the right id but another range: caught as well.
    let mut other = receipt(&n.store.get(&two.id).unwrap(), "n4");
    other.first = 0;
    other.signature = common::key_of("n4").sign(&other.message());
    assert_eq!(
        n.store.put_receipt(&other),
        Err(StoreError::ReceiptMismatch(two.id))
    );
    // A file moved by a foreign hand from one segment's name to the other's does not count.
    n.licensed_by(&two, &["n2"]);
    let path = |id: &tidelock_segments::SegmentId| {
        Path::new(ROOT).join(format!("receipts/{}.rcpts", id.hex()))
    };
    let bytes = disk.content(&path(&one.id)).unwrap();
    disk.plant(&path(&two.id), &bytes);
    drop(n);
    let n = settings.sim(&disk);
    assert!(n.log.is_licensed(&one.id, u64::MAX));
    assert!(!n.log.is_licensed(&two.id, u64::MAX));
}

#[test]
fn an_evicted_segment_that_a_crash_brought_back_is_removed_again() {
    let disk = SimDisk::new();
    let settings = small();
    let n = settings.sim(&disk);
    fill(&n);
    let own = n.store.own_audit(&node("n1"));
    let path = Path::new(ROOT).join(format!("segments/audit/{}.seg", own[0].id.hex()));
    let bytes = disk.content(&path).unwrap();
    for reference in own.iter().take(3) {
        if n.store.contains(&reference.id) {
            n.licensed_by(reference, &["n2", "n3"]);
        }
    }
    assert!(!n.store.contains(&own[0].id));
    drop(n);
    disk.plant(&path, &bytes);
    let n = settings.sim(&disk);
    assert!(!n.store.contains(&own[0].id));
    assert_eq!(disk.content(&path), None);
    assert!(verify(&disk).ok);
}

#[test]
fn a_full_file_system_is_told_apart_from_the_ceiling() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    n.append(b"one").unwrap();
    disk.set_capacity(disk.allocated());
    n.log.seal_now().unwrap_err();
    // Nothing unknown happened on the device, so nothing is latched.
    assert_eq!(n.log.latched(), None);
    disk.set_capacity(64 * MIB);
    n.append(b"two").unwrap();
    n.log.seal_now().unwrap().unwrap();
    n.assert_ledger();
}

#[test]
fn the_endorsement_may_be_renewed_for_the_same_key_only() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let key = n.log.public_key();
    let mut renewed = unchecked_endorsement(&node("n1"), &key, 1);
    renewed.signature = b"newer".to_vec();
    n.log.set_endorsement(renewed.clone()).unwrap();
    assert_eq!(n.log.endorsement(), renewed);
    let other = unchecked_endorsement(&node("n1"), &key, 2);
    assert_eq!(n.log.set_endorsement(other), Err(LogError::Endorsement));
    n.append(b"one").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    assert_eq!(
        n.store.get(&sealed.id).unwrap().endorsement(),
        Some(&renewed)
    );
}

#[test]
fn a_receipt_is_given_for_foreign_audit_only() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let foreign = foreign_segments("n9", 1).remove(0);
    n.store
        .put(&foreign, tidelock_segments::Charge::Normal)
        .unwrap();
    let given = n.log.issue_receipt(&foreign.id()).unwrap();
    assert_eq!(given.verify_signature(), Ok(()));
    assert_eq!(given.custodian, node("n1"));
    let again = CustodyReceipt::decode(&given.encode().unwrap()).unwrap();
    assert_eq!(again, given);
    n.append(b"own").unwrap();
    let own = n.log.seal_now().unwrap().unwrap();
    assert!(matches!(
        n.log.issue_receipt(&own.id),
        Err(LogError::Receipt(tidelock_segments::ReceiptError::OwnLog))
    ));
}

#[test]
fn inv_07_the_queue_is_bounded() {
    let disk = SimDisk::new();
    let n = Settings {
        segment_bytes: 4 * MIB,
        ..Settings::default()
    }
    .sim(&disk);
    let (hold, held) = mpsc::channel::<()>();
    // The first callback holds the log's thread, so that the rest has to wait.
    n.log.submit(
        RecordClass::Decision,
        b"first".to_vec(),
        Box::new(move |_| {
            let _ = held.recv_timeout(LONG);
        }),
    );
    let refused = Arc::new(AtomicUsize::new(0));
    let settled = Arc::new(AtomicUsize::new(0));
    let record = vec![b'q'; 60_000];
    for _ in 0..1000 {
        let (refused, settled) = (Arc::clone(&refused), Arc::clone(&settled));
        let done = move |result| {
            if result == Err(AppendError::QueueFull) {
                refused.fetch_add(1, Ordering::SeqCst);
            }
            settled.fetch_add(1, Ordering::SeqCst);
        };
        n.log
            .submit(RecordClass::Decision, record.clone(), Box::new(done));
    }
    assert!(refused.load(Ordering::SeqCst) > 400);
    hold.send(()).unwrap();
    n.log.close();
    assert_eq!(settled.load(Ordering::SeqCst), 1000);
    assert!(matches!(
        n.append(b"closed"),
        Err(AppendError::Unavailable(_))
    ));
}

#[test]
fn a_panicking_callback_does_not_stop_the_log() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    n.log.submit(
        RecordClass::Decision,
        b"one".to_vec(),
        Box::new(|_| panic!("on purpose")),
    );
    n.append(b"two").unwrap();
}

#[test]
fn configuration_is_checked() {
    let disk = SimDisk::new();
    for bytes in [0, 64 * KIB, 64 * MIB] {
        let settings = Settings {
            segment_bytes: bytes,
            ..Settings::default()
        };
        assert!(
            matches!(settings.open(disk.disk()), Err(LogError::Config(_))),
            "{bytes}"
        );
    }
    assert!(Settings::default().open(disk.disk()).is_ok());
}

#[test]
fn tail_reaches_into_sealed_segments() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    for i in 0..10u32 {
        n.append(&i.to_le_bytes()).unwrap();
        if i % 3 == 0 {
            n.log.seal_now().unwrap();
        }
    }
    let all = n.records();
    assert_eq!(all.len() as u64, n.log.size());
    for count in 0..all.len() {
        assert_eq!(n.log.tail(count).unwrap(), all[all.len() - count..]);
        // Whoever has enough before is shown no more.
        let mut shown = Vec::new();
        let enough = |index, record| {
            shown.push((index, record));
            match shown.len() < count {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        };
        n.log.newest_first(usize::MAX, &mut { enough }).unwrap();
        shown.reverse();
        assert_eq!(shown, all[all.len() - count.max(1)..]);
    }
}

/// The JSON records of one type.
fn events(n: &Node, wanted: &str) -> Vec<serde_json::Value> {
    n.records()
        .iter()
        .filter_map(|(_, record)| serde_json::from_slice::<serde_json::Value>(record).ok())
        .filter(|event| event["type"] == wanted)
        .collect()
}

#[test]
fn writers_of_all_kinds_share_a_log_while_files_are_sealed() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    let before = n.log.size();
    let indexes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..12u32 {
            let (log, indexes) = (&n.log, &indexes);
            scope.spawn(move || {
                for i in 0..60u32 {
                    let record = vec![b'a' + u8::try_from(thread).unwrap(); 3000 + i as usize];
                    let appended = match thread % 3 {
                        0 => log.append_wait(RecordClass::Decision, record.clone(), LONG),
                        1 => log.append(RecordClass::Decision, record.clone()),
                        _ => {
                            let (sender, receiver) = mpsc::channel();
                            let done = move |result| sender.send(result).unwrap();
                            log.submit(RecordClass::Decision, record.clone(), Box::new(done));
                            receiver.recv_timeout(LONG).unwrap()
                        }
                    }
                    .unwrap();
                    assert_eq!(appended.leaf, merkle::leaf_hash(&record));
                    indexes.lock().unwrap().push((appended.index, record));
                }
            });
        }
    });
    let mut indexes = indexes.into_inner().unwrap();
    indexes.sort();
    assert_eq!(indexes.len(), 720);
    let held = n.records();
    for (at, (index, record)) in (before..).zip(&indexes) {
        assert_eq!(*index, at);
        assert_eq!(held[usize::try_from(at).unwrap()], (at, record.clone()));
    }
    let stat = n.log.stat();
    assert!(stat.next_sequence > 5, "{stat:?}");
    assert!(stat.unsealed_files <= tidelock_segments::limits::MAX_UNSEALED_FILES);
    n.log.close();
    n.assert_ledger();
    assert!(verify(&disk).ok);
    drop(n);
    assert_eq!(settings.sim(&disk).records(), held);
}

#[test]
fn inv_07_unsealed_files_are_bounded_and_survive_a_crash_in_order() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    let (hold, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    // The first seal holds the sealing thread, so that the rest has to wait.
    n.log.on_seal(Box::new(move |_| {
        let _ = held.lock().unwrap().recv_timeout(LONG);
    }));
    let record = |i: usize| format!("{i:06}").into_bytes().repeat(1000);
    let mut acknowledged = Vec::new();
    let timeout = std::time::Duration::from_millis(250);
    let refused = loop {
        let bytes = record(acknowledged.len());
        let start = std::time::Instant::now();
        match n.log.append_wait(RecordClass::Decision, bytes, timeout) {
            Ok(appended) => acknowledged.push(appended.index),
            Err(error) => {
                assert!(start.elapsed() < 40 * timeout);
                break error;
            }
        }
        assert!(acknowledged.len() < 1000);
    };
    assert!(matches!(refused, AppendError::Unavailable(_)), "{refused}");
    assert_eq!(
        n.log.stat().unsealed_files,
        tidelock_segments::limits::MAX_UNSEALED_FILES - 1,
        "full ones; there is no active file"
    );
    let unsealed = n.log.stat().records - n.log.stat().sealed_records;
    assert!(unsealed > 50, "{unsealed}");
    // The power goes.
    disk.crash_at_call(disk.calls() + 1);
    drop(hold);
    drop(n);
    disk.crash(Survival::None);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None, "{:?}", n.recovery);
    let records = n.records();
    for (i, index) in acknowledged.iter().enumerate() {
        assert_eq!(records[usize::try_from(*index).unwrap()].1, record(i));
    }
    n.append(b"on we go").unwrap();
    n.wait_sealed();
    n.log.close();
    n.assert_ledger();
    assert!(verify(&disk).ok);
}

#[test]
fn a_used_file_serves_again_and_its_stale_bytes_say_nothing() {
    let disk = SimDisk::new();
    let settings = Settings {
        inline: true,
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    // The file after the first was made ready while the first was written; the third is the first again.
    for _ in 0..2 {
        for _ in 0..8 {
            n.append(&vec![b's'; 15_000]).unwrap();
        }
        n.log.seal_now().unwrap().unwrap();
    }
    n.append(b"first of the next").unwrap();
    let stale = disk.content(&active_file(&disk)).unwrap();
    assert!(stale[8192..].contains(&b's'), "the file was not used again");
    n.append(b"second of the next").unwrap();
    let before = n.records();
    drop(n);
    // Every way in which one more batch may be cut off over the stale bytes.
    for seed in 0..40 {
        let n = settings.sim(&disk);
        let held = n.records();
        assert_eq!(held[..before.len()], before[..]);
        disk.crash_at_call(disk.calls() + 1);
        assert!(n.append(&vec![b'n'; 9_000]).is_err());
        drop(n);
        disk.crash(Survival::Seed(seed));
        let n = settings.sim(&disk);
        assert_eq!(n.recovery.new_incarnation, None, "{seed}: {:?}", n.recovery);
        let after = n.records();
        assert_eq!(after[..held.len()], held[..], "{seed}");
        assert!(
            after[held.len()..]
                .iter()
                .all(|(_, r)| *r == vec![b'n'; 9_000] || r.starts_with(b"{\"records\"")),
            "{seed}"
        );
        drop(n);
        assert!(verify(&disk).ok, "{seed}");
    }
    // Positive control: damage to what is attested is found in such a file too.
    let path = active_file(&disk);
    let at = disk
        .content(&path)
        .unwrap()
        .windows(17)
        .position(|w| w == b"first of the next")
        .unwrap();
    disk.flip(&path, at, 1);
    assert!(settings.sim(&disk).recovery.new_incarnation.is_some());
}

#[test]
fn a_crash_anywhere_in_a_rotation_loses_nothing() {
    let record = |i: usize| vec![b'a' + u8::try_from(i % 26).unwrap(); 15_000];
    let mut at = 0;
    let mut rotated = false;
    while !rotated {
        at += 1;
        for survival in [Survival::None, Survival::All, Survival::Seed(at)] {
            let what = format!("call {at}, {survival:?}");
            let disk = SimDisk::new();
            let settings = Settings {
                inline: true,
                ..Settings::default()
            };
            let n = settings.sim(&disk);
            let mut acknowledged = Vec::new();
            let mut append = |i: usize| {
                if let Ok(appended) = n.append(&record(i)) {
                    acknowledged.push((appended.index, record(i)));
                }
            };
            // One file is full, and the next call rotates.
            (0..8).for_each(&mut append);
            disk.crash_at_call(disk.calls() + at);
            (8..20).for_each(&mut append);
            // Twice round: the last file is the first one again.
            rotated = !disk.is_off() && n.log.stat().next_sequence >= 2;
            drop(n);
            disk.crash(survival);
            let n = settings.sim(&disk);
            assert_eq!(n.recovery.new_incarnation, None, "{what}: {:?}", n.recovery);
            let held = n.records();
            for (index, record) in &acknowledged {
                assert_eq!(held[usize::try_from(*index).unwrap()].1, *record, "{what}");
            }
            n.append(b"on we go").unwrap();
            let report = verify(&disk);
            assert!(report.ok, "{what}: {report:?}");
            n.assert_ledger();
        }
    }
    assert!(at > 40, "{at}");
}

#[test]
fn an_archive_licenses_alone() {
    let disk = SimDisk::new();
    let settings = Settings {
        custody: 2,
        archives: &["vault"],
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    n.licensed_by(&sealed, &["n2"]);
    assert!(!n.log.is_licensed(&sealed.id, u64::MAX));
    n.licensed_by(&sealed, &["vault"]);
    assert!(n.log.is_licensed(&sealed.id, u64::MAX));
}

#[test]
fn overwriting_is_the_owners_choice_and_leaves_a_gap_record() {
    for overwrite_oldest in [false, true] {
        let disk = SimDisk::new();
        let settings = Settings {
            overwrite_oldest,
            ..small()
        };
        let n = settings.sim(&disk);
        let mut spans = Vec::new();
        let mut last = Ok(());
        for _ in 0..1200 {
            last = n.append(&vec![b'g'; 8000]).map(|_| ());
            for reference in n.store.own_audit(&node("n1")) {
                let span = n.store.audit_span(&reference.id).unwrap();
                if !spans.contains(&(reference.id, span)) {
                    spans.push((reference.id, span));
                }
            }
            if last.is_err() {
                break;
            }
        }
        if !overwrite_oldest {
            assert_eq!(last, Err(AppendError::Capacity));
            assert_eq!(n.log.stat().min_index, 0);
            continue;
        }
        assert_eq!(last, Ok(()));
        assert!(n.log.stat().min_index > 0);
        n.wait_sealed();
        let gaps = events(&n, "gap");
        assert!(!gaps.is_empty());
        for gap in &gaps {
            let at = |id: &str| spans.iter().position(|(of, _)| of.to_string() == id);
            let at = at(gap["segments"][0].as_str().unwrap()).unwrap();
            let span = spans[at].1;
            assert_eq!(gap["first"], span.first);
            assert_eq!(gap["last"], span.last);
            assert_eq!(gap["count"], span.last - span.first + 1);
            assert_eq!(gap["root_after"], span.root.to_string());
            let before = match at.checked_sub(1) {
                Some(before) => spans[before].1.root,
                None => merkle::Frontier::new().root(),
            };
            assert_eq!(gap["root_before"], before.to_string());
        }
        n.log.close();
        n.assert_ledger();
        let report = verify(&disk);
        assert!(report.ok, "{report:?}");
        assert!(disk.peak_allocated() <= settings.ceiling);
    }
}

#[test]
fn counts_of_refusals_survive_a_crash_exactly() {
    let disk = SimDisk::new();
    let settings = small();
    let n = settings.sim(&disk);
    fill(&n);
    for _ in 0..4 {
        assert_eq!(n.append(b"refused"), Err(AppendError::Capacity));
    }
    drop(n);
    disk.crash(Survival::None);
    let n = settings.sim(&disk);
    assert_eq!(n.log.stat().refused_at_capacity, 5);
    assert_eq!(
        n.log.append_wait(RecordClass::Denial, b"no".to_vec(), LONG),
        Err(AppendError::Capacity)
    );
    drop(n);
    disk.crash(Survival::None);
    let n = settings.sim(&disk);
    n.root.ledger().set_ceiling(64 * MIB);
    n.append(b"room").unwrap();
    n.append(b"more").unwrap();
    let told = events(&n, "refused_at_capacity");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(
        (&told[0]["decisions"], &told[0]["denials"]),
        (&5.into(), &1.into())
    );
    drop(n);
    disk.crash(Survival::None);
    // Told once.
    let n = settings.sim(&disk);
    n.root.ledger().set_ceiling(64 * MIB);
    n.append(b"again").unwrap();
    assert_eq!(events(&n, "refused_at_capacity").len(), 1);
}
