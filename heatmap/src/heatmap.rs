//! The weights, and the tokens that they belong to.

use std::path::Path;

use crate::HeatmapError;
use crate::colours::Scale;
use crate::label::visible;
use crate::limits::Limits;
use crate::memory;
use crate::number::two_decimals;

/// A row is no distribution if its sum differs from 1 by more than this. The sums of bf16 weights differ by less.
const SUM_TOLERANCE: f64 = 0.01;

/// The weights of one or more heads, and the tokens that they belong to.
#[derive(Clone, Debug)]
pub struct Heatmap {
    queries: Vec<String>,
    keys: Vec<String>,
    /// One for each head, if the caller gave titles.
    titles: Option<Vec<String>>,
    /// (heads, q_len, kv_len), row by row.
    weights: Vec<f32>,
}

impl Heatmap {
    /// Self-attention: the queries and the keys are the same tokens. Row `i` holds what token `i` attends to.
    ///
    /// # Shapes
    ///
    /// `weights`: (heads, len, len), row by row, where `len` is the number of tokens. The number of heads is
    /// `weights.len() / (len * len)`.
    ///
    /// # Errors
    ///
    /// - [`HeatmapError::Empty`] if there are no weights or no tokens.
    /// - [`HeatmapError::Shape`] if the number of weights is no multiple of `len * len`.
    /// - [`HeatmapError::NonFinite`] if a weight is NaN or infinite.
    /// - [`HeatmapError::Memory`] if there is too little memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_heatmap::{Colour, Heatmap};
    ///
    /// let heatmap = Heatmap::new(&[0.9, 0.1, 0.2, 0.8], &["warm", "mat"])?;
    /// assert_eq!(heatmap.to_text(Colour::Never)?.lines().count(), 3);
    /// # Ok::<(), attention_heatmap::HeatmapError>(())
    /// ```
    pub fn new<Token: AsRef<str>>(weights: &[f32], tokens: &[Token]) -> Result<Self, HeatmapError> {
        check_weights(weights, tokens.len(), tokens.len())?;
        let keys = labels(tokens)?;
        memory::ask("labels", memory::sum(keys.iter().map(|label| memory::of_label(label.len()))))?;
        Ok(Self { queries: keys.clone(), keys, titles: None, weights: copied(weights)? })
    }

    /// Cross-attention: the queries and the keys are different tokens. Row `i` holds what query `i` attends to.
    ///
    /// # Shapes
    ///
    /// `weights`: (heads, q_len, kv_len), row by row. The number of heads is `weights.len() / (q_len * kv_len)`.
    /// Weights of shape (heads, kv_len, q_len) can't be told apart from these by their number. [`Heatmap::caption`]
    /// then says that the rows don't sum to 1.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::new`], with `q_len * kv_len` for `len * len`.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_heatmap::{Colour, Heatmap};
    ///
    /// let heatmap = Heatmap::between(&[0.7, 0.2, 0.1], &["chat"], &["the", "black", "cat"])?;
    /// assert!(heatmap.to_text(Colour::Never)?.contains("0.70"));
    /// # Ok::<(), attention_heatmap::HeatmapError>(())
    /// ```
    pub fn between<Query, Key>(weights: &[f32], queries: &[Query], keys: &[Key]) -> Result<Self, HeatmapError>
    where
        Query: AsRef<str>,
        Key: AsRef<str>,
    {
        check_weights(weights, queries.len(), keys.len())?;
        Ok(Self { queries: labels(queries)?, keys: labels(keys)?, titles: None, weights: copied(weights)? })
    }

    /// The same heat map with a title for each head. Without titles, several heads are called "head 0", "head 1" and so
    /// on, and a single head has no title.
    ///
    /// # Errors
    ///
    /// [`HeatmapError::Titles`] if there are more titles than heads, or fewer. [`HeatmapError::Memory`].
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_heatmap::{Colour, Heatmap};
    ///
    /// let heatmap = Heatmap::new(&[0.5, 1.0], &["a"])?.titled(&["before training", "after training"])?;
    /// assert!(heatmap.to_text(Colour::Never)?.contains("after training"));
    /// # Ok::<(), attention_heatmap::HeatmapError>(())
    /// ```
    pub fn titled<Title: AsRef<str>>(mut self, titles: &[Title]) -> Result<Self, HeatmapError> {
        if titles.len() != self.heads() {
            return Err(HeatmapError::Titles { heads: self.heads(), got: titles.len() });
        }
        self.titles = Some(labels(titles)?);
        Ok(self)
    }

