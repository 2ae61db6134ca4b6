//! The inner loops of [`Bf16Dot`](super::Bf16Dot). Its methods check the sizes.

use std::arch::x86_64::*;

use super::{LANES, WIDTH};
use crate::gemm::microkernel::{VECTORS, in_blocks};
use crate::matrix::Raw;

/// # Safety
///
/// `panel` has pairs · W pairs, `rows` `count` rows of 2 · pairs numbers, `scores` `count` rows of W, `largest` W numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn dot_products<const MAX: bool>(
    pairs: usize,
    factor: f32,
    panel: *const u32,
    rows: Raw<*const u16>,
    count: usize,
    scores: Raw<*mut f32>,
    largest: *mut f32,
) {
    // SAFETY: this function's own condition; block j lies inside the `count` rows.
    unsafe {
        in_blocks!(count, [6, 4, 2, 1], |j, N| dot_block::<MAX, N>(
            pairs,
            factor,
            panel,
            rows.from(j, 0),
            scores.from(j, 0),
            largest,
        ));
    }
}

/// # Safety
///
/// As [`dot_products`], for N rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_block<const MAX: bool, const N: usize>(
    pairs: usize,
    factor: f32,
    panel: *const u32,
    rows: Raw<*const u16>,
    scores: Raw<*mut f32>,
    largest: *mut f32,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; N];
    // SAFETY: p is one of `pairs`, `row` one of N, v one of the vectors of W numbers.
    unsafe {
        for p in 0..pairs {
            let queries: [_; VECTORS] = load_pairs(panel.add(p * WIDTH));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(rows.at(row, 2 * p).cast());
                for (sum, query) in sums.iter_mut().zip(queries) {
                    *sum = _mm512_dpbf16_ps(*sum, x, query);
                }
            }
        }
        let factor = _mm512_set1_ps(factor);
        for v in 0..VECTORS {
            let mut greatest = if MAX { _mm512_loadu_ps(largest.add(v * LANES)) } else { factor };
            for (row, sums) in sums.iter().enumerate() {
                let score = _mm512_mul_ps(factor, sums[v]);
                if MAX {
                    // If a score is NaN, this gives its second operand.
                    greatest = _mm512_max_ps(score, greatest);
                }
                _mm512_storeu_ps(scores.at(row, v * LANES), score);
            }
            if MAX {
                _mm512_storeu_ps(largest.add(v * LANES), greatest);
            }
        }
    }
}

/// # Safety
///
/// `panel` has columns · W numbers, `factor` W, `rows` `pairs` rows of `columns` pairs, `weights` `pairs` rows of W.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn accumulate(
    columns: usize,
    panel: *mut f32,
    factor: *const f32,
    rows: Raw<*const u32>,
    pairs: usize,
    weights: Raw<*const u32>,
) {
    // SAFETY: this function's own condition; block c lies inside the columns.
    unsafe {
        in_blocks!(columns, [6, 4, 2, 1], |c, N| accumulate_block::<N>(
            panel.add(c * WIDTH),
            factor,
            rows.from(0, c),
            pairs,
            weights,
        ));
    }
}

/// # Safety
///
/// As [`accumulate`], for N columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn accumulate_block<const N: usize>(
    panel: *mut f32,
    factor: *const f32,
    rows: Raw<*const u32>,
    pairs: usize,
    weights: Raw<*const u32>,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; N];
    // SAFETY: p is one of `pairs`, c one of N, v one of the vectors of W numbers.
    unsafe {
        for p in 0..pairs {
            let weights: [_; VECTORS] = load_pairs(weights.at(p, 0));
            for (c, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(rows.at(p, c));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbf16_ps(*sum, x, weight);
                }
            }
        }
        for (c, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let to = panel.add((c * VECTORS + v) * LANES);
                let factor = _mm512_loadu_ps(factor.add(v * LANES));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to), sum));
            }
        }
    }
}

/// # Safety
///
/// `out` has `count` rows of `columns` numbers, a multiple of 16, `weights` `count` rows of `pairs`, `rows` `pairs` rows of
/// `columns` pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn outer_products(
    columns: usize,
    factor: f32,
    out: Raw<*mut f32>,
    count: usize,
    weights: Raw<*const u32>,
    pairs: usize,
    rows: Raw<*const u32>,
) {
    // SAFETY: this function's own condition; block j lies inside the `count` rows, and one or VECTORS vectors inside the columns.
    unsafe {
        let mut column = 0;
        while column < columns {
            let rows = rows.from(0, column);
            if column + WIDTH <= columns {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<N, VECTORS>(
                    factor,
                    out.from(j, column),
                    weights.from(j, 0),
                    pairs,
                    rows,
                ));
                column += WIDTH;
            } else {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<N, 1>(
                    factor,
                    out.from(j, column),
                    weights.from(j, 0),
                    pairs,
                    rows,
                ));
                column += LANES;
            }
        }
    }
}

