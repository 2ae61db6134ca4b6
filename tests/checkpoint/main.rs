//! Checkpoints: what was saved comes back, bit for bit; a save is all or nothing; a bad file is an error that says what
//! is wrong with it.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod bad_config;
mod bad_files;
mod bad_tensors;
mod files;
mod mutations;
mod round_trip;
mod saving;
