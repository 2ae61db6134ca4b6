//! Every parameter of every kind of layer gets a gradient and moves when an optimiser steps; and with everything on, the
//! gradients are those of finite differences.

mod common;
#[path = "common/layers.rs"]
mod layers;

use candle_attention::{CrossAttention, MultiHead, Pairing, RotaryConfig, SelfAttention, SelfAttentionConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{AdamW, ModuleT, Optimizer, ParamsAdamW};
use common::{assert_finite, check_gradients, max_abs_difference, numbers, randn, var};
use layers::{cross_attention, everything, self_attention};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn multi_head() -> SelfAttentionConfig {
    SelfAttentionConfig::new(8, 4)
}

fn rotary(pairing: Pairing, dim: Option<usize>) -> Option<RotaryConfig> {
    Some(RotaryConfig { base: 100.0, dim, pairing })
}

/// What the two kinds of layer have in common: a name, a config, and how many parameters it stands for.
fn shared_grid() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let config = multi_head();
    let with = |change: fn(&mut SelfAttentionConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    vec![
        ("single head", SelfAttentionConfig::single_head(5, 3, 4), 3),
        ("multi-head", config.clone(), 8),
        ("no biases", with(|c| (c.qkv_bias, c.out_bias) = (false, false)), 4),
        ("bias of W_O alone", with(|c| c.qkv_bias = false), 5),
        ("no bias of W_O", with(|c| c.out_bias = false), 7),
        ("no W_O", with(|c| c.out_proj = false), 6),
        ("one key head", with(|c| c.num_kv_heads = Some(1)), 8),
        ("two key heads", with(|c| c.num_kv_heads = Some(2)), 8),
        ("sizes of its own", with(|c| (c.head_dim, c.value_dim) = (Some(6), Some(3))), 8),
        ("scale", with(|c| c.scale = Some(-0.4)), 8),
        ("softcap", with(|c| c.softcap = Some(1.5)), 8),
        ("causal", with(|c| c.is_causal = true), 8),
        ("window", with(|c| c.sliding_window = Some(2)), 8),
        ("causal window", with(|c| (c.is_causal, c.sliding_window) = (true, Some(3))), 8),
        ("QK-norm", with(|c| (c.head_dim, c.qk_norm_eps) = (Some(4), Some(1e-3))), 10),
        ("ALiBi", with(|c| c.alibi = true), 8),
        ("sinks", with(|c| c.sinks = true), 9),
        ("dropout", with(|c| c.dropout_p = 0.2), 8),
        ("no bias of W_K", with(|c| c.k_bias = false), 7),
        ("a learned key", with(|c| c.add_bias_kv = true), 10),
        ("a key of zeros", with(|c| c.add_zero_attn = true), 8),
        ("a learned key and one of zeros", with(extra_keys), 10),
    ]
}

/// Besides what the query heads share, and with dropout over all keys.
fn extra_keys(config: &mut SelfAttentionConfig) {
    (config.add_bias_kv, config.add_zero_attn) = (true, true);
    (config.num_kv_heads, config.value_dim, config.is_causal, config.dropout_p) = (Some(2), Some(3), true, 0.2);
}

fn self_attention_grid() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let with_rotary = |rotary| SelfAttentionConfig { head_dim: Some(4), rotary, ..multi_head() };
    let mut grid = shared_grid();
    grid.extend([
        ("rotary, halves", with_rotary(rotary(Pairing::HalfSplit, None)), 8),
        ("rotary, interleaved", with_rotary(rotary(Pairing::Interleaved, None)), 8),
        ("rotary, halves, partial", with_rotary(rotary(Pairing::HalfSplit, Some(2))), 8),
        ("rotary, interleaved, partial", with_rotary(rotary(Pairing::Interleaved, Some(2))), 8),
        ("everything", everything(), 11),
    ]);
    grid
}

fn cross_attention_grid() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let mut grid = shared_grid();
    let memory_of_its_own = SelfAttentionConfig { kv_dim: Some(6), ..multi_head() };
    let all_at_once = SelfAttentionConfig { kv_dim: Some(6), rotary: None, ..everything() };
    grid.extend([("kv_dim", memory_of_its_own, 8), ("everything", all_at_once, 11)]);
    grid
}

