//! Every decoder of this crate behind one shape, for the fuzz harness of the workspace
//! (`tests/tests/fuzz.rs`). Not part of the crate's interface.
//!
//! A new decoder is one line in [`all`].

use std::str::FromStr;
use std::sync::OnceLock;

use crate::bao::{self, BaoError, Item, Outboard};
use crate::body;
use crate::checkpoint::{Checkpoint, origin_line};
use crate::codec;
use crate::format::{SegmentHeader, seal_unsigned, verify_segment};
use crate::frame::{self, LogHeader};
use crate::id::{DomainId, Kind, NodeId, Origin, SegmentId, Sha256Hash};
use crate::keys::{Endorsement, LogKey};
use crate::limits::{MAX_HEADER_BYTES, MIN_LOG_FILE_BYTES};
use crate::log::LogState;
use crate::partial::reencode_map;
use crate::receipt::CustodyReceipt;
use crate::store::{catalog, chain, journal, receipts};
use crate::volume;

/// What a decoder made of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It refused them.
    Refused,
    /// It took them, and there is no encoder to ask.
    Taken,
    /// It took them; these are the only bytes that it may take for the value.
    Exact(Vec<u8>),
    /// It took them as another spelling of these, which it must take as they are.
    Normal(Vec<u8>),
}

impl Verdict {
    /// Refused, or taken with the one encoding of what was read.
    #[must_use]
    pub fn exact(encoded: Option<Vec<u8>>) -> Self {
        encoded.map_or(Self::Refused, Self::Exact)
    }
}

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    /// Its name, and the directory of its corpus.
    pub name: &'static str,
    /// Reads bytes from outside.
    pub decode: fn(&[u8]) -> Verdict,
    /// Makes the checksums in changed bytes right again, so that what lies behind them is reached.
    pub reseal: Option<fn(&mut [u8])>,
}

impl Decoder {
    /// A decoder of bytes without checksums.
    #[must_use]
    pub const fn new(name: &'static str, decode: fn(&[u8]) -> Verdict) -> Self {
        Self {
            name,
            decode,
            reseal: None,
        }
    }
}

/// Every decoder of this crate.
#[must_use]
pub fn all() -> Vec<Decoder> {
    let sealed = |name, decode, reseal| Decoder {
        name,
        decode,
        reseal: Some(reseal),
    };
    vec![
        Decoder::new("segment", segment),
        Decoder::new("segment-header", segment_header),
        Decoder::new("audit-body", audit_body),
        sealed("log-file", log_file, reseal_log_file),
        sealed("log-state", log_state, reseal_front),
        Decoder::new("receipt", receipt),
        Decoder::new("endorsement", endorsement),
        Decoder::new("checkpoint", checkpoint),
        Decoder::new("id", id),
        sealed("partial-map", partial_map, reseal_front),
        Decoder::new("bao-slice", bao_slice),
        sealed("index-catalog", index_catalog, reseal_front),
        sealed("index-journal", index_journal, reseal_journal),
        sealed("index-entry", index_entry, reseal_entry),
        sealed("receipts-file", receipts_file, reseal_receipts),
        sealed("volume", volume, volume::reseal),
    ]
}

/// Of the key that signed what the corpus holds.
const KEY_SEED: [u8; 32] = [7; 32];

/// The place that the corpus speaks of: that of `tests/vectors/segments`.
fn place() -> Option<(DomainId, Origin)> {
    let key = LogKey::from_seed(&KEY_SEED).ok()?;
    let node = NodeId::new("n1").ok()?;
    Some((
        DomainId::new("site").ok()?,
        Origin::audit(&node, &key.public(), 1),
    ))
}

fn segment(bytes: &[u8]) -> Verdict {
    let read = || {
        let segment = verify_segment(bytes.to_vec(), None, &place()?.0).ok()?;
        match segment.header().kind {
            Kind::Policy | Kind::Revocation => seal_unsigned(segment.header(), segment.body()).ok(),
            // Nobody can sign it again; what was read is what was signed.
            Kind::Audit | Kind::Witness => Some(segment.into_bytes()),
        }
    };
    Verdict::exact(read())
}

fn volume(bytes: &[u8]) -> Verdict {
    Verdict::exact(volume::rewritten(bytes))
}

