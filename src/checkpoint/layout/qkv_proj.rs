//! Phi-3, which packs queries, keys and values in one matrix. Keys and values may have fewer heads.

use crate::checkpoint::layout::plan::{Entry, INV_FREQ, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("qkv_proj.weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]),
        Entry::of("qkv_proj.bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
        Entry::of("o_proj.weight", &["o_proj.weight"]),
        Entry::of("o_proj.bias", &["o_proj.bias"]),
    ],
    ignored: INV_FREQ,
    check: |_| Ok(()),
};
