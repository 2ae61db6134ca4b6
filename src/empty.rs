//! Tensors without entries: gradients of zeros through them, where candle would give none, and views that candle can't read.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Makes `x` depend on `other`, so that a backward pass gives `other` a gradient, which is zero.
///
/// On CUDA candle can neither sum nor cast empty tensors. There, an empty `other` of another dtype gets no gradient.
pub(crate) fn connected(x: Tensor, other: &Tensor) -> Result<Tensor> {
    let castable = other.device().is_cpu() || other.elem_count() > 0 || other.dtype() == x.dtype();
    if !other.track_op() || !castable {
        return Ok(x);
    }
    let some = match other.elem_count() {
        0 => readable(other)?,
        // One entry, since a copy of a whole broadcast view may not fit into memory.
        _ => (0..other.rank()).try_fold(other.clone(), |x, axis| x.narrow(axis, 0, 1))?,
    };
    let empty = some.to_dtype(x.dtype())?.flatten_all()?.narrow(0, 0, 0)?;
    Tensor::cat(&[readable(&x)?.flatten_all()?, empty], 0)?.reshape(x.shape())
}

/// `x`, as a tensor that candle can read. candle panics if a view without entries begins behind the end of its storage, as a part of
/// an empty tensor may.
pub(crate) fn readable(x: &Tensor) -> Result<Tensor> {
    if x.elem_count() > 0 || x.layout().start_offset() == 0 {
        return Ok(x.clone());
    }
    if x.device().is_cpu() { x.apply_op1(Empty) } else { Tensor::zeros(x.shape(), x.dtype(), x.device()) }
}

/// A tensor without entries from another of the same shape, whose storage isn't read.
struct Empty;

impl CustomOp1 for Empty {
    fn name(&self) -> &'static str {
        "empty"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = layout.shape().clone();
        Ok((storage.device().zeros_impl(&shape, storage.dtype())?, shape))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(Tensor::zeros(arg.shape(), arg.dtype(), arg.device())?))
    }
}
