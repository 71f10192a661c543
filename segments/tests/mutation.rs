//! Every byte counts: a sealed segment, a receipt and a stored log with one thing changed are refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};

use common::{ROOT, Settings, domain, foreign_segments, key_of, node, receipt};
use proptest::prelude::*;
use tidelock_segments::testing::{SimDisk, unchecked_endorsement};
use tidelock_segments::{
    AuditFault, CustodyReceipt, Endorsement, FormatError, Kind, LogKey, NodeId, Origin,
    SegmentHeader, SegmentId, VerifiedSegment, seal_signed, seal_unsigned, verify_log,
    verify_segment,
};

fn policy_header() -> SegmentHeader {
    SegmentHeader {
        kind: Kind::Policy,
        domain: domain(),
        origin: Origin::policy("base").unwrap(),
        sequence: 1,
        prev: None,
        created_unix_ms: 0,
    }
}

fn audit_segment() -> VerifiedSegment {
    foreign_segments("n9", 2).remove(1)
}

#[test]
fn every_flipped_byte_of_a_sealed_segment_is_seen() {
    let segment = audit_segment();
    let id = segment.id();
    let bytes = segment.into_bytes();
    assert!(verify_segment(bytes.clone(), Some(id), &domain()).is_ok());
    for at in 0..bytes.len() {
        for bits in [0x01, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= bits;
            // Under its name it is another content; without a name the signature and the strict
            // form have to tell.
            assert!(
                matches!(
                    verify_segment(bad.clone(), Some(id), &domain()),
                    Err(FormatError::WrongId { .. })
                ),
                "byte {at}"
            );
            // The endorsement's certificate part is not covered by the log key's signature: the
            // certificate key signed it, and the transport checks that.
            if let Ok(other) = verify_segment(bad, None, &domain()) {
                assert_eq!(
                    other.body(),
                    verify_segment(bytes.clone(), None, &domain())
                        .unwrap()
                        .body()
                );
                assert_ne!(
                    other.endorsement().unwrap(),
                    &endorsement_in(&bytes),
                    "byte {at}"
                );
            }
        }
    }
}

fn endorsement_in(bytes: &[u8]) -> Endorsement {
    verify_segment(bytes.to_vec(), None, &domain())
        .unwrap()
        .endorsement()
        .unwrap()
        .clone()
}

#[test]
fn every_truncation_and_any_bytes_after_are_seen() {
    for bytes in [
        audit_segment().into_bytes(),
        seal_unsigned(&policy_header(), b"body").unwrap(),
    ] {
        let good = verify_segment(bytes.clone(), None, &domain());
        assert!(good.is_ok());
        for length in 0..bytes.len() {
            assert!(
                verify_segment(bytes[..length].to_vec(), None, &domain()).is_err(),
                "{length}"
            );
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(verify_segment(longer, None, &domain()).is_err());
    }
}

#[test]
fn the_rules_of_each_kind() {
    let key = LogKey::from_seed(&[1; 32]).unwrap();
    let n1 = node("n1");
    let endorsement = unchecked_endorsement(&n1, &key.public(), 1);
    let audit = SegmentHeader {
        kind: Kind::Audit,
        origin: Origin::audit(&n1, &key.public(), 1),
        ..policy_header()
    };
    // Policy and revocation are alike for all who make them.
    let good = policy_header();
    assert!(seal_unsigned(&good, b"x").is_ok());
    for bad in [
        SegmentHeader {
            created_unix_ms: 1,
            ..good.clone()
        },
        SegmentHeader {
            prev: Some(SegmentId::of(b"p")),
            ..good.clone()
        },
    ] {
        assert_eq!(
            seal_unsigned(&bad, b"x"),
            Err(FormatError::NotDeterministic { kind: Kind::Policy })
        );
    }
    assert_eq!(
        seal_signed(&good, b"x", &key, &endorsement),
        Err(FormatError::NotDeterministic { kind: Kind::Policy })
    );
    // Kind and origin agree.
    let crossed = SegmentHeader {
        kind: Kind::Revocation,
        ..good
    };
    assert!(matches!(
        seal_unsigned(&crossed, b"x"),
        Err(FormatError::KindOrigin { .. })
    ));
    // Audit is signed, by the key that the origin names, and linked.
    assert_eq!(seal_unsigned(&audit, b"x"), Err(FormatError::Unsigned));
    let linked = SegmentHeader {
        prev: Some(SegmentId::of(b"p")),
        ..audit.clone()
    };
    assert!(seal_signed(&linked, b"x", &key, &endorsement).is_ok());
    let unlinked = SegmentHeader {
        sequence: 1,
        ..audit.clone()
    };
    assert_eq!(
        seal_signed(&unlinked, b"x", &key, &endorsement),
        Err(FormatError::Link { sequence: 1 })
    );
    let first_linked = SegmentHeader {
        sequence: 0,
        ..linked.clone()
    };
    assert_eq!(
        seal_signed(&first_linked, b"x", &key, &endorsement),
        Err(FormatError::Link { sequence: 0 })
    );
    let other_key = LogKey::from_seed(&[2; 32]).unwrap();
    let others: [(&LogKey, Endorsement); 4] = [
        (
            &other_key,
            unchecked_endorsement(&n1, &other_key.public(), 1),
        ),
        (&key, unchecked_endorsement(&n1, &other_key.public(), 1)),
        (
            &key,
            unchecked_endorsement(&NodeId::new("n2").unwrap(), &key.public(), 1),
        ),
        (&key, unchecked_endorsement(&n1, &key.public(), 2)),
    ];
    for (key, endorsement) in others {
        assert!(matches!(
            seal_signed(&linked, b"x", key, &endorsement),
            Err(FormatError::Signer { .. })
        ));
    }
    // What is signed and well-formed, but is no audit body, is refused by the reader.
    let bytes = seal_signed(&linked, b"not a body", &key, &endorsement).unwrap();
    assert!(matches!(
        verify_segment(bytes, None, &domain()),
        Err(FormatError::Body(_))
    ));
}

#[test]
fn every_flipped_byte_of_a_receipt_is_seen() {
    let segment = audit_segment();
    let good = receipt(&segment, "n2");
    let bytes = good.encode().unwrap();
    assert_eq!(CustodyReceipt::decode(&bytes), Ok(good.clone()));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let Ok(other) = CustodyReceipt::decode(&bad) else {
            continue;
        };
        if other.verify_signature().is_ok() {
            // Only what the certificate key signed may differ, which the transport checks.
            let same = CustodyReceipt {
                endorsement: good.endorsement.clone(),
                ..other.clone()
            };
            assert_eq!(same, good, "byte {at}");
            assert_ne!(other.endorsement, good.endorsement);
        }
    }
    let mut moved = good;
    moved.custodian = node("n3");
    moved.endorsement = unchecked_endorsement(&node("n3"), &key_of("n2").public(), 1);
    assert!(moved.verify_signature().is_err());
}

