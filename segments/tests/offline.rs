//! A root read from outside: what is found, what is proposed, and what a crash leaves of a repair.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{MIB, Node, ROOT, Settings, domain, foreign_segments, node};
use tidelock_segments::offline::{
    FsckOptions, FsckReport, Held, LogEntry, LogProofError, Offline, OfflineError, REPAIRS_PATH,
    RepairError, RepairNote, RepairPlan, Severity, Source, repair, segment_path,
};
use tidelock_segments::testing::{SimDisk, Survival};
use tidelock_segments::{Charge, Kind, SealOptions, SegmentId, SegmentRef, SiteKey, verify_log};

fn options() -> FsckOptions {
    FsckOptions {
        node_id: node("n1"),
        ceiling_bytes: 64 * MIB,
        reserve_bytes: MIB,
        custody_max_bytes: 16 * MIB,
        known: Vec::new(),
        in_use: false,
    }
}

fn fsck(disk: &SimDisk) -> FsckReport {
    let disk = disk.disk();
    let offline = Offline::open(disk.as_ref(), Path::new(ROOT), &domain()).unwrap();
    offline.fsck(&options(), &mut |_| {}).unwrap()
}

/// The codes of everything but notes.
fn codes(disk: &SimDisk) -> Vec<&'static str> {
    let findings = fsck(disk).findings;
    let found = findings.iter().filter(|f| f.severity != Severity::Note);
    found.map(|f| f.code).collect()
}

fn mend(disk: &SimDisk) -> Result<RepairPlan, RepairError> {
    let disk = disk.disk();
    let root = Path::new(ROOT);
    repair(
        disk.as_ref(),
        root,
        &domain(),
        &options(),
        None,
        7,
        &mut |_| {},
    )
    .map(|done| done.plan)
}

fn notes(disk: &SimDisk) -> Vec<RepairNote> {
    let path = Path::new(ROOT).join(REPAIRS_PATH);
    disk.content(&path)
        .map_or_else(Vec::new, |bytes| serde_json::from_slice(&bytes).unwrap())
}

/// Appends and seals: segments of two, three, … records. The last of them is open.
fn fill(n: &Node) -> Vec<SegmentRef> {
    let mut sealed = Vec::new();
    for round in 0..4u32 {
        for i in 0..round + 2 {
            n.append(format!("{{\"round\":{round},\"i\":{i}}}").as_bytes())
                .unwrap();
        }
        if round < 3 {
            sealed.push(n.log.seal_now().unwrap().unwrap());
        }
    }
    sealed
}

fn file_of(id: &SegmentId) -> PathBuf {
    Path::new(ROOT).join(segment_path(Kind::Audit, id))
}

fn read_from(offline: &Offline<'_>, next: u64) -> Result<Vec<(u64, Vec<u8>)>, OfflineError> {
    let mut all = Vec::new();
    offline.records_from(next, &mut |entry| match entry {
        LogEntry::Record(index, bytes) => all.push((index, bytes.to_vec())),
        LogEntry::Gap(first, last) => panic!("gap {first}-{last}"),
    })?;
    Ok(all)
}