/// # Safety
///
/// As [`outer_products`], for N rows and V vectors of columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn outer_block<const N: usize, const V: usize>(
    factor: f32,
    out: Raw<*mut f32>,
    weights: Raw<*const u32>,
    pairs: usize,
    rows: Raw<*const u32>,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; N];
    // SAFETY: p is one of `pairs`, j one of N, v one of V vectors.
    unsafe {
        for p in 0..pairs {
            let columns: [_; V] = load_pairs(rows.at(p, 0));
            for (j, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(weights.at(j, p));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, x, column);
                }
            }
        }
        let factor = _mm512_set1_ps(factor);
        for (j, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let to = out.at(j, v * LANES);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, sum, _mm512_loadu_ps(to)));
            }
        }
    }
}

/// # Safety
///
/// `rows` has `count` rows of `columns` numbers, `to` room for half as many rows of pairs, in whole vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn interleave(rows: Raw<*const u16>, count: usize, columns: usize, to: Raw<*mut u32>) {
    for p in 0..count.div_ceil(2) {
        for c in (0..columns).step_by(LANES) {
            let all = ((1u32 << (columns - c).min(LANES)) - 1) as __mmask16;
            let has_second = 2 * p + 1 < count;
            let mask = if has_second { all } else { 0 };
            // SAFETY: row 2p is one of `count`, and so is the next where it is read; the masks end at the last column.
            unsafe {
                let first = rows.at(2 * p, c);
                let second = if has_second { rows.at(2 * p + 1, c) } else { first };
                let first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(all, first.cast()));
                let second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second.cast()));
                let pairs = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
                _mm512_storeu_si512(to.at(p, c).cast(), pairs);
            }
        }
    }
}

/// Two rows as pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn pairs_of_rows(first: __m512, second: __m512) -> __m512i {
    const ORDER: [u16; 2 * LANES] = {
        let mut order = [0; 2 * LANES];
        let mut i = 0;
        while i < 2 * LANES {
            order[i] = (i / 2 + i % 2 * LANES) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: 32 numbers of 16 bits are a vector.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_permutexvar_epi16(order, bits(_mm512_cvtne2ps_pbh(second, first)))
}

/// Row p of pairs takes the place of row p of numbers.
///
/// # Safety
///
/// `rows` has `count` rows of W numbers, none of which reaches into the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn narrow_down(rows: Raw<*mut f32>, count: usize) {
    for p in 0..count.div_ceil(2) {
        for v in 0..VECTORS {
            // SAFETY: row 2p is one of `count`, and so is the next where it is read. Row p, which is written, has been read.
            unsafe {
                let first = _mm512_loadu_ps(rows.at(2 * p, v * LANES));
                let second = if 2 * p + 1 < count {
                    _mm512_loadu_ps(rows.at(2 * p + 1, v * LANES))
                } else {
                    _mm512_setzero_ps()
                };
                _mm512_storeu_si512(rows.at(p, v * LANES).cast(), pairs_of_rows(first, second));
            }
        }
    }
}

/// # Safety
///
/// `from` has `count` numbers, `to` room for as many.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn narrow(from: *const f32, to: *mut u16, count: usize) {
    let whole = count / (2 * LANES) * (2 * LANES);
    // SAFETY: this function's own condition; the masks end at the last number.
    unsafe {
        for i in (0..whole).step_by(2 * LANES) {
            let halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from.add(i + LANES)), _mm512_loadu_ps(from.add(i)));
            _mm512_storeu_si512(to.add(i).cast(), bits(halves));
        }
        for i in (whole..count).step_by(LANES) {
            let mask = ((1u32 << (count - i).min(LANES)) - 1) as __mmask16;
            let numbers = _mm512_maskz_loadu_ps(mask, from.add(i));
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
            _mm256_mask_storeu_epi16(to.add(i).cast(), mask, halves);
        }
    }
}

/// # Safety
///
/// `rows` has `count` rows of W numbers, `to` room for as many of W / 2 pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn narrow_along(rows: Raw<*const f32>, count: usize, to: Raw<*mut u32>) {
    for j in 0..count {
        // SAFETY: row j is one of `count`.
        unsafe {
            let halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(rows.at(j, LANES)), _mm512_loadu_ps(rows.at(j, 0)));
            _mm512_storeu_si512(to.at(j, 0).cast(), bits(halves));
        }
    }
}

/// # Safety
///
/// There are V vectors of pairs.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs<const V: usize>(from: *const u32) -> [__m512bh; V] {
    let mut vectors = [number_pairs(_mm512_setzero_si512()); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: v is one of V vectors.
        *vector = unsafe { number_pairs(_mm512_loadu_si512(from.add(v * LANES).cast())) };
    }
    vectors
}

/// # Safety
///
/// There is a pair, at any address.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn broadcast(from: *const u32) -> __m512bh {
    // SAFETY: this function's own condition.
    number_pairs(_mm512_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() }))
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn number_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are allowed.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn bits(pairs: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits of which any are allowed.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(pairs) }
}
