//! Checks that several modules share.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

use crate::error::AttentionError;

/// The supported dtypes, as error texts name them.
pub(crate) const SUPPORTED: &str = "F16, BF16, F32 or F64";

pub(crate) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

/// The dtype to compute in: f32 for half types, so that sums don't lose precision.
pub(crate) fn compute_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `x` in the dtype to compute in. An empty tensor keeps its dtype, since candle can't cast it on CUDA.
pub(crate) fn widened(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.elem_count() == 0 { Ok(x.clone()) } else { x.to_dtype(compute_dtype(x.dtype())) }
}

/// Refuses any dtype but f16, bf16, f32 and f64.
pub(crate) fn check_dtype(tensor: &'static str, dtype: DType) -> Result<(), AttentionError> {
    if is_supported(dtype) {
        return Ok(());
    }
    Err(AttentionError::DType { tensor, expected: SUPPORTED.into(), got: dtype })
}

/// Refuses a tensor on another device than `other`.
pub(crate) fn check_device(tensor: &'static str, x: &Tensor, other: &Tensor) -> Result<(), AttentionError> {
    let (expected, got) = (other.device().location(), x.device().location());
    if expected == got { Ok(()) } else { Err(AttentionError::Device { tensor, expected, got }) }
}

/// Refuses a number for which `allowed` is false. `None` is accepted.
pub(crate) fn check_number(
    name: &'static str,
    number: Option<f64>,
    expected: &'static str,
    allowed: impl Fn(f64) -> bool,
) -> Result<(), AttentionError> {
    match number {
        Some(got) if !allowed(got) => Err(AttentionError::Number { name, expected, got }),
        _ => Ok(()),
    }
}

/// Refuses a number that is infinite in `dtype`, or so small that it loses digits there or becomes zero. `None` and 0
/// are accepted.
pub(crate) fn check_held(name: &'static str, number: Option<f64>, dtype: DType) -> Result<(), AttentionError> {
    let (expected, held): (_, fn(f64) -> bool) = match dtype {
        DType::F16 => ("a number that F16 can hold", |x| f16::from_f64(x).is_normal()),
        DType::BF16 => ("a number that BF16 can hold", |x| bf16::from_f64(x).is_normal()),
        DType::F32 => ("a number that F32 can hold", |x| (x as f32).is_normal()),
        _ => ("a number that F64 can hold", f64::is_normal),
    };
    check_number(name, number, expected, |x| x == 0.0 || held(x))
}
