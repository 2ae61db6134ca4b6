//! Products with so few rows that the right operand is read where it is: what takes the time is its way from memory, or what
//! packing would cost.
// Indices, since a closure of an iterator isn't inlined into the code that the instruction set was chosen for.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::dtype::{Number, widen_rows};
use crate::gemm::microkernel::{in_blocks, load_at, store_at};
use crate::matmul::Operand;
use crate::matmul::tile::K_BLOCK;
use crate::matrix::{Matrix, MatrixMut, Raw};
use crate::simd::{
    CACHE_LINE, MAX_LANES, SimdFloat, instruction_set, load_up_to, prefetch, prefetch_to_second_level, store_up_to,
};

/// The most rows that are multiplied with a right operand that stands row by row.
const MAX_ROWS: usize = 8;

/// The most rows that are multiplied with a right operand that stands column by column, which has to be transposed to be packed.
/// On a Zen 3 core it takes about as long to transpose it for 84 rows as to sum across lanes; with 42 rows the sums are 1.2 times as
/// fast, with 21 rows 1.3 times.
const MAX_ROWS_OF_DOTS: usize = 64;

/// How far ahead memory is asked for, in numbers: as far as decoding does, which reads keys in the same way.
const AHEAD: usize = 1024;

/// The same where rows of weights are read, in rows.
const ROWS_AHEAD: usize = 8;

/// Whether a product of `rows` rows is computed here. (The order of its sums depends on it, so all tiles do as one.)
pub(super) fn suits<E: Number>(rows: usize, pairs: &[(Operand<E>, Operand<E>)]) -> bool {
    pairs.iter().all(|(_, b)| match b.strides() {
        [1, _] => rows <= MAX_ROWS_OF_DOTS && (rows <= MAX_ROWS || E::as_floats(&[]).is_some()),
        [_, 1] => rows <= MAX_ROWS,
        _ => false,
    })
}

/// Numbers of scratch for rows of the left operand, and for those of the right one.
pub(super) fn scratch_sizes<E: Number>(rows: usize, columns: usize, pairs: &[(Operand<E>, Operand<E>)]) -> [usize; 2] {
    let k = pairs.iter().map(|(a, _)| a.dims()[1]).max().unwrap_or(0);
    let is_quantised = pairs.iter().any(|(_, b)| b.is_quantised());
    let is_read_in_place = E::as_floats(&[]).is_some() && !is_quantised;
    if is_read_in_place { [rows * k, 0] } else { [rows * k, (MAX_DOTS * k).max(K_BLOCK * columns)] }
}

/// Columns that are widened or decoded at a time.
const MAX_DOTS: usize = 8;

/// sums += a · b, for rows `rows` of a and columns `columns` of b.
pub(super) fn add_product<E: Number>(
    (a, b): &(Operand<E>, Operand<E>),
    rows: Range<usize>,
    columns: Range<usize>,
    [left, right]: [&mut [E::Float]; 2],
    mut sums: MatrixMut<E::Float>,
) {
    let k = a.dims()[1];
    if k == 0 {
        return;
    }
    let (arch, is_one_row) = (instruction_set(), a.dims()[0] == 1);
    let a = rows_of(a, rows, k, left);
    if b.is_quantised() {
        return add_decoded(a, is_one_row, b, columns, right, sums);
    }
    let [row_stride, column_stride] = b.strides();
    if row_stride == 1 {
        let weights = Matrix::new(b.from(0, columns.start), columns.len(), k, column_stride);
        if let Some(weights) = weights.downcast::<E::Float>() {
            return arch.dispatch(AddDots { is_one_row, a, weights, sums });
        }
        for first in (0..columns.len()).step_by(MAX_DOTS) {
            let count = MAX_DOTS.min(columns.len() - first);
            let weights = widen_rows(weights.skip(first).take(count), right);
            let rows = sums.rows();
            let sums = sums.reborrow().into_block(0..rows, first..first + count);
            arch.dispatch(AddDots { is_one_row, a, weights, sums });
        }
        return;
    }
    for first in (0..k).step_by(K_BLOCK) {
        let count = K_BLOCK.min(k - first);
        let weights = Matrix::new(b.from(first, columns.start), count, columns.len(), row_stride);
        let weights = weights.downcast().unwrap_or_else(|| widen_rows(weights, right));
        arch.dispatch(AddRows { a, first, weights, sums: sums.reborrow() });
    }
}

