//! The vectors of `tests/vectors/segments/`: bytes that any reader and writer of format version 1 must
//! agree on. This test makes them again and compares, then reads them with a second reader that shares
//! no code with the crate and follows `docs/src/format.md` alone.
//!
//! `TIDELOCK_WRITE_VECTORS=1 cargo test -p tidelock-segments --test vectors` writes the files; a change
//! of a committed vector is a change of the format.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use common::{ROOT, Settings, domain, node, receipt};
use serde_json::{Value, json};
use tidelock_segments::testing::{SimDisk, unchecked_endorsement};
use tidelock_segments::{
    Charge, Kind, LogKey, Origin, SegmentHeader, SegmentId, merkle, seal_unsigned, verify_segment,
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

/// Every vector, by file name.
fn vectors() -> Vec<(&'static str, Value)> {
    let disk = SimDisk::new();
    let settings = Settings {
        clock: Arc::new(AtomicU64::new(NOW)),
        ..Settings::default()
    };
    let key = LogKey::from_seed(&[7; 32]).unwrap();
    let root = settings.open_root(disk.disk()).unwrap();
    root.write_atomic("keys/log.pk8", &key.to_pkcs8().unwrap(), Charge::Reserve)
        .unwrap();
    drop(root);
    let n = settings.sim(&disk);
    n.append(b"{\"n\":1}").unwrap();
    let first = n.log.seal_now().unwrap().unwrap();
    n.append(b"{\"n\":2}").unwrap();
    n.append(b"{\"n\":3}").unwrap();
    let second = n.log.seal_now().unwrap().unwrap();
    n.append(b"{\"n\":4}").unwrap();
    let checkpoint = n.log.checkpoint();
    let records: Vec<_> = n.records();
    let audit = |id: &SegmentId| {
        let segment = n.store.get(id).unwrap();
        let span = segment.audit_span().unwrap();
        let held: Vec<_> = records
            .iter()
            .filter(|(index, _)| (span.first..=span.last).contains(index))
            .map(|(index, bytes)| {
                json!({
                    "index": index,
                    "leaf": merkle::leaf_hash(bytes),
                    "text": String::from_utf8_lossy(bytes),
                })
            })
            .collect();
        json!({
            "id": id,
            "header": serde_json::to_value(segment.header()).unwrap(),
            "first": span.first,
            "last": span.last,
            "root": span.root,
            "records": held,
            "hex": hex(segment.bytes()),
        })
    };
    let held = receipt(&n.store.get(&first.id).unwrap(), "n2");
    let active = disk.content(&Path::new(ROOT).join("log/1-2.log")).unwrap();
    let used = active.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let endorsement = unchecked_endorsement(&node("n1"), &key.public(), 1);
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
        ("audit-first", audit(&first.id)),
        ("audit-second", audit(&second.id)),
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
            json!({ "log_key_hex": hex(key.public().as_bytes()), "note": checkpoint }),
        ),
        (
            "active",
            json!({
                "file_bytes": active.len(),
                "first_index": 4,
                "records": ["{\"n\":4}"],
                "hex_without_trailing_zeros": hex(&active[..used]),
            }),
        ),
    ]
}

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
        assert_eq!(committed(name), value, "{name}");
    }
}

#[test]
fn the_crate_reads_the_committed_vectors() {
    for name in ["policy", "revocation", "audit-v1-first", "audit-v1-second"] {
        let vector = committed(name);
        let id: SegmentId = vector["id"].as_str().unwrap().parse().unwrap();
        let bytes = unhex(vector["hex"].as_str().unwrap());
        let segment = verify_segment(bytes, Some(id), &domain()).unwrap();
        assert_eq!(
            serde_json::to_value(segment.header()).unwrap(),
            vector["header"],
            "{name}"
        );
    }
}

/// Reads fields as `docs/src/format.md` describes them.
struct Reader {
    bytes: Vec<u8>,
    at: usize,
}

impl Reader {
    fn new(text: &Value) -> Self {
        Self {
            bytes: unhex(text.as_str().unwrap()),
            at: 0,
        }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let out = self.bytes[self.at..self.at + count].to_vec();
        self.at += count;
        out
    }

    fn number(&mut self, width: usize) -> u64 {
        let mut all = [0; 8];
        all[..width].copy_from_slice(&self.take(width));
        u64::from_le_bytes(all)
    }

    fn length(&mut self, width: usize) -> usize {
        usize::try_from(self.number(width)).unwrap()
    }

    fn sized(&mut self, width: usize) -> Vec<u8> {
        let length = self.length(width);
        self.take(length)
    }

    fn text(&mut self) -> String {
        String::from_utf8(self.sized(8)).unwrap()
    }

    fn header(&mut self) -> Value {
        let kind = ["", "revocation", "policy", "witness", "audit"][self.length(1)];
        let (domain, origin, sequence) = (self.text(), self.text(), self.number(8));
        let prev = match self.number(1) {
            0 => Value::Null,
            _ => Value::String(format!("blake3:{}", hex(&self.take(32)))),
        };
        json!({
            "kind": kind, "domain": domain, "origin": origin, "sequence": sequence,
            "prev": prev, "created_unix_ms": self.number(8),
        })
    }

