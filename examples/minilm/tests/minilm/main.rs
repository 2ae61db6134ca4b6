//! The model against candle-transformers and sentence-transformers; the program against bad input.

mod bad_folders;
mod real_weights;
mod tiny;

use std::process::Output;

use attention_examples::program;

fn minilm(arguments: &[&str]) -> Output {
    program::run(env!("CARGO_BIN_EXE_minilm"), arguments)
}
