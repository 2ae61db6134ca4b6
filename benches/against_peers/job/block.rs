//! Transformer blocks.

use candle_attention::SelfAttentionConfig;
use candle_attention::adapter::{Adapt, LoraConfig, Target};
use candle_attention::block::{MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig};
use candle_attention::quantised::{Format, Quantise};
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
    /// The rank of an adapter on every linear layer, which alone is trained.
    #[serde(default)]
    lora: Option<usize>,
    /// The format of quantised weights.
    #[serde(default)]
    format: Option<String>,
}

pub fn blocks(mut inputs: Inputs, description: Description) -> Result<(Forward, Trained)> {
    let Description { count, num_heads, norm_first, backward, recompute, lora, format } = description;
    let x = inputs.take("x")?;
    let width = x.dim(2)?;
    let (vb, trained) = match lora {
        Some(_) => inputs.parameters_of(backward, |name| name.contains(".lora_"), x.device())?,
        None => inputs.parameters(backward, x.device())?,
    };
    let (attention, mlp) = (SelfAttentionConfig::new(width, num_heads), MlpConfig::new(width, 4 * width));
    let config = TransformerBlockConfig {
        placement: if norm_first { NormPlacement::Pre } else { NormPlacement::Post },
        ..TransformerBlockConfig::new(attention, mlp, NormConfig::layer(1e-5))
    };
    let format = format.as_deref().map(named_format).transpose()?;
    let block = |i| -> Result<TransformerBlock> {
        let vb = vb.pp("blocks").pp(i);
        let mut block = TransformerBlock::new(&config, vb.clone())?.with_recompute(recompute);
        if let Some(format) = format {
            block = block.quantise(format)?;
        }
        if let Some(rank) = lora {
            let targets = vec![Target::Query, Target::Key, Target::Value, Target::Output, Target::Up, Target::Down];
            let config = LoraConfig { targets, ..LoraConfig::new(rank, 2.0 * rank as f64) };
            block = block.with_lora("default", &config, vb)?;
        }
        Ok(block)
    };
    let blocks = (0..count).map(block).collect::<Result<Vec<_>>>()?;
    // The numbers of quantised weights aren't needed any more.
    drop(vb);
    let forward = move |contender| match contender {
        Contender::Ours | Contender::OursFused => {
            blocks.iter().try_fold(x.clone(), |x, block| Ok(block.forward_t(&x, backward)?))
        }
        _ => candle_core::bail!("expected candle-attention: candle has no transformer block"),
    };
    Ok((Box::new(forward), trained))
}

fn named_format(name: &str) -> Result<Format> {
    match name {
        "q8_0" => Ok(Format::Q8_0),
        "q4_0" => Ok(Format::Q4_0),
        "q5_0" => Ok(Format::Q5_0),
        "q4_k" => Ok(Format::Q4K),
        "q5_k" => Ok(Format::Q5K),
        "q6_k" => Ok(Format::Q6K),
        "nf4" => Ok(Format::Nf4),
        _ => candle_core::bail!("expected q8_0, q4_0, q5_0, q4_k, q5_k, q6_k or nf4, got {name}"),
    }
}
