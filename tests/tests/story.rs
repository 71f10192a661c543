//! The nine steps of the story against three network namespaces, where the cut is a link that goes
//! down. Needs root and `ip`; says `not run` elsewhere. `tidelock demo` plays the same over loopback.

use tidelock::demo::{Listener, StepReport, site::NODES, steps};
use tidelock_tests::{
    namespaces, not_run, program,
    site::{directory, good},
};

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
    let dir = directory();
    let network = namespaces::Namespaces::new(&NODES).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let played = runtime.block_on(steps::play(dir.path(), &program, &network, &mut Lines));
    let report = good(played);
    assert!(
        report.ok,
        "{}",
        serde_json::to_string_pretty(&report).unwrap()
    );
}
