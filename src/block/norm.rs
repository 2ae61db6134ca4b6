//! Layer norm and RMS norm over the last axis, with gradients for the input and the parameters.
//!
//! candle's `LayerNorm::forward` and `RmsNorm::forward` have no gradient on contiguous input. Its differentiable forms,
//! `layer_norm_slow` and `RmsNorm::forward_diff`, sum the gradients of the parameters in the dtype of the input, and in a
//! half type such a sum stops growing after some hundred tokens. On the CPU the kernels compute the norms; this file has
//! candle's operations for other devices.

use attention_kernels::norm::{Norm, NormKind};
use candle_core::{D, DType, Tensor};

use crate::block::op::{self, Dtype, Function, Gradient};
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
    NormRule { kind: NormKind::Rms, eps, unit_offset: false }.apply(x, weight, None)
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
    NormRule { kind: NormKind::Layer, eps, unit_offset: false }.apply(x, weight, bias)
}

/// A norm without its parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormRule {
    pub(crate) kind: NormKind,
    pub(crate) eps: f64,
    /// Whether a row is multiplied by 1 + weight. The sum is taken in the dtype to compute in.
    pub(crate) unit_offset: bool,
}

impl NormRule {
    /// The normalised rows of x, with the errors of [`rms_norm`].
    pub(crate) fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        check(x, weight, bias, self.eps)?;
        if x.elem_count() == 0 {
            let y = connected(x.clone(), weight)?;
            return Ok(bias.map_or(Ok(y.clone()), |bias| connected(y, bias))?);
        }
        if x.device().is_cpu() {
            return Ok(self.on_cpu(x, weight, bias)?);
        }
        let wide = divided_by_rms(&widened(x)?, self.eps, self.kind == NormKind::Layer)?;
        let weight = weight.to_dtype(wide.dtype())?;
        let mut y = wide.broadcast_mul(&if self.unit_offset { (weight + 1.0)? } else { weight })?;
        if let Some(bias) = bias {
            y = y.broadcast_add(&bias.to_dtype(wide.dtype())?)?;
        }
        Ok(y.to_dtype(x.dtype())?)
    }

    /// A norm by the kernels. Parameters of another dtype than x are used as they are, in the dtype to compute in.
    fn on_cpu(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let apply = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>| match bias {
            Some(bias) => op::apply(CpuNorm(self), [x, weight, bias]),
            None => op::apply(CpuNorm(self), [x, weight]),
        };
        let dtype = x.dtype();
        if weight.dtype() == dtype && bias.is_none_or(|bias| bias.dtype() == dtype) {
            return apply(x, weight, bias);
        }
        let compute = compute_dtype(dtype);
        // Widened, normalised, and rounded.
        memory::ask_for("normalised rows", 3, x, compute)?;
        let bias = bias.map(|bias| bias.to_dtype(compute)).transpose()?;
        apply(&x.to_dtype(compute)?, &weight.to_dtype(compute)?, bias.as_ref())?.to_dtype(dtype)
    }
}

/// A norm of x by a weight, or by a weight and a bias.
struct CpuNorm(NormRule);

impl CpuNorm {
    fn norm<'a, E: Dtype>(&self, weight: &'a [E], bias: Option<&'a [E]>) -> Norm<'a, E> {
        let NormRule { kind, eps, unit_offset } = self.0;
        Norm { kind, weight, bias, eps, unit_offset }
    }
}

/// The gradient of a parameter, rounded once.
fn rounded<E: Dtype>(gradient: Vec<E::Float>) -> Result<Gradient<E>, AttentionError> {
    Ok(Gradient::Numbers(E::from_floats("gradient of a norm's parameter", gradient)?))
}

impl Function<2> for CpuNorm {
    const NAME: &'static str = "norm";

    fn forward<E: Dtype>(&self, [x, weight]: [&[E]; 2], _: [&[usize]; 2]) -> candle_core::Result<Vec<E>> {
        Ok(self.norm(weight, None).forward(x).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        [x, weight]: [&[E]; 2],
        _: [&[usize]; 2],
        grad: &[E],
        _: [bool; 2],
    ) -> candle_core::Result<[Option<Gradient<E>>; 2]> {
        let gradients = self.norm(weight, None).backward(x, grad, None).map_err(AttentionError::from)?;
        Ok([Some(Gradient::Numbers(gradients.x)), Some(rounded(gradients.weight)?)])
    }
}

impl Function<3> for CpuNorm {
    const NAME: &'static str = "norm-with-bias";

    fn forward<E: Dtype>(&self, [x, weight, bias]: [&[E]; 3], _: [&[usize]; 3]) -> candle_core::Result<Vec<E>> {
        Ok(self.norm(weight, Some(bias)).forward(x).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        [x, weight, bias]: [&[E]; 3],
        _: [&[usize]; 3],
        grad: &[E],
        _: [bool; 3],
    ) -> candle_core::Result<[Option<Gradient<E>>; 3]> {
        let gradients = self.norm(weight, Some(bias)).backward(x, grad, None).map_err(AttentionError::from)?;
        let bias = gradients.bias.map(rounded).transpose()?;
        Ok([Some(Gradient::Numbers(gradients.x)), Some(rounded(gradients.weight)?), bias])
    }
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
    Ok(())
}

/// Checks the epsilon of a norm. A row of zeros is divided by its square root.
pub(crate) fn check_eps(name: &'static str, eps: Option<f64>, dtype: DType) -> Result<(), AttentionError> {
    // All dtypes but f64 are computed in f32.
    let in_range = |eps: f64| eps.is_finite() && eps > 0.0 && (dtype == DType::F64 || (eps as f32).is_normal());
    check_number(name, eps, "a finite number above 0, also in f32", in_range)
}
