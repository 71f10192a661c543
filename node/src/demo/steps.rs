//! The nine steps. Each shows something or says what it missed; the first miss ends the story,
//! because the later steps stand on the earlier ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};
use tidelock_gateway::Client;

use super::{
    Listener, StepReport, StoryReport,
    network::Network,
    site::{Broken, NODES, Node, STALE_AFTER_S, Site, allocated_bytes, broken},
    until,
};
use crate::cli::Failure;

/// How many steps the story has.
pub const STEPS: u32 = 9;

const SHORT: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(60);
/// Until a log is full, which is work, and takes as long as a busy machine takes for it.
const FILLING: Duration = Duration::from_secs(240);
/// How long a full log must have denied everything before it counts as full.
const FULL_FOR: Duration = Duration::from_millis(1_500);
/// Requests in flight at once, per node.
const CONCURRENT: usize = 32;
/// Denials for want of time before a further one is the answer.
const LATE_MAX: u32 = 3;
/// Of so many decisions one may be denied for want of time.
const AGAIN_ONE_IN: u64 = 100;

type Facts = Map<String, Value>;

macro_rules! corpus {
    ($($name:literal),*) => {
        [$(include_str!(concat!("../../../tests/data/actions/", $name, ".jsonl"))),*]
    };
}

const CORPUS: [&str; 6] = corpus!("files", "shell", "http", "secrets", "git", "mcp");

/// One line of the corpus.
struct Expected {
    name: String,
    request: Vec<u8>,
    decision: String,
    reason: String,
}

fn corpus() -> Result<Vec<Expected>, Broken> {
    CORPUS
        .iter()
        .flat_map(|file| file.lines())
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let value: Value =
                serde_json::from_str(line).map_err(|e| broken(format!("corpus: {e}: {line}")))?;
            let request = match value.get("request_raw").and_then(Value::as_str) {
                Some(raw) => raw.as_bytes().to_vec(),
                None => value
                    .get("request")
                    .map(Value::to_string)
                    .unwrap_or_default()
                    .into_bytes(),
            };
            Ok(Expected {
                name: text(&value, "/name"),
                request,
                decision: text(&value, "/expect/decision"),
                reason: text(&value, "/expect/reason"),
            })
        })
        .collect()
}

fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

fn number(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer).and_then(Value::as_u64)
}

/// An action that the story's policy allows, distinct by `n`.
fn read_action(n: u64) -> Vec<u8> {
    json!({
        "principal": {"type": "Agent", "id": "coder-1"},
        "action": "fs.read",
        "resource": {"type": "File", "id": format!("/srv/app/src/module_{n}.rs")},
    })
    .to_string()
    .into_bytes()
}

/// An action with an effect that the story's policy allows in posture `normal`.
fn write_action(n: u64) -> Vec<u8> {
    json!({
        "principal": {"type": "Agent", "id": "coder-1"},
        "action": "fs.write",
        "resource": {"type": "File", "id": format!("/srv/app/src/module_{n}.rs")},
    })
    .to_string()
    .into_bytes()
}

/// How often a decision was asked for.
#[derive(Default)]
struct Asks {
    first: AtomicU64,
    again: AtomicU64,
}

impl Asks {
    /// A machine too busy for the engine's budget, or whose disk takes longer for a sync than an append
    /// may wait, gets its denials too, and rightly; that is not what the story is about, so the same is
    /// asked again, a few times, and counted. Tells how long the last try took.
    async fn ask(
        &self,
        client: &Client,
        request: Vec<u8>,
    ) -> Result<(u16, Value, Duration), Broken> {
        self.first.fetch_add(1, Ordering::Relaxed);
        let mut left = LATE_MAX;
        loop {
            let begun = Instant::now();
            let (status, answer) = ask_once(client, request.clone()).await?;
            let late =
                ["DEADLINE", "AUDIT_UNAVAILABLE"].contains(&text(&answer, "/reason").as_str());
            if !late || left == 0 {
                return Ok((status, answer, begun.elapsed()));
            }
            left -= 1;
            self.again.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn again(&self) -> u64 {
        self.again.load(Ordering::Relaxed)
    }

    /// A node that denies for want of time more than now and then does not do its work.
    fn check(&self) -> Result<(), Broken> {
        let (first, again) = (self.first.load(Ordering::Relaxed), self.again());
        let most = first / AGAIN_ONE_IN + u64::from(LATE_MAX);
        must(again <= most, || {
            format!(
                "{again} of {first} decisions were denied for want of time, at most {most} may be"
            )
        })
    }
}

async fn ask_once(client: &Client, request: Vec<u8>) -> Result<(u16, Value), Broken> {
    let (status, body) = client
        .post_json("/v1/decide", request)
        .await
        .map_err(|e| broken(format!("a decision was not answered: {e}")))?;
    let value =
        serde_json::from_slice(&body).map_err(|e| broken(format!("an answer is no JSON: {e}")))?;
    Ok((status, value))
}

fn must(good: bool, why: impl FnOnce() -> String) -> Result<(), Broken> {
    if good { Ok(()) } else { Err(Broken(why())) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn rounded(seconds: f64) -> Value {
    #[expect(
        clippy::float_arithmetic,
        reason = "a figure for people, rounded to milliseconds"
    )]
    let value = (seconds * 1_000.0).round() / 1_000.0;
    json!(value)
}

/// What a step needs beside the site.
struct Stage<'l> {
    step: u32,
    listener: &'l mut dyn Listener,
    asks: Arc<Asks>,
}

impl Stage<'_> {
    async fn ask(&self, client: &Client, request: Vec<u8>) -> Result<(u16, Value), Broken> {
        let (status, answer, _) = self.asks.ask(client, request).await?;
        Ok((status, answer))
    }

