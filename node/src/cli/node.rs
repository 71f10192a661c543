//! The commands that run a node or talk to a running one over its Unix socket.

use std::{fs, path::PathBuf, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Subcommand, ValueHint};
use serde_json::{Value, json};
use tidelock_gateway::{
    Client, ClientError, Grant, Scopes, client::Door as Way, tokens::mint_token,
};

use super::{
    ConfigArg, Exit, Failure, Output,
    media::size,
    output::{human_bytes, table},
};
use crate::{
    clock::wall_unix_ms,
    config::{Config, ConfigError},
};

/// What to do with a CRL.
#[derive(Debug, Subcommand)]
pub enum CrlCommand {
    /// Give a CRL file to a running node. It needs no peer and no session, so that a node whose
    /// own CRL has expired can be mended at its door.
    #[command(
        after_help = "Examples:\n  tidelock crl import crl.pem           the plan\n  \
                            tidelock crl import crl.pem --apply   the act"
    )]
    Import {
        /// The CRL, PEM or DER.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
}

/// What to ask of the peers.
#[derive(Debug, Subcommand)]
pub enum PeersCommand {
    /// Why a segment is not at a peer yet, or not here from that peer. The codes are in
    /// docs/src/operating.md.
    Why {
        /// The segment's id, blake3:… (`tidelock segment ls`).
        segment: String,
        /// The peer's node id.
        peer: String,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// What a peer may cost this node. Without options it is shown; with them the plan, and with
    /// --apply it holds from now on, over restarts too, and is recorded. What the peer owes already
    /// it goes on owing. Revocation and policy have a quota of their own that nobody changes.
    #[command(
        after_help = "Examples:\n  tidelock peers quota harbour-b\n  tidelock peers quota harbour-b --bytes-per-second 2MiB --bytes-per-day 10GiB --apply\n  tidelock peers quota harbour-b --common --apply"
    )]
    Quota {
        /// The peer's node id.
        peer: String,
        /// Bytes of audit a second that are taken from it, and bytes a second that it is sent.
        #[arg(long, value_name = "BYTES", value_parser = size)]
        bytes_per_second: Option<u64>,
        /// Frames a second that are read from it.
        #[arg(long, value_name = "NUMBER")]
        requests_per_second: Option<u64>,
        /// Bytes of audit that are taken from it in a day; 0 is no bound.
        #[arg(long, value_name = "BYTES", value_parser = size)]
        bytes_per_day: Option<u64>,
        /// First drop what was set for this peer: all that is not named is as in the config.
        #[arg(long)]
        common: bool,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Write the course of the sessions with a peer to standard output as qlog: round trip, window,
    /// packets sent and lost, beginnings and ends. It samples the node's status; no packet waits for it.
    #[command(
        after_help = "Example:\n  tidelock peers qlog harbour-b --seconds 60 > harbour-b.sqlog"
    )]
    Qlog {
        /// The peer's node id.
        peer: String,
        /// For how long.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86_400))]
        seconds: u64,
        /// Time from one sample to the next.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(20..=60_000))]
        interval_ms: u64,
        #[command(flatten)]
        config: ConfigArg,
    },
}

/// What to do with a config.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Report every mistake, with key and line.
    Check(ConfigArg),
}

/// What to do about the clock.
#[derive(Debug, Subcommand)]
pub enum ClockCommand {
    /// Accept what the wall clock says now; recorded.
    Accept {
        #[command(flatten)]
        config: ConfigArg,
        /// Act on the printed plan.
        #[arg(long)]
        apply: bool,
    },
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a new token and the entry for the node's token file, which holds only its hash.
    #[command(
        after_help = "Examples:\n  tidelock token new --principal Agent::ops-1\n  \
                      tidelock token new --principal Service::gateway --act-as --days 30"
    )]
    New {
        /// The principal that the token stands for, Type::id.
        #[arg(long)]
        principal: String,
        /// Let its bearer name other principals (for a service that asks on behalf of agents).
        #[arg(long)]
        act_as: bool,
        /// Days until it expires, by the trusted time of the node.
        #[arg(long, default_value_t = TOKEN_DAYS, value_parser = clap::value_parser!(u16).range(1..=3_660))]
        days: u16,
        /// It never expires: only its removal from the token file ends it.
        #[arg(long, conflicts_with = "days")]
        no_expiry: bool,
    },
}

