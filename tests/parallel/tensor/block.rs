//! Blocks and MLPs that ranks share, in memory and in files.

use candle_attention::block::{
    Activation, Mlp, MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig,
};
use candle_attention::parallel::threads;
use candle_attention::rotary::RotaryConfig;
use candle_attention::train::{AdamW, AdamWConfig};
use candle_attention::{Layout, Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use super::setup::{BATCH, HEADS, LEN, Step, assert_part, own, step, training};
use crate::blocks::block;
use crate::common::{assert_close, assert_same_bits, randn};
use crate::{Ranks, in_time};

const DIM: usize = 2 * HEADS;
/// Divided by 1, 2, 3 and 4 ranks.
const HIDDEN: usize = 36;

/// Llama's block with dropout everywhere.
fn llama() -> TransformerBlockConfig {
    let attention = SelfAttentionConfig {
        num_kv_heads: Some(HEADS),
        qkv_bias: false,
        out_bias: false,
        is_causal: true,
        dropout_p: 0.2,
        rotary: Some(RotaryConfig::default()),
        ..SelfAttentionConfig::new(DIM, HEADS)
    };
    let config = TransformerBlockConfig::new(attention, MlpConfig::swiglu(DIM, HIDDEN), NormConfig::rms(1e-3));
    TransformerBlockConfig { dropout_p: 0.3, ..config }
}

fn configs() -> Vec<(&'static str, TransformerBlockConfig)> {
    let llama = llama();
    let attention = SelfAttentionConfig::new(DIM, HEADS);
    let gelu = MlpConfig { activation: Activation::GeluTanh, ..MlpConfig::new(DIM, HIDDEN) };
    let gpt2 = TransformerBlockConfig::new(
        SelfAttentionConfig { is_causal: true, ..attention },
        gelu,
        NormConfig::layer(1e-3),
    );
    let one_key_head =
        SelfAttentionConfig { num_kv_heads: Some(1), qk_norm_eps: Some(1e-4), ..llama.attention.clone() };
    vec![
        ("gpt2", gpt2.clone()),
        ("bert", TransformerBlockConfig { placement: NormPlacement::Post, dropout_p: 0.1, ..gpt2 }),
        ("sandwich", TransformerBlockConfig { placement: NormPlacement::Sandwich, ..llama.clone() }),
        ("one key head", TransformerBlockConfig { attention: one_key_head, ..llama.clone() }),
        ("llama", llama),
    ]
}

/// Whether the ranks can share the blocks.
fn fits(ranks: Ranks) -> bool {
    HEADS.is_multiple_of(ranks.size()) && HIDDEN.is_multiple_of(ranks.size())
}

/// This rank's part of a tensor of the whole block.
fn own_of_block(ranks: Ranks, config: &TransformerBlockConfig, name: &str, whole: &Tensor) -> Result<Tensor> {
    match (name.strip_prefix("attention."), name.strip_prefix("mlp.")) {
        (Some(name), _) => own(ranks, &config.attention, name, whole),
        (_, Some(name)) => own_of_mlp(ranks, name, whole),
        _ => Ok(whole.clone()),
    }
}

fn own_of_mlp(ranks: Ranks, name: &str, whole: &Tensor) -> Result<Tensor> {
    let hidden = HIDDEN / ranks.size();
    Ok(match name {
        "up.weight" | "up.bias" | "gate.weight" | "gate.bias" => whole.narrow(0, ranks.rank() * hidden, hidden)?,
        "down.weight" => whole.narrow(1, ranks.rank() * hidden, hidden)?,
        _ => whole.clone(),
    })
}

fn train(block: &TransformerBlock, x: &Tensor) -> Result<Step> {
    block.set_dropout_calls([3, 5]);
    step(x, block.parameters(), |x| Ok(block.forward_with(x, &training())?.output))
}

fn input(dtype: DType) -> Result<Tensor> {
    Ok(randn(9, (BATCH, LEN, DIM), dtype)?)
}

pub fn block_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    for (name, config) in configs().into_iter().filter(|_| fits(ranks)) {
        for dtype in [DType::F64, DType::F32] {
            let (block, x) = (block(&config, dtype)?, input(dtype)?);
            let expected = train(&block, &x)?;
            let part = block.shard(ranks)?;
            assert_eq!(part.config(), &config);
            let parts =
                [("", part.clone()), ("recompute", part.clone().with_recompute(true)), ("copy", part.trainable()?)];
            for (kind, part) in parts {
                let what = format!("{name} {kind} in {dtype:?} on {} ranks", ranks.size());
                assert_part(&what, &train(&part, &x)?, &expected, |name, x| own_of_block(ranks, &config, name, x));
            }
        }
    }
    Ok(())
}

pub fn mlp_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    let biased = MlpConfig { bias: true, ..MlpConfig::swiglu(DIM, HIDDEN) };
    let configs = [MlpConfig::new(DIM, HIDDEN), MlpConfig::swiglu(DIM, HIDDEN), biased];
    for config in configs.iter().filter(|_| fits(ranks)) {
        let mlp = Mlp::new(config, VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu))?;
        for (seed, (_, parameter)) in mlp.parameters().into_iter().enumerate() {
            // Biases start at zero.
            Var::from_tensor(parameter)?.set(&randn(seed as u64, parameter.shape(), DType::F64)?)?;
        }
        let x = input(DType::F64)?;
        let run = |mlp: &Mlp| {
            step(&x, mlp.parameters().into_iter().map(|(name, x)| (name.to_string(), x)), |x| mlp.forward(x))
        };
        let part = mlp.shard(ranks)?;
        assert_eq!(part.config(), config);
        assert_part("MLP", &run(&part)?, &run(&mlp)?, |name, x| own_of_mlp(ranks, name, x));
        let gathered = part.gather()?;
        for ((name, got), (_, expected)) in gathered.parameters().into_iter().zip(mlp.parameters()) {
            assert_same_bits(got, expected, name);
        }
    }
    Ok(())
}

