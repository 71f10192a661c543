//! What each request gets, from its head to its answer.
//!
//! The order is the point: place (is this really meant for us), credentials, scope, slot, and only
//! then the first byte of the body. Everything that is refused before the body costs the refused
//! one a round trip and the node a counter.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    ORIGIN, RETRY_AFTER, WWW_AUTHENTICATE,
};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use serde::Serialize;
use serde_json::Value;
use tidelock_interceptor::{Answer, Ask, Caller, Decision, Mode, Outcome, Reason, ReportRefused};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::auth::{Authenticator, Identity, Known, Scopes, Stated, is_operator};
use crate::authzen;
use crate::connection::{Connection, Place, Registry};
use crate::credentials::CredentialFault;
use crate::doors::GiveUp;
use crate::envoy::{self, AnyReply};
use crate::limits::{ADMIN_BODY_BYTES_MAX, ADMIN_TIMEOUT, BODY_BYTES_MAX};
use crate::openapi;
use crate::refusals::{RefusalKind, Source};
use crate::server::App;
use crate::signatures::{self, BodyDigest, Signed};
use crate::wire::{
    AnswerOrProblem, DecideRequest, DecisionAnswer, Problem, Readiness, ReportAnswer, ReportRequest,
};

pub(crate) type Reply = Response<Full<Bytes>>;

/// A reply that ends a request early. Rare, so it is the one that is boxed.
pub(crate) type Refused = Box<Reply>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const CLOSE: HeaderValue = HeaderValue::from_static("close");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const BEARER: HeaderValue = HeaderValue::from_static("Bearer realm=\"tidelock\"");
pub(crate) const GET_ONLY: HeaderValue = HeaderValue::from_static("GET");
pub(crate) const POST_ONLY: HeaderValue = HeaderValue::from_static("POST");

/// When to come back after meeting the concurrency limit: a decision takes milliseconds.
const BUSY_RETRY: Duration = Duration::from_secs(1);

/// The path below which the operator's operations lie.
const ADMIN: &str = "/v1/admin/";

/// One request's surroundings.
pub(crate) struct Visit<'a> {
    pub(crate) app: &'a App,
    registry: &'a Registry,
    connection: &'a Connection,
    pub(crate) source: Source,
    method: Method,
    uri: Uri,
    /// What the body must be, where the request was signed.
    signed_body: OnceLock<BodyDigest>,
}

/// Answers one request.
pub(crate) async fn answer(
    app: &App,
    registry: &Registry,
    connection: &Arc<Connection>,
    request: Request<Incoming>,
) -> AnyReply {
    let _busy = connection.begin_request(request.version() == Version::HTTP_2);
    let visit = Visit {
        app,
        registry,
        connection,
        source: connection.source(),
        method: request.method().clone(),
        uri: request.uri().clone(),
        signed_body: OnceLock::new(),
    };
    let is_of_proxy = envoy::is_ours(request.uri().path());
    if is_of_proxy && envoy::has_credentials(visit.source, request.headers()) {
        return envoy::answer(&visit, request).await;
    }
    let reply = match visit.right_place(&request) {
        Err(refused) if authzen::is_ours(request.uri().path()) => {
            authzen::with_request_id(*refused, request.headers())
        }
        Err(refused) => *refused,
        Ok(()) if is_of_proxy => return envoy::answer(&visit, request).await,
        Ok(()) => answer_of(&visit, request).await,
    };
    reply.map(Either::Left)
}

/// What each resource answers a request that is meant for it.
async fn answer_of(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    let is_get = request.method() == Method::GET;
    let is_post = request.method() == Method::POST;
    match request.uri().path() {
        "/v1/decide" if is_post => decide(visit, request).await,
        "/v1/report" if is_post => report(visit, request).await,
        "/v1/explain" if is_post => explain(visit, request).await,
        "/v1/status" if is_get => status(visit, &request),
        "/healthz" if is_get => healthz(),
        "/readyz" if is_get => readyz(visit),
        "/metrics" if is_get => metrics(visit, &request),
        "/openapi.json" if is_get => openapi_json(),
        path if path.starts_with(ADMIN) && is_post => admin(visit, request).await,
        path if authzen::is_ours(path) => authzen::answer(visit, request).await,
        "/v1/decide" | "/v1/explain" | "/v1/report" => wrong_method(POST_ONLY),
        "/v1/status" | "/healthz" | "/readyz" | "/metrics" | "/openapi.json" => {
            wrong_method(GET_ONLY)
        }
        path if path.starts_with(ADMIN) => wrong_method(POST_ONLY),
        _ => problem(
            StatusCode::NOT_FOUND,
            "not_found",
            "no such resource, see /openapi.json",
        ),
    }
}

