//! The doors of Envoy's external authorization (`envoy.service.auth.v3`), over gRPC and over HTTP.
//!
//! Reading a request is the interceptor's ([`Check`]); this is the protocol around it. Only proxies that
//! the configuration names are answered, each by its own [`ProxyTerms`]. Whatever this node can answer is
//! a deny and never an error: a proxy that lets things pass when its authorizer fails must not be brought
//! to it by a full disk, a long header or a flood (decisions 0029, 0035).

mod messages;

use std::collections::BTreeMap;
use std::future::{Ready, ready};

use http_body_util::{Either, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue as HttpValue};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};
use serde_json::json;
use tidelock_interceptor::{
    Answer, Ask, Check, Decision, InvalidCode, Mode, Proxied, ProxyTerms, Reason, RecordPosition,
};
use tonic::codec::{Codec as _, Streaming};
use tonic::server::{Grpc, UnaryService};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use self::messages::{
    BoolValue, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderValue, HeaderValueOption,
    HttpResponse, HttpStatus, OkHttpResponse,
};
use crate::credentials::CredentialFault;
use crate::limits::{BODY_BYTES_MAX, GRPC_PREFIX_BYTES, PROXY_DECISION_TIMEOUT};
use crate::refusals::{RefusalKind, Source};
use crate::routes::{
    POST_ONLY, Refused, Reply, Visit, begin, outcome_within, problem, set, unanswered, wrong_method,
};
use crate::wire::Problem;

/// The one method of the service.
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
/// The prefix that a proxy puts before the path of the request that it asks about.
const PREFIX: &str = "/envoy/v3/check";

const DECISION: &str = "x-tidelock-decision";
const REASON: &str = "x-tidelock-reason";
const RECORD: &str = "x-tidelock-record";
const WINDOW: &str = "x-tidelock-window";
const POSTURE: &str = "x-tidelock-posture";
const CONTENT_TYPE_NAME: &str = "content-type";
const CACHE_CONTROL_NAME: &str = "cache-control";
const RETRY_AFTER_NAME: &str = "retry-after";
/// How a proxy of the HTTP form is told what to remove.
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// Headers by which some servers take another method or path than the one that was judged, and one that
/// only denies have.
const NEVER_FORWARDED: [&str; 6] = [
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-original-url",
    "x-rewrite-url",
    WINDOW,
];

/// `OVERWRITE_IF_EXISTS_OR_ADD`: what a client says in our name is replaced.
const OVERWRITE: i32 = 2;

/// A message of length nothing, as gRPC frames it.
const NO_MESSAGE: Bytes = Bytes::from_static(&[0; GRPC_PREFIX_BYTES]);

/// The proxies that may ask, by type and id of the principal they authenticate as.
pub type Proxies = BTreeMap<(String, String), ProxyTerms>;

/// A reply of any door; that of gRPC ends with trailers.
pub(crate) type AnyReply = Response<Either<Full<Bytes>, tonic::body::Body>>;

/// Whether a request is for one of these doors.
pub(crate) fn is_ours(path: &str) -> bool {
    path == CHECK || path.starts_with(PREFIX)
}

/// Whether the caller is known by something that no web page can bring along. `Host` is then not asked
/// for where a browser was led: a proxy sends the host of the request that it asks about, or its own name
/// for this node.
pub(crate) fn has_credentials(source: Source, headers: &HeaderMap) -> bool {
    matches!(source, Source::Unix(_)) || headers.contains_key(AUTHORIZATION)
}

/// Answers one request of a proxy.
pub(crate) async fn answer(visit: &Visit<'_>, request: Request<Incoming>) -> AnyReply {
    if request.uri().path() == CHECK {
        return over_grpc(visit, request).await;
    }
    over_http(visit, request).await.map(Either::Left)
}

/// What a proxy sends its question in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Grpc,
    Http,
}

