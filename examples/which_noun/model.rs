//! The model: embeddings, one attention layer, a linear head.

use attention_examples::random::Seeded;
use candle_attention::rotary::RotaryConfig;
use candle_attention::{ForwardOptions, ForwardOutput, Mask, SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Embedding, Linear, Module, VarBuilder, VarMap, embedding, linear_no_bias};

use crate::reader::Batch;

/// Entries of an embedding, and of a query, key and value.
const DIM: usize = 64;
/// Embeddings and head start uniform in ± this. With fewer or smaller entries the embeddings of some words are similar by
/// chance, and the model sometimes names the wrong noun for a pair that was held out.
const BOUND: f32 = 0.25;

/// Names the noun that the property of a sentence describes, from the attention's output at the property's position.
///
/// There is no residual connection around the attention, so that the noun's embedding can reach the head only through the
/// attention. The query is computed from the property's embedding.
pub struct Model {
    embedding: Embedding,
    attention: SelfAttention,
    head: Linear,
}

/// One head with W_Q, W_K and W_V, the layer of the notes. The rotary embedding gives it the order of the words.
fn attention_config(seed: u64) -> SelfAttentionConfig {
    SelfAttentionConfig {
        rotary: Some(RotaryConfig::default()),
        seed,
        ..SelfAttentionConfig::single_head(DIM, DIM, DIM)
    }
}

impl Model {
    /// An untrained model, the same for the same seed.
    pub fn new(seed: u64, words: usize, nouns: usize, device: &Device) -> Result<Self> {
        let mut varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, device);
        let model = Self::build(&attention_config(seed), words, nouns, vb)?;
        // The attention layer draws from its seed. candle's own layers have no seed, so their numbers are replaced.
        let mut random = Seeded::new(seed);
        for (name, rows) in [("embedding.weight", words), ("head.weight", nouns)] {
            let numbers = random.uniform(rows * DIM, BOUND);
            varmap.set_one(name, Tensor::from_vec(numbers, (rows, DIM), device)?)?;
        }
        Ok(model)
    }

    /// The model with the parameters in `vb`.
    pub fn build(config: &SelfAttentionConfig, words: usize, nouns: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            embedding: embedding(words, config.embed_dim, vb.pp("embedding"))?,
            attention: self_attention(config, vb.pp("attention"))?,
            head: linear_no_bias(config.output_dim(), nouns, vb.pp("head"))?,
        })
    }

    /// The attention layer's config. Its seed is that of the whole model.
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

    /// For each noun of the grammar the logit that the property describes it, (batch, nouns).
    pub fn forward(&self, batch: &Batch) -> Result<Tensor> {
        let output = self.attend(batch, false)?.output;
        self.head.forward(&output.flatten_to(1)?.index_select(&batch.properties, 0)?)
    }

    /// The attention weights, (batch, len, len).
    pub fn weights(&self, batch: &Batch) -> Result<Tensor> {
        match self.attend(batch, true)?.weights {
            Some(weights) => weights.mean(1), // over the heads, of which there is one
            None => candle_core::bail!("no weights, though they were asked for"),
        }
    }

    fn attend(&self, batch: &Batch, return_weights: bool) -> Result<ForwardOutput> {
        let attn_mask = Mask::key_lengths(&batch.lengths);
        let options = ForwardOptions { attn_mask, return_weights, ..Default::default() };
        Ok(self.attention.forward_with(&self.embedding.forward(&batch.tokens)?, &options)?)
    }
}
