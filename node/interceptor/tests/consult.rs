//! Actions that a bundle refers to a decision point: the whole way of a decision, with a decision point that
//! answers when it is told to, a clock that stands still and a scripted engine.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of test functions"
)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_interceptor::{
    AnswerDone, AppendDone, Ask, Caller, ConsultFailure, Decision, Found, Heard, Interceptor,
    InterceptorConfig, KeptAnswers, Mode, Outcome, Pending, Question, Reason, Recorder, Search,
    SearchFor, UpstreamAnswer, UpstreamIdentity, Upstreams,
    testing::{MemoryRecorder, TestClock},
};
use tidelock_policy::{
    ActivePolicy, Evaluation, Posture, Source, Verdict,
    testing::{ScriptedEngine, active_policy_with},
};
use tidelock_segments::{NodeId, RecordClass, Sha256Hash};

const BOOT_UNIX_MS: u64 = 1_700_000_000_000;
const S: Duration = Duration::from_secs(1);

/// A decision point that is asked and answers later.
#[derive(Default)]
struct Authority {
    asked: Mutex<Vec<(Question, AnswerDone)>>,
    withdrawn: Mutex<Vec<Value>>,
    seen: AtomicUsize,
    /// Another one for each number.
    who: Mutex<u8>,
}

/// A log that does something before it takes the next record.
struct Hooked {
    recorder: Arc<MemoryRecorder>,
    hook: Arc<Mutex<Option<Pending>>>,
}

impl Recorder for Hooked {
    fn submit(&self, class: RecordClass, record: Vec<u8>, done: AppendDone) {
        let gives_up = self.hook.lock().unwrap().take();
        if let Some(pending) = gives_up {
            pending.give_up();
        }
        self.recorder.submit(class, record, done);
    }
}

impl Upstreams for Authority {
    fn identity(&self, name: &str) -> Option<UpstreamIdentity> {
        (name == "authority").then(|| UpstreamIdentity {
            digest: Sha256Hash::of(&[*self.who.lock().unwrap()]),
            signs: false,
        })
    }

    fn ask(&self, question: Question, done: AnswerDone) {
        self.seen.fetch_add(1, Ordering::SeqCst);
        self.asked.lock().unwrap().push((question, done));
    }

    fn withdrawn(&self, kept: &dyn Fn() -> KeptAnswers) {
        let kept = serde_json::to_value(kept()).unwrap();
        self.withdrawn.lock().unwrap().push(kept);
    }
}

impl Authority {
    fn take(&self) -> (Question, AnswerDone) {
        self.asked.lock().unwrap().remove(0)
    }

    fn waits(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    /// Answers the oldest question.
    fn says(&self, body: &Value) {
        let (question, done) = self.take();
        let body = body.to_string();
        let heard = Heard {
            status: 200,
            echoed_id: Some(b"id"),
            body: body.as_bytes(),
        };
        done(UpstreamAnswer::read(&question, "id", heard, None));
    }

    fn is_away(&self) {
        self.take().1(Err(ConsultFailure::Unreachable("gone".to_owned())));
    }
}

fn consult(when: &str) -> Value {
    let lifetime = if when == "cached" { 600 } else { 0 };
    json!({"upstream": "authority", "deadline_ms": 500, "when_unreachable": when,
           "allow_lifetime_s": lifetime, "deny_lifetime_s": 600})
}

struct Site {
    interceptor: Interceptor,
    recorder: Arc<MemoryRecorder>,
    /// Who gives up the moment that the next record is handed over.
    gives_up: Arc<Mutex<Option<Pending>>>,
    clock: Arc<TestClock>,
    policy: Arc<Mutex<Option<Arc<ActivePolicy>>>>,
    authority: Arc<Authority>,
    verdict: Arc<Mutex<Verdict>>,
    evaluations: Arc<AtomicUsize>,
}

impl Site {
    fn new(when: &str) -> Self {
        Self::from(when, None)
    }

