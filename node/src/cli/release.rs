//! `tidelock release …`

use std::{fs, path::PathBuf};

use clap::{Subcommand, ValueHint};
use serde_json::{Value, json};
use tidelock_policy::{TrustFile, Version, decode_signature, lock_fingerprint, verify_release};

use super::{ConfigArg, Exit, Failure, Output, node, output::table};

/// What to do with a release.
#[derive(Debug, Subcommand)]
pub enum ReleaseCommand {
    /// Verify a release on disk or media, in four steps: signatures, SHA-256 digests, BLAKE3 fingerprint
    /// of the lock file, version. Without --trust a running node verifies it by its own trust, and records
    /// the rejection.
    #[command(
        after_help = "Examples:\n  tidelock release verify --layout /media/usb/tidelock --trust trust.toml\n  \
                      tidelock release verify --layout /media/usb/tidelock -c tidelock.toml --at-least 1.4.0 --name tidelock"
    )]
    Verify {
        /// The OCI image layout.
        #[arg(long, value_hint = ValueHint::DirPath)]
        layout: PathBuf,
        /// The trust file; no node is asked then, and nothing is recorded.
        #[arg(long, value_hint = ValueHint::FilePath)]
        trust: Option<PathBuf>,
        /// Detached signatures over the release's manifest, beside those in the layout.
        #[arg(long = "sig", value_hint = ValueHint::FilePath, requires = "trust")]
        signatures: Vec<PathBuf>,
        /// The oldest version that will do; the version that runs is a bound in any case.
        #[arg(long)]
        at_least: Option<Version>,
        /// What must have been released; without it any name will do that the release keys signed.
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Print the fingerprint of a lock file, for its maker to put into it.
    #[command(after_help = "Example:\n  tidelock release fingerprint tidelock.lock.json")]
    Fingerprint {
        /// The lock file, JSON.
        #[arg(value_hint = ValueHint::FilePath)]
        lock: PathBuf,
    },
}

pub(super) fn run(command: ReleaseCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        ReleaseCommand::Fingerprint { lock } => {
            let bytes = fs::read(&lock).map_err(|e| Failure::at(&lock, &e))?;
            let fingerprint = lock_fingerprint(&bytes).map_err(|e| Failure::at(&lock, &e))?;
            output.say(&json!({"fingerprint": fingerprint}), || fingerprint.clone());
            Ok(Exit::Done)
        }
        ReleaseCommand::Verify {
            layout,
            trust: Some(trust),
            signatures,
            at_least,
            name,
            ..
        } => {
            let text = fs::read_to_string(&trust).map_err(|e| Failure::at(&trust, &e))?;
            let trust = TrustFile::parse(&text)?;
            let signatures = signatures
                .iter()
                .map(|path| {
                    let bytes = fs::read(path).map_err(|e| Failure::at(path, &e))?;
                    decode_signature(&bytes).map_err(|e| Failure::at(path, &e))
                })
                .collect::<Result<Vec<_>, Failure>>()?;
            let installed = Version::parse(env!("CARGO_PKG_VERSION"))?;
            let at_least = at_least.map_or(installed.clone(), |asked| asked.max(installed));
            let verified = verify_release(&layout, &trust, &signatures, &at_least)
                .and_then(|verified| verified.of(name.as_deref()));
            match verified {
                Ok(verified) => {
                    show(&serde_json::to_value(&verified)?, output);
                    Ok(Exit::Done)
                }
                Err(error) => {
                    let message = format!(
                        "{}: step {}: {error}; no node was asked, so nothing was recorded",
                        error.code(),
                        error.step()
                    );
                    if output.is_json() {
                        output.say(
                            &json!({
                                "ok": false, "step": error.step(), "code": error.code(),
                                "error": error.to_string(),
                            }),
                            String::new,
                        );
                        return Ok(Exit::Failed);
                    }
                    Err(Failure::failed(message))
                }
            }
        }
        ReleaseCommand::Verify {
            layout,
            at_least,
            name,
            config,
            ..
        } => {
            let layout = fs::canonicalize(&layout).map_err(|e| Failure::at(&layout, &e))?;
            let body = json!({
                "layout": layout, "at_least": at_least.map(|version| version.to_string()),
                "name": name,
            });
            let answer = node::operate(&config, "release.verify", &body, true)?;
            show(&answer, output);
            Ok(Exit::Done)
        }
    }
}

fn show(verified: &Value, output: &Output) {
    output.say(verified, || {
        let text = |key: &str| match verified.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "-".to_owned(),
        };
        let row = |step: &str, found: String| vec![format!("  {step}"), found];
        table(
            &[
                &format!("{} {} verifies", text("name"), text("version")),
                "",
            ],
            &[
                row("1 signatures", text("signers")),
                row(
                    "2 digests",
                    format!("{} blobs, {} bytes", text("blobs"), text("bytes")),
                ),
                row("3 fingerprint", text("fingerprint")),
                row("4 version", text("version")),
                row("surplus", text("surplus")),
            ],
        )
    });
}