    fn progress(&mut self, what: &str) {
        self.listener.progress(self.step, what);
    }
}

/// Plays all steps on a fresh site in `dir`.
///
/// # Errors
/// Where the site could not be prepared.
pub async fn play(
    dir: &Path,
    program: &Path,
    network: &dyn Network,
    listener: &mut dyn Listener,
) -> Result<StoryReport, Failure> {
    let mut site = Site::prepare(dir, program, network, &NODES)?;
    for id in NODES {
        site.start(id).await?;
    }
    let mut steps = Vec::new();
    let asks = Arc::new(Asks::default());
    for step in 1..=STEPS {
        let name = name_of(step);
        let begun = Instant::now();
        let again = asks.again();
        let mut stage = Stage {
            step,
            listener,
            asks: asks.clone(),
        };
        stage.progress(name);
        let result = match step {
            1 => spread(&mut site, &stage).await,
            2 => decide(&mut site, &mut stage).await,
            3 => exchange(&mut site).await,
            4 => cut_off(&mut site, &mut stage).await,
            5 => killed(&mut site, &mut stage).await,
            6 => healed(&mut site).await,
            7 => revoked(&mut site, &mut stage).await,
            8 => damaged(&mut site, &mut stage).await,
            _ => filled(&mut site, &mut stage).await,
        };
        let result = result.and_then(|facts| Ok(asks.check().map(|()| facts)?));
        let ok = result.is_ok();
        let facts = match result {
            Ok(mut facts) => {
                facts.insert("asked_again".to_owned(), json!(asks.again() - again));
                facts
            }
            Err(failure) => Facts::from_iter([("why".to_owned(), json!(failure.message))]),
        };
        let report = StepReport {
            step,
            name,
            ok,
            seconds: begun.elapsed().as_secs_f64(),
            facts,
        };
        listener.ended(&report);
        steps.push(report);
        if !ok {
            break;
        }
    }
    Ok(StoryReport {
        ok: steps.len() == usize::try_from(STEPS).unwrap_or(usize::MAX)
            && steps.iter().all(|s| s.ok),
        network: network.name(),
        steps,
    })
}

fn name_of(step: u32) -> &'static str {
    match step {
        1 => "a bundle enters at a and reaches b and c",
        2 => "agent tool calls are decided at each node",
        3 => "audit is exchanged and verifies everywhere",
        4 => "c is cut off and goes on, its policy growing stale",
        5 => "c is killed in mid-load and loses nothing",
        6 => "the link heals and both sides catch up",
        7 => "b is revoked, shut out, and rejoins under a new key",
        8 => "damaged policy falls back, then denies, then mends",
        _ => "c's disk ceiling holds while its log fills",
    }
}

