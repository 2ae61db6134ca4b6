//! [`HeadLayout`]: the order of the axes of queries, keys, values and contexts.

use candle_core::{Result, Tensor};

/// The order of the axes of a tensor with heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadLayout {
    /// (batch, heads, len, dim)
    Bhld,
    /// (batch, len, heads, dim). Projections give and take this order, so no copy is needed on either side.
    Blhd,
}

impl HeadLayout {
    /// The shape of a tensor in this layout.
    pub(crate) fn shape(self, batch: usize, heads: usize, len: usize, dim: usize) -> (usize, usize, usize, usize) {
        match self {
            HeadLayout::Bhld => (batch, heads, len, dim),
            HeadLayout::Blhd => (batch, len, heads, dim),
        }
    }

    /// Reorders `sizes`, one for each axis of a tensor in this layout, to (batch, heads, len, dim).
    pub(crate) fn bhld(self, sizes: [usize; 4]) -> [usize; 4] {
        let [batch, second, third, dim] = sizes;
        match self {
            HeadLayout::Bhld => sizes,
            HeadLayout::Blhd => [batch, third, second, dim],
        }
    }

    /// The same order as the kernels call it.
    pub(crate) fn in_memory(self) -> attention_kernels::Layout {
        match self {
            HeadLayout::Bhld => attention_kernels::Layout::HeadsFirst,
            HeadLayout::Blhd => attention_kernels::Layout::TokensFirst,
        }
    }

    /// A view of a tensor in this layout as (batch, heads, len, dim), or of a tensor (batch, heads, len, dim) in this
    /// layout.
    pub(crate) fn transpose(self, x: &Tensor) -> Result<Tensor> {
        match self {
            HeadLayout::Bhld => Ok(x.clone()),
            HeadLayout::Blhd => x.transpose(1, 2),
        }
    }
}
