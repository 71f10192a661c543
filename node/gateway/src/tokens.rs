//! The token file: hashes of bearer tokens, never the tokens.
//!
//! ```toml
//! format = 1
//!
//! [[tokens]]
//! sha256 = "sha256:0f3c…"          # of the token's bytes
//! principal = "build-agent-7"
//! principal_type = "Agent"         # optional, this is the default
//! scopes = ["decide", "explain"]   # also: "act_as"
//! expires_at = "2027-03-01T00:00:00Z"  # optional: not taken from then on
//! signed_by = "crane-7"            # optional: counts only on requests that this key has signed
//!
//! [[keys]]                         # signs requests, see `signatures`
//! id = "crane-7"
//! public_key_pem = """…"""         # Ed25519 or P-256
//! principal = "build-agent-7"
//! scopes = ["decide", "explain"]
//! ```
//!
//! A token is 256 random bits ([`mint_token`]), so a plain hash of it is enough: there is nothing
//! to guess. The file is refused when its group or others can read or write it, or when it belongs
//! to somebody else: who can write it can let himself in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use toml_edit::{Document, Item, TableLike};

use crate::auth::{Grant, Scopes};
use crate::files::{self, Access, FileError};
use crate::limits::{KEY_ID_BYTES_MAX, SIGNING_KEYS_MAX, TOKEN_FILE_BYTES_MAX, TOKENS_MAX};
use crate::signatures::SigningKey;
use crate::verifying::VerifyingKey;

/// The SHA-256 of a token, written `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// The digest of this token.
    #[must_use]
    pub fn of(token: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, token).as_ref());
        Self(bytes)
    }

    /// Reads the written form, strictly.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?.as_bytes();
        let mut bytes = [0; 32];
        if hex.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            for digit in pair {
                let value = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return None,
                };
                *byte = *byte << 4 | value;
            }
        }
        Some(Self(bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A new token, and the digest that goes into the token file. The token is shown once and kept
/// nowhere.
///
/// # Errors
///
/// When the system has no randomness to give.
pub fn mint_token() -> Result<(String, TokenDigest), NoRandomness> {
    let mut bytes = [0; 32];
    rand::fill(&mut bytes).map_err(|_| NoRandomness)?;
    let token = format!("tidelock_{}", URL_SAFE_NO_PAD.encode(bytes));
    let digest = TokenDigest::of(token.as_bytes());
    Ok((token, digest))
}

/// The system gave no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no randomness for a token")]
pub struct NoRandomness;

/// One mistake in a token file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMistake {
    /// The line it is in, from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for TokenMistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

fn list(mistakes: &[TokenMistake]) -> String {
    mistakes
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Why a token file was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenFileError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not what a token file holds. All mistakes at once.
    #[error("token file {} is wrong: {}", path.display(), list(mistakes))]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Every mistake, in the order of the file.
        mistakes: Vec<TokenMistake>,
    },
}

/// The tokens that are known, as digests, each with its grant, and the keys that sign requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    entries: Vec<(TokenDigest, Grant)>,
    /// Tokens that count only with the signature of a key.
    signed_by: BTreeMap<TokenDigest, String>,
    /// When those end that do, Unix milliseconds.
    expiries: BTreeMap<TokenDigest, u64>,
    keys: Vec<(SigningKey, Grant)>,
}

impl TokenSet {
    /// Reads a token file, after looking at who else could have.
    ///
    /// # Errors
    ///
    /// [`TokenFileError`], which names the file and the way out.
    pub fn load(path: &Path) -> Result<Self, TokenFileError> {
        let text = files::read(path, "token file", Access::OwnerOnly, TOKEN_FILE_BYTES_MAX)?;
        Self::parse(&text).map_err(|mistakes| TokenFileError::Wrong {
            path: path.to_owned(),
            mistakes,
        })
    }

