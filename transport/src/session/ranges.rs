//! Sets of sequence numbers as inclusive, ascending ranges.

use crate::limits::MAX_RANGES;

/// Ranges kept at most: a head's ranges, cut once at each edge of another head's.
const MAX_KEPT: usize = 2 * MAX_RANGES;

/// A bounded set of numbers. Past the bound it forgets its lowest numbers, which for a list of
/// things done means doing them again, never leaving them out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Takes ranges that are ascending and apart, as the frame codec has checked.
    pub(super) fn from_sorted(ranges: &[(u64, u64)]) -> Self {
        Self(ranges.to_vec())
    }

    pub(super) fn as_slice(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// The lowest number.
    pub(super) fn first(&self) -> Option<u64> {
        self.0.first().map(|(from, _)| *from)
    }

    /// The lowest range.
    pub(super) fn first_range(&self) -> Option<(u64, u64)> {
        self.0.first().copied()
    }

    /// The highest number.
    pub(super) fn last(&self) -> Option<u64> {
        self.0.last().map(|(_, to)| *to)
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.0
            .iter()
            .any(|(from, to)| (*from..=*to).contains(&number))
    }

    /// Adds `from..=to`, joining what touches.
    pub(super) fn insert(&mut self, from: u64, to: u64) {
        let (mut from, mut to) = (from, to);
        self.0.retain(|(a, b)| {
            let touches = *a <= to.saturating_add(1) && from <= b.saturating_add(1);
            if touches {
                from = from.min(*a);
                to = to.max(*b);
            }
            !touches
        });
        let at = self.0.partition_point(|(a, _)| *a < from);
        self.0.insert(at, (from, to));
        let surplus = self.0.len().saturating_sub(MAX_KEPT);
        self.0.drain(..surplus);
    }

    /// Takes `from..=to` out.
    pub(super) fn remove(&mut self, from: u64, to: u64) {
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for (a, b) in self.0.drain(..) {
            if b < from || a > to {
                kept.push((a, b));
                continue;
            }
            if a < from {
                kept.push((a, from - 1));
            }
            if b > to {
                kept.push((to + 1, b));
            }
        }
        self.0 = kept;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..9), 0..40),
        ) {
            let mut ranges = Ranges::default();
            let mut set = BTreeSet::new();
            for (add, from, length) in steps {
                let numbers = from..=from + length;
                if add {
                    ranges.insert(from, from + length);
                    set.extend(numbers);
                } else {
                    ranges.remove(from, from + length);
                    numbers.for_each(|number| { set.remove(&number); });
                }
                prop_assert_eq!(ranges.first(), set.first().copied());
                prop_assert_eq!(ranges.last(), set.last().copied());
                for number in 0..80 {
                    prop_assert_eq!(ranges.contains(number), set.contains(&number));
                }
                for pair in ranges.as_slice().windows(2) {
                    prop_assert!(pair[0].1 + 1 < pair[1].0, "apart and ascending");
                }
            }
        }
    }

    #[test]
    fn the_ends_of_the_numbers_are_safe() {
        let mut ranges = Ranges::default();
        ranges.insert(0, u64::MAX);
        ranges.remove(5, 5);
        assert_eq!(ranges.as_slice(), [(0, 4), (6, u64::MAX)]);
        ranges.insert(5, u64::MAX);
        assert_eq!(ranges.as_slice(), [(0, u64::MAX)]);
        ranges.remove(0, u64::MAX);
        assert_eq!(ranges.first_range(), None);
    }

    #[test]
    fn past_the_bound_the_lowest_are_forgotten() {
        let mut ranges = Ranges::default();
        for at in 0..1_000 {
            ranges.insert(at * 2, at * 2);
        }
        assert_eq!(ranges.as_slice().len(), MAX_KEPT);
        assert!(ranges.contains(1_998) && !ranges.contains(0));
    }
}
