//! The exponential and the hyperbolic tangent of a vector.

use pulp::Simd;

use crate::simd::SimdFloat;

/// Coefficients of e^r on [-ln(2)/2, ln(2)/2], which start with 1 and 1 so that e^0 is 1. These have the least relative error
/// that a polynomial of degree 6 can have, 2^-28: enough for f32.
const EXP_F32: [f64; 7] = [
    1.0,
    1.0,
    0.499_999_934_477_791_7,
    0.166_665_206_316_273_3,
    0.041_668_388_048_833_58,
    0.008_368_716_887_333_726,
    0.001_381_459_847_470_997,
];

/// Coefficients 1 / i! of e^r for f64: the terms behind the last are below 2^-57.
const EXP_F64: [f64; 14] = {
    let mut coefficients = [1.0; 14];
    let mut i = 1;
    while i < 14 {
        coefficients[i] = coefficients[i - 1] / i as f64;
        i += 1;
    }
    coefficients
};

/// e^x, and 0 where that would be denormal. Wrong where e^x overflows.
#[inline(always)]
pub(crate) fn exp<R: SimdFloat, S: Simd>(simd: S, x: R::Vector<S>) -> R::Vector<S> {
    use std::f64::consts::{LN_2, LOG2_E};
    macro_rules! splat {
        ($x:expr) => {
            R::splat(simd, R::from_f64($x))
        };
    }
    let coefficients = if R::MANTISSA_BITS == <f32 as SimdFloat>::MANTISSA_BITS { &EXP_F32[..] } else { &EXP_F64[..] };
    // x = r + n · ln(2). Adding 1.5 · 2^mantissa rounds x · log2(e) to the integer n and leaves n in the lowest bits.
    let magic = splat!(1.5 * (1u64 << R::MANTISSA_BITS) as f64);
    let shifted = R::mul_add(simd, x, splat!(LOG2_E), magic);
    let n = R::vsub(simd, shifted, magic);
    let r = R::mul_add(simd, n, splat!(-LN_2), x);
    let mut power = splat!(coefficients[coefficients.len() - 1]);
    let mut i = coefficients.len() - 1;
    while i > 0 {
        i -= 1;
        power = R::mul_add(simd, power, r, splat!(coefficients[i]));
    }
    // e^x = e^r · 2^n
    let result = R::add_to_exponent(simd, power, shifted);
    let lowest = R::splat(simd, R::from_f64(R::MIN_EXPONENT) * R::from_f64(LN_2));
    // NaN is not less than `lowest`, and stays.
    R::select_less(simd, x, lowest, R::splat(simd, R::ZERO), result)
}

