//! Cross-entropy of a linear layer.

use std::any::Any;
use std::sync::{Mutex, PoisonError};

use attention_kernels::loss::{self as kernels, Head, HeadLoss, Wanted};
use candle_core::{Result as CandleResult, Shape, Tensor};
use candle_nn::Linear;

use super::labels::{self, Labels};
use super::logits::{incoming, rounded};
use super::{CrossEntropyOptions, cross_entropy};
use crate::block::op::{Dtype, Function, Gradient, apply};
use crate::check::{check_device, check_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::projection::project;

/// The cross-entropy of logits = hidden · weightᵀ + bias, as [`cross_entropy`] computes it, without ever holding all logits.
///
/// On the CPU the logits of some tokens at a time are computed, and with them their part of the gradients, if one of the inputs has a
/// gradient. (So a loss that is only measured is cheaper with detached inputs.) The gradients are kept in f32 (f64 for f64) until the
/// backward pass multiplies them by that of the loss and rounds them once. A second backward pass computes them again.
///
/// # Shapes
///
/// hidden (..., dim), weight (vocabulary, dim), bias (vocabulary), targets (...) in u8, u32 or i64; the result has no axes and the dtype
/// of the hidden states.
///
/// # Errors
///
/// A weight of another rank than 2; other shapes, dtypes or devices than those above; a label that is neither in the vocabulary nor
/// ignored; a smoothing outside [0, 1]; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{CrossEntropyOptions, cross_entropy, linear_cross_entropy};
/// use candle_core::{Device, Tensor};
///
/// let hidden = Tensor::new(&[[1f32, 0.0], [0.5, -1.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[2f32, 1.0], [0.0, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
/// let targets = Tensor::new(&[0u32, 2], &Device::Cpu)?;
/// let options = CrossEntropyOptions::default();
/// let fused = linear_cross_entropy(&hidden, &weight, None, &targets, &options)?.to_scalar::<f32>()?;
/// let logits = hidden.matmul(&weight.t()?)?;
/// assert!((fused - cross_entropy(&logits, &targets, &options)?.to_scalar::<f32>()?).abs() < 1e-6);
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024), section 3.2.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    options: &CrossEntropyOptions,
) -> Result<Tensor> {
    options.check()?;
    let (rows, vocabulary) = check(hidden, weight, bias)?;
    check_device("targets", targets, hidden)?;
    let labels = labels::read(targets, rows, vocabulary, options.ignore_index)?;
    if !hidden.device().is_cpu() {
        let logits =
            project(Linear::new(weight.clone(), bias.cloned()).into(), hidden, &[rows, &[vocabulary]].concat())?;
        return cross_entropy(&logits, targets, options);
    }
    let wanted =
        Wanted { hidden: hidden.track_op(), weight: weight.track_op(), bias: bias.is_some_and(Tensor::track_op) };
    let head = LinearCrossEntropy { labels, options: *options, wanted, gradients: Mutex::new(None) };
    Ok(match bias {
        Some(bias) => apply(head, [hidden, weight, bias])?,
        None => apply(head, [hidden, weight])?,
    })
}

/// Checks hidden states, weight and bias. Returns the dims of the rows and the size of the vocabulary.
fn check<'a>(
    hidden: &'a Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<(&'a [usize], usize), AttentionError> {
    let &[vocabulary, dim] = weight.dims() else {
        let (expected, shape) = ("2 axes (vocabulary, dim)", weight.dims().to_vec());
        return Err(AttentionError::Rank { tensor: "weight", expected, shape });
    };
    check_dtype("hidden", hidden.dtype())?;
    memory::check_countable("hidden", hidden)?;
    let Some((&last, rows)) = hidden.dims().split_last() else {
        let expected = "at least 1 axis (..., dim)";
        return Err(AttentionError::Rank { tensor: "hidden", expected, shape: vec![] });
    };
    if last != dim {
        let expected = format!("(..., dim) with dim = {dim}, that of the weight");
        return Err(AttentionError::Shape { tensor: "hidden", expected, shape: hidden.dims().to_vec() });
    }
    for (tensor, parameter) in [("weight", Some(weight)), ("bias", bias)] {
        let Some(parameter) = parameter else { continue };
        check_device(tensor, parameter, hidden)?;
        if parameter.dtype() != hidden.dtype() {
            let expected = format!("{:?}, that of the hidden states", hidden.dtype());
            return Err(AttentionError::DType { tensor, expected, got: parameter.dtype() });
        }
    }
    match bias {
        Some(bias) if bias.dims() != [vocabulary] => {
            let expected = format!("(vocabulary) = [{vocabulary}], as the weight has it");
            Err(AttentionError::Shape { tensor: "bias", expected, shape: bias.dims().to_vec() })
        }
        _ => Ok((rows, vocabulary)),
    }
}