/// A small log of three segments and an active file.
fn stored_log() -> (SimDisk, Vec<PathBuf>) {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let mut paths = Vec::new();
    for i in 0..3 {
        n.append(format!("record {i}").as_bytes()).unwrap();
        let sealed = n.log.seal_now().unwrap().unwrap();
        paths.push(Path::new(ROOT).join(format!("segments/audit/{}.seg", sealed.id.hex())));
    }
    n.append(b"active").unwrap();
    drop(n);
    (disk, paths)
}

fn faults(disk: &SimDisk) -> Vec<AuditFault> {
    let report = verify_log(disk, Path::new(ROOT), &domain()).unwrap();
    let mut all = report.faults;
    all.extend(report.origins.into_iter().flat_map(|origin| origin.faults));
    assert_eq!(report.ok, all.is_empty());
    all
}

#[test]
fn verify_log_sees_a_changed_a_missing_and_a_swapped_segment() {
    let (disk, paths) = stored_log();
    assert_eq!(faults(&disk), []);
    for path in &paths {
        let good = disk.content(path).unwrap();
        for at in (0..good.len()).step_by(37) {
            disk.flip(path, at, 0x20);
            assert!(!faults(&disk).is_empty(), "{path:?} byte {at}");
            disk.plant(path, &good);
        }
        tidelock_segments::Disk::remove(&disk, path).unwrap();
        assert!(
            faults(&disk)
                .iter()
                .any(|fault| matches!(fault, AuditFault::Missing { .. })),
            "{path:?}"
        );
        disk.plant(path, &good);
    }
    let (a, b) = (
        disk.content(&paths[0]).unwrap(),
        disk.content(&paths[1]).unwrap(),
    );
    disk.plant(&paths[0], &b);
    disk.plant(&paths[1], &a);
    assert_eq!(
        faults(&disk)
            .iter()
            .filter(|f| matches!(f, AuditFault::Segment { .. }))
            .count(),
        2
    );
    disk.plant(&paths[0], &a);
    disk.plant(&paths[1], &b);
    assert_eq!(faults(&disk), []);
}

#[test]
fn verify_log_sees_every_flipped_byte_of_what_marks_attest() {
    let (disk, _) = stored_log();
    let path = disk
        .files()
        .into_iter()
        .find(|p| p.extension().is_some_and(|e| e == "log"))
        .unwrap();
    let good = disk.content(&path).unwrap();
    let end = good.iter().rposition(|byte| *byte != 0).unwrap();
    // The last mark, written at a clean end, attests everything below it.
    let last_mark = end - 111;
    for at in (4096..last_mark).chain(0..60) {
        disk.flip(&path, at, 0x04);
        assert!(!faults(&disk).is_empty(), "byte {at}");
        disk.plant(&path, &good);
    }
    assert_eq!(faults(&disk), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// No input makes a decoder panic or accept what it would not write.
    #[test]
    fn decoders_survive_anything(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = verify_segment(bytes.clone(), None, &domain());
        if let Ok(endorsement) = Endorsement::decode(&bytes) {
            prop_assert_eq!(endorsement.encode().unwrap(), bytes.clone());
        }
        if let Ok(receipt) = CustodyReceipt::decode(&bytes) {
            prop_assert_eq!(receipt.encode().unwrap(), bytes);
        }
    }

    /// The same with bytes that begin well.
    #[test]
    fn a_segment_with_a_spliced_part_is_refused(
        at in 0usize..2000, part in proptest::collection::vec(any::<u8>(), 1..40)
    ) {
        let good = seal_unsigned(&policy_header(), &[3; 500]).unwrap();
        let id = SegmentId::of(&good);
        let at = at % good.len();
        let mut bad = good.clone();
        bad.splice(at..(at + part.len()).min(good.len()), part.iter().copied());
        prop_assert_eq!(verify_segment(bad.clone(), Some(id), &domain()).is_ok(), bad == good);
    }
}
