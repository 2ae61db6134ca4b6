//! Heat maps as one HTML page to explore in a browser, without a network.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_core::{Error, Result};
use serde::Serialize;

use super::Heatmap;
use super::colours::{DARK, LIGHT, Rgb};
use super::label::visible;
use super::svg::escape;
use crate::error::AttentionError;
use crate::file;

/// The page; names between `%%` stand for what is filled in.
const HTML: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const MATRIX: &str = include_str!("page_matrix.js");
const SCRIPT: &str = include_str!("page.js");

/// What a browser still scrolls and redraws at once.
const MAX_TOKENS: (usize, &str) = (1024, "at most 1024 on either side; show part of the sequence");
/// 2^24 weights are 43 MiB of page.
const MAX_WEIGHTS: (usize, &str) = (1 << 24, "at most 16777216; show some of the layers or heads");

/// Layers of heat maps as a page for the browser: choose a layer, a head and a token, and see where it looks.
///
/// The page is one file that needs no network, and works with mouse and keyboard, light and dark.
///
/// # Examples
///
/// ```
/// use candle_attention::heatmap::{Heatmap, Page};
/// use candle_core::{Device, Tensor};
///
/// let weights = Tensor::full(0.5f32, (12, 2, 2), &Device::Cpu)?; // (heads, len, len)
/// let mut page = Page::new("Two layers");
/// for layer in 0..2 {
///     page = page.layer(&format!("layer {layer}"), Heatmap::new(&weights, &["warm", "mat"])?);
/// }
/// assert!(page.to_html()?.contains("<title>Two layers</title>"));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    layers: Vec<(String, Heatmap)>,
}

/// What the script of the page reads.
#[derive(Serialize)]
struct Data<'a> {
    light: [Rgb; 5],
    dark: [Rgb; 5],
    layers: Vec<Layer<'a>>,
}

#[derive(Serialize)]
struct Layer<'a> {
    name: &'a str,
    queries: &'a [String],
    keys: &'a [String],
    titles: &'a [String],
    caption: Option<String>,
    low: f64,
    high: f64,
    /// 16 bits a weight, from `low` to `high`, low byte first, in base64.
    weights: String,
}

impl Page {
    /// A page without layers yet.
    pub fn new(title: &str) -> Self {
        Self { title: visible(title), layers: Vec::new() }
    }

    /// The same with one more layer. Its heads may be any number, and its tokens others than those of the other layers.
    pub fn layer(mut self, name: &str, heatmap: Heatmap) -> Self {
        self.layers.push((visible(name), heatmap));
        self
    }

    /// The page as HTML.
    ///
    /// # Errors
    ///
    /// No layer, more than 1024 queries or keys, or than 2^24 weights in all layers together.
    pub fn to_html(&self) -> Result<String> {
        let total = self.layers.iter().map(|(_, heatmap)| heatmap.weights.len()).sum::<usize>();
        if total == 0 {
            let (name, expected) = ("layers of a page", "at least one");
            return Err(AttentionError::Number { name, expected, got: 0.0 }.into());
        }
        if total > MAX_WEIGHTS.0 {
            let (name, expected) = ("weights in a page", MAX_WEIGHTS.1);
            return Err(AttentionError::Number { name, expected, got: total as f64 }.into());
        }
        for (_, heatmap) in &self.layers {
            heatmap.check_size(MAX_TOKENS, MAX_WEIGHTS)?;
        }
        let layers = self.layers.iter().map(|(name, heatmap)| layer(name, heatmap)).collect();
        let data = serde_json::to_string(&Data { light: LIGHT, dark: DARK, layers }).map_err(Error::wrap)?;
        // Nothing in the data can end the element that it stands in.
        let data = data.replace('<', "\\u003c");
        let mut page = String::with_capacity(data.len() + HTML.len() + STYLE.len() + MATRIX.len() + SCRIPT.len());
        for (i, piece) in HTML.split("%%").enumerate() {
            match piece {
                "title" if i % 2 == 1 => page.push_str(&escape(&self.title)),
                "style" if i % 2 == 1 => page.push_str(STYLE),
                "matrix" if i % 2 == 1 => page.push_str(MATRIX),
                "script" if i % 2 == 1 => page.push_str(SCRIPT),
                "data" if i % 2 == 1 => page.push_str(&data),
                _ => page.push_str(piece),
            }
        }
        Ok(page)
    }

    /// Writes the page to a file: the whole file or nothing.
    ///
    /// # Errors
    ///
    /// As [`Page::to_html`], and a file that can't be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(file::write(path.as_ref(), self.to_html()?.as_bytes())?)
    }
}

fn layer<'a>(name: &'a str, heatmap: &'a Heatmap) -> Layer<'a> {
    let scale = heatmap.scale();
    let steps = |weight: &f32| (scale.place(*weight) * f64::from(u16::MAX)).round() as u16;
    let bytes = heatmap.weights.iter().flat_map(|weight| steps(weight).to_le_bytes()).collect::<Vec<_>>();
    Layer {
        name,
        queries: &heatmap.queries,
        keys: &heatmap.keys,
        titles: &heatmap.titles,
        caption: heatmap.caption(),
        low: scale.low,
        high: scale.high,
        weights: STANDARD.encode(bytes),
    }
}
