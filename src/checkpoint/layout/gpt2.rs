//! GPT-2, whose `Conv1D` stores its matrices as (in, out).

use crate::checkpoint::layout::plan::{Entry, Table, check_equal_widths};

pub(super) static TABLE: Table = Table {
    entries: &[
        Entry::of("c_attn.weight", &["q_proj.weight", "k_proj.weight", "v_proj.weight"]).transposed(),
        Entry::of("c_attn.bias", &["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
        Entry::of("c_proj.weight", &["o_proj.weight"]).transposed(),
        Entry::of("c_proj.bias", &["o_proj.bias"]),
    ],
    // The causal mask, which old checkpoints store as a tensor.
    ignored: &["bias", "masked_bias"],
    check: check_equal_widths,
};
