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
use super::backward_tile::TileRows;
use super::gradients::{Gradients, QueryRow};
use crate::careful::{Headroom, times_power_of_two};
use crate::dtype::Source;
use crate::error::Error;
use crate::gemm::microkernel::panel_width;
use crate::gemm::{DotRows, Gemm, SumRows};
use crate::operands::Operands;
use crate::score_mods::Tile;
use crate::simd::SimdFloat;
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
        let (_, factor) = gemm.factors(operands);
        let missing = QueryRow { largest: R::INFINITY, factor, log_total: R::ZERO, delta: R::ZERO };
        for i in 0..block.delta.len() {
            let row = rows.get(i).copied().unwrap_or(missing);
            // The greatest score may be that of another part, in which the softmax was left another factor.
            let largest = if row.factor == factor { row.largest } else { row.largest * (row.factor / factor) };
            (block.largest[i], block.log_total[i], block.delta[i]) = (largest, row.log_total, row.delta);
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

    /// What the numbers have been made smaller by.
    #[inline(always)]
    pub(super) fn headroom(&self) -> Headroom {
        self.careful.unwrap_or_default()
    }
}