/// Ask whether an action may take effect.
///
/// 200 with `decision: allow` is the only yes. Its record is durable when the answer is sent.
#[utoipa::path(
    post, path = "/v1/decide", tag = "decisions",
    request_body = DecideRequest,
    responses(
        (status = 200, description = "Allowed, and recorded", body = DecisionAnswer),
        (status = 202, description = "On hold: it waits for a human", body = DecisionAnswer),
        (status = 400, description = "`INVALID_REQUEST`: malformed, oversized or ambiguous", body = AnswerOrProblem),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "Denied, by policy or posture, `NO_POLICY` included (DecisionAnswer); or the caller lacks the scope `decide` (Problem)", body = AnswerOrProblem),
        (status = 408, description = "The body did not arrive in time", body = Problem),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "`RATE_LIMIT_EXCEEDED` (DecisionAnswer), or `rate_limited` at the concurrency limit (Problem)", body = AnswerOrProblem,
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "`AUDIT_UNAVAILABLE`, `AUDIT_CAPACITY`, `POSTURE_CLOSED` or `ENGINE_EXHAUSTED` (DecisionAnswer); or the decision did not come back in time (Problem)", body = AnswerOrProblem),
    ),
    security(("bearer" = []), ())
)]
async fn decide(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    judge(visit, request, Mode::Decide, |scopes| scopes.decide).await
}

/// Ask what would be decided.
///
/// Same request, same answer, same status codes; but no permit is made, and the record says that
/// it was only asked for.
#[utoipa::path(
    post, path = "/v1/explain", tag = "decisions",
    request_body = DecideRequest,
    responses(
        (status = 200, description = "It would be allowed", body = DecisionAnswer),
        (status = 202, description = "It would be held", body = DecisionAnswer),
        (status = 400, description = "`INVALID_REQUEST`", body = AnswerOrProblem),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "It would be denied (DecisionAnswer); or the caller lacks the scope `explain` (Problem)", body = AnswerOrProblem),
        (status = 408, description = "The body did not arrive in time", body = Problem),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "As for decide", body = AnswerOrProblem,
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "As for decide", body = AnswerOrProblem),
    ),
    security(("bearer" = []), ())
)]
async fn explain(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    judge(visit, request, Mode::Explain, |scopes| scopes.explain).await
}

