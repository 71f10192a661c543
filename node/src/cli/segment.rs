//! `tidelock segment …`: reads the files below a root, on a running or a stopped node. Nothing here
//! takes the lock or changes a file, except `repair --apply`, and what `media.rs` does.

use std::{fs, path::PathBuf, sync::Arc};

use clap::Subcommand;
use serde_json::{Value, json};
use tidelock_segments::{
    CustodyReceipt, DiskError, KeyUnwrap, Kind, NodeId, Origin, RealDisk, SegmentId, Sha256Hash,
    VerifiedSegment,
    offline::{
        Finding, FsckOptions, FsckReport, Offline, OfflineError, Progress, RepairAction,
        RepairError, RepairPlan, SegmentInfo, Severity, repair, segment_path,
    },
    parse_body,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    ConfigArg, Exit, Failure, Output,
    keys::KeyArg,
    media,
    output::{Bar, human_bytes, rate, table},
};
use crate::{
    clock::wall_unix_ms,
    config::{Config, ConfigError},
};

/// What to do with stored segments.
#[derive(Debug, Subcommand)]
pub enum SegmentCommand {
    /// List stored segments: urgent kinds first, then by origin and sequence. Reads their headers
    /// only; `segment verify` reads all of them.
    #[command(
        after_help = "Examples:\n  tidelock segment ls --kind audit --limit 20\n  \
                      tidelock segment ls --origin audit/a/0123456789abcdef/1 --from 40 --to 50 --json"
    )]
    Ls {
        /// Only this kind: revocation, policy, witness or audit.
        #[arg(long)]
        kind: Option<Kind>,
        /// Only of this log, policy or CA.
        #[arg(long, value_parser = Origin::parse)]
        origin: Option<Origin>,
        /// Only from this sequence on.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Only up to this sequence.
        #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
        to: u64,
        /// At most so many.
        #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
        limit: usize,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Show one segment: header, span, checkpoint, who signed it, and the receipts for it.
    #[command(after_help = "Examples:\n  tidelock segment show blake3:6f…\n  \
                      tidelock segment show blake3:6f… --records")]
    Show {
        /// The segment's id.
        id: SegmentId,
        /// Its records too.
        #[arg(long)]
        records: bool,
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Verify one stored segment or all: hash, encoding, domain, signature, and the tree over the
    /// records of audit segments.
    #[command(after_help = "Examples:\n  tidelock segment verify\n  \
                            tidelock segment verify blake3:6f… --json")]
    Verify {
        /// Only this one.
        id: Option<SegmentId>,
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Check the whole root: segments, logs, receipts, state files, leftovers of crashes, foreign
    /// files, modes, and the arithmetic of the ceiling. Says of each finding what `repair` would do.
    #[command(
        after_help = "Exit codes: 0 nothing is damaged (there may be leftovers, foreign files and notes), \
                      1 something is.\n\nExample:\n  tidelock segment fsck --json | jq '.findings[].code'"
    )]
    Fsck(ConfigArg),
    /// Print what would be repaired, step by step; do it with --apply, on a stopped node. Damaged
    /// files go to the quarantine, leftovers under tmp/ are removed, and the node's log tells of it
    /// from its next start on.
    #[command(
        after_help = "Examples:\n  tidelock segment repair                 the plan\n  \
                      tidelock segment repair --apply --plan sha256:…   exactly that plan"
    )]
    Repair {
        /// Print the plan only; this is the default.
        #[arg(long, conflicts_with = "apply")]
        dry_run: bool,
        /// Act. Takes the root's lock, so no node may run.
        #[arg(long)]
        apply: bool,
        /// Act only if the plan is still the one with this digest.
        #[arg(long, requires = "apply")]
        plan: Option<Sha256Hash>,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Write segments and custody receipts to removable media, in volumes, urgent kinds first. What the
    /// medium holds already is left out, so that an interrupted export is gone on with by running it again.
    #[command(
        after_help = "Exit codes: 0 written (the answer says what is left for want of room), 1 something \
                      here or on the medium is damaged, the rest is written, 2 could not run.\n\n\
                      Examples:\n  tidelock segment export --to /media/stick --for b\n  \
                      tidelock segment export --to /media/stick --for any --since 7d --max-bytes 2GiB\n  \
                      tidelock segment export --to /media/stick --for b --encrypt-to age1…\n  \
                      tidelock segment export --to /media/stick --for a --receipts-only"
    )]
    Export(media::ExportArgs),
    /// Print what taking the volumes of a medium would do, segment by segment; do it with --apply. Every
    /// check of a live session holds, and taking it twice changes nothing. On a stopped node the root is
    /// opened as the node itself would.
    #[command(
        after_help = "Exit codes: 0 nothing was refused, 1 something was, or a volume is damaged or \
                      missing; the rest is taken, 2 could not run.\n\n\
                      Examples:\n  tidelock segment import /media/stick              the plan\n  \
                      tidelock segment import /media/stick --apply      the act\n  \
                      tidelock segment import /media/stick --key id.txt --apply"
    )]
    Import(media::ImportArgs),
}

