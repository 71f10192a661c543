//! One spelling a resource.
//!
//! A resource id is brought to one canonical spelling, or refused where two systems could take it
//! for two different things. What a policy judges, what is recorded and what an executor opens is
//! the canonical spelling, never the caller's. Normalising a canonical spelling changes nothing.
//!
//! | type | id | attributes |
//! | --- | --- | --- |
//! | `File` | absolute path | `path`, `name`, `dir`, `ext` (lower case, without the dot) |
//! | `Url` | http or https URL | `url`, `scheme`, `host`, `port`, `path`, `query` |
//! | `Command` | program name, or its absolute path | `program`, `name` |
//! | `Secret` | name in segments | `name` |
//! | `Repo` | `host/path#branch`, the branch may be left out | `host`, `path`, `branch` |
//! | `Tool` | `server/name` | `server`, `name` |
//! | any other | plain text | none |

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde_json::{Map, Value};
use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::limits::{MAX_HOST_BYTES, MAX_PATH_SEGMENT_BYTES, MAX_RESOURCE_ID_BYTES};

/// Resource types with a spelling of their own. A type that differs from one of these in case only
/// is refused, or it would slip past its rules.
pub(crate) const KNOWN_TYPES: [&str; 6] = ["File", "Url", "Command", "Secret", "Repo", "Tool"];

/// Why a resource id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResourceError {
    /// Nothing was given.
    #[error("resource id is empty")]
    Empty,
    /// More bytes than any resource has.
    #[error("resource id is {bytes} bytes, at most {MAX_RESOURCE_ID_BYTES} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// A control, invisible or unusual space character.
    #[error("resource id holds the invisible or control character U+{code:04X}")]
    Invisible {
        /// The character.
        code: u32,
    },
    /// Unicode text in another form than NFC.
    #[error("resource id is not in Unicode form NFC, normalise it")]
    NotNfc,
    /// A character that compatibility forms turn into a separator.
    #[error("resource id holds U+{code:04X}, which some systems read as a separator")]
    LookAlike {
        /// The character.
        code: u32,
    },
    /// A path that does not begin at the root.
    #[error("path is not absolute, begin it with /")]
    NotAbsolute,
    /// Windows systems and browsers read it as a slash.
    #[error("a backslash is read as a separator by some systems, use /")]
    Backslash,
    /// Two separators in a row.
    #[error("path has an empty segment, write a single /")]
    EmptySegment,
    /// More `..` than there are parents.
    #[error("path leads above its root")]
    AboveRoot,
    /// A segment that is longer than a file name can be.
    #[error("a path segment is longer than {MAX_PATH_SEGMENT_BYTES} bytes")]
    SegmentTooLong,
    /// A `%` that is no escape of two hex digits.
    #[error("a % is not followed by two hex digits")]
    MalformedPercent,
    /// A separator, reserved character, `%` or control character in escaped form.
    #[error("%{byte:02X} is decoded by some systems and kept by others, write it plainly")]
    AmbiguousEscape {
        /// The escaped byte.
        byte: u8,
    },
    /// A `%` in a path that is not percent-encoded by nature.
    #[error("% is not allowed in this resource id")]
    Percent,
    /// Escapes that decode to no text.
    #[error("escapes decode to bytes that are not UTF-8")]
    EscapedNotUtf8,
    /// Another scheme than http or https.
    #[error("URL must begin with http:// or https://")]
    Scheme,
    /// A user or password before the host.
    #[error("URL carries user information before the host, remove it")]
    UserInfo,
    /// A part behind `#`.
    #[error("URL carries a fragment, remove it")]
    Fragment,
    /// A character that URLs must escape.
    #[error("character {found:?} must be percent-encoded here")]
    UrlCharacter {
        /// The character.
        found: char,
    },
    /// A host name that is no host name.
    #[error("host name is empty or malformed")]
    Host,
    /// A second name of the same host: a trailing dot, or an IPv4 address in IPv6 clothes.
    #[error("host is written in a form that aliases another one")]
    HostAlias,
    /// An IPv4 address in octal, hex, short or decimal form.
    #[error("IPv4 address must be four decimal numbers without leading zeros")]
    Ipv4Form,
    /// An IPv6 address that does not parse, or has a zone.
    #[error("IPv6 address is malformed or has a zone")]
    Ipv6Form,
    /// A port that is no port.
    #[error("port must be 1 to 65535 without leading zeros")]
    Port,
    /// A program name that is no plain name.
    #[error("program must be an absolute path, or a name of letters, digits and . _ + -")]
    Program,
    /// A segment with characters that this type does not have.
    #[error("name must be made of segments of letters, digits and . _ - ~ @ : +")]
    Name,
    /// A branch that git would refuse or that has a second name.
    #[error("branch must be the short name of one branch, as git accepts it")]
    Branch,
    /// A tool without a server, or the other way round.
    #[error("tool must be written server/name")]
    Tool,
    /// A repository without host or path.
    #[error("repository must be written host/path or host/path#branch")]
    Repo,
    /// A type that differs from a known one in case only.
    #[error("resource type must be written {known}")]
    TypeCase {
        /// The known type.
        known: &'static str,
    },
}

