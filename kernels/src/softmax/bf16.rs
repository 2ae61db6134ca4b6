//! The softmax of a tile whose weights are multiplied in bf16: exponentials, their sums, and their rounding to pairs in one pass,
//! forward and backward. The exponentials are those of f32 to a unit in the last place; no step rounds to bf16 but the last.
//!
//! Only with AVX-512, which the products of bf16 need as well.

use crate::gemm::bf16_dot::{Bf16Dot, WIDTH};
use crate::matrix::{Matrix, MatrixMut};
use crate::softmax::RowStatistics;

/// A row of a panel, aligned as vectors are.
#[repr(C, align(64))]
pub(crate) struct AlignedRow(pub(crate) [f32; WIDTH]);

/// As [`online_update`](super::online_update) of scores times `factor`; `now` and `largest` are not multiplied by it. It leaves pairs of rows in the first half of the scores: what
/// [`Bf16Dot::narrow_down`] would make of its exponentials.
pub(crate) fn online_update<'a>(
    _: Bf16Dot,
    mut scores: MatrixMut<'a, f32>,
    factor: f32,
    now: &[f32; WIDTH],
    largest: &mut [f32],
    total: &mut [f32],
) -> (MatrixMut<'a, u32>, AlignedRow) {
    assert!(scores.columns() == WIDTH && scores.stride() >= WIDTH, "rows of a panel");
    let (largest, total) = (as_row_mut(largest), as_row_mut(total));
    let mut rescale = AlignedRow([0.0; WIDTH]);
    let count = scores.rows();
    // SAFETY: the assertion: no row reaches into the next; a `Bf16Dot` says that the processor has the instructions.
    unsafe { kernels::online_update(scores.raw(), count, factor, now, largest, total, &mut rescale.0) };
    *largest = *now;
    (scores.cast().into_part(count.div_ceil(2)), rescale)
}

/// As [`weights_and_gradients`](super::weights_and_gradients) of scores times `factor`, by which the greatest ones are not multiplied.
/// `weights` and `grads` become rows of pairs of queries (see
/// [`Bf16Dot::narrow_along`]); what stands in `of_keys` in the end is pairs of rows of the gradients.
pub(crate) fn weights_and_gradients<'a>(
    _: Bf16Dot,
    rows: RowStatistics<f32>,
    factor: f32,
    scores: Matrix<f32>,
    mut of_keys: MatrixMut<'a, f32>,
    mut weights: MatrixMut<u32>,
    mut grads: MatrixMut<u32>,
) -> MatrixMut<'a, u32> {
    let count = scores.rows();
    assert!(scores.columns() == WIDTH && of_keys.columns() == WIDTH && of_keys.stride() >= WIDTH, "rows of a panel");
    assert!([of_keys.rows(), weights.rows(), grads.rows()] == [count; 3], "as many rows of each");
    assert!(weights.columns() == WIDTH / 2 && grads.columns() == WIDTH / 2, "rows of pairs");
    let statistics = [rows.largest, rows.log_total, rows.delta].map(as_row);
    // SAFETY: the assertions; a `Bf16Dot` says that the processor has the instructions.
    unsafe {
        kernels::weights_and_gradients(
            scores.raw(),
            of_keys.raw(),
            count,
            factor,
            statistics,
            weights.raw(),
            grads.raw(),
        );
    }
    of_keys.cast().into_part(count.div_ceil(2))
}

fn as_row(numbers: &[f32]) -> &[f32; WIDTH] {
    numbers.first_chunk().expect("a row of a panel")
}

fn as_row_mut(numbers: &mut [f32]) -> &mut [f32; WIDTH] {
    numbers.first_chunk_mut().expect("a row of a panel")
}

#[cfg(target_arch = "x86_64")]
mod kernels {
    use std::arch::x86_64::*;
    use std::f32::consts::LOG2_E;

    use super::WIDTH;
    use crate::gemm::bf16_dot::LANES;
    use crate::gemm::bf16_dot::avx512::{bits, pairs_of_rows};
    use crate::gemm::microkernel::VECTORS;
    use crate::matrix::Raw;

    /// Coefficients of 2^r on [0, 1], which start with 1 so that 2^0 is 1. These have the least relative error that a polynomial of
    /// degree 5 can have, 2^-23.3.
    const EXP2: [f32; 6] = [1.0, 0.693_151_3, 0.240_164_45, 0.055_799_913, 0.009_017_03, 0.001_867_13];

