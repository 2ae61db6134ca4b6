//! This crate's own names.

use crate::checkpoint::layout::plan::{Entry, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("q_proj.weight", &["q_proj.weight"]),
        Entry::of("k_proj.weight", &["k_proj.weight"]),
        Entry::of("v_proj.weight", &["v_proj.weight"]),
        Entry::of("o_proj.weight", &["o_proj.weight"]),
        Entry::of("q_proj.bias", &["q_proj.bias"]),
        Entry::of("k_proj.bias", &["k_proj.bias"]),
        Entry::of("v_proj.bias", &["v_proj.bias"]),
        Entry::of("o_proj.bias", &["o_proj.bias"]),
        Entry::of("q_norm.weight", &["q_norm.weight"]),
        Entry::of("k_norm.weight", &["k_norm.weight"]),
        Entry::of("sinks", &["sinks"]),
        Entry::of("bias_k", &["bias_k"]),
        Entry::of("bias_v", &["bias_v"]),
    ],
    ignored: &[],
    check: |_| Ok(()),
};