/// Tell what became of an action that was allowed here and executed elsewhere.
///
/// Once, by the caller that it was allowed to, within 24 hours.
#[utoipa::path(
    post, path = "/v1/report", tag = "decisions",
    request_body = ReportRequest,
    responses(
        (status = 200, description = "Recorded", body = ReportAnswer),
        (status = 400, description = "`INVALID_REQUEST`", body = Problem),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "`NOT_YOURS`: it was allowed to another caller; or the caller lacks the scope `decide`", body = Problem),
        (status = 404, description = "`UNKNOWN_RECORD`", body = Problem),
        (status = 408, description = "The body did not arrive in time", body = Problem),
        (status = 409, description = "`NOT_ALLOWED` or `ALREADY_REPORTED`", body = Problem),
        (status = 410, description = "`TOO_LATE`: older than what is kept", body = Problem),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "`rate_limited`", body = Problem,
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "`AUDIT_UNAVAILABLE`, `AUDIT_CAPACITY`: report again", body = Problem),
    ),
    security(("bearer" = []), ())
)]
async fn report(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    let app = visit.app;
    let identity = match visit.scoped_caller(request.headers(), |scopes| scopes.decide) {
        Ok(identity) => identity,
        Err(refused) => return *refused,
    };
    let Some(slot) = app.slots.take(&identity.in_flight) else {
        return visit.busy();
    };
    let body = visit.body(request.into_body(), BODY_BYTES_MAX, app.body_timeout);
    let body = match body.await {
        Ok(body) => body,
        Err(refused) => return *refused,
    };
    let (done, outcome) = oneshot::channel();
    blocking(|| {
        app.decider.report(
            &body,
            identity.caller(visit.source),
            Box::new(move |reported| {
                drop(slot);
                let _ = done.send(reported);
            }),
        );
    });
    let refused = match timeout(app.decision_timeout, outcome).await {
        Ok(Ok(Ok(reported))) => return json(StatusCode::OK, &reported),
        Ok(Ok(Err(refused))) => refused,
        _ => {
            app.counters.unanswered.up();
            let message =
                "the outcome was not recorded in time; report again to see whether it was";
            return problem(StatusCode::SERVICE_UNAVAILABLE, "unanswered", message);
        }
    };
    let status = match refused {
        ReportRefused::Invalid(_) => StatusCode::BAD_REQUEST,
        ReportRefused::Unknown => StatusCode::NOT_FOUND,
        ReportRefused::NotYours => StatusCode::FORBIDDEN,
        ReportRefused::NotAllowed | ReportRefused::AlreadyReported => StatusCode::CONFLICT,
        ReportRefused::TooLate => StatusCode::GONE,
        ReportRefused::Unrecorded(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let reply = problem(status, refused.code(), &refused.to_string());
    match body.len() > BODY_BYTES_MAX {
        true => closing(reply),
        false => reply,
    }
}

/// The node's state.
#[utoipa::path(
    get, path = "/v1/status", tag = "node",
    responses(
        (status = 200, description = "The node's state", body = Object),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "Too many connections with credentials are open", body = Problem,
            headers(("Retry-After" = u64, description = "Seconds"))),
    ),
    security(("bearer" = []), ())
)]
fn status(visit: &Visit<'_>, request: &Request<Incoming>) -> Reply {
    match visit.known_caller(request.headers()) {
        Ok(_) => json(StatusCode::OK, &visit.app.decider.status()),
        Err(refused) => *refused,
    }
}

/// Whether the process is alive.
#[utoipa::path(
    get, path = "/healthz", tag = "node",
    responses(
        (status = 200, description = "Alive", body = Object),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
    ),
    security(())
)]
fn healthz() -> Reply {
    reply(
        StatusCode::OK,
        JSON,
        Bytes::from_static(b"{\"alive\":true}"),
    )
}

/// Whether the node would decide now.
#[utoipa::path(
    get, path = "/readyz", tag = "node",
    responses(
        (status = 200, description = "It would", body = Readiness),
        (status = 503, description = "It would not, and why", body = Readiness),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
    ),
    security(())
)]
fn readyz(visit: &Visit<'_>) -> Reply {
    match visit.app.decider.ready() {
        Ok(()) => json(
            StatusCode::OK,
            &Readiness {
                ready: true,
                reason: None,
            },
        ),
        Err(reason) => json(
            StatusCode::SERVICE_UNAVAILABLE,
            &Readiness {
                ready: false,
                reason: Some(reason),
            },
        ),
    }
}

/// The node's metrics, for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "node",
    responses(
        (status = 200, description = "Prometheus text format 0.0.4", body = String, content_type = "text/plain"),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "Too many connections with credentials are open", body = Problem,
            headers(("Retry-After" = u64, description = "Seconds"))),
    ),
    security(("bearer" = []), ())
)]
fn metrics(visit: &Visit<'_>, request: &Request<Incoming>) -> Reply {
    match visit.known_caller(request.headers()) {
        Ok(_) => {
            let mut text = visit.app.decider.metrics();
            visit.app.stats().render(&mut text);
            reply(StatusCode::OK, PROMETHEUS, Bytes::from(text))
        }
        Err(refused) => *refused,
    }
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "node",
    responses(
        (status = 200, description = "OpenAPI 3.1", body = Object),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
    ),
    security(())
)]
fn openapi_json() -> Reply {
    reply(StatusCode::OK, JSON, openapi::bytes())
}

