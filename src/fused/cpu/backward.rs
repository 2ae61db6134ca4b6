//! The backward pass: weights are computed once more from the log-sum-exp, block by block.
//!
//! | forward | backward |
//! |---|---|
//! | s = scale · q·kᵀ | dq = scale · ds·k, dk = scale · dsᵀ·q |
//! | p = exp(s - lse) | ds = p ∘ (dp - δ), where δ = Σ do ∘ o - dlse |
//! | o = (p ∘ drop)·v | dp = drop ∘ do·vᵀ, dv = (p ∘ drop)ᵀ·do |
//!
//! Source: Dao, "FlashAttention-2" (2023), algorithm 2; the term with dlse from d lse / ds = p.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use pulp::{Simd, WithSimd};

use super::element::Element;
use super::gradients::{Gradients, QueryRow};
use super::micro::{Rows, VECTORS, pad, panel_width};
use super::problem::{Problem, View};
use super::products::{Products, RowsToDot};
use super::real::Real;
use super::scores::Tile;
use super::scratch::{Scratch, pieces};
use super::softmax::{times_slope_of_tanh, weights_and_grads};
use crate::mask::Coverage;

/// Panels of a block of queries. Their weights lie side by side, so that the products over queries, dk and dv, are long
/// enough to pay for loading and storing their sums.
pub(super) const PANELS: usize = 4;
/// Keys of a block: the weights and their gradients (48 KB each with AVX2) stay in a second-level cache.
const KEYS: usize = 192;

/// Products that are summed up before the sum is added to the others: a longer sum loses more to rounding, a shorter one
/// is loaded and stored more often.
pub(super) const LONGEST_SUM: usize = 64;

/// The keys `keys` of one key head, and all queries that look at them. A task owns its rows of dk and dv.
pub(crate) struct Backward<'a, E: Element> {
    pub(crate) problem: &'a Problem<'a, E>,
    /// (batch, num_heads, q_len, value_dim)
    pub(crate) grad_context: View<'a, E>,
    /// (batch, num_heads, q_len): what the backward pass needs of each query.
    pub(crate) rows: &'a [QueryRow<E::Real>],
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) keys: Range<usize>,
    /// Whether to compute with care for what is infinite or NaN behind the mask.
    pub(crate) with_care: bool,
    pub(crate) gradients: Gradients<E>,
    /// Set if a result is not finite.
    pub(crate) is_strange: &'a AtomicBool,
}

/// The rows of a tile's keys.
#[derive(Clone, Copy)]
struct TileRows<E: Element> {
    /// How far behind the first key of the block the first of the tile is.
    first: usize,
    keys: RowsToDot<E>,
    keys_to_sum: Rows<*const E::Real>,
    values: RowsToDot<E>,
}

pub(super) struct Pieces<'s, R> {
    /// [operands(d)][W] for each panel
    pub(super) queries: &'s mut [R],
    /// [operands(value_dim)][W] for each panel
    pub(super) grads: &'s mut [R],
    /// [d][W] for each panel
    pub(super) grad_queries: &'s mut [R],
    /// A row of pad(d) for each query, times the scale, or for each pair of queries
    pub(super) query_rows: &'s mut [R],
    /// A row of pad(value_dim) for each query or pair of them
    pub(super) grad_rows: &'s mut [R],
    /// [KEYS][PANELS · W]: a row for each key, as long as the operands that the queries are
    pub(super) weights: &'s mut [R],
    /// [KEYS][PANELS · W]
    pub(super) grad_scores: &'s mut [R],
    /// [KEYS][W]: numbers, before they become pairs
    pub(super) tile_weights: &'s mut [R],
    /// [KEYS][W]
    pub(super) tile_grads: &'s mut [R],
    /// [KEYS][W], with a softcap
    pub(super) tanh: &'s mut [R],
    /// [KEYS][W], with dropout
    pub(super) factors: &'s mut [R],
    pub(super) keys: &'s mut [R],
    pub(super) values: &'s mut [R],
    /// A row of pad(d) for each key of the task: the sum so far
    pub(super) grad_keys: &'s mut [R],
    /// A row of pad(value_dim) for each key of the task
    pub(super) grad_values: &'s mut [R],
    /// log-sum-exp and delta, [W] for each panel
    pub(super) logsumexp: &'s mut [R],
    pub(super) delta: &'s mut [R],
}