/// A config and the root that it names.
pub(super) struct Rooted {
    pub(super) config: Config,
    disk: RealDisk,
    keys: Option<Arc<dyn KeyUnwrap>>,
}

impl Rooted {
    pub(super) fn of(args: &ConfigArg) -> Result<Self, ConfigError> {
        Ok(Self {
            config: Config::load(&args.config)?,
            disk: RealDisk,
            keys: None,
        })
    }

    /// With the key that `key` names.
    pub(super) fn with(mut self, key: &KeyArg) -> Result<Self, Failure> {
        self.keys = key.load()?;
        Ok(self)
    }

    pub(super) fn keys(&self) -> Option<&dyn KeyUnwrap> {
        self.keys.as_deref()
    }

    pub(super) fn offline(&self) -> Result<Offline<'_>, DiskError> {
        let config = &self.config.node;
        let offline = Offline::open(&self.disk, &config.root, &config.domain)?;
        Ok(offline.with_keys(self.keys.clone()))
    }

    pub(super) fn fsck_options(&self) -> FsckOptions {
        let config = &self.config;
        let root = fs::canonicalize(&config.node.root).unwrap_or_default();
        let socket = &config.gateway.unix;
        let socket = match (socket.parent().map(fs::canonicalize), socket.file_name()) {
            (Some(Ok(dir)), Some(name)) => dir.join(name),
            _ => socket.clone(),
        };
        FsckOptions {
            node_id: config.node.id.clone(),
            ceiling_bytes: config.node.ceiling_bytes,
            reserve_bytes: config.node.reserve_bytes,
            custody_max_bytes: config.audit.custody_max_bytes,
            known: socket
                .strip_prefix(&root)
                .ok()
                .and_then(|rel| rel.to_str())
                .map(|rel| vec![rel.to_owned()])
                .unwrap_or_default(),
            in_use: self.in_use(),
        }
    }

    /// Whether a process holds the root's lock, as the kernel lists locks. Trying the lock instead
    /// could keep a node from starting at that moment. Where the list cannot be read: it may be.
    pub(super) fn in_use(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let Ok(lock) = fs::metadata(self.config.node.root.join("lock")) else {
            return false;
        };
        let ours = format!(":{}", lock.ino());
        fs::read_to_string("/proc/locks").map_or(true, |locks| {
            locks.lines().any(|line| {
                let mut words = line.split_whitespace().skip(1);
                words.next() == Some("FLOCK") && words.nth(3).is_some_and(|at| at.ends_with(&ours))
            })
        })
    }
}

pub(super) fn run(command: SegmentCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        SegmentCommand::Ls {
            kind,
            origin,
            from,
            to,
            limit,
            config,
        } => {
            let filter = Filter {
                kind: kind.or_else(|| origin.as_ref().map(Origin::kind)),
                origin,
                from,
                to,
                limit,
            };
            list(&Rooted::of(&config)?.offline()?, &filter, *output)
        }
        SegmentCommand::Show {
            id,
            records,
            key,
            config,
        } => {
            let rooted = Rooted::of(&config)?.with(&key)?;
            show(&rooted.offline()?, &id, records, output)
        }
        SegmentCommand::Verify { id, key, config } => {
            verify(&Rooted::of(&config)?.with(&key)?.offline()?, id, *output)
        }
        SegmentCommand::Fsck(args) => fsck(&Rooted::of(&args)?, *output),
        SegmentCommand::Repair {
            dry_run: _,
            apply,
            plan,
            config,
        } => mend(&Rooted::of(&config)?, apply, plan, *output),
        SegmentCommand::Export(args) => media::export(&args, *output),
        SegmentCommand::Import(args) => media::import(&args, *output),
    }
}