/// Run one of the operator's operations.
///
/// Only through the Unix socket, and only for root or the node's own user. Without `?apply=true`
/// it says what it would do and changes nothing.
#[utoipa::path(
    post, path = "/v1/admin/{op}", tag = "operator",
    params(
        ("op" = String, Path, description = "The operation"),
        ("apply" = Option<bool>, Query, description = "`true` to act; anything else, or nothing, only plans"),
    ),
    request_body(content = Object, description = "The operation's arguments; may be empty. At most 8 MiB"),
    responses(
        (status = 200, description = "What was done, or would be", body = Object),
        (status = 400, description = "The body is not JSON, or longer than 8 MiB", body = Problem),
        (status = 401, description = "No or unknown credentials", body = Problem,
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "Not the operator, or not the Unix socket", body = Problem),
        (status = 404, description = "No such operation", body = Problem),
        (status = 408, description = "The body did not arrive in time", body = Problem),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "Two operations are running already", body = Problem,
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = "default", description = "The operation failed", body = Problem),
    ),
    security(())
)]
async fn admin(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    let identity = match visit.known_caller(request.headers()) {
        Ok(identity) => identity,
        Err(refused) => return *refused,
    };
    if !is_operator(visit.source, visit.app.own_uid) {
        visit.refuse(RefusalKind::NotOperator);
        return problem(
            StatusCode::FORBIDDEN,
            "operator_only",
            "operations are for root and the node's own user, through the Unix socket",
        );
    }
    let op = request
        .uri()
        .path()
        .strip_prefix(ADMIN)
        .unwrap_or_default()
        .to_owned();
    let well_named = (1..=64).contains(&op.len())
        && op
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    let Some(operator) = visit.app.operator.as_ref().filter(|_| well_named) else {
        return problem(StatusCode::NOT_FOUND, "not_found", "no such operation");
    };
    let Some(_slot) = visit.app.admin_slots.take(&identity.in_flight) else {
        return visit.busy();
    };
    let apply = request
        .uri()
        .query()
        .is_some_and(|q| q.split('&').any(|pair| pair == "apply=true"));
    let body = match visit
        .body(request.into_body(), ADMIN_BODY_BYTES_MAX, ADMIN_TIMEOUT)
        .await
    {
        Ok(body) => body,
        Err(refused) => return *refused,
    };
    if body.len() > ADMIN_BODY_BYTES_MAX {
        let message = "the body is longer than 8 MiB";
        return closing(problem(StatusCode::BAD_REQUEST, "invalid_request", message));
    }
    let arguments = match body.is_empty() {
        true => Ok(Value::Object(serde_json::Map::new())),
        false => serde_json::from_slice(&body),
    };
    let arguments = match arguments {
        Ok(arguments) => arguments,
        Err(error) => {
            let message = format!("the body is not JSON: {error}");
            return problem(StatusCode::BAD_REQUEST, "invalid_request", &message);
        }
    };
    match timeout(ADMIN_TIMEOUT, operator.call(&op, arguments, apply)).await {
        Ok(Ok(value)) => json(StatusCode::OK, &value),
        Ok(Err(error)) => {
            let status = StatusCode::from_u16(error.status)
                .ok()
                .filter(|status| status.is_client_error() || status.is_server_error())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            problem(status, &error.code, &error.message)
        }
        Err(_) => problem(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            "the operation takes too long; it may still finish, ask for the status",
        ),
    }
}

/// The way of decide and explain.
async fn judge(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    mode: Mode,
    scope: fn(&Scopes) -> bool,
) -> Reply {
    let app = visit.app;
    let identity = match visit.scoped_caller(request.headers(), scope) {
        Ok(identity) => identity,
        Err(refused) => return *refused,
    };
    let Some(slot) = app.slots.take(&identity.in_flight) else {
        return visit.busy();
    };
    let body = match visit
        .body(request.into_body(), BODY_BYTES_MAX, app.body_timeout)
        .await
    {
        Ok(body) => body,
        Err(refused) => return *refused,
    };
    let oversized = body.len() > BODY_BYTES_MAX;

    let ask = Ask::Native(&body);
    let Some(outcome) = asked(app, ask, identity.caller(visit.source), mode, slot).await else {
        return unanswered();
    };
    app.counters.decisions.up();
    if !oversized {
        return decided(&outcome.answer);
    }
    // The rest of the body is not read. Whatever the beginning was taken for, it was not the
    // request (INV-15).
    closing(match outcome.answer.decision {
        Decision::Deny => decided(&outcome.answer),
        Decision::Allow | Decision::Hold => {
            let message = "the body is longer than a request may be";
            problem(StatusCode::BAD_REQUEST, "invalid_request", message)
        }
    })
}

