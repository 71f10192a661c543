//! `tidelock.toml`: read once, strictly, with every mistake reported at once.
//!
//! A [`Config`] that exists is usable: names are valid, numbers are within their limits, paths are
//! absolute (relative ones are taken from the directory of the file). Unknown keys are refused with
//! the nearest known one, because a misspelt safety setting must not become its default.

pub(crate) mod callers;
mod host;
mod reader;

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use hyper::Uri;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tidelock_interceptor::{Principal, ProxyTerms, ProxyTermsError, Subject};
use tidelock_segments::{
    AgeRecipients, Compression, DomainId, NodeId,
    limits::{MAX_LOG_FILE_BYTES, MIN_LOG_FILE_BYTES},
};
use tidelock_transport::{congestion::Congestion, limits::MIN_SEND_BYTES_PER_SECOND};

pub use self::callers::{
    IdentityHeaderSection, OidcSection, SpiffePrincipal, SpiffeRule, TlsSection, TrustDomainSection,
};
use self::reader::Section;
pub(crate) use self::reader::parse_bytes;
use crate::worker::limits::{
    DEADLINE_MS, DEADLINE_MS_RANGE, PROOF_DEADLINE_MS, PROOF_DEADLINE_MS_RANGE,
};

/// The smallest ceiling a node starts with, in bytes: one active log file, one segment being
/// sealed, the reserve and the policy slots have to fit beside each other.
pub const CEILING_MIN_BYTES: u64 = 16 * 1024 * 1024;

/// The smallest reserve, in bytes. A reserve holds, in thirds, revocation lists, policy, and the records
/// and state that say so with the log file that they go to (ruling 10). With the smallest one that is a
/// list of some 17,000 revoked certificates and a bundle of 680 KiB; a larger list takes effect in memory
/// at once, and is stored where there is room beside the reserve.
pub const RESERVE_MIN_BYTES: u64 = 2 * 1024 * 1024;

/// The ceiling from which the derived reserve holds a list and a bundle of the largest size.
pub const FULL_RESERVE_FROM_BYTES: u64 = 192 * 1024 * 1024;

const _: () = assert!(RESERVE_MIN_BYTES / 3 >= 4 * MIN_LOG_FILE_BYTES);
const _: () = assert!(RESERVE_MIN_BYTES <= CEILING_MIN_BYTES / 8);
const _: () = assert!(
    derived_reserve_bytes(FULL_RESERVE_FROM_BYTES) / 3
        >= tidelock_transport::revocation::MAX_CRL_BYTES as u64
);
const _: () = assert!(
    derived_reserve_bytes(FULL_RESERVE_FROM_BYTES) / 3
        >= tidelock_policy::limits::ARCHIVE_BYTES_MAX as u64
);

/// The socket's name where the config names none.
const SOCKET_NAME: &str = "tidelock.sock";

/// The group of the beacons where the config names none: of the organisation's own scope (RFC 2365).
const BEACON_GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 74, 11);

/// Its port.
const BEACON_PORT: u16 = 7412;

/// What `sun_path` holds besides its final NUL: unix(7).
const SOCKET_PATH_MAX_BYTES: usize = 107;

/// What one node needs to know of itself, its site and its peers.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[node]`
    pub node: NodeSection,
    /// `[identity]`
    pub identity: IdentitySection,
    /// `[revocation]`
    pub revocation: RevocationSection,
    /// `[policy]`
    pub policy: PolicySection,
    /// `[mesh]`
    pub mesh: MeshSection,
    /// `[beacon]`
    pub beacon: BeaconSection,
    /// `[gateway]`
    pub gateway: GatewaySection,
    /// `[audit]`
    pub audit: AuditSection,
    /// `[store]`
    pub store: StoreSection,
    /// `[quota]`
    pub quota: QuotaSection,
    /// `[consult]`
    pub consult: ConsultSection,
    /// `[log]`
    pub log: LogSection,
}

/// Who this node is and where its state lives.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSection {
    /// The node id; must equal the one in the certificate.
    pub id: NodeId,
    /// The trust domain's name.
    pub domain: DomainId,
    /// The one local root (INV-01).
    pub root: PathBuf,
    /// The disk ceiling (INV-04), bytes.
    pub ceiling_bytes: u64,
    /// Room inside the ceiling kept for revocation, policy and state records, bytes.
    pub reserve_bytes: u64,
}

/// The node's certificate, key and the authorities it trusts.
#[derive(Debug, Clone, PartialEq)]
pub struct IdentitySection {
    /// PEM, leaf first.
    pub certificate: PathBuf,
    /// PKCS#8 PEM, mode 0600 or tighter.
    pub key: PathBuf,
    /// PEM, one or more trusted CAs.
    pub ca: PathBuf,
    /// Accept certificates that name no domain (loud, off by default).
    pub allow_without_domain: bool,
}

/// Where the first CRLs come from and how strict their age is.
#[derive(Debug, Clone, PartialEq)]
pub struct RevocationSection {
    /// CRL files (PEM or DER) read at start and on reload.
    pub crls: Vec<PathBuf>,
    /// Seconds past nextUpdate for which a CRL is still used.
    pub grace_s: u64,
    /// Open the transport without any CRL (loud, off by default).
    pub allow_missing: bool,
}

/// Who may sign policy, and how it is compiled.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySection {
    /// The trust file.
    pub trust: PathBuf,
    /// Milliseconds that a worker may take to compile a bundle.
    pub worker_deadline_ms: u64,
    /// Let the worker go without a filter of system calls where the kernel has none (loud, off by
    /// default).
    pub allow_worker_without_seccomp: bool,
    /// The solver that proves bundles; without it the system's places are looked at.
    pub solver: Option<PathBuf>,
    /// Milliseconds that proving one bundle may take.
    pub proof_deadline_ms: u64,
}

/// The mesh of peers.
#[derive(Debug, Clone, PartialEq)]
pub struct MeshSection {
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// The static peer list.
    pub peers: Vec<PeerSection>,
    /// First redial delay bound, milliseconds.
    pub redial_base_ms: u64,
    /// Longest redial delay, milliseconds.
    pub redial_cap_ms: u64,
    /// QUIC keep-alive interval, milliseconds.
    pub keep_alive_ms: u64,
    /// Idle time after which a session is lost, milliseconds.
    pub idle_timeout_ms: u64,
    /// Bytes a second that one peer may make this node serve or take.
    pub peer_bytes_per_second: u32,
    /// Frames a second that one peer may send.
    pub peer_requests_per_second: u32,
    /// Bytes of witness and audit that one peer may give this node in a day; 0 is no bound.
    pub peer_bytes_per_day: u64,
    /// Congestion control of sessions with peers that name no other.
    pub congestion: Congestion,
    /// Cap on what this node sends to all peers together, bytes of UDP payload a second; 0: none.
    pub send_bytes_per_second: u32,
}