/// Whether the bias of the keys can't matter: the same for every key, it adds the same to all scores of a query, and
/// the softmax doesn't see that. A rotary embedding turns it by the key's position; a norm or a softcap bends it; a sink
/// or an extra key doesn't share it.
fn key_bias_is_idle(config: &SelfAttentionConfig) -> bool {
    config.qkv_bias
        && config.k_bias
        && config.rotary.is_none()
        && config.qk_norm_eps.is_none()
        && config.softcap.is_none()
        && !config.sinks
        && config.extra_keys() == 0
}

/// How far rounding alone may take a gradient that is zero, compared with the others.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-14,
        DType::F32 => 1e-5,
        DType::F16 => 1e-2,
        _ => 1e-1,
    }
}

fn largest(x: &Tensor) -> Result<f64> {
    Ok(numbers(x)?.iter().fold(0f64, |largest, x| largest.max(x.abs())))
}

/// That each variable has a finite gradient of its own shape and dtype, which isn't all zero, but for an idle key bias.
fn check_gradients_are_there(what: &str, layer: &MultiHead, inputs: &[&Var], grads: &GradStore) -> Result<()> {
    let gradient = |var: &Var, name: &str| -> Result<Tensor> {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{what}: {name} has no gradient")).clone();
        assert_eq!((grad.dims(), grad.dtype()), (var.dims(), var.dtype()), "{what}: {name}");
        assert_finite(&grad, &format!("{what}: gradient of {name}"));
        Ok(grad)
    };
    for (i, input) in inputs.iter().enumerate() {
        assert!(largest(&gradient(input, &format!("input {i}"))?)? > 0.0, "{what}: gradient of input {i} is zero");
    }
    let mut others = 0f64;
    let mut key_bias = None;
    for ((name, _), var) in layer.parameters().into_iter().zip(layer.vars()) {
        let size = largest(&gradient(&var, name)?)?;
        if name == "k_proj.bias" && key_bias_is_idle(layer.config()) {
            key_bias = Some(size);
            continue;
        }
        assert!(size > 0.0, "{what}: gradient of {name} is zero");
        others = others.max(size);
    }
    if let Some(size) = key_bias {
        let bound = rounding(inputs[0].dtype()) * others;
        assert!(size <= bound, "{what}: gradient of k_proj.bias is {size:e}, not zero, beside others of {others:e}");
    }
    Ok(())
}

/// That a step takes every parameter to another finite place, but for an idle key bias, whose place doesn't matter.
fn check_step_moves(what: &str, layer: &MultiHead, grads: &GradStore) -> Result<()> {
    let before: Vec<Tensor> = layer.parameters().iter().map(|(_, tensor)| tensor.copy()).collect::<Result<_>>()?;
    // Steps that half types can tell from their rounding, an epsilon that they can hold, and no weight decay, which
    // moves what has no gradient.
    let params = ParamsAdamW { lr: 0.1, eps: 1e-3, weight_decay: 0.0, ..Default::default() };
    AdamW::new(layer.vars(), params)?.step(grads)?;
    for ((name, after), before) in layer.parameters().into_iter().zip(&before) {
        assert_finite(after, &format!("{what}: {name} after a step"));
        if name != "k_proj.bias" || !key_bias_is_idle(layer.config()) {
            assert!(max_abs_difference(after, before)? > 0.0, "{what}: {name} didn't move");
        }
    }
    Ok(())
}

fn check_layer(what: &str, layer: &MultiHead, parameters: usize, output: &Tensor, inputs: &[&Var]) -> Result<()> {
    assert_eq!(layer.parameters().len(), parameters, "{what}: parameters");
    assert_eq!(layer.vars().len(), parameters, "{what}: variables");
    for ((name, tensor), var) in layer.parameters().into_iter().zip(layer.vars()) {
        assert_eq!(tensor.id(), var.as_tensor().id(), "{what}: {name} and its variable");
    }
    let loss = (output * randn(9, output.shape(), output.dtype())?)?.sum_all()?;
    let grads = loss.backward()?;
    check_gradients_are_there(what, layer, inputs, &grads)?;
    check_step_moves(what, layer, &grads)
}

#[test]
fn every_parameter_of_self_attention_learns() -> Result<()> {
    for dtype in DTYPES {
        for (name, config, parameters) in self_attention_grid() {
            let layer: SelfAttention = self_attention(&config, dtype)?;
            let x = var(2, (2, 6, config.embed_dim), dtype)?;
            let output = ModuleT::forward_t(&layer, &x, true)?;
            check_layer(&format!("{name}, {dtype:?}"), &layer, parameters, &output, &[&x])?;
        }
    }
    Ok(())
}