/// Asks for one decision and waits for it; nothing where it did not come back in time. What is
/// `held` is given back when the decision is back, not when the caller goes.
pub(crate) async fn asked(
    app: &App,
    ask: Ask<'_>,
    caller: &Caller,
    mode: Mode,
    held: impl Send + 'static,
) -> Option<Outcome> {
    let (waiting, outcome) = begin(app, ask, caller, mode, held);
    outcome_of(app, waiting, outcome).await
}

/// Asks for one decision.
pub(crate) fn begin(
    app: &App,
    ask: Ask<'_>,
    caller: &Caller,
    mode: Mode,
    held: impl Send + 'static,
) -> (Waiting, oneshot::Receiver<Outcome>) {
    let (done, outcome) = oneshot::channel();
    let decide = || {
        app.decider.decide(
            ask,
            caller,
            mode,
            Box::new(move |outcome| {
                drop(held);
                let _ = done.send(outcome);
            }),
        )
    };
    // INV-14: whether the caller hangs up here or time runs out, the wait is given up, and no
    // permit comes of it.
    let give_up = match mode {
        Mode::Decide => decide(),
        // It asks the engines more than once, and waits for them here.
        Mode::Explain => blocking(decide),
    };
    (Waiting(Some(give_up)), outcome)
}

/// Waits for what was begun.
pub(crate) async fn outcome_of(
    app: &App,
    waiting: Waiting,
    outcome: oneshot::Receiver<Outcome>,
) -> Option<Outcome> {
    outcome_within(app, app.decision_timeout, waiting, outcome).await
}

/// The same for a caller that has less patience.
pub(crate) async fn outcome_within(
    app: &App,
    patience: Duration,
    waiting: Waiting,
    mut outcome: oneshot::Receiver<Outcome>,
) -> Option<Outcome> {
    let in_time = timeout(patience, &mut outcome).await;
    if let Ok(Ok(outcome)) = in_time {
        waiting.end();
        return Some(outcome);
    }
    // Giving up brings the deny that says why.
    app.counters.unanswered.up();
    drop(waiting);
    outcome.try_recv().ok()
}

/// INV-10: an engine may be waited for, and what else runs on this runtime goes on meanwhile.
pub(crate) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

pub(crate) fn unanswered() -> Reply {
    let message = "the decision did not come back in time, nothing is permitted";
    problem(StatusCode::SERVICE_UNAVAILABLE, "unanswered", message)
}

