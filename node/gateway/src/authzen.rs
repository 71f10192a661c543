//! The door of the OpenID AuthZEN Authorization API 1.0.
//!
//! Reading is the interceptor's ([`Evaluation`], [`Search`]); this is the protocol around it. A
//! decision is always HTTP 200, whatever its reason: an enforcement point that lets things pass when
//! its decision point fails must not be brought to it by a full disk (decision 0029). Other statuses
//! say that a request was not judged, with one string of JSON as the body.

use std::collections::VecDeque;
use std::sync::Arc;

use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use tidelock_interceptor::limits::MAX_REQUEST_ID_BYTES;
use tidelock_interceptor::{
    Answer, Ask, Caller, Decision, Evaluation, Evaluations, FoundOne, InvalidCode, InvalidRequest,
    Mode, Posture, Reason, Search, SearchFor, SearchRefused, Semantic,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::auth::Scopes;
use crate::limits::{BATCH_TIMEOUT, BATCH_TOGETHER, BODY_BYTES_MAX};
use crate::refusals::Source;
use crate::routes::{
    GET_ONLY, POST_ONLY, Reply, Visit, asked, begin, blocking, closing, json as json_reply,
    outcome_of, problem, set, unanswered, wrong_method,
};
use crate::slots::Slot;
use crate::wire::{
    AuthzenConfiguration, AuthzenEvaluation, AuthzenEvaluations, AuthzenRequest, AuthzenSearch,
    Problem, REQUEST_ID,
};

const CONFIGURATION: &str = "/.well-known/authzen-configuration";
const EVALUATION: &str = "/access/v1/evaluation";
const EVALUATIONS: &str = "/access/v1/evaluations";
const SEARCH: &str = "/access/v1/search/";

/// Whether a path is of this protocol.
pub(crate) fn is_ours(path: &str) -> bool {
    [CONFIGURATION, EVALUATION, EVALUATIONS].contains(&path) || searched(path).is_some()
}

fn searched(path: &str) -> Option<SearchFor> {
    match path.strip_prefix(SEARCH)? {
        "subject" => Some(SearchFor::Subject),
        "resource" => Some(SearchFor::Resource),
        "action" => Some(SearchFor::Action),
        _ => None,
    }
}

/// Answers one request of this protocol.
pub(crate) async fn answer(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    let id = match request_id(request.headers()) {
        Ok(id) => id.cloned(),
        Err(refused) => return in_words(*refused),
    };
    let text = id
        .as_ref()
        .and_then(|id| id.to_str().ok().map(str::to_owned));
    let text = text.as_deref();
    let is_post = *request.method() == Method::POST;
    let is_get = *request.method() == Method::GET;
    let path = request.uri().path();
    let wanted = searched(path);
    let answered = match (path, wanted) {
        (CONFIGURATION, _) if is_get => configuration(visit, &request),
        (CONFIGURATION, _) => wrong_method(GET_ONLY),
        _ if !is_post => wrong_method(POST_ONLY),
        (EVALUATION, _) => evaluation(visit, request, text).await,
        (EVALUATIONS, _) => evaluations(visit, request, text).await,
        (_, Some(SearchFor::Subject)) => search_subject(visit, request, text).await,
        (_, Some(SearchFor::Resource)) => search_resource(visit, request, text).await,
        (_, _) => search_action(visit, request, text).await,
    };
    let mut answered = in_words(answered);
    if let Some(id) = id {
        set(&mut answered, REQUEST_ID, id);
    }
    answered
}

/// What was refused before it came here, with the request's id if that can be given back.
pub(crate) fn with_request_id(mut refused: Reply, headers: &HeaderMap) -> Reply {
    if let Ok(Some(id)) = request_id(headers) {
        set(&mut refused, REQUEST_ID, id.clone());
    }
    refused
}

/// The one `X-Request-ID` that can be given back and recorded as it is.
fn request_id(headers: &HeaderMap) -> Result<Option<&HeaderValue>, Box<Reply>> {
    let mut given = headers.get_all(REQUEST_ID).iter();
    let (first, second) = (given.next(), given.next());
    let is_good = |id: &HeaderValue| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    if second.is_none() && first.is_none_or(is_good) {
        return Ok(first);
    }
    let message = "X-Request-ID must be given once, as 1 to 128 visible ASCII characters";
    Err(Box::new(problem(
        StatusCode::BAD_REQUEST,
        "invalid_request",
        message,
    )))
}

/// The protocol's errors are one string.
fn in_words(mut answered: Reply) -> Reply {
    let Some(Problem { error, message, .. }) = answered.extensions_mut().remove() else {
        return answered;
    };
    let words = serde_json::to_vec(&format!("{error}: {message}")).unwrap_or_default();
    let (mut parts, _) = answered.into_parts();
    parts.headers.remove(hyper::header::CONTENT_LENGTH);
    Reply::from_parts(parts, http_body_util::Full::new(Bytes::from(words)))
}

fn invalid(status: StatusCode, invalid: &InvalidRequest) -> Reply {
    let message = format!("{}: {}", invalid.code(), invalid.message());
    problem(status, Reason::InvalidRequest.as_str(), &message)
}

/// What speaking for somebody else without being allowed to is, and what anything else is that
/// cannot be read.
fn status_of(invalid: &InvalidRequest) -> StatusCode {
    match invalid.code() {
        InvalidCode::PrincipalMismatch => StatusCode::FORBIDDEN,
        _ => StatusCode::BAD_REQUEST,
    }
}

/// Caller, slot and body: what every request of this protocol needs before it is read.
struct Arrived {
    caller: Caller,
    /// Held until the last record of the request is made, also when its caller has hung up.
    slot: Arc<Slot>,
    body: Bytes,
}

async fn arrive(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    scope: fn(&Scopes) -> bool,
) -> Result<Arrived, Box<Reply>> {
    let app = visit.app;
    let identity = visit.scoped_caller(request.headers(), scope)?;
    let is_json = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .map(|kind| kind.split(';').next().unwrap_or_default().trim())
        .is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"));
    if !is_json {
        let message = "Content-Type must be application/json";
        let refused = problem(StatusCode::BAD_REQUEST, "invalid_request", message);
        return Err(Box::new(closing(refused)));
    }
    let Some(slot) = app.slots.take(&identity.in_flight) else {
        return Err(Box::new(visit.busy()));
    };
    let body = visit
        .body(request.into_body(), BODY_BYTES_MAX, app.body_timeout)
        .await?;
    Ok(Arrived {
        caller: identity.caller(visit.source).clone(),
        slot: Arc::new(slot),
        body,
    })
}

/// Where the protocol's endpoints are.
#[utoipa::path(
    get, path = "/.well-known/authzen-configuration", tag = "authzen",
    responses(
        (status = 200, description = "The endpoints of this decision point", body = AuthzenConfiguration),
        (status = 400, description = "`X-Request-ID` cannot be given back", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
    ),
    security(())
)]
fn configuration(visit: &Visit<'_>, request: &Request<Incoming>) -> Reply {
    let host = || {
        let stated = request.uri().authority().map(ToString::to_string);
        let header = || Some(request.headers().get(HOST)?.to_str().ok()?.to_owned());
        stated
            .or_else(header)
            .unwrap_or_else(|| "localhost".to_owned())
    };
    let base = match &visit.app.public_url {
        Some(url) => url.clone(),
        None => match visit.source {
            Source::Tls(_) => format!("https://{}", host()),
            Source::Tcp(_) | Source::Unix(_) => format!("http://{}", host()),
        },
    };
    json_reply(StatusCode::OK, &AuthzenConfiguration::of(&base))
}