impl<E: Element> WithSimd for Backward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (d, dv) = (self.problem.dim(), self.problem.value_dim());
        let products = if self.with_care { Products::Careful } else { Products::new::<E, S>(d, dv) };
        let width = panel_width::<E::Real, S>();
        let block = PANELS * width;
        let if_wanted = |wanted: bool| if wanted { KEYS * width } else { 0 };
        let by_pairs = products.by_pairs().is_some();
        let mut scratch;
        let mut pieces = pieces!(scratch: E::Real => Pieces {
            queries: d * block,
            grads: dv * block,
            grad_queries: d * block,
            query_rows: pad(d) * block,
            grad_rows: pad(dv) * block,
            weights: KEYS * block,
            grad_scores: KEYS * block,
            tile_weights: if_wanted(by_pairs),
            tile_grads: if_wanted(by_pairs),
            tanh: if_wanted(self.problem.softcap.is_some()),
            factors: if_wanted(self.problem.dropout.is_some()),
            keys: KEYS * pad(d),
            values: KEYS * dv,
            grad_keys: pad(d) * self.keys.len(),
            grad_values: pad(dv) * self.keys.len(),
            logsumexp: block,
            delta: block,
        });
        pieces.grad_keys.fill(E::Real::ZERO);
        pieces.grad_values.fill(E::Real::ZERO);
        let q_len = self.problem.shape().q_len;
        let group = self.problem.group();
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for start in (0..q_len).step_by(block) {
                self.query_block(simd, products, head, start..(start + block).min(q_len), &mut pieces);
            }
        }
        self.write_grad_keys_and_values(&pieces);
    }
}