impl Visit<'_> {
    /// The caller, if it has this scope.
    pub(crate) fn scoped_caller(
        &self,
        headers: &HeaderMap,
        scope: fn(&Scopes) -> bool,
    ) -> Result<Arc<Identity>, Refused> {
        let identity = self.known_caller(headers)?;
        if scope(&identity.scopes) {
            return Ok(identity);
        }
        self.refuse(RefusalKind::MissingScope);
        let message = "this caller's credentials do not carry the scope for that";
        Err(Box::new(problem(
            StatusCode::FORBIDDEN,
            "missing_scope",
            message,
        )))
    }

    /// A browser that was led here by somebody else's page says so in `Origin`, or, when the
    /// name was rebound to loopback, in `Host`. Neither gets in.
    fn right_place(&self, request: &Request<Incoming>) -> Result<(), Refused> {
        let headers = request.headers();
        let host = match request.uri().authority() {
            Some(authority) => Some(authority.as_str()),
            None => headers.get(HOST).map(|host| host.to_str().unwrap_or("?")),
        };
        let host_is_ours = match self.source {
            Source::Tcp(_) => host.is_none_or(is_this_machine),
            // A rebound name does not come with a certificate.
            Source::Tls(_) | Source::Unix(_) => true,
        };
        let scheme = match self.source {
            Source::Tls(_) => "https://",
            Source::Tcp(_) | Source::Unix(_) => "http://",
        };
        let origin_is_ours = match headers.get(ORIGIN) {
            None => true,
            Some(origin) => origin
                .to_str()
                .ok()
                .and_then(|origin| origin.strip_prefix(scheme))
                .is_some_and(|origin| Some(origin) == host),
        };
        if host_is_ours && origin_is_ours {
            return Ok(());
        }
        self.refuse(RefusalKind::WrongHost);
        Err(Box::new(problem(
            StatusCode::MISDIRECTED_REQUEST,
            "wrong_host",
            "Host and Origin must name this machine: localhost, 127.0.0.1 or [::1]",
        )))
    }

    /// Who is calling. Everything that can be said without reading the body.
    fn known_caller(&self, headers: &HeaderMap) -> Result<Arc<Identity>, Refused> {
        let auth = self.app.auth.load();
        let identity = match self.source {
            Source::Tls(_) => self.certified_caller(&auth, headers),
            Source::Tcp(_) | Source::Unix(_) => {
                let request = Signed {
                    method: &self.method,
                    uri: &self.uri,
                    headers,
                };
                auth.authenticate(self.source, request)
            }
        };
        let Known { identity, body } =
            identity.map_err(|fault| Box::new(self.unauthenticated(fault)))?;
        let caller = identity.caller(self.source);
        let who = (caller.principal_type.clone(), caller.principal_id.clone());
        match self.registry.make_known(self.connection, &who) {
            Place::Taken => {}
            Place::None => return Err(Box::new(closing(self.busy()))),
            Place::NoneOfThisCaller => return Err(Box::new(closing(self.too_many_connections()))),
        }
        if let Err(wait) = self.app.guard.check(who) {
            return Err(Box::new(self.too_often(wait)));
        }
        let is_signed = body.is_some();
        if let Some(body) = body {
            // Set once: a request has one head.
            let _ = self.signed_body.set(body);
        }
        match auth.stated(&identity, headers) {
            // The signature does not cover the header, so that anybody on the way could have changed it.
            Ok(Stated::Principal(_)) if is_signed => Err(Box::new(
                self.unauthenticated(CredentialFault::TwoCredentials),
            )),
            Ok(Stated::Nobody) => Ok(identity),
            Ok(Stated::Ignored) => {
                self.app.counters.headers_ignored.up();
                Ok(identity)
            }
            Ok(Stated::Principal(stated)) => Ok(stated),
            Err(fault) => Err(Box::new(self.unauthenticated(fault))),
        }
    }

    /// The caller of the TLS door, by its certificate as it is judged now: a revocation, a reload or
    /// the certificate's end counts from the next request on.
    fn certified_caller(
        &self,
        auth: &Authenticator,
        headers: &HeaderMap,
    ) -> Result<Known, CredentialFault> {
        // A token on top of a certificate could only widen what it may.
        if headers.contains_key(AUTHORIZATION) || signatures::is_present(headers) {
            return Err(CredentialFault::TwoCredentials);
        }
        let certified = self.app.certified.get();
        let callers = certified.ok_or(CredentialFault::CertificateAbsent)?;
        let grant = callers
            .judge(self.connection.certificates())
            .map_err(|refused| {
                self.app.refusals.count_code(refused.code);
                self.app.counters.credentials_refused(refused.code);
                CredentialFault::CertificateRefused
            })?;
        Ok(auth.identity_of(&grant)?.into())
    }

    /// Nothing of what was presented is repeated: the code says enough.
    pub(crate) fn unauthenticated(&self, fault: CredentialFault) -> Reply {
        self.refuse(fault.kind());
        if fault == CredentialFault::None {
            let mut refused = problem(
                StatusCode::UNAUTHORIZED,
                "unauthenticated",
                &fault.to_string(),
            );
            set(&mut refused, WWW_AUTHENTICATE, BEARER);
            return refused;
        }
        self.app.refusals.count_code(fault.code());
        self.app.counters.credentials_refused(fault.code());
        let message = format!("{}: {fault}", fault.code());
        if matches!(fault.kind(), RefusalKind::Busy | RefusalKind::RateLimited) {
            return rate_limited(&message, BUSY_RETRY);
        }
        let mut refused = problem(StatusCode::UNAUTHORIZED, "unauthenticated", &message);
        let challenge = format!(
            "Bearer realm=\"tidelock\", error=\"invalid_token\", error_description=\"{}\"",
            fault.code()
        );
        let challenge = HeaderValue::from_str(&challenge).unwrap_or(BEARER);
        set(&mut refused, WWW_AUTHENTICATE, challenge);
        match fault {
            // Whoever renews its certificate has to shake hands anew.
            CredentialFault::CertificateRefused => {
                self.connection.finish();
                closing(refused)
            }
            _ => refused,
        }
    }

    pub(crate) fn refuse(&self, kind: RefusalKind) {
        self.app.refusals.count(self.source, kind);
        self.app.counters.refused(kind).up();
    }

    pub(crate) fn busy(&self) -> Reply {
        self.refuse(RefusalKind::Busy);
        let message = "as many requests are in progress as there may be, retry";
        rate_limited(message, BUSY_RETRY)
    }

    fn too_many_connections(&self) -> Reply {
        self.refuse(RefusalKind::Busy);
        let message = "this caller has as many connections open as one caller may, use those";
        rate_limited(message, BUSY_RETRY)
    }

    fn too_often(&self, wait: Duration) -> Reply {
        self.refuse(RefusalKind::RateLimited);
        rate_limited("this caller sends more requests than it may, retry", wait)
    }

    /// Whether the request was signed by its caller.
    pub(crate) fn is_signed(&self) -> bool {
        self.signed_body.get().is_some()
    }

    /// The whole body, or its first bytes when it is longer than `limit`: then more than `limit`
    /// bytes come back, for the interceptor to refuse and record.
    pub(crate) async fn body(
        &self,
        body: Incoming,
        limit: usize,
        patience: Duration,
    ) -> Result<Bytes, Refused> {
        match timeout(patience, collect(body, limit)).await {
            Ok(Ok(bytes)) => match self.signed_body.get() {
                // One that is longer than the limit came in part only, and is not the one either.
                Some(signed) if !signed.is_of(&bytes) => Err(Box::new(closing(
                    self.unauthenticated(CredentialFault::DigestMismatch),
                ))),
                _ => Ok(bytes),
            },
            late_or_broken => {
                self.refuse(RefusalKind::Incomplete);
                let message = if late_or_broken.is_err() {
                    "the body did not arrive in time"
                } else {
                    "the body broke off or was not well formed"
                };
                Err(Box::new(closing(problem(
                    StatusCode::REQUEST_TIMEOUT,
                    "incomplete",
                    message,
                ))))
            }
        }
    }
}

