//! The published OpenAPI document, held against a real node by a foreign tester of such documents: it makes
//! requests that fit the document and requests that do not, and looks at each answer.

#![allow(
    clippy::unwrap_used,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

#[path = "../../node/tests/common/mod.rs"]
mod common;

use std::{path::Path, process::Command};

use common::{Site, chmod, free_tcp, not_run, run};
use tidelock_gateway::tokens::TokenDigest;

const TOKEN: &str = "token-of-a-tester";

#[test]
fn schemathesis_finds_nothing() {
    let tester = Command::new("schemathesis").arg("--version").output();
    if !tester.is_ok_and(|version| version.status.success()) {
        not_run(
            "schemathesis",
            "it is not installed: pip install schemathesis==4.32.5",
        );
        return;
    }
    let site = Site::new();
    let tokens = format!(
        "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"ops-1\"\n\
         scopes = [\"decide\", \"explain\", \"act_as\"]\n",
        TokenDigest::of(TOKEN.as_bytes()),
    );
    site.write("tokens.toml", &tokens);
    chmod(&site.path("tokens.toml"), 0o600);
    let tcp = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"tokens.toml\"\n"),
    );
    let node = site.start_deciding();

    let examples = std::env::var("TIDELOCK_EXAMPLES").unwrap_or_else(|_| "10".to_owned());
    let config =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance/schemathesis.toml");
    let mut tester = Command::new("schemathesis");
    tester
        .current_dir(site.path("."))
        .arg("--config-file")
        .arg(config)
        .args(["run", &format!("http://{tcp}/openapi.json"), "--header"])
        .arg(format!("Authorization: Bearer {TOKEN}"))
        .args(["--generation-deterministic", "--no-color"])
        .args(["--max-examples", &examples]);
    let ran = run(&mut tester, b"");
    assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("generated"), "{}", ran.out);
    node.stop();
}