    fn from(when: &str, other: Option<&Self>) -> Self {
        let clock = match other {
            Some(other) => other.clock.clone(),
            None => TestClock::new(BOOT_UNIX_MS),
        };
        let recorder = MemoryRecorder::new();
        let policy = match other {
            Some(other) => other.policy.clone(),
            None => Arc::default(),
        };
        let mut config = InterceptorConfig::new(NodeId::new("node-a").unwrap());
        config.engine_wait = Duration::from_secs(60);
        let source = policy.clone();
        let gives_up: Arc<Mutex<Option<Pending>>> = Arc::default();
        let interceptor = Interceptor::new(
            config,
            clock.clone(),
            Arc::new(move || source.lock().unwrap().clone()),
            Arc::new(Hooked {
                recorder: recorder.clone(),
                hook: gives_up.clone(),
            }),
        )
        .unwrap();
        let authority = Arc::new(Authority::default());
        interceptor.set_upstreams(authority.clone());
        let site = Self {
            interceptor,
            recorder,
            gives_up,
            clock,
            policy,
            authority,
            verdict: Arc::new(Mutex::new(Verdict::Permit)),
            evaluations: Arc::default(),
        };
        if other.is_none() {
            site.activate(1, Some(consult(when)));
        }
        site.interceptor.tick();
        site
    }

    /// A bundle whose class of effects is referred to the authority on these terms.
    fn activate(&self, epoch: u64, terms: Option<Value>) {
        let (verdict, evaluations) = (self.verdict.clone(), self.evaluations.clone());
        let engine = Arc::new(ScriptedEngine::new(move |_| {
            evaluations.fetch_add(1, Ordering::SeqCst);
            let verdict = *verdict.lock().unwrap();
            Evaluation {
                verdict,
                policies: vec!["it".to_owned()],
                errors: match verdict {
                    Verdict::Error => vec!["it errs".to_owned()],
                    _ => Vec::new(),
                },
            }
        }));
        let active = active_policy_with(Some(engine), Source::Active, BOOT_UNIX_MS, |manifest| {
            manifest["epoch"] = epoch.into();
            if let Some(terms) = &terms {
                manifest["classes"]["effect"]["consult"] = terms.clone();
            }
        });
        *self.policy.lock().unwrap() = Some(Arc::new(active.unwrap()));
    }

    fn start(&self, mode: Mode, request: &Value) -> (mpsc::Receiver<Outcome>, Pending) {
        self.start_ask(mode, Ask::Native(request.to_string().as_bytes()))
    }

    fn start_ask(&self, mode: Mode, ask: Ask<'_>) -> (mpsc::Receiver<Outcome>, Pending) {
        let (sender, receiver) = mpsc::channel();
        let pending = self.interceptor.decide_ask(
            ask,
            &caller(),
            mode,
            // Nobody may wait any more.
            Box::new(move |outcome| drop(sender.send(outcome))),
        );
        // Until the engines have said all that they were asked.
        while self.interceptor.stats().evaluating > 0 {
            std::thread::yield_now();
        }
        (receiver, pending)
    }

    /// Asks for a write, which the authority answers so.
    fn decide(&self, answer: impl FnOnce(&Authority)) -> Outcome {
        let (outcome, _pending) = self.start(Mode::Decide, &write("/srv/x"));
        assert!(outcome.try_recv().is_err(), "it waits for the authority");
        answer(&self.authority);
        outcome.try_recv().unwrap()
    }

    /// The same write as [`Site::decide`], as a question that says it came through these nodes.
    fn relayed(&self, via: &[&str], answer: impl FnOnce(&Authority)) -> Outcome {
        let evaluation = relayed_write("/srv/x", via);
        let (outcome, _pending) = self.start_ask(Mode::Decide, Ask::Evaluation(&evaluation));
        assert!(outcome.try_recv().is_err(), "it waits for the authority");
        answer(&self.authority);
        outcome.try_recv().unwrap()
    }

    fn records(&self) -> Vec<Value> {
        let records = self.recorder.records();
        let records = records.iter();
        records
            .map(|(_, bytes)| serde_json::from_slice(bytes).unwrap())
            .collect()
    }