    /// Reads the text of a token file.
    ///
    /// # Errors
    ///
    /// Every mistake in it, with its line.
    pub fn parse(text: &str) -> Result<Self, Vec<TokenMistake>> {
        let mut reader = Reader {
            text,
            mistakes: Vec::new(),
        };
        let set = reader.file();
        if reader.mistakes.is_empty() {
            Ok(set)
        } else {
            reader.mistakes.sort_by_key(|mistake| mistake.line);
            Err(reader.mistakes)
        }
    }

    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none, and no keys either.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.keys.is_empty()
    }

    /// What is granted by the tokens and keys.
    pub fn grants(&self) -> impl Iterator<Item = &Grant> {
        let keys = self.keys.iter().map(|(_, grant)| grant);
        self.iter().map(|(_, grant)| grant).chain(keys)
    }

    /// What is granted to whoever signs with the key of this id.
    #[must_use]
    pub fn key_grant(&self, id: &str) -> Option<&Grant> {
        let mut keys = self.keys.iter();
        keys.find(|(key, _)| key.id == id).map(|(_, grant)| grant)
    }

    /// The key that must have signed what this token comes with.
    pub(crate) fn signed_by(&self, digest: &TokenDigest) -> Option<&String> {
        self.signed_by.get(digest)
    }

    /// From when on this token is not taken, Unix milliseconds; none has no end.
    pub(crate) fn expires_unix_ms(&self, digest: &TokenDigest) -> Option<u64> {
        self.expiries.get(digest).copied()
    }

    /// The tokens that end: of whom, and when, Unix milliseconds.
    pub fn expiries(&self) -> impl Iterator<Item = (&TokenDigest, &Grant, u64)> {
        self.iter()
            .filter_map(|(digest, grant)| Some((digest, grant, self.expires_unix_ms(digest)?)))
    }

    pub(crate) fn keys(&self) -> &[(SigningKey, Grant)] {
        &self.keys
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(TokenDigest, Grant)> {
        self.entries.iter()
    }
}

/// What may stand in the id of a key, which travels in a header.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._:/@-".contains(&byte)
}

struct Reader<'t> {
    text: &'t str,
    mistakes: Vec<TokenMistake>,
}

