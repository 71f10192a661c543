//! The server: opens the doors, accepts, watches, drains.
//!
//! [`Gateway::bind`] opens everything and can fail; [`Gateway::serve`] runs until it is told to
//! stop and cannot. Between the two nothing is accepted, so a node with a port in use has not
//! half started.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tidelock_quota::{AddressBlock, Rate, RateError};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::auth::{AuthConfig, Authenticator, Who};
use crate::connection::{CloseCause, Connection, Patience, Registry, Watched};
use crate::credentials::CredentialFault;
use crate::doors::{Decider, Operator};
use crate::envoy::Proxies;
use crate::guard::Guard;
use crate::limits::{
    ADMIN_SLOTS, BODY_TIMEOUT_DEFAULT, CONNECTIONS_DEFAULT, CONNECTIONS_MAX,
    DECISION_TIMEOUT_DEFAULT, DRAIN_TIMEOUT_DEFAULT, GUARD_CALLERS_MAX, H2_CONNECTION_WINDOW_BYTES,
    H2_SEND_BUFFER_BYTES, H2_STREAM_WINDOW_BYTES, H2_STREAMS_MAX, HANDSHAKE_ADDRESSES_MAX,
    HANDSHAKES_DEFAULT, HEAD_BYTES_MAX, HEAD_LIST_BYTES_MAX, HEAD_TIMEOUT_DEFAULT,
    IDLE_TIMEOUT_DEFAULT, REFUSAL_WINDOW_DEFAULT, REQUESTS_DEFAULT, SLOTS_DEFAULT, SLOTS_MAX,
    SLOTS_PER_PRINCIPAL_DEFAULT, STRANGER_TIMEOUT_DEFAULT, STRANGERS_DEFAULT, TIMEOUT_MAX,
    WRITE_TIMEOUT_DEFAULT,
};
use crate::listen::{self, ListenError, UnixDoor, UnixSocket};
use crate::nonces::NonceWindow;
use crate::refusals::{RefusalLedger, RefusalWindow, Source};
use crate::routes;
use crate::slots::Slots;
use crate::stats::{GatewayStats, Stats};
use crate::tls::{self, CertifiedCallers, TlsDoor};

/// How long to wait when the system has no descriptor for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How much the doors let in, and how long they wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayLimits {
    /// Connections of one door that have presented valid credentials.
    pub connections: usize,
    /// Connections of one door that have not.
    pub strangers: usize,
    /// Decisions in flight.
    pub slots: usize,
    /// Of those, what one principal may hold.
    pub slots_per_principal: usize,
    /// For the head of a request.
    pub head_timeout: Duration,
    /// For the body of a decide or explain request.
    pub body_timeout: Duration,
    /// For a connection to present valid credentials.
    pub stranger_timeout: Duration,
    /// For the next request.
    pub idle_timeout: Duration,
    /// For the client to take a byte of a response.
    pub write_timeout: Duration,
    /// For a decision to come back.
    pub decision_timeout: Duration,
    /// For open requests to end after the gateway was told to stop.
    pub drain_timeout: Duration,
    /// Length of the window in which refusals are counted into one summary.
    pub refusal_window: Duration,
    /// Requests of one caller, whatever they ask for.
    pub requests: Rate,
    /// Handshakes that one address may begin at the TLS door, IPv6 by its /64.
    pub handshakes: Rate,
}

impl Default for GatewayLimits {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS_DEFAULT,
            strangers: STRANGERS_DEFAULT,
            slots: SLOTS_DEFAULT,
            slots_per_principal: SLOTS_PER_PRINCIPAL_DEFAULT,
            head_timeout: HEAD_TIMEOUT_DEFAULT,
            body_timeout: BODY_TIMEOUT_DEFAULT,
            stranger_timeout: STRANGER_TIMEOUT_DEFAULT,
            idle_timeout: IDLE_TIMEOUT_DEFAULT,
            write_timeout: WRITE_TIMEOUT_DEFAULT,
            decision_timeout: DECISION_TIMEOUT_DEFAULT,
            drain_timeout: DRAIN_TIMEOUT_DEFAULT,
            refusal_window: REFUSAL_WINDOW_DEFAULT,
            requests: REQUESTS_DEFAULT,
            handshakes: HANDSHAKES_DEFAULT,
        }
    }
}

