//! Callers of a real node: workload tokens of an issuer and certificates of workloads, both made by
//! openssl; the client of the TLS door is curl.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use common::{
    Site, chmod, free_tcp, openssl, over_tcp, over_unix, read_action, request, run, until,
};
use rustix::process::Signal;
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

/// Issuers were kept apart from each other only: the header of a proxy, a trust domain or the checks of an
/// Envoy could name the principal of a token.
#[test]
fn sources_of_identity_that_could_name_each_others_principals_are_refused_all_at_once() {
    let site = Site::new();
    let key = rsa_jwk(&site, "ci-1", 2048);
    site.write("ci.json", &json!({"keys": [key]}).to_string());
    chmod(&site.path("ci.json"), 0o644);
    let entry = |principal: &str| {
        let made = site.json(&["token", "new", "--principal", principal]);
        made["entry"].as_str().unwrap().to_owned()
    };
    let tokens = format!("format = 1\n{}", entry("Agent::ops-1"));
    site.write("tokens.toml", &tokens);
    chmod(&site.path("tokens.toml"), 0o600);
    // Each source has a type of its own, the token file and the users share one: both are the operator's.
    let gateway = |shared: &str, kinds: [&str; 4]| {
        let [issuer, domain, hop, proxy] = kinds;
        format!(
            "[[gateway.users]]\nuid = 4711\nprincipal = \"Agent::ops-1\"\n\n\
             [[gateway.oidc]]\nissuer = \"https://ci.example\"\naudience = \"h\"\njwks = \"ci.json\"\n\
             principal_type = \"{issuer}\"\n[[gateway.oidc.rules]]\nsubject = \"*\"\nscopes = []\n\n\
             [[gateway.identity_headers]]\nprincipal = \"Service::envoy-1\"\nheader = \"x-user\"\n\
             principal_type = \"{hop}\"\nallow = [\"*\"]\n\n\
             [[gateway.proxies]]\nprincipal = \"Proxy::edge\"\nsubject_from = \"source\"\nsubject_type = \"{proxy}\"\n\n\
             [gateway.tls]\nlisten = \"127.0.0.1:7443\"\ncertificate = \"a.crt\"\nkey = \"a.key\"\n\
             [[gateway.tls.trust_domains]]\nname = \"site.example\"\nca = \"ca/ca.crt\"\nallow_without_crl = true\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ops\"\nprincipal = \"Agent::ops-1\"\nscopes = []\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/*\"\nprincipal_type = \"{domain}\"\nscopes = []\n\n\
             [gateway]\ntokens = \"tokens.toml\"\n{shared}"
        )
    };
    let plain = site.config();
    let check = |text: &str| {
        site.write("tidelock.toml", &plain.replace("[gateway]\n", text));
        let ran = site.tidelock(&["config", "check", "--json"]);
        let told = ran.json()["mistakes"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let of_types = |mistake: &&Value| {
            mistake["message"]
                .as_str()
                .unwrap()
                .contains("could both name")
        };
        let told = told.iter().filter(of_types);
        let mut keys: Vec<String> = told
            .map(|mistake| mistake["key"].as_str().unwrap().to_owned())
            .collect();
        keys.sort_unstable();
        keys
    };
    let apart = ["Job", "Workload", "User", "Service"];
    assert_eq!(
        check(&gateway("", apart)),
        Vec::<String>::new(),
        "the control"
    );
    // All of one type: each pair is told, by the key of one of the two.
    let all = check(&gateway("", ["Job"; 4]));
    assert_eq!(all.len(), 6, "{all:?}");
    for key in ["oidc", "trust_domains", "proxies"] {
        assert!(all.iter().any(|told| told.contains(key)), "{key}: {all:?}");
    }
    assert_eq!(
        check(&gateway(
            "allow_shared_principal_types = [\"Job\"]\n",
            ["Job"; 4]
        )),
        Vec::<String>::new()
    );
    let other = "allow_shared_principal_types = [\"User\"]\n";
    assert_eq!(
        check(&gateway(other, ["Job"; 4])).len(),
        6,
        "another type is not meant"
    );
    // One that names what the operator names, in the config and in the token file.
    let named = check(&gateway("", ["Job", "Workload", "Agent", "Service"]));
    assert_eq!(
        named, ["gateway.identity_headers.principal_type"; 2],
        "users and the trust domain"
    );
    let users = gateway("", ["Robot", "Workload", "User", "Service"]);
    assert_eq!(check(&users), Vec::<String>::new(), "the control");
    site.write("tokens.toml", &format!("{tokens}{}", entry("Robot::r-2")));
    assert_eq!(check(&users), ["gateway.oidc.principal_type"]);
    let started = site.refused_start();
    started.says(&["the token file", "https://ci.example", "Robot"]);
}

/// Workloads and their authority, made by openssl; nothing of ours.
struct Workloads<'s> {
    site: &'s Site,
}

