//! Cross-entropy of one row of logits, piece by piece, and its gradient.
//!
//! Source of the online sum: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).

use pulp::{Simd, WithSimd};

use crate::math::exp;
use crate::simd::{MAX_LANES, SimdFloat, as_vectors, as_vectors_mut, instruction_set, load, load_up_to, store_up_to};

/// Sums that run side by side, so that an addition doesn't wait for the one before.
const SUMS: usize = 4;

/// The softmax of a row, without its exponentials: all that the backward pass needs to compute them again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Denominator<R> {
    /// The greatest logit; minus infinity if all are.
    pub(super) largest: R,
    /// Σ exp(logits - largest); 0 if all logits are minus infinity.
    pub(super) total: R,
}

/// What is known of the logits of a row so far.
#[derive(Clone, Copy)]
pub(super) struct Statistics<R> {
    largest: R,
    /// Σ exp(logits - largest)
    total: f64,
    /// Σ logits / their number in the whole row. A sum could overflow where a mean can't.
    mean: f64,
}

/// The last numbers of a slice as a vector, filled up with minus infinity.
#[inline(always)]
fn last_logits<R: SimdFloat, S: Simd>(logits: &[R]) -> R::Vector<S> {
    let mut all = [-R::INFINITY; MAX_LANES];
    all[..logits.len()].copy_from_slice(logits);
    load::<R, S>(&all)
}

impl<R: SimdFloat> Statistics<R> {
    pub(super) fn new() -> Self {
        Self { largest: R::LOWEST, total: 0.0, mean: 0.0 }
    }

    /// Adds more logits of the row. `share`: 1 / the number of logits in the whole row, if their mean is wanted.
    pub(super) fn add(&mut self, logits: &[R], share: Option<R>) {
        instruction_set().dispatch(Add { statistics: self, logits, share });
    }

    #[inline(always)]
    pub(super) fn add_with<S: Simd>(&mut self, simd: S, logits: &[R], share: Option<R>) {
        let whole = logits.len() / R::lanes::<S>() * R::lanes::<S>();
        let (vectors, rest) = (as_vectors::<R, S>(logits), last_logits::<R, S>(&logits[whole..]));
        let (fours, ones) = vectors.as_chunks::<SUMS>();

        let mut greatest = [R::splat(simd, self.largest); SUMS];
        for four in fours {
            for (greatest, x) in greatest.iter_mut().zip(four) {
                *greatest = R::max(simd, *greatest, *x);
            }
        }
        for x in ones {
            greatest[0] = R::max(simd, greatest[0], *x);
        }
        greatest[0] = R::max(simd, greatest[0], rest);
        let [a, b, c, d] = greatest;
        let greatest = R::max(simd, R::max(simd, a, b), R::max(simd, c, d));
        let before = self.largest;
        self.largest = R::reduce_max(simd, greatest);
        if before != self.largest {
            self.total *= (before.to_f64() - self.largest.to_f64()).exp();
        }

        let shift = R::splat(simd, self.largest);
        let mut sums = [R::splat(simd, R::ZERO); SUMS];
        for four in fours {
            for (sum, x) in sums.iter_mut().zip(four) {
                *sum = R::vadd(simd, *sum, exp::<R, S>(simd, R::vsub(simd, *x, shift)));
            }
        }
        for x in ones {
            sums[0] = R::vadd(simd, sums[0], exp::<R, S>(simd, R::vsub(simd, *x, shift)));
        }
        sums[1] = R::vadd(simd, sums[1], exp::<R, S>(simd, R::vsub(simd, rest, shift)));
        let [a, b, c, d] = sums;
        self.total += R::reduce_add(simd, R::vadd(simd, R::vadd(simd, a, b), R::vadd(simd, c, d))).to_f64();

        if let Some(share) = share {
            let share = R::splat(simd, share);
            let mut sum = R::vmul(simd, share, load_up_to::<R, S>(simd, &logits[whole..]));
            for x in vectors {
                sum = R::mul_add(simd, share, *x, sum);
            }
            self.mean += R::reduce_add(simd, sum).to_f64();
        }
    }

    /// (1 - ε) · (lse - target) + ε · (lse - mean), where lse is the log-sum-exp of the row. It is infinite if the logit of the
    /// target is minus infinity.
    pub(super) fn loss(&self, target: R, smoothing: f64) -> f64 {
        if target == -R::INFINITY {
            return f64::INFINITY;
        }
        // A part of no weight adds nothing, even if it is infinite.
        let part = |weight: f64, distance: f64| if weight == 0.0 { 0.0 } else { weight * distance };
        let largest = self.largest.to_f64();
        let distances = part(1.0 - smoothing, largest - target.to_f64()) + part(smoothing, largest - self.mean);
        self.total.ln() + distances
    }

    pub(super) fn denominator(&self) -> Denominator<R> {
        let largest = if self.total == 0.0 { -R::INFINITY } else { self.largest };
        Denominator { largest, total: R::from_f64(self.total) }
    }
}

/// The gradient of a row's loss: scale · (softmax - ε / n - (1 - ε) · \[target\]).
#[derive(Clone, Copy)]
pub(super) struct Gradient<R> {
    shift: R,
    /// scale / total
    factor: R,
    /// scale · ε / n
    smooth: R,
    /// scale · (1 - ε)
    target: R,
}

impl<R: SimdFloat> Gradient<R> {
    /// `count`: the number of logits in the row.
    pub(super) fn new(denominator: Denominator<R>, scale: f64, smoothing: f64, count: usize) -> Self {
        let (smooth, target) = (scale * smoothing / count as f64, scale * (1.0 - smoothing));
        let (smooth, target) = (R::from_f64(smooth), R::from_f64(target));
        if denominator.total == R::ZERO {
            return Self { shift: R::ZERO, factor: R::ZERO, smooth, target };
        }
        Self { shift: denominator.largest, factor: R::from_f64(scale / denominator.total.to_f64()), smooth, target }
    }

    /// Puts the gradient in the place of some logits. `target`: the label's place among them, if it is one of them.
    pub(super) fn replace(&self, logits: &mut [R], target: Option<usize>) {
        instruction_set().dispatch(Replace { gradient: self, logits, target });
    }

    #[inline(always)]
    pub(super) fn replace_with<S: Simd>(&self, simd: S, logits: &mut [R], target: Option<usize>) {
        let whole = logits.len() / R::lanes::<S>() * R::lanes::<S>();
        let rest = self.vector(simd, last_logits::<R, S>(&logits[whole..]));
        for x in as_vectors_mut::<R, S>(logits) {
            *x = self.vector(simd, *x);
        }
        store_up_to::<R, S>(&mut logits[whole..], rest);
        if let Some(target) = target {
            logits[target] -= self.target;
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(&self, simd: S, logits: R::Vector<S>) -> R::Vector<S> {
        let power = exp::<R, S>(simd, R::vsub(simd, logits, R::splat(simd, self.shift)));
        let weight = R::vmul(simd, power, R::splat(simd, self.factor));
        R::vsub(simd, weight, R::splat(simd, self.smooth))
    }
}

struct Add<'a, R> {
    statistics: &'a mut Statistics<R>,
    logits: &'a [R],
    share: Option<R>,
}

impl<R: SimdFloat> WithSimd for Add<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.statistics.add_with(simd, self.logits, self.share);
    }
}

struct Replace<'a, R> {
    gradient: &'a Gradient<R>,
    logits: &'a mut [R],
    target: Option<usize>,
}

impl<R: SimdFloat> WithSimd for Replace<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.gradient.replace_with(simd, self.logits, self.target);
    }
}
