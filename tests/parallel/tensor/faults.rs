//! Layers that ranks can't share, ranks that disagree, and ranks that are gone.

use candle_attention::adapter::{Adapt, AdapterChoice, LoraConfig};
use candle_attention::block::{Mlp, MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{
    AttentionError, CrossAttention, Error, ForwardOptions, Layout, Mask, Result, SelfAttention, SelfAttentionConfig,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use super::setup::HEADS;
use crate::common::randn;
use crate::layers::self_attention;
use crate::{Ranks, in_time};

const DIM: usize = 2 * HEADS;

fn config() -> SelfAttentionConfig {
    SelfAttentionConfig { dropout_p: 0.1, ..SelfAttentionConfig::new(DIM, HEADS) }
}

fn input(len: usize) -> Result<Tensor> {
    Ok(randn(9, (1, len, DIM), DType::F32)?)
}

/// An error of every rank with all of these texts. The ranks can go on.
#[track_caller]
fn assert_says<T>(ranks: Ranks, result: Result<T>, texts: &[&str]) -> Result<()> {
    let error = result.err().expect("an error").to_string();
    assert!(texts.iter().all(|text| error.contains(text)), "expected {texts:?}, got {error}");
    ranks.agree("what comes next", "the same")
}

pub fn heads_that_ranks_cannot_divide(ranks: Ranks) -> Result<()> {
    let n = ranks.size();
    if n == 1 {
        return Ok(());
    }
    let ranks_text = format!("{n} ranks");
    let attention = |heads: usize, kv_heads| {
        let config = SelfAttentionConfig { num_kv_heads: kv_heads, ..SelfAttentionConfig::new(4 * heads, heads) };
        self_attention(&config, DType::F32)
    };
    let uneven = format!("got {}", n + 1);
    assert_says(ranks, attention(n + 1, None)?.shard(ranks), &["num_heads", &ranks_text, &uneven])?;
    // n divides the query heads, but neither divides nor is divided by the key heads.
    assert_says(ranks, attention(n * (n + 1), Some(n + 1))?.shard(ranks), &["num_kv_heads", &ranks_text, &uneven])?;
    let config = SelfAttentionConfig { out_proj: false, ..SelfAttentionConfig::new(4 * n, n) };
    assert_says(ranks, self_attention(&config, DType::F32)?.shard(ranks), &["out_proj", "true", "false"])?;
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    assert_says(ranks, Mlp::new(&MlpConfig::new(8, n + 1), vb())?.shard(ranks), &["hidden_dim", &ranks_text, &uneven])?;
    let attention = SelfAttentionConfig::new(4 * n, n);
    let config = TransformerBlockConfig::new(attention, MlpConfig::new(4 * n, n + 1), NormConfig::rms(1e-3));
    assert_says(ranks, TransformerBlock::new(&config, vb())?.shard(ranks), &["hidden_dim", &ranks_text, &uneven])
}

/// `ours` on the last rank, `others` on the others.
fn last<T>(ranks: Ranks, ours: T, others: T) -> T {
    if ranks.rank() + 1 == ranks.size() { ours } else { others }
}

/// Whether the ranks can share the layers here and can disagree.
fn fits(ranks: Ranks) -> bool {
    ranks.size() > 1 && HEADS.is_multiple_of(ranks.size())
}

pub fn other_configs_or_parameters(ranks: Ranks) -> Result<()> {
    if !fits(ranks) {
        return Ok(());
    }
    let of_config = |config: &SelfAttentionConfig| self_attention(config, DType::F32);
    let config = config();
    let causal = SelfAttentionConfig { is_causal: true, ..config.clone() };
    let texts = ["is_causal: false", "is_causal: true", "rank 0"];
    assert_says(ranks, of_config(last(ranks, &causal, &config))?.shard(ranks), &texts)?;
    // Heads that this rank alone has: its error is everyone's.
    let fewer = SelfAttentionConfig { num_heads: 1, head_dim: Some(2), ..config.clone() };
    let result = of_config(last(ranks, &fewer, &config))?.shard(ranks);
    assert_says(ranks, result, &["num_heads: 12", "num_heads: 1,", "a multiple of"])?;
    let layer = of_config(&config)?;
    if ranks.rank() == 1 {
        let var = &layer.vars()[2];
        var.set(&(var.as_tensor() * 2.0)?)?;
    }
    assert_says(ranks, layer.shard(ranks), &["v_proj.weight [24, 24] F32", "rank 0", "rank 1"])?;
    // Seeds that differ.
    let seed = last(ranks, 4, 5);
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    assert_says(
        ranks,
        SelfAttention::new(&SelfAttentionConfig { seed, ..config }, vb)?.shard(ranks),
        &["seed: 4", "seed: 5"],
    )
}

pub fn other_inputs_or_options(ranks: Ranks) -> Result<()> {
    if !fits(ranks) {
        return Ok(());
    }
    let config = SelfAttentionConfig { is_causal: true, ..config() };
    let part = self_attention(&config, DType::F32)?.shard(ranks)?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let plain = TransformerBlockConfig::new(config, MlpConfig::new(DIM, HEADS), NormConfig::rms(1e-3));
    let config = TransformerBlockConfig { dropout_p: 0.1, ..plain };
    let block = TransformerBlock::new(&config, vb.pp("block"))?.shard(ranks)?;
    let cross = CrossAttention::new(&config.attention, vb.pp("cross"))?.shard(ranks)?;
    let x = input(5)?;
    let texts = ["[1, 5, 24]", "[1, 6, 24]", "rank 0"];
    let other = input(last(ranks, 6, 5))?;
    assert_says(ranks, part.forward(&other), &texts)?;
    assert_says(ranks, block.forward(&other), &texts)?;
    assert_says(ranks, block.forward_cached(&other, &mut block.kv_cache(1)?), &texts)?;
    assert_says(ranks, part.forward_cached(&other, &mut part.kv_cache(1)?), &texts)?;
    assert_says(ranks, block.mlp().forward(&other), &texts)?;
    assert_says(ranks, cross.forward(&x, &other), &texts)?;
    assert_says(ranks, cross.forward_projected(&other, &cross.project(&x)?), &texts)?;
    // An input that this rank alone refuses.
    let wrong = last(ranks, randn(9, (1, 5, DIM + 1), DType::F32)?, x.clone());
    assert_says(ranks, part.forward(&wrong), &["[1, 5, 25]", "[1, 5, 24]", "error: input"])?;
    assert_says(ranks, block.forward(&wrong), &["[1, 5, 25]", "[1, 5, 24]", "error: input"])?;
    assert_says(ranks, block.forward_cached(&wrong, &mut block.kv_cache(1)?), &["[1, 5, 25]", "error: input"])?;
    let wrong = last(ranks, x.flatten_all()?, x.clone());
    assert_says(ranks, block.forward(&wrong), &["[120]", "[1, 5, 24]", "error: input"])?;
    let wrong = last(ranks, x.to_dtype(DType::F64)?, x.clone());
    assert_says(ranks, part.forward(&wrong), &["F32", "F64"])?;
    let tracked = last(ranks, Var::from_tensor(&x)?.into_inner(), x.clone());
    assert_says(ranks, part.forward(&tracked), &["with gradient", "without gradient"])?;

    let mask = last(ranks, Mask::causal(), Mask::full());
    assert_says(ranks, part.forward_with(&x, &ForwardOptions { attn_mask: mask, ..Default::default() }), &["mask"])?;
    assert_says(ranks, part.forward_t(&x, ranks.rank() == 0), &["dropout Some", "dropout None"])?;
    part.set_dropout_calls(last(ranks, 8, 9));
    assert_says(ranks, part.forward_t(&x, true), &[", 8)", ", 9)"])?;
    block.set_dropout_calls([last(ranks, 8, 9), 0]);
    assert_says(ranks, block.forward_t(&x, true), &["MLP", "seed"])?;
    let ids = Tensor::new(&[last(ranks, 8i64, 9), 1, 2, 3, 4], &Device::Cpu)?;
    let options = ForwardOptions { position_ids: Some(ids), ..Default::default() };
    assert_says(ranks, part.forward_with(&x, &options), &["position ids"])?;
    // A cache that is behind.
    let mut cache = part.kv_cache(1)?;
    part.forward_cached(&x, &mut cache)?;
    let mut cache = last(ranks, part.kv_cache(1)?, cache);
    assert_says(ranks, part.forward_cached(&x, &mut cache), &["after [0]", "after [5]"])?;
    let mut cache = part.kv_cache(last(ranks, 2, 1))?;
    assert_says(ranks, part.forward_cached(&x, &mut cache), &["after [0]", "sequences"])?;
    let bias = Var::from_tensor(&Tensor::zeros((5, 5), DType::F32, &Device::Cpu)?)?;
    let bias = last(ranks, bias.as_tensor().clone(), bias.as_detached_tensor());
    let options = ForwardOptions { attn_bias: Some(bias), ..Default::default() };
    assert_says(ranks, part.forward_with(&x, &options), &["trained", "constant"])?;
    let adapter = last(ranks, AdapterChoice::Base, AdapterChoice::Active);
    assert_says(ranks, block.mlp().forward_with(&x, &adapter, None), &["Base", "Active"])?;
    // After all that, the layers work.
    part.set_dropout_calls(0);
    block.set_dropout_calls([0, 0]);
    part.forward_t(&x, true)?;
    block.forward_t(&x, true).map(drop)
}

/// What a part doesn't serve.
pub fn what_takes_a_whole_layer(ranks: Ranks) -> Result<()> {
    if !HEADS.is_multiple_of(ranks.size()) {
        return Ok(());
    }
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let config = TransformerBlockConfig::new(config(), MlpConfig::new(DIM, HEADS), NormConfig::rms(1e-3));
    let block = TransformerBlock::new(&config, vb.pp("block"))?.shard(ranks)?;
    let part = block.attention();
    let text = format!(
        "layer: expected a whole one (gather it first), got the part of rank {} of {}",
        ranks.rank(),
        ranks.size()
    );
    let text = [text.as_str()];
    assert_says(ranks, part.to_bytes(), &text)?;
    assert_says(ranks, part.to_layout(Layout::Own), &text)?;
    assert_says(ranks, block.to_bytes(), &text)?;
    assert_says(ranks, block.to_layout(Layout::Own), &text)?;
    // Here the ranks' texts differ.
    let whole = ["a whole one (gather it first)"];
    assert_says(ranks, part.shard(ranks), &whole)?;
    assert_says(ranks, block.mlp().shard(ranks), &whole)?;
    assert_says(ranks, block.shard(ranks), &whole)?;
    let lora = LoraConfig::new(2, 4.0);
    assert_says(ranks, part.with_lora("a", &lora, vb.pp("lora")), &text)?;
    assert_says(ranks, block.mlp().with_lora("a", &lora, vb.pp("lora")), &text)?;
    assert!(!vb.contains_tensor("lora.q_proj.lora_A.weight") && !vb.contains_tensor("lora.up.lora_A.weight"));
    let split = Split::new(5 * ranks.size(), ranks.size(), Order::Contiguous)?;
    let parallel = Some(ContextParallel { communicator: ranks.clone(), split, scheme: Scheme::Ring });
    let result = block.forward_with(&input(5)?, &ForwardOptions { parallel, ..Default::default() });
    assert_says(ranks, result, &["share a sequence"])
}

/// A rank that ends is an error for those that wait, in the forward and in the backward pass.
#[test]
fn a_rank_that_is_gone_is_an_error() {
    for in_backward in [false, true] {
        let error = in_time(move || {
            threads(3, |communicator| {
                let part = self_attention(&config(), DType::F32)?.shard(&communicator)?;
                let x = Var::from_tensor(&input(5)?)?;
                if communicator.rank() == 1 && !in_backward {
                    return Err(AttentionError::Memory { what: "test", bytes: 17 }.into());
                }
                let y = part.forward(&x)?;
                if communicator.rank() == 1 {
                    return Err(AttentionError::Memory { what: "test", bytes: 17 }.into());
                }
                let error = Error::from(y.sum_all()?.backward().expect_err("an error"));
                assert!(matches!(error, Error::Attention(AttentionError::Communication { rank: 1, .. })), "{error}");
                Err::<(), _>(error)
            })
        });
        assert!(matches!(error, Err(Error::Attention(AttentionError::Memory { bytes: 17, .. }))), "{error:?}");
    }
}