fn segment_header(bytes: &[u8]) -> Verdict {
    let read = || {
        let header: SegmentHeader = codec::decode::<_, MAX_HEADER_BYTES>(bytes).ok()?;
        codec::encode::<_, MAX_HEADER_BYTES>(&header).ok()
    };
    Verdict::exact(read())
}

/// Every record is read. A body of version 1 has one encoding; how a compressor packs version 2 is its own
/// affair.
fn audit_body(bytes: &[u8]) -> Verdict {
    let read = || {
        let (domain, origin) = place()?;
        let body = body::parse_body(bytes, &domain, &origin).ok()?;
        let mut records = body.records(None).ok()?;
        while records.next_record().ok()?.is_some() {}
        if body.version() != 1 {
            return Some(Verdict::Taken);
        }
        let (span, note) = (body.span(), body.checkpoint_note());
        let count = u32::try_from(span.last - span.first + 1).ok()?;
        let mut head = 1u16.to_le_bytes().to_vec();
        head.extend_from_slice(&span.first.to_le_bytes());
        head.extend_from_slice(&count.to_le_bytes());
        for hash in body.frontier_before().hashes() {
            head.extend_from_slice(hash.as_bytes());
        }
        head.extend_from_slice(&u32::try_from(note.len()).ok()?.to_le_bytes());
        head.extend_from_slice(note.as_bytes());
        // The records fill what is left exactly, or the body is refused.
        let records = bytes.get(head.len()..)?;
        Some(Verdict::Exact([&head, records].concat()))
    };
    read().unwrap_or(Verdict::Refused)
}

/// Zeros up to the length that the smallest file has: the corpus leaves them out.
fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut file = bytes.to_vec();
    let least = usize::try_from(MIN_LOG_FILE_BYTES).unwrap_or(0);
    file.resize(file.len().max(least), 0);
    file
}

fn log_file(bytes: &[u8]) -> Verdict {
    let file = padded(bytes);
    let read = || {
        let header = LogHeader::decode(&file).ok()?;
        let line = origin_line(&header.domain, &header.origin)?;
        let scan = frame::scan(&file, &header, &line).ok()?;
        let whole =
            body::iter_records(&scan.records).count() == usize::try_from(scan.count).ok()?;
        // Where the scan cannot tell what it took, the harness sees it as a wrong encoding.
        Some(if whole {
            Verdict::Taken
        } else {
            Verdict::Exact(Vec::new())
        })
    };
    read().unwrap_or(Verdict::Refused)
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(4)) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// The checksum after the magic, over all that follows.
fn reseal_front(bytes: &mut [u8]) {
    let sum = bytes.get(12..).map(crc32c::crc32c);
    put(bytes, 8, sum.unwrap_or_default());
}

/// The checksum of the header, that of each frame as far as the length fields lead, and what the mark
/// of a batch says of its records and of the head before it. The corpus is of the key in [`place`].
fn reseal_log_file(bytes: &mut [u8]) {
    let length = number(bytes, 8).and_then(|n| usize::try_from(n).ok());
    let Some(head) = length.and_then(|n| bytes.get(16..n.checked_add(16)?)) else {
        return;
    };
    let sum = crc32c::crc32c(head);
    put(bytes, 12, sum);
    let Ok(header) = LogHeader::decode(&padded(bytes)) else {
        return;
    };
    if header.version_1 {
        frame::reseal_frames_1(bytes, &header);
    } else if let Ok(key) = LogKey::from_seed(&KEY_SEED) {
        frame::reseal_batches(bytes, &header, &key);
    }
}

fn log_state(bytes: &[u8]) -> Verdict {
    match LogState::decode(bytes) {
        // Of the versions before, which nothing writes any more.
        Some(_) if !bytes.starts_with(b"TIDESTA4") => Verdict::Taken,
        state => Verdict::exact(state.and_then(|state| state.encode().ok())),
    }
}

fn receipt(bytes: &[u8]) -> Verdict {
    let receipt = CustodyReceipt::decode(bytes).ok();
    Verdict::exact(receipt.and_then(|receipt| receipt.encode().ok()))
}

fn endorsement(bytes: &[u8]) -> Verdict {
    let endorsement = Endorsement::decode(bytes).ok();
    Verdict::exact(endorsement.and_then(|endorsement| endorsement.encode().ok()))
}

fn checkpoint(bytes: &[u8]) -> Verdict {
    let read = || {
        let note = std::str::from_utf8(bytes).ok()?;
        let text = Checkpoint::parse(note).ok()?.text();
        // The signatures are carried along; what was read must be what is signed.
        let rest = note.get(text.len()..)?;
        Some([text.as_bytes(), rest.as_bytes()].concat())
    };
    Verdict::exact(read())
}

