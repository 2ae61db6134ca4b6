//! Every way an input can be wrong, and every way an output can fail.

use attention_files::FileError;

/// Why a heat map can't be made, shown or saved. The text says what was expected and what came.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HeatmapError {
    /// The number of weights doesn't fit the number of tokens.
    #[error(
        "weights: expected shape (heads, {q_len}, {kv_len}), so a multiple of {} numbers, got {got} numbers",
        *q_len as u128 * *kv_len as u128
    )]
    Shape {
        /// The number of queries.
        q_len: usize,
        /// The number of keys.
        kv_len: usize,
        /// The number of weights that came.
        got: usize,
    },
    /// A weight is NaN or infinite.
    #[error("weights: expected finite numbers, got {weight} in head {head} for query {query} and key {key}")]
    NonFinite {
        /// The head, counted from 0.
        head: usize,
        /// The index of the query.
        query: usize,
        /// The index of the key.
        key: usize,
        /// The weight.
        weight: f32,
    },
    /// There are no weights, no queries or no keys.
    #[error(
        "weights: expected at least one head, query and key, got {weights} weights, {q_len} queries and {kv_len} keys"
    )]
    Empty {
        /// The number of weights.
        weights: usize,
        /// The number of queries.
        q_len: usize,
        /// The number of keys.
        kv_len: usize,
    },
    /// There is not enough memory.
    #[error("{what}: expected {bytes} bytes of memory, got none")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// How many bytes it takes.
        bytes: usize,
    },
    /// A page has no layers.
    #[error("page: expected at least one layer, got none")]
    NoLayers,
    /// There are more titles than heads, or fewer.
    #[error("titles: expected {heads}, one for each head, got {got}")]
    Titles {
        /// The number of heads.
        heads: usize,
        /// The number of titles that came.
        got: usize,
    },
    /// There are more queries or keys than this output can show.
    #[error("{output}: expected at most {max} queries and {max} keys, got {got}; {advice}")]
    TooManyTokens {
        /// The output: "text", "SVG" or "page".
        output: &'static str,
        /// The most queries, and the most keys.
        max: usize,
        /// The number of queries or of keys, whichever is larger.
        got: usize,
        /// What to do instead.
        advice: &'static str,
    },
    /// There are more weights than this output can show.
    #[error("{output}: expected at most {max} weights, got {got}; {advice}")]
    TooManyWeights {
        /// The output: "text", "SVG" or "page".
        output: &'static str,
        /// The most weights, of all heads together.
        max: usize,
        /// The number of weights, of all heads together.
        got: usize,
        /// What to do instead.
        advice: &'static str,
    },
    /// A PNG picture would take too much memory.
    #[error("PNG: expected at most {max} pixels, got {width} x {height}; show some of the heads, or save an SVG")]
    TooManyPixels {
        /// The most pixels.
        max: u64,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A library that this crate calls can't draw the output.
    #[error("{output}: can't be drawn: {cause}")]
    Drawing {
        /// The output: "PNG" or "page".
        output: &'static str,
        /// The library's error.
        cause: String,
    },
    /// A file can't be written.
    #[error(transparent)]
    File(#[from] FileError),
}
