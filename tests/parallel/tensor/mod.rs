//! Tensor parallelism: ranks that share the heads of a layer and the hidden numbers of an MLP compute what one process computes.

pub mod block;
pub mod faults;
pub mod layer;
pub mod setup;
