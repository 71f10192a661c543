//! Segment format version 1: sealing and verifying. The bytes are laid out in `docs/src/format.md`.
//!
//! A segment is `magic | header length | header | body length | body | trailer length | trailer`,
//! and its id is BLAKE3 over all of it. Policy and revocation segments carry no signature of a node
//! and no time, so that two nodes that import the same content make the same segment. Audit
//! segments must be signed by the log key that their origin names.
//!
//! Start at [`verify_segment`]: the only way to a [`VerifiedSegment`], which the store demands.
//! What it does not judge is the endorsement's certificate chain (X.509 belongs to the transport)
//! and the bodies of policy and revocation segments (their owners verify those).

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::body::{self, AuditSpan, BodyError};
use crate::codec::{self, CodecError};
use crate::id::{DomainId, Kind, Origin, SegmentId};
use crate::keys::{Endorsement, LogKey, LogPublicKey};
use crate::limits::{
    MAX_BODY_BYTES, MAX_HEAD_RANGES, MAX_HEADER_BYTES, MAX_SEGMENT_BYTES, MAX_TRAILER_BYTES,
};

/// The first eight bytes of every segment; the digit is the format version.
pub const MAGIC: &[u8; 8] = b"TIDESEG1";

/// What stands before the hash that a log key signs for a segment.
pub(crate) const SIGNATURE_CONTEXT: &[u8] = b"tidelock segment v1\0";

/// Why bytes are not a good segment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes hash to another id.
    #[error("the bytes have id {actual} where {expected} was expected")]
    WrongId {
        /// The id asked for.
        expected: SegmentId,
        /// The id of the bytes.
        actual: SegmentId,
    },
    /// Not a segment of a known version.
    #[error("not a segment of format version 1")]
    Magic,
    /// Longer than a segment, its header, body or trailer may be.
    #[error("{part} of {length} bytes exceeds the limit of {max}")]
    TooLong {
        /// Which part.
        part: &'static str,
        /// Its length.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// The lengths inside do not add up to the bytes that are there.
    #[error("truncated or with bytes left over, in the {part}")]
    Length {
        /// Where the mismatch shows.
        part: &'static str,
    },
    /// Header or trailer are no canonical encoding.
    #[error("bad {part}: {fault}")]
    Codec {
        /// Which part.
        part: &'static str,
        /// What is wrong with it.
        fault: CodecError,
    },
    /// A segment of another domain.
    #[error("segment of domain {found} refused; this node belongs to {expected}")]
    Domain {
        /// The segment's domain.
        found: DomainId,
        /// This node's domain.
        expected: DomainId,
    },
    /// The kind in the header is not the kind of the origin.
    #[error("a {kind} segment cannot belong to the origin {origin}")]
    KindOrigin {
        /// The header's kind.
        kind: Kind,
        /// The header's origin.
        origin: Origin,
    },
    /// A policy or revocation segment with a time, a previous id or a signature.
    #[error("a {kind} segment carries no time, link or node signature, so that all make it alike")]
    NotDeterministic {
        /// The header's kind.
        kind: Kind,
    },
    /// An audit segment without a signature.
    #[error("an audit segment must be signed by its log key")]
    Unsigned,
    /// The first segment of a log names a predecessor, or a later one names none.
    #[error("sequence {sequence} and the link to the previous segment contradict each other")]
    Link {
        /// The header's sequence.
        sequence: u64,
    },
    /// Signer, endorsement and origin do not name the same node, key and incarnation.
    #[error("signer, endorsement and origin {origin} do not agree")]
    Signer {
        /// The header's origin.
        origin: Origin,
    },
    /// The signature does not verify.
    #[error("the log key's signature does not verify")]
    Signature,
    /// The body of an audit segment is malformed.
    #[error("bad audit body: {0}")]
    Body(#[from] BodyError),
}

/// The header: what a segment is, without its content.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct SegmentHeader {
    /// What it carries.
    pub kind: Kind,
    /// The domain it belongs to.
    pub domain: DomainId,
    /// The log it belongs to.
    pub origin: Origin,
    /// Its position in that log: CRL number, bundle epoch or running number from 0.
    pub sequence: u64,
    /// The id of the audit segment before it.
    pub prev: Option<SegmentId>,
    /// When it was sealed; 0 for policy and revocation.
    pub created_unix_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
struct SegmentSignature {
    log_key: LogPublicKey,
    signature: [u8; 64],
    endorsement: Endorsement,
}

/// All that an index, a peer or a list needs to know of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct SegmentRef {
    /// Its id.
    pub id: SegmentId,
    /// What it carries.
    pub kind: Kind,
    /// The log it belongs to.
    pub origin: Origin,
    /// Its position in that log.
    pub sequence: u64,
    /// The length of its file.
    pub size_bytes: u64,
    /// The id of the audit segment before it.
    pub prev: Option<SegmentId>,
}

