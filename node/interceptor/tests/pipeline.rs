//! The pipeline from bytes to a durable record and a permit, with a scripted engine, a clock that
//! stands still and a recorder that fails and waits on demand.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, outside of test functions"
)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use serde_json::{Value, json};
use tidelock_interceptor::{
    Action, Caller, Decision, Evaluations, Interceptor, InterceptorConfig, InterceptorConfigError,
    InvalidCode, Mode, NotReplayable, Outcome, Pending, QuotaRates, Reason, StatedBy,
    limits::{
        ENGINE_WORKERS_PER_CALLER, MAX_BODY_BYTES, MAX_INHERITED_BYTES, MAX_PENDING,
        MAX_RECORD_BYTES,
    },
    recorded_request,
    testing::{MemoryRecorder, TestClock},
};
use tidelock_policy::{
    ActivePolicy, Evaluation, PolicyRequest, Posture, Source, Verdict,
    testing::{ScriptedEngine, active_policy},
};
use tidelock_quota::Rate;
use tidelock_segments::{AppendError, NodeId, RecordClass, Sha256Hash};

const BOOT_UNIX_MS: u64 = 1_700_000_000_000;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const MS: Duration = Duration::from_millis(1);

struct Site {
    interceptor: Interceptor,
    recorder: Arc<MemoryRecorder>,
    clock: Arc<TestClock>,
    policy: Arc<Mutex<Option<Arc<ActivePolicy>>>>,
    evaluations: Arc<AtomicUsize>,
}

fn evaluation(verdict: Verdict, policies: &[&str], errors: &[&str]) -> Evaluation {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Evaluation {
        verdict,
        policies: owned(policies),
        errors: owned(errors),
    }
}

/// What the engine says depends on the action's name.
fn script(request: &PolicyRequest, clock: &TestClock) -> Evaluation {
    match request.action.as_str() {
        "fs.read" | "fs.write" => evaluation(Verdict::Permit, &["permit-it"], &[]),
        "forbidden" => evaluation(Verdict::Forbid, &["forbid-it"], &[]),
        "errors" => evaluation(Verdict::Error, &[], &["type error, password=hunter2"]),
        // An engine that skipped a forbid and says permit all the same.
        "permits.with.error" => evaluation(Verdict::Permit, &["permit-it"], &["skipped"]),
        "panics" => panic!("scripted"),
        "slow" => {
            clock.advance(Duration::from_millis(6));
            evaluation(Verdict::Permit, &["permit-it"], &[])
        }
        "just.in.time" => {
            clock.advance(Duration::from_millis(5));
            evaluation(Verdict::Permit, &["permit-it"], &[])
        }
        // An engine without an end; the test gives its threads back by ending.
        "hangs" => loop {
            std::thread::park();
        },
        "many" => Evaluation {
            verdict: Verdict::Forbid,
            policies: (0..5_000).map(|n| format!("policy-{n:0>200}")).collect(),
            errors: Vec::new(),
        },
        _ => evaluation(Verdict::NoMatch, &[], &[]),
    }
}

impl Site {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut InterceptorConfig)) -> Self {
        let clock = TestClock::new(BOOT_UNIX_MS);
        let recorder = MemoryRecorder::new();
        let evaluations = Arc::new(AtomicUsize::new(0));
        let engine = {
            let (clock, evaluations) = (clock.clone(), evaluations.clone());
            Arc::new(ScriptedEngine::new(move |request| {
                evaluations.fetch_add(1, Ordering::SeqCst);
                script(request, &clock)
            }))
        };
        let active = active_policy(Some(engine), Source::Active, BOOT_UNIX_MS).unwrap();
        let policy = Arc::new(Mutex::new(Some(Arc::new(active))));
        let mut config = InterceptorConfig::new(NodeId::new("node-a").unwrap());
        // A busy machine, or one that prints a backtrace, is no fault of a scripted engine.
        config.engine_wait = Duration::from_secs(60);
        change(&mut config);
        let source = policy.clone();
        let interceptor = Interceptor::new(
            config,
            clock.clone(),
            Arc::new(move || source.lock().unwrap().clone()),
            recorder.clone(),
        )
        .unwrap();
        Self {
            interceptor,
            recorder,
            clock,
            policy,
            evaluations,
        }
    }

    fn ask(&self, action: &str) -> Outcome {
        self.ask_as(&caller(), Mode::Decide, &request(action))
    }

    fn ask_as(&self, caller: &Caller, mode: Mode, request: &Value) -> Outcome {
        let (outcome, _pending) = self.start(caller, mode, request);
        outcome.try_recv().unwrap()
    }

    fn start(
        &self,
        caller: &Caller,
        mode: Mode,
        request: &Value,
    ) -> (mpsc::Receiver<Outcome>, Pending) {
        let started = self.hand_over(caller, mode, request);
        self.judged();
        started
    }

    /// Without a wait for the engine.
    fn hand_over(
        &self,
        caller: &Caller,
        mode: Mode,
        request: &Value,
    ) -> (mpsc::Receiver<Outcome>, Pending) {
        let (sender, receiver) = mpsc::channel();
        let pending = self.interceptor.decide(
            request.to_string().as_bytes(),
            caller,
            mode,
            Box::new(move |outcome| sender.send(outcome).unwrap()),
        );
        (receiver, pending)
    }

    /// Waits until the engines have said all that they were asked.
    fn judged(&self) {
        while self.interceptor.stats().evaluating > 0 {
            std::thread::yield_now();
        }
    }

    fn records(&self) -> Vec<Value> {
        let records = self.recorder.records();
        records
            .iter()
            .map(|(_, bytes)| serde_json::from_slice(bytes).unwrap())
            .collect()
    }

    fn last_record(&self) -> Value {
        self.records().pop().unwrap()
    }
}

fn caller() -> Caller {
    caller_named("coder")
}

fn caller_named(id: &str) -> Caller {
    Caller {
        principal_type: "Agent".to_owned(),
        principal_id: id.to_owned(),
        may_act_as: false,
        door: "test",
        stated_by: None,
    }
}

fn request(action: &str) -> Value {
    json!({"action": action, "resource": {"type": "File", "id": "/srv/./x"}, "id": "r-1"})
}

