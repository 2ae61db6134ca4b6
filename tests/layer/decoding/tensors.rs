//! A cache that is filled from tensors goes on as the cache that they were read from.

use candle_attention::{KvCache, Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};

use crate::common::{assert_close, assert_same_bits, numbers, randn};
use crate::layers::{assert_error_says, self_attention};

use super::setup::{EMBED_DIM, config, configs};

#[test]
fn copied_cache_goes_on_with_the_same_numbers() -> Result<()> {
    for (name, config) in configs() {
        for lengths in [[9, 9, 9], [9, 4, 0]] {
            let layer = self_attention(&config, DType::F32)?;
            let x = randn(2, (3, 15, EMBED_DIM), DType::F32)?;
            let mut cache = layer.kv_cache(3)?;
            layer.prefill(&x.narrow(1, 0, 9)?, &lengths, &mut cache)?;
            let (key, value) = cache.key_value()?;
            let held = config.sliding_window.map_or(9, |window| window - 1);
            assert_eq!(key.dims(), [3, config.num_kv_heads(), held, config.head_dim()], "{name}");
            assert_eq!(value.dims(), [3, config.num_kv_heads(), held, config.value_dim()], "{name}");
            let mut copy = KvCache::from_tensors(&config, &key, &value, cache.lengths())?;
            assert_eq!((copy.lengths(), copy.batch()), (&lengths[..], 3), "{name}");
            for (start, len) in [(9, 1), (10, 3), (13, 2)] {
                let tokens = x.narrow(1, start, len)?;
                let expected = layer.forward_cached(&tokens, &mut cache)?;
                let output = layer.forward_cached(&tokens, &mut copy)?;
                let what = format!("{name}, {lengths:?}, {len} tokens");
                match config.sliding_window {
                    None => assert_same_bits(&output, &expected, &what),
                    // The copy holds fewer keys outside the window, so that the sums have another order.
                    Some(_) => assert_close(&output, &expected, 1e-5, &what),
                }
            }
            assert_eq!(copy.lengths(), cache.lengths(), "{name}");
        }
    }
    Ok(())
}

/// The layout is (batch, num_kv_heads, len, dim), and key `j` is that of token `j`.
#[test]
fn keys_and_values_are_those_of_the_tokens() -> Result<()> {
    let layer = self_attention(&config("grouped queries"), DType::F64)?;
    let x = randn(2, (2, 5, EMBED_DIM), DType::F64)?;
    let mut cache = layer.kv_cache(2)?;
    layer.forward_cached(&x.narrow(1, 0, 3)?, &mut cache)?;
    layer.forward_cached(&x.narrow(1, 3, 2)?, &mut cache)?;
    let (key, value) = cache.key_value()?;
    for (linear, cached, dim) in [(layer.k_proj(), key, 6), (layer.v_proj(), value, 5)] {
        let projected = x.broadcast_matmul(&linear.weight().t()?)?.broadcast_add(linear.bias().expect("a bias"))?;
        let by_head = projected.reshape((2, 5, 2, dim))?.transpose(1, 2)?;
        assert_close(&cached, &by_head, 1e-12, "keys or values");
    }
    Ok(())
}

/// The padding of a prompt may hold anything, but other programs would multiply it by a weight of 0.
#[test]
fn padding_is_read_out_as_zeros_and_is_not_read_in() -> Result<()> {
    let config = config("plain");
    let layer = self_attention(&config, DType::F32)?;
    let x = randn(2, (2, 5, EMBED_DIM), DType::F32)?;
    let nan = Tensor::full(f32::NAN, (1, 3, EMBED_DIM), &Device::Cpu)?;
    let short = Tensor::cat(&[&x.narrow(0, 1, 1)?.narrow(1, 0, 2)?, &nan], 1)?;
    let mut cache = layer.kv_cache(2)?;
    layer.prefill(&Tensor::cat(&[x.narrow(0, 0, 1)?, short], 0)?, &[5, 2], &mut cache)?;
    let (key, value) = cache.key_value()?;
    for x in [&key, &value] {
        assert!(numbers(&x.get(1)?.narrow(1, 2, 3)?)?.iter().all(|&x| x == 0.0));
    }

    let with_padding = |x: &Tensor| -> Result<Tensor> {
        let nan = (x.narrow(2, 2, 3)?.narrow(0, 1, 1)?.ones_like()? * f64::NAN)?;
        let short = Tensor::cat(&[&x.narrow(0, 1, 1)?.narrow(2, 0, 2)?, &nan], 2)?;
        Ok(Tensor::cat(&[x.narrow(0, 0, 1)?, short], 0)?)
    };
    let mut copy = KvCache::from_tensors(&config, &with_padding(&key)?, &with_padding(&value)?, &[5, 2])?;
    let token = randn(3, (2, 1, EMBED_DIM), DType::F32)?;
    let expected = layer.forward_cached(&token, &mut cache)?;
    assert_same_bits(&layer.forward_cached(&token, &mut copy)?, &expected, "the next token");
    Ok(())
}

/// The tensors are any views, and the cache doesn't write into them.
#[test]
fn tensors_and_cache_share_no_memory() -> Result<()> {
    let config = config("plain");
    let layer = self_attention(&config, DType::F32)?;
    // As a program with tokens before heads holds them.
    let key = randn(1, (2, 7, 4, 6), DType::F32)?.transpose(1, 2)?;
    let before = key.copy()?;
    let mut cache = KvCache::from_tensors(&config, &key, &key, &[3, 7])?;
    let (held, _) = cache.key_value()?;
    assert_same_bits(&held.get(1)?, &key.get(1)?.contiguous()?, "the longer sequence");
    cache.truncate(2)?;
    layer.forward_cached(&randn(2, (2, 4, EMBED_DIM), DType::F32)?, &mut cache)?;
    assert_same_bits(&key, &before, "the tensors given");
    assert_same_bits(&held.get(1)?, &before.get(1)?.contiguous()?, "the tensors read");
    Ok(())
}

