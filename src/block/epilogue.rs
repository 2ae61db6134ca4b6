//! What a product of a layer does to its rows while they are in the cache.

use attention_kernels::matmul::Epilogue;
use attention_kernels::{Number, SimdFloat};

/// Adds a bias to each row, and the row of another matrix of the result's shape.
pub(crate) struct Add<'a, E> {
    pub(crate) bias: Option<&'a [E]>,
    /// (rows, columns), row by row.
    pub(crate) rows: Option<&'a [E]>,
    pub(crate) columns: usize,
}

impl<E: Number> Epilogue<E> for Add<'_, E> {
    fn apply(&self, row: usize, column: usize, sums: &mut [E::Float]) {
        if let Some(bias) = self.bias {
            sums.iter_mut().zip(&bias[column..]).for_each(|(sum, bias)| *sum += bias.widen());
        }
        if let Some(rows) = self.rows {
            sums.iter_mut().zip(&rows[row * self.columns + column..]).for_each(|(sum, x)| *sum += x.widen());
        }
    }
}

/// Multiplies the product by a number.
pub(crate) struct Scale(pub(crate) f64);

impl<E: Number> Epilogue<E> for Scale {
    fn apply(&self, _: usize, _: usize, sums: &mut [E::Float]) {
        let scale = E::Float::from_f64(self.0);
        sums.iter_mut().for_each(|sum| *sum *= scale);
    }
}
