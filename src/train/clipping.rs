//! Clipping of gradients by their norm.

use attention_kernels::optimizer::scale;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::check::check_number;
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::gradients::{error, finite_squares, of, with_number};
use crate::train::in_place::write;

/// What PyTorch adds to the norm, so that nothing is divided by zero.
const PYTORCH_EPS: f64 = 1e-6;

/// Scales the gradients of some parameters so that their norm is at most `max_norm`, and returns the norm that they had.
///
/// The norm is that of all gradients as one vector, summed in f64. Each gradient is multiplied by
/// min(1, max_norm / (norm + 10⁻⁶)), as PyTorch's `clip_grad_norm_` does, in f32 (f64 for f64), and rounded once. The gradients
/// in the store are replaced by new tensors, unless the factor is 1. A parameter without a gradient counts nothing.
///
/// With a `max_norm` of infinity the norm is only measured.
///
/// # Errors
///
/// A `max_norm` that isn't above 0; a gradient of another shape, dtype or device than its parameter; NaN or infinity in a gradient,
/// with the name of the first parameter that has one; too little memory. Then no gradient is changed.
///
/// # Examples
///
/// ```
/// use candle_attention::train::clip_grad_norm;
/// use candle_core::{Device, Var};
///
/// let x = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let mut gradients = x.sqr()?.sum_all()?.backward()?; // (6, 8), of norm 10
/// let parameters = [("x".to_string(), x.clone())];
/// assert_eq!(clip_grad_norm(&mut gradients, &parameters, 1.0)?, 10.0);
/// let clipped = gradients.get(&x).unwrap().to_vec1::<f32>()?;
/// assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks" (ICML 2013), algorithm 1.
pub fn clip_grad_norm(gradients: &mut GradStore, parameters: &[(String, Var)], max_norm: f64) -> Result<f64> {
    check_number("max_norm", Some(max_norm), "a number above 0", |norm| norm > 0.0)?;
    let mut found = Vec::new();
    for (name, var) in parameters {
        found.extend(of(gradients, name, var)?.map(|gradient| (name.as_str(), var, gradient)));
    }
    let named: Vec<_> = found.iter().map(|(name, _, gradient)| (*name, gradient)).collect();
    let norm = finite_squares(&named)?.iter().sum::<f64>().sqrt();
    if !norm.is_finite() {
        return Err(error("all parameters", "a norm that f64 can hold", "one that overflows").into());
    }
    let factor = (max_norm / (norm + PYTORCH_EPS)).min(1.0);
    if factor < 1.0 {
        let scaled = found.iter().map(|(_, var, gradient)| Ok((*var, scaled(gradient, factor)?)));
        for (var, gradient) in scaled.collect::<Result<Vec<_>>>()? {
            gradients.insert(var, gradient);
        }
    }
    Ok(norm)
}

/// A contiguous gradient times a factor.
pub(super) fn scaled(gradient: &Tensor, factor: f64) -> Result<Tensor> {
    memory::ask_for("scaled gradient", 1, gradient, gradient.dtype())?;
    if !gradient.device().is_cpu() {
        let wide = crate::check::widened(gradient)?;
        return Ok(wide.affine(factor, 0.0)?.to_dtype(gradient.dtype())?);
    }
    let copy = gradient.copy()?.detach();
    scale_in_place(&copy, factor)?;
    Ok(copy)
}

/// Multiplies the numbers of a contiguous tensor on the CPU, which nothing else reads, by a factor.
pub(super) fn scale_in_place(tensor: &Tensor, factor: f64) -> Result<()> {
    Ok(with_number!(tensor.dtype(), E => write::<E>(tensor, &mut |numbers| {
        Ok(scale(vec![numbers], factor).map_err(AttentionError::from)?)
    }))?)
}
