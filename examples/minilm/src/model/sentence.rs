//! A sentence as tokens, and the words that they belong to.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use tokenizers::{Encoding, PostProcessor, Tokenizer, TruncationParams};

use super::Config;

/// The tokenizer of tokenizer.json, with the limit of the model.
pub struct Reader(Tokenizer);

/// A sentence as the model reads it, with a token for its start and one for its end.
pub struct Sentence {
    pub text: String,
    /// Numbers of the tokens.
    pub ids: Vec<u32>,
    /// The tokens as the vocabulary writes them: `##` stands before one that continues a word.
    pub pieces: Vec<String>,
    /// The words as the text writes them, and special tokens such as `[CLS]`.
    pub words: Vec<String>,
    /// The tokens of each word.
    spans: Vec<Range<usize>>,
    /// The number of tokens at the end that the model doesn't read, because there are too many.
    pub cut: usize,
}

impl Reader {
    /// Reads tokenizer.json.
    pub fn open(folder: &Path, config: &Config) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let failed = |cause| anyhow!("can't read {}: {cause}", path.display());
        let mut tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
        // The file may ask for padding.
        tokenizer.with_padding(None);
        Self(tokenizer).with_max_tokens(config.max_seq_length)
    }

    /// With another limit.
    pub fn with_max_tokens(mut self, max_length: usize) -> Result<Self> {
        let special = self.0.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        ensure!(
            max_length > special,
            "expected more than the {special} special tokens in a sentence, got {max_length}"
        );
        let truncation = TruncationParams { max_length, ..Default::default() };
        self.0.with_truncation(Some(truncation)).map_err(|cause| anyhow!("the limit {max_length}: {cause}"))?;
        Ok(self)
    }

    /// The tokens of a text.
    pub fn read(&self, text: &str) -> Result<Sentence> {
        let encoding = self.0.encode(text, true).map_err(|cause| anyhow!("\"{text}\" can't be read: {cause}"))?;
        let cut = encoding.get_overflowing().iter().map(words_tokens).sum();
        let mut sentence = Sentence {
            text: text.to_string(),
            ids: encoding.get_ids().to_vec(),
            pieces: encoding.get_tokens().to_vec(),
            words: Vec::new(),
            spans: Vec::new(),
            cut,
        };
        let mut last = None;
        for (i, &word) in encoding.get_word_ids().iter().enumerate() {
            match sentence.spans.last_mut() {
                Some(span) if word.is_some() && word == last => span.end = i + 1,
                _ => sentence.spans.push(i..i + 1),
            }
            last = word;
        }
        let offsets = encoding.get_offsets();
        for span in &sentence.spans {
            let letters = offsets[span.start].0..offsets[span.end - 1].1;
            let special = encoding.get_word_ids()[span.start].is_none();
            let word = text.get(letters).filter(|word| !special && !word.is_empty());
            sentence.words.push(word.unwrap_or(&sentence.pieces[span.start]).to_string());
        }
        Ok(sentence)
    }
}

/// The number of tokens that aren't special.
fn words_tokens(encoding: &Encoding) -> usize {
    encoding.get_special_tokens_mask().iter().filter(|&&special| special == 0).count()
}

impl Sentence {
    /// A note for a sentence that isn't read to its end.
    pub fn cut_note(&self) -> Option<String> {
        let (read, all) = (self.ids.len(), self.ids.len() + self.cut);
        (self.cut > 0)
            .then(|| format!("of the {all} tokens of a sentence, only {read} are read: {:?}", self.beginning()))
    }

    fn beginning(&self) -> String {
        self.text.chars().take(40).chain(['…']).collect()
    }

    /// From the weights (.., len, len) of tokens to the weights (.., words, words) of words. The weight that a word gets is
    /// the sum over its tokens, and the weights that it gives are the mean over its tokens, so that rows still sum to 1.
    /// (Clark et al., "What Does BERT Look At?", BlackboxNLP 2019, section 4.1.)
    pub fn by_word(&self, weights: &Tensor) -> Result<Tensor> {
        let (words, len) = (self.spans.len(), self.ids.len());
        let mut sum = vec![0f32; words * len];
        let mut mean = vec![0f32; words * len];
        for (word, span) in self.spans.iter().enumerate() {
            let row = word * len;
            sum[row + span.start..row + span.end].fill(1.0);
            mean[row + span.start..row + span.end].fill(1.0 / span.len() as f32);
        }
        let matrix = |entries| Tensor::from_vec(entries, (words, len), &Device::Cpu)?.to_device(weights.device());
        let gets = weights.contiguous()?.broadcast_matmul(&matrix(sum)?.t()?)?;
        Ok(matrix(mean)?.broadcast_matmul(&gets)?)
    }
}
