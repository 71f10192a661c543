//! What survives a loss of power: single choices, and all of them within a stated bound.

use std::collections::BTreeSet;

/// A sequence of pseudo-random numbers (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What survives of everything that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// A subset that this seed gives.
    Seed(u64),
}

/// One choice of what survives, made for one [`super::Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivors {
    /// Only the process dies: the cache survives, and with it everything.
    pub(super) kill: bool,
    /// For every unsynced piece of data in order, whether it survives.
    pub(super) pieces: Vec<bool>,
    /// For every directory with unsynced names in order, how many of its changes survive.
    pub(super) names: Vec<usize>,
}

impl Survivors {
    /// Whether only the process dies, so that everything survives in the cache.
    #[must_use]
    pub fn is_kill(&self) -> bool {
        self.kill
    }
}

/// How many choices of survivors [`super::Snapshot::survivors`] gives.
///
/// Pieces of data are 512-byte sectors in the order in which they were written (of a zero-fill over
/// what reads as zeros only the length can differ: it is three pieces, the first sector, the last,
/// and what lies between). With at most `all_subsets_up_to` pieces, every subset of them is tried;
/// with more: none, all, every prefix, all but one, one alone (at most `spread` of each of these
/// three, evenly spread), and `samples` seeded subsets. For names, every combination of prefixes
/// per directory is tried if there are at most `all_names_up_to`; else none, all, every prefix of
/// each directory with all and with none of the others, and `samples` seeded ones. If the product
/// of both lists has at most `all_pairs_up_to` members, every pair is tried; else every member of
/// each list with none and with all of the other's, and `samples` seeded pairs. Last comes the
/// death of the process alone, if there was anything unsynced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Most pieces of data of which every subset is tried.
    pub all_subsets_up_to: usize,
    /// Most prefixes, omissions and single survivals each.
    pub spread: usize,
    /// Most combinations of name changes that are all tried.
    pub all_names_up_to: usize,
    /// Most pairs of data and names that are all tried.
    pub all_pairs_up_to: usize,
    /// How many seeded choices are added wherever not all are tried.
    pub samples: usize,
    /// The seed of those.
    pub seed: u64,
}

impl Bound {
    /// What a test can afford at every call: all subsets of 4 pieces.
    pub const SMALL: Self = Self {
        all_subsets_up_to: 4,
        spread: 4,
        all_names_up_to: 8,
        all_pairs_up_to: 24,
        samples: 2,
        seed: 0,
    };

    /// What a soak affords: all subsets of 6 pieces, all prefixes of 64.
    pub const LARGE: Self = Self {
        all_subsets_up_to: 6,
        spread: 64,
        all_names_up_to: 64,
        all_pairs_up_to: 256,
        samples: 8,
        seed: 0,
    };

