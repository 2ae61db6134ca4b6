//! The configs of layers that can decode, and decoding piece by piece.

use candle_attention::rotary::{Pairing, RotaryConfig};
use candle_attention::{ForwardOptions, KvCache, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Tensor};

use crate::layers::{everything, scalings};

pub const EMBED_DIM: usize = 24;

fn plain() -> SelfAttentionConfig {
    SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(EMBED_DIM, 4) }
}

fn rotary(pairing: Pairing) -> Option<RotaryConfig> {
    Some(RotaryConfig { base: 100.0, dim: Some(4), pairing, ..RotaryConfig::default() })
}

/// Each feature alone, then several at once.
pub fn configs() -> Vec<(&'static str, SelfAttentionConfig)> {
    let all = SelfAttentionConfig { dropout_p: 0.0, sliding_window: None, ..everything() };
    let mut configs = vec![
        ("plain", plain()),
        ("grouped queries", SelfAttentionConfig { num_kv_heads: Some(2), value_dim: Some(5), ..plain() }),
        ("rotary, half split", SelfAttentionConfig { rotary: rotary(Pairing::HalfSplit), ..plain() }),
        ("rotary, interleaved", SelfAttentionConfig { rotary: rotary(Pairing::Interleaved), ..plain() }),
        ("alibi", SelfAttentionConfig { alibi: true, ..plain() }),
        ("alibi with sinks", SelfAttentionConfig { alibi: true, sinks: true, ..plain() }),
        ("softcap", SelfAttentionConfig { softcap: Some(1.5), ..plain() }),
        ("sinks", SelfAttentionConfig { sinks: true, ..plain() }),
        ("qk-norm", SelfAttentionConfig { qk_norm_eps: Some(1e-3), ..plain() }),
        ("window", SelfAttentionConfig { sliding_window: Some(5), ..plain() }),
        (
            "window of one",
            SelfAttentionConfig { sliding_window: Some(1), rotary: rotary(Pairing::HalfSplit), ..plain() },
        ),
        (
            "window with alibi and sinks",
            SelfAttentionConfig { sliding_window: Some(4), alibi: true, sinks: true, ..plain() },
        ),
        ("extra keys", SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..plain() }),
        ("window with extra keys", SelfAttentionConfig { sliding_window: Some(5), add_bias_kv: true, ..plain() }),
        ("everything", SelfAttentionConfig { embed_dim: EMBED_DIM, ..all.clone() }),
        ("everything, with a window", SelfAttentionConfig { embed_dim: EMBED_DIM, sliding_window: Some(6), ..all }),
    ];
    // The sequences grow beyond the original length.
    for scaling in scalings(3) {
        let rotary = Some(RotaryConfig { base: 100.0, scaling: Some(scaling), ..RotaryConfig::default() });
        configs.push(("rotary, scaled", SelfAttentionConfig { rotary, ..plain() }));
    }
    configs
}

pub fn config(name: &str) -> SelfAttentionConfig {
    configs().into_iter().find(|(other, _)| *other == name).expect("a config of this name").1
}

/// The bound on the difference between decoding and the whole sequence at once.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-6,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

/// Decodes x (batch, len, embed_dim) in pieces of these lengths, and the rest token by token.
pub fn decode(
    layer: &SelfAttention,
    x: &Tensor,
    pieces: &[usize],
    cache: &mut KvCache,
    options: &ForwardOptions,
) -> Result<Tensor> {
    let len = x.dim(1)?;
    let (mut outputs, mut start) = (Vec::new(), 0);
    for piece in pieces.iter().copied().chain(std::iter::repeat(1)) {
        if start == len {
            break;
        }
        let piece = piece.min(len - start);
        outputs.push(layer.forward_cached_with(&x.narrow(1, start, piece)?, cache, options)?.output);
        start += piece;
    }
    Ok(Tensor::cat(&outputs, 1)?)
}
