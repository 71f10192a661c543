//! `tidelock doctor`: looks at everything that keeps a node from its work, and names the way out.

use std::{fs, net::UdpSocket, path::Path, time::Duration};

use serde_json::{Value, json};
use tidelock_gateway::{Jwks, tokens::TokenSet};
use tidelock_policy::TrustFile;
use tidelock_transport::{
    revocation::{VerifiedCrl, crls_in_file},
    tls::Credentials,
    verifier::Trust,
};
use x509_parser::pem::parse_x509_pem;

use super::{ConfigArg, Exit, Failure, Output, node::Door, output::table};
use crate::{
    clock::wall_unix_ms,
    config::Config,
    run::{
        callers::{CrlFloors, DoorPapers},
        consult::endings,
        papers::Ending,
    },
    sealing::key_bytes,
    worker::{Solver, Terms, limits::MEMORY_BYTES, probe, solver_version},
};

/// Expiry is worth a word from here on.
const WARN_MS: u64 = 30 * 86_400_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Good,
    Note,
    Bad,
}

impl Grade {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Bad => "BAD",
        }
    }
}

/// One finding.
struct Finding {
    what: &'static str,
    grade: Grade,
    text: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, grade: Grade, text: impl Into<String>) {
        self.0.push(Finding {
            what,
            grade,
            text: text.into(),
        });
    }

    fn result<T, E: std::fmt::Display>(
        &mut self,
        what: &'static str,
        result: Result<T, E>,
        good: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.add(what, Grade::Good, good(&value));
                Some(value)
            }
            Err(error) => {
                self.add(what, Grade::Bad, error.to_string());
                None
            }
        }
    }
}

pub(super) fn run(args: &ConfigArg, output: &Output) -> Result<Exit, Failure> {
    let config = Config::load(&args.config)?;
    let mut findings = Findings::default();
    findings.add(
        "config",
        Grade::Good,
        format!("{} has no mistakes", args.config.display()),
    );
    for name in config.loosened() {
        findings.add(
            "config",
            Grade::Note,
            format!("{name} loosens a default; remove it where you can"),
        );
    }
    files(&config, &mut findings);
    callers(&config, &mut findings);
    mesh(&config, &mut findings);
    node(args, &config, &mut findings);
    let bad = findings.0.iter().filter(|f| f.grade == Grade::Bad).count();
    let list: Vec<Value> = findings
        .0
        .iter()
        .map(|f| json!({"what": f.what, "grade": f.grade.word().to_lowercase(), "text": f.text}))
        .collect();
    output.say(&json!({"ok": bad == 0, "findings": list}), || {
        let rows: Vec<Vec<String>> = findings
            .0
            .iter()
            .map(|f| vec![f.what.to_owned(), f.grade.word().to_owned(), f.text.clone()])
            .collect();
        format!(
            "{}\n\n{bad} of {} findings are bad",
            table(&["what", "grade", "finding"], &rows),
            rows.len()
        )
    });
    Ok(if bad == 0 { Exit::Done } else { Exit::Failed })
}

fn until(unix_ms: u64) -> (Grade, String) {
    let now = wall_unix_ms();
    if unix_ms <= now {
        (Grade::Bad, "has expired".to_owned())
    } else {
        let left = unix_ms - now;
        let grade = if left < WARN_MS {
            Grade::Note
        } else {
            Grade::Good
        };
        (grade, format!("{} days left", left / 86_400_000))
    }
}

