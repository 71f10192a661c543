//! Workload tokens of OIDC issuers: JWTs, verified with keys that are pinned in a file, so that a dark
//! site verifies them too.
//!
//! Nothing that a token says of its own verification is honoured: the issuer's config names the file
//! of keys, the key names the algorithm, and a header that brings keys, addresses of keys or
//! extensions is refused. Header and claims are read by the interceptor's strict JSON reader
//! (INV-15). Time is the node's trusted time (INV-18). Why no JWT library: decision 0036.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use tidelock_interceptor::strict_json;

use crate::auth::{Grant, Scopes};
use crate::credentials::{CallerTime, CredentialFault, Pattern};
use crate::files::{self, Access, FileError};
use crate::limits::{
    CLAIM_DEPTH_MAX, CLAIM_VALUES_MAX, JWKS_BYTES_MAX, JWKS_KEYS_MAX, JWT_BYTES_MAX,
    KEY_ID_BYTES_MAX,
};
use crate::verifying::VerifyingKey;

/// Header parameters that would let a token choose its own key, or change what its parts mean.
const HEADER_REFUSED: [&str; 8] = ["crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "cty"];
/// The types of tokens that are taken, in lower case: JWT, and access tokens of RFC 9068.
const TYPES: [&str; 2] = ["jwt", "at+jwt"];
/// Members of a JWK that only a private or a secret key has.
const PRIVATE: [&str; 7] = ["d", "p", "q", "dp", "dq", "qi", "k"];

/// One issuer whose tokens are taken, and for what.
#[derive(Clone, Debug)]
pub struct OidcIssuer {
    /// The `iss` of its tokens, compared byte by byte.
    pub issuer: String,
    /// What must be in their `aud`.
    pub audience: String,
    /// Its keys.
    pub keys: Jwks,
    /// The claim that names the principal.
    pub principal_claim: String,
    /// The type of the principals.
    pub principal_type: String,
    /// What is granted to whom; the first rule that fits counts, and who fits none is nobody.
    pub rules: Vec<OidcRule>,
    /// Longest time from `iat` to `exp`, seconds.
    pub lifetime_max_s: u64,
    /// How far the issuer's clock may be off, seconds.
    pub leeway_s: u64,
}

/// What the bearers of some of an issuer's tokens may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcRule {
    /// The principals that it is for; all of them if there is none.
    pub subject: Option<Pattern>,
    /// A claim, and what it, or one of its texts, must be.
    pub claim: Option<(String, Pattern)>,
    /// What it grants.
    pub scopes: Scopes,
}

impl OidcRule {
    fn fits(&self, principal: &str, claims: &Map<String, Value>) -> bool {
        let by_subject = self
            .subject
            .as_ref()
            .is_none_or(|subject| subject.matches(principal));
        let by_claim = self.claim.as_ref().is_none_or(|(name, wanted)| {
            texts(claims.get(name))
                .is_some_and(|texts| texts.iter().any(|text| wanted.matches(text)))
        });
        by_subject && by_claim
    }
}

/// The keys of an issuer, by their `kid`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jwks {
    keys: BTreeMap<String, VerifyingKey>,
}

/// Why a file of keys was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwksError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its contents. All mistakes at once.
    #[error("JWKS file {} is wrong: {}", path.display(), mistakes.join("; "))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Every mistake, in the order of the file.
        mistakes: Vec<String>,
    },
}

impl Jwks {
    /// Reads a file with a JSON Web Key Set (RFC 7517). Others than its owner must not be able to
    /// write it.
    ///
    /// # Errors
    /// [`JwksError`], which names the file and the way out.
    pub fn load(path: &Path) -> Result<Self, JwksError> {
        let text = files::read(path, "JWKS file", Access::ReadByOthers, JWKS_BYTES_MAX)?;
        Self::parse(&text).map_err(|mistakes| JwksError::Wrong {
            path: path.to_owned(),
            mistakes,
        })
    }

