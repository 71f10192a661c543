//! Decision points upstream: who they are, how they are asked, and what is kept of their answers.
//!
//! What an answer is worth is the interceptor's to say; this carries questions over HTTPS with certificates
//! on both sides, to the socket address in the config, once each. It resolves no name, follows no redirect
//! and asks no proxy.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use aws_lc_rs::{
    rand::{SecureRandom as _, SystemRandom},
    signature::{ECDSA_P256_SHA256_FIXED, ED25519, UnparsedPublicKey, VerificationAlgorithm},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hyper::header::HeaderValue;
use serde_json::{Value, json};
use tidelock_gateway::{
    Client, ClientError,
    client::{Answered, Door},
};
use tidelock_interceptor::{
    AnswerDone, ConsultFailure, Heard, KeptAnswers, Question, UpstreamAnswer, UpstreamIdentity,
    Upstreams,
    limits::{CONSULT_WAIT, MAX_CONSULT_ANSWER_BYTES},
};
use tidelock_policy::WhenUnreachable;
use tidelock_segments::{Root, Sha256Hash};
use tidelock_transport::{
    revocation::{VerifiedCrl, crls_in_file},
    tls::{Credentials, CredentialsError, WallClock},
};
use tokio::{runtime::Handle, time::timeout};
use x509_parser::{pem::Pem, prelude::FromDer as _, x509::SubjectPublicKeyInfo};

use super::{
    node::{Node, write_state},
    papers::Ending,
};
use crate::{cli::Failure, config::UpstreamSection};

/// Where answers that may serve again lie below the root.
pub(super) const ANSWERS_FILE: &str = "state/answers";

/// Least time between two writings of them. What is withdrawn is written at once.
const KEEP_EVERY: Duration = Duration::from_secs(5);

/// One decision point.
pub(super) struct Upstream {
    client: Client,
    path: String,
    key: Option<AnswerKey>,
    endings: Vec<Ending>,
}

impl Upstream {
    fn open(section: &UpstreamSection, clock: &WallClock) -> Result<Self, CredentialsError> {
        let unusable = |path: &PathBuf, detail: String| CredentialsError::Certificates {
            detail: format!("{}: {detail}", path.display()),
        };
        let credentials = Credentials::load(&section.certificate, &section.key, &section.ca)?;
        let endings = endings(&section.name, &credentials);
        let mut endings: Vec<Ending> = endings.collect();
        let mut crls = Vec::new();
        for path in &section.crls {
            let bytes = std::fs::read(path).map_err(|error| CredentialsError::Read {
                path: path.clone(),
                kind: error.kind(),
            })?;
            let found = crls_in_file(&bytes).map_err(|error| unusable(path, error.to_string()))?;
            endings.extend(found.iter().filter_map(|der| {
                // Of an issuer that is no authority of ours nothing depends on it.
                let crl = VerifiedCrl::verify(der, credentials.trust()).ok()?;
                Some(Ending {
                    paper: "upstream crl",
                    name: format!("{}: {}", section.name, crl.issuer_name()),
                    ends_unix_ms: crl.next_update_unix_ms(),
                })
            }));
            crls.extend(found.into_iter().map(|der| der.to_vec()));
        }
        let tls = credentials
            .https_client_config(crls, Arc::clone(clock))
            .map_err(|error| unusable(&section.ca, error.to_string()))?;
        let key = section
            .answer_key
            .as_ref()
            .map(|path| {
                std::fs::read(path)
                    .and_then(|pem| AnswerKey::from_pem(&pem).map_err(io::Error::other))
                    .map_err(|error| unusable(path, error.to_string()))
            })
            .transpose()?;
        let client = Client::new(Door::Tcp(section.address), None)
            .and_then(|client| {
                client.tls(
                    Arc::new(tls),
                    section.server_name.clone(),
                    &section.authority,
                )
            })
            .map_err(|error| unusable(&section.ca, error.to_string()))?
            .answer_bytes_max(MAX_CONSULT_ANSWER_BYTES)
            .patience(CONSULT_WAIT);
        Ok(Self {
            client,
            path: section.path.clone(),
            key,
            endings,
        })
    }