#[test]
fn an_allow_carries_answer_record_and_permit() {
    let site = Site::new();
    let outcome = site.ask("fs.read");
    let answer = &outcome.answer;
    assert_eq!(
        (answer.decision, answer.reason),
        (Decision::Allow, Reason::PolicyAllow)
    );
    assert_eq!(answer.policies, ["permit-it"]);
    assert_eq!(answer.posture, Posture::Normal);
    assert_eq!(answer.request_id.as_deref(), Some("r-1"));
    let bundle = answer.bundle.as_ref().unwrap();
    assert_eq!((bundle.name.as_str(), bundle.epoch), ("template", 1));
    assert!(bundle.hash.starts_with("sha256:"));

    let (class, bytes) = site.recorder.records().remove(0);
    assert_eq!(class, RecordClass::Decision);
    let position = answer.record.unwrap();
    assert_eq!(
        (position.index, position.leaf),
        (0, Sha256Hash::of_parts(&[&[0], &bytes]))
    );
    let permit = outcome.permit.unwrap();
    assert_eq!(permit.record(), position);
    let action = permit.into_action();
    assert_eq!(Some(action.hash()), answer.action_hash);

    assert_eq!(
        site.last_record(),
        json!({
            "v": 1, "type": "decision", "at": BOOT_UNIX_MS, "node": "node-a",
            "caller": {"type": "Agent", "id": "coder", "door": "test"},
            "principal": {"type": "Agent", "id": "coder"},
            "action": "fs.read", "resource": {"type": "File", "id": "/srv/x"},
            "action_hash": action.hash().to_string(),
            "params_hash": action.params_hash().to_string(),
            "request_id": "r-1",
            "decision": "allow", "reason": "POLICY_ALLOW", "posture": "normal",
            "policies": ["permit-it"],
            "bundle": {
                "name": "template", "epoch": 1, "hash": bundle.hash, "source": "active",
            },
        })
    );
    let canonical = serde_json::to_value(answer).unwrap();
    assert_eq!(canonical["record"]["index"], 0);
    assert_eq!(canonical["reason"], "POLICY_ALLOW");
    assert_eq!(canonical["decision"], "allow");
}

#[test]
fn a_record_has_the_name_that_a_proxy_stated_and_the_proxy() {
    let site = Site::new();
    let by_itself = json!({"type": "Agent", "id": "coder", "door": "test"});
    site.ask("fs.read");
    assert_eq!(site.last_record()["caller"], by_itself, "the control");
    let stated = Caller {
        door: "proxy",
        stated_by: Some(Box::new(StatedBy {
            principal_type: "Service".to_owned(),
            principal_id: "envoy-1".to_owned(),
            door: "tls",
        })),
        ..caller()
    };
    site.ask_as(&stated, Mode::Decide, &request("fs.read"));
    let record = site.last_record();
    let by = json!({"type": "Service", "id": "envoy-1", "door": "tls"});
    assert_eq!(
        record["caller"],
        json!({"type": "Agent", "id": "coder", "door": "proxy", "stated_by": by})
    );
    assert_eq!(record["principal"]["id"], "coder", "it asks for itself");
    assert_eq!(record["v"], 1, "a further key");
}

#[test]
fn every_early_exit_is_a_recorded_deny_with_its_reason() {
    let site = Site::with(|config| {
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 9,
        }
    });
    let cases = [
        ("unknown", Reason::NoMatch),
        ("forbidden", Reason::PolicyDeny),
        ("errors", Reason::EvaluationError),
        ("permits.with.error", Reason::EvaluationError),
        ("panics", Reason::EvaluationError),
        ("slow", Reason::Deadline),
        ("not valid", Reason::InvalidRequest),
        ("just.in.time", Reason::PolicyAllow),
        ("fs.read", Reason::PolicyAllow),
        ("fs.read", Reason::PolicyAllow),
        ("fs.read", Reason::RateLimitExceeded),
    ];
    for (index, (action, reason)) in cases.into_iter().enumerate() {
        let Outcome { answer, permit } = site.ask(action);
        assert_eq!(answer.reason, reason, "{action}");
        assert_eq!(answer.decision, reason.decision(), "{action}");
        assert_eq!(permit.is_some(), reason == Reason::PolicyAllow, "{action}");
        assert_eq!(answer.record.unwrap().index, index as u64, "{action}");
        let (class, _) = site.recorder.records().pop().unwrap();
        let allowed = reason == Reason::PolicyAllow;
        assert_eq!(
            class,
            if allowed {
                RecordClass::Decision
            } else {
                RecordClass::Denial
            }
        );
        let record = site.last_record();
        assert_eq!(record["reason"], reason.as_str(), "{action}");
        assert_eq!(record["decision"], reason.decision().as_str(), "{action}");
        assert!(answer.retry_after_ms.is_none() || reason == Reason::RateLimitExceeded);
    }
    let stats = site.interceptor.stats();
    assert_eq!(
        stats.answers.iter().map(|(_, count)| count).sum::<u64>(),
        11
    );
    assert_eq!((stats.permits, stats.panics, stats.pending), (3, 1, 0));
}

/// An engine that never comes back costs a bounded number of threads, and each request that it is
/// asked for, or that finds no thread any more, is a recorded deny with its own reason: first of the
/// caller that holds its share, then of everybody.
#[test]
fn an_engine_without_an_end_is_left_behind_and_denied() {
    let site = Site::with(|config| config.engine_wait = Duration::from_secs(1));
    assert_eq!(site.ask("fs.read").answer.reason, Reason::PolicyAllow);
    let ask = |id: &str, action: &str, reason: Reason| {
        let Outcome { answer, permit } =
            site.ask_as(&caller_named(id), Mode::Decide, &request(action));
        assert_eq!(answer.reason, reason, "{id}");
        assert_eq!(permit.is_some(), reason == Reason::PolicyAllow);
        assert_eq!(site.last_record()["reason"], reason.as_str());
    };
    let mut held = 0;
    for id in ["coder", "tester"] {
        assert!(!site.interceptor.engines_are_exhausted());
        ask(id, "fs.read", Reason::PolicyAllow);
        for _ in 0..ENGINE_WORKERS_PER_CALLER {
            ask(id, "hangs", Reason::Deadline);
            held += 1;
            let stats = site.interceptor.stats();
            assert_eq!((stats.abandoned, stats.abandoned_now), (held, held));
        }
        for action in ["hangs", "fs.read"] {
            ask(id, action, Reason::EngineExhausted);
        }
    }
    assert!(site.interceptor.engines_are_exhausted());
    ask("another", "fs.read", Reason::EngineExhausted);
    // What needs no engine is denied for its own reason, as ever.
    assert_eq!(site.ask("not valid").answer.reason, Reason::InvalidRequest);
}

#[test]
fn what_an_engine_says_of_its_errors_is_redacted_and_shown_to_explain_only() {
    let site = Site::new();
    let answer = site.ask("errors").answer;
    assert!(answer.errors.is_empty());
    assert_eq!(
        site.last_record()["errors"],
        json!(["type error, password=[redacted:key]"])
    );
    let answer = site
        .ask_as(&caller(), Mode::Explain, &request("errors"))
        .answer;
    assert_eq!(answer.errors, ["type error, password=[redacted:key]"]);
}

