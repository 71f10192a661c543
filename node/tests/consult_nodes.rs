//! A node as the decision point of another one: two real processes, their TLS doors and certificates of one
//! authority. What the one says binds the other, and two that ask each other end in a deny.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of test functions"
)]

mod common;

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use common::{DOMAIN, Node, Site, chmod, free_tcp, openssl, until};
use serde_json::{Value, json};

/// A node of the domain: its own directory, under the authority of the first one.
struct Party {
    site: Site,
    id: &'static str,
    door: SocketAddr,
}

impl Party {
    /// The first node. The authority lies in its directory.
    fn first() -> Self {
        Self::with(Site::new(), "a")
    }

    /// Another node `b` of the same domain.
    fn beside(first: &Self) -> Self {
        let site = Site::new();
        first.issue("b");
        for name in ["b.crt", "b.key", "ca/ca.crt", "site.crl"] {
            fs::copy(first.site.path(name), site.path(name)).unwrap();
        }
        let config = site.read("tidelock.toml");
        let config = config.replace("id = \"a\"", "id = \"b\"");
        let config = config.replace("\"a.crt\"", "\"b.crt\"");
        site.write("tidelock.toml", &config.replace("\"a.key\"", "\"b.key\""));
        Self::with(site, "b")
    }

    fn with(site: Site, id: &'static str) -> Self {
        let door = free_tcp();
        Self { site, id, door }
    }

    fn issue(&self, node: &str) {
        self.site
            .ok(&["ca", "issue", "--dir", "ca", "--node", node]);
    }

    /// A door for nodes of the domain: a certificate for its address, which `tidelock ca` does not make, and
    /// one node that may ask for others.
    fn opens_to(&self, authority: &Self, caller: &str) {
        let dir = authority.site.path("ca");
        let curve = "ec_paramgen_curve:P-256";
        openssl(
            &dir,
            &[
                "req", "-newkey", "ec", "-pkeyopt", curve, "-nodes", "-keyout", "door.key", "-out",
                "door.csr", "-subj", "/CN=door",
            ],
        );
        let extensions = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
                          extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1\n\
                          authorityKeyIdentifier=keyid\n";
        fs::write(dir.join("door.ext"), extensions).unwrap();
        openssl(
            &dir,
            &[
                "x509",
                "-req",
                "-in",
                "door.csr",
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-out",
                "door.crt",
                "-days",
                "30",
                "-extfile",
                "door.ext",
                "-CAcreateserial",
            ],
        );
        for name in ["door.crt", "door.key"] {
            fs::copy(dir.join(name), self.site.path(name)).unwrap();
        }
        chmod(&self.site.path("door.key"), 0o600);
        let section = format!(
            "\n[gateway.tls]\nlisten = \"{}\"\ncertificate = \"door.crt\"\nkey = \"door.key\"\n\n\
             [[gateway.tls.trust_domains]]\nname = \"{DOMAIN}\"\nca = \"ca/ca.crt\"\ncrls = [\"site.crl\"]\n\n\
             [[gateway.tls.trust_domains.rules]]\nid = \"spiffe://{DOMAIN}/domains/{DOMAIN}/peers/{caller}\"\n\
             principal = \"Node::{caller}\"\nscopes = [\"decide\", \"act_as\"]\n",
            self.door
        );
        self.append(&section);
    }

    /// The other node is the decision point of this one; the certificate is the node's own.
    fn asks(&self, other: &Self) {
        let section = format!(
            "\n[[consult.upstreams]]\nname = \"ashore\"\nurl = \"https://127.0.0.1:{}/access/v1/evaluation\"\n\
             address = \"{}\"\nca = \"ca/ca.crt\"\ncertificate = \"{id}.crt\"\nkey = \"{id}.key\"\n\
             crls = [\"site.crl\"]\n",
            other.door.port(),
            other.door,
            id = self.id
        );
        self.append(&section);
        self.site.bundle("site-1.tar", "policy.key", |manifest| {
            manifest["classes"]["observe"]["consult"] = json!({
                "upstream": "ashore", "deadline_ms": 5_000, "when_unreachable": "cached",
                "allow_lifetime_s": 86_400, "deny_lifetime_s": 86_400,
            });
        });
    }

    fn append(&self, section: &str) {
        let config = self.site.read("tidelock.toml");
        self.site
            .write("tidelock.toml", &format!("{config}{section}"));
    }

    /// A bundle that permits to read below `/srv/pub` only.
    fn permits_less(&self) {
        let policy = self.site.read("policy/policies/base.cedar");
        self.site.write("policy/tests/base.json", "[]");
        self.site.write(
            "policy/policies/base.cedar",
            &policy.replace("\"/srv/*\"", "\"/srv/pub/*\""),
        );
        self.site.bundle("site-1.tar", "policy.key", |_| {});
    }

