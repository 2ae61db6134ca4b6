//! The forward pass: online softmax over blocks of keys.
//!
//! Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023),
//! algorithm 1.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::element::Element;
use super::micro::{Rows, VECTORS, load, load_all, pad, panel_width, store};
use super::panels::unpack;
use super::problem::Problem;
use super::products::{Products, RowsToDot};
use super::real::Real;
use super::scores::Tile;
use super::scratch::{Scratch, pieces};
use super::softmax::exponential;
use crate::mask::Coverage;

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
        let mut scratch;
        let mut panels = pieces!(scratch: E::Real => Panels {
            queries: d * width * count,
            sums: dv * width * count,
            largest: width * count,
            total: width * count,
            scores: KEYS * width,
            factors: dropped,
            keys: KEYS * d,
            values: KEYS * pad(dv),
        });
        let products = Products::new::<E, S>(d, dv);
        self.over_keys(simd, products, &mut panels);
        let is_finite = self.finish(simd, &mut panels);
        if !is_finite && !self.problem.mask.is_full() {
            // Perhaps it was infinity times the weight of zero of a key that the mask hides.
            self.over_keys(simd, Products::Careful, &mut panels);
            self.finish(simd, &mut panels);
        }
    }
}

impl<E: Element> Forward<'_, E> {
    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, products: Products, panels: &mut Panels<E::Real>) {
        let problem = self.problem;
        let scale = E::Real::from_f64(problem.scale);
        let to = panels.queries.as_mut_ptr();
        // SAFETY: there is room for all queries; a block of keys has as many as a panel has queries, and more.
        unsafe { products.pack::<E, S>(simd, &problem.q, self.at, &self.queries, scale, panels.keys, to) };
        panels.sums.fill(E::Real::ZERO);
        panels.largest.fill(E::Real::LOWEST);
        panels.total.fill(E::Real::ZERO);
        let kv_len = problem.shape().kv_len;
        for start in (0..kv_len).step_by(KEYS) {
            let block = start..(start + KEYS).min(kv_len);
            let (block, _) = problem.visible(self.at, &self.queries, block);
            if !block.is_empty() {
                self.block(simd, products, block, panels);
            }
        }
    }

    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, products: Products, block: Range<usize>, panels: &mut Panels<E::Real>) {
        let problem = self.problem;
        let width = panel_width::<E::Real, S>();
        let kv_at = (self.at.0, self.at.1 / problem.group());
        let keys = products.rows_to_dot(&problem.k, kv_at, block.clone(), panels.keys);
        let mut values = products.rows_to_sum(&problem.v, kv_at, block.clone(), panels.values);
        let mut phase = 0;
        for panel in 0..self.queries.len().div_ceil(width) {
            let first_query = self.queries.start + panel * width;
            let queries = first_query..(first_query + width).min(self.queries.end);
            let (visible, coverage) = problem.visible(self.at, &queries, block.clone());
            if visible.is_empty() {
                continue;
            }
            let skip = visible.start - block.start;
            if products.phase(skip) != phase {
                phase = products.phase(skip);
                values = products.rows_to_sum(&problem.v, kv_at, block.start + phase..block.end, panels.values);
            }
            let tile = Tile { at: self.at, first_query, queries: queries.len(), width, keys: visible };
            // SAFETY: the panel's pieces and the rows of the block have the sizes that the kernels ask for.
            unsafe {
                let values = values.skip(products.operands(skip - phase));
                self.tile(simd, products, &tile, coverage, panel, keys.skip(skip), values, panels);
            }
        }
    }

    /// # Safety
    ///
    /// The pieces hold the panel; `keys` and `values` have a row for each key of the tile.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // all of it is needed, and nothing of it belongs together elsewhere
    unsafe fn tile<S: Simd>(
        &self,
        simd: S,
        products: Products,
        tile: &Tile,
        coverage: Coverage,
        panel: usize,
        keys: RowsToDot<E>,
        values: Rows<*const E::Real>,
        panels: &mut Panels<E::Real>,
    ) {
        let problem = self.problem;
        let (d, dv, width, count) = (problem.dim(), problem.value_dim(), tile.width, tile.keys.len());
        let scale = E::Real::from_f64(problem.scale);
        let scores = Rows { start: panels.scores.as_mut_ptr(), stride: width };
        // SAFETY: as the caller promises.
        unsafe {
            let queries = panels.queries.as_ptr().add(panel * products.operands(d) * width);
            let mut largest = load_all::<E::Real, S, VECTORS>(simd, panels.largest.as_ptr().add(panel * width));
            if problem.adjusts(coverage) {
                products.dot_products::<E, S, false>(simd, d, scale, queries, keys, count, scores, &mut largest);
                tile.adjust(simd, problem, coverage, scores, None);
                maxima::<E::Real, S>(simd, scores, count, &mut largest);
            } else {
                products.dot_products::<E, S, true>(simd, d, scale, queries, keys, count, scores, &mut largest);
            }
            let factor = self.exponentials(simd, tile, panel, largest, panels);
            let sums = panels.sums.as_mut_ptr().add(panel * dv * width);
            products.accumulate::<E::Real, S>(simd, dv, sums, factor, values, count, scores);
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
