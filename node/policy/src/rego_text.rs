//! Texts in Rego that are edited: where lines came from, names that are made, keywords that are names.

use regorus::Value;

/// What every made name begins with.
pub(crate) const RESERVED: &str = "tidelock__";
/// A name that the parser would take for a keyword.
const KEYWORD: &str = "tidelock__keyword_";
/// A key in a head that is no name, in hexadecimal.
const KEY: &str = "tidelock__key_";

/// Keywords that the engine does not take where a reference begins.
const KEYWORDS: [&str; 10] = [
    "as", "default", "else", "false", "if", "in", "not", "null", "true", "with",
];

/// One text, and where the lines behind its own came from.
#[derive(Clone)]
pub(crate) struct Text {
    pub(crate) path: String,
    pub(crate) text: String,
    lines: usize,
    tail: Vec<usize>,
}

impl Text {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            lines: text.matches('\n').count() + 1,
            tail: Vec::new(),
        }
    }

    /// The author's line for one of this text.
    pub(crate) fn line(&self, line: usize) -> usize {
        let behind = line.checked_sub(self.lines + 1);
        let line = behind.map_or(line, |at| self.tail.get(at).copied().unwrap_or(self.lines));
        line.min(self.lines)
    }

    pub(crate) fn append(&mut self, rule: &str, line: usize) {
        self.text.push('\n');
        self.text.push_str(rule);
        self.tail
            .extend((0..=rule.matches('\n').count()).map(|more| line + more));
    }
}

/// Replaces a stretch of a text; lines that it had are kept.
pub(crate) struct Edit {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) with: String,
}

pub(crate) fn apply(text: &mut String, mut edits: Vec<Edit>) {
    edits.sort_by_key(|edit| std::cmp::Reverse(edit.from));
    for edit in edits {
        let Some(old) = text.get(edit.from..edit.to) else {
            continue;
        };
        let missing = old
            .matches('\n')
            .count()
            .saturating_sub(edit.with.matches('\n').count());
        let new = format!("{}{}", edit.with, "\n".repeat(missing));
        text.replace_range(edit.from..edit.to, &new);
    }
}

/// Whether a text can stand behind a dot.
pub(crate) fn is_name(text: &str) -> bool {
    let mut characters = text.chars();
    characters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|next| next.is_ascii_alphanumeric() || next == '_')
}

