//! Comparison with Hugging Face transformers: the attention layers of eighteen kinds of models, with every scaling of
//! the rotary embedding, loaded from weights with their original names; and whole small decoders, token by token, with
//! a cache and without.
//!
//! tests/golden/make_transformers.py says where the numbers come from.

pub mod decoders;
mod greedy;
mod layers;
