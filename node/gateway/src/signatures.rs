//! Signed requests: HTTP Message Signatures (RFC 9421) in one fixed profile.
//!
//! ```text
//! Content-Digest: sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:
//! Signature-Input: sig=("@method" "@path" "@query" "content-digest");created=1790000000;\
//!   expires=1790000030;nonce="k8T…";keyid="crane-7";alg="ed25519";tag="harbour-a"
//! Signature: sig=:…:
//! ```
//!
//! The profile is one line of grammar, so what is written otherwise is refused instead of being
//! understood. The key says which algorithm it is for. The tag names the node, so that a signature
//! for one node is none for another that has the same key. A nonce counts once ([`NonceWindow`]).

use std::fmt::Write as _;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{HeaderMap, HeaderName};
use hyper::{Method, Uri};

use crate::credentials::{CallerTime, CredentialFault};
use crate::limits::{
    KEY_ID_BYTES_MAX, NONCE_BYTES_MAX, NONCE_BYTES_MIN, SIGNATURE_INPUT_BYTES_MAX,
    SIGNATURE_SKEW_MS, SIGNATURE_WINDOW_S,
};
use crate::nonces::{Lasts, NonceWindow};
use crate::verifying::VerifyingKey;

const INPUT: HeaderName = HeaderName::from_static("signature-input");
const SIGNATURE: HeaderName = HeaderName::from_static("signature");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// What must be covered, whatever the request.
const REQUIRED: [&str; 3] = ["@method", "@path", "@query"];
/// What may be covered.
const KNOWN: [&str; 6] = [
    "@method",
    "@path",
    "@query",
    "@authority",
    "content-digest",
    "content-type",
];

/// A key that signs requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SigningKey {
    pub(crate) id: String,
    pub(crate) key: VerifyingKey,
}

/// What a signature covers of a request's head.
#[derive(Clone, Copy)]
pub(crate) struct Signed<'a> {
    pub(crate) method: &'a Method,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: &'a HeaderMap,
}

/// Whether a request brings a signature, well formed or not.
pub(crate) fn is_present(headers: &HeaderMap) -> bool {
    headers.contains_key(INPUT) || headers.contains_key(SIGNATURE)
}

/// The SHA-256 that the body must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BodyDigest([u8; 32]);

impl BodyDigest {
    /// That of no bytes.
    fn empty() -> Self {
        let mut empty = [0; 32];
        for (slot, byte) in empty.iter_mut().zip(digest(&SHA256, &[]).as_ref()) {
            *slot = *byte;
        }
        Self(empty)
    }

    /// Whether this is the body.
    pub(crate) fn is_of(&self, body: &[u8]) -> bool {
        verify_slices_are_equal(&self.0, digest(&SHA256, body).as_ref()).is_ok()
    }
}

/// The parameters of one signature.
#[derive(Debug, PartialEq, Eq)]
struct Input<'a> {
    label: &'a str,
    /// Everything after the label: the value of `@signature-params`.
    params: &'a str,
    components: Vec<&'a str>,
    created_s: u64,
    expires_s: u64,
    nonce: &'a str,
    key_id: &'a str,
    alg: &'a str,
    tag: &'a str,
}

impl<'a> Input<'a> {
    /// Reads the one form that is taken; nothing else.
    fn parse(text: &'a str) -> Option<Self> {
        let (label, params) = text.split_once('=')?;
        let label_is_good = (1..=32).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inner = params.strip_prefix('(')?;
        let (listed, rest) = inner.split_once(')')?;
        let components = listed
            .split(' ')
            .map(quoted)
            .collect::<Option<Vec<&str>>>()?;
        let mut found: [Option<&str>; 6] = [None; 6];
        let names = ["created", "expires", "nonce", "keyid", "alg", "tag"];
        for parameter in rest.strip_prefix(';')?.split(';') {
            let (name, value) = parameter.split_once('=')?;
            let slot = names
                .iter()
                .zip(&mut found)
                .find(|(known, _)| **known == name)?
                .1;
            if slot.replace(value).is_some() {
                return None;
            }
        }
        let [created, expires, nonce, key_id, alg, tag] = found;
        label_is_good.then_some(())?;
        Some(Self {
            label,
            params,
            components,
            created_s: seconds(created?)?,
            expires_s: seconds(expires?)?,
            nonce: quoted(nonce?)?,
            key_id: quoted(key_id?)?,
            alg: quoted(alg?)?,
            tag: quoted(tag?)?,
        })
    }
}

