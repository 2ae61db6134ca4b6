//! What the kernels compute in, f32 or f64, as vectors of any instruction set.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};
use std::sync::OnceLock;

use pulp::bytemuck::{Pod, cast_slice, cast_slice_mut};
use pulp::{Arch, Simd};

/// The most numbers in a vector of any instruction set: 16 f32 or u32 of AVX-512.
pub(crate) const MAX_LANES: usize = 16;

/// The most that the environment variable `CANDLE_ATTENTION_SIMD` allows, from least to most. Each is used if the processor has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Allowed {
    Scalar,
    Avx2,
    Avx512,
    /// Products of bf16 in pairs, too.
    Avx512Bf16,
    /// AMX's tile registers, and whatever other processors have.
    All,
}

/// What the environment allows. Miri interprets the scalar kernels.
pub(crate) fn allowed() -> Allowed {
    static ALLOWED: OnceLock<Allowed> = OnceLock::new();
    if cfg!(miri) {
        return Allowed::Scalar;
    }
    *ALLOWED.get_or_init(|| match std::env::var("CANDLE_ATTENTION_SIMD").as_deref() {
        Ok("scalar") => Allowed::Scalar,
        Ok("avx2") => Allowed::Avx2,
        Ok("avx512") => Allowed::Avx512,
        Ok("avx512bf16") => Allowed::Avx512Bf16,
        _ => Allowed::All,
    })
}