async fn over_grpc(visit: &Visit<'_>, request: Request<Incoming>) -> AnyReply {
    let is_grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .and_then(|kind| kind.strip_prefix("application/grpc"))
        .is_some_and(|rest| matches!(rest, "" | "+proto") || rest.starts_with(';'));
    if request.method() != Method::POST {
        return wrong_method(POST_ONLY).map(Either::Left);
    }
    if !is_grpc || request.version() != Version::HTTP_2 {
        let message = "this is a gRPC service: HTTP/2 and application/grpc";
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return problem(status, "unsupported_media_type", message).map(Either::Left);
    }
    let told = told(visit, request, Form::Grpc).await;
    // What was asked is read already, so the framing of the answer is given a question of no length.
    Grpc::new(Messages::default())
        .unary(Say(told.message()), Request::new(Full::new(NO_MESSAGE)))
        .await
        .map(Either::Right)
}

async fn over_http(visit: &Visit<'_>, request: Request<Incoming>) -> Reply {
    told(visit, request, Form::Http).await.reply()
}

/// Caller, slot, body, decision: the way of every request here.
async fn told(visit: &Visit<'_>, request: Request<Incoming>, form: Form) -> Told {
    judge(visit, request, form)
        .await
        .unwrap_or_else(|refused| Told::refused(&refused))
}

async fn judge(visit: &Visit<'_>, request: Request<Incoming>, form: Form) -> Result<Told, Refused> {
    let app = visit.app;
    let (head, body) = request.into_parts();
    let identity = visit.scoped_caller(&head.headers, |scopes| scopes.decide)?;
    let caller = identity.caller(visit.source);
    let named = (caller.principal_type.clone(), caller.principal_id.clone());
    // One check is read by one config, whatever is reloaded meanwhile.
    let proxies = app.proxies.load_full();
    let Some(terms) = proxies.get(&named) else {
        visit.refuse(RefusalKind::MissingScope);
        let message = "this caller is not one of gateway.proxies";
        return Err(Box::new(problem(
            StatusCode::FORBIDDEN,
            "not_a_proxy",
            message,
        )));
    };
    // What this form asks about stands in headers, and a signature covers none of them.
    if form == Form::Http && visit.is_signed() {
        let fault = CredentialFault::SignatureComponents;
        return Err(Box::new(visit.unauthenticated(fault)));
    }
    let Some(slot) = app.slots.take(&identity.in_flight) else {
        return Err(Box::new(visit.busy()));
    };
    let limit = BODY_BYTES_MAX + GRPC_PREFIX_BYTES;
    let body = visit.body(body, limit, app.body_timeout).await?;
    let check = match form {
        // Whatever the beginning is, it is not the request (INV-15).
        _ if body.len() > limit => {
            let message = "more than 64 KiB: let the proxy send fewer headers, and no bodies";
            Check::unreadable(InvalidCode::TooLarge, message, body.len())
        }
        Form::Grpc => of_message(terms, &body).await,
        Form::Http => of_request(terms, &head, &body),
    };
    let (waiting, outcome) = begin(app, Ask::Check(&check), caller, Mode::Decide, slot);
    let patience = app.decision_timeout.min(PROXY_DECISION_TIMEOUT);
    let asked = outcome_within(app, patience, waiting, outcome).await;
    let outcome = asked.ok_or_else(|| Box::new(unanswered()))?;
    app.counters.decisions.up();
    Ok(Told::of(&outcome.answer, terms))
}

/// What both forms of the service carry.
type Messages = ProstCodec<CheckResponse, CheckRequest>;