    async fn ask(&self, question: &Question) -> Result<UpstreamAnswer, ConsultFailure> {
        let id = request_id()?;
        let header = HeaderValue::from_str(&id)
            .map_err(|error| ConsultFailure::Unreachable(error.to_string()))?;
        let body = question.body.clone();
        let sent = self.client.post_json_as(&self.path, header, body);
        let Answered {
            status,
            id: echoed,
            body,
        } = match timeout(question.deadline, sent).await {
            Ok(Ok(answered)) => answered,
            Ok(Err(ClientError::Timeout { .. })) | Err(_) => return Err(ConsultFailure::Timeout),
            Ok(Err(error @ (ClientError::TooLong { .. } | ClientError::Malformed { .. }))) => {
                return Err(ConsultFailure::Invalid(error.to_string()));
            }
            Ok(Err(error)) => return Err(ConsultFailure::Unreachable(error.to_string())),
        };
        let heard = Heard {
            status,
            echoed_id: echoed.as_ref().map(HeaderValue::as_bytes),
            body: &body,
        };
        match &self.key {
            Some(key) => {
                let verify = |text: &str| key.verify(text);
                UpstreamAnswer::read(question, &id, heard, Some(&verify))
            }
            None => UpstreamAnswer::read(question, &id, heard, None),
        }
    }
}

/// When the own certificate at this decision point ends, and each authority of it.
pub(crate) fn endings<'a>(
    name: &'a str,
    credentials: &'a Credentials,
) -> impl Iterator<Item = Ending> + 'a {
    let own = credentials.not_after_unix_ms().map(|ends_unix_ms| Ending {
        paper: "upstream certificate",
        name: name.to_owned(),
        ends_unix_ms,
    });
    let authorities = credentials.trust().authorities().iter();
    own.into_iter()
        .chain(authorities.map(move |authority| Ending {
            paper: "upstream ca",
            name: format!("{name}: {}", authority.name()),
            ends_unix_ms: authority.not_after_unix_ms(),
        }))
}

