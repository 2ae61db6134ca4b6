//! What tensors hold: f16, bf16, f32 or f64. The half types are computed in f32.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};

use super::real::Real;

pub(crate) trait Element: WithDType {
    /// What it is computed in.
    type Real: Real + Element<Real = Self::Real>;

    fn widen(self) -> Self::Real;
    fn narrow(x: Self::Real) -> Self;
    /// Widens as many as both have.
    fn widen_all(from: &[Self], to: &mut [Self::Real]);
    /// Narrows all of `from`.
    ///
    /// # Safety
    ///
    /// There is room for as many at `to`.
    unsafe fn narrow_all(from: &[Self::Real], to: *mut Self);
    /// The same numbers, if they need no widening.
    fn as_real(slice: &[Self]) -> Option<&[Self::Real]>;
    /// The same place, if what is written there needs no narrowing.
    fn as_real_mut(place: *mut Self) -> Option<*mut Self::Real>;
    /// The same numbers, if they need no narrowing.
    fn from_real(numbers: Vec<Self::Real>) -> Vec<Self>;
}

macro_rules! native {
    ($element:ty) => {
        impl Element for $element {
            type Real = $element;

            #[inline(always)]
            fn widen(self) -> $element {
                self
            }
            #[inline(always)]
            fn narrow(x: $element) -> $element {
                x
            }
            #[inline(always)]
            fn as_real(slice: &[$element]) -> Option<&[$element]> {
                Some(slice)
            }
            #[inline(always)]
            fn widen_all(from: &[$element], to: &mut [$element]) {
                to.iter_mut().zip(from).for_each(|(to, x)| *to = *x);
            }
            #[inline(always)]
            unsafe fn narrow_all(from: &[$element], to: *mut $element) {
                // SAFETY: as the caller promises.
                unsafe { to.copy_from(from.as_ptr(), from.len()) };
            }
            #[inline(always)]
            fn as_real_mut(place: *mut $element) -> Option<*mut $element> {
                Some(place)
            }
            fn from_real(numbers: Vec<$element>) -> Vec<$element> {
                numbers
            }
        }
    };
}

macro_rules! half_type {
    ($element:ty) => {
        impl Element for $element {
            type Real = f32;

            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(x: f32) -> $element {
                <$element>::from_f32(x)
            }
            #[inline(always)]
            fn as_real(_: &[$element]) -> Option<&[f32]> {
                None
            }
            #[inline(always)]
            fn widen_all(from: &[$element], to: &mut [f32]) {
                let count = from.len().min(to.len());
                from[..count].convert_to_f32_slice(&mut to[..count]);
            }
            #[inline(always)]
            unsafe fn narrow_all(from: &[f32], to: *mut $element) {
                // A few at a time, since what is at `to` may not be initialised.
                let mut some = [<$element>::ZERO; 64];
                for (at, from) in from.chunks(64).enumerate() {
                    let some = &mut some[..from.len()];
                    some.convert_from_f32_slice(from);
                    // SAFETY: as the caller promises.
                    unsafe { to.add(at * 64).copy_from(some.as_ptr(), some.len()) };
                }
            }
            #[inline(always)]
            fn as_real_mut(_: *mut $element) -> Option<*mut f32> {
                None
            }
            fn from_real(numbers: Vec<f32>) -> Vec<$element> {
                HalfFloatVecExt::from_f32_slice(&numbers)
            }
        }
    };
}

native!(f32);
native!(f64);
half_type!(f16);
half_type!(bf16);