    fn last_record(&self) -> Value {
        self.records().pop().unwrap()
    }
}

fn caller() -> Caller {
    Caller {
        principal_type: "Agent".to_owned(),
        principal_id: "coder".to_owned(),
        may_act_as: true,
        door: "test",
        stated_by: None,
    }
}

fn write(path: &str) -> Value {
    json!({"action": "fs.write", "resource": {"type": "File", "id": path}, "params": {"n": 1}})
}

fn relayed_write(path: &str, via: &[&str]) -> tidelock_interceptor::Evaluation {
    let body = json!({
        "subject": {"type": "Agent", "id": "coder"},
        "action": {"name": "fs.write", "properties": {"n": 1}},
        "resource": {"type": "File", "id": path},
        "tidelock": {"via": via},
    });
    tidelock_interceptor::Evaluation::read(body.to_string().as_bytes(), None)
}

fn yes() -> Value {
    json!({"decision": true, "context": {"reason": "two signatures", "obligations": []}})
}

fn no() -> Value {
    json!({"decision": false, "context": {"reason": "not today"}})
}

fn said(outcome: &Outcome) -> (Decision, Reason, bool) {
    let answer = &outcome.answer;
    (answer.decision, answer.reason, outcome.permit.is_some())
}

const ALLOWED: (Decision, Reason, bool) = (Decision::Allow, Reason::PolicyAllow, true);

#[test]
fn a_local_permit_stands_only_with_the_word_of_its_decision_point() {
    let site = Site::new("deny");
    let outcome = site.decide(|authority| authority.says(&yes()));
    assert_eq!(said(&outcome), ALLOWED);
    let record = site.last_record();
    let consult = &record["consult"];
    assert_eq!(consult["upstream"], "authority");
    assert_eq!(
        (&consult["outcome"], &consult["fallback"]),
        (&json!("allow"), &json!("none"))
    );
    assert_eq!(consult["why"], "two signatures");
    assert_eq!(consult["answered_unix_ms"], BOOT_UNIX_MS);
    assert!(consult["answer"].as_str().unwrap().starts_with("sha256:"));

    let outcome = site.decide(|authority| authority.says(&no()));
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultDenied, false)
    );
    assert_eq!(site.last_record()["consult"]["outcome"], "deny");
    assert_eq!(
        outcome.answer.consult.as_ref().unwrap().why.as_deref(),
        Some("not today")
    );

    let held = json!({"decision": false, "context": {"hold": true}});
    let outcome = site.decide(|authority| authority.says(&held));
    assert_eq!(said(&outcome), (Decision::Hold, Reason::ConsultHeld, false));

    let outcome = site.decide(|authority| authority.says(&json!({"decision": "yes"})));
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultInvalid, false)
    );
    assert_eq!(site.last_record()["consult"]["fallback"], "denied");

    let outcome = site.decide(Authority::is_away);
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultUnreachable, false)
    );
    let outcome = site.decide(|authority| authority.take().1(Err(ConsultFailure::Timeout)));
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultTimeout, false)
    );
    // Another class is nobody's business but the bundle's.
    let seen = site.authority.seen.load(Ordering::SeqCst);
    let read = json!({"action": "fs.read", "resource": {"type": "File", "id": "/srv/x"}});
    let (outcome, _pending) = site.start(Mode::Decide, &read);
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(said(&outcome), ALLOWED);
    assert!(site.last_record().get("consult").is_none() && outcome.answer.consult.is_none());
    assert_eq!(site.authority.seen.load(Ordering::SeqCst), seen);
}

#[test]
fn denials_that_are_summarised_are_counted_by_what_the_decision_point_said() {
    let site = Site::new("deny");
    let line = |outcome: &str, fallback: &str, count: u64| json!({"upstream": "authority", "outcome": outcome, "fallback": fallback, "count": count});
    let (mut denied, mut invalid) = (0, 0);
    // As long as they have records of their own nothing is counted.
    while denied < 5 || invalid < 5 {
        let outcome = site.decide(|authority| authority.says(&no()));
        denied += u64::from(outcome.answer.window.is_some());
        let outcome = site.decide(|authority| authority.says(&json!({"decision": "perhaps"})));
        invalid += u64::from(outcome.answer.window.is_some());
        assert!(
            site.records().len() < 10_000,
            "the budget of denials has an end"
        );
    }
    site.clock.advance(site.interceptor.config().summary_window);
    site.interceptor.tick();
    let record = site.last_record();
    assert_eq!(record["type"], "denials");
    assert_eq!(
        record["consults"],
        json!([
            line("deny", "none", denied),
            line("invalid", "denied", invalid)
        ])
    );
}