fn files(config: &Config, findings: &mut Findings) {
    let identity = &config.identity;
    findings.result(
        "identity",
        Credentials::load(&identity.certificate, &identity.key, &identity.ca),
        |c| {
            format!(
                "certificate, key and CA fit together, {} certificate(s) in the chain",
                c.chain().len()
            )
        },
    );
    if let Ok(pem) = fs::read(&identity.certificate)
        && let Ok((_, pem)) = parse_x509_pem(&pem)
        && let Ok(certificate) = pem.parse_x509()
    {
        let not_after =
            u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default();
        let (grade, left) = until(not_after.saturating_mul(1_000));
        findings.add("identity", grade, format!("certificate: {left}"));
    }
    let trust = fs::read(&identity.ca)
        .ok()
        .and_then(|pem| Trust::from_pem(&pem).ok());
    if config.revocation.crls.is_empty() {
        findings.add(
            "revocation",
            Grade::Note,
            "revocation.crls names no file; the transport opens only with a CRL from the store",
        );
    }
    for path in &config.revocation.crls {
        match trust.as_ref().map(|trust| read_crls(path, trust)) {
            None => findings.add(
                "revocation",
                Grade::Bad,
                "the CA file is unusable, so no CRL can be checked",
            ),
            Some(Err(why)) => findings.add(
                "revocation",
                Grade::Bad,
                format!("{}: {why}", path.display()),
            ),
            Some(Ok(crls)) => crls.iter().for_each(|crl| {
                let (grade, left) = until(crl.next_update_unix_ms());
                let text = format!(
                    "{}: number {}, {} revoked, {left}",
                    path.display(),
                    crl.number(),
                    crl.revoked_count()
                );
                findings.add("revocation", grade, text);
            }),
        }
    }
    let terms = Terms {
        deadline: Duration::from_millis(config.policy.worker_deadline_ms),
        allow_without_seccomp: config.policy.allow_worker_without_seccomp,
    };
    match probe(terms) {
        Ok(found) => {
            let filtered = if found.seccomp { "with" } else { "WITHOUT" };
            let text = format!(
                "bundles are compiled in a child {filtered} a filter of system calls, as user {}, \
                 with at most {} MiB, ended after {} ms",
                found.uid,
                MEMORY_BYTES >> 20,
                config.policy.worker_deadline_ms
            );
            let whole = found.seccomp && found.no_new_privs && found.no_capabilities;
            findings.add(
                "policy",
                if whole { Grade::Good } else { Grade::Note },
                text,
            );
        }
        Err(why) => findings.add("policy", Grade::Bad, why),
    }
    let solver = Solver::find(config.policy.solver.as_deref());
    match solver.and_then(|solver| Ok((solver_version(&solver, terms)?, solver))) {
        Ok((version, solver)) => findings.add(
            "policy",
            Grade::Good,
            format!(
                "bundles are proved not to permit more by {}, version {version}, within {} ms",
                solver.path().display(),
                config.policy.proof_deadline_ms
            ),
        ),
        Err(why) => findings.add(
            "policy",
            // Who names one wants it; who names none may do without.
            match config.policy.solver {
                Some(_) => Grade::Bad,
                None => Grade::Note,
            },
            format!("no bundle can be proved not to permit more: {why}"),
        ),
    }
    upstream_files(config, findings);
    let trust_path = &config.policy.trust;
    findings.result(
        "policy",
        fs::read_to_string(trust_path)
            .map_err(|e| format!("{}: {e}", trust_path.display()))
            .and_then(|text| TrustFile::parse(&text).map_err(|e| e.to_string())),
        |trust| {
            let widening = match trust.activation().widening_threshold {
                Some(needed) => {
                    format!("{needed} for a bundle that is not proved to permit no more")
                }
                None => "no more for a bundle that permits more".to_owned(),
            };
            format!(
                "trust file for domain {}, {} signature(s) needed, {widening}",
                trust.domain(),
                trust.threshold()
            )
        },
    );
}

