//! Every decoder of the workspace that reads bytes from outside or from disk, over a corpus in
//! `tests/corpus/` and over what a seeded generator makes of it (`tidelock_tests::fuzz`).
//!
//! `cargo test` takes at most ten seconds and goes through the same inputs in the same order, as far as it
//! comes; `just fuzz MINUTES` takes longer, with a seed of its own that it prints. `TIDELOCK_FUZZ_SEED`,
//! `TIDELOCK_FUZZ_DECODER` and `TIDELOCK_FUZZ_INPUT` (one file) narrow it down.
//!
//! The decoders run in a process of their own, which this one starts: one that overflows its stack ends
//! that process, and what it was decoding is kept as if it had panicked.
//!
//! A new decoder is one line in [`decoders`] (or in `tidelock_segments::decoders::all`) and a
//! directory with at least one `good-…` file.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{
    collections::BTreeSet,
    env, fs,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    hint::black_box,
    net::Ipv4Addr,
    path::Path,
    process::{Command, ExitStatus},
    time::Duration,
};

use tidelock::config::Config;
use tidelock_interceptor::{Action, Caller};
use tidelock_link::Random;
use tidelock_policy::{Freshness, Package, SignedDocument, TrustFile, decode_signature, inspect};
use tidelock_segments::{
    DomainId, Endorsement,
    decoders::{self, Decoder, Verdict},
};
use tidelock_tests::fuzz::{self, UnderWay};
use tidelock_transport::{
    beacon::{BEACON_KEY_BYTES, BeaconKey},
    endorse::verify_endorsement,
    frame::{Channel, Frame, FrameHeader},
    identity::IdentityRules,
    limits::FRAME_HEADER_BYTES,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl, crls_in_file},
    verifier::Trust,
};

/// How long `cargo test` spends on all decoders together, in the development profile.
const SHORT: Duration = Duration::from_secs(10);
/// And how many inputs each of them sees at most then.
const SHORT_INPUTS: u64 = 20_000;
/// What all decoders together may have claimed of the address space for lengths that they only read
/// of: twice the largest segment.
const CLAIMED_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A minute after the corpus's certificates were issued.
const ISSUED_UNIX_MS: u64 = 1_763_600_060_000;

/// Every decoder of the workspace.
fn decoders() -> Vec<Decoder> {
    let mut all = decoders::all();
    all.extend([
        Decoder::new("frame-control", |bytes| frame(Channel::Control, bytes)),
        Decoder::new("frame-data", |bytes| frame(Channel::Data, bytes)),
        Decoder::new("beacon", beacon),
        Decoder::new("chain", chain),
        Decoder::new("crl", crl),
        Decoder::new("crl-file", |bytes| taken(crls_in_file(bytes))),
        Decoder::new("ca-file", |bytes| taken(Trust::from_pem(bytes))),
        Decoder::new("policy-package", policy_package),
        Decoder::new("policy-bundle", policy_bundle),
        Decoder::new("policy-document", |bytes| {
            let signed = SignedDocument::decode(bytes).ok();
            Verdict::exact(signed.and_then(|signed| signed.encode().ok()))
        }),
        Decoder::new("policy-statement", |bytes| {
            let trust = TrustFile::from_document(bytes).ok();
            let trust = trust.and_then(|trust| trust.document().ok());
            let freshness = || Freshness::read(bytes).ok()?.document().ok();
            Verdict::exact(trust.or_else(freshness))
        }),
        Decoder::new("policy-signature", |bytes| taken(decode_signature(bytes))),
        Decoder::new("policy-trust", |bytes| {
            text(bytes, |t| taken(TrustFile::parse(t)))
        }),
        Decoder::new("action", action),
        Decoder::new("config", |bytes| {
            text(bytes, |t| {
                taken(Config::parse(t, Path::new("/etc/tidelock")))
            })
        }),
    ]);
    all
}

fn taken<T, E>(result: Result<T, E>) -> Verdict {
    result.map_or(Verdict::Refused, |_| Verdict::Taken)
}

fn text(bytes: &[u8], read: impl FnOnce(&str) -> Verdict) -> Verdict {
    std::str::from_utf8(bytes).map_or(Verdict::Refused, read)
}

fn frame(channel: Channel, bytes: &[u8]) -> Verdict {
    let read = || {
        let (head, body) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>()?;
        let header = FrameHeader::decode(channel, *head).ok()?;
        Frame::decode_body(header, body).ok()?.encode().ok()
    };
    Verdict::exact(read())
}

/// A packet of the group, under the key, at the time and from the address of the first vector.
fn beacon(bytes: &[u8]) -> Verdict {
    let mut key = [0; BEACON_KEY_BYTES];
    for (at, byte) in (0..).zip(&mut key) {
        *byte = at;
    }
    let key = BeaconKey::new(&key);
    let (source, unix_ms) = (Ipv4Addr::new(10, 0, 0, 2), 1_906_502_400_000);
    let opened = key.open(bytes, source, unix_ms);
    Verdict::exact(opened.map(|(nonce, port)| key.beacon(unix_ms, source, &nonce, port).to_vec()))
}

