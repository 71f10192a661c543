//! JSON Schemas (draft 2020-12) of what authors write, for editors. The parsers stay the judges: they check more,
//! and a schema never admits a key that they refuse (tested in `node/tests/schemas.rs`).

/// Schema of `manifest.json`.
pub const MANIFEST: &str = include_str!("../schemas/manifest.json");

/// Schema of the files below `tests/`.
pub const TESTS: &str = include_str!("../schemas/tests.json");
