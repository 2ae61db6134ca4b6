//! Training: AdamW against PyTorch, its state in files, clipping, learning rates, and gradients of several batches.

#[path = "../common/mod.rs"]
mod common;

mod accumulation;
mod adamw;
mod clipping;
mod schedule;
mod state;
