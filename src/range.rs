//! Whether finite inputs are so large that scores overflow.

use candle_core::{DType, Result, Tensor};

/// Whether some |q·k| · |scale| might be more than the dtype can hold, in logarithms, which can't overflow themselves.
pub(crate) fn may_overflow(q: &Tensor, k: &Tensor, scale: f64) -> Result<bool> {
    let largest = |x: &Tensor| -> Result<f64> {
        if x.elem_count() == 0 {
            return Ok(0.0);
        }
        x.detach().abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()
    };
    let limit = if q.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
    let bound = largest(q)?.ln() + largest(k)?.ln() + (q.dim(3)? as f64).ln() + scale.abs().max(1.0).ln();
    // A margin for the rounding of the sum; NaN and infinity take the plain path, where they stay in their rows.
    Ok(bound.is_finite() && bound > limit.ln() - 1.0)
}
