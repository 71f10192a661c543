//! Every byte counts: a sealed segment, a receipt and a stored log with one thing changed are refused.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{MIB, Node, ROOT, Settings, domain, foreign_segments, key_of, node, receipt};
use proptest::prelude::*;
use tidelock_segments::testing::{SimDisk, unchecked_endorsement};
use tidelock_segments::{
    AuditBody, AuditFault, AuditReport, BodyError, Charge, Checkpoint, Compression, CryptError,
    CustodyReceipt, Endorsement, FormatError, KeyUnwrap, Kind, LogKey, NodeId, Origin,
    ReceiptError, SealOptions, SegmentHeader, SegmentId, SiteKey, Store, VerifiedSegment,
    VerifyOptions, merkle, origin_line, parse_body, seal_signed, seal_unsigned, verify_log,
    verify_log_with, verify_segment,
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

/// The ways in which a log may be sealed.
fn seals() -> [SealOptions; 3] {
    let site = || Arc::new(SiteKey::from_slice(&[7; 32]).unwrap());
    [
        SealOptions {
            compression: Compression::Off,
            ..SealOptions::default()
        },
        SealOptions::default(),
        SealOptions {
            encryption: Some(site()),
            decryption: Some(site()),
            ..SealOptions::default()
        },
    ]
}

#[test]
fn every_flipped_byte_of_a_sealed_segment_is_seen() {
    every_flip_is_seen(audit_segment());
    for seal in seals() {
        let disk = SimDisk::new();
        let settings = Settings {
            seal,
            ..Settings::default()
        };
        let n = settings.sim(&disk);
        for i in 0..4 {
            n.append(format!("{{\"record\":{i}}}").as_bytes()).unwrap();
        }
        let sealed = n.log.seal_now().unwrap().unwrap();
        every_flip_is_seen(n.store.get(&sealed.id).unwrap());
    }
}

fn every_flip_is_seen(segment: VerifiedSegment) {
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
    // One batch of one sector, then the last mark, written at a clean end: it attests everything
    // below it.
    let last_mark = 4096 + 512;
    for at in (4096..last_mark).chain(0..60) {
        disk.flip(&path, at, 0x04);
        assert!(!faults(&disk).is_empty(), "byte {at}");
        disk.plant(&path, &good);
    }
    assert_eq!(faults(&disk), []);
}

// ---- re-made segments: what somebody could write who has a key

/// The parts of a body of version 2 without compression.
struct Parts {
    first: u64,
    before: Vec<u8>,
    note: String,
    after: Vec<u8>,
    records: Vec<Vec<u8>>,
}

impl Parts {
    fn of(body: &AuditBody<'_>) -> Self {
        let hashes = |frontier: &merkle::Frontier| {
            let all = frontier.hashes().iter();
            all.flat_map(|hash| *hash.as_bytes()).collect()
        };
        let mut reader = body.records(None).unwrap();
        let mut records = Vec::new();
        while let Some((_, record)) = reader.next_record().unwrap() {
            records.push(record.to_vec());
        }
        Self {
            first: body.span().first,
            before: hashes(body.frontier_before()),
            note: body.checkpoint_note().to_owned(),
            after: hashes(body.frontier_after().unwrap()),
            records,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut raw = Vec::new();
        for record in &self.records {
            raw.extend_from_slice(&u32::try_from(record.len()).unwrap().to_le_bytes());
            raw.extend_from_slice(record);
        }
        let (count, length) = (
            u32::try_from(self.records.len()).unwrap(),
            u32::try_from(raw.len()).unwrap(),
        );
        let mut out = 2u16.to_le_bytes().to_vec();
        out.extend_from_slice(&self.first.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&self.before);
        out.extend_from_slice(&u32::try_from(self.note.len()).unwrap().to_le_bytes());
        out.extend_from_slice(self.note.as_bytes());
        out.push(0);
        out.extend_from_slice(&self.after);
        for number in [1, 0, length, length] {
            out.extend_from_slice(&u32::to_le_bytes(number));
        }
        out.extend_from_slice(&raw);
        out
    }

    /// Signs a new checkpoint over the records as they are now.
    fn signed_again(mut self, body: &AuditBody<'_>, line: &str, key: &LogKey) -> Self {
        let mut tree = body.frontier_before().clone();
        for record in &self.records {
            tree.append(merkle::leaf_hash(record));
        }
        self.after = tree.hashes().iter().flat_map(|h| *h.as_bytes()).collect();
        self.note = Checkpoint {
            origin_line: line.to_owned(),
            size: tree.size(),
            root: tree.root(),
        }
        .sign(key);
        self
    }
}

/// A log with a known key: three segments of four records, and an active file.
fn forgeable() -> (SimDisk, Vec<VerifiedSegment>, LogKey) {
    let key = LogKey::from_seed(&[9; 32]).unwrap();
    let disk = SimDisk::new();
    let settings = Settings::default();
    let root = settings.open_root(disk.disk()).unwrap();
    root.write_atomic("keys/log.pk8", &key.to_pkcs8().unwrap(), Charge::Reserve)
        .unwrap();
    drop(root);
    let n = settings.sim(&disk);
    let mut segments = Vec::new();
    for s in 0..3 {
        for i in 0..4 {
            n.append(format!("{{\"segment\":{s},\"record\":{i}}}").as_bytes())
                .unwrap();
        }
        let sealed = n.log.seal_now().unwrap().unwrap();
        segments.push(n.store.get(&sealed.id).unwrap());
    }
    n.append(b"active").unwrap();
    (disk, segments, key)
}

fn body_of(segment: &VerifiedSegment) -> AuditBody<'_> {
    parse_body(segment.body(), &domain(), &segment.header().origin).unwrap()
}

fn path_of(id: &SegmentId) -> PathBuf {
    Path::new(ROOT).join(format!("segments/audit/{}.seg", id.hex()))
}

/// Every way to delete, duplicate, swap or change a record.
fn changes(records: &[Vec<u8>]) -> Vec<(String, Vec<Vec<u8>>)> {
    let mut out = Vec::new();
    for at in 0..records.len() {
        let mut change = |what: &str, apply: &dyn Fn(&mut Vec<Vec<u8>>)| {
            let mut changed = records.to_vec();
            apply(&mut changed);
            out.push((format!("{what} {at}"), changed));
        };
        change("deleted", &|r| drop(r.remove(at)));
        change("duplicated", &|r| r.insert(at, r[at].clone()));
        change("replaced by its neighbour", &|r| {
            r[at] = r[(at + 1) % r.len()].clone();
        });
        change("swapped", &|r| {
            let other = (at + 1) % r.len();
            r.swap(at, other);
        });
        change("changed", &|r| r[at][0] ^= 1);
    }
    out
}

#[test]
fn inv_17_records_that_the_checkpoint_does_not_cover_are_refused() {
    let (disk, segments, key) = forgeable();
    let segment = &segments[1];
    let (body, header) = (body_of(segment), segment.header());
    let endorsement = segment.endorsement().unwrap();
    // Control: taken apart and put together again, it is the same segment.
    let same = seal_signed(header, &Parts::of(&body).bytes(), &key, endorsement).unwrap();
    assert_eq!(SegmentId::of(&same), segment.id());
    assert_eq!(faults(&disk), []);

    let other_key = LogKey::from_seed(&[8; 32]).unwrap();
    for (what, records) in changes(&Parts::of(&body).records) {
        let mut parts = Parts::of(&body);
        parts.records = records;
        let bytes = parts.bytes();
        // By another key: not of this log, whatever endorsement comes with it.
        for endorsement in [
            endorsement.clone(),
            unchecked_endorsement(&node("n1"), &other_key.public(), 1),
        ] {
            assert!(matches!(
                seal_signed(header, &bytes, &other_key, &endorsement),
                Err(FormatError::Signer { .. })
            ));
        }
        // By the right key: the form shows it, or the tree does; and nobody vouches for it.
        let forged = seal_signed(header, &bytes, &key, endorsement).unwrap();
        match verify_segment(forged.clone(), None, &domain()) {
            Err(error) => assert!(
                matches!(error, FormatError::Body(BodyError::Size { .. })),
                "{what}: {error}"
            ),
            Ok(forged) => {
                let checked = body_of(&forged).check_tree(&key.public(), None);
                assert!(matches!(checked, Err(BodyError::Root { .. })), "{what}");
                let receipt = CustodyReceipt::issue(
                    &forged,
                    &node("n2"),
                    1,
                    &key_of("n2"),
                    &unchecked_endorsement(&node("n2"), &key_of("n2").public(), 1),
                );
                assert!(
                    matches!(receipt, Err(ReceiptError::Inconsistent { .. })),
                    "{what}"
                );
            }
        }
        // In the place of the good one: under its own name, and under the good one's.
        let good = disk.content(&path_of(&segment.id())).unwrap();
        for id in [SegmentId::of(&forged), segment.id()] {
            tidelock_segments::Disk::remove(&disk, &path_of(&segment.id())).unwrap();
            disk.plant(&path_of(&id), &forged);
            assert!(!faults(&disk).is_empty(), "{what}");
            tidelock_segments::Disk::remove(&disk, &path_of(&id)).unwrap();
            disk.plant(&path_of(&segment.id()), &good);
        }
    }
    assert_eq!(faults(&disk), []);
}

#[test]
fn inv_17_a_log_rewritten_with_its_own_key_contradicts_what_it_signed() {
    let (disk, segments, key) = forgeable();
    let line = origin_line(&domain(), &segments[0].header().origin).unwrap();
    for segment in &segments {
        let (body, header) = (body_of(segment), segment.header());
        let good = disk.content(&path_of(&segment.id())).unwrap();
        for (what, records) in changes(&Parts::of(&body).records) {
            let mut parts = Parts::of(&body);
            parts.records = records;
            let bytes = parts.signed_again(&body, &line, &key).bytes();
            let forged = seal_signed(header, &bytes, &key, segment.endorsement().unwrap()).unwrap();
            // By itself it is a good segment: only the log around it tells.
            let alone = verify_segment(forged.clone(), None, &domain()).unwrap();
            assert!(body_of(&alone).check_tree(&key.public(), None).is_ok());
            tidelock_segments::Disk::remove(&disk, &path_of(&segment.id())).unwrap();
            disk.plant(&path_of(&alone.id()), &forged);
            assert!(!faults(&disk).is_empty(), "{what}");
            // Beside the good one it is a fork.
            disk.plant(&path_of(&segment.id()), &good);
            let found = faults(&disk);
            assert!(
                found.iter().any(|f| matches!(f, AuditFault::Fork { .. })),
                "{what}: {found:?}"
            );
            tidelock_segments::Disk::remove(&disk, &path_of(&alone.id())).unwrap();
        }
    }
    assert_eq!(faults(&disk), []);
}

#[test]
fn every_block_is_held_to_its_index_and_its_place() {
    let site = || SiteKey::from_slice(&[7; 32]).unwrap();
    let seal = |encrypted: bool| SealOptions {
        compression: Compression::Off,
        encryption: encrypted.then(|| Arc::new(site()) as _),
        decryption: None,
    };
    let long = |name: &'static str, encrypted: bool| {
        let disk = SimDisk::new();
        let settings = Settings {
            node: name,
            seal: seal(encrypted),
            segment_bytes: MIB,
            ..Settings::default()
        };
        let n = settings.sim(&disk);
        for i in 0..30u8 {
            n.append(&[i; 10_000]).unwrap();
        }
        let sealed = n.log.seal_now().unwrap().unwrap();
        n.store.get(&sealed.id).unwrap()
    };
    // Control, and two blocks of one length swapped. In the clear the tree tells; sealed, the block.
    for encrypted in [false, true] {
        let segment = long("n1", encrypted);
        let key = segment.endorsement().unwrap().log_key;
        let keys = site();
        let keys: Option<&dyn KeyUnwrap> = encrypted.then_some(&keys);
        let body = body_of(&segment);
        assert!(body.check_tree(&key, keys).is_ok());
        let whole = segment.body();
        let tag = if encrypted { 16 } else { 0 };
        let block = 6 * 10_004 + tag;
        let end = whole.len();
        let mut swapped = whole.to_vec();
        let (a, b) = (end - 2 * block, end - block);
        swapped[a..b].copy_from_slice(&whole[b..end]);
        swapped[b..end].copy_from_slice(&whole[a..b]);
        assert_ne!(swapped, whole);
        let body = parse_body(&swapped, &domain(), &segment.header().origin).unwrap();
        let refused = body.check_tree(&key, keys);
        match encrypted {
            true => assert!(
                matches!(refused, Err(BodyError::Block { .. })),
                "{refused:?}"
            ),
            false => assert!(
                matches!(refused, Err(BodyError::Root { .. })),
                "{refused:?}"
            ),
        }
    }
    // The blocks of another segment that was sealed to the same site: another key, another front.
    let (one, other) = (long("n1", true), long("n2", true));
    let mut mixed = one.body().to_vec();
    let from = mixed.len() - 200_000;
    mixed[from..].copy_from_slice(&other.body()[other.body().len() - 200_000..]);
    let body = parse_body(&mixed, &domain(), &one.header().origin).unwrap();
    let key = one.endorsement().unwrap().log_key;
    assert!(matches!(
        body.check_tree(&key, Some(&site())),
        Err(BodyError::Block { .. })
    ));
    let stranger = SiteKey::from_slice(&[8; 32]).unwrap();
    assert_eq!(
        body_of(&one).check_tree(&key, Some(&stranger)),
        Err(BodyError::Crypt(CryptError::NoKey))
    );
}

