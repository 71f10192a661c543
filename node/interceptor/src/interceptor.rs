//! The pipeline: parse, quota, posture, engine, redaction, record, permit.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use serde_json::{Map, Value};
use tidelock_policy::{ActivePolicy, ConsultTerms, Evaluation, PolicyRequest, Posture};
use tidelock_quota::{Rate, RateError, TokenBuckets};
use tidelock_segments::{AppendError, NodeId, RecordClass, Sha256Hash};

use crate::{
    action::{Action, InvalidRequest, canonical_bytes},
    answer::{Answer, BundleInfo, Done, Mode, Outcome},
    authzen::{self, Search},
    caller::Caller,
    clock::{BucketClock, Clock},
    consult::{
        Asked, Begun, ConsultFailure, ConsultNote, ConsultStats, Consults, KeptAnswers, Question,
        Under, UpstreamAnswer, Upstreams, goes_round, weigh,
    },
    engines::Engines,
    envoy, explain,
    limits::{
        APPEND_TIMEOUT, CONSULT_SWEEP, CONSULT_WAIT, DEFAULT_DENIAL_BYTES, ENGINE_BUDGET,
        ENGINE_WAIT, ENGINE_WORKERS, MAX_PRINCIPALS, MAX_RECORD_BYTES, SUMMARY_WINDOW,
    },
    pending::{Completed, Draft, Queue, Slot, Stage},
    probe::{self, ProbeFault},
    quotas::{BucketStats, QuotaRates, Quotas},
    reason::{Decision, Reason},
    record::{self, Findings, Judgement, Request},
    recorder::{AppendDone, Recorder},
    report::{Earlier, For, History, Report, ReportDone, ReportRefused, Reported, Reports},
    search::{self, Found, Judged, SearchDone, SearchRefused},
    stats::{Counters, Seldom, Stats, add},
    summary::{Summary, Window},
};

mod judging;

use self::judging::{EngineFault, JUDGED_AT_MOST, Judging, Step};

/// Gives the policy that decides now, or none. Read once a request.
pub type PolicySource = Arc<dyn Fn() -> Option<Arc<ActivePolicy>> + Send + Sync>;

/// One request as its door hands it over.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// Bytes in the native form.
    Native(&'a [u8]),
    /// An evaluation of AuthZEN.
    Evaluation(&'a authzen::Evaluation),
    /// A request that a proxy holds back.
    Check(&'a envoy::Check),
}

impl Ask<'_> {
    fn action(self, caller: &Caller) -> Result<Action, InvalidRequest> {
        match self {
            Self::Native(bytes) => Action::parse(bytes, caller),
            Self::Evaluation(evaluation) => Action::from_parts(evaluation.parts.clone()?, caller),
            Self::Check(check) => Action::from_parts(check.parts.clone()?, caller),
        }
    }

    /// The nodes that it has come through.
    fn via(self) -> Vec<String> {
        match self {
            Self::Evaluation(evaluation) => evaluation.via.clone(),
            Self::Native(_) | Self::Check(_) => Vec::new(),
        }
    }

    fn body_bytes(self) -> usize {
        match self {
            Self::Native(bytes) => bytes.len(),
            Self::Evaluation(evaluation) => evaluation.body_bytes,
            Self::Check(check) => check.body_bytes,
        }
    }
}

/// Everything about the interceptor that a site may set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterceptorConfig {
    /// This node, as records name it.
    pub node_id: NodeId,
    /// Quotas of actions.
    pub quotas: QuotaRates,
    /// Record bytes of one principal's denials before they are summarised.
    pub denial_bytes: Rate,
    /// CPU time of the policy engine for one decision.
    pub engine_budget: Duration,
    /// How long a request waits for an engine that does not get to its CPU time.
    pub engine_wait: Duration,
    /// How long a request waits for its record.
    pub append_timeout: Duration,
    /// Length of a summary window.
    pub summary_window: Duration,
}

