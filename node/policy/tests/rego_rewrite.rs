//! What the Rego lane writes in other words before it compiles, and what it mends of the engine: the same values
//! as in OPA, and never an allow where a rule errs.
#![cfg(test)]

use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_policy::testing::RegoRules;

/// The value of `p`; what stopped it; what keeps it from being loaded.
#[derive(Debug, Clone, PartialEq)]
enum Said {
    Value(Value),
    Undefined,
    Stopped(String),
    Refused(String),
}

fn say(rules: &str, input: &Value) -> Said {
    let text = format!("package t\n\n{rules}\n");
    say_of(&[("t.rego", &text)], input)
}

fn say_of(modules: &[(&str, &str)], input: &Value) -> Said {
    say_about(modules, input, &json!({"list": [1, 2]}))
}

fn say_about(modules: &[(&str, &str)], input: &Value, data: &Value) -> Said {
    match RegoRules::compile(modules, data, "data.t.p") {
        Err(why) => Said::Refused(why),
        Ok(rules) => match rules.run(Some(input)) {
            Err(why) => Said::Stopped(why),
            Ok(Some(value)) => Said::Value(value),
            Ok(None) => Said::Undefined,
        },
    }
}

fn holds(rules: &str) {
    assert_eq!(say(rules, &json!({})), Said::Value(json!(true)), "{rules}");
}

fn undefined(rules: &str) {
    assert_eq!(say(rules, &json!({})), Said::Undefined, "{rules}");
}

fn stops(rules: &str, word: &str) {
    let said = say(rules, &json!({}));
    assert!(
        matches!(&said, Said::Stopped(why) if why.contains(word)),
        "{rules}: {said:?}"
    );
}

fn refused(rules: &str, word: &str) {
    let said = say(rules, &json!({}));
    assert!(
        matches!(&said, Said::Refused(why) if why.contains(word)),
        "{rules}: {said:?}"
    );
}

/// The story: the engine's compiler gives a variable a value that does not exist and goes on, so
/// `allow if { role := input.role; not role in data.blocked }` allowed a request without a role; and it
/// calls a function that ignores its argument with one that does not exist.
#[test]
fn what_does_not_exist_is_bound_to_nothing() {
    for rules in [
        "p if { x := input.none; not x in [1] }",
        "p if { x := input.none; not x == 2 }",
        "p if { x := input.none }",
        "p if { [_] := input.none }",
        "p if { every x in [1] { y := input.none } }",
        "f(_) := 1\np if f(input.none) == 1",
        "f(_, x) := 1\np if f(input.none, 2) == 1",
        "f(x) if true\np if f(input.none)",
        "p if every x in input.none { x == 1 }",
        "p := [input.none]",
        "p := {\"a\": input.none}",
        "p if { x := {1} - input.none }",
    ] {
        undefined(rules);
    }
    // The controls: the same with what is there, and what `not` makes of what is not.
    for rules in [
        "p if { x := data.list; not x in [1] }",
        "p if { x := false }",
        "p if { x := null; x == null }",
        "f(_) := 1\np if f(data.list) == 1",
        "f(_) := 1\np if not f(input.none)",
        "f(x) := x if x > 3\np if not f(1, 2)",
        "p if every x in data.list { x > 0 }",
        "p if not input.none in [1]",
        "p if { q := [x | x := input.none]; q == [] }",
        "p := true if { x := input.none; y := x } else := true",
    ] {
        holds(rules);
    }
    for rules in [
        "p := 1 if { x := input.none } else := 2",
        "p := input.none if true else := 2",
        // A body whose loop finds nothing was taken for one that holds.
        "p if { some x in [] } else := 2",
        "p if { x := [][_] } else := 2",
        "g(x) := x if x > 0\np := v if { v := g(-1) } else := 2",
    ] {
        assert_eq!(say(rules, &json!({})), Said::Value(json!(2)), "{rules}");
    }
    refused("p if { _ := input.none }", "alone");
}