#[test]
fn every_parameter_of_cross_attention_learns() -> Result<()> {
    for dtype in DTYPES {
        for (name, config, parameters) in cross_attention_grid() {
            let layer: CrossAttention = cross_attention(&config, dtype)?;
            let x = var(2, (2, 6, config.embed_dim), dtype)?;
            let memory = var(3, (2, 7, config.kv_dim()), dtype)?;
            let output = layer.forward_t(&x, &memory, true)?;
            check_layer(&format!("{name}, {dtype:?}"), &layer, parameters, &output, &[&x, &memory])?;
        }
    }
    Ok(())
}

/// Inputs without a batch, transposed and broadcast ones get their gradients too.
#[test]
fn gradient_flows_back_through_views_of_the_input() -> Result<()> {
    let layer = self_attention(&everything(), DType::F64)?;
    let config = layer.config();
    let transposed = var(2, (2, config.embed_dim, 5), DType::F64)?;
    check_gradients(
        &[("transposed input", &transposed)],
        || layer.forward(&transposed.transpose(1, 2)?)?.sin(),
        1e-8,
        "self-attention",
    );
    let shared = var(3, (1, 5, config.embed_dim), DType::F64)?;
    check_gradients(
        &[("broadcast input", &shared)],
        || layer.forward(&shared.broadcast_as((3, 5, config.embed_dim))?)?.sin(),
        1e-8,
        "self-attention",
    );
    let tokens = var(4, (5, config.embed_dim), DType::F64)?;
    check_gradients(&[("tokens", &tokens)], || layer.forward(&tokens)?.sin(), 1e-8, "self-attention");
    Ok(())
}

/// Finite differences of every parameter and input of a layer, each pass with the same dropout.
fn check_by_differences(what: &str, layer: &MultiHead, inputs: &[(&str, &Var)], forward: impl Fn() -> Result<Tensor>) {
    let vars = layer.vars();
    let names = layer.parameters();
    let mut all: Vec<(&str, &Var)> = names.iter().map(|(name, _)| *name).zip(&vars).collect();
    all.extend(inputs);
    let loss = || {
        layer.set_dropout_calls(5);
        let output = forward()?;
        &output * randn(9, output.shape(), DType::F64)?
    };
    check_gradients(&all, loss, 1e-8, what);
}

#[test]
fn gradients_with_everything_on_are_those_of_finite_differences() -> Result<()> {
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        let config = SelfAttentionConfig { rotary: rotary(pairing, Some(4)), ..everything() };
        let layer = self_attention(&config, DType::F64)?;
        let x = var(2, (2, 6, config.embed_dim), DType::F64)?;
        let forward = || layer.forward_t(&x, true);
        check_by_differences(&format!("{pairing:?}"), &layer, &[("x", &x)], forward);
    }
    Ok(())
}

#[test]
fn gradients_of_cross_attention_are_those_of_finite_differences() -> Result<()> {
    for (name, config, _) in cross_attention_grid() {
        let layer = cross_attention(&config, DType::F64)?;
        let x = var(2, (2, 3, config.embed_dim), DType::F64)?;
        let memory = var(3, (2, 4, config.kv_dim()), DType::F64)?;
        let forward = || layer.forward_t(&x, &memory, true);
        check_by_differences(name, &layer, &[("x", &x), ("memory", &memory)], forward);
    }
    Ok(())
}

/// A few dozen steps towards outputs that another layer made.
#[test]
fn layer_learns_what_another_layer_does() -> Result<()> {
    let config = SelfAttentionConfig {
        is_causal: true,
        rotary: rotary(Pairing::HalfSplit, None),
        ..SelfAttentionConfig::new(8, 2)
    };
    let (teacher, learner) = (self_attention(&config, DType::F32)?, self_attention(&config, DType::F32)?);
    layers::randomise(&teacher, 77)?;
    let x = randn(2, (8, 6, 8), DType::F32)?;
    let target = teacher.forward(&x)?;
    let loss = || learner.forward_t(&x, true)?.sub(&target)?.sqr()?.mean_all();
    let start = loss()?.to_scalar::<f32>()?;
    let params = ParamsAdamW { lr: 0.02, ..Default::default() };
    let mut optimizer = AdamW::new(learner.vars(), params)?;
    for _ in 0..150 {
        optimizer.backward_step(&loss()?)?;
    }
    let end = loss()?.to_scalar::<f32>()?;
    assert!(end < start / 20.0, "loss from {start} to {end}");
    Ok(())
}
