//! The network: embeddings, then blocks of attention and feed-forward.

use candle_attention::{ForwardOptions, ForwardOutput, Layout, Mask, SelfAttention, SelfAttentionConfig};
use candle_core::{Result, Tensor};
use candle_nn::{Activation, LayerNorm, Linear, Module, VarBuilder, layer_norm, linear};

use super::Config;

/// The sum of three embeddings, of the token, its position and its type; then the blocks.
pub struct Encoder {
    /// (vocab_size, hidden_size)
    words: Tensor,
    /// (max_position_embeddings, hidden_size)
    positions: Tensor,
    /// (1, hidden_size): all tokens of a single sentence have the first type.
    token_type: Tensor,
    norm: LayerNorm,
    blocks: Vec<Block>,
}

impl Encoder {
    /// The network with the parameters in `vb`.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let table = |rows, name: &str| vb.get((rows, width), &format!("embeddings.{name}_embeddings.weight"));
        let blocks = (0..config.num_hidden_layers).map(|i| Block::new(config, vb.pp(format!("encoder.layer.{i}"))));
        Ok(Self {
            words: table(config.vocab_size, "word")?,
            positions: table(config.max_position_embeddings, "position")?,
            token_type: table(config.type_vocab_size, "token_type")?.narrow(0, 0, 1)?,
            norm: layer_norm(width, config.layer_norm_eps, vb.pp("embeddings.LayerNorm"))?,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    /// From token ids (batch, len), where sequence b has `lengths[b]` tokens, to states (batch, len, hidden_size).
    pub fn forward(&self, ids: &Tensor, lengths: &[usize]) -> anyhow::Result<Tensor> {
        let options = ForwardOptions { attn_mask: Mask::key_lengths(lengths), ..Default::default() };
        let mut x = self.embed(ids)?;
        for block in &self.blocks {
            x = block.forward(&x, &options)?.output;
        }
        Ok(x)
    }

    /// The attention weights of each layer, (batch, heads, len, len).
    pub fn attention(&self, ids: &Tensor, lengths: &[usize]) -> anyhow::Result<Vec<Tensor>> {
        let attn_mask = Mask::key_lengths(lengths);
        let options = ForwardOptions { attn_mask, return_weights: true, ..Default::default() };
        let mut x = self.embed(ids)?;
        let mut layers = Vec::new();
        for block in &self.blocks {
            let out = block.forward(&x, &options)?;
            x = out.output;
            layers.extend(out.weights);
        }
        Ok(layers)
    }

    fn embed(&self, ids: &Tensor) -> anyhow::Result<Tensor> {
        let (batch, len) = ids.dims2()?;
        let most = self.positions.dim(0)?;
        anyhow::ensure!(len <= most, "expected at most {most} tokens (max_position_embeddings), got {len}");
        let words = self.words.embedding(&ids.flatten_all()?)?.reshape((batch, len, ()))?;
        let positions = self.positions.narrow(0, 0, len)?.broadcast_add(&self.token_type)?;
        Ok(self.norm.forward(&words.broadcast_add(&positions)?)?)
    }
}

/// x + attention(x), then x + feed-forward(x), with a norm after each. (Devlin et al., "BERT", NAACL 2019, section 3.)
struct Block {
    attention: SelfAttention,
    attention_norm: LayerNorm,
    up: Linear,
    activation: Activation,
    down: Linear,
    norm: LayerNorm,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (width, wide, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = SelfAttentionConfig::new(width, config.num_attention_heads);
        Ok(Self {
            attention: SelfAttention::from_layout(Layout::Bert, &attention, vb.pp("attention"))?,
            attention_norm: layer_norm(width, eps, vb.pp("attention.output.LayerNorm"))?,
            up: linear(width, wide, vb.pp("intermediate.dense"))?,
            activation: config.hidden_act,
            down: linear(wide, width, vb.pp("output.dense"))?,
            norm: layer_norm(width, eps, vb.pp("output.LayerNorm"))?,
        })
    }

    fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        let attended = self.attention.forward_with(x, options)?;
        let x = self.attention_norm.forward(&(x + &attended.output)?)?;
        let hidden = self.activation.forward(&self.up.forward(&x)?)?;
        let x = self.norm.forward(&(&x + self.down.forward(&hidden)?)?)?;
        Ok(ForwardOutput { output: x, ..attended })
    }
}