/// The story: a condition that failed in a comprehension without a loop failed the loop around it, and the machine
/// stayed in the comprehension: `deny if { some t in tags; {a | a := "x"; a == t} == set() }` was silent.
#[test]
fn a_comprehension_without_a_loop_ends_where_it_ends() {
    for rules in [
        "p if { v := [1 | false]; v == [] }",
        "p := true if { v := [1 | false]; v == [1] } else := true",
        "p if { some t in [1, 2]; x := {a | a := 2; a == t}; x == set() }",
        "p if { q := [x | some t in [1, 2]; x := [a | a := 2; a == t]]; q == [[], [2]] }",
        "p if { q := [x | x := [1 | false]]; q == [[]] }",
        "p if { some t in [1, 2]; q := {1: t | t == 5}; q == {}; t == 2 }",
        "p if { some t in [1]; [a | a := [b | b := t; b == 2]; a == [1]] == [] }",
        "p if every t in [1, 2] { [a | a := t; a > 5] == [] }",
        "p if { not [1 | false] == [1]; true }",
        "q contains t if { some t in [1, 2]; [1 | t == 5] == [] }\np if q == {1, 2}",
    ] {
        holds(rules);
    }
    undefined("p if { v := [1 | false]; v == [1] }");
    undefined("p if { some t in [1, 2]; [a | a := t; a == 1] == [3] }");
}

fn decides(cases: &[(&str, Value, Value, Said)]) {
    for (rules, input, data, said) in cases {
        let text = format!("package t\n\n{rules}\n");
        assert_eq!(
            &say_about(&[("t.rego", &text)], input, data),
            said,
            "{rules} {input} {data}"
        );
    }
}

/// The story: the compiler loads the input and the data once for a body, where it needs them first. Where that was in an
/// `every` or a comprehension that found nothing, what stood behind it saw nothing, and
/// `allow if { tags := {…}; not data.frozen }` allowed.
#[test]
fn a_body_sees_input_and_data_behind_a_loop_that_finds_nothing() {
    let tags = "p if { tags := {t | some t in input.tags; t in data.special}; not data.frozen }";
    let every = "p if { every x in data.empty { x != input.text }; not input.blocked }";
    let both = "deny contains \"x\" if { found := {a | some a in data.empty; a == input.by}; count(found) == 0; input.one == 1 }\np := count(deny)";
    let head = "p contains input.text if { every x in data.empty { x != input.text } }";
    let yes = Said::Value(json!(true));
    decides(&[
        (
            tags,
            json!({"tags": []}),
            json!({"special": ["s"], "frozen": true}),
            Said::Undefined,
        ),
        (
            tags,
            json!({"tags": ["s"]}),
            json!({"special": ["s"], "frozen": true}),
            Said::Undefined,
        ),
        (
            tags,
            json!({"tags": []}),
            json!({"special": ["s"]}),
            yes.clone(),
        ),
        (
            every,
            json!({"blocked": true, "text": "a"}),
            json!({"empty": []}),
            Said::Undefined,
        ),
        (every, json!({"text": "a"}), json!({"empty": []}), yes),
        (
            both,
            json!({"one": 1}),
            json!({"empty": []}),
            Said::Value(json!(1)),
        ),
        (
            head,
            json!({"text": "a"}),
            json!({"empty": []}),
            Said::Value(json!(["a"])),
        ),
    ]);
}

/// The story: as an index or beside `=` the compiler took a variable of `every` for a new one, and
/// `every r in input.roles { data.permitted[r] }` held for every role.
#[test]
fn the_variables_of_every_are_its_own() {
    let roles = "p if { every r in input.roles { data.permitted[r] } }";
    let not = "p if { every r in input.roles { not data.banned[r] } }";
    let lines = "p if {\n\tevery k, r in input.roles { # a { brace\n\t\t# { another\n\t\tdata.order[k] == r\n\t}\n}";
    let nested = "p if { every r in input.roles { every g in [true] { data.permitted[r] == g } } }";
    let inner = "p if { every r in input.roles { count([1 | data.permitted[r]]) == 1 } }";
    let same = "p if { every s in input.roles { s = \"read\" } }";
    let named = "p if { every r in input.roles { s := r; data.permitted[s] } }";
    let with = "p if { every r in input.roles { q[r] with input.x as r } }\nq contains input.x if data.permitted[input.x]";
    let data = json!({"permitted": {"read": true}, "banned": {"root": true}, "order": ["read"]});
    for rules in [roles, not, lines, nested, inner, same, named, with] {
        decides(&[
            (
                rules,
                json!({"roles": ["root"]}),
                data.clone(),
                Said::Undefined,
            ),
            (
                rules,
                json!({"roles": ["read"]}),
                data.clone(),
                Said::Value(json!(true)),
            ),
        ]);
    }
}

