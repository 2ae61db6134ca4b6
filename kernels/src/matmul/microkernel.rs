//! The inner loop: a block of sums that stays in registers.
//!
//! The lanes of a vector are columns of the result. A block is N rows by [`VECTORS`] vectors: for each k, the vectors of the
//! right operand are loaded, and each of N numbers of the left one is broadcast. With AVX-512 and NEON, 12 x 2 sums, 2 vectors
//! and a broadcast use 27 of 32 registers, and a product takes 14 loads for 24 multiplications; with AVX2, 6 x 2 use 15 of 16.
//!
//! The left operand is packed, so that one pointer serves all of its rows, and the loop over k is unrolled. Both save instructions,
//! which are scarce on a core that runs two threads. On a shared Emerald Rapids core products take 10% less time; those with 64
//! columns or fewer take 10% to 20% longer, since packing costs as much as a few panels.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::matmul::operand::Lines;
use crate::matrix::{Matrix, MatrixMut, Raw};
use crate::simd::{MAX_LANES, SimdFloat, prefetch, prefetch_to_second_level};

/// Vectors in a panel of the right operand.
const VECTORS: usize = 2;

/// The most columns of a panel with any instruction set.
pub(super) const MAX_WIDTH: usize = VECTORS * MAX_LANES;

/// The most rows of a block with any instruction set.
pub(super) const MAX_ROWS: usize = 12;

/// The most rows of a block: as many as the registers have room for.
#[inline(always)]
fn max_rows<S: Simd>() -> usize {
    // Browsers map WebAssembly's vectors to 16 registers of x86.
    if S::REGISTER_COUNT >= 32 && cfg!(not(target_family = "wasm")) { MAX_ROWS } else { 6 }
}

/// Rows cut into blocks: of the largest size, but for the last two, which share what is left, for a block of one or two rows
/// takes almost as long as a block of six.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    pub(super) rows: usize,
    pub(super) max: usize,
    pub(super) count: usize,
}

impl Blocks {
    #[inline(always)]
    pub(super) fn new(rows: usize, max: usize) -> Self {
        Self { rows, max, count: rows.div_ceil(max) }
    }

    #[inline(always)]
    pub(super) fn rows_of(&self, block: usize) -> Range<usize> {
        let last_two = self.count.saturating_sub(2) * self.max;
        let middle = last_two + (self.rows - last_two).div_ceil(self.count.min(2));
        match self.count - block {
            1 if self.count > 1 => middle..self.rows,
            1 | 2 => last_two..middle,
            _ => block * self.max..(block + 1) * self.max,
        }
    }
}

/// Columns in a panel.
#[inline(always)]
pub(super) fn panel_width<R: SimdFloat, S: Simd>() -> usize {
    VECTORS * R::lanes::<S>()
}

/// The right operand's k rows: in panels \[k\]\[W\], but for the first whole panels, if they stand where the kernel can read
/// them.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, R> {
    pub(super) direct: Option<Matrix<'a, R>>,
    pub(super) packed: &'a [R],
}

impl<'a, R: SimdFloat> Right<'a, R> {
    #[inline(always)]
    fn panel(&self, panel: usize, k: usize, width: usize) -> Matrix<'a, R> {
        match self.direct {
            Some(direct) if (panel + 1) * width <= direct.columns() => {
                direct.block(0..k, panel * width..(panel + 1) * width)
            }
            _ => Matrix::new(&self.packed[panel * k * width..], k, width, width),
        }
    }
}

/// What a block's sums are added to.
#[derive(Clone, Copy)]
pub(super) enum Base<'a, R: Copy> {
    Zero,
    /// What is there.
    Same,
    Other(Matrix<'a, MaybeUninit<R>>),
}

/// The most cache lines that are asked for while a block is multiplied with a panel.
const MAX_LINES: usize = 64;

/// Memory to ask for while a block is computed, so that it is near when its turn comes.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead {
    /// What the next block needs.
    pub(super) of_block: Lines,
    /// What is needed after all blocks, of which this is number `block` of `blocks`.
    pub(super) of_step: [Lines; 2],
    pub(super) block: usize,
    pub(super) blocks: usize,
}