#[test]
fn what_is_no_local_permit_is_final_and_nobody_is_asked() {
    let site = Site::new("cached");
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
    let seen = site.authority.seen.load(Ordering::SeqCst);
    for (verdict, reason) in [
        (Verdict::Forbid, Reason::PolicyDeny),
        (Verdict::NoMatch, Reason::NoMatch),
        (Verdict::Error, Reason::EvaluationError),
    ] {
        *site.verdict.lock().unwrap() = verdict;
        let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
        let outcome = outcome.try_recv().unwrap();
        assert_eq!(said(&outcome), (Decision::Deny, reason, false));
    }
    assert_eq!(site.authority.seen.load(Ordering::SeqCst), seen);
}

#[test]
fn the_question_is_an_access_evaluation_that_names_bundle_and_posture() {
    let site = Site::new("deny");
    let (_outcome, _pending) = site.start(Mode::Decide, &write("/srv/./x"));
    let (question, _done) = site.authority.take();
    assert_eq!(question.deadline, Duration::from_millis(500));
    let body: Value = serde_json::from_slice(&question.body).unwrap();
    let bundle = site.policy.lock().unwrap().clone().unwrap();
    assert_eq!(
        body,
        json!({
            "subject": {"type": "Agent", "id": "coder"},
            "action": {"name": "fs.write", "properties": {"n": 1}},
            "resource": {"type": "File", "id": "/srv/x"},
            "context": {},
            "tidelock": {
                "node": "node-a", "posture": "normal", "upstream": "authority",
                "bundle": {"name": "template", "epoch": 1, "hash": bundle.bundle().content_id()},
            },
        })
    );
}

#[test]
fn in_the_dark_the_last_answer_serves_for_its_lifetime_and_says_so() {
    let site = Site::new("cached");
    // Without an earlier answer there is nothing to serve.
    let outcome = site.decide(Authority::is_away);
    assert_eq!(said(&outcome).1, Reason::ConsultUnreachable);
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
    site.clock.advance(599 * S);
    let outcome = site.decide(Authority::is_away);
    assert_eq!(said(&outcome), ALLOWED);
    let consult = &site.last_record()["consult"];
    assert_eq!(
        (&consult["outcome"], &consult["fallback"]),
        (&json!("unreachable"), &json!("cached"))
    );
    assert_eq!(consult["answered_unix_ms"], BOOT_UNIX_MS);
    assert_eq!(consult["expires_unix_ms"], BOOT_UNIX_MS + 600_000);
    assert!(outcome.answer.message.contains("last answer"));
    assert_eq!(outcome.answer.consult.unwrap().fallback, "cached");
    // Another question has no answer yet; while it is reached, its word counts.
    let (other, _pending) = site.start(Mode::Decide, &write("/srv/y"));
    site.authority.is_away();
    assert_eq!(
        said(&other.try_recv().unwrap()).1,
        Reason::ConsultUnreachable
    );
    let (other, _pending) = site.start(Mode::Decide, &write("/srv/z"));
    site.authority.is_away();
    drop(other);
    // The breaker has seen three absences by now: nobody waits, and the answer still serves.
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    assert_eq!(said(&outcome.try_recv().unwrap()), ALLOWED);
    assert_eq!(site.authority.waits(), 0);
    site.clock.advance(S);
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    assert_eq!(
        said(&outcome.try_recv().unwrap()).1,
        Reason::ConsultUnreachable,
        "its time is over"
    );
    site.clock.advance(10 * S);
    let outcome = site.decide(|authority| authority.says(&yes()));
    assert_eq!(said(&outcome), ALLOWED, "it is asked again");
}

#[test]
fn a_deny_is_remembered_and_takes_the_allow_from_the_disk_before_anybody_hears_of_it() {
    let site = Site::new("cached");
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
    assert!(site.authority.withdrawn.lock().unwrap().is_empty());
    assert_eq!(
        said(&site.decide(|authority| authority.says(&no()))).1,
        Reason::ConsultDenied
    );
    let withdrawn = site.authority.withdrawn.lock().unwrap().pop().unwrap();
    assert_eq!(withdrawn["answers"][0]["allow"], false);
    let outcome = site.decide(Authority::is_away);
    assert_eq!(said(&outcome).1, Reason::ConsultDenied);
    assert_eq!(site.last_record()["consult"]["fallback"], "cached");
}