    fn start(&self) -> Node<'_> {
        self.site.start_deciding()
    }

    #[track_caller]
    fn reads(&self, path: &str, expected: &str) {
        assert_eq!(self.site.may_read(path).1, expected, "{path}");
    }

    /// The records of decisions, the last one last.
    fn decisions(&self) -> Vec<Value> {
        let records = self.site.records().into_iter();
        let records = records.map(|r| r["record"].clone());
        records.filter(|r| r["type"] == "decision").collect()
    }

    /// Outcome and stand-in of the last decision.
    fn consulted(&self) -> (String, String) {
        let last = self.decisions().pop().unwrap();
        let word = |key: &str| last["consult"][key].as_str().unwrap_or_default().to_owned();
        (word("outcome"), word("fallback"))
    }
}

fn words(outcome: &str, fallback: &str) -> (String, String) {
    (outcome.to_owned(), fallback.to_owned())
}

#[test]
fn a_node_decides_for_another_one_and_its_word_outlives_it_only_as_the_bundle_says() {
    let ship = Party::first();
    let shore = Party::beside(&ship);
    shore.opens_to(&ship, "a");
    shore.permits_less();
    ship.asks(&shore);
    let ashore = shore.start();
    let aboard = ship.start();

    // Both permit; and the one ashore has a record of its own, of whoever acts and who asks.
    ship.reads("/srv/pub/a.txt", "POLICY_ALLOW");
    assert_eq!(ship.consulted(), words("allow", "none"));
    let here = ship.decisions().pop().unwrap();
    assert_eq!(here["consult"]["obligations"], json!(["report_outcome"]));
    let there = shore.decisions().pop().unwrap();
    assert_eq!(there["principal"], json!({"type": "Agent", "id": "ops-1"}));
    assert_eq!(there["caller"]["id"], "a");
    assert_eq!(there["request_id"], here["consult"]["id"]);
    // One of them does not.
    ship.reads("/srv/a.txt", "CONSULT_DENIED");
    assert_eq!(
        ship.decisions().pop().unwrap()["consult"]["why"],
        "NO_MATCH"
    );
    let asked = shore.decisions().len();
    ship.reads("/etc/shadow", "NO_MATCH");
    assert_eq!(shore.decisions().len(), asked, "a local deny asks nobody");

    // The one ashore is gone: what it said serves, and nothing else.
    assert!(ashore.stop().success());
    ship.reads("/srv/pub/a.txt", "POLICY_ALLOW");
    assert_eq!(ship.consulted(), words("unreachable", "cached"));
    ship.reads("/srv/a.txt", "CONSULT_DENIED");
    assert_eq!(ship.consulted(), words("unreachable", "cached"));
    ship.reads("/srv/pub/new.txt", "CONSULT_UNREACHABLE");

    // It is back, and one that cannot keep up: what it could not judge takes nothing back.
    shore.append("\n[quota]\nprincipal_resource_per_second = 1\nprincipal_resource_burst = 1\n");
    let ashore = shore.site.start();
    aboard.reload("reloaded");
    ship.reads("/srv/pub/new.txt", "POLICY_ALLOW");
    assert_eq!(ship.consulted(), words("allow", "none"));
    until("its quota to be spent", || {
        (ship.site.may_read("/srv/pub/a.txt").1 == "CONSULT_BUSY").then_some(())
    });
    let busy = ship.decisions().pop().unwrap();
    let why = busy["consult"]["why"].as_str().unwrap();
    assert!(why.contains("RATE_LIMIT_EXCEEDED"), "{busy}");
    assert!(ashore.stop().success());
    ship.reads("/srv/pub/a.txt", "POLICY_ALLOW");
    assert_eq!(ship.consulted(), words("unreachable", "cached"));

    // It takes the allow back. That holds when it is away again.
    shore.site.configure(
        "principal_resource_per_second = 1",
        "principal_resource_per_second = 0",
    );
    shore.site.write(
        "policy/policies/base.cedar",
        "forbid (principal, action, resource);\n",
    );
    shore.site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = 2.into()
    });
    let ashore = shore.site.start();
    shore
        .site
        .ok(&["bundle", "install", "site-2.tar", "--apply"]);
    aboard.reload("reloaded");
    ship.reads("/srv/pub/a.txt", "CONSULT_DENIED");
    assert!(ashore.stop().success());
    ship.reads("/srv/pub/a.txt", "CONSULT_DENIED");
    assert_eq!(ship.consulted(), words("unreachable", "cached"));
    assert!(aboard.stop().success());
}

