//! Checkpoints of this crate: a saved layer is loaded bit for bit, a save replaces the whole file or nothing, and a bad
//! file gives an error that says what is wrong with it.

mod bad_config;
mod bad_files;
mod bad_tensors;
pub mod files;
mod mutations;
mod round_trip;
mod saving;