impl Reader<'_> {
    fn mistake(&mut self, span: Option<Range<usize>>, message: impl Into<String>) {
        let start = span.map_or(0, |span| span.start).min(self.text.len());
        let before = self.text.as_bytes().get(..start).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.mistakes.push(TokenMistake {
            line,
            message: message.into(),
        });
    }

    fn file(&mut self) -> TokenSet {
        let document = match Document::parse(self.text) {
            Ok(document) => document,
            Err(error) => {
                self.mistake(error.span(), error.message().trim());
                return TokenSet::default();
            }
        };
        let root = document.as_table();
        self.refuse_unknown(root, &["format", "tokens", "keys"]);
        match root.get("format").map(Item::as_integer) {
            Some(Some(1)) => {}
            _ => self.mistake(
                root.get("format").and_then(Item::span),
                "`format = 1` is expected in a token file",
            ),
        }
        let mut set = TokenSet {
            keys: self.keys(root),
            ..TokenSet::default()
        };
        let mut seen = BTreeSet::new();
        match root.get("tokens") {
            None => {}
            Some(Item::ArrayOfTables(tables)) => {
                if tables.len() > TOKENS_MAX {
                    self.mistake(tables.span(), format!("more than {TOKENS_MAX} tokens"));
                    return set;
                }
                for table in tables {
                    if let Some((digest, grant)) = self.token(table, table.span()) {
                        if !seen.insert(digest) {
                            self.mistake(table.span(), "this token stands here twice");
                        }
                        if table.contains_key("signed_by")
                            && let Some((id, at)) = self.text_of(table, "signed_by", table.span())
                        {
                            let key = set.key_grant(id);
                            let same = key.is_some_and(|key| {
                                (key.principal_type(), key.principal_id())
                                    == (grant.principal_type(), grant.principal_id())
                            });
                            if !same {
                                self.mistake(
                                    at,
                                    "`signed_by` is the id of a key of the same principal",
                                );
                            }
                            set.signed_by.insert(digest, id.to_owned());
                        }
                        if table.contains_key("expires_at")
                            && let Some(at) = self.moment(table, "expires_at")
                        {
                            set.expiries.insert(digest, at);
                        }
                        set.entries.push((digest, grant));
                    }
                }
            }
            Some(other) => {
                self.mistake(other.span(), "tokens are written as `[[tokens]]` tables");
            }
        }
        set
    }

    fn keys(&mut self, root: &dyn TableLike) -> Vec<(SigningKey, Grant)> {
        let mut keys: Vec<(SigningKey, Grant)> = Vec::new();
        let tables = match root.get("keys") {
            None => return keys,
            Some(Item::ArrayOfTables(tables)) if tables.len() <= SIGNING_KEYS_MAX => tables,
            Some(other) => {
                let form =
                    format!("keys are written as `[[keys]]` tables, at most {SIGNING_KEYS_MAX}");
                self.mistake(other.span(), form);
                return keys;
            }
        };
        for table in tables {
            let known = [
                "id",
                "public_key_pem",
                "principal",
                "principal_type",
                "scopes",
            ];
            self.refuse_unknown(table, &known);
            let id = self.text_of(table, "id", table.span());
            if let Some((id, at)) = &id {
                if id.is_empty() || id.len() > KEY_ID_BYTES_MAX || !id.bytes().all(is_plain) {
                    let form =
                        format!("`id` is 1 to {KEY_ID_BYTES_MAX} of A-Z a-z 0-9 . _ : / @ -");
                    self.mistake(at.clone(), form);
                }
                if keys.iter().any(|(key, _)| key.id == *id) {
                    self.mistake(at.clone(), "this key stands here twice");
                }
            }
            let pem = self.text_of(table, "public_key_pem", table.span());
            let key = pem.and_then(|(pem, at)| match VerifyingKey::from_pem(pem) {
                Ok(key) => Some(key),
                Err(why) => {
                    self.mistake(at, format!("`public_key_pem` {why}"));
                    None
                }
            });
            let grant = self.grant(table, table.span());
            if let (Some((id, _)), Some(key), Some(grant)) = (id, key, grant) {
                let id = id.to_owned();
                keys.push((SigningKey { id, key }, grant));
            }
        }
        keys
    }

    fn token(
        &mut self,
        table: &dyn TableLike,
        span: Option<Range<usize>>,
    ) -> Option<(TokenDigest, Grant)> {
        self.refuse_unknown(
            table,
            &[
                "sha256",
                "principal",
                "principal_type",
                "scopes",
                "expires_at",
                "signed_by",
            ],
        );
        let digest = self
            .text_of(table, "sha256", span.clone())
            .and_then(|(text, at)| {
                let digest = TokenDigest::parse(text);
                if digest.is_none() {
                    self.mistake(at, "`sha256` is \"sha256:\" and 64 lower-case hex digits");
                }
                digest
            });
        let grant = self.grant(table, span);
        Some((digest?, grant?))
    }

    /// A principal and its scopes.
    fn grant(&mut self, table: &dyn TableLike, span: Option<Range<usize>>) -> Option<Grant> {
        let principal = self.text_of(table, "principal", span.clone());
        let principal_type = if table.contains_key("principal_type") {
            self.text_of(table, "principal_type", span.clone())
                .map(|(text, _)| text)
        } else {
            Some(Grant::DEFAULT_TYPE)
        };
        let scopes = self.scopes(table, span);
        let (principal, at) = principal?;
        match Grant::new(principal_type?, principal, scopes?) {
            Ok(grant) => Some(grant),
            Err(error) => {
                self.mistake(at, error.to_string());
                None
            }
        }
    }

    /// A time as RFC 3339 writes it, in Unix milliseconds.
    fn moment(&mut self, table: &dyn TableLike, key: &str) -> Option<u64> {
        let (text, at) = self.text_of(table, key, None)?;
        let parsed = text.parse::<jiff::Timestamp>().ok();
        let unix_ms = parsed.and_then(|time| u64::try_from(time.as_millisecond()).ok());
        if unix_ms.is_none() {
            let form = format!("`{key}` is a time as RFC 3339 has it: \"2027-03-01T00:00:00Z\"");
            self.mistake(at, form);
        }
        unix_ms
    }

    fn text_of<'i>(
        &mut self,
        table: &'i dyn TableLike,
        key: &str,
        table_span: Option<Range<usize>>,
    ) -> Option<(&'i str, Option<Range<usize>>)> {
        let Some(item) = table.get(key) else {
            self.mistake(table_span, format!("`{key}` is missing"));
            return None;
        };
        let Some(text) = item.as_str() else {
            self.mistake(item.span(), format!("`{key}` is a string"));
            return None;
        };
        Some((text, item.span()))
    }

    fn scopes(
        &mut self,
        table: &dyn TableLike,
        table_span: Option<Range<usize>>,
    ) -> Option<Scopes> {
        let Some(item) = table.get("scopes") else {
            self.mistake(table_span, "`scopes` is missing: write [] for none");
            return None;
        };
        let mut scopes = Scopes::default();
        let known = item.as_array().is_some_and(|names| {
            names
                .iter()
                .all(|name| name.as_str().is_some_and(|name| scopes.add(name)))
        });
        if !known {
            self.mistake(
                item.span(),
                "`scopes` is a list of \"decide\", \"explain\" and \"act_as\"",
            );
        }
        known.then_some(scopes)
    }

    fn refuse_unknown(&mut self, table: &dyn TableLike, known: &[&str]) {
        for (name, item) in table.iter() {
            if !known.contains(&name) {
                let span = table
                    .key(name)
                    .and_then(toml_edit::Key::span)
                    .or_else(|| item.span());
                let message = format!("unknown key `{name}`: known are {}", known.join(", "));
                self.mistake(span, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    fn good() -> String {
        format!(
            "format = 1\n\n[[tokens]]\nsha256 = \"{}\"\nprincipal = \"ci\"\nscopes = [\"decide\"]\n",
            TokenDigest::of(b"secret")
        )
    }

    fn lines(text: &str) -> Vec<(usize, String)> {
        TokenSet::parse(text)
            .unwrap_err()
            .into_iter()
            .map(|mistake| (mistake.line, mistake.message))
            .collect()
    }

    #[test]
    fn a_good_file_is_read() {
        let tokens = TokenSet::parse(&good()).unwrap();
        let (digest, grant) = tokens.iter().next().unwrap();
        assert_eq!(*digest, TokenDigest::of(b"secret"));
        assert_eq!(
            (grant.principal_type(), grant.principal_id()),
            ("Agent", "ci")
        );
        assert_eq!(
            grant.scopes(),
            Scopes {
                decide: true,
                ..Scopes::default()
            }
        );
        assert!(TokenSet::parse("format = 1\n").unwrap().is_empty());
    }

    #[test]
    fn the_digest_is_what_sha256sum_prints() {
        assert_eq!(
            TokenDigest::of(b"abc").to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let (token, digest) = mint_token().unwrap();
        assert_eq!(TokenDigest::of(token.as_bytes()), digest);
        assert_eq!(TokenDigest::parse(&digest.to_string()), Some(digest));
        assert_ne!(mint_token().unwrap().0, token);
        for bad in [
            "",
            "sha256:",
            "SHA256:00",
            &digest.to_string().to_uppercase(),
            &digest.to_string()[7..],
        ] {
            assert_eq!(TokenDigest::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_their_lines() {
        let text = "format = 2\ncolour = \"red\"\n\n[[tokens]]\nsha256 = \"md5:00\"\n\
                    principal = 7\nscopes = [\"decide\", \"admin\"]\n\n[[tokens]]\nprincpal = \"x\"\n";
        let found = lines(text);
        let at: Vec<_> = found.iter().map(|(line, _)| *line).collect();
        assert_eq!(at, [1, 2, 5, 6, 7, 9, 9, 9, 10], "{found:#?}");
        assert!(found[1].1.contains("unknown key `colour`"));
        assert!(found[8].1.contains("unknown key `princpal`"));
    }

    #[test]
    fn malformed_files_are_refused() {
        for text in [
            "",
            "format = 1\nformat = 1\n",
            "format",
            "format = 1\ntokens = 3\n",
        ] {
            assert_eq!(lines(text).len(), 1, "{text}");
        }
        let twice = format!("{}{}", good(), good().replace("format = 1\n", ""));
        assert!(lines(&twice)[0].1.contains("twice"));
    }

    #[test]
    fn a_file_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.toml");
        fs::write(&path, good()).unwrap();
        for loose in [0o640, 0o604, 0o620, 0o666, 0o601] {
            fs::set_permissions(&path, Permissions::from_mode(loose)).unwrap();
            assert_eq!(
                TokenSet::load(&path),
                Err(TokenFileError::File(FileError::LooseMode {
                    what: "token file",
                    path: path.clone(),
                    mode: loose,
                    way_out: "chmod 600",
                }))
            );
        }
        // Positive control: the same file, closed.
        for tight in [0o600, 0o400] {
            fs::set_permissions(&path, Permissions::from_mode(tight)).unwrap();
            assert_eq!(TokenSet::load(&path).unwrap().len(), 1);
        }
        assert!(matches!(
            TokenSet::load(dir.path()),
            Err(TokenFileError::File(
                FileError::NotAFile { .. } | FileError::LooseMode { .. }
            ))
        ));
        assert!(matches!(
            TokenSet::load(&dir.path().join("absent")),
            Err(TokenFileError::File(FileError::Unreadable { .. }))
        ));
    }
}
