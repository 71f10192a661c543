//! A root that was put back to an older copy in its very place, so that nothing in it tells (ruling 8):
//! what a peer holds of its log ends the incarnation, and nothing acknowledged is lost by that.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{LONG, Node, ROOT, Settings, domain, foreign_segments, node, receipt};
use tidelock_segments::limits::{MAX_QUARANTINED_NAMED, MAX_QUARANTINED_PATH_BYTES};
use tidelock_segments::testing::{Fault, SimDisk, Survival, unchecked_endorsement};
use tidelock_segments::{
    AppendError, DiskFault, LogError, NamedHead, OwnSegment, RecordClass, Recovery, SegmentId,
    StoreError, VerifiedSegment, named_heads, verify_log,
};

fn settings() -> Settings {
    Settings {
        inline: true,
        ..Settings::default()
    }
}

/// A disk as it was when one segment was sealed, and the segments that the node sealed later.
struct Restored {
    disk: SimDisk,
    later: Vec<VerifiedSegment>,
}

fn restored(settings: &Settings) -> Restored {
    let disk = SimDisk::new();
    settings.plant_key(&disk);
    let n = settings.sim(&disk);
    n.append(b"before the copy").unwrap();
    n.log.seal_now().unwrap().unwrap();
    drop(n);
    let copy = disk.fork();
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None);
    let later = (0..3)
        .map(|i| {
            n.append(format!("forgotten {i}").as_bytes()).unwrap();
            let sealed = n.log.seal_now().unwrap().unwrap();
            n.store.get(&sealed.id).unwrap()
        })
        .collect();
    Restored { disk: copy, later }
}

fn succeed(n: &Node) -> Result<Recovery, LogError> {
    let name = node("n1");
    n.log
        .succeed(&|key, incarnation| Ok(unchecked_endorsement(&name, key, incarnation)))
}

fn head_after(segment: &VerifiedSegment) -> NamedHead {
    let span = segment.audit_span().unwrap();
    NamedHead {
        origin: segment.header().origin.clone(),
        root: span.root,
        size: span.last + 1,
    }
}

/// The heads that the first record of the running log names.
fn named(n: &Node) -> Vec<NamedHead> {
    let (index, first) = n.records().remove(0);
    assert_eq!(index, 0);
    named_heads(&first)
}

/// Every byte string in the quarantine.
fn quarantine(disk: &SimDisk) -> Vec<Vec<u8>> {
    let inside = Path::new(ROOT).join("quarantine");
    disk.files()
        .into_iter()
        .filter(|path| path.starts_with(&inside))
        .filter_map(|path| disk.content(&path))
        .collect()
}

fn has(haystacks: &[Vec<u8>], needle: &[u8]) -> bool {
    haystacks
        .iter()
        .any(|bytes| bytes.windows(needle.len()).any(|part| part == needle))
}

fn assert_sound(disk: &SimDisk, n: &Node) {
    n.assert_ledger();
    let report = verify_log(disk, Path::new(ROOT), &domain()).unwrap();
    assert!(report.ok, "{report:?}");
}

#[test]
fn inv_17_a_later_head_of_the_own_log_ends_its_incarnation() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None, "nothing here tells");
    let old = n.log.origin();
    n.append(b"acknowledged after the copy").unwrap();
    assert!(!n.log.is_superseded());

    assert_eq!(n.log.take_own(&later[0]), Ok(OwnSegment::Later));
    assert!(n.log.is_superseded() && n.log.stat().superseded);
    // Nothing more is signed in those places; the node goes on recording meanwhile.
    assert_eq!(n.log.seal_now(), Err(LogError::Superseded));
    n.append(b"acknowledged meanwhile").unwrap();
    n.log.tick(u64::MAX);
    assert_eq!(n.log.take_own(&later[1]), Ok(OwnSegment::Later));
    assert_eq!(n.log.take_own(&later[1]), Ok(OwnSegment::AlreadyHeld));
    assert_eq!(n.log.take_own(&later[2]), Ok(OwnSegment::Later));

    let recovery = succeed(&n).unwrap();
    assert_eq!(recovery.quarantined.len(), 1, "{recovery:?}");
    assert!(!n.log.is_superseded());
    assert_eq!(n.log.incarnation(), 2);
    assert_eq!(named(&n), [head_after(&later[2])]);
    let first = String::from_utf8(n.records().remove(0).1).unwrap();
    assert!(first.contains(&recovery.quarantined[0]), "{first}");
    let kept = quarantine(&disk);
    assert!(has(&kept, b"acknowledged after the copy"));
    assert!(has(&kept, b"acknowledged meanwhile"));
    for segment in &later {
        assert_eq!(
            n.store.find(&old, segment.header().sequence).unwrap().id,
            segment.id()
        );
    }
    n.append(b"on we go").unwrap();
    n.log.seal_now().unwrap().unwrap();
    assert_sound(&disk, &n);
    // It is a log like any other, over a restart too; and there is nothing more to succeed.
    let origin = n.log.origin();
    assert_eq!(succeed(&n), Ok(Recovery::default()));
    drop(n);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None);
    assert_eq!(n.log.origin(), origin);
    assert_sound(&disk, &n);
}

