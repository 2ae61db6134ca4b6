//! RMS norm and layer norm of rows, with their gradients, each in one pass over memory.

use crate::alloc::{collected, filled, reserve};
use crate::dtype::Number;
use crate::error::Error;
use crate::matrix::{Matrix, Shared};
use crate::pointwise::{NUMBERS_PER_TASK, WORK_PER_NUMBER};
use crate::schedule::run_tasks;
use crate::simd::SimdFloat;

mod rows;
mod statistics;
mod tasks;
#[cfg(test)]
#[path = "norm_tests.rs"]
mod tests;

use tasks::{BackwardPart, ForwardPart};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps). Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019), section 3.
    Rms,
    /// (x - mean(x)) / sqrt(var(x) + eps). Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), section 3.
    Layer,
}

/// A norm of rows of `weight.len()` numbers: normalised x · weight + bias. It is computed in f32 (f64 for f64) and rounded once.
///
/// A row whose squares overflow is divided by its largest number first, which leaves its norm as it is.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a, E: Number> {
    /// Which norm.
    pub kind: NormKind,
    /// What each column is multiplied by.
    pub weight: &'a [E],
    /// What is added to each column.
    pub bias: Option<&'a [E]>,
    /// Added to the mean square. It has to be above 0 in the type that is computed in.
    pub eps: f64,
    /// Gemma's norms multiply by 1 + weight.
    pub unit_offset: bool,
}

/// The gradients of a norm. Those of the parameters are in the type that is computed in.
#[derive(Clone, Debug)]
pub struct NormGradients<E: Number> {
    /// Of x.
    pub x: Vec<E>,
    /// Of the weight.
    pub weight: Vec<E::Float>,
    /// Of the bias, if there is one.
    pub bias: Option<Vec<E::Float>>,
}

/// The most tasks of a backward pass: each has sums of its own for the gradients of the parameters.
const BACKWARD_TASKS: usize = 32;
/// Rows whose gradients of the parameters are summed in the type that is computed in. These sums are then added up in f64, so that
/// the error doesn't grow with the number of rows.
const ROWS_PER_SUM: usize = 64;
/// Numbers that are widened at a time, so that they stay in the second cache.
const NUMBERS_PER_BATCH: usize = 16 << 10;

