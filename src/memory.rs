//! Memory is asked for before candle allocates it: candle aborts the process if there is none.

use attention_kernels::reserve;
use candle_core::{DType, Device, Tensor};

use crate::empty::readable;
use crate::error::{AttentionError, Result};

/// What needs no question. A question takes the time of an allocation, which shows in a call with small tensors, and a
/// process that can't have so little can't go on anyway.
const ALWAYS_THERE: usize = 64 << 10;
/// What candle and the system need beside the tensors of a step: panels of a matrix product, stacks of threads.
const BESIDE: usize = 8 << 20;

/// Checks that the CPU has memory for `bytes` more, all of which a step holds at the same time.
///
/// # Errors
///
/// [`AttentionError::Memory`] if there is none. Another device is not asked, since candle's allocation there returns an
/// error.
pub(crate) fn ask(what: &'static str, device: &Device, bytes: usize) -> Result<(), AttentionError> {
    if bytes <= ALWAYS_THERE || !device.is_cpu() {
        return Ok(());
    }
    // The memory is given back at once. Only its address space was taken, so that nothing has been written.
    match reserve::<u8>(what, bytes.saturating_add(BESIDE)) {
        Ok(_) => Ok(()),
        Err(_) => Err(AttentionError::Memory { what, bytes }),
    }
}

/// As [`ask`], for `count` tensors of the shape of `x` in `dtype` on its device.
pub(crate) fn ask_for(what: &'static str, count: usize, x: &Tensor, dtype: DType) -> Result<(), AttentionError> {
    ask(what, x.device(), bytes(x.dims(), dtype).saturating_mul(count))
}

/// The bytes of a tensor; `usize::MAX` if there are more than can be counted.
pub(crate) fn bytes(dims: &[usize], dtype: DType) -> usize {
    if dims.contains(&0) {
        return 0;
    }
    dims.iter().fold(dtype.size_in_bytes(), |product, &dim| product.saturating_mul(dim))
}

/// The sum of some sizes; `usize::MAX` if it is more than can be counted.
pub(crate) fn sum(sizes: impl IntoIterator<Item = usize>) -> usize {
    sizes.into_iter().fold(0, usize::saturating_add)
}

/// Refuses a broadcast view of more entries than can be counted. candle's own count wraps around: it is 0 for 2^32 x
/// 2^32.
pub(crate) fn check_countable(tensor: &'static str, x: &Tensor) -> Result<(), AttentionError> {
    match bytes(x.dims(), x.dtype()) {
        usize::MAX => Err(AttentionError::Memory { what: tensor, bytes: usize::MAX }),
        _ => Ok(()),
    }
}

/// `x`, or a contiguous copy of it.
pub(crate) fn contiguous(what: &'static str, x: &Tensor) -> candle_core::Result<Tensor> {
    let x = readable(x)?;
    if !x.is_contiguous() {
        ask_for(what, 1, &x, x.dtype())?;
    }
    x.contiguous()
}

/// `x`, or a copy of it in another dtype.
pub(crate) fn cast(what: &'static str, x: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    if x.dtype() != dtype {
        ask_for(what, 1, x, dtype)?;
    }
    x.to_dtype(dtype)
}

/// Appends some items to a vector.
pub(crate) fn append<T>(
    what: &'static str,
    vector: &mut Vec<T>,
    items: impl ExactSizeIterator<Item = T>,
) -> Result<(), AttentionError> {
    let bytes = items.len().saturating_mul(size_of::<T>());
    vector.try_reserve_exact(items.len()).map_err(|_| AttentionError::Memory { what, bytes })?;
    vector.extend(items);
    Ok(())
}
