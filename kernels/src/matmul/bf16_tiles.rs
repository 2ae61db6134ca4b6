//! A task's tile of a product of bf16, by AMX's tile registers.
//!
//! Rows of the left operand are read where they are, or copied; the right operand is packed in panels of pairs, as everything
//! that the registers read is whole tiles. Sums stay in f32 until the epilogue is done.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use half::slice::HalfBitsSliceExt;
use pulp::bytemuck::cast_slice_mut;
use pulp::{Simd, WithSimd};

use crate::error::Error;
use crate::gemm::amx::{BLOCK, DEPTH, TILE, TileRegisters};
use crate::gemm::bf16_dot::Bf16Dot;
use crate::gemm::bf16_tiles::Bf16Tiles;
use crate::gemm::transpose::transpose;
use crate::matmul::Operand;
use crate::matmul::tile::Tile;
use crate::matrix::{Matrix, MatrixMut};
use crate::scratch::{Scratch, pieces};
use crate::simd::instruction_set;

/// The length of a block of k: 32 rows of the left operand (32 KB) stay in a first-level cache. With 256 and 1024 the products take as
/// long, on a shared Emerald Rapids core.
const K_BLOCK: usize = 512;

/// Rows that lie so many bytes apart, or a multiple of it, would use a few sets of the first-level cache alone; they are copied.
const BAD_STRIDE: usize = 2048;

/// A part of k, and its length in whole tiles.
fn k_blocks(k: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    let blocks = (0..k).step_by(K_BLOCK).map(move |start| start..k.min(start + K_BLOCK));
    blocks.map(|block| (block.clone(), block.len().next_multiple_of(DEPTH)))
}

impl Tile<'_, bf16> {
    /// Computes the tile and writes it to its part of the result.
    pub(super) fn compute_by_tile_registers(&self, result: MatrixMut<MaybeUninit<bf16>>) -> Result<(), Error> {
        if self.has_few_rows {
            return self.compute(result);
        }
        instruction_set().dispatch(Compute { tile: self, result })
    }
}

struct Compute<'t, 'a, 'r> {
    tile: &'t Tile<'a, bf16>,
    result: MatrixMut<'r, MaybeUninit<bf16>>,
}

/// A task's memory, in pairs but for the sums.
struct Memory<'m> {
    /// Panels \[panel\]\[depth / 2\]\[32\].
    right: &'m mut [u32],
    /// A block of rows \[32\]\[depth / 2\].
    left: &'m mut [u32],
    /// A block or a panel before it is transposed, or what is decoded of a quantised operand.
    scratch: &'m mut [u32],
    /// Rows of whole panels: all of the tile's in whole blocks, or one block of them.
    sums: &'m mut [f32],
}

impl WithSimd for Compute<'_, '_, '_> {
    type Output = Result<(), Error>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> Result<(), Error> {
        let mut registers = None;
        let tiles = Bf16Tiles::new::<S>(&mut registers).expect("asked before");
        let (rows, columns) = (self.tile.rows.len(), self.tile.columns.len().next_multiple_of(BLOCK));
        let steps: usize = self.tile.pairs.iter().map(|(a, _)| k_blocks(a.dims()[1]).count()).sum();
        let depth = self.tile.pairs.iter().flat_map(|(a, _)| k_blocks(a.dims()[1])).map(|(_, depth)| depth).max();
        let half = depth.unwrap_or(0) / 2;
        let blocks = if steps > 1 { rows.div_ceil(BLOCK) } else { 1 };
        let mut scratch = None;
        pieces!(
            scratch, f32:
            right: columns * half,
            left: BLOCK * half,
            packed: BLOCK * half,
            sums: blocks * BLOCK * columns,
        );
        let [right, left, scratch] = [right, left, packed].map(cast_slice_mut);
        let mut memory = Memory { right, left, scratch, sums };
        let mut done = 0;
        for (a, b) in self.tile.pairs {
            for (k, depth) in k_blocks(a.dims()[1]) {
                let columns = self.tile.columns.clone();
                pack_panels(simd, tiles.dot(), b, k.clone(), depth, columns, &mut memory);
                let step = Step { a, k, depth, is_first: done == 0, is_last: done + 1 == steps };
                self.step(simd, tiles, &step, &mut memory);
                done += 1;
            }
        }
        for row in 0..if done == 0 { rows } else { 0 } {
            memory.sums[..columns].fill(0.0);
            self.finish(tiles.dot(), row, &mut memory.sums[..columns]);
        }
        Ok(())
    }
}

/// One block of k of a pair, whose right operand has been packed.
struct Step<'a> {
    a: &'a Operand<'a, bf16>,
    k: Range<usize>,
    depth: usize,
    is_first: bool,
    is_last: bool,
}