/// What a node holds of one origin.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Head {
    /// The origin.
    pub origin: Origin,
    /// The sequences held: inclusive, ascending, apart by at least one, at most 32 ranges.
    pub ranges: Vec<(u64, u64)>,
    /// The id of the segment with the highest sequence held.
    pub last_id: SegmentId,
}

impl Head {
    /// Builds a head from ascending sequences; keeps the highest ranges where there are too many.
    #[must_use]
    pub fn from_sequences(
        origin: Origin,
        sequences: impl IntoIterator<Item = u64>,
        last_id: SegmentId,
    ) -> Self {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for sequence in sequences {
            match ranges.last_mut() {
                Some((_, end)) if end.checked_add(1) == Some(sequence) => *end = sequence,
                Some((_, end)) if *end >= sequence => {}
                _ => ranges.push((sequence, sequence)),
            }
        }
        let surplus = ranges.len().saturating_sub(MAX_HEAD_RANGES);
        ranges.drain(..surplus);
        Self {
            origin,
            ranges,
            last_id,
        }
    }

    /// Whether the ranges are ascending, apart, not empty and within the limit, as a head from
    /// outside must be before it is used.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        let apart = |pair: &[(u64, u64)]| match pair {
            [(_, a), (b, _)] => a.checked_add(1).is_some_and(|next| next < *b),
            _ => true,
        };
        !self.ranges.is_empty()
            && self.ranges.len() <= MAX_HEAD_RANGES
            && self.ranges.iter().all(|(from, to)| from <= to)
            && self.ranges.windows(2).all(apart)
    }
}

