//! The inner loops: small blocks of products that stay in registers.
//!
//! The lanes of a vector are queries. A *panel* is [`VECTORS`] vectors of them, W queries in all, packed as [d][W]; scores
//! of a panel lie as [key][W]. Keys and values stand as the caller has them, row by row, each number broadcast from
//! where it is: nothing but the queries is ever transposed, and no sum runs across lanes.
//!
//! With AVX2, a block of 6 rows by 2 vectors holds 12 sums, 2 vectors of queries and 1 broadcast: 15 of 16 registers.

use pulp::Simd;

use super::real::Real;

/// Vectors in a panel.
pub(crate) const VECTORS: usize = 2;

/// Queries in a panel.
pub(crate) fn panel_width<R: Real, S: Simd>() -> usize {
    VECTORS * R::lanes::<S>()
}

/// Entries of a row that is read and written in whole vectors of any instruction set, of which 16 numbers are the longest.
pub(crate) fn pad(dim: usize) -> usize {
    dim.next_multiple_of(16)
}

/// # Safety
///
/// `from` points to `lanes` numbers.
#[inline(always)]
pub(crate) unsafe fn load<R: Real, S: Simd>(from: *const R) -> R::Vector<S> {
    // SAFETY: the caller has `lanes` numbers there.
    unsafe { from.cast::<R::Vector<S>>().read_unaligned() }
}

/// `V` vectors, one behind the other. (A loop and no closure: what isn't inlined into the function that dispatched on the
/// instruction set is compiled without it.)
///
/// # Safety
///
/// `from` points to `V · lanes` numbers.
#[inline(always)]
pub(crate) unsafe fn load_all<R: Real, S: Simd, const V: usize>(simd: S, from: *const R) -> [R::Vector<S>; V] {
    let mut vectors = [R::splat(simd, R::ZERO); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller has `V · lanes` numbers there.
        *vector = unsafe { load::<R, S>(from.add(v * R::lanes::<S>())) };
    }
    vectors
}

/// # Safety
///
/// `to` points to room for `lanes` numbers.
#[inline(always)]
pub(crate) unsafe fn store<R: Real, S: Simd>(to: *mut R, x: R::Vector<S>) {
    // SAFETY: the caller has room for `lanes` numbers there.
    unsafe { to.cast::<R::Vector<S>>().write_unaligned(x) }
}

/// A vector, or if there are only `count` numbers, these and zeros.
///
/// # Safety
///
/// `from` points to `count` numbers.
#[inline(always)]
pub(crate) unsafe fn load_up_to<R: Real, S: Simd>(_: S, from: *const R, count: usize) -> R::Vector<S> {
    // SAFETY: as the caller promises; the longest vector has 16 numbers.
    unsafe {
        if count >= R::lanes::<S>() {
            return load::<R, S>(from);
        }
        let mut numbers = [R::ZERO; 16];
        numbers.as_mut_ptr().copy_from_nonoverlapping(from, count);
        load::<R, S>(numbers.as_ptr())
    }
}

/// Asks for the memory at an address, which need not be anybody's.
#[inline(always)]
pub(crate) fn prefetch<R>(address: *const R) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a hint reads nothing, and SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// Goes over `count` rows in blocks of the given sizes, largest first: `$start` is a block's first row, `$rows` its constant
/// number of rows.
macro_rules! in_blocks {
    ($count:expr, [$($size:expr),*], |$start:ident, $rows:ident| $block:expr) => {{
        let count = $count;
        let mut $start = 0;
        $(while count - $start >= $size {
            const $rows: usize = $size;
            $block;
            $start += $size;
        })*
    }};
}
pub(crate) use in_blocks;

/// A matrix whose rows stand `stride` numbers apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) start: T,
    pub(crate) stride: usize,
}

