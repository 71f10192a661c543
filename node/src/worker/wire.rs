//! What a node and its worker say to each other: one question, one answer, each once.
//!
//! A frame is a length (u32, little endian) and so many bytes. The question is two frames, what is
//! asked (JSON) and the archive; the answer is one (JSON).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tidelock_policy::{Examined, limits::ARCHIVE_BYTES_MAX};
use tidelock_prover::{Counterexample, ModelOf, Questions, limits::PROOF_MODEL_BYTES_MAX};

/// What a worker is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum Ask {
    /// Compile the archive as a node would, and run its tests.
    Examine {
        /// Domain of the node.
        domain: String,
        /// Its version.
        node_version: String,
    },
    /// Tell what the archive holds.
    Inspect,
    /// What a solver has to be asked, so that the second archive is proved to permit nothing that the first
    /// does not. They come as one, the first of this length.
    Questions {
        /// Bytes of the first.
        before_bytes: usize,
    },
    /// Whether a solver's model shows a request that the second archive permits and the first does not. The model
    /// follows the two.
    Confirm {
        /// Bytes of the first archive.
        before_bytes: usize,
        /// Bytes of the second.
        after_bytes: usize,
        /// The question.
        about: String,
        /// Which of its models.
        whose: ModelOf,
    },
    /// Nothing but to say how it is confined.
    Probe,
}

impl Ask {
    /// Bytes of what comes after the question, at most.
    pub(super) fn bytes_max(&self) -> usize {
        match self {
            Self::Examine { .. } | Self::Inspect | Self::Probe => ARCHIVE_BYTES_MAX,
            Self::Questions { .. } => 2 * ARCHIVE_BYTES_MAX,
            Self::Confirm { .. } => 2 * ARCHIVE_BYTES_MAX + PROOF_MODEL_BYTES_MAX,
        }
    }
}

/// What a worker answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Answer {
    /// How it is confined, as it found out after it had confined itself.
    pub(super) confinement: Confinement,
    /// What it found.
    pub(super) verdict: Verdict,
}

/// What a worker found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(super) enum Verdict {
    /// The bundle compiles and passes its tests.
    Passed(Examined),
    /// What it holds.
    Inspected(Value),
    /// What a solver has to be asked.
    Questions(Questions),
    /// The request that a model stands for, if both archives say so.
    Confirmed(Option<Box<Counterexample>>),
    /// Nothing was asked.
    Probed,
    /// It does not pass.
    Refused {
        /// A code of the bundle's refusals.
        code: String,
        /// For whoever must act.
        message: String,
    },
    /// The worker could not confine itself, and read nothing.
    Unconfined(String),
}

/// How a worker is confined: what the kernel says of it, not what was asked of the kernel (INV-05).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Confinement {
    /// It can gain no privileges.
    pub no_new_privs: bool,
    /// A filter of system calls holds.
    pub seccomp: bool,
    /// It has no capabilities.
    pub no_capabilities: bool,
    /// Its user, by number.
    pub uid: u32,
}

/// Writes one frame.
pub(super) fn write_frame(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(bytes)?;
    out.flush()
}

/// Reads one frame of at most `max` bytes. Memory grows with what arrives, not with what is claimed.
pub(super) fn read_frame(from: &mut impl Read, max: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u64::from(u32::from_le_bytes(length));
    if length > max as u64 {
        return Err(io::Error::other(format!(
            "a frame of {length} bytes, the limit is {max}"
        )));
    }
    let mut bytes = Vec::new();
    from.take(length).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_and_a_cut_or_long_one_does_not() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, b"archive").unwrap();
        assert_eq!(read_frame(&mut bytes.as_slice(), 7).unwrap(), b"archive");
        assert!(read_frame(&mut bytes.as_slice(), 6).is_err());
        for cut in 0..bytes.len() {
            assert!(read_frame(&mut &bytes[..cut], 7).is_err(), "{cut}");
        }
    }
}
