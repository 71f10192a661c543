//! A fuzz harness for stable Rust: bytes that a decoder once took (or refused) are changed by a seeded
//! generator and handed to the decoder again, which must neither panic nor take two spellings of one
//! value. There is no coverage feedback; what stands in for it is a corpus of good bytes of every
//! decoder, changes that know length fields, and checksums that are made right again.
//!
//! A decoder that ends the whole process, as one that overflows its stack does, leaves its input in the
//! file of [`UnderWay`], for whoever started the process.
//!
//! The corpus lies in `tests/corpus/<decoder>/`: a file `good-…` must be taken, `bad-…` refused, and
//! `found-…` is what a run found, replayed by every `cargo test` from then on.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tidelock_link::Random;
use tidelock_segments::{
    SegmentId,
    decoders::{Decoder, Verdict},
};

/// No changed input becomes longer than this.
const INPUT_BYTES_MAX: usize = 256 * 1024;

fn pick<'a, T>(random: &mut Random, from: &'a [T]) -> Option<&'a T> {
    from.get(random.below(from.len()))
}

/// A range within `len`, mostly short.
fn span(random: &mut Random, len: usize) -> std::ops::Range<usize> {
    let from = random.below(len + 1);
    let longest = if random.below(4) == 0 { len } else { 16 };
    let to = from + random.below((len - from).min(longest) + 1);
    from..to
}

/// Lengths that are worth trying in a length field.
const LENGTHS: [u64; 14] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    u64::MAX / 2,
    u64::MAX - 1,
    u64::MAX,
];

/// Pieces of the text formats.
const PIECES: [&str; 22] = [
    "{", "}", "[", "]", "\"", ":", ",", "\\u0000", "\\ud800", "null", "true", "-0", "1e999", "/",
    "..", "%2f", "\u{0}", "\u{202e}", "é", "\n", " ", "=",
];

/// Changes a corpus entry, once to five times.
#[must_use]
pub fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = pick(random, corpus).cloned().unwrap_or_default();
    for _ in 0..=random.below(5) {
        mutate_once(random, &mut bytes, corpus);
        bytes.truncate(INPUT_BYTES_MAX);
    }
    bytes
}

fn mutate_once(random: &mut Random, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    let at = random.below(bytes.len());
    match random.below(11) {
        0 | 1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        2 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random.any().to_le_bytes()[0];
            }
        }
        3 => bytes.truncate(at),
        4 => {
            let more = random.below(9);
            let byte = pick(random, &[0, 0xff, b' ', b'a']).copied().unwrap_or(0);
            bytes.resize(bytes.len() + more, byte);
        }
        // The front of this one and the end of another.
        5 => {
            if let Some(other) = pick(random, corpus) {
                bytes.truncate(at);
                bytes.extend_from_slice(other.get(random.below(other.len())..).unwrap_or_default());
            }
        }
        // A piece twice, or one that is gone, or one in the place of another.
        6 => {
            let span = span(random, bytes.len());
            let piece = bytes.get(span.clone()).unwrap_or_default().to_vec();
            bytes.splice(span.end..span.end, piece);
        }
        7 => {
            let span = span(random, bytes.len());
            bytes.drain(span);
        }
        8 => {
            let (from, to) = (span(random, bytes.len()), span(random, bytes.len()));
            let piece = bytes.get(from).unwrap_or_default().to_vec();
            bytes.splice(to, piece);
        }
        // A length field of 1, 2, 4 or 8 bytes, near the front more often than not.
        9 => {
            let front = if random.below(3) == 0 {
                bytes.len()
            } else {
                64
            };
            let at = random.below(front.min(bytes.len()));
            let width = 1 << random.below(4);
            if let Some(field) = bytes.get_mut(at..at + width) {
                let mut old = [0; 8];
                old.iter_mut().zip(field.iter()).for_each(|(o, f)| *o = *f);
                let old = u64::from_le_bytes(old);
                let new = match random.below(4) {
                    0 => old.wrapping_add(1),
                    1 => old.wrapping_sub(1),
                    2 => old.wrapping_shl(8),
                    _ => pick(random, &LENGTHS).copied().unwrap_or(0),
                };
                field.copy_from_slice(new.to_le_bytes().get(..width).unwrap_or_default());
            }
        }
        _ => {
            let piece = pick(random, &PIECES).copied().unwrap_or_default();
            bytes.splice(at..at, piece.bytes());
        }
    }
}

/// What is wrong with how a decoder treats some bytes.
///
/// # Errors
/// The fault, in words.
pub fn check(decoder: &Decoder, bytes: &[u8]) -> Result<Verdict, String> {
    let decode = |bytes: &[u8]| {
        catch_unwind(AssertUnwindSafe(|| (decoder.decode)(bytes)))
            .map_err(|_| "it panics".to_owned())
    };
    let verdict = decode(bytes)?;
    match &verdict {
        Verdict::Exact(again) if again != bytes => {
            Err("it takes bytes that are not the encoding of what it read".to_owned())
        }
        Verdict::Normal(normal) => match decode(normal)? {
            Verdict::Normal(again) if again == *normal => Ok(verdict),
            other => Err(format!(
                "the normal form of what it takes is {other:?} to it"
            )),
        },
        _ => Ok(verdict),
    }
}