/// A number of seconds without sign or leading zeros.
fn seconds(text: &str) -> Option<u64> {
    let good = text.len() <= 12
        && text.bytes().all(|b| b.is_ascii_digit())
        && (text == "0" || !text.starts_with('0'));
    good.then(|| text.parse().ok()).flatten()
}

/// A text in quotes that needs no escapes, and holds none of the marks that part the line.
fn quoted(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('"')?.strip_suffix('"')?;
    let good = inner
        .bytes()
        .all(|b| b.is_ascii_graphic() && !b"\"\\;()".contains(&b));
    (good && !inner.is_empty()).then_some(inner)
}

/// The one value of a header, if there is exactly one and it is plain text.
fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    let (first, second) = (values.next()?, values.next());
    match second {
        None => first.to_str().ok().filter(|text| !text.is_empty()),
        Some(_) => None,
    }
}

/// The bytes between the colons of `…=:base64:`.
fn binary(text: &str) -> Option<Vec<u8>> {
    let inner = text.strip_prefix(':')?.strip_suffix(':')?;
    STANDARD.decode(inner).ok()
}

/// The signature base of RFC 9421, 2.5.
fn base(signed: Signed<'_>, components: &[&str], params: &str) -> Option<String> {
    let mut text = String::with_capacity(512);
    for component in components {
        let value = match *component {
            "@method" => signed.method.as_str(),
            "@path" => match signed.uri.path() {
                "" => "/",
                path => path,
            },
            "@query" => {
                // Writing to a String cannot fail.
                let query = signed.uri.query().unwrap_or_default();
                let _ = writeln!(text, "\"@query\": ?{query}");
                continue;
            }
            "@authority" => match signed.uri.authority() {
                Some(authority) => authority.as_str(),
                None => only(signed.headers, &hyper::header::HOST)?,
            },
            field => only(signed.headers, &HeaderName::try_from(field).ok()?)?,
        };
        let _ = match *component {
            "@authority" => writeln!(text, "\"@authority\": {}", value.to_ascii_lowercase()),
            name => writeln!(text, "\"{name}\": {}", value.trim()),
        };
    }
    let _ = write!(text, "\"@signature-params\": {params}");
    Some(text)
}

/// A signature that verified and was not seen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SignedBy<'k> {
    /// The id of the key.
    pub(crate) key_id: &'k str,
    /// What the body must be.
    pub(crate) body: BodyDigest,
}

/// Judges the signature of a request. Its nonce is taken last, when everything else was good.
pub(crate) fn verify<'k>(
    signed: Signed<'_>,
    keys: &'k [SigningKey],
    tag: &str,
    nonces: &NonceWindow,
    time: &CallerTime,
) -> Result<SignedBy<'k>, CredentialFault> {
    use CredentialFault as F;
    let input = only(signed.headers, &INPUT)
        .filter(|text| text.len() <= SIGNATURE_INPUT_BYTES_MAX)
        .ok_or(F::SignatureMalformed)?;
    let input = Input::parse(input).ok_or(F::SignatureMalformed)?;
    let signature = only(signed.headers, &SIGNATURE)
        .and_then(|text| text.strip_prefix(input.label)?.strip_prefix('='))
        .and_then(binary)
        .ok_or(F::SignatureMalformed)?;
    let nonce_is_good = (NONCE_BYTES_MIN..=NONCE_BYTES_MAX).contains(&input.nonce.len())
        && input.key_id.len() <= KEY_ID_BYTES_MAX;
    if !nonce_is_good {
        return Err(F::SignatureMalformed);
    }

    let covers = |name: &str| input.components.iter().filter(|c| **c == name).count();
    let has_body = *signed.method != Method::GET;
    let enough = REQUIRED.iter().all(|name| covers(name) == 1)
        && covers("content-digest") == usize::from(has_body)
        && input
            .components
            .iter()
            .all(|name| KNOWN.contains(name) && covers(name) == 1);
    if !enough {
        return Err(F::SignatureComponents);
    }
    let body = match has_body {
        true => content_digest(signed.headers).ok_or(F::SignatureMalformed)?,
        false => BodyDigest::empty(),
    };

    let key = keys
        .iter()
        .find(|key| key.id == input.key_id && key.key.algorithm().http() == input.alg)
        .ok_or(F::SignatureKey)?;
    let base = base(signed, &input.components, input.params).ok_or(F::SignatureMalformed)?;
    if !key.key.verifies(base.as_bytes(), &signature) {
        return Err(F::SignatureInvalid);
    }
    if input.tag != tag {
        return Err(F::SignatureAudience);
    }

    // INV-18: by trusted time, and by none that is in doubt.
    let now_ms = time.sane_unix_ms()?;
    let (created_ms, ends_ms) = (
        input.created_s.saturating_mul(1_000),
        input.expires_s.saturating_mul(1_000),
    );
    let lasts_s = input.expires_s.checked_sub(input.created_s);
    if now_ms > ends_ms || lasts_s.is_none_or(|lasts| lasts > SIGNATURE_WINDOW_S) {
        return Err(F::SignatureExpired);
    }
    if created_ms > now_ms.saturating_add(SIGNATURE_SKEW_MS) {
        return Err(F::SignatureFuture);
    }
    let lasts = Lasts {
        created_unix_ms: created_ms,
        ends_unix_ms: ends_ms,
    };
    nonces.take(&key.id, input.nonce, lasts, || time.sane_unix_ms())?;
    Ok(SignedBy {
        key_id: &key.id,
        body,
    })
}

