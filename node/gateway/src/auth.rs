//! Who is calling: bearer tokens, the kernel's word on a Unix socket, or nobody.
//!
//! Everything is decided from the request head alone, before a body byte is read, a slot taken or
//! a buffer grown. A request that brings an `Authorization` header is judged by that header only:
//! a wrong token never falls back to something weaker.
//!
//! Start at [`AuthConfig`]; the token file has its own module, [`crate::tokens`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderName};
use tidelock_interceptor::{Caller, Principal, StatedBy};

use crate::credentials::{CallerTime, CredentialFault, Pattern};
use crate::limits::{DYNAMIC_CALLERS_MAX, JWT_BYTES_MAX, TOKEN_BYTES_MAX, UNIX_PEERS_MAX};
use crate::nonces::NonceWindow;
use crate::oidc::{self, OidcIssuer};
use crate::refusals::Source;
use crate::signatures::{self, BodyDigest, Signed, SigningKey};
use crate::slots::Counter;
use crate::tokens::{TokenDigest, TokenSet};

/// Name of the TCP door in records.
pub const DOOR_TCP: &str = "tcp";
/// Name of the TLS door in records.
pub const DOOR_TLS: &str = "tls";
/// Name of the Unix socket door in records.
pub const DOOR_UNIX: &str = "unix";

/// Name of every door in records, where a proxy stated the principal.
pub const DOOR_PROXY: &str = "proxy";

/// The user id of the superuser, who is always the local operator.
const ROOT_UID: u32 = 0;

/// What a caller may do. A caller without any scope may read status and metrics only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes {
    /// May ask for decisions.
    pub decide: bool,
    /// May ask for explanations, which never give a permit.
    pub explain: bool,
    /// May name a principal other than its own in a request.
    pub act_as: bool,
}

impl Scopes {
    /// Every scope.
    pub const ALL: Self = Self {
        decide: true,
        explain: true,
        act_as: true,
    };

    /// Adds the scope of this name; false if there is no such scope.
    #[must_use]
    pub fn add(&mut self, name: &str) -> bool {
        match name {
            "decide" => self.decide = true,
            "explain" => self.explain = true,
            "act_as" => self.act_as = true,
            _ => return false,
        }
        true
    }
}

/// A principal and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    principal_type: String,
    principal_id: String,
    scopes: Scopes,
}

/// Why a grant is not one: the interceptor would refuse its principal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{principal_type}::{principal_id:?} is no principal: {reason}")]
pub struct GrantError {
    /// The type.
    pub principal_type: String,
    /// The id.
    pub principal_id: String,
    /// What is wrong with one of them.
    pub reason: String,
}

impl Grant {
    /// The type of a principal that its grant does not name.
    pub const DEFAULT_TYPE: &'static str = "Agent";

    /// A grant of `scopes` to the principal `principal_type::"principal_id"`.
    ///
    /// # Errors
    ///
    /// [`GrantError`] when the type is no name, or the id is empty, too long or not plain text.
    pub fn new(
        principal_type: &str,
        principal_id: &str,
        scopes: Scopes,
    ) -> Result<Self, GrantError> {
        Principal::new(principal_type, principal_id).map_err(|error| GrantError {
            principal_type: principal_type.to_owned(),
            principal_id: principal_id.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            principal_type: principal_type.to_owned(),
            principal_id: principal_id.to_owned(),
            scopes,
        })
    }

    /// The principal's type, `Agent` say.
    #[must_use]
    pub fn principal_type(&self) -> &str {
        &self.principal_type
    }

    /// The principal's id.
    #[must_use]
    pub fn principal_id(&self) -> &str {
        &self.principal_id
    }

    /// What it may do.
    #[must_use]
    pub fn scopes(&self) -> Scopes {
        self.scopes
    }

    pub(crate) fn who(&self) -> Who {
        (self.principal_type.clone(), self.principal_id.clone())
    }
}

