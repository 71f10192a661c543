//! Every line of `tests/data/actions` through the strict parser, quota, posture, the engine and the
//! recorder, under the signed demo bundle of `tests/data/bundle`.
//!
//! A line is `{"name", "request" or "request_raw", "expect": {"decision", "reason"}}`; `request_raw`
//! is for bytes that no JSON value has (duplicate keys, cut off documents). A new bypass becomes a
//! line there.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tidelock_interceptor::{
    Action, AppendDone, Caller, Clock, Interceptor, InterceptorConfig, Mode, Outcome, Recorder,
};
use tidelock_policy::{
    BundleBuilder, LoadContext, Slots, TrustFile, VerifiedBundle,
    testing::{Authority, MemorySlots, NODE_VERSION},
};
use tidelock_segments::{Appended, NodeId, RecordClass, merkle};

const DOMAIN: &str = "harbour";
const NOW_UNIX_MS: u64 = 1_763_600_000_000;
const DISTINCT_MIN: usize = 240;

struct Line {
    name: String,
    request: Vec<u8>,
    decision: String,
    reason: String,
}

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("data")
        .join(path)
}

fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("{pointer} in {value}"))
        .to_owned()
}

/// The lines of each file.
fn corpus() -> BTreeMap<String, Vec<Line>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(data("actions")).unwrap() {
        let path = entry.unwrap().path();
        let lines = std::fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| {
                let value: Value = serde_json::from_str(line).unwrap();
                let request = match (value.get("request"), value.get("request_raw")) {
                    (Some(request), None) => request.to_string(),
                    (None, Some(Value::String(raw))) => raw.clone(),
                    _ => panic!("one of request and request_raw: {line}"),
                };
                Line {
                    name: text(&value, "/name"),
                    request: request.into_bytes(),
                    decision: text(&value, "/expect/decision"),
                    reason: text(&value, "/expect/reason"),
                }
            })
            .collect();
        files.insert(
            path.file_stem().unwrap().to_str().unwrap().to_owned(),
            lines,
        );
    }
    files
}

/// The bundle, built from its directory, signed with a fresh key and loaded by a trust file.
fn bundle() -> VerifiedBundle {
    let authority = Authority::new(DOMAIN, 1).unwrap();
    let archive = BundleBuilder::from_dir(&data("bundle"))
        .unwrap()
        .domain(DOMAIN)
        .created_unix_ms(NOW_UNIX_MS)
        .build()
        .unwrap();
    let package = authority.sign(archive, &[0]).unwrap();
    let trust = TrustFile::parse(&authority.trust_toml(1)).unwrap();
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    VerifiedBundle::load(package, &trust, &context).unwrap()
}

/// Slots with the bundle active, or empty ones.
fn slots(bundle: Option<VerifiedBundle>) -> Slots {
    let trust = TrustFile::parse(&Authority::new(DOMAIN, 1).unwrap().trust_toml(1)).unwrap();
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    let (slots, faults) = Slots::open(MemorySlots::new(), &trust, &context);
    assert_eq!(faults, []);
    if let Some(bundle) = bundle {
        slots.activate(bundle).unwrap();
    }
    slots
}

/// Time stands still: neither a quota nor a budget can turn an answer into another one.
struct Still;

