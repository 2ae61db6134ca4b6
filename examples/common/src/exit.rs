//! The exit code of a program.

use std::process::ExitCode;

use anyhow::Result;

/// 0; or 1 for an error, which is printed to stderr.
pub fn code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
