//! A node whose actions are referred to a decision point upstream, over real TLS with certificates made by
//! openssl on both sides: every answer, everything that is none, the dark, and restarts in it.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of test functions"
)]

mod common;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::Ed25519KeyPair,
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use common::{Site, chmod, free_tcp, openssl, until};
use rustix::process::Signal;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    runtime::Runtime,
};
use tokio_rustls::TlsAcceptor;

/// What the decision point does with the next questions.
#[derive(Clone)]
enum Mood {
    Says(Value),
    Signs(Arc<Ed25519KeyPair>),
    Status(u16),
    Raw(&'static [u8]),
    Oversize,
    LiesAboutTheId,
    Sleeps,
}

struct Shared {
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    questions: Mutex<Vec<Value>>,
}

/// A decision point; gone when dropped.
struct Authority {
    address: SocketAddr,
    shared: Arc<Shared>,
    // Its threads end with it.
    _runtime: Runtime,
}

impl Authority {
    fn new(site: &Site, address: SocketAddr, mood: Mood) -> Self {
        let pem = |name: &str| std::fs::read(site.path(name)).unwrap();
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(&pem("up-ca.crt")).unwrap())
            .unwrap();
        let provider = Arc::new(default_provider());
        let callers =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(callers)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(&pem("srv.crt")).unwrap()],
                PrivateKeyDer::from_pem_slice(&pem("srv.key")).unwrap(),
            )
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let shared = Arc::new(Shared {
            mood: Mutex::new(mood),
            asked: AtomicUsize::new(0),
            questions: Mutex::default(),
        });
        let socket = until("the decision point's port", || {
            std::net::TcpListener::bind(address).ok()
        });
        socket.set_nonblocking(true).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let serving = shared.clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(socket).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, shared) = (acceptor.clone(), serving.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(stream, &shared).await;
                    }
                });
            }
        });
        Self {
            address,
            shared,
            _runtime: runtime,
        }
    }

    fn now(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }
}

async fn serve(
    mut stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    shared: &Shared,
) {
    let mut buffer = Vec::new();
    loop {
        let (head, body) = loop {
            let end = buffer.windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(end) = end {
                let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
                let length: usize = field(&head, "content-length").parse().unwrap();
                if buffer.len() >= end + 4 + length {
                    let rest = buffer.split_off(end + 4 + length);
                    let body = buffer.split_off(end + 4);
                    buffer = rest;
                    break (head, body);
                }
            }
            let mut more = [0; 4096];
            match stream.read(&mut more).await {
                Ok(0) | Err(_) => return,
                Ok(n) => buffer.extend_from_slice(&more[..n]),
            }
        };
        shared.asked.fetch_add(1, Ordering::SeqCst);
        let question = serde_json::from_slice(&body).unwrap();
        shared.questions.lock().unwrap().push(question);
        let mut id = field(&head, "x-request-id").to_owned();
        let mood = shared.mood.lock().unwrap().clone();
        let mut status = 200;
        let answer = match mood {
            Mood::Says(answer) => answer,
            Mood::Signs(key) => {
                let hash = digest(&SHA256, &body);
                let hash: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
                let payload = json!({"question": format!("sha256:{hash}"), "request_id": id,
                                     "decision": true, "lifetime_s": 300});
                let encode = |text: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(text);
                let message = format!(
                    "{}.{}",
                    encode(br#"{"alg":"EdDSA"}"#),
                    encode(payload.to_string().as_bytes())
                );
                let signature = encode(key.sign(message.as_bytes()).as_ref());
                json!({"decision": true, "context": {"signed": format!("{message}.{signature}")}})
            }
            Mood::Status(code) => {
                status = code;
                json!({"decision": true})
            }
            Mood::Oversize => json!({"decision": true, "context": {"reason": "x".repeat(40_000)}}),
            Mood::LiesAboutTheId => {
                id = "another".to_owned();
                json!({"decision": true})
            }
            Mood::Raw(bytes) => {
                // The other side may have hung up.
                let _ = stream.write_all(bytes).await;
                let _ = stream.shutdown().await;
                return;
            }
            Mood::Sleeps => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                return;
            }
        };
        let answer = answer.to_string();
        let text = format!(
            "HTTP/1.1 {status} x\r\nx-request-id: {id}\r\nlocation: /access/v1/elsewhere\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
            answer.len()
        );
        if stream.write_all(text.as_bytes()).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
}

fn field<'a>(head: &'a str, name: &str) -> &'a str {
    let value = head
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_default().trim()
}