/// A resource in its one spelling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    pub(crate) id: String,
    pub(crate) attributes: Map<String, Value>,
}

/// Brings a resource to its one spelling.
pub(crate) fn normalise(resource_type: &str, id: &str) -> Result<Resource, ResourceError> {
    if id.is_empty() {
        return Err(ResourceError::Empty);
    }
    if id.len() > MAX_RESOURCE_ID_BYTES {
        return Err(ResourceError::TooLong { bytes: id.len() });
    }
    plain_text(id)?;
    match resource_type {
        "File" => file(id),
        "Url" => url(id),
        "Command" => command(id),
        "Secret" => secret(id),
        "Repo" => repo(id),
        "Tool" => tool(id),
        other => match KNOWN_TYPES
            .iter()
            .find(|known| known.eq_ignore_ascii_case(other))
        {
            Some(known) => Err(ResourceError::TypeCase { known }),
            None => Ok(Resource {
                id: id.to_owned(),
                attributes: Map::new(),
            }),
        },
    }
}

/// Refuses what cannot be seen or has two encodings.
pub(crate) fn plain_text(text: &str) -> Result<(), ResourceError> {
    if let Some(c) = text.chars().find(|c| is_invisible(*c)) {
        return Err(ResourceError::Invisible { code: c.into() });
    }
    if !is_nfc(text) {
        return Err(ResourceError::NotNfc);
    }
    Ok(())
}

fn is_invisible(c: char) -> bool {
    c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Characters outside ASCII whose compatibility form contains a separator: the fraction of systems
/// that applies it would see another path.
fn look_alike(text: &str) -> Result<(), ResourceError> {
    let separator = |c: char| matches!(c, '/' | '\\' | '.' | '%' | ':' | '#' | '?' | '@');
    match text
        .chars()
        .find(|c| !c.is_ascii() && c.nfkc().any(separator))
    {
        Some(c) => Err(ResourceError::LookAlike { code: c.into() }),
        None => Ok(()),
    }
}

fn attributes<const N: usize>(pairs: [(&str, Value); N]) -> Map<String, Value> {
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn file(id: &str) -> Result<Resource, ResourceError> {
    let path = absolute_path(id)?;
    let (dir, name) = split_path(&path);
    let ext = match name.rsplit_once('.') {
        Some((stem, ext)) if !stem.is_empty() => ext.to_lowercase(),
        _ => String::new(),
    };
    let attributes = attributes([
        ("path", path.clone().into()),
        ("name", name.into()),
        ("dir", dir.into()),
        ("ext", ext.into()),
    ]);
    Ok(Resource {
        id: path,
        attributes,
    })
}

/// Directory and last segment of a normalised path.
fn split_path(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((dir, name)) => (dir, name),
        None => ("", path),
    }
}

/// Decodes escapes once, resolves dot segments, drops a trailing slash.
fn absolute_path(id: &str) -> Result<String, ResourceError> {
    if !id.starts_with('/') {
        return Err(ResourceError::NotAbsolute);
    }
    let path = decode_once(id)?;
    plain_text(&path)?;
    look_alike(&path)?;
    if path.contains('\\') {
        return Err(ResourceError::Backslash);
    }
    let mut segments = Vec::new();
    let mut rest = path.split('/').skip(1).peekable();
    while let Some(segment) = rest.next() {
        match segment {
            "" if rest.peek().is_none() => {}
            "" => return Err(ResourceError::EmptySegment),
            "." => {}
            ".." => {
                segments.pop().ok_or(ResourceError::AboveRoot)?;
            }
            _ if segment.len() > MAX_PATH_SEGMENT_BYTES => {
                return Err(ResourceError::SegmentTooLong);
            }
            _ => segments.push(segment),
        }
    }
    Ok(format!("/{}", segments.join("/")))
}

/// Decodes percent escapes once. A path that still shows a `%` afterwards is refused: whether
/// somebody decodes it again is not known.
fn decode_once(id: &str) -> Result<Cow<'_, str>, ResourceError> {
    if !id.contains('%') {
        return Ok(Cow::Borrowed(id));
    }
    let mut decoded = Vec::with_capacity(id.len());
    let mut bytes = id.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let escaped = escape(&mut bytes)?;
            if escaped < 0x20 || matches!(escaped, b'/' | b'\\' | b'%' | 0x7f) {
                return Err(ResourceError::AmbiguousEscape { byte: escaped });
            }
            decoded.push(escaped);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded)
        .map(Cow::Owned)
        .map_err(|_| ResourceError::EscapedNotUtf8)
}