/// What was judged can be asked again from its record, word for word, or it is said why not.
#[test]
fn a_recorded_action_is_asked_again_as_it_was_judged() {
    let site = Site::new();
    let asked = Arc::new(Mutex::new(None));
    let hears = Arc::clone(&asked);
    let engine = ScriptedEngine::new(move |request| {
        *hears.lock().unwrap() = Some(request.clone());
        Evaluation {
            verdict: Verdict::Permit,
            policies: vec!["any".to_owned()],
            errors: Vec::new(),
        }
    });
    *site.policy.lock().unwrap() = Some(Arc::new(
        active_policy(Some(Arc::new(engine)), Source::Active, BOOT_UNIX_MS).unwrap(),
    ));
    let speaks = Caller {
        may_act_as: true,
        ..caller()
    };
    let whole = [
        request("fs.read"),
        json!({"action": "x", "resource": {"type": "Url", "id": "HTTPS://A.example:443/a/../b?q=1"},
               "params": {"n": [1, {"k": "v"}], "t": true}, "context": {"why": "because"},
               "principal": {"type": "Agent", "id": "other"}}),
        json!({"action": "x", "resource": {"type": "Note", "id": "é"}, "params": {}}),
    ];
    for request in whole {
        site.ask_as(&speaks, Mode::Decide, &request);
        let judged = asked.lock().unwrap().take().unwrap();
        let record = site.last_record();
        assert_eq!(recorded_request(&record), Ok(judged), "{request}");
        let mut forged = record.clone();
        forged["resource"]["id"] = "another".into();
        forged["resource"]["type"] = "Note".into();
        assert_eq!(recorded_request(&forged), Err(NotReplayable::Changed));
    }
    let long = "x".repeat(MAX_BODY_BYTES / 4);
    for (request, mode, why) in [
        (request("fs.read"), Mode::Explain, NotReplayable::NoDecision),
        (json!({"action": 1}), Mode::Decide, NotReplayable::Invalid),
        (
            json!({"action": "x", "resource": {"type": "Note", "id": "n"}, "params": {"password": "hunter2secret"}}),
            Mode::Decide,
            NotReplayable::Redacted,
        ),
        (
            json!({"action": "x", "resource": {"type": "Note", "id": "n"}, "params": {"t": long}}),
            Mode::Decide,
            NotReplayable::Incomplete,
        ),
    ] {
        site.ask_as(&speaks, mode, &request);
        assert_eq!(recorded_request(&site.last_record()), Err(why), "{why:?}");
    }
}

#[test]
fn explain_tells_the_decision_and_never_makes_a_permit() {
    let site = Site::new();
    let outcome = site.ask_as(&caller(), Mode::Explain, &request("fs.read"));
    assert_eq!(outcome.answer.reason, Reason::PolicyAllow);
    assert!(outcome.permit.is_none());
    assert_eq!(site.last_record()["type"], "explain");
    assert!(outcome.answer.record.is_some());
    assert!(site.ask("fs.read").permit.is_some(), "the control");
    assert_eq!(site.interceptor.stats().explains, 1);
}

#[test]
fn an_explanation_is_charged_like_a_decision() {
    let site = Site::with(|config| {
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 2,
        }
    });
    let ask = |mode| {
        let answer = site.ask_as(&caller(), mode, &request("fs.read")).answer;
        (answer.reason, answer.retry_after_ms)
    };
    let spent = (Reason::RateLimitExceeded, Some(1_000));
    let passed = (Reason::PolicyAllow, None);
    assert_eq!(ask(Mode::Explain), passed);
    assert_eq!(ask(Mode::Decide), passed);
    assert_eq!(ask(Mode::Explain), spent);
    let record = site.last_record();
    assert_eq!(
        (&record["type"], &record["reason"]),
        (&json!("explain"), &json!("RATE_LIMIT_EXCEEDED"))
    );
    assert_eq!(ask(Mode::Decide), spent);
    assert_eq!(site.evaluations.load(Ordering::SeqCst), 2);
    // What comes back goes to an explanation as to a decision.
    site.clock.advance(Duration::from_secs(1));
    assert_eq!(ask(Mode::Explain), passed);
    assert_eq!(ask(Mode::Decide), spent);
}

#[test]
fn explain_says_what_would_have_to_change() {
    let site = Site::with(|config| {
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 7,
        }
    });
    let says = |action: &str, reason: Reason, expected: &[&str]| {
        let answer = site
            .ask_as(&caller(), Mode::Explain, &request(action))
            .answer;
        assert_eq!(answer.reason, reason, "{action}");
        assert_eq!(answer.explanation.unwrap().to_allow, expected, "{action}");
    };
    says("fs.read", Reason::PolicyAllow, &[]);
    says(
        "forbidden",
        Reason::PolicyDeny,
        &["forbid forbid-it must not apply"],
    );
    says(
        "errors",
        Reason::EvaluationError,
        &["the request must fit the schema, and no policy may err; see errors"],
    );
    let posture = ["the policy must be newer, or what doctor shows of clock and disk be mended"];
    site.interceptor.set_posture_floor(Posture::Restricted);
    says("fs.write", Reason::PostureRestricted, &posture);
    site.interceptor.set_posture_floor(Posture::Closed);
    says("fs.read", Reason::PostureClosed, &posture);
    site.interceptor.set_posture_floor(Posture::Normal);
    let active = site.policy.lock().unwrap().take();
    says("fs.read", Reason::NoPolicy, &["a bundle must be installed"]);
    *site.policy.lock().unwrap() = active;
    says("fs.read", Reason::PolicyAllow, &[]);
    says(
        "fs.read",
        Reason::RateLimitExceeded,
        &["wait until the quota lets it pass"],
    );
}

#[test]
fn without_a_policy_every_action_is_denied() {
    let site = Site::new();
    let active = site.policy.lock().unwrap().take();
    let answer = site.ask("fs.read").answer;
    assert_eq!(
        (answer.reason, answer.posture),
        (Reason::NoPolicy, Posture::Closed)
    );
    assert_eq!(
        (answer.bundle, site.interceptor.posture()),
        (None, Posture::Closed)
    );
    assert_eq!(site.last_record()["reason"], "NO_POLICY");
    *site.policy.lock().unwrap() = active;
    assert_eq!(site.ask("fs.read").answer.reason, Reason::PolicyAllow);
}

#[test]
fn a_caller_cannot_state_what_the_node_states_of_itself() {
    let site = Site::new();
    let mut asked = request("fs.read");
    assert_eq!(site.ask("fs.read").answer.reason, Reason::PolicyAllow);
    let evaluated = site.evaluations.load(Ordering::SeqCst);
    asked["context"] = json!({"tidelock": {"posture": "normal", "policy_age_s": 0}});
    let outcome = site.ask_as(&caller(), Mode::Decide, &asked);
    assert_eq!(outcome.answer.reason, Reason::EvaluationError);
    assert!(outcome.permit.is_none());
    assert_eq!(site.evaluations.load(Ordering::SeqCst), evaluated);
    let errors = site.last_record()["errors"].to_string();
    assert!(errors.contains("must not contain `tidelock`"), "{errors}");
}

#[test]
fn posture_follows_the_bundles_age_and_closes_by_class() {
    // Template: stale after 7 days, restricted after 30; fs.read is still allowed then, fs.write is
    // not; closed after 180 days for fs.read, 90 for the rest.
    let site = Site::new();
    let mut day = 0;
    for (at, posture, read, write) in [
        (1, Posture::Normal, Reason::PolicyAllow, Reason::PolicyAllow),
        (8, Posture::Stale, Reason::PolicyAllow, Reason::PolicyAllow),
        (
            31,
            Posture::Restricted,
            Reason::PolicyAllow,
            Reason::PostureRestricted,
        ),
        (
            91,
            Posture::Restricted,
            Reason::PolicyAllow,
            Reason::PostureClosed,
        ),
        (
            181,
            Posture::Closed,
            Reason::PostureClosed,
            Reason::PostureClosed,
        ),
    ] {
        site.clock.advance(DAY * (at - day));
        day = at;
        let answer = site.ask("fs.read").answer;
        assert_eq!((answer.posture, answer.reason), (posture, read), "day {at}");
        assert_eq!(site.ask("fs.write").answer.reason, write, "day {at}");
        assert_eq!(site.last_record()["reason"], write.as_str(), "day {at}");
    }
    assert_eq!(site.interceptor.posture(), Posture::Closed);
}