/// Ask for one access evaluation.
///
/// The decision is in the body; every decision is 200, a deny for want of a record included.
#[utoipa::path(
    post, path = "/access/v1/evaluation", tag = "authzen",
    request_body = AuthzenRequest,
    params(("X-Request-ID" = Option<String>, Header, min_length = 1, max_length = 128, pattern = "^[!-~]+$", description = "1 to 128 visible ASCII characters, given back")),
    responses(
        (status = 200, description = "The decision", body = AuthzenEvaluation),
        (status = 400, description = "Malformed, ambiguous or incomplete", body = String, content_type = "application/json"),
        (status = 401, description = "No or unknown credentials", body = String, content_type = "application/json",
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "The caller lacks the scope `decide`, or may not ask for this subject", body = String, content_type = "application/json"),
        (status = 408, description = "The body did not arrive in time", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "The concurrency limit", body = String, content_type = "application/json",
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "The decision did not come back in time", body = String, content_type = "application/json"),
    ),
    security(("bearer" = []), ())
)]
async fn evaluation(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
) -> Reply {
    match arrive(visit, request, |scopes| scopes.decide).await {
        Ok(arrived) => {
            let evaluation = Evaluation::read(&arrived.body, request_id);
            evaluate_one(visit, arrived, &evaluation).await
        }
        Err(refused) => *refused,
    }
}

