//! RFC 6962 Merkle tree with SHA-256: frontier, inclusion and consistency proofs.
//!
//! The log keeps only the [`Frontier`] (the roots of the perfect subtrees, at most 64 hashes).
//! Proofs are made from stored leaf hashes, which an offline reader recomputes from the segments.
//! Pure functions over values: no I/O here.

use crate::id::Sha256Hash;

/// Hash of a leaf: SHA-256 over `0x00` and the record.
#[must_use]
pub fn leaf_hash(record: &[u8]) -> Sha256Hash {
    // Copied behind its prefix where it is short: cheaper than hashing in parts.
    let mut joined = [0; 1024];
    match joined.get_mut(..=record.len()) {
        Some(whole) => {
            if let Some(place) = whole.get_mut(1..) {
                place.copy_from_slice(record);
            }
            Sha256Hash::of(whole)
        }
        None => Sha256Hash::of_parts(&[&[0], record]),
    }
}

/// Hash of an inner node: SHA-256 over `0x01` and both children.
#[must_use]
pub fn node_hash(left: &Sha256Hash, right: &Sha256Hash) -> Sha256Hash {
    let mut joined = [1; 65];
    let parts = left.as_bytes().iter().chain(right.as_bytes());
    for (slot, byte) in joined.iter_mut().skip(1).zip(parts) {
        *slot = *byte;
    }
    Sha256Hash::of(&joined)
}

/// Why a proof or frontier was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MerkleError {
    /// An index or size outside the tree.
    #[error("index or size lies outside the tree")]
    OutOfRange,
    /// Too few or too many hashes for this size.
    #[error("wrong number of hashes for this tree size")]
    WrongLength,
    /// The proof leads to another root.
    #[error("the proof does not lead to this root")]
    RootMismatch,
}

/// The roots of a tree's perfect subtrees, largest first: all that appending needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frontier {
    size: u64,
    hashes: Vec<Sha256Hash>,
}

impl Frontier {
    /// The empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A frontier as [`Frontier::hashes`] gave it, for a tree of `size` leaves.
    ///
    /// # Errors
    /// [`MerkleError::WrongLength`] unless there is one hash for each set bit of `size`.
    pub fn from_hashes(size: u64, hashes: Vec<Sha256Hash>) -> Result<Self, MerkleError> {
        if hashes.len() != Self::hashes_for(size) {
            return Err(MerkleError::WrongLength);
        }
        Ok(Self { size, hashes })
    }

    /// How many hashes the frontier of a tree of this size has.
    #[must_use]
    pub const fn hashes_for(size: u64) -> usize {
        size.count_ones() as usize
    }

    /// The subtree roots, largest subtree first.
    #[must_use]
    pub fn hashes(&self) -> &[Sha256Hash] {
        &self.hashes
    }

    /// The number of leaves.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Adds one leaf.
    pub fn append(&mut self, leaf: Sha256Hash) {
        let mut hash = leaf;
        for _ in 0..self.size.trailing_ones() {
            if let Some(left) = self.hashes.pop() {
                hash = node_hash(&left, &hash);
            }
        }
        self.hashes.push(hash);
        self.size = self.size.saturating_add(1);
    }

    /// The root hash; of the empty tree it is the hash of nothing.
    #[must_use]
    pub fn root(&self) -> Sha256Hash {
        let mut hashes = self.hashes.iter().rev();
        let Some(last) = hashes.next() else {
            return Sha256Hash::of(&[]);
        };
        hashes.fold(*last, |right, left| node_hash(left, &right))
    }
}

/// A tree of which the leaves up to some point are known by their [`Frontier`] only: what a reader of
/// some consecutive segments of a log has. It makes every proof that does not need a hash from inside
/// the unknown part: inclusion of each known leaf, and consistency from every size at or after the
/// unknown part's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartialTree {
    before: Frontier,
    tree: Frontier,
    leaves: Vec<Sha256Hash>,
}

impl PartialTree {
    /// A tree of the leaves that `before` covers.
    #[must_use]
    pub fn new(before: Frontier) -> Self {
        Self {
            tree: before.clone(),
            before,
            leaves: Vec::new(),
        }
    }

    /// Adds one leaf.
    pub fn push(&mut self, leaf: Sha256Hash) {
        self.tree.append(leaf);
        self.leaves.push(leaf);
    }

