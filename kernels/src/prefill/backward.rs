//! The backward pass: weights are computed once more from the log-sum-exp, block by block.
//!
//! | forward | backward |
//! |---|---|
//! | s = scale · q·kᵀ | dq = scale · ds·k, dk = scale · dsᵀ·q |
//! | p = exp(s - lse) | ds = p ∘ (dp - δ), where δ = Σ do ∘ o - dlse |
//! | o = (p ∘ drop)·v | dp = drop ∘ do·vᵀ, dv = (p ∘ drop)ᵀ·do |
//!
//! The scores are those of the forward pass to the last bit, computed by the same kernel in the same order: p = exp(s - lse)
//! would magnify a difference of two roundings where scores are large.
//!
//! Source: Dao, "FlashAttention-2" (2023), algorithm 2; the term with dlse from d lse / ds = p.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use pulp::{Simd, WithSimd};

use super::backward_pieces::{BlockPieces, Pieces};
use super::gradients::{Gradients, QueryRow};
use crate::careful::{Headroom, times_power_of_two};
use crate::decode::microkernel::dot_products as decode_dot_products;
use crate::dtype::Source;
use crate::error::Error;
use crate::gemm::microkernel::{VECTORS, pad, panel_width};
use crate::gemm::{DotRows, Gemm, SumRows};
use crate::mask::Coverage;
use crate::matrix::{Matrix, MatrixMut};
use crate::operands::Operands;
use crate::score_mods::{Tile, softcap_gradient};
use crate::simd::SimdFloat;
use crate::softmax::{RowStatistics, weights_and_gradients};
use crate::tiles::{BackwardTiles, MAX_PANELS};

/// A task: the keys `keys` of one key head, and all queries that look at them.
pub(crate) struct Backward<'a, R> {
    pub(crate) operands: &'a Operands<'a, R>,
    pub(crate) tiles: BackwardTiles,
    /// The gradient of the context: (batch, num_heads, q_len, value_dim).
    pub(crate) grad_context: &'a dyn Source<R>,
    /// (batch, num_heads, q_len): what the backward pass needs of each query.
    pub(crate) rows: &'a [QueryRow<R>],
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) keys: Range<usize>,
    /// Whether the forward pass has decoded.
    pub(crate) is_decoded: bool,
    /// In the careful pass, what keeps the sums from overflowing.
    pub(crate) careful: Option<Headroom>,
    pub(crate) gradients: Gradients<'a, R>,
    /// Set if a result is not finite.
    pub(crate) is_not_finite: &'a AtomicBool,
}

/// The rows of a tile's keys.
struct TileRows<'m, R> {
    keys: DotRows<'m, R>,
    keys_to_sum: SumRows<'m, R>,
    values: DotRows<'m, R>,
}

/// What a task keeps for one panel, and for a tile of it.
struct TilePanels<'s, R> {
    /// \[panel_rows(d)\]\[W\]
    queries: &'s [R],
    /// The same queries as rows of pad(d), if they have been decoded, and room for their scores.
    decode: Option<(Matrix<'s, R>, &'s mut [R])>,
    /// \[panel_rows(value_dim)\]\[W\]
    grads: &'s [R],
    rows: RowStatistics<'s, R>,
    /// \[key\]\[W\], with a softcap.
    tanhs: Option<MatrixMut<'s, R>>,
    /// \[key\]\[W\], with dropout.
    factors: Option<MatrixMut<'s, R>>,
}

impl<R: SimdFloat> WithSimd for Backward<'_, R> {
    type Output = Result<(), Error>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Result<(), Error> {
        let operands = self.operands;
        let (d, dv, q_len) = (operands.dim, operands.value_dim, operands.shape.q_len);
        let mut registers = None;
        let gemm = Gemm::new::<S>(operands.is_bf16 && !self.is_decoded, d, dv, &mut registers);
        let gemm = if self.careful.is_some() { gemm.nan_safe() } else { gemm };
        let (width, mut scratch) = (panel_width::<R, S>(), None);
        let (tiles, keys) = (self.tiles, self.keys.len());
        let mut pieces = Pieces::new(operands, tiles, keys, gemm, width, self.is_decoded, &mut scratch)?;
        pieces.grad_keys.fill(R::ZERO);
        pieces.grad_values.fill(R::ZERO);
        let (group, block) = (operands.group, self.tiles.panels * width);
        for head in self.kv_head * group..(self.kv_head + 1) * group {
            for start in (0..q_len).step_by(block) {
                self.query_block(simd, gemm, head, start..(start + block).min(q_len), &mut pieces);
            }
        }
        self.write_grad_keys_and_values(&mut pieces);
        Ok(())
    }
}

