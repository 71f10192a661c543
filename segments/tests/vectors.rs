//! The vectors of `tests/vectors/segments/`: bytes that any reader and writer of the formats must agree
//! on. This test makes them again and compares, reads them with the crate, and has them read by
//! `tests/vectors/segments/read.py`, which shares no code with the crate and follows
//! `docs/src/format.md` alone.
//!
//! `TIDELOCK_WRITE_VECTORS=1 cargo test -p tidelock-segments --test vectors` writes the files; a change
//! of a committed vector is a change of the format. (The `audit-v1-…` ones, `active-1`, `state-2` and `state-3` were
//! written by the last versions that wrote these formats and are only read. Compressed ones depend on the zstd library,
//! too: another version of it may write them otherwise, and readers do not care.)

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use common::{ROOT, Settings, domain, node, not_run, receipt};
use serde_json::{Value, json};
use tidelock_segments::testing::{SimDisk, unchecked_endorsement};
use tidelock_segments::{
    AuditLog, Charge, Compression, ConsistencyProof, CryptError, CustodyReceipt, Endorsement,
    KeyUnwrap, KeyWrap, Kind, LogKey, LogPublicKey, Origin, RecordClass, RecordProof, SealOptions,
    SegmentHeader, SegmentId, SegmentKey, SegmentRef, SiteKey, Store, VerifiedSegment, WrappedKey,
    merkle, origin_line, parse_body, prove_consistency, prove_record, read_records_with,
    seal_unsigned, verify_consistency_proof, verify_record_proof, verify_segment,
};

const NOW: u64 = 1_700_000_000_000;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors/segments")
}

fn unsigned(kind: Kind, origin: Origin, sequence: u64, body: &[u8]) -> Value {
    let header = SegmentHeader {
        kind,
        domain: domain(),
        origin,
        sequence,
        prev: None,
        created_unix_ms: 0,
    };
    let bytes = seal_unsigned(&header, body).unwrap();
    json!({
        "id": SegmentId::of(&bytes),
        "header": serde_json::to_value(&header).unwrap(),
        "body_hex": hex(body),
        "hex": hex(&bytes),
    })
}

const SITE_KEY: [u8; 32] = [0x51; 32];

fn site_key() -> SiteKey {
    SiteKey::from_slice(&SITE_KEY).unwrap()
}

/// The site key of the vectors, which hands out the same segment key again.
#[derive(Debug)]
struct Fixed;

impl KeyWrap for Fixed {
    fn fresh_key(&self) -> Result<SegmentKey, CryptError> {
        SegmentKey::from_slice(&[0x4b; 32])
    }

    fn wrap(&self, key: &SegmentKey) -> Result<Vec<WrappedKey>, CryptError> {
        site_key().wrap(key)
    }
}

/// A node with the log key of the vectors.
fn log_node(disk: &SimDisk, seal: SealOptions) -> common::Node {
    let settings = Settings {
        clock: Arc::new(AtomicU64::new(NOW)),
        // Which head a mark carries, and which file is used again, would be up to the threads.
        inline: true,
        seal,
        ..Settings::default()
    };
    let root = settings.open_root(disk.disk()).unwrap();
    root.write_atomic("keys/log.pk8", &key().to_pkcs8().unwrap(), Charge::Reserve)
        .unwrap();
    drop(root);
    settings.sim(disk)
}

const LOG_SEED: [u8; 32] = [7; 32];

fn key() -> LogKey {
    LogKey::from_seed(&LOG_SEED).unwrap()
}

fn seal(compression: Compression, encrypted: bool) -> SealOptions {
    SealOptions {
        compression,
        encryption: encrypted.then(|| Arc::new(Fixed) as Arc<dyn KeyWrap>),
        decryption: encrypted.then(|| Arc::new(site_key()) as Arc<dyn KeyUnwrap>),
    }
}

