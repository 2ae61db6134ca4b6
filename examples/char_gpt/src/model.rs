//! The model: a small GPT of this crate's transformer blocks.
//!
//! Its parts are those of recent models: RMS norms, rotary positions, a squared ReLU in the MLP (So et al., "Primer", NeurIPS 2021),
//! and no biases.

use candle_attention::adapter::{Adapt, LoraConfig};
use candle_attention::block::{
    Activation, CrossEntropyOptions, Embedding, MlpConfig, Norm, NormConfig, TransformerBlock, TransformerBlockConfig,
    embedding, linear, linear_cross_entropy,
};
use candle_attention::parallel::backward_from;
use candle_attention::rotary::RotaryConfig;
use candle_attention::train::backward;
use candle_attention::{AttentionError, ForwardOptions, KvCache, Result, SelfAttentionConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::VarBuilder;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::text::Batch;

/// As in Llama.
const NORM_EPS: f64 = 1e-5;
/// The width of the MLP is this many times that of the model.
const MLP_WIDTHS: usize = 4;

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
    fn block(&self) -> TransformerBlockConfig {
        let attention = SelfAttentionConfig {
            qkv_bias: false,
            out_bias: false,
            is_causal: true,
            dropout_p: self.dropout,
            rotary: (self.positions == Positions::Rotary).then(RotaryConfig::default),
            seed: self.seed,
            ..SelfAttentionConfig::new(self.width, self.heads)
        };
        let mlp = MlpConfig {
            activation: Activation::SquaredRelu,
            bias: false,
            seed: self.seed,
            ..MlpConfig::new(self.width, self.width.saturating_mul(MLP_WIDTHS))
        };
        TransformerBlockConfig {
            dropout_p: self.dropout,
            ..TransformerBlockConfig::new(attention, mlp, NormConfig::rms(NORM_EPS))
        }
    }
}

/// Where the forward pass uses a parameter: embeddings first, then the blocks, then norm and head.
pub fn place_in_forward_pass(parameter: &str) -> usize {
    let mut parts = parameter.split('.');
    match (parts.next(), parts.next().and_then(|layer| layer.parse::<usize>().ok())) {
        (Some("blocks"), Some(layer)) => 1 + layer,
        (Some("tokens" | "positions"), _) => 0,
        _ => usize::MAX,
    }
}

/// Where a batch stands in the training. Each sequence of each step has its own dropout.
#[derive(Clone, Copy)]
pub struct Place {
    pub step: usize,
    /// The first sequence among those of the step, whichever rank computes it.
    pub first_row: usize,
}

/// A loss in training, and what its backward pass needs to go block by block.
pub struct Segments {
    pub loss: Tensor,
    /// The output of each block, and the variable that holds it for the next segment.
    blocks: Vec<(Tensor, Var)>,
}

impl Segments {
    /// `take` gets the gradients of the head and of each block, from the last to the first, before those of the blocks below are computed.
    pub fn backward(self, take: &mut impl FnMut(&GradStore) -> Result<()>) -> Result<()> {
        let mut gradients = backward(&self.loss)?;
        take(&gradients)?;
        for (layer, (output, copy)) in self.blocks.into_iter().enumerate().rev() {
            let missing = || AttentionError::Gradient {
                name: format!("the output of block {layer}"),
                expected: "one from what follows it".to_string(),
                got: "none".to_string(),
            };
            gradients = backward_from(&output, gradients.get(&copy).ok_or_else(missing)?)?;
            take(&gradients)?;
        }
        Ok(())
    }
}

/// Embedding, blocks, a last norm, and a linear head.
pub struct Gpt {
    config: ModelConfig,
    tokens: Embedding,
    positions: Option<Embedding>,
    blocks: Vec<TransformerBlock>,
    norm: Norm,
    /// (vocabulary, width)
    head: Tensor,
}

impl Gpt {
    pub fn new(config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let learned = config.positions == Positions::Learned;
        let block = |layer| TransformerBlock::new(&config.block(), vb.pp(format!("blocks.{layer}")));
        Ok(Self {
            tokens: embedding(config.vocabulary, config.width, vb.pp("tokens"))?,
            positions: learned.then(|| embedding(config.len, config.width, vb.pp("positions"))).transpose()?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: Norm::new(&NormConfig::rms(NORM_EPS), config.width, vb.pp("norm"))?,
            head: vb.get((config.vocabulary, config.width), "head.weight")?,
            config: config.clone(),
        })
    }

    pub fn blocks(&self) -> &[TransformerBlock] {
        &self.blocks
    }

