//! Invalid configs and inputs: each gives an error that names what was expected and what was found, never a panic.

mod configs;
mod inputs;
mod numbers;