/// Fresh for each question, so that an answer to another one is told apart.
fn request_id() -> Result<String, ConsultFailure> {
    let mut bytes = [0_u8; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| ConsultFailure::Unreachable("no random number could be had".to_owned()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A pinned key that signs answers: ECDSA P-256 (`ES256`) or Ed25519 (`EdDSA`).
struct AnswerKey {
    algorithm: &'static dyn VerificationAlgorithm,
    header: Value,
    key: Vec<u8>,
}

impl AnswerKey {
    fn from_pem(pem: &[u8]) -> Result<Self, &'static str> {
        let mut blocks = Pem::iter_from_buffer(pem);
        let (Some(Ok(block)), None) = (blocks.next(), blocks.next()) else {
            return Err("not one PEM block");
        };
        if block.label != "PUBLIC KEY" {
            return Err("expected BEGIN PUBLIC KEY (make it with `openssl pkey -pubout`)");
        }
        let (_, spki) =
            SubjectPublicKeyInfo::from_der(&block.contents).map_err(|_| "not a public key")?;
        let key = spki.subject_public_key.data.to_vec();
        let (algorithm, name): (&'static dyn VerificationAlgorithm, _) =
            match (spki.algorithm.algorithm.to_id_string().as_str(), key.len()) {
                ("1.3.101.112", 32) => (&ED25519, "EdDSA"),
                ("1.2.840.10045.2.1", 65) => (&ECDSA_P256_SHA256_FIXED, "ES256"),
                _ => return Err("neither an ECDSA P-256 nor an Ed25519 key"),
            };
        Ok(Self {
            algorithm,
            header: json!({"alg": name}),
            key,
        })
    }

    /// The payload of a compact JWS whose header says nothing but the algorithm of this key.
    fn verify(&self, token: &str) -> Result<Vec<u8>, String> {
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("what is signed is no compact JWS".to_owned());
        };
        let decode = |part: &str| {
            BASE64_URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| "what is signed is no compact JWS".to_owned())
        };
        let head: Value = serde_json::from_slice(&decode(header)?).unwrap_or_default();
        if head != self.header {
            return Err(format!(
                "the header of what is signed must be {}",
                self.header
            ));
        }
        UnparsedPublicKey::new(self.algorithm, &self.key)
            .verify(
                format!("{header}.{payload}").as_bytes(),
                &decode(signature)?,
            )
            .map_err(|_| "the signature is not of the pinned key".to_owned())?;
        decode(payload)
    }
}

/// One section of the config, and what can be done with it.
pub(super) struct OpenedUpstream {
    identity: UpstreamIdentity,
    upstream: Result<Arc<Upstream>, String>,
}

pub(super) type Opened = BTreeMap<String, OpenedUpstream>;

/// Who a section stands for: where it is met, and what it proves itself and its answers with. The own
/// certificate and lists of revoked ones are renewed without it becoming another one.
fn identity(section: &UpstreamSection) -> UpstreamIdentity {
    // A file that cannot be read is none that was there before.
    let file = |path: &PathBuf| {
        let bytes = std::fs::read(path).ok()?;
        Some(Sha256Hash::of(&bytes).to_string())
    };
    let told = json!({
        "url": section.url,
        "address": section.address,
        "ca": file(&section.ca),
        "answer_key": section.answer_key.as_ref().map(file),
    });
    UpstreamIdentity {
        digest: Sha256Hash::of(told.to_string().as_bytes()),
        signs: section.answer_key.is_some(),
    }
}

/// Every upstream of a config. Where one is unusable its questions are denied, and the rest goes on.
fn open_all(sections: &[UpstreamSection], clock: &WallClock) -> Result<Opened, CredentialsError> {
    let open = |section: &UpstreamSection| match Upstream::open(section, clock) {
        // A key that others can read keeps a node from starting (ruling 12).
        Err(loose @ CredentialsError::KeyMode { .. }) => Err(loose),
        opened => Ok((
            section.name.clone(),
            OpenedUpstream {
                identity: identity(section),
                upstream: opened.map(Arc::new).map_err(|error| error.to_string()),
            },
        )),
    };
    sections.iter().map(open).collect()
}

/// The decision points of one node.
pub(super) struct Consulting {
    /// None in a program that only looks at a stopped node: it decides nothing.
    runtime: Option<Handle>,
    root: Arc<Root>,
    clock: WallClock,
    upstreams: ArcSwap<Opened>,
    /// Held from asking what is to be kept until it is written.
    writing: Mutex<()>,
    /// Whether the last writing of it failed.
    is_not_kept: AtomicBool,
    /// Whether the next writing does not wait for its time.
    is_urgent: AtomicBool,
}

impl Consulting {
    /// Those of a config.
    pub(super) fn open(
        sections: &[UpstreamSection],
        root: Arc<Root>,
        clock: WallClock,
    ) -> Result<Arc<Self>, Failure> {
        Ok(Arc::new(Self {
            runtime: Handle::try_current().ok(),
            upstreams: ArcSwap::from_pointee(open_all(sections, &clock)?),
            root,
            clock,
            writing: Mutex::default(),
            is_not_kept: AtomicBool::new(false),
            is_urgent: AtomicBool::new(false),
        }))
    }

    /// Those of a new config, with files that are read again. All must be usable, or none is taken.
    pub(super) fn prepare(&self, sections: &[UpstreamSection]) -> Result<Opened, Failure> {
        let opened = open_all(sections, &self.clock)?;
        for (name, opened) in &opened {
            if let Err(why) = &opened.upstream {
                return Err(Failure::cannot_run(format!(
                    "consult.upstreams {name}: {why}"
                )));
            }
        }
        Ok(opened)
    }

    /// Takes what was prepared into use. Returns the names that others answer to now, or nobody.
    pub(super) fn take(&self, opened: Opened) -> BTreeSet<String> {
        let opened = Arc::new(opened);
        let before = self.upstreams.swap(Arc::clone(&opened));
        let is_other = |name: &String, was: &OpenedUpstream| {
            opened
                .get(name)
                .is_none_or(|now| now.identity != was.identity)
        };
        let others = before.iter().filter(|(name, was)| is_other(name, was));
        others.map(|(name, _)| name.clone()).collect()
    }

    /// Has what is to be kept written at the next look. Waits for nothing.
    pub(super) fn keep_soon(&self) {
        self.is_urgent.store(true, Ordering::Release);
    }

    /// Writes what is to be kept, or leaves nothing: a file that is older than what was said last could let
    /// a node allow after its next start what was taken back.
    fn keep(&self, kept: &KeptAnswers) -> bool {
        let is_written = write_state(&self.root, ANSWERS_FILE, kept);
        if !is_written
            && self.root.exists(ANSWERS_FILE).unwrap_or(true)
            && let Err(error) = self.root.remove(ANSWERS_FILE)
        {
            tracing::error!(
                path = ANSWERS_FILE,
                %error,
                "an older state of answers stays on the disk: remove the file before the next start"
            );
        }
        self.is_not_kept.store(!is_written, Ordering::Release);
        is_written
    }

    /// When their papers end, of those that can be asked.
    pub(super) fn endings(&self) -> Vec<Ending> {
        let upstreams = self.upstreams.load();
        let opened = upstreams.values();
        let usable = opened.filter_map(|opened| opened.upstream.as_ref().ok());
        usable
            .flat_map(|upstream| upstream.endings.clone())
            .collect()
    }

    /// Those that cannot be asked, and why.
    pub(super) fn faults(&self) -> BTreeMap<String, String> {
        let upstreams = self.upstreams.load();
        let faulty = upstreams.iter();
        faulty
            .filter_map(|(name, opened)| {
                let why = opened.upstream.as_ref().err()?;
                Some((name.clone(), why.clone()))
            })
            .collect()
    }
}

impl Upstreams for Consulting {
    fn identity(&self, name: &str) -> Option<UpstreamIdentity> {
        Some(self.upstreams.load().get(name)?.identity)
    }

    fn ask(&self, question: Question, done: AnswerDone) {
        let Some(runtime) = &self.runtime else {
            return done(Err(ConsultFailure::Unconfigured));
        };
        let upstreams = self.upstreams.load();
        let upstream = upstreams.get(&question.upstream);
        // A reload may have come between.
        let upstream = upstream.filter(|now| Some(now.identity) == question.identity);
        let upstream = upstream.map(|opened| opened.upstream.clone());
        runtime.spawn(async move {
            let said = match upstream {
                Some(Ok(upstream)) => upstream.ask(&question).await,
                // Its papers are of no use: it was not reached.
                Some(Err(why)) => Err(ConsultFailure::Unreachable(why)),
                None => Err(ConsultFailure::Unconfigured),
            };
            // Policy engines are waited for, and what was withdrawn is written.
            tokio::task::spawn_blocking(move || done(said));
        });
    }

    fn withdrawn(&self, kept: &dyn Fn() -> KeptAnswers) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // What cannot be written stays to be written, see `keep_answers`.
        self.keep(&kept());
    }
}

