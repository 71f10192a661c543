//! Patterns with objects, memberships with keys and `_` in heads: the same values as in OPA, never a bigger object
//! than the pattern says, and refused where that is not certain.
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
    match RegoRules::compile(modules, &json!({"list": [1, 2]}), "data.t.p") {
        Err(why) => Said::Refused(why),
        Ok(rules) => match rules.run(Some(input)) {
            Err(why) => Said::Stopped(why),
            Ok(Some(value)) => Said::Value(value),
            Ok(None) => Said::Undefined,
        },
    }
}

/// Rules that say something for an input, each with what they say.
fn decides(input: &Value, cases: &[(&str, Value)]) {
    let wrong: Vec<_> = cases
        .iter()
        .map(|(rules, value)| (rules, say(rules, input), Said::Value(value.clone())))
        .filter(|(_, said, expected)| said != expected)
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn undefined(input: &Value, cases: &[&str]) {
    let wrong: Vec<_> = cases
        .iter()
        .map(|rules| (rules, say(rules, input)))
        .filter(|(_, said)| *said != Said::Undefined)
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn refused(cases: &[(&str, &str)]) {
    let wrong: Vec<_> = cases
        .iter()
        .map(|(rules, word)| (rules, word, say(rules, &json!({}))))
        .filter(|(_, word, said)| !matches!(said, Said::Refused(why) if why.contains(**word)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn stops(cases: &[(&str, &str)]) {
    let wrong: Vec<_> = cases
        .iter()
        .map(|(rules, word)| (rules, word, say(rules, &json!({}))))
        .filter(|(_, word, said)| !matches!(said, Said::Stopped(why) if why.contains(**word)))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn request() -> Value {
    json!({
        "o": {"a": 1, "b": 2},
        "one": {"a": 1},
        "nested": {"a": {"b": [1, {"c": 2}]}},
        "falsy": {"a": false},
        "null": {"a": null},
        "empty": {},
        "array": [1],
        "numbers": {"0": 5},
        "text": "a",
        "list": [{"a": 1}, {"a": 2}, {"a": 3, "b": 4}, {"b": 5}, "a", [1]],
        "map": {"x": {"a": 1}, "y": {"a": 2, "b": 2}},
        "quote": {"a\"b": 1, "c#d": 2},
        "roles": {"ann": "admin", "bob": "user"},
    })
}

/// The story: a pattern with an object matched bigger objects, so that `{"role": r} := input.who` took a request that
/// says more than a role.
#[test]
fn an_object_pattern_fits_an_object_with_exactly_its_keys() {
    let input = request();
    decides(
        &input,
        &[
            ("p := x if {\"a\": x} := input.one", json!(1)),
            ("p := x if { {\"a\": x} := input.one }", json!(1)),
            ("p := x if {\"a\": x} = input.one", json!(1)),
            ("p := x if { input.one = {\"a\": x} }", json!(1)),
            (
                "p := [x, y] if {\"b\": y, \"a\": x} := input.o",
                json!([1, 2]),
            ),
            (
                "p := [x, y] if { {\"a\": x, \"b\": y} := input.o; true }",
                json!([1, 2]),
            ),
            (
                "p := [x, y] if {\"a\": {\"b\": [x, {\"c\": y}]}} := input.nested",
                json!([1, 2]),
            ),
            ("p := x if {\"a\": x} := input.falsy", json!(false)),
            ("p := x if {\"a\": x} := input.null", json!(null)),
            ("p if {\"a\": _} = input.null", json!(true)),
            ("p if {\"a\": null} = input.null", json!(true)),
            ("p if { {`a`: x} := input.one; x == 1 }", json!(true)),
            ("p if { y := 1; {\"a\": y} = input.one }", json!(true)),
            (
                "p if { {\"a\": x, \"b\": x} = {\"a\": 1, \"b\": 1} }",
                json!(true),
            ),
            ("p := x if { [{\"a\": x}, 2] := [input.one, 2] }", json!(1)),
            ("p := x if { [{\"a\": x}, 2] = [input.one, 2] }", json!(1)),
            ("p := x if { {\"a\": x} := {\"a\": 3} }", json!(3)),
            ("p := x if { {\"a\": x} := (input.one) }", json!(1)),
            (
                "p := x if { {\"a\": x} := object.union({}, (input.one)) }",
                json!(1),
            ),
            // Two sides that bind each other.
            (
                "p := [x, y] if { {\"a\": x, \"b\": [2]} = {\"b\": [y], \"a\": 1} }",
                json!([1, 2]),
            ),
            (
                "p := x if { k := \"a\"; {k: 1} = {\"a\": 1}; x := k }",
                json!("a"),
            ),
            (
                "p := x if { k = \"a\"; {\"a\": 1} = {k: 1}; x := k }",
                json!("a"),
            ),
            // A value that is given to a variable.
            ("p := x if { y := 1; x = {\"a\": y} }", json!({"a": 1})),
            ("p := x if { y := 1; {\"a\": y} = x }", json!({"a": 1})),
            (
                "p := z if { y := 1; [{\"a\": y}, 2] = [z, 2] }",
                json!({"a": 1}),
            ),
            (
                "p := z if { [{\"a\": 1}, y] = [z, 2]; y == 2 }",
                json!({"a": 1}),
            ),
            (
                "p := x if { y = input.text; x = {\"a\": y} }",
                json!({"a": "a"}),
            ),
            (
                "p := x if { y = input.text; x = [{\"a\": y}, 1] }",
                json!([{"a": "a"}, 1]),
            ),
            (
                "p := x if { some o in [{\"m\": {\"x\": 1, \"y\": 2}, \"n\": {\"x\": 3, \"y\": 2, \"z\": 1}}]; o[_] = {\"x\": x, \"y\": 2} }",
                json!(1),
            ),
            // In comprehensions, `every`, `else`, with other input, over lines.
            ("p := [x | {\"a\": x} := input.list[_]]", json!([1, 2])),
            (
                "p := [x | some o in input.list; {\"a\": x} = o]",
                json!([1, 2]),
            ),
            (
                "p if every o in [input.one] { {\"a\": x} = o; x == 1 }",
                json!(true),
            ),
            (
                "p if every o in [input.one] { {\"a\": 1} = o }",
                json!(true),
            ),
            ("p := x if { {\"a\": x} := input.o } else := 7", json!(7)),
            (
                "p := 1 if { false } else := x if { {\"a\": x} := input.one }",
                json!(1),
            ),
            (
                "p := x if { {\"a\": x} := input.z with input.z as {\"a\": 8} }",
                json!(8),
            ),
            (
                "p := [x, y] if {\n\t{ # one\n\t\t\"a\": x, # two\n\t\t\"b\": y,\n\t} := object.union(input.one, # three\n\t\t{\"b\": 3})\n\ty == 3\n}",
                json!([1, 3]),
            ),
            ("p if not q\nq if { {\"a\": x} := input.o; x }", json!(true)),
            (
                "p if { not q }\nq if { {\"a\": x} = input.none; x }",
                json!(true),
            ),
        ],
    );
    undefined(
        &input,
        &[
            "p := x if {\"a\": x} := input.o",
            "p := x if {\"a\": x} = input.o",
            "p := x if { input.o = {\"a\": x} }",
            "p := x if {\"a\": x} := input.empty",
            "p := x if {\"a\": x} := input.none",
            "p := x if {\"a\": x} := input.text",
            "p := x if {\"a\": x} := input.array",
            "p := x if {\"z\": x} := input.one",
            "p := x if {\"a\": x, \"b\": 3} := input.o",
            "p := x if {\"a\": x, \"z\": _} := input.o",
            "p := x if { [{\"a\": x}] := [input.o] }",
            "p := x if { [{\"a\": x}] := [input.one, 1] }",
            "p := x if {0: x} := input.array",
            "p := x if {\"0\": x} := input.array",
            "p := x if { [x, {\"a\": 1}] = [1, input.o] }",
            "p if { y := 1; {\"a\": y} = input.o }",
            "p if { y := 2; {\"a\": y} = input.one }",
            "p if { k := \"b\"; {k: 1} = {\"a\": 1} }",
            "p if { {\"a\": x, \"b\": x} = input.o }",
            "p if { {\"a\": {\"b\": [1]}} = input.nested }",
            "p if { {\"a\": {\"b\": [_, {\"c\": 3}]}} = input.nested }",
            "p if every o in [input.one, input.o] { {\"a\": x} = o; x }",
            "p if { {\"a\": x} = input.falsy; x }",
            "p := x if { some o in input.list; {\"b\": x, \"c\": 1} = o }",
        ],
    );
}

/// The story: a name that another body or an `every` binds was taken for one that has a value, and the pattern was
/// left to the machine: `{"role": r} = input.who` beside `every r in …` fitted bigger objects.
#[test]
fn a_name_that_something_else_binds_makes_no_pattern_looser() {
    let input = request();
    undefined(
        &input,
        &[
            "p if { every a in [1] { a == 1 }; {\"a\": a} = input.o }",
            "p if { count([1 | x := 5; x == 5]) == 1; {\"a\": x} = input.o }",
            "p := 1 if { x := 5; x == 6 } else := 2 if { {\"a\": x} = input.o }",
            "p if { z := input.o; some q; {\"a\": q} = z }\nq := 1",
            "p if q({\"a\": 1, \"b\": 2})\nq(o) if { {\"a\": x} = o; x }",
        ],
    );
    decides(
        &input,
        &[
            (
                "p if { every a in [1] { a == 1 }; {\"a\": a} = input.one }",
                json!(true),
            ),
            (
                "p := 1 if { x := 5; x == 6 } else := 2 if { {\"a\": x} = input.one }",
                json!(2),
            ),
            (
                "p if q({\"a\": 1})\nq(o) if { {\"a\": x} = o; x }",
                json!(true),
            ),
        ],
    );
    refused(&[
        (
            "p if { y := 5; y == 5; [1 | some y; z = input.o; {\"a\": y} = z] == [1] }",
            "as a pattern",
        ),
        (
            "p if { y := 5; y == 5; [1 | some y; {\"a\": y} = z; z = input.o] == [1] }",
            "as a pattern",
        ),
        ("p if { {\"a\": x} = y; y = input.o }", "as a pattern"),
        (
            "p if { {\"a\": x} = y; x = input.text; y = input.o }",
            "as a pattern",
        ),
        (
            "p if { x = input.text; {\"a\": x} = y; input.o == input.list[y] }",
            "as a pattern",
        ),
        (
            "p if { x = input.text; {\"a\": x} = y; object.union({}, input.o, y) }",
            "as a pattern",
        ),
        (
            "p if { x = input.text; [{\"a\": x}, y] = [y, input.o] }",
            "as a pattern",
        ),
        (
            "p if { x = input.text; [y, {\"a\": x}] = [input.o, y] }",
            "as a pattern",
        ),
        (
            "p if { x = input.text; [q | {\"a\": x} = y; q := y] == [1]; y = input.o }",
            "as a pattern",
        ),
    ]);
}

#[test]
fn some_in_fits_what_the_pattern_says() {
    let input = request();
    decides(
        &input,
        &[
            ("p := [x | some {\"a\": x} in input.list]", json!([1, 2])),
            ("p := {x | some {\"a\": x} in input.list}", json!([1, 2])),
            (
                "p := [[i, x] | some i, {\"a\": x} in input.list]",
                json!([[0, 1], [1, 2]]),
            ),
            (
                "p := [[k, x] | some k, {\"a\": x} in input.map]",
                json!([["x", 1]]),
            ),
            (
                "p := [[x, y] | some {\"a\": x, \"b\": y} in input.list]",
                json!([[3, 4]]),
            ),
            ("p if some {\"a\": 1} in input.list", json!(true)),
            (
                "p if some {\"a\": 1} in {{\"a\": 1}, {\"b\": 1}}",
                json!(true),
            ),
            (
                "p := [[k, v] | some {\"k\": k}, {\"a\": v} in {{\"k\": 1}: {\"a\": 2}}]",
                json!([[1, 2]]),
            ),
            (
                "p := [[k, v] | some {\"k\": k}, {\"a\": v} in {{\"k\": n}: {\"a\": m} | some n, m in [5, 6]}]",
                json!([[0, 5], [1, 6]]),
            ),
            (
                "p := [[k, v] | some k, {\"a\": v} in {{\"a\": 7}}]",
                json!([[{"a": 7}, 7]]),
            ),
            (
                "p := [x | some [_, {\"a\": x}] in [[1, {\"a\": 2}], [{\"a\": 3}], 4]]",
                json!([2]),
            ),
            (
                "p contains x if some {\"a\": x} in input.list",
                json!([1, 2]),
            ),
            (
                "p[k] := x if { some k, {\"a\": x} in input.map }",
                json!({"x": 1}),
            ),
            (
                "p if every x in [1, 2] { some {\"a\": x1} in input.list; x1 == x }",
                json!(true),
            ),
            (
                "p := x if { some {\"a\": x} in input.z with input.z as [{\"a\": 8}] }",
                json!(8),
            ),
            (
                "p if { not q }\nq if { some {\"c\": _} in input.list }",
                json!(true),
            ),
        ],
    );
    undefined(
        &input,
        &[
            "p if some {\"a\": 3} in input.list",
            "p if some {\"a\": 1} in [input.o]",
            "p if some {\"a\": _} in input.o",
            "p if some {\"a\": _} in input.text",
            "p if some {\"a\": _} in input.none",
            "p if some {\"a\": _} in {}",
            "p if every x in [1, 2, 3] { some {\"a\": x1} in input.list; x1 == x }",
            "p if some \"y\", {\"a\": _} in input.map",
            "p if some 1, {\"a\": 1} in input.list",
        ],
    );
}

#[test]
fn arguments_fit_what_the_definition_says() {
    let input = request();
    decides(
        &input,
        &[
            ("f({\"a\": x}) := x\np := f(input.one)", json!(1)),
            ("f({\"a\": x}, y) := x + y\np := f(input.one, 2)", json!(3)),
            (
                "f({\"a\": x}) := [\"one\", x]\nf({\"a\": x, \"b\": _}) := [\"two\", x]\np := [f(input.one), f(input.o)]",
                json!([["one", 1], ["two", 1]]),
            ),
            (
                "f({\"a\": x}) := x if { x > 5 } else := 0 - x if { x > 0 } else := 9\np := f(input.one)",
                json!(-1),
            ),
            (
                "default f(_) := \"none\"\nf({\"a\": x}) := x\np := [f(input.one), f(input.o)]",
                json!([1, "none"]),
            ),
            ("f({\"a\": 1}) if true\np if f(input.one)", json!(true)),
            (
                "f([{\"a\": x}, y]) := [x, y]\np := f([input.one, 2])",
                json!([1, 2]),
            ),
            ("a.b.f({\"a\": x}) := x\np := a.b.f(input.one)", json!(1)),
            (
                "f({\"a\": x}) := y if { y := input.k } \np := v if { v := f(input.one) with input.k as 4 }",
                json!(4),
            ),
            (
                "f({\"a\": x}) := false if x\np := f(input.one)",
                json!(false),
            ),
            ("f({}) := 1\np := f(input.empty)", json!(1)),
            (
                "f({\"a\": x}) := y if { q with input.k as x; y := x }\nq if input.k == 1\np := f(input.one)",
                json!(1),
            ),
            ("f({\"a\": x}) if x == 1\np if not f(input.o)", json!(true)),
        ],
    );
    undefined(
        &input,
        &[
            "f({\"a\": x}) := x\np := f(input.o)",
            "f({\"a\": x}) := x\np := f(input.none)",
            "f({\"a\": _}, _) := 1\np := f(input.one, input.none)",
            "f({\"a\": x}) := x if { x > 5 } else := 9\np := f(input.o)",
            "f({\"a\": 2}) if true\np if f(input.one)",
            "f({}) := 1\np := f(input.one)",
        ],
    );
    stops(&[(
        "f({\"a\": x}) := x\nf({\"a\": 1}) := 2\np := f({\"a\": 1})",
        "two definitions",
    )]);
}

/// The story: `input.user, "admin" in data.roles` asked only whether there is an admin.
#[test]
fn a_membership_asks_for_its_key_too() {
    let input = request();
    decides(
        &input,
        &[
            ("p if \"ann\", \"admin\" in input.roles", json!(true)),
            (
                "p := x if { x := (\"bob\", \"admin\" in input.roles) }",
                json!(false),
            ),
            (
                "p := x if { x := (\"zed\", \"admin\" in input.roles) }",
                json!(false),
            ),
            ("p := x if { x := (1, 2 in [1, 2]) }", json!(true)),
            ("p := x if { x := (0, 2 in [1, 2]) }", json!(false)),
            ("p := x if { x := (2, 2 in [1, 2]) }", json!(false)),
            ("p := x if { x := (-1, 2 in [1, 2]) }", json!(false)),
            ("p := x if { x := (\"0\", 1 in [1, 2]) }", json!(false)),
            ("p := x if { x := (1, 1 in {1, 2}) }", json!(true)),
            ("p := x if { x := (1, 2 in {1, 2}) }", json!(false)),
            ("p := x if { x := (3, 3 in {1, 2}) }", json!(false)),
            ("p := x if { x := (0, \"a\" in \"abc\") }", json!(false)),
            ("p := x if { x := (1, 2 in 3) }", json!(false)),
            ("p := x if { x := (1, 2 in null) }", json!(false)),
            (
                "p := x if { x := (\"a\", false in {\"a\": false}) }",
                json!(true),
            ),
            (
                "p := x if { x := (\"a\", null in {\"a\": null}) }",
                json!(true),
            ),
            ("p := [1, 2 in [1, 2]]", json!([1, true])),
            ("p := [(1, 2 in [1, 2])]", json!([true])),
            ("p := [(1), (2 in [1, 2])]", json!([1, true])),
            (
                "p if { (\"foo\", 2 in {\"foo\": 2}) in [true] }",
                json!(true),
            ),
            (
                "p if { \"foo\", (2 in {\"bar\": 2}) in {\"foo\": true} }",
                json!(true),
            ),
            (
                "p if { (\"a\", 1 in {\"a\": 1}), 3 in {true: 3} }",
                json!(true),
            ),
            ("p if not \"bob\", \"admin\" in input.roles", json!(true)),
            // What is undefined makes it undefined, and `not` holds.
            ("p if not input.none, \"admin\" in input.roles", json!(true)),
            ("p if not \"ann\", input.none in input.roles", json!(true)),
            ("p if not \"ann\", \"admin\" in input.none", json!(true)),
            (
                "p := [k | some k in [\"ann\", \"bob\"]; k, \"user\" in input.roles]",
                json!(["bob"]),
            ),
            (
                "p if every k in [\"ann\"] { k, \"admin\" in input.roles }",
                json!(true),
            ),
            ("f(x) := x\np := f((1, 2 in [1, 2]))", json!(true)),
            (
                "f(x, y) := [x, y]\np := f(1, 2 in [1, 2])",
                json!([1, true]),
            ),
            (
                "p if { {\"a\": 1, \"b\": 2}, {\"c\": 3, \"d\": 4} in {{\"a\": 1, \"b\": 2}: {\"c\": 3, \"d\": 4}} }",
                json!(true),
            ),
            ("p contains (1, 2 in [1, 2])", json!([true])),
            (
                "p if {\n\t\"ann\", # who\n\t\"admin\" in\n\tinput.roles\n\tinput.text == \"a\"\n}",
                json!(true),
            ),
            (
                "p if { count([1 | \"bob\", \"admin\" in input.roles]) == 0 }",
                json!(true),
            ),
            (
                "p if not count([1 | \"bob\", \"admin\" in input.roles]) > 0",
                json!(true),
            ),
            (
                "p if { \"ann\", \"x\" in input.roles with input.roles as {\"ann\": \"x\"} }",
                json!(true),
            ),
            ("p := x if { x := \"a\" } else := 1", json!("a")),
        ],
    );
    undefined(
        &input,
        &[
            "p if \"bob\", \"admin\" in input.roles",
            "p if input.none, \"admin\" in input.roles",
            "p if \"ann\", \"admin\" in input.none",
            "p := x if { x := (input.none, 1 in {1}) }",
            "p if every k in [\"ann\", \"bob\"] { k, \"admin\" in input.roles }",
            "p if not \"ann\", \"admin\" in input.roles",
        ],
    );
}

#[test]
fn a_head_may_ask_for_each() {
    decides(
        &request(),
        &[
            ("p := [1][_]", json!(1)),
            ("p := input.array[_]", json!(1)),
            ("p contains input.list[_].a", json!([1, 2, 3])),
            ("p := 1 if { false } else := input.array[_]", json!(1)),
            ("f(x) := [1, 1][_] == x\np := f(1)", json!(true)),
            ("p := [x | x := data.list[_]]", json!([1, 2])),
            ("q := input.array[_]\np if not q == 2", json!(true)),
        ],
    );
    undefined(&request(), &["p := [][_]", "p := input.none[_]"]);
    stops(&[
        ("p := [1, 2][_]", "different values"),
        ("p := data.list[_]", "different values"),
        ("p if q\nq := data.list[_]", "different values"),
        ("p if not q\nq := data.list[_]", "different values"),
        (
            "p := 1 if { false } else := data.list[_]",
            "different values",
        ),
        ("f(x) := data.list[_] == x\np if f(1)", "different values"),
        ("f(x) := data.list[_] == x\np if f(2)", "different values"),
    ]);
}

/// What is not certain does not load, with its line and another way to write it.
#[test]
fn what_has_no_other_words_is_refused() {
    refused(&[
        ("p if { k := \"a\"; {k: x} := input.o; x }", "constants"),
        ("p if { {k: x} = input.o; x; k }", "constants"),
        ("p if { {\"a\": x, \"a\": y} := input.o; x; y }", "key"),
        ("p if { {\"a\": {x}} := input.o; x }", "references"),
        ("p if { {\"a\": {x}} = input.o; x }", "references"),
        (
            "p if { {\"a\": x, \"b\": count([1])} = input.o; x }",
            "references",
        ),
        (
            "p if { {\"a\": input.list[_], \"b\": x} = input.o; x }",
            "references",
        ),
        ("p := [[x, i] | some {\"a\": x} in data.list[i]]", ""),
        ("p if { {\"a\": x} = {\"b\": 1}; x }", "never equal"),
        ("p if { {\"a\": x} = 5; x }", "never equal"),
        ("p if { {\"a\": x} = [x]; x }", "never equal"),
        ("p if { [{\"a\": x}] = [1, 2]; x }", "never equal"),
        ("p if { {\"a\": x} = y; x }", ""),
        ("p if not {\"a\": x} = input.o", "= under not"),
        ("p if not {\"a\": 1} = input.o", "= under not"),
        ("p if not {\"a\": x} := input.o", "= under not"),
        (
            "p if not count([1 | {\"a\": x} := input.o; x]) > 0",
            "comprehension under not",
        ),
        (
            "p if not count([1 | some {\"a\": x} in input.o; x]) > 0",
            "comprehension under not",
        ),
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
        ("p if { x := 1; {\"a\": x} := input.one }", ""),
        ("p if { x := 1; some {\"a\": x} in [input.one] }", ""),
        ("f({\"a\": x}, x) := x\np := f(input.one, 1)", ""),
        ("f({\"a\": input.x}) := 1\np := f(input.one)", ""),
    ]);
    let said = say(
        "p if {\n\ttrue\n\t{\"a\": x} = y\n\ty = input.o\n}",
        &json!({}),
    );
    assert!(
        matches!(&said, Said::Refused(why) if why.contains("line 5") && why.contains("x := y.member")),
        "{said:?}"
    );
}

/// Two files of one package, and one that calls the other's: made names do not meet.
#[test]
fn made_names_are_each_files_own() {
    let one = "package t\n\nf({\"a\": x}) := x\n\np := [f({\"a\": 1}), data.u.g({\"b\": 2}), q]\n";
    let two = "package t\n\nf({\"b\": x}) := x\n\nq := y if { {\"b\": y} := {\"b\": 3}; \"k\", 1 in {\"k\": 1} }\n";
    let three = "package u\n\ng({\"b\": x}) := x if \"k\", 1 in {\"k\": 1}\n";
    let modules = [("a.rego", one), ("b.rego", two), ("c.rego", three)];
    assert_eq!(say_of(&modules, &json!({})), Said::Value(json!([1, 2, 3])));
    let text = "package t\n\nf({\"a\": x}) := x\n\nq if \"k\", 1 in {\"k\": 1}\n";
    let count = "package t\n\np := count(data.t2)\n";
    let other = text.replace("package t", "package t2");
    let modules = [("a.rego", count), ("b.rego", other.as_str())];
    assert_eq!(say_of(&modules, &json!({})), Said::Value(json!(1)));
}

#[test]
fn a_pattern_is_bounded() {
    let nested = |depth: usize| {
        let (open, close) = ("(0, ".repeat(depth), " in [true])".repeat(depth));
        format!("p := {open}true{close}")
    };
    assert_eq!(say(&nested(4), &json!({})), Said::Value(json!(true)));
    refused(&[(nested(5).as_str(), "more than 4 deep")]);
    let many: Vec<Value> = (0..40_000).map(|n| json!({"a": n})).collect();
    let said = say(
        "p if { some {\"a\": x} in input.many; x == 39999 }",
        &json!({"many": many}),
    );
    assert!(matches!(said, Said::Stopped(_)), "{said:?}");
    let few: Vec<Value> = (0..500).map(|n| json!({"a": n})).collect();
    let said = say(
        "p if { some {\"a\": x} in input.many; x == 499 }",
        &json!({"many": few}),
    );
    assert_eq!(said, Said::Value(json!(true)));
}

/// The story: the machine counts sets and objects too, and `[x] := input.list` took `{0}` for an array; so did arguments
/// and `some … in`.
#[test]
fn an_array_pattern_fits_an_array_alone() {
    undefined(
        &request(),
        &[
            "p if { [x] := {0}; x == 0 }",
            "p if { [x] = {0}; x == 0 }",
            "p if { [_] = {0} }",
            "p if { some [x] in [{0}]; x == 0 }",
            "p if { [x, [y]] := [1, {2}]; y == 2 }",
            "f([x]) := 1\np := f({0})",
            "f([x]) := 1\np := f({0: 1})",
            "p if { [x] := input.text; x }",
            "p if { [x] := input.numbers; x }",
        ],
    );
    decides(
        &request(),
        &[
            ("p if { [x] := [0]; x == 0 }", json!(true)),
            ("p if { [_] = [0] }", json!(true)),
            ("p if { some [x] in [[0]]; x == 0 }", json!(true)),
            ("f([x, _]) := x\np := f([1, 2])", json!(1)),
        ],
    );
}

/// The story: the compiler orders statements without looking into an `every`, and at what `not` mentions as if that bound
/// it: `every o in [2] { o = y }; y = 1` held, and `deny if { not input.grants[k]; k = "write" }` was silent. In OPA the
/// order of statements says nothing.
#[test]
fn the_order_of_statements_says_nothing() {
    let input = request();
    undefined(
        &input,
        &[
            "p if { every o in [2] { o = y }; y = 1 }",
            "p if { every o in [2] { o = y }; some y in [1] }",
            "p if { every o in [[\"zz\"]] { o = y }; split(\"a\", \",\", y) }",
            "p if { split(\"a\", \",\", y); every o in [[\"zz\"]] { o = y } }",
            "p if { y = z; every o in [2] { o = y }; z = 1 }",
            "p if { every o in [input.o] { o[y] }; y = \"zz\" }",
            "p if { every o in [\"b\"] { o = y }; input.one[y] }",
            "p if { every o in [2] { every q in [1] { o = y; q == 1 } }; y = 1 }",
            "p if { every o in [2] { [z | z = y; z = o] == [1] }; y = 1 }",
            "p if { every o in [2] { count([1 | o = y]) == 1 }; y = 1 }",
            "p if { count([1 | every o in [2] { o = y }]) == 1; y = 1 }",
            "p if { every o in [{\"a\": 2}] { {\"a\": y} = o }; y = 1 }",
            "p if { y := 1; every o in [{\"a\": 2}] { {\"a\": y} = o } }",
            "p if { every o in ({1} | {2}) { o = y }; y = 1 }",
            "f(x) if { every o in [2] { o = x } }\np if f(1)",
            "p if {\n\tevery k, r in [\"a\"] { # a { brace\n\t\t# { another\n\t\t[\"b\"][k] = r\n\t}\n}",
            "p if { not y = 1; y = 1 }",
            "p if { not input.o[y]; y = \"a\" }",
            "p if { not split(\"a\", \",\", y); y = [\"a\"] }",
            "p if { not input.o[k] == v; k = \"a\"; v = 1 }",
            "q contains [1, 2]\np if { not q[[1, y]]; y = 2 }",
            "q contains {1, 2}\np if { y := 1; not q[{y, 2}] }",
        ],
    );
    let controls: Vec<(&str, Value)> = [
        "p if { every o in [1] { o = y }; y = 1 }",
        "p if { every o in [1] { o = y }; some y in [1] }",
        "p if { every o in [[\"a\"]] { o = y }; split(\"a\", \",\", y) }",
        "p if { y = z; every o in [1] { o = y }; z = 1 }",
        "p if { every o in [input.o] { o[y] }; y = \"a\" }",
        "p if { every o in [1] { [z | z = y; z = o] == [1] }; y = 1 }",
        "p if { count([1 | every o in [1] { o = y }]) == 1; y = 1 }",
        "p if { every o in [{\"a\": 1}] { {\"a\": y} = o }; y = 1 }",
        "p if { every o in ({1} | {1}) { o = y }; y = 1 }",
        "p if { every o in [1, 2] { x = o; x > 0 }; every o in [3] { x = o; x > 2 } }",
        "p if {\n\tevery k, r in [\"a\"] { # a { brace\n\t\t# { another\n\t\t[\"a\"][k] = r\n\t}\n}",
        "p if { not y = 1; y = 2 }",
        "p if { not input.o[y]; y = \"zz\" }",
        "p if { not split(\"a\", \",\", y); y = [\"zz\"] }",
        "p if { not input.o[k] == v; k = \"a\"; v = 2 }",
        "p if { not count([1 | input.o[y]]) > 0; y = \"zz\" }",
        "q contains [1, 2]\np if { not q[[1, y]]; y = 3 }",
        "p if { y := \"k\"; not input.roles[y] == \"x\" with input.roles as {\"k\": \"y\"} }",
        "p if every o in [\"a\"] { not input.o[o] == 2 }",
    ]
    .map(|rules| (rules, json!(true)))
    .to_vec();
    decides(&input, &controls);
    refused(&[
        (
            "p if { every o in [2] { o = y }; y := 1 }",
            "before definition",
        ),
        ("p if { not input.o[y] }", ""),
        ("p if { not y = 1 }", ""),
    ]);
}

/// A deny that depends on a pattern is not silent where the pattern errs, and shadowed names are names of their own.
#[test]
fn errors_and_shadows_around_patterns() {
    let input = request();
    let deny = |rules: &str| format!("p := \"allow\" if not deny\np := \"deny\" if deny\n{rules}");
    for rules in [
        "deny if { \"ann\", to_number(\"x\") in input.roles }",
        "deny if { {\"a\": x} := {\"a\": to_number(\"x\")}; x }",
        "deny if { some {\"a\": x} in [{\"a\": 1 / 0}]; x }",
        "deny if f({\"a\": 1 / 0})\nf({\"a\": x}) if x",
        "deny if { {\"a\": x} = input.one; x / 0 == 1 }",
    ] {
        let said = say(&deny(rules), &input);
        assert!(matches!(said, Said::Stopped(_)), "{rules}: {said:?}");
    }
    for (rules, word) in [
        ("deny if { {\"a\": r} := input.one; r == 1 }", "deny"),
        ("deny if { {\"a\": r} := input.o; r == 1 }", "allow"),
        ("deny if not input.none, \"admin\" in input.roles", "deny"),
        ("deny if not \"ann\", \"admin\" in input.roles", "allow"),
        (
            "deny if { not allowed }\nallowed if { some {\"a\": 3} in input.list }",
            "deny",
        ),
    ] {
        assert_eq!(
            say(&deny(rules), &input),
            Said::Value(json!(word)),
            "{rules}"
        );
    }
    decides(
        &input,
        &[
            (
                "p if { x := 2; count([1 | {\"a\": x} = input.one]) == 0 }",
                json!(true),
            ),
            (
                "p if { x = 2; count([1 | {\"a\": x} = input.one]) == 0 }",
                json!(true),
            ),
            (
                "f(x) if { count([1 | {\"a\": x} = input.one]) == 0 }\np if f(2)",
                json!(true),
            ),
            (
                "p := y if { x := 1; y := [z | {\"a\": x} := {\"a\": 3}; z := x]; x == 1 }",
                json!([3]),
            ),
            ("q := 7\np := q if { {\"a\": q} := input.one }", json!(1)),
            (
                "q := 7\np if { some q; {\"a\": q} = input.one; q == 1 }",
                json!(true),
            ),
            ("q := 1\np if { {\"a\": q} = input.one }", json!(true)),
            (
                "p := x if { {\"a\\\"b\": x, \"c#d\": _} := input.quote }",
                json!(1),
            ),
            (
                "p := x if { {`a`: x, \"b\": `]`} = {\"a\": 1, \"b\": \"]\"} }",
                json!(1),
            ),
            (
                "p := x if { {\"a\": {\"a\": x}} = {\"a\": input.one} }",
                json!(1),
            ),
            ("p if { {\"a\": 1} = {\"a\": 1.0} }", json!(true)),
        ],
    );
    undefined(
        &input,
        &[
            "q := 7\np if { {\"a\": q} = input.one }",
            "q := 7\np if { some q; {\"a\": q} = input.o }",
            "p if { x := 1; {\"a\": x} = input.one with input.one as {\"a\": 5} }",
            "p if { {\"a\": x} = input.one with input.one as {\"a\": 1, \"b\": 2}; x }",
            "p if { [x, {\"a\": x}] = [2, input.one] }",
        ],
    );
    refused(&[("p if _, 1 in [1]", ""), ("p if { x, 1 in [1] }", "")]);
}

/// A pattern of the comparison.
#[derive(Debug, Clone)]
enum Pattern {
    Variable,
    Wildcard,
    Constant(i64),
    Object(Vec<(&'static str, Pattern)>),
    Array(Vec<Pattern>),
}

fn leaves() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        3 => Just(Pattern::Variable),
        1 => Just(Pattern::Wildcard),
        1 => (0_i64..2).prop_map(Pattern::Constant),
    ]
}

fn fields(inner: impl Strategy<Value = Pattern>) -> impl Strategy<Value = Pattern> {
    proptest::collection::btree_map(prop::sample::select(vec!["a", "b"]), inner, 1..3)
        .prop_map(|fields| Pattern::Object(fields.into_iter().collect()))
}

fn patterns() -> impl Strategy<Value = Pattern> {
    let inner = leaves().prop_recursive(2, 8, 2, |inner| {
        prop_oneof![
            fields(inner.clone()),
            proptest::collection::vec(inner, 0..3).prop_map(Pattern::Array),
        ]
    });
    fields(inner)
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        (0_i64..3).prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
        Just(json!("a")),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::btree_map("[ab]", inner, 0..3)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A value that the pattern fits, or almost.
fn near(pattern: &Pattern, seeds: &mut dyn Iterator<Item = Value>) -> Value {
    match pattern {
        Pattern::Variable | Pattern::Wildcard => seeds.next().unwrap_or(Value::Null),
        Pattern::Constant(number) => json!(number),
        Pattern::Object(fields) => fields
            .iter()
            .map(|(key, field)| ((*key).to_owned(), near(field, seeds)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Pattern::Array(items) => items.iter().map(|item| near(item, seeds)).collect(),
    }
}

/// The pattern as Rego has it, and the same said member by member of a value.
fn write(pattern: &Pattern, value: &str, names: &mut usize, said: &mut Vec<String>) -> String {
    match pattern {
        Pattern::Variable => {
            let name = format!("x{names}");
            *names += 1;
            said.push(format!("{name} := {value}"));
            name
        }
        Pattern::Wildcard => {
            said.push(format!("is_string(type_name({value}))"));
            "_".to_owned()
        }
        Pattern::Constant(number) => {
            said.push(format!("{value} == {number}"));
            number.to_string()
        }
        Pattern::Object(fields) => {
            said.push(format!("is_object({value})"));
            said.push(format!("count({value}) == {}", fields.len()));
            let fields: Vec<String> = fields
                .iter()
                .map(|(key, field)| {
                    let inner = write(field, &format!("{value}.{key}"), names, said);
                    format!("\"{key}\": {inner}")
                })
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
        Pattern::Array(items) => {
            said.push(format!("is_array({value})"));
            said.push(format!("count({value}) == {}", items.len()));
            let items: Vec<String> = items
                .iter()
                .enumerate()
                .map(|(at, item)| write(item, &format!("{value}[{at}]"), names, said))
                .collect();
            format!("[{}]", items.join(", "))
        }
    }
}

/// Statements about the same few variables.
const STATEMENTS: [&str; 30] = [
    "y = 1",
    "y = 2",
    "y = input.one.a",
    "y = z",
    "z = 1",
    "input.o[k] = y",
    "input.o[k] == y",
    "k = \"a\"",
    "k = \"zz\"",
    "{\"a\": y} = input.one",
    "{\"a\": y} = input.o",
    "{\"a\": y, \"b\": z} = input.o",
    "input.list[i] = {\"a\": y}",
    "[y, z] = [1, 1]",
    "[y, {\"a\": z}] = [1, input.one]",
    "x = {\"a\": y}",
    "x == input.one",
    "every o in [1] { o = y }",
    "every o in [2] { o = y }",
    "every o in [{\"a\": 1}] { {\"a\": y} = o }",
    "every o in [input.o] { o[k] = y }",
    "every o in [\"a\"] { not input.o[o] == y }",
    "not y = 2",
    "not input.o[k]",
    "not input.o[k] == y",
    "not k, y in input.o",
    "k, y in input.o",
    "count([1 | y = 1]) == 1",
    "count([1 | {\"a\": y} = input.one]) == 1",
    "object.get(input.one, \"a\", 0, y)",
];

/// Each two of them beside what binds the variable, before and behind it; enough of them load to say something.
#[test]
fn two_statements_say_the_same_in_every_order() {
    let input = request();
    let (mut load, mut hold) = (0, 0);
    for (at, one) in STATEMENTS.iter().enumerate() {
        for other in STATEMENTS.iter().skip(at + 1) {
            let before = say(&format!("p if {{ y = 1; {one}; {other} }}"), &input);
            let behind = say(&format!("p if {{ {other}; {one}; y = 1 }}"), &input);
            if let Said::Refused(_) = before {
                continue;
            }
            hold += usize::from(before == Said::Value(json!(true)));
            if let Said::Refused(_) = behind {
                continue;
            }
            load += 1;
            assert_eq!(before, behind, "{one} {other}");
        }
    }
    assert!(load > 200, "{load}");
    assert!(hold > 50, "{hold}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// In every place a pattern says what its members say one by one.
    #[test]
    fn a_pattern_says_what_its_members_say(
        pattern in patterns(),
        other in values(),
        seeds in proptest::collection::vec(values(), 8),
        fits in any::<bool>(),
        place in 0_usize..6,
    ) {
        let value = match fits {
            true => near(&pattern, &mut seeds.into_iter()),
            false => other,
        };
        let (mut names, mut said) = (0, Vec::new());
        let pattern = write(&pattern, "input.v", &mut names, &mut said);
        let bound: Vec<String> = (0..names).map(|name| format!("x{name}")).collect();
        let bound = bound.join(", ");
        let plain = format!("p := [{bound}] if {{ {} }} else := \"none\"", said.join("; "));
        let rules = match place {
            0 if names > 0 => format!("p := [{bound}] if {{ {pattern} := input.v }} else := \"none\""),
            1 => format!("p := [{bound}] if {{ some {pattern} in [input.v] }} else := \"none\""),
            2 => format!("f({pattern}) := [{bound}]\np := f(input.v)\np := \"none\" if not f(input.v)"),
            3 => format!("p := y if {{ [y] = [[{bound}] | {pattern} = input.v] }} else := \"none\""),
            4 => format!("p := [{bound}] if {{ some \"k\", {pattern} in {{\"k\": input.v}} }} else := \"none\""),
            _ => format!("p := [{bound}] if input.v = {pattern}\nelse := \"none\""),
        };
        let input = json!({"v": value});
        prop_assert_eq!(say(&rules, &input), say(&plain, &input), "{} {}", rules, input);
    }

    /// Whatever order statements stand in: what loads says the same.
    #[test]
    fn no_order_of_statements_says_something_else(
        (one, other) in proptest::sample::subsequence(STATEMENTS.to_vec(), 1..6)
            .prop_flat_map(|statements| (Just(statements.clone()), Just(statements).prop_shuffle())),
        negated in any::<bool>(),
    ) {
        let rules = |statements: &[&str]| {
            let body = statements.join("; ");
            match negated {
                true => format!("p := \"held\" if q else := \"not\"\nq if {{ {body} }}"),
                false => format!("p := count([1 | {body}])"),
            }
        };
        let (one, other) = (rules(&one), rules(&other));
        let input = request();
        match (say(&one, &input), say(&other, &input)) {
            (Said::Refused(_), _) | (_, Said::Refused(_)) => {}
            (a, b) => prop_assert_eq!(a, b, "{}\n{}", one, other),
        }
    }

    /// A membership with a key says what a loop over all keys says.
    #[test]
    fn a_membership_says_what_a_loop_says(
        key in prop_oneof![Just(json!("a")), (0_i64..3).prop_map(Value::from), values()],
        value in values(),
        collection in values(),
        from_it in any::<bool>(),
    ) {
        let value = match (&collection, from_it) {
            (Value::Array(items), true) => items.last().cloned().unwrap_or(value),
            (Value::Object(fields), true) => fields.get("a").cloned().unwrap_or(value),
            _ => value,
        };
        let input = json!({"k": key, "v": value, "c": collection});
        let rules = "p := (input.k, input.v in input.c)";
        let plain = "p := count([1 | some k, v in input.c; k == input.k; v == input.v]) > 0";
        prop_assert_eq!(say(rules, &input), say(plain, &input), "{}", input);
        let negated = "p := 1 if { not input.k, input.v in input.c } else := 2";
        let plain = "p := 1 if { count([1 | some k, v in input.c; k == input.k; v == input.v]) == 0 } else := 2";
        prop_assert_eq!(say(negated, &input), say(plain, &input), "{}", input);
    }
}
