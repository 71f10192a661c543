//! `tidelock policy …`

use std::{path::PathBuf, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::{Args, Subcommand, ValueHint};
use serde_json::{Value, json};
use tidelock_policy::{Changes, Difference, difference};
use tidelock_prover::{Widening, compare_limits};

use super::{
    ConfigArg, Exit, Failure, Output,
    bundle::{PackageArgs, read_archive},
    node,
    output::table,
};
use crate::{
    clock::wall_unix_ms,
    worker::{
        ProofTerms,
        limits::{PROOF_DEADLINE_MS, PROOF_DEADLINE_MS_RANGE},
        prove_policies,
    },
};

/// What to do with the policy of a running node.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Which bundle decides, from where, and how old it is.
    Status(ConfigArg),
    /// What activating a bundle would change: policies, classes, files, and how the actions that were
    /// recorded lately would come out. Nothing is done.
    #[command(
        after_help = "Examples:\n  tidelock policy plan site-2.tar\n  tidelock policy plan site-2.tar --replay 0 --json"
    )]
    Plan(PlanArgs),
    /// Activate a bundle by a plan that was looked at. If another bundle decides meanwhile, or the
    /// file is another, nothing is done.
    #[command(
        after_help = "Examples:\n  tidelock policy activate site-2.tar                                 the plan\n  \
                      tidelock policy activate site-2.tar --plan 5f3c2a9be01d7744 --apply  the act"
    )]
    Activate {
        #[command(flatten)]
        args: PlanArgs,
        /// The plan, as `tidelock policy plan` printed it.
        #[arg(long, required_if_eq("apply", "true"))]
        plan: Option<String>,
        /// Act on that plan.
        #[arg(long)]
        apply: bool,
    },
    /// Go back: set the active bundle aside, so that the last known good one serves, restricted at best,
    /// until a bundle of a higher epoch comes. What is set aside comes back by `policy activate` alone.
    #[command(
        after_help = "Examples:\n  tidelock policy rollback                                     the plan\n  \
                      tidelock policy rollback --plan 5f3c2a9be01d7744 --apply \\\n    \
                      --reason \"orders fail since epoch 7\"                      the act"
    )]
    Rollback {
        /// The plan, as `tidelock policy rollback` printed it, or the activation.
        #[arg(long, required_if_eq("apply", "true"))]
        plan: Option<String>,
        /// Why; kept on record.
        #[arg(long, default_value = "")]
        reason: String,
        /// Act on that plan.
        #[arg(long)]
        apply: bool,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// How the actions that a node recorded lately would come out with a bundle. Ends with 1 if any
    /// would come out otherwise.
    #[command(after_help = "Example:\n  tidelock policy replay site-2.tar --replay 200")]
    Replay(PlanArgs),
    /// Prove that a bundle permits nothing that another does not, with the solver `cvc5`. Ends with 1 if it
    /// permits more, with a request that shows it, or if nothing could be proved. Nothing is said about who
    /// signed them.
    #[command(
        after_help = "Examples:\n  tidelock policy prove site-1.tar site-2.tar\n  \
                      tidelock policy prove site-1.tar site-2.tar --solver /opt/cvc5/bin/cvc5 --json\n\n\
                      What is proved and what is not: docs/src/policy.md"
    )]
    Prove {
        /// The archive that decides now.
        #[arg(value_hint = ValueHint::FilePath)]
        before: PathBuf,
        /// The archive that would.
        #[arg(value_hint = ValueHint::FilePath)]
        after: PathBuf,
        /// The solver; without it /usr/bin/cvc5 and /usr/local/bin/cvc5 are looked at.
        #[arg(long, value_hint = ValueHint::FilePath)]
        solver: Option<PathBuf>,
        /// Milliseconds that it may take.
        #[arg(long, default_value_t = PROOF_DEADLINE_MS, value_parser = clap::value_parser!(u64).range(PROOF_DEADLINE_MS_RANGE))]
        deadline_ms: u64,
    },
    /// What one bundle changes against another. Ends with 1 if they differ. Nothing is said about
    /// who signed them.
    #[command(after_help = "Example:\n  tidelock policy diff site-1.tar site-2.tar")]
    Diff {
        /// The older archive.
        #[arg(value_hint = ValueHint::FilePath)]
        before: PathBuf,
        /// The newer archive.
        #[arg(value_hint = ValueHint::FilePath)]
        after: PathBuf,
    },
}

/// A bundle, and the node that is asked.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    package: PackageArgs,
    /// How many of the newest recorded actions are asked again, at most 1,000.
    #[arg(long, value_name = "ACTIONS", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(0..=1_000))]
    replay: u64,
    /// Flips of recorded actions do not block, though the trust file says that they do. It is part of the
    /// plan, and kept on record.
    #[arg(long)]
    accept_flips: bool,
    #[command(flatten)]
    config: ConfigArg,
}

