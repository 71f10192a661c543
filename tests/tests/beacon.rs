//! Discovery by beacons between hosts in network namespaces: nodes that know each other's name and no
//! address find each other; a host without the key finds nobody and costs little. Needs root, `ip`,
//! `nft` and python3; says `not run` elsewhere.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tidelock::demo::{
    network::Network as _,
    site::{NODES, Site},
};
use tidelock_tests::{
    namespaces::{self, Namespaces},
    not_run,
    site::{
        LIMIT, ask, await_epoch, await_sessions, directory, events, good, install, prepared,
        sessions,
    },
};

/// The group, its port, and where the kernel sends its own membership reports (RFC 3376).
const GROUP: &str = "239.255.74.11";
const PORT: u16 = 7412;
const REPORTS: &str = "224.0.0.22";

fn why_not() -> Option<String> {
    namespaces::why_not()
        .or_else(namespaces::why_no_nft)
        .or_else(why_no_python)
}

fn why_no_python() -> Option<String> {
    let python = Command::new("python3").arg("--version").output();
    python.err().map(|error| format!("python3: {error}"))
}

fn key_file(path: &Path, byte: u8) {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .unwrap();
    file.write_all(&[byte; 32]).unwrap();
}

/// A site whose nodes know their peers by name only, and have the beacon's key.
fn site<'n>(dir: &Path, network: &'n Namespaces) -> Site<'n> {
    let site = prepared(dir, network, &NODES);
    for id in NODES {
        let path = site.node(id).unwrap().config_path();
        let text = fs::read_to_string(&path).unwrap();
        let named: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("address = "))
            .collect();
        let beacon = "\n[beacon]\nenabled = true\ninterval_s = 1\nkey_file = \"site.beacon\"\n";
        fs::write(&path, format!("{}\n{beacon}", named.join("\n"))).unwrap();
        key_file(&path.with_file_name("site.beacon"), 7);
    }
    site
}

fn beacon(status: &Value, field: &str) -> u64 {
    let at = format!("/mesh/beacon/{field}");
    status.pointer(&at).and_then(Value::as_u64).unwrap_or(0)
}

/// Counts what leaves a host: beacons, what goes to one other and the kernel's reports, and the rest.
fn watch(network: &Namespaces, node: &str, other: &str) {
    let allowed = [network.listen(other).ip().to_string(), REPORTS.to_owned()];
    let beacons = format!("ip daddr {GROUP} udp dport {PORT} udp length 58");
    network.watch(node, &allowed, Some(&beacons)).unwrap();
}

/// Plays a scene on three hosts, if that can be had here.
fn play(name: &str, scene: impl AsyncFnOnce(&Path, &Namespaces)) {
    if let Some(why) = why_not() {
        not_run(name, &why).unwrap();
        return;
    }
    let dir = directory();
    let network = Namespaces::new(&NODES).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(scene(dir.path(), &network));
}

/// Starts `a` and `b` and waits until they have found each other.
async fn a_and_b(site: &mut Site<'_>) {
    for id in ["a", "b"] {
        good(site.start(id).await);
    }
    for id in ["a", "b"] {
        await_sessions(site, id, 1).await;
    }
}

#[test]
fn nodes_without_addresses_find_each_other_and_whoever_lacks_the_key_finds_nobody() {
    let name = "nodes_without_addresses_find_each_other_and_whoever_lacks_the_key_finds_nobody";
    play(name, async |dir, network| {
        watch(network, "a", "b");
        let mut site = site(dir, network);
        let other_key = site.node("c").unwrap().dir.join("site.beacon");
        key_file(&other_key, 8);
        for id in NODES {
            good(site.start(id).await);
        }
        await_sessions(&site, "a", 1).await;
        await_sessions(&site, "b", 1).await;
        // A session like any other: a bundle crosses it.
        install(&site, "a", 1).await;
        await_epoch(&site, "b", 1).await;
        // c hears them, and they hear c, and nothing comes of it.
        let c = site.node("c").unwrap();
        let deaf = c
            .await_status("beacons of another key", LIMIT, |s| {
                beacon(s, "refused/tag") >= 4 && beacon(s, "sent") >= 3
            })
            .await
            .unwrap();
        assert_eq!((sessions(&deaf), beacon(&deaf, "dials")), (0, 0), "{deaf}");
        let hearing = site
            .node("a")
            .unwrap()
            .await_status("beacons of c", LIMIT, |s| beacon(s, "refused/tag") >= 2)
            .await
            .unwrap();
        assert_eq!(sessions(&hearing), 1, "{hearing}");
        let beacons = network.packets("a", "named").unwrap();
        assert!(beacons >= 2, "{beacons} beacons of 50 bytes");
        assert_eq!(network.packets("a", "foreign").unwrap(), 0);
        // A peer that was found is dialled again where it was met, after a restart of it too.
        site.kill("b").unwrap();
        await_sessions(&site, "a", 0).await;
        good(site.start("b").await);
        await_sessions(&site, "a", 1).await;
        assert_eq!(network.packets("a", "foreign").unwrap(), 0);
        // The control: with the key, c is found by both; and the counter counts.
        site.kill("c").unwrap();
        key_file(&other_key, 7);
        good(site.start("c").await);
        await_sessions(&site, "a", 2).await;
        await_sessions(&site, "b", 2).await;
        assert!(network.packets("a", "foreign").unwrap() > 0);
    });
}

