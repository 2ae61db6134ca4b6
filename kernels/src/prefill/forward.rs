//! The forward pass: online softmax over blocks of keys.
//!
//! Source: Dao, "FlashAttention-2" (2023), algorithm 1.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::bytemuck::{cast_slice, cast_slice_mut};
use pulp::{Simd, WithSimd};

use crate::alloc::copy_of;
use crate::careful::{exponent_above, keep_finite, quotient, times_power_of_two};
use crate::dtype::Sink;
use crate::error::Error;
use crate::gemm::bf16_tiles::Bf16Tiles;
use crate::gemm::microkernel::{Row, VECTORS, panel_row, panel_row_mut, panel_width};
use crate::gemm::nan_safe::all_finite;
use crate::gemm::pack::unpack;
use crate::gemm::{DotRows, Gemm, SumRows};
use crate::mask::Coverage;
use crate::matrix::MatrixMut;
use crate::operands::Operands;
use crate::score_mods::Tile;
use crate::scratch::{Scratch, pieces};
use crate::simd::{MAX_LANES, SimdFloat};
use crate::softmax::{self, LogSumExp, inverse_of_total, maxima, online_update, shift_and_scale};
use crate::tiles::ForwardTiles;

/// A task: the queries `queries` of one head.
pub(crate) struct Forward<'a, R> {
    pub(crate) operands: &'a Operands<'a, R>,
    pub(crate) tiles: ForwardTiles,
    /// Sequence and head.
    pub(crate) at: (usize, usize),
    pub(crate) queries: Range<usize>,
    /// A row of value_dim for each query.
    pub(crate) context: &'a mut dyn Sink<R>,
    /// One for each query.
    pub(crate) logsumexp: &'a mut [MaybeUninit<LogSumExp<R>>],
}

/// How a task computes.
#[derive(Clone, Copy)]
struct Way<'t, R> {
    gemm: Gemm<'t>,
    /// What the weights are multiplied by in the careful pass, so that no sum over them overflows.
    shrink: Option<R>,
}

/// What a task keeps for its panels, each piece panel after panel.
struct Panels<'s, R> {
    /// \[panel_rows(d)\]\[W\]
    queries: &'s mut [R],
    /// \[value_dim\]\[W\]: weighted sums of values, at the end divided by the total
    sums: &'s mut [R],
    /// \[W\]: the greatest score so far
    largest: &'s mut [R],
    /// \[W\]: the sum of exponentials so far
    total: &'s mut [R],
    /// \[W\]: what the sums are multiplied by at the end
    inverse: &'s mut [R],
    /// As `sums`, `largest` and `total`, of all parts of many keys so far
    parts: [&'s mut [R]; 3],
    tile: TilePieces<'s, R>,
    /// The keys of a block, widened
    keys: &'s mut [R],
    /// The values of a block, widened or interleaved
    values: &'s mut [R],
}

impl<R: SimdFloat> Panels<'_, R> {
    /// Sums of no keys.
    fn start(&mut self) {
        self.sums.fill(R::ZERO);
        self.largest.fill(R::LOWEST);
        self.total.fill(R::ZERO);
    }

    /// Adds the sums of a part of the keys to those of the parts before it, and starts another: a long sum would lose more to
    /// rounding.
    #[inline(always)]
    fn add_part(&mut self, width: usize, value_dim: usize, of_scores: R) {
        let of_scores = of_scores.to_f64();
        let [sums, largest, total] = &mut self.parts;
        let mut factors = [(R::ZERO, R::ZERO); VECTORS * MAX_LANES];
        for panel in 0..largest.len() / width {
            for (lane, factors) in factors.iter_mut().enumerate().take(width) {
                let i = panel * width + lane;
                let (before, of_part) = (largest[i].to_f64(), self.largest[i].to_f64());
                // NaN is in the totals, and not in the greatest scores.
                let now = before.max(of_part);
                let factor = |largest: f64| R::from_f64((of_scores * (largest - now)).exp());
                *factors = (factor(before), factor(of_part));
                largest[i] = R::from_f64(now);
                total[i] = total[i] * factors.0 + self.total[i] * factors.1;
            }
            let rows = panel * width * value_dim..(panel + 1) * width * value_dim;
            let of_part = self.sums[rows.clone()].chunks_exact(width);
            for (sums, of_part) in sums[rows].chunks_exact_mut(width).zip(of_part) {
                for ((sum, x), factors) in sums.iter_mut().zip(of_part).zip(&factors) {
                    *sum = *sum * factors.0 + *x * factors.1;
                }
            }
        }
        self.start();
    }
}

