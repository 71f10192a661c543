//! Reads TOML tables key by key and collects mistakes instead of stopping at the first.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    convert::Infallible,
    fmt::Display,
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use toml_edit::{Item, TableLike};

use super::Mistake;

/// What all sections of one file share.
pub(super) struct Cx<'a> {
    text: &'a str,
    base: &'a Path,
    mistakes: RefCell<Vec<Mistake>>,
    asked: RefCell<Asked>,
}

/// Every key that was asked for, in its section: its JSON Schema, and whether it must be there. What the
/// reader asks for is what a config may say, so the published schema is made of it.
type Asked = BTreeMap<String, BTreeMap<&'static str, (Value, bool)>>;

/// Stands for the schema of a table until its keys are known.
const TABLE: &str = "table";
/// Stands for the schema of a table that may be absent, whatever must be in it.
const OPTIONAL_TABLE: &str = "optional table";
/// Stands for the schema of a list of tables.
const TABLES: &str = "tables";

fn dotted(section: &str, key: &str) -> String {
    if section.is_empty() {
        key.to_owned()
    } else {
        format!("{section}.{key}")
    }
}

/// The line of a byte offset, from 1.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

impl<'a> Cx<'a> {
    pub(super) fn new(text: &'a str, base: &'a Path) -> Self {
        Self {
            text,
            base,
            mistakes: RefCell::new(Vec::new()),
            asked: RefCell::default(),
        }
    }

    /// Everything found, in the order of the file.
    pub(super) fn take_mistakes(&self) -> Vec<Mistake> {
        let mut mistakes = self.mistakes.take();
        mistakes.sort_by_key(|m| m.line);
        mistakes
    }

    /// The schema of a section, of what was asked for so far.
    pub(super) fn schema(&self, section: &str) -> Map<String, Value> {
        let asked = self.asked.borrow();
        let mut properties = Map::new();
        let mut required = Vec::new();
        for (key, (schema, must)) in asked.get(section).into_iter().flatten() {
            let dotted = dotted(section, key);
            let optional = schema == OPTIONAL_TABLE;
            let schema = match schema.as_str() {
                Some(TABLE | OPTIONAL_TABLE) => Value::Object(self.schema(&dotted)),
                Some(TABLES) => json!({"type": "array", "items": self.schema(&dotted)}),
                _ => schema.clone(),
            };
            // A table must be there if anything in it must.
            let needs = !optional
                && schema.get("type").is_some_and(|kind| kind == "object")
                && schema.get("required").is_some();
            if *must || needs {
                required.push(*key);
            }
            properties.insert((*key).to_owned(), schema);
        }
        let mut schema = Map::from_iter([
            ("type".to_owned(), json!("object")),
            ("additionalProperties".to_owned(), json!(false)),
            ("properties".to_owned(), Value::Object(properties)),
        ]);
        if !required.is_empty() {
            schema.insert("required".to_owned(), json!(required));
        }
        schema
    }
}

