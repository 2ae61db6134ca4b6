//! Rows to lanes and back: queries and operands of products into panels, contexts out of them, and a bias onto its scores.

use std::any::TypeId;
use std::mem::MaybeUninit;

use pulp::Simd;

use crate::matrix::{Matrix, MatrixMut, Raw};
use crate::simd::SimdFloat;

/// Columns of the blocks that registers transpose. A block has 4 rows, or 2 where fewer than 4 are left: 6 rows, as products with AVX2
/// pack them, are one of each.
const COLUMNS: usize = 8;

/// to\[c\]\[r\] = factor · from\[r\]\[c\]. With a factor of 1 the bits stay what they are, whether they are a number or not.
#[inline(always)]
pub(crate) fn transpose<R: SimdFloat, S: Simd>(simd: S, factor: R, from: Matrix<R>, mut to: MatrixMut<MaybeUninit<R>>) {
    let (rows, columns) = (from.rows(), from.columns());
    assert!(to.rows() >= columns && to.columns() >= rows, "room for the transposed matrix");
    let raw = to.raw();
    let to = Raw { start: raw.start.cast::<R>(), stride: raw.stride };
    // SAFETY: the assertion; `to` is borrowed alone, so it doesn't overlap `from`.
    unsafe { transpose_raw::<R, S, false>(simd, rows, columns, factor, from.raw(), to) }
}

/// to\[c\]\[r\] += from\[r\]\[c\]
#[inline(always)]
pub(crate) fn add_transposed<R: SimdFloat, S: Simd>(simd: S, from: Matrix<R>, mut to: MatrixMut<R>) {
    let (rows, columns) = (from.rows(), from.columns());
    assert!(to.rows() >= columns && to.columns() >= rows, "room for the transposed matrix");
    // SAFETY: the assertion; `to` is borrowed alone, so it doesn't overlap `from`.
    unsafe { transpose_raw::<R, S, true>(simd, rows, columns, R::ONE, from.raw(), to.raw()) }
}

/// Whether vectors hold a block's row, and this processor can transpose it. AVX's instructions are the only ones used.
#[inline(always)]
fn has_blocks<R: SimdFloat, S: Simd>() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    let can = is_x86_feature_detected!("avx");
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let can = false;
    can && R::lanes::<S>() >= COLUMNS && TypeId::of::<R>() == TypeId::of::<f32>()
}

/// # Safety
///
/// `from` has `rows` rows of `columns` numbers, `to` room for `columns` rows of `rows`, which with `ADD` are initialised.
/// They don't overlap.
#[inline(always)]
unsafe fn transpose_raw<R: SimdFloat, S: Simd, const ADD: bool>(
    _: S,
    rows: usize,
    columns: usize,
    factor: R,
    from: Raw<*const R>,
    to: Raw<*mut R>,
) {
    let [whole_rows, whole_columns] =
        if has_blocks::<R, S>() { [rows / 2 * 2, columns / COLUMNS * COLUMNS] } else { [0, 0] };
    // SAFETY: the parts lie inside `rows` rows of `columns`; R is f32 and the processor has AVX where there are blocks.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        for r in (0..whole_rows).step_by(4) {
            for c in (0..whole_columns).step_by(COLUMNS) {
                let from = Raw { start: from.at(r, c).cast::<f32>(), stride: from.stride };
                let to = Raw { start: to.at(c, r).cast::<f32>(), stride: to.stride };
                if r + 4 <= whole_rows {
                    transpose_four::<ADD>(factor.to_f64() as f32, from, to);
                } else {
                    transpose_two::<ADD>(factor.to_f64() as f32, from, to);
                }
            }
        }
        if whole_columns < columns {
            let (right, below) = (from.from(0, whole_columns), to.from(whole_columns, 0));
            one_by_one::<R, ADD>(whole_rows, columns - whole_columns, factor, right, below);
        }
        if whole_rows < rows {
            let (below, right) = (from.from(whole_rows, 0), to.from(0, whole_rows));
            one_by_one::<R, ADD>(rows - whole_rows, columns, factor, below, right);
        }
    }
}

/// # Safety
///
/// As [`transpose_raw`].
#[inline(always)]
unsafe fn one_by_one<R: SimdFloat, const ADD: bool>(
    rows: usize,
    columns: usize,
    factor: R,
    from: Raw<*const R>,
    to: Raw<*mut R>,
) {
    for c in 0..columns {
        for r in 0..rows {
            // SAFETY: r is one of `rows`, c one of `columns`, and with `ADD` the number is initialised.
            unsafe {
                let to = to.at(c, r);
                let x = *from.at(r, c);
                let x = if factor == R::ONE { x } else { factor * x };
                to.write(if ADD { *to + x } else { x });
            }
        }
    }
}

