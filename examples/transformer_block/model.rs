//! The transformer: token and position embedding, pre-norm blocks, a last norm, a linear head.

use candle_attention::block::rms_norm;
use candle_attention::{SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{Result, Tensor};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, embedding, linear_no_bias};

use crate::data::{LEN, VOCAB};

const EMBED_DIM: usize = 64;
const NUM_HEADS: usize = 4;
const MLP_DIM: usize = 128;
const NUM_BLOCKS: usize = 1;
/// As in Llama.
const NORM_EPS: f64 = 1e-5;
/// The name of the attention layers' parameters.
pub const ATTENTION: &str = "attention";

/// x + attention(norm(x)), then x + MLP(norm(x)). (Xiong et al., "On Layer Normalization in the Transformer
/// Architecture", ICML 2020, section 3: pre-norm.)
struct Block {
    attention_norm: Tensor,
    attention: SelfAttention,
    mlp_norm: Tensor,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(seed: u64, vb: VarBuilder) -> Result<Self> {
        let config = SelfAttentionConfig {
            is_causal: true,
            qkv_bias: false,
            out_bias: false,
            seed,
            ..SelfAttentionConfig::new(EMBED_DIM, NUM_HEADS)
        };
        Ok(Self {
            attention_norm: norm_weight(&vb.pp("attention_norm"))?,
            attention: self_attention(&config, vb.pp(ATTENTION))?,
            mlp_norm: norm_weight(&vb.pp("mlp_norm"))?,
            up: linear_no_bias(EMBED_DIM, MLP_DIM, vb.pp("up"))?,
            down: linear_no_bias(MLP_DIM, EMBED_DIM, vb.pp("down"))?,
        })
    }

    /// With this crate's norm, because candle's `RmsNorm::forward` drops the gradient without an error.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention.forward(&rms_norm(x, &self.attention_norm, NORM_EPS)?)?)?;
        let hidden = self.up.forward(&rms_norm(&x, &self.mlp_norm, NORM_EPS)?)?.silu()?;
        x + self.down.forward(&hidden)?
    }
}

/// The weight of an RMS norm, which starts at one.
fn norm_weight(vb: &VarBuilder) -> Result<Tensor> {
    vb.get_with_hints(EMBED_DIM, "weight", Init::Const(1.0))
}

/// Token and position embedding, blocks, a last norm, and a linear head.
pub struct Transformer {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Linear,
}

impl Transformer {
    pub fn new(seed: u64, vb: VarBuilder) -> Result<Self> {
        let blocks = (0..NUM_BLOCKS).map(|i| Block::new(seed, vb.pp(format!("blocks.{i}"))));
        Ok(Self {
            tokens: embedding(VOCAB, EMBED_DIM, vb.pp("tokens"))?,
            positions: embedding(LEN, EMBED_DIM, vb.pp("positions"))?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: norm_weight(&vb.pp("norm"))?,
            head: linear_no_bias(EMBED_DIM, VOCAB, vb.pp("head"))?,
        })
    }

    /// Tokens (batch, len), with a len of at most [`LEN`], to logits (batch, len, [`VOCAB`]).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let positions = self.positions.embeddings().narrow(0, 0, tokens.dim(1)?)?;
        let mut x = self.tokens.forward(tokens)?.broadcast_add(&positions)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.head.forward(&rms_norm(&x, &self.norm, NORM_EPS)?)
    }
}
