//! The OpenAPI 3.1 document, made from the handlers and wire types. A copy is committed as
//! `docs/openapi.json`; a test says when it is out of date.

use std::sync::LazyLock;

use hyper::body::Bytes;
use serde_json::{Map, Value};
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use crate::authzen;
use crate::routes;
use crate::wire::{
    AnswerOrProblem, AuthzenAction, AuthzenConfiguration, AuthzenEntity, AuthzenEvaluation,
    AuthzenEvaluations, AuthzenRequest, AuthzenSearch, BundleRef, DecideRequest, DecisionAnswer,
    DecisionWord, EntityRef, OutcomeWord, Problem, Readiness, RecordRef, ReportAnswer,
    ReportRequest,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Tidelock gateway",
        description = "The decision API of one node, for callers on the same machine: TCP on \
                       loopback and a Unix socket, HTTP/1.1 and HTTP/2 with prior knowledge. \
                       A 200 whose body says `decision: allow` is the only permission; everything \
                       else, an unknown status or a broken connection included, is a no. \
                       Callers of the Unix socket are known by their user id and need no token; \
                       operations are for root and the node's own user, there and only there.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "decisions", description = "May this action take effect"),
        (name = "authzen", description = "OpenID AuthZEN Authorization API 1.0"),
        (name = "node", description = "How the node is"),
        (name = "operator", description = "For the operator on this machine"),
    ),
    paths(
        routes::decide,
        routes::explain,
        routes::report,
        routes::status,
        routes::healthz,
        routes::readyz,
        routes::metrics,
        routes::openapi_json,
        routes::admin,
        authzen::configuration,
        authzen::evaluation,
        authzen::evaluations,
        authzen::search_subject,
        authzen::search_resource,
        authzen::search_action,
    ),
    components(schemas(
        BundleRef,
        DecideRequest,
        DecisionAnswer,
        DecisionWord,
        EntityRef,
        Problem,
        Readiness,
        RecordRef,
        AnswerOrProblem,
        OutcomeWord,
        ReportAnswer,
        ReportRequest,
        AuthzenAction,
        AuthzenConfiguration,
        AuthzenEntity,
        AuthzenEvaluation,
        AuthzenEvaluations,
        AuthzenRequest,
        AuthzenSearch,
    )),
    modifiers(&SecuritySchemes),
)]
struct Api;

struct SecuritySchemes;

impl Modify for SecuritySchemes {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_default();
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.description = Some("A token whose SHA-256 stands in the node's token file".into());
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}

/// What the types do not say: the bounds of texts and numbers, as the interceptor's reader has them, and
/// requests of one type that differ by path. A merge patch (RFC 7396) over the generated document.
const BOUNDS: &str = include_str!("openapi_bounds.json");

/// The document, indented, ending in a line feed: the text of `docs/openapi.json`.
#[must_use]
pub fn document() -> String {
    let mut document = serde_json::to_value(Api::openapi()).unwrap_or_default();
    merge(
        &mut document,
        serde_json::from_str(BOUNDS).unwrap_or_default(),
    );
    never_null(&mut document);
    let text = serde_json::to_string_pretty(&document).unwrap_or_default();
    // The bounds of a range that no escape of patterns names; not to be seen, so they are written as JSON
    // escapes.
    let text = text
        .replace('\u{e0000}', "\\udb40\\udc00")
        .replace('\u{e0fff}', "\\udb43\\udfff");
    text + "\n"
}

fn merge(into: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *into = patch;
        return;
    };
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    let Value::Object(into) = into else { return };
    for (key, value) in patch {
        match value {
            Value::Null => drop(into.remove(&key)),
            value => merge(into.entry(key).or_insert(Value::Null), value),
        }
    }
}

/// A parameter that need not be there is absent, not null.
fn never_null(document: &mut Value) {
    let paths = document.get_mut("paths").and_then(Value::as_object_mut);
    let methods = paths
        .into_iter()
        .flat_map(|paths| paths.values_mut())
        .filter_map(Value::as_object_mut)
        .flat_map(|methods| methods.values_mut());
    let parameters = methods
        .filter_map(|method| method.get_mut("parameters")?.as_array_mut())
        .flatten();
    for kind in parameters.filter_map(|parameter| parameter.pointer_mut("/schema/type")) {
        if let Some(only) = kind.get(0).cloned() {
            *kind = only;
        }
    }
}

/// The document as it is served.
pub(crate) fn bytes() -> Bytes {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(document()));
    DOCUMENT.clone()
}