#[test]
fn a_node_that_stops_in_between_begins_the_next_incarnation_at_its_start() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    n.append(b"acknowledged after the copy").unwrap();
    for segment in &later {
        n.log.take_own(segment).unwrap();
    }
    drop(n);
    let n = settings.sim(&disk);
    let why = n.recovery.new_incarnation.clone().unwrap();
    assert!(why.contains("a peer holds a later head"), "{why}");
    assert_eq!(named(&n), [head_after(&later[2])]);
    assert!(has(&quarantine(&disk), b"acknowledged after the copy"));
    assert_sound(&disk, &n);
}

#[test]
fn without_an_endorsement_the_log_stays_superseded_and_may_try_again() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    n.log.take_own(&later[0]).unwrap();
    let refused = n.log.succeed(&|_, _| Err("no certificate".into()));
    assert!(matches!(refused, Err(LogError::Endorse(_))), "{refused:?}");
    assert!(n.log.is_superseded());
    assert_eq!(n.log.latched(), None);
    n.append(b"acknowledged meanwhile").unwrap();
    succeed(&n).unwrap();
    assert_eq!(n.log.incarnation(), 2);
    assert!(has(&quarantine(&disk), b"acknowledged meanwhile"));
}

#[test]
fn files_past_the_last_that_may_wait_are_refused_and_the_next_incarnation_takes_records_again() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    n.log.take_own(&later[0]).unwrap();
    let record = vec![b'r'; 60_000];
    let refused = (0..30).find_map(|_| n.append(&record).err()).unwrap();
    assert!(refused.to_string().contains("later head"), "{refused}");
    succeed(&n).unwrap();
    n.append(&record).unwrap();
    assert_sound(&disk, &n);
}

#[test]
fn what_was_sealed_in_the_same_places_is_set_aside_unless_others_hold_it() {
    for held_by_others in [false, true] {
        let settings = settings();
        let Restored { disk, later } = restored(&settings);
        let n = settings.sim(&disk);
        n.append(b"sealed after the copy").unwrap();
        let first = n.log.seal_now().unwrap().unwrap();
        n.append(b"and more").unwrap();
        let second = n.log.seal_now().unwrap().unwrap();
        assert_eq!(first.sequence, later[0].header().sequence);
        if held_by_others {
            let segment = n.store.get(&second.id).unwrap();
            n.log.take_receipt(&receipt(&segment, "n2")).unwrap();
        }
        let taken = n.log.take_own(&later[0]);
        assert!(n.log.is_superseded(), "either way it signs nothing more");
        if held_by_others {
            assert!(matches!(taken, Err(LogError::OwnFork { .. })), "{taken:?}");
            assert!(n.store.contains(&first.id) && n.store.contains(&second.id));
        } else {
            assert_eq!(taken, Ok(OwnSegment::Later));
            n.log.take_own(&later[1]).unwrap();
            n.log.take_own(&later[2]).unwrap();
            assert!(!n.store.contains(&first.id) && !n.store.contains(&second.id));
        }
        let recovery = succeed(&n).unwrap();
        if held_by_others {
            assert_eq!(
                named(&n)[0].size,
                n.store.audit_span(&second.id).unwrap().last + 1
            );
        } else {
            assert_eq!(recovery.quarantined.len(), 2, "{recovery:?}");
            assert_eq!(named(&n), [head_after(&later[2])]);
            assert!(has(&quarantine(&disk), b"sealed after the copy"));
        }
        assert_sound(&disk, &n);
    }
}