/// A file that holds the input which is being decoded now. Nothing of it is synced: it outlives the
/// process, not the machine.
#[derive(Debug)]
pub struct UnderWay(File);

impl UnderWay {
    /// Makes the file.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self(File::create(path)?))
    }

    /// [`check`], with the input in the file meanwhile.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn check(&self, decoder: &Decoder, bytes: &[u8]) -> Result<Verdict, String> {
        let mut held = decoder.name.as_bytes().to_vec();
        held.push(b'\n');
        held.extend_from_slice(bytes);
        self.0
            .write_all_at(&held, 0)
            .and_then(|()| self.0.set_len(held.len() as u64))
            .map_err(|error| format!("the input cannot be noted: {error}"))?;
        let verdict = check(decoder, bytes);
        self.0
            .set_len(0)
            .map_err(|error| format!("the note of the input cannot be cleared: {error}"))?;
        verdict
    }

    /// The decoder's name and the input that a process which is gone was at; `None` if at none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn left(path: &Path) -> io::Result<Option<(String, Vec<u8>)>> {
        let held = fs::read(path)?;
        let end = held.iter().position(|byte| *byte == b'\n');
        Ok(end.map(|end| {
            let (name, input) = held.split_at(end);
            let input = input.get(1..).unwrap_or_default();
            (String::from_utf8_lossy(name).into_owned(), input.to_vec())
        }))
    }
}

/// Writes an input that shows a fault into its decoder's corpus; gives the command that shows it again.
///
/// # Errors
/// It cannot be written.
pub fn keep(decoder: &str, bytes: &[u8]) -> io::Result<String> {
    let id = SegmentId::of(bytes).hex();
    let name = format!("found-{}", id.get(..12).unwrap_or_default());
    let path = corpus_dir(decoder).join(name);
    fs::write(&path, bytes)?;
    Ok(format!(
        "TIDELOCK_FUZZ_DECODER={decoder} TIDELOCK_FUZZ_INPUT={} \
         cargo test -p tidelock-tests --test fuzz",
        path.display()
    ))
}

/// The directory of a decoder's corpus.
#[must_use]
pub fn corpus_dir(decoder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(decoder)
}

/// The files of a decoder's corpus, by name.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn corpus(decoder: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(corpus_dir(decoder))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        files.push((name.into_owned(), fs::read(&path)?));
    }
    files.sort();
    Ok(files)
}

/// Makes failing bytes shorter as long as they go on failing: a few hundred tries.
fn shortest(under_way: &UnderWay, decoder: &Decoder, mut bytes: Vec<u8>) -> Vec<u8> {
    let mut piece = bytes.len() / 2;
    let mut tries = 0;
    while piece > 0 && tries < 400 {
        let mut at = 0;
        while at < bytes.len() && tries < 400 {
            tries += 1;
            let mut shorter = bytes.clone();
            shorter.drain(at..(at + piece).min(bytes.len()));
            if under_way.check(decoder, &shorter).is_err() {
                bytes = shorter;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    bytes
}

/// How a run over one decoder went.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Changed inputs tried.
    pub tried: u64,
    /// How many of them the decoder took.
    pub taken: u64,
    /// What is wrong, with the command that shows it again.
    pub faults: Vec<String>,
}

/// Tries changed inputs of a decoder until the time is over or as many as asked for were tried, and
/// writes those that show a fault into its corpus. Gives up on a decoder at its third fault.
///
/// # Errors
/// The corpus cannot be read or written.
pub fn run(
    decoder: &Decoder,
    seed: u64,
    time: Duration,
    most: u64,
    under_way: &UnderWay,
) -> io::Result<Report> {
    let corpus: Vec<Vec<u8>> = corpus(decoder.name)?
        .into_iter()
        .map(|(_, bytes)| bytes)
        .collect();
    let mut report = Report::default();
    let end = Instant::now() + time;
    let mut random = Random::new(seed);
    while report.tried < most && report.faults.len() < 3 && Instant::now() < end {
        let mut bytes = mutate(&mut random, &corpus);
        if let Some(reseal) = decoder.reseal
            && random.below(4) != 0
        {
            reseal(&mut bytes);
        }
        report.tried += 1;
        match under_way.check(decoder, &bytes) {
            Ok(Verdict::Refused) => {}
            Ok(_) => report.taken += 1,
            Err(fault) => {
                let bytes = shortest(under_way, decoder, bytes);
                let command = keep(decoder.name, &bytes)?;
                report.faults.push(format!(
                    "{}: {fault}; see it again: {command}",
                    decoder.name
                ));
            }
        }
    }
    Ok(report)
}
