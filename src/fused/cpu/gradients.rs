//! What the tasks of the backward pass are given for each query, and where they write.

use pulp::Simd;

use super::Strides;
use super::element::Element;
use super::micro::Rows;
use super::real::Real;
use super::scores::Tile;
use super::transpose::transpose;

/// What is known of a query after the forward pass.
#[derive(Clone, Copy)]
pub(crate) struct QueryRow<R> {
    /// Infinite where there was nothing to attend to, which makes every weight zero.
    pub(crate) logsumexp: R,
    /// Σ do ∘ o - dlse
    pub(crate) delta: R,
}

/// Where a task writes: every place that is its own, whatever was there before.
#[derive(Clone, Copy)]
pub(crate) struct Gradients<E: Element> {
    /// The queries of this sequence, from this task's share of the keys.
    pub(crate) q: *mut E::Real,
    pub(crate) q_strides: Strides,
    /// This key head of this sequence.
    pub(crate) k: *mut E,
    pub(crate) k_by_place: usize,
    pub(crate) v: *mut E,
    pub(crate) v_by_place: usize,
    /// What this task's chain adds up for the bias, if wanted.
    pub(crate) bias: Option<BiasGradient<E::Real>>,
}

/// The gradient of a bias, with the bias's own axes, row by row.
#[derive(Clone, Copy)]
pub(crate) struct BiasGradient<R> {
    pub(crate) start: *mut R,
    /// Of batch, heads, queries and keys; 0 where the bias broadcasts.
    pub(crate) strides: [usize; 4],
}

impl<R: Real> BiasGradient<R> {
    /// Adds the gradient of a tile's scores.
    ///
    /// # Safety
    ///
    /// `grad_scores` has a row of W numbers for each key of the tile. There is a number for every place of the bias, and no
    /// other task has those of the tile's heads and keys.
    #[inline(always)]
    pub(crate) unsafe fn add<S: Simd>(&self, simd: S, tile: &Tile, grad_scores: Rows<*mut R>) {
        let [sb, sh, si, sj] = self.strides;
        let keys = tile.keys.len();
        // SAFETY: as the caller promises.
        unsafe {
            let start = self.start.add(tile.at.0 * sb + tile.at.1 * sh + tile.first_query * si + tile.keys.start * sj);
            if si != 0 && sj == 1 {
                let to = Rows { start, stride: si };
                transpose::<R, S, true>(simd, keys, tile.queries, R::ONE, grad_scores.cast_const(), to);
                return;
            }
            for j in 0..keys {
                for i in 0..tile.queries {
                    *start.add(i * si + j * sj) += *grad_scores.start.add(j * grad_scores.stride + i);
                }
            }
        }
    }

    pub(crate) fn new(start: *mut R, dims: [usize; 4]) -> Self {
        let mut strides = [0; 4];
        let mut stride = 1;
        for axis in (0..4).rev() {
            strides[axis] = if dims[axis] == 1 { 0 } else { stride };
            stride *= dims[axis];
        }
        Self { start, strides }
    }
}
