//! The activation functions and their derivatives, as vectors.

use pulp::Simd;

use crate::math::exp;
use crate::pointwise::Pointwise;
use crate::simd::SimdFloat;

/// An activation function. A finite number never gives NaN.
pub(super) trait Function<R: SimdFloat>: Copy + Send + Sync {
    /// f(x) and f'(x), which share most of their work.
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>);
    /// f(x)
    #[inline(always)]
    fn value<S: Simd>(self, simd: S, x: R::Vector<S>) -> R::Vector<S> {
        self.both(simd, x).0
    }
    /// f'(x)
    #[inline(always)]
    fn derivative<S: Simd>(self, simd: S, x: R::Vector<S>) -> R::Vector<S> {
        self.both(simd, x).1
    }
}

#[derive(Clone, Copy)]
pub(super) struct Relu;
#[derive(Clone, Copy)]
pub(super) struct SquaredRelu;
#[derive(Clone, Copy)]
pub(super) struct Gelu;
#[derive(Clone, Copy)]
pub(super) struct GeluTanh;
#[derive(Clone, Copy)]
pub(super) struct Silu;

/// A constant in every lane.
macro_rules! splat {
    ($simd:ident, $x:expr) => {
        R::splat($simd, R::from_f64($x))
    };
}

impl<R: SimdFloat> Function<R> for Relu {
    #[inline(always)]
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        let value = R::max(simd, x, splat!(simd, 0.0));
        (value, R::select_zero(simd, value, splat!(simd, 0.0), splat!(simd, 1.0)))
    }
}

/// `y`, but the largest finite number where `y` has overflowed and `x` has not: infinity times zero would be NaN.
#[inline(always)]
fn at_most_largest<R: SimdFloat, S: Simd>(simd: S, y: R::Vector<S>, x: R::Vector<S>) -> R::Vector<S> {
    let (largest, infinity) = (R::splat(simd, -R::LOWEST), R::splat(simd, R::INFINITY));
    let bounded = R::select_less(simd, largest, y, largest, y);
    R::select_less(simd, x, infinity, bounded, y)
}

impl<R: SimdFloat> Function<R> for SquaredRelu {
    #[inline(always)]
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        let positive = R::max(simd, x, splat!(simd, 0.0));
        let (value, derivative) = (R::vmul(simd, positive, positive), R::vadd(simd, positive, positive));
        (at_most_largest::<R, S>(simd, value, positive), at_most_largest::<R, S>(simd, derivative, positive))
    }
}

/// Coefficients of Φ(-x) · e^(x²/2) · (x + 4) for x in [0, 14], in powers of (x - 4) / (x + 4): relative error 2^-26. Beyond 14,
/// e^(-x²/2) is 0 in f32. The polynomials interpolate at Chebyshev's points; 4 and 5 give the smallest error of their degrees.
const TAIL_F32: (f64, [f64; 10]) = (
    4.0,
    [
        0.755_285_138_322_772_2,
        -0.607_896_618_282_269_2,
        0.387_136_684_085_772_56,
        -0.186_522_684_909_987_9,
        0.060_406_688_729_805_27,
        -0.007_529_250_703_098_626_5,
        -0.003_526_183_700_390_036_8,
        0.001_572_317_879_442_563,
        0.000_201_261_730_284_046_75,
        -0.000_120_184_401_101_443_62,
    ],
);

/// The same for f64 on [0, 39], with 5 in place of 4: relative error 2^-56.
const TAIL_F64: (f64, [f64; 23]) = (
    5.0,
    [
        0.769_193_049_750_063,
        -0.665_382_502_890_056_7,
        0.495_305_615_969_976_4,
        -0.313_533_156_671_304_55,
        0.165_020_366_170_384_7,
        -0.069_118_638_706_310_16,
        0.020_795_066_799_883_178,
        -0.002_993_376_770_508_542_2,
        -0.000_797_869_398_466_070_1,
        0.000_544_899_064_773_129_8,
        -5.937_572_800_991_586e-5,
        -4.976_281_427_058_58e-5,
        1.668_121_374_204_206_3e-5,
        3.980_902_157_868_041_4e-6,
        -2.769_267_095_997_46e-6,
        -3.366_153_681_012_471e-7,
        4.331_410_356_862_585e-7,
        4.227_499_374_006_534_6e-8,
        -6.594_221_662_477_223e-8,
        -9.313_560_994_325_06e-9,
        7.663_071_800_760_04e-9,
        1.753_048_401_408_232e-9,
        -1.587_746_882_747_346_5e-10,
    ],
);

