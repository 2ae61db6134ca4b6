//! What the examples share: their command lines, random numbers, embeddings and parameters; and how their tests run them.

#![forbid(unsafe_code)]

pub mod device;
pub mod embeddings;
pub mod exit;
pub mod parameters;
pub mod program;
pub mod random;
pub mod words;
