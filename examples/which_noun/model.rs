//! The model: embeddings, one attention layer, a linear head.

use attention_examples::random::Seeded;
use candle_attention::block::{Embedding, embedding, linear};
use candle_attention::rotary::RotaryConfig;
use candle_attention::{
    ForwardOptions, ForwardOutput, Mask, Result, SelfAttention, SelfAttentionConfig, self_attention,
};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

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
    /// (nouns, DIM)
    head: Tensor,
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
        // The attention layer has drawn its parameters from the seed. The others are drawn here.
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
            head: vb.get((nouns, config.output_dim()), "head.weight")?,
        })
    }

    /// The attention layer's config. Its seed is that of the whole model.
    pub fn config(&self) -> &SelfAttentionConfig {
        self.attention.config()
    }

    /// Every parameter with its name.
    pub fn parameters(&self) -> Vec<(String, &Tensor)> {
        let mut parameters =
            vec![("embedding.weight".to_string(), self.embedding.weight()), ("head.weight".to_string(), &self.head)];
        let attention = self.attention.parameters().into_iter();
        parameters.extend(attention.map(|(name, tensor)| (format!("attention.{name}"), tensor)));
        parameters
    }

    /// The parameters as variables, for an optimiser.
    pub fn variables(&self) -> Result<Vec<(String, Var)>> {
        self.parameters().into_iter().map(|(name, tensor)| Ok((name, Var::from_tensor(tensor)?))).collect()
    }

    /// For each noun of the grammar the logit that the property describes it, (batch, nouns).
    pub fn forward(&self, batch: &Batch) -> Result<Tensor> {
        let output = self.attend(batch, false)?.output;
        linear(&output.flatten_to(1)?.index_select(&batch.properties, 0)?, &self.head, None)
    }

    /// The attention weights, (batch, len, len).
    pub fn weights(&self, batch: &Batch) -> Result<Tensor> {
        match self.attend(batch, true)?.weights {
            Some(weights) => Ok(weights.mean(1)?), // over the heads, of which there is one
            None => Err(candle_core::Error::msg("no weights, though they were asked for").into()),
        }
    }

    fn attend(&self, batch: &Batch, return_weights: bool) -> Result<ForwardOutput> {
        let attn_mask = Mask::key_lengths(&batch.lengths);
        let options = ForwardOptions { attn_mask, return_weights, ..Default::default() };
        self.attention.forward_with(&self.embedding.forward(&batch.tokens)?, &options)
    }
}
