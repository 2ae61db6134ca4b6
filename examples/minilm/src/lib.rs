//! The sentence encoder all-MiniLM-L6-v2, or another BERT: [`model`], and the same network from candle-transformers, [`peer`].

#![forbid(unsafe_code)]

pub mod model;
pub mod peer;