impl<E: Element> Backward<'_, E> {
    #[inline(always)]
    fn query_block<S: Simd>(
        &self,
        simd: S,
        products: Products,
        head: usize,
        queries: Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let at = (self.sequence, head);
        let mut ready = false;
        for start in self.keys.clone().step_by(KEYS) {
            let keys = start..(start + KEYS).min(self.keys.end);
            let (keys, _) = self.problem.visible(at, &queries, keys);
            if keys.is_empty() {
                continue;
            }
            if !ready {
                self.start(simd, products, at, &queries, pieces);
                ready = true;
            }
            self.key_block(simd, products, at, &queries, keys, pieces);
        }
        if !ready {
            pieces.grad_queries.fill(E::Real::ZERO);
        }
        self.write_grad_queries(simd, head, &queries, pieces);
    }

    /// Packs the block's queries and the gradients of their contexts, both ways: as panels, and as rows to sum over.
    #[inline(always)]
    fn start<S: Simd>(
        &self,
        simd: S,
        products: Products,
        at: (usize, usize),
        queries: &Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let problem = self.problem;
        let (q, grads) = (&problem.q, &self.grad_context);
        let scale = E::Real::from_f64(problem.scale);
        // SAFETY: there is room for the block; a block of keys has as many as a panel has queries, and more.
        unsafe {
            products.pack::<E, S>(simd, q, at, queries, scale, pieces.keys, pieces.queries.as_mut_ptr());
            let to = pieces.grads.as_mut_ptr();
            products.pack::<E, S>(simd, grads, at, queries, E::Real::ONE, pieces.values, to);
            products.rows_of_block(q, at, queries, scale, pieces.query_rows);
            products.rows_of_block(grads, at, queries, E::Real::ONE, pieces.grad_rows);
        }
        pieces.grad_queries.fill(E::Real::ZERO);
        let shape = problem.shape();
        let rows = &self.rows[(at.0 * shape.num_heads + at.1) * shape.q_len..][queries.clone()];
        let nobody = QueryRow { logsumexp: E::Real::INFINITY, delta: E::Real::ZERO };
        let rows = rows.iter().copied().chain(std::iter::repeat(nobody));
        for (row, (logsumexp, delta)) in rows.zip(pieces.logsumexp.iter_mut().zip(&mut *pieces.delta)) {
            (*logsumexp, *delta) = (row.logsumexp, row.delta);
        }
    }

    #[inline(always)]
    fn key_block<S: Simd>(
        &self,
        simd: S,
        products: Products,
        at: (usize, usize),
        queries: &Range<usize>,
        block: Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let problem = self.problem;
        let width = panel_width::<E::Real, S>();
        let kv_at = (at.0, self.kv_head);
        let keys = products.rows_to_dot(&problem.k, kv_at, block.clone(), pieces.keys);
        let values = products.rows_to_dot(&problem.v, kv_at, block.clone(), pieces.values);
        let panels = queries.len().div_ceil(width);
        let mut visible: [Range<usize>; PANELS] = std::array::from_fn(|_| 0..0);
        let mut summed = match keys {
            RowsToDot::Numbers(rows) => rows,
            RowsToDot::Raw(_) => products.rows_to_sum(&problem.k, kv_at, block.clone(), pieces.keys),
        };
        let mut phase = 0;
        for (panel, visible) in visible.iter_mut().enumerate().take(panels) {
            let first_query = queries.start + panel * width;
            let of_panel = first_query..(first_query + width).min(queries.end);
            let (range, coverage) = problem.visible(at, &of_panel, block.clone());
            *visible = range.start - block.start..range.end - block.start;
            let tile = Tile { at, first_query, queries: of_panel.len(), width, keys: range };
            self.zero_outside::<S>(products, panel, visible, block.len(), pieces);
            if tile.keys.is_empty() {
                continue;
            }
            let skip = visible.start;
            if products.phase(skip) != phase {
                phase = products.phase(skip);
                summed = products.rows_to_sum(&problem.k, kv_at, block.start + phase..block.end, pieces.keys);
            }
            // SAFETY: the pieces have the sizes that the kernels ask for, and the tile lies inside the block.
            unsafe {
                let rows = TileRows {
                    first: skip,
                    keys: keys.skip(skip),
                    keys_to_sum: summed.skip(products.operands(skip - phase)),
                    values: values.skip(skip),
                };
                self.tile(simd, products, &tile, coverage, panel, rows, pieces);
            }
        }
        // Keys that the same panels look at are multiplied together.
        let mut start = 0;
        while start < block.len() {
            let looked_at = |key: usize| {
                let sees = |panel: &usize| visible[*panel].contains(&key);
                let first = (0..panels).find(sees);
                first.map(|first| first..(0..panels).rfind(sees).unwrap_or(first) + 1)
            };
            let span = looked_at(start);
            let end = (start + 1..block.len()).find(|&key| looked_at(key) != span).unwrap_or(block.len());
            if let Some(span) = span {
                // SAFETY: the gradients have a padded row for each key of this task, the pieces one for each query.
                unsafe { self.grad_keys_and_values(simd, products, block.start + start, start..end, span, pieces) };
            }
            start = end;
        }
    }

    /// Weights and gradients of scores that a panel doesn't compute, but that lie between those that it does.
    #[inline(always)]
    fn zero_outside<S: Simd>(
        &self,
        products: Products,
        panel: usize,
        visible: &Range<usize>,
        keys: usize,
        pieces: &mut Pieces<E::Real>,
    ) {
        let operands = products.operands(panel_width::<E::Real, S>());
        for key in (0..keys).filter(|key| !visible.contains(key)) {
            let lanes = (key * PANELS + panel) * operands..(key * PANELS + panel + 1) * operands;
            pieces.weights[lanes.clone()].fill(E::Real::ZERO);
            pieces.grad_scores[lanes].fill(E::Real::ZERO);
        }
    }

    /// Weights, gradients of scores, and the share of these keys in the gradients of a panel's queries.
    ///
    /// # Safety
    ///
    /// The pieces hold the panel; the rows are those of the tile's keys.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // all of it is needed, and nothing of it belongs together elsewhere
    unsafe fn tile<S: Simd>(
        &self,
        simd: S,
        products: Products,
        tile: &Tile,
        coverage: Coverage,
        panel: usize,
        rows: TileRows<E>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let problem = self.problem;
        let (d, dv, width, count) = (problem.dim(), problem.value_dim(), tile.width, tile.keys.len());
        let (scale, one) = (E::Real::from_f64(problem.scale), E::Real::ONE);
        let place = (rows.first * PANELS + panel) * products.operands(width);
        let stride = PANELS * products.operands(width);
        // SAFETY: as the caller promises.
        unsafe {
            let to_weights = Rows { start: pieces.weights.as_mut_ptr().add(place), stride };
            let to_grads = Rows { start: pieces.grad_scores.as_mut_ptr().add(place), stride };
            // Numbers that will be pairs are computed elsewhere.
            let (weights, grad_scores) = match products.by_pairs() {
                Some(_) => {
                    let tile = |numbers: &mut [E::Real]| Rows { start: numbers.as_mut_ptr(), stride: width };
                    (tile(pieces.tile_weights), tile(pieces.tile_grads))
                }
                None => (to_weights, to_grads),
            };
            let tanh = Rows { start: pieces.tanh.as_mut_ptr(), stride: width };
            let factors = Rows { start: pieces.factors.as_mut_ptr(), stride: width };
            let queries = pieces.queries.as_ptr().add(panel * products.operands(d) * width);
            let mut unused = [E::Real::splat(simd, E::Real::ZERO); VECTORS];
            products.dot_products::<E, S, false>(simd, d, scale, queries, rows.keys, count, weights, &mut unused);
            tile.adjust(simd, problem, coverage, weights, problem.softcap.map(|_| tanh));
            let grads = pieces.grads.as_ptr().add(panel * products.operands(dv) * width);
            products.dot_products::<E, S, false>(simd, dv, one, grads, rows.values, count, grad_scores, &mut unused);
            let factors = problem.dropout.map(|_| factors);
            if let Some(factors) = factors {
                tile.dropout_factors(simd, problem, factors);
            }
            let query = pieces.logsumexp.as_ptr().add(panel * width);
            let delta = pieces.delta.as_ptr().add(panel * width);
            weights_and_grads::<E::Real, S>(simd, count, query, delta, weights, grad_scores, factors);
            if self.with_care {
                tile.zero_nobodys(problem, coverage, weights);
                tile.zero_nobodys(problem, coverage, grad_scores);
            }
            if let Some(bias) = &self.gradients.bias {
                bias.add(simd, tile, grad_scores);
            }
            if problem.softcap.is_some() {
                times_slope_of_tanh::<E::Real, S>(simd, count, tanh, grad_scores);
                if self.with_care {
                    tile.zero_nobodys(problem, coverage, grad_scores);
                }
            }
            if let Some(pairs) = products.by_pairs() {
                pairs.narrow_along(weights.cast().cast_const(), count, to_weights.cast());
                pairs.narrow_along(grad_scores.cast().cast_const(), count, to_grads.cast());
            }
            let factor = [E::Real::splat(simd, one); VECTORS];
            let grad_queries = pieces.grad_queries.as_mut_ptr().add(panel * d * width);
            for start in (0..count).step_by(LONGEST_SUM) {
                let count = LONGEST_SUM.min(count - start);
                let keys = rows.keys_to_sum.skip(products.operands(start));
                let weights = grad_scores.skip(start);
                products.accumulate::<E::Real, S>(simd, d, grad_queries, factor, keys, count, weights);
            }
        }
    }
}
