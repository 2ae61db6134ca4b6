//! Calls that a GPU can't serve give an error that says so, and the GPU can still be used afterwards.

use candle_attention::{AttentionOptions, Backend, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor};

use crate::common::{assert_close, randn};
use crate::gpu;
use crate::layers::assert_error_says;

#[test]
fn tensors_on_two_devices_are_refused_by_name() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let on_cpu = randn(1, (1, 2, 3, 4), DType::F32)?;
    let on_gpu = on_cpu.to_device(&gpu)?;
    let attend =
        |q: &Tensor, k: &Tensor, v: &Tensor, options: AttentionOptions| scaled_dot_product_attention(q, k, v, &options);
    let plain = AttentionOptions::default;
    assert_error_says(attend(&on_gpu, &on_cpu, &on_gpu, plain()), &["key", "Cuda", "Cpu"]);
    assert_error_says(attend(&on_cpu, &on_cpu, &on_gpu, plain()), &["value", "Cuda", "Cpu"]);
    let bias = Some(randn(2, (3, 3), DType::F32)?);
    let options = AttentionOptions { attn_bias: bias, ..plain() };
    assert_error_says(attend(&on_gpu, &on_gpu, &on_gpu, options), &["attn_bias", "Cuda", "Cpu"]);
    let options = AttentionOptions { alibi_slopes: Some(randn(2, 2, DType::F32)?), ..plain() };
    assert_error_says(attend(&on_gpu, &on_gpu, &on_gpu, options), &["alibi_slopes", "Cuda", "Cpu"]);
    let options = AttentionOptions { sinks: Some(randn(2, 2, DType::F32)?), ..plain() };
    assert_error_says(attend(&on_gpu, &on_gpu, &on_gpu, options), &["sinks", "Cuda", "Cpu"]);
    Ok(())
}

#[test]
fn the_fused_path_is_refused_where_it_is_not() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let x = randn(1, (1, 2, 3, 4), DType::F64)?.to_device(&gpu)?;
    let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    assert_error_says(scaled_dot_product_attention(&x, &x, &x, &options), &["backend Fused", "F64"]);
    Ok(())
}

/// Scores in f64 that take 34 GB several times, which is too much for most GPUs, and more scores than candle's kernels can count. A GPU that
/// has the memory gives means of the values.
#[test]
fn too_many_scores_are_an_error_and_no_end() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if gpu.is_cpu() {
        return Ok(());
    }
    let attend = |x: &Tensor, v: &Tensor| scaled_dot_product_attention(x, x, v, &AttentionOptions::default());
    let zeros = |len| Tensor::zeros((1, 1, len, 8), DType::F64, &gpu);
    let values = randn(2, (1, 1, 65_000, 8), DType::F64)?;
    match attend(&zeros(65_000)?, &values.to_device(&gpu)?) {
        Ok(output) => {
            let means = values.mean_keepdim(2)?.broadcast_as(values.shape())?;
            assert_close(&output.context.to_device(&Device::Cpu)?, &means, 1e-12, "means of the values");
        }
        error => assert_error_says(error, &["scores", "memory"]),
    }
    assert_error_says(attend(&zeros(500_000)?, &zeros(500_000)?), &["scores", "entries"]);
    let short = randn(1, (1, 1, 5, 8), DType::F64)?;
    let on_gpu = short.to_device(&gpu)?;
    assert_close(&attend(&on_gpu, &on_gpu)?.context, &attend(&short, &short)?.context, 1e-12, "after that");
    Ok(())
}

/// Built without CUDA, or on a machine with fewer GPUs.
#[test]
fn a_missing_gpu_is_an_error() {
    let error = Device::new_cuda(99).expect_err("a machine with less than a hundred GPUs").to_string();
    assert!(!error.is_empty());
}
