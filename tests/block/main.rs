//! The parts of a transformer block, and the whole block: they equal their formulas and PyTorch in every dtype, have the gradients of
//! finite differences, and refuse bad input.

#[path = "../common/blocks.rs"]
mod blocks_common;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod activation;
mod dropout;
mod embedding;
mod loss;
mod loss_golden;
mod mlp;
mod norm;
mod precision;
mod transformer;