impl<'s> Workloads<'s> {
    fn new(site: &'s Site) -> Self {
        let dir = site.path("wl");
        fs::create_dir(&dir).unwrap();
        site.write("wl/index.txt", "");
        site.write(
            "wl/ca.cnf",
            "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nserial=serial\ncrlnumber=crlnumber\n\
             certificate=ca.crt\nprivate_key=ca.key\ndefault_md=sha256\ndefault_days=2\ndefault_crl_days=2\n\
             policy=p\ncopy_extensions=none\nunique_subject=no\n[p]\ncommonName=supplied\n\
             [req]\ndistinguished_name=dn\n[dn]\n",
        );
        for ca in ["ca", "other"] {
            Self::run(
                &dir,
                &format!(
                    "req -x509 -config ca.cnf -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                     -subj /CN={ca} -keyout {ca}.key -out {ca}.crt -addext basicConstraints=critical,CA:TRUE \
                     -addext keyUsage=critical,keyCertSign,cRLSign -addext subjectKeyIdentifier=hash"
                ),
            );
        }
        site.write("wl/serial", "01\n");
        site.write("wl/crlnumber", "01\n");
        let workloads = Self { site };
        workloads.issue("door", "subjectAltName=IP:127.0.0.1\n", &[]);
        workloads.crl(&[]);
        workloads
    }

    fn run(dir: &std::path::Path, line: &str) -> String {
        openssl(
            dir,
            &line
                .split(' ')
                .filter(|word| !word.is_empty())
                .collect::<Vec<_>>(),
        )
    }

    /// Issues `NAME.crt` with these extensions.
    fn issue(&self, name: &str, extensions: &str, more: &[&str]) {
        let dir = self.site.path("wl");
        self.site.write(&format!("wl/{name}.ext"), extensions);
        Self::run(
            &dir,
            &format!(
                "req -new -config ca.cnf -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} \
                 -keyout {name}.key -out {name}.csr"
            ),
        );
        let line = format!(
            "ca -batch -notext -config ca.cnf -in {name}.csr -out {name}.crt -extfile {name}.ext {}",
            more.join(" ")
        );
        Self::run(&dir, &line);
        chmod(&dir.join(format!("{name}.key")), 0o600);
    }

    /// An SVID with this path.
    fn svid(&self, name: &str, path: &str, more: &[&str]) {
        let uri = format!("URI:spiffe://site.example/{path}");
        self.issue(name, &extensions(&uri), more);
    }

    fn crl(&self, more: &[&str]) {
        let line = format!("ca -config ca.cnf -gencrl -out site.crl {}", more.join(" "));
        Self::run(&self.site.path("wl"), &line);
    }

    fn revoke(&self, name: &str) {
        let line = format!("ca -config ca.cnf -revoke {name}.crt");
        Self::run(&self.site.path("wl"), &line);
    }

    /// What curl is answered with this client certificate: a status, 0 where the door hung up.
    fn curl(&self, address: SocketAddr, name: &str, more: &[&str]) -> (u16, String) {
        let (certificate, key) = (format!("{name}.crt"), format!("{name}.key"));
        let action = json!({"action": "fs.read", "resource": {"type": "File", "id": "/srv/a.txt"}});
        until("an answer in time", || {
            let mut curl = Command::new("curl");
            curl.current_dir(self.site.path("wl"))
                .args([
                    "-sS",
                    "--http1.1",
                    "--max-time",
                    "20",
                    "--cacert",
                    "ca.crt",
                    "-w",
                    "\n%{http_code}",
                ])
                .args([
                    "-H",
                    "content-type: application/json",
                    "-d",
                    &action.to_string(),
                ])
                .args(more);
            if !name.is_empty() {
                curl.args(["--cert", &certificate, "--key", &key]);
            }
            let ran = run(curl.arg(format!("https://{address}/v1/decide")), b"");
            let (body, status) = ran.out.rsplit_once('\n').unwrap();
            let late = ["AUDIT_UNAVAILABLE", "DEADLINE", "unanswered"];
            let told = format!("{body}{}", ran.err);
            (!late.iter().any(|word| body.contains(word))).then(|| (status.parse().unwrap(), told))
        })
    }
}

/// The extensions of an SVID whose names are these.
fn extensions(names: &str) -> String {
    format!(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
         extendedKeyUsage=clientAuth\nsubjectAltName={names}\nauthorityKeyIdentifier=keyid\n"
    )
}

