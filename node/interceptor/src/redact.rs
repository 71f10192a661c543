//! Redaction of the usual secrets, before anything is recorded, logged or answered.
//!
//! It works on structured values, so that what surrounds a secret keeps its form: a value is
//! replaced by `[redacted:KIND]`, a secret inside a longer text is cut out of it. Redacting twice
//! changes nothing.
//!
//! | kind | what is replaced |
//! | --- | --- |
//! | `key` | the value of a key, header, flag, query parameter or assignment with a telling name |
//! | `authorization` | what follows `Bearer` or `Basic` |
//! | `jwt` | a JSON web token |
//! | `pem` | what stands between the BEGIN and END lines of a PEM block |
//! | `aws`, `gcp`, `github`, `gitlab`, `slack`, `stripe`, `api-key` | a key with a known prefix or form |
//! | `userinfo` | the password in the authority of a URL |
//!
//! It is a net under callers who send secrets where none belong, not a licence to send them: a
//! secret without a telling name and without a known form is just text.

use std::borrow::Cow;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};

/// A value without its secrets, and how many were replaced.
#[must_use]
pub fn redact(value: &Value) -> (Value, u64) {
    let mut count = 0;
    let value = redact_value(value, &mut count);
    (value, count)
}

/// A text without its secrets, and how many were replaced.
#[must_use]
pub fn redact_text(text: &str) -> (Cow<'_, str>, u64) {
    let (mut out, mut count) = pass(text);
    if count == 0 {
        return (out, 0);
    }
    // What was cut out may have hidden another secret around it.
    for _ in 0..MAX_PASSES {
        let (again, more) = pass(&out);
        if more == 0 {
            break;
        }
        count += more;
        out = Cow::Owned(again.into_owned());
    }
    (out, count)
}

/// One pass over a text. It takes linear time.
fn pass(text: &str) -> (Cow<'_, str>, u64) {
    let mut scanner = Scanner {
        text,
        at: 0,
        kept: 0,
        out: String::new(),
        count: 0,
    };
    scanner.run();
    if scanner.count == 0 {
        return (Cow::Borrowed(text), 0);
    }
    let Scanner {
        kept,
        mut out,
        count,
        ..
    } = scanner;
    out.push_str(text.get(kept..).unwrap_or_default());
    (Cow::Owned(out), count)
}

/// A message without secrets, control characters or more than `max` bytes.
pub(crate) fn message(text: &str, max: usize) -> String {
    let (text, _) = redact_text(text);
    if text.len() + ELLIPSIS.len() <= max && !text.contains(char::is_control) {
        return text.into_owned();
    }
    let mut out = String::new();
    for c in text.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() + ELLIPSIS.len() > max {
            out.push_str(ELLIPSIS);
            break;
        }
        out.push(c);
    }
    out
}

/// Passes over what a pass has changed. Each cuts one layer around a secret; nothing nests deeper.
const MAX_PASSES: usize = 4;
const ELLIPSIS: &str = "...";
const MARK: &str = "[redacted:";

fn mark(kind: &str) -> String {
    format!("{MARK}{kind}]")
}

