//! A sequence that is decoded in pieces of any lengths has the outputs of the whole sequence.

use candle_attention::{Backend, ForwardOptions, Mask, Result, SelfAttentionConfig};
use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use crate::common::{assert_close, randn};
use crate::layers::self_attention;

use super::setup::{EMBED_DIM, config, configs, decode, tolerance};

fn backends() -> [ForwardOptions; 2] {
    [Backend::Reference, Backend::Fused].map(|backend| ForwardOptions { backend, ..Default::default() })
}

#[test]
fn cached_equals_whole_for_every_config() -> Result<()> {
    for (name, config) in configs() {
        for dtype in [DType::F32, DType::F64] {
            let layer = self_attention(&config, dtype)?;
            let x = randn(2, (2, 19, EMBED_DIM), dtype)?;
            for options in backends() {
                let whole = layer.forward_with(&x, &options)?.output;
                for pieces in [&[19][..], &[7], &[], &[3, 5, 1, 6], &[2, 9]] {
                    let mut cache = layer.kv_cache(2)?;
                    let output = decode(&layer, &x, pieces, &mut cache, &options)?;
                    let what = format!("{name}, {dtype:?}, {:?}, {pieces:?}", options.backend);
                    assert_close(&output, &whole, tolerance(dtype), &what);
                    assert_eq!(cache.lengths(), [19, 19], "{what}");
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_chunking_equals_whole(
        which in 0..configs().len(),
        pieces in prop::collection::vec(0..9usize, 0..12),
        len in 1..40usize,
        seed in any::<u64>(),
    ) {
        let (name, config) = &configs()[which];
        let layer = self_attention(config, DType::F64).unwrap();
        let x = randn(seed, (2, len, EMBED_DIM), DType::F64).unwrap();
        let whole = layer.forward(&x).unwrap();
        let mut cache = layer.kv_cache(2).unwrap();
        let output = decode(&layer, &x, &pieces, &mut cache, &ForwardOptions::default()).unwrap();
        assert_close(&output, &whole, tolerance(DType::F64), name);
    }
}

/// The kernel for a few queries and at least 128 keys, over a cache that has grown more than once.
#[test]
fn long_cache_equals_whole_on_the_decode_kernel() -> Result<()> {
    for (name, config) in configs() {
        for dtype in [DType::F32, DType::F64] {
            let layer = self_attention(&config, dtype)?;
            let x = randn(3, (1, 400, EMBED_DIM), dtype)?;
            let options = ForwardOptions { backend: Backend::Fused, ..Default::default() };
            let whole = layer.forward_with(&x, &options)?.output;
            let output = decode(&layer, &x, &[130, 1, 2, 8, 120], &mut layer.kv_cache(1)?, &options)?;
            // The whole sequence is computed by another kernel, which sums 400 numbers in another order.
            assert_close(&output, &whole, 2.0 * tolerance(dtype), &format!("{name}, {dtype:?}"));
        }
    }
    Ok(())
}

#[test]
fn sequence_without_batch_axis_equals_one_with_it() -> Result<()> {
    let layer = self_attention(&config("everything"), DType::F64)?;
    let x = randn(2, (9, EMBED_DIM), DType::F64)?;
    let options = ForwardOptions { return_weights: true, return_logsumexp: true, ..Default::default() };
    let (mut one, mut batch) = (layer.kv_cache(1)?, layer.kv_cache(1)?);
    for (start, len) in [(0, 6), (6, 1), (7, 2)] {
        let x = x.narrow(0, start, len)?;
        let a = layer.forward_cached_with(&x, &mut one, &options)?;
        let b = layer.forward_cached_with(&x.unsqueeze(0)?, &mut batch, &options)?;
        assert_close(&a.output.unsqueeze(0)?, &b.output, 1e-15, "output");
        assert_close(&a.weights.unwrap().unsqueeze(0)?, &b.weights.unwrap(), 1e-15, "weights");
        assert_close(&a.logsumexp.unwrap().unsqueeze(0)?, &b.logsumexp.unwrap(), 1e-15, "log-sum-exp");
    }
    Ok(())
}

#[test]
fn weights_and_logsumexp_equal_those_of_the_whole() -> Result<()> {
    for (name, config) in configs() {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(2, (2, 8, EMBED_DIM), DType::F64)?;
        let options = ForwardOptions { return_weights: true, return_logsumexp: true, ..Default::default() };
        let whole = layer.forward_with(&x, &options)?;
        let mut cache = layer.kv_cache(2)?;
        layer.forward_cached(&x.narrow(1, 0, 6)?, &mut cache)?;
        let last = layer.forward_cached_with(&x.narrow(1, 6, 2)?, &mut cache, &options)?;
        // With a window only the last keys are held. The other keys have no weight.
        let weights = last.weights.expect("weights");
        let held = weights.dim(D::Minus1)?;
        let expected = whole.weights.expect("weights").narrow(2, 6, 2)?;
        assert_close(&weights, &expected.narrow(3, expected.dim(D::Minus1)? - held, held)?, 1e-12, name);
        if config.sliding_window.is_none() {
            assert_eq!(held, 8 + config.extra_keys(), "{name}");
        }
        let expected = whole.logsumexp.expect("log-sum-exp").narrow(2, 6, 2)?;
        assert_close(&last.logsumexp.expect("log-sum-exp"), &expected, 1e-12, name);
    }
    Ok(())
}

/// A mask and a bias over the whole sequence, from which each piece takes its rows.
#[test]
fn mask_and_bias_equal_their_rows_of_the_whole() -> Result<()> {
    let layer = self_attention(&config("alibi"), DType::F64)?;
    let x = randn(2, (2, 12, EMBED_DIM), DType::F64)?;
    let bias = randn(3, (4, 12, 12), DType::F64)?;
    let allowed: Vec<u8> = (0..144).map(|i| u8::from(i % 5 != 3)).collect();
    let allowed = Tensor::from_vec(allowed, (12, 12), &Device::Cpu)?;
    let rows = |start, len, keys| -> Result<ForwardOptions> {
        let table = Mask::from_tensor(&allowed.narrow(0, start, len)?.narrow(1, 0, keys)?)?;
        let attn_bias = Some(bias.narrow(1, start, len)?.narrow(2, 0, keys)?);
        // The last three positions and the first two keys.
        let attn_mask = table & (Mask::sliding_window(3) | Mask::prefix(2));
        Ok(ForwardOptions { attn_mask, attn_bias, ..Default::default() })
    };
    let whole = layer.forward_with(&x, &rows(0, 12, 12)?)?.output;
    let mut cache = layer.kv_cache(2)?;
    for (start, len) in [(0, 5), (5, 1), (6, 4), (10, 2)] {
        let options = rows(start, len, start + len)?;
        let output = layer.forward_cached_with(&x.narrow(1, start, len)?, &mut cache, &options)?.output;
        assert_close(&output, &whole.narrow(1, start, len)?, 1e-12, &format!("from {start}"));
    }
    Ok(())
}

#[test]
fn empty_batch_and_empty_pieces_give_empty_outputs() -> Result<()> {
    let layer = self_attention(&config("everything"), DType::F32)?;
    let mut cache = layer.kv_cache(0)?;
    assert_eq!(layer.forward_cached(&randn(1, (0, 3, EMBED_DIM), DType::F32)?, &mut cache)?.dims(), [0, 3, EMBED_DIM]);
    assert!(cache.is_empty());
    let mut cache = layer.kv_cache(2)?;
    assert_eq!(layer.forward_cached(&randn(1, (2, 0, EMBED_DIM), DType::F32)?, &mut cache)?.dims(), [2, 0, EMBED_DIM]);
    assert!(cache.is_empty());
    Ok(())
}

/// Earlier calls of a layer, with a cache or without, have no effect.
#[test]
fn two_caches_of_a_layer_know_nothing_of_each_other() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig { alibi: true, ..config("rotary, half split") }, DType::F64)?;
    let x = randn(2, (1, 10, EMBED_DIM), DType::F64)?;
    let y = randn(3, (1, 10, EMBED_DIM), DType::F64)?;
    let (mut of_x, mut of_y) = (layer.kv_cache(1)?, layer.kv_cache(1)?);
    for start in 0..5 {
        let output = layer.forward_cached(&x.narrow(1, start, 1)?, &mut of_x)?;
        let whole = layer.forward(&x)?.narrow(1, start, 1)?;
        assert_close(&output, &whole, 1e-12, &format!("x, {start}"));
        let output = layer.forward_cached(&y.narrow(1, 2 * start, 2)?, &mut of_y)?;
        assert_close(&output, &layer.forward(&y)?.narrow(1, 2 * start, 2)?, 1e-12, &format!("y, {start}"));
    }
    Ok(())
}
