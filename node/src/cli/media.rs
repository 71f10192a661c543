//! `tidelock segment export` and `import`: segments and receipts by removable media. Files are read and
//! written here; what is taken in is judged and taken by the node, running or stopped (`run/media.rs`).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    str::FromStr,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, ValueHint};
use serde_json::{Value, json};
use tidelock_policy::TRUST_ORIGIN;
use tidelock_segments::{
    AgeIdentity, AgeRecipients, DomainId, Kind, NodeId, Origin, SegmentId,
    limits::{MAX_VOLUME_BYTES, MIN_VOLUME_BYTES},
    offline::{Offline, Progress},
    volume::{
        AgeWriter, EntryMark, ReceiptMark, VolumeEntry, VolumeError, VolumeHeader, VolumeList,
        VolumeWriter,
    },
};

use super::{
    ConfigArg, Exit, Failure, Output, keys,
    medium::{
        self, ENCRYPTED, LIST, Medium, Sought, UNFINISHED, UNFINISHED_LIST, VOLUME, open, shown,
    },
    node::{Door, problem},
    output::{Bar, human_bytes},
    segment::Rooted,
};
use crate::{
    clock::wall_unix_ms,
    config::{Config, parse_bytes},
    run::media::{ENTRIES_MAX, Stopped},
};

/// Content of one request to a running node; base64 makes it a third more, and it takes 8 MiB.
const REQUEST_BYTES: usize = 4 * 1024 * 1024;
/// Entries of one request: each is synced to the disk, and a request has 30 seconds.
const ENTRIES_AT_ONCE: usize = 64;
const _: () = assert!(ENTRIES_AT_ONCE <= ENTRIES_MAX && RECEIPTS_AT_ONCE <= ENTRIES_MAX);
/// Segments that one request asks receipts for: 16 MiB of answer hold several for each.
const RECEIPTS_AT_ONCE: usize = 32;
/// Entries of one volume that may be damaged or forged; a session ends after a few. What is left of such a
/// volume is not judged.
const FORGED_MAX: u64 = 64;

/// Whom an export is for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum For {
    Any,
    Peer(NodeId),
}

impl For {
    fn peer(&self) -> Option<&NodeId> {
        match self {
            Self::Any => None,
            Self::Peer(peer) => Some(peer),
        }
    }
}

impl FromStr for For {
    type Err = tidelock_segments::IdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "any" => Ok(Self::Any),
            peer => NodeId::new(peer).map(Self::Peer),
        }
    }
}

/// The earliest time of sealing that is still exported.
#[derive(Debug, Clone, Copy)]
enum Since {
    Ago { ms: u64 },
    At { unix_ms: u64 },
}

impl Since {
    fn unix_ms(self, now_unix_ms: u64) -> u64 {
        match self {
            Self::Ago { ms } => now_unix_ms.saturating_sub(ms),
            Self::At { unix_ms } => unix_ms,
        }
    }
}

fn since(text: &str) -> Result<Since, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match text.strip_prefix(digits) {
        Some("s") => Some(1_000),
        Some("m") => Some(60_000),
        Some("h") => Some(3_600_000),
        Some("d") => Some(86_400_000),
        Some("w") => Some(604_800_000),
        _ => None,
    };
    if let (Some(unit_ms), Ok(count)) = (unit_ms, digits.parse::<u64>()) {
        let ms = count.saturating_mul(unit_ms);
        return Ok(Since::Ago { ms });
    }
    let day = format!("{text}T00:00:00Z");
    let at: Option<jiff::Timestamp> = text.parse().or_else(|_| day.parse()).ok();
    at.and_then(|at| u64::try_from(at.as_millisecond()).ok())
        .map(|unix_ms| Since::At { unix_ms })
        .ok_or_else(|| "not a time as in 7d, 36h, 2026-05-01 or 2026-05-01T12:00:00Z".to_owned())
}

pub(super) fn size(text: &str) -> Result<u64, String> {
    parse_bytes(text).ok_or_else(|| "not a number of bytes, as in 256MiB".to_owned())
}

fn volume_size(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if (MIN_VOLUME_BYTES..=MAX_VOLUME_BYTES).contains(&bytes) {
        return Ok(bytes);
    }
    Err(format!(
        "must be from {MIN_VOLUME_BYTES} to {MAX_VOLUME_BYTES} bytes, which is what FAT keeps in one file"
    ))
}

/// What to write to a medium.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A directory on the medium; it must be there.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    to: PathBuf,
    /// The node that it is for, or `any`. What that node is known to hold is left out: its own log, and
    /// what it has given receipts for.
    #[arg(long = "for", value_name = "PEER|any")]
    addressee: For,
    /// Only audit sealed since then: 7d, 36h, 90m, a date, or a time as in RFC 3339. CRLs and policy
    /// always go along.
    #[arg(long, value_parser = since)]
    since: Option<Since>,
    /// At most so many bytes on the medium in this run; run it again for the rest.
    #[arg(long, value_name = "BYTES", value_parser = size, default_value = "4GiB")]
    max_bytes: u64,
    /// At most so many bytes in one file, unless a single segment is longer.
    #[arg(long, value_name = "BYTES", value_parser = volume_size, default_value = "256MiB")]
    volume_bytes: u64,
    /// Encrypt the volumes to this age recipient (age1…); may stand several times.
    #[arg(long, value_name = "RECIPIENT")]
    encrypt_to: Vec<String>,
    /// Only custody receipts: the way home of a medium that brought segments.
    #[arg(long)]
    receipts_only: bool,
    #[command(flatten)]
    config: ConfigArg,
}

