//! Files don't depend on the device of a layer.

use candle_attention::{Layout, Result, SelfAttention, SelfAttentionConfig};
use candle_core::DType;
use candle_nn::VarBuilder;

use crate::common::assert_same_bits;
use crate::{gpu, layers};

#[test]
fn a_layer_goes_to_the_gpu_and_back_to_the_last_bit() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let bytes = layers::self_attention(&layers::everything(), dtype)?.to_bytes()?;
        let on_gpu = SelfAttention::from_bytes(&bytes, &gpu)?;
        assert!(on_gpu.parameters().iter().all(|(_, x)| x.device().same_device(&gpu)));
        assert!(on_gpu.to_bytes()? == bytes, "{dtype:?}");
    }
    Ok(())
}

#[test]
fn foreign_names_are_read_and_written_from_the_gpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let config = SelfAttentionConfig::new(12, 3);
    let on_cpu = layers::self_attention(&config, DType::F32)?;
    for layout in [Layout::Torch, Layout::Gpt2, Layout::QkvProj] {
        let tensors = on_cpu.to_layout(layout)?.into_iter().collect();
        let on_gpu = SelfAttention::from_layout(layout, &config, VarBuilder::from_tensors(tensors, DType::F32, &gpu))?;
        for ((name, gpu), (_, cpu)) in on_gpu.parameters().iter().zip(on_cpu.parameters()) {
            assert_same_bits(gpu, cpu, name);
        }
        for ((name, gpu), (_, cpu)) in on_gpu.to_layout(layout)?.iter().zip(on_cpu.to_layout(layout)?) {
            assert_same_bits(gpu, &cpu, name);
        }
    }
    Ok(())
}

/// A seed gives the same parameters on every device.
#[test]
fn parameters_start_as_on_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let config = layers::everything();
    let new =
        |device| SelfAttention::new(&config, VarBuilder::from_varmap(&candle_nn::VarMap::new(), DType::F32, device));
    assert!(new(&gpu)?.to_bytes()? == new(&candle_core::Device::Cpu)?.to_bytes()?);
    Ok(())
}
