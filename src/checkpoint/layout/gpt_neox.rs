//! GPT-NeoX and models with its layout, which pack queries, keys and values head by head.

use crate::checkpoint::layout::plan::{Entry, Table};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("query_key_value.weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]).by_key_heads(),
        Entry::of("query_key_value.bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]).by_key_heads(),
        Entry::of("dense.weight", &["o_proj.weight"]),
        Entry::of("dense.bias", &["o_proj.bias"]),
    ],
    // Old checkpoints store the causal mask as a tensor, and the frequencies of the rotary embedding.
    ignored: &["bias", "masked_bias", "rotary_emb.inv_freq"],
    check: |_| Ok(()),
};