fn audit(segment: &VerifiedSegment) -> Value {
    let span = segment.audit_span().unwrap();
    let site = site_key();
    let held: Vec<_> = read_records_with(segment, Some(&site))
        .unwrap()
        .iter()
        .map(|(index, bytes)| {
            let text = String::from_utf8_lossy(bytes);
            json!({
                "index": index,
                "leaf": merkle::leaf_hash(bytes),
                "bytes": bytes.len(),
                "text_begins": text.chars().take(200).collect::<String>(),
            })
        })
        .collect();
    let body = parse_body(segment.body(), &domain(), &segment.header().origin).unwrap();
    let mut out = json!({
        "id": segment.id(),
        "header": serde_json::to_value(segment.header()).unwrap(),
        "body_version": body.version(),
        "encrypted": body.is_encrypted(),
        "raw_bytes": body.raw_bytes(),
        "stored_bytes": body.stored_bytes(),
        "first": span.first,
        "last": span.last,
        "root": span.root,
        "records": held,
        "hex": hex(segment.bytes()),
    });
    if body.is_encrypted() {
        out["site_key_hex"] = hex(&SITE_KEY).into();
    }
    out
}

/// A segment of several blocks: long records, one of the greatest length, and short ones.
fn many_blocks(seal: SealOptions) -> Value {
    let disk = SimDisk::new();
    let n = log_node(&disk, seal);
    for i in 0..8 {
        n.append(format!("{{\"n\":{i}}}").as_bytes()).unwrap();
    }
    n.append(&vec![b'x'; 65_535]).unwrap();
    for i in 0..10 {
        let pad = "p".repeat(3_000);
        n.append(format!("{{\"n\":{i},\"pad\":\"{pad}\"}}").as_bytes())
            .unwrap();
    }
    let sealed = n.log.seal_now().unwrap().unwrap();
    let segment = n.store.get(&sealed.id).unwrap();
    audit(&segment)
}

/// A log file. The seed of the log key is there because the salt is derived from it.
fn active_file(bytes: &[u8], sequence: u64, stale: bool, batches: &[Value]) -> Value {
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    json!({
        "file_bytes": bytes.len(),
        "log_seed_hex": hex(&LOG_SEED),
        "sequence": sequence,
        "stale": stale,
        "batches": batches,
        "hex_without_trailing_zeros": hex(&bytes[..used]),
    })
}

/// A log's first file, of several batches, after a clean end.
fn closed_file() -> Value {
    let disk = SimDisk::new();
    let n = log_node(&disk, seal(Compression::Off, false));
    let long = format!("{{\"n\":2,\"pad\":\"{}\"}}", "p".repeat(700));
    for text in ["{\"n\":1}", &long, "{\"n\":3}"] {
        n.append(text.as_bytes()).unwrap();
    }
    let begun = n.records().remove(0).1;
    n.log.close();
    let bytes = disk.content(&Path::new(ROOT).join("log/1-0.log")).unwrap();
    let batch = |at: u64, size: u64, records: &[&str]| json!({ "offset": at, "size": size, "records": records });
    let batches = [
        batch(4096, 0, &[std::str::from_utf8(&begun).unwrap()]),
        batch(4608, 1, &["{\"n\":1}"]),
        batch(5120, 2, &[&long]),
        batch(6144, 3, &["{\"n\":3}"]),
        batch(6656, 4, &[]),
    ];
    active_file(&bytes, 0, false, &batches)
}

/// The state of a log that was full and has evicted: a cursor, and an end of the sealed part.
fn evicted_state() -> Value {
    let disk = SimDisk::new();
    let settings = Settings {
        clock: Arc::new(AtomicU64::new(NOW)),
        ceiling: 8 * common::MIB,
        ..Settings::default()
    };
    let root = settings.open_root(disk.disk()).unwrap();
    root.write_atomic("keys/log.pk8", &key().to_pkcs8().unwrap(), Charge::Reserve)
        .unwrap();
    let store = Store::open(Arc::clone(&root), domain()).unwrap();
    let (log, _) = AuditLog::open_inline(root, Arc::clone(&store), settings.config(), &|key, n| {
        Ok(unchecked_endorsement(&node("n1"), key, n))
    })
    .unwrap();
    let append = || log.append_wait(RecordClass::Decision, vec![b'x'; 20_000], common::LONG);
    while append().is_ok() {}
    let oldest = store.own_audit(&node("n1")).remove(0);
    let segment = store.get(&oldest.id).unwrap();
    log.take_receipt(&receipt(&segment, "n2")).unwrap();
    append().unwrap();
    assert!(!store.contains(&oldest.id));
    let sealed = store.own_audit(&node("n1"));
    let span = segment.audit_span().unwrap();
    let cursor = json!({
        "origin": log.origin(), "min_index": span.last + 1, "min_sequence": 1, "root": span.root,
    });
    json!({
        "node": "n1",
        "origin": log.origin(),
        "incarnation": 1,
        "cursors": [cursor],
        "sealed_ids": sealed.iter().map(|r| r.id).collect::<Vec<_>>(),
        "superseded": false,
        "named": [],
        "contradicted": null,
        "hex": hex(&state_file(&disk)),
    })
}

