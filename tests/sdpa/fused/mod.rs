//! The fused path compared with the reference: every dtype, mask and option, with awkward sizes and strides; and
//! properties that hold for every input.

mod check;
mod extremes;
mod grid;
mod hidden;
mod hostile;
mod laws;
mod masks;
mod pairwise;
mod problem;
mod random;