impl PlanArgs {
    fn body(&self) -> Result<Value, Failure> {
        let package = BASE64_STANDARD.encode(self.package.load()?.encode()?);
        Ok(json!({
            "package": package, "replay": self.replay, "accept_flips": self.accept_flips,
        }))
    }
}

pub(super) fn run(command: PolicyCommand, output: &Output) -> Result<Exit, Failure> {
    match command {
        PolicyCommand::Status(config) => status(&config, output),
        PolicyCommand::Plan(args) => {
            let plan = node::operate(&args.config, "policy.plan", &args.body()?, false)?;
            output.say(&plan, || describe_plan(&plan));
            Ok(Exit::Done)
        }
        PolicyCommand::Replay(args) => {
            let mut body = args.body()?;
            if let Some(fields) = body.as_object_mut() {
                fields.insert("prove".to_owned(), false.into());
            }
            let plan = node::operate(&args.config, "policy.plan", &body, false)?;
            let replay = plan.get("replay").cloned().unwrap_or_default();
            output.say(&replay, || describe_replay(&replay).join("\n"));
            let flips = |key: &str| replay.get(key).and_then(Value::as_u64).unwrap_or_default();
            Ok(match flips("deny_to_allow") + flips("allow_to_deny") {
                0 => Exit::Done,
                _ => Exit::Failed,
            })
        }
        PolicyCommand::Activate { args, plan, apply } => {
            let mut body = args.body()?;
            if let (Some(plan), Some(fields)) = (plan, body.as_object_mut()) {
                fields.insert("plan".to_owned(), plan.into());
            }
            let answer = node::operate(&args.config, "policy.activate", &body, apply)?;
            output.say(&answer, || match apply {
                true => describe_activated(&answer),
                false => describe_plan(&answer),
            });
            Ok(Exit::Done)
        }
        PolicyCommand::Rollback {
            plan,
            reason,
            apply,
            config,
        } => {
            let body = json!({"plan": plan, "reason": reason});
            let answer = node::operate(&config, "policy.rollback", &body, apply)?;
            output.say(&answer, || match apply {
                true => node::describe(&answer, true),
                false => describe_rollback(&answer),
            });
            Ok(Exit::Done)
        }
        PolicyCommand::Prove {
            before,
            after,
            solver,
            deadline_ms,
        } => {
            let terms = ProofTerms {
                deadline: Duration::from_millis(deadline_ms),
                solver,
                ..ProofTerms::default()
            };
            let (before, after) = (read_archive(&before)?, read_archive(&after)?);
            let said = compare_limits(&before, &after, wall_unix_ms())?
                .unwrap_or_else(|| prove_policies(&before, &after, &terms));
            output.say(&said, || said.to_string());
            Ok(match said {
                Widening::NotWider => Exit::Done,
                _ => Exit::Failed,
            })
        }
        PolicyCommand::Diff { before, after } => {
            let found = difference(&read_archive(&before)?, &read_archive(&after)?)?;
            output.say(&found, || describe_difference(&found).join("\n"));
            Ok(match found.is_empty() {
                true => Exit::Done,
                false => Exit::Failed,
            })
        }
    }
}

fn status(config: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let status = node::Door::of(config)?.get("/v1/status")?;
    let part = |key: &str| status.get(key).cloned().unwrap_or_default();
    let told = json!({
        "bundle": part("bundle"), "posture": part("posture"), "activation": part("activation"),
        "consult": part("consult"),
    });
    output.say(&told, || {
        let mut rows = vec![vec!["posture".to_owned(), word(&told, "posture")]];
        match told.get("bundle").and_then(Value::as_object) {
            Some(bundle) => rows.extend(
                bundle
                    .keys()
                    .map(|key| vec![key.clone(), bundle.get(key).map(text).unwrap_or_default()]),
            ),
            None => rows.push(vec![
                "bundle".to_owned(),
                "none: every action is denied".to_owned(),
            ]),
        }
        rows.extend(activation_rows(&told));
        let upstreams = told.pointer("/consult/upstreams").and_then(Value::as_array);
        for upstream in upstreams.into_iter().flatten() {
            let seen = |key: &str| upstream.pointer(&format!("/seen/{key}")).map(text);
            rows.push(vec![
                format!("upstream {}", word(upstream, "name")),
                match upstream.get("fault").and_then(Value::as_str) {
                    Some(fault) => format!("unusable: {fault}"),
                    None => format!(
                        "breaker {}, last answer {}, last failure {} {}",
                        seen("breaker").unwrap_or_else(|| "closed".to_owned()),
                        seen("answered_unix_ms").unwrap_or_else(|| "-".to_owned()),
                        seen("failed_unix_ms").unwrap_or_else(|| "-".to_owned()),
                        seen("failure").unwrap_or_default(),
                    ),
                },
            ]);
        }
        table(&["policy", ""], &rows)
    });
    Ok(Exit::Done)
}

