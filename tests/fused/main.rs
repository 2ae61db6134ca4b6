//! The fused path against the reference, which is the oracle: every dtype, mask and option, at awkward sizes and strides;
//! and what must hold of it whatever it computes.

#[path = "../common/mod.rs"]
mod common;

mod check;
mod extremes;
mod grid;
mod hostile;
mod laws;
mod masks;
mod pairwise;
mod problem;
mod random;
