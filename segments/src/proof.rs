//! Proofs that travel: a record or a range of a log, for somebody who holds nothing but the log's key.
//!
//! A [`RecordProof`] shows that a record stands at an index of a log whose signed checkpoint it carries.
//! It is made from the record's own segment alone: the frontier in front of the segment and the leaves
//! in it are all that the path needs. A [`ConsistencyProof`] shows that a later checkpoint of a log
//! extends an earlier one. Both are pure values with a JSON form (`docs/src/format.md`, "Proofs"); the
//! key has to come from elsewhere: an endorsement whose certificate chain was judged, or an operator.
//!
//! ```text
//! {"v": 1, "type": "record", "index": 41, "record_base64": "eyJ…", "path": ["sha256:…", …],
//!  "checkpoint": "tidelock/site/n1/…\n42\n…\n\n— tidelock/… …\n"}
//! {"v": 1, "type": "consistency", "path": ["sha256:…", …], "older": "…", "newer": "…"}
//! ```

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::body::{AuditBody, BodyError};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::crypt::KeyUnwrap;
use crate::id::Sha256Hash;
use crate::keys::LogPublicKey;
use crate::merkle::{self, MerkleError, PartialTree};

/// Why a proof was not made or not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// The segment cannot be read, or its records do not lead to its checkpoint.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// The checkpoint is malformed, of another log, or not signed by the key.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The path does not lead from the record, or from the older root, to the root.
    #[error("path: {0}")]
    Path(#[from] MerkleError),
    /// A version of the JSON form that this reader does not know.
    #[error("proof version {0} is not known")]
    Version(u32),
    /// Segments that do not follow one another.
    #[error("the segments are not consecutive ones of one log")]
    Order,
}

/// The version of the JSON form.
const VERSION: u32 = 1;

/// Which of the two a JSON object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RecordTag {
    Record,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ConsistencyTag {
    Consistency,
}

/// A record, and that it is the one at its index in a log with this signed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordProof {
    #[serde(rename = "v")]
    version: u32,
    #[serde(rename = "type")]
    tag: RecordTag,
    /// The record's index in its log.
    pub index: u64,
    /// The bytes of the record.
    #[serde(
        rename = "record_base64",
        serialize_with = "to_base64",
        deserialize_with = "from_base64"
    )]
    pub record: Vec<u8>,
    /// The audit path, bottom first (RFC 6962, 2.1.1).
    pub path: Vec<Sha256Hash>,
    /// The signed note of the checkpoint whose root the path leads to.
    pub checkpoint: String,
}

/// That the log of one checkpoint continues the log of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsistencyProof {
    #[serde(rename = "v")]
    version: u32,
    #[serde(rename = "type")]
    tag: ConsistencyTag,
    /// The proof (RFC 6962, 2.1.2).
    pub path: Vec<Sha256Hash>,
    /// The signed note of the earlier checkpoint.
    pub older: String,
    /// The signed note of the later one.
    pub newer: String,
}

impl RecordProof {
    /// The proof of one record from a tree that holds its leaf, against the checkpoint of that tree.
    pub(crate) fn from_tree(
        tree: &PartialTree,
        index: u64,
        record: Vec<u8>,
        checkpoint: String,
    ) -> Result<Self, MerkleError> {
        Ok(Self {
            version: VERSION,
            tag: RecordTag::Record,
            index,
            record,
            path: tree.inclusion_proof(index)?,
            checkpoint,
        })
    }
}

impl ConsistencyProof {
    /// The proof that the checkpoint `newer` of this tree extends `older`.
    pub(crate) fn from_tree(
        tree: &PartialTree,
        older: String,
        newer: String,
    ) -> Result<Self, ProofError> {
        let size = Checkpoint::parse(&older)?.size;
        Ok(Self {
            version: VERSION,
            tag: ConsistencyTag::Consistency,
            path: tree.consistency_proof(size)?,
            older,
            newer,
        })
    }
}

fn to_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD
        .decode(text)
        .map_err(|_| serde::de::Error::custom("expected standard base64"))
}

/// Proves one record of a segment against the segment's own checkpoint. Every leaf of the segment is
/// read, and a segment whose records do not lead to its checkpoint gives no proof; the checkpoint's
/// signature is for [`verify_record_proof`].
///
/// # Errors
/// [`ProofError::Body`] if the record is not in it or cannot be read.
pub fn prove_record(
    body: &AuditBody<'_>,
    index: u64,
    keys: Option<&dyn KeyUnwrap>,
) -> Result<RecordProof, ProofError> {
    let record = body.record(index, keys)?;
    let checkpoint = body.checkpoint_note().to_owned();
    Ok(RecordProof::from_tree(
        &body.tree(keys)?,
        index,
        record,
        checkpoint,
    )?)
}

/// Checks a proof with the log's key: the checkpoint's signature and log, and that the record stands
/// at its index in the tree of that checkpoint, which is given back.
///
/// # Errors
/// [`ProofError`] telling what does not fit.
pub fn verify_record_proof(
    proof: &RecordProof,
    key: &LogPublicKey,
    origin_line: &str,
) -> Result<Checkpoint, ProofError> {
    if proof.version != VERSION {
        return Err(ProofError::Version(proof.version));
    }
    let checkpoint = Checkpoint::verify(&proof.checkpoint, origin_line, key)?;
    merkle::verify_inclusion(
        &merkle::leaf_hash(&proof.record),
        proof.index,
        checkpoint.size,
        &proof.path,
        &checkpoint.root,
    )?;
    Ok(checkpoint)
}

/// Proves that the last of these consecutive segments' checkpoint extends `older`, a checkpoint that
/// lies at or after the start of the first of them: at one of their ends, or anywhere inside.
///
/// # Errors
/// [`ProofError::Order`] if they do not follow one another, [`ProofError::Path`] if `older` lies outside,
/// [`ProofError::Body`] if one cannot be read or does not lead to its checkpoint.
pub fn prove_consistency(
    older: &str,
    segments: &[AuditBody<'_>],
    keys: Option<&dyn KeyUnwrap>,
) -> Result<ConsistencyProof, ProofError> {
    let old = Checkpoint::parse(older)?;
    let (first, rest) = segments.split_first().ok_or(ProofError::Order)?;
    let mut tree = first.tree(keys)?;
    let mut newer = first.checkpoint_note();
    for body in rest {
        let follows = body.frontier_before().size() == tree.size()
            && body.frontier_before().root() == tree.root();
        if !follows {
            return Err(ProofError::Order);
        }
        for leaf in body.tree(keys)?.leaves() {
            tree.push(*leaf);
        }
        newer = body.checkpoint_note();
    }
    if Checkpoint::parse(newer)?.origin_line != old.origin_line {
        return Err(ProofError::Order);
    }
    ConsistencyProof::from_tree(&tree, older.to_owned(), newer.to_owned())
}

/// Checks with the log's key that the newer checkpoint extends the older one, and gives both.
///
/// # Errors
/// [`ProofError`] telling what does not fit.
pub fn verify_consistency_proof(
    proof: &ConsistencyProof,
    key: &LogPublicKey,
    origin_line: &str,
) -> Result<(Checkpoint, Checkpoint), ProofError> {
    if proof.version != VERSION {
        return Err(ProofError::Version(proof.version));
    }
    let older = Checkpoint::verify(&proof.older, origin_line, key)?;
    let newer = Checkpoint::verify(&proof.newer, origin_line, key)?;
    merkle::verify_consistency(
        older.size,
        newer.size,
        &proof.path,
        &older.root,
        &newer.root,
    )?;
    Ok((older, newer))
}