impl InterceptorConfig {
    /// The defaults of `limits.rs` for this node.
    #[must_use]
    pub fn new(node_id: NodeId) -> Self {
        Self {
            node_id,
            quotas: QuotaRates::default(),
            denial_bytes: DEFAULT_DENIAL_BYTES,
            engine_budget: ENGINE_BUDGET,
            engine_wait: ENGINE_WAIT,
            append_timeout: APPEND_TIMEOUT,
            summary_window: SUMMARY_WINDOW,
        }
    }
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterceptorConfigError {
    /// A rate of actions.
    #[error("quota of actions: {0}")]
    Actions(RateError),
    /// The rate of record bytes.
    #[error("denial bytes per principal: {0}")]
    DenialBytes(RateError),
    /// A budget of denial bytes that the biggest record does not fit.
    #[error("denial bytes burst {burst} is below one record of {MAX_RECORD_BYTES} bytes")]
    DenialBurst {
        /// What was asked for.
        burst: u32,
    },
    /// A duration of nothing.
    #[error("{what} is 0: nothing could ever be allowed")]
    ZeroDuration {
        /// Which one.
        what: &'static str,
    },
}

/// Whose denials are counted: the caller's own type and id.
type DenialKey = (String, String);

/// Decides, records, and is the only maker of permits. Cheap to clone; clones are the same one.
#[derive(Clone)]
pub struct Interceptor {
    inner: Arc<Inner>,
}

struct Inner {
    config: InterceptorConfig,
    clock: Arc<dyn Clock>,
    policy: PolicySource,
    recorder: Arc<dyn Recorder>,
    quotas: Quotas,
    denial_bytes: TokenBuckets<DenialKey, BucketClock>,
    engines: Engines,
    floor: AtomicU8,
    queue: Mutex<Queue>,
    summary: Mutex<Summary>,
    reports: Mutex<Reports>,
    counters: Counters,
    told_panicked: Seldom,
    told_abandoned: Seldom,
    /// What the log of the process is to be told of engines, by who ticks: no engine thread waits for it.
    engine_faults: Mutex<Vec<EngineFault>>,
    upstreams: OnceLock<Arc<dyn Upstreams>>,
    consults: Mutex<Consults<Box<Referred>>>,
    /// Monotonic milliseconds from which kept answers are looked at again.
    sweep_from_ms: AtomicU64,
}

/// A local permit that waits for the word of a decision point.
struct Referred {
    judgement: Judgement,
    question: Question,
    terms: ConsultTerms,
    waiter: Waiter,
}

/// Who waits for it.
struct Waiter {
    caller: Caller,
    done: Done,
    stage: Arc<Stage>,
    /// When it is too late to ask a decision point once more.
    until: Duration,
    rounds: usize,
    /// The nodes that the action has come through to this one.
    via: Vec<String>,
}

impl fmt::Debug for Interceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interceptor")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl Interceptor {
    /// An interceptor over these parts.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(
        config: InterceptorConfig,
        clock: Arc<dyn Clock>,
        policy: PolicySource,
        recorder: Arc<dyn Recorder>,
    ) -> Result<Self, InterceptorConfigError> {
        for (what, duration) in [
            ("engine budget", config.engine_budget),
            ("engine wait", config.engine_wait),
            ("append timeout", config.append_timeout),
            ("summary window", config.summary_window),
        ] {
            if duration.is_zero() {
                return Err(InterceptorConfigError::ZeroDuration { what });
            }
        }
        if (config.denial_bytes.burst as usize) < MAX_RECORD_BYTES {
            let burst = config.denial_bytes.burst;
            return Err(InterceptorConfigError::DenialBurst { burst });
        }
        let bucket_clock = BucketClock(Arc::clone(&clock));
        let quotas = Quotas::new(&config.quotas).map_err(InterceptorConfigError::Actions)?;
        let denial_bytes = TokenBuckets::new(config.denial_bytes, MAX_PRINCIPALS, bucket_clock)
            .map_err(InterceptorConfigError::DenialBytes)?;
        let summary = Mutex::new(Summary::new(clock.unix_ms()));
        let engines = Engines::new(Arc::clone(&clock), config.engine_budget, config.engine_wait);
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                clock,
                policy,
                recorder,
                quotas,
                denial_bytes,
                engines,
                floor: AtomicU8::new(0),
                queue: Mutex::new(Queue::default()),
                summary,
                reports: Mutex::default(),
                counters: Counters::default(),
                told_panicked: Seldom::default(),
                told_abandoned: Seldom::default(),
                engine_faults: Mutex::default(),
                upstreams: OnceLock::new(),
                consults: Mutex::default(),
                sweep_from_ms: AtomicU64::new(0),
            }),
        })
    }

    /// Decides one request of an authenticated caller.
    ///
    /// Returns without having waited for an engine; an explanation waits for it here. `done` is called
    /// exactly once, on this thread, an engine's or the recorder's, and must not block: with an allow only
    /// after its record is durable. The wait for the record is bounded as long as [`Interceptor::tick`]
    /// is called; it can be ended earlier through the returned [`Pending`].
    pub fn decide(&self, bytes: &[u8], caller: &Caller, mode: Mode, done: Done) -> Pending {
        self.decide_ask(Ask::Native(bytes), caller, mode, done)
    }

    /// [`Interceptor::decide`] for every form of request.
    pub fn decide_ask(&self, ask: Ask<'_>, caller: &Caller, mode: Mode, done: Done) -> Pending {
        let stage = Inner::start(&self.inner, ask, caller, mode, done);
        Pending {
            inner: Arc::clone(&self.inner),
            stage,
        }
    }

    /// Decides one request and waits for the outcome: for the engines, [`CONSULT_WAIT`] where a decision
    /// point is asked, and at most twice the append timeout for its record.
    pub fn decide_wait(&self, bytes: &[u8], caller: &Caller, mode: Mode) -> Outcome {
        let (sender, receiver) = mpsc::sync_channel(1);
        let pending = self.decide(
            bytes,
            caller,
            mode,
            // The receiver lives until the outcome is there.
            Box::new(move |outcome| drop(sender.send(outcome))),
        );
        let config = &self.inner.config;
        // For a worker, for the engine and for a decision point, each of which ends by itself.
        let engines = config.engine_wait.saturating_mul(2);
        let limit = engines.saturating_add(CONSULT_WAIT);
        // Real time, as the engines' limits are, whatever clock the rest runs on.
        let begun = Instant::now();
        let mut outcome = receiver.recv_timeout(config.append_timeout);
        while matches!(outcome, Err(RecvTimeoutError::Timeout))
            && pending.stage.is_before_record()
            && begun.elapsed() < limit
        {
            outcome = receiver.recv_timeout(config.append_timeout);
        }
        let outcome = outcome
            // The record may have been handed over a moment ago.
            .or_else(|_| receiver.recv_timeout(config.append_timeout))
            .or_else(|_| {
                pending.give_up();
                receiver.recv()
            });
        outcome.unwrap_or_else(|_| {
            let inner = &self.inner;
            let reason = Reason::AuditUnavailable;
            Outcome {
                answer: inner.blank_answer(reason, Posture::Closed),
                permit: None,
            }
        })
    }

    /// Judges one page of a search, or records why it could not be read. Each candidate is judged like an action, quotas included; no
    /// permit comes of any, and nothing is answered before the search is recorded or counted.
    ///
    /// `done` is called exactly once, on this thread or on the recorder's.
    pub fn search(
        &self,
        search: Result<&Search, InvalidRequest>,
        caller: &Caller,
        done: SearchDone,
    ) {
        Inner::search(&self.inner, search, caller, done);
    }

    /// Takes a caller's word on what became of an action that was allowed to it, once. `history` gives
    /// the last records of earlier runs; it is asked until it once answers, a bounded number of times.
    ///
    /// `done` is called exactly once, on this thread or on the recorder's.
    pub fn report(&self, bytes: &[u8], caller: &Caller, history: History<'_>, done: ReportDone) {
        Inner::report(&self.inner, bytes, caller, history, done);
    }

    /// Ends waits that took too long and writes summary windows that are due. To be called a few
    /// times within the append timeout, for instance every 50 ms; without it nothing is allowed
    /// that should not be, but callers of a stalled recorder wait with it.
    pub fn tick(&self) {
        let now = self.inner.clock.now();
        loop {
            // The guard must be gone when the caller is told.
            let overdue = self.inner.queue().pop_overdue(now);
            let Some(slot) = overdue else { break };
            Inner::finish(&self.inner, slot.give_up());
        }
        for fault in std::mem::take(&mut *self.inner.engine_faults()) {
            fault.log();
        }
        self.inner.quotas.evict_idle(now);
        Inner::tick_consults(&self.inner, now);
        Inner::flush(&self.inner, self.inner.config.summary_window);
    }

    /// Other quotas from now on; what is owed stays owed.
    ///
    /// # Errors
    /// A rate of nothing; then nothing has changed.
    pub fn set_quotas(&self, rates: &QuotaRates) -> Result<(), InterceptorConfigError> {
        let now = self.inner.clock.now();
        let set = self.inner.quotas.set(rates, now);
        set.map_err(InterceptorConfigError::Actions)
    }

    /// What each kind of quota has done since the start, and holds.
    #[must_use]
    pub fn quota_stats(&self) -> [BucketStats; 6] {
        self.inner.quotas.stats()
    }

    /// Writes the open summary window now, for a shutdown.
    pub fn flush_summary(&self) {
        Inner::flush(&self.inner, Duration::ZERO);
    }

    /// Names who carries questions to decision points. Until then every action that is referred to one is
    /// denied. Only the first call counts.
    pub fn set_upstreams(&self, upstreams: Arc<dyn Upstreams>) {
        // A second one would leave questions of the first one on their way.
        let _ = self.inner.upstreams.set(upstreams);
    }

    /// Lets decision points be asked that were away: their operator has looked after them.
    pub fn try_upstreams_again(&self) {
        self.inner.consults().close_breakers();
    }

    /// What is known of decision points.
    #[must_use]
    pub fn consult_stats(&self) -> ConsultStats {
        self.inner.consults().stats(self.inner.clock.now())
    }

    /// Takes the answers of decision points that an earlier run kept. They serve under the bundle and for
    /// the lifetime of then.
    pub fn restore_answers(&self, kept: KeptAnswers) {
        self.inner.consults().restore(kept);
    }

    /// The answers of decision points that are to be kept for the next start, if they have changed since
    /// this was asked last.
    #[must_use]
    pub fn changed_answers(&self) -> Option<KeptAnswers> {
        self.inner.consults().changed()
    }

    /// Drops the answers of upstreams of these names: others answer to them now, or nobody.
    pub fn forget_answers_of(&self, upstreams: &BTreeSet<String>) {
        self.inner.consults().forget(upstreams);
    }

    /// Says that what [`Interceptor::changed_answers`] gave could not be kept.
    pub fn answers_not_kept(&self) {
        self.inner.consults().not_kept();
    }

    /// Makes the posture at least this for every action, whatever the bundle's age: for a suspect
    /// clock, or a disk that is nearly full. [`Posture::Normal`] lifts it again.
    pub fn set_posture_floor(&self, floor: Posture) {
        self.inner
            .floor
            .store(posture_rank(floor), Ordering::Release);
        if floor == Posture::Closed {
            // Ruling 17: what is closed has no answers when it opens again.
            self.inner
                .consults()
                .sweep(self.inner.clock.unix_ms(), |_| true);
        }
    }

    /// The posture that [`Interceptor::set_posture_floor`] set.
    #[must_use]
    pub fn posture_floor(&self) -> Posture {
        self.inner.floor()
    }

    /// The node's posture: the worst of all action classes, and `closed` without a policy.
    #[must_use]
    pub fn posture(&self) -> Posture {
        self.inner.overall_posture((self.inner.policy)().as_deref())
    }

    /// Asks the engine of a policy on the threads and under the deadline of callers. Nothing comes of it: no
    /// quota is spent, nothing is recorded, and no permit is made.
    ///
    /// # Errors
    /// [`ProbeFault`]: a caller would have been denied.
    pub fn probe(
        &self,
        policy: &ActivePolicy,
        request: PolicyRequest,
    ) -> Result<Evaluation, ProbeFault> {
        probe::ask(&self.inner.engines, policy, request)
    }

    /// Records something that happened to the node. `kind` is the record's type, in snake case.
    pub fn record_event(&self, kind: &str, detail: &Value) {
        let inner = Arc::clone(&self.inner);
        self.record_event_then(
            kind,
            detail,
            Box::new(move |result| {
                if result.is_err() {
                    add(&inner.counters.records_lost, 1);
                }
            }),
        );
    }

    /// Records an event and tells when it is durable, for what must not happen unrecorded.
    pub fn record_event_then(&self, kind: &str, detail: &Value, done: AppendDone) {
        let inner = &self.inner;
        let record = record::event(inner.node(), inner.clock.unix_ms(), kind, detail);
        inner.submit(RecordClass::State, &record, done);
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        // Read first: whoever is past the engine waits for a record by then.
        let evaluating = self.inner.engines.under_way();
        let pending = self.inner.queue().waiting();
        let abandoned = self.inner.engines.abandoned();
        let engines = (
            count(evaluating),
            count(abandoned),
            self.inner.engines.lost(),
        );
        self.inner.counters.read(count(pending), engines)
    }

    /// Whether every engine thread is at an evaluation that was given up: actions are denied until
    /// one of them ends.
    #[must_use]
    pub fn engines_are_exhausted(&self) -> bool {
        self.inner.engines.abandoned() == ENGINE_WORKERS
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &InterceptorConfig {
        &self.inner.config
    }
}

