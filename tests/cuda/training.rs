//! Training on a GPU has the losses of training on the CPU.

use candle_attention::{Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use serde_json::Value;

use crate::common::{numbers, randn};
use crate::{gpu, layers, program};

/// The loss before each step, with dropout.
fn losses(layer: &SelfAttention, device: &Device) -> Result<Vec<f64>> {
    let tensor = |seed| randn(seed, (4, 10, 16), DType::F32)?.to_device(device);
    let (x, wanted) = (tensor(2)?, tensor(3)?);
    let mut optimiser = AdamW::new(layer.vars(), ParamsAdamW { lr: 1e-2, ..Default::default() })?;
    let mut losses = Vec::new();
    for _ in 0..50 {
        let loss = (layer.forward_t(&x, true)? - &wanted)?.sqr()?.mean_all()?;
        losses.extend(numbers(&loss)?);
        optimiser.backward_step(&loss)?;
    }
    Ok(losses)
}

#[test]
fn a_layer_learns_with_the_losses_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let config = SelfAttentionConfig { embed_dim: 16, ..layers::everything() };
    let config = SelfAttentionConfig { out_proj: true, ..config };
    let on_cpu = layers::self_attention(&config, DType::F32)?;
    let on_gpu = SelfAttention::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
    let (cpu, gpu) = (losses(&on_cpu, &Device::Cpu)?, losses(&on_gpu, &gpu)?);
    assert!(cpu[49] < 0.9 * cpu[0], "{cpu:?}");
    for (step, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
        assert!((cpu - gpu).abs() < 1e-3 * cpu, "step {step}: {gpu}, on the CPU {cpu}");
    }
    Ok(())
}

/// Compares the numbers of an example's result on both devices, as |Δ| / (1 + |x|).
fn compare(example: &str, arguments: &[&str], fields: &[&str]) {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.safetensors");
    let program = program::build(example);
    let result = |device: &str| -> Value {
        let always = ["--json", "--out", file.to_str().unwrap(), "--device", device];
        program::json(&program::run(&program, &[arguments, &always].concat()))
    };
    let (cpu, gpu) = (result("cpu"), result(if gpu.is_cpu() { "cpu" } else { "cuda" }));
    for field in fields {
        let [cpu, gpu] =
            [&cpu, &gpu].map(|result| result[field].as_f64().unwrap_or_else(|| panic!("no number {field}")));
        assert!((cpu - gpu).abs() < 2e-3 * (1.0 + cpu.abs()), "{example}, {field}: {gpu}, on the CPU {cpu}");
    }
    assert_eq!(gpu["reload_identical"], true, "{example}");
}

#[test]
fn warm_attends_to_mat() {
    compare("warm_attends_to_mat", &[], &["untrained", "before", "after", "loss"]);
}

#[test]
fn a_transformer_block_learns() {
    compare("transformer_block", &["--steps", "40"], &["loss_before", "loss_after", "accuracy_before"]);
}