fn prefix(header: &SegmentHeader, body: &[u8]) -> Result<Vec<u8>, FormatError> {
    let body_len = body.len() as u64;
    if body_len > MAX_BODY_BYTES {
        return Err(FormatError::TooLong {
            part: "body",
            length: body_len,
            max: MAX_BODY_BYTES,
        });
    }
    let head =
        codec::encode::<_, MAX_HEADER_BYTES>(header).map_err(|fault| FormatError::Codec {
            part: "header",
            fault,
        })?;
    let mut out =
        Vec::with_capacity(MAGIC.len() + 4 + head.len() + 8 + body.len() + MAX_TRAILER_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&u32_len(head.len()).to_le_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(&body_len.to_le_bytes());
    out.extend_from_slice(body);
    Ok(out)
}

/// Lengths that are bounded by a `u16`- or `u32`-sized limit.
fn u32_len(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn push_trailer(out: &mut Vec<u8>, trailer: &Option<SegmentSignature>) -> Result<(), FormatError> {
    let bytes =
        codec::encode::<_, MAX_TRAILER_BYTES>(trailer).map_err(|fault| FormatError::Codec {
            part: "trailer",
            fault,
        })?;
    out.extend_from_slice(&u32_len(bytes.len()).to_le_bytes());
    out.extend_from_slice(&bytes);
    out.shrink_to_fit();
    Ok(())
}

/// Makes the bytes of a policy, revocation or witness segment.
///
/// # Errors
/// [`FormatError`] if the header breaks a rule of its kind or a limit is exceeded.
pub fn seal_unsigned(header: &SegmentHeader, body: &[u8]) -> Result<Vec<u8>, FormatError> {
    check_header(header, false)?;
    let mut out = prefix(header, body)?;
    push_trailer(&mut out, &None)?;
    Ok(out)
}

/// Makes the bytes of a segment signed by a log key.
///
/// # Errors
/// [`FormatError`] if the header, key and endorsement do not agree or a limit is exceeded.
pub fn seal_signed(
    header: &SegmentHeader,
    body: &[u8],
    key: &LogKey,
    endorsement: &Endorsement,
) -> Result<Vec<u8>, FormatError> {
    check_header(header, true)?;
    check_signer(header, &key.public(), endorsement)?;
    let mut out = prefix(header, body)?;
    let digest = blake3::hash(&out);
    let signature = key.sign(&signed_message(&digest));
    let endorsement = endorsement.clone();
    push_trailer(
        &mut out,
        &Some(SegmentSignature {
            log_key: key.public(),
            signature,
            endorsement,
        }),
    )?;
    Ok(out)
}

fn signed_message(prefix_hash: &blake3::Hash) -> Vec<u8> {
    [SIGNATURE_CONTEXT, prefix_hash.as_bytes()].concat()
}

fn check_header(header: &SegmentHeader, signed: bool) -> Result<(), FormatError> {
    let kind = header.kind;
    if header.origin.kind() != kind {
        return Err(FormatError::KindOrigin {
            kind,
            origin: header.origin.clone(),
        });
    }
    match kind {
        Kind::Policy | Kind::Revocation => {
            if signed || header.prev.is_some() || header.created_unix_ms != 0 {
                return Err(FormatError::NotDeterministic { kind });
            }
        }
        Kind::Audit | Kind::Witness => {
            if !signed {
                return Err(FormatError::Unsigned);
            }
            if header.prev.is_some() != (header.sequence > 0) {
                return Err(FormatError::Link {
                    sequence: header.sequence,
                });
            }
        }
    }
    Ok(())
}

fn check_signer(
    header: &SegmentHeader,
    log_key: &LogPublicKey,
    endorsement: &Endorsement,
) -> Result<(), FormatError> {
    endorsement
        .check_limits()
        .map_err(|fault| FormatError::Codec {
            part: "endorsement",
            fault,
        })?;
    let agrees = endorsement.log_key == *log_key
        && Origin::audit(&endorsement.node_id, log_key, endorsement.incarnation) == header.origin;
    if agrees {
        Ok(())
    } else {
        Err(FormatError::Signer {
            origin: header.origin.clone(),
        })
    }
}

/// A segment whose bytes were checked from first to last. The fields are private and
/// [`verify_segment`] is the only constructor, so nothing unverified reaches the store:
///
/// ```compile_fail
/// use tidelock_segments::{SegmentId, VerifiedSegment};
/// let forged = VerifiedSegment { id: SegmentId::of(b""), bytes: Vec::new() };
/// ```
///
/// The positive control:
///
/// ```
/// use tidelock_segments::{DomainId, Kind, Origin, SegmentHeader, seal_unsigned, verify_segment};
/// let header = SegmentHeader {
///     kind: Kind::Policy,
///     domain: DomainId::new("site")?,
///     origin: Origin::policy("base")?,
///     sequence: 1,
///     prev: None,
///     created_unix_ms: 0,
/// };
/// let segment = verify_segment(seal_unsigned(&header, b"bundle")?, None, &header.domain)?;
/// assert_eq!(segment.body(), b"bundle");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedSegment {
    id: SegmentId,
    header: SegmentHeader,
    bytes: Vec<u8>,
    body_at: (usize, usize),
    signature: Option<SegmentSignature>,
    span: Option<AuditSpan>,
}

impl VerifiedSegment {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Its header.
    #[must_use]
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Its content.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        self.bytes
            .get(self.body_at.0..self.body_at.1)
            .unwrap_or_default()
    }

    /// The endorsement of the log key that signed it, if it is signed.
    #[must_use]
    pub fn endorsement(&self) -> Option<&Endorsement> {
        self.signature.as_ref().map(|s| &s.endorsement)
    }

    /// First and last record index and the root at the last, of an audit segment.
    #[must_use]
    pub fn audit_span(&self) -> Option<AuditSpan> {
        self.span
    }

    /// Every byte of its file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the bytes away.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Its reference.
    #[must_use]
    pub fn reference(&self) -> SegmentRef {
        SegmentRef {
            id: self.id,
            kind: self.header.kind,
            origin: self.header.origin.clone(),
            sequence: self.header.sequence,
            size_bytes: self.bytes.len() as u64,
            prev: self.header.prev,
        }
    }
}

/// Takes `count` bytes from the front of the rest.
pub(crate) fn take<'a>(
    rest: &mut &'a [u8],
    count: usize,
    part: &'static str,
) -> Result<&'a [u8], FormatError> {
    let (head, tail) = rest
        .split_at_checked(count)
        .ok_or(FormatError::Length { part })?;
    *rest = tail;
    Ok(head)
}

fn take_array<const N: usize>(
    rest: &mut &[u8],
    part: &'static str,
) -> Result<[u8; N], FormatError> {
    <[u8; N]>::try_from(take(rest, N, part)?).map_err(|_| FormatError::Length { part })
}

fn bounded(part: &'static str, length: u64, max: u64) -> Result<usize, FormatError> {
    match usize::try_from(length) {
        Ok(n) if length <= max => Ok(n),
        _ => Err(FormatError::TooLong { part, length, max }),
    }
}

