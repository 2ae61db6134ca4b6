//! Activation functions, plain and gated.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use attention_kernels::activation;
use candle_core::{D, Shape, Tensor};
use serde::{Deserialize, Serialize};

use crate::block::op::{self, Dtype, Function, Gradient};
use crate::check::{check_device, check_dtype, widened};
use crate::empty::connected;
use crate::error::{AttentionError, Result};
use crate::memory;

/// A function of each number of a tensor. Half types are computed in f32 and rounded once, and no finite number has a value or a
/// gradient of NaN on the CPU.
///
/// In JSON an activation has its name in small letters, such as `gelu_tanh`, or the name that Hugging Face's configs give it, such as
/// `gelu_new`.
///
/// # Examples
///
/// ```
/// use candle_attention::block::Activation;
/// use candle_core::{Device, Tensor};
///
/// let activation: Activation = serde_json::from_str("\"squared_relu\"").unwrap();
/// let x = Tensor::new(&[-1f32, 3.0], &Device::Cpu)?;
/// assert_eq!(activation.forward(&x)?.to_vec1::<f32>()?, [0.0, 9.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// max(x, 0)². Source: So et al., "Primer" (NeurIPS 2021), section 3.
    #[serde(alias = "relu2")]
    SquaredRelu,
    /// x · Φ(x), where Φ is the distribution function of the normal distribution: x / 2 · (1 + erf(x / √2)). Source: Hendrycks,
    /// Gimpel, "Gaussian Error Linear Units" (2016), section 2.
    Gelu,
    /// The approximation x / 2 · (1 + tanh(√(2 / π) · (x + 0.044715 x³))) of the same section.
    #[serde(alias = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// x · σ(x), where σ(x) = 1 / (1 + e^-x). Source: the same, section 2.
    #[serde(alias = "swish")]
    Silu,
}

impl Activation {
    /// f(x) of each number.
    ///
    /// # Shapes
    ///
    /// x of any shape; the result has the shape and dtype of x.
    ///
    /// # Errors
    ///
    /// A dtype that isn't a float, or too little memory.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        check("x", x)?;
        if x.device().is_cpu() {
            return Ok(op::apply(Plain(self.kernel()), [x])?);
        }
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        Ok(self.elsewhere(&widened(x)?)?.to_dtype(x.dtype())?)
    }

    pub(crate) fn kernel(self) -> activation::Activation {
        match self {
            Self::Relu => activation::Activation::Relu,
            Self::SquaredRelu => activation::Activation::SquaredRelu,
            Self::Gelu => activation::Activation::Gelu,
            Self::GeluTanh => activation::Activation::GeluTanh,
            Self::Silu => activation::Activation::Silu,
        }
    }

    /// The same by candle's operations, but not by its own activations: the gradient of its ReLU is 1 at 0, those of its GELUs have
    /// constants of six digits, and that of its SiLU is 0 for large numbers.
    fn elsewhere(self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Relu => x.le(0.0)?.where_cond(&x.zeros_like()?, x),
            Self::SquaredRelu => Self::Relu.elsewhere(x)?.sqr(),
            // Half of x first: x times two overflows.
            Self::Gelu => (x * 0.5)? * ((x * FRAC_1_SQRT_2)?.erf()? + 1.0)?,
            // The tanh of greater numbers is 1 in f64, too, and their cubes could overflow.
            Self::GeluTanh => {
                let small = x.clamp(-10.0, 10.0)?;
                let inner = (&small + (small.sqr()? * &small)?.affine(0.044715, 0.0)?)?;
                (x * 0.5)? * ((inner * FRAC_2_PI.sqrt())?.tanh()? + 1.0)?
            }
            Self::Silu => x * candle_nn::ops::sigmoid(x)?,
        }
    }
}

/// [`Activation::Gelu`] of each number.
///
/// # Errors
///
/// As [`Activation::forward`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::gelu;
/// use candle_core::{Device, Tensor};
///
/// let y = gelu(&Tensor::new(&[1f64, -1.0], &Device::Cpu)?)?.to_vec1::<f64>()?;
/// assert!((y[0] - 0.841344746).abs() < 1e-9 && (y[1] + 0.158655254).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Activation::Gelu.forward(x)
}

/// [`Activation::GeluTanh`] of each number.
///
/// # Errors
///
/// As [`Activation::forward`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::gelu_tanh;
/// use candle_core::{Device, Tensor};
///
/// let y = gelu_tanh(&Tensor::new(&[1f64], &Device::Cpu)?)?.to_vec1::<f64>()?;
/// assert!((y[0] - 0.841192).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    Activation::GeluTanh.forward(x)
}

