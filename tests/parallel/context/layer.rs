//! `SelfAttention` over several ranks: outputs, the gradient of the input, and those of all parameters, which are summed over the ranks.

use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::rotary::{Pairing, RotaryConfig};
use candle_attention::{CrossAttention, Error, ForwardOptions, Mask, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use super::setup::{ORDERS, RANKS, error, ids};
use crate::common::{assert_close, randn, var};
use crate::layers::self_attention;

const BATCH: usize = 2;
const LEN: usize = 19;

fn configs(heads: usize, kv_heads: usize) -> Vec<(&'static str, SelfAttentionConfig)> {
    let plain = SelfAttentionConfig { num_kv_heads: Some(kv_heads), ..SelfAttentionConfig::new(4 * heads, heads) };
    let rotary = Some(RotaryConfig { pairing: Pairing::Interleaved, ..RotaryConfig::default() });
    vec![
        ("plain", plain.clone()),
        ("causal with rotary", SelfAttentionConfig { is_causal: true, rotary: rotary.clone(), ..plain.clone() }),
        ("dropout", SelfAttentionConfig { dropout_p: 0.4, is_causal: true, rotary: rotary.clone(), ..plain.clone() }),
        ("window", SelfAttentionConfig { sliding_window: Some(4), is_causal: true, rotary, ..plain.clone() }),
        (
            "norm, sinks and alibi",
            SelfAttentionConfig { qk_norm_eps: Some(1e-6), sinks: true, alibi: true, is_causal: true, ..plain },
        ),
    ]
}

/// The layer on one process, or this rank's part of it: output, gradient of the input, gradients of the parameters.
fn step(layer: &SelfAttention, x: &Tensor, options: &ForwardOptions) -> Result<Vec<Tensor>> {
    layer.set_dropout_calls(3);
    let shard = |x: &Tensor| match &options.parallel {
        Some(parallel) => parallel.split.shard(x, 1, parallel.communicator.rank()),
        None => Ok(x.clone()),
    };
    let grad = shard(&randn(8, x.shape(), x.dtype())?)?;
    let x = Var::from_tensor(&shard(x)?.contiguous()?)?;
    let output = layer.forward_with(&x, options)?.output;
    let grads = (&output * grad)?.sum_all()?.backward()?;
    let vars = layer.vars();
    let of_vars = [x].into_iter().chain(vars).map(|var| grads.get(&var).expect("a gradient").clone());
    Ok([output.detach()].into_iter().chain(of_vars).collect())
}

/// Panics unless ranks give what one process gives.
fn check(
    name: &str,
    config: &SelfAttentionConfig,
    dtype: DType,
    split: Split,
    scheme: Scheme,
    options: &ForwardOptions,
) {
    let layer = self_attention(config, dtype).unwrap();
    let x = randn(9, (BATCH, split.len(), config.embed_dim), dtype).unwrap();
    let expected = step(&layer, &x, options).unwrap();
    let ranks = threads(split.ranks(), |communicator| {
        // Variables of its own for every rank, as in processes of their own.
        let layer = layer.trainable()?;
        let own = |ids: &Tensor| split.shard(ids, 0, communicator.rank());
        let position_ids = options.position_ids.as_ref().map(own).transpose()?;
        let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme });
        step(&layer, &x, &ForwardOptions { parallel, position_ids, ..options.clone() })
    });
    let ranks = ranks.unwrap_or_else(|error| panic!("{name}, {split:?}: {error}"));
    let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
    for i in 0..expected.len() {
        let parts: Vec<_> = ranks.iter().map(|results| results[i].clone()).collect();
        let whole = match i {
            0 | 1 => split.join(&parts, 1).unwrap(),
            _ => Tensor::stack(&parts, 0).unwrap().sum(0).unwrap(),
        };
        assert_close(&whole, &expected[i], tolerance, &format!("{name}, result {i}, {split:?}, {scheme:?}, {dtype:?}"));
    }
}