#[test]
fn what_keeps_beacons_from_going_out_is_told_and_they_go_when_it_is_mended() {
    let name = "what_keeps_beacons_from_going_out_is_told_and_they_go_when_it_is_mended";
    play(name, async |dir, network| {
        let mut site = site(dir, network);
        // a listens on all addresses, and its kernel knows no way to the group: its sockets do not open.
        // Those of b do, and nothing that it sends there may leave.
        let path = site.node("a").unwrap().config_path();
        let text = fs::read_to_string(&path).unwrap();
        let listen = network.listen("a").to_string();
        assert!(text.contains(&listen), "{text}");
        fs::write(&path, text.replace(&listen, "0.0.0.0:7411")).unwrap();
        let stop = format!(
            "table inet stop {{\n chain leaving {{\n  type filter hook output priority 0; policy accept;\n  \
             ip daddr {GROUP} drop\n }}\n}}\n"
        );
        network.nft("b", &stop).unwrap();
        for id in ["a", "b"] {
            good(site.start(id).await);
        }
        for id in ["a", "b"] {
            let fault = |s: &Value| {
                s.pointer("/mesh/beacon/fault")
                    .is_some_and(Value::is_string)
            };
            let node = site.node(id).unwrap();
            let seen = node.await_status("a fault", LIMIT, fault).await.unwrap();
            assert_eq!((beacon(&seen, "sent"), sessions(&seen)), (0, 0), "{seen}");
        }
        // More than one try, of one a second.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let way = ["route", "add", "239.0.0.0/8", "dev", "eth0"];
        network.exec("a", "ip", &way, "").unwrap();
        network.nft("b", "delete table inet stop\n").unwrap();
        for id in ["a", "b"] {
            let seen = await_sessions(&site, id, 1).await;
            assert_eq!(seen.pointer("/mesh/beacon/fault"), Some(&Value::Null));
            // Told once, and mended once, though it was tried again every second.
            let told = events(&site, id, "discovery").await;
            let faults = told.iter().map(|event| event.get("fault"));
            let faults: Vec<bool> = faults.map(|f| f.is_some_and(Value::is_string)).collect();
            assert_eq!(faults, [true, false], "{told:?}");
        }
    });
}

/// What an attacker on c's host knows of the format, written from the book and from no code of ours.
const FORMAT: &str = r#"
import hmac, os, socket, struct, sys, time
def tag(key, unix_ms, source, nonce, port):
    said = b"tidelock beacon 1\0" + struct.pack(">Q", unix_ms // 300000)
    said += socket.inet_aton(source) + nonce + struct.pack(">H", port)
    return hmac.new(key, said, "sha256").digest()
def beacon(key, unix_ms, source, nonce, port):
    return nonce + struct.pack(">H", port) + tag(key, unix_ms, source, nonce, port)
def opens(key, unix_ms, source, packet):
    if len(packet) != 50:
        return False
    nonce, port, got = packet[:16], struct.unpack(">H", packet[16:18])[0], packet[18:]
    slots = [unix_ms + d for d in (-300000, 0, 300000) if unix_ms + d >= 0]
    return any(hmac.compare_digest(tag(key, at, source, nonce, port), got) for at in slots)
"#;

/// Records good beacons, plays them from its own address and, with a forged sender, from that of whoever
/// made them; sends what looks like beacons, and floods.
const OUTSIDER: &str = r#"
group, port, own = sys.argv[1], int(sys.argv[2]), sys.argv[3]
hear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
hear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
hear.bind((group, port))
hear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                socket.inet_aton(group) + socket.inet_aton(own))
hear.settimeout(30)
say = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
say.bind((own, 0))
say.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))
def forge(source, packet):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28 + len(packet), 0, 0, 1, 17, 0,
                       socket.inet_aton(source), socket.inet_aton(group))
    raw.sendto(head + struct.pack(">HHHH", 7412, port, 8 + len(packet), 0) + packet, (group, 0))
