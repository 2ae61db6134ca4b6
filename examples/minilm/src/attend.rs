//! What a word attends to in its sentence.

use anyhow::{Result, ensure};
use attention_examples::words::find;
use attention_heatmap::{Colour, Heatmap};
use candle_core::Tensor;
use minilm::model::{Model, Sentence};
use serde_json::{Value, json};

use crate::arguments::Arguments;

/// The attention weights of one word of a sentence.
pub struct Look<'a> {
    sentence: &'a Sentence,
    word: usize,
    /// The names of the rows: layers, heads of a layer, or one head.
    rows: Vec<String>,
    /// (rows, words)
    weights: Tensor,
}

/// A look for each sentence that has the word.
pub fn looks<'a>(model: &Model, sentences: &'a [Sentence], arguments: &Arguments) -> Result<Vec<Look<'a>>> {
    let Some(wanted) = &arguments.attend else { return Ok(Vec::new()) };
    let mut looks = Vec::new();
    let mut missing = None;
    for sentence in sentences {
        match find(&sentence.words, wanted, "--attend") {
            Ok(word) => looks.push(Look::new(model, sentence, word, arguments)?),
            Err(error) => missing = missing.or(Some(error)),
        }
    }
    match missing {
        Some(error) if looks.is_empty() => Err(error),
        _ => Ok(looks),
    }
}

impl<'a> Look<'a> {
    fn new(model: &Model, sentence: &'a Sentence, word: usize, arguments: &Arguments) -> Result<Self> {
        let weights = sentence.by_word(&model.attention(sentence)?)?.narrow(2, word, 1)?.squeeze(2)?;
        let (layers, heads, _) = weights.dims3()?;
        let (rows, weights) = match (arguments.layer, arguments.head) {
            (None, _) => (names("layer", layers), weights.mean(1)?),
            (Some(layer), None) => (names("head", heads), weights.get(in_range("--layer", layer, layers)?)?),
            (Some(layer), Some(head)) => {
                let weights = weights.get(in_range("--layer", layer, layers)?)?;
                let weights = weights.narrow(0, in_range("--head", head, heads)?, 1)?;
                return Ok(Self { sentence, word, rows: vec![format!("layer {layer}, head {head}")], weights });
            }
        };
        let rows = rows.chain(["mean".into()]).collect();
        let weights = Tensor::cat(&[&weights, &weights.mean_keepdim(0)?], 0)?;
        Ok(Self { sentence, word, rows, weights })
    }

    /// A row for each layer, or head of the layer that was asked for.
    pub fn to_text(&self, colour: Colour) -> Result<String> {
        let Sentence { text, words, .. } = self.sentence;
        let weights = self.weights.flatten_all()?.to_vec1::<f32>()?;
        let table = Heatmap::between(&weights, &self.rows, words)?.to_text(colour)?;
        Ok(format!("What \"{}\" looks at in {text:?}:\n\n{table}", words[self.word]))
    }

    pub fn to_json(&self) -> Result<Value> {
        let Sentence { text, words, .. } = self.sentence;
        let rows = self.rows.iter().zip(self.weights.to_vec2::<f32>()?);
        let rows = rows.map(|(name, weights)| json!({"name": name, "weights": weights})).collect::<Vec<_>>();
        Ok(json!({"sentence": text, "word": words[self.word], "words": words, "rows": rows}))
    }
}

fn names(name: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{name} {number}"))
}

fn in_range(flag: &str, number: usize, count: usize) -> Result<usize> {
    ensure!(number < count, "{flag}: expected 0 to {}, got {number}", count - 1);
    Ok(number)
}