#[test]
fn a_node_is_asked_by_those_alone_that_its_door_knows() {
    let ship = Party::first();
    let shore = Party::beside(&ship);
    shore.opens_to(&ship, "a");
    ship.asks(&shore);
    let ashore = shore.start();
    let aboard = ship.start();
    ship.reads("/srv/a.txt", "POLICY_ALLOW");
    let asked = shore.decisions().len();

    // Another node of the same authority, whom no rule names.
    ship.issue("c");
    let own = "certificate = \"a.crt\"\nkey = \"a.key\"\ncrls";
    let other = "certificate = \"c.crt\"\nkey = \"c.key\"\ncrls";
    ship.site.configure(own, other);
    aboard.reload("reloaded");
    ship.reads("/srv/c.txt", "CONSULT_UNREACHABLE");
    // The papers of its own do not make another decision point of it: its answers serve.
    ship.reads("/srv/a.txt", "POLICY_ALLOW");
    assert_eq!(ship.consulted(), words("unreachable", "cached"));
    ship.site.configure(other, own);
    aboard.reload("reloaded");
    ship.reads("/srv/back.txt", "POLICY_ALLOW");

    // Its certificate is revoked ashore.
    ship.site
        .ok(&["ca", "revoke", "--dir", "ca", "a", "--apply"]);
    ship.site.ok(&["ca", "crl", "--dir", "ca"]);
    fs::copy(ship.site.path("ca/crl.pem"), shore.site.path("site.crl")).unwrap();
    ashore.reload("reloaded");
    // On a connection from before it is told so; a new one is not to be had.
    let told = ship.site.may_read("/srv/revoked.txt").1;
    let denied = ["CONSULT_INVALID", "CONSULT_UNREACHABLE"];
    assert!(denied.contains(&told.as_str()), "{told}");
    aboard.reload("reloaded");
    ship.reads("/srv/revoked.txt", "CONSULT_UNREACHABLE");
    assert_eq!(
        shore.decisions().len(),
        asked + 1,
        "none of these questions came through"
    );
    assert!(aboard.stop().success());
    assert!(ashore.stop().success());
}

#[test]
fn nodes_that_ask_each_other_deny_soon_and_ask_once() {
    let one = Party::first();
    let other = Party::beside(&one);
    one.opens_to(&one, "b");
    other.opens_to(&one, "a");
    one.asks(&other);
    other.asks(&one);
    let running = (one.start(), other.start());

    let begun = Instant::now();
    one.reads("/srv/round.txt", "CONSULT_BUSY");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "nobody waits for a deadline"
    );
    // Asked by its caller, and by the other one, whom it tells that this goes round.
    let here = one.decisions();
    assert_eq!(here.len(), 2, "{here:?}");
    assert_eq!(here[0]["reason"], "CONSULT_INVALID");
    assert_eq!(here[0]["consult"]["outcome"], "loop");
    assert_eq!(here[0]["consult"]["why"], "the question goes round: a, b");
    assert_eq!(
        here[1]["consult"]["why"],
        "it could not judge the action: CONSULT_BUSY"
    );
    let there = other.decisions();
    assert_eq!(
        (there.len(), &there[0]["reason"]),
        (1, &json!("CONSULT_BUSY"))
    );

    // Many at once, from both sides: each is denied, none twice on its way, and no place is left taken.
    let asks = |party: &Party, n: usize| {
        for k in 0..4 {
            let (decision, _) = party
                .site
                .may_read(&format!("/srv/{}-{n}-{k}.txt", party.id));
            assert_eq!(decision, "deny");
        }
    };
    std::thread::scope(|scope| {
        let (one, other) = (&one, &other);
        for n in 0..4 {
            scope.spawn(move || asks(one_of(n, one, other), n));
        }
    });
    for party in [&one, &other] {
        let status = party.site.status();
        assert_eq!(status["consult"]["waiting"], 0, "{status}");
        assert_eq!(
            status["consult"]["kept"], 0,
            "nothing that goes round is an answer"
        );
    }
    let decisions = one.decisions().len() + other.decisions().len();
    assert!(decisions <= 3 * (16 + 1), "{decisions}");
    let (_, there) = running;
    assert!(there.stop().success());

    // The control: one of them asks nobody.
    other.site.bundle("site-2.tar", "policy.key", |manifest| {
        manifest["epoch"] = 2.into()
    });
    let there = other.site.start();
    other
        .site
        .ok(&["bundle", "install", "site-2.tar", "--apply"]);
    until("the other one to be asked again", || {
        (one.site.may_read("/srv/straight.txt").1 == "POLICY_ALLOW").then_some(())
    });
    assert!(there.stop().success());
}

/// Who asks in this turn.
fn one_of<'p>(n: usize, one: &'p Party, other: &'p Party) -> &'p Party {
    if n.is_multiple_of(2) { one } else { other }
}