/// The story: patterns with objects matched bigger objects; in a comprehension under `not` patterns were not compared; `not input.tags[_] == "secret"`
/// loaded.
#[test]
fn what_the_machine_would_not_compare_is_refused() {
    for (rules, word) in [
        (
            "q contains {\"a\": 1, \"b\": 2}\np := x if q[{\"a\": x}]",
            "as a pattern",
        ),
        (
            "f(_) := {\"a\": 1, \"b\": 2}\np if f(1, {\"a\": 1})",
            "as a pattern",
        ),
        (
            "p if { json.unmarshal(input.text, {\"a\": x}); x }",
            "as a pattern",
        ),
        (
            "p if not count([g | some [g, \"ok\"] in input.grants]) > 0",
            "comprehension under not",
        ),
        (
            "p if not [1 | x := 1; x = 2] == []",
            "comprehension under not",
        ),
        (
            "p if not [1 | [x, y] := [1]; x == y] == []",
            "comprehension under not",
        ),
        (
            "p if not [1 | every z in [[1]] { [z, 2] = z }] == []",
            "comprehension under not",
        ),
        ("p if { x := 1; not [x, 2] = input.list }", "= under not"),
        ("p if not input.tags[_] == \"secret\"", "_ under not"),
        ("f(x) := x\np if not f(data.list[_])", "_ under not"),
        ("p := {\"a\": 1, \"b\": 2, \"a\": 2}", "key"),
        ("p := {\"a\": 1, \"\\u0061\": 2}", "key"),
        ("p := {\"a\": false, k: true} if k := \"a\"", "key"),
        ("f(input) := input\np := f(5)", "as names"),
        ("p if { every data in [1] { data == 1 } }", "as names"),
    ] {
        refused(rules, word);
    }
    for head in [
        "import data.list as input",
        "import data.lib as data",
        "import data.lib.input",
    ] {
        let text = format!("package t\n\n{head}\n\np := input\n");
        let said = say_of(&[("t.rego", &text)], &json!({}));
        assert!(
            matches!(&said, Said::Refused(why) if why.contains("as names") && why.contains("line 3")),
            "{said:?}"
        );
    }
    // The controls: how it is written otherwise.
    for rules in [
        "p if { some i, 2 in data.list; i == 1 }",
        "p if data.list[1] == 2",
        "p if { y := 2; x = {\"a\": y}; x == {\"a\": 2} }",
        "p if { y := 2; {\"a\": y} == {\"a\": 2} }",
        "p if { y := 1; q[{\"a\": y, \"b\": 2}] }\nq contains {\"a\": 1, \"b\": 2}",
        "p if { y := 1; not q[{\"a\": y}] }\nq contains {\"a\": 1, \"b\": 2}",
        "p if { y := 1; object.union({\"b\": 1}, {\"a\": y}) == {\"a\": 1, \"b\": 1} }",
        "f(x, y) if y == {\"a\": x}\np if f(1, {\"a\": 1})",
        "p if { some [x, 2] in [[1, 2], [3, 4]]; x == 1 }",
        "p if { g := [x | some [x, 9] in [[1, 2]]]; not count(g) > 0 }",
        "p if not count([x | some x in data.list; x > 2]) > 0",
        "p if not count([x | x := data.list[_]; x > 2]) > 0",
        "p if { x := 1; not x = 2 }",
    ] {
        holds(rules);
    }
}

