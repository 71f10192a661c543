//! The word of an upstream decision point, where a bundle asks for it.
//!
//! A class of actions may be referred to a decision point. It is asked after the local policies have
//! permitted the action, and can only turn that permit into a deny or a hold: nothing in here makes an
//! allow (ruling 17). What it said is an input of the decision and stands in its record.
//!
//! While it cannot be reached, the terms of the bundle say what becomes of the action: deny, hold, or its
//! last answer to the same question. [`Answers`] keeps those: by the question, which names the
//! action, the bundle and the posture, but not the nodes that it came through; for the lifetime that the bundle gives; for one bundle only; and not
//! past posture `closed`. It is never looked at while the decision point answers.
//!
//! [`Consults`] is the state machine: one question on its way for equal ones, a breaker and a limit for
//! each upstream, a share for each caller. It starts nothing and waits for nothing; who waits is a value of
//! its caller's choice. Questions are carried by [`Upstreams`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidelock_policy::{ConsultTerms, Posture, WhenUnreachable};
use tidelock_quota::{Breaker, BreakerState, Call};
use tidelock_segments::Sha256Hash;

use crate::{
    action::{Action, Fields, InvalidRequest, canonical_bytes},
    answer::BundleInfo,
    json,
    limits::{
        CONSULT_BREAKER, CONSULT_BREAKER_TIMEOUT_MIN, CONSULT_GRACE, MAX_CONSULT_ANSWER_BYTES,
        MAX_CONSULT_CACHE_BYTES, MAX_CONSULT_CACHE_BYTES_PER_PRINCIPAL, MAX_CONSULT_CACHED,
        MAX_CONSULT_HOPS, MAX_CONSULT_OBLIGATIONS, MAX_CONSULT_SIGNED_BYTES, MAX_CONSULT_WAITING,
        MAX_CONSULTS_PER_CALLER, MAX_CONSULTS_PER_UPSTREAM, MAX_MESSAGE_BYTES, MAX_TYPE_BYTES,
    },
    reason::{Decision, Reason},
    redact,
};

/// Obligations of an answer that this node meets: it makes its own caller report, and its answers carry
/// its own posture.
const KNOWN_OBLIGATIONS: [&str; 2] = ["report_outcome", "posture"];

/// One question on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Who is asked.
    pub upstream: String,
    /// An access evaluation of AuthZEN, in canonical JSON.
    pub body: Vec<u8>,
    /// SHA-256 of the body.
    pub digest: Sha256Hash,
    /// The same as it would be if the question came through no other node.
    pub(crate) plain: Sha256Hash,
    /// Who that is by the config; none where nobody is configured.
    pub identity: Option<UpstreamIdentity>,
    /// How long the answer is waited for.
    pub deadline: Duration,
}

impl Question {
    /// The question whether an action may happen that the policies of this bundle permit.
    pub(crate) fn new(
        action: &Action,
        (bundle, posture, node): (&BundleInfo, Posture, &str),
        (terms, identity): (&ConsultTerms, Option<UpstreamIdentity>),
        (via, deadline): (&[String], Duration),
    ) -> Result<Self, InvalidRequest> {
        let named = |kind: &str, id: &str| json!({"type": kind, "id": id});
        // The last member is none of the protocol's, so others ignore it; with it the digest of the question
        // names all that the answer depends on (ruling 16).
        let mut said = json!({
            "bundle": bundle, "node": node, "posture": posture, "upstream": terms.upstream,
        });
        let body = |said: &Value| {
            canonical_bytes(&json!({
                "subject": named(action.principal().kind(), action.principal().id()),
                "action": {"name": action.name(), "properties": action.params()},
                "resource": named(action.resource_type(), action.resource_id()),
                "context": action.context(),
                "tidelock": said,
            }))
        };
        let mut sent = body(&said)?;
        let plain = Sha256Hash::of(&sent);
        if let (false, Some(members)) = (via.is_empty(), said.as_object_mut()) {
            members.insert("via".to_owned(), json!(via));
            sent = body(&said)?;
        }
        Ok(Self {
            upstream: terms.upstream.clone(),
            digest: Sha256Hash::of(&sent),
            plain,
            body: sent,
            identity,
            deadline,
        })
    }

    /// Names what is asked and who is asked: one answer is for all who ask the same at once.
    pub(crate) fn key(&self) -> Sha256Hash {
        self.key_of(self.digest)
    }

    /// Under which answers are kept. The nodes that a question came through are named by whoever asks, so they
    /// are no part of it: a revocation would miss what was kept under other names.
    pub(crate) fn kept_key(&self) -> Sha256Hash {
        self.key_of(self.plain)
    }

    fn key_of(&self, digest: Sha256Hash) -> Sha256Hash {
        let identity = self.identity.map(|identity| identity.digest.to_string());
        let parts = [digest.to_string(), identity.unwrap_or_default()];
        Sha256Hash::of_parts(&parts.each_ref().map(|part| part.as_bytes()))
    }
}