/// The authority whose certificate lies in the corpus.
fn authority() -> Trust {
    let pem = fs::read(fuzz::corpus_dir("ca-file").join("good-ca.crt")).unwrap();
    Trust::from_pem(&pem).unwrap()
}

/// The certificates and the signature of an endorsement, as a peer's Hello or segment brings them.
fn chain(bytes: &[u8]) -> Verdict {
    let Ok(endorsement) = Endorsement::decode(bytes) else {
        return Verdict::Refused;
    };
    let rules = IdentityRules {
        domain: DomainId::new("site").unwrap(),
        allow_without_domain: true,
    };
    let revocation = Revocation::new(RevocationState::new(RevocationOptions {
        grace_ms: 0,
        allow_missing: true,
    }));
    taken(verify_endorsement(
        &endorsement,
        &authority(),
        &revocation,
        &rules,
        ISSUED_UNIX_MS,
        ISSUED_UNIX_MS,
    ))
}

fn crl(bytes: &[u8]) -> Verdict {
    let crl = VerifiedCrl::verify(bytes, &authority()).ok();
    Verdict::exact(crl.map(|crl| crl.der().to_vec()))
}

fn policy_package(bytes: &[u8]) -> Verdict {
    let package = Package::decode(bytes).ok();
    Verdict::exact(package.and_then(|package| package.encode().ok()))
}

/// The archive inside a package, without its signatures.
fn policy_bundle(bytes: &[u8]) -> Verdict {
    taken(inspect(&Package {
        archive: bytes.to_vec(),
        signatures: Vec::new(),
    }))
}

fn action(bytes: &[u8]) -> Verdict {
    let caller = Caller {
        principal_type: "agent".to_owned(),
        principal_id: "fuzz".to_owned(),
        may_act_as: true,
        door: "tcp",
        stated_by: None,
    };
    Action::parse(bytes, &caller).map_or(Verdict::Refused, |action| {
        Verdict::Normal(action.canonical().to_vec())
    })
}