/// # Safety
///
/// As [`transpose_raw`] for 4 rows of 8, on a processor with AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_four<const ADD: bool>(factor: f32, from: Raw<*const f32>, to: Raw<*mut f32>) {
    use std::arch::x86_64::*;
    let mut x = [_mm256_setzero_ps(); 4];
    for (r, x) in x.iter_mut().enumerate() {
        // SAFETY: row r of 4 has 8 numbers.
        *x = unsafe { _mm256_loadu_ps(from.at(r, 0)) };
    }
    let (low, high) = (_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    let (low_below, high_below) = (_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    // Each holds the columns i and i + 4.
    let columns = [
        _mm256_shuffle_ps::<0b01_00_01_00>(low, low_below),
        _mm256_shuffle_ps::<0b11_10_11_10>(low, low_below),
        _mm256_shuffle_ps::<0b01_00_01_00>(high, high_below),
        _mm256_shuffle_ps::<0b11_10_11_10>(high, high_below),
    ];
    let is_one = factor == 1.0;
    let factor = _mm256_set1_ps(factor);
    for (i, pair) in columns.into_iter().enumerate() {
        let pair = if is_one { pair } else { _mm256_mul_ps(factor, pair) };
        for (row, mut x) in [(i, _mm256_castps256_ps128(pair)), (i + 4, _mm256_extractf128_ps::<1>(pair))] {
            // SAFETY: row `row` of 8 has room for 4 numbers, and with `ADD` they are initialised.
            unsafe {
                if ADD {
                    x = _mm_add_ps(_mm_loadu_ps(to.at(row, 0)), x);
                }
                _mm_storeu_ps(to.at(row, 0), x);
            }
        }
    }
}

/// # Safety
///
/// As [`transpose_raw`] for 2 rows of 8, on a processor with AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_two<const ADD: bool>(factor: f32, from: Raw<*const f32>, to: Raw<*mut f32>) {
    use std::arch::x86_64::*;
    // SAFETY: rows 0 and 1 have 8 numbers.
    let (first, second) = unsafe { (_mm256_loadu_ps(from.at(0, 0)), _mm256_loadu_ps(from.at(1, 0))) };
    let is_one = factor == 1.0;
    let factor = _mm256_set1_ps(factor);
    // The columns 0, 1, 4 and 5, and the columns 2, 3, 6 and 7.
    let columns = [_mm256_unpacklo_ps(first, second), _mm256_unpackhi_ps(first, second)];
    for (i, four) in columns.into_iter().enumerate() {
        let four = if is_one { four } else { _mm256_mul_ps(factor, four) };
        for (row, pair) in [(2 * i, _mm256_castps256_ps128(four)), (2 * i + 4, _mm256_extractf128_ps::<1>(four))] {
            // SAFETY: rows `row` and `row` + 1 of 8 have room for 2 numbers, and with `ADD` they are initialised.
            unsafe {
                let [low, high] = [row, row + 1].map(|row| to.at(row, 0).cast::<f64>());
                let mut pair = pair;
                if ADD {
                    let before = _mm_set_pd(high.read_unaligned(), low.read_unaligned());
                    pair = _mm_add_ps(_mm_castpd_ps(before), pair);
                }
                let pair = _mm_castps_pd(pair);
                low.write_unaligned(_mm_cvtsd_f64(pair));
                high.write_unaligned(_mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::tests::{check_guard, numbers};
    use crate::simd::with_every_simd;

    fn check<R: SimdFloat, S: Simd>(simd: S, rows: usize, columns: usize) {
        let (from_stride, to_stride) = (columns + 3, rows + 2);
        let from = numbers::<R>(1, rows * from_stride);
        for (factor, add) in [(1.0, false), (0.3, false), (1.0, true)] {
            let before = numbers::<R>(2, columns * to_stride);
            let (mut to, factor) = (before.clone(), R::from_f64(factor));
            let source = Matrix::new(&from, rows, columns, from_stride);
            let target = MatrixMut::new(&mut to, columns, rows, to_stride);
            if add {
                add_transposed(simd, source, target);
            } else {
                // SAFETY: the transposed numbers are initialised.
                transpose(simd, factor, source, unsafe { target.into_uninit() });
            }
            for r in 0..rows {
                for c in 0..columns {
                    let (x, old) = (from[r * from_stride + c], before[c * to_stride + r]);
                    assert!(to[c * to_stride + r] == if add { old + x } else { factor * x }, "{rows} x {columns}");
                }
            }
            check_guard(&to, &before, columns, rows, to_stride);
        }
    }

    #[test]
    fn every_size_is_transposed_and_nothing_else_is_written() {
        with_every_simd!(|simd| {
            let small = [(1, 1), (2, 8), (3, 8), (4, 8), (5, 17), (6, 16), (7, 9)];
            let large = [(8, 8), (8, 17), (12, 19), (15, 8), (16, 33), (19, 8), (32, 5)];
            for (rows, columns) in small.into_iter().chain(large) {
                check::<f32, S>(simd, rows, columns);
                check::<f64, S>(simd, rows, columns);
            }
        });
    }

    #[test]
    fn bits_of_signalling_nan_stay() {
        with_every_simd!(|simd| {
            for rows in [2, 4, 6] {
                let from: Vec<f32> = (0..rows * 8).map(|i| f32::from_bits(0x7fa0_0000 + i as u32)).collect();
                let mut to = vec![0f32; 8 * rows];
                let target = MatrixMut::new(&mut to, 8, rows, rows);
                // SAFETY: the transposed numbers are initialised.
                transpose(simd, 1.0, Matrix::new(&from, rows, 8, 8), unsafe { target.into_uninit() });
                for (i, x) in to.iter().enumerate() {
                    assert_eq!(x.to_bits(), from[i % rows * 8 + i / rows].to_bits(), "{rows} rows");
                }
            }
        });
    }

    #[test]
    #[should_panic(expected = "room for the transposed matrix")]
    fn too_small_a_target_is_refused() {
        let from = [0.0f32; 12];
        add_transposed(pulp::Scalar, Matrix::new(&from, 3, 4, 4), MatrixMut::new(&mut [0.0; 12], 3, 4, 4));
    }
}
