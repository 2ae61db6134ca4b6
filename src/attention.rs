//! [`scaled_dot_product_attention`]: checks its input, then computes.

use std::sync::Once;

use candle_core::{DType, Tensor};

use crate::axes::Axes;
use crate::error::{AttentionError, check_number};
use crate::fused;
use crate::mask::ScoreShape;
use crate::options::{AttentionOptions, AttentionOutput, Backend};
use crate::reference;

/// Attention: softmax(Q·Kᵀ · scale)·V for every head, with all that [`AttentionOptions`] can add.
///
/// Every result is differentiable with respect to query, key, value, bias, slopes and sinks. Inputs may have any strides.
/// Half types accumulate in f32. Same input, same seed, same numbers.
///
/// # Shapes
///
/// query (batch, num_heads, q_len, head_dim), key (batch, num_kv_heads, kv_len, head_dim), value (batch, num_kv_heads,
/// kv_len, value_dim), where num_heads is a multiple of num_kv_heads: query head `h` uses key head `h / (num_heads /
/// num_kv_heads)`. The context is (batch, num_heads, q_len, value_dim).
///
/// Tensors of three axes are (batch, len, dim), those of two (len, dim), with one head; results then lack the same axes.
///
/// # Errors
///
/// Ranks, shapes, dtypes or devices that don't fit together, head_dim 0, a scale, softcap or dropout_p out of its range,
/// a mask, bias, slopes or sinks of another size. No queries or an empty batch give an empty context; without keys the
/// context is zero.
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
) -> candle_core::Result<AttentionOutput> {
    let rank = check_ranks(query, key, value)?;
    let four_axes = |x: &Tensor| match rank {
        2 => x.unsqueeze(0)?.unsqueeze(0),
        3 => x.unsqueeze(1),
        _ => Ok(x.clone()),
    };
    let [query, key, value] = [query, key, value].map(four_axes);
    let output = attention(&query?, &key?, &value?, options, Axes::HeadsFirst)?;
    let axes_of_input = |x: Tensor| match rank {
        2 => x.squeeze(0)?.squeeze(0),
        3 => x.squeeze(1),
        _ => Ok(x),
    };
    Ok(AttentionOutput {
        context: axes_of_input(output.context)?,
        weights: output.weights.map(axes_of_input).transpose()?,
        logsumexp: output.logsumexp.map(axes_of_input).transpose()?,
    })
}

/// As [`scaled_dot_product_attention`], for tensors of four axes, in either order. The context has the order of the
/// inputs; weights and log-sum-exp have their heads first.
pub(crate) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: &AttentionOptions,
    axes: Axes,
) -> candle_core::Result<AttentionOutput> {
    let (q, k, v) = (axes.swap(query)?, axes.swap(key)?, axes.swap(value)?);
    check_tensors(&q, &k, &v)?;
    check_numbers(options, q.dtype())?;
    check_options(&q, &k, options)?;
    let fused = match (options.backend, fused::check(&q, &k, &v, options)) {
        (Backend::Reference, _) => None,
        (Backend::Auto, Err(reason)) => {
            if !q.device().is_cpu() {
                say_once_that_it_is_unfused(&reason);
            }
            None
        }
        (Backend::Fused, Err(error)) => return Err(error.into()),
        (Backend::Auto | Backend::Fused, Ok(())) => fused::attention(query, key, value, options, axes)?,
    };
    match fused {
        // Asking for the weights changes nothing else.
        Some(output) if options.return_weights => {
            Ok(AttentionOutput { weights: Some(reference::weights(&q, &k, options)?), ..output })
        }
        Some(output) => Ok(output),
        None if options.backend == Backend::Fused => {
            let (expected, got) = ("scores that don't overflow", "inputs so large that they do");
            Err(AttentionError::Backend { expected, got }.into())
        }
        None => {
            let output = reference::attention(&q, &k, &v, options).map_err(|error| explain_memory(error, &q, &k))?;
            Ok(AttentionOutput { context: axes.swap(&output.context)?, ..output })
        }
    }
}

fn say_once_that_it_is_unfused(reason: &AttentionError) {
    static SAID: Once = Once::new();
    SAID.call_once(|| log::warn!("attention holds all its scores in memory ({reason})"));
}

/// candle's error of a GPU that is full doesn't say of what.
fn explain_memory(error: candle_core::Error, q: &Tensor, k: &Tensor) -> candle_core::Error {
    if !error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY") {
        return error;
    }
    // Dimensions whose product has been checked.
    let scores = q.elem_count() / q.dims()[3] * k.dims()[2];
    let size = if q.dtype() == DType::F64 { 8 } else { 4 };
    AttentionError::Memory { what: "scores of all queries and keys on the GPU", bytes: scores * size }.into()
}