const CURVE: &str = "ec_paramgen_curve:P-256";

fn authority(dir: &Path, name: &str) {
    let (key, crt, subject) = (
        format!("{name}.key"),
        format!("{name}.crt"),
        format!("/CN={name}"),
    );
    openssl(
        dir,
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            CURVE,
            "-nodes",
            "-keyout",
            &key,
            "-out",
            &crt,
            "-days",
            "3650",
            "-subj",
            &subject,
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        ],
    );
}

fn certificate(dir: &Path, ca: &str, name: &str, usage: &str) {
    let (key, csr, crt) = (
        format!("{name}.key"),
        format!("{name}.csr"),
        format!("{name}.crt"),
    );
    let subject = format!("/CN={name}");
    openssl(
        dir,
        &[
            "req", "-newkey", "ec", "-pkeyopt", CURVE, "-nodes", "-keyout", &key, "-out", &csr,
            "-subj", &subject,
        ],
    );
    chmod(&dir.join(&key), 0o600);
    let extensions = format!(
        "basicConstraints=critical,CA:FALSE\nsubjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\n"
    );
    std::fs::write(dir.join("ext"), extensions).unwrap();
    let (ca_crt, ca_key) = (format!("{ca}.crt"), format!("{ca}.key"));
    openssl(
        dir,
        &[
            "x509",
            "-req",
            "-in",
            &csr,
            "-CA",
            &ca_crt,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-out",
            &crt,
            "-days",
            "3650",
            "-extfile",
            "ext",
        ],
    );
}

fn yes() -> Value {
    json!({"decision": true, "context": {"reason": "agreed"}})
}

fn no() -> Value {
    json!({"decision": false, "context": {"reason": "not today"}})
}

/// A site whose reads are referred to a decision point, and that decision point.
fn site() -> (Site, Authority) {
    let site = Site::new();
    let dir = site.path("");
    authority(&dir, "up-ca");
    authority(&dir, "other-ca");
    certificate(&dir, "up-ca", "srv", "serverAuth");
    certificate(&dir, "up-ca", "cli", "clientAuth");
    certificate(&dir, "other-ca", "stranger", "clientAuth");
    let address = free_tcp();
    let config = format!(
        "{}\n[[consult.upstreams]]\nname = \"authority\"\n\
         url = \"https://127.0.0.1:{}/access/v1/evaluation\"\naddress = \"{address}\"\n\
         ca = \"up-ca.crt\"\ncertificate = \"cli.crt\"\nkey = \"cli.key\"\n",
        site.read("tidelock.toml"),
        address.port()
    );
    site.write("tidelock.toml", &config);
    site.bundle("site-1.tar", "policy.key", |manifest| {
        manifest["classes"]["observe"]["consult"] = json!({
            "upstream": "authority", "deadline_ms": 5_000, "when_unreachable": "cached",
            "allow_lifetime_s": 86_400, "deny_lifetime_s": 86_400,
        });
    });
    let authority = Authority::new(&site, address, Mood::Says(yes()));
    (site, authority)
}

#[track_caller]
fn reads(site: &Site, path: &str, expected: &str) {
    assert_eq!(site.may_read(path).1, expected, "{path}");
}

fn last_consult(site: &Site) -> Value {
    let records = site.records();
    let last = records
        .iter()
        .rev()
        .find(|r| r["record"]["type"] == "decision");
    last.unwrap()["record"]["consult"].clone()
}

