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

use pulp::{Simd, WithSimd};

use super::careful::{accumulate_with_care, outer_products_with_care};
use super::element::Element;
use super::gradients::{BiasGradient, Gradients, QueryRow};
use super::micro::{Rows, VECTORS, accumulate, dot_products, outer_products, pad, panel_width};
use super::panels::{pack, unpack};
use super::problem::{Problem, View};
use super::real::Real;
use super::scores::Tile;
use super::scratch::Scratch;
use super::softmax::weights_and_grads;
use super::transpose::transpose;
use crate::mask::Coverage;

/// Panels of a block of queries. Their weights lie side by side, so that the products over queries, dk and dv, are long
/// enough to pay for loading and storing their sums.
const PANELS: usize = 4;
/// Keys of a block: the weights and their gradients (48 KB each with AVX2) stay in a second-level cache.
const KEYS: usize = 192;

/// Products that are summed up before the sum is added to the others: a longer sum loses more to rounding, a shorter one
/// is loaded and stored more often.
const LONGEST_SUM: usize = 64;

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
    /// Whether there is anything infinite or NaN that the mask may hide from somebody.
    pub(crate) with_care: bool,
    pub(crate) gradients: Gradients<E>,
}

struct Pieces<'s, R> {
    /// [d][W] for each panel
    queries: &'s mut [R],
    /// [value_dim][W] for each panel
    grads: &'s mut [R],
    /// [d][W] for each panel
    grad_queries: &'s mut [R],
    /// A row of pad(d) for each query, times the scale
    query_rows: &'s mut [R],
    /// A row of pad(value_dim) for each query
    grad_rows: &'s mut [R],
    /// [KEYS][PANELS · W]
    weights: &'s mut [R],
    /// [KEYS][PANELS · W]
    grad_scores: &'s mut [R],
    /// [KEYS][W], with a softcap
    tanh: &'s mut [R],
    /// [KEYS][W], with dropout
    factors: &'s mut [R],
    keys: &'s mut [R],
    values: &'s mut [R],
    /// A row of pad(d) for each key of the task: the sum so far
    grad_keys: &'s mut [R],
    /// A row of pad(value_dim) for each key of the task
    grad_values: &'s mut [R],
    /// log-sum-exp and delta, [W] for each panel
    logsumexp: &'s mut [R],
    delta: &'s mut [R],
}

impl<E: Element> WithSimd for Backward<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (d, dv) = (self.problem.dim(), self.problem.value_dim());
        let width = panel_width::<E::Real, S>();
        let block = PANELS * width;
        let if_wanted = |wanted: bool| if wanted { KEYS * width } else { 0 };
        let sizes = [
            d * block,
            dv * block,
            d * block,
            pad(d) * block,
            pad(dv) * block,
            KEYS * block,
            KEYS * block,
            if_wanted(self.problem.softcap.is_some()),
            if_wanted(self.problem.dropout.is_some()),
            KEYS * d,
            KEYS * dv,
            pad(d) * self.keys.len(),
            pad(dv) * self.keys.len(),
            block,
            block,
        ];
        let mut scratch = Scratch::of_this_thread::<E::Real>(&sizes);
        let [
            queries,
            grads,
            grad_queries,
            query_rows,
            grad_rows,
            weights,
            grad_scores,
            tanh,
            factors,
            keys,
            values,
            grad_keys,
            grad_values,
            logsumexp,
            delta,
        ] = scratch.pieces(sizes);
        let mut pieces = Pieces {
            queries,
            grads,
            grad_queries,
            query_rows,
            grad_rows,
            weights,
            grad_scores,
            tanh,
            factors,
            keys,
            values,
            grad_keys,
            grad_values,
            logsumexp,
            delta,
        };
        pieces.grad_keys.fill(E::Real::ZERO);
        pieces.grad_values.fill(E::Real::ZERO);
        let q_len = self.problem.shape().q_len;
        let group = self.problem.group();
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for start in (0..q_len).step_by(block) {
                self.query_block(simd, head, start..(start + block).min(q_len), &mut pieces);
            }
        }
        self.write_grad_keys_and_values(&pieces);
    }
}

