//! `tidelock audit …`

use std::fs;

use clap::Subcommand;
use serde::Serialize;
use serde_json::{Value, json};
use tidelock_segments::{Kind, RealDisk, verify_log};
use tidelock_transport::{
    endorse::verify_endorsement,
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl},
    verifier::Trust,
};

use super::{ConfigArg, Exit, Failure, Output, node, output::table, segment};
use crate::{clock::wall_unix_ms, config::Config};

/// What to do with audit logs.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Show the newest records of a running node's own log.
    Tail {
        /// How many.
        #[arg(short = 'n', long, default_value_t = 10)]
        lines: usize,
        /// All of them.
        #[arg(long, conflicts_with = "lines")]
        all: bool,
        #[command(flatten)]
        config: ConfigArg,
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
    /// checkpoints, signatures and endorsements. Works on a running and on a stopped node.
    Verify(ConfigArg),
}

pub(super) fn run(command: AuditCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        AuditCommand::Tail { lines, all, config } => {
            let wanted = if all { usize::MAX } else { lines };
            let answer = node::operate(&config, "audit.tail", &json!({"lines": wanted}), false)?;
            output.say(&answer, || {
                let lines: Vec<String> = answer
                    .get("records")
                    .and_then(Value::as_array)
                    .map(|records| records.iter().map(line).collect())
                    .unwrap_or_default();
                lines.join("\n")
            });
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
        AuditCommand::Verify(args) => verify(&args, output),
    }
}

fn verify(args: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let config = Config::load(&args.config)?;
    let report = verify_log(&RealDisk, &config.node.root, &config.node.domain)?;
    let endorsements = endorsements(&config, *output)?;
    let ok = report.ok && endorsements.bad.is_empty();
    let records: u64 = report.origins.iter().map(|o| o.records).sum();
    let value = json!({
        "ok": ok,
        "records": records,
        "origins": report.origins,
        "faults": report.faults,
        "quarantined": report.quarantined,
        "endorsements": endorsements,
    });
    output.say(&value, || {
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
        lines.push(format!(
            "{records} records, {} endorsements good, {} of them by certificates revoked since",
            endorsements.good + endorsements.revoked_since,
            endorsements.revoked_since
        ));
        lines.join("\n")
    });
    Ok(if ok { Exit::Done } else { Exit::Failed })
}

/// How the certificates behind the log keys fare.
#[derive(Default, Serialize)]
struct Endorsements {
    good: u64,
    /// Stored before their revocation was known, which keeps them valid (ruling 4).
    revoked_since: u64,
    bad: Vec<String>,
}

fn endorsements(config: &Config, output: Output) -> Result<Endorsements, Failure> {
    let pem = fs::read(&config.identity.ca).map_err(|e| Failure::at(&config.identity.ca, &e))?;
    let trust = Trust::from_pem(&pem)?;
    let now = wall_unix_ms();
    // Judged by the CRLs that the node holds; how fresh they are is `doctor`'s question.
    let options = RevocationOptions {
        grace_ms: u64::MAX,
        allow_missing: true,
    };
    let revocation = Revocation::new(RevocationState::new(options));
    for found in segment::read_all(config, Some(Kind::Revocation), output)? {
        if let Ok(crl) = found
            .verified
            .and_then(|s| VerifiedCrl::from_segment(&s, &trust).map_err(|e| e.to_string()))
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
    for found in segment::read_all(config, Some(Kind::Audit), output)? {
        let Ok(segment) = found.verified else {
            continue;
        };
        let Some(endorsement) = segment.endorsement() else {
            continue;
        };
        let signed_at = segment.header().created_unix_ms;
        match verify_endorsement(endorsement, &trust, &revocation, &rules, signed_at, now) {
            Ok(_) => result.good += 1,
            Err(error) if error.is_revoked() => result.revoked_since += 1,
            Err(error) => result
                .bad
                .push(format!("{}: {}: {error}", segment.id(), error.code())),
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
