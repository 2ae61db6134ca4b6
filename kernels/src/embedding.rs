//! Rows of a table by their numbers, and the gradient of the table.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::alloc::{product, reserve};
use crate::dtype::{Number, narrow_into, zeroed};
use crate::error::Error;
use crate::matrix::Shared;
use crate::schedule::run_tasks;
use crate::scratch::{Scratch, pieces};
use crate::simd::{CACHE_LINE, SimdFloat, instruction_set, prefetch};

/// Numbers of a task: some 10 µs of copies.
const TASK: usize = 32 * 1024;
/// Columns of a task. A token that stands everywhere has one row, and tasks for its parts.
const COLUMNS: usize = 256;
/// Rows ahead that are prefetched. They lie anywhere in the table, so the processor can't foresee them: 2,048 rows of 4 KB
/// take 0.75 of the time (Zen 3).
const ROWS_AHEAD: usize = 2;

/// Checks that each of `ids` is a row of a table.
fn check_ids(ids: &[u32], limit: usize) -> Result<(), Error> {
    match ids.iter().enumerate().find(|(_, id)| **id as usize >= limit) {
        Some((position, &got)) => Err(Error::Id { what: "ids of an embedding", limit, got, position }),
        None => Ok(()),
    }
}

fn check_len(what: &'static str, got: usize, sizes: [usize; 2]) -> Result<usize, Error> {
    let len = product(what, &sizes)?;
    if got == len {
        return Ok(len);
    }
    Err(Error::Length { what, expected: format!("{} x {}", sizes[0], sizes[1]), got })
}

/// The rows `ids` of a row-major table (vocabulary, dim): a matrix (ids, dim).
///
/// # Errors
///
/// A table of another length; an id that is no row; too little memory.
///
/// # Examples
///
/// ```
/// use attention_kernels::embedding::embedding;
///
/// let table = [0f32, 1.0, 10.0, 11.0, 20.0, 21.0];
/// assert_eq!(embedding(&table, [3, 2], &[2, 0, 2])?, [20.0, 21.0, 0.0, 1.0, 20.0, 21.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn embedding<E: Number>(table: &[E], [vocabulary, dim]: [usize; 2], ids: &[u32]) -> Result<Vec<E>, Error> {
    check_len("table of an embedding", table.len(), [vocabulary, dim])?;
    check_ids(ids, vocabulary)?;
    let len = product("embedded tokens", &[ids.len(), dim])?;
    let mut rows: Vec<E> = reserve("embedded tokens", len)?;
    let per_task = (TASK / dim.max(1)).max(1);
    let shared = Shared::new(&mut rows.spare_capacity_mut()[..len]);
    run_tasks(len, ids.len().div_ceil(per_task), |task| {
        let ids = &ids[task * per_task..][..per_task.min(ids.len() - task * per_task)];
        // SAFETY: each task has other tokens, so that no two have a row in common.
        let mut to = unsafe { shared.rows(task * per_task * dim, ids.len(), dim, dim) };
        let row_of = |id: u32| &table[id as usize * dim..][..dim];
        for (row, &id) in ids.iter().enumerate() {
            if let Some(&ahead) = ids.get(row + ROWS_AHEAD) {
                row_of(ahead).chunks(CACHE_LINE / size_of::<E>()).for_each(|line| prefetch(line.as_ptr()));
            }
            copy(row_of(id), to.row(row));
        }
        Ok(())
    })?;
    // SAFETY: every task has succeeded. Together they have all tokens, and each writes all numbers of its rows.
    unsafe { rows.set_len(len) };
    Ok(rows)
}

fn copy<E: Number>(from: &[E], to: &mut [MaybeUninit<E>]) {
    to.iter_mut().zip(from).for_each(|(to, x)| {
        to.write(*x);
    });
}

/// The gradient of the table of an embedding: row t is the sum of the rows of `gradient` (ids, dim) whose id is t.
///
/// Half types are summed in f32 and rounded once. The rows of a sum are added in their order. Rows of tokens that aren't there
/// are zeros, for which nothing is computed.
///
/// # Errors
///
/// A gradient of another length; an id that is no row; too little memory.
///
/// # Examples
///
/// ```
/// use attention_kernels::embedding::embedding_gradient;
///
/// let gradient = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// assert_eq!(embedding_gradient(&[2, 0, 2], &gradient, [3, 2])?, [3.0, 4.0, 0.0, 0.0, 6.0, 8.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn embedding_gradient<E: Number>(
    ids: &[u32],
    gradient: &[E],
    [vocabulary, dim]: [usize; 2],
) -> Result<Vec<E>, Error> {
    check_len("gradient of embedded tokens", gradient.len(), [ids.len(), dim])?;
    check_ids(ids, vocabulary)?;
    let mut result = zeroed::<E>("gradient of an embedding", product("gradient of an embedding", &[vocabulary, dim])?)?;
    let tokens = by_id(ids)?;
    let tasks = tasks_of_equal_ids(&tokens)?;
    let parts = dim.div_ceil(COLUMNS);
    let shared = Shared::new(&mut result);
    run_tasks(gradient.len(), tasks.len() * parts, |task| {
        let columns = task % parts * COLUMNS..(task % parts * COLUMNS + COLUMNS).min(dim);
        let mut scratch = None;
        pieces!(scratch, E::Float: sum: columns.len(), row: columns.len());
        for same in tokens[tasks[task / parts].clone()].chunk_by(|a, b| a.0 == b.0) {
            // SAFETY: equal ids are in one task for each range of columns, so that no two tasks have an element in common.
            let mut to = unsafe { shared.rows(same[0].0 as usize * dim + columns.start, 1, columns.len(), dim) };
            let gradients = Gradients { gradient, dim, columns: columns.clone() };
            instruction_set().dispatch(SumRows { same, gradients, row: &mut *row, sum: &mut *sum, to: to.row(0) });
        }
        Ok(())
    })?;
    Ok(result)
}