#[test]
fn a_new_incarnation_that_names_an_older_head_is_followed_by_one_that_names_the_newest() {
    for sealed in [false, true] {
        let settings = settings();
        let Restored { disk, later } = restored(&settings);
        disk.copy_tree(Path::new(ROOT), Path::new("/sim/copy"));
        let settings = Settings {
            path: "/sim/copy",
            ..settings
        };
        let n = settings.sim(&disk);
        assert_eq!(n.log.incarnation(), 2, "the place tells");
        n.append(b"of the second").unwrap();
        let second = n.log.origin();
        if sealed {
            n.log.seal_now().unwrap().unwrap();
            n.append(b"more of the second").unwrap();
        }
        for segment in &later {
            assert_eq!(n.log.take_own(segment), Ok(OwnSegment::Later));
        }
        let recovery = succeed(&n).unwrap();
        assert_eq!(n.log.incarnation(), 3);
        let heads = named(&n);
        if sealed {
            // Others may have it: the rest is sealed too, and both heads are named.
            assert_eq!(recovery.quarantined, Vec::<String>::new());
            assert_eq!(heads.len(), 2, "{heads:?}");
            assert_eq!(heads[0].origin, second);
            assert_eq!(heads[1], head_after(&later[2]));
        } else {
            assert_eq!(recovery.quarantined.len(), 1);
            assert_eq!(heads, [head_after(&later[2])]);
        }
        // What is named is known: that a peer holds it too is no news.
        n.store.remove(&later[1].id()).unwrap();
        assert_eq!(n.log.take_own(&later[1]), Ok(OwnSegment::Restored));
        assert!(!n.log.is_superseded());
        n.assert_ledger();
    }
}

#[test]
fn a_segment_that_damage_took_comes_back_and_ends_nothing() {
    let settings = settings();
    let disk = SimDisk::new();
    let n = settings.sim(&disk);
    let segments: Vec<VerifiedSegment> = (0..3)
        .map(|i| {
            n.append(format!("record {i}").as_bytes()).unwrap();
            let sealed = n.log.seal_now().unwrap().unwrap();
            n.store.get(&sealed.id).unwrap()
        })
        .collect();
    // In the middle and at the end.
    for segment in &segments[1..] {
        n.store.quarantine(&segment.id(), "a flipped bit").unwrap();
        assert_eq!(n.log.take_own(segment), Ok(OwnSegment::Restored));
        assert_eq!(n.log.take_own(segment), Ok(OwnSegment::AlreadyHeld));
    }
    assert!(!n.log.is_superseded());
    n.append(b"on we go").unwrap();
    n.log.seal_now().unwrap().unwrap();
    n.assert_ledger();
}

#[test]
fn what_was_evicted_is_not_taken_back() {
    let settings = settings();
    let disk = SimDisk::new();
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    let segment = n.store.get(&sealed.id).unwrap();
    n.append(b"two").unwrap();
    n.log.seal_now().unwrap().unwrap();
    n.licensed_by(&sealed, &["n2"]);
    n.root.ledger().set_ceiling(common::MIB);
    n.log.reclaim();
    n.root.ledger().set_ceiling(settings.ceiling);
    assert!(!n.store.contains(&sealed.id), "the control: it went");
    assert_eq!(n.log.evicted_below(&sealed.origin), sealed.sequence + 1);
    assert_eq!(n.log.take_own(&segment), Err(LogError::Evicted(sealed.id)));
    assert!(!n.log.is_superseded());
}

#[test]
fn only_what_the_own_log_key_signed_counts() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    // Of another node, and of this node's name under another key.
    let foreign = foreign_segments("n9", 1).remove(0);
    let other = SimDisk::new();
    let impostor = settings.sim(&other);
    for i in 0..3 {
        impostor.append(format!("record {i}").as_bytes()).unwrap();
        let sealed = impostor.log.seal_now().unwrap().unwrap();
        let forged = impostor.store.get(&sealed.id).unwrap();
        assert_eq!(n.log.take_own(&forged), Err(LogError::NotOwn(forged.id())));
    }
    assert_eq!(
        n.log.take_own(&foreign),
        Err(LogError::NotOwn(foreign.id()))
    );
    assert!(!n.log.is_superseded());
    // The control.
    assert_eq!(n.log.take_own(&later[0]), Ok(OwnSegment::Later));
}