/// Answers were kept by the names of nodes too that a caller gives: an allow under names of one's own
/// outlived the deny to the same question without them.
#[test]
fn the_nodes_that_a_caller_names_bring_no_allow_back_and_none_about() {
    let in_the_dark = |outcome: &Outcome| {
        assert_eq!(
            said(outcome),
            (Decision::Deny, Reason::ConsultUnreachable, false)
        );
    };
    let site = Site::new("cached");
    let via_of = |site: &Site| {
        let asked = site.authority.asked.lock().unwrap();
        let body: Value = serde_json::from_slice(&asked[0].0.body).unwrap();
        body["tidelock"]["via"].clone()
    };
    for via in [["a"], ["b"]] {
        let outcome = site.relayed(&via, |authority| {
            assert_eq!(
                via_of(&site),
                json!(via),
                "nodes that ask on are told apart"
            );
            authority.says(&yes());
        });
        assert_eq!(said(&outcome), ALLOWED, "its word counts");
        assert_eq!(site.last_record()["consult"]["via"], json!(via));
    }
    assert_eq!(site.interceptor.consult_stats().kept, 0);
    in_the_dark(&site.relayed(&["a"], Authority::is_away));
    in_the_dark(&site.decide(Authority::is_away));

    // The decision point takes back what it said, and is gone.
    site.clock.advance(61 * S);
    let outcome = site.relayed(&["a"], |authority| authority.says(&yes()));
    assert_eq!(said(&outcome), ALLOWED);
    let outcome = site.decide(|authority| authority.says(&no()));
    assert_eq!(said(&outcome).1, Reason::ConsultDenied);
    in_the_dark(&site.relayed(&["a"], Authority::is_away));
    let outcome = site.decide(Authority::is_away);
    assert_eq!(said(&outcome).1, Reason::ConsultDenied, "it is remembered");

    // An allow that is kept serves nobody who names nodes; the control is the question without them.
    let site = Site::new("cached");
    let outcome = site.decide(|authority| authority.says(&yes()));
    assert_eq!(said(&outcome), ALLOWED);
    in_the_dark(&site.relayed(&["a"], Authority::is_away));
    assert_eq!(said(&site.decide(Authority::is_away)), ALLOWED);
    // And a deny takes it back whoever brings it about.
    let outcome = site.relayed(&["a"], |authority| authority.says(&no()));
    assert_eq!(said(&outcome).1, Reason::ConsultDenied);
    let withdrawn = site.authority.withdrawn.lock().unwrap().pop().unwrap();
    assert_eq!(withdrawn["answers"], json!([]));
    in_the_dark(&site.decide(Authority::is_away));
}

#[test]
fn a_question_that_names_nodes_is_denied_in_the_dark_where_others_are_held() {
    let site = Site::new("hold");
    assert_eq!(
        said(&site.decide(Authority::is_away)),
        (Decision::Hold, Reason::ConsultHeld, false),
        "the control"
    );
    assert!(site.last_record()["consult"].get("via").is_none());
    assert_eq!(
        said(&site.relayed(&["a"], Authority::is_away)),
        (Decision::Deny, Reason::ConsultUnreachable, false)
    );
    // The record has them without secrets.
    site.relayed(&["sk_live_4eC39HqLyjWDarjtT1zdp7dc"], Authority::is_away);
    let via = site.last_record()["consult"]["via"].to_string();
    assert!(via.contains("[redacted"), "{via}");
}

#[test]
fn hold_waits_and_an_unknown_upstream_denies() {
    let site = Site::new("hold");
    let outcome = site.decide(Authority::is_away);
    assert_eq!(said(&outcome), (Decision::Hold, Reason::ConsultHeld, false));
    assert_eq!(site.last_record()["consult"]["fallback"], "held");
    let mut terms = consult("hold");
    terms["upstream"] = "nobody".into();
    site.activate(2, Some(terms));
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultUnreachable, false)
    );
    assert_eq!(site.last_record()["consult"]["outcome"], "unconfigured");
}