/// [`Activation::Silu`] of each number.
///
/// # Errors
///
/// As [`Activation::forward`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::silu;
/// use candle_core::{Device, Tensor};
///
/// let y = silu(&Tensor::new(&[1f64, -1e4], &Device::Cpu)?)?.to_vec1::<f64>()?;
/// assert!((y[0] - 0.731058579).abs() < 1e-9 && y[1] == 0.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Activation::Silu.forward(x)
}

/// [`Activation::SquaredRelu`] of each number.
///
/// # Errors
///
/// As [`Activation::forward`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::squared_relu;
/// use candle_core::{Device, Tensor};
///
/// let y = squared_relu(&Tensor::new(&[-2f32, 3.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0.0, 9.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn squared_relu(x: &Tensor) -> Result<Tensor> {
    Activation::SquaredRelu.forward(x)
}

/// f(gate) · up, the gated linear unit of an activation function.
///
/// # Shapes
///
/// gate and up of one shape and dtype, which the result has too.
///
/// # Errors
///
/// Two shapes, dtypes or devices, a dtype that isn't a float, or too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{Activation, gated};
/// use candle_core::{Device, Tensor};
///
/// let (gate, up) = (Tensor::new(&[2f32, -1.0], &Device::Cpu)?, Tensor::new(&[5f32, 7.0], &Device::Cpu)?);
/// assert_eq!(gated(Activation::Relu, &gate, &up)?.to_vec1::<f32>()?, [10.0, 0.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check("gate", gate)?;
    check_device("up", up, gate)?;
    if up.dtype() != gate.dtype() {
        let expected = format!("{:?}, as gate has", gate.dtype());
        return Err(AttentionError::DType { tensor: "up", expected, got: up.dtype() }.into());
    }
    if up.dims() != gate.dims() {
        let expected = format!("{:?}, as gate has", gate.dims());
        return Err(AttentionError::Shape { tensor: "up", expected, shape: up.dims().to_vec() }.into());
    }
    if gate.device().is_cpu() {
        return Ok(op::apply(Gated(activation.kernel()), [gate, up])?);
    }
    if gate.elem_count() == 0 {
        return Ok(connected(gate.clone(), up)?);
    }
    Ok((activation.elsewhere(&widened(gate)?)? * widened(up)?)?.to_dtype(gate.dtype())?)
}

/// [`gated`] of the two halves of each row: gates, then the numbers that they multiply, as one matrix product gives both.
///
/// # Shapes
///
/// gate_up (..., 2 · n), with the gates first; the result is (..., n).
///
/// # Errors
///
/// No axis, or a last axis of odd length; a dtype that isn't a float; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{Activation, gated_halves};
/// use candle_core::{Device, Tensor};
///
/// let gate_up = Tensor::new(&[[2f32, -1.0, 5.0, 7.0]], &Device::Cpu)?;
/// assert_eq!(gated_halves(Activation::Relu, &gate_up)?.to_vec2::<f32>()?, [[10.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gated_halves(activation: Activation, gate_up: &Tensor) -> Result<Tensor> {
    check("gate_up", gate_up)?;
    let Some(width) = gate_up.dims().last().copied().filter(|width| width % 2 == 0) else {
        let expected = "(..., 2 * n), gates and the numbers that they multiply".to_string();
        return Err(AttentionError::Shape { tensor: "gate_up", expected, shape: gate_up.dims().to_vec() }.into());
    };
    if gate_up.device().is_cpu() {
        return Ok(op::apply(Halves(activation.kernel()), [gate_up])?);
    }
    let half = |first| gate_up.narrow(D::Minus1, first, width / 2);
    gated(activation, &half(0)?, &half(width / 2)?)
}

/// silu(gate) · up.
///
/// # Errors
///
/// As [`gated`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::swiglu;
/// use candle_core::{Device, Tensor};
///
/// let one = Tensor::new(&[1f64], &Device::Cpu)?;
/// assert!((swiglu(&one, &(&one * 2.0)?)?.to_vec1::<f64>()?[0] - 1.462117157).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(Activation::Silu, gate, up)
}

/// gelu(gate) · up.
///
/// # Errors
///
/// As [`gated`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::geglu;
/// use candle_core::{Device, Tensor};
///
/// let one = Tensor::new(&[1f64], &Device::Cpu)?;
/// assert!((geglu(&one, &(&one * 2.0)?)?.to_vec1::<f64>()?[0] - 1.682689492).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(Activation::Gelu, gate, up)
}

fn check(tensor: &'static str, x: &Tensor) -> Result<(), AttentionError> {
    check_dtype(tensor, x.dtype())?;
    memory::check_countable(tensor, x)
}

struct Plain(activation::Activation);

impl Function<1> for Plain {
    const NAME: &'static str = "activation";