/// The byte that the two hex digits after a `%` stand for.
fn escape(bytes: &mut impl Iterator<Item = u8>) -> Result<u8, ResourceError> {
    let mut digit = || {
        let byte = bytes.next().ok_or(ResourceError::MalformedPercent)?;
        match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            b'A'..=b'F' => Ok(byte - b'A' + 10),
            _ => Err(ResourceError::MalformedPercent),
        }
    };
    let high = digit()?;
    Ok(high * 16 + digit()?)
}

fn url(id: &str) -> Result<Resource, ResourceError> {
    let (scheme, rest) = id.split_once("://").ok_or(ResourceError::Scheme)?;
    let (scheme, default_port) = if scheme.eq_ignore_ascii_case("https") {
        ("https", 443)
    } else if scheme.eq_ignore_ascii_case("http") {
        ("http", 80)
    } else {
        return Err(ResourceError::Scheme);
    };
    if rest.contains('\\') {
        return Err(ResourceError::Backslash);
    }
    if rest.contains('#') {
        return Err(ResourceError::Fragment);
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at_checked(end).ok_or(ResourceError::Host)?;
    if authority.contains('@') {
        return Err(ResourceError::UserInfo);
    }
    let (host, port) = split_port(authority)?;
    let host = normalise_host(host)?;
    let port = port.unwrap_or(default_port);
    let (path, query) = match tail.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (tail, None),
    };
    let path = url_path(path)?;
    let query = query.map(|query| url_escapes(query, true)).transpose()?;

    let mut url = format!("{scheme}://{host}");
    if port != default_port {
        url.push_str(&format!(":{port}"));
    }
    url.push_str(&path);
    if let Some(query) = &query {
        url.push('?');
        url.push_str(query);
    }
    if url.len() > MAX_RESOURCE_ID_BYTES {
        return Err(ResourceError::TooLong { bytes: url.len() });
    }
    let attributes = attributes([
        ("url", url.clone().into()),
        ("scheme", scheme.into()),
        ("host", host.into()),
        ("port", port.into()),
        ("path", path.into()),
        ("query", query.unwrap_or_default().into()),
    ]);
    Ok(Resource {
        id: url,
        attributes,
    })
}

/// Host text (brackets kept) and port of an authority.
fn split_port(authority: &str) -> Result<(&str, Option<u16>), ResourceError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (_, after) = rest.split_once(']').ok_or(ResourceError::Ipv6Form)?;
            let host = authority
                .strip_suffix(after)
                .ok_or(ResourceError::Ipv6Form)?;
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return Err(ResourceError::Ipv6Form),
            }
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let Some(port) = port else {
        return Ok((host, None));
    };
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if !digits || port.starts_with('0') {
        return Err(ResourceError::Port);
    }
    port.parse()
        .map(|port| (host, Some(port)))
        .map_err(|_| ResourceError::Port)
}

fn normalise_host(host: &str) -> Result<String, ResourceError> {
    if let Some(inner) = host.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or(ResourceError::Ipv6Form)?;
        let address: Ipv6Addr = inner.parse().map_err(|_| ResourceError::Ipv6Form)?;
        // ::ffff:1.2.3.4, ::1.2.3.4 and the NAT64 prefix all name an IPv4 host by another name.
        let embeds_ipv4 = match address.segments() {
            [0, 0, 0, 0, 0, 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => true,
            [0, 0, 0, 0, 0, 0, high, low] => high != 0 || low > 1,
            [0x64, 0xff9b, ..] => true,
            _ => false,
        };
        if embeds_ipv4 {
            return Err(ResourceError::HostAlias);
        }
        return Ok(format!("[{address}]"));
    }
    if host.is_empty() || host.len() > MAX_HOST_BYTES || !host.is_ascii() {
        return Err(ResourceError::Host);
    }
    if host.ends_with('.') {
        return Err(ResourceError::HostAlias);
    }
    let host = host.to_ascii_lowercase();
    for label in host.split('.') {
        let good = !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !good {
            return Err(ResourceError::Host);
        }
    }
    // A host whose last label is a number is an IPv4 address to every resolver, in whatever form.
    let last = host.rsplit('.').next().unwrap_or_default();
    let numeric = last.bytes().all(|b| b.is_ascii_digit())
        || last
            .strip_prefix("0x")
            .is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    if numeric && host.parse::<Ipv4Addr>().is_err() {
        return Err(ResourceError::Ipv4Form);
    }
    Ok(host)
}

/// Escapes in their one form, dot segments resolved.
fn url_path(path: &str) -> Result<String, ResourceError> {
    let path = url_escapes(path, false)?;
    let mut segments = Vec::new();
    let mut trailing_slash = true;
    let mut rest = path.split('/').skip(1).peekable();
    while let Some(segment) = rest.next() {
        let last = rest.peek().is_none();
        match segment {
            "" if last => trailing_slash = true,
            "" => return Err(ResourceError::EmptySegment),
            "." => trailing_slash = true,
            ".." => {
                segments.pop().ok_or(ResourceError::AboveRoot)?;
                trailing_slash = true;
            }
            // `..;x` is a parent to some servers and a name to others.
            _ if segment.starts_with(".;") || segment.starts_with("..;") => {
                return Err(ResourceError::UrlCharacter { found: ';' });
            }
            _ => {
                segments.push(segment);
                trailing_slash = false;
            }
        }
    }
    let mut path = format!("/{}", segments.join("/"));
    if trailing_slash && !segments.is_empty() {
        path.push('/');
    }
    Ok(path)
}

