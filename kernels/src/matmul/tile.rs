//! A task: a tile of the result, from the first product to the epilogue.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::dtype::{Number, Sink};
use crate::error::Error;
use crate::matmul::microkernel::{Ahead, Base, BlockDims, Blocks, MAX_ROWS, MultiplyBlock, Right};
use crate::matmul::pack::{DECODED_COLUMNS, PackLeft, PackLeftBlock, direct_right, pack_right, packs_all_rows};
use crate::matmul::{Epilogue, Operand, few_rows};
use crate::matrix::{Matrix, MatrixMut, initialised};
use crate::scratch::{Scratch, pieces};
use crate::simd::{SimdFloat, instruction_set};

/// The length of a block of k: a panel of the right operand and a block of the left one (48 and 18 KB of f32 with AVX-512) come
/// from a second-level cache; each is used often enough there. With 256 and 512 the products take as long, or up to 7% longer.
pub(super) const K_BLOCK: usize = 384;

/// A tile of a result: rows and columns of Σ a · b over `pairs`, and what is done to it.
pub(super) struct Tile<'a, E: Number> {
    pub(super) pairs: &'a [(Operand<'a, E>, Operand<'a, E>)],
    pub(super) rows: Range<usize>,
    /// The columns of the right operands.
    pub(super) columns: Range<usize>,
    /// The column of the result in which the right operands start.
    pub(super) offset: usize,
    pub(super) epilogue: &'a dyn Epilogue<E>,
    /// Whether the result, and not only this tile of it, has a few rows: see [`few_rows`].
    pub(super) has_few_rows: bool,
}

/// A task's memory.
struct Memory<'m, R> {
    right: &'m mut [R],
    left: &'m mut [R],
    /// What is widened or decoded before it is packed: columns of a panel, a block of the left operand, or a row or column of a tile.
    wide: &'m mut [R],
    /// The sums, unless the result itself holds them.
    sums: MatrixMut<'m, MaybeUninit<R>>,
}

/// Block `block` of k: as many as have to be, as equal as can be.
fn k_block(k: usize, block: usize) -> Range<usize> {
    let size = k.div_ceil(k.div_ceil(K_BLOCK));
    (block * size).min(k)..((block + 1) * size).min(k)
}

/// One block of k of a pair.
struct Step<'a, E> {
    a: &'a Operand<'a, E>,
    b: &'a Operand<'a, E>,
    k: Range<usize>,
    is_first: bool,
    is_last: bool,
    /// The block of k behind this one, of the same pair.
    next: Range<usize>,
}

