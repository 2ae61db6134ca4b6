//! Overflow of scores: whether finite inputs are so large that their dot products are not finite.

use candle_core::{D, DType, Result, Tensor};

use crate::memory;

/// Whether some |q·k| · |scale| might be larger than the dtype's largest number. The bound is computed in logarithms,
/// which don't overflow. `q` and `k` are not empty.
pub(crate) fn may_overflow(q: &Tensor, k: &Tensor, scale: f64) -> Result<bool> {
    let both = [q, k].map(|x| memory::bytes(x.dims(), x.dtype()));
    memory::ask("largest entries of query and key", q.device(), memory::sum(both))?;
    // Row by row first: CUDA reduces a whole tensor with a single block of threads.
    let largest = |x: &Tensor| x.detach().abs()?.max_keepdim(D::Minus1)?.flatten_all()?.max_keepdim(0);
    // Both in one tensor, since every read from another device waits for that device.
    let largest = Tensor::cat(&[largest(q)?, largest(k)?], 0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let largest: f64 = largest.iter().map(|x| x.ln()).sum();
    let limit = if q.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
    let bound = largest + (q.dim(D::Minus1)? as f64).ln() + scale.abs().max(1.0).ln();
    // A margin of 1 covers the rounding of the sum. Non-finite inputs are no overflow: they affect only their own rows.
    Ok(bound.is_finite() && bound > limit.ln() - 1.0)
}
