//! bf16 as some processors multiply it: two products at a time, summed in f32 (AVX512-BF16). It halves the work of every
//! matrix product.
//!
//! A *pair* is 32 bits that hold two neighbours along the axis that is summed over. A row of a tensor is a row of pairs as
//! it stands; where the sum runs over rows, two of them are interleaved. Weights and gradients of scores are rounded to
//! bf16 for this, as PyTorch does; their sums are f32.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use candle_core::DType;
use pulp::Simd;

use super::element::Element;
use super::micro::Rows;
#[cfg(target_arch = "x86_64")]
use super::micro::{VECTORS, in_blocks};

/// Numbers in a vector, and queries in a panel.
const LANES: usize = 16;
#[cfg(target_arch = "x86_64")]
const WIDTH: usize = VECTORS * LANES;

/// Says that the processor has the instructions: every kernel asks for one.
#[derive(Clone, Copy)]
pub(crate) struct Pairs(());

impl Pairs {
    /// If the element is bf16, the processor can, it is allowed to (the environment may have asked for a lesser instruction
    /// set), and heads are of whole pairs.
    pub(crate) fn new<E: Element, S: Simd>(d: usize, dv: usize) -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        let can = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let can = false;
        let whole = d.is_multiple_of(2) && dv.is_multiple_of(2);
        (E::DTYPE == DType::BF16 && S::F32_LANES == LANES && whole && can).then_some(Self(()))
    }
}

/// Kernels for processors that have the instructions; elsewhere there is never a [`Pairs`] to call them with.
macro_rules! kernels {
    ($($(#[$doc:meta])* fn $name:ident $(<const $constant:ident: bool>)? ($self:ident, $($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        impl Pairs {$(
            $(#[$doc])*
            #[allow(clippy::too_many_arguments)] // a product has as many
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16"))]
            pub(crate) unsafe fn $name $(<const $constant: bool>)? ($self, $($argument: $type),*) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as the caller promises.
                unsafe { $body }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = ($($argument,)*);
            }
        )*}
    };
}

kernels! {
    /// scores[j][W] = factor · Σ_p rows[j][p] · panel[p][W] for `count` rows of `pairs`. With `MAX`, `largest` becomes the greatest
    /// of itself and them, lane by lane.
    ///
    /// # Safety
    ///
    /// `panel` has pairs · W pairs, `rows` `count` rows of numbers, `scores` `count` rows of W, `largest` W numbers.
    fn dot_products<const MAX: bool>(
        self, pairs: usize, factor: f32, panel: *const u32, rows: Rows<*const u16>, count: usize, scores: Rows<*mut f32>,
        largest: *mut f32,
    ) {
        in_blocks!(count, [6, 4, 2, 1], |j, N| dot_block::<MAX, N>(
            pairs,
            factor,
            panel,
            Rows { start: rows.start.add(j * rows.stride), ..rows },
            Rows { start: scores.start.add(j * scores.stride), ..scores },
            largest,
        ));
    }

    /// panel[c][W] = factor[W] · panel[c][W] + Σ_p rows[p][c] · weights[p][W] over `pairs` rows.
    ///
    /// # Safety
    ///
    /// `panel` has columns · W numbers, `factor` W, `rows` `pairs` rows of `columns` pairs, `weights` `pairs` rows of W.
    fn accumulate(
        self, columns: usize, panel: *mut f32, factor: *const f32, rows: Rows<*const u32>, pairs: usize, weights: *const u32,
    ) {
        in_blocks!(columns, [6, 4, 2, 1], |c, N| accumulate_block::<N>(
            panel.add(c * WIDTH),
            factor,
            Rows { start: rows.start.add(c), ..rows },
            pairs,
            weights,
        ));
    }

    /// out[j][c] += factor · Σ_p weights[j][p] · rows[p][c] for `count` rows j, `pairs` rows p and `columns` columns, a multiple of 16.
    ///
    /// # Safety
    ///
    /// `out` has `count` rows of `columns` numbers, `weights` `count` rows of `pairs`, `rows` `pairs` rows of `columns` pairs.
    fn outer_products(
        self, columns: usize, factor: f32, out: Rows<*mut f32>, count: usize, weights: Rows<*const u32>, pairs: usize, rows: Rows<*const u32>,
    ) {
        let mut column = 0;
        while column < columns {
            let rows = Rows { start: rows.start.add(column), ..rows };
            let out_at = |j: usize| Rows { start: out.start.add(j * out.stride + column), ..out };
            let weights_at = |j: usize| Rows { start: weights.start.add(j * weights.stride), ..weights };
            if column + WIDTH <= columns {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<N, VECTORS>(factor, out_at(j), weights_at(j), pairs, rows));
                column += WIDTH;
            } else {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<N, 1>(factor, out_at(j), weights_at(j), pairs, rows));
                column += LANES;
            }
        }
    }

    /// Two rows of numbers become one of pairs: the second of the last pair is zero if the rows are odd, and so are the
    /// columns behind the last.
    ///
    /// # Safety
    ///
    /// `rows` has `count` rows of `columns` numbers, `to` room for half as many rows of pairs, in whole vectors.
    fn interleave(self, rows: Rows<*const u16>, count: usize, columns: usize, to: Rows<*mut u32>) {
        for p in 0..count.div_ceil(2) {
            for c in (0..columns).step_by(LANES) {
                let all = ((1u32 << (columns - c).min(LANES)) - 1) as __mmask16;
                let there = if 2 * p + 1 < count { all } else { 0 };
                let first = rows.start.add(2 * p * rows.stride + c);
                let second = if there == 0 { first } else { first.add(rows.stride) };
                let first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(all, first.cast()));
                let second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, second.cast()));
                let pairs = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
                _mm512_storeu_si512(to.start.add(p * to.stride + c).cast(), pairs);
            }
        }
    }

    /// Rounds `count` rows of W numbers to pairs of two rows each. `to` may be where `rows` starts, if those lie close together.
    ///
    /// # Safety
    ///
    /// `rows` has `count` rows of W numbers, `to` room for half as many rows of pairs.
    fn narrow_down(self, rows: Rows<*const f32>, count: usize, to: *mut u32) {
        let order: [u16; 2 * LANES] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for p in 0..count.div_ceil(2) {
            for v in 0..VECTORS {
                let place = rows.start.add(2 * p * rows.stride + v * LANES);
                let first = _mm512_loadu_ps(place);
                let second = if 2 * p + 1 < count { _mm512_loadu_ps(place.add(rows.stride)) } else { _mm512_setzero_ps() };
                let halves = bits(_mm512_cvtne2ps_pbh(second, first));
                _mm512_storeu_si512(to.add(p * WIDTH + v * LANES).cast(), _mm512_permutexvar_epi16(order, halves));
            }
        }
    }

    /// Rounds `count` rows of W numbers to rows of W / 2 pairs.
    ///
    /// # Safety
    ///
    /// `rows` has `count` rows of W numbers, `to` room for as many of W / 2 pairs.
    fn narrow_along(self, rows: Rows<*const f32>, count: usize, to: Rows<*mut u32>) {
        for j in 0..count {
            let place = rows.start.add(j * rows.stride);
            let halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(place.add(LANES)), _mm512_loadu_ps(place));
            _mm512_storeu_si512(to.start.add(j * to.stride).cast(), bits(halves));
        }
    }
}

