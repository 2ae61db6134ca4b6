//! [`scaled_dot_product_attention`]: the function inside the layers.

pub(crate) mod broadcast;
pub(crate) mod checks;
pub(crate) mod cuda;
mod fused;
pub(crate) mod head_layout;
pub(crate) mod options;
pub(crate) mod overflow;
pub(crate) mod parallel;
pub(crate) mod reference;
mod score_memory;
mod visible;

use std::sync::Once;

use attention_kernels::HeadNumbers;
use attention_kernels::mask::ScoreShape;
use candle_core::{DType, Tensor};

use crate::error::{AttentionError, Error, Result};
use broadcast::{InputAxes, align_bias, align_mask, common_batch};
use checks::Checked;
use head_layout::HeadLayout;
pub use options::{AttentionOptions, AttentionOutput, Backend, ScoreStage};

/// Attention: softmax(Q·Kᵀ · scale)·V for every head, with the additions of [`AttentionOptions`].
///
/// Every result is differentiable with respect to query, key, value, bias, slopes and sinks. Inputs may have any
/// strides. Half types accumulate in f32. The same input and the same seed give the same numbers.
///
/// # Shapes
///
/// query (batch, num_heads, q_len, head_dim), key (batch, num_kv_heads, kv_len, head_dim), value (batch, num_kv_heads,
/// kv_len, value_dim), where num_heads is a multiple of num_kv_heads: query head `h` uses key head `h / (num_heads /
/// num_kv_heads)`. The context is (batch, num_heads, q_len, value_dim).
///
/// Tensors with three axes are (batch, len, dim) and those with two axes (len, dim), with one head. The results then
/// lack the same axes.
///
/// A batch of 1 broadcasts: one query can meet the keys and values of many sequences, and many sequences one key and
/// value. Masks and biases broadcast to the scores as [`Mask::from_tensor`](crate::Mask::from_tensor) says.
///
/// # Errors
///
/// Ranks, shapes, dtypes or devices that don't fit together; head_dim 0; a scale, softcap or dropout_p outside its
/// range; a mask, bias, slopes or sinks of another size; too little memory. Empty inputs are no error: without queries or sequences the
/// context is empty, and without keys it is zero.
///
/// # Examples
///
/// ```
/// use candle_attention::{AttentionOptions, Mask, scaled_dot_product_attention};
/// use candle_core::{Device, Tensor};
///
/// // Two keys; the query points along the first.
/// let query = Tensor::new(&[[2f32, 0.]], &Device::Cpu)?;
/// let key = Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?;
/// let value = Tensor::new(&[[10f32], [20.]], &Device::Cpu)?;
/// let options = AttentionOptions { scale: Some(1.0), return_weights: true, ..Default::default() };
/// let output = scaled_dot_product_attention(&query, &key, &value, &options)?;
///
/// // softmax([2, 0]) = [0.8808, 0.1192]
/// let weights = output.weights.unwrap().to_vec2::<f32>()?;
/// assert!((weights[0][0] - 0.8808).abs() < 1e-4);
/// let context = output.context.to_vec2::<f32>()?;
/// assert!((context[0][0] - 11.192).abs() < 1e-3);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.
pub fn scaled_dot_product_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &AttentionOptions,
) -> Result<AttentionOutput> {
    let parallel = options.parallel.as_ref();
    // Every other rank has to know if this one can't begin.
    let aligned = match (aligned(query, key, value, options), parallel) {
        (Err(error), Some(_)) => parallel::agree_on([query, key, value], HeadLayout::Bhld, options, Err(error))?,
        (aligned, _) => aligned?,
    };
    let Aligned { inputs: [query, key, value], axes, options } = aligned;
    let output = attention([&query, &key, &value], HeadLayout::Bhld, axes, &options, None)?;
    let axes_of_input = |x: Tensor| match axes {
        InputAxes::Single => x.squeeze(0)?.squeeze(0),
        InputAxes::Batch => x.squeeze(1),
        _ => Ok(x),
    };
    Ok(AttentionOutput {
        context: axes_of_input(output.context)?,
        weights: output.weights.map(axes_of_input).transpose()?,
        scores: output.scores.map(axes_of_input).transpose()?,
        logsumexp: output.logsumexp.map(axes_of_input).transpose()?,
    })
}

/// Inputs of four axes, and options that are aligned with their scores.
struct Aligned {
    inputs: [Tensor; 3],
    axes: InputAxes,
    options: AttentionOptions,
}

fn aligned(query: &Tensor, key: &Tensor, value: &Tensor, options: &AttentionOptions) -> Result<Aligned> {
    let rank = checks::check_ranks(query, key, value)?;
    let four_axes = |x: &Tensor| match rank {
        2 => x.unsqueeze(0)?.unsqueeze(0),
        3 => x.unsqueeze(1),
        _ => Ok(x.clone()),
    };
    let (query, key, value) = (four_axes(query)?, four_axes(key)?, four_axes(value)?);
    let axes = [InputAxes::Single, InputAxes::Batch, InputAxes::Heads][rank - 2];
    let (_, num_heads, q_len, _) = query.dims4()?;
    let batch = common_batch([query.dim(0)?, key.dim(0)?, value.dim(0)?]);
    let whole = |own: usize| options.parallel.as_ref().map_or(own, |parallel| parallel.split.len());
    let scores = ScoreShape { batch, num_heads, q_len: whole(q_len), kv_len: whole(key.dim(2)?) };
    let options = AttentionOptions {
        attn_mask: align_mask(&options.attn_mask, &scores, axes)?,
        attn_bias: options.attn_bias.as_ref().map(|bias| align_bias(bias, &scores, axes)).transpose()?,
        ..options.clone()
    };
    Ok(Aligned { inputs: [query, key, value], axes, options })
}