    /// Reads the text of a key set.
    ///
    /// # Errors
    /// Every mistake in it.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let value = strict_json(text.as_bytes()).map_err(|error| vec![error.to_string()])?;
        let Some(listed) = value.get("keys").and_then(Value::as_array) else {
            return Err(vec![
                "`keys` must be a list: this is no JSON Web Key Set".to_owned(),
            ]);
        };
        if listed.len() > JWKS_KEYS_MAX {
            return Err(vec![format!("more than {JWKS_KEYS_MAX} keys")]);
        }
        let mut keys = BTreeMap::new();
        let mut mistakes = Vec::new();
        for (at, listed) in listed.iter().enumerate() {
            match read_key(listed) {
                Ok(None) => {}
                Ok(Some((kid, key))) => {
                    if keys.insert(kid.clone(), key).is_some() {
                        mistakes.push(format!("key {}: kid {kid:?} stands twice", at + 1));
                    }
                }
                Err(why) => mistakes.push(format!("key {}: {why}", at + 1)),
            }
        }
        if keys.is_empty() && mistakes.is_empty() {
            mistakes.push("no key that signs".to_owned());
        }
        match mistakes.is_empty() {
            true => Ok(Self { keys }),
            false => Err(mistakes),
        }
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// One key of a set; nothing where it is for encryption.
fn read_key(jwk: &Value) -> Result<Option<(String, VerifyingKey)>, String> {
    let fields = jwk.as_object().ok_or("must be an object")?;
    let text = |name: &str| match fields.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(format!("`{name}` must be a string")),
    };
    let bytes = |name: &str| {
        let text = text(name)?.ok_or_else(|| format!("`{name}` is missing"))?;
        URL_SAFE_NO_PAD
            .decode(text)
            .map_err(|_| format!("`{name}` is not base64url without padding"))
    };
    if let Some(private) = PRIVATE.iter().find(|name| fields.contains_key(**name)) {
        return Err(format!(
            "`{private}` is part of a secret: only public keys belong here, and that one is spoilt"
        ));
    }
    match text("use")? {
        Some("enc") => return Ok(None),
        None | Some("sig") => {}
        Some(other) => return Err(format!("`use` is {other:?}, it may be \"sig\"")),
    }
    if let Some(ops) = fields.get("key_ops")
        && *ops != serde_json::json!(["verify"])
    {
        return Err("`key_ops` may be [\"verify\"]".to_owned());
    }
    let kid = text("kid")?.ok_or("`kid` is missing: tokens name their key by it")?;
    if kid.is_empty() || kid.len() > KEY_ID_BYTES_MAX {
        return Err(format!("`kid` must have 1 to {KEY_ID_BYTES_MAX} bytes"));
    }
    let key = match (text("kty")?, text("crv")?) {
        (Some("RSA"), None) => VerifyingKey::rsa(bytes("n")?, bytes("e")?),
        (Some("EC"), Some("P-256")) => {
            let (x, y) = (bytes("x")?, bytes("y")?);
            if x.len() != 32 || y.len() != 32 {
                return Err("`x` and `y` must have 32 bytes each".to_owned());
            }
            VerifyingKey::p256([&[4][..], &x, &y].concat())
        }
        (Some("OKP"), Some("Ed25519")) => VerifyingKey::ed25519(bytes("x")?),
        (kty, crv) => {
            return Err(format!(
                "`kty` {kty:?} with `crv` {crv:?} is not taken: RSA, EC P-256 and OKP Ed25519 are"
            ));
        }
    };
    let key = key?;
    match text("alg")? {
        Some(alg) if alg != key.algorithm().jose() => Err(format!(
            "`alg` is {alg:?}, this key is taken for {} only",
            key.algorithm().jose()
        )),
        _ => Ok(Some((kid.to_owned(), key))),
    }
}

/// Whether a bearer token has the outer form of a JWT.
pub(crate) fn is_jwt(token: &[u8]) -> bool {
    token.iter().filter(|byte| **byte == b'.').count() == 2
}

