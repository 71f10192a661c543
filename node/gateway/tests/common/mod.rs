//! A gateway over real sockets with a decider that does as it is told.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidelock_gateway::client::Door;
use tidelock_gateway::tokens::TokenDigest;
use tidelock_gateway::{
    AuthConfig, BoxFuture, Client, Decider, Drained, Gateway, GatewayConfig, GatewayHandle,
    GatewayLimits, GatewayParts, GiveUp, Operator, OperatorError, Proxies, RefusalWindow, TokenSet,
    UnixDoor,
};
use tidelock_interceptor::{
    Answer, Ask, Caller, Decision, Done, InvalidRequest, Mode, Outcome, ProxyTerms, Reason,
    ReportDone, ReportRefused, Search, SearchDone, SearchRefused, Subject,
};
use tidelock_policy::Posture;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// May decide and explain.
pub(crate) const FULL: &str = "token-full";
/// Another principal that may decide and explain.
pub(crate) const OTHER: &str = "token-other";
/// May decide and act as others.
pub(crate) const ACT_AS: &str = "token-act-as";
/// Known, but may do nothing.
pub(crate) const BARE: &str = "token-bare";

pub(crate) fn tokens() -> TokenSet {
    let mut text = "format = 1\n".to_owned();
    for (token, principal, scopes) in [
        (FULL, "full", r#"["decide", "explain"]"#),
        (OTHER, "other", r#"["decide", "explain"]"#),
        (ACT_AS, "proxy", r#"["decide", "act_as"]"#),
        (BARE, "bare", "[]"),
    ] {
        let digest = TokenDigest::of(token.as_bytes());
        text.push_str(&format!(
            "[[tokens]]\nsha256 = \"{digest}\"\nprincipal = \"{principal}\"\nscopes = {scopes}\n"
        ));
    }
    TokenSet::parse(&text).unwrap()
}

/// What the decider was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) bytes: usize,
    pub(crate) caller: Caller,
    pub(crate) mode: Mode,
}

/// Answers with the reason code that the body holds; `"hold"` holds, `"wait"` waits for
/// [`Script::release`] or to be given up, `"stuck"` waits for the former only, `"lose"` forgets
/// the request, `"panic"` panics.
#[derive(Default)]
pub(crate) struct Script {
    asked: Mutex<Vec<Asked>>,
    waiting: Mutex<Vec<Waiting>>,
    given_up: Arc<AtomicUsize>,
    pub(crate) not_ready: Mutex<Option<String>>,
    /// Whether checks of a proxy wait, too.
    pub(crate) checks_wait: AtomicBool,
}

impl Script {
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.lock().unwrap().len()
    }

    /// How often a wait was given up.
    pub(crate) fn given_up(&self) -> usize {
        self.given_up.load(Ordering::SeqCst)
    }

    pub(crate) fn release(&self) {
        for waiting in std::mem::take(&mut *self.waiting.lock().unwrap()) {
            if let Some(done) = waiting.lock().unwrap().take() {
                done(outcome(Decision::Allow, Reason::PolicyAllow));
            }
        }
    }
}

pub(crate) fn answer(decision: Decision, reason: Reason) -> Answer {
    Answer {
        decision,
        reason,
        message: reason.message().to_owned(),
        policies: vec!["one".to_owned()],
        errors: Vec::new(),
        bundle: None,
        posture: Posture::Normal,
        record: None,
        window: None,
        action_hash: None,
        request_id: None,
        retry_after_ms: (reason == Reason::RateLimitExceeded).then_some(2_500),
        consult: None,
        explanation: None,
    }
}

fn outcome(decision: Decision, reason: Reason) -> Outcome {
    Outcome {
        answer: answer(decision, reason),
        permit: None,
    }
}

impl Decider for Script {
    fn search(&self, search: Result<&Search, InvalidRequest>, _: &Caller, done: SearchDone) {
        if let Err(error) = search {
            return done(Err(error.into()));
        }
        done(Err(SearchRefused::RateLimited {
            retry_after_ms: Some(2_500),
        }));
    }

    fn report(&self, _: &[u8], _: &Caller, done: ReportDone) {
        done(Err(ReportRefused::Unknown));
    }

    fn decide(&self, ask: Ask<'_>, caller: &Caller, mode: Mode, done: Done) -> GiveUp {
        let named;
        let body = match ask {
            Ask::Native(body) => body,
            Ask::Evaluation(evaluation) => {
                named = format!("\"{}\"", evaluation.action_name().unwrap_or_default());
                named.as_bytes()
            }
            Ask::Check(_) if self.checks_wait.load(Ordering::SeqCst) => b"\"wait\"",
            Ask::Check(_) => b"\"POLICY_ALLOW\"",
        };
        self.asked.lock().unwrap().push(Asked {
            bytes: body.len(),
            caller: caller.clone(),
            mode,
        });
        let wanted = std::str::from_utf8(body).unwrap_or_default().trim();
        let waiting: Waiting = Arc::default();
        match wanted {
            "\"wait\"" | "\"stuck\"" => {
                *waiting.lock().unwrap() = Some(done);
                self.waiting.lock().unwrap().push(Arc::clone(&waiting));
            }
            "\"lose\"" => drop(done),
            "\"panic\"" => panic!("as told"),
            "\"hold\"" => done(outcome(Decision::Hold, Reason::NoMatch)),
            _ => {
                let reason = Reason::ALL
                    .into_iter()
                    .find(|reason| wanted == format!("\"{reason}\""))
                    .unwrap_or(Reason::InvalidRequest);
                done(outcome(reason.decision(), reason));
            }
        }
        let (given_up, stuck) = (Arc::clone(&self.given_up), wanted == "\"stuck\"");
        Box::new(move || {
            given_up.fetch_add(1, Ordering::SeqCst);
            let done = if stuck {
                None
            } else {
                waiting.lock().unwrap().take()
            };
            if let Some(done) = done {
                done(outcome(Decision::Deny, Reason::AuditUnavailable));
            }
        })
    }

    fn status(&self) -> Value {
        json!({"node": "a"})
    }

    fn ready(&self) -> Result<(), String> {
        self.not_ready.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn metrics(&self) -> String {
        "tidelock_test 1\n".to_owned()
    }
}

/// Echoes, or fails as told.
pub(crate) struct Echo;

impl Operator for Echo {
    fn call(&self, op: &str, body: Value, apply: bool) -> BoxFuture<Result<Value, OperatorError>> {
        let answer = match op {
            "echo" => Ok(json!({"body": body, "apply": apply})),
            "fail" => Err(OperatorError {
                status: 409,
                code: "held".to_owned(),
                message: "it is held".to_owned(),
            }),
            // An operator that claims success by an error does not get it.
            "odd" => Err(OperatorError {
                status: 200,
                code: "odd".to_owned(),
                message: "it is odd".to_owned(),
            }),
            _ => Err(OperatorError {
                status: 404,
                code: "not_found".to_owned(),
                message: "no such operation".to_owned(),
            }),
        };
        Box::pin(async move { answer })
    }
}

type Waiting = Arc<Mutex<Option<Done>>>;

/// The principal of [`FULL`] is a proxy that asks for itself.
fn proxies() -> Proxies {
    let terms = ProxyTerms::new(true, Subject::Proxy, "Service", Vec::new()).unwrap();
    [(("Agent".to_owned(), "full".to_owned()), terms)].into()
}

/// A running gateway.
pub(crate) struct Running {
    pub(crate) script: Arc<Script>,
    pub(crate) handle: GatewayHandle,
    pub(crate) tcp: SocketAddr,
    pub(crate) unix: PathBuf,
    pub(crate) windows: Arc<Mutex<Vec<RefusalWindow>>>,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<Drained>,
    _dir: TempDir,
}

pub(crate) fn quick() -> GatewayLimits {
    GatewayLimits {
        drain_timeout: Duration::from_millis(300),
        ..GatewayLimits::default()
    }
}

pub(crate) async fn start(limits: GatewayLimits) -> Running {
    start_with(limits, AuthConfig::default().tokens(tokens()), |door| door).await
}

pub(crate) async fn start_with(
    limits: GatewayLimits,
    auth: AuthConfig,
    shape: impl FnOnce(UnixDoor) -> UnixDoor,
) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let unix = dir.path().join("gateway.sock");
    let script = Arc::new(Script::default());
    let windows = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&windows);
    let config = GatewayConfig {
        tcp: Some("127.0.0.1:0".parse().unwrap()),
        unix: Some(shape(UnixDoor::new(&unix))),
        auth,
        public_url: None,
        proxies: proxies(),
        limits,
    };
    let parts = GatewayParts {
        decider: Arc::clone(&script) as Arc<dyn Decider>,
        operator: Some(Arc::new(Echo)),
        on_refused: Arc::new(move |window| seen.lock().unwrap().push(window)),
    };
    let gateway = Gateway::bind(config, parts).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let (tcp, handle) = (gateway.tcp_addr().unwrap(), gateway.handle());
    let task = tokio::spawn(gateway.serve(async {
        let _ = stopped.await;
    }));
    Running {
        script,
        handle,
        tcp,
        unix,
        windows,
        stop: Some(stop),
        task,
        _dir: dir,
    }
}

