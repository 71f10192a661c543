//! The one strict JSON reader (INV-15).
//!
//! A policy that judges one reading of a text while an executor acts on another is a bypass, so
//! every text that two readers could understand differently is refused: a key twice, two keys that
//! differ in case or in Unicode form only, bytes after the value, integers that do not survive a
//! 64-bit float, escapes that are no text. What remains is brought to the one form that RFC 8785
//! writes: reading the canonical form of a value yields that value again.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    fmt,
};

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use unicode_normalization::UnicodeNormalization;

use crate::{
    action::{InvalidCode, InvalidRequest},
    limits::{MAX_BODY_BYTES, MAX_DEPTH, MAX_SAFE_INTEGER},
};

/// Reads one JSON value, strictly.
///
/// # Errors
/// Longer or deeper than `limits.rs` allows, or a text that two readers could understand differently.
pub fn parse(bytes: &[u8]) -> Result<Value, InvalidRequest> {
    if bytes.len() > MAX_BODY_BYTES {
        return Err(InvalidRequest::new(
            InvalidCode::TooLarge,
            format!(
                "body is {} bytes, at most {MAX_BODY_BYTES} are read",
                bytes.len()
            ),
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        InvalidRequest::new(
            InvalidCode::NotUtf8,
            format!("body is not UTF-8 at byte {}", error.valid_up_to()),
        )
    })?;
    let fault = RefCell::new(None);
    let depth = Cell::new(0);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = Strict {
        fault: &fault,
        depth: &depth,
    }
    .deserialize(&mut deserializer);
    let value = parsed.map_err(|error| {
        fault.take().unwrap_or_else(|| {
            let (line, column) = (error.line(), error.column());
            InvalidRequest::new(
                InvalidCode::Syntax,
                format!("body is not JSON at line {line} column {column}"),
            )
        })
    })?;
    deserializer.end().map_err(|_| {
        InvalidRequest::new(
            InvalidCode::TrailingBytes,
            "bytes follow the JSON value".to_owned(),
        )
    })?;
    Ok(value)
}

/// The form in which two keys are compared: compatibility form, then lower case. It maps every
/// pair that some reader takes for the same key to one text (`Key`, `key`, `\u{212a}ey`).
pub(crate) fn fold(key: &str) -> String {
    key.nfkc().flat_map(char::to_lowercase).nfkc().collect()
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    /// The typed fault, carried around serde's untyped error.
    fault: &'a RefCell<Option<InvalidRequest>>,
    depth: &'a Cell<usize>,
}

impl Strict<'_> {
    fn refuse<E: de::Error>(self, code: InvalidCode, message: String) -> E {
        self.fault.replace(Some(InvalidRequest::new(code, message)));
        E::custom("refused")
    }

    fn enter<E: de::Error>(self) -> Result<(), E> {
        let depth = self.depth.get() + 1;
        if depth > MAX_DEPTH {
            return Err(self.refuse(
                InvalidCode::TooDeep,
                format!("values nest deeper than {MAX_DEPTH} levels"),
            ));
        }
        self.depth.set(depth);
        Ok(())
    }

    fn leave(self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }

    fn text<E: de::Error>(self, text: &str) -> Result<(), E> {
        // Line breaks and tabs are part of ordinary file contents; other control characters have
        // no place in a request and hide things on terminals.
        let bad = text
            .chars()
            .find(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'));
        match bad {
            Some(c) => Err(self.refuse(
                InvalidCode::ControlCharacter,
                format!(
                    "a string holds the control character U+{:04X}",
                    u32::from(c)
                ),
            )),
            None => Ok(()),
        }
    }

    fn out_of_range<E: de::Error>(self) -> E {
        self.refuse(
            InvalidCode::NumberRange,
            format!("a number lies outside +-{MAX_SAFE_INTEGER}, give it as a string"),
        )
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        if value > MAX_SAFE_INTEGER {
            return Err(self.out_of_range());
        }
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        if value.unsigned_abs() > MAX_SAFE_INTEGER {
            return Err(self.out_of_range());
        }
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        // `1.0`, `1e0` and `-0` have the canonical forms `1`, `1` and `0`: they become those
        // integers here, so that no engine sees a float where the record shows an integer.
        let Some(number) = Number::from_f64(value) else {
            return Err(self.out_of_range());
        };
        let canonical =
            serde_json_canonicalizer::to_string(&number).map_err(|_| self.out_of_range())?;
        let small = canonical.contains("e-");
        let (whole, fraction) = match canonical.split_once('.') {
            Some((whole, _)) => (whole, true),
            None => (canonical.as_str(), false),
        };
        if canonical.contains("e+") {
            return Err(self.out_of_range());
        }
        if small {
            return Ok(Value::Number(number));
        }
        match whole.parse::<i64>() {
            Ok(integer) if integer.unsigned_abs() <= MAX_SAFE_INTEGER => {
                Ok(Value::Number(if fraction {
                    number
                } else {
                    integer.into()
                }))
            }
            _ => Err(self.out_of_range()),
        }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.text(value)?;
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Value, E> {
        self.text(&value)?;
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        self.enter()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        self.leave();
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.enter()?;
        let mut fields = Map::new();
        let mut folded = BTreeSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Some(c) = key.chars().find(|c| c.is_control()) {
                return Err(self.refuse(
                    InvalidCode::ControlCharacter,
                    format!("a key holds the control character U+{:04X}", u32::from(c)),
                ));
            }
            if fields.contains_key(&key) {
                return Err(self.refuse(
                    InvalidCode::DuplicateKey,
                    format!("key {key:?} stands twice"),
                ));
            }
            if !folded.insert(fold(&key)) {
                return Err(self.refuse(
                    InvalidCode::AmbiguousKey,
                    format!("key {key:?} differs from another key in case or Unicode form only"),
                ));
            }
            let value = map.next_value_seed(self)?;
            fields.insert(key, value);
        }
        self.leave();
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn canonical(value: &Value) -> Result<Vec<u8>, serde_json::Error> {
        serde_json_canonicalizer::to_vec(value)
    }

    fn code(text: impl AsRef<[u8]>) -> Option<InvalidCode> {
        parse(text.as_ref()).err().map(|error| error.code())
    }

    #[test]
    fn ordinary_json_is_read() {
        let value = parse(
            br#" {"a": [1, -2, 0.5, 1e-9, true, null, "x\ny \u00e9 \ud83d\ude00"], "b": {"": {}}} "#,
        );
        assert_eq!(
            value.unwrap(),
            json!({"a": [1, -2, 0.5, 1e-9, true, null, "x\ny é 😀"], "b": {"": {}}})
        );
    }

    #[test]
    fn inv_15_what_two_readers_could_read_differently_is_refused() {
        use InvalidCode::{
            AmbiguousKey, ControlCharacter, DuplicateKey, NotUtf8, NumberRange, Syntax,
            TrailingBytes,
        };
        let cases: &[(&[u8], InvalidCode)] = &[
            (br#"{"a":1,"a":1}"#, DuplicateKey),
            (br#"{"a":1,"\u0061":2}"#, DuplicateKey),
            (br#"{"x":[{"k":{"a":1,"a":2}}]}"#, DuplicateKey),
            (br#"{"a":1,"A":2}"#, AmbiguousKey),
            (br#"{"x":{"path":1,"Path":2}}"#, AmbiguousKey),
            ("{\"key\":1,\"\u{212a}ey\":2}".as_bytes(), AmbiguousKey),
            ("{\"s\":1,\"\u{17f}\":2}".as_bytes(), AmbiguousKey),
            ("{\"\u{e9}\":1,\"e\u{301}\":2}".as_bytes(), AmbiguousKey),
            (br#"{"a":1} {"b":2}"#, TrailingBytes),
            (br#"{"a":1}x"#, TrailingBytes),
            (b"{\"a\":1}\0", TrailingBytes),
            (b"{\"a\":\"\xff\"}", NotUtf8),
            (b"{\"a\":\"\xc0\xaf\"}", NotUtf8),
            (b"{\"a\":\"\xed\xa0\x80\"}", NotUtf8),
            (br#"{"a":"\ud800"}"#, Syntax),
            (br#"{"a":"\udc00\ud800"}"#, Syntax),
            (b"\xef\xbb\xbf{}", Syntax),
            (br#"{"a":NaN}"#, Syntax),
            (br#"{"a":Infinity}"#, Syntax),
            (br#"{"a":1e999}"#, Syntax),
            (br#"{"a":01}"#, Syntax),
            (br#"{"a":+1}"#, Syntax),
            (br#"{"a":.5}"#, Syntax),
            (br#"{"a":0x10}"#, Syntax),
            (br"{'a':1}", Syntax),
            (br"{a:1}", Syntax),
            (br#"{"a":1,}"#, Syntax),
            (br#"{"a":1 /* c */}"#, Syntax),
            (b"", Syntax),
            (b"   ", Syntax),
            (br#"{"a":"#, Syntax),
            (b"{\"a\":\"x\ny\"}", Syntax),
            (br#"{"a":9007199254740992}"#, NumberRange),
            (br#"{"a":-9007199254740992}"#, NumberRange),
            (br#"{"a":18446744073709551616}"#, NumberRange),
            (br#"{"a":1e20}"#, NumberRange),
            (br#"{"a":1e300}"#, NumberRange),
            (br#"{"a":9007199254740993.0}"#, NumberRange),
            (br#"{"a":"\u0000"}"#, ControlCharacter),
            (br#"{"a":"\u001b[2J"}"#, ControlCharacter),
            (br#"{"a":"\u0085"}"#, ControlCharacter),
            (br#"{"a\n":1}"#, ControlCharacter),
        ];
        for (text, expected) in cases {
            let shown = String::from_utf8_lossy(text);
            assert_eq!(code(text), Some(*expected), "{shown}");
        }
        // The control: near neighbours of the refused texts pass.
        for text in [
            r#"{"a":1,"b":1}"#,
            r#"{"a":{"k":1},"b":{"k":1}}"#,
            r#"{"a":9007199254740991,"b":-9007199254740991}"#,
            "{\"a\":1} \n",
            r#"{"a":"\ud83d\ude00"}"#,
            "{\"\u{e9}\":1,\"e\":2}",
        ] {
            assert_eq!(code(text), None, "{text}");
        }
    }

    #[test]
    fn size_and_depth_are_limited() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(code(nested(MAX_DEPTH)), None);
        assert_eq!(code(nested(MAX_DEPTH + 1)), Some(InvalidCode::TooDeep));
        assert_eq!(code(nested(30_000)), Some(InvalidCode::TooDeep));
        let side_by_side = format!("[{}0]", format!("{},", nested(MAX_DEPTH - 1)).repeat(50));
        assert_eq!(code(side_by_side), None, "depth is not a count of values");
        let long = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
        assert_eq!(code(long(MAX_BODY_BYTES)), None);
        assert_eq!(code(long(MAX_BODY_BYTES + 1)), Some(InvalidCode::TooLarge));
    }

    #[test]
    fn inv_15_numbers_have_one_reading() {
        for (text, canonical_text) in [
            ("1.0", "1"),
            ("1e0", "1"),
            ("100E-2", "1"),
            ("-0", "0"),
            ("-0.0", "0"),
            ("0.50", "0.5"),
            ("1e-7", "1e-7"),
            ("9007199254740991.0", "9007199254740991"),
            ("5e-324", "5e-324"),
        ] {
            let value = parse(text.as_bytes()).unwrap();
            assert_eq!(
                String::from_utf8(canonical(&value).unwrap()).unwrap(),
                canonical_text
            );
            assert_eq!(
                value.is_f64(),
                canonical_text.contains(['.', 'e']),
                "{text}"
            );
        }
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 40, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
                proptest::collection::btree_map("[a-zA-Zé]{0,3}", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn inv_15_reading_the_canonical_form_yields_the_same_value(value in json_value()) {
            let text = serde_json::to_vec(&value).unwrap();
            if let Ok(parsed) = parse(&text) {
                let form = canonical(&parsed).unwrap();
                prop_assert_eq!(&parse(&form).unwrap(), &parsed);
                prop_assert_eq!(canonical(&parse(&form).unwrap()).unwrap(), form);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn inv_15_a_repeated_key_is_always_refused(
            key in "[a-z]{1,4}",
            before in proptest::collection::btree_set("[a-z]{1,4}", 0..4),
            upper in any::<bool>(),
        ) {
            let again = if upper { key.to_uppercase() } else { key.clone() };
            let mut fields: Vec<String> =
                before.iter().filter(|k| **k != key).map(|k| format!("\"{k}\":0")).collect();
            fields.insert(0, format!("\"{key}\":0"));
            let good = format!("{{{}}}", fields.join(","));
            prop_assert_eq!(code(good), None);
            fields.push(format!("\"{again}\":1"));
            let bad = format!("{{{}}}", fields.join(","));
            let expected =
                if upper { InvalidCode::AmbiguousKey } else { InvalidCode::DuplicateKey };
            prop_assert_eq!(code(bad), Some(expected));
        }
    }
}
