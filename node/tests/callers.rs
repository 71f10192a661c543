//! Callers of a real node: workload tokens of an issuer whose keys openssl made.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use common::{Site, chmod, free_tcp, openssl, over_tcp, read_action, request};
use serde_json::{Value, json};

#[expect(
    clippy::disallowed_methods,
    reason = "a test plays an issuer, who has a clock of its own"
)]
fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap().as_secs()
}

fn b64(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// An RSA key `name` made by openssl, as a JWK.
fn rsa_jwk(site: &Site, name: &str, bits: usize) -> Value {
    let dir = site.path("");
    let bits = format!("rsa_keygen_bits:{bits}");
    openssl(
        &dir,
        &[
            "genpkey",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            &bits,
            "-out",
            name,
        ],
    );
    let modulus = openssl(&dir, &["rsa", "-in", name, "-noout", "-modulus"]);
    let hex = modulus.trim().strip_prefix("Modulus=").unwrap();
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    let n: Vec<u8> = (0..hex.len()).step_by(2).map(digit).collect();
    json!({"kty": "RSA", "kid": name, "alg": "RS256", "use": "sig", "n": b64(n), "e": "AQAB"})
}

/// A token that openssl signs with the key `name`.
fn token(site: &Site, name: &str, claims: &Value) -> String {
    let header = json!({"alg": "RS256", "kid": name, "typ": "JWT"});
    let signed = format!("{}.{}", b64(header.to_string()), b64(claims.to_string()));
    site.write("signed", &signed);
    let sign = [
        "dgst",
        "-sha256",
        "-sign",
        name,
        "-out",
        "signature",
        "signed",
    ];
    openssl(&site.path(""), &sign);
    format!(
        "{signed}.{}",
        b64(fs::read(site.path("signature")).unwrap())
    )
}

fn claims(subject: &str) -> Value {
    let now = now_s();
    json!({"iss": "https://ci.example", "aud": "harbour", "sub": subject, "iat": now, "exp": now + 600})
}

/// Asks to read `/srv/a.txt`.
fn ask(address: SocketAddr, headers: &[&str]) -> (u16, String) {
    let action = json!({"action": "fs.read", "resource": {"type": "File", "id": "/srv/a.txt"}});
    let body = action.to_string();
    over_tcp(
        address,
        &request("POST", "/v1/decide", headers, body.as_bytes()),
    )
}

fn bearing(address: SocketAddr, token: &str) -> (u16, String) {
    ask(address, &[&format!("authorization: Bearer {token}")])
}

#[test]
fn a_workload_token_is_its_principal_until_its_key_goes_and_the_log_never_sees_it() {
    let site = Site::new();
    let key = rsa_jwk(&site, "ci-1", 2048);
    site.write("ci.json", &json!({"keys": [key]}).to_string());
    chmod(&site.path("ci.json"), 0o644);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[[gateway.oidc]]\nissuer = \"https://ci.example\"\naudience = \"harbour\"\n\
             jwks = \"ci.json\"\nprincipal_type = \"Agent\"\n\n\
             [[gateway.oidc.rules]]\nsubject = \"ops-*\"\nscopes = [\"decide\"]\n\n\
             [gateway]\ntcp = \"{address}\"\n"
        ),
    );
    site.ok(&["config", "check"]);
    let node = site.start_deciding();

    let good = token(&site, "ci-1", &claims("ops-1"));
    let (status, answer) = bearing(address, &good);
    assert_eq!(status, 200, "{answer}");
    // The principal is the token's, and no other can be named.
    let other = read_action("/srv/a.txt")
        .to_string()
        .replace("ops-1", "ops-2");
    let header = format!("authorization: Bearer {good}");
    let asked = request("POST", "/v1/decide", &[&header], other.as_bytes());
    assert_eq!(over_tcp(address, &asked).0, 400);
    // Metrics need no scope, explanations need one that was not granted.
    let explain = request("POST", "/v1/explain", &[&header], other.as_bytes());
    assert_eq!(over_tcp(address, &explain).0, 403);

    let mut stale = claims("ops-1");
    stale["exp"] = json!(now_s() - 3_000);
    stale["iat"] = json!(now_s() - 3_600);
    let weakened = good.rsplit_once('.').unwrap().0.to_owned() + ".AAAA";
    for (token, code) in [
        (token(&site, "ci-1", &stale), "TOKEN_EXPIRED"),
        (token(&site, "ci-1", &claims("cleaner")), "CALLER_UNMAPPED"),
        (weakened, "TOKEN_SIGNATURE"),
        ("a.b.c".to_owned(), "TOKEN_MALFORMED"),
        ("abc".to_owned(), "TOKEN_UNKNOWN"),
    ] {
        let (status, answer) = bearing(address, &token);
        assert_eq!(status, 401, "{code}: {answer}");
        assert!(answer.contains(&format!("\"{code}: ")), "{code}: {answer}");
        assert!(!answer.contains(&token), "{answer}");
    }

    // Another key takes the place of the first one; a faulty file changes nothing.
    let second = rsa_jwk(&site, "ci-2", 2048);
    site.write("ci.json", "{\"keys\": [{}, {}]}");
    let refused = node.reload("reload_refused");
    assert!(
        refused["why"].as_str().unwrap().contains("key 2: "),
        "{refused}"
    );
    assert_eq!(bearing(address, &good).0, 200);
    site.write("ci.json", &json!({"keys": [second]}).to_string());
    node.reload("reloaded");
    let (status, answer) = bearing(address, &good);
    assert_eq!(status, 401);
    assert!(answer.contains("TOKEN_KEY_UNKNOWN"), "{answer}");
    let next = token(&site, "ci-2", &claims("ops-1"));
    assert_eq!(bearing(address, &next).0, 200);

    node.stop();
    let text = site.json(&["audit", "tail", "--all"]).to_string();
    for secret in [&good, &next] {
        let signature = secret.rsplit_once('.').unwrap().1;
        assert!(!text.contains(signature), "no token is recorded");
        assert!(
            !site.read("node.log").contains(signature),
            "no token is logged"
        );
    }
    assert!(
        text.contains("\"TOKEN_EXPIRED\":1"),
        "counted in callers_refused: {text}"
    );
}

