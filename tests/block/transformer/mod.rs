//! The whole block: its formula, its gradients on every path, dropout, decoding, threads, dtypes and errors.

mod decoding;
mod dropout;
mod errors;
mod formula;
mod frozen;
mod gradients;
mod half_types;
mod recompute;

use candle_attention::ForwardOptions;
use candle_attention::block::{TransformerBlock, TransformerBlockConfig};
use candle_core::{DType, Result, Tensor, Var};

use crate::common::{gradients, randn};

/// The results of `f` with this many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
}

/// The output of a block, and the gradients of x and of every parameter for the loss Σ y · c with random numbers c. Dropout begins
/// with the first call.
fn run(block: &TransformerBlock, x: &Var, options: &ForwardOptions) -> Result<Vec<Tensor>> {
    block.set_dropout_calls([0, 0]);
    let y = block.forward_with(x, options)?.output;
    let loss = (&y * randn(9, y.shape(), DType::F64)?.to_dtype(y.dtype())?)?;
    let vars = block.vars();
    let gradients = gradients(&loss, &[x].into_iter().chain(&vars).collect::<Vec<_>>())?;
    Ok([vec![y], gradients].concat())
}

fn training() -> ForwardOptions {
    ForwardOptions { train: true, ..Default::default() }
}

/// Llama's block with grouped queries and a rotary embedding.
fn rotated_llama() -> TransformerBlockConfig {
    let mut config = crate::blocks_common::llama();
    config.attention.num_kv_heads = Some(1);
    config.attention.head_dim = Some(4);
    config.attention.rotary = Some(candle_attention::rotary::RotaryConfig { base: 10.0, ..Default::default() });
    config
}