/// Why a question that has come through these nodes is not sent on by this one. Nodes that ask each other
/// would do so for ever, one action holding a place at each, until the first of them gives up.
pub(crate) fn goes_round(via: &[String], node: &str) -> Option<ConsultFailure> {
    let comes_again = via.iter().any(|earlier| earlier == node);
    let is_long = via.len() >= MAX_CONSULT_HOPS;
    (comes_again || is_long)
        .then(|| ConsultFailure::Loop(redact::message(&via.join(", "), MAX_MESSAGE_BYTES)))
}

/// Which decision point a name in the config stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpstreamIdentity {
    /// SHA-256 of all that tells it from another one: where it is met and what it proves itself with.
    pub digest: Sha256Hash,
    /// Whether an answer of it counts only if it is signed.
    pub signs: bool,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConsultFailure {
    /// Nobody answered: no connection, no trust, or a breaker that is open.
    #[error("not reachable: {0}")]
    Unreachable(String),
    /// No whole answer in time.
    #[error("no answer in time")]
    Timeout,
    /// There was an answer that is none. No earlier answer serves in its stead: it was reached.
    #[error("not a valid answer: {0}")]
    Invalid(String),
    /// As many questions are on their way as there may be.
    #[error("as many questions are on their way as there may be")]
    Busy,
    /// Somebody was reached and says, with this status, that there is no answer now. Whoever asks a lot can
    /// bring that about, so it is no absence.
    #[error("it has no answer now: status {0}")]
    NotNow(u16),
    /// Another node was reached that could not judge the action, for this reason. As above.
    #[error("it could not judge the action: {0}")]
    NotJudged(String),
    /// The question has come through this very node, or through too many.
    #[error("the question goes round: {0}")]
    Loop(String),
    /// The node's config has no such upstream.
    #[error("no upstream of this name is configured")]
    Unconfigured,
}

impl ConsultFailure {
    /// The stable word of records and counters.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Timeout => "timeout",
            Self::Invalid(_) => "invalid",
            Self::Busy | Self::NotNow(_) | Self::NotJudged(_) => "busy",
            Self::Loop(_) => "loop",
            Self::Unconfigured => "unconfigured",
        }
    }

    fn reason(&self) -> Reason {
        match self {
            Self::Unreachable(_) | Self::Unconfigured => Reason::ConsultUnreachable,
            Self::Timeout => Reason::ConsultTimeout,
            Self::Invalid(_) | Self::Loop(_) => Reason::ConsultInvalid,
            Self::Busy | Self::NotNow(_) | Self::NotJudged(_) => Reason::ConsultBusy,
        }
    }

    /// Whether the decision point was away, as far as can be seen from here.
    fn is_absence(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Timeout)
    }
}

/// What came back over the wire.
#[derive(Debug, Clone, Copy)]
pub struct Heard<'a> {
    /// The status.
    pub status: u16,
    /// `X-Request-ID` as it came back.
    pub echoed_id: Option<&'a [u8]>,
    /// The body.
    pub body: &'a [u8],
}

/// Gives the payload of a compact JWS that verifies under the pinned key of the upstream.
pub type VerifySigned<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// An answer that was read and checked; [`UpstreamAnswer::read`] makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamAnswer {
    decision: Decision,
    why: Option<String>,
    lifetime_s: Option<u64>,
    obligations: Vec<String>,
    digest: Sha256Hash,
    id: String,
    signed: Option<String>,
}

