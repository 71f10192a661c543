//! An HTTP request that a proxy holds back until it is judged (Envoy's ext_authz), read into the
//! parts of an action.
//!
//! | of the request | action |
//! | --- | --- |
//! | what the proxy's terms name: the proxy itself, the peer it authenticated, one header | principal |
//! | method | action, `net.get` for `GET` |
//! | scheme of the terms, host, path and query | resource, a `Url` |
//! | headers that the terms name | `context.headers` |
//! | a body that the proxy sent along | `context.body`: its length and hash |
//! | `x-request-id` | the request's id |
//!
//! INV-15: the proxy forwards the path as it got it, whatever is said here. So what is judged must
//! be what is forwarded: a path that is not in its one spelling already is refused, not mended
//! (decision 0035).

use serde_json::{Map, Value, json};
use tidelock_segments::Sha256Hash;

use crate::{
    action::{InvalidCode, InvalidRequest, Parts, check_type},
    limits::{MAX_CONTEXT_HEADERS, MAX_HEADER_BYTES, MAX_METHOD_BYTES},
    normalise,
};

/// Bodies that a proxy cut are marked with it.
const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";
const REQUEST_ID: &str = "x-request-id";

/// Headers that carry secrets, or that a node sets itself.
const NEVER_IN_CONTEXT: [&str; 4] = [
    "authorization",
    "cookie",
    "proxy-authorization",
    PARTIAL_BODY,
];

/// Who the principal of a proxied request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The proxy.
    Proxy,
    /// The peer that the proxy authenticated: `source.principal` of its check.
    Source,
    /// Whom this header names. The proxy must be the one that sets it.
    Header(String),
}

impl Subject {
    /// `source`, or `header:NAME`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':') {
            None if text == "source" => Some(Self::Source),
            Some(("header", name)) => Some(Self::Header(name.to_owned())),
            _ => None,
        }
    }
}

/// How the requests of one proxy are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyTerms {
    is_https: bool,
    subject: Subject,
    subject_type: String,
    context_headers: Vec<String>,
}

/// Why terms were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyTermsError {
    /// A name that no header of HTTP/2 has, or that would put secrets into records.
    #[error(
        "{name:?} cannot be read: a header is named in small letters, digits and -, and is none that carries credentials"
    )]
    Header {
        /// The name.
        name: String,
    },
    /// A header that stands there twice, or is the principal's too.
    #[error("header {name} is named twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// More than are read.
    #[error("more than {MAX_CONTEXT_HEADERS} headers")]
    TooMany,
    /// A type that no principal has.
    #[error(transparent)]
    SubjectType(#[from] InvalidRequest),
}

impl ProxyTerms {
    /// Terms of a proxy whose callers reach it over https or http.
    ///
    /// # Errors
    /// A header that is not read, or a type that no principal has.
    pub fn new(
        is_https: bool,
        subject: Subject,
        subject_type: &str,
        context_headers: Vec<String>,
    ) -> Result<Self, ProxyTermsError> {
        check_type("principal type", subject_type)?;
        if context_headers.len() > MAX_CONTEXT_HEADERS {
            return Err(ProxyTermsError::TooMany);
        }
        let mut seen: Vec<&str> = Vec::new();
        let of_subject = match &subject {
            Subject::Header(name) => Some(name),
            Subject::Proxy | Subject::Source => None,
        };
        for name in of_subject.into_iter().chain(&context_headers) {
            let is_name = (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
            if !is_name || NEVER_IN_CONTEXT.contains(&name.as_str()) {
                return Err(ProxyTermsError::Header { name: name.clone() });
            }
            if seen.contains(&name.as_str()) {
                return Err(ProxyTermsError::Twice { name: name.clone() });
            }
            seen.push(name);
        }
        Ok(Self {
            is_https,
            subject,
            subject_type: subject_type.to_owned(),
            context_headers,
        })
    }

    /// The type of those whom the proxy names, where it names others than itself.
    #[must_use]
    pub fn stated_type(&self) -> Option<&str> {
        (self.subject != Subject::Proxy).then_some(self.subject_type.as_str())
    }

    /// The header that names the principal; of no use to anybody behind the proxy.
    #[must_use]
    pub fn subject_header(&self) -> Option<&str> {
        match &self.subject {
            Subject::Header(name) => Some(name),
            Subject::Proxy | Subject::Source => None,
        }
    }
}

/// A request as its proxy describes it.
#[derive(Debug, Clone, Copy)]
pub struct Proxied<'a> {
    /// The method.
    pub method: &'a str,
    /// Host, and port where it has one.
    pub host: &'a str,
    /// Path and query, as they are forwarded.
    pub target: &'a str,
    /// The peer that the proxy authenticated; empty is nobody.
    pub source: &'a str,
    /// The headers that the proxy shows, one entry each.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The body, where the proxy sends it along.
    pub body: &'a [u8],
}