/// Who may call, through which door. Nobody, until something is added.
#[derive(Clone, Debug, Default)]
pub struct AuthConfig {
    tokens: TokenSet,
    unix_peers: BTreeMap<u32, Grant>,
    anonymous: Option<Grant>,
    issuers: Vec<OidcIssuer>,
    proxies: Vec<Proxy>,
    signature_tag: String,
    time: CallerTime,
}

/// A proxy that may say in a header for whom it asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// The type of the principal as which the proxy itself is authenticated.
    pub hop_type: String,
    /// Its id.
    pub hop_id: String,
    /// The header with the id of the principal for whom it asks.
    pub header: HeaderName,
    /// The type of those principals.
    pub principal_type: String,
    /// The principals for whom it may ask.
    pub allow: Vec<Pattern>,
}

/// A user id that was mapped twice, or one too many.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnixPeerError {
    /// The same user id has two principals.
    #[error("user id {0} is mapped to two principals: keep one")]
    Twice(u32),
    /// More mappings than there is room for.
    #[error("more than {UNIX_PEERS_MAX} user ids are mapped to principals")]
    TooMany,
}

impl AuthConfig {
    /// Callers that bring one of these tokens are known, at both doors.
    #[must_use]
    pub fn tokens(mut self, tokens: TokenSet) -> Self {
        self.tokens = tokens;
        self
    }

    /// Callers of the Unix socket with this user id are known without a token.
    ///
    /// Root and the node's own user need no mapping: they are the operator, `Operator::"uid-N"`,
    /// with every scope. A mapping of theirs replaces that principal and its scopes.
    ///
    /// # Errors
    ///
    /// [`UnixPeerError`] when the user id is mapped already, or there are too many.
    pub fn unix_peer(mut self, uid: u32, grant: Grant) -> Result<Self, UnixPeerError> {
        if self.unix_peers.contains_key(&uid) {
            return Err(UnixPeerError::Twice(uid));
        }
        if self.unix_peers.len() >= UNIX_PEERS_MAX {
            return Err(UnixPeerError::TooMany);
        }
        self.unix_peers.insert(uid, grant);
        Ok(self)
    }

    /// Every TCP caller without credentials is this principal. Whoever can open a socket on this
    /// machine is then let in: for demonstrations, and sites where that is the boundary.
    #[must_use]
    pub fn allow_anonymous_loopback(mut self, grant: Grant) -> Self {
        self.anonymous = Some(grant);
        self
    }

    /// The clock by which credentials are judged that have a beginning and an end. Without one they
    /// are all refused.
    #[must_use]
    pub fn time(mut self, time: CallerTime) -> Self {
        self.time = time;
        self
    }

    /// Callers that bring a workload token of this issuer are known, at the doors that take tokens.
    #[must_use]
    pub fn issuer(mut self, issuer: OidcIssuer) -> Self {
        self.issuers.push(issuer);
        self
    }

    /// The tag that signed requests must carry: the node's id. A signature for one node is then none
    /// for another that has the same key.
    #[must_use]
    pub fn signature_tag(mut self, tag: &str) -> Self {
        tag.clone_into(&mut self.signature_tag);
        self
    }

    /// This proxy, and nobody else, is believed in this header.
    #[must_use]
    pub fn proxy(mut self, proxy: Proxy) -> Self {
        self.proxies.push(proxy);
        self
    }

    /// The tokens and keys that are known.
    #[must_use]
    pub fn token_set(&self) -> &TokenSet {
        &self.tokens
    }

    /// Whether anybody at all can get in through TCP.
    #[must_use]
    pub fn admits_anyone_over_tcp(&self) -> bool {
        self.anonymous.is_some() || !self.tokens.is_empty() || !self.issuers.is_empty()
    }

    /// As whom a bearer token would be taken, and with which scopes. Nothing is counted.
    ///
    /// # Errors
    /// [`CredentialFault`], as a door would refuse it.
    pub fn inspect_token(&self, token: &[u8]) -> Result<Grant, CredentialFault> {
        let digest = TokenDigest::of(token);
        let known = self.tokens.iter().find(|(known, _)| *known == digest);
        match known {
            Some((_, grant)) => {
                not_expired(self.tokens.expires_unix_ms(&digest), &self.time)?;
                Ok(grant.clone())
            }
            None if oidc::is_jwt(token) => oidc::verify(token, &self.issuers, &self.time),
            None => Err(CredentialFault::TokenUnknown),
        }
    }
}

