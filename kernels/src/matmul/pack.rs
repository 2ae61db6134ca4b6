//! Operands in the order in which the kernel reads them.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::dtype::Number;
use crate::gemm::transpose::transpose;
use crate::matmul::Operand;
use crate::matmul::microkernel::{Blocks, MAX_WIDTH, panel_width};
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::{SimdFloat, instruction_set};

/// How many rows ahead memory is asked for while rows are packed.
const ROWS_AHEAD: usize = 8;

/// The most rows of a tile for which the right operand is read where it is. It takes about as long to pack a number as to multiply
/// it with 16 rows.
const MAX_ROWS_OF_DIRECT: usize = 64;

/// The columns of a right operand, of a tile of `rows` rows, that the kernel reads where they are.
pub(super) fn direct_right<'a, E: Number>(
    b: &Operand<'a, E>,
    k: Range<usize>,
    columns: Range<usize>,
    rows: usize,
) -> Option<Matrix<'a, E::Float>> {
    let [row_stride, column_stride] = b.strides();
    if column_stride != 1 || rows > MAX_ROWS_OF_DIRECT || b.is_quantised() {
        return None;
    }
    Matrix::new(b.from(k.start, columns.start), k.len(), columns.len(), row_stride).downcast()
}

/// Columns of a quantised right operand that are decoded at a time, if each column is in one piece. They fill whole panels of any
/// width.
pub(super) const DECODED_COLUMNS: usize = MAX_WIDTH;

/// The most rows that are decoded at a time, if each row is in one piece: those of a tile stay in a first-level cache.
const DECODED_ROWS: usize = 16;

/// As [`PackRight`], for a right operand of any kind. A quantised one is decoded a part at a time, in the order in which it lies in
/// memory. For it, `wide` has room for `DECODED_COLUMNS` rows of `k`.
pub(super) fn pack_right<E: Number>(
    b: &Operand<E>,
    k: Range<usize>,
    columns: Range<usize>,
    panels: &mut [E::Float],
    wide: &mut [E::Float],
) {
    let (arch, len, start) = (instruction_set(), k.len(), k.start);
    if !b.is_quantised() {
        return arch.dispatch(PackRight { b, k, columns, panels, wide });
    }
    if b.strides()[1] == 1 {
        let count = columns.len();
        let at_once = (wide.len() / count).min(DECODED_ROWS);
        for first in k.clone().step_by(at_once) {
            let end = k.end.min(first + at_once);
            b.decode_to(first..end, columns.clone(), wide, count);
            let rows = Matrix::new(&*wide, end - first, count, count);
            arch.dispatch(PackRows { rows, first: first - start, len, panels: &mut *panels });
        }
        return;
    }
    let starts = columns.clone().step_by(DECODED_COLUMNS);
    for (first, panels) in starts.zip(panels.chunks_mut(DECODED_COLUMNS * len)) {
        let count = DECODED_COLUMNS.min(columns.end - first);
        let decoded = b.decoded(k.clone(), first..first + count, wide);
        // Numbers that are computed with aren't widened.
        let wide = &mut [];
        arch.dispatch(PackRight { b: &decoded, k: 0..len, columns: 0..count, panels, wide });
    }
}

/// Packs rows as the rows `first` and those behind it of panels of `len` rows.
struct PackRows<'a, R> {
    rows: Matrix<'a, R>,
    first: usize,
    len: usize,
    panels: &'a mut [R],
}

impl<R: SimdFloat + Number<Float = R>> WithSimd for PackRows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, first, len, panels } = self;
        let width = panel_width::<R, S>();
        let (whole, rest) = (rows.columns() / width, rows.columns() % width);
        for i in 0..rows.rows() {
            let to = &mut panels[(first + i) * width..];
            scatter::<R>(rows.row(i), to, width, len * width, &mut []);
            if rest > 0 {
                to[whole * len * width..][rest..width].fill(R::ZERO);
            }
        }
    }
}

/// Packs the rows `k` of the right operand's columns as panels \[k\]\[W\], zeros in the lanes behind the last column.
pub(super) struct PackRight<'a, E: Number> {
    pub(super) b: &'a Operand<'a, E>,
    pub(super) k: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) panels: &'a mut [E::Float],
    /// Room for W rows of `k`, and for a row.
    pub(super) wide: &'a mut [E::Float],
}

impl<E: Number> WithSimd for PackRight<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { b, k, columns, panels, wide } = self;
        let (width, len, count) = (panel_width::<E::Float, S>(), k.len(), columns.len());
        if !count.is_multiple_of(width) {
            panels[count / width * len * width..].fill(E::Float::ZERO);
        }
        let [row_stride, column_stride] = b.strides();
        if column_stride == 1 {
            let rows = Matrix::new(b.from(k.start, columns.start), len, count, row_stride);
            for i in 0..len {
                let ahead = k.start + i + ROWS_AHEAD;
                b.lines(ahead..ahead + 1, columns.clone()).prefetch();
                scatter::<E>(rows.row(i), &mut panels[i * width..], width, len * width, wide);
            }
            return;
        }
        for (first, panel) in columns.clone().step_by(width).zip(panels.chunks_exact_mut(len * width)) {
            let ahead = first + width;
            b.lines(k.clone(), ahead.min(columns.end)..(ahead + width).min(columns.end)).prefetch();
            let count = width.min(columns.end - first);
            let from = b.from(k.start, first);
            if row_stride == 1 {
                pack_columns(simd, Matrix::new(from, count, len, column_stride), panel, width, wide);
            } else {
                pack_apart(from, [row_stride, column_stride], count, panel, width);
            }
        }
    }
}