#[test]
fn an_svid_is_its_workload_at_the_tls_door_and_every_other_certificate_is_nobody() {
    let site = Site::new();
    let wl = Workloads::new(&site);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[gateway.tls]\nlisten = \"{address}\"\ncertificate = \"wl/door.crt\"\nkey = \"wl/door.key\"\n\n\
             [[gateway.tls.trust_domains]]\nname = \"site.example\"\nca = \"wl/ca.crt\"\ncrls = [\"wl/site.crl\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/prod/sa/ops\"\n\
             principal = \"Agent::ops-1\"\nscopes = [\"decide\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/prod/*\"\n\
             principal_type = \"Agent\"\nscopes = [\"explain\"]\n\n[gateway]\n"
        ),
    );
    chmod(&site.path("wl/door.key"), 0o644);
    let told = site.tidelock(&["config", "check"]).ended(2);
    told.says(&["gateway.tls.certificate", "0644"]);
    site.refused_start().says(&["0644"]);
    chmod(&site.path("wl/door.key"), 0o600);
    site.ok(&["config", "check"]);
    let node = site.start_deciding();

    wl.svid("ops", "ns/prod/sa/ops", &[]);
    let (status, answer) = wl.curl(address, "ops", &[]);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(wl.curl(address, "ops", &["--http2"]).0, 200);
    // Known, but without the scope.
    wl.svid("peer", "ns/prod/sa/peer", &[]);
    let (status, answer) = wl.curl(address, "peer", &[]);
    assert_eq!(status, 403, "{answer}");

    wl.svid("stranger", "ns/test/sa/ops", &[]);
    wl.svid("root", "", &[]);
    wl.svid("query", "ns/prod/sa/ops?x", &[]);
    let old = [
        "-startdate",
        "20200101000000Z",
        "-enddate",
        "20200201000000Z",
    ];
    wl.svid("old", "ns/prod/sa/ops", &old);
    let young = [
        "-startdate",
        "20900101000000Z",
        "-enddate",
        "20900201000000Z",
    ];
    wl.svid("young", "ns/prod/sa/ops", &young);
    let id = "URI:spiffe://site.example/ns/prod/sa/ops";
    wl.issue("two", &extensions(&format!("{id},{id}2")), &[]);
    wl.issue(
        "mixed",
        &extensions(&format!("{id},URI:https://x.example")),
        &[],
    );
    wl.issue("none", &extensions("DNS:ops.site.example"), &[]);
    let foreign = id.replace("site.example", "other.example");
    wl.issue("foreign", &extensions(&foreign), &[]);
    let authority = extensions(id).replace("CA:FALSE", "CA:TRUE");
    wl.issue("authority", &authority, &[]);
    let usage = extensions(id).replace("digitalSignature", "keyEncipherment");
    wl.issue("usage", &usage, &[]);
    let server = extensions(id).replace("clientAuth", "serverAuth");
    wl.issue("server", &server, &[]);
    wl.svid("gone", "ns/prod/sa/ops", &[]);
    wl.issue(
        "rogue",
        &extensions(id),
        &["-keyfile", "other.key", "-cert", "other.crt"],
    );
    assert_eq!(wl.curl(address, "gone", &[]).0, 200, "positive control");
    let before = site.read("wl/site.crl");
    wl.revoke("gone");
    wl.crl(&[]);
    node.reload("reloaded");
    for name in [
        "stranger",
        "root",
        "query",
        "old",
        "young",
        "two",
        "mixed",
        "none",
        "foreign",
        "authority",
        "usage",
        "server",
        "gone",
        "rogue",
        "",
    ] {
        let (status, answer) = wl.curl(address, name, &[]);
        assert_eq!(status, 0, "{name}: {answer}");
    }
    let (status, answer) = wl.curl(address, "ops", &["--tls-max", "1.2"]);
    assert_eq!(status, 0, "{answer}");
    assert_eq!(wl.curl(address, "ops", &[]).0, 200, "positive control");
    let metrics = over_unix(&site.path("s"), &request("GET", "/metrics", &[], b""))
        .unwrap()
        .1;
    for code in [
        "CALLER_UNMAPPED",
        "IDENTITY_MALFORMED",
        "IDENTITY_AMBIGUOUS",
        "CERT_EXPIRED",
        "CERT_NOT_YET_VALID",
        "TRUST_DOMAIN_UNKNOWN",
        "CERT_USAGE",
        "CERT_REVOKED",
        "CERT_UNKNOWN_CA",
        "CERT_ABSENT",
        "TLS_HANDSHAKE",
    ] {
        let line = format!("tidelock_gateway_credentials_refused_total{{code=\"{code}\"}}");
        assert!(metrics.contains(&line), "{code}:\n{metrics}");
    }

    let told = site.json(&["caller", "check", "--certificate", "wl/ops.crt"]);
    assert_eq!(told["principal"], "Agent::ops-1");
    let refused = site.tidelock(&["caller", "check", "--certificate", "wl/gone.crt"]);
    refused.ended(1).says(&["CERT_REVOKED"]);
    site.tidelock(&["doctor"]).says(&[
        "door certificate of gateway.tls",
        "door ca of site.example",
        "door crl of site.example",
    ]);

    // An older CRL brings nobody back.
    let newer = site.read("wl/site.crl");
    site.write("wl/site.crl", &before);
    node.reload("reloaded");
    assert_eq!(wl.curl(address, "gone", &[]).0, 0);
    site.write("wl/site.crl", &newer);

    // A CRL whose time is over revokes its whole domain; one that cannot be read changes nothing.
    site.write("wl/site.crl", "no CRL");
    node.reload("reload_refused");
    assert_eq!(wl.curl(address, "ops", &[]).0, 200);
    wl.crl(&[
        "-crl_lastupdate",
        "20200101000000Z",
        "-crl_nextupdate",
        "20200201000000Z",
    ]);
    node.reload("reloaded");
    assert_eq!(wl.curl(address, "ops", &[]).0, 0);
    wl.crl(&[]);
    node.reload("reloaded");
    assert_eq!(wl.curl(address, "ops", &[]).0, 200);
}