impl<E: Element> Backward<'_, E> {
    #[inline(always)]
    fn query_block<S: Simd>(&self, simd: S, head: usize, queries: Range<usize>, pieces: &mut Pieces<E::Real>) {
        let at = (self.sequence, head);
        let mut ready = false;
        for start in self.keys.clone().step_by(KEYS) {
            let keys = start..(start + KEYS).min(self.keys.end);
            let (keys, _) = self.problem.visible(at, &queries, keys);
            if keys.is_empty() {
                continue;
            }
            if !ready {
                self.start(simd, at, &queries, pieces);
                ready = true;
            }
            self.key_block(simd, at, &queries, keys, pieces);
        }
        if !ready {
            pieces.grad_queries.fill(E::Real::ZERO);
        }
        self.write_grad_queries(simd, head, &queries, pieces);
    }

    /// Packs the block's queries and the gradients of their contexts, both ways.
    #[inline(always)]
    fn start<S: Simd>(&self, simd: S, at: (usize, usize), queries: &Range<usize>, pieces: &mut Pieces<E::Real>) {
        let problem = self.problem;
        let shape = problem.shape();
        let scale = E::Real::from_f64(problem.scale);
        // SAFETY: there is room for the block; a block of keys has as many as a panel has queries, and more.
        unsafe {
            pack::<E, S>(simd, &problem.q, at, queries, scale, pieces.keys, pieces.queries.as_mut_ptr());
            let to = pieces.grads.as_mut_ptr();
            pack::<E, S>(simd, &self.grad_context, at, queries, E::Real::ONE, pieces.values, to);
        }
        pieces.grad_queries.fill(E::Real::ZERO);
        let (d_pad, dv_pad) = (pad(problem.dim()), pad(problem.value_dim()));
        let query_rows = pieces.query_rows.chunks_exact_mut(d_pad);
        for (i, (query_row, grad_row)) in query_rows.zip(pieces.grad_rows.chunks_exact_mut(dv_pad)).enumerate() {
            let query = queries.start + i;
            if query >= queries.end {
                query_row.fill(E::Real::ZERO);
                grad_row.fill(E::Real::ZERO);
                (pieces.logsumexp[i], pieces.delta[i]) = (E::Real::INFINITY, E::Real::ZERO);
                continue;
            }
            let row = self.rows[(at.0 * shape.num_heads + at.1) * shape.q_len + query];
            (pieces.logsumexp[i], pieces.delta[i]) = (row.logsumexp, row.delta);
            let (query_row, behind) = query_row.split_at_mut(problem.dim());
            E::widen_all(problem.q.row(at.0, at.1, query), query_row);
            query_row.iter_mut().for_each(|x| *x *= scale);
            behind.fill(E::Real::ZERO);
            let (grad_row, behind) = grad_row.split_at_mut(problem.value_dim());
            E::widen_all(self.grad_context.row(at.0, at.1, query), grad_row);
            behind.fill(E::Real::ZERO);
        }
    }

    #[inline(always)]
    fn key_block<S: Simd>(
        &self,
        simd: S,
        at: (usize, usize),
        queries: &Range<usize>,
        block: Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let problem = self.problem;
        let width = panel_width::<E::Real, S>();
        let kv_at = (at.0, self.kv_head);
        let keys = problem.k.rows(kv_at, block.clone(), pieces.keys);
        let values = problem.v.rows(kv_at, block.clone(), pieces.values);
        let panels = queries.len().div_ceil(width);
        let mut visible: [Range<usize>; PANELS] = std::array::from_fn(|_| 0..0);
        for (panel, visible) in visible.iter_mut().enumerate().take(panels) {
            let first_query = queries.start + panel * width;
            let of_panel = first_query..(first_query + width).min(queries.end);
            let (range, coverage) = problem.visible(at, &of_panel, block.clone());
            *visible = range.start - block.start..range.end - block.start;
            let tile = Tile { at, first_query, queries: of_panel.len(), width, keys: range };
            self.zero_outside::<S>(panel, visible, block.len(), pieces);
            if visible.start < visible.end {
                // SAFETY: the pieces have the sizes that the kernels ask for, and the tile lies inside the block.
                unsafe { self.panel(simd, &tile, coverage, panel, visible.start, keys, values, pieces) };
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
                unsafe { self.grad_keys_and_values(simd, block.start + start, start..end, span, pieces) };
            }
            start = end;
        }
    }

    /// Weights and gradients of scores that a panel doesn't compute, but that lie between those that it does.
    #[inline(always)]
    fn zero_outside<S: Simd>(&self, panel: usize, visible: &Range<usize>, keys: usize, pieces: &mut Pieces<E::Real>) {
        let width = panel_width::<E::Real, S>();
        for key in (0..keys).filter(|key| !visible.contains(key)) {
            let lanes = (key * PANELS + panel) * width..(key * PANELS + panel + 1) * width;
            pieces.weights[lanes.clone()].fill(E::Real::ZERO);
            pieces.grad_scores[lanes].fill(E::Real::ZERO);
        }
    }

    /// Weights, gradients of scores, and the share of these keys in the gradients of a panel's queries.
    ///
    /// # Safety
    ///
    /// The pieces hold the panel; `keys` and `values` have a row for each key up to the last of the tile.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // all of it is needed, and nothing of it belongs together elsewhere
    unsafe fn panel<S: Simd>(
        &self,
        simd: S,
        tile: &Tile,
        coverage: Coverage,
        panel: usize,
        skip: usize,
        keys: Rows<*const E::Real>,
        values: Rows<*const E::Real>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let problem = self.problem;
        let (d, dv, width, count) = (problem.dim(), problem.value_dim(), tile.width, tile.keys.len());
        let stride = PANELS * width;
        // SAFETY: as the caller promises.
        unsafe {
            let keys = Rows { start: keys.start.add(skip * keys.stride), ..keys };
            let values = Rows { start: values.start.add(skip * values.stride), ..values };
            let place = (skip * PANELS + panel) * width;
            let weights = Rows { start: pieces.weights.as_mut_ptr().add(place), stride };
            let grad_scores = Rows { start: pieces.grad_scores.as_mut_ptr().add(place), stride };
            let tanh = Rows { start: pieces.tanh.as_mut_ptr(), stride: width };
            let factors = Rows { start: pieces.factors.as_mut_ptr(), stride: width };
            let queries = pieces.queries.as_ptr().add(panel * d * width);
            let mut unused = [E::Real::splat(simd, E::Real::ZERO); VECTORS];
            dot_products::<E::Real, S, false>(simd, d, queries, keys, count, weights, &mut unused);
            tile.adjust(simd, problem, coverage, weights, problem.softcap.map(|_| tanh));
            let grads = pieces.grads.as_ptr().add(panel * dv * width);
            dot_products::<E::Real, S, false>(simd, dv, grads, values, count, grad_scores, &mut unused);
            let (dropout, softcap) = (problem.dropout.is_some(), problem.softcap.is_some());
            if dropout {
                tile.dropout_factors(simd, problem, factors);
            }
            let query = pieces.logsumexp.as_ptr().add(panel * width);
            let delta = pieces.delta.as_ptr().add(panel * width);
            weights_and_grads::<E::Real, S>(
                simd,
                count,
                query,
                delta,
                weights,
                grad_scores,
                dropout.then_some(factors),
            );
            if self.with_care && coverage == Coverage::Some {
                tile.hide(problem, weights, E::Real::ZERO);
                tile.hide(problem, grad_scores, E::Real::ZERO);
            }
            self.add_to_bias(simd, tile, grad_scores);
            if softcap {
                for j in 0..count {
                    for i in 0..width {
                        let tanh = *tanh.start.add(j * width + i);
                        *grad_scores.start.add(j * stride + i) *= E::Real::ONE - tanh * tanh;
                    }
                }
            }
            let one = [E::Real::splat(simd, E::Real::ONE); VECTORS];
            let grad_queries = pieces.grad_queries.as_mut_ptr().add(panel * d * width);
            let grad_scores = Rows { start: grad_scores.start.cast_const(), stride };
            for start in (0..count).step_by(LONGEST_SUM) {
                let count = LONGEST_SUM.min(count - start);
                let keys = Rows { start: keys.start.add(start * keys.stride), ..keys };
                let grad_scores = Rows { start: grad_scores.start.add(start * stride), stride };
                if self.with_care {
                    accumulate_with_care::<E::Real, S>(simd, d, grad_queries, one, keys, count, grad_scores);
                } else {
                    accumulate::<E::Real, S>(simd, d, grad_queries, one, keys, count, grad_scores);
                }
            }
        }
    }

    /// Adds the gradient of the scores to that of the bias.
    ///
    /// # Safety
    ///
    /// `grad_scores` has a row of W numbers for each key of the tile.
    #[inline(always)]
    unsafe fn add_to_bias<S: Simd>(&self, simd: S, tile: &Tile, grad_scores: Rows<*mut E::Real>) {
        let Some(BiasGradient { start, strides: [sb, sh, si, sj] }) = self.gradients.bias else { return };
        let keys = tile.keys.len();
        // SAFETY: the caller has a number for every place of the bias, and no other task has those of these heads and
        // keys.
        unsafe {
            let start = start.add(tile.at.0 * sb + tile.at.1 * sh + tile.first_query * si + tile.keys.start * sj);
            if si != 0 && sj == 1 {
                let from = Rows { start: grad_scores.start.cast_const(), stride: grad_scores.stride };
                let to = Rows { start, stride: si };
                transpose::<E::Real, S, true>(simd, keys, tile.queries, E::Real::ONE, from, to);
                return;
            }
            for j in 0..keys {
                for i in 0..tile.queries {
                    *start.add(i * si + j * sj) += *grad_scores.start.add(j * grad_scores.stride + i);
                }
            }
        }
    }

    /// dk and dv of the rows `rows` of a block, from the panels `span`.
    ///
    /// # Safety
    ///
    /// `rows` lie inside the block that starts at the task's key `key - rows.start`, `span` inside its panels.
    #[inline(always)]
    unsafe fn grad_keys_and_values<S: Simd>(
        &self,
        simd: S,
        key: usize,
        rows: Range<usize>,
        span: Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let width = panel_width::<E::Real, S>();
        let (stride, place) = (PANELS * width, (rows.start * PANELS + span.start) * width);
        let (first, inner) = (span.start * width, span.len() * width);
        let lanes = E::Real::lanes::<S>();
        let (k_stride, v_stride) = (pad(self.problem.dim()), pad(self.problem.value_dim()));
        let key = key - self.keys.start;
        // SAFETY: as the caller promises.
        unsafe {
            let weights = Rows { start: pieces.weights.as_ptr().add(place), stride };
            let grad_rows = Rows { start: pieces.grad_rows.as_ptr().add(first * v_stride), stride: v_stride };
            let out = Rows { start: pieces.grad_values.as_mut_ptr().add(key * v_stride), stride: v_stride };
            let columns = self.problem.value_dim().next_multiple_of(lanes);
            self.over_queries(simd, columns, out, rows.len(), weights, inner, grad_rows);
            let grad_scores = Rows { start: pieces.grad_scores.as_ptr().add(place), stride };
            let query_rows = Rows { start: pieces.query_rows.as_ptr().add(first * k_stride), stride: k_stride };
            let out = Rows { start: pieces.grad_keys.as_mut_ptr().add(key * k_stride), stride: k_stride };
            let columns = self.problem.dim().next_multiple_of(lanes);
            self.over_queries(simd, columns, out, rows.len(), grad_scores, inner, query_rows);
        }
    }

    /// # Safety
    ///
    /// As [`outer_products`].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of `outer_products`
    unsafe fn over_queries<S: Simd>(
        &self,
        simd: S,
        columns: usize,
        out: Rows<*mut E::Real>,
        count: usize,
        weights: Rows<*const E::Real>,
        inner: usize,
        rows: Rows<*const E::Real>,
    ) {
        for start in (0..inner).step_by(LONGEST_SUM) {
            let inner = LONGEST_SUM.min(inner - start);
            // SAFETY: as the caller promises.
            unsafe {
                let weights = Rows { start: weights.start.add(start), ..weights };
                let rows = Rows { start: rows.start.add(start * rows.stride), ..rows };
                if self.with_care {
                    outer_products_with_care::<E::Real, S>(simd, columns, out, count, weights, inner, rows);
                } else {
                    outer_products::<E::Real, S>(simd, columns, out, count, weights, inner, rows);
                }
            }
        }
    }

    fn write_grad_keys_and_values(&self, pieces: &Pieces<E::Real>) {
        let Gradients { k, k_by_place, v, v_by_place, .. } = self.gradients;
        let (d, dv) = (self.problem.dim(), self.problem.value_dim());
        for (j, key) in self.keys.clone().enumerate() {
            // SAFETY: the gradients have a row for each key of this head, and no other task writes those of this one.
            unsafe {
                E::narrow_all(&pieces.grad_keys[j * pad(d)..][..d], k.add(key * k_by_place));
                E::narrow_all(&pieces.grad_values[j * pad(dv)..][..dv], v.add(key * v_by_place));
            }
        }
    }

    #[inline(always)]
    fn write_grad_queries<S: Simd>(&self, simd: S, head: usize, queries: &Range<usize>, pieces: &mut Pieces<E::Real>) {
        let width = panel_width::<E::Real, S>();
        let d = self.problem.dim();
        let scale = E::Real::from_f64(self.problem.scale);
        let (by_head, stride) = self.gradients.q_strides;
        for (panel, start) in queries.clone().step_by(width).enumerate() {
            let count = width.min(queries.end - start);
            let columns = pieces.grad_queries[panel * d * width..].as_ptr();
            // SAFETY: the gradients have a row for each query of the sequence, and no other task writes it.
            unsafe {
                let rows = Rows { start: self.gradients.q.add(head * by_head + start * stride), stride };
                unpack::<E::Real, S>(simd, columns, d, count, scale, pieces.keys, rows);
            }
        }
    }
}
