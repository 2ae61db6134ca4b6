//! What the kernels compute in, f32 or f64, as vectors of any instruction set.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

use pulp::Simd;

use super::micro::Rows;
#[cfg(target_arch = "x86_64")]
use super::transpose::transpose_8x8;

/// A type to compute in. All vector functions work lane by lane; NaN in one lane stays there.
pub(crate) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + 'static
{
    /// One register of the instruction set `S`.
    type Vector<S: Simd>: Copy;

    const ZERO: Self;
    const ONE: Self;
    /// Where a running maximum starts: a number below every score that can be told from minus infinity, whose distance to
    /// any of them is finite.
    const LOWEST: Self;
    const INFINITY: Self;

    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn is_finite(self) -> bool {
        // Infinity times zero is NaN.
        self * Self::ZERO == Self::ZERO
    }

    /// Numbers in a vector.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    fn vadd<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vsub<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vmul<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a · b + c
    fn mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// The greater; `a` where `b` is NaN.
    fn max<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `b` where a number of `x` is negative, else `a`.
    fn if_negative<S: Simd>(simd: S, x: Self::Vector<S>, b: Self::Vector<S>, a: Self::Vector<S>) -> Self::Vector<S>;
    /// `b` where a number of `x` is zero, else `a`.
    fn if_zero<S: Simd>(simd: S, x: Self::Vector<S>, b: Self::Vector<S>, a: Self::Vector<S>) -> Self::Vector<S>;
    fn vdiv<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The sum of a vector's numbers.
    fn reduce_add<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
    /// The greatest of a vector's numbers, of which none is NaN.
    fn reduce_max<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
    /// e^x, and 0 where that would be denormal. Not for x that overflow.
    fn exp<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;

    /// Whether [`Real::transpose_square`] can be called.
    fn transposes_squares() -> bool {
        false
    }
    /// to[c][r] = factor · from[r][c], or with `ADD` that much more, for 8 rows of 8.
    ///
    /// # Safety
    ///
    /// Both have 8 rows of 8 and don't overlap, and `transposes_squares` says yes.
    unsafe fn transpose_square<const ADD: bool>(_: Self, _: Rows<*const Self>, _: Rows<*mut Self>) {}
}

/// Coefficients of e^r on [-ln(2)/2, ln(2)/2], which start with 1 and 1 so that e^0 is 1. For f32, those of the least relative
/// error, 2^-28, that a polynomial of degree 6 can have.
const EXP_F32: [f64; 7] = [
    1.0,
    1.0,
    0.499_999_934_477_791_7,
    0.166_665_206_316_273_3,
    0.041_668_388_048_833_58,
    0.008_368_716_887_333_726,
    0.001_381_459_847_470_997,
];
/// For f64, 1 / i!: what is cut off is below 2^-57.
const EXP_F64: [f64; 14] = {
    let mut coefficients = [1.0; 14];
    let mut i = 1;
    while i < 14 {
        coefficients[i] = coefficients[i - 1] / i as f64;
        i += 1;
    }
    coefficients
};

macro_rules! real {
    ($real:ident, $coefficients:expr, $mantissa:expr, $lowest_exponent:expr,
     $vector:ident, $splat:ident, $splat_bits:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, $mul_add:ident,
     $less:ident, $equal:ident, $select:ident, $reduce_add:ident, $reduce_max:ident, $to_bits:ident, $from_bits:ident, $shift:ident by $shift_by:expr, $add_bits:ident; $($special:tt)*) => {
        impl Real for $real {
            type Vector<S: Simd> = S::$vector;

            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = $real::MIN / 2.0;
            const INFINITY: Self = $real::INFINITY;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $real
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn vadd<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn vsub<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$sub(a, b)
            }
            #[inline(always)]
            fn vmul<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
            #[inline(always)]
            fn max<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$select(simd.$less(a, b), b, a)
            }
            #[inline(always)]
            fn if_zero<S: Simd>(simd: S, x: S::$vector, b: S::$vector, a: S::$vector) -> S::$vector {
                simd.$select(simd.$equal(x, simd.$splat(0.0)), b, a)
            }
            #[inline(always)]
            fn vdiv<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$div(a, b)
            }
            #[inline(always)]
            fn if_negative<S: Simd>(simd: S, x: S::$vector, b: S::$vector, a: S::$vector) -> S::$vector {
                simd.$select(simd.$less(x, simd.$splat(0.0)), b, a)
            }
            #[inline(always)]
            fn reduce_add<S: Simd>(simd: S, x: S::$vector) -> $real {
                simd.$reduce_add(x)
            }
            #[inline(always)]
            fn reduce_max<S: Simd>(simd: S, x: S::$vector) -> $real {
                simd.$reduce_max(x)
            }
            #[inline(always)]
            fn exp<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                use std::$real::consts::{LN_2, LOG2_E};
                // x = r + n · ln(2). Adding 1.5 · 2^mantissa rounds x · log2(e) to the integer n and leaves n in the lowest bits.
                let magic = simd.$splat(1.5 * (1u64 << $mantissa) as $real);
                let shifted = simd.$mul_add(x, simd.$splat(LOG2_E), magic);
                let n = simd.$sub(shifted, magic);
                let r = simd.$mul_add(n, simd.$splat(-LN_2), x);
                let mut power = simd.$splat($coefficients[$coefficients.len() - 1] as $real);
                let mut i = $coefficients.len() - 1;
                while i > 0 {
                    i -= 1;
                    power = simd.$mul_add(power, r, simd.$splat($coefficients[i] as $real));
                }
                // e^x = e^r · 2^n: n is added to the exponent.
                let n = simd.$shift(simd.$to_bits(shifted), simd.$splat_bits($shift_by));
                let result = simd.$from_bits(simd.$add_bits(simd.$to_bits(power), n));
                // Written so that NaN is not less, and stays.
                let lowest = simd.$splat($lowest_exponent * LN_2);
                simd.$select(simd.$less(x, lowest), simd.$splat(0.0), result)
            }
            $($special)*
        }
    };
}

real!(
    f32, EXP_F32, 23, -126.0, f32s, splat_f32s, splat_u32s, add_f32s, sub_f32s, mul_f32s, div_f32s, mul_add_e_f32s,
    less_than_f32s, equal_f32s, select_f32s, reduce_sum_f32s, reduce_max_f32s, transmute_u32s_f32s, transmute_f32s_u32s, wrapping_dyn_shl_u32s by 23, add_u32s;

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn transposes_squares() -> bool {
        std::arch::is_x86_feature_detected!("avx")
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn transpose_square<const ADD: bool>(factor: f32, from: Rows<*const f32>, to: Rows<*mut f32>) {
        // SAFETY: as the caller promises.
        unsafe { transpose_8x8::<ADD>(factor, from, to) }
    }
);
real!(
    f64, EXP_F64, 52, -1022.0, f64s, splat_f64s, splat_u64s, add_f64s, sub_f64s, mul_f64s, div_f64s, mul_add_e_f64s,
    less_than_f64s, equal_f64s, select_f64s, reduce_sum_f64s, reduce_max_f64s, transmute_u64s_f64s, transmute_f64s_u64s, mul_u64s by 1 << 52, add_u64s;
);