#[test]
fn a_degraded_class_goes_on_with_a_short_durable_record_of_its_own() {
    // The template lets fs.read go on in posture restricted as `degrade`.
    let site = Site::new();
    let full = site.ask("fs.read").answer;
    assert!(site.last_record()["resource"].is_object());
    site.interceptor.set_posture_floor(Posture::Restricted);
    let degraded = site.ask("fs.read");
    let record = site.last_record();
    // INV-14 and ruling 19: an allow has its own record and position, in whatever form.
    assert!(degraded.permit.is_some());
    assert_eq!(degraded.answer.record.map(|r| r.index), Some(1));
    assert_eq!(degraded.answer.action_hash, full.action_hash);
    assert_eq!(
        record["action_hash"],
        full.action_hash.unwrap().to_string().as_str()
    );
    assert_eq!(
        (&record["type"], &record["form"], &record["decision"]),
        (&json!("decision"), &json!("short"), &json!("allow"))
    );
    assert!(
        record["caller_hash"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );
    for left_out in ["resource", "params", "caller", "principal", "policies"] {
        assert!(record.get(left_out).is_none(), "{left_out}");
    }
    // Lifted, the records are whole again.
    site.interceptor.set_posture_floor(Posture::Normal);
    site.ask("fs.read");
    assert!(site.last_record()["resource"].is_object());
}

#[test]
fn a_posture_floor_holds_whatever_the_age_and_can_be_lifted() {
    let site = Site::new();
    for (floor, read, write) in [
        (
            Posture::Closed,
            Reason::PostureClosed,
            Reason::PostureClosed,
        ),
        (
            Posture::Restricted,
            Reason::PolicyAllow,
            Reason::PostureRestricted,
        ),
        (Posture::Stale, Reason::PolicyAllow, Reason::PolicyAllow),
        (Posture::Normal, Reason::PolicyAllow, Reason::PolicyAllow),
    ] {
        site.interceptor.set_posture_floor(floor);
        assert_eq!(site.interceptor.posture_floor(), floor);
        let before = site.evaluations.load(Ordering::SeqCst);
        let answer = site.ask("fs.read").answer;
        assert_eq!((answer.reason, answer.posture), (read, floor));
        assert_eq!(site.ask("fs.write").answer.reason, write);
        let evaluated = site.evaluations.load(Ordering::SeqCst) - before;
        let expected = [read, write]
            .iter()
            .filter(|r| **r == Reason::PolicyAllow)
            .count();
        assert_eq!(
            evaluated, expected,
            "a closed gate stands before the engine"
        );
    }
}

#[test]
fn a_spent_quota_denies_after_parsing_and_before_policy() {
    let site = Site::with(|config| {
        config.quotas.principal = Rate {
            per_second: 2,
            burst: 1,
        }
    });
    assert_eq!(site.ask("fs.read").answer.reason, Reason::PolicyAllow);
    // Invalid requests are told so, spent quota or not, and cost none.
    assert_eq!(site.ask("not valid").answer.reason, Reason::InvalidRequest);
    let answer = site.ask("fs.read").answer;
    assert_eq!(answer.reason, Reason::RateLimitExceeded);
    assert_eq!(answer.retry_after_ms, Some(500));
    assert_eq!(
        site.evaluations.load(Ordering::SeqCst),
        1,
        "the engine was not asked"
    );
    site.clock.advance(MS * 500);
    assert_eq!(site.ask("fs.read").answer.reason, Reason::PolicyAllow);
}

#[test]
fn inv_13_all_quotas_hold_the_narrowest_refuses_and_a_refusal_costs_nothing() {
    let rate = |burst| {
        Some(Rate {
            per_second: 1,
            burst,
        })
    };
    let site = Site::with(|config| {
        config.quotas = QuotaRates {
            principal_action: rate(2),
            principal_resource: rate(3),
            principal: rate(4).unwrap(),
            action: rate(4),
            total: rate(7),
            ..QuotaRates::default()
        }
    });
    let ask = |who: &str, action: &str, file: &str| {
        let mut request = request(action);
        request["resource"]["id"] = json!(file);
        site.ask_as(&caller_named(who), Mode::Decide, &request)
            .answer
    };
    let passes = |who: &str, action: &str, file: &str| {
        let answer = ask(who, action, file);
        assert_ne!(answer.reason, Reason::RateLimitExceeded, "{answer:?}");
    };
    let spent = |who: &str, action: &str, file: &str, bucket: &str| {
        for _ in 0..20 {
            let answer = ask(who, action, file);
            assert_eq!(answer.reason, Reason::RateLimitExceeded);
            assert_eq!(answer.message, format!("quota {bucket} is spent"));
            assert_eq!(answer.retry_after_ms, Some(1_000));
            let record = site.last_record();
            assert_eq!(
                (&record["decision"], &record["reason"], &record["action"]),
                (
                    &json!("deny"),
                    &json!("RATE_LIMIT_EXCEEDED"),
                    &json!(action)
                )
            );
            assert_eq!(record["errors"], json!([answer.message]));
        }
    };
    passes("one", "fs.read", "/a");
    passes("one", "fs.read", "/a");
    spent("one", "fs.read", "/a", "principal_action");
    passes("one", "fs.list", "/a");
    // Another spelling is the same resource.
    spent("one", "fs.stat", "/x/../a", "principal_resource");
    passes("one", "fs.list", "/b");
    spent("one", "fs.stat", "/c", "principal");
    // The control: none of the refused ones was charged to what others share.
    passes("two", "fs.read", "/d");
    passes("three", "fs.read", "/d");
    // Four have read: who never did reads no more, and does other things all the same.
    spent("four", "fs.read", "/d", "action");
    passes("four", "fs.write", "/d");
    spent("five", "fs.write", "/d", "total");
    let refused: Vec<(&str, u64)> = site
        .interceptor
        .quota_stats()
        .iter()
        .map(|quota| (quota.bucket.as_str(), quota.stats.refused))
        .collect();
    assert_eq!(
        refused,
        [
            ("principal_action", 20),
            ("principal_resource", 20),
            ("principal", 20),
            ("caller", 0),
            ("action", 20),
            ("total", 20)
        ]
    );
    assert_eq!(site.evaluations.load(Ordering::SeqCst), 7);

    // Other rates hold at once; a rate of nothing changes nothing.
    let mut rates = QuotaRates::default();
    site.interceptor.set_quotas(&rates).unwrap();
    site.clock.advance(Duration::from_secs(5));
    passes("one", "fs.read", "/a");
    rates.principal.per_second = 0;
    assert!(site.interceptor.set_quotas(&rates).is_err());
    passes("one", "fs.read", "/a");
    // What is full again is forgotten, after its time.
    let keys = || site.interceptor.quota_stats()[2].stats.keys;
    site.clock.advance(Duration::from_secs(60));
    site.interceptor.tick();
    assert_eq!(keys(), 4);
    site.clock.advance(Duration::from_secs(600));
    site.interceptor.tick();
    assert_eq!(keys(), 0);
}

#[test]
fn inv_13_one_principals_flood_costs_another_nothing() {
    let site = Site::with(|config| {
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 5,
        }
    });
    let spent = (0..50).filter(|_| site.ask("fs.read").answer.reason != Reason::PolicyAllow);
    assert_eq!(spent.count(), 45);
    for _ in 0..5 {
        let other = site.ask_as(&caller_named("other"), Mode::Decide, &request("fs.read"));
        assert_eq!(other.answer.reason, Reason::PolicyAllow);
    }
}