/// tanh(x), to within a few units in the last place.
///
/// Source: Moshier, "Methods and Programs for Mathematical Functions" (1989), and its Cephes library: near 0 a rational
/// approximation, elsewhere 1 - 2 / (e^(2|x|) + 1).
#[inline(always)]
pub(crate) fn tanh<R: SimdFloat, S: Simd>(simd: S, x: R::Vector<S>) -> R::Vector<S> {
    const NEAR_ZERO: f64 = 0.625;
    // From here on, tanh is 1 to the last bit of an f64.
    const LARGEST: f64 = 20.0;
    const NUMERATOR: [f64; 3] = [-1.614_687_684_417_084_5e3, -9.928_772_310_019_185e1, -9.643_991_794_250_523e-1];
    const DENOMINATOR: [f64; 4] = [4.844_063_053_251_255e3, 2.235_488_390_601_004_5e3, 1.128_116_784_916_329_3e2, 1.0];
    macro_rules! splat {
        ($x:expr) => {
            R::splat(simd, R::from_f64($x))
        };
    }
    let zero = splat!(0.0);
    let magnitude = R::select_less(simd, x, zero, R::vsub(simd, zero, x), x);
    let beyond = R::vsub(simd, splat!(LARGEST), magnitude);
    let bounded = R::select_less(simd, beyond, zero, splat!(LARGEST), magnitude);

    let square = R::vmul(simd, bounded, bounded);
    let mut numerator = splat!(NUMERATOR[2]);
    numerator = R::mul_add(simd, numerator, square, splat!(NUMERATOR[1]));
    numerator = R::mul_add(simd, numerator, square, splat!(NUMERATOR[0]));
    let mut denominator = splat!(DENOMINATOR[3]);
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[2]));
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[1]));
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[0]));
    let cube = R::vmul(simd, bounded, square);
    let near_zero = R::mul_add(simd, cube, R::vdiv(simd, numerator, denominator), bounded);

    let power = exp::<R, S>(simd, R::vadd(simd, bounded, bounded));
    let share = R::vdiv(simd, splat!(2.0), R::vadd(simd, power, splat!(1.0)));
    let elsewhere = R::vsub(simd, splat!(1.0), share);

    let is_near = R::vsub(simd, bounded, splat!(NEAR_ZERO));
    let result = R::select_less(simd, is_near, zero, near_zero, elsewhere);
    R::select_less(simd, x, zero, R::vsub(simd, zero, result), result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{as_vectors, with_every_simd};

    /// Miri gives exp and tanh of the standard library a random error.
    const SLACK: f64 = if cfg!(miri) { 50.0 } else { 1.0 };

    #[test]
    fn tanh_is_that_of_the_standard_library() {
        let step = if cfg!(miri) { 97 } else { 1 };
        for i in (-3000..=3000).step_by(step) {
            let x = f64::from(i) / 100.0;
            let (single, double) = (tanh::<f32, _>(pulp::Scalar, x as f32), tanh::<f64, _>(pulp::Scalar, x));
            assert!(
                (f64::from(single) - f64::from(x as f32).tanh()).abs() <= SLACK * 2e-7 * x.tanh().abs(),
                "{x}: {single}"
            );
            assert!((double - x.tanh()).abs() <= SLACK * 4e-16 * x.tanh().abs(), "{x}: {double}");
        }
        assert!(tanh::<f32, _>(pulp::Scalar, f32::NAN).is_nan());
        assert_eq!(tanh::<f32, _>(pulp::Scalar, f32::NEG_INFINITY), -1.0);
    }

    #[test]
    fn exp_is_that_of_the_standard_library() {
        fn check<R: SimdFloat, S: Simd>(simd: S, precision: f64) {
            for i in (-700..=80).step_by(if cfg!(miri) { 100 } else { 1 }) {
                let x = R::from_f64(f64::from(i) * R::MIN_EXPONENT.abs() / 1022.0);
                let power = exp::<R, S>(simd, R::splat(simd, x));
                let power = pulp::bytemuck::cast_slice::<R::Vector<S>, R>(std::slice::from_ref(&power))[0].to_f64();
                // Where multiplication and addition are not fused, n · ln(2) is rounded: far from 0, some is lost.
                let precision = SLACK * precision * (1.0 + x.to_f64().abs());
                assert!((power - x.to_f64().exp()).abs() <= precision * x.to_f64().exp(), "{}: {power}", x.to_f64());
            }
            let special = [-R::INFINITY, R::ZERO, R::from_f64(f64::NAN), R::from_f64(-1e4)];
            let [none, one, nan, small] = special.map(|x| {
                let power = exp::<R, S>(simd, R::splat(simd, x));
                pulp::bytemuck::cast_slice::<R::Vector<S>, R>(std::slice::from_ref(&power))[0].to_f64()
            });
            assert_eq!((none, one, small), (0.0, 1.0, 0.0));
            assert!(nan.is_nan());
            assert_eq!(as_vectors::<R, S>(&[R::ZERO; 64]).len(), 64 / R::lanes::<S>());
        }
        with_every_simd!(|simd| {
            check::<f32, S>(simd, 2e-7);
            check::<f64, S>(simd, 5e-16);
        });
    }

    #[test]
    fn constants_of_f32_are_those_of_f64_rounded_once() {
        use std::f64::consts::{LN_2, LOG2_E};
        assert_eq!(LN_2 as f32, std::f32::consts::LN_2);
        assert_eq!(LOG2_E as f32, std::f32::consts::LOG2_E);
    }
}
