//! `tidelock audit …`: what reads does so from the files below a root, on a running or a stopped
//! node. What acts is asked of the running node.

use std::{fs, path::PathBuf, time::Duration};

use clap::{Subcommand, ValueHint};
use serde::Serialize;
use serde_json::{Value, json};
use tidelock_segments::{
    AuditReport, Checkpoint, Kind, Origin, RealDisk, VerifyOptions, VerifyProgress,
    merkle::leaf_hash,
    offline::{LogEntry, Offline, OfflineError, Progress},
    verify_log_with,
};
use tidelock_transport::{
    endorse::verify_endorsement,
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl},
    verifier::Trust,
};

use super::{
    ConfigArg, Exit, Failure, Output,
    keys::KeyArg,
    node,
    output::{human_bytes, rate, table},
    proof::{self, ProveArgs},
    segment::Rooted,
    stat,
};
use crate::{clock::wall_unix_ms, config::Config};

/// How often `tail --follow` looks for new records.
const FOLLOW_EVERY: Duration = Duration::from_millis(250);

/// What to do with audit logs.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Show the newest records of the own log, those not sealed yet included.
    #[command(after_help = "Examples:\n  tidelock audit tail -n 20\n  \
                            tidelock audit tail -f --json | jq .record.reason")]
    Tail {
        /// How many.
        #[arg(short = 'n', long, default_value_t = 10)]
        lines: u64,
        /// All of them.
        #[arg(long, conflicts_with = "lines")]
        all: bool,
        /// Go on with each new record until interrupted; with --json one document a line.
        #[arg(short = 'f', long)]
        follow: bool,
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Prove one record to somebody who holds nothing but the CA's certificate, or the log's key: a
    /// document with the record, its path to a signed checkpoint, and who vouches for the log's key.
    #[command(
        after_help = "Examples:\n  tidelock audit prove 4711 --out record.proof\n  \
                      tidelock audit prove --leaf sha256:6f… --latest\n  \
                      tidelock audit verify --proof record.proof --key-of ca.crt"
    )]
    Prove {
        #[command(flatten)]
        args: ProveArgs,
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// What is held of each log: records, bytes, gaps, custodians, what nobody else holds yet, and
    /// when the disk will be full.
    Stat {
        /// Read the header of every segment instead of the index: slower, and tells what the records
        /// were before they were compressed.
        #[arg(long)]
        headers: bool,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Seal what the running node has recorded so far into a segment, for its peers to take.
    Seal {
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
    /// Take the running node's log and store into use again after a failed write or sync had shut them.
    Reopen {
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
    /// Accept a log of a known node that was refused because it names none of that node's earlier
    /// logs, as after its disk was replaced.
    Accept {
        /// The log, audit/NODE/KEY/INCARNATION.
        origin: String,
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
    /// Verify every audit log below the root, own and others': hashes, links, indexes, tree,
    /// checkpoints, signatures and endorsements. Works on a running and on a stopped node. With
    /// --proof: verify one record's proof, which needs no node.
    #[command(
        after_help = "Exit codes: 0 good, 1 a log or proof does not verify, 2 could not run.\n\nExamples:\n  \
                      tidelock audit verify\n  \
                      tidelock audit verify --origin audit/a/0123456789abcdef/1\n  \
                      tidelock audit verify --proof record.proof --key-of ca.crt"
    )]
    Verify {
        /// Only this log.
        #[arg(long, value_parser = Origin::parse, conflicts_with = "proof")]
        origin: Option<Origin>,
        /// A signed checkpoint that was seen earlier or elsewhere: the logs must contain it. Files
        /// alone cannot show that all of them were rolled back together. May be given several times.
        #[arg(long, value_name = "FILE", conflicts_with = "proof", value_hint = ValueHint::FilePath)]
        seen: Vec<PathBuf>,
        /// A proof that `audit prove` made.
        #[arg(long, value_name = "FILE", requires = "key_of", value_hint = ValueHint::FilePath)]
        proof: Option<PathBuf>,
        /// On whose word the log's key is taken: the CA's certificate file, or the key itself, 64
        /// hex digits.
        #[arg(long, value_name = "CA-FILE|KEY", requires = "proof", value_hint = ValueHint::FilePath)]
        key_of: Option<String>,
        #[command(flatten)]
        key: KeyArg,
        #[command(flatten)]
        config: ConfigArg,
    },
}

pub(super) fn run(command: AuditCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        AuditCommand::Tail {
            lines,
            all,
            follow,
            key,
            config,
        } => {
            let rooted = Rooted::of(&config)?.with(&key)?;
            let wanted = if all { u64::MAX } else { lines };
            tail(&rooted.offline()?, wanted, follow, *output)
        }
        AuditCommand::Prove { args, key, config } => {
            let rooted = Rooted::of(&config)?.with(&key)?;
            proof::prove(&rooted.offline()?, &args, *output)
        }
        AuditCommand::Stat { headers, config } => stat::run(&Rooted::of(&config)?, headers, output),
        AuditCommand::Seal { config, apply } => {
            let answer = node::operate(&config, "audit.seal", &json!({}), apply)?;
            output.say(&answer, || node::describe(&answer, apply));
            Ok(Exit::Done)
        }
        AuditCommand::Reopen { config, apply } => {
            let answer = node::operate(&config, "audit.reopen", &json!({}), apply)?;
            output.say(&answer, || node::describe(&answer, apply));
            Ok(Exit::Done)
        }
        AuditCommand::Accept {
            origin,
            config,
            apply,
        } => {
            let body = json!({"origin": origin});
            let answer = node::operate(&config, "audit.accept", &body, apply)?;
            output.say(&answer, || node::describe(&answer, apply));
            Ok(Exit::Done)
        }
        AuditCommand::Verify {
            proof: Some(file),
            key_of,
            ..
        } => proof::verify(&file, &key_of.unwrap_or_default(), *output),
        AuditCommand::Verify {
            origin,
            seen,
            key,
            config,
            ..
        } => {
            let rooted = Rooted::of(&config)?.with(&key)?;
            verify(&rooted, origin.as_ref(), &read_notes(&seen)?, output)
        }
    }
}

/// A record as the commands show it.
pub(super) fn record(index: u64, bytes: &[u8]) -> Value {
    json!({
        "index": index,
        "leaf": leaf_hash(bytes),
        "record": serde_json::from_slice::<Value>(bytes).unwrap_or_default(),
    })
}

/// Prints records as they are read: lines, or one JSON document.
struct Tail {
    output: Output,
    /// JSON without an end: one document a line.
    lines: bool,
    records: u64,
    gaps: Vec<(u64, u64)>,
    /// Whether anybody still reads.
    read: bool,
}

impl Tail {
    fn give(&mut self, entry: LogEntry<'_>) {
        let text = match entry {
            LogEntry::Record(index, bytes) => {
                let record = record(index, bytes);
                let comma = if self.records > 0 { "," } else { "" };
                self.records += 1;
                match (self.output.is_json(), self.lines) {
                    (true, true) => format!("{record}\n"),
                    (true, false) => format!("{comma}{record}"),
                    (false, _) => format!("{}\n", line(&record)),
                }
            }
            LogEntry::Gap(first, last) => {
                self.gaps.push((first, last));
                match (self.output.is_json(), self.lines) {
                    (true, true) => format!("{}\n", json!({"gap": [first, last]})),
                    (true, false) => String::new(),
                    (false, _) => format!("MISSING records {first} to {last}\n"),
                }
            }
        };
        self.read = self.read && self.output.part(&text);
    }

    fn exit(&self) -> Exit {
        if self.gaps.is_empty() {
            Exit::Done
        } else {
            Exit::Failed
        }
    }
}

fn tail(offline: &Offline<'_>, wanted: u64, follow: bool, output: Output) -> Result<Exit, Failure> {
    let size = match offline.own_log()? {
        Some(own) => offline.log_size(&own)?,
        None => 0,
    };
    let mut next = size.saturating_sub(wanted);
    let mut tail = Tail {
        output,
        lines: follow,
        records: 0,
        gaps: Vec::new(),
        read: true,
    };
    let unreadable = |error: OfflineError| Failure::failed(error.to_string());
    if follow {
        while tail.read {
            next = offline
                .records_from(next, &mut |entry| tail.give(entry))
                .map_err(unreadable)?;
            std::thread::sleep(FOLLOW_EVERY);
        }
        return Ok(Exit::Done);
    }
    if !output.is_json() {
        offline
            .records_from(next, &mut |entry| tail.give(entry))
            .map_err(unreadable)?;
        return Ok(tail.exit());
    }
    output.part("{\"records\":[");
    let read = offline.records_from(next, &mut |entry| tail.give(entry));
    let error = read.err().map(|e| e.to_string());
    let rest = json!({"gaps": tail.gaps, "error": error}).to_string();
    output.part(&format!("],{}\n", rest.trim_start_matches('{')));
    Ok(match error {
        None => tail.exit(),
        Some(_) => Exit::Failed,
    })
}

/// The checkpoints in these files.
fn read_notes(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    let mut notes = Vec::with_capacity(paths.len());
    for path in paths {
        let note = fs::read_to_string(path).map_err(|e| Failure::at(path, &e))?;
        Checkpoint::parse(&note).map_err(|e| Failure::at(path, &e))?;
        notes.push(note);
    }
    Ok(notes)
}

fn verify(
    rooted: &Rooted,
    only: Option<&Origin>,
    seen: &[String],
    output: &Output,
) -> Result<Exit, Failure> {
    let config = &rooted.config;
    let mut bar = output.bar("verifying");
    let mut read = Progress::default();
    let mut progress = |of: VerifyProgress| {
        read = of.into();
        bar.show(read);
    };
    let report = verify_log_with(
        &RealDisk,
        &config.node.root,
        &config.node.domain,
        VerifyOptions {
            keys: rooted.keys(),
            seen,
            progress: Some(&mut progress),
            only,
        },
    )?;
    let spent = bar.spent();
    drop(bar);
    if let Some(only) = only
        && report.origins.is_empty()
        && report.faults.is_empty()
    {
        return Err(Failure::failed(format!(
            "nothing is held of {only}; see tidelock audit stat"
        )));
    }
    let endorsements = endorsements(config, &rooted.offline()?, only)?;
    let ok = report.ok && endorsements.bad.is_empty();
    let records: u64 = report.origins.iter().map(|o| o.records).sum();
    let unread: u64 = report.origins.iter().map(|o| o.unread_records).sum();
    let value = json!({
        "ok": ok,
        "records": records,
        "unread_records": unread,
        "bytes": read.bytes,
        "origins": report.origins,
        "faults": report.faults,
        "quarantined": report.quarantined,
        "endorsements": endorsements,
    });
    output.say(&value, || {
        let mut lines = verify_lines(&report, &endorsements);
        if unread > 0 {
            lines.push(format!(
                "{unread} of these records are encrypted: their segments are whole and signed, their \
                 content was not read; name the site key with --key"
            ));
        }
        lines.push(format!(
            "{records} records, {} endorsements good, {} of them by certificates revoked since; {} read ({})",
            endorsements.good + endorsements.revoked_since,
            endorsements.revoked_since,
            human_bytes(read.bytes),
            rate(read, spent),
        ));
        lines.join("\n")
    });
    Ok(if ok { Exit::Done } else { Exit::Failed })
}

fn verify_lines(report: &AuditReport, endorsements: &Endorsements) -> Vec<String> {
    let rows: Vec<Vec<String>> = report
        .origins
        .iter()
        .map(|o| {
            vec![
                o.origin.to_string(),
                o.segments.to_string(),
                o.records.to_string(),
                o.gaps.len().to_string(),
                if o.faults.is_empty() { "good" } else { "BAD" }.to_owned(),
            ]
        })
        .collect();
    let mut lines = vec![table(
        &["log", "segments", "records", "gaps", "state"],
        &rows,
    )];
    let faults = report
        .origins
        .iter()
        .flat_map(|o| &o.faults)
        .chain(&report.faults);
    lines.extend(faults.map(|fault| format!("FAULT {fault}")));
    lines.extend(endorsements.bad.iter().map(|why| format!("FAULT {why}")));
    lines.extend(
        report
            .quarantined
            .iter()
            .map(|file| format!("in quarantine: {file}")),
    );
    lines
}

/// How the certificates behind the log keys fare.
#[derive(Default, Serialize)]
struct Endorsements {
    good: u64,
    /// Stored before their revocation was known, which keeps them valid (ruling 4).
    revoked_since: u64,
    bad: Vec<String>,
}

/// Judges the certificate behind every sealed segment. Reads only the ends of the files, whose
/// whole was verified before.
fn endorsements(
    config: &Config,
    offline: &Offline<'_>,
    only: Option<&Origin>,
) -> Result<Endorsements, Failure> {
    let pem = fs::read(&config.identity.ca).map_err(|e| Failure::at(&config.identity.ca, &e))?;
    let trust = Trust::from_pem(&pem)?;
    let now = wall_unix_ms();
    // Judged by the CRLs that the node holds; how fresh they are is `doctor`'s question.
    let options = RevocationOptions {
        grace_ms: u64::MAX,
        allow_missing: true,
    };
    let revocation = Revocation::new(RevocationState::new(options));
    for id in offline.segment_ids(Kind::Revocation)? {
        if let Ok(Some(segment)) = offline.read(Kind::Revocation, &id)
            && let Ok(crl) = VerifiedCrl::from_segment(&segment, &trust)
        {
            // An older CRL of an issuer says nothing that a newer one does not.
            let _ = revocation.import(crl, now);
        }
    }
    let rules = IdentityRules {
        domain: config.node.domain.clone(),
        allow_without_domain: config.identity.allow_without_domain,
    };
    let mut result = Endorsements::default();
    for id in offline.segment_ids(Kind::Audit)? {
        let Ok(Some(info)) = offline.describe(Kind::Audit, &id) else {
            continue;
        };
        if only.is_some_and(|only| *only != info.reference.origin) {
            continue;
        }
        let Ok(Some(endorsement)) = offline.endorsement(Kind::Audit, &id) else {
            continue;
        };
        let signed_at = info.created_unix_ms;
        match verify_endorsement(&endorsement, &trust, &revocation, &rules, signed_at, now) {
            Ok(_) => result.good += 1,
            Err(error) if error.is_revoked() => result.revoked_since += 1,
            Err(error) => result.bad.push(format!("{id}: {}: {error}", error.code())),
        }
    }
    Ok(result)
}

fn line(entry: &Value) -> String {
    let get = |pointer: &str| match entry.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    };
    [
        get("/index"),
        get("/record/type"),
        get("/record/decision"),
        get("/record/reason"),
        get("/record/action"),
        get("/record/resource/id"),
    ]
    .iter()
    .filter(|part| !part.is_empty())
    .cloned()
    .collect::<Vec<_>>()
    .join("  ")
}
