//! Checkpoints: this crate's own, those of other programs in every layout, and whole decoders of Hugging Face
//! transformers.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod layouts;
mod own;
mod transformers;
