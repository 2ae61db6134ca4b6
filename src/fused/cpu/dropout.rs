//! Philox, a vector of counters at a time.

use pulp::Simd;

use crate::philox::{MULTIPLIER, ROUNDS, WEYL};

/// The most numbers in a vector of u32.
const MOST_LANES: usize = 16;

/// The four numbers at the counters (first, second + lane, third, fourth) of as many lanes as a vector has: number n of a lane is at
/// [n][lane].
#[inline(always)]
pub(crate) fn philox_lanes<S: Simd>(
    simd: S,
    seed: u64,
    [first, second, third, fourth]: [u32; 4],
) -> [[u32; MOST_LANES]; 4] {
    let mut lanes = [0; MOST_LANES];
    lanes.iter_mut().enumerate().for_each(|(lane, x)| *x = second.wrapping_add(lane as u32));
    let mut counter = [
        simd.splat_u32s(first),
        // SAFETY: a vector has at most 16 numbers, and any bits are one.
        unsafe { lanes.as_ptr().cast::<S::u32s>().read_unaligned() },
        simd.splat_u32s(third),
        simd.splat_u32s(fourth),
    ];
    let mut key = [seed as u32, (seed >> 32) as u32];
    let multiplier = MULTIPLIER.map(|x| simd.splat_u32s(x));
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
    let mut numbers = [[0; MOST_LANES]; 4];
    for (numbers, counter) in numbers.iter_mut().zip(counter) {
        // SAFETY: as above.
        unsafe { numbers.as_mut_ptr().cast::<S::u32s>().write_unaligned(counter) };
    }
    numbers
}
