//! The sentence encoder all-MiniLM-L6-v2 (a BERT of 6 layers, 12 heads, width 384), or another BERT, from a folder as
//! sentence-transformers writes it: `config.json`, `model.safetensors`, `tokenizer.json` and, if it is there,
//! `sentence_bert_config.json`.
//!
//! The model is for inference: its weights are constants, and candle's fast `LayerNorm::forward` has no gradient.
//! (Wang et al., "MiniLM", NeurIPS 2020; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019, section 3.)

mod config;
mod encoder;
mod sentence;
mod weights;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;

pub use config::Config;
pub use encoder::Encoder;
pub use sentence::{Reader, Sentence};

/// A shorter vector is divided by this, as in `torch.nn.functional.normalize`.
const MIN_LENGTH: f64 = 1e-12;

/// The tokenizer and the network.
pub struct Model {
    pub config: Config,
    reader: Reader,
    encoder: Encoder,
    device: Device,
}

impl Model {
    /// The model in a folder. Its weights are checked against its config.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let config = Config::read(folder)?;
        let reader = Reader::open(folder, &config)?;
        let vb = VarBuilder::from_tensors(weights::load(folder, &config, device)?, DType::F32, device);
        let encoder = Encoder::new(&config, vb).with_context(|| folder.display().to_string())?;
        Ok(Self { config, reader, encoder, device: device.clone() })
    }

    /// Checks that the folder asks for the mean of the token states, as [`Model::embed`] computes it, if it says anything.
    pub fn check_pooling(folder: &Path) -> Result<()> {
        config::check_pooling(folder)
    }

    /// The tokens of a sentence.
    pub fn read(&self, text: &str) -> Result<Sentence> {
        self.reader.read(text)
    }

    /// The states of the last layer, (batch, longest, hidden_size). Those after the end of a shorter sentence are padding,
    /// with any values.
    pub fn states(&self, sentences: &[&Sentence]) -> Result<Tensor> {
        let (ids, lengths) = self.batch(sentences)?;
        self.states_of(&ids, &lengths)
    }

    /// As [`Model::states`], from the output of [`Model::batch`].
    pub fn states_of(&self, ids: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        self.encoder.forward(ids, lengths)
    }

    /// An embedding (batch, hidden_size) of length 1 for each sentence: the mean of its token states.
    pub fn embed(&self, sentences: &[&Sentence]) -> Result<Tensor> {
        let (ids, lengths) = self.batch(sentences)?;
        let means = self.means(&self.states_of(&ids, &lengths)?, &lengths)?;
        let lengths = means.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
        Ok(means.broadcast_div(&lengths.maximum(MIN_LENGTH)?)?)
    }

    /// The mean (batch, hidden_size) of each sentence's states, which has `lengths[b]` tokens.
    pub fn means(&self, states: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let (batch, longest, _) = states.dims3()?;
        // A row for each sentence: 1 / len for its own tokens, 0 for the padding.
        let mut shares = vec![0f32; batch * longest];
        for (row, &len) in shares.chunks_mut(longest).zip(lengths) {
            row[..len].fill(1.0 / len as f32);
        }
        let shares = Tensor::from_vec(shares, (batch, 1, longest), &self.device)?;
        Ok(shares.matmul(states)?.squeeze(1)?)
    }

    /// The network.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The model with a lower limit for the tokens of a sentence.
    pub fn with_max_tokens(mut self, max_tokens: usize) -> Result<Self> {
        let most = self.config.max_seq_length;
        ensure!(max_tokens <= most, "expected at most {most} tokens, those that the model reads, got {max_tokens}");
        self.reader = self.reader.with_max_tokens(max_tokens)?;
        Ok(self)
    }

    /// The attention weights, (layers, heads, len, len).
    pub fn attention(&self, sentence: &Sentence) -> Result<Tensor> {
        let (ids, lengths) = self.batch(&[sentence])?;
        let layers = self.encoder.attention(&ids, &lengths)?;
        Ok(Tensor::cat(&layers, 0)?)
    }

    /// Token ids (batch, longest), padded with 0, and the length of each sentence.
    pub fn batch(&self, sentences: &[&Sentence]) -> Result<(Tensor, Vec<usize>)> {
        let lengths = sentences.iter().map(|sentence| sentence.ids.len()).collect::<Vec<_>>();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        ensure!(lengths.iter().all(|&len| len > 0), "expected sentences of at least one token, got an empty one");
        let mut ids: Vec<u32> = Vec::with_capacity(sentences.len() * longest);
        for sentence in sentences {
            for (&id, piece) in sentence.ids.iter().zip(&sentence.pieces) {
                let vocab_size = self.config.vocab_size;
                ensure!(
                    (id as usize) < vocab_size,
                    "tokenizer.json: `{piece}` is token {id}, but config.json says that vocab_size is {vocab_size}"
                );
            }
            ids.extend(sentence.ids.iter().chain(std::iter::repeat(&0)).take(longest));
        }
        Ok((Tensor::from_vec(ids, (sentences.len(), longest), &self.device)?, lengths))
    }
}