/// Several blocks and steps of AdamW: the parts stay those of the whole.
pub fn training_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    if !fits(ranks) {
        return Ok(());
    }
    let config = llama();
    let whole = [block(&config, DType::F64)?, block(&config, DType::F64)?];
    let parts = [whole[0].shard(ranks)?, whole[1].shard(ranks)?];
    let train = |blocks: &[TransformerBlock; 2]| -> Result<()> {
        let named = |(n, block): (usize, &TransformerBlock)| {
            let names: Vec<_> = block.parameters().into_iter().map(|(name, _)| format!("{n}.{name}")).collect();
            names.into_iter().zip(block.vars()).collect::<Vec<_>>()
        };
        let parameters: Vec<_> = blocks.iter().enumerate().flat_map(named).collect();
        let mut optimizer = AdamW::new(&parameters, AdamWConfig { lr: 1e-2, ..Default::default() })?;
        for seed in 0..3 {
            let x = randn(seed, (BATCH, LEN, DIM), DType::F64)?;
            let y = blocks[1].forward_t(&blocks[0].forward_t(&x, true)?, true)?;
            optimizer.step(&y.sqr()?.mean_all()?.backward()?)?;
        }
        Ok(())
    };
    train(&whole)?;
    train(&parts)?;
    for (whole, part) in whole.iter().zip(&parts) {
        for ((name, got), (_, expected)) in part.gather()?.parameters().into_iter().zip(whole.parameters()) {
            // AdamW divides gradients by their root mean square, which enlarges the rounding of small ones.
            assert_close(got, expected, 1e-8, &name);
        }
    }
    Ok(())
}

pub fn decoding_of_blocks_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    if !fits(ranks) {
        return Ok(());
    }
    let (block, x) = (block(&llama(), DType::F64)?, input(DType::F64)?);
    let part = block.shard(ranks)?;
    let mut caches = [block.kv_cache(BATCH)?, part.kv_cache(BATCH)?];
    for (first, len) in [(0, 5), (5, 1), (6, 1)] {
        let x = x.narrow(1, first, len)?;
        let [whole, own] = &mut caches;
        assert_close(&part.forward_cached(&x, own)?, &block.forward_cached(&x, whole)?, 1e-12, "decoding");
    }
    Ok(())
}

/// What ranks send: two sums a pass.
pub fn bytes_are_two_sums_a_pass(ranks: Ranks) -> Result<()> {
    if !fits(ranks) {
        return Ok(());
    }
    let part = block(&llama(), DType::F32)?.shard(ranks)?;
    // An input that every number of ranks divides.
    let x = Var::from_tensor(&randn(9, (2, 6, DIM), DType::F32)?)?;
    let sum = 2 * (ranks.size() as u64 - 1) * 4 * x.elem_count() as u64 / ranks.size() as u64;
    let before = ranks.bytes_sent();
    let y = part.forward(&x)?;
    // What the ranks agree on.
    let agreed = ranks.bytes_sent() - before - 2 * sum;
    assert!(agreed < 4000 * ranks.size() as u64, "{agreed} bytes to agree");
    let before = ranks.bytes_sent();
    y.sqr()?.sum_all()?.backward()?;
    assert_eq!(ranks.bytes_sent() - before, 2 * sum);
    Ok(())
}

/// A gathered block has the bits of the whole one in files.
pub fn gathered_block_is_the_whole(ranks: Ranks) -> Result<()> {
    for (name, config) in configs().into_iter().filter(|_| fits(ranks)) {
        let block = block(&config, DType::F32)?;
        let gathered = block.shard(ranks)?.gather()?;
        assert_eq!(gathered.to_bytes()?, block.to_bytes()?, "{name}");
        assert_same_bits(
            &train(&gathered, &input(DType::F32)?)?.output,
            &train(&block, &input(DType::F32)?)?.output,
            name,
        );
    }
    Ok(())
}

#[test]
fn a_file_of_two_ranks_is_loaded_on_four_and_on_one() {
    in_time(|| {
        let folder = tempfile::tempdir().unwrap();
        let (own, llama_file) = (folder.path().join("block.safetensors"), folder.path().join("llama.safetensors"));
        let whole = block(&llama(), DType::F64).unwrap();
        let x = input(DType::F64).unwrap();
        threads(2, |communicator| {
            let gathered = whole.shard(&communicator)?.gather()?;
            if communicator.rank() == 0 {
                gathered.save(&own)?;
                gathered.save_layout(Layout::Llama, "model.layers.0", &llama_file)?;
            }
            Ok(())
        })
        .unwrap();
        let expected = whole.forward(&x).unwrap();
        assert_same_bits(&TransformerBlock::load(&own, &Device::Cpu).unwrap().forward(&x).unwrap(), &expected, "one");
        threads(4, |communicator| {
            let part = TransformerBlock::load(&own, &Device::Cpu)?.shard(&communicator)?;
            assert_close(&part.forward(&x)?, &expected, 1e-12, "four");
            let vb = candle_attention::checkpoint::var_builder(&llama_file, DType::F64, &Device::Cpu)?;
            let part = TransformerBlock::from_layout(Layout::Llama, &llama(), vb.pp("model.layers.0"))?;
            assert_close(&part.shard(&communicator)?.forward(&x)?, &expected, 1e-12, "four, from a layout");
            Ok(())
        })
        .unwrap();
    });
}
