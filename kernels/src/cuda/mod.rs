//! Attention on a GPU: the host's side of the kernels in `device`.
//!
//! A [`Call`] becomes a few launches of kernels with one [`problem::RawProblem`] as their argument. What runs them is a
//! [`Machine`]. Nothing here waits for the kernels.

mod backward;
mod call;
#[cfg(feature = "cuda")]
pub mod compile;
mod forward;
#[cfg(feature = "cuda")]
pub mod gpu;
mod launches;
mod machine;
mod mask;
mod mask_parts;
mod plan;
pub mod problem;

pub use backward::{Gradients, Incoming, Wanted, backward};
pub use call::{Call, Inputs, MachineBias, MachineNumbers, MachineView};
pub use forward::{Saved, forward};
pub use machine::{Launch, Limits, Machine, Memory, Region, Source};
pub use plan::{Element, MAX_DIM};
