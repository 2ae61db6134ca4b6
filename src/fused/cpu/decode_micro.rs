//! The inner loops of decoding: one key or value after the other, with a few rows of queries or weights for it.

use pulp::Simd;

use super::decode::KEYS;
use super::micro::{Rows, in_blocks, load, load_up_to, pad, prefetch, store};
use super::real::Real;

/// How far ahead memory is asked for, in numbers. Half and twice as many are slower.
const AHEAD: usize = 1024;

/// scores[row][j] = Σ_d keys[j][d] · queries[row][d] for `count` keys.
///
/// # Safety
///
/// `keys` has `count` rows of d, at most KEYS; `queries` has `rows` of pad(d), `scores` `rows` of KEYS.
#[inline(always)]
pub(crate) unsafe fn dot_products<R: Real, S: Simd>(
    simd: S,
    d: usize,
    keys: Rows<*const R>,
    count: usize,
    queries: &[R],
    rows: usize,
    scores: &mut [R],
) {
    let (queries, scores) = (queries.as_ptr(), scores.as_mut_ptr());
    // SAFETY: as the caller promises; a block stays inside `rows`.
    unsafe {
        in_blocks!(rows, [4, 2, 1], |row, N| dot_block::<R, S, N>(
            simd,
            d,
            keys,
            count,
            queries.add(row * pad(d)),
            scores.add(row * KEYS),
        ));
    }
}

/// # Safety
///
/// As [`dot_products`], for N rows.
#[inline(always)]
unsafe fn dot_block<R: Real, S: Simd, const N: usize>(
    simd: S,
    d: usize,
    keys: Rows<*const R>,
    count: usize,
    queries: *const R,
    scores: *mut R,
) {
    let lanes = R::lanes::<S>();
    for j in 0..count {
        // One key after the other: the processor then sees that memory is read in order.
        let mut sums = [R::splat(simd, R::ZERO); N];
        // SAFETY: as the caller promises; what lies behind d is zero in the queries.
        unsafe {
            let key = keys.start.add(j * keys.stride);
            for c in (0..d).step_by(lanes) {
                prefetch(key.wrapping_add(AHEAD.div_ceil(d) * keys.stride + c));
                let entries = load_up_to::<R, S>(simd, key.add(c), d - c);
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = R::mul_add(simd, entries, load::<R, S>(queries.add(row * pad(d) + c)), *sum);
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                *scores.add(row * KEYS + j) = R::reduce_add(simd, sum);
            }
        }
    }
}

/// sums[row][c] += Σ_j weights[row][j] · values[j][c] over `count` keys.
///
/// # Safety
///
/// `values` has `count` rows of dv, at most KEYS; `weights` has `rows` of KEYS, `sums` `rows` of pad(dv).
#[inline(always)]
pub(crate) unsafe fn add_values<R: Real, S: Simd>(
    simd: S,
    dv: usize,
    values: Rows<*const R>,
    count: usize,
    weights: &[R],
    rows: usize,
    sums: &mut [R],
) {
    let (weights, sums) = (weights.as_ptr(), sums.as_mut_ptr());
    // SAFETY: as the caller promises; a block stays inside `rows`.
    unsafe {
        in_blocks!(rows, [4, 2, 1], |row, N| value_block::<R, S, N>(
            simd,
            dv,
            values,
            count,
            weights.add(row * KEYS),
            sums.add(row * pad(dv)),
        ));
    }
}

/// # Safety
///
/// As [`add_values`], for N rows.
#[inline(always)]
unsafe fn value_block<R: Real, S: Simd, const N: usize>(
    simd: S,
    dv: usize,
    values: Rows<*const R>,
    count: usize,
    weights: *const R,
    sums: *mut R,
) {
    let lanes = R::lanes::<S>();
    for j in 0..count {
        let mut factors = [R::splat(simd, R::ZERO); N];
        // SAFETY: as the caller promises; the sums have room behind dv.
        unsafe {
            for (row, factor) in factors.iter_mut().enumerate() {
                *factor = R::splat(simd, *weights.add(row * KEYS + j));
            }
            let value = values.start.add(j * values.stride);
            for c in (0..dv).step_by(lanes) {
                prefetch(value.wrapping_add(AHEAD.div_ceil(dv) * values.stride + c));
                let entries = load_up_to::<R, S>(simd, value.add(c), dv - c);
                for (row, factor) in factors.into_iter().enumerate() {
                    let place = sums.add(row * pad(dv) + c);
                    store::<R, S>(place, R::mul_add(simd, entries, factor, load::<R, S>(place)));
                }
            }
        }
    }
}
