//! Checkpoints: signed statements of a log's size and root, in the C2SP forms.
//!
//! The text is a [tlog-checkpoint](https://c2sp.org/tlog-checkpoint) inside a
//! [signed note](https://c2sp.org/signed-note) with an Ed25519 signature, so that public tools that
//! know nothing of Tidelock can check it. Reading is strict: one text form for one statement.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::id::{DomainId, Origin, Sha256Hash};
use crate::keys::{LogKey, LogPublicKey};
use crate::limits::MAX_CHECKPOINT_BYTES;

/// Why a checkpoint was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Not the text form of a checkpoint.
    #[error("not a checkpoint: {0}")]
    Malformed(&'static str),
    /// It speaks of another log.
    #[error("checkpoint of {found:?} where {expected:?} was expected")]
    Origin {
        /// The origin line in the text.
        found: String,
        /// The log it should speak of.
        expected: String,
    },
    /// No signature by the expected key is there, or it does not verify.
    #[error("no valid signature by the log's key")]
    Signature,
}

/// What a checkpoint states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The first line: which log.
    pub origin_line: String,
    /// The number of records.
    pub size: u64,
    /// The root of the tree over them.
    pub root: Sha256Hash,
}

/// The origin line of an audit log: `tidelock/<domain>/<node id>/<fingerprint>/<incarnation>`.
/// `None` if the origin is no audit origin.
#[must_use]
pub fn origin_line(domain: &DomainId, origin: &Origin) -> Option<String> {
    origin
        .as_str()
        .strip_prefix("audit/")
        .map(|rest| format!("tidelock/{domain}/{rest}"))
}

/// The first four bytes of SHA-256 over name, newline, the Ed25519 type byte and the key.
fn key_id(name: &str, key: &LogPublicKey) -> [u8; 4] {
    let [a, b, c, d, ..] =
        *Sha256Hash::of_parts(&[name.as_bytes(), b"\n", &[1], key.as_bytes()]).as_bytes();
    [a, b, c, d]
}