impl GatewayLimits {
    fn check(&self) -> Result<(), GatewayError> {
        let counts = [
            ("connections", self.connections, CONNECTIONS_MAX),
            ("strangers", self.strangers, CONNECTIONS_MAX),
            ("slots", self.slots, SLOTS_MAX),
            ("slots_per_principal", self.slots_per_principal, self.slots),
        ];
        for (name, value, max) in counts {
            if !(1..=max).contains(&value) {
                return Err(GatewayError::Count { name, value, max });
            }
        }
        let times = [
            ("head_timeout", self.head_timeout),
            ("body_timeout", self.body_timeout),
            ("stranger_timeout", self.stranger_timeout),
            ("idle_timeout", self.idle_timeout),
            ("write_timeout", self.write_timeout),
            ("decision_timeout", self.decision_timeout),
            ("drain_timeout", self.drain_timeout),
            ("refusal_window", self.refusal_window),
        ];
        for (name, value) in times {
            if value < Duration::from_millis(1) || value > TIMEOUT_MAX {
                return Err(GatewayError::Time { name, value });
            }
        }
        Ok(())
    }

    fn patience(&self) -> Patience {
        Patience {
            head: self.head_timeout,
            stranger: self.stranger_timeout,
            idle: self.idle_timeout,
            write: self.write_timeout,
        }
    }

    /// Often enough that the shortest patience is overrun by a quarter at most.
    fn sweep_interval(&self) -> Duration {
        let shortest = self
            .head_timeout
            .min(self.stranger_timeout)
            .min(self.idle_timeout)
            .min(self.write_timeout);
        (shortest / 4).clamp(Duration::from_millis(5), Duration::from_secs(1))
    }
}

/// Where to listen, whom to let in, how much of it.
#[derive(Clone, Debug, Default)]
pub struct GatewayConfig {
    /// A loopback address and port; port 0 takes a free one.
    pub tcp: Option<SocketAddr>,
    /// A Unix socket.
    pub unix: Option<UnixDoor>,
    /// Who may call.
    pub auth: AuthConfig,
    /// Under which URL callers reach the doors where something in front of them speaks TLS, without
    /// a slash at its end; what the AuthZEN metadata say.
    pub public_url: Option<String>,
    /// The proxies that may ask for the requests that they hold back, and how those are read.
    pub proxies: Proxies,
    /// How much the doors let in, and how long they wait.
    pub limits: GatewayLimits,
}

/// Takes the refusals of each window in which there were any. Called on the server's own task: it
/// must not block.
pub type OnRefused = Arc<dyn Fn(RefusalWindow) + Send + Sync>;

/// What stands behind the doors.
#[derive(Clone)]
pub struct GatewayParts {
    /// Decides.
    pub decider: Arc<dyn Decider>,
    /// Operates. Without it there are no operations.
    pub operator: Option<Arc<dyn Operator>>,
    /// Records refusals.
    pub on_refused: OnRefused,
}

impl fmt::Debug for GatewayParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayParts")
            .field("operator", &self.operator.is_some())
            .finish_non_exhaustive()
    }
}

/// Why the gateway cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatewayError {
    /// There is no door at all.
    #[error("the gateway has no door: give it a TCP address or a Unix socket")]
    NoDoor,
    /// A TCP door that nobody can pass.
    #[error(
        "the gateway's TCP door has no callers: give it a token file, or set `allow_anonymous_loopback = true` to let everybody on this machine in"
    )]
    TcpWithoutAuthentication,
    /// A number out of its range.
    #[error("gateway limit `{name}` is {value}, it may be 1 to {max}")]
    Count {
        /// Which.
        name: &'static str,
        /// What it was.
        value: usize,
        /// What it may be at most.
        max: usize,
    },
    /// A time out of its range.
    #[error("gateway limit `{name}` is {value:?}, it may be 1 ms to {TIMEOUT_MAX:?}")]
    Time {
        /// Which.
        name: &'static str,
        /// What it was.
        value: Duration,
    },
    /// A rate that lets nothing pass.
    #[error("requests of one caller, or handshakes of one address: {0}")]
    Rate(#[from] RateError),
    /// A door does not open.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// TLS cannot be spoken with what was given.
    #[error("the TLS door cannot be made: {0}")]
    Tls(String),
}

/// Everything that all connections share.
pub(crate) struct App {
    pub(crate) decider: Arc<dyn Decider>,
    pub(crate) operator: Option<Arc<dyn Operator>>,
    pub(crate) auth: ArcSwap<Authenticator>,
    /// Outlives every reload of who may call.
    nonces: Arc<NonceWindow>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) admin_slots: Arc<Slots>,
    /// Of principals as they are authenticated.
    pub(crate) guard: Guard<Who>,
    handshakes: Guard<AddressBlock>,
    pub(crate) refusals: RefusalLedger,
    pub(crate) counters: Stats,
    pub(crate) own_uid: u32,
    pub(crate) public_url: Option<String>,
    pub(crate) proxies: ArcSwap<Proxies>,
    pub(crate) body_timeout: Duration,
    pub(crate) decision_timeout: Duration,
    pub(crate) certified: OnceLock<Arc<dyn CertifiedCallers>>,
    tcp_connections: Registry,
    tls_connections: Registry,
    unix_connections: Registry,
    http: auto::Builder<TokioExecutor>,
}

