//! The other operations on a cache.

use candle_attention::{ForwardOptions, KvCache, Result, SelfAttention};
use candle_core::{DType, Tensor};

use crate::common::{assert_close, randn};
use crate::layers::self_attention;

use super::setup::{EMBED_DIM, config, configs, decode};

fn filled(layer: &SelfAttention, x: &Tensor, len: usize) -> Result<KvCache> {
    let mut cache = layer.kv_cache(x.dim(0)?)?;
    layer.forward_cached(&x.narrow(1, 0, len)?, &mut cache)?;
    Ok(cache)
}

#[test]
fn new_cache_is_empty_and_takes_no_memory() -> Result<()> {
    let cache = self_attention(&config("plain"), DType::F32)?.kv_cache(3)?;
    assert!(cache.is_empty());
    assert_eq!((cache.batch(), cache.len(), cache.lengths(), cache.capacity()), (3, 0, &[0, 0, 0][..], 0));
    Ok(())
}

#[test]
fn capacity_doubles_and_is_not_asked_for_again() -> Result<()> {
    let layer = self_attention(&config("plain"), DType::F32)?;
    let x = randn(2, (1, 100, EMBED_DIM), DType::F32)?;
    let mut cache = filled(&layer, &x, 10)?;
    let mut capacities = vec![cache.capacity()];
    for start in 10..100 {
        layer.forward_cached(&x.narrow(1, start, 1)?, &mut cache)?;
        capacities.push(cache.capacity());
    }
    capacities.dedup();
    assert_eq!(capacities, [10, 20, 40, 80, 160]);
    Ok(())
}

#[test]
fn reserve_makes_room_and_changes_nothing_else() -> Result<()> {
    for (name, config) in configs() {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(2, (2, 30, EMBED_DIM), DType::F64)?;
        let whole = layer.forward(&x)?;
        let mut cache = layer.kv_cache(2)?;
        cache.reserve(7)?;
        assert_eq!((cache.capacity(), cache.len()), (7, 0), "{name}");
        let first = layer.forward_cached(&x.narrow(1, 0, 7)?, &mut cache)?;
        cache.reserve(50)?;
        assert_eq!(cache.lengths(), [7, 7], "{name}");
        let capacity = cache.capacity();
        assert!(capacity >= 57, "{name}: {capacity}");
        cache.reserve(50)?;
        let rest = decode(&layer, &x.narrow(1, 7, 23)?, &[4], &mut cache, &ForwardOptions::default())?;
        assert_eq!(cache.capacity(), capacity, "{name}");
        assert_close(&Tensor::cat(&[first, rest], 1)?, &whole, 1e-12, name);
    }
    Ok(())
}

#[test]
fn reset_cache_is_as_good_as_new() -> Result<()> {
    for (name, config) in configs() {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(2, (2, 12, EMBED_DIM), DType::F64)?;
        let mut cache = filled(&layer, &randn(3, (2, 12, EMBED_DIM), DType::F64)?, 12)?;
        let capacity = cache.capacity();
        cache.reset();
        assert!(cache.is_empty() && cache.capacity() == capacity, "{name}");
        let output = decode(&layer, &x, &[5], &mut cache, &ForwardOptions::default())?;
        assert_close(&output, &layer.forward(&x)?, 1e-12, name);
    }
    Ok(())
}

#[test]
fn truncated_cache_goes_on_as_if_nothing_had_followed() -> Result<()> {
    for (name, config) in configs().into_iter().filter(|(_, config)| config.sliding_window.is_none()) {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(2, (2, 12, EMBED_DIM), DType::F64)?;
        let whole = layer.forward(&x)?;
        let mut cache = filled(&layer, &x, 5)?;
        layer.forward_cached(&randn(3, (2, 6, EMBED_DIM), DType::F64)?, &mut cache)?;
        cache.truncate(20)?;
        assert_eq!(cache.lengths(), [11, 11], "{name}: no sequence is longer");
        cache.truncate(5)?;
        let rest = layer.forward_cached(&x.narrow(1, 5, 7)?, &mut cache)?;
        assert_close(&rest, &whole.narrow(1, 5, 7)?, 1e-12, name);
        cache.truncate_each(&[9, 2])?;
        assert_eq!(cache.lengths(), [9, 2], "{name}");
        cache.truncate(4)?;
        assert_eq!(cache.lengths(), [4, 2], "{name}");
    }
    Ok(())
}

#[test]
fn selected_sequences_go_on_as_those_they_were_taken_from() -> Result<()> {
    for (name, config) in configs() {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(2, (3, 12, EMBED_DIM), DType::F64)?;
        let whole = layer.forward(&x)?;
        let cache = filled(&layer, &x, 9)?;
        for sequences in [&[2, 0, 0, 1][..], &[1], &[]] {
            let mut selected = cache.select(sequences)?;
            assert_eq!(selected.lengths(), vec![9; sequences.len()], "{name}");
            let indices: Vec<_> = sequences.iter().map(|&b| b as u32).collect();
            let indices = Tensor::from_vec(indices, sequences.len(), x.device())?;
            let last = x.narrow(1, 9, 3)?.contiguous()?.index_select(&indices, 0)?;
            let output = layer.forward_cached(&last, &mut selected)?;
            let expected = whole.narrow(1, 9, 3)?.contiguous()?.index_select(&indices, 0)?;
            assert_close(&output, &expected, 1e-12, &format!("{name}, {sequences:?}"));
        }
    }
    Ok(())
}

/// A beam must not write into the cache that it was selected from.
#[test]
fn selected_cache_shares_no_memory() -> Result<()> {
    let layer = self_attention(&config("plain"), DType::F64)?;
    let x = randn(2, (1, 8, EMBED_DIM), DType::F64)?;
    let mut cache = filled(&layer, &x, 5)?;
    cache.reserve(10)?;
    let mut other = cache.select(&[0])?;
    let step = |cache: &mut KvCache, x: &Tensor| layer.forward_cached(x, cache);
    step(&mut cache, &x.narrow(1, 5, 2)?)?;
    step(&mut other, &randn(3, (1, 2, EMBED_DIM), DType::F64)?)?;
    let last = step(&mut cache, &x.narrow(1, 7, 1)?)?;
    assert_close(&last, &layer.forward(&x)?.narrow(1, 7, 1)?, 1e-12, "the first");
    Ok(())
}
