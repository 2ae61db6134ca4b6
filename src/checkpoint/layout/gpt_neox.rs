//! GPT-NeoX and those that follow it, which pack queries, keys and values head by head.

use super::plan::{Entry, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("query_key_value.weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]).by_key_heads(),
        Entry::of("query_key_value.bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]).by_key_heads(),
        Entry::of("dense.weight", &["o_proj.weight"]),
        Entry::of("dense.bias", &["o_proj.bias"]),
    ],
    // Old checkpoints hold the causal mask as a table, and the frequencies of the rotary embedding.
    others: &["bias", "masked_bias", "rotary_emb.inv_freq"],
    check: |_| Ok(()),
};