impl Node {
    /// Takes decision points into use. What others said under their names is forgotten.
    pub(super) fn take_upstreams(&self, opened: Opened) {
        let others = self.consulting.take(opened);
        if !others.is_empty() {
            self.interceptor.forget_answers_of(&others);
            self.keep_answers(true);
        }
        self.interceptor.try_upstreams_again();
    }

    /// Writes the answers that may serve after a restart, if they have changed and it is time.
    pub(super) fn keep_answers(&self, at_once: bool) {
        let now = self.clock.monotonic();
        let mut next = self
            .keep_answers_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_urgent = self.consulting.is_urgent.swap(false, Ordering::AcqRel);
        if !at_once && !is_urgent && now < *next {
            return;
        }
        let _writing = self
            .consulting
            .writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.consulting.is_not_kept.load(Ordering::Acquire) {
            self.interceptor.answers_not_kept();
        }
        let Some(kept) = self.interceptor.changed_answers() else {
            return;
        };
        *next = now.saturating_add(KEEP_EVERY);
        self.consulting.keep(&kept);
    }

    /// For the status: decision points, and what classes refer to them.
    pub(super) fn consult_json(&self) -> Value {
        let config = self.config.load();
        let stats = self.interceptor.consult_stats();
        let faults = self.consulting.faults();
        let upstreams: Vec<Value> = config
            .consult
            .upstreams
            .iter()
            .map(|section| {
                json!({
                    "name": section.name,
                    "url": section.url,
                    "address": section.address,
                    "answers_signed": section.answer_key.is_some(),
                    "fault": faults.get(&section.name),
                    "seen": stats.upstreams.iter().find(|seen| seen.name == section.name),
                })
            })
            .collect();
        let policy = self.slots.current();
        let manifest = policy.as_ref().map(|policy| policy.bundle().manifest());
        let classes: Vec<Value> = manifest
            .iter()
            .flat_map(|manifest| &manifest.classes)
            .filter_map(|(name, class)| {
                let terms = class.consult.as_ref()?;
                let known = config.consult.upstreams.iter();
                Some(json!({
                    "class": name,
                    "upstream": terms.upstream,
                    "configured": known.clone().any(|section| section.name == terms.upstream),
                    "when_unreachable": terms.when_unreachable,
                    "allows_from_cache": terms.when_unreachable == WhenUnreachable::Cached,
                }))
            })
            .collect();
        json!({
            "upstreams": upstreams,
            "classes": classes,
            "waiting": stats.waiting,
            "kept": stats.kept,
            "kept_bytes": stats.kept_bytes,
            "kept_on_disk": !self.consulting.is_not_kept.load(Ordering::Acquire),
        })
    }