fn redact_value(value: &Value, count: &mut u64) -> Value {
    match value {
        Value::String(text) => {
            let (text, found) = redact_text(text);
            *count += found;
            Value::String(text.into_owned())
        }
        Value::Array(items) => redact_array(items, count),
        Value::Object(fields) => redact_object(fields, count),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

fn redact_object(fields: &Map<String, Value>, count: &mut u64) -> Value {
    // `{"name": "Authorization", "value": "…"}` is a pair, too.
    let named = ["name", "key", "header", "field"].iter().any(|label| {
        fields
            .get(*label)
            .and_then(Value::as_str)
            .is_some_and(is_telling)
    });
    let mut out = Map::new();
    for (key, value) in fields {
        let value = if is_telling(key) || (named && key == "value") {
            blank(value, count)
        } else {
            redact_value(value, count)
        };
        let (key, found) = redact_text(key);
        *count += found;
        let mut key = key.into_owned();
        // Two secrets as keys become one text; none of the values may be lost for that.
        while out.contains_key(&key) {
            key.push('+');
        }
        out.insert(key, value);
    }
    Value::Object(out)
}

fn redact_array(items: &[Value], count: &mut u64) -> Value {
    let pair = items.len() == 2;
    let mut hide_next = false;
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        out.push(if hide_next {
            blank(item, count)
        } else {
            redact_value(item, count)
        });
        // `["--password", "…"]`, `["Authorization:", "…"]`, `["x-api-key", "…"]`
        hide_next = item.as_str().is_some_and(|text| {
            let name = text.trim_start_matches('-').trim_end_matches(':');
            (pair || name.len() < text.len()) && is_telling(name)
        });
    }
    Value::Array(out)
}

/// Replaces every text and number, keeping the structure around them.
fn blank(value: &Value, count: &mut u64) -> Value {
    match value {
        Value::Null | Value::Bool(_) => value.clone(),
        Value::String(text) if text.is_empty() || is_mark(text) => value.clone(),
        Value::String(_) | Value::Number(_) => {
            *count += 1;
            Value::String(mark("key"))
        }
        Value::Array(items) => Value::Array(items.iter().map(|item| blank(item, count)).collect()),
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .map(|(key, value)| (key.clone(), blank(value, count)))
                .collect(),
        ),
    }
}

/// Length of the mark that a text begins with. Only what [`mark`] makes is one: nothing can hide
/// behind an opening bracket.
fn mark_length(text: &str) -> Option<usize> {
    let kind = text.strip_prefix(MARK)?;
    let length = kind
        .chars()
        .take(16)
        .take_while(|c| c.is_ascii_lowercase() || *c == '-')
        .count();
    let closed = length > 0 && kind.get(length..)?.starts_with(']');
    closed.then_some(MARK.len() + length + 1)
}

fn is_mark(text: &str) -> bool {
    mark_length(text) == Some(text.len())
}

/// Whether the value behind this name is a secret.
fn is_telling(name: &str) -> bool {
    const ANYWHERE: [&str; 13] = [
        "password",
        "passwd",
        "passphrase",
        "apikey",
        "secretkey",
        "accesskey",
        "accountkey",
        "privatekey",
        "signingkey",
        "clientsecret",
        "authorization",
        "credential",
        "bearertoken",
    ];
    const AT_END: [&str; 5] = ["secret", "token", "pwd", "cookie", "sessionid"];
    const WHOLE: [&str; 9] = [
        "pass",
        "auth",
        "sig",
        "xauth",
        "xamzsignature",
        "xgoogsignature",
        "jwt",
        "pin",
        "otp",
    ];
    if name.len() > 128 {
        return false;
    }
    let name: String = name
        .chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect();
    ANYWHERE.iter().any(|word| name.contains(word))
        || AT_END.iter().any(|word| name.ends_with(word))
        || WHOLE.contains(&name.as_str())
}

/// A key that its prefix gives away: prefix, kind, fewest characters that follow.
const PREFIXES: [(&str, &str, usize); 38] = [
    // Our own bearer tokens.
    ("tidelock_", "api-key", 16),
    ("github_pat_", "github", 22),
    ("ghp_", "github", 16),
    ("gho_", "github", 16),
    ("ghu_", "github", 16),
    ("ghs_", "github", 16),
    ("ghr_", "github", 16),
    ("glpat-", "gitlab", 16),
    ("glptt-", "gitlab", 16),
    ("gldt-", "gitlab", 16),
    ("xoxa-", "slack", 10),
    ("xoxb-", "slack", 10),
    ("xoxc-", "slack", 10),
    ("xoxd-", "slack", 10),
    ("xoxe-", "slack", 10),
    ("xoxo-", "slack", 10),
    ("xoxp-", "slack", 10),
    ("xoxr-", "slack", 10),
    ("xoxs-", "slack", 10),
    ("xapp-", "slack", 10),
    ("AIza", "gcp", 30),
    ("ya29.", "gcp", 20),
    ("GOCSPX-", "gcp", 16),
    ("sk_live_", "stripe", 10),
    ("sk_test_", "stripe", 10),
    ("rk_live_", "stripe", 10),
    ("rk_test_", "stripe", 10),
    ("whsec_", "stripe", 16),
    ("sk-", "api-key", 20),
    ("npm_", "api-key", 30),
    ("pypi-", "api-key", 30),
    ("hf_", "api-key", 30),
    ("hvs.", "api-key", 20),
    ("dop_v1_", "api-key", 30),
    ("SG.", "api-key", 30),
    ("shpat_", "api-key", 20),
    ("lin_api_", "api-key", 20),
    ("AGE-SECRET-KEY-1", "api-key", 20),
];

