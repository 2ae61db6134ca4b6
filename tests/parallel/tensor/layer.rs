//! Attention whose heads ranks share.

use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
use candle_attention::{Backend, CrossAttention, ForwardOptions, Mask, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use super::setup::{BATCH, HEADS, LEN, Step, assert_part, fits, own, step, training};
use crate::Ranks;
use crate::common::{assert_close, assert_same_bits, randn};
use crate::layers::{cross_attention, self_attention};

fn with_kv(kv_heads: usize) -> SelfAttentionConfig {
    SelfAttentionConfig { num_kv_heads: Some(kv_heads), is_causal: true, ..SelfAttentionConfig::new(2 * HEADS, HEADS) }
}

pub fn configs() -> Vec<(&'static str, SelfAttentionConfig)> {
    let plain = SelfAttentionConfig::new(2 * HEADS, HEADS);
    let causal = with_kv(HEADS);
    let rotary = Some(RotaryConfig::default());
    let everything = |kv_heads| SelfAttentionConfig {
        head_dim: Some(4),
        value_dim: Some(3),
        scale: Some(0.4),
        softcap: Some(3.0),
        sliding_window: Some(4),
        dropout_p: 0.3,
        qk_norm_eps: Some(1e-3),
        rotary: rotary.clone(),
        alibi: true,
        sinks: true,
        ..with_kv(kv_heads)
    };
    vec![
        ("plain", plain.clone()),
        ("no biases", SelfAttentionConfig { qkv_bias: false, out_bias: false, ..plain.clone() }),
        ("no bias of the keys", SelfAttentionConfig { k_bias: false, ..causal.clone() }),
        ("causal with rotary", SelfAttentionConfig { rotary: rotary.clone(), ..causal.clone() }),
        ("grouped queries", with_kv(HEADS / 3)),
        ("grouped queries with dropout", SelfAttentionConfig { dropout_p: 0.4, ..with_kv(6) }),
        ("one key head with dropout", SelfAttentionConfig { dropout_p: 0.4, rotary: rotary.clone(), ..with_kv(1) }),
        ("two key heads", SelfAttentionConfig { rotary: rotary.clone(), ..with_kv(2) }),
        ("dropout", SelfAttentionConfig { dropout_p: 0.4, ..plain.clone() }),
        ("sinks", SelfAttentionConfig { sinks: true, dropout_p: 0.2, ..causal.clone() }),
        ("norm of queries and keys", SelfAttentionConfig { qk_norm_eps: Some(1e-4), ..causal.clone() }),
        ("alibi", SelfAttentionConfig { alibi: true, ..causal.clone() }),
        ("learned key", SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..causal }),
        ("learned key of one head", SelfAttentionConfig { add_bias_kv: true, ..with_kv(1) }),
        ("everything", everything(HEADS)),
        ("everything with two key heads", everything(2)),
    ]
}

/// A step of a layer or of a rank's part.
fn train(layer: &SelfAttention, x: &Tensor, options: &ForwardOptions) -> Result<Step> {
    layer.set_dropout_calls(3);
    let parameters = layer.parameters().into_iter().map(|(name, tensor)| (name.to_string(), tensor));
    step(x, parameters, |x| Ok(layer.forward_with(x, options)?.output))
}

fn input(config: &SelfAttentionConfig, dtype: DType) -> Result<Tensor> {
    Ok(randn(9, (BATCH, LEN, config.embed_dim), dtype)?)
}

pub fn layer_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    for (name, config) in configs().into_iter().filter(|(_, config)| fits(ranks, config)) {
        for (dtype, backend) in
            [(DType::F64, Backend::Auto), (DType::F32, Backend::Auto), (DType::F64, Backend::Reference)]
        {
            let layer = self_attention(&config, dtype)?;
            let (x, options) = (input(&config, dtype)?, ForwardOptions { backend, first_sequence: 5, ..training() });
            let expected = train(&layer, &x, &options)?;
            let part = layer.shard(ranks)?;
            assert_eq!(part.config(), &config);
            assert_eq!(part.vars().len(), layer.vars().len());
            let what = format!("{name}, {dtype:?}, {backend:?}, {} ranks", ranks.size());
            assert_part(&what, &train(&part, &x, &options)?, &expected, |name, x| own(ranks, &config, name, x));
            // Again, from other variables.
            let again = train(&part.trainable()?, &x, &options)?;
            assert_part(&what, &again, &expected, |name, x| own(ranks, &config, name, x));
        }
    }
    Ok(())
}

