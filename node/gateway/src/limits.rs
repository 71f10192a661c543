//! Every limit of the doors in one place, and how the limits relate.
//!
//! Worst case of the whole crate with the defaults, all three doors open, every connection hostile and
//! every buffer full: [`WORST_CASE_BYTES`], asserted below to stay under 352 MiB. An idle node
//! holds a few kilobytes a connection.

use std::time::Duration;

use tidelock_interceptor::limits::CONSULT_WAIT;
use tidelock_quota::Rate;

/// Longest body of a decide or explain request: what the interceptor takes. One such buffer a concurrency slot, so at most
/// [`SLOTS_DEFAULT`] of them: 16 MiB.
pub const BODY_BYTES_MAX: usize = tidelock_interceptor::limits::MAX_BODY_BYTES;

/// What gRPC puts before a message: whether it is compressed, and its length. A check of Envoy is one
/// message of at most [`BODY_BYTES_MAX`] in a slot's buffer; the one copy that reading makes is the
/// request as parsed, which the interceptor's limits count.
pub(crate) const GRPC_PREFIX_BYTES: usize = 5;

/// Longest body of an operator's request (a bundle or a CRL travels in it). At most
/// [`ADMIN_SLOTS`] of them at once: 16 MiB.
pub const ADMIN_BODY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Operator requests that run at once; the next one gets 429.
pub const ADMIN_SLOTS: usize = 2;

/// Longest request head, and the size of a connection's read buffer: longer heads get 431. One a
/// connection.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Longest HTTP/2 header list, decompressed.
pub const HEAD_LIST_BYTES_MAX: u32 = 16 * 1024;

/// Requests that one HTTP/2 connection may have open: what clients take for granted before they
/// hear of it (RFC 9113, 6.5.2). Each costs a task of about 2 KiB, and a slot if it is to last.
pub const H2_STREAMS_MAX: u32 = 100;

/// HTTP/2 flow-control window of a stream: a whole decide request fits without a round trip.
pub const H2_STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// HTTP/2 flow-control window of a connection: what an unread flood can make the node buffer.
pub const H2_CONNECTION_WINDOW_BYTES: u32 = 64 * 1024;

/// Bytes of responses that HTTP/2 buffers for one stream whose peer does not read.
pub const H2_SEND_BUFFER_BYTES: usize = 64 * 1024;

/// Connections of one door that have presented valid credentials, default. No caller has more than half
/// of them.
pub const CONNECTIONS_DEFAULT: usize = 256;

/// Connections of one door that have not (yet) presented valid credentials, default. When they
/// are all taken, the oldest of them makes room for the newest: a flood costs the flood.
pub const STRANGERS_DEFAULT: usize = 64;

/// Largest number of either kind that a configuration may ask for.
pub const CONNECTIONS_MAX: usize = 16 * 1024;

/// Decisions in flight, default. The next request gets 429 `rate_limited`.
pub const SLOTS_DEFAULT: usize = 256;

/// Of those, what one principal may hold, default: a single caller cannot starve the others.
pub const SLOTS_PER_PRINCIPAL_DEFAULT: usize = 192;

/// Largest number of slots that a configuration may ask for: 64 KiB of body each, 1 GiB.
pub const SLOTS_MAX: usize = 16 * 1024;

/// From the first byte of a request to the end of its head, and from connect to the first byte.
pub const HEAD_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);

/// From the head to the last byte of the body. A slot is held meanwhile, so it is short.
pub const BODY_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);

/// A connection that has not presented valid credentials by then is closed.
pub const STRANGER_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// A connection without a request for this long is closed.
pub const IDLE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(75);

/// A client that accepts no byte of a response for this long is closed.
pub const WRITE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// A decision that has not come back by then is given up and answered 503. The interceptor gives
/// up by itself before that; this is for when nobody ticks it. Longer than a decision point upstream may
/// be waited for.
pub const DECISION_TIMEOUT_DEFAULT: Duration =
    CONSULT_WAIT.saturating_add(Duration::from_millis(1500));

/// The same at the door for Envoy, whose own limit is a second in the configs of the book: it must hear
/// the deny, because it lets things pass on an error where it is told to. A decision point that takes longer
/// is not waited for there.
pub const PROXY_DECISION_TIMEOUT: Duration = Duration::from_millis(750);