/// The name of a key that is none.
pub(crate) fn key_name(key: &str) -> String {
    use std::fmt::Write as _;
    let mut name = KEY.to_owned();
    for byte in key.bytes() {
        // Writing to a text does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

/// The name of a keyword; nothing if a text is none.
pub(crate) fn keyword_name(text: &str) -> Option<String> {
    KEYWORDS.contains(&text).then(|| format!("{KEYWORD}{text}"))
}

/// The author's word for a made name.
pub(crate) fn unmade(name: &str) -> Option<String> {
    if let Some(keyword) = name.strip_prefix(KEYWORD) {
        return Some(keyword.to_owned());
    }
    let digits = name.strip_prefix(KEY)?;
    let bytes: Option<Vec<u8>> = (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
        .collect();
    String::from_utf8(bytes?).ok()
}

/// A name as a text in Rego.
pub(crate) fn quoted(name: &str) -> String {
    let name = unmade(name).unwrap_or_else(|| name.to_owned());
    Value::from(name).to_json_str().unwrap_or_default()
}

/// A text of the engine, with the keywords that it could not read.
pub(crate) fn author_words(text: &str) -> String {
    text.replace(KEYWORD, "")
}

/// A stretch of a text that is no comment and no quotation, or one of these.
enum Piece<'t> {
    Code(&'t str),
    Quoted(&'t str),
    Other(&'t str),
}

/// Cuts a text at its quotations and comments.
fn pieces(text: &str) -> Vec<Piece<'_>> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut from = 0;
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let close = match byte {
            b'"' => b'"',
            b'`' => b'`',
            b'#' => b'\n',
            _ => {
                at += 1;
                continue;
            }
        };
        found.extend(text.get(from..at).map(Piece::Code));
        let start = at;
        at += 1;
        while let Some(inner) = bytes.get(at) {
            at += 1;
            if *inner == b'\\' && close == b'"' {
                at += 1;
            } else if *inner == close {
                break;
            }
        }
        at = at.min(bytes.len());
        found.extend(text.get(start..at).map(match byte {
            b'"' => Piece::Quoted,
            _ => Piece::Other,
        }));
        from = at;
    }
    found.extend(text.get(from..).map(Piece::Code));
    found
}

/// The words of a piece of code: where each is, what stands before it and behind it.
fn words(code: &str) -> Vec<(usize, &str, Option<char>, Option<char>)> {
    let part = |next: char| next.is_ascii_alphanumeric() || next == '_';
    let mut found = Vec::new();
    let mut from = None;
    for (at, next) in code.char_indices().chain([(code.len(), ' ')]) {
        match (from, part(next)) {
            (None, true) => from = Some(at),
            (Some(start), false) => {
                let before = code.get(..start).and_then(|text| text.chars().next_back());
                let behind = code.get(at..).and_then(|text| text.chars().next());
                found.extend(
                    code.get(start..at)
                        .map(|word| (start, word, before, behind)),
                );
                from = None;
            }
            _ => {}
        }
    }
    found
}

/// Whether a reference begins with a keyword, as `if` in `if.x`.
pub(crate) fn begins_with_keyword(text: &str) -> bool {
    pieces(text).iter().any(|piece| match piece {
        Piece::Code(code) => words(code).iter().any(|(at, word, before, behind)| {
            KEYWORDS.contains(word)
                && *before != Some('.')
                && *behind == Some('.')
                && code
                    .get(at + word.len() + 1..)
                    .and_then(|text| text.chars().next())
                    .is_some_and(|next| next.is_ascii_alphabetic() || next == '_')
        }),
        _ => false,
    })
}

/// Gives keywords that are names in references, with a dot before or behind or as a text in brackets, made
/// names.
pub(crate) fn keywords(text: &str) -> String {
    let mut new = String::with_capacity(text.len() + 64);
    let pieces = pieces(text);
    for (number, piece) in pieces.iter().enumerate() {
        let code = match piece {
            Piece::Code(code) => code,
            Piece::Other(other) => {
                new.push_str(other);
                continue;
            }
            Piece::Quoted(quoted) => {
                let word = quoted.trim_matches('"');
                let index = KEYWORDS.contains(&word)
                    && indexes(&new)
                    && matches!(pieces.get(number + 1), Some(Piece::Code(code)) if code.starts_with(']'));
                match index {
                    true => new.push_str(&format!("\"{KEYWORD}{word}\"")),
                    false => new.push_str(quoted),
                }
                continue;
            }
        };
        let mut from = 0;
        for (at, word, before, behind) in words(code) {
            let next = code
                .get(at + word.len() + 1..)
                .and_then(|text| text.chars().next());
            let named =
                behind == Some('.') && next.is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
            if KEYWORDS.contains(&word) && (before == Some('.') || named) {
                new.push_str(code.get(from..at).unwrap_or_default());
                new.push_str(KEYWORD);
                from = at;
            }
        }
        new.push_str(code.get(from..).unwrap_or_default());
    }
    new
}

/// Whether what ends here is the open bracket of an index, not of an array.
fn indexes(before: &str) -> bool {
    before.strip_suffix('[').is_some_and(|before| {
        before
            .chars()
            .next_back()
            .is_some_and(|last| last.is_ascii_alphanumeric() || "_])".contains(last))
            && !KEYWORDS.iter().any(|word| {
                words(before)
                    .last()
                    .is_some_and(|(_, last, dot, _)| last == word && *dot != Some('.'))
            })
    })
}
