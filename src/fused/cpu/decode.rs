//! A few queries against many keys, as when text is generated token by token.
//!
//! Such a call waits for memory, so each key and value is read once, in the order in which they stand, for all the query
//! heads that share it. The lanes are entries of a key: lanes of queries would be empty. Long caches are cut into shares
//! that are computed side by side and merged by their log-sum-exp.
//!
//! Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023).

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::decode_micro::{add_values, dot_products};
use super::element::Element;
use super::micro::{Rows, load, pad, store};
use super::problem::Problem;
use super::real::Real;
use super::scores::Tile;
use super::scratch::{Scratch, pieces};
use super::softmax::exponential;
use crate::mask::Coverage;

/// More queries than this fill the lanes of a panel well enough.
pub(crate) const MOST_QUERIES: usize = 8;
/// With fewer keys there is nothing to wait for. The choice depends on the shape alone, so that a layer gives the same numbers
/// whether it trains or not.
pub(crate) const FEWEST_KEYS: usize = 128;
/// Keys of a block: those of 128 entries (64 KB) stay in a second-level cache until all rows have had them.
pub(crate) const KEYS: usize = 128;

/// A share of the keys of one key head. Its *rows* are the queries of the query heads that share it, head by head.
pub(crate) struct Decode<'a, E: Element> {
    pub(crate) problem: &'a Problem<'a, E>,
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) keys: Range<usize>,
    /// A [`Partial`] for each row, one behind the other.
    pub(crate) partial: *mut E::Real,
}

/// What a share of the keys gives for a row: the greatest score, the sum of exponentials relative to it, and the sum of
/// the values weighted by them.
pub(crate) struct Partial<'a, R> {
    pub(crate) largest: R,
    pub(crate) total: R,
    pub(crate) sums: &'a [R],
}

impl<'a, R: Real> Partial<'a, R> {
    pub(crate) fn size(value_dim: usize) -> usize {
        value_dim + 2
    }

    pub(crate) fn of(numbers: &'a [R]) -> Self {
        Self { largest: numbers[0], total: numbers[1], sums: &numbers[2..] }
    }
}

/// The context of a row from the shares of its keys; gives the log-sum-exp.
pub(crate) fn merge<'a, E: Element>(
    partials: impl Iterator<Item = Partial<'a, E::Real>> + Clone,
    context: &mut [MaybeUninit<E>],
) -> E::Real {
    let largest =
        partials.clone().map(|partial| partial.largest).fold(E::Real::LOWEST, |a, b| if b > a { b } else { a });
    let share = |partial: Partial<E::Real>| (partial.largest.to_f64() - largest.to_f64()).exp();
    let shares: Vec<f64> = partials.clone().map(share).collect();
    let total: f64 = partials.clone().zip(&shares).map(|(partial, share)| partial.total.to_f64() * share).sum();
    let is_empty = total == 0.0;
    for (c, to) in context.iter_mut().enumerate() {
        let sum: f64 = partials.clone().zip(&shares).map(|(partial, share)| partial.sums[c].to_f64() * share).sum();
        to.write(E::narrow(E::Real::from_f64(if is_empty { 0.0 } else { sum / total })));
    }
    if is_empty { -E::Real::INFINITY } else { E::Real::from_f64(largest.to_f64() + total.ln()) }
}

struct Pieces<'s, R> {
    /// [rows][pad(d)]
    queries: &'s mut [R],
    /// [rows][pad(value_dim)]
    sums: &'s mut [R],
    /// [rows][KEYS]: scores, then weights
    weights: &'s mut [R],
    /// [KEYS][q_len], for what is done to the scores of one head
    scores: &'s mut [R],
    /// [rows]
    largest: &'s mut [R],
    /// [rows]
    total: &'s mut [R],
    keys: &'s mut [R],
    values: &'s mut [R],
}

impl<E: Element> WithSimd for Decode<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let problem = self.problem;
        let (d, dv, q_len) = (problem.dim(), problem.value_dim(), problem.shape().q_len);
        let rows = problem.group() * q_len;
        let mut scratch;
        let mut pieces = pieces!(scratch: E::Real => Pieces {
            queries: pad(d) * rows,
            sums: pad(dv) * rows,
            weights: KEYS * rows,
            scores: KEYS * q_len,
            largest: rows,
            total: rows,
            keys: KEYS * d,
            values: KEYS * dv,
        });
        self.over_keys(simd, &mut pieces, false);
        if !problem.mask.is_full() && pieces.sums.iter().any(|sum| !sum.is_finite()) {
            // Perhaps it was infinity times the weight of zero of a key that the mask hides.
            self.over_keys(simd, &mut pieces, true);
        }
        self.finish(&pieces);
    }
}

