use proptest::prelude::*;

use super::*;
use crate::authzen::Evaluations;

const NOW_MS: u64 = 1_700_000_000_000;

fn terms(when_unreachable: WhenUnreachable) -> ConsultTerms {
    ConsultTerms {
        upstream: "authority".to_owned(),
        deadline_ms: 500,
        when_unreachable,
        allow_lifetime_s: match when_unreachable {
            WhenUnreachable::Cached => 60,
            _ => 0,
        },
        deny_lifetime_s: 60,
    }
}

fn under(epoch: u64) -> Under {
    Under {
        hash: format!("sha256:{epoch}"),
        epoch,
    }
}

fn digest(number: u64) -> Sha256Hash {
    Sha256Hash::of(&number.to_le_bytes())
}

fn asked(number: u64) -> Asked {
    Asked {
        question: digest(number),
        kept_key: digest(number),
        terms: terms(WhenUnreachable::Cached),
        under: under(1),
        action: "fs.write".to_owned(),
        principal: "Agent::a".to_owned(),
        deadline: Duration::from_millis(500),
    }
}

fn said(decision: Decision) -> Result<UpstreamAnswer, ConsultFailure> {
    Ok(UpstreamAnswer {
        decision,
        why: None,
        lifetime_s: None,
        obligations: Vec::new(),
        digest: digest(0),
        id: "id".to_owned(),
        signed: None,
    })
}

fn away() -> Result<UpstreamAnswer, ConsultFailure> {
    Err(ConsultFailure::Unreachable("gone".to_owned()))
}

fn holder(name: &str) -> Arc<str> {
    Arc::from(name)
}

fn consults() -> Consults<u64> {
    let mut consults = Consults::default();
    consults.observe(Some(&under(1)));
    consults
}

/// Asks and is answered at once.
fn answer(consults: &mut Consults<u64>, number: u64, said: Decision, now_ms: u64) -> Settled<u64> {
    let Begun::Send(flight) = consults.begin(asked(number), &holder("a"), number, Duration::ZERO)
    else {
        return Settled {
            waiting: Vec::new(),
            is_withdrawn: false,
        };
    };
    let said = self::said(said);
    let times = (Duration::ZERO, now_ms);
    consults.settle((digest(number), flight), &said, times, Some(&under(1)))
}

fn question() -> Question {
    let body = b"{}".to_vec();
    Question {
        upstream: "authority".to_owned(),
        digest: Sha256Hash::of(&body),
        plain: Sha256Hash::of(&body),
        body,
        identity: None,
        deadline: Duration::from_millis(500),
    }
}

fn read(body: &str) -> Result<UpstreamAnswer, ConsultFailure> {
    let heard = Heard {
        status: 200,
        echoed_id: Some(b"id-1"),
        body: body.as_bytes(),
    };
    UpstreamAnswer::read(&question(), "id-1", heard, None)
}

