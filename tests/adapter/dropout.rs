//! Dropout of what an adapter reads.

use candle_attention::adapter::{Adapt, AdapterChoice, LoraConfig, LoraLinear};
use candle_attention::block::{Mlp, MlpConfig};
use candle_attention::{ForwardOptions, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};

use crate::common::{assert_close, assert_same_bits, check_gradients, numbers, randn, var};
use crate::{adapted, blocks_common, config, layers, matrices};

fn dropping() -> LoraConfig {
    LoraConfig { dropout_p: 0.4, seed: 5, ..config() }
}

#[test]
fn dropout_acts_on_the_adapters_input_alone() -> Result<()> {
    // W is zero, A and B are the identity: the output is what A has read, times s.
    let linear = LoraLinear::new(Linear::new(Tensor::zeros((50, 50), DType::F64, &Device::Cpu)?, None));
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    let linear = linear.with_lora("default", &LoraConfig { dropout_p: 0.4, ..LoraConfig::new(50, 50.0) }, vb)?;
    for (_, var) in matrices(&linear, "default")? {
        var.set(&Tensor::eye(50, DType::F64, &Device::Cpu)?)?;
    }
    let x = randn(1, (100, 50), DType::F64)?;
    let read = numbers(&linear.forward_t(&x, true)?)?;
    let x_numbers = numbers(&x)?;
    let kept = read.iter().filter(|&&read| read != 0.0).count();
    assert!((2800..3200).contains(&kept), "{kept} of 5000 numbers are kept at p = 0.4");
    for (read, x) in read.iter().zip(x_numbers) {
        assert!(*read == 0.0 || (read - x / 0.6).abs() < 1e-12, "{read} of {x}");
    }
    assert_same_bits(&linear.forward(&x)?, &x, "without dropout");
    assert_eq!(linear.dropout_calls(), 1);
    Ok(())
}

#[test]
fn each_call_and_each_target_drops_other_numbers() -> Result<()> {
    let block = adapted(&blocks_common::block(&blocks_common::bert(), DType::F64)?, "default", &dropping(), 3)?;
    let x = randn(1, (2, 4, 6), DType::F64)?;
    let first = block.forward_t(&x, true)?;
    let second = block.forward_t(&x, true)?;
    assert_ne!(numbers(&first)?, numbers(&second)?);
    assert_ne!(numbers(&first)?, numbers(&block.forward(&x)?)?);
    block.set_dropout_calls([0, 0]);
    assert_same_bits(&block.forward_t(&x, true)?, &first, "the same call again");
    Ok(())
}

#[test]
fn every_path_drops_the_same_numbers() -> Result<()> {
    let config = candle_attention::SelfAttentionConfig::new(6, 2);
    let layer = adapted(&layers::self_attention(&config, DType::F64)?, "default", &dropping(), 3)?;
    let x = randn(1, (2, 4, 6), DType::F64)?;
    let fused = layer.forward_t(&x, true)?;
    layer.set_dropout_calls(0);
    let options = ForwardOptions { train: true, return_weights: true, ..Default::default() };
    assert_close(&layer.forward_with(&x, &options)?.output, &fused, 1e-12, "with weights");
    Ok(())
}

#[test]
fn batch_in_parts_drops_the_numbers_of_the_whole() -> Result<()> {
    let block = adapted(&blocks_common::block(&blocks_common::bert(), DType::F64)?, "default", &dropping(), 3)?;
    let x = randn(1, (5, 3, 6), DType::F64)?;
    for return_weights in [false, true] {
        let part = |first_sequence: usize, count: usize| {
            block.set_dropout_calls([0, 0]);
            let options = ForwardOptions { train: true, first_sequence, return_weights, ..Default::default() };
            Ok::<_, candle_attention::Error>(block.forward_with(&x.narrow(0, first_sequence, count)?, &options)?.output)
        };
        let apart = Tensor::cat(&[part(0, 2)?, part(2, 3)?], 0)?;
        assert_close(&apart, &part(0, 5)?, 1e-13, "output");
    }
    Ok(())
}

#[test]
fn linear_layers_of_other_names_drop_other_numbers() -> Result<()> {
    let x = randn(1, (4, 30), DType::F64)?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    let output = |name: &str| {
        let linear = LoraLinear::new(Linear::new(Tensor::zeros((30, 30), DType::F64, &Device::Cpu)?, None));
        let config = LoraConfig { dropout_p: 0.4, ..LoraConfig::new(30, 30.0) };
        let linear = linear.with_lora("default", &config, vb.pp(name))?;
        for (_, var) in matrices(&linear, "default")? {
            var.set(&Tensor::eye(30, DType::F64, &Device::Cpu)?)?;
        }
        linear.forward_t(&x, true)
    };
    assert_ne!(numbers(&output("first")?)?, numbers(&output("second")?)?);
    Ok(())
}

#[test]
fn mlp_alone_drops_by_the_given_seed() -> Result<()> {
    let mlp = Mlp::new(&MlpConfig::new(6, 5), VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu))?;
    let mlp = adapted(&mlp, "default", &dropping(), 3)?;
    let x = randn(1, (2, 4, 6), DType::F64)?;
    let call = |seed| mlp.forward_with(&x, &AdapterChoice::Active, seed);
    assert_same_bits(&call(None)?, &mlp.forward(&x)?, "without dropout");
    assert_same_bits(&call(Some(1))?, &call(Some(1))?, "the same seed");
    assert_ne!(numbers(&call(Some(1))?)?, numbers(&call(Some(2))?)?);
    Ok(())
}

#[test]
fn recomputation_drops_the_same_numbers() -> Result<()> {
    let block = adapted(&blocks_common::block(&blocks_common::bert(), DType::F64)?, "default", &dropping(), 3)?;
    let (x, again) = (var(1, (2, 4, 6), DType::F64)?, block.clone().with_recompute(true));
    let run = |block: &candle_attention::block::TransformerBlock| {
        block.set_dropout_calls([0, 0]);
        let grads = block.forward_t(&x, true)?.sqr()?.sum_all()?.backward()?;
        let all = block.vars().iter().map(|var| grads.get(var).unwrap().clone()).collect::<Vec<_>>();
        Ok::<_, candle_attention::Error>(all)
    };
    for (kept, recomputed) in run(&block)?.iter().zip(&run(&again)?) {
        assert_same_bits(recomputed, kept, "recomputed");
    }
    Ok(())
}

#[test]
fn gradients_with_dropout_are_those_of_finite_differences() -> Result<()> {
    for config in [blocks_common::bert(), blocks_common::llama(), blocks_common::gemma2()] {
        let block = adapted(&blocks_common::block(&config, DType::F64)?, "default", &dropping(), 3)?;
        let (x, c) = (var(1, (2, 3, 6), DType::F64)?, randn(9, (2, 3, 6), DType::F64)?);
        let matrices = matrices(&block, "default")?;
        let mut vars: Vec<(&str, &Var)> = matrices.iter().map(|(name, var)| (name.as_str(), var)).collect();
        vars.push(("x", &x));
        let loss = || {
            block.set_dropout_calls([0, 0]);
            Ok((block.forward_t(&x, true)? * &c)?)
        };
        check_gradients(&vars, || loss().map_err(|error: candle_attention::Error| error.into()), 1e-7, "dropout");
    }
    Ok(())
}
