//! The layers: trainable projections around attention.

mod adapted;
pub(crate) mod bias_kv;
mod cached;
pub(crate) mod config;
mod core;
mod cross_attention;
mod fused;
pub(crate) mod init;
mod kv_cache;
mod options;
mod self_attention;
mod sequence;
mod shared;
mod shared_heads;
mod tensor;

pub use cached::ProjectedMemory;
pub use config::SelfAttentionConfig;
pub use cross_attention::{CrossAttention, cross_attention};
pub use kv_cache::KvCache;
pub use options::{ForwardOptions, ForwardOutput};
pub use self_attention::{SelfAttention, self_attention};
