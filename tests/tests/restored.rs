//! A node's root is put back to an older copy in its very place, as a file system's snapshot does it.
//! Nothing on its own disk tells; what its peer holds does (rulings 7 and 8). Real processes on
//! loopback.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tidelock::demo::{
    network::{Loopback, Network as _},
    site::{DOMAIN, Site},
};
use tidelock_segments::{
    AuditLog, Charge, DomainId, LogConfig, NodeId, RealDisk, Root, RootOptions, SealOptions, Store,
    VerifiedSegment,
    testing::{SimDisk, unchecked_endorsement},
};
use tidelock_tests::site::{LIMIT, ask, directory, events, good, install, running, seal};

const PAIR: [&str; 2] = ["a", "b"];

/// Copies what lies below `from`, but for the lock, whose inode marks the place.
fn copy_root(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_root(&entry.path(), &target);
        } else if entry.file_name() != "lock" {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Puts the copy back in the very place of `root`.
fn put_back(copy: &Path, root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else if entry.file_name() != "lock" {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    copy_root(copy, root);
}

fn text(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

/// The newest sequence that a node holds of a log.
fn newest(status: &Value, origin: &str) -> Option<u64> {
    let ranges = status.get("store")?.get("audit")?.get(origin)?;
    ranges.get("ranges")?.as_array()?.last()?.get(1)?.as_u64()
}

/// An allowed action at a node, found again by its path.
async fn read_file(site: &Site<'_>, id: &str, path: &str) {
    assert_eq!(ask(site, id, path).await, 200);
}

async fn status(site: &Site<'_>, id: &str) -> Value {
    site.node(id).unwrap().status().await.unwrap()
}

/// Waits until what `a` has sealed is held and receipted by `b`.
async fn held_by_b(site: &Site<'_>) {
    site.node("a")
        .unwrap()
        .await_status("receipts for all that is sealed", LIMIT, |s| {
            s.pointer("/audit/unlicensed_segments") == Some(&json!(0))
        })
        .await
        .unwrap();
}

/// Two nodes, of which `a` has a first segment that `b` holds.
async fn pair<'n>(dir: &Path, network: &'n Loopback) -> Site<'n> {
    let site = running(dir, network, &PAIR).await;
    install(&site, "a", 1).await;
    read_file(&site, "a", "/srv/app/src/before.rs").await;
    seal(&site, "a").await;
    held_by_b(&site).await;
    site
}

/// Such a pair, of which `a` is stopped and its root copied; the name of its log.
async fn pair_and_copy<'n>(dir: &Path, copy: &Path, network: &'n Loopback) -> (Site<'n>, String) {
    let mut site = pair(dir, network).await;
    let log = text(&status(&site, "a").await, "/audit/origin");
    good(site.kill("a"));
    copy_root(&site.node("a").unwrap().root(), copy);
    (site, log)
}

/// Every file of the quarantine of a node, one after the other.
fn quarantine(root: &Path) -> Vec<u8> {
    let Ok(entries) = fs::read_dir(root.join("quarantine")) else {
        return Vec::new();
    };
    entries
        .flat_map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect()
}