/// The operation on the CPU.
struct LinearCrossEntropy {
    labels: Labels,
    options: CrossEntropyOptions,
    wanted: Wanted,
    /// The gradients of the loss, a [`HeadLoss`] of the type that belongs to the dtype, from the forward pass until the backward
    /// pass takes them.
    gradients: Mutex<Option<Box<dyn Any + Send>>>,
}

impl LinearCrossEntropy {
    fn compute<E: Dtype>(&self, head: &Head<E>) -> CandleResult<HeadLoss<E::Float>> {
        let (labels, smoothing) = (&self.labels.labels, self.options.label_smoothing);
        let scale = self.options.scale(self.labels.counted);
        let loss = kernels::linear_cross_entropy(head, labels, smoothing, scale, self.wanted);
        Ok(loss.map_err(AttentionError::from)?)
    }

    fn forward<E: Dtype>(&self, head: &Head<E>) -> CandleResult<Vec<E>> {
        let loss = self.compute(head)?;
        let sum = loss.sum;
        if self.wanted != Wanted::default() {
            *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(loss));
        }
        Ok(vec![rounded(sum * self.options.scale(self.labels.counted))])
    }

    fn backward<E: Dtype>(&self, head: &Head<E>, grad: &[E]) -> CandleResult<[Option<Gradient<E>>; 3]> {
        let saved = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let loss = match saved.and_then(|saved| saved.downcast::<HeadLoss<E::Float>>().ok()) {
            Some(loss) => *loss,
            None => self.compute(head)?,
        };
        let gradients = loss.gradients::<E>(incoming(grad)).map_err(AttentionError::from)?;
        Ok(gradients.map(|gradient| gradient.map(Gradient::Numbers)))
    }
}

fn head<'a, E>(hidden: &'a [E], weight: &'a [E], bias: Option<&'a [E]>, dims: [&[usize]; 2]) -> Head<'a, E> {
    let tokens = dims[0][..dims[0].len() - 1].iter().product();
    Head { hidden, weight, bias, dims: [tokens, dims[1][0], dims[1][1]] }
}

impl Function<2> for LinearCrossEntropy {
    const NAME: &'static str = "linear-cross-entropy";

    fn forward<E: Dtype>(&self, [hidden, weight]: [&[E]; 2], dims: [&[usize]; 2]) -> CandleResult<Vec<E>> {
        self.forward(&head(hidden, weight, None, dims))
    }

    fn backward<E: Dtype>(
        &self,
        [hidden, weight]: [&[E]; 2],
        dims: [&[usize]; 2],
        grad: &[E],
        _: [bool; 2],
    ) -> CandleResult<[Option<Gradient<E>>; 2]> {
        let [hidden, weight, _] = self.backward(&head(hidden, weight, None, dims), grad)?;
        Ok([hidden, weight])
    }

    fn shape(&self, _: [&[usize]; 2]) -> Shape {
        Shape::from(())
    }
}

impl Function<3> for LinearCrossEntropy {
    const NAME: &'static str = "linear-cross-entropy";

    fn forward<E: Dtype>(&self, [hidden, weight, bias]: [&[E]; 3], dims: [&[usize]; 3]) -> CandleResult<Vec<E>> {
        self.forward(&head(hidden, weight, Some(bias), [dims[0], dims[1]]))
    }

    fn backward<E: Dtype>(
        &self,
        [hidden, weight, bias]: [&[E]; 3],
        dims: [&[usize]; 3],
        grad: &[E],
        _: [bool; 3],
    ) -> CandleResult<[Option<Gradient<E>>; 3]> {
        self.backward(&head(hidden, weight, Some(bias), [dims[0], dims[1]]), grad)
    }

    fn shape(&self, _: [&[usize]; 3]) -> Shape {
        Shape::from(())
    }
}