    /// For the metrics.
    pub(super) fn consult_metrics(&self) -> String {
        let stats = self.interceptor.consult_stats();
        let mut text = format!(
            "# HELP tidelock_consult_kept Answers of decision points that may serve again.\n\
             # TYPE tidelock_consult_kept gauge\n\
             tidelock_consult_kept {}\n\
             # HELP tidelock_consult_breaker_open 1 while a decision point is not asked.\n\
             # TYPE tidelock_consult_breaker_open gauge\n",
            stats.kept
        );
        for upstream in &stats.upstreams {
            text.push_str(&format!(
                "tidelock_consult_breaker_open{{upstream=\"{}\"}} {}\n",
                upstream.name,
                u8::from(upstream.breaker == "open")
            ));
        }
        text.push_str(
            "# HELP tidelock_consult_total Decisions by what a decision point said, or what stood in for it.\n\
             # TYPE tidelock_consult_total counter\n",
        );
        for upstream in &stats.upstreams {
            for one in &upstream.decisions {
                text.push_str(&format!(
                    "tidelock_consult_total{{upstream=\"{}\",outcome=\"{}\",fallback=\"{}\"}} {}\n",
                    upstream.name, one.outcome, one.fallback, one.count
                ));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    };

    use tidelock_segments::{RealDisk, RootOptions};

    use super::*;

    fn pem(der: &[u8]) -> String {
        let text = base64::prelude::BASE64_STANDARD.encode(der);
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }

    fn token(header: &str, payload: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let message = format!(
            "{}.{}",
            encode(header.as_bytes()),
            encode(payload.as_bytes())
        );
        let signature = encode(&sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    #[test]
    fn a_name_stands_for_where_it_is_met_and_what_it_proves_itself_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
        for name in ["ca", "crt", "key", "answers"] {
            write(name, name);
        }
        let section = UpstreamSection {
            name: "authority".to_owned(),
            url: "https://a.example:8443/x".to_owned(),
            authority: "a.example:8443".to_owned(),
            server_name: "a.example".try_into().unwrap(),
            path: "/x".to_owned(),
            address: "10.0.0.1:8443".parse().unwrap(),
            ca: path("ca"),
            certificate: path("crt"),
            key: path("key"),
            crls: Vec::new(),
            answer_key: Some(path("answers")),
        };
        let first = identity(&section);
        assert!(first.signs);
        // Its own papers are renewed.
        write("crt", "another");
        write("key", "another");
        assert_eq!(identity(&section), first);
        type Change = fn(&mut UpstreamSection);
        let changes: [Change; 4] = [
            |other| other.url = "https://b.example:8443/x".to_owned(),
            |other| other.address = "10.0.0.2:8443".parse().unwrap(),
            |other| other.ca = other.key.clone(),
            |other| other.answer_key = None,
        ];
        for change in changes {
            let mut other = section.clone();
            change(&mut other);
            assert_ne!(identity(&other), first);
        }
        for name in ["ca", "answers"] {
            write(name, "another");
            assert_ne!(identity(&section), first, "{name}");
            write(name, name);
            assert_eq!(identity(&section), first);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_written_leaves_no_older_state() {
        let dir = tempfile::tempdir().unwrap();
        let options = RootOptions {
            ceiling_bytes: 16 << 20,
            reserve_bytes: 4 << 20,
        };
        let at = dir.path().join("root");
        let root = Root::open(Arc::new(RealDisk), &at, options).unwrap();
        let consulting = Consulting::open(&[], root.clone(), Arc::new(|| 0)).unwrap();
        let is_kept = || {
            let flag = !consulting.is_not_kept.load(Ordering::Acquire);
            (root.exists(ANSWERS_FILE).unwrap(), flag)
        };
        let kept = KeptAnswers::default;
        consulting.withdrawn(&kept);
        assert_eq!(is_kept(), (true, true));
        // Nothing can be staged where a file stands for the directory.
        std::fs::remove_dir_all(at.join("tmp")).unwrap();
        std::fs::write(at.join("tmp"), "").unwrap();
        for _ in 0..2 {
            consulting.withdrawn(&kept);
            assert_eq!(is_kept(), (false, false));
        }
        std::fs::remove_file(at.join("tmp")).unwrap();
        std::fs::create_dir(at.join("tmp")).unwrap();
        consulting.withdrawn(&kept);
        assert_eq!(is_kept(), (true, true));
    }

    #[test]
    fn only_the_pinned_key_signs_answers_and_only_in_its_own_way() {
        let ed = Ed25519KeyPair::generate().unwrap();
        let prefix = [
            0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
        ];
        let ed_pem = pem(&[&prefix[..], ed.public_key().as_ref()].concat());
        let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let ec_prefix = [
            0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06,
            0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
        ];
        let ec_pem = pem(&[&ec_prefix[..], ec.public_key().as_ref()].concat());
        let sign_ed = |message: &[u8]| ed.sign(message).as_ref().to_vec();
        let sign_ec = |message: &[u8]| {
            let signature = ec.sign(&SystemRandom::new(), message).unwrap();
            signature.as_ref().to_vec()
        };
        let ed_key = AnswerKey::from_pem(ed_pem.as_bytes()).unwrap();
        let ec_key = AnswerKey::from_pem(ec_pem.as_bytes()).unwrap();
        let by_ed = token(r#"{"alg":"EdDSA"}"#, "{}", sign_ed);
        let by_ec = token(r#"{"alg":"ES256"}"#, "{}", sign_ec);
        assert_eq!(ed_key.verify(&by_ed), Ok(b"{}".to_vec()));
        assert_eq!(ec_key.verify(&by_ec), Ok(b"{}".to_vec()));
        for (key, bad) in [
            (&ed_key, by_ec.clone()),
            (&ec_key, by_ed.clone()),
            (&ed_key, token(r#"{"alg":"none"}"#, "{}", |_| Vec::new())),
            (
                &ed_key,
                token(r#"{"alg":"EdDSA","crit":["x"]}"#, "{}", sign_ed),
            ),
            (&ed_key, format!("{by_ed}.x")),
            (&ed_key, by_ed.replace('.', "")),
            (&ec_key, token(r#"{"alg":"ES256"}"#, "{}", sign_ed)),
        ] {
            assert!(key.verify(&bad).is_err(), "{bad}");
        }
        let (head, rest) = by_ed.split_once('.').unwrap();
        let (_, signature) = rest.split_once('.').unwrap();
        let other = BASE64_URL_SAFE_NO_PAD.encode(r#"{"decision":true}"#);
        assert!(
            ed_key
                .verify(&format!("{head}.{other}.{signature}"))
                .is_err()
        );
        for bad in [
            "",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(AnswerKey::from_pem(bad.as_bytes()).is_err());
        }
        assert!(AnswerKey::from_pem(format!("{ed_pem}{ec_pem}").as_bytes()).is_err());
    }
}