/// The files of the TLS door and of issuers were read again by a signal only, nobody was told of their
/// ends, and after a restart an older CRL brought back whom a newer one had revoked.
#[test]
fn inv_16_papers_of_callers_are_watched_told_of_and_no_older_crl_counts_after_a_restart() {
    let site = Site::new();
    let wl = Workloads::new(&site);
    let key = rsa_jwk(&site, "ci-1", 2048);
    site.write("ci.json", &json!({"keys": [key]}).to_string());
    chmod(&site.path("ci.json"), 0o644);
    let (address, tcp) = (free_tcp(), free_tcp());
    site.configure(
        "[gateway]\n",
        &format!(
            "[[gateway.oidc]]\nissuer = \"https://ci.example\"\naudience = \"harbour\"\n\
             jwks = \"ci.json\"\nprincipal_type = \"Agent\"\n\n\
             [[gateway.oidc.rules]]\nsubject = \"ops-*\"\nscopes = [\"decide\"]\n\n\
             [gateway.tls]\nlisten = \"{address}\"\ncertificate = \"wl/door.crt\"\nkey = \"wl/door.key\"\n\n\
             [[gateway.tls.trust_domains]]\nname = \"site.example\"\nca = \"wl/ca.crt\"\ncrls = [\"wl/site.crl\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/prod/*\"\n\
             principal = \"Machine::ops-1\"\nscopes = [\"explain\"]\n\n[gateway]\ntcp = \"{tcp}\"\n"
        ),
    );
    wl.svid("ops", "ns/prod/sa/ops", &[]);
    wl.svid("gone", "ns/prod/sa/gone", &[]);
    let node = site.start_deciding();
    // Known, but without the scope: what counts here is who gets through the handshake.
    let knows = |name: &str| wl.curl(address, name, &[]).0 == 403;
    assert!(knows("ops") && knows("gone"), "the control");

    // The CRL ends within three days, the certificate of the door too.
    let told: Vec<String> = site
        .events("paper_ends")
        .iter()
        .map(|ending| format!("{} of {}", ending["paper"], ending["name"]).replace('"', ""))
        .collect();
    for paper in [
        "door certificate of gateway.tls",
        "door crl of site.example: CN=ca",
    ] {
        assert!(told.iter().any(|told| told == paper), "{paper}: {told:?}");
        site.ok(&["status"]).says(&[paper]);
    }
    let metrics = over_unix(&site.path("s"), &request("GET", "/metrics", &[], b"")).unwrap();
    for paper in ["door certificate", "door ca", "door crl"] {
        let line = format!("tidelock_paper_ends_timestamp_seconds{{paper=\"{paper}\"");
        assert!(metrics.1.contains(&line), "{}", metrics.1);
    }

    // Without a signal: a key set, a revocation beside a file that is broken, and the mended file.
    let second = rsa_jwk(&site, "ci-2", 2048);
    let next = token(&site, "ci-2", &claims("ops-1"));
    assert_eq!(bearing(tcp, &next).0, 401, "the control");
    site.write("ci.json", &json!({"keys": [second]}).to_string());
    until("the new key set", || {
        (bearing(tcp, &next).0 == 200).then_some(())
    });
    let (first, door) = (site.read("wl/site.crl"), site.read("wl/door.crt"));
    wl.revoke("gone");
    wl.crl(&[]);
    site.write("wl/door.crt", "no certificate");
    until("the revocation", || (!knows("gone")).then_some(()));
    assert!(knows("ops"), "the old set is in use");
    let refused = until("the word of the faulty set", || {
        let refused = site.status()["papers"]["refused"].clone();
        refused.as_str().map(str::to_owned)
    });
    assert!(refused.starts_with("door: "), "{refused}");
    site.write("wl/door.crt", &door);
    until("the mended set", || {
        site.status()["papers"]["refused"].is_null().then_some(())
    });
    let sets = |kind: &str| -> Vec<Value> {
        site.events(kind)
            .iter()
            .map(|event| event["set"].clone())
            .collect()
    };
    assert_eq!(sets("papers_refused"), [json!("door")]);
    assert!(sets("papers_taken").contains(&json!("callers")));
    assert!(sets("papers_taken").contains(&json!("door")));

    // Over a restart no number goes back: the issuer has nobody until its newest CRL is there.
    node.stop();
    let newer = site.read("wl/site.crl");
    site.write("wl/site.crl", &first);
    let _node = site.start();
    assert!(!knows("gone") && !knows("ops"));
    let why = site.events("crl_not_loaded")[0]["why"].to_string();
    assert!(why.contains("older than"), "{why}");
    site.write("wl/site.crl", &newer);
    until("the newest CRL", || knows("ops").then_some(()));
    assert!(!knows("gone"));
}

