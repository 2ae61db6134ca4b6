//! What tensors hold: f16, bf16, f32 or f64. The half types are computed in f32.
//!
//! The kernels are compiled once for each type to compute in, f32 and f64. They read tensors through [`Source`] and write them
//! through [`Sink`], which convert whole rows.

use std::alloc::Layout;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::alloc::{filled, reserve};
use crate::error::Error;
use crate::matrix::{Matrix, MatrixMut};
use crate::schedule::for_each_chunk;
use crate::simd::{SimdFloat, instruction_set};

/// Numbers that a task narrows.
const CHUNK: usize = 1 << 15;

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A type of number that a tensor can hold: f16, bf16, f32 or f64.
pub trait Number: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// What it is computed in: f64 for f64, else f32.
    type Float: SimdFloat + Number<Float = Self::Float>;

    /// This number, exactly.
    fn widen(self) -> Self::Float;
    /// The nearest number of this type.
    fn narrow(x: Self::Float) -> Self;
    /// The same slice, if the type is computed in itself.
    fn as_floats(slice: &[Self]) -> Option<&[Self::Float]>;
    /// Widens as many numbers as both slices have.
    fn widen_all(from: &[Self], to: &mut [Self::Float]);
    /// Narrows as many numbers as both slices have.
    fn narrow_all(from: &[Self::Float], to: &mut [MaybeUninit<Self>]);
    /// All numbers narrowed.
    ///
    /// # Errors
    ///
    /// Too little memory for a copy, where the types differ.
    fn from_floats(what: &'static str, numbers: Vec<Self::Float>) -> Result<Vec<Self>, Error>;
    /// All numbers widened.
    ///
    /// # Errors
    ///
    /// As [`Number::from_floats`].
    fn into_floats(what: &'static str, numbers: Vec<Self>) -> Result<Vec<Self::Float>, Error>;
}

macro_rules! float {
    ($number:ty) => {
        impl Number for $number {
            type Float = $number;

            #[inline(always)]
            fn widen(self) -> $number {
                self
            }
            #[inline(always)]
            fn narrow(x: $number) -> $number {
                x
            }
            #[inline(always)]
            fn as_floats(slice: &[$number]) -> Option<&[$number]> {
                Some(slice)
            }
            #[inline(always)]
            fn widen_all(from: &[$number], to: &mut [$number]) {
                to.iter_mut().zip(from).for_each(|(to, x)| *to = *x);
            }
            #[inline(always)]
            fn narrow_all(from: &[$number], to: &mut [MaybeUninit<$number>]) {
                to.iter_mut().zip(from).for_each(|(to, x)| {
                    to.write(*x);
                });
            }
            fn from_floats(_: &'static str, numbers: Vec<$number>) -> Result<Vec<$number>, Error> {
                Ok(numbers)
            }
            fn into_floats(_: &'static str, numbers: Vec<$number>) -> Result<Vec<$number>, Error> {
                Ok(numbers)
            }
        }
    };
}

macro_rules! half_type {
    ($number:ty, |$from:ident, $to:ident| $widen_all:expr, |$floats:ident, $halves:ident| $narrow_all:expr) => {
        impl Number for $number {
            type Float = f32;

            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(x: f32) -> $number {
                <$number>::from_f32(x)
            }
            #[inline(always)]
            fn as_floats(_: &[$number]) -> Option<&[f32]> {
                None
            }
            #[inline(always)]
            fn widen_all(from: &[$number], to: &mut [f32]) {
                let ($from, $to) = (from, to);
                $widen_all;
            }
            #[inline(always)]
            fn narrow_all(from: &[f32], to: &mut [MaybeUninit<$number>]) {
                let ($floats, $halves) = (from, to);
                $narrow_all;
            }
            fn from_floats(what: &'static str, numbers: Vec<f32>) -> Result<Vec<$number>, Error> {
                let count = numbers.len();
                let mut halves = reserve(what, count)?;
                for_each_chunk(&mut halves.spare_capacity_mut()[..count], CHUNK, |chunk, to| {
                    narrow::<$number>(&numbers[chunk * CHUNK..][..to.len()], to);
                });
                // SAFETY: the chunks are all of them, and `narrow` has written each.
                unsafe { halves.set_len(count) };
                Ok(halves)
            }
            fn into_floats(what: &'static str, numbers: Vec<$number>) -> Result<Vec<f32>, Error> {
                let mut floats = filled(what, numbers.len(), 0f32)?;
                for_each_chunk(&mut floats, CHUNK, |chunk, to| {
                    <$number>::widen_all(&numbers[chunk * CHUNK..][..to.len()], to);
                });
                Ok(floats)
            }
        }
    };
}

float!(f32);
float!(f64);
half_type!(
    f16,
    |from, to| {
        let count = from.len().min(to.len());
        from[..count].convert_to_f32_slice(&mut to[..count]);
    },
    |from, to| {
        // `half` converts to initialised memory alone, so a few numbers at a time take a detour.
        let mut some = [f16::ZERO; 64];
        for (from, to) in from.chunks(64).zip(to.chunks_mut(64)) {
            let some = &mut some[..from.len()];
            some.convert_from_f32_slice(from);
            to.iter_mut().zip(some).for_each(|(to, x)| {
                to.write(*x);
            });
        }
    }
);
// A bf16 is the upper half of an f32. As `half` does it: every NaN becomes quiet, and numbers are rounded to the nearest, ties to even.
// It goes number by number; this is done by vectors.
half_type!(
    bf16,
    |from, to| to.iter_mut().zip(from).for_each(|(to, x)| {
        let bits = u32::from(x.to_bits());
        let quiet = if bits & 0x7FFF > 0x7F80 { 0x40 } else { 0 };
        *to = f32::from_bits((bits | quiet) << 16);
    }),
    |from, to| to.iter_mut().zip(from).for_each(|(to, x)| {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
        to.write(bf16::from_bits((if is_nan { bits >> 16 | 0x40 } else { rounded }) as u16));
    })
);

/// A tensor (batch, heads, len, dim) to read, whatever type it holds.
pub(crate) trait Source<R>: Sync {
    /// (batch, heads, len, dim)
    fn dims(&self) -> [usize; 4];
    /// The rows `range` of a (sequence, head) to compute with: where they are, if they need no widening, else widened to
    /// `scratch`, which then has to have room for them.
    fn rows<'m>(&'m self, at: (usize, usize), range: Range<usize>, scratch: &'m mut [R]) -> Matrix<'m, R>;
    /// The same rows as bits of bf16; none for tensors of other types.
    fn bf16_rows(&self, at: (usize, usize), range: Range<usize>) -> Option<Matrix<'_, u16>>;
}

/// Rows of a result to write, whatever type it holds.
pub(crate) trait Sink<R> {
    /// The rows themselves, if they need no narrowing.
    fn floats(&mut self) -> Option<MatrixMut<'_, MaybeUninit<R>>>;
    /// Writes whole rows, from row `first` on.
    fn write(&mut self, first: usize, numbers: Matrix<R>);
}

/// Converts rows with the best instruction set.
struct Widen<'a, E: Number> {
    from: Matrix<'a, E>,
    /// Row by row.
    to: &'a mut [E::Float],
}

