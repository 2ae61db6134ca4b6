//! Llama and the many models with its names.

use crate::checkpoint::layout::plan::{Entry, INV_FREQ, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("q_proj.weight", &["q_proj.weight"]),
        Entry::of("q_proj.bias", &["q_proj.bias"]),
        Entry::of("k_proj.weight", &["k_proj.weight"]),
        Entry::of("k_proj.bias", &["k_proj.bias"]),
        Entry::of("v_proj.weight", &["v_proj.weight"]),
        Entry::of("v_proj.bias", &["v_proj.bias"]),
        Entry::of("o_proj.weight", &["o_proj.weight"]),
        Entry::of("o_proj.bias", &["o_proj.bias"]),
        // Qwen3
        Entry::of("q_norm.weight", &["q_norm.weight"]),
        Entry::of("k_norm.weight", &["k_norm.weight"]),
        // gpt-oss
        Entry::of("sinks", &["sinks"]),
    ],
    ignored: INV_FREQ,
    check: |_| Ok(()),
};
