//! A few queries against many keys, as when text is generated token by token.
//!
//! Such a call waits for memory, so each key and value is read once, in the order in which they stand, for all the query
//! heads that share it. The lanes are entries of a key: lanes of queries would be empty. Long caches are cut into splits
//! that are computed side by side and merged by their log-sum-exp.
//!
//! Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023).

pub(crate) mod microkernel;

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::alloc::copy_of;
use crate::careful::{exponent_above, keep_finite, quotient, times_power_of_two};
use crate::decode::microkernel::{add_values, dot_products};
use crate::error::Error;
use crate::gemm::microkernel::pad;
use crate::gemm::nan_safe::{add_rows, all_finite};
use crate::mask::Coverage;
use crate::matrix::{Matrix, MatrixMut};
use crate::operands::Operands;
use crate::score_mods::Tile;
use crate::scratch::{Scratch, pieces};
use crate::simd::SimdFloat;
use crate::softmax::{Partial, inverse_of_total, online_update_of_row};
use crate::tiles::DecodeTiles;

/// A task: a split of the keys of one key head. Its *rows* are the queries of the query heads that share it, head by head.
pub(crate) struct Decode<'a, R> {
    pub(crate) operands: &'a Operands<'a, R>,
    pub(crate) tiles: DecodeTiles,
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) keys: Range<usize>,
    /// A [`Partial`] for each row, one behind the other.
    pub(crate) partials: &'a mut [R],
}

/// What a task keeps.
struct Pieces<'s, R> {
    /// \[row\]\[pad(d)\]
    queries: &'s mut [R],
    /// \[row\]\[pad(value_dim)\]: weighted sums of values, at the end divided by the total.
    sums: &'s mut [R],
    /// \[row\]\[pad(value_dim)\]: the sums of a block.
    block_sums: &'s mut [R],
    /// \[row\]\[keys of a block\]: scores, then weights.
    weights: &'s mut [R],
    /// \[key\]\[q_len\], for what is done to the scores of one head.
    scores: &'s mut [R],
    /// \[row\]
    largest: &'s mut [R],
    /// \[row\]
    total: &'s mut [R],
    /// \[row\]: what was summed before a block is multiplied by.
    factors: &'s mut [R],
    /// The keys of a block, widened.
    keys: &'s mut [R],
    /// The values of a block, widened.
    values: &'s mut [R],
}

impl<R: SimdFloat> WithSimd for Decode<'_, R> {
    type Output = Result<(), Error>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Result<(), Error> {
        let operands = self.operands;
        let (d, dv, q_len) = (operands.dim, operands.value_dim, operands.shape.q_len);
        let (rows, block) = (operands.group * q_len, self.tiles.keys);
        let mut scratch = None;
        pieces!(
            scratch, R:
            queries: pad(d) * rows,
            sums: pad(dv) * rows,
            block_sums: pad(dv) * rows,
            weights: block * rows,
            scores: block * q_len,
            largest: rows,
            total: rows,
            factors: rows,
            keys: block * d,
            values: block * dv,
        );
        let mut pieces = Pieces { queries, sums, block_sums, weights, scores, largest, total, factors, keys, values };
        self.over_keys(simd, None, &mut pieces);
        self.divide(0, &mut pieces);
        if self.must_repeat(&pieces) {
            self.carefully(simd, &mut pieces)?;
        }
        self.write(&pieces);
        Ok(())
    }
}