/// What to list.
struct Filter {
    kind: Option<Kind>,
    origin: Option<Origin>,
    from: u64,
    to: u64,
    limit: usize,
}

impl Filter {
    fn takes(&self, info: &SegmentInfo) -> bool {
        let reference = &info.reference;
        (self.from..=self.to).contains(&reference.sequence)
            && self
                .origin
                .as_ref()
                .is_none_or(|origin| *origin == reference.origin)
    }
}

/// Lists segments as they come: what is held in memory of each is its place in the order.
fn list(offline: &Offline<'_>, filter: &Filter, output: Output) -> Result<Exit, Failure> {
    let custodians = offline.custodians()?;
    let mut line = Lines::begin(output);
    for kind in Kind::ALL
        .into_iter()
        .filter(|kind| filter.kind.is_none_or(|only| only == *kind))
    {
        let ids = offline.segment_ids(kind)?;
        let mut bar = output.bar("reading headers");
        let mut progress = Progress {
            files_total: ids.len() as u64,
            ..Progress::default()
        };
        let mut origins: Vec<Origin> = Vec::new();
        let mut order: Vec<(usize, u64, SegmentId)> = Vec::new();
        for id in ids {
            progress.files += 1;
            bar.show(progress);
            match offline.describe(kind, &id) {
                Ok(Some(info)) if filter.takes(&info) => {
                    let at = origins.iter().position(|o| *o == info.reference.origin);
                    let at = at.unwrap_or_else(|| {
                        origins.push(info.reference.origin.clone());
                        origins.len() - 1
                    });
                    order.push((at, info.reference.sequence, id));
                }
                Ok(_) => {}
                Err(error) if filter.origin.is_none() => {
                    line.damaged(&segment_path(kind, &id), &error);
                }
                Err(_) => {}
            }
        }
        drop(bar);
        let mut names: Vec<usize> = (0..origins.len()).collect();
        names.sort_by_key(|at| origins.get(*at));
        let mut rank = vec![0; names.len()];
        for (place, at) in names.iter().enumerate() {
            if let Some(slot) = rank.get_mut(*at) {
                *slot = place;
            }
        }
        order.sort_by_key(|(at, sequence, id)| (rank.get(*at).copied(), *sequence, *id));
        for (_, _, id) in order {
            if line.count >= filter.limit {
                break;
            }
            // Evicted meanwhile: no longer there to be listed.
            let Ok(Some(info)) = offline.describe(kind, &id) else {
                continue;
            };
            let kept_by = custodians.get(&id).map_or(&[][..], Vec::as_slice);
            if !line.segment(&info, kept_by) {
                return Ok(Exit::Done);
            }
        }
    }
    line.end();
    Ok(Exit::Done)
}

/// Writes a list line by line: a table for people, one JSON document for machines.
struct Lines {
    output: Output,
    count: usize,
    damaged: usize,
}

impl Lines {
    fn begin(output: Output) -> Self {
        if output.is_json() {
            output.part("{\"segments\":[");
        } else {
            output.part(&format!(
                "{:<10} {:>10} {:>10} {:>10} {:>9} {:>4}  {:<71}  origin\n",
                "kind", "sequence", "bytes", "raw", "records", "kept", "id"
            ));
        }
        Self {
            output,
            count: 0,
            damaged: 0,
        }
    }

    fn item(&mut self, value: &Value) -> bool {
        let comma = if self.count + self.damaged > 0 {
            ","
        } else {
            ""
        };
        self.output.part(&format!("{comma}{value}"))
    }