impl UpstreamAnswer {
    /// Reads the answer to a question that was sent with the request id `id`. With `verify` it must be
    /// signed, and what is signed must say the same of the same question.
    ///
    /// # Errors
    /// [`ConsultFailure::NotNow`] for the statuses that say "too much" or "not now",
    /// [`ConsultFailure::NotJudged`] for a deny that says nothing of the action, and
    /// [`ConsultFailure::Invalid`] for everything else that is no answer.
    pub fn read(
        question: &Question,
        id: &str,
        heard: Heard<'_>,
        verify: Option<VerifySigned<'_>>,
    ) -> Result<Self, ConsultFailure> {
        match heard.status {
            200 => {}
            429 | 502..=504 => return Err(ConsultFailure::NotNow(heard.status)),
            status => return Err(invalid(format!("status {status}"))),
        }
        if heard.echoed_id != Some(id.as_bytes()) {
            return Err(invalid("X-Request-ID is not that of the question"));
        }
        if heard.body.len() > MAX_CONSULT_ANSWER_BYTES {
            return Err(invalid("too long"));
        }
        let read = |error: InvalidRequest| invalid(error.message());
        let body = json::parse(heard.body).map_err(read)?;
        let decision = body.get("decision").and_then(Value::as_bool);
        let allowed = decision.ok_or_else(|| invalid("no decision"))?;
        let context = body.get("context");
        let member = |key: &str| context.and_then(|context| context.get(key));
        let mut lifetime_s = whole("lifetime_s", member("lifetime_s"))?;
        let (mut owed, mut hold) = (member("obligations").cloned(), member("hold").cloned());
        let mut signed = None;
        if let Some(verify) = verify {
            let text = member("signed").and_then(Value::as_str);
            let text = text.ok_or_else(|| invalid("it is not signed"))?;
            if text.len() > MAX_CONSULT_SIGNED_BYTES {
                return Err(invalid("its signature is too long"));
            }
            let payload = verify(text).map_err(invalid)?;
            let said = check_signed(&payload, question, id, allowed)?;
            // What stands beside it and is not signed could be put there, or left out, by anybody.
            for (key, beside, signed) in [
                ("obligations", &owed, &said.obligations),
                ("hold", &hold, &said.hold),
            ] {
                if beside.is_some() && beside != signed {
                    return Err(invalid(format!("{key} beside what is signed")));
                }
            }
            (lifetime_s, owed, hold) = (said.lifetime_s, said.obligations, said.hold);
            signed = Some(text.to_owned());
        }
        let why = member("reason").and_then(Value::as_str);
        let mut why = why.map(|why| redact::message(why, MAX_MESSAGE_BYTES));
        // Where answers are signed this stands beside what is.
        let is_judged = verify.is_some() || member("not_judged") != Some(&Value::Bool(true));
        if !allowed && !is_judged {
            return Err(ConsultFailure::NotJudged(why.unwrap_or_default()));
        }
        let (obligations, unknown) = obligations(owed.as_ref())?;
        let decision = match (allowed, unknown) {
            (true, Some(unknown)) => {
                why = Some(format!("obligation {unknown} is not known here"));
                Decision::Deny
            }
            (true, None) => Decision::Allow,
            (false, _) if hold == Some(Value::Bool(true)) => Decision::Hold,
            (false, _) => Decision::Deny,
        };
        Ok(Self {
            decision,
            why,
            lifetime_s,
            obligations,
            digest: Sha256Hash::of(heard.body),
            id: id.to_owned(),
            signed,
        })
    }

    /// What it says.
    #[must_use]
    pub fn decision(&self) -> Decision {
        self.decision
    }
}

fn invalid(why: impl Into<String>) -> ConsultFailure {
    ConsultFailure::Invalid(redact::message(&why.into(), MAX_MESSAGE_BYTES))
}

fn whole(key: &str, value: Option<&Value>) -> Result<Option<u64>, ConsultFailure> {
    value
        .map(|value| value.as_u64())
        .map(|number| number.ok_or_else(|| invalid(format!("{key} is not a whole number"))))
        .transpose()
}

/// What a signed payload says beside its decision.
struct Signed {
    lifetime_s: Option<u64>,
    obligations: Option<Value>,
    hold: Option<Value>,
}

/// What is signed, if it answers this question so.
fn check_signed(
    payload: &[u8],
    question: &Question,
    id: &str,
    allowed: bool,
) -> Result<Signed, ConsultFailure> {
    let read = |error: InvalidRequest| invalid(error.message());
    let parsed = json::parse(payload).map_err(read)?;
    let mut fields = Fields::new("what is signed", parsed).map_err(read)?;
    if fields.text("question").map_err(read)? != question.digest.to_string() {
        return Err(invalid("what is signed answers another question"));
    }
    if fields.text("request_id").map_err(read)? != id {
        return Err(invalid("what is signed was asked for by another request"));
    }
    if fields.required("decision").map_err(read)?.as_bool() != Some(allowed) {
        return Err(invalid("what is signed decides otherwise"));
    }
    let signed = Signed {
        lifetime_s: whole("lifetime_s", fields.take("lifetime_s").as_ref())?,
        obligations: fields.take("obligations"),
        hold: fields.take("hold"),
    };
    let known = [
        "question",
        "request_id",
        "decision",
        "lifetime_s",
        "obligations",
        "hold",
    ];
    fields.finish(&known).map_err(read)?;
    Ok(signed)
}

/// The names of obligations, and the first that must be met and is not known here.
fn obligations(given: Option<&Value>) -> Result<(Vec<String>, Option<String>), ConsultFailure> {
    let list = match given {
        None => return Ok((Vec::new(), None)),
        Some(Value::Array(list)) if list.len() <= MAX_CONSULT_OBLIGATIONS => list,
        Some(_) => return Err(invalid("obligations are no list, or too many")),
    };
    let mut names = Vec::with_capacity(list.len());
    let mut unknown = None;
    for one in list {
        let id = one.get("id").and_then(Value::as_str);
        let id = id.ok_or_else(|| invalid("an obligation has no id"))?;
        let name = redact::message(id, MAX_TYPE_BYTES);
        let is_met = KNOWN_OBLIGATIONS.contains(&id);
        let is_optional = one.get("mandatory").and_then(Value::as_bool) == Some(false);
        if !is_met && !is_optional && unknown.is_none() {
            unknown = Some(name.clone());
        }
        names.push(name);
    }
    Ok((names, unknown))
}