#[test]
fn the_log_is_read_from_outside_as_the_node_itself_reads_it() {
    let key = Arc::new(SiteKey::from_slice(&[9; 32]).unwrap());
    let encrypted = SealOptions {
        encryption: Some(key.clone()),
        ..SealOptions::default()
    };
    for (seal, needs_key) in [(SealOptions::default(), false), (encrypted, true)] {
        let disk = SimDisk::new();
        let n = Settings {
            seal,
            ..Settings::default()
        }
        .sim(&disk);
        let sealed = fill(&n);
        let io = disk.disk();
        let closed = Offline::open(io.as_ref(), Path::new(ROOT), &domain()).unwrap();
        let offline = Offline::open(io.as_ref(), Path::new(ROOT), &domain())
            .unwrap()
            .with_keys(Some(key.clone()));
        let own = read_from(&offline, 0).unwrap();
        // What the node itself reads: without the key, no further back than the encrypted.
        let by_node = n.records();
        assert!(own.ends_with(&by_node));
        assert_eq!(own.len() > by_node.len(), needs_key);
        for running in [true, false] {
            for next in 0..=own.len() {
                let all = read_from(&offline, next as u64).unwrap();
                assert_eq!(all[..], own[next..][..all.len().min(own.len() - next)]);
                assert!(all.len() >= own.len() - next);
            }
            let log = offline.own_log().unwrap().unwrap();
            assert!(offline.log_size(&log).unwrap() >= own.len() as u64);
            if running {
                n.log.close();
            }
        }
        assert_eq!(read_from(&closed, 0).is_err(), needs_key);
        let last = own.len() as u64 - 1;
        assert!(
            read_from(&closed, last).is_ok(),
            "the open file is never encrypted"
        );
        for reference in &sealed {
            let info = offline
                .describe(Kind::Audit, &reference.id)
                .unwrap()
                .unwrap();
            assert_eq!((&info.reference, info.encrypted), (reference, needs_key));
            assert_eq!((info.compressed, info.body_version), (true, Some(2)));
            let body: usize = own
                .iter()
                .filter(|(i, _)| (info.span.unwrap().first..=info.span.unwrap().last).contains(i))
                .map(|(_, record)| record.len() + 4)
                .sum();
            assert_eq!(info.raw_bytes, body as u64);
            assert!(
                offline
                    .endorsement(Kind::Audit, &reference.id)
                    .unwrap()
                    .is_some()
            );
            let read = |of: &Offline<'_>| of.verify(Kind::Audit, &reference.id).unwrap().unwrap().1;
            assert!(read(&offline));
            assert_eq!(read(&closed), !needs_key);
        }
        let report = closed.fsck(&options(), &mut |_| {}).unwrap();
        assert!(report.ok, "{:?}", report.findings);
        assert_eq!(report.unread_records > 0, needs_key);
    }
}

#[test]
fn every_record_is_proven_from_one_segment_or_from_the_open_file() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    fill(&n);
    let theirs = foreign_segments("n2", 2);
    for segment in &theirs {
        n.store.put(segment, Charge::Custody).unwrap();
    }
    let own = n.records();
    let io = disk.disk();
    let offline = Offline::open(io.as_ref(), Path::new(ROOT), &domain()).unwrap();
    let (key, origin) = (n.log.public_key(), n.log.origin());
    // The last append has no head over it yet; a clean end makes one.
    assert!(matches!(
        offline.prove(&origin, own.len() as u64 - 1, false),
        Err(LogProofError::NotCovered(_))
    ));
    n.log.close();
    for (index, record) in &own {
        for latest in [false, true] {
            let proof = offline.prove(&origin, *index, latest).unwrap();
            assert_eq!((&proof.proof.record, proof.proof.index), (record, *index));
            let newest = proof.verify(&key).unwrap();
            assert!(newest.size > *index);
            if latest {
                assert!(newest.size >= own.len() as u64);
            }
            let text = serde_json::to_string(&proof).unwrap();
            let again: tidelock_segments::offline::LogProof = serde_json::from_str(&text).unwrap();
            assert_eq!(again, proof);
            let other = common::key_of("n9").public();
            assert_eq!(again.verify(&other), Err(LogProofError::Key));
        }
        let leaf = tidelock_segments::merkle::leaf_hash(record);
        assert_eq!(offline.find_leaf(&origin, &leaf).unwrap(), Some(*index));
    }
    let past = n.log.size() + 1;
    assert_eq!(
        offline.prove(&origin, past, false),
        Err(LogProofError::NotHeld(past))
    );
    let their = theirs[0].header().origin.clone();
    let first = theirs[0].audit_span().unwrap().first;
    let proof = offline.prove(&their, first, true).unwrap();
    assert!(
        proof
            .verify(&theirs[0].endorsement().unwrap().log_key)
            .is_ok()
    );
    assert_eq!(proof.verify(&key), Err(LogProofError::Key));
}

/// Everything that is held, by id, without what only headers say.
fn held(offline: &Offline<'_>, source: Source) -> Vec<Held> {
    let mut all = Vec::new();
    offline
        .audit_segments(source, &mut |held, _| {
            assert!(held.raw_bytes.is_some() || source == Source::Index);
            all.push(Held {
                raw_bytes: None,
                ..held
            });
        })
        .unwrap();
    all.sort_by_key(|held| held.reference.id);
    all
}