/// What to read from a medium.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A directory with volumes, or one volume.
    #[arg(value_hint = ValueHint::AnyPath)]
    path: PathBuf,
    /// For encrypted volumes: an age identity file, readable by its owner only.
    #[arg(long = "key", value_name = "FILE", value_hint = ValueHint::FilePath)]
    key: Option<PathBuf>,
    /// Take in what the plan says; each entry is judged again.
    #[arg(long)]
    apply: bool,
    #[command(flatten)]
    config: ConfigArg,
}

/// The node that a command works on.
enum Backend {
    Running(Box<Door>),
    Stopped(Stopped),
}

impl Backend {
    fn of(args: &ConfigArg, rooted: &Rooted) -> Result<Self, Failure> {
        if rooted.in_use() {
            return Ok(Self::Running(Box::new(Door::of(args)?)));
        }
        let config = Config::load(&args.config)?;
        Ok(Self::Stopped(Stopped::open(&args.config, config)?))
    }

    fn operate(&self, op: &str, body: &Value, apply: bool) -> Result<Value, Failure> {
        match self {
            Self::Stopped(node) => node.operate(op, body, apply),
            Self::Running(door) => {
                let act = if apply { "?apply=true" } else { "" };
                let path = format!("/v1/admin/{op}{act}");
                match door.post(&path, serde_json::to_vec(body)?)? {
                    (200, answer) => Ok(answer),
                    (status, answer) => Err(Failure::failed(problem(status, &answer))),
                }
            }
        }
    }
}

// ---- export -------------------------------------------------------------------------------------

/// A segment that is to go along, in the order of INV-11: its class, then its age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    kind: Kind,
    created_unix_ms: u64,
    /// Place of its origin in [`Found::origins`], which are in order.
    origin: usize,
    sequence: u64,
    id: SegmentId,
    size_bytes: u64,
}

#[derive(Debug, Default)]
struct Found {
    candidates: Vec<Candidate>,
    /// Segments that receipts are carried home for.
    foreign: Vec<SegmentId>,
    /// The keys of all that could go along.
    keys: HashSet<[u8; 32]>,
    damaged: Vec<String>,
    /// Left out because the addressee holds it, or the medium does.
    known: u64,
}

impl Found {
    /// Leaves out what a medium holds.
    fn leave_out(&mut self, medium: &Medium) {
        let all = self.candidates.len();
        self.candidates
            .retain(|candidate| !medium.held.contains(candidate.id.as_bytes()));
        let left_out = all.saturating_sub(self.candidates.len());
        self.known = self.known.saturating_add(left_out as u64);
    }
}

pub(super) fn export(args: &ExportArgs, output: Output) -> Result<Exit, Failure> {
    let rooted = Rooted::of(&args.config)?;
    let offline = rooted.offline()?;
    let dir = target(&args.to, &rooted.config.node.root)?;
    let recipients = match args.encrypt_to.as_slice() {
        [] => None,
        texts => Some(AgeRecipients::new(texts)?),
    };
    let node = &rooted.config.node;
    if args.addressee.peer() == Some(&node.id) {
        return Err(Failure::cannot_run(format!(
            "--for {}: that is this node itself",
            node.id
        )));
    }
    let now_unix_ms = wall_unix_ms();
    let mut found = find(&offline, args, &node.id, now_unix_ms, output)?;
    let mark = recipients
        .is_some()
        .then(|| VolumeList::recipients(&args.encrypt_to));
    let exports = ExportIds {
        domain: &node.domain,
        exporter: &node.id,
        addressee: args.addressee.peer(),
        mark,
    };
    let sought = Sought {
        domain: &node.domain,
        recipients: mark,
        keys: std::mem::take(&mut found.keys),
        is_ours: &|id| exports.is_ours(id),
    };
    let medium = Medium::look(&dir, &sought, output)?;
    found.leave_out(&medium);
    // Gone on with under its own id, so that whoever imports finds it whole.
    let (export_id, number) = medium
        .interrupted()
        .unwrap_or_else(|| (exports.make(now_unix_ms), 0));
    let receipts = receipts(args, &rooted, &medium, &found.foreign)?;
    let mut export = Export {
        dir: &dir,
        recipients: recipients.as_ref(),
        mark: mark.unwrap_or_default(),
        header: VolumeHeader {
            domain: node.domain.clone(),
            exporter: node.id.clone(),
            addressee: args.addressee.peer().cloned(),
            export_id,
            number,
            created_unix_ms: now_unix_ms,
        },
        max_bytes: args.max_bytes,
        volume_bytes: args.volume_bytes,
        written_bytes: 0,
        open: None,
        volumes: Vec::new(),
    };
    let goes_on = number > 0;
    let total = found.candidates.len() as u64 + receipts.len() as u64;
    let mut bar = output.bar("exporting");
    let mut progress = Progress {
        files_total: total,
        ..Progress::default()
    };
    let (urgent, audit): (Vec<_>, Vec<_>) = std::mem::take(&mut found.candidates)
        .into_iter()
        .partition(|candidate| candidate.kind != Kind::Audit);
    let (mut segments, mut segment_bytes, mut carried) = (0_u64, 0_u64, 0_u64);
    let mut room = true;
    let steps = urgent
        .into_iter()
        .map(Step::Segment)
        .chain(receipts.into_iter().map(Step::Receipt))
        .chain(audit.into_iter().map(Step::Segment));
    let mut left = 0_u64;
    for step in steps {
        if !room {
            left += 1;
            continue;
        }
        let entry = match step {
            Step::Receipt(entry) => Some(entry),
            Step::Segment(candidate) if !export.fits(candidate.size_bytes) => {
                (room, left) = (false, left + 1);
                continue;
            }
            Step::Segment(candidate) => match offline.read(candidate.kind, &candidate.id) {
                Ok(Some(segment)) => Some(VolumeEntry {
                    mark: EntryMark::Segment(segment.reference()),
                    bytes: segment.into_bytes(),
                }),
                // Evicted under licence since it was listed.
                Ok(None) => None,
                Err(error) => {
                    found.damaged.push(format!("{}: {error}", candidate.id));
                    None
                }
            },
        };
        let Some(entry) = entry else { continue };
        let bytes = entry.bytes.len() as u64;
        if !export.fits(bytes) {
            (room, left) = (false, left + 1);
            continue;
        }
        export.push(&entry)?;
        match entry.mark {
            EntryMark::Segment(_) => {
                (segments, segment_bytes) = (segments + 1, segment_bytes + bytes)
            }
            EntryMark::Receipt(_) => carried += 1,
        }
        progress.files += 1;
        progress.bytes += bytes;
        bar.show(progress);
    }
    if goes_on && export.open.is_none() && export.fits(0) {
        // Nothing more goes along: what is missing is the word that nothing follows.
        export.begin()?;
    }
    export.finish(true)?;
    drop(bar);
    let answer = json!({
        "to": dir,
        "for": args.addressee.peer().map_or("any", NodeId::as_str),
        "export": export.header.export(),
        "volumes": export.volumes,
        "segments": segments,
        "segment_bytes": segment_bytes,
        "receipts": carried,
        "bytes": export.written_bytes,
        "known": found.known,
        "left": left,
        "encrypted": recipients.is_some(),
        "damaged": found.damaged,
        "damaged_volumes": medium.damaged,
    });
    output.say(&answer, || {
        let mut lines = vec![format!(
            "{segments} segments ({}) and {carried} receipts in {} volumes, {} in all, to {}",
            human_bytes(segment_bytes),
            export.volumes.len(),
            human_bytes(export.written_bytes),
            dir.display()
        )];
        lines.extend(export.volumes.iter().map(|name| format!("  {name}")));
        lines.push(format!("{} known to be there already", found.known));
        if left > 0 {
            lines.push(format!(
                "{left} left for want of room; run it again, with another medium or a larger --max-bytes"
            ));
        }
        let damaged = found.damaged.iter().chain(&medium.damaged);
        lines.extend(damaged.map(|what| format!("DAMAGED {what}")));
        lines.join("\n")
    });
    Ok(
        match found.damaged.is_empty() && medium.damaged.is_empty() {
            true => Exit::Done,
            false => Exit::Failed,
        },
    )
}