/// A disk that refused the number of the newest CRL when it came may take it later, before anything changes.
#[test]
fn inv_16_the_number_of_a_crl_that_could_not_be_written_is_written_as_soon_as_the_disk_takes_it() {
    let site = Site::new();
    let wl = Workloads::new(&site);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[gateway.tls]\nlisten = \"{address}\"\ncertificate = \"wl/door.crt\"\nkey = \"wl/door.key\"\n\n\
             [[gateway.tls.trust_domains]]\nname = \"site.example\"\nca = \"wl/ca.crt\"\ncrls = [\"wl/site.crl\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/prod/*\"\n\
             principal = \"Agent::ops-1\"\nscopes = [\"explain\"]\n\n[gateway]\n"
        ),
    );
    wl.svid("ops", "ns/prod/sa/ops", &[]);
    wl.svid("gone", "ns/prod/sa/gone", &[]);
    let node = site.start_deciding();
    // Known, but without the scope.
    let knows = |name: &str| wl.curl(address, name, &[]).0 == 403;
    assert!(knows("ops") && knows("gone"), "the control");
    let kept = site.path("root/state/door-crls");
    let before = fs::read(&kept).unwrap();
    // Nothing can be put in the place of a directory.
    fs::remove_file(&kept).unwrap();
    fs::create_dir(&kept).unwrap();
    let first = site.read("wl/site.crl");
    wl.revoke("gone");
    wl.crl(&[]);
    until("the revocation", || (!knows("gone")).then_some(()));
    until("the refusal of the disk", || {
        let refused = |line: &str| line.contains("cannot be written") && line.contains("door-crls");
        site.read("node.log").lines().any(refused).then_some(())
    });
    fs::remove_dir(&kept).unwrap();
    let written = until("the number on the disk", || fs::read(&kept).ok());
    assert_ne!(written, before);
    // Nobody told it to go, and no older CRL gets in.
    node.end(Signal::KILL);
    site.write("wl/site.crl", &first);
    let _node = site.start();
    assert!(!knows("gone") && !knows("ops"));
}

/// Beside a certificate that could not be read, the CRLs of the files were taken without their floors: below
/// them too, and the mended set kept what had got in so.
#[test]
fn inv_16_no_older_crl_gets_in_beside_a_broken_certificate() {
    let site = Site::new();
    let wl = Workloads::new(&site);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[gateway.tls]\nlisten = \"{address}\"\ncertificate = \"wl/door.crt\"\nkey = \"wl/door.key\"\n\n\
             [[gateway.tls.trust_domains]]\nname = \"site.example\"\nca = \"wl/ca.crt\"\ncrls = [\"wl/site.crl\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://site.example/ns/prod/*\"\n\
             principal = \"Agent::ops-1\"\nscopes = [\"explain\"]\n\n[gateway]\n"
        ),
    );
    wl.svid("ops", "ns/prod/sa/ops", &[]);
    wl.svid("gone", "ns/prod/sa/gone", &[]);
    let node = site.start_deciding();
    // Known, but without the scope.
    let knows = |name: &str| wl.curl(address, name, &[]).0 == 403;
    assert!(knows("ops") && knows("gone"), "the control");
    let (first, door) = (site.read("wl/site.crl"), site.read("wl/door.crt"));
    wl.revoke("gone");
    wl.crl(&[]);
    until("the revocation", || (!knows("gone")).then_some(()));
    assert!(knows("ops"));
    node.stop();

    let newest = site.read("wl/site.crl");
    site.write("wl/site.crl", &first);
    let _node = site.start();
    assert!(
        !knows("gone") && !knows("ops"),
        "below the floor at the start"
    );
    let refused = || site.status()["papers"]["refused"].clone();
    site.write("wl/door.crt", "no certificate");
    until("the faulty set", || refused().is_string().then_some(()));
    assert!(
        !knows("gone") && !knows("ops"),
        "beside a broken certificate"
    );
    site.write("wl/door.crt", &door);
    until("the mended set", || refused().is_null().then_some(()));
    assert!(!knows("gone") && !knows("ops"), "with the mended one");
    // Beside a broken certificate the newest one counts all the same.
    site.write("wl/door.crt", "no certificate");
    until("the faulty set", || refused().is_string().then_some(()));
    site.write("wl/site.crl", &newest);
    until("the newest CRL", || knows("ops").then_some(()));
    assert!(!knows("gone"));
}

/// The headers of a request to decide `body`, signed by openssl with the key `name`.
fn signed(site: &Site, name: &str, nonce: &str, body: &str) -> [String; 3] {
    signed_for(site, name, nonce, "/v1/decide", body)
}