/// Prefixes of AWS access key ids; sixteen upper-case letters and digits follow.
const AWS_PREFIXES: [&str; 8] = [
    "AKIA", "ASIA", "ABIA", "ACCA", "AGPA", "AIDA", "ANPA", "AROA",
];

/// Copies a text piece by piece, leaving secrets out. Every look ahead is bounded, ends where the
/// scan goes on, or is cut out as a whole, so the work is linear in the text.
struct Scanner<'a> {
    text: &'a str,
    /// Where the scan stands.
    at: usize,
    /// Up to where the text was copied or left out.
    kept: usize,
    out: String,
    count: u64,
}

impl<'a> Scanner<'a> {
    fn run(&mut self) {
        let mut previous = None;
        while let Some(c) = self.rest().chars().next() {
            let before = self.at;
            if let Some(length) = mark_length(self.rest()) {
                self.at += length;
            } else if c == '-' && self.rest().starts_with("-----BEGIN ") {
                self.pem();
            } else if c == ':' && self.rest().starts_with("://") {
                self.at += 3;
                self.userinfo();
            } else if is_word(c) && !previous.is_some_and(char::is_alphanumeric) {
                self.word(!previous.is_some_and(is_word));
            }
            if self.at == before {
                self.at += c.len_utf8();
            }
            previous = self
                .text
                .get(..self.at)
                .and_then(|done| done.chars().next_back());
        }
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// Replaces `length` bytes that begin `skip` bytes ahead, and goes on behind them.
    fn cut(&mut self, skip: usize, length: usize, kind: &str) {
        let start = self.at + skip;
        let end = start + length;
        self.out
            .push_str(self.text.get(self.kept..start).unwrap_or_default());
        self.out.push_str(&mark(kind));
        self.count += 1;
        self.kept = end;
        self.at = end;
    }

    fn pem(&mut self) {
        const BEGIN: usize = "-----BEGIN ".len();
        let rest = self.rest();
        let label = rest.get(BEGIN..).unwrap_or_default();
        let label_length = run_length(label, |c| {
            c.is_ascii_uppercase() || c.is_ascii_digit() || c == ' '
        });
        if !label
            .get(label_length..)
            .is_some_and(|dashes| dashes.starts_with("-----"))
        {
            return;
        }
        let skip = BEGIN + label_length + "-----".len();
        let body = rest.get(skip..).unwrap_or_default();
        let length = body.find("-----END ").unwrap_or(body.len());
        if body
            .get(..length)
            .is_some_and(|body| body.is_empty() || is_mark(body))
        {
            self.at += skip + length;
        } else {
            self.cut(skip, length, "pem");
        }
        if self.rest().starts_with("-----END ") {
            self.at += "-----END ".len();
        }
    }

    fn userinfo(&mut self) {
        let end =
            |c: char| matches!(c, '/' | '?' | '#' | '"' | '\'' | '<' | '>') || c.is_whitespace();
        let rest = self.rest();
        let authority = rest
            .get(..run_length(rest, |c| !end(c)))
            .unwrap_or_default();
        let Some((userinfo, _)) = authority.rsplit_once('@') else {
            return;
        };
        let (skip, secret) = match userinfo.split_once(':') {
            _ if is_mark(userinfo) => return,
            Some((user, password)) => (user.len() + 1, password),
            // A lone long user is a token.
            None if userinfo.len() >= 16 => (0, userinfo),
            None => return,
        };
        if !secret.is_empty() && !is_mark(secret) {
            self.cut(skip, secret.len(), "userinfo");
        }
    }

    /// Looks at the word that begins here. It is fresh when no dash or underscore precedes it.
    fn word(&mut self, fresh: bool) {
        let rest = self.rest();
        if let Some((length, kind)) = prefixed(rest) {
            self.cut(0, length, kind);
            return;
        }
        if fresh {
            if let Some((length, kind)) = jwt(rest).or_else(|| aws_secret(rest)) {
                self.cut(0, length, kind);
                return;
            }
            let name_length = run_length(rest, |c| is_word(c) || c == '.');
            let (name, after) = rest.split_at_checked(name_length).unwrap_or((rest, ""));
            if let Some((skip, length)) = scheme(name, after) {
                self.cut(name_length + skip, length, "authorization");
                return;
            }
            if let Some((skip, length)) = assignment(name, after) {
                self.cut(name_length + skip, length, "key");
                return;
            }
        }
        self.at += run_length(rest, char::is_alphanumeric).max(1);
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~' | '+' | '/' | '=')
}

fn run_length(text: &str, allowed: impl Fn(char) -> bool) -> usize {
    text.find(|c| !allowed(c)).unwrap_or(text.len())
}

/// Length and kind of the secret that a text begins with, when it is a JSON web token.
fn jwt(text: &str) -> Option<(usize, &'static str)> {
    let after = text.strip_prefix("eyJ")?;
    let header = run_length(after, is_word);
    let payload_text = after.get(header..)?.strip_prefix('.')?;
    let payload = run_length(payload_text, is_word);
    // `{}` is two letters more; a signature may be empty.
    let is_jwt = header >= 5 && payload >= 3 && payload_text.get(payload..)?.starts_with('.');
    is_jwt.then(|| (run_length(text, |c| is_word(c) || c == '.'), "jwt"))
}

/// Length and kind of the secret that a text begins with, when its prefix gives it away.
fn prefixed(text: &str) -> Option<(usize, &'static str)> {
    // Most words begin with the first letter of none.
    let first = text.as_bytes().first();
    for (prefix, kind, least) in PREFIXES {
        if prefix.as_bytes().first() == first
            && let Some(after) = text.strip_prefix(prefix)
        {
            let dots = prefix.ends_with('.');
            let length = run_length(after, |c| is_word(c) || (dots && c == '.'));
            if length >= least {
                return Some((prefix.len() + length, kind));
            }
        }
    }
    for prefix in AWS_PREFIXES {
        if let Some(after) = text.strip_prefix(prefix) {
            let id = |c: &char| c.is_ascii_uppercase() || c.is_ascii_digit();
            if after.chars().take(17).take_while(id).count() == 16 {
                return Some((20, "aws"));
            }
        }
    }
    None
}

/// An AWS secret key has no prefix: it is forty characters that look drawn at random.
fn aws_secret(text: &str) -> Option<(usize, &'static str)> {
    let base64 = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
    let forty = text.chars().take(41).take_while(base64).count() == 40;
    (forty && text.get(..40).is_some_and(is_random)).then_some((40, "aws"))
}

/// Whether forty characters look drawn at random from letters of both cases, digits and signs, as
/// AWS secret keys are. Paths, words and hashes in hex change between these classes seldom.
fn is_random(text: &str) -> bool {
    let class = |c: char| match c {
        'a'..='z' => 0,
        'A'..='Z' => 1,
        '0'..='9' => 2,
        _ => 3,
    };
    let classes: Vec<_> = text.chars().map(class).collect();
    let changes = classes
        .windows(2)
        .filter(|pair| pair.first() != pair.last())
        .count();
    let of = |wanted| classes.iter().filter(|class| **class == wanted).count();
    changes >= 15 && of(0) >= 3 && of(1) >= 3 && of(2) >= 1
}

/// Where the credentials of `Bearer x` or `Basic x` lie behind the word.
fn scheme(name: &str, after: &str) -> Option<(usize, usize)> {
    let spaces = run_length(after, |c| c == ' ');
    if spaces == 0 {
        return None;
    }
    let token = after.get(spaces..)?;
    let length = run_length(token, is_token);
    let token = token.get(..length)?;
    let secret = if name.eq_ignore_ascii_case("bearer") {
        // `bearer authentication` is prose; a token is long, or mixes letters with other things.
        length >= 20 || (length >= 8 && token.chars().any(|c| !c.is_ascii_lowercase()))
    } else if name.eq_ignore_ascii_case("basic") {
        let lenient =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let decoded = GeneralPurpose::new(&alphabet::STANDARD, lenient).decode(token);
        decoded.is_ok_and(|decoded| decoded.contains(&b':'))
    } else {
        false
    };
    secret.then_some((spaces, length))
}

/// Where the value of `name=value`, `name: value`, `"name": "value"` or `--name value` lies behind
/// a telling name.
fn assignment(name: &str, after: &str) -> Option<(usize, usize)> {
    let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''));
    let mut skip = quote.map_or(0, char::len_utf8);
    // JSON inside a JSON string inside a shell line: `\"token\": \"…\"`
    if after.starts_with("\\\"") {
        skip = 2;
    }
    skip += run_length(after.get(skip..)?, |c| c == ' ');
    let separator = after.get(skip..)?.chars().next()?;
    let mut rest_of_line = false;
    if matches!(separator, '=' | ':') {
        skip += 1;
        // `token::parse` and `secret == x` are code, `https://` after a name is a URL's scheme.
        if after.get(skip..)?.starts_with(['=', ':']) || after.get(skip..)?.starts_with("//") {
            return None;
        }
        rest_of_line = separator == ':' && is_header(name);
        skip += run_length(after.get(skip..)?, |c| c == ' ');
    } else if !(name.starts_with("--") && skip > 0 && quote.is_none()) {
        return None;
    }
    if !is_telling(name) {
        return None;
    }
    let value = after.get(skip..)?;
    // What was cut out before stays as it is.
    if mark_length(value).is_some() {
        return None;
    }
    let (opening, value) = if let Some(value) = value.strip_prefix("\\\"") {
        (Some('"'), value)
    } else {
        match value.chars().next() {
            Some(c @ ('"' | '\'')) => (Some(c), value.get(1..)?),
            _ => (None, value),
        }
    };
    let skip = after.len() - value.len();
    let length = match opening {
        Some(close) => run_length(value, |c| c != close && c != '\\' && c != '\n'),
        None if rest_of_line => run_length(value, |c| !matches!(c, '"' | '\'' | '\r' | '\n')),
        None => run_length(value, |c| {
            !c.is_whitespace()
                && !matches!(
                    c,
                    '&' | ';' | ',' | '"' | '\'' | '`' | ')' | '}' | ']' | '<' | '>' | '|'
                )
        }),
    };
    let secret = value.get(..length)?;
    let empty = secret.is_empty() || mark_length(secret).is_some() || is_variable(secret);
    (!empty).then_some((skip, length))
}

