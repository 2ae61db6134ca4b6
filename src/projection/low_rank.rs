//! [`LowRank`]: the matrices of one adapter at one linear layer.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::check::compute_dtype;
use crate::memory;

/// s · B · A, which an adapter adds to a weight (out, in).
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    /// (rank, in)
    pub(crate) a: Tensor,
    /// (out, rank)
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    /// The name from which the seed of its dropout is made; that of its projection if not given. Projections that share A have one name.
    pub(crate) input: Option<Arc<str>>,
}

impl LowRank {
    /// weight + sign · s · B · A, as a constant. Half types are added in f32 and rounded once.
    pub(crate) fn added_to(&self, weight: &Tensor, sign: f64) -> Result<Tensor> {
        let (dtype, compute) = (weight.dtype(), compute_dtype(weight.dtype()));
        memory::ask_for("merged weight", 4, weight, compute)?;
        let [a, b] = [&self.a, &self.b].map(|x| x.detach().to_dtype(compute)?.contiguous());
        (weight.detach().to_dtype(compute)? + (b?.matmul(&a?)? * (sign * self.scale))?)?.to_dtype(dtype)
    }
}