    /// The same bound with another seed for what is sampled.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

/// At most `spread` of the numbers `0..count`, the first and the last among them.
fn spread(count: usize, spread: usize) -> BTreeSet<usize> {
    if count <= spread.max(2) {
        return (0..count).collect();
    }
    let gaps = spread.max(2) - 1;
    (0..=gaps).map(|i| i * (count - 1) / gaps).collect()
}

/// The subsets of so many pieces of data, none first and all second.
fn subsets(count: usize, bound: &Bound, random: &mut Random) -> Vec<Vec<bool>> {
    let mut out = vec![vec![false; count]];
    if count == 0 {
        return out;
    }
    out.push(vec![true; count]);
    if count <= bound.all_subsets_up_to.min(16) {
        let all = 1u32 << count;
        out.extend((1..all - 1).map(|set| (0..count).map(|bit| set >> bit & 1 == 1).collect()));
        return out;
    }
    let numbers = spread(count, bound.spread);
    for &number in &numbers {
        out.push((0..count).map(|i| i < number).collect());
        out.push((0..count).map(|i| i != number).collect());
        out.push((0..count).map(|i| i == number).collect());
    }
    for _ in 0..bound.samples {
        out.push((0..count).map(|_| random.next() & 1 == 1).collect());
    }
    out
}

/// The prefixes of name changes, none first and all second.
fn prefixes(counts: &[usize], bound: &Bound, random: &mut Random) -> Vec<Vec<usize>> {
    let mut out = vec![vec![0; counts.len()]];
    if counts.is_empty() {
        return out;
    }
    out.push(counts.to_vec());
    let product = counts
        .iter()
        .fold(1usize, |all, count| all.saturating_mul(count + 1));
    if product <= bound.all_names_up_to {
        for mut number in 1..product.saturating_sub(1) {
            let digits = counts.iter().map(|count| {
                let digit = number % (count + 1);
                number /= count + 1;
                digit
            });
            out.push(digits.collect());
        }
        return out;
    }
    for (which, count) in counts.iter().enumerate() {
        for prefix in spread(count + 1, bound.spread) {
            for rest in [true, false] {
                let one = counts
                    .iter()
                    .enumerate()
                    .map(|(i, all)| match (i == which, rest) {
                        (true, _) => prefix,
                        (false, true) => *all,
                        (false, false) => 0,
                    });
                out.push(one.collect());
            }
        }
    }
    for _ in 0..bound.samples {
        let one = counts.iter().map(|count| below(random, count + 1));
        out.push(one.collect());
    }
    out
}

pub(super) fn below(random: &mut Random, count: usize) -> usize {
    usize::try_from(random.next() % (count.max(1) as u64)).unwrap_or(0)
}

/// All choices within the bound, each once, in an order that depends on the arguments alone.
pub(super) fn choices(pieces: usize, names: &[usize], bound: &Bound) -> Vec<Survivors> {
    let mut random = Random(bound.seed ^ (pieces as u64).rotate_left(32) ^ names.len() as u64);
    let data = subsets(pieces, bound, &mut random);
    let prefixes = prefixes(names, bound, &mut random);
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    if data.len() * prefixes.len() <= bound.all_pairs_up_to {
        for d in 0..data.len() {
            pairs.extend((0..prefixes.len()).map(|n| (d, n)));
        }
    } else {
        let last = |len: usize| usize::from(len > 1);
        for d in 0..data.len() {
            pairs.extend([(d, 0), (d, last(prefixes.len()))]);
        }
        for n in 0..prefixes.len() {
            pairs.extend([(0, n), (last(data.len()), n)]);
        }
        for _ in 0..bound.samples {
            pairs.push((
                below(&mut random, data.len()),
                below(&mut random, prefixes.len()),
            ));
        }
    }
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(pairs.len() + 1);
    for (d, n) in pairs {
        if let (Some(pieces), Some(names)) = (data.get(d), prefixes.get(n))
            && seen.insert((pieces.clone(), names.clone()))
        {
            out.push(Survivors {
                kill: false,
                pieces: pieces.clone(),
                names: names.clone(),
            });
        }
    }
    if pieces > 0 || !names.is_empty() {
        out.push(Survivors {
            kill: true,
            pieces: Vec::new(),
            names: Vec::new(),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_the_bound_every_subset_is_there_once() {
        let bound = Bound {
            all_pairs_up_to: 1000,
            ..Bound::SMALL
        };
        let all = choices(4, &[1, 3], &bound);
        assert_eq!(all.len(), 16 * 8 + 1);
        assert!(all[0].pieces.iter().all(|kept| !kept) && all[0].names == [0, 0]);
        assert_eq!(all.iter().filter(|one| one.kill).count(), 1);
        let unique: BTreeSet<_> = all
            .iter()
            .map(|s| (s.kill, s.pieces.clone(), s.names.clone()))
            .collect();
        assert_eq!(unique.len(), all.len());
        assert_eq!(choices(0, &[], &bound).len(), 1);
    }

    #[test]
    fn beyond_the_bound_the_stated_families_are_there_and_no_more() {
        let bound = Bound {
            spread: 100,
            ..Bound::SMALL
        };
        let all = choices(40, &[], &bound);
        for number in 0..40 {
            for family in [
                (0..40).map(|i| i < number).collect::<Vec<_>>(),
                (0..40).map(|i| i != number).collect(),
                (0..40).map(|i| i == number).collect(),
            ] {
                assert!(all.iter().any(|one| one.pieces == family), "{number}");
            }
        }
        assert!(all.len() <= 2 + 3 * 40 + bound.samples + 1);
        assert_eq!(all, choices(40, &[], &bound));
        assert_ne!(all, choices(40, &[], &bound.with_seed(9)));
        assert_eq!(
            spread(1000, 4).into_iter().collect::<Vec<_>>(),
            [0, 333, 666, 999]
        );
    }
}