/// Masks and biases are those of all heads.
pub fn masks_and_biases_are_those_of_the_whole(ranks: Ranks) -> Result<()> {
    let config = SelfAttentionConfig { dropout_p: 0.2, ..SelfAttentionConfig::new(2 * HEADS, HEADS) };
    if !fits(ranks, &config) {
        return Ok(());
    }
    let (layer, x) = (self_attention(&config, DType::F64)?, input(&config, DType::F64)?);
    let part = layer.shard(ranks)?;
    let bits = |dims: &[usize]| randn(50, dims.to_vec(), DType::F64)?.gt(-0.5);
    for mask in [
        Mask::from_tensor(&bits(&[BATCH, HEADS, LEN, LEN])?)?,
        Mask::from_tensor(&bits(&[HEADS, LEN, LEN])?)? & Mask::causal(),
        Mask::from_tensor(&bits(&[BATCH, 1, 1, LEN])?)?,
        Mask::from_padding_mask(&bits(&[BATCH, LEN])?)?,
        Mask::key_lengths(&[LEN, 3]),
    ] {
        let options = ForwardOptions { attn_mask: mask, ..training() };
        let expected = train(&layer, &x, &options)?;
        assert_part("mask", &train(&part, &x, &options)?, &expected, |name, x| own(ranks, &config, name, x));
    }
    for dims in [&[BATCH, HEADS, LEN, LEN][..], &[HEADS, LEN, LEN], &[LEN, LEN], &[BATCH, 1, LEN, LEN]] {
        let bias = Var::from_tensor(&randn(51, dims.to_vec(), DType::F64)?)?;
        let run = |layer: &SelfAttention| {
            layer.set_dropout_calls(3);
            let options = ForwardOptions { attn_bias: Some(bias.as_tensor().clone()), ..training() };
            let parameters = layer.parameters().into_iter().map(|(name, tensor)| (name.to_string(), tensor));
            step(&x, parameters.chain([("bias".to_string(), bias.as_tensor())]), |x| {
                Ok(layer.forward_with(x, &options)?.output)
            })
        };
        assert_part(&format!("bias {dims:?}"), &run(&part)?, &run(&layer)?, |name, x| own(ranks, &config, name, x));
    }
    Ok(())
}

/// Without tokens, every parameter still gets a gradient, of zeros.
pub fn empty_inputs_have_gradients_of_zeros(ranks: Ranks) -> Result<()> {
    for kv_heads in [HEADS, 1] {
        let config = with_kv(kv_heads);
        if !fits(ranks, &config) {
            continue;
        }
        let layer = self_attention(&config, DType::F32)?;
        for dims in [(2, 0, 2 * HEADS), (0, 3, 2 * HEADS)] {
            let x = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
            let (got, expected) = (train(&layer.shard(ranks)?, &x, &training())?, train(&layer, &x, &training())?);
            assert_part("empty", &got, &expected, |name, x| own(ranks, &config, name, x));
        }
    }
    Ok(())
}

/// What a rank returns of its heads.
pub fn weights_are_those_of_the_rank_s_heads(ranks: Ranks) -> Result<()> {
    let config = with_kv(HEADS);
    if !fits(ranks, &config) {
        return Ok(());
    }
    let (layer, x) = (self_attention(&config, DType::F64)?, input(&config, DType::F64)?);
    let options = ForwardOptions { return_weights: true, return_logsumexp: true, ..Default::default() };
    let (whole, part) = (layer.forward_with(&x, &options)?, layer.shard(ranks)?.forward_with(&x, &options)?);
    let heads = HEADS / ranks.size();
    for (got, all) in [(part.weights, whole.weights), (part.logsumexp, whole.logsumexp)] {
        assert_close(&got.unwrap(), &all.unwrap().narrow(1, ranks.rank() * heads, heads)?, 1e-12, "of some heads");
    }
    assert_close(&part.output, &whole.output, 1e-12, "output");
    Ok(())
}

pub fn decoding_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    for kv_heads in [HEADS, 1] {
        let config = SelfAttentionConfig { rotary: Some(RotaryConfig::default()), alibi: true, ..with_kv(kv_heads) };
        if !fits(ranks, &config) {
            continue;
        }
        let (layer, x) = (self_attention(&config, DType::F64)?, input(&config, DType::F64)?);
        let part = layer.shard(ranks)?;
        let mut caches = [layer.kv_cache(BATCH)?, part.kv_cache(BATCH)?];
        for (first, len) in [(0, 4), (4, 1), (5, 2)] {
            let x = x.narrow(1, first, len)?;
            let [whole, own] = &mut caches;
            let (expected, got) = (layer.forward_cached(&x, whole)?, part.forward_cached(&x, own)?);
            assert_close(&got, &expected, 1e-12, "decoding");
        }
    }
    Ok(())
}