#[test]
fn inv_14_no_permit_and_no_answer_before_the_record_is_durable() {
    let site = Site::new();
    site.recorder.hold();
    let (outcome, _pending) = site.start(&caller(), Mode::Decide, &request("fs.read"));
    assert_eq!(site.recorder.held(), 1);
    assert!(
        outcome.try_recv().is_err(),
        "an answer before the record is durable"
    );
    assert_eq!(site.interceptor.stats().pending, 1);
    site.recorder.release();
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(outcome.answer.reason, Reason::PolicyAllow);
    assert_eq!(
        outcome.permit.unwrap().record(),
        outcome.answer.record.unwrap()
    );
    assert_eq!(site.interceptor.stats().pending, 0);
}

#[test]
fn inv_14_a_record_that_cannot_be_made_durable_is_a_deny() {
    let site = Site::new();
    for (failure, reason) in [
        (AppendError::Capacity, Reason::AuditCapacity),
        (
            AppendError::Unavailable("eio".to_owned()),
            Reason::AuditUnavailable,
        ),
        (AppendError::QueueFull, Reason::AuditUnavailable),
        (AppendError::TooLarge, Reason::AuditUnavailable),
    ] {
        site.recorder.fail(Some(failure.clone()));
        // Whatever the policies said: what is not recorded is denied for that.
        for action in ["fs.read", "forbidden", "not valid"] {
            let Outcome { answer, permit } = site.ask(action);
            assert_eq!(
                (answer.decision, answer.reason),
                (Decision::Deny, reason),
                "{failure}"
            );
            assert!(permit.is_none() && answer.record.is_none());
        }
        assert!(site.records().is_empty());
        site.recorder.fail(None);
    }
    assert!(
        site.ask("fs.read").permit.is_some(),
        "the control: it recovers at once"
    );
}

#[test]
fn inv_14_a_late_record_makes_no_permit_and_is_marked_not_released() {
    let site = Site::new();
    site.recorder.hold();
    let (outcome, _pending) = site.start(&caller(), Mode::Decide, &request("fs.read"));
    let timeout = site.interceptor.config().append_timeout;
    site.clock.advance(timeout - MS);
    site.interceptor.tick();
    assert!(outcome.try_recv().is_err(), "not yet");
    site.clock.advance(MS);
    site.interceptor.tick();
    let answered = outcome.try_recv().unwrap();
    assert_eq!(answered.answer.reason, Reason::AuditUnavailable);
    assert!(answered.permit.is_none() && answered.answer.record.is_none());

    site.recorder.release();
    assert!(outcome.try_recv().is_err(), "one request, one outcome");
    let records = site.records();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0]["decision"], "allow");
    let leaf = Sha256Hash::of_parts(&[&[0], &site.recorder.records()[0].1]);
    assert_eq!(
        records[1],
        json!({
            "v": 1, "type": "outcome", "at": BOOT_UNIX_MS + 250, "node": "node-a",
            "outcome": "not_released", "decision_index": 0, "decision_leaf": leaf.to_string(),
            "reason": "AUDIT_UNAVAILABLE",
        })
    );
    assert_eq!(site.recorder.records()[1].0, RecordClass::State);
    let stats = site.interceptor.stats();
    assert_eq!((stats.permits, stats.not_released), (0, 1));
}

#[test]
fn inv_14_giving_up_and_completing_race_to_exactly_one_outcome() {
    let site = Site::new();
    // Given up by hand, then late: as with a timeout.
    site.recorder.hold();
    let (outcome, pending) = site.start(&caller(), Mode::Decide, &request("fs.read"));
    pending.give_up();
    pending.give_up();
    assert_eq!(
        outcome.try_recv().unwrap().answer.reason,
        Reason::AuditUnavailable
    );
    site.recorder.release();
    assert_eq!(site.records().len(), 2);

    // Complete, then given up: the answer stands and nothing more is recorded.
    let (outcome, pending) = site.start(&caller(), Mode::Decide, &request("fs.read"));
    pending.give_up();
    assert!(outcome.try_recv().unwrap().permit.is_some());
    assert!(outcome.try_recv().is_err());
    assert_eq!(site.records().len(), 3);

    // A late deny needs no outcome record: it released nothing.
    site.recorder.hold();
    let (outcome, pending) = site.start(&caller(), Mode::Decide, &request("forbidden"));
    pending.give_up();
    site.recorder.release();
    assert_eq!(
        outcome.try_recv().unwrap().answer.reason,
        Reason::AuditUnavailable
    );
    assert_eq!(site.records().len(), 4);

    // Real threads, many times: never two outcomes, never a permit beside `not_released`.
    for _ in 0..200 {
        let before = site.interceptor.stats();
        site.recorder.hold();
        let (outcome, pending) = site.start(&caller(), Mode::Decide, &request("fs.read"));
        std::thread::scope(|scope| {
            scope.spawn(|| site.recorder.release());
            scope.spawn(|| pending.give_up());
        });
        let permit = outcome.try_recv().unwrap().permit.is_some();
        assert!(outcome.try_recv().is_err());
        let not_released = site.interceptor.stats().not_released - before.not_released;
        assert_eq!(not_released, u64::from(!permit));
    }
}

/// Nobody's thread waits for an engine, and who does not wait for one gets no permit by it.
#[test]
fn inv_14_giving_up_while_the_engine_judges_leaves_a_recorded_deny() {
    let site = Site::new();
    let gate = Arc::new(Mutex::new(()));
    let held = gate.clone();
    let engine = Arc::new(ScriptedEngine::new(move |_| {
        drop(held.lock().unwrap());
        Evaluation {
            verdict: Verdict::Permit,
            policies: vec!["permit-it".to_owned()],
            errors: Vec::new(),
        }
    }));
    let active = active_policy(Some(engine), Source::Active, BOOT_UNIX_MS).unwrap();
    *site.policy.lock().unwrap() = Some(Arc::new(active));
    for gives_up in [true, false] {
        site.judged();
        let shut = gate.lock().unwrap();
        let (outcome, pending) = site.hand_over(&caller(), Mode::Decide, &request("fs.read"));
        assert_eq!(site.interceptor.stats().evaluating, 1);
        if gives_up {
            pending.give_up();
        }
        assert!(outcome.try_recv().is_err(), "there is nothing to say yet");
        drop(shut);
        let Outcome { answer, permit } = outcome.recv().unwrap();
        // The control: who waits is allowed.
        let (reason, errors) = match gives_up {
            true => (
                Reason::Deadline,
                json!(["the caller did not wait for the policy engine"]),
            ),
            false => (Reason::PolicyAllow, Value::Null),
        };
        assert_eq!(answer.reason, reason);
        assert_eq!(permit.is_some(), !gives_up);
        assert_eq!(site.last_record()["reason"], reason.as_str());
        assert_eq!(site.last_record()["errors"], errors);
    }
    assert_eq!(site.records().len(), 2);
}

