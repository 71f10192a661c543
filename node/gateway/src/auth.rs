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
use hyper::header::AUTHORIZATION;
use tidelock_interceptor::{Caller, Principal};

use crate::credentials::{CallerTime, CredentialFault};
use crate::limits::{DYNAMIC_CALLERS_MAX, JWT_BYTES_MAX, TOKEN_BYTES_MAX, UNIX_PEERS_MAX};
use crate::oidc::{self, OidcIssuer};
use crate::refusals::Source;
use crate::slots::Counter;
use crate::tokens::{TokenDigest, TokenSet};

/// Name of the TCP door in records.
pub const DOOR_TCP: &str = "tcp";
/// Name of the Unix socket door in records.
pub const DOOR_UNIX: &str = "unix";

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
}

/// Who may call, through which door. Nobody, until something is added.
#[derive(Clone, Debug, Default)]
pub struct AuthConfig {
    tokens: TokenSet,
    unix_peers: BTreeMap<u32, Grant>,
    anonymous: Option<Grant>,
    issuers: Vec<OidcIssuer>,
    time: CallerTime,
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
            Some((_, grant)) => Ok(grant.clone()),
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
    unix: Caller,
}

impl Identity {
    pub(crate) fn caller(&self, source: Source) -> &Caller {
        match source {
            Source::Tcp(_) => &self.tcp,
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
        };
        Self {
            scopes: grant.scopes,
            in_flight,
            tcp: caller(DOOR_TCP),
            unix: caller(DOOR_UNIX),
        }
    }
}