/// Takes the answer to one question, once, on any thread that may wait for policy engines.
pub type AnswerDone = Box<dyn FnOnce(Result<UpstreamAnswer, ConsultFailure>) + Send>;

/// Carries questions to decision points, as the shell does it.
pub trait Upstreams: Send + Sync {
    /// Who is configured under this name, if anybody is.
    fn identity(&self, name: &str) -> Option<UpstreamIdentity>;

    /// Asks once, nobody but the identity in the question, and returns at once. `done` is called at the question's deadline at the latest.
    /// `done` is never called before this returns: whoever asks may be on an engine's thread.
    fn ask(&self, question: Question, done: AnswerDone);

    /// An answer that allowed is not to serve again. What was kept of it for the next start must be gone
    /// before this returns: whoever waits for the decision hears of it afterwards. `kept` tells what is to
    /// be kept now; asked while nothing else is written, so that no older state comes after a newer one.
    fn withdrawn(&self, kept: &dyn Fn() -> KeptAnswers);
}

/// What a decision point said to one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptAnswer {
    /// The key of the question, which names the decision point too.
    question: Sha256Hash,
    upstream: String,
    action: String,
    principal: String,
    allow: bool,
    received_unix_ms: u64,
    expires_unix_ms: u64,
    answer: Sha256Hash,
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signed: Option<String>,
}

impl KeptAnswer {
    /// About what it takes in memory and in its file.
    fn bytes(&self) -> usize {
        let texts = [&self.upstream, &self.action, &self.principal, &self.id];
        let optional = [&self.why, &self.signed];
        let optional = optional.into_iter().flatten().map(String::len);
        // Keys, hashes and numbers as JSON; a text may double by escaping.
        448 + 2 * (texts.map(String::len).iter().sum::<usize>() + optional.sum::<usize>())
    }

    /// An answer from ahead of the clock is none: who knows how far the clock went back.
    fn is_live(&self, now_unix_ms: u64) -> bool {
        (self.received_unix_ms..self.expires_unix_ms).contains(&now_unix_ms)
    }
}

/// The answers of one bundle, as they are kept for the next start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptAnswers {
    bundle: Option<Under>,
    answers: Vec<KeptAnswer>,
}

/// Content and epoch of the bundle under which a decision point was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Under {
    hash: String,
    epoch: u64,
}

impl From<&BundleInfo> for Under {
    fn from(bundle: &BundleInfo) -> Self {
        Self {
            hash: bundle.hash.clone(),
            epoch: bundle.epoch,
        }
    }
}

/// The last answers to questions, bounded in number and bytes (INV-07). Who comes too much displaces what
/// expires first; a principal that has its share displaces its own.
#[derive(Debug, Default)]
struct Answers {
    under: Option<Under>,
    by_question: BTreeMap<Sha256Hash, KeptAnswer>,
    bytes: usize,
}

impl Answers {
    fn insert(&mut self, answer: KeptAnswer) {
        self.remove(&answer.question);
        let is_own = |kept: &KeptAnswer| kept.principal == answer.principal;
        let own = self.by_question.values().filter(|kept| is_own(kept));
        let mut own_bytes: usize = own.map(KeptAnswer::bytes).sum();
        while own_bytes + answer.bytes() > MAX_CONSULT_CACHE_BYTES_PER_PRINCIPAL {
            let Some(gone) = self.remove_first(is_own) else {
                break;
            };
            own_bytes -= gone.bytes();
        }
        while self.by_question.len() >= MAX_CONSULT_CACHED
            || self.bytes + answer.bytes() > MAX_CONSULT_CACHE_BYTES
        {
            if self.remove_first(|_| true).is_none() {
                break;
            }
        }
        self.bytes += answer.bytes();
        self.by_question.insert(answer.question, answer);
    }

    fn remove(&mut self, question: &Sha256Hash) -> Option<KeptAnswer> {
        let removed = self.by_question.remove(question)?;
        self.bytes -= removed.bytes();
        Some(removed)
    }

    fn remove_first(&mut self, of: impl Fn(&KeptAnswer) -> bool) -> Option<KeptAnswer> {
        let candidates = self.by_question.values().filter(|kept| of(kept));
        let first = candidates.min_by_key(|kept| (kept.expires_unix_ms, kept.question));
        let question = first.map(|kept| kept.question)?;
        self.remove(&question)
    }

    /// Drops what does not pass; whether anything was dropped.
    fn retain(&mut self, keep: impl Fn(&KeptAnswer) -> bool) -> bool {
        let before = self.by_question.len();
        self.by_question.retain(|_, kept| keep(kept));
        self.bytes = self.by_question.values().map(KeptAnswer::bytes).sum();
        self.by_question.len() != before
    }
}

