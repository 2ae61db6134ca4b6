//! From scores to weights, and the gradient back.

use pulp::Simd;

use super::micro::{Rows, VECTORS, load, store};
use super::real::Real;

/// e^(s - shift): exactly 1 where both are equal.
#[inline(always)]
pub(crate) fn exponential<R: Real, S: Simd>(simd: S, s: R::Vector<S>, shift: R::Vector<S>) -> R::Vector<S> {
    R::exp(simd, R::vsub(simd, s, shift))
}

/// p = e^(s - lse) in place of s, and ds = p ∘ (dp - δ) in place of dp; with dropout, p is then multiplied by its factors.
///
/// # Safety
///
/// `weights`, `grads` and `factors` have `count` rows of W numbers, `logsumexp` and `delta` W.
#[inline(always)]
pub(crate) unsafe fn weights_and_grads<R: Real, S: Simd>(
    simd: S,
    count: usize,
    logsumexp: *const R,
    delta: *const R,
    weights: Rows<*mut R>,
    grads: Rows<*mut R>,
    factors: Option<Rows<*mut R>>,
) {
    let lanes = R::lanes::<S>();
    // SAFETY: the caller has `count` rows of W numbers.
    unsafe {
        for v in 0..VECTORS {
            let logsumexp = load::<R, S>(logsumexp.add(v * lanes));
            let delta = load::<R, S>(delta.add(v * lanes));
            for j in 0..count {
                let weight = weights.start.add(j * weights.stride + v * lanes);
                let grad = grads.start.add(j * grads.stride + v * lanes);
                let p = exponential::<R, S>(simd, load::<R, S>(weight), logsumexp);
                let mut dp = load::<R, S>(grad);
                let mut dropped = p;
                if let Some(factors) = factors {
                    let factor = load::<R, S>(factors.start.add(j * factors.stride + v * lanes));
                    dp = R::vmul(simd, dp, factor);
                    dropped = R::vmul(simd, p, factor);
                }
                store::<R, S>(weight, dropped);
                store::<R, S>(grad, R::vmul(simd, p, R::vsub(simd, dp, delta)));
            }
        }
    }
}

/// ds ∘ (1 - tanh²) in place of ds: the derivative of the softcap.
///
/// # Safety
///
/// `tanh` and `grads` have `count` rows of W numbers.
#[inline(always)]
pub(crate) unsafe fn times_slope_of_tanh<R: Real, S: Simd>(
    simd: S,
    count: usize,
    tanh: Rows<*mut R>,
    grads: Rows<*mut R>,
) {
    let lanes = R::lanes::<S>();
    let one = R::splat(simd, R::ONE);
    for j in 0..count {
        for v in 0..VECTORS {
            // SAFETY: as the caller promises.
            unsafe {
                let tanh = load::<R, S>(tanh.start.add(j * tanh.stride + v * lanes));
                let grad = grads.start.add(j * grads.stride + v * lanes);
                let slope = R::vsub(simd, one, R::vmul(simd, tanh, tanh));
                store::<R, S>(grad, R::vmul(simd, load::<R, S>(grad), slope));
            }
        }
    }
}