/// A proxied request that was read, or why it was not understood.
#[derive(Debug, Clone)]
pub struct Check {
    pub(crate) parts: Result<Parts, InvalidRequest>,
    pub(crate) body_bytes: usize,
}

impl Check {
    /// Reads a request. What is wrong with it is kept, for it is recorded as any other request is.
    /// `body_bytes` is the length of what the proxy sent.
    #[must_use]
    pub fn read(terms: &ProxyTerms, request: &Proxied<'_>, body_bytes: usize) -> Self {
        Self {
            parts: parts(terms, request),
            body_bytes,
        }
    }

    /// What came is no description of a request.
    #[must_use]
    pub fn unreadable(code: InvalidCode, message: &str, body_bytes: usize) -> Self {
        Self {
            parts: Err(InvalidRequest::new(code, message)),
            body_bytes,
        }
    }
}

fn parts(terms: &ProxyTerms, request: &Proxied<'_>) -> Result<Parts, InvalidRequest> {
    let name = action(request.method)?;
    let resource_id = url(terms, request)?;
    let principal = match &terms.subject {
        Subject::Proxy => None,
        Subject::Source if is_nobody(request.source) => {
            return Err(InvalidRequest::new(
                InvalidCode::MissingField,
                "the proxy does not say who sent the request: source.principal is empty",
            ));
        }
        Subject::Source => Some(request.source),
        Subject::Header(name) => {
            let named = header(request.headers, name)?.filter(|who| !is_nobody(who));
            Some(named.ok_or_else(|| {
                InvalidRequest::new(
                    InvalidCode::MissingField,
                    format!(
                        "the proxy does not say who sent the request: there is nobody in header {name}"
                    ),
                )
            })?)
        }
    };
    Ok(Parts {
        principal: principal.map(|id| (terms.subject_type.clone(), id.to_owned())),
        name,
        resource_type: "Url".to_owned(),
        resource_id,
        params: Value::Object(Map::new()),
        context: context(terms, request)?,
        request_id: header(request.headers, REQUEST_ID)?.map(str::to_owned),
    })
}

/// What a proxy says where it has authenticated nobody: nothing, or a stroke.
fn is_nobody(who: &str) -> bool {
    matches!(who, "" | "-")
}

/// Methods are told apart by case, so small letters are another method than the usual one.
fn action(method: &str) -> Result<String, InvalidRequest> {
    let good = (1..=MAX_METHOD_BYTES).contains(&method.len())
        && method.starts_with(|c: char| c.is_ascii_uppercase())
        && method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
    if !good {
        return Err(InvalidRequest::new(
            InvalidCode::Name,
            format!("method must be capital letters and -, at most {MAX_METHOD_BYTES}"),
        ));
    }
    Ok(format!("net.{}", method.to_ascii_lowercase()))
}

fn resource(message: &str) -> InvalidRequest {
    InvalidRequest::new(InvalidCode::Resource, message)
}

fn url(terms: &ProxyTerms, request: &Proxied<'_>) -> Result<String, InvalidRequest> {
    if !request.target.starts_with('/') {
        return Err(resource("path must begin with /"));
    }
    // What ends the authority early would be taken for the path.
    if request.host.contains(['/', '?', '#', '\\']) {
        return Err(resource("host is malformed"));
    }
    let scheme = if terms.is_https { "https" } else { "http" };
    let url = format!("{scheme}://{}{}", request.host, request.target);
    let url = normalise::normalise("Url", &url)?;
    let path = request.target.split('?').next().unwrap_or_default();
    let judged = url.attributes.get("path").and_then(Value::as_str);
    if judged != Some(upper_escapes(path).as_str()) {
        return Err(resource(
            "path is not in its one spelling, so that what is judged is not what is forwarded: let \
             the proxy normalise paths and merge slashes",
        ));
    }
    if path.contains(';') {
        return Err(resource(
            "some servers cut a path segment at ;, others do not",
        ));
    }
    Ok(url.id)
}

/// Both cases of an escape's digits are the same path to everybody (RFC 3986, 6.2.2.1).
fn upper_escapes(path: &str) -> String {
    let mut pieces = path.split('%');
    let mut upper = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (digits, rest) = piece.split_at_checked(2).unwrap_or((piece, ""));
        upper.push('%');
        upper.push_str(&digits.to_ascii_uppercase());
        upper.push_str(rest);
    }
    upper
}

