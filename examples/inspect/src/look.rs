//! The attention weights of a sentence, in every layer and head.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use attention_examples::embeddings::embeddings;
use attention_heatmap::{Heatmap, Page};
use candle_attention::SelfAttention;
use candle_core::{DType, Device, Tensor};

use crate::arguments::Arguments;
use crate::model::Model;

/// Attention weights, and the words that they belong to.
pub struct Look {
    pub title: String,
    pub words: Vec<String>,
    /// (layers, heads, len, len)
    pub weights: Tensor,
}

impl Look {
    pub fn new(arguments: &Arguments) -> Result<Self> {
        let device = arguments.device.open()?;
        match &arguments.layer_file {
            Some(file) => Self::of_layer(file, arguments.tokens.as_deref(), &arguments.sentence, &device),
            None => Self::of_model(&arguments.model, &arguments.sentence, arguments.pieces, &device),
        }
    }

    fn of_model(folder: &Path, text: &str, pieces: bool, device: &Device) -> Result<Self> {
        let model = Model::open(folder, device)?;
        let sentence = model.read(text)?;
        if let Some(note) = sentence.cut_note() {
            eprintln!("note: {note}");
        }
        let weights = model.attention(&sentence)?;
        let title = text.to_string();
        if pieces {
            return Ok(Self { title, words: sentence.pieces, weights });
        }
        let weights = sentence.by_word(&weights)?;
        Ok(Self { title, words: sentence.words, weights })
    }

    fn of_layer(file: &Path, tokens: Option<&Path>, text: &str, device: &Device) -> Result<Self> {
        let words = text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        ensure!(!words.is_empty(), "the sentence has no words");
        let layer = SelfAttention::load(file, device)?;
        let dim = layer.config().embed_dim;
        let tokens = match tokens {
            Some(path) => read_tokens(path, words.len(), dim, device)?,
            None => embeddings(&words, dim, device)?,
        };
        let (_, weights) = layer.forward_with_weights(&tokens.to_dtype(layer.q_proj().weight().dtype())?)?;
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
        let weights = weights.to_dtype(DType::F32)?.unsqueeze(0)?;
        Ok(Self { title: format!("{name}: {text}"), words, weights })
    }

    /// The mean of all heads; or every head of a layer; or one head.
    pub fn heatmap(&self, layer: Option<usize>, head: Option<usize>) -> Result<Heatmap> {
        let (layers, heads, _, _) = self.weights.dims4()?;
        let Some(layer) = layer else {
            let title = format!("the mean of {} of {}", count(layers, "layer"), count(heads, "head"));
            return Ok(Heatmap::new(&numbers(&self.weights.mean((0, 1))?)?, &self.words)?.titled(&[title])?);
        };
        ensure!(layer < layers, "--layer: expected 0 to {}, got {layer}", layers - 1);
        let weights = self.weights.get(layer)?;
        let title = |head| format!("layer {layer}, head {head}");
        let Some(head) = head else {
            let titles = (0..heads).map(title).collect::<Vec<_>>();
            return Ok(Heatmap::new(&numbers(&weights)?, &self.words)?.titled(&titles)?);
        };
        ensure!(head < heads, "--head: expected 0 to {}, got {head}", heads - 1);
        Ok(Heatmap::new(&numbers(&weights.get(head)?)?, &self.words)?.titled(&[title(head)])?)
    }

    /// All layers and heads, the means first; or one layer.
    pub fn page(&self, layer: Option<usize>, head: Option<usize>) -> Result<Page> {
        let page = Page::new(&self.title);
        if let Some(number) = layer {
            return Ok(page.layer(&format!("layer {number}"), self.heatmap(layer, head)?));
        }
        let (layers, heads, _, _) = self.weights.dims4()?;
        let mut page = page.layer("all layers", self.heatmap(None, None)?);
        let titles = std::iter::once("mean".into()).chain((0..heads).map(|head| format!("head {head}")));
        let titles = titles.collect::<Vec<String>>();
        for layer in 0..layers {
            let weights = self.weights.get(layer)?;
            let weights = Tensor::cat(&[weights.mean_keepdim(0)?, weights], 0)?;
            page =
                page.layer(&format!("layer {layer}"), Heatmap::new(&numbers(&weights)?, &self.words)?.titled(&titles)?);
        }
        Ok(page)
    }
}

fn count(number: usize, name: &str) -> String {
    if number == 1 { format!("1 {name}") } else { format!("{number} {name}s") }
}

/// All weights, row by row.
fn numbers(weights: &Tensor) -> Result<Vec<f32>> {
    Ok(weights.flatten_all()?.to_vec1()?)
}

/// The input (words, dim) from a file of one tensor.
fn read_tokens(path: &Path, words: usize, dim: usize, device: &Device) -> Result<Tensor> {
    let tensors = candle_core::safetensors::load(path, device);
    let tensors = tensors.with_context(|| format!("can't read {}", path.display()))?;
    ensure!(tensors.len() == 1, "{}: expected one tensor, got {}", path.display(), tensors.len());
    let tokens = tensors.into_values().next().context("no tensor")?;
    ensure!(
        tokens.dims() == [words, dim],
        "{}: expected [{words}, {dim}], a row for each word, got {:?}",
        path.display(),
        tokens.dims()
    );
    Ok(tokens)
}
