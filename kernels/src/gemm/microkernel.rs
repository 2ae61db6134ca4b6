//! The inner loops: small blocks of products that stay in registers.
//!
//! The lanes of a vector are queries. A *panel* is [`VECTORS`] vectors of them, W queries in all, packed as \[d\]\[W\]; the
//! scores of a panel lie as \[key\]\[W\]. Keys and values stand as the caller has them, row by row, each number broadcast from
//! where it is: only the queries are transposed, and no sum runs across lanes.
//!
//! With AVX2, a block of 6 rows by 2 vectors holds 12 sums, 2 vectors of queries and 1 broadcast: 15 of 16 registers.

use pulp::Simd;

use crate::matrix::{Matrix, MatrixMut, Raw};
use crate::simd::{MAX_LANES, SimdFloat, as_vectors, as_vectors_mut};

/// Vectors in a panel.
pub(crate) const VECTORS: usize = 2;

/// The vectors of a panel's row.
pub(crate) type Row<R, S> = [<R as SimdFloat>::Vector<S>; VECTORS];

/// Queries in a panel.
#[inline(always)]
pub(crate) fn panel_width<R: SimdFloat, S: Simd>() -> usize {
    VECTORS * R::lanes::<S>()
}

/// The vectors of a panel's row.
#[inline(always)]
pub(crate) fn panel_row<R: SimdFloat, S: Simd>(row: &[R]) -> &Row<R, S> {
    as_vectors::<R, S>(row).first_chunk().expect("a row of a panel")
}

/// As [`panel_row`], to write.
#[inline(always)]
pub(crate) fn panel_row_mut<R: SimdFloat, S: Simd>(row: &mut [R]) -> &mut Row<R, S> {
    as_vectors_mut::<R, S>(row).first_chunk_mut().expect("a row of a panel")
}

/// Numbers of a row that is read and written in whole vectors of any instruction set.
#[inline(always)]
pub(crate) fn pad(dim: usize) -> usize {
    dim.next_multiple_of(MAX_LANES)
}

/// # Safety
///
/// `from` points to `lanes` numbers.
#[inline(always)]
pub(crate) unsafe fn load_at<R: SimdFloat, S: Simd>(from: *const R) -> R::Vector<S> {
    // SAFETY: this function's own condition; any bits are a vector.
    unsafe { from.cast::<R::Vector<S>>().read_unaligned() }
}

/// `V` vectors, one behind the other. (A loop and no closure: what isn't inlined into the function that dispatched on the
/// instruction set is compiled without it.)
///
/// # Safety
///
/// `from` points to `V · lanes` numbers.
#[inline(always)]
unsafe fn load_all<R: SimdFloat, S: Simd, const V: usize>(simd: S, from: *const R) -> [R::Vector<S>; V] {
    let mut vectors = [R::splat(simd, R::ZERO); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: this function's own condition.
        *vector = unsafe { load_at::<R, S>(from.add(v * R::lanes::<S>())) };
    }
    vectors
}

/// # Safety
///
/// `to` points to room for `lanes` numbers.
#[inline(always)]
pub(crate) unsafe fn store_at<R: SimdFloat, S: Simd>(to: *mut R, x: R::Vector<S>) {
    // SAFETY: this function's own condition.
    unsafe { to.cast::<R::Vector<S>>().write_unaligned(x) }
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

/// scores\[j\]\[W\] = Σ_d rows\[j\]\[d\] · panel\[d\]\[W\]. With `MAX`, `largest` becomes the greatest of itself and them, lane by
/// lane.
///
/// # Panics
///
/// If `panel` has less than d · W numbers, or `scores` less than a row of W for each of `rows`.
#[inline(always)]
pub(crate) fn dot_products<R: SimdFloat, S: Simd, const MAX: bool>(
    simd: S,
    panel: &[R],
    rows: Matrix<R>,
    mut scores: MatrixMut<R>,
    largest: &mut Row<R, S>,
) {
    let (width, d, count) = (panel_width::<R, S>(), rows.columns(), rows.rows());
    assert!(panel.len() / width >= d, "the panel has a row for each column");
    assert!(scores.rows() >= count && scores.columns() >= width, "there is a row of scores for each row");
    let (panel, rows, scores) = (panel.as_ptr(), rows.raw(), scores.raw());
    // SAFETY: the assertions; block j lies inside the `count` rows, of which each has d numbers.
    unsafe {
        in_blocks!(count, [6, 4, 2, 1], |j, N| dot_block::<R, S, MAX, N>(
            simd,
            d,
            panel,
            rows.from(j, 0),
            scores.from(j, 0),
            largest,
        ));
    }
}

/// # Safety
///
/// `panel` has d · W numbers, `rows` N rows of d, `scores` N rows of W.
#[inline(always)]
unsafe fn dot_block<R: SimdFloat, S: Simd, const MAX: bool, const N: usize>(
    simd: S,
    d: usize,
    panel: *const R,
    rows: Raw<*const R>,
    scores: Raw<*mut R>,
    largest: &mut Row<R, S>,
) {
    let lanes = R::lanes::<S>();
    let mut sums = [[R::splat(simd, R::ZERO); VECTORS]; N];
    // SAFETY: i is one of d, `row` one of N, v one of the vectors of W numbers.
    unsafe {
        for i in 0..d {
            let queries: [_; VECTORS] = load_all::<R, S, VECTORS>(simd, panel.add(i * VECTORS * lanes));
            for (row, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *rows.at(row, i));
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
                store_at::<R, S>(scores.at(row, v * lanes), sum);
            }
        }
    }
}

