//! Proofs made from sealed segments, judged by the crate and by a second implementation of RFC 6962 that
//! is as short as its definitions.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helper functions of tests, which the lint does not see as tests"
)]

mod common;

use common::{Settings, domain};
use tidelock_segments::testing::SimDisk;
use tidelock_segments::{
    AuditBody, BodyError, CheckpointError, ConsistencyProof, LogKey, LogPublicKey, ProofError,
    RecordProof, Sha256Hash, VerifiedSegment, merkle::MerkleError, origin_line, parse_body,
    prove_consistency, prove_record, verify_consistency_proof, verify_record_proof,
};

/// RFC 6962, 2.1, as it is written there, over all leaves.
mod plain {
    use super::Sha256Hash;

    pub(super) fn leaf(record: &[u8]) -> Sha256Hash {
        Sha256Hash::of(&[&[0][..], record].concat())
    }

    pub(super) fn root(leaves: &[Sha256Hash]) -> Sha256Hash {
        match leaves {
            [] => Sha256Hash::of(b""),
            [one] => *one,
            _ => {
                let (left, right) = leaves.split_at(half(leaves.len()));
                node(&root(left), &root(right))
            }
        }
    }

    fn node(left: &Sha256Hash, right: &Sha256Hash) -> Sha256Hash {
        Sha256Hash::of(&[&[1][..], left.as_bytes(), right.as_bytes()].concat())
    }

    fn half(n: usize) -> usize {
        (0..)
            .map(|bit| 1 << bit)
            .take_while(|k| *k < n)
            .last()
            .unwrap()
    }

    /// The root that a path leads to, by recursion over the tree's shape.
    pub(super) fn from_path(
        leaf: &Sha256Hash,
        index: usize,
        size: usize,
        path: &[Sha256Hash],
    ) -> Option<Sha256Hash> {
        if size == 1 {
            return path.is_empty().then_some(*leaf);
        }
        let (sibling, below) = path.split_last()?;
        let k = half(size);
        Some(if index < k {
            node(&from_path(leaf, index, k, below)?, sibling)
        } else {
            node(sibling, &from_path(leaf, index - k, size - k, below)?)
        })
    }

    /// Both roots that a consistency proof leads to (the definition of SUBPROOF, backwards).
    pub(super) fn from_consistency(
        old: usize,
        size: usize,
        whole: bool,
        old_root: &Sha256Hash,
        path: &[Sha256Hash],
    ) -> Option<(Sha256Hash, Sha256Hash)> {
        if old == size {
            return match (whole, path) {
                (true, []) => Some((*old_root, *old_root)),
                (false, [one]) => Some((*one, *one)),
                _ => None,
            };
        }
        let (sibling, below) = path.split_last()?;
        let k = half(size);
        Some(if old <= k {
            let (before, after) = from_consistency(old, k, whole, old_root, below)?;
            (before, node(&after, sibling))
        } else {
            let (before, after) = from_consistency(old - k, size - k, false, old_root, below)?;
            (node(sibling, &before), node(sibling, &after))
        })
    }
}

/// A log of sealed segments of 1, 2, 3, 4 … records (the first has the log's own first record too).
struct Sealed {
    segments: Vec<VerifiedSegment>,
    leaves: Vec<Sha256Hash>,
    key: LogPublicKey,
    line: String,
}

fn sealed(count: usize) -> Sealed {
    let disk = SimDisk::new();
    let n = Settings::default().sim(&disk);
    let mut segments = Vec::new();
    for s in 0..count {
        for i in 0..=s {
            n.append(format!("{{\"segment\":{s},\"record\":{i}}}").as_bytes())
                .unwrap();
        }
        let reference = n.log.seal_now().unwrap().unwrap();
        segments.push(n.store.get(&reference.id).unwrap());
    }
    let leaves = n.records().iter().map(|(_, r)| plain::leaf(r)).collect();
    Sealed {
        key: segments[0].endorsement().unwrap().log_key,
        line: origin_line(&domain(), &n.log.origin()).unwrap(),
        segments,
        leaves,
    }
}

fn body(segment: &VerifiedSegment) -> AuditBody<'_> {
    parse_body(segment.body(), &domain(), &segment.header().origin).unwrap()
}

#[test]
fn every_record_is_proven_from_its_own_segment_alone() {
    let log = sealed(9);
    for segment in &log.segments {
        let body = body(segment);
        let span = body.span();
        let size = usize::try_from(span.last + 1).unwrap();
        assert_eq!(span.root, plain::root(&log.leaves[..size]));
        for index in span.first..=span.last {
            let proof = prove_record(&body, index, None).unwrap();
            let head = verify_record_proof(&proof, &log.key, &log.line).unwrap();
            assert_eq!((head.size, head.root), (span.last + 1, span.root));
            let at = usize::try_from(index).unwrap();
            assert_eq!(plain::leaf(&proof.record), log.leaves[at]);
            assert_eq!(
                plain::from_path(&log.leaves[at], at, size, &proof.path),
                Some(span.root)
            );
            // It survives its JSON form.
            let json = serde_json::to_string(&proof).unwrap();
            assert_eq!(serde_json::from_str::<RecordProof>(&json).unwrap(), proof);
        }
        for outside in [span.first.wrapping_sub(1), span.last + 1] {
            assert_eq!(
                prove_record(&body, outside, None),
                Err(ProofError::Body(BodyError::Absent(outside)))
            );
        }
    }
}