/// A principal, by type and id.
type Who = (String, String);

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
        let who = (grant.principal_type.clone(), grant.principal_id.clone());
        Arc::clone(self.named.entry(who).or_default())
    }

    // INV-07: as many as are active, up to the limit.
    fn of_any(&self, grant: &Grant) -> Result<Arc<Counter>, CredentialFault> {
        let who = (grant.principal_type.clone(), grant.principal_id.clone());
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

/// The configuration, ready to be asked.
pub(crate) struct Authenticator {
    tokens: Vec<(TokenDigest, Arc<Identity>)>,
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
    pub(crate) fn new(config: AuthConfig, own_uid: u32) -> Self {
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
            .map(|(digest, grant)| (*digest, identity(grant)))
            .collect();
        let anonymous = config.anonymous.as_ref().map(&mut identity);
        Self {
            tokens,
            unix_peers,
            anonymous,
            issuers: config.issuers,
            time: config.time,
            counters,
        }
    }

    /// Who sent a request with these headers from this source.
    pub(crate) fn authenticate(
        &self,
        source: Source,
        headers: &HeaderMap,
    ) -> Result<Arc<Identity>, CredentialFault> {
        let mut presented = headers.get_all(AUTHORIZATION).iter();
        let Some(first) = presented.next() else {
            let known = match source {
                Source::Tcp(_) => self.anonymous.as_ref(),
                Source::Unix(uid) => self.unix_peers.get(&uid),
            };
            return known.map(Arc::clone).ok_or(CredentialFault::None);
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
        for (known, identity) in &self.tokens {
            if verify_slices_are_equal(known.as_bytes(), digest.as_bytes()).is_ok() {
                found = Some(identity);
            }
        }
        match found {
            Some(identity) => Ok(Arc::clone(identity)),
            None if !self.issuers.is_empty() && oidc::is_jwt(token) => {
                self.identity_of(&oidc::verify(token, &self.issuers, &self.time)?)
            }
            None => Err(CredentialFault::TokenUnknown),
        }
    }

    /// The identity of a principal that somebody else's word has named.
    fn identity_of(&self, grant: &Grant) -> Result<Arc<Identity>, CredentialFault> {
        let in_flight = self.counters.of_any(grant)?;
        Ok(Arc::new(Identity::new(grant, in_flight)))
    }
}

/// Whether a source is the operator of this node: root or the node's own user, and only through
/// the Unix socket, where the kernel vouches for the user id.
pub(crate) fn is_operator(source: Source, own_uid: u32) -> bool {
    matches!(source, Source::Unix(uid) if uid == ROOT_UID || uid == own_uid)
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
    use crate::refusals::RefusalKind;
    use hyper::header::HeaderValue;
    use std::net::{IpAddr, Ipv4Addr};

    const TCP: Source = Source::Tcp(IpAddr::V4(Ipv4Addr::LOCALHOST));
    const OWN_UID: u32 = 4711;

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

    fn who(
        auth: &Authenticator,
        source: Source,
        values: &[&str],
    ) -> Result<(String, String, &'static str), RefusalKind> {
        let known = auth.authenticate(source, &with(values));
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

    #[test]
    fn a_token_is_its_principal_and_any_other_is_nobody() {
        let auth = Authenticator::new(AuthConfig::default().tokens(tokens()), OWN_UID);
        let known = |id: &str| Ok(("Agent".to_owned(), id.to_owned(), DOOR_TCP));
        assert_eq!(who(&auth, TCP, &["Bearer right-a"]), known("a"));
        assert_eq!(who(&auth, TCP, &["bearer right-b"]), known("b"));
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
                who(&auth, TCP, &[wrong]),
                Err(RefusalKind::BadCredentials),
                "{wrong}"
            );
        }
        let long = format!("Bearer {}", "x".repeat(TOKEN_BYTES_MAX + 1));
        assert_eq!(who(&auth, TCP, &[&long]), Err(RefusalKind::BadCredentials));
        assert_eq!(who(&auth, TCP, &[]), Err(RefusalKind::NoCredentials));
        let two = ["Bearer right-a", "Bearer right-b"];
        assert_eq!(who(&auth, TCP, &two), Err(RefusalKind::BadCredentials));
    }

    #[test]
    fn a_wrong_token_never_falls_back_to_something_weaker() {
        let config = AuthConfig::default()
            .tokens(tokens())
            .unix_peer(1000, grant("mapped"))
            .unwrap()
            .allow_anonymous_loopback(grant("anonymous"));
        let auth = Authenticator::new(config, OWN_UID);
        let unix = Source::Unix(1000);

        // Positive controls: without a token both get in.
        assert_eq!(who(&auth, TCP, &[]).unwrap().1, "anonymous");
        assert_eq!(who(&auth, unix, &[]).unwrap().1, "mapped");

        assert_eq!(
            who(&auth, TCP, &["Bearer no"]),
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
        let auth = Authenticator::new(config, OWN_UID);
        let found = |uid| who(&auth, Source::Unix(uid), &[]);
        assert_eq!(
            found(1000).unwrap(),
            ("Agent".to_owned(), "mapped".to_owned(), DOOR_UNIX)
        );
        assert_eq!(found(0).unwrap().0, "Operator");
        assert_eq!(found(OWN_UID).unwrap().1, "uid-4711");
        assert_eq!(found(1001), Err(RefusalKind::NoCredentials));
        // The mapping means nothing at the other door.
        assert_eq!(who(&auth, TCP, &[]), Err(RefusalKind::NoCredentials));

        assert!(
            is_operator(Source::Unix(0), OWN_UID) && is_operator(Source::Unix(OWN_UID), OWN_UID)
        );
        assert!(!is_operator(Source::Unix(1000), OWN_UID) && !is_operator(TCP, OWN_UID));
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
        let auth = Authenticator::new(config, OWN_UID);
        let identity = auth
            .authenticate(Source::Unix(OWN_UID), &HeaderMap::new())
            .unwrap();
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
        let auth = Authenticator::new(config, OWN_UID);
        let by_token = auth.authenticate(TCP, &with(&["Bearer right-a"])).unwrap();
        let by_uid = auth
            .authenticate(Source::Unix(1000), &HeaderMap::new())
            .unwrap();
        let other = auth.authenticate(TCP, &with(&["Bearer right-b"])).unwrap();
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
}