#[test]
fn an_older_log_that_contradicts_is_refused_and_stays_as_it_is() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    for segment in &later {
        n.log.take_own(segment).unwrap();
    }
    succeed(&n).unwrap();
    // The same place once more, signed by the same key on another copy.
    let Restored { disk: copy, .. } = restored(&settings);
    let again = settings.sim(&copy);
    again.append(b"another content").unwrap();
    let sealed = again.log.seal_now().unwrap().unwrap();
    let forked = again.store.get(&sealed.id).unwrap();
    let refused = n.log.take_own(&forked);
    let forks = matches!(refused, Err(LogError::Store(StoreError::Fork { .. })));
    assert!(forks, "{refused:?}");
    assert!(n.store.contains(&later[0].id()));
}

/// What goes wrong at one writing call, and what happens before the next start.
enum Wrong {
    /// The power goes, and once more during the start after it.
    Power(Survival),
    /// The disk refuses; then the log changes to the next incarnation and is reopened, or not, and the
    /// power goes.
    Refusal {
        fault: Fault,
        goes_on: bool,
        survival: Survival,
    },
}

/// Takes what a peer holds and changes to the next incarnation, with something wrong at the writing call
/// `at`; then the contact goes on where it was cut off. Nothing acknowledged is lost by it, no place is
/// sealed twice, and no head is named that nobody else knows. Tells whether the call came at all.
fn goes_wrong(restored: &Restored, own_sealed: bool, at: u64, wrong: &Wrong, what: &str) -> bool {
    let settings = settings();
    let Restored { disk, later } = restored;
    let theirs: BTreeSet<SegmentId> = later.iter().map(VerifiedSegment::id).collect();
    let disk = disk.fork();
    let n = settings.sim(&disk);
    let old = n.log.origin();
    let common = n.store.first(&old).unwrap();
    let mut known: Vec<NamedHead> = later.iter().map(head_after).collect();
    known.push(head_after(&n.store.get(&common.id).unwrap()));
    let mut acknowledged: Vec<Vec<u8>> = Vec::new();
    let mut append = |n: &Node, text: String| {
        if n.append(text.as_bytes()).is_ok() {
            acknowledged.push(text.into_bytes());
        }
    };
    if own_sealed {
        for i in 0..2 {
            append(&n, format!("sealed after the copy {i}"));
            n.log.seal_now().unwrap().unwrap();
        }
    }
    append(&n, "after the copy".to_owned());
    let call = disk.calls() + at;
    match wrong {
        Wrong::Power(_) => disk.crash_at_call(call),
        Wrong::Refusal { fault, .. } => disk.inject(call, fault.clone()),
    }
    for (i, segment) in later.iter().enumerate() {
        let _ = n.log.take_own(segment);
        append(&n, format!("meanwhile {i}"));
    }
    if !matches!(wrong, Wrong::Refusal { goes_on: false, .. }) {
        let _ = succeed(&n);
        append(&n, "in the next".to_owned());
        let _ = n.log.seal_now();
        append(&n, "in the next, not sealed".to_owned());
    }
    let came = disk.is_off() || disk.calls() >= call;
    match wrong {
        Wrong::Power(survival) => {
            drop(n);
            disk.crash(*survival);
            // The start is cut off as well, at a call that differs from run to run.
            disk.crash_at_call(disk.calls() + 1 + at % 9);
            if let Ok(n) = settings.open(disk.disk()) {
                drop(n);
            }
            disk.crash(*survival);
        }
        Wrong::Refusal {
            goes_on, survival, ..
        } => {
            if *goes_on {
                let _ = n.log.reopen();
                append(&n, "after it was reopened".to_owned());
            }
            disk.crash(*survival);
            drop(n);
        }
    }
    let assert_known = |n: &Node| {
        for head in named(n) {
            let fits = head.origin != old || known.contains(&head);
            assert!(fits, "{what}: {head:?} is known to nobody else");
        }
    };
    let n = settings.sim(&disk);
    assert_eq!(n.log.latched(), None, "{what}");
    assert_known(&n);
    for segment in later {
        n.log
            .take_own(segment)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    succeed(&n).unwrap_or_else(|e| panic!("{what}: {e}"));
    n.append(b"it goes on").unwrap();
    n.log.seal_now().unwrap();

    assert_known(&n);
    let heads = named(&n);
    assert!(heads.contains(&head_after(&later[2])), "{what}: {heads:?}");
    let mut records: Vec<Vec<u8>> = Vec::new();
    for reference in n.store.own_audit(&node("n1")) {
        let segment = n.store.get(&reference.id).unwrap();
        if reference.origin == old && reference.sequence > 0 {
            assert!(theirs.contains(&reference.id), "{what}: {reference:?}");
        }
        records.push(segment.into_bytes());
    }
    records.extend(quarantine(&disk));
    for record in &acknowledged {
        assert!(
            has(&records, record),
            "{what}: `{}` is gone",
            String::from_utf8_lossy(record)
        );
    }
    assert_sound(&disk, &n);
    came
}

/// The power goes at every writing call of taking what a peer holds and of the change to the next
/// incarnation, and once more during the start after it.
#[test]
fn inv_16_a_crash_while_a_log_is_superseded_loses_nothing_and_signs_nothing_twice() {
    let restored = restored(&settings());
    for own_sealed in [false, true] {
        let mut at = 0;
        let mut came = true;
        while came {
            at += 1;
            for survival in [Survival::None, Survival::All, Survival::Seed(at)] {
                let what = format!("call {at}, {survival:?}, own segments: {own_sealed}");
                let wrong = Wrong::Power(survival);
                came = goes_wrong(&restored, own_sealed, at, &wrong, &what);
            }
        }
        assert!(at > 20, "{at}");
    }
}

/// A state that could not be stored was taken for stored when the next segment came: the segment was
/// taken in, the next start went on with the old log, and removed its file for one that was sealed.
#[test]
fn inv_16_a_refusal_of_the_disk_while_a_log_is_superseded_loses_nothing_and_signs_nothing_twice() {
    let restored = restored(&settings());
    let faults = [
        Fault::Fail(DiskFault::Os(5)),
        Fault::FailDone(DiskFault::Os(5)),
        Fault::Fail(DiskFault::NoSpace),
    ];
    for own_sealed in [false, true] {
        for fault in &faults {
            let mut at = 0;
            let mut came = true;
            while came {
                at += 1;
                let survivals = [Survival::None, Survival::All];
                for (goes_on, survival) in [false, true].into_iter().zip(survivals) {
                    let what = format!(
                        "call {at}, {fault:?}, goes on: {goes_on}, own segments: {own_sealed}"
                    );
                    let wrong = Wrong::Refusal {
                        fault: fault.clone(),
                        goes_on,
                        survival,
                    };
                    came = goes_wrong(&restored, own_sealed, at, &wrong, &what);
                }
            }
            assert!(at > 20, "{at}");
        }
    }
}

#[test]
fn a_segment_of_a_peer_beyond_a_hole_is_not_put_aside_with_those_that_contradict() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    n.append(b"sealed after the copy").unwrap();
    let own = n.log.seal_now().unwrap().unwrap();
    assert_eq!(n.log.take_own(&later[2]), Ok(OwnSegment::Later));
    assert!(n.store.contains(&own.id), "nothing contradicts it yet");
    assert_eq!(n.log.take_own(&later[0]), Ok(OwnSegment::Later));
    assert!(!n.store.contains(&own.id), "the control");
    assert!(n.store.contains(&later[2].id()));
    assert_eq!(n.log.take_own(&later[1]), Ok(OwnSegment::Later));

    // A third content of the place: what peers brought stays as well.
    let Restored { disk: copy, .. } = restored(&settings);
    let again = settings.sim(&copy);
    again.append(b"of another copy").unwrap();
    let sealed = again.log.seal_now().unwrap().unwrap();
    let refused = n.log.take_own(&again.store.get(&sealed.id).unwrap());
    assert!(
        matches!(refused, Err(LogError::OwnFork { .. })),
        "{refused:?}"
    );
    let recovery = succeed(&n).unwrap();
    for segment in &later {
        assert!(n.store.contains(&segment.id()));
    }
    assert_eq!(named(&n), [head_after(&later[2])]);
    assert_eq!(recovery.quarantined.len(), 1, "{recovery:?}");
    assert_sound(&disk, &n);
}