/// The one SHA-256 of a `Content-Digest` (RFC 9530).
fn content_digest(headers: &HeaderMap) -> Option<BodyDigest> {
    let text = only(headers, &CONTENT_DIGEST)?;
    let bytes = binary(text.strip_prefix("sha-256=")?)?;
    Some(BodyDigest(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    };
    use hyper::header::HeaderValue;

    use super::*;
    use crate::credentials::Moment;

    const NOW_S: u64 = 1_790_000_000;
    const TAG: &str = "harbour-a";
    const BODY: &[u8] = b"{\"hello\": \"world\"}";
    const COVERED: &str = "\"@method\" \"@path\" \"@query\" \"content-digest\"";

    struct Caller {
        pair: Ed25519KeyPair,
        keys: Vec<SigningKey>,
        nonces: NonceWindow,
    }

    /// A request as it is sent.
    #[derive(Clone)]
    struct Sent {
        method: Method,
        uri: Uri,
        headers: HeaderMap,
    }

    impl Sent {
        fn head(&self) -> Signed<'_> {
            Signed {
                method: &self.method,
                uri: &self.uri,
                headers: &self.headers,
            }
        }

        fn set(&mut self, name: &'static str, value: &str) {
            self.headers
                .insert(name, HeaderValue::from_str(value).unwrap());
        }
    }

    fn params(nonce: &str) -> String {
        format!(
            "({COVERED});created={NOW_S};expires={};nonce=\"{nonce}\";keyid=\"crane-7\";alg=\"ed25519\";tag=\"{TAG}\"",
            NOW_S + 30
        )
    }

    fn nonce() -> String {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        format!("nonce-{:012}", NEXT.fetch_add(1, Ordering::SeqCst))
    }

    impl Caller {
        fn new() -> Self {
            let pair = Ed25519KeyPair::generate().unwrap();
            let key = VerifyingKey::ed25519(pair.public_key().as_ref().to_vec()).unwrap();
            let id = "crane-7".to_owned();
            let nonces = NonceWindow::default();
            nonces.begin(|| Ok((NOW_S - 600) * 1_000));
            Self {
                pair,
                keys: vec![SigningKey { id, key }],
                nonces,
            }
        }

        fn request(&self) -> Sent {
            let mut sent = Sent {
                method: Method::POST,
                uri: Uri::from_static("/v1/decide?a=1&b"),
                headers: HeaderMap::new(),
            };
            sent.set("host", "localhost:7411");
            sent.set("content-type", "application/json");
            let digest = STANDARD.encode(digest(&SHA256, BODY));
            sent.set("content-digest", &format!("sha-256=:{digest}:"));
            sent
        }

        /// Signs a request with these parameters over what they list.
        fn sign_with(&self, sent: &mut Sent, params: &str) {
            let listed = params.split_once(')').unwrap().0.trim_start_matches('(');
            let components: Vec<&str> = listed.split(' ').map(|c| c.trim_matches('"')).collect();
            let base = base(sent.head(), &components, params).unwrap();
            let signature = STANDARD.encode(self.pair.sign(base.as_bytes()));
            sent.set("signature-input", &format!("sig={params}"));
            sent.set("signature", &format!("sig=:{signature}:"));
        }

        fn signed(&self) -> Sent {
            let mut sent = self.request();
            self.sign_with(&mut sent, &params(&nonce()));
            sent
        }

        fn judge_at(&self, sent: &Sent, unix_ms: u64) -> &'static str {
            let time = CallerTime::new(move || Moment {
                unix_ms,
                suspect: false,
            });
            verify(sent.head(), &self.keys, TAG, &self.nonces, &time)
                .map_or_else(CredentialFault::code, |_| "taken")
        }

        fn judge(&self, sent: &Sent) -> &'static str {
            self.judge_at(sent, NOW_S * 1_000)
        }
    }

    /// RFC 9421, B.2.6: the base and the signature; its components are not those of our profile.
    #[test]
    fn the_vector_of_the_standard_has_our_base_and_verifies() {
        let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=\n-----END PUBLIC KEY-----\n";
        let key = VerifyingKey::from_pem(pem).unwrap();
        let mut sent = Sent {
            method: Method::POST,
            uri: Uri::from_static("/foo?param=Value&Pet=dog"),
            headers: HeaderMap::new(),
        };
        sent.set("host", "example.com");
        sent.set("date", "Tue, 20 Apr 2021 02:07:55 GMT");
        sent.set("content-type", "application/json");
        sent.set("content-length", "18");
        let params = "(\"date\" \"@method\" \"@path\" \"@authority\" \"content-type\" \"content-length\");created=1618884473;keyid=\"test-key-ed25519\"";
        let components = [
            "date",
            "@method",
            "@path",
            "@authority",
            "content-type",
            "content-length",
        ];
        let made = base(sent.head(), &components, params).unwrap();
        assert_eq!(
            made,
            format!(
                "\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\"@method\": POST\n\"@path\": /foo\n\
                 \"@authority\": example.com\n\"content-type\": application/json\n\
                 \"content-length\": 18\n\"@signature-params\": {params}"
            )
        );
        let signature = STANDARD
            .decode("wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==")
            .unwrap();
        assert!(key.verifies(made.as_bytes(), &signature));
        assert!(!key.verifies(made.replace("POST", "PUT").as_bytes(), &signature));
    }

    #[test]
    fn a_signed_request_counts_once_and_tells_what_its_body_must_be() {
        let caller = Caller::new();
        let sent = caller.signed();
        let time = CallerTime::new(|| Moment {
            unix_ms: NOW_S * 1_000,
            suspect: false,
        });
        let by = verify(sent.head(), &caller.keys, TAG, &caller.nonces, &time).unwrap();
        assert_eq!(by.key_id, "crane-7");
        let body = by.body;
        assert!(body.is_of(BODY) && !body.is_of(b"{\"hello\": \"World\"}") && !body.is_of(b""));
        assert_eq!(caller.judge(&sent), "SIGNATURE_REPLAYED");
        // The same nonce under another signature is the same nonce.
        let mut again = caller.request();
        let same = sent.headers["signature-input"].to_str().unwrap();
        caller.sign_with(
            &mut again,
            &same["sig=".len()..].replace("1790000030", "1790000031"),
        );
        assert_eq!(caller.judge(&again), "SIGNATURE_REPLAYED");
        assert_eq!(caller.judge(&caller.signed()), "taken", "positive control");
        // Two at once: exactly one.
        let sent = caller.signed();
        let taken = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    if caller.judge(&sent) == "taken" {
                        taken.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(taken.into_inner(), 1);
    }

    #[test]
    fn what_was_changed_after_signing_is_refused() {
        let caller = Caller::new();
        let change = |change: &dyn Fn(&mut Sent)| {
            let mut sent = caller.signed();
            change(&mut sent);
            caller.judge(&sent)
        };
        assert_eq!(change(&|_| {}), "taken", "positive control");
        let invalid = "SIGNATURE_INVALID";
        assert_eq!(change(&|s| s.method = Method::PUT), invalid);
        assert_eq!(
            change(&|s| s.uri = Uri::from_static("/v1/explain?a=1&b")),
            invalid
        );
        assert_eq!(
            change(&|s| s.uri = Uri::from_static("/v1/decide?a=1")),
            invalid
        );
        assert_eq!(change(&|s| s.uri = Uri::from_static("/v1/decide")), invalid);
        let other = format!("sha-256=:{}:", STANDARD.encode([7; 32]));
        assert_eq!(change(&|s| s.set("content-digest", &other)), invalid);
        for (from, to) in [
            ("expires=1790000030", "expires=1790000031"),
            ("created=1790000000", "created=1790000001"),
            ("nonce-", "Nonce-"),
            ("harbour-a", "harbour-b"),
            ("\"@method\" \"@path\"", "\"@path\" \"@method\""),
            (";created", ";tag=\"x\";created"),
        ] {
            let code = change(&|s| {
                let input = s.headers["signature-input"].to_str().unwrap().to_owned();
                assert!(input.contains(from), "{from}");
                s.set("signature-input", &input.replacen(from, to, 1));
            });
            let expected = if to.contains("tag=") {
                "SIGNATURE_MALFORMED"
            } else {
                invalid
            };
            assert_eq!(code, expected, "{from}");
        }
        // A header that is not covered is not bound.
        assert_eq!(change(&|s| s.set("content-type", "text/plain")), "taken");
    }

    #[test]
    fn what_the_profile_does_not_have_is_refused_each_with_its_code() {
        let caller = Caller::new();
        let good = params("NONCE-0000000000");
        let with = |from: &str, to: &str| {
            assert!(good.contains(from), "{from}");
            let params = good
                .replacen(from, to, 1)
                .replace("NONCE-0000000000", &nonce());
            let mut sent = caller.request();
            caller.sign_with(&mut sent, &params);
            caller.judge(&sent)
        };
        assert_eq!(with("created", "created"), "taken", "positive control");
        let created = format!("created={NOW_S}");
        let ahead = |seconds: u64| format!("created={}", NOW_S + seconds);
        for (from, to, code) in [
            (" \"content-digest\"", "", "SIGNATURE_COMPONENTS"),
            ("\"@method\" ", "", "SIGNATURE_COMPONENTS"),
            (" \"@query\"", "", "SIGNATURE_COMPONENTS"),
            (" \"@path\"", "", "SIGNATURE_COMPONENTS"),
            ("\"@path\"", "\"@path\" \"@path\"", "SIGNATURE_COMPONENTS"),
            ("\"@path\"", "\"@path\" \"host\"", "SIGNATURE_COMPONENTS"),
            (
                "\"@path\"",
                "\"@path\" \"@authority\" \"content-type\"",
                "taken",
            ),
            (
                "keyid=\"crane-7\"",
                "keyid=\"crane-8\"",
                "SIGNATURE_KEY_UNKNOWN",
            ),
            (
                "alg=\"ed25519\"",
                "alg=\"ecdsa-p256-sha256\"",
                "SIGNATURE_KEY_UNKNOWN",
            ),
            (
                "alg=\"ed25519\"",
                "alg=\"hmac-sha256\"",
                "SIGNATURE_KEY_UNKNOWN",
            ),
            (
                "tag=\"harbour-a\"",
                "tag=\"harbour-b\"",
                "SIGNATURE_AUDIENCE",
            ),
            (";tag=\"harbour-a\"", "", "SIGNATURE_MALFORMED"),
            (";alg=\"ed25519\"", "", "SIGNATURE_MALFORMED"),
            (";keyid=\"crane-7\"", "", "SIGNATURE_MALFORMED"),
            (";nonce=\"NONCE-0000000000\"", "", "SIGNATURE_MALFORMED"),
            ("NONCE-0000000000", "short", "SIGNATURE_MALFORMED"),
            (";created=1790000000", "", "SIGNATURE_MALFORMED"),
            (";expires=1790000030", "", "SIGNATURE_MALFORMED"),
            (
                "expires=1790000030",
                "expires=01790000030",
                "SIGNATURE_MALFORMED",
            ),
            ("expires=1790000030", "expires=1790000060", "taken"),
            (
                "expires=1790000030",
                "expires=1790000061",
                "SIGNATURE_EXPIRED",
            ),
            (
                "expires=1790000030",
                "expires=1789999999",
                "SIGNATURE_EXPIRED",
            ),
            (&created, &ahead(5), "taken"),
            (&created, &ahead(6), "SIGNATURE_FUTURE"),
            (";created", "; created", "SIGNATURE_MALFORMED"),
        ] {
            assert_eq!(with(from, to), code, "{from} -> {to}");
        }
    }

    #[test]
    fn headers_that_are_not_in_the_one_form_are_refused() {
        let caller = Caller::new();
        let change = |change: &dyn Fn(&mut Sent)| {
            let mut sent = caller.signed();
            change(&mut sent);
            caller.judge(&sent)
        };
        let twice = |name: &'static str| {
            move |sent: &mut Sent| {
                let value = sent.headers[name].clone();
                sent.headers.append(name, value);
            }
        };
        for name in ["signature", "signature-input", "content-digest"] {
            assert_eq!(change(&twice(name)), "SIGNATURE_MALFORMED", "{name} twice");
            let gone = change(&|sent| drop(sent.headers.remove(name)));
            assert_eq!(gone, "SIGNATURE_MALFORMED", "{name} gone");
        }
        for (name, value) in [
            ("signature", "sig=AAAA"),
            ("signature", "other=:AAAA:"),
            ("signature", "sig=:AA*A:"),
            ("content-digest", "sha-512=:AAAA:"),
            ("content-digest", "sha-256=:AAAA:"),
            ("signature-input", "sig=()"),
            ("signature-input", "sig"),
            ("signature-input", "Sig=(\"@method\");created=1"),
        ] {
            let code = change(&|sent| sent.set(name, value));
            assert_eq!(code, "SIGNATURE_MALFORMED", "{name}: {value}");
        }
        // A request without a body covers none.
        let mut get = caller.request();
        get.method = Method::GET;
        caller.sign_with(&mut get, &params(&nonce()));
        assert_eq!(caller.judge(&get), "SIGNATURE_COMPONENTS");
        caller.sign_with(
            &mut get,
            &params(&nonce()).replace(" \"content-digest\"", ""),
        );
        assert_eq!(caller.judge(&get), "taken");
    }

    #[test]
    fn inv_18_a_signature_ends_by_trusted_time_and_a_restart_replays_none() {
        let caller = Caller::new();
        let sent = caller.signed();
        let ms = |seconds: u64| seconds * 1_000;
        assert_eq!(caller.judge_at(&sent, ms(NOW_S - 6)), "SIGNATURE_FUTURE");
        let later = Caller {
            nonces: NonceWindow::default(),
            keys: caller.keys.clone(),
            pair: Ed25519KeyPair::generate().unwrap(),
        };
        assert_eq!(caller.judge_at(&sent, ms(NOW_S + 30)), "taken");
        assert_eq!(
            caller.judge_at(&caller.signed(), ms(NOW_S + 30) + 1),
            "SIGNATURE_EXPIRED"
        );
        // The next run of the process, a second later, has forgotten the nonce.
        later.nonces.begin(|| Ok(ms(NOW_S + 1)));
        assert_eq!(
            later.judge_at(&sent, ms(NOW_S + 2)),
            "SIGNATURE_BEFORE_START"
        );
        let doubted = CallerTime::default();
        let fresh = caller.signed();
        let refused = verify(fresh.head(), &caller.keys, TAG, &caller.nonces, &doubted);
        assert_eq!(refused, Err(CredentialFault::ClockSuspect));
    }

    #[test]
    fn keys_on_p256_sign_as_well() {
        let rng = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &rng).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref()).unwrap();
        let mut caller = Caller::new();
        let key = VerifyingKey::p256(pair.public_key().as_ref().to_vec()).unwrap();
        caller.keys[0].key = key;
        let mut sent = caller.request();
        let params = params(&nonce()).replace("ed25519", "ecdsa-p256-sha256");
        caller.sign_with(&mut sent, &params);
        assert_eq!(
            caller.judge(&sent),
            "SIGNATURE_INVALID",
            "made by another key"
        );
        let base = base(
            sent.head(),
            &["@method", "@path", "@query", "content-digest"],
            &params,
        );
        let signature = pair.sign(&rng, base.unwrap().as_bytes()).unwrap();
        sent.set(
            "signature",
            &format!("sig=:{}:", STANDARD.encode(signature)),
        );
        assert_eq!(caller.judge(&sent), "taken");
    }
}