    fn forward<E: Dtype>(&self, [x]: [&[E]; 1], _: [&[usize]; 1]) -> candle_core::Result<Vec<E>> {
        Ok(self.0.forward(x).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        [x]: [&[E]; 1],
        _: [&[usize]; 1],
        grad: &[E],
        _: [bool; 1],
    ) -> candle_core::Result<[Option<Gradient<E>>; 1]> {
        Ok([Some(Gradient::Numbers(self.0.backward(x, grad).map_err(AttentionError::from)?))])
    }
}

struct Gated(activation::Activation);

impl Function<2> for Gated {
    const NAME: &'static str = "gated-activation";

    fn forward<E: Dtype>(&self, [gate, up]: [&[E]; 2], _: [&[usize]; 2]) -> candle_core::Result<Vec<E>> {
        Ok(self.0.gated_forward(gate, up).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        [gate, up]: [&[E]; 2],
        _: [&[usize]; 2],
        grad: &[E],
        _: [bool; 2],
    ) -> candle_core::Result<[Option<Gradient<E>>; 2]> {
        let gradients = self.0.gated_backward(gate, up, grad).map_err(AttentionError::from)?;
        Ok(gradients.map(|numbers| Some(Gradient::Numbers(numbers))))
    }
}

struct Halves(activation::Activation);

/// The number of rows, and half of their length.
fn rows_of(dims: &[usize]) -> (usize, usize) {
    let (width, others) = dims.split_last().unwrap_or((&0, &[]));
    (others.iter().product(), width / 2)
}

impl Function<1> for Halves {
    const NAME: &'static str = "gated-halves";

    fn forward<E: Dtype>(&self, [x]: [&[E]; 1], [dims]: [&[usize]; 1]) -> candle_core::Result<Vec<E>> {
        let (rows, n) = rows_of(dims);
        Ok(self.0.gated_rows_forward(rows, n, x).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        [x]: [&[E]; 1],
        [dims]: [&[usize]; 1],
        grad: &[E],
        _: [bool; 1],
    ) -> candle_core::Result<[Option<Gradient<E>>; 1]> {
        let (rows, n) = rows_of(dims);
        let gradient = self.0.gated_rows_backward(rows, n, x, grad).map_err(AttentionError::from)?;
        Ok([Some(Gradient::Numbers(gradient))])
    }

    fn shape(&self, [dims]: [&[usize]; 1]) -> Shape {
        let mut dims = dims.to_vec();
        if let Some(width) = dims.last_mut() {
            *width /= 2;
        }
        Shape::from(dims)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// What other devices compute, on the CPU: numbers and gradients are those of the kernels, also where a cube or a square overflows.
    #[test]
    fn candles_operations_give_the_numbers_of_the_kernels() -> candle_core::Result<()> {
        let mut numbers: Vec<f64> = (-160..=160).map(|i| f64::from(i) / 16.0).collect();
        numbers.extend([-1.7e308, -1e120, -40.0, 40.0, 1e120, 1.7e308]);
        for activation in
            [Activation::Relu, Activation::SquaredRelu, Activation::Gelu, Activation::GeluTanh, Activation::Silu]
        {
            // Squares of the last numbers overflow, as they should.
            let count = if activation == Activation::SquaredRelu { 321 } else { numbers.len() };
            let x = Var::new(&numbers[..count], &Device::Cpu)?;
            let run =
                |y: Tensor| Ok::<_, candle_core::Error>((y.clone(), y.backward()?.remove(&x).expect("a gradient")));
            let (y, grad) = run(activation.elsewhere(&x)?)?;
            let (expected, expected_grad) = run(activation.forward(&x)?)?;
            for (got, expected) in [(y, expected), (grad, expected_grad)] {
                let scale = (expected.abs()? + 1.0)?;
                let error = ((got - expected)?.abs()? / scale)?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                assert!(error < 1e-14, "{activation:?}: {error:e}");
            }
        }
        Ok(())
    }

    /// The greatest number of each type is its own activation, and that of the lowest is 0.
    #[test]
    fn candles_operations_keep_the_greatest_numbers_finite() -> candle_core::Result<()> {
        for (dtype, greatest) in [
            (DType::F64, f64::MAX),
            (DType::F32, f32::MAX.into()),
            (DType::BF16, half::bf16::MAX.into()),
            (DType::F16, 65504.0),
        ] {
            let x = Tensor::new(&[greatest, -greatest], &Device::Cpu)?.to_dtype(dtype)?;
            for activation in [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
                let y = activation.elsewhere(&widened(&x)?)?.to_dtype(dtype)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                assert_eq!(y, [greatest, 0.0], "{activation:?}, {dtype:?}");
            }
        }
        Ok(())
    }
}
