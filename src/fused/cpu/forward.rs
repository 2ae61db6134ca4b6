//! The forward pass: online softmax over blocks of keys.
//!
//! Source: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023),
//! algorithm 1.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::element::Element;
use super::micro::{Rows, VECTORS, accumulate, dot_products, load, load_all, panel_width, store};
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
        self.over_keys(simd, &mut panels);
        self.finish(simd, &panels);
    }
}

impl<E: Element> Forward<'_, E> {
    #[inline(always)]
    fn start<S: Simd>(&self, _: S, panels: &mut Panels<E::Real>) {
        let width = panel_width::<E::Real, S>();
        pack_queries::<E>(
            self.problem,
            self.at,
            &self.queries,
            width,
            E::Real::from_f64(self.problem.scale),
            panels.queries,
        );
        panels.sums.fill(E::Real::ZERO);
        panels.largest.fill(E::Real::LOWEST);
        panels.total.fill(E::Real::ZERO);
    }

    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, panels: &mut Panels<E::Real>) {
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
                    dot_products::<E::Real, S>(simd, problem.dim(), queries, from(keys), tile.keys.len(), scores);
                    tile.adjust(problem, coverage, scores, None);
                    let factor = self.exponentials(simd, &tile, panel, panels);
                    let sums = panels.sums.as_mut_ptr().add(panel * problem.value_dim() * width);
                    let weights = Rows { start: panels.scores.as_ptr(), stride: width };
                    accumulate::<E::Real, S>(
                        simd,
                        problem.value_dim(),
                        sums,
                        factor,
                        from(values),
                        tile.keys.len(),
                        weights,
                    );
                }
            }
        }
    }

    /// Turns a panel's scores into exponentials relative to the greatest so far, and adds them up. What has been summed
    /// before is to be multiplied by the result.
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
        panels: &mut Panels<E::Real>,
    ) -> [<E::Real as Real>::Vector<S>; VECTORS] {
        let (lanes, width) = (E::Real::lanes::<S>(), tile.width);
        // SAFETY: `largest` and `total` have W numbers for each panel, `scores` and `factors` W for each key.
        unsafe {
            let scores = panels.scores.as_mut_ptr();
            let largest = panels.largest.as_mut_ptr().add(panel * width);
            let total = panels.total.as_mut_ptr().add(panel * width);
            let before = load_all::<E::Real, S, VECTORS>(simd, largest);
            let mut now = before;
            for j in 0..tile.keys.len() {
                for (v, now) in now.iter_mut().enumerate() {
                    *now = E::Real::max(simd, *now, load::<E::Real, S>(scores.add(j * width + v * lanes)));
                }
            }
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
                tile.dropout_factors(self.problem, Rows { start: panels.factors.as_mut_ptr(), stride: width });
                let count = tile.keys.len() * width;
                panels.scores[..count].iter_mut().zip(&panels.factors[..count]).for_each(|(p, factor)| *p *= *factor);
            }
            factor
        }
    }

    /// Divides by the sums and writes the results.
    #[inline(always)]
    fn finish<S: Simd>(&self, _: S, panels: &Panels<E::Real>) {
        let width = panel_width::<E::Real, S>();
        let dv = self.problem.value_dim();
        for i in 0..self.queries.len() {
            let (panel, lane) = (i / width, i % width);
            let total = panels.total[i];
            let (inverse, logsumexp) = if total == E::Real::ZERO {
                (E::Real::ZERO, -E::Real::INFINITY)
            } else {
                let logsumexp = panels.largest[i].to_f64() + total.to_f64().ln();
                (E::Real::ONE / total, E::Real::from_f64(logsumexp))
            };
            let sums = &panels.sums[panel * dv * width..][..dv * width];
            // SAFETY: the caller has a row of `context` and a number of `logsumexp` for each query of this task alone.
            unsafe {
                self.logsumexp.add(i).write(logsumexp);
                let row = self.context.add(i * self.context_stride);
                for (c, sums) in sums.chunks_exact(width).enumerate() {
                    row.add(c).write(E::narrow(sums[lane] * inverse));
                }
            }
        }
    }
}

/// Queries as panels [d][W], multiplied by `factor`; zeros in the lanes behind the last.
#[inline(always)]
pub(crate) fn pack_queries<E: Element>(
    problem: &Problem<E>,
    at: (usize, usize),
    queries: &Range<usize>,
    width: usize,
    factor: E::Real,
    panels: &mut [E::Real],
) {
    for (panel, to) in panels.chunks_exact_mut(problem.dim() * width).enumerate() {
        for lane in 0..width {
            let query = queries.start + panel * width + lane;
            if query < queries.end {
                let row = problem.q.row(at.0, at.1, query);
                for (to, x) in to.chunks_exact_mut(width).zip(row) {
                    to[lane] = x.widen() * factor;
                }
            } else {
                to.chunks_exact_mut(width).for_each(|to| to[lane] = E::Real::ZERO);
            }
        }
    }
}
