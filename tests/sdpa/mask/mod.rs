//! Masks compared with independent definitions, for all small sizes.

mod cases;
mod errors;
mod laws;