/// Whose token this is, and what its bearer may do.
pub(crate) fn verify(
    token: &[u8],
    issuers: &[OidcIssuer],
    time: &CallerTime,
) -> Result<Grant, CredentialFault> {
    if token.len() > JWT_BYTES_MAX {
        return Err(CredentialFault::TokenMalformed);
    }
    let token = std::str::from_utf8(token).map_err(|_| CredentialFault::TokenMalformed)?;
    let (signed, signature) = token
        .rsplit_once('.')
        .ok_or(CredentialFault::TokenMalformed)?;
    let (header, claims) = signed
        .split_once('.')
        .ok_or(CredentialFault::TokenMalformed)?;
    let (header, claims) = (object(header)?, object(claims)?);
    let signature = URL_SAFE_NO_PAD
        .decode(signature)
        .map_err(|_| CredentialFault::TokenMalformed)?;

    if HEADER_REFUSED.iter().any(|name| header.contains_key(*name)) {
        return Err(CredentialFault::TokenHeader);
    }
    match header.get("typ") {
        None => {}
        Some(Value::String(typ)) if TYPES.contains(&typ.to_ascii_lowercase().as_str()) => {}
        Some(_) => return Err(CredentialFault::TokenHeader),
    }
    let text = |from: &Map<String, Value>, name: &str| match from.get(name) {
        Some(Value::String(text)) => Some(text.clone()),
        _ => None,
    };
    let named = text(&claims, "iss").ok_or(CredentialFault::TokenClaims)?;
    let issuer = issuers
        .iter()
        .find(|issuer| issuer.issuer == named)
        .ok_or(CredentialFault::TokenIssuer)?;
    let kid = text(&header, "kid").ok_or(CredentialFault::TokenKey)?;
    let key = issuer
        .keys
        .keys
        .get(&kid)
        .ok_or(CredentialFault::TokenKey)?;
    // The key says which algorithm it is for; the header may only agree.
    if text(&header, "alg").as_deref() != Some(key.algorithm().jose()) {
        return Err(CredentialFault::TokenAlgorithm);
    }
    if !key.verifies(signed.as_bytes(), &signature) {
        return Err(CredentialFault::TokenSignature);
    }
    issuer.judge(&claims, time)
}

impl OidcIssuer {
    /// Judges claims that this issuer has signed.
    fn judge(
        &self,
        claims: &Map<String, Value>,
        time: &CallerTime,
    ) -> Result<Grant, CredentialFault> {
        let audiences = texts(claims.get("aud")).ok_or(CredentialFault::TokenClaims)?;
        if !audiences.contains(&self.audience.as_str()) {
            return Err(CredentialFault::TokenAudience);
        }
        let seconds = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or(CredentialFault::TokenClaims),
        };
        let expires_s = seconds("exp")?.ok_or(CredentialFault::TokenClaims)?;
        let issued_s = seconds("iat")?.ok_or(CredentialFault::TokenClaims)?;
        let begins_s = seconds("nbf")?.unwrap_or(issued_s).max(issued_s);
        // INV-18: by trusted time, and by none that is in doubt.
        let now_ms = time.sane_unix_ms()?;
        let ms = |seconds: u64| seconds.saturating_mul(1_000);
        if now_ms >= ms(expires_s.saturating_add(self.leeway_s)) {
            return Err(CredentialFault::TokenExpired);
        }
        if ms(begins_s) > now_ms.saturating_add(ms(self.leeway_s)) {
            return Err(CredentialFault::TokenNotYet);
        }
        if expires_s.saturating_sub(issued_s) > self.lifetime_max_s {
            return Err(CredentialFault::TokenLifetime);
        }
        let Some(Value::String(principal)) = claims.get(&self.principal_claim) else {
            return Err(CredentialFault::TokenClaims);
        };
        let rule = self
            .rules
            .iter()
            .find(|rule| rule.fits(principal, claims))
            .ok_or(CredentialFault::Unmapped)?;
        Grant::new(&self.principal_type, principal, rule.scopes)
            .map_err(|_| CredentialFault::PrincipalInvalid)
    }
}