/// [`scaled_dot_product_attention`] for query, key and value of four axes in either layout, and a mask and bias that are
/// aligned with the scores. The context has the layout of the inputs. Weights and scores are (batch, num_heads, q_len, kv_len)
/// and log-sum-exp (batch, num_heads, q_len) in both. Errors name the axes of the caller's inputs. `heads` are the numbers of the heads that
/// dropout counts.
pub(crate) fn attention(
    inputs: [&Tensor; 3],
    layout: HeadLayout,
    axes: InputAxes,
    options: &AttentionOptions,
    heads: Option<HeadNumbers>,
) -> Result<AttentionOutput> {
    let checked = Checked::new(inputs, layout, axes, options).map(|checked| Checked { heads, ..checked });
    let checked = match options.parallel {
        Some(_) => parallel::agree_on(inputs, layout, options, checked.and_then(parallel::served))?,
        None => checked?,
    };
    let output = context_and_weights(&checked)?;
    // The scores are computed separately, so that a request for them changes no other number.
    let scores = options.return_scores.map(|stage| {
        score_memory::ask(&checked)?;
        reference::scores(&checked.q, &checked.k, options, stage)
    });
    let scores = scores.transpose().map_err(|error| explain_memory(error, &checked))?;
    Ok(AttentionOutput { scores, ..output })
}

fn context_and_weights(checked: &Checked) -> Result<AttentionOutput> {
    let options = checked.options;
    let fused = match options.backend {
        _ if options.parallel.is_some() => return Ok(fused::attention(checked)??),
        Backend::Reference => None,
        Backend::Auto | Backend::Fused if cuda::is_asked(checked) => Some(cuda::attention(checked)?),
        Backend::Auto | Backend::Fused => Some(fused::attention(checked)?),
    };
    match fused {
        // The weights are computed separately, so that a request for them changes no other number.
        Some(Ok(output)) if options.return_weights => {
            score_memory::ask(checked)?;
            let weights = reference::weights(&checked.q, &checked.k, options)?;
            Ok(AttentionOutput { weights: Some(weights), ..output })
        }
        Some(Ok(output)) => Ok(output),
        Some(Err(reason)) if options.backend == Backend::Fused => Err(reason.into()),
        Some(Err(reason)) => {
            warn_once_about_memory(checked, &reason);
            reference_attention(checked)
        }
        None => reference_attention(checked),
    }
}

fn reference_attention(checked: &Checked) -> Result<AttentionOutput> {
    score_memory::ask(checked)?;
    let output = reference::attention(&checked.q, &checked.k, &checked.v, checked.options, checked.heads);
    let output = output.map_err(|error| explain_memory(error, checked))?;
    Ok(AttentionOutput { context: checked.layout.transpose(&output.context)?, ..output })
}

/// Warns that a call on a GPU holds all scores in memory, since the kernels don't serve it. It warns once, not for every call of a layer.
fn warn_once_about_memory(checked: &Checked, reason: &AttentionError) {
    static WARNED: Once = Once::new();
    if !checked.q.device().is_cpu() {
        WARNED.call_once(|| log::warn!("attention holds all scores in memory ({reason})"));
    }
}

/// Replaces candle's error for a full GPU, which doesn't say which tensor was too large.
fn explain_memory(error: candle_core::Error, checked: &Checked) -> Error {
    if !error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY") {
        return error.into();
    }
    let scores = checked.scores;
    // The checks have shown that the product doesn't overflow.
    let count = scores.batch * scores.num_heads * scores.q_len * scores.kv_len;
    let size = if checked.q.dtype() == DType::F64 { 8 } else { 4 };
    AttentionError::Memory { what: "scores of all queries and keys on the GPU", bytes: count * size }.into()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_full_gpu_says_of_what() -> Result<()> {
        let q = Tensor::zeros((2, 3, 5, 4), DType::F32, &Device::Cpu)?;
        let k = Tensor::zeros((2, 1, 7, 4), DType::F32, &Device::Cpu)?;
        let options = AttentionOptions::default();
        let checked = Checked::new([&q, &k, &k], HeadLayout::Bhld, InputAxes::Heads, &options)?;
        let full = candle_core::Error::msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let explained = explain_memory(full, &checked);
        assert!(matches!(explained, Error::Attention(AttentionError::Memory { bytes: 840, .. })), "{explained}");
        assert!(explain_memory(candle_core::Error::msg("another"), &checked).to_string().contains("another"));
        Ok(())
    }
}
