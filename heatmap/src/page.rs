//! Heat maps as one HTML page to explore in a browser.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::colours::{DARK, LIGHT, Rgb};
use crate::label::visible;
use crate::limits::Limits;
use crate::memory;
use crate::svg::escape;
use crate::{Heatmap, HeatmapError};

/// The page. A name between `%%` is replaced by the part of that name.
const HTML: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const MATRIX: &str = include_str!("page_matrix.js");
const SCRIPT: &str = include_str!("page.js");

const LIMITS: Limits = Limits {
    output: "page",
    // A browser still scrolls and redraws so many without delay.
    max_tokens: 1024,
    fewer_tokens: "show part of the sequence",
    // So many weights are 43 MiB of page.
    max_weights: 1 << 24,
    fewer_weights: "show some of the layers or heads",
};

/// Layers of heat maps as a page for the browser. The reader chooses a layer, a head and a token, and sees which keys
/// the token attends to.
///
/// The page is one file that needs no network. It works with the mouse and with the keyboard, in light and in dark
/// colours.
///
/// # Examples
///
/// ```
/// use attention_heatmap::{Heatmap, Page};
///
/// let weights = [0.5; 12 * 2 * 2]; // (heads, len, len)
/// let mut page = Page::new("Two layers");
/// for layer in 0..2 {
///     page = page.layer(&format!("layer {layer}"), Heatmap::new(&weights, &["warm", "mat"])?);
/// }
/// assert!(page.to_html()?.contains("<title>Two layers</title>"));
/// # Ok::<(), attention_heatmap::HeatmapError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    layers: Vec<(String, Heatmap)>,
}

/// The JSON that the script of the page reads.
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
    titles: Vec<String>,
    caption: Option<String>,
    low: f64,
    high: f64,
    /// 16 bits for each weight: 0 is `low`, 65535 is `high`. Low byte first, in base64.
    weights: String,
}

impl Page {
    /// A page without layers.
    pub fn new(title: &str) -> Self {
        Self { title: visible(title), layers: Vec::new() }
    }

    /// The same page with one more layer. Layers may differ in their number of heads and in their tokens.
    pub fn layer(mut self, name: &str, heatmap: Heatmap) -> Self {
        self.layers.push((visible(name), heatmap));
        self
    }

    /// The page as HTML.
    ///
    /// # Errors
    ///
    /// - [`HeatmapError::NoLayers`].
    /// - [`HeatmapError::TooManyTokens`] for more than 1024 queries or 1024 keys in a layer.
    /// - [`HeatmapError::TooManyWeights`] for more than 2^24 weights in all layers together.
    /// - [`HeatmapError::Memory`] if there is too little memory.
    pub fn to_html(&self) -> Result<String, HeatmapError> {
        if self.layers.is_empty() {
            return Err(HeatmapError::NoLayers);
        }
        LIMITS.check_weights(self.layers.iter().map(|(_, heatmap)| heatmap.weights().len()).sum())?;
        for (_, heatmap) in &self.layers {
            heatmap.check(&LIMITS, 0)?;
        }
        memory::ask(LIMITS.output, self.memory())?;
        let layers = self.layers.iter().map(|(name, heatmap)| layer(name, heatmap)).collect();
        let data = serde_json::to_string(&Data { light: LIGHT, dark: DARK, layers })
            .map_err(|error| HeatmapError::Drawing { output: "page", cause: error.to_string() })?;
        // Without a `<`, the data can't end the script element that holds it.
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

    /// The most bytes of all layers while the page is made. A weight is two bytes, then four characters for three of its bytes; the
    /// data grow to twice their length, are escaped, and become part of the page. A character of a text is at most six in the data.
    fn memory(&self) -> usize {
        let of_text = |text: &String| memory::of_label(text.len()).saturating_mul(2);
        let of_layer = |(name, heatmap): &(String, Heatmap)| {
            let texts = heatmap.queries().iter().chain(heatmap.keys()).chain([name]);
            memory::sum(texts.map(of_text).chain([heatmap.weights().len().saturating_mul(24)]))
        };
        memory::sum(self.layers.iter().map(of_layer).chain([of_text(&self.title)]))
    }

    /// Writes the page to a file: the whole file or nothing.
    ///
    /// # Errors
    ///
    /// As [`Page::to_html`]. [`HeatmapError::File`] if the file can't be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), HeatmapError> {
        Ok(attention_files::write(path.as_ref(), self.to_html()?.as_bytes())?)
    }
}

fn layer<'a>(name: &'a str, heatmap: &'a Heatmap) -> Layer<'a> {
    let scale = heatmap.scale();
    let steps = |weight: &f32| (scale.fraction(*weight) * f64::from(u16::MAX)).round() as u16;
    let bytes = heatmap.weights().iter().flat_map(|weight| steps(weight).to_le_bytes()).collect::<Vec<_>>();
    Layer {
        name,
        queries: heatmap.queries(),
        keys: heatmap.keys(),
        titles: heatmap.titles(),
        caption: heatmap.caption(),
        low: scale.low,
        high: scale.high,
        weights: STANDARD.encode(bytes),
    }
}