/// # Safety
///
/// As [`Pairs::dot_products`], for N rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn dot_block<const MAX: bool, const N: usize>(
    pairs: usize,
    factor: f32,
    panel: *const u32,
    rows: Rows<*const u16>,
    scores: Rows<*mut f32>,
    largest: *mut f32,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; N];
    // SAFETY: as the caller promises.
    unsafe {
        for p in 0..pairs {
            let queries: [_; VECTORS] = load_pairs(panel.add(p * WIDTH));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(rows.start.add(row * rows.stride + 2 * p).cast());
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
                    // The second of two where one is NaN, which so is passed over.
                    greatest = _mm512_max_ps(score, greatest);
                }
                _mm512_storeu_ps(scores.start.add(row * scores.stride + v * LANES), score);
            }
            if MAX {
                _mm512_storeu_ps(largest.add(v * LANES), greatest);
            }
        }
    }
}

/// # Safety
///
/// As [`Pairs::accumulate`], for N columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn accumulate_block<const N: usize>(
    panel: *mut f32,
    factor: *const f32,
    rows: Rows<*const u32>,
    pairs: usize,
    weights: *const u32,
) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; N];
    // SAFETY: as the caller promises.
    unsafe {
        for p in 0..pairs {
            let weights: [_; VECTORS] = load_pairs(weights.add(p * WIDTH));
            for (c, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(rows.start.add(p * rows.stride + c));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = _mm512_dpbf16_ps(*sum, x, weight);
                }
            }
        }
        for (c, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let place = panel.add((c * VECTORS + v) * LANES);
                let factor = _mm512_loadu_ps(factor.add(v * LANES));
                _mm512_storeu_ps(place, _mm512_fmadd_ps(factor, _mm512_loadu_ps(place), sum));
            }
        }
    }
}

/// # Safety
///
/// As [`Pairs::outer_products`], for N rows and V vectors of columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn outer_block<const N: usize, const V: usize>(
    factor: f32,
    out: Rows<*mut f32>,
    weights: Rows<*const u32>,
    pairs: usize,
    rows: Rows<*const u32>,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; N];
    // SAFETY: as the caller promises.
    unsafe {
        for p in 0..pairs {
            let columns: [_; V] = load_pairs(rows.start.add(p * rows.stride));
            for (j, sums) in sums.iter_mut().enumerate() {
                let x = broadcast(weights.start.add(j * weights.stride + p));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, x, column);
                }
            }
        }
        let factor = _mm512_set1_ps(factor);
        for (j, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let place = out.start.add(j * out.stride + v * LANES);
                _mm512_storeu_ps(place, _mm512_fmadd_ps(factor, sum, _mm512_loadu_ps(place)));
            }
        }
    }
}

/// # Safety
///
/// There are V vectors of pairs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs<const V: usize>(from: *const u32) -> [__m512bh; V] {
    let mut vectors = [number_pairs(_mm512_setzero_si512()); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: as the caller promises.
        *vector = unsafe { number_pairs(_mm512_loadu_si512(from.add(v * LANES).cast())) };
    }
    vectors
}

/// # Safety
///
/// There is a pair, at any address.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn broadcast(from: *const u32) -> __m512bh {
    // SAFETY: as the caller promises.
    number_pairs(_mm512_set1_epi32(unsafe { from.cast::<i32>().read_unaligned() }))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn number_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of which any are allowed.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bits(pairs: __m512bh) -> __m512i {
    // SAFETY: as above.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(pairs) }
}