#[test]
fn every_flipped_byte_of_a_body_is_refused_without_its_signature() {
    for seal in seals() {
        let disk = SimDisk::new();
        let keys = seal.decryption.clone();
        let compressed = seal.compression == Compression::Zstd;
        let settings = Settings {
            seal,
            ..Settings::default()
        };
        let n = settings.sim(&disk);
        for i in 0..6 {
            n.append(format!("{{\"record\":{i}}}").as_bytes()).unwrap();
        }
        let sealed = n.log.seal_now().unwrap().unwrap();
        let segment = n.store.get(&sealed.id).unwrap();
        let key = segment.endorsement().unwrap().log_key;
        let check = |bytes: &[u8]| {
            let body = parse_body(bytes, &domain(), &segment.header().origin)?;
            let tree = body.check_tree(&key, keys.as_deref())?;
            // What was read must be what is there: the records, not just the root.
            let mut reader = body.records(keys.as_deref())?;
            let mut count = 0;
            while reader.next_record()?.is_some() {
                count += 1;
            }
            assert_eq!(count, 7);
            Ok::<_, BodyError>((body.frontier_before().clone(), tree))
        };
        let good = check(segment.body()).unwrap();
        for at in 0..segment.body().len() {
            for bits in [0x01, 0x10, 0x80] {
                let mut bad = segment.body().to_vec();
                bad[at] ^= bits;
                // A zstd frame may say the same in other words; the records are then the same.
                if let Ok(read) = check(&bad) {
                    assert_eq!(read, good, "byte {at}");
                    assert!(compressed, "byte {at}");
                }
            }
        }
        for length in 0..segment.body().len() {
            assert!(check(&segment.body()[..length]).is_err(), "{length}");
        }
    }
}

