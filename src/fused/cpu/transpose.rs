//! Rows to lanes and back: queries into panels, contexts out of them, and a bias onto its scores.

use pulp::Simd;

use super::micro::Rows;
use super::real::Real;

/// Rows and columns of the square that registers transpose.
const SQUARE: usize = 8;

/// to[c][r] = factor · from[r][c], or with `ADD` that much more, for `rows` rows of `columns`. With a factor of 1 the bits
/// stay what they are, whether they are a number or not.
///
/// # Safety
///
/// `from` has `rows` rows of `columns`, `to` `columns` rows of `rows`, and they don't overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<R: Real, S: Simd, const ADD: bool>(
    _: S,
    rows: usize,
    columns: usize,
    factor: R,
    from: Rows<*const R>,
    to: Rows<*mut R>,
) {
    let squares = if R::lanes::<S>() >= SQUARE && R::transposes_squares() { SQUARE } else { 1 };
    let (whole_rows, whole_columns) = (rows / squares * squares, columns / squares * squares);
    // SAFETY: as the caller promises.
    unsafe {
        if squares == SQUARE {
            for r in (0..whole_rows).step_by(SQUARE) {
                for c in (0..whole_columns).step_by(SQUARE) {
                    let from = Rows { start: from.start.add(r * from.stride + c), ..from };
                    let to = Rows { start: to.start.add(c * to.stride + r), ..to };
                    R::transpose_square::<ADD>(factor, from, to);
                }
            }
            let right = Rows { start: from.start.add(whole_columns), ..from };
            let below = Rows { start: to.start.add(whole_columns * to.stride), ..to };
            one_by_one::<R, ADD>(whole_rows, columns - whole_columns, factor, right, below);
            let below = Rows { start: from.start.add(whole_rows * from.stride), ..from };
            let right = Rows { start: to.start.add(whole_rows), ..to };
            one_by_one::<R, ADD>(rows - whole_rows, columns, factor, below, right);
        } else {
            one_by_one::<R, ADD>(rows, columns, factor, from, to);
        }
    }
}

/// # Safety
///
/// As [`transpose`].
#[inline(always)]
unsafe fn one_by_one<R: Real, const ADD: bool>(
    rows: usize,
    columns: usize,
    factor: R,
    from: Rows<*const R>,
    to: Rows<*mut R>,
) {
    for c in 0..columns {
        for r in 0..rows {
            // SAFETY: as the caller promises.
            unsafe {
                let place = to.start.add(c * to.stride + r);
                let x = *from.start.add(r * from.stride + c);
                let x = if factor == R::ONE { x } else { factor * x };
                place.write(if ADD { *place + x } else { x });
            }
        }
    }
}

/// # Safety
///
/// As [`transpose`] for 8 rows of 8, on a processor with AVX.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
pub(crate) unsafe fn transpose_8x8<const ADD: bool>(factor: f32, from: Rows<*const f32>, to: Rows<*mut f32>) {
    use std::arch::x86_64::*;
    let mut x = [_mm256_setzero_ps(); 8];
    for (r, x) in x.iter_mut().enumerate() {
        // SAFETY: the caller has 8 numbers in each row.
        *x = unsafe { _mm256_loadu_ps(from.start.add(r * from.stride)) };
    }
    // Pairs of numbers, then fours, then eights come to stand together.
    let mut pairs = x;
    for i in [0, 2, 4, 6] {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    let mut fours = pairs;
    for i in [0, 4] {
        fours[i] = _mm256_shuffle_ps::<0b01_00_01_00>(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(pairs[i + 1], pairs[i + 3]);
    }
    let is_one = factor == 1.0;
    let factor = _mm256_set1_ps(factor);
    for i in 0..4 {
        let low = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        let high = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        for (row, x) in [(i, low), (i + 4, high)] {
            // SAFETY: the caller has room for 8 numbers in each row.
            unsafe {
                let place = to.start.add(row * to.stride);
                let mut x = if is_one { x } else { _mm256_mul_ps(factor, x) };
                if ADD {
                    x = _mm256_add_ps(_mm256_loadu_ps(place), x);
                }
                _mm256_storeu_ps(place, x);
            }
        }
    }
}
