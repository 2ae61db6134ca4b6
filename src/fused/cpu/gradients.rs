//! What the tasks of the backward pass are given for each query, and where they write.

use super::Strides;
use super::element::Element;

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

impl<R> BiasGradient<R> {
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