#[test]
fn the_index_says_where_to_look_and_the_files_have_the_last_word() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    fill(&n);
    for segment in &foreign_segments("n2", 300) {
        n.store.put(segment, Charge::Custody).unwrap();
    }
    let (own, origin) = (n.records(), n.log.origin());
    let io = disk.disk();
    let offline = Offline::open(io.as_ref(), Path::new(ROOT), &domain()).unwrap();
    let cost = |source| {
        let before = disk.readings();
        let found = held(&offline, source);
        (found, disk.readings() - before)
    };
    // Of a running and of a stopped node. What the journal names is looked at, at most 128 files; no other header is.
    for _ in 0..2 {
        let ((by_headers, dear), (by_index, cheap)) = (cost(Source::Headers), cost(Source::Index));
        assert_eq!((by_index.len(), &by_index), (303, &by_headers));
        assert!(2 * cheap < dear, "{cheap} readings, and {dear} by headers");
        n.log.close();
    }
    let figures = offline.usage_of(&options()).unwrap().0;
    assert_eq!(figures.allocated_bytes, disk.allocated());
    let all_is_found = |disk: &SimDisk| {
        let io = disk.disk();
        let offline = Offline::open(io.as_ref(), Path::new(ROOT), &domain()).unwrap();
        assert_eq!(read_from(&offline, 0).unwrap(), own);
        for (index, record) in &own {
            let proof = offline.prove(&origin, *index, true).unwrap();
            assert_eq!(&proof.proof.record, record);
            let leaf = tidelock_segments::merkle::leaf_hash(record);
            assert_eq!(offline.find_leaf(&origin, &leaf).unwrap(), Some(*index));
        }
        held(&offline, Source::Index)
    };
    let truth = all_is_found(&disk);

    let name = &blake3::hash(origin.as_str().as_bytes()).to_hex()[..32];
    let page = Path::new(ROOT).join(format!("index/chain/{name}-0.idx"));
    let good = disk.content(&page).unwrap();
    // An entry that is damaged, an entry of no spelling, a page that is gone, an index that is gone.
    for at in [256 + 40, 256 + 144 + 140] {
        disk.flip(&page, at, 1);
        assert_eq!(all_is_found(&disk), truth);
        disk.replace(&page, &good);
    }
    let without = disk.fork();
    without.unlink(&page);
    assert_eq!(all_is_found(&without), truth);
    let without = disk.fork();
    without.unlink(&Path::new(ROOT).join("index/catalog"));
    assert_eq!(all_is_found(&without), truth);

    // Entries with good checksums that lie about every span: no record is missed, none called missing.
    let mut lies = good.clone();
    for sequence in 0..3_u64 {
        let at = 256 + 144 * usize::try_from(sequence).unwrap();
        lies[at + 104..at + 112].copy_from_slice(&(900 + sequence).to_le_bytes());
        lies[at + 112..at + 120].copy_from_slice(&(900 + sequence).to_le_bytes());
        let hash = blake3::hash(origin.as_str().as_bytes());
        let sum = crc32c::crc32c(&hash.as_bytes()[..16]);
        let sum = crc32c::crc32c_append(sum, &sequence.to_le_bytes());
        let sum = crc32c::crc32c_append(sum, &lies[at..at + 136]);
        lies[at + 136..at + 140].copy_from_slice(&sum.to_le_bytes());
    }
    disk.replace(&page, &lies);
    assert_ne!(
        all_is_found(&disk),
        truth,
        "the control: these lies are read"
    );
}

/// A stopped node's disk with a damaged segment, a receipt for nothing and a half-written file; the
/// damaged bytes and their segment.
fn damaged() -> (SimDisk, SegmentId, Vec<u8>) {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let sealed = fill(&n);
    for segment in foreign_segments("n2", 1) {
        n.store.put(&segment, Charge::Custody).unwrap();
    }
    n.licensed_by(&sealed[0], &["n2", "n3"]);
    assert_eq!(codes(&disk), [""; 0], "the control");
    drop(n);
    let id = sealed[1].id;
    disk.flip(&file_of(&id), 700, 4);
    disk.plant(&Path::new(ROOT).join("tmp/half"), b"half");
    let bad = disk.content(&file_of(&id)).unwrap();
    (disk, id, bad)
}

fn holds(disk: &SimDisk, bytes: &[u8]) -> bool {
    let files = disk.files();
    files
        .iter()
        .any(|path| disk.content(path).is_some_and(|held| held == bytes))
}