/// What is asked, of whom and for whom.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// The key of the question.
    pub(crate) question: Sha256Hash,
    /// The key under which its answers are kept. Another one than that of a question that came through
    /// other nodes: of its answers nothing is kept.
    pub(crate) kept_key: Sha256Hash,
    pub(crate) terms: ConsultTerms,
    pub(crate) under: Under,
    pub(crate) action: String,
    pub(crate) principal: String,
    pub(crate) deadline: Duration,
}

/// A question on its way and who waits for the answer.
struct Flight<W> {
    number: u64,
    asked: Asked,
    call: Call,
    overdue_at: Duration,
    /// With the caller that each one is for.
    waiting: Vec<(Arc<str>, W)>,
}

struct Upstream {
    breaker: Breaker,
    under_way: usize,
    counts: BTreeMap<(&'static str, &'static str), u64>,
    answered_unix_ms: Option<u64>,
    failed_unix_ms: Option<u64>,
    failure: Option<String>,
}

/// What became of a question that somebody came with.
#[derive(Debug)]
pub(crate) enum Begun<W> {
    /// It has to be sent, under this number.
    Send(u64),
    /// It is on its way.
    Joined,
    /// It will not be sent.
    Failed(ConsultFailure, W),
}

/// What the end of a question brings.
#[derive(Debug)]
pub(crate) struct Settled<W> {
    pub(crate) waiting: Vec<W>,
    /// An answer that allowed was displaced by one that does not, or not for as long.
    pub(crate) is_withdrawn: bool,
}

/// Questions, upstreams and answers of one node.
pub(crate) struct Consults<W> {
    flights: BTreeMap<Sha256Hash, Flight<W>>,
    upstreams: BTreeMap<String, Upstream>,
    answers: Answers,
    numbers: u64,
    waiting: usize,
    is_dirty: bool,
}

impl<W> Default for Consults<W> {
    fn default() -> Self {
        Self {
            flights: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            answers: Answers::default(),
            numbers: 0,
            waiting: 0,
            is_dirty: false,
        }
    }
}

impl<W> Consults<W> {
    /// Somebody has a question. At most one of equal ones is on its way.
    pub(crate) fn begin(
        &mut self,
        asked: Asked,
        holder: &Arc<str>,
        waiter: W,
        now: Duration,
    ) -> Begun<W> {
        let waiting = self.flights.values().flat_map(|flight| &flight.waiting);
        let held = waiting.filter(|(of, _)| of == holder).count();
        // Whoever joins holds an action too, so the share of a caller counts all that wait.
        if self.waiting >= MAX_CONSULT_WAITING || held >= MAX_CONSULTS_PER_CALLER {
            return Begun::Failed(ConsultFailure::Busy, waiter);
        }
        if let Some(flight) = self.flights.get_mut(&asked.question) {
            flight.waiting.push((Arc::clone(holder), waiter));
            self.waiting += 1;
            return Begun::Joined;
        }
        let Some(upstream) = self.upstream(&asked.terms.upstream) else {
            return Begun::Failed(ConsultFailure::Busy, waiter);
        };
        // Before the breaker: its one probe is not to be lost for want of a place.
        if upstream.under_way >= MAX_CONSULTS_PER_UPSTREAM {
            return Begun::Failed(ConsultFailure::Busy, waiter);
        }
        let call = match upstream.breaker.admit(now) {
            Ok(call) => call,
            Err(open) => {
                return Begun::Failed(ConsultFailure::Unreachable(open.to_string()), waiter);
            }
        };
        upstream.under_way += 1;
        self.numbers += 1;
        self.waiting += 1;
        let flight = Flight {
            number: self.numbers,
            call,
            overdue_at: now
                .saturating_add(asked.deadline)
                .saturating_add(CONSULT_GRACE),
            waiting: vec![(Arc::clone(holder), waiter)],
            asked,
        };
        self.flights.insert(flight.asked.question, flight);
        Begun::Send(self.numbers)
    }

    /// The state of an upstream; none where there are too many already.
    fn upstream(&mut self, name: &str) -> Option<&mut Upstream> {
        if !self.upstreams.contains_key(name) {
            if self.upstreams.len() >= tidelock_policy::limits::CLASSES_MAX {
                // Names come from bundles: those of earlier ones go.
                self.upstreams.retain(|_, upstream| upstream.under_way > 0);
            }
            let breaker = Breaker::new(CONSULT_BREAKER).ok()?;
            self.upstreams.insert(
                name.to_owned(),
                Upstream {
                    breaker,
                    under_way: 0,
                    counts: BTreeMap::new(),
                    answered_unix_ms: None,
                    failed_unix_ms: None,
                    failure: None,
                },
            );
        }
        self.upstreams.get_mut(name)
    }

