//! The one place where bincode is called in this crate.
//!
//! Configuration: little endian, integers of fixed width, lengths as `u64`. Decoding bounds the
//! bytes it will read before it allocates, refuses trailing bytes, and refuses every encoding that
//! is not the one that encoding the decoded value gives (so one value has one byte form).

use bincode::config::{self, Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

/// A byte string is not the canonical encoding of the value it should hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// Longer than the limit for its type.
    #[error("{length} bytes where at most {max} are allowed")]
    TooLong {
        /// Its length.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// The decoder refused it.
    #[error("malformed: {0}")]
    Malformed(String),
    /// It decodes, but another encoding of the same value exists.
    #[error("not in canonical form")]
    NotCanonical,
}

const fn config<const MAX: usize>() -> Configuration<LittleEndian, Fixint, Limit<MAX>> {
    config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<MAX>()
}

/// Encodes a value; fails only if the encoding would exceed `MAX`.
pub(crate) fn encode<T: Encode, const MAX: usize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::encode_to_vec(value, config::<MAX>())
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
    if bytes.len() > MAX {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            max: MAX,
        });
    }
    Ok(bytes)
}

/// Decodes a value that must fill the whole input.
pub(crate) fn decode<T: Encode + Decode<()>, const MAX: usize>(
    bytes: &[u8],
) -> Result<T, CodecError> {
    if bytes.len() > MAX {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            max: MAX,
        });
    }
    let (value, used) = bincode::decode_from_slice::<T, _>(bytes, config::<MAX>())
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() || encode::<T, MAX>(&value)? != bytes {
        return Err(CodecError::NotCanonical);
    }
    Ok(value)
}