    fn segment(&mut self, info: &SegmentInfo, custodians: &[NodeId]) -> bool {
        let reference = &info.reference;
        let reads = if self.output.is_json() {
            self.item(&describe(info, custodians))
        } else {
            self.output.part(&format!(
                "{:<10} {:>10} {:>10} {:>10} {:>9} {:>4}  {:<71}  {}\n",
                reference.kind.to_string(),
                reference.sequence,
                reference.size_bytes,
                info.raw_bytes,
                info.records(),
                custodians.len(),
                reference.id.to_string(),
                reference.origin,
            ))
        };
        self.count += 1;
        reads
    }

    fn damaged(&mut self, file: &str, why: &OfflineError) {
        if self.output.is_json() {
            self.item(&json!({"file": file, "damaged": why.to_string()}));
        } else {
            self.output.part(&format!("DAMAGED {file}: {why}\n"));
        }
        self.damaged += 1;
    }

    fn end(self) {
        if self.output.is_json() {
            self.output.part("]}\n");
        }
    }
}

fn describe(info: &SegmentInfo, custodians: &[NodeId]) -> Value {
    let reference = &info.reference;
    json!({
        "id": reference.id,
        "kind": reference.kind,
        "origin": reference.origin,
        "sequence": reference.sequence,
        "prev": reference.prev,
        "created_unix_ms": info.created_unix_ms,
        "bytes": reference.size_bytes,
        "raw_bytes": info.raw_bytes,
        "allocated_bytes": info.allocated_bytes,
        "first": info.span.map(|span| span.first),
        "last": info.span.map(|span| span.last),
        "record_count": info.records(),
        "body_version": info.body_version,
        "compressed": info.compressed,
        "encrypted": info.encrypted,
        "custodians": custodians,
    })
}

/// A segment with its kind and whether its records were read, or what is wrong with it, as an answer
/// to the person who asked for it.
fn held(offline: &Offline<'_>, id: &SegmentId) -> Result<(Kind, VerifiedSegment, bool), Failure> {
    let found = offline.kind_of(id)?;
    let not_held = || Failure::failed(format!("{id} is not held; see tidelock segment ls"));
    let kind = found.ok_or_else(not_held)?;
    match offline.verify(kind, id) {
        Ok(Some((segment, was_read))) => Ok((kind, segment, was_read)),
        Ok(None) => Err(not_held()),
        Err(error) => Err(Failure::failed(format!(
            "{id} is damaged: {error}; see tidelock segment fsck"
        ))),
    }
}

fn show(
    offline: &Offline<'_>,
    id: &SegmentId,
    with_records: bool,
    output: &Output,
) -> Result<Exit, Failure> {
    let (kind, segment, was_read) = held(offline, id)?;
    let info = offline.describe(kind, id)?;
    let receipts = offline.receipts(id)?;
    let custodians: Vec<NodeId> = receipts.iter().map(|r| r.custodian.clone()).collect();
    let mut shown = info.map_or_else(|| json!({"id": id}), |info| describe(&info, &custodians));
    let signed = segment.endorsement().map(|endorsement| {
        let certificate = endorsement
            .chain
            .first()
            .and_then(|der| X509Certificate::from_der(der).ok());
        json!({
            "node": endorsement.node_id,
            "incarnation": endorsement.incarnation,
            "log_key": endorsement.log_key.fingerprint(),
            "certificate": certificate.map(|(_, c)| json!({
                "subject": c.subject().to_string(),
                "issuer": c.issuer().to_string(),
                "not_after": c.validity().not_after.to_string(),
            })),
        })
    });
    let mut add = |key: &str, value: Value| {
        if let Some(fields) = shown.as_object_mut() {
            fields.insert(key.to_owned(), value);
        }
    };
    add("signed", json!(signed.is_some()));
    add("endorsement", json!(signed));
    add(
        "receipts",
        json!(receipts.iter().map(receipt).collect::<Vec<_>>()),
    );
    if kind == Kind::Audit {
        let header = segment.header();
        let body = parse_body(segment.body(), &header.domain, &header.origin)?;
        add("checkpoint", json!(body.checkpoint_note()));
        add("root", json!(body.span().root));
        if with_records {
            if !was_read {
                return Err(Failure::failed(
                    "its records are encrypted; name the site key with --key",
                ));
            }
            let mut reader = body.records(offline.keys())?;
            let mut records = Vec::new();
            while let Some((index, bytes)) = reader.next_record()? {
                records.push(super::audit::record(index, bytes));
            }
            add("records", json!(records));
        }
    }
    output.say(&shown, || {
        serde_json::to_string_pretty(&shown).unwrap_or_default()
    });
    Ok(Exit::Done)
}