/// One known caller: what it may do, and how much it is doing.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) scopes: Scopes,
    pub(crate) in_flight: Arc<Counter>,
    tcp: Caller,
    tls: Caller,
    unix: Caller,
}

impl Identity {
    pub(crate) fn caller(&self, source: Source) -> &Caller {
        match source {
            Source::Tcp(_) => &self.tcp,
            Source::Tls(_) => &self.tls,
            Source::Unix(_) => &self.unix,
        }
    }
}

impl Identity {
    fn new(grant: &Grant, in_flight: Arc<Counter>) -> Self {
        let caller = |door| Caller {
            principal_type: grant.principal_type.clone(),
            principal_id: grant.principal_id.clone(),
            may_act_as: grant.scopes.act_as,
            door,
            stated_by: None,
        };
        Self {
            scopes: grant.scopes,
            in_flight,
            tcp: caller(DOOR_TCP),
            tls: caller(DOOR_TLS),
            unix: caller(DOOR_UNIX),
        }
    }
}

/// A principal, by type and id.
pub(crate) type Who = (String, String);

/// One counter of decisions in flight a principal, however many credentials it has.
#[derive(Debug, Default)]
struct Counters {
    /// Of those whom the config names.
    named: BTreeMap<Who, Arc<Counter>>,
    /// Of those who were named by an issuer. They are forgotten when nothing of theirs is left.
    live: Mutex<BTreeMap<Who, Weak<Counter>>>,
}

impl Counters {
    fn of_named(&mut self, grant: &Grant) -> Arc<Counter> {
        let who = grant.who();
        Arc::clone(self.named.entry(who).or_default())
    }

    // INV-07: as many as are active, up to the limit.
    fn of_any(&self, grant: &Grant) -> Result<Arc<Counter>, CredentialFault> {
        let who = grant.who();
        if let Some(counter) = self.named.get(&who) {
            return Ok(Arc::clone(counter));
        }
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = live.get(&who).and_then(Weak::upgrade) {
            return Ok(counter);
        }
        if live.len() >= DYNAMIC_CALLERS_MAX {
            live.retain(|_, counter| counter.strong_count() > 0);
            if live.len() >= DYNAMIC_CALLERS_MAX {
                return Err(CredentialFault::CallersFull);
            }
        }
        let counter = Arc::new(Counter::default());
        live.insert(who, Arc::downgrade(&counter));
        Ok(counter)
    }
}

/// A known token.
struct Token {
    digest: TokenDigest,
    identity: Arc<Identity>,
    /// The key that must have signed what it comes with.
    signed_by: Option<String>,
    expires_unix_ms: Option<u64>,
}

/// Who sent a request.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) identity: Arc<Identity>,
    /// What its body must be, where it was signed.
    pub(crate) body: Option<BodyDigest>,
}

impl From<Arc<Identity>> for Known {
    fn from(identity: Arc<Identity>) -> Self {
        Self {
            identity,
            body: None,
        }
    }
}

/// What an identity header came to.
#[derive(Debug)]
pub(crate) enum Stated {
    /// There is none.
    Nobody,
    /// There is one, on a hop that is not believed.
    Ignored,
    /// The proxy asks for this principal.
    Principal(Arc<Identity>),
}

/// The configuration, ready to be asked.
pub(crate) struct Authenticator {
    tokens: Vec<Token>,
    keys: Vec<SigningKey>,
    key_identities: BTreeMap<String, Arc<Identity>>,
    signature_tag: String,
    nonces: Arc<NonceWindow>,
    proxies: Vec<Proxy>,
    unix_peers: BTreeMap<u32, Arc<Identity>>,
    anonymous: Option<Arc<Identity>>,
    issuers: Vec<OidcIssuer>,
    time: CallerTime,
    counters: Counters,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator")
            .field("tokens", &self.tokens.len())
            .field("unix_peers", &self.unix_peers.len())
            .field("anonymous", &self.anonymous.is_some())
            .field("issuers", &self.issuers.len())
            .finish_non_exhaustive()
    }
}