/// Characters of a path that mean something to some servers, escaped or not: `%40` and `@` are one path
/// to them and two to others (RFC 3986, 2.2).
const RESERVED_IN_PATH: &[u8] = b"!$&'()*+,;=:@";

/// Decodes escapes of characters that need none, writes the others in upper case. In a path, an
/// escaped separator, reserved character, `%` or control character is refused.
fn url_escapes(text: &str, query: bool) -> Result<String, ResourceError> {
    let mut out = String::with_capacity(text.len());
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            let c = char::from(byte);
            let allowed = matches!(c,
                'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.' | '_' | '~' | '!' | '$' | '&' | '\''
                | '(' | ')' | '*' | '+' | ',' | ';' | '=' | ':' | '@' | '/');
            if !(allowed || (query && c == '?')) {
                let found = text
                    .chars()
                    .find(|c| !c.is_ascii())
                    .filter(|_| !byte.is_ascii());
                return Err(ResourceError::UrlCharacter {
                    found: found.unwrap_or(c),
                });
            }
            out.push(c);
            decoded.push(byte);
            continue;
        }
        let escaped = escape(&mut bytes)?;
        let separator = matches!(escaped, b'/' | b'\\' | b'%' | 0x7f) || escaped < 0x20;
        let two_paths = separator || RESERVED_IN_PATH.contains(&escaped);
        if (two_paths && !query) || escaped == 0 {
            return Err(ResourceError::AmbiguousEscape { byte: escaped });
        }
        let unreserved =
            escaped.is_ascii_alphanumeric() || matches!(escaped, b'-' | b'.' | b'_' | b'~');
        if unreserved {
            out.push(char::from(escaped));
        } else {
            out.push_str(&format!("%{escaped:02X}"));
        }
        decoded.push(escaped);
    }
    if !query {
        // What a server will see after decoding must be one text, too.
        let decoded = String::from_utf8(decoded).map_err(|_| ResourceError::EscapedNotUtf8)?;
        plain_text(&decoded)?;
        look_alike(&decoded)?;
    }
    Ok(out)
}

fn command(id: &str) -> Result<Resource, ResourceError> {
    let (program, name) = if id.contains('/') {
        let path = absolute_path(id)?;
        let name = split_path(&path).1.to_owned();
        (path, name)
    } else {
        (id.to_owned(), id.to_owned())
    };
    let good = !name.is_empty()
        && name.len() <= MAX_PATH_SEGMENT_BYTES
        && !name.starts_with('-')
        && !matches!(name.as_str(), "." | "..")
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".[_+-".contains(&b));
    if !good {
        return Err(ResourceError::Program);
    }
    let attributes = attributes([("program", program.clone().into()), ("name", name.into())]);
    Ok(Resource {
        id: program,
        attributes,
    })
}

/// Checks a name made of segments between slashes.
fn segmented_name(name: &str) -> Result<(), ResourceError> {
    for segment in name.split('/') {
        if segment.is_empty() {
            return Err(ResourceError::EmptySegment);
        }
        if segment.len() > MAX_PATH_SEGMENT_BYTES {
            return Err(ResourceError::SegmentTooLong);
        }
        let good = !matches!(segment, "." | "..")
            && segment
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-~@:+".contains(&b));
        if !good {
            return Err(ResourceError::Name);
        }
    }
    Ok(())
}

fn secret(id: &str) -> Result<Resource, ResourceError> {
    segmented_name(id)?;
    Ok(Resource {
        id: id.to_owned(),
        attributes: attributes([("name", id.into())]),
    })
}

fn repo(id: &str) -> Result<Resource, ResourceError> {
    let (location, branch) = match id.split_once('#') {
        Some((location, branch)) => (location, Some(branch)),
        None => (id, None),
    };
    let (host, path) = location.split_once('/').ok_or(ResourceError::Repo)?;
    let (host, port) = split_port(host)?;
    let mut host = normalise_host(host)?;
    if let Some(port) = port {
        host.push_str(&format!(":{port}"));
    }
    // `x` and `x.git` name one repository on every common host.
    let path = path.strip_suffix(".git").unwrap_or(path);
    if path.is_empty() || path.ends_with('/') || path.ends_with(".git") {
        return Err(ResourceError::Repo);
    }
    segmented_name(path)?;
    if let Some(branch) = branch {
        check_branch(branch)?;
    }
    let mut id = format!("{host}/{path}");
    if let Some(branch) = branch {
        id.push('#');
        id.push_str(branch);
    }
    let attributes = attributes([
        ("host", host.into()),
        ("path", path.into()),
        ("branch", branch.unwrap_or_default().into()),
    ]);
    Ok(Resource { id, attributes })
}