#[test]
fn a_changed_record_proof_is_refused() {
    let log = sealed(5);
    let good = prove_record(&body(&log.segments[3]), 9, None).unwrap();
    assert!(verify_record_proof(&good, &log.key, &log.line).is_ok());
    let refused = |proof: &RecordProof, expected: ProofError| {
        assert_eq!(
            verify_record_proof(proof, &log.key, &log.line),
            Err(expected)
        );
    };
    let mut bad = good.clone();
    bad.record.push(b' ');
    refused(&bad, ProofError::Path(MerkleError::RootMismatch));
    let mut bad = good.clone();
    bad.index = 8;
    refused(&bad, ProofError::Path(MerkleError::RootMismatch));
    let mut bad = good.clone();
    bad.index = 1 << 40;
    refused(&bad, ProofError::Path(MerkleError::OutOfRange));
    let mut bad = good.clone();
    bad.path.pop();
    refused(&bad, ProofError::Path(MerkleError::WrongLength));
    for at in 0..good.path.len() {
        let mut bad = good.clone();
        bad.path[at] = plain::leaf(b"other");
        refused(&bad, ProofError::Path(MerkleError::RootMismatch));
    }
    // An honest checkpoint of another size of the same log.
    let mut bad = good.clone();
    bad.checkpoint = body(&log.segments[4]).checkpoint_note().to_owned();
    assert!(matches!(
        verify_record_proof(&bad, &log.key, &log.line),
        Err(ProofError::Path(_))
    ));
    // Another key, another log, another version.
    let other = LogKey::from_seed(&[9; 32]).unwrap().public();
    assert_eq!(
        verify_record_proof(&good, &other, &log.line),
        Err(ProofError::Checkpoint(CheckpointError::Signature))
    );
    assert!(matches!(
        verify_record_proof(&good, &log.key, "tidelock/site/n2/0/1"),
        Err(ProofError::Checkpoint(CheckpointError::Origin { .. }))
    ));
    let mut json = serde_json::to_value(&good).unwrap();
    json["v"] = 2.into();
    refused(
        &serde_json::from_value(json.clone()).unwrap(),
        ProofError::Version(2),
    );
    json["v"] = 1.into();
    json["type"] = "consistency".into();
    assert!(serde_json::from_value::<RecordProof>(json.clone()).is_err());
    json["type"] = "record".into();
    json["extra"] = 1.into();
    assert!(serde_json::from_value::<RecordProof>(json).is_err());
}

#[test]
fn a_later_checkpoint_extends_every_earlier_one() {
    let log = sealed(8);
    let bodies: Vec<_> = log.segments.iter().map(body).collect();
    for old in 0..bodies.len() {
        for new in old..bodies.len() {
            // The segments after the older checkpoint are enough, and its own does no harm.
            for from in [old, (old + 1).min(new)] {
                let older = bodies[old].checkpoint_note();
                let proof = prove_consistency(older, &bodies[from..=new], None).unwrap();
                let (a, b) = verify_consistency_proof(&proof, &log.key, &log.line).unwrap();
                assert_eq!(a.root, bodies[old].span().root);
                assert_eq!(b.root, bodies[new].span().root);
                let (m, n) = (
                    usize::try_from(a.size).unwrap(),
                    usize::try_from(b.size).unwrap(),
                );
                assert_eq!(
                    plain::from_consistency(m, n, true, &a.root, &proof.path),
                    Some((a.root, b.root))
                );
                let json = serde_json::to_string(&proof).unwrap();
                assert_eq!(
                    serde_json::from_str::<ConsistencyProof>(&json).unwrap(),
                    proof
                );
            }
        }
    }
    // A hole, the wrong order, none at all, a checkpoint from before the first segment.
    let older = bodies[0].checkpoint_note();
    let hole = [bodies[1].clone(), bodies[3].clone()];
    assert_eq!(
        prove_consistency(older, &hole, None),
        Err(ProofError::Order)
    );
    assert_eq!(prove_consistency(older, &[], None), Err(ProofError::Order));
    assert_eq!(
        prove_consistency(older, &bodies[2..], None),
        Err(ProofError::Path(MerkleError::OutOfRange))
    );
}

#[test]
fn a_changed_consistency_proof_is_refused() {
    let log = sealed(6);
    let bodies: Vec<_> = log.segments.iter().map(body).collect();
    let good = prove_consistency(bodies[2].checkpoint_note(), &bodies[3..], None).unwrap();
    assert!(verify_consistency_proof(&good, &log.key, &log.line).is_ok());
    for at in 0..good.path.len() {
        let mut bad = good.clone();
        bad.path[at] = plain::leaf(b"other");
        assert!(verify_consistency_proof(&bad, &log.key, &log.line).is_err());
        bad.path.remove(at);
        assert!(verify_consistency_proof(&bad, &log.key, &log.line).is_err());
    }
    let mut turned = good.clone();
    std::mem::swap(&mut turned.older, &mut turned.newer);
    assert!(verify_consistency_proof(&turned, &log.key, &log.line).is_err());
    let mut other = good;
    other.older = bodies[1].checkpoint_note().to_owned();
    assert!(verify_consistency_proof(&other, &log.key, &log.line).is_err());
}
