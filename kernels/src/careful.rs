//! The careful pass: what is computed again where a result of the fast pass is not finite.
//!
//! The fast pass doesn't look at its numbers. Its results can be infinite or NaN although those of the formula are not:
//!
//! - A hidden key has a weight of zero, but zero times infinity is NaN. What a mask hides, or a bias of minus infinity, may hold
//!   anything, and must not change a result.
//! - A context is a mean of values, but the fast pass divides by the total last. A sum of large values overflows before that. The
//!   gradients are sums as well, of which the scale is taken last.
//!
//! The careful pass adds nothing where a weight is zero ([`nan_safe`](crate::gemm::nan_safe)). There the weight of a visible key is
//! above zero, however low its score, so that NaN in a visible key still shows. The pass multiplies the terms of its
//! sums by a power of two, so small that no sum overflows, and the sums by its inverse. It is slow, so it is taken only if a
//! result is not finite. Its results take the place of those that are not finite; the others stay what they are. A result that
//! is still not finite comes from a visible key, or is too large for its type.

use crate::simd::SimdFloat;

/// A mean of finite numbers, which rounding may have made infinite.
#[inline(always)]
pub(crate) fn bounded<R: SimdFloat>(mean: R) -> R {
    if mean == R::INFINITY {
        -R::LOWEST
    } else if mean == -R::INFINITY {
        R::LOWEST
    } else {
        mean
    }
}

/// sum · inverse. With `is_mean` it is a mean of numbers that are finite if the sum is.
#[inline(always)]
pub(crate) fn quotient<R: SimdFloat>(sum: R, inverse: R, is_mean: bool) -> R {
    let quotient = sum * inverse;
    if is_mean && sum.is_finite() { bounded(quotient) } else { quotient }
}

/// How much smaller the careful backward pass makes its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Headroom {
    /// The gradient of the context is divided by 2^grads, and with it every gradient.
    pub(crate) grads: i32,
    /// The gradients of the scores are divided by 2^scores as well.
    pub(crate) scores: i32,
}

/// The exponent of the least power of two that is at least `x`. Of zero, and of what isn't finite, it is zero.
pub(crate) fn exponent_above(x: f64) -> i32 {
    if x > 0.0 && x.is_finite() { x.log2().ceil() as i32 } else { 0 }
}

/// x · 2^n, also where 2^n itself is not representable.
pub(crate) fn times_power_of_two<R: SimdFloat>(mut x: R, mut n: i32) -> R {
    // Both 2^step and 2^-step are normal numbers.
    let step = R::MAX_EXPONENT - 1;
    while n != 0 {
        let part = n.clamp(-step, step);
        x *= R::from_f64(2f64.powi(part));
        n -= part;
    }
    x
}

/// Puts the numbers of the fast pass that are finite in the place of those of the careful pass.
pub(crate) fn keep_finite<T: Copy>(fast: &[T], careful: &mut [T], is_finite: impl Fn(T) -> bool) {
    for (&fast, careful) in fast.iter().zip(careful) {
        if is_finite(fast) {
            *careful = fast;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_beyond_the_type_are_taken_in_steps() {
        assert_eq!(times_power_of_two(2f32.powi(-140), 260), 2f32.powi(120));
        assert_eq!(times_power_of_two(2f64.powi(1000), -2000), 2f64.powi(-1000));
        assert_eq!(times_power_of_two(3f32, 200), f32::INFINITY);
        assert_eq!(times_power_of_two(0.75f64, 0), 0.75);
    }

    #[test]
    fn exponent_is_that_of_the_next_power_of_two() {
        let exponents = [1.0, 1.5, 2.0, 0.3, 0.0, f64::INFINITY, f64::NAN, f64::MAX].map(exponent_above);
        assert_eq!(exponents, [0, 1, 1, -1, 0, 0, 0, 1024]);
    }

    #[test]
    fn rounding_makes_no_mean_infinite() {
        assert_eq!(bounded(f32::INFINITY), f32::MAX);
        assert_eq!(bounded(f64::NEG_INFINITY), f64::MIN);
        assert_eq!(bounded(3.0f32), 3.0);
        assert!(bounded(f32::NAN).is_nan());
    }

    #[test]
    fn finite_numbers_of_the_fast_pass_stay() {
        let mut careful = [1.0, 2.0, f32::NAN];
        keep_finite(&[5.0, f32::INFINITY, 6.0], &mut careful, |x| x.is_finite());
        assert_eq!(careful, [5.0, 2.0, 6.0]);
    }
}