fn state_file(disk: &SimDisk) -> Vec<u8> {
    disk.content(&Path::new(ROOT).join("log/state")).unwrap()
}

/// The states of a log of which a peer holds a later part: when it is seen and contradicts an own
/// segment, and of the next incarnation.
fn superseded_states() -> (Value, Value) {
    let disk = SimDisk::new();
    let n = log_node(&disk, seal(Compression::Off, false));
    n.append(b"{\"n\":1}").unwrap();
    let known = n.log.seal_now().unwrap().unwrap();
    drop(n);
    let copy = disk.fork();
    let n = log_node(&disk, seal(Compression::Off, false));
    n.append(b"{\"n\":2}").unwrap();
    let later = n.store.get(&n.log.seal_now().unwrap().unwrap().id).unwrap();
    let n = log_node(&copy, seal(Compression::Off, false));
    n.append(b"{\"n\":3}").unwrap();
    let own = n.log.seal_now().unwrap().unwrap();
    let state = |contradicted: Option<&SegmentRef>, named: Value, sealed: &[SegmentId]| {
        json!({
            "node": "n1",
            "origin": n.log.origin(),
            "incarnation": n.log.incarnation(),
            "cursors": [],
            "sealed_ids": sealed,
            "superseded": contradicted.is_some(),
            "named": named,
            "contradicted": contradicted.map(|own| json!({"sequence": own.sequence, "id": own.id})),
            "hex": hex(&state_file(&copy)),
        })
    };
    n.log.take_own(&later).unwrap();
    let seen = state(Some(&own), json!([]), &[known.id, own.id]);
    let name = node("n1");
    n.log
        .succeed(&|key, number| Ok(unchecked_endorsement(&name, key, number)))
        .unwrap();
    let size = later.audit_span().unwrap().last + 1;
    let named = json!([{"origin": known.origin, "size": size}]);
    (seen, state(None, named, &[]))
}

