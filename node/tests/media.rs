//! Removable media: what one node exports another takes in, without a wire between them, and nothing that a
//! session would refuse comes in by hand.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{DOMAIN, Site, free_udp, until};
use serde_json::{Value, json};
use tidelock_segments::{
    DomainId, SegmentId,
    volume::{EntryMark, VolumeEntry, VolumeHeader, VolumeReader, VolumeWriter},
};

const RECIPIENT: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
const IDENTITY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
/// Of nobody: nothing here is encrypted to it.
const OTHER_IDENTITY: &str =
    "AGE-SECRET-KEY-1UN4U694TUU4GW7LUEQW7PLFXN9LFY78JSGFE9R4XRQ45HG8XQP9QD95XA0";

/// An export to a medium for a node.
fn export_args<'a>(to: &'a str, addressee: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["segment", "export", "--to", to, "--for", addressee];
    [&args[..], more].concat()
}

/// Two nodes that never meet: one config is in force at a time, so one of them can run.
struct Pair {
    site: Site,
}

impl Pair {
    /// `a` has a bundle and `segments` sealed pieces of audit; `b` was started once. Neither runs.
    fn new(segments: usize) -> Self {
        let site = Site::new();
        site.ok(&["ca", "issue", "--dir", "ca", "--node", "b"]);
        let a = site.config().replace("custody = 0", "custody = 1");
        let peer = |id: &str| {
            format!(
                "\n[[mesh.peers]]\nid = \"{id}\"\naddress = \"{}\"\n",
                free_udp()
            )
        };
        let b = a
            .replace("id = \"a\"", "id = \"b\"")
            .replace("\"root\"", "\"root-b\"")
            .replace("\"a.crt", "\"b.crt")
            .replace("\"a.key", "\"b.key")
            .replace("custody = 1", "custody = 0");
        site.write("a.toml", &(a + &peer("b")));
        site.write("b.toml", &(b + &peer("a")));
        for medium in ["m", "back"] {
            fs::create_dir(site.path(medium)).unwrap();
        }
        let pair = Self { site };
        let node = pair.be("b").start();
        assert!(node.stop().success());
        let node = pair.be("a").start_deciding();
        for n in 0..segments {
            pair.site.may_read(&format!("/srv/{n}.txt"));
            pair.site.operate("audit.seal");
        }
        assert!(node.stop().success());
        pair
    }

    fn be(&self, node: &str) -> &Site {
        let config = self.site.read(&format!("{node}.toml"));
        self.site.write("tidelock.toml", &config);
        &self.site
    }

    /// `a` writes everything to `m` for `b`, in several volumes; their names.
    fn export(&self, more: &[&str]) -> Vec<String> {
        self.export_of("8KiB", more)
    }

    /// As [`Pair::export`], in volumes of this size.
    fn export_of(&self, volume: &str, more: &[&str]) -> Vec<String> {
        let more = [&["--volume-bytes", volume], more].concat();
        let answer = self.be("a").json(&export_args("m", "b", &more));
        assert_eq!(
            (&answer["left"], &answer["damaged"]),
            (&json!(0), &json!([]))
        );
        let names = answer["volumes"].as_array().unwrap();
        names
            .iter()
            .map(|n| n.as_str().unwrap().to_owned())
            .collect()
    }

    /// What an import at `b` answers, and how it ended.
    fn import(&self, more: &[&str]) -> (i32, Value) {
        let args = [&["segment", "import", "m", "--json"], more].concat();
        let ran = self.be("b").tidelock(&args);
        (ran.code, ran.json())
    }

    /// The audit of `a` that `b` holds, by sequence.
    fn held(&self) -> BTreeSet<u64> {
        let held = self.be("b").json(&["segment", "ls", "--kind", "audit"]);
        let segments = held["segments"].as_array().unwrap().iter();
        segments
            .filter(|s| s["origin"].as_str().unwrap().starts_with("audit/a/"))
            .map(|s| s["sequence"].as_u64().unwrap())
            .collect()
    }
}

/// How many entries had this fate, of any class.
fn fate(answer: &Value, fate: &str) -> u64 {
    let of = answer["fates"][fate].as_object();
    of.map_or(0, |of| of.values().map(|n| n.as_u64().unwrap()).sum())
}

/// The codes of what was refused.
fn codes(answer: &Value) -> BTreeSet<String> {
    let entries = answer["entries"].as_array().unwrap().iter();
    entries
        .filter(|e| e["fate"] == "refused")
        .map(|e| e["code"].as_str().unwrap().to_owned())
        .collect()
}

/// The codes of what is wrong with the files.
fn faults(answer: &Value) -> String {
    answer["faults"].to_string()
}

