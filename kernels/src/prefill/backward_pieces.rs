//! The memory that a task of the backward pass keeps.

use crate::error::Error;
use crate::gemm::Gemm;
use crate::gemm::microkernel::pad;
use crate::operands::Operands;
use crate::scratch::{Scratch, pieces};
use crate::simd::SimdFloat;
use crate::tiles::BackwardTiles;

/// What a task keeps.
pub(super) struct Pieces<'s, R> {
    pub(super) block: BlockPieces<'s, R>,
    /// The keys of a block, widened.
    pub(super) keys: &'s mut [R],
    /// The keys of a block to sum over, if those to multiply with a panel are pairs.
    pub(super) keys_to_sum: &'s mut [R],
    /// The values of a block, widened.
    pub(super) values: &'s mut [R],
    /// A row of pad(d) for each key of the task: the sum so far.
    pub(super) grad_keys: &'s mut [R],
    /// A row of pad(value_dim) for each key of the task.
    pub(super) grad_values: &'s mut [R],
}

/// What a task keeps for a block of queries.
pub(super) struct BlockPieces<'s, R> {
    /// \[panel_rows(d)\]\[W\] for each panel.
    pub(super) queries: &'s mut [R],
    /// \[panel_rows(value_dim)\]\[W\] for each panel.
    pub(super) grads: &'s mut [R],
    /// \[d\]\[W\] for each panel.
    pub(super) grad_queries: &'s mut [R],
    /// A row of pad(d) for each query, times the scale, or for each pair of queries.
    pub(super) query_rows: &'s mut [R],
    /// A row of pad(value_dim) for each query or pair of them.
    pub(super) grad_rows: &'s mut [R],
    /// \[key\]\[panels · operands(W)\]
    pub(super) weights: &'s mut [R],
    /// \[key\]\[panels · operands(W)\]
    pub(super) grad_scores: &'s mut [R],
    /// \[key\]\[W\]: numbers, before they become pairs.
    pub(super) tile_weights: &'s mut [R],
    /// \[key\]\[W\]
    pub(super) tile_grads: &'s mut [R],
    /// \[query\]\[key\]: scores, before they are transposed.
    pub(super) decoded_scores: &'s mut [R],
    /// \[key\]\[W\], with a softcap.
    pub(super) tanhs: &'s mut [R],
    /// \[key\]\[W\], with dropout.
    pub(super) factors: &'s mut [R],
    /// \[W\] for each panel, as the two below.
    pub(super) largest: &'s mut [R],
    /// \[W\] for each panel.
    pub(super) log_total: &'s mut [R],
    /// \[W\] for each panel.
    pub(super) delta: &'s mut [R],
}

impl<'s, R: SimdFloat> Pieces<'s, R> {
    /// Memory for a task of `key_count` keys, and blocks of queries in panels of `width`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // what its sizes depend on
    pub(super) fn new(
        operands: &Operands<R>,
        BackwardTiles { panels, keys: count, .. }: BackwardTiles,
        key_count: usize,
        gemm: Gemm,
        width: usize,
        is_decoded: bool,
        scratch: &'s mut Option<Scratch>,
    ) -> Result<Self, Error> {
        let (d, dv, block) = (operands.dim, operands.value_dim, panels * width);
        let if_wanted = |wanted: bool| if wanted { count * width } else { 0 };
        let (dot_in_pairs, sum_in_pairs) = (gemm.dot_in_pairs().is_some(), gemm.sum_in_pairs().is_some());
        pieces!(
            scratch, R:
            queries: d.max(gemm.panel_rows(d)) * block,
            grads: dv.max(gemm.panel_rows(dv)) * block,
            grad_queries: d.max(gemm.panel_rows(d)) * block,
            query_rows: pad(d) * block,
            grad_rows: pad(dv) * block,
            weights: count * block,
            grad_scores: count * block,
            tile_weights: if_wanted(sum_in_pairs),
            tile_grads: if_wanted(sum_in_pairs),
            decoded_scores: if_wanted(is_decoded),
            tanhs: if_wanted(operands.softcap.is_some()),
            factors: if_wanted(operands.dropout.is_some()),
            keys: gemm.dot_size(count, pad(d)),
            keys_to_sum: if dot_in_pairs { gemm.sum_size(count, d) } else { 0 },
            values: gemm.dot_size(count, dv),
            grad_keys: pad(d) * key_count,
            grad_values: pad(dv) * key_count,
            largest: block,
            log_total: block,
            delta: block,
        );
        let block = BlockPieces {
            queries,
            grads,
            grad_queries,
            query_rows,
            grad_rows,
            weights,
            grad_scores,
            tile_weights,
            tile_grads,
            decoded_scores,
            tanhs,
            factors,
            largest,
            log_total,
            delta,
        };
        Ok(Self { block, keys, keys_to_sum, values, grad_keys, grad_values })
    }
}
