//! Layers: made, called, decoded with, saved and loaded.

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding};
use candle_attention::{CrossAttention, Error, ForwardOptions, Layout, LayoutFile, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};

use crate::room::{fills_up, memory, number, refuses, returns, row};

fn layer(config: &SelfAttentionConfig, dtype: DType) -> Result<SelfAttention, Error> {
    SelfAttention::new(config, VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu))
}

fn cross(config: &SelfAttentionConfig) -> CrossAttention {
    CrossAttention::new(config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)).unwrap()
}

fn causal() -> SelfAttentionConfig {
    SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) }
}

/// Sizes of which none fits, for x (1, len, 8) by broadcasting.
const LONG: [usize; 4] = [1 << 30, 1 << 40, 1 << 58, 1 << 61];

/// Calls a layer with inputs that fit and with inputs that don't.
fn forward(config: &SelfAttentionConfig, dtype: DType) {
    let layer = layer(config, dtype).unwrap();
    let options = ForwardOptions { attn_mask: candle_attention::Mask::prefix(0), ..Default::default() };
    returns(|| layer.forward_with(&row(&[1, 1 << 19, 8], dtype), &options));
    returns(|| layer.forward_with_weights(&row(&[1, 1024, 8], dtype)));
    for len in LONG {
        refuses(|| layer.forward(&row(&[1, len, 8], dtype)));
        refuses(|| layer.forward(&row(&[len, 1, 8], dtype)));
        refuses(|| layer.forward(&row(&[len, len, 8], dtype)));
    }
}

fn json(text: &str) -> SelfAttentionConfig {
    serde_json::from_str(text).unwrap()
}

