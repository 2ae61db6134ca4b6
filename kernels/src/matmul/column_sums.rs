//! Sums over the rows of a matrix: the gradient of a bias.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::alloc::{filled, product};
use crate::dtype::Number;
use crate::error::Error;
use crate::matrix::{Matrix, MatrixMut, Shared};
use crate::schedule::run_tasks;
use crate::scratch::{Scratch, pieces};
use crate::simd::{SimdFloat, instruction_set};

/// Rows that are added one after the other: a longer sum would lose more to rounding.
const ROWS: usize = 32;

/// Rows of a task.
const ROWS_OF_TASK: usize = 512;

/// The sum of each column of a row-major matrix, in the type that is computed in: the gradient of a bias.
///
/// Blocks of rows are summed first and their sums added up then, in an order that depends on the shape alone.
///
/// # Errors
///
/// [`Error::Length`] if `x` has not `rows · n` elements; [`Error::Memory`] if there is no memory for the sums.
///
/// # Examples
///
/// ```
/// use attention_kernels::matmul::column_sums;
///
/// assert_eq!(column_sums(&[1.0f32, 2.0, 3.0, 4.0], 2, 2)?, [4.0, 6.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn column_sums<E: Number>(x: &[E], rows: usize, n: usize) -> Result<Vec<E::Float>, Error> {
    let elements = product("matrix to sum", &[rows, n])?;
    if x.len() != elements {
        return Err(Error::Length { what: "matrix to sum", expected: format!("{rows} rows of {n}"), got: x.len() });
    }
    if n == 0 {
        return Ok(Vec::new());
    }
    let tasks = rows.div_ceil(ROWS_OF_TASK).max(1);
    let mut parts = filled("column sums", product("column sums", &[tasks, n])?, E::Float::ZERO)?;
    let shared = Shared::new(&mut parts);
    let arch = instruction_set();
    run_tasks(elements, tasks, |task| {
        let of_task = task * ROWS_OF_TASK..rows.min((task + 1) * ROWS_OF_TASK);
        // SAFETY: each task has a row of its own.
        let to = unsafe { shared.rows(task * n, 1, n, n) };
        arch.dispatch(AddRows { from: Matrix::new(x, rows, n, n), rows: of_task, to })
    })?;
    // The tasks' sums are added pair by pair, then the sums of pairs, and so on.
    let mut stride = 1;
    while stride < tasks {
        for task in (0..tasks - stride).step_by(2 * stride) {
            let (to, from) = parts.split_at_mut((task + stride) * n);
            to[task * n..][..n].iter_mut().zip(&*from).for_each(|(to, x)| *to += *x);
        }
        stride *= 2;
    }
    parts.truncate(n);
    Ok(parts)
}

/// to += Σ rows
struct AddRows<'a, E: Number> {
    from: Matrix<'a, E>,
    rows: Range<usize>,
    to: MatrixMut<'a, E::Float>,
}

impl<E: Number> WithSimd for AddRows<'_, E> {
    type Output = Result<(), Error>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> Result<(), Error> {
        let n = self.from.columns();
        let mut scratch = None;
        pieces!(scratch, E::Float: sums: n, wide: n);
        for first in self.rows.clone().step_by(ROWS) {
            sums.fill(E::Float::ZERO);
            for row in first..self.rows.end.min(first + ROWS) {
                let row = self.from.row(row);
                let row = match E::as_floats(row) {
                    Some(row) => row,
                    None => {
                        E::widen_all(row, wide);
                        &*wide
                    }
                };
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += *x);
            }
            self.to.row(0).iter_mut().zip(&*sums).for_each(|(to, sum)| *to += *sum);
        }
        Ok(())
    }
}