    /// A sentence about the rows that don't sum to 1, if there are any. The text, the pictures and the page show it
    /// too.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_heatmap::Heatmap;
    ///
    /// let caption = Heatmap::new(&[0.9, 0.1, 0.9, 0.8], &["warm", "mat"])?.caption();
    /// assert_eq!(caption.as_deref(), Some("1 of 2 rows doesn't sum to 1, but to 1.70"));
    /// # Ok::<(), attention_heatmap::HeatmapError>(())
    /// ```
    pub fn caption(&self) -> Option<String> {
        let rows = self.weights.chunks(self.keys.len());
        let total = rows.len();
        let sums = rows.map(|row| row.iter().map(|&weight| f64::from(weight)).sum::<f64>());
        let (mut odd, mut least, mut most) = (0, f64::MAX, f64::MIN);
        for sum in sums.filter(|sum| (sum - 1.0).abs() > SUM_TOLERANCE) {
            (odd, least, most) = (odd + 1, least.min(sum), most.max(sum));
        }
        let [least, most] = [least, most].map(|sum| two_decimals(sum as f32));
        match odd {
            0 => None,
            1 => Some(format!("1 of {total} rows doesn't sum to 1, but to {least}")),
            _ if least == most => Some(format!("{odd} of {total} rows don't sum to 1, but to {least}")),
            _ => Some(format!("{odd} of {total} rows don't sum to 1, but to {least} up to {most}")),
        }
    }

    /// Writes the picture of [`Heatmap::to_svg`] to a file: the whole file or nothing.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_svg`]. [`HeatmapError::File`] if the file can't be written.
    pub fn save_svg(&self, path: impl AsRef<Path>) -> Result<(), HeatmapError> {
        Ok(attention_files::write(path.as_ref(), self.to_svg()?.as_bytes())?)
    }

    pub(crate) fn queries(&self) -> &[String] {
        &self.queries
    }

    pub(crate) fn keys(&self) -> &[String] {
        &self.keys
    }

    /// The weights of all heads, row by row.
    pub(crate) fn weights(&self) -> &[f32] {
        &self.weights
    }

    pub(crate) fn heads(&self) -> usize {
        self.weights.len() / (self.queries.len() * self.keys.len())
    }

    /// A title for each head. An empty title isn't shown.
    pub(crate) fn titles(&self) -> Vec<String> {
        match (&self.titles, self.heads()) {
            (Some(titles), _) => titles.clone(),
            (None, 1) => vec![String::new()],
            (None, heads) => (0..heads).map(|head| format!("head {head}")).collect(),
        }
    }

    /// The weights of one query: one for each key.
    pub(crate) fn row(&self, head: usize, query: usize) -> &[f32] {
        let start = (head * self.queries.len() + query) * self.keys.len();
        &self.weights[start..start + self.keys.len()]
    }

    /// One scale for all heads, so that they can be compared.
    pub(crate) fn scale(&self) -> Scale {
        Scale::of(&self.weights)
    }

    /// Checks that an output can show this heat map, and that there is memory for it: `per_weight` bytes for each weight,
    /// and what the labels take.
    pub(crate) fn check(&self, limits: &Limits, per_weight: usize) -> Result<(), HeatmapError> {
        limits.check_tokens(self.queries.len().max(self.keys.len()))?;
        limits.check_weights(self.weights.len())?;
        let titles = self.titles.iter().flatten();
        let labels = self.queries.iter().chain(&self.keys).chain(titles).map(|label| memory::of_label(label.len()));
        let weights = self.weights.len().saturating_mul(per_weight);
        memory::ask(limits.output, memory::sum(labels).saturating_add(weights))
    }
}

/// Checks that the weights are (heads, q_len, kv_len) with at least one of each, and finite.
fn check_weights(weights: &[f32], q_len: usize, kv_len: usize) -> Result<(), HeatmapError> {
    if weights.is_empty() || q_len == 0 || kv_len == 0 {
        return Err(HeatmapError::Empty { weights: weights.len(), q_len, kv_len });
    }
    let cells = q_len.checked_mul(kv_len);
    if !cells.is_some_and(|cells| weights.len().is_multiple_of(cells)) {
        return Err(HeatmapError::Shape { q_len, kv_len, got: weights.len() });
    }
    if let Some(index) = weights.iter().position(|weight| !weight.is_finite()) {
        let (head, query, key) = (index / kv_len / q_len, index / kv_len % q_len, index % kv_len);
        return Err(HeatmapError::NonFinite { head, query, key, weight: weights[index] });
    }
    Ok(())
}

fn labels<Text: AsRef<str>>(texts: &[Text]) -> Result<Vec<String>, HeatmapError> {
    memory::ask("labels", memory::sum(texts.iter().map(|text| memory::of_label(text.as_ref().len()))))?;
    Ok(texts.iter().map(|text| visible(text.as_ref())).collect())
}

fn copied(weights: &[f32]) -> Result<Vec<f32>, HeatmapError> {
    memory::ask("weights", size_of_val(weights))?;
    Ok(weights.to_vec())
}