enum Step {
    Segment(Candidate),
    Receipt(VolumeEntry),
}

/// The directory to write to. One that is not there is not made: behind a mount point without its medium
/// lies the system's own disk.
fn target(to: &Path, root: &Path) -> Result<PathBuf, Failure> {
    let dir = fs::canonicalize(to).map_err(|e| {
        Failure::cannot_run(format!(
            "{}: {e}; mount the medium and make the directory first",
            to.display()
        ))
    })?;
    if !dir.is_dir() {
        return Err(Failure::at(to, &"not a directory"));
    }
    // INV-01: what lies below the root is the node's own.
    if fs::canonicalize(root).is_ok_and(|root| dir.starts_with(root)) {
        return Err(Failure::at(to, &"lies below the node's root"));
    }
    Ok(dir)
}

/// How an exporter tells its own exports from others, encrypted ones too: half of an export id is chosen, the
/// other half is a hash of that, and of by whom, for whom and to whom.
struct ExportIds<'a> {
    domain: &'a DomainId,
    exporter: &'a NodeId,
    addressee: Option<&'a NodeId>,
    mark: Option<[u8; 32]>,
}

impl ExportIds<'_> {
    fn with(&self, chosen: &[u8; 8]) -> [u8; 16] {
        let mut hash = blake3::Hasher::new();
        hash.update(b"tidelock export id v1\0");
        hash.update(chosen);
        let texts = [
            self.domain.as_str(),
            self.exporter.as_str(),
            self.addressee.map_or("", NodeId::as_str),
        ];
        for text in texts {
            hash.update(text.as_bytes());
            hash.update(b"\n");
        }
        hash.update(&self.mark.unwrap_or_default());
        let hash = hash.finalize();
        let rest = hash.as_bytes().iter().take(8);
        let mut id = [0; 16];
        for (slot, byte) in id.iter_mut().zip(chosen.iter().chain(rest)) {
            *slot = *byte;
        }
        id
    }

    fn make(&self, now_unix_ms: u64) -> [u8; 16] {
        let text = format!("{} {now_unix_ms} {}", self.exporter, std::process::id());
        let (chosen, _) = blake3::hash(text.as_bytes())
            .as_bytes()
            .split_first_chunk::<8>()
            .map_or(([0; 8], [].as_slice()), |(chosen, rest)| (*chosen, rest));
        self.with(&chosen)
    }

    fn is_ours(&self, id: &[u8; 16]) -> bool {
        id.split_first_chunk::<8>()
            .is_some_and(|(chosen, _)| self.with(chosen) == *id)
    }
}

