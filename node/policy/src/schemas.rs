//! JSON Schemas (draft 2020-12) of what authors write, for editors. The parsers stay the judges: they check more,
//! and a schema has exactly the keys that they take (tested here, and with whole files in `node/tests/schemas.rs`).

/// Schema of `manifest.json`.
pub const MANIFEST: &str = include_str!("../schemas/manifest.json");

/// Schema of the files below `tests/`.
pub const TESTS: &str = include_str!("../schemas/tests.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::de::value::Error;
    use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
    use serde::forward_to_deserialize_any;
    use serde_json::Value;

    use super::*;
    use crate::consult::{ConsultTerms, WhenUnreachable};
    use crate::manifest::{ClassLimits, Raw as RawManifest, WhenRestricted};
    use crate::validity::WhenExpired;

    /// A reader that reads nothing: it learns for which names a type asks.
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Error> {
            *self.0 = fields;
            Err(Error::custom("asked"))
        }

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _: &'static str,
            variants: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Error> {
            *self.0 = variants;
            Err(Error::custom("asked"))
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
            Err(Error::custom("neither a struct nor an enum"))
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map identifier ignored_any
        }
    }

    fn names<T: for<'de> Deserialize<'de>>() -> BTreeSet<String> {
        let mut names: &'static [&'static str] = &[];
        assert!(T::deserialize(Names(&mut names)).is_err());
        assert!(!names.is_empty(), "no names of a type are no comparison");
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn keys(schema: &Value, pointer: &str) -> BTreeSet<String> {
        let properties = schema.pointer(pointer).unwrap().as_object().unwrap();
        properties.keys().cloned().collect()
    }

    fn words(schema: &Value, pointer: &str) -> BTreeSet<String> {
        let words = schema.pointer(pointer).unwrap().as_array().unwrap();
        words
            .iter()
            .map(|w| w.as_str().unwrap().to_owned())
            .collect()
    }

    /// The schema of manifests lacked four keys that the program had come to take, so that editors marked
    /// valid manifests. The test with whole files only changed a manifest that had none of them: it
    /// showed that nothing more was admitted than the program takes, and not that nothing less was.
    #[test]
    fn the_schema_of_a_manifest_has_the_keys_and_words_that_the_reader_asks_for_and_no_others() {
        let schema: Value = serde_json::from_str(MANIFEST).unwrap();
        assert_eq!(keys(&schema, "/properties"), names::<RawManifest>());
        assert_eq!(
            keys(&schema, "/$defs/class/properties"),
            names::<ClassLimits>()
        );
        assert_eq!(
            keys(&schema, "/$defs/consult/properties"),
            names::<ConsultTerms>()
        );
        let when = "/$defs/class/properties/when_restricted/enum";
        assert_eq!(words(&schema, when), names::<WhenRestricted>());
        let when = "/$defs/consult/properties/when_unreachable/enum";
        assert_eq!(words(&schema, when), names::<WhenUnreachable>());
        assert_eq!(
            words(&schema, "/properties/when_expired/enum"),
            names::<WhenExpired>()
        );
        // The control: a key that is taken out of the schema is missed.
        let mut less = schema;
        less["properties"].as_object_mut().unwrap().remove("role");
        assert_ne!(keys(&less, "/properties"), names::<RawManifest>());
    }

    #[test]
    fn the_schema_of_tests_has_the_keys_and_words_that_the_reader_asks_for_and_no_others() {
        use crate::cases::{Case, CaseRequest, Expect, Resource, Uid};
        let schema: Value = serde_json::from_str(TESTS).unwrap();
        assert_eq!(keys(&schema, "/$defs/test/properties"), names::<Case>());
        assert_eq!(
            words(&schema, "/$defs/test/properties/expect/enum"),
            names::<Expect>()
        );
        let request = "/$defs/request/properties";
        assert_eq!(keys(&schema, request), names::<CaseRequest>());
        let of = |key: &str| format!("{request}/{key}/properties");
        assert_eq!(keys(&schema, &of("principal")), names::<Uid>());
        assert_eq!(keys(&schema, &of("resource")), names::<Resource>());
    }
}