fn context(terms: &ProxyTerms, request: &Proxied<'_>) -> Result<Value, InvalidRequest> {
    let mut context = Map::new();
    if !terms.context_headers.is_empty() {
        let mut held = Map::new();
        for name in &terms.context_headers {
            if let Some(value) = header(request.headers, name)? {
                held.insert(name.clone(), value.into());
            }
        }
        context.insert("headers".to_owned(), Value::Object(held));
    }
    // Whoever sends the mark, only a body that is whole passes.
    let is_partial = |(name, value): &(&str, &[u8])| {
        name.eq_ignore_ascii_case(PARTIAL_BODY) && *value != b"false"
    };
    if request.headers.iter().any(is_partial) {
        return Err(InvalidRequest::new(
            InvalidCode::TooLarge,
            "only the beginning of the body was sent: let the proxy refuse what it cannot send whole",
        ));
    }
    if !request.body.is_empty() {
        let body = json!({
            "bytes": request.body.len(),
            "sha256": Sha256Hash::of(request.body).to_string(),
        });
        context.insert("body".to_owned(), body);
    }
    Ok(Value::Object(context))
}

/// The one value of this header. Servers behind the proxy may take `x_user` for `x-user`, and of two
/// values the first, the last or both; so there may be one only. A proxy may have joined two with a
/// comma.
fn header<'a>(
    headers: &[(&'a str, &'a [u8])],
    wanted: &str,
) -> Result<Option<&'a str>, InvalidRequest> {
    let is_meant = |name: &str| {
        name.len() == wanted.len()
            && name
                .bytes()
                .zip(wanted.bytes())
                .all(|(b, w)| b.eq_ignore_ascii_case(&w) || (b == b'_' && w == b'-'))
    };
    let mut found = headers.iter().filter(|(name, _)| is_meant(name));
    let Some((name, value)) = found.next() else {
        return Ok(None);
    };
    let refused = |code, why: &str| InvalidRequest::new(code, format!("header {wanted} {why}"));
    if found.next().is_some() || *name != wanted {
        return Err(refused(
            InvalidCode::AmbiguousKey,
            "is there more than once, or under another spelling",
        ));
    }
    let value = std::str::from_utf8(value)
        .map_err(|_| refused(InvalidCode::NotUtf8, "holds bytes that are not UTF-8"))?;
    if value.len() > MAX_HEADER_BYTES {
        return Err(refused(
            InvalidCode::TooLarge,
            &format!("is longer than {MAX_HEADER_BYTES} bytes"),
        ));
    }
    if value.contains(',') {
        return Err(refused(
            InvalidCode::AmbiguousKey,
            "holds a comma: one value is not told from two that were joined",
        ));
    }
    normalise::plain_text(value).map_err(|error| refused(InvalidCode::Name, &error.to_string()))?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Action, Caller};

    type Headers<'a> = &'a [(&'a str, &'a [u8])];

    fn terms(subject: Subject, context_headers: &[&str]) -> ProxyTerms {
        let named = context_headers
            .iter()
            .map(|name| (*name).to_owned())
            .collect();
        ProxyTerms::new(true, subject, "Service", named).unwrap()
    }

    fn proxy(may_act_as: bool) -> Caller {
        Caller {
            principal_type: "Proxy".to_owned(),
            principal_id: "edge".to_owned(),
            may_act_as,
            door: "test",
            stated_by: None,
        }
    }

    const PLAIN: Proxied<'static> = Proxied {
        method: "GET",
        host: "shop.example",
        target: "/v1/items?page=2",
        source: "",
        headers: &[],
        body: b"",
    };

    fn action_of(terms: &ProxyTerms, request: &Proxied<'_>) -> Result<Action, InvalidRequest> {
        let check = Check::read(terms, request, 0);
        Action::from_parts(check.parts?, &proxy(true))
    }

    fn code(terms: &ProxyTerms, request: &Proxied<'_>) -> InvalidCode {
        action_of(terms, request).unwrap_err().code()
    }

    #[test]
    fn a_request_is_a_method_on_a_url_by_the_proxy_itself() {
        let action = action_of(&terms(Subject::Proxy, &[]), &PLAIN).unwrap();
        assert_eq!(action.name(), "net.get");
        assert_eq!(action.resource_type(), "Url");
        assert_eq!(action.resource_id(), "https://shop.example/v1/items?page=2");
        assert_eq!(action.resource_attributes()["path"], "/v1/items");
        assert_eq!(
            (action.principal().kind(), action.principal().id()),
            ("Proxy", "edge")
        );
        assert_eq!(action.context(), &json!({}));
        // The scheme is the terms', whatever the client says of it.
        let plain = ProxyTerms::new(false, Subject::Proxy, "Service", Vec::new()).unwrap();
        let action = action_of(&plain, &PLAIN).unwrap();
        assert_eq!(action.resource_id(), "http://shop.example/v1/items?page=2");
    }

    #[test]
    fn inv_15_a_path_is_judged_as_it_is_forwarded_or_not_at_all() {
        let terms = terms(Subject::Proxy, &[]);
        for good in [
            "/",
            "/a",
            "/a/",
            "/A",
            "/a.b/c-d_e~f",
            "/caf%C3%A9",
            "/caf%c3%a9",
            "/a%20b",
            "/a:b@c",
            "/a?x=%2Fetc%2f..&y=a%20b",
            "/a?",
            "/a!$&'()*+,=",
        ] {
            let request = Proxied {
                target: good,
                ..PLAIN
            };
            let action = action_of(&terms, &request).unwrap();
            let path = good.split('?').next().unwrap();
            let judged = action.resource_attributes()["path"].as_str().unwrap();
            assert!(judged.eq_ignore_ascii_case(path), "{good}");
        }
        for bad in [
            "",
            "*",
            "a",
            "//a",
            "/a//b",
            "/a/../b",
            "/a/..",
            "/./a",
            "/a/.",
            "/a/%2e%2e/b",
            "/%2E/a",
            "/a%2fb",
            "/a%2Fb",
            "/a%5cb",
            "/a\\b",
            "/%61",
            "/a%00",
            "/a%0a",
            "/a%25",
            "/a%252e",
            "/a%",
            "/a%4",
            "/a%zz",
            "/a#b",
            "/a;x",
            "/a/..;/b",
            "/a%3Bx",
            "/user%40host",
            "/a%2Cb",
            "/a b",
            "/caf\u{e9}",
            "/a%ff",
            "/a%E2%80%8B",
            "/a\"",
            "/..",
            "http://other/a",
        ] {
            let request = Proxied {
                target: bad,
                ..PLAIN
            };
            assert_eq!(code(&terms, &request), InvalidCode::Resource, "{bad}");
        }
    }

    #[test]
    fn hosts_and_methods_have_one_spelling() {
        let terms = terms(Subject::Proxy, &[]);
        for (host, judged) in [
            ("Shop.EXAMPLE", "shop.example"),
            ("shop.example:443", "shop.example"),
        ] {
            let action = action_of(&terms, &Proxied { host, ..PLAIN }).unwrap();
            assert_eq!(action.resource_attributes()["host"], judged);
        }
        for host in [
            "",
            "a b",
            "u@shop.example",
            "shop.example.",
            "shop.example/x",
            "shop.example?",
            "a#b",
            "0x7f.1",
            "shop.example:0",
            "shop..example",
        ] {
            assert_eq!(
                code(&terms, &Proxied { host, ..PLAIN }),
                InvalidCode::Resource,
                "{host}"
            );
        }
        let action = action_of(
            &terms,
            &Proxied {
                method: "M-SEARCH",
                ..PLAIN
            },
        )
        .unwrap();
        assert_eq!(action.name(), "net.m-search");
        for method in [
            "",
            "get",
            "Get",
            "GET ",
            "G\u{c9}T",
            "-",
            &"A".repeat(MAX_METHOD_BYTES + 1),
        ] {
            assert_eq!(
                code(&terms, &Proxied { method, ..PLAIN }),
                InvalidCode::Name,
                "{method}"
            );
        }
    }

    #[test]
    fn the_principal_is_whom_the_terms_name_and_nobody_in_his_place() {
        let source = terms(Subject::Source, &[]);
        let request = Proxied {
            source: "spiffe://harbour/web",
            ..PLAIN
        };
        let action = action_of(&source, &request).unwrap();
        assert_eq!(
            (action.principal().kind(), action.principal().id()),
            ("Service", "spiffe://harbour/web")
        );
        assert_eq!(code(&source, &PLAIN), InvalidCode::MissingField);
        // Without the scope nobody speaks for another.
        let check = Check::read(&source, &request, 0);
        let refused = Action::from_parts(check.parts.unwrap(), &proxy(false)).unwrap_err();
        assert_eq!(refused.code(), InvalidCode::PrincipalMismatch);

        let by_header = terms(Subject::parse("header:x-user").unwrap(), &[]);
        let with = |headers: &[(&str, &[u8])]| {
            let request = Proxied {
                headers,
                source: "spiffe://harbour/web",
                ..PLAIN
            };
            action_of(&by_header, &request).map(|action| action.principal().id().to_owned())
        };
        assert_eq!(
            with(&[("x-other", b"y"), ("x-user", b"alice")]).unwrap(),
            "alice"
        );
        let refused: [(Headers<'_>, InvalidCode); 10] = [
            (&[], InvalidCode::MissingField),
            (&[("x-user", b"")], InvalidCode::MissingField),
            (&[("x-user", b"-")], InvalidCode::MissingField),
            (
                &[("x-user", b"alice"), ("x-user", b"bob")],
                InvalidCode::AmbiguousKey,
            ),
            (
                &[("x-user", b"alice"), ("X-User", b"bob")],
                InvalidCode::AmbiguousKey,
            ),
            (
                &[("x-user", b"alice"), ("x_user", b"bob")],
                InvalidCode::AmbiguousKey,
            ),
            (&[("x_user", b"alice")], InvalidCode::AmbiguousKey),
            (&[("x-user", b"alice,bob")], InvalidCode::AmbiguousKey),
            (&[("x-user", b"a\xff")], InvalidCode::NotUtf8),
            (&[("x-user", b"a\x07")], InvalidCode::Name),
        ];
        for (headers, code) in refused {
            assert_eq!(with(headers).unwrap_err().code(), code, "{headers:?}");
        }
        // A header that the terms do not name is nobody's word.
        let own = terms(Subject::Proxy, &[]);
        let request = Proxied {
            headers: &[("x-user", b"root")],
            source: "root",
            ..PLAIN
        };
        assert_eq!(action_of(&own, &request).unwrap().principal().id(), "edge");
    }

    #[test]
    fn headers_and_bodies_reach_policies_where_they_are_whole() {
        let tenant = terms(Subject::Proxy, &["x-tenant", "x-tier"]);
        let request = Proxied {
            headers: &[
                ("x-tenant", b"blue"),
                ("cookie", b"secret"),
                ("x-request-id", b"r-1"),
            ],
            body: b"abc",
            ..PLAIN
        };
        let action = action_of(&tenant, &request).unwrap();
        assert_eq!(
            action.context(),
            &json!({
                "headers": {"x-tenant": "blue"},
                "body": {"bytes": 3, "sha256": Sha256Hash::of(b"abc").to_string()},
            })
        );
        assert_eq!(action.request_id(), Some("r-1"));
        let twice = Proxied {
            headers: &[("x-tier", b"1"), ("x-tier", b"2")],
            ..PLAIN
        };
        assert_eq!(code(&tenant, &twice), InvalidCode::AmbiguousKey);

        for (mark, passes) in [
            (&b"false"[..], true),
            (b"true", false),
            (b"", false),
            (b"False", false),
        ] {
            let headers = [("x-envoy-auth-partial-body", mark)];
            let request = Proxied {
                headers: &headers,
                ..PLAIN
            };
            assert_eq!(action_of(&tenant, &request).is_ok(), passes, "{mark:?}");
        }
    }

    #[test]
    fn terms_name_headers_that_can_be_judged() {
        let with = |subject: Subject, kind: &str, names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            ProxyTerms::new(true, subject, kind, names)
        };
        assert!(with(Subject::Proxy, "Service", &["x-tenant"]).is_ok());
        for bad in [
            "",
            "X-Tenant",
            "x_tenant",
            ":path",
            "authorization",
            "cookie",
            "a b",
        ] {
            let refused = with(Subject::Proxy, "Service", &[bad]).unwrap_err();
            assert_eq!(
                refused,
                ProxyTermsError::Header {
                    name: bad.to_owned()
                }
            );
            let refused = with(Subject::Header(bad.to_owned()), "Service", &[]).unwrap_err();
            assert_eq!(
                refused,
                ProxyTermsError::Header {
                    name: bad.to_owned()
                }
            );
        }
        let user = || Subject::Header("x-user".to_owned());
        assert!(matches!(
            with(user(), "Service", &["x-user"]),
            Err(ProxyTermsError::Twice { .. })
        ));
        assert!(matches!(
            with(user(), "9", &[]),
            Err(ProxyTermsError::SubjectType(_))
        ));
        let many = ["a"; MAX_CONTEXT_HEADERS + 1];
        assert_eq!(
            with(user(), "Service", &many),
            Err(ProxyTermsError::TooMany)
        );
        for (text, parsed) in [
            ("source", Some(Subject::Source)),
            ("header:x-user", Some(user())),
            ("proxy", None),
            ("header", None),
            ("Header:x", None),
        ] {
            assert_eq!(Subject::parse(text), parsed);
        }
    }
}
