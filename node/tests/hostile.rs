//! Bundles that are made to hurt whoever loads them, signed with the site's own key.
//!
//! Each passes the signature check and reaches what reads, parses and compiles. The node must refuse it with
//! its reason, live, and go on deciding by the bundle that it has.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use common::{LONG, Node, Ran, Site, chmod, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tidelock_policy::{BundleBuilder, sign};

/// The files of a bundle.
type Files = BTreeMap<String, Vec<u8>>;

/// How the bytes of a hostile bundle come about.
enum Make {
    /// A bundle in good form whose contents are bad.
    Files(fn(&mut Files)),
    /// Bytes that are no bundle in good form.
    Bytes(fn(&Files) -> Vec<u8>),
}

/// One hostile bundle, and the code that it is refused with; nothing for a control, which loads.
struct Hostile {
    name: &'static str,
    make: Make,
    code: Option<&'static str>,
}

const fn files(name: &'static str, make: fn(&mut Files), code: &'static str) -> Hostile {
    Hostile {
        name,
        make: Make::Files(make),
        code: Some(code),
    }
}

const fn bytes(name: &'static str, make: fn(&Files) -> Vec<u8>, code: &'static str) -> Hostile {
    Hostile {
        name,
        make: Make::Bytes(make),
        code: Some(code),
    }
}

const fn control(name: &'static str, make: fn(&mut Files)) -> Hostile {
    Hostile {
        name,
        make: Make::Files(make),
        code: None,
    }
}

