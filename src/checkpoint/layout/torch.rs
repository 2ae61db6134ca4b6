//! `torch.nn.MultiheadAttention`. Queries, keys and values are packed in one matrix if the tokens that they are
//! projected from have the same size.

use crate::checkpoint::layout::plan::{Entry, Table, check_equal_widths};
use crate::error::AttentionError;
use crate::layer::config::SelfAttentionConfig;

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
    ignored: &[],
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
    ignored: &[],
    check,
};

const IN_BIAS: Entry = Entry::of("in_proj_bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]);
const BIAS_K: Entry = Entry::of("bias_k", &["bias_k"]).with_leading_axes();
const BIAS_V: Entry = Entry::of("bias_v", &["bias_v"]).with_leading_axes();
const OUT_WEIGHT: Entry = Entry::of("out_proj.weight", &["o_proj.weight"]);
const OUT_BIAS: Entry = Entry::of("out_proj.bias", &["o_proj.bias"]);

fn check(config: &SelfAttentionConfig) -> Result<(), AttentionError> {
    check_equal_widths(config)?;
    if config.qkv_bias != config.out_bias {
        let expected = format!("qkv_bias {}, since the layout torch has all biases or none", config.qkv_bias);
        return Err(AttentionError::Config { field: "out_bias", expected, got: config.out_bias.to_string() });
    }
    Ok(())
}