impl Running {
    pub(crate) fn client(&self, token: Option<&str>) -> Client {
        Client::new(Door::Tcp(self.tcp), token)
            .unwrap()
            .patience(Duration::from_secs(20))
    }

    pub(crate) fn local(&self, token: Option<&str>) -> Client {
        Client::new(Door::Unix(self.unix.clone()), token).unwrap()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.unix.parent().unwrap()
    }

    /// Stops the gateway; how the drain went, and all refusals that were reported.
    pub(crate) async fn stop(mut self) -> (Drained, Vec<RefusalWindow>) {
        self.stop.take().unwrap().send(()).unwrap();
        let drained = self.task.await.unwrap();
        let windows = self.windows.lock().unwrap().clone();
        (drained, windows)
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.tcp).await.unwrap()
    }

    /// Sends these bytes on a connection of their own and reads until the gateway hangs up, or
    /// until one whole answer has come.
    pub(crate) async fn raw(&self, request: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        read_answer(&mut stream).await
    }
}

/// Reads one answer, head and body; what came of it if the gateway hangs up before.
pub(crate) async fn read_answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = soon(stream.read(&mut buffer)).await.unwrap_or(0);
        text.extend_from_slice(&buffer[..read]);
        let so_far = String::from_utf8_lossy(&text);
        let whole = so_far.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            head.lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .is_some_and(|length| body.len() >= length.parse().unwrap())
        });
        if read == 0 || whole {
            return so_far.into_owned();
        }
    }
}

/// Nothing in these tests takes long; what does is stuck.
pub(crate) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("it is stuck")
}

/// Waits until something has come about.
pub(crate) async fn until(mut reached: impl FnMut() -> bool) {
    soon(async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

pub(crate) fn status(answer: &str) -> u16 {
    answer
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0)
}

pub(crate) fn header<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let (head, _) = answer.split_once("\r\n\r\n")?;
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(": ")?;
        key.eq_ignore_ascii_case(name).then_some(value)
    })
}

pub(crate) fn body(answer: &str) -> Value {
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

/// A decide request as text.
pub(crate) fn decide(token: &str, body: &str) -> String {
    format!(
        "POST /v1/decide HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}