#[test]
fn context_layer_over_a_ring_is_the_layer() {
    for ranks in RANKS {
        for (order, (name, config)) in
            ORDERS.into_iter().flat_map(|order| configs(4, 2).into_iter().map(move |x| (order, x)))
        {
            let split = Split::new(LEN, ranks, order).unwrap();
            let options = ForwardOptions { train: true, ..Default::default() };
            check(name, &config, DType::F64, split, Scheme::Ring, &options);
            check(name, &config, DType::F32, split, Scheme::Ring, &options);
        }
    }
}

#[test]
fn context_layer_over_ulysses_is_the_layer() {
    for ranks in RANKS {
        for (name, config) in configs(2 * ranks, ranks) {
            let split = Split::new(LEN, ranks, Order::ZigZag).unwrap();
            let options = ForwardOptions { train: true, ..Default::default() };
            check(name, &config, DType::F64, split, Scheme::Ulysses, &options);
            check(name, &config, DType::F32, split, Scheme::Ulysses, &options);
        }
    }
}

#[test]
fn context_layer_with_few_tokens_is_the_layer() {
    for (len, ranks) in [(1, 3), (3, 7), (2, 2)] {
        for (name, config) in configs(ranks, 1) {
            for scheme in [Scheme::Ring, Scheme::Ulysses] {
                let split = Split::new(len, ranks, Order::ZigZag).unwrap();
                check(name, &config, DType::F64, split, scheme, &ForwardOptions { train: true, ..Default::default() });
            }
        }
    }
}

#[test]
fn context_layer_takes_masks_and_positions_of_its_call() {
    let (_, config) = configs(4, 2).remove(1);
    let split = Split::new(LEN, 3, Order::ZigZag).unwrap();
    let positions = ids((0..LEN).map(|i| i % 7)).unwrap();
    let table = randn(10, (BATCH, LEN, LEN), DType::F64).unwrap().gt(-0.3).unwrap();
    for options in [
        ForwardOptions { position_offset: 5, ..Default::default() },
        ForwardOptions { position_ids: Some(positions), attn_mask: Mask::documents(&[7, 7, 5]), ..Default::default() },
        ForwardOptions { attn_mask: Mask::from_tensor(&table).unwrap(), ..Default::default() },
        ForwardOptions { attn_bias: Some(randn(11, (LEN, LEN), DType::F64).unwrap()), ..Default::default() },
    ] {
        check("options", &config, DType::F64, split, Scheme::Ring, &options);
    }
}

/// Parameters get a narrowed gradient from each rank, which are summed in f64 here.
#[test]
fn context_layer_in_half_types_is_as_close_as_one_process() {
    let (_, config) = configs(4, 2).remove(1);
    let split = Split::new(67, 4, Order::ZigZag).unwrap();
    let options = ForwardOptions::default();
    for dtype in [DType::BF16, DType::F16] {
        let layer = self_attention(&config, dtype).unwrap();
        let x = randn(9, (BATCH, split.len(), config.embed_dim), dtype).unwrap();
        // The same parameters, in f64.
        let exact = self_attention(&config, DType::F64).unwrap();
        for (exact, own) in exact.vars().iter().zip(layer.vars()) {
            exact.set(&own.to_dtype(DType::F64).unwrap()).unwrap();
        }
        let exact = step(&exact, &x.to_dtype(DType::F64).unwrap(), &options).unwrap();
        let whole = step(&layer, &x, &options).unwrap();
        for scheme in [Scheme::Ring, Scheme::Ulysses] {
            let ranks = threads(4, |communicator| {
                let layer = layer.trainable()?;
                let parallel = Some(ContextParallel { communicator, split, scheme });
                step(&layer, &x, &ForwardOptions { parallel, ..options.clone() })
            });
            let ranks = ranks.unwrap();
            for i in 0..exact.len() {
                let parts: Vec<_> = ranks.iter().map(|results| results[i].to_dtype(DType::F64).unwrap()).collect();
                let (parts, most) = match i {
                    0 | 1 => (split.join(&parts, 1).unwrap(), 1.1),
                    _ => (Tensor::stack(&parts, 0).unwrap().sum(0).unwrap(), 1.5),
                };
                let [parts, whole] = [&parts, &whole[i]].map(|x| error(x, &exact[i]).unwrap());
                assert!(parts <= most * whole, "result {i}, {dtype:?}, {scheme:?}: {parts:e}, not {whole:e}");
            }
        }
    }
}

