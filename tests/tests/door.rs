//! What strangers and bad peers may do at the door of a node: a real process, called by foreign hands, all
//! of them at once. It decides all the while, the session with its peer stays up, and whoever may come
//! in comes in.
//!
//! What each certificate, CRL and frame comes to is tested one by one in `transport/tests`; here it is
//! what they cost the node.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

#[path = "../../transport/tests/support/openssl.rs"]
mod openssl;
#[path = "../../transport/tests/support/raw.rs"]
mod raw;

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket as StdSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use openssl::{AFTER, BEFORE, Ca, Issued, Key, Request};
use quinn::{ClientConfig, ConnectionError, Endpoint};
use raw::{Raw, ack};
use serde_json::{Value, json};
use tidelock::{
    clock::wall_unix_ms,
    demo::{
        network::{Loopback, Network as _},
        site::{DOMAIN, Site},
    },
};
use tidelock_segments::{DomainId, NodeId};
use tidelock_tests::site::{
    LIMIT, await_epoch, directory, events, good, install, prepared, sessions,
};
use tidelock_transport::{
    frame::{CloseCode, Frame},
    identity::IdentityRules,
    limits::MAX_HANDSHAKES,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl, crls_in_file},
    tls::{Credentials, MeshTls, SERVER_NAME},
};
use tokio::net::UdpSocket;

/// The node at whose door all of it happens, and its peer.
const PAIR: [&str; 2] = ["a", "b"];

const DAY: Duration = Duration::from_secs(86_400);

/// Initial packets of the flood: so many different ones, each from so many addresses.
const INITIALS: usize = 200;
const ADDRESSES_OF_EACH: usize = 50;

/// Initial packets from one address.
const OF_AN_ADDRESS: usize = 10;

/// Memory that all of it may cost the node at most, and far more than what its limits add up to.
const GROWTH_MAX_BYTES: u64 = 64 << 20;

fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// TLS of a guest whose papers this site's CA issued, and who takes those of `hosts` for good.
fn guest(name: &str, site: &mut Site<'_>, hosts: &Path) -> MeshTls {
    let dir = site.dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    let now_s = wall_unix_ms() / 1_000;
    site.ca.issue(&node_id(name), &dir, now_s, DAY).unwrap();
    let file = |extension: &str| fs::read(dir.join(format!("{name}.{extension}"))).unwrap();
    let authorities =
        [site.dir.as_path(), hosts].map(|dir| fs::read(dir.join("ca/ca.crt")).unwrap());
    // The same certificate twice would be an error of its own.
    let authorities = match authorities[0] == authorities[1] {
        true => authorities[0].clone(),
        false => authorities.concat(),
    };
    let crls = [site.dir.as_path(), hosts].map(|dir| fs::read(dir.join("ca/crl.pem")).unwrap());
    let papers = [file("crt"), file("key"), authorities];
    guest_with(name, &papers, &crls)
}

/// TLS of a guest with this certificate, key and file of authorities.
fn guest_with(
    name: &str,
    [certificate, key, authorities]: &[Vec<u8>; 3],
    crls: &[Vec<u8>],
) -> MeshTls {
    let credentials = Credentials::from_pem(certificate, key, authorities).unwrap();
    let revocation = Revocation::new(RevocationState::new(RevocationOptions::default()));
    for crl in crls.iter().flat_map(|file| crls_in_file(file).unwrap()) {
        let crl = VerifiedCrl::verify(&crl, credentials.trust()).unwrap();
        revocation.import(crl, wall_unix_ms()).unwrap();
    }
    let rules = IdentityRules {
        domain: DomainId::new(DOMAIN).unwrap(),
        allow_without_domain: false,
    };
    let clock = Arc::new(wall_unix_ms);
    MeshTls::new(
        rules,
        node_id(name),
        credentials,
        Arc::new(revocation),
        clock,
        None,
    )
}