    /// 2^y, denormal numbers included; 0 for minus infinity.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn exp2(y: __m512) -> __m512 {
        /// No bits behind the point are kept, and what is taken away is rounded down.
        const FLOOR: i32 = 1;
        // Of minus infinity this is 0.
        let r = _mm512_reduce_ps::<FLOOR>(y);
        let mut power = _mm512_set1_ps(EXP2[5]);
        for i in (0..5).rev() {
            power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(EXP2[i]));
        }
        // power · 2^floor(y)
        _mm512_scalef_ps(power, y)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_row(row: &[f32; WIDTH]) -> [__m512; VECTORS] {
        // SAFETY: a row is VECTORS vectors.
        unsafe { [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(LANES))] }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store_row(row: &mut [f32; WIDTH], vectors: [__m512; VECTORS]) {
        for (v, vector) in vectors.into_iter().enumerate() {
            // SAFETY: a row is VECTORS vectors.
            unsafe { _mm512_storeu_ps(row.as_mut_ptr().add(v * LANES), vector) };
        }
    }

    /// # Safety
    ///
    /// `scores` has `count` rows of W numbers, none of which reaches into the next.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn online_update(
        scores: Raw<*mut f32>,
        count: usize,
        factor: f32,
        now: &[f32; WIDTH],
        largest: &[f32; WIDTH],
        total: &mut [f32; WIDTH],
        rescale: &mut [f32; WIDTH],
    ) {
        let (to_log2, now, mut sums) = (_mm512_set1_ps(factor * LOG2_E), load_row(now), [_mm512_setzero_ps(); VECTORS]);
        for pair in 0..count.div_ceil(2) {
            let has_second = 2 * pair + 1 < count;
            for v in 0..VECTORS {
                // SAFETY: row 2 · pair is one of `count`, and so is the next where it is read. Row `pair`, which is written, has been
                // read.
                unsafe {
                    let score = |row: usize| _mm512_sub_ps(_mm512_loadu_ps(scores.at(row, v * LANES)), now[v]);
                    let first = exp2(_mm512_mul_ps(score(2 * pair), to_log2));
                    let second = if has_second {
                        exp2(_mm512_mul_ps(score(2 * pair + 1), to_log2))
                    } else {
                        _mm512_setzero_ps()
                    };
                    sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(first, second));
                    _mm512_storeu_si512(scores.at(pair, v * LANES).cast(), pairs_of_rows(first, second));
                }
            }
        }
        let (mut factors, mut totals) = (load_row(largest), load_row(total));
        for v in 0..VECTORS {
            factors[v] = exp2(_mm512_mul_ps(_mm512_sub_ps(factors[v], now[v]), to_log2));
            totals[v] = _mm512_fmadd_ps(factors[v], totals[v], sums[v]);
        }
        store_row(rescale, factors);
        store_row(total, totals);
    }

    /// # Safety
    ///
    /// `scores` and `of_keys` have `count` rows of W numbers, none of which reaches into the next, `weights` and `grads` as many of
    /// W / 2 pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn weights_and_gradients(
        scores: Raw<*const f32>,
        of_keys: Raw<*mut f32>,
        count: usize,
        factor: f32,
        [largest, log_total, delta]: [&[f32; WIDTH]; 3],
        weights: Raw<*mut u32>,
        grads: Raw<*mut u32>,
    ) {
        let (to_log2, of_totals) = (_mm512_set1_ps(factor * LOG2_E), _mm512_set1_ps(LOG2_E));
        let (largest, log_total, delta) = (load_row(largest), load_row(log_total), load_row(delta));
        let log2_total = log_total.map(|log_total| _mm512_mul_ps(log_total, of_totals));
        for pair in 0..count.div_ceil(2) {
            let mut ds = [[_mm512_setzero_ps(); VECTORS]; 2];
            for (second, ds) in ds.iter_mut().enumerate().take(count - 2 * pair) {
                let row = 2 * pair + second;
                let mut p = [_mm512_setzero_ps(); VECTORS];
                for v in 0..VECTORS {
                    // SAFETY: the row is one of `count`.
                    let (score, dp) = unsafe {
                        (_mm512_loadu_ps(scores.at(row, v * LANES)), _mm512_loadu_ps(of_keys.at(row, v * LANES)))
                    };
                    p[v] = exp2(_mm512_fmsub_ps(_mm512_sub_ps(score, largest[v]), to_log2, log2_total[v]));
                    ds[v] = _mm512_mul_ps(p[v], _mm512_sub_ps(dp, delta[v]));
                }
                // SAFETY: the row is one of `count`.
                unsafe {
                    _mm512_storeu_si512(weights.at(row, 0).cast(), bits(_mm512_cvtne2ps_pbh(p[1], p[0])));
                    _mm512_storeu_si512(grads.at(row, 0).cast(), bits(_mm512_cvtne2ps_pbh(ds[1], ds[0])));
                }
            }
            let [first, second] = ds;
            for (v, (first, second)) in first.into_iter().zip(second).enumerate() {
                // SAFETY: row `pair` is one of `count`, and has been read.
                unsafe { _mm512_storeu_si512(of_keys.at(pair, v * LANES).cast(), pairs_of_rows(first, second)) };
            }
        }
    }
}

/// Elsewhere there is never a [`Bf16Dot`].
#[cfg(not(target_arch = "x86_64"))]
mod kernels {
    use super::WIDTH;
    use crate::matrix::Raw;

    pub(super) unsafe fn online_update(
        _: Raw<*mut f32>,
        _: usize,
        _: f32,
        _: &[f32; WIDTH],
        _: &[f32; WIDTH],
        _: &mut [f32; WIDTH],
        _: &mut [f32; WIDTH],
    ) {
        unreachable!("only x86-64 has the instructions")
    }