/// The name of a shell variable (`$PASSWORD`) is no secret.
fn is_variable(text: &str) -> bool {
    let name =
        |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || matches!(c, '_' | '{' | '}');
    text.strip_prefix('$')
        .is_some_and(|rest| !rest.is_empty() && rest.chars().all(name))
}

/// Headers whose value reaches to the end of the line.
fn is_header(name: &str) -> bool {
    [
        "authorization",
        "proxy-authorization",
        "cookie",
        "set-cookie",
    ]
    .iter()
    .any(|header| name.eq_ignore_ascii_case(header))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(input: &str) -> String {
        redact_text(input).0.into_owned()
    }

    const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlLWJ5dGVz";
    const PEM: &str = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\nAgEGCCqGSM49\n-----END PRIVATE KEY-----";
    const AWS_SECRET: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";

    /// One secret of each kind, where it stands, and what remains.
    fn samples() -> Vec<(String, String, &'static str)> {
        let gh = format!("ghp_{}", "aB3dE5gH7j".repeat(4));
        let pat = format!("github_pat_{}", "11ABCDEFG0_abcdefghij".repeat(2));
        let gcp = format!("AIza{}", "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q");
        let slack = ["xoxb", "123456789012", "abcdefGHIJKL"].join("-");
        let stripe = ["sk", "live", "4eC39HqLyjWDarjtT1zdp7dc"].join("_");
        let sk = format!("sk-{}", "proj-aB3dE5gH7jK9mN1pQ3sT");
        [
            (
                "Bearer abcDEF123456",
                "abcDEF123456",
                "Bearer [redacted:authorization]",
            ),
            (
                "bearer  aaaaaaaaaaaaaaaaaaaaaaaa",
                "aaaaaaaaaaaaaaaaaaaaaaaa",
                "bearer  [redacted:authorization]",
            ),
            (
                "see Basic dXNlcjpwYXNz now",
                "dXNlcjpwYXNz",
                "see Basic [redacted:authorization] now",
            ),
            (
                "Authorization: Digest username=x, response=y1",
                "response=y1",
                "Authorization: [redacted:key]",
            ),
            (
                "curl -H 'Authorization: abc' https://a.example/x",
                "abc",
                "curl -H 'Authorization: [redacted:key]' https://a.example/x",
            ),
            (
                "curl -H \"Cookie: a=1; b=2\" x",
                "a=1; b=2",
                "curl -H \"Cookie: [redacted:key]\" x",
            ),
            (
                "X-Api-Key: q1w2e3\nAccept: */*",
                "q1w2e3",
                "X-Api-Key: [redacted:key]\nAccept: */*",
            ),
            (
                "mysql --password=hunter2 -u root",
                "hunter2",
                "mysql --password=[redacted:key] -u root",
            ),
            (
                "tool --token hunter2 --dry-run",
                "hunter2",
                "tool --token [redacted:key] --dry-run",
            ),
            ("password: hunter2", "hunter2", "password: [redacted:key]"),
            (
                "DB_PASSWORD='hunter 2' run",
                "hunter 2",
                "DB_PASSWORD='[redacted:key]' run",
            ),
            (
                "{\"client_secret\": \"s3cr3t\", \"id\": 1}",
                "s3cr3t",
                "{\"client_secret\": \"[redacted:key]\", \"id\": 1}",
            ),
            (
                "{\\\"token\\\": \\\"s3cr3t\\\"}",
                "s3cr3t",
                "{\\\"token\\\": \\\"[redacted:key]\\\"}",
            ),
            (
                "https://a.example/x?access_token=s3cr3t&y=1",
                "s3cr3t",
                "https://a.example/x?access_token=[redacted:key]&y=1",
            ),
            (
                "https://b.example/o?X-Amz-Signature=abcdef01&z=2",
                "abcdef01",
                "https://b.example/o?X-Amz-Signature=[redacted:key]&z=2",
            ),
            (
                "postgres://app:s3cr3t@db.example/main",
                "s3cr3t",
                "postgres://app:[redacted:userinfo]@db.example/main",
            ),
            (
                "https://0123456789abcdef0123@git.example/x",
                "0123456789abcdef0123",
                "https://[redacted:userinfo]@git.example/x",
            ),
            (
                "id AKIAIOSFODNN7EXAMPLE.",
                "AKIAIOSFODNN7EXAMPLE",
                "id [redacted:aws].",
            ),
        ]
        .into_iter()
        .map(|(input, secret, kept)| (input.to_owned(), secret.to_owned(), kept))
        .chain([
            (format!("t={JWT}!"), JWT.to_owned(), "t=[redacted:jwt]!"),
            (
                format!("a {PEM} b"),
                "MIGHAgEAMBMGByqGSM49".to_owned(),
                "a -----BEGIN PRIVATE KEY-----[redacted:pem]-----END PRIVATE KEY----- b",
            ),
            (
                "-----BEGIN RSA PRIVATE KEY-----\nMIIcut".to_owned(),
                "MIIcut".to_owned(),
                "-----BEGIN RSA PRIVATE KEY-----[redacted:pem]",
            ),
            (
                format!("({AWS_SECRET})"),
                AWS_SECRET.to_owned(),
                "([redacted:aws])",
            ),
            (
                format!("git clone {gh}"),
                gh.clone(),
                "git clone [redacted:github]",
            ),
            (format!("<{pat}>"), pat.clone(), "<[redacted:github]>"),
            (format!("k/{gcp}/x"), gcp.clone(), "k/[redacted:gcp]/x"),
            (
                format!("\"{slack}\""),
                slack.clone(),
                "\"[redacted:slack]\"",
            ),
            (format!("{stripe},"), stripe.clone(), "[redacted:stripe],"),
            (
                format!("use {sk} please"),
                sk.clone(),
                "use [redacted:api-key] please",
            ),
        ])
        .collect()
    }

    #[test]
    fn secrets_of_each_kind_are_cut_out_of_texts() {
        for (input, secret, kept) in samples() {
            let redacted = text(&input);
            assert_eq!(redacted, kept, "{input}");
            assert!(!redacted.contains(&secret));
            assert_eq!(redact_text(&input).1, 1, "{input}");
        }
    }

    #[test]
    fn ordinary_text_is_untouched() {
        for input in [
            "",
            "cat /srv/work/notes/2024-11-03.md",
            "the bearer of bad news, bearer authentication explained",
            "Basic information about basic training",
            "git commit -m 'tokenizer: split words at dashes' --author=ada",
            "max_tokens=4096 next: tokens: 5",
            "fn token::parse(secret == x)",
            "password=$PASSWORD",
            "https://example.com/a/b?page=2&sort=asc#top",
            "see https://user@host.example/ and mail a@b.example",
            "4f1c0a9b8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a",
            "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "/srv/Projects/2024/Reports/Summary/final",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJKLMN",
            "task-list sk-short skills eyJ eyJabc.def",
            "-----BEGIN",
            "AKIA is a prefix",
            "\u{e9}t\u{e9} \u{1f600} na\u{ef}ve \u{4e2d}\u{6587}",
            "secretary: Ada; passenger: Bo",
        ] {
            assert_eq!(redact_text(input), (Cow::Borrowed(input), 0), "{input}");
        }
        let value = json!({
            "path": "/srv/x", "max_tokens": 10, "secret_name": "db/main", "author": "ada",
            "argv": ["-l", "--color", "auto"], "nested": [{"name": "Accept", "value": "text/html"}],
            "n": null, "b": true,
        });
        assert_eq!(redact(&value), (value.clone(), 0));
    }

    #[test]
    fn structured_values_keep_what_surrounds_a_secret() {
        let value = json!({
            "headers": {"Authorization": "Bearer x", "Accept": "text/html"},
            "list": [{"name": "X-Api-Key", "value": "k1"}, {"name": "Accept", "value": "text"}],
            "pairs": [["Cookie", "a=b"], ["Accept", "text"]],
            "argv": ["--password", "hunter2", "--verbose", "-H", "Authorization: abc"],
            "password": {"current": "a", "pin": 1234, "set": true, "old": [null, "b"]},
            "api_key": "",
            "file": format!("before\n{PEM}\nafter"),
        });
        let (redacted, count) = redact(&value);
        assert_eq!(
            redacted,
            json!({
                "headers": {"Authorization": "[redacted:key]", "Accept": "text/html"},
                "list": [{"name": "X-Api-Key", "value": "[redacted:key]"}, {"name": "Accept", "value": "text"}],
                "pairs": [["Cookie", "[redacted:key]"], ["Accept", "text"]],
                "argv": ["--password", "[redacted:key]", "--verbose", "-H", "Authorization: [redacted:key]"],
                "password": {"current": "[redacted:key]", "pin": "[redacted:key]", "set": true, "old": [null, "[redacted:key]"]},
                "api_key": "",
                "file": "before\n-----BEGIN PRIVATE KEY-----[redacted:pem]-----END PRIVATE KEY-----\nafter",
            })
        );
        assert_eq!(count, 9);
        assert_eq!(
            redact(&redacted),
            (redacted.clone(), 0),
            "twice changes nothing"
        );
    }

    #[test]
    fn secrets_that_are_keys_are_cut_out_and_no_value_is_lost() {
        let value = json!({"AKIAIOSFODNN7EXAMPLE": 1, "AKIAIOSFODNN7EXAMPLF": 2});
        let (redacted, count) = redact(&value);
        assert_eq!(redacted, json!({"[redacted:aws]": 1, "[redacted:aws]+": 2}));
        assert_eq!(count, 2);
    }

    #[test]
    fn hostile_texts_take_linear_time() {
        // Each of these made some look ahead run to the end of the text again and again in a naive
        // scanner; with the limit of a body that is seconds. Finishing is the test.
        for part in [
            "eyJ-",
            "eyJaaaaa.",
            "a/",
            "sk-",
            "-----BEGIN ",
            "-----BEGIN x-----",
            "[redacted:",
            "://",
            "a@",
            "password=$",
            "password=$A",
            "password:",
            "bearer ",
            "Basic a ",
            "--token ",
            "\"token\"",
            "token ",
            "AKIA",
            "SG.",
            "_-",
        ] {
            let input = part.repeat(64 * 1024 / part.len());
            let once = text(&input);
            assert_eq!(text(&once), once, "{part}");
        }
    }

    #[test]
    fn messages_are_short_and_on_one_line() {
        assert_eq!(message("a\nb\u{1b}[2J", 100), "a b [2J");
        assert_eq!(message("token=abc", 100), "token=[redacted:key]");
        assert_eq!(message(&"\u{e9}".repeat(100), 20).len(), 19);
        assert_eq!(message("short", 8), "short");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn redacting_twice_changes_nothing(
            parts in proptest::collection::vec(
                prop_oneof![
                    proptest::sample::select(samples()).prop_map(|sample| sample.0),
                    "\\PC{0,6}",
                    proptest::sample::select(vec![
                        "password", "token", "=", ":", " ", "\"", "'", "Bearer ", "Basic ", "--",
                        "://", "@", "[redacted:", "]", "\n", "&", "eyJ", ".", "-----BEGIN ", "\\",
                    ]).prop_map(str::to_owned),
                ],
                0..8,
            ),
        ) {
            let input = parts.concat();
            let once = text(&input);
            prop_assert_eq!(text(&once), once.clone(), "{}", input);
        }

        #[test]
        fn a_secret_between_ordinary_words_never_survives(
            sample in proptest::sample::select(samples()),
            before in "[a-z ]{0,20}",
            after in "[a-z ]{0,20}",
        ) {
            let (input, secret, _) = sample;
            // A word that happens to be the secret is none where nothing tells.
            prop_assume!(!before.contains(&secret) && !after.contains(&secret));
            let redacted = text(&format!("{before} {input}\n{after}"));
            prop_assert!(!redacted.contains(&secret), "{}", redacted);
            prop_assert!(redacted.starts_with(&before));
        }

        #[test]
        fn plain_words_are_untouched(input in "([a-z]{1,9}[ ,./]){0,20}") {
            prop_assume!(!input.split([' ', ',', '.', '/']).any(is_telling));
            prop_assert_eq!(text(&input), input);
        }
    }
}