/// An AuthZEN request begins no further evaluation after this. What was begun may take another
/// [`DECISION_TIMEOUT_DEFAULT`] each; the rest is answered `false`.
pub const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// Evaluations of one AuthZEN request that are on their way together.
pub const BATCH_TOGETHER: usize = 16;

/// An operator's request (verifying a bundle and running its tests, say) may take this long.
pub const ADMIN_TIMEOUT: Duration = Duration::from_secs(60);

/// What a drain may take before connections are cut, default.
pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);

/// Length of the window in which refusals are counted into one summary, default.
pub const REFUSAL_WINDOW_DEFAULT: Duration = Duration::from_secs(60);

/// No timeout may be configured beyond this.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// Sources that a refusal window tells apart; further ones are counted exactly, but together.
/// At most 440 bytes of JSON each, so a whole window fits one event record of 48 KiB.
pub const REFUSAL_SOURCES_MAX: usize = 96;

/// Upper bound of one source's JSON in a window: an IPv6 address and eight 20-digit counters.
pub(crate) const REFUSAL_SOURCE_JSON_BYTES_MAX: usize = 440;

/// Upper bound of the JSON of all codes of refused credentials in a window: some seventy of them with
/// a 20-digit number each.
pub(crate) const REFUSAL_CODES_JSON_BYTES_MAX: usize = 4096;

/// Tokens in one token file. Every one is compared in constant time on every request that brings
/// a token: about 10 microseconds at the limit.
pub const TOKENS_MAX: usize = 1024;

/// Longest token file.
pub const TOKEN_FILE_BYTES_MAX: usize = 1024 * 1024;

/// Longest bearer token that is looked at.
pub const TOKEN_BYTES_MAX: usize = 512;

/// Longest workload token (JWT) that is looked at. One a request, decoded once: 24 KiB.
pub const JWT_BYTES_MAX: usize = 8 * 1024;

/// How deep the claims of a workload token may nest.
pub const CLAIM_DEPTH_MAX: usize = 8;

/// Texts of one claim that are looked at, audiences say.
pub const CLAIM_VALUES_MAX: usize = 32;

/// Issuers of workload tokens.
pub const ISSUERS_MAX: usize = 16;

/// Rules of one issuer, or of one trust domain.
pub const RULES_MAX: usize = 256;

/// Longest pattern of a name: a SPIFFE id has at most 2048 bytes.
pub const PATTERN_BYTES_MAX: usize = 2048;

/// Longest file of an issuer's keys: what the strict JSON reader takes.
pub const JWKS_BYTES_MAX: usize = BODY_BYTES_MAX;

/// Keys of one issuer: about 1 KiB each.
pub const JWKS_KEYS_MAX: usize = 32;

/// Longest name of a key.
pub const KEY_ID_BYTES_MAX: usize = 128;

/// Keys of callers that sign their requests, in one token file.
pub const SIGNING_KEYS_MAX: usize = 256;

/// Longest `Signature-Input` that is looked at.
pub const SIGNATURE_INPUT_BYTES_MAX: usize = 1024;

/// Shortest nonce: 16 characters of base64 are 96 bits.
pub const NONCE_BYTES_MIN: usize = 16;

/// Longest nonce. Only its hash is kept.
pub const NONCE_BYTES_MAX: usize = 128;

/// For how long a request signature may be valid, seconds.
pub const SIGNATURE_WINDOW_S: u64 = 60;

/// How far ahead of the node's clock a signature may have been made, milliseconds.
pub const SIGNATURE_SKEW_MS: u64 = 5_000;

/// Nonces that are held for one key: 68 signed requests a second, each signed for the whole window.
pub const NONCES_PER_KEY_MAX: usize = 4096;

/// Nonces that are held in all: at most 300 bytes each, 10 MiB.
pub const NONCES_MAX: usize = 32 * 1024;

/// Callers by workload token or certificate that are told apart at once: 300 bytes each. Those who
/// have nothing in progress make room.
pub const DYNAMIC_CALLERS_MAX: usize = 4096;

/// Unix user ids mapped to principals.
pub const UNIX_PEERS_MAX: usize = 1024;

/// Callers whose requests are counted: about 800 bytes each at the longest names. At least as many as
/// there can be tokens and user ids, so that none is forgotten.
pub const GUARD_CALLERS_MAX: usize = 4096;

