//! Decoding with a cache gives what the whole sequence gives.

use candle_attention::ForwardOptions;
use candle_attention::block::TransformerBlockConfig;
use candle_core::{DType, Result, Tensor};

use crate::blocks_common::{PLACEMENTS, bert, block, gemma2, gpt2, grid, llama};
use crate::common::{assert_close, randn, var};
use crate::layers::assert_error_says;

use super::rotated_llama;

#[test]
fn decoding_equals_the_whole_sequence() -> Result<()> {
    let named = [("Llama", rotated_llama()), ("Gemma 2", gemma2()), ("GPT-2", gpt2())];
    let named = named.into_iter().map(|(name, config)| (name.to_string(), config));
    for (what, config) in grid().into_iter().chain(named) {
        let (block, x) = (block(&config, DType::F64)?, randn(1, (2, 7, 6), DType::F64)?);
        let mut cache = block.kv_cache(2)?;
        let (mut start, mut parts) = (0, Vec::new());
        for len in [3, 1, 1, 2] {
            parts.push(block.forward_cached(&x.narrow(1, start, len)?, &mut cache)?);
            start += len;
        }
        assert_eq!(cache.len(), 7);
        assert_close(&Tensor::cat(&parts, 1)?, &block.forward(&x)?, 1e-12, &what);
    }
    Ok(())
}

#[test]
fn decoding_one_sequence_needs_no_batch_axis() -> Result<()> {
    for placement in PLACEMENTS {
        let block = block(&TransformerBlockConfig { placement, ..llama() }, DType::F64)?;
        let (x, mut cache) = (randn(1, (5, 6), DType::F64)?, block.kv_cache(1)?);
        let first = block.forward_cached(&x.narrow(0, 0, 4)?, &mut cache)?;
        let last = block.forward_cached(&x.narrow(0, 4, 1)?, &mut cache)?;
        assert_close(&Tensor::cat(&[first, last], 0)?, &block.forward(&x)?, 1e-12, "without a batch axis");
    }
    Ok(())
}

#[test]
fn no_gradient_flows_through_a_cache() -> Result<()> {
    for placement in PLACEMENTS {
        let block = block(&TransformerBlockConfig { placement, ..llama() }, DType::F32)?;
        let (x, mut cache) = (var(1, (1, 4, 6), DType::F32)?, block.kv_cache(1)?);
        assert!(!block.forward_cached(&x, &mut cache)?.track_op(), "{placement:?}");
    }
    Ok(())
}

#[test]
fn call_that_a_cache_refuses_leaves_it_as_it_was() -> Result<()> {
    let (block, x) = (block(&llama(), DType::F64)?, randn(1, (2, 4, 6), DType::F64)?);
    let mut cache = block.kv_cache(2)?;
    block.forward_cached(&x.narrow(1, 0, 3)?, &mut cache)?;
    let train = ForwardOptions { train: true, ..Default::default() };
    assert_error_says(block.forward_cached_with(&x, &mut cache, &train), &["train"]);
    assert_error_says(
        block.forward_cached(&randn(1, (3, 1, 6), DType::F64)?, &mut cache),
        &["cache, sequences", "expected 3, got 2"],
    );
    assert_error_says(block.forward_cached(&randn(1, (2, 1, 5), DType::F64)?, &mut cache), &["input"]);
    assert_error_says(block.forward_cached(&randn(1, (2, 1, 6), DType::F32)?, &mut cache), &["F64"]);
    assert_eq!(cache.len(), 3);
    let last = block.forward_cached(&x.narrow(1, 3, 1)?, &mut cache)?;
    assert_close(&last, &block.forward(&x)?.narrow(1, 3, 1)?, 1e-12, "after refused calls");
    assert!(crate::blocks_common::block(&bert(), DType::F64)?.kv_cache(1).is_err());
    Ok(())
}