/// The story: an empty set was left out of a document of parts, and `deny if count(q.a) == 0` was silent.
#[test]
fn an_empty_set_is_a_part_of_its_document() {
    for rules in [
        "q.a contains x if some x in input.none\nq.b := 1\np if { count(q) == 2; count(q.a) == 0 }",
        "q[k].v := 1 if k := \"b\"\nq.a contains x if some x in input.none\np if count(q.a) == 0",
        "q[k] contains v if { some k in [\"a\"]; some v in [] }\nq.b := 1\np if q == {\"b\": 1}",
    ] {
        holds(rules);
    }
}

/// The story: made names were kept where `with` names what it replaces, and missed where a key is written with
/// back quotes, escapes or spaces. The statement saw the old value, or nothing.
#[test]
fn made_names_are_the_authors_wherever_they_are_written() {
    for rules in [
        "if.z := 1\np if { input.if == 5 with input.if as 5; if.z == 1 }",
        "if.z := 1\np if { data.cfg.not == 5 with data.cfg.not as 5; data.t.if.z == 1 }",
        "q[\"a b\"] := 1\np if { input[\"a b\"] == 5 with input[\"a b\"] as 5; q[\"a b\"] == 1 }",
        "q[\"a b\"] := 1\np if { r == 5 with data.cfg[\"a b\"] as 5; count(q) == 1 }\nr := data.cfg[\"a b\"]",
        "q[\"a b\"] := 1\np if q[`a b`] == 1",
        "q[`a b`] := 1\np if q[\"a b\"] == 1",
        "q[\"a\\u0020b\"] := 1\np if { q[\"a b\"] == 1; q[\"a\\u0020b\"] == 1 }",
        "q.late := true\nq[\"a b\"] := true\np if q[`late`]",
        "if.z := 1\np if { data.t[`if`].z == 1; data.t[\"\\u0069f\"].z == 1; data.t[ \"if\" ].z == 1 }",
        "if.z := 1\np if { x := {\"if\": 1}; x.if == 1; x[`if`] == 1; k := \"if\"; x[k] == 1 }",
    ] {
        holds(rules);
    }
    for rules in [
        "q.a := 1\nq[k] := 2 if k := \"b\"\np if data.t[\"tidelock\\u005f_part_0\"]",
        "q[\"tidelock_\\u005fkeyword_if\"] := 1\np if q",
    ] {
        refused(rules, "reserved");
    }
}

/// A package with much data in it is not made a document of without a bound.
#[test]
fn a_package_as_a_document_is_counted() {
    let library = "package lib\n\na := 1\n";
    let text = "package t\n\np := count(data.lib)\n";
    let modules = [("t.rego", text), ("lib.rego", library)];
    let say = |length: usize| {
        let table = vec![json!([1]); length];
        say_about(&modules, &json!({}), &json!({"lib": {"table": table}}))
    };
    assert_eq!(say(100), Said::Value(json!(2)));
    let said = say(40_000);
    assert!(
        matches!(&said, Said::Stopped(why) if why.contains("parts")),
        "{said:?}"
    );
}

/// The story: a body that holds for several values left the last one, where OPA reports a conflict.
#[test]
fn a_rule_with_two_values_stops() {
    holds("q := x if some x in [7, 7]\np if q == 7");
    for rules in [
        "p := x if some x in [1, 2]",
        "p := x if { x := data.list[_] }",
        "f(_) := x if some x in [1, 2]\np := f(1)",
    ] {
        stops(rules, "different values");
    }
}