recorded = {}
while len(recorded) < 4 or len(set(recorded.values())) < 2:
    packet, (source, _) = hear.recvfrom(2048)
    assert len(packet) == 50, len(packet)
    recorded[packet] = source
    say.sendto(packet, (group, port))
    forge(source, packet)
# The port names c's own: whoever believed it would call here.
forged = [os.urandom(16) + struct.pack('>H', 7411) + os.urandom(32) for _ in range(4)]
spoilt = [packet[:16] + struct.pack('>H', 7411) + packet[18:] for packet in list(recorded)[:4]]
def nonsense():
    for packet in forged + spoilt + [b'', b'x' * 49, b'x' * 51, b'x' * 1400]:
        say.sendto(packet, (group, port))
    time.sleep(0.2)
# A loaded machine may drop what stands in the flood's way: before it, after it, and more than once.
nonsense()
nonsense()
for _ in range(20000):
    say.sendto(os.urandom(50), (group, port))
for _ in range(5):
    time.sleep(0.2)
    nonsense()
print("done")
"#;

/// Has the key: sends good beacons for a hundred addresses, four ports each, again and again for ten
/// seconds. Whoever calls there is told at once that no common version of QUIC is spoken, so that a dial
/// is over as soon as it began, and nothing but the budgets bounds how many there are.
const INSIDER: &str = r#"
import select
group, port, own, key = sys.argv[1], int(sys.argv[2]), sys.argv[3], bytes.fromhex(sys.argv[4])
net = own.rsplit('.', 1)[0]
poll, doors, mouths = select.poll(), {}, []
for last in range(100, 200):
    source = f"{net}.{last}"
    os.system(f"ip addr add {source}/24 dev eth0")
    mouth = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mouth.bind((source, 0))
    mouths.append((source, mouth))
    for at in range(4):
        door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        door.bind((source, 20000 + at))
        doors[door.fileno()] = door
        poll.register(door, select.POLLIN)
def hang_up(door):
    packet, caller = door.recvfrom(2048)
    to = packet[6:6 + packet[5]]
    rest = packet[6 + packet[5]:]
    of = rest[1:1 + rest[0]]
    # Version negotiation (RFC 9000, 17.2.1): only versions that nobody speaks.
    door.sendto(bytes([0x80]) + bytes(4) + bytes([len(of)]) + of + bytes([len(to)]) + to
                + bytes([0x1a, 0x2a, 0x3a, 0x4a]), caller)
begun = time.time()
for turn in range(10):
    for source, mouth in mouths:
        for at in range(4):
            good = beacon(key, int(time.time() * 1000), source, os.urandom(16), 20000 + at)
            mouth.sendto(good, (group, port))
    while time.time() < begun + turn + 1:
        for door, _ in poll.poll(20):
            hang_up(doors[door])
print("done")
"#;

/// Reads the vectors, and says how many it has judged.
const READER: &str = r#"
import json
vectors = json.load(open(sys.argv[1]))
for v in vectors["good"]:
    key, nonce = bytes.fromhex(v["key"]), bytes.fromhex(v["nonce"])
    packet = bytes.fromhex(v["packet"])
    assert beacon(key, v["unix_ms"], v["source"], nonce, v["port"]) == packet, v
    assert opens(key, v["unix_ms"], v["source"], packet), v
for v in vectors["bad"]:
    assert not opens(bytes.fromhex(v["key"]), v["unix_ms"], v["source"], bytes.fromhex(v["packet"])), v
print(len(vectors["good"]), len(vectors["bad"]))
"#;

#[test]
fn the_vectors_are_read_by_a_program_that_was_written_from_the_book() {
    let name = "the_vectors_are_read_by_a_program_that_was_written_from_the_book";
    if let Some(why) = why_no_python() {
        not_run(name, &why).unwrap();
        return;
    }
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/beacon/beacons.json");
    let read = Command::new("python3")
        .args(["-c", &format!("{FORMAT}{READER}")])
        .arg(vectors)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&read.stdout);
    assert_eq!(said.trim(), "3 9", "{read:?}");
}

