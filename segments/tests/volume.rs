//! Volumes: what goes in comes out, every change and every cut is found, and what lies before it is of use.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;

use common::{domain, foreign_segments, node, not_run};
use serde_json::{Value, json};
use tidelock_segments::limits::{MAX_VOLUME_BYTES, MAX_VOLUME_ENTRIES};
use tidelock_segments::volume::{
    AgeReader, AgeWriter, EntryMark, ReceiptMark, VolumeEntry, VolumeError, VolumeHeader,
    VolumeList, VolumeReader, VolumeWriter,
};
use tidelock_segments::{
    AgeIdentity, AgeRecipients, CryptError, Origin, SegmentId, testing::unsigned_segment,
    verify_segment,
};

const RECIPIENT: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
const IDENTITY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
/// A key that the volumes here are not to.
const OTHER_RECIPIENT: &str = "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg";

fn header(number: u32) -> VolumeHeader {
    VolumeHeader {
        domain: domain(),
        exporter: node("n1"),
        addressee: Some(node("n2")),
        export_id: [7; 16],
        number,
        created_unix_ms: 1_700_000_000_000,
    }
}

fn segment(sequence: u64, body: &[u8]) -> VolumeEntry {
    let base = Origin::policy("base").unwrap();
    let bytes = unsigned_segment(&domain(), base, sequence, body).unwrap();
    let segment = verify_segment(bytes, None, &domain()).unwrap();
    VolumeEntry {
        mark: EntryMark::Segment(segment.reference()),
        bytes: segment.into_bytes(),
    }
}

fn entries() -> Vec<VolumeEntry> {
    let receipt = VolumeEntry {
        mark: EntryMark::Receipt(ReceiptMark {
            segment_id: SegmentId::of(b"some segment"),
            custodian: node("n3"),
        }),
        bytes: b"the bytes of a receipt".to_vec(),
    };
    vec![segment(1, b"one"), receipt, segment(2, b"two, longer")]
}

fn volume(entries: &[VolumeEntry], last: bool) -> Vec<u8> {
    let mut writer = VolumeWriter::new(Vec::new(), &header(1)).unwrap();
    for entry in entries {
        writer.push(entry).unwrap();
    }
    let foretold = writer.bytes();
    let bytes = writer.finish(last).unwrap();
    assert_eq!(foretold, bytes.len() as u64);
    bytes
}

/// What is read of a volume before it ends or fails.
fn read(bytes: &[u8]) -> (Vec<VolumeEntry>, Result<bool, VolumeError>) {
    let mut reader = match VolumeReader::open(bytes) {
        Ok(reader) => reader,
        Err(error) => return (Vec::new(), Err(error)),
    };
    let mut read = Vec::new();
    loop {
        match reader.next_entry() {
            Ok(Some(entry)) => read.push(entry),
            Ok(None) => return (read, Ok(reader.is_last().unwrap())),
            Err(error) => {
                assert_eq!(reader.next_entry(), Err(error.clone()), "it stays so");
                return (read, Err(error));
            }
        }
    }
}

#[test]
fn what_is_written_is_read_again() {
    for last in [false, true] {
        let bytes = volume(&entries(), last);
        assert_eq!(read(&bytes), (entries(), Ok(last)));
        let reader = VolumeReader::open(bytes.as_slice()).unwrap();
        assert_eq!(*reader.header(), header(1));
        assert_eq!(reader.is_last(), None, "not known before the end");
    }
    assert_eq!(read(&volume(&[], true)), (Vec::new(), Ok(true)));
}

#[test]
fn a_flipped_byte_at_every_place_is_found_and_what_is_before_it_is_sound() {
    let all = entries();
    let bytes = volume(&all, true);
    for at in 0..bytes.len() {
        for bit in [1, 0x80] {
            let mut bad = bytes.clone();
            bad[at] ^= bit;
            let (sound, end) = read(&bad);
            assert!(end.is_err(), "byte {at}");
            assert_eq!(sound[..], all[..sound.len()], "byte {at}");
        }
    }
}

