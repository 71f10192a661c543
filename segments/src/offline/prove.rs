//! Proofs from the files of a root: one document that says of a record all that an outsider needs.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Offline, OfflineError, Source, log_records};
use crate::body::{self, BodyError};
use crate::checkpoint::{self, Checkpoint};
use crate::format::FormatError;
use crate::frame::{self, LogHeader};
use crate::id::{DomainId, Kind, Origin, Sha256Hash};
use crate::keys::{Endorsement, LogPublicKey};
use crate::limits::MAX_ENDORSEMENT_BYTES;
use crate::log::STATE_PATH;
use crate::merkle::{PartialTree, leaf_hash};
use crate::proof::{
    ConsistencyProof, ProofError, RecordProof, verify_consistency_proof, verify_record_proof,
};

const ENDORSEMENT_PATH: &str = "keys/endorsement";
const VERSION: u32 = 1;

/// Why there is no proof, or why one is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LogProofError {
    /// A file cannot be read.
    #[error(transparent)]
    Offline(#[from] OfflineError),
    /// The proof itself.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// A version that this reader does not know.
    #[error("proof document version {0} is not known")]
    Version(u32),
    /// No such record is held.
    #[error("record {0} is not held; tidelock audit stat says what is")]
    NotHeld(u64),
    /// No signed head covers the record yet.
    #[error(
        "record {0} is written and no signed head covers it yet; tidelock audit seal --apply, or the \
         next record, makes one"
    )]
    NotCovered(u64),
    /// The endorsement is not for the log of the proof.
    #[error("the endorsement is not for the log {0}")]
    Endorsement(Origin),
    /// The key is not the one that signs this log.
    #[error("the log's key is another one")]
    Key,
    /// The later checkpoint is shown to continue another one than the record's.
    #[error("the consistency proof does not begin at the record's checkpoint")]
    Order,
}

/// A record, its place in a signed log, and who vouches for the log's key. Complete in itself: only
/// the CA behind the endorsement, or the key, has to be known already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogProof {
    #[serde(rename = "v")]
    version: u32,
    /// The domain.
    pub domain: DomainId,
    /// The log.
    pub origin: Origin,
    /// Whose log it is, by whose certificate.
    #[serde(
        rename = "endorsement_base64",
        serialize_with = "to_base64",
        deserialize_with = "from_base64"
    )]
    pub endorsement: Endorsement,
    /// The record and its path to the checkpoint.
    pub proof: RecordProof,
    /// That a later checkpoint continues that one.
    pub consistency: Option<ConsistencyProof>,
}

fn to_base64<S: Serializer>(endorsement: &Endorsement, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = endorsement.encode().map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Endorsement, D::Error> {
    let text = String::deserialize(deserializer)?;
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| serde::de::Error::custom("expected standard base64"))?;
    Endorsement::decode(&bytes).map_err(serde::de::Error::custom)
}

impl LogProof {
    /// Checks everything but the endorsement's certificate chain and signature, with the log's key:
    /// that the endorsement is for this log and key, that the checkpoint is signed, that the record
    /// stands at its index, and that the later checkpoint, if there is one, continues it. Gives the
    /// newest checkpoint.
    ///
    /// # Errors
    /// [`LogProofError`] telling what does not fit.
    pub fn verify(&self, key: &LogPublicKey) -> Result<Checkpoint, LogProofError> {
        if self.version != VERSION {
            return Err(LogProofError::Version(self.version));
        }
        let of = &self.endorsement;
        if Origin::audit(&of.node_id, &of.log_key, of.incarnation) != self.origin {
            return Err(LogProofError::Endorsement(self.origin.clone()));
        }
        if of.log_key != *key {
            return Err(LogProofError::Key);
        }
        let line = checkpoint::origin_line(&self.domain, &self.origin).unwrap_or_default();
        let checkpoint = verify_record_proof(&self.proof, key, &line)?;
        let Some(consistency) = &self.consistency else {
            return Ok(checkpoint);
        };
        let (older, newer) = verify_consistency_proof(consistency, key, &line)?;
        if older != checkpoint || consistency.older != self.proof.checkpoint {
            return Err(LogProofError::Order);
        }
        Ok(newer)
    }
}

/// What is written of a log and not sealed yet: leaves, and the newest signed head over them.
struct Unsealed {
    /// Of each file: its header, and its records as `length | bytes`.
    files: Vec<(LogHeader, Vec<u8>)>,
    head: Option<(u64, String)>,
}

