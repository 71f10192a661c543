//! The TLS door with a real client: who gets through the handshake, and what counts afterwards.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{FULL, Script, quick, soon, status, tokens, until};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tidelock_gateway::{
    AuthConfig, CertifiedCallers, Decider, Drained, Gateway, GatewayConfig, GatewayHandle,
    GatewayLimits, GatewayParts, Grant, RefusalWindow, RefusedCertificate, Scopes, TlsDoor,
    UnixDoor,
};
use tidelock_quota::Rate;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A self-signed certificate of openssl: the judge of these tests looks at nothing else.
fn certified(dir: &Path, name: &str) -> CertifiedKey {
    let (key, certificate) = (format!("{name}.key"), format!("{name}.crt"));
    let subject = format!("/CN={name}");
    let made = Command::new("openssl")
        .current_dir(dir)
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ])
        .args([
            "-nodes",
            "-keyout",
            &key,
            "-out",
            &certificate,
            "-days",
            "2",
            "-subj",
            &subject,
        ])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    let chain = vec![CertificateDer::from_pem_file(dir.join(certificate)).unwrap()];
    let key = PrivateKeyDer::from_pem_file(dir.join(key)).unwrap();
    CertifiedKey::from_der(chain, key, &default_provider()).unwrap()
}

/// Takes one certificate, until it is told not to.
#[derive(Debug)]
struct Judge {
    own: Arc<CertifiedKey>,
    known: CertificateDer<'static>,
    revoked: AtomicBool,
}

impl CertifiedCallers for Judge {
    fn certificate(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.own)
    }

    fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<Grant, RefusedCertificate> {
        let code = match chain.first() {
            Some(leaf) if *leaf != self.known => "CERT_UNKNOWN_CA",
            Some(_) if self.revoked.load(Ordering::SeqCst) => "CERT_REVOKED",
            Some(_) => {
                let scopes = Scopes {
                    decide: true,
                    ..Scopes::default()
                };
                return Ok(Grant::new("Workload", "spiffe://td/crane", scopes).unwrap());
            }
            None => "CERT_ABSENT",
        };
        Err(RefusedCertificate {
            code,
            message: "as told".to_owned(),
        })
    }
}

/// The client does not look at the door's certificate: that is tested with curl.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = default_provider().signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

struct Running {
    script: Arc<Script>,
    judge: Arc<Judge>,
    known: Arc<CertifiedKey>,
    stranger: Arc<CertifiedKey>,
    handle: GatewayHandle,
    address: std::net::SocketAddr,
    windows: Arc<Mutex<Vec<RefusalWindow>>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Drained>,
    _dir: tempfile::TempDir,
}

async fn start(limits: GatewayLimits) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let known = Arc::new(certified(dir.path(), "crane"));
    let judge = Arc::new(Judge {
        own: Arc::new(certified(dir.path(), "door")),
        known: known.cert[0].clone(),
        revoked: AtomicBool::new(false),
    });
    let (script, windows) = (Arc::new(Script::default()), Arc::new(Mutex::default()));
    let seen = Arc::clone(&windows);
    let config = GatewayConfig {
        tcp: None,
        unix: Some(UnixDoor::new(dir.path().join("s"))),
        auth: AuthConfig::default().tokens(tokens()),
        public_url: None,
        proxies: Default::default(),
        limits,
    };
    let parts = GatewayParts {
        decider: Arc::clone(&script) as Arc<dyn Decider>,
        operator: None,
        on_refused: Arc::new(move |window| {
            let windows: &Mutex<Vec<RefusalWindow>> = &seen;
            windows.lock().unwrap().push(window);
        }),
    };
    let mut gateway = Gateway::bind(config, parts).await.unwrap();
    let door = TlsDoor {
        address: "127.0.0.1:0".parse().unwrap(),
        provider: Arc::new(default_provider()),
        callers: Arc::clone(&judge) as Arc<dyn CertifiedCallers>,
    };
    gateway.open_tls(door).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let (address, handle) = (gateway.tls_addr().unwrap(), gateway.handle());
    let task = tokio::spawn(gateway.serve(async {
        let _ = stopped.await;
    }));
    Running {
        script,
        judge,
        known,
        stranger: Arc::new(certified(dir.path(), "stranger")),
        handle,
        address,
        windows,
        stop,
        task,
        _dir: dir,
    }
}

/// A client's one certificate, or none.
#[derive(Debug)]
struct Bring(Option<Arc<CertifiedKey>>);

