//! Checkpoints: this crate's own, those of other programs in every layout, and whole decoders of Hugging Face
//! transformers.

#[path = "../common/blocks.rs"]
mod blocks_common;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod blocks;
mod layouts;
mod own;
mod transformers;