/// A request under way. Dropping it changes nothing: the wait ends by itself.
pub struct Pending {
    inner: Arc<Inner>,
    stage: Arc<Stage>,
}

impl Pending {
    /// Ends the wait now: the request is answered `AUDIT_UNAVAILABLE` unless it was answered
    /// before, and no permit will be made from its record. One that still waits for an engine or for a
    /// decision point is denied and recorded when that wait ends.
    pub fn give_up(&self) {
        if let Some(slot) = self.stage.give_up() {
            Inner::finish(&self.inner, slot.give_up());
        }
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

fn posture_rank(posture: Posture) -> u8 {
    match posture {
        Posture::Normal => 0,
        Posture::Stale => 1,
        Posture::Restricted => 2,
        Posture::Closed => 3,
    }
}

impl Referred {
    fn asked(&self) -> Option<Asked> {
        let Request::Action(action) = &self.judgement.request else {
            return None;
        };
        let (bundle, _) = self.judgement.bundle.as_ref()?;
        Some(Asked {
            question: self.question.key(),
            kept_key: self.question.kept_key(),
            terms: self.terms.clone(),
            under: Under::from(bundle),
            action: action.name().to_owned(),
            principal: format!("{}::{}", action.principal().kind(), action.principal().id()),
            deadline: self.question.deadline,
        })
    }

    fn conclude(self: Box<Self>, inner: &Arc<Inner>) {
        let Self {
            judgement, waiter, ..
        } = *self;
        waiter.conclude(inner, judgement);
    }
}

impl Waiter {
    /// Records what was decided, unless its caller has gone: then a deny.
    fn conclude(self, inner: &Arc<Inner>, mut judgement: Judgement) {
        let findings = &mut judgement.findings;
        if self.stage.is_given_up() && findings.reason.decision() == Decision::Allow {
            let (reason, awaited) = match findings.consult {
                Some(_) => (Reason::ConsultTimeout, "the decision point"),
                None => (Reason::Deadline, "the policy engine"),
            };
            findings.reason = reason;
            findings.errors = vec![format!("the caller did not wait for {awaited}")];
        }
        let who = (&self.caller, &*self.stage);
        Inner::conclude(inner, judgement, who, Mode::Decide, self.done);
    }
}

impl Inner {
    fn node(&self) -> &str {
        self.config.node_id.as_str()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Neither lock is held while foreign code runs, so a poisoned one is whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn summary(&self) -> MutexGuard<'_, Summary> {
        self.summary.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine_faults(&self) -> MutexGuard<'_, Vec<EngineFault>> {
        let faults = self.engine_faults.lock();
        faults.unwrap_or_else(PoisonError::into_inner)
    }

    fn consults(&self) -> MutexGuard<'_, Consults<Box<Referred>>> {
        // Nothing of it waits or calls foreign code.
        self.consults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn floor(&self) -> Posture {
        match self.floor.load(Ordering::Acquire) {
            0 => Posture::Normal,
            1 => Posture::Stale,
            2 => Posture::Restricted,
            _ => Posture::Closed,
        }
    }

    fn overall_posture(&self, policy: Option<&ActivePolicy>) -> Posture {
        match policy {
            Some(policy) => policy
                .overall_posture(self.clock.unix_ms())
                .max(self.floor()),
            None => Posture::Closed,
        }
    }

    /// Everything up to the engine, which goes on by itself. Returns what can be given up.
    fn start(
        inner: &Arc<Self>,
        ask: Ask<'_>,
        caller: &Caller,
        mode: Mode,
        done: Done,
    ) -> Arc<Stage> {
        if mode == Mode::Explain {
            return Self::explain(inner, ask, caller, done);
        }
        let stage = Arc::new(Stage::judging());
        let waiter = Waiter {
            caller: caller.clone(),
            done,
            stage: Arc::clone(&stage),
            until: Duration::ZERO,
            rounds: 0,
            via: ask.via(),
        };
        match ask.action(caller) {
            Ok(action) => {
                let (judging, step) = Judging::charged(inner, &action, caller);
                Self::go_on(inner, (judging, Box::new(action)), step, waiter);
            }
            Err(error) => {
                let judgement = inner.unreadable(error, ask.body_bytes());
                waiter.conclude(inner, judgement);
            }
        }
        stage
    }

    /// One step of a decision: to the engine, and on from there on its thread, or to what follows it.
    fn go_on(
        inner: &Arc<Self>,
        (judging, action): (Judging, Box<Action>),
        step: Step,
        mut waiter: Waiter,
    ) {
        let findings = match step {
            Step::Ask(engine, request) => {
                let shared = Arc::clone(inner);
                let holder = judging.holder();
                let then = move |evaluated, took| {
                    let mut judging = judging;
                    let step = judging.heard(&shared, &action, evaluated, took);
                    Self::go_on(&shared, (judging, action), step, waiter);
                };
                let engines = &inner.engines;
                return engines.submit(engine, request, &holder, Box::new(then));
            }
            Step::Found(findings) => findings,
        };
        let judgement = judging.judgement(action, findings);
        match Self::referred(&judgement) {
            Some(terms) if !waiter.stage.is_given_up() => {
                waiter.until = inner.clock.now().saturating_add(CONSULT_WAIT);
                Self::consult(inner, judgement, terms, waiter);
            }
            _ => waiter.conclude(inner, judgement),
        }
    }

    /// What would be decided: the same, on the thread of whoever asks, for an explanation asks the engines
    /// again. Asking a decision point is an effect of its own, and its answer would be kept: only a decision
    /// asks.
    fn explain(inner: &Arc<Self>, ask: Ask<'_>, caller: &Caller, done: Done) -> Arc<Stage> {
        add(&inner.counters.explains, 1);
        let mut judgement = match ask.action(caller) {
            Ok(action) => {
                let (mut judging, step) = Judging::charged(inner, &action, caller);
                let findings = judging.wait(inner, &action, step);
                judging.judgement(Box::new(action), findings)
            }
            Err(error) => inner.unreadable(error, ask.body_bytes()),
        };
        if Self::referred(&judgement).is_some() {
            judgement.findings.reason = Reason::ConsultNeeded;
        }
        let stage = Arc::new(Stage::judging());
        Self::conclude(inner, judgement, (caller, &stage), Mode::Explain, done);
        stage
    }

    /// The terms of the decision point that has to agree to a local permit.
    fn referred(judgement: &Judgement) -> Option<ConsultTerms> {
        let Request::Action(action) = &judgement.request else {
            return None;
        };
        let is_allow = judgement.findings.reason.decision() == Decision::Allow;
        let policy = judgement.policy.as_ref().filter(|_| is_allow)?;
        policy.consult(action.name()).cloned()
    }

    /// The record, and the answer after it. The stage goes on to the slot that waits for it.
    fn conclude(
        inner: &Arc<Self>,
        judgement: Judgement,
        (caller, stage): (&Caller, &Stage),
        mode: Mode,
        done: Done,
    ) {
        let unix_ms = inner.clock.unix_ms();
        let mut answer = inner.blank_answer(judgement.findings.reason, judgement.findings.posture);
        answer.bundle = judgement.bundle.as_ref().map(|(bundle, _)| bundle.clone());
        answer.retry_after_ms = judgement.findings.retry_after_ms;
        let consulted = judgement.findings.consult.as_ref();
        answer.consult = consulted.map(|note| Box::new(note.told()));
        if answer.decision == Decision::Allow && consulted.is_some_and(|note| note.is_fallback()) {
            answer.message.push_str(
                "; its decision point cannot be reached, and its last answer to the same question serves",
            );
        }
        let rendered = match record::decision(&judgement, caller, mode, inner.node(), unix_ms) {
            Ok(rendered) => rendered,
            // Without a record there is no allow, and no other answer than this.
            Err(_) => {
                let answer = answer.unrecorded(Reason::AuditUnavailable);
                Self::answer(
                    inner,
                    done,
                    Outcome {
                        answer,
                        permit: None,
                    },
                );
                return;
            }
        };
        add(&inner.counters.redactions, rendered.redactions);
        if answer.reason == Reason::RateLimitExceeded
            && let Some(spent) = rendered.errors.first()
        {
            answer.message.clone_from(spent);
        }
        let mut faults = rendered.errors.iter();
        let fault = faults.find_map(|text| explain::of_request(text));
        if answer.reason == Reason::EvaluationError
            && let Some(fault) = fault
        {
            answer.message =
                format!("the request is not what the bundle's schema declares: {fault}");
        }
        answer.policies = rendered.policies;
        answer.action_hash = rendered.action_hash;
        answer.request_id = rendered.request_id;
        if mode == Mode::Explain {
            answer.errors = rendered.errors;
            let request = match (&judgement.request, judgement.policy.as_ref()) {
                (Request::Action(action), Some(policy)) => {
                    let mut request = PolicyRequest::from(action.as_ref());
                    let told = policy.describe_node(
                        &mut request,
                        judgement.findings.posture,
                        inner.clock.unix_ms(),
                    );
                    told.ok().map(|()| request)
                }
                _ => None,
            };
            answer.explanation = Some(Box::new(explain::explanation(
                &inner.engines,
                &holder(caller),
                request,
                judgement.policy.as_ref(),
                &judgement.findings,
            )));
        }
        let action = match judgement.request {
            Request::Action(action) => Some(action),
            Request::Invalid { error, .. } => {
                answer.message = format!("{}: {}", error.code(), error.message());
                None
            }
        };

        let effective = mode == Mode::Decide && answer.decision == Decision::Allow;
        if !effective && !inner.may_record_denial(caller, rendered.bytes.len()) {
            let note = judgement.findings.consult.as_deref();
            answer.window = Some(inner.summarise(caller, mode, (answer.reason, note)));
            Self::answer(
                inner,
                done,
                Outcome {
                    answer,
                    permit: None,
                },
            );
            return;
        }

        let class = if effective {
            RecordClass::Decision
        } else {
            RecordClass::Denial
        };
        let slot = Slot::new(Draft {
            answer,
            action,
            mode,
            done,
        });
        let deadline = inner
            .clock
            .now()
            .saturating_add(inner.config.append_timeout);
        if !inner.queue().push(deadline, Arc::clone(&slot)) {
            Self::finish(inner, slot.give_up());
            return;
        }
        // Ruling 21: before the recorder can speak, for whoever gives up from here on must meet the slot. If
        // somebody has meanwhile, the record of an allow is followed by `not_released`.
        let given_up = stage.record(Arc::clone(&slot));
        if let Some(slot) = given_up.filter(|_| effective) {
            Self::finish(inner, slot.give_up());
        }
        let shared = (Arc::clone(inner), Arc::clone(&slot));
        let made_for = effective.then(|| For::caller(caller)).flatten();
        inner.recorder.submit(
            class,
            rendered.bytes,
            Box::new(move |result| {
                let (inner, slot) = shared;
                let at = result.as_ref().ok().copied();
                let completed = slot.complete(result);
                if let Completed::Answered(_, outcome) = &completed
                    && outcome.answer.record.is_some()
                    && let Some(at) = at
                {
                    match (&outcome.permit, made_for) {
                        (Some(_), Some(made_for)) => {
                            inner.reports().allowed(at, made_for, unix_ms);
                        }
                        _ => inner.reports().denied(at),
                    }
                }
                Self::finish(&inner, completed);
            }),
        );
    }

    /// Asks the decision point that a local permit is referred to.
    fn consult(inner: &Arc<Self>, mut judgement: Judgement, terms: ConsultTerms, waiter: Waiter) {
        let now = inner.clock.now();
        let left = waiter.until.saturating_sub(now);
        let deadline = Duration::from_millis(terms.deadline_ms).min(left);
        let is_too_late = deadline.is_zero() || waiter.rounds >= JUDGED_AT_MOST;
        let question = inner.question(&judgement, &terms, (&waiter.via, deadline));
        let Some(question) = question.filter(|_| !is_too_late) else {
            judgement.findings = Findings {
                errors: vec!["the policy changed each time that it was asked".to_owned()],
                ..Findings::new(Reason::Deadline, judgement.findings.posture)
            };
            return waiter.conclude(inner, judgement);
        };
        let referred = Box::new(Referred {
            judgement,
            question,
            terms,
            waiter,
        });
        if let Some(failure) = goes_round(&referred.waiter.via, inner.node()) {
            return Self::weigh_in(inner, referred, &Err(failure));
        }
        let upstreams = inner.upstreams.get();
        let upstreams = upstreams.filter(|_| referred.question.identity.is_some());
        let (Some(upstreams), Some(asked)) = (upstreams, referred.asked()) else {
            return Self::weigh_in(inner, referred, &Err(ConsultFailure::Unconfigured));
        };
        let question = referred.question.clone();
        let holder = holder(&referred.waiter.caller);
        let begun = inner.consults().begin(asked, &holder, referred, now);
        match begun {
            Begun::Joined => {}
            Begun::Failed(failure, referred) => Self::weigh_in(inner, referred, &Err(failure)),
            Begun::Send(number) => {
                let at = (question.key(), number);
                let shared = Arc::clone(inner);
                let heard = move |said| Self::heard(&shared, at, &said);
                upstreams.ask(question, Box::new(heard));
            }
        }
    }

    /// The question of a local permit under these terms.
    fn question(
        &self,
        judgement: &Judgement,
        terms: &ConsultTerms,
        asked: (&[String], Duration),
    ) -> Option<Question> {
        let (Request::Action(action), Some((bundle, _))) = (&judgement.request, &judgement.bundle)
        else {
            return None;
        };
        let node = (bundle, judgement.findings.posture, self.node());
        let upstreams = self.upstreams.get();
        let identity = upstreams.and_then(|upstreams| upstreams.identity(&terms.upstream));
        Question::new(action, node, (terms, identity), asked).ok()
    }

    /// A question came to its end. INV-14 and ruling 17: whoever waited for it is judged again before the
    /// answer counts, for policy, posture and time went on meanwhile.
    fn heard(
        inner: &Arc<Self>,
        at: (Sha256Hash, u64),
        said: &Result<UpstreamAnswer, ConsultFailure>,
    ) {
        let in_force = inner.in_force();
        let times = (inner.clock.now(), inner.clock.unix_ms());
        let settled = inner.consults().settle(at, said, times, in_force.as_ref());
        if let (true, Some(upstreams)) = (settled.is_withdrawn, inner.upstreams.get()) {
            upstreams.withdrawn(&|| inner.consults().to_keep());
        }
        for referred in settled.waiting {
            let Referred {
                judgement,
                question,
                terms,
                waiter,
            } = *referred;
            let Request::Action(action) = judgement.request else {
                continue;
            };
            let (mut judging, step) = Judging::again(inner, &action, &waiter.caller);
            let findings = judging.wait(inner, &action, step);
            let referred = Box::new(Referred {
                judgement: judging.judgement(action, findings),
                question,
                terms,
                waiter,
            });
            let Some(terms) = Self::referred(&referred.judgement) else {
                referred.conclude(inner);
                continue;
            };
            let asked = (referred.waiter.via.as_slice(), Duration::ZERO);
            let question = inner.question(&referred.judgement, &terms, asked);
            if question.is_some_and(|now| now.key() == referred.question.key())
                && terms == referred.terms
            {
                Self::weigh_in(inner, referred, said);
            } else {
                // What was answered is not what would be asked now.
                let Referred {
                    judgement,
                    mut waiter,
                    ..
                } = *referred;
                waiter.rounds += 1;
                Self::consult(inner, judgement, terms, waiter);
            }
        }
    }

    /// Gives a local permit, judged this moment, what was heard of it.
    fn weigh_in(
        inner: &Arc<Self>,
        mut referred: Box<Referred>,
        said: &Result<UpstreamAnswer, ConsultFailure>,
    ) {
        let unix_ms = inner.clock.unix_ms();
        let question = (referred.question.digest, referred.waiter.via.as_slice());
        let signs = referred.question.identity.is_some_and(|it| it.signs);
        let key = (&referred.question.kept_key(), signs);
        let under = referred.judgement.bundle.as_ref();
        let under = under.map(|(bundle, _)| Under::from(bundle));
        let (reason, note) = {
            let mut consults = inner.consults();
            let kept = under.and_then(|under| consults.kept(key, &under, unix_ms));
            let (reason, note) = weigh(&referred.terms, question, said, kept, unix_ms);
            consults.count(&note);
            (reason, note)
        };
        let findings = &mut referred.judgement.findings;
        // Ruling 17: what is no local permit is final.
        if findings.reason.decision() == Decision::Allow {
            findings.reason = reason;
        }
        findings.consult = Some(Box::new(note));
        referred.conclude(inner);
    }

    /// The bundle that decides now, as answers are kept under it.
    fn in_force(&self) -> Option<Under> {
        let (bundle, _) = bundle_info((self.policy)().as_deref()?);
        Some(Under::from(&bundle))
    }

    fn tick_consults(inner: &Arc<Self>, now: Duration) {
        let unix_ms = inner.clock.unix_ms();
        let lost = inner.consults().take_overdue(now, unix_ms);
        for mut referred in lost {
            let findings = &mut referred.judgement.findings;
            // No earlier answer serves here: on this thread nothing is judged again.
            *findings = Findings {
                errors: vec!["the question to the decision point was lost".to_owned()],
                ..Findings::new(Reason::ConsultTimeout, findings.posture)
            };
            referred.conclude(inner);
        }
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        if now_ms < inner.sweep_from_ms.load(Ordering::Relaxed) {
            return;
        }
        let next = now.saturating_add(CONSULT_SWEEP).as_millis();
        let next = u64::try_from(next).unwrap_or(u64::MAX);
        inner.sweep_from_ms.store(next, Ordering::Relaxed);
        let policy = (inner.policy)();
        let under = inner.in_force();
        let mut consults = inner.consults();
        consults.observe(under.as_ref());
        consults.sweep(unix_ms, |action| {
            policy.as_ref().is_none_or(|policy| {
                policy.posture(action, unix_ms).max(inner.floor()) == Posture::Closed
            })
        });
    }

    /// The deny of what is no request.
    fn unreadable(&self, error: InvalidRequest, body_bytes: usize) -> Judgement {
        let policy = (self.policy)();
        let posture = self.overall_posture(policy.as_deref());
        Judgement {
            findings: Findings::new(Reason::InvalidRequest, posture),
            bundle: policy.as_deref().map(bundle_info),
            policy,
            request: Request::Invalid { error, body_bytes },
        }
    }

    fn report(
        inner: &Arc<Self>,
        bytes: &[u8],
        caller: &Caller,
        history: History<'_>,
        done: ReportDone,
    ) {
        let report = match Report::read(bytes) {
            Ok(report) => report,
            Err(error) => return Self::refuse_report(inner, caller, None, error.into(), done),
        };
        let earlier = inner.reports().earlier(report.index, inner.clock.now());
        let is_known = match earlier {
            Earlier::Known => true,
            Earlier::Unreadable => false,
            // Read without the lock: allows are answered meanwhile.
            Earlier::Read => match history() {
                Ok(earlier) => {
                    inner.reports().read_back(&earlier);
                    true
                }
                Err(_) => {
                    inner.reports().not_read_back(inner.clock.now());
                    false
                }
            },
        };
        if !is_known {
            let reason = Reason::AuditUnavailable;
            return done(Err(ReportRefused::Unrecorded(reason)));
        }
        let unix_ms = inner.clock.unix_ms();
        let claimed = inner.reports().claim(&report, caller, unix_ms);
        let decision = match claimed {
            Ok(decision) => decision,
            Err(refused) => {
                return Self::refuse_report(inner, caller, Some(report.index), refused, done);
            }
        };
        let outcome = report.outcome;
        let record = record::reported(
            (inner.node(), unix_ms),
            caller,
            decision,
            outcome.as_str(),
            &report.detail,
        );
        let shared = Arc::clone(inner);
        inner.submit(
            RecordClass::Denial,
            &record,
            Box::new(move |result| {
                shared.reports().settle(decision, result.is_ok());
                done(match result {
                    Ok(appended) => {
                        add(&shared.counters.reports, 1);
                        Ok(Reported {
                            outcome,
                            decision,
                            record: appended.into(),
                        })
                    }
                    Err(AppendError::Capacity) => {
                        Err(ReportRefused::Unrecorded(Reason::AuditCapacity))
                    }
                    Err(_) => Err(ReportRefused::Unrecorded(Reason::AuditUnavailable)),
                });
            }),
        );
    }

    /// Records that something of a caller was refused, like any denial: by itself up to the caller's
    /// budget, then counted. Whatever comes of the record, the refusal stands.
    fn refuse(
        inner: &Arc<Self>,
        caller: &Caller,
        refused: &record::Refused<'_>,
        done: Box<dyn FnOnce() + Send>,
    ) {
        let summed = match refused.request {
            record::SEARCH => "SEARCH_REFUSED",
            _ => "REPORT_REFUSED",
        };
        let code = refused.code;
        let at = (inner.node(), inner.clock.unix_ms());
        let record = record::refused(at, caller, refused).ok();
        let record = record.filter(|record| inner.may_record_denial(caller, record.len()));
        let Some(record) = record else {
            inner.summarise_as(caller, (summed, None));
            return done();
        };
        let shared = Arc::clone(inner);
        inner.recorder.submit(
            RecordClass::Denial,
            record,
            Box::new(move |result| {
                if result.is_err() {
                    let (now, unix_ms) = (shared.clock.now(), shared.clock.unix_ms());
                    shared.summary().count_unrecorded(code, now, unix_ms);
                }
                done();
            }),
        );
    }

    fn refuse_report(
        inner: &Arc<Self>,
        caller: &Caller,
        named_index: Option<u64>,
        refused: ReportRefused,
        done: ReportDone,
    ) {
        let message = refused.to_string();
        let what = record::Refused {
            request: record::REPORT,
            code: refused.code(),
            message: &message,
            named_index,
            request_id: None,
        };
        Self::refuse(inner, caller, &what, Box::new(move || done(Err(refused))));
    }

    fn refuse_search(
        inner: &Arc<Self>,
        caller: &Caller,
        request_id: Option<&str>,
        refused: SearchRefused,
        done: SearchDone,
    ) {
        let message = refused.to_string();
        let what = record::Refused {
            request: record::SEARCH,
            code: refused.code(),
            message: &message,
            named_index: None,
            request_id,
        };
        Self::refuse(inner, caller, &what, Box::new(move || done(Err(refused))));
    }

    fn search(
        inner: &Arc<Self>,
        search: Result<&Search, InvalidRequest>,
        caller: &Caller,
        done: SearchDone,
    ) {
        add(&inner.counters.searches, 1);
        let search = match search {
            Ok(search) => search,
            Err(error) => return Self::refuse_search(inner, caller, None, error.into(), done),
        };
        let searched = (inner.policy)();
        let bundle = searched.as_deref().map(bundle_info);
        let posture = inner.overall_posture(searched.as_deref());
        let mut judge = |action: &Action| {
            let (mut judging, step) = Judging::charged(inner, action, caller);
            let findings = judging.wait(inner, action, step);
            let is_allow = findings.reason.decision() == Decision::Allow;
            let terms = judging
                .policy()
                .and_then(|policy| policy.consult(action.name()));
            // Who may is not known before the decision point is asked, and a search asks none.
            let reason = match terms.filter(|_| is_allow) {
                Some(_) => Reason::ConsultNeeded,
                None => findings.reason,
            };
            Judged {
                decision: reason.decision(),
                reason,
                retry_after_ms: findings.retry_after_ms,
            }
        };
        let now = || inner.clock.now();
        let page = search::check(search, caller)
            .map_err(SearchRefused::from)
            .and_then(|()| search::page(search, caller, searched.as_deref(), &now, &mut judge));
        // A page is of one policy from its first candidate to its last, or it is none.
        let in_force = (inner.policy)();
        let is_same = match (searched.as_ref(), in_force.as_ref()) {
            (Some(searched), Some(now)) => Arc::ptr_eq(searched, now),
            (None, None) => true,
            _ => false,
        };
        let page = page.and_then(|page| match is_same {
            true => Ok(page),
            false => Err(SearchRefused::PolicyChanged),
        });
        let page = match page {
            Ok(page) => page,
            Err(refused) => {
                let id = search.request_id.as_deref();
                return Self::refuse_search(inner, caller, id, refused, done);
            }
        };
        let described = search::described(search, &page);
        let at = (inner.node(), inner.clock.unix_ms());
        let id = search.request_id.as_deref();
        let record = record::search(at, caller, &described, id, bundle.as_ref(), posture);
        let mut found = Found {
            results: page.results,
            next_token: page.next_token,
            judged: page.judged,
            bundle: bundle.map(|(bundle, _)| bundle),
            posture,
            record: None,
            window: None,
        };
        let Ok(record) = record else {
            return done(Err(SearchRefused::Unrecorded(Reason::AuditUnavailable)));
        };
        if !inner.may_record_denial(caller, record.len()) {
            found.window = Some(inner.summarise_as(caller, ("SEARCH", None)));
            return done(Ok(found));
        }
        inner.recorder.submit(
            RecordClass::Denial,
            record,
            Box::new(move |result| {
                done(match result {
                    Ok(appended) => {
                        found.record = Some(appended.into());
                        Ok(found)
                    }
                    Err(AppendError::Capacity) => {
                        Err(SearchRefused::Unrecorded(Reason::AuditCapacity))
                    }
                    Err(_) => Err(SearchRefused::Unrecorded(Reason::AuditUnavailable)),
                });
            }),
        );
    }

    fn posture_of(&self, action: &Action, policy: Option<&ActivePolicy>) -> Posture {
        match policy {
            Some(policy) => policy
                .posture(action.name(), self.clock.unix_ms())
                .max(self.floor()),
            None => Posture::Closed,
        }
    }

    fn blank_answer(&self, reason: Reason, posture: Posture) -> Answer {
        Answer {
            decision: reason.decision(),
            reason,
            message: reason.message().to_owned(),
            policies: Vec::new(),
            errors: Vec::new(),
            bundle: None,
            posture,
            record: None,
            window: None,
            action_hash: None,
            request_id: None,
            retry_after_ms: None,
            consult: None,
            explanation: None,
        }
    }

    /// Whether this denial gets a record of its own (ruling 20).
    fn may_record_denial(&self, caller: &Caller, record_bytes: usize) -> bool {
        let cost = u32::try_from(record_bytes).unwrap_or(u32::MAX);
        self.denial_bytes.check(&denial_key(caller), cost).is_ok()
    }

    fn summarise(
        &self,
        caller: &Caller,
        mode: Mode,
        (reason, note): (Reason, Option<&ConsultNote>),
    ) -> String {
        let what = match mode {
            Mode::Decide => reason.as_str(),
            Mode::Explain => "EXPLAIN",
        };
        self.summarise_as(caller, (what, note))
    }

    fn summarise_as(
        &self,
        caller: &Caller,
        counted: (&'static str, Option<&ConsultNote>),
    ) -> String {
        add(&self.counters.summarised, 1);
        let times = (self.clock.now(), self.clock.unix_ms());
        self.summary()
            .count(record::counted(caller), counted, times)
    }

    /// Tells the caller, or the log, what a wait came to.
    fn finish(inner: &Arc<Self>, completed: Completed) {
        match completed {
            Completed::Answered(done, outcome) => {
                Self::answer(inner, done, outcome);
            }
            Completed::NotReleased(position) => {
                add(&inner.counters.not_released, 1);
                let record = record::not_released(inner.node(), inner.clock.unix_ms(), position);
                let shared = Arc::clone(inner);
                let lost = move |result: Result<_, AppendError>| {
                    if result.is_err() {
                        add(&shared.counters.records_lost, 1);
                        tracing::error!(index = position.index, "not_released was not recorded");
                    }
                };
                inner.submit(RecordClass::State, &record, Box::new(lost));
            }
            Completed::Nothing => {}
        }
    }

    fn answer(inner: &Arc<Self>, done: Done, outcome: Outcome) {
        let reason = outcome.answer.reason;
        inner.counters.answered(reason);
        add(&inner.counters.permits, u64::from(outcome.permit.is_some()));
        if matches!(reason, Reason::AuditUnavailable | Reason::AuditCapacity) {
            let (now, unix_ms) = (inner.clock.now(), inner.clock.unix_ms());
            inner
                .summary()
                .count_unrecorded(reason.as_str(), now, unix_ms);
        }
        done(outcome);
    }

    /// Writes the open window if it has been open that long.
    fn flush(inner: &Arc<Self>, length: Duration) {
        let due = {
            let mut summary = inner.summary();
            summary.take_due(inner.clock.now(), length).map(|window| {
                let fields = summary.fields(&window);
                (window, fields)
            })
        };
        let Some((window, fields)) = due else { return };
        let record = record::summary(inner.node(), inner.clock.unix_ms(), fields);
        let shared: (Arc<Self>, Window) = (Arc::clone(inner), window);
        inner.submit(
            RecordClass::Denial,
            &record,
            Box::new(move |result| {
                let (inner, window) = shared;
                if result.is_err() {
                    let now = inner.clock.now();
                    inner.summary().put_back(window, now);
                }
            }),
        );
    }

    fn submit(&self, class: RecordClass, record: &Map<String, Value>, done: AppendDone) {
        match canonical_bytes(record) {
            Ok(bytes) => self.recorder.submit(class, bytes, done),
            Err(error) => done(Err(AppendError::Unavailable(error.to_string()))),
        }
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// Whose evaluations are counted.
fn holder(caller: &Caller) -> Arc<str> {
    format!("{}::{}", caller.principal_type, caller.principal_id).into()
}

fn denial_key(caller: &Caller) -> DenialKey {
    (caller.principal_type.clone(), caller.principal_id.clone())
}

fn whole_ms(duration: Duration) -> u64 {
    // Rounded up: who comes back after it must not be a moment early.
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

fn bundle_info(policy: &ActivePolicy) -> (BundleInfo, tidelock_policy::Source) {
    let bundle = policy.bundle();
    let manifest = bundle.manifest();
    let info = BundleInfo {
        name: manifest.name.clone(),
        epoch: manifest.epoch,
        hash: bundle.content_id().as_str().to_owned(),
    };
    (info, policy.source())
}
