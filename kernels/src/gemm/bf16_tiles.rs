//! The products of attention in bf16 by AMX's tiles. They take the place of those of [`Bf16Dot`](super::bf16_dot::Bf16Dot), and
//! round in the same places.
//!
//! A tile is read whole. So rows to multiply are copied, with zeros behind their last number and room for a tile behind the last
//! row, and rows to sum over are transposed. Both are done once for all panels that look at a block of keys.

use pulp::bytemuck::cast_slice_mut;
use pulp::{Simd, WithSimd};

use crate::gemm::amx::{Amx, BLOCK, DEPTH, PAIRS, RESIDENT_DEPTH, TILE, TileRegisters};
use crate::gemm::bf16_dot::Bf16Dot;
use crate::gemm::microkernel::{Row, VECTORS, panel_row, panel_row_mut};
use crate::gemm::transpose::transpose;
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::{Allowed, SimdFloat, allowed, as_vectors, as_vectors_mut, instruction_set};

/// Whether products of bf16 are computed by tiles.
pub(crate) fn are_available() -> bool {
    struct HasPairs;
    impl WithSimd for HasPairs {
        type Output = bool;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> bool {
            Bf16Dot::new::<S>().is_some()
        }
    }
    amx().is_some() && instruction_set().dispatch(HasPairs)
}

/// If the environment allows it.
fn amx() -> Option<Amx> {
    if allowed() == Allowed::All { Amx::new() } else { None }
}

/// Says that this thread's tile registers are configured, and that the processor has what comes with them.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Tiles<'t> {
    registers: &'t TileRegisters,
    dot: Bf16Dot,
}

/// Rows to sum over, transposed: \[dim\]\[keys\], whole tiles of both. The sum is over the keys from `first` on.
#[derive(Clone, Copy)]
pub(crate) struct Transposed<'a> {
    rows: Matrix<'a, u16>,
    dim: usize,
    first: usize,
}

impl Transposed<'_> {
    /// The same without the first `count` keys.
    #[inline(always)]
    pub(crate) fn skip(self, count: usize) -> Self {
        Self { first: self.first + count, ..self }
    }
}

/// How many numbers of a row are read.
#[inline(always)]
pub(crate) fn padded_depth(count: usize) -> usize {
    count.next_multiple_of(DEPTH)
}

/// Numbers of 32 bits for [`Bf16Tiles::copy`].
#[inline(always)]
pub(crate) fn copy_size(rows: usize, dim: usize) -> usize {
    (rows + TILE) * padded_depth(dim) / 2
}

/// Numbers of 32 bits for [`Bf16Tiles::transpose`]: the transposed rows, and interleaved ones.
#[inline(always)]
pub(crate) fn transposed_size(rows: usize, dim: usize) -> usize {
    transposed_rows(dim) * transposed_columns(rows) / 2 + padded_depth(rows) / 2 * transposed_rows(dim)
}

fn transposed_rows(dim: usize) -> usize {
    dim.next_multiple_of(TILE)
}

/// A sum may start at any key, so that its last tile reaches up to a tile behind the last key.
fn transposed_columns(keys: usize) -> usize {
    padded_depth(keys) + DEPTH
}

/// Where the rows stand that are multiplied next.
#[inline(always)]
fn next_rows(rows: Matrix<u16>) -> *const u8 {
    let rows = rows.raw();
    rows.start.wrapping_add(BLOCK * rows.stride).cast()
}

/// Multiplies the scores of a panel, and finds the greatest of each lane.
#[inline(always)]
fn scale_and_maxima<S: Simd, const MAX: bool>(
    simd: S,
    factor: f32,
    mut scores: MatrixMut<f32>,
    largest: &mut Row<f32, S>,
) {
    let (has_factor, factor) = (factor != 1.0, f32::splat(simd, factor));
    for row in 0..scores.rows() {
        let scores = panel_row_mut::<f32, S>(scores.row(row));
        for v in 0..VECTORS {
            if has_factor {
                scores[v] = f32::vmul(simd, factor, scores[v]);
            }
            if MAX {
                // If a score is NaN, AVX-512 gives the second operand.
                largest[v] = simd.max_f32s(scores[v], largest[v]);
            }
        }
    }
}

impl<'t> Bf16Tiles<'t> {
    /// If the processor has the instructions and may use them; `registers` keeps them configured.
    #[allow(unreachable_code, unused_variables)] // where the system is another, `Amx` has no value
    pub(crate) fn new<S: Simd>(registers: &'t mut Option<TileRegisters>) -> Option<Self> {
        let dot = Bf16Dot::new::<S>()?;
        Some(Self { registers: registers.insert(amx()?.tile_registers()), dot })
    }

