//! What is done to a product before it is rounded.

use pulp::{Simd, WithSimd};

use crate::dtype::Number;
use crate::error::Error;
use crate::simd::instruction_set;

/// What is done to a row's segment of the result when its sums are complete, while it is still in the cache.
pub trait Epilogue<E: Number>: Sync {
    /// Whether it fits a result of `rows` rows of `columns`; asked once, before anything is computed.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] or [`Error::Dims`] if it doesn't.
    fn check(&self, rows: usize, columns: usize) -> Result<(), Error> {
        let _ = (rows, columns);
        Ok(())
    }

    /// `sums` are the columns `column..column + sums.len()` of `row`. Each element of the result is in one call only. It may
    /// change them (a bias, an activation, a residual), and may write elsewhere.
    fn apply(&self, row: usize, column: usize, sums: &mut [E::Float]);
}

/// The epilogue that does nothing.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl<E: Number> Epilogue<E> for Plain {
    fn apply(&self, _: usize, _: usize, _: &mut [E::Float]) {}
}

/// Adds `bias[column]` to every row.
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a, E>(pub &'a [E]);

impl<E: Number> Epilogue<E> for Bias<'_, E> {
    fn check(&self, _: usize, columns: usize) -> Result<(), Error> {
        if self.0.len() != columns {
            let expected = format!("one for each of {columns} columns");
            return Err(Error::Length { what: "bias", expected, got: self.0.len() });
        }
        Ok(())
    }

    fn apply(&self, _: usize, column: usize, sums: &mut [E::Float]) {
        let bias = &self.0[column..column + sums.len()];
        instruction_set().dispatch(Add { bias, sums });
    }
}

struct Add<'a, E: Number> {
    bias: &'a [E],
    sums: &'a mut [E::Float],
}

impl<E: Number> WithSimd for Add<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (sum, bias) in self.sums.iter_mut().zip(self.bias) {
            *sum += bias.widen();
        }
    }
}
