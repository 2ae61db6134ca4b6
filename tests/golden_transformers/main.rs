//! The same numbers as Hugging Face transformers: the attention layers of eighteen kinds of models, with every scaling of the
//! rotary embedding, loaded from their own weights under their own names, and whole small decoders, token by token, with a
//! cache and without.
//!
//! tests/golden/make_transformers.py says where the numbers come from.

#[path = "../common/mod.rs"]
mod common;
#[path = "../decoders/mod.rs"]
mod decoders;

mod greedy;
mod layers;