/// Every vector that is written, by file name.
fn vectors() -> Vec<(&'static str, Value)> {
    let (superseded, next) = superseded_states();
    let disk = SimDisk::new();
    let key = key();
    let n = log_node(&disk, seal(Compression::Off, false));
    n.append(b"{\"n\":1}").unwrap();
    let first = n.log.seal_now().unwrap().unwrap();
    n.append(b"{\"n\":2}").unwrap();
    n.append(b"{\"n\":3}").unwrap();
    let second = n.log.seal_now().unwrap().unwrap();
    n.append(b"{\"n\":4}").unwrap();
    let checkpoint = n.log.checkpoint();
    let held = receipt(&n.store.get(&first.id).unwrap(), "n2");
    let active = disk.content(&Path::new(ROOT).join("log/1-2.log")).unwrap();
    let endorsement = unchecked_endorsement(&node("n1"), &key.public(), 1);
    let (first, second) = (
        n.store.get(&first.id).unwrap(),
        n.store.get(&second.id).unwrap(),
    );
    let origin = n.log.origin();
    let body = |segment| parse_body(VerifiedSegment::body(segment), &domain(), &origin);
    let (one, two) = (body(&first).unwrap(), body(&second).unwrap());
    let line = origin_line(&domain(), &origin).unwrap();
    let log_key = hex(key.public().as_bytes());
    vec![
        (
            "policy",
            unsigned(
                Kind::Policy,
                Origin::policy("base").unwrap(),
                3,
                b"bundle bytes",
            ),
        ),
        (
            "revocation",
            unsigned(
                Kind::Revocation,
                Origin::crl(&[0x11; 32]),
                9,
                b"\x30\x03DER",
            ),
        ),
        ("audit-plain-first", audit(&first)),
        ("audit-plain-second", audit(&second)),
        ("audit-zstd", many_blocks(seal(Compression::Zstd, false))),
        (
            "audit-encrypted",
            many_blocks(seal(Compression::Zstd, true)),
        ),
        ("audit-encrypted-stored", {
            let disk = SimDisk::new();
            let n = log_node(&disk, seal(Compression::Off, true));
            n.append(b"{\"n\":1}").unwrap();
            let sealed = n.log.seal_now().unwrap().unwrap();
            audit(&n.store.get(&sealed.id).unwrap())
        }),
        (
            "receipt",
            json!({
                "fields": serde_json::to_value(&held).unwrap(),
                "message_hex": hex(&held.message()),
                "hex": hex(&held.encode().unwrap()),
            }),
        ),
        (
            "endorsement",
            json!({
                "message_hex": hex(&endorsement.signed_message()),
                "hex": hex(&endorsement.encode().unwrap()),
            }),
        ),
        (
            "checkpoint",
            json!({ "log_key_hex": log_key, "note": checkpoint }),
        ),
        (
            "active",
            active_file(
                &active,
                2,
                true,
                &[json!({ "offset": 4096, "size": 4, "records": ["{\"n\":4}"] })],
            ),
        ),
        ("active-closed", closed_file()),
        ("state", evicted_state()),
        ("state-superseded", superseded),
        ("state-next", next),
        (
            "proof-record",
            json!({
                "log_key_hex": log_key,
                "origin_line": line,
                "proof": prove_record(&two, 2, None).unwrap(),
            }),
        ),
        (
            "proof-consistency",
            json!({
                "log_key_hex": log_key,
                "origin_line": line,
                "proof": prove_consistency(one.checkpoint_note(), &[two], None).unwrap(),
            }),
        ),
    ]
}

/// The audit segments among the vectors.
const AUDIT: [&str; 7] = [
    "audit-v1-first",
    "audit-v1-second",
    "audit-plain-first",
    "audit-plain-second",
    "audit-zstd",
    "audit-encrypted",
    "audit-encrypted-stored",
];

