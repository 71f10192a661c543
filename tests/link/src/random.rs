//! Pseudo-random numbers for tests.

/// `SplitMix64`: short, seeded by any number, good enough for tests, no secret.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from 0 to `most`.
    pub fn up_to(&mut self, most: u64) -> u64 {
        let wide = u128::from(self.any()) * (u128::from(most) + 1);
        u64::try_from(wide >> 64).unwrap_or(most)
    }

    /// A place in something of this length; 0 where it is empty.
    pub fn below(&mut self, length: usize) -> usize {
        usize::try_from(self.any() % (length as u64).max(1)).unwrap_or(0)
    }
}