impl<T> Rows<*const T> {
    /// The rows behind the first few.
    ///
    /// # Safety
    ///
    /// There are as many.
    #[inline(always)]
    pub(crate) unsafe fn skip(self, count: usize) -> Self {
        // SAFETY: as the caller promises.
        Self { start: unsafe { self.start.add(count * self.stride) }, ..self }
    }

    /// The same rows of another type of number.
    #[inline(always)]
    pub(crate) fn cast<U>(self) -> Rows<*const U> {
        Rows { start: self.start.cast(), stride: self.stride }
    }
}

impl<T> Rows<*mut T> {
    /// The rows behind the first few.
    ///
    /// # Safety
    ///
    /// There are as many.
    #[inline(always)]
    pub(crate) unsafe fn skip(self, count: usize) -> Self {
        // SAFETY: as the caller promises.
        Self { start: unsafe { self.start.add(count * self.stride) }, ..self }
    }

    /// The same rows, to read.
    #[inline(always)]
    pub(crate) fn cast_const(self) -> Rows<*const T> {
        Rows { start: self.start.cast_const(), stride: self.stride }
    }

    /// The same rows of another type of number.
    #[inline(always)]
    pub(crate) fn cast<U>(self) -> Rows<*mut U> {
        Rows { start: self.start.cast(), stride: self.stride }
    }
}

/// scores[j][W] = Σ_d rows[j][d] · panel[d][W] for `count` rows. With `MAX`, `largest` becomes the greatest of itself and
/// them, lane by lane.
///
/// # Safety
///
/// `panel` has d · W numbers, `rows` count rows of d, `scores` count rows of W.
#[inline(always)]
pub(crate) unsafe fn dot_products<R: Real, S: Simd, const MAX: bool>(
    simd: S,
    d: usize,
    panel: *const R,
    rows: Rows<*const R>,
    count: usize,
    scores: Rows<*mut R>,
    largest: &mut [R::Vector<S>; VECTORS],
) {
    // SAFETY: as the caller promises; a block stays inside `count` rows.
    unsafe {
        in_blocks!(count, [6, 4, 2, 1], |j, N| dot_block::<R, S, MAX, N>(
            simd,
            d,
            panel,
            Rows { start: rows.start.add(j * rows.stride), ..rows },
            Rows { start: scores.start.add(j * scores.stride), ..scores },
            largest,
        ));
    }
}

/// # Safety
///
/// As [`dot_products`], for N rows.
#[inline(always)]
unsafe fn dot_block<R: Real, S: Simd, const MAX: bool, const N: usize>(
    simd: S,
    d: usize,
    panel: *const R,
    rows: Rows<*const R>,
    scores: Rows<*mut R>,
    largest: &mut [R::Vector<S>; VECTORS],
) {
    let lanes = R::lanes::<S>();
    let mut sums = [[R::splat(simd, R::ZERO); VECTORS]; N];
    // SAFETY: as the caller promises.
    unsafe {
        for i in 0..d {
            let at = panel.add(i * VECTORS * lanes);
            let queries: [_; VECTORS] = load_all::<R, S, VECTORS>(simd, at);
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *rows.start.add(row * rows.stride + i));
                for (sum, query) in sums.iter_mut().zip(queries) {
                    *sum = R::mul_add(simd, x, query, *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                if MAX {
                    largest[v] = R::max(simd, largest[v], sum);
                }
                store::<R, S>(scores.start.add(row * scores.stride + v * lanes), sum);
            }
        }
    }
}

/// panel[d][W] = factor[W] · panel[d][W] + Σ_j rows[j][d] · weights[j][W] over `count` rows.
///
/// # Safety
///
/// `panel` has d · W numbers, `rows` count rows of d, `weights` count rows of W.
#[inline(always)]
pub(crate) unsafe fn accumulate<R: Real, S: Simd>(
    simd: S,
    d: usize,
    panel: *mut R,
    factor: [R::Vector<S>; VECTORS],
    rows: Rows<*const R>,
    count: usize,
    weights: Rows<*const R>,
) {
    let width = panel_width::<R, S>();
    // SAFETY: as the caller promises; a block stays inside the d columns.
    unsafe {
        in_blocks!(d, [6, 4, 2, 1], |i, N| accumulate_block::<R, S, N>(
            simd,
            panel.add(i * width),
            factor,
            Rows { start: rows.start.add(i), ..rows },
            count,
            weights,
        ));
    }
}

