//! The softmax of every pass: online over tiles, merged from splits, and its gradient.
//!
//! Source of the online softmax: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).

pub(crate) mod bf16;

use pulp::Simd;
use pulp::bytemuck::cast_slice;

use crate::careful::bounded;
use crate::gemm::microkernel::{Row, VECTORS, panel_row, panel_row_mut};
use crate::math::exp;
use crate::matrix::{Matrix, MatrixMut};
use crate::schedule::DECODE_TASKS;
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut};

/// ln Σ exp(scores) of a row, as a sum of two numbers. A single number would lose the second where scores are large, and the
/// weights that the backward pass makes of it would not sum to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogSumExp<R> {
    /// The greatest score, before it was multiplied by the factor; minus infinity for a query that may attend to nothing.
    pub(crate) largest: R,
    /// ln Σ exp(factor · (scores - largest))
    pub(crate) log_total: R,
    /// What the softmax multiplied scores by: 1 where they had been scaled before it.
    pub(crate) factor: R,
}

impl<R: SimdFloat> LogSumExp<R> {
    /// The sum of `largest`, the greatest score or minus infinity, and `log_total`, which is ln Σ exp(scores - largest).
    pub fn from_parts(largest: R, log_total: R) -> Self {
        Self { largest, log_total, factor: R::ONE }
    }

    /// Of the keys of both, and the shares of their weights that belong to each.
    pub(crate) fn merged(self, other: Self) -> (Self, [R; 2]) {
        let parts = [self, other];
        let scaled = parts.map(|part| part.largest.to_f64() * part.factor.to_f64());
        if scaled[1] == f64::NEG_INFINITY {
            return (self, [R::ONE, R::ZERO]);
        }
        let largest = scaled[0].max(scaled[1]);
        let totals = [0, 1].map(|i| (scaled[i] - largest + parts[i].log_total.to_f64()).exp());
        let total = totals[0] + totals[1];
        let logsumexp = match scaled.iter().position(|&scaled| scaled == largest) {
            Some(i) => Self { log_total: R::from_f64(total.ln()), ..parts[i] },
            // Both are NaN.
            None => Self::from_parts(R::from_f64(scaled[0] + scaled[1]), R::from_f64(total.ln())),
        };
        (logsumexp, totals.map(|of_part| R::from_f64(of_part / total)))
    }

    /// Of the greatest score, what scores are still to be multiplied by, and the sum of exponentials relative to it, which is zero
    /// if there was no key.
    #[inline(always)]
    pub(crate) fn new(largest: R, factor: R, total: f64) -> Self {
        if total == 0.0 {
            return Self { largest: -R::INFINITY, log_total: R::ZERO, factor };
        }
        Self { largest, log_total: R::from_f64(total.ln()), factor }
    }

    /// The greatest score; minus infinity for a query that may attend to nothing.
    pub fn largest(self) -> R {
        self.largest * self.factor
    }

    /// ln Σ exp(scores - largest)
    pub fn log_total(self) -> R {
        self.log_total
    }

    /// The log-sum-exp as one number: minus infinity for a query that may attend to nothing.
    pub fn value(self) -> R {
        R::from_f64(self.largest.to_f64() * self.factor.to_f64() + self.log_total.to_f64())
    }
}

/// e^(s - shift): exactly 1 where both are equal.
#[inline(always)]
fn exponential<R: SimdFloat, S: Simd>(simd: S, s: R::Vector<S>, shift: R::Vector<S>) -> R::Vector<S> {
    exp::<R, S>(simd, R::vsub(simd, s, shift))
}

/// As [`exponential`], but above zero for every score above minus infinity: in the careful pass a weight of zero means a hidden
/// key, which may hold anything, and a visible one has to show what it holds.
#[inline(always)]
fn visible_exponential<R: SimdFloat, S: Simd>(simd: S, s: R::Vector<S>, power: R::Vector<S>) -> R::Vector<S> {
    let positive = R::max(simd, power, R::splat(simd, R::TINY));
    R::select_less(simd, R::splat(simd, -R::INFINITY), s, positive, power)
}

