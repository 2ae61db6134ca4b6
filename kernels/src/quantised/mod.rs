//! Matrices whose numbers are stored in blocks of a few bits each, and decoded where they are needed.
//!
//! A row is cut into blocks of equal length, and each block has scales of its own: see [`Format`]. A product with such a matrix
//! takes it as [`Operand::quantised`](crate::matmul::Operand::quantised) and decodes a part of it at a time.
//!
//! ```
//! use attention_kernels::quantised::{Format, QuantisedMatrix};
//!
//! // One block: a scale of 0.5 in f16, and 1 to 32 in i8.
//! let bytes: Vec<u8> = [0x00, 0x38].into_iter().chain(1..33).collect();
//! let matrix = QuantisedMatrix::new("weight", Format::Q8_0, &bytes, [1, 32])?;
//! assert_eq!(matrix.dequantise::<f32>()?[..3], [0.5, 1.0, 1.5]);
//! # Ok::<(), attention_kernels::Error>(())
//! ```
// Indices, since a closure of an iterator isn't inlined into the code that the instruction set was chosen for.
#![allow(clippy::needless_range_loop)]

mod format;
mod nf4;

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::alloc::{product, reserve};
use crate::dtype::Number;
use crate::error::Error;
use crate::matrix::{MatrixMut, Shared};
use crate::quantised::format::{Block, GROUP, Q4_0, Q4K, Q5_0, Q5K, Q6K, Q8_0};
use crate::schedule::run_tasks;
use crate::simd::{SimdFloat, instruction_set};

pub use format::Format;
pub use nf4::quantise_nf4;

/// Numbers of a task that dequantises: some 10 µs.
const TASK: usize = 32 * 1024;

/// A row-major matrix in blocks of a [`Format`], checked once. Its numbers are those of f32 that the format's formula gives.
#[derive(Clone, Copy, Debug)]
pub struct QuantisedMatrix<'a> {
    what: &'static str,
    format: Format,
    bytes: &'a [u8],
    dims: [usize; 2],
}

impl<'a> QuantisedMatrix<'a> {
    /// A matrix of `[rows, columns]` whose blocks lie one behind the other, row by row; `what` names it in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Dims`] if the columns aren't a multiple of [`Format::block_len`]; [`Error::Length`] if there are too few bytes or
    /// too many; [`Error::Memory`] if no memory could hold as many.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::quantised::{Format, QuantisedMatrix};
    ///
    /// let bytes = [0; 3 * 18];
    /// assert_eq!(QuantisedMatrix::new("weight", Format::Q4_0, &bytes, [3, 32])?.dims(), [3, 32]);
    /// let error = QuantisedMatrix::new("weight", Format::Q4_0, &bytes, [2, 32]).unwrap_err();
    /// assert_eq!(error.to_string(), "the weight: expected 36 bytes in blocks of 18, got 54 elements");
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn new(what: &'static str, format: Format, bytes: &'a [u8], dims: [usize; 2]) -> Result<Self, Error> {
        let ([rows, columns], len) = (dims, format.block_len());
        if !columns.is_multiple_of(len) {
            let expected = format!("rows in whole blocks of {len}");
            return Err(Error::Dims { what, expected, got: [1, 1, rows, columns] });
        }
        let expected = product(what, &[rows, columns / len, format.block_bytes()])?;
        if bytes.len() != expected {
            let expected = format!("{expected} bytes in blocks of {}", format.block_bytes());
            return Err(Error::Length { what, expected, got: bytes.len() });
        }
        Ok(Self { what, format, bytes, dims })
    }

    /// \[rows, columns\]
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// How the blocks are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The blocks.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The matrix's name in errors.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// Whether the scales of all blocks are finite. Then so are all numbers.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::quantised::{Format, QuantisedMatrix};
    ///
    /// let mut bytes = [0; 34];
    /// assert!(QuantisedMatrix::new("weight", Format::Q8_0, &bytes, [1, 32])?.scales_are_finite());
    /// bytes[1] = 0x7C; // infinity in f16
    /// assert!(!QuantisedMatrix::new("weight", Format::Q8_0, &bytes, [1, 32])?.scales_are_finite());
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn scales_are_finite(&self) -> bool {
        self.bytes.chunks_exact(self.format.block_bytes()).all(|block| self.format.has_finite_scales(block))
    }

    /// All numbers, row-major, each rounded to `E` once.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if there is no memory for them.
    pub fn dequantise<E: Number>(&self) -> Result<Vec<E>, Error> {
        let [rows, columns] = self.dims;
        let len = product(self.what, &[rows, columns])?;
        let mut numbers = reserve(self.what, len)?;
        if len == 0 {
            return Ok(numbers);
        }
        let per_task = (TASK / columns).max(1);
        let shared = Shared::new(&mut numbers.spare_capacity_mut()[..len]);
        run_tasks(len, rows.div_ceil(per_task), |task| {
            let of_task = task * per_task..rows.min((task + 1) * per_task);
            // SAFETY: each task has other rows.
            let to = unsafe { shared.rows(of_task.start * columns, of_task.len(), columns, columns) };
            self.decode(of_task, 0..columns, to);
            Ok(())
        })?;
        // SAFETY: every task has succeeded. Together they have all rows, and `decode` writes all numbers of its rows.
        unsafe { numbers.set_len(len) };
        Ok(numbers)
    }

