//! Activation and going back, with slots on a real disk, while requests are decided.
//!
//! From the bytes of a signed package to the switch: signatures, compilation, the bundle's own checks, durable slots.
//! Not in it: the child process that compiles a bundle before the node does, and the proof of the widening gate, which
//! `proof.rs` measures.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tidelock_interceptor::{Action, Caller};
use tidelock_policy::{
    AsideCause, BundleBuilder, LoadContext, Package, PolicyRequest, SlotStorage, Slots, Source,
    TrustFile, Verdict, VerifiedBundle, testing::Authority,
};
use tidelock_segments::{Charge, RealDisk, Root, RootOptions};

use crate::{
    Row, median,
    policy::{FEW, SCHEMA, requests, rules},
};

const DRILLS: u64 = 40;
/// Between two of them, so that the disk does not decide the next one.
const PAUSE: Duration = Duration::from_millis(20);
const NODE_VERSION: &str = "0.1.0";
const CREATED_UNIX_MS: u64 = 1_789_948_800_000;

/// Ends the requests when it goes, in whatever way.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct DiskSlots(Arc<Root>);

impl SlotStorage for DiskSlots {
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>> {
        self.0
            .read(&format!("policy/{slot}"))
            .map_err(io::Error::other)
    }

    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()> {
        self.0
            .write_atomic(&format!("policy/{slot}"), bytes, Charge::Reserve)
            .map_err(io::Error::other)
    }
}

fn archive(epoch: u64) -> Vec<u8> {
    let manifest = json!({
        "format": 1, "name": "bench", "domain": "harbour", "epoch": epoch, "version": "1.0.0",
        "engine": "cedar", "min_node_version": NODE_VERSION, "created_at": "2026-09-21T00:00:00Z",
        "min_fallback_epoch": 1,
        "classes": {"all": {"actions": ["fs.read"], "stale_after_s": 1000, "restrict_after_s": 2000,
                            "close_after_s": 3000, "when_restricted": "continue"}},
        "files": {},
    });
    BundleBuilder::new()
        .file("manifest.json", manifest.to_string().into_bytes())
        .file("schema.cedarschema", SCHEMA.into())
        .file("policies/all.cedar", rules(FEW).into_bytes())
        .build()
        .expect("an archive")
}

/// One request as a node decides it, without its record. Answers the epoch that decided.
fn decide(slots: &Slots, bytes: &[u8], allowed: bool, caller: &Caller) -> (u64, Source) {
    let action = Action::parse(bytes, caller).expect("an action");
    let policy = slots.current().expect("a policy");
    let posture = policy.posture(action.name(), CREATED_UNIX_MS);
    assert_ne!(posture, tidelock_policy::Posture::Closed);
    let evaluation = policy.engine().evaluate(&PolicyRequest::from(&action));
    let text = "answers are checked while they are timed";
    assert_eq!(evaluation.verdict == Verdict::Permit, allowed, "{text}");
    (policy.bundle().epoch(), policy.source())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

pub fn rows() -> Vec<Row> {
    let dir = tempfile::tempdir().expect("a directory");
    let options = RootOptions {
        ceiling_bytes: 64 << 20,
        reserve_bytes: 16 << 20,
    };
    let root = Root::open(Arc::new(RealDisk), dir.path(), options).expect("a root");
    let authority = Authority::new("harbour", 1).expect("an authority");
    let trust = TrustFile::parse(&authority.trust_toml(1)).expect("a trust file");
    let context = LoadContext::new("harbour", NODE_VERSION).expect("a context");
    let load = |package: Package| VerifiedBundle::load(package, &trust, &context);
    let package = |epoch: u64| {
        let signed = authority.sign(archive(epoch), &[0]).expect("a signature");
        signed.encode().expect("a package")
    };
    let (slots, _) = Slots::open(Arc::new(DiskSlots(root)), &trust, &context);
    let activate = |bytes: &[u8]| {
        let bundle = Package::decode(bytes).and_then(load).expect("a bundle");
        slots.activate(bundle).expect("an activation");
        // As a node does it when the self-check has passed: else it is nothing to go back to.
        slots.settle().expect("a settled bundle");
    };
    activate(&package(1));
    let caller = Caller {
        principal_type: "Service".into(),
        principal_id: "bench".into(),
        may_act_as: true,
        door: "bench",
        stated_by: None,
    };
    let all = requests(FEW);
    // The longest request since it was last read, in nanoseconds.
    let (longest, ends) = (AtomicU64::new(0), AtomicBool::new(false));
    let (mut activated, mut back, mut delayed, mut quiet) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        // A drill that fails ends the requests too.
        let stop = Stop(&ends);
        scope.spawn(|| {
            for (bytes, allowed) in all.iter().cycle() {
                if ends.load(Ordering::Relaxed) {
                    break;
                }
                let begun = Instant::now();
                decide(&slots, bytes, *allowed, &caller);
                let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
                longest.fetch_max(took, Ordering::Relaxed);
            }
        });
        let take = || {
            let nanoseconds = u32::try_from(longest.swap(0, Ordering::Relaxed)).unwrap_or(u32::MAX);
            f64::from(nanoseconds) / 1e6
        };
        for drill in 0..DRILLS {
            let next = package(drill + 2);
            std::thread::sleep(PAUSE);
            quiet.push(take());
            let begun = Instant::now();
            activate(&next);
            activated.push(ms(begun));
            delayed.push(take());
            std::thread::sleep(PAUSE);
            take();
            let begun = Instant::now();
            slots
                .set_aside_by(AsideCause::Operator, "a drill", CREATED_UNIX_MS, &load)
                .expect("a way back");
            let (bytes, allowed) = &all[0];
            let (epoch, source) = decide(&slots, bytes, *allowed, &caller);
            back.push(ms(begun));
            delayed.push(take());
            assert_eq!((epoch, source), (drill + 1, Source::LastKnownGood));
            // Forward again, so that the next drill has something to go back from.
            let aside = Package::decode(&next).and_then(load).expect("a bundle");
            slots.reinstate(aside).expect("an activation");
            slots.settle().expect("a settled bundle");
        }
        drop(stop);
    });
    let worst = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
    let (longest_delay, longest_quiet) = (worst(&delayed), worst(&quiet));
    let (activation, rollback) = (median(activated), median(back));
    vec![
        Row::absolute(
            "activate-100",
            "ms p50",
            activation,
            None,
            "<= 50 ms",
            activation <= 50.0,
        ),
        Row::absolute(
            "switch-delay",
            "ms max",
            longest_delay,
            None,
            "<= 5 ms",
            longest_delay <= 5.0,
        )
        .with(json!({"without_a_switch_ms": longest_quiet})),
        Row::absolute(
            "rollback-drill",
            "ms p50",
            rollback,
            None,
            "<= 50 ms",
            rollback <= 50.0,
        ),
    ]
}