#[test]
fn with_evaluates_a_statement_about_another_request() {
    for rules in [
        "p if input.a == 1 with input as {\"a\": 1}",
        "p if { q with input.x as 1; not q }\nq if input.x == 1",
        "p if not q with input.x as 2\nq if input.x == 1",
        "p if { r with input.x as 1 }\nr if { q with input.y as 2 }\nq if { input.x == 1; input.y == 2 }",
        "p if { q == 7 with data.t.q as 7; q == 1 }\nq := 1",
        "p if { s == 7 with data.t.q as 7; s == 1 }\ns := q\nq := 1",
        "p if { count(q) == 2 with data.t.q as {\"a\", \"b\"}; count(q) == 1 }\nq contains \"x\"",
        "p if { q == 3 with data.t.q as 3; q == 9 }\ndefault q := 9",
        "p if { x := 1; q == x with input as 1 }\nq := input",
        "p if { data.list == 3 with data.list as 3; data.list == [1, 2] }",
        "p if { [x | some x in [1, 2, 3]; not q with input.x as x] == [2, 3] }\nq if input.x == 1",
        "p if { [y | some k in [5, 6]; y := q with input.x as k] == [5, 6] }\nq := input.x",
        "p if { [1 | data.zs[_] with data.zs as [7, 8]] == [1, 1] }",
        "p if { [k | some k, _ in input with input as {\"a\": 1, \"b\": 2}] == [\"a\", \"b\"] }",
    ] {
        holds(rules);
    }
    for rules in [
        "p if input.a == 2 with input as {\"a\": 1}",
        "p if not q with input.x as 1\nq if input.x == 1",
        // What is replaced by nothing is no statement, under `not` neither.
        "p if not q with input.x as input.none\nq if input.x == 1",
    ] {
        undefined(rules);
    }
    for (rules, word) in [
        ("f(x) := 1\np if f(1) == 2 with f as 2", "functions"),
        ("f(x) := 1\np if f(1) == 2 with data.t.f as 2", "functions"),
        ("p if count([]) == 2 with count as 2", "functions"),
        ("p if http.send({}) == 2 with input as 2", "`http.send`"),
        ("p if input == 2 with input as http.send({})", "`http.send`"),
        ("p if q with data.t as {}\nq := 1", "package"),
        ("p if q with data.t.q.x as {}\nq := 1", "part of a rule"),
        (
            "p if { x = 1; y := x; q == x with input as 1 }\nq := input",
            "bind `x`",
        ),
        (
            "a := input.x\np if { [a | a := 1] == [1]; a == 2 with input.x as 2 }",
            "rename one",
        ),
        (
            "p if q with input as 1\nq if p with input as 2",
            "themselves",
        ),
        ("p if tidelock__merge({1})", "reserved"),
        ("p if __builtin_host_await(1, \"x\")", "reserved"),
    ] {
        refused(rules, word);
    }
}

#[test]
fn heads_of_every_form_make_one_document() {
    for rules in [
        "if.x := 2\np if { data.t.if.x == 2; data.t[\"if\"].x == 2; if.x == 2 }",
        "q[\"a b\"] := 1\nq[\"c\"] := 2\np if { q == {\"a b\": 1, \"c\": 2}; q[\"a b\"] == 1; k := \"a b\"; q[k] == 1 }",
        "q[x].y := i if { some i, x in [\"a\", \"b\"] }\np if q == {\"a\": {\"y\": 0}, \"b\": {\"y\": 1}}",
        "q[x].y := 1 if some x in [\"a\"]\nq.a.z := 2\nq.b := 3\np if q == {\"a\": {\"y\": 1, \"z\": 2}, \"b\": 3}",
        "q[x].y contains z if { some x in [\"a\"]; some z in [1, 2] }\nq.a.y contains 3\np if q.a.y == {1, 2, 3}",
        "q[7] := 8\np if q == {7: 8}",
        "q[x].y := input.none if some x in [\"a\"]\np if q == {}",
        "q.a := true\nq.b := true\np if { count(q) == 2; count(data.t.q) == 2 }",
        "q.a := 1\nq.b := q.a + 1\np if q.b == 2",
        "default q.a := 1\nq.a := 2 if input.none\nq[k] := 3 if k := \"b\"\np if q == {\"a\": 1, \"b\": 3}",
        "default f(_) := 7\nf(x) := x if x > 3\np if { f(1) == 7; f(4) == 4; not f(input.none) }",
    ] {
        holds(rules);
    }
    for rules in [
        "q[x].y := 1 if some x in [\"a\", \"b\"]\nq.a.y := 2\np if q.b.y == 1",
        "q[x].y := i if { some i, _ in [1, 2]; x := \"a\" }\np if q.a.y == 1",
        "q[x].y contains 1 if some x in [\"a\"]\nq.a := 2\np if q.a == 2",
    ] {
        stops(rules, "different values");
    }
    for (rules, word) in [
        ("q := {\"a\": 1}\nq.b := 2\np if q", "contradict"),
        ("q contains 1\nq.b := 2\np if q", "contradict"),
        ("q := 1\nq(x) := 2\np if q", "contradict"),
        ("q.a := 1\nq.b(x) := 2\np if q", "read as a whole"),
        ("q[x].y := 1 if x := \"a\" else := 2\np if q", "else"),
        (
            "q.a := 1\nq.b := q.a + 1\np if { k := \"b\"; q[k] == 2 }",
            "themselves",
        ),
        (
            "default f(_) := input.x\nf(x) := 1\np if f(0) == 7",
            "constant",
        ),
    ] {
        refused(rules, word);
    }
}

