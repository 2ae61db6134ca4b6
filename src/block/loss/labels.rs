//! Labels, checked.

use attention_kernels::collected;
use attention_kernels::loss::IGNORED;
use candle_core::Tensor;

use crate::block::embedding::whole_numbers;
use crate::error::{AttentionError, Result};

/// Labels as the kernels take them.
pub(super) struct Labels {
    /// Each is below the vocabulary's size or [`IGNORED`].
    pub(super) labels: Vec<u32>,
    /// How many aren't ignored.
    pub(super) counted: usize,
}

/// Reads the labels of the rows of logits (..., vocabulary).
pub(super) fn read(targets: &Tensor, rows: &[usize], vocabulary: usize, ignore_index: Option<i64>) -> Result<Labels> {
    if targets.dims() != rows {
        let expected = format!("{rows:?}, one for each row of {vocabulary} logits");
        return Err(AttentionError::Shape { tensor: "targets", expected, shape: targets.dims().to_vec() }.into());
    }
    let numbers = whole_numbers("targets", targets)?;
    let is_label = |label: i64| (0..vocabulary as i64).contains(&label) && label < i64::from(IGNORED);
    let is_ignored = |label: i64| Some(label) == ignore_index;
    if let Some((position, &got)) = numbers.iter().enumerate().find(|(_, x)| !is_label(**x) && !is_ignored(**x)) {
        let mut expected = format!("a label in 0..{vocabulary}, the size of the vocabulary");
        if let Some(index) = ignore_index {
            expected += &format!(", or the ignored {index}");
        }
        return Err(AttentionError::Id { tensor: "targets", expected, got, position }.into());
    }
    let labels = collected("labels", numbers.iter().map(|&x| if is_ignored(x) { IGNORED } else { x as u32 }))?;
    let counted = labels.iter().filter(|label| **label != IGNORED).count();
    Ok(Labels { labels, counted })
}