impl<E: Number> Tile<'_, E> {
    /// Computes the tile and writes it to its part of the result.
    pub(super) fn compute(&self, mut result: MatrixMut<MaybeUninit<E>>) -> Result<(), Error> {
        let (rows, columns) = (self.rows.len(), self.columns.len());
        if self.has_few_rows {
            return self.compute_few(result);
        }
        let [max_rows, width] = instruction_set().dispatch(BlockDims::<E::Float>(PhantomData));
        let steps = self.pairs.iter().map(|(a, _)| a.dims()[1].div_ceil(K_BLOCK)).sum();
        // Sums that later steps add to lie close together; a result's rows may be so far apart that a cache can't keep them.
        let own = if steps <= 1 && result.floats().is_some() { 0 } else { rows * columns };
        let left_rows = if self.pairs.iter().any(|(a, _)| packs_all_rows(a)) { rows } else { MAX_ROWS };
        let k = self.pairs.iter().map(|(a, _)| a.dims()[1].min(K_BLOCK)).max().unwrap_or(0);
        let is_quantised = self.pairs.iter().any(|(_, b)| b.is_quantised());
        let panel = if is_quantised { DECODED_COLUMNS } else { width };
        let wide = (panel.max(MAX_ROWS) * k).max(left_rows).max(columns);
        let mut scratch = None;
        pieces!(scratch, E::Float:
            right: columns.next_multiple_of(width) * k, left: left_rows * k, wide: wide, sums: own);
        let sums = MatrixMut::new(sums, if own == 0 { 0 } else { rows }, columns, columns);
        // SAFETY: the kernels write numbers, which are initialised.
        let sums = unsafe { sums.into_uninit() };
        let blocks = Blocks::new(rows, max_rows);
        self.add_steps(blocks, width, steps, Memory { right, left, wide, sums }, result);
        Ok(())
    }

    fn add_steps(
        &self,
        blocks: Blocks,
        width: usize,
        steps: usize,
        mut memory: Memory<E::Float>,
        mut result: MatrixMut<MaybeUninit<E>>,
    ) {
        let mut done = 0;
        for (a, b) in self.pairs {
            let k = a.dims()[1];
            for block in 0..k.div_ceil(K_BLOCK) {
                let (k, next) = (k_block(k, block), k_block(k, block + 1));
                let step = Step { a, b, k, is_first: done == 0, is_last: done + 1 == steps, next };
                self.add_step(blocks, width, &mut memory, &step, &mut result);
                done += 1;
            }
        }
        if done == 0 {
            for row in 0..self.rows.len() {
                match result.floats() {
                    Some(mut result) => result.row(row).fill(MaybeUninit::new(E::Float::ZERO)),
                    None => memory.sums.row(row).fill(MaybeUninit::new(E::Float::ZERO)),
                }
            }
            self.finish(0..self.rows.len(), &mut memory.sums, &mut result);
        }
    }

    /// Adds the products of a step.
    fn add_step(
        &self,
        blocks: Blocks,
        width: usize,
        memory: &mut Memory<E::Float>,
        step: &Step<E>,
        result: &mut MatrixMut<MaybeUninit<E>>,
    ) {
        let Step { a, b, k, .. } = step;
        let (arch, columns) = (instruction_set(), self.columns.len());
        let panels = &mut memory.right[..columns.next_multiple_of(width) * k.len()];
        let direct = direct_right(b, k.clone(), self.columns.clone(), self.rows.len());
        // A panel that isn't whole is always packed.
        let first = if direct.is_some() { columns / width * width } else { 0 };
        if first < columns {
            let columns = self.columns.start + first..self.columns.end;
            let panels = &mut panels[first * k.len()..];
            pack_right(b, k.clone(), columns, panels, memory.wide);
        }
        let right = Right { direct, packed: panels };
        let at_once = packs_all_rows(a);
        if at_once {
            let (first_row, packed) = (self.rows.start, &mut *memory.left);
            arch.dispatch(PackLeft { a, first_row, k: k.clone(), blocks, packed, wide: memory.wide });
        }
        for index in 0..blocks.count {
            let block = blocks.rows_of(index);
            let of_block = if at_once { block.start * k.len()..block.end * k.len() } else { 0..block.len() * k.len() };
            let left = &mut memory.left[of_block];
            if !at_once {
                let (rows, packed) = (self.rows_of(&block), &mut *left);
                arch.dispatch(PackLeftBlock { a, rows, k: k.clone(), packed, wide: memory.wide });
            }
            let ahead = self.ahead(step, at_once, blocks, index);
            let (to, base) = match result.floats() {
                Some(result) if step.is_last => (result, Base::Other(memory.sums.as_ref())),
                _ => (memory.sums.reborrow(), Base::Same),
            };
            let to = to.into_block(block.clone(), 0..columns);
            let base = match base {
                _ if step.is_first => Base::Zero,
                Base::Other(base) => Base::Other(base.block(block.clone(), 0..columns)),
                base => base,
            };
            // SAFETY: the first step has written all sums.
            arch.dispatch(unsafe { MultiplyBlock::new(k.len(), left, right, to, base, ahead) });
            if step.is_last {
                self.finish(block, &mut memory.sums, result);
            }
        }
    }

    /// Rows of the tile as rows of the result.
    fn rows_of(&self, rows: &Range<usize>) -> Range<usize> {
        self.rows.start + rows.start..self.rows.start + rows.end
    }

    /// What is read after a block: the next block of the left operand, unless all rows were packed at once, and the next step's
    /// operands.
    fn ahead(&self, step: &Step<E>, at_once: bool, blocks: Blocks, block: usize) -> Ahead {
        let Step { a, b, k, next, .. } = step;
        let of_right = b.lines(next.clone(), self.columns.clone());
        let (of_block, of_left) = if at_once {
            (Default::default(), a.lines(self.rows.clone(), next.clone()))
        } else if block + 1 < blocks.count {
            (a.lines(self.rows_of(&blocks.rows_of(block + 1)), k.clone()), Default::default())
        } else {
            (a.lines(self.rows_of(&blocks.rows_of(0)), next.clone()), Default::default())
        };
        Ahead { of_block, of_step: [of_left, of_right], block, blocks: blocks.count }
    }

    /// The epilogue of rows whose sums are complete.
    fn finish(
        &self,
        rows: Range<usize>,
        sums: &mut MatrixMut<MaybeUninit<E::Float>>,
        result: &mut MatrixMut<MaybeUninit<E>>,
    ) {
        let column = self.offset + self.columns.start;
        for row in rows {
            if let Some(mut result) = result.floats() {
                // SAFETY: the last step has written all of the row's sums.
                let sums = unsafe { initialised(result.row(row)) };
                self.epilogue.apply(self.rows.start + row, column, sums);
            } else {
                // SAFETY: every step has written all of the row's sums.
                let sums = unsafe { initialised(sums.row(row)) };
                self.epilogue.apply(self.rows.start + row, column, sums);
                result.write(row, Matrix::new(sums, 1, sums.len(), sums.len()));
            }
        }
    }

    fn compute_few(&self, mut result: MatrixMut<MaybeUninit<E>>) -> Result<(), Error> {
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let [of_left, of_right] = few_rows::scratch_sizes(rows, columns, self.pairs);
        let mut scratch = None;
        pieces!(scratch, E::Float: left: of_left, right: of_right, sums: rows * columns);
        sums.fill(E::Float::ZERO);
        for pair in self.pairs {
            let sums = MatrixMut::new(sums, rows, columns, columns);
            few_rows::add_product(pair, self.rows.clone(), self.columns.clone(), [left, right], sums);
        }
        for (row, sums) in sums.chunks_exact_mut(columns).enumerate() {
            self.epilogue.apply(self.rows.start + row, self.offset + self.columns.start, sums);
        }
        result.write(0, Matrix::new(sums, rows, columns, columns));
        Ok(())
    }
}
