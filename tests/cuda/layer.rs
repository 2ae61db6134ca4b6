//! Whole layers: each feature alone and all at once, with the gradient of every parameter and input.

use candle_attention::{CrossAttention, ForwardOptions, Result, SelfAttention};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{gradients, randn};
use crate::compare::{assert_alike, tolerance};
use crate::layers::AttentionLayer;
use crate::{gpu, grids, layers};

/// By name: output, weights and log-sum-exp of a layer, and the gradients of a loss over all three.
fn results(
    layer: &dyn AttentionLayer,
    inputs: &[Var],
    output: candle_attention::ForwardOutput,
) -> Result<Vec<(String, Tensor)>> {
    let factors = |x: &Tensor| randn(9, x.shape(), x.dtype())?.to_device(x.device());
    let (weights, lse) = (output.weights.expect("asked for"), output.logsumexp.expect("asked for"));
    let sum = |x: &Tensor| (x * factors(x)?)?.sum_all()?.to_dtype(DType::F64);
    let loss = ((sum(&output.output)? + sum(&weights)?)? + sum(&lse)?)?;
    let vars = inputs.iter().cloned().chain(layer.vars()).collect::<Vec<_>>();
    let names = (0..inputs.len()).map(|i| format!("gradient of input {i}"));
    let names = names.chain(layer.parameters().into_iter().map(|(name, _)| format!("gradient of {name}")));
    let grads = gradients(&loss, &vars.iter().collect::<Vec<_>>())?;
    let mut all = vec![("output".into(), output.output), ("weights".into(), weights), ("log-sum-exp".into(), lse)];
    all.extend(names.zip(grads));
    Ok(all)
}

fn compare(what: &str, gpu: &[(String, Tensor)], cpu: &[(String, Tensor)], dtype: DType) -> Result<()> {
    assert_eq!(gpu.len(), cpu.len());
    for ((name, gpu), (_, cpu)) in gpu.iter().zip(cpu) {
        assert_alike(&format!("{what}, {dtype:?}: {name}"), gpu, cpu, tolerance(dtype))?;
    }
    Ok(())
}

fn options() -> ForwardOptions {
    ForwardOptions { train: true, return_weights: true, return_logsumexp: true, ..Default::default() }
}

fn inputs(shapes: &[(usize, usize, usize)], dtype: DType, device: &Device) -> Result<Vec<Var>> {
    shapes
        .iter()
        .zip(2..)
        .map(|(&shape, seed)| Ok(Var::from_tensor(&randn(seed, shape, dtype)?.to_device(device)?)?))
        .collect()
}

#[test]
fn self_attention_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for (name, config, _) in grids::self_attention() {
            let on_cpu = layers::self_attention(&config, dtype)?;
            let on_gpu = SelfAttention::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
            let run = |layer: &SelfAttention, device| {
                let inputs = inputs(&[(2, 6, config.embed_dim)], dtype, device)?;
                results(layer, &inputs, layer.forward_with(&inputs[0], &options())?)
            };
            compare(name, &run(&on_gpu, &gpu)?, &run(&on_cpu, &Device::Cpu)?, dtype)?;
        }
    }
    Ok(())
}

#[test]
fn cross_attention_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for (name, config, _) in grids::cross_attention() {
            let on_cpu = layers::cross_attention(&config, dtype)?;
            let on_gpu = CrossAttention::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
            let run = |layer: &CrossAttention, device| {
                let kv_dim = config.kv_dim.unwrap_or(config.embed_dim);
                let inputs = inputs(&[(2, 5, config.embed_dim), (2, 7, kv_dim)], dtype, device)?;
                results(layer, &inputs, layer.forward_with(&inputs[0], &inputs[1], &options())?)
            };
            compare(name, &run(&on_gpu, &gpu)?, &run(&on_cpu, &Device::Cpu)?, dtype)?;
        }
    }
    Ok(())
}