/// Reads the one message of a call.
async fn of_message(terms: &ProxyTerms, body: &Bytes) -> Check {
    let decoder = Messages::default().decoder();
    let framed = Full::new(body.clone());
    let mut messages = Streaming::new_request(decoder, framed, None, Some(BODY_BYTES_MAX));
    let (first, second) = (messages.message().await, messages.message().await);
    let http = match (first, second) {
        (Ok(Some(request)), Ok(None)) => request.attributes.and_then(|attributes| {
            let source = attributes.source.map(|peer| peer.principal);
            Some((source.unwrap_or_default(), attributes.request?.http?))
        }),
        _ => {
            let message = "this is not one CheckRequest of envoy.service.auth.v3";
            return Check::unreadable(InvalidCode::Syntax, message, body.len());
        }
    };
    let Some((source, http)) = http else {
        let message = "the check has no attributes.request.http";
        return Check::unreadable(InvalidCode::MissingField, message, body.len());
    };
    // Always empty in what Envoy sends; whoever fills them means something that is not judged.
    if !http.query.is_empty() || !http.fragment.is_empty() {
        let message = "the query belongs into path, and a fragment nowhere";
        return Check::unreadable(InvalidCode::UnknownField, message, body.len());
    }
    let raw = http.header_map.unwrap_or_default().headers;
    let raw = raw.iter().map(|header| {
        let value = match header.raw_value.is_empty() {
            true => &header.value,
            false => &header.raw_value,
        };
        (header.key.as_str(), value.as_slice())
    });
    let joined = http.headers.iter();
    let headers: Vec<(&str, &[u8])> = joined
        .map(|header| (header.key.as_str(), header.value.as_slice()))
        .chain(raw)
        .collect();
    let request = Proxied {
        method: &http.method,
        host: &http.host,
        target: &http.path,
        source: &source,
        headers: &headers,
        body: match http.raw_body.is_empty() {
            true => &http.body,
            false => &http.raw_body,
        },
    };
    Check::read(terms, &request, body.len())
}

/// Reads a request that is the one it asks about, with a prefix before its path.
fn of_request(terms: &ProxyTerms, head: &Parts, body: &Bytes) -> Check {
    let target = head.uri.path_and_query().map_or("", PathAndQuery::as_str);
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = match (head.uri.authority(), hosts.next(), hosts.next()) {
        (Some(authority), None, None) => Some(authority.as_str()),
        (None, Some(host), None) => host.to_str().ok(),
        (Some(authority), Some(host), None) if host == authority.as_str() => {
            Some(authority.as_str())
        }
        _ => None,
    };
    let Some(host) = host else {
        let message = "the request must name one host";
        return Check::unreadable(InvalidCode::MissingField, message, body.len());
    };
    let headers: Vec<(&str, &[u8])> = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_bytes()))
        .collect();
    let request = Proxied {
        method: head.method.as_str(),
        host,
        target: target.strip_prefix(PREFIX).unwrap_or_default(),
        // The HTTP form has no word of the peer.
        source: "",
        headers: &headers,
        body,
    };
    Check::read(terms, &request, body.len())
}

/// What a proxy is told, in either form.
struct Told {
    /// The status for the proxy's client; 200 is an allow, and only an allow is 200.
    status: StatusCode,
    /// For the server behind the proxy where it is an allow, else for the client.
    headers: Vec<(&'static str, String)>,
    /// What is not forwarded.
    remove: Vec<String>,
    /// For the client.
    body: String,
}

impl Told {
    fn of(answer: &Answer, terms: &ProxyTerms) -> Self {
        let mut headers = vec![
            (DECISION, answer.decision.to_string()),
            (REASON, answer.reason.to_string()),
            (POSTURE, answer.posture.to_string()),
        ];
        if let Some(RecordPosition { index, leaf }) = answer.record {
            headers.push((RECORD, format!("{index}/{leaf}")));
        }
        if let Some(window) = &answer.window {
            headers.push((WINDOW, window.clone()));
        }
        if answer.decision == Decision::Allow {
            let known = NEVER_FORWARDED.into_iter().chain(terms.subject_header());
            return Self {
                status: StatusCode::OK,
                headers,
                remove: known.map(str::to_owned).collect(),
                body: String::new(),
            };
        }
        let status = match answer.reason {
            Reason::RateLimitExceeded => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::FORBIDDEN,
        };
        Self::denied(
            status,
            headers,
            answer.reason.as_str(),
            &answer.message,
            answer.retry_after_ms,
        )
    }

