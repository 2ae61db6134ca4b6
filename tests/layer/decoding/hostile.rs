//! Caches and inputs that don't fit: each gives an error that names what was expected and what was found, and the cache
//! is unchanged.

use candle_attention::{ForwardOptions, KvCache, Mask, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{assert_close, randn};
use crate::layers::{assert_error_says, self_attention};

use super::setup::{EMBED_DIM, config};

fn input(dims: &[usize]) -> Result<Tensor> {
    Ok(randn(1, dims, DType::F32)?)
}

/// Checks that `call` fails on a cache with two sequences of 6 and 3 tokens, and that decoding can continue afterwards.
#[track_caller]
fn fails(config: &SelfAttentionConfig, call: impl Fn(&SelfAttention, &mut KvCache) -> Result<()>, parts: &[&str]) {
    let layer = self_attention(config, DType::F32).unwrap();
    let x = randn(2, (2, 8, EMBED_DIM), DType::F32).unwrap();
    let prompts = x.narrow(1, 0, 6).unwrap();
    let mut cache = layer.kv_cache(2).unwrap().with_max_len(20);
    layer.prefill(&prompts, &[6, 3], &mut cache).unwrap();
    let capacity = cache.capacity();

    let error = call(&layer, &mut cache).expect_err("an error");
    assert_error_says(Err::<(), _>(error), parts);
    assert_eq!((cache.lengths(), cache.capacity()), (&[6, 3][..], capacity));
    let step = layer.forward_cached(&x.narrow(1, 6, 1).unwrap(), &mut cache).unwrap();
    let whole = layer.forward(&x).unwrap();
    assert_close(&step.get(0).unwrap(), &whole.get(0).unwrap().narrow(0, 6, 1).unwrap(), 1e-6, "the next token");
}

#[test]
fn batch_of_another_size_is_refused() {
    for dims in [&[1, 1, EMBED_DIM][..], &[3, 1, EMBED_DIM], &[0, 1, EMBED_DIM], &[1, EMBED_DIM]] {
        let batch = if dims.len() == 2 { 1 } else { dims[0] };
        let call = |layer: &SelfAttention, cache: &mut KvCache| layer.forward_cached(&input(dims)?, cache).map(drop);
        fails(&config("plain"), call, &["cache, sequences", &format!("expected {batch}, got 2")]);
    }
}

#[test]
fn input_that_does_not_fit_the_layer_is_refused() {
    let call = |dims: &'static [usize]| {
        move |layer: &SelfAttention, cache: &mut KvCache| layer.forward_cached(&input(dims)?, cache).map(drop)
    };
    fails(&config("plain"), call(&[2, 1, 7]), &["input", "(batch, len, 24)", "got [2, 1, 7]"]);
    fails(&config("plain"), call(&[2, 1, 1, 24]), &["input", "2 axes", "rank 4"]);
    let f64 = |layer: &SelfAttention, cache: &mut KvCache| {
        layer.forward_cached(&randn(1, (2, 1, EMBED_DIM), DType::F64)?, cache).map(drop)
    };
    fails(&config("plain"), f64, &["input", "expected dtype F32", "got F64"]);
}

/// The cache of one layer is given to another.
#[test]
fn cache_of_another_layer_is_refused() -> Result<()> {
    let plain = config("plain");
    let others = [
        (SelfAttentionConfig { num_kv_heads: Some(2), ..plain.clone() }, "cache, num_kv_heads: expected 2, got 4"),
        (
            SelfAttentionConfig { head_dim: Some(8), value_dim: Some(6), ..plain.clone() },
            "cache, head_dim: expected 8, got 6",
        ),
        (SelfAttentionConfig { value_dim: Some(3), ..plain.clone() }, "cache, value_dim: expected 3, got 6"),
        (
            SelfAttentionConfig { sliding_window: Some(5), ..plain.clone() },
            "cache, sliding_window: expected 5, got none",
        ),
    ];
    for (other, text) in others {
        let other = self_attention(&other, DType::F32)?;
        let call =
            |_: &SelfAttention, cache: &mut KvCache| other.forward_cached(&input(&[2, 1, EMBED_DIM])?, cache).map(drop);
        fails(&plain, call, &[text]);
    }
    let other = self_attention(&plain, DType::F64)?;
    let call = |_: &SelfAttention, cache: &mut KvCache| {
        other.forward_cached(&randn(1, (2, 1, EMBED_DIM), DType::F64)?, cache).map(drop)
    };
    fails(&plain, call, &["cache", "expected dtype F64", "got F32"]);
    Ok(())
}

#[test]
fn lengths_that_do_not_fit_the_prompts_are_refused() {
    let call = |lengths: &'static [usize]| {
        move |layer: &SelfAttention, cache: &mut KvCache| {
            layer.prefill(&input(&[2, 4, EMBED_DIM])?, lengths, cache).map(drop)
        }
    };
    fails(&config("plain"), call(&[4, 5]), &["cache, length", "at most the 4 tokens of the input", "got 5"]);
    fails(&config("plain"), call(&[usize::MAX, 1]), &["at most the 4 tokens"]);
    fails(&config("plain"), call(&[4]), &["cache, lengths: expected 2, got 1"]);
    fails(&config("plain"), call(&[4, 4, 4]), &["cache, lengths: expected 2, got 3"]);
    fails(&config("plain"), call(&[]), &["cache, lengths: expected 2, got 0"]);
}