fn facts<const N: usize>(list: [(&str, Value); N]) -> Facts {
    list.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

fn has_epoch(status: &Value, epoch: u64) -> bool {
    number(status, "/bundle/epoch") == Some(epoch)
}

async fn install(site: &Site<'_>, at: &str, epoch: u64) -> Result<String, Failure> {
    let package = site.bundle(epoch)?;
    let hash = package.content_id().to_string();
    let body = json!({"package": BASE64_STANDARD.encode(package.encode()?)});
    site.node(at)?.operate("bundle.install", &body).await?;
    Ok(hash)
}

async fn spread(site: &mut Site<'_>, stage: &Stage<'_>) -> Result<Facts, Failure> {
    // The bundle must travel over sessions, so they have to be there before it enters.
    for id in NODES {
        site.node(id)?
            .await_status("sessions with both peers", SHORT, |s| connected(s) == 2)
            .await?;
    }
    let (_, before) = stage.ask(&site.node("b")?.client(), read_action(0)).await?;
    must(text(&before, "/reason") == "NO_POLICY", || {
        format!("without a bundle b answered {before}")
    })?;
    let begun = Instant::now();
    let hash = install(site, "a", 1).await?;
    for id in ["b", "c"] {
        site.node(id)?
            .await_status("epoch 1", SHORT, |s| {
                has_epoch(s, 1) && text(s, "/bundle/hash") == hash
            })
            .await?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let status = site.node("c")?.status().await?;
    Ok(facts([
        ("bundle", json!(text(&status, "/bundle/name"))),
        ("epoch", json!(1)),
        ("hash", json!(hash)),
        ("spread_seconds", rounded(seconds)),
    ]))
}

fn connected(status: &Value) -> usize {
    status
        .pointer("/mesh/peers")
        .and_then(Value::as_array)
        .map_or(0, |peers| {
            peers
                .iter()
                .filter(|p| text(p, "/state") == "connected")
                .count()
        })
}

async fn decide(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    let corpus = Arc::new(corpus()?);
    let distinct: BTreeSet<&[u8]> = corpus.iter().map(|e| e.request.as_slice()).collect();
    must(distinct.len() >= 200, || {
        format!("only {} distinct actions", distinct.len())
    })?;
    let mut latencies = Vec::new();
    let mut allowed = 0;
    for id in NODES {
        stage.progress(&format!("{} actions at {id}", corpus.len()));
        let client = site.node(id)?.client();
        let answers = all_answers(&stage.asks, &client, &corpus).await?;
        for (expected, (status, answer, seconds)) in corpus.iter().zip(answers) {
            check_answer(id, expected, status, &answer)?;
            allowed += usize::from(status == 200);
            latencies.push(seconds);
        }
    }
    #[expect(clippy::float_arithmetic, reason = "a figure for people")]
    let p50_ms = median(latencies) * 1_000.0;
    Ok(facts([
        ("actions", json!(corpus.len())),
        ("nodes", json!(NODES.len())),
        ("matched", json!(corpus.len() * NODES.len())),
        ("allowed", json!(allowed)),
        ("p50_ms", rounded(p50_ms)),
    ]))
}

async fn all_answers(
    asks: &Arc<Asks>,
    client: &Arc<Client>,
    corpus: &Arc<Vec<Expected>>,
) -> Result<Vec<(u16, Value, f64)>, Failure> {
    let mut answers = Vec::with_capacity(corpus.len());
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONCURRENT {
        let (asks, client) = (asks.clone(), client.clone());
        let (corpus, next) = (corpus.clone(), next.clone());
        tasks.spawn(async move {
            let mut own = Vec::new();
            loop {
                let index =
                    usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX);
                let Some(expected) = corpus.get(index) else {
                    return Ok::<_, Broken>(own);
                };
                let (status, answer, took) = asks.ask(&client, expected.request.clone()).await?;
                own.push((index, status, answer, took.as_secs_f64()));
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        answers.extend(done??);
    }
    answers.sort_by_key(|(index, ..)| *index);
    Ok(answers.into_iter().map(|(_, s, a, t)| (s, a, t)).collect())
}

fn check_answer(id: &str, expected: &Expected, status: u16, answer: &Value) -> Result<(), Broken> {
    let (decision, reason) = (text(answer, "/decision"), text(answer, "/reason"));
    must(
        decision == expected.decision && reason == expected.reason,
        || {
            format!(
                "{id} answered {decision} {reason} to `{}`, expected {} {}: {answer}",
                expected.name, expected.decision, expected.reason
            )
        },
    )?;
    must((status == 200) == (decision == "allow"), || {
        format!("{id} answered {decision} with status {status}")
    })?;
    let decided_by_policy = ["POLICY_ALLOW", "POLICY_DENY"].contains(&reason.as_str());
    let complete = number(answer, "/record/index").is_some()
        && (!decided_by_policy
            || (answer
                .pointer("/policies")
                .and_then(Value::as_array)
                .is_some_and(|p| !p.is_empty())
                && text(answer, "/bundle/hash").starts_with("sha256:")
                && number(answer, "/bundle/epoch").is_some()));
    must(complete, || {
        format!("{id}: an answer lacks its evidence: {answer}")
    })
}

/// The sequences of sealed audit that a node holds of an origin: first and last of one range without
/// holes.
fn audit_range(status: &Value, origin: &str) -> Option<(u64, u64)> {
    let ranges = status
        .get("store")?
        .get("audit")?
        .get(origin)?
        .get("ranges")?
        .as_array()?;
    match ranges.as_slice() {
        [one] => Some((number(one, "/0")?, number(one, "/1")?)),
        _ => None,
    }
}

/// Whether a node holds an origin's audit from the first segment to `last`.
fn holds_all(status: &Value, origin: &str, last: u64) -> bool {
    audit_range(status, origin).is_some_and(|(first, held)| first == 0 && held >= last)
}

/// Seals at each of `ids` and waits until all of them hold the sealed audit of all of them.
async fn seal_and_meet(site: &Site<'_>, ids: &[&str]) -> Result<usize, Failure> {
    for id in ids {
        site.node(id)?.operate("audit.seal", &json!({})).await?;
    }
    let mut wanted = BTreeMap::new();
    for id in ids {
        let status = site.node(id)?.status().await?;
        let own = text(&status, "/audit/origin");
        if let Some((_, last)) = audit_range(&status, &own) {
            wanted.insert(own, last);
        }
    }
    must(wanted.len() == ids.len(), || {
        format!("not every node has sealed audit: {wanted:?}")
    })?;
    for id in ids {
        site.node(id)?
            .await_status("the sealed audit of all", LONG, |s| {
                wanted
                    .iter()
                    .all(|(origin, last)| holds_all(s, origin, *last))
            })
            .await?;
    }
    Ok(wanted.len())
}

/// `tidelock audit verify` at a node; answers how many records it read.
async fn verify_audit(site: &Site<'_>, id: &str) -> Result<u64, Failure> {
    let (good, report) = site.tidelock(id, &["audit", "verify"]).await?;
    must(good, || format!("audit verify fails at {id}: {report}"))?;
    Ok(number(&report, "/records").unwrap_or_default())
}

async fn exchange(site: &mut Site<'_>) -> Result<Facts, Failure> {
    let origins = seal_and_meet(site, &NODES).await?;
    let mut records = Vec::new();
    for id in NODES {
        records.push(verify_audit(site, id).await?);
    }
    Ok(facts([
        ("origins_everywhere", json!(origins)),
        ("records_verified", json!(records)),
    ]))
}

async fn cut_off(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    site.network.cut("c")?;
    install(site, "a", 2).await?;
    site.node("b")?
        .await_status("epoch 2", SHORT, |s| has_epoch(s, 2))
        .await?;
    let client = site.node("c")?.client();
    stage.progress("waiting until c's bundle is stale");
    let mut asked = 0_u64;
    let limit = Duration::from_secs(STALE_AFTER_S.saturating_mul(2));
    let begun = Instant::now();
    let stale = loop {
        let (status, answer) = stage.ask(&client, read_action(asked)).await?;
        must(status == 200, || format!("cut off, c answered {answer}"))?;
        asked += 1;
        if text(&answer, "/posture") == "stale" {
            break answer;
        }
        must(begun.elapsed() < limit, || {
            format!("c is never stale: {answer}")
        })?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    must(number(&stale, "/bundle/epoch") == Some(1), || {
        format!("c has {stale}")
    })?;
    let status = site.node("c")?.status().await?;
    must(connected(&status) == 0, || {
        "c still has sessions".to_owned()
    })?;
    // Audit for step 6 to carry, on both sides of the cut.
    for id in ["a", "b"] {
        site.node(id)?.operate("audit.seal", &json!({})).await?;
    }
    Ok(facts([
        ("decided_alone", json!(asked)),
        ("c_epoch", json!(1)),
        ("others_epoch", json!(2)),
        ("c_posture", json!("stale")),
        ("datagrams_swallowed", json!(site.network.swallowed())),
    ]))
}

/// What a load has had acknowledged.
#[derive(Default)]
struct Acknowledged {
    records: Mutex<BTreeMap<u64, String>>,
    denied: Mutex<BTreeMap<String, u64>>,
    last_allow: Mutex<Option<Instant>>,
}

impl Acknowledged {
    fn note(&self, answer: &Value) {
        if let Some(index) = number(answer, "/record/index") {
            self.records
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(index, text(answer, "/record/leaf"));
        }
        if text(answer, "/decision") == "allow" {
            let now = Some(Instant::now());
            *self
                .last_allow
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = now;
        } else {
            *self
                .denied
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(text(answer, "/reason"))
                .or_default() += 1;
        }
    }

    /// Whether everything was denied for so long that what was licensed for eviction is gone too.
    fn denied_throughout(&self, at_least: Duration) -> bool {
        let last = *self
            .last_allow
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() >= at_least)
    }

    fn count(&self) -> usize {
        self.records
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    fn denied(&self, reason: &str) -> u64 {
        self.denied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(reason)
            .copied()
            .unwrap_or_default()
    }
}

/// Keeps a node under load until `stop`; a request that the node's end cuts off is no acknowledgement.
fn load(node: &Node, stop: &Arc<AtomicBool>, seen: &Arc<Acknowledged>) -> tokio::task::JoinSet<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONCURRENT {
        let (client, stop, seen, next) = (node.client(), stop.clone(), seen.clone(), next.clone());
        tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let n = next.fetch_add(1, Ordering::Relaxed);
                match ask_once(&client, read_action(n)).await {
                    Ok((_, answer)) => seen.note(&answer),
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        });
    }
    tasks
}

async fn killed(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(Acknowledged::default());
    let mut tasks = load(site.node("c")?, &stop, &seen);
    stage.progress("c under load");
    let enough = until(LONG, || async { (seen.count() >= 2_000).then_some(()) }).await;
    site.kill("c")?;
    stop.store(true, Ordering::Relaxed);
    while tasks.join_next().await.is_some() {}
    must(enough.is_some(), || {
        format!("only {} records were acknowledged", seen.count())
    })?;
    stage.progress("c restarts");
    let recovery = site.start("c").await?;
    let begun = Instant::now();
    let (status, answer) = stage.ask(&site.node("c")?.client(), read_action(1)).await?;
    must(
        status == 200 && number(&answer, "/bundle/epoch") == Some(1),
        || format!("after its restart c answered {answer}"),
    )?;
    let first_decision = recovery + begun.elapsed();
    stage.progress("looking for every acknowledged record");
    let (good, tail) = site.tidelock("c", &["audit", "tail", "--all"]).await?;
    must(good, || "audit tail failed at c".to_owned())?;
    let kept: BTreeMap<u64, String> = tail
        .pointer("/records")
        .and_then(Value::as_array)
        .map(|records| {
            records
                .iter()
                .filter_map(|r| Some((number(r, "/index")?, text(r, "/leaf"))))
                .collect()
        })
        .unwrap_or_default();
    let acknowledged = seen
        .records
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let lost = acknowledged
        .iter()
        .filter(|(i, leaf)| kept.get(i) != Some(leaf))
        .count();
    must(lost == 0, || {
        format!(
            "{lost} of {} acknowledged records are lost",
            acknowledged.len()
        )
    })?;
    verify_audit(site, "c").await?;
    let status = site.node("c")?.status().await?;
    must(connected(&status) == 0, || "c was not cut off".to_owned())?;
    Ok(facts([
        ("acknowledged", json!(acknowledged.len())),
        ("lost", json!(0)),
        ("epoch", json!(1)),
        ("recovery_seconds", rounded(recovery.as_secs_f64())),
        (
            "first_decision_seconds",
            rounded(first_decision.as_secs_f64()),
        ),
    ]))
}

/// What a node's journal says since a line, newest last.
async fn journal(node: &Node, since: u64) -> Result<Vec<Value>, Broken> {
    let answer = node.operate("journal", &json!({"since": since})).await?;
    Ok(answer
        .pointer("/entries")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default())
}

async fn journal_end(node: &Node) -> Result<u64, Broken> {
    Ok(journal(node, 0)
        .await?
        .last()
        .and_then(|e| number(e, "/line"))
        .unwrap_or_default())
}

fn urgency(kind: &str) -> u32 {
    match kind {
        "revocation" => 1,
        "policy" => 2,
        "witness" => 3,
        _ => 4,
    }
}

/// Whether a session with a peer was closed after a line of the journal. What it had claimed is asked for
/// again a moment before the journal tells of its end.
fn closed(entries: &[Value], from: usize, peer: &str) -> bool {
    entries
        .iter()
        .skip(from)
        .any(|e| text(e, "/event") == "session_closed" && text(e, "/peer") == peer)
}

/// INV-08 and INV-11 in a node's journal: nothing came twice, and of each peer the urgent was asked
/// before the rest and each origin's segments in their order. Answers how many were stored.
fn check_exchange(id: &str, entries: &[Value]) -> Result<usize, Broken> {
    let of = |event: &str| -> Vec<&Value> {
        entries
            .iter()
            .filter(|e| text(e, "/event") == event)
            .collect()
    };
    let (stored, again) = (of("segment_stored"), of("segment_again"));
    must(again.is_empty(), || {
        format!("{id} was sent a segment twice: {again:?}")
    })?;
    let ids: BTreeSet<String> = stored.iter().map(|e| text(e, "/segment")).collect();
    must(ids.len() == stored.len(), || {
        format!("{id} stored a segment twice: {stored:?}")
    })?;
    let requested = of("segment_requested");
    let all = ids
        .iter()
        .all(|id| requested.iter().any(|e| text(e, "/segment") == *id));
    must(all, || {
        format!("{id} stored what it had not asked for: {stored:?}")
    })?;
    // Of a peer's origin the last request, and where the journal goes on after it.
    let mut last: BTreeMap<(String, String), (u64, usize)> = BTreeMap::new();
    let mut worst: BTreeMap<String, u32> = BTreeMap::new();
    // The order is a session's: of two that met at once, one is kept and asks anew.
    for (at, entry) in entries.iter().enumerate() {
        let peer = text(entry, "/peer");
        match text(entry, "/event").as_str() {
            "session_established" => {
                last.retain(|(of, _), _| *of != peer);
                worst.remove(&peer);
                continue;
            }
            "segment_requested" => {}
            _ => continue,
        }
        let sequence = number(entry, "/sequence").unwrap_or_default();
        let before = last.insert((peer.clone(), text(entry, "/origin")), (sequence, at));
        // The same one again only where a session was closed that had asked for it and will not get it.
        let in_order = before.is_none_or(|(before, from)| {
            before < sequence || (before == sequence && closed(entries, from, &peer))
        });
        must(in_order, || {
            format!("{id} asked for a segment out of its origin's order: {entry}")
        })?;
        let class = urgency(&text(entry, "/kind"));
        let seen = worst.entry(peer).or_insert(class);
        must(*seen <= class, || {
            format!("{id} asked for an urgent segment late: {entry}")
        })?;
        *seen = class;
    }
    Ok(stored.len())
}

async fn healed(site: &mut Site<'_>) -> Result<Facts, Failure> {
    let mut marks = BTreeMap::new();
    site.node("c")?.operate("audit.seal", &json!({})).await?;
    for id in NODES {
        marks.insert(id, journal_end(site.node(id)?).await?);
    }
    let begun = Instant::now();
    site.network.heal("c")?;
    site.node("c")?
        .await_status("epoch 2", LONG, |s| has_epoch(s, 2))
        .await?;
    let caught_up = begun.elapsed();
    // Before anything new is sealed, what waited on both sides must have met.
    let own = site.node("c")?.status().await?;
    let origin = text(&own, "/audit/origin");
    let (_, last) = audit_range(&own, &origin).ok_or_else(|| broken("c has sealed nothing"))?;
    for id in ["a", "b"] {
        site.node(id)?
            .await_status("c's audit", LONG, |s| holds_all(s, &origin, last))
            .await?;
    }
    let flowed = begun.elapsed();
    let mut stored = Vec::new();
    for id in NODES {
        let since = marks.get(id).copied().unwrap_or_default();
        let entries = journal(site.node(id)?, since).await?;
        stored.push(check_exchange(id, &entries)?);
    }
    for id in NODES {
        verify_audit(site, id).await?;
    }
    Ok(facts([
        ("epoch_after_seconds", rounded(caught_up.as_secs_f64())),
        ("audit_after_seconds", rounded(flowed.as_secs_f64())),
        ("segments_stored", json!(stored)),
        ("twice", json!(0)),
        ("in_order", json!(true)),
    ]))
}

async fn revoked(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    for id in NODES {
        site.node(id)?
            .await_status("sessions with both peers", SHORT, |s| connected(s) == 2)
            .await?;
    }
    let mut marks = BTreeMap::new();
    for id in ["a", "c"] {
        marks.insert(id, journal_end(site.node(id)?).await?);
    }
    let (crl_number, crl) = site.revoke("b")?;
    stage.progress("a learns that b is revoked");
    let body = json!({"crl": BASE64_STANDARD.encode(&crl)});
    site.node("a")?.operate("crl.import", &body).await?;
    let mut closed_after_ms = Vec::new();
    for id in ["a", "c"] {
        let since = marks.get(id).copied().unwrap_or_default();
        let node = site.node(id)?;
        let found = until(SHORT, || async {
            let entries = journal(node, since).await.ok()?;
            let applied = entries.iter().find(|e| {
                text(e, "/event") == "crl_applied" && number(e, "/number") == Some(crl_number)
            })?;
            let closed = entries.iter().find(|e| {
                text(e, "/event") == "session_closed"
                    && text(e, "/peer") == "b"
                    && text(e, "/reason") != "duplicate"
            })?;
            Some((
                number(closed, "/unix_ms")?.saturating_sub(number(applied, "/unix_ms")?),
                text(closed, "/reason"),
            ))
        })
        .await;
        let (after_ms, reason) =
            found.ok_or_else(|| broken(format!("{id} did not close its session with b")))?;
        must(after_ms <= 1_000 && reason == "revoked", || {
            format!("{id} closed its session with b after {after_ms} ms, reason {reason}")
        })?;
        closed_after_ms.push(after_ms);
    }
    stage.progress("b's redials are refused");
    for id in ["a", "c"] {
        let since = marks.get(id).copied().unwrap_or_default();
        let node = site.node(id)?;
        let refused = until(SHORT, || async {
            journal(node, since).await.ok()?.into_iter().find(|e| {
                text(e, "/event") == "peer_refused" && text(e, "/reason").contains("revoked")
            })
        })
        .await;
        must(refused.is_some(), || {
            format!("{id} has refused no redial of b")
        })?;
    }
    for id in ["a", "c"] {
        let since = marks.get(id).copied().unwrap_or_default();
        let bystander = journal(site.node(id)?, since)
            .await?
            .into_iter()
            // Two nodes that dial each other at once keep one connection; that closes nobody out.
            .find(|e| {
                text(e, "/event") == "session_closed"
                    && text(e, "/peer") != "b"
                    && text(e, "/reason") != "duplicate"
            });
        must(bystander.is_none(), || {
            format!("{id} closed a bystander's session: {bystander:?}")
        })?;
    }
    let status_a = site.node("a")?.status().await?;
    must(connected(&status_a) == 1, || {
        format!("a's bystander session is gone: {status_a}")
    })?;
    let status_b = site.node("b")?.status().await?;
    must(connected(&status_b) == 0, || {
        "b still has a session".to_owned()
    })?;
    let (status, answer) = stage.ask(&site.node("b")?.client(), read_action(7)).await?;
    must(status == 200, || format!("shut out, b answered {answer}"))?;
    stage.progress("b gets a new certificate under a new key");
    let begun = Instant::now();
    let files = site.reissue("b")?;
    for id in NODES {
        site.node(id)?
            .await_status("sessions with both peers", LONG, |s| connected(s) == 2)
            .await?;
    }
    let rejoined = begun.elapsed();
    seal_and_meet(site, &NODES).await?;
    Ok(facts([
        ("crl_number", json!(crl_number)),
        ("closed_after_ms", json!(closed_after_ms)),
        ("redials", json!("refused")),
        ("bystanders_closed", json!(0)),
        ("new_serial", json!(files.serial)),
        ("rejoined_seconds", rounded(rejoined.as_secs_f64())),
    ]))
}

/// Overwrites a few bytes in the middle of a file.
fn damage(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|e| Failure::at(path, &e))?;
    let middle = file.metadata()?.len() / 2;
    file.write_all_at(b"\0damaged\0", middle)?;
    Ok(())
}

async fn damaged(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    site.network.cut("c")?;
    let before = site.node("c")?.status().await?;
    let epoch = number(&before, "/bundle/epoch").unwrap_or_default();
    let stored = text(&before, "/bundle/segment");
    let hex = stored
        .strip_prefix("blake3:")
        .unwrap_or_default()
        .to_owned();
    let root = site.node("c")?.root();
    site.kill("c")?;
    damage(&root.join("policy/active"))?;
    damage(&root.join("segments/policy").join(format!("{hex}.seg")))?;
    stage.progress("c restarts with its active bundle damaged");
    site.start("c").await?;
    let node = site.node("c")?;
    let status = node.status().await?;
    must(
        text(&status, "/posture") == "restricted"
            && text(&status, "/bundle/source") == "last_known_good",
        || format!("with its active bundle damaged c is {status}"),
    )?;
    let lkg_epoch = number(&status, "/bundle/epoch").unwrap_or_default();
    must(lkg_epoch < epoch, || {
        format!("LKG has epoch {lkg_epoch}, active had {epoch}")
    })?;
    let (_, read) = stage.ask(&node.client(), read_action(1)).await?;
    must(
        text(&read, "/decision") == "allow" && text(&read, "/posture") == "restricted",
        || format!("LKG answered {read}"),
    )?;
    let (_, write) = stage.ask(&node.client(), write_action(1)).await?;
    must(text(&write, "/reason") == "POSTURE_RESTRICTED", || {
        format!("LKG answered {write}")
    })?;
    site.kill("c")?;
    damage(&root.join("policy/lkg"))?;
    stage.progress("c restarts with its LKG damaged too");
    site.start("c").await?;
    for request in [read_action(2), write_action(2)] {
        let (_, answer) = stage.ask(&site.node("c")?.client(), request).await?;
        must(text(&answer, "/reason") == "NO_POLICY", || {
            format!("without any bundle: {answer}")
        })?;
    }
    let begun = Instant::now();
    site.network.heal("c")?;
    let status = site
        .node("c")?
        .await_status("the same epoch again", LONG, |s| {
            has_epoch(s, epoch) && text(s, "/bundle/source") == "active"
        })
        .await?;
    must(
        text(&status, "/bundle/hash") == text(&before, "/bundle/hash"),
        || format!("another bundle came back: {status}"),
    )?;
    let mended = begun.elapsed();
    let (code, answer) = stage
        .ask(&site.node("c")?.client(), write_action(3))
        .await?;
    must(code == 200, || {
        format!("after the mend c answered {answer}")
    })?;
    Ok(facts([
        ("lkg_epoch", json!(lkg_epoch)),
        ("lkg_posture", json!("restricted")),
        ("both_damaged", json!("NO_POLICY")),
        ("epoch_again", json!(epoch)),
        ("mended_seconds", rounded(mended.as_secs_f64())),
    ]))
}

async fn filled(site: &mut Site<'_>, stage: &mut Stage<'_>) -> Result<Facts, Failure> {
    // Cut off, so that nobody can take the audit over while the log fills.
    site.network.cut("c")?;
    let root = site.node("c")?.root();
    // Below it fit: what is there, the share of other nodes' audit, the reserve, and a little more.
    let ceiling = (allocated_bytes(&root) * 2 + (12 << 20)).max(crate::config::CEILING_MIN_BYTES);
    site.set_ceiling("c", ceiling)?;
    site.node("c")?
        .await_status("the lower ceiling", SHORT, |s| {
            number(s, "/disk/ceiling_bytes") == Some(ceiling)
        })
        .await?;
    let highest = Arc::new(AtomicU64::new(0));
    let sampling = Arc::new(AtomicBool::new(true));
    let sampler = {
        let (highest, sampling, root) = (highest.clone(), sampling.clone(), root.clone());
        std::thread::spawn(move || {
            let mut samples = 0_u64;
            while sampling.load(Ordering::Relaxed) {
                highest.fetch_max(allocated_bytes(&root), Ordering::Relaxed);
                samples += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            samples
        })
    };
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(Acknowledged::default());
    let mut tasks = load(site.node("c")?, &stop, &seen);
    stage.progress("c's log fills");
    let full = until(FILLING, || async {
        (seen.denied("AUDIT_CAPACITY") >= 100 && seen.denied_throughout(FULL_FOR)).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    while tasks.join_next().await.is_some() {}
    let filled = async {
        must(full.is_some(), || {
            format!(
                "c's log did not fill: {} records, denied {:?}",
                seen.count(),
                seen.denied
            )
        })?;
        let (status, answer) = stage.ask(&site.node("c")?.client(), read_action(1)).await?;
        must(
            status == 503 && text(&answer, "/reason") == "AUDIT_CAPACITY",
            || format!("full, c answered {answer}"),
        )?;
        stage.progress("peers take c's audit over");
        let begun = Instant::now();
        site.network.heal("c").map_err(|e| broken(e.to_string()))?;
        let client = site.node("c")?.client();
        let again = until(LONG, || async {
            let (status, _) = stage.ask(&client, read_action(2)).await.ok()?;
            (status == 200).then(|| begun.elapsed())
        })
        .await;
        again.ok_or_else(|| broken("c does not decide again after the link healed"))
    }
    .await;
    sampling.store(false, Ordering::Relaxed);
    let samples = sampler.join().unwrap_or_default();
    let again = filled?;
    let highest = highest.load(Ordering::Relaxed);
    // INV-04, seen from outside.
    must(highest <= ceiling, || {
        format!("{highest} bytes were allocated, the ceiling is {ceiling}")
    })?;
    verify_audit(site, "c").await?;
    // Room was made by eviction, and what is gone from c is whole at both its custodians.
    let status = site.node("c")?.status().await?;
    let origin = text(&status, "/audit/origin");
    let (first, last) = audit_range(&status, &origin)
        .ok_or_else(|| broken(format!("c's own audit has holes: {status}")))?;
    must(first > 0, || {
        "c evicted nothing and yet found room".to_owned()
    })?;
    for id in ["a", "b"] {
        site.node(id)?
            .await_status("all of c's audit", LONG, |s| holds_all(s, &origin, last))
            .await?;
    }
    Ok(facts([
        ("segments_evicted", json!(first)),
        ("ceiling_bytes", json!(ceiling)),
        ("highest_bytes", json!(highest)),
        ("samples", json!(samples)),
        ("recorded", json!(seen.count())),
        ("denied", json!(seen.denied("AUDIT_CAPACITY"))),
        ("decides_again_seconds", rounded(again.as_secs_f64())),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requested(sequence: u64) -> Value {
        json!({
            "event": "segment_requested", "peer": "b", "segment": format!("s{sequence}"),
            "kind": "audit", "origin": "audit/b", "sequence": sequence,
        })
    }

    fn of_b(event: &str) -> Value {
        json!({"event": event, "peer": "b"})
    }

    #[test]
    fn inv_11_a_segment_is_asked_for_again_only_after_a_session_was_closed() {
        let journal = |between: &[Value]| {
            let mut entries = vec![of_b("session_established"), requested(1), requested(2)];
            entries.extend_from_slice(between);
            check_exchange("a", &entries)
        };
        assert!(journal(&[requested(3)]).is_ok(), "the control");
        assert!(journal(&[of_b("session_closed"), requested(2)]).is_ok());
        assert!(
            journal(&[requested(2), of_b("session_closed")]).is_ok(),
            "the journal hears of the end a moment later"
        );
        assert!(journal(&[requested(2)]).is_err());
        let other = json!({"event": "session_closed", "peer": "c"});
        assert!(journal(&[other, requested(2)]).is_err());
        assert!(journal(&[of_b("session_closed"), requested(1)]).is_err());
    }

    #[test]
    fn denials_for_want_of_time_are_few_or_the_story_fails() {
        let asks = Asks::default();
        asks.first.store(1_000, Ordering::Relaxed);
        asks.again.store(13, Ordering::Relaxed);
        assert!(asks.check().is_ok());
        asks.again.store(14, Ordering::Relaxed);
        assert!(asks.check().is_err());
    }
}