#[test]
fn a_cut_at_every_place_is_found_and_what_is_before_it_is_sound() {
    let all = entries();
    let bytes = volume(&all, true);
    let mut most = 0;
    for length in 0..bytes.len() {
        let (sound, end) = read(&bytes[..length]);
        assert!(
            matches!(end, Err(VolumeError::Torn { .. })),
            "{length}: {end:?}"
        );
        assert_eq!(sound[..], all[..sound.len()], "length {length}");
        assert!(sound.len() >= most, "more bytes, not fewer entries");
        most = sound.len();
    }
    assert_eq!(most, all.len(), "only the index is missing in the end");
    let mut longer = bytes;
    longer.push(0);
    assert_eq!(read(&longer), (all, Err(VolumeError::Trailing)));
}

#[test]
fn an_entry_in_another_volume_or_place_is_found() {
    let (one, two) = (volume(&entries(), true), {
        let mut writer = VolumeWriter::new(Vec::new(), &header(2)).unwrap();
        for entry in entries() {
            writer.push(&entry).unwrap();
        }
        writer.finish(true).unwrap()
    });
    assert_eq!(one.len(), two.len());
    // The front of one, the entries of the other.
    let front = 8 + 4 + usize::from(one[8]) + 32;
    let mixed = [&one[..front], &two[front..]].concat();
    assert!(matches!(read(&mixed), (none, Err(VolumeError::Damaged { .. })) if none.is_empty()));
    assert!(read(&two).1.is_ok());
}

#[test]
fn inv_07_a_lying_length_costs_no_more_memory_than_there_are_bytes() {
    let bytes = volume(&entries(), true);
    let front = 8 + 4 + usize::from(bytes[8]) + 32;
    for (length, expected) in [(32 << 20, "torn"), (u32::MAX, "long")] {
        let mut bad = bytes.clone();
        bad[front + 5..front + 9].copy_from_slice(&u32::to_le_bytes(length));
        let end = read(&bad).1.unwrap_err();
        match expected {
            "torn" => assert!(matches!(end, VolumeError::Torn { .. }), "{end:?}"),
            _ => assert!(matches!(end, VolumeError::TooLong { .. }), "{end:?}"),
        }
    }
    let mut bad = bytes.clone();
    bad[8..12].copy_from_slice(&u32::to_le_bytes(513));
    assert!(matches!(
        read(&bad).1,
        Err(VolumeError::TooLong { max: 512, .. })
    ));
}

#[test]
fn an_entry_is_what_its_mark_names_or_it_is_not() {
    let [one, receipt, two] = <[_; 3]>::try_from(entries()).unwrap();
    assert!(one.is_as_marked() && two.is_as_marked());
    assert!(!receipt.is_as_marked(), "those bytes are no receipt");
    let swapped = VolumeEntry {
        mark: one.mark,
        bytes: two.bytes,
    };
    assert!(!swapped.is_as_marked());

    let segment = foreign_segments("n2", 1).remove(0);
    let mut receipt = common::receipt(&segment, "n3");
    let bytes = receipt.encode().unwrap();
    let marked = |segment_id: SegmentId, custodian: &str, bytes: &[u8]| {
        let mark = ReceiptMark {
            segment_id,
            custodian: node(custodian),
        };
        VolumeEntry {
            mark: EntryMark::Receipt(mark),
            bytes: bytes.to_vec(),
        }
        .is_as_marked()
    };
    assert!(marked(segment.id(), "n3", &bytes), "the control");
    assert!(!marked(SegmentId::of(b"other"), "n3", &bytes));
    assert!(!marked(segment.id(), "n4", &bytes));
    receipt.last += 1;
    assert!(!marked(segment.id(), "n3", &receipt.encode().unwrap()));
}