fn find(
    offline: &Offline<'_>,
    args: &ExportArgs,
    own: &NodeId,
    now_unix_ms: u64,
    output: Output,
) -> Result<Found, Failure> {
    let addressee = args.addressee.peer();
    let since_unix_ms = args.since.map_or(0, |since| since.unix_ms(now_unix_ms));
    let custodians = offline.custodians()?;
    let mut found = Found::default();
    let mut origins: BTreeMap<Origin, usize> = BTreeMap::new();
    for kind in Kind::ALL {
        let ids = offline.segment_ids(kind)?;
        let mut bar = output.bar("reading headers");
        let mut progress = Progress {
            files_total: ids.len() as u64,
            ..Progress::default()
        };
        for id in ids {
            progress.files += 1;
            bar.show(progress);
            let info = match offline.describe(kind, &id) {
                Ok(Some(info)) => info,
                Ok(None) => continue,
                Err(error) => {
                    found.damaged.push(format!("{id}: {error}"));
                    continue;
                }
            };
            let reference = info.reference;
            let log_of = reference.origin.audit_node();
            let receipt_goes = addressee.is_none_or(|peer| log_of == Some(peer.as_str()));
            if kind == Kind::Audit && log_of != Some(own.as_str()) && receipt_goes {
                found.foreign.push(id);
                let others = custodians.get(&id).into_iter().flatten();
                let keys = others.chain([own]).map(|c| receipt_mark(id, c).key());
                found.keys.extend(keys);
            }
            let too_old = kind == Kind::Audit && info.created_unix_ms < since_unix_ms;
            if args.receipts_only || too_old {
                continue;
            }
            let known = addressee.is_some_and(|peer| {
                log_of == Some(peer.as_str())
                    || custodians.get(&id).is_some_and(|all| all.contains(peer))
            });
            if known {
                found.known += 1;
                continue;
            }
            found.keys.insert(*id.as_bytes());
            let next = origins.len();
            let origin = *origins.entry(reference.origin).or_insert(next);
            found.candidates.push(Candidate {
                kind,
                created_unix_ms: info.created_unix_ms,
                origin,
                sequence: reference.sequence,
                id,
                size_bytes: reference.size_bytes,
            });
        }
    }
    // By name, whatever the order in which they were found.
    let mut rank = vec![0; origins.len()];
    for (place, found_at) in origins.values().enumerate() {
        if let Some(slot) = rank.get_mut(*found_at) {
            *slot = place;
        }
    }
    for candidate in &mut found.candidates {
        candidate.origin = rank.get(candidate.origin).copied().unwrap_or_default();
    }
    // INV-11: urgency first, then age; then by origin, so that the order never depends on file names.
    found.candidates.sort_unstable();
    found.foreign.sort_unstable();
    Ok(found)
}

fn receipt_mark(segment_id: SegmentId, custodian: &NodeId) -> EntryMark {
    EntryMark::Receipt(ReceiptMark {
        segment_id,
        custodian: custodian.clone(),
    })
}

/// The receipts to carry home, as entries.
fn receipts(
    args: &ExportArgs,
    rooted: &Rooted,
    medium: &Medium,
    foreign: &[SegmentId],
) -> Result<Vec<VolumeEntry>, Failure> {
    let own = &rooted.config.node.id;
    let wanted: Vec<&SegmentId> = foreign
        .iter()
        .filter(|id| !medium.held.contains(&receipt_mark(**id, own).key()))
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let backend = Backend::of(&args.config, rooted)?;
    let mut entries = Vec::new();
    for some in wanted.chunks(RECEIPTS_AT_ONCE) {
        let answer = backend.operate("media.receipts", &json!({"ids": some}), false)?;
        for receipt in list(&answer, "receipts") {
            let mark = receipt_mark(
                text(receipt, "segment_id").parse()?,
                &NodeId::new(text(receipt, "custodian"))?,
            );
            if !medium.held.contains(&mark.key()) {
                entries.push(VolumeEntry {
                    mark,
                    bytes: BASE64_STANDARD.decode(text(receipt, "bytes"))?,
                });
            }
        }
    }
    Ok(entries)
}

fn list<'v>(answer: &'v Value, name: &str) -> &'v [Value] {
    answer
        .get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// A file being written, and the hash of what went into it.
struct Hashed {
    file: BufWriter<File>,
    hash: blake3::Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hash.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Where a volume is written to.
enum Sink {
    Plain(BufWriter<File>),
    Age(Box<AgeWriter<Hashed>>),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.write(bytes),
            Self::Age(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush(),
            Self::Age(file) => file.flush(),
        }
    }
}

impl Sink {
    /// Brings all of it to the device: its length, and the hash of an encrypted one.
    fn sync(self) -> io::Result<(u64, Option<[u8; 32]>)> {
        let (file, hash) = match self {
            Self::Plain(file) => (file, None),
            Self::Age(file) => {
                let Hashed { file, hash } = file.finish()?;
                (file, Some(*hash.finalize().as_bytes()))
            }
        };
        let file = file.into_inner().map_err(|e| e.into_error())?;
        file.sync_all()?;
        Ok((file.metadata()?.len(), hash))
    }
}

/// Makes a file on a medium: new, never through a link, and as private as the root that it comes from, where
/// the medium keeps modes.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

struct OpenVolume {
    stem: String,
    writer: VolumeWriter<Sink>,
    keys: Vec<[u8; 32]>,
}

/// An export under way.
struct Export<'a> {
    dir: &'a Path,
    recipients: Option<&'a AgeRecipients>,
    mark: [u8; 32],
    header: VolumeHeader,
    max_bytes: u64,
    volume_bytes: u64,
    written_bytes: u64,
    open: Option<OpenVolume>,
    volumes: Vec<String>,
}