/// The texts of a claim that is one text or a list of texts.
fn texts(claim: Option<&Value>) -> Option<Vec<&str>> {
    match claim? {
        Value::String(text) => Some(vec![text]),
        Value::Array(texts) if texts.len() <= CLAIM_VALUES_MAX => {
            texts.iter().map(Value::as_str).collect()
        }
        _ => None,
    }
}

/// A part of a token: base64url of an object in strict JSON, not nested deeply.
fn object(part: &str) -> Result<Map<String, Value>, CredentialFault> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| CredentialFault::TokenMalformed)?;
    match strict_json(&bytes) {
        Ok(value) if depth(&value) > CLAIM_DEPTH_MAX => Err(CredentialFault::TokenMalformed),
        Ok(Value::Object(fields)) => Ok(fields),
        _ => Err(CredentialFault::TokenMalformed),
    }
}

/// How deep a value nests; the strict reader has bounded it.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    };
    use serde_json::json;

    use super::*;
    use crate::credentials::Moment;

    const NOW_S: u64 = 1_790_000_000;
    const ISSUER: &str = "https://ci.harbour.example";

    /// The keys of one issuer: an Ed25519 key `ed` and a P-256 key `ec`.
    struct Issuing {
        ed: Ed25519KeyPair,
        ec: EcdsaKeyPair,
    }

    fn b64(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    impl Issuing {
        fn new() -> Self {
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(
                &ECDSA_P256_SHA256_FIXED_SIGNING,
                &SystemRandom::new(),
            )
            .unwrap();
            Self {
                ed: Ed25519KeyPair::generate().unwrap(),
                ec: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref())
                    .unwrap(),
            }
        }

        fn ed_jwk(&self) -> Value {
            json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": b64(self.ed.public_key())})
        }

        fn ec_jwk(&self) -> Value {
            let point = self.ec.public_key().as_ref();
            json!({"kty": "EC", "crv": "P-256", "kid": "ec", "use": "sig", "alg": "ES256",
                   "x": b64(&point[1..33]), "y": b64(&point[33..])})
        }

        fn jwks(&self) -> Jwks {
            Jwks::parse(&json!({"keys": [self.ed_jwk(), self.ec_jwk()]}).to_string()).unwrap()
        }

        fn issuer(&self) -> OidcIssuer {
            let rule = |subject: &str, scopes| OidcRule {
                subject: Some(Pattern::parse(subject).unwrap()),
                claim: None,
                scopes,
            };
            let decide = Scopes {
                decide: true,
                ..Scopes::default()
            };
            OidcIssuer {
                issuer: ISSUER.to_owned(),
                audience: "tidelock".to_owned(),
                keys: self.jwks(),
                principal_claim: "sub".to_owned(),
                principal_type: "Workload".to_owned(),
                rules: vec![
                    OidcRule {
                        claim: Some(("groups".to_owned(), Pattern::parse("crane-*").unwrap())),
                        ..rule(
                            "job/*",
                            Scopes {
                                explain: true,
                                ..decide
                            },
                        )
                    },
                    rule("job/*", decide),
                    rule("watch/1", Scopes::default()),
                ],
                lifetime_max_s: 3_600,
                leeway_s: 30,
            }
        }

        fn sign(&self, kid: &str, signed: &str) -> Vec<u8> {
            match kid {
                "ec" => {
                    let signature = self.ec.sign(&SystemRandom::new(), signed.as_bytes());
                    signature.unwrap().as_ref().to_vec()
                }
                _ => self.ed.sign(signed.as_bytes()).as_ref().to_vec(),
            }
        }

        /// A token of these very texts.
        fn raw(&self, kid: &str, header: &str, claims: &str) -> String {
            let signed = format!("{}.{}", b64(header), b64(claims));
            let signature = b64(self.sign(kid, &signed));
            format!("{signed}.{signature}")
        }

        fn token(&self, kid: &str, claims: &Value) -> String {
            let alg = if kid == "ec" { "ES256" } else { "EdDSA" };
            let header = json!({"alg": alg, "kid": kid, "typ": "JWT"});
            self.raw(kid, &header.to_string(), &claims.to_string())
        }
    }

    fn claims() -> Value {
        json!({"iss": ISSUER, "aud": "tidelock", "sub": "job/7",
               "iat": NOW_S - 60, "nbf": NOW_S - 60, "exp": NOW_S + 600})
    }

    fn with(name: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[name] = value;
        claims
    }

    fn without(name: &str) -> Value {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(name);
        claims
    }

    fn at(unix_ms: u64) -> CallerTime {
        CallerTime::new(move || Moment {
            unix_ms,
            suspect: false,
        })
    }

    fn judged(issuing: &Issuing, token: &str) -> Result<Grant, CredentialFault> {
        verify(token.as_bytes(), &[issuing.issuer()], &at(NOW_S * 1_000))
    }

    fn code(issuing: &Issuing, token: &str) -> &'static str {
        judged(issuing, token).map_or_else(CredentialFault::code, |_| "taken")
    }

    #[test]
    fn a_good_token_is_its_principal_with_the_scopes_of_the_first_rule_that_fits() {
        let issuing = Issuing::new();
        for kid in ["ed", "ec"] {
            let grant = judged(&issuing, &issuing.token(kid, &claims())).unwrap();
            assert_eq!(
                (grant.principal_type(), grant.principal_id()),
                ("Workload", "job/7")
            );
            assert!(grant.scopes().decide && !grant.scopes().explain && !grant.scopes().act_as);
        }
        let explains = |claims: &Value| {
            let grant = judged(&issuing, &issuing.token("ed", claims)).unwrap();
            (grant.scopes().decide, grant.scopes().explain)
        };
        assert_eq!(
            explains(&with("groups", json!(["x", "crane-1"]))),
            (true, true)
        );
        assert_eq!(explains(&with("groups", json!("crane-1"))), (true, true));
        assert_eq!(
            explains(&with("groups", json!(["x", "crane"]))),
            (true, false)
        );
        assert_eq!(
            explains(&with("groups", json!([7, "crane-1"]))),
            (true, false)
        );
        assert_eq!(explains(&with("sub", json!("watch/1"))), (false, false));
        assert_eq!(
            explains(&with("aud", json!(["x", "tidelock"]))),
            (true, false)
        );
        assert_eq!(explains(&without("nbf")), (true, false));
    }

    #[test]
    fn claims_that_do_not_fit_are_refused_each_with_its_code() {
        let issuing = Issuing::new();
        let deep = (0..9).fold(json!(1), |inner, _| json!([inner]));
        for (claims, expected) in [
            (claims(), "taken"),
            (with("iss", json!("https://evil.example")), "TOKEN_ISSUER"),
            (with("iss", json!([ISSUER])), "TOKEN_CLAIMS"),
            (without("iss"), "TOKEN_CLAIMS"),
            (with("aud", json!("Tidelock")), "TOKEN_AUDIENCE"),
            (with("aud", json!([])), "TOKEN_AUDIENCE"),
            (with("aud", json!({"tidelock": 1})), "TOKEN_CLAIMS"),
            (with("aud", json!(vec!["tidelock"; 33])), "TOKEN_CLAIMS"),
            (without("aud"), "TOKEN_CLAIMS"),
            (without("exp"), "TOKEN_CLAIMS"),
            (without("iat"), "TOKEN_CLAIMS"),
            (without("sub"), "TOKEN_CLAIMS"),
            (with("sub", json!(7)), "TOKEN_CLAIMS"),
            (with("sub", json!("other/7")), "CALLER_UNMAPPED"),
            (with("sub", json!("job/a\nb")), "CALLER_PRINCIPAL"),
            (
                with("sub", json!(format!("job/{}", "x".repeat(300)))),
                "CALLER_PRINCIPAL",
            ),
            (with("exp", json!("1790000600")), "TOKEN_CLAIMS"),
            (with("exp", json!(-1)), "TOKEN_CLAIMS"),
            (with("exp", json!(1_790_000_600.5)), "TOKEN_CLAIMS"),
            (with("exp", json!(NOW_S - 30)), "TOKEN_EXPIRED"),
            (with("exp", json!(NOW_S - 29)), "taken"),
            (with("exp", json!(0)), "TOKEN_EXPIRED"),
            (with("nbf", json!(NOW_S + 31)), "TOKEN_NOT_YET_VALID"),
            (with("nbf", json!(NOW_S + 30)), "taken"),
            (with("iat", json!(NOW_S + 31)), "TOKEN_NOT_YET_VALID"),
            (with("exp", json!(NOW_S - 60 + 3_601)), "TOKEN_LIFETIME"),
            (with("exp", json!(NOW_S - 60 + 3_600)), "taken"),
            (with("x", deep), "TOKEN_MALFORMED"),
        ] {
            assert_eq!(
                code(&issuing, &issuing.token("ed", &claims)),
                expected,
                "{claims}"
            );
        }
    }

    #[test]
    fn no_header_chooses_its_own_key_algorithm_or_meaning() {
        let issuing = Issuing::new();
        let text = claims().to_string();
        let header = |extra: &str| format!("{{\"alg\":\"EdDSA\",\"kid\":\"ed\"{extra}}}");
        let jwk = issuing.ed_jwk();
        for (header, expected) in [
            (header(""), "taken"),
            (header(",\"typ\":\"at+JWT\""), "taken"),
            (header(",\"x5t\":\"abc\""), "taken"),
            (header(",\"typ\":\"dpop+jwt\""), "TOKEN_HEADER"),
            (header(",\"typ\":7"), "TOKEN_HEADER"),
            (header(",\"crit\":[]"), "TOKEN_HEADER"),
            (header(",\"crit\":[\"exp\"]"), "TOKEN_HEADER"),
            (
                header(",\"jku\":\"https://evil.example/keys\""),
                "TOKEN_HEADER",
            ),
            (
                header(",\"x5u\":\"https://evil.example/cert\""),
                "TOKEN_HEADER",
            ),
            (header(",\"x5c\":[]"), "TOKEN_HEADER"),
            (header(&format!(",\"jwk\":{jwk}")), "TOKEN_HEADER"),
            (header(",\"b64\":false"), "TOKEN_HEADER"),
            (header(",\"zip\":\"DEF\""), "TOKEN_HEADER"),
            (header(",\"cty\":\"JWT\""), "TOKEN_HEADER"),
            (header(",\"kid\":\"ed\""), "TOKEN_MALFORMED"),
            (header(",\"KID\":\"ec\""), "TOKEN_MALFORMED"),
            ("{\"alg\":\"EdDSA\"}".to_owned(), "TOKEN_KEY_UNKNOWN"),
            (
                "{\"alg\":\"EdDSA\",\"kid\":7}".to_owned(),
                "TOKEN_KEY_UNKNOWN",
            ),
            (
                "{\"alg\":\"EdDSA\",\"kid\":\"other\"}".to_owned(),
                "TOKEN_KEY_UNKNOWN",
            ),
            ("{\"kid\":\"ed\"}".to_owned(), "TOKEN_ALGORITHM"),
            (
                "{\"alg\":[\"EdDSA\"],\"kid\":\"ed\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            (
                "{\"alg\":\"eddsa\",\"kid\":\"ed\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            (
                "{\"alg\":\"ES256\",\"kid\":\"ed\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            (
                "{\"alg\":\"none\",\"kid\":\"ed\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            (
                "{\"alg\":\"HS256\",\"kid\":\"ed\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            (
                "{\"alg\":\"EdDSA\",\"kid\":\"ec\"}".to_owned(),
                "TOKEN_ALGORITHM",
            ),
            // The right algorithm of a key that did not sign.
            (
                "{\"alg\":\"ES256\",\"kid\":\"ec\"}".to_owned(),
                "TOKEN_SIGNATURE",
            ),
            ("[]".to_owned(), "TOKEN_MALFORMED"),
            ("{\"alg\":".to_owned(), "TOKEN_MALFORMED"),
        ] {
            assert_eq!(
                code(&issuing, &issuing.raw("ed", &header, &text)),
                expected,
                "{header}"
            );
        }
    }

    #[test]
    fn an_unsigned_or_mac_signed_token_is_nobodys() {
        let issuing = Issuing::new();
        let good = issuing.token("ed", &claims());
        let (signed, _) = good.rsplit_once('.').unwrap();
        assert_eq!(code(&issuing, &format!("{signed}.")), "TOKEN_SIGNATURE");
        let none = format!(
            "{}.{}.",
            b64("{\"alg\":\"none\",\"kid\":\"ed\"}"),
            b64(claims().to_string())
        );
        assert_eq!(code(&issuing, &none), "TOKEN_ALGORITHM");
        // The public key as the secret of a MAC.
        let header = b64("{\"alg\":\"HS256\",\"kid\":\"ed\"}");
        let signed = format!("{header}.{}", b64(claims().to_string()));
        let secret = aws_lc_rs::hmac::Key::new(
            aws_lc_rs::hmac::HMAC_SHA256,
            issuing.ed.public_key().as_ref(),
        );
        let mac = b64(aws_lc_rs::hmac::sign(&secret, signed.as_bytes()));
        assert_eq!(
            code(&issuing, &format!("{signed}.{mac}")),
            "TOKEN_ALGORITHM"
        );
        // Another issuer's keys under the same kid.
        assert_eq!(
            code(&issuing, &Issuing::new().token("ed", &claims())),
            "TOKEN_SIGNATURE"
        );
        assert_eq!(code(&issuing, &good), "taken", "positive control");
    }

    #[test]
    fn inv_15_a_token_that_has_two_readings_is_refused() {
        let issuing = Issuing::new();
        let header = "{\"alg\":\"EdDSA\",\"kid\":\"ed\"}";
        let text = claims().to_string();
        let twice = text.replace("{", "{\"sub\":\"job/1\",");
        let cased = text.replace("{", "{\"SUB\":\"job/1\",");
        for bad in [
            twice.as_str(),
            &cased,
            &format!("{text}{{}}"),
            "[]",
            "",
            "\u{feff}{}",
        ] {
            let token = issuing.raw("ed", header, bad);
            assert_eq!(code(&issuing, &token), "TOKEN_MALFORMED", "{bad}");
        }
        let good = issuing.raw("ed", header, &text);
        assert_eq!(code(&issuing, &good), "taken", "positive control");
        let parts: Vec<&str> = good.split('.').collect();
        for bad in [
            format!("{}=.{}.{}", parts[0], parts[1], parts[2]),
            format!("{}.{}.{}=", parts[0], parts[1], parts[2]),
            format!("{}.{}", parts[0], parts[1]),
            format!("{good}.{}", parts[2]),
            format!(" {good}"),
            format!("{}.{}.{}", parts[0], parts[1], "x".repeat(JWT_BYTES_MAX)),
        ] {
            assert_eq!(code(&issuing, &bad), "TOKEN_MALFORMED", "{bad:.80}");
        }
    }

    #[test]
    fn inv_18_a_token_is_judged_by_trusted_time_and_by_no_clock_in_doubt() {
        let issuing = Issuing::new();
        let token = issuing.token("ed", &claims());
        let by = |time: &CallerTime| {
            verify(token.as_bytes(), &[issuing.issuer()], time)
                .map_or_else(CredentialFault::code, |_| "taken")
        };
        assert_eq!(by(&at(NOW_S * 1_000)), "taken", "positive control");
        assert_eq!(by(&at((NOW_S + 630) * 1_000)), "TOKEN_EXPIRED");
        assert_eq!(by(&at(0)), "TOKEN_NOT_YET_VALID");
        assert_eq!(by(&CallerTime::default()), "CLOCK_SUSPECT");
        let doubted = CallerTime::new(|| Moment {
            unix_ms: NOW_S * 1_000,
            suspect: true,
        });
        assert_eq!(by(&doubted), "CLOCK_SUSPECT");
    }

    #[test]
    fn one_issuers_key_signs_for_no_other() {
        let (one, other) = (Issuing::new(), Issuing::new());
        let second = OidcIssuer {
            issuer: "https://other.example".to_owned(),
            principal_type: "Guest".to_owned(),
            ..other.issuer()
        };
        let both = [one.issuer(), second];
        let by = |token: String| verify(token.as_bytes(), &both, &at(NOW_S * 1_000));
        let theirs = with("iss", json!("https://other.example"));
        assert_eq!(
            by(other.token("ed", &theirs)).unwrap().principal_type(),
            "Guest"
        );
        assert_eq!(
            by(one.token("ed", &theirs)),
            Err(CredentialFault::TokenSignature)
        );
        assert_eq!(
            by(other.token("ed", &claims())),
            Err(CredentialFault::TokenSignature)
        );
    }

    #[test]
    fn all_mistakes_of_a_key_set_are_told_at_once() {
        let issuing = Issuing::new();
        let good = issuing.ed_jwk();
        let change = |name: &str, value: Value| {
            let mut jwk = good.clone();
            jwk[name] = value;
            jwk
        };
        let mut nameless = good.clone();
        nameless.as_object_mut().unwrap().remove("kid");
        let weak = json!({"kty": "RSA", "kid": "weak", "e": "AQAB", "n": b64([0xff; 128])});
        let bad = [
            change("kid", json!("")),
            change("kid", json!("x".repeat(129))),
            nameless,
            change("d", json!("AAAA")),
            change("use", json!("tls")),
            change("key_ops", json!(["sign"])),
            change("alg", json!("ES256")),
            change("x", json!("AA")),
            change("x", json!("AA==")),
            change("crv", json!("X25519")),
            change("kty", json!("oct")),
            json!({"kty": "oct", "kid": "mac", "k": "AAAA"}),
            weak,
            json!("key"),
        ];
        let mistakes = Jwks::parse(&json!({"keys": bad}).to_string()).unwrap_err();
        assert_eq!(mistakes.len(), bad.len(), "{mistakes:#?}");
        for (at, mistake) in mistakes.iter().enumerate() {
            assert!(
                mistake.starts_with(&format!("key {}: ", at + 1)),
                "{mistake}"
            );
        }
        let twice = json!({"keys": [good, good]}).to_string();
        assert!(Jwks::parse(&twice).unwrap_err()[0].contains("twice"));
        let many: Vec<Value> = (0..33)
            .map(|at| change("kid", json!(at.to_string())))
            .collect();
        assert!(Jwks::parse(&json!({"keys": many}).to_string()).is_err());
        for text in [
            "",
            "{}",
            "{\"keys\":[]}",
            "{\"keys\":{}}",
            "{\"keys\":[],\"keys\":[]}",
        ] {
            assert_eq!(Jwks::parse(text).unwrap_err().len(), 1, "{text}");
        }
        // The controls: what providers publish beside it does no harm.
        let enc = change("use", json!("enc"));
        let named = change("x5t", json!("abc"));
        let keys = json!({"keys": [enc, named, issuing.ec_jwk()]}).to_string();
        assert_eq!(Jwks::parse(&keys).unwrap().len(), 2);
    }

    #[test]
    fn a_key_set_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        fs::write(
            &path,
            json!({"keys": [Issuing::new().ed_jwk()]}).to_string(),
        )
        .unwrap();
        for mode in [0o664, 0o646, 0o622] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let refused = Jwks::load(&path).unwrap_err();
            assert!(
                matches!(refused, JwksError::File(FileError::LooseMode { .. })),
                "{refused}"
            );
        }
        for mode in [0o644, 0o600, 0o444] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(Jwks::load(&path).unwrap().len(), 1);
        }
    }
}