fn receipt(receipt: &CustodyReceipt) -> Value {
    json!({
        "custodian": receipt.custodian,
        "issued_unix_ms": receipt.issued_unix_ms,
        "first": receipt.first,
        "last": receipt.last,
    })
}

fn verify(offline: &Offline<'_>, only: Option<SegmentId>, output: Output) -> Result<Exit, Failure> {
    let mut todo: Vec<(Kind, SegmentId)> = Vec::new();
    match only {
        Some(id) => {
            let kind = offline.kind_of(&id)?.ok_or_else(|| {
                Failure::failed(format!("{id} is not held; see tidelock segment ls"))
            })?;
            todo.push((kind, id));
        }
        None => {
            for kind in Kind::ALL {
                todo.extend(offline.segment_ids(kind)?.into_iter().map(|id| (kind, id)));
            }
        }
    }
    let mut bar = output.bar("verifying");
    let mut progress = Progress {
        files_total: todo.len() as u64,
        ..Progress::default()
    };
    let (mut good, mut unread) = (0_u64, 0_u64);
    let mut damaged: Vec<(PathBuf, String)> = Vec::new();
    for (kind, id) in todo {
        match offline.verify(kind, &id) {
            // Evicted since it was listed.
            Ok(None) => {}
            Ok(Some((segment, was_read))) => {
                good += 1;
                unread += u64::from(!was_read);
                progress.bytes += segment.bytes().len() as u64;
                progress.records += segment
                    .audit_span()
                    .filter(|_| was_read)
                    .map_or(0, |span| (span.last - span.first).saturating_add(1));
            }
            Err(error) => {
                let file = offline.root().join(segment_path(kind, &id));
                damaged.push((file, error.to_string()));
            }
        }
        progress.files += 1;
        bar.show(progress);
    }
    let spent = bar.spent();
    drop(bar);
    let all = good + damaged.len() as u64;
    let list: Vec<Value> = damaged
        .iter()
        .map(|(file, why)| json!({"file": file, "why": why}))
        .collect();
    let value = json!({
        "ok": damaged.is_empty(),
        "segments": all,
        "unread_segments": unread,
        "records": progress.records,
        "bytes": progress.bytes,
        "damaged": list,
    });
    output.say(&value, || {
        let mut lines: Vec<String> = damaged
            .iter()
            .map(|(file, why)| format!("DAMAGED {}: {why}", file.display()))
            .collect();
        if unread > 0 {
            lines.push(format!(
                "{unread} segments are encrypted: their records were not read; name the site key with --key"
            ));
        }
        lines.push(format!(
            "{all} segments, {} damaged; {} and {} records read ({})",
            damaged.len(),
            human_bytes(progress.bytes),
            progress.records,
            rate(progress, spent),
        ));
        lines.join("\n")
    });
    Ok(if damaged.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    })
}

fn fsck(rooted: &Rooted, output: Output) -> Result<Exit, Failure> {
    let report = check(rooted, &mut output.bar("checking"))?;
    let in_use = rooted.in_use();
    let mut value = serde_json::to_value(&report)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("root".to_owned(), json!(rooted.config.node.root));
        fields.insert("in_use".to_owned(), json!(in_use));
    }
    output.say(&value, || fsck_text(&report, in_use));
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

fn check(rooted: &Rooted, bar: &mut Bar) -> Result<FsckReport, DiskError> {
    rooted
        .offline()?
        .fsck(&rooted.fsck_options(), &mut |progress| bar.show(progress))
}

