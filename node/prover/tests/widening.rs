//! Pairs of bundles, and what the proof says of them with a real solver. Without `cvc5` these print
//! `not run`: what needs none is tested all the same.
#![cfg(test)]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_policy::testing::{Authority, NODE_VERSION};
use tidelock_policy::{
    BundleBuilder, Engine as _, LoadContext, PolicyRequest, Role, TrustFile, Verdict,
    VerifiedBundle,
};
use tidelock_prover::{
    Counterexample, Question, Questions, WhyUnproven, Widening, compare_limits, confirm, questions,
    settle,
};

const SCHEMA: &str = r#"
entity Team;
entity Agent in [Team] = { level: Long, nick?: String };
entity Note = { open: Bool, owner?: Agent };
action "group";
action "read" in ["group"] appliesTo { principal: [Agent], resource: [Note], context: { hour?: Long } };
action "write" appliesTo { principal: [Agent], resource: [Note] };
"#;

const ENTITIES: &str = r#"[
 {"uid": {"type": "Agent", "id": "ada"}, "attrs": {"level": 5}, "parents": [{"type": "Team", "id": "core"}]},
 {"uid": {"type": "Agent", "id": "bob"}, "attrs": {"level": 1, "nick": "b"}, "parents": []},
 {"uid": {"type": "Team", "id": "core"}, "attrs": {}, "parents": []}]"#;

/// When the bundles were made.
const MADE: u64 = 1_769_860_800_000;

#[derive(Clone)]
struct Bundle {
    schema: String,
    policies: String,
    entities: Option<String>,
    links: Option<String>,
    manifest: Value,
}

impl Bundle {
    fn of(policies: &str) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            policies: policies.to_owned(),
            entities: Some(ENTITIES.to_owned()),
            links: None,
            manifest: json!({
                "format": 1, "name": "base", "domain": "site-1", "epoch": 1, "version": "1.0.0",
                "engine": "cedar", "min_node_version": "0.1.0", "created_at": "2026-01-31T12:00:00Z",
                "min_fallback_epoch": 1, "default_class": "all", "files": {},
                "classes": {"all": {"actions": [], "stale_after_s": 10, "restrict_after_s": 20,
                                    "close_after_s": 30, "when_restricted": "deny"}},
            }),
        }
    }

    fn with(mut self, pointer: &str, value: Value) -> Self {
        match self.manifest.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => self.manifest[pointer.trim_start_matches('/')] = value,
        }
        self
    }

    fn schema(mut self, from: &str, to: &str) -> Self {
        assert!(self.schema.contains(from), "{from}");
        self.schema = self.schema.replace(from, to);
        self
    }

    fn policies_of_read(mut self) -> Self {
        self.policies = self
            .policies
            .replace("action,", "action == Action::\"read\",");
        self
    }

    fn archive(&self) -> Vec<u8> {
        let mut builder = BundleBuilder::new()
            .file("manifest.json", self.manifest.to_string().into_bytes())
            .file("schema.cedarschema", self.schema.clone().into_bytes())
            .file("policies/base.cedar", self.policies.clone().into_bytes());
        for (path, text) in [
            ("entities.json", &self.entities),
            ("links.json", &self.links),
        ] {
            if let Some(text) = text {
                builder = builder.file(path, text.clone().into_bytes());
            }
        }
        builder.build().unwrap()
    }
}

fn solver() -> Option<&'static Path> {
    let path = Path::new("/usr/bin/cvc5");
    if path.exists() {
        return Some(path);
    }
    eprintln!("not run: cvc5 is not installed");
    None
}

