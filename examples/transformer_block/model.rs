//! The transformer: token and position embedding, pre-norm blocks, a last norm, a linear head.

use candle_attention::block::{
    Activation, Embedding, MlpConfig, Norm, NormConfig, TransformerBlock, TransformerBlockConfig, embedding, linear,
};
use candle_attention::{Result, SelfAttentionConfig};
use candle_core::Tensor;
use candle_nn::VarBuilder;

use crate::data::{LEN, VOCAB};

const EMBED_DIM: usize = 64;
const NUM_HEADS: usize = 4;
const MLP_DIM: usize = 128;
const NUM_BLOCKS: usize = 1;
/// As in Llama.
const NORM_EPS: f64 = 1e-5;
/// The name of the blocks' parameters.
pub const BLOCKS: &str = "blocks";

/// A pre-norm block with RMS norms and a SiLU, without biases.
fn block_config(seed: u64) -> TransformerBlockConfig {
    let attention = SelfAttentionConfig {
        is_causal: true,
        qkv_bias: false,
        out_bias: false,
        seed,
        ..SelfAttentionConfig::new(EMBED_DIM, NUM_HEADS)
    };
    let mlp = MlpConfig { activation: Activation::Silu, bias: false, seed, ..MlpConfig::new(EMBED_DIM, MLP_DIM) };
    TransformerBlockConfig::new(attention, mlp, NormConfig::rms(NORM_EPS))
}

/// Token and position embedding, blocks, a last norm, and a linear head.
pub struct Transformer {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<TransformerBlock>,
    norm: Norm,
    /// (VOCAB, EMBED_DIM)
    head: Tensor,
}

impl Transformer {
    pub fn new(seed: u64, vb: VarBuilder) -> Result<Self> {
        let block = |i| TransformerBlock::new(&block_config(seed), vb.pp(format!("{BLOCKS}.{i}")));
        Ok(Self {
            tokens: embedding(VOCAB, EMBED_DIM, vb.pp("tokens"))?,
            positions: embedding(LEN, EMBED_DIM, vb.pp("positions"))?,
            blocks: (0..NUM_BLOCKS).map(block).collect::<Result<_>>()?,
            norm: Norm::new(&NormConfig::rms(NORM_EPS), EMBED_DIM, vb.pp("norm"))?,
            head: vb.get((VOCAB, EMBED_DIM), "head.weight")?,
        })
    }

    /// Tokens (batch, len), with a len of at most [`LEN`], to logits (batch, len, [`VOCAB`]).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let positions = self.positions.weight().narrow(0, 0, tokens.dim(1)?)?;
        let mut x = self.tokens.forward(tokens)?.broadcast_add(&positions)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        linear(&self.norm.forward(&x)?, &self.head, None)
    }
}
