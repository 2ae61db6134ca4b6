//! Attention on a GPU: the host's side of the kernels in `device`.
//!
//! A call becomes a few launches of kernels with one [`problem::RawProblem`] as their argument. What runs them is a [`Machine`].

mod machine;
mod mask;
mod mask_parts;
pub mod problem;

pub use machine::{Launch, Limits, Machine, Memory, Region, Source};
