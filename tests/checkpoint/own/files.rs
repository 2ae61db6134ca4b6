//! Layers to save, and safetensors files that can be changed.

use std::collections::{BTreeMap, HashMap};

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryScaling, Yarn};
use candle_attention::{SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::layers::self_attention;

/// The metadata entry that holds a layer's config.
pub const ENTRY: &str = "candle_attention";

/// A config in which every field has a value that no default or rounding gives.
pub fn odd_config() -> SelfAttentionConfig {
    SelfAttentionConfig {
        embed_dim: 10,
        num_heads: 6,
        num_kv_heads: Some(2),
        head_dim: Some(4),
        value_dim: Some(3),
        kv_dim: Some(10),
        value_input_dim: Some(10),
        out_proj: true,
        qkv_bias: true,
        k_bias: false,
        out_bias: false,
        scale: Some(0.1),
        softcap: Some(1.0 / 3.0),
        is_causal: true,
        sliding_window: Some(usize::MAX),
        dropout_p: 0.1 + 0.2,
        qk_norm_eps: Some(1e-6),
        rotary: Some(RotaryConfig {
            base: 1e4 / 3.0,
            dim: Some(2),
            pairing: Pairing::Interleaved,
            scaling: Some(RotaryScaling::Yarn(Yarn {
                factor: 4.0 / 3.0,
                original_max_position_embeddings: usize::MAX,
                beta_fast: 10.0 / 3.0,
                beta_slow: 0.1 + 0.2,
                attention_factor: Some(1.1),
                mscale: Some(0.7),
                mscale_all_dim: Some(1.0 / 7.0),
                truncate: false,
            })),
        }),
        alibi: true,
        sinks: true,
        // These can't be combined with ALiBi.
        add_bias_kv: false,
        add_zero_attn: false,
        seed: u64::MAX,
    }
}

pub fn odd_layer(dtype: DType) -> Result<SelfAttention> {
    Ok(self_attention(&odd_config(), dtype)?)
}

/// The bytes of a small plain layer: embed_dim 4, two heads, weights (4, 4) and biases (4).
pub fn small_file() -> Result<Vec<u8>> {
    Ok(self_attention(&SelfAttentionConfig::new(4, 2), DType::F32)?.to_bytes()?)
}

pub fn load(bytes: &[u8]) -> Result<SelfAttention> {
    Ok(SelfAttention::from_bytes(bytes, &Device::Cpu)?)
}

/// A safetensors file: the length of the header, the header, the data.
pub fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The contents of a file, which can be changed before they are written again.
pub struct Parts {
    pub metadata: HashMap<String, String>,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    pub fn of(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        Ok(Self {
            metadata: header.metadata().clone().unwrap_or_default(),
            tensors: candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?.into_iter().collect(),
        })
    }

    /// The contents of [`small_file`].
    pub fn small() -> Result<Self> {
        Self::of(&small_file()?)
    }

    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(safetensors::serialize(&self.tensors, Some(self.metadata.clone()))?)
    }

    /// Loads a layer from the parts.
    pub fn load(&self) -> Result<SelfAttention> {
        load(&self.to_bytes()?)
    }

    /// The same tensors under a changed config.
    pub fn with_config(mut self, change: impl FnOnce(&mut Value)) -> Self {
        let mut header: Value = serde_json::from_str(&self.metadata[ENTRY]).expect("a header");
        change(&mut header["config"]);
        self.metadata.insert(ENTRY.to_string(), header.to_string());
        self
    }
}
