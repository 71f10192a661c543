//! A node whose engines are all held, by a policy within every limit and callers who know where it is slow.
//! Nothing but evaluations that take long holds them here; the node tells it, denies, and recovers by itself.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of test functions"
)]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use common::{Site, chmod, free_tcp, over_unix, request};
use serde_json::{Value, json};
use tidelock_gateway::tokens::TokenDigest;

const TOKEN: &str = "token-of-somebody-else";

/// How many characters a pattern and a text have, and how many patterns there are. `like` costs their
/// product: a second or so for each pattern.
const PATTERN: usize = 30_000;
const TEXT: usize = 60_000;
const PATTERNS: [char; 3] = ['b', 'c', 'd'];

/// A site whose policy looks for long patterns in what the caller sends.
fn site(tcp: SocketAddr) -> Site {
    let site = Site::new();
    let schema = site.read("policy/schema.cedarschema");
    let of_files = "\"fs.delete\" appliesTo { principal: [Agent], resource: [File]";
    let with_note = format!("{of_files}, context: {{ note?: String }}");
    assert!(schema.contains(of_files));
    site.write(
        "policy/schema.cedarschema",
        &schema.replace(of_files, &with_note),
    );
    let like = |end: char| {
        let pattern = "a".repeat(PATTERN);
        format!("context.note like \"*{pattern}{end}*\"")
    };
    let likes: Vec<String> = PATTERNS.into_iter().map(like).collect();
    let policy = format!(
        "{}\n@id(\"searched\")\nforbid (principal, action == Action::\"fs.read\", resource)\n\
         when {{ context has note && ({}) }};\n",
        site.read("policy/policies/base.cedar"),
        likes.join(" || ")
    );
    site.write("policy/policies/base.cedar", &policy);
    site.bundle("site-1.tar", "policy.key", |_| {});
    let token = format!(
        "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"ops-2\"\nprincipal_type = \"Agent\"\n\
         scopes = [\"decide\"]\n",
        TokenDigest::of(TOKEN.as_bytes())
    );
    site.write("tokens.toml", &token);
    chmod(&site.path("tokens.toml"), 0o600);
    site.configure(
        "[gateway]\n",
        &format!("[gateway]\ntcp = \"{tcp}\"\ntokens = \"tokens.toml\"\n"),
    );
    site
}

fn asks(principal: &str, note: &str) -> Value {
    let mut action = common::read_action("/srv/a.txt");
    action["principal"]["id"] = principal.into();
    action["context"] = json!({"note": note});
    action
}

/// Asks over the socket, as the user that runs this.
fn by_socket(site: &Site, note: &str) -> String {
    let body = asks("ops-1", note).to_string();
    let asked = request("POST", "/v1/decide", &[], body.as_bytes());
    over_unix(&site.path("s"), &asked).unwrap().1
}

/// Asks as somebody else; once, however late the answer is.
fn by_token(tcp: SocketAddr, note: &str) -> String {
    let body = asks("ops-2", note).to_string();
    let bearer = format!("authorization: Bearer {TOKEN}");
    let mut stream = TcpStream::connect(tcp).unwrap();
    let asked = request("POST", "/v1/decide", &[&bearer], body.as_bytes());
    stream.write_all(&asked).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn readyz(site: &Site) -> (u16, String) {
    over_unix(&site.path("s"), &request("GET", "/readyz", &[], b"")).unwrap()
}

#[test]
fn a_node_whose_engines_are_all_held_says_so_denies_and_is_ready_again_when_they_end() {
    let tcp = free_tcp();
    let site = site(tcp);
    let node = site.start_deciding();
    // The control: the same question with less to look for.
    assert!(by_socket(&site, "a").contains("POLICY_ALLOW"));
    assert!(by_token(tcp, "a").contains("POLICY_ALLOW"));
    assert_eq!(readyz(&site).0, 200);

    let text = "a".repeat(TEXT);
    std::thread::scope(|scope| {
        // Half of the engines each.
        let (site, text) = (&site, text.as_str());
        let asking = [
            scope.spawn(move || by_socket(site, text)),
            scope.spawn(move || by_socket(site, text)),
            scope.spawn(move || by_token(tcp, text)),
            scope.spawn(move || by_token(tcp, text)),
        ];
        let begun = Instant::now();
        let (status, why) = loop {
            let answer = readyz(site);
            if answer.0 != 200 {
                break answer;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "never held all at once"
            );
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status, 503);
        assert!(why.contains("ENGINE_EXHAUSTED"), "{why}");
        let denied = by_socket(site, "a");
        assert!(denied.contains("ENGINE_EXHAUSTED"), "{denied}");
        for asked in asking {
            let answer = asked.join().unwrap();
            let late = ["DEADLINE", "ENGINE_EXHAUSTED"];
            assert!(late.iter().any(|word| answer.contains(word)), "{answer}");
        }
    });
    // Ready with the first that ends, and there for everybody with the last.
    let begun = Instant::now();
    let allows = |answer: String| answer.contains("POLICY_ALLOW");
    let recovers =
        || readyz(&site).0 == 200 && allows(by_socket(&site, "a")) && allows(by_token(tcp, "a"));
    while !recovers() {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "the engines never end"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let recorded = site.records();
    let held = recorded
        .iter()
        .filter(|r| r["record"]["reason"] == "DEADLINE");
    assert!(held.count() >= 4, "each is on record");
    assert!(node.stop().success());
}