/// Scores \[key\]\[W\] become factor · (s - largest), lane by lane: the greatest score becomes exactly 0, however large it is, and
/// minus infinity stays the mark of hidden keys alone.
#[inline(always)]
pub(crate) fn shift_and_scale<R: SimdFloat, S: Simd>(
    simd: S,
    mut scores: MatrixMut<R>,
    largest: &Row<R, S>,
    factor: R,
) {
    let factor = R::splat(simd, factor);
    for j in 0..scores.rows() {
        for (score, largest) in panel_row_mut::<R, S>(scores.row(j)).iter_mut().zip(largest) {
            let shifted = R::vmul(simd, R::vsub(simd, *score, *largest), factor);
            let visible = R::max(simd, shifted, R::splat(simd, R::LOWEST));
            *score = R::select_less(simd, R::splat(simd, -R::INFINITY), *score, visible, shifted);
        }
    }
}

/// `largest` becomes the greatest of itself and the scores \[key\]\[W\], lane by lane.
#[inline(always)]
pub(crate) fn maxima<R: SimdFloat, S: Simd>(simd: S, scores: Matrix<R>, largest: &mut Row<R, S>) {
    for j in 0..scores.rows() {
        let row = panel_row::<R, S>(scores.row(j));
        for (largest, score) in largest.iter_mut().zip(row) {
            *largest = R::max(simd, *largest, *score);
        }
    }
}

/// One step of the online softmax of a panel: scores \[key\]\[W\] become exponentials relative to `now`, the greatest so far, and
/// are added to `total`. What was summed before relative to `largest`, the greatest before, is to be multiplied by the
/// result. `CAREFUL`: for the careful pass.
#[inline(always)]
pub(crate) fn online_update<R: SimdFloat, S: Simd, const CAREFUL: bool>(
    simd: S,
    mut scores: MatrixMut<R>,
    now: Row<R, S>,
    largest: &mut [R],
    total: &mut [R],
) -> Row<R, S> {
    let (largest, total) = (panel_row_mut::<R, S>(largest), panel_row_mut::<R, S>(total));
    let mut factor = *largest;
    // A tile is summed on its own before it is added: a long sum would lose more to rounding.
    let mut sum = [R::splat(simd, R::ZERO); VECTORS];
    for j in 0..scores.rows() {
        let row = panel_row_mut::<R, S>(scores.row(j));
        for v in 0..VECTORS {
            let mut power = exponential::<R, S>(simd, row[v], now[v]);
            if CAREFUL {
                power = visible_exponential::<R, S>(simd, row[v], power);
            }
            sum[v] = R::vadd(simd, sum[v], power);
            row[v] = power;
        }
    }
    for v in 0..VECTORS {
        factor[v] = exponential::<R, S>(simd, largest[v], now[v]);
        total[v] = R::mul_add(simd, factor[v], total[v], sum[v]);
    }
    *largest = now;
    factor
}

/// One step of the online softmax of a single row: as [`online_update`] for `count` scores, followed by room for a whole
/// vector.
#[inline(always)]
pub(crate) fn online_update_of_row<R: SimdFloat, S: Simd, const CAREFUL: bool>(
    simd: S,
    scores: &mut [R],
    count: usize,
    largest: &mut R,
    total: &mut R,
) -> R {
    // The scores behind the last count nothing.
    let scores = &mut scores[..count.next_multiple_of(R::lanes::<S>())];
    scores[count..].fill(-R::INFINITY);
    let before = *largest;
    let mut greatest = R::splat(simd, before);
    for scores in as_vectors::<R, S>(scores) {
        greatest = R::max(simd, greatest, *scores);
    }
    *largest = R::reduce_max(simd, greatest);
    let shift = R::splat(simd, *largest);
    let mut sum = R::splat(simd, R::ZERO);
    for scores in as_vectors_mut::<R, S>(scores) {
        let mut power = exponential::<R, S>(simd, *scores, shift);
        if CAREFUL {
            power = visible_exponential::<R, S>(simd, *scores, power);
        }
        sum = R::vadd(simd, sum, power);
        *scores = power;
    }
    let factor = R::from_f64((before.to_f64() - largest.to_f64()).exp());
    *total = *total * factor + R::reduce_add(simd, sum);
    factor
}

