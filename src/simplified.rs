//! Attention without trainable weights, as the lecture notes introduce it. Every step is returned.
//!
//! Each token is its own query, key and value. What a token attends to then depends only on how similar the embeddings
//! are, and nothing can be learned. [`SelfAttention`](crate::SelfAttention) adds the trainable weights.

use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

use crate::check::{check_dtype, compute_dtype, widened};
use crate::empty::readable;
use crate::error::{AttentionError, Result};
use crate::memory;

/// How scores become weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Normalization {
    /// exp(sᵢ - max s) / Σ exp(sⱼ - max s): the usual softmax.
    #[default]
    Softmax,
    /// exp(sᵢ) / Σ exp(sⱼ): mathematically the same, but exp overflows for scores above 88 (709 in f64), and the result is
    /// NaN. For comparison only.
    NaiveSoftmax,
    /// sᵢ / Σ sⱼ: gives noticeable weight even to low scores, and is undefined if the scores sum to zero. For
    /// comparison only.
    SumNormalized,
}

/// What [`simplified_attention`] computes, step by step.
#[derive(Clone, Debug)]
pub struct SimplifiedAttention {
    /// The dot product of every token with every token, (..., len, len): row `i` holds the scores of query `i`.
    pub scores: Tensor,
    /// The scores, normalised so that each row sums to 1.
    pub weights: Tensor,
    /// For each token, the sum of all tokens weighted by its row of weights: (..., len, dim).
    pub context: Tensor,
}

/// Self-attention without trainable weights: scores = X·Xᵀ, weights = normalised scores, context = weights·X. Half types
/// are computed in f32, and each result is rounded once.
///
/// # Shapes
///
/// inputs (len, dim) or (batch, len, dim).
///
/// # Errors
///
/// Another rank, a dtype that isn't a float, or too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::simplified::{Normalization, simplified_attention};
/// use candle_core::{Device, Tensor};
///
/// let inputs = Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?;
/// let attention = simplified_attention(&inputs, Normalization::Softmax)?;
/// assert_eq!(attention.scores.to_vec2::<f32>()?, [[1., 0.], [0., 1.]]);
/// let weights = attention.weights.to_vec2::<f32>()?;
/// assert!((weights[0][0] - 0.7311).abs() < 1e-4); // e / (e + 1)
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn simplified_attention(inputs: &Tensor, normalization: Normalization) -> Result<SimplifiedAttention> {
    if !matches!(inputs.rank(), 2 | 3) {
        let expected = "2 axes (len, dim) or 3 (batch, len, dim)";
        return Err(AttentionError::Rank { tensor: "inputs", expected, shape: inputs.dims().to_vec() }.into());
    }
    check_dtype("inputs", inputs.dtype())?;
    memory::check_countable("inputs", inputs)?;
    let (dtype, compute) = (inputs.dtype(), compute_dtype(inputs.dtype()));
    // Inputs, scores (..., len, len) and context, in the dtype to compute in and in that of the inputs.
    let mut dims = inputs.dims().to_vec();
    dims[inputs.rank() - 1] = inputs.dim(D::Minus2)?;
    let both = [&dims[..], inputs.dims()].map(|dims| memory::bytes(dims, compute).saturating_mul(2));
    memory::ask("scores of all tokens", inputs.device(), memory::sum(both))?;
    let inputs = memory::contiguous("inputs", &widened(&readable(inputs)?)?)?;
    let scores = inputs.matmul(&inputs.t()?)?;
    let weights = normalize(&scores, normalization)?;
    let context = weights.matmul(&inputs)?;
    Ok(SimplifiedAttention {
        scores: scores.to_dtype(dtype)?,
        weights: weights.to_dtype(dtype)?,
        context: context.to_dtype(dtype)?,
    })
}

/// Makes each row (along the last axis) of `scores` sum to 1. Half types are computed in f32.
///
/// # Errors
///
/// A tensor without axes, one whose dtype isn't a float, or too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::simplified::{Normalization, normalize};
/// use candle_core::{Device, Tensor};
///
/// let scores = Tensor::new(&[1f32, 3., 4., 400.], &Device::Cpu)?;
/// assert_eq!(normalize(&scores, Normalization::Softmax)?.to_vec1::<f32>()?, [0., 0., 0., 1.]);
/// // exp(400) is infinite in f32.
/// assert!(normalize(&scores, Normalization::NaiveSoftmax)?.to_vec1::<f32>()?[3].is_nan());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn normalize(scores: &Tensor, normalization: Normalization) -> Result<Tensor> {
    check_dtype("scores", scores.dtype())?;
    memory::check_countable("scores", scores)?;
    // candle can't take the maximum of an empty tensor, and on CUDA not the sum either.
    if scores.elem_count() == 0 {
        return Ok(scores.clone());
    }
    // What is summed, its exponentials and their shares, each with the tensor that it is computed from.
    memory::ask_for("normalised scores", 5, scores, compute_dtype(scores.dtype()))?;
    let dtype = scores.dtype();
    let scores = widened(scores)?;
    let share_of_sum = |x: &Tensor| x.broadcast_div(&x.sum_keepdim(D::Minus1)?);
    let weights = match normalization {
        Normalization::Softmax => softmax(&scores, D::Minus1)?,
        Normalization::NaiveSoftmax => share_of_sum(&scores.exp()?)?,
        Normalization::SumNormalized => share_of_sum(&scores)?,
    };
    Ok(weights.to_dtype(dtype)?)
}
