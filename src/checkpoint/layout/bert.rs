//! BERT and models with its names, and Hugging Face's vision transformers, which name the inner module differently.

use crate::checkpoint::layout::plan::{Entry, Table};

pub(super) static BERT: Table = Table {
    entries: &[
        Entry::of("self.query.weight", &["q_proj.weight"]),
        Entry::of("self.query.bias", &["q_proj.bias"]),
        Entry::of("self.key.weight", &["k_proj.weight"]),
        Entry::of("self.key.bias", &["k_proj.bias"]),
        Entry::of("self.value.weight", &["v_proj.weight"]),
        Entry::of("self.value.bias", &["v_proj.bias"]),
        OUT_WEIGHT,
        OUT_BIAS,
    ],
    // The names of PyTorch, and those of checkpoints that were converted from TensorFlow.
    ignored: &["output.LayerNorm.weight", "output.LayerNorm.bias", "output.LayerNorm.gamma", "output.LayerNorm.beta"],
    check: |_| Ok(()),
};

pub(super) static VIT: Table = Table {
    entries: &[
        Entry::of("attention.query.weight", &["q_proj.weight"]),
        Entry::of("attention.query.bias", &["q_proj.bias"]),
        Entry::of("attention.key.weight", &["k_proj.weight"]),
        Entry::of("attention.key.bias", &["k_proj.bias"]),
        Entry::of("attention.value.weight", &["v_proj.weight"]),
        Entry::of("attention.value.bias", &["v_proj.bias"]),
        OUT_WEIGHT,
        OUT_BIAS,
    ],
    ignored: &[],
    check: |_| Ok(()),
};

const OUT_WEIGHT: Entry = Entry::of("output.dense.weight", &["o_proj.weight"]);
const OUT_BIAS: Entry = Entry::of("output.dense.bias", &["o_proj.bias"]);
