//! The policy engines in process, from the bytes of a request to a decision, beside plain Cedar and
//! plain regorus.

use std::{
    hint::black_box,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use cedar_policy::{
    Authorizer, Context, Decision, Entities, EntityUid, PolicySet, Request, Schema,
};
use serde_json::{Value, json};
use tidelock_interceptor::{Action, Caller};
use tidelock_policy::{
    BundleBuilder, Engine, PolicyRequest, Verdict, VerifiedBundle, testing::Authority,
};

use crate::{Row, doors, in_turn, median};

const SLICES: usize = 5;
const SLICE: Duration = Duration::from_millis(600);
pub const FEW: usize = 100;
const MANY: usize = 10_000;
/// Principals beyond those that a rule knows, so that some requests are denied.
const STRANGERS: usize = 10;

type Group = fn(&Path) -> Vec<Row>;

const GROUPS: [(&str, Group); 6] = [
    ("in-process", |_| in_process()),
    ("rego", |_| rego()),
    ("activation", |_| crate::activation::rows()),
    ("proof", crate::proof::rows),
    ("http", doors::over_http),
    ("start", doors::start),
];

pub fn groups() -> impl Iterator<Item = &'static str> {
    GROUPS.iter().map(|(name, _)| *name)
}

pub fn rows(only: Option<&str>) -> Vec<Row> {
    in_turn(&GROUPS, only, |group, dir| group(dir))
}

pub const SCHEMA: &str = "entity Agent; entity File = { path: String, name: String, dir: String };
action \"fs.read\" appliesTo { principal: [Agent], resource: [File] };";

/// The manifest of a bundle for the one action that is asked about.
pub fn manifest(engine: &str) -> Vec<u8> {
    json!({"format": 1, "name": "bench", "domain": "harbour", "epoch": 1,
        "version": "1.0.0", "engine": engine, "min_node_version": "0.1.0",
        "created_at": "2026-09-21T00:00:00Z", "min_fallback_epoch": 1,
        "classes": {"all": {"actions": ["fs.read"], "stale_after_s": 1000,
        "restrict_after_s": 2000, "close_after_s": 3000, "when_restricted": "deny"}},
        "files": {}})
    .to_string()
    .into_bytes()
}

/// So many rules, each for an agent of its own and the directory of its team.
pub fn rules(count: usize) -> String {
    (0..count)
        .map(|n| {
            format!(
                "@id(\"p{n}\") permit(principal == Agent::\"agent-{n}\", action == Action::\"fs.read\", \
                 resource) when {{ resource.path like \"/srv/team-{n}/*\" }};\n"
            )
        })
        .collect()
}

/// A request that rule `n` permits, if there is one.
fn request(n: usize) -> Vec<u8> {
    json!({
        "principal": {"type": "Agent", "id": format!("agent-{n}")},
        "action": "fs.read",
        "resource": {"type": "File", "id": format!("/srv/team-{n}/src/main.rs")},
    })
    .to_string()
    .into_bytes()
}

/// Whom to ask about: the agents of all rules, and some that none permits.
pub fn questions(count: usize) -> impl Iterator<Item = (usize, bool)> {
    (0..count + STRANGERS).map(move |n| (n, n < count))
}

/// Requests over all rules, and some that none permits.
pub fn requests(count: usize) -> Vec<(Vec<u8>, bool)> {
    questions(count)
        .map(|(n, allowed)| (request(n), allowed))
        .collect()
}

/// What a program does that embeds Cedar as its documentation shows.
pub struct Plain {
    policies: PolicySet,
    schema: Schema,
    authorizer: Authorizer,
}

impl Plain {
    pub fn new(rules: &str) -> Self {
        Self {
            policies: rules.parse().expect("policies"),
            schema: Schema::from_cedarschema_str(SCHEMA).expect("a schema").0,
            authorizer: Authorizer::new(),
        }
    }