    /// A question has its answer, or will have none. Nothing comes of one that is not on its way any more:
    /// what was decided without it stays decided.
    pub(crate) fn settle(
        &mut self,
        (question, number): (Sha256Hash, u64),
        said: &Result<UpstreamAnswer, ConsultFailure>,
        (now, now_unix_ms): (Duration, u64),
        in_force: Option<&Under>,
    ) -> Settled<W> {
        self.observe(in_force);
        let is_it = |flight: &Flight<W>| flight.number == number;
        if !self.flights.get(&question).is_some_and(is_it) {
            return Settled {
                waiting: Vec::new(),
                is_withdrawn: false,
            };
        }
        let Some(flight) = self.flights.remove(&question) else {
            return Settled {
                waiting: Vec::new(),
                is_withdrawn: false,
            };
        };
        self.waiting -= flight.waiting.len();
        if let Some(upstream) = self.upstreams.get_mut(&flight.asked.terms.upstream) {
            upstream.under_way -= 1;
            match said {
                // A class that waits for a moment only says nothing about the others. A probe of it that ends
                // so is a lost one.
                Err(ConsultFailure::Timeout)
                    if flight.asked.deadline < CONSULT_BREAKER_TIMEOUT_MIN => {}
                Err(failure) if failure.is_absence() => {
                    upstream.breaker.on_failure(flight.call, now);
                }
                _ => upstream.breaker.on_success(flight.call),
            }
            match said {
                Ok(_) => upstream.answered_unix_ms = Some(now_unix_ms),
                Err(failure) => {
                    upstream.failed_unix_ms = Some(now_unix_ms);
                    upstream.failure = Some(failure.to_string());
                }
            }
        }
        let is_withdrawn = match said {
            Ok(answer) => self.remember(&flight.asked, answer, now_unix_ms),
            Err(_) => false,
        };
        Settled {
            waiting: flight.waiting.into_iter().map(|(_, w)| w).collect(),
            is_withdrawn,
        }
    }

    /// Keeps an answer, or what the terms leave of it; whether an earlier allow lost time by it. One to a
    /// question that came through other nodes can take an allow back, and nothing else.
    fn remember(&mut self, asked: &Asked, answer: &UpstreamAnswer, now_unix_ms: u64) -> bool {
        let given_s = match answer.decision {
            Decision::Allow => asked.terms.allow_lifetime_s,
            Decision::Deny => asked.terms.deny_lifetime_s,
            Decision::Hold => 0,
        };
        let lifetime_s = given_s.min(answer.lifetime_s.unwrap_or(u64::MAX));
        // A bundle that does not decide any more keeps nothing.
        let is_in_force = self.answers.under.as_ref() == Some(&asked.under);
        let expires_unix_ms = now_unix_ms.saturating_add(lifetime_s.saturating_mul(1000));
        let is_live = lifetime_s > 0 && is_in_force;
        // What lies on the disk would serve longer than what was said last.
        let serves_until = match is_live && answer.decision == Decision::Allow {
            true => expires_unix_ms,
            false => 0,
        };
        let before = self.answers.by_question.get(&asked.kept_key);
        let before = before.filter(|kept| kept.allow);
        let allowed_until = before.map(|kept| kept.expires_unix_ms);
        let is_withdrawn = allowed_until.is_some_and(|until| serves_until < until);
        let is_relayed = asked.kept_key != asked.question;
        if is_relayed && !is_withdrawn {
            return false;
        }
        self.answers.remove(&asked.kept_key);
        self.is_dirty |= allowed_until.is_some();
        if is_live && !is_relayed {
            self.answers.insert(KeptAnswer {
                question: asked.kept_key,
                upstream: asked.terms.upstream.clone(),
                action: asked.action.clone(),
                principal: asked.principal.clone(),
                allow: answer.decision == Decision::Allow,
                received_unix_ms: now_unix_ms,
                expires_unix_ms,
                answer: answer.digest,
                id: answer.id.clone(),
                why: answer.why.clone(),
                signed: answer.signed.clone(),
            });
            self.is_dirty = true;
        }
        is_withdrawn
    }

    /// Questions that should have come back long ago: whoever carries them has lost them.
    pub(crate) fn take_overdue(&mut self, now: Duration, now_unix_ms: u64) -> Vec<W> {
        let overdue = self.flights.values().filter(|f| f.overdue_at <= now);
        let overdue: Vec<_> = overdue.map(|f| (f.asked.question, f.number)).collect();
        let under = self.answers.under.clone();
        let settle = |at| {
            let lost = Err(ConsultFailure::Timeout);
            self.settle(at, &lost, (now, now_unix_ms), under.as_ref())
                .waiting
        };
        overdue.into_iter().flat_map(settle).collect()
    }

    /// The last answer to a question of this key ([`Question::kept_key`]), if it may serve. Where answers are signed, an allow that is
    /// not does not.
    pub(crate) fn kept(
        &self,
        (question, signs): (&Sha256Hash, bool),
        under: &Under,
        now_unix_ms: u64,
    ) -> Option<KeptAnswer> {
        let kept = self.answers.by_question.get(question)?;
        let is_of_it = self.answers.under.as_ref() == Some(under);
        let counts = !signs || !kept.allow || kept.signed.is_some();
        (is_of_it && counts && kept.is_live(now_unix_ms)).then(|| kept.clone())
    }

