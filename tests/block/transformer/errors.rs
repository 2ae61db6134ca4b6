//! Configs and inputs that a block can't have.

use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
use candle_attention::{ForwardOptions, Mask, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::blocks_common::{PLACEMENTS, bert, block, llama};
use crate::common::randn;
use crate::layers::assert_error_says;

/// Checks that a config is refused by `validate` and by `new`, which then creates no parameter.
#[track_caller]
fn refused(change: impl FnOnce(&mut TransformerBlockConfig), parts: &[&str]) {
    let mut config = llama();
    change(&mut config);
    assert_error_says(config.validate(), parts);
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    assert_error_says(TransformerBlock::new(&config, vb), parts);
    assert!(varmap.all_vars().is_empty());
}

#[test]
fn config_that_no_block_can_have_is_refused() {
    refused(|c| c.attention.num_heads = 4, &["embed_dim", "num_heads 4", "got 6"]);
    refused(|c| c.attention.dropout_p = 1.0, &["dropout_p", "got 1"]);
    refused(|c| c.mlp.embed_dim = 7, &["mlp.embed_dim", "embed_dim 6", "got 7"]);
    refused(|c| c.mlp.embed_dim = 0, &["mlp.embed_dim", "at least 1", "got 0"]);
    refused(|c| c.mlp.hidden_dim = 0, &["mlp.hidden_dim", "at least 1", "got 0"]);
    refused(|c| c.mlp.hidden_dim = usize::MAX, &["mlp.hidden_dim", "that memory can address"]);
    for eps in [0.0, -1e-5, f64::NAN, f64::INFINITY] {
        refused(|c| c.norm.eps = eps, &["norm.eps", "a finite number above 0", &format!("got {eps}")]);
    }
    for p in [1.0, -0.1, f64::NAN] {
        refused(|c| c.dropout_p = p, &["dropout_p", "a probability in [0, 1)", &format!("got {p}")]);
    }
}

#[test]
fn attention_without_w_o_must_give_tokens_of_the_same_size() -> Result<()> {
    let mut config = llama();
    (config.attention.out_proj, config.attention.value_dim) = (false, Some(4));
    assert_error_says(config.validate(), &["attention.out_proj", "embed_dim 6", "got 8"]);
    config.attention.value_dim = None;
    let x = randn(1, (2, 4, 6), DType::F32)?;
    assert_eq!(block(&config, DType::F32)?.forward(&x)?.dims(), [2, 4, 6]);
    Ok(())
}

#[test]
fn refused_call_draws_no_dropout() -> Result<()> {
    let block = block(&TransformerBlockConfig { dropout_p: 0.1, ..llama() }, DType::F32)?;
    assert_error_says(block.forward_t(&randn(1, (2, 4, 5), DType::F32)?, true), &["input"]);
    assert_eq!(block.dropout_calls(), [0, 0]);
    block.forward_t(&randn(1, (2, 4, 6), DType::F32)?, true)?;
    assert_eq!(block.dropout_calls()[0], 1);
    Ok(())
}

/// A `VarBuilder` may hand out a view.
#[test]
fn biases_may_be_views() -> Result<()> {
    let whole = block(&bert(), DType::F64)?;
    let view = |x: &Tensor| match x.rank() {
        1 => Tensor::stack(&[x, x], 1)?.narrow(1, 0, 1)?.squeeze(1),
        _ => Ok(x.clone()),
    };
    let tensors = whole.parameters().into_iter().map(|(name, x)| Ok((name, view(&x.detach())?)));
    let vb = VarBuilder::from_tensors(tensors.collect::<Result<_>>()?, DType::F64, &Device::Cpu);
    let views = TransformerBlock::new(&bert(), vb)?;
    let x = randn(1, (2, 4, 6), DType::F64)?;
    crate::common::assert_same_bits(&views.forward(&x)?, &whole.forward(&x)?, "with views");
    Ok(())
}

#[test]
fn config_that_this_dtype_or_layer_cannot_have_creates_no_parameter() {
    let refused = |config: &TransformerBlockConfig, dtype, parts: &[&str]| {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
        assert_error_says(TransformerBlock::new(config, vb), parts);
        assert!(varmap.all_vars().is_empty());
    };
    let small = TransformerBlockConfig { norm: NormConfig::rms(1e-300), ..llama() };
    refused(&small, DType::F32, &["norm.eps", "also in f32"]);
    refused(&small, DType::BF16, &["norm.eps", "also in f32"]);
    refused(&llama(), DType::U32, &["parameters", "U32"]);
    let attention = SelfAttentionConfig { kv_dim: Some(5), ..llama().attention };
    refused(&TransformerBlockConfig { attention, ..llama() }, DType::F32, &["kv_dim", "got 5"]);
}

/// What a `VarMap` holds is checked before anything is created in it.
#[test]
fn refused_parameter_leaves_the_var_map_as_it_was() -> Result<()> {
    for (name, part) in [("attention", "q_proj.weight"), ("mlp", "down.weight"), ("mlp_norm", "weight")] {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let shape: &[usize] = match part {
            "q_proj.weight" => &[6, 6],
            "down.weight" => &[6, 5],
            _ => &[6],
        };
        let other = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
        other.pp("h").pp(name).get(shape, part)?;
        let expected = format!("`h.{name}.{part}`: expected dtype F32");
        assert_error_says(TransformerBlock::new(&bert(), vb.pp("h")), &[&expected]);
        assert_eq!(varmap.all_vars().len(), 1, "{name}");
    }
    Ok(())
}

#[test]
fn input_that_does_not_fit_is_refused() -> Result<()> {
    for placement in PLACEMENTS {
        let block = block(&TransformerBlockConfig { placement, ..llama() }, DType::F32)?;
        for dims in [vec![2, 4, 5], vec![6], vec![1, 2, 4, 6], vec![]] {
            let x = Tensor::zeros(dims.as_slice(), DType::F32, &Device::Cpu)?;
            assert_error_says(block.forward(&x), &["input", &format!("{dims:?}")]);
        }
        assert_error_says(block.forward(&randn(1, (2, 4, 6), DType::F64)?), &["input", "F32", "got F64"]);
        let attn_mask = Mask::from_tensor(&Tensor::ones((3, 5), DType::U8, &Device::Cpu)?)?;
        let options = ForwardOptions { attn_mask, ..Default::default() };
        assert_error_says(block.forward_with(&randn(1, (2, 4, 6), DType::F32)?, &options), &["mask"]);
    }
    Ok(())
}

#[test]
fn json_config_needs_only_what_differs() {
    let json = r#"{"attention": {"embed_dim": 6, "num_heads": 2}, "mlp": {"embed_dim": 6, "hidden_dim": 5,
        "activation": "gelu", "bias": true}, "norm": {"kind": "layer", "eps": 0.001, "bias": true}}"#;
    let config: TransformerBlockConfig = serde_json::from_str(json).expect("a config");
    let (mlp, norm) = (MlpConfig::new(6, 5), NormConfig::layer(1e-3));
    assert_eq!(config, TransformerBlockConfig::new(SelfAttentionConfig::new(6, 2), mlp, norm));
    let again: TransformerBlockConfig =
        serde_json::from_str(&serde_json::to_string(&bert()).expect("JSON")).expect("a config");
    assert_eq!(again, bert());
}
