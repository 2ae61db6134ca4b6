//! How much each output can show.

use crate::HeatmapError;

/// The limits of one output, and what a caller can do who has more.
pub(crate) struct Limits {
    /// The output, as an error names it.
    pub(crate) output: &'static str,
    /// The most queries, and the most keys.
    pub(crate) max_tokens: usize,
    pub(crate) fewer_tokens: &'static str,
    /// The most weights, of all heads together.
    pub(crate) max_weights: usize,
    pub(crate) fewer_weights: &'static str,
}

impl Limits {
    /// Checks the larger of the numbers of queries and of keys.
    pub(crate) fn check_tokens(&self, got: usize) -> Result<(), HeatmapError> {
        if got <= self.max_tokens {
            return Ok(());
        }
        Err(HeatmapError::TooManyTokens { output: self.output, max: self.max_tokens, got, advice: self.fewer_tokens })
    }

    pub(crate) fn check_weights(&self, got: usize) -> Result<(), HeatmapError> {
        if got <= self.max_weights {
            return Ok(());
        }
        Err(HeatmapError::TooManyWeights {
            output: self.output,
            max: self.max_weights,
            got,
            advice: self.fewer_weights,
        })
    }
}
