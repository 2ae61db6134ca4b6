//! Dropout of weights: which are dropped is a function of the seed and of the score's place alone.
//!
//! The score at (b, h, i, j) takes number j mod 4 of [`philox`] at the counter (j / 4, i, first + b · num_heads
//! + h), whose last part fills the two upper words. It is dropped where that number is less than p · 2^32.

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

use crate::alloc::{filled, product};
use crate::error::Error;
use crate::matrix::MatrixMut;
use crate::philox::{MULTIPLIER, ROUNDS, WEYL, philox};
use crate::schedule::for_each_chunk;
use crate::simd::{MAX_LANES, SimdFloat};

/// Dropout: each number is dropped with probability `p`, and the others are multiplied by 1 / (1 - p).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// The probability, in [0, 1).
    pub p: f64,
    /// Decides which numbers are dropped.
    pub seed: u64,
    /// Where the numbers start in a larger whole, whose numbers are dropped whether its parts are computed together or apart. Scores
    /// count the heads of all sequences before theirs, other tensors the numbers before theirs.
    pub first: u64,
}

impl Dropout {
    /// A weight is dropped if its number is less than this.
    pub(crate) fn threshold(&self) -> u32 {
        (self.p * 2f64.powi(32)) as u32
    }

    /// What each weight of a tile is multiplied by: `factors` has a row for each key of `keys`, in it a number for each query
    /// from `first_query` on. `head` counts the heads of all sequences from `first` on.
    #[inline(always)]
    pub(crate) fn factors<R: SimdFloat, S: Simd>(
        &self,
        simd: S,
        head: u64,
        first_query: usize,
        keys: &Range<usize>,
        mut factors: MatrixMut<R>,
    ) {
        let (threshold, width) = (self.threshold(), factors.columns());
        let head = self.first.wrapping_add(head);
        let keep = R::from_f64(1.0 / (1.0 - self.p));
        for block in keys.start / 4..keys.end.div_ceil(4) {
            for lane in (0..width).step_by(S::U32_LANES) {
                let query = (first_query + lane) as u32;
                let counter = [block as u32, query, head as u32, (head >> 32) as u32];
                let numbers = philox_lanes(simd, self.seed, counter);
                for (key, numbers) in (block * 4..).zip(numbers).filter(|(key, _)| keys.contains(key)) {
                    let lanes = lane..(lane + S::U32_LANES).min(width);
                    for (factor, number) in factors.row(key - keys.start)[lanes].iter_mut().zip(numbers) {
                        *factor = if number < threshold { R::ZERO } else { keep };
                    }
                }
            }
        }
    }
}