/// sums += a · b, for columns `columns` of a quantised b. It is decoded a strip at a time, which stays in the second-level cache.
fn add_decoded<E: Number>(
    a: Matrix<E::Float>,
    is_one_row: bool,
    b: &Operand<E>,
    columns: Range<usize>,
    strip: &mut [E::Float],
    mut sums: MatrixMut<E::Float>,
) {
    let (arch, rows, k) = (instruction_set(), a.rows(), a.columns());
    if b.strides()[0] == 1 {
        for first in columns.clone().step_by(MAX_DOTS) {
            let end = columns.end.min(first + MAX_DOTS);
            b.decode_to(0..k, first..end, strip, k);
            let weights = Matrix::new(&*strip, end - first, k, k);
            let sums = sums.reborrow().into_block(0..rows, first - columns.start..end - columns.start);
            arch.dispatch(AddDots { is_one_row, a, weights, sums });
        }
        return;
    }
    for first in (0..k).step_by(K_BLOCK) {
        let end = k.min(first + K_BLOCK);
        b.decode_to(first..end, columns.clone(), strip, columns.len());
        let weights = Matrix::new(&*strip, end - first, columns.len(), columns.len());
        arch.dispatch(AddRows { a, first, weights, sums: sums.reborrow() });
    }
}

/// Rows of the left operand, each in one piece.
fn rows_of<'m, E: Number>(
    a: &Operand<'m, E>,
    rows: Range<usize>,
    k: usize,
    scratch: &'m mut [E::Float],
) -> Matrix<'m, E::Float> {
    let [row_stride, column_stride] = a.strides();
    let from = a.from(rows.start, 0);
    if column_stride == 1 {
        let matrix = Matrix::new(from, rows.len(), k, row_stride);
        return matrix.downcast().unwrap_or_else(|| widen_rows(matrix, scratch));
    }
    for (row, to) in scratch.chunks_exact_mut(k).take(rows.len()).enumerate() {
        for (i, to) in to.iter_mut().enumerate() {
            *to = from[row * row_stride + i * column_stride].widen();
        }
    }
    Matrix::new(scratch, rows.len(), k, k)
}

/// sums\[row\]\[c\] += Σ_k a\[row\]\[k\] · weights\[c\]\[k\]
struct AddDots<'a, R> {
    /// Whether the result, and not only this tile of it, is one row: its sums have another order.
    is_one_row: bool,
    a: Matrix<'a, R>,
    weights: Matrix<'a, R>,
    sums: MatrixMut<'a, R>,
}

impl<R: SimdFloat> WithSimd for AddDots<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        add_dots(simd, self.is_one_row, self.a, self.weights, self.sums);
    }
}

#[inline(always)]
fn add_dots<R: SimdFloat, S: Simd>(
    simd: S,
    is_one_row: bool,
    a: Matrix<R>,
    weights: Matrix<R>,
    mut sums: MatrixMut<R>,
) {
    let (rows, columns, k) = (a.rows(), weights.rows(), a.columns());
    assert!(weights.columns() == k && sums.rows() == rows && sums.columns() == columns, "sums of the operands' sizes");
    let (a, weights, sums) = (a.raw(), weights.raw(), sums.raw());
    // SAFETY: the assertion; the blocks lie inside the rows, the columns and k.
    unsafe {
        if is_one_row {
            // More weights at a time, as memory gives more when more of its rows are asked for.
            in_blocks!(columns, [8, 2, 1], |column, COLUMNS| {
                dots::<R, S, 1, COLUMNS>(simd, k, a, weights.from(column, 0), sums.from(0, column));
            });
            return;
        }
        let (len, at_once) = part_dims::<R>(k);
        for first_column in (0..columns).step_by(at_once) {
            let count = at_once.min(columns - first_column);
            for first in (0..k).step_by(len) {
                let last = k.min(first + len);
                let dims = [rows, count, last - first];
                let part = weights.from(first_column, first);
                let next = if last < k {
                    Some(weights.from(first_column, last))
                } else if first_column + count < columns {
                    Some(weights.from(first_column + count, 0))
                } else {
                    None
                };
                add_part::<R, S>(simd, dims, a.from(0, first), part, sums.from(0, first_column), next);
            }
        }
    }
}

/// Rows of weights that are multiplied with a block of the left operand's rows.
const COLUMNS_AT_ONCE: usize = 4;

/// What is multiplied with all rows of the left operand before the next part of the weights: with a few of those rows it fills a
/// first-level cache.
const PART_BYTES: usize = 24 << 10;