/// What is refused by what it is, whatever the time.
const CORPUS: &[Hostile] = &[
    control("policy nested 10 deep", |f| policy_nested(f, 10)),
    files(
        "policy nested 100 deep",
        |f| policy_nested(f, 100),
        "BUNDLE_COMPILE",
    ),
    files(
        "policy nested 200 deep",
        |f| policy_nested(f, 200),
        "BUNDLE_COMPILE",
    ),
    files(
        "policy nested 1,000 deep",
        |f| policy_nested(f, 1_000),
        "BUNDLE_COMPILE",
    ),
    files(
        "policy nested 100,000 deep",
        |f| policy_nested(f, 100_000),
        "BUNDLE_COMPILE",
    ),
    files(
        "negations 100,000 deep",
        |f| policy(f, &format!("{}true", "!".repeat(100_000))),
        "BUNDLE_COMPILE",
    ),
    files(
        "a chain of 100,000 ifs",
        |f| {
            policy(
                f,
                &format!("{}true", "if true then true else ".repeat(100_000).as_str())
                    .chars()
                    .take(1_900_000)
                    .collect::<String>(),
            )
        },
        "BUNDLE_COMPILE",
    ),
    files(
        "policy nested 10,000 deep",
        |f| policy_nested(f, 10_000),
        "BUNDLE_COMPILE",
    ),
    control("an index", |f| policy(f, "resource[\"path\"] == \"\"")),
    files("3,000 indexes", |f| indexes(f, 3_000), "BUNDLE_COMPILE"),
    files("100,000 indexes", |f| indexes(f, 100_000), "BUNDLE_COMPILE"),
    control("Rego nested 10 deep", |f| rego_nested(f, 10)),
    files(
        "Rego nested 22 deep",
        |f| rego_nested(f, 22),
        "BUNDLE_COMPILE",
    ),
    files(
        "Rego nested 100,000 deep",
        |f| rego_nested(f, 100_000),
        "BUNDLE_COMPILE",
    ),
    files(
        "Rego with brackets that cost its parser an hour",
        |f| rego(f, &"x := [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]\n".repeat(5_000)),
        "BUNDLE_COMPILE",
    ),
    control("a sum of 100 in Rego", |f| {
        rego(f, &format!("x := {}1", "1 +\n".repeat(100)))
    }),
    files(
        "a sum of 15,000 in Rego",
        |f| rego(f, &format!("x := {}1", "1 +\n".repeat(15_000))),
        "BUNDLE_COMPILE",
    ),
    files(
        "a union of 70,000 in Rego",
        |f| rego(f, &format!("x := {}{{1}}", "{1} |\n".repeat(70_000))),
        "BUNDLE_COMPILE",
    ),
    files(
        "100,000 signs in Rego",
        |f| rego(f, &format!("x := {}1", "-".repeat(100_000))),
        "BUNDLE_COMPILE",
    ),
    files(
        "100,000 indexes in Rego",
        |f| rego(f, &format!("x := input{}", "[\"a\"]".repeat(100_000))),
        "BUNDLE_COMPILE",
    ),
    files(
        "9,000 else in Rego",
        |f| {
            rego(
                f,
                &format!(
                    "x := 1 if input.a{}",
                    "\nelse := 2 if input.b".repeat(9_000)
                ),
            )
        },
        "BUNDLE_COMPILE",
    ),
    control("a regular expression", |f| {
        pattern(f, "^/[a-z]{1,20}[.]txt$")
    }),
    files(
        "a regular expression of a million states",
        |f| pattern(f, "((([a-z]{100}){100}){100})"),
        "BUNDLE_TESTS",
    ),
    files(
        "a regular expression of 30,000 characters",
        |f| pattern(f, &"(a|b)*c?".repeat(3_750)),
        "BUNDLE_COMPILE",
    ),
    control("schema nested 10 deep", |f| schema_nested(f, 10)),
    files(
        "schema nested 100 deep",
        |f| schema_nested(f, 100),
        "BUNDLE_SCHEMA",
    ),
    files(
        "schema nested 200 deep",
        |f| schema_nested(f, 200),
        "BUNDLE_SCHEMA",
    ),
    files(
        "schema nested 1,000 deep",
        |f| schema_nested(f, 1_000),
        "BUNDLE_SCHEMA",
    ),
    files(
        "schema nested 100,000 deep",
        |f| schema_nested(f, 100_000),
        "BUNDLE_SCHEMA",
    ),
    control("JSON nested 10 deep", |f| json_nested(f, 10)),
    control("JSON nested 100 deep", |f| json_nested(f, 100)),
    files(
        "JSON nested 200 deep",
        |f| json_nested(f, 200),
        "BUNDLE_FORMAT",
    ),
    files(
        "JSON nested 1,000 deep",
        |f| json_nested(f, 1_000),
        "BUNDLE_FORMAT",
    ),
    files(
        "JSON nested 100,000 deep",
        |f| json_nested(f, 100_000),
        "BUNDLE_FORMAT",
    ),
    files(
        "entities nested 100,000 deep",
        |f| {
            f.insert(
                "entities.json".into(),
                nested("[", 100_000, "]").into_bytes(),
            );
        },
        "BUNDLE_FORMAT",
    ),
    files(
        "entities in a circle",
        |f| entities(f, &[("a", "b"), ("b", "a")]),
        "BUNDLE_SCHEMA",
    ),
    files(
        "an entity that is its own parent",
        |f| entities(f, &[("a", "a")]),
        "BUNDLE_SCHEMA",
    ),
    control("a hierarchy of 100 levels", |f| hierarchy(f, 100)),
    files(
        "a hierarchy of 9,000 levels",
        |f| hierarchy(f, 9_000),
        "BUNDLE_FORMAT",
    ),
    files(
        "a hierarchy of 20,000 levels",
        |f| hierarchy(f, 20_000),
        "BUNDLE_FORMAT",
    ),
    files(
        "20,000 policies",
        |f| {
            f.insert(
                "policies/many.cedar".into(),
                "forbid(principal,action,resource)when{false};"
                    .repeat(20_000)
                    .into_bytes(),
            );
        },
        "BUNDLE_COMPILE",
    ),
    files(
        "policies of one id",
        |f| {
            f.insert("policies/many.cedar".into(), br#"@id("a") forbid(principal,action,resource); @id("a") forbid(principal,action,resource);"#.to_vec());
        },
        "BUNDLE_COMPILE",
    ),
    control("a set of 10,000 elements", |f| {
        policy(
            f,
            &format!("[{}\"x\"].contains(\"y\")", "\"x\",".repeat(10_000)),
        )
    }),
    control("a text of 1 MB", |f| {
        policy(f, &format!("\"{}\" == \"x\"", "a".repeat(1_000_000)))
    }),
    control("a pattern of 10,000 wildcards", |f| {
        policy(
            f,
            &format!("resource.path like \"{}b\"", "*a".repeat(10_000)),
        )
    }),
    files(
        "a text that never ends",
        |f| policy(f, &"\"a".repeat(3)),
        "BUNDLE_COMPILE",
    ),
    files(
        "a file that is no text",
        |f| {
            f.insert("policies/many.cedar".into(), vec![0xff; 1_000]);
        },
        "BUNDLE_FORMAT",
    ),
    files(
        "types that name each other in a circle",
        |f| schema(f, "type A = { a: B }; type B = { a: A };"),
        "BUNDLE_SCHEMA",
    ),
    files(
        "tests that fail",
        |f| {
            tests(
                f,
                &json!([{"name": "t", "request": {"principal": {"type": "Agent", "id": "a"}, "action": "fs.read", "resource": {"type": "File", "id": "/etc/x", "attributes": {"path": "/etc/x"}}}, "expect": "allow"}]),
            )
        },
        "BUNDLE_TESTS",
    ),
    bytes(
        "no archive",
        |_| b"no archive at all".to_vec(),
        "BUNDLE_FORMAT",
    ),
    bytes("nothing", |_| Vec::new(), "BUNDLE_FORMAT"),
    bytes(
        "an archive cut short",
        |f| {
            let mut all = archive(f);
            all.truncate(700);
            all
        },
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a path that leaves the archive",
        |f| with(f, "../../etc/cron.d/x", b'0', "", b"x"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "an absolute path",
        |f| with(f, "/etc/cron.d/x", b'0', "", b"x"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a path with a backslash",
        |f| with(f, "policies\\x.cedar", b'0', "", b"x"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a symbolic link",
        |f| with(f, "policies/x.cedar", b'2', "/etc/shadow", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a hard link",
        |f| with(f, "policies/x.cedar", b'1', "/etc/shadow", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a character device",
        |f| with(f, "policies/x.cedar", b'3', "", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a block device",
        |f| with(f, "policies/x.cedar", b'4', "", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a directory",
        |f| with(f, "policies/", b'5', "", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a named pipe",
        |f| with(f, "policies/x.cedar", b'6', "", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a sparse file",
        |f| with(f, "policies/x.cedar", b'S', "", b""),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a long name of gnu",
        |f| with(f, "././@LongLink", b'L', "", b"policies/x.cedar"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a pax header that renames",
        |f| with(f, "PaxHeaders/x", b'x', "", b"24 path=policies/x.cedar\n"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "a pax header for all",
        |f| with(f, "PaxHeaders/x", b'g', "", b"20 size=99999999999\n"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "an entry twice",
        |f| with(f, "manifest.json", b'0', "", b"{}"),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "an entry of a size that is not there",
        |f| claiming(f, 1 << 20),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "an entry of 8 GiB",
        |f| claiming(f, (1 << 33) - 1),
        "BUNDLE_FORMAT",
    ),
    bytes(
        "5,000 entries",
        |f| {
            let mut all = archive(f);
            all.truncate(all.len() - 1024);
            for n in 0..5_000 {
                all.extend(entry(&format!("tests/{n}.json"), b'0', "", b"", 0));
            }
            all.extend([0; 1024]);
            all
        },
        "BUNDLE_FORMAT",
    ),
    bytes(
        "an archive of 100 MB",
        |f| {
            let mut all = archive(f);
            all.resize(100_000_000, 0);
            all
        },
        "BUNDLE_FORMAT",
    ),
];

/// What is refused because it does not end.
const ENDLESS: &[Hostile] = &[
    files(
        "types that double thirty times",
        |f| schema(f, &doubling(30)),
        "BUNDLE_WORKER_",
    ),
    files(
        "a match of a trillion steps",
        endless_match,
        "BUNDLE_WORKER_TIMEOUT",
    ),
];

fn nested(open: &str, depth: usize, close: &str) -> String {
    open.repeat(depth) + &close.repeat(depth)
}

fn policy(files: &mut Files, condition: &str) {
    let text = format!(
        "permit (principal is Agent, action == Action::\"fs.read\", resource is File) when {{ {condition} }};"
    );
    files.insert("policies/hostile.cedar".to_owned(), text.into_bytes());
    // What the condition permits is not the point.
    files.remove("tests/base.json");
}

fn policy_nested(files: &mut Files, depth: usize) {
    policy(
        files,
        &format!("{}false{}", "(".repeat(depth), ")".repeat(depth)),
    );
}

/// From some thousands on the validator gives up on it and says nothing.
fn indexes(files: &mut Files, count: usize) {
    policy(
        files,
        &format!("resource{} == 1", "[\"path\"]".repeat(count)),
    );
}

/// The bundle's rules in Rego, and a file beside them.
fn rego(files: &mut Files, more: &str) {
    let mut manifest: Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    manifest["engine"] = json!("rego");
    let input = json!({"format": 1, "actions": {"fs.read": {
        "principal": ["Agent"], "resource": ["File"],
        "attributes": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        "context": {"type": "object", "properties": {}},
    }}});
    let rules = "package tidelock\n\ndecision := {\"allow\": allow, \"deny\": deny, \"policies\": {\"srv\"}}\n\n\
                 default allow := false\n\nallow if startswith(input.resource.attributes.path, \"/srv/\")\n\n\
                 deny contains \"never\" if input.resource.id == \"/never\"\n";
    *files = Files::from([
        (
            "manifest.json".to_owned(),
            manifest.to_string().into_bytes(),
        ),
        (
            "input-schema.json".to_owned(),
            input.to_string().into_bytes(),
        ),
        ("policies/base.rego".to_owned(), rules.into()),
        (
            "policies/hostile.rego".to_owned(),
            format!("package hostile\n\n{more}\n").into_bytes(),
        ),
    ]);
}

fn rego_nested(files: &mut Files, depth: usize) {
    rego(
        files,
        &format!("x := {}1{}", "[".repeat(depth), "]".repeat(depth)),
    );
}

/// A rule whose pattern the bundle's own test meets.
fn pattern(files: &mut Files, pattern: &str) {
    rego(files, "");
    let rule = format!("\nallow if regex.match(`{pattern}`, input.resource.id)\n");
    files
        .get_mut("policies/base.rego")
        .unwrap()
        .extend(rule.into_bytes());
    tests(
        files,
        &json!([{"name": "meets it", "request": {"principal": {"type": "Agent", "id": "a"}, "action": "fs.read",
                 "resource": {"type": "File", "id": "/abc.txt", "attributes": {"path": "/abc.txt"}}},
                 "expect": "allow"}]),
    );
}

fn schema(files: &mut Files, more: &str) {
    let text = files.get_mut("schema.cedarschema").unwrap();
    text.extend_from_slice(b"\n");
    text.extend_from_slice(more.as_bytes());
}

fn schema_nested(files: &mut Files, depth: usize) {
    let text = format!(
        "entity Nest = {{ x: {}Long{} }};",
        "Set<".repeat(depth),
        ">".repeat(depth)
    );
    schema(files, &text);
}

fn doubling(times: usize) -> String {
    let mut text = "type T0 = { a: Long };\n".to_owned();
    for n in 1..=times {
        text.push_str(&format!("type T{n} = {{ a: T{0}, b: T{0} }};\n", n - 1));
    }
    text.push_str(&format!("entity Big = {{ x: T{times} }};\n"));
    text
}

fn tests(files: &mut Files, cases: &Value) {
    files.insert(
        "tests/hostile.json".to_owned(),
        cases.to_string().into_bytes(),
    );
}

/// A test whose parameters are nested, and which expects the error that they are.
fn json_nested(files: &mut Files, depth: usize) {
    let text = format!(
        r#"[{{"name": "n", "request": {{"principal": {{"type": "Agent", "id": "a"}}, "action": "process.exec",
            "resource": {{"type": "Command", "id": "ls", "attributes": {{"program": "ls"}}}},
            "params": {{"args": {}}}}}, "expect": "error"}}]"#,
        nested("[", depth, "]")
    );
    files.insert("tests/hostile.json".to_owned(), text.into_bytes());
}

fn entities(files: &mut Files, parents: &[(&str, &str)]) {
    let team = |id: &str| json!({"type": "Team", "id": id});
    let all: Vec<Value> = parents
        .iter()
        .map(|(id, parent)| json!({"uid": team(id), "attrs": {}, "parents": [team(parent)]}))
        .collect();
    schema(files, "");
    let text = String::from_utf8(files["schema.cedarschema"].clone()).unwrap();
    let text = text.replace("entity Team;", "entity Team in [Team];");
    files.insert("schema.cedarschema".to_owned(), text.into_bytes());
    files.insert(
        "entities.json".to_owned(),
        json!(all).to_string().into_bytes(),
    );
}

fn hierarchy(files: &mut Files, levels: usize) {
    let names: Vec<String> = (0..=levels).map(|n| format!("t{n}")).collect();
    let parents: Vec<(&str, &str)> = names
        .windows(2)
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect();
    entities(files, &parents);
}

/// A pattern and a text that need a trillion steps to find that they do not match.
fn endless_match(files: &mut Files) {
    let pattern = "a".repeat(900_000);
    policy(files, &format!("resource.path like \"*{pattern}b\""));
    let path = "a".repeat(1_900_000);
    tests(
        files,
        &json!([{"name": "endless", "request": {"principal": {"type": "Agent", "id": "a"}, "action": "fs.read",
                 "resource": {"type": "File", "id": "/x", "attributes": {"path": path}}}, "expect": "deny"}]),
    );
}

/// The archive of these files, whatever they hold.
fn archive(files: &Files) -> Vec<u8> {
    let builder = files
        .iter()
        .fold(BundleBuilder::new(), |builder, (path, bytes)| {
            builder.file(path, bytes.clone())
        });
    builder.build().unwrap()
}

/// One entry of an archive, which may claim another size than it has.
fn entry(path: &str, kind: u8, link: &str, bytes: &[u8], claimed: u64) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..path.len()].copy_from_slice(path.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{claimed:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut all = header.to_vec();
    all.extend_from_slice(bytes);
    all.resize(all.len().next_multiple_of(512), 0);
    all
}

/// The archive with one more entry.
fn with(files: &Files, path: &str, kind: u8, link: &str, bytes: &[u8]) -> Vec<u8> {
    let mut all = archive(files);
    all.truncate(all.len() - 1024);
    all.extend(entry(path, kind, link, bytes, bytes.len() as u64));
    all.extend([0; 1024]);
    all
}

/// The archive with an entry that claims a size.
fn claiming(files: &Files, claimed: u64) -> Vec<u8> {
    let mut all = archive(files);
    all.truncate(all.len() - 1024);
    all.extend(entry("policies/x.cedar", b'0', "", b"x", claimed));
    all.extend([0; 1024]);
    all
}

/// The files of the site's bundle, with this epoch.
fn good(site: &Site, epoch: u64) -> Files {
    let mut files = Files::new();
    for path in [
        "schema.cedarschema",
        "policies/base.cedar",
        "tests/base.json",
    ] {
        files.insert(
            path.to_owned(),
            site.read(&format!("policy/{path}")).into_bytes(),
        );
    }
    let mut manifest: Value = serde_json::from_str(&site.read("policy/manifest.json")).unwrap();
    manifest["epoch"] = json!(epoch);
    files.insert(
        "manifest.json".to_owned(),
        manifest.to_string().into_bytes(),
    );
    files
}

/// Writes an archive and its signature, by the site's real key.
fn offer(site: &Site, archive: &[u8]) -> String {
    fs::write(site.path("hostile.tar"), archive).unwrap();
    let signature = sign(archive, &site.read("policy.key")).unwrap();
    fs::write(site.path("hostile.tar.sig"), signature).unwrap();
    "hostile.tar".to_owned()
}

fn make(site: &Site, epoch: u64, hostile: &Hostile) -> Vec<u8> {
    let mut files = good(site, epoch);
    match hostile.make {
        Make::Files(change) => {
            change(&mut files);
            archive(&files)
        }
        Make::Bytes(make) => make(&files),
    }
}

fn install(site: &Site) -> Ran {
    site.tidelock(&["bundle", "install", "hostile.tar", "--apply"])
}

/// Demands that the node decides rightly, one allow and one deny, however busy the machine.
#[track_caller]
fn decides(site: &Site) {
    for (path, decision) in [("/srv/a.txt", "allow"), ("/etc/shadow", "deny")] {
        until("a decision by the policies", || {
            let (found, reason) = site.may_read(path);
            let of_the_machine = ["AUDIT_UNAVAILABLE", "DEADLINE"].contains(&reason.as_str());
            (!of_the_machine).then(|| assert_eq!(found, decision, "{path}: {reason}"))
        });
    }
}

/// Installs what is offered while the node is asked to decide: what the command said, and how long
/// it took.
fn install_while_deciding(site: &Site) -> (Ran, Duration) {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let installing = scope.spawn(|| (install(site), begun.elapsed()));
        while !installing.is_finished() {
            decides(site);
            std::thread::sleep(Duration::from_millis(100));
        }
        installing.join().unwrap()
    })
}

fn run(corpus: &[Hostile], deadline_ms: u64) {
    let patience = Duration::from_millis(deadline_ms) + LONG;
    let site = Site::new();
    site.configure(
        "trust = \"trust.toml\"",
        &format!("trust = \"trust.toml\"\nworker_deadline_ms = {deadline_ms}"),
    );
    let node = site.start_deciding();
    let mut epoch = 1;
    let mut wrong = Vec::new();
    let mut slowest = (Duration::ZERO, "");
    for hostile in corpus {
        epoch += 1;
        let archive = make(&site, epoch, hostile);
        offer(&site, &archive);
        let rejected = site.events("bundle_rejected").len();
        let before = site.status()["bundle"].clone();
        let (ran, took) = install_while_deciding(&site);
        let fits = match hostile.code {
            None => ran.code == 0,
            Some(code) => {
                // An archive beyond every limit does not get past the command.
                let events = site.events("bundle_rejected");
                let told = archive.len() > 4 << 20 || events.len() > rejected;
                assert!(told, "{}: no record of the refusal", hostile.name);
                assert_eq!(site.status()["bundle"], before, "{}", hostile.name);
                ran.code == 1 && ran.err.contains(code)
            }
        };
        if hostile.code.is_some() {
            slowest = slowest.max((took, hostile.name));
        }
        if !fits || took > patience {
            wrong.push(format!("{}: {:?} after {took:?}", hostile.name, ran.err));
        }
        decides(&site);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("the slowest refusal: {slowest:?}");
    // The control: the way is open for a good one, in the same process.
    offer(&site, &archive(&good(&site, epoch + 1)));
    install(&site).ended(0);
    assert_eq!(site.status()["bundle"]["epoch"], epoch + 1);
    decides(&site);
    assert!(node.stop().success());
}

#[test]
fn no_hostile_bundle_ends_a_node_or_decides_in_it() {
    // The reasons are looked at here, on a busy machine too.
    run(CORPUS, 20_000);
}

#[test]
fn a_bundle_without_an_end_is_refused_at_the_deadline() {
    run(ENDLESS, 1_500);
}

/// The worker that a node runs just now.
fn worker_of(node: &Node<'_>) -> Option<Pid> {
    let threads = fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap();
    threads.flatten().find_map(|thread| {
        // A thread may end meanwhile, and has no children then.
        let children = fs::read_to_string(thread.path().join("children")).ok()?;
        let child: i32 = children.split_whitespace().next()?.parse().ok()?;
        // Before it has become the worker it is still this node, which waits for that without a deadline.
        let command = fs::read(format!("/proc/{child}/cmdline")).ok()?;
        let word = b"policy-worker";
        command
            .windows(word.len())
            .any(|part| part == word)
            .then_some(())?;
        Pid::from_raw(child)
    })
}

/// A good bundle that takes a while to compile.
fn long_one(site: &Site, epoch: u64) {
    let mut files = good(site, epoch);
    let many: String = (0..1_500)
        .map(|n| format!("forbid (principal == Agent::\"a{n}\", action, resource is File) when {{ resource.path like \"/x{n}/*\" }};\n"))
        .collect();
    files.insert("policies/many.cedar".to_owned(), many.into_bytes());
    offer(site, &archive(&files));
}

/// Installs what is offered, and sends the worker a signal as soon as there is one.
fn install_and_send(site: &Site, node: &Node<'_>, signal: Signal) -> Ran {
    std::thread::scope(|scope| {
        let installing = scope.spawn(|| install(site));
        let worker = until("a worker", || worker_of(node));
        kill_process(worker, signal).unwrap();
        while !installing.is_finished() {
            decides(site);
        }
        installing.join().unwrap()
    })
}

#[test]
fn a_worker_that_is_killed_or_stopped_is_a_refusal_and_the_operator_may_try_again() {
    let site = Site::new();
    site.configure(
        "trust = \"trust.toml\"",
        "trust = \"trust.toml\"\nworker_deadline_ms = 3000",
    );
    let node = site.start_deciding();
    long_one(&site, 2);
    for (signal, code) in [
        (Signal::KILL, "BUNDLE_WORKER_CRASHED"),
        (Signal::STOP, "BUNDLE_WORKER_TIMEOUT"),
    ] {
        let failed = site.status()["policy_worker"]["counts"]["failed"].clone();
        install_and_send(&site, &node, signal)
            .ended(1)
            .says(&[code]);
        let events = site.events("bundle_rejected");
        assert_eq!(events.last().unwrap()["code"], code);
        let now = site.status()["policy_worker"]["counts"]["failed"].clone();
        assert_eq!(now.as_u64().unwrap(), failed.as_u64().unwrap() + 1);
        assert_eq!(site.status()["bundle"]["epoch"], 1);
        assert_eq!(worker_of(&node), None, "it is ended and buried");
    }
    // The same bytes, without the hand that ended the worker.
    site.configure("worker_deadline_ms = 3000", "worker_deadline_ms = 60000");
    node.reload("reloaded");
    install(&site).ended(0);
    assert_eq!(site.status()["bundle"]["epoch"], 2);
    decides(&site);
}

/// A copy of the program, made by another process: a test beside this one that starts a process just while
/// the copy is written would keep it open for writing, and it could not be run.
fn copied(site: &Site, name: &str) -> PathBuf {
    let copy = site.path(name);
    let made = std::process::Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_tidelock"))
        .arg(&copy)
        .status();
    assert!(made.unwrap().success());
    copy
}

#[test]
fn without_a_worker_nothing_new_is_loaded_and_what_decides_goes_on() {
    let site = Site::new();
    let program = copied(&site, "program");
    let node = site.start_as(&program, &[]);
    site.ok(&["bundle", "install", "site-1.tar", "--apply"]);
    chmod(&program, 0o644);
    offer(&site, &archive(&good(&site, 2)));
    install(&site).ended(1).says(&["BUNDLE_WORKER_UNAVAILABLE"]);
    assert_eq!(site.status()["bundle"]["epoch"], 1);
    decides(&site);
    // What has passed under this very program is not asked for again, at a start neither.
    node.reload("reloaded");
    decides(&site);

    chmod(&program, 0o755);
    install(&site).ended(0);
    decides(&site);
    assert!(node.stop().success());
    let node = site.start_as(&program, &[]);
    decides(&site);
    let counts = site.status()["policy_worker"]["counts"].clone();
    assert_eq!(counts["passed"], 0, "{counts}");
    assert!(node.stop().success());

    // Another program under the same version examines for itself.
    let _node = site.start_as(&copied(&site, "other"), &[]);
    decides(&site);
    let worker = site.status()["policy_worker"].clone();
    assert!(worker["counts"]["passed"].as_u64().unwrap() > 0, "{worker}");
    // INV-05: what is said of the worker's confinement is what the kernel said to it.
    for fact in ["no_new_privs", "seccomp", "no_capabilities"] {
        assert_eq!(worker["confinement"][fact], true, "{fact}: {worker}");
    }
    site.tidelock(&["doctor"])
        .says(&["bundles are compiled in a child with a filter of system calls"]);
}

/// A reload asked a worker about the bundle that decided, unless it was among the last eight that had passed.
/// Whoever had made eight other bundles be planned meanwhile, on a machine that could start no worker just then,
/// took the policy out of use with any reload.
#[test]
fn a_bundle_that_decides_outlives_a_reload_beside_a_worker_that_cannot_be_started() {
    let site = Site::new();
    let program = copied(&site, "program");
    let node = site.start_as(&program, &[]);
    site.ok(&["bundle", "install", "site-1.tar", "--apply"]);
    for epoch in 2..10 {
        offer(&site, &archive(&good(&site, epoch)));
        site.ok(&["bundle", "install", "hostile.tar"]);
    }
    chmod(&program, 0o644);
    node.reload("reloaded");
    decides(&site);
    assert_eq!(site.status()["bundle"]["epoch"], 1);
    // What trust says holds without a worker: those who signed it are not believed any more.
    site.signing_key("other.key");
    site.write("trust.toml", &site.trust("other.key"));
    node.reload("reloaded");
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(site.may_read("/srv/a.txt"), denied);
    assert!(node.stop().success());
}

/// A node that is started while no worker can be has vetted nothing in its life: it denies, and decides as
/// soon as there is a worker, without a hand.
#[test]
fn a_node_that_starts_without_a_worker_denies_and_decides_when_there_is_one() {
    let site = Site::new();
    let program = copied(&site, "program");
    let node = site.start_as(&program, &[]);
    site.ok(&["bundle", "install", "site-1.tar", "--apply"]);
    assert!(node.stop().success());
    // What has passed under this program would be taken at its word.
    fs::remove_file(site.path("root/policy/passed")).unwrap();

    // The node reads the trust file before the slots: held up there, its program can be taken from it.
    let trust = site.read("trust.toml");
    let pipe = site.path("trust.toml");
    fs::remove_file(&pipe).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let node = std::thread::scope(|scope| {
        let gate = scope.spawn(|| {
            let mut writer = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
            chmod(&program, 0o644);
            std::io::Write::write_all(&mut writer, trust.as_bytes()).unwrap();
            drop(writer);
            site.write("trust.kept", &trust);
            fs::rename(site.path("trust.kept"), &pipe).unwrap();
        });
        let node = site.start_as(&program, &[]);
        gate.join().unwrap();
        node
    });
    let denied = ("deny".to_owned(), "NO_POLICY".to_owned());
    assert_eq!(site.may_read("/srv/a.txt"), denied);
    let faults = site.events("policy_slot_fault");
    let told = |fault: &&Value| fault["code"] == "BUNDLE_WORKER_UNAVAILABLE";
    assert_eq!(faults.iter().filter(told).count(), 1, "{faults:?}");

    chmod(&program, 0o755);
    until("the bundle to decide again", || {
        (site.status()["bundle"]["epoch"] == 1).then_some(())
    });
    decides(&site);
    let read = site.events("policy_slots_read");
    assert_eq!(read.len(), 1, "{read:?}");
    assert_eq!(read[0]["epoch"], 1);
    assert!(node.stop().success());
}

/// A bundle of an epoch that is over cost a worker and a compilation before it was refused: whoever had old
/// ones, each signed in its time, could keep the one worker of a node busy for ever.
#[test]
fn inv_16_a_bundle_below_the_floor_is_refused_before_a_worker_is_spent_on_it() {
    let site = Site::new();
    let _node = site.start_deciding();
    offer(&site, &archive(&good(&site, 3)));
    install(&site).ended(0);
    let spent = || site.status()["policy_worker"]["counts"].clone();
    let before = spent();
    // Neither of them could be compiled; that is not found out.
    for (epoch, code) in [(2, "BUNDLE_EPOCH"), (3, "BUNDLE_CONFLICT")] {
        let mut files = good(&site, epoch);
        policy_nested(&mut files, 100);
        offer(&site, &archive(&files));
        for apply in [&["--apply"][..], &[]] {
            let words = [&["bundle", "install", "hostile.tar"][..], apply].concat();
            site.tidelock(&words).ended(1).says(&[code]);
        }
    }
    assert_eq!(spent(), before);
    // The control: above the floor a worker is asked.
    let mut files = good(&site, 4);
    policy_nested(&mut files, 100);
    offer(&site, &archive(&files));
    install(&site).ended(1).says(&["BUNDLE_COMPILE"]);
    assert_ne!(spent(), before);
    decides(&site);
}
