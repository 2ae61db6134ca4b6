//! The forward pass: online softmax over blocks of keys.
//!
//! Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023),
//! algorithm 1.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::{Simd, WithSimd};

use super::careful::accumulate_with_care;
use super::element::Element;
use super::micro::{Rows, VECTORS, accumulate, dot_products, load, load_all, panel_width, store};
use super::panels::{pack, unpack};
use super::problem::Problem;
use super::real::Real;
use super::scores::Tile;
use super::scratch::Scratch;
use super::softmax::exponential;

/// Queries of a task. With 64 entries each, queries and sums (32 KB each) and a block of keys and values (24 KB each)
/// stay in a second-level cache of 256 KB.
pub(crate) const QUERIES: usize = 128;
/// Keys of a block: scores of a panel (6 KB) and the keys stay in a first-level cache of 32 KB.
const KEYS: usize = 96;

/// The queries `queries` of head `at.1` of sequence `at.0`.
pub(crate) struct Forward<'a, E: Element> {
    pub(crate) problem: &'a Problem<'a, E>,
    pub(crate) at: (usize, usize),
    pub(crate) queries: Range<usize>,
    /// A row of value_dim for each query, `context_stride` apart.
    pub(crate) context: *mut E,
    pub(crate) context_stride: usize,
    /// One for each query.
    pub(crate) logsumexp: *mut E::Real,
    /// Set if the mask hides what is infinite or NaN, which zeros then don't make go away.
    pub(crate) hides_strange: &'a AtomicBool,
}

/// What a task keeps for its panels, each piece a panel after the other.
struct Panels<'s, R> {
    /// [d][W]
    queries: &'s mut [R],
    /// [value_dim][W], not yet divided by the sum
    sums: &'s mut [R],
    /// [W]: the greatest score so far
    largest: &'s mut [R],
    /// [W]: the sum of exponentials so far
    total: &'s mut [R],
    /// [KEYS][W]
    scores: &'s mut [R],
    /// [KEYS][W], with dropout
    factors: &'s mut [R],
    keys: &'s mut [R],
    values: &'s mut [R],
}

impl<E: Element> WithSimd for Forward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = panel_width::<E::Real, S>();
        let count = self.queries.len().div_ceil(width);
        let (d, dv) = (self.problem.dim(), self.problem.value_dim());
        let dropped = if self.problem.dropout.is_some() { KEYS * width } else { 0 };
        let sizes = [d, dv, 1, 1].map(|rows| rows * width * count);
        let sizes = [sizes[0], sizes[1], sizes[2], sizes[3], KEYS * width, dropped, KEYS * d, KEYS * dv];
        let mut scratch = Scratch::of_this_thread::<E::Real>(&sizes);
        let [queries, sums, largest, total, scores, factors, keys, values] = scratch.pieces(sizes);
        let mut panels = Panels { queries, sums, largest, total, scores, factors, keys, values };
        self.start(simd, &mut panels);
        self.over_keys(simd, &mut panels, false);
        let is_finite = self.finish(simd, &mut panels);
        if !is_finite && !self.problem.mask.is_full() {
            // Perhaps it was infinity times a weight of zero.
            self.hides_strange.store(true, Ordering::Relaxed);
            self.start(simd, &mut panels);
            self.over_keys(simd, &mut panels, true);
            self.finish(simd, &mut panels);
        }
    }
}

