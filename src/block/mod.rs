//! The parts of a transformer block, and the block itself, with gradients for every input and parameter.

pub(crate) mod activation;
pub(crate) mod branch;
mod config;
pub(crate) mod dropout;
pub(crate) mod embedding;
pub(crate) mod epilogue;
mod files;
mod layouts;
pub(crate) mod linear;
pub(crate) mod loss;
mod mlp;
mod mlp_op;
pub(crate) mod norm;
pub(crate) mod norm_layer;
pub(crate) mod op;
pub(crate) mod operand;
pub(crate) mod relay;
mod tensor;
mod transformer;

pub use activation::{Activation, gated, gated_halves, geglu, gelu, gelu_tanh, silu, squared_relu, swiglu};
pub use config::{NormPlacement, TransformerBlockConfig};
pub use dropout::{add_dropped, dropout};
pub use embedding::{Embedding, embedding};
pub use linear::linear;
pub use loss::{CrossEntropyOptions, Reduction, cross_entropy, linear_cross_entropy};
pub use mlp::{Mlp, MlpConfig};
pub use norm::{layer_norm, rms_norm};
pub use norm_layer::{Norm, NormConfig, NormKind};
pub use transformer::TransformerBlock;
