//! The worker itself: `tidelock policy-worker`, started by a node or a command, never by hand.

use std::{
    convert::Infallible, io, os::unix::process::CommandExt as _, path::Path, process::Command,
};

use serde_json::json;
use tidelock_policy::{BundleError, LoadContext, Package, examine, inspect};
use tidelock_prover::{confirm, questions};

use super::{
    confine::{Confined, ToBe},
    limits::{ANSWER_BYTES_MAX, ASK_BYTES_MAX},
    wire::{Answer, Ask, Confinement, Verdict, read_frame, write_frame},
};

/// Confines this process, answers one question, and is done.
///
/// # Errors
/// The question cannot be read or the answer not written: whoever asked sees an end without a word.
pub(crate) fn main(cpu_s: u64, allow_without_seccomp: bool) -> io::Result<()> {
    let (confinement, verdict) = match Confined::new(cpu_s, allow_without_seccomp, ToBe::Worker) {
        Err(why) => (Confinement::default(), Verdict::Unconfined(why)),
        Ok(mut confined) => {
            let confinement = confined.evidence();
            (confinement, answer()?)
        }
    };
    let mut bytes = serde_json::to_vec(&Answer {
        confinement: confinement.clone(),
        verdict,
    })?;
    if bytes.len() > ANSWER_BYTES_MAX {
        bytes = serde_json::to_vec(&Answer {
            confinement,
            verdict: Verdict::Refused {
                code: "BUNDLE_FORMAT".to_owned(),
                message: format!("what is in it does not fit {ANSWER_BYTES_MAX} bytes"),
            },
        })?;
    }
    write_frame(&mut io::stdout().lock(), &bytes)
}

/// Patterns (`like`) are what older solvers call experimental.
const SOLVER_OPTIONS: [&str; 2] = ["--lang=smt2", "--strings-exp"];

/// Confines this process and becomes a solver.
///
/// # Errors
/// It could not: whoever asked sees an end without a word.
pub(crate) fn become_solver(
    solver: &Path,
    cpu_s: u64,
    allow_without_seccomp: bool,
) -> io::Result<Infallible> {
    let _confined =
        Confined::new(cpu_s, allow_without_seccomp, ToBe::Solver).map_err(io::Error::other)?;
    Err(Command::new(solver).args(SOLVER_OPTIONS).env_clear().exec())
}

fn answer() -> io::Result<Verdict> {
    let mut input = io::stdin().lock();
    let ask: Ask = serde_json::from_slice(&read_frame(&mut input, ASK_BYTES_MAX)?)?;
    let archive = read_frame(&mut input, ask.bytes_max())?;
    Ok(
        judge(&ask, archive).unwrap_or_else(|error| Verdict::Refused {
            code: error.code().to_owned(),
            message: error.to_string(),
        }),
    )
}

fn judge(ask: &Ask, archive: Vec<u8>) -> Result<Verdict, BundleError> {
    match ask {
        Ask::Probe => Ok(Verdict::Probed),
        Ask::Examine {
            domain,
            node_version,
        } => {
            let context = LoadContext::new(domain, node_version)?;
            examine(&archive, &context).map(Verdict::Passed)
        }
        Ask::Questions { before_bytes } => {
            let (before, after) = split(&archive, *before_bytes)?;
            questions(before, after).map(Verdict::Questions)
        }
        Ask::Confirm {
            before_bytes,
            after_bytes,
            about,
            whose,
        } => {
            let (before, rest) = split(&archive, *before_bytes)?;
            let (after, model) = split(rest, *after_bytes)?;
            let model = String::from_utf8_lossy(model);
            confirm(before, after, about, *whose, &model)
                .map(|found| Verdict::Confirmed(found.map(Box::new)))
        }
        Ask::Inspect => {
            let seen = inspect(&Package {
                archive,
                signatures: Vec::new(),
            })?;
            Ok(Verdict::Inspected(json!(seen)))
        }
    }
}

fn split(bytes: &[u8], first: usize) -> Result<(&[u8], &[u8]), BundleError> {
    bytes
        .split_at_checked(first)
        .ok_or_else(|| BundleError::Format("the question is cut off".to_owned()))
}
