//! The shortened question beside the whole one, with a real solver. Without `cvc5` these print `not run`, but for those
//! that need none.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::json;
use tidelock_policy::BundleBuilder;

use super::*;
use crate::pair::{Pair, Side};
use crate::questions::{Question, on_stack};

const SCHEMA: &str = r#"
entity Team;
entity Agent in [Team] = { level: Long };
entity Note = { open: Bool, path: String };
action "group";
action "read" in ["group"] appliesTo { principal: [Agent], resource: [Note], context: { hour?: Long } };
action "write" appliesTo { principal: [Agent], resource: [Note] };
"#;

fn side(policies: &str) -> Side {
    let manifest = json!({
        "format": 1, "name": "base", "domain": "site-1", "epoch": 1, "version": "1.0.0",
        "engine": "cedar", "min_node_version": "0.1.0", "created_at": "2026-01-31T12:00:00Z",
        "min_fallback_epoch": 1, "default_class": "all", "files": {},
        "classes": {"all": {"actions": [], "stale_after_s": 10, "restrict_after_s": 20,
                            "close_after_s": 30, "when_restricted": "deny"}},
    });
    let archive = BundleBuilder::new()
        .file("manifest.json", manifest.to_string().into_bytes())
        .file("schema.cedarschema", SCHEMA.into())
        .file("policies/base.cedar", policies.into())
        .build()
        .unwrap();
    Side::read(&archive).unwrap()
}

/// The questions about each kind of request that has one: shortened, and with everything in them.
fn asked(before: &str, after: &str) -> [Vec<Option<Question>>; 2] {
    let all = |pair: &Pair| {
        let kinds = pair.kinds.iter();
        kinds.map(|kind| pair.question(kind).unwrap()).collect()
    };
    let found = on_stack(|| {
        let mut pair =
            Pair::of(side(before), side(after)).unwrap_or_else(|(_, why)| panic!("{why}"));
        let shortened = all(&pair);
        pair.take_nothing_as_common();
        Ok([shortened, all(&pair)])
    });
    found.unwrap()
}

fn has_solver() -> bool {
    let is_there = Path::new("/usr/bin/cvc5").exists();
    if !is_there {
        eprintln!("not run: cvc5 is not installed");
    }
    is_there
}