/// The rules of `git check-ref-format --branch`, without the forms that name a branch twice.
fn check_branch(branch: &str) -> Result<(), ResourceError> {
    look_alike(branch)?;
    let forbidden = |c: char| {
        matches!(
            c,
            ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\' | '#' | '%'
        )
    };
    let good = !branch.is_empty()
        && branch.len() <= MAX_PATH_SEGMENT_BYTES
        && !branch.starts_with(['-', '+'])
        && !branch.contains(forbidden)
        && !branch.contains("..")
        && !branch.contains("@{")
        && !branch.ends_with('.')
        && !matches!(branch, "@" | "HEAD")
        && !["refs/", "heads/", "remotes/", "tags/"]
            .iter()
            .any(|p| branch.starts_with(p))
        && branch
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock"));
    if good {
        Ok(())
    } else {
        Err(ResourceError::Branch)
    }
}

fn tool(id: &str) -> Result<Resource, ResourceError> {
    let (server, name) = id.split_once('/').ok_or(ResourceError::Tool)?;
    if name.contains('/') {
        return Err(ResourceError::Tool);
    }
    segmented_name(server)?;
    segmented_name(name)?;
    let attributes = attributes([("server", server.into()), ("name", name.into())]);
    Ok(Resource {
        id: id.to_owned(),
        attributes,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn id(resource_type: &str, id: &str) -> String {
        normalise(resource_type, id)
            .unwrap_or_else(|e| panic!("{id:?}: {e}"))
            .id
    }

    fn refused(resource_type: &str, id: &str) -> ResourceError {
        match normalise(resource_type, id) {
            Ok(resource) => panic!("{id:?} was accepted as {:?}", resource.id),
            Err(error) => error,
        }
    }

    #[test]
    fn files() {
        for (given, expected) in [
            ("/", "/"),
            ("/srv/x", "/srv/x"),
            ("/srv/x/", "/srv/x"),
            ("/srv/./x/.", "/srv/x"),
            ("/srv/a/../x", "/srv/x"),
            ("/srv/%61/x%20y", "/srv/a/x y"),
            ("/srv/%2e%2E/etc/passwd", "/etc/passwd"),
            ("/srv/caf\u{e9}", "/srv/caf\u{e9}"),
            ("/srv/caf%C3%A9", "/srv/caf\u{e9}"),
            ("/srv/..x/...", "/srv/..x/..."),
        ] {
            assert_eq!(id("File", given), expected, "{given}");
        }
        for (given, expected) in [
            ("", ResourceError::Empty),
            ("srv/x", ResourceError::NotAbsolute),
            ("./x", ResourceError::NotAbsolute),
            ("~/x", ResourceError::NotAbsolute),
            ("C:\\x", ResourceError::NotAbsolute),
            ("/srv\\x", ResourceError::Backslash),
            ("//srv/x", ResourceError::EmptySegment),
            ("/srv//x", ResourceError::EmptySegment),
            ("/srv/x//", ResourceError::EmptySegment),
            ("/..", ResourceError::AboveRoot),
            ("/srv/../../etc", ResourceError::AboveRoot),
            ("/srv/%2fetc", ResourceError::AmbiguousEscape { byte: b'/' }),
            (
                "/srv/%5cetc",
                ResourceError::AmbiguousEscape { byte: b'\\' },
            ),
            (
                "/srv/%252e%252e/x",
                ResourceError::AmbiguousEscape { byte: b'%' },
            ),
            ("/srv/x%00.txt", ResourceError::AmbiguousEscape { byte: 0 }),
            ("/srv/100%", ResourceError::MalformedPercent),
            ("/srv/%zz", ResourceError::MalformedPercent),
            ("/srv/%c0%af", ResourceError::EscapedNotUtf8),
            ("/srv/%e2%80%ae", ResourceError::Invisible { code: 0x202e }),
            ("/srv/e\u{301}", ResourceError::NotNfc),
            ("/srv/e%CC%81", ResourceError::NotNfc),
            ("/srv/x\0", ResourceError::Invisible { code: 0 }),
            ("/srv/x\n", ResourceError::Invisible { code: 10 }),
            (
                "/srv/\u{202e}txt",
                ResourceError::Invisible { code: 0x202e },
            ),
            ("/srv/a\u{a0}b", ResourceError::Invisible { code: 0xa0 }),
            ("/srv\u{ff0f}etc", ResourceError::LookAlike { code: 0xff0f }),
            (
                "/srv/\u{2025}/etc",
                ResourceError::LookAlike { code: 0x2025 },
            ),
        ] {
            assert_eq!(refused("File", given), expected, "{given:?}");
        }
        let long = format!("/{}", "x".repeat(MAX_PATH_SEGMENT_BYTES + 1));
        assert_eq!(refused("File", &long), ResourceError::SegmentTooLong);
        let long = format!("/{}", "x/".repeat(MAX_RESOURCE_ID_BYTES / 2));
        assert!(matches!(
            refused("File", &long),
            ResourceError::TooLong { .. }
        ));
    }

    #[test]
    fn file_attributes() {
        for (given, expected) in [
            (
                "/srv/a/b.Tar.GZ",
                json!({"path": "/srv/a/b.Tar.GZ", "name": "b.Tar.GZ", "dir": "/srv/a", "ext": "gz"}),
            ),
            (
                "/x",
                json!({"path": "/x", "name": "x", "dir": "/", "ext": ""}),
            ),
            ("/", json!({"path": "/", "name": "", "dir": "/", "ext": ""})),
            (
                "/a/.env",
                json!({"path": "/a/.env", "name": ".env", "dir": "/a", "ext": ""}),
            ),
        ] {
            assert_eq!(
                Value::Object(normalise("File", given).unwrap().attributes),
                expected
            );
        }
    }

    #[test]
    fn urls() {
        for (given, expected) in [
            ("https://Example.COM", "https://example.com/"),
            ("HTTPS://example.com:443/", "https://example.com/"),
            ("http://example.com:80/a", "http://example.com/a"),
            ("http://example.com:8080/a", "http://example.com:8080/a"),
            ("https://example.com/a/../b/./c", "https://example.com/b/c"),
            ("https://example.com/a/b/..", "https://example.com/a/"),
            ("https://example.com/a/", "https://example.com/a/"),
            (
                "https://example.com/%7euser/%41",
                "https://example.com/~user/A",
            ),
            (
                "https://example.com/a%20b%c3%a9",
                "https://example.com/a%20b%C3%A9",
            ),
            ("https://example.com/%2e%2e", "refused"),
            (
                "https://example.com?q=%2fx%41",
                "https://example.com/?q=%2FxA",
            ),
            (
                "https://example.com/a?x=?&y=%25",
                "https://example.com/a?x=?&y=%25",
            ),
            (
                "https://[2001:DB8:0:0:0:0:0:1]:8443/",
                "https://[2001:db8::1]:8443/",
            ),
            ("http://[::1]/", "http://[::1]/"),
            ("http://127.0.0.1:5000/x", "http://127.0.0.1:5000/x"),
            ("https://my_svc.internal/", "https://my_svc.internal/"),
            (
                "https://xn--bcher-kva.example/",
                "https://xn--bcher-kva.example/",
            ),
        ] {
            match normalise("Url", given) {
                Ok(resource) => assert_eq!(resource.id, expected, "{given}"),
                Err(error) => assert_eq!(expected, "refused", "{given}: {error}"),
            }
        }
        // Two spellings that servers take for one path or for two: the plain one is judged, at every door.
        for reserved in RESERVED_IN_PATH {
            let plain = format!("https://example.com/a{}b", char::from(*reserved));
            assert_eq!(id("Url", &plain), plain, "the control");
            let escaped = format!("https://example.com/a%{reserved:02x}b");
            let refusal = ResourceError::AmbiguousEscape { byte: *reserved };
            assert_eq!(refused("Url", &escaped), refusal, "{escaped}");
            let query = format!("https://example.com/?a=%{reserved:02X}");
            assert_eq!(
                id("Url", &query),
                query,
                "values are escaped as their writer likes"
            );
        }
        for (given, expected) in [
            ("ftp://example.com/", ResourceError::Scheme),
            ("https://user%40example.com/", ResourceError::Host),
            ("file:///etc/passwd", ResourceError::Scheme),
            ("https:/example.com", ResourceError::Scheme),
            ("//example.com/", ResourceError::Scheme),
            ("javascript:alert(1)", ResourceError::Scheme),
            ("https:///x", ResourceError::Host),
            ("https://user:pw@example.com/", ResourceError::UserInfo),
            (
                "https://good.example@evil.example/",
                ResourceError::UserInfo,
            ),
            (
                "https://evil.example#@good.example/",
                ResourceError::Fragment,
            ),
            (
                "https://evil.example\\@good.example/",
                ResourceError::Backslash,
            ),
            ("https://example.com./", ResourceError::HostAlias),
            ("https://b\u{fc}cher.example/", ResourceError::Host),
            ("https://exa%6dple.com/", ResourceError::Host),
            ("https://exa mple.com/", ResourceError::Host),
            ("https://-x.example/", ResourceError::Host),
            ("https://a..b/", ResourceError::Host),
            ("http://127.1/", ResourceError::Ipv4Form),
            ("http://2130706433/", ResourceError::Ipv4Form),
            ("http://0x7f000001/", ResourceError::Ipv4Form),
            ("http://0x7f.0.0.1/", ResourceError::Ipv4Form),
            ("http://0177.0.0.1/", ResourceError::Ipv4Form),
            ("http://127.0.0.01/", ResourceError::Ipv4Form),
            ("http://127.0.0.0x1/", ResourceError::Ipv4Form),
            ("http://1.2.3.4.5/", ResourceError::Ipv4Form),
            ("http://[fe80::1%25eth0]/", ResourceError::Ipv6Form),
            ("http://[::ffff:127.0.0.1]/", ResourceError::HostAlias),
            ("http://[::ffff:7f00:1]/", ResourceError::HostAlias),
            ("http://[::127.0.0.1]/", ResourceError::HostAlias),
            ("http://[64:ff9b::7f00:1]/", ResourceError::HostAlias),
            ("http://[::1/", ResourceError::Ipv6Form),
            ("http://[::1]x/", ResourceError::Ipv6Form),
            ("http://::1/", ResourceError::Port),
            ("https://example.com:/", ResourceError::Port),
            ("https://example.com:0443/", ResourceError::Port),
            ("https://example.com:0/", ResourceError::Port),
            ("https://example.com:65536/", ResourceError::Port),
            ("https://example.com:+80/", ResourceError::Port),
            ("https://example.com/../x", ResourceError::AboveRoot),
            ("https://example.com/%2e%2e/x", ResourceError::AboveRoot),
            ("https://example.com/a//b", ResourceError::EmptySegment),
            ("https://example.com//", ResourceError::EmptySegment),
            (
                "https://example.com/a%2Fb",
                ResourceError::AmbiguousEscape { byte: b'/' },
            ),
            (
                "https://example.com/%252e",
                ResourceError::AmbiguousEscape { byte: b'%' },
            ),
            (
                "https://example.com/%0d%0a",
                ResourceError::AmbiguousEscape { byte: 13 },
            ),
            (
                "https://example.com/?a=%00",
                ResourceError::AmbiguousEscape { byte: 0 },
            ),
            ("https://example.com/%", ResourceError::MalformedPercent),
            ("https://example.com/%c0%af", ResourceError::EscapedNotUtf8),
            (
                "https://example.com/a b",
                ResourceError::UrlCharacter { found: ' ' },
            ),
            (
                "https://example.com/\u{e9}",
                ResourceError::UrlCharacter { found: '\u{e9}' },
            ),
            (
                "https://example.com/..;/admin",
                ResourceError::UrlCharacter { found: ';' },
            ),
            (
                "https://example.com/%EF%BC%8F",
                ResourceError::LookAlike { code: 0xff0f },
            ),
        ] {
            assert_eq!(refused("Url", given), expected, "{given:?}");
        }
    }

    #[test]
    fn url_attributes() {
        assert_eq!(
            Value::Object(
                normalise("Url", "https://API.example:8443/v1/x?y=1")
                    .unwrap()
                    .attributes
            ),
            json!({
                "url": "https://api.example:8443/v1/x?y=1", "scheme": "https", "host": "api.example",
                "port": 8443, "path": "/v1/x", "query": "y=1",
            })
        );
        assert_eq!(
            Value::Object(normalise("Url", "http://[::1]").unwrap().attributes),
            json!({
                "url": "http://[::1]/", "scheme": "http", "host": "[::1]", "port": 80, "path": "/",
                "query": "",
            })
        );
    }

    #[test]
    fn commands() {
        for (given, program, name) in [
            ("git", "git", "git"),
            ("/usr/bin/../bin/git", "/usr/bin/git", "git"),
            ("python3.11", "python3.11", "python3.11"),
            ("g++", "g++", "g++"),
            ("[", "[", "["),
        ] {
            let resource = normalise("Command", given).unwrap();
            assert_eq!(resource.id, program);
            assert_eq!(
                Value::Object(resource.attributes),
                json!({"program": program, "name": name})
            );
        }
        for given in [
            "rm -rf",
            "a;b",
            "$(x)",
            "..",
            ".",
            "-x",
            "a\u{e9}",
            "x|y",
            "/usr/bin/a b",
            "/",
        ] {
            assert_eq!(refused("Command", given), ResourceError::Program, "{given}");
        }
        assert_eq!(refused("Command", "./x"), ResourceError::NotAbsolute);
        assert_eq!(refused("Command", "bin/x"), ResourceError::NotAbsolute);
    }

    #[test]
    fn secrets_repos_and_tools() {
        assert_eq!(id("Secret", "platform/db-main"), "platform/db-main");
        for given in ["a//b", "/a", "a/"] {
            assert_eq!(
                refused("Secret", given),
                ResourceError::EmptySegment,
                "{given}"
            );
        }
        for given in ["../a", "a/./b", "a b", "a%2fb", "a\\b", "\u{430}"] {
            assert_eq!(refused("Secret", given), ResourceError::Name, "{given}");
        }

        let resource = normalise("Repo", "Git.Example/team/app.git#feature/x").unwrap();
        assert_eq!(resource.id, "git.example/team/app#feature/x");
        assert_eq!(
            Value::Object(resource.attributes),
            json!({"host": "git.example", "path": "team/app", "branch": "feature/x"})
        );
        assert_eq!(id("Repo", "git.example/app"), "git.example/app");
        assert_eq!(id("Repo", "git.example:2222/app"), "git.example:2222/app");
        for given in [
            "git.example",
            "git.example/",
            "git.example/.git",
            "git.example/a.git.git",
        ] {
            assert_eq!(refused("Repo", given), ResourceError::Repo, "{given}");
        }
        for branch in [
            "",
            "HEAD",
            "@",
            "refs/heads/main",
            "heads/main",
            "a..b",
            "a b",
            "a~1",
            "a^",
            "-f",
            "+main",
            "a.lock",
            ".a",
            "a/",
            "/a",
            "a//b",
            "a@{1}",
            "a.",
            "a:b",
            "a#b",
            "a*",
        ] {
            let given = format!("git.example/app#{branch}");
            assert_eq!(refused("Repo", &given), ResourceError::Branch, "{given}");
        }
        assert_eq!(
            id("Repo", "git.example/app#fix/caf\u{e9}"),
            "git.example/app#fix/caf\u{e9}"
        );

        let resource = normalise("Tool", "files/read_file").unwrap();
        assert_eq!(
            Value::Object(resource.attributes),
            json!({"server": "files", "name": "read_file"})
        );
        for given in ["files", "a/b/c"] {
            assert_eq!(refused("Tool", given), ResourceError::Tool, "{given}");
        }
        assert_eq!(refused("Tool", "a/"), ResourceError::EmptySegment);
        assert_eq!(refused("Tool", "a b/c"), ResourceError::Name);
    }

    #[test]
    fn other_types_are_plain_text() {
        assert_eq!(id("Ticket", "A 17/b%"), "A 17/b%");
        assert_eq!(
            refused("Ticket", "a\u{200b}"),
            ResourceError::Invisible { code: 0x200b }
        );
        assert_eq!(
            refused("file", "x"),
            ResourceError::TypeCase { known: "File" }
        );
        assert_eq!(
            refused("URL", "x"),
            ResourceError::TypeCase { known: "Url" }
        );
    }

    /// Text made of what attacks on paths are made of, with ordinary letters between.
    fn hostile() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("/".to_owned()),
            Just("..".to_owned()),
            Just(".".to_owned()),
            Just("%2e".to_owned()),
            Just("%2f".to_owned()),
            Just("%25".to_owned()),
            Just("\\".to_owned()),
            Just("%C3%A9".to_owned()),
            Just("?".to_owned()),
            Just("#".to_owned()),
            Just("@".to_owned()),
            Just(":".to_owned()),
            Just(";".to_owned()),
            Just("http://".to_owned()),
            Just("https://a.example/".to_owned()),
            Just("127.0.0.1".to_owned()),
            Just("[::1]".to_owned()),
            Just("git.example/".to_owned()),
            Just(".git".to_owned()),
            "[a-zA-Z0-9]{1,4}",
            "\\PC{1,2}",
        ];
        proptest::collection::vec(part, 0..10).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn inv_15_normalising_twice_changes_nothing(
            kind in proptest::sample::select(&KNOWN_TYPES[..]),
            text in hostile(),
            absolute in any::<bool>(),
        ) {
            let text = if absolute { format!("/{text}") } else { text };
            if let Ok(once) = normalise(kind, &text) {
                prop_assert_eq!(&normalise(kind, &once.id).unwrap(), &once);
            }
        }

        #[test]
        fn inv_15_no_ambiguous_path_is_accepted(text in hostile()) {
            if let Ok(file) = normalise("File", &format!("/{text}")) {
                prop_assert!(file.id.starts_with('/'));
                prop_assert!(!file.id.contains(['\\', '%', '\0']));
                prop_assert!(!file.id.contains("//"));
                prop_assert!(file.id.split('/').all(|part| part != "." && part != ".."));
                prop_assert!(is_nfc(&file.id));
            }
            if let Ok(url) = normalise("Url", &format!("https://{text}")) {
                prop_assert!(!url.id.contains(['\\', '#', ' ', '@']) || url.attributes["path"].as_str().unwrap().contains('@') || url.attributes["query"].as_str().unwrap().contains('@'));
                let host = url.attributes["host"].as_str().unwrap();
                prop_assert_eq!(host.to_lowercase(), host);
                prop_assert!(!host.contains(['@', '%', '/']) && !host.ends_with('.'));
                let path = url.attributes["path"].as_str().unwrap();
                prop_assert!(path.starts_with('/') && !path.contains("//"));
                prop_assert!(path.split('/').all(|part| part != "." && part != ".."));
                let upper = path.to_uppercase();
                prop_assert!(!["%2F", "%5C", "%25", "%2E", "%00"].iter().any(|e| upper.contains(e)));
            }
        }

        #[test]
        fn ordinary_paths_are_kept(parts in proptest::collection::vec("[a-z][a-z0-9_-]{0,8}", 1..6)) {
            let path = format!("/{}", parts.join("/"));
            prop_assert_eq!(normalise("File", &path).unwrap().id, path.clone());
            let url = format!("https://a.example{path}");
            prop_assert_eq!(normalise("Url", &url).unwrap().id, url.clone());
        }
    }
}