#[test]
fn a_decision_point_decides_over_mutual_tls_and_what_is_no_answer_denies() {
    let (site, authority) = site();
    let node = site.start_deciding();
    reads(&site, "/srv/a.txt", "POLICY_ALLOW");
    let question = authority.shared.questions.lock().unwrap()[0].clone();
    assert_eq!(
        question["resource"],
        json!({"type": "File", "id": "/srv/a.txt"})
    );
    assert_eq!(question["tidelock"]["bundle"]["epoch"], 1);
    let consult = last_consult(&site);
    assert_eq!(
        (&consult["outcome"], &consult["why"]),
        (&json!("allow"), &json!("agreed"))
    );
    // What the policies do not permit is not asked.
    let asked = authority.asked();
    reads(&site, "/etc/shadow", "NO_MATCH");
    assert_eq!(authority.asked(), asked);

    authority.now(Mood::Says(no()));
    reads(&site, "/srv/b.txt", "CONSULT_DENIED");
    authority.now(Mood::Says(
        json!({"decision": false, "context": {"hold": true}}),
    ));
    reads(&site, "/srv/c.txt", "CONSULT_HELD");
    for (name, mood) in [
        ("json", Mood::Says(json!([true]))),
        ("text", Mood::Says(json!({"decision": "true"}))),
        ("error", Mood::Status(500)),
        ("redirect", Mood::Status(307)),
        ("long", Mood::Oversize),
        ("id", Mood::LiesAboutTheId),
        ("raw", Mood::Raw(b"220 mail.example ESMTP\r\n\r\n")),
    ] {
        authority.now(mood);
        let asked = authority.asked();
        reads(&site, &format!("/srv/{name}.txt"), "CONSULT_INVALID");
        assert_eq!(
            authority.asked(),
            asked + 1,
            "{name}: once, and nothing is followed"
        );
    }
    // An earlier allow does not stand in for garbage.
    authority.now(Mood::Status(500));
    reads(&site, "/srv/a.txt", "CONSULT_INVALID");
    authority.now(Mood::Sleeps);
    reads(&site, "/srv/slow.txt", "CONSULT_TIMEOUT");
    // Nor for somebody who is overrun: whoever asks a lot can bring that about.
    authority.now(Mood::Status(503));
    reads(&site, "/srv/a.txt", "CONSULT_BUSY");
    authority.now(Mood::Says(yes()));
    reads(&site, "/srv/a.txt", "POLICY_ALLOW");
    assert_eq!(last_consult(&site)["fallback"], "none");

    // A search and an explanation ask nobody.
    let asked = authority.asked();
    let action = common::read_action("/srv/a.txt").to_string();
    let explained = common::tidelock_in(
        &site.path(""),
        &["decide", "--explain", "--json"],
        action.as_bytes(),
    );
    assert_eq!(explained.json()["reason"], "CONSULT_NEEDED");
    assert_eq!(authority.asked(), asked);

    // The dark.
    let address = authority.address;
    drop(authority);
    reads(&site, "/srv/a.txt", "POLICY_ALLOW");
    let consult = last_consult(&site);
    assert_eq!(
        (&consult["outcome"], &consult["fallback"]),
        (&json!("unreachable"), &json!("cached"))
    );
    reads(&site, "/srv/b.txt", "CONSULT_DENIED");
    reads(&site, "/srv/new.txt", "CONSULT_UNREACHABLE");
    let status = site.status()["consult"].clone();
    let upstream = &status["upstreams"][0];
    assert_eq!(
        (&upstream["name"], &upstream["fault"]),
        (&json!("authority"), &Value::Null)
    );
    assert_eq!(upstream["seen"]["breaker"], "open", "{status}");
    site.ok(&["policy", "status"])
        .says(&["upstream authority", "breaker open"]);
    let doctor = site.tidelock(&["doctor"]);
    doctor.says(&["authority is away", "when_unreachable: cached"]);
    let metrics = common::over_unix(
        &site.path("s"),
        &common::request("GET", "/metrics", &[], b""),
    );
    let metrics = metrics.unwrap().1;
    for line in [
        "tidelock_consult_breaker_open{upstream=\"authority\"} 1",
        "tidelock_consult_total{upstream=\"authority\",outcome=\"unreachable\",fallback=\"cached\"} ",
        "tidelock_answers_total{reason=\"CONSULT_INVALID\"} ",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }

    // A restart in the dark, by a kill.
    until("the answers to be kept", || {
        let kept = std::fs::read_to_string(site.path("root/state/answers")).ok()?;
        kept.contains("\"allow\":true").then_some(())
    });
    node.end(Signal::KILL);
    let node = site.start();
    reads(&site, "/srv/a.txt", "POLICY_ALLOW");
    assert_eq!(last_consult(&site)["fallback"], "cached");
    reads(&site, "/srv/new.txt", "CONSULT_UNREACHABLE");
    // What is taken back stays taken back, however soon the node is killed.
    let authority = Authority::new(&site, address, Mood::Says(no()));
    reads(&site, "/srv/a.txt", "CONSULT_DENIED");
    node.end(Signal::KILL);
    drop(authority);
    let node = site.start();
    reads(&site, "/srv/a.txt", "CONSULT_DENIED");
    assert_eq!(last_consult(&site)["fallback"], "cached");
    // And another bundle begins with nothing.
    site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = 2.into();
        manifest["classes"]["observe"]["consult"] = json!({
            "upstream": "authority", "deadline_ms": 5_000, "when_unreachable": "hold",
        });
    });
    site.ok(&["bundle", "install", "site-2.tar", "--apply"]);
    reads(&site, "/srv/a.txt", "CONSULT_HELD");
    assert!(node.stop().success());
}