#[test]
fn inv_07_the_first_record_names_so_many_quarantined_files_and_counts_the_rest() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    let all = MAX_QUARANTINED_NAMED + 3;
    for i in 0..all {
        n.append(format!("sealed after the copy {i}").as_bytes())
            .unwrap();
        n.log.seal_now().unwrap().unwrap();
    }
    n.log.take_own(&later[0]).unwrap();
    let recovery = succeed(&n).unwrap();
    assert_eq!(quarantine(&disk).len(), all);
    assert_eq!(recovery.quarantined.len(), MAX_QUARANTINED_NAMED);
    assert_eq!(recovery.quarantined_more, 3);
    for path in &recovery.quarantined {
        assert!(path.len() <= MAX_QUARANTINED_PATH_BYTES, "{path}");
    }
    let first: serde_json::Value = serde_json::from_slice(&n.records()[0].1).unwrap();
    assert_eq!(
        first["quarantined"],
        serde_json::json!(recovery.quarantined)
    );
    assert_eq!(first["quarantined_more"], 3);
    assert_sound(&disk, &n);
}

#[test]
fn what_a_superseded_log_owes_is_recorded_by_the_next() {
    let settings = settings();
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    let ledger = n.root.ledger();
    // Denials are refused for want of room, and their count waits for it.
    ledger.set_ceiling(3 * common::MIB);
    let record = vec![b'r'; 60_000];
    let refused = (0..100).find_map(|_| n.append(&record).err());
    assert_eq!(refused, Some(AppendError::Capacity));
    ledger.set_ceiling(settings.ceiling);
    let oldest = n.store.first(&n.log.origin()).unwrap();
    n.log.take_own(&later[0]).unwrap();
    n.licensed_by(&oldest, &["n2"]);

    let short = |n: &Node| {
        n.root.ledger().set_ceiling(common::MIB);
        n.log.reclaim();
        n.root.ledger().set_ceiling(settings.ceiling);
        n.log.reclaim();
    };
    short(&n);
    n.append(b"meanwhile").unwrap();
    assert!(n.store.contains(&oldest.id), "nothing is evicted meanwhile");
    succeed(&n).unwrap();
    short(&n);
    n.append(b"on we go").unwrap();
    assert!(!n.store.contains(&oldest.id), "the control: now it is");
    let records: Vec<Vec<u8>> = n.records().into_iter().map(|(_, record)| record).collect();
    for told in ["\"type\":\"evicted\"", "\"type\":\"refused_at_capacity\""] {
        assert!(has(&records, told.as_bytes()), "{told}");
        assert!(!has(&quarantine(&disk), told.as_bytes()), "{told}");
    }
    assert_sound(&disk, &n);
}

