//! Random numbers from a seed.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Random numbers that are a function of seed, purpose and step. A run that was stopped therefore goes on with the same
/// numbers.
///
/// SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
pub struct Random(u64);

impl Random {
    /// The numbers of one step for one purpose. `char_gpt/parity.py` follows the same rule.
    pub fn new(seed: u64, purpose: &str, step: u64) -> Self {
        let mut random = Self(seed);
        for word in purpose.bytes().map(u64::from).chain([step]) {
            random.0 = random.next() ^ word;
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// An index less than `count`. The remainder favours small ones, by less than one in 2^40 for any text.
    pub fn below(&mut self, count: usize) -> usize {
        (self.next() % count as u64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / 2f64.powi(53)
    }
}

/// rand's generator, with which the shipped weights of `which_noun` were trained.
pub struct Seeded(StdRng);

impl Seeded {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Numbers uniform in ±`bound`.
    pub fn uniform(&mut self, count: usize, bound: f32) -> Vec<f32> {
        (0..count).map(|_| self.0.random_range(-bound..bound)).collect()
    }

    /// Brings the items into a random order.
    pub fn shuffle<Item>(&mut self, items: &mut [Item]) {
        items.shuffle(&mut self.0);
    }
}