impl<E: Number> Norm<'_, E> {
    /// The norm of each row of x.
    ///
    /// # Errors
    ///
    /// Parameters of two lengths, an x that isn't made of rows of that length, an eps out of range, or too little memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::norm::{Norm, NormKind};
    ///
    /// let norm = Norm { kind: NormKind::Layer, weight: &[1f64, 10.0], bias: None, eps: 1e-9, unit_offset: false };
    /// let y = norm.forward(&[1.0, 3.0])?; // mean 2, variance 1
    /// assert!((y[0] + 1.0).abs() < 1e-8 && (y[1] - 10.0).abs() < 1e-7);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn forward(&self, x: &[E]) -> Result<Vec<E>, Error> {
        Ok(self.run_forward(x, None)?.1)
    }

    /// x + residual, rounded, and the norm of that.
    ///
    /// # Errors
    ///
    /// As [`Norm::forward`], or a residual of another length.
    pub fn forward_added(&self, x: &[E], residual: &[E]) -> Result<(Vec<E>, Vec<E>), Error> {
        self.check_len("residual", x.len(), residual.len())?;
        self.run_forward(x, Some(residual))
    }

    /// The gradients from that of the result. `add` is added to the gradient of x.
    ///
    /// # Errors
    ///
    /// As [`Norm::forward`], or gradients of another length.
    pub fn backward(&self, x: &[E], grad: &[E], add: Option<&[E]>) -> Result<NormGradients<E>, Error> {
        let rows = self.checked_rows(x)?;
        self.check_len("gradient of a norm", x.len(), grad.len())?;
        if let Some(add) = add {
            self.check_len("gradient to add", x.len(), add.len())?;
        }
        let (n, bias) = (self.weight.len(), self.bias.is_some());
        let wide = self.wide_parameters()?;
        let rows_per_task = rows.div_ceil(BACKWARD_TASKS).max(NUMBERS_PER_TASK / n.max(1)).max(1);
        let tasks = rows.div_ceil(rows_per_task);
        let mut result = reserve("gradient of a norm's input", x.len())?;
        let mut sums = filled("gradients of a norm's parameters", tasks.saturating_mul(2 * n), 0f64)?;
        let shared = Shared::new(&mut result.spare_capacity_mut()[..x.len()]);
        let shared_sums = Shared::new(&mut sums);
        run_tasks(2 * WORK_PER_NUMBER * x.len(), tasks, |task| {
            let first = task * rows_per_task;
            let count = rows_per_task.min(rows - first);
            // SAFETY: no two tasks have a row in common.
            let (x_grad, sums) =
                unsafe { (shared.rows(first * n, count, n, n), shared_sums.rows(task * 2 * n, 2, n, n)) };
            let [x, grad] = [x, grad].map(|x| Matrix::new(x, rows, n, n).skip(first).take(count));
            let add = add.map(|add| Matrix::new(add, rows, n, n).skip(first).take(count));
            let part = BackwardPart { x, grad, add, wide: &wide, eps: E::Float::from_f64(self.eps), x_grad, sums };
            match self.kind {
                NormKind::Rms => part.run::<false>(),
                NormKind::Layer => part.run::<true>(),
            }
        })?;
        // SAFETY: `reserve` has made room for these numbers, and the tasks have written every row.
        unsafe { result.set_len(x.len()) };
        let total = |which: usize| {
            let mut total = filled("gradients of a norm's parameters", n, 0f64)?;
            for of_task in sums.chunks_exact(2 * n.max(1)) {
                total.iter_mut().zip(&of_task[which * n..]).for_each(|(total, x)| *total += x);
            }
            collected("gradients of a norm's parameters", total.into_iter().map(E::Float::from_f64))
        };
        Ok(NormGradients { x: result, weight: total(0)?, bias: bias.then(|| total(1)).transpose()? })
    }

    /// x + residual, if there is one, and the norm.
    fn run_forward(&self, x: &[E], residual: Option<&[E]>) -> Result<(Vec<E>, Vec<E>), Error> {
        let (rows, n) = (self.checked_rows(x)?, self.weight.len());
        let wide = self.wide_parameters()?;
        let mut y = reserve("normalised rows", x.len())?;
        let sum_len = residual.map_or(0, <[E]>::len);
        let mut sum = reserve("sum of a residual and a branch", sum_len)?;
        let shared = Shared::new(&mut y.spare_capacity_mut()[..x.len()]);
        let shared_sum = Shared::new(&mut sum.spare_capacity_mut()[..sum_len]);
        let rows_per_task = (NUMBERS_PER_TASK / n.max(1)).max(1);
        run_tasks(WORK_PER_NUMBER * x.len(), rows.div_ceil(rows_per_task), |task| {
            let first = task * rows_per_task;
            let count = rows_per_task.min(rows - first);
            let matrix = |x| Matrix::new(x, rows, n, n).skip(first).take(count);
            // SAFETY: no two tasks have a row in common.
            let y = unsafe { shared.rows(first * n, count, n, n) };
            let added = residual.map(|residual| {
                // SAFETY: as above.
                (matrix(residual), unsafe { shared_sum.rows(first * n, count, n, n) })
            });
            let part = ForwardPart { x: matrix(x), added, wide: &wide, eps: E::Float::from_f64(self.eps), y };
            match self.kind {
                NormKind::Rms => part.run::<false>(),
                NormKind::Layer => part.run::<true>(),
            }
        })?;
        // SAFETY: `reserve` has made room for these numbers, and the tasks have written every row of both.
        unsafe {
            y.set_len(x.len());
            sum.set_len(sum_len);
        }
        Ok((sum, y))
    }

    /// The number of rows of x.
    fn checked_rows(&self, x: &[E]) -> Result<usize, Error> {
        let n = self.weight.len();
        if let Some(bias) = self.bias {
            self.check_len("bias of a norm", n, bias.len())?;
        }
        let eps = E::Float::from_f64(self.eps);
        if !(self.eps > 0.0 && eps >= E::Float::TINY && eps.is_finite()) {
            let expected = "a finite number above 0, also in the type that is computed in";
            return Err(Error::Option { what: "eps", expected, got: self.eps.to_string() });
        }
        let rows = x.len().checked_div(n).unwrap_or(0);
        if rows * n != x.len() {
            return Err(Error::Length {
                what: "input of a norm",
                expected: format!("rows of {n} elements"),
                got: x.len(),
            });
        }
        Ok(rows)
    }

    fn check_len(&self, what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
        if expected == got {
            return Ok(());
        }
        Err(Error::Length { what, expected: format!("{expected} elements"), got })
    }

    fn wide_parameters(&self) -> Result<Parameters<E::Float>, Error> {
        const WHAT: &str = "widened parameters of a norm";
        let offset = if self.unit_offset { E::Float::ONE } else { E::Float::ZERO };
        let weight = collected(WHAT, self.weight.iter().map(|x| x.widen() + offset))?;
        let bias = self.bias.map(|bias| collected(WHAT, bias.iter().map(|x| x.widen()))).transpose()?;
        Ok(Parameters { weight, bias })
    }
}

/// Weight and bias in the type that is computed in.
struct Parameters<R> {
    /// Including Gemma's offset.
    weight: Vec<R>,
    bias: Option<Vec<R>>,
}