// ---- files

fn report_with(disk: &SimDisk, seen: &[String]) -> AuditReport {
    let options = VerifyOptions {
        seen,
        ..VerifyOptions::default()
    };
    verify_log_with(disk, Path::new(ROOT), &domain(), options).unwrap()
}

fn sealed_paths(disk: &SimDisk) -> Vec<PathBuf> {
    let mut paths = disk.files();
    paths.retain(|path| path.extension().is_some_and(|e| e == "seg"));
    paths
}

#[test]
fn a_segment_file_flipped_or_cut_is_refused_by_the_store() {
    let (disk, segments, _) = forgeable();
    let id = segments[2].id();
    let path = path_of(&id);
    let good = disk.content(&path).unwrap();
    let open = || {
        let root = Settings::default().open_root(disk.disk()).unwrap();
        Store::open(root, domain()).map(|store| store.get(&id).map(|segment| segment.id()))
    };
    assert_eq!(open().unwrap().unwrap(), id);
    let refuse = |bad: &[u8], what: &str| {
        disk.plant(&path, bad);
        assert!(!faults(&disk).is_empty(), "{what}");
        // Refused at once, or when it is asked for; never served.
        if let Ok(Ok(served)) = open() {
            panic!("{what}: {served} was served");
        }
        for path in disk.files() {
            if path.to_string_lossy().contains("/quarantine/") {
                tidelock_segments::Disk::remove(&disk, &path).unwrap();
            }
        }
        disk.plant(&path, &good);
    };
    // What the store asks is `verify_segment`, which other tests here ask about every byte.
    for at in (0..good.len()).step_by(11) {
        let mut bad = good.clone();
        bad[at] ^= 0x04;
        refuse(&bad, &format!("byte {at}"));
        refuse(&good[..at], &format!("cut to {at}"));
    }
    assert_eq!(open().unwrap().unwrap(), id);
    assert_eq!(faults(&disk), []);
}

