//! Searches and reports that are refused are recorded like any denial; a page of a search is of one policy,
//! and comes to its end; and one caller gets what one caller may have, for however many principals.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of test functions"
)]

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
    mpsc,
};

use serde_json::{Value, json};
use tidelock_interceptor::{
    Caller, EarlierRecords, Found, Interceptor, InterceptorConfig, Mode, Reason, ReportRefused,
    Search, SearchFor, SearchRefused,
    testing::{MemoryRecorder, TestClock},
};
use tidelock_policy::{
    ActivePolicy, Evaluation, LoadContext, Slots, Source, TrustFile, Verdict,
    limits::NESTING_MAX,
    testing::{
        Authority, MemorySlots, NODE_VERSION, ScriptedEngine, active_policy, template_builder,
    },
};
use tidelock_quota::Rate;
use tidelock_segments::{AppendError, NodeId};

const BOOT_UNIX_MS: u64 = 1_700_000_000_000;

type Policy = Arc<Mutex<Option<Arc<ActivePolicy>>>>;

struct Site {
    interceptor: Interceptor,
    recorder: Arc<MemoryRecorder>,
    clock: Arc<TestClock>,
}

impl Site {
    fn of(policy: &Policy, change: impl FnOnce(&mut InterceptorConfig)) -> Self {
        let (clock, recorder) = (TestClock::new(BOOT_UNIX_MS), MemoryRecorder::new());
        let mut config = InterceptorConfig::new(NodeId::new("node-a").unwrap());
        config.engine_wait = std::time::Duration::from_secs(60);
        change(&mut config);
        let source = Arc::clone(policy);
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
        }
    }

    fn permitting(change: impl FnOnce(&mut InterceptorConfig)) -> Self {
        let engine = Arc::new(ScriptedEngine::new(|_| permit()));
        let active = active_policy(Some(engine), Source::Active, BOOT_UNIX_MS).unwrap();
        Self::of(&Arc::new(Mutex::new(Some(Arc::new(active)))), change)
    }

    fn search(&self, wanted: SearchFor, body: &Value) -> Result<Found, SearchRefused> {
        let (sender, receiver) = mpsc::channel();
        let search = Search::read(wanted, body.to_string().as_bytes(), Some("request-7"));
        self.interceptor.search(
            search.as_ref().map_err(Clone::clone),
            &caller("coder"),
            Box::new(move |found| sender.send(found).unwrap()),
        );
        receiver.recv().unwrap()
    }

    fn report(&self, body: &Value) -> ReportRefused {
        let (sender, receiver) = mpsc::channel();
        let history = || Ok(EarlierRecords::default());
        self.interceptor.report(
            body.to_string().as_bytes(),
            &caller("coder"),
            &history,
            Box::new(move |reported| sender.send(reported).unwrap()),
        );
        receiver.recv().unwrap().unwrap_err()
    }

    fn of_type(&self, kind: &str) -> Vec<Value> {
        let records = self.recorder.records();
        let read = |(_, bytes): &(_, Vec<u8>)| serde_json::from_slice::<Value>(bytes).unwrap();
        let all = records.iter().map(read);
        all.filter(|record| record["type"] == kind).collect()
    }
}

fn permit() -> Evaluation {
    Evaluation {
        verdict: Verdict::Permit,
        policies: vec!["permit-it".to_owned()],
        errors: Vec::new(),
    }
}

fn caller(id: &str) -> Caller {
    Caller {
        principal_type: "Agent".to_owned(),
        principal_id: id.to_owned(),
        may_act_as: true,
        door: "test",
        stated_by: None,
    }
}

fn actions_of(id: &str) -> Value {
    json!({"subject": {"type": "Agent", "id": id}, "resource": {"type": "File", "id": "/srv/x"}})
}