/// Somebody who asks the node for decisions without a pause.
struct Asker {
    answers: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Asker {
    fn begin(site: &Site<'_>) -> Self {
        let client = site.node("a").unwrap().client();
        let answers = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&answers);
        let request = json!({
            "principal": {"type": "Agent", "id": "coder-1"},
            "action": "fs.read",
            "resource": {"type": "File", "id": "/srv/app/src/main.rs"},
        });
        let task = tokio::spawn(async move {
            loop {
                let answer = client.post_json("/v1/decide", request.to_string()).await;
                let (status, body) = answer.unwrap();
                let body = String::from_utf8_lossy(&body);
                // A machine that is busy with other things may be late for a deadline of the node:
                // such an answer counts for nothing. Any other denial ends the task, and the test.
                let late = ["\"DEADLINE\"", "\"AUDIT_UNAVAILABLE\""];
                match status {
                    200 => counted.fetch_add(1, Ordering::Relaxed),
                    _ if late.iter().any(|reason| body.contains(reason)) => continue,
                    _ => panic!("{status}: {body}"),
                };
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Self { answers, task }
    }

    fn answers(&self) -> u64 {
        assert!(!self.task.is_finished(), "a decision failed");
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits for more answers, which were asked for while it is as it is now.
    async fn goes_on(&self, what: &str) {
        let (begun, enough) = (Instant::now(), self.answers() + 20);
        while self.answers() < enough {
            assert!(begun.elapsed() < LIMIT, "{what}: no decisions");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Connections that the node refused before it knew who it was, by this reason.
async fn refused(site: &Site<'_>, reason: &str) -> u64 {
    let client = site.node("a").unwrap().client();
    let (_, body) = client.get("/metrics").await.unwrap();
    let name = format!("tidelock_connections_refused_total{{reason=\"{reason}\"}} ");
    let text = String::from_utf8(body.to_vec()).unwrap();
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(&name)?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name}:\n{text}"))
}

async fn until_refused(site: &Site<'_>, reason: &str, least: u64) {
    let begun = Instant::now();
    loop {
        let count = refused(site, reason).await;
        if count >= least {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{count} of {least} {reason}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How its sessions with its peer ended.
async fn cuts(site: &Site<'_>) -> Vec<Value> {
    let mut ended = events(site, "a", "session_closed").await;
    ended.retain(|event| event.get("peer") == Some(&json!("b")));
    // Where both call, one of the two connections is kept.
    ended.retain(|event| event.get("reason") != Some(&json!("duplicate")));
    ended
}

/// The node's peak of resident memory.
fn peak_bytes(site: &Site<'_>) -> u64 {
    let process = site.node("a").unwrap().process_id().unwrap();
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.trim().parse::<u64>().unwrap() * 1_024
}

/// A guest that says what it must: it is greeted.
async fn greeted(tls: &MeshTls, door: SocketAddr) -> Raw {
    let mut raw = Raw::connect(tls, door, "a").await;
    raw.say(&Raw::hello(DOMAIN, tls.node_id().as_str())).await;
    let begun = Instant::now();
    assert!(matches!(raw.hear().await, Some(Frame::Hello(_))));
    assert!(matches!(raw.hear().await, Some(Frame::HelloAck(_))));
    assert!(begun.elapsed() < LIMIT);
    raw.say(&ack()).await;
    raw
}

fn client_config(tls: &MeshTls) -> ClientConfig {
    ClientConfig::new(tls.quic_client_config(Some(&node_id("a"))).unwrap())
}

fn endpoint() -> Endpoint {
    Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap()
}

/// A guest whom TLS does not let in.
async fn turned_away(tls: &MeshTls, door: SocketAddr) {
    let calling = endpoint().connect_with(client_config(tls), door, SERVER_NAME);
    let ended = match calling.unwrap().await {
        Err(error) => error,
        Ok(connection) => connection.closed().await,
    };
    let by_tls = matches!(ended, ConnectionError::ConnectionClosed(_));
    assert!(by_tls, "{ended}");
}

/// Waits until the node's journal tells of somebody who was refused for this reason.
async fn until_told(site: &Site<'_>, reason: &str) {
    let begun = Instant::now();
    loop {
        let told = events(site, "a", "peer_refused").await;
        let has = |event: &Value| event.get("reason") == Some(&json!(reason));
        if told.iter().any(has) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{reason}: {told:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

// ---- Initial packets ----

/// The first packets of connections to somebody who never answers, all different.
fn initials(tls: &MeshTls) -> Vec<Vec<u8>> {
    let nobody = StdSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    nobody.set_read_timeout(Some(LIMIT)).unwrap();
    let address = nobody.local_addr().unwrap();
    let client = endpoint();
    let mut packets = BTreeMap::new();
    let mut packet = [0; 2_048];
    while packets.len() < INITIALS {
        let calling = client.connect_with(client_config(tls), address, SERVER_NAME);
        let calling = calling.unwrap();
        let known = packets.len();
        while packets.len() == known {
            let length = nobody.recv(&mut packet).unwrap();
            // A long header: flags, version, then the connection's id by its length.
            let id = packet[6..6 + usize::from(packet[5])].to_vec();
            packets
                .entry(id)
                .or_insert_with(|| packet[..length].to_vec());
        }
        drop(calling);
    }
    packets.into_values().collect()
}

/// What came of a flood.
#[derive(Debug, Default)]
struct Flood {
    packets: usize,
    bytes: usize,
    retries: usize,
    others: usize,
    answer_bytes: usize,
}

/// Sends each packet from many addresses, and reads what comes back for a moment.
fn flood(packets: &[Vec<u8>], door: SocketAddr) -> Flood {
    let mut flood = Flood::default();
    let mut queue = packets.iter().cycle().take(INITIALS * ADDRESSES_OF_EACH);
    let mut answer = [0; 2_048];
    for number in 0..INITIALS * ADDRESSES_OF_EACH / OF_AN_ADDRESS {
        let [.., high, low] = number.to_be_bytes();
        let socket = StdSocket::bind((Ipv4Addr::new(127, 9, high, low), 0)).unwrap();
        for packet in queue.by_ref().take(OF_AN_ADDRESS) {
            socket.send_to(packet, door).unwrap();
            flood.packets += 1;
            flood.bytes += packet.len();
        }
        socket
            .set_read_timeout(Some(Duration::from_millis(2)))
            .unwrap();
        while let Ok(length) = socket.recv(&mut answer) {
            // Of QUIC 1, RFC 9000, 17.2.5.
            match answer[0] & 0xf0 {
                0xf0 => flood.retries += 1,
                _ => flood.others += 1,
            }
            flood.answer_bytes += length;
        }
    }
    flood
}

// ---- Handshakes that stall ----

/// Whether it is an Initial packet that shows a Retry's token.
fn has_token(packet: &[u8]) -> bool {
    let Some(length) = packet.get(5).filter(|_| packet[0] & 0xf0 == 0xc0) else {
        return false;
    };
    let source = 6 + usize::from(*length);
    let Some(length) = packet.get(source) else {
        return false;
    };
    packet.get(source + 1 + usize::from(*length)) != Some(&0)
}

/// A caller whose line goes dead as soon as it has shown that its address is its own: of what it
/// says after that, one packet arrives.
async fn stalled(client: Endpoint, config: ClientConfig, from: Ipv4Addr, door: SocketAddr) {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let far = UdpSocket::bind((from, 0)).await.unwrap();
    let calling = client.connect_with(config, near.local_addr().unwrap(), SERVER_NAME);
    let _calling = calling.unwrap();
    let (mut there, mut back) = ([0; 2_048], [0; 2_048]);
    let mut caller = None;
    let mut is_dead = false;
    loop {
        tokio::select! {
            Ok((length, who)) = near.recv_from(&mut there) => {
                caller = Some(who);
                if is_dead {
                    continue;
                }
                is_dead = has_token(&there[..length]);
                let _ = far.send_to(&there[..length], door).await;
            }
            Ok((length, _)) = far.recv_from(&mut back) => {
                if let Some(caller) = caller.filter(|_| !is_dead) {
                    let _ = near.send_to(&back[..length], caller).await;
                }
            }
        }
    }
}

// ---- Frames ----

/// What a guest says instead of what it must, and how it ends.
fn courses(name: &str) -> Vec<(&'static str, Vec<u8>, bool)> {
    let hello = Raw::hello(DOMAIN, name).encode().unwrap();
    let mut longer = hello.clone();
    longer[0] += 1;
    longer.push(0);
    let mut shorter = hello.clone();
    shorter[0] -= 1;
    let mut unknown = hello.clone();
    unknown[4] = 99;
    let oversized = [&[0xff; 4], &hello[4..]].concat();
    vec![
        ("truncated", hello[..hello.len() / 2].to_vec(), true),
        ("oversized", oversized, false),
        ("of an unknown type", unknown, false),
        ("a byte longer than it is", longer, false),
        ("a byte shorter than it is", shorter, false),
        (
            "good, and then rubbish",
            [&hello[..], &[0xaa; 64]].concat(),
            false,
        ),
        (
            "of another protocol",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            false,
        ),
    ]
}

/// A guest that says the first part of its Hello, and the rest a byte at a time or never.
async fn slow(tls: MeshTls, door: SocketAddr, pause: Option<Duration>) -> Raw {
    let hello = Raw::hello(DOMAIN, tls.node_id().as_str()).encode().unwrap();
    let mut raw = Raw::connect(&tls, door, "a").await;
    let (first, rest) = hello.split_at(8);
    raw.send.write_all(first).await.unwrap();
    if let Some(pause) = pause {
        for byte in rest {
            tokio::time::sleep(pause).await;
            if raw.send.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
    }
    raw
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inv_10_a_node_decides_whatever_strangers_and_bad_peers_do_at_its_door() {
    let dir = directory();
    let network = Loopback::new(&PAIR).await.unwrap();
    let mut site = prepared(dir.path(), &network, &PAIR);
    for id in PAIR {
        // A session ends for what this test does, and not because the machine stood still for a moment.
        let path = site.node(id).unwrap().config_path();
        let text = fs::read_to_string(&path).unwrap();
        let patient = text.replace("idle_timeout_ms = 1500", "idle_timeout_ms = 30000");
        assert_ne!(patient, text);
        fs::write(path, patient).unwrap();
        good(site.start(id).await);
    }
    install(&site, "a", 1).await;
    await_epoch(&site, "b", 1).await;
    let (door, own) = (network.listen("a"), site.dir.clone());
    let mut papers = |name: &str| guest(name, &mut site, &own);
    let names = (0..16).map(|n| format!("g{n}"));
    let guests: BTreeMap<String, MeshTls> = names.map(|n| (n.clone(), papers(&n))).collect();
    let [quiet, drips, patient, revoked, caller, late] =
        ["quiet", "drips", "patient", "revoked", "caller", "late"].map(&mut papers);
    let caller = Arc::new(caller);
    let asker = Asker::begin(&site);
    asker.goes_on("the control").await;
    let cuts = cuts(&site).await;
    let peak = peak_bytes(&site);

    // Two that keep a session waiting for the rest of their Hello, through all of the following.
    let half_second = Some(Duration::from_millis(500));
    let waiting = [
        tokio::spawn(async move { slow(quiet, door, None).await.closed().await }),
        tokio::spawn(async move { slow(drips, door, half_second).await.closed().await }),
    ];
    // The control: byte by byte, and in time.
    let mut patient = slow(patient, door, Some(Duration::from_millis(2))).await;
    assert!(matches!(patient.hear().await, Some(Frame::Hello(_))));
    assert!(matches!(patient.hear().await, Some(Frame::HelloAck(_))));

    // More handshakes than there is room for, and none of them ends.
    let client = endpoint();
    let mut stalling = Vec::new();
    while refused(&site, "busy").await == 0 {
        for last in 1..=u8::try_from(MAX_HANDSHAKES + 16).unwrap() {
            let (from, config) = (Ipv4Addr::new(127, 8, 0, last), client_config(&caller));
            stalling.push(tokio::spawn(stalled(client.clone(), config, from, door)));
        }
        assert!(stalling.len() < 2_000, "there is always room");
        // As long as they hold their places.
        let _ = tokio::time::timeout(Duration::from_secs(5), until_refused(&site, "busy", 1)).await;
    }
    asker.goes_on("stalled handshakes").await;
    let room = u64::try_from(MAX_HANDSHAKES).unwrap();
    until_refused(&site, "handshake", room).await;
    for task in stalling {
        task.abort();
    }
    // The control: there is room again.
    drop(greeted(&caller, door).await);

    // Initial packets from a thousand addresses.
    let (handshakes, before) = (refused(&site, "handshake").await, asker.answers());
    let tls = Arc::clone(&caller);
    let flood = tokio::task::spawn_blocking(move || flood(&initials(&tls), door));
    let flood = flood.await.unwrap();
    assert!(
        asker.answers() > before,
        "decisions while it lasted: {flood:?}"
    );
    assert_eq!(flood.packets, 10_000);
    assert!(
        flood.retries > 100,
        "the control, they were taken for calls: {flood:?}"
    );
    assert!(flood.answer_bytes < flood.bytes / 2, "{flood:?}");
    // None of them began a handshake; some of the stalled ones may have ended meanwhile.
    let ended = refused(&site, "handshake").await - handshakes;
    assert!(ended < 1_000, "{ended} handshakes ended: {flood:?}");
    drop(greeted(&caller, door).await);

    // Frames that are none.
    for ((name, tls), course) in guests.iter().zip(0..) {
        let Some((what, bytes, ends)) = courses(name).into_iter().nth(course) else {
            break;
        };
        // The control: with the same papers, the right words.
        let good = greeted(tls, door).await;
        good.connection.close(0_u8.into(), b"");
        drop(good);
        let mut raw = Raw::connect(tls, door, "a").await;
        let _ = raw.send.write_all(&bytes).await;
        if ends {
            raw.send.finish().unwrap();
        }
        assert_eq!(raw.closed().await, CloseCode::Protocol, "{what}");
        asker.goes_on(what).await;
    }

    // Papers of another authority of the same name, and revoked ones.
    let elsewhere = directory();
    let mut foreign = prepared(elsewhere.path(), &network, &["a"]);
    let stranger = guest("stranger", &mut foreign, &own);
    turned_away(&stranger, door).await;
    let held = greeted(&revoked, door).await;
    let (_, crl) = good(site.revoke("revoked"));
    let body = json!({"crl": BASE64_STANDARD.encode(crl)});
    let a = site.node("a").unwrap();
    a.operate("crl.import", &body).await.unwrap();
    assert_eq!(held.closed().await, CloseCode::Revoked);
    turned_away(&revoked, door).await;
    for reason in ["cert_signature", "cert_revoked"] {
        until_told(&site, reason).await;
    }
    asker.goes_on("bad papers").await;

    // Those that kept it waiting were let go, and it was never too busy for its peer.
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap(), CloseCode::HelloTimeout);
    }
    drop(greeted(&late, door).await);
    asker.goes_on("the end").await;
    let status = site.node("a").unwrap().status().await.unwrap();
    assert!(sessions(&status) >= 1, "{status}");
    assert_eq!(self::cuts(&site).await, cuts, "the session with b");
    let grown = peak_bytes(&site).saturating_sub(peak);
    assert!(grown < GROWTH_MAX_BYTES, "{grown} bytes");
}

/// A node whose papers are made by openssl, and callers with such papers of every refused kind. What is
/// refused, and with which word, `transport/tests/openssl.rs` tests of all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_papers_of_openssl_turns_away_what_it_must_and_decides() {
    let dir = directory();
    let network = Loopback::new(&["a"]).await.unwrap();
    let mut site = prepared(dir.path(), &network, &["a"]);
    let made = directory();
    let root = Ca::root(&made, "root", "Plant CA", Key::P256);
    let issuing = root.intermediate_with("Issuing CA", Key::P256, Some(0));
    let silent = root.intermediate("Silent CA", Key::P256);
    let both = [root.pem(), issuing.pem()].concat();
    let crls = |number| [&root, &issuing].map(|ca| ca.crl(number, BEFORE, AFTER));
    let first = crls(1);

    let node_dir = site.node("a").unwrap().dir.clone();
    let own = issuing.issue(&Request::node(DOMAIN, "a"));
    fs::write(node_dir.join("a.crt"), own.chain_pem()).unwrap();
    fs::write(node_dir.join("a.key"), own.key_pem()).unwrap();
    fs::write(site.dir.join("ca/ca.crt"), &both).unwrap();
    for (name, crl) in ["site.crl", "issuing.crl"].iter().zip(&first) {
        fs::write(node_dir.join(name), crl).unwrap();
    }
    let path = site.node("a").unwrap().config_path();
    let config = fs::read_to_string(&path).unwrap();
    let with_both = config.replace("[\"site.crl\"]", "[\"site.crl\", \"issuing.crl\"]");
    assert_ne!(with_both, config);
    fs::write(path, with_both).unwrap();
    good(site.start("a").await);
    install(&site, "a", 1).await;
    let door = network.listen("a");
    let asker = Asker::begin(&site);

    let guest = |name: &str, issued: &Issued, authorities: &[u8]| {
        let papers = [issued.chain_pem(), issued.key_pem(), authorities.to_vec()];
        guest_with(name, &papers, &first)
    };
    let of = |issuer: &Ca, request: &Request<'_>| {
        let authorities = [both.clone(), issuer.pem()].concat();
        let known = both
            .windows(issuer.pem().len())
            .any(|part| part == issuer.pem());
        let authorities = if known { &both } else { &authorities };
        guest(request.cn, &issuer.issue(request), authorities)
    };
    let node = |name| Request::node(DOMAIN, name);
    let twin = Ca::root(&made, "twin", "Plant CA", Key::P256);
    let below = issuing.intermediate("Below CA", Key::P256);
    let refused = [
        (
            "cert_expired",
            of(
                &issuing,
                &Request {
                    end: "210101000000Z",
                    ..node("old")
                },
            ),
        ),
        (
            "cert_not_yet_valid",
            of(
                &issuing,
                &Request {
                    start: "390101000000Z",
                    ..node("new")
                },
            ),
        ),
        (
            "domain_wrong",
            of(&issuing, &Request::node("elsewhere", "other")),
        ),
        (
            "domain_missing",
            of(
                &issuing,
                &Request {
                    san: None,
                    ..node("nowhere")
                },
            ),
        ),
        (
            "cert_usage",
            of(
                &issuing,
                &Request {
                    eku: Some("serverAuth"),
                    ..node("server")
                },
            ),
        ),
        ("cert_signature", of(&twin, &node("twin"))),
        ("cert_chain", of(&below, &node("deep"))),
        ("crl_missing", of(&silent, &node("silent"))),
    ];
    let revoked = issuing.issue(&node("revoked"));
    let (revoked_tls, welcome) = (
        guest("revoked", &revoked, &both),
        of(&issuing, &node("welcome")),
    );
    drop(greeted(&revoked_tls, door).await);
    issuing.revoke(&revoked.cert, None);
    for crl in crls(2) {
        let body = json!({"crl": BASE64_STANDARD.encode(crl)});
        let a = site.node("a").unwrap();
        a.operate("crl.import", &body).await.unwrap();
    }
    let refused = refused.into_iter().chain([("cert_revoked", revoked_tls)]);
    for (reason, tls) in refused {
        turned_away(&tls, door).await;
        until_told(&site, reason).await;
        asker.goes_on(reason).await;
        // The control, each time.
        drop(greeted(&welcome, door).await);
    }
}