/// Files that say who callers are. The key sets of issuers have no end.
fn callers(config: &Config, findings: &mut Findings) {
    for issuer in &config.gateway.oidc {
        findings.result("callers", Jwks::load(&issuer.jwks), |keys| {
            format!("{}: {} key(s)", issuer.issuer, keys.len())
        });
    }
    // A file that cannot be read is a mistake of the config, told there.
    let tokens = config.gateway.tokens.as_deref().map(TokenSet::load);
    if let Some(Ok(tokens)) = &tokens {
        for (_, grant, ends_unix_ms) in tokens.expiries() {
            let name = format!("{}::{}", grant.principal_type(), grant.principal_id());
            let ending = Ending {
                paper: "token",
                name,
                ends_unix_ms,
            };
            ends(findings, "callers", &ending);
        }
    }
    let Some(tls) = &config.gateway.tls else {
        return;
    };
    let now_unix_ms = wall_unix_ms();
    match DoorPapers::load(tls, now_unix_ms, &CrlFloors::default()) {
        Err(failure) => findings.add("callers", Grade::Bad, failure.message),
        Ok(papers) => {
            for ending in papers.endings(now_unix_ms) {
                ends(findings, "callers", &ending);
            }
        }
    }
}

/// When a paper ends, graded.
fn ends(findings: &mut Findings, about: &'static str, ending: &Ending) {
    let (grade, left) = until(ending.ends_unix_ms);
    let text = format!("{} of {}: {left}", ending.paper, ending.name);
    findings.add(about, grade, text);
}

/// What the files of decision points are good for.
fn upstream_files(config: &Config, findings: &mut Findings) {
    for upstream in &config.consult.upstreams {
        let credentials = Credentials::load(&upstream.certificate, &upstream.key, &upstream.ca);
        if let Ok(credentials) = &credentials {
            for ending in endings(&upstream.name, credentials) {
                ends(findings, "consult", &ending);
            }
        }
        findings.result(
            "consult",
            credentials.map_err(|error| format!("{}: {error}", upstream.name)),
            |_| {
                let signed = match upstream.answer_key {
                    Some(_) => "must be signed",
                    None => "need no signature",
                };
                format!(
                    "{} is asked at {} as {}; its answers {signed}",
                    upstream.name, upstream.address, upstream.authority
                )
            },
        );
    }
}

