//! Attention weights to look at: in the terminal, or as an SVG picture.
//!
//! ```
//! use candle_attention::heatmap::{Colour, Heatmap};
//! use candle_core::{Device, Tensor};
//!
//! let weights = Tensor::new(&[[0.9f32, 0.1], [0.2, 0.8]], &Device::Cpu)?;
//! let heatmap = Heatmap::new(&weights, &["warm", "mat"])?;
//! let text = heatmap.to_text(Colour::Never);
//! assert!(text.contains("warm") && text.contains("0.90"));
//! # Ok::<(), candle_core::Error>(())
//! ```

mod svg;
mod text;

use candle_core::{DType, Device, Result, Tensor};

use crate::error::AttentionError;
pub use svg::to_svg;
pub use text::Colour;

/// The weights of one head, (len, len), and the words they belong to.
#[derive(Clone, Debug)]
pub struct Heatmap {
    words: Vec<String>,
    /// A row for each query.
    weights: Vec<Vec<f32>>,
}

impl Heatmap {
    /// Row `i` of `weights` (len, len) is what word `i` attends to.
    ///
    /// # Errors
    ///
    /// Another rank or size than the words ask for, weights that aren't finite numbers.
    pub fn new<Word: AsRef<str>>(weights: &Tensor, words: &[Word]) -> Result<Self> {
        if weights.dims() != [words.len(), words.len()] {
            let expected = format!("({0}, {0}), a row and a column for each word", words.len());
            let shape = weights.dims().to_vec();
            return Err(AttentionError::Shape { tensor: "weights", expected, shape }.into());
        }
        let weights = weights.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        if let Some(weight) = weights.iter().flatten().find(|weight| !weight.is_finite()) {
            let (name, expected, got) = ("weights", "finite numbers", f64::from(*weight));
            return Err(AttentionError::Number { name, expected, got }.into());
        }
        // A control character in a word could move the cursor of the terminal that shows it.
        let visible = |word: &str| {
            let escape = |c: char| {
                if c.is_control() { c.escape_default().to_string() } else { c.to_string() }
            };
            word.chars().map(escape).collect()
        };
        Ok(Self { words: words.iter().map(|word| visible(word.as_ref())).collect(), weights })
    }
}

/// Red, green and blue of a weight: from night blue over red to yellow, as light grows with the weight.
fn colour(weight: f32) -> [u8; 3] {
    const STOPS: [[f32; 3]; 3] = [[22.0, 24.0, 56.0], [190.0, 48.0, 84.0], [252.0, 226.0, 96.0]];
    let place = weight.clamp(0.0, 1.0) * (STOPS.len() - 1) as f32;
    let below = (place as usize).min(STOPS.len() - 2);
    let part = place - below as f32;
    std::array::from_fn(|i| (STOPS[below][i] * (1.0 - part) + STOPS[below + 1][i] * part).round() as u8)
}

/// Whether black rather than white text can be read on the colour of a weight.
fn wants_dark_text(weight: f32) -> bool {
    let [red, green, blue] = colour(weight).map(f32::from);
    // Relative luminance, ITU-R BT.601.
    0.299 * red + 0.587 * green + 0.114 * blue > 140.0
}