fn check_ranks(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<usize, AttentionError> {
    let rank = query.rank();
    if !(2..=4).contains(&rank) {
        return Err(AttentionError::Rank {
            tensor: "query",
            expected: "4 axes (batch, num_heads, q_len, head_dim), or 3 or 2 without num_heads and batch",
            shape: query.dims().to_vec(),
        });
    }
    for (tensor, x) in [("key", key), ("value", value)] {
        if x.rank() != rank {
            let expected = "as many axes as query";
            return Err(AttentionError::Rank { tensor, expected, shape: x.dims().to_vec() });
        }
    }
    Ok(rank)
}

fn check_tensors(query: &Tensor, key: &Tensor, value: &Tensor) -> candle_core::Result<()> {
    let (batch, num_heads, q_len, head_dim) = query.dims4()?;
    let (_, num_kv_heads, kv_len, _) = key.dims4()?;
    if !matches!(query.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        let expected = "F16, BF16, F32 or F64".into();
        return Err(AttentionError::DType { tensor: "query", expected, got: query.dtype() }.into());
    }
    for (tensor, x, dim, last) in [("key", key, head_dim, "head_dim"), ("value", value, value.dim(3)?, "value_dim")] {
        if x.dtype() != query.dtype() {
            let expected = format!("{:?}, that of query", query.dtype());
            return Err(AttentionError::DType { tensor, expected, got: x.dtype() }.into());
        }
        check_device(tensor, x, query)?;
        if x.dims() != [batch, num_kv_heads, kv_len, dim] {
            let expected = format!(
                "(batch, num_kv_heads, kv_len, {last}) = {:?}, given query {:?} and key {:?}",
                [batch, num_kv_heads, kv_len, dim],
                query.dims(),
                key.dims()
            );
            return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() }.into());
        }
    }
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return Err(AttentionError::Heads { num_heads, num_kv_heads }.into());
    }
    if head_dim == 0 {
        let expected = "(batch, num_heads, q_len, head_dim) with head_dim at least 1".into();
        return Err(AttentionError::Shape { tensor: "query", expected, shape: query.dims().to_vec() }.into());
    }
    // Views that broadcast can have shapes that nothing can be computed for.
    let value_dim = value.dim(3)?;
    for shape in [
        [batch, num_heads, q_len, kv_len],
        [batch, num_heads, q_len, head_dim.max(value_dim)],
        [batch, num_kv_heads, kv_len, head_dim.max(value_dim)],
    ] {
        let bytes = shape.iter().try_fold(size_of::<f64>(), |bytes, &size| bytes.checked_mul(size));
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            return Err(AttentionError::TooLarge { shape }.into());
        }
    }
    for (tensor, x) in [("query", query), ("key", key), ("value", value)] {
        if x.dims().iter().any(|&dim| i32::try_from(dim).is_err()) {
            let expected = format!("at most {} along every axis", i32::MAX);
            return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() }.into());
        }
    }
    Ok(())
}

fn check_numbers(options: &AttentionOptions, dtype: DType) -> Result<(), AttentionError> {
    // What is computed in f32 needs numbers that f32 holds.
    let held = |x: f64| x.is_finite() && (dtype == DType::F64 || (x as f32).is_finite());
    // The scores are divided by the softcap.
    let invertible = |x: f64| held(x) && held(1.0 / x) && (dtype == DType::F64 || x as f32 > 0.0);
    check_number("scale", options.scale, "a finite number", held)?;
    check_number("softcap", options.softcap, "a finite number above 0", |x| x > 0.0 && invertible(x))?;
    check_number("dropout_p", Some(options.dropout_p), "a probability in [0, 1)", |x| (0.0..1.0).contains(&x))
}

fn check_options(query: &Tensor, key: &Tensor, options: &AttentionOptions) -> candle_core::Result<()> {
    let (batch, num_heads, q_len, _) = query.dims4()?;
    let scores = [batch, num_heads, q_len, key.dim(2)?];
    options.attn_mask.check(ScoreShape { batch, num_heads, q_len, kv_len: key.dim(2)? })?;
    if let Some(bias) = &options.attn_bias {
        let broadcasts = bias.rank() <= 4
            && bias.dims().iter().rev().zip(scores.iter().rev()).all(|(&dim, &size)| dim == size || dim == 1);
        let expected = format!("one that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}");
        check_extra("attn_bias", bias, query, broadcasts, expected)?;
    }
    if let Some(slopes) = &options.alibi_slopes {
        let fits = slopes.dims() == [num_heads] || slopes.dims() == [batch, num_heads];
        let expected = format!("(num_heads) = [{num_heads}] or (batch, num_heads) = [{batch}, {num_heads}]");
        check_extra("alibi_slopes", slopes, query, fits, expected)?;
    }
    if let Some(sinks) = &options.sinks {
        let expected = format!("(num_heads) = [{num_heads}]");
        check_extra("sinks", sinks, query, sinks.dims() == [num_heads], expected)?;
    }
    Ok(())
}

/// A tensor besides query, key and value: of any float dtype, on the same device, of the shape that was asked for.
fn check_extra(
    tensor: &'static str,
    x: &Tensor,
    query: &Tensor,
    fits: bool,
    expected: String,
) -> Result<(), AttentionError> {
    if !x.dtype().is_float() {
        return Err(AttentionError::DType { tensor, expected: "F16, BF16, F32 or F64".into(), got: x.dtype() });
    }
    check_device(tensor, x, query)?;
    if !fits {
        return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() });
    }
    Ok(())
}

pub(crate) fn check_device(tensor: &'static str, x: &Tensor, query: &Tensor) -> Result<(), AttentionError> {
    let (expected, got) = (query.device().location(), x.device().location());
    if expected == got { Ok(()) } else { Err(AttentionError::Device { tensor, expected, got }) }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Error, Result, Tensor};

    use super::explain_memory;

    #[test]
    fn a_full_gpu_says_of_what() -> Result<()> {
        let q = Tensor::zeros((2, 3, 5, 4), DType::F32, &Device::Cpu)?;
        let k = Tensor::zeros((2, 1, 7, 4), DType::F32, &Device::Cpu)?;
        let full = Error::msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        let explained = explain_memory(full, &q, &k).to_string();
        assert!(explained.contains("scores") && explained.contains("840 bytes"), "{explained}");
        assert!(explain_memory(Error::msg("another"), &q, &k).to_string().contains("another"));
        Ok(())
    }
}