/// The numbers in a row of a part, and its rows. (A long row is cut, so that COLUMNS_AT_ONCE of them fit.)
fn part_dims<R>(k: usize) -> (usize, usize) {
    let longest = PART_BYTES / (COLUMNS_AT_ONCE * size_of::<R>());
    let len = k.div_ceil(k.div_ceil(longest)).next_multiple_of(MAX_LANES);
    (len, PART_BYTES / (len * size_of::<R>()) / COLUMNS_AT_ONCE * COLUMNS_AT_ONCE)
}

/// Adds the products with a part, and asks for the next one.
///
/// # Safety
///
/// `a` has `rows` rows of `k`, `weights` `columns` rows of `k`, `sums` `rows` rows of `columns`.
#[inline(always)]
unsafe fn add_part<R: SimdFloat, S: Simd>(
    simd: S,
    [rows, columns, k]: [usize; 3],
    a: Raw<*const R>,
    weights: Raw<*const R>,
    sums: Raw<*mut R>,
    next: Option<Raw<*const R>>,
) {
    let in_line = CACHE_LINE / size_of::<R>();
    let lines = columns * k.div_ceil(in_line);
    // The sums so far, the cache lines of the next part that have been asked for, and the row and column of the next one.
    let (mut computed, mut asked, mut at) = (0, 0, (0, 0));
    // 24 sums and the vectors that they are products of fill 31 of AVX-512's 32 registers; 12 sums fill AVX2's 16.
    macro_rules! blocks {
        ($rows:tt) => {
            in_blocks!(rows, $rows, |row, ROWS| in_blocks!(columns, [COLUMNS_AT_ONCE, 1], |column, COLUMNS| {
                computed += ROWS * COLUMNS;
                if let Some(next) = next {
                    while asked * rows * columns < computed * lines {
                        prefetch_to_second_level(next.start.wrapping_add(at.0 * next.stride + at.1));
                        asked += 1;
                        at = if at.1 + in_line < k { (at.0, at.1 + in_line) } else { (at.0 + 1, 0) };
                    }
                }
                let (a, weights, sums) = (a.from(row, 0), weights.from(column, 0), sums.from(row, column));
                dots::<R, S, ROWS, COLUMNS>(simd, k, a, weights, sums);
            }))
        };
    }
    // SAFETY: this function's own condition; the blocks lie inside the rows and columns.
    unsafe {
        if size_of::<R::Vector<S>>() == 64 {
            blocks!([6, 4, 3, 2, 1]);
        } else {
            blocks!([3, 2, 1]);
        }
    }
}

/// # Safety
///
/// `a` has N rows of `k`, `weights` P rows of `k`, `sums` N rows of P.
#[inline(always)]
unsafe fn dots<R: SimdFloat, S: Simd, const N: usize, const P: usize>(
    simd: S,
    k: usize,
    a: Raw<*const R>,
    weights: Raw<*const R>,
    sums: Raw<*mut R>,
) {
    let lanes = R::lanes::<S>();
    let whole = k / lanes * lanes;
    let mut dots = [[R::splat(simd, R::ZERO); N]; P];
    // SAFETY: this function's own condition: row is one of N, p one of P, i one of k.
    unsafe {
        for i in (0..whole).step_by(lanes) {
            let mut x = [R::splat(simd, R::ZERO); N];
            for (row, x) in x.iter_mut().enumerate() {
                *x = load_at::<R, S>(a.at(row, i));
            }
            for (p, dots) in dots.iter_mut().enumerate() {
                if N == 1 {
                    prefetch(weights.at(p, i).wrapping_add(AHEAD));
                }
                let weight = load_at::<R, S>(weights.at(p, i));
                for (dot, x) in dots.iter_mut().zip(x) {
                    *dot = R::mul_add(simd, x, weight, *dot);
                }
            }
        }
        for row in 0..N {
            if P == COLUMNS_AT_ONCE {
                let four = R::reduce_add_four(simd, [dots[0][row], dots[1][row], dots[2][row], dots[3][row]]);
                for (p, sum) in four.into_iter().enumerate() {
                    *sums.at(row, p) += sum;
                }
            } else {
                for (p, dots) in dots.iter().enumerate() {
                    *sums.at(row, p) += R::reduce_add(simd, dots[row]);
                }
            }
        }
        for row in 0..if whole < k { N } else { 0 } {
            for p in 0..P {
                let mut rest = R::ZERO;
                for i in whole..k {
                    rest += *a.at(row, i) * *weights.at(p, i);
                }
                *sums.at(row, p) += rest;
            }
        }
    }
}