fn committed(name: &str) -> Value {
    let path = dir().join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_committed_vectors_are_what_the_code_writes() {
    for (name, value) in vectors() {
        let path = dir().join(format!("{name}.json"));
        if std::env::var_os("TIDELOCK_WRITE_VECTORS").is_some() {
            std::fs::create_dir_all(dir()).unwrap();
            let text = serde_json::to_string_pretty(&value).unwrap();
            std::fs::write(&path, format!("{text}\n")).unwrap();
        }
        assert!(committed(name) == value, "{name} is written differently");
    }
}

fn public_key(value: &Value) -> LogPublicKey {
    let bytes = unhex(value["log_key_hex"].as_str().unwrap());
    LogPublicKey::from_bytes(bytes.try_into().unwrap())
}

#[test]
fn the_crate_reads_the_committed_vectors() {
    let site = site_key();
    for name in AUDIT.into_iter().chain(["policy", "revocation"]) {
        let vector = committed(name);
        let id: SegmentId = vector["id"].as_str().unwrap().parse().unwrap();
        let bytes = unhex(vector["hex"].as_str().unwrap());
        let segment = verify_segment(bytes, Some(id), &domain()).unwrap();
        assert_eq!(
            serde_json::to_value(segment.header()).unwrap(),
            vector["header"],
            "{name}"
        );
        if segment.header().kind != Kind::Audit {
            assert_eq!(vector["body_hex"], hex(segment.body()));
            continue;
        }
        let body = parse_body(segment.body(), &domain(), &segment.header().origin).unwrap();
        let log_key = segment.endorsement().unwrap().log_key;
        let tree = body.check_tree(&log_key, Some(&site)).unwrap();
        assert_eq!(vector["root"], tree.root().to_string(), "{name}");
        let leaves: Vec<Value> = read_records_with(&segment, Some(&site))
            .unwrap()
            .iter()
            .map(|(_, record)| merkle::leaf_hash(record).to_string().into())
            .collect();
        let listed: Vec<Value> = vector["records"]
            .as_array()
            .unwrap()
            .iter()
            .map(|record| record["leaf"].clone())
            .collect();
        assert_eq!(leaves, listed, "{name}");
    }
    let vector = committed("receipt");
    let bytes = unhex(vector["hex"].as_str().unwrap());
    let receipt = CustodyReceipt::decode(&bytes).unwrap();
    assert_eq!(receipt.verify_signature(), Ok(()));
    assert_eq!(serde_json::to_value(&receipt).unwrap(), vector["fields"]);
    let bytes = unhex(committed("endorsement")["hex"].as_str().unwrap());
    assert!(Endorsement::decode(&bytes).is_ok());
    let vector = committed("proof-record");
    let proof: RecordProof = serde_json::from_value(vector["proof"].clone()).unwrap();
    let line = vector["origin_line"].as_str().unwrap();
    assert!(verify_record_proof(&proof, &public_key(&vector), line).is_ok());
    let vector = committed("proof-consistency");
    let proof: ConsistencyProof = serde_json::from_value(vector["proof"].clone()).unwrap();
    assert!(verify_consistency_proof(&proof, &public_key(&vector), line).is_ok());
}

/// Runs the second reader; `None` if Python or a package that it needs is missing.
fn second_reader(dir: &Path) -> Option<(bool, String)> {
    let script = self::dir().join("read.py");
    let out = Command::new("python3").arg(script).arg(dir).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    // The script's own word for a missing package.
    (out.status.code() != Some(3)).then(|| (out.status.success(), text.into_owned()))
}

#[test]
fn a_second_reader_in_another_language_agrees() {
    let Some((good, text)) = second_reader(&dir()) else {
        return not_run(
            "a_second_reader_in_another_language_agrees",
            "needs python3 with the packages blake3, zstandard and cryptography",
        );
    };
    assert!(good, "{text}");
    let expected = AUDIT.len() + 16;
    assert!(text.contains(&format!("read {expected} vectors")), "{text}");
    // It is no rubber stamp: one changed digit in any vector is refused.
    for name in [
        "audit-zstd",
        "audit-encrypted",
        "receipt",
        "state",
        "state-2",
        "state-3",
        "state-superseded",
        "state-next",
    ] {
        let vector = committed(name);
        let middle = vector["hex"].as_str().unwrap().len() / 2;
        assert_refused(name, vector, "/hex", middle);
    }
    assert_refused(
        "proof-record",
        committed("proof-record"),
        "/proof/path/0",
        35,
    );
    // In a log file: magic, header, checksum of the mark, signature in it, root in it, the record, and
    // the zeros behind it. What lies behind the last batch of a file that was used before says nothing.
    let inside = [2, 40, 4100, 4130, 4200, 4236, 4400];
    for (name, places) in [
        ("active", inside.as_slice()),
        ("active-closed", inside.as_slice()),
        // The second sector of a long record, and the mark of the clean end.
        ("active-closed", &[5700, 6664, 6700, 6770]),
        ("active-1", &[2, 40, 4100, 4110]),
    ] {
        for byte in places {
            let file = "/hex_without_trailing_zeros";
            assert_refused(name, committed(name), file, 2 * byte);
        }
    }
}

/// Changes one digit of a text in the vector, and has it read.
fn assert_refused(name: &str, mut vector: Value, pointer: &str, at: usize) {
    let place = vector.pointer_mut(pointer).unwrap();
    let text = place.as_str().unwrap();
    let digit = if &text[at..=at] == "0" { "1" } else { "0" };
    *place = format!("{}{digit}{}", &text[..at], &text[at + 1..]).into();
    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join(format!("{name}.json"));
    std::fs::write(path, vector.to_string()).unwrap();
    let (good, _) = second_reader(copy.path()).unwrap();
    assert!(!good, "{name} at {at}");
}