/// What was set aside, what waits, and the way back.
fn activation_rows(told: &Value) -> Vec<Vec<String>> {
    let part = |key: &str| {
        let pointer = format!("/activation/{key}");
        told.pointer(&pointer).cloned().unwrap_or_default()
    };
    let mut rows = Vec::new();
    let aside = part("set_aside");
    if aside.is_object() {
        let (epoch, cause, reason) = (
            word(&aside, "epoch"),
            word(&aside, "cause"),
            word(&aside, "reason"),
        );
        rows.push(vec![
            "set aside".to_owned(),
            format!("epoch {epoch} by {cause}: {reason}"),
        ]);
    }
    for waiting in part("waiting").as_array().into_iter().flatten() {
        let (name, epoch) = (word(waiting, "name"), word(waiting, "epoch"));
        let (code, message) = (word(waiting, "code"), word(waiting, "message"));
        rows.push(vec![
            "waits".to_owned(),
            format!("{name} epoch {epoch}: {code}: {message}"),
        ]);
    }
    for scheduled in part("scheduled").as_array().into_iter().flatten() {
        let (name, epoch) = (word(scheduled, "name"), word(scheduled, "epoch"));
        let refused = |key: &str| scheduled.pointer(&format!("/refused/{key}")).map(text);
        let refused = match (refused("code"), refused("message")) {
            (Some(code), Some(message)) => format!(", refused since then: {code}: {message}"),
            _ => String::new(),
        };
        rows.push(vec![
            "scheduled".to_owned(),
            format!(
                "{name} epoch {epoch}: from {}{refused}",
                word(scheduled, "not_before")
            ),
        ]);
    }
    for key in ["block_on", "widening_signatures"] {
        let rule = part(key);
        if !rule.is_null() {
            rows.push(vec![key.to_owned(), text(&rule)]);
        }
    }
    if let Some(undo) = part("undo").as_str() {
        rows.push(vec!["way back".to_owned(), undo.to_owned()]);
    }
    rows
}

/// What was just activated, and how to undo it; or what waits for its time.
pub(super) fn describe_activated(answer: &Value) -> String {
    if let Some(scheduled) = answer.get("scheduled") {
        return format!(
            "{} epoch {} is in place and begins to decide at {}, by the node's clock; look at it with \
             tidelock policy status, and take its place by a newer epoch",
            word(scheduled, "name"),
            word(scheduled, "epoch"),
            word(scheduled, "not_before")
        );
    }
    let mut rows = answer.clone();
    let undo = rows.as_object_mut().and_then(|rows| rows.remove("undo"));
    let undo = match undo.as_ref().and_then(Value::as_str) {
        Some(undo) => format!("to undo it: {undo}"),
        None => {
            "nothing stands behind it: the way back is older content under a new epoch".to_owned()
        }
    };
    format!("{}\n{undo}", node::describe(&rows, true))
}

