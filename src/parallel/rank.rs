//! The work of one rank, from its start to its end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::communicator::Communicator;
use super::host::Host;
use crate::error::{AttentionError, Error, Result};

/// How a rank failed.
pub(super) struct Failed {
    pub error: Error,
    /// Whether the cause may be in this rank, and not in another one that was gone.
    pub is_own: bool,
}

impl From<Error> for Box<Failed> {
    fn from(error: Error) -> Self {
        let is_own = !matches!(error, Error::Attention(AttentionError::Communication { .. }));
        Box::new(Failed { error, is_own })
    }
}

/// Runs `work` as a rank. The others get an error if it fails or panics, and if they wait for it after its end.
pub(super) fn run<T>(host: Host, work: impl FnOnce(Arc<dyn Communicator>) -> Result<T>) -> Result<T, Box<Failed>> {
    let host = Arc::new(host);
    let rank = host.rank();
    let communicator: Arc<dyn Communicator> = host.clone();
    // The work isn't entered again after a panic: what it left half done is dropped.
    let outcome = match catch_unwind(AssertUnwindSafe(|| work(communicator))) {
        Ok(outcome) => outcome.map_err(Box::<Failed>::from),
        Err(panic) => {
            let (what, got) = ("the work of a rank".to_string(), format!("a panic: {}", text(panic.as_ref())));
            Err(Box::new(Failed { error: AttentionError::Communication { what, rank, got }.into(), is_own: true }))
        }
    };
    host.finish(outcome.as_ref().err().map(|failed| match &failed.error {
        Error::Attention(AttentionError::Communication { got, .. }) if failed.is_own => got.clone(),
        error => format!("its error: {error}"),
    }));
    outcome
}

/// The text of a panic.
fn text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
}
