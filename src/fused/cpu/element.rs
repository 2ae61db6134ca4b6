//! What tensors hold: f16, bf16, f32 or f64. The half types are computed in f32.

use candle_core::WithDType;
use half::{bf16, f16};

use super::real::Real;

pub(crate) trait Element: WithDType {
    /// What it is computed in.
    type Real: Real + Element<Real = Self::Real>;

    fn widen(self) -> Self::Real;
    fn narrow(x: Self::Real) -> Self;
    /// The same numbers, if they need no widening.
    fn as_real(slice: &[Self]) -> Option<&[Self::Real]>;
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
            fn from_real(numbers: Vec<f32>) -> Vec<$element> {
                numbers.into_iter().map(<$element>::from_f32).collect()
            }
        }
    };
}

native!(f32);
native!(f64);
half_type!(f16);
half_type!(bf16);