memory! {
    plain: forward(&SelfAttentionConfig::new(8, 2), DType::F32);
    half: forward(&SelfAttentionConfig { qk_norm_eps: Some(1e-3), ..SelfAttentionConfig::new(8, 2) }, DType::BF16);
    with_everything: {
        let rotary = Some(RotaryConfig { pairing: Pairing::Interleaved, dim: Some(2), ..Default::default() });
        let config = SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, sinks: true, rotary, ..causal() };
        forward(&SelfAttentionConfig { qk_norm_eps: Some(1e-3), softcap: Some(2.0), ..config }, DType::F32);
    };
    cross_attention: {
        let layer = cross(&SelfAttentionConfig::new(8, 2));
        let memory = row(&[1, 1 << 19, 8], DType::F32);
        let x = row(&[1, 2, 8], DType::F32);
        returns(|| layer.forward(&x, &memory));
        fills_up(|| layer.project(&memory));
        for len in LONG {
            refuses(|| layer.forward(&x, &row(&[1, len, 8], DType::F32)));
            refuses(|| layer.forward(&row(&[1, len, 8], DType::F32), &x));
            refuses(|| layer.project(&row(&[1, len, 8], DType::F32)));
        }
    };
    selected_memories: {
        let layer = cross(&SelfAttentionConfig::new(8, 2));
        let projected = layer.project(&row(&[2, 64, 8], DType::F32)).unwrap();
        let sequences = vec![1; 1 << 24];
        refuses(|| projected.select(&sequences));
        returns(|| projected.select(&sequences[..1 << 13]));
        fills_up(|| projected.select(&sequences[..1 << 15]));
    };
    rotary_tables_and_positions: {
        for dims in [[1, 1 << 40, 1], [2, 1 << 34, 1]] {
            let table = number(&dims, DType::F32);
            refuses(|| RotaryEmbedding::from_tables(&table, &table, 2, Pairing::default())?.apply(&number(&[2, 1, 3, 2], DType::F32), 0));
        }
        let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 8).unwrap();
        for (batch, len) in [(1 << 20, 1 << 20), (1, 1 << 40)] {
            let ids = number(&[batch, len], DType::U32);
            refuses(|| rotary.apply_positions(&row(&[batch, 1, len, 8], DType::F32), &ids));
        }
    };
    rotary: {
        let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 8).unwrap();
        returns(|| rotary.apply(&row(&[1, 2, 1 << 16, 8], DType::F32), 0));
        returns(|| rotary.apply_each(&row(&[2, 2, 1 << 16, 8], DType::F16), &[0, 1]));
        for len in LONG {
            refuses(|| rotary.apply(&row(&[1, 1, len, 8], DType::F32), 0));
            refuses(|| rotary.apply(&row(&[len, 1, 1, 8], DType::F32), 0));
            refuses(|| rotary.apply(&row(&[len, len, len, 8], DType::F32), 0));
        }
    };
    caches: {
        let layer = layer(&causal(), DType::F32).unwrap();
        for len in LONG {
            refuses(|| layer.kv_cache(len));
            refuses(|| layer.kv_cache(1).unwrap().reserve(len >> 2));
            refuses(|| layer.prefill(&row(&[1, len, 8], DType::F32), &[len], &mut layer.kv_cache(1).unwrap()));
        }
        fills_up(|| layer.kv_cache(1 << 22));
        fills_up(|| {
            let mut cache = layer.kv_cache(2)?;
            cache.reserve(1 << 18)?;
            Ok(cache)
        });
    };
    many_sequences_in_a_cache: {
        let layer = layer(&causal(), DType::F32).unwrap();
        let sequences = vec![0; 1 << 22];
        fills_up(|| layer.kv_cache(1)?.select(&sequences));
        returns(|| layer.kv_cache(1 << 21)?.truncate(3));
        returns(|| {
            let mut cache = layer.kv_cache(1 << 12)?;
            let x = row(&[1 << 12, 16, 8], DType::F32);
            layer.forward_cached(&x, &mut cache)?;
            layer.forward_cached(&x, &mut cache)?;
            cache.select(&sequences[..1 << 12])
        });
    };
    caches_of_different_lengths_with_slopes: {
        let layer = layer(&SelfAttentionConfig { alibi: true, ..causal() }, DType::F32).unwrap();
        returns(|| {
            let mut cache = layer.kv_cache(2)?;
            layer.prefill(&row(&[2, 2, 8], DType::F32), &[2, 1], &mut cache)?;
            layer.forward_cached(&row(&[2, 1024, 8], DType::F32), &mut cache)
        });
    };
    configs: {
        for text in [
            r#"{"embed_dim":268435456,"num_heads":1}"#,
            r#"{"embed_dim":1,"num_heads":1,"head_dim":1152921504606846975}"#,
            r#"{"embed_dim":8,"num_heads":1,"head_dim":268435456,"qk_norm_eps":1.0,"alibi":true}"#,
            r#"{"embed_dim":32768,"num_heads":32768}"#,
        ] {
            refuses(|| layer(&json(text), DType::F32));
            refuses(|| layer(&json(text), DType::BF16));
        }
        returns(|| layer(&SelfAttentionConfig::new(512, 1), DType::F32));
        fills_up(|| layer(&SelfAttentionConfig::new(512, 1), DType::F16));
    };
    files: {
        let config = SelfAttentionConfig::new(512, 1);
        let layer = layer(&config, DType::F32).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let foreign = folder.path().join("foreign.safetensors");
        layer.save_layout(Layout::Gpt2, "", &foreign).unwrap();
        let file = LayoutFile::new(Layout::Gpt2, &foreign);
        let bytes = layer.to_bytes().unwrap();
        returns(|| layer.to_bytes());
        returns(|| layer.to_layout(Layout::Gpt2));
        returns(|| layer.trainable());
        returns(|| SelfAttention::from_bytes(&bytes, &Device::Cpu));
        fills_up(|| SelfAttention::from_bytes(&bytes, &Device::Cpu));
        returns(|| SelfAttention::load_layout(&config, &file));
        fills_up(|| SelfAttention::load_layout(&config, &file));
        let vb = VarBuilder::from_tensors(layer.to_layout(Layout::Gpt2).unwrap().into_iter().collect(), DType::F32, &Device::Cpu);
        returns(|| SelfAttention::from_layout(Layout::Gpt2, &config, vb.clone()));
        fills_up(|| SelfAttention::from_layout(Layout::Gpt2, &config, vb.clone()));
    };
}