#[test]
fn a_repair_keeps_the_evidence_and_may_be_cut_off_at_any_call() {
    let (disk, ..) = damaged();
    let mut found = codes(&disk);
    found.sort_unstable();
    let expected = ["log_missing", "segment_damaged", "temporary_file"];
    assert_eq!(
        found, expected,
        "its records count as missing until it is mended"
    );
    let calls = {
        let (disk, id, bad) = damaged();
        let before = disk.calls();
        let plan = mend(&disk).unwrap();
        let steps: Vec<&str> = plan.steps.iter().map(|s| s.code.as_str()).collect();
        assert_eq!(
            steps,
            ["segment_damaged", "temporary_file", "index_outdated"]
        );
        assert!(disk.content(&file_of(&id)).is_none() && holds(&disk, &bad));
        assert_eq!(notes(&disk).len(), 1);
        assert!(notes(&disk)[0].complete);
        assert_eq!(codes(&disk), ["log_missing"], "what is gone stays reported");
        assert_eq!(mend(&disk).unwrap().steps.len(), 0);
        assert_eq!(notes(&disk).len(), 1, "nothing done, nothing noted");
        disk.calls() - before
    };
    assert!(calls > 10, "{calls}");
    for at in 1..=calls {
        for survival in [Survival::None, Survival::All, Survival::Seed(at)] {
            let (disk, id, bad) = damaged();
            disk.crash_at_call(disk.calls() + at);
            if mend(&disk).is_ok() {
                break;
            }
            disk.crash(survival);
            assert!(
                holds(&disk, &bad),
                "call {at}, {survival:?}: evidence is gone"
            );
            let done = disk.content(&file_of(&id)).is_none()
                || disk.content(&Path::new(ROOT).join("tmp/half")).is_none();
            assert!(
                !done || !notes(&disk).is_empty(),
                "call {at}, {survival:?}: repaired in silence"
            );
            // Again, to the end.
            let rest = mend(&disk).unwrap();
            assert_eq!(codes(&disk), ["log_missing"], "call {at}, {survival:?}");
            let last = notes(&disk).pop().unwrap();
            assert!(last.complete || rest.steps.is_empty(), "{last:?}");
            let n = Settings::default().sim(&disk);
            assert!(n.append(b"goes on").is_ok());
        }
    }
}

#[test]
fn a_repair_needs_the_lock_and_the_plan_that_was_agreed_to() {
    let (disk, ..) = damaged();
    let running = Settings::default().open_root(disk.disk()).unwrap();
    assert_eq!(mend(&disk), Err(RepairError::InUse));
    drop(running);
    disk.plant(&Path::new(ROOT).join("tmp/half"), b"half");
    let plan = RepairPlan::of(&fsck(&disk));
    disk.plant(&Path::new(ROOT).join("tmp/more"), b"more");
    let io = disk.disk();
    let agreed = |digest| {
        let root = Path::new(ROOT);
        repair(
            io.as_ref(),
            root,
            &domain(),
            &options(),
            digest,
            7,
            &mut |_| {},
        )
    };
    assert!(matches!(
        agreed(Some(plan.digest)),
        Err(RepairError::PlanChanged { .. })
    ));
    assert!(notes(&disk).is_empty());
    io.remove(&Path::new(ROOT).join("tmp/more")).unwrap();
    assert_eq!(agreed(Some(plan.digest)).unwrap().plan.steps, plan.steps);
    // A root that has outgrown its ceiling has no room for the note, and so for no repair.
    let (disk, ..) = damaged();
    let small = FsckOptions {
        ceiling_bytes: 64 * 1024,
        reserve_bytes: 0,
        ..options()
    };
    let io = disk.disk();
    let root = Path::new(ROOT);
    let refused = repair(io.as_ref(), root, &domain(), &small, None, 7, &mut |_| {});
    assert!(
        matches!(refused, Err(RepairError::Ceiling(_))),
        "{refused:?}"
    );
    assert!(notes(&disk).is_empty());
    io.remove(&root.join("lock")).unwrap();
    assert_eq!(mend(&disk), Err(RepairError::NoLock));
}