async fn evaluate_one(visit: &Visit<'_>, arrived: Arrived, evaluation: &Evaluation) -> Reply {
    let Arrived { caller, slot, body } = arrived;
    let ask = Ask::Evaluation(evaluation);
    let Some(outcome) = asked(visit.app, ask, &caller, Mode::Decide, slot).await else {
        return unanswered();
    };
    visit.app.counters.decisions.up();
    let answer = outcome.answer;
    // What is invalid stays so where its record could not be written.
    let is_unrecorded = matches!(
        answer.reason,
        Reason::AuditUnavailable | Reason::AuditCapacity
    );
    let refusal = match answer.reason == Reason::InvalidRequest || is_unrecorded {
        true => evaluation.refusal(&caller),
        false => None,
    };
    if answer.reason == Reason::InvalidRequest || refusal.is_some() {
        // Refused as invalid by the interceptor, so that it is recorded like any other.
        let status = refusal.map_or(StatusCode::BAD_REQUEST, |e| status_of(&e));
        let refused = problem(status, Reason::InvalidRequest.as_str(), &answer.message);
        return match body.len() > BODY_BYTES_MAX {
            true => closing(refused),
            false => refused,
        };
    }
    let mut decided = json_reply(StatusCode::OK, &decision(&answer));
    if let Some(ms) = answer.retry_after_ms {
        let seconds = ms.div_ceil(1000).max(1);
        set(&mut decided, RETRY_AFTER, HeaderValue::from(seconds));
    }
    decided
}

/// Ask for several access evaluations.
///
/// Each one is decided and recorded by itself. Without `evaluations` it is one access evaluation.
#[utoipa::path(
    post, path = "/access/v1/evaluations", tag = "authzen",
    request_body = AuthzenRequest,
    params(("X-Request-ID" = Option<String>, Header, min_length = 1, max_length = 128, pattern = "^[!-~]+$", description = "1 to 128 visible ASCII characters, given back")),
    responses(
        (status = 200, description = "The decisions, in the order of the request; a faulty evaluation is `false`", body = AuthzenEvaluations),
        (status = 400, description = "The request as a whole is malformed, ambiguous or too long", body = String, content_type = "application/json"),
        (status = 401, description = "No or unknown credentials", body = String, content_type = "application/json",
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "The caller lacks the scope `decide`, or may not ask for this subject", body = String, content_type = "application/json"),
        (status = 408, description = "The body did not arrive in time", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "The concurrency limit", body = String, content_type = "application/json",
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "The decision did not come back in time", body = String, content_type = "application/json"),
    ),
    security(("bearer" = []), ())
)]
async fn evaluations(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
) -> Reply {
    let arrived = match arrive(visit, request, |scopes| scopes.decide).await {
        Ok(arrived) => arrived,
        Err(refused) => return *refused,
    };
    match Evaluations::read(&arrived.body, request_id) {
        Evaluations::One(evaluation) => evaluate_one(visit, arrived, &evaluation).await,
        Evaluations::Batch(semantic, items) => {
            let evaluations = match semantic {
                Semantic::ExecuteAll => all(visit, &arrived, &items).await,
                _ => until_clear(visit, &arrived, semantic, &items).await,
            };
            json_reply(StatusCode::OK, &AuthzenEvaluations { evaluations })
        }
    }
}