/// 1 / total, which makes weights of exponentials; 0 if there was no key, which makes the context zero.
#[inline(always)]
pub(crate) fn inverse_of_total<R: SimdFloat>(total: R) -> R {
    if total == R::ZERO { R::ZERO } else { R::ONE / total }
}

/// What a split of the keys gives for a row: the greatest score, the sum of exponentials relative to it, and the context of its
/// own keys.
#[derive(Clone, Copy)]
pub(crate) struct Partial<'a, R> {
    largest: R,
    total: R,
    context: &'a [R],
}

impl<'a, R: SimdFloat> Partial<'a, R> {
    /// Numbers of a partial result.
    pub(crate) fn size(value_dim: usize) -> usize {
        value_dim + 2
    }

    /// Reads what [`Partial::write`] wrote.
    pub(crate) fn read(numbers: &'a [R]) -> Self {
        Self { largest: numbers[0], total: numbers[1], context: &numbers[2..] }
    }

    pub(crate) fn write(numbers: &mut [R], largest: R, total: R, context: &[R]) {
        (numbers[0], numbers[1]) = (largest, total);
        numbers[2..].copy_from_slice(context);
    }
}

/// The context of a row from at most [`DECODE_TASKS`] partial results, in their order; gives the log-sum-exp.
pub(crate) fn merge<'a, R: SimdFloat>(
    partials: impl Iterator<Item = Partial<'a, R>> + Clone,
    context: &mut [R],
) -> LogSumExp<R> {
    let largest = partials.clone().map(|partial| partial.largest).fold(R::LOWEST, |a, b| if b > a { b } else { a });
    let mut shares = [0.0; DECODE_TASKS];
    for (share, partial) in shares.iter_mut().zip(partials.clone()) {
        *share = partial.total.to_f64() * (partial.largest.to_f64() - largest.to_f64()).exp();
    }
    let total: f64 = shares.iter().sum();
    if total == 0.0 {
        context.fill(R::ZERO);
    } else {
        // The shares are divided by the total first, so that no sum is larger than what it is a mean of.
        shares.iter_mut().for_each(|share| *share /= total);
        for (c, to) in context.iter_mut().enumerate() {
            let terms = partials.clone().zip(&shares).map(|(partial, share)| partial.context[c].to_f64() * share);
            let sum: f64 = terms.sum();
            let is_finite = partials.clone().all(|partial| partial.context[c].is_finite());
            *to = if is_finite { bounded(R::from_f64(sum)) } else { R::from_f64(sum) };
        }
    }
    LogSumExp::new(largest, R::ONE, total)
}

/// What the backward pass of the softmax needs of each query of a panel, \[W\] each.
#[derive(Clone, Copy)]
pub(crate) struct RowStatistics<'a, R> {
    pub(crate) largest: &'a [R],
    pub(crate) log_total: &'a [R],
    pub(crate) delta: &'a [R],
}

impl<'a, R: SimdFloat> RowStatistics<'a, R> {
    /// The same bits as numbers of another type of the same size.
    #[inline(always)]
    pub(crate) fn cast<T: SimdFloat>(self) -> RowStatistics<'a, T> {
        let [largest, log_total, delta] = [self.largest, self.log_total, self.delta].map(cast_slice);
        RowStatistics { largest, log_total, delta }
    }
}