impl<R: SimdFloat> Backward<'_, R> {
    /// A block of queries of one head against all keys of the task.
    #[inline(always)]
    fn query_block<S: Simd>(
        &mut self,
        simd: S,
        gemm: Gemm,
        head: usize,
        queries: Range<usize>,
        pieces: &mut Pieces<R>,
    ) {
        let at = (self.sequence, head);
        let mut is_packed = false;
        for start in self.keys.clone().step_by(self.tiles.keys) {
            let keys = start..(start + self.tiles.keys).min(self.keys.end);
            let (keys, _) = self.operands.visible(at, &queries, keys);
            if keys.is_empty() {
                continue;
            }
            if !is_packed {
                self.pack(simd, gemm, at, &queries, pieces);
                is_packed = true;
            }
            self.key_block(simd, gemm, at, &queries, keys, pieces);
        }
        if !is_packed {
            pieces.block.grad_queries.fill(R::ZERO);
        }
        self.write_grad_queries(simd, head, &queries, pieces);
    }

    /// Packs the block's queries and the gradients of their contexts, both ways: as panels, and as rows to sum over.
    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, gemm: Gemm, at: (usize, usize), queries: &Range<usize>, pieces: &mut Pieces<R>) {
        let (operands, block) = (self.operands, &mut pieces.block);
        let (scale, of_grads) = (R::from_f64(operands.scale), times_power_of_two(R::ONE, -self.headroom().grads));
        // A block of keys is at least as long as one of queries, so that its memory serves to widen them.
        gemm.pack::<R, S>(simd, operands.q, at, queries, scale, pieces.keys, block.queries);
        gemm.of_gradients().pack::<R, S>(simd, self.grad_context, at, queries, of_grads, pieces.values, block.grads);
        gemm.query_rows(operands.q, at, queries, scale, pieces.keys, block.query_rows);
        gemm.query_rows(self.grad_context, at, queries, of_grads, pieces.values, block.grad_rows);
        block.grad_queries.fill(R::ZERO);
        let shape = operands.shape;
        let rows = &self.rows[(at.0 * shape.num_heads + at.1) * shape.q_len..][queries.clone()];
        let missing = QueryRow { largest: R::INFINITY, log_total: R::ZERO, delta: R::ZERO };
        for i in 0..block.delta.len() {
            let row = rows.get(i).copied().unwrap_or(missing);
            (block.largest[i], block.log_total[i], block.delta[i]) = (row.largest, row.log_total, row.delta);
        }
    }

    /// A block of queries against a block of keys.
    #[inline(always)]
    fn key_block<S: Simd>(
        &mut self,
        simd: S,
        gemm: Gemm,
        at: (usize, usize),
        queries: &Range<usize>,
        block: Range<usize>,
        pieces: &mut Pieces<R>,
    ) {
        let operands = self.operands;
        let width = panel_width::<R, S>();
        let kv_at = (at.0, self.kv_head);
        let keys = gemm.dot_rows(operands.k, kv_at, block.clone(), pieces.keys);
        let values = gemm.of_gradients().dot_rows(operands.v, kv_at, block.clone(), pieces.values);
        let mut keys_to_sum = match keys {
            DotRows::Floats(rows) => SumRows::Floats(rows),
            _ => gemm.sum_rows(simd, operands.k, kv_at, block.clone(), pieces.keys_to_sum),
        };
        let mut phase = 0;
        let panels = queries.len().div_ceil(width);
        let mut visible: [Range<usize>; MAX_PANELS] = std::array::from_fn(|_| 0..0);
        for (panel, visible) in visible.iter_mut().enumerate().take(panels) {
            let first_query = queries.start + panel * width;
            let of_panel = first_query..(first_query + width).min(queries.end);
            let (range, coverage) = operands.visible(at, &of_panel, block.clone());
            *visible = range.start - block.start..range.end - block.start;
            self.zero_outside(gemm.operands(width), panel, visible, block.len(), &mut pieces.block);
            if range.is_empty() {
                continue;
            }
            let skip = visible.start;
            if gemm.phase(skip) != phase {
                phase = gemm.phase(skip);
                let shifted = block.start + phase..block.end;
                keys_to_sum = gemm.sum_rows(simd, operands.k, kv_at, shifted, pieces.keys_to_sum);
            }
            let rows = TileRows {
                keys: keys.part(skip, range.len()),
                keys_to_sum: keys_to_sum.skip(skip - phase),
                values: values.part(skip, range.len()),
            };
            let tile = Tile { at, first_query, queries: of_panel.len(), keys: range };
            self.tile(simd, gemm, &tile, coverage, (panel, skip), rows, &mut pieces.block);
        }
        self.sum_visible(simd, gemm, &block, &visible[..panels], pieces);
    }

    /// Adds to the gradients of keys and values. Keys that the same panels look at are multiplied together.
    #[inline(always)]
    fn sum_visible<S: Simd>(
        &self,
        simd: S,
        gemm: Gemm,
        block: &Range<usize>,
        visible: &[Range<usize>],
        pieces: &mut Pieces<R>,
    ) {
        let panels_of = |key: usize| {
            let sees = |panel: &usize| visible[*panel].contains(&key);
            let first = (0..visible.len()).find(sees);
            first.map(|first| first..(0..visible.len()).rfind(sees).unwrap_or(first) + 1)
        };
        let mut start = 0;
        while start < block.len() {
            let panels = panels_of(start);
            let end = (start + 1..block.len()).find(|&key| panels_of(key) != panels).unwrap_or(block.len());
            if let Some(panels) = panels {
                self.add_grad_keys_and_values(simd, gemm, block.start + start, start..end, panels, pieces);
            }
            start = end;
        }
    }

    /// Zeros the weights and gradients of scores that a panel doesn't compute, but that lie between those that it does.
    #[inline(always)]
    fn zero_outside(
        &self,
        operands: usize,
        panel: usize,
        visible: &Range<usize>,
        keys: usize,
        block: &mut BlockPieces<R>,
    ) {
        let panels = self.tiles.panels;
        for key in (0..keys).filter(|key| !visible.contains(key)) {
            let lanes = (key * panels + panel) * operands..(key * panels + panel + 1) * operands;
            block.weights[lanes.clone()].fill(R::ZERO);
            block.grad_scores[lanes].fill(R::ZERO);
        }
    }

    /// Weights, gradients of scores, and the share of the tile's keys in the gradients of a panel's queries. The tile is that of
    /// panel `panel` and of the keys from `first_key` of the block on.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one more than clippy's seven
    fn tile<S: Simd>(
        &mut self,
        simd: S,
        gemm: Gemm,
        tile: &Tile,
        coverage: Coverage,
        (panel, first_key): (usize, usize),
        rows: TileRows<R>,
        block: &mut BlockPieces<R>,
    ) {
        let (operands, width, count) = (self.operands, panel_width::<R, S>(), tile.keys.len());
        let (d, dv) = (operands.dim, operands.value_dim);
        let (row, stride) = (gemm.operands(width), self.tiles.panels * gemm.operands(width));
        let first = first_key * stride + panel * row;
        let packed_weights = MatrixMut::new(&mut block.weights[first..], count, row, stride);
        let packed_grads = MatrixMut::new(&mut block.grad_scores[first..], count, row, stride);
        // Numbers that will be pairs are computed elsewhere.
        let (mut weights, mut grads, pairs) = match gemm.sum_in_pairs() {
            Some(bf16) => (
                MatrixMut::new(block.tile_weights, count, width, width),
                MatrixMut::new(block.tile_grads, count, width, width),
                Some((bf16.dot(), packed_weights, packed_grads)),
            ),
            None => (packed_weights, packed_grads, None),
        };
        let lanes = panel * width..(panel + 1) * width;
        let queries = &block.query_rows[lanes.start * pad(d)..];
        let panels = TilePanels {
            queries: &block.queries[panel * gemm.panel_rows(d) * width..],
            decode: self
                .is_decoded
                .then(|| (Matrix::new(queries, tile.queries, pad(d), pad(d)), &mut *block.decoded_scores)),
            grads: &block.grads[panel * gemm.of_gradients().panel_rows(dv) * width..],
            rows: RowStatistics {
                largest: &block.largest[lanes.clone()],
                log_total: &block.log_total[lanes.clone()],
                delta: &block.delta[lanes],
            },
            tanhs: operands.softcap.map(|_| MatrixMut::new(block.tanhs, count, width, width)),
            factors: operands.dropout.map(|_| MatrixMut::new(block.factors, count, width, width)),
        };
        self.weights_and_grads(simd, gemm, tile, coverage, &rows, panels, (&mut weights, &mut grads));
        if let Some((dot, packed_weights, packed_grads)) = pairs {
            dot.narrow_along(weights.as_ref().cast(), packed_weights.cast());
            dot.narrow_along(grads.as_ref().cast(), packed_grads.cast());
        }

        // dq = scale · ds·k, where the scale is left to the end
        let one = [R::splat(simd, R::ONE); VECTORS];
        let grad_queries = &mut block.grad_queries[panel * d * width..];
        for start in (0..count).step_by(self.tiles.longest_sum) {
            let count = self.tiles.longest_sum.min(count - start);
            let keys = rows.keys_to_sum.skip(start);
            gemm.accumulate::<R, S>(simd, grad_queries, one, keys, grads.part(start, count));
        }
    }

    /// The weights of a tile and the gradients of its scores, and their share in the gradient of the bias.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one more than clippy's seven
    fn weights_and_grads<S: Simd>(
        &mut self,
        simd: S,
        gemm: Gemm,
        tile: &Tile,
        coverage: Coverage,
        rows: &TileRows<R>,
        mut panels: TilePanels<R>,
        (weights, grads): (&mut MatrixMut<R>, &mut MatrixMut<R>),
    ) {
        let operands = self.operands;
        let mut unused = [R::splat(simd, R::ZERO); VECTORS];

        // s = scale · q·kᵀ
        let scale = R::from_f64(operands.scale);
        match (panels.decode, rows.keys) {
            (Some((queries, scores)), DotRows::Floats(keys)) => {
                decoded_scores(simd, keys, queries, scores, weights.reborrow());
            }
            (_, keys) => {
                gemm.dot_products::<R, S, false>(simd, scale, panels.queries, keys, weights.reborrow(), &mut unused);
            }
        }
        let tanhs = panels.tanhs.as_mut().map(MatrixMut::reborrow);
        tile.modify(simd, operands, coverage, self.careful.is_some(), weights.reborrow(), tanhs);

        // dp = do·vᵀ
        let (of_gradients, grads_of) = (gemm.of_gradients(), grads.reborrow());
        of_gradients.dot_products::<R, S, false>(simd, R::ONE, panels.grads, rows.values, grads_of, &mut unused);

        // p = exp(s - lse), ds = p ∘ (drop ∘ dp - δ)
        if let Some(factors) = &mut panels.factors {
            tile.dropout_factors(simd, operands, factors.reborrow());
        }
        let factors = panels.factors.as_ref().map(MatrixMut::as_ref);
        if self.careful.is_some() {
            weights_and_gradients::<R, S, true>(simd, panels.rows, weights.reborrow(), grads.reborrow(), factors);
            tile.zero_hidden(operands, coverage, weights.reborrow());
            tile.zero_hidden(operands, coverage, grads.reborrow());
        } else {
            weights_and_gradients::<R, S, false>(simd, panels.rows, weights.reborrow(), grads.reborrow(), factors);
        }
        if let Some(bias) = &mut self.gradients.bias {
            bias.add(simd, tile, grads.as_ref());
        }
        match (&panels.tanhs, self.careful) {
            (Some(tanhs), None) => softcap_gradient::<R, S, false>(simd, tanhs.as_ref(), grads.reborrow()),
            (Some(tanhs), Some(_)) => softcap_gradient::<R, S, true>(simd, tanhs.as_ref(), grads.reborrow()),
            (None, _) => {}
        }
        if let Some(headroom) = self.careful {
            let factor = times_power_of_two(R::ONE, -headroom.scores);
            (0..grads.rows()).for_each(|j| grads.row(j).iter_mut().for_each(|grad| *grad *= factor));
        }
    }

    /// What the numbers have been made smaller by.
    #[inline(always)]
    pub(super) fn headroom(&self) -> Headroom {
        self.careful.unwrap_or_default()
    }
}

/// The scores \[key\]\[W\] as [`decode`](crate::decode) computes them, from rows of queries. `scratch` has room for them.
#[inline(always)]
fn decoded_scores<R: SimdFloat, S: Simd>(
    simd: S,
    keys: Matrix<R>,
    queries: Matrix<R>,
    scratch: &mut [R],
    mut scores: MatrixMut<R>,
) {
    let (count, rows) = (keys.rows(), queries.rows());
    decode_dot_products(simd, keys, queries, MatrixMut::new(scratch, rows, count, count));
    for j in 0..count {
        let row = scores.row(j);
        row.fill(R::ZERO);
        row.iter_mut().take(rows).enumerate().for_each(|(i, score)| *score = scratch[i * count + j]);
    }
}