    /// The number of leaves, those known by the frontier included.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.tree.size()
    }

    /// The root over all of them.
    #[must_use]
    pub fn root(&self) -> Sha256Hash {
        self.tree.root()
    }

    /// The leaves added.
    #[must_use]
    pub fn leaves(&self) -> &[Sha256Hash] {
        &self.leaves
    }

    /// Leaf `index`, if it is one of those added.
    #[must_use]
    pub fn leaf(&self, index: u64) -> Option<Sha256Hash> {
        let at = usize::try_from(index.checked_sub(self.before.size())?).ok()?;
        self.leaves.get(at).copied()
    }

    /// The audit path of leaf `index` in the tree of all leaves (RFC 6962, 2.1.1), bottom first.
    ///
    /// # Errors
    /// [`MerkleError::OutOfRange`] unless the leaf is one of those added.
    pub fn inclusion_proof(&self, index: u64) -> Result<Vec<Sha256Hash>, MerkleError> {
        if index < self.before.size() || index >= self.size() {
            return Err(MerkleError::OutOfRange);
        }
        let (mut from, mut to) = (0, self.size());
        let mut path = Vec::new();
        while to - from > 1 {
            let middle = from + split64(to - from);
            if index < middle {
                path.push(self.range_root(middle, to)?);
                to = middle;
            } else {
                path.push(self.range_root(from, middle)?);
                from = middle;
            }
        }
        path.reverse();
        Ok(path)
    }

    /// The proof that the tree of the first `old` leaves is a prefix of the whole (RFC 6962, 2.1.2).
    ///
    /// # Errors
    /// [`MerkleError::OutOfRange`] if `old` is zero, inside the unknown part, or beyond the end.
    pub fn consistency_proof(&self, old: u64) -> Result<Vec<Sha256Hash>, MerkleError> {
        if old == 0 || old < self.before.size() || old > self.size() {
            return Err(MerkleError::OutOfRange);
        }
        let (mut from, mut to) = (0, self.size());
        let mut path = Vec::new();
        let mut whole = true;
        while old < to {
            let middle = from + split64(to - from);
            if old <= middle {
                path.push(self.range_root(middle, to)?);
                to = middle;
            } else {
                path.push(self.range_root(from, middle)?);
                from = middle;
                whole = false;
            }
        }
        if !whole {
            path.push(self.range_root(from, to)?);
        }
        path.reverse();
        Ok(path)
    }

    /// The root of the leaves `from..to`, a range that the halving of RFC 6962 comes to.
    fn range_root(&self, from: u64, to: u64) -> Result<Sha256Hash, MerkleError> {
        let first = self.before.size();
        if from >= first {
            let place = |at: u64| usize::try_from(at - first).unwrap_or(usize::MAX);
            let leaves = self.leaves.get(place(from)..place(to));
            return leaves.map(root).ok_or(MerkleError::OutOfRange);
        }
        if to <= first {
            // Wholly unknown: then it is one of the frontier's subtrees, largest first.
            let mut start = 0;
            for (bit, hash) in (0..u64::BITS)
                .rev()
                .filter(|bit| first & (1 << bit) != 0)
                .zip(self.before.hashes())
            {
                let end = start + (1 << bit);
                if (start, end) == (from, to) {
                    return Ok(*hash);
                }
                start = end;
            }
            return Err(MerkleError::OutOfRange);
        }
        let middle = from + split64(to - from);
        Ok(node_hash(
            &self.range_root(from, middle)?,
            &self.range_root(middle, to)?,
        ))
    }
}

/// The largest power of two smaller than `n` (for `n >= 2`).
const fn split64(n: u64) -> u64 {
    1 << (u64::BITS - 1 - n.saturating_sub(1).leading_zeros())
}

/// The root over these leaf hashes.
#[must_use]
pub fn root(leaves: &[Sha256Hash]) -> Sha256Hash {
    let mut frontier = Frontier::new();
    for leaf in leaves {
        frontier.append(*leaf);
    }
    frontier.root()
}

/// The largest power of two smaller than `n` (for `n >= 2`).
const fn split(n: usize) -> usize {
    let half = n.next_power_of_two() / 2;
    if half == n { n / 2 } else { half }
}