/// to\[row\]\[c\] = base\[row\]\[c\] + Σ_k left\[k\]\[row\] · right\[k\]\[c\] for a block of rows. The left operand is packed
/// as \[k\]\[rows\].
pub(super) struct MultiplyBlock<'a, R: SimdFloat> {
    k: usize,
    left: &'a [R],
    right: Right<'a, R>,
    to: MatrixMut<'a, MaybeUninit<R>>,
    base: Base<'a, R>,
    ahead: Ahead,
}

impl<'a, R: SimdFloat> MultiplyBlock<'a, R> {
    /// # Safety
    ///
    /// The base is initialised.
    pub(super) unsafe fn new(
        k: usize,
        left: &'a [R],
        right: Right<'a, R>,
        to: MatrixMut<'a, MaybeUninit<R>>,
        base: Base<'a, R>,
        ahead: Ahead,
    ) -> Self {
        Self { k, left, right, to, base, ahead }
    }
}

impl<R: SimdFloat> WithSimd for MultiplyBlock<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (width, rows, columns) = (panel_width::<R, S>(), self.to.rows(), self.to.columns());
        let (panels, ahead) = (columns.div_ceil(width), self.ahead);
        let mut whole = [MaybeUninit::new(R::ZERO); MAX_ROWS * MAX_WIDTH];
        for panel in 0..panels {
            let (mut lines, mut count) = ([std::ptr::null(); MAX_LINES], 0);
            let mut add = |line| {
                if count < MAX_LINES {
                    lines[count] = line;
                    count += 1;
                }
            };
            ahead.of_block.for_each_line(panel, panels, &mut add);
            for of_step in ahead.of_step {
                of_step.for_each_line(ahead.block * panels + panel, ahead.blocks * panels, &mut add);
            }
            let right = self.right.panel(panel, self.k, width);
            let at = panel * width..columns.min((panel + 1) * width);
            let is_whole = at.len() == width;
            let mut to = self.to.part(0, rows).into_block(0..rows, at.clone());
            let base = match self.base {
                Base::Other(base) => Base::Other(base.block(0..rows, at)),
                other => other,
            };
            let (target, base_of_target) = if is_whole {
                (to.reborrow(), base)
            } else {
                (MatrixMut::new(&mut whole, rows, width, width), Base::Zero)
            };
            // SAFETY: the condition of `MultiplyBlock::new`.
            unsafe { multiply::<R, S>(simd, self.left, right, target, base_of_target, &lines[..count]) };
            if !is_whole {
                // SAFETY: the condition of `MultiplyBlock::new`, and `multiply` has written all of `whole` that is read.
                unsafe { add_columns(to, base, &whole, width) };
            }
        }
    }
}

/// to\[row\]\[c\] = base\[row\]\[c\] + whole\[row\]\[c\] for the columns that `to` has.
///
/// # Safety
///
/// The base and the rows of `whole` are initialised.
#[inline(always)]
unsafe fn add_columns<R: SimdFloat>(
    mut to: MatrixMut<MaybeUninit<R>>,
    base: Base<R>,
    whole: &[MaybeUninit<R>],
    width: usize,
) {
    for row in 0..to.rows() {
        for (column, to) in to.row(row).iter_mut().enumerate() {
            // SAFETY: this function's own condition.
            let (base, sum) = unsafe {
                let base = match &base {
                    Base::Zero => R::ZERO,
                    Base::Same => to.assume_init(),
                    Base::Other(base) => base.row(row)[column].assume_init(),
                };
                (base, whole[row * width + column].assume_init())
            };
            to.write(base + sum);
        }
    }
}

/// The widths of blocks and panels: rows of a block and columns of a panel.
pub(super) struct BlockDims<R>(pub(super) PhantomData<R>);