/// The same for a request to this path.
fn signed_for(site: &Site, name: &str, nonce: &str, path: &str, body: &str) -> [String; 3] {
    let dir = site.path("");
    site.write("body", body);
    openssl(
        &dir,
        &["dgst", "-sha256", "-binary", "-out", "digest", "body"],
    );
    let digest = BASE64_STANDARD.encode(fs::read(site.path("digest")).unwrap());
    let now = now_s();
    let params = format!(
        "(\"@method\" \"@path\" \"@query\" \"content-digest\");created={now};expires={};\
         nonce=\"{nonce}\";keyid=\"{name}\";alg=\"ed25519\";tag=\"a\"",
        now + 60
    );
    let base = format!(
        "\"@method\": POST\n\"@path\": {path}\n\"@query\": ?\n\
         \"content-digest\": sha-256=:{digest}:\n\"@signature-params\": {params}"
    );
    site.write("base", &base);
    let key = format!("{name}.key");
    let sign = [
        "pkeyutl",
        "-sign",
        "-rawin",
        "-inkey",
        &key,
        "-in",
        "base",
        "-out",
        "signature",
    ];
    openssl(&dir, &sign);
    let signature = BASE64_STANDARD.encode(fs::read(site.path("signature")).unwrap());
    [
        format!("content-digest: sha-256=:{digest}:"),
        format!("signature-input: sig={params}"),
        format!("signature: sig=:{signature}:"),
    ]
}

#[test]
fn a_signed_request_counts_once_over_reload_and_restart_and_a_proxy_is_believed_in_its_header() {
    let site = Site::new();
    openssl(
        &site.path(""),
        &["genpkey", "-algorithm", "ED25519", "-out", "crane-7.key"],
    );
    let public = openssl(&site.path(""), &["pkey", "-in", "crane-7.key", "-pubout"]);
    openssl(
        &site.path(""),
        &["genpkey", "-algorithm", "ED25519", "-out", "hop-7.key"],
    );
    let of_hop = openssl(&site.path(""), &["pkey", "-in", "hop-7.key", "-pubout"]);
    let made = site.json(&["token", "new", "--principal", "Service::envoy-1"]);
    let proxy = made["token"].as_str().unwrap();
    let demanding = site.json(&["token", "new", "--principal", "Agent::ops-1"]);
    let token = demanding["token"].as_str().unwrap();
    site.write(
        "tokens.toml",
        &format!(
            "format = 1\n{}{}signed_by = \"crane-7\"\n[[keys]]\nid = \"crane-7\"\nprincipal = \"ops-1\"\n\
             scopes = [\"decide\"]\npublic_key_pem = \"\"\"\n{public}\"\"\"\n\
             [[keys]]\nid = \"hop-7\"\nprincipal = \"hop-7\"\nscopes = [\"decide\"]\npublic_key_pem = \"\"\"\n{of_hop}\"\"\"\n",
            made["entry"].as_str().unwrap(),
            demanding["entry"].as_str().unwrap(),
        ),
    );
    chmod(&site.path("tokens.toml"), 0o600);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[[gateway.identity_headers]]\nprincipal = \"Service::envoy-1\"\nheader = \"x-forwarded-user\"\n\
             principal_type = \"Agent\"\nallow = [\"ops-*\"]\n\n\
             [[gateway.identity_headers]]\nprincipal = \"Agent::hop-7\"\nheader = \"x-hop\"\n\
             principal_type = \"Agent\"\nallow = [\"ops-*\"]\n\n[gateway]\ntcp = \"{address}\"\ntokens = \"tokens.toml\"\n\
             allow_shared_principal_types = [\"Agent\"]\n"
        ),
    );
    site.ok(&["config", "check"]);
    let node = site.start_deciding();
    let action = json!({"action": "fs.read", "resource": {"type": "File", "id": "/srv/a.txt"}});
    let action = action.to_string();
    let send = |headers: &[String], body: &str| {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        over_tcp(
            address,
            &request("POST", "/v1/decide", &headers, body.as_bytes()),
        )
    };
    let refused = |headers: &[String], body: &str, code: &str| {
        let (status, answer) = send(headers, body);
        assert!(status == 401 && answer.contains(code), "{code}: {answer}");
    };
    // Within five seconds of its start a node refuses what an earlier run may have seen; and the helper
    // asks again where a disk is slow, and then sees a replay: sign anew until one counts.
    let mut codes = Vec::new();
    let used = until("a signature that counts", || {
        let nonce = format!("nonce-{:012}", codes.len());
        let headers = signed(&site, "crane-7", &nonce, &action);
        let (status, answer) = send(&headers, &action);
        codes.push(answer);
        (status == 200).then_some(headers)
    });
    let [.., answer] = codes.as_slice() else {
        unreachable!("one was answered")
    };
    assert!(answer.contains("POLICY_ALLOW"), "{answer}");
    refused(&used, &action, "SIGNATURE_REPLAYED");
    let other = signed(&site, "crane-7", "another-body-0123456", &action);
    let changed = action.replace("/srv/a.txt", "/srv/b.txt");
    refused(&other, &changed, "DIGEST_MISMATCH");
    node.reload("reloaded");
    refused(&used, &action, "SIGNATURE_REPLAYED");
    // A token that demands a signature is nothing without one.
    let bearer = format!("authorization: Bearer {token}");
    refused(std::slice::from_ref(&bearer), &action, "SIGNATURE_ABSENT");
    let mut both = signed(&site, "crane-7", "with-token-0123456789", &action).to_vec();
    both.push(bearer);
    let (status, answer) = send(&both, &action);
    assert!(status == 200 || answer.contains("REPLAYED"), "{answer}");

    // The proxy speaks for whom it may, once.
    let hop = format!("authorization: Bearer {proxy}");
    let stated = |values: &[&str]| {
        let mut headers = vec![hop.clone()];
        headers.extend(
            values
                .iter()
                .map(|value| format!("x-forwarded-user: {value}")),
        );
        headers
    };
    assert_eq!(send(&stated(&["ops-1"]), &action).0, 200);
    // The record has both: the name, and whose word it is.
    let records = site.records();
    let callers: Vec<&Value> = records
        .iter()
        .filter(|entry| entry["record"]["type"] == "decision")
        .map(|entry| &entry["record"]["caller"])
        .collect();
    let by = json!({"type": "Service", "id": "envoy-1", "door": "tcp"});
    let both = json!({"type": "Agent", "id": "ops-1", "door": "proxy", "stated_by": by});
    assert_eq!(callers.last(), Some(&&both), "{records:#?}");
    let itself = json!({"type": "Agent", "id": "ops-1", "door": "tcp"});
    assert!(callers.contains(&&itself), "the control: {records:#?}");
    refused(&stated(&[]), &action, "IDENTITY_HEADER_ABSENT");
    refused(
        &stated(&["ops-1", "ops-2"]),
        &action,
        "IDENTITY_HEADER_ABSENT",
    );
    refused(&stated(&["root"]), &action, "IDENTITY_HEADER_REFUSED");
    // Whoever passes a signed request on could change the header, which the signature does not cover.
    let mut headers = signed(&site, "hop-7", "nonce-of-the-hop-01", &action).to_vec();
    headers.push("x-hop: ops-1".to_owned());
    refused(&headers, &action, "TWO_CREDENTIALS");
    let without = signed(&site, "hop-7", "nonce-of-the-hop-02", &action);
    refused(&without, &action, "IDENTITY_HEADER_ABSENT");

    node.end(Signal::KILL);
    let _node = site.start();
    refused(&used, &action, "SIGNATURE_BEFORE_START");
}