/// The words of the solver about these scripts; of an empty one it is known to be `sat`.
fn answers(scripts: &[String]) -> Vec<String> {
    let mut child = Command::new("/usr/bin/cvc5")
        .args(["--lang=smt2", "--strings-exp", "--tlimit=60000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let text = scripts.join("\n");
    let writer = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join();
    let said = String::from_utf8(output.stdout).unwrap();
    let mut said = said.lines();
    let answers = scripts.iter().map(|script| match script.is_empty() {
        true => "sat".to_owned(),
        false => said.next().unwrap().to_owned(),
    });
    answers.collect()
}

/// For each kind of request, what the shortened question comes to, what the parts of it that are asked first come to, and
/// what the whole question does.
fn compared(before: &str, after: &str) -> Vec<[&'static str; 3]> {
    let [short, whole] = asked(before, after);
    let scripts = |question: &Option<Question>| {
        question.as_ref().map_or(Vec::new(), |question| {
            let parts = question.first.iter().map(|part| part.script.clone());
            parts.chain([question.script.clone()]).collect()
        })
    };
    let both = short.iter().chain(&whole).map(scripts);
    let mut said = answers(&both.flatten().collect::<Vec<_>>()).into_iter();
    let mut words = |question: &Option<Question>| {
        let Some(question) = question else {
            // What is not asked is known.
            return ("unsat", "unsat");
        };
        let mut word = || match said.next().unwrap().as_str() {
            "sat" => "sat",
            "unsat" => "unsat",
            other => panic!("{other}"),
        };
        let parts: Vec<&str> = question.first.iter().map(|_| word()).collect();
        let settled = !parts.is_empty() && parts.iter().all(|word| *word == "unsat");
        (if settled { "unsat" } else { "sat" }, word())
    };
    let short: Vec<_> = short.iter().map(&mut words).collect();
    let whole = whole.iter().map(words);
    let all = short.into_iter().zip(whole);
    all.map(|((first, short), (_, whole))| [short, first, whole])
        .collect()
}

/// A hundred rules of which one changes: the question holds that one.
#[test]
fn a_question_holds_what_may_bear_on_the_same_request() {
    let rules = |changed: &str, scope: fn(usize) -> String| -> String {
        let path = |n: usize| match n {
            7 => changed.to_owned(),
            n => format!("/srv/{n}/*"),
        };
        (0..100)
            .map(|n| {
                let (scope, path) = (scope(n), path(n));
                format!(
                    "permit({scope}, action, resource) when {{ resource.path like \"{path}\" }};\n"
                )
            })
            .collect()
    };
    let own = |n: usize| format!("principal == Agent::\"agent-{n}\"");
    let [short, whole] = asked(&rules("/srv/7/*", own), &rules("/srv/7/src/*", own));
    for (short, whole) in short.iter().zip(&whole) {
        let (short, whole) = (short.as_ref().unwrap(), whole.as_ref().unwrap());
        assert!(short.first.is_empty(), "no other rule bears on it");
        assert!(20 * short.script.len() < whole.script.len());
        assert!(short.script.contains("agent-7\"") && !short.script.contains("agent-8\""));
        assert!(whole.script.contains("agent-8\""));
    }
    // Groups may share members: every rule may bear on it, and the first question holds one all the same.
    let group = |n: usize| format!("principal in Team::\"team-{n}\"");
    let [short, _] = asked(&rules("/srv/7/*", group), &rules("/srv/7/src/*", group));
    for short in short.iter().map(|short| short.as_ref().unwrap()) {
        // The rule in its scope, and that a path that is absent makes it err.
        assert_eq!(short.first.len(), 2);
        for part in &short.first {
            assert!(20 * part.script.len() < short.script.len());
            assert!(!part.script.contains("team-8\""));
        }
        assert!(short.script.contains("team-8\""));
    }
    // Where every rule changes, each scope is a part.
    let all = rules("/srv/7/*", group);
    let [short, _] = asked(&all, &all.replace("/*", "/src/*"));
    for short in short.iter().map(|short| short.as_ref().unwrap()) {
        assert_eq!(short.first.len(), 101);
    }
    // What goes without having denied anything is not asked about at all, unless it may have erred.
    let gone = |policy: &str| {
        let all = rules("/srv/7/*", group);
        asked(&format!("{all}{policy}"), &all)[0].clone()
    };
    assert_eq!(gone("permit(principal, action, resource);"), [None, None]);
    for denied in [
        "forbid(principal, action, resource);",
        "permit(principal, action, resource) when { principal.level > 3 };",
    ] {
        assert!(gone(denied).iter().all(Option::is_some), "{denied}");
    }
}

#[test]
fn scopes_that_no_request_matches_both_are_apart() {
    let policy = |text: &str| -> Policy { text.parse().unwrap() };
    let ada = policy("permit(principal == Agent::\"ada\", action, resource);");
    for (text, is_apart) in [
        (
            "permit(principal == Agent::\"bob\", action, resource);",
            true,
        ),
        (
            "forbid(principal == Note::\"ada\", action, resource);",
            true,
        ),
        (
            "permit(principal == Agent::\"ada\", action, resource == Note::\"n\");",
            false,
        ),
        (
            "permit(principal in Agent::\"bob\", action, resource);",
            false,
        ),
        (
            "permit(principal is Agent in Agent::\"bob\", action, resource);",
            false,
        ),
        ("permit(principal, action, resource);", false),
        // Not a scope: what stands before it might err.
        (
            "permit(principal, action, resource) when { principal == Agent::\"bob\" };",
            false,
        ),
    ] {
        assert_eq!(apart(&ada, &policy(text)), is_apart, "{text}");
        assert_eq!(apart(&policy(text), &ada), is_apart, "{text}");
    }
    let note = |id: &str| {
        policy(&format!(
            "permit(principal, action, resource == Note::\"{id}\");"
        ))
    };
    assert!(apart(&note("n"), &note("m")));
    assert!(!apart(&note("n"), &note("n")));
}

/// Each of the three reasons for which the older bundle may deny what the newer one permits, with common policies beside
/// it that change the answer, and ones that do not.
#[test]
fn common_policies_that_change_the_answer_are_in_the_question() {
    if !has_solver() {
        return;
    }
    let ada = "permit(principal == Agent::\"ada\", action, resource);";
    let open = "permit(principal == Agent::\"ada\", action, resource) when { resource.open };";
    let bob = "permit(principal == Agent::\"bob\", action, resource);";
    let core = "permit(principal in Team::\"core\", action, resource);";
    let shut = "forbid(principal == Agent::\"ada\", action, resource);";
    let closed = "forbid(principal, action, resource) unless { resource.open };";
    let errs =
        "forbid(principal == Agent::\"ada\", action, resource) when { principal.level > 3 };";
    for (name, common, old, new, is_wider) in [
        ("a permit that others give already", ada, "", open, false),
        ("a permit that nobody gives", bob, "", open, true),
        ("a permit that some of them have", core, "", open, true),
        ("a permit that is forbidden", shut, "", open, false),
        ("a permit that is forbidden in part", closed, "", open, true),
        ("a forbid that others give already", shut, errs, "", false),
        ("a forbid that goes", ada, closed, "", true),
        ("a forbid of what nobody may", bob, shut, "", false),
        ("a forbid of what some may", core, shut, "", true),
        ("an error that goes", ada, errs, "", true),
        (
            "an error that goes where nothing is permitted",
            bob,
            errs,
            "",
            false,
        ),
    ] {
        let last = "permit(principal == Agent::\"zed\", action, resource);";
        let (before, after) = (
            format!("{common}{old}{last}"),
            format!("{common}{new}{last}"),
        );
        for [short, first, whole] in compared(&before, &after) {
            let word = if is_wider { "sat" } else { "unsat" };
            assert_eq!((short, whole), (word, word), "{name}");
            assert!(first != "unsat" || !is_wider, "{name}");
        }
    }
}

fn condition() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "true",
        "resource.open",
        "!resource.open",
        "principal.level > 3",
        "principal.level > 2",
        "principal has level",
        "principal has level && principal.level > 2",
        "principal == Agent::\"bob\"",
        "principal in Team::\"core\"",
        "resource.path like \"/a/*\"",
        "resource.path like \"/a/b/*\"",
    ])
}