#[test]
fn an_index_that_lies_under_a_right_check_is_found() {
    let all = entries();
    let bytes = volume(&all, true);
    let index = bytes.len() - 32 - 64;
    for at in index..bytes.len() - 32 {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let end = bad.len() - 32;
        let check = blake3::hash(&bad[..end]);
        bad[end..].copy_from_slice(check.as_bytes());
        let (sound, end) = read(&bad);
        assert_eq!(sound, all, "byte {at}");
        let found = matches!(end, Err(VolumeError::Index | VolumeError::Codec { .. }));
        assert!(found, "byte {at}: {end:?}");
    }
}

#[test]
fn a_volume_says_when_it_is_full() {
    let mut writer = VolumeWriter::new(std::io::sink(), &header(1)).unwrap();
    assert!(writer.has_room(32 << 20, 4096), "the first goes in");
    let entry = segment(1, b"x");
    writer.push(&entry).unwrap();
    assert!(!writer.has_room(32 << 20, 4096));
    assert!(!writer.has_room(MAX_VOLUME_BYTES, u64::MAX));
    for _ in 1..MAX_VOLUME_ENTRIES {
        writer.push(&entry).unwrap();
    }
    assert!(!writer.has_room(1, MAX_VOLUME_BYTES));
    assert!(matches!(
        writer.push(&entry),
        Err(VolumeError::TooLong { .. })
    ));
    assert_eq!(writer.entries(), MAX_VOLUME_ENTRIES);
    writer.finish(true).unwrap();
}

#[test]
fn the_list_beside_an_encrypted_volume_is_whole_or_none() {
    let list = VolumeList {
        recipients: VolumeList::recipients(&["b", "a"]),
        export_id: [7; 16],
        number: 3,
        last: true,
        file_bytes: 1_234,
        file_hash: [9; 32],
        keys: entries().iter().map(|entry| entry.mark.key()).collect(),
    };
    assert_eq!(list.recipients, VolumeList::recipients(&["a", "b"]));
    assert_ne!(list.recipients, VolumeList::recipients(&["a"]));
    let bytes = list.encode();
    assert_eq!(bytes.len() as u64, VolumeList::bytes(list.keys.len()));
    assert_eq!(VolumeList::decode(&bytes), Some(list));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert_eq!(VolumeList::decode(&bad), None, "byte {at}");
        assert_eq!(VolumeList::decode(&bytes[..at]), None, "length {at}");
    }
}