/// The four numbers at the counters (first, second + lane, third, fourth) of as many lanes as a vector has: number n of a lane is
/// at \[n\]\[lane\].
#[inline(always)]
pub(crate) fn philox_lanes<S: Simd>(
    simd: S,
    seed: u64,
    [first, second, third, fourth]: [u32; 4],
) -> [[u32; MAX_LANES]; 4] {
    const { assert!(S::U32_LANES <= MAX_LANES) };
    let mut lanes = [0u32; MAX_LANES];
    lanes.iter_mut().enumerate().for_each(|(lane, x)| *x = second.wrapping_add(lane as u32));
    let mut counter = [
        simd.splat_u32s(first),
        cast_slice::<u32, S::u32s>(&lanes[..S::U32_LANES])[0],
        simd.splat_u32s(third),
        simd.splat_u32s(fourth),
    ];
    let mut key = [seed as u32, (seed >> 32) as u32];
    let multiplier = [simd.splat_u32s(MULTIPLIER[0]), simd.splat_u32s(MULTIPLIER[1])];
    for _ in 0..ROUNDS {
        let (low0, high0) = simd.widening_mul_u32s(multiplier[0], counter[0]);
        let (low1, high1) = simd.widening_mul_u32s(multiplier[1], counter[2]);
        counter = [
            simd.xor_u32s(simd.xor_u32s(high1, counter[1]), simd.splat_u32s(key[0])),
            low1,
            simd.xor_u32s(simd.xor_u32s(high0, counter[3]), simd.splat_u32s(key[1])),
            low0,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    let mut numbers = [[0; MAX_LANES]; 4];
    for (numbers, counter) in numbers.iter_mut().zip(counter) {
        cast_slice_mut::<u32, S::u32s>(&mut numbers[..S::U32_LANES])[0] = counter;
    }
    numbers
}

/// What dropout keeps (1) and drops (0) of scores of shape (batch, num_heads, q_len, kv_len).
///
/// # Errors
///
/// [`Error::Memory`] if there is no memory for as many bytes as there are scores.
///
/// # Examples
///
/// ```
/// use attention_kernels::Dropout;
/// use attention_kernels::dropout::kept_by_dropout;
///
/// let dropout = Dropout { p: 0.25, seed: 7, first: 0 };
/// let kept = kept_by_dropout(dropout, (1, 1, 100, 100))?;
/// let share = kept.iter().map(|&kept| f64::from(kept)).sum::<f64>() / 10_000.0;
/// assert!((share - 0.75).abs() < 0.02);
///
/// // The second of two heads alone.
/// let both = kept_by_dropout(dropout, (1, 2, 10, 10))?;
/// assert_eq!(kept_by_dropout(Dropout { first: 1, ..dropout }, (1, 1, 10, 10))?, both[100..]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn kept_by_dropout(
    dropout: Dropout,
    (batch, heads, q_len, kv_len): (usize, usize, usize, usize),
) -> Result<Vec<u8>, Error> {
    const WHAT: &str = "weights that dropout keeps";
    let threshold = dropout.threshold();
    let mut kept = filled(WHAT, product(WHAT, &[batch, heads, q_len, kv_len])?, 0u8)?;
    for_each_chunk(&mut kept, kv_len.max(1), |row, kept| {
        let (head, i) = (dropout.first.wrapping_add((row / q_len) as u64), (row % q_len) as u32);
        for (block, kept) in kept.chunks_mut(4).enumerate() {
            let numbers = philox(dropout.seed, [block as u32, i, head as u32, (head >> 32) as u32]);
            kept.iter_mut().zip(numbers).for_each(|(kept, number)| *kept = u8::from(number >= threshold));
        }
    });
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::with_every_simd;

    #[test]
    fn dropout_depends_on_the_place_alone() {
        let dropout = Dropout { p: 0.3, seed: 3, first: 0 };
        let large = kept_by_dropout(dropout, (2, 3, 4, 9)).unwrap();
        for head in 0..6 {
            let small = kept_by_dropout(Dropout { first: head, ..dropout }, (1, 1, 2, 5)).unwrap();
            for i in 0..2 {
                assert_eq!(small[i * 5..][..5], large[(head as usize * 4 + i) * 9..][..5]);
            }
        }
    }

    #[test]
    fn more_scores_than_memory_are_an_error() {
        for len in [usize::MAX, 1 << 40] {
            assert!(matches!(kept_by_dropout(Dropout::default(), (1, 1, len, len)), Err(Error::Memory { .. })));
        }
    }

    #[test]
    fn lanes_are_the_generator() {
        with_every_simd!(|simd| {
            let counter = [3, u32::MAX - 2, 5, 6];
            let numbers = philox_lanes(simd, 0x1234_5678_9ABC_DEF0, counter);
            for (lane, all) in (0..S::U32_LANES).map(|lane| (lane, numbers.map(|numbers| numbers[lane]))) {
                let second = counter[1].wrapping_add(lane as u32);
                let expected = philox(0x1234_5678_9ABC_DEF0, [3, second, 5, 6]);
                assert_eq!(all, expected);
            }
        });
    }

    /// A tile that starts and ends in the midst of a block of four keys.
    #[test]
    fn factors_of_a_tile_are_those_of_the_whole() {
        with_every_simd!(|simd| {
            let (heads, q_len, kv_len) = (3, 40, 21);
            let dropout = Dropout { p: 0.4, seed: 11, first: 1 };
            let kept = kept_by_dropout(dropout, (1, heads, q_len, kv_len)).unwrap();
            let (head, first_query, keys, width) = (2, 3, 5..18, 33);
            let mut factors = vec![0f64; keys.len() * (width + 1)];
            let target = MatrixMut::new(&mut factors, keys.len(), width, width + 1);
            dropout.factors(simd, head as u64, first_query, &keys, target);
            for (key, row) in keys.zip(factors.chunks_exact(width + 1)) {
                for i in 0..width {
                    let kept = kept[(head * q_len + first_query + i) * kv_len + key];
                    assert_eq!(row[i], f64::from(kept) * (1.0 / 0.6));
                }
            }
        });
    }
}
