//! Attention for candle.
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod attention;
mod checkpoint;
mod config;
mod cross_attention;
mod error;
mod mask;
mod multi_head;
mod options;
mod philox;
mod reference;
mod rotary;
mod self_attention;
pub mod simplified;

pub use attention::scaled_dot_product_attention;
pub use config::SelfAttentionConfig;
pub use cross_attention::CrossAttention;
pub use error::AttentionError;
pub use mask::{Coverage, Mask, ScoreShape};
pub use multi_head::{ForwardOptions, ForwardOutput, MultiHead};
pub use options::{AttentionOptions, AttentionOutput};
pub use rotary::{Pairing, RotaryConfig, RotaryEmbedding};
pub use self_attention::SelfAttention;
