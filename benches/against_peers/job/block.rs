//! Transformer blocks.

use candle_attention::SelfAttentionConfig;
use candle_attention::block::{MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig};
use candle_core::Result;
use serde::Deserialize;

use super::{Contender, Forward, Inputs, Trained};

/// Blocks with layer norms, GELU and biases, as PyTorch's `nn.TransformerEncoderLayer`. The names of their parameters begin with
/// `blocks.0.` and so on.
#[derive(Deserialize)]
pub struct Description {
    count: usize,
    num_heads: usize,
    norm_first: bool,
    backward: bool,
    recompute: bool,
}

pub fn blocks(mut inputs: Inputs, description: Description) -> Result<(Forward, Trained)> {
    let Description { count, num_heads, norm_first, backward, recompute } = description;
    let x = inputs.take("x")?;
    let width = x.dim(2)?;
    let (vb, trained) = inputs.parameters(backward, x.device())?;
    let (attention, mlp) = (SelfAttentionConfig::new(width, num_heads), MlpConfig::new(width, 4 * width));
    let config = TransformerBlockConfig {
        placement: if norm_first { NormPlacement::Pre } else { NormPlacement::Post },
        ..TransformerBlockConfig::new(attention, mlp, NormConfig::layer(1e-5))
    };
    let block = |i| Ok(TransformerBlock::new(&config, vb.pp("blocks").pp(i))?.with_recompute(recompute));
    let blocks = (0..count).map(block).collect::<Result<Vec<_>>>()?;
    let forward = move |contender| match contender {
        Contender::Ours | Contender::OursFused => {
            blocks.iter().try_fold(x.clone(), |x, block| Ok(block.forward_t(&x, backward)?))
        }
        _ => candle_core::bail!("expected candle-attention: candle has no transformer block"),
    };
    Ok((Box::new(forward), trained))
}