    pub fn decide(&self, bytes: &[u8]) -> bool {
        let value: Value = serde_json::from_slice(bytes).expect("json");
        let path = value["resource"]["id"].as_str().expect("path");
        let uid = |kind: &str, id: &str| {
            EntityUid::from_json(json!({"type": kind, "id": id})).expect("uid")
        };
        let (dir, name) = path.rsplit_once('/').expect("slash");
        let entities = Entities::from_json_value(
            json!([{"uid": {"type": "File", "id": path},
                    "attrs": {"path": path, "name": name, "dir": dir}, "parents": []}]),
            Some(&self.schema),
        )
        .expect("entities");
        let request = Request::new(
            uid("Agent", value["principal"]["id"].as_str().expect("id")),
            uid("Action", value["action"].as_str().expect("action")),
            uid("File", path),
            Context::empty(),
            Some(&self.schema),
        )
        .expect("request");
        let response = self
            .authorizer
            .is_authorized(&request, &self.policies, &entities);
        response.decision() == Decision::Allow
    }
}

/// The strict parser and the engine of a verified bundle.
pub struct Ours {
    bundle: VerifiedBundle,
    caller: Caller,
}

impl Ours {
    pub fn new(rules: &str) -> Self {
        Self::load(
            "cedar",
            BundleBuilder::new()
                .file("schema.cedarschema", SCHEMA.into())
                .file("policies/all.cedar", rules.into()),
        )
    }

    fn load(engine: &str, files: BundleBuilder) -> Self {
        let authority = Authority::new("harbour", 1).expect("an authority");
        let bundle = authority
            .load(files.file("manifest.json", manifest(engine)))
            .expect("a bundle");
        let caller = Caller {
            principal_type: "Service".into(),
            principal_id: "bench".into(),
            may_act_as: true,
            door: "bench",
            stated_by: None,
        };
        Self { bundle, caller }
    }

    pub fn decide(&self, bytes: &[u8]) -> bool {
        let action = Action::parse(bytes, &self.caller).expect("an action");
        self.permits(&PolicyRequest::from(&action))
    }

    /// A request whose attributes are given, where the parser would derive them.
    pub fn permits(&self, request: &PolicyRequest) -> bool {
        self.bundle.evaluate(request).verdict == Verdict::Permit
    }
}

/// Rules as data: for each agent and action the directories that are open to it.
const REGO: &str = "package tidelock

decision := {\"allow\": allow}

default allow := false

allow if {
	some dir in data.rules[input.principal.id][input.action]
	startswith(input.resource.attributes.path, dir)
}
";

const REGO_INPUT: &str = r#"{"format":1,"actions":{"fs.read":{"principal":["Agent"],"resource":["File"],
    "attributes":{"type":"object","properties":{"path":{"type":"string"}}}}}}"#;

fn rego_data(count: usize) -> Value {
    let rules: serde_json::Map<String, Value> = (0..count)
        .map(|n| {
            let rule = json!({"fs.read": [format!("/srv/team-{n}/")]});
            (format!("agent-{n}"), rule)
        })
        .collect();
    json!({"rules": rules})
}

/// The same rules through the Rego lane of a verified bundle.
fn ours_in_rego(count: usize) -> Ours {
    Ours::load(
        "rego",
        BundleBuilder::new()
            .file("input-schema.json", REGO_INPUT.into())
            .file("data.json", rego_data(count).to_string().into_bytes())
            .file("policies/all.rego", REGO.into()),
    )
}

/// What a program does that embeds the register machine of regorus as its documentation shows.
struct PlainRego {
    program: Arc<regorus::rvm::Program>,
    data: regorus::Value,
}

impl PlainRego {
    fn new(count: usize) -> Self {
        let entry = "data.tidelock.decision";
        let data = regorus::Value::from_json_str(&rego_data(count).to_string()).expect("data");
        let mut engine = regorus::Engine::new();
        engine
            .add_policy("all.rego".to_owned(), REGO.to_owned())
            .expect("rules");
        engine.add_data(data.clone()).expect("data");
        let policy = engine
            .compile_with_entrypoint(&entry.into())
            .expect("a policy");
        let program =
            regorus::languages::rego::compiler::Compiler::compile_from_policy(&policy, &[entry])
                .expect("a program");
        Self { program, data }
    }

