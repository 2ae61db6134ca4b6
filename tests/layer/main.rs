//! Laws of `SelfAttention` and `CrossAttention`: they equal their formula, whatever the input's layout, masks, positions
//! and dtype; dropout is there in training alone; parameters start as promised.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod dropout;
mod formula;
mod inputs;
mod masking;
mod outputs;
mod parameters;
mod positions;
mod rotary_scaling;
