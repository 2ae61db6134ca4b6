//! The inner loops of decoding: one key or value after the other, with a few rows of queries or weights for it.

use pulp::Simd;

use crate::gemm::microkernel::{in_blocks, load_at, store_at};
use crate::matrix::{Matrix, MatrixMut, Raw};
use crate::simd::{SimdFloat, load_up_to, prefetch};

/// How far ahead memory is asked for, in numbers. Half and twice as many are slower.
const AHEAD: usize = 1024;

/// How many products scalar code adds up before it begins again at zero: a sum of 64 in one run errs twice as much as vectors do.
const SCALAR_RUN: usize = 16;

/// A vector, or if there are only `count` numbers, these and zeros.
///
/// # Safety
///
/// `from` points to `count` numbers.
#[inline(always)]
unsafe fn load_up_to_at<R: SimdFloat, S: Simd>(simd: S, from: *const R, count: usize) -> R::Vector<S> {
    // SAFETY: this function's own condition.
    load_up_to::<R, S>(simd, unsafe { std::slice::from_raw_parts(from, count) })
}

/// scores\[row\]\[j\] = Σ_c keys\[j\]\[c\] · queries\[row\]\[c\]. Rows of queries are filled up with zeros to whole vectors.
///
/// # Panics
///
/// If the sizes don't fit.
#[inline(always)]
pub(crate) fn dot_products<R: SimdFloat, S: Simd>(
    simd: S,
    keys: Matrix<R>,
    queries: Matrix<R>,
    mut scores: MatrixMut<R>,
) {
    let (count, d, rows) = (keys.rows(), keys.columns(), queries.rows());
    assert!(queries.columns() >= d.next_multiple_of(R::lanes::<S>()), "queries of whole vectors");
    assert!(scores.rows() == rows && scores.columns() == count, "a score for each row and key");
    let (keys, queries, scores) = (keys.raw(), queries.raw(), scores.raw());
    // SAFETY: the assertions; block `row` lies inside the `rows` rows.
    unsafe {
        in_blocks!(rows, [4, 2, 1], |row, N| dot_block::<R, S, N>(
            simd,
            d,
            keys,
            count,
            queries.from(row, 0),
            scores.from(row, 0),
        ));
    }
}

/// # Safety
///
/// `keys` has `count` rows of d, `queries` N rows of whole vectors for d, `scores` N rows of `count`.
#[inline(always)]
unsafe fn dot_block<R: SimdFloat, S: Simd, const N: usize>(
    simd: S,
    d: usize,
    keys: Raw<*const R>,
    count: usize,
    queries: Raw<*const R>,
    scores: Raw<*mut R>,
) {
    let lanes = R::lanes::<S>();
    let (whole, ahead) = (d / lanes * lanes, AHEAD.div_ceil(d) * keys.stride);
    for j in 0..count {
        // One key after the other: the processor then sees that memory is read in order.
        let (mut sums, mut of_runs) = ([R::splat(simd, R::ZERO); N], [R::splat(simd, R::ZERO); N]);
        // SAFETY: j is one of `count`, c one of d, `row` one of N; behind d the queries are zero.
        unsafe {
            let key = keys.at(j, 0);
            // A macro and no closure: a closure that isn't inlined is compiled without the instruction set, and takes ten times as
            // long.
            macro_rules! add {
                ($c:expr, $entries:expr) => {{
                    let (c, entries) = ($c, $entries);
                    prefetch(key.wrapping_add(ahead + c));
                    if lanes == 1 && c.is_multiple_of(SCALAR_RUN) {
                        for (sum, of_runs) in sums.iter_mut().zip(&mut of_runs) {
                            *of_runs = R::vadd(simd, *of_runs, std::mem::replace(sum, R::splat(simd, R::ZERO)));
                        }
                    }
                    for (row, sum) in sums.iter_mut().enumerate() {
                        *sum = R::mul_add(simd, entries, load_at::<R, S>(queries.at(row, c)), *sum);
                    }
                }};
            }
            for c in (0..whole).step_by(lanes) {
                add!(c, load_at::<R, S>(key.add(c)));
            }
            if whole < d {
                add!(whole, load_up_to_at::<R, S>(simd, key.add(whole), d - whole));
            }
            for (row, (sum, of_runs)) in sums.into_iter().zip(of_runs).enumerate() {
                let sum = if lanes == 1 { R::vadd(simd, of_runs, sum) } else { sum };
                *scores.at(row, j) = R::reduce_add(simd, sum);
            }
        }
    }
}

/// sums\[row\]\[c\] += Σ_j weights\[row\]\[j\] · values\[j\]\[c\]. Rows of sums have room for whole vectors.
///
/// # Panics
///
/// If the sizes don't fit.
#[inline(always)]
pub(super) fn add_values<R: SimdFloat, S: Simd>(
    simd: S,
    values: Matrix<R>,
    weights: Matrix<R>,
    mut sums: MatrixMut<R>,
) {
    let (count, dv, rows) = (values.rows(), values.columns(), weights.rows());
    assert!(sums.rows() == rows && sums.columns() >= dv.next_multiple_of(R::lanes::<S>()), "sums of whole vectors");
    assert!(weights.columns() == count, "a weight for each row and value");
    let (values, weights, sums) = (values.raw(), weights.raw(), sums.raw());
    // SAFETY: the assertions; block `row` lies inside the `rows` rows.
    unsafe {
        in_blocks!(rows, [4, 2, 1], |row, N| value_block::<R, S, N>(
            simd,
            dv,
            values,
            count,
            weights.from(row, 0),
            sums.from(row, 0),
        ));
    }
}

