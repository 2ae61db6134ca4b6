//! The network: embeddings, then blocks of attention and feed-forward.

use candle_attention::block::{MlpConfig, Norm, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig};
use candle_attention::{ForwardOptions, Layout, Mask, Result, SelfAttentionConfig};
use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::Config;

/// The sum of three embeddings, of the token, its position and its type; then the blocks.
#[derive(Clone)]
pub struct Encoder {
    /// (vocab_size, hidden_size)
    words: Tensor,
    /// (max_position_embeddings, hidden_size)
    positions: Tensor,
    /// (1, hidden_size): all tokens of a single sentence have the first type.
    token_type: Tensor,
    norm: Norm,
    blocks: Vec<TransformerBlock>,
}

impl Encoder {
    /// The network with the parameters in `vb`.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let width = config.hidden_size;
        let table = |rows, name: &str| vb.get((rows, width), &format!("embeddings.{name}_embeddings.weight"));
        let block =
            |i| TransformerBlock::from_layout(Layout::Bert, &block_config(config), vb.pp(format!("encoder.layer.{i}")));
        Ok(Self {
            words: table(config.vocab_size, "word")?,
            positions: table(config.max_position_embeddings, "position")?,
            token_type: table(config.type_vocab_size, "token_type")?.narrow(0, 0, 1)?,
            norm: Norm::new(&NormConfig::layer(config.layer_norm_eps), width, vb.pp("embeddings.LayerNorm"))?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?,
        })
    }

    /// From token ids (batch, len), where sequence b has `lengths[b]` tokens, to states (batch, len, hidden_size).
    pub fn forward(&self, ids: &Tensor, lengths: &[usize]) -> anyhow::Result<Tensor> {
        self.forward_t(ids, lengths, false)
    }

    /// The same, with the dropout of adapters if `train` is true.
    pub fn forward_t(&self, ids: &Tensor, lengths: &[usize], train: bool) -> anyhow::Result<Tensor> {
        let options = ForwardOptions { attn_mask: Mask::key_lengths(lengths), train, ..Default::default() };
        let mut x = self.embed(ids)?;
        for block in &self.blocks {
            x = block.forward_with(&x, &options)?.output;
        }
        Ok(x)
    }

    /// The blocks.
    pub fn blocks(&self) -> &[TransformerBlock] {
        &self.blocks
    }

    /// The network with other blocks, such as adapted ones.
    pub fn map_blocks(
        &self,
        change: impl Fn(usize, &TransformerBlock) -> anyhow::Result<TransformerBlock>,
    ) -> anyhow::Result<Self> {
        let blocks = self.blocks.iter().enumerate().map(|(i, block)| change(i, block));
        Ok(Self { blocks: blocks.collect::<anyhow::Result<_>>()?, ..self.clone() })
    }

    /// The attention weights of each layer, (batch, heads, len, len).
    pub fn attention(&self, ids: &Tensor, lengths: &[usize]) -> anyhow::Result<Vec<Tensor>> {
        let attn_mask = Mask::key_lengths(lengths);
        let options = ForwardOptions { attn_mask, return_weights: true, ..Default::default() };
        let mut x = self.embed(ids)?;
        let mut layers = Vec::new();
        for block in &self.blocks {
            let out = block.forward_with(&x, &options)?;
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

/// A block of BERT. (Devlin et al., "BERT", NAACL 2019, section 3.)
fn block_config(config: &Config) -> TransformerBlockConfig {
    let (width, wide) = (config.hidden_size, config.intermediate_size);
    TransformerBlockConfig {
        placement: NormPlacement::Post,
        ..TransformerBlockConfig::new(
            SelfAttentionConfig::new(width, config.num_attention_heads),
            MlpConfig { activation: config.hidden_act, ..MlpConfig::new(width, wide) },
            NormConfig::layer(config.layer_norm_eps),
        )
    }
}