impl<E: Number> WithSimd for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, to) in self.to.chunks_exact_mut(self.from.columns()).enumerate().take(self.from.rows()) {
            E::widen_all(self.from.row(row), to);
        }
    }
}

/// Rows widened to `to`, where they stand row by row.
pub(crate) fn widen_rows<'m, E: Number>(from: Matrix<E>, to: &'m mut [E::Float]) -> Matrix<'m, E::Float> {
    let (rows, columns) = (from.rows(), from.columns());
    instruction_set().dispatch(Widen { from, to: &mut *to });
    Matrix::new(to, rows, columns, columns)
}

/// A slice widened to the start of another.
pub(crate) fn widen<E: Number>(from: &[E], to: &mut [E::Float]) {
    widen_rows(Matrix::new(from, 1, from.len(), from.len()), &mut to[..from.len()]);
}

/// A slice narrowed to another of the same length.
pub(crate) fn narrow<E: Number>(from: &[E::Float], to: &mut [MaybeUninit<E>]) {
    let len = to.len();
    let (from, to) = (Matrix::new(from, 1, len, len), MatrixMut::new(to, 1, len, len));
    instruction_set().dispatch(Narrow { from, to });
}

struct Narrow<'a, 'b, E: Number> {
    from: Matrix<'a, E::Float>,
    to: MatrixMut<'b, MaybeUninit<E>>,
}

impl<E: Number> WithSimd for Narrow<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        for row in 0..self.from.rows() {
            E::narrow_all(self.from.row(row), self.to.row(row));
        }
    }
}

impl<E: Number> Sink<E::Float> for MatrixMut<'_, MaybeUninit<E>> {
    #[inline]
    fn floats(&mut self) -> Option<MatrixMut<'_, MaybeUninit<E::Float>>> {
        self.downcast()
    }

    fn write(&mut self, first: usize, numbers: Matrix<E::Float>) {
        assert_eq!(self.columns(), numbers.columns(), "whole rows");
        let to = self.part(first, numbers.rows());
        instruction_set().dispatch(Narrow { from: numbers, to });
    }
}

