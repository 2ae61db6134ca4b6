//! Configs and inputs that a layer can't serve: each is an error, never a panic, that names what was expected and what
//! came.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/layers.rs"]
mod layers;

mod configs;
mod inputs;