/// What may stand at `mesh.peer_bytes_per_second`.
pub const PEER_BYTES_PER_SECOND: RangeInclusive<u32> = 1 << 16..=u32::MAX;
/// What may stand at `mesh.peer_requests_per_second`.
pub const PEER_REQUESTS_PER_SECOND: RangeInclusive<u32> = 10..=10_000_000;
/// What may stand at `mesh.peer_bytes_per_day`, and 0: at least the longest segment.
pub const PEER_BYTES_PER_DAY: RangeInclusive<u64> =
    tidelock_segments::limits::MAX_SEGMENT_BYTES..=1 << 60;

/// One peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerSection {
    /// Its node id.
    pub id: NodeId,
    /// Where it is met; none where only a beacon finds it.
    pub address: Option<SocketAddr>,
    /// Congestion control of what is sent to it, where it is not `mesh.congestion`.
    pub congestion: Option<Congestion>,
}

/// Discovery on the local network.
#[derive(Debug, Clone, PartialEq)]
pub struct BeaconSection {
    /// Whether beacons are sent and followed.
    pub enabled: bool,
    /// The IPv4 multicast group.
    pub group: Ipv4Addr,
    /// Its UDP port.
    pub port: u16,
    /// The file with the key of the domain's beacons, mode 0600 or tighter.
    pub key_file: Option<PathBuf>,
    /// Mean time between two beacons, seconds.
    pub interval_s: u64,
}

/// The doors for callers.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewaySection {
    /// Loopback TCP address, if any.
    pub tcp: Option<SocketAddr>,
    /// Unix socket; always there, because the operator's commands use it.
    pub unix: PathBuf,
    /// File of hashed bearer tokens.
    pub tokens: Option<PathBuf>,
    /// Unix user ids that may call, with the principal each stands for.
    pub users: Vec<UserSection>,
    /// Proxies that ask for the requests that they hold back.
    pub proxies: Vec<ProxySection>,
    /// Serve TCP callers without authentication (loud, off by default).
    pub allow_anonymous_loopback: bool,
    /// Requests decided at once.
    pub concurrent_max: u32,
    /// The URL under which callers reach the TCP door, where something before it speaks TLS.
    pub public_url: Option<String>,
    /// Issuers of workload tokens.
    pub oidc: Vec<OidcSection>,
    /// The door for callers on other machines.
    pub tls: Option<TlsSection>,
    /// Proxies that are believed in a header.
    pub identity_headers: Vec<IdentityHeaderSection>,
    /// Types of which several sources of identity may name principals (loud, none by default).
    pub allow_shared_principal_types: Vec<String>,
}

/// One Unix user id and the principal it stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct UserSection {
    /// The user id of the calling process.
    pub uid: u32,
    /// `Type::id` of the principal.
    pub principal: String,
    /// Whether it may name other principals.
    pub act_as: bool,
}

/// A proxy that asks for the requests that it holds back, and how those are read.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxySection {
    /// `Type::id` of the principal that it authenticates as.
    pub principal: String,
    /// How its requests are read.
    pub terms: ProxyTerms,
}

/// The audit log.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditSection {
    /// Size of one log segment, bytes.
    pub segment_bytes: u64,
    /// Age at which a segment is sealed, seconds.
    pub segment_max_age_s: u64,
    /// Distinct custodians needed before own audit may be evicted; 0: it never is.
    pub custody: u32,
    /// Age before which nothing is evicted, seconds.
    pub retention_min_s: u64,
    /// Bytes of other nodes' audit this node takes.
    pub custody_max_bytes: u64,
    /// Whether sealed segments are compressed.
    pub compression: Compression,
    /// The age recipients that sealed segments are encrypted to.
    pub encrypt_to: Option<AgeRecipients>,
    /// The file with the site key that sealed segments are encrypted to, mode 0600 or tighter.
    pub encrypt_key_file: Option<PathBuf>,
    /// Nodes whose receipt alone licenses an eviction: they keep for good.
    pub archives: BTreeSet<NodeId>,
    /// Overwrite the oldest audit where nothing is licensed (loud, off by default).
    pub overwrite_oldest: bool,
}

/// The segment store.
#[derive(Debug, Clone, PartialEq)]
pub struct StoreSection {
    /// Bytes a second that the scrub reads and verifies; 0 switches it off.
    pub scrub_bytes_per_second: u64,
}

/// Limits for callers.
#[derive(Debug, Clone, PartialEq)]
pub struct QuotaSection {
    /// Actions a second for each principal.
    pub actions_per_second: u32,
    /// Actions at once for each principal.
    pub actions_burst: u32,
    /// Of each caller, for whatever principals; 0 is no bound.
    pub caller: (u32, u32),
    /// Of each principal and action type; 0 is no bound.
    pub principal_action: (u32, u32),
    /// Of each principal and resource; 0 is no bound.
    pub principal_resource: (u32, u32),
    /// Of each action type; 0 is no bound.
    pub action: (u32, u32),
    /// Of all actions; 0 is no bound.
    pub total: (u32, u32),
    /// Seconds for which a bucket that is full again is kept.
    pub evict_after_s: u64,
    /// Requests of each caller, judged or not.
    pub requests: (u32, u32),
}

/// Decision points that bundles may refer actions to.
#[derive(Debug, Clone, PartialEq)]
pub struct ConsultSection {
    /// All of them, by distinct names.
    pub upstreams: Vec<UpstreamSection>,
}

/// Decision points in one config.
const UPSTREAMS_MAX: usize = 16;

/// One decision point.
#[derive(Debug, Clone, PartialEq)]
pub struct UpstreamSection {
    /// As bundles name it.
    pub name: String,
    /// Where it answers, for people.
    pub url: String,
    /// Host and port in it.
    pub authority: String,
    /// What its certificate must name.
    pub server_name: ServerName<'static>,
    /// The path that is asked.
    pub path: String,
    /// Where it is met.
    pub address: SocketAddr,
    /// PEM, the authorities of its certificate.
    pub ca: PathBuf,
    /// PEM, what this node shows.
    pub certificate: PathBuf,
    /// PKCS#8 PEM, mode 0600 or tighter.
    pub key: PathBuf,
    /// CRLs of its authorities.
    pub crls: Vec<PathBuf>,
    /// PEM, the public key that signs its answers.
    pub answer_key: Option<PathBuf>,
}

/// The node's own log on standard error.
#[derive(Debug, Clone, PartialEq)]
pub struct LogSection {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// JSON lines instead of text.
    pub json: bool,
}

/// One mistake in a config file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line, from 1; 0 where the mistake is an absence in the whole file.
    pub line: usize,
    /// The key, dotted.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.key, self.message)
        } else {
            write!(f, "line {}: {}: {}", self.line, self.key, self.message)
        }
    }
}