/// Every evaluation, a few on their way together, so that they share syncs and leave engines to others.
async fn all(visit: &Visit<'_>, arrived: &Arrived, items: &[Evaluation]) -> Vec<AuthzenEvaluation> {
    let deadline = Instant::now() + BATCH_TIMEOUT;
    let mut begun = VecDeque::with_capacity(BATCH_TOGETHER);
    let mut to_begin = items.iter();
    let mut made = Vec::with_capacity(items.len());
    for item in items {
        let room = BATCH_TOGETHER - begun.len();
        begun.extend(to_begin.by_ref().take(room).map(|item| {
            (Instant::now() < deadline).then(|| {
                let ask = Ask::Evaluation(item);
                let held = Arc::clone(&arrived.slot);
                begin(visit.app, ask, &arrived.caller, Mode::Decide, held)
            })
        }));
        let outcome = match begun.pop_front().flatten() {
            Some((waiting, outcome)) => outcome_of(visit.app, waiting, outcome).await,
            None => None,
        };
        let answer = outcome.map(|outcome| outcome.answer);
        made.push(one_of_batch(visit, arrived, item, answer));
    }
    made
}

/// One after the other, until the answer is clear.
async fn until_clear(
    visit: &Visit<'_>,
    arrived: &Arrived,
    semantic: Semantic,
    items: &[Evaluation],
) -> Vec<AuthzenEvaluation> {
    let deadline = Instant::now() + BATCH_TIMEOUT;
    let mut made = Vec::new();
    for item in items {
        let outcome = match Instant::now() < deadline {
            true => {
                let ask = Ask::Evaluation(item);
                let held = Arc::clone(&arrived.slot);
                asked(visit.app, ask, &arrived.caller, Mode::Decide, held).await
            }
            false => None,
        };
        let one = one_of_batch(visit, arrived, item, outcome.map(|outcome| outcome.answer));
        let is_clear = one.decision == (semantic == Semantic::PermitOnFirstPermit);
        made.push(one);
        if is_clear {
            break;
        }
    }
    made
}

fn one_of_batch(
    visit: &Visit<'_>,
    arrived: &Arrived,
    item: &Evaluation,
    answer: Option<Answer>,
) -> AuthzenEvaluation {
    let Some(answer) = answer else {
        let message = "the decision did not come back in time, nothing is permitted";
        return AuthzenEvaluation {
            decision: false,
            context: json!({"error": {"status": 503, "message": message}}),
        };
    };
    visit.app.counters.decisions.up();
    let mut one = decision(&answer);
    if answer.reason == Reason::InvalidRequest
        && let Some(refusal) = item.refusal(&arrived.caller)
        && let Value::Object(context) = &mut one.context
    {
        let status = status_of(&refusal).as_u16();
        context.insert(
            "error".to_owned(),
            json!({"status": status, "message": answer.message}),
        );
    }
    one
}