/// A head that was signed for the old log must not stand in a mark of the new one, whoever signs when.
#[test]
fn writers_go_on_while_the_log_changes_to_the_next_incarnation() {
    let settings = Settings {
        inline: false,
        segment_bytes: 4 * common::MIB,
        ..settings()
    };
    let Restored { disk, later } = restored(&settings);
    let n = settings.sim(&disk);
    let ended = AtomicBool::new(false);
    let acknowledged: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (log, ended) = (&n.log, &ended);
                scope.spawn(move || {
                    let mut kept = Vec::new();
                    for i in 0.. {
                        let record = format!("writer {writer} record {i}.").into_bytes();
                        if log
                            .append_wait(RecordClass::Decision, record.clone(), LONG)
                            .is_ok()
                        {
                            kept.push(record);
                        }
                        if ended.load(Ordering::SeqCst) && i > 50 {
                            break;
                        }
                    }
                    kept
                })
            })
            .collect();
        for segment in &later {
            n.log.take_own(segment).unwrap();
        }
        succeed(&n).unwrap();
        ended.store(true, Ordering::SeqCst);
        writers
            .into_iter()
            .flat_map(|writer| writer.join().unwrap())
            .collect()
    });
    drop(n);
    disk.crash(Survival::None);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.new_incarnation, None, "{:?}", n.recovery);
    let mut kept = quarantine(&disk);
    kept.extend(n.records().into_iter().map(|(_, record)| record));
    for record in &acknowledged {
        assert!(has(&kept, record), "{}", String::from_utf8_lossy(record));
    }
    assert_sound(&disk, &n);
}
