//! How this node's audit segments are sealed, from `[audit]` in the config: compressed or not, and to
//! whom encrypted. The ciphers and formats are in `tidelock-segments`; here is what the config names,
//! and the file that only this node's user may read.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidelock_segments::{CryptError, KEY_BYTES, KeyUnwrap, KeyWrap, SealOptions, SiteKey};
use zeroize::Zeroizing;

use crate::config::AuditSection;

/// Most bytes of a key file: a site key is 32, an identity file of age a few lines.
const MAX_KEY_FILE_BYTES: usize = 16 * 1024;

/// Why the keys to seal or read segments with cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SealingError {
    /// The key file cannot be read.
    #[error("cannot read the key file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may read the key file.
    #[error("the key file {path} has mode {mode:04o}; run chmod 600 on it")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file holds no key.
    #[error(
        "{path} is no key: a site key is exactly 32 random bytes (head -c 32 /dev/urandom), \
         an identity is what age-keygen writes"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The file is not of the length of a key.
    #[error(
        "{path} holds {bytes} bytes: the key is exactly 32 random ones (head -c 32 /dev/urandom)"
    )]
    KeyLength {
        /// The file.
        path: PathBuf,
        /// What it holds.
        bytes: usize,
    },
    /// The key was refused.
    #[error(transparent)]
    Crypt(#[from] CryptError),
}

/// How the log's segments are sealed, as the config says.
///
/// # Errors
/// [`SealingError`] if `audit.encrypt_key_file` cannot be used: a node that was told to encrypt does not
/// start and write in the clear.
pub fn seal_options(audit: &AuditSection) -> Result<SealOptions, SealingError> {
    let mut to: Vec<Arc<dyn KeyWrap>> = Vec::new();
    let mut decryption: Option<Arc<dyn KeyUnwrap>> = None;
    if let Some(path) = &audit.encrypt_key_file {
        let key = Arc::new(site_key(path)?);
        decryption = Some(key.clone());
        to.push(key);
    }
    if let Some(recipients) = &audit.encrypt_to {
        to.push(Arc::new(recipients.clone()));
    }
    let encryption: Option<Arc<dyn KeyWrap>> = match to.is_empty() {
        true => None,
        false => Some(Arc::new(to)),
    };
    Ok(SealOptions {
        compression: audit.compression,
        encryption,
        decryption,
    })
}

/// Reads a site key.
///
/// # Errors
/// [`SealingError`] if the file is not a private one of 32 bytes.
pub fn site_key(path: &Path) -> Result<SiteKey, SealingError> {
    Ok(SiteKey::from_slice(&private(path)?)?)
}

/// Reads a key of 32 bytes that serves for something else than segments.
///
/// # Errors
/// [`SealingError`] if the file is not a private one of 32 bytes.
pub fn key_bytes(path: &Path) -> Result<Zeroizing<[u8; KEY_BYTES]>, SealingError> {
    let bytes = private(path)?;
    <[u8; KEY_BYTES]>::try_from(bytes.as_slice())
        .map(Zeroizing::new)
        .map_err(|_| SealingError::KeyLength {
            path: path.to_owned(),
            bytes: bytes.len(),
        })
}

/// The bytes of a key file that only its owner may read.
///
/// # Errors
/// [`SealingError`] if it cannot be read, others have rights to it, or it is too long for a key.
pub fn private(path: &Path) -> Result<Zeroizing<Vec<u8>>, SealingError> {
    let failed = |source| SealingError::Read {
        path: path.to_owned(),
        source,
    };
    let file = fs::File::open(path).map_err(failed)?;
    // Of the open file, so that nothing is swapped in between.
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SealingError::Mode {
            path: path.to_owned(),
            mode,
        });
    }
    // Of its full length from the start: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE_BYTES + 1));
    file.take(MAX_KEY_FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() > MAX_KEY_FILE_BYTES {
        return Err(SealingError::NoKey {
            path: path.to_owned(),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, os::unix::fs::PermissionsExt as _};

    use tidelock_segments::{AgeRecipients, Compression, SegmentKey};

    use super::*;

    fn file(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o400] {
            assert!(site_key(&file(dir.path(), "key", &[1; 32], mode)).is_ok());
        }
        for mode in [0o640, 0o604, 0o666, 0o610] {
            let refused = site_key(&file(dir.path(), "key", &[1; 32], mode));
            assert!(
                matches!(refused, Err(SealingError::Mode { mode: m, .. }) if m == mode),
                "{mode:o}"
            );
        }
        assert!(matches!(
            site_key(&dir.path().join("none")),
            Err(SealingError::Read { .. })
        ));
    }

    #[test]
    fn a_node_that_was_told_to_encrypt_does_so_or_does_not_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut audit = AuditSection {
            segment_bytes: 1 << 20,
            segment_max_age_s: 300,
            custody: 0,
            retention_min_s: 0,
            custody_max_bytes: 0,
            archives: BTreeSet::new(),
            overwrite_oldest: false,
            compression: Compression::Off,
            encrypt_to: None,
            encrypt_key_file: None,
        };
        let plain = seal_options(&audit).unwrap();
        assert_eq!(plain.compression, Compression::Off);
        assert!(plain.encryption.is_none() && plain.decryption.is_none());
        // To a recipient only: the node cannot read it again. With a site key it can.
        let one = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
        audit.encrypt_to = AgeRecipients::new(&[one]).ok();
        let sealed = seal_options(&audit).unwrap();
        let key = SegmentKey::generate().unwrap();
        let wrapped = |options: &SealOptions| options.encryption.as_ref().unwrap().wrap(&key);
        assert_eq!(wrapped(&sealed).unwrap().len(), 1);
        assert!(sealed.decryption.is_none());
        audit.encrypt_key_file = Some(file(dir.path(), "key", &[1; 32], 0o600));
        let sealed = seal_options(&audit).unwrap();
        let wrapped = wrapped(&sealed).unwrap();
        assert_eq!(wrapped.len(), 2);
        let again = sealed.decryption.unwrap().unwrap_key(&wrapped).unwrap();
        assert_eq!(again.expose_secret(), key.expose_secret());
        file(dir.path(), "key", &[1; 32], 0o644);
        assert!(matches!(
            seal_options(&audit),
            Err(SealingError::Mode { mode: 0o644, .. })
        ));
    }

    #[test]
    fn a_key_of_32_bytes_is_private_and_of_that_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "beacon", &[1; 32], 0o600);
        assert_eq!(*key_bytes(&path).unwrap(), [1; 32], "the control");
        for mode in [0o604, 0o640, 0o660] {
            let path = file(dir.path(), "beacon", &[1; 32], mode);
            assert!(matches!(key_bytes(&path), Err(SealingError::Mode { .. })));
        }
        for bytes in [0, 31, 33, 64] {
            let path = file(dir.path(), "beacon", &vec![1; bytes], 0o600);
            let refused = key_bytes(&path);
            assert!(matches!(refused, Err(SealingError::KeyLength { bytes: b, .. }) if b == bytes));
        }
    }
}
