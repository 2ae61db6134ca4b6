//! Layer norm and RMS norm over the last axis, with gradients for the input and the parameters.
//!
//! candle's `LayerNorm::forward` and `RmsNorm::forward` have no gradient on contiguous input. Its differentiable forms,
//! `layer_norm_slow` and `RmsNorm::forward_diff`, sum the gradients of the parameters in the dtype of the input, and in a
//! half type such a sum stops growing after some hundred tokens.

use candle_core::{D, DType, Tensor};

use crate::check::{check_device, check_dtype, check_number, compute_dtype, widened};
use crate::empty::connected;
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::sdpa::overflow::{finite_or_zero, largest_on_cpu};

/// RMS norm: x / sqrt(mean(x²) + eps) · weight, over the last axis.
///
/// It is computed in f32 (f64 for input in f64), also the sums of the gradients, and rounded once.
///
/// # Shapes
///
/// x (..., dim), weight (dim); the result has the shape and dtype of x.
///
/// # Errors
///
/// Input without axes; a weight of another shape or on another device; a dtype that isn't a float; an eps that isn't a
/// finite number above 0 in the dtype of the computation; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::rms_norm;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?; // mean square 12.5
/// let weight = Tensor::new(&[1f32, 10.], &Device::Cpu)?;
/// let y = rms_norm(&x, &weight, 1e-6)?.to_vec2::<f32>()?;
/// assert!((y[0][0] - 0.8485).abs() < 1e-4 && (y[0][1] - 11.3137).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019), section 3.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    check(x, weight, None, eps)?;
    if x.elem_count() == 0 {
        return Ok(connected(x.clone(), weight)?);
    }
    let wide = divided_by_rms(&widened(x)?, eps, false)?;
    Ok(wide.broadcast_mul(&weight.to_dtype(wide.dtype())?)?.to_dtype(x.dtype())?)
}

/// Layer norm: (x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over the last axis.
///
/// It is computed in f32 (f64 for input in f64), also the sums of the gradients, and rounded once.
///
/// # Shapes
///
/// x (..., dim), weight (dim), bias (dim); the result has the shape and dtype of x.
///
/// # Errors
///
/// As [`rms_norm`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::layer_norm;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?; // mean 2, variance 1
/// let (weight, bias) = (Tensor::new(&[1f32, 10.], &Device::Cpu)?, Tensor::new(&[0f32, 5.], &Device::Cpu)?);
/// let y = layer_norm(&x, &weight, Some(&bias), 1e-6)?.to_vec2::<f32>()?;
/// assert!((y[0][0] + 1.0).abs() < 1e-4 && (y[0][1] - 15.0).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), section 3.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check(x, weight, bias, eps)?;
    if x.elem_count() == 0 {
        let y = connected(x.clone(), weight)?;
        return Ok(bias.map_or(Ok(y.clone()), |bias| connected(y, bias))?);
    }
    let wide = divided_by_rms(&widened(x)?, eps, true)?;
    let mut y = wide.broadcast_mul(&weight.to_dtype(wide.dtype())?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(wide.dtype())?)?;
    }
    Ok(y.to_dtype(x.dtype())?)
}

/// x / sqrt(mean(x²) + eps), where the mean of each row has been subtracted from it before if `is_centred`.
fn divided_by_rms(x: &Tensor, eps: f64, is_centred: bool) -> candle_core::Result<Tensor> {
    let dim = x.dim(D::Minus1)? as f64;
    let divisors = divisors_of_huge_rows(x)?;
    let mut x = divisors.as_ref().map_or(Ok(x.clone()), |divisors| x.broadcast_div(divisors))?;
    if is_centred {
        x = x.broadcast_sub(&(x.sum_keepdim(D::Minus1)? / dim)?)?;
    }
    let mean_square = (x.sqr()?.sum_keepdim(D::Minus1)? / dim)?;
    let sum = match divisors {
        None => (mean_square + eps)?,
        // The epsilon of a divided row. A row of equal numbers has nothing else to be divided by.
        Some(divisors) => {
            let smallest = if x.dtype() == DType::F64 { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
            let inverse = divisors.recip()?;
            (mean_square + (inverse.affine(eps, 0.0)? * inverse)?.maximum(smallest)?)?
        }
    };
    x.broadcast_div(&sum.sqrt()?)
}

/// The largest entry of each row whose squares could overflow, and 1 for the other rows; `None` if there are only others. A
/// row that is divided by it has the same norm, with another epsilon. On another device than the CPU nothing is divided,
/// since the question would wait for the device.
fn divisors_of_huge_rows(x: &Tensor) -> candle_core::Result<Option<Tensor>> {
    // The square of this bound is 2^-64 (f64) or 2^-16 (f32) of the largest number, which leaves room for a sum.
    let huge = if x.dtype() == DType::F64 { 2f64.powi(480) } else { 2f64.powi(56) };
    if !x.device().is_cpu() || largest_on_cpu(x)? <= huge {
        return Ok(None);
    }
    let largest = finite_or_zero(&x.detach())?.abs()?.max_keepdim(D::Minus1)?;
    Ok(Some(largest.gt(huge)?.where_cond(&largest, &largest.ones_like()?)?))
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<(), AttentionError> {
    let Some(&dim) = x.dims().last() else {
        return Err(AttentionError::Rank { tensor: "x", expected: "at least 1 axis (..., dim)", shape: vec![] });
    };
    check_dtype("x", x.dtype())?;
    for (tensor, parameter) in [("weight", Some(weight)), ("bias", bias)] {
        let Some(parameter) = parameter else { continue };
        check_dtype(tensor, parameter.dtype())?;
        check_device(tensor, parameter, x)?;
        if parameter.dims() != [dim] {
            let expected = format!("(dim) = [{dim}], the last axis of x");
            return Err(AttentionError::Shape { tensor, expected, shape: parameter.dims().to_vec() });
        }
    }
    check_eps("eps", Some(eps), x.dtype())?;
    memory::check_countable("x", x)?;
    // Widened, centred, its square, divided, times the weight, with the bias, and rounded.
    memory::ask_for("normalised rows", 7, x, compute_dtype(x.dtype()))
}

/// Checks the epsilon of a norm. A row of zeros is divided by its square root.
pub(crate) fn check_eps(name: &'static str, eps: Option<f64>, dtype: DType) -> Result<(), AttentionError> {
    // All dtypes but f64 are computed in f32.
    let in_range = |eps: f64| eps.is_finite() && eps > 0.0 && (dtype == DType::F64 || (eps as f32).is_normal());
    check_number(name, eps, "a finite number above 0, also in f32", in_range)
}
