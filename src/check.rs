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

/// The logarithm of a bound on |q·k| · |scale| and on |q| · |scale|, for rows of `head_dim` numbers of which `largest` are the greatest
/// magnitudes. Logarithms don't overflow.
pub(crate) fn log_bound_of_scores(largest: [f64; 2], head_dim: usize, scale: f64) -> f64 {
    let [q, k] = largest.map(f64::ln);
    let of_products = q + k + (head_dim as f64).ln() + scale.abs().max(1.0).ln();
    // The kernels multiply the query by the scale first.
    of_products.max(q + scale.abs().ln())
}

/// The logarithm of the largest number of the dtype that inputs in `dtype` are computed in.
pub(crate) fn log_of_largest(dtype: DType) -> f64 {
    if dtype == DType::F64 { f64::MAX.ln() } else { f64::from(f32::MAX).ln() }
}

/// Whether scores of this [bound](log_bound_of_scores) may overflow, for inputs in `dtype`. A margin of 1 covers the rounding of a sum.
pub(crate) fn scores_may_overflow(log_bound: f64, dtype: DType) -> bool {
    log_bound > log_of_largest(dtype) - 1.0
}
