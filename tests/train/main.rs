//! Training: the backward pass against candle's, AdamW against PyTorch, its state in files, clipping, learning rates, gradients of several
//! batches, and half types.

#[path = "../common/blocks.rs"]
mod blocks;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod accumulation;
mod adamw;
mod backward;
mod clipping;
mod grad_scaler;
mod masters;
mod schedule;
mod state;
