//! Random numbers that can be computed anywhere, in any order: the Philox4x32-10 counter-based generator.
//!
//! Dropout needs the same number for the same score whether the score is computed in a matrix, in a tile, or once more
//! in the backward pass. A counter-based generator has no state: a number is a function of the seed and of the counter.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.

/// Multipliers of the two halves of a round (table 2 of the paper).
pub(crate) const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the key between rounds: the golden ratio and sqrt(3) - 1, as 32-bit fractions.
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// The number of rounds that the paper recommends; seven pass every test, ten leave a margin.
pub(crate) const ROUNDS: usize = 10;

/// The four numbers at a counter, for a seed.
///
/// # Examples
///
/// ```
/// use attention_kernels::philox::philox;
///
/// assert_eq!(philox(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
/// ```
pub fn philox(seed: u64, mut counter: [u32; 4]) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let product =
            [u64::from(MULTIPLIER[0]) * u64::from(counter[0]), u64::from(MULTIPLIER[1]) * u64::from(counter[2])];
        counter = [
            (product[1] >> 32) as u32 ^ counter[1] ^ key[0],
            product[1] as u32,
            (product[0] >> 32) as u32 ^ counter[3] ^ key[1],
            product[0] as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Seed number `index` of the many that one seed stands for.
pub fn nth_seed(seed: u64, index: u64) -> u64 {
    let [low, high, ..] = philox(seed, [index as u32, (index >> 32) as u32, 0, 0]);
    u64::from(low) | u64::from(high) << 32
}

/// A seed of its own for everything that has a name: two layers of one config differ, and each is the same every time.
pub fn named_seed(seed: u64, name: &str) -> u64 {
    // FNV-1a spreads the name over 64 bits.
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    nth_seed(seed, hash)
}

/// `count` numbers, uniform in [-bound, bound).
pub fn uniform(seed: u64, bound: f64, count: usize) -> impl Iterator<Item = f64> {
    let blocks = (0..u64::MAX).flat_map(move |block| philox(seed, [block as u32, (block >> 32) as u32, 0, 0]));
    blocks.map(move |bits| (f64::from(bits) / 2f64.powi(32) * 2.0 - 1.0) * bound).take(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors ship with their library, Random123.
    #[test]
    fn known_answers() {
        assert_eq!(philox(0, [0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(
            philox(0x299F_31D0_A409_3822, [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344]),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, many numbers")]
    fn uniform_numbers_fill_their_range_evenly() {
        let numbers = uniform(7, 0.5, 10_001).collect::<Vec<_>>();
        assert_eq!(numbers.len(), 10_001);
        assert!(numbers.iter().all(|x| (-0.5..0.5).contains(x)));
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let variance = numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 1.0 / 12.0).abs() < 0.003, "{variance}");
    }

    #[test]
    fn names_and_seeds_have_numbers_of_their_own() {
        assert_eq!(named_seed(1, "q_proj.weight"), named_seed(1, "q_proj.weight"));
        assert_ne!(named_seed(1, "q_proj.weight"), named_seed(1, "k_proj.weight"));
        assert_ne!(named_seed(1, "q_proj.weight"), named_seed(2, "q_proj.weight"));
    }
}