impl App {
    pub(crate) fn stats(&self) -> GatewayStats {
        let counts = self.registries().map(Registry::count);
        let open = counts.iter().fold((0, 0), |(known, strangers), door| {
            (known + door.0, strangers + door.1)
        });
        GatewayStats::new(&self.counters, self.slots.in_use(), open)
    }

    fn registry(&self, source: Source) -> &Registry {
        match source {
            Source::Tcp(_) => &self.tcp_connections,
            Source::Tls(_) => &self.tls_connections,
            Source::Unix(_) => &self.unix_connections,
        }
    }

    fn registries(&self) -> [&Registry; 3] {
        [
            &self.tcp_connections,
            &self.tls_connections,
            &self.unix_connections,
        ]
    }

    /// Whether this source may begin another handshake; at a door without any it may.
    // INV-13: what is refused here has cost one packet each way and a look into a map.
    fn may_shake_hands(&self, source: Source) -> bool {
        let Source::Tls(from) = source else {
            return true;
        };
        if self.handshakes.check(from).is_ok() {
            return true;
        }
        let fault = CredentialFault::HandshakeRate;
        self.refusals.count(source, fault.kind());
        self.refusals.count_code(fault.code());
        self.counters.refused(fault.kind()).up();
        self.counters.credentials_refused(fault.code());
        false
    }

    /// Counts a handshake that failed; nothing of it is recorded by itself (ruling 20).
    fn handshake_failed(&self, source: Source, error: &io::Error) {
        let (code, fault) = tls::refusal_of(error);
        self.refusals.count(source, fault.kind());
        self.refusals.count_code(code);
        self.counters.refused(fault.kind()).up();
        self.counters.credentials_refused(code);
        tracing::debug!(%source, code, %error, "a handshake failed");
    }
}

/// All doors, open but not yet attended.
pub struct Gateway {
    app: Arc<App>,
    limits: GatewayLimits,
    on_refused: OnRefused,
    tcp: Option<TcpListener>,
    tls: Option<TlsListener>,
    unix: Option<UnixSocket>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway")
            .field("tcp", &self.tcp)
            .field("unix", &self.unix)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// How a drain went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were still open at the deadline and were cut.
    pub cut: usize,
}

/// A hold on a running gateway, for reloads and numbers.
#[derive(Clone)]
pub struct GatewayHandle {
    app: Arc<App>,
}

impl fmt::Debug for GatewayHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GatewayHandle")
            .field(&self.app.stats())
            .finish()
    }
}

impl GatewayHandle {
    /// Replaces who may call, from the next request on, open connections included.
    pub fn set_auth(&self, auth: AuthConfig) {
        self.app.auth.store(Arc::new(Authenticator::new(
            auth,
            self.app.own_uid,
            Arc::clone(&self.app.nonces),
        )));
    }

    /// Replaces the proxies that may ask for the requests that they hold back, from the next check on.
    pub fn set_proxies(&self, proxies: Proxies) {
        self.app.proxies.store(Arc::new(proxies));
    }

    /// Another rate of requests for each caller, from the next request on. A rate of nothing changes
    /// nothing.
    pub fn set_requests(&self, rate: Rate) {
        self.app.guard.set(rate);
    }

    /// What the gateway is doing and has done.
    #[must_use]
    pub fn stats(&self) -> GatewayStats {
        self.app.stats()
    }
}

