//! The nine steps of the story against three network namespaces, where the cut is a link that goes
//! down. Needs root and `ip`; says `not run` elsewhere. `tidelock demo` plays the same over loopback.

use tidelock::demo::{Listener, StepReport, site::NODES, steps};
use tidelock_tests::{namespaces, not_run, program};

struct Lines;

impl Listener for Lines {
    fn progress(&mut self, _step: u32, _what: &str) {}

    fn ended(&mut self, report: &StepReport) {
        eprintln!(
            "{} {}: {}",
            report.step,
            report.name,
            serde_json::json!(report.facts)
        );
    }
}

#[test]
fn the_story_holds_in_network_namespaces() {
    if let Some(why) = namespaces::why_not() {
        not_run("the_story_holds_in_network_namespaces", &why).unwrap();
        return;
    }
    let program = program().unwrap();
    let dir = tempfile::Builder::new().prefix("tl").tempdir().unwrap();
    let network = namespaces::Namespaces::new(&NODES).unwrap();
    let report = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(steps::play(dir.path(), &program, &network, &mut Lines))
        .unwrap_or_else(|failure| panic!("{}", failure.message));
    assert!(
        report.ok,
        "{}",
        serde_json::to_string_pretty(&report).unwrap()
    );
}
