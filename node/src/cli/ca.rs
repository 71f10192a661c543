//! `tidelock ca …`

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueHint, builder::RangedU64ValueParser};
use serde_json::json;
use tidelock_segments::{DomainId, NodeId};

use super::{Exit, Failure, Output, output::table};
use crate::{
    ca::{Ca, IdentityFiles},
    clock::wall_unix_ms,
};

/// Where the CA lives.
#[derive(Debug, Args)]
pub struct CaDir {
    /// The CA's directory; keep it off the nodes.
    #[arg(long, default_value = "ca", value_hint = ValueHint::DirPath)]
    dir: PathBuf,
}

/// What to do with the site CA.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a new CA and its first, empty CRL.
    #[command(after_help = "Example:\n  tidelock ca init --dir ca --domain harbour")]
    Init {
        #[command(flatten)]
        ca: CaDir,
        /// The domain that its certificates will name.
        #[arg(long)]
        domain: String,
        /// Lifetime of the CA certificate, days.
        #[arg(long, default_value_t = 3_650, value_parser = at_least_a_day())]
        days: u64,
        /// Lifetime of the first CRL, days: longer than the longest planned darkness.
        #[arg(long, default_value_t = 180, value_parser = at_least_a_day())]
        crl_days: u64,
    },
    /// Issue a certificate under a new key for a node.
    #[command(after_help = "Example:\n  tidelock ca issue --dir ca --node a --out /etc/tidelock")]
    Issue(IssueArgs),
    /// Issue a new certificate under a new key for a node that has one.
    Renew(IssueArgs),
    /// Revoke certificates by node id or serial number; write the CRL with `ca crl` afterwards.
    #[command(
        after_help = "Example:\n  tidelock ca revoke --dir ca b           the plan\n  \
                            tidelock ca revoke --dir ca b --apply   the act"
    )]
    Revoke {
        #[command(flatten)]
        ca: CaDir,
        /// A node id or a serial number.
        what: String,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
    /// Write the next CRL.
    Crl {
        #[command(flatten)]
        ca: CaDir,
        /// Its lifetime, days: with the nodes' grace, longer than the longest planned darkness.
        #[arg(long, default_value_t = 180, value_parser = at_least_a_day())]
        days: u64,
    },
    /// List what was issued and revoked.
    List(CaDir),
}

/// What `issue` and `renew` need.
#[derive(Debug, Args)]
pub struct IssueArgs {
    #[command(flatten)]
    ca: CaDir,
    /// The node id.
    #[arg(long)]
    node: String,
    /// The directory for `<node>.crt` and `<node>.key`.
    #[arg(long, default_value = ".", value_hint = ValueHint::DirPath)]
    out: PathBuf,
    /// Lifetime, days.
    #[arg(long, default_value_t = 365, value_parser = at_least_a_day())]
    days: u64,
}

/// What is born expired serves nobody.
fn at_least_a_day() -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(1..)
}

fn days(days: u64) -> Duration {
    Duration::from_secs(days.saturating_mul(86_400))
}

pub(super) fn run(command: CaCommand, output: &Output) -> Result<Exit, Failure> {
    let now = wall_unix_ms() / 1_000;
    match command {
        CaCommand::Init {
            ca,
            domain,
            days: lifetime,
            crl_days,
        } => {
            let domain = DomainId::new(&domain)?;
            let made = Ca::init(&ca.dir, &domain, now, days(lifetime), days(crl_days))?;
            output.say(
                &json!({"domain": domain, "certificate": made.certificate_path(), "crl": made.crl_path()}),
                || {
                    format!(
                        "site CA for domain {domain}\n  certificate  {}\n  key          {}\n  CRL number 1 {}\n\
                         next: tidelock ca issue --dir {} --node NODE --out DIR",
                        made.certificate_path().display(),
                        ca.dir.join("ca.key").display(),
                        made.crl_path().display(),
                        ca.dir.display()
                    )
                },
            );
            Ok(Exit::Done)
        }
        CaCommand::Issue(args) => issue(&args, false, now, output),
        CaCommand::Renew(args) => issue(&args, true, now, output),
        CaCommand::Revoke { ca, what, apply } => {
            let mut opened = Ca::open(&ca.dir)?;
            let chosen = if apply {
                opened.revoke(&what, now)?
            } else {
                opened.matching(&what)
            };
            if chosen.is_empty() {
                return Err(crate::ca::CaError::NoMatch(what).into());
            }
            output.say(&json!({"applied": apply, "certificates": chosen}), || {
                let rows: Vec<Vec<String>> = chosen
                    .iter()
                    .map(|i| vec![i.node.to_string(), i.serial.clone()])
                    .collect();
                let head = if apply {
                    "revoked"
                } else {
                    "would revoke (act with --apply)"
                };
                let next = if apply {
                    "\nnext: tidelock ca crl, then give the CRL to any node"
                } else {
                    ""
                };
                format!("{head}\n{}{next}", table(&["node", "serial"], &rows))
            });
            Ok(Exit::Done)
        }
        CaCommand::Crl { ca, days: lifetime } => {
            let mut opened = Ca::open(&ca.dir)?;
            let number = opened.write_crl(now, days(lifetime))?;
            output.say(&json!({"number": number, "crl": opened.crl_path()}), || {
                format!(
                    "CRL number {number} written to {}\nnext: tidelock crl import {} --apply   (at any one node)",
                    opened.crl_path().display(),
                    opened.crl_path().display()
                )
            });
            Ok(Exit::Done)
        }
        CaCommand::List(ca) => {
            let opened = Ca::open(&ca.dir)?;
            output.say(
                &json!({"domain": opened.domain(), "issued": opened.issued()}),
                || {
                    let rows: Vec<Vec<String>> = opened
                        .issued()
                        .iter()
                        .map(|i| {
                            vec![
                                i.node.to_string(),
                                i.serial.clone(),
                                i.revoked_unix_s.map_or("valid", |_| "revoked").to_owned(),
                            ]
                        })
                        .collect();
                    table(&["node", "serial", "state"], &rows)
                },
            );
            Ok(Exit::Done)
        }
    }
}

fn issue(args: &IssueArgs, renew: bool, now: u64, output: &Output) -> Result<Exit, Failure> {
    let node = NodeId::new(&args.node)?;
    let mut ca = Ca::open(&args.ca.dir)?;
    if renew && ca.matching(node.as_str()).is_empty() && !ca.issued().iter().any(|i| i.node == node)
    {
        return Err(Failure::cannot_run(format!(
            "no certificate was ever issued for {node}; use `tidelock ca issue`"
        )));
    }
    let IdentityFiles {
        certificate,
        key,
        serial,
    } = ca.issue(&node, &args.out, now, days(args.days))?;
    output.say(
        &json!({"node": node, "serial": serial, "certificate": certificate, "key": key}),
        || {
            format!(
                "certificate for {node}, serial {serial}\n  {}\n  {}",
                certificate.display(),
                key.display()
            )
        },
    );
    Ok(Exit::Done)
}
