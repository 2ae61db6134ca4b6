//! Matrices in memory: rows of equal length, a stride apart.
//!
//! A [`Matrix`] can only be made from a slice that holds all of it, a [`MatrixMut`] from a slice or from [`Shared`]
//! memory. Both have access to their rows alone, and not to what lies between the rows, so that two tasks can have
//! interleaved rows of one result.

use std::any::TypeId;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::bytemuck::Pod;

/// Whether `rows` rows of `columns` elements, `stride` apart, lie inside `len` elements.
#[inline(always)]
fn fits(len: usize, rows: usize, columns: usize, stride: usize) -> bool {
    rows == 0 || (rows - 1).checked_mul(stride).and_then(|last| last.checked_add(columns)).is_some_and(|end| end <= len)
}

/// A matrix to read. Invariant: for `'a`, row r is `columns` elements from `start + r * stride` on, which no code writes.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    start: *const T,
    rows: usize,
    columns: usize,
    stride: usize,
    memory: PhantomData<&'a [T]>,
}

// SAFETY: the invariant: no code writes what the matrix reads, so it is as good as a shared slice.
unsafe impl<T: Sync> Sync for Matrix<'_, T> {}

impl<'a, T> Matrix<'a, T> {
    /// Row r is `data[r * stride..][..columns]`.
    ///
    /// # Panics
    ///
    /// If a row lies outside `data`.
    #[inline(always)]
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, stride), "a matrix lies inside its slice");
        Self { start: data.as_ptr(), rows, columns, stride, memory: PhantomData }
    }

    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        assert!(row < self.rows, "a row of the matrix");
        // SAFETY: the assertion and the type's invariant: row `row` has `columns` elements.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride), self.columns) }
    }

    /// All elements, if the rows lie one behind the other.
    #[inline(always)]
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        let is_whole = self.rows > 0 && self.stride == self.columns;
        // SAFETY: the type's invariant: each row has `columns` elements, and the next one starts behind them.
        is_whole.then(|| unsafe { std::slice::from_raw_parts(self.start, self.rows * self.columns) })
    }

    /// The matrix without its first `count` rows.
    #[inline(always)]
    pub(crate) fn skip(self, count: usize) -> Self {
        assert!(count <= self.rows, "no more rows than there are");
        // With no rows left the address is never used.
        Self { start: self.start.wrapping_add(count * self.stride), rows: self.rows - count, ..self }
    }

    /// The first `count` columns.
    #[inline(always)]
    pub(crate) fn first_columns(self, count: usize) -> Self {
        assert!(count <= self.columns, "no more columns than there are");
        Self { columns: count, ..self }
    }

    /// The first `count` rows.
    #[inline(always)]
    pub(crate) fn take(self, count: usize) -> Self {
        assert!(count <= self.rows, "no more rows than there are");
        Self { rows: count, ..self }
    }

    /// The rows `rows` of the columns `columns`.
    #[inline(always)]
    pub(crate) fn block(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows of the matrix");
        assert!(columns.start <= columns.end && columns.end <= self.columns, "columns of the matrix");
        // With no rows the address is never used.
        let start = self.start.wrapping_add(rows.start * self.stride + columns.start);
        Self { start, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// The same bits as numbers of another type of the same size.
    #[inline(always)]
    pub(crate) fn cast<U: Pod>(self) -> Matrix<'a, U>
    where
        T: Pod,
    {
        assert!(size_of::<T>() == size_of::<U>() && align_of::<T>() == align_of::<U>(), "numbers of the same size");
        let Self { start, rows, columns, stride, .. } = self;
        Matrix { start: start.cast(), rows, columns, stride, memory: PhantomData }
    }

    /// The same matrix, if its elements are of type `U`.
    #[inline(always)]
    pub(crate) fn downcast<U: 'static>(self) -> Option<Matrix<'a, U>>
    where
        T: 'static,
    {
        let Self { start, rows, columns, stride, .. } = self;
        let is_same = TypeId::of::<T>() == TypeId::of::<U>();
        is_same.then(|| Matrix { start: start.cast(), rows, columns, stride, memory: PhantomData })
    }

    #[inline(always)]
    pub(crate) fn raw(&self) -> Raw<*const T> {
        Raw { start: self.start, stride: self.stride }
    }
}

impl<T: Copy + Default> Matrix<'_, T> {
    /// Copies the rows to others that lie `stride` apart, with zeros behind each.
    #[inline(always)]
    pub(crate) fn copy_padded(&self, to: &mut [T], stride: usize) {
        match self.as_slice() {
            Some(all) if self.columns == stride => to[..all.len()].copy_from_slice(all),
            _ => {
                for (row, to) in to.chunks_exact_mut(stride).enumerate().take(self.rows) {
                    to[..self.columns].copy_from_slice(self.row(row));
                    to[self.columns..].fill(T::default());
                }
            }
        }
    }
}

