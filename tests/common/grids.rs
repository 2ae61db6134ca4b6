//! Configs of both kinds of layers: each feature alone, then several at once.

use candle_attention::SelfAttentionConfig;
use candle_attention::rotary::{Pairing, RotaryConfig};

use crate::layers::{everything, scalings};

fn multi_head() -> SelfAttentionConfig {
    SelfAttentionConfig::new(8, 4)
}

pub fn rotary(pairing: Pairing, dim: Option<usize>) -> Option<RotaryConfig> {
    Some(RotaryConfig { base: 100.0, dim, pairing, ..RotaryConfig::default() })
}

/// The configs that both kinds of layers can have: a name, the config, and its number of parameters.
fn shared() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let config = multi_head();
    let with = |change: fn(&mut SelfAttentionConfig)| {
        let mut config = config.clone();
        change(&mut config);
        config
    };
    vec![
        ("single head", SelfAttentionConfig::single_head(5, 3, 4), 3),
        ("multi-head", config.clone(), 8),
        ("no biases", with(|c| (c.qkv_bias, c.out_bias) = (false, false)), 4),
        ("bias of W_O alone", with(|c| c.qkv_bias = false), 5),
        ("no bias of W_O", with(|c| c.out_bias = false), 7),
        ("no W_O", with(|c| c.out_proj = false), 6),
        ("one key head", with(|c| c.num_kv_heads = Some(1)), 8),
        ("two key heads", with(|c| c.num_kv_heads = Some(2)), 8),
        ("sizes of its own", with(|c| (c.head_dim, c.value_dim) = (Some(6), Some(3))), 8),
        ("scale", with(|c| c.scale = Some(-0.4)), 8),
        ("softcap", with(|c| c.softcap = Some(1.5)), 8),
        ("causal", with(|c| c.is_causal = true), 8),
        ("window", with(|c| c.sliding_window = Some(2)), 8),
        ("causal window", with(|c| (c.is_causal, c.sliding_window) = (true, Some(3))), 8),
        ("QK-norm", with(|c| (c.head_dim, c.qk_norm_eps) = (Some(4), Some(1e-3))), 10),
        ("ALiBi", with(|c| c.alibi = true), 8),
        ("sinks", with(|c| c.sinks = true), 9),
        ("dropout", with(|c| c.dropout_p = 0.2), 8),
        ("no bias of W_K", with(|c| c.k_bias = false), 7),
        ("a learned key", with(|c| c.add_bias_kv = true), 10),
        ("a key of zeros", with(|c| c.add_zero_attn = true), 8),
        ("a learned key and one of zeros", with(extra_keys), 10),
    ]
}

/// Extra keys together with grouped-query attention and with dropout.
fn extra_keys(config: &mut SelfAttentionConfig) {
    (config.add_bias_kv, config.add_zero_attn) = (true, true);
    (config.num_kv_heads, config.value_dim, config.is_causal, config.dropout_p) = (Some(2), Some(3), true, 0.2);
}

pub fn self_attention() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let with_rotary = |rotary| SelfAttentionConfig { head_dim: Some(4), rotary, ..multi_head() };
    let mut grid = shared();
    grid.extend([
        ("rotary, halves", with_rotary(rotary(Pairing::HalfSplit, None)), 8),
        ("rotary, interleaved", with_rotary(rotary(Pairing::Interleaved, None)), 8),
        ("rotary, halves, partial", with_rotary(rotary(Pairing::HalfSplit, Some(2))), 8),
        ("rotary, interleaved, partial", with_rotary(rotary(Pairing::Interleaved, Some(2))), 8),
        ("everything", everything(), 11),
    ]);
    for scaling in scalings(2) {
        let rotary = RotaryConfig { base: 100.0, scaling: Some(scaling), ..RotaryConfig::default() };
        grid.push(("rotary, scaled", with_rotary(Some(rotary)), 8));
    }
    grid
}

pub fn cross_attention() -> Vec<(&'static str, SelfAttentionConfig, usize)> {
    let mut grid = shared();
    let with_kv_dim = SelfAttentionConfig { kv_dim: Some(6), ..multi_head() };
    let all_at_once = SelfAttentionConfig { kv_dim: Some(6), rotary: None, ..everything() };
    grid.extend([("kv_dim", with_kv_dim, 8), ("everything", all_at_once, 11)]);
    grid
}
