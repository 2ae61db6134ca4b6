//! For the tests of the examples: runs a program as a user runs it.

use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs the program, without the backtraces that the environment may ask for.
///
/// # Panics
///
/// If there is no such program.
pub fn run(program: impl AsRef<Path>, arguments: &[&str]) -> Output {
    let program = program.as_ref();
    let output = Command::new(program).args(arguments).env_remove("RUST_BACKTRACE").output();
    output.unwrap_or_else(|error| panic!("{} can't be run: {error}", program.display()))
}

/// A number in 0..limit, another one in each run: for moments at which a program is killed.
pub fn random_below(limit: u64) -> u64 {
    RandomState::new().hash_one(0) % limit
}

/// The one line on stdout, as JSON.
///
/// # Panics
///
/// If the run failed, or if stdout isn't one line of JSON.
#[track_caller]
pub fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = std::str::from_utf8(&output.stdout).expect("text");
    assert_eq!(stdout.lines().count(), 1, "stdout is for the result alone: {stdout}");
    serde_json::from_str(stdout).expect("JSON")
}

/// Checks that the program refused its input with this exit code and a message that contains all of these texts.
///
/// # Panics
///
/// If it didn't.
#[track_caller]
pub fn assert_refused(output: &Output, code: i32, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for text in expected {
        assert!(stderr.contains(text), "no `{text}` in {stderr}");
    }
}