    pub(super) unsafe fn weights_and_gradients(
        _: Raw<*const f32>,
        _: Raw<*mut f32>,
        _: usize,
        _: f32,
        _: [&[f32; WIDTH]; 3],
        _: Raw<*mut u32>,
        _: Raw<*mut u32>,
    ) {
        unreachable!("only x86-64 has the instructions")
    }
}

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests {
    use half::bf16;

    use super::*;
    use crate::gemm::bf16_dot::LANES;
    use crate::gemm::microkernel::tests::numbers;

    /// Both halves of a pair.
    fn halves(pair: u32) -> [f64; 2] {
        [pair as u16, (pair >> 16) as u16].map(|bits| bf16::from_bits(bits).to_f64())
    }

    /// Within the rounding of bf16, and of an exponential of f32.
    fn close(x: f64, expected: f64) -> bool {
        (x - expected).abs() <= (1.0 / 256.0 + 1e-6) * expected.abs()
    }

    #[test]
    fn exponentials_are_rounded_once_and_summed_before() {
        let Some(dot) = pulp::x86::V4::try_new().and_then(|_| Bf16Dot::new::<pulp::x86::V4>()) else { return };
        for count in [1, 2, 7, 96] {
            let scores: Vec<f32> = numbers::<f32>(1, count * WIDTH).iter().map(|x| 40.0 * x).collect();
            let mut scores_of = scores.clone();
            // A hidden key, which has no weight.
            scores_of[WIDTH / 2] = f32::NEG_INFINITY;
            let hidden = scores_of.clone();
            let now: [f32; WIDTH] =
                std::array::from_fn(|w| (0..count).map(|j| hidden[j * WIDTH + w]).fold(0.0, f32::max));
            let (before, totals) = (now.map(|x| x - 2.0), [3.0f32; WIDTH]);
            let (mut largest, mut total) = (before, totals);
            let matrix = MatrixMut::new(&mut scores_of, count, WIDTH, WIDTH);
            let (pairs, factor) = online_update(dot, matrix, 0.5, &now, &mut largest, &mut total);
            assert_eq!((pairs.rows(), largest), (count.div_ceil(2), now));
            for w in 0..WIDTH {
                let weight = |j: usize| {
                    if j < count { (0.5 * (f64::from(hidden[j * WIDTH + w]) - f64::from(now[w]))).exp() } else { 0.0 }
                };
                for pair in 0..count.div_ceil(2) {
                    let got = halves(pairs.as_ref().row(pair)[w]);
                    assert!(
                        close(got[0], weight(2 * pair)) && close(got[1], weight(2 * pair + 1)),
                        "{count}, {pair}, {w}"
                    );
                }
                let sum: f64 = (0..count).map(weight).sum::<f64>() + 3.0 * (-1f64).exp();
                assert!((f64::from(total[w]) - sum).abs() <= 1e-5 * sum, "{count}, {w}");
                assert!((f64::from(factor.0[w]) - (-1f64).exp()).abs() <= 1e-6);
            }
        }
    }

    #[test]
    fn weights_and_gradients_are_rounded_both_ways() {
        let Some(dot) = pulp::x86::V4::try_new().and_then(|_| Bf16Dot::new::<pulp::x86::V4>()) else { return };
        for count in [1, 4, 9] {
            let [scores, dp] = [1, 2].map(|seed| numbers::<f32>(seed, count * WIDTH));
            let [largest, log_total, delta] = [3, 4, 5].map(|seed| numbers::<f32>(seed, WIDTH));
            let rows = RowStatistics { largest: &largest, log_total: &log_total, delta: &delta };
            let (mut of_keys, mut weights, mut grads) = (dp.clone(), vec![0; count * LANES], vec![0; count * LANES]);
            let down = weights_and_gradients(
                dot,
                rows,
                2.0,
                Matrix::new(&scores, count, WIDTH, WIDTH),
                MatrixMut::new(&mut of_keys, count, WIDTH, WIDTH),
                MatrixMut::new(&mut weights, count, LANES, LANES),
                MatrixMut::new(&mut grads, count, LANES, LANES),
            );
            for (j, w) in (0..count).flat_map(|j| (0..WIDTH).map(move |w| (j, w))) {
                let at = |x: &[f32]| f64::from(x[j * WIDTH + w]);
                let p = (2.0 * (at(&scores) - f64::from(largest[w])) - f64::from(log_total[w])).exp();
                let ds = p * (at(&dp) - f64::from(delta[w]));
                let along = |x: &[u32]| halves(x[j * LANES + w / 2])[w % 2];
                // A difference that is nearly zero has the rounding of what it is a difference of.
                let near = |x: f64| close(x, ds) || (x - ds).abs() <= 1e-6;
                assert!(close(along(&weights), p) && near(along(&grads)), "{count}, {j}, {w}");
                assert!(near(halves(down.as_ref().row(j / 2)[w])[j % 2]), "{count}, {j}, {w}");
            }
        }
    }
}
