//! Attention weights to look at: in the terminal, as an SVG or PNG picture, or as a page to explore in a browser.
//!
//! ```
//! use candle_attention::heatmap::{Colour, Heatmap, Page};
//! use candle_core::{Device, Tensor};
//!
//! let weights = Tensor::new(&[[0.9f32, 0.1], [0.2, 0.8]], &Device::Cpu)?;
//! let heatmap = Heatmap::new(&weights, &["warm", "mat"])?;
//! let text = heatmap.to_text(Colour::Never)?;
//! assert!(text.contains("warm") && text.contains("0.90"));
//!
//! let folder = std::env::temp_dir();
//! heatmap.save_svg(folder.join("heatmap.svg"))?;
//! Page::new("Two words").layer("layer 0", heatmap).save(folder.join("heatmap.html"))?;
//! # Ok::<(), candle_core::Error>(())
//! ```

mod colours;
mod label;
mod page;
#[cfg(feature = "png")]
mod png;
mod svg;
mod text;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};

use crate::error::AttentionError;
use crate::file;
use colours::{Scale, number};
pub use page::Page;
pub use text::Colour;

/// A row whose sum is further than this from 1 is no distribution. Sums of bf16 weights stay within it.
const SUM_TOLERANCE: f64 = 0.01;

/// The weights of one or more heads, and the tokens that they belong to.
#[derive(Clone, Debug)]
pub struct Heatmap {
    queries: Vec<String>,
    keys: Vec<String>,
    /// One for each head; a head alone needs none.
    titles: Vec<String>,
    /// (heads, q_len, kv_len), row by row.
    weights: Vec<f32>,
}

impl Heatmap {
    /// What each token gives to each: row `i` of a head is what token `i` attends to.
    ///
    /// # Shapes
    ///
    /// `weights`: (len, len) or (heads, len, len), of any float dtype and device.
    ///
    /// # Errors
    ///
    /// Weights of another shape than the tokens ask for, weights that aren't finite numbers, no token, no head.
    pub fn new<Token: AsRef<str>>(weights: &Tensor, tokens: &[Token]) -> Result<Self> {
        Self::between(weights, tokens, tokens)
    }

    /// What each of the queries gives to each of the keys, which are other tokens.
    ///
    /// # Shapes
    ///
    /// `weights`: (q_len, kv_len) or (heads, q_len, kv_len), of any float dtype and device.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::new`].
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::heatmap::{Colour, Heatmap};
    /// use candle_core::{Device, Tensor};
    ///
    /// let weights = Tensor::new(&[[0.7f32, 0.2, 0.1]], &Device::Cpu)?;
    /// let heatmap = Heatmap::between(&weights, &["chat"], &["the", "black", "cat"])?;
    /// assert!(heatmap.to_text(Colour::Never)?.contains("0.70"));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn between<Query, Key>(weights: &Tensor, queries: &[Query], keys: &[Key]) -> Result<Self>
    where
        Query: AsRef<str>,
        Key: AsRef<str>,
    {
        let (rows, columns) = (queries.len(), keys.len());
        let heads = match *weights.dims() {
            [q_len, kv_len] if (q_len, kv_len) == (rows, columns) => 1,
            [heads, q_len, kv_len] if (q_len, kv_len) == (rows, columns) => heads,
            _ => {
                let expected = format!("({rows}, {columns}) or (heads, {rows}, {columns}), as many as tokens");
                let shape = weights.dims().to_vec();
                return Err(AttentionError::Shape { tensor: "weights", expected, shape }.into());
            }
        };
        if heads * rows * columns == 0 {
            let expected = "at least one head, query and key".to_string();
            let shape = weights.dims().to_vec();
            return Err(AttentionError::Shape { tensor: "weights", expected, shape }.into());
        }
        let weights = weights.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
            let (name, expected, got) = ("weights", "finite numbers", f64::from(*weight));
            return Err(AttentionError::Number { name, expected, got }.into());
        }
        let titles = if heads == 1 { vec![String::new()] } else { (0..heads).map(|i| format!("head {i}")).collect() };
        let queries = queries.iter().map(|token| label::visible(token.as_ref())).collect();
        let keys = keys.iter().map(|token| label::visible(token.as_ref())).collect();
        Ok(Self { queries, keys, titles, weights })
    }

    /// The same with a title for each head. Without, several heads are "head 0", "head 1" and so on.
    ///
    /// # Errors
    ///
    /// More or fewer titles than heads.
    pub fn titled<Title: AsRef<str>>(mut self, titles: &[Title]) -> Result<Self> {
        if titles.len() != self.heads() {
            let expected = "one for each head";
            return Err(AttentionError::Number { name: "titles", expected, got: titles.len() as f64 }.into());
        }
        self.titles = titles.iter().map(|title| label::visible(title.as_ref())).collect();
        Ok(self)
    }

    /// What has to be said about rows that don't sum to 1, if there are such. Pictures, text and pages say it too.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::heatmap::Heatmap;
    /// use candle_core::{Device, Tensor};
    ///
    /// let weights = Tensor::new(&[[0.9f32, 0.1], [0.9, 0.8]], &Device::Cpu)?;
    /// let caption = Heatmap::new(&weights, &["warm", "mat"])?.caption();
    /// assert_eq!(caption.as_deref(), Some("1 of 2 rows doesn't sum to 1, but to 1.70"));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn caption(&self) -> Option<String> {
        let rows = self.weights.chunks(self.keys.len());
        let sums = rows.map(|row| row.iter().map(|&weight| f64::from(weight)).sum::<f64>());
        let odd = sums.filter(|sum| (sum - 1.0).abs() > SUM_TOLERANCE).collect::<Vec<_>>();
        let total = self.weights.len() / self.keys.len();
        let (least, most) = odd.iter().fold((f64::MAX, f64::MIN), |(low, high), &sum| (low.min(sum), high.max(sum)));
        let [least, most] = [least, most].map(|sum| number(sum as f32));
        match odd.len() {
            0 => None,
            1 => Some(format!("1 of {total} rows doesn't sum to 1, but to {least}")),
            many if least == most => Some(format!("{many} of {total} rows don't sum to 1, but to {least}")),
            many => Some(format!("{many} of {total} rows don't sum to 1, but to {least} up to {most}")),
        }
    }

    /// Writes the picture of [`Heatmap::to_svg`] to a file: the whole file or nothing.
    ///
    /// # Errors
    ///
    /// As [`Heatmap::to_svg`], and a file that can't be written.
    pub fn save_svg(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(file::write(path.as_ref(), self.to_svg()?.as_bytes())?)
    }

    fn heads(&self) -> usize {
        self.titles.len()
    }

    /// What a query gives to each key.
    fn row(&self, head: usize, query: usize) -> &[f32] {
        let start = (head * self.queries.len() + query) * self.keys.len();
        &self.weights[start..start + self.keys.len()]
    }

    /// One scale for all heads, so that they can be compared.
    fn scale(&self) -> Scale {
        Scale::of(&self.weights)
    }

    /// That neither side has more than `limit` tokens, and all heads together no more than `cells` weights.
    fn check_size(&self, limit: (usize, &'static str), cells: (usize, &'static str)) -> Result<()> {
        let tokens = self.queries.len().max(self.keys.len());
        let error = |name, expected, got| Err(AttentionError::Number { name, expected, got: got as f64 }.into());
        if tokens > limit.0 {
            return error("tokens in a heat map", limit.1, tokens);
        }
        if self.weights.len() > cells.0 {
            return error("weights in a heat map", cells.1, self.weights.len());
        }
        Ok(())
    }
}