#[test]
fn the_active_file_and_the_state_cut_anywhere_are_seen() {
    let (disk, _, _) = forgeable();
    let active = |disk: &SimDisk| {
        let mut files = disk.files();
        files.retain(|p| p.extension().is_some_and(|e| e == "log"));
        files.remove(0)
    };
    let path = active(&disk);
    let good = disk.content(&path).unwrap();
    let used = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    for length in (0..used).chain((used..good.len()).step_by(509)) {
        disk.plant(&path, &good[..length]);
        assert!(!faults(&disk).is_empty(), "{length}");
    }
    disk.plant(&path, &good);
    let state = Path::new(ROOT).join("log/state");
    let good = disk.content(&state).unwrap();
    for length in 0..good.len() {
        disk.plant(&state, &good[..length]);
        assert!(!faults(&disk).is_empty(), "{length}");
        let mut bad = good.clone();
        bad[length] ^= 1;
        disk.plant(&state, &bad);
        assert!(!faults(&disk).is_empty(), "{length}");
    }
    disk.plant(&state, &good);
    assert_eq!(faults(&disk), []);
}

/// A copy of everything, to come back to.
fn copy(disk: &SimDisk) -> Vec<(PathBuf, Vec<u8>)> {
    disk.files()
        .into_iter()
        .map(|path| {
            let bytes = disk.content(&path).unwrap();
            (path, bytes)
        })
        .collect()
}

