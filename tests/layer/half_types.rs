//! Layers in f16 and bf16 equal the same layer in f64, with the same rounded parameters and input, to the precision of
//! the half type. Sums over many tokens lose nothing.

use candle_attention::{Backend, CrossAttention, ForwardOptions, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Tensor, Var};

use crate::common::{max_abs_difference, numbers, randn};
use crate::layers::{AttentionLayer, cross_attention, self_attention};

/// A half type and its unit roundoff: the largest relative error of one rounding.
const HALF_TYPES: [(DType, f64); 2] = [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)];

/// max |a - b|, relative to the largest entry of `b`.
fn relative_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let largest = numbers(b)?.into_iter().fold(0f64, |largest, x| largest.max(x.abs()));
    Ok(max_abs_difference(a, b)? / largest)
}

/// Gives `exact`, a layer in f64, the parameters of `layer`.
fn copy_parameters(layer: &dyn AttentionLayer, exact: &dyn AttentionLayer) -> Result<()> {
    let pairs = layer.vars().into_iter().zip(exact.vars());
    Ok(pairs.into_iter().try_for_each(|(from, to)| to.set(&from.to_dtype(DType::F64)?))?)
}

/// The gradients of the layer's parameters and then of `others`, for the loss Σ (output - target)² / 2.
fn gradients(layer: &dyn AttentionLayer, others: &[&Var], output: &Tensor, target: &Tensor) -> Result<Vec<Tensor>> {
    let loss = (output.sub(target)?.to_dtype(DType::F64)?.sqr()? / 2.0)?.sum_all()?;
    let vars = layer.vars();
    crate::common::gradients(&loss, &vars.iter().chain(others.iter().copied()).collect::<Vec<_>>()).map_err(Into::into)
}

/// Every parameter that is the same for all tokens: weights and biases of projections, weights of norms, sinks, learned
/// keys and values, and a bias of the scores. Its gradient is a sum over 16,384 tokens, each a sequence of its own.
#[test]
fn gradients_of_parameters_are_summed_without_loss_in_half_types() -> Result<()> {
    let plain = SelfAttentionConfig { qk_norm_eps: Some(1e-3), add_zero_attn: true, ..SelfAttentionConfig::new(8, 2) };
    let all = SelfAttentionConfig { num_kv_heads: Some(1), sinks: true, add_bias_kv: true, ..plain.clone() };
    for (config, (dtype, roundoff)) in
        [&plain, &all].into_iter().flat_map(|config| HALF_TYPES.map(|half| (config, half)))
    {
        let (layer, exact) = (self_attention(config, dtype)?, self_attention(config, DType::F64)?);
        copy_parameters(&layer, &exact)?;
        let x = randn(2, (16_384, 1, 8), dtype)?;
        let attn_bias = randn(3, (2, 1, 1), dtype)?;
        let gradients = |layer: &SelfAttention, dtype: DType, backend: Backend| -> Result<Vec<Tensor>> {
            let (x, attn_bias) = (x.to_dtype(dtype)?, Var::from_tensor(&attn_bias.to_dtype(dtype)?)?);
            let options =
                ForwardOptions { attn_bias: Some(attn_bias.as_tensor().clone()), backend, ..Default::default() };
            gradients(layer, &[&attn_bias], &layer.forward_with(&x, &options)?.output, &x)
        };
        let expected = gradients(&exact, DType::F64, Backend::Auto)?;
        for backend in [Backend::Reference, Backend::Fused] {
            let found = gradients(&layer, dtype, backend)?;
            let names = layer.parameters().into_iter().map(|(name, _)| name).chain(["attn_bias"]);
            for ((name, found), expected) in names.zip(&found).zip(&expected) {
                let difference = relative_difference(found, expected)? / roundoff;
                assert!(difference < 2.0, "{dtype:?}, {backend:?}, gradient of {name}: off by {difference} roundoffs");
            }
        }
    }
    Ok(())
}

/// A bias of one number for all keys, where extra keys have none: its gradient is a sum over 4,096 keys.
#[test]
fn gradient_of_a_bias_for_all_keys_is_summed_without_loss_in_half_types() -> Result<()> {
    let config = SelfAttentionConfig { add_zero_attn: true, ..SelfAttentionConfig::new(8, 2) };
    for (dtype, roundoff) in HALF_TYPES {
        let (layer, exact) = (cross_attention(&config, dtype)?, cross_attention(&config, DType::F64)?);
        copy_parameters(&layer, &exact)?;
        let x = randn(2, (1, 3, 8), dtype)?;
        let memory = randn(3, (1, 1, 8), dtype)?.broadcast_as((1, 4096, 8))?;
        for backend in [Backend::Reference, Backend::Fused] {
            let gradient = |layer: &CrossAttention, dtype: DType| -> Result<Tensor> {
                // With this bias the zero key gets about half of the attention.
                let bias = Var::from_tensor(&Tensor::new(&[-8f32], x.device())?.to_dtype(dtype)?)?;
                let options =
                    ForwardOptions { attn_bias: Some(bias.as_tensor().clone()), backend, ..Default::default() };
                let output = layer.forward_with(&x.to_dtype(dtype)?, &memory.to_dtype(dtype)?, &options)?.output;
                Ok(gradients(layer, &[&bias], &output, &x.to_dtype(dtype)?)?.remove(layer.vars().len()))
            };
            let (found, expected) = (gradient(&layer, dtype)?, gradient(&exact, DType::F64)?);
            let difference = relative_difference(&found, &expected)? / roundoff;
            assert!(difference < 2.0, "{dtype:?}, {backend:?}: off by {difference} roundoffs");
        }
    }
    Ok(())
}

/// With one token the products have a single row. Three roundings to the half type are left: those of the value, the
/// context and the output (backward: of their gradients).
#[test]
fn one_token_is_as_precise_as_its_half_type() -> Result<()> {
    for out_bias in [false, true] {
        let config = SelfAttentionConfig { qkv_bias: out_bias, out_bias, ..SelfAttentionConfig::new(256, 4) };
        for (dtype, roundoff) in HALF_TYPES {
            let (layer, exact) = (self_attention(&config, dtype)?, self_attention(&config, DType::F64)?);
            copy_parameters(&layer, &exact)?;
            let x = randn(2, (1, 1, 256), dtype)?;
            let run = |layer: &SelfAttention, dtype: DType| -> Result<[Tensor; 2]> {
                let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
                let output = layer.forward(&x)?;
                let gradient = gradients(layer, &[&x], &output, &x.zeros_like()?)?.remove(layer.vars().len());
                Ok([output, gradient])
            };
            for ((what, found), expected) in
                ["output", "gradient of the input"].iter().zip(run(&layer, dtype)?).zip(run(&exact, DType::F64)?)
            {
                let difference = relative_difference(&found, &expected)? / roundoff;
                assert!(difference < 2.0, "{dtype:?}, {what}: off by {difference} roundoffs");
            }
        }
    }
    Ok(())
}