#[test]
fn an_answer_is_one_boolean_and_everything_else_is_none() {
    let good =
        read(r#"{"decision": true, "colour": 1, "context": {"reason": "fine", "lifetime_s": 7}}"#);
    let good = good.unwrap();
    assert_eq!(good.decision, Decision::Allow);
    assert_eq!(
        (good.why.as_deref(), good.lifetime_s),
        (Some("fine"), Some(7))
    );
    assert_eq!(
        read(r#"{"decision": false}"#).unwrap().decision,
        Decision::Deny
    );
    let held = r#"{"decision": false, "context": {"hold": true}}"#;
    assert_eq!(read(held).unwrap().decision, Decision::Hold);
    for body in [
        "",
        "true",
        "[]",
        "{}",
        r#"{"decision": "true"}"#,
        r#"{"decision": 1}"#,
        r#"{"decision": null}"#,
        r#"{"Decision": true}"#,
        r#"{"decision": false, "decision": true}"#,
        r#"{"decision": true, "Decision": false}"#,
        r#"{"decision": true} x"#,
        r#"{"decision": true, "context": {"lifetime_s": -1}}"#,
        r#"{"decision": true, "context": {"lifetime_s": "60"}}"#,
        r#"{"decision": true, "context": {"obligations": {}}}"#,
        r#"{"decision": true, "context": {"obligations": [{"name": "x"}]}}"#,
        "\u{0}",
    ] {
        assert!(
            matches!(read(body), Err(ConsultFailure::Invalid(_))),
            "{body}"
        );
    }
    let long = format!(
        r#"{{"decision": true, "context": {{"reason": "{}"}}}}"#,
        "x".repeat(20_000)
    );
    assert!(matches!(read(&long), Err(ConsultFailure::Invalid(_))));
    let wordy = format!(
        r#"{{"decision": true, "context": {{"reason": "{}"}}}}"#,
        "x".repeat(9_000)
    );
    assert!(read(&wordy).unwrap().why.unwrap().len() <= MAX_MESSAGE_BYTES);
}

#[test]
fn statuses_and_the_request_id_are_checked_before_the_body_is_looked_at() {
    let body = br#"{"decision": true}"#;
    let read = |status: u16, echoed_id: Option<&[u8]>| {
        let heard = Heard {
            status,
            echoed_id,
            body,
        };
        UpstreamAnswer::read(&question(), "id-1", heard, None)
    };
    assert!(read(200, Some(b"id-1")).is_ok());
    for id in [None, Some(&b"id-2"[..]), Some(b""), Some(b"id-1, id-2")] {
        assert!(
            matches!(read(200, id), Err(ConsultFailure::Invalid(_))),
            "{id:?}"
        );
    }
    for status in [
        100, 201, 204, 301, 302, 307, 308, 400, 401, 403, 404, 500, 501,
    ] {
        let refused = read(status, Some(b"id-1"));
        assert!(
            matches!(refused, Err(ConsultFailure::Invalid(_))),
            "{status}"
        );
    }
    // Somebody was reached: no earlier answer serves.
    for status in [429, 502, 503, 504] {
        let refused = read(status, Some(b"id-1"));
        assert_eq!(refused, Err(ConsultFailure::NotNow(status)));
    }
}

#[test]
fn a_deny_that_says_nothing_of_the_action_is_no_answer_and_an_allow_is_never_read_so() {
    let read = |body: &str, verify: Option<VerifySigned<'_>>| {
        let heard = Heard {
            status: 200,
            echoed_id: Some(b"id-1"),
            body: body.as_bytes(),
        };
        UpstreamAnswer::read(&question(), "id-1", heard, verify)
    };
    let busy = r#"{"decision":false,"context":{"reason":"DEADLINE","not_judged":true}}"#;
    let not_judged = Err(ConsultFailure::NotJudged("DEADLINE".to_owned()));
    assert_eq!(read(busy, None), not_judged);
    for body in [
        r#"{"decision":false,"context":{"not_judged":"true"}}"#,
        r#"{"decision":false,"context":{"not_judged":false}}"#,
    ] {
        assert_eq!(read(body, None).unwrap().decision(), Decision::Deny);
    }
    let odd = r#"{"decision":true,"context":{"not_judged":true}}"#;
    assert_eq!(read(odd, None).unwrap().decision(), Decision::Allow);
    // Beside what is signed anybody could put it.
    let refused = read(busy, Some(&|_: &str| Err("it is not signed".to_owned())));
    assert!(matches!(refused, Err(ConsultFailure::Invalid(_))));
}

#[test]
fn a_question_that_comes_again_or_from_far_goes_no_further() {
    let via = |names: &[&str]| -> Vec<String> { names.iter().map(|n| (*n).to_owned()).collect() };
    assert_eq!(goes_round(&[], "a"), None);
    assert_eq!(goes_round(&via(&["b", "c", "d"]), "a"), None);
    for names in [
        &["a"][..],
        &["a", "b"],
        &["b", "a", "c"],
        &["b", "c", "d", "e"],
    ] {
        let failure = goes_round(&via(names), "a").unwrap();
        assert_eq!(failure, ConsultFailure::Loop(names.join(", ")));
        assert!(!failure.is_absence(), "no earlier answer serves");
    }
}

#[test]
fn the_nodes_of_a_question_are_read_and_what_is_no_list_of_them_is_ignored() {
    for (said, expected) in [
        (json!({"node": "a"}), &["a"][..]),
        (json!({"node": "b", "via": ["a"]}), &["a", "b"]),
        (
            json!({"node": "f", "via": ["a", "b", "c", "d", "e"]}),
            &["a", "b", "c", "d"],
        ),
        (json!({"node": 1, "via": "a"}), &[]),
        // As they are, what looks like a secret too: one of them may be this node.
        (
            json!({"via": ["token=ship-7", "sk_live_4eC39HqLyjWDarjtT1zdp7dc"]}),
            &["token=ship-7", "sk_live_4eC39HqLyjWDarjtT1zdp7dc"],
        ),
        (json!("a"), &[]),
    ] {
        let named = |kind: &str| json!({"type": kind, "id": "x"});
        let body = json!({
            "subject": named("Agent"), "action": {"name": "fs.read"}, "resource": named("File"),
            "tidelock": said,
        });
        let body = body.to_string();
        let evaluation = crate::authzen::Evaluation::read(body.as_bytes(), None);
        assert!(evaluation.parts.is_ok(), "{body}");
        assert_eq!(evaluation.via, expected);
        let Evaluations::One(one) = Evaluations::read(body.as_bytes(), None) else {
            panic!("{body}");
        };
        assert_eq!(one.via, expected);
    }
}

#[test]
fn an_obligation_that_must_be_met_and_is_not_known_denies() {
    let with = |obligations: &str| {
        let body = format!(r#"{{"decision": true, "context": {{"obligations": {obligations}}}}}"#);
        read(&body).map(|answer| (answer.decision, answer.why))
    };
    for met in [
        "[]",
        r#"[{"id": "report_outcome", "record": {"index": 1}}, {"id": "posture"}]"#,
        r#"[{"id": "paint_it", "mandatory": false}]"#,
    ] {
        assert_eq!(with(met).unwrap().0, Decision::Allow, "{met}");
    }
    for unmet in [
        r#"[{"id": "two_persons"}]"#,
        r#"[{"id": "posture"}, {"id": "two_persons", "mandatory": true}]"#,
    ] {
        let (decision, why) = with(unmet).unwrap();
        assert_eq!(decision, Decision::Deny, "{unmet}");
        assert!(why.unwrap().contains("two_persons"));
    }
    let many = format!("[{}]", [r#"{"id": "posture"}"#; 9].join(","));
    assert!(with(&many).is_err());
}

#[test]
fn where_answers_are_signed_what_is_signed_must_say_the_same_of_the_same_question() {
    let read = |decision: bool, payload: &Value| {
        let payload = payload.to_string().into_bytes();
        let verify = move |text: &str| match text {
            "good" => Ok(payload.clone()),
            _ => Err("the signature does not verify".to_owned()),
        };
        let body = json!({"decision": decision, "context": {"signed": "good", "lifetime_s": 9}});
        let body = body.to_string();
        let heard = Heard {
            status: 200,
            echoed_id: Some(b"id-1"),
            body: body.as_bytes(),
        };
        UpstreamAnswer::read(&question(), "id-1", heard, Some(&verify))
    };
    let good =
        json!({"question": question().digest.to_string(), "request_id": "id-1", "decision": true});
    let answer = read(true, &good).unwrap();
    assert_eq!(answer.signed.as_deref(), Some("good"));
    // Only what is signed counts.
    assert_eq!(answer.lifetime_s, None);
    let mut shorter = good.clone();
    shorter["lifetime_s"] = json!(5);
    assert_eq!(read(true, &shorter).unwrap().lifetime_s, Some(5));
    assert!(read(false, &good).is_err(), "the body says otherwise");
    for (key, wrong) in [
        ("question", json!(digest(7).to_string())),
        ("request_id", json!("id-2")),
        ("decision", json!(false)),
        ("decision", json!("true")),
        ("lifetime_s", json!(-1)),
        ("colour", json!("red")),
    ] {
        let mut bad = good.clone();
        bad[key] = wrong;
        assert!(read(true, &bad).is_err(), "{key}");
    }
    // Obligations and hold count as they are signed; what stands beside is no part of it.
    let read = |decision: bool, signed: &Value, beside: Value| {
        let mut payload = good.clone();
        payload["decision"] = decision.into();
        for (key, value) in signed.as_object().unwrap() {
            payload[key] = value.clone();
        }
        let mut body = json!({"decision": decision, "context": beside});
        body["context"]["signed"] = "good".into();
        let verify = |_: &str| Ok(payload.to_string().into_bytes());
        let body = body.to_string();
        let heard = Heard {
            status: 200,
            echoed_id: Some(b"id-1"),
            body: body.as_bytes(),
        };
        UpstreamAnswer::read(&question(), "id-1", heard, Some(&verify))
            .map(|answer| answer.decision)
    };
    let owed = json!({"obligations": [{"id": "two_persons"}]});
    let (hold, none) = (json!({"hold": true}), json!({}));
    assert_eq!(read(true, &none, none.clone()), Ok(Decision::Allow));
    assert_eq!(read(true, &owed, none.clone()), Ok(Decision::Deny));
    assert_eq!(read(true, &owed, owed.clone()), Ok(Decision::Deny));
    assert_eq!(read(false, &hold, none.clone()), Ok(Decision::Hold));
    for (decision, signed, beside) in [
        (true, &none, &owed),
        (true, &owed, &json!({"obligations": []})),
        (false, &none, &hold),
        (false, &hold, &json!({"hold": false})),
    ] {
        let read = read(decision, signed, beside.clone());
        assert!(matches!(read, Err(ConsultFailure::Invalid(_))), "{beside}");
    }
    let verify = |_: &str| Err("the signature does not verify".to_owned());
    for body in [
        r#"{"decision": true}"#,
        r#"{"decision": true, "context": {"signed": 1}}"#,
        r#"{"decision": true, "context": {"signed": "bad"}}"#,
        r#"{"decision": false}"#,
    ] {
        let heard = Heard {
            status: 200,
            echoed_id: Some(b"id-1"),
            body: body.as_bytes(),
        };
        let refused = UpstreamAnswer::read(&question(), "id-1", heard, Some(&verify));
        assert!(matches!(refused, Err(ConsultFailure::Invalid(_))), "{body}");
    }
}

/// Every answer and every failure, with and without an earlier answer, under every term.
#[test]
fn nothing_but_an_answer_that_allows_leaves_a_local_permit_standing() {
    let failures = [
        ConsultFailure::Unreachable(String::new()),
        ConsultFailure::Timeout,
        ConsultFailure::Invalid(String::new()),
        ConsultFailure::Busy,
        ConsultFailure::NotNow(503),
        ConsultFailure::NotJudged(String::new()),
        ConsultFailure::Loop(String::new()),
        ConsultFailure::Unconfigured,
    ];
    let answers = [Decision::Allow, Decision::Deny, Decision::Hold].map(said);
    let heard: Vec<_> = answers.into_iter().chain(failures.map(Err)).collect();
    let mut allowed = 0;
    for when in [
        WhenUnreachable::Deny,
        WhenUnreachable::Hold,
        WhenUnreachable::Cached,
    ] {
        let terms = terms(when);
        for said in &heard {
            for kept in [None, Some(false), Some(true)] {
                let mut consults = consults();
                let decision = match kept {
                    Some(true) => Some(Decision::Allow),
                    Some(false) => Some(Decision::Deny),
                    None => None,
                };
                decision.map(|decision| answer(&mut consults, 1, decision, NOW_MS));
                let cached = consults.kept((&digest(1), false), &under(1), NOW_MS);
                assert_eq!(cached.is_some(), kept.is_some());
                let (reason, note) = weigh(&terms, (digest(1), &[]), said, cached, NOW_MS);
                let is_absence = matches!(
                    said,
                    Err(ConsultFailure::Unreachable(_) | ConsultFailure::Timeout)
                );
                let expected = match (said, kept) {
                    (Ok(answer), _) => answer.decision,
                    (Err(_), Some(false)) if is_absence => Decision::Deny,
                    (Err(_), Some(true)) if is_absence && when == WhenUnreachable::Cached => {
                        Decision::Allow
                    }
                    (Err(_), _) if is_absence && when == WhenUnreachable::Hold => Decision::Hold,
                    (Err(_), _) => Decision::Deny,
                };
                assert_eq!(reason.decision(), expected, "{when:?} {said:?} {kept:?}");
                // A fallback is told as one.
                assert_eq!(note.is_fallback(), said.is_err());
                allowed += u32::from(expected == Decision::Allow);
            }
        }
    }
    assert_eq!(
        allowed,
        3 * 3 + 2,
        "one word for each answer, two for the cache"
    );
}

#[test]
fn equal_questions_are_asked_once_and_all_hear_the_answer() {
    let mut consults = consults();
    let begin = |consults: &mut Consults<u64>, number, waiter| {
        consults.begin(asked(number), &holder("a"), waiter, Duration::ZERO)
    };
    let Begun::Send(flight) = begin(&mut consults, 1, 10) else {
        unreachable!("the first one is sent");
    };
    assert!(matches!(begin(&mut consults, 1, 11), Begun::Joined));
    assert!(matches!(begin(&mut consults, 2, 12), Begun::Send(_)));
    assert_eq!(consults.stats(Duration::ZERO).waiting, 3);
    let times = (Duration::ZERO, NOW_MS);
    let settled = consults.settle(
        (digest(1), flight),
        &said(Decision::Allow),
        times,
        Some(&under(1)),
    );
    assert_eq!(settled.waiting, [10, 11]);
    // What comes a second time, or late, is nobody's.
    let again = consults.settle(
        (digest(1), flight),
        &said(Decision::Deny),
        times,
        Some(&under(1)),
    );
    assert!(again.waiting.is_empty());
    assert!(
        consults
            .kept((&digest(1), false), &under(1), NOW_MS)
            .unwrap()
            .allow
    );
    let Begun::Send(next) = begin(&mut consults, 1, 13) else {
        unreachable!("it is asked again");
    };
    let stale = consults.settle(
        (digest(1), flight),
        &said(Decision::Deny),
        times,
        Some(&under(1)),
    );
    assert!(stale.waiting.is_empty(), "an answer to an earlier one");
    let settled = consults.settle((digest(1), next), &away(), times, Some(&under(1)));
    assert_eq!(settled.waiting, [13]);
}

#[test]
fn inv_07_questions_waiters_and_answers_are_bounded() {
    let mut consults = consults();
    let mut sent = 0;
    for number in 0..200 {
        match consults.begin(asked(number), &holder("a"), number, Duration::ZERO) {
            Begun::Send(_) => sent += 1,
            Begun::Failed(ConsultFailure::Busy, waiter) => assert_eq!(waiter, number),
            other => unreachable!("{other:?}"),
        }
    }
    assert_eq!(sent, MAX_CONSULTS_PER_CALLER, "one caller's share");
    for number in 1_000..1_200 {
        let begun = consults.begin(asked(number), &holder("b"), number, Duration::ZERO);
        sent += usize::from(matches!(begun, Begun::Send(_)));
    }
    assert_eq!(
        sent, MAX_CONSULTS_PER_UPSTREAM,
        "another one has a share too"
    );
    // Who joins a question that is on its way takes of its share too.
    let join = |consults: &mut Consults<u64>, who: &str| {
        (0..200)
            .filter(|_| {
                let begun = consults.begin(asked(0), &holder(who), 0, Duration::ZERO);
                matches!(begun, Begun::Joined)
            })
            .count()
    };
    assert_eq!(join(&mut consults, "a"), 0, "its share is spent");
    assert_eq!(join(&mut consults, "c"), MAX_CONSULTS_PER_CALLER);
    let joined: usize = (0..100)
        .map(|number| join(&mut consults, &format!("d{number}")))
        .sum();
    assert_eq!(joined + MAX_CONSULTS_PER_CALLER + sent, MAX_CONSULT_WAITING);
    // Who carries them has lost them all.
    let lost = consults.take_overdue(Duration::from_secs(1), NOW_MS);
    assert_eq!(lost.len(), MAX_CONSULT_WAITING);
    assert_eq!(consults.stats(Duration::ZERO).waiting, 0);

    let mut consults = self::consults();
    for number in 0..2_000 {
        let own = asked(number);
        let asked = Asked {
            principal: format!("Agent::{}", number % 10),
            ..own
        };
        consults.remember(&asked, &said(Decision::Allow).unwrap(), NOW_MS + number);
        let stats = consults.stats(Duration::ZERO);
        assert!(stats.kept <= MAX_CONSULT_CACHED && stats.kept_bytes <= MAX_CONSULT_CACHE_BYTES);
    }
    let kept = consults.stats(Duration::ZERO).kept;
    assert!(kept > 300, "{kept}");
    // The last to expire are there, and nobody's share is exceeded.
    assert!(
        consults
            .kept((&digest(1_999), false), &under(1), NOW_MS + 1_999)
            .is_some()
    );
    let mut greedy = self::consults();
    answer(&mut greedy, 5_000, Decision::Allow, NOW_MS);
    for number in 0..2_000 {
        let asked = Asked {
            principal: "Agent::greedy".to_owned(),
            ..asked(number)
        };
        greedy.remember(&asked, &said(Decision::Allow).unwrap(), NOW_MS + number);
    }
    // And with answers as long as they can be.
    let long = || {
        let mut long = said(Decision::Allow).unwrap();
        long.signed = Some("s".repeat(MAX_CONSULT_SIGNED_BYTES));
        long
    };
    for number in 2_000..2_200 {
        let asked = Asked {
            principal: "Agent::greedy".to_owned(),
            ..asked(number)
        };
        greedy.remember(&asked, &long(), NOW_MS + number);
    }
    let of_greedy = |kept: &&KeptAnswer| kept.principal == "Agent::greedy";
    let of_greedy = greedy.answers.by_question.values().filter(of_greedy);
    let bytes: usize = of_greedy.map(KeptAnswer::bytes).sum();
    assert!(bytes <= MAX_CONSULT_CACHE_BYTES_PER_PRINCIPAL, "{bytes}");
    assert!(
        greedy
            .kept((&digest(2_199), false), &under(1), NOW_MS + 2_199)
            .is_some()
    );
    assert!(
        greedy
            .kept((&digest(5_000), false), &under(1), NOW_MS)
            .is_some()
    );
    let bytes = serde_json::to_vec(&greedy.to_keep()).unwrap().len();
    assert!(bytes <= greedy.stats(Duration::ZERO).kept_bytes, "{bytes}");
}

#[test]
fn a_breaker_opens_on_absence_only_and_lets_one_question_try() {
    let mut consults = consults();
    let ask = |consults: &mut Consults<u64>, said: &Result<_, _>, now: Duration| match consults
        .begin(asked(1), &holder("a"), 1, now)
    {
        Begun::Send(flight) => {
            consults.settle((digest(1), flight), said, (now, NOW_MS), Some(&under(1)));
            Ok(())
        }
        Begun::Failed(failure, _) => Err(failure),
        Begun::Joined => unreachable!("nothing is on its way"),
    };
    for _ in 0..20 {
        // It is there, whatever it says.
        let garbage = Err(ConsultFailure::Invalid("x".to_owned()));
        assert_eq!(ask(&mut consults, &garbage, Duration::ZERO), Ok(()));
    }
    for _ in 0..CONSULT_BREAKER.failures {
        assert_eq!(ask(&mut consults, &away(), Duration::ZERO), Ok(()));
    }
    let open = ask(&mut consults, &away(), Duration::ZERO);
    assert!(
        matches!(open, Err(ConsultFailure::Unreachable(_))),
        "{open:?}"
    );
    assert_eq!(consults.stats(Duration::ZERO).upstreams[0].breaker, "open");
    let later = CONSULT_BREAKER.open_for;
    let Begun::Send(probe) = consults.begin(asked(1), &holder("a"), 1, later) else {
        unreachable!("one may try");
    };
    let second = consults.begin(asked(2), &holder("a"), 2, later);
    assert!(matches!(
        second,
        Begun::Failed(ConsultFailure::Unreachable(_), 2)
    ));
    let times = (later, NOW_MS);
    consults.settle(
        (digest(1), probe),
        &said(Decision::Deny),
        times,
        Some(&under(1)),
    );
    assert_eq!(consults.stats(later).upstreams[0].breaker, "closed");
    assert_eq!(ask(&mut consults, &away(), later), Ok(()));
}

#[test]
fn a_deadline_that_was_too_short_keeps_nobody_from_asking() {
    let state_after = |said: &Result<UpstreamAnswer, ConsultFailure>, deadline| {
        let mut consults = consults();
        for number in 0..20 {
            let asked = Asked {
                deadline,
                ..asked(number)
            };
            let begun = consults.begin(asked, &holder("a"), number, Duration::ZERO);
            if let Begun::Send(flight) = begun {
                let times = (Duration::ZERO, NOW_MS);
                consults.settle((digest(number), flight), said, times, Some(&under(1)));
            }
        }
        consults.stats(Duration::ZERO).upstreams[0].breaker
    };
    let late = Err(ConsultFailure::Timeout);
    let short = CONSULT_BREAKER_TIMEOUT_MIN / 2;
    assert_eq!(state_after(&late, short), "closed");
    assert_eq!(state_after(&late, CONSULT_BREAKER_TIMEOUT_MIN), "open");
    // Nobody being there does not depend on how long one waits, and somebody who is overrun is there.
    assert_eq!(state_after(&away(), short), "open");
    let overrun = Err(ConsultFailure::NotNow(429));
    assert_eq!(state_after(&overrun, CONSULT_BREAKER_TIMEOUT_MIN), "closed");
}

#[test]
fn an_allow_that_serves_less_long_takes_time_from_the_one_before() {
    for (lifetime_s, is_withdrawn) in [
        (Some(0), true),
        (Some(1), true),
        (Some(59), true),
        (Some(60), false),
        (None, false),
    ] {
        let mut consults = consults();
        assert!(!answer(&mut consults, 1, Decision::Allow, NOW_MS).is_withdrawn);
        let mut allow = said(Decision::Allow).unwrap();
        allow.lifetime_s = lifetime_s;
        let shortened = consults.remember(&asked(1), &allow, NOW_MS);
        assert_eq!(shortened, is_withdrawn, "{lifetime_s:?}");
        let kept = consults.kept((&digest(1), false), &under(1), NOW_MS);
        assert_eq!(kept.is_some(), lifetime_s != Some(0));
    }
}

#[test]
fn of_a_failure_callers_hear_the_word_only() {
    let terms = terms(WhenUnreachable::Deny);
    let tell = |said| weigh(&terms, (digest(1), &[]), &said, None, NOW_MS).1;
    for failure in [
        ConsultFailure::Unreachable("10.20.0.5:8443: /etc/ca.crt".to_owned()),
        ConsultFailure::Invalid("status 500".to_owned()),
    ] {
        let note = tell(Err(failure.clone()));
        assert_eq!(
            (note.told().outcome, note.told().why),
            (failure.word(), None)
        );
        // The record has it for the operator.
        assert!(note.why.unwrap().contains(&failure.to_string()));
    }
    let mut no = said(Decision::Deny).unwrap();
    no.why = Some("not today".to_owned());
    assert_eq!(tell(Ok(no)).told().why.as_deref(), Some("not today"));
}

#[test]
fn a_deny_takes_the_place_of_an_allow_whatever_its_lifetime() {
    for last in [Decision::Deny, Decision::Hold] {
        let mut consults = consults();
        assert!(!answer(&mut consults, 1, Decision::Allow, NOW_MS).is_withdrawn);
        assert!(consults.changed().is_some());
        assert!(consults.changed().is_none());
        assert!(answer(&mut consults, 1, last, NOW_MS + 1).is_withdrawn);
        assert!(consults.changed().is_some());
        let kept = consults.kept((&digest(1), false), &under(1), NOW_MS + 2);
        assert!(kept.is_none_or(|kept| !kept.allow), "{last}");
    }
}

#[test]
fn an_answer_that_came_through_others_takes_an_allow_back_and_leaves_nothing() {
    let relayed = || Asked {
        question: digest(7),
        ..asked(1)
    };
    let mut consults = consults();
    let kept = |consults: &Consults<u64>| {
        let now_ms = NOW_MS + 1;
        assert_eq!(
            consults.kept((&digest(7), false), &under(1), now_ms),
            None,
            "nothing under its own key"
        );
        consults
            .kept((&digest(1), false), &under(1), now_ms)
            .map(|kept| kept.allow)
    };
    for decision in [Decision::Allow, Decision::Deny, Decision::Hold] {
        assert!(!consults.remember(&relayed(), &said(decision).unwrap(), NOW_MS));
        assert_eq!(kept(&consults), None);
    }
    // It makes no allow of a deny, and does not lengthen the time of an allow.
    answer(&mut consults, 1, Decision::Deny, NOW_MS);
    assert!(!consults.remember(&relayed(), &said(Decision::Allow).unwrap(), NOW_MS));
    assert_eq!(kept(&consults), Some(false));
    answer(&mut consults, 1, Decision::Allow, NOW_MS);
    assert!(!consults.remember(&relayed(), &said(Decision::Allow).unwrap(), NOW_MS + 1_000));
    assert_eq!(kept(&consults), Some(true));
    let later = consults.kept((&digest(1), false), &under(1), NOW_MS + 60_000);
    assert_eq!(later, None);
    for decision in [Decision::Deny, Decision::Hold] {
        answer(&mut consults, 1, Decision::Allow, NOW_MS);
        assert!(consults.changed().is_some());
        assert!(consults.remember(&relayed(), &said(decision).unwrap(), NOW_MS));
        assert!(consults.changed().is_some());
        assert_eq!(kept(&consults), None);
    }
}

#[test]
fn what_was_kept_serves_again_under_the_same_bundle_only() {
    let mut first = consults();
    answer(&mut first, 1, Decision::Allow, NOW_MS);
    let text = serde_json::to_string(&first.changed().unwrap()).unwrap();
    let kept = || serde_json::from_str::<KeptAnswers>(&text).unwrap();
    let restored = |in_force: Option<Under>| {
        let mut consults = Consults::<u64>::default();
        consults.restore(kept());
        consults.observe(in_force.as_ref());
        consults
            .kept((&digest(1), false), &under(1), NOW_MS + 5)
            .is_some()
    };
    assert!(restored(Some(under(1))));
    assert!(!restored(Some(under(2))));
    assert!(!restored(None));
    let other_epoch = Under {
        epoch: 2,
        ..under(1)
    };
    assert!(!restored(Some(other_epoch)));
}

#[test]
fn answers_are_of_one_decision_point_and_signed_where_it_signs() {
    let ask = |digest: Option<u64>, signs| Question {
        identity: digest.map(|number| UpstreamIdentity {
            digest: self::digest(number),
            signs,
        }),
        ..question()
    };
    // The name is the same, and the question as it is sent.
    assert_eq!(ask(Some(1), true).key(), ask(Some(1), true).key());
    assert_ne!(ask(Some(1), true).key(), ask(Some(2), true).key());
    assert_ne!(ask(Some(1), true).key(), ask(None, true).key());

    let mut consults = consults();
    answer(&mut consults, 1, Decision::Allow, NOW_MS);
    answer(&mut consults, 2, Decision::Deny, NOW_MS);
    let mut signed = said(Decision::Allow).unwrap();
    signed.signed = Some("jws".to_owned());
    consults.remember(&asked(3), &signed, NOW_MS);
    let kept = |consults: &Consults<u64>, signs| {
        [1, 2, 3].map(|number| {
            consults
                .kept((&digest(number), signs), &under(1), NOW_MS)
                .is_some()
        })
    };
    assert_eq!(kept(&consults, false), [true, true, true]);
    assert_eq!(kept(&consults, true), [false, true, true]);
    let _ = consults.changed();
    consults.forget(&BTreeSet::from(["another".to_owned()]));
    assert!(consults.changed().is_none());
    assert_eq!(kept(&consults, false), [true, true, true]);
    consults.forget(&BTreeSet::from(["authority".to_owned()]));
    assert_eq!(consults.changed().unwrap().answers, []);
    assert_eq!(kept(&consults, false), [false, false, false]);
}

#[derive(Debug, Clone)]
enum Step {
    Answer(u64, Decision, Option<u64>),
    Away(u64),
    Pass(u64),
    Bundle(u64),
    Close,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let decision = prop_oneof![
        Just(Decision::Allow),
        Just(Decision::Deny),
        Just(Decision::Hold)
    ];
    prop_oneof![
        4 => (0..4_u64, decision, proptest::option::of(0..90_u64))
            .prop_map(|(number, decision, life)| Step::Answer(number, decision, life)),
        4 => (0..4_u64).prop_map(Step::Away),
        2 => (0..50_000_u64).prop_map(Step::Pass),
        1 => (1..3_u64).prop_map(Step::Bundle),
        1 => Just(Step::Close),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Against the simplest reference: a question may be allowed in the dark exactly if the last answer to it
    /// was an allow, under the bundle in force, within its lifetime, and nothing was closed since.
    #[test]
    fn an_answer_serves_in_the_dark_only_while_it_may(steps in proptest::collection::vec(step(), 1..60)) {
        let mut consults = Consults::<u64>::default();
        let (mut now_ms, mut epoch) = (NOW_MS, 1);
        consults.observe(Some(&under(epoch)));
        let mut reference: BTreeMap<u64, (Decision, u64)> = BTreeMap::new();
        let mut open_until = Duration::ZERO;
        for step in steps {
            // The breaker is another test's: time of this kind passes between two questions.
            open_until += Duration::from_secs(61);
            match step {
                Step::Answer(number, decision, lifetime_s) => {
                    let asked = Asked { under: under(epoch), ..asked(number) };
                    let Begun::Send(flight) = consults.begin(asked, &holder("a"), 0, open_until) else {
                        return Err(TestCaseError::fail("not sent"));
                    };
                    let mut said = said(decision).unwrap();
                    said.lifetime_s = lifetime_s;
                    consults.settle((digest(number), flight), &Ok(said), (open_until, now_ms), Some(&under(epoch)));
                    let life_ms = lifetime_s.unwrap_or(60).min(60) * 1_000;
                    reference.insert(number, (decision, now_ms + life_ms));
                }
                Step::Away(number) => {
                    let kept = consults.kept((&digest(number), false), &under(epoch), now_ms);
                    let terms = terms(WhenUnreachable::Cached);
                    let (reason, note) = weigh(&terms, (digest(number), &[]), &away(), kept, now_ms);
                    let live = reference.get(&number).filter(|(_, until)| now_ms < *until);
                    let may = live.is_some_and(|(decision, _)| *decision == Decision::Allow);
                    prop_assert_eq!(reason.decision() == Decision::Allow, may);
                    prop_assert!(note.is_fallback());
                }
                Step::Pass(ms) => {
                    now_ms += ms;
                    consults.sweep(now_ms, |_| false);
                }
                Step::Bundle(next) => {
                    if next != epoch {
                        reference.clear();
                    }
                    epoch = next;
                    consults.observe(Some(&under(epoch)));
                }
                Step::Close => {
                    consults.sweep(now_ms, |_| true);
                    reference.clear();
                }
                Step::Restart => {
                    let kept = consults.to_keep();
                    consults = Consults::default();
                    consults.restore(kept);
                    consults.observe(Some(&under(epoch)));
                }
            }
            let live: BTreeSet<_> = consults.answers.by_question.keys().copied().collect();
            let bytes: usize = consults.answers.by_question.values().map(KeptAnswer::bytes).sum();
            prop_assert_eq!(bytes, consults.answers.bytes);
            prop_assert!(live.len() <= 4);
        }
    }
}

#[test]
fn an_answer_from_ahead_of_the_clock_does_not_serve() {
    let mut consults = consults();
    answer(&mut consults, 1, Decision::Allow, NOW_MS);
    assert!(
        consults
            .kept((&digest(1), false), &under(1), NOW_MS)
            .is_some()
    );
    assert!(
        consults
            .kept((&digest(1), false), &under(1), NOW_MS - 1)
            .is_none()
    );
    assert!(
        consults
            .kept((&digest(1), false), &under(1), NOW_MS + 59_999)
            .is_some()
    );
    assert!(
        consults
            .kept((&digest(1), false), &under(1), NOW_MS + 60_000)
            .is_none()
    );
}