fn policy() -> impl Strategy<Value = String> {
    let head = prop::sample::select(vec!["permit", "permit", "forbid"]);
    let principal = prop::sample::select(vec![
        "principal",
        "principal == Agent::\"ada\"",
        "principal == Agent::\"ada\"",
        "principal == Agent::\"bob\"",
        "principal in Team::\"core\"",
        "principal is Agent in Team::\"ops\"",
    ]);
    let action = prop::sample::select(vec!["action", "action == Action::\"read\""]);
    let resource = prop::sample::select(vec![
        "resource",
        "resource",
        "resource == Note::\"n\"",
        "resource == Note::\"m\"",
    ]);
    let when = prop::collection::vec((any::<bool>(), condition()), 0..3);
    (head, principal, action, resource, when).prop_map(
        |(head, principal, action, resource, when)| {
            let when: String = when
                .iter()
                .map(|(when, text)| {
                    format!(" {} {{ {text} }}", if *when { "when" } else { "unless" })
                })
                .collect();
            format!("{head}({principal}, {action}, {resource}){when};\n")
        },
    )
}

/// Shortened or whole, the answer is the same; what the first script settles, the whole one does too.
#[test]
fn what_is_left_out_changes_no_answer() {
    if !has_solver() {
        return;
    }
    let some = |from, to| prop::collection::vec(policy(), from..to).prop_map(|all| all.concat());
    let config = ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    // Kinds of request compared, those that are wider, those that the first script settled.
    let seen = [const { AtomicUsize::new(0) }; 3];
    let compare = |(common, old, new): (String, String, String)| {
        let common = common + "permit(principal == Agent::\"zed\", action, resource);\n";
        let (before, after) = (format!("{common}{old}"), format!("{common}{new}"));
        for [short, first, whole] in compared(&before, &after) {
            prop_assert_eq!(&short, &whole, "{}--\n{}", before, after);
            prop_assert!(
                first != "unsat" || whole == "unsat",
                "{}--\n{}",
                before,
                after
            );
            for (count, counts) in seen.iter().zip([true, whole == "sat", first == "unsat"]) {
                count.fetch_add(usize::from(counts), Ordering::Relaxed);
            }
        }
        Ok(())
    };
    let mut runner = TestRunner::new(config);
    runner
        .run(&(some(0, 4), some(0, 3), some(0, 3)), compare)
        .unwrap_or_else(|error| panic!("{error}"));
    // The control: there were answers of each sort.
    let [all, wider, settled] = seen.map(AtomicUsize::into_inner);
    assert!(
        wider > 0 && settled > 0 && all >= wider + settled,
        "{all} {wider} {settled}"
    );
    eprintln!("{all} kinds of request: {wider} wider, {settled} settled first");
}