impl<E: Element> Forward<'_, E> {
    #[inline(always)]
    fn start<S: Simd>(&self, simd: S, panels: &mut Panels<E::Real>) {
        let scale = E::Real::from_f64(self.problem.scale);
        let to = panels.queries.as_mut_ptr();
        // SAFETY: there is room for all queries; a block of keys has as many as a panel has queries, and more.
        unsafe { pack::<E, S>(simd, &self.problem.q, self.at, &self.queries, scale, panels.keys, to) };
        panels.sums.fill(E::Real::ZERO);
        panels.largest.fill(E::Real::LOWEST);
        panels.total.fill(E::Real::ZERO);
    }

    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, panels: &mut Panels<E::Real>, with_care: bool) {
        let problem = self.problem;
        let width = panel_width::<E::Real, S>();
        let kv_len = problem.shape().kv_len;
        let kv_at = (self.at.0, self.at.1 / problem.group());
        for start in (0..kv_len).step_by(KEYS) {
            let block = start..(start + KEYS).min(kv_len);
            let (block, _) = problem.visible(self.at, &self.queries, block);
            if block.is_empty() {
                continue;
            }
            let keys = problem.k.rows(kv_at, block.clone(), panels.keys);
            let values = problem.v.rows(kv_at, block.clone(), panels.values);
            for panel in 0..self.queries.len().div_ceil(width) {
                let first_query = self.queries.start + panel * width;
                let queries = first_query..(first_query + width).min(self.queries.end);
                let (visible, coverage) = problem.visible(self.at, &queries, block.clone());
                if visible.is_empty() {
                    continue;
                }
                let skip = visible.start - block.start;
                let tile = Tile { at: self.at, first_query, queries: queries.len(), width, keys: visible };
                let from = |rows: Rows<*const E::Real>| Rows {
                    // SAFETY: `skip` is less than the rows of the block.
                    start: unsafe { rows.start.add(skip * rows.stride) },
                    ..rows
                };
                let scores = Rows { start: panels.scores.as_mut_ptr(), stride: width };
                // SAFETY: the panel's pieces and the rows of the block have the sizes that the kernels ask for.
                unsafe {
                    let queries = panels.queries.as_ptr().add(panel * problem.dim() * width);
                    let largest = panels.largest.as_ptr().add(panel * width);
                    let mut largest = load_all::<E::Real, S, VECTORS>(simd, largest);
                    let (d, count) = (problem.dim(), tile.keys.len());
                    if problem.adjusts(coverage) {
                        dot_products::<E::Real, S, false>(simd, d, queries, from(keys), count, scores, &mut largest);
                        if tile.adjust(simd, problem, coverage, scores, None) {
                            self.hides_strange.store(true, Ordering::Relaxed);
                        }
                        maxima::<E::Real, S>(simd, scores, count, &mut largest);
                    } else {
                        dot_products::<E::Real, S, true>(simd, d, queries, from(keys), count, scores, &mut largest);
                    }
                    let factor = self.exponentials(simd, &tile, panel, largest, panels);
                    let sums = panels.sums.as_mut_ptr().add(panel * problem.value_dim() * width);
                    let weights = Rows { start: panels.scores.as_ptr(), stride: width };
                    let (values, dv) = (from(values), problem.value_dim());
                    if with_care {
                        accumulate_with_care::<E::Real, S>(simd, dv, sums, factor, values, count, weights);
                    } else {
                        accumulate::<E::Real, S>(simd, dv, sums, factor, values, count, weights);
                    }
                }
            }
        }
    }

    /// Turns a panel's scores into exponentials relative to the greatest so far, which is `now`, and adds them up. What
    /// has been summed before is to be multiplied by the result.
    ///
    /// # Safety
    ///
    /// The pieces hold the panel and a row of W numbers for each key of the tile.
    #[inline(always)]
    unsafe fn exponentials<S: Simd>(
        &self,
        simd: S,
        tile: &Tile,
        panel: usize,
        now: [<E::Real as Real>::Vector<S>; VECTORS],
        panels: &mut Panels<E::Real>,
    ) -> [<E::Real as Real>::Vector<S>; VECTORS] {
        let (lanes, width) = (E::Real::lanes::<S>(), tile.width);
        // SAFETY: `largest` and `total` have W numbers for each panel, `scores` and `factors` W for each key.
        unsafe {
            let scores = panels.scores.as_mut_ptr();
            let largest = panels.largest.as_mut_ptr().add(panel * width);
            let total = panels.total.as_mut_ptr().add(panel * width);
            let before = load_all::<E::Real, S, VECTORS>(simd, largest);
            let mut factor = before;
            let mut sum = load_all::<E::Real, S, VECTORS>(simd, total);
            for v in 0..VECTORS {
                factor[v] = exponential::<E::Real, S>(simd, before[v], now[v]);
                sum[v] = E::Real::vmul(simd, factor[v], sum[v]);
            }
            for j in 0..tile.keys.len() {
                for v in 0..VECTORS {
                    let score = scores.add(j * width + v * lanes);
                    let power = exponential::<E::Real, S>(simd, load::<E::Real, S>(score), now[v]);
                    sum[v] = E::Real::vadd(simd, sum[v], power);
                    store::<E::Real, S>(score, power);
                }
            }
            for v in 0..VECTORS {
                store::<E::Real, S>(largest.add(v * lanes), now[v]);
                store::<E::Real, S>(total.add(v * lanes), sum[v]);
            }
            if self.problem.dropout.is_some() {
                tile.dropout_factors(simd, self.problem, Rows { start: panels.factors.as_mut_ptr(), stride: width });
                let count = tile.keys.len() * width;
                panels.scores[..count].iter_mut().zip(&panels.factors[..count]).for_each(|(p, factor)| *p *= *factor);
            }
            factor
        }
    }

    /// Divides by the sums and writes the results. Says whether all of them are finite.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, panels: &mut Panels<E::Real>) -> bool {
        let width = panel_width::<E::Real, S>();
        let dv = self.problem.value_dim();
        for (i, total) in panels.total.iter_mut().enumerate().take(self.queries.len()) {
            let (inverse, logsumexp) = if *total == E::Real::ZERO {
                (E::Real::ZERO, -E::Real::INFINITY)
            } else {
                let logsumexp = panels.largest[i].to_f64() + total.to_f64().ln();
                (E::Real::ONE / *total, E::Real::from_f64(logsumexp))
            };
            // SAFETY: the caller has a number of `logsumexp` for each query of this task alone.
            unsafe { self.logsumexp.add(i).write(logsumexp) };
            *total = inverse;
        }
        let mut is_finite = true;
        for (panel, sums) in panels.sums.chunks_exact_mut(dv * width).enumerate() {
            let count = width.min(self.queries.len() - panel * width);
            let inverse = &panels.total[panel * width..][..width];
            for sums in sums.chunks_exact_mut(width) {
                sums.iter_mut().zip(inverse).for_each(|(sum, inverse)| *sum *= *inverse);
                // No early end: this way it is done by vectors.
                is_finite &= sums[..count].iter().fold(true, |all, sum| all & sum.is_finite());
            }
            // SAFETY: the caller has a row of `context` for each query of this task alone; a block of values has as
            // many rows as a panel, and more.
            unsafe {
                let start = self.context.add(panel * width * self.context_stride);
                let rows = Rows { start, stride: self.context_stride };
                unpack::<E, S>(simd, sums.as_ptr(), dv, count, E::Real::ONE, panels.values, rows);
            }
        }
        is_finite
    }
}

/// The greatest of `largest` and the scores, lane by lane.
///
/// # Safety
///
/// `scores` has `count` rows of W numbers.
#[inline(always)]
unsafe fn maxima<R: Real, S: Simd>(simd: S, scores: Rows<*mut R>, count: usize, largest: &mut [R::Vector<S>; VECTORS]) {
    for j in 0..count {
        for (v, largest) in largest.iter_mut().enumerate() {
            // SAFETY: as the caller promises.
            let score = unsafe { load::<R, S>(scores.start.add(j * scores.stride + v * R::lanes::<S>())) };
            *largest = R::max(simd, *largest, score);
        }
    }
}
