//! Decoding with a cache gives the same outputs as the whole sequence at once.

mod chunks;
mod dtypes;
mod gradients;
mod hostile;
mod memory;
mod operations;
mod ragged;
mod setup;
mod tensors;
mod window;