fn solve(script: &str) -> Result<String, Widening> {
    let mut child = Command::new("/usr/bin/cvc5")
        .args(["--lang=smt2", "--strings-exp", "--tlimit=20000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let script = script.to_owned();
    let writer = std::thread::spawn(move || input.write_all(script.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join();
    Ok(String::from_utf8(output.stdout).unwrap())
}

fn proved(before: &Bundle, after: &Bundle) -> Widening {
    let (before, after) = (before.archive(), after.archive());
    if let Some(settled) = compare_limits(&before, &after, MADE).unwrap() {
        return settled;
    }
    let asked = questions(&before, &after).unwrap();
    settle(&asked, &mut solve, &mut |question, number, model| {
        Ok(confirm(&before, &after, &question.about, number, model).unwrap())
    })
}

fn load(bundle: &Bundle) -> VerifiedBundle {
    let authority = Authority::new("site-1", 1).unwrap();
    let text = authority.roles_toml(&[(Role::Policy, 1)], &[&[Role::Policy]]);
    let trust = TrustFile::parse(&text).unwrap();
    let package = authority.sign(bundle.archive(), &[0]).unwrap();
    let context = LoadContext::new("site-1", NODE_VERSION).unwrap();
    VerifiedBundle::load(package, &trust, &context).unwrap()
}

fn request(principal: &str, action: &str, note: Value, context: Value) -> PolicyRequest {
    let Value::Object(resource_attributes) = note else {
        panic!("{note}")
    };
    PolicyRequest {
        principal_type: "Agent".to_owned(),
        principal_id: principal.to_owned(),
        action: action.to_owned(),
        resource_type: "Note".to_owned(),
        resource_id: "n".to_owned(),
        resource_attributes,
        params: Value::Null,
        context,
    }
}

/// Every request of a small world, in which a principal may be one that nobody described.
fn world() -> Vec<PolicyRequest> {
    let agent = |id: &str| json!({"type": "Agent", "id": id});
    let mut all = Vec::new();
    for principal in ["ada", "bob", "eve"] {
        for open in [true, false] {
            for owner in [None, Some("ada"), Some("bob"), Some("eve")] {
                let mut note = json!({"open": open});
                if let Some(owner) = owner {
                    note["owner"] = agent(owner);
                }
                for context in [json!({}), json!({"hour": 3}), json!({"hour": i64::MAX})] {
                    all.push(request(principal, "read", note.clone(), context));
                }
                all.push(request(principal, "write", note.clone(), json!({})));
            }
        }
    }
    all
}

fn witness(before: &VerifiedBundle, after: &VerifiedBundle) -> Option<PolicyRequest> {
    world().into_iter().find(|request| {
        after.evaluate(request).verdict == Verdict::Permit
            && before.evaluate(request).verdict != Verdict::Permit
    })
}

fn reason(widening: &Widening) -> Option<WhyUnproven> {
    match widening {
        Widening::Unproven { reason, .. } => Some(*reason),
        _ => None,
    }
}

fn counterexample(widening: &Widening) -> &Counterexample {
    match widening {
        Widening::Wider {
            counterexample: Some(found),
            ..
        } => found,
        other => panic!("{other}"),
    }
}

const READS: &str =
    r#"@id("reads") permit(principal in Team::"core", action == Action::"read", resource);"#;

/// Permits nothing that is not permitted now.
#[test]
fn what_is_narrower_or_the_same_in_other_words_is_proved() {
    if solver().is_none() {
        return;
    }
    let open = r#"permit(principal, action, resource) when { resource.open };"#;
    let level =
        r#"permit(principal, action == Action::"write", resource) when { principal.level > 3 };"#;
    for (name, before, after) in [
        ("a permit goes", format!("{READS}{open}"), open.to_owned()),
        ("a permit of who is described goes", format!("{READS}{level}"), READS.to_owned()),
        ("a condition comes", READS.to_owned(), READS.replace(';', " when { resource.open };")),
        ("a forbid comes", open.to_owned(), format!("{open} forbid(principal, action, resource) when {{ context has hour }};")),
                (
            "a longer pattern",
            r#"permit(principal, action, resource) when { principal has nick && principal.nick like "b*" };"#.to_owned(),
            r#"permit(principal, action, resource) when { principal has nick && principal.nick like "ba*" };"#.to_owned(),
        ),
("double negation", open.to_owned(), open.replace("resource.open", "!!resource.open")),
        ("a higher bar", level.to_owned(), level.replace('3', "4")),
        ("another spelling", READS.to_owned(),
         r#"permit(principal, action == Action::"read", resource) when { principal in Team::"core" };"#.to_owned()),
        ("another id and order", format!("{READS}{open}"), format!("{open}{}", READS.replace("reads", "may-read"))),
        ("one who is not described errs in both", level.to_owned(), format!("{level}{}", level.replace('3', "5"))),
        ("a group of actions is its members",
         r#"permit(principal, action == Action::"read", resource);"#.to_owned(),
         r#"permit(principal, action in Action::"group", resource);"#.to_owned()),
    ] {
        let (before, after) = (Bundle::of(&before), Bundle::of(&after));
        assert_eq!(proved(&before, &after), Widening::NotWider, "{name}");
        assert_eq!(witness(&load(&before), &load(&after)), None, "{name}");
    }
}

#[test]
fn what_is_wider_is_shown_by_a_request() {
    if solver().is_none() {
        return;
    }
    let open = r#"permit(principal, action, resource) when { resource.open };"#;
    let halt = r#"forbid(principal, action == Action::"write", resource);"#;
    let level = r#"permit(principal, action, resource) when { principal.level > 3 };"#;
    for (name, before, after) in [
        ("an attribute less", r#"permit(principal, action, resource) when { resource.open && resource has owner };"#, open.to_owned()),
        ("a forbid less", &format!("{open}{halt}"), open.to_owned()),
        ("a permit more", READS, format!("{READS}{open}")),
        ("a lower bar", level, level.replace('3', "2")),
        ("an optional attribute no longer asked for", r#"permit(principal, action == Action::"read", resource) when { context has hour && context.hour < 9 };"#,
         r#"permit(principal, action == Action::"read", resource);"#.to_owned()),
        // Nobody reads an attribute that one who is not described has not: what erred is permitted now.
        ("an error less", r#"permit(principal, action, resource); forbid(principal, action, resource) when { principal.level < 0 };"#,
         r#"permit(principal, action, resource); forbid(principal, action, resource) when { principal has level && principal.level < 0 };"#.to_owned()),
        ("an overflow less", r#"permit(principal, action == Action::"read", resource) when { context has hour && context.hour + 1 != 0 };"#,
         r#"permit(principal, action == Action::"read", resource) when { context has hour && context.hour != -1 };"#.to_owned()),
    ] {
        let (before, after) = (Bundle::of(before), Bundle::of(&after));
        let widening = proved(&before, &after);
        let found = counterexample(&widening);
        assert_ne!(found.before, Verdict::Permit, "{name}");
        assert!(!found.permitted_by.is_empty(), "{name}");
        // The other way round it is narrower, or the same where only the errors differ.
        assert_eq!(proved(&after, &before), Widening::NotWider, "{name}");
    }
}

#[test]
fn templates_actions_and_types_count() {
    if solver().is_none() {
        return;
    }
    let template =
        format!(r#"{READS} @id("t") permit(principal == ?principal, action, resource);"#);
    let link = |ids: &[&str]| {
        let links = ids.iter().map(|id| {
            json!({"id": format!("t-{id}"), "template": "t", "principal": {"type": "Agent", "id": id}})
        });
        let mut bundle = Bundle::of(&template);
        bundle.links = Some(Value::Array(links.collect()).to_string());
        bundle
    };
    let widening = proved(&link(&["ada"]), &link(&["ada", "bob"]));
    let found = counterexample(&widening);
    assert_eq!(found.principal.1, "bob");
    assert_eq!(found.permitted_by, ["t-bob"]);
    assert_eq!(
        proved(&link(&["ada", "bob"]), &link(&["ada"])),
        Widening::NotWider
    );

    let all = "permit(principal, action, resource);";
    let before = Bundle::of(READS);
    let action = |policies: &str| {
        Bundle::of(policies).schema(
            r#"action "write""#,
            r#"action "erase" appliesTo { principal: [Agent], resource: [Note] }; action "write""#,
        )
    };
    // A new action that nothing permits is nothing new, and one that something permits is.
    assert_eq!(proved(&before, &action(READS)), Widening::NotWider);
    let widening = proved(
        &before,
        &action(&format!(
            r#"{READS} permit(principal, action == Action::"erase", resource);"#
        )),
    );
    assert_eq!(counterexample(&widening).action, "erase");
    let robots = |policies: &str| {
        Bundle::of(policies)
            .schema("entity Team;", "entity Team; entity Robot;")
            .schema(
                "principal: [Agent], resource: [Note] };",
                "principal: [Agent, Robot], resource: [Note] };",
            )
    };
    assert_eq!(proved(&before, &robots(READS)), Widening::NotWider);
    let widening = proved(&Bundle::of(all), &robots(all));
    assert_eq!(counterexample(&widening).principal.0, "Robot");
    // An attribute more in the context: nobody could send it before.
    let context = Bundle::of(all).schema("hour?: Long", "hour?: Long, day?: Long");
    let widening = proved(&Bundle::of(all), &context);
    assert_eq!(reason(&widening), Some(WhyUnproven::Schema), "{widening}");
    let narrow = Bundle::of(&all.replace(";", " when { context has day };"));
    let context = Bundle {
        schema: context.schema,
        ..narrow
    };
    let widening = proved(&Bundle::of(READS), &context.policies_of_read());
    assert!(counterexample(&widening).context.get("day").is_some());
}

/// Policies of both bundles are read with the newer schema, and only the groups of the requested action were
/// compared: an older forbid that looks at the groups of another one was taken for what the newer one says.
#[test]
fn other_groups_of_any_action_prove_nothing() {
    let plain =
        |policies: &str| Bundle::of(policies).schema("hour?: Long", "hour?: Long, what?: Action");
    let grouped = |policies: &str| {
        plain(policies).schema(
            r#"action "write" applies"#,
            r#"action "write" in ["group"] applies"#,
        )
    };
    let halted = r#"permit(principal, action == Action::"read", resource);
        forbid(principal, action == Action::"read", resource)
        when { context has what && !(context.what in Action::"group") };"#;
    let by_group = r#"permit(principal, action in Action::"group", resource);"#;
    let less = |policies: &str| {
        format!("{policies} forbid(principal, action, resource) when {{ resource.open }};")
    };
    for policies in [halted, by_group] {
        for after in [policies.to_owned(), less(policies)] {
            for (before, after) in [
                (plain(policies), grouped(&after)),
                (grouped(policies), plain(&after)),
            ] {
                let widening = proved(&before, &after);
                assert_eq!(reason(&widening), Some(WhyUnproven::Schema), "{widening}");
                assert!(widening.to_string().contains("action write"), "{widening}");
            }
        }
    }
    // One of these pairs is wider indeed.
    let what = json!({"what": {"__entity": {"type": "Action", "id": "write"}}});
    let note = json!({"open": true});
    let asked = request("ada", "read", note, what);
    let verdict = |bundle: &Bundle| load(bundle).evaluate(&asked).verdict;
    assert_eq!(verdict(&plain(halted)), Verdict::Forbid);
    assert_eq!(verdict(&grouped(halted)), Verdict::Permit);
    // Where the context can name an action, one more is one more request.
    let more = |policies: &str| {
        plain(policies).schema(
            r#"action "write" applies"#,
            r#"action "erase"; action "write" applies"#,
        )
    };
    let what = json!({"what": {"__entity": {"type": "Action", "id": "erase"}}});
    let asked = request("ada", "read", json!({"open": true}), what);
    let verdict = |bundle: &Bundle| load(bundle).evaluate(&asked).verdict;
    let reads = READS.replace(';', " when { context has what };");
    assert_ne!(verdict(&plain(&reads)), Verdict::Permit);
    assert_eq!(verdict(&more(&reads)), Verdict::Permit);
    let widening = proved(&plain(&reads), &more(&reads));
    assert_eq!(reason(&widening), Some(WhyUnproven::Schema), "{widening}");
    if solver().is_none() {
        return;
    }
    // The control: with the same groups all of it is proved, and what is wider is seen.
    for bundle in [&plain as &dyn Fn(&str) -> Bundle, &grouped] {
        for policies in [halted, by_group] {
            let (before, after) = (bundle(policies), bundle(&less(policies)));
            assert_eq!(proved(&before, &after), Widening::NotWider);
            counterexample(&proved(&after, &before));
        }
    }
}

#[test]
fn what_no_solver_sees_is_compared() {
    let before = Bundle::of(READS);
    let same = before
        .clone()
        .with("/epoch", json!(2))
        .with("/version", json!("9.0.0"));
    let say = |before: &Bundle, after: &Bundle| {
        compare_limits(&before.archive(), &after.archive(), MADE).unwrap()
    };
    assert_eq!(say(&before, &same), Some(Widening::NotWider), "renewed");
    let looser = |after: &Bundle| match say(&before, after) {
        Some(Widening::Wider { looser, .. }) => looser.join("; "),
        other => format!("{other:?}"),
    };
    for (pointer, value, word) in [
        ("/classes/all/stale_after_s", json!(11), "stale_after_s 11"),
        (
            "/classes/all/restrict_after_s",
            json!(21),
            "restrict_after_s 21",
        ),
        ("/classes/all/close_after_s", json!(31), "close_after_s 31"),
        (
            "/classes/all/when_restricted",
            json!("degrade"),
            "when_restricted",
        ),
        (
            "/created_at",
            json!("2026-02-02T12:00:00Z"),
            "48 hours ahead",
        ),
    ] {
        let after = same.clone().with(pointer, value);
        assert!(
            looser(&after).contains(word),
            "{pointer}: {}",
            looser(&after)
        );
    }
    // A decision point that has to agree to less (ruling 17), or whose earlier word serves for longer.
    let consult = |upstream: &str, when: &str, lifetime_s: u64| {
        same.clone().with(
            "/classes/all",
            json!({"actions": [], "stale_after_s": 10, "restrict_after_s": 20,
                   "close_after_s": 30, "when_restricted": "deny", "consult": {"upstream": upstream, "deadline_ms": 100, "when_unreachable": when, "allow_lifetime_s": lifetime_s}}),
        )
    };
    let strict = consult("authority", "deny", 0);
    let cached = consult("authority", "cached", 60);
    for (before, after, word) in [
        (&strict, &same, "authority no longer has to agree"),
        (
            &strict,
            &consult("other", "deny", 0),
            "other has to agree, not authority",
        ),
        (&strict, &cached, "is `cached`"),
        (
            &cached,
            &consult("authority", "cached", 61),
            "allow_lifetime_s 61, not 60",
        ),
    ] {
        match say(before, after) {
            Some(Widening::Wider { looser, .. }) => {
                assert!(looser.join("; ").contains(word), "{looser:?}")
            }
            other => panic!("{word}: {other:?}"),
        }
        let back = say(after, before);
        // Another decision point is another one either way.
        let is_tighter = back == Some(Widening::NotWider) || word.starts_with("other");
        assert!(is_tighter, "the control: {word}: {back:?}");
    }
    // The control: the other way round it is tighter.
    let lax = before.clone().with("/classes/all/close_after_s", json!(31));
    assert_eq!(say(&lax, &before), Some(Widening::NotWider));
    // An action that moves to a laxer class.
    let classes = |first: u64| {
        before.clone().with("/classes", json!({
            "all": {"actions": [], "stale_after_s": 10, "restrict_after_s": 20, "close_after_s": 30, "when_restricted": "deny"},
            "read": {"actions": ["read"], "stale_after_s": 10, "restrict_after_s": 20, "close_after_s": first, "when_restricted": "deny"}}))
    };
    assert!(looser(&classes(40)).contains("action read: close_after_s 40, not 30"));
    assert_eq!(say(&before, &classes(25)), Some(Widening::NotWider));
    let ends = |at: &str| before.clone().with("/expires_at", json!(at));
    assert_eq!(
        say(&before, &ends("2027-01-31T12:00:00Z")),
        Some(Widening::NotWider)
    );
    let say_looser = |before: &Bundle, after: &Bundle| {
        matches!(say(before, after), Some(Widening::Wider { .. }))
    };
    assert!(
        say_looser(&ends("2027-01-31T12:00:00Z"), &before),
        "it no longer ends"
    );
    assert!(say_looser(
        &ends("2027-01-31T12:00:00Z"),
        &ends("2027-02-01T12:00:00Z")
    ));
    assert!(say_looser(
        &ends("2027-01-31T12:00:00Z"),
        &ends("2027-01-31T12:00:00Z").with("/when_expired", json!("restrict"))
    ));
    assert!(say_looser(
        &before
            .clone()
            .with("/not_before", json!("2026-01-31T12:00:00Z")),
        &before
    ));

    // Entities in another order are the same; another member of a team is not.
    let mut turned = before.clone();
    let mut entities: Vec<Value> = serde_json::from_str(ENTITIES).unwrap();
    entities.reverse();
    turned.entities = Some(Value::Array(entities.clone()).to_string());
    assert_eq!(say(&before, &turned), None, "left to the proof");
    entities[1]["parents"] = json!([{"type": "Team", "id": "core"}]);
    turned.entities = Some(Value::Array(entities).to_string());
    assert_eq!(
        say(&before, &turned).as_ref().and_then(reason),
        Some(WhyUnproven::Entities)
    );

    // Policies that may look at the posture: limits that differ at all leave it open.
    let told = |bundle: Bundle| {
        bundle.schema(
            "hour?: Long",
            "tidelock?: { posture: String, policy_age_s: Long }",
        )
    };
    let lax = told(lax);
    assert_eq!(
        say(&lax, &told(before.clone())).as_ref().and_then(reason),
        Some(WhyUnproven::PostureRead)
    );
    assert_eq!(say(&lax, &lax), Some(Widening::NotWider));
}

/// Whatever the solver says but one `unsat` for each question, nothing is proved.
#[test]
fn a_solver_that_fails_or_lies_proves_nothing() {
    let (before, after) = (
        Bundle::of(READS).archive(),
        Bundle::of(&format!(
            "{READS} permit(principal, action, resource) when {{ resource.open }};"
        ))
        .archive(),
    );
    let asked = questions(&before, &after).unwrap();
    let Questions::Asked(list) = &asked else {
        panic!("{asked:?}")
    };
    assert_eq!(list.len(), 2, "{list:?}");
    // What comes first is left open, so that the whole question is asked.
    let parts: Vec<_> = list.iter().flat_map(|question| &question.first).collect();
    assert_eq!(parts.len(), 1);
    let is_first = |script: &str| script.trim_end() == parts[0].script.trim_end();
    let say = |answer: &str| {
        let answer = answer.to_owned();
        settle(
            &asked,
            &mut |script| {
                Ok(match is_first(script) {
                    true => "unknown".to_owned(),
                    false => answer.clone(),
                })
            },
            &mut |question: &Question, number, model| {
                Ok(confirm(&before, &after, &question.about, number, model).unwrap())
            },
        )
    };
    // Where every answer is the lie `unsat` no trick helps: which program is asked is a matter of trust.
    assert_eq!(say("unsat\nunsat\n"), Widening::NotWider);
    for lie in [
        "",
        "unsat\n",
        "unsat\nunsat\nunsat\n",
        "(error \"x\")\n",
        "UNSAT\nunsat\n",
        "unsat unsat",
        "\u{0}",
        "\nunsat\nunsat\n",
    ] {
        assert_eq!(
            reason(&say(lie)),
            Some(WhyUnproven::SolverFailed),
            "{lie:?}"
        );
    }
    assert_eq!(
        reason(&say("unknown\nunsat\n")),
        Some(WhyUnproven::SolverUnknown)
    );
    // A model that is none is not believed.
    for model in ["", "(\n", "()", "(\n)\n", "(define-fun x () Int 1)"] {
        let said = settle(
            &asked,
            &mut |script| {
                Ok(if is_first(script) {
                    "unknown".to_owned()
                } else if script.contains("(get-model)") {
                    format!("sat\n{model}")
                } else {
                    "sat\nsat\n".to_owned()
                })
            },
            &mut |question: &Question, number, model| {
                Ok(confirm(&before, &after, &question.about, number, model).unwrap())
            },
        );
        assert!(
            reason(&said) == Some(WhyUnproven::Unconfirmed)
                || matches!(said, Widening::Wider { .. }),
            "{said}"
        );
    }
}

#[test]
fn every_reason_is_distinct_and_documented() {
    let book = include_str!("../../../docs/src/policy.md");
    for why in WhyUnproven::ALL {
        let word = why.as_str();
        assert_eq!(serde_json::to_value(why).unwrap(), word);
        assert!(book.contains(&format!("`{word}`")), "{word}");
    }
}

fn condition() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "resource.open",
        "!resource.open",
        "resource has owner",
        "resource has owner && resource.owner == principal",
        "resource has owner && resource.owner.level > 3",
        "principal.level > 3",
        "principal has level",
        "!(principal has level)",
        "principal has level && principal.level > 2",
        "principal has nick && principal.nick == \"b\"",
        "principal in Team::\"core\"",
        "principal == Agent::\"eve\"",
        "true",
        "principal has level || resource.open",
        "principal has nick && principal.nick like \"b*\"",
    ])
    .prop_map(str::to_owned)
}

fn policy() -> impl Strategy<Value = String> {
    let head = prop::sample::select(vec!["permit", "permit", "forbid"]);
    let action = prop::sample::select(vec![
        "action",
        "action == Action::\"read\"",
        "action in Action::\"group\"",
        "action == Action::\"write\"",
    ]);
    let when = prop::collection::vec((any::<bool>(), condition()), 0..3);
    (head, action, when).prop_map(|(head, action, when)| {
        let when: String = when
            .iter()
            .map(|(when, text)| format!(" {} {{ {text} }}", if *when { "when" } else { "unless" }))
            .collect();
        format!("{head}(principal, {action}, resource){when};\n")
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Never proved where the world has a request that shows the contrary.
    #[test]
    fn what_is_proved_no_request_refutes(
        shared in prop::collection::vec(policy(), 0..2),
        old in prop::collection::vec(policy(), 0..3),
        new in prop::collection::vec(policy(), 0..3),
    ) {
        if solver().is_some() {
            let last = "permit(principal == Agent::\"zed\", action, resource);";
            let before = Bundle::of(&(shared.concat() + &old.concat() + last));
            let after = Bundle::of(&(shared.concat() + &new.concat() + last));
            let widening = proved(&before, &after);
            let found = witness(&load(&before), &load(&after));
            if let Some(found) = found {
                prop_assert!(widening != Widening::NotWider, "{found:?}\n{}\n{}", before.policies, after.policies);
            }
            // Nothing but what cannot be told apart here is left open.
            if let Widening::Unproven { reason, detail } = &widening {
                eprintln!("open: {} {detail}\n{}--\n{}", reason.as_str(), before.policies, after.policies);
            }
        }
    }
}