/// Why no [`Config`] came to be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file itself.
    #[error("cannot read {path}: {source}; name the config file with -c FILE")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its contents: every mistake, in the order of the file.
    #[error("{path} has {} mistake(s):\n{}", mistakes.len(), list(mistakes))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// All of them.
        mistakes: Vec<Mistake>,
    },
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes
        .iter()
        .map(|m| format!("  {m}"))
        .collect::<Vec<_>>()
        .join("\n")
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`], or [`ConfigError::Mistakes`] with all of them.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        let base = std::path::absolute(path)
            .ok()
            .and_then(|p| p.parent().map(Path::to_owned))
            .unwrap_or_default();
        Self::parse(&text, &base).map_err(|mistakes| ConfigError::Mistakes {
            path: path.to_owned(),
            mistakes,
        })
    }

    /// Checks the text of a config; relative paths are taken from `base`.
    ///
    /// # Errors
    /// Every mistake, ordered by line.
    pub fn parse(text: &str, base: &Path) -> Result<Self, Vec<Mistake>> {
        Self::read(text, &reader::Cx::new(text, base))
    }

    /// The JSON Schema of a config, made of what the reader asks for. It knows keys, types, ranges and
    /// defaults; what one key demands of another, [`parse`](Self::parse) says.
    #[must_use]
    pub fn schema() -> Value {
        // One empty table of each list, so that its keys are asked for. The mistakes do not matter.
        let text = "[[mesh.peers]]\n[[gateway.users]]\n[[consult.upstreams]]\n[[gateway.proxies]]\n[[gateway.oidc]]\n[[gateway.oidc.rules]]\n\
                    [[gateway.identity_headers]]\n[gateway.tls]\n[[gateway.tls.trust_domains]]\n[[gateway.tls.trust_domains.rules]]\n";
        let cx = reader::Cx::new(text, Path::new(""));
        let _ = Self::read(text, &cx);
        let mut schema = cx.schema("");
        for (key, value) in [
            ("$schema", "https://json-schema.org/draft/2020-12/schema"),
            ("title", "Config of a Tidelock node"),
        ] {
            schema.insert(key.to_owned(), value.into());
        }
        Value::Object(schema)
    }

    fn read(text: &str, cx: &reader::Cx<'_>) -> Result<Self, Vec<Mistake>> {
        let document = match toml_edit::Document::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let line = error
                    .span()
                    .map_or(0, |span| reader::line_of(text, span.start));
                return Err(vec![Mistake {
                    line,
                    key: "(syntax)".to_owned(),
                    message: error.message().to_owned(),
                }]);
            }
        };
        let mut top = Section::root(cx, document.as_table());

        let mut s = top.section("node");
        let id = s.parsed("id", NodeId::new);
        let domain = s.parsed("domain", DomainId::new);
        let root = s.required_path("root");
        let ceiling_bytes = s.bytes("ceiling_bytes", 1 << 30, CEILING_MIN_BYTES..=1 << 50);
        let reserve_bytes = s.bytes(
            "reserve_bytes",
            derived_reserve_bytes(ceiling_bytes),
            RESERVE_MIN_BYTES..=1 << 40,
        );
        if reserve_bytes > ceiling_bytes / 2 {
            s.mistake(
                "reserve_bytes",
                "more than half of node.ceiling_bytes; make it smaller",
            );
        }
        s.finish();

        let mut s = top.section("identity");
        let certificate = s.required_path("certificate");
        let key = s.required_path("key");
        let ca = s.required_path("ca");
        let allow_without_domain = s.boolean("allow_without_domain", false);
        s.finish();

        let mut s = top.section("revocation");
        let crls = s.paths("crls");
        let grace_s = s.integer("grace_s", 0, 0..=365 * 86_400);
        let allow_missing = s.boolean("allow_missing", false);
        s.finish();

        let mut s = top.section("policy");
        let trust = s.required_path("trust");
        let worker_deadline_ms = s.integer("worker_deadline_ms", DEADLINE_MS, DEADLINE_MS_RANGE);
        let allow_worker_without_seccomp = s.boolean("allow_worker_without_seccomp", false);
        let solver = s.optional_path("solver");
        let proof_deadline_ms = s.integer(
            "proof_deadline_ms",
            PROOF_DEADLINE_MS,
            PROOF_DEADLINE_MS_RANGE,
        );
        s.finish();

        let mut s = top.section("beacon");
        let beacon_enabled = s.boolean("enabled", false);
        let beacon_group = s.group("group", BEACON_GROUP);
        let beacon_port = s.number32("port", BEACON_PORT.into(), 1..=u16::MAX.into());
        let beacon_key_file = s.optional_path("key_file");
        if beacon_enabled && beacon_key_file.is_none() {
            s.mistake(
                "key_file",
                "is required with beacon.enabled: 32 random bytes (head -c 32 /dev/urandom), the \
                 same for every node of the domain, mode 0600",
            );
        }
        let beacon_interval_s = s.integer("interval_s", 10, 1..=3_600);
        s.finish();

        let mut s = top.section("mesh");
        let listen = s.address("listen");
        if beacon_enabled && listen.is_some_and(|listen| listen.is_ipv6()) {
            s.mistake("listen", "must be an IPv4 address with beacon.enabled");
        }
        let redial_base_ms = s.integer("redial_base_ms", 500, 10..=60_000);
        let redial_cap_ms = s.integer("redial_cap_ms", 30_000, 100..=3_600_000);
        if redial_cap_ms < redial_base_ms {
            s.mistake(
                "redial_cap_ms",
                "less than mesh.redial_base_ms; make it larger",
            );
        }
        let keep_alive_ms = s.integer("keep_alive_ms", 5_000, 100..=60_000);
        let idle_timeout_ms = s.integer("idle_timeout_ms", 30_000, 500..=600_000);
        if idle_timeout_ms < keep_alive_ms.saturating_mul(2) {
            s.mistake(
                "idle_timeout_ms",
                "must be at least twice mesh.keep_alive_ms",
            );
        }
        let peer_bytes_per_second =
            s.number32("peer_bytes_per_second", 1 << 30, PEER_BYTES_PER_SECOND);
        let peer_requests_per_second =
            s.number32("peer_requests_per_second", 20_000, PEER_REQUESTS_PER_SECOND);
        let peer_bytes_per_day = s.bytes("peer_bytes_per_day", 0, 0..=*PEER_BYTES_PER_DAY.end());
        if peer_bytes_per_day != 0 && !PEER_BYTES_PER_DAY.contains(&peer_bytes_per_day) {
            s.mistake(
                "peer_bytes_per_day",
                "below the longest segment, which would never pass; at least \"32MiB\", or 0 for no bound",
            );
        }
        let congestion = congestion(&mut s);
        let send_bytes_per_second = s.bytes("send_bytes_per_second", 0, 0..=u64::from(u32::MAX));
        let send_bytes_per_second = u32::try_from(send_bytes_per_second).unwrap_or(u32::MAX);
        if (1..MIN_SEND_BYTES_PER_SECOND).contains(&send_bytes_per_second) {
            s.mistake(
                "send_bytes_per_second",
                format!(
                    "no handshake gets through in time below {MIN_SEND_BYTES_PER_SECOND} bytes a second; \
                     give more, or 0 for no cap"
                ),
            );
        }
        let mut peers = Vec::new();
        let mut peers_listed = 0;
        for mut peer in s.tables("peers") {
            peers_listed += 1;
            let peer_id = peer.parsed("id", NodeId::new);
            let address = if beacon_enabled {
                peer.optional_address("address")
            } else {
                peer.address("address")
            };
            let congestion = self::congestion(&mut peer);
            if let Some(peer_id) = peer_id {
                if Some(&peer_id) == id.as_ref() {
                    peer.mistake("id", "is this node itself; list only the others");
                } else if peers.iter().any(|p: &PeerSection| p.id == peer_id) {
                    peer.mistake("id", "is listed twice; keep one entry per peer");
                } else {
                    peers.push(PeerSection {
                        id: peer_id,
                        address,
                        congestion,
                    });
                }
            }
            peer.finish();
        }
        s.finish();

        let mut s = top.section("gateway");
        let tcp = s.optional_address("tcp");
        if let Some(address) = tcp
            && !is_loopback(address.ip())
        {
            s.mistake(
                "tcp",
                "is not a loopback address; without TLS callers on other hosts are not served, \
                 give them [gateway.tls]",
            );
        }
        let unix = s.optional_path("unix");
        let socket = unix.or_else(|| {
            let root = root.as_ref()?;
            Some(root.join(SOCKET_NAME))
        });
        if let Some(socket) = &socket
            && socket.as_os_str().len() > SOCKET_PATH_MAX_BYTES
        {
            s.mistake(
                "unix",
                format!(
                    "{} has {} bytes, a socket's path at most {SOCKET_PATH_MAX_BYTES}; name a shorter one",
                    socket.display(),
                    socket.as_os_str().len()
                ),
            );
        }
        let tokens = s.optional_path("tokens");
        let allow_anonymous_loopback = s.boolean("allow_anonymous_loopback", false);
        let concurrent_max = s.number32("concurrent_max", 256, 1..=65_536);
        let public_url = s.optional_string("public_url");
        if let Some(url) = &public_url
            && !is_base_url(url)
        {
            s.mistake(
                "public_url",
                "must be https:// and a host, with a port and a path where needed, and without a \
                 slash at its end",
            );
        }
        let mut users = Vec::new();
        for mut user in s.tables("users") {
            let uid = user.required_number32("uid", 0..=u32::MAX - 1);
            let principal = principal(&mut user);
            let act_as = user.boolean("act_as", false);
            if let (Some(principal), Some(uid)) = (principal, uid) {
                if users.iter().any(|u: &UserSection| u.uid == uid) {
                    user.mistake("uid", "is listed twice; keep one entry per user");
                }
                users.push(UserSection {
                    uid,
                    principal,
                    act_as,
                });
            }
            user.finish();
        }
        let mut proxies: Vec<ProxySection> = Vec::new();
        for mut proxy in s.tables("proxies") {
            if let Some(found) = proxy_section(&mut proxy) {
                if proxies.iter().any(|p| p.principal == found.principal) {
                    proxy.mistake("principal", "is listed twice; keep one entry per proxy");
                }
                proxies.push(found);
            }
            proxy.finish();
        }
        let oidc = callers::oidc(&mut s);
        let tls = callers::tls(&mut s);
        let identity_headers = callers::identity_headers(&mut s);
        let allow_shared_principal_types =
            s.list("allow_shared_principal_types", callers::given_type);
        if tcp.is_some() && tokens.is_none() && oidc.is_empty() && !allow_anonymous_loopback {
            s.mistake(
                "tcp",
                "would serve callers without authentication; name gateway.tokens or gateway.oidc, or set \
                 gateway.allow_anonymous_loopback = true and accept that every local process may ask",
            );
        }
        let gateway = GatewaySection {
            tcp,
            // Without a root there is no config.
            unix: socket.unwrap_or_default(),
            tokens,
            users,
            proxies,
            allow_anonymous_loopback,
            concurrent_max,
            public_url,
            oidc,
            tls,
            identity_headers,
            allow_shared_principal_types,
        };
        for (key, message) in callers::shared_types(&gateway, None) {
            s.mistake(key, message);
        }
        s.finish();

        let mut s = top.section("audit");
        let segment_bytes = s.bytes(
            "segment_bytes",
            derived_segment_bytes(ceiling_bytes),
            MIN_LOG_FILE_BYTES..=MAX_LOG_FILE_BYTES,
        );
        if segment_bytes > ceiling_bytes / 8 {
            s.mistake(
                "segment_bytes",
                "more than an eighth of node.ceiling_bytes; make it smaller",
            );
        }
        let segment_max_age_s = s.integer("segment_max_age_s", 300, 1..=86_400 * 30);
        let custody = s.number32("custody", 2, 0..=16);
        let archives: BTreeSet<NodeId> = s.list("archives", NodeId::new).into_iter().collect();
        let overwrite_oldest = s.boolean("overwrite_oldest", false);
        if custody > peers_listed && archives.is_empty() {
            // Ruling 2: a site of one or two nodes says so itself.
            s.mistake(
                "custody",
                format!(
                    "{custody} custodians, but mesh.peers has {peers_listed} entries: nothing could \
                     ever be evicted; set audit.custody to 1 in a site of two, or to 0 to keep \
                     everything, or name audit.archives"
                ),
            );
        }
        let retention_min_s = s.integer("retention_min_s", 0, 0..=86_400 * 3_650);
        let custody_max_bytes = s.bytes(
            "custody_max_bytes",
            ceiling_bytes / 10 * 4,
            0..=ceiling_bytes / 2,
        );
        let compression = match s.one_of("compression", "zstd", &["zstd", "off"]).as_str() {
            "off" => Compression::Off,
            _ => Compression::Zstd,
        };
        let recipients = s.strings("encrypt_to");
        let encrypt_to = match recipients.as_deref().map(AgeRecipients::new) {
            None => None,
            Some(Ok(recipients)) => Some(recipients),
            Some(Err(error)) => {
                s.mistake("encrypt_to", error.to_string());
                None
            }
        };
        let encrypt_key_file = s.optional_path("encrypt_key_file");
        s.finish();

        let mut s = top.section("store");
        let scrub_bytes_per_second = s.bytes("scrub_bytes_per_second", 4 << 20, 0..=1 << 30);
        s.finish();

        let mut s = top.section("quota");
        let actions_per_second = s.number32("actions_per_second", 5_000, 1..=10_000_000);
        let actions_burst = s.number32("actions_burst", 10_000, 1..=10_000_000);
        let mut pair = |rate: &'static str, burst: &'static str, times: u32, least: u32| {
            let per_second = actions_per_second.saturating_mul(times);
            let at_once = actions_burst.saturating_mul(times);
            (
                s.number32(rate, per_second, least..=40_000_000),
                s.number32(burst, at_once, 1..=40_000_000),
            )
        };
        let principal_action = pair(
            "principal_action_per_second",
            "principal_action_burst",
            1,
            0,
        );
        let principal_resource = pair(
            "principal_resource_per_second",
            "principal_resource_burst",
            1,
            0,
        );
        let caller = pair("caller_per_second", "caller_burst", 2, 0);
        let action = pair("action_per_second", "action_burst", 2, 0);
        let total = pair("total_per_second", "total_burst", 4, 0);
        let requests = pair("requests_per_second", "requests_burst", 2, 1);
        let evict_after_s = s.integer("evict_after_s", 300, 1..=86_400);
        s.finish();

        let mut s = top.section("consult");
        let mut upstreams: Vec<UpstreamSection> = Vec::new();
        for mut upstream in s.tables("upstreams") {
            if let Some(section) = consult_upstream(&mut upstream) {
                if upstreams.len() >= UPSTREAMS_MAX {
                    upstream.mistake(
                        "name",
                        format!("at most {UPSTREAMS_MAX} upstreams are taken"),
                    );
                } else if upstreams.iter().any(|known| known.name == section.name) {
                    upstream.mistake("name", "is listed twice; keep one entry per upstream");
                } else {
                    upstreams.push(section);
                }
            }
            upstream.finish();
        }
        s.finish();

        let mut s = top.section("log");
        let level = s.one_of(
            "level",
            "info",
            &["error", "warn", "info", "debug", "trace"],
        );
        let json = s.boolean("json", false);
        s.finish();
        top.finish();

        let mistakes = cx.take_mistakes();
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        // Every `None` below was reported as a mistake above, so this match cannot miss silently.
        match (id, domain, root, certificate, key, ca, trust, listen) {
            (
                Some(id),
                Some(domain),
                Some(root),
                Some(certificate),
                Some(key),
                Some(ca),
                Some(trust),
                Some(listen),
            ) => Ok(Self {
                gateway,
                node: NodeSection {
                    id,
                    domain,
                    root,
                    ceiling_bytes,
                    reserve_bytes,
                },
                identity: IdentitySection {
                    certificate,
                    key,
                    ca,
                    allow_without_domain,
                },
                revocation: RevocationSection {
                    crls,
                    grace_s,
                    allow_missing,
                },
                policy: PolicySection {
                    trust,
                    worker_deadline_ms,
                    allow_worker_without_seccomp,
                    solver,
                    proof_deadline_ms,
                },
                mesh: MeshSection {
                    listen,
                    peers,
                    redial_base_ms,
                    redial_cap_ms,
                    keep_alive_ms,
                    idle_timeout_ms,
                    peer_bytes_per_second,
                    peer_requests_per_second,
                    peer_bytes_per_day,
                    congestion: congestion.unwrap_or_default(),
                    send_bytes_per_second,
                },
                beacon: BeaconSection {
                    enabled: beacon_enabled,
                    group: beacon_group,
                    port: u16::try_from(beacon_port).unwrap_or(BEACON_PORT),
                    key_file: beacon_key_file,
                    interval_s: beacon_interval_s,
                },
                audit: AuditSection {
                    segment_bytes,
                    segment_max_age_s,
                    custody,
                    retention_min_s,
                    custody_max_bytes,
                    compression,
                    encrypt_to,
                    encrypt_key_file,
                    archives,
                    overwrite_oldest,
                },
                store: StoreSection {
                    scrub_bytes_per_second,
                },
                quota: QuotaSection {
                    actions_per_second,
                    actions_burst,
                    caller,
                    principal_action,
                    principal_resource,
                    action,
                    total,
                    evict_after_s,
                    requests,
                },
                consult: ConsultSection { upstreams },
                log: LogSection { level, json },
            }),
            _ => Err(vec![Mistake {
                line: 0,
                key: "(config)".to_owned(),
                message: "a required key is missing".to_owned(),
            }]),
        }
    }

    /// Sizes that follow from the ceiling stay what the running node `old` was opened with, so that
    /// a new ceiling alone is no change of anything else. Where they no longer fit below the new
    /// ceiling they follow it, which is a change that needs a restart.
    pub(crate) fn keep_derived_sizes(&mut self, old: &Self) {
        let ceiling_bytes = self.node.ceiling_bytes;
        if self.audit.segment_bytes == derived_segment_bytes(ceiling_bytes)
            && old.audit.segment_bytes <= ceiling_bytes / 8
        {
            self.audit.segment_bytes = old.audit.segment_bytes;
        }
        if self.node.reserve_bytes == derived_reserve_bytes(ceiling_bytes)
            && old.node.reserve_bytes <= ceiling_bytes / 2
        {
            self.node.reserve_bytes = old.node.reserve_bytes;
        }
    }

    /// The loosened settings in force, by their loud names; shown by `doctor` and `status`.
    #[must_use]
    pub fn loosened(&self) -> Vec<&'static str> {
        [
            (
                self.identity.allow_without_domain,
                "identity.allow_without_domain",
            ),
            (self.revocation.allow_missing, "revocation.allow_missing"),
            (self.revocation.grace_s > 0, "revocation.grace_s"),
            (
                self.gateway.allow_anonymous_loopback,
                "gateway.allow_anonymous_loopback",
            ),
            (
                self.gateway.tls.as_ref().is_some_and(|tls| {
                    tls.trust_domains
                        .iter()
                        .any(|domain| domain.allow_without_crl)
                }),
                "gateway.tls.trust_domains.allow_without_crl",
            ),
            (
                !self.gateway.allow_shared_principal_types.is_empty(),
                "gateway.allow_shared_principal_types",
            ),
            (
                self.policy.allow_worker_without_seccomp,
                "policy.allow_worker_without_seccomp",
            ),
            (self.audit.overwrite_oldest, "audit.overwrite_oldest"),
        ]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect()
    }
}

/// One decision point; nothing where something of it is amiss, which has been noted then.
fn consult_upstream(s: &mut Section<'_>) -> Option<UpstreamSection> {
    let name = s.parsed("name", |text| {
        DomainId::new(text)
            .map(|_| text.to_owned())
            .map_err(|_| "must be 1 to 63 of letters, digits, `.`, `_`, `-`")
    });
    let url = s.parsed("url", https_url);
    let address = s.address("address");
    let ca = s.required_path("ca");
    let certificate = s.required_path("certificate");
    let key = s.required_path("key");
    let crls = s.paths("crls");
    let answer_key = s.optional_path("answer_key");
    let (url, authority, server_name, path) = url?;
    Some(UpstreamSection {
        name: name?,
        url,
        authority,
        server_name,
        path,
        address: address?,
        ca: ca?,
        certificate: certificate?,
        key: key?,
        crls,
        answer_key,
    })
}

/// A URL of HTTPS: itself, host and port, the name for the certificate, the path.
fn https_url(text: &str) -> Result<(String, String, ServerName<'static>, String), &'static str> {
    const FORM: &str = "must be https://HOST[:PORT]/PATH, without user, query and fragment";
    let uri: Uri = text.parse().map_err(|_| FORM)?;
    let (Some("https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(FORM);
    };
    let is_plain = !text.contains(['@', '?', '#']) && uri.path().len() > 1 && text.len() <= 512;
    let host = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']');
    let server_name = ServerName::try_from(host.to_owned()).map_err(|_| FORM)?;
    match is_plain {
        true => Ok((
            text.to_owned(),
            authority.as_str().to_owned(),
            server_name,
            uri.path().to_owned(),
        )),
        false => Err(FORM),
    }
}

/// Whether other texts can be put behind it to make a URL.
fn is_base_url(url: &str) -> bool {
    url.len() <= 512
        && url
            .strip_prefix("https://")
            .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/') && !rest.ends_with('/'))
        && url
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~:/[]%".contains(&b))
}

/// The principal that a section names, as `Type::id`.
fn principal(s: &mut Section<'_>) -> Option<String> {
    let principal = s.required_string("principal")?;
    let (kind, id) = principal.split_once("::").unwrap_or_default();
    match Principal::new(kind, id) {
        Ok(_) => Some(principal),
        Err(error) => {
            let message = format!("must have the form Type::id, as in Agent::ops-1: {error}");
            s.mistake("principal", message);
            None
        }
    }
}

/// A proxy and how its requests are read.
fn proxy_section(s: &mut Section<'_>) -> Option<ProxySection> {
    let principal = principal(s);
    let is_https = s.one_of("scheme", "http", &["http", "https"]) == "https";
    let subject = match s.optional_string("subject_from") {
        None => Subject::Proxy,
        Some(text) => Subject::parse(&text).unwrap_or_else(|| {
            let message = format!("`{text}` is neither `source` nor `header:` and a header's name");
            s.mistake("subject_from", message);
            Subject::Proxy
        }),
    };
    let subject_type = s.optional_string("subject_type");
    let subject_type = subject_type.as_deref().unwrap_or("Service");
    let context_headers = s.strings("context_headers").unwrap_or_default();
    let key = match context_headers.is_empty() {
        true => "subject_from",
        false => "context_headers",
    };
    match ProxyTerms::new(is_https, subject, subject_type, context_headers) {
        Ok(terms) => Some(ProxySection {
            principal: principal?,
            terms,
        }),
        Err(error) => {
            let key = match error {
                ProxyTermsError::SubjectType(_) => "subject_type",
                _ => key,
            };
            s.mistake(key, error.to_string());
            None
        }
    }
}

/// The congestion control that a section names.
fn congestion(s: &mut Section<'_>) -> Option<Congestion> {
    let names = Congestion::ALL.map(Congestion::name);
    // An unnamed one is no name, which is none of them.
    Congestion::from_name(&s.one_of("congestion", "", &names))
}

/// What `audit.segment_bytes` is where the config does not name it.
fn derived_segment_bytes(ceiling_bytes: u64) -> u64 {
    (ceiling_bytes / 16).clamp(256 << 10, 8 << 20)
}

/// What `node.reserve_bytes` is where the config does not name it.
const fn derived_reserve_bytes(ceiling_bytes: u64) -> u64 {
    let part = ceiling_bytes / 16;
    if part < RESERVE_MIN_BYTES {
        RESERVE_MIN_BYTES
    } else if part > 64 << 20 {
        64 << 20
    } else {
        part
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[node]
id = "a"
domain = "harbour"
root = "state"
ceiling_bytes = "64MiB"

[identity]
certificate = "a.crt"
key = "a.key"
ca = "ca.crt"

[revocation]
crls = ["site.crl"]

[policy]
trust = "trust.toml"

[mesh]
listen = "127.0.0.1:7411"

[[mesh.peers]]
id = "b"
address = "127.0.0.2:7411"

[audit]
custody = 1
"#;

    fn keys(text: &str) -> Vec<(usize, String)> {
        Config::parse(text, Path::new("/etc/tidelock"))
            .unwrap_err()
            .into_iter()
            .map(|m| (m.line, m.key))
            .collect()
    }

    #[test]
    fn a_socket_path_that_no_socket_can_have_is_refused() {
        let deep = format!(
            "/{}",
            "d".repeat(SOCKET_PATH_MAX_BYTES - SOCKET_NAME.len() - 8)
        );
        assert!(Config::parse(GOOD, Path::new(&deep)).is_ok());
        let found = Config::parse(GOOD, Path::new(&format!("{deep}d"))).unwrap_err();
        assert_eq!(found[0].key, "gateway.unix");
    }

    #[test]
    fn a_small_config_gets_the_documented_defaults() {
        let config = Config::parse(GOOD, Path::new("/etc/tidelock")).unwrap();
        assert_eq!(config.node.root, Path::new("/etc/tidelock/state"));
        assert_eq!(config.node.ceiling_bytes, 64 << 20);
        assert_eq!(
            config.gateway.unix,
            Path::new("/etc/tidelock/state/tidelock.sock")
        );
        assert!(config.loosened().is_empty());
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_line_and_key() {
        let text = GOOD
            .replace("id = \"a\"", "id = \"-a\"")
            .replace("ceiling_bytes = \"64MiB\"", "ceiling_byte = \"64MiB\"")
            .replace("key = \"a.key\"", "key = 7")
            .replace("crls", "crl")
            .replace("127.0.0.2:7411", "harbour-b");
        let found = keys(&text);
        assert_eq!(
            found,
            [
                (3, "node.id".to_owned()),
                (6, "node.ceiling_byte".to_owned()),
                (10, "identity.key".to_owned()),
                (14, "revocation.crl".to_owned()),
                (24, "mesh.peers.address".to_owned()),
            ]
        );
    }

    #[test]
    fn an_unknown_key_names_its_nearest_neighbour() {
        let text = GOOD.replace("crls", "crl");
        let mistakes = Config::parse(&text, Path::new("/")).unwrap_err();
        assert!(mistakes[0].message.contains("`crls`"), "{}", mistakes[0]);
    }

    #[test]
    fn unauthenticated_tcp_is_refused_unless_named_loudly() {
        let open = format!("{GOOD}\n[gateway]\ntcp = \"127.0.0.1:7480\"\n");
        assert_eq!(keys(&open)[0].1, "gateway.tcp");
        let loud = format!("{open}allow_anonymous_loopback = true\n");
        let config = Config::parse(&loud, Path::new("/")).unwrap();
        assert_eq!(config.loosened(), ["gateway.allow_anonymous_loopback"]);
        let tokens = format!("{open}tokens = \"tokens.toml\"\n");
        assert!(Config::parse(&tokens, Path::new("/")).is_ok());
    }

    #[test]
    fn callers_on_other_hosts_are_refused() {
        let text = format!("{GOOD}\n[gateway]\ntcp = \"0.0.0.0:7480\"\ntokens = \"t\"\n");
        assert_eq!(keys(&text)[0].1, "gateway.tcp");
    }

    #[test]
    fn more_custodians_than_peers_is_refused() {
        assert!(
            Config::parse(GOOD, Path::new("/")).is_ok(),
            "positive control"
        );
        let archived = GOOD.replace("custody = 1", "archives = [\"vault\"]");
        let config = Config::parse(&archived, Path::new("/")).unwrap();
        assert_eq!((config.audit.custody, config.audit.archives.len()), (2, 1));
        let bad = GOOD.replace("custody = 1", "archives = [\"Vault!\", 3]");
        assert_eq!(
            keys(&bad)
                .iter()
                .filter(|(_, key)| key == "audit.archives")
                .count(),
            2
        );
        let loud = format!("{GOOD}overwrite_oldest = true\n");
        let config = Config::parse(&loud, Path::new("/")).unwrap();
        assert_eq!(config.loosened(), ["audit.overwrite_oldest"]);
        for custody in ["custody = 2", ""] {
            let text = GOOD.replace("custody = 1", custody);
            assert_eq!(keys(&text)[0].1, "audit.custody");
        }
    }

    #[test]
    fn beacons_are_off_unless_told_and_every_mistake_is_named() {
        let config = Config::parse(GOOD, Path::new("/")).unwrap();
        assert!(!config.beacon.enabled);
        let on = format!("{GOOD}\n[beacon]\nenabled = true\nkey_file = \"site.beacon\"\n");
        let bare = on.replace("address = \"127.0.0.2:7411\"\n", "");
        let config = Config::parse(&bare, Path::new("/etc/tidelock")).unwrap();
        assert_eq!(config.mesh.peers[0].address, None, "a beacon finds it");
        let beacon = config.beacon;
        assert_eq!((beacon.group, beacon.port), (BEACON_GROUP, BEACON_PORT));
        assert_eq!(beacon.interval_s, 10);
        assert_eq!(
            beacon.key_file.as_deref(),
            Some(Path::new("/etc/tidelock/site.beacon"))
        );
        // Without beacons a peer needs its address.
        let bare = GOOD.replace("address = \"127.0.0.2:7411\"\n", "");
        assert_eq!(keys(&bare)[0].1, "mesh.peers.address");
        let bad = format!(
            "{GOOD}\n[beacon]\nenabled = true\ngroup = \"10.0.0.1\"\nport = 0\ninterval_s = 0\nkey = \"k\"\n"
        );
        let bad = bad.replace("127.0.0.1:7411", "[::1]:7411");
        let found: BTreeSet<String> = keys(&bad).into_iter().map(|(_, key)| key).collect();
        let expected = [
            "beacon.group",
            "beacon.interval_s",
            "beacon.key",
            "beacon.key_file",
            "beacon.port",
            "mesh.listen",
        ];
        assert_eq!(found, expected.map(str::to_owned).into());
    }

    #[test]
    fn how_segments_are_sealed() {
        let with = |lines: &str| GOOD.replace("custody = 1", &format!("custody = 1\n{lines}"));
        let parse = |lines: &str| Config::parse(&with(lines), Path::new("/etc/tidelock"));
        let audit = parse("").unwrap().audit;
        assert_eq!(audit.compression, Compression::Zstd);
        assert_eq!((audit.encrypt_to, audit.encrypt_key_file), (None, None));
        let one = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
        let lines = format!(
            "compression = \"off\"\nencrypt_to = [\"{one}\"]\nencrypt_key_file = \"site.key\""
        );
        let audit = parse(&lines).unwrap().audit;
        assert_eq!(audit.compression, Compression::Off);
        assert_eq!(audit.encrypt_to, AgeRecipients::new(&[one]).ok());
        assert_eq!(
            audit.encrypt_key_file.as_deref(),
            Some(Path::new("/etc/tidelock/site.key"))
        );
        // Every mistake at once; a recipient that is none never means "not encrypted".
        let bad =
            with("compression = \"gzip\"\nencrypt_to = [\"age1nobody\"]\nencrypt_key = \"k\"");
        let found: Vec<_> = keys(&bad).into_iter().map(|(_, key)| key).collect();
        assert_eq!(
            found,
            ["audit.compression", "audit.encrypt_to", "audit.encrypt_key"]
        );
        for bad in [
            "encrypt_to = []",
            "encrypt_to = [7]",
            "encrypt_to = \"age1\"",
        ] {
            assert_eq!(keys(&with(bad))[0].1, "audit.encrypt_to", "{bad}");
        }
        let twice = format!("encrypt_to = [\"{one}\", \"{one}\"]");
        assert_eq!(keys(&with(&twice))[0].1, "audit.encrypt_to");
    }

    #[test]
    fn a_user_is_named_in_full_once_and_by_a_principal() {
        let users = |text: &str| format!("{GOOD}\n{text}");
        let one = "[[gateway.users]]\nuid = 1000\nprincipal = \"Agent::ops-1\"\n";
        let config = Config::parse(&users(one), Path::new("/")).unwrap();
        assert_eq!(config.gateway.users.len(), 1);
        for (text, key) in [
            (one.replace("uid = 1000\n", ""), "gateway.users.uid"),
            (one.replace("1000", "-1"), "gateway.users.uid"),
            (format!("{one}{one}"), "gateway.users.uid"),
            (one.replace("Agent::", "Agent:"), "gateway.users.principal"),
            (one.replace("Agent::", "9 x::"), "gateway.users.principal"),
            (one.replace("ops-1", ""), "gateway.users.principal"),
        ] {
            let found = keys(&users(&text));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].1, key);
        }
    }

    #[test]
    fn a_proxy_is_named_once_and_its_headers_can_be_judged() {
        let proxies = |text: &str| format!("{GOOD}\n{text}");
        let one = "[[gateway.proxies]]\nprincipal = \"Proxy::edge\"\nscheme = \"https\"\n\
                   subject_from = \"header:x-user\"\nsubject_type = \"User\"\n\
                   context_headers = [\"x-tenant\"]\n";
        let config = Config::parse(&proxies(one), Path::new("/")).unwrap();
        let terms = &config.gateway.proxies[0].terms;
        assert_eq!(terms.subject_header(), Some("x-user"));
        for (text, key) in [
            (format!("{one}{one}"), "principal"),
            (one.replace("Proxy::", "Proxy:"), "principal"),
            (one.replace("\"https\"", "\"ftp\""), "scheme"),
            (one.replace("header:x-user", "x-user"), "subject_from"),
            (one.replace("\"User\"", "\"9\""), "subject_type"),
            (one.replace("x-tenant", "X-Tenant"), "context_headers"),
            (one.replace("x-tenant", "x-user"), "context_headers"),
            (one.replace("x-tenant", "cookie"), "context_headers"),
        ] {
            let found = keys(&proxies(&text));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].1, format!("gateway.proxies.{key}"));
        }
    }

    #[test]
    fn congestion_control_is_named_for_the_node_and_for_single_peers() {
        let mesh = |lines: &str| {
            GOOD.replace(
                "listen = \"127.0.0.1:7411\"",
                &format!("listen = \"127.0.0.1:7411\"\n{lines}"),
            )
        };
        let peer = |line: &str| {
            GOOD.replace(
                "address = \"127.0.0.2:7411\"",
                &format!("address = \"127.0.0.2:7411\"\n{line}"),
            )
        };
        let parse = |text: &str| Config::parse(text, Path::new("/")).unwrap().mesh;
        let plain = parse(GOOD);
        assert_eq!(plain.congestion, Congestion::Cubic);
        assert_eq!(plain.peers[0].congestion, None);
        assert_eq!(plain.send_bytes_per_second, 0);
        for control in Congestion::ALL {
            let line = format!("congestion = \"{}\"", control.name());
            assert_eq!(parse(&mesh(&line)).congestion, control);
            assert_eq!(parse(&peer(&line)).peers[0].congestion, Some(control));
        }
        let capped = parse(&mesh("send_bytes_per_second = \"64KiB\""));
        assert_eq!(capped.send_bytes_per_second, 64 << 10);
        for (text, key) in [
            (mesh("congestion = \"reno\""), "mesh.congestion"),
            (mesh("congestion = 1"), "mesh.congestion"),
            (peer("congestion = \"Edge\""), "mesh.peers.congestion"),
            (
                mesh("send_bytes_per_second = 999"),
                "mesh.send_bytes_per_second",
            ),
        ] {
            assert_eq!(keys(&text)[0].1, key, "{text}");
        }
    }

    #[test]
    fn a_size_that_the_log_would_refuse_is_refused_here() {
        let sized = |size: &str| format!("{GOOD}segment_bytes = \"{size}\"\n");
        for bad in ["64KiB", "32MiB"] {
            assert_eq!(keys(&sized(bad))[0].1, "audit.segment_bytes", "{bad}");
        }
        for good in ["128KiB", "8MiB"] {
            assert!(
                Config::parse(&sized(good), Path::new("/")).is_ok(),
                "{good}"
            );
        }
    }

    #[test]
    fn sizes_that_follow_from_the_ceiling_stay_over_a_reload_while_they_fit() {
        let parse = |text: &str| Config::parse(text, Path::new("/")).unwrap();
        let old = parse(GOOD);
        let mut higher = parse(&GOOD.replace("64MiB", "512MiB"));
        assert_ne!(higher.audit.segment_bytes, old.audit.segment_bytes);
        higher.keep_derived_sizes(&old);
        assert_eq!(higher.audit.segment_bytes, old.audit.segment_bytes);
        assert_eq!(higher.node.reserve_bytes, old.node.reserve_bytes);
        let mut named = parse(&format!("{GOOD}segment_bytes = \"1MiB\"\n"));
        named.keep_derived_sizes(&old);
        assert_eq!(named.audit.segment_bytes, 1 << 20, "what is named is meant");
        let old = parse(&GOOD.replace("64MiB", "512MiB"));
        let mut lower = parse(&GOOD.replace("64MiB", "16MiB"));
        lower.keep_derived_sizes(&old);
        assert!(
            lower.audit.segment_bytes < old.audit.segment_bytes,
            "the old size would not fit"
        );
    }

    #[test]
    fn a_decision_point_is_met_at_an_address_over_https_and_named_once() {
        let one = "[[consult.upstreams]]\nname = \"authority\"\n\
                   url = \"https://authority.example:8443/access/v1/evaluation\"\n\
                   address = \"10.0.0.5:8443\"\nca = \"ca.pem\"\ncertificate = \"a.crt\"\n\
                   key = \"a.key\"\n";
        let with = |text: &str| format!("{GOOD}\n{text}");
        let config = Config::parse(&with(one), Path::new("/etc/tidelock")).unwrap();
        let upstream = &config.consult.upstreams[0];
        assert_eq!(upstream.authority, "authority.example:8443");
        assert_eq!(upstream.path, "/access/v1/evaluation");
        assert_eq!(
            upstream.server_name,
            ServerName::try_from("authority.example").unwrap()
        );
        assert_eq!(upstream.key, Path::new("/etc/tidelock/a.key"));
        let by_address = one.replace("authority.example", "10.0.0.5");
        assert!(Config::parse(&with(&by_address), Path::new("/")).is_ok());
        for (from, to, key) in [
            ("https://", "http://", "url"),
            ("https://", "https://user@", "url"),
            ("/access/v1/evaluation", "", "url"),
            ("/evaluation", "/evaluation?x=1", "url"),
            ("10.0.0.5:8443", "authority.example:8443", "address"),
            ("address = \"10.0.0.5:8443\"\n", "", "address"),
            ("name = \"authority\"", "name = \"a b\"", "name"),
            ("ca = \"ca.pem\"\n", "", "ca"),
            ("key = \"a.key\"\n", "", "key"),
            ("ca = ", "redirects = 3\nca = ", "redirects"),
        ] {
            let bad = one.replace(from, to);
            assert_ne!(bad, one, "{from}");
            let found = keys(&with(&bad));
            assert_eq!(found[0].1, format!("consult.upstreams.{key}"), "{from}");
        }
        assert_eq!(
            keys(&with(&format!("{one}{one}")))[0].1,
            "consult.upstreams.name"
        );
        // All at once.
        let bad = one
            .replace("https", "http")
            .replace("10.0.0.5", "x")
            .replace("ca.pem", "");
        assert_eq!(keys(&with(&bad)).len(), 3);
    }

    #[test]
    fn broken_syntax_names_its_line() {
        let found = keys("[node]\nid = \n");
        assert_eq!(found, [(2, "(syntax)".to_owned())]);
    }
}
