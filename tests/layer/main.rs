//! `SelfAttention` and `CrossAttention`: they equal their formula and PyTorch, whatever the input's layout, masks,
//! positions and dtype. Dropout is on only in training, parameters are initialised as documented and learn, and
//! decoding step by step equals the whole sequence.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/grids.rs"]
mod grids;
#[path = "../common/layers.rs"]
mod layers;

mod broadcast;
mod decoding;
mod dropout;
mod errors;
mod every_parameter_learns;
mod formula;
mod golden_layer_parts;
mod golden_multi_head;
mod half_types;
mod hostile;
mod inputs;
mod masking;
mod norms;
mod outputs;
mod parameters;
mod position_ids;
mod positions;
mod rotary_scaling;
mod rotary_tables;
