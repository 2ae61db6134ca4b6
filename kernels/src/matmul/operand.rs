//! What is multiplied: matrices with any strides, and matrices in quantised blocks.

use std::ops::Range;

use crate::dtype::Number;
use crate::error::Error;
use crate::quantised::QuantisedMatrix;
use crate::simd::{CACHE_LINE, prefetch_to_second_level};

/// A matrix, checked once. It is in a slice, where element (r, c) is `data[r · row_stride + c · column_stride]`, or in quantised
/// blocks.
///
/// # Examples
///
/// ```
/// use attention_kernels::matmul::Operand;
///
/// let data = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let weight = Operand::row_major("weight", &data, 2, 3)?;
/// assert_eq!(weight.transposed().dims(), [3, 2]);
/// assert!(Operand::new("weight", &data, [2, 3], [4, 1]).is_err());
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Operand<'a, E> {
    what: &'static str,
    source: Source<'a, E>,
    dims: [usize; 2],
    /// How far the neighbours along each axis are apart. Of a quantised matrix: where they would be as numbers.
    strides: [usize; 2],
}

/// Where the elements are.
#[derive(Clone, Copy)]
enum Source<'a, E> {
    Slice(&'a [E]),
    Blocks(QuantisedMatrix<'a>),
}

impl<'a, E: Number> Operand<'a, E> {
    /// A matrix of `[rows, columns]` whose rows and columns are `[row_stride, column_stride]` elements apart; `what` names it
    /// in errors.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if an element lies outside `data`.
    pub fn new(what: &'static str, data: &'a [E], dims: [usize; 2], strides: [usize; 2]) -> Result<Self, Error> {
        let last = |axis: usize| (dims[axis] - 1).checked_mul(strides[axis]);
        let is_empty = dims.contains(&0);
        if !is_empty && last(0).zip(last(1)).and_then(|(r, c)| r.checked_add(c)).is_none_or(|last| last >= data.len()) {
            let [dims, strides] = [dims, strides].map(|[r, c]| [1, 1, r, c]);
            return Err(Error::OutOfBounds { what, dims, strides, len: data.len() });
        }
        Ok(Self { what, source: Source::Slice(data), dims, strides })
    }

    /// A matrix whose rows lie one behind the other.
    ///
    /// # Errors
    ///
    /// As [`Operand::new`].
    pub fn row_major(what: &'static str, data: &'a [E], rows: usize, columns: usize) -> Result<Self, Error> {
        Self::new(what, data, [rows, columns], [columns, 1])
    }

    /// A matrix in quantised blocks, as a right operand. It is decoded a part at a time while the product is computed, and never
    /// as a whole. A product refuses it as a left operand.
    ///
    /// The numbers are multiplied as f32, or as f64 with elements of f64. AMX's tile registers multiply bf16 alone: on a processor
    /// that has them, a product of more than 8 rows of bf16 rounds the numbers to bf16.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::matmul::{Operand, Plain, matmul};
    /// use attention_kernels::quantised::{Format, QuantisedMatrix};
    ///
    /// // Two rows of 32 numbers: ones, and halves.
    /// let of_scale = |high: u8| [0, high].into_iter().chain([1; 32]);
    /// let bytes: Vec<u8> = of_scale(0x3C).chain(of_scale(0x38)).collect();
    /// let weight = Operand::quantised(QuantisedMatrix::new("weight", Format::Q8_0, &bytes, [2, 32])?);
    /// let x = Operand::row_major("x", &[2.0f32; 32], 1, 32)?;
    /// assert_eq!(matmul(x, weight.transposed(), &Plain)?, [64.0, 32.0]);
    /// let gradient = Operand::row_major("gradient", &[1.0f32, 2.0], 1, 2)?;
    /// assert_eq!(matmul(gradient, weight, &Plain)?, [2.0; 32]);
    /// assert!(matmul(weight, x.transposed(), &Plain).is_err());
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn quantised(matrix: QuantisedMatrix<'a>) -> Self {
        let [rows, columns] = matrix.dims();
        Self { what: matrix.what(), source: Source::Blocks(matrix), dims: [rows, columns], strides: [columns, 1] }
    }

    /// The transposed matrix, in the same memory.
    #[must_use]
    pub fn transposed(self) -> Self {
        let Self { what, source, dims: [rows, columns], strides: [row_stride, column_stride] } = self;
        Self { what, source, dims: [columns, rows], strides: [column_stride, row_stride] }
    }

    /// \[rows, columns\]
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub(super) fn what(&self) -> &'static str {
        self.what
    }

    pub(super) fn strides(&self) -> [usize; 2] {
        self.strides
    }

    pub(super) fn is_quantised(&self) -> bool {
        matches!(self.source, Source::Blocks(_))
    }

    /// The elements from (row, column) on; none behind the last row or column, and none of a quantised matrix.
    #[inline(always)]
    pub(super) fn from(&self, row: usize, column: usize) -> &'a [E] {
        match self.source {
            Source::Slice(data) if row < self.dims[0] && column < self.dims[1] => {
                &data[row * self.strides[0] + column * self.strides[1]..]
            }
            _ => &[],
        }
    }

    /// Decodes a block of a quantised matrix, which stays as it lies in memory: rows, or columns if it is transposed, `stride` apart
    /// in `to`.
    ///
    /// # Panics
    ///
    /// If the matrix isn't quantised.
    pub(super) fn decode_to<T: Number>(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [T], stride: usize) {
        let Source::Blocks(matrix) = self.source else { panic!("a quantised matrix") };
        let (far, near) = if self.strides[1] == 1 { (rows, columns) } else { (columns, rows) };
        matrix.decode_to(far, near, to, stride);
    }

    /// A block of a quantised matrix as numbers to compute with, in the same order, in `scratch`.
    ///
    /// # Panics
    ///
    /// If the matrix isn't quantised.
    pub(super) fn decoded<'m>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &'m mut [E::Float],
    ) -> Operand<'m, E::Float> {
        let dims = [rows.len(), columns.len()];
        let is_by_rows = self.strides[1] == 1;
        let strides = if is_by_rows { [dims[1], 1] } else { [1, dims[0]] };
        self.decode_to(rows, columns, scratch, strides[0].max(strides[1]));
        Operand { what: self.what, source: Source::Slice(scratch), dims, strides }
    }

    /// Where a block lies in memory; nowhere, if no two of its elements are neighbours.
    pub(super) fn lines(&self, rows: Range<usize>, columns: Range<usize>) -> Lines {
        // Along the axis whose neighbours lie apart, and along the other one.
        let (far, near, stride) = match self.strides {
            [stride, 1] => (rows, columns, stride),
            [1, stride] => (columns, rows, stride),
            _ => return Lines::default(),
        };
        let (start, stride, near) = match self.source {
            Source::Slice(data) => {
                let size = size_of::<E>();
                (data.as_ptr().cast::<u8>(), stride * size, near.start * size..near.end * size)
            }
            Source::Blocks(matrix) => {
                let row = matrix.bytes_of_columns(0..stride);
                (matrix.bytes().as_ptr(), row.len(), matrix.bytes_of_columns(near))
            }
        };
        Lines { start: start.wrapping_add(far.start * stride + near.start), stride, count: far.len(), len: near.len() }
    }
}

/// Pieces of memory, a stride apart, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    start: *const u8,
    stride: usize,
    count: usize,
    len: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self { start: std::ptr::null(), stride: 0, count: 0, len: 0 }
    }
}

impl Lines {
    /// Asks for all of it.
    #[inline(always)]
    pub(super) fn prefetch(&self) {
        self.for_each_line(0, 1, prefetch_to_second_level);
    }

    /// The addresses of the cache lines of part `part` of `parts`, which may be empty.
    #[inline(always)]
    pub(super) fn for_each_line(&self, part: usize, parts: usize, mut line: impl FnMut(*const u8)) {
        if self.count == 0 {
            return;
        }
        for i in self.count * part / parts..self.count * (part + 1) / parts {
            for offset in (0..self.len).step_by(CACHE_LINE) {
                line(self.start.wrapping_add(i * self.stride + offset));
            }
        }
    }
}