/// Refused searches and reports left no trace: whoever tried tokens, leaves and names of others at the door
/// was seen by nobody.
#[test]
fn refused_searches_and_reports_are_recorded_up_to_a_budget_then_counted() {
    let site = Site::permitting(|config| {
        config.denial_bytes = Rate {
            per_second: 1,
            burst: 100_000,
        }
    });
    assert!(
        site.search(SearchFor::Action, &actions_of("coder")).is_ok(),
        "the control"
    );
    assert_eq!(site.of_type("refused").len(), 0);

    // Not understood, and a token of another question.
    let without = json!({"subject": {"type": "Agent", "id": "coder"}});
    let mut other = actions_of("coder");
    other["page"] = json!({"token": "0.password=hunter2-hunter2"});
    for body in [&without, &other] {
        let refused = site.search(SearchFor::Action, body).unwrap_err();
        assert!(matches!(refused, SearchRefused::Invalid(_)), "{refused:?}");
    }
    let leaf = "sha256:00";
    let report = json!({"record": {"index": 4_000, "leaf": leaf}, "outcome": "executed"});
    assert_eq!(site.report(&report), ReportRefused::Unknown);
    assert!(matches!(
        site.report(&json!({"outcome": 1})),
        ReportRefused::Invalid(_)
    ));
    let refused = site.of_type("refused");
    let what = |record: &Value| {
        let word = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        (word("request"), word("reason"))
    };
    let told: Vec<_> = refused.iter().map(what).collect();
    let words = |request: &str, reason: &str| (request.to_owned(), reason.to_owned());
    assert_eq!(
        told,
        [
            words("search", "INVALID_REQUEST"),
            words("search", "INVALID_REQUEST"),
            words("report", "UNKNOWN_RECORD"),
            words("report", "INVALID_REQUEST"),
        ]
    );
    for record in &refused {
        assert_eq!(record["caller"]["id"], "coder", "{record}");
        assert!(!record.to_string().contains("hunter2"), "{record}");
    }
    assert_eq!(refused[2]["named_index"], 4_000);

    // INV-07: a flood of them is counted, exactly.
    for _ in 0..2_000 {
        site.report(&report);
    }
    let alone = site.of_type("refused").len() as u64 - 4;
    assert!(alone < 1_000, "{alone} records");
    site.clock.advance(site.interceptor.config().summary_window);
    site.interceptor.tick();
    let windows = site.of_type("denials");
    assert_eq!(windows.len(), 1);
    assert_eq!(
        windows[0]["principals"][0]["counts"],
        json!({"REPORT_REFUSED": 2_000 - alone})
    );

    // A log that is shut changes no refusal into anything else.
    site.clock
        .advance(std::time::Duration::from_secs(86_400 * 365));
    site.recorder
        .fail(Some(AppendError::Unavailable("shut".to_owned())));
    assert_eq!(site.report(&report), ReportRefused::Unknown);
}

/// Each candidate is charged like an action: a page ends where the quota does, and the next one is refused.
#[test]
fn a_search_is_charged_for_each_candidate_and_refused_where_the_quota_is_spent() {
    let site = Site::permitting(|config| {
        config.quotas.principal = Rate {
            per_second: 1,
            burst: 2,
        }
    });
    let mut body = actions_of("coder");
    let first = site.search(SearchFor::Action, &body).unwrap();
    assert_eq!((first.judged, first.results.len()), (2, 2));
    body["page"] = json!({"token": first.next_token});
    assert_eq!(
        site.search(SearchFor::Action, &body),
        Err(SearchRefused::RateLimited {
            retry_after_ms: Some(1_000)
        })
    );
    let refused = site.of_type("refused");
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0]["reason"], "RATE_LIMIT_EXCEEDED");
    // The control: with what comes back it goes on where it ended.
    site.clock.advance(std::time::Duration::from_secs(1));
    let next = site.search(SearchFor::Action, &body).unwrap();
    assert_eq!((next.judged, next.results.len()), (1, 1));
    assert!(!first.results.contains(&next.results[0]));
}

/// A page began under one bundle and ended under the next: some of its results were of either, and it
/// named the first.
#[test]
fn a_page_during_which_the_policy_changes_is_begun_again() {
    let policy: Policy = Arc::default();
    let armed = Arc::new(AtomicBool::new(false));
    let engine = {
        let (policy, armed) = (Arc::clone(&policy), Arc::clone(&armed));
        ScriptedEngine::new(move |_| {
            if armed.swap(false, Ordering::SeqCst) {
                let next = active_policy(None, Source::Active, BOOT_UNIX_MS).unwrap();
                *policy.lock().unwrap() = Some(Arc::new(next));
            }
            permit()
        })
    };
    let first = active_policy(Some(Arc::new(engine)), Source::Active, BOOT_UNIX_MS).unwrap();
    *policy.lock().unwrap() = Some(Arc::new(first));
    let site = Site::of(&policy, |_| {});
    let search = || site.search(SearchFor::Action, &actions_of("coder"));
    assert!(!search().unwrap().results.is_empty(), "the control");
    armed.store(true, Ordering::SeqCst);
    assert_eq!(search(), Err(SearchRefused::PolicyChanged));
    let refused = site.of_type("refused");
    assert_eq!(refused[0]["reason"], "POLICY_CHANGED", "{refused:?}");
    assert_eq!(refused[0]["request_id"], "request-7");
    assert!(search().is_ok(), "under the policy that is in force now");
}

