//! What all kinds of credentials share: the time that they are judged by, patterns of names, and the
//! codes with which they are refused.

use std::fmt;
use std::sync::Arc;

use crate::limits::PATTERN_BYTES_MAX;
use crate::refusals::RefusalKind;

/// One reading of the node's trusted clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Trusted time, Unix milliseconds; it never goes back (INV-18).
    pub unix_ms: u64,
    /// The clock has jumped and nobody has accepted it.
    pub suspect: bool,
}

/// The node's trusted clock, as credentials are judged by it. The default one is in doubt, so that
/// nothing that has an end counts before a clock was given.
#[derive(Clone)]
pub struct CallerTime(Arc<dyn Fn() -> Moment + Send + Sync>);

impl CallerTime {
    /// A clock that reads so.
    #[must_use]
    pub fn new(read: impl Fn() -> Moment + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// What it says now.
    ///
    /// # Errors
    /// INV-18: nothing is judged by a clock that is in doubt.
    pub(crate) fn sane_unix_ms(&self) -> Result<u64, CredentialFault> {
        let moment = (self.0)();
        match moment.suspect {
            true => Err(CredentialFault::ClockSuspect),
            false => Ok(moment.unix_ms),
        }
    }
}

impl Default for CallerTime {
    fn default() -> Self {
        Self::new(|| Moment {
            unix_ms: 0,
            suspect: true,
        })
    }
}

impl fmt::Debug for CallerTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CallerTime").field(&(self.0)()).finish()
    }
}

/// A name, or with a `*` at its end everything that begins so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    prefix: bool,
}

/// Why a text is no pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a name, or the beginning of one and a single `*` at the end, of 1 to {PATTERN_BYTES_MAX} bytes"
)]
pub struct NoPattern;

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// [`NoPattern`]: it is empty, too long, or has a `*` elsewhere than at its end.
    pub fn parse(text: &str) -> Result<Self, NoPattern> {
        let (name, prefix) = match text.strip_suffix('*') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let bad = text.is_empty() || text.len() > PATTERN_BYTES_MAX || name.contains('*');
        match bad {
            true => Err(NoPattern),
            false => Ok(Self {
                text: name.to_owned(),
                prefix,
            }),
        }
    }

    /// Whether a name is meant by it. Compared byte by byte.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.prefix {
            true => name.starts_with(&self.text),
            false => name == self.text,
        }
    }

    /// What it begins with, and whether more may follow.
    #[must_use]
    pub fn parts(&self) -> (&str, bool) {
        (&self.text, self.prefix)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.text, if self.prefix { "*" } else { "" })
    }
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $words:literal;)*) => {
        /// Why credentials were not taken. The codes are stable; new ones may be added.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        #[non_exhaustive]
        pub enum CredentialFault {
            $($(#[$doc])* #[error($words)] $name,)*
        }

        impl CredentialFault {
            /// Every fault, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The stable code.
            #[must_use]
            pub const fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }
        }
    };
}