/// Reads magic and header from the front of a file, for an index that does not read bodies.
/// The header is well-formed and the rest unverified; `get` verifies before anything is served.
pub(crate) fn peek_header(rest: &mut &[u8]) -> Result<(SegmentHeader, u64), FormatError> {
    if take(rest, MAGIC.len(), "magic")? != MAGIC {
        return Err(FormatError::Magic);
    }
    let length = u32::from_le_bytes(take_array(rest, "header length")?);
    let length = bounded("header", length.into(), MAX_HEADER_BYTES as u64)?;
    let header: SegmentHeader = codec::decode::<_, MAX_HEADER_BYTES>(take(rest, length, "header")?)
        .map_err(|fault| FormatError::Codec {
            part: "header",
            fault,
        })?;
    let body_len = u64::from_le_bytes(take_array(rest, "body length")?);
    bounded("body", body_len, MAX_BODY_BYTES)?;
    Ok((header, body_len))
}

/// Reads the endorsement from a trailer with its length before it. Nothing of it is verified.
pub(crate) fn parse_trailer(mut rest: &[u8]) -> Result<Option<Endorsement>, FormatError> {
    let length = u32::from_le_bytes(take_array(&mut rest, "trailer length")?);
    let length = bounded("trailer", length.into(), MAX_TRAILER_BYTES as u64)?;
    let trailer = take(&mut rest, length, "trailer")?;
    let signature: Option<SegmentSignature> = codec::decode::<_, MAX_TRAILER_BYTES>(trailer)
        .map_err(|fault| FormatError::Codec {
            part: "trailer",
            fault,
        })?;
    Ok(signature.map(|signature| signature.endorsement))
}

/// Checks every byte of a segment: id, layout, canonical encoding, domain, rules of its kind and, if
/// it is an audit segment, the log key's signature and the form of its body. The endorsement's
/// certificate chain is not judged here.
///
/// # Errors
/// [`FormatError`] naming the first rule that is broken.
pub fn verify_segment(
    bytes: Vec<u8>,
    expected: Option<SegmentId>,
    domain: &DomainId,
) -> Result<VerifiedSegment, FormatError> {
    let length = bytes.len() as u64;
    bounded("segment", length, MAX_SEGMENT_BYTES)?;
    let mut rest = bytes.as_slice();
    let parsed = parse_layout(&mut rest);
    // One pass: the hash of the prefix, which is what is signed, then of the trailer as well.
    let prefix_len = parsed
        .as_ref()
        .map_or(bytes.len(), |layout| layout.prefix_len);
    let (signed_part, trailer_part) = bytes.split_at_checked(prefix_len).unwrap_or((&bytes, &[]));
    let mut hasher = blake3::Hasher::new();
    hasher.update(signed_part);
    let prefix_hash = hasher.finalize();
    hasher.update(trailer_part);
    let id = SegmentId::from_bytes(*hasher.finalize().as_bytes());
    if let Some(expected) = expected
        && expected != id
    {
        return Err(FormatError::WrongId {
            expected,
            actual: id,
        });
    }
    let Layout {
        header,
        body_at,
        trailer,
        ..
    } = parsed?;
    let signature: Option<SegmentSignature> = codec::decode::<_, MAX_TRAILER_BYTES>(trailer)
        .map_err(|fault| FormatError::Codec {
            part: "trailer",
            fault,
        })?;
    if header.domain != *domain {
        return Err(FormatError::Domain {
            found: header.domain,
            expected: domain.clone(),
        });
    }
    check_header(&header, signature.is_some())?;
    if let Some(signature) = &signature {
        check_signer(&header, &signature.log_key, &signature.endorsement)?;
        signature
            .log_key
            .verify(&signed_message(&prefix_hash), &signature.signature)
            .map_err(|_| FormatError::Signature)?;
    }
    let span = match header.kind {
        Kind::Audit => {
            let body = bytes.get(body_at.0..body_at.1).unwrap_or_default();
            Some(body::parse_body(body, domain, &header.origin)?.span())
        }
        _ => None,
    };
    Ok(VerifiedSegment {
        id,
        header,
        bytes,
        body_at,
        signature,
        span,
    })
}

struct Layout<'a> {
    header: SegmentHeader,
    body_at: (usize, usize),
    prefix_len: usize,
    trailer: &'a [u8],
}

fn parse_layout<'a>(rest: &mut &'a [u8]) -> Result<Layout<'a>, FormatError> {
    let total = rest.len();
    let (header, body_len) = peek_header(rest)?;
    let body_from = total - rest.len();
    let body_len = bounded("body", body_len, MAX_BODY_BYTES)?;
    take(rest, body_len, "body")?;
    let prefix_len = total - rest.len();
    let length = u32::from_le_bytes(take_array(rest, "trailer length")?);
    let length = bounded("trailer", length.into(), MAX_TRAILER_BYTES as u64)?;
    let trailer = take(rest, length, "trailer")?;
    if !rest.is_empty() {
        return Err(FormatError::Length { part: "trailer" });
    }
    Ok(Layout {
        header,
        body_at: (body_from, body_from + body_len),
        prefix_len,
        trailer,
    })
}