pub fn cross_attention_is_that_of_one_process(ranks: Ranks) -> Result<()> {
    for kv_heads in [HEADS, 1] {
        let plain = SelfAttentionConfig { is_causal: false, dropout_p: 0.3, ..with_kv(kv_heads) };
        let config =
            SelfAttentionConfig { kv_dim: Some(5), value_input_dim: Some(3), qk_norm_eps: Some(1e-4), ..plain };
        if !fits(ranks, &config) {
            continue;
        }
        let layer = cross_attention(&config, DType::F64)?;
        let x = input(&config, DType::F64)?;
        let key = Var::from_tensor(&randn(11, (BATCH, 5, 5), DType::F64)?)?;
        let value = Var::from_tensor(&randn(12, (BATCH, 5, 3), DType::F64)?)?;
        let run = |layer: &CrossAttention, is_projected: bool| {
            layer.set_dropout_calls(3);
            let parameters = layer.parameters().into_iter().map(|(name, tensor)| (name.to_string(), tensor));
            let memories = [("key".to_string(), key.as_tensor()), ("value".to_string(), value.as_tensor())];
            step(&x, parameters.chain(memories), |x| match is_projected {
                true => {
                    Ok(layer.forward_projected_with(x, &layer.project_key_value(&key, &value)?, &training())?.output)
                }
                false => Ok(layer.forward_key_value(x, &key, &value, &training())?.output),
            })
        };
        let part = layer.shard(ranks)?;
        for is_projected in [false, true] {
            let (got, expected) = (run(&part, is_projected)?, run(&layer, is_projected)?);
            assert_part("cross-attention", &got, &expected, |name, x| own(ranks, &config, name, x));
        }
    }
    Ok(())
}

/// Every rank has the same bits, in every run.
pub fn runs_of_layers_have_the_same_bits(ranks: Ranks) -> Result<()> {
    let (_, config) = configs().pop().unwrap();
    if !fits(ranks, &config) {
        return Ok(());
    }
    let (layer, x) = (self_attention(&config, DType::F32)?, input(&config, DType::F32)?);
    let run = || train(&layer.shard(ranks)?, &x, &training());
    let (first, second) = (run()?, run()?);
    assert_same_bits(&first.output, &second.output, "output");
    for ((name, first), (_, second)) in first.gradients.iter().zip(&second.gradients) {
        assert_same_bits(first, second, name);
        if ["x", "o_proj.bias", "q_norm.weight", "k_norm.weight"].contains(&name.as_str()) {
            for other in ranks.all_gather(first)? {
                assert_same_bits(first, &other, name);
            }
        }
    }
    for other in ranks.all_gather(&first.output)? {
        assert_same_bits(&first.output, &other, "output of another rank");
    }
    Ok(())
}

/// A gathered layer has the bits of the whole one, and its rotary embedding, slopes and dropout.
pub fn gathered_layer_is_the_whole(ranks: Ranks) -> Result<()> {
    for (name, config) in configs().into_iter().filter(|(_, config)| fits(ranks, config)) {
        let (layer, x) = (self_attention(&config, DType::F32)?, input(&config, DType::F32)?);
        let gathered = layer.shard(ranks)?.gather()?;
        assert_eq!(gathered.to_bytes()?, layer.to_bytes()?, "{name}");
        assert_eq!(gathered.vars().len(), layer.vars().len());
        let (got, expected) = (train(&gathered, &x, &training())?, train(&layer, &x, &training())?);
        assert_same_bits(&got.output, &expected.output, name);
    }
    Ok(())
}

pub fn gathered_layer_has_the_rotary_embedding_of_its_parts(ranks: Ranks) -> Result<()> {
    let config = with_kv(HEADS);
    if !fits(ranks, &config) {
        return Ok(());
    }
    let rotary = RotaryConfig { base: 500.0, ..Default::default() };
    let part = self_attention(&config, DType::F32)?.shard(ranks)?;
    let part = part.with_rotary(RotaryEmbedding::new(&rotary, config.head_dim())?)?;
    assert_eq!(part.config().rotary, Some(rotary.clone()));
    let (x, gathered) = (input(&config, DType::F32)?, part.gather()?);
    assert_close(&gathered.forward(&x)?, &part.forward(&x)?, 1e-5, "output");
    assert_eq!(SelfAttention::from_bytes(&gathered.to_bytes()?, &Device::Cpu)?.config().rotary, Some(rotary));
    Ok(())
}