#[test]
fn inv_14_waiting_for_a_recorder_that_never_answers_ends_in_a_deny() {
    let site = Site::with(|config| config.append_timeout = MS * 20);
    site.recorder.hold();
    let body = request("fs.read").to_string();
    let outcome = site
        .interceptor
        .decide_wait(body.as_bytes(), &caller(), Mode::Decide);
    assert_eq!(outcome.answer.reason, Reason::AuditUnavailable);
    assert!(outcome.permit.is_none());
    site.recorder.release();
    let outcome = site
        .interceptor
        .decide_wait(body.as_bytes(), &caller(), Mode::Decide);
    assert!(outcome.permit.is_some(), "the control");
}

#[test]
fn inv_07_requests_without_a_record_yet_are_limited() {
    let site = Site::with(|config| {
        config.quotas.caller = None;
        config.quotas.principal = Rate {
            per_second: 1,
            burst: u32::MAX,
        }
    });
    site.recorder.hold();
    let waiting: Vec<_> = (0..MAX_PENDING)
        .map(|number| {
            if number % 64 == 0 {
                site.judged();
            }
            site.hand_over(&caller(), Mode::Decide, &request("fs.read"))
                .0
        })
        .collect();
    site.judged();
    assert_eq!(site.ask("fs.read").answer.reason, Reason::AuditUnavailable);
    site.recorder.release();
    assert!(
        waiting
            .iter()
            .all(|outcome| outcome.try_recv().unwrap().permit.is_some())
    );
    assert!(site.ask("fs.read").permit.is_some(), "room again");
}

#[test]
fn inv_15_what_was_judged_is_what_is_recorded_and_permitted() {
    let site = Site::new();
    let seen: Arc<Mutex<Option<PolicyRequest>>> = Arc::default();
    let engine = {
        let seen = seen.clone();
        Arc::new(ScriptedEngine::new(move |request| {
            *seen.lock().unwrap() = Some(request.clone());
            evaluation(Verdict::Permit, &["p"], &[])
        }))
    };
    let active = active_policy(Some(engine), Source::Active, BOOT_UNIX_MS).unwrap();
    *site.policy.lock().unwrap() = Some(Arc::new(active));
    // Spelt as awkwardly as is allowed.
    let body = br#"{"resource":{"id":"/srv/%61/../x/","type":"File"},"context":{"n":1e2},
        "params":{"z":-0.0,"a":"\u0041"},"action":"fs.read"}"#;
    let outcome = site.interceptor.decide_wait(body, &caller(), Mode::Decide);
    let action = outcome.permit.unwrap().into_action();
    let judged = seen.lock().unwrap().take().unwrap();
    let record = site.last_record();
    assert_eq!(judged.resource_id, "/srv/x");
    assert_eq!(judged.params, json!({"a": "A", "z": 0}));
    assert_eq!(judged.context, json!({"n": 100}));
    assert_eq!(
        (
            action.name(),
            action.resource_id(),
            action.params(),
            action.context()
        ),
        (
            judged.action.as_str(),
            "/srv/x",
            &judged.params,
            &judged.context
        )
    );
    assert_eq!(action.resource_attributes(), &judged.resource_attributes);
    assert_eq!(record["resource"]["id"], "/srv/x");
    assert_eq!(
        (&record["params"], &record["context"]),
        (&judged.params, &judged.context)
    );
    // The recorded hash can be recomputed from the record alone.
    let again = json!({
        "action": record["action"], "resource": record["resource"],
        "params": record["params"], "context": record["context"],
        "principal": record["principal"],
    });
    let again = Action::parse(again.to_string().as_bytes(), &caller()).unwrap();
    assert_eq!(record["action_hash"], again.hash().to_string());
    assert_eq!(again.hash(), action.hash());
}

#[test]
fn inv_15_a_request_with_two_readings_is_denied_recorded_and_never_judged() {
    let site = Site::new();
    for (body, code) in [
        (
            r#"{"action":"fs.read","action":"fs.write"}"#,
            "duplicate_key",
        ),
        (
            r#"{"action":"fs.read","Action":"fs.write"}"#,
            "ambiguous_key",
        ),
        (
            r#"{"action":"fs.read","resource":{"type":"File","id":"/a/%2e%2e%2fb"}}"#,
            "resource",
        ),
        (
            r#"{"action":"fs.read","resource":{"type":"File","id":"/a"}}x"#,
            "trailing_bytes",
        ),
        (
            r#"{"action":"fs.read","resource":{"type":"File","id":"/a"},"x":1}"#,
            "unknown_field",
        ),
        ("", "syntax"),
    ] {
        let outcome = site
            .interceptor
            .decide_wait(body.as_bytes(), &caller(), Mode::Decide);
        assert_eq!(outcome.answer.reason, Reason::InvalidRequest, "{body}");
        assert!(outcome.permit.is_none());
        assert!(
            outcome.answer.message.starts_with(code),
            "{}",
            outcome.answer.message
        );
        let record = site.last_record();
        assert_eq!(record["invalid"]["code"], code);
        assert_eq!(record["invalid"]["body_bytes"], body.len());
        assert_eq!(record.get("action"), None);
    }
    assert_eq!(site.evaluations.load(Ordering::SeqCst), 0);
    assert!(site.ask("fs.read").permit.is_some(), "the control");
}

#[test]
fn secrets_reach_the_executor_but_no_record_and_no_answer() {
    let site = Site::new();
    let secret = "hunter2secret";
    let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlLWJ5dGVz";
    let request = json!({
        "action": "fs.write",
        "resource": {"type": "Url", "id": format!("https://a.example/x?access_token={secret}")},
        "params": {
            "headers": {"Authorization": format!("Bearer {jwt}"), "Accept": "text/html"},
            "argv": ["--password", secret], "keep": "this text",
        },
        "context": {"note": format!("token={secret}")},
        "id": format!("password={secret}"),
    });
    let outcome = site.ask_as(&caller(), Mode::Decide, &request);
    let answer = serde_json::to_string(&outcome.answer).unwrap();
    let record = String::from_utf8(site.recorder.records().remove(0).1).unwrap();
    for text in [&answer, &record] {
        assert!(!text.contains(secret) && !text.contains("eyJ"), "{text}");
    }
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(
        record["params"]["headers"]["Accept"], "text/html",
        "structure is kept"
    );
    assert_eq!(record["params"]["keep"], "this text");
    assert_eq!(record["redacted"], 4);
    // Hashes in records are those of what is recorded: nobody can test guesses of the secret.
    let action = outcome.permit.unwrap().into_action();
    assert!(
        action
            .canonical()
            .windows(secret.len())
            .any(|w| w == secret.as_bytes())
    );
    assert_ne!(record["action_hash"], action.hash().to_string());
    assert_eq!(
        record["action_hash"],
        outcome.answer.action_hash.unwrap().to_string()
    );
    assert_ne!(record["params_hash"], action.params_hash().to_string());
    let shown = serde_json_canonicalizer::to_vec(&record["params"]).unwrap();
    assert_eq!(record["params_hash"], Sha256Hash::of(&shown).to_string());
    assert_eq!(site.interceptor.stats().redactions, 4);
}