/// What a task keeps for one tile.
struct TilePieces<'s, R> {
    /// \[key\]\[W\]
    scores: &'s mut [R],
    /// \[key\]\[W\], with dropout
    factors: &'s mut [R],
}

/// One panel of [`Panels`].
struct Panel<'s, R> {
    queries: &'s [R],
    sums: &'s mut [R],
    largest: &'s mut [R],
    total: &'s mut [R],
}

impl<R: SimdFloat> WithSimd for Forward<'_, R> {
    type Output = Result<(), Error>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Result<(), Error> {
        let width = panel_width::<R, S>();
        let count = self.queries.len().div_ceil(width);
        let (d, dv, keys) = (self.operands.dim, self.operands.value_dim, self.tiles.keys);
        let mut registers = None;
        let gemm = Gemm::new::<S>(self.operands.is_bf16, d, dv, &mut registers);
        let mut scratch = None;
        pieces!(
            scratch, R:
            queries: gemm.panel_rows(d) * width * count,
            sums: dv * width * count,
            largest: width * count,
            total: width * count,
            inverse: width * count,
            part_sums: if self.has_parts() { dv * width * count } else { 0 },
            part_largest: if self.has_parts() { width * count } else { 0 },
            part_total: if self.has_parts() { width * count } else { 0 },
            scores: keys * width,
            factors: if self.operands.dropout.is_some() { keys * width } else { 0 },
            keys: gemm.dot_size(keys, d),
            values: gemm.sum_size(keys, dv),
        );
        let tile = TilePieces { scores, factors };
        let parts = [part_sums, part_largest, part_total];
        let mut panels = Panels { queries, sums, largest, total, inverse, parts, tile, keys, values };
        self.over_keys(simd, Way { gemm, shrink: None }, &mut panels);
        self.divide::<S>(0, &mut panels);
        if self.must_repeat::<S>(&panels) {
            self.carefully(simd, gemm, &mut panels)?;
        }
        let (_, of_scores) = gemm.factors(self.operands);
        self.write(simd, of_scores, &mut panels);
        Ok(())
    }
}

