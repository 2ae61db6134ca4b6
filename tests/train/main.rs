//! Training: AdamW against PyTorch, its state in files, clipping, learning rates, gradients of several batches, and half
//! types.

#[path = "../common/mod.rs"]
mod common;

mod accumulation;
mod adamw;
mod clipping;
mod grad_scaler;
mod masters;
mod schedule;
mod state;