/// Addresses whose handshakes are counted: about 150 bytes each.
pub const HANDSHAKE_ADDRESSES_MAX: usize = 4096;

/// Handshakes that one address may begin at the TLS door, default: at half a millisecond each a twentieth
/// of a core, and a burst in which all connections that there may be can be made anew.
pub const HANDSHAKES_DEFAULT: Rate = Rate {
    per_second: 100,
    burst: 400,
};

/// Requests of one caller, default.
pub const REQUESTS_DEFAULT: Rate = Rate {
    per_second: 10_000,
    burst: 20_000,
};

/// Longest response that the client module reads.
pub const CLIENT_RESPONSE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest head of a response that the client module reads, and its buffer of a connection.
pub const CLIENT_HEAD_BYTES_MAX: usize = 64 * 1024;

/// Idle connections that one client keeps.
pub const CLIENT_IDLE_MAX: usize = 64;

/// What one connection can make the node hold, HTTP/2 being the costlier protocol.
const CONNECTION_BYTES: usize = HEAD_BYTES_MAX
    + HEAD_LIST_BYTES_MAX as usize
    + H2_CONNECTION_WINDOW_BYTES as usize
    + H2_STREAMS_MAX as usize * 2 * 1024;

/// What TLS holds beside that: a record each way, and the client's chain.
const TLS_CONNECTION_BYTES: usize = 48 * 1024;

/// What all doors can hold with the defaults.
pub const WORST_CASE_BYTES: usize = (CONNECTIONS_DEFAULT + STRANGERS_DEFAULT)
    * TLS_CONNECTION_BYTES
    + 3 * (CONNECTIONS_DEFAULT + STRANGERS_DEFAULT) * CONNECTION_BYTES
    + SLOTS_DEFAULT * BODY_BYTES_MAX
    + ADMIN_SLOTS * ADMIN_BODY_BYTES_MAX;

const _: () = assert!(
    PROXY_DECISION_TIMEOUT.as_millis()
        > tidelock_interceptor::limits::APPEND_TIMEOUT.as_millis()
            + 2 * tidelock_interceptor::limits::ENGINE_WAIT.as_millis()
);
const _: () = assert!(WORST_CASE_BYTES < 352 * 1024 * 1024);
const _: () = assert!(SLOTS_PER_PRINCIPAL_DEFAULT < SLOTS_DEFAULT);
const _: () = assert!(SLOTS_DEFAULT <= SLOTS_MAX);
const _: () = assert!(CONNECTIONS_DEFAULT <= CONNECTIONS_MAX && STRANGERS_DEFAULT > 0);
const _: () = assert!(
    DECISION_TIMEOUT_DEFAULT.as_millis()
        > CONSULT_WAIT.as_millis()
            + tidelock_interceptor::limits::APPEND_TIMEOUT.as_millis()
            // For a worker and the engine, and once more when the decision point has answered.
            + 4 * tidelock_interceptor::limits::ENGINE_WAIT.as_millis()
);
const _: () = assert!(GUARD_CALLERS_MAX > TOKENS_MAX + UNIX_PEERS_MAX + 3);
const _: () = assert!(TOKEN_BYTES_MAX < HEAD_BYTES_MAX);
const _: () = assert!(HANDSHAKES_DEFAULT.burst as usize >= CONNECTIONS_DEFAULT + STRANGERS_DEFAULT);
const _: () = assert!(JWT_BYTES_MAX < HEAD_BYTES_MAX);
const _: () =
    assert!(NONCES_PER_KEY_MAX < NONCES_MAX && NONCES_MAX.is_multiple_of(NONCES_PER_KEY_MAX));
const _: () =
    assert!(NONCE_BYTES_MIN < NONCE_BYTES_MAX && NONCE_BYTES_MAX < SIGNATURE_INPUT_BYTES_MAX);
const _: () = assert!(CLAIM_DEPTH_MAX < tidelock_interceptor::limits::MAX_DEPTH);
const _: () = assert!(HEAD_BYTES_MAX >= 8192, "hyper's smallest read buffer");
const _: () = assert!(
    REFUSAL_SOURCES_MAX * REFUSAL_SOURCE_JSON_BYTES_MAX + REFUSAL_CODES_JSON_BYTES_MAX
        < 48 * 1024 - 1024
);
const _: () = assert!(BODY_BYTES_MAX <= H2_STREAM_WINDOW_BYTES as usize);