/// Whatever name the text is, it is written as it was read.
fn id(bytes: &[u8]) -> Verdict {
    fn again<T: FromStr + ToString>(text: &str) -> Option<String> {
        Some(text.parse::<T>().ok()?.to_string())
    }
    let read = || {
        let text = std::str::from_utf8(bytes).ok()?;
        again::<SegmentId>(text)
            .or_else(|| again::<Sha256Hash>(text))
            .or_else(|| again::<Origin>(text))
            .or_else(|| again::<Kind>(text))
            .or_else(|| again::<NodeId>(text))
            .or_else(|| again::<DomainId>(text))
    };
    Verdict::exact(read().map(String::into_bytes))
}

fn partial_map(bytes: &[u8]) -> Verdict {
    Verdict::exact(reencode_map(bytes))
}

/// The last group of the content that the corpus was made of: 50,000 bytes, four groups.
fn bao_slice(bytes: &[u8]) -> Verdict {
    static CONTENT: OnceLock<Option<(Vec<u8>, Outboard)>> = OnceLock::new();
    let content = CONTENT.get_or_init(|| {
        let content: Vec<u8> = (0..50_000usize)
            .map(|i| (i / 7 + i * 31).to_le_bytes()[0])
            .collect();
        let outboard = Outboard::of(&content).ok()?;
        Some((content, outboard))
    });
    let read = || {
        let (content, outboard) = content.as_ref()?;
        let range = 49_999..50_000;
        let mut taken = Vec::new();
        let take = |item: Item<'_>| -> Result<(), BaoError> {
            if let Item::Group { bytes, .. } = item {
                taken.extend_from_slice(bytes);
            }
            Ok(())
        };
        bao::decode_range(&outboard.id(), outboard.size_bytes(), &range, bytes, take).ok()?;
        let read = |offset: u64, buffer: &mut [u8]| -> Result<(), BaoError> {
            bao::copy_from(content, offset, buffer)
        };
        let right = content.get(49_152..) == Some(taken.as_slice());
        let again = bao::encode_range(outboard, &range, read).ok()?;
        // What was handed on and is not the content shows as a wrong encoding.
        Some(if right { again } else { Vec::new() })
    };
    Verdict::exact(read())
}

fn index_catalog(bytes: &[u8]) -> Verdict {
    Verdict::exact(catalog::reencode(bytes))
}

/// A ring of any length. A block that is blank, torn or of another spelling is passed over.
fn index_journal(bytes: &[u8]) -> Verdict {
    match journal::reencode_ring(bytes) {
        Some(blocks) if blocks.len() < bytes.len() && !blocks.is_empty() => Verdict::Taken,
        blocks => Verdict::exact(blocks),
    }
}

/// The checksum of every block.
fn reseal_journal(bytes: &mut [u8]) {
    for block in bytes.chunks_mut(journal::BLOCK_BYTES) {
        let sum = block.get(4..).map(crc32c::crc32c);
        put(block, 0, sum.unwrap_or_default());
    }
}

/// The slot of an entry in a page: of the first sequence of the log in [`place`].
fn index_entry(bytes: &[u8]) -> Verdict {
    Verdict::exact(place().and_then(|(_, origin)| chain::reencode_slot(bytes, &origin)))
}

fn reseal_entry(bytes: &mut [u8]) {
    if let Some((_, origin)) = place() {
        chain::reseal_slot(bytes, &origin);
    }
}

/// What is damaged in such a file is passed over; the others, written again, are all there.
fn receipts_file(bytes: &[u8]) -> Verdict {
    let held = receipts::decode(bytes);
    match receipts::encode(&held) {
        Ok(again) if !held.is_empty() => Verdict::Normal(again),
        _ => Verdict::Refused,
    }
}

/// The checksum of each receipt, as far as the length fields lead.
fn reseal_receipts(bytes: &mut [u8]) {
    let mut at = receipts::RECEIPTS_MAGIC.len();
    while let Some(length) = number(bytes, at) {
        let begin = at.saturating_add(8);
        let end = begin.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
        let Some(sum) = bytes.get(begin..end).map(crc32c::crc32c) else {
            return;
        };
        put(bytes, at.saturating_add(4), sum);
        at = end;
    }
}
