//! Keys that a reader brings: a site key or an age identity, for encrypted records.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, ValueHint};
use tidelock_segments::{AgeIdentity, KEY_BYTES, KeyUnwrap, Sha256Hash, SiteKey};

use super::Failure;
use crate::sealing::private;

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

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const IDENTITY: &str =
        "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";

    #[test]
    fn a_key_file_is_a_site_key_or_an_identity_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let load = |bytes: &[u8], mode: u32| {
            let path = dir.path().join("key");
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let loaded = KeyArg { key: Some(path) }.load();
            loaded.map(|key| format!("{:?}", key.unwrap()))
        };
        for site in [vec![1; 32], "0a".repeat(32).into_bytes()] {
            assert!(load(&site, 0o600).unwrap().contains("SiteKey(secret)"));
            assert!(load(&site, 0o640).is_err());
        }
        let identity = load(IDENTITY.as_bytes(), 0o400).unwrap();
        assert!(identity.contains("AgeIdentity(1 secret)"));
        for bad in [&b"short"[..], &[0xff; 31], &[b'#'; 20_000]] {
            assert!(load(bad, 0o600).is_err());
        }
    }
}