    fn decide(&self, bytes: &[u8]) -> bool {
        let mut value: Value = serde_json::from_slice(bytes).expect("json");
        let path = value["resource"]["id"].clone();
        value["resource"]["attributes"] = json!({ "path": path });
        let mut machine = regorus::rvm::RegoVM::new();
        machine.load_program(Arc::clone(&self.program));
        machine.set_data(self.data.clone()).expect("data");
        machine.set_input(value.into());
        let said = machine.execute_entry_point_by_index(0).expect("a value");
        said["allow"] == regorus::Value::Bool(true)
    }
}

/// Median of single decisions in one slice, in microseconds.
fn p50(requests: &[(Vec<u8>, bool)], decide: &dyn Fn(&[u8]) -> bool) -> f64 {
    let mut all = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < SLICE {
        for (bytes, _) in requests {
            let one = Instant::now();
            black_box(decide(bytes));
            all.push(one.elapsed().as_secs_f64() * 1e6);
        }
    }
    median(all)
}

fn in_process() -> Vec<Row> {
    let (few, many) = (requests(FEW), requests(MANY));
    let (ours_few, ours_many) = (Ours::new(&rules(FEW)), Ours::new(&rules(MANY)));
    let (plain_few, plain_many) = (Plain::new(&rules(FEW)), Plain::new(&rules(MANY)));
    let text = "answers are checked before they are timed";
    for (bytes, allowed) in &few {
        assert_eq!(ours_few.decide(bytes), *allowed, "{text}");
        assert_eq!(plain_few.decide(bytes), *allowed, "{text}");
    }
    for (bytes, allowed) in &many {
        assert_eq!(ours_many.decide(bytes), *allowed, "{text}");
    }
    // Plain Cedar takes milliseconds for each of these: the ends of the range must do.
    let some: Vec<_> = many
        .iter()
        .step_by(MANY / 20)
        .chain(many.last())
        .cloned()
        .collect();
    for (bytes, allowed) in &some {
        assert_eq!(plain_many.decide(bytes), *allowed, "{text}");
    }
    let (mut a, mut b, mut c, mut d) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SLICES {
        a.push(p50(&few, &|bytes| ours_few.decide(bytes)));
        b.push(p50(&few, &|bytes| plain_few.decide(bytes)));
        c.push(p50(&many, &|bytes| ours_many.decide(bytes)));
        d.push(p50(&some, &|bytes| plain_many.decide(bytes)));
    }
    let (a, b, c, d) = (median(a), median(b), median(c), median(d));
    vec![
        Row::measured(
            "json-to-decision-100",
            "us p50",
            (a, "plain cedar-policy 4.14", b),
            "<= 0.33",
            |ratio| ratio <= 1.0 / 3.0,
        ),
        Row::measured(
            "scoped-100-to-10000",
            "us p50",
            (c, "ours with 100 rules", a),
            "<= 2.0",
            |ratio| ratio <= 2.0,
        )
        .with(json!({"plain_cedar_10000_us": d, "plain_cedar_100_us": b})),
    ]
}

fn rego() -> Vec<Row> {
    let few = requests(FEW);
    let (ours, plain) = (ours_in_rego(FEW), PlainRego::new(FEW));
    let text = "answers are checked before they are timed";
    for (bytes, allowed) in &few {
        assert_eq!(ours.decide(bytes), *allowed, "{text}");
        assert_eq!(plain.decide(bytes), *allowed, "{text}");
    }
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..SLICES {
        a.push(p50(&few, &|bytes| ours.decide(bytes)));
        b.push(p50(&few, &|bytes| plain.decide(bytes)));
    }
    let (a, b) = (median(a), median(b));
    vec![Row::absolute(
        "rego-100-as-data",
        "us p50",
        a,
        Some(("plain regorus 0.14.1, register VM", b)),
        "<= 30",
        a <= 30.0,
    )]
}