/// # Safety
///
/// `values` has `count` rows of dv, `weights` N rows of `count`, `sums` N rows of whole vectors for dv.
#[inline(always)]
unsafe fn value_block<R: SimdFloat, S: Simd, const N: usize>(
    simd: S,
    dv: usize,
    values: Raw<*const R>,
    count: usize,
    weights: Raw<*const R>,
    sums: Raw<*mut R>,
) {
    let lanes = R::lanes::<S>();
    let (whole, ahead) = (dv / lanes * lanes, AHEAD.div_ceil(dv) * values.stride);
    for j in 0..count {
        let mut factors = [R::splat(simd, R::ZERO); N];
        // SAFETY: j is one of `count`, c one of dv, `row` one of N; the sums have room behind dv.
        unsafe {
            for (row, factor) in factors.iter_mut().enumerate() {
                *factor = R::splat(simd, *weights.at(row, j));
            }
            let value = values.at(j, 0);
            // A macro, as in `dot_block`.
            macro_rules! add {
                ($c:expr, $entries:expr) => {{
                    let (c, entries) = ($c, $entries);
                    prefetch(value.wrapping_add(ahead + c));
                    for (row, factor) in factors.into_iter().enumerate() {
                        let to = sums.at(row, c);
                        store_at::<R, S>(to, R::mul_add(simd, entries, factor, load_at::<R, S>(to)));
                    }
                }};
            }
            for c in (0..whole).step_by(lanes) {
                add!(c, load_at::<R, S>(value.add(c)));
            }
            if whole < dv {
                add!(whole, load_up_to_at::<R, S>(simd, value.add(whole), dv - whole));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::pad;
    use crate::gemm::microkernel::tests::{check_guard, close, numbers, sizes};
    use crate::simd::with_every_simd;

    fn check<R: SimdFloat, S: Simd>(simd: S, rows: usize, count: usize, d: usize) {
        let (stride, key_stride) = (count + 3, d + 5);
        let keys = numbers::<R>(1, (count - 1) * key_stride + d);
        let keys_of = Matrix::new(&keys, count, d, key_stride);
        let mut queries = numbers::<R>(2, rows * pad(d));
        queries.chunks_exact_mut(pad(d)).for_each(|row| row[d..].fill(R::ZERO));
        let before = numbers::<R>(3, rows * stride);
        let mut scores = before.clone();
        let queries_of = Matrix::new(&queries, rows, pad(d), pad(d));
        dot_products(simd, keys_of, queries_of, MatrixMut::new(&mut scores, rows, count, stride));
        for (row, j) in (0..rows).flat_map(|row| (0..count).map(move |j| (row, j))) {
            let product = |c: usize| keys[j * key_stride + c].to_f64() * queries[row * pad(d) + c].to_f64();
            assert!(close(scores[row * stride + j], (0..d).map(product).sum()), "{rows} {count} {d}");
        }
        check_guard(&scores, &before, rows, count, stride);

        let before = numbers::<R>(4, rows * pad(d));
        let mut sums = before.clone();
        let weights = Matrix::new(&scores, rows, count, stride);
        add_values(simd, keys_of, weights, MatrixMut::new(&mut sums, rows, pad(d), pad(d)));
        for (row, c) in (0..rows).flat_map(|row| (0..d).map(move |c| (row, c))) {
            let product = |j: usize| scores[row * stride + j].to_f64() * keys[j * key_stride + c].to_f64();
            let expected = before[row * pad(d) + c].to_f64() + (0..count).map(product).sum::<f64>();
            let close = (sums[row * pad(d) + c].to_f64() - expected).abs() <= 1e-4 * expected.abs().max(1.0);
            assert!(close, "{rows} {count} {d}");
        }
    }

    #[test]
    fn kernels_are_naive_loops() {
        with_every_simd!(|simd| {
            for &(count, d) in sizes() {
                for rows in [1, 3, 7] {
                    check::<f32, S>(simd, rows, count, d);
                    check::<f64, S>(simd, rows, count, d);
                }
            }
        });
    }

    #[test]
    #[should_panic(expected = "a score for each row and key")]
    fn too_few_scores_are_refused() {
        let (keys, queries) = ([0.0f32; 8], [0.0; 16]);
        let mut scores = [0.0; 1];
        let scores = MatrixMut::new(&mut scores, 1, 1, 1);
        dot_products(pulp::Scalar, Matrix::new(&keys, 2, 4, 4), Matrix::new(&queries, 1, 16, 16), scores);
    }

    #[test]
    #[should_panic(expected = "sums of whole vectors")]
    fn too_short_sums_are_refused() {
        let (values, weights) = ([0.0f32; 8], [0.0; 2]);
        let mut sums = [0.0; 3];
        let sums = MatrixMut::new(&mut sums, 1, 3, 3);
        add_values(pulp::Scalar, Matrix::new(&values, 2, 4, 4), Matrix::new(&weights, 1, 2, 2), sums);
    }
}