impl<'a> Matrix<'a, u32> {
    /// The same bits as twice as many numbers of half the size.
    #[inline(always)]
    pub(crate) fn halves(self) -> Matrix<'a, u16> {
        let Self { start, rows, columns, stride, .. } = self;
        Matrix { start: start.cast(), rows, columns: 2 * columns, stride: 2 * stride, memory: PhantomData }
    }
}

impl<'a> Matrix<'a, half::bf16> {
    /// The bits of the numbers: `bf16` is a u16 in a transparent struct.
    #[inline(always)]
    pub(crate) fn bits(self) -> Matrix<'a, u16> {
        let Self { start, rows, columns, stride, .. } = self;
        Matrix { start: start.cast(), rows, columns, stride, memory: PhantomData }
    }
}

/// A matrix to write. Invariant: for `'a`, row r is `columns` elements from `start + r * stride` on, which are this matrix's
/// alone. Rows may lie closer together than they are long only if they are used one after the other.
pub(crate) struct MatrixMut<'a, T> {
    start: *mut T,
    rows: usize,
    columns: usize,
    stride: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T> MatrixMut<'a, T> {
    /// Row r is `data[r * stride..][..columns]`.
    ///
    /// # Panics
    ///
    /// If a row lies outside `data`.
    #[inline(always)]
    pub(crate) fn new(data: &'a mut [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, columns, stride), "a matrix lies inside its slice");
        Self { start: data.as_mut_ptr(), rows, columns, stride, memory: PhantomData }
    }

    #[inline(always)]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    #[inline(always)]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "a row of the matrix");
        // SAFETY: the assertion and the type's invariant: row `row` has `columns` elements, and is borrowed with the matrix.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }

    /// As [`MatrixMut::row`], for as long as the matrix lives.
    #[inline(always)]
    pub(crate) fn into_row(self, row: usize) -> &'a mut [T] {
        assert!(row < self.rows, "a row of the matrix");
        // SAFETY: the assertion and the type's invariant: row `row` has `columns` elements, and no one else has the matrix.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }

    /// The same matrix, to read.
    #[inline(always)]
    pub(crate) fn as_ref(&self) -> Matrix<'_, T> {
        let Self { start, rows, columns, stride, .. } = *self;
        Matrix { start, rows, columns, stride, memory: PhantomData }
    }

    /// The `count` rows from `first` on.
    #[inline(always)]
    pub(crate) fn part(&mut self, first: usize, count: usize) -> MatrixMut<'_, T> {
        assert!(first <= self.rows && count <= self.rows - first, "no more rows than there are");
        let Self { start, columns, stride, .. } = *self;
        // With no rows left the address is never used.
        MatrixMut { start: start.wrapping_add(first * stride), rows: count, columns, stride, memory: PhantomData }
    }

    /// The first `count` rows.
    #[inline(always)]
    pub(crate) fn into_part(self, count: usize) -> Self {
        assert!(count <= self.rows, "no more rows than there are");
        Self { rows: count, ..self }
    }

    /// The rows `rows` of the columns `columns`.
    #[inline(always)]
    pub(crate) fn into_block(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows of the matrix");
        assert!(columns.start <= columns.end && columns.end <= self.columns, "columns of the matrix");
        // With no rows the address is never used.
        let start = self.start.wrapping_add(rows.start * self.stride + columns.start);
        Self { start, rows: rows.len(), columns: columns.len(), ..self }
    }

    /// The same matrix for a shorter time.
    #[inline(always)]
    pub(crate) fn reborrow(&mut self) -> MatrixMut<'_, T> {
        self.part(0, self.rows)
    }

    /// The same bits as numbers of another type of the same size.
    #[inline(always)]
    pub(crate) fn cast<U: Pod>(self) -> MatrixMut<'a, U>
    where
        T: Pod,
    {
        assert!(size_of::<T>() == size_of::<U>() && align_of::<T>() == align_of::<U>(), "numbers of the same size");
        let Self { start, rows, columns, stride, .. } = self;
        MatrixMut { start: start.cast(), rows, columns, stride, memory: PhantomData }
    }

    /// The same matrix, if its elements are of type `U`.
    #[inline(always)]
    pub(crate) fn downcast<U: 'static>(&mut self) -> Option<MatrixMut<'_, U>>
    where
        T: 'static,
    {
        let Self { start, rows, columns, stride, .. } = *self;
        let is_same = TypeId::of::<T>() == TypeId::of::<U>();
        is_same.then(|| MatrixMut { start: start.cast(), rows, columns, stride, memory: PhantomData })
    }

    /// As [`MatrixMut::downcast`], for as long as the matrix lives.
    pub(crate) fn into_downcast<U: 'static>(self) -> Option<MatrixMut<'a, U>>
    where
        T: 'static,
    {
        let Self { start, rows, columns, stride, .. } = self;
        let is_same = TypeId::of::<T>() == TypeId::of::<U>();
        is_same.then(|| MatrixMut { start: start.cast(), rows, columns, stride, memory: PhantomData })
    }

    #[inline(always)]
    pub(crate) fn raw(&mut self) -> Raw<*mut T> {
        Raw { start: self.start, stride: self.stride }
    }

    /// The same matrix as memory that need not be initialised.
    ///
    /// # Safety
    ///
    /// Only initialised elements are written to the result.
    #[inline(always)]
    pub(crate) unsafe fn into_uninit(self) -> MatrixMut<'a, MaybeUninit<T>> {
        let Self { start, rows, columns, stride, .. } = self;
        MatrixMut { start: start.cast(), rows, columns, stride, memory: PhantomData }
    }
}