/// What the running node knows of decision points.
fn consult(status: &Value, findings: &mut Findings) {
    let list = |pointer: &str| status.pointer(pointer).and_then(Value::as_array);
    let word = |value: &Value, pointer: &str| {
        let found = value.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    for upstream in list("/consult/upstreams").into_iter().flatten() {
        let name = word(upstream, "/name");
        if let Some(fault) = upstream.get("fault").and_then(Value::as_str) {
            let text = format!("{name} cannot be asked: {fault}");
            findings.add("consult", Grade::Bad, text);
        } else if word(upstream, "/seen/breaker") == "open" {
            let text = format!("{name} is away: {}", word(upstream, "/seen/failure"));
            findings.add("consult", Grade::Note, text);
        }
    }
    if status.pointer("/consult/kept_on_disk") == Some(&Value::Bool(false)) {
        let text = "answers of decision points cannot be written: none serves after a restart; see the \
                    node's log for state/answers";
        findings.add("consult", Grade::Bad, text.to_owned());
    }
    for class in list("/consult/classes").into_iter().flatten() {
        let (name, upstream) = (word(class, "/class"), word(class, "/upstream"));
        if class.get("configured") != Some(&Value::Bool(true)) {
            let text = format!(
                "class {name} is referred to {upstream}, which is not in consult.upstreams: every \
                 action of the class is denied; add it to the config"
            );
            findings.add("consult", Grade::Bad, text);
        }
        if class.get("allows_from_cache") == Some(&Value::Bool(true)) {
            let text = format!(
                "class {name} lets earlier answers of {upstream} allow while it is away \
                 (when_unreachable: cached)"
            );
            findings.add("consult", Grade::Note, text);
        }
    }
}

fn read_crls(path: &Path, trust: &Trust) -> Result<Vec<VerifiedCrl>, String> {
    let bytes = fs::read(path).map_err(|e| e.to_string())?;
    crls_in_file(&bytes)
        .and_then(|ders| {
            ders.iter()
                .map(|der| VerifiedCrl::verify(der, trust))
                .collect()
        })
        .map_err(|e| format!("{}: {e}", e.code()))
}

fn mesh(config: &Config, findings: &mut Findings) {
    if config.mesh.peers.is_empty() {
        findings.add(
            "mesh",
            Grade::Note,
            "mesh.peers is empty: this node exchanges nothing",
        );
    } else {
        // Ruling 3: a mesh without an archive is finite.
        findings.add(
            "mesh",
            Grade::Note,
            "without an archive a mesh is finite: when every node's custody share is full, logs fill",
        );
        findings.add("mesh", Grade::Good, sending(config));
    }
    let beacon = &config.beacon;
    if let (true, Some(path)) = (beacon.enabled, &beacon.key_file) {
        findings.result("beacon", key_bytes(path), |_| {
            format!(
                "on, to {}:{} every {} s; what it tells an observer: docs/src/beacon-privacy.md",
                beacon.group, beacon.port, beacon.interval_s
            )
        });
    }
}

/// What the running node says of its beacons, where they are on.
fn beacons(status: &Value, findings: &mut Findings) {
    let Some(beacon) = status.pointer("/mesh/beacon").filter(|b| !b.is_null()) else {
        return;
    };
    if let Some(fault) = beacon.get("fault").and_then(Value::as_str) {
        let text = format!("beacons are neither sent nor heard: {fault}; it is tried again");
        findings.add("beacon", Grade::Bad, text);
    }
    let count = |pointer: &str| beacon.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    if count("/heard") > 0 {
        let text = format!("{} beacons heard", count("/heard"));
        findings.add("beacon", Grade::Good, text);
    } else if count("/refused/tag") > 0 {
        findings.add(
            "beacon",
            Grade::Note,
            "packets come to the group, none of them a beacon under this key and time: \
             compare beacon.key_file and the clocks",
        );
    } else {
        findings.add(
            "beacon",
            Grade::Note,
            "no beacon of another node was heard: nobody is there, or the network drops multicast",
        );
    }
}

/// How this node sends: congestion control, where single peers differ, and the cap.
fn sending(config: &Config) -> String {
    let mesh = &config.mesh;
    let own: Vec<String> = mesh
        .peers
        .iter()
        .filter_map(|peer| Some(format!("{} to {}", peer.congestion?.name(), peer.id)))
        .collect();
    let own = if own.is_empty() {
        String::new()
    } else {
        format!(" ({})", own.join(", "))
    };
    let cap = match mesh.send_bytes_per_second {
        0 => "no cap on what is sent".to_owned(),
        cap => format!("at most {cap} bytes a second are sent to all peers together"),
    };
    format!("congestion control {}{own}; {cap}", mesh.congestion.name())
}

/// INV-05: what is claimed of the running node is what it answers.
fn node(args: &ConfigArg, config: &Config, findings: &mut Findings) {
    let status = Door::of(args).and_then(|door| door.get("/v1/status"));
    let status = match status {
        Ok(status) => status,
        Err(_) => {
            findings.add(
                "node",
                Grade::Note,
                "no node answers at gateway.unix; only files were checked",
            );
            findings.result(
                "mesh",
                UdpSocket::bind(config.mesh.listen).map_err(|e| {
                    format!(
                        "mesh.listen {}: {e}; choose another address",
                        config.mesh.listen
                    )
                }),
                |_| format!("{} can be bound", config.mesh.listen),
            );
            return;
        }
    };
    let text = |pointer: &str| {
        status
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    findings.add("node", Grade::Good, "answers at its socket");
    let posture = text("/posture");
    let grade = match posture.as_str() {
        "normal" => Grade::Good,
        "stale" | "restricted" => Grade::Note,
        _ => Grade::Bad,
    };
    findings.add("node", grade, format!("posture {posture}"));
    if status.pointer("/bundle").is_none_or(Value::is_null) {
        findings.add(
            "policy",
            Grade::Bad,
            "no bundle: every action is denied; tidelock bundle install one",
        );
    }
    if text("/bundle/role") == "break-glass" {
        let end = text("/bundle/expires_at");
        findings.add(
            "policy",
            Grade::Bad,
            format!("an emergency (break-glass) bundle decides until {end}: install a regular one of a higher epoch"),
        );
    }
    if let Some(aside) = status
        .pointer("/activation/set_aside")
        .filter(|aside| aside.is_object())
    {
        let part = |key: &str| match aside.get(key) {
            Some(Value::String(text)) => text.clone(),
            other => other.map(Value::to_string).unwrap_or_default(),
        };
        findings.add(
            "policy",
            Grade::Bad,
            format!(
                "epoch {} was set aside by {} ({}) and does not decide: sign a new epoch, or \
                 tidelock policy activate it again",
                part("epoch"),
                part("cause"),
                part("reason")
            ),
        );
    }
    let waiting = status
        .pointer("/activation/waiting")
        .and_then(Value::as_array);
    if let Some(waiting) = waiting.filter(|waiting| !waiting.is_empty()) {
        let text = format!(
            "{} bundles of peers wait for an operator: tidelock policy status",
            waiting.len()
        );
        findings.add("policy", Grade::Note, text);
    }
    let scheduled = status
        .pointer("/activation/scheduled")
        .and_then(Value::as_array);
    for bundle in scheduled.into_iter().flatten() {
        if let Some(code) = bundle.pointer("/refused/code").and_then(Value::as_str) {
            let epoch = bundle
                .get("epoch")
                .map(Value::to_string)
                .unwrap_or_default();
            let text = format!(
                "the time of epoch {epoch} has come, and it is refused ({code}): tidelock policy status"
            );
            findings.add("policy", Grade::Bad, text);
        }
    }
    if status
        .pointer("/activation/widening_signatures")
        .is_none_or(Value::is_null)
    {
        let text = "the trust file asks for no further signature under a bundle that permits more \
                    (activation.widening_signatures)";
        findings.add("policy", Grade::Note, text);
    }
    if let Some(age_s) = status.pointer("/policy_age_s").and_then(Value::as_u64) {
        let hours = age_s / 3_600;
        findings.add(
            "policy",
            Grade::Good,
            format!("the authority last confirmed the policy {hours} hours ago"),
        );
    }
    for class in status
        .pointer("/bundle/continues_when_restricted")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        let text = format!(
            "class {class} goes on with full records while the disk is nearly full \
             (when_restricted: continue); degrade or deny fill it slower"
        );
        findings.add("policy", Grade::Note, text);
    }
    match status.pointer("/mesh/reason").and_then(Value::as_str) {
        None => findings.add("mesh", Grade::Good, "the transport is open"),
        Some(why) => findings.add(
            "mesh",
            Grade::Bad,
            format!("the transport is closed: {why}"),
        ),
    }
    consult(&status, findings);
    beacons(&status, findings);
    let ladder = text("/disk/ladder");
    let grade = match ladder.as_str() {
        "normal" => Grade::Good,
        "warn" | "reclaim" => Grade::Note,
        _ => Grade::Bad,
    };
    let left = status
        .pointer("/disk/seconds_to_full")
        .and_then(Value::as_u64)
        .map(|seconds| {
            format!(
                ", {} hours to full at the rate of the last hour",
                seconds / 3_600
            )
        })
        .unwrap_or_default();
    findings.add("disk", grade, format!("ladder state {ladder}{left}"));
    let audit = text("/audit/state");
    let grade = if audit == "open" {
        Grade::Good
    } else {
        Grade::Bad
    };
    findings.add("audit", grade, format!("the log is {audit}"));
    if status.pointer("/audit/superseded").and_then(Value::as_bool) == Some(true) {
        findings.add(
            "audit",
            Grade::Note,
            "a peer holds a later part of this node's log: the root was put back to an older copy, \
             and the next incarnation begins as soon as that part is here",
        );
    }
    if status.pointer("/clock/suspect").and_then(Value::as_bool) == Some(true) {
        findings.add(
            "clock",
            Grade::Bad,
            "the wall clock has jumped; set it right, or tidelock clock accept",
        );
    }
}