fn rate_limited(message: &str, wait: Duration) -> Reply {
    let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let mut refused = problem_reply(
        StatusCode::TOO_MANY_REQUESTS,
        Problem {
            error: "rate_limited".to_owned(),
            message: message.to_owned(),
            retry_after_ms: Some(wait_ms),
        },
    );
    let seconds = wait_ms.div_ceil(1000).max(1);
    set(&mut refused, RETRY_AFTER, HeaderValue::from(seconds));
    refused
}

/// A wait for a decision, given up when dropped.
pub(crate) struct Waiting(Option<GiveUp>);

impl Waiting {
    fn end(mut self) {
        self.0 = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(give_up) = self.0.take() {
            give_up();
        }
    }
}

async fn collect(mut body: Incoming, limit: usize) -> Result<Bytes, hyper::Error> {
    let mut first = Bytes::new();
    let mut rest = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        // The usual body comes in one piece, and is not copied.
        if first.is_empty() {
            first = data;
            if body.is_end_stream() {
                break;
            }
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&first);
            }
            rest.extend_from_slice(&data);
        }
        if first.len().max(rest.len()) > limit {
            break;
        }
    }
    Ok(if rest.is_empty() {
        first
    } else {
        Bytes::from(rest)
    })
}

/// Whether a `Host` names this machine.
fn is_this_machine(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let loopback = |text: &str| {
        text.parse()
            .is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
    };
    match name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
    {
        Some(v6) => loopback(v6),
        None => name.eq_ignore_ascii_case("localhost") || loopback(name),
    }
}