fn restore(disk: &SimDisk, files: &[(PathBuf, Vec<u8>)]) {
    for path in disk.files() {
        if !files.iter().any(|(kept, _)| *kept == path) {
            tidelock_segments::Disk::remove(disk, &path).unwrap();
        }
    }
    for (path, bytes) in files {
        disk.plant(path, bytes);
    }
}

#[test]
fn inv_17_a_log_rolled_back_to_an_older_copy_is_seen_by_whoever_saw_it_newer() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    let mut copies = Vec::new();
    let mut notes = Vec::new();
    for i in 0..4 {
        n.append(format!("record {i}").as_bytes()).unwrap();
        notes.push(n.log.checkpoint());
        copies.push(copy(&disk));
        n.append(b"more").unwrap();
        n.log.seal_now().unwrap();
    }
    n.append(b"last").unwrap();
    notes.push(n.log.checkpoint());
    drop(n);
    let newest = copy(&disk);
    // Control: every checkpoint that was ever signed fits, inside segments, at their ends, in the
    // active file.
    let report = report_with(&disk, &notes);
    assert!(report.ok, "{report:?}");
    assert!(report.origins[0].uncompared.is_empty());
    for (i, older) in copies.iter().enumerate() {
        // The whole root. By itself the copy is a good log; what was seen tells, and what was not yet
        // written down then is no alarm.
        restore(&disk, older);
        assert!(report_with(&disk, &notes[..=i]).ok);
        let report = report_with(&disk, &notes);
        assert!(
            report.origins[0]
                .faults
                .iter()
                .any(|f| matches!(f, AuditFault::Contradicts { .. })),
            "{report:?}"
        );
        // Single files: an older active file, an older set of segments.
        restore(&disk, &newest);
        for path in sealed_paths(&disk) {
            if !older.iter().any(|(kept, _)| *kept == path) {
                tidelock_segments::Disk::remove(&disk, &path).unwrap();
            }
        }
        assert!(!faults(&disk).is_empty(), "{i}: segments rolled back");
        restore(&disk, &newest);
    }
    // Another log's checkpoint, one by another key, one that is none.
    let other = LogKey::from_seed(&[3; 32]).unwrap();
    let size_one = |line: String, key: &LogKey| {
        let root = merkle::leaf_hash(b"other");
        Checkpoint {
            origin_line: line,
            size: 1,
            root,
        }
        .sign(key)
    };
    let line = notes[0].lines().next().unwrap().to_owned();
    for note in [
        size_one(line, &other),
        size_one("tidelock/site/n9/0000000000000000/1".to_owned(), &other),
        "nothing".to_owned(),
    ] {
        assert!(!report_with(&disk, &[note]).ok);
    }
    assert!(report_with(&disk, &notes).ok);
}