#[test]
fn what_changed_while_the_answer_was_on_its_way_is_judged_again() {
    let site = Site::new("deny");
    // A policy that forbids meanwhile.
    let outcome = site.decide(|authority| {
        *site.verdict.lock().unwrap() = Verdict::Forbid;
        authority.says(&yes());
    });
    assert_eq!(said(&outcome), (Decision::Deny, Reason::PolicyDeny, false));
    *site.verdict.lock().unwrap() = Verdict::Permit;
    // A node that closes meanwhile.
    let outcome = site.decide(|authority| {
        site.interceptor.set_posture_floor(Posture::Closed);
        authority.says(&yes());
    });
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::PostureClosed, false)
    );
    site.interceptor.set_posture_floor(Posture::Normal);
    // A bundle that went.
    let outcome = site.decide(|authority| {
        *site.policy.lock().unwrap() = None;
        authority.says(&yes());
    });
    assert_eq!(said(&outcome), (Decision::Deny, Reason::NoPolicy, false));
    // Another bundle: it is asked again, in its name.
    site.activate(1, Some(consult("deny")));
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    site.activate(2, Some(consult("deny")));
    site.authority.says(&yes());
    assert!(
        outcome.try_recv().is_err(),
        "what was answered is not what is asked now"
    );
    site.authority.says(&no());
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(said(&outcome).1, Reason::ConsultDenied);
    assert_eq!(outcome.answer.bundle.unwrap().epoch, 2);
    // Another posture is another question too.
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    site.interceptor.set_posture_floor(Posture::Stale);
    site.authority.says(&yes());
    site.authority.says(&yes());
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(
        (said(&outcome), outcome.answer.posture),
        (ALLOWED, Posture::Stale)
    );
    // And it ends: an authority that is asked by ever new bundles is not asked for ever.
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    let mut asked = 0;
    for epoch in 3.. {
        if site.authority.waits() == 0 {
            break;
        }
        asked += 1;
        site.activate(epoch, Some(consult("deny")));
        site.authority.says(&yes());
    }
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(said(&outcome), (Decision::Deny, Reason::Deadline, false));
    assert_eq!(asked, 3);
}

#[test]
fn answers_die_with_the_bundle_and_with_what_closes() {
    let dark = |site: &Site| {
        let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
        if site.authority.waits() > 0 {
            site.authority.is_away();
        }
        said(&outcome.try_recv().unwrap())
    };
    let lit = || {
        let site = Site::new("cached");
        assert_eq!(
            said(&site.decide(|authority| authority.says(&yes()))),
            ALLOWED
        );
        assert_eq!(dark(&site), ALLOWED);
        site
    };
    let site = lit();
    site.activate(2, Some(consult("cached")));
    assert_eq!(dark(&site).1, Reason::ConsultUnreachable, "another bundle");
    let site = lit();
    let first = site.policy.lock().unwrap().clone();
    site.activate(2, Some(consult("cached")));
    site.clock.advance(2 * S);
    site.interceptor.tick();
    *site.policy.lock().unwrap() = first;
    assert_eq!(
        dark(&site).1,
        Reason::ConsultUnreachable,
        "it went and came back"
    );
    let site = lit();
    site.interceptor.set_posture_floor(Posture::Closed);
    assert_eq!(dark(&site).1, Reason::PostureClosed);
    site.interceptor.set_posture_floor(Posture::Normal);
    assert_eq!(dark(&site).1, Reason::ConsultUnreachable, "it was closed");
    let site = lit();
    site.interceptor.set_posture_floor(Posture::Stale);
    assert_eq!(
        dark(&site).1,
        Reason::ConsultUnreachable,
        "an answer of another posture"
    );
    site.interceptor.set_posture_floor(Posture::Normal);
    assert_eq!(dark(&site), ALLOWED);
    // A class that its age closes, and a word of the authority that opens it again.
    let site = lit();
    let closed = 90 * 24 * 3600 * S;
    let kept = site.interceptor.changed_answers().unwrap();
    site.clock.advance(closed);
    site.interceptor.tick();
    assert_eq!(site.interceptor.consult_stats().kept, 0);
    // What an earlier run kept serves on, the same question under the same bundle.
    let site = lit();
    let kept_now = site.interceptor.changed_answers().unwrap();
    let next = Site::from("cached", Some(&site));
    next.interceptor.restore_answers(kept_now);
    assert_eq!(dark(&next), ALLOWED);
    site.activate(2, Some(consult("cached")));
    let next = Site::from("cached", Some(&site));
    next.interceptor.restore_answers(kept);
    assert_eq!(
        dark(&next).1,
        Reason::ConsultUnreachable,
        "the answers of another bundle"
    );
}