#[test]
fn an_index_that_does_not_tell_of_the_files_is_found_and_built_again() {
    let catalog = Path::new(ROOT).join("index/catalog");
    let damages: [fn(&SimDisk, &Path); 2] = [
        |disk, path| disk.flip(path, 20, 1),
        // An older one with the journal of a newer.
        |disk, path| {
            let old = disk.content(path).unwrap();
            let n = Settings::default().sim(disk);
            fill(&n);
            drop(n);
            disk.plant(path, &old);
        },
    ];
    for damage in damages {
        let disk = SimDisk::new();
        let n = Settings::default().sim(&disk);
        fill(&n);
        drop(n);
        assert_eq!(codes(&disk), [""; 0], "the control");
        damage(&disk, &catalog);
        let found = codes(&disk);
        if found.is_empty() {
            // The journal makes up for what the catalog does not know.
            continue;
        }
        assert!(
            ["index_damaged", "index_disagrees"].contains(&found[0]),
            "{found:?}"
        );
        mend(&disk).unwrap();
        let n = Settings::default().sim(&disk);
        n.append(b"goes on").unwrap();
        drop(n);
        assert_eq!(codes(&disk), [""; 0]);
    }
}

/// The newest segment of the own log without a log file after it: a node that does not find it would
/// sign its indexes a second time.
#[test]
fn the_newest_own_segment_is_left_to_the_node() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    n.append(b"one").unwrap();
    let state = Path::new(ROOT).join("log/state");
    let before = disk.content(&state).unwrap();
    let newest = n.log.seal_now().unwrap().unwrap();
    disk.kill();
    drop(n);
    let log = |path: &&PathBuf| path.extension().is_some_and(|e| e == "log");
    for path in disk.files().iter().filter(log) {
        disk.unlink(path);
    }
    // The control: the state file accounts for it, so it may go.
    disk.flip(&file_of(&newest.id), 700, 1);
    assert!(!RepairPlan::of(&fsck(&disk)).steps.is_empty());
    disk.flip(&file_of(&newest.id), 700, 1);
    // As after a crash between the seal and the writing of the state.
    disk.plant(&state, &before);
    for at in [9, 700] {
        disk.flip(&file_of(&newest.id), at, 1);
        let report = fsck(&disk);
        assert!(!report.ok);
        assert!(
            RepairPlan::of(&report).steps.is_empty(),
            "{:?}",
            report.findings
        );
        assert!(report.findings[0].repair.text().contains("newest"));
        disk.flip(&file_of(&newest.id), at, 1);
    }
    assert!(fsck(&disk).ok);
}

#[test]
fn receipts_must_fit_what_is_held() {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let sealed = fill(&n);
    let io = disk.disk();
    let offline = Offline::open(io.as_ref(), Path::new(ROOT), &domain()).unwrap();
    n.licensed_by(&sealed[0], &["n2", "n3"]);
    assert_eq!(offline.receipts(&sealed[0].id).unwrap().len(), 2);
    assert_eq!(offline.receipts(&sealed[1].id).unwrap().len(), 0);
    assert_eq!(offline.custodians().unwrap()[&sealed[0].id].len(), 2);
    n.log.close();
    let files: Vec<PathBuf> = disk
        .files()
        .into_iter()
        .filter(|path| path.starts_with(Path::new(ROOT).join("receipts")))
        .collect();
    // Under another segment's name, and under the name of none.
    let bytes = disk.content(&files[0]).unwrap();
    let name = files[0].file_name().unwrap().to_str().unwrap();
    let place = |id: &SegmentId| {
        let name = name.replace(&sealed[0].id.hex(), &id.hex());
        Path::new(ROOT).join("receipts").join(name)
    };
    disk.plant(&place(&sealed[1].id), &bytes);
    disk.plant(&place(&SegmentId::of(b"none")), &bytes);
    let mut found = codes(&disk);
    found.retain(|code| *code != "mode_loose");
    assert_eq!(found, ["receipt_damaged", "receipt_orphaned"]);
    assert_eq!(
        offline.receipts(&sealed[1].id).unwrap().len(),
        0,
        "never counted"
    );
    drop(n);
    assert_eq!(mend(&disk).unwrap().steps.len(), 2);
    assert_eq!(
        offline.receipts(&sealed[0].id).unwrap().len(),
        2,
        "the good ones stay"
    );
    assert!(
        verify_log(io.as_ref(), Path::new(ROOT), &domain())
            .unwrap()
            .ok
    );
}
