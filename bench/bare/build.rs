//! Copies the source of the segments crate and takes the proofs out of it: leaf and node hashes,
//! signatures and their checks answer constants. All else is the log that a node runs, so the
//! difference in speed is what the proofs cost.

use std::{env, fs, path::Path};

/// File, function as it begins (once in that file), what ends it, what it does instead.
const CUTS: [(&str, &str, &str, &str); 4] = [
    (
        "merkle.rs",
        "pub fn leaf_hash(record: &[u8]) -> Sha256Hash {\n",
        "\n}\n",
        "Sha256Hash::from_bytes([record.len() as u8; 32])",
    ),
    (
        "merkle.rs",
        "pub fn node_hash(left: &Sha256Hash, right: &Sha256Hash) -> Sha256Hash {\n",
        "\n}\n",
        "let _ = right; *left",
    ),
    (
        "keys.rs",
        "    pub fn sign(&self, message: &[u8]) -> [u8; 64] {\n",
        "\n    }\n",
        "[message.len() as u8; 64]",
    ),
    (
        "keys.rs",
        "    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {\n",
        "\n    }\n",
        "let _ = (message, signature); Ok(())",
    ),
];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("OUT_DIR");
    for entry in fs::read_dir(from).expect("segments/src") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).expect("a copy");
        }
    }
}

/// The text with another body for the function, if it is there once.
fn cut(text: &str, begins: &str, ends: &str, body: &str) -> Option<String> {
    let (before, rest) = text.split_once(begins)?;
    let (_, after) = rest.split_once(ends)?;
    (!rest.contains(begins)).then(|| format!("{before}{begins}{body}{ends}{after}"))
}

fn main() {
    let from = Path::new("../../segments/src");
    println!("cargo::rerun-if-changed={}", from.display());
    let to = Path::new(&env::var("OUT_DIR").expect("OUT_DIR")).join("segments");
    let _ = fs::remove_dir_all(&to);
    copy(from, &to);
    let mut missing = Vec::new();
    for (file, begins, ends, body) in CUTS {
        let path = to.join(file);
        let text = fs::read_to_string(&path).expect("a source file");
        match cut(&text, begins, ends, body) {
            Some(text) => fs::write(&path, text).expect("a source file"),
            None => missing.push(format!("{file}: {}", begins.trim())),
        }
    }
    // Inner attributes and documentation may not stand in an included file.
    let lib = to.join("lib.rs");
    let text = fs::read_to_string(&lib).expect("lib.rs");
    let kept: Vec<_> = text
        .lines()
        .filter(|l| !l.starts_with("//!") && !l.starts_with("#!["))
        .collect();
    fs::write(&lib, kept.join("\n")).expect("lib.rs");
    println!("cargo::rustc-env=BARE_MISSING={}", missing.join("; "));
}
