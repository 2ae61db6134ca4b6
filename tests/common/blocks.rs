//! What the tests of whole blocks share: blocks whose parameters are all random, and configs of every kind.

// Each test binary compiles its own copy of this module and uses only a part of it.
#![allow(dead_code)]

use candle_attention::block::{
    Activation, MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig,
};
use candle_attention::{Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::randn;

pub const PLACEMENTS: [NormPlacement; 3] = [NormPlacement::Pre, NormPlacement::Post, NormPlacement::Sandwich];

/// A block on a `VarMap` of its own, with [random parameters](randomise).
pub fn block(config: &TransformerBlockConfig, dtype: DType) -> Result<TransformerBlock> {
    let block = TransformerBlock::new(config, VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu))?;
    randomise(&block, 1)?;
    Ok(block)
}

/// Sets every parameter to random numbers, so that a formula that leaves one out gives other results.
pub fn randomise(block: &TransformerBlock, seed: u64) -> Result<()> {
    for ((name, _), (var, seed)) in block.parameters().iter().zip(block.vars().iter().zip(seed * 1000..)) {
        let is_norm = name.ends_with("norm.weight") && !(block.config().norm.unit_offset && name.contains("_norm."));
        let (mean, std) = match var.dims() {
            [_, inputs] => (0.0, (*inputs as f64).powf(-0.5)),
            _ if is_norm => (1.0, 0.3),
            _ => (0.0, 0.5),
        };
        let numbers = randn(seed, var.shape(), DType::F64)?.affine(std, mean)?;
        var.set(&numbers.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// The variable of this name.
#[track_caller]
pub fn variable(block: &TransformerBlock, name: &str) -> Var {
    let index = block.parameters().iter().position(|(other, _)| other == name).expect("a parameter of this name");
    block.vars()[index].clone()
}

/// The parameter of this name, if the block has it.
pub fn parameter(block: &TransformerBlock, name: &str) -> Option<Tensor> {
    block.parameters().iter().find(|(other, _)| other == name).map(|(_, tensor)| (*tensor).clone())
}

/// Llama's block: two heads of 3, tokens of 6, SwiGLU of 5.
pub fn llama() -> TransformerBlockConfig {
    let attention =
        SelfAttentionConfig { is_causal: true, qkv_bias: false, out_bias: false, ..SelfAttentionConfig::new(6, 2) };
    TransformerBlockConfig::new(attention, MlpConfig::swiglu(6, 5), NormConfig::rms(1e-3))
}

/// BERT's block of the same sizes.
pub fn bert() -> TransformerBlockConfig {
    let (mlp, norm) = (MlpConfig::new(6, 5), NormConfig::layer(1e-3));
    let config = TransformerBlockConfig::new(SelfAttentionConfig::new(6, 2), mlp, norm);
    TransformerBlockConfig { placement: NormPlacement::Post, ..config }
}

/// GPT-2's block of the same sizes.
pub fn gpt2() -> TransformerBlockConfig {
    let attention = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(6, 2) };
    let mlp = MlpConfig { activation: Activation::GeluTanh, ..MlpConfig::new(6, 5) };
    TransformerBlockConfig::new(attention, mlp, NormConfig::layer(1e-3))
}

/// Gemma 2's block of the same sizes.
pub fn gemma2() -> TransformerBlockConfig {
    let llama = llama();
    TransformerBlockConfig {
        attention: SelfAttentionConfig {
            scale: Some(0.4),
            softcap: Some(2.0),
            sliding_window: Some(3),
            ..llama.attention
        },
        mlp: MlpConfig { activation: Activation::GeluTanh, ..llama.mlp },
        norm: NormConfig { unit_offset: true, ..llama.norm },
        placement: NormPlacement::Sandwich,
        ..llama
    }
}

/// Every placement with every kind of norm and of MLP, each with and without biases and dropout.
pub fn grid() -> Vec<(String, TransformerBlockConfig)> {
    let norms = [
        ("RMS", NormConfig::rms(1e-3)),
        ("RMS with bias", NormConfig { bias: true, ..NormConfig::rms(1e-3) }),
        ("RMS of 1 + w", NormConfig { unit_offset: true, ..NormConfig::rms(1e-3) }),
        ("layer norm", NormConfig::layer(1e-3)),
        ("layer norm without bias", NormConfig { bias: false, ..NormConfig::layer(1e-3) }),
    ];
    let mlps = [
        ("GELU", MlpConfig::new(6, 5)),
        ("ReLU without bias", MlpConfig { activation: Activation::Relu, bias: false, ..MlpConfig::new(6, 5) }),
        ("squared ReLU", MlpConfig { activation: Activation::SquaredRelu, ..MlpConfig::new(6, 5) }),
        ("SwiGLU", MlpConfig::swiglu(6, 5)),
        ("GEGLU with bias", MlpConfig { activation: Activation::GeluTanh, bias: true, ..MlpConfig::swiglu(6, 5) }),
    ];
    let mut all = Vec::new();
    for placement in PLACEMENTS {
        for (norm_name, norm) in norms {
            for (mlp_name, mlp) in &mlps {
                for dropout_p in [0.0, 0.3] {
                    let bias = mlp.bias;
                    let attention = SelfAttentionConfig {
                        qkv_bias: bias,
                        out_bias: bias,
                        is_causal: true,
                        // Some blocks have no W_O.
                        out_proj: norm_name != "layer norm without bias",
                        dropout_p: dropout_p / 2.0,
                        ..SelfAttentionConfig::new(6, 2)
                    };
                    let config = TransformerBlockConfig::new(attention, mlp.clone(), norm);
                    let what = format!("{placement:?}, {norm_name}, {mlp_name}, dropout {dropout_p}");
                    all.push((what, TransformerBlockConfig { placement, dropout_p, ..config }));
                }
            }
        }
    }
    all
}