/// The audit path of leaf `index` (RFC 6962, 2.1.1), bottom first.
///
/// # Errors
/// [`MerkleError::OutOfRange`] if there is no such leaf.
pub fn inclusion_proof(
    leaves: &[Sha256Hash],
    index: usize,
) -> Result<Vec<Sha256Hash>, MerkleError> {
    if index >= leaves.len() {
        return Err(MerkleError::OutOfRange);
    }
    let (mut part, mut index) = (leaves, index);
    let mut path = Vec::new();
    while part.len() > 1 {
        let (left, right) = part
            .split_at_checked(split(part.len()))
            .unwrap_or((part, &[]));
        if index < left.len() {
            path.push(root(right));
            part = left;
        } else {
            path.push(root(left));
            index -= left.len();
            part = right;
        }
    }
    path.reverse();
    Ok(path)
}

/// Checks that `leaf` is leaf `index` of the tree of `size` leaves with this root (RFC 9162,
/// 2.1.3.2).
///
/// # Errors
/// [`MerkleError`] telling what does not fit.
pub fn verify_inclusion(
    leaf: &Sha256Hash,
    index: u64,
    size: u64,
    proof: &[Sha256Hash],
    root: &Sha256Hash,
) -> Result<(), MerkleError> {
    if index >= size {
        return Err(MerkleError::OutOfRange);
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return Err(MerkleError::WrongLength);
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(MerkleError::WrongLength);
    }
    if hash == *root {
        Ok(())
    } else {
        Err(MerkleError::RootMismatch)
    }
}

/// The proof that the tree of the first `old` leaves is a prefix of the whole (RFC 6962, 2.1.2).
///
/// # Errors
/// [`MerkleError::OutOfRange`] if `old` is zero or more than there are leaves.
pub fn consistency_proof(
    leaves: &[Sha256Hash],
    old: usize,
) -> Result<Vec<Sha256Hash>, MerkleError> {
    if old == 0 || old > leaves.len() {
        return Err(MerkleError::OutOfRange);
    }
    let (mut part, mut old, mut whole) = (leaves, old, true);
    let mut path = Vec::new();
    while old < part.len() {
        let (left, right) = part
            .split_at_checked(split(part.len()))
            .unwrap_or((part, &[]));
        if old <= left.len() {
            path.push(root(right));
            part = left;
        } else {
            path.push(root(left));
            old -= left.len();
            part = right;
            whole = false;
        }
    }
    if !whole {
        path.push(root(part));
    }
    path.reverse();
    Ok(path)
}

