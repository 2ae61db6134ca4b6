//! From sentences to tensors.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::grammar::Sentence;

/// Sentences as the input of a model.
pub struct Batch {
    /// The numbers of the words, (batch, len).
    pub tokens: Tensor,
    /// The number of words of each sentence. Padding follows them.
    pub lengths: Vec<usize>,
    /// The index of each sentence's property among all batch · len tokens, (batch).
    pub properties: Tensor,
}

/// Gives each word its number.
pub struct Reader {
    /// All words in alphabetical order. A word's number is its index.
    pub vocabulary: Vec<String>,
    pub device: Device,
}

impl Reader {
    pub fn read(&self, sentences: &[&Sentence]) -> Result<Batch> {
        let lengths = sentences.iter().map(|sentence| sentence.words.len()).collect::<Vec<_>>();
        let len = lengths.iter().copied().max().unwrap_or(0);
        let (mut tokens, mut properties) = (Vec::new(), Vec::new());
        for (row, sentence) in sentences.iter().enumerate() {
            properties.push((tokens.len() + sentence.property) as u32);
            for word in &sentence.words {
                tokens.push(self.number(word)?);
            }
            // Any word can be padding: the mask hides it.
            tokens.resize((row + 1) * len, 0);
        }
        let tokens = Tensor::from_vec(tokens, (sentences.len(), len), &self.device)?;
        Ok(Batch { tokens, lengths, properties: Tensor::new(properties, &self.device)? })
    }

    fn number(&self, word: &str) -> Result<u32> {
        let number = self.vocabulary.binary_search(&word.to_lowercase()).ok();
        Ok(number.with_context(|| format!("expected a word of the grammar, got \"{word}\""))? as u32)
    }
}
