//! A task of a norm: some rows, widened a batch at a time if they are of a half type.

use std::mem::MaybeUninit;

use crate::dtype::{Number, Sink, widen_rows};
use crate::error::Error;
use crate::matrix::{Matrix, MatrixMut};
use crate::norm::rows::{Add, Backward, Forward};
use crate::norm::{NUMBERS_PER_BATCH, Parameters, ROWS_PER_SUM};
use crate::scratch::{Scratch, pieces};
use crate::simd::instruction_set;

/// Rows as the type that is computed in: where they stand, or else widened to `scratch`.
fn floats<'m, E: Number>(rows: Matrix<'m, E>, scratch: &'m mut [E::Float]) -> Matrix<'m, E::Float> {
    match rows.downcast() {
        Some(floats) => floats,
        None => {
            let len = rows.rows() * rows.columns();
            widen_rows(rows, &mut scratch[..len])
        }
    }
}

/// Lets `write` fill rows of a result: where they stand, or, if they are of a half type, in `scratch`, from where they are narrowed.
fn fill<E: Number>(
    mut to: MatrixMut<MaybeUninit<E>>,
    scratch: &mut [E::Float],
    write: impl FnOnce(MatrixMut<MaybeUninit<E::Float>>),
) {
    if let Some(floats) = to.downcast() {
        return write(floats);
    }
    let (rows, columns) = (to.rows(), to.columns());
    // SAFETY: `write` is a pass of `rows.rs`, which writes every number of its rows, and reads none before.
    write(unsafe { MatrixMut::new(&mut *scratch, rows, columns, columns).into_uninit() });
    to.write(0, Matrix::new(scratch, rows, columns, columns));
}

/// The rows of a batch, and the numbers of its scratch: none for a type that needs no widening.
fn batch<E: Number>(columns: usize) -> (usize, usize) {
    let rows = (NUMBERS_PER_BATCH / columns).max(1);
    (rows, if E::as_floats(&[]).is_some() { 0 } else { rows * columns })
}

/// Rows to normalise.
pub(super) struct ForwardPart<'a, E: Number> {
    pub(super) x: Matrix<'a, E>,
    /// The residual, and where its sum with x goes.
    pub(super) added: Option<(Matrix<'a, E>, MatrixMut<'a, MaybeUninit<E>>)>,
    pub(super) wide: &'a Parameters<E::Float>,
    pub(super) eps: E::Float,
    pub(super) y: MatrixMut<'a, MaybeUninit<E>>,
}

impl<E: Number> ForwardPart<'_, E> {
    pub(super) fn run<const CENTRED: bool>(mut self) -> Result<(), Error> {
        let (rows, n) = (self.x.rows(), self.x.columns());
        let (batch, size) = batch::<E>(n);
        let sum_size = if self.added.is_some() { batch * n } else { 0 };
        let mut scratch = None;
        pieces!(scratch, E::Float: wide: size, wide_residual: size, wide_sum: sum_size, out: size, divided: n);
        for first in (0..rows).step_by(batch) {
            let count = batch.min(rows - first);
            let mut x = floats(self.x.skip(first).take(count), wide);
            if let Some((residual, sum)) = &mut self.added {
                let residual = floats(residual.skip(first).take(count), wide_residual);
                instruction_set().dispatch(Add { x, y: residual, sum: &mut wide_sum[..count * n] });
                let mut sum = sum.part(first, count);
                sum.write(0, Matrix::new(&*wide_sum, count, n, n));
                // SAFETY: `write` has initialised all of its rows.
                x = floats(unsafe { sum.into_init() }, wide_sum);
            }
            let Parameters { weight, bias } = self.wide;
            let (bias, eps, divided) = (bias.as_deref(), self.eps, &mut *divided);
            fill(self.y.part(first, count), out, |y| {
                Forward::<_, CENTRED> { x, weight, bias, eps, divided, y }.run();
            });
        }
        Ok(())
    }
}

/// Rows with the gradients of their norms.
pub(super) struct BackwardPart<'a, E: Number> {
    pub(super) x: Matrix<'a, E>,
    pub(super) grad: Matrix<'a, E>,
    /// Added to the gradient of x.
    pub(super) add: Option<Matrix<'a, E>>,
    pub(super) wide: &'a Parameters<E::Float>,
    pub(super) eps: E::Float,
    pub(super) x_grad: MatrixMut<'a, MaybeUninit<E>>,
    /// The sums of the gradients of weight and bias over this task's rows, which are zero before.
    pub(super) sums: MatrixMut<'a, f64>,
}

impl<E: Number> BackwardPart<'_, E> {
    pub(super) fn run<const CENTRED: bool>(mut self) -> Result<(), Error> {
        let (rows, n) = (self.x.rows(), self.x.columns());
        let (batch, size) = batch::<E>(n);
        let batch = batch.min(ROWS_PER_SUM);
        let mut scratch = None;
        pieces!(scratch, E::Float: wide: size, wide_grad: size, wide_add: size, out: size,
            divided: n, weight_grad: n, bias_grad: n);
        for first in (0..rows).step_by(batch) {
            let count = batch.min(rows - first);
            let x = floats(self.x.skip(first).take(count), wide);
            let grad = floats(self.grad.skip(first).take(count), wide_grad);
            let add = match &self.add {
                Some(add) => Some(floats(add.skip(first).take(count), wide_add)),
                None => None,
            };
            let (weight, eps, divided, weight_grad) =
                (&self.wide.weight[..], self.eps, &mut *divided, &mut *weight_grad);
            let bias_grad = self.wide.bias.is_some().then_some(&mut *bias_grad);
            let sums = self.sums.reborrow();
            fill(self.x_grad.part(first, count), out, |x_grad| {
                let rows =
                    Backward::<_, CENTRED> { x, grad, add, weight, eps, divided, weight_grad, bias_grad, x_grad, sums };
                rows.run();
            });
        }
        Ok(())
    }
}
