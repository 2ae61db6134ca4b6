//! [`linear`]: x·Wᵀ + b as one operation with a gradient.

use candle_core::Tensor;
use candle_nn::Linear;

use crate::check::{check_device, check_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::projection::project;

/// x · weightᵀ + bias as one operation with a gradient for x, weight and bias.
///
/// candle's `Linear` sums the gradient of a bias number by number, and in a half type such a sum stops growing after some hundred
/// tokens. Here all sums are taken in f32 (f64 for f64) and rounded once, and the sum of a bias costs one pass.
///
/// # Shapes
///
/// x (..., in), weight (out, in), bias (out); the result is (..., out).
///
/// # Errors
///
/// Shapes that don't fit each other; a dtype that isn't a float, or that differs from that of x; another device; too little
/// memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::linear;
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[3f32, 4.], [5., 6.]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
/// assert_eq!(linear(&x, &weight, Some(&bias))?.to_vec2::<f32>()?, [[11.5, 17.25]]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check(x, weight, bias)?;
    let outputs = weight.dim(0)?;
    let shape = [&x.dims()[..x.rank() - 1], &[outputs]].concat();
    Ok(project(Linear::new(weight.clone(), bias.cloned()).into(), x, &shape)?)
}

pub(crate) fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<(), AttentionError> {
    let Some(&inputs) = x.dims().last() else {
        return Err(AttentionError::Rank { tensor: "x", expected: "at least 1 axis (..., in)", shape: vec![] });
    };
    check_dtype("x", x.dtype())?;
    memory::check_countable("x", x)?;
    let [outputs, _] = *weight.dims() else {
        let (tensor, expected, shape) = ("weight", "2 axes (out, in)", weight.dims().to_vec());
        return Err(AttentionError::Rank { tensor, expected, shape });
    };
    if weight.dims()[1] != inputs {
        let expected = format!("(out, {inputs}), the last axis of x");
        return Err(AttentionError::Shape { tensor: "weight", expected, shape: weight.dims().to_vec() });
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [outputs]) {
        let expected = format!("(out) = [{outputs}], as the weight");
        return Err(AttentionError::Shape { tensor: "bias", expected, shape: bias.dims().to_vec() });
    }
    for (tensor, parameter) in [("weight", Some(weight)), ("bias", bias)] {
        let Some(parameter) = parameter else { continue };
        if parameter.dtype() != x.dtype() {
            let expected = format!("{:?}, that of x", x.dtype());
            return Err(AttentionError::DType { tensor, expected, got: parameter.dtype() });
        }
        check_device(tensor, parameter, x)?;
    }
    Ok(())
}