impl Authenticator {
    pub(crate) fn new(config: AuthConfig, own_uid: u32, nonces: Arc<NonceWindow>) -> Self {
        nonces.begin(|| config.time.sane_unix_ms());
        let mut counters = Counters::default();
        let mut identity = |grant: &Grant| Arc::new(Identity::new(grant, counters.of_named(grant)));

        let mut unix_peers: BTreeMap<u32, Arc<Identity>> = config
            .unix_peers
            .iter()
            .map(|(uid, grant)| (*uid, identity(grant)))
            .collect();
        for uid in [ROOT_UID, own_uid] {
            unix_peers.entry(uid).or_insert_with(|| {
                identity(&Grant {
                    principal_type: "Operator".to_owned(),
                    principal_id: format!("uid-{uid}"),
                    scopes: Scopes::ALL,
                })
            });
        }
        let tokens = config
            .tokens
            .iter()
            .map(|(digest, grant)| Token {
                digest: *digest,
                identity: identity(grant),
                signed_by: config.tokens.signed_by(digest).cloned(),
                expires_unix_ms: config.tokens.expires_unix_ms(digest),
            })
            .collect();
        let known_keys = config.tokens.keys().iter();
        let key_identities = known_keys
            .clone()
            .map(|(key, grant)| (key.id.clone(), identity(grant)))
            .collect();
        let anonymous = config.anonymous.as_ref().map(&mut identity);
        Self {
            tokens,
            keys: known_keys.map(|(key, _)| key.clone()).collect(),
            key_identities,
            signature_tag: config.signature_tag.clone(),
            nonces,
            proxies: config.proxies.clone(),
            unix_peers,
            anonymous,
            issuers: config.issuers,
            time: config.time,
            counters,
        }
    }

    /// Who sent a request with this head from this source.
    pub(crate) fn authenticate(
        &self,
        source: Source,
        request: Signed<'_>,
    ) -> Result<Known, CredentialFault> {
        let is_signed = signatures::is_present(request.headers);
        let mut presented = request.headers.get_all(AUTHORIZATION).iter();
        let Some(first) = presented.next() else {
            if is_signed {
                return self.signer(request);
            }
            let known = match source {
                Source::Tcp(_) => self.anonymous.as_ref(),
                // There the certificate is the credential.
                Source::Tls(_) => None,
                Source::Unix(uid) => self.unix_peers.get(&uid),
            };
            return known
                .map(|identity| Arc::clone(identity).into())
                .ok_or(CredentialFault::None);
        };
        // Two headers are two claims: which one is meant is not ours to guess.
        if presented.next().is_some() {
            return Err(CredentialFault::Malformed);
        }
        let token = bearer(first.as_bytes()).ok_or(CredentialFault::Malformed)?;
        let digest = TokenDigest::of(token);
        // Every entry is compared, each in constant time: the time says how many tokens there
        // are, not which one was nearly right.
        let mut found = None;
        for known in &self.tokens {
            if verify_slices_are_equal(known.digest.as_bytes(), digest.as_bytes()).is_ok() {
                found = Some(known);
            }
        }
        if let Some(token) = found {
            not_expired(token.expires_unix_ms, &self.time)?;
        }
        match found {
            Some(Token {
                signed_by: Some(key),
                ..
            }) if is_signed => {
                let signer = self.signer(request)?;
                // Token and key are of one principal; the file was refused otherwise.
                let expected = self.key_identities.get(key);
                match expected.is_some_and(|expected| Arc::ptr_eq(expected, &signer.identity)) {
                    true => Ok(signer),
                    false => Err(CredentialFault::SignatureKey),
                }
            }
            Some(token) if token.signed_by.is_some() => Err(CredentialFault::SignatureAbsent),
            _ if is_signed => Err(CredentialFault::TwoCredentials),
            Some(token) => Ok(Arc::clone(&token.identity).into()),
            None if !self.issuers.is_empty() && oidc::is_jwt(token) => {
                let grant = oidc::verify(token, &self.issuers, &self.time)?;
                Ok(self.identity_of(&grant)?.into())
            }
            None => Err(CredentialFault::TokenUnknown),
        }
    }