#[test]
fn explanations_and_searches_ask_nobody_and_promise_nothing() {
    let site = Site::new("cached");
    let (outcome, _pending) = site.start(Mode::Explain, &write("/srv/x"));
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(
        said(&outcome),
        (Decision::Hold, Reason::ConsultNeeded, false)
    );
    let explanation = outcome.answer.explanation.unwrap();
    assert!(
        explanation.to_allow[0].contains("must agree"),
        "{explanation:?}"
    );
    let search = json!({"subject": {"type": "Agent", "id": "coder"},
                        "resource": {"type": "File", "id": "/srv/x"}});
    let search = Search::read(SearchFor::Action, search.to_string().as_bytes(), None).unwrap();
    let (sender, receiver) = mpsc::channel();
    let done = move |found: Result<Found, _>| sender.send(found.unwrap()).unwrap();
    site.interceptor
        .search(Ok(&search), &caller(), Box::new(done));
    let found = serde_json::to_value(receiver.recv().unwrap().results).unwrap();
    let names: Vec<&str> = found
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"fs.read") && !names.contains(&"fs.write"),
        "{names:?}"
    );
    assert_eq!(site.authority.seen.load(Ordering::SeqCst), 0);
    assert_eq!(site.interceptor.consult_stats().kept, 0);
}

#[test]
fn inv_14_an_answer_makes_no_permit_for_who_has_gone_and_a_late_one_changes_nothing() {
    let site = Site::new("cached");
    // Gone while the authority is asked.
    let (outcome, pending) = site.start(Mode::Decide, &write("/srv/x"));
    pending.give_up();
    site.authority.says(&yes());
    let outcome = outcome.try_recv().unwrap();
    assert_eq!(
        said(&outcome),
        (Decision::Deny, Reason::ConsultTimeout, false)
    );
    assert_eq!(site.last_record()["decision"], "deny");
    // Gone while the record is written.
    site.recorder.hold();
    let (outcome, pending) = site.start(Mode::Decide, &write("/srv/x"));
    site.authority.says(&yes());
    pending.give_up();
    site.recorder.release();
    assert_eq!(
        said(&outcome.try_recv().unwrap()).1,
        Reason::AuditUnavailable
    );
    assert_eq!(site.last_record()["outcome"], "not_released");
    // Gone the moment that the record is handed over, to a log that takes it at once.
    let (outcome, pending) = site.start(Mode::Decide, &write("/srv/x"));
    *site.gives_up.lock().unwrap() = Some(pending);
    site.authority.says(&yes());
    assert_eq!(
        said(&outcome.try_recv().unwrap()),
        (Decision::Deny, Reason::AuditUnavailable, false)
    );
    assert_eq!(site.last_record()["outcome"], "not_released");
    // An authority whose answer was lost, and comes after all.
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    site.interceptor.tick();
    assert!(outcome.try_recv().is_err());
    site.clock.advance(S);
    site.interceptor.tick();
    assert_eq!(
        said(&outcome.try_recv().unwrap()),
        (Decision::Deny, Reason::ConsultTimeout, false)
    );
    let records = site.records().len();
    site.authority.says(&yes());
    assert_eq!(site.records().len(), records);
    // Positive control: the same with somebody who waits.
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
}

#[test]
fn what_one_decision_point_said_is_nothing_of_the_next_one_under_its_name() {
    let site = Site::new("cached");
    let is = |who: u8| *site.authority.who.lock().unwrap() = who;
    let dark = || said(&site.decide(Authority::is_away));
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
    assert_eq!(dark(), ALLOWED);
    is(1);
    assert_eq!(dark().1, Reason::ConsultUnreachable);
    is(0);
    assert_eq!(dark(), ALLOWED);
    site.interceptor
        .forget_answers_of(&["authority".to_owned()].into());
    site.interceptor.try_upstreams_again();
    assert_eq!(dark().1, Reason::ConsultUnreachable);
    // One that goes while it is asked: its successor is asked.
    let (outcome, _pending) = site.start(Mode::Decide, &write("/srv/x"));
    is(2);
    site.authority.says(&yes());
    assert!(outcome.try_recv().is_err());
    site.authority.says(&no());
    assert_eq!(said(&outcome.try_recv().unwrap()).1, Reason::ConsultDenied);
}