/// A block's output, and the gradients of its input and its parameters.
fn block_step(block: &TransformerBlock, x: &Tensor, options: &ForwardOptions) -> Result<Vec<Tensor>> {
    let x = Var::from_tensor(&x.contiguous()?)?;
    let output = block.forward_with(&x, options)?.output;
    let grads = output.sqr()?.sum_all()?.backward()?;
    let of_vars = [x].into_iter().chain(block.vars()).map(|var| grads.get(&var).expect("a gradient").clone());
    Ok([output.detach()].into_iter().chain(of_vars).collect())
}

#[test]
fn context_block_is_the_block() -> Result<()> {
    let rotary = Some(RotaryConfig::default());
    let attention = SelfAttentionConfig { is_causal: true, rotary, ..SelfAttentionConfig::new(12, 6) };
    let config = TransformerBlockConfig::new(attention, MlpConfig::swiglu(12, 20), NormConfig::rms(1e-5));
    let block = TransformerBlock::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu))?;
    let x = randn(12, (BATCH, LEN, 12), DType::F64)?;
    let split = Split::new(LEN, 3, Order::ZigZag)?;
    let expected = block_step(&block, &x, &ForwardOptions::default())?;
    for (scheme, recompute) in
        [(Scheme::Ring, false), (Scheme::Ring, true), (Scheme::Ulysses, false), (Scheme::Ulysses, true)]
    {
        let ranks = threads(3, |communicator| {
            let block = block.trainable()?.with_recompute(recompute);
            let x = split.shard(&x, 1, communicator.rank())?;
            let parallel = Some(ContextParallel { communicator, split, scheme });
            block_step(&block, &x, &ForwardOptions { parallel, ..Default::default() })
        })?;
        for (i, expected) in expected.iter().enumerate() {
            let parts: Vec<_> = ranks.iter().map(|results| results[i].clone()).collect();
            let whole = match i {
                0 | 1 => split.join(&parts, 1)?,
                _ => Tensor::stack(&parts, 0)?.sum(0)?,
            };
            assert_close(&whole, expected, 1e-12, &format!("result {i}, {scheme:?}, recompute: {recompute}"));
        }
    }
    Ok(())
}

#[test]
fn context_is_refused_where_it_is_not_served() -> Result<()> {
    let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let (layer, cross) =
        (SelfAttention::new(&config, vb())?, CrossAttention::new(&SelfAttentionConfig::new(8, 2), vb())?);
    let extra = SelfAttention::new(&SelfAttentionConfig { add_zero_attn: true, ..config.clone() }, vb())?;
    let split = Split::new(4, 2, Order::Contiguous)?;
    let texts = threads(2, |communicator| {
        let x = var(13, (1, 2, 8), DType::F32)?;
        let parallel = Some(ContextParallel { communicator, split, scheme: Scheme::Ring });
        let options = ForwardOptions { parallel, ..Default::default() };
        let error = |result: Result<candle_attention::ForwardOutput, Error>| result.unwrap_err().to_string();
        Ok([
            error(layer.forward_cached_with(&x, &mut layer.kv_cache(1)?, &options)),
            error(cross.forward_with(&x, &x, &options)),
            error(extra.forward_with(&x, &options)),
            error(layer.forward_with(&x, &ForwardOptions { return_weights: true, ..options.clone() })),
            error(layer.forward_with(&x.narrow(1, 0, 1)?, &options)),
        ])
    })?;
    let expected = ["a cache", "cross-attention", "extra keys", "weights or scores", "2 tokens that the split gives"];
    for text in texts {
        text.iter().zip(expected).for_each(|(text, expected)| assert!(text.contains(expected), "{text}"));
    }
    Ok(())
}