/// The status that says the same as the answer, for callers that look no further.
pub(crate) fn status_of(decision: Decision, reason: Reason) -> StatusCode {
    match (decision, reason) {
        (Decision::Allow, _) => StatusCode::OK,
        (Decision::Hold, _) => StatusCode::ACCEPTED,
        (Decision::Deny, Reason::InvalidRequest) => StatusCode::BAD_REQUEST,
        (Decision::Deny, Reason::RateLimitExceeded) => StatusCode::TOO_MANY_REQUESTS,
        (
            Decision::Deny,
            Reason::AuditUnavailable
            | Reason::AuditCapacity
            | Reason::EngineExhausted
            | Reason::PostureClosed
            | Reason::ConsultUnreachable
            | Reason::ConsultTimeout
            | Reason::ConsultInvalid
            | Reason::ConsultBusy,
        ) => StatusCode::SERVICE_UNAVAILABLE,
        (Decision::Deny, _) => StatusCode::FORBIDDEN,
    }
}

fn decided(answer: &Answer) -> Reply {
    let mut reply = json(status_of(answer.decision, answer.reason), answer);
    if reply.status() == StatusCode::TOO_MANY_REQUESTS {
        let seconds = answer
            .retry_after_ms
            .unwrap_or_default()
            .div_ceil(1000)
            .max(1);
        set(&mut reply, RETRY_AFTER, HeaderValue::from(seconds));
    }
    reply
}

pub(crate) fn wrong_method(allowed: HeaderValue) -> Reply {
    let message = "this resource is not used with that method";
    let mut refused = problem(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        message,
    );
    set(&mut refused, ALLOW, allowed);
    refused
}

pub(crate) fn problem(status: StatusCode, error: &str, message: &str) -> Reply {
    let problem = Problem {
        error: error.to_owned(),
        message: message.to_owned(),
        retry_after_ms: None,
    };
    problem_reply(status, problem)
}

/// The problem itself goes along, for a door that says it in another form.
fn problem_reply(status: StatusCode, problem: Problem) -> Reply {
    let mut reply = json(status, &problem);
    reply.extensions_mut().insert(problem);
    reply
}

pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Reply {
    let mut body = Vec::with_capacity(512);
    match serde_json::to_writer(&mut body, value) {
        Ok(()) => reply(status, JSON, Bytes::from(body)),
        // None of our types can fail; should one ever, that is no allow.
        Err(_) => reply(
            StatusCode::INTERNAL_SERVER_ERROR,
            JSON,
            Bytes::from_static(b"{}"),
        ),
    }
}

fn reply(status: StatusCode, content_type: HeaderValue, body: Bytes) -> Reply {
    let mut reply = Response::new(Full::new(body));
    *reply.status_mut() = status;
    set(&mut reply, CONTENT_TYPE, content_type);
    set(&mut reply, CACHE_CONTROL, NO_STORE);
    reply
}

pub(crate) fn set(reply: &mut Reply, name: HeaderName, value: HeaderValue) {
    reply.headers_mut().insert(name, value);
}

/// The connection ends with this answer: what is left of the request is not read.
pub(crate) fn closing(mut reply: Reply) -> Reply {
    set(&mut reply, CONNECTION, CLOSE);
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_status_and_only_one_is_200() {
        for reason in Reason::ALL {
            let expected = match reason.as_str() {
                "POLICY_ALLOW" => 200,
                "INVALID_REQUEST" => 400,
                "RATE_LIMIT_EXCEEDED" => 429,
                "AUDIT_UNAVAILABLE" | "AUDIT_CAPACITY" | "POSTURE_CLOSED" | "ENGINE_EXHAUSTED" => {
                    503
                }
                "CONSULT_UNREACHABLE" | "CONSULT_TIMEOUT" | "CONSULT_INVALID" | "CONSULT_BUSY" => {
                    503
                }
                "CONSULT_NEEDED" | "CONSULT_HELD" => 202,
                _ => 403,
            };
            assert_eq!(
                status_of(reason.decision(), reason).as_u16(),
                expected,
                "{reason}"
            );
            // Whatever the reason says, a deny is never a success.
            assert!(!status_of(Decision::Deny, reason).is_success(), "{reason}");
        }
        assert_eq!(
            status_of(Decision::Hold, Reason::PolicyAllow),
            StatusCode::ACCEPTED
        );
    }

    #[test]
    fn this_machine_is_loopback_under_its_own_names() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1",
            "127.0.0.3:80",
            "[::1]",
            "[::1]:1",
        ] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "192.0.2.1",
            "::1",
            "[::2]",
            "[localhost]",
            "localhost@evil.example",
            "?",
        ] {
            assert!(!is_this_machine(host), "{host}");
        }
    }
}