/// A row, `width` numbers at a time, to places that lie `stride` apart. `wide` has room for the row.
#[inline(always)]
fn scatter<E: Number>(row: &[E], to: &mut [E::Float], width: usize, stride: usize, wide: &mut [E::Float]) {
    let row = match E::as_floats(row) {
        Some(row) => row,
        None => {
            let wide = &mut wide[..row.len()];
            E::widen_all(row, wide);
            wide
        }
    };
    // With the width known a part is copied by a few instructions: it is that of a block or a panel.
    match width {
        6 => scatter_parts::<_, 6>(row, to, stride),
        8 => scatter_parts::<_, 8>(row, to, stride),
        12 => scatter_parts::<_, 12>(row, to, stride),
        16 => scatter_parts::<_, 16>(row, to, stride),
        32 => scatter_parts::<_, 32>(row, to, stride),
        _ => row.chunks(width).zip(to.chunks_mut(stride)).for_each(|(from, to)| to[..from.len()].copy_from_slice(from)),
    }
}

#[inline(always)]
fn scatter_parts<R: Copy, const WIDTH: usize>(row: &[R], to: &mut [R], stride: usize) {
    let (parts, rest) = row.as_chunks::<WIDTH>();
    for (part, from) in parts.iter().enumerate() {
        to[part * stride..][..WIDTH].copy_from_slice(from);
    }
    if !rest.is_empty() {
        to[parts.len() * stride..][..rest.len()].copy_from_slice(rest);
    }
}

/// Packs the transposed matrix: its rows are as long as `from` has rows, and lie `width` apart. `wide` has room for `from`.
#[inline(always)]
fn pack_columns<E: Number, S: Simd>(
    simd: S,
    from: Matrix<E>,
    packed: &mut [E::Float],
    width: usize,
    wide: &mut [E::Float],
) {
    let (count, len) = (from.rows(), from.columns());
    let from = match from.downcast::<E::Float>() {
        Some(from) => from,
        None => {
            for (c, to) in wide.chunks_exact_mut(len).take(count).enumerate() {
                E::widen_all(from.row(c), to);
            }
            Matrix::new(wide, count, len, len)
        }
    };
    let to = MatrixMut::new(packed, len, count, width);
    // SAFETY: the transposed numbers are initialised.
    transpose(simd, E::Float::ONE, from, unsafe { to.into_uninit() });
}

/// Packs rows of `count` numbers, `width` apart. In `from` the rows lie `strides[0]` apart, and the numbers of a row `strides[1]`.
#[inline(always)]
fn pack_apart<E: Number>(from: &[E], strides: [usize; 2], count: usize, packed: &mut [E::Float], width: usize) {
    for (i, to) in packed.chunks_exact_mut(width).enumerate() {
        for (c, to) in to[..count].iter_mut().enumerate() {
            *to = from[i * strides[0] + c * strides[1]].widen();
        }
    }
}

/// Whether a tile's rows of the left operand are packed all at once: where a column's numbers are neighbours, a cache line holds
/// numbers of several blocks.
pub(super) fn packs_all_rows<E: Number>(a: &Operand<E>) -> bool {
    matches!(a.strides(), [1, stride] if stride != 1)
}

/// Packs rows of the left operand, whose columns stand in one piece each: each block as \[k\]\[its rows\].
pub(super) struct PackLeft<'a, E: Number> {
    pub(super) a: &'a Operand<'a, E>,
    pub(super) first_row: usize,
    pub(super) k: Range<usize>,
    pub(super) blocks: Blocks,
    pub(super) packed: &'a mut [E::Float],
    /// Room for a column.
    pub(super) wide: &'a mut [E::Float],
}

impl<E: Number> WithSimd for PackLeft<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { a, first_row, k, blocks, packed, wide } = self;
        let (count, len) = (blocks.rows, k.len());
        let columns = Matrix::new(a.from(first_row, k.start), len, count, a.strides()[1]);
        // All blocks but the last two are of the same size.
        let (equal, max) = (blocks.count.saturating_sub(2), blocks.max);
        for i in 0..len {
            let ahead = k.start + i + ROWS_AHEAD;
            a.lines(first_row..first_row + count, ahead..ahead + 1).prefetch();
            let column = columns.row(i);
            if equal > 0 {
                scatter::<E>(&column[..equal * max], &mut packed[i * max..], max, len * max, wide);
            }
            for block in equal..blocks.count {
                let block = blocks.rows_of(block);
                let to = &mut packed[block.start * len + i * block.len()..][..block.len()];
                E::widen_all(&column[block], to);
            }
        }
    }
}

/// Packs a block of the left operand as \[k\]\[its rows\].
pub(super) struct PackLeftBlock<'a, E: Number> {
    pub(super) a: &'a Operand<'a, E>,
    pub(super) rows: Range<usize>,
    pub(super) k: Range<usize>,
    pub(super) packed: &'a mut [E::Float],
    /// Room for the block.
    pub(super) wide: &'a mut [E::Float],
}

impl<E: Number> WithSimd for PackLeftBlock<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, rows, k, packed, wide } = self;
        let [row_stride, column_stride] = a.strides();
        let (count, len) = (rows.len(), k.len());
        let from = a.from(rows.start, k.start);
        if column_stride == 1 {
            pack_columns(simd, Matrix::new(from, count, len, row_stride), packed, count, wide);
        } else {
            pack_apart(from, [column_stride, row_stride], count, packed, count);
        }
    }
}
