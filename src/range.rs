//! Whether finite inputs are so large that scores overflow.

use candle_core::{D, DType, Result, Tensor};

/// Whether some |q·k| · |scale| might be more than the dtype can hold, in logarithms, which can't overflow themselves. Of
/// at least one query and key.
pub(crate) fn may_overflow(q: &Tensor, k: &Tensor, scale: f64) -> Result<bool> {
    // Row by row first, since all at once is work for a single block of threads on CUDA.
    let largest = |x: &Tensor| x.detach().abs()?.max_keepdim(D::Minus1)?.flatten_all()?.max_keepdim(0);
    // Both in one tensor: to read from another device is to wait for it.
    let largest = Tensor::cat(&[largest(q)?, largest(k)?], 0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let largest: f64 = largest.iter().map(|x| x.ln()).sum();
    let limit = if q.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
    let bound = largest + (q.dim(D::Minus1)? as f64).ln() + scale.abs().max(1.0).ln();
    // A margin for the rounding of the sum; NaN and infinity take the plain path, where they stay in their rows.
    Ok(bound.is_finite() && bound > limit.ln() - 1.0)
}