impl Checkpoint {
    /// The note's text, which is what is signed.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "{}\n{}\n{}\n",
            self.origin_line,
            self.size,
            STANDARD.encode(self.root.as_bytes())
        )
    }

    /// Signs it and gives the whole note.
    #[must_use]
    pub fn sign(&self, key: &LogKey) -> String {
        self.with_signature(&key.public(), &key.sign(self.text().as_bytes()))
    }

    /// The whole note, from a signature made earlier over [`Checkpoint::text`].
    #[must_use]
    pub fn with_signature(&self, key: &LogPublicKey, signature: &[u8; 64]) -> String {
        let mut blob = key_id(&self.origin_line, key).to_vec();
        blob.extend_from_slice(signature);
        format!(
            "{}\n\u{2014} {} {}\n",
            self.text(),
            self.origin_line,
            STANDARD.encode(blob)
        )
    }

    /// Reads a note without judging its signatures.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] if the text is not a checkpoint.
    pub fn parse(note: &str) -> Result<Self, CheckpointError> {
        Self::split(note).map(|(checkpoint, _)| checkpoint)
    }

    /// Reads a note of the log `expected_line` and checks its signature by `key`.
    ///
    /// # Errors
    /// [`CheckpointError`] telling what does not fit.
    pub fn verify(
        note: &str,
        expected_line: &str,
        key: &LogPublicKey,
    ) -> Result<Self, CheckpointError> {
        let (checkpoint, signatures) = Self::split(note)?;
        if checkpoint.origin_line != expected_line {
            return Err(CheckpointError::Origin {
                found: checkpoint.origin_line,
                expected: expected_line.to_owned(),
            });
        }
        let id = key_id(expected_line, key);
        let text = checkpoint.text();
        for line in signatures {
            let Some((name, blob)) = line.split_once(' ') else {
                continue;
            };
            let Ok(blob) = STANDARD.decode(blob) else {
                continue;
            };
            if name == expected_line
                && let Some(signature) = blob.strip_prefix(&id)
                && key.verify(text.as_bytes(), signature).is_ok()
            {
                return Ok(checkpoint);
            }
        }
        Err(CheckpointError::Signature)
    }

    fn split(note: &str) -> Result<(Self, Vec<&str>), CheckpointError> {
        use CheckpointError::Malformed;
        if note.len() > MAX_CHECKPOINT_BYTES {
            return Err(Malformed("too long"));
        }
        let (text, signatures) = note
            .split_once("\n\n")
            .ok_or(Malformed("no blank line before the signatures"))?;
        let mut lines = text.split('\n');
        let (Some(origin_line), Some(size), Some(root), None) =
            (lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err(Malformed("expected three lines"));
        };
        let number: u64 = size
            .parse()
            .map_err(|_| Malformed("size is not a number"))?;
        if number.to_string() != size {
            return Err(Malformed("size is not in canonical form"));
        }
        let hash = STANDARD
            .decode(root)
            .map_err(|_| Malformed("root is not base64"))?;
        let hash = <[u8; 32]>::try_from(hash).map_err(|_| Malformed("root is not 32 bytes"))?;
        if origin_line.is_empty() {
            return Err(Malformed("empty origin line"));
        }
        let body = signatures
            .strip_suffix('\n')
            .ok_or(Malformed("the last line does not end in a newline"))?;
        let signatures = body
            .split('\n')
            .map(|line| {
                line.strip_prefix("\u{2014} ")
                    .ok_or(Malformed("a signature line has no dash"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let origin_line = origin_line.to_owned();
        Ok((
            Self {
                origin_line,
                size: number,
                root: Sha256Hash::from_bytes(hash),
            },
            signatures,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (LogKey, Checkpoint) {
        let key = LogKey::from_seed(&[3; 32]).unwrap();
        let checkpoint = Checkpoint {
            origin_line: "tidelock/site/n1/0123456789abcdef/1".to_owned(),
            size: 42,
            root: Sha256Hash::of(b"root"),
        };
        (key, checkpoint)
    }

    #[test]
    fn round_trip_and_every_flipped_byte_refused() {
        let (key, checkpoint) = sample();
        let note = checkpoint.sign(&key);
        let line = checkpoint.origin_line.clone();
        assert_eq!(
            Checkpoint::verify(&note, &line, &key.public()),
            Ok(checkpoint.clone())
        );
        assert_eq!(Checkpoint::parse(&note), Ok(checkpoint));
        for at in 0..note.len() {
            let mut bytes = note.clone().into_bytes();
            bytes[at] ^= 1;
            if let Ok(text) = String::from_utf8(bytes) {
                assert!(
                    Checkpoint::verify(&text, &line, &key.public()).is_err(),
                    "byte {at}"
                );
            }
        }
    }

    #[test]
    fn another_key_or_log_is_refused() {
        let (key, checkpoint) = sample();
        let note = checkpoint.sign(&key);
        let other = LogKey::from_seed(&[4; 32]).unwrap();
        assert_eq!(
            Checkpoint::verify(&note, &checkpoint.origin_line, &other.public()),
            Err(CheckpointError::Signature)
        );
        assert!(matches!(
            Checkpoint::verify(&note, "tidelock/site/n2/0123456789abcdef/1", &key.public()),
            Err(CheckpointError::Origin { .. })
        ));
    }

    #[test]
    fn further_signatures_are_carried() {
        let (key, checkpoint) = sample();
        let mut note = checkpoint.sign(&key);
        note.push_str("\u{2014} some.witness AAAAAAA=\n");
        assert!(Checkpoint::verify(&note, &checkpoint.origin_line, &key.public()).is_ok());
    }

    #[test]
    fn malformed_notes() {
        let (key, checkpoint) = sample();
        let good = checkpoint.sign(&key);
        for bad in [
            "".to_owned(),
            good.replace("\n42\n", "\n042\n"),
            good.replace("\n42\n", "\n+42\n"),
            good.replace("\n42\n", "\n42\nextra\n"),
            good.trim_end().to_owned(),
            format!("{good}junk\n"),
            "x".repeat(100_000),
        ] {
            assert!(Checkpoint::parse(&bad).is_err(), "{bad:?}");
        }
    }
}