fn holds(bytes: &[u8], needle: &str) -> bool {
    bytes
        .windows(needle.len())
        .any(|part| part == needle.as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_17_a_root_put_back_in_place_fetches_its_later_head_and_begins_the_next_incarnation() {
    let dir = directory();
    let copy = dir.path().join("copy");
    let network = Loopback::new(&PAIR).await.unwrap();
    let (mut site, old) = pair_and_copy(dir.path(), &copy, &network).await;

    // What the copy will not know.
    good(site.start("a").await);
    for path in ["/srv/app/src/forgotten_1.rs", "/srv/app/src/forgotten_2.rs"] {
        read_file(&site, "a", path).await;
        seal(&site, "a").await;
    }
    held_by_b(&site).await;
    let later = newest(&status(&site, "b").await, &old).unwrap();
    good(site.kill("a"));
    put_back(&copy, &site.node("a").unwrap().root());

    // Dark, it goes on in its old log: sealed in a place that the peer knows otherwise, and not sealed.
    network.cut("a").unwrap();
    good(site.start("a").await);
    let restored = status(&site, "a").await;
    assert_eq!(text(&restored, "/audit/origin"), old, "nothing here tells");
    assert!(newest(&restored, &old) < Some(later));
    read_file(&site, "a", "/srv/app/src/dark_sealed.rs").await;
    seal(&site, "a").await;
    read_file(&site, "a", "/srv/app/src/dark_unsealed.rs").await;
    let dark = status(&site, "a").await;
    assert_eq!(dark.pointer("/audit/superseded"), Some(&json!(false)));

    network.heal("a").unwrap();
    let a = site.node("a").unwrap();
    let next = a
        .await_status("the next incarnation", LIMIT, |s| {
            text(s, "/audit/origin") != old && newest(s, &old) >= Some(later)
        })
        .await
        .unwrap();
    let origin = text(&next, "/audit/origin");
    assert!(origin.ends_with("/2"), "{origin}");
    assert_eq!(events(&site, "a", "own_log_superseded").await.len(), 1);
    assert_eq!(events(&site, "a", "own_log_succeeded").await.len(), 1);

    // The first record names the head that the peer holds, and where the rest was put.
    let tail = a.operate("audit.tail", &json!({})).await.unwrap();
    let first = tail.pointer("/records/0/record").unwrap();
    assert_eq!(text(first, "/type"), "incarnation");
    let head = head_at(&site, "b", &old, later).await;
    assert_eq!(first.pointer("/previous_head"), Some(&head));
    let aside = first.pointer("/quarantined").and_then(Value::as_array);
    assert!(aside.unwrap().len() >= 2, "{first}");
    let kept = quarantine(&a.root());
    assert!(holds(&kept, "/srv/app/src/dark_unsealed.rs"));

    // It is a log like any other to the peer, which has nothing to report.
    read_file(&site, "a", "/srv/app/src/after.rs").await;
    seal(&site, "a").await;
    held_by_b(&site).await;
    assert!(newest(&status(&site, "b").await, &origin).is_some());
    for kind in ["audit_fork", "audit_fork_suspected", "segment_refused"] {
        assert_eq!(events(&site, "b", kind).await, Vec::<Value>::new());
    }
    for id in PAIR {
        let (ok, report) = good(site.tidelock(id, &["audit", "verify"]).await);
        assert!(ok, "{id}: {report}");
    }
}

/// The head at the end of a segment that a node holds, as its own tools show it.
async fn head_at(site: &Site<'_>, id: &str, origin: &str, sequence: u64) -> Value {
    let (_, report) = good(
        site.tidelock(id, &["segment", "ls", "--origin", origin])
            .await,
    );
    let segments = report.pointer("/segments").and_then(Value::as_array);
    let found = segments
        .unwrap()
        .iter()
        .find(|segment| segment.pointer("/sequence") == Some(&json!(sequence)));
    let name = text(found.unwrap(), "/id");
    let (_, shown) = good(site.tidelock(id, &["segment", "show", &name]).await);
    let last = shown.pointer("/last").and_then(Value::as_u64).unwrap();
    json!({"origin": origin, "root": text(&shown, "/root"), "size": last + 1})
}

/// Audit of this node's name under a key that it never had.
fn forged() -> Vec<VerifiedSegment> {
    let options = RootOptions {
        ceiling_bytes: 1 << 30,
        reserve_bytes: 64 << 20,
    };
    let domain = DomainId::new(DOMAIN).unwrap();
    let root = Root::open(SimDisk::new().disk(), Path::new("/sim/root"), options).unwrap();
    let store = Store::open(Arc::clone(&root), domain.clone()).unwrap();
    let a = NodeId::new("a").unwrap();
    let config = LogConfig {
        domain,
        node_id: a.clone(),
        segment_bytes: tidelock_segments::limits::MIN_LOG_FILE_BYTES,
        segment_max_age_ms: 3_600_000,
        custody_required: 1,
        archives: std::collections::BTreeSet::new(),
        overwrite_oldest: false,
        min_retention_ms: 0,
        clock: Arc::new(|| 1_700_000_000_000),
        seal: SealOptions::default(),
    };
    let (log, _) = AuditLog::open(root, Arc::clone(&store), config, &|key, incarnation| {
        Ok(unchecked_endorsement(&a, key, incarnation))
    })
    .unwrap();
    let sealed = (0..4).map(|_| log.seal_now().unwrap());
    sealed
        .flatten()
        .map(|reference| store.get(&reference.id).unwrap())
        .collect()
}

/// The controls: a root put back of which no peer knows more, and a peer that shows a log of the node's
/// name which is not its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_put_back_of_which_no_peer_knows_more_goes_on_and_a_forged_log_changes_nothing() {
    let dir = directory();
    let copy = dir.path().join("copy");
    let network = Loopback::new(&PAIR).await.unwrap();
    let (mut site, old) = pair_and_copy(dir.path(), &copy, &network).await;
    network.cut("a").unwrap();
    good(site.start("a").await);
    read_file(&site, "a", "/srv/app/src/seen_by_nobody.rs").await;
    seal(&site, "a").await;
    good(site.kill("a"));
    put_back(&copy, &site.node("a").unwrap().root());

    good(site.kill("b"));
    let forged = forged();
    assert!(!forged.is_empty());
    {
        let options = RootOptions {
            ceiling_bytes: tidelock::demo::site::CEILING_BYTES,
            reserve_bytes: 6 << 20,
        };
        let root = Root::open(Arc::new(RealDisk), &site.node("b").unwrap().root(), options);
        let store = Store::open(root.unwrap(), DomainId::new(DOMAIN).unwrap()).unwrap();
        store.set_own_node(&NodeId::new("b").unwrap());
        for segment in &forged {
            store.put(segment, Charge::Custody).unwrap();
        }
    }
    good(site.start("b").await);

    network.heal("a").unwrap();
    good(site.start("a").await);
    read_file(&site, "a", "/srv/app/src/after.rs").await;
    seal(&site, "a").await;
    held_by_b(&site).await;
    let after = status(&site, "a").await;
    assert_eq!(text(&after, "/audit/origin"), old);
    assert_eq!(after.pointer("/audit/superseded"), Some(&json!(false)));
    for kind in ["own_log_ahead", "own_log_superseded", "segment_requested"] {
        assert_eq!(events(&site, "a", kind).await, Vec::<Value>::new());
    }
    let shown = forged.first().unwrap().header().origin.to_string();
    assert!(newest(&status(&site, "b").await, &shown).is_some());
    assert_eq!(newest(&after, &shown), None);
}

/// The story: damage was fetched again at the next contact only. Here both segments lie damaged on
/// one node, its own and its peer's, and the session never ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_found_damaged_is_fetched_again_on_the_live_session() {
    let dir = directory();
    let network = Loopback::new(&PAIR).await.unwrap();
    let site = pair(dir.path(), &network).await;
    seal(&site, "b").await;
    let b = site.node("b").unwrap();
    b.await_status("a receipt of a", LIMIT, |s| {
        s.pointer("/audit/unlicensed_segments") == Some(&json!(0))
    })
    .await
    .unwrap();
    let sessions = events(&site, "b", "session_established").await.len();
    let files: Vec<_> = fs::read_dir(b.root().join("segments/audit"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "seg"))
        .map(|path| (fs::read(&path).unwrap(), path))
        .collect();
    assert!(files.len() >= 2);
    for (sound, path) in &files {
        let mut damaged = sound.clone();
        if let Some(byte) = damaged.get_mut(sound.len() / 2) {
            *byte ^= 1;
        }
        fs::write(path, damaged).unwrap();
    }
    let sound = |(sound, path): &(Vec<u8>, PathBuf)| fs::read(path).is_ok_and(|f| f == *sound);
    let begun = Instant::now();
    while !files.iter().all(sound) {
        assert!(begun.elapsed() < LIMIT, "{}", b.status().await.unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let found = events(&site, "b", "segment_damaged").await;
    assert_eq!(found.len(), files.len(), "{found:?}");
    let own = events(&site, "b", "own_segment_restored").await;
    assert_eq!(own.len(), 1, "{own:?}");
    assert_eq!(
        events(&site, "b", "session_established").await.len(),
        sessions,
        "the session is the one of before"
    );
    let after = b.status().await.unwrap();
    assert!(text(&after, "/audit/origin").ends_with("/1"));
    assert_eq!(after.pointer("/audit/superseded"), Some(&json!(false)));
}