    /// Whose key signed a request. Its nonce is taken.
    fn signer(&self, request: Signed<'_>) -> Result<Known, CredentialFault> {
        let tag = &self.signature_tag;
        let by = signatures::verify(request, &self.keys, tag, &self.nonces, &self.time)?;
        let identity = self.key_identities.get(by.key_id);
        Ok(Known {
            identity: Arc::clone(identity.ok_or(CredentialFault::SignatureKey)?),
            body: Some(by.body),
        })
    }

    /// For whom an authenticated caller asks, if the config believes it in a header. On any other hop
    /// such a header means nothing.
    pub(crate) fn stated(
        &self,
        hop: &Identity,
        headers: &HeaderMap,
    ) -> Result<Stated, CredentialFault> {
        let is_hop = |proxy: &&Proxy| {
            (&proxy.hop_type, &proxy.hop_id) == (&hop.tcp.principal_type, &hop.tcp.principal_id)
        };
        let Some(proxy) = self.proxies.iter().find(is_hop) else {
            let any = self.proxies.iter().any(|p| headers.contains_key(&p.header));
            return Ok(if any { Stated::Ignored } else { Stated::Nobody });
        };
        let mut values = headers.get_all(&proxy.header).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(CredentialFault::HeaderAbsent);
        };
        let value = std::str::from_utf8(value.as_bytes());
        let id = value.map_err(|_| CredentialFault::HeaderRefused)?;
        if !proxy.allow.iter().any(|allowed| allowed.matches(id)) {
            return Err(CredentialFault::HeaderRefused);
        }
        // It may do what the proxy may, for itself only.
        let scopes = Scopes {
            act_as: false,
            ..hop.scopes
        };
        let grant = Grant::new(&proxy.principal_type, id, scopes)
            .map_err(|_| CredentialFault::HeaderRefused)?;
        let mut identity = Identity::new(&grant, Arc::clone(&hop.in_flight));
        for caller in [&mut identity.tcp, &mut identity.tls, &mut identity.unix] {
            let door = std::mem::replace(&mut caller.door, DOOR_PROXY);
            caller.stated_by = Some(Box::new(StatedBy {
                principal_type: proxy.hop_type.clone(),
                principal_id: proxy.hop_id.clone(),
                door,
            }));
        }
        Ok(Stated::Principal(Arc::new(identity)))
    }

    /// The identity of a principal that somebody else's word has named.
    pub(crate) fn identity_of(&self, grant: &Grant) -> Result<Arc<Identity>, CredentialFault> {
        let in_flight = self.counters.of_any(grant)?;
        Ok(Arc::new(Identity::new(grant, in_flight)))
    }
}

/// Whether a source is the operator of this node: root or the node's own user, and only through
/// the Unix socket, where the kernel vouches for the user id.
pub(crate) fn is_operator(source: Source, own_uid: u32) -> bool {
    matches!(source, Source::Unix(uid) if uid == ROOT_UID || uid == own_uid)
}

/// Whether a token that ends then is taken now.
// INV-18: with a clock in doubt nothing that has an end is believed.
fn not_expired(expires_unix_ms: Option<u64>, time: &CallerTime) -> Result<(), CredentialFault> {
    match expires_unix_ms {
        Some(end) if time.sane_unix_ms()? >= end => Err(CredentialFault::TokenExpired),
        _ => Ok(()),
    }
}

fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    let well_formed = scheme.eq_ignore_ascii_case(b"bearer ")
        && token.len()
            <= if oidc::is_jwt(token) {
                JWT_BYTES_MAX
            } else {
                TOKEN_BYTES_MAX
            }
        && !token.is_empty()
        && token.iter().all(u8::is_ascii_graphic);
    well_formed.then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::Moment;
    use crate::refusals::RefusalKind;
    use hyper::header::HeaderValue;
    use std::net::Ipv4Addr;
    use tidelock_quota::AddressBlock;

    const OWN_UID: u32 = 4711;

    fn tcp() -> Source {
        Source::Tcp(AddressBlock::of(Ipv4Addr::LOCALHOST.into()))
    }

    fn grant(id: &str) -> Grant {
        Grant::new(
            "Agent",
            id,
            Scopes {
                decide: true,
                ..Scopes::default()
            },
        )
        .unwrap()
    }

    fn with(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn ready(config: AuthConfig) -> Authenticator {
        Authenticator::new(config, OWN_UID, Arc::default())
    }

    fn ask(
        auth: &Authenticator,
        source: Source,
        headers: &HeaderMap,
    ) -> Result<Arc<Identity>, CredentialFault> {
        let request = Signed {
            method: &hyper::Method::GET,
            uri: &hyper::Uri::from_static("/v1/status"),
            headers,
        };
        auth.authenticate(source, request)
            .map(|known| known.identity)
    }

    fn who(
        auth: &Authenticator,
        source: Source,
        values: &[&str],
    ) -> Result<(String, String, &'static str), RefusalKind> {
        let known = ask(auth, source, &with(values));
        known.map_err(CredentialFault::kind).map(|identity| {
            let caller = identity.caller(source);
            (
                caller.principal_type.clone(),
                caller.principal_id.clone(),
                caller.door,
            )
        })
    }

    fn tokens() -> TokenSet {
        let text = format!(
            "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"a\"\nscopes = [\"decide\"]\n\
             [[tokens]]\nsha256 = \"{}\"\nprincipal = \"b\"\nscopes = []\n",
            TokenDigest::of(b"right-a"),
            TokenDigest::of(b"right-b"),
        );
        TokenSet::parse(&text).unwrap()
    }

    /// INV-18: a token ends by trusted time, and with a clock in doubt none that has an end is taken.
    #[test]
    fn inv_18_a_token_ends_by_trusted_time() {
        let text = format!(
            "format = 1\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"a\"\nscopes = []\n\
             expires_at = \"2027-03-01T00:00:00Z\"\n\
             [[tokens]]\nsha256 = \"{}\"\nprincipal = \"b\"\nscopes = []\n",
            TokenDigest::of(b"ends"),
            TokenDigest::of(b"lasts"),
        );
        let end_unix_ms = 1_803_859_200_000;
        let says = |token: &str, unix_ms: u64, suspect: bool| {
            let config = AuthConfig::default()
                .tokens(TokenSet::parse(&text).unwrap())
                .time(CallerTime::new(move || Moment { unix_ms, suspect }));
            let told = config.inspect_token(token.as_bytes()).map(|_| ());
            let headers = with(&[&format!("Bearer {token}")]);
            let asked = ask(&ready(config), tcp(), &headers).map(|_| ());
            assert_eq!(asked, told);
            asked
        };
        assert_eq!(says("ends", end_unix_ms - 1, false), Ok(()));
        for late in [end_unix_ms, end_unix_ms + 1, u64::MAX] {
            assert_eq!(
                says("ends", late, false),
                Err(CredentialFault::TokenExpired)
            );
        }
        assert_eq!(says("ends", 0, true), Err(CredentialFault::ClockSuspect));
        // The controls: one without an end, and one that nobody was given.
        assert_eq!(says("lasts", u64::MAX, true), Ok(()));
        assert_eq!(says("none", 0, false), Err(CredentialFault::TokenUnknown));
        // What is no time is no end, and the file is refused for it.
        for odd in ["tomorrow", "2027-03-01", "1969-12-31T23:59:59Z", ""] {
            let mistakes = TokenSet::parse(&text.replace("2027-03-01T00:00:00Z", odd)).unwrap_err();
            assert!(mistakes[0].message.contains("RFC 3339"), "{mistakes:?}");
        }
    }

    #[test]
    fn a_token_is_its_principal_and_any_other_is_nobody() {
        let auth = ready(AuthConfig::default().tokens(tokens()));
        let known = |id: &str| Ok(("Agent".to_owned(), id.to_owned(), DOOR_TCP));
        assert_eq!(who(&auth, tcp(), &["Bearer right-a"]), known("a"));
        assert_eq!(who(&auth, tcp(), &["bearer right-b"]), known("b"));
        for wrong in [
            "Bearer right-A",
            "Bearer right-a ",
            "Bearer  right-a",
            "Bearer",
            "Bearer ",
            "Basic cmlnaHQtYQ==",
            "right-a",
        ] {
            assert_eq!(
                who(&auth, tcp(), &[wrong]),
                Err(RefusalKind::BadCredentials),
                "{wrong}"
            );
        }
        let long = format!("Bearer {}", "x".repeat(TOKEN_BYTES_MAX + 1));
        assert_eq!(
            who(&auth, tcp(), &[&long]),
            Err(RefusalKind::BadCredentials)
        );
        assert_eq!(who(&auth, tcp(), &[]), Err(RefusalKind::NoCredentials));
        let two = ["Bearer right-a", "Bearer right-b"];
        assert_eq!(who(&auth, tcp(), &two), Err(RefusalKind::BadCredentials));
    }

    #[test]
    fn a_wrong_token_never_falls_back_to_something_weaker() {
        let config = AuthConfig::default()
            .tokens(tokens())
            .unix_peer(1000, grant("mapped"))
            .unwrap()
            .allow_anonymous_loopback(grant("anonymous"));
        let auth = ready(config);
        let unix = Source::Unix(1000);

        // Positive controls: without a token both get in.
        assert_eq!(who(&auth, tcp(), &[]).unwrap().1, "anonymous");
        assert_eq!(who(&auth, unix, &[]).unwrap().1, "mapped");

        assert_eq!(
            who(&auth, tcp(), &["Bearer no"]),
            Err(RefusalKind::BadCredentials)
        );
        assert_eq!(
            who(&auth, unix, &["Bearer no"]),
            Err(RefusalKind::BadCredentials)
        );
    }

    #[test]
    fn on_the_unix_socket_the_kernel_says_who_is_there() {
        let config = AuthConfig::default()
            .unix_peer(1000, grant("mapped"))
            .unwrap();
        let auth = ready(config);
        let found = |uid| who(&auth, Source::Unix(uid), &[]);
        assert_eq!(
            found(1000).unwrap(),
            ("Agent".to_owned(), "mapped".to_owned(), DOOR_UNIX)
        );
        assert_eq!(found(0).unwrap().0, "Operator");
        assert_eq!(found(OWN_UID).unwrap().1, "uid-4711");
        assert_eq!(found(1001), Err(RefusalKind::NoCredentials));
        // The mapping means nothing at the other door.
        assert_eq!(who(&auth, tcp(), &[]), Err(RefusalKind::NoCredentials));

        assert!(
            is_operator(Source::Unix(0), OWN_UID) && is_operator(Source::Unix(OWN_UID), OWN_UID)
        );
        assert!(!is_operator(Source::Unix(1000), OWN_UID) && !is_operator(tcp(), OWN_UID));
    }

    #[test]
    fn a_mapping_of_the_own_user_replaces_the_operator_principal() {
        let config = AuthConfig::default()
            .unix_peer(OWN_UID, grant("mine"))
            .unwrap();
        assert_eq!(
            config
                .clone()
                .unix_peer(OWN_UID, grant("again"))
                .map(|_| ()),
            Err(UnixPeerError::Twice(OWN_UID))
        );
        let auth = ready(config);
        let identity = ask(&auth, Source::Unix(OWN_UID), &HeaderMap::new()).unwrap();
        assert_eq!(
            identity.scopes,
            Scopes {
                decide: true,
                ..Scopes::default()
            }
        );
    }

    #[test]
    fn two_credentials_of_one_principal_share_its_slots() {
        let config = AuthConfig::default()
            .tokens(tokens())
            .unix_peer(1000, grant("a"))
            .unwrap();
        let auth = ready(config);
        let by_token = ask(&auth, tcp(), &with(&["Bearer right-a"])).unwrap();
        let by_uid = ask(&auth, Source::Unix(1000), &HeaderMap::new()).unwrap();
        let other = ask(&auth, tcp(), &with(&["Bearer right-b"])).unwrap();
        assert!(Arc::ptr_eq(&by_token.in_flight, &by_uid.in_flight));
        assert!(!Arc::ptr_eq(&by_token.in_flight, &other.in_flight));
    }

    #[test]
    fn a_grant_names_a_principal() {
        assert!(Grant::new("Agent", "ci-7", Scopes::ALL).is_ok());
        for kind in ["", "7up", "A gent", "A::B", &"x".repeat(65)] {
            let error = Grant::new(kind, "x", Scopes::ALL).unwrap_err();
            assert_eq!(error.principal_type, kind);
        }
        for id in ["", "a\nb", &"x".repeat(257)] {
            let error = Grant::new("Agent", id, Scopes::ALL).unwrap_err();
            assert_eq!(error.principal_id, id);
        }
    }

    #[test]
    fn a_proxy_is_believed_in_its_header_and_nobody_else_is() {
        let header = HeaderName::from_static("x-forwarded-user");
        let config = AuthConfig::default().tokens(tokens()).proxy(Proxy {
            hop_type: "Agent".to_owned(),
            hop_id: "a".to_owned(),
            header: header.clone(),
            principal_type: "User".to_owned(),
            allow: vec![
                Pattern::parse("alice").unwrap(),
                Pattern::parse("team-*").unwrap(),
            ],
        });
        let auth = ready(config);
        let stated = |token: &str, values: &[&str]| {
            let hop = ask(&auth, tcp(), &with(&[token])).unwrap();
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(&header, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            match auth.stated(&hop, &headers) {
                Ok(Stated::Principal(identity)) => {
                    let caller = identity.caller(tcp());
                    assert!(Arc::ptr_eq(&identity.in_flight, &hop.in_flight));
                    assert!(!caller.may_act_as && !identity.scopes.act_as);
                    let (kind, id) = (&caller.principal_type, &caller.principal_id);
                    let by = caller.stated_by.as_ref().unwrap();
                    let (by_kind, by_id) = (&by.principal_type, &by.principal_id);
                    assert_eq!(
                        (by_kind.as_str(), by_id.as_str(), by.door),
                        ("Agent", "a", DOOR_TCP)
                    );
                    assert_eq!(
                        hop.caller(tcp()).stated_by,
                        None,
                        "its own name is nobody's word"
                    );
                    format!("{kind}::{id} at {}", caller.door)
                }
                Ok(Stated::Ignored) => "ignored".to_owned(),
                Ok(Stated::Nobody) => "itself".to_owned(),
                Err(fault) => fault.code().to_owned(),
            }
        };
        assert_eq!(stated("Bearer right-a", &["alice"]), "User::alice at proxy");
        assert_eq!(
            stated("Bearer right-a", &["team-7"]),
            "User::team-7 at proxy"
        );
        for refused in ["root", "Alice", "alice2", "", "alice,root", "team-e\u{301}"] {
            let fault = stated("Bearer right-a", &[refused]);
            assert_eq!(fault, "IDENTITY_HEADER_REFUSED", "{refused}");
        }
        assert_eq!(stated("Bearer right-a", &[]), "IDENTITY_HEADER_ABSENT");
        for two in [["alice", "alice"], ["alice", "root"]] {
            assert_eq!(stated("Bearer right-a", &two), "IDENTITY_HEADER_ABSENT");
        }
        // On another hop it means nothing, and is told apart from none.
        assert_eq!(stated("Bearer right-b", &["alice"]), "ignored");
        assert_eq!(stated("Bearer right-b", &[]), "itself");
    }
}