impl<'a, T> MatrixMut<'a, MaybeUninit<T>> {
    /// The same matrix, to read.
    ///
    /// # Safety
    ///
    /// All elements of its rows are initialised.
    #[inline(always)]
    pub(crate) unsafe fn into_init(self) -> Matrix<'a, T> {
        let Self { start, rows, columns, stride, .. } = self;
        Matrix { start: start.cast_const().cast(), rows, columns, stride, memory: PhantomData }
    }
}

/// Where a matrix starts and how far apart its rows are: for inner loops that have checked the sizes before.
#[derive(Clone, Copy)]
pub(crate) struct Raw<P> {
    pub(crate) start: P,
    pub(crate) stride: usize,
}

impl<T> Raw<*const T> {
    /// # Safety
    ///
    /// The element lies in the matrix, or directly behind its last.
    #[inline(always)]
    pub(crate) unsafe fn at(self, row: usize, column: usize) -> *const T {
        // SAFETY: this function's own condition.
        unsafe { self.start.add(row * self.stride + column) }
    }

    /// The matrix that starts at an element of this one.
    ///
    /// # Safety
    ///
    /// As [`Raw::at`].
    #[inline(always)]
    pub(crate) unsafe fn from(self, row: usize, column: usize) -> Self {
        // SAFETY: this function's own condition.
        Self { start: unsafe { self.at(row, column) }, ..self }
    }
}

impl<T> Raw<*mut T> {
    /// # Safety
    ///
    /// The element lies in the matrix, or directly behind its last.
    #[inline(always)]
    pub(crate) unsafe fn at(self, row: usize, column: usize) -> *mut T {
        // SAFETY: this function's own condition.
        unsafe { self.start.add(row * self.stride + column) }
    }

    /// The matrix that starts at an element of this one.
    ///
    /// # Safety
    ///
    /// As [`Raw::at`].
    #[inline(always)]
    pub(crate) unsafe fn from(self, row: usize, column: usize) -> Self {
        // SAFETY: this function's own condition.
        Self { start: unsafe { self.at(row, column) }, ..self }
    }
}

/// A result that several tasks write at the same time, each its own rows.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a task can only reach the rows that `Shared::rows` hands out, and its condition keeps those of two tasks apart.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), memory: PhantomData }
    }

    /// The rows of `columns` elements, `stride` apart, that start at element `first`.
    ///
    /// # Safety
    ///
    /// As long as the result lives, no other result of this function has any of its elements.
    ///
    /// # Panics
    ///
    /// If a row lies outside the slice that this was made from.
    #[inline(always)]
    pub(crate) unsafe fn rows(&self, first: usize, rows: usize, columns: usize, stride: usize) -> MatrixMut<'_, T> {
        assert!(first <= self.len && fits(self.len - first, rows, columns, stride), "rows lie inside the result");
        // SAFETY: the assertion: `first` lies inside the slice or at its end.
        let start = unsafe { self.start.add(first) };
        MatrixMut { start, rows, columns, stride, memory: PhantomData }
    }
}

/// Numbers that have been written.
///
/// # Safety
///
/// All of them are initialised.
#[inline(always)]
pub(crate) unsafe fn initialised<T>(numbers: &mut [MaybeUninit<T>]) -> &mut [T] {
    // SAFETY: this function's own condition; `MaybeUninit<T>` lies in memory as T does.
    unsafe { &mut *(std::ptr::from_mut(numbers) as *mut [T]) }
}

#[cfg(test)]
#[path = "matrix_tests.rs"]
mod tests;