    /// What was refused before it was judged. A client is not told to bring the credentials that its
    /// proxy lacks.
    fn refused(reply: &Reply) -> Self {
        let problem = reply.extensions().get::<Problem>();
        let (error, message) = problem.map_or(("refused", "not judged"), |problem| {
            (&problem.error, &problem.message)
        });
        let status = match reply.status() {
            StatusCode::TOO_MANY_REQUESTS => StatusCode::TOO_MANY_REQUESTS,
            _ => StatusCode::FORBIDDEN,
        };
        let headers = vec![(DECISION, "deny".to_owned()), (REASON, error.to_owned())];
        let retry_after_ms = problem.and_then(|problem| problem.retry_after_ms);
        Self::denied(status, headers, error, message, retry_after_ms)
    }

    fn denied(
        status: StatusCode,
        mut headers: Vec<(&'static str, String)>,
        reason: &str,
        message: &str,
        retry_after_ms: Option<u64>,
    ) -> Self {
        headers.push((CONTENT_TYPE_NAME, "application/json".to_owned()));
        headers.push((CACHE_CONTROL_NAME, "no-store".to_owned()));
        if let Some(ms) = retry_after_ms {
            headers.push((RETRY_AFTER_NAME, ms.div_ceil(1000).max(1).to_string()));
        }
        let body = json!({"decision": "deny", "reason": reason, "message": message});
        Self {
            status,
            headers,
            remove: Vec::new(),
            body: body.to_string(),
        }
    }

    /// In the form of gRPC.
    fn message(self) -> CheckResponse {
        let headers = self.headers.into_iter().map(|(key, value)| {
            let header = HeaderValue {
                key: key.to_owned(),
                value: value.into_bytes(),
                raw_value: Vec::new(),
            };
            HeaderValueOption {
                header: Some(header),
                append: Some(BoolValue { value: false }),
                append_action: OVERWRITE,
            }
        });
        let headers = headers.collect();
        let (code, http) = match self.status {
            StatusCode::OK => {
                let headers_to_remove = self.remove;
                let ok = OkHttpResponse {
                    headers,
                    headers_to_remove,
                };
                (Code::Ok, HttpResponse::Ok(ok))
            }
            status => {
                let denied = DeniedHttpResponse {
                    status: Some(HttpStatus {
                        code: i32::from(status.as_u16()),
                    }),
                    headers,
                    body: self.body,
                };
                (Code::PermissionDenied, HttpResponse::Denied(denied))
            }
        };
        CheckResponse {
            status: Some(messages::Status { code: code.into() }),
            http_response: Some(http),
        }
    }

    /// In the form of HTTP.
    fn reply(self) -> Reply {
        let mut reply = Response::new(Full::new(Bytes::from(self.body)));
        *reply.status_mut() = self.status;
        for (name, value) in self.headers {
            // Codes, numbers and hashes: visible ASCII all of them.
            if let Ok(value) = HttpValue::from_str(&value) {
                set(&mut reply, HeaderName::from_static(name), value);
            }
        }
        if let Ok(remove) = HttpValue::from_str(&self.remove.join(","))
            && !self.remove.is_empty()
        {
            set(&mut reply, TO_REMOVE, remove);
        }
        reply
    }
}

/// Answers a call with what is there already.
struct Say(CheckResponse);

impl UnaryService<CheckRequest> for Say {
    type Response = CheckResponse;
    type Future = Ready<Result<tonic::Response<CheckResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<CheckRequest>) -> Self::Future {
        ready(Ok(tonic::Response::new(std::mem::take(&mut self.0))))
    }
}