impl Gateway {
    /// Opens the doors. Connections queue up in the kernel until [`Gateway::serve`] runs.
    ///
    /// # Errors
    ///
    /// [`GatewayError`] when a limit is out of range, a door does not open, or nobody could pass.
    pub async fn bind(config: GatewayConfig, parts: GatewayParts) -> Result<Self, GatewayError> {
        let GatewayConfig {
            tcp,
            unix,
            auth,
            public_url,
            proxies,
            limits,
        } = config;
        limits.check()?;
        if tcp.is_none() && unix.is_none() {
            return Err(GatewayError::NoDoor);
        }
        if tcp.is_some() && !auth.admits_anyone_over_tcp() {
            return Err(GatewayError::TcpWithoutAuthentication);
        }
        let tcp = match tcp {
            Some(address) => Some(listen::tcp(address).await?),
            None => None,
        };
        let unix = unix.as_ref().map(listen::unix).transpose()?;
        let own_uid = rustix::process::geteuid().as_raw();
        let nonces = Arc::<NonceWindow>::default();
        let registry = || Registry::new(limits.connections, limits.strangers);
        let app = App {
            decider: parts.decider,
            operator: parts.operator,
            auth: ArcSwap::from_pointee(Authenticator::new(auth, own_uid, Arc::clone(&nonces))),
            nonces,
            slots: Slots::new(limits.slots, limits.slots_per_principal),
            admin_slots: Slots::new(ADMIN_SLOTS, usize::MAX),
            guard: Guard::new(limits.requests, GUARD_CALLERS_MAX)?,
            handshakes: Guard::new(limits.handshakes, HANDSHAKE_ADDRESSES_MAX)?,
            refusals: RefusalLedger::default(),
            counters: Stats::default(),
            own_uid,
            public_url,
            proxies: ArcSwap::from_pointee(proxies),
            body_timeout: limits.body_timeout,
            decision_timeout: limits.decision_timeout,
            certified: OnceLock::new(),
            tcp_connections: registry(),
            tls_connections: registry().shared(),
            unix_connections: registry(),
            http: http(),
        };
        Ok(Self {
            app: Arc::new(app),
            limits,
            on_refused: parts.on_refused,
            tcp,
            tls: None,
            unix,
        })
    }

    /// Opens the door for callers on other machines, once.
    ///
    /// # Errors
    ///
    /// [`GatewayError`] when it does not open, or TLS cannot be spoken with what was given.
    pub async fn open_tls(&mut self, door: TlsDoor) -> Result<(), GatewayError> {
        let config = door
            .server_config()
            .map_err(|error| GatewayError::Tls(error.to_string()))?;
        let listener = listen::tls(door.address).await?;
        if self.app.certified.set(door.callers).is_err() {
            return Err(GatewayError::Tls("it is open already".to_owned()));
        }
        self.tls = Some(TlsListener {
            listener,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        });
        Ok(())
    }

    /// The address of the TLS door, with the port that the system chose if none was given.
    #[must_use]
    pub fn tls_addr(&self) -> Option<SocketAddr> {
        self.tls
            .as_ref()
            .and_then(|door| door.listener.local_addr().ok())
    }

    /// The TCP address, with the port that the system chose if none was given.
    #[must_use]
    pub fn tcp_addr(&self) -> Option<SocketAddr> {
        self.tcp
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }

    /// A hold on this gateway that outlives [`Gateway::serve`]'s taking it.
    #[must_use]
    pub fn handle(&self) -> GatewayHandle {
        GatewayHandle {
            app: Arc::clone(&self.app),
        }
    }

    /// Serves until `shutdown` resolves; then accepts nothing more, lets open requests end, and
    /// cuts what is left at the drain's deadline.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Drained {
        let Self {
            app,
            limits,
            on_refused,
            tcp,
            tls,
            unix,
        } = self;
        let (stop, stopped) = watch::channel(false);
        let mut doors = JoinSet::new();
        if let Some(listener) = tcp {
            doors.spawn(attend(Arc::clone(&app), listener, stopped.clone()));
        }
        if let Some(listener) = tls {
            doors.spawn(attend(Arc::clone(&app), listener, stopped.clone()));
        }
        if let Some(socket) = unix {
            doors.spawn(attend(Arc::clone(&app), socket, stopped));
        }

        let mut window_opened = Instant::now();
        let close_window = |opened: Instant| {
            if let Some(window) = app.refusals.close_window(opened.elapsed()) {
                on_refused(window);
            }
        };
        let patience = limits.patience();
        let mut sweep = interval(limits.sweep_interval());
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                _ = sweep.tick() => {
                    for registry in app.registries() {
                        registry.sweep(&patience, |cause| app.counters.closed(cause).up());
                    }
                    if window_opened.elapsed() >= limits.refusal_window {
                        close_window(window_opened);
                        window_opened = Instant::now();
                    }
                }
            }
        }

        // Each door closes its listener first and then waits for its connections.
        let _ = stop.send(true);
        let drained = timeout(limits.drain_timeout, async {
            while doors.join_next().await.is_some() {}
        })
        .await;
        let stats = app.stats();
        let cut = match drained {
            Ok(()) => 0,
            Err(_) => stats.connections_known + stats.connections_strangers,
        };
        doors.shutdown().await;
        close_window(window_opened);
        Drained { cut }
    }
}

