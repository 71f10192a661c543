//! The door against real permits, made by the real pipeline over the template bundle.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{fs, os::unix::fs::symlink, sync::Arc};

use tidelock_executors::{ExecuteError, ReadFile};
use tidelock_interceptor::{
    Caller, Interceptor, InterceptorConfig, Mode, Permit,
    testing::{MemoryRecorder, TestClock},
};
use tidelock_policy::{
    BundleBuilder, LoadContext, Slots, TrustFile,
    testing::{Authority, MemorySlots, NODE_VERSION},
};
use tidelock_segments::NodeId;

const NOW: u64 = 1_790_000_000_000;

/// An interceptor whose policy permits everything on files.
fn interceptor() -> Interceptor {
    let authority = Authority::new("harbour", 1).unwrap();
    let manifest = r#"{"format":1,"name":"t","domain":"harbour","epoch":1,"version":"1.0.0","engine":"cedar",
        "min_node_version":"0.1.0","created_at":"2026-09-21T00:00:00Z","min_fallback_epoch":1,
        "classes":{"all":{"actions":["fs.read","fs.write"],"stale_after_s":1000000000,
        "restrict_after_s":2000000000,"close_after_s":3000000000,"when_restricted":"deny"}},"files":{}}"#;
    let builder = BundleBuilder::new()
        .file("manifest.json", manifest.into())
        .file(
            "schema.cedarschema",
            b"entity Agent; entity File;
              action \"fs.read\", \"fs.write\" appliesTo { principal: [Agent], resource: [File] };"
                .to_vec(),
        )
        .file(
            "policies/all.cedar",
            b"@id(\"all\") permit(principal, action, resource);".to_vec(),
        )
        .created_unix_ms(NOW);
    let slots = Slots::open(
        MemorySlots::new(),
        &TrustFile::parse(&authority.trust_toml(1)).unwrap(),
        &LoadContext::new("harbour", NODE_VERSION).unwrap(),
    )
    .0;
    slots.activate(authority.load(builder).unwrap()).unwrap();
    Interceptor::new(
        InterceptorConfig::new(NodeId::new("a").unwrap()),
        TestClock::new(NOW),
        Arc::new(move || slots.current()),
        MemoryRecorder::new(),
    )
    .unwrap()
}

fn permit(action: &str, path: &str) -> Permit {
    let request = serde_json::json!({"action": action, "resource": {"type": "File", "id": path}});
    let caller = Caller {
        principal_type: "Agent".into(),
        principal_id: "coder-1".into(),
        may_act_as: false,
        door: "test",
        stated_by: None,
    };
    let outcome = interceptor().decide_wait(request.to_string().as_bytes(), &caller, Mode::Decide);
    outcome
        .permit
        .unwrap_or_else(|| panic!("{:?}", outcome.answer))
}

#[test]
fn a_permit_reads_its_own_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    fs::write(root.join("a.txt"), b"hello").unwrap();
    let door = ReadFile::new(&root, 5).unwrap();
    let inside = root.join("a.txt");
    let inside = inside.to_str().unwrap();
    assert_eq!(
        door.execute(permit("fs.read", inside)).unwrap().output,
        b"hello",
        "positive control"
    );

    let other = door.execute(permit("fs.write", inside));
    assert!(matches!(other, Err(ExecuteError::OtherAction { .. })));
    let outside = door.execute(permit("fs.read", "/etc/hostname"));
    assert!(matches!(outside, Err(ExecuteError::Outside { .. })));
    fs::write(root.join("long.txt"), b"123456").unwrap();
    let long = door.execute(permit("fs.read", root.join("long.txt").to_str().unwrap()));
    assert!(matches!(
        long,
        Err(ExecuteError::TooLong { max_bytes: 5, .. })
    ));
}

#[test]
fn a_link_put_there_after_the_decision_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let door = ReadFile::new(&root, 1_000).unwrap();
    let path = root.join("notes.txt");
    fs::write(&path, b"mine").unwrap();
    let permit = permit("fs.read", path.to_str().unwrap());
    fs::remove_file(&path).unwrap();
    symlink("/etc/hostname", &path).unwrap();
    assert!(matches!(door.execute(permit), Err(ExecuteError::Io { .. })));
}

/// Decision points upstream have a cache of answers; executors have none, whatever fails.
#[test]
fn what_an_executor_answered_before_never_stands_in_for_what_it_cannot_do_now() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let door = ReadFile::new(&root, 1_000).unwrap();
    let path = root.join("notes.txt");
    let read = || door.execute(permit("fs.read", path.to_str().unwrap()));
    fs::write(&path, b"first").unwrap();
    assert_eq!(read().unwrap().output, b"first", "positive control");
    fs::write(&path, b"second").unwrap();
    assert_eq!(read().unwrap().output, b"second");
    fs::remove_file(&path).unwrap();
    for _ in 0..10 {
        assert!(matches!(read(), Err(ExecuteError::Io { .. })));
    }
    fs::write(&path, b"third").unwrap();
    assert_eq!(read().unwrap().output, b"third");
}