/// An answer in the protocol's form. Only an allow is `true`.
fn decision(answer: &Answer) -> AuthzenEvaluation {
    let decision = answer.decision == Decision::Allow;
    let mut obligations = Vec::new();
    if let (true, Some(record)) = (decision, &answer.record) {
        obligations.push(json!({"id": "report_outcome", "record": record}));
    }
    if answer.posture != Posture::Normal {
        obligations.push(json!({"id": "posture", "posture": answer.posture}));
    }
    let mut context = json!({
        "reason": answer.reason,
        "message": answer.message,
        "policies": answer.policies,
        "posture": answer.posture,
        "bundle": answer.bundle,
        "record": answer.record,
        "obligations": obligations,
    });
    let mut add = |key: &str, value: Option<Value>| {
        if let (Some(value), Value::Object(context)) = (value, &mut context) {
            context.insert(key.to_owned(), value);
        }
    };
    if answer.decision == Decision::Hold {
        add("hold", Some(true.into()));
    }
    if !answer.reason.is_judged() {
        add("not_judged", Some(true.into()));
    }
    add(
        "consult",
        answer
            .consult
            .as_ref()
            .and_then(|consult| serde_json::to_value(consult).ok()),
    );
    add("window", answer.window.clone().map(Value::from));
    add("retry_after_ms", answer.retry_after_ms.map(Value::from));
    add(
        "action_hash",
        answer.action_hash.map(|hash| hash.to_string().into()),
    );
    AuthzenEvaluation { decision, context }
}

/// Ask who may do this.
///
/// Subjects are the entities of the bundle. Needs the scopes `explain` and `act_as`.
#[utoipa::path(
    post, path = "/access/v1/search/subject", tag = "authzen",
    request_body = AuthzenRequest,
    params(("X-Request-ID" = Option<String>, Header, min_length = 1, max_length = 128, pattern = "^[!-~]+$", description = "1 to 128 visible ASCII characters, given back")),
    responses(
        (status = 200, description = "One page of subjects; the last has an empty `next_token`", body = AuthzenSearch),
        (status = 400, description = "Malformed, ambiguous or incomplete, or a page token of something else", body = String, content_type = "application/json"),
        (status = 401, description = "No or unknown credentials", body = String, content_type = "application/json",
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "The caller lacks the scope `explain` or `act_as`", body = String, content_type = "application/json"),
        (status = 408, description = "The body did not arrive in time", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "The concurrency limit or a quota", body = String, content_type = "application/json",
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "The search could not be recorded in time", body = String, content_type = "application/json"),
    ),
    security(("bearer" = []), ())
)]
async fn search_subject(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
) -> Reply {
    search(visit, request, request_id, SearchFor::Subject).await
}

/// Ask to what this may be done.
///
/// Resources are the entities of the bundle. Needs the scope `explain`, and `act_as` for another
/// subject than the caller.
#[utoipa::path(
    post, path = "/access/v1/search/resource", tag = "authzen",
    request_body = AuthzenRequest,
    params(("X-Request-ID" = Option<String>, Header, min_length = 1, max_length = 128, pattern = "^[!-~]+$", description = "1 to 128 visible ASCII characters, given back")),
    responses(
        (status = 200, description = "One page of resources; the last has an empty `next_token`", body = AuthzenSearch),
        (status = 400, description = "Malformed, ambiguous or incomplete, or a page token of something else", body = String, content_type = "application/json"),
        (status = 401, description = "No or unknown credentials", body = String, content_type = "application/json",
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "The caller lacks the scope `explain`, or may not ask for this subject", body = String, content_type = "application/json"),
        (status = 408, description = "The body did not arrive in time", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "The concurrency limit or a quota", body = String, content_type = "application/json",
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "The search could not be recorded in time", body = String, content_type = "application/json"),
    ),
    security(("bearer" = []), ())
)]
async fn search_resource(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
) -> Reply {
    search(visit, request, request_id, SearchFor::Resource).await
}

