//! How a program ends.

use std::process::ExitCode;

use anyhow::Result;

/// 0, or 1 after saying on stderr what went wrong.
pub fn code(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