impl<E: Element> Decode<'_, E> {
    #[inline(always)]
    fn over_keys<S: Simd>(&self, simd: S, pieces: &mut Pieces<E::Real>, with_care: bool) {
        self.start(pieces);
        for start in self.keys.clone().step_by(KEYS) {
            self.block(simd, start..(start + KEYS).min(self.keys.end), pieces, with_care);
        }
    }

    #[inline(always)]
    fn start(&self, pieces: &mut Pieces<E::Real>) {
        let problem = self.problem;
        let q_len = problem.shape().q_len;
        let scale = E::Real::from_f64(problem.scale);
        for (row, to) in pieces.queries.chunks_exact_mut(pad(problem.dim())).enumerate() {
            let head = self.kv_head * problem.group() + row / q_len;
            let from = problem.q.row(self.sequence, head, row % q_len);
            to.fill(E::Real::ZERO);
            to.iter_mut().zip(from).for_each(|(to, x)| *to = x.widen() * scale);
        }
        pieces.sums.fill(E::Real::ZERO);
        pieces.largest.fill(E::Real::LOWEST);
        pieces.total.fill(E::Real::ZERO);
    }

    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, block: Range<usize>, pieces: &mut Pieces<E::Real>, with_care: bool) {
        let problem = self.problem;
        let (queries, group) = (0..problem.shape().q_len, problem.group());
        let at = |head: usize| (self.sequence, self.kv_head * group + head);
        // The keys that any head looks at.
        let mut block = block.clone();
        let mut seen = block.end..block.start;
        for head in 0..group {
            let (visible, _) = problem.visible(at(head), &queries, block.clone());
            if !visible.is_empty() {
                seen = seen.start.min(visible.start)..seen.end.max(visible.end);
            }
        }
        if seen.is_empty() {
            return;
        }
        block = seen;
        let (d, dv, rows, count) = (problem.dim(), problem.value_dim(), group * queries.len(), block.len());
        let kv_at = (self.sequence, self.kv_head);
        let keys = problem.k.rows(kv_at, block.clone(), pieces.keys);
        // SAFETY: the pieces have the sizes that the kernels ask for.
        unsafe { dot_products::<E::Real, S>(simd, d, keys, count, pieces.queries, rows, pieces.weights) };
        let tile = |head: usize| Tile {
            at: at(head),
            first_query: 0,
            queries: queries.len(),
            width: queries.len(),
            keys: block.clone(),
        };
        for head in 0..group {
            self.adjust(simd, &tile(head), head, pieces);
        }
        for row in 0..rows {
            self.exponentials(simd, row, count, pieces);
        }
        if problem.dropout.is_some() {
            for head in 0..group {
                self.drop_out(simd, &tile(head), head, pieces);
            }
        }
        let values = problem.v.rows(kv_at, block.clone(), pieces.values);
        if with_care {
            for row in 0..rows {
                self.add_values_with_care(row, values, count, pieces);
            }
        } else {
            // SAFETY: as above.
            unsafe { add_values::<E::Real, S>(simd, dv, values, count, pieces.weights, rows, pieces.sums) };
        }
    }

    /// A weight of zero adds nothing, be the value infinite or NaN.
    fn add_values_with_care(
        &self,
        row: usize,
        values: Rows<*const E::Real>,
        count: usize,
        pieces: &mut Pieces<E::Real>,
    ) {
        let dv = self.problem.value_dim();
        let sums = &mut pieces.sums[row * pad(dv)..][..dv];
        for (j, weight) in pieces.weights[row * KEYS..][..count].iter().enumerate() {
            if *weight != E::Real::ZERO {
                for (c, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: there is a row of dv for each of the `count` keys of the block.
                    *sum += *weight * unsafe { *values.start.add(j * values.stride + c) };
                }
            }
        }
    }

    /// Softcap, bias, ALiBi and mask of one head, whose scores are turned to [key][query] for it.
    #[inline(always)]
    fn adjust<S: Simd>(&self, simd: S, tile: &Tile, head: usize, pieces: &mut Pieces<E::Real>) {
        let problem = self.problem;
        let queries = 0..tile.queries;
        let coverage = problem.mask.rule().tile(&problem.shape(), tile.at, &queries, &tile.keys);
        // What the mask hides wholly is hidden here as well: other heads may look at it.
        let coverage = if coverage == Coverage::All { coverage } else { Coverage::Some };
        if !problem.adjusts(coverage) {
            return;
        }
        let count = tile.keys.len();
        let weights = &mut pieces.weights[head * tile.queries * KEYS..][..tile.queries * KEYS];
        for (j, scores) in pieces.scores.chunks_exact_mut(tile.queries).enumerate().take(count) {
            scores.iter_mut().enumerate().for_each(|(i, score)| *score = weights[i * KEYS + j]);
        }
        let scores = Rows { start: pieces.scores.as_mut_ptr(), stride: tile.width };
        // SAFETY: there is a row of q_len scores for each key.
        unsafe { tile.adjust(simd, problem, coverage, scores, None) };
        for (j, scores) in pieces.scores.chunks_exact(tile.queries).enumerate().take(count) {
            scores.iter().enumerate().for_each(|(i, score)| weights[i * KEYS + j] = *score);
        }
    }

    #[inline(always)]
    fn drop_out<S: Simd>(&self, simd: S, tile: &Tile, head: usize, pieces: &mut Pieces<E::Real>) {
        let factors = Rows { start: pieces.scores.as_mut_ptr(), stride: tile.width };
        // SAFETY: there is a row of q_len factors for each key.
        unsafe { tile.dropout_factors(simd, self.problem, factors) };
        let weights = &mut pieces.weights[head * tile.queries * KEYS..][..tile.queries * KEYS];
        for (j, factors) in pieces.scores.chunks_exact(tile.queries).enumerate().take(tile.keys.len()) {
            factors.iter().enumerate().for_each(|(i, factor)| weights[i * KEYS + j] *= *factor);
        }
    }

    /// Turns a row's scores into exponentials relative to the greatest so far, and adds them up.
    #[inline(always)]
    fn exponentials<S: Simd>(&self, simd: S, row: usize, count: usize, pieces: &mut Pieces<E::Real>) {
        let lanes = E::Real::lanes::<S>();
        let weights = &mut pieces.weights[row * KEYS..][..KEYS];
        // KEYS is a multiple of the lanes, and what lies behind the last key counts nothing.
        let padded = count.next_multiple_of(lanes);
        weights[count..padded].fill(-E::Real::INFINITY);
        let before = pieces.largest[row];
        let mut largest = E::Real::splat(simd, before);
        for weights in weights[..padded].chunks_exact(lanes) {
            // SAFETY: the chunk is a vector.
            largest = E::Real::max(simd, largest, unsafe { load::<E::Real, S>(weights.as_ptr()) });
        }
        let largest = E::Real::reduce_max(simd, largest);
        let shift = E::Real::splat(simd, largest);
        let mut sum = E::Real::splat(simd, E::Real::ZERO);
        for weights in weights[..padded].chunks_exact_mut(lanes) {
            // SAFETY: the chunk is a vector.
            unsafe {
                let power = exponential::<E::Real, S>(simd, load::<E::Real, S>(weights.as_ptr()), shift);
                sum = E::Real::vadd(simd, sum, power);
                store::<E::Real, S>(weights.as_mut_ptr(), power);
            }
        }
        let factor = E::Real::from_f64((before.to_f64() - largest.to_f64()).exp());
        pieces.largest[row] = largest;
        pieces.total[row] = pieces.total[row] * factor + E::Real::reduce_add(simd, sum);
        if largest != before {
            let dv = pad(self.problem.value_dim());
            pieces.sums[row * dv..][..dv].iter_mut().for_each(|sum| *sum *= factor);
        }
    }

    #[inline(always)]
    fn finish(&self, pieces: &Pieces<E::Real>) {
        let dv = self.problem.value_dim();
        for (row, sums) in pieces.sums.chunks_exact(pad(dv)).enumerate() {
            // SAFETY: the caller has a partial result for each row of this task alone.
            unsafe {
                let to = self.partial.add(row * Partial::<E::Real>::size(dv));
                to.write(pieces.largest[row]);
                to.add(1).write(pieces.total[row]);
                to.add(2).copy_from_nonoverlapping(sums.as_ptr(), dv);
            }
        }
    }
}