impl Export<'_> {
    /// What a volume of so many bytes and entries costs on the medium, its list included.
    fn cost(&self, plain_bytes: u64, entries: usize) -> u64 {
        self.recipients.map_or(plain_bytes, |to| {
            to.file_bytes(plain_bytes)
                .saturating_add(VolumeList::bytes(entries))
        })
    }

    /// How long a volume may become before it is encrypted.
    fn plain_bytes_max(&self) -> u64 {
        let around = |to: &AgeRecipients| to.file_bytes(self.volume_bytes) - self.volume_bytes;
        self.volume_bytes
            .saturating_sub(self.recipients.map_or(0, around))
    }

    /// Whether the open volume is full for an entry of this length.
    fn is_full(&self, body_bytes: u64) -> bool {
        let full =
            |volume: &OpenVolume| !volume.writer.has_room(body_bytes, self.plain_bytes_max());
        self.open.as_ref().is_some_and(full)
    }

    /// Whether an entry of this length still goes along in this run.
    fn fits(&self, body_bytes: u64) -> bool {
        // What an entry and a volume cost beside the body, at most.
        const AROUND: u64 = 2_048;
        let (bytes, entries) = self.open.as_ref().map_or((0, 0), |volume| {
            (volume.writer.bytes(), volume.writer.entries())
        });
        let (before, bytes, entries) = match self.is_full(body_bytes) {
            true => (self.cost(bytes, entries), 0, 0),
            false => (0, bytes, entries),
        };
        let grown = bytes.saturating_add(body_bytes).saturating_add(AROUND);
        self.written_bytes
            .saturating_add(before)
            .saturating_add(self.cost(grown, entries.saturating_add(1)))
            <= self.max_bytes
    }

    fn part(&self, stem: &str) -> PathBuf {
        self.dir.join(format!("{stem}{UNFINISHED}"))
    }

    /// Begins the next volume.
    fn begin(&mut self) -> Result<(), Failure> {
        self.header.number = self.header.number.saturating_add(1);
        let stem = medium::stem(&self.header.export_id, self.header.number);
        let path = self.part(&stem);
        let file = create(&path).map_err(|e| Failure::at(&path, &e))?;
        let file = BufWriter::new(file);
        let sink = match self.recipients {
            None => Sink::Plain(file),
            Some(to) => {
                let hash = blake3::Hasher::new();
                let hashed = Hashed { file, hash };
                let writer = AgeWriter::new(hashed, to).map_err(|e| self.gave_up(&stem, &e))?;
                Sink::Age(Box::new(writer))
            }
        };
        let writer = VolumeWriter::new(sink, &self.header).map_err(|e| self.gave_up(&stem, &e))?;
        self.open = Some(OpenVolume {
            stem,
            writer,
            keys: Vec::new(),
        });
        Ok(())
    }

    /// Writes an entry; a full volume is ended only now, so that there is always one to be the last.
    fn push(&mut self, entry: &VolumeEntry) -> Result<(), Failure> {
        if self.is_full(entry.bytes.len() as u64) {
            self.finish(false)?;
        }
        if self.open.is_none() {
            self.begin()?;
        }
        let Some(volume) = &mut self.open else {
            return Ok(());
        };
        volume.keys.push(entry.mark.key());
        let pushed = volume.writer.push(entry);
        let stem = volume.stem.clone();
        pushed.map_err(|e| self.gave_up(&stem, &e))
    }

    /// What is unfinished goes; the volumes before it are whole.
    fn gave_up(&self, stem: &str, why: &dyn std::fmt::Display) -> Failure {
        let path = self.part(stem);
        // Where even that fails, the next export onto this medium removes it.
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(self.dir.join(format!("{stem}{UNFINISHED_LIST}")));
        Failure::cannot_run(format!(
            "{}: {why}; {} volumes of this export are whole, run it again for the rest",
            path.display(),
            self.volumes.len()
        ))
    }

    /// Ends the open volume: synced, then named.
    fn finish(&mut self, last: bool) -> Result<(), Failure> {
        let Some(OpenVolume { stem, writer, keys }) = self.open.take() else {
            return Ok(());
        };
        let named = || -> Result<(String, u64), VolumeError> {
            let (mut bytes, hash) = writer.finish(last)?.sync()?;
            let unnamed_list = self.dir.join(format!("{stem}{UNFINISHED_LIST}"));
            if let Some(file_hash) = hash {
                let list = VolumeList {
                    recipients: self.mark,
                    export_id: self.header.export_id,
                    number: self.header.number,
                    last,
                    file_bytes: bytes,
                    file_hash,
                    keys,
                };
                let list = list.encode();
                let mut file = create(&unnamed_list)?;
                file.write_all(&list)?;
                file.sync_all()?;
                bytes = bytes.saturating_add(list.len() as u64);
            }
            let end = hash.map_or(VOLUME, |_| ENCRYPTED);
            let name = format!("{stem}{end}");
            let path = self.dir.join(&name);
            // Nothing on a medium is ever replaced.
            if fs::symlink_metadata(&path).is_ok() {
                return Err(VolumeError::Io(format!("{name} is there already")));
            }
            fs::rename(self.part(&stem), path)?;
            if hash.is_some() {
                fs::rename(unnamed_list, self.dir.join(format!("{stem}{LIST}")))?;
            }
            File::open(self.dir)?.sync_all()?;
            Ok((name, bytes))
        };
        let (name, bytes) = named().map_err(|e| self.gave_up(&stem, &e))?;
        self.volumes.push(name);
        self.written_bytes = self.written_bytes.saturating_add(bytes);
        Ok(())
    }
}