/// Each id and its position, ordered by id, then by position.
fn by_id(ids: &[u32]) -> Result<Vec<(u32, usize)>, Error> {
    let mut tokens = reserve("order of the tokens", ids.len())?;
    tokens.extend(ids.iter().copied().zip(0..));
    tokens.sort_unstable();
    Ok(tokens)
}

/// Ranges of tokens, each of about [`TASK`] / [`COLUMNS`] of them. Equal ids are in one range.
fn tasks_of_equal_ids(tokens: &[(u32, usize)]) -> Result<Vec<Range<usize>>, Error> {
    let per_task = TASK / COLUMNS;
    let mut tasks = reserve("tasks of an embedding", tokens.len().div_ceil(per_task))?;
    let (mut start, mut end) = (0, 0);
    for same in tokens.chunk_by(|a, b| a.0 == b.0) {
        end += same.len();
        if end - start >= per_task || end == tokens.len() {
            tasks.push(start..end);
            start = end;
        }
    }
    Ok(tasks)
}

/// Some columns of the gradients of all tokens.
struct Gradients<'a, E> {
    gradient: &'a [E],
    dim: usize,
    columns: Range<usize>,
}

/// Sums the gradients of tokens of the same id.
struct SumRows<'a, E: Number> {
    same: &'a [(u32, usize)],
    gradients: Gradients<'a, E>,
    row: &'a mut [E::Float],
    sum: &'a mut [E::Float],
    to: &'a mut [E],
}

impl<E: Number> WithSimd for SumRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Gradients { gradient, dim, columns } = self.gradients;
        self.sum.fill(E::Float::ZERO);
        for &(_, position) in self.same {
            E::widen_all(&gradient[position * dim..][columns.clone()], self.row);
            for (sum, x) in self.sum.iter_mut().zip(self.row.iter()) {
                *sum += *x;
            }
        }
        narrow_into(self.sum, self.to);
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// Small whole numbers, whose sums are exact in every type.
    fn numbers<E: Number>(count: usize) -> Vec<E> {
        (0..count).map(|i| E::narrow(E::Float::from_f64((i * 7 % 5) as f64 - 2.0))).collect()
    }

    fn check<E: Number + PartialEq + std::fmt::Debug>(vocabulary: usize, dim: usize, ids: &[u32]) {
        let table = numbers::<E>(vocabulary * dim);
        let rows = embedding(&table, [vocabulary, dim], ids).unwrap();
        let expected = ids.iter().flat_map(|&id| &table[id as usize * dim..][..dim]).copied().collect::<Vec<_>>();
        assert_eq!(rows, expected);

        let gradient = numbers::<E>(ids.len() * dim);
        let mut sums = vec![0.0; vocabulary * dim];
        for (&id, row) in ids.iter().zip(gradient.chunks(dim)) {
            for (sum, x) in sums[id as usize * dim..].iter_mut().zip(row) {
                *sum += x.widen().to_f64();
            }
        }
        let result = embedding_gradient(ids, &gradient, [vocabulary, dim]).unwrap();
        assert_eq!(result.iter().map(|x| x.widen().to_f64()).collect::<Vec<_>>(), sums);
    }

    #[test]
    fn rows_and_their_gradient_are_those_of_a_loop() {
        let count = if cfg!(miri) { 20 } else { 700 };
        let many: Vec<u32> = (0..count).map(|i| i * i % 13).collect();
        let skewed: Vec<u32> = (0..count).map(|i| if i % 50 == 3 { 5 } else { 2 }).collect();
        for dim in [1, 3, COLUMNS + 9] {
            for ids in [&many, &skewed, &vec![], &vec![12]] {
                check::<f32>(13, dim, ids);
                check::<f64>(13, dim, ids);
            }
            check::<f16>(13, dim, &skewed[..15]);
            check::<bf16>(13, dim, &many);
        }
        check::<f32>(1, 2, &[0, 0, 0]);
    }

    #[test]
    fn half_types_are_summed_in_f32() {
        let count = if cfg!(miri) { 300 } else { 4096 };
        let sum = embedding_gradient(&vec![0; count], &vec![bf16::ONE; count], [1, 1]).unwrap();
        assert_eq!(sum, [bf16::from_f64(count as f64)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = embedding(&[0f32; 6], [3, 2], &[2, 3]).unwrap_err();
        assert_eq!(error.to_string(), "the ids of an embedding: expected numbers below 3, got 3 at position 1");
        assert_eq!(embedding_gradient(&[2, 3], &[0f32; 4], [3, 2]).unwrap_err(), error);
        assert!(matches!(embedding(&[0f32; 5], [3, 2], &[2]), Err(Error::Length { .. })));
        assert!(matches!(embedding_gradient(&[2], &[0f32; 3], [3, 2]), Err(Error::Length { .. })));
        let error = embedding_gradient::<f32>(&[], &[], [usize::MAX, 2]).unwrap_err();
        assert!(matches!(error, Error::Memory { .. }));
    }

    #[test]
    fn a_table_without_columns_is_no_panic() {
        assert!(embedding::<f32>(&[], [3, 0], &[2, 1]).unwrap().is_empty());
        assert!(embedding_gradient::<f32>(&[2, 1], &[], [3, 0]).unwrap().is_empty());
    }
}
