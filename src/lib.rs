//! Attention for [candle](https://github.com/huggingface/candle) that trains.
//!
//! [`SelfAttention`] and [`CrossAttention`] are layers to plug into a model: trainable projections, heads, masks,
//! grouped-query attention, rotary embedding, with a gradient for every parameter, and self-describing checkpoints.
//! [`scaled_dot_product_attention`] is the function inside them. [`simplified`] is where the idea begins.
//!
//! ```
//! use candle_attention::{SelfAttention, SelfAttentionConfig};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//! let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(64, 4) };
//! let attention = SelfAttention::new(&config, vb.pp("attention"))?;
//!
//! let x = Tensor::randn(0f32, 1.0, (2, 10, 64), &Device::Cpu)?; // (batch, len, embed_dim)
//! assert_eq!(attention.forward(&x)?.dims(), [2, 10, 64]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # The map
//!
//! A file imports only from floors below its own.
//!
//! | floor | file | what |
//! |---|---|---|
//! | 6 | `self_attention`, `cross_attention` | the layers' faces |
//! | 5 | `multi_head` | what both share: parameters, projections, heads |
//! | 4 | `attention` | checks its input, then computes |
//! | 4 | `kv_cache` | keys and values of the tokens so far |
//! | 4 | `parameters` | a layer's tensors: checked for, made, initialised |
//! | 3 | `reference` | attention with every score in memory: read this first |
//! | 3 | `fused` | the same without a q_len x kv_len matrix: the fast path |
//! | 3 | `extra_keys` | keys and values that a layer adds to those it is given |
//! | 3 | `checkpoint` | safetensors that carry their config, and the layouts of other programs |
//! | 2 | `options` | what attention can be asked for, and what it gives back |
//! | 2 | `config` | what a layer is made of, checked in one place |
//! | 2 | `heatmap` | attention weights to look at |
//! | 1 | `mask` | which keys each query may attend to |
//! | 1 | `rotary` | rotary position embedding |
//! | 1 | `simplified` | attention without trainable weights |
//! | 1 | `file` | files read as a whole, and written as a whole or not at all |
//! | 1 | `projection` | x·Wᵀ + b as one operation |
//! | 0 | `error` | every way an input can be wrong |
//! | 0 | `philox` | random numbers that depend on their place alone |
//! | 0 | `axes` | in what order tensors have theirs |
//! | 0 | `range` | whether scores can overflow |
//! | 0 | `empty` | results without entries |

#![deny(missing_docs)]
#![deny(unsafe_code)]

mod attention;
mod axes;
pub mod checkpoint;
mod config;
mod cross_attention;
mod empty;
mod error;
mod extra_keys;
mod file;
mod fused;
pub mod heatmap;
mod kv_cache;
mod mask;
mod multi_head;
mod options;
mod parameters;
mod philox;
mod projection;
mod range;
mod reference;
mod rotary;
mod self_attention;
pub mod simplified;

pub use attention::scaled_dot_product_attention;
pub use checkpoint::Layout;
pub use config::SelfAttentionConfig;
pub use cross_attention::CrossAttention;
pub use error::AttentionError;
pub use kv_cache::KvCache;
pub use mask::{Coverage, Mask, ScoreShape};
pub use multi_head::{ForwardOptions, ForwardOutput, MultiHead, ProjectedMemory};
pub use options::{AttentionOptions, AttentionOutput, Backend};
pub use rotary::{Pairing, RotaryConfig, RotaryEmbedding, RotaryScaling, Yarn};
pub use self_attention::SelfAttention;

/// The programs in the README are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