// ---- import -------------------------------------------------------------------------------------

/// The order in which entries take effect: what revokes before what could be revoked (INV-11). Who may sign
/// bundles before the bundles. Receipts give room back before audit takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Revocation,
    Trust,
    Policy,
    Witness,
    Receipt,
    Audit,
}

impl Class {
    const ALL: [Self; 6] = [
        Self::Revocation,
        Self::Trust,
        Self::Policy,
        Self::Witness,
        Self::Receipt,
        Self::Audit,
    ];

    fn of(mark: &EntryMark) -> Self {
        match mark {
            EntryMark::Receipt(_) => Self::Receipt,
            EntryMark::Segment(reference) => match reference.kind {
                Kind::Revocation => Self::Revocation,
                Kind::Policy if reference.origin.policy_name() == Some(TRUST_ORIGIN) => Self::Trust,
                Kind::Policy => Self::Policy,
                Kind::Witness => Self::Witness,
                Kind::Audit => Self::Audit,
            },
        }
    }
}

/// A volume that was read to its end, or as far as it is sound.
struct Volume {
    name: String,
    path: PathBuf,
    header: VolumeHeader,
    counts: BTreeMap<Class, u64>,
    bytes: u64,
    last: Option<bool>,
    fault: Option<String>,
}

fn look(path: &Path, key: Option<&AgeIdentity>, domain: &DomainId) -> Result<Volume, String> {
    let mut reader = open(path, key).map_err(|e| match e {
        VolumeError::Crypt(e) => format!("NO_KEY: {e}; see --key"),
        e => format!("VOLUME: {e}"),
    })?;
    let header = reader.header().clone();
    if header.domain != *domain {
        return Err(format!(
            "WRONG_DOMAIN: a volume of domain {}; this node belongs to {domain}",
            header.domain
        ));
    }
    let mut volume = Volume {
        name: file_name(path),
        path: path.to_owned(),
        header,
        counts: BTreeMap::new(),
        bytes: 0,
        last: None,
        fault: None,
    };
    loop {
        match reader.next_entry() {
            Ok(Some(entry)) => {
                *volume.counts.entry(Class::of(&entry.mark)).or_default() += 1;
                volume.bytes = volume.bytes.saturating_add(entry.bytes.len() as u64);
            }
            Ok(None) => break,
            Err(error) => {
                volume.fault = Some(error.to_string());
                break;
            }
        }
    }
    volume.last = reader.is_last();
    Ok(volume)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// What is wrong with the files as a whole: damage, and volumes that are not there.
fn faults(volumes: &[Volume]) -> Vec<String> {
    let mut all: Vec<String> = volumes
        .iter()
        .filter_map(|v| Some(format!("{}: VOLUME: {}", v.name, v.fault.as_ref()?)))
        .collect();
    let mut exports: BTreeMap<String, (BTreeMap<u32, bool>, bool)> = BTreeMap::new();
    for volume in volumes {
        let (numbers, torn) = exports.entry(volume.header.export()).or_default();
        numbers.insert(volume.header.number, volume.last == Some(true));
        *torn |= volume.fault.is_some();
    }
    for (export, (numbers, torn)) in exports {
        let highest = numbers.keys().next_back().copied().unwrap_or_default();
        let here = numbers.range(1..).count() as u64;
        let missing = u64::from(highest).saturating_sub(here);
        if missing > 0 {
            all.push(format!(
                "MISSING_VOLUME: {missing} of the first {highest} volumes of export {export} are not here"
            ));
        }
        if !torn && !numbers.values().any(|last| *last) {
            all.push(format!(
                "MISSING_VOLUME: the last volume of export {export} is not here"
            ));
        }
    }
    all
}

pub(super) fn import(args: &ImportArgs, output: Output) -> Result<Exit, Failure> {
    let rooted = Rooted::of(&args.config)?;
    // Says so where there is no root; opening a node would make one.
    drop(rooted.offline()?);
    let key = args.key.as_deref().map(keys::identity).transpose()?;
    // A link that the operator names is followed; none that lies on the medium is.
    let path = fs::canonicalize(&args.path).map_err(|e| Failure::at(&args.path, &e))?;
    let paths: Vec<PathBuf> = match path.is_dir() {
        false => vec![path],
        true => medium::names(&path)?
            .into_iter()
            .filter(|name| name.ends_with(VOLUME) || name.ends_with(ENCRYPTED))
            .map(|name| path.join(name))
            .collect(),
    };
    if paths.is_empty() {
        return Err(Failure::at(&args.path, &"no volumes are here"));
    }
    let mut bar = output.bar("reading volumes");
    let mut progress = Progress {
        files_total: paths.len() as u64,
        ..Progress::default()
    };
    let (mut volumes, mut faulty) = (Vec::new(), Vec::new());
    for path in &paths {
        bar.show(progress);
        match look(path, key.as_ref(), &rooted.config.node.domain) {
            Ok(volume) => {
                progress.bytes = progress.bytes.saturating_add(volume.bytes);
                volumes.push(volume);
            }
            Err(why) => faulty.push(format!("{}: {why}", file_name(path))),
        }
        progress.files += 1;
    }
    drop(bar);
    // The names mean nothing: the oldest export first, each in its own order.
    volumes.sort_by_key(|v| {
        (
            v.header.created_unix_ms,
            v.header.export_id,
            v.header.number,
        )
    });
    faulty.extend(faults(&volumes));
    let mut work = Import {
        backend: Backend::of(&args.config, &rooted)?,
        apply: args.apply,
        output,
        planned_bytes: 0,
        shown: 0,
        counts: BTreeMap::new(),
        bar: output.bar(if args.apply { "importing" } else { "judging" }),
        progress: Progress {
            files_total: volumes.iter().flat_map(|v| v.counts.values()).sum(),
            ..Progress::default()
        },
        faults: faulty,
        planned: HashSet::new(),
        unsound: BTreeSet::new(),
        forged: BTreeMap::new(),
    };
    work.begin(&volumes, &rooted.config.node.id);
    let ended = Class::ALL.into_iter().try_for_each(|class| {
        volumes
            .iter()
            .try_for_each(|volume| work.class(class, volume, key.as_ref()))
    });
    let sound = work.count("refused") == 0 && work.faults.is_empty();
    work.end(ended.as_ref().err());
    match ended {
        Err(failure) if !output.is_json() => Err(failure),
        Err(failure) => Ok(failure.exit),
        Ok(()) if sound => Ok(Exit::Done),
        Ok(()) => Ok(Exit::Failed),
    }
}

/// An import under way, or its plan.
struct Import {
    backend: Backend,
    apply: bool,
    output: Output,
    planned_bytes: u64,
    shown: u64,
    counts: BTreeMap<(String, Class), u64>,
    bar: Bar,
    progress: Progress,
    faults: Vec<String>,
    /// What the plan would take: as much as there is room for, and what is signed by those who may.
    planned: HashSet<[u8; 32]>,
    /// Volumes of which no more is read.
    unsound: BTreeSet<PathBuf>,
    /// Damaged and forged entries of each volume.
    forged: BTreeMap<PathBuf, u64>,
}

impl Import {
    fn count(&self, fate: &str) -> u64 {
        let of = self.counts.iter().filter(|((name, _), _)| name == fate);
        of.map(|(_, count)| count).sum()
    }

    fn begin(&self, volumes: &[Volume], own: &NodeId) {
        if self.output.is_json() {
            let list: Vec<Value> = volumes
                .iter()
                .map(|v| {
                    json!({
                        "file": v.name, "exporter": v.header.exporter, "for": v.header.addressee,
                        "export": v.header.export(), "number": v.header.number,
                        "created_unix_ms": v.header.created_unix_ms, "bytes": v.bytes,
                        "entries": v.counts.values().sum::<u64>(), "last": v.last,
                        "fault": v.fault,
                    })
                })
                .collect();
            self.output.part(&format!(
                "{{\"applied\":{},\"volumes\":{},\"entries\":[",
                self.apply,
                json!(list)
            ));
            return;
        }
        let head = match self.apply {
            true => "importing\n",
            false => "plan (act with --apply)\n",
        };
        self.output.part(head);
        for volume in volumes {
            let meant = match &volume.header.addressee {
                Some(peer) if peer != own => format!(", meant for {peer}"),
                _ => String::new(),
            };
            self.output.part(&format!(
                "  {}: volume {} from {}{meant}, {} entries, {}\n",
                shown(&volume.name),
                volume.header.number,
                volume.header.exporter,
                volume.counts.values().sum::<u64>(),
                human_bytes(volume.bytes)
            ));
        }
    }

    /// No more is read of a volume; the others go on.
    fn give_up(&mut self, volume: &Volume, why: &dyn std::fmt::Display) {
        self.faults.push(format!("{}: {why}", volume.name));
        self.unsound.insert(volume.path.clone());
    }

    /// Gives the entries of one class of one volume to the node.
    fn class(
        &mut self,
        class: Class,
        volume: &Volume,
        key: Option<&AgeIdentity>,
    ) -> Result<(), Failure> {
        let left = volume.counts.get(&class).copied().unwrap_or_default();
        if left == 0 || self.unsound.contains(&volume.path) {
            return Ok(());
        }
        let mut batch: Vec<VolumeEntry> = Vec::new();
        let changed = self.batches(class, volume, left, key, &mut batch)?;
        // What was read before is sound.
        self.send(class, volume, batch)?;
        if let Some(why) = changed {
            let why = format!("VOLUME: changed while it was read: {why}");
            self.give_up(volume, &why);
        }
        Ok(())
    }

    /// Sends full batches, and leaves the last one; why the volume cannot be read as it was before.
    fn batches(
        &mut self,
        class: Class,
        volume: &Volume,
        mut left: u64,
        key: Option<&AgeIdentity>,
        batch: &mut Vec<VolumeEntry>,
    ) -> Result<Option<String>, Failure> {
        let mut reader = match open(&volume.path, key) {
            Ok(reader) if *reader.header() == volume.header => reader,
            Ok(_) => return Ok(Some("it is another volume now".to_owned())),
            Err(error) => return Ok(Some(error.to_string())),
        };
        let mut batch_bytes = 0;
        while left > 0 && !self.unsound.contains(&volume.path) {
            let entry = match reader.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(Some("it is shorter now".to_owned())),
                Err(error) => return Ok(Some(error.to_string())),
            };
            if Class::of(&entry.mark) != class {
                continue;
            }
            left -= 1;
            if self.planned.contains(&entry.mark.key()) && entry.is_as_marked() {
                // By the time that it is its turn it will be.
                self.entry(class, volume, &entry.mark, &json!({"fate": "held"}));
                continue;
            }
            if batch_bytes + entry.bytes.len() > REQUEST_BYTES || batch.len() >= ENTRIES_AT_ONCE {
                self.send(class, volume, std::mem::take(batch))?;
                batch_bytes = 0;
            }
            batch_bytes += entry.bytes.len();
            batch.push(entry);
        }
        Ok(None)
    }

    fn send(
        &mut self,
        class: Class,
        volume: &Volume,
        batch: Vec<VolumeEntry>,
    ) -> Result<(), Failure> {
        let mut entries = Vec::new();
        for VolumeEntry { mark, bytes } in &batch {
            let content = match mark {
                EntryMark::Segment(reference) if bytes.len() > REQUEST_BYTES => {
                    let mut offset = 0;
                    for part in bytes.chunks(REQUEST_BYTES) {
                        let body = json!({
                            "id": reference.id, "offset": offset,
                            "bytes": BASE64_STANDARD.encode(part),
                        });
                        self.backend.operate("media.part", &body, false)?;
                        offset += part.len();
                    }
                    None
                }
                _ => Some(BASE64_STANDARD.encode(bytes)),
            };
            entries.push(json!({"mark": mark, "bytes": content}));
            self.progress.bytes += bytes.len() as u64;
        }
        if entries.is_empty() || self.unsound.contains(&volume.path) {
            return Ok(());
        }
        let body = json!({
            "exporter": volume.header.exporter,
            "export": volume.header.export(),
            "number": volume.header.number,
            "planned_bytes": self.planned_bytes,
            "entries": entries,
        });
        let answer = self.backend.operate("media.import", &body, self.apply)?;
        self.planned_bytes = answer
            .get("planned_bytes")
            .and_then(Value::as_u64)
            .unwrap_or_default();
        let results = list(&answer, "results");
        if results.len() != batch.len() {
            return Err(Failure::cannot_run("the node left entries unanswered"));
        }
        for (entry, result) in batch.iter().zip(results) {
            self.entry(class, volume, &entry.mark, result);
        }
        if self.forged.get(&volume.path) >= Some(&FORGED_MAX) {
            let why = format!(
                "FORGED: {FORGED_MAX} entries or more are damaged or forged; the rest of it was not judged"
            );
            self.give_up(volume, &why);
        }
        self.bar.show(self.progress);
        Ok(())
    }

    fn entry(&mut self, class: Class, volume: &Volume, mark: &EntryMark, result: &Value) {
        self.progress.files += 1;
        let fate = text(result, "fate");
        *self.counts.entry((fate.to_owned(), class)).or_default() += 1;
        if !self.apply && fate == "new" {
            self.planned.insert(mark.key());
        }
        if result.get("forged").and_then(Value::as_bool) == Some(true) {
            *self.forged.entry(volume.path.clone()).or_default() += 1;
        }
        if self.output.is_json() {
            let mut line = json!({"file": volume.name});
            let more = [Some(result.clone()), serde_json::to_value(mark).ok()];
            if let Some(line) = line.as_object_mut() {
                for part in more.into_iter().flatten() {
                    if let Value::Object(part) = part {
                        line.extend(part);
                    }
                }
            }
            let comma = if self.shown > 0 { "," } else { "" };
            self.output.part(&format!("{comma}{line}"));
            self.shown += 1;
        } else if fate == "refused" {
            let what = match mark {
                EntryMark::Segment(r) => format!("{} {} of {}", r.id, r.sequence, r.origin),
                EntryMark::Receipt(m) => format!("receipt of {} for {}", m.custodian, m.segment_id),
            };
            self.output.part(&format!(
                "REFUSED {what}: {}: {}\n",
                text(result, "code"),
                shown(text(result, "message"))
            ));
        }
    }

    fn end(self, failure: Option<&Failure>) {
        let mut counts: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for ((fate, class), count) in &self.counts {
            let class = format!("{class:?}").to_lowercase();
            *counts
                .entry(fate.clone())
                .or_default()
                .entry(class)
                .or_default() += count;
        }
        let Self {
            output,
            apply,
            faults,
            ..
        } = self;
        if output.is_json() {
            output.part(&format!(
                "],\"fates\":{},\"faults\":{},\"error\":{}}}\n",
                json!(counts),
                json!(faults),
                json!(failure.map(|f| &f.message))
            ));
            return;
        }
        for fault in faults {
            output.part(&format!("FAULT {}\n", shown(&fault)));
        }
        for (fate, classes) in counts {
            let word = match (fate.as_str(), apply) {
                ("new", true) => "taken",
                ("new", false) => "would be taken",
                ("held", _) => "held already",
                ("not_wanted", _) => "of no use here",
                (other, _) => other,
            };
            let of: Vec<String> = classes.iter().map(|(c, n)| format!("{n} {c}")).collect();
            output.part(&format!("  {word}: {}\n", of.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read_or_refused() {
        let at = |text: &str| since(text).map(|s| s.unix_ms(1_000_000_000_000));
        assert_eq!(at("7d"), Ok(1_000_000_000_000 - 7 * 86_400_000));
        assert_eq!(at("90m"), Ok(1_000_000_000_000 - 90 * 60_000));
        assert_eq!(at("2001-09-09T01:46:40Z"), Ok(1_000_000_000_000));
        assert_eq!(at("1970-01-02"), Ok(86_400_000));
        for bad in ["", "d", "7", "7y", "-1d", "yesterday", "1960-01-01", "7d "] {
            assert!(at(bad).is_err(), "{bad}");
        }
        assert_eq!(volume_size("4KiB"), Ok(4_096));
        for bad in ["3KiB", "4GiB", "x", ""] {
            assert!(volume_size(bad).is_err(), "{bad}");
        }
        assert_eq!("any".parse(), Ok(For::Any));
        assert!("no such node".parse::<For>().is_err());
    }
}