impl<R: SimdFloat> WithSimd for BlockDims<R> {
    type Output = [usize; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [usize; 2] {
        [max_rows::<S>(), panel_width::<R, S>()]
    }
}

/// `$body` for each `$i` of `0..$count`, unrolled. `$turn` runs once before every four runs of the body. (A macro and no closure:
/// what isn't inlined into the function that dispatched on the instruction set is compiled without it.)
macro_rules! unrolled {
    ($count:expr, $turn:expr, |$i:ident| $body:expr) => {{
        const UNROLLED: usize = 4;
        let count = $count;
        let whole = count / UNROLLED * UNROLLED;
        for first in (0..whole).step_by(UNROLLED) {
            $turn;
            for $i in first..first + UNROLLED {
                $body
            }
        }
        for $i in whole..count {
            $body
        }
    }};
}

/// to\[row\]\[c\] = base\[row\]\[c\] + Σ_k left\[k\]\[row\] · right\[k\]\[c\] for a panel's columns.
///
/// # Safety
///
/// The base is initialised.
///
/// # Panics
///
/// If the sizes don't fit, or there are more rows than [`max_rows`].
#[inline(always)]
unsafe fn multiply<R: SimdFloat, S: Simd>(
    simd: S,
    left: &[R],
    right: Matrix<R>,
    mut to: MatrixMut<MaybeUninit<R>>,
    base: Base<R>,
    ahead: &[*const u8],
) {
    let (rows, k, right_columns) = (to.rows(), right.rows(), right.columns());
    assert!(left.len() == k * rows, "the left operand has its rows and the other's k");
    assert!(right_columns == panel_width::<R, S>() && to.columns() == right_columns, "a panel's columns");
    let (right, raw) = (right.raw(), to.raw());
    let to = Raw { start: raw.start.cast::<R>(), stride: raw.stride };
    let base = match &base {
        Base::Zero => None,
        Base::Same => Some(Raw { start: to.start.cast_const(), stride: to.stride }),
        Base::Other(base) => {
            assert!(base.rows() == rows && base.columns() == right_columns, "a base for each sum");
            Some(Raw { start: base.raw().start.cast::<R>(), stride: base.raw().stride })
        }
    };
    macro_rules! of_rows {
        ($($n:literal),*) => {
            match rows {
                $($n => block::<R, S, $n>(simd, k, left.as_ptr(), right, to, base, ahead),)*
                _ => panic!("no more rows than a block has"),
            }
        };
    }
    // SAFETY: the assertions, and this function's own condition.
    unsafe {
        if max_rows::<S>() == MAX_ROWS {
            of_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
        } else {
            of_rows!(1, 2, 3, 4, 5, 6)
        }
    }
}

/// # Safety
///
/// `left` has `k` rows of N, one behind the other; `right` has `k` rows of a panel's width, and `to` N rows of it, as has
/// `base`, which may be the same and is initialised.
#[inline(always)]
unsafe fn block<R: SimdFloat, S: Simd, const N: usize>(
    simd: S,
    k: usize,
    left: *const R,
    right: Raw<*const R>,
    to: Raw<*mut R>,
    base: Option<Raw<*const R>>,
    ahead: &[*const u8],
) {
    let lanes = R::lanes::<S>();
    let mut sums = [[R::splat(simd, R::ZERO); VECTORS]; N];
    // SAFETY: this function's own condition: i is one of `k`, `row` one of N, v one of a panel's vectors.
    unsafe {
        for row in 0..N {
            for v in 0..VECTORS {
                prefetch(base.unwrap_or(Raw { start: to.start.cast_const(), stride: to.stride }).at(row, v * lanes));
            }
        }
        // Memory is asked for line by line: many requests at once would wait for each other, and the products for them.
        let mut ahead = ahead.iter();
        unrolled!(
            k,
            if let Some(line) = ahead.next() {
                prefetch_to_second_level(*line);
            },
            |i| {
                let mut columns = [R::splat(simd, R::ZERO); VECTORS];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = right.at(i, v * lanes).cast::<R::Vector<S>>().read_unaligned();
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = R::splat(simd, *left.add(i * N + row));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = R::mul_add(simd, x, column, *sum);
                    }
                }
            }
        );
        // A block's sum is added when it is complete: one long sum would lose more to rounding.
        for (row, sums) in sums.into_iter().enumerate() {
            for (v, mut sum) in sums.into_iter().enumerate() {
                if let Some(base) = base {
                    sum = R::vadd(simd, base.at(row, v * lanes).cast::<R::Vector<S>>().read_unaligned(), sum);
                }
                to.at(row, v * lanes).cast::<R::Vector<S>>().write_unaligned(sum);
            }
        }
    }
}

#[cfg(test)]
#[path = "microkernel_tests.rs"]
mod tests;
