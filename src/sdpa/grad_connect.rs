//! Gradients through empty tensors: zeros, where candle would give none.

use candle_core::{Result, Tensor};

/// Makes `x` depend on `other`, so that a backward pass gives `other` a gradient, which is zero.
///
/// On CUDA candle can neither sum nor cast empty tensors. There, an empty `other` of another dtype gets no gradient.
pub(crate) fn connected(x: Tensor, other: &Tensor) -> Result<Tensor> {
    let castable = other.device().is_cpu() || other.elem_count() > 0 || other.dtype() == x.dtype();
    if !other.track_op() || !castable {
        return Ok(x);
    }
    let empty = other.to_dtype(x.dtype())?.flatten_all()?.narrow(0, 0, 0)?;
    Tensor::cat(&[x.flatten_all()?, empty], 0)?.reshape(x.shape())
}