fn entries(path: &Path) -> (VolumeHeader, Vec<VolumeEntry>, bool) {
    let bytes = fs::read(path).unwrap();
    let mut reader = VolumeReader::open(bytes.as_slice()).unwrap();
    let mut all = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        all.push(entry);
    }
    (reader.header().clone(), all, reader.is_last().unwrap())
}

fn write(path: &Path, header: &VolumeHeader, entries: &[VolumeEntry], last: bool) {
    let mut writer = VolumeWriter::new(Vec::new(), header).unwrap();
    for entry in entries {
        writer.push(entry).unwrap();
    }
    fs::write(path, writer.finish(last).unwrap()).unwrap();
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

#[test]
fn what_one_node_exports_another_takes_in_and_its_receipts_come_home() {
    let pair = Pair::new(6);
    // Exported while `a` runs.
    let node = pair.be("a").start();
    assert_eq!(pair.site.status()["audit"]["unlicensed_segments"], 6);
    let volumes = pair.export(&[]);
    assert!(volumes.len() > 2, "{volumes:?}");
    assert!(node.stop().success());

    // Taken in by a stopped `b`: first the plan, which takes nothing.
    let (code, plan) = pair.import(&[]);
    assert_eq!((code, &plan["applied"]), (0, &json!(false)), "{plan}");
    assert_eq!(
        fate(&plan, "new"),
        7,
        "a bundle and six pieces of audit: {plan}"
    );
    assert_eq!(pair.held(), BTreeSet::new());
    let (code, taken) = pair.import(&["--apply"]);
    assert_eq!(code, 0, "{taken}");
    assert_eq!(
        (fate(&taken, "new"), fate(&taken, "held")),
        (7, fate(&plan, "held"))
    );
    assert_eq!(pair.held(), (0..6).collect());
    // INV-08: again, and nothing is new.
    let (code, again) = pair.import(&["--apply"]);
    assert_eq!(
        (code, fate(&again, "new"), fate(&again, "refused")),
        (0, 0, 0),
        "{again}"
    );

    // The bundle decides, though `b` met nobody. The acts are in its own log, before what they did.
    let node = pair.be("b").start();
    pair.site.decides();
    let told = pair.site.events("media_imported");
    let new = told.iter().filter_map(|e| e["fates"]["new"].as_u64());
    assert_eq!(new.sum::<u64>(), 7, "{told:?}");
    assert_eq!(pair.site.events("media_import").len(), told.len());

    // The way home, from a running node, with receipts only.
    let export = export_args("back", "a", &["--receipts-only"]);
    let home = pair.site.json(&export);
    assert_eq!(
        (&home["segments"], &home["receipts"]),
        (&json!(0), &json!(6)),
        "{home}"
    );
    let again = pair.site.json(&export);
    assert_eq!(
        (&again["receipts"], &again["volumes"]),
        (&json!(0), &json!([]))
    );
    assert!(node.stop().success());

    // Into a running `a`: the receipts are those that a session would have brought.
    let _node = pair.be("a").start();
    assert_eq!(pair.site.status()["audit"]["unlicensed_segments"], 6);
    let import = ["segment", "import", "back", "--json"];
    let plan = pair.site.ok(&import).json();
    assert_eq!(plan["fates"]["new"]["receipt"], 6, "{plan}");
    assert_eq!(pair.site.status()["audit"]["unlicensed_segments"], 6);
    let taken = pair.site.ok(&[&import[..], &["--apply"]].concat()).json();
    assert_eq!(taken["fates"]["new"]["receipt"], 6, "{taken}");
    assert_eq!(pair.site.status()["audit"]["unlicensed_segments"], 0);
    // What `b` holds now is not carried to it again.
    fs::remove_dir_all(pair.site.path("m")).unwrap();
    fs::create_dir(pair.site.path("m")).unwrap();
    let next = pair.site.json(&export_args("m", "b", &[]));
    assert!(next["known"].as_u64() >= Some(6), "{next}");
    assert!(next["segments"].as_u64() < Some(4), "{next}");
}

#[test]
fn damaged_missing_and_swapped_volumes_are_told_and_the_rest_is_taken() {
    let pair = Pair::new(6);
    let volumes = pair.export(&[]);
    let path = |n: usize| pair.site.path("m").join(&volumes[n]);
    let middle = volumes.len() / 2;
    let whole = fs::read(path(middle)).unwrap();

    fs::write(path(middle), &whole[..whole.len() - 40]).unwrap();
    let (code, torn) = pair.import(&[]);
    assert_eq!(code, 1);
    assert!(faults(&torn).contains("cut off"), "{torn}");
    let mut flipped = whole.clone();
    let at = flipped.len() / 3;
    flipped[at] ^= 4;
    fs::write(path(middle), flipped).unwrap();
    let (code, flipped) = pair.import(&[]);
    assert!(
        code == 1 && faults(&flipped).contains("damaged after"),
        "{flipped}"
    );

    // Missing, and the names of two others swapped: all that is there is taken.
    fs::remove_file(path(middle)).unwrap();
    let other = pair.site.path("other");
    fs::rename(path(0), &other).unwrap();
    fs::rename(path(volumes.len() - 1), path(0)).unwrap();
    fs::rename(&other, path(volumes.len() - 1)).unwrap();
    let (code, missing) = pair.import(&["--apply"]);
    assert!(
        code == 1 && faults(&missing).contains("MISSING_VOLUME"),
        "{missing}"
    );
    assert_eq!(
        (fate(&missing, "refused"), pair.held().len() < 6),
        (0, true),
        "{missing}"
    );

    // It comes with the next trip, and the hole closes.
    fs::write(path(middle), whole).unwrap();
    let (code, all) = pair.import(&["--apply"]);
    assert_eq!((code, faults(&all)), (0, "[]".to_owned()), "{all}");
    assert_eq!(pair.held(), (0..6).collect());
    // Without its last volume an export is not whole either.
    fs::remove_file(path(0)).unwrap();
    let (code, cut) = pair.import(&[]);
    assert!(
        code == 1 && faults(&cut).contains("the last volume"),
        "{cut}"
    );
    pair.site
        .tidelock(&["segment", "import", "nowhere"])
        .ended(2);
}

#[test]
fn what_is_forged_foreign_or_of_another_domain_is_refused_and_the_rest_is_taken() {
    let pair = Pair::new(3);
    let volumes = pair.export_of("1MiB", &[]);
    let path = pair.site.path("m").join(&volumes[0]);
    let (header, good, _) = entries(&path);
    let is_audit = |entry: &&VolumeEntry| matches!(&entry.mark, EntryMark::Segment(r) if r.origin.audit_node().is_some());
    let original = good.iter().find(is_audit).unwrap();
    // A changed segment under its right id, and one under the name of another.
    let mut forged = original.clone();
    let at = forged.bytes.len() / 2;
    forged.bytes[at] ^= 1;
    let EntryMark::Segment(reference) = &mut forged.mark else {
        panic!("no segment");
    };
    reference.id = SegmentId::of(&forged.bytes);
    let mut misnamed = good.iter().rfind(is_audit).unwrap().clone();
    misnamed.mark = original.mark.clone();
    let mut relisted = original.clone();
    if let EntryMark::Segment(reference) = &mut relisted.mark {
        reference.sequence += 9;
    }
    let bad = [&good[..], &[forged, misnamed, relisted]].concat();
    write(&path, &header, &bad, true);
    let (code, taken) = pair.import(&["--apply"]);
    assert_eq!(code, 1, "{taken}");
    assert_eq!(
        codes(&taken),
        ["format", "listed_otherwise"].map(str::to_owned).into(),
        "{taken}"
    );
    assert_eq!(
        (fate(&taken, "refused"), pair.held()),
        (3, (0..3).collect())
    );

    let mut foreign = header.clone();
    foreign.domain = DomainId::new("quarry").unwrap();
    write(&path, &foreign, &good, true);
    let (code, refused) = pair.import(&["--apply"]);
    assert!(
        code == 1 && faults(&refused).contains("WRONG_DOMAIN"),
        "{refused}"
    );
    assert_eq!(refused["entries"], json!([]));
    // The control, and its own log comes home as nothing new.
    write(&path, &header, &good, true);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    let home = pair
        .be("a")
        .ok(&["segment", "import", "m", "--json"])
        .json();
    assert_eq!(
        (fate(&home, "new"), fate(&home, "refused")),
        (0, 0),
        "{home}"
    );
}

#[test]
fn inv_11_a_revocation_on_the_medium_acts_before_the_audit_beside_it() {
    let pair = Pair::new(3);
    pair.export(&[]);
    // The control: the same audit without the revocation is good.
    let (code, plan) = pair.import(&[]);
    assert_eq!((code, fate(&plan, "new")), (0, 4), "{plan}");

    // `a` is revoked; another volume brings the news, in a later export.
    let node = pair.be("a").start();
    pair.site
        .ok(&["ca", "revoke", "--dir", "ca", "a", "--apply"]);
    pair.site.ok(&["ca", "crl", "--dir", "ca"]);
    pair.site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    assert!(node.stop().success());
    let later = pair.export(&[]);
    assert_eq!(later.len(), 1);
    let (code, taken) = pair.import(&["--apply"]);
    assert_eq!(code, 1);
    assert_eq!(taken["fates"]["new"]["revocation"], 1, "{taken}");
    assert_eq!(codes(&taken), ["CERT_REVOKED".to_owned()].into(), "{taken}");
    assert_eq!(pair.held(), BTreeSet::new());
    let classes: Vec<&str> = taken["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["segment"]["kind"].as_str().unwrap())
        .collect();
    let mut sorted = classes.clone();
    sorted.sort_by_key(|kind| {
        ["revocation", "policy", "audit"]
            .iter()
            .position(|k| k == kind)
    });
    assert_eq!(classes, sorted);
    // The refusals are on record, with their codes.
    let _node = pair.be("b").start();
    let told = pair.site.events("media_imported");
    let refused = told
        .iter()
        .find(|e| !e["refused_by_code"]["CERT_REVOKED"].is_null());
    assert_eq!(refused.unwrap()["refused"][0]["code"], "CERT_REVOKED");
}

#[test]
fn a_full_custody_share_refuses_and_room_lets_it_in() {
    let pair = Pair::new(3);
    pair.export(&[]);
    let config = pair.site.read("b.toml");
    // No room at all is seen by the plan; room for a file and not for its place in the index, by the act.
    for (bytes, apply) in [(0, &[][..]), (0, &["--apply"]), (4_096, &["--apply"])] {
        let share = format!("custody = 0\ncustody_max_bytes = {bytes}");
        pair.site
            .write("b.toml", &config.replace("custody = 0", &share));
        let (code, refused) = pair.import(apply);
        assert_eq!(
            (code, codes(&refused)),
            (1, ["CUSTODY_FULL".to_owned()].into()),
            "{refused}"
        );
        // What is not audit needs none of it.
        assert_eq!(
            fate(&refused, "new") + fate(&refused, "held"),
            2,
            "{refused}"
        );
        assert_eq!(pair.held(), BTreeSet::new());
    }
    pair.site.write("b.toml", &config);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    assert_eq!(pair.held(), (0..3).collect());
}

#[test]
fn an_export_that_was_killed_or_had_no_room_is_gone_on_with() {
    let pair = Pair::new(8);
    // Room for some of it only; urgent kinds first.
    let first = pair.be("a").json(&export_args(
        "m",
        "any",
        &["--volume-bytes", "8KiB", "--max-bytes", "20KiB"],
    ));
    assert!(
        first["left"].as_u64() > Some(0) && first["bytes"].as_u64() <= Some(20 << 10),
        "{first}"
    );
    assert!(first["segments"].as_u64() > Some(2), "{first}");
    let written: u64 = names(&pair.site.path("m"))
        .iter()
        .map(|p| p.metadata().unwrap().len())
        .sum();
    assert_eq!(first["bytes"].as_u64(), Some(written));

    // Killed at some moment; whatever it left, the next run goes on.
    let export = export_args("m", "b", &["--volume-bytes", "4KiB"]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidelock"))
        .current_dir(pair.site.path(""))
        .args(&export)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let before = names(&pair.site.path("m")).len();
    until("the export to begin or to end", || {
        let begun = names(&pair.site.path("m")).len() > before;
        (begun || child.try_wait().unwrap().is_some()).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    // And what a kill in the middle of a volume leaves, for certain.
    fs::write(
        pair.site.path("m/tide-0011223344556677-0001.part"),
        b"TIDEVOL1 and then the power went",
    )
    .unwrap();
    let rest = pair.be("a").json(&export);
    assert_eq!(
        (&rest["left"], &rest["damaged_volumes"]),
        (&json!(0), &json!([])),
        "{rest}"
    );
    let left: Vec<PathBuf> = names(&pair.site.path("m"));
    assert!(
        left.iter().all(|p| p.extension().unwrap() == "tvol"),
        "{left:?}"
    );
    let done = pair.be("a").json(&export);
    assert_eq!(
        (&done["segments"], &done["volumes"]),
        (&json!(0), &json!([])),
        "{done}"
    );
    // Each segment went once.
    let mut seen = BTreeSet::new();
    for path in left {
        for entry in entries(&path).1 {
            assert!(
                seen.insert(entry.mark.key()),
                "twice on the medium: {:?}",
                entry.mark
            );
        }
    }
    let (_, taken) = pair.import(&["--apply"]);
    assert_eq!(
        (fate(&taken, "refused"), pair.held()),
        (0, (0..8).collect()),
        "{taken}"
    );
}

#[test]
fn an_encrypted_medium_is_read_with_its_key_only() {
    let pair = Pair::new(2);
    let volumes = pair.export(&["--encrypt-to", RECIPIENT]);
    assert!(
        volumes.iter().all(|name| name.ends_with(".tvol.age")),
        "{volumes:?}"
    );
    let bytes = fs::read(pair.site.path("m").join(&volumes[0])).unwrap();
    let shows = |text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(!shows(DOMAIN) && !shows("TIDEVOL1"));
    // What is there is known without its key, to the same recipients only.
    assert_eq!(pair.export(&["--encrypt-to", RECIPIENT]), [""; 0]);

    let none = |(code, answer): (i32, Value)| {
        assert!(code == 1 && faults(&answer).contains("NO_KEY"), "{answer}");
        assert_eq!(answer["entries"], json!([]));
    };
    none(pair.import(&["--apply"]));
    for (name, key) in [
        ("other.key", OTHER_IDENTITY.to_owned()),
        ("b.agekey", IDENTITY.to_owned()),
    ] {
        pair.site.write(name, &key);
        pair.site
            .tidelock(&["segment", "import", "m", "--key", name])
            .ended(2)
            .says(&["chmod"]);
        common::chmod(&pair.site.path(name), 0o600);
    }
    none(pair.import(&["--key", "other.key", "--apply"]));
    let (code, taken) = pair.import(&["--key", "b.agekey", "--apply"]);
    assert_eq!((code, pair.held()), (0, (0..2).collect()), "{taken}");
}

#[test]
fn a_medium_that_is_not_there_and_a_place_in_the_root_are_refused() {
    let pair = Pair::new(1);
    let export = |to: &str| pair.be("a").tidelock(&export_args(to, "any", &[]));
    export("not-mounted").ended(2).says(&["mount the medium"]);
    export("root").ended(2).says(&["below the node's root"]);
    export("site-1.tar").ended(2).says(&["not a directory"]);
    export("m").ended(0).says(&["segments", "receipts"]);
    let site = pair.be("a");
    for bad in [
        ["--for", "no such node"],
        ["--since", "soon"],
        ["--volume-bytes", "5GiB"],
        ["--encrypt-to", "age1x"],
    ] {
        let args = export_args("m", "any", &[]);
        let args: Vec<&str> = match bad[0] {
            "--for" => [&args[..4], &bad].concat(),
            _ => [&args[..], &bad].concat(),
        };
        site.tidelock(&args).ended(2);
    }
    site.ok(&["segment", "import", "m"])
        .says(&["plan (act with --apply)", "held already"]);
    fs::create_dir(site.path("empty")).unwrap();
    site.tidelock(&["segment", "import", "empty"])
        .ended(2)
        .says(&["no volumes"]);
}

/// Runs the program to its end; one that hangs is killed, and has failed.
#[track_caller]
fn ends(site: &Site, args: &[&str]) -> (i32, String) {
    let out = fs::File::create(site.path("ends.out")).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidelock"))
        .current_dir(site.path(""))
        .args(args)
        .stdin(Stdio::null())
        .stderr(out.try_clone().unwrap())
        .stdout(out)
        .spawn()
        .unwrap();
    let begun = std::time::Instant::now();
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if begun.elapsed() > common::LONG {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("still at it: {args:?}");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    (code.unwrap_or(-1), site.read("ends.out"))
}

/// Whoever had the medium in hand may have put anything there. A pipe once held export and import for ever,
/// a volume that called itself the 4,294,967,295th cost minutes, and a file's name wrote to the terminal.
#[test]
fn what_else_lies_on_a_medium_stops_nothing_and_is_not_touched() {
    let pair = Pair::new(2);
    let volumes = pair.export_of("1MiB", &[]);
    let medium = |name: &str| pair.site.path("m").join(name);
    let status = Command::new("mkfifo")
        .args(["tide-pipe.tvol", "tide-pipe.ids"])
        .current_dir(pair.site.path("m"))
        .status();
    assert!(status.unwrap().success());
    symlink("/dev/zero", medium("tide-zero.tvol")).unwrap();
    symlink(pair.site.path("a.toml"), medium("tide-link.ids")).unwrap();
    symlink(medium(&volumes[0]), medium("tide-alias.tvol")).unwrap();
    fs::create_dir(medium("tide-dir.tvol")).unwrap();
    // Somebody's own, whatever its name.
    fs::write(medium("tide-tables-of-june.part"), "high water").unwrap();
    let loud = std::ffi::OsStr::from_bytes(b"tide-\x1b[2J.tvol");
    fs::write(pair.site.path("m").join(loud), "not a volume").unwrap();
    let (mut header, _, _) = entries(&medium(&volumes[0]));
    header.number = u32::MAX;
    header.export_id = [9; 16];
    write(&medium("tide-many.tvol"), &header, &[], true);

    let export = export_args("m", "b", &[]);
    let (code, told) = ends(pair.be("a"), &export);
    assert_eq!(code, 1, "{told}");
    let import = ["segment", "import", "m", "--apply"];
    let (code, taken) = ends(pair.be("b"), &import);
    assert_eq!(code, 1, "{taken}");
    for told in [&told, &taken] {
        for name in ["tide-pipe.tvol", "tide-zero.tvol", "tide-alias.tvol"] {
            assert!(told.contains(name), "{name}: {told}");
        }
        assert!(!told.contains('\x1b'), "{told:?}");
    }
    assert!(
        taken.contains("4294967294 of the first 4294967295"),
        "{taken}"
    );
    assert_eq!(pair.held(), (0..2).collect());
    assert_eq!(pair.site.read("m/tide-tables-of-june.part"), "high water");
    let (code, told) = ends(&pair.site, &["segment", "import", "m/tide-pipe.tvol"]);
    assert_eq!(code, 1, "{told}");
    // The control: a link that the operator names himself is followed.
    let alias = ["segment", "import", "m/tide-alias.tvol"];
    assert_eq!(ends(&pair.site, &alias).0, 0);
}

/// A found stick, on which somebody had listed what it does not hold, kept a CRL from being written to it.
#[test]
fn what_a_medium_only_claims_to_hold_is_written() {
    let pair = Pair::new(2);
    let volumes = pair.export_of("1MiB", &[]);
    let path = pair.site.path("m").join(&volumes[0]);
    let (header, good, _) = entries(&path);
    let mut lies = good.clone();
    for entry in &mut lies {
        entry.bytes = b"nothing of the kind".to_vec();
    }
    write(&path, &header, &lies, true);
    let again = pair.export_of("1MiB", &[]);
    let (_, written, _) = entries(&pair.site.path("m").join(&again[0]));
    assert_eq!(written, good);

    // Receipts too.
    assert_eq!(pair.import(&["--apply"]).0, 1, "the lies are refused");
    let home = export_args("back", "a", &["--receipts-only"]);
    let answer = pair.be("b").json(&home);
    assert_eq!(answer["receipts"], 2, "{answer}");
    let path = pair
        .site
        .path("back")
        .join(answer["volumes"][0].as_str().unwrap());
    let (header, mut receipts, _) = entries(&path);
    let (one, other) = receipts.split_at_mut(1);
    std::mem::swap(&mut one[0].bytes, &mut other[0].bytes);
    write(&path, &header, &receipts, true);
    // A receipt under the name of another is no receipt.
    let ran = pair
        .be("a")
        .tidelock(&["segment", "import", "back", "--json"]);
    assert_eq!(codes(&ran.json()), ["listed_otherwise".to_owned()].into());
    let again = pair.be("b").json(&home);
    assert_eq!(again["receipts"], 2, "{again}");
    let done = pair.be("b").json(&home);
    assert_eq!(done["receipts"], 0, "the control: {done}");
}

/// An export that was cut short and gone on with left, for ever, the complaint that its last volume is missing.
#[test]
fn an_export_that_was_gone_on_with_is_whole() {
    let pair = Pair::new(6);
    common::chmod(&pair.site.path("m"), 0o755);
    pair.site.write("key", IDENTITY);
    common::chmod(&pair.site.path("key"), 0o600);
    for more in [&[][..], &["--encrypt-to", RECIPIENT]] {
        let volumes = pair.export(more);
        assert!(volumes.len() > 2, "{volumes:?}");
        // As if killed before the last one had its name.
        let last = pair.site.path("m").join(volumes.last().unwrap());
        fs::remove_file(&last).unwrap();
        let list = last.to_str().unwrap().replace(".tvol.age", ".ids");
        assert_eq!(fs::remove_file(list).is_ok(), !more.is_empty());
        let rest = pair.export(more);
        assert_eq!(rest.len(), 1, "{rest:?}");
        let (code, plan) = pair.import(&["--key", "key"]);
        assert_eq!((code, faults(&plan)), (0, "[]".to_owned()), "{plan}");
        assert_eq!(pair.export(more), [""; 0]);
        for path in names(&pair.site.path("m")) {
            // What is on it is as private as the root it comes from.
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}", path.display());
            if more.is_empty() {
                fs::remove_file(path).unwrap();
            }
        }
    }

    // Of an encrypted volume too, damage is told before it travels, and what it held is written again.
    let damaged = names(&pair.site.path("m"))
        .into_iter()
        .find(|path| path.to_str().unwrap().ends_with("0002.tvol.age"))
        .unwrap();
    let mut bytes = fs::read(&damaged).unwrap();
    let at = bytes.len() - 7;
    bytes[at] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let args = export_args("m", "b", &["--encrypt-to", RECIPIENT, "--json"]);
    let ran = pair.be("a").tidelock(&args);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.json()["segments"].as_u64() > Some(0), "{ran:?}");
    let (_, taken) = pair.import(&["--key", "key", "--apply"]);
    assert_eq!(
        (fate(&taken, "refused"), pair.held()),
        (0, (0..6).collect())
    );
}

/// The overhead of encryption and the lists beside the volumes were not counted.
#[test]
fn an_encrypted_export_keeps_within_its_bytes() {
    let pair = Pair::new(8);
    let many: Vec<String> = (0..16_u8)
        .flat_map(|n| ["--encrypt-to".to_owned(), recipient(n)])
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for max in [9_000, 20_000, 30_000_u64] {
        let max_text = max.to_string();
        let more = ["--max-bytes", &max_text, "--volume-bytes", "8KiB"];
        let more = [&more[..], &many].concat();
        let answer = pair.be("a").json(&export_args("m", "b", &more));
        let files = names(&pair.site.path("m"));
        let all: u64 = files.iter().map(|p| p.metadata().unwrap().len()).sum();
        assert!(all <= max, "{all} of {max}: {answer}");
        assert_eq!(answer["bytes"].as_u64(), Some(all), "{answer}");
        assert!(
            answer["left"].as_u64() > Some(0) || max > 20_000,
            "{answer}"
        );
        for path in files {
            fs::remove_file(path).unwrap();
        }
    }
}

/// An `age1…` recipient of nobody: every 32 bytes are one.
fn recipient(n: u8) -> String {
    const CHARSET: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    let bits: Vec<u8> = [n + 9; 32]
        .iter()
        .flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1))
        .chain([0; 4])
        .collect();
    let mut values: Vec<u8> = bits
        .chunks(5)
        .map(|five| five.iter().fold(0, |value, bit| value << 1 | bit))
        .collect();
    let polymod = |values: &[u8]| {
        values.iter().fold(1_u32, |sum, value| {
            let top = sum >> 25;
            let mixed = (sum & 0x01ff_ffff) << 5 ^ u32::from(*value);
            [
                0x3b6a_57b2,
                0x2650_8e6d,
                0x1ea1_19fa,
                0x3d42_33dd,
                0x2a14_62b3,
            ]
            .iter()
            .enumerate()
            .filter(|(bit, _)| top >> bit & 1 == 1)
            .fold(mixed, |sum, (_, constant)| sum ^ constant)
        })
    };
    // "age": its high bits, a zero, its low bits.
    let prefix = [3, 3, 3, 0, 1, 7, 5];
    let sum = polymod(&[&prefix[..], &values, &[0; 6]].concat()) ^ 1;
    values.extend((0..6).map(|n| (sum >> (5 * (5 - n)) & 31) as u8));
    let text: String = values
        .iter()
        .map(|value| char::from(CHARSET[usize::from(*value)]))
        .collect();
    format!("age1{text}")
}

/// `--since` once kept the receipts for older audit at home, and importing again filled the log with records.
#[test]
fn receipts_go_whatever_the_age_and_what_is_held_leaves_no_record() {
    let pair = Pair::new(2);
    pair.export(&[]);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    let home = export_args("back", "a", &["--since", "2099-01-01"]);
    let home = pair.be("b").json(&home);
    assert_eq!(home["receipts"], 2, "{home}");
    let _node = pair.be("b").start();
    let records =
        || pair.site.events("media_import").len() + pair.site.events("media_imported").len();
    let recorded = records();
    assert!(recorded > 0);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    assert_eq!(records(), recorded);
    pair.site
        .tidelock(&export_args("m", "b", &[]))
        .ended(2)
        .says(&["this node itself"]);
}

/// A session ends at its third forged segment. A volume of them is not read to its end either.
#[test]
fn a_volume_full_of_forgeries_is_given_up() {
    let pair = Pair::new(2);
    let volumes = pair.export_of("1MiB", &[]);
    let path = pair.site.path("m").join(&volumes[0]);
    let (header, good, _) = entries(&path);
    let mut forged = good.last().unwrap().clone();
    forged.bytes.truncate(64);
    let of = |count: usize| [&vec![forged.clone(); count][..], &good].concat();
    write(&path, &header, &of(500), true);
    let (code, given_up) = pair.import(&["--apply"]);
    assert!(
        code == 1 && faults(&given_up).contains("FORGED"),
        "{}",
        faults(&given_up)
    );
    assert!(
        (64..200).contains(&fate(&given_up, "refused")),
        "{}",
        given_up["fates"]
    );
    write(&path, &header, &of(20), true);
    let (code, taken) = pair.import(&["--apply"]);
    assert_eq!(
        (code, fate(&taken, "refused"), pair.held()),
        (1, 20, (0..2).collect())
    );
}

/// What came twice, on two mules' media, was planned twice, and refused for want of room that it does not need.
#[test]
fn what_lies_twice_on_a_medium_is_planned_once() {
    let pair = Pair::new(3);
    let volumes = pair.export_of("1MiB", &[]);
    let medium = |name: &str| pair.site.path("m").join(name);
    let (header, good, _) = entries(&medium(&volumes[0]));
    let twice = [&good[..], &good].concat();
    write(&medium(&volumes[0]), &header, &twice, true);
    fs::copy(medium(&volumes[0]), medium("tide-copy.tvol")).unwrap();
    let (code, plan) = pair.import(&[]);
    assert_eq!((code, fate(&plan, "new")), (0, 4), "{plan}");
    let (code, taken) = pair.import(&["--apply"]);
    assert_eq!((code, fate(&taken, "new")), (0, 4), "{taken}");
    assert_eq!(taken["fates"], plan["fates"]);
}

/// Ruling 4, and INV-16: what was good when it was written is judged by what is known when it arrives.
#[test]
fn receipts_of_the_revoked_license_nothing_and_an_old_medium_takes_nothing_back() {
    let pair = Pair::new(2);
    pair.export_of("1MiB", &[]);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    let home = export_args("back", "a", &["--receipts-only"]);
    assert_eq!(pair.be("b").json(&home)["receipts"], 2);
    let import = |more: &[&str]| {
        let args = [&["segment", "import", "back", "--json"], more].concat();
        let ran = pair.be("a").tidelock(&args);
        (ran.code, ran.json())
    };
    // The control.
    let (code, plan) = import(&[]);
    assert_eq!((code, fate(&plan, "new")), (0, 2), "{plan}");

    let site = pair.be("a");
    site.ok(&["ca", "revoke", "--dir", "ca", "b", "--apply"]);
    site.ok(&["ca", "crl", "--dir", "ca"]);
    let node = site.start();
    site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    let unlicensed = || site.status()["audit"]["unlicensed_segments"].as_u64();
    assert_eq!(unlicensed(), Some(2));
    let (code, refused) = import(&["--apply"]);
    assert_eq!(
        (code, codes(&refused), fate(&refused, "new")),
        (1, ["CERT_REVOKED".to_owned()].into(), 0),
        "{refused}"
    );
    assert_eq!(unlicensed(), Some(2));

    // The medium of before the revocation: its CRL is older than the one in force, and stays so.
    let ran = site.ok(&["segment", "import", "m", "--json", "--apply"]);
    let old = ran.json();
    assert_eq!(old["fates"]["not_wanted"]["revocation"], 1, "{old}");
    assert_eq!(fate(&old, "new"), 0, "{old}");
    assert!(node.stop().success());
    let (code, still) = import(&[]);
    assert_eq!(
        (code, fate(&still, "new")),
        (1, 0),
        "a stopped node agrees: {still}"
    );
}

/// Receipts that the disk does not give up: told once, and gone as soon as the disk lets go of them.
#[test]
fn receipts_of_the_revoked_that_cannot_be_read_are_told_and_go_when_they_can() {
    let pair = Pair::new(2);
    pair.export_of("1MiB", &[]);
    assert_eq!(pair.import(&["--apply"]).0, 0);
    let home = export_args("back", "a", &["--receipts-only"]);
    assert_eq!(pair.be("b").json(&home)["receipts"], 2);
    let site = pair.be("a");
    let node = site.start();
    site.ok(&["segment", "import", "back", "--apply"]);
    let unlicensed = || site.status()["audit"]["unlicensed_segments"].as_u64();
    let recorded = |event: &str| site.events(event).len();
    assert_eq!(unlicensed(), Some(0), "the control");

    // A directory stands where one of the files was.
    let receipts = names(&site.path("root/receipts"));
    let [unreadable, _] = &receipts[..] else {
        panic!("{receipts:?}")
    };
    let aside = site.path("aside");
    fs::rename(unreadable, &aside).unwrap();
    fs::create_dir(unreadable).unwrap();
    site.ok(&["ca", "revoke", "--dir", "ca", "b", "--apply"]);
    site.ok(&["ca", "crl", "--dir", "ca"]);
    site.ok(&["crl", "import", "ca/crl.pem", "--apply"]);
    assert_eq!(recorded("receipts_not_dropped"), 1);
    assert_eq!(unlicensed(), Some(1), "the other ones are gone");
    site.operate("audit.reopen");
    assert_eq!(recorded("receipts_not_dropped"), 1, "told once");

    fs::remove_dir(unreadable).unwrap();
    fs::rename(&aside, unreadable).unwrap();
    site.operate("audit.reopen");
    assert_eq!(unlicensed(), Some(2));
    assert_eq!(recorded("receipts_dropped"), 1);
    assert!(node.stop().success());
}
