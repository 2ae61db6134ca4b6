//! The memory that a loss over a vocabulary takes, forward and backward, beside that of candle's own.
//!
//! This is a program of its own, with a single test, since its allocator counts the bytes of the whole process.

#[path = "common/counting.rs"]
mod counting;

use candle_attention::block::{CrossEntropyOptions, cross_entropy, linear_cross_entropy};
use candle_core::{DType, Device, Result, Tensor, Var};

/// The most bytes that a loss and its gradients take at a time beyond what is there before.
fn most(loss: impl Fn() -> Result<Tensor>) -> Result<usize> {
    let before = counting::start();
    loss()?.backward()?;
    Ok(counting::most() - before)
}

#[test]
fn losses_take_less_than_a_third_of_candles_memory() -> anyhow::Result<()> {
    let (tokens, vocabulary, dim) = (1024, 32_768, 16);
    let draw = |shape: (usize, usize)| Var::rand_f64(-1.0, 1.0, shape, DType::F32, &Device::Cpu);
    let (hidden, weight) = (draw((tokens, dim))?, draw((vocabulary, dim))?);
    let targets = Tensor::from_vec((0..tokens as u32).map(|i| i * 31).collect(), tokens, &Device::Cpu)?;
    let options = CrossEntropyOptions::default();
    let logits = || hidden.matmul(&weight.t()?);
    let candles = most(|| candle_nn::loss::cross_entropy(&logits()?, &targets))?;
    let of_logits = most(|| Ok(cross_entropy(&logits()?, &targets, &options)?))?;
    let of_layer = most(|| Ok(linear_cross_entropy(&hidden, &weight, None, &targets, &options)?))?;

    let matrix = tokens * vocabulary * size_of::<f32>();
    println!(
        "in matrices of logits: candle {}, ours {}, of the layer {}",
        share(candles, matrix),
        share(of_logits, matrix),
        share(of_layer, matrix)
    );
    // The logits, their gradient, and the two that candle's store adds up.
    assert!(of_logits < 5 * matrix, "{of_logits} bytes");
    // A part of the logits, and the gradient of the weight several times.
    assert!(of_layer < matrix, "{of_layer} bytes");
    assert!(of_layer * 10 < candles * 3, "{of_layer} of {candles} bytes");
    Ok(())
}

fn share(bytes: usize, matrix: usize) -> f64 {
    bytes as f64 / matrix as f64
}
