//! Masks against their definitions, written out here once more, over all small sizes.

#[path = "../common/mod.rs"]
mod common;

mod cases;
mod errors;
mod laws;