/// The backward pass of the softmax of a panel: p = e^(s - lse) takes the place of s in `weights`, and ds = p ∘ (dp - δ) that of
/// dp in `grads`, all \[key\]\[W\]. With dropout, dp is multiplied by the factors before, and p after. If `NAN_SAFE`, ds is zero
/// where p is, whatever dp holds.
#[inline(always)]
pub(crate) fn weights_and_gradients<R: SimdFloat, S: Simd, const NAN_SAFE: bool>(
    simd: S,
    rows: RowStatistics<R>,
    mut weights: MatrixMut<R>,
    mut grads: MatrixMut<R>,
    factors: Option<Matrix<R>>,
) {
    let largest = panel_row::<R, S>(rows.largest);
    let log_total = panel_row::<R, S>(rows.log_total);
    let delta = panel_row::<R, S>(rows.delta);
    for j in 0..weights.rows() {
        let (weights, grads) = (panel_row_mut::<R, S>(weights.row(j)), panel_row_mut::<R, S>(grads.row(j)));
        let factors = factors.map(|factors| panel_row::<R, S>(factors.row(j)));
        for v in 0..VECTORS {
            let mut p = exponential::<R, S>(simd, R::vsub(simd, weights[v], largest[v]), log_total[v]);
            if NAN_SAFE {
                p = visible_exponential::<R, S>(simd, weights[v], p);
            }
            let mut dp = grads[v];
            let mut dropped = p;
            if let Some(factors) = factors {
                dp = R::vmul(simd, dp, factors[v]);
                dropped = R::vmul(simd, p, factors[v]);
            }
            weights[v] = dropped;
            let ds = R::vmul(simd, p, R::vsub(simd, dp, delta[v]));
            grads[v] = if NAN_SAFE { R::select_zero(simd, p, p, ds) } else { ds };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::panel_width;
    use crate::gemm::microkernel::tests::{close, numbers};
    use crate::simd::with_every_simd;

    /// Scores of two tiles \[key\]\[W\], the last of which is hidden.
    fn tiles<R: SimdFloat>(width: usize) -> Vec<R> {
        let mut scores = numbers::<R>(1, 10 * width);
        scores.iter_mut().for_each(|x| *x *= R::from_f64(5.0));
        scores[9 * width] = -R::INFINITY;
        scores
    }

    fn check_online<R: SimdFloat, S: Simd>(simd: S) {
        let width = panel_width::<R, S>();
        let scores = tiles::<R>(width);
        let mut powers = scores.clone();
        let (mut largest, mut total) = (vec![R::LOWEST; width], vec![R::ZERO; width]);
        let mut factors = [R::splat(simd, R::ONE); VECTORS];
        for tile in [0..6, 6..10] {
            let tile = &mut powers[tile.start * width..tile.end * width];
            let mut now = *panel_row::<R, S>(&largest);
            let rows = tile.len() / width;
            maxima(simd, Matrix::new(tile, rows, width, width), &mut now);
            factors = online_update::<R, S, false>(
                simd,
                MatrixMut::new(tile, rows, width, width),
                now,
                &mut largest,
                &mut total,
            );
        }
        let mut factor = vec![R::ZERO; width];
        *panel_row_mut::<R, S>(&mut factor) = factors;
        for w in 0..width {
            let column = |j: usize| scores[j * width + w].to_f64();
            let greatest = (0..10).map(column).fold(f64::MIN, f64::max);
            let sum: f64 = (0..10).map(|j| (column(j) - greatest).exp()).sum();
            assert!(largest[w].to_f64() == greatest && close(total[w], sum));
            assert!(close(inverse_of_total(total[w]), 1.0 / sum));
            let logsumexp = LogSumExp::new(largest[w], R::ONE, total[w].to_f64());
            assert!(close(logsumexp.value(), greatest + sum.ln()));
            // Weights of the first tile need the factor.
            let first = powers[w].to_f64() * factor[w].to_f64();
            assert!(close(R::from_f64(first), (column(0) - greatest).exp()));
        }
    }

    fn check_row<R: SimdFloat, S: Simd>(simd: S) {
        let scores: Vec<R> = numbers(2, 50);
        let (mut largest, mut total, mut sum) = (R::LOWEST, R::ZERO, R::ZERO);
        for part in [0..19, 19..50] {
            let mut row = vec![R::from_f64(7.0); 64];
            row[..part.len()].copy_from_slice(&scores[part.clone()]);
            let factor = online_update_of_row::<R, S, false>(simd, &mut row, part.len(), &mut largest, &mut total);
            sum = row[..part.len()].iter().fold(sum * factor, |sum, &x| sum + x);
        }
        let greatest = scores.iter().map(|x| x.to_f64()).fold(f64::MIN, f64::max);
        let expected: f64 = scores.iter().map(|x| (x.to_f64() - greatest).exp()).sum();
        assert!(largest.to_f64() == greatest && close(total, expected) && close(sum, expected));
    }

    fn check_gradients<R: SimdFloat, S: Simd>(simd: S) {
        let width = panel_width::<R, S>();
        let [scores, dp, factors] = [3, 4, 5].map(|seed| numbers::<R>(seed, 3 * width));
        let [largest, log_total, delta] = [6, 7, 8].map(|seed| numbers::<R>(seed, width));
        let rows = RowStatistics { largest: &largest, log_total: &log_total, delta: &delta };
        for dropout in [false, true] {
            let (mut weights, mut grads) = (scores.clone(), dp.clone());
            let matrix = |data| MatrixMut::new(data, 3, width, width);
            let (weights_of, grads_of) = (matrix(&mut weights), matrix(&mut grads));
            let factors_of = dropout.then(|| Matrix::new(&factors, 3, width, width));
            weights_and_gradients::<R, S, false>(simd, rows, weights_of, grads_of, factors_of);
            for i in 0..3 * width {
                let factor = if dropout { factors[i].to_f64() } else { 1.0 };
                let p = (scores[i].to_f64() - largest[i % width].to_f64() - log_total[i % width].to_f64()).exp();
                assert!(close(weights[i], p * factor));
                assert!(close(grads[i], p * (dp[i].to_f64() * factor - delta[i % width].to_f64())));
            }
        }
    }

    #[test]
    fn softmax_is_its_definition() {
        with_every_simd!(|simd| {
            check_online::<f32, S>(simd);
            check_online::<f64, S>(simd);
            check_row::<f32, S>(simd);
            check_row::<f64, S>(simd);
            check_gradients::<f32, S>(simd);
            check_gradients::<f64, S>(simd);
        });
    }

    #[test]
    fn merged_splits_are_the_whole() {
        // Scores 1 and 3 with values 10 and 20; a split without keys between them.
        let partials = [[1.0, 1.0, 10.0], [f64::LOWEST, 0.0, 0.0], [3.0, 1.0, 20.0]];
        let mut context = [0.0];
        let logsumexp = merge(partials.iter().map(|numbers| Partial::read(numbers)), &mut context);
        let weights = [1f64.exp(), 3f64.exp()];
        let sum = weights[0] + weights[1];
        assert!(close(context[0], (10.0 * weights[0] + 20.0 * weights[1]) / sum) && close(logsumexp.value(), sum.ln()));
    }

    #[test]
    fn row_without_keys_has_a_zero_context() {
        let partials = [[f32::LOWEST, 0.0, 0.0]];
        let mut context = [1.0];
        let logsumexp = merge(partials.iter().map(|numbers| Partial::read(numbers)), &mut context);
        assert_eq!((context[0], logsumexp.value()), (0.0, f32::NEG_INFINITY));
        assert_eq!((inverse_of_total(0.0f32), LogSumExp::new(f32::LOWEST, 1.0, 0.0)), (0.0, logsumexp));
    }
}