impl Compute<'_, '_, '_> {
    /// Adds the products of a step, and finishes the rows if it is the last.
    #[inline(always)]
    fn step<S: Simd>(&mut self, simd: S, tiles: Bf16Tiles, step: &Step, memory: &mut Memory) {
        let (rows, columns) = (self.tile.rows.len(), self.tile.columns.len().next_multiple_of(BLOCK));
        let is_only = step.is_first && step.is_last;
        for first in (0..rows).step_by(BLOCK) {
            // The epilogue of the rows before may have called anything.
            tiles.registers().configure();
            let count = BLOCK.min(rows - first);
            let of_block = self.tile.rows.start + first..self.tile.rows.start + first + count;
            let left = left_rows(simd, tiles.dot(), step, of_block, memory.scratch, memory.left);
            let start = if is_only { 0 } else { first * columns };
            let sums = &mut memory.sums[start..start + BLOCK * columns];
            let high = count.next_multiple_of(TILE);
            let mut block = MatrixMut::new(sums, high, columns, columns);
            for (panel, right) in memory.right.chunks_exact(BLOCK * step.depth / 2).enumerate() {
                let columns = panel * BLOCK..(panel + 1) * BLOCK;
                if columns.end > block.columns() {
                    break;
                }
                let ahead = right.as_ptr().wrapping_add(right.len()).cast();
                let right = Matrix::new(right, step.depth / 2, BLOCK, BLOCK);
                let sums = block.reborrow().into_block(0..high, columns);
                multiply(tiles.registers(), left, right, sums, step.is_first, ahead);
            }
            if step.is_last {
                for row in 0..count {
                    let sums = &mut memory.sums[start + row * columns..][..columns];
                    self.finish(tiles.dot(), first + row, sums);
                }
            }
        }
    }

    /// The epilogue of a row of the tile, whose sums are complete.
    #[inline(always)]
    fn finish(&mut self, dot: Bf16Dot, row: usize, sums: &mut [f32]) {
        let (tile, count) = (self.tile, self.tile.columns.len());
        let sums = &mut sums[..count];
        tile.epilogue.apply(tile.rows.start + row, tile.offset + tile.columns.start, sums);
        dot.narrow(sums, self.result.row(row));
    }
}

#[inline(always)]
fn multiply(
    registers: &TileRegisters,
    left: Matrix<u16>,
    right: Matrix<u32>,
    sums: MatrixMut<f32>,
    is_first: bool,
    ahead: *const u8,
) {
    if is_first {
        registers.multiply(left, right, sums, ahead);
    } else {
        registers.multiply_add(left, right, sums, ahead);
    }
}

/// A block of rows of the left operand, in whole tiles: where they are, or copied to `to` with zeros around them.
#[inline(always)]
fn left_rows<'m, S: Simd>(
    simd: S,
    dot: Bf16Dot,
    Step { a, k, depth, .. }: &'m Step,
    rows: Range<usize>,
    scratch: &mut [u32],
    to: &'m mut [u32],
) -> Matrix<'m, u16> {
    let [row_stride, column_stride] = a.strides();
    let (from, depth, count) = (a.from(rows.start, k.start), *depth, rows.len());
    if column_stride == 1 {
        let matrix = Matrix::new(from, count, k.len(), row_stride).bits();
        if depth == k.len() && count.is_multiple_of(TILE) && !(2 * row_stride).is_multiple_of(BAD_STRIDE) {
            return matrix;
        }
        let to: &mut [u16] = cast_slice_mut(to);
        matrix.copy_padded(to, depth);
        return Matrix::new(to, count.next_multiple_of(TILE), depth, depth);
    }
    if row_stride == 1 {
        // Rows of pairs of columns, and these transposed.
        let columns = Matrix::new(from, k.len(), count, column_stride).bits();
        interleave(dot, columns, depth, scratch);
        let pairs = Matrix::new(&*scratch, depth / 2, count, BLOCK).cast::<f32>();
        transposed(simd, pairs, to, depth / 2);
    } else {
        gather(from, [row_stride, column_stride], [count, k.len()], cast_slice_mut(to), depth);
    }
    Matrix::new(cast_slice_mut::<u32, u16>(to), count.next_multiple_of(TILE), depth, depth)
}

/// Packs the panels of a step.
#[inline(always)]
fn pack_panels<S: Simd>(
    simd: S,
    dot: Bf16Dot,
    b: &Operand<bf16>,
    k: Range<usize>,
    depth: usize,
    columns: Range<usize>,
    memory: &mut Memory,
) {
    if b.is_quantised() && b.strides()[1] == 1 {
        return pack_decoded_rows(dot, b, k, depth, columns, memory);
    }
    let panels = memory.right.chunks_exact_mut(BLOCK * depth / 2);
    for (first, panel) in columns.clone().step_by(BLOCK).zip(panels) {
        let of_panel = first..columns.end.min(first + BLOCK);
        pack_right(simd, dot, b, k.clone(), depth, of_panel, memory.scratch, panel);
    }
}