/// One table being read; the keys asked for are the keys known.
pub(super) struct Section<'a> {
    cx: &'a Cx<'a>,
    name: String,
    line: usize,
    table: Option<&'a dyn TableLike>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn root(cx: &'a Cx<'a>, table: &'a toml_edit::Table) -> Self {
        Self {
            cx,
            name: String::new(),
            line: 0,
            table: Some(table),
            known: Vec::new(),
        }
    }

    fn dotted(&self, key: &str) -> String {
        dotted(&self.name, key)
    }

    /// Notes what a key may say. The first note is the closest one.
    fn note(&self, key: &'static str, must: bool, schema: Value) {
        let mut asked = self.cx.asked.borrow_mut();
        let keys = asked.entry(self.name.clone()).or_default();
        keys.entry(key).or_insert((schema, must)).1 |= must;
    }

    fn item(&mut self, key: &'static str) -> Option<&'a Item> {
        self.known.push(key);
        self.table.and_then(|t| t.get(key)).filter(|i| !i.is_none())
    }

    fn line_of_key(&self, key: &str) -> usize {
        self.table
            .and_then(|t| t.get_key_value(key))
            .and_then(|(k, item)| k.span().or_else(|| item.span()))
            .map_or(self.line, |span| line_of(self.cx.text, span.start))
    }

    /// Reports a mistake at a key of this section.
    pub(super) fn mistake(&mut self, key: &str, message: impl Into<String>) {
        self.cx.mistakes.borrow_mut().push(Mistake {
            line: self.line_of_key(key),
            key: self.dotted(key),
            message: message.into(),
        });
    }

    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        self.note(key, false, json!(TABLE));
        self.table_of(key)
    }

    /// A table that may be absent, in which other keys than the absent one are then not asked for.
    pub(super) fn optional_section(&mut self, key: &'static str) -> Option<Section<'a>> {
        self.note(key, false, json!(OPTIONAL_TABLE));
        Some(self.table_of(key)).filter(|section| section.table.is_some())
    }

    fn table_of(&mut self, key: &'static str) -> Section<'a> {
        let table = match self.item(key) {
            None => None,
            Some(item) => {
                let table = item.as_table_like();
                if table.is_none() {
                    self.mistake(key, format!("must be a table: write [{key}]"));
                }
                table
            }
        };
        Section {
            cx: self.cx,
            name: self.dotted(key),
            line: self.line_of_key(key),
            table,
            known: Vec::new(),
        }
    }

    pub(super) fn tables(&mut self, key: &'static str) -> Vec<Section<'a>> {
        self.note(key, false, json!(TABLES));
        let name = self.dotted(key);
        let Some(item) = self.item(key) else {
            return Vec::new();
        };
        let Some(array) = item.as_array_of_tables() else {
            self.mistake(key, format!("must be a list of tables: write [[{name}]]"));
            return Vec::new();
        };
        array
            .iter()
            .map(|table| Section {
                cx: self.cx,
                name: name.clone(),
                line: table.span().map_or(0, |s| line_of(self.cx.text, s.start)),
                table: Some(table),
                known: Vec::new(),
            })
            .collect()
    }

    pub(super) fn optional_string(&mut self, key: &'static str) -> Option<String> {
        self.note(key, false, json!({"type": "string", "minLength": 1}));
        let item = self.item(key)?;
        match item.as_str() {
            Some(text) if !text.is_empty() => Some(text.to_owned()),
            Some(_) => {
                self.mistake(key, "must not be empty");
                None
            }
            None => {
                self.mistake(key, format!("must be a string, not a {}", item.type_name()));
                None
            }
        }
    }

    pub(super) fn required_string(&mut self, key: &'static str) -> Option<String> {
        self.note(key, true, json!({"type": "string", "minLength": 1}));
        if self.item(key).is_none() {
            self.mistake(key, "is required");
            return None;
        }
        self.optional_string(key)
    }

    /// A required string that a constructor accepts or refuses.
    pub(super) fn parsed<T, E: Display>(
        &mut self,
        key: &'static str,
        make: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.required_string(key)?;
        make(&text)
            .map_err(|error| self.mistake(key, error.to_string()))
            .ok()
    }

    pub(super) fn optional_path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.optional_string(key)
            .map(|text| self.cx.base.join(text))
    }

    pub(super) fn required_path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.required_string(key)
            .map(|text| self.cx.base.join(text))
    }

    pub(super) fn paths(&mut self, key: &'static str) -> Vec<PathBuf> {
        let base = self.cx.base;
        self.list(key, |text| Ok::<_, Infallible>(base.join(text)))
    }

    /// A list of texts of one type, each named where it is wrong.
    pub(super) fn list<T, E: Display>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Vec<T> {
        self.note(key, false, strings());
        let Some(item) = self.item(key) else {
            return Vec::new();
        };
        let Some(array) = item.as_array() else {
            self.mistake(key, "must be an array of strings");
            return Vec::new();
        };
        let mut list = Vec::with_capacity(array.len());
        for value in array {
            match value.as_str().map(&parse) {
                Some(Ok(parsed)) => list.push(parsed),
                Some(Err(error)) => self.mistake(key, error.to_string()),
                None => self.mistake(key, "must hold strings only"),
            }
        }
        list
    }

    /// A list of strings, if the key is there.
    pub(super) fn strings(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.note(key, false, strings());
        let all = self.item(key)?.as_array().and_then(|array| {
            array
                .iter()
                .map(|value| value.as_str().map(str::to_owned))
                .collect()
        });
        if all.is_none() {
            self.mistake(key, "must be a list of strings");
        }
        all
    }

    pub(super) fn optional_address(&mut self, key: &'static str) -> Option<SocketAddr> {
        let text = self.optional_string(key)?;
        text.parse()
            .map_err(|_| {
                self.mistake(
                    key,
                    format!("`{text}` is not ADDRESS:PORT, as in 127.0.0.1:7411"),
                )
            })
            .ok()
    }

    /// An IPv4 multicast group.
    pub(super) fn group(&mut self, key: &'static str, default: Ipv4Addr) -> Ipv4Addr {
        let Some(text) = self.optional_string(key) else {
            return default;
        };
        match text.parse::<Ipv4Addr>() {
            Ok(group) if group.is_multicast() => group,
            _ => {
                self.mistake(
                    key,
                    format!("`{text}` is no IPv4 multicast address, as in {default}"),
                );
                default
            }
        }
    }

    pub(super) fn address(&mut self, key: &'static str) -> Option<SocketAddr> {
        self.note(key, true, json!({"type": "string", "minLength": 1}));
        if self.item(key).is_none() {
            self.mistake(key, "is required, as in 127.0.0.1:7411");
            return None;
        }
        self.optional_address(key)
    }

    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.note(key, false, json!({"type": "boolean", "default": default}));
        match self.item(key) {
            None => default,
            Some(item) => item.as_bool().unwrap_or_else(|| {
                self.mistake(key, "must be true or false");
                default
            }),
        }
    }

    pub(super) fn integer(
        &mut self,
        key: &'static str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        let schema = json!({
            "type": "integer", "minimum": range.start(), "maximum": range.end(), "default": default,
        });
        self.note(key, false, schema);
        match self.item(key) {
            None => default,
            Some(item) => {
                let value = item.as_integer().and_then(|i| u64::try_from(i).ok());
                self.in_range(key, value, default, range)
            }
        }
    }

    pub(super) fn number32(
        &mut self,
        key: &'static str,
        default: u32,
        range: RangeInclusive<u32>,
    ) -> u32 {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        u32::try_from(self.integer(key, u64::from(default), wide)).unwrap_or(default)
    }

    /// A number that has no default.
    pub(super) fn required_number32(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u32>,
    ) -> Option<u32> {
        self.note(
            key,
            true,
            whole(&(*range.start()).into(), &(*range.end()).into()),
        );
        let Some(item) = self.item(key) else {
            self.mistake(key, "is required");
            return None;
        };
        let value = item.as_integer().and_then(|i| u32::try_from(i).ok());
        let value = value.filter(|value| range.contains(value));
        if value.is_none() {
            let (least, most) = range.into_inner();
            self.mistake(
                key,
                format!("must be a whole number from {least} to {most}"),
            );
        }
        value
    }

    /// Bytes: an integer, or a string with a unit (`KiB`, `MiB`, `GiB`, `TiB`).
    pub(super) fn bytes(
        &mut self,
        key: &'static str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        let text = json!({"type": "string", "minLength": 1, "examples": ["64MiB"]});
        let number = whole(range.start(), range.end());
        self.note(key, false, json!({"anyOf": [number, text]}));
        let Some(item) = self.item(key) else {
            return default;
        };
        let value = match item.as_str() {
            Some(text) => parse_bytes(text),
            None => item.as_integer().and_then(|i| u64::try_from(i).ok()),
        };
        if value.is_none() {
            self.mistake(
                key,
                "must be a number of bytes, or a string as in \"64MiB\"",
            );
            return default;
        }
        self.in_range(key, value, default, range)
    }

    fn in_range(
        &mut self,
        key: &'static str,
        value: Option<u64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        match value {
            Some(value) if range.contains(&value) => value,
            _ => {
                self.mistake(
                    key,
                    format!(
                        "must be a whole number from {} to {}",
                        range.start(),
                        range.end()
                    ),
                );
                default
            }
        }
    }

    pub(super) fn one_of(&mut self, key: &'static str, default: &str, allowed: &[&str]) -> String {
        self.note(key, false, json!({"enum": allowed}));
        match self.optional_string(key) {
            None => default.to_owned(),
            Some(text) if allowed.contains(&text.as_str()) => text,
            Some(text) => {
                self.mistake(
                    key,
                    format!("`{text}` is not one of {}", allowed.join(", ")),
                );
                default.to_owned()
            }
        }
    }

    /// Refuses every key that nobody asked for.
    pub(super) fn finish(mut self) {
        let Some(table) = self.table else { return };
        let unknown: Vec<String> = table
            .iter()
            .map(|(key, _)| key.to_owned())
            .filter(|key| !self.known.contains(&key.as_str()))
            .collect();
        for key in unknown {
            let nearest = self
                .known
                .iter()
                .map(|known| (distance(&key, known), *known))
                .min()
                .filter(|(d, _)| *d <= 3);
            let message = match nearest {
                Some((_, known)) => format!("unknown key; did you mean `{known}`?"),
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            self.mistake(&key, message);
        }
    }
}

/// The schema of a whole number.
fn whole(least: &u64, most: &u64) -> Value {
    json!({"type": "integer", "minimum": least, "maximum": most})
}

/// The schema of a list of strings.
fn strings() -> Value {
    json!({"type": "array", "items": {"type": "string"}})
}

/// A number of bytes, with or without a binary unit.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Levenshtein distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.bytes().enumerate() {
        let mut previous = i;
        let mut next = vec![i + 1];
        for (cb, above) in b.bytes().zip(row.iter().skip(1)) {
            let left = next.last().copied().unwrap_or(usize::MAX - 1);
            let cost = previous + usize::from(ca != cb);
            previous = *above;
            next.push(cost.min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("crl", "crls"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("listen", "listen"), 0);
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn bytes_take_binary_units_only() {
        assert_eq!(parse_bytes("64MiB"), Some(64 << 20));
        assert_eq!(parse_bytes("5"), Some(5));
        assert_eq!(parse_bytes("64MB"), None);
        assert_eq!(parse_bytes("99999999TiB"), None);
        assert_eq!(parse_bytes("-1"), None);
    }
}