    /// The columns `columns` of the rows `rows`, at any place in the blocks, written to `to`, row-major.
    ///
    /// # Errors
    ///
    /// [`Error::Dims`] if a row or a column isn't there; [`Error::Length`] if `to` has another length.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::quantised::{Format, QuantisedMatrix};
    ///
    /// // Two blocks: a scale of 1 in f16, and 0 to 32 in i8.
    /// let block: Vec<u8> = [0x00, 0x3C].into_iter().chain(0..32).collect();
    /// let bytes = block.repeat(2);
    /// let mut part = [0.0f64; 4];
    /// let matrix = QuantisedMatrix::new("weight", Format::Q8_0, &bytes, [1, 64])?;
    /// matrix.dequantise_block(0..1, 30..34, &mut part)?;
    /// assert_eq!(part, [30.0, 31.0, 0.0, 1.0]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn dequantise_block<E: Number>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        to: &mut [E],
    ) -> Result<(), Error> {
        let is_inside = |range: &Range<usize>, len: usize| range.start <= range.end && range.end <= len;
        if !is_inside(&rows, self.dims[0]) || !is_inside(&columns, self.dims[1]) {
            let expected = format!("rows {rows:?} and columns {columns:?}");
            return Err(Error::Dims { what: self.what, expected, got: [1, 1, self.dims[0], self.dims[1]] });
        }
        // No larger than the matrix, whose size can be counted unless it has no blocks.
        let len = product(self.what, &[rows.len(), columns.len()])?;
        if to.len() != len {
            let expected = format!("room for {} x {}", rows.len(), columns.len());
            return Err(Error::Length { what: self.what, expected, got: to.len() });
        }
        let stride = columns.len();
        self.decode_to(rows, columns, to, stride);
        Ok(())
    }

    /// As [`QuantisedMatrix::dequantise_block`], to rows that lie `stride` apart.
    ///
    /// # Panics
    ///
    /// If the block lies outside the matrix, or a row outside `to`.
    pub(crate) fn decode_to<E: Number>(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [E], stride: usize) {
        let to = MatrixMut::new(to, rows.len(), columns.len(), stride);
        // SAFETY: `Number` is sealed, and each `narrow_all`, through which `decode` writes, writes initialised numbers alone.
        self.decode(rows, columns, unsafe { to.into_uninit() });
    }

    /// Where the blocks of a row that hold these columns lie, in bytes from the start of the row.
    pub(crate) fn bytes_of_columns(&self, columns: Range<usize>) -> Range<usize> {
        let (len, bytes) = (self.format.block_len(), self.format.block_bytes());
        columns.start / len * bytes..columns.end.div_ceil(len) * bytes
    }

    /// Writes all numbers of a block.
    fn decode<E: Number>(&self, rows: Range<usize>, columns: Range<usize>, to: MatrixMut<MaybeUninit<E>>) {
        // There may be countless rows of no columns.
        if !columns.is_empty() {
            instruction_set().dispatch(Decode { matrix: self, rows, columns, to });
        }
    }
}

/// Decodes a block of a matrix, which `to` has room for.
struct Decode<'a, E: Number> {
    matrix: &'a QuantisedMatrix<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
    to: MatrixMut<'a, MaybeUninit<E>>,
}

impl<E: Number> WithSimd for Decode<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.matrix.format {
            Format::Q8_0 => self.rows::<34, Q8_0>(),
            Format::Q4_0 => self.rows::<18, Q4_0>(),
            Format::Q5_0 => self.rows::<22, Q5_0>(),
            Format::Q4K => self.rows::<144, Q4K>(),
            Format::Q5K => self.rows::<176, Q5K>(),
            Format::Q6K => self.rows::<210, Q6K>(),
            Format::Nf4 => self.rows::<{ nf4::BYTES }, nf4::Nf4>(),
        }
    }
}

impl<E: Number> Decode<'_, E> {
    #[inline(always)]
    fn rows<const BYTES: usize, B: Block<BYTES>>(mut self) {
        let (blocks, _) = self.matrix.bytes.as_chunks::<BYTES>();
        let in_row = self.matrix.dims[1] / (B::GROUPS * GROUP);
        for (i, row) in self.rows.enumerate() {
            decode_row::<BYTES, B, E>(&blocks[row * in_row..][..in_row], &self.columns, self.to.row(i));
        }
    }
}

/// Decodes columns of a row, group by group. The first and the last group may be parts.
#[inline(always)]
fn decode_row<const BYTES: usize, B: Block<BYTES>, E: Number>(
    blocks: &[[u8; BYTES]],
    columns: &Range<usize>,
    mut to: &mut [MaybeUninit<E>],
) {
    let mut column = columns.start;
    while column < columns.end {
        let (group, first) = (column / GROUP, column % GROUP);
        let count = (GROUP - first).min(columns.end - column);
        let (part, rest) = to.split_at_mut(count);
        let block = &blocks[group / B::GROUPS];
        // A group as a whole stays in registers; a part of it is cut out in memory.
        match <&mut [_; GROUP]>::try_from(&mut *part) {
            Ok(whole) => write(&B::group(block, group % B::GROUPS), whole),
            Err(_) => write(&B::group(block, group % B::GROUPS)[first..][..count], part),
        }
        (to, column) = (rest, column + count);
    }
}

/// Writes numbers of a group as numbers of `E`.
#[inline(always)]
fn write<E: Number>(numbers: &[f32], to: &mut [MaybeUninit<E>]) {
    let mut floats = [E::Float::ZERO; GROUP];
    for i in 0..numbers.len() {
        floats[i] = E::Float::from_f64(f64::from(numbers[i]));
    }
    E::narrow_all(&floats[..numbers.len()], to);
}

#[cfg(test)]
#[path = "quantised_tests.rs"]
pub(crate) mod tests;
