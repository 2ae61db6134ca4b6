//! Decoding with a cache gives what the whole sequence gives at once.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod chunks;
mod dtypes;
mod gradients;
mod hostile;
mod memory;
mod operations;
mod ragged;
mod setup;
mod window;