#[test]
fn tokens_beyond_the_last_position_are_refused() {
    let call = |layer: &SelfAttention, cache: &mut KvCache| {
        layer.forward_cached(&input(&[2, 15, EMBED_DIM])?, cache).map(drop)
    };
    fails(&config("plain"), call, &["cache, tokens", "at most max_len 20", "got 21"]);
    let call = |layer: &SelfAttention, cache: &mut KvCache| {
        // Padding doesn't count as tokens.
        let mut copy = cache.select(&[0, 1])?;
        layer.prefill(&input(&[2, 17, EMBED_DIM])?, &[14, 17], &mut copy)?;
        layer.prefill(&input(&[2, 18, EMBED_DIM])?, &[0, 18], cache).map(drop)
    };
    fails(&config("plain"), call, &["cache, tokens", "at most max_len 20", "got 21"]);
}

#[test]
fn options_that_a_cache_can_not_serve_are_refused() {
    let call = |options: ForwardOptions| {
        move |layer: &SelfAttention, cache: &mut KvCache| {
            layer.forward_cached_with(&input(&[2, 1, EMBED_DIM])?, cache, &options).map(drop)
        }
    };
    let train = ForwardOptions { train: true, ..Default::default() };
    fails(&config("plain"), call(train), &["cache, train: expected false", "no gradient", "got true"]);
    let moved = ForwardOptions { position_offset: 3, ..Default::default() };
    fails(&config("plain"), call(moved), &["cache, position_offset: expected 0", "got 3"]);
    // This error is found only after keys and values have been written.
    let masked = ForwardOptions { attn_mask: Mask::key_lengths(&[1]), ..Default::default() };
    fails(&config("plain"), call(masked), &["key lengths", "2 sequences", "got 1"]);
    let biased =
        ForwardOptions { attn_bias: Some(Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap()), ..Default::default() };
    fails(&config("plain"), call(biased), &["attn_bias", "[2, 4, 1, 7]", "got [5]"]);
}

/// With sequences of different lengths and ALiBi the layer adds its own bias to the given one, and for extra keys it
/// extends the given one. The check comes before.
#[test]
fn bias_that_does_not_fit_is_refused_whatever_the_layer_adds_to_it() {
    for name in ["plain", "alibi", "alibi with sinks", "extra keys"] {
        let call = |bias: Tensor| {
            move |layer: &SelfAttention, cache: &mut KvCache| {
                let options = ForwardOptions { attn_bias: Some(bias.clone()), ..Default::default() };
                layer.forward_cached_with(&input(&[2, 1, EMBED_DIM])?, cache, &options).map(drop)
            }
        };
        for dtype in [DType::U8, DType::I64] {
            let integers = Tensor::zeros((1, 7), dtype, &Device::Cpu).unwrap();
            let expected = ["attn_bias", "F16, BF16, F32 or F64", &format!("got {dtype:?}")];
            fails(&config(name), call(integers), &expected);
        }
        for dims in [&[5][..], &[2, 7], &[3, 1, 1, 7], &[1, 1, 1, 1, 7], &[1, 2, 1, 7]] {
            let bias = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
            let expected = ["attn_bias", "(batch, num_heads, q_len, kv_len) = [2, 4, 1, 7]", &format!("got {dims:?}")];
            fails(&config(name), call(bias), &expected);
        }
    }
}

#[test]
fn operations_on_sequences_and_tokens_that_are_not_there_are_refused() {
    let plain = config("plain");
    fails(&plain, |_, cache| cache.select(&[0, 2]).map(drop), &["cache, sequence", "one of the 2", "got 2"]);
    fails(&plain, |_, cache| cache.truncate_each(&[6]), &["cache, lengths: expected 2, got 1"]);
    fails(&plain, |_, cache| cache.truncate_each(&[5, 4]), &["cache, length", "at most the 3 tokens", "got 4"]);
    fails(
        &plain,
        |_, cache| cache.truncate_each(&[usize::MAX, 0]),
        &["at most the 6 tokens", "got 18446744073709551615"],
    );
    fails(&plain, |_, cache| cache.reserve(usize::MAX), &["a tensor of shape"]);
    fails(&plain, |_, cache| cache.reserve(1 << 45), &["key-value cache", "bytes of memory"]);
}

/// The lengths of so many sequences don't fit into memory.
#[test]
fn batch_beyond_memory_is_refused() -> Result<()> {
    let layer = self_attention(&config("plain"), DType::F32)?;
    assert_error_says(layer.kv_cache(usize::MAX), &["lengths of the sequences", "bytes of memory"]);
    Ok(())
}

#[test]
fn layer_that_is_not_causal_has_no_cache() -> Result<()> {
    for sliding_window in [None, Some(3)] {
        let config = SelfAttentionConfig { sliding_window, ..SelfAttentionConfig::new(8, 2) };
        let layer = SelfAttention::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
        assert_error_says(layer.kv_cache(1), &["config, is_causal", "expected true", "got false"]);
    }
    Ok(())
}