/// The question of Envoy's HTTP form stands in headers, which the profile does not cover: a signature that
/// is good is refused too, after it was judged like every other.
#[test]
fn a_signed_check_in_envoys_http_form_is_a_deny_whatever_its_signature_is_worth() {
    const CHECK: &str = "/envoy/v3/check/public/a";
    let site = Site::new();
    openssl(
        &site.path(""),
        &["genpkey", "-algorithm", "ED25519", "-out", "edge.key"],
    );
    let public = openssl(&site.path(""), &["pkey", "-in", "edge.key", "-pubout"]);
    let made = site.json(&["token", "new", "--principal", "Agent::edge"]);
    let bearer = format!("authorization: Bearer {}", made["token"].as_str().unwrap());
    site.write(
        "tokens.toml",
        &format!(
            "format = 1\n{}[[keys]]\nid = \"edge\"\nprincipal = \"edge\"\nscopes = [\"decide\"]\n\
             public_key_pem = \"\"\"\n{public}\"\"\"\n",
            made["entry"].as_str().unwrap(),
        ),
    );
    chmod(&site.path("tokens.toml"), 0o600);
    let address = free_tcp();
    site.configure(
        "[gateway]\n",
        &format!(
            "[[gateway.proxies]]\nprincipal = \"Agent::edge\"\n\n\
             [gateway]\ntcp = \"{address}\"\ntokens = \"tokens.toml\"\n"
        ),
    );
    let _node = site.start_deciding();
    let send = |headers: &[String]| {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        over_tcp(address, &request("POST", CHECK, &headers, b""))
    };
    // The control: by its token the proxy is heard, and what it asks is judged.
    let (status, answer) = send(&[bearer]);
    assert!(
        status == 403 && !answer.contains("unauthenticated"),
        "{answer}"
    );

    let good = |nonce: &str| signed_for(&site, "edge", nonce, CHECK, "").to_vec();
    let denied = |headers: &[String], code: &str| {
        let (status, answer) = send(headers);
        // Never 401 or 5xx: an error would hand the decision to `failure_mode_allow`.
        assert_eq!(status, 403, "{code}: {answer}");
        assert!(answer.contains("unauthenticated"), "{code}: {answer}");
        answer.contains(code).then_some(()).ok_or(answer)
    };
    // Within five seconds of its start a node refuses what an earlier run may have seen.
    let mut tries = 0;
    let used = until("a signature that is judged", || {
        tries += 1;
        let headers = good(&format!("nonce-{tries:012}"));
        denied(&headers, "SIGNATURE_COMPONENTS")
            .is_ok()
            .then_some(headers)
    });
    denied(&used, "SIGNATURE_REPLAYED").unwrap();
    // One that was made for another path, and one that was changed.
    let elsewhere = signed_for(&site, "edge", "nonce-elsewhere-01", "/v1/decide", "").to_vec();
    denied(&elsewhere, "SIGNATURE_INVALID").unwrap();
    let mut changed = good("nonce-changed-0123");
    let signature = changed[2].clone();
    changed[2] = match signature.contains(":A") {
        true => signature.replacen(":A", ":B", 1),
        false => {
            let (name, value) = signature.split_once("=:").unwrap();
            format!("{name}=:A{}", &value[1..])
        }
    };
    denied(&changed, "SIGNATURE_INVALID").unwrap();
    // None of them has taken the nonce of the good one.
    denied(&good("nonce-changed-0123"), "SIGNATURE_COMPONENTS").unwrap();
}

