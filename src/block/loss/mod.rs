//! The cross-entropy of logits and labels, and that of a linear layer whose logits are never all in memory.

mod head;
mod labels;
mod logits;
mod reference;

pub use head::linear_cross_entropy;
pub use logits::cross_entropy;

use crate::check::check_number;
use crate::error::AttentionError;

/// What becomes of the losses of all rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean over the rows that aren't ignored; 0 if all are. (PyTorch gives NaN then.)
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// The options of [`cross_entropy`] and [`linear_cross_entropy`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::{CrossEntropyOptions, Reduction};
///
/// let options = CrossEntropyOptions { label_smoothing: 0.1, ..Default::default() };
/// assert_eq!((options.ignore_index, options.reduction), (None, Reduction::Mean));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// ε, the share of the loss that goes to all labels alike, in [0, 1].
    pub label_smoothing: f64,
    /// The label of rows that count nothing, such as PyTorch's -100. It may be any number, also one that is a label.
    pub ignore_index: Option<i64>,
    /// Mean or sum.
    pub reduction: Reduction,
}

impl CrossEntropyOptions {
    fn check(&self) -> Result<(), AttentionError> {
        let smoothing = Some(self.label_smoothing);
        check_number("label_smoothing", smoothing, "a number in [0, 1]", |x| (0.0..=1.0).contains(&x))
    }

    /// What the sum of the losses is multiplied by, if so many rows aren't ignored.
    fn scale(&self, counted: usize) -> f64 {
        match self.reduction {
            Reduction::Mean => 1.0 / counted.max(1) as f64,
            Reduction::Sum => 1.0,
        }
    }
}
