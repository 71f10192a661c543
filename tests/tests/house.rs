//! The house as `docs/src/architecture.md` draws it, and the promises as `docs/src/traceability.md`
//! lists them: both pages are held against the workspace.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Each room: directory, crate, and the crates of ours that it may know.
const ROOMS: [(&str, &str, &[&str]); 9] = [
    ("quota", "tidelock-quota", &[]),
    ("segments", "tidelock-segments", &[]),
    ("node/policy", "tidelock-policy", &[]),
    ("node/prover", "tidelock-prover", &["tidelock-policy"]),
    (
        "transport",
        "tidelock-transport",
        &["tidelock-quota", "tidelock-segments"],
    ),
    (
        "node/interceptor",
        "tidelock-interceptor",
        &["tidelock-policy", "tidelock-quota", "tidelock-segments"],
    ),
    (
        "node/gateway",
        "tidelock-gateway",
        &["tidelock-interceptor", "tidelock-quota"],
    ),
    (
        "node/executors",
        "tidelock-executors",
        &["tidelock-interceptor"],
    ),
    (
        "node",
        "tidelock",
        &[
            "tidelock-executors",
            "tidelock-gateway",
            "tidelock-interceptor",
            "tidelock-policy",
            "tidelock-prover",
            "tidelock-quota",
            "tidelock-segments",
            "tidelock-transport",
        ],
    ),
];

/// Rooms that decide. No arrow leads from them to a network.
const DECIDING: [&str; 3] = ["node/policy", "node/interceptor", "segments"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap()
}

/// Names of what a crate depends on in the product, from its manifest.
fn dependencies(room: &str) -> BTreeSet<String> {
    read(&format!("{room}/Cargo.toml"))
        .lines()
        .skip_while(|line| *line != "[dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_arrows_between_the_rooms_are_those_of_the_architecture() {
    for (room, _, may_know) in ROOMS {
        let known: BTreeSet<String> = dependencies(room)
            .into_iter()
            .filter(|name| name.starts_with("tidelock"))
            .collect();
        let may_know: BTreeSet<String> = may_know.iter().map(|name| (*name).to_owned()).collect();
        assert!(
            known.is_subset(&may_know),
            "{room} knows {known:?}, it may know {may_know:?}"
        );
    }
    // The control: the reader of manifests does see arrows.
    assert!(dependencies("node").contains("tidelock-transport"));
    assert!(dependencies("transport").contains("quinn"));
}

#[test]
fn inv_02_what_decides_knows_no_network_and_waits_for_no_peer() {
    let networks = [
        "tidelock-transport",
        "quinn",
        "rustls",
        "tokio",
        "hyper",
        "hyper-util",
    ];
    for room in DECIDING {
        for dependency in dependencies(room) {
            assert!(
                !networks.contains(&dependency.as_str()),
                "{room} depends on {dependency}"
            );
        }
    }
    assert!(dependencies("transport").contains("tokio"));
}

/// Decision 0028: in the node, a package becomes a bundle by way of the worker and no other.
#[test]
fn a_node_loads_what_a_worker_passed_and_nothing_else() {
    let node = workspace().join("node/src");
    let mut loading = BTreeSet::new();
    for (path, source) in sources() {
        let Ok(inside) = path.strip_prefix(&node) else {
            continue;
        };
        let loads = ["VerifiedBundle::load", "Slots::open(", "slots.reload("];
        if loads.iter().any(|call| source.contains(call)) {
            loading.insert(inside.to_owned());
        }
    }
    assert_eq!(loading, BTreeSet::from([PathBuf::from("worker/mod.rs")]));
}

#[test]
fn bincode_stands_behind_the_two_codecs_only() {
    for (room, _, _) in ROOMS {
        let codec = ["segments", "transport"].contains(&room);
        assert_eq!(dependencies(room).contains("bincode"), codec, "{room}");
    }
}

/// Every source file of the workspace, by its path.
fn sources() -> BTreeMap<PathBuf, String> {
    fn walk(dir: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.insert(path, text);
            }
        }
    }
    let mut found = BTreeMap::new();
    for room in ["node", "quota", "segments", "tests", "transport"] {
        walk(&workspace().join(room), &mut found);
    }
    found
}

/// Names of the functions in the workspace's sources.
fn functions() -> BTreeSet<String> {
    sources()
        .values()
        .flat_map(|text| text.split("fn ").skip(1))
        .filter_map(|rest| {
            rest.split(|c: char| c != '_' && !c.is_ascii_alphanumeric())
                .next()
        })
        .map(str::to_owned)
        .collect()
}

/// Rows of the page's tables: the cells between the bars.
fn rows(page: &str) -> Vec<Vec<String>> {
    page.lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_traceability_page_has_a_row_for_each_invariant_and_names_only_tests_that_exist() {
    let page = read("docs/src/traceability.md");
    let rows = rows(&page);
    for number in 1..=18 {
        let id = format!("INV-{number:02}");
        let found = rows
            .iter()
            .filter(|row| row.first().is_some_and(|c| c.starts_with(&id)));
        assert_eq!(found.count(), 1, "{id}");
    }
    let functions = functions();
    let mut named = 0;
    for row in rows.iter().filter(|row| {
        row.first()
            .is_some_and(|cell| cell != "promise" && cell != "condition")
    }) {
        let tests = row.last().unwrap();
        assert!(
            tests.contains('`') || tests.contains("not yet"),
            "neither a test nor `not yet`: {row:?}"
        );
        for name in quoted(tests) {
            assert!(
                functions.contains(name),
                "{name} is on the page and is no test"
            );
            named += 1;
        }
    }
    assert!(named > 50, "{named} tests on the page");
}

#[test]
fn every_test_of_an_invariant_is_on_the_traceability_page() {
    let page = read("docs/src/traceability.md");
    let named: BTreeSet<&str> = quoted(&page).collect();
    let missing: Vec<String> = functions()
        .into_iter()
        .filter(|name| {
            name.strip_prefix("inv_")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
        .filter(|name| !named.contains(name.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "add to docs/src/traceability.md: {missing:#?}"
    );
}
