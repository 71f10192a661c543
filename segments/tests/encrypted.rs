//! Logs sealed to others: what goes on without the key, what the key opens, and what the `age` program
//! makes of it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::{ROOT, Settings, domain, not_run, receipt};
use tidelock_segments::testing::SimDisk;
use tidelock_segments::{
    AgeIdentity, AgeRecipients, AuditBody, BodyError, Compression, CryptError, CustodyReceipt,
    KeyUnwrap, KeyWrap, SealOptions, SegmentKey, SiteKey, VerifiedSegment, VerifyOptions,
    WrappedKey, parse_body, prove_record, read_records, read_records_with, verify_log,
    verify_log_with,
};

fn site(byte: u8) -> SiteKey {
    SiteKey::from_slice(&[byte; 32]).unwrap()
}

fn sealed_to(encryption: Arc<dyn KeyWrap>) -> Settings {
    Settings {
        seal: SealOptions {
            compression: Compression::Zstd,
            encryption: Some(encryption),
            decryption: None,
        },
        ..Settings::default()
    }
}

fn body(segment: &VerifiedSegment) -> AuditBody<'_> {
    parse_body(segment.body(), &domain(), &segment.header().origin).unwrap()
}

#[test]
fn a_log_sealed_to_others_goes_on_and_is_verified_without_the_key() {
    let disk = SimDisk::new();
    let settings = sealed_to(Arc::new(site(1)));
    let n = settings.sim(&disk);
    n.append(b"secret one").unwrap();
    let first = n.log.seal_now().unwrap().unwrap();
    n.append(b"secret two").unwrap();
    let second = n.log.seal_now().unwrap().unwrap();
    // The node itself cannot read it again, and does not need to.
    assert_eq!(n.records(), []);
    let origin = n.log.origin();
    drop(n);
    let n = settings.sim(&disk);
    assert_eq!((n.log.origin(), n.log.size()), (origin, 3));
    n.append(b"secret three").unwrap();
    n.log.seal_now().unwrap();

    // Nothing of it is on the disk in the clear; control: it would be found if it were.
    let held = |what: &[u8]| {
        disk.files().iter().any(|path| {
            let bytes = disk.content(path).unwrap();
            bytes.windows(what.len()).any(|part| part == what)
        })
    };
    assert!(!held(b"secret"));
    assert!(held(b"TIDESEG1"));

    // Without a key: verified, and said to be unread. With it: read. With another: a fault.
    let report = verify_log(&disk, Path::new(ROOT), &domain()).unwrap();
    let log = &report.origins[0];
    assert!(report.ok, "{report:?}");
    assert_eq!((log.segments, log.unread_segments), (3, 3));
    assert_eq!((log.records, log.unread_records), (4, 4));
    let with = |keys: &dyn KeyUnwrap| {
        let mut calls = Vec::new();
        let mut progress = |done| calls.push(done);
        let options = VerifyOptions {
            keys: Some(keys),
            progress: Some(&mut progress),
            ..VerifyOptions::default()
        };
        let report = verify_log_with(&disk, Path::new(ROOT), &domain(), options).unwrap();
        (report, calls)
    };
    let (report, calls) = with(&site(1));
    assert!(report.ok, "{report:?}");
    assert_eq!(report.origins[0].unread_records, 0);
    assert_eq!(calls.len(), 3);
    assert_eq!((calls[2].files, calls[2].files_total), (3, 3));
    assert_eq!(calls[2].records, 4);
    assert!(!with(&site(2)).0.ok);

    let (first, second) = (
        n.store.get(&first.id).unwrap(),
        n.store.get(&second.id).unwrap(),
    );
    assert_eq!(read_records(&first), Err(BodyError::Encrypted));
    let read = read_records_with(&second, Some(&site(1))).unwrap();
    assert_eq!(read, [(2, b"secret two".to_vec())]);
    assert_eq!(
        read_records_with(&second, Some(&site(2))),
        Err(BodyError::Crypt(CryptError::NoKey))
    );
    // A proof needs the key to be made and none to be checked.
    assert!(prove_record(&body(&second), 2, None).is_err());
    assert!(prove_record(&body(&second), 2, Some(&site(1))).is_ok());
    // The record that names the log before this one can be read by all, as ruling 7 needs it.
    let opening = body(&first).record(0, None).unwrap();
    assert!(String::from_utf8(opening).unwrap().contains("incarnation"));
    assert_eq!(body(&first).record(1, None), Err(BodyError::Encrypted));
    assert_eq!(
        body(&first).record(1, Some(&site(1))).unwrap(),
        b"secret one"
    );
}

#[test]
fn a_custodian_vouches_for_what_it_cannot_read_but_not_for_what_is_wrong() {
    let disk = SimDisk::new();
    let n = sealed_to(Arc::new(site(1))).sim(&disk);
    n.append(b"secret").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    let segment = n.store.get(&sealed.id).unwrap();
    let given = receipt(&segment, "n2");
    assert_eq!(given.root_at_last, segment.audit_span().unwrap().root);
    assert_eq!(given.verify_signature(), Ok(()));
    let bytes = given.encode().unwrap();
    assert_eq!(CustodyReceipt::decode(&bytes), Ok(given));
}