/// Ask what may be done.
///
/// Actions are those of the bundle's schema. Needs the scope `explain`, and `act_as` for another
/// subject than the caller.
#[utoipa::path(
    post, path = "/access/v1/search/action", tag = "authzen",
    request_body = AuthzenRequest,
    params(("X-Request-ID" = Option<String>, Header, min_length = 1, max_length = 128, pattern = "^[!-~]+$", description = "1 to 128 visible ASCII characters, given back")),
    responses(
        (status = 200, description = "One page of actions; the last has an empty `next_token`", body = AuthzenSearch),
        (status = 400, description = "Malformed, ambiguous or incomplete, or a page token of something else", body = String, content_type = "application/json"),
        (status = 401, description = "No or unknown credentials", body = String, content_type = "application/json",
            headers(("WWW-Authenticate" = String))),
        (status = 403, description = "The caller lacks the scope `explain`, or may not ask for this subject", body = String, content_type = "application/json"),
        (status = 408, description = "The body did not arrive in time", body = String, content_type = "application/json"),
        (status = 421, description = "`Host` or `Origin` is not this machine", body = Problem),
        (status = 429, description = "The concurrency limit or a quota", body = String, content_type = "application/json",
            headers(("Retry-After" = u64, description = "Seconds"))),
        (status = 431, description = "The request head is longer than 16 KiB"),
        (status = 503, description = "The search could not be recorded in time", body = String, content_type = "application/json"),
    ),
    security(("bearer" = []), ())
)]
async fn search_action(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
) -> Reply {
    search(visit, request, request_id, SearchFor::Action).await
}

async fn search(
    visit: &Visit<'_>,
    request: Request<Incoming>,
    request_id: Option<&str>,
    wanted: SearchFor,
) -> Reply {
    let arrived = match arrive(visit, request, |scopes| scopes.explain).await {
        Ok(arrived) => arrived,
        Err(refused) => return *refused,
    };
    let Arrived { caller, slot, body } = arrived;
    let search = Search::read(wanted, &body, request_id);
    let (done, outcome) = oneshot::channel();
    blocking(|| {
        visit.app.decider.search(
            search.as_ref().map_err(Clone::clone),
            &caller,
            Box::new(move |found| {
                drop(slot);
                let _ = done.send(found);
            }),
        );
    });
    match timeout(visit.app.decision_timeout, outcome).await {
        Ok(Ok(Ok(found))) => {
            let mut context = json!({
                "posture": found.posture,
                "bundle": found.bundle,
                "record": found.record,
                "judged": found.judged,
            });
            if let (Some(window), Value::Object(context)) = (found.window, &mut context) {
                context.insert("window".to_owned(), window.into());
            }
            let answer = SearchAnswer {
                page: json!({
                    "next_token": found.next_token,
                    "count": found.results.len(),
                }),
                results: found.results,
                context,
            };
            json_reply(StatusCode::OK, &answer)
        }
        Ok(Ok(Err(SearchRefused::Invalid(error)))) if body.len() > BODY_BYTES_MAX => {
            closing(invalid(status_of(&error), &error))
        }
        Ok(Ok(Err(SearchRefused::Invalid(error)))) => invalid(status_of(&error), &error),
        Ok(Ok(Err(refused @ SearchRefused::PolicyChanged))) => problem(
            StatusCode::SERVICE_UNAVAILABLE,
            refused.code(),
            &refused.to_string(),
        ),
        Ok(Ok(Err(SearchRefused::RateLimited { retry_after_ms }))) => {
            let reason = Reason::RateLimitExceeded;
            let mut refused = problem(
                StatusCode::TOO_MANY_REQUESTS,
                reason.as_str(),
                reason.message(),
            );
            let seconds = retry_after_ms.unwrap_or_default().div_ceil(1000).max(1);
            set(&mut refused, RETRY_AFTER, HeaderValue::from(seconds));
            refused
        }
        Ok(Ok(Err(SearchRefused::Unrecorded(reason)))) => problem(
            StatusCode::SERVICE_UNAVAILABLE,
            reason.as_str(),
            reason.message(),
        ),
        _ => {
            visit.app.counters.unanswered.up();
            unanswered()
        }
    }
}

#[derive(Serialize)]
struct SearchAnswer {
    results: Vec<FoundOne>,
    page: Value,
    context: Value,
}
