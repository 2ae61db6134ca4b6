//! What a word looks at in its sentence.

use std::fmt::Write;

use anyhow::{Result, ensure};
use candle_attention::heatmap::Colour;
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use crate::arguments::Arguments;
use crate::model::{Model, Sentence};
use crate::words::find;

/// The weights of one word's row, by word.
pub struct Look<'a> {
    sentence: &'a Sentence,
    word: usize,
    weights: Vec<f32>,
    heads: String,
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
        let in_range = |flag: &str, number: usize, count: usize| {
            ensure!(number < count, "{flag}: expected 0 to {}, got {number}", count - 1);
            Ok(())
        };
        let (weights, heads) = match (arguments.layer, arguments.head) {
            (None, _) => (weights.mean((0, 1))?, format!("the mean of {layers} layers of {heads} heads")),
            (Some(layer), head) => {
                in_range("--layer", layer, layers)?;
                let weights = weights.get(layer)?;
                match head {
                    None => (weights.mean(0)?, format!("layer {layer}, the mean of {heads} heads")),
                    Some(head) => {
                        in_range("--head", head, heads)?;
                        (weights.get(head)?, format!("layer {layer}, head {head}"))
                    }
                }
            }
        };
        Ok(Self { sentence, word, weights: weights.to_vec1()?, heads })
    }
}

impl Look<'_> {
    /// A line for each word of the sentence.
    pub fn to_text(&self, _colour: Colour) -> Result<String> {
        let Sentence { text, words, .. } = self.sentence;
        let mut lines = format!("What \"{}\" looks at in {text:?}, {}:\n\n", words[self.word], self.heads);
        let margin = words.iter().map(|word| word.width()).max().unwrap_or(0);
        for (word, weight) in words.iter().zip(&self.weights) {
            let bar = "█".repeat((weight * 60.0).round() as usize);
            writeln!(lines, "{}{word}  {weight:.2} {bar}", " ".repeat(margin - word.width()))?;
        }
        Ok(lines)
    }

    pub fn to_json(&self) -> Value {
        let Sentence { text, words, .. } = self.sentence;
        json!({
            "sentence": text, "word": words[self.word], "heads": self.heads, "words": words, "weights": self.weights,
        })
    }
}