    /// Drops the answers of upstreams of these names.
    pub(crate) fn forget(&mut self, upstreams: &BTreeSet<String>) {
        self.is_dirty |= self
            .answers
            .retain(|kept| !upstreams.contains(&kept.upstream));
    }

    /// Answers die with the bundle under which they were given.
    pub(crate) fn observe(&mut self, in_force: Option<&Under>) {
        if self.answers.under.as_ref() != in_force {
            self.is_dirty |= self.answers.retain(|_| false);
            self.answers.under = in_force.cloned();
        }
    }

    /// Drops what has expired, and what is of actions that posture `closed` denies.
    pub(crate) fn sweep(&mut self, now_unix_ms: u64, is_closed: impl Fn(&str) -> bool) {
        self.is_dirty |= self
            .answers
            .retain(|kept| now_unix_ms < kept.expires_unix_ms && !is_closed(&kept.action));
    }

    /// Takes what an earlier run kept. It serves under the bundle of then only.
    pub(crate) fn restore(&mut self, kept: KeptAnswers) {
        self.answers = Answers {
            under: kept.bundle,
            ..Answers::default()
        };
        for answer in kept.answers {
            self.answers.insert(answer);
        }
    }

    /// What is to be kept for the next start.
    pub(crate) fn to_keep(&self) -> KeptAnswers {
        KeptAnswers {
            bundle: self.answers.under.clone(),
            answers: self.answers.by_question.values().cloned().collect(),
        }
    }

    /// The same, if it has changed since this was asked.
    pub(crate) fn changed(&mut self) -> Option<KeptAnswers> {
        std::mem::take(&mut self.is_dirty).then(|| self.to_keep())
    }

    /// What was to be kept could not be.
    pub(crate) fn not_kept(&mut self) {
        self.is_dirty = true;
    }

    /// Forgets what was away.
    pub(crate) fn close_breakers(&mut self) {
        for upstream in self.upstreams.values_mut() {
            if let Ok(breaker) = Breaker::new(CONSULT_BREAKER) {
                upstream.breaker = breaker;
            }
        }
    }

    /// Counts what one decision came to.
    pub(crate) fn count(&mut self, note: &ConsultNote) {
        if let Some(upstream) = self.upstream(&note.upstream.clone()) {
            let counter = upstream.counts.entry((note.outcome, note.fallback));
            *counter.or_default() += 1;
        }
    }

    pub(crate) fn stats(&self, now: Duration) -> ConsultStats {
        let upstreams = self.upstreams.iter().map(|(name, upstream)| UpstreamStats {
            name: name.clone(),
            breaker: match upstream.breaker.state(now) {
                BreakerState::Closed => "closed",
                BreakerState::Open => "open",
                BreakerState::HalfOpen => "half_open",
            },
            under_way: upstream.under_way,
            answered_unix_ms: upstream.answered_unix_ms,
            failed_unix_ms: upstream.failed_unix_ms,
            failure: upstream.failure.clone(),
            decisions: upstream
                .counts
                .iter()
                .map(|((outcome, fallback), count)| ConsultCount {
                    outcome,
                    fallback,
                    count: *count,
                })
                .collect(),
        });
        ConsultStats {
            upstreams: upstreams.collect(),
            waiting: self.waiting,
            kept: self.answers.by_question.len(),
            kept_bytes: self.answers.bytes,
        }
    }
}

/// What is known of decision points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsultStats {
    /// Those that were asked since the start, by name.
    pub upstreams: Vec<UpstreamStats>,
    /// Decisions that wait for an answer.
    pub waiting: usize,
    /// Answers kept.
    pub kept: usize,
    /// What they take, about.
    pub kept_bytes: usize,
}

/// What is known of one decision point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UpstreamStats {
    /// Its name.
    pub name: String,
    /// `closed`: it is asked; `open`: it is not, for a while; `half_open`: one question may try.
    pub breaker: &'static str,
    /// Questions on their way.
    pub under_way: usize,
    /// When it answered last.
    pub answered_unix_ms: Option<u64>,
    /// When it last did not.
    pub failed_unix_ms: Option<u64>,
    /// And why.
    pub failure: Option<String>,
    /// What decisions came to.
    pub decisions: Vec<ConsultCount>,
}

/// Decisions of one outcome and fallback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ConsultCount {
    /// As in records.
    pub outcome: &'static str,
    /// As in records.
    pub fallback: &'static str,
    /// How many.
    pub count: u64,
}

/// What a decision point had to do with a decision: an input of it, as its record has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ConsultNote {
    upstream: String,
    question: Sha256Hash,
    /// The nodes that the question says it came through.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    via: Vec<String>,
    /// `allow`, `deny` or `hold`, as it said now; else the word of the failure.
    outcome: &'static str,
    /// What stood in for its answer: `none`, `cached`, `held` or `denied`.
    fallback: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Sha256Hash>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answered_unix_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_unix_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    obligations: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signed: Option<String>,
}