/// # Safety
///
/// As [`accumulate`], for N columns.
#[inline(always)]
unsafe fn accumulate_block<R: Real, S: Simd, const N: usize>(
    simd: S,
    panel: *mut R,
    factor: [R::Vector<S>; VECTORS],
    rows: Rows<*const R>,
    count: usize,
    weights: Rows<*const R>,
) {
    let lanes = R::lanes::<S>();
    // SAFETY: as the caller promises.
    unsafe {
        // A block is summed on its own before it is added: long sums would lose more to rounding.
        let mut sums = [[R::splat(simd, R::ZERO); VECTORS]; N];
        for j in 0..count {
            let at = weights.start.add(j * weights.stride);
            let weights: [_; VECTORS] = load_all::<R, S, VECTORS>(simd, at);
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *rows.start.add(j * rows.stride + i));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = R::mul_add(simd, x, weight, *sum);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let place = panel.add((i * VECTORS + v) * lanes);
                store::<R, S>(place, R::mul_add(simd, factor[v], load::<R, S>(place), sum));
            }
        }
    }
}

/// out[j][c] += Σ_i weights[j][i] · rows[i][c] for `count` rows j, `inner` rows i and `columns` columns, a multiple of the
/// lanes.
///
/// # Safety
///
/// `out` has count rows of `columns`, `rows` inner rows of `columns`, `weights` count rows of `inner`.
#[inline(always)]
pub(crate) unsafe fn outer_products<R: Real, S: Simd>(
    simd: S,
    columns: usize,
    out: Rows<*mut R>,
    count: usize,
    weights: Rows<*const R>,
    inner: usize,
    rows: Rows<*const R>,
) {
    let lanes = R::lanes::<S>();
    // SAFETY: as the caller promises; a block stays inside `count` rows and `columns` columns.
    unsafe {
        let mut column = 0;
        while column < columns {
            let rows = Rows { start: rows.start.add(column), ..rows };
            let out_at = |j: usize| Rows { start: out.start.add(j * out.stride + column), ..out };
            let weights_at = |j: usize| Rows { start: weights.start.add(j * weights.stride), ..weights };
            if column + VECTORS * lanes <= columns {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<R, S, N, VECTORS>(
                    simd,
                    out_at(j),
                    weights_at(j),
                    inner,
                    rows,
                ));
                column += VECTORS * lanes;
            } else {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<R, S, N, 1>(
                    simd,
                    out_at(j),
                    weights_at(j),
                    inner,
                    rows,
                ));
                column += lanes;
            }
        }
    }
}

/// # Safety
///
/// As [`outer_products`], for N rows and V vectors of columns.
#[inline(always)]
unsafe fn outer_block<R: Real, S: Simd, const N: usize, const V: usize>(
    simd: S,
    out: Rows<*mut R>,
    weights: Rows<*const R>,
    inner: usize,
    rows: Rows<*const R>,
) {
    let lanes = R::lanes::<S>();
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [[R::splat(simd, R::ZERO); V]; N];
        for i in 0..inner {
            let at = rows.start.add(i * rows.stride);
            let columns: [_; V] = load_all::<R, S, V>(simd, at);
            for (j, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *weights.start.add(j * weights.stride + i));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = R::mul_add(simd, x, column, *sum);
                }
            }
        }
        for (j, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let place = out.start.add(j * out.stride + v * lanes);
                store::<R, S>(place, R::vadd(simd, load::<R, S>(place), sum));
            }
        }
    }
}