    #[inline(always)]
    pub(crate) fn registers(self) -> &'t TileRegisters {
        self.registers
    }

    /// What comes with AMX.
    #[inline(always)]
    pub(crate) fn dot(self) -> Bf16Dot {
        self.dot
    }

    /// Rows to multiply with panels, and a tile of rows of any content. `to` has room for [`copy_size`].
    pub(crate) fn copy<'m>(self, rows: Matrix<u16>, to: &'m mut [u32]) -> Matrix<'m, u16> {
        let (count, depth) = (rows.rows(), padded_depth(rows.columns()));
        let to: &mut [u16] = cast_slice_mut(to);
        rows.copy_padded(to, depth);
        Matrix::new(to, count + TILE, depth, depth)
    }

    /// Rows to sum over. `to` has room for [`transposed_size`].
    #[inline(always)]
    pub(crate) fn transpose<'m, S: Simd>(self, simd: S, rows: Matrix<u16>, to: &'m mut [u32]) -> Transposed<'m> {
        let (count, dim) = (rows.rows(), rows.columns());
        let (pairs, columns) = (count.div_ceil(2), transposed_columns(count));
        let (to, interleaved) = to.split_at_mut(transposed_rows(dim) * columns / 2);
        let width = transposed_rows(dim);
        self.dot.interleave(rows, MatrixMut::new(interleaved, pairs, width, width));
        let transposed = MatrixMut::new(&mut *to, dim, columns / 2, columns / 2).cast::<f32>();
        // SAFETY: `transpose` writes numbers, which are initialised.
        let transposed = unsafe { transposed.into_uninit() };
        transpose(simd, 1.0, Matrix::new(interleaved, pairs, dim, width).cast::<f32>(), transposed);
        for to in to.chunks_exact_mut(columns / 2).take(dim) {
            to[pairs..].fill(0);
        }
        let rows = Matrix::new(cast_slice_mut::<u32, u16>(to), transposed_rows(dim), columns, columns);
        Transposed { rows, dim, first: 0 }
    }

    /// As [`Bf16Dot::dot_products`], for `count` of the rows that [`Bf16Tiles::copy`] made; the panel has a row for each of their
    /// pairs.
    #[inline(always)]
    pub(crate) fn dot_products<S: Simd, const MAX: bool>(
        self,
        simd: S,
        factor: f32,
        panel: &[u32],
        (rows, count): (Matrix<u16>, usize),
        mut scores: MatrixMut<f32>,
        largest: &mut Row<f32, S>,
    ) {
        let depth = rows.columns();
        let panel = Matrix::new(panel, depth / 2, BLOCK, BLOCK);
        assert!(scores.columns() >= BLOCK, "rows of a panel");
        let whole = count / TILE * TILE;
        if depth == RESIDENT_DEPTH {
            self.registers.multiply_resident(rows.take(whole), panel, scores.part(0, whole));
        } else {
            for first in (0..whole).step_by(BLOCK) {
                let (rows, high) = (rows.skip(first), BLOCK.min(whole - first));
                let scores = scores.part(first, high).into_block(0..high, 0..BLOCK);
                self.registers.multiply(rows, panel, scores, next_rows(rows));
            }
        }
        if whole < count {
            // There may be no room for a whole tile of scores.
            let (rows, mut room) = (rows.skip(whole), self.registers.take_room());
            self.registers.multiply(rows, panel, MatrixMut::new(&mut room.0, TILE, BLOCK, BLOCK), next_rows(rows));
            for (row, sums) in (whole..count).zip(room.0.chunks_exact(BLOCK)) {
                scores.row(row)[..BLOCK].copy_from_slice(sums);
            }
            self.registers.give_room(room);
        }
        if MAX || factor != 1.0 {
            scale_and_maxima::<S, MAX>(simd, factor, scores.into_part(count), largest);
        }
    }

    /// As [`Bf16Dot::accumulate`], over as many keys as `weights` has pairs.
    #[inline(always)]
    pub(crate) fn accumulate<S: Simd>(
        self,
        simd: S,
        panel: &mut [f32],
        factor: Row<f32, S>,
        rows: Transposed,
        weights: Matrix<u32>,
    ) {
        let whole = weights.rows() / PAIRS * PAIRS;
        // The last tile of weights, with zeros behind the last pair.
        let mut rest;
        let mut parts = [(0, weights.take(whole)), (2 * whole, weights.take(0))];
        if whole < weights.rows() {
            rest = [0; PAIRS * BLOCK];
            for (row, to) in (whole..weights.rows()).zip(rest.chunks_exact_mut(BLOCK)) {
                to.copy_from_slice(&weights.row(row)[..BLOCK]);
            }
            parts[1].1 = Matrix::new(&rest, PAIRS, BLOCK, BLOCK);
        }
        let mut room = self.registers.take_room();
        for first in (0..rows.dim).step_by(BLOCK) {
            let count = BLOCK.min(rows.dim - first);
            let mut factor = factor;
            for (skip, weights) in parts.iter().filter(|(_, weights)| weights.rows() > 0) {
                let keys = rows.first + skip..rows.first + skip + 2 * weights.rows();
                let high = count.next_multiple_of(TILE);
                let rows = rows.rows.block(first..first + high, keys);
                let sums = MatrixMut::new(&mut room.0, high, BLOCK, BLOCK);
                self.registers.multiply(rows, *weights, sums, next_rows(rows));
                let panel = panel[first * BLOCK..].chunks_exact_mut(BLOCK).take(count);
                for (panel, sums) in panel.zip(room.0.chunks_exact(BLOCK)) {
                    let (panel, sums) = (panel_row_mut::<f32, S>(panel), panel_row::<f32, S>(sums));
                    for v in 0..VECTORS {
                        panel[v] = <f32 as SimdFloat>::mul_add(simd, factor[v], panel[v], sums[v]);
                    }
                }
                factor = [f32::splat(simd, 1.0); VECTORS];
            }
        }
        self.registers.give_room(room);
    }

    /// As [`Bf16Dot::outer_products`], where the pairs fill whole tiles.
    #[inline(always)]
    pub(crate) fn outer_products<S: Simd>(
        self,
        simd: S,
        factor: f32,
        mut out: MatrixMut<f32>,
        weights: Matrix<u32>,
        rows: Matrix<u32>,
    ) {
        let (count, pairs, factor) = (out.rows(), rows.rows(), f32::splat(simd, factor));
        assert!(weights.rows() == count && weights.columns() == pairs, "a weight for each row in and out");
        let whole = count / TILE * TILE;
        for first in (0..whole).step_by(BLOCK) {
            let high = BLOCK.min(whole - first);
            let weights = weights.skip(first).take(high).halves();
            self.add_products(simd, factor, out.part(first, high), weights, rows);
        }
        if whole == count {
            return;
        }
        // The last rows are copied, tile by tile: there may be nothing behind them.
        let mut tile = [0; TILE * PAIRS];
        for first in (0..pairs).step_by(PAIRS) {
            for (row, to) in (whole..count).zip(tile.chunks_exact_mut(PAIRS)) {
                to.copy_from_slice(&weights.row(row)[first..first + PAIRS]);
            }
            let weights = Matrix::new(&tile, TILE, PAIRS, PAIRS).halves();
            let out = out.part(whole, count - whole);
            self.add_products(simd, factor, out, weights, rows.skip(first).take(PAIRS));
        }
    }

    /// out += factor · left · right, where `left` has one tile of rows or two, of which `out` may have fewer.
    #[inline(always)]
    fn add_products<S: Simd>(
        self,
        simd: S,
        factor: <f32 as SimdFloat>::Vector<S>,
        mut out: MatrixMut<f32>,
        left: Matrix<u16>,
        right: Matrix<u32>,
    ) {
        let mut room = self.registers.take_room();
        for first in (0..out.columns()).step_by(BLOCK) {
            let wide = BLOCK.min(out.columns() - first);
            let right = right.block(0..right.rows(), first..first + wide);
            let sums = MatrixMut::new(&mut room.0, left.rows(), wide, BLOCK);
            self.registers.multiply(left, right, sums, next_rows(left));
            for row in 0..out.rows() {
                let to = as_vectors_mut::<f32, S>(&mut out.row(row)[first..first + wide]);
                for (to, sum) in to.iter_mut().zip(as_vectors::<f32, S>(&room.0[row * BLOCK..][..wide])) {
                    *to = <f32 as SimdFloat>::mul_add(simd, factor, *sum, *to);
                }
            }
        }
        self.registers.give_room(room);
    }
}

#[cfg(test)]
#[path = "bf16_tiles_tests.rs"]
mod tests;