impl Offline<'_> {
    /// Proves one record of a log against the checkpoint of its own segment, or, if it is not sealed
    /// yet, against the newest signed head. With `latest`, that the newest checkpoint held continues
    /// it. A proof is checked with the key in its endorsement before it is given.
    ///
    /// # Errors
    /// [`LogProofError`].
    pub fn prove(
        &self,
        origin: &Origin,
        index: u64,
        latest: bool,
    ) -> Result<LogProof, LogProofError> {
        // Where the index leads to no proof, it may have led astray.
        self.prove_by(Source::Index, origin, index, latest)
            .or_else(|_| self.prove_by(Source::Headers, origin, index, latest))
    }

    fn prove_by(
        &self,
        source: Source,
        origin: &Origin,
        index: u64,
        latest: bool,
    ) -> Result<LogProof, LogProofError> {
        let chain = self.chain_before(origin, u64::MAX, None, source)?;
        let unsealed = self.unsealed(origin)?;
        let place = chain
            .iter()
            .position(|(_, span)| (span.first..=span.last).contains(&index));
        let proof = match place {
            Some(place) => {
                let segments = chain.get(place..).unwrap_or_default();
                self.prove_sealed(origin, index, latest, segments, &unsealed)?
            }
            None => {
                self.prove_unsealed(origin, index, chain.last().map(|(id, _)| id), &unsealed)?
            }
        };
        proof.verify(&proof.endorsement.log_key)?;
        Ok(proof)
    }

    fn prove_sealed(
        &self,
        origin: &Origin,
        index: u64,
        latest: bool,
        segments: &[(crate::SegmentId, body::AuditSpan)],
        unsealed: &Unsealed,
    ) -> Result<LogProof, LogProofError> {
        let mut found = None;
        let mut tree: Option<PartialTree> = None;
        let mut newest = String::new();
        for (id, _) in segments {
            let segment = self
                .read(Kind::Audit, id)?
                .ok_or(LogProofError::NotHeld(index))?;
            let header = segment.header();
            let body = body::parse_body(segment.body(), &header.domain, &header.origin)
                .map_err(ProofError::from)?;
            let part = body.tree(self.keys()).map_err(ProofError::from)?;
            match &mut tree {
                None => {
                    let record = body.record(index, self.keys()).map_err(ProofError::from)?;
                    let note = body.checkpoint_note().to_owned();
                    let endorsement = segment
                        .endorsement()
                        .cloned()
                        .ok_or(OfflineError::Format(FormatError::Unsigned))?;
                    let proof = RecordProof::from_tree(&part, index, record, note)
                        .map_err(ProofError::from)?;
                    found = Some((proof, endorsement));
                    tree = Some(part);
                }
                Some(tree) => {
                    let before = body.frontier_before();
                    if before.size() != tree.size() || before.root() != tree.root() {
                        return Err(ProofError::Order.into());
                    }
                    part.leaves().iter().for_each(|leaf| tree.push(*leaf));
                }
            }
            newest = body.checkpoint_note().to_owned();
            if !latest {
                break;
            }
        }
        let (Some((proof, endorsement)), Some(mut tree)) = (found, tree) else {
            return Err(LogProofError::NotHeld(index));
        };
        let mut consistency = None;
        if latest {
            if let Some((size, note)) = &unsealed.head
                && *size > tree.size()
            {
                unsealed.extend(&mut tree, *size);
                newest.clone_from(note);
            }
            let older = proof.checkpoint.clone();
            consistency = Some(ConsistencyProof::from_tree(&tree, older, newest)?);
        }
        Ok(LogProof {
            version: VERSION,
            domain: self.domain.clone(),
            origin: origin.clone(),
            endorsement,
            proof,
            consistency,
        })
    }

    fn prove_unsealed(
        &self,
        origin: &Origin,
        index: u64,
        last_sealed: Option<&crate::SegmentId>,
        unsealed: &Unsealed,
    ) -> Result<LogProof, LogProofError> {
        let record = unsealed
            .record(index)
            .ok_or(LogProofError::NotHeld(index))?
            .to_vec();
        let (size, note) = unsealed
            .head
            .as_ref()
            .filter(|(size, _)| *size > index)
            .ok_or(LogProofError::NotCovered(index))?;
        let before = unsealed
            .files
            .first()
            .and_then(|(header, _)| header.tree().ok())
            .ok_or(LogProofError::NotHeld(index))?;
        let mut tree = PartialTree::new(before);
        unsealed.extend(&mut tree, *size);
        let proof =
            RecordProof::from_tree(&tree, index, record, note.clone()).map_err(ProofError::from)?;
        Ok(LogProof {
            version: VERSION,
            domain: self.domain.clone(),
            origin: origin.clone(),
            endorsement: self.endorsement_for(origin, last_sealed)?,
            proof,
            consistency: None,
        })
    }

    /// The node's newest endorsement, if it is for this log; else the one of its last segment.
    fn endorsement_for(
        &self,
        origin: &Origin,
        last_sealed: Option<&crate::SegmentId>,
    ) -> Result<Endorsement, LogProofError> {
        let kept = self
            .read_file(ENDORSEMENT_PATH, MAX_ENDORSEMENT_BYTES as u64)
            .map_err(OfflineError::from)?
            .and_then(|bytes| Endorsement::decode(&bytes).ok());
        let sealed = match last_sealed {
            Some(id) => self.endorsement(Kind::Audit, id)?,
            None => None,
        };
        kept.into_iter()
            .chain(sealed)
            .find(|e| Origin::audit(&e.node_id, &e.log_key, e.incarnation) == *origin)
            .ok_or_else(|| LogProofError::Endorsement(origin.clone()))
    }

    fn unsealed(&self, origin: &Origin) -> Result<Unsealed, OfflineError> {
        let mut files = Vec::new();
        let line = checkpoint::origin_line(&self.domain, origin).unwrap_or_default();
        let mut head = None;
        for (file, header, bytes) in self.log_bytes(origin)? {
            // A proof from a damaged file would look good and prove what never was.
            let scan = frame::scan(&bytes, &header, &line)
                .map_err(|_| OfflineError::Damaged(file.clone()))?;
            if let Some(mark) = scan.signed {
                let checkpoint = Checkpoint {
                    origin_line: line.clone(),
                    size: mark.size,
                    root: mark.root,
                };
                let note = checkpoint.with_signature(&header.log_key, &mark.signature);
                head = Some((mark.size, note));
            }
            files.push((header, scan.records));
        }
        Ok(Unsealed { files, head })
    }

    /// The index of the record with this leaf hash in a log, the newest if there are several.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn find_leaf(
        &self,
        origin: &Origin,
        leaf: &Sha256Hash,
    ) -> Result<Option<u64>, OfflineError> {
        for (_, header, bytes) in self.log_bytes(origin)?.iter().rev() {
            let records = log_records(header, bytes);
            let found = (header.first_index..)
                .zip(body::iter_records(&records))
                .filter(|(_, record)| leaf_hash(record) == *leaf)
                .last();
            if let Some((index, _)) = found {
                return Ok(Some(index));
            }
        }
        match self.find_sealed_leaf(Source::Index, origin, leaf) {
            Ok(Some(index)) => Ok(Some(index)),
            _ => self.find_sealed_leaf(Source::Headers, origin, leaf),
        }
    }

    fn find_sealed_leaf(
        &self,
        source: Source,
        origin: &Origin,
        leaf: &Sha256Hash,
    ) -> Result<Option<u64>, OfflineError> {
        let chain = self.chain_before(origin, u64::MAX, None, source)?;
        for (id, _) in chain.iter().rev() {
            let Some(segment) = self.read(Kind::Audit, id)? else {
                continue;
            };
            let header = segment.header();
            let body = body::parse_body(segment.body(), &header.domain, &header.origin)?;
            let tree = match body.tree(self.keys()) {
                // What cannot be read is passed over; the others are searched.
                Err(BodyError::Encrypted) => continue,
                other => other?,
            };
            if let Some(at) = tree.leaves().iter().rposition(|found| found == leaf) {
                return Ok(Some(body.span().first.saturating_add(at as u64)));
            }
        }
        Ok(None)
    }

    /// The own log, as the state file names it, or why there is none.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub fn own_origin(&self) -> Result<Origin, OfflineError> {
        self.own_log()?
            .map(|own| own.origin)
            .ok_or_else(|| OfflineError::Absent(STATE_PATH.to_owned()))
    }
}

impl Unsealed {
    fn records(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.files
            .iter()
            .flat_map(|(header, records)| (header.first_index..).zip(body::iter_records(records)))
    }

    fn record(&self, index: u64) -> Option<&[u8]> {
        self.records()
            .find(|(at, _)| *at == index)
            .map(|(_, record)| record)
    }

    /// Adds the leaves that the tree does not have, up to `size`.
    fn extend(&self, tree: &mut PartialTree, size: u64) {
        for (index, record) in self.records() {
            if index == tree.size() && index < size {
                tree.push(leaf_hash(record));
            }
        }
    }
}
