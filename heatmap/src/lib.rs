//! Attention weights to look at: in the terminal, as an SVG or PNG picture, or as a page to explore in a browser.
//!
//! Weights and labels go in, a text, a picture or a page comes out. The weights are plain numbers, so they may come
//! from any library.
//!
//! ```
//! use attention_heatmap::{Colour, Heatmap, Page};
//!
//! // Two heads over two tokens: (heads, q_len, kv_len), row by row.
//! let weights = [0.9, 0.1, 0.2, 0.8, 0.5, 0.5, 0.0, 1.0];
//! let heatmap = Heatmap::new(&weights, &["warm", "mat"])?;
//!
//! let text = heatmap.to_text(Colour::Never)?;
//! assert!(text.contains("head 1") && text.contains("warm") && text.contains("0.90"));
//! assert!(heatmap.to_svg()?.starts_with("<svg"));
//! let page = Page::new("Two words").layer("layer 0", heatmap);
//! assert!(page.to_html()?.contains("<title>Two words</title>"));
//! # Ok::<(), attention_heatmap::HeatmapError>(())
//! ```
//!
//! | output | functions | at most, queries and keys each | at most, weights |
//! |---|---|---|---|
//! | text for the terminal | [`Heatmap::to_text`] | 512 | 2^20 |
//! | SVG | [`Heatmap::to_svg`], [`Heatmap::save_svg`] | 128 | 2^18 |
//! | PNG, with the feature `png` | `Heatmap::to_png`, `Heatmap::save_png` | 128 | 2^18 |
//! | HTML page | [`Page::to_html`], [`Page::save`] | 1024 | 2^24 |
//!
//! From a candle tensor of shape (heads, q_len, kv_len) or (q_len, kv_len), the weights are
//! `tensor.flatten_all()?.to_vec1::<f32>()?`.
//!
//! Tokens may hold anything. What can't be seen is written out: a space at either end as `␣`, an empty token as `∅`, a
//! control character as its escape. No token can act on the terminal, the picture or the page.
//!
//! # The map
//!
//! A file imports only from files on lower floors.
//!
//! | floor | file | what |
//! |---|---|---|
//! | 4 | `page`, `png` | the HTML page; the SVG drawn as pixels |
//! | 3 | `svg`, `text` | one picture of all heads; text for the terminal |
//! | 2 | `heatmap` | weights and labels, checked |
//! | 1 | `label`, `limits`, `memory` | tokens as labels; how much each output can show; memory, asked for before |
//! | 0 | `colours`, `font`, `number`, `error` | colours of weights, widths of letters, numbers as text, errors |

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod colours;
mod error;
mod font;
mod heatmap;
mod label;
mod limits;
mod memory;
mod number;
mod page;
#[cfg(feature = "png")]
mod png;
mod svg;
mod text;

pub use attention_files::FileError;
pub use error::HeatmapError;
pub use heatmap::Heatmap;
pub use page::Page;
pub use text::Colour;

/// Runs the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