/// Candidates that no request can name were passed over without being counted: a bundle full of them, or a
/// caller who asked for their type, held a thread for as long as that took.
#[test]
fn inv_07_candidates_that_cannot_be_named_end_a_page_too() {
    let authority = Authority::new("test", 1).unwrap();
    let entities: Vec<Value> = (0..1_000)
        .map(|n| {
            json!({"uid": {"type": "File", "id": format!("/srv/../x{n:04}")},
                   "attrs": {"path": format!("/x{n:04}")}, "parents": []})
        })
        .collect();
    let builder = template_builder("template", "test", BOOT_UNIX_MS)
        .unwrap()
        .file(
            "entities.json",
            Value::Array(entities).to_string().into_bytes(),
        );
    let bundle = authority.load(builder).unwrap();
    let trust = TrustFile::parse(&authority.trust_toml(1)).unwrap();
    let context = LoadContext::new("test", NODE_VERSION).unwrap();
    let (slots, _) = Slots::open(MemorySlots::new(), &trust, &context);
    slots.activate(bundle).unwrap();
    let site = Site::of(&Arc::new(Mutex::new(slots.current())), |_| {});
    let mut body = json!({"subject": {"type": "Agent", "id": "coder"},
                          "action": {"name": "fs.read"}, "resource": {"type": "File"}});
    let mut pages = 0;
    loop {
        let page = site.search(SearchFor::Resource, &body).unwrap();
        assert_eq!((page.judged, page.results.len()), (0, 0));
        pages += 1;
        if page.next_token.is_empty() {
            break;
        }
        body["page"] = json!({"token": page.next_token});
    }
    assert_eq!(pages, 4, "256 candidates each");
}

/// Explaining takes a policy apart and writes it down, on a stack of its own: on that of an engine's thread the
/// deepest condition that a bundle may hold would have ended the process.
#[test]
fn an_explanation_of_the_deepest_condition_ends_no_thread() {
    let authority = Authority::new("test", 1).unwrap();
    // Brackets alone leave no trace in a syntax tree.
    let nested = |deep: usize| {
        let (open, close) = ("!(".repeat(deep), ")".repeat(deep));
        format!(
            "permit (principal, action == Action::\"fs.read\", resource) \
             when {{ resource.path == \"/x\" && {open}resource.path == \"/y\"{close} }};"
        )
    };
    let builder = |deep: usize| {
        template_builder("template", "test", BOOT_UNIX_MS)
            .unwrap()
            .file("policies/deep.cedar", nested(deep).into_bytes())
    };
    // The control: this is as deep as a bundle may be.
    let deepest = (1..=NESTING_MAX)
        .rev()
        .find_map(|deep| authority.load(builder(deep)).ok())
        .unwrap();
    let trust = TrustFile::parse(&authority.trust_toml(1)).unwrap();
    let context = LoadContext::new("test", NODE_VERSION).unwrap();
    let (slots, _) = Slots::open(MemorySlots::new(), &trust, &context);
    slots.activate(deepest).unwrap();
    let site = Site::of(&Arc::new(Mutex::new(slots.current())), |config| {
        config.engine_budget = std::time::Duration::from_secs(30);
    });
    let request = json!({"action": "fs.read", "resource": {"type": "File", "id": "/elsewhere"}});
    let body = request.to_string();
    let outcome = site
        .interceptor
        .decide_wait(body.as_bytes(), &caller("coder"), Mode::Explain);
    assert_eq!(outcome.answer.reason, Reason::NoMatch, "{outcome:?}");
    let explanation = outcome.answer.explanation.unwrap();
    let told = format!("{:?}", explanation.nearest);
    assert!(told.contains("/x"), "{told}");
}

/// A caller that may act for others got a bucket of its own for each name that it stated.
#[test]
fn inv_13_naming_many_principals_gets_a_caller_no_more() {
    let site = Site::permitting(|config| {
        config.quotas.caller = Some(Rate {
            per_second: 1,
            burst: 20,
        });
    });
    let ask = |who: &str, principal: usize| {
        let request = json!({
            "principal": {"type": "Agent", "id": format!("p{principal}")},
            "action": "fs.read", "resource": {"type": "File", "id": "/srv/x"},
        });
        let body = request.to_string();
        let outcome = site
            .interceptor
            .decide_wait(body.as_bytes(), &caller(who), Mode::Decide);
        outcome.answer
    };
    let passed = (0..200)
        .filter(|principal| ask("proxy", *principal).reason == Reason::PolicyAllow)
        .count();
    assert_eq!(passed, 20);
    let spent = ask("proxy", 7_000);
    assert_eq!(spent.reason, Reason::RateLimitExceeded);
    assert_eq!(spent.message, "quota caller is spent");
    // The control: another caller for the same principals.
    assert_eq!(ask("other", 0).reason, Reason::PolicyAllow);
}