impl Clock for Still {
    fn now(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn unix_ms(&self) -> u64 {
        NOW_UNIX_MS + 1_000
    }
}

/// Keeps every record and says at once that it is durable.
#[derive(Default)]
struct Kept(Mutex<Vec<Vec<u8>>>);

impl Recorder for Kept {
    fn submit(&self, _class: RecordClass, record: Vec<u8>, done: AppendDone) {
        let leaf = merkle::leaf_hash(&record);
        let mut records = self.0.lock().unwrap();
        let index = u64::try_from(records.len()).unwrap();
        records.push(record);
        drop(records);
        done(Ok(Appended {
            incarnation: 1,
            index,
            leaf,
        }));
    }
}

/// A service that asks on behalf of agents, as the demo does.
fn caller() -> Caller {
    Caller {
        principal_type: "Service".to_owned(),
        principal_id: "story".to_owned(),
        may_act_as: true,
        door: "unix",
        stated_by: None,
    }
}

fn interceptor(slots: Slots) -> (Interceptor, Arc<Kept>) {
    let kept = Arc::new(Kept::default());
    let slots = Arc::new(slots);
    let interceptor = Interceptor::new(
        InterceptorConfig::new(NodeId::new("a").unwrap()),
        Arc::new(Still),
        Arc::new(move || slots.current()),
        Arc::clone(&kept) as Arc<dyn Recorder>,
    )
    .unwrap();
    (interceptor, kept)
}

/// Decides every line; answers each with its outcome.
fn decide_all(interceptor: &Interceptor) -> Vec<(Line, Outcome)> {
    corpus()
        .into_values()
        .flatten()
        .map(|line| {
            let outcome = interceptor.decide_wait(&line.request, &caller(), Mode::Decide);
            (line, outcome)
        })
        .collect()
}

#[test]
fn the_corpus_is_large_distinct_and_of_every_kind() {
    let files = corpus();
    let kinds: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(kinds, ["files", "git", "http", "mcp", "secrets", "shell"]);
    let mut names = BTreeSet::new();
    let mut requests = BTreeSet::new();
    for (kind, lines) in &files {
        for wanted in ["POLICY_ALLOW", "POLICY_DENY", "NO_MATCH", "INVALID_REQUEST"] {
            let found = lines.iter().filter(|line| line.reason == wanted).count();
            assert!(found >= 5, "{kind}: {found} lines expect {wanted}");
        }
        for line in lines {
            assert!(
                names.insert(&line.name),
                "two lines are named {}",
                line.name
            );
            assert!(
                requests.insert(&line.request),
                "{} is there twice",
                line.name
            );
        }
    }
    assert!(
        requests.len() >= DISTINCT_MIN,
        "{} requests",
        requests.len()
    );
}

#[test]
fn every_action_of_the_corpus_gets_its_decision_and_reason() {
    let (interceptor, kept) = interceptor(slots(Some(bundle())));
    let outcomes = decide_all(&interceptor);
    let wrong: Vec<String> = outcomes
        .iter()
        .filter(|(line, outcome)| {
            outcome.answer.decision.as_str() != line.decision
                || outcome.answer.reason.as_str() != line.reason
        })
        .map(|(line, Outcome { answer, .. })| {
            format!(
                "{}: expected {} {}, got {} {} by {:?}: {} {:?}\n    {}",
                line.name,
                line.decision,
                line.reason,
                answer.decision,
                answer.reason.as_str(),
                answer.policies,
                answer.message,
                answer.errors,
                String::from_utf8_lossy(&line.request),
            )
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        outcomes.len(),
        wrong.join("\n")
    );

    // Each decision has a record of its own, and the record says what the answer says.
    let records = kept.0.lock().unwrap();
    for (line, outcome) in &outcomes {
        let position = outcome
            .answer
            .record
            .unwrap_or_else(|| panic!("{} has no record", line.name));
        let bytes = &records[usize::try_from(position.index).unwrap()];
        let record: Value = serde_json::from_slice(bytes).unwrap();
        assert_eq!(text(&record, "/decision"), line.decision, "{}", line.name);
        assert_eq!(text(&record, "/reason"), line.reason, "{}", line.name);
    }
    assert_eq!(records.len(), outcomes.len());
}

#[test]
fn inv_14_exactly_the_allowed_actions_have_a_permit() {
    let (interceptor, _kept) = interceptor(slots(Some(bundle())));
    for (line, outcome) in decide_all(&interceptor) {
        assert_eq!(
            outcome.permit.is_some(),
            line.decision == "allow",
            "{}",
            line.name
        );
        if let Some(permit) = outcome.permit {
            assert_eq!(
                Some(permit.record()),
                outcome.answer.record,
                "{}",
                line.name
            );
        }
    }
    // To explain is not to permit.
    for line in corpus().into_values().flatten() {
        let outcome = interceptor.decide_wait(&line.request, &caller(), Mode::Explain);
        assert_eq!(outcome.answer.reason.as_str(), line.reason, "{}", line.name);
        assert!(outcome.permit.is_none(), "{}", line.name);
    }
}

#[test]
fn inv_15_the_permit_holds_the_action_that_was_judged() {
    let (interceptor, _kept) = interceptor(slots(Some(bundle())));
    for (line, outcome) in decide_all(&interceptor) {
        let Some(permit) = outcome.permit else {
            continue;
        };
        let judged = Action::parse(&line.request, &caller()).unwrap();
        assert_eq!(*permit.action(), judged, "{}", line.name);
        // Asking for the canonical spelling changes nothing: same action, same answer.
        let again = interceptor.decide_wait(judged.canonical(), &caller(), Mode::Decide);
        assert_eq!(again.answer.reason.as_str(), line.reason, "{}", line.name);
        assert_eq!(
            again.permit.map(|p| p.action().hash()),
            Some(judged.hash()),
            "{}",
            line.name
        );
    }
}

#[test]
fn every_policy_of_the_bundle_decides_some_action() {
    let bundle = bundle();
    let all: BTreeSet<String> = bundle.policy_ids().iter().cloned().collect();
    let (interceptor, _kept) = interceptor(slots(Some(bundle)));
    let used: BTreeSet<String> = decide_all(&interceptor)
        .into_iter()
        .flat_map(|(_, outcome)| outcome.answer.policies)
        .collect();
    let idle: Vec<&String> = all.difference(&used).collect();
    assert!(idle.is_empty(), "no line of the corpus meets {idle:?}");
}

#[test]
fn without_a_bundle_nothing_of_the_corpus_is_allowed() {
    let (interceptor, _kept) = interceptor(slots(None));
    for (line, outcome) in decide_all(&interceptor) {
        let expected = if line.reason == "INVALID_REQUEST" {
            "INVALID_REQUEST"
        } else {
            "NO_POLICY"
        };
        assert_eq!(outcome.answer.reason.as_str(), expected, "{}", line.name);
        assert!(outcome.permit.is_none(), "{}", line.name);
    }
}

#[test]
fn a_caller_that_may_not_act_for_others_gets_nothing_of_the_corpus() {
    let (interceptor, _kept) = interceptor(slots(Some(bundle())));
    let alone = Caller {
        may_act_as: false,
        ..caller()
    };
    for line in corpus().into_values().flatten() {
        let outcome = interceptor.decide_wait(&line.request, &alone, Mode::Decide);
        assert_eq!(
            outcome.answer.reason.as_str(),
            "INVALID_REQUEST",
            "{}",
            line.name
        );
    }
    // The control: speaking for itself it is judged, and no policy knows a service.
    let own =
        br#"{"action":"fs.read","resource":{"type":"File","id":"/srv/app/router/README.md"}}"#;
    let outcome = interceptor.decide_wait(own, &alone, Mode::Decide);
    assert_eq!(outcome.answer.reason.as_str(), "EVALUATION_ERROR");
}

#[test]
fn no_record_of_the_corpus_holds_a_secret_of_a_request() {
    let (interceptor, kept) = interceptor(slots(Some(bundle())));
    decide_all(&interceptor);
    // The lines that carry these are in http.jsonl; a control that they are.
    let secrets = ["hunter2", "Bearer abc"];
    let requests: Vec<u8> = corpus()
        .into_values()
        .flatten()
        .flat_map(|l| l.request)
        .collect();
    let requests = String::from_utf8_lossy(&requests).into_owned();
    for secret in secrets {
        assert!(requests.contains(secret), "{secret}");
        for record in kept.0.lock().unwrap().iter() {
            let record = String::from_utf8_lossy(record);
            assert!(!record.contains(secret), "{record}");
        }
    }
}