/// Narrows as many numbers as both slices have.
#[inline(always)]
pub(crate) fn narrow_into<E: Number>(from: &[E::Float], to: &mut [E]) {
    let count = to.len();
    // SAFETY: `Number` is sealed, and each `narrow_all` writes initialised numbers alone.
    let mut to = unsafe { MatrixMut::new(to, 1, count, count).into_uninit() };
    E::narrow_all(from, to.row(0));
}

/// As [`narrow_into`], for code that isn't compiled for an instruction set.
pub(crate) fn narrow_over<E: Number>(from: &[E::Float], to: &mut [E]) {
    let count = to.len();
    // SAFETY: `Number` is sealed, and `narrow` writes initialised numbers alone.
    let mut to = unsafe { MatrixMut::new(to, 1, count, count).into_uninit() };
    narrow(from, to.row(0));
}

/// A vector of zeros whose pages the system makes when they are first touched: what nobody writes or reads costs no time.
pub(crate) fn zeroed<E: Number>(what: &'static str, count: usize) -> Result<Vec<E>, Error> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let memory = || Error::Memory { what, bytes: count.saturating_mul(size_of::<E>()) };
    let layout = Layout::array::<E>(count).map_err(|_| memory())?;
    // SAFETY: `count` and the size of a number are above zero.
    let start = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<E>();
    if start.is_null() {
        return Err(memory());
    }
    // SAFETY: the global allocator has given memory for `count` numbers, aligned for them, and all bits zero are the number 0
    // in each of the types that implement the sealed `Number`.
    Ok(unsafe { Vec::from_raw_parts(start, count, count) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        let numbers: Vec<E::Float> = (0..200).map(|i| E::Float::from_f64(f64::from(i) / 7.0)).collect();
        let expected: Vec<E> = numbers.iter().map(|&x| E::narrow(x)).collect();
        let mut narrow = vec![MaybeUninit::new(E::default()); 150];
        let mut to = MatrixMut::new(&mut narrow, 1, 150, 150);
        to.write(0, Matrix::new(&numbers, 1, 150, 150));
        // SAFETY: they were initialised from the start.
        let narrow: Vec<E> = narrow.into_iter().map(|x| unsafe { x.assume_init() }).collect();
        assert_eq!(narrow, expected[..150]);
        let mut wide = vec![E::Float::ZERO; 150];
        E::widen_all(&narrow, &mut wide);
        assert!(narrow.iter().zip(&wide).all(|(x, y)| x.widen() == *y));
        assert_eq!(E::from_floats("test", numbers).unwrap(), expected);
    }

    #[test]
    fn slices_are_converted_as_numbers_are() {
        check::<f16>();
        check::<bf16>();
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn zeroed_memory_holds_zeros_or_is_an_error() {
        assert_eq!(zeroed::<bf16>("test", 100).unwrap(), [bf16::ZERO; 100]);
        assert!(zeroed::<f64>("test", 0).unwrap().is_empty());
        for count in [usize::MAX, isize::MAX as usize / 8] {
            assert!(matches!(zeroed::<f64>("test", count), Err(Error::Memory { .. })));
        }
    }

    #[test]
    fn numbers_are_rounded_to_bf16_as_half_does_it() {
        // Around every bf16, ties included, and NaN of all kinds.
        let step = if cfg!(miri) { 61 } else { 1 };
        let bits = (0..=u16::MAX)
            .step_by(step)
            .flat_map(|half| [0, 1, 0x7FFF, 0x8000, 0x8001].map(|low| u32::from(half) << 16 | low));
        let numbers: Vec<f32> = bits.map(f32::from_bits).collect();
        let narrow = bf16::from_floats("test", numbers.clone()).unwrap();
        assert!(numbers.iter().zip(narrow).all(|(x, narrow)| bf16::from_f32(*x).to_bits() == narrow.to_bits()));
    }

    #[test]
    fn every_bf16_is_widened_as_half_does_it() {
        let all: Vec<bf16> = (0..=u16::MAX).step_by(if cfg!(miri) { 61 } else { 1 }).map(bf16::from_bits).collect();
        let mut wide = vec![0.0; all.len()];
        bf16::widen_all(&all, &mut wide);
        assert!(all.iter().zip(&wide).all(|(x, wide)| x.to_f32().to_bits() == wide.to_bits()));
    }
}