#[test]
fn a_package_as_a_document_holds_what_is_defined() {
    let library = "package lib\n\na := 1 if input.a\n\nb := 2 if input.b\n\nf(x) := x\n\nc contains 1 if input.c\n";
    for (rules, input, said) in [
        ("p := count(data.lib)", json!({}), json!(1)),
        ("p := count(data.lib)", json!({"a": true}), json!(2)),
        (
            "p := data.lib",
            json!({"b": true}),
            json!({"b": 2, "c": []}),
        ),
        (
            "p := [k | some k, _ in data.lib]",
            json!({"a": true}),
            json!(["a", "c"]),
        ),
        (
            "p := [k | data.lib[k]]",
            json!({"a": true}),
            json!(["a", "c"]),
        ),
        (
            "p := [x | some k in [\"a\", \"b\"]; x := data.lib[k]]",
            json!({"b": true}),
            json!([2]),
        ),
        (
            "p := object.keys(data.lib)",
            json!({"b": true}),
            json!(["b", "c"]),
        ),
    ] {
        let text = format!("package t\n\n{rules}\n");
        let modules = [("t.rego", text.as_str()), ("lib.rego", library)];
        assert_eq!(
            say_of(&modules, &input),
            Said::Value(said),
            "{rules} {input}"
        );
    }
}

/// A fault is told where its author wrote it, also when the text that the engine saw is longer.
#[test]
fn faults_bear_the_line_of_their_author() {
    for (rules, line) in [
        ("q if input\n\np if q with input as 1\n\nx := y", "line 7:"),
        (
            "q[a].b := 1 if a := \"x\"\n\np if q\n\nx := count(1, 2, 3, 4)",
            "line 7:",
        ),
        (
            "q if input\n\np if {\n\ttrue\n\tnone(1) with input as 1\n}",
            "line 7:",
        ),
        ("q[a].b := none(1) if a := \"x\"\n\np if q", "line 3:"),
    ] {
        // The rules that are not reached are not compiled.
        let rules = format!("{rules}\n");
        let reached = rules
            .replace("x := y", "p if y == 1")
            .replace("x := count", "p if 1 == count");
        refused(&reached, line);
    }
}