/// Φ(x), the distribution function of the normal distribution, and e^(-x²/2).
///
/// The tail Φ(-|x|) is e^(-x²/2) times a function that falls slowly, which is a polynomial in (|x| - a) / (|x| + a), divided by
/// |x| + a. So the tail has its digits too, where 1 + erf(x / √2) would lose them.
///
/// Source of the variable: Schonfelder, "Chebyshev Expansions for the Error and Related Functions" (1978), section 3.
#[inline(always)]
fn normal<R: SimdFloat, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
    let is_f32 = R::MANTISSA_BITS == <f32 as SimdFloat>::MANTISSA_BITS;
    let (a, coefficients) = if is_f32 { (TAIL_F32.0, &TAIL_F32.1[..]) } else { (TAIL_F64.0, &TAIL_F64.1[..]) };
    let (zero, one) = (splat!(simd, 0.0), splat!(simd, 1.0));
    let magnitude = R::select_less(simd, x, zero, R::vsub(simd, zero, x), x);
    let density = exp::<R, S>(simd, R::vmul(simd, R::vmul(simd, x, splat!(simd, -0.5)), x));
    let share = R::vdiv(simd, one, R::vadd(simd, magnitude, splat!(simd, a)));
    let u = R::mul_add(simd, share, splat!(simd, -2.0 * a), one);
    let mut sum = splat!(simd, coefficients[coefficients.len() - 1]);
    let mut i = coefficients.len() - 1;
    while i > 0 {
        i -= 1;
        sum = R::mul_add(simd, sum, u, splat!(simd, coefficients[i]));
    }
    let tail = R::vmul(simd, R::vmul(simd, sum, share), density);
    (R::select_less(simd, x, zero, tail, R::vsub(simd, one, tail)), density)
}

impl<R: SimdFloat> Function<R> for Gelu {
    #[inline(always)]
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        const PEAK: f64 = 0.398_942_280_401_432_7; // 1 / sqrt(2 π)
        let (share, density) = normal::<R, S>(simd, x);
        let slope = R::mul_add(simd, R::vmul(simd, x, splat!(simd, PEAK)), density, share);
        (R::vmul(simd, x, share), slope)
    }
}

/// σ(x) = 1 / (1 + e^-x) and σ(-x). Both have all of their digits, and neither overflows.
#[inline(always)]
fn sigmoid<R: SimdFloat, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
    let (zero, one) = (splat!(simd, 0.0), splat!(simd, 1.0));
    let negative = R::select_less(simd, x, zero, x, R::vsub(simd, zero, x));
    let power = exp::<R, S>(simd, negative);
    let large = R::vdiv(simd, one, R::vadd(simd, one, power));
    let small = R::vmul(simd, power, large);
    (R::select_less(simd, x, zero, small, large), R::select_less(simd, x, zero, large, small))
}

impl<R: SimdFloat> Function<R> for Silu {
    #[inline(always)]
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        let (share, rest) = sigmoid::<R, S>(simd, x);
        // (x · σ)' = σ + x · σ · (1 - σ)
        let value = R::vmul(simd, x, share);
        (value, R::mul_add(simd, value, rest, share))
    }
}

impl<R: SimdFloat> Function<R> for GeluTanh {
    #[inline(always)]
    fn both<S: Simd>(self, simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        // 2 · sqrt(2 / π), and that times 0.044715.
        const LINEAR: f64 = 1.595_769_121_605_730_7;
        const CUBIC: f64 = 0.071_354_816_272_600_25;
        // From here on σ is 0 or 1 to the last bit of an f64. Cubes of larger numbers would overflow.
        const LARGEST: f64 = 30.0;
        let bounded = R::max(simd, x, splat!(simd, -LARGEST));
        let bounded = R::select_less(simd, splat!(simd, LARGEST), bounded, splat!(simd, LARGEST), bounded);
        // (1 + tanh(y)) / 2 is σ(2 y).
        let square = R::vmul(simd, bounded, bounded);
        let scaled = R::mul_add(simd, square, splat!(simd, CUBIC), splat!(simd, LINEAR));
        let (share, rest) = sigmoid::<R, S>(simd, R::vmul(simd, scaled, bounded));
        let inner_slope = R::mul_add(simd, square, splat!(simd, 3.0 * CUBIC), splat!(simd, LINEAR));
        let product = R::vmul(simd, R::vmul(simd, bounded, share), rest);
        (R::vmul(simd, x, share), R::mul_add(simd, product, inner_slope, share))
    }
}

/// f(x)
#[derive(Clone, Copy)]
pub(super) struct Value<F>(pub(super) F);

impl<R: SimdFloat, F: Function<R>> Pointwise<R, 1, 1> for Value<F> {
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S, [x]: [R::Vector<S>; 1]) -> [R::Vector<S>; 1] {
        [self.0.value(simd, x)]
    }
}

/// f'(x) · grad
#[derive(Clone, Copy)]
pub(super) struct Gradient<F>(pub(super) F);

impl<R: SimdFloat, F: Function<R>> Pointwise<R, 2, 1> for Gradient<F> {
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S, [x, grad]: [R::Vector<S>; 2]) -> [R::Vector<S>; 1] {
        [R::vmul(simd, self.0.derivative(simd, x), grad)]
    }
}

/// f(gate) · up
#[derive(Clone, Copy)]
pub(super) struct Gated<F>(pub(super) F);

impl<R: SimdFloat, F: Function<R>> Pointwise<R, 2, 1> for Gated<F> {
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S, [gate, up]: [R::Vector<S>; 2]) -> [R::Vector<S>; 1] {
        [R::vmul(simd, self.0.value(simd, gate), up)]
    }
}

/// f'(gate) · up · grad and f(gate) · grad
#[derive(Clone, Copy)]
pub(super) struct GatedGradient<F>(pub(super) F);

impl<R: SimdFloat, F: Function<R>> Pointwise<R, 3, 2> for GatedGradient<F> {
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S, [gate, up, grad]: [R::Vector<S>; 3]) -> [R::Vector<S>; 2] {
        let (value, derivative) = self.0.both(simd, gate);
        [R::vmul(simd, R::vmul(simd, derivative, up), grad), R::vmul(simd, value, grad)]
    }
}
