//! Many queries: tiles of scores, forward and backward.

pub(crate) mod backward;
mod backward_pieces;
mod backward_sums;
mod backward_tile;
pub(crate) mod forward;
pub(crate) mod gradients;