/// The vector, as `docs/src/format.md` describes it. `TIDELOCK_WRITE_VECTORS=1` writes it.
#[test]
fn the_committed_vector_is_what_the_code_writes_and_reads() {
    let bytes = volume(&entries(), true);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let marks: Vec<_> = entries().into_iter().map(|entry| entry.mark).collect();
    let vector = json!({
        "header": header(1), "export": header(1).export(), "entries": marks, "last": true, "hex": hex,
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors/segments/volume.json");
    if std::env::var_os("TIDELOCK_WRITE_VECTORS").is_some() {
        let text = serde_json::to_string_pretty(&vector).unwrap();
        std::fs::write(&path, format!("{text}\n")).unwrap();
    }
    let committed: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(committed == vector, "the vector is written differently");
}

// ---- encrypted ----------------------------------------------------------------------------------

fn sealed(plain: &[u8]) -> Vec<u8> {
    let to = AgeRecipients::new(&[RECIPIENT]).unwrap();
    let mut writer = AgeWriter::new(Vec::new(), &to).unwrap();
    writer.write_all(plain).unwrap();
    writer.finish().unwrap()
}

fn opened(bytes: &[u8]) -> (Vec<u8>, Result<(), String>) {
    let identity = AgeIdentity::parse(IDENTITY).unwrap();
    let mut plain = Vec::new();
    let end = AgeReader::new(bytes, &identity)
        .map_err(|e| e.to_string())
        .and_then(|mut reader| {
            // In pieces, so that what lies before an error is seen.
            let mut piece = [0; 4096];
            loop {
                match reader.read(&mut piece) {
                    Ok(0) => return Ok(()),
                    Ok(count) => plain.extend_from_slice(&piece[..count]),
                    Err(error) => return Err(error.to_string()),
                }
            }
        });
    (plain, end)
}

#[test]
fn an_encrypted_volume_opens_with_its_key_and_with_no_other() {
    let identity = AgeIdentity::parse(IDENTITY).unwrap();
    let to = AgeRecipients::new(&[RECIPIENT]).unwrap();
    let mut writer =
        VolumeWriter::new(AgeWriter::new(Vec::new(), &to).unwrap(), &header(1)).unwrap();
    for entry in entries() {
        writer.push(&entry).unwrap();
    }
    let bytes = writer.finish(true).unwrap().finish().unwrap();
    let mut reader =
        VolumeReader::open(AgeReader::new(bytes.as_slice(), &identity).unwrap()).unwrap();
    for entry in entries() {
        assert_eq!(reader.next_entry(), Ok(Some(entry)));
    }
    assert_eq!(
        (reader.next_entry(), reader.is_last()),
        (Ok(None), Some(true))
    );
    assert!(matches!(read(&bytes).1, Err(VolumeError::Magic)));

    let other = AgeRecipients::new(&[OTHER_RECIPIENT]).unwrap();
    let not_ours = AgeWriter::new(Vec::new(), &other)
        .unwrap()
        .finish()
        .unwrap();
    let refused = AgeReader::new(not_ours.as_slice(), &identity).err();
    assert_eq!(refused, Some(VolumeError::Crypt(CryptError::NoKey)));
}

#[test]
fn chunks_of_every_length_are_read_again_and_a_cut_between_chunks_is_no_end() {
    const CHUNK: usize = 64 * 1024;
    for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7] {
        let plain: Vec<u8> = (0..=250).cycle().take(length).collect();
        let bytes = sealed(&plain);
        assert_eq!(opened(&bytes), (plain.clone(), Ok(())), "{length}");
        let most = AgeRecipients::new(&[RECIPIENT])
            .unwrap()
            .file_bytes(length as u64);
        let spare = most - bytes.len() as u64;
        assert!(spare == 0 || spare == 16, "{length}: {spare}");
        let payload = bytes.len() - length - 16 * length.div_ceil(CHUNK).max(1);
        for chunks in 0..length.div_ceil(CHUNK).max(1) {
            let cut = &bytes[..payload + chunks * (CHUNK + 16)];
            let (sound, end) = opened(cut);
            assert!(end.is_err(), "{length} cut after {chunks} chunks");
            assert_eq!(sound[..], plain[..chunks * CHUNK]);
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(opened(&longer).1.is_err(), "{length}");
    }
}

#[test]
fn every_changed_byte_of_a_small_encrypted_volume_is_refused() {
    let plain = volume(&entries(), true);
    let bytes = sealed(&plain);
    assert_eq!(opened(&bytes), (plain, Ok(())));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let (sound, end) = opened(&bad);
        assert!(end.is_err() && sound.is_empty(), "byte {at}");
        let (sound, end) = opened(&bytes[..at]);
        assert!(end.is_err() && sound.is_empty(), "length {at}");
    }
}

#[test]
fn the_age_program_opens_an_encrypted_volume() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let plain = vec![5; 150_000];
    std::fs::write(path("v"), sealed(&plain)).unwrap();
    std::fs::write(path("key"), IDENTITY).unwrap();
    let (key, sealed, out) = (path("key"), path("v"), path("out"));
    let asked = Command::new("age")
        .args(["--decrypt", "-i", &key, "-o", &out, &sealed])
        .status();
    match asked {
        Err(error) => not_run(
            "the_age_program_opens_an_encrypted_volume",
            &error.to_string(),
        ),
        Ok(status) => {
            assert!(status.success());
            assert_eq!(std::fs::read(Path::new(&out)).unwrap(), plain);
            let back = path("back");
            let status = Command::new("age")
                .args(["--encrypt", "-r", RECIPIENT, "-o", &back, &out])
                .status()
                .unwrap();
            assert!(status.success());
            assert_eq!(opened(&std::fs::read(back).unwrap()), (plain, Ok(())));
        }
    }
}
