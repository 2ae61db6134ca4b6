//! T5, which has no biases and doesn't scale its scores.

use crate::checkpoint::layout::plan::{Entry, Table};
use crate::error::AttentionError;
use crate::layer::config::SelfAttentionConfig;

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("q.weight", &["q_proj.weight"]),
        Entry::of("k.weight", &["k_proj.weight"]),
        Entry::of("v.weight", &["v_proj.weight"]),
        Entry::of("o.weight", &["o_proj.weight"]),
    ],
    ignored: &["relative_attention_bias.weight"],
    check,
};

fn check(config: &SelfAttentionConfig) -> Result<(), AttentionError> {
    match config.scale {
        Some(1.0) => Ok(()),
        scale => {
            let expected = "1, since T5 doesn't scale its scores".into();
            let got = scale.map_or("none given".to_string(), |scale| scale.to_string());
            Err(AttentionError::Config { field: "scale", expected, got })
        }
    }
}
