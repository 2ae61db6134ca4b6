//! Cross-entropy of logits.

use std::any::Any;
use std::sync::OnceLock;

use attention_kernels::loss::{self as kernels, Denominator};
use candle_core::{Result as CandleResult, Shape, Tensor};

use super::labels::{self, Labels};
use super::{CrossEntropyOptions, reference};
use crate::block::op::{Dtype, Function, Gradient, apply};
use crate::check::{check_device, check_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;

/// The cross-entropy of logits and labels, as PyTorch's: for each row
/// (1 - ε) · -ln softmax(logits)\[label\] + ε / vocabulary · Σ -ln softmax(logits), then the mean or the sum over the rows that aren't
/// ignored.
///
/// It is computed in f32 (f64 for f64), summed in f64, and rounded once. On the CPU, two numbers for each row are kept
/// for the backward pass, and the gradient is the only other matrix.
///
/// # Shapes
///
/// logits (..., vocabulary), targets (...) in u8, u32 or i64; the result has no axes and the dtype of the logits.
///
/// # Errors
///
/// Logits without axes; targets of another shape, dtype or device; a label that is neither in the vocabulary nor ignored; a smoothing
/// outside [0, 1]; too little memory. If all rows are ignored, the loss is 0 and so is its gradient. Logits of minus
/// infinity are impossible labels; the loss of a row whose label is impossible is infinite.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{CrossEntropyOptions, cross_entropy};
/// use candle_core::{Device, Tensor};
///
/// let logits = Tensor::new(&[[0f32, 0.0], [9.0, 9.0]], &Device::Cpu)?; // two equal labels in each row
/// let targets = Tensor::new(&[1i64, -100], &Device::Cpu)?;
/// let options = CrossEntropyOptions { ignore_index: Some(-100), ..Default::default() };
/// let loss = cross_entropy(&logits, &targets, &options)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016), section 7, for label smoothing.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, options: &CrossEntropyOptions) -> Result<Tensor> {
    options.check()?;
    let Some((&vocabulary, rows)) = logits.dims().split_last() else {
        let expected = "at least 1 axis (..., vocabulary)";
        return Err(AttentionError::Rank { tensor: "logits", expected, shape: vec![] }.into());
    };
    check_dtype("logits", logits.dtype())?;
    check_device("targets", targets, logits)?;
    memory::check_countable("logits", logits)?;
    let labels = labels::read(targets, rows, vocabulary, options.ignore_index)?;
    if !logits.device().is_cpu() {
        return reference::cross_entropy(logits, &labels, options);
    }
    Ok(apply(CrossEntropy { labels, options: *options, denominators: OnceLock::new() }, [logits])?)
}

/// The operation on the CPU.
struct CrossEntropy {
    labels: Labels,
    options: CrossEntropyOptions,
    /// Those of the forward pass, a vector of the type that belongs to the dtype. An operation serves one call.
    denominators: OnceLock<Box<dyn Any + Send + Sync>>,
}

/// Rows and columns of logits.
fn matrix(dims: &[usize]) -> [usize; 2] {
    let vocabulary = dims.last().copied().unwrap_or_default();
    [dims[..dims.len().saturating_sub(1)].iter().product(), vocabulary]
}

impl Function<1> for CrossEntropy {
    const NAME: &'static str = "cross-entropy";

    fn forward<E: Dtype>(&self, [logits]: [&[E]; 1], [dims]: [&[usize]; 1]) -> CandleResult<Vec<E>> {
        let smoothing = self.options.label_smoothing;
        let loss = kernels::cross_entropy(logits, matrix(dims), &self.labels.labels, smoothing);
        let kernels::CrossEntropy { sum, counted, denominators } = loss.map_err(AttentionError::from)?;
        let _ = self.denominators.set(Box::new(denominators));
        Ok(vec![rounded(sum * self.options.scale(counted))])
    }

    fn backward<E: Dtype>(
        &self,
        [logits]: [&[E]; 1],
        [dims]: [&[usize]; 1],
        grad: &[E],
        _: [bool; 1],
    ) -> CandleResult<[Option<Gradient<E>>; 1]> {
        let saved = self.denominators.get().and_then(|saved| saved.downcast_ref::<Vec<Denominator<E::Float>>>());
        let Some(saved) = saved else { candle_core::bail!("cross-entropy: the forward pass has left no denominators") };
        let scale = incoming(grad) * self.options.scale(self.labels.counted);
        let (labels, smoothing) = (&self.labels.labels, self.options.label_smoothing);
        let gradient = kernels::cross_entropy_gradient(logits, matrix(dims), labels, smoothing, saved, scale);
        Ok([Some(Gradient::Numbers(gradient.map_err(AttentionError::from)?))])
    }

    fn shape(&self, _: [&[usize]; 1]) -> Shape {
        Shape::from(())
    }
}

/// A number in f64 as one of `E`.
pub(super) fn rounded<E: Dtype>(x: f64) -> E {
    use attention_kernels::SimdFloat;
    E::narrow(E::Float::from_f64(x))
}

/// The gradient of a loss, which is one number.
pub(super) fn incoming<E: Dtype>(grad: &[E]) -> f64 {
    use attention_kernels::SimdFloat;
    grad.first().map_or(0.0, |x| x.widen().to_f64())
}