#[test]
fn who_cannot_prove_who_they_are_is_not_reached_and_unsigned_answers_are_none() {
    let (site, authority) = site();
    let node = site.start_deciding();
    reads(&site, "/srv/a.txt", "POLICY_ALLOW");
    let good = site.read("tidelock.toml");
    let port = authority.address.port();
    let dir = site.path("");
    // A list of the authority that revokes the server, and one that does not.
    std::fs::write(dir.join("index.txt"), "").unwrap();
    std::fs::write(
        dir.join("ca.cnf"),
        "[ca]\ndefault_ca = up\n[up]\ndatabase = index.txt\ncertificate = up-ca.crt\n\
         private_key = up-ca.key\ndefault_md = sha256\ndefault_crl_days = 3650\ncrlnumber = crlnumber\n\
         crl_extensions = crl\n[crl]\nauthorityKeyIdentifier = keyid\n",
    )
    .unwrap();
    std::fs::write(dir.join("crlnumber"), "01\n").unwrap();
    let ca = |args: &[&str]| openssl(&dir, &[&["ca", "-config", "ca.cnf"], args].concat());
    ca(&["-gencrl", "-out", "good.crl"]);
    ca(&["-revoke", "srv.crt"]);
    ca(&["-gencrl", "-out", "revoked.crl"]);
    let asked = authority.asked();
    for (name, from, to) in [
        ("ca", "up-ca.crt".to_owned(), "other-ca.crt".to_owned()),
        (
            "name",
            format!("https://127.0.0.1:{port}"),
            format!("https://localhost:{port}"),
        ),
        ("client", "cli.".to_owned(), "stranger.".to_owned()),
        (
            "crl",
            "key = \"cli.key\"".to_owned(),
            "key = \"cli.key\"\ncrls = [\"revoked.crl\"]".to_owned(),
        ),
    ] {
        let bad = good.replace(&from, &to);
        assert_ne!(bad, good, "{name}");
        site.write("tidelock.toml", &bad);
        node.reload("reloaded");
        reads(&site, &format!("/srv/{name}.txt"), "CONSULT_UNREACHABLE");
    }
    assert_eq!(authority.asked(), asked, "no question reached it");
    // Positive control: the same with a list that does not name it.
    let listed = good.replace(
        "key = \"cli.key\"",
        "key = \"cli.key\"\ncrls = [\"good.crl\"]",
    );
    site.write("tidelock.toml", &listed);
    node.reload("reloaded");
    reads(&site, "/srv/listed.txt", "POLICY_ALLOW");
    // Its files are watched, and their ends are told.
    let endings = site.status()["papers"]["endings"].clone();
    for paper in ["upstream certificate", "upstream ca", "upstream crl"] {
        let mut papers = endings.as_array().unwrap().iter();
        let ending = papers.find(|ending| ending["paper"] == paper);
        let name = ending.unwrap()["name"].as_str().unwrap();
        assert!(name.starts_with("authority"), "{endings}");
    }
    let lists = [site.read("revoked.crl"), site.read("good.crl")];
    for (list, expected) in lists.iter().zip(["CONSULT_UNREACHABLE", "POLICY_ALLOW"]) {
        let taken = || {
            let taken = site.events("papers_taken");
            taken
                .iter()
                .filter(|event| event["set"] == "upstreams")
                .count()
        };
        let before = taken();
        site.write("good.crl", list);
        until("the other list", || (taken() > before).then_some(()));
        reads(&site, &format!("/srv/watched-{expected}.txt"), expected);
    }

    // Signed answers.
    openssl(
        &dir,
        &["genpkey", "-algorithm", "ed25519", "-out", "sign.key"],
    );
    openssl(
        &dir,
        &["pkey", "-in", "sign.key", "-pubout", "-out", "sign.pub"],
    );
    openssl(
        &dir,
        &[
            "pkcs8", "-topk8", "-nocrypt", "-in", "sign.key", "-outform", "DER", "-out", "sign.der",
        ],
    );
    let key = std::fs::read(dir.join("sign.der")).unwrap();
    let key = Arc::new(Ed25519KeyPair::from_pkcs8(&key).unwrap());
    let other = Arc::new(Ed25519KeyPair::generate().unwrap());
    let signed = good.replace(
        "key = \"cli.key\"",
        "key = \"cli.key\"\nanswer_key = \"sign.pub\"",
    );
    site.write("tidelock.toml", &signed);
    node.reload("reloaded");
    reads(&site, "/srv/signed.txt", "CONSULT_INVALID");
    authority.now(Mood::Signs(other));
    reads(&site, "/srv/signed.txt", "CONSULT_INVALID");
    authority.now(Mood::Signs(key));
    reads(&site, "/srv/signed.txt", "POLICY_ALLOW");
    let consult = last_consult(&site);
    assert_eq!(consult["signed"].as_str().unwrap().split('.').count(), 3);
    let life = consult["expires_unix_ms"].as_u64().unwrap()
        - consult["answered_unix_ms"].as_u64().unwrap();
    assert_eq!(life, 300_000, "what is signed shortens it");

    // A key that others can read.
    chmod(&site.path("cli.key"), 0o644);
    let refused = node.reload("reload_refused");
    assert!(refused.to_string().contains("chmod 600"), "{refused}");
    reads(&site, "/srv/signed.txt", "POLICY_ALLOW");
    assert!(node.stop().success());
    site.refused_start().says(&["chmod 600"]);
    // Files that are of no use for another reason close the upstream only.
    chmod(&site.path("cli.key"), 0o600);
    site.write("cli.crt", "no certificate");
    let node = site.start();
    reads(&site, "/srv/fresh.txt", "CONSULT_UNREACHABLE");
    assert_eq!(site.events("upstream_unusable").len(), 1);
    site.tidelock(&["doctor"])
        .ended(1)
        .says(&["authority cannot be asked"]);
    assert!(node.stop().success());
}
