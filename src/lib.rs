//! Attention for candle.
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod attention;
mod error;
mod mask;
mod options;
mod philox;
mod reference;
pub mod simplified;

pub use attention::scaled_dot_product_attention;
pub use error::AttentionError;
pub use mask::{Coverage, Mask, ScoreShape};
pub use options::{AttentionOptions, AttentionOutput};