fn severity(finding: &Finding) -> &'static str {
    match finding.severity {
        Severity::Damage => "DAMAGE",
        Severity::Leftover => "leftover",
        Severity::Foreign => "foreign",
        Severity::Note => "note",
    }
}

fn fsck_text(report: &FsckReport, in_use: bool) -> String {
    let mut lines = Vec::new();
    for finding in &report.findings {
        let mut head = format!("{}  {}", severity(finding), finding.code);
        if !finding.path.is_empty() {
            head.push_str(&format!("  {}", finding.path));
        }
        if let Some(uid) = finding.uid {
            head.push_str(&format!(
                "  ({} bytes, mode {}, user {uid})",
                finding.allocated_bytes, finding.mode
            ));
        }
        lines.push(head);
        lines.push(format!("    {}", finding.meaning));
        lines.push(format!("    repair: {}", finding.repair.text()));
    }
    if !lines.is_empty() {
        lines.push(String::new());
    }
    let rows: Vec<Vec<String>> = report
        .areas
        .iter()
        .map(|(area, usages)| {
            vec![
                area.clone(),
                usages.files.to_string(),
                usages.allocated_bytes.to_string(),
            ]
        })
        .collect();
    lines.push(table(&["area", "files", "allocated bytes"], &rows));
    let usage = &report.usage;
    lines.push(format!(
        "\n{} of {} bytes, {} of them audit of others (at most {}); the ladder is {:?}",
        usage.allocated_bytes,
        usage.ceiling_bytes,
        usage.custody_bytes,
        usage.custody_max_bytes,
        report.ladder
    ));
    let of = |severity| {
        let all = report.findings.iter();
        all.filter(|finding| finding.severity == severity).count()
    };
    lines.push(format!(
        "{} segments and {} records read: {} damaged, {} leftover, {} foreign{}",
        report.segments,
        report.records,
        of(Severity::Damage),
        of(Severity::Leftover),
        of(Severity::Foreign),
        if in_use {
            "; a node runs here, what it is writing was left out"
        } else {
            ""
        },
    ));
    lines.join("\n")
}

fn mend(
    rooted: &Rooted,
    apply: bool,
    agreed: Option<Sha256Hash>,
    output: Output,
) -> Result<Exit, Failure> {
    let mut bar = output.bar("checking");
    let (plan, note) = if apply {
        let config = &rooted.config;
        let done = repair(
            &rooted.disk,
            &config.node.root,
            &config.node.domain,
            &rooted.fsck_options(),
            agreed,
            wall_unix_ms(),
            &mut |progress| bar.show(progress),
        );
        match done {
            Ok(done) => (done.plan, Some(done.note)),
            Err(RepairError::Disk(error)) => return Err(error.into()),
            Err(refused) => return Err(Failure::failed(refused.to_string())),
        }
    } else {
        (RepairPlan::of(&check(rooted, &mut bar)?), None)
    };
    drop(bar);
    let mut value = serde_json::to_value(&plan)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("applied".to_owned(), json!(apply));
    }
    output.say(&value, || plan_text(&plan, note));
    Ok(Exit::Done)
}

fn plan_text(plan: &RepairPlan, note: Option<&str>) -> String {
    if plan.steps.is_empty() {
        return "nothing to repair; tidelock segment fsck lists what was found".to_owned();
    }
    let mut lines: Vec<String> = plan
        .steps
        .iter()
        .map(|step| {
            let what = match (step.action, &step.to) {
                (RepairAction::Quarantine, Some(to)) => format!("move {} to {to}", step.path),
                _ => format!("remove {}", step.path),
            };
            format!(
                "{:>4}  {what}\n      {}: {}",
                step.number, step.code, step.meaning
            )
        })
        .collect();
    if plan.left_for_later > 0 {
        lines.push(format!(
            "{} more findings: repair again",
            plan.left_for_later
        ));
    }
    lines.push(match note {
        Some(note) => format!(
            "done: plan {}; noted in {note}, the node records it at its next start",
            plan.digest
        ),
        None => format!(
            "plan {0}\nnothing was changed; with the node stopped: tidelock segment repair --apply --plan {0}",
            plan.digest
        ),
    });
    lines.join("\n")
}