#[test]
fn caller_check_tells_as_whom_a_credential_would_be_taken() {
    let site = Site::new();
    let key = rsa_jwk(&site, "ci-1", 2048);
    site.write("ci.json", &json!({"keys": [key]}).to_string());
    chmod(&site.path("ci.json"), 0o644);
    site.configure(
        "[gateway]\n",
        "[[gateway.oidc]]\nissuer = \"https://ci.example\"\naudience = \"harbour\"\njwks = \"ci.json\"\n\
         principal_type = \"Job\"\n[[gateway.oidc.rules]]\nsubject = \"ops-*\"\nscopes = [\"decide\"]\n\n[gateway]\n",
    );
    let good = token(&site, "ci-1", &claims("ops-1"));
    site.write("job.jwt", &format!("{good}\n"));
    let ran = site.ok(&["caller", "check", "--token", "job.jwt"]);
    ran.says(&["Job::ops-1", "decide"]);
    let told = site.json(&["caller", "check", "--token", "job.jwt"]);
    assert_eq!(told["scopes"], json!(["decide"]));
    assert!(!told.to_string().contains(&good));
    site.write("job.jwt", &token(&site, "ci-1", &claims("cleaner")));
    let refused = site.tidelock(&["caller", "check", "--token", "job.jwt"]);
    refused.ended(1).says(&["CALLER_UNMAPPED"]);
    let unknown = site.tidelock(&["caller", "check", "--key", "x"]);
    unknown.ended(1).says(&["SIGNATURE_KEY_UNKNOWN"]);
    let untaken = site.tidelock(&["caller", "check", "--certificate", "a.crt"]);
    untaken.ended(2).says(&["[gateway.tls]"]);
    site.tidelock(&["caller", "check"]).ended(2);
    site.tidelock(&["doctor"])
        .says(&["https://ci.example: 1 key(s)"]);
}

#[test]
fn every_mistake_of_the_tls_door_is_told_by_config_check() {
    let site = Site::new();
    site.configure(
        "[gateway]\n",
        "[gateway.tls]\nlisten = \"0.0.0.0:7443\"\ncertificate = \"x.crt\"\n\n\
         [[gateway.tls.trust_domains]]\nname = \"Site.example\"\nca = \"ca.crt\"\n\
         [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://other.example/x\"\nprincipal = \"Operator::x\"\nscopes = []\n\
         [[gateway.tls.trust_domains]]\nname = \"b.example\"\nca = \"ca.crt\"\nallow_without_crl = true\n\
         [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://b.example/ns/prod*\"\nscopes = [\"decide\"]\n\n\
         [gateway]\n",
    );
    let told = site
        .tidelock(&["config", "check", "--json"])
        .ended(2)
        .json();
    let told = told["mistakes"].as_array().unwrap();
    let mut keys: Vec<&str> = told.iter().map(|m| m["key"].as_str().unwrap()).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "gateway.tls.key",
            "gateway.tls.trust_domains.crls",
            "gateway.tls.trust_domains.name",
            "gateway.tls.trust_domains.rules.id",
            "gateway.tls.trust_domains.rules.principal",
            "gateway.tls.trust_domains.rules.principal",
        ],
        "{told:#?}"
    );
    // Beyond loopback nothing but TLS is spoken.
    site.write(
        "tidelock.toml",
        &site
            .config()
            .replace("[gateway]\n", "[gateway]\ntcp = \"0.0.0.0:7480\"\n"),
    );
    let told = site.tidelock(&["config", "check"]).ended(2);
    told.says(&["gateway.tcp", "[gateway.tls]"]);
}