#[test]
fn a_node_that_holds_the_key_reads_its_own_sealed_records() {
    let disk = SimDisk::new();
    let mut settings = sealed_to(Arc::new(site(1)));
    settings.seal.decryption = Some(Arc::new(site(1)));
    let n = settings.sim(&disk);
    n.append(b"one").unwrap();
    n.log.seal_now().unwrap();
    n.append(b"two").unwrap();
    let texts: Vec<_> = n.records().into_iter().skip(1).collect();
    assert_eq!(texts, [(1, b"one".to_vec()), (2, b"two".to_vec())]);
}

#[test]
fn sealing_fails_closed_when_no_key_can_be_wrapped() {
    #[derive(Debug)]
    struct Refuses;
    impl KeyWrap for Refuses {
        fn wrap(&self, _: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
            Err(CryptError::Wrap("no".to_owned()))
        }
    }
    #[derive(Debug)]
    struct Nobody;
    impl KeyWrap for Nobody {
        fn wrap(&self, _: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
            Ok(Vec::new())
        }
    }
    for wrap in [Arc::new(Refuses) as Arc<dyn KeyWrap>, Arc::new(Nobody)] {
        let disk = SimDisk::new();
        let n = sealed_to(wrap).sim(&disk);
        n.append(b"secret").unwrap();
        assert!(n.log.seal_now().is_err());
        assert_eq!(n.store.own_audit(&common::node("n1")), []);
    }
}

/// A key that somebody recovered by other means.
#[derive(Debug)]
struct Recovered(Vec<u8>);

impl KeyUnwrap for Recovered {
    fn unwrap_key(&self, _: &[WrappedKey]) -> Result<SegmentKey, CryptError> {
        SegmentKey::from_slice(&self.0)
    }
}

#[test]
fn the_age_program_opens_what_we_seal_and_we_open_what_it_seals() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let run = |program: &str, args: &[&str]| {
        let out = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .output();
        out.ok().map(|out| {
            assert!(
                out.status.success(),
                "{program}: {}",
                String::from_utf8_lossy(&out.stderr)
            );
            out.stdout
        })
    };
    let Some(_) = run("age", &["--version"]) else {
        return not_run(
            "the_age_program_opens_what_we_seal_and_we_open_what_it_seals",
            "needs the program age",
        );
    };
    for name in ["one", "two"] {
        run("age-keygen", &["-o", name]).unwrap();
    }
    let recipients: Vec<String> = ["one", "two"]
        .iter()
        .map(|name| String::from_utf8(run("age-keygen", &["-y", name]).unwrap()).unwrap())
        .map(|text| text.trim().to_owned())
        .collect();
    let to_both = AgeRecipients::new(&recipients).unwrap();
    let disk = SimDisk::new();
    let n = sealed_to(Arc::new(to_both)).sim(&disk);
    n.append(b"secret").unwrap();
    let sealed = n.log.seal_now().unwrap().unwrap();
    let segment = n.store.get(&sealed.id).unwrap();
    let log_key = segment.endorsement().unwrap().log_key;
    let wrapped = body(&segment).wrapped_keys().to_vec();
    assert_eq!(wrapped.len(), 1);
    std::fs::write(at("wrapped"), &wrapped[0].bytes).unwrap();
    for name in ["one", "two"] {
        let key = run("age", &["--decrypt", "-i", name, "wrapped"]).unwrap();
        let checked = body(&segment).check_tree(&log_key, Some(&Recovered(key)));
        assert!(checked.is_ok(), "{checked:?}");
        let identity = AgeIdentity::parse(&std::fs::read_to_string(at(name)).unwrap()).unwrap();
        assert!(body(&segment).check_tree(&log_key, Some(&identity)).is_ok());
        // The other way round: a key that the program wrapped.
        std::fs::write(at("key"), [0x77; 32]).unwrap();
        let recipient = recipients[usize::from(name == "two")].as_str();
        run("age", &["-r", recipient, "-o", "by-age", "key"]).unwrap();
        let wrapped = [WrappedKey {
            scheme: WrappedKey::AGE,
            bytes: std::fs::read(at("by-age")).unwrap(),
        }];
        let key = identity.unwrap_key(&wrapped).unwrap();
        assert_eq!(key.expose_secret(), &[0x77; 32]);
    }
    // Somebody else's identity opens nothing.
    run("age-keygen", &["-o", "three"]).unwrap();
    let text = std::fs::read_to_string(at("three")).unwrap();
    let stranger = AgeIdentity::parse(&text).unwrap();
    assert_eq!(
        body(&segment).check_tree(&log_key, Some(&stranger)),
        Err(BodyError::Crypt(CryptError::NoKey))
    );
}
