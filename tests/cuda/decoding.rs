//! Decoding with a cache on the GPU.

use candle_attention::{ForwardOptions, KvCache, Result, SelfAttention};
use candle_core::{DType, Device};

use crate::common::randn;
use crate::problem::error;
use crate::sequences::{EMBED_DIM, configs, decode};
use crate::{gpu, layers};

#[test]
fn decoding_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (dtype, tolerance) in [(DType::F32, 5e-5), (DType::F16, 2e-2), (DType::BF16, 1.5e-1)] {
        for (name, config) in configs() {
            let on_cpu = layers::self_attention(&config, dtype)?;
            let on_gpu = SelfAttention::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
            let run = |layer: &SelfAttention, device: &Device| {
                let x = randn(3, (2, 12, EMBED_DIM), dtype)?.to_device(device)?;
                decode(layer, &x, &[3, 4], &mut layer.kv_cache(2)?, &ForwardOptions::default())
            };
            let error = error(&run(&on_gpu, &gpu)?, &run(&on_cpu, &Device::Cpu)?, 0.1)?;
            assert!(error <= tolerance, "{name}, {dtype:?}: differs by {error:e}");
        }
    }
    Ok(())
}

/// Sequences of different lengths, some of which are dropped, repeated and truncated.
#[test]
fn a_cache_is_edited_as_on_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let (_, config) = configs().remove(0);
    let on_cpu = layers::self_attention(&config, DType::F32)?;
    let on_gpu = SelfAttention::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
    let run = |layer: &SelfAttention, device: &Device| {
        let x = |seed, batch, len| randn(seed, (batch, len, EMBED_DIM), DType::F32)?.to_device(device);
        let mut cache: KvCache = layer.kv_cache(3)?;
        layer.prefill(&x(1, 3, 6)?, &[6, 2, 4], &mut cache)?;
        let mut cache = cache.select(&[2, 0, 0])?;
        cache.truncate_each(&[3, 6, 1])?;
        layer.forward_cached(&x(2, 3, 2)?, &mut cache)
    };
    assert!(error(&run(&on_gpu, &gpu)?, &run(&on_cpu, &Device::Cpu)?, 0.1)? < 5e-5);
    Ok(())
}
