//! `torch.nn.MultiheadAttention`, whose queries, keys and values are packed in one matrix where they are made from tokens of
//! one size.

use super::plan::{Entry, Table, one_width};
use crate::config::SelfAttentionConfig;
use crate::error::AttentionError;

pub(super) fn is_packed(config: &SelfAttentionConfig) -> bool {
    config.kv_dim() == config.embed_dim && config.value_input_dim() == config.embed_dim
}

pub(super) static PACKED: Table = Table {
    entries: &[
        Entry::of("in_proj_weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]),
        IN_BIAS,
        BIAS_K,
        BIAS_V,
        OUT_WEIGHT,
        OUT_BIAS,
    ],
    others: &[],
    check,
};

pub(super) static SEPARATE: Table = Table {
    entries: &[
        Entry::of("q_proj_weight", &["q_proj.weight"]),
        Entry::of("k_proj_weight", &["k_proj.weight"]),
        Entry::of("v_proj_weight", &["v_proj.weight"]),
        IN_BIAS,
        BIAS_K,
        BIAS_V,
        OUT_WEIGHT,
        OUT_BIAS,
    ],
    others: &[],
    check,
};

const IN_BIAS: Entry = Entry::of("in_proj_bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]);
const BIAS_K: Entry = Entry::of("bias_k", &["bias_k"]).with_leading_axes();
const BIAS_V: Entry = Entry::of("bias_v", &["bias_v"]).with_leading_axes();
const OUT_WEIGHT: Entry = Entry::of("out_proj.weight", &["o_proj.weight"]);
const OUT_BIAS: Entry = Entry::of("out_proj.bias", &["o_proj.bias"]);

fn check(config: &SelfAttentionConfig) -> Result<(), AttentionError> {
    one_width(config)?;
    if config.qkv_bias != config.out_bias {
        let expected = format!("qkv_bias {}, since the layout torch has all biases or none", config.qkv_bias);
        return Err(AttentionError::Config { field: "out_bias", expected, got: config.out_bias.to_string() });
    }
    Ok(())
}
