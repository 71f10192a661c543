//! The worker itself: `tidelock policy-worker`, started by a node or a command, never by hand.

use std::io;

use serde_json::json;
use tidelock_policy::{
    BundleError, LoadContext, Package, examine, inspect, limits::ARCHIVE_BYTES_MAX,
};

use super::{
    confine::Confined,
    limits::{ANSWER_BYTES_MAX, ASK_BYTES_MAX},
    wire::{Answer, Ask, Confinement, Verdict, read_frame, write_frame},
};

/// Confines this process, answers one question, and is done.
///
/// # Errors
/// The question cannot be read or the answer not written: whoever asked sees an end without a word.
pub(crate) fn main(cpu_s: u64, allow_without_seccomp: bool) -> io::Result<()> {
    let (confinement, verdict) = match Confined::new(cpu_s, allow_without_seccomp) {
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

fn answer() -> io::Result<Verdict> {
    let mut input = io::stdin().lock();
    let ask: Ask = serde_json::from_slice(&read_frame(&mut input, ASK_BYTES_MAX)?)?;
    let archive = read_frame(&mut input, ARCHIVE_BYTES_MAX)?;
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
        Ask::Inspect => {
            let seen = inspect(&Package {
                archive,
                signatures: Vec::new(),
            })?;
            Ok(Verdict::Inspected(json!(seen)))
        }
    }
}