impl ConsultNote {
    /// Whether something stood in for the decision point's answer.
    pub(crate) fn is_fallback(&self) -> bool {
        self.fallback != "none"
    }

    /// By what summarised denials are counted: who was asked, what was said, what stood in for it.
    pub(crate) fn counted(&self) -> (&str, &'static str, &'static str) {
        (&self.upstream, self.outcome, self.fallback)
    }

    /// What the answer to the caller tells of it. Of a failure it is the word only: the text may name
    /// addresses and files, which are for the operator.
    pub(crate) fn told(&self) -> Consulted {
        // Every failure has a fallback, if only the deny.
        let is_said = !self.is_fallback();
        Consulted {
            upstream: self.upstream.clone(),
            outcome: self.outcome,
            fallback: self.fallback,
            why: self.why.clone().filter(|_| is_said),
        }
    }

    /// What a record of the short form has of it.
    pub(crate) fn short(&self) -> Value {
        let mut short = json!({"outcome": self.outcome, "fallback": self.fallback});
        if let (Some(answer), Some(fields)) = (&self.answer, short.as_object_mut()) {
            fields.insert("answer".to_owned(), answer.to_string().into());
        }
        short
    }
}

/// What an answer tells of the decision point that its class is referred to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Consulted {
    /// Which one.
    pub upstream: String,
    /// What it said, or why it said nothing.
    pub outcome: &'static str,
    /// What stood in for its answer: `none`, `cached`, `held` or `denied`.
    pub fallback: &'static str,
    /// The reason that it gave, untrusted. Nothing where it gave no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What a local permit comes to with what was heard, and with the last answer that is kept. The one
/// place where a decision point's word has an effect; the permit is the strongest that it can leave. A
/// question that came through other nodes is denied in the dark, for whoever asks can say that it did.
pub(crate) fn weigh(
    terms: &ConsultTerms,
    (question, via): (Sha256Hash, &[String]),
    said: &Result<UpstreamAnswer, ConsultFailure>,
    kept: Option<KeptAnswer>,
    now_unix_ms: u64,
) -> (Reason, ConsultNote) {
    let mut note = ConsultNote {
        upstream: terms.upstream.clone(),
        question,
        via: via
            .iter()
            .map(|name| redact::message(name, MAX_TYPE_BYTES))
            .collect(),
        outcome: "allow",
        fallback: "none",
        answer: None,
        id: None,
        answered_unix_ms: None,
        expires_unix_ms: None,
        why: None,
        obligations: Vec::new(),
        signed: None,
    };
    let is_relayed = !via.is_empty();
    let kept = kept.filter(|_| !is_relayed);
    let failure = match said {
        Ok(answer) => {
            note.outcome = answer.decision.as_str();
            note.answer = Some(answer.digest);
            note.id = Some(answer.id.clone());
            let kept = kept.filter(|kept| kept.answer == answer.digest);
            let received = kept.as_ref().map(|kept| kept.received_unix_ms);
            note.answered_unix_ms = Some(received.unwrap_or(now_unix_ms));
            note.expires_unix_ms = kept.map(|kept| kept.expires_unix_ms);
            note.why.clone_from(&answer.why);
            note.obligations.clone_from(&answer.obligations);
            note.signed.clone_from(&answer.signed);
            return (said_by(answer.decision), note);
        }
        Err(failure) => failure,
    };
    note.outcome = failure.word();
    note.why = Some(redact::message(&failure.to_string(), MAX_MESSAGE_BYTES));
    let serves = |kept: &KeptAnswer| {
        failure.is_absence() && (!kept.allow || terms.when_unreachable == WhenUnreachable::Cached)
    };
    if let Some(kept) = kept.filter(serves) {
        note.fallback = "cached";
        note.answer = Some(kept.answer);
        note.id = Some(kept.id);
        note.answered_unix_ms = Some(kept.received_unix_ms);
        note.expires_unix_ms = Some(kept.expires_unix_ms);
        note.signed = kept.signed;
        let decision = match kept.allow {
            true => Decision::Allow,
            false => Decision::Deny,
        };
        return (said_by(decision), note);
    }
    let may_hold = terms.when_unreachable == WhenUnreachable::Hold && !is_relayed;
    if failure.is_absence() && may_hold {
        note.fallback = "held";
        return (Reason::ConsultHeld, note);
    }
    note.fallback = "denied";
    (failure.reason(), note)
}

fn said_by(decision: Decision) -> Reason {
    match decision {
        Decision::Allow => Reason::PolicyAllow,
        Decision::Deny => Reason::ConsultDenied,
        Decision::Hold => Reason::ConsultHeld,
    }
}

#[cfg(test)]
mod tests;
