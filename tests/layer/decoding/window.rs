//! With a sliding window, the memory of a cache is bounded by the window.

use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::DType;

use crate::common::{assert_close, randn};
use crate::layers::{assert_error_says, self_attention};

use super::setup::{EMBED_DIM, config, decode};

fn windowed(width: usize) -> SelfAttentionConfig {
    SelfAttentionConfig { sliding_window: Some(width), ..config("rotary, half split") }
}

#[test]
fn memory_is_bounded_by_two_windows() -> Result<()> {
    for width in [1, 2, 7, 16] {
        let layer = self_attention(&windowed(width), DType::F64)?;
        let x = randn(2, (1, 200, EMBED_DIM), DType::F64)?;
        let whole = layer.forward(&x)?;
        let mut cache = layer.kv_cache(1)?;
        for start in 0..200 {
            let output = layer.forward_cached(&x.narrow(1, start, 1)?, &mut cache)?;
            assert_close(&output, &whole.narrow(1, start, 1)?, 1e-12, &format!("width {width}, token {start}"));
            assert!(cache.capacity() <= 2 * width, "width {width}: {} after {start}", cache.capacity());
        }
        assert_eq!(cache.len(), 200);
    }
    Ok(())
}

#[test]
fn long_prompt_is_forgotten_at_the_next_token() -> Result<()> {
    let layer = self_attention(&windowed(8), DType::F64)?;
    let x = randn(2, (1, 120, EMBED_DIM), DType::F64)?;
    let whole = layer.forward(&x)?;
    let mut cache = layer.kv_cache(1)?;
    let prompt = layer.forward_cached(&x.narrow(1, 0, 100)?, &mut cache)?;
    assert_close(&prompt, &whole.narrow(1, 0, 100)?, 1e-12, "prompt");
    let rest = decode(&layer, &x.narrow(1, 100, 20)?, &[], &mut cache, &ForwardOptions::default())?;
    assert_close(&rest, &whole.narrow(1, 100, 20)?, 1e-12, "rest");
    assert!(cache.capacity() <= 16, "{}", cache.capacity());
    Ok(())
}

#[test]
fn last_call_can_be_taken_back_and_no_more() -> Result<()> {
    let layer = self_attention(&windowed(4), DType::F64)?;
    let x = randn(2, (1, 60, EMBED_DIM), DType::F64)?;
    let whole = layer.forward(&x)?;
    let mut cache = layer.kv_cache(1)?;
    let mut start = 0;
    for len in [3, 9, 1, 5, 1, 1, 20, 2] {
        // A draft that is refused as a whole, then the tokens themselves.
        layer.forward_cached(&randn(5, (1, len, EMBED_DIM), DType::F64)?, &mut cache)?;
        cache.truncate(start)?;
        let output = layer.forward_cached(&x.narrow(1, start, len)?, &mut cache)?;
        assert_close(&output, &whole.narrow(1, start, len)?, 1e-12, &format!("from {start}"));
        start += len;
    }
    assert_error_says(cache.truncate(1), &["cache, length", "at least", "only a window is held", "got 1"]);
    assert_eq!(cache.lengths(), [start]);
    Ok(())
}

#[test]
fn masks_and_biases_are_refused() -> Result<()> {
    let layer = self_attention(&windowed(4), DType::F64)?;
    let x = randn(2, (1, 3, EMBED_DIM), DType::F64)?;
    let mut cache = layer.kv_cache(1)?;
    let masked = ForwardOptions { attn_mask: candle_attention::Mask::prefix(1), ..Default::default() };
    let biased = ForwardOptions { attn_bias: Some(randn(1, (1, 1), DType::F64)?), ..Default::default() };
    for options in [masked, biased] {
        let result = layer.forward_cached_with(&x, &mut cache, &options);
        assert_error_says(result, &["no attn_mask and no attn_bias", "sliding window"]);
    }
    assert!(cache.is_empty());
    Ok(())
}
