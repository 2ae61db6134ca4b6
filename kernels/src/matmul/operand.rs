//! What is multiplied: matrices with any strides.

use std::ops::Range;

use crate::dtype::Number;
use crate::error::Error;
use crate::simd::prefetch_to_second_level;

/// A matrix in a slice, checked once: element (r, c) is `data[r · row_stride + c · column_stride]`.
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
    data: &'a [E],
    dims: [usize; 2],
    strides: [usize; 2],
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
        Ok(Self { what, data, dims, strides })
    }

    /// A matrix whose rows lie one behind the other.
    ///
    /// # Errors
    ///
    /// As [`Operand::new`].
    pub fn row_major(what: &'static str, data: &'a [E], rows: usize, columns: usize) -> Result<Self, Error> {
        Self::new(what, data, [rows, columns], [columns, 1])
    }

    /// The transposed matrix, in the same memory.
    #[must_use]
    pub fn transposed(self) -> Self {
        let Self { what, data, dims: [rows, columns], strides: [row_stride, column_stride] } = self;
        Self { what, data, dims: [columns, rows], strides: [column_stride, row_stride] }
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

    /// The elements from (row, column) on; none behind the last row or column.
    #[inline(always)]
    pub(super) fn from(&self, row: usize, column: usize) -> &'a [E] {
        if row < self.dims[0] && column < self.dims[1] {
            &self.data[row * self.strides[0] + column * self.strides[1]..]
        } else {
            &[]
        }
    }

    /// Where a block lies in memory; nowhere, if no two of its elements are neighbours.
    pub(super) fn lines(&self, rows: Range<usize>, columns: Range<usize>) -> Lines {
        // Along the axis whose neighbours lie apart, and along the other one.
        let (far, near, stride) = match self.strides {
            [stride, 1] => (rows, columns, stride),
            [1, stride] => (columns, rows, stride),
            _ => return Lines::default(),
        };
        let start = self.data.as_ptr().wrapping_add(far.start * stride + near.start).cast();
        Lines { start, stride: stride * size_of::<E>(), count: far.len(), len: near.len() * size_of::<E>() }
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
        /// Bytes of a cache line.
        const LINE: usize = 64;
        if self.count == 0 {
            return;
        }
        for i in self.count * part / parts..self.count * (part + 1) / parts {
            for offset in (0..self.len).step_by(LINE) {
                line(self.start.wrapping_add(i * self.stride + offset));
            }
        }
    }
}