/// Plays an attack on c's host.
fn attack(network: &Namespaces, script: &str, more: &[&str]) {
    let (script, port) = (format!("{FORMAT}{script}"), PORT.to_string());
    let own = network.listen("c").ip().to_string();
    let arguments = [&["-c", &script, GROUP, &port, &own], more].concat();
    let said = network.exec("c", "python3", &arguments, "").unwrap();
    assert_eq!(said.trim(), "done");
}

/// It decides, and its session with the other one is up.
async fn is_well(site: &Site<'_>, id: &str, status: &Value) {
    assert_eq!(sessions(status), 1, "{id}: {status}");
    // Without a bundle: a decision too.
    assert_eq!(ask(site, id, "/srv/app/src/main.rs").await, 403, "{id}");
}

#[test]
fn inv_13_recorded_forged_and_flooding_beacons_cause_no_packet_and_no_harm() {
    let name = "inv_13_recorded_forged_and_flooding_beacons_cause_no_packet_and_no_harm";
    play(name, async |dir, network| {
        watch(network, "a", "b");
        watch(network, "b", "a");
        let mut site = site(dir, network);
        // c is in both configs and never there: both go on looking for it.
        a_and_b(&mut site).await;
        attack(network, OUTSIDER, &[]);
        for id in ["a", "b"] {
            let node = site.node(id).unwrap();
            // Recordings are refused as such, under another sender and forgeries by their tag, most of
            // the flood unread.
            let seen = node
                .await_status("the attack", LIMIT, |s| {
                    beacon(s, "refused/replayed") >= 1
                        && beacon(s, "refused/tag") >= 1
                        && beacon(s, "refused/length") >= 1
                        && beacon(s, "refused/flood") >= 1
                })
                .await
                .unwrap();
            is_well(&site, id, &seen).await;
            assert_eq!(network.packets(id, "foreign").unwrap(), 0, "{id}");
        }
        // The control: the real c is found in spite of it all, and a's packets to it are counted.
        good(site.start("c").await);
        await_sessions(&site, "a", 2).await;
        await_sessions(&site, "b", 2).await;
        assert!(network.packets("a", "foreign").unwrap() > 0);
    });
}

#[test]
fn inv_12_whoever_has_the_key_and_no_certificate_causes_a_bounded_number_of_dials_and_no_trust() {
    let name = "inv_12_whoever_has_the_key_and_no_certificate_causes_a_bounded_number_of_dials_and_no_trust";
    play(name, async |dir, network| {
        let elsewhere = directory();
        let mut site = site(dir, network);
        a_and_b(&mut site).await;
        // A node of the same name and domain, with the key, and papers of another CA.
        let mut foreign = self::site(elsewhere.path(), network);
        good(foreign.start("c").await);
        for id in ["a", "b"] {
            let seen = site
                .node(id)
                .unwrap()
                .await_status("a dial that fails", LIMIT, |s| beacon(s, "failed") >= 1)
                .await
                .unwrap();
            let why = seen.pointer("/mesh/beacon/last_failure");
            assert!(why.is_some_and(Value::is_string), "{seen}");
            is_well(&site, id, &seen).await;
        }
        let refused = foreign
            .node("c")
            .unwrap()
            .await_status("its own dials", LIMIT, |s| beacon(s, "failed") >= 1)
            .await
            .unwrap();
        assert_eq!((sessions(&refused), beacon(&refused, "met")), (0, 0));
        foreign.kill("c").unwrap();
        let begun = Instant::now();
        let mut before = Vec::new();
        for id in ["a", "b"] {
            let seen = site.node(id).unwrap().status().await.unwrap();
            before.push(beacon(&seen, "dials"));
        }
        attack(network, INSIDER, &[&"07".repeat(32)]);
        for (id, before) in ["a", "b"].into_iter().zip(before) {
            let seen = site
                .node(id)
                .unwrap()
                .await_status("the attack", LIMIT, |s| beacon(s, "heard") >= 100)
                .await
                .unwrap();
            is_well(&site, id, &seen).await;
            // The budget of c, the only one that is missing, and one more a link-up interval.
            let most = 64 + 1 + begun.elapsed().as_secs() / 5;
            let dials = beacon(&seen, "dials") - before;
            assert!(dials <= most, "{dials} dials of {most}: {seen}");
            // The control: they were dials for these beacons, and there was no end of addresses.
            assert!(dials >= 32, "{dials} dials: {seen}");
        }
        // The control: the real c calls, and is let in.
        good(site.start("c").await);
        await_sessions(&site, "a", 2).await;
        await_sessions(&site, "b", 2).await;
    });
}
