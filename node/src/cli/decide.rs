//! `tidelock decide`

use std::{fs, io::Read as _, path::PathBuf};

use clap::{Args, ValueHint};
use serde_json::{Value, json};

use super::{
    ConfigArg, Exit, Failure, Output,
    node::{Door, problem},
};

/// The longest action that is read; the node refuses earlier.
const ACTION_MAX_BYTES: u64 = 1024 * 1024;

/// One action to decide.
#[derive(Debug, Args)]
pub struct DecideArgs {
    /// The action, JSON; standard input where absent or `-`.
    #[arg(value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Explain instead: recorded as such, and no permit comes of it.
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    config: ConfigArg,
}

/// What became of one action.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Index of the decision's record.
    index: u64,
    /// Leaf of the decision's record, sha256:….
    leaf: String,
    /// What happened.
    #[arg(value_parser = ["executed", "failed", "not_executed"])]
    outcome: String,
    /// What else is to be recorded of it, a JSON object of at most 8 KiB.
    #[arg(long, value_name = "JSON")]
    detail: Option<String>,
    #[command(flatten)]
    config: ConfigArg,
}

pub(super) fn report(args: &ReportArgs, output: &Output) -> Result<Exit, Failure> {
    let detail: Value = match &args.detail {
        Some(text) => serde_json::from_str(text)
            .map_err(|e| Failure::cannot_run(format!("--detail is not JSON: {e}")))?,
        None => json!({}),
    };
    let body = json!({
        "record": {"index": args.index, "leaf": args.leaf},
        "outcome": args.outcome,
        "detail": detail,
    });
    let door = Door::of(&args.config)?;
    match door.post("/v1/report", body.to_string().into_bytes())? {
        (200, answer) => {
            output.say(&answer, || {
                format!("{} recorded for record {}", args.outcome, args.index)
            });
            Ok(Exit::Done)
        }
        (status, answer) if (403..=410).contains(&status) => {
            output.say(&answer, || problem(status, &answer));
            Ok(Exit::Failed)
        }
        (status, answer) => Err(Failure::cannot_run(problem(status, &answer))),
    }
}

pub(super) fn run(args: &DecideArgs, output: &Output) -> Result<Exit, Failure> {
    let body = match &args.file {
        Some(path) if path.as_os_str() != "-" => {
            fs::read(path).map_err(|e| Failure::at(path, &e))?
        }
        _ => {
            let mut body = Vec::new();
            std::io::stdin()
                .take(ACTION_MAX_BYTES)
                .read_to_end(&mut body)?;
            body
        }
    };
    let path = if args.explain {
        "/v1/explain"
    } else {
        "/v1/decide"
    };
    let (status, answer) = Door::of(&args.config)?.post(path, body)?;
    let field = |name: &str| {
        answer
            .get(name)
            .and_then(|v| v.as_str())
            .unwrap_or_default()
            .to_owned()
    };
    let decision = field("decision");
    let exit = match (decision.as_str(), status) {
        ("allow", 200) => Exit::Done,
        ("deny" | "hold", _) => Exit::Denied,
        _ => return Err(Failure::cannot_run(problem(status, &answer))),
    };
    output.say(&answer, || {
        let policies: Vec<&str> = answer
            .get("policies")
            .and_then(|p| p.as_array())
            .map(|p| p.iter().filter_map(|v| v.as_str()).collect())
            .unwrap_or_default();
        let mut line = format!("{decision} {}", field("reason"));
        if !policies.is_empty() {
            line = format!("{line} by {}", policies.join(", "));
        }
        let message = field("message");
        if message.is_empty() {
            line
        } else {
            format!("{line}\n{message}")
        }
    });
    Ok(exit)
}
