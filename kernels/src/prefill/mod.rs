//! Many queries: tiles of scores, forward and backward.

pub(crate) mod backward;
mod backward_pieces;
mod backward_sums;
pub(crate) mod forward;
pub(crate) mod gradients;