faults! {
    /// None at all.
    None = "NO_CREDENTIALS", "a known bearer token is needed, or the Unix socket as a known user";
    /// A header that is no credential, or two where one may be.
    Malformed = "CREDENTIALS_MALFORMED", "one Authorization header of the form `Bearer TOKEN` is expected";
    /// A token that nobody was given.
    TokenUnknown = "TOKEN_UNKNOWN", "this token is not known here";
    /// Two kinds of credentials that do not belong together.
    TwoCredentials = "TWO_CREDENTIALS", "a caller brings one credential, unless its token demands a signature";
    /// The node's clock is in doubt.
    ClockSuspect = "CLOCK_SUSPECT", "the node's clock is in doubt, so nothing that has an end is believed";
    /// More callers than can be told apart.
    CallersFull = "CALLERS_FULL", "as many callers are active as can be told apart, retry";
    /// Well authenticated, and no rule of the config grants anything.
    Unmapped = "CALLER_UNMAPPED", "no rule of the node's config grants this caller anything";
    /// The name that it has elsewhere cannot be one here.
    PrincipalInvalid = "CALLER_PRINCIPAL", "the caller's name cannot be that of a principal";
    /// A workload token that is not three parts of base64url and strict JSON within the limits.
    TokenMalformed = "TOKEN_MALFORMED", "the workload token is not a signed JWT within the limits";
    /// A header with parameters that are never honoured.
    TokenHeader = "TOKEN_HEADER", "the workload token's header names keys, extensions or a type that are not taken";
    /// Another algorithm than that of the key.
    TokenAlgorithm = "TOKEN_ALGORITHM", "the workload token's algorithm is not that of the pinned key: RS256, ES256 or EdDSA";
    /// No such key.
    TokenKey = "TOKEN_KEY_UNKNOWN", "no pinned key of the issuer has the workload token's kid";
    /// The signature does not verify.
    TokenSignature = "TOKEN_SIGNATURE", "the workload token's signature does not verify";
    /// Claims that are missing or of a wrong type.
    TokenClaims = "TOKEN_CLAIMS", "the workload token lacks a claim, or has one of a wrong type";
    /// An issuer that is not trusted.
    TokenIssuer = "TOKEN_ISSUER", "the workload token's issuer is not trusted here";
    /// Meant for somebody else.
    TokenAudience = "TOKEN_AUDIENCE", "the workload token is meant for another audience";
    /// Past its end.
    TokenExpired = "TOKEN_EXPIRED", "the token has expired, by the node's clock";
    /// Before its beginning.
    TokenNotYet = "TOKEN_NOT_YET_VALID", "the workload token begins in the future, by the node's clock";
    /// Valid for longer than is taken.
    TokenLifetime = "TOKEN_LIFETIME", "the workload token is valid for longer than this node takes";
    /// The TLS door without a certificate.
    CertificateAbsent = "CERT_ABSENT", "a client certificate is needed at this door";
    /// More handshakes from one address than there may be; told to nobody, the connection is closed.
    HandshakeRate = "HANDSHAKE_RATE", "this address begins more handshakes than it may";
    /// A certificate that was not taken; its own code was counted.
    CertificateRefused = "CERT_REFUSED", "the client certificate is not taken";
    /// Signature headers that are not written as the profile has them.
    SignatureMalformed = "SIGNATURE_MALFORMED", "the request signature is not written as the profile has it";
    /// Something is not covered that must be, or is covered that may not be.
    SignatureComponents = "SIGNATURE_COMPONENTS", "the request signature does not cover what it must";
    /// No such key.
    SignatureKey = "SIGNATURE_KEY_UNKNOWN", "no pinned key has the signature's keyid and algorithm";
    /// It does not verify.
    SignatureInvalid = "SIGNATURE_INVALID", "the request signature does not verify";
    /// Made for another node.
    SignatureAudience = "SIGNATURE_AUDIENCE", "the signature's tag names another node";
    /// Past its end.
    SignatureExpired = "SIGNATURE_EXPIRED", "the request signature has expired, or was made to last too long";
    /// Made in the future.
    SignatureFuture = "SIGNATURE_FUTURE", "the request signature was made in the future, by the node's clock";
    /// Made before this process could know its nonce.
    SignatureBeforeStart = "SIGNATURE_BEFORE_START", "the request signature was made before this node started, sign again";
    /// Its nonce was seen before.
    SignatureReplayed = "SIGNATURE_REPLAYED", "the request signature was used before";
    /// No room to remember its nonce.
    NonceWindowFull = "NONCE_WINDOW_FULL", "as many nonces are held as there is room for, retry later";
    /// A token that counts only with a signature.
    SignatureAbsent = "SIGNATURE_ABSENT", "this token counts only on requests that its key has signed";
    /// The body is not what was signed.
    DigestMismatch = "DIGEST_MISMATCH", "the body is not the one that the request signature covers";
    /// A proxy that does not say whom it speaks for.
    HeaderAbsent = "IDENTITY_HEADER_ABSENT", "this proxy must name the principal in its identity header, once";
    /// A proxy that names somebody whom it may not.
    HeaderRefused = "IDENTITY_HEADER_REFUSED", "this proxy may not speak for the principal that its identity header names";
}

impl CredentialFault {
    /// Under what it is counted.
    pub(crate) fn kind(self) -> RefusalKind {
        match self {
            Self::None => RefusalKind::NoCredentials,
            Self::NonceWindowFull | Self::HandshakeRate => RefusalKind::RateLimited,
            Self::CallersFull => RefusalKind::Busy,
            _ => RefusalKind::BadCredentials,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_pattern_is_a_name_or_a_beginning() {
        let exact = Pattern::parse("repo:org/app").unwrap();
        assert!(exact.matches("repo:org/app"));
        for other in ["repo:org/app2", "repo:org/ap", "REPO:org/app", ""] {
            assert!(!exact.matches(other), "{other}");
        }
        let prefix = Pattern::parse("repo:org/*").unwrap();
        assert!(prefix.matches("repo:org/") && prefix.matches("repo:org/app"));
        assert!(!prefix.matches("repo:organ") && !prefix.matches("x repo:org/app"));
        assert!(Pattern::parse("*").unwrap().matches("anything"));
        assert_eq!(prefix.to_string(), "repo:org/*");
        let long = "x".repeat(PATTERN_BYTES_MAX + 1);
        for bad in ["", "a*b", "**", "*a", "a**", &long] {
            assert_eq!(Pattern::parse(bad), Err(NoPattern), "{bad}");
        }
    }

    #[test]
    fn every_code_is_its_own_and_documented() {
        let codes: BTreeSet<_> = CredentialFault::ALL.iter().map(|f| f.code()).collect();
        assert_eq!(codes.len(), CredentialFault::ALL.len());
        let book = include_str!("../../../docs/src/callers.md");
        for code in codes {
            assert!(
                book.contains(&format!("`{code}`")),
                "{code} is missing in callers.md"
            );
        }
    }

    #[test]
    fn inv_18_without_a_clock_nothing_is_believed() {
        assert_eq!(
            CallerTime::default().sane_unix_ms(),
            Err(CredentialFault::ClockSuspect)
        );
        let sane = |suspect| {
            CallerTime::new(move || Moment {
                unix_ms: 7,
                suspect,
            })
        };
        assert_eq!(sane(false).sane_unix_ms(), Ok(7));
        assert_eq!(
            sane(true).sane_unix_ms(),
            Err(CredentialFault::ClockSuspect)
        );
    }
}