fn http() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    // The head has its own watch (connection.rs), which knows an idle connection from a slow one.
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(HEAD_BYTES_MAX)
        .half_close(false);
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEAD_LIST_BYTES_MAX)
        .max_send_buf_size(H2_SEND_BUFFER_BYTES);
    http
}

/// Something that connections come from.
trait Door: Send + 'static {
    type Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Source)>> + Send;

    /// What shakes hands with each of its clients, where it speaks TLS.
    fn acceptor(&self) -> Option<TlsAcceptor> {
        None
    }
}

/// A TCP socket on which TLS is spoken.
struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Door for TlsListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Source)> {
        let (stream, from) = self.listener.accept().await?;
        stream.set_nodelay(true)?;
        Ok((stream, Source::Tls(AddressBlock::of(from.ip()))))
    }

    fn acceptor(&self) -> Option<TlsAcceptor> {
        Some(self.acceptor.clone())
    }
}

impl Door for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Source)> {
        let (stream, from) = TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream, Source::Tcp(AddressBlock::of(from.ip()))))
    }
}

impl Door for UnixSocket {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Source)> {
        let (stream, _) = self.listener.accept().await?;
        // What the kernel knows of the one who connected, not what anybody says.
        let uid = stream.peer_cred()?.uid();
        Ok((stream, Source::Unix(uid)))
    }
}

async fn attend<D: Door>(app: Arc<App>, door: D, mut stopped: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = stopped.changed() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = door.accept() => match accepted {
                Ok((_, source)) if !app.may_shake_hands(source) => {}
                Ok((stream, source)) => {
                    app.counters.accepted.up();
                    connections.spawn(converse(
                        Arc::clone(&app),
                        stream,
                        source,
                        door.acceptor(),
                        stopped.clone(),
                    ));
                }
                Err(error) if is_the_clients(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection could be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(door);
    while connections.join_next().await.is_some() {}
}

/// Whether accepting failed because the client went away, not because we are short of something.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::Interrupted
    )
}

async fn converse<S>(
    app: Arc<App>,
    stream: S,
    source: Source,
    acceptor: Option<TlsAcceptor>,
    mut stopped: watch::Receiver<bool>,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let registry = app.registry(source);
    let (connection, evicted) = registry.admit(source);
    // Also when a request makes this task panic.
    let _forget = Forget(registry, &connection);
    if evicted {
        app.counters.closed(CloseCause::Evicted).up();
    }
    let Some(acceptor) = acceptor else {
        return speak(&app, stream, &connection, stopped).await;
    };
    // The sweep bounds how long it takes, like the head of a request.
    let shaken = tokio::select! {
        shaken = acceptor.accept(stream) => shaken,
        () = connection.told_to_close() => return,
        _ = stopped.changed() => return,
    };
    match shaken {
        Ok(stream) => {
            let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
            connection.certified(chain.to_vec());
            // It has shown who it is: strangers that come after it do not take its place. Where there is no
            // room among the known, its requests say so.
            if let Some(callers) = app.certified.get()
                && let Ok(grant) = callers.judge(connection.certificates())
            {
                registry.make_known(&connection, &grant.who());
            }
            Box::pin(speak(&app, stream, &connection, stopped)).await;
        }
        Err(error) => app.handshake_failed(source, &error),
    }
}

/// Speaks HTTP on an open connection until it ends.
async fn speak<S>(
    app: &Arc<App>,
    stream: S,
    connection: &Arc<Connection>,
    mut stopped: watch::Receiver<bool>,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let source = connection.source();
    let io = Watched::new(TokioIo::new(stream), Arc::clone(connection));
    let service = service_fn(|request: Request<Incoming>| {
        let (app, connection) = (Arc::clone(app), Arc::clone(connection));
        async move {
            let registry = app.registry(connection.source());
            Ok::<_, Infallible>(routes::answer(&app, registry, &connection, request).await)
        }
    });
    let mut conversation = std::pin::pin!(app.http.serve_connection(io, service));
    let mut draining = *stopped.borrow();
    if draining {
        conversation.as_mut().graceful_shutdown();
    }
    loop {
        tokio::select! {
            ended = conversation.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%source, %error, "a connection ended badly");
                }
                break;
            }
            () = connection.told_to_close() => break,
            () = connection.told_to_finish(), if !draining => {
                draining = true;
                conversation.as_mut().graceful_shutdown();
            }
            _ = stopped.changed(), if !draining => {
                draining = true;
                conversation.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Takes a connection out of its registry when its task ends, however it ends.
struct Forget<'a>(&'a Registry, &'a Connection);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}
