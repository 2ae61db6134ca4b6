//! The model: embeddings, one attention layer, a linear head.

use candle_attention::{ForwardOptions, ForwardOutput, Mask, RotaryConfig, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Embedding, Linear, Module, VarBuilder, VarMap, embedding, linear_no_bias};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::reader::Batch;

/// Entries of an embedding, and of a query, key and value.
const DIM: usize = 64;
/// Embeddings and head start uniform in ± this. With fewer or smaller entries some words are alike by chance, and now and
/// then a pair that training left out is then mistaken.
const BOUND: f32 = 0.25;

/// Says which noun the property of a sentence describes, from what attention brings to the property's place.
///
/// That is all it has: no residual connection leads past the attention, so the noun's embedding comes through it or not
/// at all. The query that fetches it is made from the property's own embedding.
pub struct Model {
    embedding: Embedding,
    attention: SelfAttention,
    head: Linear,
}

/// One head with W_Q, W_K and W_V, the layer of the notes; the rotary embedding lets it see the order of the words.
fn attention_config(seed: u64) -> SelfAttentionConfig {
    SelfAttentionConfig {
        rotary: Some(RotaryConfig::default()),
        seed,
        ..SelfAttentionConfig::single_head(DIM, DIM, DIM)
    }
}

impl Model {
    /// A model that knows nothing yet, the same for the same seed.
    pub fn new(seed: u64, words: usize, nouns: usize, device: &Device) -> Result<Self> {
        let mut varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let model = Self::build(&attention_config(seed), words, nouns, vb)?;
        // The attention layer draws from its seed. candle's own layers can't be told one, so their numbers are replaced.
        let mut random = StdRng::seed_from_u64(seed);
        for (name, rows) in [("embedding.weight", words), ("head.weight", nouns)] {
            let numbers = (0..rows * DIM).map(|_| random.random_range(-BOUND..BOUND)).collect::<Vec<_>>();
            varmap.set_one(name, Tensor::from_vec(numbers, (rows, DIM), device)?)?;
        }
        Ok(model)
    }

    /// The model whose parameters are, or are made, in `vb`.
    pub fn build(config: &SelfAttentionConfig, words: usize, nouns: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            embedding: embedding(words, config.embed_dim, vb.pp("embedding"))?,
            attention: SelfAttention::new(config, vb.pp("attention"))?,
            head: linear_no_bias(config.output_dim(), nouns, vb.pp("head"))?,
        })
    }

    /// What the attention layer is made of; its seed is the whole model's.
    pub fn config(&self) -> &SelfAttentionConfig {
        self.attention.config()
    }

    /// Every parameter with its name.
    pub fn parameters(&self) -> Vec<(String, &Tensor)> {
        let mut parameters = vec![
            ("embedding.weight".to_string(), self.embedding.embeddings()),
            ("head.weight".to_string(), self.head.weight()),
        ];
        let attention = self.attention.parameters().into_iter();
        parameters.extend(attention.map(|(name, tensor)| (format!("attention.{name}"), tensor)));
        parameters
    }

    pub fn vars(&self) -> Result<Vec<Var>> {
        self.parameters().into_iter().map(|(_, tensor)| Var::from_tensor(tensor)).collect()
    }

    /// For each noun of the grammar how likely the property describes it, as logits (batch, nouns).
    pub fn forward(&self, batch: &Batch) -> Result<Tensor> {
        let output = self.attend(batch, false)?.output;
        self.head.forward(&output.flatten_to(1)?.index_select(&batch.properties, 0)?)
    }

    /// What each word attends to, (batch, len, len).
    pub fn weights(&self, batch: &Batch) -> Result<Tensor> {
        match self.attend(batch, true)?.weights {
            Some(weights) => weights.mean(1), // over the heads, of which there is one
            None => candle_core::bail!("no weights, though they were asked for"),
        }
    }

    fn attend(&self, batch: &Batch, return_weights: bool) -> Result<ForwardOutput> {
        let attn_mask = Mask::key_lengths(&batch.lengths);
        let options = ForwardOptions { attn_mask, return_weights, ..Default::default() };
        self.attention.forward_with(&self.embedding.forward(&batch.tokens)?, &options)
    }
}