#[test]
fn equal_questions_share_one_answer_and_each_has_its_own_record() {
    let site = Site::new("deny");
    let all: Vec<_> = (0..20)
        .map(|_| site.start(Mode::Decide, &write("/srv/x")))
        .collect();
    assert_eq!(site.authority.waits(), 1);
    site.authority.says(&yes());
    for (outcome, _pending) in &all {
        assert_eq!(said(&outcome.try_recv().unwrap()), ALLOWED);
    }
    assert_eq!(site.records().len(), 20);
}

#[test]
fn a_record_of_the_short_form_names_the_answer_that_it_stands_on() {
    let site = Site::new("cached");
    let engine = Arc::new(ScriptedEngine::new(|_| Evaluation {
        verdict: Verdict::Permit,
        policies: Vec::new(),
        errors: Vec::new(),
    }));
    let active = active_policy_with(Some(engine), Source::Active, BOOT_UNIX_MS, |manifest| {
        manifest["classes"]["effect"]["consult"] = consult("cached");
        manifest["classes"]["effect"]["when_restricted"] = "degrade".into();
    });
    *site.policy.lock().unwrap() = Some(Arc::new(active.unwrap()));
    site.interceptor.set_posture_floor(Posture::Restricted);
    assert_eq!(
        said(&site.decide(|authority| authority.says(&yes()))),
        ALLOWED
    );
    assert_eq!(said(&site.decide(Authority::is_away)), ALLOWED);
    let record = site.last_record();
    assert_eq!(record["form"], "short");
    assert_eq!(record["consult"]["fallback"], "cached");
    assert!(
        record["consult"]["answer"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );
    let bytes = site.recorder.records().pop().unwrap().1.len();
    assert!(
        bytes <= tidelock_interceptor::limits::MAX_SHORT_RECORD_BYTES,
        "{bytes}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the policies say and whatever comes back, in whatever order: an allow is a local permit
    /// with an answer that allows, now or, in the dark, before; and while the authority is there, its word
    /// alone decides what a local permit comes to, as if nothing were ever kept.
    #[test]
    fn never_an_allow_that_the_local_bundle_does_not_permit(
        steps in proptest::collection::vec((0..4_u8, 0..5_u8, 0..2_u8, 0..400_u64), 1..24)
    ) {
        let site = Site::new("cached");
        let mut last: BTreeMap<u8, (bool, u64)> = BTreeMap::new();
        let mut now_ms = BOOT_UNIX_MS;
        for (verdict, answer, which, seconds) in steps {
            // Past the breaker's patience.
            let pass = 61 + seconds;
            site.clock.advance(Duration::from_secs(pass));
            now_ms += pass * 1_000;
            let verdict = [Verdict::Permit, Verdict::Permit, Verdict::NoMatch, Verdict::Forbid]
                [usize::from(verdict)];
            *site.verdict.lock().unwrap() = verdict;
            let (outcome, _pending) = site.start(Mode::Decide, &write(&format!("/srv/{which}")));
            let permits = verdict == Verdict::Permit;
            prop_assert_eq!(site.authority.waits(), usize::from(permits));
            if permits {
                match answer {
                    0 => site.authority.says(&yes()),
                    1 => site.authority.says(&no()),
                    2 => site.authority.is_away(),
                    3 => site.authority.take().1(Err(ConsultFailure::Timeout)),
                    _ => site.authority.says(&json!("garbage")),
                }
            }
            let outcome = outcome.try_recv().unwrap();
            let kept = last.get(&which).filter(|(_, at)| now_ms < at + 600_000);
            let expected = permits && match answer {
                0 => true,
                2 | 3 => kept.is_some_and(|(allowed, _)| *allowed),
                _ => false,
            };
            prop_assert_eq!(outcome.answer.decision == Decision::Allow, expected);
            prop_assert_eq!(outcome.permit.is_some(), expected);
            if permits && answer < 2 {
                last.insert(which, (answer == 0, now_ms));
            }
        }
    }
}
