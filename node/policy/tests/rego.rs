//! The Rego lane from a signed bundle to a verdict: what allows, what denies, and that nothing else allows.
#![cfg(test)]

use proptest::prelude::*;
use serde_json::{Value, json};
use tidelock_policy::testing::{Authority, RegoRules, template_builder};
use tidelock_policy::{
    BundleBuilder, BundleError, Coverage, Engine, Failure, PolicyRequest, Verdict, VerifiedBundle,
    run_tests, template,
};

const CREATED: u64 = 1_769_860_800_000;
const DOMAIN: &str = "site-1";

const SCHEMA: &str = r#"{"format": 1, "actions": {"fs.read": {
    "principal": ["Agent"], "resource": ["File"],
    "attributes": {"type": "object", "properties": {"path": {"type": "string"}}},
    "params": {"type": "object", "properties": {
        "size": {"type": "integer", "minimum": 0}, "tags": {"type": "array", "items": {"type": "string"}},
        "free": {"type": "object", "additionalProperties": true}, "text": {"type": "string"}}}
}}}"#;

fn manifest(engine: &str) -> Vec<u8> {
    let files = template("rego", DOMAIN, CREATED).unwrap();
    let mut manifest: Value = serde_json::from_slice(&files[0].1).unwrap();
    manifest["engine"] = json!(engine);
    manifest.to_string().into_bytes()
}

fn builder(policy: &str) -> BundleBuilder {
    BundleBuilder::new()
        .file("manifest.json", manifest("rego"))
        .file("input-schema.json", SCHEMA.into())
        .file("policies/main.rego", policy.into())
}

fn load(builder: BundleBuilder) -> Result<VerifiedBundle, BundleError> {
    Authority::new(DOMAIN, 1).unwrap().load(builder)
}

fn request(params: Value) -> PolicyRequest {
    PolicyRequest {
        principal_type: "Agent".into(),
        principal_id: "a".into(),
        action: "fs.read".into(),
        resource_type: "File".into(),
        resource_id: "/srv/a".into(),
        resource_attributes: json!({"path": "/srv/a", "unknown": 1})
            .as_object()
            .unwrap()
            .clone(),
        params,
        context: Value::Null,
    }
}

/// A policy that allows, with further rules.
fn allowing(rules: &str) -> String {
    format!(
        "package tidelock\n\ndecision := {{\"allow\": true, \"deny\": deny}}\n\ndeny contains \"never\" if 1 == 2\n\n{rules}\n"
    )
}

fn verdict(policy: &str, params: Value) -> (Verdict, String) {
    let bundle = load(builder(policy)).unwrap();
    let said = bundle.evaluate(&request(params));
    (said.verdict, said.errors.join("; "))
}

