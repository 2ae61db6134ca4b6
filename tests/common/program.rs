//! Examples, run as a user runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// An example, built with the profile and for the devices of the test that asks for it.
pub fn build(example: &str) -> PathBuf {
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

/// A run, without the backtraces that the environment may ask for.
pub fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).env_remove("RUST_BACKTRACE").output().expect("the example runs")
}

/// All of stdout, one line, as JSON.
#[track_caller]
pub fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = std::str::from_utf8(&output.stdout).expect("text");
    assert_eq!(stdout.lines().count(), 1, "stdout is for the result alone: {stdout}");
    serde_json::from_str(stdout).expect("JSON")
}

/// That a run was refused with this exit code, for a reason that says all of this.
#[track_caller]
pub fn assert_refused(output: &Output, code: i32, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for text in expected {
        assert!(stderr.contains(text), "no `{text}` in {stderr}");
    }
}