impl<R: SimdFloat> Forward<'_, R> {
    /// The careful pass, whose results take the place of those that are not finite.
    #[inline(always)]
    fn carefully<S: Simd>(&mut self, simd: S, gemm: Gemm, panels: &mut Panels<R>) -> Result<(), Error> {
        let fast = copy_of("sums of a task", panels.sums)?;
        let operands = self.operands;
        let kept = operands.dropout.map_or(1.0, |dropout| 1.0 - dropout.p);
        let exponent = exponent_above(operands.shape.kv_len as f64 / kept) + 1;
        let gemm = if operands.hides() { gemm.nan_safe() } else { gemm };
        self.over_keys(simd, Way { gemm, shrink: Some(times_power_of_two(R::ONE, -exponent)) }, panels);
        self.divide::<S>(exponent, panels);
        keep_finite(&fast, panels.sums, R::is_finite);
        Ok(())
    }

    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, way: Way<R>, panels: &mut Panels<R>) {
        let operands = self.operands;
        let scale = R::from_f64(operands.scale);
        way.gemm.pack::<R, S>(simd, operands.q, self.at, &self.queries, scale, panels.keys, panels.queries);
        panels.start();
        let [sums, largest, total] = &mut panels.parts;
        sums.fill(R::ZERO);
        largest.fill(R::LOWEST);
        total.fill(R::ZERO);
        let (kv_len, (_, of_scores)) = (operands.shape.kv_len, way.gemm.factors(operands));
        for (index, start) in (0..kv_len).step_by(self.tiles.keys).enumerate() {
            if self.has_parts() && index > 0 && index.is_multiple_of(self.tiles.blocks_of_part) {
                panels.add_part(panel_width::<R, S>(), operands.value_dim, of_scores);
            }
            let block = start..(start + self.tiles.keys).min(kv_len);
            let (block, _) = operands.visible(self.at, &self.queries, block);
            if !block.is_empty() {
                self.block(simd, way, block, panels);
            }
        }
        if self.has_parts() {
            panels.add_part(panel_width::<R, S>(), operands.value_dim, of_scores);
            let Panels { sums, largest, total, parts, .. } = panels;
            [sums, largest, total].into_iter().zip(parts).for_each(|(all, of_parts)| std::mem::swap(all, of_parts));
        }
    }

    /// Whether there are so many keys that parts of them are summed on their own.
    fn has_parts(&self) -> bool {
        self.operands.shape.kv_len > self.tiles.keys * self.tiles.blocks_of_part
    }

    /// All panels against one block of keys.
    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, way: Way<R>, block: Range<usize>, panels: &mut Panels<R>) {
        let (operands, gemm) = (self.operands, way.gemm);
        let (width, d, dv) = (panel_width::<R, S>(), operands.dim, operands.value_dim);
        let kv_at = (self.at.0, self.at.1 / operands.group);
        let keys = gemm.dot_rows(operands.k, kv_at, block.clone(), panels.keys);
        let mut values = gemm.sum_rows(simd, operands.v, kv_at, block.clone(), panels.values);
        let mut phase = 0;
        for panel in 0..self.queries.len().div_ceil(width) {
            let first_query = self.queries.start + panel * width;
            let queries = first_query..(first_query + width).min(self.queries.end);
            let (visible, coverage) = operands.visible(self.at, &queries, block.clone());
            if visible.is_empty() {
                continue;
            }
            let skip = visible.start - block.start;
            if gemm.phase(skip) != phase {
                phase = gemm.phase(skip);
                values = gemm.sum_rows(simd, operands.v, kv_at, block.start + phase..block.end, panels.values);
            }
            let keys = keys.part(skip, visible.len());
            let values = values.skip(skip - phase);
            let tile = Tile { at: self.at, first_query, queries: queries.len(), keys: visible };
            let panel = Panel {
                queries: &panels.queries[panel * gemm.panel_rows(d) * width..],
                sums: &mut panels.sums[panel * dv * width..],
                largest: &mut panels.largest[panel * width..],
                total: &mut panels.total[panel * width..],
            };
            self.tile(simd, way, &tile, coverage, panel, (keys, values), &mut panels.tile);
        }
    }

    /// One panel against the keys of a tile.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // one more than clippy's seven
    fn tile<S: Simd>(
        &self,
        simd: S,
        Way { gemm, shrink }: Way<R>,
        tile: &Tile,
        coverage: Coverage,
        panel: Panel<R>,
        (keys, values): (DotRows<R>, SumRows<R>),
        pieces: &mut TilePieces<R>,
    ) {
        let operands = self.operands;
        let (width, count) = (panel_width::<R, S>(), tile.keys.len());
        let (scale, of_scores) = gemm.factors(operands);
        let mut scores = MatrixMut::new(pieces.scores, count, width, width);
        let mut now = [R::splat(simd, R::LOWEST); VECTORS];
        if operands.modifies(coverage) {
            gemm.dot_products::<R, S, false>(simd, scale, panel.queries, keys, scores.reborrow(), &mut now);
            tile.modify(simd, operands, coverage, shrink.is_some(), scores.reborrow(), None);
            maxima(simd, scores.as_ref(), &mut now);
        } else {
            gemm.dot_products::<R, S, true>(simd, scale, panel.queries, keys, scores.reborrow(), &mut now);
        }
        for (now, before) in now.iter_mut().zip(panel_row::<R, S>(panel.largest)) {
            *now = R::max(simd, *before, *now);
        }
        if let (Some(tiles), None, None) = (gemm.sum_by_tiles(), operands.dropout, shrink) {
            return bf16_sums(simd, tiles, of_scores, now, scores, panel, values);
        }
        // What is relative to the greatest score is left in `shifted`.
        let mut shifted = now;
        if of_scores != R::ONE {
            shift_and_scale(simd, scores.reborrow(), &now, of_scores);
            let largest = MatrixMut::new(&mut *panel.largest, 1, width, width);
            shift_and_scale(simd, largest, &now, of_scores);
            shifted = [R::splat(simd, R::ZERO); VECTORS];
        }
        let factor = if shrink.is_some() {
            online_update::<R, S, true>(simd, scores, shifted, panel.largest, panel.total)
        } else {
            online_update::<R, S, false>(simd, scores, shifted, panel.largest, panel.total)
        };
        *panel_row_mut::<R, S>(panel.largest) = now;
        if operands.dropout.is_some() {
            tile.dropout_factors(simd, operands, MatrixMut::new(pieces.factors, count, width, width));
            let weights = pieces.scores[..count * width].iter_mut();
            weights.zip(&*pieces.factors).for_each(|(weight, factor)| *weight *= *factor);
        }
        if let Some(shrink) = shrink {
            pieces.scores[..count * width].iter_mut().for_each(|weight| *weight *= shrink);
        }
        let weights = MatrixMut::new(pieces.scores, count, width, width);
        gemm.accumulate::<R, S>(simd, panel.sums, factor, values, weights);
    }

    /// Divides the sums by the totals and multiplies them by 2^exponent, which is not zero in the careful pass.
    #[inline(always)]
    fn divide<S: Simd>(&self, exponent: i32, panels: &mut Panels<R>) {
        let (width, dv) = (panel_width::<R, S>(), self.operands.value_dim);
        let is_mean = self.operands.dropout.is_none();
        for (inverse, total) in panels.inverse.iter_mut().zip(&*panels.total) {
            *inverse = times_power_of_two(inverse_of_total(*total), exponent);
        }
        for (sums, inverse) in panels.sums.chunks_exact_mut(dv * width).zip(panels.inverse.chunks_exact(width)) {
            for sums in sums.chunks_exact_mut(width) {
                if exponent == 0 {
                    sums.iter_mut().zip(inverse).for_each(|(sum, inverse)| *sum *= *inverse);
                } else {
                    let sums = sums.iter_mut().zip(inverse);
                    sums.for_each(|(sum, inverse)| *sum = quotient(*sum, *inverse, is_mean));
                }
            }
        }
    }

    /// Whether the careful pass can make a result finite that isn't.
    #[inline(always)]
    fn must_repeat<S: Simd>(&self, panels: &Panels<R>) -> bool {
        let (width, dv) = (panel_width::<R, S>(), self.operands.value_dim);
        let mut is_finite = true;
        for (panel, sums) in panels.sums.chunks_exact(dv * width).enumerate() {
            let count = width.min(self.queries.len() - panel * width);
            sums.chunks_exact(width).for_each(|sums| is_finite &= all_finite(&sums[..count]));
        }
        if is_finite || self.operands.hides() {
            return !is_finite;
        }
        // Where nothing is hidden, a log-sum-exp that isn't finite stays so, and so does the row's context.
        let overflows = |(i, sum): (usize, &R)| {
            let row = i / (dv * width) * width + i % width;
            row < self.queries.len() && !sum.is_finite() && panels.total[row].is_finite()
        };
        panels.sums.iter().enumerate().any(overflows)
    }

    #[inline(always)]
    fn write<S: Simd>(&mut self, simd: S, of_scores: R, panels: &mut Panels<R>) {
        let (width, dv, count) = (panel_width::<R, S>(), self.operands.value_dim, self.queries.len());
        assert_eq!(self.logsumexp.len(), count, "a log-sum-exp for each query");
        for (i, to) in self.logsumexp.iter_mut().enumerate() {
            to.write(LogSumExp::new(panels.largest[i], of_scores, panels.total[i].to_f64()));
        }
        for (panel, sums) in panels.sums.chunks_exact(dv * width).enumerate() {
            let count = width.min(count - panel * width);
            unpack::<R, S>(simd, sums, dv, count, R::ONE, panels.values, self.context, panel * width);
        }
    }
}

/// The online softmax of a tile and its sums, where the weights go from their exponential to bf16 in one pass.
#[inline(always)]
fn bf16_sums<R: SimdFloat, S: Simd>(
    simd: S,
    tiles: Bf16Tiles,
    of_scores: R,
    now: Row<R, S>,
    scores: MatrixMut<R>,
    panel: Panel<R>,
    values: SumRows<R>,
) {
    let SumRows::Tiles(values) = values else { unreachable!("rows and sums of the same kind") };
    let now = cast_slice::<R::Vector<S>, f32>(&now).first_chunk().expect("a row of a panel");
    let (largest, total) = (cast_slice_mut(panel.largest), cast_slice_mut(panel.total));
    let of_scores = of_scores.to_f64() as f32;
    let (weights, factor) = softmax::bf16::online_update(tiles.dot(), scores.cast(), of_scores, now, largest, total);
    let factor = *panel_row::<f32, S>(&factor.0);
    tiles.accumulate(simd, cast_slice_mut(panel.sums), factor, values, weights.as_ref());
}