impl<R: SimdFloat> Decode<'_, R> {
    /// The careful pass, whose results take the place of those that are not finite.
    #[inline(always)]
    fn carefully<S: Simd>(&self, simd: S, pieces: &mut Pieces<R>) -> Result<(), Error> {
        let fast = copy_of("sums of a task", pieces.sums)?;
        let kept = self.operands.dropout.map_or(1.0, |dropout| 1.0 - dropout.p);
        let exponent = exponent_above(self.keys.len() as f64 / kept) + 1;
        self.over_keys(simd, Some(times_power_of_two(R::ONE, -exponent)), pieces);
        self.divide(exponent, pieces);
        keep_finite(&fast, pieces.sums, R::is_finite);
        Ok(())
    }

    /// `shrink`: what the weights are multiplied by in the careful pass, so that no sum over them overflows.
    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, shrink: Option<R>, pieces: &mut Pieces<R>) {
        self.start(pieces);
        for start in self.keys.clone().step_by(self.tiles.keys) {
            self.block(simd, start..(start + self.tiles.keys).min(self.keys.end), shrink, pieces);
        }
    }

    /// Query head `head` of those that share the key head.
    #[inline(always)]
    fn at(&self, head: usize) -> (usize, usize) {
        (self.sequence, self.kv_head * self.operands.group + head)
    }

    /// Rows of queries, multiplied by the scale, and sums of zero.
    #[inline(always)]
    fn start(&self, pieces: &mut Pieces<R>) {
        let operands = self.operands;
        let (d, q_len) = (operands.dim, operands.shape.q_len);
        let scale = R::from_f64(operands.scale);
        for (head, to) in pieces.queries.chunks_exact_mut(pad(d) * q_len).enumerate() {
            let from = operands.q.rows(self.at(head), 0..q_len, pieces.keys);
            for (query, to) in to.chunks_exact_mut(pad(d)).enumerate() {
                to[d..].fill(R::ZERO);
                to.iter_mut().zip(from.row(query)).for_each(|(to, x)| *to = *x * scale);
            }
        }
        pieces.sums.fill(R::ZERO);
        pieces.largest.fill(R::LOWEST);
        pieces.total.fill(R::ZERO);
    }

    /// The keys of a block that any head looks at.
    #[inline(always)]
    fn visible(&self, block: Range<usize>) -> Range<usize> {
        let queries = 0..self.operands.shape.q_len;
        let mut all = block.end..block.start;
        for head in 0..self.operands.group {
            let (visible, _) = self.operands.visible(self.at(head), &queries, block.clone());
            if !visible.is_empty() {
                all = all.start.min(visible.start)..all.end.max(visible.end);
            }
        }
        all
    }

    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, block: Range<usize>, shrink: Option<R>, pieces: &mut Pieces<R>) {
        let block = self.visible(block);
        if block.is_empty() {
            return;
        }
        let operands = self.operands;
        let (d, dv, q_len, count) = (operands.dim, operands.value_dim, operands.shape.q_len, block.len());
        let (rows, stride) = (operands.group * q_len, self.tiles.keys);
        let kv_at = (self.sequence, self.kv_head);
        let keys = operands.k.rows(kv_at, block.clone(), pieces.keys);
        let queries = Matrix::new(pieces.queries, rows, pad(d), pad(d));
        dot_products::<R, S>(simd, keys, queries, MatrixMut::new(pieces.weights, rows, count, stride));
        let tile = |head| Tile { at: self.at(head), first_query: 0, queries: q_len, keys: block.clone() };
        for head in 0..operands.group {
            self.modify(simd, &tile(head), head, shrink.is_some(), pieces);
        }
        for row in 0..rows {
            self.update_row(simd, row, count, shrink.is_some(), pieces);
        }
        if operands.dropout.is_some() {
            for head in 0..operands.group {
                self.drop_out(simd, &tile(head), head, pieces);
            }
        }
        if let Some(shrink) = shrink {
            pieces.weights.iter_mut().for_each(|weight| *weight *= shrink);
        }
        let values = operands.v.rows(kv_at, block.clone(), pieces.values);
        let weights = Matrix::new(pieces.weights, rows, count, stride);
        // A block is summed on its own before it is added: a long sum would lose more to rounding.
        pieces.block_sums.fill(R::ZERO);
        let mut sums = MatrixMut::new(pieces.block_sums, rows, pad(dv), pad(dv));
        if shrink.is_some() && operands.hides() {
            for row in 0..rows {
                add_rows(simd, &mut sums.row(row)[..dv], weights.row(row), values);
            }
        } else {
            add_values::<R, S>(simd, values, weights, sums);
        }
        let rows = pieces.sums.chunks_exact_mut(pad(dv)).zip(pieces.block_sums.chunks_exact(pad(dv)));
        for ((sums, of_block), &factor) in rows.zip(&*pieces.factors) {
            sums.iter_mut().zip(of_block).for_each(|(sum, of_block)| *sum = *sum * factor + *of_block);
        }
    }

    /// Softcap, bias, ALiBi and mask of one head, whose scores are turned to \[key\]\[query\] for it.
    #[inline(always)]
    fn modify<S: Simd>(&self, simd: S, tile: &Tile, head: usize, is_careful: bool, pieces: &mut Pieces<R>) {
        let (operands, stride) = (self.operands, self.tiles.keys);
        let (queries, count) = (tile.queries, tile.keys.len());
        let coverage = operands.coverage(tile.at, &(0..queries), &tile.keys);
        // Keys that this head may not attend to at all are hidden here as well: other heads may look at them.
        let coverage = if coverage == Coverage::All { coverage } else { Coverage::Some };
        if !operands.modifies(coverage) {
            return;
        }
        let weights = &mut pieces.weights[head * queries * stride..][..queries * stride];
        for (j, scores) in pieces.scores.chunks_exact_mut(queries).enumerate().take(count) {
            scores.iter_mut().enumerate().for_each(|(i, score)| *score = weights[i * stride + j]);
        }
        let scores = MatrixMut::new(pieces.scores, count, queries, queries);
        tile.modify(simd, operands, coverage, is_careful, scores, None);
        for (j, scores) in pieces.scores.chunks_exact(queries).enumerate().take(count) {
            scores.iter().enumerate().for_each(|(i, score)| weights[i * stride + j] = *score);
        }
    }

    #[inline(always)]
    fn drop_out<S: Simd>(&self, simd: S, tile: &Tile, head: usize, pieces: &mut Pieces<R>) {
        let (stride, queries, count) = (self.tiles.keys, tile.queries, tile.keys.len());
        tile.dropout_factors(simd, self.operands, MatrixMut::new(pieces.scores, count, queries, queries));
        let weights = &mut pieces.weights[head * queries * stride..][..queries * stride];
        for (j, factors) in pieces.scores.chunks_exact(queries).enumerate().take(count) {
            factors.iter().enumerate().for_each(|(i, factor)| weights[i * stride + j] *= *factor);
        }
    }

    /// Turns a row's scores into exponentials.
    #[inline(always)]
    fn update_row<S: Simd>(&self, simd: S, row: usize, count: usize, is_careful: bool, pieces: &mut Pieces<R>) {
        // The length of a block is a multiple of the lanes.
        let scores = &mut pieces.weights[row * self.tiles.keys..][..self.tiles.keys];
        let (largest, total) = (&mut pieces.largest[row], &mut pieces.total[row]);
        pieces.factors[row] = if is_careful {
            online_update_of_row::<R, S, true>(simd, scores, count, largest, total)
        } else {
            online_update_of_row::<R, S, false>(simd, scores, count, largest, total)
        };
    }

    /// Divides the sums by the totals and multiplies them by 2^exponent, which is not zero in the careful pass.
    #[inline(always)]
    fn divide(&self, exponent: i32, pieces: &mut Pieces<R>) {
        let is_mean = self.operands.dropout.is_none();
        let rows = pieces.sums.chunks_exact_mut(pad(self.operands.value_dim));
        for (sums, &total) in rows.zip(&*pieces.total) {
            let inverse = times_power_of_two(inverse_of_total(total), exponent);
            if exponent == 0 {
                sums.iter_mut().for_each(|sum| *sum *= inverse);
            } else {
                sums.iter_mut().for_each(|sum| *sum = quotient(*sum, inverse, is_mean));
            }
        }
    }

    /// Whether the careful pass can make a result finite that isn't.
    #[inline(always)]
    fn must_repeat(&self, pieces: &Pieces<R>) -> bool {
        if all_finite(pieces.sums) || self.operands.hides() {
            return !all_finite(pieces.sums);
        }
        // Where nothing is hidden, a log-sum-exp that isn't finite stays so, and so does the row's context.
        let rows = pieces.sums.chunks_exact(pad(self.operands.value_dim)).zip(&*pieces.total);
        rows.into_iter().any(|(sums, total)| total.is_finite() && !all_finite(sums))
    }

    #[inline(always)]
    fn write(&mut self, pieces: &Pieces<R>) {
        let dv = self.operands.value_dim;
        let partials = self.partials.chunks_exact_mut(Partial::<R>::size(dv));
        for (row, (to, sums)) in partials.zip(pieces.sums.chunks_exact(pad(dv))).enumerate() {
            Partial::write(to, pieces.largest[row], pieces.total[row], &sums[..dv]);
        }
    }
}