impl rustls::client::ResolvesClientCert for Bring {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl Running {
    async fn connect(
        &self,
        with: Option<&Arc<CertifiedKey>>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_client_cert_resolver(Arc::new(Bring(with.cloned())));
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("door.example").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }

    async fn stop(self) -> Vec<RefusalWindow> {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
        self.windows.lock().unwrap().clone()
    }
}

/// One exchange on an open connection; nothing where the door hung up.
async fn ask(stream: &mut TlsStream<TcpStream>, headers: &str) -> Option<String> {
    let body = "\"POLICY_ALLOW\"";
    let request = format!(
        "POST /v1/decide HTTP/1.1\r\nhost: harbour-a.example\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = soon(stream.read(&mut buffer)).await.ok()?;
        text.extend_from_slice(&buffer[..read]);
        let so_far = String::from_utf8_lossy(&text).into_owned();
        let whole = so_far.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let lengths = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            lengths.is_some_and(|length| body.len() >= length.parse().unwrap())
        });
        if whole {
            return Some(so_far);
        }
        if read == 0 {
            return None;
        }
    }
}

#[tokio::test]
async fn a_certificate_is_its_principal_and_a_revocation_counts_on_the_open_connection() {
    let node = start(quick()).await;
    let mut stream = node.connect(Some(&node.known)).await.unwrap();
    let answer = ask(&mut stream, "").await.unwrap();
    assert_eq!(status(&answer), 200, "{answer}");
    let caller = node.script.asked()[0].caller.clone();
    assert_eq!(
        (
            caller.principal_type.as_str(),
            caller.principal_id.as_str(),
            caller.door
        ),
        ("Workload", "spiffe://td/crane", "tls")
    );
    assert!(!caller.may_act_as);

    // A token on top is one credential too many, a good one too.
    let token = format!("authorization: Bearer {FULL}\r\n");
    let answer = ask(&mut stream, &token).await.unwrap();
    assert_eq!(status(&answer), 401);
    assert!(answer.contains("TWO_CREDENTIALS"), "{answer}");
    assert_eq!(
        status(&ask(&mut stream, "").await.unwrap()),
        200,
        "positive control"
    );

    node.judge.revoked.store(true, Ordering::SeqCst);
    let answer = ask(&mut stream, "").await.unwrap();
    assert_eq!(status(&answer), 401);
    assert!(answer.contains("CERT_REFUSED"), "{answer}");
    assert!(
        ask(&mut stream, "").await.is_none(),
        "the connection is closed"
    );
    assert_eq!(node.script.asked().len(), 2);
    let windows = node.stop().await;
    assert_eq!(windows[0].codes["CERT_REVOKED"], 1, "{windows:?}");
    assert!(
        windows[0].sources[0]
            .source
            .to_string()
            .starts_with("tls:127.")
    );
}

#[tokio::test]
async fn nobody_without_a_good_certificate_says_a_word() {
    let node = start(quick()).await;
    for (with, code) in [
        (None, "CERT_ABSENT"),
        (Some(&node.stranger), "CERT_UNKNOWN_CA"),
    ] {
        // In TLS 1.3 a client is done before it is judged: the refusal comes with the first byte.
        if let Ok(mut stream) = node.connect(with).await {
            let token = format!("authorization: Bearer {FULL}\r\n");
            assert!(ask(&mut stream, &token).await.is_none(), "{code}");
        }
        let counted = || {
            let stats = node.handle.stats().credentials;
            stats
                .iter()
                .any(|(counted, count)| *counted == code && *count == 1)
        };
        until(counted).await;
    }
    // Plain HTTP at this door is no request.
    let mut plain = TcpStream::connect(node.address).await.unwrap();
    plain
        .write_all(common::decide(FULL, "\"POLICY_ALLOW\"").as_bytes())
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = soon(plain.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    assert_eq!(node.script.asked().len(), 0);
    let mut stream = node.connect(Some(&node.known)).await.unwrap();
    assert_eq!(
        status(&ask(&mut stream, "").await.unwrap()),
        200,
        "positive control"
    );
    let windows = node.stop().await;
    assert_eq!(windows[0].codes["TLS_HANDSHAKE"], 1, "{windows:?}");
}

#[tokio::test]
async fn inv_07_handshakes_that_stall_end_and_keep_no_caller_out() {
    let limits = GatewayLimits {
        strangers: 8,
        head_timeout: Duration::from_secs(2),
        ..quick()
    };
    let node = start(limits).await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        // The beginning of a handshake record.
        stream.write_all(&[22, 3, 1, 2, 0]).await.unwrap();
        stalled.push(stream);
    }
    let mut stream = soon(node.connect(Some(&node.known))).await.unwrap();
    assert_eq!(status(&ask(&mut stream, "").await.unwrap()), 200);
    assert!(
        node.handle.stats().connections_strangers <= 2,
        "a quarter for one address"
    );
    // The last of them is closed without another's doing.
    let mut last = stalled.pop().unwrap();
    let mut rest = Vec::new();
    let _ = soon(last.read_to_end(&mut rest)).await;
    node.stop().await;
}