    /// The same model with constants as parameters, and an adapter on its blocks.
    pub fn with_lora(self, name: &str, config: &LoraConfig, vb: VarBuilder) -> Result<Self> {
        let constant = |table: &Embedding| Embedding::new(table.weight().detach());
        let adapted = |(layer, block): (usize, &TransformerBlock)| {
            block.with_lora(name, config, vb.pp(format!("blocks.{layer}")))
        };
        Ok(Self {
            tokens: constant(&self.tokens)?,
            positions: self.positions.as_ref().map(constant).transpose()?,
            blocks: self.blocks.iter().enumerate().map(adapted).collect::<Result<_>>()?,
            norm: Norm::from_parameters(self.norm.config(), self.norm.weight().detach(), None)?,
            head: self.head.detach(),
            config: self.config,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens (batch, len) to logits (batch, len, vocabulary).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.logits(&self.states(tokens, |block, _, x| block.forward(x), 0)?)
    }

    /// As [`Gpt::forward`], for tokens (1, len) that follow those in the caches. There is one cache for each layer, and the
    /// tokens are added to it.
    pub fn forward_cached(&self, tokens: &Tensor, caches: &mut [KvCache]) -> Result<Tensor> {
        let first = caches.first().map_or(0, KvCache::len);
        self.logits(&self.states(tokens, |block, layer, x| block.forward_cached(x, &mut caches[layer]), first)?)
    }

    /// Empty caches for one sequence.
    pub fn caches(&self) -> Result<Vec<KvCache>> {
        self.blocks.iter().map(|block| block.kv_cache(1)).collect()
    }

    /// The mean of -ln p(target) over all tokens; in training with the dropout of this place.
    pub fn loss(&self, batch: &Batch, place: Option<Place>) -> Result<Tensor> {
        let block = |block: &TransformerBlock, _, x: &Tensor| match place {
            Some(place) => self.trained(block, x, place),
            None => block.forward(x),
        };
        let x = self.states(&batch.inputs, block, 0)?;
        let (x, head) = match place {
            Some(_) => (x, self.head.clone()),
            // A loss in bf16 has two digits, which is too few to compare models by.
            None => (x.to_dtype(DType::F32)?, self.head.to_dtype(DType::F32)?),
        };
        linear_cross_entropy(&x, &head, None, &batch.targets, &CrossEntropyOptions::default())
    }

    /// As [`Gpt::loss`] in training, for a backward pass block by block.
    pub fn loss_in_segments(&self, batch: &Batch, place: Place) -> Result<Segments> {
        let (mut x, mut blocks) = (self.embedded(&batch.inputs, 0)?, Vec::with_capacity(self.blocks.len()));
        for block in &self.blocks {
            let output = self.trained(block, &x, place)?;
            // The next segment computes the gradient of this copy.
            let copy = Var::from_tensor(&output.detach())?;
            x = copy.as_tensor().clone();
            blocks.push((output, copy));
        }
        let options = CrossEntropyOptions::default();
        let loss = linear_cross_entropy(&self.norm.forward(&x)?, &self.head, None, &batch.targets, &options)?;
        Ok(Segments { loss, blocks })
    }

    /// A block in training, with the dropout of this place.
    fn trained(&self, block: &TransformerBlock, x: &Tensor, place: Place) -> Result<Tensor> {
        block.set_dropout_calls([place.step as u64; 2]);
        let options = ForwardOptions { train: true, first_sequence: place.first_row, ..Default::default() };
        Ok(block.forward_with(x, &options)?.output)
    }

    /// Tokens (batch, len), the first of them at position `first`, to states (batch, len, width).
    fn states(
        &self,
        tokens: &Tensor,
        mut block: impl FnMut(&TransformerBlock, usize, &Tensor) -> Result<Tensor>,
        first: usize,
    ) -> Result<Tensor> {
        let mut x = self.embedded(tokens, first)?;
        for (layer, each) in self.blocks.iter().enumerate() {
            x = block(each, layer, &x)?;
        }
        self.norm.forward(&x)
    }

    /// Tokens (batch, len), the first of them at position `first`, to what the first block reads.
    fn embedded(&self, tokens: &Tensor, first: usize) -> Result<Tensor> {
        let (batch, len) = tokens.dims2()?;
        let x = self.tokens.forward(tokens)?;
        let Some(positions) = &self.positions else { return Ok(x) };
        let ids = Tensor::arange(first as u32, (first + len) as u32, tokens.device())?;
        Ok((x + positions.forward(&ids.expand((batch, len))?)?)?)
    }

    fn logits(&self, states: &Tensor) -> Result<Tensor> {
        linear(states, &self.head, None)
    }
}
