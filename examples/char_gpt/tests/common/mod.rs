//! For both tests of the program: how to run it.

use std::process::Command;

use attention_examples::program;
use serde_json::Value;

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_char_gpt"));
    command.args(arguments).env_remove("RUST_BACKTRACE");
    command
}

/// The last line on stdout, as JSON.
pub fn result(arguments: &[&str]) -> Value {
    program::json(&command(arguments).arg("--json").output().expect("the example runs"))
}

/// The path of a file in a folder.
pub fn file(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_string()
}
