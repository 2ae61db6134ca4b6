//! A tile of the backward pass: its weights, the gradients of its scores, and what its keys add to the gradients of the queries.

use pulp::Simd;
use pulp::bytemuck::cast_slice_mut;

use super::backward::Backward;
use super::backward_pieces::BlockPieces;
use crate::careful::times_power_of_two;
use crate::decode::microkernel::dot_products as decode_dot_products;
use crate::gemm::microkernel::{VECTORS, pad, panel_row, panel_width};
use crate::gemm::{DotRows, Gemm, SumRows};
use crate::mask::Coverage;
use crate::matrix::{Matrix, MatrixMut};
use crate::operands::Operands;
use crate::score_mods::{Tile, softcap_gradient};
use crate::simd::{MAX_LANES, SimdFloat};
use crate::softmax::{self, RowStatistics, shift_and_scale, weights_and_gradients};

/// The rows of a tile's keys.
pub(super) struct TileRows<'m, R> {
    pub(super) keys: DotRows<'m, R>,
    pub(super) keys_to_sum: SumRows<'m, R>,
    pub(super) values: DotRows<'m, R>,
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

impl<R: SimdFloat> Backward<'_, R> {
    /// Weights, gradients of scores, and the share of the tile's keys in the gradients of a panel's queries. The tile is that of
    /// panel `panel` and of the keys from `first_key` of the block on.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one more than clippy's seven
    pub(super) fn tile<S: Simd>(
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
        let (mut weights, mut grads, mut pairs) = match gemm.sum_in_pairs() {
            Some(bf16) => (
                MatrixMut::new(block.tile_weights, count, width, width),
                MatrixMut::new(block.tile_grads, count, width, width),
                Some((bf16.dot(), packed_weights, packed_grads)),
            ),
            None => (packed_weights, packed_grads, None),
        };
        let lanes = panel * width..(panel + 1) * width;
        let queries = &block.query_rows[lanes.start * pad(d)..];
        let mut panels = TilePanels {
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
        self.scores_and_dp(simd, gemm, tile, coverage, &rows, &mut panels, [&mut weights, &mut grads]);
        let grad_queries = &mut block.grad_queries[panel * d * width..];
        if let (Some(tiles), true, Some((dot, packed_weights, packed_grads))) =
            (gemm.sum_by_tiles(), self.has_plain_gradients(), &mut pairs)
        {
            // As below, in one pass.
            let SumRows::Tiles(keys) = rows.keys_to_sum else { unreachable!("rows and sums of the same kind") };
            let grads = softmax::bf16::weights_and_gradients(
                *dot,
                panels.rows.cast(),
                gemm.factors(operands).1.to_f64() as f32,
                weights.as_ref().cast(),
                grads.cast(),
                packed_weights.reborrow().cast(),
                packed_grads.reborrow().cast(),
            );
            let one = [f32::splat(simd, 1.0); VECTORS];
            return tiles.accumulate(simd, cast_slice_mut(grad_queries), one, keys, grads.as_ref());
        }
        self.weights_and_grads(simd, gemm, tile, coverage, panels, [&mut weights, &mut grads]);
        if let Some((dot, packed_weights, packed_grads)) = pairs {
            dot.narrow_along(weights.as_ref().cast(), packed_weights.cast());
            dot.narrow_along(grads.as_ref().cast(), packed_grads.cast());
        }

        // dq = scale · ds·k, where the scale is left to the end
        let one = [R::splat(simd, R::ONE); VECTORS];
        for start in (0..count).step_by(self.tiles.longest_sum) {
            let count = self.tiles.longest_sum.min(count - start);
            let keys = rows.keys_to_sum.skip(start);
            gemm.accumulate::<R, S>(simd, grad_queries, one, keys, grads.part(start, count));
        }
    }

    /// Whether nothing but the softmax lies between weights and gradients of scores, and nobody else wants them.
    #[inline(always)]
    fn has_plain_gradients(&self) -> bool {
        let Operands { softcap, dropout, .. } = self.operands;
        softcap.is_none() && dropout.is_none() && self.gradients.bias.is_none()
    }

    /// The scores of a tile, and dp.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one more than clippy's seven
    fn scores_and_dp<S: Simd>(
        &self,
        simd: S,
        gemm: Gemm,
        tile: &Tile,
        coverage: Coverage,
        rows: &TileRows<R>,
        panels: &mut TilePanels<R>,
        [weights, grads]: [&mut MatrixMut<R>; 2],
    ) {
        let operands = self.operands;
        let mut unused = [R::splat(simd, R::ZERO); VECTORS];

        // s = scale · q·kᵀ
        let (scale, _) = gemm.factors(operands);
        match (&mut panels.decode, rows.keys) {
            (Some((queries, scores)), DotRows::Floats(keys)) => {
                decoded_scores(simd, keys, *queries, scores, weights.reborrow());
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
    }

    /// The weights of a tile take the place of its scores, and the gradients of the scores that of dp. Adds their share to the gradient
    /// of the bias.
    #[inline(always)]
    fn weights_and_grads<S: Simd>(
        &mut self,
        simd: S,
        gemm: Gemm,
        tile: &Tile,
        coverage: Coverage,
        mut panels: TilePanels<R>,
        [weights, grads]: [&mut MatrixMut<R>; 2],
    ) {
        let (operands, zeros) = (self.operands, [R::ZERO; VECTORS * MAX_LANES]);
        let (mut rows, (_, of_scores)) = (panels.rows, gemm.factors(operands));
        if of_scores != R::ONE {
            shift_and_scale(simd, weights.reborrow(), panel_row::<R, S>(rows.largest), of_scores);
            rows.largest = &zeros;
        }

        // p = exp(s - lse), ds = p ∘ (drop ∘ dp - δ)
        if let Some(factors) = &mut panels.factors {
            tile.dropout_factors(simd, operands, factors.reborrow());
        }
        let factors = panels.factors.as_ref().map(MatrixMut::as_ref);
        if self.careful.is_some() {
            weights_and_gradients::<R, S, true>(simd, rows, weights.reborrow(), grads.reborrow(), factors);
            tile.zero_hidden(operands, coverage, weights.reborrow());
            tile.zero_hidden(operands, coverage, grads.reborrow());
        } else {
            weights_and_gradients::<R, S, false>(simd, rows, weights.reborrow(), grads.reborrow(), factors);
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
