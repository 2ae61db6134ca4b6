//! The command line.

use std::path::{Path, PathBuf};

use attention_examples::device::DeviceName;
use clap::Parser;

/// Shows what the words of a sentence attend to, in every layer and head of a model or of a saved layer.
#[derive(Parser, Debug)]
#[command(name = "inspect")]
pub struct Arguments {
    /// The sentence
    #[arg(default_value = "The cat sat on the mat because it is warm")]
    pub sentence: String,
    /// The folder with config.json, model.safetensors and tokenizer.json of a BERT; scripts/minilm fetches one
    #[arg(long, value_name = "DIR", default_value = "target/minilm")]
    pub model: PathBuf,
    /// Show a `SelfAttention` that candle-attention saved, instead of a model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub layer_file: Option<PathBuf>,
    /// The input of that layer: a safetensors file of one tensor, a row for each word [default: a fixed random vector for
    /// each word, as in warm_attends_to_mat]
    #[arg(long, value_name = "FILE", requires = "layer_file", conflicts_with = "model")]
    pub tokens: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Show the tokens of the model, which may be parts of words
    #[arg(long, conflicts_with = "layer_file")]
    pub pieces: bool,
    /// Show this layer, from 0, with all of its heads [default: the mean of all; on a page, everything]
    #[arg(long, value_name = "N")]
    pub layer: Option<usize>,
    /// Show this head of the layer alone, from 0
    #[arg(long, value_name = "N", requires = "layer")]
    pub head: Option<usize>,
    /// Rank the heads by the weight from this word ...
    #[arg(long, value_name = "WORD", requires = "to")]
    pub from: Option<String>,
    /// ... to this word; `word#2` is its second occurrence
    #[arg(long, value_name = "WORD", requires = "from")]
    pub to: Option<String>,
    /// Where to draw: a page (.html) or a picture (.svg, or .png with --features png) [default: the terminal]
    #[arg(long, value_name = "FILE", value_parser = Out::parse)]
    pub out: Option<Out>,
    /// Print all weights, by layer and head, to stdout as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// A file to draw to. The end of its name decides the kind.
#[derive(Clone, Debug)]
pub struct Out {
    pub path: PathBuf,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Html,
    Svg,
    #[cfg(feature = "png")]
    Png,
}

impl Out {
    fn parse(name: &str) -> Result<Self, String> {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let kind = match extension.to_lowercase().as_str() {
            "html" | "htm" => Kind::Html,
            "svg" => Kind::Svg,
            #[cfg(feature = "png")]
            "png" => Kind::Png,
            #[cfg(not(feature = "png"))]
            "png" => {
                return Err("this program was built without pictures in PNG: build it with `--features png`".into());
            }
            _ => return Err("expected a file that ends in .html, .svg or .png".into()),
        };
        Ok(Self { path: name.into(), kind })
    }
}