/// What a `with` costs is bounded by count and by instructions; a rewritten text by the parser's own bounds.
#[test]
fn rewriting_opens_nothing_that_has_no_bound() {
    holds("p if { some x in numbers.range(1, 60); q with input.x as x }\nq if input.x > 0");
    stops(
        "p if { some x in numbers.range(1, 200); q with input.x as x }\nq if input.x == 1000",
        "evaluations of `with`",
    );
    stops(
        "p if { q with input.x as 1 }\nq if { some a in numbers.range(1, 200); some b in numbers.range(1, 200); a + b == -1 }",
        "instructions",
    );
    // Each level asks the next one ten times: a million evaluations.
    let mut levels =
        String::from("p if { some x in numbers.range(1, 10); q0 with input.x as x; x == -1 }\n");
    for level in 0..4 {
        let next = level + 1;
        levels.push_str(&format!(
            "q{level} if {{ some x in numbers.range(1, 10); q{next} with input.x as x; x == -1 }}\n"
        ));
    }
    levels.push_str("q4 if input.x > 0\n");
    stops(&levels, "evaluations of `with`");
    let chain = |length: usize| {
        let mut rules = String::from("p if q0 with input.x as 1\n");
        for level in 0..length {
            let next = level + 1;
            rules.push_str(&format!("q{level} if q{next} with input.x as 1\n"));
        }
        rules + &format!("q{length} if input.x == 1\n")
    };
    refused(&chain(12), "deep");
    let deepest = (1..12)
        .rev()
        .find(|length| !matches!(say(&chain(*length), &json!({})), Said::Refused(_)))
        .unwrap();
    // The deepest that loads runs on the smallest stack that an engine thread may have.
    let said = std::thread::Builder::new()
        .stack_size(1024 * 1024)
        .spawn(move || say(&chain(deepest), &json!({})))
        .unwrap()
        .join();
    assert_eq!(said.unwrap(), Said::Value(json!(true)), "{deepest}");
    let many = "r if input.x with input.x as 1\n".repeat(300);
    refused(&format!("{many}p if r"), "more than 256");
    let nested = |depth: usize| {
        let (open, close) = ("[1 | r with input.x as ".repeat(depth), "]".repeat(depth));
        format!("r if true\np if {open}1{close}")
    };
    assert!(!matches!(say(&nested(3), &json!({})), Said::Refused(_)));
    refused(&nested(17), "deeper");
    let keys = "[k]".repeat(200);
    let said = say(&format!("q{keys} := 1 if k := \"a\"\np if q"), &json!({}));
    assert!(!matches!(said, Said::Undefined), "{said:?}");
}

/// What a condition comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comes {
    True,
    False,
    Fails,
}

fn conditions() -> impl Strategy<Value = (&'static str, Comes)> {
    prop::sample::select(vec![
        ("input.one == 1", Comes::True),
        ("VAR := input.one", Comes::True),
        ("startswith(input.text, \"a\")", Comes::True),
        ("some VAR in input.list", Comes::True),
        ("not input.none", Comes::True),
        ("count({y | some y in input.list}) == 2", Comes::True),
        ("count([y | y := 1; y == 2]) == 0", Comes::True),
        ("{y | y := input.one; y != 2; y == 1} == {1}", Comes::True),
        ("[y | y := {1 | false}] == [set()]", Comes::True),
        (
            "count([y | some y in input.list; [1 | y == 5] == []]) == 2",
            Comes::True,
        ),
        ("{1: 2 | input.one == 2} == {}", Comes::True),
        (
            "every y in input.list { [z | z := y; z > 5] == [] }",
            Comes::True,
        ),
        ("[1 | input.one == 2] == [1]", Comes::False),
        (
            "some VAR in input.list; [y | y := VAR; y == 1] == [3]",
            Comes::False,
        ),
        (
            "every y in input.list { [z | z := y; z == 1] == [1] }",
            Comes::False,
        ),
        ("input.one == 2", Comes::False),
        ("VAR := input.none", Comes::False),
        ("input.none == 1", Comes::False),
        ("input.text in input.none", Comes::False),
        ("some VAR in []", Comes::False),
        ("1 / input.zero > 0", Comes::Fails),
        ("input.one % input.zero == 0", Comes::Fails),
        ("to_number(input.text) > 0", Comes::Fails),
        ("input.text > 1", Comes::Fails),
        (
            "count([z | some y in input.list; z := to_number(input.text)]) == 0",
            Comes::Fails,
        ),
        ("{\"k\": y | some y in input.list}.k == 1", Comes::Fails),
        ("startswith(input.one, \"a\")", Comes::Fails),
        (
            "every y in input.list { y / input.zero == 1 }",
            Comes::Fails,
        ),
        ("not to_number(input.text)", Comes::Fails),
    ])
}