/// Checks that the tree of `new` leaves extends the tree of `old` leaves (RFC 9162, 2.1.4.2).
///
/// # Errors
/// [`MerkleError`] telling what does not fit.
pub fn verify_consistency(
    old: u64,
    new: u64,
    proof: &[Sha256Hash],
    old_root: &Sha256Hash,
    new_root: &Sha256Hash,
) -> Result<(), MerkleError> {
    if old == 0 || old > new {
        return Err(MerkleError::OutOfRange);
    }
    if old == new {
        if !proof.is_empty() {
            return Err(MerkleError::WrongLength);
        }
        return if old_root == new_root {
            Ok(())
        } else {
            Err(MerkleError::RootMismatch)
        };
    }
    let mut siblings = proof.iter();
    let first = if old.is_power_of_two() {
        *old_root
    } else {
        *siblings.next().ok_or(MerkleError::WrongLength)?
    };
    let (mut node, mut last) = (old - 1, new - 1);
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let (mut from_old, mut from_new) = (first, first);
    for sibling in siblings {
        if last == 0 {
            return Err(MerkleError::WrongLength);
        }
        if node & 1 == 1 || node == last {
            from_old = node_hash(sibling, &from_old);
            from_new = node_hash(sibling, &from_new);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            from_new = node_hash(&from_new, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(MerkleError::WrongLength);
    }
    if from_old == *old_root && from_new == *new_root {
        Ok(())
    } else {
        Err(MerkleError::RootMismatch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::hex;

    /// The eight leaves of the certificate-transparency reference tests.
    fn reference_leaves() -> Vec<Sha256Hash> {
        [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        ]
        .iter()
        .map(|text| {
            let bytes: Vec<u8> = (0..text.len() / 2)
                .map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap())
                .collect();
            leaf_hash(&bytes)
        })
        .collect()
    }

    fn many(n: u32) -> Vec<Sha256Hash> {
        (0..n).map(|i| leaf_hash(&i.to_le_bytes())).collect()
    }

    #[test]
    fn rfc_6962_reference_roots() {
        let roots = [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let leaves = reference_leaves();
        assert_eq!(
            hex(Frontier::new().root().as_bytes()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        for (i, expected) in roots.iter().enumerate() {
            assert_eq!(root(&leaves[..=i]).hex(), *expected, "{} leaves", i + 1);
        }
    }

    #[test]
    fn rfc_6962_reference_proofs() {
        let leaves = reference_leaves();
        let path: Vec<String> = inclusion_proof(&leaves, 0)
            .unwrap()
            .iter()
            .map(|h| h.hex())
            .collect();
        assert_eq!(
            path,
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ]
        );
        let path: Vec<String> = consistency_proof(&leaves, 6)
            .unwrap()
            .iter()
            .map(|h| h.hex())
            .collect();
        assert_eq!(
            path,
            [
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ]
        );
    }

    #[test]
    fn every_proof_up_to_40_leaves_verifies_and_no_neighbour_does() {
        for n in 1..=40u32 {
            let leaves = many(n);
            let whole = root(&leaves);
            for (at, leaf) in leaves.iter().enumerate() {
                let proof = inclusion_proof(&leaves, at).unwrap();
                let (i, n) = (at as u64, u64::from(n));
                assert_eq!(verify_inclusion(leaf, i, n, &proof, &whole), Ok(()));
                if n > 1 {
                    let other = (i + 1) % n;
                    assert!(verify_inclusion(leaf, other, n, &proof, &whole).is_err());
                    assert!(verify_inclusion(leaf, i, n, &proof[1..], &whole).is_err());
                }
            }
            for old in 1..=n as usize {
                let proof = consistency_proof(&leaves, old).unwrap();
                let before = root(&leaves[..old]);
                let (old, n) = (old as u64, u64::from(n));
                assert_eq!(verify_consistency(old, n, &proof, &before, &whole), Ok(()));
                if old < n {
                    let wrong = leaf_hash(b"wrong");
                    assert!(verify_consistency(old, n, &proof, &wrong, &whole).is_err());
                    assert!(verify_consistency(old, n, &proof, &before, &wrong).is_err());
                }
            }
        }
    }

    #[test]
    fn halves() {
        for (n, half) in [
            (2, 1),
            (3, 2),
            (4, 2),
            (5, 4),
            (8, 4),
            (9, 8),
            (u64::MAX, 1 << 63),
        ] {
            assert_eq!(split64(n), half, "{n}");
        }
    }

    #[test]
    fn a_partial_tree_makes_the_proofs_of_the_whole_one() {
        for n in 1..=33usize {
            let leaves = many(u32::try_from(n).unwrap());
            for known_from in 0..=n {
                let mut before = Frontier::new();
                for leaf in &leaves[..known_from] {
                    before.append(*leaf);
                }
                let mut tree = PartialTree::new(before);
                for leaf in &leaves[known_from..] {
                    tree.push(*leaf);
                }
                assert_eq!(tree.root(), root(&leaves));
                for at in 0..=n {
                    let (index, known) = (at as u64, at >= known_from);
                    let path = tree.inclusion_proof(index);
                    match inclusion_proof(&leaves, at) {
                        Ok(expected) if known => assert_eq!(path, Ok(expected)),
                        _ => assert_eq!(path, Err(MerkleError::OutOfRange)),
                    }
                    let path = tree.consistency_proof(index);
                    match consistency_proof(&leaves, at) {
                        Ok(expected) if known => assert_eq!(path, Ok(expected)),
                        _ => assert_eq!(path, Err(MerkleError::OutOfRange)),
                    }
                    assert_eq!(tree.leaf(index), leaves.get(at).copied().filter(|_| known));
                }
            }
        }
    }

    #[test]
    fn a_leaf_of_any_length_is_hashed_with_its_prefix() {
        for length in [0, 1, 1022, 1023, 1024, 5000] {
            let record = vec![7; length];
            let joined = [&[0][..], &record].concat();
            assert_eq!(leaf_hash(&record), Sha256Hash::of(&joined), "{length}");
        }
    }

    #[test]
    fn frontier_restores_from_its_hashes() {
        let leaves = many(77);
        let mut one = Frontier::new();
        for (i, leaf) in leaves.iter().enumerate() {
            let mut other = Frontier::from_hashes(i as u64, one.hashes().to_vec()).unwrap();
            one.append(*leaf);
            other.append(*leaf);
            assert_eq!(one, other);
        }
        assert_eq!(
            Frontier::from_hashes(5, one.hashes()[..1].to_vec()),
            Err(MerkleError::WrongLength)
        );
    }
}
