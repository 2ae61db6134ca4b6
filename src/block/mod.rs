//! The parts of a transformer block around attention, with gradients for every input and parameter.

pub(crate) mod norm;

pub use norm::{layer_norm, rms_norm};
