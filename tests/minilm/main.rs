//! examples/minilm: its model against candle-transformers and sentence-transformers, its program against bad input.

#[path = "../../examples/minilm/model/mod.rs"]
#[allow(dead_code)]
mod model;
#[path = "../../examples/minilm/peer.rs"]
mod peer;
#[path = "../common/program.rs"]
mod program;

mod bad_folders;
mod real_weights;
mod tiny;

use std::path::PathBuf;
use std::process::Output;
use std::sync::OnceLock;

fn example(arguments: &[&str]) -> Output {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    program::run(PROGRAM.get_or_init(|| program::build("minilm")), arguments)
}
