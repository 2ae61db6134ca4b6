//! What a GPU can't do, or not with these inputs, is an error that says so, and the GPU works on.

use candle_attention::{AttentionOptions, Backend, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor};

use crate::common::randn;
use crate::gpu;
use crate::layers::assert_error_says;

#[test]
fn tensors_on_two_devices_are_refused_by_name() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let here = randn(1, (1, 2, 3, 4), DType::F32)?;
    let there = here.to_device(&gpu)?;
    let attend =
        |q: &Tensor, k: &Tensor, v: &Tensor, options: AttentionOptions| scaled_dot_product_attention(q, k, v, &options);
    let plain = AttentionOptions::default;
    assert_error_says(attend(&there, &here, &there, plain()), &["key", "Cuda", "Cpu"]);
    assert_error_says(attend(&here, &here, &there, plain()), &["value", "Cuda", "Cpu"]);
    let bias = Some(randn(2, (3, 3), DType::F32)?);
    let options = AttentionOptions { attn_bias: bias, ..plain() };
    assert_error_says(attend(&there, &there, &there, options), &["attn_bias", "Cuda", "Cpu"]);
    let options = AttentionOptions { alibi_slopes: Some(randn(2, 2, DType::F32)?), ..plain() };
    assert_error_says(attend(&there, &there, &there, options), &["alibi_slopes", "Cuda", "Cpu"]);
    let options = AttentionOptions { sinks: Some(randn(2, 2, DType::F32)?), ..plain() };
    assert_error_says(attend(&there, &there, &there, options), &["sinks", "Cuda", "Cpu"]);
    Ok(())
}

#[test]
fn the_fused_path_is_refused_where_it_is_not() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let x = randn(1, (1, 2, 3, 4), DType::F32)?.to_device(&gpu)?;
    let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    assert_error_says(scaled_dot_product_attention(&x, &x, &x, &options), &["backend Fused", "CPU"]);
    Ok(())
}

/// A terabyte of scores.
#[test]
fn out_of_memory_is_an_error_and_no_end() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let long = Tensor::zeros((1, 1, 500_000, 8), DType::F32, &gpu)?;
    let attend = |x: &Tensor| scaled_dot_product_attention(x, x, x, &AttentionOptions::default());
    assert_error_says(attend(&long), &["memory"]);
    let short = randn(1, (1, 1, 5, 8), DType::F32)?;
    let (there, here) = (attend(&short.to_device(&gpu)?)?.context, attend(&short)?.context);
    assert!(crate::problem::error(&there, &here, 1.0)? < 1e-5);
    Ok(())
}

/// Built without CUDA, or on a machine without a GPU: candle says so, and nothing crashes.
#[test]
fn a_missing_gpu_is_an_error() {
    if let Err(error) = Device::new_cuda(99) {
        assert!(!error.to_string().is_empty());
    }
}
