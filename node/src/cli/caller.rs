//! `tidelock caller check`: as whom a credential would be taken, asked of the files alone.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueHint};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::json;
use tidelock_gateway::{CallerTime, Grant, Moment};

use super::{ConfigArg, Exit, Failure, Output};
use crate::{
    clock::wall_unix_ms,
    config::Config,
    run::{
        auth_config,
        callers::{CrlFloors, DoorPapers},
    },
};

/// Longest file of a token that is read.
const TOKEN_FILE_BYTES_MAX: u64 = 64 * 1024;

/// What to find out about callers.
#[derive(Debug, Subcommand)]
pub enum CallerCommand {
    /// Say as whom a credential would be taken, and with which scopes, or with which code it would be
    /// refused: exit 0 taken, 1 refused. No node is asked and the credential is never printed; times are
    /// judged by this host's clock.
    #[command(after_help = "Examples:\n  tidelock caller check --token job.jwt\n  \
                      tidelock caller check --certificate svid.pem -c /etc/tidelock/tidelock.toml\n  \
                      tidelock caller check --key crane-7 --json")]
    Check {
        /// The credential.
        #[command(flatten)]
        credential: Credential,
        /// The node's config.
        #[command(flatten)]
        config: ConfigArg,
    },
}

/// One credential.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Credential {
    /// A file with a bearer token or workload token; - is standard input.
    #[arg(long, value_hint = ValueHint::FilePath)]
    token: Option<PathBuf>,
    /// A file with a certificate chain, PEM, leaf first.
    #[arg(long, value_hint = ValueHint::FilePath)]
    certificate: Option<PathBuf>,
    /// The id of a key that signs requests.
    #[arg(long)]
    key: Option<String>,
}

pub(super) fn run(command: CallerCommand, output: &Output) -> Result<Exit, Failure> {
    let CallerCommand::Check { credential, config } = command;
    let config = Config::load(&config.config)?;
    let now_unix_ms = wall_unix_ms();
    let time = CallerTime::new(move || Moment {
        unix_ms: now_unix_ms,
        suspect: false,
    });
    let (kind, judged) = if let Some(path) = &credential.certificate {
        ("certificate", by_certificate(&config, path, now_unix_ms)?)
    } else if let Some(path) = &credential.token {
        let judged = auth_config(&config, time)?.inspect_token(&token(path)?);
        ("token", judged.map_err(|e| (e.code(), e.to_string())))
    } else {
        let auth = auth_config(&config, time)?;
        let id = credential.key.unwrap_or_default();
        let unknown = || {
            (
                "SIGNATURE_KEY_UNKNOWN",
                "no key of the token file has this id".to_owned(),
            )
        };
        (
            "key",
            auth.token_set().key_grant(&id).cloned().ok_or_else(unknown),
        )
    };
    match judged {
        Ok(grant) => {
            let scopes = grant.scopes();
            let names: Vec<&str> = [
                (scopes.decide, "decide"),
                (scopes.explain, "explain"),
                (scopes.act_as, "act_as"),
            ]
            .into_iter()
            .filter_map(|(has, name)| has.then_some(name))
            .collect();
            let principal = format!("{}::{}", grant.principal_type(), grant.principal_id());
            let told =
                json!({"taken": true, "credential": kind, "principal": principal, "scopes": names});
            output.say(&told, || {
                let names = match names.is_empty() {
                    true => "no scope: status and metrics only".to_owned(),
                    false => names.join(", "),
                };
                format!("this {kind} is {principal} ({names})")
            });
            Ok(Exit::Done)
        }
        Err((code, message)) => {
            let told =
                json!({"taken": false, "credential": kind, "code": code, "message": message});
            output.say(&told, || {
                format!("this {kind} would be refused: {code}: {message}")
            });
            Ok(Exit::Failed)
        }
    }
}

fn token(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        let mut input = std::io::stdin().lock().take(TOKEN_FILE_BYTES_MAX);
        input.read_to_end(&mut text)
    } else {
        let file = fs::File::open(path).map_err(|e| Failure::at(path, &e))?;
        file.take(TOKEN_FILE_BYTES_MAX).read_to_end(&mut text)
    };
    read.map_err(|e| Failure::at(path, &e))?;
    Ok(text.trim_ascii().to_vec())
}

type Judged = Result<Grant, (&'static str, String)>;

fn by_certificate(config: &Config, path: &Path, now_unix_ms: u64) -> Result<Judged, Failure> {
    let Some(tls) = &config.gateway.tls else {
        return Err(Failure::cannot_run(
            "the config has no [gateway.tls]: certificates are not taken at all",
        ));
    };
    let pem = fs::read(path).map_err(|e| Failure::at(path, &e))?;
    let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>()?;
    let papers = DoorPapers::load(tls, now_unix_ms, &CrlFloors::default())?;
    let judged = papers.judge(&chain, now_unix_ms);
    Ok(judged.map_err(|refused| (refused.code, refused.message)))
}
