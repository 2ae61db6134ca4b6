//! Whole transformer blocks in files: their own, those of every layout that has blocks, and blocks of Hugging Face transformers.

mod bad_tensors;
mod golden;
mod layouts;
mod own;