/// Days that a new token lasts if nothing else is said.
const TOKEN_DAYS: u16 = 365;

/// A running node's Unix socket, for one command.
pub(super) struct Door {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Door {
    pub(super) fn of(args: &ConfigArg) -> Result<Self, Failure> {
        let config = Config::load(&args.config)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = config.gateway.unix;
        Ok(Self {
            runtime,
            client: Client::new(Way::Unix(socket), None)?,
        })
    }

    fn answer(
        &self,
        exchange: impl Future<Output = Result<(u16, impl AsRef<[u8]>), ClientError>>,
    ) -> Result<(u16, Value), Failure> {
        let (status, body) = self.runtime.block_on(exchange)?;
        Ok((status, serde_json::from_slice(body.as_ref())?))
    }

    pub(super) fn post(&self, path: &str, body: Vec<u8>) -> Result<(u16, Value), Failure> {
        self.answer(self.client.post_json(path, body))
    }

    /// What the node answers to a question that it has no reason to refuse to its operator.
    pub(super) fn get(&self, path: &str) -> Result<Value, Failure> {
        match self.answer(self.client.get(path))? {
            (200, answer) => Ok(answer),
            (status, answer) => Err(Failure::cannot_run(problem(status, &answer))),
        }
    }
}

/// The gateway's refusal of a request, as one line.
pub(super) fn problem(status: u16, answer: &Value) -> String {
    let word = |name: &str| answer.get(name).and_then(Value::as_str);
    match (word("error"), word("message")) {
        (Some(error), Some(message)) => format!("{error}: {message}"),
        _ => format!("the node answered with status {status}"),
    }
}

/// Asks a running node to plan or do something that only its operator may.
pub(super) fn operate(
    args: &ConfigArg,
    op: &str,
    body: &Value,
    apply: bool,
) -> Result<Value, Failure> {
    let door = Door::of(args)?;
    let path = format!("/v1/admin/{op}{}", if apply { "?apply=true" } else { "" });
    let (status, answer) = door.post(&path, serde_json::to_vec(body)?)?;
    if status == 200 {
        return Ok(answer);
    }
    Err(Failure::failed(problem(status, &answer)))
}

/// A plan or its result as lines, `key  value`.
pub(super) fn describe(answer: &Value, applied: bool) -> String {
    let head = if applied {
        "done"
    } else {
        "plan (act with --apply)"
    };
    let rows: Vec<Vec<String>> = answer
        .as_object()
        .map(|fields| {
            fields
                .iter()
                .map(|(k, v)| vec![format!("  {k}"), plain(v)])
                .collect()
        })
        .unwrap_or_default();
    table(&[head, ""], &rows)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

pub(super) fn run(args: &ConfigArg) -> Result<Exit, Failure> {
    crate::run::main(&args.config)
}

pub(super) fn config(command: ConfigCommand, output: &Output) -> Result<Exit, Failure> {
    let ConfigCommand::Check(args) = command;
    let checked = Config::load(&args.config).and_then(|config| {
        let mistakes = config.host_mistakes();
        if mistakes.is_empty() {
            return Ok(config);
        }
        let path = args.config.clone();
        Err(ConfigError::Mistakes { path, mistakes })
    });
    match checked {
        Ok(config) => {
            output.say(
                &json!({"ok": true, "mistakes": [], "loosened": config.loosened()}),
                || {
                    let loosened = config.loosened();
                    if loosened.is_empty() {
                        format!("{} is good", args.config.display())
                    } else {
                        format!(
                            "{} is good; loosened: {}",
                            args.config.display(),
                            loosened.join(", ")
                        )
                    }
                },
            );
            Ok(Exit::Done)
        }
        Err(ConfigError::Mistakes { path, mistakes }) if output.is_json() => {
            let list: Vec<Value> = mistakes
                .iter()
                .map(|m| json!({"line": m.line, "key": m.key, "message": m.message}))
                .collect();
            output.say(
                &json!({"ok": false, "file": path, "mistakes": list}),
                String::new,
            );
            Ok(Exit::CannotRun)
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) fn crl(command: CrlCommand, output: &Output) -> Result<Exit, Failure> {
    let CrlCommand::Import {
        file,
        config,
        apply,
    } = command;
    let bytes = fs::read(&file).map_err(|e| Failure::at(&file, &e))?;
    let body = json!({"crl": BASE64_STANDARD.encode(bytes)});
    let answer = operate(&config, "crl.import", &body, apply)?;
    output.say(&answer, || describe(&answer, apply));
    Ok(Exit::Done)
}

pub(super) fn clock(command: ClockCommand, output: &Output) -> Result<Exit, Failure> {
    let ClockCommand::Accept { config, apply } = command;
    let answer = operate(&config, "clock.accept", &json!({}), apply)?;
    output.say(&answer, || describe(&answer, apply));
    Ok(Exit::Done)
}

pub(super) fn journal(args: &ConfigArg, since: u64, output: &Output) -> Result<Exit, Failure> {
    let answer = operate(args, "journal", &json!({"since": since}), false)?;
    output.say(&answer, || {
        let entries = at(&answer, "/entries").as_array();
        let lines = entries.into_iter().flatten().map(|entry| {
            let facts: Vec<String> = entry
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(key, _)| !["line", "unix_ms", "event"].contains(&key.as_str()))
                .map(|(key, value)| format!("{key}={}", plain(value)))
                .collect();
            format!(
                "{}  {}  {}  {}",
                plain(at(entry, "/line")),
                plain(at(entry, "/unix_ms")),
                plain(at(entry, "/event")),
                facts.join(" ")
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    });
    Ok(Exit::Done)
}

pub(super) fn token(command: TokenCommand, output: &Output) -> Result<Exit, Failure> {
    let TokenCommand::New {
        principal,
        act_as,
        days,
        no_expiry,
    } = command;
    let expires_at = match no_expiry {
        true => None,
        false => Some(after_days(days)?),
    };
    let (token, entry) = new_token(&principal, act_as, expires_at.as_deref())?;
    let told = json!({"token": token, "entry": entry, "expires_at": expires_at});
    output.say(&told, || {
        let end = expires_at.as_deref().unwrap_or("never");
        format!(
            "token (shown once; give it to the caller)\n  {token}\nexpires\n  {end}\nentry for the file named by gateway.tokens, below its first line `format = 1`\n{entry}"
        )
    });
    Ok(Exit::Done)
}

/// The time so many days from now, as RFC 3339 writes it, in whole seconds.
fn after_days(days: u16) -> Result<String, Failure> {
    const DAY_S: i64 = 86_400;
    let now_s = i64::try_from(wall_unix_ms() / 1_000).unwrap_or(i64::MAX);
    let end = now_s.saturating_add(i64::from(days) * DAY_S);
    let end = jiff::Timestamp::from_second(end)
        .map_err(|e| Failure::cannot_run(format!("--days: {e}")))?;
    Ok(end.to_string())
}

/// A fresh token and the entry of a token file that admits it, until then if that is given.
pub(crate) fn new_token(
    principal: &str,
    act_as: bool,
    expires_at: Option<&str>,
) -> Result<(String, String), Failure> {
    let (kind, id) = principal
        .split_once("::")
        .filter(|(kind, id)| !kind.is_empty() && !id.is_empty())
        .ok_or_else(|| {
            Failure::cannot_run("--principal must have the form Type::id, as in Agent::ops-1")
        })?;
    let scopes = Scopes {
        decide: true,
        explain: true,
        act_as,
    };
    Grant::new(kind, id, scopes).map_err(|e| Failure::cannot_run(format!("--principal: {e}")))?;
    let (token, digest) = mint_token()?;
    let act = if act_as { ", \"act_as\"" } else { "" };
    // An id may hold quotes. A JSON text is a TOML text, too.
    let (kind, id) = (json!(kind), json!(id));
    let expiry = expires_at.map_or_else(String::new, |at| format!("expires_at = \"{at}\"\n"));
    let entry = format!(
        "[[tokens]]\nsha256 = \"{digest}\"\nprincipal_type = {kind}\nprincipal = {id}\n\
         scopes = [\"decide\", \"explain\"{act}]\n{expiry}"
    );
    Ok((token, entry))
}

pub(super) fn status(args: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let status = Door::of(args)?.get("/v1/status")?;
    output.say(&status, || status_text(&status));
    Ok(Exit::Done)
}

pub(super) fn quota(args: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let status = Door::of(args)?.get("/v1/status")?;
    let quotas = at(&status, "/quotas");
    output.say(&json!({"quotas": quotas}), || {
        let cells = ["bucket", "per_second", "burst", "passed", "refused", "keys"];
        let rows: Vec<Vec<String>> = quotas
            .as_array()
            .into_iter()
            .flatten()
            .map(|quota| {
                let cell = |key: &&str| match quota.get(*key) {
                    None | Some(Value::Null) => "no bound".to_owned(),
                    Some(value) => plain(value),
                };
                cells.iter().map(cell).collect()
            })
            .collect();
        table(&cells, &rows)
    });
    Ok(Exit::Done)
}

pub(super) fn at<'v>(value: &'v Value, pointer: &str) -> &'v Value {
    value.pointer(pointer).unwrap_or(&Value::Null)
}

fn status_text(status: &Value) -> String {
    let get = |pointer: &str| plain(at(status, pointer));
    let rows = [
        (
            "node",
            format!("{} of domain {}", get("/node"), get("/domain")),
        ),
        ("posture", get("/posture")),
        (
            "policy",
            if at(status, "/bundle").is_null() {
                "none: every action is denied NO_POLICY".to_owned()
            } else {
                format!(
                    "{} epoch {} from {}, {}",
                    get("/bundle/name"),
                    get("/bundle/epoch"),
                    get("/bundle/source"),
                    get("/bundle/hash")
                )
            },
        ),
        (
            "audit",
            format!(
                "{} records, {}{}, {} segments without enough custodians",
                get("/audit/records"),
                get("/audit/state"),
                if get("/audit/superseded") == "true" {
                    " and superseded by a later part that a peer holds"
                } else {
                    ""
                },
                get("/audit/unlicensed_segments")
            ),
        ),
        (
            "disk",
            format!(
                "{} of {} bytes, {}",
                get("/disk/allocated_bytes"),
                get("/disk/ceiling_bytes"),
                get("/disk/ladder")
            ),
        ),
        (
            "transport",
            if at(status, "/mesh/enabled") == &Value::Bool(true) {
                "open".to_owned()
            } else {
                format!("closed: {}", get("/mesh/reason"))
            },
        ),
        ("loosened", get("/loosened")),
    ];
    let beacon = at(status, "/mesh/beacon");
    let beacon = (!beacon.is_null()).then(|| ("beacon", beacon_text(beacon)));
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .chain(beacon)
        .map(|(k, v)| vec![k.to_owned(), v])
        .collect();
    let mut text = table(&["what", "state"], &rows);
    text.push_str("\n\n");
    for warning in paper_warnings(at(status, "/papers")) {
        text.push_str(&warning);
        text.push('\n');
    }
    text.push_str(&peers_text(at(status, "/mesh/peers")));
    text
}

/// What an operator has to do about certificates and CRLs, if anything.
fn paper_warnings(papers: &Value) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(why) = at(papers, "/refused").as_str() {
        warnings.push(format!(
            "warning: files were changed and not taken, so that the old ones are in use: {why}"
        ));
    }
    for ending in at(papers, "/endings").as_array().into_iter().flatten() {
        if at(ending, "/warn") == &Value::Bool(true) {
            let (paper, name) = (plain(at(ending, "/paper")), plain(at(ending, "/name")));
            warnings.push(match at(ending, "/days_left").as_u64() {
                Some(days) => {
                    format!("warning: the {paper} of {name} ends in {days} days; renew it")
                }
                None => format!("warning: the {paper} of {name} has ended; renew it"),
            });
        }
    }
    warnings
}

fn beacon_text(beacon: &Value) -> String {
    let get = |pointer: &str| plain(at(beacon, pointer));
    let refused: Vec<String> = at(beacon, "/refused")
        .as_object()
        .map(|reasons| reasons.iter().map(|(r, n)| format!("{r} {n}")).collect())
        .unwrap_or_default();
    let mut text = format!(
        "{} sent, {} heard, refused: {}; {} dials, {} of them met a missing peer",
        get("/sent"),
        get("/heard"),
        if refused.is_empty() {
            "none".to_owned()
        } else {
            refused.join(", ")
        },
        get("/dials"),
        get("/met")
    );
    for (what, pointer) in [("fault", "/fault"), ("last failure", "/last_failure")] {
        if let Some(why) = at(beacon, pointer).as_str() {
            text.push_str(&format!("; {what}: {why}"));
        }
    }
    text
}

fn peers_text(peers: &Value) -> String {
    let rows: Vec<Vec<String>> = peers
        .as_array()
        .map(|peers| {
            peers
                .iter()
                .map(|p| {
                    let get = |pointer: &str| plain(at(p, pointer));
                    let lag = |way: &str| {
                        let segments = at(p, &format!("/detail/lag/{way}_segments"));
                        let bytes = at(p, &format!("/detail/lag/{way}_bytes"));
                        match (segments.as_u64(), bytes.as_u64()) {
                            (Some(0), _) => "level".to_owned(),
                            (Some(segments), Some(bytes)) => {
                                format!("{segments} ({})", human_bytes(bytes))
                            }
                            // Not met since the start: nothing is known.
                            _ => "?".to_owned(),
                        }
                    };
                    let lost = format!(
                        "{} of {}",
                        get("/detail/lost_packets"),
                        get("/detail/sent_packets")
                    );
                    vec![
                        get("/id"),
                        get("/state"),
                        get("/address"),
                        lag("to_peer"),
                        lag("from_peer"),
                        lost,
                        get("/last_reason"),
                    ]
                })
                .collect()
        })
        .unwrap_or_default();
    table(
        &[
            "peer",
            "state",
            "address",
            "it lacks",
            "we lack",
            "packets lost",
            "last reason",
        ],
        &rows,
    )
}

pub(super) fn peers(
    command: Option<PeersCommand>,
    args: &ConfigArg,
    output: &Output,
) -> Result<Exit, Failure> {
    match command {
        None => {
            let status = Door::of(args)?.get("/v1/status")?;
            let peers = at(&status, "/mesh/peers").clone();
            output.say(&peers, || peers_text(&peers));
            Ok(Exit::Done)
        }
        Some(PeersCommand::Why {
            segment,
            peer,
            config,
        }) => why(&segment, &peer, &config, output),
        Some(PeersCommand::Qlog {
            peer,
            seconds,
            interval_ms,
            config,
        }) => super::qlog::write(
            &peer,
            Duration::from_secs(seconds),
            Duration::from_millis(interval_ms),
            &config,
        ),
        Some(PeersCommand::Quota {
            peer,
            bytes_per_second,
            requests_per_second,
            bytes_per_day,
            common,
            apply,
            config,
        }) => {
            let body = json!({
                "peer": peer,
                "bytes_per_second": bytes_per_second,
                "requests_per_second": requests_per_second,
                "bytes_per_day": bytes_per_day,
                "common": common,
            });
            let answer = operate(&config, "peers.quota", &body, apply)?;
            output.say(&answer, || quota_text(&answer, apply));
            Ok(Exit::Done)
        }
    }
}

fn quota_text(answer: &Value, applied: bool) -> String {
    let (before, after) = (at(answer, "/before"), at(answer, "/after"));
    let bytes = |value: &Value| value.as_u64().map_or("no bound".to_owned(), human_bytes);
    let row = |name: &str, key: &str, text: &dyn Fn(&Value) -> String| {
        vec![
            format!("  {name}"),
            text(at(before, key)),
            text(at(after, key)),
        ]
    };
    let rows = [
        row("bytes a second, each way", "/bytes_per_second", &bytes),
        row("frames a second", "/requests_per_second", &plain),
        row("bytes of audit a day", "/bytes_per_day", &bytes),
    ];
    let head = match (before == after, applied) {
        (true, _) => "nothing changes",
        (false, true) => "done",
        (false, false) => "plan (act with --apply)",
    };
    let of = match at(answer, "/own") == &Value::Bool(true) {
        true => "set for this peer",
        false => "as in the config",
    };
    format!(
        "{}: {of}; {} of audit taken today\n{}",
        plain(at(answer, "/peer")),
        at(answer, "/used_today_bytes")
            .as_u64()
            .map_or("all that it may".to_owned(), human_bytes),
        table(&[head, "before", "after"], &rows)
    )
}

fn why(segment: &str, peer: &str, config: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let body = json!({"segment": segment, "peer": peer});
    let answer = operate(config, "peers.why", &body, false)?;
    output.say(&answer, || {
        let rows: Vec<Vec<String>> = answer
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| !["code", "message"].contains(&name.as_str()))
            .map(|(name, value)| vec![format!("  {name}"), plain(value)])
            .collect();
        let said = format!(
            "{}: {}",
            plain(at(&answer, "/code")),
            plain(at(&answer, "/message"))
        );
        format!("{said}\n{}", table(&["  fact", "value"], &rows))
    });
    Ok(Exit::Done)
}
