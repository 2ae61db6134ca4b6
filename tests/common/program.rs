//! Builds and runs the examples of this package for their tests.

use std::path::{Path, PathBuf};
use std::process::Command;

pub use attention_examples::program::{json, run};

/// Builds an example with the profile and the features of the test, and returns its path. With `CANDLE_ATTENTION_PROGRAMS` it is ready
/// in that folder, for a machine without Rust.
pub fn build(example: &str) -> PathBuf {
    if let Some(ready) = std::env::var_os("CANDLE_ATTENTION_PROGRAMS") {
        return Path::new(&ready).join(example);
    }
    // This test is PROFILE/deps/NAME, the example PROFILE/examples/NAME.
    let test = std::env::current_exe().expect("a test knows its own file");
    let folder = test.parent().and_then(Path::parent).expect("a test lies in PROFILE/deps");
    let profile = match folder.file_name().and_then(|name| name.to_str()).expect("a folder with a name") {
        "debug" => "dev",
        other => other,
    };
    let features: &[&str] = if cfg!(feature = "cuda") { &["--features", "cuda"] } else { &[] };
    let build = ["build", "--quiet", "--profile", profile, "--example", example];
    let status = Command::new(env!("CARGO")).args(build).args(features).status().expect("cargo runs");
    assert!(status.success());
    folder.join("examples").join(example)
}