/// Each form denies where its conditions hold.
const FORMS: [&str; 14] = [
    "deny if { BODY }",
    "deny if { q with input.z as 1 }\nq if { input.z == 1; BODY }",
    "deny if { x9 := true; q == x9 with input.z as 1 }\nq if { input.z == 1; BODY }",
    "deny if { input.z == {1} with input.z as {1 | BODY} }",
    "deny if { some x9 in [1, 2]; r with input.z as x9 }\nr if { q with input.w as 1 }\nq if { input.z == 2; input.w == 1; BODY }",
    "q if { BODY } else := false\ndeny if not s with data.t.u as 1\ns if { u == 1; q == false }\nu := 2",
    "q[k].v := 1 if { k := \"a\"; BODY }\nq.b := 2\ndeny if q.a.v == 1",
    "q[k].v contains 1 if { k := \"a\"; BODY }\ndeny if count(q.a.v) == 1",
    "if.q if { BODY }\ndeny if if.q",
    "q[\"a b\"] if { BODY }\ndeny if { k := \"a b\"; q[k] }",
    "default f(_) := 0\nf(x) := 1 if { BODY }\ndeny if f(1) == 1",
    "q.a.b if { BODY }\ndeny if count(q.a) == 1",
    "deny if { v := [1 | BODY]; count(v) > 0 } else if { w := { 1 | BODY }; count(w) == 1 }",
    "deny if count(data.lib) == 1",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    /// An error among conditions that hold stops every form: it never lets the request through. Without one,
    /// each form denies exactly when all conditions hold.
    #[test]
    fn no_form_allows_where_a_rule_errs(
        form in prop::sample::select(&FORMS[..]),
        picked in proptest::collection::vec(conditions(), 1..4),
    ) {
        let mut written: Vec<String> = Vec::new();
        for (number, (text, _)) in picked.iter().enumerate() {
            // A variable of its own for each.
            written.push(text.replace("VAR", &format!("x{number}")));
        }
        let body = written.join("; ");
        let rules = form.replace("BODY", &body);
        let text = format!("package t\n\np := \"allow\" if not deny\n\np := \"deny\" if deny\n\n{rules}\n");
        let library = format!("package lib\n\nq if {{ {body} }}\n");
        let input = json!({"one": 1, "zero": 0, "text": "abc", "list": [1, 2]});
        let said = say_of(&[("t.rego", &text), ("lib.rego", &library)], &input);
        let comes: Vec<Comes> = picked.iter().map(|(_, comes)| *comes).collect();
        let expected = match (comes.contains(&Comes::Fails), comes.contains(&Comes::False)) {
            (false, false) => Said::Value(json!("deny")),
            (false, true) => Said::Value(json!("allow")),
            (true, hidden) => {
                // What does not hold may keep what fails from being asked.
                let stopped = matches!(said, Said::Stopped(_));
                prop_assert!(stopped || (hidden && said == Said::Value(json!("allow"))), "{text}: {said:?}");
                return Ok(());
            }
        };
        prop_assert_eq!(said, expected, "{}", text);
    }

    /// A general head says what a comprehension says, and `with` what a function says.
    #[test]
    fn rewritten_forms_say_what_plain_ones_say(
        pairs in proptest::collection::vec(("[a-c]", "[x-z]", 0_i64..3), 0..6),
        value in -3_i64..4,
    ) {
        let input = json!({"pairs": pairs, "v": value});
        let general = "q[a][b] contains n if some [a, b, n] in input.pairs\np := {a: {b: [n | some n in ns] | some b, ns in of} | some a, of in q}";
        let plain = "p := {a: {b: [n | some n in {m | some [c, d, m] in input.pairs; c == a; d == b}] | some [e, b, _] in input.pairs; e == a} | some [a, _, _] in input.pairs}";
        prop_assert_eq!(say(general, &input), say(plain, &input));
        let other = "q := {\"n\": input.v * 2, \"big\": input.v > 1}\np := [x | some i in [1, 2, 3]; x := q with input.v as input.v + i]";
        let function = "q(v) := {\"n\": v * 2, \"big\": v > 1}\np := [x | some i in [1, 2, 3]; x := q(input.v + i)]";
        prop_assert_eq!(say(other, &input), say(function, &input));
    }
}