#[test]
fn invalid_requests_leak_no_secret_either() {
    let site = Site::new();
    let key = "AKIAIOSFODNN7EXAMPLE";
    let body =
        format!(r#"{{"action":"fs.read","{key}":1,"resource":{{"type":"File","id":"/x"}}}}"#);
    let outcome = site
        .interceptor
        .decide_wait(body.as_bytes(), &caller(), Mode::Decide);
    assert_eq!(outcome.answer.reason, Reason::InvalidRequest);
    assert!(
        outcome.answer.message.contains("[redacted:aws]"),
        "{}",
        outcome.answer.message
    );
    assert!(!site.last_record().to_string().contains(key));
}

#[test]
fn records_stay_within_their_limit_whatever_is_asked() {
    let site = Site::new();
    let body_left = MAX_BODY_BYTES - 400;
    let quotes = "\"".repeat(body_left / 2);
    let secrets = "pwd=x&".repeat(600);
    for request in [
        json!({"action": "fs.read", "resource": {"type": "File", "id": "/x"}, "params": {"p": quotes}}),
        json!({"action": "fs.read", "resource": {"type": "File", "id": "/x"}, "context": {"c": quotes}}),
        json!({"action": "many", "resource": {"type": "File", "id": format!("/{}", "\"/".repeat(2000))}}),
        json!({"action": "many", "resource": {"type": "Note", "id": secrets}}),
        json!({
            "action": "many", "resource": {"type": "Note", "id": secrets},
            "params": {"p": "pwd=x&".repeat(1300)}, "context": {"c": "pwd=x&".repeat(1300)},
        }),
    ] {
        let outcome = site.ask_as(&caller(), Mode::Decide, &request);
        assert!(outcome.answer.record.is_some());
        let (_, bytes) = site.recorder.records().pop().unwrap();
        assert!(bytes.len() <= MAX_RECORD_BYTES, "{}", bytes.len());
        let record = site.last_record();
        assert!(record["action_hash"].is_string() && record["params_hash"].is_string());
    }
    let outcome = site.ask("many");
    assert_eq!(outcome.answer.policies.len(), 32);
    assert_eq!(site.last_record()["policies_total"], 5_000);
    // What is not carried in full is named.
    let big = json!({
        "action": "fs.read", "resource": {"type": "File", "id": "/x"}, "params": {"p": quotes},
    });
    let _ = site.ask_as(&caller(), Mode::Decide, &big);
    assert_eq!(site.last_record()["omitted"], json!(["params"]));
}

#[test]
fn denials_are_recorded_up_to_a_budget_then_summarised_with_exact_counts() {
    let site = Site::with(|config| {
        config.denial_bytes = Rate {
            per_second: 1,
            burst: 70_000,
        };
        config.quotas.principal = Rate {
            per_second: 1,
            burst: u32::MAX,
        };
    });
    let mut recorded = 0_u64;
    let mut windows = Vec::new();
    for _ in 0..1_000 {
        let answer = site.ask("unknown").answer;
        assert_eq!(answer.reason, Reason::NoMatch);
        match (answer.record, answer.window) {
            (Some(_), None) => recorded += 1,
            (None, Some(window)) => windows.push(window),
            other => panic!("{other:?}"),
        }
    }
    assert!(recorded > 50 && recorded < 500, "{recorded}");
    assert_eq!(site.records().len() as u64, recorded);
    windows.dedup();
    assert_eq!(windows.len(), 1);
    // Another principal has its own budget, and an allow is always recorded by itself.
    let other = site.ask_as(&caller_named("other"), Mode::Decide, &request("unknown"));
    assert!(other.answer.record.is_some());
    assert!(site.ask("fs.read").permit.is_some());

    site.interceptor.tick();
    assert_eq!(
        site.records().len() as u64,
        recorded + 2,
        "the window is still open"
    );
    site.clock.advance(site.interceptor.config().summary_window);
    site.interceptor.tick();
    let record = site.last_record();
    assert_eq!(record["type"], "denials");
    assert_eq!(record["first_window"], windows[0].as_str());
    assert_eq!(
        record["principals"],
        json!([{"type": "Agent", "id": "coder", "counts": {"NO_MATCH": 1_000 - recorded}}])
    );
    assert_eq!(site.interceptor.stats().summarised, 1_000 - recorded);
}

#[test]
fn a_flood_past_the_quota_is_recorded_up_to_a_budget_then_counted_exactly() {
    let site = Site::with(|config| {
        config.denial_bytes = Rate {
            per_second: 1,
            burst: 70_000,
        };
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 3,
        };
    });
    let (mut allowed, mut recorded, mut counted) = (0_u64, 0_u64, 0_u64);
    for _ in 0..1_000 {
        let Outcome { answer, permit } = site.ask("fs.read");
        match (answer.reason, answer.record, &answer.window) {
            (Reason::PolicyAllow, Some(_), None) if permit.is_some() => allowed += 1,
            (Reason::RateLimitExceeded, Some(_), None) => recorded += 1,
            (Reason::RateLimitExceeded, None, Some(_)) => counted += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((allowed, recorded + counted), (3, 997));
    assert!(recorded > 50 && recorded < 500, "{recorded}");
    let of_reason = |reason: &str| {
        let records = site.records();
        records.iter().filter(|r| r["reason"] == reason).count() as u64
    };
    assert_eq!(of_reason("RATE_LIMIT_EXCEEDED"), recorded);
    assert_eq!(of_reason("POLICY_ALLOW"), 3, "the control");
    // Another one's refusal has a record of its own: its budget is not spent.
    let other = || site.ask_as(&caller_named("other"), Mode::Decide, &request("fs.read"));
    let answers: Vec<_> = (0..4).map(|_| other().answer).collect();
    let refused = answers.last().unwrap();
    assert_eq!(refused.reason, Reason::RateLimitExceeded);
    assert!(refused.record.is_some());

    site.clock.advance(site.interceptor.config().summary_window);
    site.interceptor.tick();
    let window = site.last_record();
    assert_eq!(window["type"], "denials");
    assert_eq!(
        window["principals"],
        json!([{"type": "Agent", "id": "coder", "counts": {"RATE_LIMIT_EXCEEDED": counted}}])
    );
    assert_eq!(window["other"], json!({}));
    assert_eq!(site.interceptor.stats().summarised, counted);
}

#[test]
fn answers_without_a_record_are_counted_and_the_count_outlives_a_full_log() {
    let site = Site::new();
    site.recorder.fail(Some(AppendError::Capacity));
    for _ in 0..7 {
        assert_eq!(site.ask("fs.read").answer.reason, Reason::AuditCapacity);
    }
    // The summary meets the same full log, again and again, and keeps its counts.
    for _ in 0..3 {
        site.clock.advance(site.interceptor.config().summary_window);
        site.interceptor.tick();
    }
    site.recorder.fail(Some(AppendError::QueueFull));
    assert_eq!(site.ask("fs.read").answer.reason, Reason::AuditUnavailable);
    site.recorder.fail(None);
    site.interceptor.flush_summary();
    let records = site.records();
    assert_eq!(records.len(), 1);
    assert_eq!(
        records[0]["unrecorded"],
        json!({"AUDIT_CAPACITY": 7, "AUDIT_UNAVAILABLE": 1})
    );
    site.interceptor.flush_summary();
    assert_eq!(site.records().len(), 1, "an empty window writes nothing");
}

#[test]
fn events_are_state_records_without_secrets() {
    let site = Site::new();
    site.interceptor
        .record_event("policy_activated", &json!({"epoch": 2, "token": "s3cr3t"}));
    assert_eq!(site.recorder.records()[0].0, RecordClass::State);
    assert_eq!(
        site.last_record(),
        json!({
            "v": 1, "type": "policy_activated", "at": BOOT_UNIX_MS, "node": "node-a",
            "detail": {"epoch": 2, "token": "[redacted:key]"},
        })
    );
    site.interceptor
        .record_event("big", &json!({"x": "y".repeat(60_000)}));
    assert_eq!(
        site.last_record()["detail"],
        json!({"omitted_bytes": 60_008})
    );
    site.recorder.fail(Some(AppendError::Capacity));
    site.interceptor.record_event("lost", &json!({}));
    assert_eq!(site.interceptor.stats().records_lost, 1);
}

#[test]
fn a_malformed_caller_is_refused_and_recorded() {
    let site = Site::new();
    for bad in ["", "a\u{202e}b", &"x".repeat(300)] {
        let outcome = site.ask_as(&caller_named(bad), Mode::Decide, &request("fs.read"));
        assert_eq!(outcome.answer.reason, Reason::InvalidRequest, "{bad:?}");
        assert!(outcome.answer.record.is_some());
    }
}

#[test]
fn nonsense_is_refused_by_the_constructor() {
    let make = |change: fn(&mut InterceptorConfig)| {
        let mut config = InterceptorConfig::new(NodeId::new("a").unwrap());
        change(&mut config);
        let clock = TestClock::new(0);
        Interceptor::new(config, clock, Arc::new(|| None), MemoryRecorder::new()).err()
    };
    assert_eq!(make(|_| {}), None);
    for change in [
        (|c| c.engine_budget = Duration::ZERO) as fn(&mut InterceptorConfig),
        |c| c.engine_wait = Duration::ZERO,
        |c| c.append_timeout = Duration::ZERO,
        |c| c.summary_window = Duration::ZERO,
    ] {
        assert!(matches!(
            make(change),
            Some(InterceptorConfigError::ZeroDuration { .. })
        ));
    }
    assert_eq!(
        make(|c| c.denial_bytes.burst = 1_000),
        Some(InterceptorConfigError::DenialBurst { burst: 1_000 })
    );
    assert!(matches!(
        make(|c| c.quotas.principal.per_second = 0),
        Some(InterceptorConfigError::Actions(_))
    ));
    assert!(matches!(
        make(|c| c.denial_bytes.per_second = 0),
        Some(InterceptorConfigError::DenialBytes(_))
    ));
}

/// A policy that permits, and leaves `next` in force when it has answered.
fn leaving(
    policy: &Arc<Mutex<Option<Arc<ActivePolicy>>>>,
    next: impl Fn() -> Arc<ActivePolicy> + Send + Sync + 'static,
) -> Arc<ActivePolicy> {
    let policy = policy.clone();
    let engine = ScriptedEngine::new(move |_| {
        *policy.lock().unwrap() = Some(next());
        evaluation(Verdict::Permit, &["old"], &[])
    });
    Arc::new(active_policy(Some(Arc::new(engine)), Source::Active, BOOT_UNIX_MS).unwrap())
}

/// Always another one.
fn never_the_same(policy: &Arc<Mutex<Option<Arc<ActivePolicy>>>>) -> Arc<ActivePolicy> {
    let again = policy.clone();
    leaving(policy, move || never_the_same(&again))
}

fn forbidding() -> Arc<ActivePolicy> {
    let engine = ScriptedEngine::new(|_| evaluation(Verdict::Forbid, &["new"], &[]));
    Arc::new(active_policy(Some(Arc::new(engine)), Source::Active, BOOT_UNIX_MS).unwrap())
}

#[test]
fn an_allow_is_of_the_policy_in_force_when_the_engine_has_answered() {
    let site = Site::new();
    assert_eq!(
        site.ask("fs.read").answer.reason,
        Reason::PolicyAllow,
        "the control"
    );
    *site.policy.lock().unwrap() = Some(leaving(&site.policy, forbidding));
    let outcome = site.ask("fs.read");
    assert_eq!(outcome.answer.reason, Reason::PolicyDeny);
    assert_eq!(outcome.answer.policies, ["new"]);
    assert!(outcome.permit.is_none());
    // Where it never comes to rest nothing is allowed.
    *site.policy.lock().unwrap() = Some(never_the_same(&site.policy));
    let outcome = site.ask("fs.read");
    assert_eq!(outcome.answer.reason, Reason::Deadline);
    assert!(outcome.permit.is_none());
}

/// INV-07: what the evaluations of a batch inherit is copied for each, so it is bounded by their number.
#[test]
fn inv_07_what_the_evaluations_of_a_batch_inherit_is_bounded() {
    let batch = |bytes: usize, count: usize| {
        let request = json!({
            "subject": {"type": "Agent", "id": "coder"}, "action": {"name": "fs.read"},
            "resource": {"type": "File", "id": "/srv/x"}, "context": {"a": "x".repeat(bytes)},
            "evaluations": vec![json!({}); count],
        });
        Evaluations::read(request.to_string().as_bytes(), None)
    };
    for (bytes, count) in [
        (MAX_INHERITED_BYTES / 64, 64),
        (32 * 1024, 4),
        (MAX_INHERITED_BYTES / 3, 3),
    ] {
        let Evaluations::One(refused) = batch(bytes, count) else {
            panic!("{bytes} bytes for {count}");
        };
        let refusal = refused.refusal(&caller()).unwrap();
        assert_eq!(refusal.code(), InvalidCode::TooLarge);
        // The control: a little less.
        let Evaluations::Batch(_, items) = batch(bytes - 64, count) else {
            panic!("{bytes} bytes for {count}");
        };
        assert_eq!(items.len(), count);
        assert!(items.iter().all(|item| item.refusal(&caller()).is_none()));
    }
}
