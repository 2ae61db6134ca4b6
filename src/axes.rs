//! In what order the axes of queries, keys, values and contexts stand.

use candle_core::{Result, Tensor};

/// In what order tensors have their axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axes {
    /// (batch, heads, len, dim)
    HeadsFirst,
    /// (batch, len, heads, dim), as projections give and take it: then nothing is copied on either side.
    TokensFirst,
}

impl Axes {
    /// (batch, heads, len) of a shape.
    pub(crate) fn of(self, (batch, second, third, _): (usize, usize, usize, usize)) -> (usize, usize, usize) {
        match self {
            Axes::HeadsFirst => (batch, second, third),
            Axes::TokensFirst => (batch, third, second),
        }
    }

    /// A shape with these axes.
    pub(crate) fn arrange(self, batch: usize, heads: usize, len: usize, dim: usize) -> (usize, usize, usize, usize) {
        match self {
            Axes::HeadsFirst => (batch, heads, len, dim),
            Axes::TokensFirst => (batch, len, heads, dim),
        }
    }

    /// From these axes to (batch, heads, len, dim), or back.
    pub(crate) fn swap(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Axes::HeadsFirst => Ok(x.clone()),
            Axes::TokensFirst => x.transpose(1, 2),
        }
    }

    /// How far apart the heads and the places of a contiguous tensor are.
    pub(crate) fn strides(self, heads: usize, len: usize, dim: usize) -> (usize, usize) {
        match self {
            Axes::HeadsFirst => (len * dim, dim),
            Axes::TokensFirst => (dim, heads * dim),
        }
    }
}