#[test]
fn inv_17_a_log_of_the_same_key_with_other_records_contradicts_the_checkpoint() {
    let run = |text: &[u8]| {
        let key = LogKey::from_seed(&[9; 32]).unwrap();
        let disk = SimDisk::new();
        let settings = Settings::default();
        let root = settings.open_root(disk.disk()).unwrap();
        root.write_atomic("keys/log.pk8", &key.to_pkcs8().unwrap(), Charge::Reserve)
            .unwrap();
        drop(root);
        let n = settings.sim(&disk);
        n.append(text).unwrap();
        let inside = n.log.checkpoint();
        n.append(b"after").unwrap();
        n.log.seal_now().unwrap();
        (disk, [inside, n.log.checkpoint()])
    };
    let (one, seen) = run(b"one");
    let (other, _) = run(b"other");
    assert!(report_with(&one, &seen).ok);
    for note in &seen {
        let report = report_with(&other, std::slice::from_ref(note));
        assert!(
            matches!(
                report.origins[0].faults[..],
                [AuditFault::Contradicts { .. }]
            ),
            "{report:?}"
        );
    }
}

#[test]
fn receipts_swapped_between_segments_license_nothing() {
    let disk = SimDisk::new();
    let settings = Settings {
        custody: 1,
        ..Settings::default()
    };
    let n = settings.sim(&disk);
    let seal = |text: &[u8]| {
        n.append(text).unwrap();
        let reference = n.log.seal_now().unwrap().unwrap();
        n.store.get(&reference.id).unwrap()
    };
    let (one, two) = (seal(b"one"), seal(b"two"));
    let licensed = |n: &Node, segment: &VerifiedSegment| n.log.is_licensed(&segment.id(), u64::MAX);
    n.log.take_receipt(&receipt(&one, "n2")).unwrap();
    assert!(licensed(&n, &one) && !licensed(&n, &two));
    // Its fields changed to name the other segment: no signature covers that.
    let mut moved = receipt(&one, "n2");
    moved.segment_id = two.id();
    assert_eq!(moved.verify_signature(), Err(ReceiptError::Signature));
    assert!(n.log.take_receipt(&moved).is_err());
    drop(n);
    // The files under `receipts` renamed from one segment to the other.
    let hex = |segment: &VerifiedSegment| segment.id().hex();
    for path in disk.files() {
        let text = path.to_string_lossy().into_owned();
        if text.contains("/receipts/") && text.contains(&hex(&one)) {
            let bytes = disk.content(&path).unwrap();
            disk.plant(Path::new(&text.replace(&hex(&one), &hex(&two))), &bytes);
            tidelock_segments::Disk::remove(&disk, &path).unwrap();
        }
    }
    let n = settings.sim(&disk);
    assert!(!licensed(&n, &one) && !licensed(&n, &two));
}

#[test]
fn clock_jumps_raise_no_alarm() {
    let disk = SimDisk::new();
    let settings = Settings::default();
    let n = settings.sim(&disk);
    let mut notes = Vec::new();
    for unix_ms in [1_700_000_000_000, 5, u64::MAX, 0, 1_600_000_000_000] {
        settings.clock.store(unix_ms, Ordering::SeqCst);
        n.append(b"record").unwrap();
        n.log.seal_now().unwrap();
        notes.push(n.log.checkpoint());
    }
    drop(n);
    settings.clock.store(1, Ordering::SeqCst);
    let n = settings.sim(&disk);
    assert_eq!(n.recovery.quarantined, Vec::<String>::new());
    assert_eq!(n.recovery.new_incarnation, None);
    assert_eq!(n.log.size(), 6);
    let report = report_with(&disk, &notes);
    assert!(report.ok, "{report:?}");
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