fn describe_rollback(plan: &Value) -> String {
    let bundle = |key: &str| {
        let bundle = plan.get(key).cloned().unwrap_or_default();
        let (name, epoch, hash) = (
            word(&bundle, "name"),
            word(&bundle, "epoch"),
            word(&bundle, "hash"),
        );
        format!("{name} epoch {epoch} {hash}")
    };
    let mut lines = vec![
        format!("sets aside  {}", bundle("sets_aside")),
        format!(
            "serves      {}, {} at best",
            bundle("serves"),
            word(plan, "posture")
        ),
    ];
    if let Some(changes) = plan.get("changes") {
        let changes: Result<Difference, _> = serde_json::from_value(changes.clone());
        lines.extend(changes.iter().flat_map(describe_difference));
    }
    match plan.get("replay").filter(|replay| replay.is_object()) {
        Some(replay) => lines.extend(describe_replay(replay)),
        None => lines.push("the recorded actions could not be asked again".to_owned()),
    }
    lines.push("the floor stays: only a bundle of a higher epoch, or this one by an operator's plan, ends it".to_owned());
    lines.push(format!(
        "to act: tidelock policy rollback --plan {} --apply",
        word(plan, "plan")
    ));
    lines.join("\n")
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn word(value: &Value, key: &str) -> String {
    value.get(key).map(text).unwrap_or_default()
}

fn describe_plan(plan: &Value) -> String {
    let bundle = |key: &str| {
        let Some(bundle) = plan.get(key).filter(|bundle| bundle.is_object()) else {
            return "nothing: no bundle decides".to_owned();
        };
        let (name, epoch, hash) = (
            word(bundle, "name"),
            word(bundle, "epoch"),
            word(bundle, "hash"),
        );
        format!("{name} epoch {epoch} {hash}")
    };
    let mut lines = vec![
        format!("activate  {}", bundle("activate")),
        format!("replaces  {}", bundle("replaces")),
    ];
    let activate = plan.get("activate").cloned().unwrap_or_default();
    lines.push(format!(
        "signers   {}, {} tests of its own passed",
        word(&activate, "signers"),
        word(&activate, "tests_passed")
    ));
    let warnings = activate.get("warnings").and_then(Value::as_array);
    for warning in warnings.into_iter().flatten() {
        lines.push(format!("warning   {}", text(warning)));
    }
    let changes = plan.get("changes").cloned().unwrap_or_default();
    if let Ok(Some(changes)) = serde_json::from_value::<Option<Difference>>(changes) {
        lines.extend(describe_difference(&changes));
    }
    let widening = plan.get("widening").cloned().unwrap_or_default();
    lines.push(format!("widening  {}", word(&widening, "text")));
    if let Some(needed) = widening.get("signatures_needed").and_then(Value::as_u64) {
        lines.push(format!(
            "refused   as it is: the trust file asks for {needed} signatures for that"
        ));
    }
    lines.extend(describe_replay(
        &plan.get("replay").cloned().unwrap_or_default(),
    ));
    if let Some(blocked) = plan.get("blocked").filter(|blocked| blocked.is_object()) {
        let (code, message) = (word(blocked, "code"), word(blocked, "message"));
        lines.push(format!("blocked   {code}: {message}"));
        return lines.join("\n");
    }
    let accepts = match plan.get("accept_flips") {
        Some(Value::Bool(true)) => "--accept-flips ",
        _ => "",
    };
    lines.push(format!(
        "act with: tidelock policy activate … {accepts}--plan {} --apply",
        word(plan, "plan")
    ));
    lines.join("\n")
}

fn describe_changes(what: &str, changes: &Changes, lines: &mut Vec<String>) {
    for (word, names) in [
        ("added", &changes.added),
        ("removed", &changes.removed),
        ("changed", &changes.changed),
    ] {
        if !names.is_empty() {
            lines.push(format!("{what} {word}: {}", names.join(", ")));
        }
    }
    if changes.not_listed > 0 {
        lines.push(format!("{what}: {} more", changes.not_listed));
    }
}

fn describe_difference(found: &Difference) -> Vec<String> {
    if found.is_empty() {
        return vec!["nothing differs".to_owned()];
    }
    let mut lines = Vec::new();
    for (name, (before, after)) in &found.manifest {
        lines.push(format!(
            "manifest {name}: {} -> {}",
            text(before),
            text(after)
        ));
    }
    describe_changes("classes", &found.classes, &mut lines);
    describe_changes("files", &found.files, &mut lines);
    describe_changes("policies", &found.policies, &mut lines);
    for (id, (before, after)) in &found.texts {
        lines.push(format!("policy {id}"));
        for (sign, side) in [('-', before), ('+', after)] {
            let side = side.as_deref().unwrap_or_default();
            lines.extend(side.lines().map(|line| format!("  {sign} {line}")));
        }
    }
    lines
}

fn describe_replay(replay: &Value) -> Vec<String> {
    let mut lines = vec![format!(
        "recorded actions: {} of {} callers asked, in {} records; {} come out the same, {} would be allowed that \
         are denied, {} denied that are allowed",
        word(replay, "asked"),
        word(replay, "callers"),
        word(replay, "records_read"),
        word(replay, "same"),
        word(replay, "deny_to_allow"),
        word(replay, "allow_to_deny")
    )];
    if replay.get("older_unread") == Some(&Value::Bool(true)) {
        lines.push("older records were not read".to_owned());
    }
    let left_out = replay.get("not_asked").and_then(Value::as_object);
    let left_out: Vec<String> = left_out
        .into_iter()
        .flatten()
        .map(|(why, count)| format!("{count} {why}"))
        .collect();
    if !left_out.is_empty() {
        lines.push(format!("records not asked again: {}", left_out.join(", ")));
    }
    if replay.get("ended_early") == Some(&Value::Bool(true)) {
        lines.push("it took too long and ended early: older actions were not asked".to_owned());
    }
    let flips = replay.get("flips").and_then(Value::as_array);
    let rows: Vec<Vec<String>> = flips
        .into_iter()
        .flatten()
        .map(|flip| {
            let id = |key: &str| {
                let part = flip.get(key).cloned().unwrap_or_default();
                format!("{}::{}", word(&part, "type"), word(&part, "id"))
            };
            let side = |key: &str| flip.get(key).map(|side| word(side, "verdict"));
            vec![
                word(flip, "index"),
                id("principal"),
                word(flip, "action"),
                id("resource"),
                side("before").unwrap_or_default(),
                side("after").unwrap_or_default(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let head = ["record", "principal", "action", "resource", "now", "then"];
        lines.push(table(&head, &rows));
    }
    lines
}