/// sums\[row\]\[c\] += Σ_k a\[row\]\[first + k\] · weights\[k\]\[c\] over the rows of `weights`.
struct AddRows<'a, R> {
    a: Matrix<'a, R>,
    first: usize,
    weights: Matrix<'a, R>,
    sums: MatrixMut<'a, R>,
}

impl<R: SimdFloat> WithSimd for AddRows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        add_rows(simd, self.a, self.first, self.weights, self.sums);
    }
}

#[inline(always)]
fn add_rows<R: SimdFloat, S: Simd>(simd: S, a: Matrix<R>, first: usize, weights: Matrix<R>, mut sums: MatrixMut<R>) {
    let (rows, columns, k, lanes) = (a.rows(), weights.columns(), weights.rows(), R::lanes::<S>());
    assert!(
        first + k <= a.columns() && sums.rows() == rows && sums.columns() == columns,
        "sums of the operands' sizes"
    );
    let (a, raw_weights, raw_sums) = (a.raw(), weights.raw(), sums.raw());
    let whole = columns / lanes * lanes;
    let mut done = 0;
    // Each number of the weights is read for as many rows as registers have room for: 16 sums, or 8.
    macro_rules! strips {
        ([$($rows:expr),*], $vectors:tt) => {
            in_blocks!(rows - done, [$($rows),*], |_row, ROWS| {
                let a = a.from(done, first);
                in_blocks!(whole / lanes, $vectors, |vector, VECTORS| strip::<R, S, ROWS, VECTORS>(
                    simd,
                    k,
                    a,
                    raw_weights.from(0, vector * lanes),
                    raw_sums.from(done, vector * lanes),
                ));
                done += ROWS;
            })
        };
    }
    // SAFETY: the assertion; the blocks lie inside the rows and columns.
    unsafe {
        if size_of::<R::Vector<S>>() == 64 {
            strips!([8], [2, 1]);
            strips!([4], [4, 1]);
            strips!([2, 1], [8, 1]);
        } else {
            strips!([4], [2, 1]);
            strips!([2], [4, 1]);
            strips!([1], [8, 1]);
        }
        for row in 0..if whole < columns { rows } else { 0 } {
            let mut sum = R::splat(simd, R::ZERO);
            for i in 0..k {
                let weight = load_up_to::<R, S>(simd, &weights.row(i)[whole..]);
                sum = R::mul_add(simd, R::splat(simd, *a.at(row, first + i)), weight, sum);
            }
            let to = &mut sums.row(row)[whole..];
            let before = load_up_to::<R, S>(simd, to);
            store_up_to::<R, S>(to, R::vadd(simd, before, sum));
        }
    }
}

/// # Safety
///
/// `a` has N rows of `k`, `weights` `k` rows of V vectors, `sums` N rows of V vectors.
#[inline(always)]
unsafe fn strip<R: SimdFloat, S: Simd, const N: usize, const V: usize>(
    simd: S,
    k: usize,
    a: Raw<*const R>,
    weights: Raw<*const R>,
    sums: Raw<*mut R>,
) {
    let lanes = R::lanes::<S>();
    let ahead = weights.stride * ROWS_AHEAD;
    let mut block = [[R::splat(simd, R::ZERO); N]; V];
    // SAFETY: this function's own condition: row is one of N, v one of V, i one of k.
    unsafe {
        for i in 0..k {
            let mut x = [R::splat(simd, R::ZERO); N];
            for (row, x) in x.iter_mut().enumerate() {
                *x = R::splat(simd, *a.at(row, i));
            }
            for (v, block) in block.iter_mut().enumerate() {
                let from = weights.at(i, v * lanes);
                prefetch(from.wrapping_add(ahead));
                let weight = load_at::<R, S>(from);
                for (sum, x) in block.iter_mut().zip(x) {
                    *sum = R::mul_add(simd, x, weight, *sum);
                }
            }
        }
        for (v, block) in block.into_iter().enumerate() {
            for (row, sum) in block.into_iter().enumerate() {
                let to = sums.at(row, v * lanes);
                store_at::<R, S>(to, R::vadd(simd, load_at::<R, S>(to), sum));
            }
        }
    }
}

#[cfg(test)]
#[path = "few_rows_tests.rs"]
mod tests;