/// panel\[d\]\[W\] = factor\[W\] · panel\[d\]\[W\] + Σ_j rows\[j\]\[d\] · weights\[j\]\[W\] over all rows of `weights`.
///
/// # Panics
///
/// If `rows` has fewer rows than `weights`, `weights` rows shorter than W, or `panel` less than d · W numbers.
#[inline(always)]
pub(crate) fn accumulate<R: SimdFloat, S: Simd>(
    simd: S,
    panel: &mut [R],
    factor: Row<R, S>,
    rows: Matrix<R>,
    weights: Matrix<R>,
) {
    let (width, d, count) = (panel_width::<R, S>(), rows.columns(), weights.rows());
    assert!(panel.len() / width >= d, "the panel has a row for each column");
    assert!(rows.rows() >= count && weights.columns() >= width, "there is a row for each row of weights");
    let (panel, rows, weights) = (panel.as_mut_ptr(), rows.raw(), weights.raw());
    // SAFETY: the assertions; block i lies inside the d columns.
    unsafe {
        in_blocks!(d, [6, 4, 2, 1], |i, N| accumulate_block::<R, S, N>(
            simd,
            panel.add(i * width),
            factor,
            rows.from(0, i),
            count,
            weights,
        ));
    }
}

/// # Safety
///
/// `panel` has N · W numbers, `rows` `count` rows of N, `weights` `count` rows of W.
#[inline(always)]
unsafe fn accumulate_block<R: SimdFloat, S: Simd, const N: usize>(
    simd: S,
    panel: *mut R,
    factor: Row<R, S>,
    rows: Raw<*const R>,
    count: usize,
    weights: Raw<*const R>,
) {
    let lanes = R::lanes::<S>();
    // A block is summed on its own before it is added: long sums would lose more to rounding.
    let mut sums = [[R::splat(simd, R::ZERO); VECTORS]; N];
    // SAFETY: j is one of `count`, i one of N, v one of the vectors of W numbers.
    unsafe {
        for j in 0..count {
            let weights: [_; VECTORS] = load_all::<R, S, VECTORS>(simd, weights.at(j, 0));
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *rows.at(j, i));
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum = R::mul_add(simd, x, weight, *sum);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let to = panel.add((i * VECTORS + v) * lanes);
                store_at::<R, S>(to, R::mul_add(simd, factor[v], load_at::<R, S>(to), sum));
            }
        }
    }
}

/// out\[j\]\[c\] += Σ_i weights\[j\]\[i\] · rows\[i\]\[c\]
///
/// # Panics
///
/// If the sizes differ, or the columns are not a multiple of the lanes.
#[inline(always)]
pub(crate) fn outer_products<R: SimdFloat, S: Simd>(
    simd: S,
    mut out: MatrixMut<R>,
    weights: Matrix<R>,
    rows: Matrix<R>,
) {
    let lanes = R::lanes::<S>();
    let (count, columns, inner) = (out.rows(), out.columns(), rows.rows());
    assert!(columns.is_multiple_of(lanes) && rows.columns() == columns, "rows of whole vectors");
    assert!(weights.rows() == count && weights.columns() == inner, "a weight for each row in and out");
    let (out, weights, rows) = (out.raw(), weights.raw(), rows.raw());
    // SAFETY: the assertions; block j lies inside the `count` rows, and one or VECTORS vectors inside the `columns` columns.
    unsafe {
        let mut column = 0;
        while column < columns {
            let rows = rows.from(0, column);
            if column + VECTORS * lanes <= columns {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<R, S, N, VECTORS>(
                    simd,
                    out.from(j, column),
                    weights.from(j, 0),
                    inner,
                    rows,
                ));
                column += VECTORS * lanes;
            } else {
                in_blocks!(count, [6, 4, 2, 1], |j, N| outer_block::<R, S, N, 1>(
                    simd,
                    out.from(j, column),
                    weights.from(j, 0),
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
/// `out` has N rows of V vectors, `weights` N rows of `inner`, `rows` `inner` rows of V vectors.
#[inline(always)]
unsafe fn outer_block<R: SimdFloat, S: Simd, const N: usize, const V: usize>(
    simd: S,
    out: Raw<*mut R>,
    weights: Raw<*const R>,
    inner: usize,
    rows: Raw<*const R>,
) {
    let lanes = R::lanes::<S>();
    let mut sums = [[R::splat(simd, R::ZERO); V]; N];
    // SAFETY: i is one of `inner`, j one of N, v one of V vectors.
    unsafe {
        for i in 0..inner {
            let columns: [_; V] = load_all::<R, S, V>(simd, rows.at(i, 0));
            for (j, sums) in sums.iter_mut().enumerate() {
                let x = R::splat(simd, *weights.at(j, i));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = R::mul_add(simd, x, column, *sum);
                }
            }
        }
        for (j, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let to = out.at(j, v * lanes);
                store_at::<R, S>(to, R::vadd(simd, load_at::<R, S>(to), sum));
            }
        }
    }
}

#[cfg(test)]
#[path = "microkernel_tests.rs"]
pub(crate) mod tests;
