//! Checkpoints of other programs: each layout comes in as its models compute, goes out as it came, byte for byte, and trains;
//! what is wrong with a file is told, all of it at once.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod bad_files;
mod bad_tensors;
mod meaning;
mod models;
mod names;
mod round_trip;
mod shards;
mod training;
mod unfit_configs;
