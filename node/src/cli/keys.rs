//! Keys that a reader brings: a site key or an age identity, for encrypted records.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, ValueHint};
use tidelock_segments::{AgeIdentity, KEY_BYTES, KeyUnwrap, Sha256Hash, SiteKey};
use zeroize::Zeroizing;

use super::Failure;

/// Largest key file: 16 identities and what is written around them.
const KEY_FILE_BYTES_MAX: usize = 16 * 1024;

/// With what encrypted records are read.
#[derive(Debug, Args)]
pub struct KeyArg {
    /// For encrypted segments: the site key, 32 bytes or 64 hex digits, or an age identity file.
    /// Readable by its owner only.
    #[arg(long = "key", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub key: Option<PathBuf>,
}

impl KeyArg {
    /// Reads the key, if one is named.
    pub(super) fn load(&self) -> Result<Option<Arc<dyn KeyUnwrap>>, Failure> {
        let Some(path) = &self.key else {
            return Ok(None);
        };
        let bytes = private(path)?;
        let text = std::str::from_utf8(&bytes).ok();
        if let Some(text) = text.filter(|text| text.contains("AGE-SECRET-KEY-")) {
            let identity = AgeIdentity::parse(text).map_err(|e| Failure::at(path, &e))?;
            return Ok(Some(Arc::new(identity)));
        }
        let key = match text.map(|text| Sha256Hash::from_hex(text.trim_end())) {
            Some(Ok(read)) if bytes.len() != KEY_BYTES => SiteKey::from_slice(read.as_bytes()),
            _ => SiteKey::from_slice(&bytes),
        };
        let key = key.map_err(|e| Failure::at(path, &e))?;
        Ok(Some(Arc::new(key)))
    }
}

/// Reads an age identity file.
pub(super) fn identity(path: &Path) -> Result<AgeIdentity, Failure> {
    let bytes = private(path)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    AgeIdentity::parse(text).map_err(|e| Failure::at(path, &e))
}

/// The bytes of a file that only its owner may read. The mode is that of the file that is read, whatever
/// has its name by then.
fn private(path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let at = |e: &dyn std::fmt::Display| Failure::at(path, e);
    let file = File::open(path).map_err(|e| at(&e))?;
    let mode = file.metadata().map_err(|e| at(&e))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(at(
            &"group or others have rights to this key; run chmod go= on it",
        ));
    }
    // Of its full length from the start: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_FILE_BYTES_MAX + 1));
    file.take(KEY_FILE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| at(&e))?;
    match bytes.len() > KEY_FILE_BYTES_MAX {
        true => Err(at(&"too long for a key")),
        false => Ok(bytes),
    }
}
