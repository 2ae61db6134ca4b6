//! Models of Hugging Face transformers around this crate's layers: the files of tests/golden/transformers, what their
//! configs say of attention, and decoders that run with a cache and without.

mod build;
mod config;
mod decoder;
mod file;
mod relative_bias;

pub use config::layer_config;
pub use decoder::Decoder;
pub use file::ModelFile;
pub use relative_bias::RelativeBias;