/// A prompt in a cache without a window, given to a layer with one.
#[test]
fn window_takes_whole_sequences_or_their_last_tokens() -> Result<()> {
    let windowed = SelfAttentionConfig { sliding_window: Some(4), ..config("plain") };
    let (layer, plain) = (self_attention(&windowed, DType::F64)?, self_attention(&config("plain"), DType::F64)?);
    let x = randn(2, (2, 12, EMBED_DIM), DType::F64)?;
    let mut all = plain.kv_cache(2)?;
    plain.forward_cached(&x.narrow(1, 0, 8)?, &mut all)?;
    let (key, value) = all.key_value()?;
    let whole = layer.forward(&x)?.narrow(1, 8, 4)?;
    for len in [8, 5, 3] {
        let last = |x: &Tensor| x.narrow(2, 8 - len, len);
        let mut cache = KvCache::from_tensors(&windowed, &last(&key)?, &last(&value)?, &[8, 8])?;
        let output = layer.forward_cached(&x.narrow(1, 8, 4)?, &mut cache)?;
        assert_close(&output, &whole, 1e-12, &format!("the last {len} tokens"));
    }
    let too_few = key.narrow(2, 6, 2)?;
    let parts = ["cache, length", "at most the 2 tokens of the key", "sliding_window - 1 = 3", "got 8"];
    assert_error_says(KvCache::from_tensors(&windowed, &too_few, &too_few, &[8, 8]), &parts);
    Ok(())
}

#[test]
fn empty_caches_are_read_and_filled() -> Result<()> {
    for (name, config) in configs() {
        let layer = self_attention(&config, DType::F32)?;
        for batch in [0, 2] {
            let (key, value) = layer.kv_cache(batch)?.key_value()?;
            assert_eq!(key.dims(), [batch, config.num_kv_heads(), 0, config.head_dim()], "{name}");
            let mut cache = KvCache::from_tensors(&config, &key, &value, &vec![0; batch])?;
            assert!(cache.is_empty());
            let x = randn(1, (batch, 3, EMBED_DIM), DType::F32)?;
            assert_close(&layer.forward_cached(&x, &mut cache)?, &layer.forward(&x)?, 1e-6, name);
        }
    }
    Ok(())
}

#[test]
fn length_that_leaves_no_room_to_count_on_is_refused() -> Result<()> {
    let config = SelfAttentionConfig { is_causal: true, sliding_window: Some(3), ..SelfAttentionConfig::new(8, 2) };
    let key = randn(1, (1, 2, 4, 4), DType::F32)?;
    for length in [usize::MAX, usize::MAX - 1] {
        let cache = KvCache::from_tensors(&config, &key, &key, &[length]);
        assert_error_says(cache, &["length", &isize::MAX.to_string(), &length.to_string()]);
    }
    Ok(())
}

#[test]
fn tensors_that_do_not_fit_are_refused() -> Result<()> {
    let config = config("grouped queries");
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    let fails = |key: &Tensor, value: &Tensor, lengths: &[usize], parts: &[&str]| {
        assert_error_says(KvCache::from_tensors(&config, key, value, lengths), parts);
    };
    let (key, value) = (f32(&[2, 2, 4, 6]), f32(&[2, 2, 4, 5]));
    KvCache::from_tensors(&config, &key, &value, &[4, 0])?;
    fails(&f32(&[2, 4, 6]), &value, &[4, 0], &["key", "4 axes (batch, num_kv_heads, len, head_dim)", "rank 3"]);
    for dims in [&[2, 4, 4, 6][..], &[2, 2, 4, 5]] {
        fails(&f32(dims), &value, &[4, 0], &["key", "= [2, 2, 4, 6]", &format!("got {dims:?}")]);
    }
    for dims in [&[2, 2, 4, 6][..], &[2, 2, 3, 5], &[1, 2, 4, 5], &[2, 2, 4]] {
        fails(&key, &f32(dims), &[4, 0], &["value", "= [2, 2, 4, 5]", &format!("got {dims:?}")]);
    }
    let ints = zeros(&[2, 2, 4, 6], DType::U32);
    fails(&ints, &value, &[4, 0], &["key", "expected dtype F16, BF16, F32 or F64", "got U32"]);
    fails(&key, &zeros(&[2, 2, 4, 5], DType::F16), &[4, 0], &["value", "F32, that of key", "got F16"]);
    fails(&key, &value, &[4], &["cache, lengths: expected 2, got 1"]);
    fails(&key, &value, &[4, 5], &["cache, length: expected at most the 4 tokens of the key, got 5"]);
    fails(&key, &value, &[usize::MAX, 0], &["cache, length", "got 18446744073709551615"]);
    let view = f32(&[1, 1, 1, 1]).broadcast_as((2, 2, 1 << 44, 6))?;
    let value_view = f32(&[1, 1, 1, 1]).broadcast_as((2, 2, 1 << 44, 5))?;
    fails(&view, &value_view, &[1 << 44, 0], &["key-value cache", "bytes of memory"]);

    let other = SelfAttentionConfig { is_causal: false, ..config.clone() };
    assert_error_says(KvCache::from_tensors(&other, &key, &value, &[4, 0]), &["config, is_causal", "expected true"]);
    let other = SelfAttentionConfig { num_kv_heads: Some(3), ..config.clone() };
    assert_error_says(KvCache::from_tensors(&other, &key, &value, &[4, 0]), &["num_heads", "num_kv_heads 3"]);
    Ok(())
}
