//! The rule for a tensor that becomes a parameter of a layer, wherever it comes from: floats of a supported dtype, all of
//! them finite, which the dtype of the layer can hold.

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::VarBuilder;

use crate::check::{SUPPORTED, is_supported};
use crate::error::{AttentionError, Error};
use crate::memory;

/// What parameters are in an error of memory.
pub(crate) const PARAMETERS: &str = "parameters of a checkpoint";

const NOT_FINITE: &str = "expected finite numbers, got NaN or infinity";

/// No tensor can be cast to this dtype. A `VarBuilder` of [`Weights`](super::weights::Weights) that is asked for it
/// answers with an error that names the dtype of the tensor on disk.
pub(super) const ASK_FOR_STORED: DType = DType::F4;

/// Every dtype whose numbers candle would cast to floats although they are no weights: integers and quantised numbers.
const NO_WEIGHTS: [DType; 6] = [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64, DType::F8E4M3];

/// Why a tensor doesn't become a parameter.
#[derive(Debug)]
pub(crate) enum Refused {
    /// There is no memory for it.
    Memory(AttentionError),
    /// It is not what was expected.
    Tensor(String),
}

impl From<String> for Refused {
    fn from(problem: String) -> Self {
        Self::Tensor(problem)
    }
}

impl<E: Into<Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        match error.into() {
            Error::Attention(error @ AttentionError::Memory { .. }) => Self::Memory(error),
            other => Self::Tensor(other.to_string()),
        }
    }
}

/// Casts a tensor to `dtype` on `device`. Every number must be finite before and after the cast.
pub(crate) fn cast(tensor: &Tensor, dtype: DType, device: &Device) -> Result<Tensor, Refused> {
    check_finite(tensor)?;
    let cast = memory::cast(PARAMETERS, tensor, dtype)?;
    if !is_finite(&cast)? {
        return Err(format!("expected numbers that {dtype:?} can hold, got larger ones").into());
    }
    Ok(cast.to_device(device)?)
}

/// Refuses NaN and infinity.
pub(crate) fn check_finite(tensor: &Tensor) -> Result<(), Refused> {
    if is_finite(tensor)? { Ok(()) } else { Err(NOT_FINITE.to_string().into()) }
}

/// Checks the tensor that a `VarBuilder` has under this name, as it has handed it out.
pub(crate) fn check_built(vb: &VarBuilder, name: &str, tensor: &Tensor) -> Result<(), Refused> {
    // A `VarMap` hands out the variables that it has, whatever the dtype and the device of the `VarBuilder`.
    if tensor.dtype() != vb.dtype() {
        return Err(format!("expected dtype {:?}, that of the VarBuilder, got {:?}", vb.dtype(), tensor.dtype()).into());
    }
    let (expected, got) = (vb.device().location(), tensor.device().location());
    if expected != got {
        return Err(format!("expected device {expected:?}, that of the VarBuilder, got {got:?}").into());
    }
    if let Some(scale) = scale_of(vb, name) {
        return Err(format!("expected dtype {SUPPORTED}, got quantised numbers with the scale `{scale}`").into());
    }
    check_finite(tensor).map_err(|not_finite| match wider(vb.dtype()) {
        // If the number is finite in a wider dtype, it is the cast that made it infinite.
        Some(wide) => {
            let wide = vb.get_unchecked_dtype(name, wide).map_err(Refused::from);
            wide.and_then(|wide| cast(&wide, vb.dtype(), vb.device())).err().unwrap_or(not_finite)
        }
        None => format!("{NOT_FINITE}, or numbers that {:?} can't hold", vb.dtype()).into(),
    })?;
    match stored_as_no_weights(vb, name, tensor)? {
        Some(stored) => Err(format!("expected dtype {SUPPORTED}, got {stored}").into()),
        None => Ok(()),
    }
}

/// A wider dtype, for a second look at numbers that a cast may have made infinite. It is never F64: candle 0.11 doesn't return
/// from a cast of F8 to F64.
fn wider(dtype: DType) -> Option<DType> {
    (dtype == DType::F16 || dtype == DType::BF16).then_some(DType::F32)
}

/// Whether no number is NaN or infinite.
pub(crate) fn is_finite(tensor: &Tensor) -> CandleResult<bool> {
    memory::ask_for(PARAMETERS, 1, tensor, tensor.dtype())?;
    // Zero times a finite number is zero. Zero times infinity or NaN is NaN.
    Ok((tensor.detach() * 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// The scale beside a quantised weight, under the names of compressed-tensors and ModelOpt, DeepSeek, bitsandbytes, GPTQ
/// and ComfyUI. Without its scale such a weight has a wrong size.
fn scale_of(vb: &VarBuilder, name: &str) -> Option<String> {
    let stem = name.strip_suffix("weight")?;
    let scales = ["weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "scales", "scale_weight"];
    // `VarBuilder::zeros` says that it has every tensor.
    let has_all = vb.contains_tensor("no tensor has this name");
    scales.map(|scale| format!("{stem}{scale}")).into_iter().find(|scale| !has_all && vb.contains_tensor(scale))
}

/// What a tensor is before a `VarBuilder` casts it, if that is no float of a supported dtype.
///
/// A `VarBuilder` doesn't tell. That of [`var_builder`](super::var_builder) can be asked, and the others show it only by
/// what they do. In a file that candle reads, floats of eight bits and integers from 0 to 255 can't be told from wider
/// floats.
fn stored_as_no_weights(vb: &VarBuilder, name: &str, tensor: &Tensor) -> CandleResult<Option<String>> {
    if !could_be_no_weights(tensor)? {
        return Ok(None);
    }
    if let Err(error) = vb.get_unchecked_dtype(name, ASK_FOR_STORED)
        && let Error::Attention(AttentionError::DType { got, .. }) = error.into()
    {
        return Ok((!is_supported(got)).then(|| format!("{got:?}")));
    }
    let vb = vb.clone().set_device(Device::Cpu);
    let get = |dtype| vb.get_unchecked_dtype(name, dtype);
    for dtype in NO_WEIGHTS {
        // A tensor in memory is handed out itself in its own dtype, and as a new tensor in another.
        if let (Ok(first), Ok(second)) = (get(dtype), get(dtype))
            && first.id() == second.id()
        {
            return Ok(Some(format!("{dtype:?}")));
        }
    }
    // In a cast to u8 an integer outside of 0 to 255 wraps around, and a float saturates. (So it is on the CPU.)
    if tensor.device().is_cpu()
        && let (Ok(bytes), Ok(exact)) = (get(DType::U8), get(DType::F32))
    {
        let wraps = bytes.to_dtype(DType::F32)?.ne(&exact.clamp(0.0, 255.0)?.floor()?)?;
        return Ok((wraps.max_all()?.to_scalar::<u8>()? > 0).then(|| "integers".to_string()));
    }
    Ok(None)
}

/// Whether the first numbers are all whole or all floats of eight bits. Trained weights hardly ever are.
fn could_be_no_weights(tensor: &Tensor) -> CandleResult<bool> {
    let all = tensor.detach().flatten_all()?;
    let first = all.narrow(0, 0, all.elem_count().min(1024))?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    // E4M3: one bit before and three after the point, from 2^-9 to 448.
    let has_four_bits = |x: f64| x.to_bits() << (64 - 49) == 0;
    let is_float8 = |x: &f64| x.abs() <= 448.0 && has_four_bits(*x) && (x * 512.0).fract() == 0.0;
    Ok(first.iter().all(|x| x.fract() == 0.0) || first.iter().all(is_float8))
}