    fn endorsement(&mut self) -> (String, Vec<u8>, u64) {
        let (node, key, incarnation) = (self.text(), self.take(32), self.number(8));
        for _ in 0..self.number(8) {
            self.sized(8);
        }
        self.number(2);
        self.sized(8);
        (node, key, incarnation)
    }
}

#[test]
fn an_independent_reader_agrees() {
    for name in ["policy", "revocation", "audit-v1-first", "audit-v1-second"] {
        let vector = committed(name);
        let mut file = Reader::new(&vector["hex"]);
        assert_eq!(
            vector["id"].as_str().unwrap(),
            format!("blake3:{}", blake3::hash(&file.bytes).to_hex())
        );
        assert_eq!(file.take(8), b"TIDESEG1");
        let header_len = file.length(4);
        let start = file.at;
        assert_eq!(file.header(), vector["header"]);
        assert_eq!(file.at - start, header_len);
        let body_len = file.length(8);
        let body_at = file.at;
        if vector["header"]["kind"] == "audit" {
            assert_eq!(file.number(2), 1);
            let (first, count) = (file.number(8), file.number(4));
            assert_eq!(vector["first"], first);
            assert_eq!(vector["last"], first + count - 1);
            file.take(32 * usize::try_from(first.count_ones()).unwrap());
            let note = String::from_utf8(file.sized(4)).unwrap();
            let lines: Vec<_> = note.split('\n').collect();
            let origin = vector["header"]["origin"].as_str().unwrap();
            assert_eq!(lines[0], origin.replacen("audit/", "tidelock/site/", 1));
            assert_eq!(lines[1], (first + count).to_string());
            for record in vector["records"].as_array().unwrap() {
                let text = String::from_utf8(file.sized(4)).unwrap();
                assert_eq!(record["text"], text);
                assert_eq!(
                    record["leaf"].as_str().unwrap(),
                    merkle::leaf_hash(text.as_bytes()).to_string()
                );
            }
        } else {
            assert_eq!(vector["body_hex"], hex(&file.take(body_len)));
        }
        assert_eq!(file.at, body_at + body_len);
        let signed = blake3::hash(&file.bytes[..file.at]);
        let trailer_len = file.length(4);
        let trailer_at = file.at;
        if file.number(1) == 1 {
            let (key, signature) = (file.take(32), file.take(64));
            let message = [b"tidelock segment v1\0".as_slice(), signed.as_bytes()].concat();
            let key = <[u8; 32]>::try_from(key).unwrap();
            let public = tidelock_segments::LogPublicKey::from_bytes(key);
            assert_eq!(public.verify(&message, &signature), Ok(()));
            assert_eq!(file.endorsement(), ("n1".to_owned(), key.to_vec(), 1));
        }
        assert_eq!(file.at, trailer_at + trailer_len);
        assert_eq!(file.at, file.bytes.len());
    }
}

#[test]
fn an_independent_reader_agrees_on_the_active_file() {
    let vector = committed("active");
    let mut file = Reader::new(&vector["hex_without_trailing_zeros"]);
    assert_eq!(file.take(8), b"TIDELOG1");
    let header_len = file.length(4);
    let crc = file.number(4);
    assert_eq!(
        crc,
        u64::from(crc32c::crc32c(&file.bytes[16..16 + header_len]))
    );
    let (domain, origin) = (file.text(), file.text());
    file.take(32);
    let sequence = file.number(8);
    if file.number(1) == 1 {
        file.take(32);
    }
    assert_eq!(vector["first_index"], file.number(8));
    for _ in 0..file.number(8) {
        file.take(32);
    }
    assert_eq!(vector["file_bytes"], file.number(8));
    assert_eq!(file.number(8), NOW);
    assert_eq!(file.at, 16 + header_len);

    let salt_hash = {
        let mut all = format!("{domain}\n{origin}\n").into_bytes();
        all.extend_from_slice(&sequence.to_le_bytes());
        tidelock_segments::Sha256Hash::of(&all)
    };
    let salt = u32::from_le_bytes(salt_hash.as_bytes()[..4].try_into().unwrap());
    file.at = 4096;
    let mut records = Vec::new();
    while file.at < file.bytes.len() {
        let offset = file.at as u64;
        let (length, crc) = (file.number(4), file.number(4));
        let mark = length & 0x8000_0000 != 0;
        let payload = file.take(usize::try_from(length & 0x7fff_ffff).unwrap());
        let length = u32::try_from(length).unwrap();
        let mut sum = crc32c::crc32c_append(salt, &offset.to_le_bytes());
        sum = crc32c::crc32c_append(sum, &length.to_le_bytes());
        assert_eq!(u64::from(crc32c::crc32c_append(sum, &payload)), crc);
        file.at = file.at.next_multiple_of(8);
        if mark {
            assert_eq!(payload.len(), 104);
        } else {
            records.push(Value::String(String::from_utf8(payload).unwrap()));
        }
    }
    assert_eq!(vector["records"], Value::Array(records));
}