/// Scores of the first head overflow, which one operation doesn't serve. The ranks with the other heads have to go the same way, or their
/// sums of the gradients of the shared key head would come in another order.
pub fn scores_of_one_rank_may_overflow(ranks: Ranks) -> Result<()> {
    let config = with_kv(1);
    if !fits(ranks, &config) {
        return Ok(());
    }
    let layer = self_attention(&config, DType::F32)?;
    for (name, var) in layer.parameters().into_iter().map(|(name, _)| name).zip(layer.vars()) {
        match name {
            "q_proj.weight" => {
                let factors: Vec<f32> = (0..2 * HEADS).map(|row| if row < 2 { 1e29 } else { 1.0 }).collect();
                var.set(&var.broadcast_mul(&Tensor::from_vec(factors, (2 * HEADS, 1), &Device::Cpu)?)?)?;
            }
            "k_proj.weight" => var.set(&(var.as_tensor() * 1e10)?)?,
            _ => {}
        }
    }
    let x = input(&config, DType::F32)?;
    let (mut got, mut expected) = (train(&layer.shard(ranks)?, &x, &training())?, train(&layer, &x, &training())?);
    // The gradients of query and key are rounding: one weight of each row is 1.
    for step in [&mut got, &mut expected] {
        step.gradients.retain(|(name, _)| name.starts_with("v_proj") || name.starts_with("o_proj"));
        assert_eq!(step.gradients.len(), 4);
    }
    assert_part("overflow", &got, &expected, |name, whole| own(ranks, &config, name, whole));
    // The fused path refuses them, on every rank.
    let options = ForwardOptions { backend: Backend::Fused, ..Default::default() };
    assert!(layer.shard(ranks)?.forward_with(&x, &options).is_err());
    ranks.agree("what comes next", "the same")
}

/// Parts of constants are constants, and parts hold copies.
pub fn parts_are_copies(ranks: Ranks) -> Result<()> {
    let config = with_kv(HEADS);
    if !fits(ranks, &config) {
        return Ok(());
    }
    let layer = self_attention(&config, DType::F32)?;
    let part = layer.shard(ranks)?;
    let tensors = layer.parameters().into_iter().map(|(name, x)| (name.to_string(), x.detach())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let constants = SelfAttention::new(&config, vb)?.shard(ranks)?;
    assert!(constants.vars().is_empty() && constants.gather()?.vars().is_empty());
    let x = input(&config, DType::F32)?;
    let expected = constants.forward(&x)?;
    assert!(!expected.track_op());
    for var in layer.vars() {
        var.set(&var.zeros_like()?)?;
    }
    assert_same_bits(&part.forward(&x)?.detach(), &expected, "part");
    Ok(())
}

/// A fresh layer's part has the numbers that one process would start with.
pub fn initial_parameters_are_those_of_one_process(ranks: Ranks) -> Result<()> {
    let config = SelfAttentionConfig { seed: 5, ..with_kv(HEADS) };
    if !fits(ranks, &config) {
        return Ok(());
    }
    let new = || SelfAttention::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu).pp("a"));
    let (whole, part) = (new()?, new()?.shard(ranks)?);
    for ((name, whole), (_, part)) in whole.parameters().into_iter().zip(part.parameters()) {
        assert_same_bits(&own(ranks, &config, name, whole)?.contiguous()?, part, name);
    }
    Ok(())
}

/// The share of a rank's parameters.
pub fn memory_of_parameters_is_shared(ranks: Ranks) -> Result<()> {
    let config = SelfAttentionConfig { out_bias: false, ..with_kv(HEADS) };
    if !fits(ranks, &config) {
        return Ok(());
    }
    let layer = self_attention(&config, DType::F32)?;
    let count = |layer: &SelfAttention| layer.parameters().iter().map(|(_, x)| x.elem_count()).sum::<usize>();
    let part = layer.shard(ranks)?;
    assert_eq!(count(&part) * ranks.size(), count(&layer));
    // No more is kept than that.
    for (name, tensor) in part.parameters() {
        assert_eq!(tensor.layout().start_offset(), 0, "{name}");
        let (storage, _) = tensor.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else { panic!() };
        assert_eq!(storage.as_slice::<f32>()?.len(), tensor.elem_count(), "{name}");
    }
    Ok(())
}

/// Half types: the ranks' sums are rounded once more than those of one process.
pub fn half_types_are_close(ranks: Ranks) -> Result<()> {
    let config = with_kv(HEADS);
    if !fits(ranks, &config) {
        return Ok(());
    }
    for (dtype, bound) in [(DType::BF16, 2f64.powi(-6)), (DType::F16, 2f64.powi(-9))] {
        let (layer, x) = (self_attention(&config, dtype)?, input(&config, dtype)?);
        let (expected, got) = (train(&layer, &x, &training())?, train(&layer.shard(ranks)?, &x, &training())?);
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        assert_close(&wide(&got.output)?, &wide(&expected.output)?, bound, &format!("{dtype:?}"));
        let of_x = |step: &Step| wide(&step.gradients[0].1);
        assert_close(&of_x(&got)?, &of_x(&expected)?, bound, &format!("gradient of x, {dtype:?}"));
    }
    Ok(())
}