/// The instruction set of vectors: the best that this processor has and the environment allows.
pub(crate) fn instruction_set() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match allowed() {
        Allowed::Scalar => Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Allowed::Avx2 => pulp::x86::V3::try_new().map_or(Arch::new(), Arch::V3),
        _ => Arch::new(),
    })
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A type to compute in: f32 or f64. All vector functions work lane by lane; NaN in one lane stays there.
#[doc(hidden)] // its functions are for the kernels
#[allow(missing_docs)] // hidden
pub trait SimdFloat:
    sealed::Sealed
    + Pod
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
{
    /// One register of the instruction set `S`: `lanes` numbers and nothing else.
    type Vector<S: Simd>: Pod;

    const ZERO: Self;
    const ONE: Self;
    /// The lowest finite number, where a running maximum starts. A score of minus infinity is infinitely far below it, so that
    /// its exponential is zero even in a row that has no other score.
    const LOWEST: Self;
    const INFINITY: Self;
    /// The smallest normal number.
    const TINY: Self;
    /// The largest power of two is 2^MAX_EXPONENT.
    const MAX_EXPONENT: i32;
    /// Bits of the mantissa, without the one that isn't stored.
    const MANTISSA_BITS: u32;
    /// The exponent of the smallest normal number.
    const MIN_EXPONENT: f64;

    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    #[inline(always)]
    fn is_finite(self) -> bool {
        // Infinity times zero is NaN.
        self * Self::ZERO == Self::ZERO
    }

    /// Numbers in a vector.
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        const { assert!(size_of::<Self::Vector<S>>() <= MAX_LANES * size_of::<Self>()) };
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    fn vadd<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vsub<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vmul<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vdiv<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vsqrt<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// a · b + c
    fn mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// The greater number; `a` where `b` is NaN.
    fn max<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a` where `x < y`, else `b`.
    fn select_less<S: Simd>(
        simd: S,
        x: Self::Vector<S>,
        y: Self::Vector<S>,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// `a` where `x` is zero, else `b`.
    fn select_zero<S: Simd>(simd: S, x: Self::Vector<S>, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// x · 2^n, where n are the lowest bits of `n`, as a sum of exponents.
    fn add_to_exponent<S: Simd>(simd: S, x: Self::Vector<S>, n: Self::Vector<S>) -> Self::Vector<S>;
    /// The sum of a vector's numbers.
    fn reduce_add<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
    /// The sum of each vector's numbers. The order of a sum isn't that of [`SimdFloat::reduce_add`].
    #[inline(always)]
    fn reduce_add_four<S: Simd>(simd: S, vectors: [Self::Vector<S>; 4]) -> [Self; 4] {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if let Some(sums) = x86::reduce_add_four(simd, &vectors) {
            return sums;
        }
        let [a, b, c, d] = vectors;
        [Self::reduce_add(simd, a), Self::reduce_add(simd, b), Self::reduce_add(simd, c), Self::reduce_add(simd, d)]
    }
    /// The greatest of a vector's numbers, of which none is NaN.
    fn reduce_max<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86 {
    use std::any::TypeId;
    use std::arch::x86_64::*;
    use std::mem::transmute_copy;

    use pulp::Simd;
    use pulp::x86::{V3, V4};

    use super::SimdFloat;

    /// The sum of each vector's numbers, if they are f32 and the vectors those of AVX2 or AVX-512.
    #[inline(always)]
    pub fn reduce_add_four<R: SimdFloat, S: Simd>(_: S, vectors: &[R::Vector<S>; 4]) -> Option<[R; 4]> {
        let simd = TypeId::of::<S>();
        if TypeId::of::<R>() != TypeId::of::<f32>() {
            return None;
        }
        // SAFETY: the types are those that are asked for, and a value of S is the proof that the processor has AVX.
        unsafe {
            if simd == TypeId::of::<V3>() {
                Some(transmute_copy(&sums_of_eight(transmute_copy(vectors))))
            } else if simd == TypeId::of::<V4>() {
                Some(transmute_copy(&sums_of_sixteen(transmute_copy(vectors))))
            } else {
                None
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn sums_of_eight([a, b, c, d]: [__m256; 4]) -> __m128 {
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    fn sums_of_sixteen([a, b, c, d]: [[__m256; 2]; 4]) -> __m128 {
        sums_of_eight([
            _mm256_add_ps(a[0], a[1]),
            _mm256_add_ps(b[0], b[1]),
            _mm256_add_ps(c[0], c[1]),
            _mm256_add_ps(d[0], d[1]),
        ])
    }
}

macro_rules! simd_float {
    ($float:ident, $mantissa_bits:expr, $min_exponent:expr,
     $vector:ident, $splat:ident, $splat_bits:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, $sqrt:ident, $mul_add:ident,
     $less:ident, $equal:ident, $select:ident, $reduce_add:ident, $reduce_max:ident, $to_bits:ident, $from_bits:ident, $shift:ident by $shift_by:expr, $add_bits:ident) => {
        impl SimdFloat for $float {
            type Vector<S: Simd> = S::$vector;

            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = $float::MIN;
            const INFINITY: Self = $float::INFINITY;
            const TINY: Self = $float::MIN_POSITIVE;
            const MAX_EXPONENT: i32 = $float::MAX_EXP - 1;
            const MANTISSA_BITS: u32 = $mantissa_bits;
            const MIN_EXPONENT: f64 = $min_exponent;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $float
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
            fn vdiv<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$div(a, b)
            }
            #[inline(always)]
            fn vsqrt<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                simd.$sqrt(x)
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
            fn select_less<S: Simd>(simd: S, x: S::$vector, y: S::$vector, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$select(simd.$less(x, y), a, b)
            }
            #[inline(always)]
            fn select_zero<S: Simd>(simd: S, x: S::$vector, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$select(simd.$equal(x, simd.$splat(0.0)), a, b)
            }
            #[inline(always)]
            fn add_to_exponent<S: Simd>(simd: S, x: S::$vector, n: S::$vector) -> S::$vector {
                let n = simd.$shift(simd.$to_bits(n), simd.$splat_bits($shift_by));
                simd.$from_bits(simd.$add_bits(simd.$to_bits(x), n))
            }
            #[inline(always)]
            fn reduce_add<S: Simd>(simd: S, x: S::$vector) -> $float {
                simd.$reduce_add(x)
            }
            #[inline(always)]
            fn reduce_max<S: Simd>(simd: S, x: S::$vector) -> $float {
                simd.$reduce_max(x)
            }
        }
    };
}

simd_float!(
    f32, 23, -126.0, f32s, splat_f32s, splat_u32s, add_f32s, sub_f32s, mul_f32s, div_f32s, sqrt_f32s, mul_add_e_f32s,
    less_than_f32s, equal_f32s, select_f32s, reduce_sum_f32s, reduce_max_f32s, transmute_u32s_f32s, transmute_f32s_u32s, wrapping_dyn_shl_u32s by 23, add_u32s
);
simd_float!(
    f64, 52, -1022.0, f64s, splat_f64s, splat_u64s, add_f64s, sub_f64s, mul_f64s, div_f64s, sqrt_f64s, mul_add_e_f64s,
    less_than_f64s, equal_f64s, select_f64s, reduce_sum_f64s, reduce_max_f64s, transmute_u64s_f64s, transmute_f64s_u64s, mul_u64s by 1 << 52, add_u64s
);

/// The whole vectors of a slice, from its start on.
#[inline(always)]
pub(crate) fn as_vectors<R: SimdFloat, S: Simd>(numbers: &[R]) -> &[R::Vector<S>] {
    let lanes = R::lanes::<S>();
    cast_slice(&numbers[..numbers.len() / lanes * lanes])
}

/// As [`as_vectors`], to write.
#[inline(always)]
pub(crate) fn as_vectors_mut<R: SimdFloat, S: Simd>(numbers: &mut [R]) -> &mut [R::Vector<S>] {
    let (lanes, len) = (R::lanes::<S>(), numbers.len());
    cast_slice_mut(&mut numbers[..len / lanes * lanes])
}

/// The first vector of a slice that has at least one.
#[inline(always)]
pub(crate) fn load<R: SimdFloat, S: Simd>(numbers: &[R]) -> R::Vector<S> {
    as_vectors::<R, S>(numbers)[0]
}

/// The first vector of a slice, filled up with zeros if the slice is shorter.
#[inline(always)]
pub(crate) fn load_up_to<R: SimdFloat, S: Simd>(_: S, numbers: &[R]) -> R::Vector<S> {
    let lanes = R::lanes::<S>();
    if numbers.len() >= lanes {
        return load::<R, S>(numbers);
    }
    let mut all = [R::ZERO; MAX_LANES];
    all[..numbers.len()].copy_from_slice(numbers);
    load::<R, S>(&all)
}

/// Writes as much of a vector as the slice has room for.
#[inline(always)]
pub(crate) fn store_up_to<R: SimdFloat, S: Simd>(numbers: &mut [R], x: R::Vector<S>) {
    let mut all = [R::ZERO; MAX_LANES];
    as_vectors_mut::<R, S>(&mut all)[0] = x;
    let count = numbers.len();
    numbers.copy_from_slice(&all[..count]);
}

/// Bytes of a cache line.
pub(crate) const CACHE_LINE: usize = 64;

/// Asks for the memory at an address, which need not be anybody's.
#[inline(always)]
pub(crate) fn prefetch<R>(address: *const R) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a hint reads nothing, and SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// As [`prefetch`], but only as far as the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_to_second_level<R>(address: *const R) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a hint reads nothing, and SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// Runs a piece of test code with every instruction set that this processor has.
#[cfg(test)]
macro_rules! with_every_simd {
    (|$simd:ident| $body:block) => {{
        struct Body;
        impl pulp::WithSimd for Body {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, $simd: S) $body
        }
        pulp::Simd::vectorize(pulp::Scalar, Body);
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            if let Some(simd) = pulp::x86::V3::try_new() {
                pulp::Simd::vectorize(simd, Body);
            }
            if let Some(simd) = pulp::x86::V4::try_new() {
                pulp::Simd::vectorize(simd, Body);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        pulp::Arch::new().dispatch(Body);
    }};
}
#[cfg(test)]
pub(crate) use with_every_simd;