fn setting(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn chosen() -> Vec<Decoder> {
    let only = setting("TIDELOCK_FUZZ_DECODER");
    let all = decoders();
    let chosen: Vec<Decoder> = all
        .into_iter()
        .filter(|decoder| only.as_deref().is_none_or(|name| name == decoder.name))
        .collect();
    assert!(!chosen.is_empty(), "no decoder is called {only:?}");
    chosen
}

/// The most that this process has ever had of the address space; `None` where nobody says.
fn address_space_peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmPeak:"))?;
    let kib: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Where a process that this one starts notes what it decodes.
const UNDER_WAY: &str = "TIDELOCK_FUZZ_UNDER_WAY";

/// Runs one test of this file again in a process of its own; gives its end, and the decoder and input
/// that it was at if it did not come back from there.
fn in_a_child(test: &str) -> (ExitStatus, Option<(String, Vec<u8>)>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("input");
    let status = Command::new(env::current_exe().unwrap())
        .args(["--exact", "--nocapture", test])
        .env(UNDER_WAY, &path)
        .status()
        .unwrap();
    let left = UnderWay::left(&path).unwrap();
    (status, left)
}

/// This process's note of what it decodes; nothing in the process that starts it.
fn under_way() -> Option<UnderWay> {
    setting(UNDER_WAY).map(|path| UnderWay::at(Path::new(&path)).unwrap())
}

#[test]
fn inv_07_no_decoder_panics_trusts_a_length_or_takes_two_spellings() {
    if let Some(path) = setting("TIDELOCK_FUZZ_INPUT") {
        let bytes = fs::read(&path).unwrap();
        for decoder in chosen() {
            println!("{}: {:?}", decoder.name, fuzz::check(&decoder, &bytes));
        }
        return;
    }
    let Some(under_way) = under_way() else {
        let test = "inv_07_no_decoder_panics_trusts_a_length_or_takes_two_spellings";
        let (status, left) = in_a_child(test);
        if let Some((decoder, input)) = left {
            let again = fuzz::keep(&decoder, &input).unwrap();
            panic!("{decoder}: it ends the process with {status}; see it again: {again}");
        }
        assert!(status.success(), "{status}; what is wrong is told above");
        return;
    };
    // The corpus as it is: what must be taken is taken, what must be refused is refused.
    for decoder in chosen() {
        let files = fuzz::corpus(decoder.name)
            .unwrap_or_else(|error| panic!("no corpus of {}: {error}", decoder.name));
        let mut good = 0;
        for (name, bytes) in &files {
            let verdict = under_way.check(&decoder, bytes);
            let verdict =
                verdict.unwrap_or_else(|fault| panic!("{}/{name}: {fault}", decoder.name));
            let refused = verdict == Verdict::Refused;
            assert!(
                !name.starts_with("good-") || !refused,
                "{}/{name} is refused",
                decoder.name
            );
            assert!(
                !name.starts_with("bad-") || refused,
                "{}/{name} is taken",
                decoder.name
            );
            good += usize::from(name.starts_with("good-"));
        }
        assert!(good > 0, "{} has no good input", decoder.name);
    }
    let minutes: Option<u64> = setting("TIDELOCK_FUZZ_MINUTES").map(|text| text.parse().unwrap());
    let (time, most) = match minutes {
        Some(minutes) => (Duration::from_secs(60 * minutes), u64::MAX),
        None => (SHORT, SHORT_INPUTS),
    };
    let seed = setting("TIDELOCK_FUZZ_SEED").map_or_else(
        || minutes.map_or(1, |_| RandomState::new().build_hasher().finish()),
        |text| text.parse().unwrap(),
    );
    println!("seed {seed}");
    let chosen = chosen();
    let before = address_space_peak_bytes();
    let mut faults = Vec::new();
    let share = time / u32::try_from(chosen.len()).unwrap();
    for decoder in &chosen {
        let report = fuzz::run(decoder, seed, share, most, &under_way).unwrap();
        println!(
            "{}: {} tried, {} taken",
            decoder.name, report.tried, report.taken
        );
        faults.extend(report.faults);
    }
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n"));
    // INV-07: no length was believed before the bytes were there.
    let Some((before, after)) = before.zip(address_space_peak_bytes()) else {
        println!("claimed memory: not run, nobody tells the address space here");
        return;
    };
    let claimed = after.saturating_sub(before);
    assert!(
        claimed <= CLAIMED_BYTES_MAX,
        "seed {seed}: {claimed} bytes claimed"
    );
    // The control: such a claim shows, though not a byte of it is written.
    let length = usize::try_from(before + CLAIMED_BYTES_MAX).unwrap();
    let claim: Vec<u8> = black_box(Vec::with_capacity(length));
    let shown = address_space_peak_bytes().unwrap().saturating_sub(before);
    assert!(shown > CLAIMED_BYTES_MAX, "{shown}");
    drop(claim);
}

#[test]
fn every_corpus_has_its_decoder() {
    let known: BTreeSet<&str> = decoders().iter().map(|decoder| decoder.name).collect();
    for entry in fs::read_dir(fuzz::corpus_dir("")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let found = known.contains(name.as_str()) || !entry.path().is_dir();
        assert!(found, "tests/corpus/{name} belongs to no decoder");
    }
}

#[test]
fn the_harness_sees_a_panic_and_a_second_spelling() {
    let panics = Decoder::new("panics", |bytes| match bytes {
        [_, 1, ..] => panic!("on purpose"),
        _ => Verdict::Refused,
    });
    assert_eq!(fuzz::check(&panics, b"ab"), Ok(Verdict::Refused));
    assert!(fuzz::check(&panics, &[0, 1]).is_err());
    let trims = Decoder::new("trims", |bytes| Verdict::Exact(bytes.trim_ascii().to_vec()));
    assert!(fuzz::check(&trims, b"ab").is_ok());
    assert!(fuzz::check(&trims, b"ab ").is_err());
    let grows = Decoder::new("grows", |bytes| Verdict::Normal([bytes, b"x"].concat()));
    assert!(fuzz::check(&grows, b"ab").is_err());
    // One seed, one course; and it reaches what is one change away.
    let corpus = [vec![0, 0, 1, 2]];
    let inputs = |seed| {
        let mut random = Random::new(seed);
        (0..2000)
            .map(|_| fuzz::mutate(&mut random, &corpus))
            .collect::<Vec<_>>()
    };
    assert_eq!(inputs(3), inputs(3));
    assert_ne!(inputs(3), inputs(4));
    assert!(
        inputs(3)
            .iter()
            .any(|bytes| fuzz::check(&panics, bytes).is_err())
    );
}

/// Never comes back in practice: each call waits for the next, deeper one.
fn sink(bytes: &[u8], depth: u64) -> u64 {
    if depth == u64::MAX {
        return 0;
    }
    let held = black_box([depth; 64]);
    let deeper = sink(black_box(bytes), black_box(depth) + 1);
    held.iter()
        .fold(deeper, |sum, word| sum.wrapping_add(*word))
}

#[test]
fn a_decoder_that_overflows_its_stack_leaves_its_input() {
    let Some(under_way) = under_way() else {
        let (status, left) = in_a_child("a_decoder_that_overflows_its_stack_leaves_its_input");
        assert!(!status.success());
        assert_eq!(
            left,
            Some(("sinks".to_owned(), b"deep\nand deeper".to_vec()))
        );
        return;
    };
    let sinks = Decoder::new("sinks", |bytes| match bytes {
        [b'd', ..] => Verdict::Normal(sink(bytes, 0).to_le_bytes().to_vec()),
        _ => Verdict::Refused,
    });
    // The control: what comes back leaves nothing.
    assert_eq!(under_way.check(&sinks, b"shallow"), Ok(Verdict::Refused));
    let path = setting(UNDER_WAY).unwrap();
    assert_eq!(UnderWay::left(Path::new(&path)).unwrap(), None);
    let came_back = under_way.check(&sinks, b"deep\nand deeper");
    unreachable!("{came_back:?}");
}
