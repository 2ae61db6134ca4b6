//! Blocks whose tensors aren't those of the config: one error lists all problems, with full names.

use candle_attention::block::TransformerBlock;
use candle_core::{DType, Device, Result, Tensor};

use crate::blocks_common::{bert, block};
use crate::common::randn;
use crate::layers::assert_error_says;
use crate::own::files::Parts;

use super::layouts::{Model, PREFIX, Tensors, models};

#[track_caller]
fn refused(model: &Model, tensors: &Tensors, parts: &[&str]) -> anyhow::Result<()> {
    assert_error_says(model.build(tensors), parts);
    assert_error_says(model.load(tensors)?, parts);
    Ok(())
}

#[test]
fn missing_tensors_are_named_with_their_shapes() -> anyhow::Result<()> {
    for model in models() {
        for (name, shape) in model.shapes {
            let mut tensors = model.tensors()?;
            tensors.remove(*name);
            refused(&model, &tensors, &[&format!("`{PREFIX}.{name}` is missing, expected {shape:?}")])?;
        }
    }
    Ok(())
}

#[test]
fn one_error_names_every_problem_of_attention_mlp_and_norms() -> anyhow::Result<()> {
    for model in models() {
        let mut tensors = model.tensors()?;
        let mut expected = Vec::new();
        for (i, (name, shape)) in model.shapes.iter().enumerate() {
            match i % 3 {
                0 => {
                    tensors.remove(*name);
                    expected.push(format!("`{PREFIX}.{name}` is missing, expected {shape:?}"));
                }
                1 => {
                    tensors.insert(name.to_string(), randn(1, (2, 3, 5), DType::F32)?);
                    expected.push(format!("`{PREFIX}.{name}`: expected shape {shape:?}, got [2, 3, 5]"));
                }
                _ => {
                    tensors.insert(name.to_string(), (Tensor::ones(*shape, DType::F32, &Device::Cpu)? / 0.0)?);
                    expected.push(format!("`{PREFIX}.{name}`: expected finite numbers"));
                }
            }
        }
        refused(&model, &tensors, &expected.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}

#[test]
fn unexpected_tensors_under_the_prefix_are_named() -> anyhow::Result<()> {
    for model in models() {
        let mut tensors = model.tensors()?;
        let more = ["mlp.lora.weight", "attention.q.weight", "self_attn.qweight", "norm.weight", "🦀"];
        for name in more {
            tensors.insert(name.into(), Tensor::zeros(2, DType::F32, &Device::Cpu).expect("zeros"));
        }
        let expected = more.map(|name| format!("`{PREFIX}.{name}` is unexpected"));
        assert_error_says(model.load(&tensors)?, &expected.each_ref().map(String::as_str));
    }
    Ok(())
}

#[test]
fn parameters_that_the_config_leaves_out_are_unexpected() -> anyhow::Result<()> {
    for (index, more) in [
        (0, "mlp.up.bias"),
        (0, "attention.sinks"),
        (0, "mlp_post_norm.weight"),
        (3, "self_attn.q_proj.bias"),
        (3, "mlp.up_proj.bias"),
        (5, "self_attn.qkv_proj.bias"),
    ] {
        let model = &models()[index];
        let mut tensors = model.tensors()?;
        tensors.insert(more.into(), Tensor::zeros(6, DType::F32, &Device::Cpu)?);
        refused(model, &tensors, &[&format!("`{PREFIX}.{more}` is unexpected")])?;
    }
    // Qwen3's tensors aren't Gemma's.
    let gemma = &models()[4];
    let parts =
        [format!("`{PREFIX}.pre_feedforward_layernorm.weight` is missing"), "q_norm.weight` is unexpected".into()];
    assert_error_says(gemma.load(&models()[3].tensors()?)?, &parts.each_ref().map(String::as_str));
    Ok(())
}

/// The causal mask and the frequencies of old checkpoints are no parameters.
#[test]
fn what_the_attention_ignores_the_block_ignores() -> anyhow::Result<()> {
    for (index, more) in [(2, "attn.bias"), (2, "attn.masked_bias"), (3, "self_attn.rotary_emb.inv_freq")] {
        let model = &models()[index];
        let mut tensors = model.tensors()?;
        tensors.insert(more.into(), Tensor::zeros((1, 1), DType::U8, &Device::Cpu)?);
        model.load(&tensors)??;
    }
    Ok(())
}

#[test]
fn own_file_with_other_tensors_names_all_of_them() -> Result<()> {
    let load = |parts: &Parts| TransformerBlock::from_bytes(&parts.to_bytes()?, &Device::Cpu);
    let mut parts = Parts::of(&block(&bert(), DType::F32)?.to_bytes()?)?;
    load(&parts)?;
    parts.tensors.remove("attention.k_proj.bias");
    parts.tensors.insert("mlp_norm.weight".into(), randn(1, 7, DType::F32)?);
    parts.tensors.insert("mlp.up.weight".into(), randn(1, (5, 6), DType::F64)?);
    parts.tensors.insert("mlp.gate.weight".into(), randn(1, (5, 6), DType::F32)?);
    let expected = [
        "`attention.k_proj.bias` is missing, expected [6]",
        "`mlp_norm.weight`: expected shape [6], got [7]",
        "`mlp.up.weight`: expected dtype F32 as the others, got F64",
        "`mlp.gate.weight` is unexpected",
    ];
    assert_error_says(load(&parts), &expected);

    let mut parts = Parts::of(&block(&bert(), DType::F32)?.to_bytes()?)?;
    for name in ["attention.q_proj.weight", "mlp_norm.bias"] {
        let tensor = (&parts.tensors[name] * f64::NAN)?;
        parts.tensors.insert(name.into(), tensor);
    }
    let expected = ["`attention.q_proj.weight`: expected finite numbers", "`mlp_norm.bias`: expected finite numbers"];
    assert_error_says(load(&parts), &expected);
    Ok(())
}