/// Columns of the right operand as a panel \[depth / 2\]\[32\] of pairs, with zeros around them.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // a part of an operand, and where it goes
fn pack_right<S: Simd>(
    simd: S,
    dot: Bf16Dot,
    b: &Operand<bf16>,
    k: Range<usize>,
    depth: usize,
    columns: Range<usize>,
    scratch: &mut [u32],
    panel: &mut [u32],
) {
    let [row_stride, column_stride] = b.strides();
    let (from, count) = (b.from(k.start, columns.start), columns.len());
    if column_stride == 1 {
        return interleave(dot, Matrix::new(from, k.len(), count, row_stride).bits(), depth, panel);
    }
    // Rows of pairs, and these transposed.
    let rows: &mut [u16] = cast_slice_mut(scratch);
    if b.is_quantised() {
        rows.chunks_exact_mut(depth).take(count).for_each(|row| row[k.len()..].fill(0));
        b.decode_to::<bf16>(k, columns, rows.reinterpret_cast_mut(), depth);
    } else if row_stride == 1 {
        Matrix::new(from, count, k.len(), column_stride).bits().copy_padded(rows, depth);
    } else {
        gather(from, [column_stride, row_stride], [count, k.len()], rows, depth);
    }
    let pairs = Matrix::new(&*scratch, count, depth / 2, depth / 2).cast::<f32>();
    transposed(simd, pairs, panel, BLOCK);
    if count < BLOCK {
        panel.chunks_exact_mut(BLOCK).for_each(|row| row[count..].fill(0));
    }
}

/// Packs all panels of a quantised right operand whose rows are in one piece each. A few rows are decoded at a time, in the order in
/// which they lie in memory.
#[inline(always)]
fn pack_decoded_rows(
    dot: Bf16Dot,
    b: &Operand<bf16>,
    k: Range<usize>,
    depth: usize,
    columns: Range<usize>,
    memory: &mut Memory,
) {
    let rows: &mut [u16] = cast_slice_mut(memory.scratch);
    let count = columns.len();
    // Whole pairs. The scratch has room for two rows, since a tile has at most 512 columns and a block of k at least 32 rows.
    let at_once = (rows.len() / count).min(BLOCK) / 2 * 2;
    for first in k.clone().step_by(at_once) {
        let end = k.end.min(first + at_once);
        b.decode_to::<bf16>(first..end, columns.clone(), rows.reinterpret_cast_mut(), count);
        let decoded = Matrix::new(&*rows, end - first, count, count);
        // Zeros behind the last row.
        let (done, end_of_panel) = (first - k.start, if end == k.end { depth } else { end - k.start });
        for (start, panel) in (0..count).step_by(BLOCK).zip(memory.right.chunks_exact_mut(BLOCK * depth / 2)) {
            let part = decoded.block(0..end - first, start..count.min(start + BLOCK));
            interleave(dot, part, end_of_panel - done, &mut panel[done / 2 * BLOCK..]);
        }
    }
}

/// Copies \[rows, columns\] of an operand without neighbours to rows that lie `depth` apart, with zeros behind each.
fn gather(from: &[bf16], strides: [usize; 2], [rows, columns]: [usize; 2], to: &mut [u16], depth: usize) {
    for (row, to) in to.chunks_exact_mut(depth).enumerate().take(rows) {
        to.fill(0);
        for (column, to) in to[..columns].iter_mut().enumerate() {
            *to = from[row * strides[0] + column * strides[1]].to_bits();
        }
    }
}

/// At most 32 columns of rows as pairs of rows \[depth / 2\]\[32\], with zeros behind the last row and column.
#[inline(always)]
fn interleave(dot: Bf16Dot, rows: Matrix<u16>, depth: usize, to: &mut [u32]) {
    let pairs = rows.rows().div_ceil(2);
    if rows.columns() <= BLOCK - TILE {
        to[..pairs * BLOCK].fill(0);
    }
    to[pairs * BLOCK..depth / 2 * BLOCK].fill(0);
    dot.interleave(rows, MatrixMut::new(to, pairs, BLOCK, BLOCK));
}

/// The transposed matrix, whose rows lie `stride` apart.
#[inline(always)]
fn transposed<S: Simd>(simd: S, from: Matrix<f32>, to: &mut [u32], stride: usize) {
    let to = MatrixMut::new(to, from.columns(), from.rows(), stride).cast::<f32>();
    // SAFETY: `transpose` writes numbers, which are initialised.
    transpose(simd, 1.0, from, unsafe { to.into_uninit() });
}