#[test]
fn every_mistake_of_issuers_is_told_by_config_check() {
    let site = Site::new();
    let weak = rsa_jwk(&site, "weak", 1024);
    site.write("weak.json", &json!({"keys": [weak]}).to_string());
    chmod(&site.path("weak.json"), 0o644);
    let issuer = |name: &str, kind: &str, rules: &str| {
        format!(
            "[[gateway.oidc]]\nissuer = \"{name}\"\naudience = \"h\"\njwks = \"weak.json\"\n\
             principal_type = \"{kind}\"\n{rules}\n"
        )
    };
    let rule = "[[gateway.oidc.rules]]\nsubject = \"*\"\nscopes = [\"decide\"]\n";
    let good = format!("{}[gateway]\n", issuer("a", "Job", rule));
    site.configure("[gateway]\n", &good);
    let told = site.tidelock(&["config", "check"]).ended(2);
    told.says(&["gateway.oidc.jwks", "below 2048 bits"]);

    let mut bad = String::new();
    bad += &issuer("a", "Operator", rule);
    bad += &issuer("b", "Job", "");
    bad += &issuer("b", "Job", &rule.replace("decide", "admin"));
    bad += &issuer("c", "Other", &rule.replace("\"*\"", "\"a*b\""));
    bad += &issuer(
        "d",
        "More",
        &rule.replace("subject = \"*\"", "claim = \"x\""),
    );
    bad += &issuer(
        "e",
        "Still",
        &format!("colour = 1\nlifetime_max_s = 90000\n{rule}"),
    );
    site.configure(&good, &format!("{bad}[gateway]\n"));
    let told = site
        .tidelock(&["config", "check", "--json"])
        .ended(2)
        .json();
    let keys: Vec<&str> = told["mistakes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mistake| mistake["key"].as_str().unwrap())
        .collect();
    for key in [
        "gateway.oidc.principal_type",
        "gateway.oidc.issuer",
        "gateway.oidc.rules",
        "gateway.oidc.rules.scopes",
        "gateway.oidc.rules.subject",
        "gateway.oidc.rules.claim",
        "gateway.oidc.colour",
        "gateway.oidc.lifetime_max_s",
    ] {
        assert!(keys.contains(&key), "{key}: {told}");
    }
}
