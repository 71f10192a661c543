//! `tidelock segment …`: reads the files below a root, on a running or a stopped node. It takes no
//! lock and changes nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Subcommand;
use serde_json::{Value, json};
use tidelock_segments::{Kind, SegmentId, VerifiedSegment, read_records, verify_segment};

use super::{ConfigArg, Exit, Failure, Output, output::table};
use crate::config::Config;

/// What to do with stored segments.
#[derive(Debug, Subcommand)]
pub enum SegmentCommand {
    /// List stored segments: urgent kinds first, then by origin and sequence.
    Ls {
        /// Only this kind: revocation, policy, witness or audit.
        #[arg(long)]
        kind: Option<Kind>,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Show one segment: its header, and what is in it.
    #[command(after_help = "Example:\n  tidelock segment show blake3:6f…")]
    Show {
        /// The segment's id.
        id: SegmentId,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Verify every stored segment: hash, encoding, domain, signature.
    Verify(ConfigArg),
}

/// One file that claims to be a segment.
pub(super) struct Found {
    path: PathBuf,
    pub(super) verified: Result<VerifiedSegment, String>,
}

pub(super) fn read_all(
    config: &Config,
    kind: Option<Kind>,
    output: Output,
) -> Result<Vec<Found>, Failure> {
    let mut paths = Vec::new();
    for each in Kind::ALL
        .into_iter()
        .filter(|k| kind.is_none_or(|only| only == *k))
    {
        let dir = config.node.root.join("segments").join(each.to_string());
        match fs::read_dir(&dir) {
            Ok(entries) => paths.extend(entries.flatten().map(|e| e.path())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Failure::at(&dir, &e)),
        }
    }
    let count = paths.len();
    let mut found = Vec::with_capacity(count);
    for (n, path) in paths.into_iter().enumerate() {
        output.progress("reading segments", n, count);
        found.push(Found {
            verified: read(config, &path),
            path,
        });
    }
    output.progress_done();
    found.sort_by_key(|f| {
        f.verified.as_ref().ok().map(|s| {
            let header = s.header();
            (header.kind, header.origin.clone(), header.sequence)
        })
    });
    Ok(found)
}

fn read(config: &Config, path: &Path) -> Result<VerifiedSegment, String> {
    let id = path
        .file_stem()
        .and_then(|stem| stem.to_str())
        .and_then(|hex| format!("blake3:{hex}").parse::<SegmentId>().ok())
        .ok_or("its name is no segment id")?;
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    verify_segment(bytes, Some(id), &config.node.domain).map_err(|e| e.to_string())
}

pub(super) fn run(command: SegmentCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        SegmentCommand::Ls { kind, config } => {
            let config = Config::load(&config.config)?;
            let found = read_all(&config, kind, *output)?;
            let list: Vec<Value> = found.iter().map(describe).collect();
            output.say(&json!({"segments": list}), || {
                let rows: Vec<Vec<String>> = list
                    .iter()
                    .map(|s| {
                        ["kind", "origin", "sequence", "bytes", "id"]
                            .iter()
                            .map(|k| match s.get(*k) {
                                Some(Value::String(text)) => text.clone(),
                                Some(other) => other.to_string(),
                                None => "-".to_owned(),
                            })
                            .collect()
                    })
                    .collect();
                table(&["kind", "origin", "sequence", "bytes", "id"], &rows)
            });
            Ok(Exit::Done)
        }
        SegmentCommand::Show { id, config } => {
            let config = Config::load(&config.config)?;
            let found = read_all(&config, None, *output)?;
            let segment = found
                .iter()
                .filter_map(|f| f.verified.as_ref().ok())
                .find(|s| s.id() == id)
                .ok_or_else(|| {
                    Failure::failed(format!(
                        "{id} is not held, or damaged; see tidelock segment verify"
                    ))
                })?;
            let mut shown = header(segment);
            let records: Vec<Value> = match segment.header().kind {
                Kind::Audit => read_records(segment)?
                    .into_iter()
                    .map(|(index, bytes)| {
                        json!({"index": index, "record": serde_json::from_slice::<Value>(&bytes).ok()})
                    })
                    .collect(),
                _ => Vec::new(),
            };
            if let (Some(fields), false) = (shown.as_object_mut(), records.is_empty()) {
                fields.insert("records".to_owned(), json!(records));
            }
            output.say(&shown, || {
                serde_json::to_string_pretty(&shown).unwrap_or_default()
            });
            Ok(Exit::Done)
        }
        SegmentCommand::Verify(args) => {
            let config = Config::load(&args.config)?;
            let found = read_all(&config, None, *output)?;
            let damaged: Vec<Value> = found
                .iter()
                .filter_map(|f| {
                    let why = f.verified.as_ref().err()?;
                    Some(json!({"file": f.path, "why": why}))
                })
                .collect();
            output.say(
                &json!({"ok": damaged.is_empty(), "segments": found.len(), "damaged": damaged}),
                || {
                    let mut lines: Vec<String> = found
                        .iter()
                        .filter_map(|f| {
                            Some(format!(
                                "DAMAGED {}: {}",
                                f.path.display(),
                                f.verified.as_ref().err()?
                            ))
                        })
                        .collect();
                    lines.push(format!(
                        "{} segments, {} damaged",
                        found.len(),
                        damaged.len()
                    ));
                    lines.join("\n")
                },
            );
            Ok(if damaged.is_empty() {
                Exit::Done
            } else {
                Exit::Failed
            })
        }
    }
}

fn header(segment: &VerifiedSegment) -> Value {
    let header = segment.header();
    json!({
        "id": segment.id(),
        "kind": header.kind,
        "origin": header.origin,
        "sequence": header.sequence,
        "prev": header.prev,
        "created_unix_ms": header.created_unix_ms,
        "bytes": segment.bytes().len(),
        "signed": segment.endorsement().is_some(),
    })
}

fn describe(found: &Found) -> Value {
    match &found.verified {
        Ok(segment) => header(segment),
        Err(why) => json!({"file": found.path, "damaged": why}),
    }
}