#[test]
fn a_bundle_of_rego_decides() {
    let policy = r#"package tidelock

decision := {"allow": allow, "deny": deny, "policies": ["reads"]}

default allow := false

allow if {
    startswith(input.resource.attributes.path, data.roots[_])
    input.principal.id in data.site.readers
}

deny contains "secrets" if contains(input.resource.id, "secret")
"#;
    let bundle = load(
        builder(policy)
            .file("data.json", br#"{"roots": ["/srv/", "/opt/"]}"#.to_vec())
            .file("data/site.json", br#"{"readers": ["a", "b"]}"#.to_vec())
            .file(
                "tests/base.json",
                json!([{"name": "reads", "request": {"principal": {"type": "Agent", "id": "a"},
                    "action": "fs.read", "resource": {"type": "File", "id": "/srv/x",
                    "attributes": {"path": "/srv/x"}}}, "expect": "allow", "policies": ["reads"]}])
                .to_string()
                .into_bytes(),
            ),
    )
    .unwrap();
    assert_eq!(bundle.policy_ids(), ["main.rego"]);
    assert_eq!(bundle.tests_passed(), 1);
    let said = bundle.evaluate(&request(Value::Null));
    assert_eq!(
        (said.verdict, said.policies),
        (Verdict::Permit, vec!["reads".into()])
    );
    let mut other = request(Value::Null);
    other.principal_id = "z".into();
    assert_eq!(bundle.evaluate(&other).verdict, Verdict::NoMatch);
    let mut secret = request(Value::Null);
    secret.resource_id = "/srv/secret".into();
    let said = bundle.evaluate(&secret);
    assert_eq!(
        (said.verdict, said.policies),
        (Verdict::Forbid, vec!["secrets".into()])
    );
    let mut unknown = request(Value::Null);
    unknown.action = "fs.write".into();
    let said = bundle.evaluate(&unknown);
    assert_eq!(said.verdict, Verdict::Error);
    assert!(
        said.errors[0].starts_with(Failure::UnknownAction.code()),
        "{:?}",
        said.errors
    );
}

/// The story: the register machine takes an error inside a rule for a rule that did not match. A `deny`
/// that errs was skipped, and the request allowed.
#[test]
fn an_error_inside_a_rule_denies_and_is_never_skipped() {
    let params = json!({"size": 0, "text": "x", "tags": ["a", "b"]});
    // Positive control: the same shapes without an error.
    for rule in [
        "deny contains \"d\" if to_number(\"1\") == 2",
        "deny contains \"d\" if 10 / 5 == 3",
        "deny contains \"d\" if input.params.nothing == 1",
        "deny contains \"d\" if { some t in input.params.tags; t == \"z\" }",
    ] {
        assert_eq!(
            verdict(&allowing(rule), params.clone()).0,
            Verdict::Permit,
            "{rule}"
        );
    }
    for rule in [
        "deny contains \"d\" if to_number(input.params.text) > 1",
        "deny contains \"d\" if 10 / input.params.size > 1",
        "deny contains \"d\" if 10 % input.params.size > 1",
        "deny contains \"d\" if input.params.text + 1 > 1",
        "deny contains \"d\" if input.params.text - 1 > 1",
        "deny contains \"d\" if input.params.text * 1 > 1",
        "deny contains \"d\" if input.params.text > 1",
        "deny contains \"d\" if input.params.size >= \"0\"",
        "deny contains \"d\" if startswith(input.params.size, \"x\")",
        "deny contains \"d\" if not startswith(input.params.size, \"x\")",
        "deny contains \"d\" if regex.match(\"[\", input.params.text)",
        "deny contains \"d\" if json.unmarshal(input.params.text) == 1",
        "deny contains \"d\" if count([t | some t in input.params.tags; to_number(t) > 1]) > 5",
        "deny contains \"d\" if { some t in input.params.tags; to_number(t) == 1 }",
        "deny contains \"d\" if every t in input.params.tags { to_number(t) == 1 }",
        "helper(x) := to_number(x)\ndeny contains \"d\" if helper(input.params.text) == 1",
        "deny contains sprintf(\"%d\", [to_number(input.params.text)])",
    ] {
        let (said, errors) = verdict(&allowing(rule), params.clone());
        assert_eq!(said, Verdict::Error, "{rule}");
        assert!(
            errors.starts_with(Failure::Policy.code()),
            "{rule}: {errors}"
        );
    }
}

/// Two values for one rule, or for one key, are an error in Rego. The register machine takes the first
/// for undefined, so that what depends on it is silent, and keeps the last of the second.
#[test]
fn contradictions_deny() {
    let params = json!({"size": 1, "tags": ["a", "b"]});
    for (rules, said) in [
        (
            "risk := 1 if input.params.size == 1\nrisk := 2 if input.params.size == 2\ndeny contains \"d\" if risk == 2",
            Verdict::Permit,
        ),
        (
            "risk := 1 if input.params.size == 1\nrisk := 2 if input.params.size == 2\ndeny contains \"d\" if risk == 1",
            Verdict::Forbid,
        ),
        (
            "risk := 1 if input.params.size == 1\nrisk := 2 if input.params.size > 0\ndeny contains \"d\" if risk == 2",
            Verdict::Error,
        ),
        (
            "risk := null if input.params.size == 1\nrisk := false if input.params.size == 2\ndeny contains \"d\" if risk == null",
            Verdict::Forbid,
        ),
        (
            "default risk := 7\nrisk := 1 if input.params.size == 3\nrisk := 2 if input.params.size == 4\ndeny contains \"d\" if risk == 7",
            Verdict::Forbid,
        ),
        (
            "f(1) := \"x\"\nf(2) := \"y\"\ndeny contains \"d\" if f(input.params.size) == \"x\"",
            Verdict::Forbid,
        ),
        (
            "f(1) := \"x\"\nf(2) := \"y\"\ndeny contains \"d\" if f(input.params.size) == \"y\"",
            Verdict::Permit,
        ),
        (
            "f(n) := \"x\" if n > 0\nf(n) := \"y\" if n < 9\ndeny contains \"d\" if f(input.params.size) == \"x\"",
            Verdict::Error,
        ),
        (
            "by := {t: 1 | some t in input.params.tags}\ndeny contains \"d\" if by.a == 1",
            Verdict::Forbid,
        ),
        (
            "by := {\"k\": t | some t in input.params.tags}\ndeny contains \"d\" if by.k == \"z\"",
            Verdict::Error,
        ),
        (
            "by[t] := 1 if some t in input.params.tags\ndeny contains \"d\" if by.b == 1",
            Verdict::Forbid,
        ),
        (
            "by[k] := t if { some t in input.params.tags; k := \"k\" }\ndeny contains \"d\" if by.k == \"z\"",
            Verdict::Error,
        ),
        (
            "f(\"a\") := 1\nall := [f(t) | some t in input.params.tags]\ndeny contains \"d\" if count(all) == 1",
            Verdict::Forbid,
        ),
    ] {
        assert_eq!(verdict(&allowing(rules), params.clone()).0, said, "{rules}");
    }
}

#[test]
fn a_decision_in_another_form_denies() {
    for (decision, said) in [
        ("decision := {\"allow\": true}", Verdict::Permit),
        (
            "decision := {\"allow\": true, \"deny\": {\"x\"}}",
            Verdict::Forbid,
        ),
        ("decision := {\"allow\": false}", Verdict::NoMatch),
        ("decision := true", Verdict::Error),
        ("decision := {\"allow\": \"yes\"}", Verdict::Error),
        (
            "decision := {\"allow\": true, \"extra\": 1}",
            Verdict::Error,
        ),
        (
            "decision := {\"allow\": true} if input.action == \"none\"",
            Verdict::Error,
        ),
        ("decision := {\"allow\": input.params.none}", Verdict::Error),
        ("decision.allow := true", Verdict::Permit),
        ("decision contains \"allow\"", Verdict::Error),
    ] {
        let Ok(bundle) = load(builder(&format!("package tidelock\n\n{decision}\n"))) else {
            assert_eq!(said, Verdict::Permit, "{decision}");
            continue;
        };
        let evaluation = bundle.evaluate(&request(Value::Null));
        assert_eq!(evaluation.verdict, said, "{decision}: {evaluation:?}");
        if said == Verdict::Error {
            assert!(evaluation.errors[0].starts_with(Failure::Decision.code()));
        }
    }
    let error = load(builder("package other\n\ndecision := {\"allow\": true}\n")).unwrap_err();
    assert_eq!(error.code(), "BUNDLE_COMPILE");
}

#[test]
fn the_input_is_checked_before_any_rule_sees_it() {
    let bundle = load(builder(&allowing(""))).unwrap();
    assert_eq!(
        bundle.evaluate(&request(json!({"size": 1}))).verdict,
        Verdict::Permit
    );
    for (params, word) in [
        (json!({"size": "1"}), "expected an integer"),
        (json!({"size": 1.5}), "64-bit"),
        (json!({"size": -1}), "not within"),
        (json!({"Size": 1}), "not declared"),
        (json!({"tags": ["a", 1]}), "expected a string"),
        (json!([1]), "expected an object"),
    ] {
        let said = bundle.evaluate(&request(params.clone()));
        assert_eq!(said.verdict, Verdict::Error, "{params}");
        assert!(
            said.errors[0].starts_with(Failure::Request.code()),
            "{:?}",
            said.errors
        );
        assert!(said.errors[0].contains(word), "{:?}", said.errors);
    }
    let mut deep = json!(1);
    for _ in 0..100 {
        deep = json!([deep]);
    }
    assert_eq!(
        bundle
            .evaluate(&request(json!({"free": {"x": deep}})))
            .verdict,
        Verdict::Error
    );
    let mut other = request(Value::Null);
    other.principal_type = "User".into();
    assert_eq!(bundle.evaluate(&other).verdict, Verdict::Error);
    let mut context = request(Value::Null);
    context.context = json!({"x": 1});
    assert_eq!(bundle.evaluate(&context).verdict, Verdict::Error);
}

#[test]
fn what_is_not_pure_or_not_run_is_refused_with_file_and_line() {
    for (rule, name) in [
        (
            "deny contains \"d\" if http.send({\"method\": \"get\", \"url\": \"http://x\"})",
            "`http.send`",
        ),
        ("deny contains \"d\" if time.now_ns() > 1", "`time.now_ns`"),
        (
            "deny contains \"d\" if rand.intn(\"x\", 3) == 1",
            "`rand.intn`",
        ),
        (
            "deny contains \"d\" if opa.runtime().env.X == \"\"",
            "`opa.runtime`",
        ),
        (
            "deny contains \"d\" if net.lookup_ip_addr(\"x\")",
            "`net.lookup_ip_addr`",
        ),
        ("deny contains \"d\" if print(input)", "`print`"),
        ("deny contains \"d\" if trace(\"x\")", "`trace`"),
        (
            "deny contains \"d\" if graph.reachable_paths({}, {})",
            "`graph.reachable_paths`",
        ),
        (
            "f(x) := x\ndeny contains \"d\" if f(1) == 1 with f as 2",
            "`with`",
        ),
        ("deny contains \"d\" if { _ := input.x }", "`_ :=`"),
        (
            "default g := {x | some x in data.y}\ng := 1 if input.x",
            "`default`",
        ),
        ("f(x) := x\ndeny contains \"d\" if f(1, 2, 3)", "f"),
        ("a := b\nb := a\ndeny contains \"d\" if a", "themselves"),
    ] {
        let text = allowing(rule);
        let error = load(builder(&text)).unwrap_err();
        let BundleError::Compile {
            file,
            line,
            message,
        } = error
        else {
            panic!("{rule}: {error:?}");
        };
        assert_eq!(file, "policies/main.rego", "{rule}: {message}");
        assert!((5..=9).contains(&line), "{rule}: line {line}: {message}");
        assert!(message.contains(name), "{rule}: {message}");
    }
}

/// Each of these would take gigabytes or seconds.
#[test]
fn what_a_request_or_a_rule_could_make_expensive_is_bounded() {
    let long = "a".repeat(60_000);
    for rule in [
        "deny contains \"d\" if count(numbers.range(0, 1000000000)) == 1",
        "deny contains \"d\" if bits.lsh(1, 4000000000) == 1",
        "deny contains \"d\" if to_number(\"1e999999999\") == 1",
        "deny contains \"d\" if sprintf(\"%999999999d\", [1]) == \"\"",
        "deny contains \"d\" if count(replace(input.params.text, \"a\", input.params.text)) == 1",
        "deny contains \"d\" if regex.match(\"(a*)*b[xyz]{1,100}\", concat(\"\", [input.params.text, input.params.text]))",
        "deny contains \"d\" if regex.match(\"((a{100}){100}){100}\", \"a\")",
        "deny contains \"d\" if regex.replace(input.params.text, \"a\", \"$0$0$0$0\") == \"\"",
        "x0 := concat(\"\", [input.params.text, input.params.text])\nx1 := concat(\"\", [x0, x0])\nx2 := concat(\"\", [x1, x1])\nx3 := concat(\"\", [x2, x2])\nx4 := concat(\"\", [x3, x3])\ndeny contains \"d\" if x4 == \"\"",
        "x0 := [1, 2]\nx1 := [x0, x0]\nx2 := [x1, x1]\nx3 := [x2, x2]\nx4 := [x3, x3]\nx5 := [x4, x4]\nx6 := [x5, x5]\nx7 := [x6, x6]\nx8 := [x7, x7]\nx9 := [x8, x8]\ny0 := [x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9, x9]\ny1 := [y0, y0, y0, y0, y0, y0, y0, y0]\ndeny contains \"d\" if json.marshal(y1) == \"\"",
        "deny contains \"d\" if { some a in numbers.range(0, 1000); some b in numbers.range(0, 1000); a + b == -1 }",
    ] {
        let (said, errors) = verdict(&allowing(rule), json!({"text": long}));
        assert_eq!(said, Verdict::Error, "{rule}");
        assert!(
            errors.starts_with(Failure::Budget.code()),
            "{rule}: {errors}"
        );
    }
}

/// The longest chain of rules that loads runs on the smallest stack that an engine thread may have.
#[test]
fn deep_rules_fit_the_stack_and_deeper_ones_do_not_load() {
    let chain = |depth: usize| {
        let mut rules = String::new();
        for n in 0..depth {
            // Two definitions each: the deepest that the machine calls itself.
            let next = n + 1;
            rules.push_str(&format!("r{n} := r{next} if input.action == \"fs.read\"\nr{n} := 9 if input.action == \"x\"\n"));
        }
        allowing(&format!(
            "{rules}r{depth} := 1\ndeny contains \"d\" if r0 == 2"
        ))
    };
    let limit = tidelock_policy::limits::REGO_RULE_DEPTH_MAX;
    let bundle = load(builder(&chain(limit - 3))).unwrap();
    let said = std::thread::Builder::new()
        .stack_size(1024 * 1024)
        .spawn(move || bundle.evaluate(&request(Value::Null)).verdict)
        .unwrap()
        .join();
    assert_eq!(said.unwrap(), Verdict::Permit);
    let error = load(builder(&chain(limit + 1))).unwrap_err();
    assert!(error.to_string().contains("deep"), "{error}");
}

/// A test of `/srv/a` that expects an answer by these.
fn one_test(expect: &str, policies: &Value) -> Vec<u8> {
    json!([{"name": "one", "request": {"principal": {"type": "Agent", "id": "a"}, "action": "fs.read",
        "resource": {"type": "File", "id": "/srv/a", "attributes": {"path": "/srv/a"}}},
        "expect": expect, "policies": policies}])
    .to_string()
    .into_bytes()
}

/// The story: the names of Rego files were compared with what decisions name, so that a good bundle was
/// called uncovered, and one whose decision names a file was called covered.
#[test]
fn of_rego_rules_coverage_is_not_measured_whatever_a_decision_names() {
    for named in ["reads", "main.rego"] {
        let policy = format!(
            "package tidelock\n\ndecision := {{\"allow\": true, \"policies\": [\"{named}\"]}}"
        );
        let tested = builder(&policy).file("tests/a.json", one_test("allow", &json!([named])));
        let report = run_tests(&tested.build().unwrap()).unwrap();
        assert_eq!((report.passed, report.failed), (1, 0), "{named}");
        assert_eq!(report.coverage, Coverage::NotMeasured, "{named}");
        assert_eq!(report.uncovered, None, "{named}");
        let report = serde_json::to_value(report).unwrap();
        assert_eq!(report["coverage"], "not measured");
        assert_eq!(report["uncovered"], Value::Null);
    }
}

#[test]
fn of_two_lanes_the_cedar_policies_are_measured_by_their_own_word() {
    let cedar = "entity Agent; entity File = {\"path\"?: String};\naction \"fs.read\" appliesTo {principal: [Agent], resource: [File], context: {}};";
    // Each permits or forbids what the test asks for, or not.
    let report = |reads: bool, guard: bool, rego: &str, expect: &str, policies: Value| {
        let policy = format!(
            "@id(\"reads\") permit(principal, action, resource) when {{ {reads} }};\n\
             @id(\"guard\") forbid(principal, action, resource) when {{ {guard} }};"
        );
        let both = builder(&format!("package tidelock\n\ndecision := {rego}"))
            .file("manifest.json", manifest("cedar+rego"))
            .file("schema.cedarschema", cedar.into())
            .file("policies/base.cedar", policy.into())
            .file("tests/a.json", one_test(expect, &policies));
        let report = run_tests(&both.build().unwrap()).unwrap();
        assert_eq!(report.failures, []);
        assert_eq!(report.coverage, Coverage::CedarOnly);
        report.uncovered.unwrap()
    };
    let silent = r#"{"allow": false}"#;
    assert_eq!(
        report(true, false, silent, "allow", json!(["reads"])),
        ["guard"]
    );
    assert_eq!(
        report(true, true, silent, "deny", json!(["guard"])),
        ["reads"]
    );
    // A Rego decision names a Cedar policy that was silent, or overruled.
    let names = r#"{"allow": true, "policies": ["reads"]}"#;
    assert_eq!(
        report(false, false, names, "allow", json!(["reads"])),
        ["guard", "reads"]
    );
    let forbids = r#"{"allow": true, "deny": ["reads"]}"#;
    assert_eq!(
        report(true, false, forbids, "deny", json!(["reads"])),
        ["guard", "reads"]
    );
}

#[test]
fn both_lanes_must_know_an_action_and_a_forbid_in_either_wins() {
    let rego = |rule: &str| {
        template_builder("both", DOMAIN, CREATED)
            .unwrap()
            .file("manifest.json", manifest("cedar+rego"))
            .file("tests/base.json", b"[]".to_vec())
            .file("policies/main.rego", allowing(rule).into_bytes())
    };
    // The schema of the template declares more than this one.
    let error = load(rego("").file("input-schema.json", SCHEMA.into())).unwrap_err();
    assert!(error.to_string().contains("not in both"), "{error}");
    let cedar = "entity Agent; entity File = {\"path\"?: String};\naction \"fs.read\" appliesTo {principal: [Agent], resource: [File], context: {}};";
    let both = |rule: &str, policy: &str| {
        load(
            rego(rule)
                .file("input-schema.json", SCHEMA.into())
                .file("schema.cedarschema", cedar.into())
                .file("policies/base.cedar", policy.into()),
        )
        .unwrap()
        .evaluate(&request(Value::Null))
    };
    let permit = "permit(principal, action, resource);";
    let said = both("", permit);
    assert_eq!(said.verdict, Verdict::Permit);
    assert_eq!(said.policies, ["base.cedar#1", "data.tidelock.decision"]);
    assert_eq!(both("deny contains \"r\"", permit).verdict, Verdict::Forbid);
    assert_eq!(
        both("", "forbid(principal, action, resource);").verdict,
        Verdict::Forbid
    );
    assert_eq!(
        both("deny contains \"r\" if 1 < \"2\"", permit).verdict,
        Verdict::Error
    );
    // A lane that the engine does not name is not silently ignored.
    let error =
        load(builder(&allowing("")).file("policies/base.cedar", permit.into())).unwrap_err();
    assert!(error.to_string().contains("says nothing"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The same rules and the same input give the same value: on this machine, on one that was compiled
    /// anew, and after other requests.
    #[test]
    fn the_same_input_gives_the_same_value(sizes in proptest::collection::vec(-50_i64..50, 1..20), text in "[a-c]{0,12}") {
        let module = "package t\n\np := {\"s\": {x | some x in input.sizes; x > 0}, \"m\": {k: v | some k, v in input.sizes}, \"n\": count([1 | some x in input.sizes; x % 2 == 0]), \"t\": split(input.text, \"a\"), \"u\": regex.replace(input.text, \"b+\", \"x\"), \"f\": sprintf(\"%v-%d\", [input.text, sum(input.sizes)])}\n";
        let none = json!({});
        let first = RegoRules::compile(&[("t.rego", module)], &none, "data.t.p").unwrap();
        let other = RegoRules::compile(&[("t.rego", module)], &none, "data.t.p").unwrap();
        let input = json!({"sizes": sizes, "text": text});
        let said = first.run(Some(&input));
        prop_assert!(said.is_ok(), "{said:?}");
        let _ = first.run(Some(&json!({"sizes": ["x"], "text": 1})));
        prop_assert_eq!(&first.run(Some(&input)), &said);
        prop_assert_eq!(&other.run(Some(&input)), &said);
    }
}

/// The story: in the engine's view a package holds its rules that are undefined, too; in OPA's it does not. A
/// policy that counts approvals would have allowed without any.
#[test]
fn a_package_read_as_a_document_does_not_hold_undefined_rules() {
    let asking = |condition: &str| {
        let policy = format!(
            "package tidelock\n\ndecision := {{\"allow\": allow}}\n\ndefault allow := false\n\nallow if {condition}\n"
        );
        let approvals = "package approvals\n\nalice if input.params.size > 0\n\nbob if input.params.size == 2\n";
        load(builder(&policy).file("policies/approvals.rego", approvals.into()))
    };
    let says = |bundle: &VerifiedBundle, params: Value| bundle.evaluate(&request(params)).verdict;
    for (condition, needed) in [
        ("count(data.approvals) >= 2", 2),
        ("count(object.keys(data.approvals)) >= 2", 2),
        ("{ some who, _ in data.approvals; who == \"alice\" }", 1),
    ] {
        let bundle = asking(condition).unwrap();
        for size in 0..=2 {
            let expected = match size >= needed {
                true => Verdict::Permit,
                false => Verdict::NoMatch,
            };
            assert_eq!(
                says(&bundle, json!({"size": size})),
                expected,
                "{condition} {size}"
            );
        }
    }
    // The controls: a rule of another package, and what counts like a package.
    let named = asking("data.approvals.alice").unwrap();
    assert_eq!(says(&named, json!({"size": 0})), Verdict::NoMatch);
    assert_eq!(says(&named, json!({"size": 1})), Verdict::Permit);
    let counted = asking("count(input.params.text) >= 4").unwrap();
    assert_eq!(
        says(&counted, json!({"text": "\u{1f600}\u{1f600}"})),
        Verdict::NoMatch
    );
    assert_eq!(says(&counted, json!({"text": "abcd"})), Verdict::Permit);
}