#[tokio::test]
async fn inv_13_the_handshakes_of_one_address_have_a_rate_and_cost_next_to_nothing_beyond_it() {
    let limits = GatewayLimits {
        handshakes: Rate {
            per_second: 1,
            burst: 3,
        },
        ..quick()
    };
    let node = start(limits).await;
    // The control: within the burst a caller gets in, and what it has goes on.
    let mut stream = node.connect(Some(&node.known)).await.unwrap();
    assert_eq!(status(&ask(&mut stream, "").await.unwrap()), 200);
    let mut refused = 0_u64;
    for _ in 0..12 {
        refused += u64::from(node.connect(Some(&node.known)).await.is_err());
    }
    assert!(refused >= 6, "{refused}");
    let stats = node.handle.stats();
    assert!(stats.accepted + refused == 13, "{stats:?}");
    let counted = |rows: &[(&str, u64)], name: &str| {
        rows.iter().find(|(row, _)| *row == name).map(|row| row.1)
    };
    assert_eq!(counted(&stats.credentials, "HANDSHAKE_RATE"), Some(refused));
    assert_eq!(counted(&stats.refused, "rate_limited"), Some(refused));
    assert_eq!(status(&ask(&mut stream, "").await.unwrap()), 200);
    // The bucket fills again.
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let mut later = node.connect(Some(&node.known)).await.unwrap();
    assert_eq!(status(&ask(&mut later, "").await.unwrap()), 200);
    let windows = node.stop().await;
    assert!(windows[0].codes["HANDSHAKE_RATE"] >= refused, "{windows:?}");
}

/// Streams of HTTP/2 share a connection, and with it the certificate: after one was refused the client has
/// to shake hands anew, and nothing further is begun for it.
#[tokio::test]
async fn an_http2_connection_ends_after_its_certificate_was_refused() {
    let node = start(quick()).await;
    let stream = node.connect(Some(&node.known)).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let connection = tokio::spawn(connection);
    let asked = |body: &'static str| {
        Request::post("https://harbour-a.example/v1/decide")
            .body(Full::new(Bytes::from_static(body.as_bytes())))
            .unwrap()
    };
    // The control: streams one after the other, and one that is under way when the refusal comes.
    for _ in 0..3 {
        let answer = soon(sender.send_request(asked("\"POLICY_ALLOW\""))).await;
        assert_eq!(answer.unwrap().status(), 200);
    }
    let under_way = tokio::spawn(sender.send_request(asked("\"wait\"")));
    until(|| node.script.waiting() == 1).await;
    assert_eq!(node.handle.stats().connections_known, 1);

    node.judge.revoked.store(true, Ordering::SeqCst);
    let refused = soon(sender.send_request(asked("\"POLICY_ALLOW\""))).await;
    assert_eq!(refused.unwrap().status(), 401);
    // Nothing further begins, though the client has read no more than its answer.
    let further = soon(sender.send_request(asked("\"POLICY_ALLOW\""))).await;
    if let Ok(answer) = further {
        assert_eq!(answer.status(), 401);
    }
    until(|| sender.is_closed()).await;
    assert_eq!(node.script.asked().len(), 4, "nothing was judged after it");
    // What was judged before it ends, and the connection with it.
    node.script.release();
    assert_eq!(soon(under_way).await.unwrap().unwrap().status(), 200);
    let _ = soon(connection).await.unwrap();
    until(|| node.handle.stats().connections_known == 0).await;
    // A certificate that is good again needs another handshake, and gets it.
    node.judge.revoked.store(false, Ordering::SeqCst);
    let mut again = node.connect(Some(&node.known)).await.unwrap();
    assert_eq!(status(&ask(&mut again, "").await.unwrap()), 200);
}
