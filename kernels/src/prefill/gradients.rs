//! What the tasks of the backward pass are given for each query, and where they write.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::Simd;

use crate::dtype::Sink;
use crate::gemm::transpose::add_transposed;
use crate::matrix::{Matrix, MatrixMut, Shared};
use crate::score_mods::Tile;
use crate::simd::SimdFloat;

/// What is known of a query after the forward pass.
#[derive(Clone, Copy)]
pub(crate) struct QueryRow<R> {
    /// As in [`LogSumExp`](crate::softmax::LogSumExp), but infinite for a query without keys, which makes every weight zero.
    pub(crate) largest: R,
    /// What scores were still to be multiplied by when the greatest was found.
    pub(crate) factor: R,
    /// ln Σ exp(s - largest)
    pub(crate) log_total: R,
    /// δ = Σ do ∘ o - dlse
    pub(crate) delta: R,
}

/// Where a task writes. It writes every row of q, k and v.
pub(crate) struct Gradients<'a, R> {
    /// From this task's keys.
    pub(crate) q: QueryGradient<'a, R>,
    /// A row of head_dim for each key of the task.
    pub(crate) k: &'a mut dyn Sink<R>,
    /// A row of value_dim for each key of the task.
    pub(crate) v: &'a mut dyn Sink<R>,
    /// What this task's accumulation group adds up for the bias, if wanted.
    pub(crate) bias: Option<BiasGradient<'a, R>>,
}

/// The gradients of the queries of some heads of a sequence.
pub(crate) struct QueryGradient<'a, R> {
    shared: &'a Shared<'a, MaybeUninit<R>>,
    /// Where the sequence starts.
    start: usize,
    heads: Range<usize>,
    /// q_len and head_dim.
    dims: (usize, usize),
    /// head_stride and token_stride.
    strides: (usize, usize),
}

impl<'a, R: SimdFloat> QueryGradient<'a, R> {
    /// # Safety
    ///
    /// As long as this lives, no other code has rows of these heads from `shared`.
    pub(crate) unsafe fn new(
        shared: &'a Shared<'a, MaybeUninit<R>>,
        start: usize,
        heads: Range<usize>,
        dims: (usize, usize),
        strides: (usize, usize),
    ) -> Self {
        Self { shared, start, heads, dims, strides }
    }

    /// The rows of a head.
    #[inline(always)]
    pub(crate) fn head(&mut self, head: usize) -> MatrixMut<'_, MaybeUninit<R>> {
        assert!(self.heads.contains(&head), "a head of the task");
        let ((rows, columns), (head_stride, token_stride)) = (self.dims, self.strides);
        // SAFETY: the condition of `new` and the assertion: the head is this task's, and `self` is borrowed for one head.
        unsafe { self.shared.rows(self.start + head * head_stride, rows, columns, token_stride) }
    }
}

/// The gradient of a bias, with the bias's own axes, row by row.
pub(crate) struct BiasGradient<'a, R> {
    shared: &'a Shared<'a, R>,
    start: usize,
    /// Of batch, heads, queries and keys; 0 where the bias broadcasts.
    strides: [usize; 4],
}

impl<'a, R: SimdFloat> BiasGradient<'a, R> {
    /// `dims` are the bias's; its gradient starts at `start`.
    ///
    /// # Safety
    ///
    /// As long as this lives, no other code has those elements of `shared` that this will be told to add to: those of the tiles'
    /// heads, queries and keys.
    pub(crate) unsafe fn new(shared: &'a Shared<'a, R>, start: usize, dims: [usize; 4]) -> Self {
        let mut strides = [0; 4];
        let mut stride = 1;
        for axis in (0..4).rev() {
            strides[axis] = if dims[axis] == 1 { 0 } else { stride };
            stride *= dims[axis];
        }
        Self { shared, start, strides }
    }

    /// Adds the gradient \[key\]\[query\] of a tile's scores.
    #[inline(always)]
    pub(crate) fn add<S: Simd>(&mut self, simd: S, tile: &Tile, grads: Matrix<R>) {
        let [sb, sh, si, sj] = self.strides;
        let (keys, queries) = (tile.keys.len(), tile.queries);
        let start = self.start + tile.at.0 * sb + tile.at.1 * sh + tile.first_query * si + tile.keys.start * sj;
        // One row or column stands for all that broadcast.
        let (rows, columns) = (if si == 0 { 1 } else { queries }, if sj == 0 { 1 } else { keys });
        // SAFETY: the condition of `new`: the elements of this tile are this task's, and `self` is borrowed for one tile.
        let mut to = unsafe { self.shared.rows(start, rows, columns, si) };
        if si != 0 && sj != 0 {
            return add_transposed(simd, grads.first_columns(queries), to);
        }
        for j in 0..keys {
            let grads = &grads.row(j)[..queries];
            let column = if sj == 0 { 0 } else { j };
            if si == 0 {
                let sum = &mut to.row(0)[column];
                grads.iter().for_each(|grad| *sum += *grad);
            } else {
                grads.iter().enumerate().for_each(|(i, grad)| to.row(i)[column] += *grad);
            }
        }
    }
}
