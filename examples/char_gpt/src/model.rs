//! The model: a small GPT with candle-attention's `SelfAttention` in its blocks.
//!
//! Its parts are those of recent models that candle trains fast on a CPU: RMS norms, which take half the passes of layer
//! norms; a squared ReLU in the MLP (So et al., "Primer", NeurIPS 2021), whose gradient is a product (candle's GELU takes
//! longer than the matrix products around it); and no biases, because candle sums their gradients slowly.

use attention_examples::random::Random;
use candle_attention::rotary::RotaryConfig;
use candle_attention::{KvCache, SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{Device, Result, Tensor};
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, linear_no_bias};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::ops::{rms_norm, squared_relu};

/// As in Llama.
const NORM_EPS: f64 = 1e-5;
/// The width of the MLP is this many times that of the model.
const MLP_WIDTHS: usize = 4;
/// The name of the attention layers' parameters.
pub const ATTENTION: &str = "attention";

/// How the model gets the order of the characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Queries and keys are rotated by angles that grow with the position
    Rotary,
    /// A learned vector for each position is added to the embedding
    Learned,
}

/// The sizes and options of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// The number of different characters.
    pub vocabulary: usize,
    /// The most characters that it reads at once.
    pub len: usize,
    pub width: usize,
    pub layers: usize,
    pub heads: usize,
    pub dropout: f64,
    pub positions: Positions,
    pub seed: u64,
}

impl ModelConfig {
    fn attention(&self) -> SelfAttentionConfig {
        SelfAttentionConfig {
            qkv_bias: false,
            out_bias: false,
            is_causal: true,
            dropout_p: self.dropout,
            rotary: (self.positions == Positions::Rotary).then(RotaryConfig::default),
            seed: self.seed,
            ..SelfAttentionConfig::new(self.width, self.heads)
        }
    }
}

/// x + attention(norm(x)), then x + MLP(norm(x)).
struct Block {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    mlp_norm: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.width, config.width.saturating_mul(MLP_WIDTHS));
        Ok(Self {
            attention_norm: candle_nn::rms_norm(width, NORM_EPS, vb.pp("attention_norm"))?,
            attention: self_attention(&config.attention(), vb.pp(ATTENTION))?,
            mlp_norm: candle_nn::rms_norm(width, NORM_EPS, vb.pp("mlp_norm"))?,
            up: linear_no_bias(width, hidden, vb.pp("up"))?,
            down: linear_no_bias(hidden, width, vb.pp("down"))?,
        })
    }

    /// x is (batch · len, width). With three axes candle's `Linear` would reshape to two, which costs as much as a sum in
    /// the backward pass.
    fn forward(
        &self,
        x: &Tensor,
        (batch, len): (usize, usize),
        cache: Option<&mut KvCache>,
        dropout: &mut Dropout,
    ) -> Result<Tensor> {
        let sequences = rms_norm(&self.attention_norm, x)?.reshape((batch, len, ()))?;
        let attended = match cache {
            Some(cache) => self.attention.forward_cached(&sequences, cache)?,
            None => self.attention.forward_t(&sequences, dropout.is_on())?,
        };
        let x = (x + dropout.apply(attended.reshape(x.shape())?)?)?;
        let hidden = squared_relu(&self.up.forward(&rms_norm(&self.mlp_norm, &x)?)?)?;
        x + dropout.apply(self.down.forward(&hidden)?)?
    }
}

/// Embedding, blocks, a last norm, and a linear head.
pub struct Gpt {
    config: ModelConfig,
    tokens: Embedding,
    positions: Option<Embedding>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Gpt {
    pub fn new(config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let learned = config.positions == Positions::Learned;
        let blocks = (0..config.layers).map(|layer| Block::new(config, vb.pp(format!("blocks.{layer}"))));
        Ok(Self {
            tokens: embedding(config.vocabulary, config.width, vb.pp("tokens"))?,
            positions: learned.then(|| embedding(config.len, config.width, vb.pp("positions"))).transpose()?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: candle_nn::rms_norm(config.width, NORM_EPS, vb.pp("norm"))?,
            head: linear_no_bias(config.width, config.vocabulary, vb.pp("head"))?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens (batch, len) to logits (batch, len, vocabulary).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.compute(tokens, None, &mut Dropout::off())
    }

    /// As [`Gpt::forward`], for tokens (1, len) that follow those in the caches. There is one cache for each layer, and the
    /// tokens are added to it.
    pub fn forward_cached(&self, tokens: &Tensor, caches: &mut [KvCache]) -> Result<Tensor> {
        self.compute(tokens, Some(caches), &mut Dropout::off())
    }

    /// Empty caches for one sequence.
    pub fn caches(&self) -> Result<Vec<KvCache>> {
        self.blocks.iter().map(|block| Ok(block.attention.kv_cache(1)?)).collect()
    }

    /// As [`Gpt::forward`] in training, with the dropout of this step.
    pub fn forward_step(&self, tokens: &Tensor, step: usize) -> Result<Tensor> {
        for block in &self.blocks {
            block.attention.set_dropout_calls(step as u64);
        }
        self.compute(tokens, None, &mut Dropout::of_step(&self.config, step))
    }

    fn compute(&self, tokens: &Tensor, mut caches: Option<&mut [KvCache]>, dropout: &mut Dropout) -> Result<Tensor> {
        let (batch, len) = tokens.dims2()?;
        let first = caches.as_deref().and_then(<[_]>::first).map_or(0, KvCache::len) as u32;
        let mut x = self.tokens.forward(&tokens.flatten_all()?)?;
        if let Some(positions) = &self.positions {
            let indices = (0..batch).flat_map(|_| first..first + len as u32).collect();
            x = (x + positions.forward(&Tensor::from_vec(indices, batch * len, tokens.device())?)?)?;
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let cache = caches.as_deref_mut().and_then(|caches| caches.get_mut(layer));
            x = block.forward(&x, (batch, len), cache, dropout)?;
        }
        self.head.forward(&rms_norm(&self.norm, &x)?)?.reshape((batch, len, ()))
    }
}

/// Dropout of the outputs of attention and MLP, drawn from seed and step. candle's own can't be seeded on a CPU. (The
/// attention layers drop attention weights themselves.)
struct Dropout(Option<(f64, Random)>);

impl Dropout {
    fn off() -> Self {
        Self(None)
    }

    fn of_step(config: &ModelConfig, step: usize) -> Self {
        let random = || Random::new(config.seed, "dropout", step as u64);
        Self((config.dropout > 0.0).then(|| (config.dropout, random())))
    }

    fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Each number of x becomes 0 with probability p, and is divided by 1 - p otherwise.
    fn apply(&mut self, x: Tensor) -> Result<Tensor> {
        let Some((p, random)) = &mut self.0 else { return Ok(x) };
        let keep = (1.0 / (1.0 - *p)) as f32;
        let factors = (0..x.elem_count()).map(|_| if random.unit() < *p { 0.0 } else { keep }).collect();
        &x * Tensor::from_vec(factors, x.shape(), &Device::Cpu)?.to_device(x.device())?
    }
}
